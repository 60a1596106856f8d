"""Operations of a recorded graph put together, where a launch takes longer than what it does."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Operations that only say how memory is read, from the same place on
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.detach.default,
    aten.alias.default,
}  # fmt: skip

# Operations that are joined: on an H200 one of a list took as long as four of small tensors
LEAST = 5
# what one operation of torch does to a list of tensors
OF_LISTS: dict[Any, Any] = {
    aten.mul.Tensor: torch._foreach_mul,
    aten.sub.Tensor: torch._foreach_sub,
    aten.add.Tensor: torch._foreach_add,
}


def fuse(module: fx.GraphModule) -> None:
    """Put operations together that make the same change to several tensors, one after another.

    So do those that move the parameters of all layers by an inner step, and their derivatives.
    """
    for node in list(module.graph.nodes):
        _take_factor(node)
    group: list[fx.Node] = []
    for node in [*module.graph.nodes, None]:
        if node is not None and (node.op == "get_attr" or node.target in VIEWS):
            if not set(node.all_input_nodes) & {*group}:
                continue
        elif node is not None and _kind(node) is not None:
            reads = set(node.all_input_nodes) & {*group}
            if group and _kind(node) == _kind(group[0]) and not reads:
                group.append(node)
                continue
        if len(group) >= LEAST:
            _join(module.graph, group)
        group = [] if node is None or _kind(node) is None else [node]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _take_factor(node: Any) -> None:
    """Let an addition or a subtraction multiply its second operand."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return
    first, product = node.args
    if not isinstance(first, fx.Node) or getattr(product, "target", None) != aten.mul.Tensor:
        return
    if len(product.users) == 1 and _number(product.args[1]) and first is not product:
        node.args, node.kwargs = (first, product.args[0]), {"alpha": product.args[1]}
        product.graph.erase_node(product)


def _kind(node: Any) -> Any:
    """Return what operations share that can be joined; None for those that cannot."""
    if node.target not in OF_LISTS or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    first, second = node.args
    if not isinstance(first, fx.Node):
        return None
    factor = second if _number(second) else None
    if (node.target is aten.mul.Tensor) != (factor is not None):
        return None
    return node.target, factor, node.kwargs.get("alpha"), node.meta["val"].dtype


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    lists = [list(operand) for operand in zip(*(node.args for node in group), strict=True)]
    target: Any = group[0].target
    factor = lists[1][0] if target is aten.mul.Tensor else lists[1]
    with graph.inserting_after(group[-1]):
        joined = graph.call_function(OF_LISTS[target], (lists[0], factor), dict(group[0].kwargs))
    for k, node in reversed([*enumerate(group)]):
        with graph.inserting_after(joined):
            part = graph.call_function(operator.getitem, (joined, k))
        part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part)
        graph.erase_node(node)
