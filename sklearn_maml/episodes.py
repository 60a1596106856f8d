"""Episodes: the support and query sets that meta-training and scoring draw from tasks.

All draws are vectorised over the episodes of a batch. The rows of a task are divided into *cells*
from which rows are drawn without replacement: one cell per task for regression, one per class of a
task for classification.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.devices import free_memory, is_host
from sklearn_maml.tasks import TaskCollection

__all__ = [
    "EpisodeBatch",
    "EpisodeSampler",
    "Rows",
    "Split",
    "check_splittable",
    "draw_fixed",
    "hold_out",
    "joined_rows",
    "large_enough",
    "name_of",
    "pad_rows",
    "pick",
    "put_back",
    "to_device",
]

# With n_shots=None the support size varies from episode to episode, so that one model serves
# small and large support sets; see docs/defaults.md for the measurement behind the range.
SUPPORT_RANGE = (5, 20)
# query rows of a task in validation, at most, and of each class of one
VALIDATION_QUERIES, VALIDATION_QUERIES_OF_CLASS = 100, 10
# episodes of a validation, as far as the number of held-out tasks allows
VALIDATION_EPISODES = 100
# Tasks are kept on a device if they take at most this share of the memory that it has left, or
# so many bytes where it does not tell
RESIDENT_SHARE, RESIDENT_BYTES = 0.25, 2**28


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a batch of tasks, padded to the longest.

    Attributes
    ----------
    X : Tensor of shape (n_tasks, n_rows, *feature_shape)
    y : Tensor of shape (n_tasks, n_rows, n_outputs) or int64 (n_tasks, n_rows)
    weight : Tensor of shape (n_tasks, n_rows) or None
        Weights that sum to one in each task, 0 for padding; None for equal weights.
    lengths : int ndarray of shape (n_tasks,) or None
        Number of real rows of each task; None where no task is padded.
    places : int64 Tensor of shape (n_real_rows,) or None
        Where the real rows are among all rows, task after task, so that an accelerator need not be
        waited for; made by a move to one where tasks are padded.
    index : int64 Tensor of shape (n_tasks, n_rows) or None
        Positions of the rows in the collection, where somebody asked for them.
    """

    X: Tensor
    y: Tensor
    weight: Tensor | None = None
    lengths: np.ndarray | None = None
    places: Tensor | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.X.shape[0]

    def task(self, j: int) -> Rows:
        """Rows of one task without padding and without the task axis."""
        stop = None if self.lengths is None else int(self.lengths[j])
        weight = None if self.weight is None else self.weight[j, :stop]
        return Rows(self.X[j, :stop], self.y[j, :stop], weight)

    def take(self, tasks: np.ndarray) -> Rows:
        """Rows of some of the tasks, padded to the longest of them."""
        if self.lengths is None:
            weight, index = (
                None if t is None else pick(t, tasks) for t in (self.weight, self.index)
            )
            return Rows(pick(self.X, tasks), pick(self.y, tasks), weight, index=index)
        lengths = self.lengths[tasks]
        stop = int(lengths.max())
        assert self.weight is not None
        ragged = bool((lengths < stop).any())
        return Rows(
            pick(self.X, tasks, stop),
            pick(self.y, tasks, stop),
            pick(self.weight, tasks, stop),
            lengths if ragged else None,
            index=None if self.index is None else pick(self.index, tasks, stop),
        )

    def real(self, values: Tensor) -> Tensor:
        """Drop the padding of `values` (n_tasks, n_rows, ...) and pool the rows of the tasks."""
        if self.lengths is None:
            return values.flatten(0, 1)
        if self.places is not None and self.places.device == values.device:
            return values.flatten(0, 1).index_select(0, self.places)
        length = torch.as_tensor(self.lengths, device=values.device)
        mask = torch.arange(values.shape[1], device=values.device) < length[:, None]
        return values[mask]

    def minibatch(self, k: int, axis: int) -> Rows:
        """Rows that inner step `k` sees, of what `joined_rows` made.

        `axis` is that of the minibatches, which are taken in turns.
        """
        place = k % self.X.shape[axis]
        weight = None if self.weight is None else self.weight.select(axis, place)
        return Rows(self.X.select(axis, place), self.y.select(axis, place), weight, self.lengths)

    def to(self, device: torch.device) -> Rows:
        """Move to a device."""
        if self.X.device == device:
            return self
        return to_device([EpisodeBatch(self, self)], device)[0].support


