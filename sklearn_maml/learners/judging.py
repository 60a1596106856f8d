"""What held-out tasks say of the learners: their shares, and how sure they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine import Engine
from sklearn_maml.learners.conditioned import MARGIN, Calibration
from sklearn_maml.learners.joint import HeadTrainer
from sklearn_maml.learners.shares import choose_share, find_logit_scale, mix

__all__ = ["choose", "held_out_outputs", "judge_head"]

# 1.645 standard deviations are to hold nine targets in ten; factors of the deviations learned
LEVEL, DEVIATIONS, FACTORS = 0.9, 1.645, (0.5, 3.0)


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
    last = trainer.head.n_members - 1
    parts = [
        (shared_rows is not None and member == last, _deviations(trainer, meta_params, *item))
        for item in trainer.validation
        for member in (item[0],)
    ]
    known = [part for hidden, part in parts if not hidden]
    unseen = [part for hidden, part in parts if hidden]
    factor = _factor(known, trainer.head.classification)
    if not unseen:
        return dataclasses.replace(plain, factor=factor)
    return dataclasses.replace(
        plain,
        factor=factor,
        seen=shared_rows,
        factor_unseen=_factor(unseen, trainer.head.classification),
    )


def _deviations(
    trainer: HeadTrainer, meta_params: dict[str, Tensor], member: int | None, batch: EpisodeBatch
) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs and targets of classes; absolute errors and standard deviations of numbers."""
    mean, variance, y = trainer.outputs(meta_params, member, batch)
    mean, y = (batch.query.real(t) for t in (mean, y))
    if variance is None:
        return mean.double().cpu().numpy(), y.double().cpu().numpy()
    std = batch.query.real(variance).sqrt().expand_as(mean)
    return (mean - y).abs().double().cpu().numpy(), std.double().cpu().numpy()


def _factor(parts: Sequence[tuple[np.ndarray, np.ndarray]], classification: bool) -> float:
    first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    if classification:
        return find_logit_scale(first, second)
    return float(np.clip(np.quantile(first / second, LEVEL) / DEVIATIONS, *FACTORS))


def held_out_outputs(
    trainer: HeadTrainer,
    engine: Engine,
    meta_params: dict[str, Tensor],
    batches: Sequence[EpisodeBatch],
    *,
    alpha: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return outputs of the first member and of gradient steps, targets and episodes of query rows.

    Of tasks that neither of them has seen, in the units of the losses; logits, of classes.
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
    return head, of_steps_.reshape(len(head), -1), target, codes.astype(np.intp)


def choose(
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    task: np.ndarray,
    calibration: Calibration,
    classification: bool,
    known: float = 0.0,
) -> tuple[float, Calibration]:
    """Share of gradient steps, and how confident steps and mixture may be.

    `task` has the task of each episode; `known` is the share that an earlier fit has found.
    """
    head, steps, target, codes = held_out
    if not classification:
        beyond = MARGIN * (calibration.high - calibration.low)
        head = np.clip(head, calibration.low - beyond, calibration.high + beyond)
        return choose_share(head, steps, target, codes, task, False, known), calibration
    scale = find_logit_scale(steps, target)
    logs = [log_softmax(f * o, axis=1) for f, o in ((calibration.factor, head), (scale, steps))]
    share = choose_share(logs[0], logs[1], target, codes, task, True, known)
    mixed = mix(logs[0], logs[1], share, True)
    # a mean of calibrated probabilities is not confident enough
    of_mixture = find_logit_scale(mixed, target) if 0 < share < 1 else 1.0
    return share, dataclasses.replace(calibration, steps_scale=scale, scale=of_mixture)
