"""Tasks that a Gaussian head was conditioned on, and how sure their predictions may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from sklearn_maml.data.weights import row_marks
from sklearn_maml.learners.base import Adapted, Support, alike, refuse_unknown
from sklearn_maml.learners.exact import exact
from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions
from sklearn_maml.learners.laplace import LaplacePosterior
from sklearn_maml.learners.plain import PlainHead
from sklearn_maml.learners.posteriors import Posterior, Scale
from sklearn_maml.learners.sums import (
    Given,
    Kept,
    RowsByTask,
    Sums,
    most_rows,
    room_of_sums,
    sums_over,
    tensors,
)
from sklearn_maml.learners.telling import MOST_ENTRIES, Columns, Dense, LowRank, greedy
from sklearn_maml.threads import threads_for

MARGIN = 0.1  # of the range of the targets: predictions end there
ROWS_AT_A_TIME = 8192
# of a task that gets more: conditioning on so many takes about ten times as long as on their sums
ROWS_PER_COLUMN = 4
# bytes of posteriors that `adapt` keeps, and of further ones when they were asked for; of so many
# tasks at least, since what takes few at a time is as fast without
MOST_KEPT, MOST_KEPT_LATER, LEAST_TASKS_KEPT = 2**27, 2**28, 16
HALF_OFFSET = 0.5  # rows after which half of the offset of classes is left


@dataclass(frozen=True)
class Calibration:
    """How confident predictions may be, learned on held-out tasks.

    Attributes
    ----------
    low, high : ndarrays of shape (n_outputs,)
        Range of the targets of meta-training.
    factor : ndarray of shape (n_sizes, n_outputs or 1) or (n_outputs,), or float
        Of the standard deviations; of the logits, in classification.
    sizes : ndarray of shape (n_sizes,) or None
        Rows of the support sets that the factors are for; None: all.
    seen : int64 ndarray or None
        Marks of the distinct rows of features, where tasks share them.
    factor_unseen : ndarray of the shape of `factor` or None
        `factor` for rows that are not among them.
    steps_scale, scale : float
        Factors of the logits of gradient steps, and of those of the mixture with them.
    freedom : ndarray of shape (n_outputs,) or None
        Degrees of freedom of the prior of a task's scale: large where all tasks have the same,
        small where the rows of a support set tell more of it than other tasks do.
    of_noise : bool ndarray of shape (n_outputs,) or None
        Where that scale is one of the noise alone, not of what tasks differ in; None: nowhere.
    offset : ndarray of shape (n_outputs,) or None
        What is added to the logits of tasks without labelled rows, see `offsets`; None: nothing.
    tails : ndarray of shape (n_outputs,) or None
        Degrees of freedom of a Student distribution with the tails of the errors; None: normal.
    members : ndarray of shape (n_members, n_outputs) or None
        What members count for a task without labelled rows; None: the same.
    """

    low: np.ndarray
    high: np.ndarray
    factor: np.ndarray | float = 1.0
    sizes: np.ndarray | None = None
    seen: np.ndarray | None = None
    factor_unseen: np.ndarray | None = None
    steps_scale: float = 1.0
    scale: float = 1.0
    freedom: np.ndarray | None = None
    of_noise: np.ndarray | None = None
    tails: np.ndarray | None = None
    offset: np.ndarray | None = None
    members: np.ndarray | None = None

    def multiples(self, levels: np.ndarray) -> np.ndarray:
        """Return how many deviations (n_outputs, n_levels) above predictions quantiles are."""
        if self.tails is None:
            return np.broadcast_to(ndtri(levels), (len(self.low), len(levels)))
        # factors of deviations are between what intervals of 90 % and of 50 % ask for
        normal = ndtri(0.95) * ndtri(0.75)
        student = stdtrit(self.tails, 0.95) * stdtrit(self.tails, 0.75)
        found: np.ndarray = stdtrit(self.tails[:, None], levels)
        return np.sqrt(normal / student)[:, None] * found

    def counted(self, trust: Tensor) -> Tensor:
        """Return what members count (n_members, n_tasks, n_outputs) who would all count the same.

        By `trust`, the density of labelled rows under them; without rows they do not.
        """
        if self.members is None:
            return trust
        counts = torch.from_numpy(self.members).to(trust).unsqueeze(1) * trust
        return counts / counts.sum(0)

    def factors(self, n_rows: np.ndarray, unseen: bool) -> np.ndarray:
        """Factors (n_at, n_outputs) of deviations of tasks with so many support rows (n_at,)."""
        factor: Any = self.factor_unseen if unseen else self.factor
        if self.sizes is None:
            return np.broadcast_to(factor, (len(n_rows), len(self.low)))
        return interpolated(n_rows, self.sizes, factor)

    def offsets(self, n_rows: np.ndarray) -> np.ndarray | None:
        """Return what is added to logits (n_at, n_outputs) with so many support rows (n_at,)."""
        if self.offset is None:
            return None
        return self.offset * (HALF_OFFSET / (HALF_OFFSET + n_rows))[:, None]


def interpolated(at: np.ndarray, sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Factors (n_at, n_outputs) at numbers of rows between, or beyond, those there are any for."""
    place, known = np.log1p(at), np.log1p(sizes)
    return np.exp(np.stack([np.interp(place, known, log) for log in np.log(factors).T], 1))


