"""Meta-training of a Gaussian head, alone or beside gradient steps, for the one outer loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine import Engine, MetaStep, MetaSteps
from sklearn_maml.learners.gaussian import DECAY
from sklearn_maml.learners.head_trainer import PREFIX, HeadTrainer
from sklearn_maml.learners.shares import LEAST_HELD_OUT
from sklearn_maml.theta import Params

# outer rate over that of gradient steps; it rises over the first part of the updates, and falls
# like a cosine to the last of them, which is after a part of those of gradient steps
RATE, WARM_UP, PART_OF_UPDATES = 10 / 3, 0.05, 0.6
# part of these after which a start that nothing has beaten is kept
PATIENCE = 0.6
# that training has gained over the start on held-out tasks, one-sided
CONFIDENCE = 0.95
# that of very many features ends after so many validations in a row that are behind the best one by
# so many standard errors of paired differences
BEHIND_IN_A_ROW, ERRORS_PAST_BEST = 2, 3.0
# gradient steps are given up after so many validations whose paired difference to the head's, in
# squared error say, is this many standard errors and this part of the head's error
LEAST_VALIDATIONS, ERRORS_BEHIND, PART_BEHIND = 2, 2.0, 0.1
# attributes of `Joint` that a training goes on from
PROGRESS = ("n_validations", "head_is_done", "at_start", "kept", "best", "n_behind")


def rate_factor(progress: float) -> float:
    """Outer rate, over the largest, after this part of the updates."""
    return min(progress / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _of_steps(meta_params: Params) -> Params:
    return {n: p for n, p in meta_params.items() if not n.startswith(PREFIX)}


@dataclass
class Joint(MetaSteps):
    """What the outer loop trains: a Gaussian head and, unless given up, gradient steps.

    The losses and outputs of its meta-steps are those of the head.

    Attributes
    ----------
    trainer : HeadTrainer
    engine : Engine or None
        Of the gradient steps. They learn from the episodes that `EpisodeBatch.of_steps` names.
    behind : list of (ndarray, ndarray, ndarray)
        Held-out errors of the first member, of gradient steps, and of the first member as it is
        kept so far, task by task, since the last epoch.
    at_start : Tensor or None
        Errors on the held-out tasks at the start of the head.
    kept : Tensor or None
        The last of these, once they are known.
    latest, best : Tensor or None
        Errors on the held-out tasks at the last validation, and at the one whose head is kept.
    n_behind : int
        Validations in a row that are clearly behind the best one.
    has_share : bool
        Whether steps have shown their worth on the tasks of a fit that this one continues.
    """

    trainer: HeadTrainer
    engine: Engine | None
    behind: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    n_validations: int = 0
    head_is_done: bool = False
    at_start: Tensor | None = None
    kept: Tensor | None = None
    latest: Tensor | None = None
    best: Tensor | None = None
    n_behind: int = 0
    has_share: bool = False

    @property
    def module(self) -> Any:  # type: ignore[override]
        """Whatever has parameters."""
        return self.trainer.head

    def running_averages(self) -> list[Tensor]:
        """See `MetaSteps`."""
        return [b for b in self.trainer.head.body.buffers() if b.is_floating_point()]

    def threads(self, n_rows: int) -> Any:
        """See `MetaSteps`."""
        return super().threads(n_rows) if self.engine is None else self.engine.threads(n_rows)

    def expect(self, first_update: int, n_updates: int, **outlook: int) -> None:
        """See `MetaSteps`."""
        self.trainer.launched.expect(n_updates)
        if self.engine is not None:
            self.engine.expect(first_update, n_updates, **outlook)

    def finish(self) -> None:
        """See `MetaSteps`."""
        if self.engine is not None:
            self.engine.finish()

    def progress(self) -> dict[str, Any]:
        """See `MetaSteps`."""
        of_steps = None if self.engine is None else self.engine.progress()
        return {"steps": of_steps, **{name: getattr(self, name) for name in PROGRESS}}

    def resume(self, progress: dict[str, Any]) -> None:
        """See `MetaSteps`."""
        vars(self).update({name: progress[name] for name in PROGRESS})
        if progress["steps"] is None:
            self.engine = None
        elif self.engine is not None:
            self.engine.resume(progress["steps"])

    def meta_step(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> MetaStep:
        """See `MetaSteps`; gradients of the steps are a sum over the number of all tasks."""
        if self.head_is_done:
            step = self.trainer.evaluate(meta_params, batch)
        else:
            step = self.trainer.meta_step(meta_params, batch)
        if self.engine is None:
            return step
        own = _of_steps(meta_params)
        part = batch
        if batch.of_steps is not None and not batch.of_steps.all():
            part = batch.take(np.flatnonzero(batch.of_steps))
        if len(part):
            of_steps = self.engine.meta_step(own, part, alpha=alpha, steps=steps)
            share = len(part) / len(batch)
            grads = {name: share * g for name, g in of_steps.grads.items()}
        else:
            grads = {name: torch.zeros_like(p) for name, p in own.items()}
        return MetaStep(step.losses, {**grads, **step.grads}, step.outputs)

    def evaluate(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """See `MetaSteps`; of the gradient steps."""
        assert self.engine is not None
        return self.engine.evaluate(_of_steps(meta_params), batch, alpha=alpha, steps=steps)

    @torch.no_grad()
    def shrink(self, params: dict[str, Any], rate: float) -> None:
        """Decay the weights of the networks and of the prior, in place.

        Apart from the gradient (Loshchilov & Hutter 2019): it keeps new rows in bounds.
        """
        if self.head_is_done:
            return
        head = self.trainer.head
        of_prior, decay = head.decaying(params, PREFIX)
        shrunk = [p for n, p in params.items() if n.startswith(f"{PREFIX}body.") and "weight" in n]
        torch._foreach_mul_([*shrunk, *of_prior], 1 - rate * decay)
        if head.same_classes:
            factor = params[f"{PREFIX}factor"]
            start = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            factor.lerp_(start, rate * DECAY)

    def compare(self, of_head: Tensor, of_steps: Tensor, of_kept: Tensor) -> None:
        """Note held-out errors of the same episodes; the last of the head that is kept so far."""
        parts = (part.double().cpu().numpy() for part in (of_head, of_steps, of_kept))
        self.behind.append(tuple(parts))

    def held_out(self, meta_params: Params) -> float:
        """Error of the members on their held-out tasks; NaN if there are none.

        Their mean: a member's own held-out tasks are too few to choose its parameters by. The first
        call is about the start; later ones return its error unless a smaller one is no accident of
        few tasks.
        """
        if not self.trainer.validation:
            return math.nan
        errors = self.trainer.held_out_errors(meta_params).double().cpu()
        self.latest = errors
        if self.at_start is None:
            self.at_start = self.best = errors
        if not len(self.trainer.head.center):  # no tables: nothing is known at the start
            return float(errors.mean())
        gain = self.at_start - errors
        if len(gain) < LEAST_HELD_OUT:  # it proves nothing
            errors = self.at_start
        else:
            error = gain.std() / math.sqrt(len(gain))
            if not gain.mean() > stdtrit(len(gain) - 1, CONFIDENCE) * error:
                errors = self.at_start
        return float(errors.mean())

    def cannot_mix(self) -> bool:
        """Whether there are too few held-out tasks for gradient steps to get a share."""
        return self.trainer.n_judges < LEAST_HELD_OUT and not self.has_share

    def is_past_its_best(self) -> bool:
        """Whether training only spoils the head by now; to be asked once after each validation."""
        if self.latest is None or self.best is None or not self.trainer.head.overfits_soon:
            return False
        behind = (self.latest - self.best).numpy()
        if len(behind) < LEAST_HELD_OUT:
            return False
        clearly = behind.mean() > ERRORS_PAST_BEST * behind.std(ddof=1) / math.sqrt(len(behind))
        self.n_behind = self.n_behind + 1 if clearly else 0
        return self.n_behind >= BEHIND_IN_A_ROW

    def keep(self) -> None:
        """Note that the head of the last comparisons is the best so far."""
        self.best = self.latest
        if self.behind:
            self.kept = torch.from_numpy(np.concatenate([parts[0] for parts in self.behind]))

    def fall_behind(self) -> bool:
        """Whether held-out tasks say by now that gradient steps will have no share.

        Beside the head that is kept: what training has spoilt since will not predict.
        """
        behind, self.behind = self.behind, []
        if not behind or self.engine is None:
            return False
        self.n_validations += 1
        _, steps, kept = (np.concatenate(part) for part in zip(*behind, strict=True))
        if self.kept is None:
            self.kept = torch.from_numpy(kept)
        head = self.kept.numpy()
        difference = steps - head
        if self.n_validations < LEAST_VALIDATIONS or self.trainer.n_judges < LEAST_HELD_OUT:
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            error = difference.std(ddof=1) / np.sqrt(len(difference))
            mean = difference.mean()
            close = mean <= max(ERRORS_BEHIND * error, PART_BEHIND * head.mean())
        return not close
