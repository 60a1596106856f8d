"""Files of this format give what they gave when they were written.

If a test fails because a change is meant to change what fitted models answer, raise `FORMAT` in
`sklearn_maml/storage.py`, so that files of before are refused, and write new ones with

    python tests/test_model_files.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import sklearn_maml
from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.storage import FORMAT

FOLDER = Path(__file__).parent / "files"
KINDS = ["numbers", "counts", "two_classes", "three_classes", "n_ways", "steps"]


def tasks_of(kind, n_tasks, seed):
    """Rows of tasks that differ in level and in the slope of the second feature."""
    rng = np.random.RandomState(seed)
    X = rng.randn(n_tasks, 14, 2)
    f = np.sin(2 * X[..., 0]) + X[..., 1] * rng.randn(n_tasks, 1) + rng.randn(n_tasks, 1)
    if kind == "n_ways":
        y = np.arange(14) % 3
        return X + 2 * rng.randn(n_tasks, 3, 2)[:, y], np.tile(y, (n_tasks, 1))
    if kind == "counts":
        return X, rng.poisson(np.exp(0.5 * f)).astype(float)
    cuts = {"two_classes": [0.2], "three_classes": [-0.5, 0.7]}
    return X, np.digitize(f, cuts[kind]) if kind in cuts else f


def fitted(kind):
    """Fit a small model of a kind."""
    settings = {"max_iter": 50, "hidden_layer_sizes": (2,), "random_state": 0}
    settings |= {"counts": {"loss": "poisson"}, "n_ways": {"n_ways": 3, "n_shots": 1}}.get(kind, {})
    settings["update_rule"] = "sgd" if kind == "steps" else "gaussian-head"
    cls = MAMLClassifier if "classes" in kind or kind == "n_ways" else MAMLRegressor
    return cls(**settings).fit(*tasks_of(kind, 16, 0))


def answers(model, kind):
    """Everything that a model says of new tasks: without rows, with few, and with more."""
    told = []
    (X,), (y,) = tasks_of(kind, 1, 1)
    for n in [3, 8] if kind == "n_ways" else [0, 2, 8]:
        model.adapt(X[:n], y[:n])
        if hasattr(model, "predict_proba"):
            told.append(model.predict_proba(X[8:]))
        elif kind == "steps":
            told.append(model.predict(X[8:]))
        else:
            told.extend(model.predict(X[8:], return_std=True))
    return np.concatenate([np.ravel(part) for part in told])


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_this_format_give_what_they_gave(kind):
    path = FOLDER / f"{kind}.safetensors"
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == str(FORMAT), "written before FORMAT was raised"
    expected = np.load(FOLDER / "answers.npz")[kind]
    np.testing.assert_allclose(answers(sklearn_maml.load(path), kind), expected, rtol=1e-5)


def write():
    """Write the files anew."""
    FOLDER.mkdir(exist_ok=True)
    told = {}
    for kind in KINDS:
        path = FOLDER / f"{kind}.safetensors"
        fitted(kind).save(path, training=False, tasks=False)
        told[kind] = answers(sklearn_maml.load(path), kind)
    np.savez(FOLDER / "answers.npz", **told)


if __name__ == "__main__":
    sys.exit(write())
