"""Multilayer perceptrons on the CPU: compiled kernels with a hand-derived reverse sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.rungs.base import CannotClimbError, Outlook, Rung, warn_once
from sklearn_maml.engine.rungs.stacked import Stacked
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.meta_gradients import FirstOrder, SecondOrder
from sklearn_maml.native import Kernel, NativeUnavailableError, said_without
from sklearn_maml.targets.losses import (
    AbsoluteError,
    BinaryCrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
    cross_entropy_rows,
    squared_error_rows,
)
from sklearn_maml.theta import Params, Theta, name_in_module, name_in_rule
from sklearn_maml.threads import n_threads_asked
from sklearn_maml.update_rules import has_linear_rates, norm_of_steps

# losses that the kernels have derivatives of, in the order of `LossOfRow` of mlp.cpp
LOSSES: tuple[Any, ...] = (
    squared_error_rows,
    cross_entropy_rows,
    AbsoluteError.rows,
    Huber.rows,
    Quantile.rows,
    Poisson.rows,
    Gamma.rows,
    BinaryCrossEntropy.rows,
)


def _loss_of_kernels(row_loss: Any) -> tuple[int, float] | None:
    """Which of `LOSSES` a loss of rows is, and its parameter; None: another."""
    function = getattr(row_loss, "__func__", row_loss)  # of a method: what it is of any object
    if function not in LOSSES:
        return None
    values = [] if function is row_loss else [*row_loss.__self__.get_params().values()]
    return LOSSES.index(function), float(values[0]) if values else 0.0


class Native(Rung):
    """The compiled kernels, which take one task after another."""

    name = "native"
    tasks_at_a_time = 4096
    one_by_one = True
    ready = False
    climbs_from: ClassVar[tuple[type[Rung], ...]] = (Stacked,)

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        super().__init__(spec, below)
        assert spec.layout is not None
        self.layout = spec.layout
        self._n_threads = n_threads_asked()
        self._climbs_at: int | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": None, "_rates": None, "_parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._n_threads = n_threads_asked()
        if self.ready:
            self.ready = False
            try:
                self.climb()
            except CannotClimbError as error:
                warn_once(str(error))

    def _forget(self) -> None:
        self._kernel: Kernel | None = None
        self._rates: tuple[float, list[Params]] | None = None
        # the meta-parameters of the last step, parted: mostly the same ones come again
        self._parts: tuple[list[int], Theta, dict[str, str]] | None = None

    @classmethod
    def refuses(cls, spec: Spec) -> str | None:
        """See `Rung`."""
        covered = (
            _loss_of_kernels(spec.row_loss) is not None
            and type(spec.meta_gradient) in (SecondOrder, FirstOrder)
            and has_linear_rates(spec.rule)
            and next(spec.module.parameters()).dtype in (torch.float32, torch.float64)
            and spec.precision != "bf16"
            and spec.layout is not None
        )
        if covered:
            params = {n: p.detach() for n, p in spec.module.named_parameters()}
            params = {n: p for n, p in params.items() if n in spec.parts.adapted}
            learned = spec.rule.initial_rates(params)
            if spec.rule.linear_rates(params, alpha=1.0, rates=learned) is not None:
                return None
        return "The compiled kernels do not cover this module, rule or gradient."

    def takes(self, step: Step, *sets: Rows) -> bool:
        """See `Rung`."""
        return step.phase is not None and self.kernel.takes(*sets)

    def predicts(self, query: Rows) -> bool:
        """See `Rung`."""
        return self.kernel.takes_inputs(query.X)

    @property
    def kernel(self) -> Kernel:
        """The kernels, once they are climbed to."""
        assert self._kernel is not None
        return self._kernel

    # -- climbing --------------------------------------------------------------------------------

    def expect(self, first_update: int, n_updates: int, outlook: Outlook) -> bool:
        """Climb with the first update, or when a phase that the kernels do not cover is over."""
        if not self.spec.on_cpu:
            return False
        if not self.ready:
            phase, end = self.spec.meta_gradient.phase(first_update)
            self._climbs_at = end if phase is None and end is not None else first_update
        return True

    def due(self, update: int) -> bool:
        """See `Rung`."""
        return not self.ready and self._climbs_at is not None and update >= self._climbs_at

    def repays(self, n_tasks: int, n_rows: int, steps: int) -> bool:
        """See `Rung`."""
        return self.spec.on_cpu

    def climb(self) -> None:
        """See `Rung`."""
        known = _loss_of_kernels(self.spec.row_loss)
        assert known is not None
        integers = self.spec.row_loss is cross_entropy_rows
        dtype = next(self.spec.module.parameters()).dtype
        try:
            norm = norm_of_steps(self.spec.rule)
            self._kernel = Kernel(self.layout, *known, integers, norm, dtype, self._n_threads)
        except NativeUnavailableError as error:
            raise CannotClimbError(said_without(error)) from error
        self.ready = True

    # -- calls -----------------------------------------------------------------------------------

    def _linear_rates(self, theta: Theta, alpha: float) -> list[Params]:
        rates = self.spec.rule.linear_rates(theta.fast, alpha=alpha, rates=theta.learned)
        assert rates is not None
        return rates

    def _rates_of_a_fit(self, theta: Theta, alpha: float) -> list[Params]:
        """Rates that come again in the next meta-step, if they are not learned, and so are kept.

        Those of `adapt` are not: they are as large as the parameters, and a model has many copies.
        """
        kept = self._rates  # read once: other threads may come in between
        if theta.learned:
            return self._linear_rates(theta, alpha)
        if kept is None or kept[0] != alpha:
            self._rates = kept = (alpha, self._linear_rates(theta, alpha))
        return kept[1]

    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """See `Rung`."""
        these = [*map(id, meta_params.values())]
        parts = self._parts  # read once: other threads may come in between
        if parts is None or parts[0] != these:
            named = {name_in_module(name): name for name in self.layout.tensors if name}
            self._parts = parts = (
                these,
                step.parts.part(meta_params),
                {name: named[name] for name in meta_params if name in named},
            )
        _, theta, names = parts
        leaves = {name: r.detach().requires_grad_() for name, r in theta.learned.items()}
        with torch.enable_grad() if leaves else contextlib.nullcontext():
            rates = self._rates_of_a_fit(Theta(theta.fast, theta.shared, leaves), step.alpha)
        losses, outputs, flat, by_rates = self.kernel.meta_step(
            {**theta.shared, **theta.fast},
            [{name: r.detach() for name, r in part.items()} for part in rates] if leaves else rates,
            batch.support,
            batch.query,
            steps=step.steps,
            second_order=step.phase == 2,
            rate_grads=bool(leaves),
            recompute=self.spec.checkpoint_steps,
        )
        views = self.kernel.views(flat)
        grads = {name: views[own] for name, own in names.items()}
        if leaves:
            pairs = [
                (r, by[name])
                for part, by in zip(rates, by_rates, strict=True)
                for name, r in part.items()
                if r.requires_grad
            ]
            by_leaf = torch.autograd.grad(
                [r for r, _ in pairs],
                list(leaves.values()),
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            grads |= {name_in_rule(n): g for n, g in zip(leaves, by_leaf, strict=True)}
        whole = len(grads) == len(views) and not leaves
        return MetaStep(losses, grads, outputs, flat if whole else None)

    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """See `Rung`."""
        return self.kernel.adapt(
            {**theta.shared, **theta.fast},
            self._linear_rates(theta, step.alpha),
            support,
            steps=step.steps,
            adapted=list(theta.fast),
        )

    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """See `Rung`."""
        return self.kernel.predict(adapted.params, adapted.shared, query)
