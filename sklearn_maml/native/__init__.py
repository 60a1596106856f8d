"""Compiled kernels for multilayer perceptrons: meta-gradients, adaptation and prediction.

They are built when the package is, once for each of several instruction sets; the best that the
processor has is used. Where they could not be built the engine does without.

Within an instruction set the results are the same, bit for bit, whatever the number of threads.
Between instruction sets they differ by rounding. ``SKLEARN_MAML_INSTRUCTIONS`` names the one to use
(see `instruction_sets`), for the same bits on different processors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import Rows
from sklearn_maml.theta import Params

try:
    from sklearn_maml.native import _kernels
except ImportError as error:
    _kernels = None  # type: ignore[assignment]
    _missing: str | None = str(error)
else:
    _missing = None


MAX_LAYERS = 32  # as in the source
# floating-point operations of a call from which on it is divided among threads
PARALLEL_WORK = 1e8
VARIABLE = "SKLEARN_MAML_INSTRUCTIONS"


class NativeUnavailableError(RuntimeError):
    """There are no kernels here; the message says why."""


# -- instruction sets ----------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """Names of the instruction sets that the kernels can use here, the best last.

    Empty where the package was installed without its kernels.
    """
    return [] if _kernels is None else [*_kernels.LEVELS]


def instruction_set() -> str:
    """Name of the instruction set that the kernels use.

    Raises
    ------
    NativeUnavailableError
        If the package was installed without its kernels.
    ValueError
        If ``SKLEARN_MAML_INSTRUCTIONS`` names one that is not there.
    """
    names = instruction_sets()
    if not names:
        raise NativeUnavailableError(
            "the package was installed without them, which is what happens where there is no C++ "
            f"compiler (g++ or clang++): {_missing}"
        )
    asked = os.environ.get(VARIABLE) or names[-1]
    if asked not in names:
        raise ValueError(f"Got {VARIABLE}={asked}; expected one of {', '.join(names)}, or nothing.")
    return asked


def said_without(reason: NativeUnavailableError) -> str:
    """Say what it means that there are no kernels."""
    return (
        "The compiled kernels for multilayer perceptrons cannot be used, so fits take several "
        f"times as long, with the same results. Reason: {reason}."
    )


# -- networks ------------------------------------------------------------------------------------

# positions in the source's `Activation`
_ACTIVATIONS: dict[type[nn.Module], int] = {
    nn.ReLU: 1,
    nn.LeakyReLU: 2,
    nn.Tanh: 3,
    nn.Sigmoid: 4,
    nn.ELU: 5,
    nn.SELU: 6,
    nn.GELU: 7,
    nn.SiLU: 8,
    nn.Softplus: 9,
    nn.Softsign: 10,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A multilayer perceptron as the kernels see it.

    Attributes
    ----------
    sizes : tuple of (n_inputs, n_outputs, activation, has_bias), for each layer
    slopes : tuple of float
        Parameter of each layer's activation.
    tensors : tuple of str or None
        Names of weight and bias of each layer in turn.
    shapes : tuple of tuple of int
        Shapes of the tensors; () for an absent bias.
    """

    sizes: tuple[tuple[int, int, int, int], ...]
    slopes: tuple[float, ...]
    tensors: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def n_weights(self) -> int:
        """Number of multiplications of a row's forward pass."""
        return sum(i * o for i, o, _, _ in self.sizes)


def activation_code(layer: nn.Module) -> tuple[int, float] | None:
    """Position of an activation in the source's list, and its parameter; None: another."""
    code = _ACTIVATIONS.get(type(layer))
    parameter = 0.0
    if isinstance(layer, nn.LeakyReLU):
        parameter = layer.negative_slope
    elif isinstance(layer, nn.ELU):
        parameter = layer.alpha
    unusual = (
        parameter < 0
        or (isinstance(layer, nn.GELU) and layer.approximate != "none")
        or (isinstance(layer, nn.Softplus) and (layer.beta, layer.threshold) != (1, 20))
    )
    return None if code is None or unusual else (code, float(parameter))


