"""One task after another with plain autograd; runs every module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.forward import for_prediction
from sklearn_maml.engine.rungs.base import Rung
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.inner import Autograd
from sklearn_maml.theta import Params, Theta


class Loop(Rung):
    """The plain loop over tasks, on which all other rungs are judged."""

    name = "loop"

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        super().__init__(spec, below)
        self.forward = spec.forward

    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """See `Rung`."""
        total: Params = {}
        losses, outputs = [], []
        width = batch.query.X.shape[1]
        for j in range(len(batch)):
            sets = batch.support.task(j), batch.query.task(j)
            problem = self.problem(step, self.forward, Autograd(), *sets)
            gradient = self.spec.meta_gradient
            grads, (_, (loss, output)) = gradient.loss_and_grad(meta_params, problem)
            total = {n: g + total[n] for n, g in grads.items()} if total else grads
            losses.append(loss)
            outputs.append(functional.pad(output, (0, 0, 0, width - output.shape[0])))
        mean = {n: g / len(batch) for n, g in total.items()}
        return MetaStep(torch.stack(losses), mean, torch.stack(outputs))

    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """See `Rung`."""
        tasks = [
            self.problem(step, self.forward, Autograd(), support.task(j)).adapt_from(theta, 0)
            for j in range(len(support))
        ]
        return {name: torch.stack([task[name] for task in tasks]) for name in theta.fast}

    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """See `Rung`."""
        module = for_prediction(self.spec.module, bool(adapted.statistics))
        width = query.X.shape[1]
        outputs = []
        with torch.no_grad():
            for j in range(len(query)):
                params, statistics = adapted.task(j)
                out = self.forward.run(module, {**params, **statistics}, query.task(j).X)
                outputs.append(
                    functional.pad(out.movedim(0, -1), (0, width - out.shape[0])).movedim(-1, 0)
                )
        return torch.stack(outputs)
