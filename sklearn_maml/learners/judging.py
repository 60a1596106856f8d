"""What held-out tasks say of the learners: their shares, and how sure they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, ndtri, softmax, stdtrit
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.data.sampling import evenly
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.engine import Engine
from sklearn_maml.learners.base import Support
from sklearn_maml.learners.conditioned import MARGIN, Calibration, Conditioned, interpolated
from sklearn_maml.learners.distribution import TINY
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.learners.head_trainer import HeadTrainer, HeldOut
from sklearn_maml.learners.likelihoods import Likelihood
from sklearn_maml.learners.shares import choose_share, find_logit_scale
from sklearn_maml.threads import several_threads, side_by_side

# 1.645 standard deviations are to hold nine targets in ten, .674 of them half. Where tails are
# heavier than those of a normal distribution no factor does both: the geometric mean of the two is
# taken, but not less than holds the least. Factors of the deviations that may be learned
LEVELS, LEAST_LEVEL, FACTORS = (0.9, 0.5), 0.86, (0.3, 3.0)
# Sizes of support sets for which there are factors, beside those of held-out episodes; what a
# factor is drawn to that of all, in tasks; part of the squared errors of a member that those of the
# mean of all members are at least
FEWER, FEWER_OF_CLASSES, DRAWN, LEAST_KEPT = (0, 2), (0, 1, 2), 5, 0.25
# what is tried; a task's scale is a matter of its own rows below ten or so
FREEDOMS = (1e9, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0)
# rounds in which what members count is found, and tasks that each of them has besides those that
# are held out
ROUNDS, BESIDES = 50, 3
# tasks that have columns at a time: those of all members are large
TASKS_AT_A_TIME = 25
# rows that frequencies of classes are matched on, and rounds of it
MOST_MATCHED, MATCHED_ROUNDS = 5000, 30
# degrees of freedom of the errors, from those of a normal distribution down
TAILS = np.geomspace(1e4, 2.0, 60)


def judge_head(
    trainer: HeadTrainer,
    meta_params: dict[str, Tensor],
    edges: tuple[np.ndarray, np.ndarray],
    shared_rows: np.ndarray | None,
) -> Calibration:
    """Make the members neither over- nor underconfident on tasks they have not seen.

    Parameters
    ----------
    trainer : HeadTrainer
    meta_params : dict of str to Tensor
    edges : (ndarray, ndarray)
        Lowest and highest targets of meta-training.
    shared_rows : ndarray or None
        Distinct rows of features that tasks share; some were hidden from the last member.
    """
    plain = Calibration(*edges)
    if not trainer.validation:
        return plain
    if trainer.head.likelihood.members_differ:
        plain = dataclasses.replace(plain, members=_members(trainer, meta_params))
    if trainer.head.likelihood.are_classes:
        return dataclasses.replace(plain, **_logit_factors(trainer, meta_params))
    last = trainer.head.n_members - 1
    given: list[tuple[HeldOut, Rows, bool]] = []  # and whether its rows were hidden
    judged = set()
    for held in trainer.validation:
        hidden = shared_rows is not None and held.member == last
        support = held.episodes.support
        given.append((held, support, hidden))
        # without labelled rows the doubt about the task is all there is, no matter which row
        fewer = [n for n in FEWER if n < _size(support) and not (hidden and n == 0)]
        if held.member not in judged:
            given += [(held, support.first(n), hidden) for n in fewer]
        judged.add(held.member)

    def deviations(own: tuple[HeldOut, Rows, bool]) -> _Deviations:
        return _Deviations.of(trainer, meta_params, plain, *own)

    # modules of users are not to be run in several threads at a time
    if trainer.head.factor.is_cpu and not trainer.head.body.of_user:
        with several_threads():
            found = side_by_side(deviations, given)
    else:
        found = [*map(deviations, given)]
    whole: dict[bool, list[_Deviations]] = {False: [], True: []}  # of rows that were hidden: True
    of_parts: dict[bool, list[_Deviations]] = {False: [], True: []}
    for (held, support, hidden), of_support in zip(given, found, strict=True):
        kind = whole if support is held.episodes.support else of_parts
        kind[hidden].append(of_support)
    joined = _Deviations.joined(whole[False])
    trainer.head.likelihood.learn_quantile(trainer.head, joined.quantile)
    scale = joined.scale() if trainer.head.likelihood.noise_differs else None
    sizes, factor = _factors([*whole[False], *of_parts[False]], scale)
    made = dataclasses.replace(plain, sizes=sizes, factor=factor, tails=joined.tails(scale))
    if scale is not None:
        made = dataclasses.replace(made, freedom=scale[0], of_noise=scale[1])
    if not whole[True]:
        return made
    of_unseen = interpolated(sizes, *_factors([*whole[True], *of_parts[True]], scale))
    # few rows are hidden: they do not tell that others are easier
    of_unseen = np.where(sizes[:, None] > 0, np.maximum(of_unseen, factor), factor)
    return dataclasses.replace(made, seen=shared_rows, factor_unseen=of_unseen)


def match_frequencies(
    head: GaussianHead, calibration: Calibration, tasks: TaskCollection
) -> Calibration:
    """Have classes be as probable without labelled rows as they are frequent, on average.

    Parameters
    ----------
    head : GaussianHead
    calibration : Calibration
    tasks : TaskCollection
        Those of meta-training; their classes are encoded.
    """
    if not head.likelihood.are_classes or head.same_classes:
        return calibration
    rows = evenly(len(tasks.X), MOST_MATCHED)
    X, y, codes = tasks.X[rows], tasks.y[rows], tasks.codes[rows].astype(np.intp)
    weight = np.ones(len(rows)) if tasks.weight is None else tasks.weight[rows]
    one = Support(X[:0], y[:0], codes[:0], 1)
    plain = dataclasses.replace(calibration, offset=None)
    logs = Conditioned.prior(head, plain, one).outputs(X, np.zeros_like(codes))
    count = np.zeros((len(tasks.ids), logs.shape[1]))
    np.add.at(count, (codes, y), weight)
    total = weight.sum()
    # a class that was only declared is not impossible
    frequency = np.maximum(count.sum(0), 0.5 * weight.mean()) / total
    offset = np.zeros(len(frequency))
    for _ in range(MATCHED_ROUNDS):
        p = weight @ softmax(logs + offset, axis=1) / total
        offset += np.log(frequency / np.maximum(p, TINY))
        offset -= offset.mean()
    # what other tasks would have: of classes that few of them have, frequencies tell little
    error = count - frequency * count.sum(1, keepdims=True)
    variance = (error**2).sum(0) / (total * frequency) ** 2
    offset *= offset**2 / np.maximum(offset**2 + variance, TINY)
    return dataclasses.replace(calibration, offset=offset)


def _members(trainer: HeadTrainer, meta_params: dict[str, Tensor]) -> np.ndarray | None:
    """Find what members count (n_members, n_outputs) without labelled rows; None: the same.

    As much as tasks are likely to be theirs: proportions of a mixture of the members, by EM over
    the support sets of held-out tasks, each of which one member alone has not seen. They are drawn
    to equal ones.
    """
    parts = []
    for _, batch, _ in trainer.validation:
        for some in _few_at_a_time(len(batch)):
            trust = trainer.trust(meta_params, batch.take(some).support)
            if trust is None:
                return None
            parts.append(trust.double().cpu().numpy())
    likely = np.concatenate(parts, axis=1)
    each = trainer.n_held_out / likely.shape[1]  # a task has several episodes
    members: np.ndarray = np.full(likely[:, 0].shape, 1 / len(likely))
    for _ in range(ROUNDS):
        of_tasks = likely * members[:, None]
        total = BESIDES + each * (of_tasks / of_tasks.sum(0)).sum(1)
        members = total / total.sum(0)
    return members


def _few_at_a_time(n_tasks: int) -> list[np.ndarray]:
    return np.array_split(np.arange(n_tasks), -(-n_tasks // TASKS_AT_A_TIME))


def _size(support: Rows) -> int:
    """Rows of the support sets, or of the median one."""
    return support.X.shape[1] if support.lengths is None else int(np.median(support.lengths))


def _logit_factors(trainer: HeadTrainer, meta_params: dict[str, Tensor]) -> dict[str, Any]:
    """Factors of the logits, and the sizes of support sets that they are for.

    Those of each size are drawn to that of all held-out episodes, as few tasks tell little. Members
    whose support sets differ in size by a row or two have them together.
    """
    least = min(_size(batch.support) for _, batch, _ in trainer.validation)
    # with n_ways a support set has rows of all classes
    fewer = () if trainer.head.same_classes else tuple(n for n in FEWER_OF_CLASSES if n < least)
    parts: list[list[list[Any]]] = []  # of as many first rows, then of the batches of a member
    n_batches: dict[int | None, int] = {}
    for member, batch, task in trainer.validation:
        place = n_batches.get(member, 0)
        n_batches[member] = place + 1
        sets = [*map(batch.support.first, fewer)] if place == 0 else []
        places = [*range(len(sets)), len(fewer) + place]
        parts += [[] for _ in range(places[-1] + 1 - len(parts))]
        for j, support in zip(places, [*sets, batch.support], strict=True):
            pair = trainer.outputs(meta_params, member, EpisodeBatch(support, batch.query))
            found = [batch.query.real(t).double().cpu().numpy() for t in pair]
            parts[j].append([*found, trainer.weights(batch.query), task, _sizes(support)])

    def fitted(own: list[list[Any]]) -> tuple[float, int, float]:
        outputs, targets, weight, tasks, sizes = (_joined(v) for v in zip(*own, strict=True))
        log = float(np.log(find_logit_scale(outputs, targets, weight)))
        return log, len(np.unique(tasks)), float(np.median(sizes))

    of_all = fitted([part for own in parts[len(fewer) :] for part in own])[0]
    if trainer.head.same_classes:
        return {"factor": float(np.exp(of_all))}
    factors = {}
    for own in parts:
        log, n_tasks, size = fitted(own)
        factors[size] = np.exp((n_tasks * log + DRAWN * of_all) / (n_tasks + DRAWN))
    of_sizes = sorted(factors)
    factor = np.array([[factors[size]] for size in of_sizes])
    return {"sizes": np.array(of_sizes), "factor": factor}


def _sizes(support: Rows) -> np.ndarray:
    """Count the rows (n_tasks,) of support sets."""
    n_tasks, width = support.X.shape[:2]
    return np.full(n_tasks, width) if support.lengths is None else np.asarray(support.lengths)


# degrees of freedom (n_outputs,) of the prior of a task's scale, and whether it is of noise alone
_Scale = tuple[np.ndarray, np.ndarray]


def _factors(parts: Sequence[_Deviations], scale: _Scale | None) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of support sets (n_sizes,), and the factors (n_sizes, n_outputs) that belong to them.

    Few tasks tell little of each size: their factors are drawn to that of all sizes but 0.
    """
    with_rows = [part for part in parts if part.support > 0] or parts
    of_all = np.log(_Deviations.joined(with_rows).factor(scale))
    sizes = sorted({part.support for part in parts})
    logs = []
    for size in sizes:
        own = _Deviations.joined([part for part in parts if part.support == size])
        n_tasks = len(np.unique(own.task))
        log = np.log(own.factor(scale))
        logs.append((n_tasks * log + DRAWN * of_all) / (n_tasks + DRAWN))
    return np.array(sizes, dtype=float), np.exp(logs)


