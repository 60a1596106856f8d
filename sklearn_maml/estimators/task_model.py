"""What scores and displays ask of a fitted estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.estimators.adapting import State


@dataclass
class Scored:
    """Episodes of a score: the query rows, and the parameters adapted to each episode.

    `task` is the task position of each episode, `rows` the position in `tasks` of each query row,
    `codes` its episode; `support` has the support set of each episode as a task; `states` has one
    adapted state for each number of inner steps asked for.
    """

    tasks: TaskCollection
    task: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    support: TaskCollection
    states: list[State]


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A fitted estimator as scores and displays use it: many tasks and adapted states at a time.

    It is of the parameters of now: ask for another one after they have changed.

    Attributes
    ----------
    check_unchanged : callable () -> None
        Refuses parameters that no longer fit what was meta-learned.
    read : callable (X, y, groups) -> TaskCollection
        Validates tasks.
    rows : callable X -> X
        Makes rows as the network takes them.
    split_and_adapt : callable (X, y, groups, ...) -> Scored
        Splits each task into support and query rows, and adapts to the support rows. Its keywords
        are `n_shots`, `n_repeats`, `random_state` and `steps`, numbers of inner steps.
    adapt : callable (tasks, sample_weight, steps=None) -> State
        Adapts to support sets; 0 steps is before adaptation, and None takes `n_steps`.
    predict, probabilities, decision : callable (state, rows, codes) -> ndarray
        Predict `rows`, each of which is of the task in `codes`.
    n_steps : int
        Inner steps that `adapt` takes.
    seed : int
        Of the splits of `score`.
    """

    check_unchanged: Callable[[], None]
    read: Callable[[Any, Any, Any], TaskCollection]
    rows: Callable[[Any], Any]
    split_and_adapt: Callable[..., Scored]
    adapt: Callable[..., State]
    predict: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    probabilities: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    decision: Callable[[State, np.ndarray, np.ndarray], np.ndarray]
    n_steps: int
    seed: int
