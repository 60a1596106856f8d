"""The code on the pages of the documentation runs, and does what the text beside it says.

The blocks of a page run one after another, as a reader would paste them. A claim of the text is
asserted in a comment that the reader does not see, behind the block it is about:

    <!-- check
    assert error < 0.5
    -->

Code of other libraries is a ``text`` block. A block that needs one, behind a comment
``<!-- needs skops -->``, is skipped where it is missing; `make test-integration` runs it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import socket
import textwrap
from pathlib import Path

import pytest
import sklearn

from sklearn_maml.meta_gradients import MetaGradient
from sklearn_maml.targets import Loss, Targets
from sklearn_maml.update_rules import TaskSolver

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BUILT = {"_build", "auto_examples", "generated"}
BLOCK = re.compile(
    r"(?:^<!-- needs ([\w, ]+) -->\n+)?"
    r"(?:^[ \t]*```python\n(.*?)^[ \t]*```$|^<!-- check\n(.*?)^-->$)",
    re.M | re.S,
)
PAGES = {
    path.relative_to(DOCS).as_posix(): path
    for path in sorted(DOCS.rglob("*.md"))
    if not BUILT & set(path.relative_to(DOCS).parts)
}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the docs are only in the repository")


def blocks_of(text):
    """Line number, code and the libraries that it needs of each block of a page."""
    for found in BLOCK.finditer(text):
        which = 2 if found[2] is not None else 3
        line = text[: found.start(which)].count("\n")
        yield line, textwrap.dedent(found[which]), (found[1] or "").replace(",", " ").split()


def needs(path):
    """Libraries that blocks of a page need."""
    return [n for _, _, needed in blocks_of(path.read_text(encoding="utf-8")) for n in needed]


def run(path, names):
    for line, code, needed in blocks_of(path.read_text(encoding="utf-8")):
        if any(importlib.util.find_spec(name) is None for name in needed):
            continue
        tree = ast.increment_lineno(ast.parse(code, str(path)), line)
        exec(compile(tree, str(path), "exec"), names)


@pytest.fixture
def as_reader(monkeypatch, tmp_path):
    """An empty folder, scikit-learn's settings given back, and what `torchrun` would set."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    with sklearn.config_context():
        yield


# the warnings of other libraries are theirs
OTHERS = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


@pytest.mark.usefixtures("as_reader")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=OTHERS if needed else [])
        for name, path in PAGES.items()
        for needed in ({False, True} if any(needs(path)) else {False})
        if any(blocks_of(path.read_text(encoding="utf-8")))
    ],
)
def test_the_code_of_a_page_runs(page):
    pytest.importorskip("matplotlib.pyplot")
    # a module of its own, so that classes of the page can be pickled and inspected
    run(PAGES[page], {"__name__": "__main__"})


def test_a_page_whose_code_or_claim_is_wrong_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n<!-- check\nassert x == 2\n-->\n")
    with pytest.raises(AssertionError) as raised:
        run(page, {})
    assert raised.traceback[-1].lineno + 1 == 8


def test_every_page_is_in_a_table_of_contents():
    entries = set()
    for name, path in PAGES.items():
        folder = Path(name).parent
        for toctree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.S):
            for line in toctree.splitlines():
                target = re.sub(r".*<(.*)>", r"\1", line.strip())
                if target and not target.startswith(":"):
                    entries.add(os.path.normpath(folder / target))
    pages = {name.removesuffix(".md") for name in PAGES}
    assert pages - entries == {"index"}


# --- the API reference


def public_objects():
    for module in ("sklearn_maml", "sklearn_maml.datasets", "sklearn_maml.inspection"):
        for name in importlib.import_module(module).__all__:
            yield name
    yield from importlib.import_module("sklearn_maml.exceptions").__all__
    bases = {"update_rules": TaskSolver, "meta_gradients": MetaGradient, "targets": (Loss, Targets)}
    for module, base in bases.items():
        for name, value in vars(importlib.import_module(f"sklearn_maml.{module}")).items():
            private = name.startswith("_") or name in ("GradientRule", "Targets")
            if inspect.isclass(value) and issubclass(value, base) and not private:
                yield name


def test_every_public_name_is_in_the_api_reference():
    listed = set(re.findall(r"^   (\w+)$", (DOCS / "api.rst").read_text(), re.M))
    assert set(public_objects()) <= listed


# --- links of the built site


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tag", "problem"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="#here">', None),
        ('<a href="https://example.org/a?b#c">', None),
        ('<img src="data:image/png;base64,AA">', None),
        ('<a href="c.html">', "does not exist"),
        ('<a href="b.html#nowhere">', "has no such anchor"),
        ('<a href="#nowhere">', "has no such anchor"),
        ('<img src="c.png">', "does not exist"),
        ('<a href="folder/">', "is a folder"),
        ('<a href="http:/example">', "is no address"),
        ('<script src="https://example.org/a.js">', "is loaded from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "is loaded from elsewhere"),
    ],
)
def test_links_of_the_built_site_are_checked(tmp_path, capsys, tag, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.html").write_text(f'<p id="here">{tag}')
    (tmp_path / "b.html").write_text('<p id="there">')
    status = load_tool("check_links").main([str(tmp_path)])
    errors = capsys.readouterr().err
    assert status == (problem is not None)
    assert (problem or "") in errors
    assert len(errors.splitlines()) == (problem is not None)


def test_styles_that_load_from_elsewhere_are_reported(tmp_path, capsys):
    (tmp_path / "a.html").write_text("<p>")
    (tmp_path / "a.css").write_text("@font-face { src: url(https://example.org/f.woff) }")
    assert load_tool("check_links").main([str(tmp_path)]) == 1
    assert "loaded from elsewhere" in capsys.readouterr().err
