"""Scores task by task."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_maml._types import Tasks
from sklearn_maml.evaluation.scoring import check_counts, score_tasks
from sklearn_maml.inspection.shared import (
    BLUE,
    GREY,
    NAMED_TASKS,
    RED,
    Metric,
    Units,
    asks_for_log,
    axes,
    open_copy,
)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class TaskScoresDisplay:
    """Score of each task before and after adaptation, in order.

    Make one with `from_estimator`. Its parameters are stored as attributes.

    Parameters
    ----------
    task : ndarray of shape (n_tasks,)
        Task ids.
    before, after : ndarray of shape (n_tasks,)
        Scores before and after adaptation.
    score_name : str
        What the scores are.
    greater_is_better : bool
        Whether they are scores or errors.
    unit : str, default="tasks"
        What `task` is: "tasks", or the "episodes" or "splits" of a single one.

    Attributes
    ----------
    harmed : bool ndarray of shape (n_tasks,)
        Tasks that adapting makes worse.
    order_ : int ndarray of shape (n_tasks,)
        Order of the tasks in the figure.
    ax_ : matplotlib Axes
        Axes drawn on.
    figure_ : matplotlib Figure
        Its figure.
    before_, after_, harmed_ : matplotlib PathCollection or None
        Points before adaptation, and after it for tasks that it helps and harms; None where there
        are no such tasks.

    See Also
    --------
    sklearn_maml.task_scores : The numbers.
    AdaptationCurveDisplay : Mean over the tasks, step by step.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> from sklearn_maml.inspection import TaskScoresDisplay
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> display = TaskScoresDisplay.from_estimator(reg, X, y, groups=task)
    >>> display.after.shape
    (20,)
    """

    task: np.ndarray
    before: np.ndarray
    after: np.ndarray
    score_name: str
    greater_is_better: bool
    unit: str = "tasks"

    @property
    def harmed(self) -> np.ndarray:
        """Tasks that adapting makes worse."""
        return self._gain() < 0

    def _gain(self) -> np.ndarray:
        gain = self.after - self.before
        return gain if self.greater_is_better else -gain

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Tasks,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        *,
        scoring: Any = None,
        n_shots: int | None = None,
        n_repeats: int = 1,
        random_state: Any = None,
        sort: str = "after",
        ax: Any = None,
    ) -> TaskScoresDisplay:
        """Adapt to a support split of each task, score the query rows, and draw.

        Splits and adaptation are those of `task_scores` and `task_scorer`.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one. It is not
            changed.
        X, y, groups : tasks
            As in `MAMLRegressor.fit`; best tasks that were not meta-trained on.
        scoring : str or callable, default=None
            A scikit-learn scorer; None is the root mean squared error for regressors and the
            accuracy for classifiers. Scorers named ``neg_...`` are shown as errors.
        n_shots : int, default=None
            Support rows of each task (of each class, in classification); None takes that of the
            estimator, 0 is before any of them.
        n_repeats : int, default=1
            Support splits of each task.
        random_state : int, RandomState instance or None, default=None
            Seeds the splits; None takes the seed of the estimator.
        sort : {"after", "gain"}, default="after"
            Whether the tasks with the best scores after adaptation come first, or those that gain
            the most from it.
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        display : TaskScoresDisplay
            With what was computed and drawn.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        _check_sort(sort)
        maml, X = open_copy(estimator, X)
        check_counts(n_shots=n_shots, n_repeats=n_repeats)
        shown = Metric(scoring, maml)
        maml, scored = score_tasks(maml, X, y, groups, n_shots, n_repeats, random_state, (0, None))
        units = Units(maml, scored)
        before, after = (shown.of_units(maml, scored, state, units) for state in scored.states)
        display = cls(
            task=units.ids,
            before=before,
            after=after,
            score_name=shown.name,
            greater_is_better=shown.sign > 0,
            unit=units.word,
        )
        return display.plot(ax=ax, sort=sort)

    def plot(self, ax: Any = None, *, sort: str = "after") -> TaskScoresDisplay:
        """Draw the scores.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.
        sort : {"after", "gain"}, default="after"
            Whether the tasks with the best scores after adaptation come first, or those that gain
            the most from it.

        Returns
        -------
        display : TaskScoresDisplay
            Itself, with what was drawn as attributes.
        """
        _check_sort(sort)
        self.ax_ = axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        sign = 1 if self.greater_is_better else -1
        key = sign * self.after if sort == "after" else self._gain()
        self.order_ = np.argsort(-key, kind="stable")
        n = len(self.order_)
        before, after = self.before[self.order_], self.after[self.order_]
        harmed, place = self.harmed[self.order_], np.arange(1, n + 1)
        size = 20 if n <= 60 else 8
        self.ax_.vlines(
            place, before, after, color=np.where(harmed, RED, "#D0D0D0"), lw=1, alpha=0.7, zorder=1
        )
        self.before_ = self.ax_.scatter(
            place, before, s=size, facecolor="white", edgecolor=GREY, label="before adaptation"
        )
        self.after_ = self.harmed_ = None
        if not harmed.all():
            label = "after adaptation"
            if not harmed.any():
                label += f" (harms none of {n} {self.unit})"
            self.after_ = self.ax_.scatter(
                place[~harmed], after[~harmed], s=size, color=BLUE, label=label
            )
        if harmed.any():
            self.harmed_ = self.ax_.scatter(
                place[harmed],
                after[harmed],
                s=size,
                color=RED,
                marker="D",
                label=f"harmed by adapting: {harmed.sum()} of {n} {self.unit}",
            )
        both = np.concatenate([before, after])
        if not self.greater_is_better and asks_for_log(both):
            self.ax_.set_yscale("log")
        first = "best score" if sort == "after" else "largest gain"
        self.ax_.set_xlabel(f"{self.unit.capitalize()}, {first} first")
        if n <= NAMED_TASKS:
            self.ax_.set_xticks(place, self.task[self.order_].tolist(), rotation=45, ha="right")
        self.ax_.set_ylabel(self.score_name)
        self.ax_.legend()
        return self


def _check_sort(sort: str) -> None:
    if sort not in ("after", "gain"):
        raise ValueError(
            f"sort={sort!r} is not known; expected 'after' (the score after adaptation) or 'gain'."
        )
