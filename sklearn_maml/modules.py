"""The network of an estimator: the default one, and those that users pass."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any

import numpy as np
from torch import nn

from sklearn_maml._validation import did_you_mean

__all__ = [
    "ACTIVATIONS",
    "adapted_names",
    "build_module",
    "copy_buffers",
    "head_names",
    "make_mlp",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "logistic": nn.Sigmoid,
    "identity": nn.Identity,
}


def make_mlp(n_in: int, n_out: int, hidden: Any, activation: str) -> nn.Sequential:
    """Build the default network, a multilayer perceptron."""
    sizes = np.atleast_1d(hidden).tolist()
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be positive integers; got {hidden!r}.")
    layers: list[nn.Module] = []
    for a, b in zip([n_in, *sizes], sizes, strict=False):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1] if sizes else n_in, n_out))


def build_module(module: Any, options: dict[str, Any], sizes: dict[str, int]) -> nn.Module:
    """Build a module class; in_features and out_features are filled in where it takes them."""
    names = [name for name in inspect.signature(module.__init__).parameters if name != "self"]
    filled = {name: size for name, size in sizes.items() if name in names}
    try:
        return module(**{**filled, **options})
    except TypeError as error:
        hints = "".join(did_you_mean(name, names) for name in options if name not in names)
        raise ValueError(
            f"{module.__name__} could not be built with module__ arguments {sorted(options)}: "
            f"{error}. It takes {names}.{hints}"
        ) from error


def _trainable_names(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def head_names(module: nn.Module) -> list[str]:
    """Names of the parameters of the last layer: of the last trainable ones."""
    names = _trainable_names(module)
    return [name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0]]


def adapted_names(module: nn.Module, adapted: Any) -> list[str]:
    """Names of the parameters that adapt."""
    names = _trainable_names(module)
    if isinstance(adapted, str) and adapted == "all":
        return names
    head = head_names(module)
    if isinstance(adapted, str) and adapted == "head":
        return head
    if isinstance(adapted, str) and adapted == "body":
        chosen = [name for name in names if name not in head]
        if not chosen:
            raise ValueError("adapted='body' leaves nothing to adapt: the module is a head only.")
        return chosen
    patterns = [adapted] if isinstance(adapted, str) else list(adapted)
    chosen = [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]
    unmatched = [p for p in patterns if not fnmatch.filter(names, p)]
    if unmatched or not chosen:
        raise ValueError(
            f"adapted={adapted!r}: {unmatched} match no parameter. Expected 'all', 'head', 'body' "
            f"or patterns of these names: {names}."
        )
    return chosen


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy what forward passes wrote to the buffers of one copy of a module to another."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
