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
    Graph,
    Untraceable,
    first_line,
    recording,
    trace,
)
from sklearn_maml.exceptions import EngineFallbackWarning

# graphs kept in the process
MAX_GRAPHS = 64
# largest difference from the eager step, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# where that is not enough: in largest changes by rounding, and relative to the largest value of
# all results, at most; what arguments are changed by, in units in their last place
ROUNDING, MOST, NUDGE = 4.0, 1e-2, 8.0

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


class Results(list[Tensor]):
    """Tensors, and the one tensor whose memory they share end to end, if they do."""

    whole: Tensor | None = None


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
            function(*self._inputs)  # libraries set themselves up in their first calls
        backend.current_stream().wait_stream(stream)
        self._graph = backend.CUDAGraph()
        with backend.graph(self._graph):
            outputs = function(*self._inputs)
            self._shapes = [t.shape for t in outputs]
            self._sizes = [t.numel() for t in outputs]
            # end to end, so that a single launch copies them
            alike = len({t.dtype for t in outputs}) == 1
            self._outputs = [torch.cat([t.flatten() for t in outputs])] if alike else outputs
        kinds = dict.fromkeys(t.dtype for t in self._inputs)
        self._places = [[k for k, t in enumerate(inputs) if t.dtype == kind] for kind in kinds]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Results:
        """Launch the kernels for other values of the inputs."""
        for places in self._places:  # those of a type in one launch
            torch._foreach_copy_([self._inputs[k] for k in places], [inputs[k] for k in places])
        self._graph.replay()
        copies = [t.clone() for t in self._outputs]
        if len(copies) == len(self._shapes) > 1:
            return Results(copies)
        parts = copies[0].split(self._sizes)
        results = Results(t.view(shape) for t, shape in zip(parts, self._shapes, strict=True))
        results.whole = copies[0]
        return results


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
        graph = _shared_graph(key, function, inputs, agrees)
        launched = _launched_at_once(graph, inputs)
        if launched is not graph and not agrees(launched):
            raise Untraceable("its graph gives other numbers than the module where it is captured")
        return launched
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
    run: Function = graph
    if isinstance(graph, Graph):  # what is captured copies results by itself
        run = graph.in_branches(backend_of(device), device)
    return captured(run, inputs, "The meta-steps run traced but") or graph


def captured(function: Function, inputs: Sequence[Tensor], what: str) -> CudaGraph | None:
    """Capture a function; None, with a warning that begins with `what`, if it cannot be."""
    try:
        return CudaGraph(function, inputs, backend_of(inputs[0].device))
    except RuntimeError as error:
        warnings.warn(
            f"{what} cannot be captured as a CUDA graph, so they are slower, with the same "
            f"results. Reason: {first_line(error)}",
            EngineFallbackWarning,
            stacklevel=5,
        )
        return None


def close(
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    rounded: Callable[[], Sequence[Tensor]],
) -> bool:
    """Whether tensors are equal to rounding.

    Where they are further apart than `TOLERANCE`, `rounded` gives what they become if their
    arguments change by rounding. A gradient that is 0 but for rounding changes altogether, as of a
    bias before a batch norm; and a rectified unit whose argument is 0 but for rounding has one
    derivative or another.
    """
    changes: list[Tensor] = []
    largest = max((float(b.abs().max()) for b in expected if b.numel()), default=0.0)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        difference = (a - b).abs()
        tolerance = TOLERANCE.get(b.dtype, 0.0) * float(b.abs().max()) if b.numel() else 0.0
        if bool((difference <= tolerance).all()):
            continue
        if not changes:
            changes = [(c - d).abs() for c, d in zip(rounded(), expected, strict=True)]
        allowed = min(ROUNDING * float(changes[k].max()), MOST * largest)
        if not float(difference.max()) <= allowed:
            return False
    return True


def nudged(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Change floats by some units in their last place, up and down in turn."""

    def nudge(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        up = torch.arange(t.numel(), device=t.device).view(t.shape) % 2
        return t * (1 + NUDGE * torch.finfo(t.dtype).eps * (2 * up - 1))

    return [nudge(t.detach()) for t in inputs]


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
