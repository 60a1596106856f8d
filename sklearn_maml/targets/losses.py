"""The losses of the library: of numbers, which may be counts, of classes, and of labels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import logsigmoid

from sklearn_maml._validation import is_number, resolve_object
from sklearn_maml.targets.base import Loss

# The compiled kernels know a loss by the function `rows`, see `engine.rungs.native`: what is
# differentiated here twice by autograd is written out there.


def squared_error_rows(output: Tensor, y: Tensor) -> Tensor:
    """Squared error of each row, averaged over the outputs."""
    return (output - y).square().mean(-1)


def cross_entropy_rows(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row; `output` are logits."""
    # not F.cross_entropy: this form takes any number of leading axes
    return -output.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _size(error: Tensor) -> Tensor:
    """Absolute values, whose second derivative is none: that of torch cannot be traced."""
    return error * error.detach().sign()


class SquaredError(Loss):
    """Squared error, averaged over the targets."""

    name: ClassVar[str] = "mean squared error"
    standardises: ClassVar[bool] = True
    rows = staticmethod(squared_error_rows)


class AbsoluteError(Loss):
    """Absolute error, averaged over the targets: predictions are medians.

    Its derivative is the sign of the error, and 0 where there is none; the second one is 0.
    """

    name: ClassVar[str] = "mean absolute error"
    standardises: ClassVar[bool] = True
    robust: ClassVar[bool] = True

    @staticmethod
    def rows(output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return _size(output - y).mean(-1)


class Huber(Loss):
    """Half the squared error of small errors, linear in larger ones (Huber 1964).

    Parameters
    ----------
    delta : float, default=0.3
        Errors above it count linearly. In units of the targets as the loss sees them: with
        ``normalize_y=True`` robust standard deviations of y over all tasks, which the errors
        inside of a task are smaller than; else units of y. The Gaussian head has a smooth version
        of the loss (Charbonnier et al. 1997), which is linear from about there.
    """

    name: ClassVar[str] = "Huber loss"
    standardises: ClassVar[bool] = True
    robust: ClassVar[bool] = True

    def __init__(self, delta: float = 0.3) -> None:
        self.delta = delta

    def rows(self, output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        error = output - y
        near = error.clamp(-self.delta, self.delta)
        return (near * (error - 0.5 * near)).mean(-1)

    def check(self, y: np.ndarray) -> None:
        """Refuse a `delta` that is not positive."""
        if not (is_number(self.delta) and 0 < self.delta < np.inf):
            raise ValueError(
                f"delta of the loss Huber must be positive and finite; got {self.delta!r}."
            )


class Quantile(Loss):
    """Pinball loss, averaged over the targets: predictions are quantiles (Koenker & Bassett 1978).

    Its second derivative is 0; the derivative of no error is in the middle of those beside it.

    Parameters
    ----------
    quantile : float, default=0.5
        Which one, between 0 and 1.
    """

    name: ClassVar[str] = "pinball loss"
    standardises: ClassVar[bool] = True
    robust: ClassVar[bool] = True

    def __init__(self, quantile: float = 0.5) -> None:
        self.quantile = quantile

    def rows(self, output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        error = y - output
        return (0.5 * _size(error) + (self.quantile - 0.5) * error).mean(-1)

    def check(self, y: np.ndarray) -> None:
        """Refuse a `quantile` that is none."""
        if not (is_number(self.quantile) and 0 < self.quantile < 1):
            raise ValueError(
                f"loss='quantile' needs a quantile between 0 and 1; got {self.quantile!r}. Set "
                "quantile=0.5 for the median, say."
            )


class _LogLink(Loss):
    """Base of losses whose outputs are logarithms of means."""

    scales: ClassVar[bool] = True
    # Steps of tasks whose level is many times the mean diverge. Of 80 tasks with levels within
    # factors of 20, 100 of 400 updates were not finite, and the Poisson deviance of new tasks was
    # 40; with norms of 1, 3, 10 it is 21, 19, 30, and all are finite.
    max_grad_norm: ClassVar[float | None] = 3.0

    def inverse_link(self, output: Tensor) -> Tensor:
        return output.exp()


class Poisson(_LogLink):
    """Half the Poisson deviance, averaged over the targets: predictions are rates of counts."""

    name: ClassVar[str] = "half Poisson deviance"

    @staticmethod
    def rows(output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return (output.exp() - y - y * output + torch.xlogy(y, y)).mean(-1)

    def check(self, y: np.ndarray) -> None:
        """Refuse targets below 0."""
        if not (y >= 0).all():
            raise ValueError(
                f"loss='poisson' is for targets of 0 or more, but y has {y.min():g}. Leave such "
                "rows out, or use another loss, such as 'squared_error'."
            )


class Gamma(_LogLink):
    """Half the gamma deviance, averaged over the targets: predictions are means above 0."""

    name: ClassVar[str] = "half gamma deviance"

    @staticmethod
    def rows(output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return (y * (-output).exp() - 1 + output - y.log()).mean(-1)

    def check(self, y: np.ndarray) -> None:
        """Refuse targets that are not above 0."""
        if not (y > 0).all():
            raise ValueError(
                f"loss='gamma' is for targets above 0, but y has {y.min():g}. Leave such rows out, "
                "or use another loss, such as 'poisson', which takes 0."
            )


class CrossEntropy(Loss):
    """Cross-entropy of classes; outputs are logits."""

    name: ClassVar[str] = "cross-entropy"
    rows = staticmethod(cross_entropy_rows)

    def check(self, y: np.ndarray) -> None:
        """Refuse what are no positions of classes."""
        if y.dtype.kind not in "iu":
            raise ValueError(
                "The loss CrossEntropy is for class labels, but the targets are numbers. Use a "
                "MAMLClassifier, or loss='squared_error'."
            )

    def predict(self, output: np.ndarray) -> np.ndarray:
        """Return the probabilities of logits."""
        return softmax(output, axis=1)


class BinaryCrossEntropy(Loss):
    """Cross-entropy of labels that are 0 or 1, each by itself, averaged; outputs are logits."""

    name: ClassVar[str] = "binary cross-entropy"

    @staticmethod
    def rows(output: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return ((1 - y) * output - logsigmoid(output)).mean(-1)

    def inverse_link(self, output: Tensor) -> Tensor:
        """Return the probability of each label."""
        return output.sigmoid()

    def check(self, y: np.ndarray) -> None:
        """Refuse targets that are neither 0 nor 1."""
        other = y[(y != 0) & (y != 1)]
        if len(other):
            raise ValueError(
                f"The loss BinaryCrossEntropy is for labels 0 and 1, but y has {other[0]:g}. Give "
                "one column of 0 and 1 for each label."
            )


LOSSES: dict[str, type[Loss]] = {
    "squared_error": SquaredError,
    "absolute_error": AbsoluteError,
    "huber": Huber,
    "quantile": Quantile,
    "poisson": Poisson,
    "gamma": Gamma,
}


def resolve_loss(value: Any, options: dict[str, Any]) -> Loss:
    """Return the loss of numbers that `loss` names, built with ``loss__*`` options."""
    loss: Loss = resolve_object("loss", value, options, Loss, LOSSES)
    return loss
