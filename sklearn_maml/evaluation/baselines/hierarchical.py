"""Linear models of each task whose coefficients are drawn around those of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import SplineTransformer
from torch import Tensor

from sklearn_maml.data.episodes import Rows
from sklearn_maml.evaluation.baselines.base import (
    Baseline,
    Episode,
    Predicted,
    TrainingTasks,
    for_shots,
)
from sklearn_maml.evaluation.baselines.stacked import losses, score, support_and_query, unstack


class MixedModel(Baseline):
    """Linear model with a random intercept and random slopes, fitted by EM.

    The coefficients of a task are normally distributed around those of the population. Written in a
    root of their covariance, which may be singular: there may be more features than tasks, and
    features may depend on each other.
    """

    MAX_ITER, TOL = 500, 1e-7

    def columns(self, X: np.ndarray) -> np.ndarray:
        """Columns whose coefficients differ between tasks."""
        return _with_ones(X)

    def fit(self, train: TrainingTasks) -> Any:
        """Estimate mean and covariance of the coefficients, and the noise."""
        super().fit(train)
        self.prepare(train)
        tasks = train.rows_of_tasks()
        target = train.y - self.fixed(train.X)
        A = [self.columns(train.X[rows]) for rows in tasks]
        b = [target[rows] for rows in tasks]
        gram = np.array([a.T @ a for a in A])
        moment = np.array([a.T @ t for a, t in zip(A, b, strict=True)])
        square = float(sum((t**2).sum() for t in b))
        n_coefs = gram.shape[1]
        self.mean_, cov, self.noise_ = np.zeros(n_coefs), np.eye(n_coefs), 1.0
        for _ in range(self.MAX_ITER):
            self.root_ = _root(cov)
            before = self.noise_
            means, covs = self._posteriors(gram, moment)
            self.mean_ = means.mean(0)
            deviations = means - self.mean_
            cov = covs.mean(0) + deviations.T @ deviations / len(tasks)
            # sum of squared residuals, expected over the coefficients
            squares = square - 2 * np.einsum("td,td->", means, moment)
            squares += np.einsum("td,tde,te->", means, gram, means)
            squares += np.einsum("tde,ted->", gram, covs)
            self.noise_ = max(squares / len(train.y), 1e-8)
            if abs(self.noise_ - before) < self.TOL * before:
                break
        self.root_ = _root(cov)
        return self

    def _posteriors(self, gram: np.ndarray, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the coefficients of tasks, given their rows."""
        root = self.root_
        inner = np.eye(root.shape[1]) + root.T @ gram @ root / self.noise_
        covs = root @ np.linalg.solve(inner, np.broadcast_to(root.T, (len(gram), *root.T.shape)))
        means = self.mean_ + np.einsum("tde,te->td", covs, moment - gram @ self.mean_) / self.noise_
        return means, covs

    def prepare(self, train: TrainingTasks) -> None:
        """Learn what `columns` and `fixed` need."""

    def fixed(self, X: np.ndarray) -> np.ndarray:
        """Part that all tasks share, beside the population's coefficients."""
        return np.zeros(len(X))

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> Predicted:
        """Predict with the coefficients expected after the support rows."""
        A, B = self.columns(X), self.columns(X_query)
        means, covs = self._posteriors((A.T @ A)[None], (A.T @ (y - self.fixed(X)))[None])
        variance = np.einsum("qd,de,qe->q", B, covs[0], B) + self.noise_
        return B @ means[0] + self.fixed(X_query), np.sqrt(np.maximum(variance, self.noise_))


class SplineMixedModel(MixedModel):
    """Mixed model of cubic splines of the features, as an additive mixed model has them.

    The coefficients of the splines differ between tasks where there are no more than `MOST_COLUMNS`
    of them; else all tasks share the splines, and intercept and slopes differ.
    """

    KNOTS, MOST_COLUMNS, MAX_ITER = 4, 30, 150
    PENALTIES: ClassVar = np.logspace(-2, 4, 13)

    def prepare(self, train: TrainingTasks) -> None:
        """Place the knots; fit what tasks share."""
        self.splines_ = SplineTransformer(
            self.KNOTS, include_bias=False, knots="quantile", extrapolation="linear"
        ).fit(train.X)
        basis = self.splines_.transform(train.X)
        self.differ_ = basis.shape[1] < self.MOST_COLUMNS
        self.center_, self.scale_ = basis.mean(0), np.maximum(basis.std(0), 1e-6)
        if not self.differ_:
            self.shared_ = RidgeCV(self.PENALTIES).fit(self._basis(train.X), train.y)

    def _basis(self, X: np.ndarray) -> np.ndarray:
        return (self.splines_.transform(X) - self.center_) / self.scale_

    def columns(self, X: np.ndarray) -> np.ndarray:
        """See `MixedModel`."""
        if not len(X):
            return np.empty((0, 1 + (len(self.center_) if self.differ_ else X.shape[1])))
        return _with_ones(self._basis(X) if self.differ_ else X)

    def fixed(self, X: np.ndarray) -> np.ndarray:
        """See `MixedModel`."""
        if self.differ_ or not len(X):
            return np.zeros(len(X))
        return self.shared_.predict(self._basis(X))


