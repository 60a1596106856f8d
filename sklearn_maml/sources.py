"""Where the episodes of a meta-training come from: a collection of tasks, or a distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import numpy as np

from sklearn_maml.episodes import (
    VALIDATION_QUERIES,
    VALIDATION_QUERIES_OF_CLASS,
    EpisodeBatch,
    EpisodeSampler,
    check_splittable,
    draw_fixed,
    hold_out,
)
from sklearn_maml.tasks import (
    TaskCollection,
)

__all__ = ["CollectionSource", "DistributionSource"]

# tasks drawn from a task distribution for validation, and to learn what its tasks look like
VALIDATION_TASKS = 100


class CollectionSource:
    """Episodes from a finite task collection, with some tasks held out for validation."""

    def __init__(self, estimator: Any, tasks: TaskCollection, seed: int, continued: bool) -> None:
        if not continued:
            estimator._learn_targets(tasks)
        n_ways = estimator._n_ways()
        encoded = dataclasses.replace(estimator._encode(tasks), X=estimator._reshape(tasks.X))
        check_splittable(encoded, estimator.n_shots, n_ways, estimator._classification)
        self.tasks = tasks
        self.n_tasks = tasks.n_tasks
        self.ids = tasks.ids
        self.fingerprints = tasks.fingerprints() if tasks.named else {}
        self.single = tasks.spelling == "single" and n_ways is None
        pool = n_ways if tasks.spelling == "single" else None
        train, valid = hold_out(
            encoded, estimator.early_stopping, estimator.validation_fraction, seed, pool
        )
        options = {
            "classification": estimator._classification,
            "n_ways": n_ways,
            "n_shots": estimator.n_shots,
            "center_y": estimator._centers_targets(),
        }
        training = EpisodeSampler(train, n_queries=estimator.n_queries, **options)
        self.draw, self.draw_on = training.sample_batches, training.sample_on
        self.bytes_of_episode = training.bytes_of_episode()
        self.n_train = train.n_tasks
        self.rows_per_task = _episode_rows(estimator, tasks)
        self.validation: Any = None
        self.n_held_out = 0 if valid is None else valid.n_tasks
        # positions of the tasks held out; None too where classes are
        self.held_out: np.ndarray | None = None
        if valid is not None and pool is None:
            position = {task: j for j, task in enumerate(tasks.ids.tolist())}
            self.held_out = np.array([position[task] for task in valid.ids.tolist()])
        if valid is not None:
            sampler = EpisodeSampler(valid, n_queries=_validation_queries(estimator), **options)
            self.validation = draw_fixed(sampler, seed)


class DistributionSource:
    """Episodes from an object with ``sample(n_tasks, random_state)``: fresh tasks every time."""

    single = False
    ids = None
    n_tasks = None
    n_train = 1
    fingerprints: ClassVar[dict[Hashable, int]] = {}
    draw_on = None  # fresh tasks are not on any device

    def __init__(self, estimator: Any, distribution: Any, seed: int, continued: bool) -> None:
        self.estimator = estimator
        self.distribution = distribution
        drawn = distribution.sample(VALIDATION_TASKS, random_state=seed)
        if not isinstance(drawn, (list, tuple)) or len(drawn) == 0:
            raise ValueError(
                f"{type(distribution).__name__}.sample returned {type(drawn).__name__}; expected "
                "a list of (X, y) or (X_support, y_support, X_query, y_query) tasks."
            )
        tasks = estimator._read_tasks(drawn, None, reset=not continued)
        if not continued:
            estimator._learn_targets(tasks)
        self.tasks = tasks
        self.rows_per_task = _episode_rows(estimator, tasks)
        self.bytes_of_episode = (
            self._sampler(tasks, estimator.n_queries).bytes_of_episode()
            + 2 * (tasks.X.nbytes + tasks.y.nbytes) // tasks.n_tasks
        )
        self.validation: Any = None
        self.n_held_out = tasks.n_tasks
        if estimator.early_stopping:
            self.validation = draw_fixed(self._sampler(tasks, _validation_queries(estimator)), seed)

    def _sampler(self, tasks: TaskCollection, n_queries: int | None) -> EpisodeSampler:
        estimator = self.estimator
        encoded = estimator._encode(tasks)
        X = estimator._reshape(tasks.X)
        if X is not encoded.X:
            encoded = dataclasses.replace(encoded, X=X)
        n_ways, n_shots = estimator._n_ways(), estimator.n_shots
        check_splittable(encoded, n_shots, n_ways, estimator._classification)
        return EpisodeSampler(
            encoded,
            classification=estimator._classification,
            n_ways=n_ways,
            n_shots=n_shots,
            n_queries=n_queries,
            center_y=estimator._centers_targets(),
        )

    def draw(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        """Episodes of as many fresh tasks as there are positions (n_batches, n_episodes)."""
        drawn = self.distribution.sample(which.size, random_state=int(rng.integers(2**31 - 1)))
        if len(drawn) != which.size:
            raise ValueError(
                f"{type(self.distribution).__name__}.sample returned {len(drawn)} tasks, but "
                f"{which.size} were asked for. Return as many as n_tasks says; tasks may repeat."
            )
        tasks = _collect_quickly(drawn, self.tasks)
        if tasks is None:
            tasks = self.estimator._read_tasks(drawn, None)
        sampler = self._sampler(tasks, self.estimator.n_queries)
        return sampler.sample_batches(np.arange(tasks.n_tasks).reshape(which.shape), rng)


def _collect_quickly(drawn: Any, like: TaskCollection) -> TaskCollection | None:
    """Collect (X, y) tasks of equal shapes without full validation; None if that is not safe."""
    if like.y.dtype.kind not in "fiu" or {*map(len, drawn)} != {2}:
        return None
    try:
        X, y = (np.array(part) for part in zip(*drawn, strict=True))
    except ValueError:  # tasks of different shapes
        return None
    if X.dtype != like.X.dtype or X.shape[2:] != like.X.shape[1:] or y.dtype != like.y.dtype:
        return None
    if y.shape[:2] != X.shape[:2] or y.ndim != like.y.ndim + 1:
        return None
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        return None
    n_tasks, n_rows = X.shape[:2]
    return TaskCollection(
        X.reshape(-1, *X.shape[2:]),
        y.reshape(-1, *y.shape[2:]),
        np.repeat(np.arange(n_tasks), n_rows),
        np.arange(n_tasks),
        None,
        "list",
    )


def _validation_queries(estimator: Any) -> int:
    return VALIDATION_QUERIES_OF_CLASS if estimator._classification else VALIDATION_QUERIES


def _episode_rows(estimator: Any, tasks: TaskCollection) -> int:
    """Rough number of rows of an episode."""
    rows = int(np.median(tasks.sizes))
    if estimator.n_shots is not None and estimator.n_queries is not None:
        per_class = len(np.unique(tasks.y)) if estimator._classification else 1
        rows = min(rows, (estimator.n_shots + estimator.n_queries) * per_class)
    n_ways = estimator._n_ways()
    if n_ways is not None:
        rows = n_ways * ((estimator.n_shots or 1) + (estimator.n_queries or 15))
    return rows
