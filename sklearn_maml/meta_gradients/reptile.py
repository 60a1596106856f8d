"""Steps towards the adapted parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sklearn_maml._validation import is_integer, is_number
from sklearn_maml.data.episodes import EpisodeBatch, joined_rows, totals
from sklearn_maml.inner.problem import InnerProblem
from sklearn_maml.meta_gradients.base import MetaGradient
from sklearn_maml.theta import Params, name_in_module


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
        self, meta_params: Params, problem: InnerProblem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Return initialisation minus adapted parameters; see `MetaGradient.loss_and_grad`."""
        adapted = problem.adapt(meta_params, 0)
        with torch.no_grad():
            outcome = problem.query_loss(adapted)
            grads = {name: torch.zeros_like(p) for name, p in meta_params.items()}
            weight = problem.query.weight
            of_task = None if weight is None else totals(weight)
            for name, p in problem.start(meta_params).fast.items():
                towards = p - adapted[name]
                if of_task is not None:
                    towards = towards * of_task.view(of_task.shape + (1,) * (p.ndim - of_task.ndim))
                grads[name_in_module(name)] = towards.sum(0) if problem.batched else towards
        return grads, outcome
