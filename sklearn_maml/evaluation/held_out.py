"""Which tasks are trained on and which are held out, and their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from sklearn_maml.data.ids import show_id
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.evaluation.baselines.base import draw_episode

_SPLITS_EXPECTED = (
    "splits must hold (train, episodes) pairs: row positions, and a dict from the number of shots "
    "to a list of (support, query) row positions; {}."
)


def random_splits(
    tasks: TaskCollection,
    n_shots: tuple[int, ...],
    n_held: int,
    n_repeats: int,
    max_queries: int,
    disjoint_rows: bool,
    classification: bool,
    rng: np.random.RandomState,
) -> Iterable[Any]:
    """Hold tasks out at random, and draw an episode of each for every number of shots."""
    if disjoint_rows:
        flat = tasks.X.reshape(len(tasks.X), -1)
        distinct, which = np.unique(flat, axis=0, return_inverse=True)
    for _ in range(n_repeats):
        held = np.zeros(tasks.n_tasks, dtype=bool)
        held[rng.permutation(tasks.n_tasks)[:n_held]] = True
        usable = np.ones(len(tasks.X), dtype=bool)
        if disjoint_rows:
            for_held = rng.permutation(len(distinct)) < len(distinct) // 2
            usable = for_held[which.reshape(-1)] == held[tasks.codes]
        train = np.flatnonzero(usable & ~held[tasks.codes])
        episodes: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {k: [] for k in n_shots}
        for j in np.flatnonzero(held).tolist():
            rows = tasks.rows(j)
            rows = rng.permutation(rows[usable[rows]])
            for k in n_shots:
                support, query = draw_episode(rows, tasks.y, k, classification, max_queries)
                if len(query) == 0:
                    halved = " left of its own by disjoint_rows" if disjoint_rows else ""
                    raise ValueError(
                        f"Task {show_id(tasks.ids[j])} has {len(rows)} rows{halved}: none for a "
                        f"query set after n_shots={k}{' of each class' if classification else ''}. "
                        "Ask for fewer shots, or leave out small tasks."
                    )
                episodes[k].append((support, query))
        yield train, episodes


def check_split(split: Any, tasks: TaskCollection) -> tuple[np.ndarray, dict[int, Any]]:
    """Return what a split of the caller's trains on and its episodes, as arrays."""
    try:
        train, episodes = split
        train = np.asarray(train, dtype=np.intp)
        episodes = {
            int(k): [tuple(np.asarray(part, dtype=np.intp) for part in pair) for pair in pairs]
            for k, pairs in episodes.items()
        }
        shaped = all(len(pair) == 2 for pairs in episodes.values() for pair in pairs)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(_SPLITS_EXPECTED.format(error)) from error
    if not shaped or not episodes or not all(episodes.values()):
        raise ValueError(_SPLITS_EXPECTED.format(f"got episodes of shots {sorted(episodes)}"))
    trained = np.unique(tasks.codes[train])
    for pairs in episodes.values():
        for support, query in pairs:
            both = np.unique(tasks.codes[np.concatenate([support, query])])
            if len(both) != 1 or len(support) == 0 or len(query) == 0:
                raise ValueError(
                    "An episode of splits must have support and query rows of one task; got "
                    f"{len(support)} and {len(query)} rows of {len(both)} task(s)."
                )
            if both[0] in trained or np.intersect1d(support, query).size:
                raise ValueError(
                    f"splits give the same rows twice: task {show_id(tasks.ids[both[0]])} is also "
                    "trained on, or a row is both a support and a query row."
                )
    return train, episodes


@dataclasses.dataclass
class SplitData:
    """Standardised rows of a split; `train` and `episodes` are row positions."""

    X: np.ndarray
    y: np.ndarray
    tasks: TaskCollection
    train: np.ndarray
    episodes: dict[int, list[tuple[np.ndarray, np.ndarray]]]
    classes: np.ndarray | None
    names: list[Any] | None

    @classmethod
    def make(
        cls,
        tasks: TaskCollection,
        train: np.ndarray,
        episodes: dict[int, Any],
        classification: bool,
        names: list[Any] | None,
    ) -> SplitData:
        """Standardise with the statistics of the training tasks."""
        X = tasks.X.astype(np.float64)
        mean, spread = X[train].mean(0), X[train].std(0)
        X = ((X - mean) / np.where(spread > 0, spread, 1)).astype(tasks.X.dtype)
        if not classification:
            y = tasks.y.reshape(-1).astype(np.float64)
            spread_y = y[train].std()
            if not spread_y > 0:
                raise ValueError("All targets of the training tasks are equal: nothing to learn.")
            y = (y - y[train].mean()) / spread_y
            return cls(X, y, tasks, train, episodes, None, names)
        classes = np.unique(tasks.y[train])
        scored = np.concatenate([part for e in episodes.values() for pair in e for part in pair])
        unseen = np.setdiff1d(tasks.y[scored], classes)
        if len(unseen):
            raise ValueError(
                f"No training task has the labels {unseen[:5].tolist()} of held-out tasks. Labels "
                "must be shared by the tasks; leave rows of rare labels out, or hold out fewer "
                "tasks."
            )
        return cls(X, tasks.y, tasks, train, episodes, classes, names)

    def rows(self, positions: np.ndarray) -> Any:
        """Rows for the estimator: with the names of features where the caller gave any."""
        if self.names is None:
            return self.X[positions]
        import pandas

        return pandas.DataFrame(self.X[positions], columns=self.names)
