"""Ways to differentiate functions of a dict of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sklearn_maml.theta import Params

LossFunction = Callable[[Params], Tensor]
Function = Callable[[list[Tensor]], list[Tensor]]


class Differentiator(ABC):
    """A way to differentiate functions of a dict of parameters."""

    @abstractmethod
    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of a scalar loss at `params`; part of a graph if `order` is 2."""

    @abstractmethod
    def value_and_grad(
        self, function: Callable[..., tuple[Tensor, Any]], *params: Params
    ) -> tuple[list[Params], tuple[Tensor, Any]]:
        """Gradients, by each argument, of the first output of `function`, and its outputs."""

    @abstractmethod
    def pull_back(self, function: Function, inputs: list[Tensor], retain: bool = True) -> Function:
        """Products of cotangents with the Jacobian of `function` at `inputs`.

        Inputs that play no part get zeros. With `retain` there may be any number of products, from
        what lives as long as what is returned; else one.
        """

    def vjp(
        self, function: Function, inputs: list[Tensor], cotangents: list[Tensor]
    ) -> list[Tensor]:
        """Product of `cotangents` with the Jacobian of `function` at `inputs`."""
        return self.pull_back(function, inputs, retain=False)(cotangents)

    @abstractmethod
    def cut(self, params: Params) -> Params:
        """Parameters cut from the graph, ready to be differentiated again."""


class Autograd(Differentiator):
    """Plain reverse mode: runs every module, those that write to buffers too."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """See `Differentiator`; unused parameters get zeros."""
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
        """See `Differentiator`."""
        leaves = [self.cut(part) for part in params]
        with torch.enable_grad():
            loss, aux = function(*leaves)
            grads = iter(self._backward(loss, [p for part in leaves for p in part.values()]))
        return [{name: next(grads) for name in part} for part in leaves], (loss.detach(), aux)

    def _backward(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def pull_back(self, function: Function, inputs: list[Tensor], retain: bool = True) -> Function:
        """See `Differentiator`."""
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


class Functorch(Differentiator):
    """`torch.func` transforms, which compose with `vmap`.

    Both orders must go through `torch.func`: plain autograd around `vmap` gives wrong second-order
    gradients for normalisation layers, silently.
    """

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """See `Differentiator`."""
        grads = torch.func.grad(loss)(params)
        return grads if order == 2 else {name: g.detach() for name, g in grads.items()}

    def value_and_grad(
        self, function: Callable[..., tuple[Tensor, Any]], *params: Params
    ) -> tuple[list[Params], tuple[Tensor, Any]]:
        """See `Differentiator`."""
        by_all = tuple(range(len(params)))
        grads, outputs = torch.func.grad_and_value(function, by_all, has_aux=True)(*params)
        return list(grads), outputs

    def pull_back(self, function: Function, inputs: list[Tensor], retain: bool = True) -> Function:
        """See `Differentiator`."""
        pull_back: Any = torch.func.vjp(function, inputs)[1]

        def products(cotangents: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():  # else it builds the graph of a further derivative
                return list(pull_back(cotangents)[0])

        return products

    def cut(self, params: Params) -> Params:
        """Detached tensors; `torch.func` needs no leaves."""
        return {name: p.detach() for name, p in params.items()}
