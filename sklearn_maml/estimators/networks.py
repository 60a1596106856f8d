"""Making the networks of an estimator, and trying them out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sklearn_maml.modules import build_module, make_mlp
from sklearn_maml.targets.base import Targets


def _way_out(module: Any) -> str:
    """Say how to give what is no module."""
    if isinstance(module, functools.partial) and isinstance(module.func, type):
        options = "".join(f", module__{name}={value!r}" for name, value in module.keywords.items())
        return f"Pass module={module.func.__name__}{options}."
    if callable(module):
        return (
            "A function that builds a network is not accepted: wrap it in a torch.nn.Module class, "
            "or pass the network that it builds."
        )
    return "For the default network leave module out, and set hidden_layer_sizes."


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Makes networks of the parameter `module`, for the tasks at hand."""

    module: Any
    options: dict[str, Any]  # ``module__*``
    hidden_layer_sizes: Any  # of the default network, as its activation
    activation: str
    feature_shape: tuple[int, ...]  # of a row
    reshape: Callable[[Tensor], Tensor]  # makes rows as the network takes them
    targets: Targets
    device: torch.device
    dtype: torch.dtype

    def make(self) -> nn.Module:
        """Make a network, or copy the one that was given."""
        options = self.options
        n_outputs = self.targets.n_outputs
        if self.module is None:
            if options:
                raise ValueError(
                    f"module__{next(iter(options))} was given, but module is None and the default "
                    "network takes hidden_layer_sizes and activation only. Pass a module class."
                )
            module: nn.Module = make_mlp(
                int(np.prod(self.feature_shape)),
                n_outputs,
                self.hidden_layer_sizes,
                self.activation,
            )
        elif isinstance(self.module, torch.jit.ScriptModule):
            raise ValueError(
                f"module is TorchScript, a {type(self.module).__name__}, whose parameters belong "
                "to compiled code. Pass the torch.nn.Module that it was made from; what adapts "
                "can be exported afterwards (adapted_module)."
            )
        elif isinstance(self.module, nn.Module):
            if options:
                raise ValueError(
                    f"module__{next(iter(options))} was given, but module is an instance, already "
                    "built. Pass the class instead, to build it with module__* arguments."
                )
            module = copy.deepcopy(self.module)
        elif isinstance(self.module, type) and issubclass(self.module, nn.Module):
            sizes = {"in_features": int(np.prod(self.feature_shape)), "out_features": n_outputs}
            module = build_module(self.module, options, sizes)
        else:
            raise ValueError(
                f"module must be None, a torch.nn.Module class or an instance; got "
                f"{self.module!r}. {_way_out(self.module)}"
            )
        if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            # lazy layers learn their sizes from the rows they see first
            module = module.to(device=self.device, dtype=self.dtype)
            with torch.no_grad():
                module(self.two_rows())
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("module has no trainable parameters, so there is nothing to adapt.")
        return module.to(device=self.device, dtype=self.dtype)

    def two_rows(self) -> Tensor:
        """Rows to try a module on."""
        shape = (2, *self.feature_shape)
        return self.reshape(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def check(self, module: nn.Module) -> None:
        """Run the module once, so that a wrong one is refused before training starts."""
        n_outputs = self.targets.n_outputs
        rows = self.two_rows()
        probe = copy.deepcopy(module).eval()
        for layer in probe.modules():
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()  # those of a copy lie apart, of which cuDNN warns
        try:
            with torch.no_grad():
                output = probe(rows)
        except Exception as error:
            raise ValueError(
                f"module {type(module).__name__} failed on two rows of shape "
                f"{tuple(rows.shape)}: {error}"
            ) from error
        expected: list[tuple[int, ...]] = [(2, n_outputs)]
        if n_outputs == 1 and not self.targets.are_classes:
            expected.append((2,))
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if got not in expected:
            raise ValueError(
                f"module {type(module).__name__} returns {got} for 2 rows; expected a tensor of "
                f"shape {expected[0]}: one column for each {self.targets.word}."
            )
