"""Adapting to support sets: the state that predictions are made with."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from sklearn_maml.data.ids import KnownIds, join_ids, show_ids
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.engine import Engine
from sklearn_maml.engine.architecture import signature
from sklearn_maml.estimators.building import Building
from sklearn_maml.learners.base import NO_EXTENSION, Adapted, Several, Support
from sklearn_maml.learners.conditioned import Calibration, Conditioned
from sklearn_maml.learners.gradient import AdaptedBySteps, GradientSteps, Running
from sklearn_maml.learners.learner import AdaptedBySupport
from sklearn_maml.learners.plan import GRADIENT_STEPS
from sklearn_maml.learners.shares import Mixed
from sklearn_maml.targets.base import Coding
from sklearn_maml.threads import n_threads_asked, one_thread

# Engines that any number of adapted models may share, by what was meta-learned
_ENGINES: WeakKeyDictionary[Any, tuple[Any, Engine]] = WeakKeyDictionary()
# Threads that adapt one and the same model: the state and what follows from it change together.
_STATE_LOCK = threading.Lock()


@dataclasses.dataclass(kw_only=True)
class State(Coding):
    """What `adapt` sets: what was learned of each task, and what its outputs stand for."""

    adapted: Adapted
    ids: np.ndarray | None  # None: one task without an id
    named: bool = False  # whether they are the caller's, rather than places in a list
    scaled: bool = False  # whether weights were, which those of further rows cannot be compared to

    def __post_init__(self) -> None:
        # no field: files do without; what it makes to look ids up is its own, so that predictions
        # leave a state as it was
        self.known_ids = KnownIds(np.empty(0, int) if self.ids is None else self.ids)

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

    def _adapt_to(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None, scaled: bool = False
    ) -> None:
        state = self._adapted_state(*_of_weight(tasks, sample_weight))
        state = dataclasses.replace(state, scaled=scaled)
        with _STATE_LOCK:
            self._state = state
            self._after_adapt()

    def _extend_to(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None, scaled: bool
    ) -> None:
        """Add rows to the adapted tasks; what other threads add meanwhile is not lost."""
        tasks, sample_weight = _of_weight(tasks, sample_weight)
        while True:
            before: State | None = self.__dict__.get("_state")
            self._refuse_extension(before, scaled)
            state = self._extended_state(before, tasks, sample_weight)
            with _STATE_LOCK:
                if self.__dict__.get("_state") is before:
                    self._state = state
                    self._after_adapt()
                    return

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
        support = self._support(tasks, y, tasks.codes, tasks.n_tasks, sample_weight)
        adapted = self._learn(support, steps)
        return State(adapted=adapted, ids=ids, named=tasks.named, **vars(coding))

    @one_thread()
    def _extended_state(
        self, before: State | None, tasks: TaskCollection, sample_weight: np.ndarray | None
    ) -> State:
        """State after rows were added to `before`, of tasks in it and of new ones."""
        if before is None or (before.ids is not None and not len(before.ids)):
            state = self._adapted_state(tasks, sample_weight)
            if type(state.adapted).extended is Adapted.extended:
                raise ValueError(NO_EXTENSION)
            return state
        self._check_features(tasks.X)
        positions, ids = _places(before, tasks)
        y, _ = self.targets_.encode_support(tasks, sample_weight)
        n_tasks = max(before.n_tasks, int(positions.max(initial=-1)) + 1)
        more = self._support(tasks, y, positions[tasks.codes], n_tasks, sample_weight)
        with torch.inference_mode(False):  # a caller may have it on
            state = dataclasses.replace(before, adapted=before.adapted.extended(more), ids=ids)
        if ids is before.ids:
            state.known_ids = before.known_ids
        return state

    def _support(
        self,
        tasks: TaskCollection,
        y: np.ndarray,
        codes: np.ndarray,
        n_tasks: int,
        sample_weight: np.ndarray | None,
    ) -> Support:
        """Labelled rows, with their weights and those of their classes."""
        weight, count = self.targets_.weights(y, sample_weight), None
        if weight is not sample_weight:  # a rare class is no evidence of more rows
            count = np.ones(len(y)) if sample_weight is None else sample_weight
        return Support(self._reshape(tasks.X), y, codes, n_tasks, weight, count)

    def _refuse_extension(self, before: State | None, scaled: bool) -> None:
        """Refuse more rows where what was learned of earlier ones depends on which others come."""
        reason = None
        if self.targets_.n_ways is not None:
            reason = "with n_ways the labels of a task stand for the classes of all of its rows"
        elif self.targets_.center_y:
            reason = "with center_y the mean of all its rows is taken from the targets of a task"
        elif self.adapt_steps == 0:
            reason = "with adapt_steps=0 the rows of a task are left out"
        elif scaled or (before is not None and before.scaled):
            reason = "weights so far from 1 are scaled, and compare with none of another call"
        if reason is not None:
            raise ValueError(
                f"extend=True adds rows to what was learned of a task, but {reason}. Call adapt "
                "with the old rows and the new ones together."
            )

    def _prior_state(self, asker: str = "predict") -> State:
        """State of a task without labelled rows."""
        none = np.zeros(0, dtype=np.intp)
        X = np.empty((0, *self.feature_shape_), dtype=self._dtype)
        if self.targets_.n_ways is not None and asker == "suggest_rows":
            return State(adapted=self._learn(Support(X, none, none, 1), None), ids=None)
        if self.targets_.n_ways is not None:
            raise ValueError(
                f"unseen_tasks={self.unseen_tasks!r} predicts for tasks without labelled rows, but "
                "with n_ways labels mean something inside their task only: there are no classes "
                "to predict. Call adapt with labelled rows of each task, or meta-fit with "
                "n_ways=None."
            )
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
        make = Conditioned.prior if steps == 0 else Conditioned.on
        head = make(self._learner.head, self._calibrated(), support)
        return head if share == 0 else self._mixed(head, self._steps_adapted(support, steps))

    def _steps_adapted(self, support: Support, steps: int | None) -> Adapted:
        loss = self.targets_.loss
        learner = GradientSteps(
            {n: p for n, p in self._learner.meta_params().items() if not n.startswith("head.")},
            self._engine_to_adapt,
            self._alpha(),
            self._n_adapt_steps() if steps is None else steps,
            self._running(),
            self._rung,
            quiet=self.n_tasks_ == 1,
            link=loss.inverse_link if loss.scales else None,
        )
        adapted = learner.adapt(support)
        self._rung = learner.rung
        if adapted.engine.is_shareable:
            _ENGINES[self._learner] = self._engine_key(), adapted.engine
        return adapted

    def _engine_to_adapt(self, rung: str) -> Engine:
        """Make an engine, or take that of the last call where nothing it depends on has changed.

        Of a small network that takes less time to adapt than an engine to make.
        """
        key, engine = _ENGINES.get(self._learner, (None, None))
        if engine is not None and key == self._engine_key():
            return engine
        return self._make_engine(self._learner.module, rung)

    def _engine_key(self) -> Any:
        """Return what an engine is made of; equal to that of before if the engine would be."""
        if not (isinstance(self.update_rule, str) and isinstance(self.meta_gradient, str)):
            return object()  # whose attributes may change
        return (
            signature(self._learner.module),
            self.update_rule,
            self.meta_gradient,
            self._prefixed("update_rule"),
            self._prefixed("meta_gradient"),
            self.adapted if isinstance(self.adapted, str) else tuple(self.adapted),
            self._row_loss(),
            self._engine_options(),
            n_threads_asked(),
        )

    def _running(self) -> Running:
        options = self._engine_options()
        return Running(options["batch_norm"], options["max_tasks_in_memory"], self.device_)

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


def _of_weight(
    tasks: TaskCollection, sample_weight: np.ndarray | None
) -> tuple[TaskCollection, np.ndarray | None]:
    """Rows that have a weight, and it.

    Others are as good as absent: for batch statistics, and for the classes of an episode, too.
    """
    if sample_weight is None or not (sample_weight == 0).any():
        return tasks, sample_weight
    kept = sample_weight > 0
    return tasks.at(kept), sample_weight[kept]


def _places(state: State, tasks: TaskCollection) -> tuple[np.ndarray, np.ndarray | None]:
    """Position of each task among those of a state, new ones behind them, and the ids of all."""
    if tasks.spelling == "single":
        if state.n_tasks > 1:
            raise ValueError(
                f"extend=True got rows without task ids, but {state.n_tasks} tasks are adapted, "
                "and their rows may be of any. Pass groups (the task id of each row)."
            )
        return np.zeros(1, dtype=np.intp), state.ids
    if state.ids is None:
        raise ValueError(
            "extend=True got several tasks, but what is adapted is one task without an id. Give "
            "rows of that task alone, or adapt anew, with groups."
        )
    if tasks.named != state.named or (not tasks.named and tasks.n_tasks != state.n_tasks):
        before = (
            f"task ids, such as {show_ids(state.ids)}"
            if state.named
            else f"{state.n_tasks} tasks without ids"
        )
        raise ValueError(
            f"extend=True got {tasks.n_tasks} tasks {'with' if tasks.named else 'without'} ids, "
            f"and adapt got {before} before: which is which is not known. Give ids in both, or "
            "lists of the same tasks in the same order; those without new rows may be empty."
        )
    if not tasks.named:
        return np.arange(tasks.n_tasks), state.ids
    found = state.known_ids.find(tasks.ids)
    new = found < 0
    found[new] = state.n_tasks + np.arange(new.sum())
    return found, join_ids(state.ids, tasks.ids[new]) if new.any() else state.ids
