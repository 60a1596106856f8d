"""One model for all tasks, as it is or corrected for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from torch import Tensor

from sklearn_maml.evaluation.baselines.base import (
    Baseline,
    Episode,
    Predicted,
    TrainingTasks,
    draw_episode,
    for_shots,
    predictions,
)


class Pooled(Baseline):
    """One model of the rows of all training tasks; support rows are not used."""

    def __init__(self, model: Any, family: str) -> None:
        self.model = model
        self.family = family

    def fit(self, train: TrainingTasks) -> Any:
        """Fit the model on all rows."""
        super().fit(train)
        self.model_ = train.shared(self.family, lambda: clone(self.model).fit(train.X, train.y))
        return self

    def residuals(self, train: TrainingTasks) -> np.ndarray:
        """Residuals of tasks that the model was not fitted on, as held-out tasks will have them."""

        def make() -> np.ndarray:
            residual = np.empty(len(train.y))
            folds = GroupKFold(min(5, len(np.unique(train.task))))
            for some, others in folds.split(train.X, groups=train.task):
                model = clone(self.model).fit(train.X[some], train.y[some])
                residual[others] = train.y[others] - model.predict(train.X[others])
            return residual

        residual: np.ndarray = train.shared((self.family, "residuals"), make)
        return residual

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Predict without regard to the support rows."""
        return predictions(self.model_, X_query, self.n_classes)


class ShrunkIntercept(Pooled):
    """A pooled model with a random intercept: the support residuals' mean, shrunk."""

    def fit(self, train: TrainingTasks) -> Any:
        """Take the shrinkage from the variance of residuals within and between tasks."""
        super().fit(train)
        residual = self.residuals(train)
        within, means, noise = _components([residual[rows] for rows in train.rows_of_tasks()])
        between = np.mean(means**2) - noise
        within = max(within, np.finfo(float).tiny)
        self.ratio_ = within / between if between > 0 else np.inf
        self.within_, self.between_ = within, max(between, 0.0)
        return self

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Predict, after correcting the intercept."""
        prediction = self.model_.predict(X_query)
        variance = self.within_ + self.between_ / (1 + len(y) / self.ratio_)
        std = np.full(len(X_query), np.sqrt(variance))
        if not len(y):
            return prediction, std
        residual = y - self.model_.predict(X)
        return prediction + residual.sum() / (len(residual) + self.ratio_), std


class ResidualProcess(Pooled):
    """A pooled model and, for each task, a Gaussian process of its residuals.

    The kernel is a constant (an intercept), an RBF with a length of its own for each feature, and
    white noise. The tasks share its parameters, which maximise the sum of their log marginal
    likelihoods.
    """

    # Rows of a task: as few as support sets have. With 50 of them the likelihood is about shorter
    # distances than predictions are, and finds less noise: errors on x264 are 12 % larger.
    MAX_TASKS, MAX_ROWS = 300, 20

    def fit(self, train: TrainingTasks) -> Any:
        """Fit the parameters of the kernel on out-of-fold residuals."""
        super().fit(train)
        residual = self.residuals(train)
        rng = np.random.RandomState(train.seed)
        tasks = train.rows_of_tasks()
        chosen = [rng.permutation(tasks[j])[: self.MAX_ROWS] for j in rng.permutation(len(tasks))]
        chosen = chosen[: self.MAX_TASKS]
        n = max(len(rows) for rows in chosen)
        # rows that fill up small tasks are independent of all others and add a constant
        X = np.zeros((len(chosen), n, train.X.shape[1]))
        target, present = np.zeros((len(chosen), n)), np.zeros((len(chosen), n), dtype=bool)
        for j, rows in enumerate(chosen):
            m = len(rows)
            X[j, :m], target[j, :m], present[j, :m] = train.X[rows], residual[rows], True
        self.parameters_ = _fit_kernel(
            torch.as_tensor(X), torch.as_tensor(target), torch.as_tensor(present)
        )
        return self

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Predict with the pooled model plus the expected residual."""
        scale, constant, noise = self.parameters_[:3]
        prediction: np.ndarray = self.model_.predict(X_query)
        variance = np.full(len(X_query), scale + constant + noise)
        if not len(y):
            return prediction, np.sqrt(variance)
        A, B = X / self.parameters_[3:], X_query / self.parameters_[3:]
        kernel = scale * np.exp(-0.5 * cdist(A, A, "sqeuclidean")) + constant
        kernel += noise * np.eye(len(X))
        cross = scale * np.exp(-0.5 * cdist(B, A, "sqeuclidean")) + constant
        known = np.linalg.solve(kernel, np.c_[y - self.model_.predict(X), cross.T])
        variance -= np.einsum("qs,sq->q", cross, known[:, 1:])
        return prediction + cross @ known[:, 0], np.sqrt(np.maximum(variance, noise))


