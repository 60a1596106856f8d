"""What the targets mean: how they are learned, encoded and decoded, and the losses of rows."""

from sklearn_maml.targets.base import Coding, Loss, Targets
from sklearn_maml.targets.classes import ClassTargets
from sklearn_maml.targets.losses import CrossEntropy, SquaredError
from sklearn_maml.targets.real import RealTargets

__all__ = [
    "ClassTargets",
    "Coding",
    "CrossEntropy",
    "Loss",
    "RealTargets",
    "SquaredError",
    "Targets",
]
