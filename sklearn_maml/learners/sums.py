"""Support sets as sums over their rows, which take no more room however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.learners.base import TASKS_AT_A_TIME, Support, alike, padded
from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions
from sklearn_maml.learners.posteriors import Information, Posterior

# Rows of some tasks at a time, padding included: their columns fit into the caches of a CPU. On a
# device, and of tasks whose sums are at hand, so many.
CACHED_ROWS, DEVICE_ROWS, TASKS_OF_SUMS = 2048, 65536, 16


@dataclass(frozen=True)
class Sums:
    """What the rows of one task say to the members of a head; see `Information`.

    Attributes
    ----------
    gram : ndarray of shape (n_members, n_columns * (n_columns + 1) / 2)
        Lower triangle.
    cross : ndarray of shape (n_members, n_columns, n_outputs)
    square : ndarray of shape (n_members, n_outputs)
    weight : ndarray of shape ()
        Sum of the weights of the rows, by which the other sums are weighted.
    n_rows : ndarray of shape ()
        See `Support.counts`.
    """

    gram: np.ndarray
    cross: np.ndarray
    square: np.ndarray
    weight: np.ndarray
    n_rows: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Sums(*(np.asarray(one + more) for one, more in pairs))

    @staticmethod
    def state(sums: dict[int, Sums]) -> dict[str, np.ndarray]:
        """Return the sums of tasks as arrays."""
        tasks = sorted(sums)
        names = Sums.__dataclass_fields__ if tasks else ()
        arrays = {name: np.stack([getattr(sums[t], name) for t in tasks]) for name in names}
        return {"tasks": np.array(tasks, dtype=np.intp), **arrays}

    @staticmethod
    def from_state(state: dict[str, np.ndarray]) -> dict[int, Sums]:
        """Make what `state` described."""
        parts = [state[name] for name in Sums.__dataclass_fields__ if name in state]
        return {
            int(task): Sums(*(np.asarray(part[j]) for part in parts))
            for j, task in enumerate(state["tasks"])
        }


def room_of_sums(head: GaussianHead) -> int:
    """Bytes of the sums of a task, about."""
    return 4 * head.n_members * head.n_columns * (head.n_columns + 1)


def tensors(head: GaussianHead, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays on the device of a head."""
    # torch takes no negative strides and warns of what is read-only
    own = (array if array.flags.carray else array.copy() for array in arrays)
    return [torch.from_numpy(array).to(head.factor.device) for array in own]


def most_rows(head: GaussianHead) -> int:
    """Rows to take at a time, padding included."""
    return CACHED_ROWS if head.factor.device.type == "cpu" else DEVICE_ROWS


