"""Long fits: the step of the rung below, recorded once and run as a flat graph."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.architecture import has_dropout
from sklearn_maml.engine.rungs.base import Outlook, Rung
from sklearn_maml.engine.rungs.conv import Conv
from sklearn_maml.engine.rungs.stacked import Stacked
from sklearn_maml.engine.rungs.vmap import Vmap
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.engine.tracing.graphs import captures, module_key, settings_key
from sklearn_maml.engine.tracing.recording import Untraceable
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.theta import Params, Theta


class Traced(Rung):
    """Records and captures steps, after they have been found to give the same numbers.

    Attributes
    ----------
    tracer : Tracer
        What is traced, or why nothing is.
    """

    name = "traced"
    is_wrapper = True
    climbs_from: ClassVar[tuple[type[Rung], ...]] = (Conv, Stacked, Vmap)

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        super().__init__(spec, below)
        under = below()
        assert under is not None
        self.under = under
        self.below = self.under
        self.tracer = Tracer()
        self._traces = False

    @property
    def safe(self) -> bool:  # type: ignore[override]
        """As the rung below."""
        return self.under.safe

    def takes(self, step: Step, *sets: Rows) -> bool:
        """See `Rung`."""
        return self._traces and self.under.takes(step, *sets)

    def predicts(self, query: Rows) -> bool:
        """See `Rung`: nothing is gained."""
        return False

    def pieces(self, batch: Any) -> list[np.ndarray] | None:
        """As the rung below."""
        return self.under.pieces(batch)

    def expect(self, first_update: int, n_updates: int, outlook: Outlook) -> bool:
        """See `Rung`."""
        device = self.spec.device
        gains = self.under.gains_by_record or (
            device.type != "cpu" and not has_dropout(self.spec.module) and captures(device)
        )
        self.tracer.updates_left = n_updates if gains else 0
        return False

    def climb(self) -> None:
        """Record whatever comes, at once."""
        self.tracer.min_updates, self.tracer.min_seen = 0, 1

    def begin(self, step: Step) -> None:
        """See `Rung`."""
        self._traces = self.tracer.begin_update(step.others) and step.phase is not None

    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """See `Rung`."""
        spec, source = self.spec, self.under.recorded
        fixed = {**step.parts.frozen, **dict(spec.module.named_buffers())}
        sets = [t for rows in (batch.support, batch.query) for t in (rows.X, rows.y, rows.weight)]
        given = [t for t in sets if t is not None]
        shape = (
            step.alpha,
            step.steps,
            spec.attends,
            spec.precision,
            spec.batch_norm,
            step.phase,
            *(t if t is None else (t.shape, t.dtype) for t in sets),
        )

        def function(*tensors: Tensor) -> list[Tensor]:
            values = iter(tensors)
            params = {name: next(values) for name in meta_params}
            # frozen parameters and buffers are arguments too: their values differ between fits
            frozen = {name: next(values) for name in fixed}
            rows: list[Any] = [None if t is None else next(values) for t in sets]
            episodes = EpisodeBatch(Rows(*rows[:3]), Rows(*rows[3:]))
            parts = dataclasses.replace(step.parts, frozen=frozen)
            done = source.meta_step(params, episodes, dataclasses.replace(step, parts=parts))
            return [done.losses, done.outputs, *(done.grads[name] for name in meta_params)]

        def settings() -> Hashable:
            objects = (spec.rule, spec.meta_gradient)
            return (
                *shape, tuple(meta_params), tuple(fixed), step.parts.adapted, spec.row_loss,
                *(settings_key([type(o), vars(o)]) for o in objects),
                module_key(spec.module),
            )  # fmt: skip

        inputs = [*meta_params.values(), *fixed.values(), *given]
        try:
            outputs = self.tracer.run(
                function,
                inputs,
                shape=shape,
                settings=settings,
                recorded=self.under.gains_by_record,
            )
        except Untraceable as error:
            reason, outputs = error.args
            warnings.warn(
                f"The meta-steps of {type(spec.module).__name__} cannot be traced, so they run "
                f"untraced, slower and with the same results. Reason: {reason}",
                EngineFallbackWarning,
                stacklevel=2,
            )
        if outputs is None:
            return self.under.meta_step(meta_params, batch, step)
        losses, output, *grads = outputs
        flat = getattr(outputs, "whole", None)
        if flat is not None:
            flat = flat[losses.numel() + output.numel() :]
        return MetaStep(losses, dict(zip(meta_params, grads, strict=True)), output, flat)

    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """See `Rung`: nothing is gained."""
        return self.under.adapt(theta, support, step)

    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """See `Rung`: nothing is gained."""
        return self.under.outputs(adapted, query)
