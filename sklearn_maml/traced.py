"""Traced steps: a function of tensors is recorded once and its flat graph run from then on.

Eager ``vmap(grad(...))`` spends most of its time in the dispatcher's layers. `trace` records the
operations that are left below them, simplifies the record without changing a number, and returns
a plain function of tensors. `Tracer` decides when that pays, by counting updates and never by the
clock, so that a fit takes the same steps on every machine.
"""

from __future__ import annotations

import collections
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sklearn_maml.compiled import Compilation, Uncompilable
from sklearn_maml.devices import (
    accelerators,
    backend_of,
    generator_states,
    set_generator_states,
)
from sklearn_maml.exceptions import EngineFallbackWarning

__all__ = ["Tracer", "Untraceable", "captures", "first_line", "module_key", "settings_key", "trace"]

# Updates still to come on a shape that make its trace pay. Tracing took 35 to 90 eager updates in
# every case measured (it grows with the graph as the updates do), and a second more where it was
# the first of the process; it saves more than half of each update that follows.
MIN_UPDATES = 1000
# Times a shape has to be seen first: one-off shapes are never traced
MIN_SEEN = 3
# Updates still to come from which a step is compiled beside the fit, and after how many of them
# the library is used; 12 to 21 s of another core, for 0.3 ms and more saved of each update.
COMPILE_FROM, COMPILE_DELAY = 100_000, 20_000
# graphs kept in the process, and traced by one fit
MAX_GRAPHS, MAX_GRAPHS_PER_FIT = 64, 16
# Elements of a constant that is computed when the graph is built; larger ones cost memory
MAX_CONSTANT = 1 << 16
# largest difference from the eager step, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Function = Callable[..., list[Tensor]]
aten = torch.ops.aten

