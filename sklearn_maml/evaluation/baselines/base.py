"""What a baseline is, and the tasks that it learns from and predicts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

# part of the training tasks that choices (rates, steps, strengths) are made on, and the support
# sets drawn of each of them
VALIDATION_FRACTION, VALIDATION_DRAWS = 0.15, 3
VALIDATION_QUERIES = 150


# predicted numbers or probabilities, or numbers and their standard deviations
Predicted = np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Episode:
    """Support and query rows of a task; `y_query` is for choices on validation tasks."""

    X_support: np.ndarray
    y_support: np.ndarray
    X_query: np.ndarray
    y_query: np.ndarray | None = None


@dataclasses.dataclass
class TrainingTasks:
    """Rows of the training tasks, and what several methods fit on them alike.

    `task` has the task of each row, `n_shots` the sizes of the support sets to come (of each
    class, in classification), `n_classes` is 0 in regression.
    """

    X: np.ndarray
    y: np.ndarray
    task: np.ndarray
    n_shots: tuple[int, ...]
    n_classes: int
    seed: int

    def __post_init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, float]] = {}
        self.borrowed = 0.0  # seconds that a method has spared by taking what another one made

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, made once for all methods."""
        if key in self._made:
            value, seconds = self._made[key]
            self.borrowed += seconds
            return value
        start = time.perf_counter()
        value = make()
        self._made[key] = value, time.perf_counter() - start
        return value

    def rows_of_tasks(self) -> list[np.ndarray]:
        """Row positions of each task."""
        order = np.argsort(self.task, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.task[order])) + 1)

    def validation(self) -> tuple[np.ndarray, dict[int, list[Episode]]]:
        """Rows of the tasks to train on, and episodes of the validation tasks for each K."""
        rng = np.random.RandomState(self.seed)
        tasks = self.rows_of_tasks()
        order = rng.permutation(len(tasks))
        n_held = max(1, round(VALIDATION_FRACTION * len(tasks)))
        episodes: dict[int, list[Episode]] = {k: [] for k in self.n_shots}
        for j in order[:n_held]:
            for _ in range(VALIDATION_DRAWS):
                rows = rng.permutation(tasks[j])
                for k in self.n_shots:
                    # tasks with too few rows for K give half of them, or one of each class, or none
                    fewer = 1 if self.n_classes else max(len(rows) // 2, 1)
                    for n in (k, min(k, fewer), 0):
                        support, query = draw_episode(
                            rows, self.y, n, self.n_classes > 0, VALIDATION_QUERIES
                        )
                        if len(query):
                            break
                    episodes[k].append(
                        Episode(self.X[support], self.y[support], self.X[query], self.y[query])
                    )
        return np.concatenate([tasks[j] for j in order[n_held:]]), episodes


def draw_episode(
    rows: np.ndarray, y: np.ndarray, k: int, classification: bool, max_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split shuffled rows of a task: the first k (of each class) are support rows."""
    if not classification:
        return rows[:k], rows[k : k + max_queries]
    seen: dict[Any, int] = {}
    is_support = np.zeros(len(rows), dtype=bool)
    for position, label in enumerate(y[rows].tolist()):
        seen[label] = seen.get(label, 0) + 1
        is_support[position] = seen[label] <= k
    return rows[is_support], rows[~is_support][:max_queries]


class Baseline:
    """Learns from training tasks and predicts each held-out task from its support rows."""

    # methods of a family run one after the other and share what they fit
    family = ""

    def fit(self, train: TrainingTasks) -> Any:
        """Learn from the training tasks."""
        self.n_classes = train.n_classes
        return self

    def predict(self, episodes: Sequence[Episode], k: int) -> list[Predicted]:
        """Predict the query rows of each episode, of K support rows (of each class)."""
        return [self.predict_task(e.X_support, e.y_support, e.X_query) for e in episodes]

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Predict the query rows of one task from its support rows; with a std, if there is one."""
        raise NotImplementedError


def predictions(model: Any, X: np.ndarray, n_classes: int) -> np.ndarray:
    """Predicted numbers, or probabilities of all classes, those that the model knows not at 0."""
    if not n_classes:
        return np.asarray(model.predict(X), dtype=np.float64)
    p = np.zeros((len(X), n_classes))
    if hasattr(model, "predict_proba"):
        p[:, model.classes_.astype(int)] = model.predict_proba(X)
    else:
        p[np.arange(len(X)), model.predict(X).astype(int)] = 1
    return p


def for_shots(chosen: dict[int, Any], k: int) -> Any:
    """Return what was chosen for K support rows, or for the nearest number with a choice."""
    return chosen[min(chosen, key=lambda other: abs(other - k))]
