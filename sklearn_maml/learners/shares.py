"""Which learners predict, and how sure they may be: decided on held-out tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import nn

from sklearn_maml.learners.base import Adapted
from sklearn_maml.learners.conditioned import Conditioned
from sklearn_maml.learners.likelihoods import Likelihood
from sklearn_maml.learners.plain import PlainMixture

# of gradient steps; never all, so that there is a standard deviation
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# what steps have to gain, in standard errors over held-out tasks, before they get a share; and
# tasks, of which fewer prove nothing
EVIDENCE, LEAST_HELD_OUT = 2.0, 10


def task_errors(
    outputs: np.ndarray,
    target: np.ndarray,
    codes: np.ndarray,
    likelihood: Likelihood,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Error (n_tasks,) of each task, as the likelihood measures it."""
    with np.errstate(over="ignore", invalid="ignore"):  # gradient steps may have diverged
        return likelihood.task_errors(outputs, target, codes, weight)


def choose_share(
    head: np.ndarray,
    steps: np.ndarray,
    target: np.ndarray,
    codes: np.ndarray,
    task: np.ndarray,
    likelihood: Likelihood,
    known: float = 0.0,
    weight: np.ndarray | None = None,
) -> float:
    """Share of gradient steps with the smallest error on held-out tasks, if they show a gain.

    Parameters
    ----------
    head, steps, target : ndarrays of shape (n_rows, n_outputs)
        As of `Likelihood.mix`; targets are standardised, or 1 for the class of the row and 0
        for the others.
    codes : int ndarray of shape (n_rows,)
        Episode of each row.
    task : int ndarray of shape (n_episodes,)
        Task of each episode, over whose means the standard error is.
    known : float, default=0.0
        Share that other tasks have shown before, which stays unless these show a gain over it.
    weight : ndarray of shape (n_rows,), default=None
        Of the rows; their mean in an episode is what its task counts.
    """
    n_episodes = np.bincount(task)
    seen = n_episodes > 0
    each = 1.0 if weight is None else np.bincount(codes, weight) / np.bincount(codes)

    def of_tasks(share: float) -> np.ndarray:
        mixed = likelihood.mix(head, steps, share)
        errors = each * task_errors(mixed, target, codes, likelihood, weight)
        return (np.bincount(task, errors)[seen]) / n_episodes[seen]

    errors = {share: of_tasks(share) for share in dict.fromkeys((known, *SHARES))}
    finite = {share: e.mean() for share, e in errors.items() if np.isfinite(e).all()}
    best = min(finite, key=lambda share: finite[share]) if finite else 0.0
    if best == known or known not in finite:
        return best
    gain = errors[known] - errors[best]
    if len(gain) < LEAST_HELD_OUT:
        return known
    return best if gain.mean() > EVIDENCE * gain.std(ddof=1) / np.sqrt(len(gain)) else known


def find_logit_scale(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None
) -> float:
    """Factor of logits (n_rows, n_classes) with the smallest cross-entropy (Guo et al. 2017)."""
    factors = np.geomspace(0.25, 4.0, 49)
    rows = [-(target * log_softmax(f * logits, axis=1)).sum(1) for f in factors]
    losses = [np.average(loss, weights=weight) for loss in rows]
    return float(factors[np.nanargmin(losses)]) if np.isfinite(losses).any() else 1.0


class Mixed(Adapted):
    """Tasks that were learned both ways; the standard deviation is that of the head.

    Without labelled rows predictions are the head's: it learns from such episodes, and the
    initialisation of gradient steps is trained for what comes after them.

    Parameters
    ----------
    head : Conditioned
    steps : Adapted
    share : float
        Of the steps.
    steps_scale, scale : float
        Factors of the logits of the steps, and of the mixture.
    """

    def __init__(
        self,
        head: Conditioned,
        steps: Adapted,
        share: float,
        steps_scale: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        self.head = head
        self.steps = steps
        self.share = share
        self.likelihood = head.head.likelihood
        self.steps_scale = steps_scale
        self.scale = scale
        self._mixes = head.has_rows() | (share == 1)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.steps.n_tasks

    def _mix(self, head: np.ndarray, rows: np.ndarray, codes: np.ndarray, how: Any) -> np.ndarray:
        mixes = self._mixes[codes]
        if not mixes.any():
            return head
        steps = self.steps.outputs(rows, codes, how)
        if self.likelihood.are_classes:
            steps = log_softmax(self.steps_scale * steps.astype(np.float64), axis=1)
            mixed = self.likelihood.mix(head, steps, self.share)
            mixed = log_softmax(self.scale * mixed, axis=1)
        else:
            # beyond the targets that were seen, steps know no more than the head does
            mixed = self.likelihood.mix(head, self.head.bounded(steps, codes), self.share)
        return mixed if mixes.all() else np.where(mixes[:, None], mixed, head)

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> np.ndarray:
        """See `Adapted`."""
        return self._mix(self.head.outputs(rows, codes, how), rows, codes, how)

    def std(self, rows: np.ndarray, codes: np.ndarray, how: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Adapted`; what the two ways differ in is added."""
        head, std = self.head.std(rows, codes, how)
        mixed = self._mix(head, rows, codes, how)
        loss = self.likelihood.loss
        steps_off = (loss.predict(mixed) - loss.predict(head)) ** 2
        return mixed, np.sqrt(std**2 + steps_off)

    def telling_rows(
        self, rows: np.ndarray, pools: np.ndarray, tasks: np.ndarray, n: int
    ) -> np.ndarray:
        """See `Adapted`: those that tell the head most."""
        return self.head.telling_rows(rows, pools, tasks, n)

    def module(self, task: int, how: Any) -> nn.Module:
        """See `Adapted`."""
        if not self._mixes[task]:
            return self.head.module(task, how)
        scales = (self.steps_scale, self.scale) if self.likelihood.are_classes else None
        head, steps = self.head.module(task, how), self.steps.module(task, how)
        return PlainMixture(head, steps, self.share, scales)

    def state(self) -> dict[str, Any]:
        """See `Adapted`."""
        return {"kind": "mixed", "head": self.head.state(), "steps": self.steps.state()}
