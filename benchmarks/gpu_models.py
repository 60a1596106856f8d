"""Stage of `benchmarks/gpu.py` that fits the default model on the card and on the CPU.

A meta-step says little of what users wait for: here whole fits are timed, and adapting to tasks
and predicting, and the two devices' errors on tasks that neither has seen are put side by side.
Sizes lie on both sides of that up to which ``device="auto"`` fits on the CPU. A fit that takes
longer than `SECONDS` of updates is ended: then the time of an update is what can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_steps import Clock, Context
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import load_vowels, load_x264
from sklearn_maml.estimators.building import ROWS_OF_EPISODE
from sklearn_maml.estimators.parameters import N_MEMBERS
from sklearn_maml.learners.compiled import work_of_head

N_SUPPORT = 10
SECONDS = 2.0  # of updates, without those of the first epoch
# tasks, rows, features and units of simulated collections
SIZES = (
    (100, 20, 10, (64, 64)),
    (1000, 100, 50, (64, 64)),
    (1000, 100, 50, (256, 256)),
    (1000, 100, 100, (128, 128)),
    (1000, 100, 50, (512, 512)),
)


@dataclasses.dataclass
class ModelResult:
    """The default estimator on a collection, on one device."""

    workload: str
    where: str  # "card" or "CPU"
    threads: int
    work: float = 0.0  # multiply-adds of an update of the head, by which "auto" decides
    updates: int = 0
    ended: bool = False  # before its time
    fit_seconds: float | None = None
    update_ms: float | None = None
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


def two_classes(*sizes: int) -> tuple[np.ndarray, ...]:
    X, y, groups = simulated(*sizes)
    return X, (y > 0).astype(int), groups


def collections(small: bool) -> list[Collection]:
    if small:
        tiny = {"max_iter": 5, "hidden_layer_sizes": (8,)}
        return [Collection("tiny", MAMLRegressor, lambda: simulated(20, 15, 3), tiny)]
    loads = [
        Collection(
            f"{'two classes, ' if make is MAMLClassifier else ''}{n_tasks:,} x {n_rows} x "
            f"{n_features}, units {units}",
            make,
            functools.partial(load, n_tasks, n_rows, n_features),
            {"hidden_layer_sizes": units},
        )
        for n_tasks, n_rows, n_features, units in SIZES
        for make, load in ((MAMLRegressor, simulated), (MAMLClassifier, two_classes))
    ]
    return [
        *loads,
        Collection("x264", MAMLRegressor, lambda: load_x264(return_X_y_groups=True)),
        Collection("vowels", MAMLClassifier, lambda: load_vowels(return_X_y_groups=True)),
    ]


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
    on_device = context.synchronise if device == context.device else lambda: None
    clock = Clock(SECONDS, on_device)
    settings = {**collection.settings, "device": device, "callbacks": [clock], "random_state": 0}
    model = collection.make(**settings)
    start = time.perf_counter()
    model.fit(X[train], y[train], groups=groups[train])
    on_device()
    result = ModelResult(collection.name, "", torch.get_num_threads())
    result.fit_seconds, result.updates = time.perf_counter() - start, model.n_iter_
    result.update_ms = 1e3 * clock.typical
    result.ended = clock.was_up
    sizes = [X.shape[1], *model.hidden_layer_sizes]
    result.work = work_of_head(N_MEMBERS, sizes, model.meta_batch_size * ROWS_OF_EPISODE)
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
