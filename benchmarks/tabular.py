"""Real collections of small regression tasks: error before and after adaptation to K rows.

    python benchmarks/tabular.py --data FOLDER [--baselines] [--seeds 0,1] [--set alpha=0.03 ...]

FOLDER holds gzipped CSV files: first column ``task``, last the target, one row per observation.
Tasks are sorted by name and shuffled with ``RandomState(1000 + seed)``; the first 30 % (at most 60;
75 for station_temperature) are held out. ``RandomState(7 + seed)`` draws K support rows of each
held-out task in turn; the rest (at most 150) are the query rows. Features and target are
standardised with the training tasks' statistics. The score of a task is its RMSE in units of the
pooled target SD.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV

from sklearn_maml import MAMLRegressor

# file, columns that are not features, largest number of held-out tasks
COLLECTIONS = {
    "station_temperature": ("station_temperature.csv.gz", (), 75),
    "x264": ("x264_videos.csv.gz", ("log2_fps",), 60),
    "cheese": ("cheese.csv.gz", ("price",), 60),
    "school": ("school_ilea139.csv.gz", (), 60),
}
TARGETS = {"x264": "log2_kbps"}


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Read a collection; returns X, y, task and the largest number of held-out tasks."""
    file, left_out, most = COLLECTIONS[name]
    with gzip.open(folder / file, "rt", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        rows = list(reader)
    target = TARGETS.get(name, header[-1])
    features = [j for j, column in enumerate(header) if column not in ("task", target, *left_out)]
    X = np.array([[float(row[j]) for j in features] for row in rows])
    y = np.array([float(row[header.index(target)]) for row in rows])
    return X, y, np.array([row[0] for row in rows]), most


def split(X, y, task, most, seed):
    """Standardised training rows and the held-out tasks of one seed."""
    names = np.unique(task)
    order = np.random.RandomState(1000 + seed).permutation(len(names))
    n_held = min(75 if most == 75 else round(0.3 * len(names)), most)
    held = names[order[:n_held]]
    train = ~np.isin(task, held)
    X = (X - X[train].mean(0)) / np.where(X[train].std(0) > 0, X[train].std(0), 1)
    y = (y - y[train].mean()) / y[train].std()
    return X, y, train, held


def episodes(task, held, shots, seed):
    """Support and query row positions of each held-out task."""
    rng = np.random.RandomState(7 + seed)
    for name in held:
        rows = rng.permutation(np.flatnonzero(task == name))
        yield rows[:shots], rows[shots : shots + 150]


def evaluate(reg, X, y, task, held, shots, seed, adapt_steps):
    """Mean over held-out tasks of the RMSE after adaptation to `shots` rows."""
    support, query = map(list, zip(*episodes(task, held, shots, seed), strict=True))
    reg.set_params(adapt_steps=adapt_steps)
    rows_s, rows_q = np.concatenate(support), np.concatenate(query)
    reg.adapt(X[rows_s], y[rows_s], groups=task[rows_s])
    error = (reg.predict(X[rows_q], groups=task[rows_q]) - y[rows_q]) ** 2
    return np.mean([np.sqrt(error[task[rows_q] == name].mean()) for name in held])


class MixedModel:
    """Linear model with a random intercept and random slopes, fitted by EM."""

    def fit(self, X, y, task):
        """Estimate the population of coefficients and the noise from the training tasks."""
        data = [(_with_ones(X[task == t]), y[task == t]) for t in np.unique(task)]
        n_coefs = data[0][0].shape[1]
        self.mean, self.cov, self.noise = np.zeros(n_coefs), np.eye(n_coefs), 1.0
        for _ in range(200):
            posteriors = [self._posterior(A, b) for A, b in data]
            means = np.array([m for m, _ in posteriors])
            self.mean = means.mean(0)
            deviations = means - self.mean
            self.cov = sum(c for _, c in posteriors) / len(data)
            self.cov += deviations.T @ deviations / len(data) + 1e-8 * np.eye(n_coefs)
            squares = sum(
                ((b - A @ m) ** 2).sum() + np.trace(A @ c @ A.T)
                for (A, b), (m, c) in zip(data, posteriors, strict=True)
            )
            self.noise = squares / sum(len(b) for _, b in data)
        return self

    def _posterior(self, A, b):
        precision = np.linalg.inv(self.cov)
        cov = np.linalg.inv(precision + A.T @ A / self.noise)
        return cov @ (precision @ self.mean + A.T @ b / self.noise), cov

    def predict(self, X_support, y_support, X_query):
        """Predict with the coefficients expected after the support rows."""
        return _with_ones(X_query) @ self._posterior(_with_ones(X_support), y_support)[0]


def _with_ones(X):
    return np.c_[np.ones(len(X)), X]


class Pooled:
    """One gradient-boosting model for all tasks, with a shrunk intercept for each if asked."""

    def __init__(self, intercept):
        self.intercept = intercept

    def fit(self, X, y, task):
        """Fit on the training tasks; the shrinkage comes from the variance of their residuals."""
        self.model = HistGradientBoostingRegressor(random_state=0).fit(X, y)
        residual = y - self.model.predict(X)
        means = np.array([residual[task == t].mean() for t in np.unique(task)])
        within = np.mean([residual[task == t].var() for t in np.unique(task)])
        self.ratio = within / max(means.var(), 1e-12)
        return self

    def predict(self, X_support, y_support, X_query):
        """Predict, after correcting the intercept by the shrunk mean of the support residuals."""
        prediction = self.model.predict(X_query)
        if self.intercept:
            residual = y_support - self.model.predict(X_support)
            prediction = prediction + residual.sum() / (len(residual) + self.ratio)
        return prediction


class PerTask:
    """A model of its own for each task, from its support rows alone."""

    def __init__(self, make):
        self.make = make

    def fit(self, X, y, task):
        """Learn nothing from other tasks."""
        return self

    def predict(self, X_support, y_support, X_query):
        """Fit on the support rows and predict."""
        return self.make().fit(X_support, y_support).predict(X_query)


def _gaussian_process():
    kernel = ConstantKernel() * RBF() + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)


