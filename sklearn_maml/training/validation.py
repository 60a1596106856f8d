"""Held-out tasks in meta-training: their losses, and whether they need their support sets."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch


def judge_start(net: Any) -> None:
    """Keep what a fit starts from, where that is trained, until held-out tasks do better."""
    if net.parts_ is not None:
        net.parts_.begin(net)
        return
    if not net.update_ or not net.train_split.batches:
        return
    device = torch.device(net.device)
    losses = torch.cat([validate(net, batch.to(device))[0] for batch in net.train_split.batches])
    finite = torch.isfinite(losses)
    if bool(finite.any()):
        net.best_loss_ = float(losses[finite].mean())
        net.best_state_ = copy.deepcopy(net.module_.state_dict())


def validate(net: Any, episodes: EpisodeBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Query losses and outputs of held-out tasks, and what else the history has of them.

    With a Gaussian head the losses are the head's, and those of gradient steps stand beside them.
    """
    params = net.module_.meta_params()
    joint = net.joint
    row: dict[str, Tensor] = {}
    if joint is None or joint.engine is not None:
        before, _ = net.engine.evaluate(params, episodes, alpha=net.alpha, steps=0)
        losses, output = net.engine.evaluate(
            params, episodes, alpha=net.alpha, steps=net.eval_steps
        )
    if joint is not None:
        if joint.engine is not None:
            row["steps_valid_loss"] = losses.mean()
            row["steps_valid_loss_before"] = before.mean()
            of_steps = losses
        before, losses, output = joint.trainer.errors(params, episodes)
        if joint.engine is not None:
            of_kept = losses
            if joint.kept is None and net.best_state_ is not None:  # the start
                start = {n: p for n, p in net.best_state_.items() if n in params}
                _, of_kept, _ = joint.trainer.errors(start, episodes)
            joint.compare(losses, of_steps, of_kept)
    row["valid_loss_before"] = before.mean()
    return losses, output, row


def compare_supports(
    engine: Any,
    meta_params: dict[str, Tensor],
    batches: list[EpisodeBatch],
    *,
    alpha: float,
    steps: int,
) -> np.ndarray:
    """Query losses of episodes before adaptation, after it, and after that to another's support.

    Returns
    -------
    losses : ndarray of shape (3, n_episodes)
        Neighbours in a batch, whose support sets are exchanged, are taken to be other tasks.
    """
    losses = []
    for batch in batches:
        others = batch.support.take(np.roll(np.arange(len(batch)), 1))
        runs = [(batch, 0), (batch, steps), (EpisodeBatch(others, batch.query), steps)]
        losses.append(
            [
                engine.evaluate(meta_params, episodes, alpha=alpha, steps=n)[0].cpu().numpy()
                for episodes, n in runs
            ]
        )
    return np.concatenate(losses, axis=1)
