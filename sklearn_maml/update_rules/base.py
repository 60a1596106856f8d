"""What an update rule is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.base import BaseEstimator

from sklearn_maml.theta import Params, Theta

__all__ = ["UpdateRule", "has_linear_rates"]


class UpdateRule(BaseEstimator):
    """Base class of update rules.

    Subclasses implement `step`; those with learned rates also `initial_rates`. All tensors of
    `params` and `grads` carry a leading task axis when `batched` is true.

    Attributes
    ----------
    in_closed_form : bool
        Whether the rule solves for the adapted parameters and takes no steps; then it implements
        `ClosedFormHead.solve` in place of `step`.
    """

    in_closed_form = False

    def check(self) -> None:
        """Refuse parameters of the rule that are out of range (there are none here)."""

    def check_with(self, meta_gradient: Any, classification: bool) -> None:
        """Refuse what the rule cannot work with (there is nothing here).

        Parameters
        ----------
        meta_gradient : MetaGradient
        classification : bool
            Whether the outputs are logits.
        """

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Learned quantities of the rule, as tensors the outer loop optimises (none here).

        Parameters
        ----------
        params : dict of str to Tensor
            The adapted parameters, without a task axis.
        steps : int
            Inner steps of meta-training.
        classification : bool
            Whether the outputs are logits.

        Returns
        -------
        rates : dict of str to Tensor
            By names of parameters, or names of one's own.
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

    def adapt(
        self,
        problem: Any,
        theta: Theta,
        order: int,
        on_step: Callable[[Params], None] | None = None,
    ) -> Params:
        """Adapt to a task: by inner steps, unless a rule knows better.

        Parameters
        ----------
        problem : InnerProblem
        theta : Theta
            Where it starts.
        order : {0, 1, 2}
            Derivatives that are taken of the result; see `InnerProblem.adapt`.
        on_step : callable params -> None, optional
            Told of all parameters after every step.

        Returns
        -------
        params : dict of str to Tensor
            Those that adapt.
        """
        params: Params = problem.take_steps(theta, order, on_step)
        return params

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
            k uses entry k, and steps beyond the list use its last entry. None (the default) if
            steps of the rule are anything else. A class that overrides `step` must override
            this, too.
        """
        return None


def has_linear_rates(rule: UpdateRule) -> bool:
    """Whether `linear_rates` of a rule speaks for the `step` that it has."""

    def owner(method: str) -> type:
        return next(c for c in type(rule).__mro__ if method in c.__dict__)

    return issubclass(owner("linear_rates"), owner("step"))