BASELINES = {
    "pooled gradient boosting": lambda: Pooled(intercept=False),
    "pooled gradient boosting + shrunk intercept": lambda: Pooled(intercept=True),
    "ridge for each task": lambda: PerTask(lambda: RidgeCV(np.logspace(-3, 3, 13))),
    "Gaussian process for each task": lambda: PerTask(_gaussian_process),
    "mixed model, intercept and slopes": lambda: MixedModel(),
}


def evaluate_baselines(X, y, train, task, held, shots, seed, results):
    """Add the baselines' scores on the same support and query rows to `results`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # bounds of the kernel's parameters
        for name, make in BASELINES.items():
            model = make().fit(X[train], y[train], task[train])
            for k in shots:
                rmse = [
                    np.sqrt(np.mean((model.predict(X[s], y[s], X[q]) - y[q]) ** 2))
                    for s, q in episodes(task, held, k, seed)
                ]
                results.setdefault(f"K={k} {name}", []).append(np.mean(rmse))


def main() -> None:
    """Print a row for each collection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--collections", default=",".join(COLLECTIONS))
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--shots", default="5,10")
    parser.add_argument("--set", action="append", default=[], help="parameter=value")
    parser.add_argument("--baselines", action="store_true")
    args = parser.parse_args()
    options = {}
    for item in args.set:
        name, _, value = item.partition("=")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    seeds = [int(seed) for seed in args.seeds.split(",")]
    shots = [int(k) for k in args.shots.split(",")]
    print(f"options {options}, seeds {seeds}: mean over held-out tasks and seeds (per seed)")
    for name in args.collections.split(","):
        X, y, task, most = load(args.data, name)
        results: dict = {}
        took = []
        for seed in seeds:
            Xs, ys, train, held = split(X, y, task, most, seed)
            reg = MAMLRegressor(random_state=seed, **options)
            start = time.perf_counter()
            reg.fit(Xs[train], ys[train], groups=task[train])
            took.append(time.perf_counter() - start)
            for k in shots:
                for steps in (0, None, 2 * reg.steps):
                    score = evaluate(reg, Xs, ys, task, held, k, seed, steps)
                    label = f"K={k} steps={reg.steps if steps is None else steps}"
                    results.setdefault(label, []).append(score)
            if args.baselines:
                evaluate_baselines(Xs, ys, train, task, held, shots, seed, results)
        print(f"{name}: fit {np.mean(took):.0f} s")
        for label, scores in results.items():
            each = " ".join(f"{score:.3f}" for score in scores)
            print(f"    {label:48s} {np.mean(scores):.4f} ({each})", flush=True)


if __name__ == "__main__":
    main()
