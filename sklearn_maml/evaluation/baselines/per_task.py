"""A model for each task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier

from sklearn_maml.evaluation.baselines.base import Baseline, predictions


class PerTask(Baseline):
    """A model of its own for each held-out task, of its support rows alone."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Fit on the support rows and predict."""
        with warnings.catch_warnings():
            # few rows leave parameters of a kernel at their bounds; that is no news here
            warnings.simplefilter("ignore", ConvergenceWarning)
            if self.n_classes and len(np.unique(y)) == 1:
                model = DummyClassifier().fit(X, y)
            else:
                model = self.make(len(y)).fit(X, y)
            return predictions(model, X_query, self.n_classes)


class NearestRow(Baseline):
    """The class of the nearest support row, as a probability of a half more than the others."""

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Give half of the probability to the nearest row's class and half to all classes."""
        model = KNeighborsClassifier(n_neighbors=1).fit(X, y)
        return (predictions(model, X_query, self.n_classes) + 1 / self.n_classes) / 2
