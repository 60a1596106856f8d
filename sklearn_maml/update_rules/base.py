"""What finds the parameters of a task, and what update rules are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any

from sklearn.base import BaseEstimator
from torch import Tensor, nn

from sklearn_maml.targets.base import Loss
from sklearn_maml.theta import Params, Theta

OnStep = Callable[[Params], None]


class TaskSolver(BaseEstimator):
    """Base class of what finds the parameters of a task that adapt.

    Subclasses implement `adapt`, which is given the problem as a whole; those that learn something
    also `initial_rates`. Inner steps are one way, see `UpdateRule`.
    """

    def check(self) -> None:
        """Refuse parameters of the solver that are out of range (there are none here)."""

    def check_loss(self, loss: Loss) -> None:
        """Refuse losses that it is not for (there are none here)."""

    def check_with(self, meta_gradient: Any) -> None:
        """Refuse a `MetaGradient` that it cannot work with (there is none here)."""

    def check_module(self, module: nn.Module, adapted: Any, rows: Tensor) -> None:
        """Refuse modules that it is not for (there are none here).

        Parameters
        ----------
        module : Module
        adapted : str or list of str
            As of the estimator.
        rows : Tensor of shape (n_rows, ...)
            Rows as the module takes them.
        """

    def layer(self, module: nn.Module, adapted: Collection[str]) -> str | None:
        """Name of the layer that is solved for in place of steps; None: there is none, as here.

        Its inputs are what `InnerProblem.support_set` gives. `adapted` are names of parameters.
        """
        return None

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

    @abstractmethod
    def adapt(
        self, problem: Any, theta: Theta, order: int, on_step: OnStep | None = None
    ) -> Params:
        """Adapt to the support sets of some tasks.

        Parameters
        ----------
        problem : InnerProblem
            The tasks, and `steps` and `alpha`.
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


class UpdateRule(TaskSolver):
    """Base class of solvers that take one gradient step after another.

    Subclasses implement `step`. All tensors of `params` and `grads` carry a leading task axis when
    `batched` is true.
    """

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
        self, problem: Any, theta: Theta, order: int, on_step: OnStep | None = None
    ) -> Params:
        """Take all inner steps; see `TaskSolver.adapt`."""
        return problem.take_steps(theta, order, on_step)

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


def has_linear_rates(rule: TaskSolver) -> bool:
    """Whether `linear_rates` of a rule speaks for the `step` that it has."""

    def owner(method: str) -> type:
        return next(c for c in type(rule).__mro__ if method in c.__dict__)

    return isinstance(rule, UpdateRule) and issubclass(owner("linear_rates"), owner("step"))