@dataclasses.dataclass(frozen=True)
class _Deviations:
    """Errors and variances of held-out targets, and what support sets tell.

    Attributes
    ----------
    support : int
        Rows of the support sets, or of the median one.
    error, variance, misfit, n_rows, moved, n_moved : ndarrays of shape (n_values, n_outputs)
        Of a member that has not seen the task; see `HeadFunctions.misfit` and `moved` for the last.
    between : ndarray of shape (n_values, n_outputs)
        Variance of the outputs of all members, by what they count.
    task : int ndarray of shape (n_values,)
    weight : ndarray of shape (n_values,) or None
        Of the rows, times what the member counts; None: all the same.
    """

    support: int
    error: np.ndarray
    variance: np.ndarray
    misfit: np.ndarray
    n_rows: np.ndarray
    moved: np.ndarray
    n_moved: np.ndarray
    between: np.ndarray
    task: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(
        cls,
        trainer: HeadTrainer,
        meta_params: dict[str, Tensor],
        calibration: Calibration,
        held: HeldOut,
        support: Rows,
        alone: bool = False,
    ) -> _Deviations:
        """Those of the query rows of held-out episodes, given these support sets.

        `calibration` has what members count. `alone`: the other members have seen the rows. How far
        theirs are from the outputs of this one, and how likely they find the targets, tells nothing
        of rows that no task had.
        """
        batch = EpisodeBatch(support, held.episodes.query)
        parts = [
            cls._of_some(
                trainer,
                meta_params,
                calibration,
                HeldOut(held.member, batch.take(some), held.task[some]),
                alone,
            )
            for some in _few_at_a_time(len(batch))
        ]
        return dataclasses.replace(cls.joined(parts), support=_size(support))

    @classmethod
    def _of_some(
        cls,
        trainer: HeadTrainer,
        meta_params: dict[str, Tensor],
        calibration: Calibration,
        held: HeldOut,
        alone: bool,
    ) -> _Deviations:
        support, query = held.episodes.support, held.episodes.query
        outputs, variances, y, misfits, trust = trainer.predictive(meta_params, held.episodes)
        centers = trainer.head.likelihood.center(outputs, variances, trainer.head)
        own = held.member or 0
        like = centers[own]
        parts = [like] * 4  # not asked for
        if misfits is not None:
            parts = [part[own if len(part) > 1 else 0].unsqueeze(1) for part in misfits]
        counts = centers.new_tensor(1 / len(centers))
        if trust is not None:
            counts = calibration.counted(trust).unsqueeze(2)
        between = (counts * (centers - (counts * centers).sum(0)).square()).sum(0)
        if alone:
            between, trust = torch.zeros_like(between), None
        codes = torch.as_tensor(held.task, device=like.device)[:, None].expand(y.shape[:2])
        of_rows = [
            query.real(v.expand_as(like)).double().cpu().numpy()
            for v in (y - like, variances[own], *parts, between)
        ]
        weight = trainer.weights(query)
        if trust is not None:  # members count in the factors as they do in predictions
            own_trust = counts[own].mean(-1).expand(y.shape[:2])
            of_member = query.real(own_trust).double().cpu().numpy()
            weight = of_member if weight is None else of_member * weight
        made: list[Any] = [*of_rows, query.real(codes).cpu().numpy(), weight]
        return cls(support.X.shape[1], *made)

    @classmethod
    def joined(cls, parts: Sequence[_Deviations]) -> _Deviations:
        """All of them; `support` is that of the first."""
        names = [field.name for field in dataclasses.fields(cls)][1:]
        each = [_joined([getattr(part, name) for part in parts]) for name in names]
        return cls(parts[0].support, *each)

    def scaled(self, scale: _Scale | None) -> np.ndarray:
        """Return variances under this prior of a task's scale."""
        if scale is None:
            return self.variance
        freedom, of_noise = scale
        misfit = np.maximum(self.misfit - of_noise * self.moved, 0)
        spread: np.ndarray = (freedom + misfit) / (freedom + self.n_rows - of_noise * self.n_moved)
        return self.variance * spread

    def scale(self) -> _Scale:
        """Return the prior under which the errors are likeliest.

        By a Laplace distribution, so that few outliers do not decide.
        """
        tried = [(freedom, of_noise) for of_noise in (False, True) for freedom in FREEDOMS]
        losses = []
        for freedom, of_noise in tried:
            std = np.sqrt(self.scaled((np.array(freedom), np.array(of_noise))))
            log_std = np.average(np.log(std), axis=0, weights=self.weight)
            error = np.average(np.abs(self.error) / std, axis=0, weights=self.weight)
            losses.append(log_std + np.log(np.maximum(error, np.finfo(float).tiny)))
        best = np.argmin(losses, axis=0)
        return np.array([f for f, _ in tried])[best], np.array([n for _, n in tried])[best]

    def needed(self, scale: _Scale | None) -> np.ndarray:
        """Factors (n_levels + 1, n_outputs) of the deviations for `LEVELS` and `LEAST_LEVEL`.

        Those of the mean of all members, whose squared errors are less than those of one, by what
        the members differ in; this is in the variances of predictions.
        """
        squares, variance = self.error**2, self.scaled(scale)
        mean, between = (
            np.average(v, axis=0, weights=self.weight) for v in (squares, self.between)
        )
        kept = np.clip(1 - between / np.maximum(mean, np.finfo(float).tiny), LEAST_KEPT, 1)
        parts = []
        for level, hold in zip((*LEVELS, LEVELS[0]), (*LEVELS, LEAST_LEVEL), strict=True):
            squared = (kept * squares / _within(level) ** 2 - self.between) / variance
            parts.append(_quantile(squared, hold, self.weight))
        return np.clip(np.sqrt(np.maximum(parts, 0)), *FACTORS)

    def factor(self, scale: _Scale | None) -> np.ndarray:
        """Factors (n_outputs,) of the deviations that make the intervals hold their part."""
        outer, inner, least = self.needed(scale)
        return np.maximum(np.sqrt(outer * inner), least)

    def tails(self, scale: _Scale | None) -> np.ndarray:
        """Degrees of freedom (n_outputs,) of a Student distribution with the tails of errors."""
        outer, inner, _ = self.needed(scale)
        ratios = stdtrit(TAILS, 0.95) / stdtrit(TAILS, 0.75) / (_within(0.9) / _within(0.5))
        return np.exp(np.interp(outer / inner, ratios, np.log(TAILS)))

    def quantile(self, level: float) -> np.ndarray:
        """Find how many deviations (n_outputs,) from the center this part of targets is below."""
        return _quantile(self.error / np.sqrt(self.variance), level, self.weight)


