"""Fail when the built site links to what is not there, or loads anything from elsewhere.

Checks, in every page of a folder of html files: that linked pages, anchors, images, scripts and
styles exist; that addresses of other sites are well formed (they are not visited); that no script,
style, font or image comes from another site, so that the pages can be read without a network.

Usage: python tools/check_links.py FOLDER
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# attributes that make a browser load something at once
LOADED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []  # address, and whether it is loaded at once
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        for name in ("href", "src"):
            if given.get(name) is not None and given.get("rel") != "canonical":
                self.links.append((given[name] or "", (tag, name) in LOADED))


def problems_of(folder: Path) -> list[str]:
    """Return one message for each broken link in the pages of a folder."""
    found = sorted(folder.rglob("*.html"))
    # the theme keeps a template among its static files
    pages = {path: Page(path) for path in found if "_static" not in path.parts}
    problems = []
    for path, page in pages.items():
        for link, loaded in page.links:
            problem = _problem(link, loaded, path, pages)
            if problem:
                problems.append(f"{path.relative_to(folder)}: {link!r} {problem}")
    for path in sorted(folder.rglob("*.css")):
        for link in re.findall(r"url\([\"']?([^)\"']+)", path.read_text(encoding="utf-8")):
            if re.match(r"(https?:)?//", link):
                problems.append(f"{path.relative_to(folder)}: {link!r} is loaded from elsewhere")
    return problems


def _problem(link: str, loaded: bool, path: Path, pages: dict[Path, Page]) -> str | None:
    try:
        parts = urlsplit(link)
    except ValueError as error:
        return f"is no address: {error}"
    if parts.scheme in ("data", "mailto", "javascript"):
        return None
    if parts.scheme or parts.netloc:
        if loaded:
            return "is loaded from elsewhere"
        well_formed = parts.scheme in ("http", "https") and "." in parts.netloc
        return None if well_formed and " " not in link else "is no address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.exists():
        return "does not exist"
    if target.is_dir():
        return "is a folder"
    anchor = unquote(parts.fragment)
    # scripts of the theme make "#" of their own
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "has no such anchor"
    return None


def main(arguments: list[str]) -> int:
    """Check the folder named on the command line."""
    if len(arguments) != 1 or not list(Path(arguments[0]).rglob("*.html")):
        print("Usage: python tools/check_links.py FOLDER (one with html files)", file=sys.stderr)
        return 2
    problems = problems_of(Path(arguments[0]).resolve())
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
