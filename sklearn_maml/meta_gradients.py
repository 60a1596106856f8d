"""Meta-gradients: how the outer gradient flows through the inner loop.

Each is an object (searchable as ``meta_gradient__*``) that turns "adapt, then evaluate the query
loss" into a gradient for the meta-parameters. None of them knows how tasks are batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sklearn.base import BaseEstimator, clone
from torch import Tensor

__all__ = ["FirstOrder", "MetaGradient", "SecondOrder", "resolve_meta_gradient"]

Params = dict[str, Tensor]


class Problem(Protocol):
    """What a meta-gradient may ask of the tasks at hand; see `inner_loop.InnerProblem`."""

    batched: bool
    update: int
    steps: int

    def start(self, meta_params: Params, /) -> tuple[Params, Params, Params]:
        """Return the parameters that adapt, those that do not, and what the rule learned."""

    def support_loss(self, params: Params, /) -> Tensor:
        """Support loss at all parameters, summed over tasks."""

    def query_loss(self, params: Params, /) -> tuple[Tensor, Any]:
        """Query loss at all parameters, summed over tasks, and what goes with it."""

    def adapt(
        self, meta_params: Params, order: int, on_step: Callable[[Params], None] | None = None
    ) -> Params:
        """All parameters after the inner steps.

        `order` is 2 to differentiate through the inner gradients, 1 to take them as constants, 0
        for parameters without a graph.
        """

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""


class MetaGradient(BaseEstimator):
    """Base class of meta-gradients.

    Attributes
    ----------
    order : int
        Derivatives it takes of what is adapted: 2 through the inner gradients, 1 with them as
        constants, 0 none.
    proximal : float
        Strength of the term ``proximal / 2 * |params - initialisation|^2`` of the support loss.
    """

    order: int
    proximal: float = 0.0

    def check(self) -> None:
        """Refuse parameters of the meta-gradient that are out of range (there are none here)."""

    def loss_and_grad(
        self, meta_params: Params, problem: Problem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the query loss after adaptation.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            The initialisation (``module.*``) and what the update rule learns (``rule.*``).
        problem : Problem
            The tasks at hand.

        Returns
        -------
        grads : dict of str to Tensor
            Of all meta-parameters, summed over the tasks.
        loss_and_aux : tuple
            What `problem.query_loss` returned.
        """
        return problem.value_and_grad(
            lambda meta: problem.query_loss(problem.adapt(meta, self.order)), meta_params
        )


class SecondOrder(MetaGradient):
    """Exact gradient through the inner steps (MAML; Finn et al. 2017, algorithm 1 line 8).

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import SecondOrder
    >>> MAMLRegressor(meta_gradient=SecondOrder()).meta_gradient
    SecondOrder()
    """

    order = 2


class FirstOrder(MetaGradient):
    """Gradient that takes the inner gradients as constants (FOMAML; Finn et al. 2017, sec. 5.2).

    Cheaper and flat in memory, and a different gradient: the curvature terms are left out.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import FirstOrder
    >>> MAMLRegressor(meta_gradient=FirstOrder()).meta_gradient
    FirstOrder()
    """

    order = 1


META_GRADIENTS: dict[str, type[MetaGradient]] = {
    "second-order": SecondOrder,
    "first-order": FirstOrder,
}


def resolve_meta_gradient(value: Any, options: dict[str, Any]) -> MetaGradient:
    """Return the meta-gradient that `meta_gradient` names."""
    if isinstance(value, MetaGradient):
        gradient = clone(value).set_params(**options)
        gradient.check()
        return gradient
    if isinstance(value, str) and value in META_GRADIENTS:
        known = sorted(META_GRADIENTS[value]().get_params())
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"meta_gradient={value!r} got the options {unknown}; it takes {known or 'none'}."
            )
        gradient = META_GRADIENTS[value](**options)
        gradient.check()
        return gradient
    later = " It is planned, but not in this version." if value in ("implicit", "reptile") else ""
    raise ValueError(
        f"meta_gradient={value!r} is not available.{later} Expected one of "
        f"{sorted(META_GRADIENTS)} or a MetaGradient object such as "
        "sklearn_maml.meta_gradients.SecondOrder()."
    )
