"""What every way to learn a task offers, and what it makes of support sets."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# tasks, and their padded rows, that are taken at a time
TASKS_AT_A_TIME, PADDED_ROWS = 256, 65536
NO_EXTENSION = (
    "extend=True adds rows to what was learned of a task, but gradient steps start from the "
    "initialisation, with all rows of the task. Call adapt with the old rows and the new ones "
    "together; with update_rule='gaussian-head' rows can be added."
)
# padded rows that gradient steps adapt to at a time
MOST_ROWS = 2**18


@dataclasses.dataclass(frozen=True)
class Support:
    """Labelled rows of tasks.

    Attributes
    ----------
    X : ndarray of shape (n_rows, *feature_shape)
    y : ndarray of shape (n_rows, n_outputs) or int ndarray of shape (n_rows,)
        Targets as the losses take them.
    codes : int ndarray of shape (n_rows,)
        Task of each row.
    n_tasks : int
    weight : ndarray of shape (n_rows,) or None
        Weights of the rows in losses.
    count : ndarray of shape (n_rows,) or None
        How many rows each one is, where `weight` says something else, too: of classes. None: as
        many as its weight.
    """

    X: np.ndarray
    y: np.ndarray
    codes: np.ndarray
    n_tasks: int
    weight: np.ndarray | None = None
    count: np.ndarray | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each task."""
        return np.bincount(self.codes, minlength=self.n_tasks)

    def followed_by(self, more: Support) -> Support:
        """Have more rows, of these tasks and of new ones, behind these; without weight they are 1.

        `more.n_tasks` counts these tasks, too.
        """
        if not len(self.X):
            return more
        pair = (self, more)
        weight = count = None
        if any(s.weight is not None for s in pair):
            weight = np.concatenate([s.weights() for s in pair])
        if any(s.count is not None for s in pair):
            count = np.concatenate([s.counts() for s in pair])
        X, y, codes = (
            np.concatenate([getattr(s, name) for s in pair]) for name in ("X", "y", "codes")
        )
        return Support(X, y, codes, more.n_tasks, weight, count)

    def of(self, tasks: np.ndarray) -> Support:
        """Rows of some tasks, which are numbered by their places in `tasks`."""
        if len(tasks) == self.n_tasks and (tasks == np.arange(self.n_tasks)).all():
            return self
        place = np.full(self.n_tasks, -1)
        place[tasks] = np.arange(len(tasks))
        codes = place[self.codes]
        return dataclasses.replace(self, codes=codes, n_tasks=len(tasks)).rows_at(codes >= 0)

    def without(self, tasks: np.ndarray) -> Support:
        """Rows of the other tasks; tasks keep their numbers."""
        return self.rows_at(~np.isin(self.codes, tasks)) if len(tasks) else self

    def rows_at(self, kept: np.ndarray) -> Support:
        """Take some of the rows, of as many tasks."""
        names = ("X", "y", "codes", "weight", "count")
        parts = {n: part[kept] for n in names if (part := getattr(self, n)) is not None}
        return dataclasses.replace(self, **parts)

    def weights(self) -> np.ndarray:
        """Weights, where there are none 1."""
        return np.ones(len(self.X), self.X.dtype) if self.weight is None else self.weight

    def counts(self) -> np.ndarray:
        """How many rows each one is."""
        return self.weights() if self.count is None else self.count

    def evidence(self) -> np.ndarray:
        """Weights whose sum in each task is the number of rows, see `counts`."""
        if self.count is None:
            return self.weights().astype(np.float64)
        total = np.bincount(self.codes, self.weight, self.n_tasks)
        n_rows = np.bincount(self.codes, self.count, self.n_tasks)
        return self.weights() * (n_rows / np.where(total > 0, total, 1))[self.codes]