class Conditioned(Adapted):
    """Tasks whose support sets the prior was conditioned on.

    Parameters
    ----------
    head : GaussianHead
    calibration : Calibration
    shift : ndarray of shape (n_members, n_tasks, n_columns, n_outputs)
        Mean of w, in the dtype of the rows.
    low, high : ndarrays of shape (n_tasks, n_outputs)
        Range of the targets of meta-training and of the support set.
    rows : RowsByTask
        Those of the tasks that have no sums: for the variance, and for what more rows make of them.
    sums : dict of int to Sums
        What the rows of other tasks said.
    known : bool, default=True
        Whether support sets counted; otherwise tasks are as before adaptation.
    kept : Kept, default=None
        Posteriors, for the variance; those of other tasks are found anew where it is asked for.
    trust : ndarray of shape (n_members, n_tasks, n_outputs), default=None
        What members count: what they do without rows, times the density of the support targets
        under them. None: the same.
    run : HeadFunctions, default=None
        Those that tasks were conditioned with; None: those of the parameters of the head.

    Notes
    -----
    Posteriors take ``8 * n_members * n_columns * min(n_rows, n_columns)`` bytes a task, and without
    them `std` takes as long as conditioning on the rows of the tasks that it is asked about. They
    are kept for as many tasks as `MOST_KEPT` bytes are enough for, those with few rows first, and
    when they are asked for for more, up to `MOST_KEPT_LATER`.
    """

    def __init__(
        self,
        head: GaussianHead,
        calibration: Calibration,
        shift: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        rows: RowsByTask,
        sums: dict[int, Sums],
        known: bool = True,
        kept: Kept | None = None,
        trust: np.ndarray | None = None,
        run: HeadFunctions | None = None,
    ) -> None:
        self.head = head
        self.calibration = calibration
        self.shift = shift
        self.low = low
        self.high = high
        self.rows = rows
        self.sums = sums
        self.known = known
        self.kept = Kept.of(self.n_tasks) if kept is None else kept
        self.trust = self._even(head, shift.shape[1]) if trust is None else trust
        self._own = exact(head) if run is None and not head.body.of_user else run

    def _functions(self) -> HeadFunctions:
        """Functions of the parameters with which tasks were conditioned."""
        return exact(self.head) if self._own is None else self._own

    @staticmethod
    def _even(head: GaussianHead, n_tasks: int) -> np.ndarray:
        return np.full((head.n_members, n_tasks, head.n_outputs), 1 / head.n_members)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.shift.shape[1]

    @property
    def support(self) -> Support:
        """Rows of the tasks that have no sums."""
        return self.rows.support

    def has_rows(self) -> np.ndarray:
        """Whether each task has labelled rows that count."""
        has: np.ndarray = self.rows.sizes > 0
        has[list(self.sums)] = True
        return has

    @classmethod
    def on(cls, head: GaussianHead, calibration: Calibration, support: Support) -> Conditioned:
        """Condition on support sets."""
        return cls._of_none(head, calibration, support).with_rows(support, math.inf)

    @classmethod
    def prior(cls, head: GaussianHead, calibration: Calibration, like: Support) -> Conditioned:
        """Tasks whose labelled rows do not count: population predictions."""
        none = Support(like.X[:0], like.y[:0], like.codes[:0], like.n_tasks)
        made = cls.on(head, calibration, none)
        made.known = False
        return made

    @classmethod
    def _of_none(cls, head: GaussianHead, calibration: Calibration, like: Support) -> Conditioned:
        shift = np.empty((head.n_members, 0, head.n_columns, head.n_latent), like.X.dtype)
        edge = np.empty((0, head.n_outputs))
        rows = RowsByTask.of(Support(like.X[:0], like.y[:0], like.codes[:0], 0))
        return cls(head, calibration, shift, edge, edge, rows, {})

    def extended(self, more: Support) -> Conditioned:
        """See `Adapted`."""
        if not self.known:
            refuse_unknown()
        return self.with_rows(more, ROWS_PER_COLUMN * self.head.n_columns)

    @torch.no_grad()
    def with_rows(self, more: Support, most_rows: float) -> Conditioned:
        """Condition tasks on more rows, too.

        Sums take the place of the rows of a task where they take less room, and where there are
        more than `most_rows`, which would make the next extension slow.
        """
        head, run = self.head, self._functions()
        tasks = np.union1d(more.codes, np.arange(self.n_tasks, more.n_tasks))
        support = self.support.followed_by(more)
        n_rows = support.sizes[tasks]
        row_bytes = sum(part[:1].nbytes for part in (more.X, more.y, more.codes))
        less = (n_rows > head.n_columns) & (n_rows * row_bytes > room_of_sums(head))
        enough = less | (n_rows > most_rows) | np.isin(tasks, list(self.sums))
        summed = tasks[enough & run.has_sums]
        sums = dict(self.sums)
        for j, of_rows in sums_over(run, support.of(summed)).items() if len(summed) else ():
            task = int(summed[j])
            sums[task] = sums[task] + of_rows if task in sums else of_rows
        rows = RowsByTask.of(support.without(summed))
        shape = (head.n_members, more.n_tasks, head.n_columns, head.n_latent)
        shift = np.empty(shape, dtype=self.shift.dtype)
        shift[:, : self.n_tasks] = self.shift
        trust = self._even(head, more.n_tasks)
        trust[:, : self.n_tasks] = self.trust
        given = Given(run, rows, sums, tasks)
        # one after another, those of single tasks would take longer than to find them again
        are_all = len(tasks) == more.n_tasks
        asks = head.likelihood.uses_variance or not head.likelihood.are_classes
        left = MOST_KEPT if are_all and asks else 0
        found = []
        for some in given.batches():
            keeps = (needed := 8 * run.room(given.sizes[some])) <= left
            left -= needed if keeps else 0
            posterior = given.posterior(some, doubt=keeps)
            shift[:, tasks[some]] = posterior.shift.cpu().numpy()
            of_some = run.trust(posterior)
            if of_some is not None:
                trust[:, tasks[some]] = self.calibration.counted(of_some).cpu().numpy()
            if keeps:
                found.append((tasks[some], posterior))
        n_tasks = more.n_tasks
        kept = Kept.of(n_tasks, found) if are_all else self.kept.without(tasks, n_tasks)
        parts = (shift, *self._range_with(more), rows, sums)
        return Conditioned(head, self.calibration, *parts, kept=kept, trust=trust, run=self._own)

    def _range_with(self, more: Support) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest targets of all tasks, where there are more rows."""
        n_new = more.n_tasks - self.n_tasks
        low, high = (
            np.concatenate([of_tasks, np.repeat(edge[None], n_new, 0)])
            for of_tasks, edge in (
                (self.low, self.calibration.low),
                (self.high, self.calibration.high),
            )
        )
        if not self.head.likelihood.are_classes:
            y = self.head.likelihood.latent(more.y.astype(np.float64), self.calibration.low)
            np.minimum.at(low, more.codes, y)
            np.maximum.at(high, more.codes, y)
        return low, high

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Any = None) -> np.ndarray:
        """Mean of the targets, or logarithm of the classes' probabilities; see `Adapted`."""
        likelihood = self.head.likelihood
        means = (
            self._moments(rows, codes)[0]
            if likelihood.uses_variance
            else self.member_outputs(rows, codes)
        )
        low, high = map(torch.from_numpy, self._edges(codes))
        mean = self._average(means, codes)
        factor = torch.tensor(self._factor(rows, codes)) if likelihood.are_classes else 1.0
        found = likelihood.predicted(mean, factor, low, high)
        offset = self.calibration.offsets(self._counts[codes])
        if offset is not None:
            found = (found + torch.from_numpy(offset)).log_softmax(-1)
        return found.numpy()

    def _average(self, means: np.ndarray, codes: np.ndarray) -> Tensor:
        """Put outputs (n_members, n_rows, n_outputs) of members together."""
        trust = torch.from_numpy(self.trust[:, codes])
        return self.head.likelihood.average(torch.from_numpy(means), trust)

    def bounded(self, outputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Cut outputs off a little beyond the range of targets that were seen."""
        return np.clip(outputs, *self._edges(codes))

    def _edges(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where predictions (n_rows, n_outputs) of rows of these tasks end."""
        low, high = self.low[codes], self.high[codes]
        beyond = MARGIN * (high - low)
        return low - beyond, high + beyond

    def member_outputs(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return outputs (n_members, n_rows, n_outputs) of each member."""
        run = self._functions()
        means = np.empty((self.head.n_members, len(rows), self.head.n_outputs))
        (shift,) = tensors(self.head, self.shift)
        with torch.no_grad(), threads_for(min(len(rows), ROWS_AT_A_TIME) * run.row_work):
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                part = slice(start, start + ROWS_AT_A_TIME)
                (X,) = tensors(self.head, rows[part])
                found = run.outputs(X, shift, torch.from_numpy(codes[part]))
                means[:, part] = found.cpu().numpy()
        return means

    def std(
        self, rows: np.ndarray, codes: np.ndarray, how: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs and standard deviations: noise, and doubt about the task."""
        if self.head.likelihood.are_classes:
            raise TypeError("classes have probabilities in place of standard deviations")
        means, within = self._moments(rows, codes)
        loss, trust = self.head.likelihood.loss, self.trust[:, codes]
        each = loss.predict(means.reshape(-1, means.shape[2])).reshape(means.shape)
        between = (trust * (each - (trust * each).sum(0)) ** 2).sum(0)
        within = (trust * within).sum(0)
        std = np.sqrt(self._factor(rows, codes) ** 2 * within + between)
        return self.bounded(self._average(means, codes).numpy(), codes), std

    @cached_property
    def _counts(self) -> np.ndarray:
        """Number of labelled rows of each task, by their weights."""
        counts = np.bincount(self.support.codes, self.support.counts(), self.n_tasks)
        n_rows = counts.astype(float)  # those of no rows at all are integers
        for task, found in self.sums.items():
            n_rows[task] = found.n_rows
        return n_rows

    def _factor(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Calibration (n_rows, n_outputs) of the standard deviations of a member, or of logits."""
        n_rows = self._counts[codes]
        factor = self.calibration.factors(n_rows, unseen=False)
        if self.calibration.seen is None:
            return factor
        seen = np.isin(row_marks(rows), self.calibration.seen)
        return np.where(seen[:, None], factor, self.calibration.factors(n_rows, unseen=True))

    def telling_rows(
        self, rows: np.ndarray, pools: np.ndarray, tasks: np.ndarray, n: int
    ) -> np.ndarray:
        """See `Adapted`; variances are those of `std`, the members' disagreement apart."""
        run, n_systems = self._functions(), self.head.n_systems
        given = Given(run, self.rows, self.sums, tasks)
        order = np.argsort(pools, kind="stable")
        sizes = np.bincount(pools, minlength=len(tasks))
        first = np.cumsum(sizes) - sizes
        n_columns = self.head.n_columns
        entries = self.head.n_members * n_columns
        most_tasks = max(MOST_ENTRIES // (entries * n_systems * n_columns), 1)
        chosen = np.empty((len(tasks), n), dtype=np.intp)

        def columns(of_pools: np.ndarray) -> tuple[Tensor, Tensor]:
            return run.of_tasks(*tensors(self.head, rows[of_pools]))

        with torch.no_grad():
            for batch in alike(sizes, most_tasks, MOST_ENTRIES // entries):
                number = np.arange(sizes[batch].max())
                free = number < sizes[batch][:, None]
                place = order[np.where(free, first[batch][:, None] + number, 0)]
                posterior = given.posterior(batch)
                S = Columns(columns, place, entries)
                noise, cost = run.expected(S.with_prior(), posterior)
                weight = self._weight(run, posterior, rows, tasks[batch], place, free, cost)
                kind = Dense if place.shape[1] <= n_columns else LowRank
                model = kind(S, run.covariance(posterior), noise, weight)
                found = greedy(model, free, n)
                chosen[batch] = np.take_along_axis(place, found, 1)
        return chosen

    def _weight(
        self,
        run: HeadFunctions,
        posterior: Posterior,
        rows: np.ndarray,
        tasks: np.ndarray,
        place: np.ndarray,
        present: np.ndarray,
        cost: Tensor,
    ) -> Tensor:
        """Return what variances (n_members, n_tasks, n_systems, n_rows) count in those of `std`."""
        factor = np.ones((*place.shape, 1))
        if not self.head.likelihood.are_classes:
            codes = np.repeat(tasks, place.shape[1])
            factor = self._factor(rows[place.ravel()], codes).reshape(*place.shape, -1)
        (weight,) = tensors(self.head, factor**2 * present[..., None])
        weight = weight.mT * cost
        scale = self._scale()
        if scale is not None:
            weight = weight * run.spread(posterior, scale).unsqueeze(-1)
        # a member that counts twice as much as on average adds twice the variance
        (trust,) = tensors(self.head, self.trust[:, tasks] * self.head.n_members)
        weight = weight * trust.unsqueeze(-1)
        if self.head.n_systems == 1:
            weight = weight.sum(-2, keepdim=True)
        return weight

    def _scale(self) -> Scale | None:
        """Prior of the scale of a task."""
        freedom, of_noise = self.calibration.freedom, self.calibration.of_noise
        if freedom is None:
            return None
        of_weights = np.ones_like(freedom) if of_noise is None else 1.0 - of_noise
        return Scale(*tensors(self.head, freedom, of_weights))

    def _moments(self, rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs (n_members, n_rows, n_outputs) of members, and variances of targets."""
        run = self._functions()
        most = run.kernel_batches * most_rows(self.head)
        asked, of_query, sizes = np.unique(codes, return_inverse=True, return_counts=True)
        order, first = np.argsort(of_query.reshape(-1), kind="stable"), np.cumsum(sizes) - sizes
        shape = (self.head.n_members, len(rows), self.head.n_outputs)
        means, variances = np.empty(shape), np.empty(shape)
        scale = self._scale()
        given = Given(run, self.rows, self.sums, asked)
        with torch.no_grad():
            for some, places, posterior in given.posteriors(self.kept):
                self._keep(given, some, posterior)
                of_some = sizes[some]
                # those of the first task, of the second, ...
                begin = np.repeat(first[some] - np.cumsum(of_some) + of_some, of_some)
                own, at = order[begin + np.arange(len(begin))], np.repeat(places, of_some)
                for start in range(0, len(own), most):
                    part = slice(start, start + most)
                    (X,) = tensors(self.head, rows[own[part]])
                    found = run.query_rows(X, at[part], posterior, scale)
                    for values, whole in zip(found, (means, variances), strict=True):
                        whole[:, own[part]] = values.cpu().numpy()
        return means, variances

    def _keep(self, given: Given, some: np.ndarray, posterior: Any) -> None:
        """Keep a posterior if it was found anew; what threads keep at once may be lost."""
        kept, tasks = self.kept, given.asked[some]
        if len(tasks) >= LEAST_TASKS_KEPT and (kept.part[tasks] < 0).all():
            n_bytes = 8 * given.run.room(given.sizes[some])
            if kept.later + n_bytes <= MOST_KEPT_LATER:
                self.kept = kept.and_later(tasks, posterior, n_bytes)

    def module(self, task: int, how: Any = None) -> PlainHead:
        """See `Adapted`."""
        low, high = (edge[0] for edge in self._edges(np.array([task])))
        shift, low, high = tensors(self.head, self.shift[:, task], low, high)
        (trust,) = tensors(self.head, self.trust[:, task, None])
        of_logits = 1.0
        if self.head.likelihood.are_classes:
            of_logits = float(self.calibration.factors(self._counts[[task]], unseen=False)[0, 0])
        offset = self.calibration.offsets(self._counts[[task]])
        offset = offset if offset is None else offset[0]
        return PlainHead(self.head, shift, low, high, of_logits, trust, self._root(task), offset)

    def _root(self, task: int) -> Tensor | None:
        """Root of the covariance of the weights of a task, where outputs depend on it."""
        if not self.head.likelihood.uses_variance:
            return None
        with torch.no_grad():
            given = Given(self._functions(), self.rows, self.sums, np.array([task]))
            posterior = given.posterior(np.zeros(1, int))
            assert isinstance(posterior, LaplacePosterior)
            return posterior.covariance_root()[:, 0]

    def state(self) -> dict[str, Any]:
        """Plain data; see `Adapted`."""
        names = ("shift", "low", "high", "known", "trust")
        return {
            "kind": "conditioned",
            **{name: getattr(self, name) for name in names},
            "support": dict(vars(self.support)),
            "sums": Sums.state(self.sums),
        }

    @classmethod
    def from_state(
        cls, head: GaussianHead, calibration: Calibration, state: dict[str, Any]
    ) -> Conditioned:
        """Make what `state` described."""
        shift, low, high = (state[name] for name in ("shift", "low", "high"))
        rows = RowsByTask.of(Support(**state["support"]))
        parts = (shift, low, high, rows, Sums.from_state(state["sums"]), state["known"])
        # files of older versions, whose members count the same, have no trust
        return cls(head, calibration, *parts, trust=state.get("trust"))
