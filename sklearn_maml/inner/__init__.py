"""The inner loop: the only place where parameters are adapted to a support set."""

from __future__ import annotations

from sklearn_maml.inner.differentiate import Autograd, Differentiator, Functorch
from sklearn_maml.inner.problem import Forward, InnerProblem, fit_outputs, mean_loss
from sklearn_maml.inner.recompute import RecomputedSteps

__all__ = [
    "Autograd",
    "Differentiator",
    "Forward",
    "Functorch",
    "InnerProblem",
    "RecomputedSteps",
    "fit_outputs",
    "mean_loss",
]
