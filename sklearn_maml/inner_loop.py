"""The inner loop: the only place where parameters are adapted to a support set.

`adapt` is a pure function of a dict of parameters. Meta-training, adaptation, scoring and plots
all call it, each with its own way of differentiating (plain autograd or `torch.func`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sklearn_maml.update_rules import UpdateRule

__all__ = ["Autograd", "Differentiator", "Functorch", "adapt", "mean_loss"]

Params = dict[str, Tensor]
LossFunction = Callable[[Params], Tensor]


class Differentiator(Protocol):
    """A way to differentiate functions of a dict of parameters."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of a scalar loss at `params`."""

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function`, and its outputs."""

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
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""
        leaves = self.cut(params)
        with torch.enable_grad():
            loss, aux = function(leaves)
            grads = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return dict(zip(leaves, grads, strict=True)), (loss.detach(), aux)

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
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""
        return torch.func.grad_and_value(function, has_aux=True)(params)

    def cut(self, params: Params) -> Params:
        """Detached tensors; `torch.func` needs no leaves."""
        return {name: p.detach() for name, p in params.items()}


def mean_loss(row_loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of the row losses over the last axis; `weight` sums to one over it."""
    return row_loss.mean(-1) if weight is None else (row_loss * weight).sum(-1)


def adapt(
    params: Params,
    support_loss: LossFunction,
    *,
    rule: UpdateRule,
    alpha: float,
    rates: Params,
    steps: int,
    order: int,
    differentiator: Differentiator,
    batched: bool,
) -> Params:
    """Take `steps` inner steps on the support loss (Finn et al. 2017, algorithm 1 line 6).

    Parameters
    ----------
    params : dict of str to Tensor
        The adapted parameters at the initialisation.
    support_loss : callable params -> scalar Tensor
        Sum over tasks of the mean support loss.
    rule, alpha, rates : the update rule, its rate and what it learned
    steps : int
    order : {0, 1, 2}
        Derivatives the caller takes of the result: 0 none, 1 with the inner gradients as
        constants, 2 through them.
    differentiator : Differentiator
    batched : bool
        Whether the tensors have a leading task axis.

    Returns
    -------
    params : dict of str to Tensor
    """
    if order == 0:
        params = differentiator.cut(params)
    state = rule.start(params)
    for k in range(steps):
        grads = differentiator.grad(support_loss, params, order)
        params, state = rule.step(
            k, params, grads, alpha=alpha, rates=rates, state=state, batched=batched
        )
        if order == 0:
            params = differentiator.cut(params)
    return {name: p.detach() for name, p in params.items()} if order == 0 else params
