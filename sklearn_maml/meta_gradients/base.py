"""What a meta-gradient is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from sklearn.base import BaseEstimator
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.inner.problem import InnerProblem
from sklearn_maml.theta import Params


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
        self, meta_params: Params, problem: InnerProblem
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the query loss after adaptation.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            The initialisation (``module.*``) and what the update rule learns (``rule.*``).
        problem : InnerProblem
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
