"""A Gaussian head and gradient steps trained side by side: what ends each, and what is kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.learners.head_trainer import clip_members
from sklearn_maml.learners.joint import PATIENCE, Joint
from sklearn_maml.training.outcomes import current_row, note_non_finite
from sklearn_maml.training.outer_step import Prepared
from sklearn_maml.training.schedule import count_head_updates, decay_rate


class HeadAndSteps:
    """The two parts that one fit trains.

    Parameters
    ----------
    joint : Joint
        What takes the place of an engine.

    Attributes
    ----------
    best : dict
        Smallest held-out errors of "steps" and "head", and that of the head at the "start".
    """

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.best: dict[str, float] = {}
        self._given_up: list[nn.Parameter] = []

    def begin(self, net: Any) -> None:
        """Judge the start of the head, which may be the best."""
        loss = self.joint.held_out(net.module_.meta_params())
        if math.isfinite(loss):
            self.best = {"head": loss, "start": loss}
            self._keep(net, "head", net.module_.state_dict())
        if self.joint.engine is not None and self.joint.cannot_mix():
            self.give_up_steps(net)

    def updates_left(self, net: Any, left: int) -> int:
        """Count the updates up to the end of a part, of those that are left: it ends an epoch."""
        if self.joint.head_is_done:
            return left
        done = net.update_ - net.first_update_
        return max(min(left, count_head_updates(net.max_iter) - done), 1)

    def gradient(
        self, net: Any, step: Any, episodes: EpisodeBatch, ready: Prepared
    ) -> list[Tensor]:
        """Bound the gradient of the steps, and of each member of the head, on its own."""
        of_head = {n: g for n, g in step.grads.items() if n.startswith("head.")}
        grads = {**step.grads, **(clip_members(of_head) if of_head else {})}
        own = [n for n in ready.trainable if not n.startswith("head.")]
        finite: Tensor | None = None
        if own and self.joint.engine is not None:
            if net.symmetric_head is not None:
                net.symmetric_head.project_gradient(grads, in_place=False)
            norm = torch.linalg.vector_norm(
                torch.stack(torch._foreach_norm([grads[n] for n in own]))
            )
            finite = torch.isfinite(norm)
            factor = torch.ones_like(norm)
            if net.max_grad_norm is not None:
                factor = (net.max_grad_norm / norm).clamp(max=1.0)
            grads.update({n: torch.where(finite, factor * grads[n], 0.0) for n in own})
        decay_rate(net)
        rate = next(g["lr"] for g in net.optimizer_.param_groups if g.get("of_head"))
        self.joint.shrink(ready.meta_params, rate)
        net.update_ += 1
        if not ready.on_host:
            skipped = step.losses.new_zeros(()) if finite is None else (~finite).to(step.losses)
            net.outcomes_.put_later(net, {"non_finite": skipped})
        else:
            skips = finite is not None and not bool(finite)
            current_row(net)["non_finite"] = int(skips)
            if skips:
                note_non_finite(net, episodes, net.update_)
        listed = [grads[name] for name in ready.trainable]
        if ready.flat is not None:
            return [torch.cat([g.flatten() for g in listed])]
        return listed

    def track(self, net: Any) -> float:
        """Remember the best parameters of head and steps apart; return what may yet improve."""
        row = net.history[-1]
        losses = {"steps": float(row.get("steps_valid_loss", math.nan)), "head": math.nan}
        if self.joint.engine is None:
            losses["steps"] = math.nan
        if not self.joint.head_is_done:
            losses["head"] = self.joint.held_out(net.module_.meta_params())
        state = net.module_.state_dict()
        for part, loss in losses.items():
            if loss < self.best.get(part, math.inf):
                self.best[part] = loss
                self._keep(net, part, state)
                if part == "head":
                    self.joint.keep()
        if math.isfinite(losses["head"]) and self.joint.is_past_its_best():
            self._end_head(net)
        if self.joint.fall_behind():
            self.give_up_steps(net)
        return min((loss for loss in losses.values() if math.isfinite(loss)), default=math.nan)

    def _keep(self, net: Any, part: str, state: dict[str, Tensor]) -> None:
        """Keep the parameters of a part."""
        if net.best_state_ is None:
            net.best_state_ = copy.deepcopy(state)
        for name, value in state.items():
            if name.startswith("head.") == (part == "head"):
                net.best_state_[name] = value.clone()

    def is_done(self, net: Any) -> bool:
        """Whether head and steps are trained; ends the training of the head when it is its time."""
        done = net.update_ - net.first_update_
        start_is_best = "start" in self.best and self.best["head"] == self.best["start"]
        most = count_head_updates(net.max_iter) * (PATIENCE if start_is_best else 1.0)
        if not self.joint.head_is_done and done >= most:
            self._end_head(net)
        return bool(done >= net.max_iter or (self.joint.head_is_done and self.joint.engine is None))

    def _end_head(self, net: Any) -> None:
        self.joint.head_is_done = True
        self._freeze(net, of_head=True)

    def give_up_steps(self, net: Any) -> None:
        """Train the Gaussian head alone from now on."""
        self.joint.engine = None
        net.non_finite_ = 0
        self._freeze(net, of_head=False)

    def _freeze(self, net: Any, of_head: bool) -> None:
        for name, p in net.module_.named_parameters():
            if name.startswith("head.") == of_head and p.requires_grad:
                p.requires_grad_(False)
                self._given_up.append(p)

    def progress(self, net: Any) -> dict[str, Any]:
        """Return what a fit that is interrupted goes on from, as plain data."""
        given_up = {*map(id, self._given_up)}
        named = net.module_.named_parameters()
        return {"best": dict(self.best), "given_up": [n for n, p in named if id(p) in given_up]}

    def resume(self, net: Any, progress: dict[str, Any]) -> None:
        """Go on from what `progress` returned."""
        self.best = dict(progress["best"])
        named = dict(net.module_.named_parameters())
        self._given_up = [named[name] for name in progress["given_up"]]

    def end(self) -> None:
        """Let a later fit train again what this one has given up."""
        for p in self._given_up:
            p.requires_grad_(True)
