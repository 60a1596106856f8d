"""Update rules: how one inner step moves the adapted parameters.

A rule is a small object with parameters of its own (searchable as ``update_rule__*``); what it
*learns* (rates, say) are meta-parameters that the outer loop optimises beside the initialisation.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

__all__ = ["SGD", "MetaSGD", "UpdateRule", "has_linear_rates", "resolve_update_rule"]

Params = dict[str, Tensor]


class UpdateRule(BaseEstimator):
    """Base class of update rules.

    Subclasses implement `step`; those with learned rates also `initial_rates`. All tensors of
    `params` and `grads` carry a leading task axis when `batched` is true.
    """

    def check(self) -> None:
        """Refuse parameters of the rule that are out of range (there are none here)."""

    def initial_rates(self, params: Params) -> Params:
        """Learned quantities of the rule, as tensors the outer loop optimises (none here).

        Parameters
        ----------
        params : dict of str to Tensor
            The adapted parameters, without a task axis.

        Returns
        -------
        rates : dict of str to Tensor
        """
        return {}

    def start(self, params: Params) -> Any:
        """State carried from step to step (none here).

        Parameters
        ----------
        params : dict of str to Tensor
            The initialisation.

        Returns
        -------
        state : object
        """
        return None

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move the parameters by one inner step.

        Parameters
        ----------
        k : int
            Number of the step, from 0.
        params, grads : dict of str to Tensor
            Parameters and the gradient of the support loss at them.
        alpha : float
            Inner rate.
        rates : dict of str to Tensor
            Current values of what `initial_rates` returned.
        state : object
            What the previous step (or `start`) returned.
        batched : bool
            Whether the tensors have a leading task axis.

        Returns
        -------
        params : dict of str to Tensor
        state : object
        """
        raise NotImplementedError

    def linear_rates(self, params: Params, *, alpha: float, rates: Params) -> list[Params] | None:
        """Rates of a rule whose step is ``params - rate * gradient``, for compiled kernels.

        Parameters
        ----------
        params : dict of str to Tensor
            The adapted parameters, without a task axis.
        alpha : float
            Inner rate.
        rates : dict of str to Tensor
            Current values of what `initial_rates` returned.

        Returns
        -------
        linear_rates : list of dicts of str to Tensor, or None
            A rate for each weight, with the shapes of `params`, differentiable in `rates`; step
            k uses the entry ``k % len(linear_rates)``. None (the default) if steps of the rule
            are anything else. A class that overrides `step` must override this, too.
        """
        return None


def has_linear_rates(rule: UpdateRule) -> bool:
    """Whether `linear_rates` of a rule speaks for the `step` that it has."""

    def owner(method: str) -> type:
        return next(c for c in type(rule).__mro__ if method in c.__dict__)

    return issubclass(owner("linear_rates"), owner("step"))


def clip_gradient(grads: Params, max_norm: float, batched: bool) -> Params:
    """Scale the gradient of each task to at most `max_norm` (2-norm over all parameters)."""
    squares = [
        g.square().flatten(1).sum(1) if batched else g.square().sum() for g in grads.values()
    ]
    norm = torch.stack(squares).sum(0)
    # eps inside the root: the derivative of sqrt is infinite at 0
    scale = (max_norm / (norm + 1e-12).sqrt()).clamp(max=1.0)
    return {
        name: g * (scale.reshape(-1, *[1] * (g.ndim - 1)) if batched else scale)
        for name, g in grads.items()
    }


class SGD(UpdateRule):
    """Plain gradient steps, ``theta <- theta - alpha * gradient`` (Finn et al. 2017, eq. 1).

    Parameters
    ----------
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.update_rules import SGD
    >>> reg = MAMLRegressor(update_rule=SGD(max_grad_norm=10.0))
    >>> reg.set_params(update_rule__max_grad_norm=1.0).update_rule
    SGD(max_grad_norm=1.0)
    """

    def __init__(self, max_grad_norm: float | None = None) -> None:
        self.max_grad_norm = max_grad_norm

    def check(self) -> None:
        """Refuse a `max_grad_norm` that is not positive."""
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm of the update rule must be positive or None; got "
                f"{self.max_grad_norm!r}."
            )

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move the parameters by ``-alpha * grads``; see `UpdateRule.step`."""
        if self.max_grad_norm is not None:
            grads = clip_gradient(grads, self.max_grad_norm, batched)
        return {name: p - alpha * grads[name] for name, p in params.items()}, state

    def linear_rates(self, params: Params, *, alpha: float, rates: Params) -> list[Params] | None:
        """`alpha` for every weight, unless gradients are clipped; see `UpdateRule.linear_rates`."""
        if self.max_grad_norm is not None:
            return None
        return [{name: torch.full_like(p, alpha) for name, p in params.items()}]


class MetaSGD(SGD):
    """Gradient steps with a learned rate for each parameter (Li et al. 2017, eq. 2).

    The rate of a parameter is ``alpha * exp(s)`` with ``s`` meta-learned from 0, so it stays
    positive and still scales with `alpha`.

    Parameters
    ----------
    per : {"weight", "tensor"}, default="weight"
        One rate for each single weight, as published, or one for each parameter tensor.
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.update_rules import MetaSGD
    >>> MAMLRegressor(update_rule=MetaSGD(per="tensor")).update_rule
    MetaSGD(per='tensor')
    """

    def __init__(self, per: str = "weight", max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm=max_grad_norm)
        self.per = per

    def check(self) -> None:
        """Refuse a `per` that is not known."""
        super().check()
        if self.per not in ("weight", "tensor"):
            raise ValueError(
                f"MetaSGD got per={self.per!r}; expected 'weight' (a rate for each weight) or "
                "'tensor' (a rate for each parameter tensor)."
            )

    def initial_rates(self, params: Params) -> Params:
        """Log-factors of the rates, all 0; see `UpdateRule.initial_rates`."""
        return {
            name: torch.zeros_like(p) if self.per == "weight" else p.new_zeros(())
            for name, p in params.items()
        }

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move each parameter by its own rate; see `UpdateRule.step`."""
        scaled = {name: g * rates[name].exp() for name, g in grads.items()}
        return super().step(
            k, params, scaled, alpha=alpha, rates=rates, state=state, batched=batched
        )

    def linear_rates(self, params: Params, *, alpha: float, rates: Params) -> list[Params] | None:
        """Learned rates, unless gradients are clipped; see `UpdateRule.linear_rates`."""
        if self.max_grad_norm is not None:
            return None
        return [{name: (alpha * rates[name].exp()).expand_as(p) for name, p in params.items()}]


UPDATE_RULES: dict[str, type[UpdateRule]] = {"sgd": SGD, "meta-sgd": MetaSGD}


def resolve_update_rule(value: Any, options: dict[str, Any]) -> UpdateRule:
    """Return the rule that `update_rule` names, built with ``update_rule__*`` options."""
    if isinstance(value, UpdateRule):
        rule = clone(value).set_params(**options)
        rule.check()
        return rule
    if isinstance(value, str) and value in UPDATE_RULES:
        try:
            rule = UPDATE_RULES[value](**options)
            rule.check()
            return rule
        except TypeError as error:
            known = sorted(UPDATE_RULES[value]().get_params())
            raise ValueError(
                f"update_rule={value!r} got the options {sorted(options)}; it takes {known}."
            ) from error
    raise ValueError(
        f"update_rule={value!r} is not known. Expected one of {sorted(UPDATE_RULES)} or an "
        "UpdateRule object such as sklearn_maml.update_rules.SGD()."
    )
