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

# Tasks, -1 for one that has another by now, and their posteriors. The variance of predictions needs
# these, and finding them takes longer than predicting.
Kept = Sequence[tuple[np.ndarray, Posterior]]

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
    own = (array if array.flags.writeable else array.copy() for array in arrays)
    return [torch.from_numpy(array).to(head.factor.device) for array in own]


def _most_rows(head: GaussianHead) -> int:
    return CACHED_ROWS if head.factor.device.type == "cpu" else DEVICE_ROWS


def sums_over(run: HeadFunctions, support: Support) -> dict[int, Sums]:
    """Sum over the rows of tasks, some at a time; those without rows have no sums."""
    head, most = run.head, _most_rows(run.head)
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


def _taken(posterior: Any, tasks: np.ndarray) -> Any:
    """Posteriors of some of the tasks."""
    if len(tasks) == posterior.shift.shape[1] and (tasks == np.arange(len(tasks))).all():
        return posterior
    index = torch.from_numpy(tasks).to(posterior.shift.device)
    parts = {n: t if t is None else t[:, index] for n, t in vars(posterior).items()}
    return replace(posterior, **parts)


class Given:
    """Posteriors of tasks, of their rows or of sums over them: some tasks at a time.

    Parameters
    ----------
    run : HeadFunctions
    support : Support
    sums : dict of int to Sums
        Of the tasks without rows in `support`. Of a task with more rows than fit into the caches,
        sums are made in pieces.
    asked : int ndarray of shape (n_asked,)
        Tasks, of which one may come repeatedly.
    """

    def __init__(
        self, run: HeadFunctions, support: Support, sums: dict[int, Sums], asked: np.ndarray
    ) -> None:
        tasks, position = np.unique(asked, return_inverse=True)
        self.run, self.head = run, run.head
        self.support = support.of(tasks)
        self.sums = {j: sums[t] for j, t in enumerate(tasks.tolist()) if t in sums}
        self.asked = asked
        self.position = position.reshape(-1)
        self.sizes = self.support.sizes
        self.order = np.argsort(self.support.codes, kind="stable")
        self.first = np.cumsum(self.sizes) - self.sizes
        self.root = np.sqrt(self.support.evidence())
        self.by_sums = run.has_sums & (self.sizes > _most_rows(self.head))
        self.by_sums[list(self.sums)] = True

    def batches(
        self, beside: np.ndarray | None = None, among: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Positions in `asked`, few enough at a time.

        `beside` (n_asked,) has numbers of other rows of the tasks, which the caller pads; `among`
        (n_asked,) says which positions to go through.
        """
        n_rows = self.sizes[self.position]
        larger = n_rows if beside is None else np.maximum(n_rows, beside)
        by_sums = self.by_sums[self.position]
        among = np.ones(len(by_sums), dtype=bool) if among is None else among
        for own, most_tasks in ((by_sums, TASKS_OF_SUMS), (~by_sums, TASKS_AT_A_TIME)):
            place = np.flatnonzero(own & among)
            for part in alike(larger[place], most_tasks, _most_rows(self.head)):
                yield place[part]

    def posteriors(self, kept: Kept, beside: np.ndarray) -> Iterator[tuple[np.ndarray, Posterior]]:
        """Positions in `asked`, few enough at a time, and their posteriors; see `batches`.

        Those that were `kept` are not found anew.
        """
        left = np.ones(len(self.asked), dtype=bool)
        for tasks, posterior in kept:
            place = np.full(max(tasks.max(), self.asked.max(initial=0)) + 2, -1)
            place[tasks] = np.arange(len(tasks))
            place[-1] = -1
            which = place[self.asked]
            some = np.flatnonzero(which >= 0)
            left[some] = False
            for part in alike(beside[some], len(some), _most_rows(self.head)):
                yield some[part], _taken(posterior, which[some[part]])
        for some in self.batches(beside, left):
            yield some, self.posterior(some)

    def posterior(self, some: np.ndarray) -> Posterior:
        """Condition on the support sets of these positions in `asked`."""
        tasks = self.position[some]
        if self.by_sums[tasks].any():
            return self.run.posterior(self._information(tasks))
        sizes = self.sizes[tasks][:, None]
        number = np.arange(sizes.max())
        real = number < sizes
        at = self.order[np.where(real, self.first[tasks][:, None] + number, 0)]
        y = self.head.likelihood.encoded(self.support.y[at], self.head.n_outputs)
        rows = tensors(self.head, self.support.X[at], y, real * self.root[at])
        return self.run.condition(*rows)

    def _information(self, tasks: np.ndarray) -> Information:
        """Put sums of several tasks side by side, by weights whose sum is the number of rows."""
        head, p = self.head, self.head.n_columns
        distinct, place = np.unique(tasks, return_inverse=True)
        of_rows = sums_over(self.run, self.support.of(distinct))
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
