"""What targets are like, given the output of a Gaussian head: one class for each kind of loss.

Conditioning on numbers with normal noise, or on the codes of classes, is one linear system.
Other likelihoods are conditioned on by Newton steps to the mode of the posterior, and a normal
distribution about it (Laplace's approximation; Rasmussen & Williams 2006, sec. 3.4). They have to
be log-concave: there is one mode then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from sklearn_maml.learners.distribution import (
    DISPERSIONS,
    TINY,
    Classes,
    Likelihood,
    NewtonLikelihood,
    Normal,
    scalars,
)
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

# logarithms below the mean at which predictions of counts end
LOWEST = 12.0
SURE = 10.0  # logits at which predictions of labels end
# units of targets that are no multiples of one, from which fits start
UNITS = np.geomspace(1e-4, 10, 21)
NEAR_ZERO = 1e-12  # of the variance: squared errors of which no quotient is taken
PRECISE = 1e-3  # targets are multiples of a unit up to this part of it


class _LogLink(NewtonLikelihood):
    """Base of likelihoods of targets whose mean is the exponential of the output."""

    def task_error(self, excess: Tensor) -> Tensor:
        """Root of half the deviance: few tasks with large ones would decide for all."""
        return excess.clamp_min(0).sqrt()

    def latent(self, y: np.ndarray, lowest: np.ndarray | float) -> np.ndarray:
        return np.where(y > 0, np.log(np.maximum(y, TINY)), lowest)

    def edges(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Likelihood`; the lowest are far below the mean, as no count says little."""
        return np.log(y.mean(0, dtype=np.float64)) - LOWEST, np.log(y.max(0).astype(np.float64))

    def average(self, outputs: Tensor, trust: Tensor) -> Tensor:
        """Logarithms of the mean of the means."""
        return (outputs + trust.log()).logsumexp(0)


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

    def expected(self, output: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        level = output.exp()
        return level / (shape[1] + shape[0] * level), level

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

    def expected(self, output: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        return (1 / shape[0]).expand_as(output), torch.ones_like(output)

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

    members_differ: ClassVar[bool] = True

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

    def expected(self, output: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        both = output.sigmoid() * (-output).sigmoid()
        return both, both

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

    def bound(self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape) -> Tensor:
        """See `NewtonLikelihood`: far out there is no curvature that Newton steps could follow.

        With these weights, least squares are steps to the mode that never miss it (Hunter & Lange
        2004).
        """
        r = output - y
        _, first, second = self.derivatives(output, y, shape)
        near = r.square() < NEAR_ZERO * shape[0]
        return torch.where(near, second, first / torch.where(near, 1, r))

    def expected(self, output: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        information = 1 / (3 * LOGISTIC_SCALE**2 * shape[0])
        return information.expand_as(output), torch.ones_like(output)

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
    def is_centered(self) -> bool:  # type: ignore[override]
        """See `Likelihood`."""
        return self.level in (None, 0.5)

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


class HyperbolicTails(HeavyTails):
    """Tails of the Huber loss: errors of less than `delta` count as in least squares.

    Those of the hyperbolic distribution, whose negative logarithm is the smooth Huber loss
    ``rate * sqrt(delta**2 + error**2)`` (Barndorff-Nielsen 1977). For a `delta` far above the noise
    it is the normal distribution, far below it Laplace's.
    """

    loss: Huber

    def _rate(self, variance: Tensor) -> Tensor:
        """Rate of the distribution of this variance, to a tenth: exact at both ends."""
        delta = self.loss.delta
        return (delta + (delta**2 + 8 * variance).sqrt()) / (2 * variance)

    def derivatives(
        self, output: Tensor, y: Tensor, shape: NewtonLikelihood.Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `NewtonLikelihood`."""
        delta, rate, r = self.loss.delta, self._rate(shape[0]), output - y
        root = (delta**2 + r.square()).sqrt()
        return rate * (root - delta), rate * r / root, rate * delta**2 / root**3

    def expected(self, output: Tensor, shape: NewtonLikelihood.Shape) -> tuple[Tensor, Tensor]:
        """See `NewtonLikelihood`; to a tenth, likewise."""
        rate = self._rate(shape[0])
        information = rate.square() / (1 + rate * self.loss.delta)
        return information.expand_as(output), torch.ones_like(output)


LOGISTIC_SCALE = math.sqrt(3) / math.pi  # of variance 1

# of each loss; those of subclasses may be another
_LIKELIHOODS: dict[type[Loss], Callable[[Loss], Likelihood]] = {
    SquaredError: Normal,
    CrossEntropy: Classes,
    Poisson: Counts,
    Gamma: Positive,
    AbsoluteError: HeavyTails,
    Huber: HyperbolicTails,
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