@dataclasses.dataclass(frozen=True)
class EpisodeBatch:
    """A meta-batch: the support and query sets of its tasks. Its length is the number of tasks.

    `prepared` is what `MetaGradient.episodes` makes of it, where that has been done already.
    `of_steps` (n_tasks,) tells which tasks gradient steps may learn from; None: all. `n_given` is
    the number of support rows that a Gaussian head is conditioned on in meta-training; None: all.
    """

    support: Rows
    query: Rows
    prepared: EpisodeBatch | None = None
    of_steps: np.ndarray | None = None
    n_given: int | None = None

    def __len__(self) -> int:
        return len(self.support)

    def to(self, device: torch.device) -> EpisodeBatch:
        """Move to a device."""
        return to_device([self], device)[0]

    def take(self, tasks: np.ndarray) -> EpisodeBatch:
        """Take some of the tasks."""
        of_steps = None if self.of_steps is None else self.of_steps[tasks]
        return EpisodeBatch(
            self.support.take(tasks), self.query.take(tasks), None, of_steps, self.n_given
        )


def pick(values: Tensor, which: np.ndarray, stop: int | None = None) -> Tensor:
    """Return some items of a tensor, and the first `stop` of the parts of each.

    Their positions are not copied to an accelerator, which would wait for them.
    """
    if is_host(values.device):
        index = torch.as_tensor(which)
        return values[index] if stop is None else values[index, :stop]
    if stop is not None:
        values = values[:, :stop]
    if len(which) and (np.diff(which) == 1).all():
        return values[int(which[0]) : int(which[-1]) + 1]
    return torch.cat([values[j : j + 1] for j in which.tolist()])


def put_back(parts: Sequence[Tensor], places: Sequence[np.ndarray]) -> Tensor:
    """Join the pieces of a batch, whose items were at these positions of it."""
    return pick(torch.cat(list(parts)), np.argsort(np.concatenate(places)))


def _rows_of(batches: list[EpisodeBatch]) -> dict[int, Rows]:
    """Return the rows of batches, also those that are prepared, each once and by its identity."""
    each = [b for batch in batches for b in (batch, batch.prepared) if b is not None]
    return {id(rows): rows for b in each for rows in (b.support, b.query)}


def _exchange(batch: EpisodeBatch, rows: dict[int, Rows]) -> EpisodeBatch:
    """Put other rows in the places of those that `_rows_of` returned."""
    prepared = None if batch.prepared is None else _exchange(batch.prepared, rows)
    support, query = rows[id(batch.support)], rows[id(batch.query)]
    return dataclasses.replace(batch, support=support, query=query, prepared=prepared)


