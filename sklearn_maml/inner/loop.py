"""The inner loop: the only place where parameters are adapted to a support set.

`adapt` is a pure function of a dict of parameters. Meta-training, adaptation, scoring and plots
all call it, each with its own way of differentiating (plain autograd or `torch.func`).
`RecomputedSteps` takes the same steps, for a meta-gradient that has to fit into little memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sklearn_maml.inner.differentiate import Differentiator, Params
from sklearn_maml.update_rules import ClosedFormHead, UpdateRule

__all__ = ["InnerProblem", "adapt", "mean_loss", "take_step"]

LossFunction = Callable[[Params], Tensor]
SupportSet = Callable[[], tuple[Tensor, Tensor, Tensor | None]]


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
    proximal: float = 0.0,
    on_step: Callable[[Params], None] | None = None,
    loss_of_step: Callable[[int, Params], Tensor] | None = None,
    support_set: SupportSet | None = None,
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
    proximal : float
        Strength of ``proximal / 2 * |params - initialisation|^2``, added to the support loss.
    on_step : callable params -> None, optional
        Told of the parameters after every step.
    loss_of_step : callable (k, params) -> scalar Tensor, optional
        Loss of step `k`, where steps see different rows; takes the place of `support_loss`.
    support_set : callable () -> (features, targets, weights), optional
        For rules in closed form, which solve once in place of all steps: what they solve for, see
        `ClosedFormHead.solve`.

    Returns
    -------
    params : dict of str to Tensor
    """
    if order == 0:
        params = differentiator.cut(params)
    if rule.in_closed_form and steps:
        assert isinstance(rule, ClosedFormHead)
        assert support_set is not None
        params = rule.solve(params, *support_set(), rates=rates, order=order)
        if on_step is not None:
            for _ in range(steps):  # every step would end here
                on_step(params)
        steps = 0
    initial = params
    state = rule.start(params)
    for k in range(steps):
        params, state = take_step(
            k,
            params,
            state,
            support_loss if loss_of_step is None else functools.partial(loss_of_step, k),
            initial=initial,
            rule=rule,
            alpha=alpha,
            rates=rates,
            order=order,
            differentiator=differentiator,
            batched=batched,
            proximal=proximal,
        )
        if order == 0:
            params = differentiator.cut(params)
        if on_step is not None:
            on_step(params)
    return {name: p.detach() for name, p in params.items()} if order == 0 else params


def take_step(
    k: int,
    params: Params,
    state: Any,
    support_loss: LossFunction,
    *,
    initial: Params,
    rule: UpdateRule,
    alpha: float,
    rates: Params,
    order: int,
    differentiator: Differentiator,
    batched: bool,
    proximal: float,
) -> tuple[Params, Any]:
    """Take inner step number `k`; see `adapt`."""
    grads = differentiator.grad(support_loss, params, order)
    if proximal:
        grads = {n: g + proximal * (params[n] - initial[n]) for n, g in grads.items()}
    return rule.step(k, params, grads, alpha=alpha, rates=rates, state=state, batched=batched)


@dataclasses.dataclass
class InnerProblem:
    """Adapting to the support sets at hand, and the query loss afterwards.

    This is what a meta-gradient gets to differentiate; it does not know how tasks are batched.

    Attributes
    ----------
    start : callable meta_params -> (fast, shared, rates)
        The parameters that adapt, those that do not, and what the rule learned.
    support_loss : callable params -> scalar Tensor
        Of all parameters; the sum over tasks.
    query_loss : callable params -> (scalar Tensor, aux)
        Of all parameters; the sum over tasks.
    rule, alpha, steps, differentiator, batched, proximal : as in `adapt`
    update : int
        Meta-updates made before, for gradients that change in the course of the training.
    loss_of_step : as in `adapt`, of all parameters
    support_set : callable params -> (features, targets, weights), optional
        Of all parameters; for rules in closed form, see `adapt`.
    """

    start: Callable[[Params], tuple[Params, Params, Params]]
    support_loss: LossFunction
    query_loss: Callable[[Params], tuple[Tensor, Any]]
    rule: UpdateRule
    alpha: float
    steps: int
    differentiator: Differentiator
    batched: bool
    proximal: float = 0.0
    update: int = 0
    loss_of_step: Callable[[int, Params], Tensor] | None = None
    support_set: Callable[[Params], tuple[Tensor, Tensor, Tensor | None]] | None = None

    @property
    def how(self) -> dict[str, Any]:
        """How a step is taken: arguments of `adapt`."""
        return {
            "rule": self.rule,
            "alpha": self.alpha,
            "differentiator": self.differentiator,
            "batched": self.batched,
            "proximal": self.proximal,
        }

    def adapt(
        self,
        meta_params: Params,
        order: int,
        on_step: Callable[[Params], None] | None = None,
    ) -> Params:
        """All parameters after the inner steps; `order` as in `adapt`.

        `on_step` is told of all parameters after every step.
        """
        fast, shared, rates = self.start(meta_params)
        of_step = self.loss_of_step
        support_set = self.support_set
        initial = {**shared, **fast}
        fast = adapt(
            fast,
            lambda p: self.support_loss({**shared, **p}),
            rates=rates,
            steps=self.steps,
            order=order,
            on_step=None if on_step is None else lambda p: on_step({**shared, **p}),
            loss_of_step=None if of_step is None else lambda k, p: of_step(k, {**shared, **p}),
            support_set=None if support_set is None else lambda: support_set(initial),
            **self.how,
        )
        return {**shared, **fast}

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at the meta-parameters, and its outputs."""
        return self.differentiator.value_and_grad(function, params)

    def support_grad(self, fast: Params, meta_params: Params) -> Params:
        """Gradient of the support loss in the parameters that adapt, in the graph of both."""
        shared = self.start(meta_params)[1]
        return self.differentiator.grad(lambda p: self.support_loss({**shared, **p}), fast, 2)

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian of `function` at `inputs`, for any number of cotangents."""
        return self.differentiator.pull_back(function, inputs)
