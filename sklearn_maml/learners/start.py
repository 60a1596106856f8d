"""Where a Gaussian head starts: a mixed model of linear coefficients, or a pooled one."""

from __future__ import annotations

import math
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning

__all__ = ["NOISE_FLOOR", "start_of_classes", "start_of_numbers"]

NOISE_FLOOR = 1e-5  # variance, of targets of variance one
# features of a mixed model, a round of which is cubic in them; entries of all matrices of the tasks
LARGEST_MIXED, MIXED_ENTRIES = 100, 2**20
ROUNDS = 40
# rows that a pooled classifier sees
POOLED_ROWS = 20_000

Start = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def start_of_numbers(X: np.ndarray, y: np.ndarray, codes: np.ndarray) -> Start:
    """Mean, root of the covariance, and noise of linear coefficients across tasks.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_features)
        Standardised.
    y : ndarray of shape (n_rows, n_outputs)
        Standardised.
    codes : int ndarray of shape (n_rows,)

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
        gram = X.T @ X + 0.01 * len(X) * np.eye(n_features)
        mean = np.concatenate([y.mean(0)[None], np.linalg.solve(gram, X.T @ y)])
        scales = np.r_[0.5, np.full(n_features, 0.5 / math.sqrt(n_features))]
        return mean, np.diag(scales), np.ones(n_outputs), np.full(n_outputs, 0.25)
    fits = [_mixed_model(X, y[:, k], codes) for k in range(n_outputs)]
    means, covs, noises = (np.stack(part) for part in zip(*fits, strict=True))
    traces = np.trace(covs, axis1=1, axis2=2)
    amplitude = np.sqrt(traces / traces[0])
    cov = (covs / (amplitude**2)[:, None, None]).mean(0)
    factor = np.linalg.cholesky(cov + 1e-6 * np.eye(1 + n_features))
    return means.T, factor, amplitude, noises


def _mixed_model(
    X: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of the tasks' linear coefficients, and the noise, by ECME.

    The mean is the generalised least-squares solution under the covariance at hand (Liu & Rubin
    1994): where slopes hardly differ, EM takes hundreds of rounds to it.
    """
    ones = np.c_[np.ones(len(X)), X]
    n_columns = ones.shape[1]
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    # some of very many tasks tell as much
    parts = parts[:: -(-len(parts) * n_columns**2 // MIXED_ENTRIES)]
    used = y[np.concatenate(parts)]
    gram = np.stack([ones[rows].T @ ones[rows] for rows in parts])
    moment = np.stack([ones[rows].T @ y[rows] for rows in parts])
    eye = np.eye(n_columns)
    mean, cov, noise = np.zeros(n_columns), 0.25 * eye, 0.5
    for _ in range(ROUNDS):
        precision = np.linalg.inv(cov)
        posterior = np.linalg.inv(precision + gram / noise)
        shrunk = posterior @ gram / noise
        left = (gram - gram @ shrunk).sum(0) / noise
        right = (moment - np.einsum("tpq,tq->tp", gram @ posterior, moment) / noise).sum(0) / noise
        mean = np.linalg.solve(left + 1e-8 * np.trace(left) / n_columns * eye, right)
        means = np.einsum("tpq,tq->tp", posterior, precision @ mean + moment / noise)
        deviation = means - mean
        cov = posterior.mean(0) + deviation.T @ deviation / len(parts)
        cov = (cov + cov.T) / 2 + 1e-8 * eye
        error = used @ used - 2 * (means * moment).sum()
        error += np.einsum("tp,tpq,tq->", means, gram, means) + noise * np.einsum("tpp->", shrunk)
        noise = max(float(error) / used.size, NOISE_FLOOR)
    return mean, cov, noise


def start_of_classes(X: np.ndarray, labels: np.ndarray, n_classes: int) -> Start:
    """Coefficients of a pooled logistic regression, with a prior of independent deviations.

    Parameters and results are as in `start_of_numbers`; `labels` are positions of classes.
    """
    n_features = X.shape[1]
    mean = np.zeros((1 + n_features, n_classes))
    rows = slice(None, None, -(-len(X) // POOLED_ROWS))
    X, labels = X[rows], labels[rows]
    if labels.min() < labels.max():  # other classes may be in the tasks held out alone
        from sklearn.linear_model import LogisticRegression  # which not every process needs

        with warnings.catch_warnings():  # a start need not be exact
            warnings.simplefilter("ignore", ConvergenceWarning)
            pooled = LogisticRegression(max_iter=100).fit(X, labels)
        coef = np.c_[pooled.intercept_, pooled.coef_]
        if len(coef) == 1:  # the logit of the second of two classes
            coef = np.concatenate([-coef, coef]) / 2
        mean[:, pooled.classes_] = coef.T
    scales = np.r_[0.5, np.full(n_features, 0.5 / math.sqrt(n_features))]
    return mean, np.diag(scales), np.ones(1), np.full(1, 2.0)
