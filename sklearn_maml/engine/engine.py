"""The engine: runs the inner loop over a batch of tasks.

`Spec` is what is asked, a `Rung` a way to run it, and the `Ladder` picks among the rungs. All of
them give the same numbers, in float64 to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.batch_norm import explaining_one_value, support_statistics
from sklearn_maml.engine.forward import for_prediction, tf32
from sklearn_maml.engine.ladder import Ladder, begin_with
from sklearn_maml.engine.outer import MetaSteps
from sklearn_maml.engine.pieces import (
    Memory,
    chunks,
    equal_shapes,
    join_outputs,
    join_params,
    join_steps,
)
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step, check_batch_norm
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.inner import fit_outputs, mean_loss
from sklearn_maml.meta_gradients import SecondOrder, prepares_positions
from sklearn_maml.theta import Params
from sklearn_maml.threads import several_threads, threads_for
from sklearn_maml.update_rules import SGD

# parameters of held-out tasks that are in memory at a time, and as many tasks at least
EVALUATED_NUMBERS, LEAST_EVALUATED = 2**19, 32


class Engine(MetaSteps):
    """Meta-gradients, adaptation and prediction for batches of tasks.

    Parameters
    ----------
    module : Module
        Its structure is copied; parameters are always passed as dicts.
    rung : {"auto", "loop", "vmap", "stacked", "traced", "native"}
        How tasks are batched. "auto" starts on the fastest that works at once, and climbs to
        "native" where fits and calls are announced (see `expect`), and to "traced" where the
        updates to come repay it. Asked for by name, both are ready from the start.
    max_tasks_in_memory : int or None
        Largest number of tasks that `meta_step` and `evaluate` run at once; the compiled kernels
        run one at a time (and thread) anyway.
    **asked : dict
        What is asked of it, see `Spec`.

    Attributes
    ----------
    spec : Spec
    ladder : Ladder
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rung: str = "auto",
        max_tasks_in_memory: int | None = None,
        **asked: Any,
    ) -> None:
        self.spec = Spec(module, **asked)
        self.ladder = Ladder(self.spec, rung)
        self.memory = Memory(max_tasks_in_memory)
        self._warns_of = [*self.spec.own_norms]

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The engine's copy of the module."""
        return self.spec.module

    @property
    def rung(self) -> str:
        """Name of the rung in use."""
        return self.ladder.rung

    @property
    def is_shareable(self) -> bool:
        """Whether any number of threads may adapt and predict with it at the same time.

        A rung that runs tasks itself leaves the module alone.
        """
        return self.ladder.top.one_by_one and self.ladder.top.ready

    @property
    def fallback_reason(self) -> str | None:
        """Why tasks run one after another."""
        return self.ladder.fallback_reason

    @property
    def tracer(self) -> Tracer:
        """What is traced, or why nothing is."""
        return self.ladder.tracer

    # -- before, between and after calls -----------------------------------------------------------

    def expect(self, first_update: int, n_updates: int, **outlook: int) -> None:
        """Prepare for meta-steps to come: climb where enough of them are; see `Rung.expect`."""
        self.ladder.expect(first_update, n_updates, outlook)

    def preparation(self, steps: int) -> Callable[[EpisodeBatch], EpisodeBatch] | None:
        """See `MetaSteps`."""
        if not prepares_positions(self.spec.meta_gradient):
            return None
        return functools.partial(self.spec.meta_gradient.episodes, steps=steps)

    def finish(self) -> None:
        """See `MetaSteps`."""
        self.tracer.finish()

    def progress(self) -> dict[str, Any]:
        """See `MetaSteps`."""
        return {
            **super().progress(),
            **self.ladder.progress(),
            "max_tasks_in_memory": self.memory.most,
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """See `MetaSteps`."""
        super().resume(progress)
        self.ladder.resume(progress)
        self.memory.most = progress["max_tasks_in_memory"]

    def prediction_state(self) -> dict[str, Any]:
        """Return what predictions with adapted parameters depend on, for `for_prediction`."""
        return {
            **self.ladder.findings(),
            "precision": self.spec.precision,
            "batch_norm": self.spec.batch_norm,
            "max_tasks_in_memory": self.memory.most,
        }

    @classmethod
    def for_prediction(
        cls, module: nn.Module, row_loss: Any, adapted: Sequence[str], state: dict[str, Any]
    ) -> Engine:
        """Make an engine that predicts as the one of `prediction_state` did."""
        engine = cls(
            module,
            row_loss=row_loss,
            # predictions depend on neither the rule nor the meta-gradient
            rule=SGD(),
            meta_gradient=SecondOrder(),
            adapted=adapted,
            rung=begin_with(state["rung"]),
            precision=state["precision"],
            batch_norm=state["batch_norm"],
            max_tasks_in_memory=state["max_tasks_in_memory"],
        )
        engine.ladder.take_up(state)
        return engine

    def threads(self, n_rows: int) -> Any:
        """Context that limits torch to one thread if passes over `n_rows` rows are small.

        The limit holds for the calling thread alone. On CUDA, the context allows TF32 or, where
        torch itself would take it for convolutions, forbids it; that holds for the process.
        """
        if not self.spec.on_cpu:
            return tf32(self.spec.precision == "tf32")
        if self.spec.is_spatial:
            return several_threads()
        return threads_for(n_rows * self.spec.size)

    # -- the entry points --------------------------------------------------------------------------

    def meta_step(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> MetaStep:
        """Query losses after adaptation and the gradient of their mean.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            ``module.*`` and ``rule.*`` meta-parameters.
        batch : EpisodeBatch
        alpha : float
        steps : int

        Warns
        -----
        EngineFallbackWarning
            If the memory did not suffice, so that fewer tasks are run at once from now on; if
            tasks are run one after another because the module cannot be batched; or if a
            batch-norm layer of the user's own cannot be given the statistics of the support set.
        """
        step = self.ladder.next_step(alpha, steps)
        rung = self.ladder.top.serving(step, batch.support, batch.query)
        if rung.one_by_one:
            return rung.meta_step(meta_params, batch, step)
        if not self.module.training:  # a copy of its own: nobody else has changed its parts
            self.module.train()
        for rung in self.ladder.top.chain():
            rung.begin(step)
        self._warn_of_own_norms()
        if batch.prepared is None:
            batch = self.spec.meta_gradient.episodes(batch, steps)
        else:
            batch = batch.prepared

        def run(part: EpisodeBatch) -> MetaStep:
            return self.ladder.run(
                part, step, lambda rung, piece: rung.meta_step(meta_params, piece, step), join_steps
            )

        with explaining_one_value(support=batch.support, query=batch.query):
            return self.memory.run(batch, run)

    def _warn_of_own_norms(self) -> None:
        if self._warns_of and self.spec.batch_norm == "inductive":
            warnings.warn(
                f"The batch-norm layer(s) {self._warns_of} of {type(self.module).__name__} are "
                "run as they are, so in meta-training they normalise query rows with statistics "
                "of these rows and not of the support set, as predictions do. Reason: they have "
                "a forward pass or parametrizations of their own.",
                EngineFallbackWarning,
                stacklevel=3,
            )
            self._warns_of = []

    def evaluate(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Query losses (n_tasks,) and query outputs after `steps` inner steps, as `predict`."""
        most = self.memory.most or len(batch)
        if self.spec.on_cpu:  # the parameters of a task are often larger than its rows
            most = min(most, max(EVALUATED_NUMBERS // max(self.spec.size, 1), LEAST_EVALUATED))
        if len(batch) > most:
            places = chunks(len(batch), most)
            parts = [
                self.evaluate(meta_params, batch.take(which), alpha=alpha, steps=steps)
                for which in places
            ]
            losses, outputs = ([part[i] for part in parts] for i in range(2))
            return torch.cat(losses), join_outputs(outputs, places, batch.query.X.shape[1])
        inductive = self.spec.batch_norm == "inductive"
        adapted = self._adapt(meta_params, batch.support, alpha, steps, statistics=inductive)
        output, y = self.predict(adapted, batch.query), batch.query.y
        output = fit_outputs(output, y)
        return mean_loss(self.spec.row_loss(output, y), batch.query.weight), output

    def adapt(
        self, meta_params: Params, support: Rows, *, alpha: float, steps: int
    ) -> AdaptedParams:
        """Adapt to the support set of each task, from the meta-parameters of `meta_step`."""
        return self._adapt(meta_params, support, alpha, steps, statistics=True)

    def _adapt(
        self, meta_params: Params, support: Rows, alpha: float, steps: int, *, statistics: bool
    ) -> AdaptedParams:
        """Adapt; with the batch-norm statistics of the support sets if these are asked for."""
        step = Step(alpha, steps, self.spec.parts)
        theta = step.parts.part(meta_params)
        rung = self.ladder.top.serving(step, support)
        if rung.one_by_one:
            return AdaptedParams(rung.adapt(theta, support, step), theta.shared, {})
        self.module.eval()
        for m in self.module.modules():
            if isinstance(m, _BatchNorm):
                m.train()
        with explaining_one_value(support=support):
            params = self.ladder.run(
                support, step, lambda rung, rows: rung.adapt(theta, rows, step), join_params
            )
            adapted = AdaptedParams(params, theta.shared, {})
            if self.spec.norms and statistics:
                adapted.statistics = support_statistics(
                    self.module, self.spec.norms, adapted, support
                )
        return adapted

    def joins_rows(self, batch_norm: str | None = None) -> bool:
        """Whether predictions of a task's rows depend on each other; see `predict`."""
        chosen = self.spec.batch_norm if batch_norm is None else check_batch_norm(batch_norm)
        return bool(self.spec.norms) and chosen == "transductive"

    def predict(
        self, adapted: AdaptedParams, query: Rows, *, batch_norm: str | None = None
    ) -> Tensor:
        """Return outputs (n_tasks, n_rows, n_outputs) of each task's parameters on its rows.

        `batch_norm` may be another one than that of the engine.
        """
        top = self.ladder.top
        if self.joins_rows(batch_norm):
            adapted = dataclasses.replace(adapted, statistics={})
        elif not self.ladder.base.joins_rows:
            return top.predicting(query).outputs(adapted, query)
        with explaining_one_value(query=query):
            places = equal_shapes(query)
            if places is None:
                return top.predicting(query).outputs(adapted, query)
            parts = [(adapted.take(which), query.take(which)) for which in places]
            outputs = [top.predicting(rows).outputs(own, rows) for own, rows in parts]
        return join_outputs(outputs, places, query.X.shape[1])

    def module_of(self, adapted: AdaptedParams, task: int) -> nn.Module:
        """Return a module of its own with the parameters, and the statistics, of one task."""
        params, statistics = adapted.task(task)
        module = copy.deepcopy(for_prediction(self.module, bool(statistics)))
        module.load_state_dict({**params, **statistics}, strict=False)
        return module
