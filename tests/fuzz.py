"""Fuzzing of the public calls: `make fuzz` runs it at length, `test_fuzz.py` a part of it.

An example takes a valid call, spoils none or some of its arguments and checks what the library
promises of every call: it returns finite results of the right shape, or raises a ValueError,
TypeError or NotFittedError with a message; it changes neither its arguments nor the global random
state; a call that fails, and one that only reads, leaves the estimator as it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import pickle
import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import Normed
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError, UndefinedMetricWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import sklearn_maml.exceptions
from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    adapt_predict,
    task_scorer,
    task_scores,
)
from sklearn_maml.estimators.few_shot import _FewShot
from sklearn_maml.learners.base import Adapted
from sklearn_maml.learners.conditioned import Conditioned
from sklearn_maml.learners.shares import Mixed

REFUSALS = (ValueError, TypeError, NotFittedError)
# of the library itself, and of scikit-learn where it says what it did with unusual data
WARNINGS = (
    *(
        value
        for value in vars(sklearn_maml.exceptions).values()
        if isinstance(value, type) and issubclass(value, Warning)
    ),
    DataConversionWarning,
    UndefinedMetricWarning,
)
ANSWERS = {"predict", "predict_std", "predict_proba", "predict_log_proba", "decision_function"}

# -- models --------------------------------------------------------------------------------------

N_TASKS, N_ROWS, N_FEATURES = 6, 6, 2
# tasks of kinds with a Gaussian head: enough to hold some out by default
N_TASKS_HELD_OUT = 12
SMALL: dict[str, Any] = {
    "hidden_layer_sizes": (4,),
    "update_rule": "sgd",
    "steps": 1,
    "max_iter": 2,
    "meta_batch_size": 3,
    "random_state": 0,
}


class Residual(nn.Module):
    """Not a Sequential: run with torch.vmap."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.body = nn.Linear(in_features, 3)
        self.head = nn.Linear(3, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.body(x))
        return self.head(hidden + hidden.square())


