"""Which rows are the support and query sets of the episodes that are drawn from tasks.

All draws are vectorised over the episodes of a batch. The rows of a task are divided into *cells*
from which rows are drawn without replacement: one cell per task for regression, one per class of a
task for classification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import (
    EpisodeBatch,
    Rows,
    centered,
    gather,
    gathered,
    pad_rows,
    to_device,
    with_prepared,
)
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.devices import free_memory

# With n_shots=None the support size varies from episode to episode, so that one model serves
# small and large support sets; see docs/defaults.md for the measurement behind the range.
SUPPORT_RANGE = (5, 20)
# query rows of a task in validation, at most, and of each class of one
VALIDATION_QUERIES, VALIDATION_QUERIES_OF_CLASS = 100, 10
# episodes of a validation, as far as the number of held-out tasks allows
VALIDATION_EPISODES = 100
# held-out tasks that are looked at, at most: more would tell little and take most of a fit
MOST_VALIDATED = 400
# rows of a cell from which on few of them are drawn one after another, not as a part of all in
# random order
LARGE_CELL = 4096
# Tasks are kept on a device if they take at most this share of the memory that it has left, or
# so many bytes where it does not tell
RESIDENT_SHARE, RESIDENT_BYTES = 0.25, 2**28


def _is_constant(counts: np.ndarray) -> bool:
    return bool(counts.min() == counts.max())


def _draw(size: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the first `size` numbers, in random order; one row for each of these.

    What is behind them in a row are numbers below `size`, too.
    """
    large = (size > LARGE_CELL) & (4 * count < size)
    if large.any():
        draw = np.zeros((len(size), int(count.max())), dtype=np.intp)
        few = _draw_few(size[large], count[large], rng)
        keys = rng.random(few.shape)
        keys[few < 0] = 2.0
        few = np.maximum(np.take_along_axis(few, keys.argsort(1), axis=1), 0)
        draw[large, : few.shape[1]] = few
        if not large.all():
            others = _draw(size[~large], count[~large], rng)
            draw[~large, : others.shape[1]] = others
        return draw
    column = np.arange(int(size.max()))
    keys = rng.random((len(size), len(column)))
    if size.min() < len(column):
        keys[column >= size[:, None]] = 2.0  # beyond every draw: sorted to the end
    # no more columns than are drawn, which are real rows
    draw = keys.argsort(1)[:, : int(count.max())]
    return np.minimum(draw, size[:, None] - 1) if size.min() < draw.shape[1] else draw


