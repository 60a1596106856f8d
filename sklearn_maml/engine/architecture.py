"""What a network is made of, as far as the rungs of the engine have to know."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.engine.conv.layers import is_conv_net
from sklearn_maml.modules import ContextMLP

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LogSigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip
# layers whose output for a row depends on that row alone, so that padding rows are harmless
ROW_WISE = (
    *ELEMENTWISE, nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.GroupNorm, nn.Embedding,
    nn.InstanceNorm1d, nn.InstanceNorm2d,
)  # fmt: skip

RECURRENT = (nn.RNNBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def _leaf_modules(module: nn.Module) -> Iterable[nn.Module]:
    return (m for m in module.modules() if next(m.children(), None) is None)


def _is_altered(module: nn.Module) -> bool:
    """Whether anything makes a layer do something else than its class does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(
        any(getattr(m, name) for name in hooks)
        or hasattr(m, "parametrizations")
        or "forward" in vars(m)
        for m in module.modules()
    )


def is_row_wise(module: nn.Module) -> bool:
    """Whether each row's output is known to depend on that row alone."""
    if _is_altered(module):
        return False
    # exact container types: a subclass may do anything in its forward
    containers = (m for m in module.modules() if next(m.children(), None) is not None)
    return all(type(m) in (nn.Sequential, ContextMLP) for m in containers) and all(
        type(m) in ROW_WISE and not getattr(m, "track_running_stats", False)
        for m in _leaf_modules(module)
    )


def mixes_rows(module: nn.Module) -> bool:
    """Whether a layer may look at several rows; batch norm has its statistics given."""
    return not all(type(m) in ROW_WISE or isinstance(m, _BatchNorm) for m in _leaf_modules(module))


def has_dropout(module: nn.Module) -> bool:
    """Whether the module has dropout layers."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())


def is_spatial(module: nn.Module) -> bool:
    """Whether the module has convolutions."""
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())


def is_recurrent(module: nn.Module) -> bool:
    """Whether the module has recurrent layers.

    torch's add to products of their weights in place, which vmap can do only if the weights differ
    between tasks.
    """
    return any(isinstance(m, RECURRENT) for m in module.modules())


def attends(module: nn.Module) -> bool:
    """Whether the module is known to use attention."""
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return any(isinstance(m, kinds) for m in module.modules())


def is_stackable(module: nn.Module) -> bool:
    """Whether the module is a sequence whose forward pass can be written out for all tasks."""
    if type(module) is not nn.Sequential and type(module) is not nn.Linear:
        return False
    if _is_altered(module):
        return False
    if len({id(p) for p in module.parameters()}) < len(
        list(module.named_parameters(remove_duplicate=False))
    ):
        return False  # tied weights
    return is_conv_net(module) or all(
        type(m) in (nn.Linear, nn.Sequential, *ELEMENTWISE)
        or (type(m) is nn.LayerNorm and len(m.normalized_shape) == 1)
        for m in module.modules()
    )


def signature(module: nn.Module) -> list[Any]:
    """Return what changes with the layers, hooks and parameters of a module; not their numbers."""
    found: list[Any] = []
    left = [module]
    while left:
        parts = vars(left.pop())
        found += id(parts), len(parts), len(parts["_forward_hooks"]), len(parts["_backward_hooks"])
        found.append(len(parts["_forward_pre_hooks"]))
        for p in parts["_parameters"].values():
            found += (id(p),) if p is None else (id(p), p.requires_grad, p.dtype, p.device)
        left.extend(child for child in parts["_modules"].values() if child is not None)
    return found


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Copy layers of torch's own, whose parts are tensors and numbers; a tenth of the time."""
    new = type(module).__new__(type(module))
    parts = {n: part.copy() if isinstance(part, dict) else part for n, part in vars(module).items()}
    vars(new).update(parts)
    children = vars(new)["_modules"]
    children.update({name: _shallow_copy(child) for name, child in children.items() if child})
    return new


def private_copy(module: nn.Module, plain: bool) -> nn.Module:
    """Copy for the engine's own use, with batch norm on batch statistics.

    Batch-norm layers normalise with the statistics of the rows at hand, unless the engine gives
    them those of the support set. Running averages over tasks are not used. Layers do not work in
    place, where they would overwrite what derivatives need. Parameters are shared, not copied: they
    are always passed as dicts, and every adapted model holds such a copy. `plain` is `is_row_wise`.
    """
    if plain and type(module) is nn.Sequential:
        module = _shallow_copy(module)
    else:
        module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for m in module.modules():
        if type(m) in ELEMENTWISE and hasattr(m, "inplace"):
            vars(m)["inplace"] = False
        if isinstance(m, _BatchNorm):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None
    return module