class Conv(nn.Module):
    """Takes images of one channel."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(8, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


LABELS = {
    "strings": np.array(["hop", "run", "sit"]),
    "two": np.array([-1, 7]),
}


def data_of(kind: str, n: int, seed: int = 0) -> dict[str, Any]:
    """Rows of `N_TASKS` tasks, one after another, as far as `n` goes."""
    rng = np.random.default_rng(seed)
    shape = (1, 2, 2) if "conv" in kind else (N_FEATURES,)
    X: Any = rng.normal(size=(n, *shape))
    groups = np.arange(n) // N_ROWS
    y: Any = X.reshape(n, -1)[:, 0] * 2 + 1 + groups
    if "outputs" in kind:
        y = np.column_stack([y, -y])
    if "classifier" in kind:
        labels = LABELS["two" if "two" in kind else "strings"]
        y = labels[np.arange(n) % len(labels)]
    if "float32" in kind:
        X = X.astype(np.float32)
    if "frame" in kind or "named" in kind:
        X = pd.DataFrame(X, columns=["a", "b"])
    if "named" in kind:
        X["task"] = groups
    if "position" in kind:
        X = np.column_stack([X, groups])
    return {"X": X, "y": y, "groups": None if "named" in kind or "position" in kind else groups}


def new_model(kind: str) -> Any:
    params = dict(SMALL)
    if "head" in kind or "auto" in kind:
        params = {"max_iter": 3, "random_state": 0}
        if "head" in kind:
            params["update_rule"] = "gaussian-head"
    if "batch norm" in kind:
        params["module"] = Normed
    if "residual" in kind:
        params["module"] = Residual
    if "conv" in kind:
        params["module"] = Conv
    if "named" in kind:
        params["task_column"] = "task"
    if "position" in kind:
        params["task_column"] = -1
    if "centered" in kind:
        params["center_y"] = True
    if "ridge" in kind:
        params.update(update_rule="ridge-head", adapted="head")
    if "meta-sgd" in kind:
        params["update_rule"] = "meta-sgd"
    if "ways" in kind:
        params.update(n_ways=2, n_shots=1, n_queries=1)
    return MAMLClassifier(**params) if "classifier" in kind else MAMLRegressor(**params)


KINDS = [
    "regressor",
    "regressor float32",
    "regressor two outputs",
    "regressor frame",
    "regressor named column",
    "regressor position of column",
    "regressor centered",
    "regressor batch norm",
    "regressor residual",
    "regressor ridge",
    "regressor meta-sgd",
    "classifier",
    "classifier of two",
    "classifier ways",
    "classifier frame",
    "classifier conv",
    "classifier ways conv float32",
    "regressor auto",
    "regressor head two outputs float32",
    "classifier auto",
    "classifier head",
    "classifier ways head",
]


def n_rows_of(kind: str) -> int:
    """Number of rows of a meta-training."""
    return (N_TASKS_HELD_OUT if "auto" in kind or "head" in kind else N_TASKS) * N_ROWS


@functools.cache
def fitted_model(kind: str, adapted: str) -> Any:
    """Meta-fitted model: not adapted, adapted to one task, or to several."""
    model = new_model(kind)
    data = data_of(kind, n_rows_of(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(**data)
        if "auto" in kind:  # both learners are to be looked at, whichever is better
            model.learner_weights_ = {"gaussian-head": 0.5, "gradient-steps": 0.5}
        if adapted == "one":
            model.adapt(**trimmed(data_of(kind, N_ROWS), kind, grouped=False))
        if adapted == "several":
            model.adapt(**trimmed(data_of(kind, N_TASKS * N_ROWS), kind))
    return model


def trimmed(data: dict[str, Any], kind: str, *, grouped: bool = True) -> dict[str, Any]:
    """Take no more classes in a task than its head has."""
    if not grouped:
        data = {**data, "groups": None}
    if "ways" in kind:
        data = {**data, "y": np.where(data["y"] == "sit", "hop", data["y"])}
    return data


# -- what arguments can be -----------------------------------------------------------------------

DTYPES = [
    *("float64", "float32", "float16", "longdouble", "int64", "int8", "uint8", "uint64", "bool"),
    *("object", "str", "bytes", "complex128", "datetime64[s]", "timedelta64[s]", ">f8", ">i4"),
]
HUGE = [1e300, -1e300, 1.7e308, 1e160, 1e38, 3e38, 1e20, 2**53, 1e-300, 5e-324, -0.0, 2.0**63]
ODD = [
    np.nan,
    np.inf,
    -np.inf,
    None,
    "a",
    "",
    "é\u0301\0",
    b"b",
    True,
    1j,
    pd.NA,
    pd.NaT,
    (1, 2),
    [],
    {},
]
JUNK = [
    lambda: None,
    lambda: 3,
    lambda: np.nan,
    lambda: "text",
    lambda: b"",
    object,
    dict,
    set,
    list,
    tuple,
    lambda: [[]],
    lambda: [[[]]],
    lambda: [None],
    lambda: [[1, 2], [3]],
    lambda: [[1, 2], 3],
    lambda: [(1, 2), (3, 4)],
    lambda: ([[1.0, 2.0]], [1.0]),
    lambda: [([[1.0, 2.0]], [1.0])],
    lambda: [([[1.0, 2.0], [3.0, 1.0]], [1.0, 2.0])] * 2,
    lambda: [(np.ones((3, 2)), np.arange(3.0), np.ones((2, 2)), np.arange(2.0))] * 2,
    lambda: [np.ones((3, 2)), np.ones((4, 2))],
    lambda: [np.ones((3, 2)), np.ones((4, 3))],
    lambda: [np.ones((3, 2)), None],
    lambda: [np.ones(3), np.ones(4)],
    lambda: [np.ones((0, 2)), np.ones((3, 2))],
    lambda: np.array(None),
    lambda: np.array(1.0),
    lambda: np.array([]),
    lambda: np.empty((0, 2)),
    lambda: np.empty((3, 0)),
    lambda: np.ones((2, 3, 2)),
    lambda: np.ones((0, 3, 2)),
    lambda: np.ones((2, 0, 2)),
    lambda: np.ones((2, 3, 2, 2)),
    lambda: np.array([[1, 2], [3]], dtype=object),
    lambda: np.zeros(3, dtype=[("a", float), ("b", int)]),
    lambda: iter([1, 2]),
    lambda: range(6),
    lambda: (i for i in range(3)),
    lambda: {"a": [1, 2], "b": [3, 4]},
    lambda: pd.DataFrame(),
    lambda: pd.DataFrame({"a": [1.0], "b": ["x"]}),
    lambda: pd.Series([], dtype=float),
    lambda: float,
    lambda: lambda: None,
    lambda: nn.Linear(2, 1),
]


def _frame(value: Any) -> Any:
    value = np.asarray(value)
    names = ["a", "b", "task", "d", "e"]
    if value.ndim == 2 and value.shape[1] <= len(names):
        return pd.DataFrame(value, columns=names[: value.shape[1]])
    return pd.DataFrame(value) if value.ndim == 2 else pd.Series(value)


def _polars(value: Any) -> Any:
    value = np.asarray(value)
    if value.ndim == 2:
        return pl.DataFrame(value, schema=["a", "b", "task", "d"][: value.shape[1]])
    return pl.Series(value)


class Wrapped:
    """Array by its protocol alone."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.value if dtype is None else self.value.astype(dtype)

    def __len__(self) -> int:
        return len(self.value)


