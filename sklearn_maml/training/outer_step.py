"""The outer step: the meta-gradient of a batch, its bounds, and the update that it makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from skorch.utils import TeeGenerator
from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine.tracing.graphs import captures
from sklearn_maml.training.optimizers import (
    FlatStep,
    begin,
    can_mask,
    has_fused_kernel,
    step_fused,
    step_masked,
)
from sklearn_maml.training.outcomes import current_row, note_non_finite
from sklearn_maml.training.schedule import decay_rate, step_size


@dataclasses.dataclass
class Prepared:
    """What the training steps of a net need again and again."""

    params: list[nn.Parameter]
    signature: list[Any]  # what they and the optimiser were when this was made
    meta_params: dict[str, Tensor]
    trainable: dict[str, nn.Parameter]
    needs_closure: bool
    fused: bool
    flat: FlatStep | None
    watched: bool  # whether callbacks may look at gradients
    # whether the host decides if an update is made: it reads its loss, which an accelerator would
    # have to be waited for
    on_host: bool
    # whether a gradient that comes in one piece is bounded, and its step made, in one launch
    launches: bool
    # where the host does not decide: whether the update at hand is to be made, and 1 where it is
    # to be skipped, else 0
    finite: Tensor | None = None
    bad: Tensor | None = None


class OuterStep:
    """Makes the updates of a net, and keeps what they need again and again.

    Parameters
    ----------
    on_host : bool
        Whether the parameters are on the host.
    """

    def __init__(self, on_host: bool) -> None:
        self.on_host = on_host
        # whether the optimiser has the state that a step leaves to the next
        self._has_stepped = on_host
        self._prepared: Prepared | None = None

    def _signature(self, net: Any, params: list[nn.Parameter]) -> list[Any]:
        return [len(net.optimizer_.state), *((p.data_ptr(), p.requires_grad) for p in params)]

    def prepare(self, net: Any) -> Prepared:
        """Look the parameters up, unless nothing has happened to them since the last time."""
        ready = self._prepared
        if ready is not None and ready.signature == self._signature(net, ready.params):
            return ready
        optimizer = net.optimizer_
        named = dict(net.module_.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        for p in named.values():
            p.grad = None  # the optimiser is to leave alone what a callback has frozen
        params, moving = list(named.values()), list(trainable.values())
        flat = None if ready is None else ready.flat
        if flat is not None and not flat.holds(optimizer, moving):
            flat.release()
            flat = None
        own_step = step_size(net) is not None
        fused = has_fused_kernel(optimizer)
        if fused and not own_step and not self.on_host and not optimizer.state:
            for p in moving:
                p.grad = torch.zeros_like(p)
            begin(optimizer)
            for p in moving:
                p.grad = None
        if flat is None and not own_step and FlatStep.can_make(optimizer, moving):
            flat = FlatStep(optimizer, moving)
        # only optimisers of others may evaluate the closure themselves
        needs_closure = not type(optimizer).__module__.startswith("torch.optim.")
        heard = net.listeners_
        listened = any(heard.of(net, name) for name in ("on_grad_computed", "on_batch_begin"))
        watched = listened or bool(heard.of(net, "on_batch_end"))
        # what schedules rates and what scores epochs looks at no batch
        looked_at = listened or heard.read_losses(net)
        maskable = (
            own_step
            or fused
            or (self._has_stepped and can_mask(optimizer, torch.device(net.device)))
        )
        on_host = self.on_host or needs_closure or looked_at or not maskable
        self._prepared = Prepared(
            params=params,
            signature=self._signature(net, params),
            meta_params=net.module_.meta_params(),
            trainable=trainable,
            needs_closure=needs_closure,
            fused=fused,
            flat=flat,
            watched=watched,
            on_host=on_host,
            launches=(
                not on_host and not watched and flat is not None and captures(flat.flat.device)
            ),
        )
        return self._prepared

    def look_again(self) -> None:
        """Look the parameters up at the next step."""
        if self._prepared is not None:
            self._prepared.signature = []

    def forget(self) -> None:
        """Forget what was prepared."""
        if self._prepared is not None and self._prepared.flat is not None:
            self._prepared.flat.release()
        self._prepared = None

    def project(self, net: Any) -> None:
        """Project the parameters, where the net asks for it."""
        if net.symmetric_head is not None:
            net.symmetric_head.project(self.prepare(net).trainable)

    def update(self, net: Any, batch: Any, with_closure: Callable[[], Any]) -> dict[str, Any]:
        """Make one meta-update; `with_closure` makes it where the optimiser takes a closure."""
        ready = self.prepare(net)
        size = step_size(net)
        step: dict[str, Any]
        if size is not None:
            step = self._compute(net, batch, ready)
            self._notify_grad(net, batch)
            self._step_by(net, size, ready.finite)
            return step
        if ready.needs_closure:
            step = with_closure()
            return step
        if ready.flat is None:
            step = self._compute(net, batch, ready)
            self._notify_grad(net, batch)
            if ready.fused:
                step_fused(net.optimizer_, ready.bad)
            elif ready.finite is not None:
                step_masked(net.optimizer_, ready.finite)
            else:
                net.optimizer_.step()
            # a skipped step leaves no state
            if not self._has_stepped and any(p.grad is not None for p in ready.trainable.values()):
                self._has_stepped, ready.signature = True, []
            return step
        step, grads = self.meta_gradient(net, batch, ready)
        grad = None if grads is None else grads[0]
        if ready.watched:
            ready.flat.show(grad)
            self._notify_grad(net, batch)
            changed = None if grad is None else ready.flat.seen(grad)
            if changed is None:
                self.forget()
                if ready.bad is None:
                    net.optimizer_.step()
                else:
                    step_fused(net.optimizer_, ready.bad)
            grad = changed
        if grad is not None:
            ready.flat.step(grad, ready.bad)
        return step

    def _step_by(self, net: Any, size: float, finite: Tensor | None) -> None:
        """Make a step of this size, and the optimiser's own for a Gaussian head."""
        with torch.no_grad():
            for name, p in net.module_.named_parameters():
                if p.grad is not None and not name.startswith("head."):
                    grad = p.grad if finite is None else torch.where(finite, p.grad, 0.0)
                    p.add_(grad, alpha=-size)
                    p.grad = None
        if net.joint is not None:
            net.optimizer_.step()

    def _notify_grad(self, net: Any, batch: Any) -> None:
        if net.listeners_.of(net, "on_grad_computed"):
            net.notify(
                "on_grad_computed",
                named_parameters=TeeGenerator(net.get_all_learnable_params()),
                batch=batch,
                training=True,
            )

    def compute(self, net: Any, batch: Any) -> dict[str, Any]:
        """Compute the meta-gradient of one meta-batch and store it for the optimiser."""
        return self._compute(net, batch, self.prepare(net))

    def _compute(self, net: Any, batch: Any, ready: Prepared) -> dict[str, Any]:
        step, grads = self.meta_gradient(net, batch, ready)
        for k, p in enumerate(ready.trainable.values()):
            # the optimiser leaves parameters without a gradient, and their state, as they are
            grad = None if grads is None else grads[k]
            if grad is not None and grad.stride() != p.stride():
                grad = torch.empty_like(p).copy_(grad)  # as the fused kernels take it to be
            p.grad = grad
        return step

    def meta_gradient(
        self, net: Any, batch: Any, ready: Prepared
    ) -> tuple[dict[str, Any], list[Tensor] | None]:
        """Loss and outputs of a meta-batch, and its gradients unless they are not finite.

        The gradients are those of the trainable parameters, or one vector for `FlatStep`; None if
        the step has been launched. Where the host does not decide, they are returned in any case,
        and `ready.finite` says whether they are.
        """
        episodes, device = batch[0], torch.device(net.device)
        if episodes.query.X.device != device:
            episodes = episodes.to(device)
        step = net.engine.meta_step(ready.meta_params, episodes, alpha=net.alpha, steps=net.steps)
        if net.joint is not None:
            gradient: list[Tensor] | None = net.parts_.gradient(net, step, episodes, ready)
            loss = step.losses.mean()
        else:
            loss, gradient = self._bounded(net, step, episodes, ready)
        return {"loss": loss, "y_pred": episodes.query.real(step.outputs)}, gradient

    def _bounded(
        self, net: Any, step: Any, episodes: EpisodeBatch, ready: Prepared
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Loss and gradients of a meta-step as `meta_gradient` returns them."""
        if net.symmetric_head is not None:
            in_one_piece = getattr(step, "flat", None) is not None
            net.symmetric_head.project_gradient(step.grads, in_place=in_one_piece)
        grads = [step.grads[name] for name in ready.trainable]
        # an engine may offer its gradients in one piece too, in the order of `grads`
        whole = getattr(step, "flat", None)
        if whole is not None and list(step.grads) != list(ready.trainable):
            whole = None
        if whole is not None and ready.launches and ready.flat is not None:
            decay_rate(net)
            net.update_ += 1
            return ready.flat.launch(step.losses, whole, net.max_grad_norm), None
        loss = step.losses.mean()
        if whole is None and ready.flat is not None:
            whole = torch.cat([grad.flatten() for grad in grads])
        if whole is not None:
            length = torch.linalg.vector_norm(whole)
        else:
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        pieces = grads if whole is None else [whole]
        gradient: list[Tensor] | None = pieces if ready.flat is not None else grads
        decay_rate(net)
        net.update_ += 1
        if ready.on_host:
            norm = length.item()
            made = math.isfinite(loss.item()) and math.isfinite(norm)
            if made and net.max_grad_norm is not None and norm > net.max_grad_norm:
                torch._foreach_mul_(pieces, net.max_grad_norm / norm)
            current_row(net)["non_finite"] = int(not made)
            if not made:
                note_non_finite(net, episodes, net.update_)
                loss, gradient = torch.full_like(loss, math.nan), None
        else:
            ready.finite = finite = torch.isfinite(loss) & torch.isfinite(length)
            ready.bad = 1.0 - finite.float()
            if net.max_grad_norm is not None:
                torch._foreach_mul_(pieces, (net.max_grad_norm / length).clamp(max=1.0))
            loss = torch.where(finite, loss, math.nan)
        return loss, gradient
