"""Medians, quantiles and amounts of unseen tasks, beside boosting with the same loss.

    python benchmarks/losses.py [--data FOLDER] [--seeds 0,1,2] [--problems median,high]

Collections and held-out tasks are those of `tabular.py`. Errors are means over tasks: absolute ones
for medians, pinball losses for quantiles, both in standard deviations of the training targets, and
gamma deviances for amounts, whose targets are 2 or e to the power of the logarithms in the files.

Boosting has the same loss and knows no tasks. Its shrunk offset is the median (the quantile, the
mean ratio) of what is left on the support rows of a task, times ``K / (K + k)``, with the k that is
best on 15 % of the training tasks. "squared error" is a default `MAMLRegressor`: its mean, so many
of its standard deviations above it, or for amounts the mean of a lognormal distribution with both.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor
from tabular import COLLECTIONS, load_all, split

from sklearn_maml import MAMLRegressor

PROBLEMS = {
    "median": ["cheese", "school", "hedonic", "fries"],
    "high": ["station_temperature", "cheese", "school"],
    "low": ["station_temperature", "cheese", "school"],
    "amount": ["x264 kbps", "cheese", "hedonic"],
}
QUANTILES = {"median": 0.5, "high": 0.9, "low": 0.1}
BASES = {"x264 kbps": 2.0, "cheese": np.e, "hedonic": np.e}
SHRINKAGES = (0, 0.5, 1, 2, 5, 10, 30, 100, np.inf)


def errors(problem, y, prediction, scale):
    """Loss of each row."""
    if problem == "amount":
        ratio = y / np.maximum(prediction, 1e-12)
        return 2 * (ratio - 1 - np.log(ratio))
    off, q = y - prediction, QUANTILES[problem]
    return np.maximum(q * off, (q - 1) * off) * (2 if problem == "median" else 1) / scale


def offset(problem, y, prediction, shrinkage):
    """What is left of the support rows of a task, and how predictions take it."""
    part = len(y) / (len(y) + shrinkage) if len(y) else 0.0
    if problem == "amount":
        return (y.sum() / prediction.sum()) ** part
    return part * np.quantile(y - prediction, QUANTILES[problem])


class Boosting:
    """Pooled boosting, and the same with a shrunk offset for each task."""

    def __init__(self, problem, seed):
        self.problem = problem
        how = {"loss": "gamma"} if problem == "amount" else {"loss": "quantile"}
        if problem != "amount":
            how["quantile"] = QUANTILES[problem]
        self.model = HistGradientBoostingRegressor(random_state=seed, **how)

    def fit(self, X, y, task, shots, seed):
        """Find the shrinkage for each K on some tasks, and fit on all."""
        names = np.random.RandomState(seed).permutation(np.unique(task))
        out = np.isin(task, names[: max(len(names) * 15 // 100, 1)])
        self.model.fit(X[~out], y[~out])
        self.shrinkage = {}
        for k in shots:
            rng, found = np.random.RandomState(seed), np.zeros(len(SHRINKAGES))
            for name in np.unique(task[out]):
                for _ in range(5):
                    rows = rng.permutation(np.flatnonzero(task == name))
                    if len(rows) <= k:
                        continue
                    found += [
                        errors(
                            self.problem, y[rows[k:]], self._one(X, y, rows[:k], rows[k:], s), 1.0
                        ).mean()
                        for s in SHRINKAGES
                    ]
            self.shrinkage[k] = SHRINKAGES[int(found.argmin())]
        self.model.fit(X, y)

    def predict(self, X, y, episodes, k):
        """Predictions of the query rows of all episodes, by each of the two."""
        pooled = np.concatenate([self.model.predict(X[query]) for _, query in episodes])
        shifted = [self._one(X, y, *episode, self.shrinkage[k]) for episode in episodes]
        return pooled, np.concatenate(shifted)

    def _one(self, X, y, support, query, shrinkage):
        found = offset(self.problem, y[support], self.model.predict(X[support]), shrinkage)
        prediction = self.model.predict(X[query])
        return prediction * found if self.problem == "amount" else prediction + found


def of_episodes(model, X, y, episodes, std=False):
    """Predictions of the query rows of all episodes."""
    support, query = (np.concatenate(rows) for rows in zip(*episodes, strict=True))
    of_support, of_query = (
        np.repeat(np.arange(len(episodes)), [len(episode[j]) for episode in episodes])
        for j in (0, 1)
    )
    model.adapt(X[support], y[support], groups=of_support)
    return model.predict(X[query], groups=of_query, return_std=std)


def run(problem, X, y, task, collection, seed):
    """Mean error over tasks of each method and K; a frame."""
    train, episodes = split(X, y, task, collection, seed)
    amounts, scale = problem == "amount", y[train].std()
    logs, data = np.log(y) if amounts else y, (X[train], y[train])
    losses = {"amount": ["gamma"], "median": ["absolute_error", "huber"]}
    fits, seconds = {}, {}
    for loss in losses.get(problem, ["quantile"]):
        quantile = {"quantile": QUANTILES[problem]} if loss == "quantile" else {}
        fits[f"loss={loss!r}"] = MAMLRegressor(loss=loss, random_state=seed, **quantile)
    fits["squared error"] = MAMLRegressor(random_state=seed)
    for name, model in fits.items():
        target = logs if name == "squared error" else y
        began = time.process_time()
        model.fit(X[train], target[train], groups=task[train])
        seconds[name] = time.process_time() - began
    boosting, began = Boosting(problem, seed), time.process_time()
    boosting.fit(*data, task[train], list(episodes), seed)
    seconds["boosting"] = seconds["boosting + shrunk offset"] = time.process_time() - began
    rows = []
    for k, of_tasks in episodes.items():
        found = {
            name: of_episodes(model, X, y, of_tasks)
            for name, model in fits.items()
            if name != "squared error"
        }
        mean, std = of_episodes(fits["squared error"], X, logs, of_tasks, std=True)
        found["squared error"] = (
            np.exp(mean + std**2 / 2) if amounts else mean + norm.ppf(QUANTILES[problem]) * std
        )
        pair = boosting.predict(X, y, of_tasks, k)
        found["boosting"], found["boosting + shrunk offset"] = pair
        target = np.concatenate([y[query] for _, query in of_tasks])
        code = np.repeat(np.arange(len(of_tasks)), [len(query) for _, query in of_tasks])
        for name, prediction in found.items():
            of_rows = errors(problem, target, prediction, scale)
            error = (np.bincount(code, of_rows) / np.bincount(code)).mean()
            below = np.mean(target <= prediction)
            rows.append((name, k, error, below, seconds[name]))
    return pd.DataFrame(rows, columns=["method", "K", "error", "below", "seconds"])


def main() -> None:
    """Print a table for each problem and collection, averaged over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with collections that are not shipped")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--collections", help="names, comma-separated; others are left out")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for problem in args.problems.split(","):
        chosen = args.collections.split(",") if args.collections else COLLECTIONS
        names = [name for name in PROBLEMS[problem] if name in chosen]
        for name, collection, (X, y, task) in load_all(names, args.data):
            if problem == "amount":
                y = BASES[name] ** y
            seeds = [int(seed) for seed in args.seeds.split(",")]
            parts = [run(problem, X, y, task, collection, seed) for seed in seeds]
            table = pd.concat(parts).groupby(["method", "K"], sort=False).mean()
            print(f"\n{problem}: {name}\n{table.unstack('K').round(4).to_string()}", flush=True)


if __name__ == "__main__":
    main()
