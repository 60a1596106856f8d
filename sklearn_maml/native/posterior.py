"""The compiled posteriors of a Gaussian head on multilayer perceptrons, and predictions by them."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml.native import PARALLEL_WORK, _kernels, instruction_set, instruction_sets
from sklearn_maml.native.head import Layout

Params = dict[str, Tensor]

# in the order of `posterior::Argument` of kernels.h
ARGUMENTS = (
    *("sizes", "numbers", "center", "scale", "unit", "theta", "packed", "n_packed", "n_tasks"),
    *("n_threads", "X_is_double", "X", "width", "y", "root", "shift", "misfit", "moved"),
    *(
        "n_moved",
        "log_det",
        "n_rows",
        "half",
        "n_half",
        "of_rows",
        "place",
        "shift_is_double",
        "mean",
        "variance",
    ),
    *("columns", "roots", "inverse", "objective"),
)
DTYPES = (torch.float32, torch.float64)
LANES = 8  # numbers of the widest vectors
PANEL_ROWS = 32  # of posterior.h
LARGE = 2**19  # numbers of which numpy asks for large pages


class PosteriorKernel:
    """What support rows make of a prior, and predictions: of one head, in float64.

    Every task and every predicted row is computed by itself: what comes out depends, bit for bit,
    neither on what else is asked for nor on the number of threads.

    Parameters
    ----------
    layout : Layout
    params : dict of str to Tensor
        Parameters of the head in float64, which are copied.

    Raises
    ------
    NativeUnavailableError
        If the package was installed without the kernels.
    """

    def __init__(self, layout: Layout, params: Params) -> None:
        self._level = instruction_sets().index(instruction_set())
        self.layout = layout
        # tensors rather than arrays of ctypes: copies have addresses of their own
        self._sizes = torch.tensor(layout.sizes)
        self._numbers = torch.tensor(layout.numbers, dtype=torch.float64)
        theta = {name: p.contiguous() for name, p in params.items()}
        at = [theta[name].data_ptr() if name in theta else 0 for name in layout.names]
        addresses, size = torch.tensor(at), torch.zeros(1, dtype=torch.int64)
        self._packed = torch.empty(0, dtype=torch.float64)
        for _ in range(2):  # how much room it takes; then itself
            self._packed = self._packed.new_zeros(int(size))
            self._call(_kernels.head_pack, theta=addresses, n_packed=size)

    def takes(self, X: Tensor) -> bool:
        """Whether rows (..., n_features) have a type and shape that the kernel is for."""
        return X.is_cpu and X.dtype in DTYPES and X.shape[-1] == self.layout.n_features

    def condition(
        self, X: Tensor, y: Tensor, root: Tensor, doubt: bool, n_threads: int
    ) -> dict[str, Any]:
        """Condition on support sets.

        Parameters
        ----------
        X : Tensor of shape (n_tasks, n_rows, n_features)
        y : float64 Tensor of shape (n_tasks, n_rows, n_outputs)
            Numbers, or 1 for the class of a row and 0 for the others.
        root : float64 Tensor of shape (n_tasks, n_rows)
            Square roots of the rows' weights.
        doubt : bool
            Whether `half` is asked for.
        n_threads : int
            Among which large batches are divided.

        Returns
        -------
        found : dict
            The parts of `learners.posteriors.Posterior`; `half` is `packed`.
        """
        own = self.layout
        n_members, p, n_tasks, width = own.n_members, own.n_columns, *X.shape[:2]
        shape = (n_members, n_tasks)
        shift = y.new_empty(*shape, p, own.n_outputs)
        found: dict[str, Tensor | None] = {"shift": shift}
        found |= {n: y.new_empty(*shape, own.n_outputs) for n in ("misfit", "moved")}
        found |= {n: y.new_empty(*shape, own.n_noises) for n in ("n_moved", "log_det")}
        n_half = -(-min(width, p) // LANES) * LANES if doubt else 0
        found["half"] = _aligned(*shape, own.n_noises, p * n_half) if doubt else None
        found["n_rows"] = y.new_empty(1, n_tasks, 1)
        found["of_rows"] = torch.empty(1, n_tasks, dtype=torch.bool)
        row = own.row_work + own.n_noises * min(width, p) * p
        self._call(
            _kernels.head_condition,
            n_tasks=n_tasks,
            n_threads=n_threads if n_members * n_tasks * width * row > PARALLEL_WORK else 1,
            n_half=n_half,
            X_is_double=X.dtype == torch.float64,
            X=X.contiguous(),
            width=width,
            y=y.contiguous(),
            root=root.contiguous(),
            **found,
        )
        return found

    def condition_at_mode(
        self, X: Tensor, y: Tensor, root: Tensor, n_threads: int
    ) -> dict[str, Tensor]:
        """Condition on support sets, of no more rows than columns, by Newton steps.

        Parameters
        ----------
        X, y, root, n_threads
            See `condition`.

        Returns
        -------
        found : dict
            The parts of `learners.laplace.LaplacePosterior`.
        """
        own = self.layout
        (n_tasks, width), p, n_outputs = X.shape[:2], own.n_columns, own.n_outputs
        shape = (own.n_members, n_tasks)
        found = {
            "shift": y.new_empty(*shape, p, n_outputs),
            "S": y.new_empty(*shape, width, p),
            "root": y.new_empty(*shape, width, n_outputs),
            "inverse": y.new_empty(*shape, n_outputs, width, width),
            "objective": y.new_empty(*shape, n_outputs),
        }
        work = own.n_members * n_tasks * width * (own.row_work + n_outputs * width * width)
        self._call(
            _kernels.head_condition,
            n_tasks=n_tasks,
            n_threads=n_threads if work > PARALLEL_WORK else 1,
            X_is_double=X.dtype == torch.float64,
            X=X.contiguous(),
            width=width,
            y=y.contiguous(),
            root=root.contiguous(),
            shift=found["shift"],
            columns=found["S"],
            roots=found["root"],
            inverse=found["inverse"],
            objective=found["objective"],
        )
        return found

    def query(
        self,
        X: Tensor,
        place: Tensor,
        shift: Tensor,
        half: Tensor | None,
        of_rows: Tensor | None,
        n_threads: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict rows.

        Parameters
        ----------
        X : Tensor of shape (n_rows, n_features)
        place : int64 Tensor of shape (n_rows,)
            Task of each row: the fewer changes, the less work.
        shift, half, of_rows
            See `learners.gaussian.Posterior`; without `half` there are no variances.
        n_threads : int
            See `condition`.

        Returns
        -------
        mean : float64 Tensor of shape (n_members, n_rows, n_outputs)
        variance : float64 Tensor of shape (n_members, n_rows, n_noises) or None
            Noise included, over the squared amplitude.
        """
        own, n_rows = self.layout, len(X)
        mean = torch.empty(own.n_members, n_rows, own.n_outputs, dtype=torch.float64)
        variance, n_half, row = None, 0, own.row_work
        if half is not None:
            variance = mean.new_empty(own.n_members, n_rows, own.n_noises)
            n_half = half.shape[3] // own.n_columns
            row += own.n_noises * n_half * own.n_columns
        self._call(
            _kernels.head_query,
            n_tasks=shift.shape[1],
            n_threads=n_threads if own.n_members * n_rows * row > PARALLEL_WORK else 1,
            X_is_double=X.dtype == torch.float64,
            X=X.contiguous(),
            width=n_rows,
            place=place.contiguous(),
            shift=shift.contiguous(),
            shift_is_double=shift.dtype == torch.float64,
            half=None if half is None else half.contiguous(),
            n_half=n_half,
            of_rows=of_rows,
            mean=mean,
            variance=variance,
        )
        return mean, variance

    def _call(self, function: Any, **given: Any) -> None:
        given |= {"sizes": self._sizes, "numbers": self._numbers, "packed": self._packed}
        given |= zip(("center", "scale", "unit"), self.layout.constants, strict=True)
        values = (given.get(name, 0) for name in ARGUMENTS)
        # what `given` has is held until the call is over
        arguments = [v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in values]
        function(self._level, True, (ctypes.c_int64 * len(arguments))(*arguments))


def _aligned(*shape: int) -> Tensor:
    """Memory for numbers, from where vectors may be read."""
    size = math.prod(shape)
    if size < LARGE:
        return torch.empty(shape, dtype=torch.float64)
    # numpy asks for large pages: a system hands out those in a fifth of the time, where it has any
    room = np.empty(size + LANES - 1)
    first = -room.ctypes.data // room.itemsize % LANES
    return torch.from_numpy(room[first : first + size]).view(shape)


def packed(half: Tensor) -> Tensor:
    """Roots H (..., n, n_columns) as the kernels keep them: (..., numbers).

    In panels of rows, of which those of a column are side by side.
    """
    rows = nn.functional.pad(half, (0, 0, 0, -half.shape[-2] % LANES))
    return torch.cat([part.mT.flatten(-2) for part in rows.split(PANEL_ROWS, -2)], -1)


def unpacked(kept: Tensor, n_columns: int) -> Tensor:
    """Return what `packed` was given, and up to seven rows of zeros."""
    panels = kept.split(PANEL_ROWS * n_columns, -1)
    return torch.cat([part.unflatten(-1, (n_columns, -1)).mT for part in panels], -2)
