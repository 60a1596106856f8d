"""Other ways to predict for a new task from a few rows, for `sklearn_maml.comparison`.

Every class here learns what it can from the training tasks (`fit`) and predicts the query rows of
held-out tasks from their support rows (`predict`). Features, and targets in regression, come
standardised with the statistics of the training tasks; labels are positions 0, 1, ... and their
predictions are probabilities.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "Baseline",
    "Episode",
    "PerTask",
    "Pooled",
    "TrainingTasks",
    "draw_episode",
]

# part of the training tasks that choices (rates, steps, strengths) are made on, and the support
# sets drawn of each of them
VALIDATION_FRACTION, VALIDATION_DRAWS = 0.15, 3
VALIDATION_QUERIES = 150
RIDGE_STRENGTHS = np.logspace(-3, 3, 13)


@dataclasses.dataclass
class Episode:
    """Support and query rows of a task; `y_query` is for choices on validation tasks."""

    X_support: np.ndarray
    y_support: np.ndarray
    X_query: np.ndarray
    y_query: np.ndarray | None = None


@dataclasses.dataclass
class TrainingTasks:
    """Rows of the training tasks, and what several methods fit on them alike.

    `task` has the task of each row, `n_shots` the sizes of the support sets to come (of each
    class, in classification), `n_classes` is 0 in regression.
    """

    X: np.ndarray
    y: np.ndarray
    task: np.ndarray
    n_shots: tuple[int, ...]
    n_classes: int
    seed: int

    def __post_init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, float]] = {}
        self.borrowed = 0.0  # seconds that a method has spared by taking what another one made

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, made once for all methods."""
        if key in self._made:
            value, seconds = self._made[key]
            self.borrowed += seconds
            return value
        start = time.perf_counter()
        value = make()
        self._made[key] = value, time.perf_counter() - start
        return value

    def rows_of_tasks(self) -> list[np.ndarray]:
        """Row positions of each task."""
        order = np.argsort(self.task, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.task[order])) + 1)

    def validation(self) -> tuple[np.ndarray, dict[int, list[Episode]]]:
        """Rows of the tasks to train on, and episodes of the validation tasks for each K."""
        rng = np.random.RandomState(self.seed)
        tasks = self.rows_of_tasks()
        order = rng.permutation(len(tasks))
        n_held = max(1, round(VALIDATION_FRACTION * len(tasks)))
        episodes: dict[int, list[Episode]] = {k: [] for k in self.n_shots}
        for j in order[:n_held]:
            for _ in range(VALIDATION_DRAWS):
                rows = rng.permutation(tasks[j])
                for k in self.n_shots:
                    # tasks with too few rows for K give half of them, or one of each class
                    fewer = 1 if self.n_classes else max(len(rows) // 2, 1)
                    for n in (k, min(k, fewer)):
                        support, query = draw_episode(
                            rows, self.y, n, self.n_classes > 0, VALIDATION_QUERIES
                        )
                        if len(query):
                            break
                    else:
                        continue
                    episodes[k].append(
                        Episode(self.X[support], self.y[support], self.X[query], self.y[query])
                    )
        if not all(episodes.values()):
            raise ValueError(
                "The baselines that choose a rate or a strength on validation tasks found none "
                "with rows for a support and a query set. Leave them out of `baselines`, or leave "
                "out small tasks."
            )
        return np.concatenate([tasks[j] for j in order[n_held:]]), episodes


def draw_episode(
    rows: np.ndarray, y: np.ndarray, k: int, classification: bool, max_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split shuffled rows of a task: the first k (of each class) are support rows."""
    if not classification:
        return rows[:k], rows[k : k + max_queries]
    seen: dict[Any, int] = {}
    is_support = np.zeros(len(rows), dtype=bool)
    for position, label in enumerate(y[rows].tolist()):
        seen[label] = seen.get(label, 0) + 1
        is_support[position] = seen[label] <= k
    return rows[is_support], rows[~is_support][:max_queries]


class Baseline:
    """Learns from training tasks and predicts each held-out task from its support rows."""

    # methods of a family run one after the other and share what they fit
    family = ""

    def fit(self, train: TrainingTasks) -> Any:
        """Learn from the training tasks."""
        self.n_classes = train.n_classes
        return self

    def predict(self, episodes: Sequence[Episode], k: int) -> list[np.ndarray]:
        """Predict the query rows of each episode, of K support rows (of each class)."""
        return [self.predict_task(e.X_support, e.y_support, e.X_query) for e in episodes]

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Predict the query rows of one task from its support rows."""
        raise NotImplementedError


# -- one model for all tasks ---------------------------------------------------------------------


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

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Predict without regard to the support rows."""
        return _predict(self.model_, X_query, self.n_classes)


class ShrunkIntercept(Pooled):
    """A pooled model with a random intercept: the support residuals' mean, shrunk."""

    def fit(self, train: TrainingTasks) -> Any:
        """Take the shrinkage from the variance of residuals within and between tasks."""
        super().fit(train)
        residual = self.residuals(train)
        parts = [residual[rows] for rows in train.rows_of_tasks()]
        sizes = np.array([len(part) for part in parts])
        squares = sum(((part - part.mean()) ** 2).sum() for part in parts)
        within = squares / max((sizes - 1).sum(), 1)
        means = np.array([part.mean() for part in parts])
        # means of few rows vary with the noise, too
        between = np.mean(means**2) - within * np.mean(1 / sizes)
        self.ratio_ = within / between if between > 0 else np.inf
        return self

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Predict, after correcting the intercept."""
        residual = y - self.model_.predict(X)
        prediction: np.ndarray = self.model_.predict(X_query)
        return prediction + residual.sum() / (len(residual) + self.ratio_)


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

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Predict with the pooled model plus the expected residual."""
        scale, constant, noise = self.parameters_[:3]
        A, B = X / self.parameters_[3:], X_query / self.parameters_[3:]
        kernel = scale * np.exp(-0.5 * cdist(A, A, "sqeuclidean")) + constant
        weights = np.linalg.solve(kernel + noise * np.eye(len(X)), y - self.model_.predict(X))
        cross = scale * np.exp(-0.5 * cdist(B, A, "sqeuclidean")) + constant
        prediction: np.ndarray = self.model_.predict(X_query) + cross @ weights
        return prediction


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
    parameters: np.ndarray = np.exp(min(fits, key=lambda fit: fit.fun).x)
    return parameters


# -- a model for each task -----------------------------------------------------------------------


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
            return _predict(model, X_query, self.n_classes)


class NearestRow(Baseline):
    """The class of the nearest support row, as a probability of a half more than the others."""

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Give half of the probability to the nearest row's class and half to all classes."""
        model = KNeighborsClassifier(n_neighbors=1).fit(X, y)
        return (_predict(model, X_query, self.n_classes) + 1 / self.n_classes) / 2


def _predict(model: Any, X: np.ndarray, n_classes: int) -> np.ndarray:
    """Predicted numbers, or probabilities of all classes, those that the model knows not at 0."""
    if not n_classes:
        return np.asarray(model.predict(X), dtype=np.float64)
    p = np.zeros((len(X), n_classes))
    if hasattr(model, "predict_proba"):
        p[:, model.classes_.astype(int)] = model.predict_proba(X)
    else:
        p[np.arange(len(X)), model.predict(X).astype(int)] = 1
    return p


def _gaussian_process(n_rows: int) -> Any:
    kernel = ConstantKernel() * RBF() + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)


# -- tasks with parameters of their own, drawn around shared ones --------------------------------


class MixedModel(Baseline):
    """Linear model with a random intercept and random slopes, fitted by EM.

    The coefficients of a task are normally distributed around those of the population. Written in a
    root of their covariance, which may be singular: there may be more features than tasks, and
    features may depend on each other.
    """

    MAX_ITER, TOL = 500, 1e-7

    def fit(self, train: TrainingTasks) -> Any:
        """Estimate mean and covariance of the coefficients, and the noise."""
        super().fit(train)
        tasks = train.rows_of_tasks()
        A = [_with_ones(train.X[rows]) for rows in tasks]
        b = [train.y[rows] for rows in tasks]
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

    def predict_task(self, X: np.ndarray, y: np.ndarray, X_query: np.ndarray) -> np.ndarray:
        """Predict with the coefficients expected after the support rows."""
        A = _with_ones(X)
        means, _ = self._posteriors((A.T @ A)[None], (A.T @ y)[None])
        prediction: np.ndarray = _with_ones(X_query) @ means[0]
        return prediction


def _with_ones(X: np.ndarray) -> np.ndarray:
    return np.c_[np.ones(len(X)), X]


def _root(cov: np.ndarray) -> np.ndarray:
    """Return a matrix whose product with its transpose is `cov`."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0))


@dataclasses.dataclass
class _Stacked:
    """Support rows of tasks as (n_tasks, n_rows, ...) tensors; weights make means over a task."""

    X: Tensor
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, X: Sequence[np.ndarray], y: Sequence[np.ndarray], dtype: torch.dtype) -> _Stacked:
        n = max(len(rows) for rows in X)
        stacked_X = np.zeros((len(X), n, X[0].shape[1]))
        stacked_y = np.zeros((len(X), n), dtype=y[0].dtype)
        weight = np.zeros((len(X), n))
        for j, (rows, target) in enumerate(zip(X, y, strict=True)):
            stacked_X[j, : len(rows)], stacked_y[j, : len(rows)] = rows, target
            weight[j, : len(rows)] = 1 / len(rows)
        is_label = stacked_y.dtype.kind == "i"
        return cls(
            torch.as_tensor(stacked_X, dtype=dtype),
            torch.as_tensor(stacked_y, dtype=torch.long if is_label else dtype),
            torch.as_tensor(weight, dtype=dtype),
        )

    def score(self, output: Tensor) -> float:
        """Mean over tasks of what choices go by: root mean squared error, or cross-entropy."""
        losses = self.losses(output)
        return float((losses if self.y.dtype == torch.long else losses.sqrt()).mean())

    def losses(self, output: Tensor) -> Tensor:
        """Mean loss of the rows of each task: cross-entropy of labels, squared error of numbers."""
        if self.y.dtype == torch.long:
            rows = cross_entropy(output.flatten(0, 1), self.y.flatten(), reduction="none")
            rows = rows.reshape(self.y.shape)
        else:
            rows = (output[..., 0] - self.y) ** 2
        return (rows * self.weight).sum(1)


def _support_and_query(
    episodes: Sequence[Episode], dtype: torch.dtype
) -> tuple[_Stacked, _Stacked]:
    """Stack the support sets and, for choices, the query sets of episodes."""
    support = _Stacked.of([e.X_support for e in episodes], [e.y_support for e in episodes], dtype)
    targets = [
        np.zeros(len(e.X_query), dtype=e.y_support.dtype) if e.y_query is None else e.y_query
        for e in episodes
    ]
    return support, _Stacked.of([e.X_query for e in episodes], targets, dtype)


def _unstack(output: Tensor, episodes: Sequence[Episode], n_classes: int) -> list[np.ndarray]:
    values = output.double().numpy()
    parts = [values[j, : len(e.X_query)] for j, e in enumerate(episodes)]
    return [softmax(part, axis=1) if n_classes else part[:, 0] for part in parts]


class HierarchicalLogistic(Baseline):
    """Logistic regression whose coefficients are drawn to those of all tasks pooled.

    The penalty of the pooled fit and the strength of the one on deviations from it are chosen
    together, on validation tasks.
    """

    STRENGTHS: ClassVar = tuple(np.logspace(-4, 2, 10))
    INVERSE_PENALTIES = (1.0, 10.0, 100.0)

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
        support, query = _support_and_query(episodes, torch.float64)
        coefs = self._coefs(pooled, support, strength)
        return query.score(_linear(query.X, coefs))

    @staticmethod
    def _coefs(pooled: Tensor, support: _Stacked, strength: float) -> Tensor:
        """Coefficients of each task: a convex problem, solved for all tasks at once."""
        deviation = torch.zeros((len(support.X), *pooled.shape), dtype=pooled.dtype)
        deviation.requires_grad_()
        solver = torch.optim.LBFGS(
            [deviation], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = support.losses(_linear(support.X, pooled + deviation)).sum()
            loss = loss + strength * (deviation**2).sum()
            loss.backward()
            return loss

        solver.step(closure)
        return (pooled + deviation).detach()

    def predict(self, episodes: Sequence[Episode], k: int) -> list[np.ndarray]:
        """Predict with the coefficients of each task."""
        support, query = _support_and_query(episodes, torch.float64)
        pooled, strength = _for_shots(self.coefs_, k), _for_shots(self.strengths_, k)
        coefs = self._coefs(pooled, support, strength)
        return _unstack(_linear(query.X, coefs), episodes, self.n_classes)


def _logistic(n_rows: int) -> Any:
    return LogisticRegression(max_iter=1000)


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


def _for_shots(chosen: dict[int, Any], k: int) -> Any:
    """Return what was chosen for K support rows, or for the nearest number with a choice."""
    return chosen[min(chosen, key=lambda other: abs(other - k))]


class FineTunedMLP(Baseline):
    """A network trained on the rows of all tasks, then on the support rows of each.

    Plain gradient steps on all parameters, of a rate and a number chosen on validation tasks:
    what a meta-learned initialisation is to be better than.
    """

    HIDDEN = 64
    RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
    STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
    BATCH, BETA, MAX_UPDATES, CHECK_EVERY, PATIENCE = 256, 2e-3, 5000, 100, 10

    def fit(self, train: TrainingTasks) -> Any:
        """Train until validation tasks gain no more, then choose the rate and the steps."""
        super().fit(train)
        rest, validation = train.validation()
        rng = np.random.RandomState(train.seed)
        generator = torch.Generator().manual_seed(train.seed)
        sizes = [train.X.shape[1], self.HIDDEN, self.HIDDEN, train.n_classes or 1]
        params = []
        for n_in, n_out in itertools.pairwise(sizes):
            bound = n_in**-0.5
            for shape in ((n_in, n_out), (1, n_out)):
                value = torch.rand(shape, generator=generator) * 2 * bound - bound
                params.append(value.requires_grad_())
        held = np.setdiff1d(np.arange(len(train.y)), rest)
        target = train.y.astype(np.int64 if train.n_classes else np.float64)
        unseen = _Stacked.of([train.X[held]], [target[held]], torch.float32)
        rows = _Stacked.of([train.X[rest]], [target[rest]], torch.float32)
        optimizer = torch.optim.Adam(params, lr=self.BETA)
        best, since, kept = np.inf, 0, [p.detach().clone() for p in params]
        for update in range(self.MAX_UPDATES):
            batch = torch.as_tensor(rng.randint(len(rest), size=self.BATCH))
            part = _Stacked(
                rows.X[:, batch], rows.y[:, batch], torch.full((1, self.BATCH), 1 / self.BATCH)
            )
            loss = part.losses(_forward(params, part.X)).sum()
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = gradient
            optimizer.step()
            if (update + 1) % self.CHECK_EVERY == 0:
                with torch.no_grad():
                    loss_now = float(unseen.losses(_forward(params, unseen.X)).sum())
                since += 1
                if loss_now < best:
                    best, since, kept = loss_now, 0, [p.detach().clone() for p in params]
                if since >= self.PATIENCE:
                    break
        self.params_ = kept
        self.chosen_ = {k: self._choose(episodes) for k, episodes in validation.items()}
        return self

    def _choose(self, episodes: Sequence[Episode]) -> tuple[float, int]:
        """Rate and steps with the least mean loss of the query rows."""
        support, query = _support_and_query(episodes, torch.float32)
        best: tuple[float, float, int] = (np.inf, 0.0, 0)
        for rate in self.RATES:
            for step, params in enumerate(self._path(support, rate, max(self.STEPS))):
                if step not in self.STEPS:
                    continue
                with torch.no_grad():
                    loss = query.score(_forward(params, query.X))
                if not np.isfinite(loss):
                    break
                best = min(best, (loss, rate, step))
        return best[1], best[2]

    def _path(self, support: _Stacked, rate: float, steps: int) -> Any:
        """Yield the parameters of each task after 0, 1, ... steps."""
        params = [p.expand(len(support.X), *p.shape).clone() for p in self.params_]
        yield params
        for _ in range(steps):
            params = [p.requires_grad_() for p in params]
            loss = support.losses(_forward(params, support.X)).sum()
            gradients = torch.autograd.grad(loss, params)
            params = [(p - rate * g).detach() for p, g in zip(params, gradients, strict=True)]
            yield params

    def predict(self, episodes: Sequence[Episode], k: int) -> list[np.ndarray]:
        """Predict with the parameters after fine-tuning."""
        rate, steps = _for_shots(self.chosen_, k)
        support, query = _support_and_query(episodes, torch.float32)
        *_, params = self._path(support, rate, steps)
        with torch.no_grad():
            return _unstack(_forward(params, query.X), episodes, self.n_classes)


def _forward(params: Sequence[Tensor], X: Tensor) -> Tensor:
    for layer in range(0, len(params), 2):
        X = X @ params[layer] + params[layer + 1]
        X = X.relu() if layer + 2 < len(params) else X
    return X


# -- the lists -----------------------------------------------------------------------------------


def _ridge() -> Any:
    return RidgeCV(RIDGE_STRENGTHS)


def _boosting() -> Any:
    return HistGradientBoostingRegressor(random_state=0)


REGRESSION: dict[str, Callable[[], Baseline]] = {
    "pooled ridge": lambda: Pooled(_ridge(), "ridge"),
    "pooled HistGradientBoosting": lambda: Pooled(_boosting(), "boosting"),
    "pooled ridge + shrunk intercept": lambda: ShrunkIntercept(_ridge(), "ridge"),
    "pooled HGB + shrunk intercept": lambda: ShrunkIntercept(_boosting(), "boosting"),
    "per-task ridge": lambda: PerTask(lambda n: _ridge()),
    "per-task GP": lambda: PerTask(_gaussian_process),
    "per-task kNN": lambda: PerTask(
        lambda n: KNeighborsRegressor(n_neighbors=min(3, n), weights="distance")
    ),
    "mixed model, intercept + slopes": lambda: MixedModel(),
    "pooled HGB + GP on residuals": lambda: ResidualProcess(_boosting(), "boosting"),
    "pretrained MLP + fine-tune": lambda: FineTunedMLP(),
}
CLASSIFICATION: dict[str, Callable[[], Baseline]] = {
    "pooled HistGradientBoosting": lambda: Pooled(
        HistGradientBoostingClassifier(random_state=0), "boosting"
    ),
    "pooled logistic": lambda: Pooled(_logistic(0), "logistic"),
    "per-task 1-NN": lambda: NearestRow(),
    "per-task logistic": lambda: PerTask(_logistic),
    "hierarchical logistic": lambda: HierarchicalLogistic(),
    "pretrained MLP + fine-tune": lambda: FineTunedMLP(),
}