def sums_over(run: HeadFunctions, support: Support) -> dict[int, Sums]:
    """Sum over the rows of tasks, some at a time; those without rows have no sums."""
    head, most = run.head, most_rows(run.head)
    root = np.sqrt(support.weights().astype(np.float64))
    n_rows = np.bincount(support.codes, support.counts(), support.n_tasks)
    lower = np.tril_indices(head.n_columns)
    found = {}
    for tasks, place, present in padded(support.codes, support.n_tasks, most_rows=most):
        for some in np.array_split(np.arange(len(tasks)), -(-len(tasks) // TASKS_OF_SUMS)):
            total: Information | None = None
            for start in range(0, place.shape[1], most):
                at, real = (array[some, start : start + most] for array in (place, present))
                y = head.likelihood.encoded(support.y[at], head.n_outputs)
                rows = (support.X[at], y, real * root[at])
                part = Information.over(*run.weighted(*tensors(head, *rows)))
                total = part if total is None else total + part
            if total is None:
                continue
            gram, cross, square, weights = (t.cpu().numpy() for t in vars(total).values())
            gram = gram[:, :, *lower]
            for j in np.flatnonzero(present[some].any(1)):
                task = int(tasks[some[j]])
                found[task] = Sums(
                    gram[:, j], cross[:, j], square[:, j], weights[0, j, 0], n_rows[task]
                )
    return found


@dataclass(frozen=True)
class Kept:
    """Posteriors of some of the tasks, for variances: finding one takes longer than predicting.

    Attributes
    ----------
    posteriors : tuple of (Posterior or None)
        Of some tasks each; None where all of these have another one by now.
    part, place : int ndarrays of shape (n_tasks,)
        Which of them is that of a task, and the place of the task in it; -1: none.
    later : int
        Bytes of those that were found when they were asked for.
    """

    posteriors: tuple[Any, ...]
    part: np.ndarray
    place: np.ndarray
    later: int = 0

    @classmethod
    def of(cls, n_tasks: int, found: Sequence[tuple[np.ndarray, Any]] = ()) -> Kept:
        """Keep posteriors of these tasks."""
        part, place = np.full((2, n_tasks), -1)
        for k, (tasks, _) in enumerate(found):
            part[tasks], place[tasks] = k, np.arange(len(tasks))
        return cls(tuple(posterior for _, posterior in found), part, place)

    def __len__(self) -> int:
        return int((self.part >= 0).sum())

    def and_later(self, tasks: np.ndarray, posterior: Any, n_bytes: int) -> Kept:
        """Keep that of these tasks, too."""
        part, place = self.part.copy(), self.place.copy()
        part[tasks], place[tasks] = len(self.posteriors), np.arange(len(tasks))
        return Kept((*self.posteriors, posterior), part, place, self.later + n_bytes)

    def without(self, tasks: np.ndarray, n_tasks: int) -> Kept:
        """Keep those of other tasks; there are `n_tasks` now."""
        part, place = np.full((2, n_tasks), -1)
        part[: len(self.part)], place[: len(self.part)] = self.part, self.place
        part[tasks] = -1
        left = set(part.tolist())
        posteriors = tuple(p if k in left else None for k, p in enumerate(self.posteriors))
        return Kept(posteriors, part, place, self.later)


@dataclass(frozen=True)
class RowsByTask:
    """Support rows, and where those of a task are.

    Attributes
    ----------
    support : Support
    order : int ndarray of shape (n_rows,)
        Rows of the first task, then those of the second, ...
    first, sizes : int ndarrays of shape (n_tasks,)
        Where those of each task begin in `order`, and how many they are.
    root : ndarray of shape (n_rows,)
        Square roots of what rows count, see `Support.evidence`.
    """

    support: Support
    order: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, support: Support) -> RowsByTask:
        """Find them."""
        sizes = support.sizes
        order = np.argsort(support.codes, kind="stable")
        return cls(support, order, np.cumsum(sizes) - sizes, sizes, np.sqrt(support.evidence()))

    def padded(self, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n, most) of several tasks, and which of them are real."""
        sizes = self.sizes[tasks][:, None]
        number = np.arange(sizes.max(initial=0))
        real = number < sizes
        if not len(self.order):
            return np.zeros(real.shape, dtype=np.intp), real
        return self.order[np.where(real, self.first[tasks][:, None] + number, 0)], real

    def those_of(self, tasks: np.ndarray) -> Support:
        """Rows of some tasks, which are numbered by their places in `tasks`."""
        at, real = self.padded(tasks)
        codes = np.repeat(np.arange(len(tasks)), self.sizes[tasks])
        return replace(self.support.rows_at(at[real]), codes=codes, n_tasks=len(tasks))


class Given:
    """Posteriors of tasks, of their rows or of sums over them: some tasks at a time.

    What it costs does not depend on how many other tasks there are.

    Parameters
    ----------
    run : HeadFunctions
    rows : RowsByTask
    sums : dict of int to Sums
        Of the tasks without rows in `rows`. Of a task with more rows than fit into the caches,
        sums are made in pieces.
    asked : int ndarray of shape (n_asked,)
        Tasks, of which one may come repeatedly.
    """

    def __init__(
        self, run: HeadFunctions, rows: RowsByTask, sums: dict[int, Sums], asked: np.ndarray
    ) -> None:
        self.run, self.head = run, run.head
        self.rows, self.sums, self.asked = rows, sums, asked
        self.sizes = rows.sizes[asked]
        self.by_sums = run.has_sums & (self.sizes > most_rows(self.head))
        if sums:
            self.by_sums |= np.fromiter((t in sums for t in asked.tolist()), bool, len(asked))

    def batches(self, among: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Positions in `asked`, or those where `among` (n_asked,) is true, few enough at a time."""
        among = np.ones(len(self.asked), dtype=bool) if among is None else among
        for own, most_tasks in ((self.by_sums, TASKS_OF_SUMS), (~self.by_sums, TASKS_AT_A_TIME)):
            place = np.flatnonzero(own & among)
            most = self.run.kernel_batches * most_rows(self.head)
            for part in alike(self.sizes[place], most_tasks, most):
                yield place[part]

    def posteriors(self, kept: Kept) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        """Positions in `asked`, the places of these tasks in a posterior, and it.

        Those that were `kept` are not found anew.
        """
        part = kept.part[self.asked]
        for k in np.unique(part[part >= 0]).tolist():
            some = np.flatnonzero(part == k)
            yield some, kept.place[self.asked[some]], kept.posteriors[k]
        for some in self.batches(part < 0):
            yield some, np.arange(len(some)), self.posterior(some)

    def posterior(self, some: np.ndarray, *, doubt: bool = True) -> Posterior:
        """Condition on the support sets of these positions in `asked`; see `condition`."""
        tasks, support = self.asked[some], self.rows.support
        if self.by_sums[some].any():
            return self.run.posterior(self._information(tasks), doubt=doubt)
        at, real = self.rows.padded(tasks)
        y = self.head.likelihood.encoded(support.y[at], self.head.n_outputs)
        rows = tensors(self.head, support.X[at], y, real * self.rows.root[at])
        return self.run.condition(*rows, doubt=doubt)

    def _information(self, tasks: np.ndarray) -> Information:
        """Put sums of several tasks side by side, by weights whose sum is the number of rows."""
        head, p = self.head, self.head.n_columns
        distinct, place = np.unique(tasks, return_inverse=True)
        of_rows = sums_over(self.run, self.rows.those_of(distinct))
        shape = (head.n_members, len(tasks), p, p)
        gram, cross = np.zeros(shape), np.zeros((*shape[:3], head.n_outputs))
        square = np.zeros((*shape[:2], head.n_outputs))
        n_rows = np.zeros((1, len(tasks), 1))
        lower = np.tril_indices(p)
        for k, (task, j) in enumerate(zip(tasks.tolist(), place.reshape(-1).tolist(), strict=True)):
            part = self.sums.get(task, of_rows.get(j))
            if part is None:  # no rows
                continue
            scale = part.n_rows / part.weight
            gram[:, k, lower[0], lower[1]] = gram[:, k, lower[1], lower[0]] = scale * part.gram
            cross[:, k], square[:, k] = scale * part.cross, scale * part.square
            n_rows[0, k] = part.n_rows
        return Information(*tensors(head, gram, cross, square, n_rows))
