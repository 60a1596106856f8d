"""Graphs that stand for steps: shared in the process, captured on accelerators."""

from __future__ import annotations

import collections
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_maml.devices import backend_of
from sklearn_maml.engine.tracing.recording import (
    Function,
    Untraceable,
    first_line,
    recording,
    trace,
)
from sklearn_maml.exceptions import EngineFallbackWarning

__all__ = ["CudaGraph", "captures", "close", "module_key", "prepared", "settings_key"]

# graphs kept in the process
MAX_GRAPHS = 64
# largest difference from the eager step, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

_cache: collections.OrderedDict[Hashable, Function] = collections.OrderedDict()


def _shared_graph(
    key: Hashable,
    function: Function,
    inputs: Sequence[Tensor],
    agrees: Callable[[Function], bool],
) -> Function:
    """Graph of the process's cache if it still agrees with the step, else a new one."""
    with recording:
        graph = _cache.get(key)
        try:
            if graph is None or not agrees(graph):
                graph = trace(function, inputs)
                if not agrees(graph):
                    raise Untraceable("its graph gives other numbers than the module")
        except RuntimeError as error:
            raise Untraceable(f"its graph does not run: {first_line(error)}") from error
        _cache[key] = graph
        _cache.move_to_end(key)
        while len(_cache) > MAX_GRAPHS:
            _cache.popitem(last=False)
        return graph


class CudaGraph:
    """A function of CUDA tensors whose kernels are launched all at once.

    The kernels are captured for tensors of its own, to which arguments are copied. The next call
    overwrites what they write, so results are copies.

    Parameters
    ----------
    function : callable of tensors
        Without random numbers, and without a look at the tensors' values.
    inputs : sequence of Tensor
    backend : module
        ``torch.cuda``, or one like it.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], backend: Any) -> None:
        self._inputs = [t.detach().clone() for t in inputs]
        stream = backend.Stream()
        stream.wait_stream(backend.current_stream())
        with backend.stream(stream):
            for _ in range(3):  # libraries set themselves up in their first calls
                function(*self._inputs)
        backend.current_stream().wait_stream(stream)
        self._graph = backend.CUDAGraph()
        with backend.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Launch the kernels for other values of the inputs."""
        _copy_all(self._inputs, inputs)
        self._graph.replay()
        outputs = [torch.empty_like(output) for output in self._outputs]
        _copy_all(outputs, self._outputs)
        return outputs


def _copy_all(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors of each type in one launch."""
    for dtype in dict.fromkeys(t.dtype for t in to):
        pairs = [(t, v) for t, v in zip(to, values, strict=True) if t.dtype == dtype]
        torch._foreach_copy_([t for t, _ in pairs], [v.detach() for _, v in pairs])


def captures(device: torch.device) -> bool:
    """Whether torch can capture what it launches on a device."""
    return hasattr(backend_of(device), "CUDAGraph")


def prepared(
    key: Hashable,
    function: Function,
    inputs: Sequence[Tensor],
    agrees: Callable[[Function], bool],
    recorded: bool,
) -> Function:
    """Return what a step is replaced by, once it `agrees` with it."""
    if recorded:
        return _launched_at_once(_shared_graph(key, function, inputs, agrees), inputs)
    try:
        graph = CudaGraph(function, inputs, backend_of(inputs[0].device))
        if not agrees(graph):
            raise Untraceable("its graph gives other numbers than the module")
    except RuntimeError as error:
        raise Untraceable(f"it cannot be captured: {first_line(error)}") from error
    return graph


def _launched_at_once(graph: Function, inputs: Sequence[Tensor]) -> Function:
    """Capture a graph on CUDA, where launching kernels one by one takes longer than they do."""
    devices = {t.device for t in inputs}
    if getattr(graph, "is_random", False) or len(devices) != 1:
        return graph
    (device,) = devices
    if not captures(device):
        return graph
    try:
        return CudaGraph(graph, inputs, backend_of(device))
    except RuntimeError as error:
        warnings.warn(
            "The meta-steps run traced but cannot be captured as a CUDA graph, so they are "
            f"slower, with the same results. Reason: {first_line(error)}",
            EngineFallbackWarning,
            stacklevel=4,
        )
        return graph


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are equal to rounding."""
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = TOLERANCE.get(b.dtype, 0.0) * float(b.abs().max()) if b.numel() else 0.0
        if not bool(((a - b).abs() <= tolerance).all()):
            return False
    return True


class _Identity:
    """Stands for an object in a key, and keeps it alive so that nothing else is taken for it."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def settings_key(value: Any) -> Hashable:
    """Key equal for values that are certainly alike: plain data by value, objects by identity."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    if isinstance(value, list | tuple):
        return (type(value), *map(settings_key, value))
    if isinstance(value, dict):
        return (type(value), *((settings_key(k), settings_key(v)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(settings_key, value))
    if isinstance(value, Tensor | weakref.ref):
        # recurrent layers keep their weights in a list too; any other use is not recorded
        return Tensor
    return _Identity(value)


def module_key(module: nn.Module) -> Hashable:
    """Key equal for modules that compute alike, up to the values of parameters and buffers."""
    # tensors in two places are numbered by their first
    numbers: dict[int, int] = {}

    def tensors(part: dict[str, Tensor | None]) -> Hashable:
        return tuple(
            (name, t if t is None else (t.shape, t.dtype, numbers.setdefault(id(t), len(numbers))))
            for name, t in part.items()
        )

    parts = []
    for name, m in module.named_modules(remove_duplicate=False):
        own = dict(m.__dict__)
        parameters, buffers = own.pop("_parameters"), own.pop("_buffers")
        children = own.pop("_modules")
        kind = type(m)
        parts.append(
            (name, numbers.setdefault(id(m), len(numbers)), kind, _Identity(kind.forward),
             tensors(parameters), tensors(buffers), tuple(children), settings_key(own))
        )  # fmt: skip
    return tuple(parts)
