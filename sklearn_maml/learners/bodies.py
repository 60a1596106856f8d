"""Networks of the members of a Gaussian head: what makes features of rows."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["MLPBody", "ModuleBody"]

Params = dict[str, Tensor]


class MLPBody(nn.Module):
    """Hidden layers of a multilayer perceptron, once for each member, side by side."""

    def __init__(
        self,
        n_members: int,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_layers = len(sizes) - 1
        self.activation = activation
        self.width = sizes[-1]
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            for name, shape in (("weight", (n_in, n_out)), ("bias", (1, n_out))):
                values = torch.rand(n_members, *shape, generator=generator, dtype=torch.float32)
                values = (2 * values - 1) / math.sqrt(n_in)
                self.register_parameter(f"{name}{k}", nn.Parameter(values))

    def features(self, params: Params, X: Tensor) -> Tensor:
        """Last hidden layer (n_members, n_rows, width) of rows (n_rows, n_features)."""
        h = X.expand(len(params["weight0"]), *X.shape) if self.n_layers else X[None]
        for k in range(self.n_layers):
            h = self.activation(torch.baddbmm(params[f"bias{k}"], h, params[f"weight{k}"]))
        return h * (2 / math.sqrt(self.width))

    def private(self) -> MLPBody:
        """Return what another thread may use: functions of parameters are safe."""
        return self


class ModuleBody(nn.Module):
    """A module without its last layer, once for each member."""

    def __init__(self, modules: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)
        self.width = width

    def features(self, params: Params, X: Tensor) -> Tensor:
        """Return inputs of the last layer (n_members, n_rows, width) of rows (n_rows, ...)."""
        first = next(iter(params.values()), None)
        X = X if first is None else X.to(first.dtype)
        outputs = []
        for j, module in enumerate(self.members):
            prefix = f"members.{j}."
            own = {n[len(prefix) :]: p for n, p in params.items() if n.startswith(prefix)}
            outputs.append(functional_call(module, own, (X,)).flatten(1))
        return torch.stack(outputs) * (2 / math.sqrt(self.width))

    def private(self) -> ModuleBody:
        """Return a copy for another thread: `functional_call` writes to the module it is given."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters()}).eval()
