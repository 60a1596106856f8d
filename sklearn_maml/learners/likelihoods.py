"""What targets are like, given the output of a Gaussian head: one class for each kind of loss.

Conditioning on numbers with normal noise, or on the codes of classes, is one linear system.
Other likelihoods are conditioned on by Newton steps to the mode of the posterior, and a normal
distribution about it (Laplace's approximation; Rasmussen & Williams 2006, sec. 3.4). They have to
be log-concave: there is one mode then.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from sklearn_maml.targets.base import Loss
from sklearn_maml.targets.losses import (
    AbsoluteError,
    BinaryCrossEntropy,
    CrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
    SquaredError,
)

__all__ = [
    "Classes",
    "Counts",
    "HeavyTails",
    "Labels",
    "Likelihood",
    "NewtonLikelihood",
    "Normal",
    "Positive",
    "TwoClasses",
    "find_likelihood",
    "scalars",
]

# logarithms below the mean at which predictions of counts end
LOWEST = 12.0
SURE = 10.0  # logits at which predictions of labels end
# dispersions, and units of targets that are no multiples of one, from which fits start
DISPERSIONS, UNITS = np.geomspace(1e-4, 10, 21), np.geomspace(1e-4, 10, 21)
TINY = float(np.finfo(np.float32).tiny)
PRECISE = 1e-3  # targets are multiples of a unit up to this part of it


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
    """

    are_classes: ClassVar[bool] = False
    noise_differs: ClassVar[bool] = False
    uses_variance: bool = False

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

    def average(self, outputs: Tensor) -> Tensor:
        """Put outputs of all members (n_members, n_rows, n_outputs) together."""
        return outputs.mean(0)

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


