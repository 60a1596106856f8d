"""Ways to differentiate functions of a dict of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sklearn_maml.theta import Params

LossFunction = Callable[[Params], Tensor]


class Differentiator(Protocol):
    """A way to differentiate functions of a dict of parameters."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of a scalar loss at `params`."""

    def value_and_grad(
        self, function: Callable[..., tuple[Tensor, Any]], *params: Params
    ) -> tuple[list[Params], tuple[Tensor, Any]]:
        """Gradients, by each argument, of the first output of `function`, and its outputs."""

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product of `cotangents` with the Jacobian of `function` at `inputs`."""

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian of `function` at `inputs`, for any number of cotangents."""

    def cut(self, params: Params) -> Params:
        """Parameters cut from the graph, ready to be differentiated again."""


class Autograd:
    """Plain reverse mode: runs every module, those that write to buffers too."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of `loss`; unused parameters get zeros; kept in the graph for order 2."""
        with torch.enable_grad():
            grads = torch.autograd.grad(
                loss(params),
                list(params.values()),
                create_graph=order == 2,
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(params, grads, strict=True))

    def value_and_grad(
        self, function: Callable[..., tuple[Tensor, Any]], *params: Params
    ) -> tuple[list[Params], tuple[Tensor, Any]]:
        """Gradients, by each argument, of the first output of `function`, and its outputs."""
        leaves = [self.cut(part) for part in params]
        with torch.enable_grad():
            loss, aux = function(*leaves)
            grads = iter(self._backward(loss, [p for part in leaves for p in part.values()]))
        return [{name: next(grads) for name in part} for part in leaves], (loss.detach(), aux)

    def _backward(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product with the Jacobian; inputs that play no part get zeros."""
        return self.pull_back(function, inputs, retain=False)(cotangents)

    def pull_back(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        retain: bool = True,
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian from one graph, which lives as long as what is returned.

        Without `retain` it is let go of by the first product.
        """
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(leaves)
        places = [i for i, out in enumerate(outputs) if out.requires_grad]

        def products(cotangents: list[Tensor]) -> list[Tensor]:
            if not places:
                return [torch.zeros_like(x) for x in inputs]
            return list(
                torch.autograd.grad(
                    [outputs[i] for i in places],
                    leaves,
                    [cotangents[i] for i in places],
                    retain_graph=retain,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

        return products

    def cut(self, params: Params) -> Params:
        """Detached leaves that require a gradient."""
        return {name: p.detach().requires_grad_() for name, p in params.items()}


class Functorch:
    """`torch.func` transforms, which compose with `vmap`.

    Both orders must go through `torch.func`: plain autograd around `vmap` gives wrong second-order
    gradients for normalisation layers, silently.
    """

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of `loss`; detached unless order is 2."""
        grads = torch.func.grad(loss)(params)
        return grads if order == 2 else {name: g.detach() for name, g in grads.items()}

    def value_and_grad(
        self, function: Callable[..., tuple[Tensor, Any]], *params: Params
    ) -> tuple[list[Params], tuple[Tensor, Any]]:
        """Gradients, by each argument, of the first output of `function`, and its outputs."""
        by_all = tuple(range(len(params)))
        grads, outputs = torch.func.grad_and_value(function, by_all, has_aux=True)(*params)
        return list(grads), outputs

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product with the Jacobian; inputs that play no part get zeros."""
        return self.pull_back(function, inputs)(cotangents)

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian from one graph, which lives as long as what is returned."""
        pull_back: Any = torch.func.vjp(function, inputs)[1]

        def products(cotangents: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():  # else it builds the graph of a further derivative
                return list(pull_back(cotangents)[0])

        return products

    def cut(self, params: Params) -> Params:
        """Detached tensors; `torch.func` needs no leaves."""
        return {name: p.detach() for name, p in params.items()}