def _within(level: float) -> float:
    """Return how many standard deviations around a mean hold this part of a normal distribution."""
    return float(ndtri((1 + level) / 2))


def _quantile(values: np.ndarray, level: float, weight: np.ndarray | None) -> np.ndarray:
    """Quantiles of the columns."""
    if weight is None:
        return np.quantile(values, level, axis=0)
    order = np.argsort(values, axis=0)
    share = np.cumsum(weight[order], axis=0) / weight.sum()
    at = np.minimum((share < level).sum(0), len(values) - 1)
    return np.take_along_axis(values, order, 0)[at, np.arange(values.shape[1])]


def _joined(parts: Sequence[Any]) -> Any:
    """Arrays one after another; None if that is what they are."""
    return None if parts[0] is None else np.concatenate(parts)


def held_out_outputs(
    trainer: HeadTrainer,
    engine: Engine,
    meta_params: dict[str, Tensor],
    batches: Sequence[EpisodeBatch],
    calibration: Calibration,
    *,
    alpha: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return outputs of the first member and of gradient steps, targets and episodes of query rows.

    Of tasks that neither of them has seen, in the units of the losses; logits, of classes, which
    are calibrated of the member. The last of the results are the weights of the rows, None where
    they are equal.
    """
    own = {n: p for n, p in meta_params.items() if not n.startswith("head.")}
    parts: list[list[np.ndarray]] = [[], [], [], []]
    first = 0
    for batch in batches:
        with engine.threads(batch.query.X.shape[0] * batch.query.X.shape[1]):
            _, of_steps = engine.evaluate(own, batch, alpha=alpha, steps=steps)
        of_head, y = trainer.outputs(meta_params, 0, batch)
        if trainer.head.likelihood.are_classes:
            factors = calibration.factors(_sizes(batch.support), unseen=False)
            of_head = of_head * torch.tensor(factors[:, None]).to(of_head)
        episode = torch.arange(len(batch), device=y.device)[:, None].expand(y.shape[:2]) + first
        first += len(batch)
        for values, part in zip((of_head, of_steps, y, episode), parts, strict=True):
            part.append(batch.query.real(values).cpu().double().numpy())
    head, of_steps_, target, codes = (np.concatenate(part) for part in parts)
    weight = _joined([trainer.weights(batch.query) for batch in batches])
    return head, of_steps_.reshape(len(head), -1), target, codes.astype(np.intp), weight


def choose(
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None],
    task: np.ndarray,
    calibration: Calibration,
    likelihood: Likelihood,
    known: float = 0.0,
) -> tuple[float, Calibration]:
    """Share of gradient steps, and how confident steps and mixture may be.

    `task` has the task of each episode; `known` is the share that an earlier fit has found.
    """
    head, steps, target, codes, weight = held_out
    if not likelihood.are_classes:
        beyond = MARGIN * (calibration.high - calibration.low)
        head, steps = (
            np.clip(o, calibration.low - beyond, calibration.high + beyond) for o in (head, steps)
        )
        share = choose_share(head, steps, target, codes, task, likelihood, known, weight)
        return share, calibration
    scale = find_logit_scale(steps, target, weight)
    logs = [log_softmax(outputs, axis=1) for outputs in (head, scale * steps)]
    share = choose_share(logs[0], logs[1], target, codes, task, likelihood, known, weight)
    mixed = likelihood.mix(logs[0], logs[1], share)
    # a mean of calibrated probabilities is not confident enough
    of_mixture = find_logit_scale(mixed, target, weight) if 0 < share < 1 else 1.0
    return share, dataclasses.replace(calibration, steps_scale=scale, scale=of_mixture)
