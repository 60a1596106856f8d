"""Sequences of linear, elementwise and layer-norm layers: one batched product a layer.

Every task's parameters are stacked. Plain autograd, no `vmap`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.conv.layers import (
    Layer,
    Pass,
    compose,
    elementwise_layer,
    is_conv_net,
    linear_layer,
    spread,
)
from sklearn_maml.engine.forward import rounded
from sklearn_maml.engine.rungs.base import Rung
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.inner import Autograd
from sklearn_maml.inner.problem import LossOfQuery
from sklearn_maml.theta import Params, Theta


@dataclasses.dataclass(frozen=True)
class StackedForward:
    """Runs the written-out net for `n_tasks` tasks."""

    n_tasks: int
    net: Layer  # all layers, and those below the head
    body: Layer
    uses_support: bool  # whether query rows are normalised with statistics of the support set
    how: Pass = dataclasses.field(default_factory=Pass)
    batched = True

    def __call__(self, params: Params, X: Tensor) -> Tensor:
        """See `Forward`."""
        return self.net(params, X, self.how)

    def on_query(self, params: Params, support_X: Tensor, query_X: Tensor) -> Tensor:
        """See `Forward`."""
        if not self.uses_support:
            return self.net(params, query_X, self.how)
        how = dataclasses.replace(self.how, n_support=support_X.shape[1])
        return self.net(params, torch.cat([support_X, query_X], dim=1), how)

    def features(self, params: Params, X: Tensor) -> Tensor:
        """See `Forward`."""
        return self.body(params, X, Pass())

    def spread(self, params: Params) -> Params:
        """See `Forward`."""
        return spread(params, self.n_tasks)

    def over_tasks(
        self, loss: LossOfQuery, params: Params, support: Rows, query: Rows
    ) -> tuple[Tensor, Any]:
        """See `Forward`."""
        return loss(self, params, support, query)


class Stacked(Rung):
    """All tasks at once, without convolutions."""

    name = "stacked"

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        super().__init__(spec, below)
        self._write_out()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "net": None, "body": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._write_out()

    def _write_out(self) -> None:
        """Write the forward pass out, and that of all layers but the head."""
        module, head = self.spec.module, self.spec.head
        self.net = self.body = rounded(self.layers(module), self.spec.precision)
        if head is not None:
            body: nn.Module = nn.Identity()
            if head:
                shared = (*module.parameters(), *module.buffers())
                body = copy.deepcopy(module, {id(t): t for t in shared})
                parent, _, own = head.rpartition(".")
                setattr(body.get_submodule(parent), own, nn.Identity())
            self.body = rounded(self.layers(body), self.spec.precision)

    @classmethod
    def refuses(cls, spec: Spec) -> str | None:
        """See `Rung`."""
        if not spec.is_stackable or is_conv_net(spec.module):
            return "the module is no sequence of linear, elementwise and layer-norm layers"
        return None

    @property
    def recorded(self) -> Rung:
        """What vmap does makes the better graph."""
        assert self.below is not None
        return self.below.recorded

    def layers(self, module: nn.Module) -> Layer:
        """Forward pass of the module for parameters with a leading task axis."""
        return stacked_forward(module)

    def forward(self, n_tasks: int) -> StackedForward:
        """Return what runs the net for so many tasks."""
        return StackedForward(n_tasks, self.net, self.body, self.spec.uses_support)

    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """See `Rung`."""
        n_tasks = len(batch)
        forward = self.forward(n_tasks)
        problem = self.problem(
            step, forward, self.differentiator(forward), batch.support, batch.query
        )
        gradient = self.spec.meta_gradient
        grads, (_, (losses, output)) = gradient.loss_and_grad(meta_params, problem)
        return MetaStep(losses, {n: g / n_tasks for n, g in grads.items()}, output)

    def differentiator(self, forward: StackedForward) -> Autograd:
        """Return what differentiates a forward pass."""
        return Autograd()

    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """See `Rung`."""
        forward = self.forward(len(support))
        theta = Theta(forward.spread(theta.fast), forward.spread(theta.shared), theta.learned)
        return self.problem(step, forward, Autograd(), support).adapt_from(theta, 0)

    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """See `Rung`."""
        self.spec.module.eval()
        params = {**spread(adapted.shared, len(query)), **adapted.params, **adapted.statistics}
        with torch.no_grad():
            return self.run(params, query.X)

    def run(self, params: Params, X: Tensor) -> Tensor:
        """Run the net on the rows of all tasks."""
        return self.net(params, X, Pass())


def stacked_forward(module: nn.Module) -> Layer:
    """Forward pass of a stackable module for parameters with a leading task axis."""
    layers: list[Layer] = []

    def layer_norm(name: str, layer: nn.LayerNorm) -> Layer:
        def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
            x = functional.layer_norm(x, tuple(layer.normalized_shape), eps=layer.eps)
            if layer.elementwise_affine:
                x = x * params[f"{name}weight"].unsqueeze(-2)
                if layer.bias is not None:
                    x = x + params[f"{name}bias"].unsqueeze(-2)
            return x

        return forward

    # a layer without parameters may be used twice in a sequence
    for name, m in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if type(m) is nn.Linear:
            layers.append(linear_layer(prefix, m.bias is not None))
        elif type(m) is nn.LayerNorm:
            layers.append(layer_norm(prefix, m))
        elif type(m) is not nn.Sequential:
            layers.append(elementwise_layer(m))
    return compose(layers)
