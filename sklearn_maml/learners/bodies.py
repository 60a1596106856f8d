"""Networks of the members of a Gaussian head: what makes features of rows."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sklearn_maml.theta import Params

# wave lengths, over 2 pi, in typical distances of standardised rows: from jumps to trends
LENGTHS = (0.1, 3.0)


class MLPBody(nn.Module):
    """Hidden layers of a multilayer perceptron, and waves, once for each member, side by side.

    Waves are ``cos(w'x)`` and ``sin(w'x)``: with a Gaussian prior over their weights, a Gaussian
    process of the tasks whose spectrum is learned (Lazaro-Gredilla et al. 2010). It follows smooth
    curves through few rows, which the hidden layers are slow to learn.

    Parameters
    ----------
    n_members : int
    sizes : sequence of int
        Features of a row, then units of each hidden layer.
    activation : callable
    generator : Generator, optional
    n_waves : int, default=0
        Frequencies w.
    """

    of_user = False

    def __init__(
        self,
        n_members: int,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
        n_waves: int = 0,
    ) -> None:
        super().__init__()
        self.n_layers = len(sizes) - 1
        self.activation = activation
        self.n_waves = n_waves
        self.width = sizes[-1] + 2 * n_waves
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            for name, shape in (("weight", (n_in, n_out)), ("bias", (1, n_out))):
                values = torch.rand(n_members, *shape, generator=generator, dtype=torch.float32)
                values = (2 * values - 1) / math.sqrt(n_in)
                self.register_parameter(f"{name}{k}", nn.Parameter(values))
        if n_waves:
            shortest, longest = map(math.log, LENGTHS)
            u = torch.rand(n_members, 1, n_waves, generator=generator, dtype=torch.float32)
            length = (shortest + (longest - shortest) * u).exp()
            normal = torch.randn(
                n_members, sizes[0], n_waves, generator=generator, dtype=torch.float32
            )
            self.frequency = nn.Parameter(normal / (length * math.sqrt(sizes[0])))

    @property
    def _unit(self) -> float:
        return 2 / math.sqrt(self.width - 2 * self.n_waves)

    @property
    def room_for_hinges(self) -> int:
        """Number of units that may become hinges: half of those of the narrowest layer."""
        widths = [getattr(self, f"bias{k}").shape[-1] for k in range(self.n_layers)]
        return min(widths, default=0) // 2 if isinstance(self.activation, nn.ReLU) else 0

    @torch.no_grad()
    def bend(self, member: int, feature: np.ndarray, knot: np.ndarray) -> None:
        """Make hinges of the first units of a member: 0 up to a knot, seen from 0, rising beyond.

        Where features are about their means, nothing is added to the level.
        """
        own = torch.arange(len(feature))
        side = torch.from_numpy(np.where(knot < 0, -1.0, 1.0))
        for k in range(self.n_layers):
            weight, bias = (getattr(self, f"{part}{k}")[member] for part in ("weight", "bias"))
            weight[:, own] = 0
            inputs = torch.from_numpy(feature) if k == 0 else own
            weight[inputs, own] = side.to(weight) if k == 0 else torch.ones_like(weight[0, own])
            bias[0, own] = torch.from_numpy(-np.abs(knot)).to(bias) if k == 0 else 0

    def hinges(self, X: np.ndarray, feature: np.ndarray, knot: np.ndarray) -> np.ndarray:
        """Return the features of these units (n_rows, n_hinges)."""
        rising = X[:, feature] * np.where(knot < 0, -1.0, 1.0) - np.abs(knot)
        return np.maximum(rising, 0) * self._unit

    def features(self, params: Params, X: Tensor) -> Tensor:
        """Last layer (n_members or 1, n_rows, width) of rows (n_rows, n_features)."""
        n_members = len(next(iter(params.values()))) if params else 1
        h = X.expand(n_members, *X.shape)
        for k in range(self.n_layers):
            h = self.activation(torch.baddbmm(params[f"bias{k}"], h, params[f"weight{k}"]))
        h = h * self._unit
        if not self.n_waves:
            return h
        angle = X @ params["frequency"]
        return torch.cat(
            [h, torch.cat([angle.cos(), angle.sin()], -1) / math.sqrt(self.n_waves)], -1
        )

    def private(self) -> MLPBody:
        """Return what another thread may use: functions of parameters are safe."""
        return self


class ModuleBody(nn.Module):
    """A module without its last layer, once for each member.

    Batch norms take the statistics of all rows of a meta-batch in training, and running averages
    of these otherwise: the features of a row then depend on no other row.
    """

    of_user = True  # whose modules compute in their own precision

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
            held = dict(module.named_buffers())
            # in the precision of the parameters at hand, as a layer needs them
            cast = {n: b.to(X.dtype) if b.is_floating_point() else b for n, b in held.items()}
            outputs.append(functional_call(module, {**own, **cast}, (X,)).flatten(1))
            if self.training:
                for n in [n for n in held if cast[n] is not held[n]]:
                    held[n].copy_(cast[n])
        return torch.stack(outputs) * (2 / math.sqrt(self.width))

    def private(self) -> ModuleBody:
        """Return a copy for another thread: `functional_call` writes to the module it is given."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters()}).eval()
