"""Adapting to support sets: the state that predictions are made with."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import torch

from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.estimators.building import Building
from sklearn_maml.learners.base import Adapted, Several, Support
from sklearn_maml.learners.conditioned import Calibration, Conditioned
from sklearn_maml.learners.gradient import AdaptedBySteps, GradientSteps, Running
from sklearn_maml.learners.learner import AdaptedBySupport
from sklearn_maml.learners.plan import GRADIENT_STEPS
from sklearn_maml.learners.shares import Mixed
from sklearn_maml.targets.base import Coding
from sklearn_maml.threads import one_thread

__all__ = ["Adapting", "State"]

# Threads that adapt one and the same model: the state and what follows from it change together.
_STATE_LOCK = threading.Lock()


@dataclasses.dataclass(kw_only=True)
class State(Coding):
    """What `adapt` sets: what was learned of each task, and what its outputs stand for."""

    adapted: Adapted
    ids: np.ndarray | None  # None: one task without an id
    named: bool = False  # whether they are the caller's, rather than places in a list

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.adapted.n_tasks

    def followed_by(self, other: State) -> State:
        """Have the tasks of another state behind those of this one; not of local labels."""
        center = self.center
        if center is not None and other.center is not None:
            center = np.concatenate([center, other.center])
        return State(adapted=Several(self.adapted, other.adapted), ids=self.ids, center=center)


class Adapting(Building):
    """Adapts whichever learners have a share of predictions."""

    def _adapt_to(self, tasks: TaskCollection, sample_weight: np.ndarray | None) -> None:
        if sample_weight is not None and (sample_weight == 0).any():
            # as good as absent: for batch statistics, and for the classes of an episode, too
            kept = sample_weight > 0
            tasks, sample_weight = tasks.at(kept), sample_weight[kept]
        state = self._adapted_state(tasks, sample_weight)
        with _STATE_LOCK:
            self._state = state
            self._after_adapt()

    def _after_adapt(self) -> None:
        """Update what depends on the adapted tasks."""
        if self._state.labels is not None:
            self.classes_ = self._state.labels

    @one_thread()
    def _adapted_state(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None, steps: int | None = None
    ) -> State:
        """Adapt to every task of a collection; `steps` None is what `adapt` does, 0 nothing."""
        self._check_features(tasks.X)
        ids = None if tasks.spelling == "single" else tasks.ids
        if tasks.n_tasks == 0:  # groups without rows name no task: there is still a population
            tasks = dataclasses.replace(tasks, ids=np.zeros(1, dtype=np.intp))
        y, coding = self.targets_.encode_support(tasks, sample_weight)
        weight = self.targets_.weights(y, sample_weight)
        support = Support(self._reshape(tasks.X), y, tasks.codes, tasks.n_tasks, weight)
        adapted = self._learn(support, steps)
        return State(adapted=adapted, ids=ids, named=tasks.named, **vars(coding))

    def _prior_state(self) -> State:
        """State of a task without labelled rows."""
        if self.targets_.n_ways is not None:
            raise ValueError(
                f"unseen_tasks={self.unseen_tasks!r} predicts for tasks without labelled rows, but "
                "with n_ways labels mean something inside their task only: there are no classes "
                "to predict. Call adapt with labelled rows of each task, or meta-fit with "
                "n_ways=None."
            )
        none = np.zeros(0, dtype=np.intp)
        X = np.empty((0, *self.feature_shape_), dtype=self._dtype)
        return self._adapted_state(TaskCollection(X, none, none, none[:0], None, "groups"), None)

    @torch.inference_mode(False)  # a caller may have it on
    def _learn(self, support: Support, steps: int | None) -> Adapted:
        """Adapt each learner that has a share; 0 steps is before adaptation, of all of them."""
        if steps is None and self.adapt_steps == 0:
            steps = 0
        learner = self._own_learner()
        if learner is not None:
            return AdaptedBySupport(learner, self._learner.head, support, known=steps != 0)
        share = self.learner_weights_.get(GRADIENT_STEPS, 0.0)
        if share == 1:
            return self._steps_adapted(support, steps)
        head = self._condition(support, prior=steps == 0)
        return head if share == 0 else self._mixed(head, self._steps_adapted(support, steps))

    def _steps_adapted(self, support: Support, steps: int | None) -> Adapted:
        learner = GradientSteps(
            self._learner.module,
            {n: p for n, p in self._learner.meta_params().items() if not n.startswith("head.")},
            lambda rung: self._make_engine(self._learner.module, rung),
            self._alpha(),
            self._n_adapt_steps() if steps is None else steps,
            self._running(),
            self._rung,
            quiet=getattr(self, "n_tasks_", 1) == 1,
        )
        adapted = learner.adapt(support)
        self._rung = learner.rung
        return adapted

    def _running(self) -> Running:
        return Running(self.batch_norm, self._integer("max_tasks_in_memory"), self.device_)

    def _condition(self, support: Support, prior: bool) -> Conditioned:
        """Adapt in closed form; `prior` leaves the support rows out."""
        y = support.y
        targets = self.targets_
        y = np.eye(targets.n_outputs)[y] if targets.are_classes else y
        make = Conditioned.prior if prior else Conditioned.on
        return make(self._learner.head, self._calibrated(), dataclasses.replace(support, y=y))

    def _calibrated(self) -> Calibration:
        assert self.calibration_ is not None
        return self.calibration_

    def _mixed(self, head: Conditioned, steps: Adapted) -> Mixed:
        calibration = self._calibrated()
        return Mixed(
            head,
            steps,
            self.learner_weights_[GRADIENT_STEPS],
            calibration.steps_scale,
            calibration.scale,
        )

    def _adapted_from(self, state: dict[str, Any]) -> Adapted:
        """Make what was learned of tasks, from a file."""
        if state["kind"] == "conditioned":
            return Conditioned.from_state(self._learner.head, self._calibrated(), state)
        if state["kind"] == "support":
            support, learner = Support(**state["support"]), self._own_learner()
            assert learner is not None
            return AdaptedBySupport(learner, self._learner.head, support, state["known"])
        if state["kind"] == "steps":
            return AdaptedBySteps.from_state(
                self._learner.module, self._row_loss(), self.device_, state
            )
        if state["kind"] == "several":
            return Several(*map(self._adapted_from, state["parts"]))
        head = Conditioned.from_state(self._learner.head, self._calibrated(), state["head"])
        return self._mixed(head, self._adapted_from(state["steps"]))
