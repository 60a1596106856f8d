"""The inner loop: the only place where parameters are adapted to a support set.

Meta-training, adaptation, scoring and plots all solve an `InnerProblem`, each with its own way of
running the module and of differentiating (plain autograd or `torch.func`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sklearn_maml.data.episodes import Rows
from sklearn_maml.inner.differentiate import Differentiator
from sklearn_maml.theta import Params, Parts, Theta
from sklearn_maml.update_rules import TaskSolver

OnStep = Callable[[Params], None]
LossOfQuery = Callable[["Forward", Params, Rows, Rows], tuple[Tensor, Any]]


class Forward(Protocol):
    """A way to run a module with parameters that are given."""

    @property
    def batched(self) -> bool:
        """Whether all tensors have a leading task axis."""

    def __call__(self, params: Params, X: Tensor) -> Tensor:
        """Return outputs of rows."""

    def on_query(self, params: Params, support_X: Tensor, query_X: Tensor) -> Tensor:
        """Return outputs of query rows; batch norm may take the statistics of the support rows."""

    def features(self, params: Params, X: Tensor) -> Tensor:
        """Return inputs of the layer that a rule in closed form solves for."""

    def spread(self, params: Params) -> Params:
        """Give parameters that the tasks share a task axis, where there is one."""

    def over_tasks(
        self, loss: LossOfQuery, params: Params, support: Rows, query: Rows
    ) -> tuple[Tensor, Any]:
        """Return `loss` of the tasks at hand, for all of them or a few at a time."""


def mean_loss(row_loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of the row losses over the last axis; `weight` sums to one over it."""
    return row_loss.mean(-1) if weight is None else (row_loss * weight).sum(-1)


def fit_outputs(output: Tensor, y: Tensor) -> Tensor:
    """Accept modules that return (n_rows,) for one output."""
    return output.unsqueeze(-1) if output.ndim == y.ndim - 1 and y.is_floating_point() else output


@dataclasses.dataclass
class InnerProblem:
    """Adapting to the support sets at hand, and the query loss afterwards.

    This is what a meta-gradient gets to differentiate; it does not know how tasks are batched.
    """

    parts: Parts
    row_loss: Callable[[Tensor, Tensor], Tensor]  # (output, y) -> losses of the rows
    rule: TaskSolver
    alpha: float
    steps: int
    proximal: float  # of ``proximal / 2 * |params - initialisation|^2`` in the support loss
    in_minibatches: bool  # whether steps see minibatches of the support rows, see `Rows.minibatch`
    forward: Forward
    differentiator: Differentiator
    support: Rows
    query: Rows
    update: int = 0  # meta-updates made before, for gradients that change with them

    @property
    def batched(self) -> bool:
        """Whether tensors have a leading task axis."""
        return self.forward.batched

    def start(self, meta_params: Params) -> Theta:
        """Return the parameters that adapt, those that do not, and what the rule learned."""
        theta = self.parts.part(meta_params)
        spread = self.forward.spread
        return Theta(spread(theta.fast), spread(theta.shared), theta.learned)

    # -- losses ----------------------------------------------------------------------------------

    def support_loss(self, params: Params, k: int = 0) -> Tensor:
        """Return the support loss of step `k` at all parameters, summed over tasks."""
        rows = self._rows(k)
        return self._losses(self.forward(params, rows.X), rows)[0].sum()

    def query_loss(self, params: Params) -> tuple[Tensor, Any]:
        """Return the query loss at all parameters, summed over tasks; beside it losses, outputs."""
        # batch norm takes the statistics of the first minibatch
        return self.forward.over_tasks(self._loss_of_query, params, self._rows(0), self.query)

    def _loss_of_query(
        self, forward: Forward, params: Params, support: Rows, query: Rows
    ) -> tuple[Tensor, Any]:
        losses, output = self._losses(forward.on_query(params, support.X, query.X), query)
        return losses.sum(), (losses.detach(), output.detach())

    def _losses(self, output: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        output = fit_outputs(output, rows.y)
        return mean_loss(self.row_loss(output, rows.y), rows.weight), output

    def _rows(self, k: int) -> Rows:
        """Support rows that step `k` sees."""
        if not self.in_minibatches:
            return self.support
        return self.support.minibatch(k, axis=2 if self.batched else 1)

    # -- steps -----------------------------------------------------------------------------------

    def adapt(self, meta_params: Params, order: int, on_step: OnStep | None = None) -> Params:
        """All parameters after the inner steps (Finn et al. 2017, algorithm 1 line 6).

        Parameters
        ----------
        meta_params : dict of str to Tensor
        order : {0, 1, 2}
            Derivatives the caller takes of the result: 0 none, 1 with the inner gradients as
            constants, 2 through them.
        on_step : callable params -> None, optional
            Told of all parameters after every step.
        """
        theta = self.start(meta_params)
        return {**theta.shared, **self.adapt_from(theta, order, on_step)}

    def adapt_from(self, theta: Theta, order: int, on_step: OnStep | None = None) -> Params:
        """Return what `adapt` does of the parameters that adapt alone."""
        if order == 0:
            theta = dataclasses.replace(theta, fast=self.differentiator.cut(theta.fast))
        fast = self.rule.adapt(self, theta, order, on_step) if self.steps else theta.fast
        return {name: p.detach() for name, p in fast.items()} if order == 0 else fast

    def take_steps(self, theta: Theta, order: int, on_step: OnStep | None) -> Params:
        """Take all steps of a rule that takes steps."""
        fast, state = theta.fast, self.rule.start(theta.fast)
        for k in range(self.steps):
            fast, state = self.step(k, theta, fast, state, order)
            if order == 0:
                fast = self.differentiator.cut(fast)
            if on_step is not None:
                on_step({**theta.shared, **fast})
        return fast

    def gradient(self, k: int, theta: Theta, fast: Params, order: int) -> Params:
        """Gradient of the support loss of step `k` at `fast`, with the proximal term to `theta`."""
        grads = self.differentiator.grad(
            lambda p: self.support_loss({**theta.shared, **p}, k), fast, order
        )
        if self.proximal:
            grads = {n: g + self.proximal * (fast[n] - theta.fast[n]) for n, g in grads.items()}
        return grads

    def step(
        self, k: int, theta: Theta, fast: Params, state: Any, order: int
    ) -> tuple[Params, Any]:
        """Take inner step number `k` from `fast`, where steps from `theta` have come to."""
        return self.rule.step(
            k,
            fast,
            self.gradient(k, theta, fast, order),
            alpha=self.alpha,
            rates=theta.learned,
            state=state,
            batched=self.batched,
        )

    def support_set(self, theta: Theta) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs of the head, targets and weights of support rows."""
        features = self.forward.features({**theta.shared, **theta.fast}, self.support.X)
        return features.to(self.support.X.dtype), self.support.y, self.support.weight

    # -- derivatives -----------------------------------------------------------------------------

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at the meta-parameters, and its outputs."""
        (grads,), outputs = self.differentiator.value_and_grad(function, params)
        return grads, outputs

    def support_grad(self, fast: Params, meta_params: Params) -> Params:
        """Gradient of the support loss in the parameters that adapt, in the graph of both."""
        shared = self.start(meta_params).shared
        return self.differentiator.grad(lambda p: self.support_loss({**shared, **p}), fast, 2)
