"""Meta-steps of a Gaussian head on an accelerator, where their kernels take less than launching."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine import MetaStep
from sklearn_maml.engine.tracing.graphs import captures
from sklearn_maml.engine.tracing.recording import Untraceable
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.theta import Params

# more visits to a shape of episodes that make up for capturing its step: that takes six steps
LEAST_VISITS = 8


class LaunchedSteps:
    """Captures the steps of episodes whose shape comes often, and launches them at once.

    Parameters
    ----------
    head : GaussianHead
    weighted : bool
        Whether rows have weights: then their number counts, which the host knows.

    Attributes
    ----------
    tracer : Tracer
    """

    def __init__(self, head: GaussianHead, weighted: bool) -> None:
        # modules of users may draw random numbers and keep averages
        may = captures(head.factor.device) and type(head.body) is MLPBody
        self._may = may and not weighted
        self.tracer = Tracer(LEAST_VISITS, 2)

    def expect(self, n_updates: int) -> None:
        """Expect as many meta-updates."""
        self.tracer.updates_left = n_updates if self._may else 0

    def meta_step(
        self,
        step: Callable[[Params, EpisodeBatch], MetaStep],
        meta_params: Params,
        batch: EpisodeBatch,
    ) -> MetaStep:
        """Return ``step(meta_params, batch)``."""
        if not self._may or not self.tracer.begin_update():
            return step(meta_params, batch)
        names = [*meta_params]
        sets = [
            part
            for rows in (batch.support, batch.query)
            for part in (rows.X, rows.y, rows.weight, rows.index)
        ]

        def function(*tensors: Tensor) -> list[Tensor]:
            values = iter(tensors)
            params = {name: next(values) for name in names}
            parts: list[Any] = [None if t is None else next(values) for t in sets]
            support, query = (
                Rows(X, y, weight, index=index) for X, y, weight, index in (parts[:4], parts[4:])
            )
            done = step(params, EpisodeBatch(support, query, n_given=batch.n_given))
            return [done.losses, done.outputs, *(done.grads[name] for name in names)]

        shape = (batch.n_given, *(t if t is None else (t.shape, t.dtype) for t in sets))
        inputs = [*meta_params.values(), *(t for t in sets if t is not None)]
        try:
            outputs = self.tracer.run(
                function, inputs, shape=shape, settings=lambda: None, recorded=False
            )
        except Untraceable as error:
            reason, outputs = error.args
            warnings.warn(
                "The meta-steps of the Gaussian head cannot be captured as a CUDA graph, so they "
                f"are slower, with the same results. Reason: {reason}",
                EngineFallbackWarning,
                stacklevel=2,
            )
        if outputs is None:
            return step(meta_params, batch)
        losses, output, *grads = outputs
        return MetaStep(losses, dict(zip(names, grads, strict=True)), output)
