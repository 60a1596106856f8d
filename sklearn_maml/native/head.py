"""The compiled gradient of a Gaussian head on multilayer perceptrons."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.native import (
    PARALLEL_WORK,
    _kernels,
    activation_code,
    instruction_set,
    instruction_sets,
)
from sklearn_maml.theta import Params

# in the order of `Tensor` of head.cpp; weight and bias of each layer follow
PARTS = (
    *("factor", "log_scale", "log_noise", "mean", "body.frequency"),
    *("log_code", "surprise", "log_amplitude"),
)


class _Packed(NamedTuple):
    """Parameters and gradients of some members, and where they are."""

    names: list[str]
    theta: list[Tensor]
    grads: list[Tensor]
    theta_at: Any
    grads_at: Any
    sizes: Any
    numbers: Any


class Layout:
    """Shape and constants of a head, as the kernels read them.

    Parameters
    ----------
    shapes : dict of str to tuple
        Of the parameters, whose first axis is that of the members.
    activation : Module
        Of the hidden layers.
    center, scale : Tensors of shape (n_linear,)
        Of the features; empty where they are none of the columns.
    n_outputs : int
        Numbers, or classes of an episode.
    classes, same_classes : bool
    spread, beyond, floor : float
        Factor of the linear columns, where standardised features are cut off, and the least
        variance of the noise.
    likelihood : int, default=0
        Number in likelihoods.h; 0: numbers with normal noise, or classes.
    unit : Tensor of shape (n_outputs,), optional
        See `NewtonLikelihood.unit`.
    delta : float, default=0
        Of the Huber loss.

    Attributes
    ----------
    names : list of str
        Of all parameters that a head may have, in the order of the kernels.
    sizes, numbers : list of int, list of float
    constants : list of Tensor
    row_work : int
        Multiply-adds of a row's forward pass, products with the rows of its task included.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        activation: nn.Module,
        center: Tensor,
        scale: Tensor,
        *,
        n_outputs: int,
        classes: bool,
        same_classes: bool,
        spread: float,
        beyond: float,
        floor: float,
        likelihood: int = 0,
        unit: Tensor | None = None,
        delta: float = 0.0,
    ) -> None:
        self.shapes = shapes
        self.classes, self.n_outputs = classes, n_outputs
        n_layers = sum(name.startswith("body.weight") for name in shapes)
        layers = [f"body.{kind}{k}" for k in range(n_layers) for kind in ("weight", "bias")]
        self.names = [*PARTS, *layers]
        self.n_members, n_linear = shapes["factor"][:2]
        self.n_features, self.n_noises = shapes["body.weight0"][1], shapes["log_noise"][1]
        self.n_columns = n_linear + shapes["log_scale"][1]
        code, slope = activation_code(activation) or (0, 0.0)
        n_waves = shapes["body.frequency"][2] if "body.frequency" in shapes else 0
        self.sizes = [self.n_members, self.n_features, n_linear, n_outputs, self.n_noises]
        self.sizes += [n_waves, int(classes), int(same_classes), likelihood, n_layers]
        for name in layers[::2]:
            self.sizes += [shapes[name][2], code]
        self.numbers = [slope, spread, beyond, floor, delta]
        constants = (center, scale, torch.empty(0) if unit is None else unit)
        self.constants = [part.detach().double().contiguous() for part in constants]
        self.row_work = sum(math.prod(shapes[n][1:]) for n in layers[::2])
        self.row_work += 60 * shapes["log_scale"][1]