def describe(module: nn.Module) -> Layout | None:
    """Layout of a sequence of linear layers, each followed by at most one activation.

    Parameters
    ----------
    module : Module
        One whose layers do what their classes say: without hooks or tied weights.

    Returns
    -------
    layout : Layout or None
        None if the kernels do not cover the module.
    """
    if len({(p.dtype, p.device) for p in module.parameters()}) > 1:
        return None
    sizes: list[tuple[int, int, int, int]] = []
    slopes: list[float] = []
    tensors: list[str | None] = []
    shapes: list[tuple[int, ...]] = []
    for name, layer in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if type(layer) in (nn.Sequential, nn.Identity):
            continue
        if type(layer) is nn.Linear:
            bias = layer.bias is not None
            size = (layer.in_features, layer.out_features)
            # a weight may have been replaced; layers that do not fit are for torch to refuse
            if (
                layer.weight.shape != size[::-1]
                or (bias and layer.bias.shape != size[1:])
                or (sizes and sizes[-1][1] != size[0])
            ):
                return None
            sizes.append((*size, 0, int(bias)))
            slopes.append(0.0)
            tensors += [f"{prefix}weight", f"{prefix}bias" if bias else None]
            shapes += [tuple(layer.weight.shape), tuple(layer.bias.shape) if bias else ()]
            continue
        known = activation_code(layer)
        if known is None or not sizes or sizes[-1][2]:
            return None
        sizes[-1] = (*sizes[-1][:2], known[0], sizes[-1][3])
        slopes[-1] = known[1]
    if not 0 < len(sizes) <= MAX_LAYERS or any(0 in size[:2] for size in sizes):
        return None
    return Layout(tuple(sizes), tuple(slopes), tuple(tensors), tuple(shapes))


# -- calls ---------------------------------------------------------------------------------------