class TargetEncoded(Baseline):
    """Boosting with the task as features: the shrunk mean of its support targets, their number.

    Of labels, the shrunk part of each class. Trained on what it will see: the mean of as many other
    rows of the task, drawn at random, for each number of support rows.
    """

    DRAWS = 3

    def __init__(self, model: Any) -> None:
        self.model = model

    def fit(self, train: TrainingTasks) -> Any:
        """Fit a model for each number of support rows."""
        super().fit(train)
        tasks = train.rows_of_tasks()
        within, means, noise = _components([self._columns(train.y[rows]) for rows in tasks])
        self.mean_ = means.mean(0)
        between = means.var(0).sum() - noise
        self.ratio_ = within / between if between > 0 else np.inf
        rng = np.random.RandomState(train.seed)
        self.models_ = {}
        for k in train.n_shots:
            X, y = [], []
            for rows in tasks:
                for _ in range(self.DRAWS if k else 1):
                    support, query = self._draw(rng.permutation(rows), train.y, k)
                    X.append(self._encoded(train.X[query], train.y[support]))
                    y.append(train.y[query])
            self.models_[k] = clone(self.model).fit(np.concatenate(X), np.concatenate(y))
        return self

    def _draw(self, rows: np.ndarray, y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Split shuffled rows of a task, some of which are query rows however few there are."""
        most = k if self.n_classes else min(k, len(rows) - 1)
        support, query = draw_episode(rows, y, most, self.n_classes > 0, len(rows))
        return (support, query) if len(query) else (rows[:-1], rows[-1:])

    def _columns(self, y: np.ndarray) -> np.ndarray:
        """Targets (n_rows, 1), or indicators (n_rows, n_classes) of labels."""
        return np.eye(self.n_classes)[y] if self.n_classes else y[:, None]

    def _encoded(self, X: np.ndarray, of_support: np.ndarray) -> np.ndarray:
        n = len(of_support)
        mean = self.mean_
        if n:
            mean = mean + (self._columns(of_support) - mean).sum(0) / (n + self.ratio_)
        return np.c_[X, np.tile(mean, (len(X), 1)), np.full(len(X), n)]

    def predict(self, episodes: Sequence[Episode], k: int) -> list[Predicted]:
        """Predict with the model of K support rows."""
        model = for_shots(self.models_, k)
        return [
            predictions(model, self._encoded(e.X_query, e.y_support), self.n_classes)
            for e in episodes
        ]


def _components(parts: Sequence[np.ndarray]) -> tuple[float, np.ndarray, float]:
    """Variance within tasks, their means, and what noise adds to the variance of these.

    Of parts with several columns, variances are sums over them.
    """
    sizes = np.array([len(part) for part in parts])
    squares = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
    within = squares / max((sizes - 1).sum(), 1)
    return within, np.array([part.mean(0) for part in parts]), within * np.mean(1 / sizes)


def _fit_kernel(X: Tensor, target: Tensor, present: Tensor) -> np.ndarray:
    """Scale, constant, noise and length of each feature, of the largest marginal likelihood."""
    both = present[:, :, None] & present[:, None, :]
    eye = torch.eye(target.shape[1], dtype=torch.float64)
    variance = float((target**2).sum() / present.sum()) + 1e-8
    n_features = X.shape[2]

    def negative(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log = torch.tensor(theta, requires_grad=True)
        scale, constant, noise = log[:3].exp()
        scaled = X * torch.exp(-log[3:])
        squares = (scaled**2).sum(2)
        distances = squares[:, :, None] + squares[:, None, :] - 2 * scaled @ scaled.mT
        kernel = scale * torch.exp(-0.5 * distances.clamp(min=0)) + constant + noise * eye
        root = torch.linalg.cholesky(torch.where(both, kernel, eye))
        white = torch.linalg.solve_triangular(root, target[:, :, None], upper=False)
        loss = 0.5 * (white**2).sum() + root.diagonal(dim1=1, dim2=2).log().sum()
        loss = loss / len(target)
        (gradient,) = torch.autograd.grad(loss, log)
        return float(loss.detach()), gradient.numpy()

    # features are standardised: a length of root(n_features) is the distance of typical rows
    bounds = [
        *[(np.log(variance * 1e-4), np.log(variance * 1e3))] * 2,
        (np.log(variance * 1e-5), np.log(variance * 10)),
        *[(np.log(1e-2), np.log(1e3))] * n_features,
    ]
    fits = [
        minimize(
            negative,
            np.log([variance / 2, variance / 4, variance / 4, *[length] * n_features]),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
        )
        for length in np.sqrt(n_features) * np.array([0.3, 1.0, 3.0])
    ]
    return np.exp(min(fits, key=lambda fit: fit.fun).x)
