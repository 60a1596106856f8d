"""The rules of the house hold, and the tools that check them notice when they don't."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sklearn_maml

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "tools").is_dir(), reason="the tools are only in the repository"
)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports():
    return load_tool("check_imports")


@pytest.fixture
def package(tmp_path):
    """Write files of a made-up package, and return its folder."""

    def write(**sources):
        folder = tmp_path / "sklearn_maml"
        for name, source in {"__init__": "", **sources}.items():
            path = folder / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return folder

    return write


# --- the order of imports


def test_the_package_keeps_the_order_of_imports(imports, capsys):
    status = imports.main([])
    assert capsys.readouterr().err == ""
    assert status == 0


def test_an_orderly_package_passes(imports, package):
    folder = package(
        __init__="from .estimators import MAMLRegressor\nfrom . import few_shot",
        exceptions="import numpy",
        _compat="import torch",
        _validation="from ._compat import x",
        data__in____init__="",
        data__in__tasks="from ..exceptions import E\nimport numpy as np",
        data__in__episodes="import torch\nfrom sklearn_maml.data.tasks import T",
        update_rules="import torch",
        engine="import sklearn_maml.inner",
        inner="from . import update_rules",
        meta_gradients="from .inner import P",
        heads="",
        training__in__schedule="from ..engine import e",
        estimators="def f():\n    from .training.net import Net",
        few_shot="from .estimators import MAMLRegressor",
        learners__in____init__="from .base import Learner",
        learners__in__base="from ..engine import e\nfrom ..targets.losses import L",
        learners__in__mixture="from sklearn_maml.learners.base import Learner",
        targets__in__losses="from ..data.tasks import T",
        training__in__net="from ..learners import Learner\nfrom .schedule import s",
        inspection__in____init__="from .shared import s",
        inspection__in__shared="from ..evaluation.scoring import s",
        evaluation__in__scoring="from ..estimators import MAMLRegressor",
        datasets__in____init__="from ._loaders import load",
        datasets__in___loaders="from ..exceptions import E",
    )
    assert imports.check(folder) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("devices", "from .estimators import MAMLRegressor", "'devices' may not import from"),
        ("devices", "from sklearn_maml.data import split", "'devices' may not import from"),
        ("devices", "import sklearn_maml.engine", "'devices' may not import from 'engine'"),
        ("devices", "from . import exceptions, engine", "'devices' may not import from 'engine'"),
        ("devices", "def f():\n    from .engine import e", "devices.py:2: 'devices' may not"),
        ("devices", "if TYPE_CHECKING:\n    from .engine import e", "devices.py:2: 'devices' may"),
        ("update_rules", "from .meta_gradients import X", "'update_rules' may not import from"),
        ("few_shot", "from .evaluation import task_scorer", "'few_shot' may not import from"),
        ("data__in__rows", "from ..targets import T", "'data' may not import from 'targets'"),
        ("learners__in__base", "from ..training.net import N", "'learners' may not import from"),
        ("evaluation__in__a", "from ..inspection import D", "'evaluation' may not import from"),
        ("evaluation__in__a", "from . import a", "in a circle, sklearn_maml.evaluation.a -> "),
        ("exceptions", "from ._compat import x", "'exceptions' may not import from"),
        ("heads", "from .training import net", "'heads' may not import from"),
        ("data__in__tasks", "import torch", "tasks.py:1: imports torch or skorch"),
        ("data__in__tasks", "def f():\n    from torch import nn", "tasks.py:2: imports torch or"),
        ("data__in__spellings", "import skorch", "spellings.py:1: imports torch or skorch"),
        ("datasets__in___loaders", "from ..data import T", "'datasets' may import from _compat"),
        ("estimators", "from sklearn_maml import adapt", "Import from the module that defines"),
        ("estimators", "from . import adapt", "'adapt', which is no module"),
        ("estimators", "from .helpers import h", "'helpers', which is no module"),
        ("helpers", "", "Add it to LAYERS in tools/check_imports.py"),
    ],
)
def test_a_violation_is_reported_once(imports, package, capsys, module, source, message):
    folder = package(**{module: source})
    assert imports.main([str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_circle_inside_a_subpackage_is_reported(imports, package):
    folder = package(
        evaluation__in____init__="from .metrics import m",
        evaluation__in__metrics="from sklearn_maml.evaluation.scoring import s",
        evaluation__in__scoring="def f():\n    from sklearn_maml.evaluation import m",
    )
    (problem,) = imports.check(folder)
    assert "sklearn_maml.evaluation.metrics -> sklearn_maml.evaluation.scoring -> " in problem


def test_torch_must_not_reach_the_tasks_through_another_module(imports, package):
    folder = package(
        data__in__tasks="from .._validation import check",
        _validation="from ._compat import x",
        _compat="import torch",
    )
    (problem,) = imports.check(folder)
    assert "_compat.py:1" in problem
    assert "'data.tasks' has to do without and imports '_compat'" in problem


def test_torch_must_not_reach_the_tasks_through_their_package(imports, package):
    folder = package(
        data__in____init__="from .episodes import E",
        data__in__episodes="import torch",
        data__in__tasks="",
    )
    (problem,) = imports.check(folder)
    assert "'data.tasks' has to do without and imports 'data.episodes'" in problem


def test_a_missing_folder_is_an_error(imports, tmp_path, capsys):
    assert imports.main([str(tmp_path / "nothing")]) == 2
    assert "is not a folder" in capsys.readouterr().err


# --- sizes, private attributes, walks of the stack


@pytest.fixture(scope="module")
def house():
    return load_tool("check_house")


def test_the_package_keeps_the_rules_of_the_house(house, capsys):
    status = house.main([])
    assert capsys.readouterr().err == ""
    assert status == 0


def lines_of(kind, n):
    """Source of a class or function of n lines, its docstring apart."""
    head = "class C:" if kind == "class" else 'def f():\n    """Text.\n\n    More.\n    """'
    return head + "\n    x = 1" * (n - 1) + "\n"


@pytest.mark.parametrize(
    ("kind", "most", "source"),
    [
        ("class", 400, lambda n: lines_of("class", n)),
        ("file", 600, lambda n: "x = 1\n" * n),
        ("function", 80, lambda n: lines_of("function", n)),
        ("function", 80, lambda n: "async " + lines_of("function", n)),
        ("function", 80, lambda n: "class C:\n    " + lines_of("f", n).replace("\n", "\n    ")),
    ],
)
def test_sizes_are_limited(house, package, kind, most, source):
    assert house.check(package(evaluation__in__a=source(most)), {}) == []
    (problem,) = house.check(package(evaluation__in__a=source(most + 1)), {})
    assert f"has {most + 1} lines; expected {most} at most" in problem
    assert f": {kind} " in problem


@pytest.mark.parametrize(
    "source",
    [
        "class C:\n    def f(self):\n        return self._x + super()._x",
        "class C:\n    @classmethod\n    def f(cls):\n        return cls._x",
        "import torch\ntorch._foreach_norm, torch._C._x, getattr(torch, '_x')",
        "from torch import nn\nnn.modules.conv._ConvNd",
        "from sklearn_maml import engine as e\ne._x",
        "from . import engine\nengine._x",
        "x.__dict__, x.name, getattr(x, 'name'), getattr(x, name)",
        "from sklearn_maml.engine import _x",
        "import numpy as np\nnp.stack(x), x.stack()",
        "check_classification_targets(y)",
    ],
)
def test_what_the_rules_allow(house, package, source):
    assert house.check(package(engine="", sources=source), {}) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x._y", "sources.py:1: 'x._y' is a private attribute"),
        ("\nx._y = 1\ndel x._y", "sources.py:2, 3: 'x._y' is a private"),
        ("self.x._y", "'self.x._y' is a private"),
        ("f(x)[0]._y", "'f(x)[0]._y' is a private"),
        ("x.__y", "'x.__y' is a private"),
        ("getattr(x, '_y', None)", "'x._y' is a private"),
        ("from .engine import thing\nthing._y", "'thing._y' is a private"),
        ("from sklearn_maml.engine import thing\nthing._y", "'thing._y' is a private"),
        ("from torch import Tensor\nTensor._y", "'Tensor._y' is a private"),
        ("import torch\ntorch.Tensor._y", "'torch.Tensor._y' is a private"),
        ("import sys\nsys._getframe(1)", "'sys._getframe' walks the stack"),
        ("from sys import _getframe", "'sys._getframe' walks the stack"),
        ("import inspect\ninspect.stack()", "'inspect.stack' walks the stack"),
        ("from inspect import stack as s", "'inspect.stack' walks the stack"),
        ("import inspect\ninspect.currentframe()", "'inspect.currentframe' walks the stack"),
        ("frame.f_back", "'frame.f_back' walks the stack"),
        ("class C:\n    _classification = True", "sources.py:2: '_classification' is for targets/"),
    ],
)
def test_a_breach_is_reported_once_and_may_be_known(
    house, package, tmp_path, capsys, source, message
):
    folder = package(engine="", sources=source)
    known = tmp_path / "known.txt"
    known.write_text("# nothing\n")
    assert house.main([str(folder), str(known)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    _, found = house.measure(folder)
    known.write_text("".join(f"{len(at)} {' '.join(key)}\n" for key, at in found.items()))
    assert house.main([str(folder), str(known)]) == 0
    # one more of the same, and none any more
    (folder / "sources.py").write_text(f"{source}\n{source}")
    assert house.main([str(folder), str(known)]) == 1
    (folder / "sources.py").write_text("")
    capsys.readouterr()
    assert house.main([str(folder), str(known)]) == 1
    assert "or take the line out" in capsys.readouterr().err


def test_the_flag_may_stay_where_targets_are(house, package):
    assert house.check(package(targets__in__base="_classification = True"), {}) == []


def test_house_wants_a_folder(house, tmp_path, capsys):
    assert house.main([str(tmp_path / "nothing")]) == 2
    assert "is not a folder" in capsys.readouterr().err


# --- docstrings

GOOD = '''
"""A module."""

__all__ = ["Thing", "Oops", "add"]


class Thing:
    """Hold a number.

    Parameters
    ----------
    number : int
        The number.
    """

    def __init__(self, number):
        self.number = number

    def double(self):
        """Double the number.

        Returns
        -------
        int
            Twice the number.
        """
        return 2 * self.number

    def set_params(self, **params):
        return self

    def _private(self):
        return None


class Oops(ValueError):
    """Something went wrong."""


def add(a, b):
    """Add two numbers.

    Parameters
    ----------
    a, b : int
        The numbers.

    Returns
    -------
    int
        Their sum.
    """
    return a + b
'''


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("    number : int\n        The number.", "    n : int\n        The number.", "Thing: PR0"),
        ("number : int\n", "number\n", "Thing: PR04"),
        ('"""Add two numbers.', '"""Add two numbers', "add: SS03"),
        ("a, b : int", "b, a : int", "add: PR03"),
        ('"""Something went wrong."""', "pass", "Oops: GL08"),
        (
            "\n\n    Returns\n    -------\n    int\n        Their sum.\n",
            "\n",
            "add: RT01",
        ),
    ],
)
def test_docstring_check(tmp_path, monkeypatch, capsys, old, new, message):
    pytest.importorskip("numpydoc")
    # A name of its own per case: imported modules are cached.
    name = f"made_up_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(GOOD.replace(old, new) if old else GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    status = load_tool("check_docstrings").main([name])
    errors = capsys.readouterr().err
    if message is None:
        assert (status, errors) == (0, "")
    else:
        assert status == 1
        assert f"{name}.{message}" in errors


def test_undocumented_methods_are_reported(tmp_path, monkeypatch, capsys):
    pytest.importorskip("numpydoc")
    source = GOOD.replace("def set_params(self", "def set_number(self")
    (tmp_path / "made_up_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tool("check_docstrings").main(["made_up_methods"]) == 1
    assert "made_up_methods.Thing.set_number: GL08" in capsys.readouterr().err


# --- metadata


def test_oldest_versions_match_the_promised_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    oldest = dict(pin.split("==") for pin in pins if pin)
    required = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in required:
        if requirement.startswith(("sklearn-maml", "torch")):
            continue
        name, floor = requirement.split(">=")
        # 1.11 is held by 1.11.1, where 1.11.0 was withdrawn.
        assert oldest[name].startswith(floor), requirement


def test_every_dependency_has_a_development_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    required = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        required += [r for r in extra if not r.startswith("sklearn-maml")]
    assert {requirement.split(">=")[0] for requirement in required} <= pinned


@pytest.mark.slow
def test_the_wheel_contains_the_data_and_the_notices(tmp_path):
    # Built from a copy: what an earlier build left in build/ would end up in the wheel.
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "sklearn_maml", source / "sklearn_maml", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.startswith("sklearn_maml/datasets/d")} == {
        "sklearn_maml/datasets/data/omniglot28.npz",
        "sklearn_maml/datasets/data/vowels_pb52.csv.gz",
        "sklearn_maml/datasets/data/x264_videos.csv.gz",
        "sklearn_maml/datasets/data/LICENSE-omniglot.txt",
        "sklearn_maml/datasets/data/LICENSE-vowels.txt",
        "sklearn_maml/datasets/data/LICENSE-x264.txt",
        "sklearn_maml/datasets/descr/omniglot.rst",
        "sklearn_maml/datasets/descr/vowels.rst",
        "sklearn_maml/datasets/descr/x264.rst",
    }
    assert {"sklearn_maml/py.typed", "sklearn_maml/native/mlp.cpp"} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "benchmarks/"))]


def test_benchmarks_import_what_there_is():
    """Most of them run for minutes, and need packages that are not here: nothing else runs them."""
    scripts = (ROOT / "benchmarks").glob("*.py")
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in scripts}
    for script, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in trees:
                body = trees[node.module].body
                there = {part.id for top in body for part in ast.walk(top) if hasattr(part, "id")}
                there |= {top.name for top in body if hasattr(top, "name")}
                assert {alias.name for alias in node.names} <= there, script


@pytest.mark.parametrize("name", ["comparison", "estimators", "few_shot"])
def test_modules_of_before_have_what_they_had(name):
    module = importlib.import_module(f"sklearn_maml.{name}")
    for public in module.__all__:
        assert getattr(module, public) is getattr(sklearn_maml, public, getattr(module, public))
    had = {
        "comparison": {"compare_baselines", "summarize_comparison"},
        "estimators": {"MAMLClassifier", "MAMLRegressor"},
        "few_shot": {"FewShotClassifier", "FewShotRegressor", "adapt"},
    }
    assert had[name] <= set(module.__all__)
