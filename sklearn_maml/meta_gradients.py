"""Meta-gradients: how the outer gradient flows through the inner loop.

Each is an object (searchable as ``meta_gradient__*``) that turns "adapt, then evaluate the query
loss" into a gradient for the meta-parameters. None of them knows how tasks are batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.base import BaseEstimator, clone
from torch import Tensor

__all__ = ["FirstOrder", "MetaGradient", "SecondOrder", "resolve_meta_gradient"]

Params = dict[str, Tensor]


class MetaGradient(BaseEstimator):
    """Base class of meta-gradients."""

    order: int

    def loss_and_grad(
        self,
        meta_params: Params,
        adapt: Callable[[Params, int], Params],
        query_loss: Callable[[Params], tuple[Tensor, Any]],
        value_and_grad: Callable[..., tuple[Params, tuple[Tensor, Any]]],
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the query loss after adaptation.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            The initialisation and what the update rule learns.
        adapt : callable (meta_params, order) -> params
            The inner loop; `order` is 2 to differentiate through its gradients, 1 to take them
            as constants.
        query_loss : callable params -> (loss, aux)
        value_and_grad : callable (function, params) -> (grads, (loss, aux))
            Differentiates a function that returns (loss, aux).

        Returns
        -------
        grads : dict of str to Tensor
        loss_and_aux : tuple
        """
        return value_and_grad(lambda meta: query_loss(adapt(meta, self.order)), meta_params)


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
        return clone(value).set_params(**options)
    if isinstance(value, str) and value in META_GRADIENTS:
        try:
            return META_GRADIENTS[value](**options)
        except TypeError as error:
            raise ValueError(
                f"meta_gradient={value!r} takes no options; got {sorted(options)}."
            ) from error
    later = " It is planned, but not in this version." if value in ("implicit", "reptile") else ""
    raise ValueError(
        f"meta_gradient={value!r} is not available.{later} Expected one of "
        f"{sorted(META_GRADIENTS)} or a MetaGradient object such as "
        "sklearn_maml.meta_gradients.SecondOrder()."
    )