def _draw_sizes(bounds: tuple[int, int], n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw numbers from the first of the bounds to the second, log-uniformly."""
    low, high = bounds
    return np.exp(rng.uniform(np.log(low), np.log(high + 1), n)).astype(np.intp)


def _draw_few(size: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the first `size` numbers, in the order of Floyd's algorithm; -1 behind them.

    The k-th of them is uniform on the first size - count + k + 1, and the last of these where that
    one is taken.
    """
    chosen = np.full((len(size), int(count.max())), -1)
    for k in range(chosen.shape[1]):
        last = size - count + k
        drawn = rng.integers(0, last + 1)
        taken = (chosen == drawn[:, None]).any(1)
        chosen[:, k] = np.where(taken, last, drawn)
    chosen[np.arange(chosen.shape[1]) >= count[:, None]] = -1
    return chosen


@dataclasses.dataclass(frozen=True)
class Split:
    """Row positions of the support and query sets of several episodes, episode after episode."""

    support: np.ndarray
    n_support: np.ndarray  # (n_episodes,)
    query: np.ndarray
    n_query: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Sets of rows to draw from; those of task j are `starts[j]:starts[j + 1]`."""

    rows: np.ndarray | None  # row positions, cell after cell; None: as they come
    first: np.ndarray  # (n_cells,) where each cell begins in rows
    size: np.ndarray  # (n_cells,)
    label: np.ndarray  # (n_cells,) class of the cell, 0 for regression
    starts: np.ndarray  # (n_tasks + 1,)


def _make_cells(tasks: TaskCollection, labels: np.ndarray | None) -> _Cells:
    if labels is None:
        zeros = np.zeros(tasks.n_tasks, dtype=np.intp)
        starts = np.arange(tasks.n_tasks + 1)
        return _Cells(tasks.order, tasks.indptr[:-1], tasks.sizes, zeros, starts)
    n_labels = int(labels.max()) + 1
    key = tasks.codes.astype(np.intp) * n_labels + labels
    rows = np.argsort(key, kind="stable")
    cell, first, size = np.unique(key[rows], return_index=True, return_counts=True)
    starts = np.searchsorted(cell, np.arange(tasks.n_tasks + 1) * n_labels)
    return _Cells(rows, first, size, cell % n_labels, starts)


def _chosen(tasks: TaskCollection, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chosen rows, task after task, and where each task begins."""
    rows = np.flatnonzero(tasks.by_task(chosen))
    rows = rows if tasks.order is None else tasks.order[rows]
    return rows, np.searchsorted(tasks.codes[rows], np.arange(tasks.n_tasks + 1))


def _all_of(
    which: np.ndarray, rows: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of some tasks, one task after another, and their numbers."""
    first = starts[which]
    counts = starts[which + 1] - first
    shift = first - (np.cumsum(counts) - counts)
    return rows[np.arange(counts.sum()) + np.repeat(shift, counts)], counts


@dataclasses.dataclass(eq=False, repr=False)
class EpisodeSampler:
    """Draws episodes from a task collection."""

    # with numeric targets: floats of shape (n_rows, n_outputs), or class positions (int64)
    tasks: TaskCollection
    _: dataclasses.KW_ONLY
    classification: bool
    # Classes of an episode; the class-to-output assignment is then permuted in every episode.
    # None: labels are shared by the tasks and used as they are.
    n_ways: int | None = None
    # Support rows of an episode (of each class, in classification), or as many as leave a query
    # row. None: regression draws a size for each batch, log-uniformly; classification takes half
    # of the rows. A single row is a query row.
    n_shots: int | None = None
    # query rows of an episode (of each class, in classification); None: all that are left
    n_queries: int | None = None
    # whether to subtract the mean target of the support rows from all targets of an episode
    center_y: bool = False
    # whether no more than half of the rows of a task are support rows, in regression with
    # `n_shots`; else one row at least is left for the query set
    at_most_half: bool = False
    # whether rows are drawn from each class, in classification; else as frequent as they are
    by_class: bool = True
    # sizes of support sets with ``n_shots=None``
    support_range: tuple[int, int] = SUPPORT_RANGE
    # support rows of each class, drawn log-uniformly for each batch, in place of `n_shots`; at
    # most half of the rows of a class
    shots_range: tuple[int, int] | None = None
    # whether batches keep the positions of their rows
    keep_index: bool = False
    # whether query rows that are drawn by class count as if they were as frequent as in their
    # task, where rows have weights
    as_they_come: bool = False

    def __post_init__(self) -> None:
        tasks = self.tasks
        self.by_class = self.by_class and self.classification
        self._resident: tuple[Tensor, Tensor] | None = None  # X and y on a device
        self.n_labels = int(tasks.y.max()) + 1 if self.classification else 0
        if tasks.in_query is None:
            self.cells = _make_cells(tasks, tasks.y if self.by_class else None)
        else:
            self._support, self._query = (
                _chosen(tasks, tasks.in_query == k) for k in (False, True)
            )

    def sample(self, which: np.ndarray, rng: np.random.Generator) -> EpisodeBatch:
        """Draw one episode from each of the tasks at positions `which` (repeats are allowed)."""
        return self.sample_batches(np.asarray(which)[None], rng)[0]

    def sample_batches(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        """Draw several batches at once; `which` is of shape (n_batches, n_episodes)."""
        batches = self._draw(self.tasks.X, self.tasks.y, which, rng)
        return [centered(batch) for batch in batches] if self.center_y else batches

    def sample_on(
        self,
        device: torch.device,
        which: np.ndarray,
        rng: np.random.Generator,
        prepare: Callable[[EpisodeBatch], EpisodeBatch] | None = None,
    ) -> list[EpisodeBatch]:
        """Draw as `sample_batches` does, and gather the rows on a device.

        The tasks are kept there; what moves is the positions of the rows of all batches, at once.
        Tasks that take too much of the device's memory stay where they are, and rows move.

        Parameters
        ----------
        device : torch.device
        which, rng
            As for `sample_batches`.
        prepare : callable EpisodeBatch -> EpisodeBatch, default=None
            Makes `EpisodeBatch.prepared`.
        """
        tasks, resident = self.tasks, self._resident
        if resident is None or resident[0].device != device:
            size, free = tasks.X.nbytes + tasks.y.nbytes, free_memory(device)
            if size > (RESIDENT_BYTES if free is None else RESIDENT_SHARE * free):
                return to_device(with_prepared(self.sample_batches(which, rng), prepare), device)
            X, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in (tasks.X, tasks.y))
            self._resident = resident = X.to(device), y.to(device)
        number = np.arange(len(tasks.X))
        places = with_prepared(self._draw(number, number, which, rng), prepare)
        batches = gathered(to_device(places, device), *resident, labelled=self.n_ways is not None)
        return [centered(batch) for batch in batches] if self.center_y else batches

    def _draw(
        self, X: np.ndarray, y: np.ndarray, which: np.ndarray, rng: np.random.Generator
    ) -> list[EpisodeBatch]:
        """Draw batches of what `X` and `y` have for each row."""
        draw = self.split(which.ravel(), rng, len(which))
        labels = [None, None] if self.n_ways is None else self._permuted_labels(draw, rng)
        weight = self.tasks.weight
        of_query = weight if weight is None else weight[draw.query] * self._frequency(which, draw)
        support = self._gather(
            X,
            y,
            draw.support,
            draw.n_support,
            labels[0],
            len(which),
            weight if weight is None else weight[draw.support],
        )
        query = self._gather(
            X, y, draw.query, draw.n_query, labels[1], len(which), of_query, normalise=False
        )
        return [EpisodeBatch(*sets) for sets in zip(support, query, strict=True)]

    def _frequency(self, which: np.ndarray, draw: Split) -> np.ndarray | float:
        """How often the class of each query row is in its task, over how often it was drawn."""
        if not self.as_they_come or not self.by_class or self.tasks.in_query is not None:
            return 1.0
        in_task = np.bincount(
            self.tasks.codes.astype(np.intp) * self.n_labels + self.tasks.y,
            minlength=self.tasks.n_tasks * self.n_labels,
        ).reshape(-1, self.n_labels)
        episode = np.repeat(np.arange(len(draw.n_query)), draw.n_query)
        labels = self.tasks.y[draw.query]
        drawn = np.zeros((len(draw.n_query), self.n_labels))
        np.add.at(drawn, (episode, labels), 1)
        could = np.where(drawn > 0, in_task[which.ravel()], 0)
        factor = could / np.maximum(drawn, 1) * (draw.n_query / could.sum(1))[:, None]
        return factor[episode, labels]

    def bytes_of_episode(self) -> int:
        """Rough memory that drawing an episode takes, at most."""
        if self.tasks.in_query is not None:
            n_rows = int(self.tasks.sizes.max())
        else:
            n_cells = int(np.diff(self.cells.starts).max())
            n_cells = n_cells if self.n_ways is None else min(n_cells, self.n_ways)
            most = int(self.cells.size.max())
            if self.n_queries is not None:
                most = min(most, LARGE_CELL)
            n_rows = n_cells * most
        row = self.tasks.X[:1].nbytes + self.tasks.y[:1].nbytes
        return n_rows * (row + 24)  # and the random keys and positions

    def split(self, which: np.ndarray, rng: np.random.Generator, n_batches: int = 1) -> Split:
        """Draw the rows of one episode from each of the tasks at positions `which`.

        They belong to `n_batches` batches of equal length.
        """
        which = np.asarray(which)
        if self.tasks.in_query is not None:
            return Split(*_all_of(which, *self._support), *_all_of(which, *self._query))
        cells, episode = self._choose_cells(which, rng)
        size = self.cells.size[cells]
        n_support, n_query = self._sizes(size, episode, rng, n_batches)
        draw = _draw(size, n_support + n_query, rng)
        column = np.arange(draw.shape[1])
        rows = self.cells.first[cells][:, None] + draw
        rows = rows if self.cells.rows is None else self.cells.rows.take(rows)
        if _is_constant(n_support) and _is_constant(n_query) and len(cells) == len(which):
            k = n_support[0]
            return Split(rows[:, :k].ravel(), n_support, rows[:, k:].ravel(), n_query)
        in_support = column < n_support[:, None]
        in_query = (column >= n_support[:, None]) & (column < (n_support + n_query)[:, None])
        total_support, total_query = (
            np.bincount(episode, weights=count, minlength=len(which)).astype(np.intp)
            for count in (n_support, n_query)
        )
        return Split(rows[in_support], total_support, rows[in_query], total_query)

    def _choose_cells(
        self, which: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cells that each episode draws from, and the episode of each of these cells."""
        starts = self.cells.starts
        if self.n_ways is None:
            counts = starts[which + 1] - starts[which]
            episode = np.repeat(np.arange(len(which)), counts)
            offset = np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts)
            return starts[which][episode] + offset, episode
        n_cells = starts[which + 1] - starts[which]
        n_chosen = np.minimum(n_cells, self.n_ways)
        chosen = _draw_few(n_cells, n_chosen, rng)
        real = np.arange(chosen.shape[1]) < n_chosen[:, None]
        return (starts[which][:, None] + chosen)[real], np.nonzero(real)[0]

    def _sizes(
        self, size: np.ndarray, episode: np.ndarray, rng: np.random.Generator, n_batches: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.by_class:
            n_support = self._sizes_of_classes(size, episode, rng, n_batches)
        elif self.n_shots is not None:
            n_support = np.minimum(self.n_shots, size // 2 if self.at_most_half else size - 1)
        else:
            drawn = _draw_sizes(self.support_range, n_batches, rng)
            # a cell is an episode here; a single row is a query row
            n_support = np.minimum(drawn.repeat(len(size) // n_batches), size // 2)
        left = size - n_support
        return n_support, left if self.n_queries is None else np.minimum(left, self.n_queries)

    def _sizes_of_classes(
        self, size: np.ndarray, episode: np.ndarray, rng: np.random.Generator, n_batches: int
    ) -> np.ndarray:
        """Support rows of each cell, a class of an episode; every episode keeps a query row."""
        if self.shots_range is not None:
            drawn = _draw_sizes(self.shots_range, n_batches, rng)
            drawn = drawn.repeat((episode[-1] + 1) // n_batches)[episode]
            n_support, few = np.minimum(drawn, size // 2), size < 2
        elif self.n_shots is None:
            n_support, few = np.minimum(size // 2, self.support_range[1]), size < 2
        else:
            n_support, few = np.full(len(size), self.n_shots), size <= self.n_shots
            if not few.any():
                return n_support
        # the last row of a small class goes to either set, so that neither set lacks rows
        n_support = np.where(few, size - 1 + rng.integers(0, 2, len(size)), n_support)
        total = np.bincount(episode, weights=n_support)
        rows = np.bincount(episode, weights=size)
        first = np.flatnonzero(np.diff(episode, prepend=-1))
        n_support[first[(total == 0) & (rows > 1)]] = 1
        n_support[first[total == rows]] -= 1
        return n_support

    def _permuted_labels(self, draw: Split, rng: np.random.Generator) -> list[np.ndarray]:
        """Assign outputs to the classes at random in every episode.

        A fixed assignment (sorted labels, say) would leak which class a row belongs to.
        """
        n_episodes, n_labels = len(draw.n_support), self.n_labels
        keys = [
            np.repeat(np.arange(n_episodes), counts) * n_labels + self.tasks.y[rows]
            for rows, counts in ((draw.support, draw.n_support), (draw.query, draw.n_query))
        ]
        present, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        episode = present // n_labels
        rank = np.arange(len(present)) - np.searchsorted(episode, np.arange(n_episodes))[episode]
        assert self.n_ways is not None
        slots = rng.random((n_episodes, self.n_ways)).argsort(1)[episode, rank]
        labels = slots.astype(np.int64)[inverse.reshape(-1)]
        return [labels[: len(draw.support)], labels[len(draw.support) :]]

    def _gather(
        self,
        X: np.ndarray,
        y: np.ndarray,
        rows: np.ndarray,
        counts: np.ndarray,
        labels: np.ndarray | None,
        n_batches: int,
        weight: np.ndarray | None,
        normalise: bool = True,
    ) -> list[Rows]:
        dtype = self.tasks.X.dtype
        names: np.ndarray | bool = self.keep_index
        if labels is not None:
            names = rows if self.keep_index else False
            X, y, rows = gather(X, rows), labels, np.arange(len(rows))
        if _is_constant(counts) and counts[0]:  # nothing to pad: gathered at once, then cut
            whole = pad_rows(
                X, y, rows, counts, weight, dtype=dtype, names=names, normalise=normalise
            )
            length = len(counts) // n_batches
            parts = whole.X.split(length)
            targets = parts if whole.y is whole.X else whole.y.split(length)
            weights, index = (
                [None] * n_batches if part is None else part.split(length)
                for part in (whole.weight, whole.index)
            )
            return [
                Rows(x, y, w, index=place)
                for x, y, w, place in zip(parts, targets, weights, index, strict=True)
            ]
        ends = np.cumsum(counts.reshape(n_batches, -1).sum(1))[:-1]
        weights = [None] * n_batches if weight is None else np.split(weight, ends)
        return [
            pad_rows(X, y, *part, dtype=dtype, names=names, normalise=normalise)
            for part in zip(np.split(rows, ends), np.split(counts, n_batches), weights, strict=True)
        ]


def evenly(n: int, most: int) -> np.ndarray:
    """Positions of at most so many of n, at equal distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.intp))


def draw_fixed(sampler: EpisodeSampler, seed: int) -> list[EpisodeBatch]:
    """Draw validation episodes: every task as often as any, about `VALIDATION_EPISODES` in all."""
    n_tasks = sampler.tasks.n_tasks
    rng = np.random.default_rng((seed, 3))
    which = np.tile(np.arange(n_tasks), max(VALIDATION_EPISODES // n_tasks, 1))
    n_batches = -(-len(which) // VALIDATION_EPISODES)
    return [sampler.sample(part, rng) for part in np.array_split(which, n_batches)]
