"""Functions of tensors, recorded and simplified."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sklearn_maml.devices import accelerators, generator_states, set_generator_states
from sklearn_maml.engine.tracing.branches import InBranches
from sklearn_maml.engine.tracing.fusing import VIEWS, fuse

# Elements of a constant that is computed when the graph is built; larger ones cost memory
MAX_CONSTANT = 1 << 16

Function = Callable[..., list[Tensor]]
aten = torch.ops.aten

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


# one thread at a time records: recording patches torch.nn.Module meanwhile
recording = threading.RLock()


def first_line(error: Exception) -> str:
    """First line of an error's message, as the reason of a fallback."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def trace(function: Function, inputs: Sequence[Tensor]) -> Function:
    """Record a function of tensors and return it as a flat graph.

    Parameters
    ----------
    function : callable (*tensors) -> list of Tensor
        Every tensor it reads has to be among its arguments.
    inputs : sequence of Tensor
        Arguments of the shapes, dtypes and devices it is recorded for. A branch on a value cannot
        slip in, as torch refuses to look at the values of what it records.

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
    module = record(function, inputs)
    _simplify(module)
    if accelerators(inputs):
        fuse(module)
    for node in module.graph.nodes:
        _bind(node)
    module.recompile()
    return Graph(module)


def record(function: Function, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Record a function of tensors as a graph of operations that write to nothing."""
    try:
        from torch.func import functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
    except ImportError as error:  # pragma: no cover - depends on the installed torch
        raise Untraceable(f"torch {torch.__version__} lacks {error.name}") from error
    before = states_of(inputs)
    # copies, as it may write to them; dense, as it is run: see `Graph`
    dense = [t.detach().contiguous().clone() for t in inputs]
    with recording:
        try:
            # on values, as without them torch is wrong about the strides of some results, by which
            # memory is read
            graph = make_fx(functionalize(function), tracing_mode="real")(*dense)
        except Exception as error:  # the module may raise anything
            raise Untraceable(first_line(error)) from error
        finally:
            after = states_of(inputs)
            restore(inputs, before)
    if not same(before[:2], after[:2]):
        raise Untraceable("it draws random numbers that torch does not record")
    for node in graph.graph.nodes:
        if _mutates(node):
            raise Untraceable(f"it writes to a tensor in place ({node.target})")
        # what is made in the function is marked by torch
        if node.op == "get_attr" and any("lift_fresh" not in str(u.target) for u in node.users):
            raise Untraceable("it reads a tensor that is no parameter and no buffer")
    return graph


def states_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the states of Python's, NumPy's and torch's random numbers."""
    return (
        random.getstate(),
        np.random.get_state(),
        *generator_states(accelerators(tensors)),
    )


def same(a: Any, b: Any) -> bool:
    """Whether states are equal."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool((a == b).all()) if isinstance(a, Tensor | np.ndarray) else bool(a == b)


def restore(tensors: Sequence[Tensor], states: tuple[Any, ...]) -> None:
    """Set torch's generators to earlier states."""
    set_generator_states(accelerators(tensors), states[2:])


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


class Graph:
    """A recorded graph as a function."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module = graph
        self._forward = graph.forward
        self.is_random = any(map(is_random, graph.graph.nodes))

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Run the graph."""
        # outside: tensors made inside could not be written to
        return [t.clone() for t in self.run(*tensors)]

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """Run the graph for tensors that can only be read."""
        return self._run(self._forward, tensors)

    def in_branches(self, backend: Any, device: torch.device) -> Function:
        """Return what runs the graph on several streams of a device."""
        if not InBranches.can_run(self.module, backend):
            return self.run
        run = InBranches(self.module, backend, device).run
        return lambda *tensors: self._run(run, tensors)

    @staticmethod
    def _run(run: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
        # it was recorded for contiguous inputs
        dense = [t.contiguous() for t in tensors]
        with torch.inference_mode():
            return list(run(*dense))


# -- simplifying -----------------------------------------------------------------------------------


def _simplify(module: fx.GraphModule) -> None:
    """Remove what changes no number: views of views, repeated and constant operations."""
    _fold_constants(module)
    seen: dict[Hashable, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or is_random(node):
            continue
        _take_sign(node)
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


def _remove_dead(module: fx.GraphModule) -> None:
    for node in reversed(list(module.graph.nodes)):
        used = node.users or node.op in ("placeholder", "output") or is_random(node)
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
        if node.target is aten.add.Tensor:
            for one, other in ((x, number), (number, x)):
                is_zero = isinstance(other, fx.Node) and other.meta.get("is_zero")
                if is_zero and _layout(node) == _layout(one) is not None:
                    return one
    if node.target in VIEWS and _layout(node) == _layout(node.args[0]) is not None:
        return node.args[0]
    return None


def _take_sign(node: Any) -> None:
    """Let a product with a number change the sign of its operand."""
    if node.target is not aten.mul.Tensor or node.kwargs:
        return
    negated, number = node.args
    if getattr(negated, "target", None) is not aten.neg.default or not isinstance(number, float):
        return
    if _layout(negated) == _layout(negated.args[0]):
        node.args = (negated.args[0], -number)


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
        if node.op != "call_function" or is_random(node) or _layout(node) is None:
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
    made: dict[Hashable, fx.Node] = {}  # equal constants are one
    for i, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        own = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        key = (_layout(node), own.tobytes())
        constant = made.get(key)
        if constant is None:
            name = f"_folded_{i}"
            module.register_buffer(name, value.detach())
            with graph.inserting_before(node):
                constant = made[key] = graph.get_attr(name)
            constant.meta |= {"val": node.meta["val"], "is_zero": not own.any()}
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
