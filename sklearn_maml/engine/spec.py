"""What is asked of an engine, what one call asks, and what it gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.engine.architecture import (
    has_dropout,
    is_row_wise,
    is_spatial,
    is_stackable,
    private_copy,
)
from sklearn_maml.engine.forward import ModuleForward
from sklearn_maml.meta_gradients import MetaGradient
from sklearn_maml.native import Layout, describe
from sklearn_maml.theta import Params, Parts
from sklearn_maml.update_rules import TaskSolver

Buffers = dict[str, Tensor]


class Spec:
    """What is asked of an engine.

    Parameters
    ----------
    module : Module
    row_loss : callable (output, y) -> losses of the rows
    rule : TaskSolver
    meta_gradient : MetaGradient
    adapted : sequence of str
        Names of the parameters that adapt.
    checkpoint_steps : bool, default=False
        Whether second-order meta-gradients compute the graph of each inner step anew.
    precision : {"full", "tf32", "bf16"}, default="full"
        Numbers of the layers' matrix products.
    batch_norm : {"inductive", "transductive"}, default="inductive"
        Statistics that batch norm normalises query rows with, in meta-training and predictions:
        those of the task's support set, or those of its query rows.

    Attributes
    ----------
    module : Module
        A copy for the engine's own use, which shares the parameters.
    parts : Parts
    pads : bool
        Whether rows of padding are harmless.
    norms : list of str
        Names of the batch-norm layers.
    head : str or None
        Name of the layer that the rule solves for, if it does.
    random : bool
        Whether the module may draw random numbers.
    size : int
        Numbers in its parameters.
    is_spatial : bool
        Whether it has convolutions.
    predicts_singly : bool
        Whether predictions have been found not to be possible for a batch with torch.vmap.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        row_loss: Callable[[Tensor, Tensor], Tensor],
        rule: TaskSolver,
        meta_gradient: MetaGradient,
        adapted: Sequence[str],
        checkpoint_steps: bool = False,
        precision: str = "full",
        batch_norm: str = "inductive",
    ) -> None:
        self.pads = is_row_wise(module)
        self.module = private_copy(module, plain=self.pads)
        self.row_loss = row_loss
        self.rule = rule
        self.meta_gradient = meta_gradient
        self.checkpoint_steps = checkpoint_steps
        self.precision = precision
        self.batch_norm = check_batch_norm(batch_norm)
        self.size = sum(p.numel() for p in module.parameters())
        self.is_spatial = is_spatial(module)
        self.random = not self.pads or has_dropout(module)
        self.predicts_singly = False
        self.norms = [n for n, m in self.module.named_modules() if isinstance(m, _BatchNorm)]
        frozen = {n: p.detach() for n, p in self.module.named_parameters() if not p.requires_grad}
        self.parts = Parts(frozenset(adapted), frozen)
        rule.check_with(meta_gradient)
        # of a step that is computed again only the derivative of plain support losses is known
        if (
            checkpoint_steps
            and meta_gradient.order == 2
            and (meta_gradient.proximal or meta_gradient.in_minibatches)
        ):
            raise ValueError(
                f"engine__checkpoint_steps=True cannot compute the steps of {meta_gradient!r} "
                "again: it is for inner steps on the support loss alone, without a proximal term "
                "and without minibatches. Use engine__checkpoint_steps=False."
            )
        self.head = rule.layer(self.module, self.parts.adapted)

    def __getstate__(self) -> dict[str, Any]:
        # what is made when first asked for comes along: predictions do not change what is pickled
        assert self.forward is not None
        return dict(vars(self))

    @functools.cached_property
    def forward(self) -> ModuleForward:
        """The module as it is, with batch norms that take statistics of the support set.

        They are put into `module` when this is first asked for.
        """
        forward = ModuleForward(
            self.module, self.precision, uses_support=self.uses_support, head=self.head
        )
        self.module = forward.module
        return forward

    @property
    def attends(self) -> bool:
        """Whether the module is run with the kernels of attention that have second derivatives."""
        return "forward" in vars(self) and self.forward.attends

    def attend(self) -> bool:
        """Run it with these from now on; return whether that changes anything."""
        changes = "forward" in vars(self) and not self.forward.attends
        if changes:
            self.forward.attends = True
        return changes

    @property
    def own_norms(self) -> list[str]:
        """Names of batch-norm layers that cannot be given the statistics of the support set."""
        return self.forward.own_norms if "forward" in vars(self) else []

    @functools.cached_property
    def is_stackable(self) -> bool:
        """Whether the forward pass can be written out for all tasks."""
        return is_stackable(self.module)

    @functools.cached_property
    def layout(self) -> Layout | None:
        """The module as the compiled kernels see it; None: it is none for them."""
        return describe(self.module) if self.is_stackable else None

    @property
    def uses_support(self) -> bool:
        """Whether query rows are normalised with the statistics of the support set."""
        return bool(self.norms) and self.batch_norm == "inductive"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def on_cpu(self) -> bool:
        """Whether the parameters are on the CPU."""
        return self.device.type == "cpu"


def check_batch_norm(value: str) -> str:
    """Refuse what `batch_norm` does not know."""
    if value not in ("inductive", "transductive"):
        raise ValueError(
            f"engine__batch_norm={value!r} is not known. Expected 'inductive' (query rows are "
            "normalised with the statistics of the support set) or 'transductive' (with their own)."
        )
    return value


@dataclasses.dataclass(slots=True)
class Step:
    """What one call asks."""

    alpha: float
    steps: int
    parts: Parts
    phase: Hashable = 0  # of the meta-gradient, see `MetaGradient.phase`; 0 for adapting
    update: int = 0  # meta-updates made before
    others: int = 0  # of the updates to come, those at the end that are in another phase


@dataclasses.dataclass
class MetaStep:
    """Outcome of a meta-step: query loss of each task, mean gradient, outputs on query rows.

    `flat` is the one tensor that the gradients are views of, if they are.
    """

    losses: Tensor
    grads: Params
    outputs: Tensor
    flat: Tensor | None = None


@dataclasses.dataclass
class AdaptedParams:
    """Parameters adapted to each of n tasks."""

    params: Params  # of shape (n_tasks, ...)
    shared: Params  # those that do not adapt
    statistics: Buffers  # (n_tasks, n_channels), of batch norm on each support set

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(next(iter(self.params.values())))

    def take(self, tasks: np.ndarray) -> AdaptedParams:
        """Parameters of some of the tasks, in this order."""
        first, last = int(tasks[0]), int(tasks[-1])
        in_a_row = len(tasks) == last - first + 1 and (np.diff(tasks) == 1).all()
        index: slice | Tensor = slice(first, last + 1)
        if not in_a_row:
            index = torch.as_tensor(tasks, device=next(iter(self.params.values())).device)
        params, statistics = (
            {name: t[index] for name, t in part.items()} for part in (self.params, self.statistics)
        )
        return AdaptedParams(params, self.shared, statistics)

    def task(self, j: int) -> tuple[Params, Buffers]:
        """All parameters, and the statistics, of one task."""
        own = {name: p[j] for name, p in self.params.items()}
        return {**self.shared, **own}, {name: s[j] for name, s in self.statistics.items()}
