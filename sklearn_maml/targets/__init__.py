"""What the targets mean: how they are learned, encoded and decoded, and the losses of rows."""

from sklearn_maml.targets.base import Coding, Loss, Targets
from sklearn_maml.targets.classes import ClassTargets
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
from sklearn_maml.targets.real import RealTargets

__all__ = [
    "AbsoluteError",
    "BinaryCrossEntropy",
    "ClassTargets",
    "Coding",
    "CrossEntropy",
    "Gamma",
    "Huber",
    "Loss",
    "Poisson",
    "Quantile",
    "RealTargets",
    "SquaredError",
    "Targets",
]
