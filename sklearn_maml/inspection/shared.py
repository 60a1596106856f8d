"""What the displays share: colours, axes, and what is scored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_maml._validation import is_integer
from sklearn_maml.estimators.adapting import State
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.scoring import Scored
from sklearn_maml.evaluation.scoring import apply_scorer, default_scoring, find_scorer, open_model
from sklearn_maml.learners.plan import GRADIENT_STEPS

# told apart by all kinds of colour vision (Okabe & Ito)
BLUE, RED, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#000000"
# a range of values that asks for a log scale
LOG_RANGE = 10
# tasks that can be told apart by their names on an axis, and drawn side by side
NAMED_TASKS = 12


def open_copy(estimator: Any, X: Any) -> tuple[Any, Any]:
    """Copy of the MAML estimator in a model, which may change, and rows as it sees them."""
    maml, X = open_model(estimator, X)
    return copy.copy(maml), X


def check_steps(steps: Iterable[int]) -> np.ndarray:
    """Return numbers of inner steps in order, each once."""
    given = list(steps)
    for n in given:
        if not is_integer(n) or n < 0:
            raise ValueError(f"steps must be numbers of inner steps, 0 or more; got {n!r}.")
    if not given:
        raise ValueError("steps is empty. Give at least one number of inner steps, such as 0.")
    return np.unique(np.array(given, dtype=int))


class Metric:
    """A scorer, with its name and sign as they are shown: errors are positive."""

    def __init__(self, scoring: Any, maml: BaseMAML) -> None:
        if scoring is None:
            scoring = default_scoring(maml)
        self.scorer = find_scorer(scoring)
        self.sign = 1
        if isinstance(scoring, str):
            self.sign = -1 if scoring.startswith("neg_") else 1
            name = scoring.removeprefix("neg_").replace("_", " ")
            self.name = "R²" if name == "r2" else name[0].upper() + name[1:]
        else:
            of = getattr(scoring, "_score_func", scoring)
            self.name = f"Score ({getattr(of, '__name__', type(of).__name__)})"

    def of_units(self, maml: Any, scored: Scored, state: State, units: Units) -> np.ndarray:
        """Score each of the units."""
        return np.array(
            [
                self.sign * apply_scorer(self.scorer, maml, scored, state, units.codes == j)
                for j in range(len(units.ids))
            ]
        )


class Units:
    """What a score is computed for: tasks, or the episodes of a task that is the only one."""

    def __init__(self, maml: BaseMAML, scored: Scored) -> None:
        if scored.tasks.n_tasks > 1:
            self.word, self.ids = "tasks", scored.tasks.ids
            self.codes = scored.task[scored.codes]
        else:
            self.word = "splits" if maml.targets_.n_ways is None else "episodes"
            self.ids, self.codes = np.arange(len(scored.task)), scored.codes


def asks_for_log(values: np.ndarray) -> bool:
    """Whether values are positive and differ by more than `LOG_RANGE`."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > LOG_RANGE * values.min())


def axes(ax: Any, caller: str) -> Any:
    """Return the axes given, or those of a new figure."""
    check_matplotlib_support(caller)
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(layout="constrained")
    return ax


def share_of_steps(maml: BaseMAML) -> float:
    """Share of gradient steps in predictions."""
    return maml.learner_weights_.get(GRADIENT_STEPS, 0.0)


def shares_in_words(maml: BaseMAML) -> str | None:
    """Return which learners predict, where gradient steps do not alone."""
    if share_of_steps(maml) == 1:
        return None
    parts = [f"{name.replace('-', ' ')} {w:.0%}" for name, w in maml.learner_weights_.items() if w]
    return " + ".join(parts)
