"""Which rows of a pool to label: those that take most of the variance of its predictions away.

With the covariance K of the outputs of the rows of a pool, the label of row c takes
``sum_j w_j K_jc^2 / (K_cc + noise_c)`` of the weighted variance of all rows away; and K becomes
``K - k k' / (K_cc + noise_c)`` with its column k. That is so whatever the label says where noise is
normal. Of other targets the noise is one over the information that is expected of a label: for
counts, little where few are expected; for classes, little where one of them is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# entries of S that are kept, and of any matrix of all tasks taken at a time
MOST_ENTRIES = 2**22
ROWS_AT_A_TIME = 8192
# part of the largest gain below which two gains are one, whatever their rounding
SAME = 1e-10


class Columns:
    """S of the rows of pools, some of them at a time.

    Kept if it is small, and computed anew on every pass otherwise.

    Parameters
    ----------
    columns : callable (rows) -> prior, S
        Prior mean (n_members, n_tasks, n_some, n_outputs), and S with columns in the place of
        outputs, of rows (n_tasks, n_some) of the pool.
    rows : int ndarray of shape (n_tasks, n_rows)
        Rows of each pool; one that is padded has any rows at its end.
    n_entries : int
        Of S, for one row.
    """

    def __init__(
        self,
        columns: Callable[[np.ndarray], tuple[Tensor, Tensor]],
        rows: np.ndarray,
        n_entries: int,
    ) -> None:
        self._columns = columns
        self._rows = rows
        size = max(ROWS_AT_A_TIME // len(rows), 1)
        self._parts = [slice(k, k + size) for k in range(0, rows.shape[1], size)]
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        if rows.size * n_entries <= MOST_ENTRIES:
            self._kept = [columns(rows[:, part]) for part in self._parts]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for part, (_, S) in zip(self._parts, self.with_prior(), strict=True):
            yield part, S.unsqueeze(2)

    def with_prior(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Prior mean and S of some rows after the others."""
        for k, part in enumerate(self._parts):
            yield self._kept[k] if self._kept else self._columns(self._rows[:, part])

    def at(self, chosen: np.ndarray) -> Tensor:
        """S (n_members, n_tasks, 1, n_columns) of one row of each pool."""
        return self._columns(np.take_along_axis(self._rows, chosen[:, None], 1))[1]


class _Variance(Protocol):
    """Variances of pools, and what labels take of them away.

    All attributes are of shape (n_members, n_tasks, n_noises, n_rows), `variance` the diagonal of
    K and `explained` ``sum_j w_j K_jc^2``.
    """

    noise: Tensor
    variance: Tensor
    explained: Tensor

    def label(self, chosen: np.ndarray) -> None:
        """Have one row (n_tasks,) of each pool labelled."""


class Dense:
    """Variances by K itself.

    Parameters
    ----------
    columns : Columns
    covariance : Tensor of shape (n_members, n_tasks, n_noises, n_columns, n_columns)
        C, with which K is S C S'.
    noise : Tensor of shape (n_members, n_tasks or 1, n_noises, n_rows or 1)
        Variance of the noise of each row.
    weight : Tensor of shape (n_members, n_tasks, n_noises, n_rows)
        Of the variance of each row; 0 for padding.
    """

    def __init__(self, columns: Columns, covariance: Tensor, noise: Tensor, weight: Tensor) -> None:
        S = torch.cat([part for _, part in columns], -2)
        self.noise, self.weight = noise.expand_as(weight), weight.unsqueeze(-2)
        self.K = S @ covariance @ S.mT
        self._update()

    def _update(self) -> None:
        self.variance = self.K.diagonal(dim1=-2, dim2=-1)
        self.explained = (self.K.square() @ self.weight.mT).squeeze(-1)

    def label(self, chosen: np.ndarray) -> None:
        """See `_Variance`."""
        k = _at(self.K, chosen)  # (n_members, n_tasks, n_noises, n_rows)
        total = (_at(self.variance, chosen) + _at(self.noise, chosen)).unsqueeze(-1)
        self.K = self.K - k.unsqueeze(-1) * (k / total).unsqueeze(-2)
        self._update()


class LowRank:
    """Variances by the covariance C of the weights alone: K is never formed.

    A label changes C, the variances and the sums by one vector each. Parameters are as in `Dense`.
    """

    def __init__(self, columns: Columns, covariance: Tensor, noise: Tensor, weight: Tensor) -> None:
        self.columns, self.C = columns, covariance
        self.noise = noise.expand_as(weight)
        self.G = torch.zeros_like(covariance)
        for part, S in columns:
            self.G += (S * weight[..., part, None]).mT @ S
        explaining = covariance @ self.G @ covariance
        self.variance, self.explained = torch.empty_like(weight), torch.empty_like(weight)
        for part, S in columns:
            self.variance[..., part] = ((S @ covariance) * S).sum(-1)
            self.explained[..., part] = ((S @ explaining) * S).sum(-1)

    def label(self, chosen: np.ndarray) -> None:
        """See `_Variance`."""
        s = self.columns.at(chosen).unsqueeze(-1)
        f = self.C @ s
        of_pool = self.G @ f
        both = torch.cat([f, self.C @ of_pool], -1)
        total = (s.mT @ f).squeeze(-1) + _at(self.noise, chosen).unsqueeze(-1)
        explained = (f.mT @ of_pool).squeeze(-1) / total
        for part, S in self.columns:
            of_f, of_g = (S @ both).unbind(-1)
            self.variance[..., part] -= of_f.square() / total
            self.explained[..., part] += of_f * (explained * of_f - 2 * of_g) / total
        self.C = self.C - f * (f / total.unsqueeze(-1)).mT


def _at(values: Tensor, chosen: np.ndarray) -> Tensor:
    """Values of one row (n_tasks,) of each pool, of (n_members, n_tasks, n_noises, n_rows, ...)."""
    return values[:, np.arange(len(chosen)), :, chosen].transpose(0, 1)


def greedy(model: _Variance, free: np.ndarray, n: int) -> np.ndarray:
    """Choose rows one after another, each the best one after those before it.

    Parameters
    ----------
    model : Dense or LowRank
        What it has of members and noises is summed over.
    free : bool ndarray of shape (n_tasks, n_rows)
        Rows that may be chosen: `n` in each task at least.
    n : int

    Returns
    -------
    chosen : int ndarray of shape (n_tasks, n)
        Positions in the pools. Of rows that are as good, the first.
    """
    free = free.copy()
    tasks, chosen = np.arange(len(free)), np.empty((len(free), n), dtype=np.intp)
    tolerance: np.ndarray | None = None
    for k in range(n):
        if k:
            model.label(chosen[:, k - 1])
        gains = model.explained.clamp_min(0)
        gains = gains / (model.variance.clamp_min(0) + model.noise)
        gain = np.where(free, gains.sum((0, 2)).cpu().numpy(), -np.inf)
        best = gain.max(1, keepdims=True)
        tolerance = SAME * best if tolerance is None else tolerance
        chosen[:, k] = (gain >= best - tolerance).argmax(1)
        free[tasks, chosen[:, k]] = False
    return chosen