def _integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Kernel:
    """The compiled functions for one network, loss and number type.

    Parameters
    ----------
    layout : Layout
    loss : int
        Which of the losses of `LossOfRow` in mlp.cpp.
    parameter : float
        Of the loss, if it has one.
    integers : bool
        Whether its targets are positions of classes.
    max_grad_norm : float or None
        Norm that the gradient of a task is clipped to before each step.
    dtype : torch.dtype
    n_threads : int
        Among which large batches are divided; the results do not depend on it.

    Raises
    ------
    NativeUnavailableError
        If the package was installed without them.
    ValueError
        If an instruction set is asked for that is not there.
    """

    def __init__(
        self,
        layout: Layout,
        loss: int,
        parameter: float,
        integers: bool,
        max_grad_norm: float | None,
        dtype: torch.dtype,
        n_threads: int = 1,
    ) -> None:
        self.instructions = instruction_set()
        self._level = instruction_sets().index(self.instructions)
        self.layout = layout
        self.dtype = dtype
        self.integers = integers
        self.n_outputs = layout.sizes[-1][1]
        flat = [loss, *(number for size in layout.sizes for number in size)]
        self._sizes = _integers([len(layout.sizes), *flat])
        numbers = [*layout.slopes, parameter, max_grad_norm or 0.0]
        self._slopes = (ctypes.c_double * len(numbers))(*numbers)
        self._counts = [
            int(torch.Size(shape).numel()) if name else 0
            for name, shape in zip(layout.tensors, layout.shapes, strict=True)
        ]
        self._n_threads = n_threads

    def takes_inputs(self, X: Tensor) -> bool:
        """Whether inputs have the type and shape that the kernels are for."""
        return (
            X.device.type == "cpu"
            and X.dtype == self.dtype
            and X.ndim == 3
            and X.shape[2] == self.layout.sizes[0][0]
        )

    def takes(self, *sets: Rows) -> bool:
        """Whether sets of rows have the types and shapes that the kernels are for."""
        y_type = torch.int64 if self.integers else self.dtype
        tail = () if self.integers else (self.n_outputs,)
        return all(
            self.takes_inputs(rows.X)
            and rows.y.device.type == "cpu"
            and rows.y.dtype == y_type
            and rows.y.shape == (*rows.X.shape[:2], *tail)
            and (
                rows.weight is None
                or (rows.weight.dtype == self.dtype and rows.weight.shape == rows.X.shape[:2])
            )
            for rows in sets
        )

    def meta_step(
        self,
        params: Params,
        rates: Sequence[Params],
        support: Rows,
        query: Rows,
        *,
        steps: int,
        second_order: bool,
        rate_grads: bool,
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Params]]:
        """Query losses after adaptation, outputs, and gradients of the mean loss.

        Parameters
        ----------
        params : dict of str to Tensor
            All parameters of the network.
        rates : sequence of dicts
            Rate of each weight, with its shape; step k uses ``rates[k]``, and steps beyond the
            last one use that. A parameter that is not named does not adapt.
        support, query : Rows
        steps : int
        second_order : bool
        rate_grads : bool
            Whether gradients by the rates are asked for.
        recompute : bool
            Keep the parameters of each inner step only.

        Returns
        -------
        losses : Tensor of shape (n_tasks,)
        outputs : Tensor of shape (n_tasks, n_rows, n_outputs)
        grad : Tensor of shape (n_weights,)
            Gradients of weight and bias of each layer in turn; see `views`.
        rate_grads : list of dicts
        """
        keep: list[Any] = []
        losses = query.X.new_empty(len(query))
        # rows of padding get outputs of zero
        make = query.X.new_empty if query.lengths is None else query.X.new_zeros
        outputs = make((*query.X.shape[:2], self.n_outputs))
        grad = query.X.new_empty(sum(self._counts))
        by_rates = grad.new_empty(len(rates), len(grad)) if rate_grads else None
        work = len(query) * (
            support.X.shape[1] * steps * (9 if second_order else 3) + 3 * query.X.shape[1]
        )
        self._call(
            "meta_step",
            len(query),
            work,
            [steps, len(rates), int(second_order), int(recompute)],
            self._rows(support, keep),
            self._rows(query, keep),
            [_address(losses), _address(outputs)],
            self._tensors(params, keep),
            self._rates(rates, keep),
            [_address(grad), _address(by_rates), len(grad), 0, 0],
        )
        return losses, outputs, grad, [] if by_rates is None else [*map(self.views, by_rates)]

    def adapt(
        self,
        params: Params,
        rates: Sequence[Params],
        support: Rows,
        *,
        steps: int,
        adapted: Sequence[str],
    ) -> Params:
        """Parameters after `steps` inner steps on each support set.

        Parameters
        ----------
        params, rates : as in `meta_step`
        support : Rows
        steps : int
        adapted : sequence of str
            Names of the parameters to return.

        Returns
        -------
        params : dict of str to Tensor of shape (n_tasks, ...)
        """
        keep: list[Any] = []
        shapes = dict(zip(self.layout.tensors, self.layout.shapes, strict=True))
        result = {name: support.X.new_empty((len(support), *shapes[name])) for name in adapted}
        self._call(
            "adapt",
            len(support),
            len(support) * support.X.shape[1] * steps * 3,
            [steps, len(rates), 0, 0],
            self._rows(support, keep),
            [0] * 5,
            [0, 0],
            self._tensors(params, keep),
            self._rates(rates, keep),
            [0, 0, 0, *self._own(result, len(support), keep)],
        )
        return result

    def predict(self, own: Params, shared: Params, query: Rows) -> Tensor:
        """Return outputs (n_tasks, n_rows, n_outputs) of each task's parameters on its rows.

        Parameters
        ----------
        own : dict of str to Tensor of shape (n_tasks, ...)
        shared : dict of str to Tensor
        query : Rows
            Of which only X and the lengths matter.
        """
        keep: list[Any] = []
        make = query.X.new_empty if query.lengths is None else query.X.new_zeros
        outputs = make((*query.X.shape[:2], self.n_outputs))
        self._call(
            "predict",
            len(query),
            len(query) * query.X.shape[1],
            [0, 0, 0, 0],
            [0] * 5,
            self._rows(query, keep),
            [0, _address(outputs)],
            self._tensors(shared, keep),
            0,
            [0, 0, 0, *self._own(own, len(query), keep)],
        )
        return outputs

    def views(self, flat: Tensor) -> Params:
        """Weights and biases as named views of one flat tensor."""
        parts = flat.split(self._counts)
        named = zip(self.layout.tensors, self.layout.shapes, parts, strict=True)
        return {
            name: part if len(shape) == 1 else part.view(shape)
            for name, shape, part in named
            if name is not None
        }

    def _call(
        self,
        function: str,
        n_tasks: int,
        work: int,
        numbers: list[int],
        support: list[int],
        query: list[int],
        results: list[int],
        theta: int,
        rates: int,
        rest: list[int],
    ) -> None:
        threads = self._n_threads if 2 * work * self.layout.n_weights > PARALLEL_WORK else 1
        sizes = [ctypes.addressof(self._sizes), ctypes.addressof(self._slopes)]
        arguments = _integers(
            [n_tasks, *numbers, threads, *support, *query, *results, *sizes, theta, rates, *rest]
        )
        getattr(_kernels, function)(self._level, self.dtype == torch.float64, arguments)

    @staticmethod
    def _hold(tensor: Tensor, keep: list[Any]) -> int:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            keep.append(tensor)
        return tensor.data_ptr()

    def _rows(self, rows: Rows, keep: list[Any]) -> list[int]:
        weight = 0 if rows.weight is None else self._hold(rows.weight, keep)
        lengths = 0
        if rows.lengths is not None:
            counts = torch.as_tensor(rows.lengths, dtype=torch.int64).contiguous()
            keep.append(counts)
            lengths = counts.data_ptr()
        y = self._hold(rows.y, keep)
        return [self._hold(rows.X, keep), y, weight, lengths, rows.X.shape[1]]

    def _addresses(self, values: list[int], keep: list[Any]) -> int:
        array = _integers(values)
        keep.append(array)
        return ctypes.addressof(array)

    def _places(
        self, tensors: Params, keep: list[Any], what: str, n_tasks: tuple[int, ...] = ()
    ) -> list[int]:
        """Addresses of named tensors, 0 for absent ones. What is read there must be there."""
        places = []
        for name, shape in zip(self.layout.tensors, self.layout.shapes, strict=True):
            tensor = None if name is None else tensors.get(name)
            if tensor is None:
                places.append(0)
                continue
            expected = (*n_tasks, *shape)
            if tensor.shape != expected or tensor.dtype != self.dtype or not tensor.is_cpu:
                raise ValueError(
                    f"The {what} of {name!r} is a tensor of shape {tuple(tensor.shape)} and type "
                    f"{tensor.dtype} on {tensor.device}; expected shape {expected} and type "
                    f"{self.dtype} on the CPU."
                )
            places.append(self._hold(tensor, keep))
        return places

    def _tensors(self, params: Params, keep: list[Any]) -> int:
        return self._addresses(self._places(params, keep, "value"), keep)

    def _rates(self, rates: Sequence[Params], keep: list[Any]) -> int:
        if not rates:
            raise ValueError("The update rule's linear_rates is empty; expected at least one dict.")
        values = [place for part in rates for place in self._places(part, keep, "rate")]
        return self._addresses(values, keep)

    def _own(self, own: Params, n_tasks: int, keep: list[Any]) -> list[int]:
        names = self.layout.tensors
        places = self._places(own, keep, "value", (n_tasks,))
        strides = [
            count if name in own else 0 for name, count in zip(names, self._counts, strict=True)
        ]
        return [self._addresses(places, keep), self._addresses(strides, keep)]