class Adapted(ABC):
    """Tasks that were learned from their support sets."""

    @property
    @abstractmethod
    def n_tasks(self) -> int:
        """Number of tasks."""

    @abstractmethod
    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> np.ndarray:
        """Return outputs (n_rows, n_outputs) of rows (n_rows, ...) of the tasks `codes`.

        In the units of the losses: standardised targets, or logits. `how` is what may be changed
        after `fit`; see `gradient.Running`.
        """

    def std(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs, and the standard deviations (n_rows, n_outputs) of the targets."""
        raise ValueError(no_std(type(self).__name__, "return_std=True"))

    def telling_rows(
        self, rows: np.ndarray, pools: np.ndarray, tasks: np.ndarray, n: int
    ) -> np.ndarray:
        """Rows whose labels would take most variance away from predictions of their pool.

        Parameters
        ----------
        rows : ndarray of shape (n_rows, ...)
        pools : int ndarray of shape (n_rows,)
            Pool of each row; each has at least `n`.
        tasks : int ndarray of shape (n_pools,)
            Task of each pool.
        n : int

        Returns
        -------
        chosen : int ndarray of shape (n_pools, n)
            Positions in `rows`, in the order in which they are to be labelled.
        """
        raise ValueError(no_std(type(self).__name__, "suggest_rows"))

    def module(self, task: int, how: Any) -> Any:
        """Make a torch module that maps rows of one task to their outputs."""
        raise TypeError(f"What {type(self).__name__} learns of a task cannot be given as a module.")

    def extended(self, more: Support) -> Adapted:
        """Learn more rows of these tasks, and new tasks behind them; this object stays as it is.

        `more.n_tasks` counts all tasks, those of this object first.
        """
        raise ValueError(NO_EXTENSION)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain data from which the learner's `adapted_from` makes it again."""


class Several(Adapted):
    """Tasks of two calls, side by side.

    Parameters
    ----------
    first, second : Adapted
        The tasks of `second` come after those of `first`.
    """

    def __init__(self, first: Adapted, second: Adapted) -> None:
        self.first = first
        self.second = second

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.first.n_tasks + self.second.n_tasks

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> np.ndarray:
        """See `Adapted`."""
        return self._each(rows, codes, lambda part, *its: (part.outputs(*its, how),))[0]

    def std(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Adapted`."""
        outputs, std = self._each(rows, codes, lambda part, *its: part.std(*its, how))
        return outputs, std

    def telling_rows(
        self, rows: np.ndarray, pools: np.ndarray, tasks: np.ndarray, n: int
    ) -> np.ndarray:
        """See `Adapted`."""
        n_first = self.first.n_tasks
        chosen = np.empty((len(tasks), n), dtype=np.intp)
        for part, shift, own in (
            (self.first, 0, tasks < n_first),
            (self.second, n_first, tasks >= n_first),
        ):
            if own.any():
                place = np.flatnonzero(own[pools])
                of_part = np.cumsum(own)[pools[place]] - 1
                found = part.telling_rows(rows[place], of_part, tasks[own] - shift, n)
                chosen[own] = place[found]
        return chosen

    def _each(
        self,
        rows: np.ndarray,
        codes: np.ndarray,
        run: Callable[[Adapted, np.ndarray, np.ndarray], tuple[np.ndarray, ...]],
    ) -> list[np.ndarray]:
        """Run the rows of either part with it, and put the values together."""
        n_first = self.first.n_tasks
        of_first = codes < n_first
        parts = [
            (mask, run(part, rows[mask], codes[mask] - shift))
            for part, mask, shift in ((self.first, of_first, 0), (self.second, ~of_first, n_first))
            if mask.any()
        ]
        whole = [np.empty((len(rows), v.shape[1]), v.dtype) for v in parts[0][1]]
        for mask, values in parts:
            for to, some in zip(whole, values, strict=True):
                to[mask] = some
        return whole

    def module(self, task: int, how: Any) -> Any:
        """See `Adapted`."""
        n_first = self.first.n_tasks
        if task < n_first:
            return self.first.module(task, how)
        return self.second.module(task - n_first, how)

    def state(self) -> dict[str, Any]:
        """See `Adapted`."""
        return {"kind": "several", "parts": [self.first.state(), self.second.state()]}


def no_std(what: str, needed_by: str) -> str:
    """Say why there are no standard deviations."""
    return (
        f"{needed_by} needs a learner that knows how sure it is, and {what} does not: "
        "update_rule='sgd' and the other rules by name take gradient steps alone. Fit with "
        "update_rule='gaussian-head', or 'auto' where it gets a share (see learner_weights_)."
    )


def alike(sizes: np.ndarray, most_tasks: int, most_rows: int = MOST_ROWS) -> list[np.ndarray]:
    """Positions of similar sizes together, of few enough rows after padding to the largest."""
    by_size = np.argsort(sizes, kind="stable")
    parts, start = [], 0
    while start < len(by_size):
        part = by_size[start : start + most_tasks]
        fits = sizes[part] * np.arange(1, len(part) + 1) <= most_rows
        parts.append(part[: max(int(fits.sum()), 1)])
        start += len(parts[-1])
    return parts


def refuse_unknown() -> None:
    """Refuse more rows of tasks that were adapted without theirs."""
    raise ValueError(
        "extend=True adds rows to those that adapt has seen, but with adapt_steps=0 it left them "
        "out. Call adapt with all rows, after set_params(adapt_steps=None)."
    )


def padded(
    codes: np.ndarray,
    n_tasks: int,
    beside: np.ndarray | None = None,
    most_rows: int = PADDED_ROWS,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tasks of similar size together: their positions, rows (n, most), and which are real.

    `beside` are numbers of other rows of the tasks, which are padded by the caller. At most
    `most_rows` come at a time, or one task.
    """
    sizes = np.bincount(codes, minlength=n_tasks)
    order = np.argsort(codes, kind="stable")
    first = np.cumsum(sizes) - sizes
    larger = sizes if beside is None else np.maximum(sizes, beside)
    by_size = np.argsort(larger, kind="stable")
    stop = n_tasks
    while stop:  # a task with many rows takes few others along, as all are padded to its size
        most = int(larger[by_size[stop - 1]])
        start = max(stop - min(TASKS_AT_A_TIME, max(most_rows // max(most, 1), 1)), 0)
        tasks = by_size[start:stop]
        stop = start
        number = np.arange(sizes[tasks].max())
        present = number < sizes[tasks][:, None]
        place = np.zeros(present.shape, dtype=np.intp)
        place[present] = order[(first[tasks][:, None] + number)[present]]
        yield tasks, place, present
