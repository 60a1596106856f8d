"""The losses of the library: squared error of numbers, and cross-entropy of classes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from scipy.special import softmax
from torch import Tensor

from sklearn_maml.targets.base import Loss

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "SquaredError",
    "cross_entropy_rows",
    "has_closed_forms",
    "resolve_loss",
    "squared_error_rows",
]


def squared_error_rows(output: Tensor, y: Tensor) -> Tensor:
    """Squared error of each row, averaged over the outputs."""
    return (output - y).square().mean(-1)


def cross_entropy_rows(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row; `output` are logits."""
    # not F.cross_entropy: this form takes any number of leading axes
    return -output.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


class SquaredError(Loss):
    """Squared error, averaged over the targets."""

    name: ClassVar[str] = "mean squared error"
    standardises: ClassVar[bool] = True
    # functions, by which the compiled kernels know what they have derivatives of
    rows = staticmethod(squared_error_rows)


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
        p: np.ndarray = softmax(output, axis=1)
        return p


LOSSES: dict[str, type[Loss]] = {"squared_error": SquaredError}


def resolve_loss(value: Any) -> Loss:
    """Return the loss of numbers that `loss` names."""
    if isinstance(value, Loss):
        return value
    if isinstance(value, str) and value in LOSSES:
        return LOSSES[value]()
    raise ValueError(
        f"loss={value!r} is not known. Expected one of {sorted(LOSSES)} or an object of a subclass "
        "of sklearn_maml.targets.Loss."
    )


def has_closed_forms(loss: Loss) -> bool:
    """Whether heads in closed form are for the loss; those of subclasses may be another."""
    return type(loss) in (SquaredError, CrossEntropy)