class HeadKernel:
    """The compiled gradient of the heads of one shape.

    Parameters
    ----------
    layout : Layout
    n_threads : int
        Among which large batches are divided; the results do not depend on it.
    dtype : torch.dtype, default=torch.float32
        Of rows, results and all but factors, which are of double precision.

    Raises
    ------
    NativeUnavailableError
        If the package was installed without the kernels.
    """

    def __init__(
        self, layout: Layout, *, n_threads: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        self._level = instruction_sets().index(instruction_set())
        self._layout = layout
        self.dtype = dtype
        # the parameters as the kernel reads them, and their gradients
        shapes = layout.shapes.items()
        self._theta = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes}
        self._grads = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes}
        self.classes, self.n_outputs = layout.classes, layout.n_outputs
        self._n_threads = n_threads
        self._packed: dict[int, _Packed] = {}  # by the number of members

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_packed": {}}  # addresses are not those of a copy

    def takes(self, batch: EpisodeBatch) -> bool:
        """Whether episodes have the types and shapes that the kernel is for."""
        tail = () if self.classes else (self.n_outputs,)
        return all(
            rows.X.is_cpu
            and rows.X.dtype in (torch.float32, torch.float64)
            and rows.X.dtype == batch.query.X.dtype
            and rows.X.ndim == 3
            and rows.X.shape[2] == self._layout.n_features
            and (rows.y.dtype == torch.int64) == self.classes
            and rows.y.shape == (*rows.X.shape[:2], *tail)
            for rows in (batch.support, batch.query)
        )

    def step(
        self,
        params: Params,
        batch: EpisodeBatch,
        weights: Sequence[Tensor | None],
        unseen: Tensor | None,
        n_given: int,
        task_weight: Tensor | None = None,
    ) -> tuple[Params, Tensor]:
        """Gradients of the negative log likelihood of query rows, and their outputs.

        Parameters
        ----------
        params : dict of str to Tensor
            Of all members, or of fewer.
        batch : EpisodeBatch
        weights : pair of Tensors of shape (n_tasks, n_rows) or (1, n_tasks, n_rows), or None
            Of the rows of support and query; 0 for padding.
        unseen : uint8 Tensor of shape (n_rows_of_collection,) or None
            Bit j says that member j does not learn from a row, if the rows have an `index`.
        n_given : int
            Support rows that are conditioned on; further ones are as query rows.
        task_weight : Tensor of shape (n_tasks,), optional
            Factors of the tasks' likelihoods; None: only outputs are asked for.

        Returns
        -------
        grads : dict of str to Tensor
            In the dtypes of the parameters.
        outputs : Tensor of shape (n_members, n_tasks, n_query, n_outputs)
        """
        keep: list[Tensor] = []

        def at(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
            if tensor is None or not tensor.numel():
                return 0
            tensor = tensor.to(dtype).contiguous()
            keep.append(tensor)
            return tensor.data_ptr()

        def rows_at(rows: Rows, weight: Tensor | None) -> list[int]:
            y = at(rows.y, None if self.classes else self.dtype)
            return [at(rows.X), y, at(weight, self.dtype), at(rows.index), rows.X.shape[1]]

        n_members = len(params["factor"])
        if n_members not in self._packed:
            self._packed[n_members] = self._pack(n_members)
        held = self._packed[n_members]
        with torch.no_grad():
            torch._foreach_copy_(held.theta, [params[name] for name in held.names])
        shape = (n_members, *batch.query.X.shape[:2], self.n_outputs)
        outputs = torch.empty(shape, dtype=self.dtype)
        n_rows = batch.support.X.shape[1] + batch.query.X.shape[1]
        work = n_members * len(batch) * n_rows * self._layout.row_work
        work *= 2 if task_weight is None else 6
        arguments = [
            ctypes.addressof(held.sizes),
            ctypes.addressof(held.numbers),
            *map(at, self._layout.constants),
            ctypes.addressof(held.theta_at),
            len(batch),
            n_given,
            self._n_threads if work > PARALLEL_WORK else 1,
            int(batch.query.X.dtype == torch.float64),
            *rows_at(batch.support, weights[0]),
            *rows_at(batch.query, weights[1]),
            at(unseen),
            at(task_weight, self.dtype),
            outputs.data_ptr(),
            ctypes.addressof(held.grads_at),
        ]
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        _kernels.head_step(self._level, self.dtype == torch.float64, packed)
        if task_weight is None:
            return {}, outputs
        found = [torch.empty_like(params[name]) for name in held.names]
        torch._foreach_copy_(found, held.grads)
        return dict(zip(held.names, found, strict=True)), outputs

    def _pack(self, n_members: int) -> _Packed:
        """Find what the kernel reads and writes for the first so many members."""
        theta, grads = (
            {name: of[:n_members] for name, of in part.items()}
            for part in (self._theta, self._grads)
        )
        layout = self._layout
        array = ctypes.c_int64 * len(layout.names)
        theta_at, grads_at = (
            array(*(of[name].data_ptr() if name in of else 0 for name in layout.names))
            for of in (theta, grads)
        )
        sizes = (ctypes.c_int64 * len(layout.sizes))(n_members, *layout.sizes[1:])
        numbers = (ctypes.c_double * len(layout.numbers))(*layout.numbers)
        lists = [*theta], [*theta.values()], [*grads.values()]
        return _Packed(*lists, theta_at, grads_at, sizes, numbers)
