"""Task collections: validated rows and the task that each belongs to.

A *task* is a small data set of its own (a patient, a shop, an alphabet). This module knows nothing
of torch, nor do the spellings.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Hashable

import numpy as np

from sklearn_maml.data.ids import keys_of

# rows that may speak for a task where all tasks are pooled, in units of those of the median task
LEVEL = 20
AT_A_TIME = 65_536  # rows


def in_blocks(n_rows: int) -> list[slice]:
    """Cut rows into blocks, copies of which are small; there is one at least."""
    return [slice(k, k + AT_A_TIME) for k in range(0, max(n_rows, 1), AT_A_TIME)]


@dataclasses.dataclass(frozen=True)
class TaskCollection:
    """Validated rows and the task of each."""

    X: np.ndarray  # (n_rows, *feature_shape), float32 or float64
    y: np.ndarray  # (n_rows,) or (n_rows, n_outputs)
    codes: np.ndarray  # (n_rows,) position in `ids` of each row's task
    ids: np.ndarray  # (n_tasks,) in sorted order, or positions of tasks that were not named
    # (n_rows,) which are query rows of tasks given as (X_support, y_support, X_query, y_query)
    in_query: np.ndarray | None
    spelling: str  # how the caller gave the tasks: "groups", "column", "list", "stack" or "single"
    weight: np.ndarray | None = None  # (n_rows,) in meta-training, positive; None: all are equal

    def __post_init__(self) -> None:
        counts = np.bincount(self.codes, minlength=len(self.ids))
        object.__setattr__(self, "sizes", counts)
        in_turn = bool((self.codes[1:] >= self.codes[:-1]).all())
        order = None if in_turn else np.argsort(self.codes, kind="stable")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "indptr", np.concatenate([[0], np.cumsum(counts)]))

    # set in __post_init__; rows of task j are order[indptr[j]:indptr[j + 1]], or these places
    # themselves where rows come task after task: order is None then, which saves its memory
    sizes: np.ndarray = dataclasses.field(init=False)
    order: np.ndarray | None = dataclasses.field(init=False)
    indptr: np.ndarray = dataclasses.field(init=False)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.ids)

    @property
    def named(self) -> bool:
        """Whether the ids identify tasks across calls (they do not for lists and 3-D arrays)."""
        return self.spelling in ("groups", "column")

    def rows(self, task: int) -> np.ndarray:
        """Row positions of one task, in the order the caller gave them."""
        first, last = self.indptr[task], self.indptr[task + 1]
        return np.arange(first, last) if self.order is None else self.order[first:last]

    def by_task(self, values: np.ndarray) -> np.ndarray:
        """Values of the rows, task after task; the same array where rows come like this."""
        return values if self.order is None else values[self.order]

    def having(self, **values: np.ndarray | None) -> TaskCollection:
        """Copy with another `X`, `y` or `weight` of the same rows, which are not sorted again."""
        made = copy.copy(self)
        vars(made).update(values)
        return made

    def at(self, kept: np.ndarray, **changes: np.ndarray) -> TaskCollection:
        """Copy with some rows alone; the tasks stay, or are as `changes` says."""
        parts = {
            name: getattr(self, name)[kept]
            for name in ("X", "y", "codes", "in_query", "weight")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **{**parts, **changes})

    def select(self, tasks: np.ndarray) -> TaskCollection:
        """Sub-collection of the tasks at these positions."""
        position, chosen = np.empty(self.n_tasks, np.intp), np.zeros(self.n_tasks, dtype=bool)
        position[tasks], chosen[tasks] = np.arange(len(tasks)), True
        keep = np.flatnonzero(chosen[self.codes])
        return self.at(keep, codes=position[self.codes[keep]], ids=self.ids[tasks])

    def leveled(self, most_tasks: int | None = None) -> np.ndarray | None:
        """Return positions of rows among which no task drowns the others; None: all.

        Of a task with very many more rows than others these are some, evenly spread: statistics of
        the rows would be those of this task. With `most_tasks` they are of no more tasks than that,
        evenly spread, too.
        """
        most = int(LEVEL * max(np.median(self.sizes), 1))
        if most_tasks is not None and self.n_tasks > most_tasks:
            chosen = np.zeros(self.n_tasks, dtype=bool)
            chosen[np.linspace(0, self.n_tasks - 1, most_tasks).astype(np.intp)] = True
            rows = self.leveled()
            if rows is None:
                return np.flatnonzero(chosen[self.codes])
            return rows[chosen[self.codes[rows]]]
        if self.sizes.max() <= most:
            return None
        number = np.arange(len(self.codes)) - np.repeat(self.indptr[:-1], self.sizes)
        kept = number % -(-self.sizes // most).repeat(self.sizes) == 0
        return np.flatnonzero(kept) if self.order is None else np.sort(self.order[kept])

    def take_rows(self, kept: np.ndarray, least: int = 1) -> TaskCollection:
        """Sub-collection of some rows, without the tasks that have fewer than `least` of them."""
        sizes = np.bincount(self.codes[kept], minlength=self.n_tasks)
        return self.at(kept).select(np.flatnonzero(sizes >= least))

    def balanced(self) -> TaskCollection:
        """Copy whose weights are 1 in the mean over tasks of their means over rows."""
        if self.weight is None:
            return self
        means = np.bincount(self.codes, self.weight, self.n_tasks) / np.maximum(self.sizes, 1)
        return self.having(weight=self.weight / means[self.sizes > 0].mean())

    def fingerprints(self) -> dict[Hashable, int]:
        """Checksum of the rows of each named task by the key of its id.

        It tells its own rows from new rows of it.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite sum is a mark as well
            marks = np.empty(len(self.X), self.X.dtype)
            for part in in_blocks(len(self.X)):
                # of rows in C order, whatever that of X: sums depend on it
                x = np.ascontiguousarray(self.X[part])
                marks[part] = x.reshape(len(x), -1).sum(1)
        marks = self.by_task(marks)
        return {
            key: zlib.crc32(np.sort(marks[self.indptr[j] : self.indptr[j + 1]]).tobytes())
            for j, key in enumerate(keys_of(self.ids))
        }
