"""Fail when the code of the package is not as the rules of the house ask.

Everywhere: nothing reaches for a private attribute of another object or walks the stack, and what
depends on the kind of targets is up to `targets/`, not to a flag `_classification`. What was there
before the rules is listed in tools/house_known.txt, with how often it is there. The list may only
shrink: what it lists and is gone has to leave it.

No class is longer than 400 lines, no file than 600, and no function than 80, its docstring apart.

Usage: python tools/check_house.py [package folder [list of what is known]]
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_LINES = {"class": 400, "file": 600, "function": 80}
FLAG = re.compile(r"(?<!\w)_classification\b")
FLAG_PACKAGE = "targets"
STACK_WALKS = {"_getframe", "_current_frames", "currentframe", "f_back"}
INSPECT_WALKS = {"stack", "trace", "getouterframes", "getinnerframes"}
GETTERS = {"getattr", "hasattr", "setattr", "delattr"}
REMEDIES = {
    "private": "is a private attribute of another object. Give its owner a public method",
    "stack": "walks the stack. Pass what is needed as an argument",
    "flag": f"is for {FLAG_PACKAGE}/ alone. Ask the targets",
}

Key = tuple[str, str, str]  # kind, file, what


def is_private(name: str) -> bool:
    """Tell `_name` from `name` and `__name__`."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def module_names(tree: ast.Module, path: Path, package: Path) -> set[str]:
    """Names that a file binds to modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            ours = node.level > 0 or parts[0] == package.name
            folder = package
            if node.level:
                folder = path.parents[node.level - 1]
            elif ours:
                parts = parts[1:]
            folder = folder.joinpath(*parts)
            for alias in node.names:
                file = folder / alias.name
                # what other libraries name in lower case may be a function, which has none
                module = file.is_dir() or file.with_suffix(".py").is_file()
                if module if ours else alias.name.lower() == alias.name:
                    names.add(alias.asname or alias.name)
    return names


def is_own(owner: ast.expr, modules: set[str]) -> bool:
    """Whether the private attributes of an expression may be used: self, cls, super(), modules."""
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    if isinstance(owner, ast.Name):
        return owner.id in {"self", "cls"} | modules
    while isinstance(owner, ast.Attribute) and (owner.attr.islower() or is_private(owner.attr)):
        owner = owner.value  # a module of a package, named with its path
    return isinstance(owner, ast.Name) and owner.id in modules


def offences(tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, int, str]]:
    """Yield (kind, line, what) of private attributes and walks of the stack."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            walks = STACK_WALKS | (INSPECT_WALKS if node.module == "inspect" else set())
            for alias in node.names:
                if alias.name in walks:
                    yield "stack", node.lineno, f"{node.module}.{alias.name}"
            continue
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in GETTERS
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], str(node.args[1].value)
        else:
            continue
        what = f"{ast.unparse(owner)}.{name}"
        if name in STACK_WALKS or (name in INSPECT_WALKS and ast.unparse(owner) == "inspect"):
            yield "stack", node.lineno, what
        elif is_private(name) and not is_own(owner, modules):
            yield "private", node.lineno, what


def lengths(tree: ast.Module, n_lines: int) -> Iterator[tuple[str, int, str, int]]:
    """Yield (kind, line, name, lines) of a file and its classes and functions."""
    yield "file", 1, "it", n_lines
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            n = node.end_lineno - node.lineno + 1
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if kind == "function" and ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                assert text.end_lineno is not None
                n -= text.end_lineno - text.lineno + 1
            yield kind, node.lineno, node.name, n


def measure(package: Path) -> tuple[list[str], dict[Key, list[int]]]:
    """Return messages of what is too long, and the lines of what else is found."""
    problems: list[str] = []
    found: dict[Key, list[int]] = {}
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        shown = path.relative_to(package.parent).as_posix()
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        for kind, line, what in offences(tree, module_names(tree, path, package)):
            found.setdefault((kind, shown, what), []).append(line)
        if inside.parts[0] != FLAG_PACKAGE:
            for line, text in enumerate(source.splitlines(), 1):
                for _ in FLAG.finditer(text):
                    found.setdefault(("flag", shown, "_classification"), []).append(line)
        problems += [
            f"{shown}:{line}: {kind} {name} has {n} lines; expected {MOST_LINES[kind]} at most."
            for kind, line, name, n in lengths(tree, len(source.splitlines()))
            if n > MOST_LINES[kind]
        ]
    return problems, found


def read_known(path: Path) -> dict[Key, int]:
    """Read lines of "count kind file what"."""
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            count, kind, file, what = line.split(" ", 3)
            known[kind, file, what] = int(count)
    return known


def check(package: Path, known: dict[Key, int]) -> list[str]:
    """Return one message per violation in the package folder."""
    problems, found = measure(package)
    for kind, file, what in sorted(found.keys() | known.keys()):
        lines = found.get((kind, file, what), [])
        listed = known.get((kind, file, what), 0)
        if len(lines) > listed:
            where = ", ".join(map(str, sorted(lines)))
            more = f" ({listed} of {len(lines)} known)" if listed else ""
            problems.append(f"{file}:{where}: '{what}'{more} {REMEDIES[kind]}.")
        elif len(lines) < listed:
            problems.append(
                f"{file}: '{what}' is listed {listed} times and found {len(lines)} times. Lower "
                "the number in tools/house_known.txt, or take the line out."
            )
    return problems


def main(arguments: list[str]) -> int:
    """Check the folder named on the command line, by default this repository's package."""
    root = Path(__file__).resolve().parent.parent
    package = Path(arguments[0]).resolve() if arguments else root / "sklearn_maml"
    if not package.is_dir():
        print(f"{package} is not a folder. Pass the folder of the package.", file=sys.stderr)
        return 2
    known = Path(arguments[1]) if len(arguments) > 1 else root / "tools" / "house_known.txt"
    problems = check(package, read_known(known))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