def _cut(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut items that lie end to end into tensors of the shapes of others."""
    parts = whole.split([t.numel() for t in like])
    return [part.view(*t.shape, *whole.shape[1:]) for part, t in zip(parts, like, strict=True)]


def to_device(batches: list[EpisodeBatch], device: torch.device) -> list[EpisodeBatch]:
    """Move batches to a device: all tensors of a type at once, which costs as much as one."""
    fields = {}
    for key, rows in _rows_of(batches).items():
        places = rows.places
        if rows.lengths is not None and places is None and not is_host(device):
            filled = np.arange(rows.X.shape[1]) < rows.lengths[:, None]
            places = torch.from_numpy(np.flatnonzero(filled))
        fields[key] = (rows.X, rows.y, rows.weight, places, rows.index), rows.lengths
    tensors = {id(t): t for part, _ in fields.values() for t in part if t is not None}
    moved: dict[int, Tensor] = dict(tensors)
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors.values()):
        some = {k: t for k, t in tensors.items() if (t.dtype, t.device) == kind}
        if kind[1] == device:
            continue
        whole = torch.cat([t.flatten() for t in some.values()])
        pinned = device.type == "cuda" and is_host(kind[1])  # the host need not wait for the move
        whole = (whole.pin_memory() if pinned else whole).to(device, non_blocking=pinned)
        moved.update(zip(some, _cut(whole, list(some.values())), strict=True))

    def place(part: tuple[Any, ...], lengths: np.ndarray | None) -> Rows:
        values: list[Any] = [t if t is None else moved[id(t)] for t in part]
        X, y, weight, places, index = values
        return Rows(X, y, weight, lengths, places, index)

    new = {key: place(*value) for key, value in fields.items()}
    return [_exchange(batch, new) for batch in batches]


def pad_rows(
    X: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    sample_weight: np.ndarray | None = None,
    dtype: Any = None,
    names: np.ndarray | None = None,
) -> Rows:
    """Gather rows of several tasks into one padded tensor.

    Parameters
    ----------
    X, y : ndarrays of rows
    rows : int ndarray
        Row positions, those of the first task first.
    counts : int ndarray of shape (n_tasks,)
        Number of rows of each task.
    sample_weight : ndarray of shape (n_rows,), default=None
        Weight of each row of X; normalised to sum to one in each task.
    dtype : dtype, default=None
        That of the weights; None takes that of X.
    names : int ndarray of shape (n_rows,), default=None
        Becomes `Rows.index`.
    """
    dtype = X.dtype if dtype is None else dtype
    n_tasks, width = len(counts), int(counts.max())
    ragged = bool((counts < width).any())
    if ragged:
        filled = np.arange(width) < counts[:, None]
        # padding repeats the first row of the task, with weight 0
        index = np.repeat(rows[np.cumsum(counts) - counts][:, None], width, axis=1)
        index[filled] = rows
    else:
        index = rows.reshape(n_tasks, width)
    weight = None
    if sample_weight is not None:
        weight = sample_weight[index].astype(dtype, copy=False)
        if ragged:
            weight = np.where(filled, weight, 0)
        weight = weight / weight.sum(1, keepdims=True)
    elif ragged:
        weight = (filled / counts[:, None]).astype(dtype)
    gathered = torch.from_numpy(X.take(index, axis=0))
    return Rows(
        gathered,
        gathered if y is X else torch.from_numpy(y.take(index, axis=0)),
        None if weight is None else torch.from_numpy(np.ascontiguousarray(weight)),
        counts if ragged else None,
        index=None if names is None else torch.from_numpy(names.take(index)),
    )


def _centered(batch: EpisodeBatch) -> EpisodeBatch:
    """Subtract the mean target of the support rows of each task from its targets."""
    y, weight = batch.support.y, batch.support.weight
    if weight is None:
        mean = y.mean(1, keepdim=True)
    else:
        mean = (weight.unsqueeze(-1) * y).sum(1, keepdim=True)

    def center(rows: Rows) -> Rows:  # prepared rows may come in minibatches
        shape = (len(mean), *[1] * (rows.y.ndim - 2), mean.shape[-1])
        return dataclasses.replace(rows, y=rows.y - mean.view(shape))

    return _exchange(batch, {key: center(rows) for key, rows in _rows_of([batch]).items()})


def _prepared(
    batches: list[EpisodeBatch], prepare: Callable[[EpisodeBatch], EpisodeBatch] | None
) -> list[EpisodeBatch]:
    if prepare is None:
        return batches
    return [dataclasses.replace(batch, prepared=prepare(batch)) for batch in batches]


def _gathered(
    batches: list[EpisodeBatch], X: Tensor, y: Tensor, *, labelled: bool
) -> list[EpisodeBatch]:
    """Put rows in the place of their positions, those of all batches at once.

    With `labelled`, the targets are there already.
    """
    rows = _rows_of(batches)
    places = {id(r.X): r.X for r in rows.values()}
    index = torch.cat([t.flatten() for t in places.values()])

    def gather(values: Tensor) -> dict[int, Tensor]:
        parts = _cut(values.index_select(0, index), list(places.values()))
        return dict(zip(places, parts, strict=True))

    features, targets = gather(X), {} if labelled else gather(y)
    new = {
        key: dataclasses.replace(r, X=features[id(r.X)], y=targets.get(id(r.X), r.y))
        for key, r in rows.items()
    }
    return [_exchange(batch, new) for batch in batches]


def joined_rows(batch: EpisodeBatch, batch_size: int | None = None, n_minibatches: int = 1) -> Rows:
    """Support and query rows of each task together.

    Parameters
    ----------
    batch : EpisodeBatch
    batch_size : int, default=None
        Rows of a minibatch, or all rows of a task that has fewer; None joins the rows only.
    n_minibatches : int, default=1
        Minibatches wanted.

    Returns
    -------
    rows : Rows
        With `batch_size`, the tensors have one more axis, behind that of the rows of a minibatch:
        the minibatches, fewer than asked for where they repeat (`Rows.minibatch` takes turns).
        One after another they run through all rows of a task, again and again. They stride,
        because rows of one class lie side by side.
    """
    support, query = batch.support, batch.query
    sets, n_tasks = (support, query), len(batch)
    widths = [part.X.shape[1] for part in sets]
    sizes = [
        np.full(n_tasks, width) if part.lengths is None else part.lengths
        for part, width in zip(sets, widths, strict=True)
    ]
    X, y = torch.cat([support.X, query.X], 1), torch.cat([support.y, query.y], 1)
    weighted = support.weight is not None or query.weight is not None
    if batch_size is None and not weighted:
        return Rows(X, y)
    total = sizes[0] + sizes[1]
    # positions of the real rows of each task, then those of its padding
    is_real = np.concatenate(
        [np.arange(width) < size[:, None] for width, size in zip(widths, sizes, strict=True)], 1
    )
    order = np.argsort(~is_real, axis=1, kind="stable")
    if batch_size is None:
        counts, index = total, order[:, : total.max()]
    else:
        counts = np.minimum(batch_size, total)
        stride = -(-total // counts)[:, None]
        number = np.arange(sum(widths))
        turn = np.where(number < total[:, None], number % stride, len(number))
        order = np.take_along_axis(order, np.argsort(turn, axis=1, kind="stable"), axis=1)
        period = math.lcm(*(total // np.gcd(total, counts)).tolist())
        k = np.arange(max(min(n_minibatches, period), 1))
        row = np.arange(counts.max())[:, None]
        place = (k * counts[:, None, None] + row) % total[:, None, None]
        index = np.take_along_axis(order[:, :, None], place, axis=1)
    where = torch.from_numpy(index).to(X.device)
    task = torch.arange(n_tasks, device=X.device).view(-1, *[1] * (index.ndim - 1))
    lengths = counts if (counts < index.shape[1]).any() else None
    weight = None
    if weighted:
        filled = np.arange(index.shape[1]) < counts[:, None]
        of_rows = [
            X.new_ones(n_tasks, width)
            if part.weight is None
            else part.weight * torch.from_numpy(size).to(X.device)[:, None]  # 1 on average
            for part, width, size in zip(sets, widths, sizes, strict=True)
        ]
        weight = torch.cat(of_rows, 1)[task, where]
        weight = weight * torch.from_numpy(filled).to(X.device).view(
            n_tasks, -1, *[1] * (index.ndim - 2)
        )
        weight = weight / weight.sum(1, keepdim=True)
    return Rows(X[task, where], y[task, where], weight, lengths)


def _is_constant(counts: np.ndarray) -> bool:
    return bool(counts.min() == counts.max())


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

    rows: np.ndarray  # row positions, cell after cell
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
    key = tasks.codes.astype(np.int64) * n_labels + labels
    rows = np.argsort(key, kind="stable")
    cell, first, size = np.unique(key[rows], return_index=True, return_counts=True)
    starts = np.searchsorted(cell, np.arange(tasks.n_tasks + 1) * n_labels)
    return _Cells(rows, first, size, cell % n_labels, starts)


class EpisodeSampler:
    """Draws episodes from a task collection.

    Parameters
    ----------
    tasks : TaskCollection
        With numeric targets: floats of shape (n_rows, n_outputs), or class positions (int64).
    classification : bool
    n_ways : int or None
        Classes of an episode; the class-to-output assignment is then permuted in every episode.
        None: labels are shared by the tasks and used as they are.
    n_shots : int or None
        Support rows of an episode (of each class, in classification). None: regression draws a
        size for each batch, log-uniformly; classification takes half of the rows.
    n_queries : int or None
        Query rows of an episode (of each class, in classification); None: all that are left.
    center_y : bool, default=False
        Whether to subtract the mean target of the support rows from all targets of an episode.
    by_class : bool, default=True
        Whether rows are drawn from each class, in classification; else as frequent as they are.
    support_range : (int, int), default=SUPPORT_RANGE
        Sizes of support sets with ``n_shots=None``.
    keep_index : bool, default=False
        Whether batches keep the positions of their rows.
    """

    def __init__(
        self,
        tasks: TaskCollection,
        *,
        classification: bool,
        n_ways: int | None = None,
        n_shots: int | None = None,
        n_queries: int | None = None,
        center_y: bool = False,
        by_class: bool = True,
        support_range: tuple[int, int] = SUPPORT_RANGE,
        keep_index: bool = False,
    ) -> None:
        self.center_y = center_y
        self.by_class = by_class and classification
        self.support_range = support_range
        self.keep_index = keep_index
        self._resident: tuple[Tensor, Tensor] | None = None  # X and y on a device
        self.tasks = tasks
        self.classification = classification
        self.n_ways = n_ways
        self.n_shots = n_shots
        self.n_queries = n_queries
        self.n_labels = int(tasks.y.max()) + 1 if classification else 0
        if tasks.in_query is None:
            self.cells = _make_cells(tasks, tasks.y if self.by_class else None)

    def sample(self, which: np.ndarray, rng: np.random.Generator) -> EpisodeBatch:
        """Draw one episode from each of the tasks at positions `which` (repeats are allowed)."""
        return self.sample_batches(np.asarray(which)[None], rng)[0]

    def sample_batches(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        """Draw several batches at once; `which` is of shape (n_batches, n_episodes)."""
        batches = self._draw(self.tasks.X, self.tasks.y, which, rng)
        return [_centered(batch) for batch in batches] if self.center_y else batches

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
                return to_device(_prepared(self.sample_batches(which, rng), prepare), device)
            X, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in (tasks.X, tasks.y))
            self._resident = resident = X.to(device), y.to(device)
        number = np.arange(len(tasks.X))
        places = _prepared(self._draw(number, number, which, rng), prepare)
        batches = _gathered(to_device(places, device), *resident, labelled=self.n_ways is not None)
        return [_centered(batch) for batch in batches] if self.center_y else batches

    def _draw(
        self, X: np.ndarray, y: np.ndarray, which: np.ndarray, rng: np.random.Generator
    ) -> list[EpisodeBatch]:
        """Draw batches of what `X` and `y` have for each row."""
        draw = self.split(which.ravel(), rng, len(which))
        labels = [None, None] if self.n_ways is None else self._permuted_labels(draw, rng)
        support = self._gather(X, y, draw.support, draw.n_support, labels[0], len(which))
        query = self._gather(X, y, draw.query, draw.n_query, labels[1], len(which))
        return [EpisodeBatch(*sets) for sets in zip(support, query, strict=True)]

    def bytes_of_episode(self) -> int:
        """Rough memory that drawing an episode takes, at most."""
        if self.tasks.in_query is not None:
            n_rows = int(self.tasks.sizes.max())
        else:
            n_cells = int(np.diff(self.cells.starts).max())
            n_cells = n_cells if self.n_ways is None else min(n_cells, self.n_ways)
            n_rows = n_cells * int(self.cells.size.max())
        row = self.tasks.X[:1].nbytes + self.tasks.y[:1].nbytes
        return n_rows * (row + 24)  # and the random keys and positions

    def split(self, which: np.ndarray, rng: np.random.Generator, n_batches: int = 1) -> Split:
        """Draw the rows of one episode from each of the tasks at positions `which`.

        They belong to `n_batches` batches of equal length.
        """
        which = np.asarray(which)
        if self.tasks.in_query is not None:
            rows = [self.tasks.rows(j) for j in which]
            support = [r[~self.tasks.in_query[r]] for r in rows]
            query = [r[self.tasks.in_query[r]] for r in rows]
            return Split(
                np.concatenate(support),
                np.array([len(r) for r in support]),
                np.concatenate(query),
                np.array([len(r) for r in query]),
            )
        cells, episode = self._choose_cells(which, rng)
        size = self.cells.size[cells]
        n_support, n_query = self._sizes(size, episode, rng, n_batches)
        column = np.arange(int(size.max()))
        keys = rng.random((len(cells), len(column)))
        if size.min() < len(column):
            keys[column >= size[:, None]] = 2.0  # beyond every draw: sorted to the end
        # no more columns than are drawn, which are real rows
        column = column[: int((n_support + n_query).max())]
        draw = keys.argsort(1)[:, : len(column)]
        if size.min() < len(column):
            draw = np.minimum(draw, size[:, None] - 1)
        rows = self.cells.rows.take(self.cells.first[cells][:, None] + draw)
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
        chosen = np.full((len(which), int(n_chosen.max())), -1)
        # Floyd's algorithm: the k-th of them is uniform on the first n_cells - n_chosen + k + 1,
        # and the last of these where that one is taken
        for k in range(chosen.shape[1]):
            last = n_cells - n_chosen + k
            drawn = rng.integers(0, last + 1)
            taken = (chosen == drawn[:, None]).any(1)
            chosen[:, k] = np.where(taken, last, drawn)
        real = np.arange(chosen.shape[1]) < n_chosen[:, None]
        return (starts[which][:, None] + chosen)[real], np.nonzero(real)[0]

    def _sizes(
        self, size: np.ndarray, episode: np.ndarray, rng: np.random.Generator, n_batches: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.n_shots is not None:
            n_support = np.full(len(size), self.n_shots)
        elif self.by_class:
            # a single row of a class goes to either set, so that neither set lacks rows
            half = np.minimum(size // 2, self.support_range[1])
            n_support = np.where(size > 1, half, rng.integers(0, 2, len(size)))
            total = np.bincount(episode, weights=n_support)
            rows = np.bincount(episode, weights=size)
            first = np.flatnonzero(np.diff(episode, prepend=-1))
            n_support[first[total == 0]] = 1
            n_support[first[total == rows]] -= 1
        else:
            low, high = self.support_range
            drawn = np.exp(rng.uniform(np.log(low), np.log(high + 1), n_batches)).astype(np.intp)
            # a cell is an episode here
            drawn = drawn.repeat(len(size) // n_batches)
            n_support = np.clip(drawn, 1, np.maximum(size // 2, 1))
        left = size - n_support
        return n_support, left if self.n_queries is None else np.minimum(left, self.n_queries)

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
    ) -> list[Rows]:
        dtype = self.tasks.X.dtype
        names = np.arange(len(X)) if self.keep_index else None
        if labels is not None:
            names = rows if self.keep_index else None
            X, y, rows = X.take(rows, axis=0), labels, np.arange(len(rows))
        if _is_constant(counts):  # nothing to pad: gathered at once, then cut
            whole = pad_rows(X, y, rows, counts, names=names)
            length = len(counts) // n_batches
            parts = whole.X.split(length)
            targets = parts if whole.y is whole.X else whole.y.split(length)
            index = [None] * n_batches if whole.index is None else whole.index.split(length)
            return [
                Rows(x, y, index=place) for x, y, place in zip(parts, targets, index, strict=True)
            ]
        ends = np.cumsum(counts.reshape(n_batches, -1).sum(1))[:-1]
        return [
            pad_rows(X, y, *part, dtype=dtype, names=names)
            for part in zip(np.split(rows, ends), np.split(counts, n_batches), strict=True)
        ]


def hold_out(
    tasks: TaskCollection,
    asked: bool | str,
    fraction: float,
    seed: int,
    n_ways_of_pool: int | None = None,
) -> tuple[TaskCollection, TaskCollection | None]:
    """Split off tasks for validation.

    Parameters
    ----------
    tasks : TaskCollection
        With encoded targets.
    asked : bool or "auto"
        Whether to; "auto" does where there are at least 10 tasks.
    fraction : float
        Of the tasks.
    seed : int
    n_ways_of_pool : int or None
        Where the classes of an episode are drawn from a pool (one task that stands for all):
        their number. Classes are then held out.

    Returns
    -------
    training, validation : TaskCollection, TaskCollection or None
    """
    pool = n_ways_of_pool is not None
    demanded = asked != "auto" and bool(asked)
    units = int(tasks.y.max()) + 1 if pool else tasks.n_tasks
    least = 2 * (n_ways_of_pool or 0) if pool else (2 if demanded else 10)
    if not asked or units < least:
        if demanded:
            what = "classes" if pool else "tasks"
            raise ValueError(
                f"early_stopping=True holds out {what} for validation, but there are only {units} "
                f"(at least {least} are needed). Set early_stopping=False."
            )
        return tasks, None
    n_valid = min(max(round(fraction * units), 1), units - 1)
    if n_ways_of_pool is not None:
        n_valid = min(max(n_valid, n_ways_of_pool), units - n_ways_of_pool)
    order = np.random.default_rng((seed, 2)).permutation(units)
    held, kept = np.sort(order[:n_valid]), np.sort(order[n_valid:])
    if not pool:
        return tasks.select(kept), tasks.select(held)
    parts = []
    for classes in (kept, held):
        rows = np.isin(tasks.y, classes)
        parts.append(
            dataclasses.replace(tasks, X=tasks.X[rows], y=tasks.y[rows], codes=tasks.codes[rows])
        )
    return parts[0], parts[1]


def draw_fixed(sampler: EpisodeSampler, seed: int) -> list[EpisodeBatch]:
    """Draw validation episodes: every task as often as any, about `VALIDATION_EPISODES` in all."""
    n_tasks = sampler.tasks.n_tasks
    rng = np.random.default_rng((seed, 3))
    which = np.tile(np.arange(n_tasks), max(VALIDATION_EPISODES // n_tasks, 1))
    n_batches = -(-len(which) // VALIDATION_EPISODES)
    return [sampler.sample(part, rng) for part in np.array_split(which, n_batches)]


def name_of(tasks: TaskCollection, j: int) -> str:
    """Return words that name a task in a message; none where there is only one."""
    return "" if tasks.spelling == "single" else f" of task {tasks.ids[j : j + 1].tolist()[0]!r}"


def large_enough(
    tasks: TaskCollection, n_shots: int | None, n_ways: int | None, classification: bool
) -> np.ndarray:
    """Tell which tasks can give a support set of the asked size and a query row."""
    if tasks.in_query is not None:
        return np.ones(tasks.n_tasks, dtype=bool)
    need = 2 if n_shots is None else n_shots + 1
    if not classification:
        return tasks.sizes >= need
    large = tasks.sizes >= 2
    if n_shots is None and n_ways is None:
        return large
    _, labels = np.unique(tasks.y, return_inverse=True)
    n_labels = int(labels.max()) + 1
    cells, counts = np.unique(tasks.codes * n_labels + labels.reshape(-1), return_counts=True)
    task = cells // n_labels
    small = np.bincount(task, weights=counts < need, minlength=tasks.n_tasks) > 0
    few = np.bincount(task, minlength=tasks.n_tasks) < (1 if n_ways is None else 2)
    return large & ~small & ~few


def check_splittable(
    tasks: TaskCollection, n_shots: int | None, n_ways: int | None, classification: bool
) -> None:
    """Refuse tasks that cannot give a support set of the asked size and a query row."""
    if n_ways is not None:
        labels = int(tasks.y.max()) + 1
        cells, counts = np.unique(tasks.codes * labels + tasks.y, return_counts=True)
        n_classes = np.bincount(cells // labels, minlength=tasks.n_tasks)
        if tasks.in_query is not None:
            if n_classes.max() > n_ways:
                j = int(n_classes.argmax())
                raise ValueError(
                    f"The episode{name_of(tasks, j)} has {n_classes[j]} classes, but n_ways="
                    f"{n_ways}. Raise n_ways or leave classes out."
                )
            return
        if tasks.spelling == "single" and n_classes[0] < n_ways:
            raise ValueError(
                f"n_ways={n_ways}, but there are only {n_classes[0]} classes to draw from. Lower "
                "n_ways or give more classes."
            )
        if n_classes.min() < 2:
            j = int(n_classes.argmin())
            raise ValueError(
                f"There are too few classes{name_of(tasks, j)}: got 1 class, and episodes need at "
                "least 2. Leave the task out."
            )
    elif tasks.in_query is not None:
        return
    if tasks.sizes.min() < 2:
        few = np.flatnonzero(tasks.sizes < 2)
        where = (
            ""
            if tasks.spelling == "single"
            else f" in {len(few)} task(s), such as {tasks.ids[few][:3].tolist()}"
        )
        raise ValueError(
            f"Got n_samples=1 (one row){where}; a task needs at least 2 rows, one for its support "
            "set and one for its query set. Leave such tasks out or give them more rows."
        )
    if n_shots is None and n_ways is None:
        return
    need = (1 if n_shots is None else n_shots) + 1
    if not classification:
        few = np.flatnonzero(tasks.sizes < need)
        if len(few):
            raise ValueError(
                f"n_shots={n_shots} is more than {len(few)} of the {tasks.n_tasks} tasks can give: "
                f"the smallest{name_of(tasks, int(few[tasks.sizes[few].argmin()]))} has "
                f"{tasks.sizes.min()} rows, and a support set of {n_shots} and one query row need "
                f"{need}. Lower n_shots or leave such tasks out."
            )
        return
    labels = int(tasks.y.max()) + 1
    cells, counts = np.unique(tasks.codes * labels + tasks.y, return_counts=True)
    few = np.flatnonzero(counts < need)
    if len(few):
        j = int(cells[few[0]] // labels)
        raise ValueError(
            f"{len(few)} class(es) have fewer than {need} rows in a task, such as class number "
            f"{int(cells[few[0]] % labels)}{name_of(tasks, j)} with {int(counts[few[0]])}; "
            f"{need - 1} support row(s) of each class (n_shots={n_shots}) and one query row need "
            f"{need}. Lower n_shots or leave such classes out."
        )