class _LogLink(NewtonLikelihood):
    """Base of likelihoods of targets whose mean is the exponential of the output."""

    def task_error(self, excess: Tensor) -> Tensor:
        """Root of half the deviance: few tasks with large ones would decide for all."""
        return excess.clamp_min(0).sqrt()

    def latent(self, y: np.ndarray, lowest: np.ndarray | float) -> np.ndarray:
        """See `Likelihood`."""
        return np.where(y > 0, np.log(np.maximum(y, TINY)), lowest)

    def edges(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Likelihood`; the lowest are far below the mean, as no count says little."""
        return np.log(y.mean(0)) - LOWEST, np.log(y.max(0))

    def average(self, outputs: Tensor) -> Tensor:
        """Logarithms of the mean of the means."""
        return outputs.logsumexp(0) - math.log(len(outputs))


def _of_rate(variance: Tensor) -> Tensor:
    """Squared coefficient of variation of a rate whose logarithm has this variance.

    As of a gamma distribution, to which a logarithm of the rate that is normal is close where
    doubt is small. Where it is large, the normal one has a tail of rates that no task has.
    """
    return (1 + 2 * variance).sqrt() - 1


class Counts(_LogLink):
    """Counts with more variance than Poisson's: ``unit * mean + dispersion * mean**2``.

    That is the negative binomial distribution of targets in units of `unit`, the smallest step
    between them (Lawless 1987). Doubt about the logarithm of the mean adds to the dispersion.
    """

    def derivatives(
        self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        dispersion, unit = shape
        count, size = y / unit, 1 / dispersion
        u = output + (dispersion / unit).log()
        p, total = u.sigmoid(), count + size
        return total * softplus(u) - count * u, total * p - count, total * p * (-u).sigmoid()

    def surprise(self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape) -> Tensor:
        """See `NewtonLikelihood`."""
        count, size = y / shape[1], 1 / shape[0]
        constant = size.lgamma() + (count + 1).lgamma() - (count + size).lgamma()
        return self.derivatives(output, y, shape)[0] + constant

    def predictive(
        self, mean: Tensor, variance: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        dispersion, unit = shape
        doubt = _of_rate(variance)
        more = doubt + dispersion * (1 + doubt)
        output = mean + doubt / 2
        level = output.exp()
        return output, unit * level + more * level.square(), more

    def guess(self, y: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        dispersion, unit = shape
        level = y + unit / 2
        return level.log(), dispersion + unit / level

    def unit(self, y: np.ndarray) -> np.ndarray:
        """Smallest target above 0 where others are its multiples, else what suits all of them."""
        return np.array([_unit_of_counts(self, column) for column in y.T])


class Positive(_LogLink):
    """Numbers above 0, of the variance ``dispersion * mean**2``: the gamma distribution."""

    def derivatives(
        self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        size = 1 / shape[0]
        ratio = y * (-output).exp()
        return size * (ratio + output), size * (1 - ratio), size * ratio

    def surprise(self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape) -> Tensor:
        """See `NewtonLikelihood`; padding has targets of 0."""
        size = 1 / shape[0]
        logs = y.clamp_min(TINY).log()
        constant = size.lgamma() - size * size.log() - (size - 1) * logs
        return self.derivatives(output, y, shape)[0] + constant

    def predictive(
        self, mean: Tensor, variance: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        doubt = _of_rate(variance)
        more = doubt + shape[0] * (1 + doubt)
        output = mean + doubt / 2
        return output, more * (2 * output).exp(), more

    def guess(self, y: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        return y.clamp_min(TINY).log(), shape[0]

    def unit(self, y: np.ndarray) -> np.ndarray:
        """Nothing: one."""
        return np.ones(y.shape[1])


class Labels(NewtonLikelihood):
    """Labels that are 0 or 1, given their logits; there is nothing for a dispersion to do."""

    def latent(self, y: np.ndarray, lowest: np.ndarray | float) -> np.ndarray:
        """See `Likelihood`; these are finite."""
        return SURE * (2 * y - 1)

    def edges(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Likelihood`."""
        return np.full(y.shape[1], -SURE), np.full(y.shape[1], SURE)

    def derivatives(
        self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        p = output.sigmoid()
        return softplus(output) - y * output, p - y, p * (-output).sigmoid()

    def surprise(self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape) -> Tensor:
        """See `NewtonLikelihood`."""
        return self.derivatives(output, y, shape)[0]

    def predictive(
        self, mean: Tensor, variance: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`; doubt makes logits smaller (MacKay 1992)."""
        output = mean / (1 + math.pi / 8 * variance).sqrt()
        return output, output.sigmoid() * (-output).sigmoid(), shape[0]

    def guess(self, y: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`: the first step from even odds."""
        return 4 * y - 2, torch.full_like(shape[0], 4.0)

    def dispersion(
        self, output: np.ndarray, y: np.ndarray, unit: float, weight: np.ndarray | None = None
    ) -> float:
        """See `NewtonLikelihood`."""
        return 1.0

    def unit(self, y: np.ndarray) -> np.ndarray:
        """Nothing: one."""
        return np.ones(y.shape[1])


class TwoClasses(Classes, Labels):
    """Two classes that tasks share: a head has the logit of the second one, as of a label.

    In place of codes, from which a row that is no surprise would be as far as one that is.
    """

    def n_outputs(self, n_latent: int) -> int:
        """See `Likelihood`."""
        return 2 * n_latent

    def seen(self, y: Any) -> Any:
        """See `Likelihood`."""
        return y[..., 1:]

    def spread(self, latent: Tensor) -> Tensor:
        """See `Likelihood`."""
        return torch.cat([-latent, latent], -1) / 2


class HeavyTails(NewtonLikelihood):
    """Numbers of which some are far off, as for losses that are linear in large errors.

    Conditioning takes the logistic distribution, under which the pull of a row is bounded. What is
    learned from all tasks, the noise first of all, takes Student's t with 4 degrees of freedom, of
    the same variance: the logistic distribution would take few rows that are very far off for a
    large noise. `unit` is the number of standard deviations that the predictions of a quantile are
    above the middle; judging corrects it.
    """

    def derivatives(
        self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        scale = shape[0].sqrt() * LOGISTIC_SCALE
        r = (output - y) / scale
        p = r.sigmoid()
        value = r.abs() + 2 * softplus(-r.abs())
        return value, (2 * p - 1) / scale, 2 * p * (-r).sigmoid() / scale.square()

    def surprise(self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape) -> Tensor:
        """See `NewtonLikelihood`; `output` is what `predictive` gives."""
        std = shape[0].sqrt()
        r = (output - shape[1] * std - y) / std
        return 2.5 * (r.square() / 2).log1p() + std.log()

    def predictive(
        self, mean: Tensor, variance: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        total = shape[0] + variance
        return mean + shape[1] * total.sqrt(), total, total

    def guess(self, y: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        return y, shape[0]

    def dispersion(
        self, output: np.ndarray, y: np.ndarray, unit: float, weight: np.ndarray | None = None
    ) -> float:
        """See `NewtonLikelihood`; of the middle of the targets."""
        return super().dispersion(output, y, 0.0, weight)

    def unit(self, y: np.ndarray) -> np.ndarray:
        """Quantile of a logistic distribution of variance 1; 0 for the middle."""
        q = self.level or 0.5
        return np.full(y.shape[1], LOGISTIC_SCALE * math.log(q / (1 - q)))

    @property
    def level(self) -> float | None:
        """The quantile that is predicted; None: the middle."""
        if isinstance(self.loss, AbsoluteError):
            return 0.5
        return self.loss.quantile if isinstance(self.loss, Quantile) else None

    @property
    def uses_variance(self) -> bool:  # type: ignore[override]
        """See `NewtonLikelihood`."""
        return self.level is not None

    def center(self, outputs: Tensor, variance: Tensor, head: Any) -> Tensor:
        """See `Likelihood`."""
        return outputs - head.unit * variance.sqrt()

    def learn_quantile(self, head: Any, quantile: Callable[[float], np.ndarray]) -> None:
        """See `Likelihood`."""
        if self.level is not None:
            head.unit.copy_(torch.from_numpy(quantile(self.level)))


def _means(values: np.ndarray, codes: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """Mean (n_tasks,) of the values of the rows of each task."""
    total = values if weight is None else weight * values
    return np.bincount(codes, total) / np.bincount(codes, weight)


def scalars(dispersion: float, unit: float) -> tuple[Tensor, Tensor]:
    """Shape of a single output."""
    return torch.tensor(dispersion, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)


def _unit_of_counts(likelihood: Counts, y: np.ndarray) -> float:
    """Find the unit of targets (n_rows,)."""
    positive = y[y > 0]
    if not len(positive):
        return 1.0
    least = float(positive.min())
    count = positive / least
    if (np.abs(count - count.round()) < PRECISE + 1e-6 * count).all():
        return least
    # no counts: of 0 there is a probability, of all others a density
    level, y_ = float(y.mean()), torch.from_numpy(np.ascontiguousarray(y, dtype=np.float64))
    output = torch.full_like(y_, math.log(level))
    part = len(positive) / len(y)

    def surprise(unit: float, dispersion: float) -> float:
        shape = scalars(dispersion, level * unit)
        return float(likelihood.surprise(output, y_, shape).mean()) + part * math.log(unit)

    return level * float(min(UNITS, key=lambda unit: min(surprise(unit, d) for d in DISPERSIONS)))


LOGISTIC_SCALE = math.sqrt(3) / math.pi  # of variance 1

# of each loss; those of subclasses may be another
_LIKELIHOODS: dict[type[Loss], Callable[[Loss], Likelihood]] = {
    SquaredError: Normal,
    CrossEntropy: Classes,
    Poisson: Counts,
    Gamma: Positive,
    AbsoluteError: HeavyTails,
    Huber: HeavyTails,
    Quantile: HeavyTails,
    BinaryCrossEntropy: Labels,
}


def find_likelihood(loss: Loss, n_classes: int | None = None) -> Likelihood | None:
    """Return the likelihood that a Gaussian head has for a loss, or None.

    `n_classes` are those that tasks share, if they do.
    """
    kind = _LIKELIHOODS.get(type(loss))
    if kind is Classes and n_classes == 2:
        kind = TwoClasses
    return None if kind is None else kind(loss)
