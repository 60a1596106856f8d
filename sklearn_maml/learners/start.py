"""Where a Gaussian head starts: a mixed model of linear coefficients, or a pooled one."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch

from sklearn_maml.learners.likelihoods import NewtonLikelihood, scalars

NOISE_FLOOR = 1e-5  # variance, of targets of variance one
# features of a mixed model, a round of which is cubic in them; entries of all matrices of the tasks
LARGEST_MIXED, MIXED_ENTRIES = 100, 2**20
INVERTED = 64  # matrices at a time
ROUNDS, MORE_ROUNDS = 40, 10
# rows that a pooled classifier sees
POOLED_ROWS = 20_000

# mixed models of working responses, in units of outputs that are logarithms, say
WORKING_ROUNDS, FIRST_DISPERSION, LEAST_INFORMATION, LARGEST_STEP = 8, 0.1, 1e-6, 3.0
# variances of coefficients: the first ones, and the bounds of those that are fitted
FIRST, FIRST_OF_BENDS, SMALLEST, LARGEST = 0.25, 0.05, 1e-8, 1e4
RIDGE = 3e-3  # precision of mean slopes of working responses, for each task
FAR = 6.0  # median deviations, beyond which targets are not what a first fit is about

Start = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def start_of_numbers(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray | None = None,
    differ: Differ | None = None,
) -> Start:
    """Mean, root of the covariance, and noise of linear coefficients across tasks.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_features)
        Standardised.
    y : ndarray of shape (n_rows, n_outputs)
        Standardised.
    codes : int ndarray of shape (n_rows,)
    weight : ndarray of shape (n_rows,), default=None
        Of the rows. Their mean in a task is how much it counts among the tasks; in units of it, 2
        is a row that is there twice.
    differ : Differ, default=None
        How the coefficients of tasks may differ; None: in any way.

    Returns
    -------
    mean : ndarray of shape (1 + n_features, n_outputs)
    factor : ndarray of shape (1 + n_features, 1 + n_features)
        Lower triangular; the outputs share the covariance up to `amplitude`.
    amplitude, noise : ndarrays of shape (n_outputs,)
        Standard deviation of an output's coefficients in units of `factor`; variance of its noise.
    """
    n_features, n_outputs = X.shape[1], y.shape[1]
    if n_features > LARGEST_MIXED:
        left = X.T if weight is None else X.T * (weight / weight.mean())
        gram = left @ X + 0.01 * len(X) * np.eye(n_features)
        level = np.average(y, axis=0, weights=weight)
        mean = np.concatenate([level[None], np.linalg.solve(gram, left @ y)])
        return (
            mean,
            np.diag(_pooled_scales(n_features)),
            np.ones(n_outputs),
            np.full(n_outputs, 0.25),
        )
    fits = [_mixed_model(X, y[:, k], codes, weight, differ=differ)[:3] for k in range(n_outputs)]
    means, covs, noises = (np.stack(part) for part in zip(*fits, strict=True))
    return means.T, *_shared(covs), noises


def _shared(covs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root of the covariance that outputs share, and amplitudes, of their covariances."""
    traces = np.trace(covs, axis1=1, axis2=2)
    amplitude = np.sqrt(traces / traces[0])
    cov = (covs / (amplitude**2)[:, None, None]).mean(0)
    return np.linalg.cholesky(cov + 1e-6 * np.eye(cov.shape[1])), amplitude


