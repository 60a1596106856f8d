"""Small convolutional networks, see `conv.layers`: all tasks stacked, a few at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import Rows
from sklearn_maml.engine.architecture import ELEMENTWISE, has_dropout, mixes_rows
from sklearn_maml.engine.conv.layers import (
    ConvAutograd,
    Layer,
    Pass,
    conv_forward,
    gradient_now,
    is_conv_net,
    keep_memory,
    tasks_at_a_time,
)
from sklearn_maml.engine.conv.products import Summation
from sklearn_maml.engine.pieces import chunks, equal_shapes, sets_of
from sklearn_maml.engine.rungs.base import Rung
from sklearn_maml.engine.rungs.stacked import Stacked, StackedForward
from sklearn_maml.engine.spec import Spec
from sklearn_maml.inner import Autograd
from sklearn_maml.inner.problem import LossOfQuery
from sklearn_maml.meta_gradients import FirstOrder, Implicit, SecondOrder
from sklearn_maml.theta import Params
from sklearn_maml.threads import side_by_side


@dataclasses.dataclass(frozen=True)
class ConvForward(StackedForward):
    """Runs a convolutional net for `n_tasks` tasks."""

    module: nn.Module = dataclasses.field(default_factory=nn.Identity)
    # whether the query loss may hold activations of a few tasks only, and be differentiated once
    in_pieces: bool = False

    def over_tasks(
        self, loss: LossOfQuery, params: Params, support: Rows, query: Rows
    ) -> tuple[Tensor, Any]:
        """See `Forward`."""
        if not self.in_pieces:
            return super().over_tasks(loss, params, support, query)
        once = dataclasses.replace(self, how=dataclasses.replace(self.how, once=True))
        n_more = support.X.shape[1] if self.uses_support else 0
        total, parts = gradient_now(
            lambda own, tasks: loss(once, own, _some(support, tasks), _some(query, tasks)),
            params,
            len(query),
            tasks_at_a_time(self.module, query.X, n_more),
            self.how.sums,
        )
        losses, outputs = (torch.cat(part) for part in zip(*parts, strict=True))
        return total, (losses, outputs)


def _some(rows: Rows, tasks: slice) -> Rows:
    """Rows of consecutive tasks, without a copy."""
    return Rows(rows.X[tasks], rows.y[tasks], None if rows.weight is None else rows.weight[tasks])


class Conv(Stacked):
    """Sequences with 2-D convolutions."""

    name = "stacked"
    gains_by_record = False

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        # it takes everything, and its own layers have no other batch norm
        super().__init__(spec, lambda: None)
        self.joins_rows = mixes_rows(spec.module)
        # layers of users may keep what they compute, and random numbers would come in any order
        self.in_threads = spec.on_cpu and not (self.joins_rows or has_dropout(spec.module))

    @classmethod
    def refuses(cls, spec: Spec) -> str | None:
        """See `Rung`."""
        if not spec.is_stackable or not is_conv_net(spec.module):
            return "the module is no sequence with convolutions whose layers are known"
        return None

    @property
    def recorded(self) -> Stacked:
        """Nothing else."""
        return self

    def layers(self, module: nn.Module) -> Layer:
        """See `Stacked`."""
        if not is_conv_net(module):  # a body that has no convolutions
            return super().layers(module)
        return conv_forward(module, ELEMENTWISE)

    def forward(self, n_tasks: int) -> StackedForward:
        """See `Stacked`."""
        # meta-gradients of users may differentiate the query loss twice
        in_pieces = type(self.spec.meta_gradient) in (SecondOrder, FirstOrder, Implicit)
        return ConvForward(
            n_tasks,
            self.net,
            self.body,
            self.spec.uses_support,
            self._pass(),
            self.spec.module,
            in_pieces,
        )

    def _pass(self) -> Pass:
        return Pass(Summation(rounds=self.spec.precision == "bf16"))

    def differentiator(self, forward: StackedForward) -> Autograd:
        """See `Stacked`."""
        return ConvAutograd(forward.how.sums)

    def pieces(self, batch: Any) -> list[np.ndarray] | None:
        """Run some tasks together, of equal shapes where rows of padding would do harm."""
        if self.spec.on_cpu:
            keep_memory()
        size = tasks_at_a_time(self.spec.module, sets_of(batch)[0].X)
        alike = None if self.spec.pads else equal_shapes(batch)
        groups = [np.arange(len(batch))] if alike is None else alike
        return [group[part] for group in groups for part in chunks(len(group), size)]

    def run(self, params: Params, X: Tensor) -> Tensor:
        """See `Stacked`."""
        size = tasks_at_a_time(self.spec.module, X)

        def run(start: int) -> Tensor:
            own = slice(start, start + size)
            return self.net({n: p[own] for n, p in params.items()}, X[own], self._pass())

        starts = range(0, len(X), size)
        return torch.cat(side_by_side(run, starts) if self.in_threads else [*map(run, starts)])