# Operations that only say how memory is read
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.detach.default,
    aten.alias.default, aten.select.int,
}  # fmt: skip
CONSTANTS = {
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
# Python's own binding of these costs half of what a call through torch.ops does
METHODS = {
    "abs", "add", "amax", "as_strided", "baddbmm", "bmm", "clamp", "clone", "cos", "cumsum",
    "diagonal", "div", "eq", "erf", "exp", "expand", "expm1", "gather", "ge", "gt",
    "index_select", "le", "log", "log1p", "logical_and", "logical_not", "lt", "maximum", "mean",
    "minimum", "mm", "mul", "ne", "neg", "permute", "pow", "reciprocal", "relu", "reshape",
    "rsqrt", "scatter", "scatter_add", "select", "sgn", "sigmoid", "sign", "sin", "sqrt",
    "squeeze", "sub", "sum", "t", "tanh", "transpose", "unsqueeze", "view",
}  # fmt: skip
FUNCTIONS = {"addmm", "cat", "native_layer_norm", "rsub", "stack", "var_mean", "where"}


class Untraceable(Exception):  # noqa: N818 - a verdict, not a fault
    """Raised with the reason when a function cannot be traced."""


# -- deciding --------------------------------------------------------------------------------------


class Tracer:
    """Traces a step when enough updates are still to come, and runs what was traced.

    A traced step replaces the eager one from the update after it was recorded. On that update the
    eager step runs too; it is what the caller gets, and what the graph has to agree with. So a
    fit gives the same numbers whether or not the process had the graph already.

    Parameters
    ----------
    min_updates : int
        Updates to come on a shape from which it is traced.
    min_seen : int
        Times a shape is seen before it is traced.
    compile_from, compile_delay : int
        Updates to come on a shape from which it is compiled too, and how many updates later the
        library is used. It is waited for then: when it is used does not depend on the clock.

    Attributes
    ----------
    updates_left : int
        Updates still to come, as far as the caller knows; 0 traces nothing.
    reason : str or None
        Why nothing is traced any more.
    n_traced : int
        Shapes that run traced.
    compiled : bool
        Whether a library is in use.
    uncompiled_reason : str or None
        Why nothing is compiled.
    """

    def __init__(
        self,
        min_updates: int = MIN_UPDATES,
        min_seen: int = MIN_SEEN,
        compile_from: int = COMPILE_FROM,
        compile_delay: int = COMPILE_DELAY,
    ) -> None:
        self.compile_from = compile_from
        self.compile_delay = compile_delay
        self.compiled = False
        self.uncompiled_reason: str | None = None
        self._compilation: Compilation | None = None
        self._due: tuple[Hashable, int] | None = None  # its shape, and the update to use it from
        self.min_updates = min_updates
        self.min_seen = min_seen
        self.updates_left = self._others = 0
        self.reason: str | None = None
        self._updates = 0
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._graphs: dict[Hashable, Function] = {}
        self._resumed: set[Hashable] = set()  # shapes that were traced before an interruption
        self._library: Hashable = None  # the shape that is compiled

    def __getstate__(self) -> dict[str, Any]:
        # what has been seen belongs to the fit, and graphs cannot be pickled
        fresh = {"_seen": collections.Counter(), "_graphs": {}, "_updates": 0, "_resumed": set()}
        unused = {"_compilation": None, "_due": None, "_library": None, "compiled": False}
        return {**self.__dict__, **fresh, **unused}

    def progress(self) -> dict[str, Any]:
        """Return what has been decided so far, as plain data, for `resume`."""
        return {
            "updates": self._updates,
            "seen": list(self._seen.items()),
            "traced": list(self._graphs),
            "due": self._due,
            "compiled": self._library,
            "reason": self.reason,
            "uncompiled_reason": self.uncompiled_reason,
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on where another tracer, of the same fit, stood.

        Shapes that it had traced are traced when they come again, and run traced from that update
        on, so that every update of the fit takes the same graph as without the interruption.
        """
        self._updates = progress["updates"]
        self._seen = collections.Counter(dict(progress["seen"]))
        self._resumed = set(progress["traced"])
        self._due, self._library = progress["due"], progress["compiled"]
        self.reason = progress["reason"]
        self.uncompiled_reason = progress["uncompiled_reason"]

    @property
    def n_traced(self) -> int:
        """Shapes that run traced."""
        return len(self._graphs)

    def begin_update(self, others: int = 0) -> bool:
        """Count an update; return whether anything is, or may yet be, traced.

        `others` of the updates still to come, the last ones, are steps that compute something else.
        """
        self._updates += 1
        self.updates_left = max(self.updates_left - 1, 0)
        self._others = others
        waits = self._alike_left >= self.min_updates and self.reason is None
        return waits or bool(self._graphs) or bool(self._resumed)

    @property
    def _alike_left(self) -> int:
        return max(self.updates_left - self._others, 0)

    def restart(self) -> None:
        """Forget the steps so far: those to come compute something else."""
        left = self.updates_left
        self.finish()
        self.updates_left, self._updates = left, 0
        self._seen.clear()
        self._graphs.clear()
        self._resumed.clear()
        self._library = None

    def run(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        *,
        shape: Hashable,
        settings: Callable[[], Hashable],
        recorded: bool = True,
    ) -> list[Tensor] | None:
        """Run a step traced, if it is; otherwise return None, or trace it now.

        Parameters
        ----------
        function : callable (*tensors) -> list of Tensor
            The eager step.
        inputs : sequence of Tensor
        shape : hashable
            What tells the calls of this fit apart that need a graph of their own.
        settings : callable () -> hashable
            Everything the step depends on besides its inputs, to share graphs between fits.
        recorded : bool, default=True
            Whether the step is traced; otherwise its kernels are captured as they are launched,
            where the device can do that.

        Raises
        ------
        Untraceable
            Once, with the reason, if the step cannot be traced; its eager outputs are in
            ``args[1]``.
        """
        graph = self._graphs.get(shape)
        if shape in self._resumed:
            graph = self._trace_again(function, inputs, shape, settings(), recorded)
        if graph is not None:
            outputs = graph(*inputs)
            if self._due is not None and self._due[0] == shape and self._updates >= self._due[1]:
                self._use_library(shape, inputs, outputs)
            return outputs
        if self.reason is not None or len(self._graphs) >= MAX_GRAPHS_PER_FIT:
            return None
        self._seen[shape] += 1
        seen = self._seen[shape]
        if seen < self.min_seen or self._alike_left * seen < self.min_updates * self._updates:
            return None
        before = settings()
        start = _generator_states(inputs)
        expected = function(*inputs)
        if not all(bool(torch.isfinite(t).all()) for t in expected):
            return expected  # nothing to compare with; the next update may do better
        end = _generator_states(inputs)
        try:
            if settings() != before or not _same(start[:2], end[:2]):
                raise Untraceable("what it computes depends on Python state that its calls change")
            key = (before, tuple((t.shape, t.dtype, t.device) for t in inputs))

            def agrees(graph: Function) -> bool:
                _restore(inputs, start)
                got = graph(*inputs)
                return _same(_generator_states(inputs), end) and _close(got, expected)

            self._graphs[shape] = _prepared(key, function, inputs, agrees, recorded)
            if recorded and self._alike_left * seen >= self.compile_from * self._updates:
                self._start_compiling(shape, function, inputs)
        except Untraceable as error:
            self.reason = str(error)
            raise Untraceable(self.reason, expected) from error
        finally:
            _restore(inputs, end)
        return expected

    def _trace_again(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        shape: Hashable,
        settings: Hashable,
        recorded: bool,
    ) -> Function:
        """Trace what was traced before an interruption, and compile what was compiled."""
        self._resumed.discard(shape)
        key = (settings, tuple((t.shape, t.dtype, t.device) for t in inputs))
        try:
            # it agreed with the step before the interruption
            graph = _prepared(key, function, inputs, lambda graph: True, recorded)
        except Untraceable as error:
            self.reason = str(error)
            raise Untraceable(self.reason, function(*inputs)) from error
        self._graphs[shape] = graph
        if self._library == shape or (self._due is not None and self._due[0] == shape):
            due, self._due = self._due, None
            self._start_compiling(shape, function, inputs)
            self._due = due
        if self._library == shape:
            start = _generator_states(inputs)
            self._use_library(shape, inputs, self._graphs[shape](*inputs))
            _restore(inputs, start)
        return self._graphs[shape]

    def _start_compiling(
        self, shape: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> None:
        if self._due is not None:
            return  # one shape of a fit, the first
        self._due = (shape, self._updates + self.compile_delay)
        try:
            graph = record(function, inputs)
            if any(map(_is_random, graph.graph.nodes)):
                raise Uncompilable("it draws random numbers")
            self._compilation = Compilation(graph, inputs)
        except Uncompilable as error:
            self._give_up_compiling(error)

    def _use_library(
        self, shape: Hashable, inputs: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        """Run the library from the next update on, if it gives the numbers of this one."""
        self._due = (None, 0)
        if self._compilation is None:
            return
        try:
            library = self._compilation.result()
            if not _close(library(*inputs), expected):
                raise Uncompilable("the library gives other numbers than the module")
        except (Uncompilable, RuntimeError) as error:
            self._give_up_compiling(error)
        else:
            self._graphs[shape] = library
            self._library = shape
            self.compiled = True
        self._compilation = None

    def _give_up_compiling(self, error: Exception) -> None:
        self.uncompiled_reason = first_line(error)
        warnings.warn(
            "The meta-steps run traced but cannot be compiled, so they are slower, with the same "
            f"results. Reason: {self.uncompiled_reason}",
            EngineFallbackWarning,
            stacklevel=4,
        )

    def finish(self) -> None:
        """Expect no more updates; end a compilation that is under way."""
        self.updates_left = 0
        self._due = None
        if self._compilation is not None:
            self._compilation.abandon()
            self._compilation = None


_cache: collections.OrderedDict[Hashable, Function] = collections.OrderedDict()
# one thread at a time records: recording patches torch.nn.Module meanwhile
_lock = threading.RLock()


def _shared_graph(
    key: Hashable,
    function: Function,
    inputs: Sequence[Tensor],
    agrees: Callable[[Function], bool],
) -> Function:
    """Graph of the process's cache if it still agrees with the step, else a new one."""
    with _lock:
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


def _prepared(
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


def first_line(error: Exception) -> str:
    """First line of an error's message, as the reason of a fallback."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
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


# -- recording -------------------------------------------------------------------------------------


def trace(function: Function, inputs: Sequence[Tensor]) -> Function:
    """Record a function of tensors and return it as a flat graph.

    Parameters
    ----------
    function : callable (*tensors) -> list of Tensor
        Every tensor it reads has to be among its arguments.
    inputs : sequence of Tensor
        Arguments of the shapes, dtypes and devices it is recorded for. Their values are not seen,
        so a branch on a value cannot slip in.

    Returns
    -------
    traced : callable (*tensors) -> list of Tensor
        A pure function; may be called from several threads.

    Raises
    ------
    Untraceable
        If the function reads values, draws from Python's or NumPy's generator, writes to its
        arguments or fails otherwise.
    """
    return _Graph(_simplify(record(function, inputs)))


def record(function: Function, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Record a function of tensors as a graph of operations that write to nothing."""
    try:
        from torch.func import functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
    except ImportError as error:  # pragma: no cover - depends on the installed torch
        raise Untraceable(f"torch {torch.__version__} lacks {error.name}") from error
    generators = _generator_states(inputs)
    with _lock:
        try:
            # as it is run, see `_Graph`: it may read memory by the strides that it has seen
            dense = [t.contiguous() for t in inputs]
            graph = make_fx(functionalize(function), tracing_mode="fake")(*dense)
        except Exception as error:  # the module may raise anything when it is run on no values
            raise Untraceable(first_line(error)) from error
    if not _same(generators, _generator_states(inputs)):
        raise Untraceable("it draws random numbers that torch does not record")
    for node in graph.graph.nodes:
        if _mutates(node):
            raise Untraceable(f"it writes to a tensor in place ({node.target})")
    return graph


def _generator_states(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state(),
        *generator_states(accelerators(tensors)),
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if isinstance(a, Tensor | np.ndarray) else bool(a == b)


def _restore(tensors: Sequence[Tensor], states: tuple[Any, ...]) -> None:
    """Set torch's generators to earlier states."""
    set_generator_states(accelerators(tensors), states[2:])


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


class _Graph:
    """A recorded graph as a function."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._forward = graph.forward
        self.is_random = any(map(_is_random, graph.graph.nodes))

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        # the graph was recorded for contiguous inputs
        dense = [t.contiguous() for t in tensors]
        with torch.inference_mode():
            outputs = self._forward(*dense)
        # outside: tensors made inside could not be written to
        return [t.clone() for t in outputs]


# -- simplifying -----------------------------------------------------------------------------------


def _simplify(module: fx.GraphModule) -> fx.GraphModule:
    """Remove what changes no number: views of views, repeated and constant operations."""
    _fold_constants(module)
    seen: dict[Hashable, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or _is_random(node):
            continue
        same: Any = _unit(node)
        if same is None and node.target in VIEWS:
            same = _shorten_view(node)
        if same is None:
            key = _operation(node)
            same = seen.setdefault(key, node) if key is not None else node
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    _remove_dead(module)
    for node in module.graph.nodes:
        _bind(node)
    module.recompile()
    return module


def _remove_dead(module: fx.GraphModule) -> None:
    for node in reversed(list(module.graph.nodes)):
        used = node.users or node.op in ("placeholder", "output") or _is_random(node)
        if not used:
            module.graph.erase_node(node)


def _layout(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()


def _unit(node: Any) -> fx.Node | None:
    """Return the operand that the result of an operation is equal to, such as x of ``x * 1``."""
    if len(node.args) == 2 and not node.kwargs:
        x, number = node.args
        unit = {
            aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.div.Tensor: 1, aten.div.Scalar: 1,
            aten.pow.Tensor_Scalar: 1,
        }.get(node.target)  # fmt: skip
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and number == unit and _layout(node) == _layout(x) is not None:
            return x
    if node.target in VIEWS and _layout(node) == _layout(node.args[0]) is not None:
        return node.args[0]
    return None


def _shorten_view(node: Any) -> fx.Node | None:
    """Read a view of a view from the tensor at the bottom at once."""
    root = node.args[0]
    if root.target not in VIEWS:
        return None
    while root.target in VIEWS:
        root = root.args[0]
    layout, bottom = _layout(node), _layout(root)
    if layout is None or bottom is None or layout[3] != bottom[3]:
        return None
    if layout == bottom:
        return root
    node.target, node.args, node.kwargs = (
        aten.as_strided.default,
        (root, *map(list, layout[1:3])),
        {},
    )
    return None


def _operation(node: fx.Node) -> Hashable | None:
    """Key that equal operations share."""

    def freeze(value: Any) -> Hashable:
        if isinstance(value, list | tuple):
            return tuple(freeze(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, freeze(v)) for k, v in sorted(value.items()))
        return type(value), value

    try:
        key = (node.target, freeze(node.args), freeze(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute what depends on shapes alone now, with the same operations."""
    known: dict[fx.Node, Tensor] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = getattr(module, str(node.target), None)
            if isinstance(value, Tensor):
                known[node] = value
        if node.op != "call_function" or _is_random(node) or _layout(node) is None:
            continue
        fake = node.meta["val"]
        operands = node.all_input_nodes
        fixed = node.target in CONSTANTS
        if fake.numel() > MAX_CONSTANT or not (fixed or all(n in known for n in operands)):
            continue
        values = {n: known.get(n) for n in operands}
        if fixed and None in values.values():  # reads the layout of its operand, not the values
            like = operands[0].meta["val"]
            values[operands[0]] = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        known[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        name = f"_folded_{i}"
        module.register_buffer(name, value.detach())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in known)
    _remove_dead(module)


def _bind(node: Any) -> None:
    """Call an operation through Python's own binding where there is a cheaper one."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.kwargs:
        return
    name = node.target._schema.name.removeprefix("aten::")
    name = {"_unsafe_view": "view"}.get(name, name)
    if name in METHODS and isinstance(node.args[0], fx.Node):
        node.op, node.target = "call_method", name
    elif name in FUNCTIONS:
        node.target = getattr(torch, name)
