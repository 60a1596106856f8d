"""Which tasks are trained on and which are held out, and their rows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from sklearn_maml._validation import is_integer, is_number
from sklearn_maml.data.ids import show_id
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.splitting import check_splittable, usable
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.evaluation.baselines.base import draw_episode
from sklearn_maml.exceptions import SmallTaskWarning

# fewer leave nothing to learn from, or no spread over tasks to take a standard error from
MIN_TRAINING_TASKS, MIN_HELD_OUT_TASKS = 4, 2
# episodes of held-out classes, where these are a pool
POOLED_EPISODES = 100
_SPLITS_EXPECTED = (
    "splits must hold (train, episodes) pairs: row positions, and a dict from the number of shots "
    "to a list of (support, query) row positions; {}."
)


def n_held_out(n_tasks: int, test_size: Any) -> int:
    """Count the tasks, or classes of a pool, that `test_size` of so many holds out."""
    most = n_tasks - MIN_TRAINING_TASKS
    if is_integer(test_size):
        held = int(test_size)
    elif is_number(test_size) and 0 < test_size < 1:
        held = min(max(round(float(test_size) * n_tasks), MIN_HELD_OUT_TASKS), most)
    else:
        raise ValueError(
            f"test_size must be a fraction between 0 and 1 or a number of tasks; got {test_size!r}."
        )
    if not MIN_HELD_OUT_TASKS <= held <= most:
        raise ValueError(
            f"test_size={test_size!r} of {n_tasks} tasks holds out {held}; expected "
            f"{MIN_HELD_OUT_TASKS} to {most}, so that {MIN_TRAINING_TASKS} are left to train on."
        )
    return held


def random_splits(
    tasks: TaskCollection,
    n_shots: tuple[int, ...],
    n_held: int,
    n_repeats: int,
    max_queries: int,
    disjoint_rows: bool,
    classification: bool,
    rng: np.random.RandomState,
) -> list[Any]:
    """Hold tasks out at random, and draw an episode of each for every number of shots.

    A task that has no query row after so many shots is left out there, with one warning.
    """
    if disjoint_rows:
        flat = tasks.X.reshape(len(tasks.X), -1)
        distinct, which = np.unique(flat, axis=0, return_inverse=True)
    splits, n_left_out, largest = [], dict.fromkeys(n_shots, 0), 0
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
            largest = max(largest, len(rows))
            for k in n_shots:
                support, query = draw_episode(rows, tasks.y, k, classification, max_queries)
                if len(query):
                    episodes[k].append((support, query))
                else:
                    n_left_out[k] += 1
        splits.append((train, {k: pairs for k, pairs in episodes.items() if pairs}))
    if not all(episodes for _, episodes in splits):
        halved = ", left of its own by disjoint_rows" if disjoint_rows else ""
        raise ValueError(
            f"No held-out task has a query row after n_shots={min(n_shots)}"
            f"{' of each class' if classification else ''}: the largest has {largest} "
            f"rows{halved}. Ask for fewer shots, or give tasks with more rows."
        )
    counts = [f"{n} after {k}" for k, n in n_left_out.items() if n]
    if counts:
        warnings.warn(
            f"Of {n_held * n_repeats} held-out tasks, these have no query row left after so many "
            f"support rows{' of each class' if classification else ''} and are not scored there: "
            f"{', '.join(counts)}.",
            SmallTaskWarning,
            stacklevel=4,
        )
    return splits


def random_episodes(
    tasks: TaskCollection,
    n_ways: int,
    n_shots: tuple[int, ...],
    test_size: Any,
    n_repeats: int,
    max_queries: int,
    rng: np.random.RandomState,
) -> list[Any]:
    """Hold tasks out, or classes of a pool, and draw episodes of `n_ways` of their classes."""
    pool = tasks.spelling == "single"
    labels, y = np.unique(tasks.y, return_inverse=True)
    unit = y.reshape(-1) if pool else tasks.codes
    n_held = n_held_out(len(labels) if pool else tasks.n_tasks, test_size)
    if pool and n_held < n_ways:
        raise ValueError(
            f"test_size={test_size!r} holds out {n_held} classes, fewer than n_ways={n_ways}. Hold "
            "out more, or give more classes."
        )
    splits = []
    for _ in range(n_repeats):
        held_out = rng.permutation(unit.max() + 1)[:n_held]
        is_held = np.isin(unit, held_out)
        positions = np.flatnonzero(is_held)
        held = dataclasses.replace(
            tasks,
            X=positions,
            y=y.reshape(-1)[is_held],
            codes=tasks.codes[is_held],
            in_query=None,
        )
        if not pool:
            held = held.select(np.unique(held.codes))
        episodes = {}
        for k in n_shots:
            part, _ = usable(held, k, n_ways, True)
            check_splittable(part, k, n_ways, True)
            sampler = EpisodeSampler(
                part,
                classification=True,
                n_ways=n_ways,
                n_shots=k,
                n_queries=max(max_queries // n_ways, 1),
            )
            n_times = POOLED_EPISODES if pool else 1
            which = np.repeat(np.arange(part.n_tasks), n_times)
            split = sampler.split(which, np.random.default_rng(rng.randint(2**31 - 1)))
            ends = [np.cumsum(n)[:-1] for n in (split.n_support, split.n_query)]
            episodes[k] = list(
                zip(
                    np.split(part.X[split.support], ends[0]),
                    np.split(part.X[split.query], ends[1]),
                    strict=True,
                )
            )
        splits.append((np.flatnonzero(~is_held), episodes))
    return splits


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
    pool = tasks.spelling == "single"  # of classes, some of which are held out
    unit = np.unique(tasks.y, return_inverse=True)[1].reshape(-1) if pool else tasks.codes
    trained = np.unique(unit[train])
    for pairs in episodes.values():
        for support, query in pairs:
            both = np.unique(unit[np.concatenate([support, query])])
            if (len(both) != 1 and not pool) or len(query) == 0:
                raise ValueError(
                    "An episode of splits must have query rows, and all rows of one task; got "
                    f"{len(support)} and {len(query)} rows of {len(both)} task(s)."
                )
            if np.isin(both, trained).any() or np.intersect1d(support, query).size:
                what = "a class" if pool else f"task {show_id(tasks.ids[both[0]])}"
                raise ValueError(
                    f"splits give the same rows twice: {what} is also trained on, or a row is both "
                    "a support and a query row."
                )
    return train, episodes


@dataclasses.dataclass
class SplitData:
    """Standardised rows of a split; `train` and `episodes` are row positions.

    `center` and `scale` are what numbers are standardised with.
    """

    X: np.ndarray
    y: np.ndarray
    tasks: TaskCollection
    train: np.ndarray
    episodes: dict[int, list[tuple[np.ndarray, np.ndarray]]]
    classes: np.ndarray | None
    names: list[Any] | None
    n_ways: int | None = None
    center: Any = 0.0
    scale: Any = 1.0

    @property
    def n_classes(self) -> int:
        """Columns of probabilities; 0 in regression."""
        if self.n_ways is not None:
            return self.n_ways
        return 0 if self.classes is None else len(self.classes)

    @property
    def pooled(self) -> bool:
        """Whether episodes are drawn from one pool of classes."""
        return self.tasks.spelling == "single"

    @property
    def numbers(self) -> np.ndarray:
        """Targets as baselines take them: standardised, or positions of classes."""
        return self.y if self.classes is None else np.searchsorted(self.classes, self.y)

    @property
    def own(self) -> np.ndarray:
        """Targets in their own units."""
        return self.tasks.y.reshape(self.y.shape)

    def local(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], y: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Targets of support and query rows; labels that are local as ranks in their episode."""
        parts = [(y[s], y[q]) for s, q in pairs]
        if self.n_ways is None:
            return parts
        return [
            tuple(np.searchsorted(np.unique(of_support), part) for part in (of_support, of_query))
            for of_support, of_query in parts
        ]

    def unit(self, number: int, pair: tuple[np.ndarray, np.ndarray]) -> int:
        """Return what scores are averaged over: the task of an episode, or its number in a pool."""
        return number if self.pooled else int(self.tasks.codes[pair[1][0]])

    @classmethod
    def make(
        cls,
        tasks: TaskCollection,
        train: np.ndarray,
        episodes: dict[int, Any],
        classification: bool,
        names: list[Any] | None,
        n_ways: int | None = None,
    ) -> SplitData:
        """Standardise with the statistics of the training tasks."""
        X = tasks.X.astype(np.float64)
        mean, spread = X[train].mean(0), X[train].std(0)
        X = ((X - mean) / np.where(spread > 0, spread, 1)).astype(tasks.X.dtype)
        if not classification:
            y = tasks.y.astype(np.float64)
            y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
            center, scale = y[train].mean(0), y[train].std(0)
            if not np.all(scale > 0):
                raise ValueError("All targets of the training tasks are equal: nothing to learn.")
            y = (y - center) / scale
            return cls(X, y, tasks, train, episodes, None, names, None, center, scale)
        if n_ways is not None:
            every = np.unique(tasks.y)
            return cls(X, tasks.y, tasks, train, episodes, every, names, n_ways)
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
