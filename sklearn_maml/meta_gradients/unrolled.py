"""Gradients through the inner steps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from sklearn_maml._validation import is_integer
from sklearn_maml.inner.problem import InnerProblem
from sklearn_maml.meta_gradients.base import MetaGradient
from sklearn_maml.theta import Params


class _Unrolled(MetaGradient):
    """What the gradients through the inner steps share: the loss of several steps."""

    multi_step_updates: int

    def check(self) -> None:
        """Refuse numbers of updates that are none."""
        for name in ("first_order_updates", "multi_step_updates"):
            value = getattr(self, name, 0)  # subclasses have parameters of their own
            if not is_integer(value) or value < 0:
                raise ValueError(
                    f"{name} of {type(self).__name__} must be a number of meta-updates, 0 or "
                    f"more; got {value!r}."
                )

    def check_with(
        self, *, learns: bool, all_adapt: bool, checkpoint_steps: bool, moves: bool
    ) -> None:
        """Refuse `checkpoint_steps` with the loss of several steps."""
        if self.multi_step_updates and checkpoint_steps:
            raise ValueError(
                f"multi_step_updates={self.multi_step_updates} cannot be combined with "
                "engine__checkpoint_steps=True: the loss after every step needs the graph of all "
                "of them. Use engine__checkpoint_steps=False, or multi_step_updates=0."
            )

    def phase(self, update: int) -> tuple[Hashable, int | None]:
        """Tell updates apart that compute something else; see `MetaGradient.phase`."""
        if update < self.multi_step_updates:
            return None, self.multi_step_updates
        return self.order, None

    def order_at(self, update: int) -> int:
        """Order of the derivatives at an update."""
        return self.order

    def step_weights(self, update: int, steps: int) -> list[float]:
        """Weights, of sum one, of the query losses after each inner step, at an update."""
        uniform = max(1.0 - update / self.multi_step_updates, 0.0) if self.multi_step_updates else 0
        weights = [uniform / steps] * steps
        weights[-1] += 1.0 - uniform
        return weights

    def loss_and_grad(
        self, meta_params: Params, problem: InnerProblem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the query loss; see `MetaGradient.loss_and_grad`."""
        order = self.order_at(problem.update)
        if problem.update >= self.multi_step_updates or problem.steps < 2:
            return problem.value_and_grad(
                lambda meta: problem.query_loss(problem.adapt(meta, order)), meta_params
            )
        weights = self.step_weights(problem.update, problem.steps)

        def loss(meta: Params) -> tuple[Tensor, Any]:
            outcomes: list[tuple[Tensor, Any]] = []
            problem.adapt(meta, order, lambda p: outcomes.append(problem.query_loss(p)))
            terms = [w * value for w, (value, _) in zip(weights, outcomes, strict=True)]
            return torch.stack(terms).sum(), outcomes[-1][1]

        return problem.value_and_grad(loss, meta_params)


class SecondOrder(_Unrolled):
    r"""Exact gradient through the inner steps (MAML; Finn et al. 2017, algorithm 1 line 8).

    The two parameters make the start of a meta-training easier (MAML++; Antoniou et al. 2019,
    "multi-step loss optimization" and "derivative-order annealing"). Both count meta-updates from
    the first of all fits, so that a fit that is continued (`warm_start`) makes the updates of an
    uninterrupted one.

    Parameters
    ----------
    first_order_updates : int, default=0
        So many meta-updates, the first ones, take the cheaper first-order gradients.
    multi_step_updates : int, default=0
        In so many meta-updates :math:`m`, the first ones, the loss is a weighted sum of the query
        losses after every one of the :math:`s` inner steps. In update :math:`u = 0, 1, \dots`
        the weights are :math:`w_k = (1 - u / m) / s` for :math:`k < s` and
        :math:`w_s = (1 - u / m) / s + u / m`: they are equal at first and move linearly to the
        last step alone. The losses in `history_` are those after the last step.

    References
    ----------
    .. [1] Antoniou, A., Edwards, H. & Storkey, A. (2019). How to train your MAML. ICLR. Section 4.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import SecondOrder
    >>> MAMLRegressor(update_rule="sgd", meta_gradient=SecondOrder()).meta_gradient
    SecondOrder()
    >>> reg = MAMLRegressor(update_rule="sgd", meta_gradient__first_order_updates=50)
    """

    order = 2

    def __init__(self, first_order_updates: int = 0, multi_step_updates: int = 0) -> None:
        self.first_order_updates = first_order_updates
        self.multi_step_updates = multi_step_updates

    def phase(self, update: int) -> tuple[Hashable, int | None]:
        """Tell updates apart that compute something else; see `MetaGradient.phase`."""
        phase, end = super().phase(update)
        if phase is not None and update < self.first_order_updates:
            return 1, self.first_order_updates
        return phase, end

    def order_at(self, update: int) -> int:
        """Order of the derivatives at an update."""
        return 1 if update < self.first_order_updates else 2


class FirstOrder(_Unrolled):
    """Gradient that takes the inner gradients as constants (FOMAML; Finn et al. 2017, sec. 5.2).

    Cheaper and flat in memory, and a different gradient: the curvature terms are left out.

    Parameters
    ----------
    multi_step_updates : int, default=0
        Meta-updates, the first ones, with the loss of several steps; see `SecondOrder`.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import FirstOrder
    >>> MAMLRegressor(update_rule="sgd", meta_gradient=FirstOrder()).meta_gradient
    FirstOrder()
    """

    order = 1

    def __init__(self, multi_step_updates: int = 0) -> None:
        self.multi_step_updates = multi_step_updates
