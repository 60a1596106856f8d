"""The network of an estimator: the default one, and those that users pass."""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml._validation import as_integer, did_you_mean, is_integer

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "logistic": nn.Sigmoid,
    "identity": nn.Identity,
}


def layer_sizes(hidden: Any) -> list[int]:
    """Sizes of hidden layers; a tuner may give 8.0."""
    sizes = [as_integer(size) for size in np.atleast_1d(hidden).tolist()]
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be positive integers; got {hidden!r}.")
    return sizes


def make_mlp(n_in: int, n_out: int, hidden: Any, activation: str) -> nn.Sequential:
    """Build the default network, a multilayer perceptron."""
    sizes = layer_sizes(hidden)
    layers: list[nn.Module] = []
    for a, b in zip([n_in, *sizes], sizes, strict=False):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1] if sizes else n_in, n_out))


class ContextMLP(nn.Module):
    """Multilayer perceptron that takes a context vector beside its inputs.

    With ``adapted="context"`` the context alone adapts to a task while the network is shared:
    CAVIA (Zintgraf et al. 2019, algorithm 1). The context starts at 0, as there; where the outer
    loop moves that start, it does what moving the first layer's bias would do (sec. 3).

    A module of one's own does the same with a `torch.nn.Parameter` of its own, registered before
    the layers so that ``adapted="head"`` keeps its meaning, which its `forward` uses for all rows
    alike, and ``adapted`` set to the name of that parameter.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of a row and of its output; estimators fill them in.
    hidden_layer_sizes : int or sequence of int, default=(64, 64)
        Sizes of the hidden layers.
    n_context : int, default=4
        Size of the context.
    activation : {"relu", "tanh", "gelu", "silu", "elu", "logistic", "identity"}, default="relu"
        Activation of the hidden layers.

    Attributes
    ----------
    context : torch.nn.Parameter of shape (n_context,)
        What adapts; zeros.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> from sklearn_maml.modules import ContextMLP
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(
    ...     update_rule="sgd", module=ContextMLP, module__n_context=5, adapted="context", alpha=1.0,
    ...     steps=2, max_iter=10, random_state=0,
    ... ).fit(X, y, groups=task)
    >>> reg.module_.context.shape
    torch.Size([5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_layer_sizes: Any = (64, 64),
        n_context: int = 4,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if not is_integer(n_context) or n_context < 1:
            raise ValueError(f"n_context must be a positive int; got {n_context!r}.")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is not known; expected one of {sorted(ACTIVATIONS)}."
            )
        self.context = nn.Parameter(torch.zeros(n_context))
        self.layers = make_mlp(
            in_features + n_context, out_features, hidden_layer_sizes, activation
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (n_rows, out_features) of rows (n_rows, ...), which are flattened."""
        rows = x.flatten(1)
        return self.layers(torch.cat([rows, self.context.expand(len(rows), -1)], dim=1))


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


def linear_head(module: nn.Module, adapted: Collection[str], rule: str) -> str:
    """Name of the layer that a rule in closed form solves for.

    ValueError, with the name of the rule, if other parameters adapt than those of one
    `torch.nn.Linear`, the last layer.
    """
    owners = {name.rpartition(".")[0] for name in adapted}
    name = min(owners)
    layer = module.get_submodule(name)
    prefix = f"{name}." if name else ""
    if len(owners) > 1 or set(adapted) != {f"{prefix}{n}" for n, _ in layer.named_parameters()}:
        raise ValueError(
            f"The update rule {rule} solves for the last linear layer, and nothing else adapts; "
            f"got adapted parameters {sorted(adapted)}. Set adapted='head', and freeze no part of "
            "that layer."
        )
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"The update rule {rule} solves for the last linear layer, but the parameters that "
            f"adapt, {sorted(adapted)}, are those of a {type(layer).__name__}. Use a module that "
            "ends in a torch.nn.Linear, or another update_rule."
        )
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    if type(module) is nn.Sequential and leaves[-1] is not layer:
        raise _not_last(module, name, rule)
    return name


def check_head_is_last(module: nn.Module, name: str, rows: Tensor, rule: str) -> None:
    """Refuse a module whose output for some rows is not the output of its layer `name`."""
    outputs: list[Tensor] = []
    probe = copy.deepcopy(module).eval()
    layer = probe.get_submodule(name)
    layer.register_forward_hook(lambda m, inputs, output: outputs.append(output))
    with torch.no_grad():
        result = probe(rows)
    # the very memory, written to once: the layer's output, or a view of it
    if not (
        len(outputs) == 1
        and result.data_ptr() == outputs[0].data_ptr()
        and result.shape[:1] == outputs[0].shape[:1]
        and result.numel() == outputs[0].numel()
        and result._version == 0
    ):
        raise _not_last(module, name, rule)


def _not_last(module: nn.Module, name: str, rule: str) -> ValueError:
    return ValueError(
        f"The update rule {rule} solves for the linear layer {name!r}, but what "
        f"{type(module).__name__} returns is not the output of that layer. Set adapted='head', "
        "and use a module that returns the output of its last linear layer as it is, or another "
        "update_rule."
    )


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy what forward passes wrote to the buffers of one copy of a module to another."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
