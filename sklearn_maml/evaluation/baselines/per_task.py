"""A model for each task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.neighbors import KNeighborsClassifier

from sklearn_maml.evaluation.baselines.base import Baseline, Predicted, TrainingTasks, predictions


class PerTask(Baseline):
    """A model of its own for each held-out task, of its support rows alone.

    Without support rows it is the mean, or the frequencies of classes, of the training tasks.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def fit(self, train: TrainingTasks) -> Any:
        """Note what there is to be said without support rows."""
        super().fit(train)
        self.y_ = train.y
        return self

    def _of_all(self, n_rows: int) -> np.ndarray:
        if not self.n_classes:
            return np.full(n_rows, self.y_.mean() if len(self.y_) else 0.0)
        counts = np.bincount(self.y_, minlength=self.n_classes) + 1.0
        return np.tile(counts / counts.sum(), (n_rows, 1))

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Fit on the support rows and predict."""
        if not len(y):
            return self._of_all(len(X_query))
        with warnings.catch_warnings():
            # few rows leave parameters of a kernel at their bounds; that is no news here
            warnings.simplefilter("ignore", ConvergenceWarning)
            if self.n_classes and len(np.unique(y)) == 1:
                model = DummyClassifier().fit(X, y)
            else:
                model = self.make(len(y)).fit(X, y)
            if isinstance(model, GaussianProcessRegressor):
                mean, std = model.predict(X_query, return_std=True)
                return mean, std
            return predictions(model, X_query, self.n_classes)


class NearestRow(PerTask):
    """The class of the nearest support row, as a probability of a half more than the others."""

    def __init__(self) -> None:
        super().__init__(lambda n: KNeighborsClassifier(n_neighbors=1))

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Give half of the probability to the nearest row's class and half to all classes."""
        if not len(y):
            return self._of_all(len(X_query))
        model = self.make(len(y)).fit(X, y)
        return (predictions(model, X_query, self.n_classes) + 1 / self.n_classes) / 2
