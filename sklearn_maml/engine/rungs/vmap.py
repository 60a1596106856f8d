"""Any module that `torch.func` can transform: ``vmap(grad(...))`` over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.forward import for_prediction
from sklearn_maml.engine.pieces import equal_shapes
from sklearn_maml.engine.rungs.base import Rung, warn_once
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.engine.tracing.recording import first_line
from sklearn_maml.inner import Functorch
from sklearn_maml.theta import Params, Theta


class Vmap(Rung):
    """All tasks at once."""

    name = "vmap"
    safe = False

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        super().__init__(spec, below)
        self.forward = spec.forward

    def takes(self, step: Step, *sets: Rows) -> bool:
        """For one task vmap costs more than it saves."""
        return len(sets[0]) > 1

    def predicts(self, query: Rows) -> bool:
        """See `Rung`."""
        # attention takes a fast path in evaluation that vmap cannot batch
        one_by_one = self.spec.attends or self.spec.predicts_singly or len(query) == 1
        return not one_by_one and (self.spec.pads or query.lengths is None)

    def pieces(self, batch: Any) -> list[np.ndarray] | None:
        """Tasks of equal shapes together, where rows of padding would do harm."""
        return None if self.spec.pads else equal_shapes(batch)

    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """See `Rung`."""

        def one_task(params: Params, support: tuple[Any, ...], query: tuple[Any, ...]) -> Any:
            sets = Rows(*support), Rows(*query)
            problem = self.problem(step, self.forward, Functorch(), *sets)
            grads, (_, aux) = self.spec.meta_gradient.loss_and_grad(params, problem)
            return grads, aux

        sets, in_dims = zip(*map(_tensors, (batch.support, batch.query)), strict=True)
        params, axis = self.forward.for_vmap(meta_params, len(batch))
        grads, (losses, outputs) = torch.func.vmap(
            one_task, in_dims=(axis, *in_dims), randomness="different"
        )(params, *sets)
        return MetaStep(losses, {n: g.mean(0) for n, g in grads.items()}, outputs)

    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """See `Rung`."""

        def one_task(fast: Params, shared: Params, rows: tuple[Any, ...]) -> Params:
            problem = self.problem(step, self.forward, Functorch(), Rows(*rows))
            return problem.adapt_from(Theta(fast, shared, theta.learned), 0)

        rows, in_dim = _tensors(support)
        fast, axis = self.forward.for_vmap(theta.fast, len(support))
        shared, _ = self.forward.for_vmap(theta.shared, len(support))
        return torch.func.vmap(one_task, in_dims=(axis, axis, in_dim), randomness="different")(
            fast, shared, rows
        )

    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """See `Rung`."""
        module = for_prediction(self.spec.module, bool(adapted.statistics))
        shared, axis = self.forward.for_vmap(adapted.shared, len(query))
        try:
            with torch.no_grad():
                outputs: Tensor = torch.func.vmap(
                    lambda s, p, b, x: self.forward.run(module, {**s, **p, **b}, x),
                    in_dims=(axis, 0, 0, 0),
                    randomness="different",
                )(shared, adapted.params, adapted.statistics, query.X)
        except RuntimeError as error:
            assert self.below is not None
            outputs = self.below.outputs(adapted, query)
            # not before the loop has shown that it works; meta-steps may be batched yet
            self.spec.predicts_singly = True
            warn_once(
                f"{type(self.spec.module).__name__} cannot predict for a batch of tasks with "
                "torch.vmap, so tasks are predicted one after another, with the same "
                f"results. Reason: {first_line(error)}"
            )
        return outputs


def _tensors(rows: Rows) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Tensors of rows, and their task axes."""
    return (rows.X, rows.y, rows.weight), (0, 0, None if rows.weight is None else 0)
