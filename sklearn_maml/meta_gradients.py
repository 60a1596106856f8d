"""Meta-gradients: how the outer gradient flows through the inner loop.

Each is an object (searchable as ``meta_gradient__*``) that turns "adapt, then evaluate the query
loss" into a gradient for the meta-parameters. None of them knows how tasks are batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

from sklearn_maml._validation import is_integer, is_number
from sklearn_maml.data.episodes import EpisodeBatch, joined_rows

__all__ = [
    "FirstOrder",
    "Implicit",
    "MetaGradient",
    "Reptile",
    "SecondOrder",
    "resolve_meta_gradient",
]

Params = dict[str, Tensor]
Tensors = list[Tensor]


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
        for parameters without a graph. `on_step` is told of all parameters after every step.
        """

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""

    def support_grad(self, fast: Params, meta_params: Params) -> Params:
        """Gradient of the support loss in the parameters that adapt, in the graph of both."""

    def pull_back(
        self, function: Callable[[Tensors], Tensors], inputs: Tensors
    ) -> Callable[[Tensors], Tensors]:
        """Products with the Jacobian of `function` at `inputs`, for any number of cotangents."""


class MetaGradient(BaseEstimator):
    """Base class of meta-gradients.

    Attributes
    ----------
    order : int
        Derivatives it takes of what is adapted: 2 through the inner gradients, 1 with them as
        constants, 0 none.
    proximal : float
        Strength of the term ``proximal / 2 * |params - initialisation|^2`` of the support loss,
        in adapting to new tasks, too.
    in_minibatches : bool
        Whether inner steps see minibatches, as `Rows.minibatch` gives them.
    """

    order: int
    in_minibatches: bool = False

    @property
    def proximal(self) -> float:
        """Strength of the proximal term: none."""
        return 0.0

    def check(self) -> None:
        """Refuse parameters of the meta-gradient that are out of range (there are none here)."""

    def check_with(
        self, *, learns: bool, all_adapt: bool, checkpoint_steps: bool, moves: bool
    ) -> None:
        """Refuse to be used with other parameters of the estimator (here with none).

        Parameters
        ----------
        learns : bool
            Whether the update rule learns anything.
        all_adapt : bool
            Whether all trainable parameters adapt.
        checkpoint_steps : bool
        moves : bool
            Whether there are inner steps, of a rate that is not 0.

        Raises
        ------
        ValueError
        """

    def phase(self, update: int) -> tuple[Hashable, int | None]:
        """Tell updates apart that compute something else.

        Parameters
        ----------
        update : int
            Meta-updates made before, counted from the first of all fits.

        Returns
        -------
        phase : hashable
            Equal for updates that compute the same function of the parameters and the rows; None
            if each update computes one of its own. Those of `SecondOrder` and `FirstOrder` are
            the order of the gradient.
        end : int or None
            The update that begins another phase; None if there is none.
        """
        return self.order, None

    def episodes(self, batch: EpisodeBatch, steps: int) -> EpisodeBatch:
        """Return the rows to adapt to (the support rows) and those of the query loss."""
        return batch

    def step_size_at(self, progress: float) -> float | None:
        """Return the size of the outer step; None leaves it to the optimiser, as here.

        Parameters
        ----------
        progress : float
            Fraction of the updates of this fit that are made.
        """
        return None

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
                "checkpoint_steps=True: the loss after every step needs the graph of all of "
                "them. Use checkpoint_steps=False, or multi_step_updates=0."
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
        """Weights of the query losses after each inner step.

        Parameters
        ----------
        update : int
            Meta-updates made before.
        steps : int

        Returns
        -------
        weights : list of float
            They sum to one.
        """
        uniform = max(1.0 - update / self.multi_step_updates, 0.0) if self.multi_step_updates else 0
        weights = [uniform / steps] * steps
        weights[-1] += 1.0 - uniform
        return weights

    def loss_and_grad(
        self, meta_params: Params, problem: Problem
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
        self, meta_params: Params, problem: Problem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient at the solution of the inner problem; see `MetaGradient.loss_and_grad`."""
        solution = problem.adapt(meta_params, 0)
        names = list(problem.start(meta_params)[0])
        fast = {name: solution[name] for name in names}
        others = [name for name in meta_params if name.removeprefix("module.") not in fast]

        def query_loss(joint: Params) -> tuple[Tensor, Any]:
            own = {name: joint[f"adapted.{name}"] for name in names}
            shared = problem.start({**meta_params, **{n: joint[n] for n in others}})[1]
            return problem.query_loss({**shared, **own})

        # the query loss sees the initialisation through the solution alone
        grads, outcome = problem.value_and_grad(
            query_loss,
            {
                **{f"adapted.{name}": p for name, p in fast.items()},
                **{name: meta_params[name] for name in others},
            },
        )

        def slope(inputs: Tensors) -> Tensors:
            own = dict(zip(names, inputs, strict=False))
            rest = dict(zip(others, inputs[len(names) :], strict=False))
            return list(problem.support_grad(own, {**meta_params, **rest}).values())

        hessian = problem.pull_back(slope, list(fast.values()))
        solve = self._conjugate_gradients if self.solver == "cg" else self._neumann
        v = solve(hessian, [grads[f"adapted.{name}"] for name in names], problem.batched)
        total = {
            f"module.{n}": x.sum(0) if problem.batched else x for n, x in zip(names, v, strict=True)
        }
        if others:
            inputs = [*fast.values(), *(meta_params[name] for name in others)]
            mixed = problem.pull_back(slope, inputs)(v)[len(names) :]
            for name, m in zip(others, mixed, strict=True):
                total[name] = grads[name] - m / self.proximal
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


class Reptile(MetaGradient):
    r"""Steps towards the adapted parameters (Reptile; Nichol et al. 2018, algorithm 2).

    Needs no split of an episode: the inner steps adapt to its support and query rows together,
    from :math:`\theta` to :math:`\phi_j` for each task :math:`j` of the meta-batch, and

    .. math:: \theta \leftarrow \theta + \varepsilon_t
        \left(\frac{1}{n} \sum_j \phi_j - \theta\right),

    with :math:`\varepsilon_t` falling linearly from `step_size` to `final_step_size` over the
    `max_iter` updates of a fit: after :math:`t` of them it is
    ``step_size + (final_step_size - step_size) * t / max_iter``. (A fit that continues another
    one, `warm_start`, goes through the schedule again.) That is a gradient step on the
    pseudo-gradient :math:`\theta - \frac{1}{n} \sum_j \phi_j`, whose norm `max_grad_norm` bounds
    (set it to None for the published step); `beta`, `beta_decay` and `optimizer` are not used.

    `train_loss` in `history_` is the loss on the query rows after adapting to all rows, these
    included; `valid_loss` is after adapting to the support rows of held-out tasks alone, as ever.
    All trainable parameters have to adapt, and the update rule must have nothing to learn: there is
    no gradient for anything else.

    Parameters
    ----------
    step_size : float, default=1.0
        First size of the outer step. None hands the pseudo-gradient to `optimizer`, with `beta` and
        `beta_decay`; ``optimizer="sgd"``, ``beta=1`` and ``beta_decay=1`` do what the default does.
    final_step_size : float, default=0.0
        Size that the outer step falls to.
    batch_size : int, default=None
        Rows of a minibatch of each inner step. The minibatches run through the rows of the episode
        again and again, with a stride that mixes classes. None takes all rows in every step; with
        one step that is, up to its size, a step on the average loss of the tasks.

    References
    ----------
    .. [1] Nichol, A., Achiam, J. & Schulman, J. (2018). On First-Order Meta-Learning Algorithms.
       arXiv:1803.02999.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.meta_gradients import Reptile
    >>> MAMLRegressor(update_rule="sgd", meta_gradient=Reptile(batch_size=10)).meta_gradient
    Reptile(batch_size=10)
    >>> reg = MAMLRegressor(
    ...     update_rule="sgd", meta_gradient="reptile", meta_gradient__step_size=0.5
    ... )
    """

    order = 0

    def __init__(
        self,
        step_size: float | None = 1.0,
        final_step_size: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.step_size = step_size
        self.final_step_size = final_step_size
        self.batch_size = batch_size

    @property
    def in_minibatches(self) -> bool:  # type: ignore[override]
        """Whether inner steps see minibatches."""
        return self.batch_size is not None

    def check(self) -> None:
        """Refuse parameters that are out of range."""
        size, final = self.step_size, self.final_step_size
        if size is not None and not (is_number(size) and 0 < size < math.inf):
            raise ValueError(
                "step_size of Reptile must be a positive number, or None to use the optimizer; "
                f"got {size!r}."
            )
        if not (is_number(final) and 0 <= final < math.inf):
            raise ValueError(
                f"final_step_size of Reptile must be a number, 0 or more; got {final!r}."
            )
        rows = self.batch_size
        if rows is not None and (not is_integer(rows) or rows < 1):
            raise ValueError(
                "batch_size of Reptile must be a number of rows, 1 or more, or None for all rows; "
                f"got {rows!r}."
            )

    def check_with(
        self, *, learns: bool, all_adapt: bool, checkpoint_steps: bool, moves: bool
    ) -> None:
        """Refuse what would never be trained."""
        if learns:
            raise ValueError(
                "meta_gradient='reptile' cannot train an update rule that learns: it steps towards "
                "the adapted parameters, which says nothing about rates. Use update_rule='sgd', "
                "or meta_gradient='second-order'."
            )
        if not all_adapt:
            raise ValueError(
                "meta_gradient='reptile' needs adapted='all': it steps towards the adapted "
                "parameters, so those that do not adapt would never be trained. Use "
                "meta_gradient='first-order', or freeze them (requires_grad_(False))."
            )
        if not moves:
            raise ValueError(
                "meta_gradient='reptile' steps towards the adapted parameters, but steps=0 or "
                "alpha=0 leaves them at the initialisation, so nothing would be trained. Use "
                "positive ones, or meta_gradient='first-order'."
            )

    def episodes(self, batch: EpisodeBatch, steps: int) -> EpisodeBatch:
        """Return all rows of the episodes, to adapt to, and the query rows."""
        return EpisodeBatch(joined_rows(batch, self.batch_size, steps), batch.query)

    def step_size_at(self, progress: float) -> float | None:
        """Return the size of the outer step; see `MetaGradient.step_size_at`."""
        if self.step_size is None:
            return None
        return (1.0 - progress) * self.step_size + progress * self.final_step_size

    def loss_and_grad(
        self, meta_params: Params, problem: Problem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Return initialisation minus adapted parameters; see `MetaGradient.loss_and_grad`."""
        adapted = problem.adapt(meta_params, 0)
        with torch.no_grad():
            outcome = problem.query_loss(adapted)
            grads = {name: torch.zeros_like(p) for name, p in meta_params.items()}
            for name, p in problem.start(meta_params)[0].items():
                towards = p - adapted[name]
                grads[f"module.{name}"] = towards.sum(0) if problem.batched else towards
        return grads, outcome


META_GRADIENTS: dict[str, type[MetaGradient]] = {
    "second-order": SecondOrder,
    "first-order": FirstOrder,
    "implicit": Implicit,
    "reptile": Reptile,
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
    raise ValueError(
        f"meta_gradient={value!r} is not known. Expected one of "
        f"{sorted(META_GRADIENTS)} or a MetaGradient object such as "
        "sklearn_maml.meta_gradients.SecondOrder()."
    )