CONTAINERS = [
    lambda v: np.asarray(v).tolist(),
    lambda v: tuple(np.asarray(v).tolist()),
    _frame,
    lambda v: _frame(v).convert_dtypes(),
    lambda v: _frame(v).astype("Int64"),
    lambda v: _frame(v).astype("Float32"),
    lambda v: _frame(v).astype("string"),
    lambda v: _frame(v).astype("category"),
    lambda v: _frame(v).set_index(np.arange(len(v))[::-1]),
    lambda v: _frame(v).mask(_frame(v) > 0),
    lambda v: pd.Index(np.asarray(v)),
    lambda v: pd.Categorical(np.asarray(v)),
    lambda v: pd.array(np.asarray(v).tolist()),
    _polars,
    lambda v: torch.as_tensor(np.asarray(v)),
    lambda v: torch.as_tensor(np.asarray(v)).requires_grad_(),
    lambda v: scipy.sparse.csr_matrix(np.asarray(v)),
    lambda v: scipy.sparse.coo_array(np.asarray(v)),
    lambda v: np.asmatrix(np.asarray(v)),
    lambda v: np.ma.masked_array(v, mask=np.asarray(v) == np.asarray(v).flat[0]),
    lambda v: np.asfortranarray(v),
    lambda v: np.asarray(v)[::-1],
    lambda v: memoryview(np.ascontiguousarray(v)),
    lambda v: iter(v),
    lambda v: list(v),
    lambda v: np.broadcast_to(np.asarray(v)[:1], np.asarray(v).shape),
    Wrapped,
]
SHAPES = [
    lambda v: v[:0],
    lambda v: v[:1],
    lambda v: v[:-1],
    lambda v: v[1:],
    lambda v: np.concatenate([v, v]),
    lambda v: v[:, :0],
    lambda v: v[:, :1],
    lambda v: np.concatenate([v, v], axis=1),
    lambda v: np.asarray(v).T,
    lambda v: np.asarray(v)[:, None],
    lambda v: np.asarray(v)[None],
    lambda v: np.asarray(v)[..., None],
    lambda v: np.asarray(v).ravel(),
    lambda v: np.asarray(v)[0],
    lambda v: np.asarray(v).flat[0],
    lambda v: np.asarray(v).reshape(2, -1, *np.shape(v)[1:]),
    lambda v: np.asarray(v).reshape(2, 3, -1),
    lambda v: np.asarray(v)[np.random.default_rng(0).permutation(len(v))],
]
VALUES = [
    lambda v: np.zeros_like(v),
    lambda v: np.asarray(v) * 1e300,
    lambda v: np.asarray(v) * 1e160,
    lambda v: np.asarray(v) * 1e38,
    lambda v: np.asarray(v) * 1e20,
    lambda v: np.asarray(v) * 1e-300,
    lambda v: np.asarray(v) + 1e17,
    lambda v: np.arange(len(v)),
    lambda v: np.arange(len(v)) * 0.5,
    lambda v: np.arange(len(v)) % 2 == 0,
    lambda v: np.array([f"id {i}" for i in range(len(v))]),
    lambda v: np.array([f"id {i}" for i in range(len(v))], dtype="S"),
    lambda v: np.array([(i, "a") for i in range(len(v))], dtype=object),
    lambda v: [i if i % 2 else str(i) for i in range(len(v))],
    lambda v: [i if i % 2 else str(i) for i in range(len(v))][::-1],
    lambda v: pd.date_range("2020-01-01", periods=len(v)),
    lambda v: pd.period_range("2020-01-01", periods=len(v), freq="D"),
    lambda v: ["ä", "ß"] * (len(v) // 2),
    lambda v: np.full(len(v), 2**62) + np.arange(len(v)),
    lambda v: -np.ones(len(v)),
    lambda v: np.ones(len(v)),
    lambda v: np.full(len(v), 1e308),
    lambda v: np.full(len(v), 5e-324),
    lambda v: "auto",
    lambda v: 1.0,
]


def put(value: Any, what: Any, place: int) -> Any:
    """Replace one entry, whatever type it is."""
    if isinstance(value, (pd.DataFrame, pl.DataFrame)):
        value = np.asarray(value)
    numeric = isinstance(what, float) and np.asarray(value).dtype.kind == "f"
    array = np.array(value, dtype=None if numeric else object)
    flat = array.reshape(-1)
    flat[place % max(len(flat), 1) : place % max(len(flat), 1) + 1] = (
        what if numeric else _boxed(what)
    )
    return flat.reshape(array.shape)


def _boxed(value: Any) -> Any:
    box = np.empty(1, dtype=object)
    box[0] = value
    return box


@st.composite
def mutations(draw: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Names of arguments, and functions that spoil them."""
    chosen = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3]))):
        kind = draw(st.sampled_from(["junk", "dtype", "put", "put", "container", "shape", "value"]))
        if kind == "junk":
            junk = draw(st.sampled_from(JUNK))
            function = lambda _, junk=junk: junk()  # noqa: E731
        elif kind == "dtype":
            dtype = draw(st.sampled_from(DTYPES))
            function = lambda v, dtype=dtype: np.asarray(v).astype(dtype)  # noqa: E731
        elif kind == "put":
            what, place = draw(st.sampled_from([*HUGE, *ODD])), draw(st.integers(0, 40))
            function = lambda v, what=what, place=place: put(v, what, place)  # noqa: E731
        else:
            pool = {"container": CONTAINERS, "shape": SHAPES, "value": VALUES}[kind]
            function = draw(st.sampled_from(pool))
        chosen.append((draw(st.sampled_from(names)), function))
    return chosen


def spoil(arguments: dict[str, Any], chosen: list[tuple[str, Any]]) -> dict[str, Any]:
    arguments = dict(arguments)
    for name, function in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a change that the value cannot take is none
            try:
                arguments[name] = function(arguments.get(name))
            except Exception:
                continue
    return arguments


ODD_PARAMETERS: dict[str, list[Any]] = {
    "alpha": [-1, 0, 1e-300, 1e300, np.nan, np.inf, None, "a", True, np.float32(0.1), [0.1]],
    "beta": [-1, 0, 1e-300, 1e300, np.nan, np.inf, None, "a", np.float32(0.1)],
    "steps": [-1, 0, 1.5, 2, None, "a", np.nan, np.int64(2), True],
    "adapt_steps": [-1, 0, 1.5, 3, "a", np.nan, np.int64(2)],
    "hidden_layer_sizes": [(), 3, [3, 2], (0,), (-1,), "a", None, (2.5,), np.array([3]), {}],
    "activation": ["tanh", "gelu", "none such", None, 3, torch.tanh],
    "adapted": ["head", "body", "all", "2.*", "none such", [], ["0.*"], 3, None, [3]],
    "beta_decay": [-0.1, 0, 1, 1.1, np.nan, None, "a"],
    "max_grad_norm": [None, 0, -1, 1e-300, 1e300, np.inf, np.nan, "a"],
    "n_shots": [None, 1, 2, 100, 0, 1.5, "a", np.int32(1)],
    "n_queries": [None, 1, 100, 0, "a"],
    "n_ways": [None, 2, 3, 100, 1, 0, 2.0, "a"],
    "meta_batch_size": [1, 100, 0, -1, 2.5, "a", None],
    "max_iter": [1, 3, 0, -1, 2.5, "a", None],
    "early_stopping": [True, False, "auto", "a", 1, None, np.bool_(True)],
    "validation_fraction": [0.5, 0.01, 0.99, 0, 1, "a", np.nan],
    "n_iter_no_change": [1, 0, "a"],
    "normalize_y": [True, False, "a", None],
    "center_y": [True, False, "a", None],
    "head": ["free", "shared", "zero", "a", None],
    "optimizer": ["sgd", "adam", "adamw", "none such", None, torch.optim.LBFGS, torch.optim.Adam],
    "engine__checkpoint_steps": [True, False, "a"],
    "engine__max_tasks_in_memory": [1, 2, None, 0, "a"],
    "engine__precision": ["full", "tf32", "a", None],
    "engine__batch_norm": ["inductive", "transductive", "a"],
    "callbacks": [[], None, [3], "a", ["a"], [("a", 3)], [()]],
    "device": ["cpu", "auto", "cuda:99", "none such", None, 3, torch.device("cpu")],
    "task_column": [None, 0, -1, 5, "a", "task", 1.5, (), [0]],
    "warm_start": [True, False, "a"],
    "random_state": [None, 0, 2**31, 2**32, -1, "a", 1.5, np.random.RandomState(0),
                     np.random.default_rng(0)],
    "verbose": [0, False, -1, "a"],
    "meta_gradient": ["first-order", "implicit", "reptile", "none such", None, 3, object],
    "update_rule": ["meta-sgd", "momentum", "adam", "ridge-head", "logistic-head", "learned-alpha",
                    "per-layer-per-step", "none such", None, 3],
    "module": [None, nn.Linear, Residual, Normed, nn.Linear(2, 1), nn.Linear(2, 3), nn.Linear(9, 9),
               nn.ReLU, nn.Identity(), "a", 3, len, nn.Sequential()],
    "none_such": [1],
    "module__none_such": [1],
    "optimizer__none_such": [1],
    "optimizer__weight_decay": [0.1, -1, "a"],
    "iterator_train__batch_size": [2, 0, -1, "a", None],
    "update_rule__none_such": [1],
    "update_rule__lam": [1.0, -1, "a"],
    "meta_gradient__damping": [1.0, -1, "a"],
    "callbacks__none_such": [1],
}  # fmt: skip


@st.composite
def parameters(draw: Any) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(list(ODD_PARAMETERS)), min_size=1, max_size=2))
    return {name: draw(st.sampled_from(ODD_PARAMETERS[name])) for name in names}


# -- what every call promises --------------------------------------------------------------------


def digest(value: Any, depth: int = 0) -> Any:
    """Everything of a fitted estimator that a call could change, in comparable form."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", value.shape, value.dtype.str, value.tolist().__repr__())
    if isinstance(value, nn.Module):
        return [(name, digest(t)) for name, t in value.state_dict().items()]
    if isinstance(value, dict):
        return [(str(name), digest(v, depth + 1)) for name, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [digest(v, depth + 1) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return repr(value)
    if dataclasses.is_dataclass(value) or isinstance(value, Adapted):
        # its engine keeps caches of what it has compiled, and rows are counted once
        found = vars(value).items()
        return [(n, digest(v)) for n, v in found if n not in ("engine", "_counts")]
    if isinstance(value, _FewShot | MAMLRegressor | MAMLClassifier):
        return snapshot(value)
    return id(value)


def snapshot(estimator: Any) -> Any:
    # which engine has worked before, and which parameters were found unchanged, are caches
    caches = ("_rung", "_unchanged")
    return {name: digest(v) for name, v in vars(estimator).items() if name not in caches}


def random_states() -> Any:
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(np.random.get_state())


def is_expected(warning: Any) -> bool:
    """Whether a warning is one of the library, or one of scikit-learn that tells of odd data."""
    if issubclass(warning.category, WARNINGS):
        return True
    texts = ("feature names", "number of unique classes is greater than 50%")
    named = any(text in str(warning.message) for text in texts)
    # metrics of predictions that are finite, but whose squares are not; the scaler of a pipeline
    others = ("sklearn/metrics/", "sklearn/preprocessing/")
    return named or (
        issubclass(warning.category, RuntimeWarning)
        and any(place in warning.filename.replace("\\", "/") for place in others)
    )


def finite(values: Any) -> bool:
    if isinstance(values, list):
        return all(finite(part) for part in values)
    values = np.asarray(values)
    return values.dtype.kind not in "fc" or bool(np.isfinite(values).all())


def _parts(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def check_answer(name: str, estimator: Any, X: Any, answer: Any) -> None:
    if hasattr(X, "__len__"):
        assert len(answer) == len(X), f"{len(answer)} answers to {len(X)} rows"
    if name == "predict_std":
        assert not finite(answer) or all(np.min(part) >= 0 for part in _parts(answer) if part.size)
    for part in _parts(answer):
        assert isinstance(part, np.ndarray)
        if name == "predict_log_proba":  # of classes that a task lacks
            part = np.exp(part)
        assert finite(part), "the answer is not finite"
        if name in ("predict_proba", "predict_log_proba"):
            assert np.allclose(part.sum(-1), 1, atol=1e-3)
        if name == "predict" and hasattr(estimator, "classes_"):
            assert set(np.ravel(part).tolist()) <= set(estimator.classes_.tolist())


class Record:
    """Counts of examples and of what came of the calls."""

    def __init__(self) -> None:
        self.examples: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def report(self) -> str:
        kinds = sorted({kind for _, kind in self.outcomes}, key=lambda k: (k != "returned", k))
        names = sorted({name for name, _ in self.outcomes})
        width = max(len(name) for name in names)
        lines = [f"{'':{width}}  {'calls':>7}" + "".join(f"{kind:>16}" for kind in kinds)]
        for name in [*names, "total"]:
            counts = [
                sum(n for (m, k), n in self.outcomes.items() if k == kind and name in (m, "total"))
                for kind in kinds
            ]
            lines.append(f"{name:{width}}  {sum(counts):7,}" + "".join(f"{n:16,}" for n in counts))
        lines.append("")
        lines += [f"examples of {name}: {n:,}" for name, n in sorted(self.examples.items())]
        lines.append(f"examples in all: {sum(self.examples.values()):,}")
        return "\n".join(lines)


RECORD = Record()


def call(
    name: str, function: Any, arguments: dict[str, Any], watched: Any, *, writes: bool = False
) -> Any:
    """Call and check; `watched` is left as it was, if the call only reads or if it fails."""
    before, states = snapshot(watched), random_states()
    given_bytes = {key: _frozen(value) for key, value in arguments.items()}
    result, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(**arguments)
        except REFUSALS as refusal:
            error = refusal
    assert error is None or str(error).strip(), f"{type(error).__name__} without a message"
    for warning in caught:
        assert is_expected(warning), (
            f"{warning.category.__name__}: {warning.message} ({warning.filename}:{warning.lineno})"
        )
    kind = next((c.__name__ for c in (NotFittedError, TypeError) if isinstance(error, c)), None)
    kind = "returned" if error is None else kind or "ValueError"
    RECORD.outcomes[name, kind] += 1
    after_torch, after_numpy = random_states()
    assert after_torch == states[0], "torch's global random state has changed"
    if getattr(watched, "random_state", 0) is not None:  # None draws from it, in scikit-learn too
        assert after_numpy == states[1], "numpy's global random state has changed"
    for key, value in arguments.items():
        assert _frozen(value) == given_bytes[key], f"{key} has changed"
    if error is not None or not writes:
        after = snapshot(watched)
        assert after == before, f"changed: {[n for n in after if after[n] != before.get(n)]}"
    method = name.rpartition(".")[2]
    if error is None and method in ANSWERS:
        check_answer(method, watched, arguments["X"], result)
    if error is None and method == "score":
        undefined = any(
            issubclass(w.category, (UndefinedMetricWarning, RuntimeWarning)) for w in caught
        )
        assert isinstance(result, float), type(result)
        assert np.isfinite(result) or undefined, f"a score of {result}"
    return result


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        return value.tobytes()
    return None


# -- examples ------------------------------------------------------------------------------------


def fuzz_fit(data: Any) -> None:
    kind = data.draw(st.sampled_from(KINDS), "kind")
    model = new_model(kind)
    names = ("X", "y", "groups", "X", "y")
    if data.draw(st.booleans(), "refit"):
        model = copy.copy(fitted_model(kind, "one"))
    if data.draw(st.booleans(), "odd parameters"):
        odd = data.draw(parameters(), "parameters")
        if data.draw(st.booleans(), "in the constructor"):
            model = call(
                "constructor", lambda: type(model)(**{**model.get_params(), **odd}), {}, model
            )
        else:
            call("set_params", lambda: model.set_params(**odd), {}, model, writes=True)
    n = data.draw(st.sampled_from([36, 36, 72, 12, 18, 6, 5, 2, 1]), "rows")
    valid = data_of(kind, n)
    valid["sample_weight"] = data.draw(st.sampled_from([None, None, np.ones(n), np.arange(n) % 4]))
    if valid["sample_weight"] is not None:
        names = (*names, "sample_weight")
    arguments = spoil(valid, data.draw(mutations(names), "changes"))
    if call("fit", model.fit, arguments, model, writes=True) is not None:
        assert all(torch.isfinite(p).all() for p in model.module_.parameters())
        if "_state" in vars(model):
            assert is_adapted_finitely(model)


def is_adapted_finitely(model: Any) -> bool:
    parts = [model._state.adapted]
    if isinstance(parts[0], Mixed):
        parts = [parts[0].head, parts[0].steps]
    return all(
        finite(part.shift)
        if isinstance(part, Conditioned)
        else all(bool(torch.isfinite(p).all()) for p in part.adapted.params.values())
        for part in parts
    )


ADAPTED = st.sampled_from([*["one", "several"] * 4, "not"])


def fuzz_adapt(data: Any) -> None:
    kind, adapted = data.draw(st.sampled_from(KINDS), "kind"), data.draw(ADAPTED, "adapted")
    model = copy.copy(fitted_model(kind, adapted))
    n = data.draw(st.sampled_from([6, 12, 36, 3, 2, 1]), "rows")
    valid = trimmed(data_of(kind, n, 1), kind, grouped=data.draw(st.booleans(), "groups"))
    valid["sample_weight"] = data.draw(st.sampled_from([None, np.ones(n), np.arange(n) + 0.5]))
    chosen = data.draw(mutations(("X", "y", "groups", "sample_weight", "X", "y")), "changes")
    arguments = spoil(valid, chosen)
    if data.draw(st.booleans(), "by the function"):
        copied = call("adapt()", lambda **a: adapt(model, **a), arguments, model)
    else:
        copied = call("adapt", model.adapt, arguments, model, writes=True)
    if copied is not None:
        assert is_adapted_finitely(copied)
        query = data_of(kind, n, 2)
        if "column" not in kind:
            query["groups"] = arguments["groups"]
        fuzz_answers(data, copied, query)


def fuzz_answers(data: Any, model: Any, valid: dict[str, Any]) -> None:
    """Ask an adapted model for all kinds of answers."""
    methods = ["predict"]
    if hasattr(model, "classes_"):
        methods += ["predict_proba", "predict_log_proba", "decision_function"]
    else:
        methods += ["predict_std"]
    method = data.draw(st.sampled_from(methods), "method")
    arguments = {"X": valid["X"], "groups": valid["groups"]}
    function = functools.partial(deviations, model)
    call(method, getattr(model, method, function), arguments, model)


def deviations(model: Any, **arguments: Any) -> Any:
    return model.predict(**arguments, return_std=True)[1]


def fuzz_predict(data: Any) -> None:
    kind, adapted = data.draw(st.sampled_from(KINDS), "kind"), data.draw(ADAPTED, "adapted")
    model = copy.copy(fitted_model(kind, adapted))
    n = data.draw(st.sampled_from([36, 6, 2, 1]), "rows")
    valid = data_of(kind, n, 1)
    if adapted == "one":
        valid["groups"] = None
        if "column" in kind and data.draw(st.booleans(), "one task"):
            column = "task" if "named" in kind else -1
            if isinstance(valid["X"], pd.DataFrame):
                valid["X"][column] = 0
    changes = data.draw(mutations(("X", "X", "groups")), "changes")
    fuzz_answers(data, model, spoil(valid, changes))


def fuzz_score(data: Any) -> None:
    kind, adapted = data.draw(st.sampled_from(KINDS), "kind"), data.draw(ADAPTED, "adapted")
    model = copy.copy(fitted_model(kind, adapted))
    n = data.draw(st.sampled_from([36, 12, 6, 3, 2, 1]), "rows")
    valid = data_of(kind, n, 1)
    if adapted == "one" and data.draw(st.booleans(), "rows of the task"):
        valid["groups"] = None
    which = data.draw(st.sampled_from(["score", "task_scorer", "task_scores", "adapt_predict"]))
    names = ("X", "y", "groups", "X", "y")
    if which == "score":
        valid["sample_weight"] = data.draw(st.sampled_from([None, np.ones(n), np.arange(n) + 0.5]))
        names = (*names, "sample_weight")
    changes = data.draw(mutations(names), "changes")
    arguments = spoil(valid, changes)
    if which == "score":
        call("score", model.score, arguments, model)
    elif which == "task_scorer":
        metric = "accuracy" if "classifier" in kind else "neg_mean_squared_error"
        scorer = task_scorer(metric, n_shots=data.draw(st.sampled_from([None, 1, 2, 100])))
        call("task_scorer", lambda **a: scorer(model, **a), arguments, model)
    elif which == "task_scores":
        call("task_scores", lambda **a: task_scores(model, **a), arguments, model)
    else:
        query = {f"{name}_query": arguments[name] for name in ("X", "groups")}
        arguments = {"X_support": arguments["X"], "y_support": arguments["y"], **query}
        arguments["groups_support"] = arguments["groups_query"]
        if changes and data.draw(st.booleans(), "query as it was"):
            arguments["X_query"] = valid["X"]
        answer = call("adapt_predict", lambda **a: adapt_predict(model, **a), arguments, model)
        assert answer is None or finite(answer)


@functools.cache
def prior_of(kind: str) -> Any:
    if "pipeline" not in kind:
        return fitted_model(kind, "not")
    model = new_model(kind.removeprefix("pipeline "))
    data = data_of(kind, n_rows_of(kind))
    name = type(model).__name__.lower()
    pipe = make_pipeline(StandardScaler(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.fit(data["X"], data["y"], **{f"{name}__groups": data["groups"]})


PRIORS = ["", *(kind for kind in KINDS if "column" not in kind), "pipeline regressor frame"]
PRIORS += ["pipeline regressor", "pipeline classifier", "pipeline classifier ways"]


def fuzz_few_shot(data: Any) -> None:
    kind = data.draw(st.sampled_from(PRIORS), "prior")
    classifies = "classifier" in kind or (not kind and data.draw(st.booleans(), "classifies"))
    kind = kind or ("classifier" if classifies else "regressor")
    cls = FewShotClassifier if classifies else FewShotRegressor
    prior = prior_of(kind) if data.draw(st.integers(0, 5), "with prior") else None
    rates = data.draw(st.sampled_from([{}, {"steps": 2}, {"alpha": 1e300}, {"alpha": 0}]), "rates")
    if prior is None:
        rates = {"steps": 2, **rates}
    model = cls(prior, random_state=0, **rates)
    n = data.draw(st.sampled_from([6, 12, 2, 1]), "rows")
    valid = trimmed(data_of(kind, n, 1), kind, grouped=False)
    del valid["groups"]
    valid["sample_weight"] = data.draw(st.sampled_from([None, np.ones(n)]), "weights")
    names = ("X", "y", "X", "y", "sample_weight")
    if call("FewShot.fit", model.fit, spoil(valid, data.draw(mutations(names), "c")), model,
            writes=True) is None:  # fmt: skip
        call("FewShot.predict", model.predict, {"X": valid["X"]}, model)
        return
    if prior is None:
        valid["X"] = data_of(kind, n, 2)["X"]
    arguments = spoil({"X": data_of(kind, n, 2)["X"]}, data.draw(mutations(("X",)), "query"))
    methods = ["predict"]
    if classifies:
        methods += ["predict_proba", "predict_log_proba", "decision_function"]
    method = data.draw(st.sampled_from(methods), "method")
    call(f"FewShot.{method}", getattr(model, method), arguments, model)
    if data.draw(st.booleans(), "score"):
        call("FewShot.score", model.score, {"X": arguments["X"], "y": valid["y"]}, model)
    if data.draw(st.booleans(), "again"):
        again = spoil(valid, data.draw(mutations(names), "again"))
        call("FewShot.fit", model.fit, again, model, writes=True)


def fuzz_order(data: Any) -> None:
    """Calls in any order: what was meta-learned changes in `fit` only."""
    kind = data.draw(st.sampled_from([k for k in KINDS if "column" not in k]), "kind")
    model = new_model(kind)
    learned: Any = None  # what was meta-learned, as of the last fit
    steps = ["fit", "adapt", "adapt", "answer", "answer", "score", "set_params", "clone", "copy"]
    steps += ["deepcopy", "pickle", "adapt()", "few shot", "bad fit", "bad adapt", "hasattr"]
    n_steps = data.draw(st.integers(2, 8), "number of calls")
    for step in data.draw(st.lists(st.sampled_from(steps), min_size=n_steps, max_size=n_steps)):
        several = data.draw(st.booleans(), "several tasks")
        seed = data.draw(st.integers(1, 3), "seed")
        support = trimmed(data_of(kind, 12 if several else 6, seed), kind, grouped=several)
        if step == "fit":
            if call("fit", model.fit, data_of(kind, n_rows_of(kind)), model, writes=True):
                learned = digest(model.module_)
        elif step == "bad fit":
            bad = {**data_of(kind, 36), "y": np.full(36, np.nan)}
            assert call("fit", model.fit, bad, model, writes=True) is None
        elif step == "bad adapt":
            bad = {**support, "X": np.full((3, 7), 1.0)}
            assert call("adapt", model.adapt, bad, model, writes=True) is None
        elif step == "adapt":
            done = call("adapt", model.adapt, support, model, writes=True)
            assert (done is None) == (learned is None)
        elif step == "answer":
            fuzz_answers(data, model, support)
        elif step == "score":
            call("score", model.score, data_of(kind, 36, seed), model)
        elif step == "set_params":
            odd = {
                name: data.draw(st.sampled_from(values), name)
                for name, values in (("alpha", [0.01, 0.1, 0]), ("adapt_steps", [None, 0, 1, 3]))
            }
            call("set_params", functools.partial(model.set_params, **odd), {}, model, writes=True)
        elif step == "clone":
            other = call("clone", functools.partial(clone, model), {}, model)
            assert not hasattr(other, "module_")
        elif step == "hasattr":
            for name in ("predict_proba", "none_such", "classes_"):
                try:
                    getattr(model, name)
                except AttributeError:
                    RECORD.outcomes["getattr", "AttributeError"] += 1
        elif step == "adapt()":
            call("adapt()", functools.partial(adapt, model), support, model)
        elif step == "few shot":
            cls = FewShotClassifier if "classifier" in kind else FewShotRegressor
            few = cls(model)
            task = {name: support[name] for name in ("X", "y")}
            if "ways" in kind or "classifier" not in kind or not several:
                call("FewShot.fit", few.fit, task, model)
        else:
            copies = {
                "copy": copy.copy,
                "deepcopy": copy.deepcopy,
                "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            }
            before = digest(vars(model).get("_state"))
            model = call(step, functools.partial(copies[step], model), {}, model)
            assert digest(vars(model).get("_state")) == before
        if learned is not None:
            assert digest(model.module_) == learned, f"{step} changed what was meta-learned"


ENTRIES = {
    "fit": (fuzz_fit, 0.25),
    "adapt": (fuzz_adapt, 0.2),
    "predict": (fuzz_predict, 0.2),
    "score": (fuzz_score, 0.15),
    "few shot": (fuzz_few_shot, 0.12),
    "any order": (fuzz_order, 0.08),
}


def run(entry: str, n_examples: int, *, seed: int | None = None) -> None:
    """Run examples of one kind; a failing one is made small and raised."""
    function, _ = ENTRIES[entry]

    def example(data: Any) -> None:
        RECORD.examples[entry] += 1
        function(data)

    example.__name__ = example.__qualname__ = f"fuzz_{entry.replace(' ', '_')}"
    example = given(st.data())(example)
    if seed is not None:
        example = hypothesis.seed(seed)(example)
    settings(
        max_examples=n_examples,
        derandomize=seed is None,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(example)()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", nargs="*", choices=list(ENTRIES), default=list(ENTRIES))
    options = parser.parse_args(arguments)
    failed = 0
    for entry in options.entries:
        start = time.perf_counter()
        try:
            run(entry, int(options.examples * ENTRIES[entry][1]), seed=options.seed)
        except (Exception, ExceptionGroup) as error:
            traceback.print_exception(error)
            failed += 1
        sys.stdout.write(f"{entry}: {time.perf_counter() - start:.0f} s\n")
    sys.stdout.write(f"{RECORD.report()}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
