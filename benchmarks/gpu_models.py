"""Stage of `benchmarks/gpu.py` that fits the default model on the card and on the CPU.

A meta-step says little of what users wait for: here whole fits are timed, and adapting to tasks
and predicting, and the two devices' errors on tasks that neither has seen are put side by side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_steps import Context
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import load_vowels, load_x264

N_SUPPORT = 10


@dataclasses.dataclass
class ModelResult:
    """The default estimator on a collection, on one device."""

    workload: str
    where: str  # "card" or "CPU"
    threads: int
    updates: int = 0
    fit_seconds: float | None = None
    adapt_ms: float | None = None  # all new tasks in one call
    predict_ms: float | None = None
    error: float | None = None  # root mean square of new rows, of new tasks; or the log-loss
    difference: float | None = None  # of predictions to the card's, root mean square
    kind: str = "model"


@dataclasses.dataclass(frozen=True)
class Collection:
    name: str
    make: type
    load: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def simulated(n_tasks: int, n_rows: int, n_features: int) -> tuple[np.ndarray, ...]:
    """Tasks whose slopes lie near a plane of three dimensions, bent by a common curve."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(n_tasks), n_rows)
    X = rng.normal(size=(len(groups), n_features)).astype(np.float32)
    slopes = rng.normal(size=(n_tasks, 3)) @ rng.normal(size=(3, n_features)) / n_features**0.5
    y = np.einsum("ij,ij->i", X, slopes[groups]) + np.sin(2 * X[:, 0])
    return X, (y + 0.1 * rng.normal(size=len(y))).astype(np.float32), groups


def collections(small: bool) -> list[Collection]:
    if small:
        tiny = {"max_iter": 5, "hidden_layer_sizes": (8,)}
        return [Collection("tiny", MAMLRegressor, lambda: simulated(20, 15, 3), tiny)]
    return [
        Collection("100 x 20 x 10", MAMLRegressor, lambda: simulated(100, 20, 10)),
        Collection("1,000 x 100 x 50, units (256, 256)", MAMLRegressor,
                   lambda: simulated(1000, 100, 50), {"hidden_layer_sizes": (256, 256)}),
        Collection("x264", MAMLRegressor, lambda: load_x264(return_X_y_groups=True)),
        Collection("vowels", MAMLClassifier, lambda: load_vowels(return_X_y_groups=True)),
    ]  # fmt: skip


def split(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of three quarters of the tasks; support and other rows of the rest."""
    rng = np.random.default_rng(0)
    tasks = rng.permutation(np.unique(groups))
    new = np.isin(groups, tasks[: len(tasks) // 4])
    support = np.zeros(len(groups), bool)
    for task in tasks[: len(tasks) // 4]:
        rows = np.flatnonzero(groups == task)
        support[rng.choice(rows, min(N_SUPPORT, len(rows) // 2), replace=False)] = True
    return ~new, support, new & ~support


def median_ms(context: Context, call: Callable[[], Any]) -> float:
    """Of five calls after one, which sets things up."""
    times = []
    for _ in range(6):
        context.synchronise()
        start = time.perf_counter()
        call()
        context.synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def models_stage(context: Context) -> None:
    """Fit on each device, the card first; a fit of another model before warms the card up."""
    loads = collections(context.dry_run)
    first = Collection("", MAMLRegressor, lambda: simulated(20, 15, 3), {"max_iter": 5})
    run(context, first, context.device)
    for collection in loads:
        found = {}
        for where, device in (("card", context.device), ("CPU", "cpu")):
            if context.left < 0:
                return
            result, found[where] = run(context, collection, device)
            result.where = where
            if where == "CPU":
                gap = found["card"] - found["CPU"]
                result.difference = float(np.sqrt(np.mean(gap**2)))
            context.emit(result)


def run(context: Context, collection: Collection, device: str) -> tuple[ModelResult, np.ndarray]:
    X, y, names = collection.load()
    groups = np.unique(names, return_inverse=True)[1]
    train, support, query = split(groups)
    X = StandardScaler().fit(X[train]).transform(X).astype(np.float32)
    model = collection.make(**collection.settings, device=device, random_state=0)
    context.synchronise()
    start = time.perf_counter()
    model.fit(X[train], y[train], groups=groups[train])
    context.synchronise()
    result = ModelResult(collection.name, "", torch.get_num_threads())
    result.fit_seconds, result.updates = time.perf_counter() - start, model.n_iter_
    s, q = (X[support], y[support], groups[support]), (X[query], groups[query])
    result.adapt_ms = median_ms(context, lambda: model.adapt(*s[:2], groups=s[2]))
    regression = collection.make is MAMLRegressor
    ask = model.predict if regression else model.predict_proba
    result.predict_ms = median_ms(context, lambda: ask(q[0], groups=q[1]))
    found = ask(q[0], groups=q[1])
    if regression:
        result.error = float(np.sqrt(np.mean((found - y[query]) ** 2)))
    else:
        places = np.searchsorted(model.classes_, y[query])
        result.error = float(-np.log(found[np.arange(len(found)), places]).mean())
    return result, found
