"""The gradient of the solution of a regularised inner problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sklearn_maml._validation import is_integer, is_number
from sklearn_maml.inner.problem import InnerProblem
from sklearn_maml.meta_gradients.base import MetaGradient
from sklearn_maml.theta import Params, name_in_module

Tensors = list[Tensor]


class Implicit(MetaGradient):
    r"""Gradient of the solution of a regularised inner problem (iMAML; Rajeswaran et al. 2019).

    The inner problem of a task with support loss :math:`S` is

    .. math:: \phi^*(\theta) = \arg\min_\phi
        S(\phi) + \frac{\lambda}{2} \lVert\phi - \theta\rVert^2

    (equation 4 of [1]_), solved approximately by the inner steps from :math:`\theta`; they see the
    proximal term in `adapt`, too. Where they have come to, :math:`\phi`, the meta-gradient of the
    query loss :math:`Q` is the solution :math:`v` of

    .. math:: \left(I + \tfrac{1}{\lambda} \nabla^2 S(\phi)\right) v = \nabla Q(\phi)

    (lemma 1 and algorithm 2), found from products with the Hessian alone. Parameters
    :math:`\sigma` that do not adapt (see `adapted`) get
    :math:`\nabla_\sigma Q - \frac{1}{\lambda} v^\top \nabla_\phi \nabla_\sigma S`. No graph of
    the inner steps is kept, so memory does not grow with their number, and the gradient does not
    depend on how the solution was reached: rules that learn (``"meta-sgd"``) are refused.

    It is exact where the inner problem and the linear system are solved: enough `steps` of a rate
    `alpha` below ``2 / (lam + curvature)``, and enough `cg_steps`. Unlike a gradient through the
    steps it does not keep meta-training away from initialisations where the curvature is too large
    for `alpha`, so that it takes a smaller one.

    Parameters
    ----------
    lam : float, default=2.0
        Strength of the proximal term. A smaller one lets a task move further from the
        initialisation, and takes more `cg_steps`.
    cg_steps : int, default=5
        Products with the Hessian in solving the system for a task.
    solver : {"cg", "neumann"}, default="cg"
        Conjugate gradients, or the Neumann series
        :math:`\sum_i (-\nabla^2 S / \lambda)^i \nabla Q` up to the power `cg_steps`, which
        converges only where `lam` is larger than the curvature. Conjugate gradients end for a task
        where they meet a direction in which the matrix is not positive definite (a Hessian with
        eigenvalues below ``-lam``) and keep what they have; in the first step that is the
        first-order gradient.

    References
    ----------
    .. [1] Rajeswaran, A., Finn, C., Kakade, S. & Levine, S. (2019). Meta-Learning with Implicit
       Gradients. NeurIPS.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import Implicit
    >>> MAMLRegressor(update_rule="sgd", meta_gradient=Implicit(lam=1.0)).meta_gradient
    Implicit(lam=1.0)
    >>> reg = MAMLRegressor(update_rule="sgd", meta_gradient="implicit", meta_gradient__lam=1.0)
    """

    order = 0

    def __init__(self, lam: float = 2.0, cg_steps: int = 5, solver: str = "cg") -> None:
        self.lam = lam
        self.cg_steps = cg_steps
        self.solver = solver

    @property
    def proximal(self) -> float:
        """Strength of the proximal term, `lam`."""
        return float(self.lam)

    def check(self) -> None:
        """Refuse parameters that are out of range."""
        if not is_number(self.lam) or not 0 < self.lam < math.inf:
            raise ValueError(
                "lam of Implicit must be a positive number, the strength of the proximal term; "
                f"got {self.lam!r}."
            )
        if not is_integer(self.cg_steps) or self.cg_steps < 1:
            raise ValueError(
                "cg_steps of Implicit must be a number of Hessian-vector products, 1 or more; got "
                f"{self.cg_steps!r}."
            )
        if self.solver not in ("cg", "neumann"):
            raise ValueError(
                f"Implicit got solver={self.solver!r}; expected 'cg' (conjugate gradients) or "
                "'neumann' (the Neumann series)."
            )

    def check_with(
        self, *, learns: bool, all_adapt: bool, checkpoint_steps: bool, moves: bool
    ) -> None:
        """Refuse update rules that learn."""
        if learns:
            raise ValueError(
                "meta_gradient='implicit' cannot train an update rule that learns: the solution "
                "of the inner problem does not depend on the rates it was reached with, so they "
                "would get no gradient. Use update_rule='sgd', or "
                "meta_gradient='second-order'."
            )

    def loss_and_grad(
        self, meta_params: Params, problem: InnerProblem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient at the solution of the inner problem; see `MetaGradient.loss_and_grad`."""
        solution = problem.adapt(meta_params, 0)
        fast = {name: solution[name] for name in problem.start(meta_params).fast}
        others = {name: meta_params[name] for name in problem.parts.others(meta_params)}

        def query_loss(own: Params, rest: Params) -> tuple[Tensor, Any]:
            shared = problem.start({**meta_params, **rest}).shared
            return problem.query_loss({**shared, **own})

        # the query loss sees the initialisation through the solution alone
        grads, outcome = problem.differentiator.value_and_grad(query_loss, fast, others)
        by_fast, by_others = grads

        def slope(inputs: Tensors) -> Tensors:
            own = dict(zip(fast, inputs, strict=False))
            rest = dict(zip(others, inputs[len(fast) :], strict=False))
            return list(problem.support_grad(own, {**meta_params, **rest}).values())

        pull_back = problem.differentiator.pull_back
        hessian = pull_back(slope, list(fast.values()))
        solve = self._conjugate_gradients if self.solver == "cg" else self._neumann
        v = solve(hessian, list(by_fast.values()), problem.batched)
        total = {
            name_in_module(n): x.sum(0) if problem.batched else x
            for n, x in zip(fast, v, strict=True)
        }
        if others:
            mixed = pull_back(slope, [*fast.values(), *others.values()])(v)[len(fast) :]
            for name, m in zip(others, mixed, strict=True):
                total[name] = by_others[name] - m / self.proximal
        return {name: total[name] for name in meta_params}, outcome

    def _neumann(self, hessian: Callable[[Tensors], Tensors], g: Tensors, batched: bool) -> Tensors:
        """Sum of the Neumann series of (I + H / lam)^-1 g."""
        term, total = g, g
        for _ in range(self.cg_steps):
            term = [h / -self.proximal for h in hessian(term)]
            total = [x + y for x, y in zip(total, term, strict=True)]
        return total

    def _conjugate_gradients(
        self, hessian: Callable[[Tensors], Tensors], g: Tensors, batched: bool
    ) -> Tensors:
        """Solve (I + H / lam) x = g (Hestenes & Stiefel 1952), each task with steps of its own.

        Without branches on values, which would differ between the tasks of a batch.
        """

        def dot(a: Tensors, b: Tensors) -> Tensor:
            axes = (len(g[0]), -1) if batched else (-1,)
            pairs = zip(a, b, strict=True)
            return torch.stack([(x * y).reshape(axes).sum(-1) for x, y in pairs]).sum(0)

        def plus(a: Tensors, factor: Tensor, b: Tensors) -> Tensors:
            """Add multiples of `b`, a factor for each task."""
            pairs = zip(a, b, strict=True)
            if batched:
                return [x + factor.reshape(-1, *[1] * (y.ndim - 1)) * y for x, y in pairs]
            return [x + factor * y for x, y in pairs]

        x = [torch.zeros_like(t) for t in g]
        residual = direction = g
        square = dot(g, g)
        # what is left of the residual then is rounding
        enough = square * torch.finfo(square.dtype).eps ** 2
        goes_on = torch.ones_like(square, dtype=torch.bool)
        moved = torch.zeros_like(goes_on)
        one, zero = torch.ones_like(square), torch.zeros_like(square)
        for _ in range(self.cg_steps):
            product = [
                p + h / self.proximal for p, h in zip(direction, hessian(direction), strict=True)
            ]
            curvature = dot(direction, product)
            # not `curvature > 0`: what is not a number must show in the gradient
            goes_on = goes_on & ~(curvature <= 0) & ~(square <= enough)
            moved = moved | goes_on
            rate = torch.where(goes_on, square / torch.where(goes_on, curvature, one), zero)
            x = plus(x, rate, direction)
            residual = plus(residual, -rate, product)
            before, square = square, dot(residual, residual)
            ratio = torch.where(goes_on, square / torch.where(goes_on, before, one), zero)
            direction = plus(residual, ratio, direction)
        return plus(x, torch.where(moved, zero, one), g)  # the first-order gradient
