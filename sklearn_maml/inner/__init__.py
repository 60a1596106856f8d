"""The inner loop: the only place where parameters are adapted to a support set."""

from __future__ import annotations

from sklearn_maml.inner.differentiate import Autograd, Differentiator, Functorch
from sklearn_maml.inner.loop import InnerProblem, adapt, mean_loss
from sklearn_maml.inner.recompute import RecomputedSteps

__all__ = [
    "Autograd",
    "Differentiator",
    "Functorch",
    "InnerProblem",
    "RecomputedSteps",
    "adapt",
    "mean_loss",
]
