"""Fits give the numbers they gave: what no other test compares is compared with a file.

The values are stored, not their hashes, since the last bits depend on the instruction set. To
write the file anew: ``python tests/test_golden.py --write``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import SinusoidTasks
from sklearn_maml.exceptions import EngineFallbackWarning, SingleTaskWarning
from sklearn_maml.meta_gradients import Implicit, SecondOrder
from sklearn_maml.modules import ContextMLP

GOLDEN = Path(__file__).with_name("golden.json")
N_TASKS, N_ROWS, N_FEATURES = 12, 12, 3
N_STORED = 12  # numbers of each kind
SETTINGS = {
    "hidden_layer_sizes": (6,),
    "activation": "tanh",
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 2,
    "meta_batch_size": 4,
    "max_iter": 20,
    "random_state": 0,
}

_RNG = np.random.default_rng(0)
SLOPES = _RNG.normal(size=(N_TASKS + 2, 1, N_FEATURES))
X = _RNG.normal(size=(N_TASKS + 2, N_ROWS, N_FEATURES))
Y = (X * SLOPES).sum(2) + 0.1 * _RNG.normal(size=X.shape[:2])
IMAGES = _RNG.normal(size=(N_TASKS + 2, N_ROWS, 1, 5, 5))
SERIES = _RNG.normal(size=(N_TASKS + 2, N_ROWS, 4, 2))
SHARED = np.where(Y > 0, "up", "down")
SHARED[:, :2] = ["up", "down"]
# of each task's own: classes in different places, which two features tell apart
LOCAL = np.tile(np.arange(3), (N_TASKS + 2, N_ROWS // 3))
PLACES = (
    X + 2 * _RNG.normal(size=(N_TASKS + 2, 3, N_FEATURES))[np.arange(N_TASKS + 2)[:, None], LOCAL]
)


class Recurrent(nn.Module):
    """Reads a series."""

    def __init__(self, out_features):
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Linear(4, out_features)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Convolved(nn.Sequential):
    """A convolution with batch norm."""

    def __init__(self, out_features):
        super().__init__(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, out_features),
        )


def regression(rows=X, targets=Y, **params):
    """Fit on all tasks but two; predict half of the rows of each of these from the others."""
    return predict_new(MAMLRegressor(**{**SETTINGS, **params}), rows, targets)


def shared_labels(rows=X, **params):
    return predict_new(MAMLClassifier(**{**SETTINGS, **params}), rows, SHARED)


def local_labels(**params):
    ways = {"n_ways": 3, "n_shots": 1, "n_queries": 2, "early_stopping": False}
    return predict_new(MAMLClassifier(**{**SETTINGS, **ways, **params}), PLACES, LOCAL)


def predict_new(model, rows, targets):
    model.fit(rows[:N_TASKS], targets[:N_TASKS])
    return adapted(model, rows[N_TASKS:], targets[N_TASKS:])


def adapted(model, rows, targets, **options):
    support = slice(0, 6)
    model.adapt(rows[:, support], targets[:, support], **options)
    outputs = getattr(model, "predict_proba", model.predict)
    return model, outputs(rows[:, support.stop :])


def task_distribution():
    model = MAMLRegressor(**SETTINGS).fit(SinusoidTasks(n_rows=12))
    X, y = zip(*SinusoidTasks(n_rows=12).sample(2, random_state=1), strict=True)
    return adapted(model, np.stack(X), np.stack(y))


def given_splits():
    tasks = [(a[:5], b[:5], a[5:], b[5:]) for a, b in zip(X[:N_TASKS], Y[:N_TASKS], strict=True)]
    return adapted(MAMLRegressor(**SETTINGS).fit(tasks), X[N_TASKS:], Y[N_TASKS:])


def ragged_rows():
    """Rows with task ids, tasks of different sizes, two targets."""
    kept = np.arange(N_ROWS) < 6 + np.arange(N_TASKS)[:, None] % 6
    y = np.stack([Y, 10 * Y**2], 2)
    model = MAMLRegressor(**SETTINGS, meta_gradient="first-order")
    model.fit(X[:N_TASKS][kept], y[:N_TASKS][kept], groups=np.nonzero(kept)[0])
    return adapted(model, X[N_TASKS:], y[N_TASKS:])


def weights():
    """Support rows that count differently."""
    model = MAMLRegressor(**{**SETTINGS, "center_y": True}).fit(X[:N_TASKS], Y[:N_TASKS])
    weight = np.tile(np.linspace(0.1, 1, 6), 2)
    return adapted(model, X[N_TASKS:], Y[N_TASKS:], sample_weight=weight)


def warm_start():
    model = MAMLRegressor(**{**SETTINGS, "warm_start": True, "max_iter": 8})
    for rows in (slice(0, 6), slice(6, N_TASKS)):
        model.fit(X[rows], Y[rows])
    return adapted(model, X[N_TASKS:], Y[N_TASKS:])


def single_task():
    with pytest.warns(SingleTaskWarning):
        model = MAMLRegressor(**SETTINGS).fit(X[0], Y[0])
    return model, model.predict(X[1])


def recurrent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallbackWarning)  # it runs task by task
        return regression(SERIES, module=Recurrent)


MAML_PP = SecondOrder(first_order_updates=5, multi_step_updates=12)
FITS = {
    "second order": regression,
    "first order, ragged rows, two targets": ragged_rows,
    "annealed second order, learned steps": lambda: regression(
        meta_gradient=MAML_PP, update_rule="per-layer-per-step"
    ),
    "implicit": lambda: regression(meta_gradient=Implicit(lam=1.0), steps=5),
    "reptile, adam steps": lambda: regression(
        meta_gradient="reptile", update_rule="adam", update_rule__eps=1e-2, alpha=0.02
    ),
    "recomputed steps, momentum": lambda: regression(
        update_rule="momentum", engine__checkpoint_steps=True, alpha=0.03, steps=5
    ),
    "meta-sgd, local labels, body": lambda: local_labels(update_rule="meta-sgd", adapted="body"),
    "learned alpha, local labels, shared head": lambda: local_labels(
        update_rule="learned-alpha", head="shared"
    ),
    "context": lambda: regression(
        module=ContextMLP, module__n_context=2, adapted="context", alpha=1.0
    ),
    "shared labels, head": lambda: shared_labels(adapted="head"),
    "ridge head": lambda: regression(update_rule="ridge-head", adapted="head"),
    "logistic head": lambda: shared_labels(update_rule="logistic-head", adapted="head"),
    "inductive batch norm": lambda: shared_labels(IMAGES, module=Convolved),
    "transductive batch norm": lambda: shared_labels(
        IMAGES, module=Convolved, engine__batch_norm="transductive"
    ),
    "lstm": recurrent,
    "task distribution": task_distribution,
    "given splits": given_splits,
    "weights, centred": weights,
    "warm start": warm_start,
    "single task": single_task,
}


def numbers_of(name):
    """Numbers spread over the parameters and over the predictions of a fit."""
    with torch.random.fork_rng(devices=[]):
        model, predicted = FITS[name]()
    state = model.module_.state_dict()
    parameters = np.concatenate(
        [value.double().numpy().ravel() for _, value in sorted(state.items())]
    )
    assert predicted.dtype == np.float64
    return {
        "parameters": spread(parameters),
        "predictions": spread(predicted.ravel()),
    }


def spread(values):
    return values[np.linspace(0, len(values) - 1, N_STORED).astype(int)].tolist()


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", FITS)
def test_a_fit_gives_the_numbers_it_gave(name, golden):
    for kind, values in numbers_of(name).items():
        np.testing.assert_allclose(
            values,
            golden[name][kind],
            rtol=1e-7,
            atol=1e-10,
            err_msg=(
                f"The {kind} of the fit {name!r} are not those in tests/golden.json. If a change "
                "was to leave the numbers alone, it does not: find out where. If they are meant "
                "to change, run `python tests/test_golden.py --write`, and say in the commit "
                "message why they change."
            ),
        )


def test_the_file_has_the_fits_and_no_others(golden):
    assert list(golden) == list(FITS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/test_golden.py --write")
    GOLDEN.write_text(json.dumps({name: numbers_of(name) for name in FITS}, indent=1) + "\n")