def _with_ones(X: np.ndarray) -> np.ndarray:
    return np.c_[np.ones(len(X)), X]


def _root(cov: np.ndarray) -> np.ndarray:
    """Return a matrix whose product with its transpose is `cov`."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0))


class HierarchicalLogistic(Baseline):
    """Logistic regression whose coefficients are drawn to those of all tasks pooled.

    The penalty of the pooled fit and the strength of the one on deviations from it are chosen
    together, on validation tasks.
    """

    STRENGTHS: ClassVar = tuple(np.logspace(-4, 2, 10))
    INVERSE_PENALTIES = (1.0, 10.0, 100.0)
    INTERCEPTS_ALONE = False

    def fit(self, train: TrainingTasks) -> Any:
        """Choose both penalties for each K, and fit the pooled coefficients."""
        super().fit(train)
        rest, validation = train.validation()

        def pooled(C: float, rows: Any) -> Tensor:
            model = LogisticRegression(C=C, max_iter=3000).fit(train.X[rows], train.y[rows])
            return _logistic_coefs(model, train.n_classes)

        starts = {C: pooled(C, rest) for C in self.INVERSE_PENALTIES}
        self.strengths_, self.coefs_ = {}, {}
        for k, episodes in validation.items():
            choices = [
                (self._loss(start, episodes, strength), C, strength)
                for C, start in starts.items()
                for strength in self.STRENGTHS
            ]
            _, C, self.strengths_[k] = min(choices)
            self.coefs_[k] = pooled(C, slice(None))
        return self

    def _loss(self, pooled: Tensor, episodes: Sequence[Episode], strength: float) -> float:
        support, query = support_and_query(episodes, np.float64)
        coefs = self._coefs(pooled, support, strength)
        return score(_linear(query.X, coefs), query)

    def _coefs(self, pooled: Tensor, support: Rows, strength: float) -> Tensor:
        """Coefficients of each task: a convex problem, solved for all tasks at once."""
        differ = torch.ones_like(pooled)
        if self.INTERCEPTS_ALONE:
            differ[1:] = 0
        deviation = torch.zeros((len(support.X), *pooled.shape), dtype=pooled.dtype)
        deviation.requires_grad_()
        solver = torch.optim.LBFGS(
            [deviation], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = losses(_linear(support.X, pooled + deviation * differ), support).sum()
            loss = loss + strength * (deviation**2).sum()
            loss.backward()
            return loss

        solver.step(closure)
        return (pooled + deviation * differ).detach()

    def predict(self, episodes: Sequence[Episode], k: int) -> list[Predicted]:
        """Predict with the coefficients of each task."""
        support, query = support_and_query(episodes, np.float64)
        pooled, strength = for_shots(self.coefs_, k), for_shots(self.strengths_, k)
        coefs = self._coefs(pooled, support, strength)
        return unstack(_linear(query.X, coefs), episodes, self.n_classes)


class RandomIntercepts(HierarchicalLogistic):
    """Generalised linear mixed model: logistic regression whose intercepts differ between tasks.

    They are those of the largest posterior density, given a variance that is chosen on validation
    tasks.
    """

    INTERCEPTS_ALONE = True


def _logistic_coefs(model: Any, n_classes: int) -> Tensor:
    """Return (1 + n_features, n_classes) intercepts and slopes; unseen classes are unlikely."""
    coefs = np.c_[model.intercept_, model.coef_]
    if len(model.classes_) == 2:
        coefs = np.concatenate([-coefs, coefs]) / 2
    every = np.zeros((n_classes, coefs.shape[1]))
    every[:, 0] = coefs[:, 0].min()
    every[model.classes_.astype(int)] = coefs
    return torch.as_tensor(every.T.copy())


def _linear(X: Tensor, coefs: Tensor) -> Tensor:
    return X @ coefs[..., 1:, :] + coefs[..., :1, :]
