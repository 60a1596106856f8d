"""What targets are like, given the output of a Gaussian head: the bases of `likelihoods`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.targets.base import Loss

# dispersions from which fits start
DISPERSIONS = np.geomspace(1e-4, 10, 21)
TINY = float(np.finfo(np.float32).tiny)


class Likelihood:
    """Distribution of the targets of a row given the outputs of a head.

    Parameters
    ----------
    loss : Loss
        What predictions are for.

    Attributes
    ----------
    are_classes : bool
    uses_variance : bool
        Whether outputs depend on the doubt about them, not on their mode alone.
    noise_differs : bool
        Whether tasks differ in their noise, of which support sets tell by their misfit.
    is_centered : bool
        Whether targets are about as far above predictions as below.
    members_differ : bool
        Whether members start differently, and a task weighs them by the density of its rows.
    """

    are_classes: ClassVar[bool] = False
    noise_differs: ClassVar[bool] = False
    uses_variance: bool = False
    is_centered: bool = False
    members_differ: ClassVar[bool] = False

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def encoded(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        """Return targets (n_rows, n_outputs) as a head is conditioned on them."""
        return y.astype(np.float64)

    def targets(self, y: Tensor, classes: Tensor) -> Tensor:
        """Return `encoded` targets in float32, of the classes 0, 1, ... in `classes`."""
        return y.float()

    def n_outputs(self, n_latent: int) -> int:
        """Return how many outputs a row has where a head has so many numbers of it."""
        return n_latent

    def seen(self, y: Any) -> Any:
        """Return what `encoded` targets say about these numbers."""
        return y

    def spread(self, latent: Tensor) -> Tensor:
        """Return the outputs that these numbers stand for."""
        return latent

    def latent(self, y: np.ndarray, lowest: np.ndarray | float) -> np.ndarray:
        """Return the best outputs for targets (n_rows, n_outputs); `lowest` if infinite."""
        return y

    def edges(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Range of the outputs (n_outputs,) that targets of meta-training call for."""
        return y.min(0), y.max(0)

    def learn_quantile(self, head: Any, quantile: Callable[[float], np.ndarray]) -> None:
        """Take where the quantile that is predicted was on held-out tasks, if there is one."""

    def center(self, outputs: Tensor, variance: Tensor, head: Any) -> Tensor:
        """Middle of the targets, whose variance this is: what intervals are about."""
        return outputs

    def average(self, outputs: Tensor, trust: Tensor) -> Tensor:
        """Put outputs of all members (n_members, n_rows, n_outputs) together.

        `trust` has what they count: of a shape that goes with `outputs`, 1 in all.
        """
        return (outputs * trust).sum(0)

    def predicted(self, outputs: Tensor, factor: Any, low: Tensor, high: Tensor) -> Tensor:
        """Return outputs as they are predicted: none far beyond the targets that were seen."""
        return torch.minimum(torch.maximum(outputs, low), high)

    def mix(self, head: np.ndarray, steps: np.ndarray, share: float) -> np.ndarray:
        """Mix outputs (n_rows, n_outputs) of a head and of gradient steps with this share.

        Of classes, probabilities are mixed, and both arguments and the result are their logarithms.
        """
        if share in (0, 1):  # the others may not be finite
            return steps if share else head
        return self._mixed(head, steps, share)

    def _mixed(self, head: np.ndarray, steps: np.ndarray, share: float) -> np.ndarray:
        return (1 - share) * head + share * steps

    def error_rows(self, mean: Tensor, y: Tensor) -> Tensor:
        """Error (..., n_rows) of outputs (..., n_rows, n_outputs): of numbers, squared."""
        return (y - mean).square().mean(-1)

    def held_out_errors(self, mean: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Error (n_members, n_tasks) of outputs (n_members, n_tasks, n_rows, n_outputs).

        That of numbers is a geometric mean of those of the outputs: outputs that are noise do not
        choose for the others.
        """
        squares = ((y - mean).square() * weight.unsqueeze(-1)).sum(2)
        return (0.5 * squares.clamp_min(1e-30).log().mean(-1)).exp()

    def task_errors(
        self,
        outputs: np.ndarray,
        target: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray | None = None,
    ) -> np.ndarray:
        """Root mean squared error (n_tasks,) of each task."""
        squares = ((outputs - target) ** 2).mean(1)
        return np.sqrt(_means(squares, codes, weight))


class Normal(Likelihood):
    """Numbers with normal noise."""

    noise_differs: ClassVar[bool] = True
    is_centered = True
    members_differ: ClassVar[bool] = True


class Classes(Likelihood):
    """Classes, given their logits; targets are 1 for the class of a row and 0 for the others."""

    are_classes: ClassVar[bool] = True

    def encoded(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        """See `Likelihood`."""
        return np.eye(n_outputs)[y]

    def targets(self, y: Tensor, classes: Tensor) -> Tensor:
        """See `Likelihood`."""
        # not F.one_hot: it may wait for a device to check the labels
        return (y.unsqueeze(-1) == classes).float()

    def predicted(self, outputs: Tensor, factor: Any, low: Tensor, high: Tensor) -> Tensor:
        """Return logarithms of probabilities: a mean of those of members would not be sharp."""
        return (factor * outputs).log_softmax(-1)

    def _mixed(self, head: np.ndarray, steps: np.ndarray, share: float) -> np.ndarray:
        return np.logaddexp(head + np.log(1 - share), steps + np.log(share))

    def error_rows(self, mean: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits; see `Likelihood`."""
        return -(y * mean.log_softmax(-1)).sum(-1)

    def held_out_errors(self, mean: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """See `Likelihood`."""
        return (self.error_rows(mean, y) * weight).sum(-1)

    def task_errors(
        self,
        outputs: np.ndarray,
        target: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray | None = None,
    ) -> np.ndarray:
        """Cross-entropy (n_tasks,) of each task; outputs are logarithms of probabilities."""
        return _means(-(target * outputs).sum(1), codes, weight)


class NewtonLikelihood(Likelihood):
    """A likelihood that is conditioned on by Newton steps.

    Notes
    -----
    Its `shape` is the pair (dispersion, unit): what the head learns in place of the variance of
    the noise, and a constant of the targets. Both are broadcast with the outputs.
    """

    Shape = tuple[Tensor, Tensor]
    uses_variance: bool = True

    @abstractmethod
    def derivatives(self, output: Tensor, y: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Negative log likelihood of targets up to a constant, and its first two derivatives.

        By the output, each of the shape of `output`; the second is above 0.
        """

    def bound(self, output: Tensor, y: Tensor, shape: Shape) -> Tensor | None:
        """Information with which a step cannot be too long; None: that of `derivatives` will do.

        That of a parabola that touches the negative log likelihood and lies above it elsewhere.
        """
        return None

    @abstractmethod
    def expected(self, output: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return second derivatives that are expected of targets about outputs.

        Of the negative log likelihood, which is the information of a target, and of the loss,
        which is what doubt about an output costs.
        """

    @abstractmethod
    def predictive(
        self, mean: Tensor, variance: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs, variance of the targets, and dispersion where outputs are uncertain.

        `mean` and `variance` are those of the outputs.
        """

    @abstractmethod
    def surprise(self, output: Tensor, y: Tensor, shape: Shape) -> Tensor:
        """Negative log likelihood of targets, with what depends on the dispersion."""

    @abstractmethod
    def guess(self, y: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return outputs that targets alone would suggest, and the variance of the suggestion."""

    @abstractmethod
    def unit(self, y: np.ndarray) -> np.ndarray:
        """Constant (n_outputs,) of the targets of meta-training."""

    def dispersion(
        self, output: np.ndarray, y: np.ndarray, unit: float, weight: np.ndarray | None = None
    ) -> float:
        """Dispersion under which targets (n_rows,) are likeliest, given their outputs."""
        at, seen = (torch.from_numpy(np.ascontiguousarray(values)) for values in (output, y))
        found = [
            np.average(self.surprise(at, seen, scalars(d, unit)).numpy(), weights=weight)
            for d in DISPERSIONS
        ]
        return float(DISPERSIONS[int(np.argmin(found))])

    def center(self, outputs: Tensor, variance: Tensor, head: Any) -> Tensor:
        """See `Likelihood`."""
        return torch.from_numpy(self.loss.predict(outputs.cpu().numpy())).to(outputs)

    def error_rows(self, mean: Tensor, y: Tensor) -> Tensor:
        """Loss; see `Likelihood`."""
        return self.loss.rows(mean, y.to(mean.dtype).expand_as(mean))

    def held_out_errors(self, mean: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """See `Likelihood` and `task_error`."""
        excess = self.excess(mean, y.to(mean).expand_as(mean))
        return self.task_error((excess * weight).sum(-1))

    def excess(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss of rows above that of the best outputs: half the deviance, say."""
        best = torch.from_numpy(self.latent(y.cpu().numpy(), math.log(TINY))).to(y)
        return self.loss.rows(outputs, y) - self.loss.rows(best, y)

    def task_error(self, excess: Tensor) -> Tensor:
        """Error of tasks of this mean excess."""
        return excess

    def task_errors(
        self,
        outputs: np.ndarray,
        target: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `task_error`."""
        excess = self.excess(torch.from_numpy(outputs), torch.from_numpy(target)).numpy()
        means = torch.from_numpy(_means(excess, codes, weight))
        return self.task_error(means).numpy()


def _means(values: np.ndarray, codes: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """Mean (n_tasks,) of the values of the rows of each task."""
    total = values if weight is None else weight * values
    return np.bincount(codes, total) / np.bincount(codes, weight)


def scalars(dispersion: float, unit: float) -> tuple[Tensor, Tensor]:
    """Shape of a single output."""
    return torch.tensor(dispersion, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)
