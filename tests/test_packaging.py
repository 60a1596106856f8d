"""What is released installs elsewhere: the sources, the wheel built from them, and its kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import sklearn_maml
from sklearn_maml import native

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "sklearn_maml" / "datasets" / "data"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

builds = pytest.mark.slow  # some seconds each

BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('out'))"
USE = """
import json, sys, warnings
import numpy as np
import sklearn_maml
from sklearn_maml import MAMLRegressor, native
from sklearn_maml.datasets import load_x264

rng = np.random.default_rng(0)
X, groups = rng.normal(size=(120, 3)), np.repeat(np.arange(12), 10)
options = {"hidden_layer_sizes": (8,), "update_rule": "sgd", "steps": 1, "meta_batch_size": 4}
reg = MAMLRegressor(max_iter=400, random_state=0, early_stopping=False, **options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reg.fit(X, X[:, 0] + groups, groups=groups)
loaded = load_x264(return_X_y=True)
warned = [str(w.message) for w in caught]
print(json.dumps([sklearn_maml.__file__, native.instruction_sets(), warned, len(loaded)]))
"""


def run(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def build(kind, source, **environment):
    """Build a distribution; return its path and what was said."""
    (source / "out").mkdir(exist_ok=True)
    done = run("-c", BUILD, f"build_{kind}", cwd=source, **environment)
    return source / "out" / done.stdout.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Unpack the source distribution of a copy of the repository."""
    folder = tmp_path_factory.mktemp("released")
    left = shutil.ignore_patterns(
        ".*", "build", "dist", "_build", "generated", "auto_examples", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "copy", ignore=left)
    archive, _ = build("sdist", folder / "copy")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def use(wheel, folder):
    """Install a wheel without what it depends on, which is here, and fit with it elsewhere."""
    options = ["--no-deps", "--no-index", "--no-compile", "-q", "--target", str(folder)]
    run("-m", "pip", "--disable-pip-version-check", "install", *options, str(wheel), cwd=folder)
    place, levels, warned, n = json.loads(
        run("-P", "-c", USE, cwd=folder, PYTHONPATH=str(folder)).stdout.splitlines()[-1]
    )
    assert Path(place).parent == folder / "sklearn_maml"
    assert n > 1
    return levels, warned


@builds
def test_the_source_distribution_is_whole(released):
    for name in (
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "docs/index.md",
        "examples/demo.py",
        "sklearn_maml/datasets/data/LICENSE-x264.txt",
        "sklearn_maml/native/elementary.h",
        "sklearn_maml/native/mlp.cpp",
        "sklearn_maml/py.typed",
        "CITATION.cff",
        "packaging/conda/meta.yaml",
        "tests/conftest.py",
        "tools/check_house.py",
    ):
        assert (released / name).is_file(), name
    assert not list(released.rglob("*.so"))


@builds
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_wheel_serves_every_version_of_python_and_brings_its_kernels(released, tmp_path):
    wheel, said = build("wheel", released)
    assert "-cp311-abi3-" in wheel.name
    assert "WITHOUT" not in said
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("sklearn_maml/native/_kernels.abi3.") for name in names) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    levels, warned = use(wheel, tmp_path)
    assert levels
    assert warned == []


@builds
def test_an_editable_install_is_a_path_that_type_checkers_follow(released, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(released, source, ignore=shutil.ignore_patterns("build", "out"))
    wheel, _ = build("editable", source, CXX="no-such-compiler", CC="no-such-compiler")
    files = zipfile.ZipFile(wheel)
    (path,) = (name for name in files.namelist() if name.endswith(".pth"))
    assert files.read(path).decode().strip() == str(source)
    assert not [name for name in files.namelist() if name.endswith(".py")]


@builds
def test_without_a_compiler_the_package_installs_and_says_so(released, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(released, source, ignore=shutil.ignore_patterns("build", "out"))
    wheel, said = build("wheel", source, CXX="no-such-compiler", CC="no-such-compiler")
    assert said.count("WITHOUT its compiled kernels") == 1
    assert "no-such-compiler" in said
    folder = tmp_path / "installed"
    folder.mkdir()
    levels, warned = use(wheel, folder)
    assert levels == []
    (message,) = warned
    assert "installed without them" in message


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sklearn_maml.__version__ == project["version"]
    for name, pattern in (
        ("CITATION.cff", r"^version: (.*)$"),
        ("packaging/conda/meta.yaml", r'set version = "(.*)" %'),
        ("CHANGELOG.md", r"^## \[(\d.*?)\]"),
    ):
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert found, name
        assert found[1] == project["version"], name


def test_the_conda_recipe_asks_for_what_the_package_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text()
    run_part = recipe[recipe.index("  run:") : recipe.index("test:")]
    asked = {line.strip(" -").replace("pytorch ", "torch ") for line in run_part.splitlines()[1:]}
    expected = {requirement.replace(">=", " >=") for requirement in project["dependencies"]}
    assert asked - {""} == {*expected, f"python {project['requires-python']}"}
    assert f"license: {project['license']}\n" in recipe
    notices = [path.relative_to(ROOT).as_posix() for path in DATA.glob("LICENSE-*.txt")]
    assert notices
    assert all(f"- {notice}\n" in recipe for notice in notices)


def test_show_versions_names_the_instruction_set(capsys, monkeypatch):
    def kernels():
        sklearn_maml.show_versions()
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["sklearn-maml"]
        assert lines["torch"] == torch.__version__
        return lines["kernels"]

    names = native.instruction_sets()
    if names:
        monkeypatch.setenv(native.VARIABLE, names[0])
        assert kernels() == f"{names[0]} ({', '.join(names)})"
        monkeypatch.setenv(native.VARIABLE, "mmx")
        assert "expected one of" in kernels()
    monkeypatch.setattr(native, "_kernels", None)
    assert kernels().startswith("none: the package was installed without them")
