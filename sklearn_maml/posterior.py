"""Adaptation in closed form under a prior that is learned across tasks.

Each member of the ensemble is a linear model on ``phi(x) = [1, x, h(x)]`` with a small network
``h``. Its weights have a Gaussian prior, the same for all tasks, and a task's support set turns the
prior into a posterior by linear algebra (ALPaCA, Harrison et al. 2018; compare R2-D2, Bertinetto
et al. 2019). Network, prior and noise are meta-learned by the likelihood of query rows. Where tasks
do not differ, the prior becomes narrow and adapting changes nothing; with few support rows the
posterior stays near the prior. The part of ``[1, x]`` starts as a mixed model with random slopes,
so that a linear truth needs no training, and every member is judged on held-out tasks of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sklearn_maml.episodes import EpisodeBatch, Rows

__all__ = ["Conditioned", "PosteriorEnsemble", "find_logit_scale", "find_weight", "mix"]

Params = dict[str, Tensor]
Draw = tuple[int, np.ndarray]  # number of support rows; rows of each task, these first

WIDTH = 64  # of the two hidden layers
# docs/defaults.md has what these were compared with
N_MEMBERS = 5
SUPPORT = (3, 20)  # support rows in meta-training, log-uniform
TESTED = (5, 10)  # and on held-out tasks
QUERY, QUERY_TESTED = 20, 30
BATCH = 25
RATE = 3e-3
CHECKS = 20  # of the held-out tasks, in a training
NEWTON_STEPS = 8
# features; a round of the mixed model is cubic in them; and entries of all matrices of the tasks
LARGEST_MIXED, MIXED_ENTRIES = 100, 2**20
NOISE_FLOOR = 1e-5  # variance, of targets of variance one
BEYOND = 1e4  # standard deviations at which features are cut off
UNSEEN = 0.2  # of the distinct rows: held out from one member where tasks share them
MARGIN = 0.1  # of the range of the targets: predictions end there
WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # of the posterior; ties: first
TASKS_AT_A_TIME, PADDED_ROWS = 256, 65536  # and their rows, at most
ROWS_AT_A_TIME = 8192
KEYS_AT_A_TIME = 2**22  # random numbers that put the rows of tasks in order


@dataclass(frozen=True)
class Conditioned:
    """What the support sets of `n_tasks` tasks made of the prior.

    ``shift`` has an array (n_tasks, n_columns, n_outputs) for each member: how far the weights have
    moved, in units of the prior, in the dtype of the rows. ``low`` and ``high`` (n_tasks,
    n_outputs) bound the predictions. The support rows themselves are kept for the variance.
    """

    shift: list[np.ndarray]
    low: np.ndarray
    high: np.ndarray
    X: np.ndarray
    codes: np.ndarray
    weight: np.ndarray | None

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.shift[0])


class PosteriorEnsemble:
    """Members that were meta-trained with other tasks held out, and how to predict with them.

    Parameters
    ----------
    members : list of dict of str to float32 ndarray
        Parameters of each member, as they were trained; computations are in float64.
    center, scale : ndarrays of shape (n_features,)
        Mean and standard deviation of the features.
    low, high : ndarrays of shape (n_outputs,)
        Range of the targets of meta-training.
    calibration : float
        Regression: factor of the standard deviation; classification: of the logits.
    classification : bool
    seen : int64 ndarray, default=None
        Marks of the distinct rows of features, where tasks share them.
    calibration_unseen : float, default=None
        `calibration` for rows that are not among them.
    """

    def __init__(
        self,
        members: Sequence[dict[str, np.ndarray]],
        center: np.ndarray,
        scale: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        calibration: float,
        classification: bool,
        seen: np.ndarray | None = None,
        calibration_unseen: float | None = None,
    ) -> None:
        self.members = list(members)
        self.center = center
        self.scale = scale
        self.low = low
        self.high = high
        self.calibration = calibration
        self.classification = classification
        self.seen = seen
        self.calibration_unseen = calibration_unseen

    def state(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return dict(vars(self))

    def _models(self) -> list[_Model]:
        return [
            _Model(
                {name: torch.from_numpy(p).double() for name, p in m.items()}, self.classification
            )
            for m in self.members
        ]

    def _standardise(self, X: np.ndarray) -> np.ndarray:
        z: np.ndarray = (X.astype(np.float64) - self.center) / self.scale
        return np.clip(z, -BEYOND, BEYOND)

    @torch.no_grad()
    def condition(
        self, X: np.ndarray, y: np.ndarray, codes: np.ndarray, n_tasks: int, weight: Any = None
    ) -> Conditioned:
        """Condition on support sets.

        Parameters
        ----------
        X : ndarray of shape (n_rows, n_features)
        y : ndarray of shape (n_rows, n_outputs)
            Standardised targets, or 1 for the class of the row and 0 for the others.
        codes : int ndarray of shape (n_rows,)
            Task of each row.
        n_tasks : int
        weight : ndarray of shape (n_rows,), default=None
            Weights; only their ratios within a task matter.
        """
        Z = self._standardise(X)
        if weight is not None:
            total = np.bincount(codes, weight, n_tasks)
            weight = weight * (np.bincount(codes, minlength=n_tasks) / total)[codes]
        models = self._models()
        n_outputs = y.shape[1]
        shift = [np.empty((n_tasks, model.n_columns, n_outputs), dtype=X.dtype) for model in models]
        for tasks, place, present in _padded(codes, n_tasks):
            root = present.astype(np.float64)
            if weight is not None:
                root *= np.sqrt(weight[place])
            parts = [torch.from_numpy(a) for a in (Z[place], y[place].astype(np.float64), root)]
            for model, moved in zip(models, shift, strict=True):
                moved[tasks] = model.condition(*parts)[0].numpy()
        # between the targets of meta-training and of the support set, and a little beyond
        low, high = (np.repeat(edge[None], n_tasks, 0) for edge in (self.low, self.high))
        np.minimum.at(low, codes, y)
        np.maximum.at(high, codes, y)
        beyond = MARGIN * (high - low)
        return Conditioned(shift, low - beyond, high + beyond, X, codes, weight)

    def predict(self, given: Conditioned, X: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Mean of the targets (n_rows, n_outputs), or logarithm of the classes' probabilities."""
        means = self._means(given, X, codes)
        if not self.classification:
            return np.clip(np.mean(means, axis=0), given.low[codes], given.high[codes])
        p = np.mean([softmax(self.calibration * m, axis=1) for m in means], axis=0)
        return np.log(np.maximum(p, np.finfo(np.float64).tiny))

    @torch.no_grad()
    def _means(self, given: Conditioned, X: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
        Z = self._standardise(X)
        means = []
        for model, shift in zip(self._models(), given.shift, strict=True):
            mean = np.empty((len(Z), shift.shape[2]))
            for start in range(0, len(Z), ROWS_AT_A_TIME):
                rows = slice(start, start + ROWS_AT_A_TIME)
                prior, scaled = model.features(torch.from_numpy(Z[rows]))
                moved = np.einsum("rc,rco->ro", scaled.numpy(), shift[codes[rows]])
                mean[rows] = prior.numpy() + moved
            means.append(mean)
        return means

    @torch.no_grad()
    def predict_std(self, given: Conditioned, X: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the standard deviation (n_rows,) of targets: noise, and doubt about the task."""
        Z = self._standardise(X)
        means = np.stack(self._means(given, X, codes))
        spread = means.var(axis=0).mean(-1)
        within = np.zeros(len(Z))
        asked = np.unique(codes)
        used = np.isin(given.codes, asked)
        position = np.searchsorted(asked, given.codes[used])
        S = self._standardise(given.X[used])
        weight = None if given.weight is None else given.weight[used]
        of_query = np.searchsorted(asked, codes)
        order = np.argsort(of_query, kind="stable")
        cuts = np.searchsorted(of_query[order], np.arange(len(asked) + 1))
        for model in self._models():
            for tasks, place, present in _padded(position, len(asked)):
                root = present.astype(np.float64)
                if weight is not None:
                    root *= np.sqrt(weight[place])
                taken = model.taken(torch.from_numpy(S[place]), torch.from_numpy(root))
                for j, task in enumerate(tasks):
                    for start in range(cuts[task], cuts[task + 1], ROWS_AT_A_TIME):
                        rows = order[start : min(start + ROWS_AT_A_TIME, cuts[task + 1])]
                        scaled = model.features(torch.from_numpy(Z[rows]))[1]
                        within[rows] += model.variance(scaled, taken[j]).numpy()
        calibration = np.full(len(Z), self.calibration)
        if self.seen is not None:
            calibration[~np.isin(_marks(X), self.seen)] = self.calibration_unseen
        return np.sqrt(calibration**2 * within / len(self.members) + spread)

    def predict_held_out(self, batches: Sequence[EpisodeBatch]) -> np.ndarray:
        """Predict the query rows of tasks that the first member has not seen, with it alone."""
        one = PosteriorEnsemble(**{**self.state(), "members": self.members[:1]})
        predicted = []
        for batch in batches:
            X, y, codes = _flat(batch.support)
            given = one.condition(X, self._coded(y), codes, len(batch))
            X, _, codes = _flat(batch.query)
            predicted.append(one.predict(given, X, codes))
        return np.concatenate(predicted)

    def _coded(self, y: np.ndarray) -> np.ndarray:
        n_outputs = self.members[0]["mean"].shape[1]
        return np.eye(n_outputs)[y] if self.classification else y.reshape(len(y), -1)

    @classmethod
    def fit(
        cls,
        X: np.ndarray,
        y: np.ndarray,
        codes: np.ndarray,
        held_out: np.ndarray,
        *,
        classification: bool,
        seed: int,
        n_updates: int,
    ) -> PosteriorEnsemble:
        """Meta-train the members.

        Parameters
        ----------
        X : ndarray of shape (n_rows, n_features)
        y : ndarray of shape (n_rows, n_outputs)
            As in `condition`.
        codes : int ndarray of shape (n_rows,)
            Task of each row.
        held_out : int ndarray
            Tasks that the first member is judged on; the others hold out as many others.
        classification : bool
        seed : int
        n_updates : int
            Meta-updates of each member.
        """
        center, scale = X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64)
        scale = np.where(scale > 1e-12 * np.abs(center), scale, 1.0)
        low, high = y.min(0).astype(np.float64), y.max(0).astype(np.float64)
        new = cls([], center, scale, low, high, 1.0, classification)
        Z = new._standardise(X)
        others = np.setdiff1d(np.arange(codes.max() + 1), held_out)
        rng = np.random.RandomState(seed % 2**32)
        in_turn = np.concatenate([held_out, rng.permutation(others)])
        size = len(held_out)
        draws: list[list[Draw]] = []
        marks = _marks(X)
        distinct = np.unique(marks)
        n_unseen = int(UNSEEN * np.median(np.bincount(codes)))
        # tasks that share their rows tell nothing of other rows unless some are held out, too
        shared = 2 * len(distinct) <= len(X) and n_unseen >= min(TESTED)
        for j in range(N_MEMBERS):
            held = np.take(in_turn, np.arange(j * size, (j + 1) * size), mode="wrap")
            unseen = np.zeros(len(X), dtype=bool)
            if shared and j == N_MEMBERS - 1:
                chosen = rng.permutation(distinct)[: int(UNSEEN * len(distinct))]
                unseen = np.isin(marks, chosen)
                # where rows come with their task, one side may have none of them
                shared = _splits(codes, np.isin(codes, held), unseen)
                unseen &= shared
            training = _Training(Z, y, codes, held, unseen, classification, rng.randint(2**31 - 1))
            model = training.run(n_updates)
            new.members.append({k: p.numpy() for k, p in model.params.items()})
            draws.append(training.draws)
        if shared:
            new.seen = distinct
            new.calibration_unseen = new._calibrate(Z, y, draws[-1:], new._models()[-1:])
            draws.pop()
        new.calibration = new._calibrate(Z, y, draws, new._models()[: len(draws)])
        return new

    @torch.no_grad()
    def _calibrate(
        self, Z: np.ndarray, y: np.ndarray, draws: list[list[Draw]], models: list[_Model]
    ) -> float:
        """Make the members neither over- nor underconfident on tasks they have not seen."""
        outputs, targets, deviations = [], [], []
        for model, of_member in zip(models, draws, strict=True):
            for k, rows in of_member:
                support, query = rows[:, :k], rows[:, k:]
                given = [torch.from_numpy(a) for a in (Z[support], y[support].astype(float))]
                mean, variance = model.query(torch.from_numpy(Z[query]), model.condition(*given))
                outputs.append(mean.reshape(-1, mean.shape[-1]).numpy())
                targets.append(y[query].reshape(-1, mean.shape[-1]))
                deviations.append(variance.sqrt().reshape(-1, 1).numpy())
        output, target = np.concatenate(outputs), np.concatenate(targets)
        if self.classification:
            return find_logit_scale(output, target)
        z = np.abs(output - target) / np.concatenate(deviations)
        # 1.645 standard deviations are to hold nine targets in ten; never narrower than learned
        return float(np.clip(np.quantile(z, 0.9) / 1.645, 1.0, 3.0))


def _splits(codes: np.ndarray, held: np.ndarray, unseen: np.ndarray) -> bool:
    """Whether a task that is held out has two unseen rows, and another one two others."""
    sides = (held & unseen, ~held & ~unseen)
    return all(bool((np.bincount(codes[side]) > 1).any()) for side in sides)


def _marks(X: np.ndarray) -> np.ndarray:
    """Checksum (n_rows,) of each row of features."""
    bits = np.ascontiguousarray(X, dtype=np.float64).view(np.uint64)
    odd = np.random.RandomState(0).randint(0, 2**63, bits.shape[1], dtype=np.uint64) * 2 + 1
    marks: np.ndarray = ((bits ^ (bits >> np.uint64(29))) * odd).sum(1, dtype=np.uint64)
    return marks.view(np.int64)


def mix(posterior: np.ndarray, steps: np.ndarray, weight: float, classification: bool) -> Any:
    """Mix predictions (n_rows, n_outputs) of the posterior and of gradient steps.

    `weight` is that of the posterior. Of classes, probabilities are mixed, and both arguments and
    the result are their logarithms.
    """
    if weight == 1:
        return posterior
    if not classification:
        return weight * posterior + (1 - weight) * steps
    with np.errstate(divide="ignore"):
        return np.logaddexp(posterior + np.log(weight), steps + np.log(1 - weight))


def find_weight(
    posterior: np.ndarray,
    steps: np.ndarray,
    target: np.ndarray,
    codes: np.ndarray,
    classification: bool,
) -> float:
    """Weight of the posterior with the smallest error on held-out tasks; see `mix`.

    The error is the mean of the tasks' root mean squared errors, or cross-entropies.
    """
    n_rows = np.bincount(codes)
    errors = {}
    with np.errstate(over="ignore", invalid="ignore"):  # gradient steps may have diverged
        for weight in WEIGHTS:
            mixed = mix(posterior, steps, weight, classification)
            if classification:
                of_tasks = np.bincount(codes, -(target * mixed).sum(1)) / n_rows
            else:
                of_tasks = np.sqrt(np.bincount(codes, ((mixed - target) ** 2).mean(1)) / n_rows)
            errors[weight] = of_tasks.mean()
    finite = {weight: error for weight, error in errors.items() if np.isfinite(error)}
    return min(finite, key=lambda weight: finite[weight]) if finite else 1.0


def find_logit_scale(logits: np.ndarray, target: np.ndarray) -> float:
    """Factor of logits (n_rows, n_classes) with the smallest cross-entropy (Guo et al. 2017)."""
    factors = np.geomspace(0.25, 4.0, 49)
    losses = [-(target * log_softmax(f * logits, axis=1)).sum(1).mean() for f in factors]
    return float(factors[np.nanargmin(losses)]) if np.isfinite(losses).any() else 1.0


def _padded(codes: np.ndarray, n_tasks: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tasks of similar size together: their positions, rows (n, most), and which are real."""
    sizes = np.bincount(codes, minlength=n_tasks)
    order = np.argsort(codes, kind="stable")
    first = np.cumsum(sizes) - sizes
    by_size = np.argsort(sizes, kind="stable")
    stop = n_tasks
    while stop:  # a task with many rows takes few others along, as all are padded to its size
        most = int(sizes[by_size[stop - 1]])
        start = max(stop - min(TASKS_AT_A_TIME, max(PADDED_ROWS // most, 1)), 0)
        tasks = by_size[start:stop]
        stop = start
        number = np.arange(most)
        present = number < sizes[tasks][:, None]
        place = order[np.where(present, first[tasks][:, None] + number, 0)]
        yield tasks, place, present


def _flat(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, targets and task positions, without padding."""
    n_tasks, n_rows = rows.X.shape[:2]
    lengths = np.full(n_tasks, n_rows) if rows.lengths is None else rows.lengths
    real = np.arange(n_rows) < lengths[:, None]
    codes = np.broadcast_to(np.arange(n_tasks)[:, None], real.shape)[real]
    return rows.X.numpy()[real], rows.y.numpy()[real], codes


class _Model:
    """One member: pure functions of its parameters.

    "w1", "b1", "w2", "b2" are those of the network; "mean" (n_columns, n_outputs), "factor"
    (n_linear, n_linear) and "log_scale" (width,) of the prior; "log_noise" is the logarithm of the
    noise's standard deviation. Outputs share the prior covariance.
    """

    def __init__(self, params: Params, classification: bool) -> None:
        self.params = params
        self.classification = classification

    @property
    def n_columns(self) -> int:
        """Number of weights of an output."""
        return len(self.params["mean"])

    def features(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Prior mean of the outputs, and ``phi(x)`` times a root of the prior covariance."""
        p = self.params
        h = torch.relu(X @ p["w1"] + p["b1"])
        h = torch.relu(h @ p["w2"] + p["b2"]) * (2 / math.sqrt(WIDTH))
        linear = torch.cat([torch.ones_like(X[..., :1]), X], -1)
        scaled = torch.cat([linear @ p["factor"], h * p["log_scale"].exp()], -1)
        return torch.cat([linear, h], -1) @ p["mean"], scaled

    def noise(self) -> Tensor:
        """Variance of the noise."""
        return (2 * self.params["log_noise"]).exp() + NOISE_FLOOR

    def _solver(self, S: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Make the map ``v -> S' (S S' + noise)^-1 v``, by the smaller system; and its factor."""
        noise = self.noise()
        dual = S.shape[-2] <= S.shape[-1]
        gram = S @ S.mT if dual else S.mT @ S
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
        # a system that is not positive definite gives what is not finite, and a skipped update
        factor, failed = torch.linalg.cholesky_ex(gram + noise * eye)
        factor = factor.where((failed == 0)[..., None, None], torch.nan)
        if dual:
            return lambda v: S.mT @ torch.cholesky_solve(v, factor), factor
        return lambda v: torch.cholesky_solve(S.mT @ v, factor), factor

    def condition(self, X: Tensor, y: Tensor, root: Tensor | None = None) -> tuple[Tensor, ...]:
        """Shift of the weights by support rows, and what `variance` needs of them.

        `root` (..., n_rows) has the square roots of the rows' weights, 0 for padding.
        """
        prior, scaled = self.features(X)
        S, m = (scaled, 1.0) if root is None else (scaled * root[..., None], root[..., None])
        solve, factor = self._solver(S)
        if not self.classification:
            return solve(m * (y - prior)), S, factor
        # maximum a posteriori by Newton's method with the constant curvature 1 / noise
        shift = prior.new_zeros(*prior.shape[:-2], S.shape[-1], prior.shape[-1])
        for _ in range(NEWTON_STEPS):
            residual = y - (prior + scaled @ shift).softmax(-1)
            shift = solve(S @ shift + self.noise() * m * residual)
        return shift, S, factor

    def taken(self, X: Tensor, root: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what `variance` needs of each support set."""
        S = self.features(X)[1] * root[..., None]
        return list(zip(S, self._solver(S)[1], strict=True))

    def variance(self, scaled: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        """Variance of the targets of rows, noise included."""
        S, factor = given
        noise = self.noise()
        if factor.shape[-1] == S.shape[-2] and S.shape[-2] <= S.shape[-1]:
            half = torch.linalg.solve_triangular(factor, S @ scaled.mT, upper=False)
            left = (scaled**2).sum(-1) - (half**2).sum(-2)
        else:
            half = torch.linalg.solve_triangular(factor, scaled.mT, upper=False)
            left = noise * (half**2).sum(-2)
        return left.clamp_min(0) + noise

    def query(self, X: Tensor, condition: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return outputs of query rows and, for regression, their variance."""
        shift, S, factor = condition
        prior, scaled = self.features(X)
        mean = prior + scaled @ shift
        if self.classification:
            return mean, torch.ones_like(mean[..., 0])
        return mean, self.variance(scaled, (S, factor))

    def loss(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """Mean negative log likelihood, without its constant."""
        if self.classification:
            return -(y * mean.log_softmax(-1)).sum(-1).mean()
        variance = variance[..., None]
        return 0.5 * ((y - mean) ** 2 / variance + variance.log()).mean()


def _mixed_model(
    X: np.ndarray, y: np.ndarray, codes: np.ndarray, n_rounds: int = 100
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of the tasks' linear coefficients, and the noise, by EM.

    The outputs share the covariance and the noise.
    """
    ones = np.c_[np.ones(len(X)), X]
    n_columns, n_outputs = ones.shape[1], y.shape[1]
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    # some of very many tasks tell as much
    parts = parts[:: -(-len(parts) * n_columns**2 // MIXED_ENTRIES)]
    used = y[np.concatenate(parts)]
    gram = np.stack([ones[rows].T @ ones[rows] for rows in parts])
    moment = np.stack([ones[rows].T @ y[rows] for rows in parts])
    mean, cov, noise = np.zeros((n_columns, n_outputs)), np.eye(n_columns), 1.0
    for _ in range(n_rounds):
        precision = np.linalg.inv(cov)
        posterior = np.linalg.inv(precision + gram / noise)
        means = posterior @ (precision @ mean + moment / noise)
        mean = means.mean(0)
        deviation = means - mean
        cov = posterior.mean(0) + np.einsum("tpo,tqo->pq", deviation, deviation) / (
            len(parts) * n_outputs
        )
        cov = (cov + cov.T) / 2 + 1e-8 * np.eye(n_columns)
        error = (used**2).sum() - 2 * (means * moment).sum() + (means * (gram @ means)).sum()
        error += n_outputs * np.einsum("tpq,tqp->", posterior, gram)
        noise = max(float(error) / used.size, NOISE_FLOOR)
    return mean, cov, noise


def _start(
    X: np.ndarray, y: np.ndarray, codes: np.ndarray, classification: bool, seed: int
) -> Params:
    """Make the parameters before meta-training."""
    n_features, n_outputs = X.shape[1], y.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        values = torch.rand(*shape, generator=generator, dtype=torch.float32)
        return (2 * values - 1) / math.sqrt(fan_in)

    mean = np.zeros((1 + n_features + WIDTH, n_outputs))
    factor = np.diag(np.r_[0.5, np.full(n_features, 0.5 / math.sqrt(n_features))])
    noise, amplitude = 2.0, 0.3
    if classification:
        labels = y.argmax(1)
        if labels.min() < labels.max():  # other classes may be in the tasks held out alone
            with warnings.catch_warnings():  # a start need not be exact
                warnings.simplefilter("ignore", ConvergenceWarning)
                pooled = LogisticRegression(max_iter=100).fit(X, labels)
            coef = np.c_[pooled.intercept_, pooled.coef_]
            if len(coef) == 1:  # the logit of the second of two classes
                coef = np.concatenate([-coef, coef]) / 2
            mean[: 1 + n_features, pooled.classes_] = coef.T
    else:
        if n_features <= LARGEST_MIXED:
            mean[: 1 + n_features], cov, noise = _mixed_model(X, y, codes)
            factor = np.linalg.cholesky(cov + 1e-6 * np.eye(1 + n_features))
        else:
            gram = X.T @ X + 0.01 * len(X) * np.eye(n_features)
            mean[1 : 1 + n_features] = np.linalg.solve(gram, X.T @ y)
            noise = 0.25
        amplitude = 0.3 * math.sqrt(noise)
    return {
        "w1": uniform(n_features, WIDTH, fan_in=n_features),
        "b1": uniform(WIDTH, fan_in=n_features),
        "w2": uniform(WIDTH, WIDTH, fan_in=WIDTH),
        "b2": uniform(WIDTH, fan_in=WIDTH),
        "mean": torch.tensor(mean, dtype=torch.float32),
        "factor": torch.tensor(factor, dtype=torch.float32),
        "log_scale": torch.full((WIDTH,), math.log(amplitude), dtype=torch.float32),
        "log_noise": torch.tensor(0.5 * math.log(noise), dtype=torch.float32),
    }


class _Episodes:
    """Draws support and query rows of tasks, among the rows that are `allowed`."""

    def __init__(self, codes: np.ndarray, allowed: np.ndarray) -> None:
        rows = np.flatnonzero(allowed)
        self.rows = rows[np.argsort(codes[rows], kind="stable")]
        self.sizes = np.unique(codes[rows], return_counts=True)[1]
        self.first = np.cumsum(self.sizes) - self.sizes
        # leaves half of the rows of most tasks for the query
        self.most = max(int(np.median(self.sizes)) // 2, 1)

    def draw(
        self, k: int, n_query: int, rng: np.random.RandomState, n_tasks: int | None = None
    ) -> tuple[int, np.ndarray]:
        """Rows (n_tasks, k + n) of tasks that have at least one more than k, k first.

        All such tasks, or `n_tasks` of them, with replacement; fewer support rows if no task has
        enough.
        """
        k = min(k, int(self.sizes.max()) - 1)
        enough = np.flatnonzero(self.sizes > k)
        chosen = enough if n_tasks is None else rng.choice(enough, n_tasks)
        n_query = min(n_query, int(self.sizes[chosen].min()) - k)
        widest = int(self.sizes[chosen].max())
        at_a_time = max(KEYS_AT_A_TIME // widest, 1)
        drawn = []
        for start in range(0, len(chosen), at_a_time):
            part = chosen[start : start + at_a_time]
            width = int(self.sizes[part].max())
            keys = rng.random_sample((len(part), width))
            keys[np.arange(width) >= self.sizes[part][:, None]] = 2.0
            picked = np.argsort(keys, axis=1)[:, : k + n_query]
            drawn.append(self.rows[self.first[part][:, None] + picked])
        return k, np.concatenate(drawn)


class _Training:
    """Meta-training of one member; the parameters best on the held-out tasks are kept."""

    def __init__(
        self,
        X: np.ndarray,
        y: np.ndarray,
        codes: np.ndarray,
        held_out: np.ndarray,
        unseen: np.ndarray,
        classification: bool,
        seed: int,
    ) -> None:
        self.rng = np.random.RandomState(seed)
        known = ~np.isin(codes, held_out) & ~unseen
        self.training = _Episodes(codes, known)
        testing = _Episodes(codes, np.isin(codes, held_out) & (unseen | ~unseen.any()))
        sizes = [min(k, testing.most) for k in TESTED for _ in range(4)]
        self.draws = [testing.draw(k, QUERY_TESTED, self.rng) for k in sizes]
        self.X = torch.as_tensor(X, dtype=torch.float32)
        self.y = torch.as_tensor(y, dtype=torch.float32)
        params = _start(X[known], y[known], codes[known], classification, seed)
        self.model = _Model(params, classification)

    def _loss(self, k: int, rows: np.ndarray) -> Tensor:
        X, y = self.X[rows], self.y[rows]
        given = self.model.condition(X[:, :k], y[:, :k])
        return self.model.loss(*self.model.query(X[:, k:], given), y[:, k:])

    @torch.no_grad()
    def _held_out_error(self) -> float:
        """Return what chooses: the mean of the tasks' root mean squared error, or cross-entropy.

        The likelihood would let few tasks with large deviations choose for all.
        """
        errors = []
        for k, rows in self.draws:
            X, y = self.X[rows], self.y[rows]
            mean, variance = self.model.query(X[:, k:], self.model.condition(X[:, :k], y[:, :k]))
            if self.model.classification:
                errors.append(float(self.model.loss(mean, variance, y[:, k:])))
            else:
                errors.append(float(((y[:, k:] - mean) ** 2).mean((1, 2)).sqrt().mean()))
        error = float(np.mean(errors))
        return error if math.isfinite(error) else math.inf

    @torch.enable_grad()
    def run(self, n_updates: int) -> _Model:
        """Train and return the best."""
        params = list(self.model.params.values())
        for p in params:
            p.requires_grad_()
        optimizer = torch.optim.Adam(params, lr=RATE)
        smallest, largest = (min(k, self.training.most) for k in SUPPORT)
        best, kept = self._held_out_error(), self._copy()
        for update in range(1, n_updates + 1):
            left = (n_updates - update + 1) / (0.3 * n_updates)
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, left)
            k = round(math.exp(self.rng.uniform(math.log(smallest), math.log(largest))))
            loss = self._loss(*self.training.draw(k, QUERY, self.rng, BATCH))
            optimizer.zero_grad()
            loss.backward()
            if bool(torch.isfinite(nn.utils.clip_grad_norm_(params, 1.0))):
                optimizer.step()
            if update * CHECKS // n_updates > (update - 1) * CHECKS // n_updates:
                error = self._held_out_error()
                if error < best:
                    best, kept = error, self._copy()
        return _Model(kept, self.model.classification)

    def _copy(self) -> Params:
        return {name: p.detach().clone() for name, p in self.model.params.items()}
