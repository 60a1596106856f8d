"""Episodes: the support and query sets of a batch of tasks, as tensors.

Rows of tasks are padded to the longest, and whole batches move, are cut and are joined.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.devices import is_host


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a batch of tasks, padded to the longest.

    Attributes
    ----------
    X : Tensor of shape (n_tasks, n_rows, *feature_shape)
    y : Tensor of shape (n_tasks, n_rows, n_outputs) or int64 (n_tasks, n_rows)
    weight : Tensor of shape (n_tasks, n_rows) or None
        Weights that sum to one in each task, 0 for padding; None for equal weights. Of query rows
        in a meta-training with weights, they sum to what the episode counts in the outer loss, 1
        on average.
    lengths : int ndarray of shape (n_tasks,) or None
        Number of real rows of each task; None where no task is padded. A task without rows has one
        of weight 0, so that whatever runs rows has one to run.
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

    def first(self, n: int) -> Rows:
        """Return the first n rows of each task; n may be 0."""
        X, weight, lengths = self.X[:, : max(n, 1)], self.weight, self.lengths
        if n == 0:
            weight, lengths = X.new_zeros(X.shape[:2]), np.zeros(len(X), dtype=int)
        weight = None if weight is None else weight[:, : X.shape[1]]
        lengths = None if lengths is None else np.minimum(lengths, n)
        return Rows(X, self.y[:, : X.shape[1]], weight, lengths)

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


def gather(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows at these positions, side by side in memory.

    `take` is faster, but copies all values first where the rows are not side by side, as in the
    columns of a data frame.
    """
    if values.flags.c_contiguous:
        return values.take(index, axis=0)
    return np.ascontiguousarray(values[index])


def pad_rows(
    X: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    sample_weight: np.ndarray | None = None,
    dtype: Any = None,
    names: np.ndarray | bool = False,
    normalise: bool = True,
) -> Rows:
    """Gather rows of several tasks into one padded tensor.

    Parameters
    ----------
    X, y : ndarrays of rows
    rows : int ndarray
        Row positions, those of the first task first.
    counts : int ndarray of shape (n_tasks,)
        Number of rows of each task. One without rows gets a row without weight.
    sample_weight : ndarray of the length of `rows`, default=None
        Weight of each of them.
    dtype : dtype, default=None
        That of the weights; None takes that of X.
    names : int ndarray of shape (n_rows,) or bool, default=False
        What `Rows.index` has of each row; True: its position.
    normalise : bool, default=True
        Whether weights are to sum to one in each task; otherwise they do where they are 1.
    """
    dtype = X.dtype if dtype is None else dtype
    if len(X) == 0:
        X, y = (np.zeros((1, *part.shape[1:]), part.dtype) for part in (X, y))
    n_tasks, width = len(counts), max(int(counts.max()), 1)
    short = bool((counts < width).any())
    if short:
        filled = np.arange(width) < counts[:, None]
        # padding repeats the first row of the task, or some row, with weight 0
        first = np.append(rows, 0)[np.cumsum(counts) - counts]
        index = np.repeat(first[:, None], width, axis=1)
        index[filled] = rows
    else:
        index = rows.reshape(n_tasks, width)
    weight = None
    if sample_weight is not None and len(sample_weight):
        weight = np.zeros((n_tasks, width), sample_weight.dtype)
        weight[np.arange(width) < counts[:, None]] = sample_weight
        total = weight.sum(1, keepdims=True) if normalise else counts[:, None]
        weight = (weight / np.where(counts[:, None] > 0, total, 1)).astype(dtype, copy=False)
    elif short:
        weight = (filled / np.maximum(counts, 1)[:, None]).astype(dtype)
    lengths = np.maximum(counts, 1)
    gathered = torch.from_numpy(gather(X, index))
    own = index.copy() if isinstance(names, bool) else names.take(index)
    return Rows(
        gathered,
        gathered if y is X else torch.from_numpy(gather(y, index)),
        None if weight is None else torch.from_numpy(np.ascontiguousarray(weight)),
        lengths if (lengths < width).any() else None,
        index=None if names is False else torch.from_numpy(own),
    )


def centered(batch: EpisodeBatch) -> EpisodeBatch:
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


def with_prepared(
    batches: list[EpisodeBatch], prepare: Callable[[EpisodeBatch], EpisodeBatch] | None
) -> list[EpisodeBatch]:
    """Batches with what `prepare` makes of them; None makes nothing."""
    if prepare is None:
        return batches
    return [dataclasses.replace(batch, prepared=prepare(batch)) for batch in batches]


def gathered(
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


def totals(weight: Tensor) -> Tensor:
    """Return sums over the last axis, exactly 1 where that is what they are to rounding."""
    total = weight.sum(-1)
    rounding = weight.shape[-1] * torch.finfo(weight.dtype).eps
    return torch.where((total - 1).abs() <= rounding, torch.ones_like(total), total)


def normalised(weight: Tensor) -> Tensor:
    """Scale weights so that they sum to 1 over the last axis, or to 0 where all are 0."""
    total = totals(weight)
    return weight / torch.where(total > 0, total, torch.ones_like(total)).unsqueeze(-1)


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
    weights = [part.weight if part.weight is None else normalised(part.weight) for part in sets]
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
            if part is None
            else part * torch.from_numpy(size).to(X.device)[:, None]  # 1 on average
            for part, width, size in zip(weights, widths, sizes, strict=True)
        ]
        weight = torch.cat(of_rows, 1)[task, where]
        weight = weight * torch.from_numpy(filled).to(X.device).view(
            n_tasks, -1, *[1] * (index.ndim - 2)
        )
        weight = weight / weight.sum(1, keepdim=True)
    return Rows(X[task, where], y[task, where], weight, lengths)