def _mixed_model(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray | None,
    information: np.ndarray | None = None,
    differ: Differ | None = None,
    before: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Mean and covariance of the tasks' linear coefficients, the noise, and fitted y, by ECME.

    Rows with an `information`, one over the variance of their noise, have a noise of 1 then. Some
    rounds go on from a covariance of `before`.

    The mean is the generalised least-squares solution under the covariance at hand (Liu & Rubin
    1994): where slopes hardly differ, EM takes hundreds of rounds to it.
    """
    ones = np.c_[np.ones(len(X)), X]
    n_columns = ones.shape[1]
    differ = Differ() if differ is None else differ
    parts = _tasks(codes)
    each, root = _of_tasks(parts, weight)
    sizes = np.array([len(rows) for rows in parts])
    of_row = np.ones(len(y)) if information is None else information
    of_row = of_row if root is None else of_row * np.square(root)
    kind = _ByRows if sizes.max() < n_columns else _ByColumns
    tasks = kind(ones, y, of_row, parts, each)
    eye = np.eye(n_columns)
    cov, noise = differ.first(n_columns), 0.5 if information is None else 1.0
    # labels that a feature separates would have its coefficient grow without end
    own = 0.0 if information is None else RIDGE * len(parts)
    ridge = np.diag(np.r_[0.0, np.full(n_columns - 1, own)])
    cov, n_rounds = (cov, ROUNDS) if before is None else (before, MORE_ROUNDS)
    for _ in range(n_rounds):
        left, right = tasks.condition(cov, noise)
        mean = differ.mean(left + ridge, right)
        means, cov, error = tasks.about(mean)
        deviation = np.sqrt(each)[:, None] * (means - mean)
        cov = cov + deviation.T @ deviation / len(parts)
        cov = differ.allowed((cov + cov.T) / 2 + SMALLEST * eye)
        if information is None:
            noise = max(error / float(each @ sizes), NOISE_FLOOR)
    fitted = np.full(len(y), np.nan)
    for rows, coef in zip(parts, means, strict=True):
        fitted[rows] = ones[rows] @ coef
    return mean, cov, noise, fitted


class Differ:
    """How the linear coefficients of tasks may differ: in any way, as a rule.

    Attributes
    ----------
    entries : int
        Of all matrices of the tasks that a fit looks at.
    """

    entries: ClassVar[int] = MIXED_ENTRIES

    def first(self, n_columns: int) -> np.ndarray:
        """Covariance of the coefficients that a fit starts at."""
        return FIRST * np.eye(n_columns)

    def mean(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Solve a system for the mean of the coefficients."""
        n_columns = len(right)
        return np.linalg.solve(left + 1e-8 * np.trace(left) / n_columns * np.eye(n_columns), right)

    def allowed(self, cov: np.ndarray) -> np.ndarray:
        """Covariance that is nearest to this one."""
        return cov


class InLevel(Differ):
    """Tasks have the same slopes."""

    def first(self, n_columns: int) -> np.ndarray:
        """See `Differ`."""
        return self.allowed(super().first(n_columns))

    def allowed(self, cov: np.ndarray) -> np.ndarray:
        """See `Differ`."""
        return np.diag(np.r_[cov[0, 0], np.full(len(cov) - 1, SMALLEST)])


class Alike(Differ):
    """Tasks do not differ."""

    def first(self, n_columns: int) -> np.ndarray:
        """See `Differ`."""
        return self.allowed(super().first(n_columns))

    def allowed(self, cov: np.ndarray) -> np.ndarray:
        """See `Differ`."""
        return SMALLEST * np.eye(len(cov))


class Bent(Differ):
    """The last columns are hinges, where the lines of features bend.

    Their mean coefficients are shrunk, those of each feature as the data say that they have to be
    (MacKay 1992): a bend that there is no evidence for is none. This is the truncated line basis of
    a penalised spline as a mixed model (Ruppert, Wand & Carroll 2003, ch. 4).

    Parameters
    ----------
    feature : int ndarray of shape (n_hinges,)
        Of each hinge.
    by_task : bool
        Whether tasks bend differently: coefficients of a feature have a variance then, and no
        correlations.
    """

    entries: ClassVar[int] = MIXED_ENTRIES // 4

    def __init__(self, feature: np.ndarray, by_task: bool) -> None:
        self.n_hinges = len(feature)
        self.of_features = [np.flatnonzero(feature == j) for j in np.unique(feature)]
        self.by_task = by_task

    def first(self, n_columns: int) -> np.ndarray:
        """See `Differ`."""
        self.spread = np.full(len(self.of_features), FIRST)
        cov = super().first(n_columns)
        last = range(n_columns - self.n_hinges, n_columns)
        cov[last, last] = FIRST_OF_BENDS
        return self.allowed(cov)

    def mean(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """See `Differ`."""
        n_linear = len(right) - self.n_hinges
        places = [n_linear + own for own in self.of_features]
        ridge = np.full(len(right), 1e-8 * np.trace(left[:n_linear, :n_linear]) / n_linear)
        for place, spread in zip(places, self.spread, strict=True):
            ridge[place] += 1 / spread
        inverse = np.linalg.inv(left + np.diag(ridge))
        mean: np.ndarray = inverse @ right
        for j, place in enumerate(places):
            determined = len(place) - inverse[place, place].sum() / self.spread[j]
            square = (mean[place] ** 2).sum() / max(determined, 1e-3)
            self.spread[j] = np.clip(square, SMALLEST, LARGEST)
        return mean

    def allowed(self, cov: np.ndarray) -> np.ndarray:
        """See `Differ`."""
        n_linear = len(cov) - self.n_hinges
        made = np.zeros_like(cov)
        made[:n_linear, :n_linear] = cov[:n_linear, :n_linear]
        for own in self.of_features:
            place = n_linear + own
            made[place, place] = cov[place, place].mean() if self.by_task else SMALLEST
        return made


class _ByColumns:
    """Tasks of a mixed model as sums over their rows.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_columns)
    y, weight : ndarrays of shape (n_rows,)
    parts : list of int ndarrays
        Rows of each task.
    each : ndarray of shape (n_tasks,)
        What the tasks count, 1 on average.
    """

    def __init__(
        self,
        X: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        parts: list[np.ndarray],
        each: np.ndarray,
    ) -> None:
        p = X.shape[1]
        self.gram, self.moment = np.empty((len(parts), p, p)), np.empty((len(parts), p))
        self.each, self.square = each, 0.0
        for j, rows in enumerate(parts):
            weighted = X[rows] * weight[rows, None]
            self.gram[j], self.moment[j] = weighted.T @ X[rows], weighted.T @ y[rows]
            self.square += each[j] * (weight[rows] @ y[rows] ** 2)
        # sums over tasks are products with all their matrices, on top of each other
        of_tasks = self.gram if (each == 1).all() else each[:, None, None] * self.gram
        self.stacked = of_tasks.reshape(-1, p)

    def condition(self, cov: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """Condition on the rows of each task; return the system that the mean solves."""
        self.noise, self.precision = noise, np.linalg.inv(cov)
        systems = self.gram / noise
        systems += self.precision
        self.posterior = _inverses(systems)
        # a Gram matrix G, with the posterior P, leaves G (1 - P G / noise) = G P precision
        stacked = self.posterior.reshape(self.stacked.shape)
        left = self.stacked.T @ stacked
        right = (self.each[:, None] * self.moment).ravel() @ stacked
        return left @ self.precision / noise, right @ self.precision / noise

    def about(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Coefficients of the tasks, mean covariance of them, and sum of the squared errors."""
        right = self.precision @ mean + self.moment / self.noise
        means = (self.posterior @ right[..., None])[..., 0]
        cov = (self.each @ self.posterior.reshape(len(means), -1)).reshape(self.precision.shape)
        # likewise, G m = moment + noise * precision (mean - m), and P G / noise = 1 - P precision
        weighted = self.each[:, None] * means
        error = self.square - (weighted * self.moment).sum()
        error += self.noise * (weighted * ((mean - means) @ self.precision)).sum()
        error += self.noise * (len(mean) * self.each.sum() - (cov * self.precision).sum())
        return means, cov / len(means), float(error)


def _inverses(systems: np.ndarray) -> np.ndarray:
    """Inverses of positive definite matrices (n_tasks, n, n), in their place.

    That takes half the time of `inv`.
    """
    for first in range(0, len(systems), INVERTED):
        some = systems[first : first + INVERTED]
        factors, failed = torch.linalg.cholesky_ex(torch.from_numpy(some))
        # they may fail by rounding errors
        some[:] = np.linalg.inv(some) if failed.any() else torch.cholesky_inverse(factors).numpy()
    return systems


class _ByRows:
    """The same of their rows, for tasks that have fewer of them than columns.

    With the rows B and targets r by the roots of their weights, and ``K = inv(B C B' + noise)``,
    the posterior covariance is ``C - C B'K B C``; see `_ByColumns`.
    """

    def __init__(
        self,
        X: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        parts: list[np.ndarray],
        each: np.ndarray,
    ) -> None:
        n = max(len(rows) for rows in parts)
        self.B, self.r = np.zeros((len(parts), n, X.shape[1])), np.zeros((len(parts), n))
        for j, rows in enumerate(parts):  # rows of padding are 0, and tell nothing
            root = np.sqrt(weight[rows])
            self.B[j, : len(rows)] = X[rows] * root[:, None]
            self.r[j, : len(rows)] = y[rows] * root
        self.each = each

    def condition(self, cov: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """See `_ByColumns`."""
        n, p = self.B.shape[1:]
        self.cov, self.noise = cov, noise
        self.H = (self.B.reshape(-1, p) @ cov).reshape(self.B.shape)
        self.K = _inverses(self.H @ self.B.transpose(0, 2, 1) + noise * np.eye(n))
        solved = (self.each[:, None, None] * (self.K @ self.B)).reshape(-1, p)
        return self.B.reshape(-1, p).T @ solved, solved.T @ self.r.ravel()

    def about(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """See `_ByColumns`."""
        n, p = self.B.shape[1:]
        u = np.einsum("tij,tj->ti", self.K, self.r - self.B @ mean)
        means = mean + np.einsum("tip,ti->tp", self.H, u)
        solved = (self.each[:, None, None] * (self.K @ self.H)).reshape(-1, p)
        cov = self.each.mean() * self.cov - self.H.reshape(-1, p).T @ solved / len(u)
        of_task = self.noise * (u * u).sum(1) + n - self.noise * np.einsum("tii->t", self.K)
        return means, cov, float(self.noise * (self.each @ of_task))


def some_tasks(codes: np.ndarray, n_columns: int, differ: Differ | None = None) -> np.ndarray:
    """Rows of all tasks, or of some of very many, which tell as much of a mixed model."""
    if n_columns > 1 + LARGEST_MIXED:  # a pooled one, of as many coefficients
        return np.arange(len(codes))
    entries = Differ.entries if differ is None else differ.entries
    parts = _tasks(codes)
    return np.concatenate(parts[:: -(-len(parts) * n_columns**2 // entries)])


def _tasks(codes: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _of_tasks(
    parts: list[np.ndarray], weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what tasks count, 1 on average, and roots of the weights of rows within tasks."""
    if weight is None:
        return np.ones(len(parts)), None
    each = np.array([weight[rows].mean() for rows in parts])
    root = np.sqrt(weight)
    for rows, mean_weight in zip(parts, each, strict=True):
        root[rows] /= math.sqrt(mean_weight)
    return each / each.mean(), root


def start_of_outputs(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    likelihood: NewtonLikelihood,
    units: np.ndarray,
    weight: np.ndarray | None = None,
    differ: Differ | None = None,
) -> Start:
    """As `start_of_numbers`, for targets whose noise is not normal.

    By mixed models of the responses that Newton steps work with, which is known as penalised
    quasi-likelihood (Breslow & Clayton 1993); the noise is the dispersion.
    """
    differ = Differ() if differ is None else differ
    fits = [
        _working_model(X, y[:, k], codes, weight, likelihood, units[k], differ)
        for k in range(y.shape[1])
    ]
    means, covs, noises = (np.stack(part) for part in zip(*fits, strict=True))
    factor, amplitude = _shared(covs)
    return means.T, factor, amplitude, noises


def _working_model(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray | None,
    likelihood: NewtonLikelihood,
    unit: float,
    differ: Differ,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of coefficients, and dispersion, of one output."""
    y_ = torch.from_numpy(np.ascontiguousarray(y))
    guessed, variance = (
        part.expand_as(y_).numpy() for part in likelihood.guess(y_, scalars(FIRST_DISPERSION, unit))
    )
    middle = np.median(guessed)
    far = FAR * np.median(np.abs(guessed - middle))  # 0 where most are the same
    working = np.clip(guessed, middle - far, middle + far) if far > 0 else guessed
    mean, cov, fitted = _working_fit(X, working, codes, weight, 1 / variance, differ)
    for _ in range(WORKING_ROUNDS):
        shape = scalars(likelihood.dispersion(fitted, y, unit, weight), unit)
        at = torch.from_numpy(fitted)
        _, first, second = likelihood.derivatives(at, y_, shape)
        variance = 1 / np.maximum(second.numpy(), LEAST_INFORMATION)
        step = first.numpy() * variance
        if likelihood.bound(at, y_, shape) is not None:  # far out, where there is no curvature
            step = np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        mean, cov, found = _working_fit(X, fitted - step, codes, weight, 1 / variance, differ, cov)
        # not the step of a row: rare labels take large ones, and outputs would be pushed away
        fitted = fitted + np.clip(found - fitted, -LARGEST_STEP, LARGEST_STEP)
    return mean, cov, likelihood.dispersion(fitted, y, unit, weight)


def _working_fit(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray | None,
    information: np.ndarray,
    differ: Differ,
    before: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of coefficients, and fitted y, of rows of known information.

    `before` is the covariance that earlier rounds came to.
    """
    n_features = X.shape[1]
    if n_features <= LARGEST_MIXED:
        mean, cov, _, fitted = _mixed_model(X, y, codes, weight, information, differ, before)
        return mean, cov, fitted
    ones = np.c_[np.ones(len(X)), X]
    information = information if weight is None else information * weight / weight.mean()
    left = ones.T * information
    ridge = 0.01 * information.sum() * np.diag(np.r_[0.0, np.ones(n_features)])
    mean = np.linalg.solve(left @ ones + ridge, left @ y)
    return mean, np.diag(_pooled_scales(n_features) ** 2), ones @ mean


def start_of_classes(
    X: np.ndarray, labels: np.ndarray, n_classes: int, weight: np.ndarray | None = None
) -> Start:
    """Coefficients of a pooled logistic regression, with a prior of independent deviations.

    Parameters and results are as in `start_of_numbers`; `labels` are positions of classes.
    """
    n_features = X.shape[1]
    mean = np.zeros((1 + n_features, n_classes))
    rows = slice(None, None, -(-len(X) // POOLED_ROWS))
    X, labels, weight = X[rows], labels[rows], weight if weight is None else weight[rows]
    if not n_features:  # rows are no tables: the classes' frequencies
        counts = np.bincount(labels, weight, n_classes)
        logs = np.log(counts[counts > 0])
        mean[0, counts > 0] = logs - logs.mean()
    elif labels.min() < labels.max():  # other classes may be in the tasks held out alone
        from sklearn.linear_model import LogisticRegression  # which not every process needs

        pooled = LogisticRegression(max_iter=100).fit(X, labels, weight)
        coef = np.c_[pooled.intercept_, pooled.coef_]
        if len(coef) == 1:  # the logit of the second of two classes
            coef = np.concatenate([-coef, coef]) / 2
        mean[:, pooled.classes_] = coef.T
    return mean, np.diag(_pooled_scales(n_features)), np.ones(1), np.full(1, 2.0)


def _pooled_scales(n_features: int) -> np.ndarray:
    """Spread of the coefficients of tasks, which a pooled model does not tell."""
    return np.r_[0.5, np.full(n_features, 0.5 / math.sqrt(max(n_features, 1)))]
