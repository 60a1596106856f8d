"""Tasks that a Gaussian head was conditioned on, and how sure their predictions may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from sklearn_maml.data.weights import row_marks
from sklearn_maml.learners.base import Adapted, Support, alike, padded
from sklearn_maml.learners.bodies import ModuleBody
from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions, Posterior
from sklearn_maml.learners.laplace import LaplaceFunctions, LaplacePosterior
from sklearn_maml.learners.likelihoods import NewtonLikelihood
from sklearn_maml.learners.plain import PlainHead
from sklearn_maml.learners.telling import MOST_ENTRIES, Columns, Dense, LowRank, greedy
from sklearn_maml.threads import threads_for

__all__ = ["MARGIN", "Calibration", "Conditioned"]

MARGIN = 0.1  # of the range of the targets: predictions end there
ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Calibration:
    """How confident predictions may be, learned on held-out tasks.

    Attributes
    ----------
    low, high : ndarrays of shape (n_outputs,)
        Range of the targets of meta-training.
    factor : ndarray of shape (n_outputs,) or float
        Of the standard deviations; of the logits, in classification.
    seen : int64 ndarray or None
        Marks of the distinct rows of features, where tasks share them.
    factor_unseen : ndarray of shape (n_outputs,) or None
        `factor` for rows that are not among them.
    steps_scale, scale : float
        Factors of the logits of gradient steps, and of those of the mixture with them.
    freedom : ndarray of shape (n_outputs,) or None
        Degrees of freedom of the prior of a task's scale: large where all tasks have the same,
        small where the rows of a support set tell more of it than other tasks do.
    """

    low: np.ndarray
    high: np.ndarray
    factor: np.ndarray | float = 1.0
    seen: np.ndarray | None = None
    factor_unseen: np.ndarray | None = None
    steps_scale: float = 1.0
    scale: float = 1.0
    freedom: np.ndarray | None = None


class Conditioned(Adapted):
    """Tasks whose support sets the prior was conditioned on.

    Parameters
    ----------
    head : GaussianHead
    calibration : Calibration
    shift : ndarray of shape (n_members, n_tasks, n_columns, n_outputs)
        Mean of w, in the dtype of the rows.
    low, high : ndarrays of shape (n_tasks, n_outputs)
        Predictions end there.
    support : Support
        For the variance.
    """

    def __init__(
        self,
        head: GaussianHead,
        calibration: Calibration,
        shift: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        support: Support,
    ) -> None:
        self.head = head
        self.calibration = calibration
        self.shift = shift
        self.low = low
        self.high = high
        self.support = support

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.shift.shape[1]

    @classmethod
    def on(cls, head: GaussianHead, calibration: Calibration, support: Support) -> Conditioned:
        """Condition on support sets; `support.y` is (n_rows, n_outputs), of classes 0 and 1."""
        run = _exact(head)
        weight = None if support.weight is None else _mean_one(support)
        y, n_tasks = support.y.astype(np.float64), support.n_tasks
        dtype = support.X.dtype
        shift = np.empty((head.n_members, n_tasks, head.n_columns, head.n_outputs), dtype=dtype)
        with torch.no_grad():
            for tasks, place, present in padded(support.codes, n_tasks):
                root = present.astype(np.float64)
                if weight is not None:
                    root *= np.sqrt(weight[place])
                parts = _tensors(head, support.X[place], y[place], root)
                shift[:, tasks] = run.condition(*parts).shift.cpu().numpy()
        y = head.likelihood.latent(y, calibration.low)
        # between the targets of meta-training and of the support set, and a little beyond
        low, high = (
            np.repeat(edge[None], n_tasks, 0) for edge in (calibration.low, calibration.high)
        )
        np.minimum.at(low, support.codes, y)
        np.maximum.at(high, support.codes, y)
        beyond = MARGIN * (high - low)
        return cls(head, calibration, shift, low - beyond, high + beyond, support)

    @classmethod
    def prior(cls, head: GaussianHead, calibration: Calibration, like: Support) -> Conditioned:
        """Tasks without any labelled rows: population predictions."""
        y = np.empty((0, head.n_outputs))
        return cls.on(head, calibration, Support(like.X[:0], y, like.codes[:0], like.n_tasks))

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Any = None) -> np.ndarray:
        """Mean of the targets, or logarithm of the classes' probabilities; see `Adapted`."""
        if isinstance(self.head.likelihood, NewtonLikelihood):
            return self.bounded(self._average(self._moments(rows, codes)[0]), codes)
        mean: np.ndarray = self.member_outputs(rows, codes).mean(0)
        if self.head.classification:  # a mean of probabilities would not be sharp enough
            mean = log_softmax(self.calibration.factor * mean, axis=1)
            return mean
        return self.bounded(mean, codes)

    def bounded(self, outputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Cut outputs off a little beyond the range of targets that were seen."""
        result: np.ndarray = np.clip(outputs, self.low[codes], self.high[codes])
        return result

    def member_outputs(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return outputs (n_members, n_rows, n_outputs) of each member."""
        run = _exact(self.head)
        means = np.empty((self.head.n_members, len(rows), self.head.n_outputs))
        work = min(len(rows), ROWS_AT_A_TIME) * sum(p.numel() for p in self.head.parameters())
        with torch.no_grad(), threads_for(work):
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                part = slice(start, start + ROWS_AT_A_TIME)
                prior, S = run.columns(*_tensors(self.head, rows[part]))
                shift = torch.from_numpy(self.shift[:, codes[part]]).to(S)
                mean = prior + (S.unsqueeze(-2) @ shift).squeeze(-2)
                means[:, part] = (run.amplitude() * mean).cpu().numpy()
        return means

    def std(
        self, rows: np.ndarray, codes: np.ndarray, how: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs and standard deviations: noise, and doubt about the task."""
        means, within = self._moments(rows, codes)
        loss = self.head.likelihood.loss
        between = loss.predict(means.reshape(-1, means.shape[2])).reshape(means.shape)
        std = np.sqrt(self._factor(rows) ** 2 * within.mean(0) + between.var(0))
        return self.bounded(self._average(means), codes), std

    def _average(self, means: np.ndarray) -> np.ndarray:
        """Put outputs of all members together."""
        likelihood = self.head.likelihood
        if isinstance(likelihood, NewtonLikelihood):
            return likelihood.average(torch.from_numpy(means)).numpy()
        averaged: np.ndarray = means.mean(0)
        return averaged

    def _factor(self, rows: np.ndarray) -> np.ndarray:
        """Calibration (n_rows, n_outputs) of the standard deviations within a member."""
        shape = (len(rows), self.head.n_outputs)
        factor = np.broadcast_to(self.calibration.factor, shape).copy()
        if self.calibration.seen is not None:
            unseen = ~np.isin(row_marks(rows), self.calibration.seen)
            factor[unseen] = self.calibration.factor_unseen
        return factor

    def telling_rows(
        self, rows: np.ndarray, pools: np.ndarray, tasks: np.ndarray, n: int
    ) -> np.ndarray:
        """See `Adapted`; variances are those of `std`, the members' disagreement apart."""
        if isinstance(self.head.likelihood, NewtonLikelihood):
            raise ValueError(
                "suggest_rows is for loss='squared_error': how sure a label makes predictions "
                f"depends on the label with {self.head.likelihood.loss.name}. Take the rows of the "
                "largest std of predict(..., return_std=True), or fit a transformed target."
            )
        run, n_noises = _exact(self.head), self.head.log_noise.shape[1]
        given = _Given(self.head, run, self.support, tasks)
        order = np.argsort(pools, kind="stable")
        sizes = np.bincount(pools, minlength=len(tasks))
        first = np.cumsum(sizes) - sizes
        n_columns = self.head.n_columns
        entries = self.head.n_members * n_columns
        most_tasks = max(MOST_ENTRIES // (entries * n_noises * n_columns), 1)
        chosen = np.empty((len(tasks), n), dtype=np.intp)

        def columns(of_pools: np.ndarray) -> Tensor:
            return run.of_tasks(*_tensors(self.head, rows[of_pools]))[1]

        with torch.no_grad():
            for batch in alike(sizes, most_tasks, MOST_ENTRIES // entries):
                number = np.arange(sizes[batch].max())
                free = number < sizes[batch][:, None]
                place = order[np.where(free, first[batch][:, None] + number, 0)]
                posterior = given.posterior(batch)
                weight = self._weight(run, posterior, rows, place, free)
                kind = Dense if place.shape[1] <= n_columns else LowRank
                S = Columns(columns, place, entries)
                model = kind(S, run.covariance(posterior), run.noise(), weight)
                found = greedy(model, run.noise(), free, n)
                chosen[batch] = np.take_along_axis(place, found, 1)
        return chosen

    def _weight(
        self,
        run: HeadFunctions,
        posterior: Posterior,
        rows: np.ndarray,
        place: np.ndarray,
        present: np.ndarray,
    ) -> Tensor:
        """Return what variances (n_members, n_tasks, n_noises, n_rows) count in those of `std`."""
        factor = self._factor(rows[place.ravel()]).reshape(*place.shape, -1)
        (weight,) = _tensors(self.head, factor**2 * present[..., None])
        weight = (weight * run.amplitude_of_tasks() ** 2).mT
        if self.calibration.freedom is not None:
            (freedom,) = _tensors(self.head, self.calibration.freedom)
            weight = weight * run.spread(posterior, freedom).unsqueeze(-1)
        if run.noise().shape[1] == 1:
            weight = weight.sum(-2, keepdim=True)
        return weight.expand(self.head.n_members, -1, -1, -1)

    def _moments(self, rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs (n_members, n_rows, n_outputs) of members, and variances of targets."""
        if self.head.classification:
            raise TypeError("classes have probabilities in place of standard deviations")
        run = _exact(self.head)
        asked, of_query = np.unique(codes, return_inverse=True)
        given = _Given(self.head, run, self.support, asked)
        shape = (self.head.n_members, len(rows), self.head.n_outputs)
        means, variances = np.empty(shape), np.empty(shape)
        freedom = self.calibration.freedom
        prior = None if freedom is None else _tensors(self.head, freedom)[0]
        with torch.no_grad():
            for some, place, present in padded(of_query.reshape(-1), len(asked), given.sizes):
                query = _tensors(self.head, rows[place])[0]
                mean, variance = run.query(query, given.posterior(some), prior)
                assert variance is not None
                means[:, place[present]] = mean.cpu().numpy()[:, present]
                variances[:, place[present]] = variance.cpu().numpy()[:, present]
        return means, variances

    def module(self, task: int, how: Any = None) -> PlainHead:
        """See `Adapted`."""
        shift, low, high = _tensors(self.head, self.shift[:, task], self.low[task], self.high[task])
        of_logits = float(self.calibration.factor) if self.head.classification else 1.0
        return PlainHead(self.head, shift, low, high, of_logits, self._root(task))

    def _root(self, task: int) -> Tensor | None:
        """Root of the covariance of the weights of a task, where outputs depend on it."""
        run = _exact(self.head)
        if not isinstance(run, LaplaceFunctions):
            return None
        with torch.no_grad():
            given = _Given(self.head, run, self.support, np.array([task])).posterior(
                np.zeros(1, int)
            )
            assert isinstance(given, LaplacePosterior)
            return given.root()[:, 0]

    def state(self) -> dict[str, Any]:
        """Plain data; see `Adapted`."""
        names = ("shift", "low", "high")
        return {
            "kind": "conditioned",
            **{name: getattr(self, name) for name in names},
            "support": dict(vars(self.support)),
        }

    @classmethod
    def from_state(
        cls, head: GaussianHead, calibration: Calibration, state: dict[str, Any]
    ) -> Conditioned:
        """Make what `state` described."""
        shift, low, high = (state[name] for name in ("shift", "low", "high"))
        return cls(head, calibration, shift, low, high, Support(**state["support"]))


class _Given:
    """Posteriors of tasks, some of them at a time.

    `sizes` are the support rows of each of the tasks `asked`, of which one may come repeatedly.
    """

    def __init__(
        self, head: GaussianHead, run: HeadFunctions, support: Support, asked: np.ndarray
    ) -> None:
        self.head, self.run, self.support = head, run, support
        n_rows = np.bincount(support.codes, minlength=support.n_tasks)
        self.sizes = n_rows[asked]
        self.first = (np.cumsum(n_rows) - n_rows)[asked]
        self.order = np.argsort(support.codes, kind="stable")
        self.root = (
            np.ones(len(support.X)) if support.weight is None else np.sqrt(_mean_one(support))
        )

    def posterior(self, some: np.ndarray) -> Posterior:
        """Condition on the support sets of these positions in `asked`."""
        sizes, support = self.sizes[some][:, None], self.support
        number = np.arange(sizes.max())
        real = number < sizes
        at = self.order[np.where(real, self.first[some][:, None] + number, 0)]
        y = support.y[at].astype(np.float64)
        return self.run.condition(*_tensors(self.head, support.X[at], y, real * self.root[at]))


def _exact(head: GaussianHead) -> HeadFunctions:
    """Functions of the parameters in float64, safe in any thread."""
    body = head.body.private()
    params = {
        # modules of users compute in their own precision
        name: p.detach()
        if isinstance(body, ModuleBody) and name.startswith("body.")
        else p.detach().double()
        for name, p in head.named_parameters()
    }
    return head.functions(params, body)


def _tensors(head: GaussianHead, *arrays: np.ndarray) -> list[Tensor]:
    own = (array if array.flags.writeable else array.copy() for array in arrays)
    return [torch.from_numpy(array).to(head.factor.device) for array in own]


def _mean_one(support: Support) -> np.ndarray:
    """Weights that are 1 on average in each task."""
    assert support.weight is not None
    total = np.bincount(support.codes, support.weight, support.n_tasks)
    n_rows = np.bincount(support.codes, minlength=support.n_tasks)
    scaled: np.ndarray = support.weight * (n_rows / np.where(total > 0, total, 1))[support.codes]
    return scaled
