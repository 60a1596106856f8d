"""Scoring tasks: a split of each, adaptation to its support rows, a metric."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.data.ids import show_ids
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.spellings import is_task_distribution, is_task_list, n_axes, refuse_graphs
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.data.weights import check_weights, spread_weights
from sklearn_maml.estimators.adapting import State
from sklearn_maml.estimators.prediction import Predicting
from sklearn_maml.estimators.reading import SEVERAL_TASKS, Reading
from sklearn_maml.exceptions import SeenTaskWarning

# tasks drawn from a task distribution for `score`
SCORED_TASKS = 600
# episodes of a score where tasks are drawn from a pool of classes
SCORED_EPISODES = 100


@dataclass
class Scored:
    """Episodes of a score: the query rows, and the parameters adapted to each episode."""

    tasks: TaskCollection
    task: np.ndarray  # task position of each episode
    rows: np.ndarray  # position in `tasks` of each query row
    codes: np.ndarray  # its episode
    support: TaskCollection  # the support set of each episode as a task
    states: list[State]  # one for each number of inner steps asked for


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A fitted estimator as scores and displays use it: many tasks and adapted states at a time.

    It is of the parameters of now: ask for another one after they have changed.
    """

    check_unchanged: Callable[[], None]  # refuses parameters that do not fit what was learned
    read: Callable[[Any, Any, Any], TaskCollection]  # validates tasks: X, y, groups
    rows: Callable[[Any], Any]  # makes rows as the network takes them
    # Splits each of the tasks X, y, groups into support and query rows, and adapts to the support
    # rows; its keywords are those of `Scoring._split_and_adapt`.
    split_and_adapt: Callable[..., Scored]
    # (tasks, sample_weight, steps=None): 0 steps is before adaptation, None takes `n_steps`
    adapt: Callable[..., State]
    # (state, rows, codes) -> ndarray, of rows each of which is of the task in `codes`
    predict: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    probabilities: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    decision: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    n_steps: int  # inner steps that `adapt` takes
    seed: int  # of the splits of `score`


