"""The scripts of the gallery, `examples/plot_*.py`, can be read by sphinx-gallery, and run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import sklearn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("plot_*.py"))

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are only in the repository"),
    pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem),
]


def test_an_example_is_a_page_of_the_gallery(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    title, line, blank, *rest = (ast.get_docstring(tree) or "").splitlines()
    assert set(line) == {"="}
    assert len(line) == len(title)
    assert blank == ""
    assert rest
    source = script.read_text(encoding="utf-8")
    assert source.count("\n# %%\n") >= 3
    assert source.count("plt.show()") >= 1
    figures = source.count("plt.subplots(")
    assert source.count("plt.show()") == figures, "a figure that is not shown"


def test_what_an_example_imports_from_the_package_exists(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sklearn_maml"):
            names = {}
            exec(ast.unparse(node), names)
            assert all(alias.name in names for alias in node.names)


def test_everything_random_in_an_example_is_seeded(script):
    source = script.read_text(encoding="utf-8")
    assert not re.search(r"np\.random\.(?!RandomState\(\w)", source)
    for call in re.findall(r"MAML(?:Regressor|Classifier)\((.*?)\)\n", source, re.S):
        assert "random_state" in call or "**setting" in call


@pytest.mark.slow
def test_an_example_runs_and_draws(script, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    shown = []

    def show():
        shown.extend(plt.get_fignums())
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    source = script.read_text(encoding="utf-8")
    with sklearn.config_context(), plt.rc_context():
        exec(compile(source, str(script), "exec"), {"__name__": "__main__"})
    assert len(shown) == source.count("plt.show()")
