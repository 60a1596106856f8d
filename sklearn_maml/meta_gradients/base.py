"""What a meta-gradient is, and what it may ask."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from sklearn.base import BaseEstimator
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.theta import Params, Parts, Theta

Tensors = list[Tensor]


class AdaptationProblem(Protocol):
    """What a meta-gradient may ask of the tasks at hand; see `inner.InnerProblem`."""

    update: int
    steps: int
    parts: Parts
    differentiator: Any
    query: Rows

    @property
    def batched(self) -> bool:
        """Whether tensors have a leading task axis."""

    def start(self, meta_params: Params, /) -> Theta:
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
        self, meta_params: Params, problem: AdaptationProblem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the query loss after adaptation.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            The initialisation (``module.*``) and what the update rule learns (``rule.*``).
        problem : AdaptationProblem
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