class Scoring(Reading, Predicting):
    """Scores predictions of adapted tasks, or of new ones after adaptation."""

    def task_model(self) -> TaskModel:
        """Return the fitted estimator as scores and displays use it.

        Returns
        -------
        model : TaskModel
            Adapts to many tasks at a time, and predicts for them; the estimator stays as it is.
        """
        check_is_fitted(self)
        return TaskModel(
            check_unchanged=self._check_unchanged,
            read=self._read_tasks,
            rows=self._reshape,
            split_and_adapt=self._split_and_adapt,
            adapt=self._adapted_state,
            predict=self._decide,
            probabilities=self._probabilities,
            decision=self._decision,
            n_steps=self._n_adapt_steps(),
            seed=self._score_seed,
        )

    def _has_task_information(self, X: Any, y: Any, groups: Any) -> bool:
        """Whether a call of `score` names tasks, rather than rows of the adapted task."""
        state = self.__dict__.get("_state")
        adapted_to_one = state is not None and state.ids is None
        return not adapted_to_one or (
            groups is not None
            or self.task_column is not None
            or is_task_list(X, y)
            or is_task_distribution(X)
            or n_axes(X) == len(self.feature_shape_) + 2
        )

    def _split_and_adapt(
        self,
        X: Any,
        y: Any,
        groups: Any,
        *,
        n_shots: int | None = None,
        n_repeats: int = 1,
        random_state: Any = None,
        steps: tuple[int | None, ...] = (None,),
        sample_weight: Any = None,
    ) -> Scored:
        """Split each task into support and query rows and adapt to the support rows."""
        check_is_fitted(self)
        self._validate_params()
        seed = self._score_seed if random_state is None else random_state
        rng = np.random.default_rng(check_random_state(seed).randint(2**31 - 1))
        if is_task_distribution(X):
            X = X.sample(SCORED_TASKS, random_state=int(rng.integers(2**31 - 1)))
        self._check_unchanged()
        X, sample_weight = self._take_weights(X, y, sample_weight)
        tasks = self._read_tasks(X, y, groups)
        if sample_weight is not None:
            given = spread_weights(sample_weight, tasks)
            tasks = tasks.having(weight=check_weights(given, tasks.X))
        self._warn_if_seen(tasks)
        for doubt in self._pooled(tasks, "A score", SEVERAL_TASKS * self._sizes()[0]):
            warnings.warn(doubt, stacklevel=4)
        n_shots = self._integer("n_shots") if n_shots is None else n_shots
        targets = self.targets_
        tasks = self._usable(tasks, targets, n_shots, self.module_, stacklevel=5)
        encoded, n_ways = targets.encode(tasks), targets.n_ways
        sampler = EpisodeSampler(
            encoded,
            **targets.scored_shots(n_shots),
            **targets.sampling(),
        )
        if n_ways is not None and tasks.in_query is None:
            n_repeats *= -(-SCORED_EPISODES // tasks.n_tasks)
        which = np.repeat(np.arange(tasks.n_tasks), n_repeats)
        split = sampler.split(which, rng)
        if n_ways is not None and tasks.in_query is not None:
            _check_query_labels(tasks)
        support = TaskCollection(
            tasks.X[split.support],
            tasks.y[split.support],
            np.repeat(np.arange(len(which)), split.n_support),
            np.arange(len(which)),
            None,
            "list",
        )
        states = [self._adapted_state(support, None, s) for s in steps]
        codes = np.repeat(np.arange(len(which)), split.n_query)
        return Scored(tasks, which, split.query, codes, support, states)

    def _warn_if_seen(self, tasks: TaskCollection) -> None:
        if not tasks.named or not self._fingerprints:
            return
        marks = tasks.fingerprints().items()
        new = np.array([self._fingerprints.get(task, mark) != mark for task, mark in marks])
        if new.any():
            warnings.warn(
                f"{new.sum()} of the {tasks.n_tasks} scored tasks, such as "
                f"{show_ids(tasks.ids[new])}, "
                "have the ids of tasks that were meta-trained on, but other rows. If they are the "
                "same tasks, the score measures new rows of known tasks, not new tasks: split by "
                "task (GroupKFold, LeaveOneGroupOut, GroupShuffleSplit) to measure those. If they "
                "are new tasks, give them ids of their own.",
                SeenTaskWarning,
                stacklevel=5,
            )

    def _score(self, X: Any, y: Any, groups: Any, sample_weight: Any, metric: Any) -> float:
        check_is_fitted(self)
        refuse_graphs(y=y, sample_weight=sample_weight)
        if issparse(y):
            raise TypeError("Sparse targets were passed; dense ones are required: y.toarray().")
        X, sample_weight = self._take_weights(X, y, sample_weight)
        if not self._has_task_information(X, y, groups):
            predicted = self.predict(X)
            if not self.targets_.are_classes:
                self.targets_.loss.check(
                    np.asarray(y, dtype=np.float64).reshape(len(predicted), -1)
                )
            if sample_weight is not None:
                sample_weight = check_weights(sample_weight, predicted)
            return float(metric(y, predicted, sample_weight=sample_weight))
        scored = self._split_and_adapt(X, y, groups, sample_weight=sample_weight)
        rows = scored.rows
        predicted = self._decide(
            scored.states[0], self._reshape(scored.tasks.X[rows]), scored.codes
        )
        weight = scored.tasks.weight
        of_rows = weight if weight is None else weight[rows]
        return float(metric(scored.tasks.y[rows], predicted, sample_weight=of_rows))


def _check_query_labels(tasks: TaskCollection) -> None:
    """Refuse given episodes with query classes that the support set lacks."""
    assert tasks.in_query is not None
    for j in range(tasks.n_tasks):
        rows = tasks.rows(j)
        query = tasks.in_query[rows]
        missing = np.setdiff1d(tasks.y[rows[query]], tasks.y[rows[~query]])
        if len(missing):
            raise ValueError(
                f"Task {j} has query rows of the classes {missing[:5].tolist()}, which its support "
                "set lacks, so no prediction of them can be right. Leave these rows out."
            )
