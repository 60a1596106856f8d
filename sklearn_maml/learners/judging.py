"""What held-out tasks say of the learners: their shares, and how sure they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, ndtri
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine import Engine
from sklearn_maml.learners.conditioned import MARGIN, Calibration
from sklearn_maml.learners.joint import HeadTrainer
from sklearn_maml.learners.likelihoods import Likelihood
from sklearn_maml.learners.shares import choose_share, find_logit_scale

__all__ = ["choose", "held_out_outputs", "judge_head"]

# 1.645 standard deviations are to hold nine targets in ten, .674 of them half. Where tails are
# heavier than those of a normal distribution no factor does both: the geometric mean of the two is
# taken, but not less than holds the least. Factors of the deviations that may be learned
LEVELS, LEAST_LEVEL, FACTORS = (0.9, 0.5), 0.86, (0.5, 3.0)
# what is tried; a task's scale is a matter of its own rows below ten or so
FREEDOMS = (1e9, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0)


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
    if trainer.head.likelihood.are_classes:
        parts = []
        for member, batch, _ in trainer.validation:
            logits, _, y = trainer.outputs(meta_params, member, batch)
            parts.append([batch.query.real(t).double().cpu().numpy() for t in (logits, y)])
        outputs, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
        weight = _joined([trainer.weights(batch.query) for _, batch, _ in trainer.validation])
        return dataclasses.replace(plain, factor=find_logit_scale(outputs, targets, weight))
    last = trainer.head.n_members - 1
    held = [
        (
            shared_rows is not None and member == last,
            _Deviations.of(trainer, meta_params, member, batch),
        )
        for member, batch, _ in trainer.validation
    ]
    known = _Deviations.joined([part for hidden, part in held if not hidden])
    trainer.head.likelihood.learn_quantile(trainer.head, known.quantile)
    freedom = known.freedom() if trainer.head.likelihood.noise_differs else None
    plain = dataclasses.replace(plain, factor=known.factor(freedom), freedom=freedom)
    unseen = [part for hidden, part in held if hidden]
    if not unseen:
        return plain
    return dataclasses.replace(
        plain, seen=shared_rows, factor_unseen=_Deviations.joined(unseen).factor(freedom)
    )


@dataclasses.dataclass(frozen=True)
class _Deviations:
    """Errors and standard deviations of held-out targets, and what support sets tell.

    Attributes
    ----------
    error, std, misfit, n_rows : ndarrays of shape (n_values, n_outputs)
        See `HeadFunctions.misfit` for the last two.
    weight : ndarray of shape (n_values,) or None
        Of the rows.
    """

    error: np.ndarray
    std: np.ndarray
    misfit: np.ndarray
    n_rows: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(
        cls,
        trainer: HeadTrainer,
        meta_params: dict[str, Tensor],
        member: int | None,
        batch: EpisodeBatch,
    ) -> _Deviations:
        """Those of the query rows of a batch."""
        mean, variance, y = trainer.outputs(meta_params, member, batch)
        assert variance is not None
        likelihood = trainer.head.likelihood
        mean = likelihood.center(mean, variance, trainer.head)
        told = (mean.new_ones(()), mean.new_ones(()))
        if likelihood.noise_differs:
            told = tuple(t.unsqueeze(1) for t in trainer.misfits(meta_params, member, batch))
        error, std, misfit, n_rows = (
            batch.query.real(v.expand_as(mean)).double().cpu().numpy()
            for v in (y - mean, variance.sqrt(), *told)
        )
        return cls(error, std, misfit, n_rows, trainer.weights(batch.query))

    @classmethod
    def joined(cls, parts: Sequence[_Deviations]) -> _Deviations:
        """All of them."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(_joined([getattr(part, name) for part in parts]) for name in names))

    def scaled(self, freedom: np.ndarray | float | None) -> np.ndarray:
        """Return standard deviations under a prior of so many degrees of freedom."""
        if freedom is None:
            return self.std
        scale: np.ndarray = np.sqrt((freedom + self.misfit) / (freedom + self.n_rows))
        return self.std * scale

    def freedom(self) -> np.ndarray:
        """Degrees of freedom (n_outputs,) under which the errors are likeliest.

        By a Laplace distribution, so that few outliers do not decide.
        """
        losses = []
        for freedom in FREEDOMS:
            std = self.scaled(freedom)
            log_std = np.average(np.log(std), axis=0, weights=self.weight)
            error = np.average(np.abs(self.error) / std, axis=0, weights=self.weight)
            losses.append(log_std + np.log(np.maximum(error, np.finfo(float).tiny)))
        return np.array(FREEDOMS)[np.argmin(losses, axis=0)]

    def factor(self, freedom: np.ndarray | None) -> np.ndarray:
        """Factors (n_outputs,) of the deviations that make the intervals hold their part."""
        deviations = np.abs(self.error) / self.scaled(freedom)
        outer, inner = (_quantile(deviations, p, self.weight) / _within(p) for p in LEVELS)
        least = _quantile(deviations, LEAST_LEVEL, self.weight) / _within(LEVELS[0])
        return np.clip(np.maximum(np.sqrt(outer * inner), least), *FACTORS)

    def quantile(self, level: float) -> np.ndarray:
        """Find how many deviations (n_outputs,) from the center this part of targets is below."""
        return _quantile(self.error / self.std, level, self.weight)


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
    *,
    alpha: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return outputs of the first member and of gradient steps, targets and episodes of query rows.

    Of tasks that neither of them has seen, in the units of the losses; logits, of classes. The last
    of the results are the weights of the rows, None where they are equal.
    """
    own = {n: p for n, p in meta_params.items() if not n.startswith("head.")}
    parts: list[list[np.ndarray]] = [[], [], [], []]
    first = 0
    for batch in batches:
        with engine.threads(batch.query.X.shape[0] * batch.query.X.shape[1]):
            _, of_steps = engine.evaluate(own, batch, alpha=alpha, steps=steps)
        of_head, _, y = trainer.outputs(meta_params, 0, batch)
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
    logs = [log_softmax(f * o, axis=1) for f, o in ((calibration.factor, head), (scale, steps))]
    share = choose_share(logs[0], logs[1], target, codes, task, likelihood, known, weight)
    mixed = likelihood.mix(logs[0], logs[1], share)
    # a mean of calibrated probabilities is not confident enough
    of_mixture = find_logit_scale(mixed, target, weight) if 0 < share < 1 else 1.0
    return share, dataclasses.replace(calibration, steps_scale=scale, scale=of_mixture)
