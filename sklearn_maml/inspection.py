"""Looking into meta-learned models: what adapting does to scores, fits and class orders.

Displays follow scikit-learn's convention: `from_estimator` computes, the constructor stores, and
`plot` draws. They need matplotlib; nothing else of the library does.
"""

from __future__ import annotations

import copy
import itertools
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import stdtrit
from sklearn.base import is_classifier
from sklearn.metrics import get_scorer
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._base import SCORED_EPISODES, BaseMAML, Scored, State, find_prior, transform_rows
from sklearn_maml.metrics import _apply, _check_counts, _score_tasks
from sklearn_maml.tasks import TaskCollection, concatenate_rows, is_frame, is_task_list

__all__ = [
    "AdaptationCurveDisplay",
    "FewShotFitDisplay",
    "MetaTrainingDisplay",
    "TaskScoresDisplay",
    "class_permutation_audit",
]

# told apart by all kinds of colour vision (Okabe & Ito)
BLUE, RED, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#000000"
CURVES = [BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
# points of an adaptation curve, and a range of values that asks for a log scale
CURVE_POINTS = 10
LOG_RANGE = 10
# tasks that can be told apart by their names on an axis, and drawn side by side
NAMED_TASKS = 12
# points of a curve against a feature
GRID_POINTS = 200


class AdaptationCurveDisplay:
    """Score on query rows against the number of inner steps.

    Make one with `from_estimator`. Its parameters are stored as attributes.

    Parameters
    ----------
    steps : int ndarray of shape (n_points,)
        Numbers of inner steps; 0 is before adaptation.
    scores : ndarray of shape (n_points, n_units)
        Score of each task after each of them.
    trained_steps : int or None
        Number of inner steps in meta-training.
    score_name : str
        What the scores are.
    unit : str, default="tasks"
        What the columns of `scores` are: "tasks", or the "episodes" or "splits" of a single one.
    estimator_name : str, default=None
        Name of the model in the legend.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes drawn on.
    figure_ : matplotlib Figure
        Its figure.
    line_ : matplotlib Line2D
        Mean over the tasks.
    band_ : matplotlib PolyCollection or None
        Its 95 % interval; None for a single task.
    trained_line_ : matplotlib Line2D or None
        Marks `trained_steps`.

    See Also
    --------
    TaskScoresDisplay : Task by task.

    Notes
    -----
    The interval is that of Student's t for a mean over tasks. It tells how the mean would vary with
    other tasks, not with another meta-training.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> from sklearn_maml.inspection import AdaptationCurveDisplay
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(update_rule="sgd", steps=2, max_iter=10, random_state=0)
    >>> reg = reg.fit(X, y, groups=task)
    >>> display = AdaptationCurveDisplay.from_estimator(reg, X, y, groups=task)
    >>> display.steps
    array([0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        *,
        steps: np.ndarray,
        scores: np.ndarray,
        trained_steps: int | None,
        score_name: str,
        unit: str = "tasks",
        estimator_name: str | None = None,
    ) -> None:
        self.steps = steps
        self.scores = scores
        self.trained_steps = trained_steps
        self.score_name = score_name
        self.unit = unit
        self.estimator_name = estimator_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        groups: Any = None,
        *,
        steps: Iterable[int] | None = None,
        scoring: Any = None,
        n_shots: int | None = None,
        n_repeats: int = 1,
        random_state: Any = None,
        ax: Any = None,
        name: str | None = None,
        line_kw: dict[str, Any] | None = None,
        band_kw: dict[str, Any] | None = None,
    ) -> AdaptationCurveDisplay:
        """Adapt to a support split of each task, score the query rows, and draw.

        Splits and adaptation are those of `task_scores` and `task_scorer`.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one. It is not
            changed.
        X, y, groups : tasks
            As in `MAMLRegressor.fit`; best tasks that were not meta-trained on.
        steps : iterable of int, default=None
            Numbers of inner steps; None goes to twice those of meta-training.
        scoring : str or callable, default=None
            A scikit-learn scorer; None is the root mean squared error for regressors and the
            accuracy for classifiers. Scorers named ``neg_...`` are shown as errors.
        n_shots : int, default=None
            Support rows of each task (of each class, in classification); None takes that of the
            estimator.
        n_repeats : int, default=1
            Support splits of each task.
        random_state : int, RandomState instance or None, default=None
            Seeds the splits; None takes the seed of the estimator.
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.
        name : str, default=None
            Name of the model in the legend.
        line_kw, band_kw : dict, default=None
            Passed to matplotlib's `plot` and `fill_between`.

        Returns
        -------
        display : AdaptationCurveDisplay
            With what was computed and drawn.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        maml, X = _open(estimator, X)
        trained = _trained_steps(maml)
        numbers_of_steps = _check_steps(
            _steps_around(trained or maml._n_adapt_steps()) if steps is None else steps
        )
        _check_counts(n_shots=n_shots, n_repeats=n_repeats)
        shown = _Metric(scoring, maml)
        maml, scored = _score_tasks(maml, X, y, groups, n_shots, n_repeats, random_state, ())
        units = _Units(maml, scored)
        # one state at a time: of many tasks, all of them would not fit
        scores = [
            shown.of_units(maml, scored, maml._adapted_state(scored.support, None, n), units)
            for n in numbers_of_steps.tolist()
        ]
        display = cls(
            steps=numbers_of_steps,
            scores=np.array(scores),
            trained_steps=trained,
            score_name=shown.name,
            unit=units.word,
            estimator_name=name,
        )
        return display.plot(ax=ax, line_kw=line_kw, band_kw=band_kw)

    def plot(
        self,
        ax: Any = None,
        *,
        name: str | None = None,
        line_kw: dict[str, Any] | None = None,
        band_kw: dict[str, Any] | None = None,
    ) -> AdaptationCurveDisplay:
        """Draw the curve.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.
        name : str, default=None
            Name of the model in the legend; None takes `estimator_name`.
        line_kw, band_kw : dict, default=None
            Passed to matplotlib's `plot` and `fill_between`.

        Returns
        -------
        display : AdaptationCurveDisplay
            Itself, with what was drawn as attributes.
        """
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        mean, low, high = _mean_interval(self.scores)
        name = self.estimator_name if name is None else name
        n = self.scores.shape[1]
        label = f"mean of {n} {self.unit}, 95 % interval" if n > 1 else f"one of the {self.unit}"
        label = label if name is None else f"{name}: {label}"
        # several models may share the axes
        curves = sum(line.get_gid() == "adaptation curve" for line in self.ax_.lines)
        line_kw = {
            "color": CURVES[curves % len(CURVES)],
            "marker": "o",
            "ms": 4,
            "label": label,
            "gid": "adaptation curve",
            **(line_kw or {}),
        }
        (self.line_,) = self.ax_.plot(self.steps, mean, **line_kw)
        self.band_ = None
        if n > 1:
            band_kw = {"color": self.line_.get_color(), "alpha": 0.2, "lw": 0, **(band_kw or {})}
            self.band_ = self.ax_.fill_between(self.steps, low, high, **band_kw)
        self.trained_line_ = None
        if self.trained_steps is not None:
            label = f"steps in meta-training: {self.trained_steps}"
            same = [line for line in self.ax_.lines if line.get_label() == label]
            self.trained_line_ = (
                same[0]
                if same
                else self.ax_.axvline(self.trained_steps, color=BLACK, ls="--", lw=1, label=label)
            )
        if _asks_for_log(mean) and (low > 0).all():
            self.ax_.set_yscale("log")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        self.ax_.set_xlabel("Inner steps (0: before adaptation)")
        self.ax_.set_ylabel(self.score_name)
        self.ax_.legend()
        return self


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

    def __init__(
        self,
        *,
        task: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
        score_name: str,
        greater_is_better: bool,
        unit: str = "tasks",
    ) -> None:
        self.task = task
        self.before = before
        self.after = after
        self.score_name = score_name
        self.greater_is_better = greater_is_better
        self.unit = unit

    @property
    def harmed(self) -> np.ndarray:
        """Tasks that adapting makes worse."""
        worse: np.ndarray = self._gain() < 0
        return worse

    def _gain(self) -> np.ndarray:
        gain = self.after - self.before
        return gain if self.greater_is_better else -gain

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        groups: Any = None,
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
            estimator.
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
        maml, X = _open(estimator, X)
        _check_counts(n_shots=n_shots, n_repeats=n_repeats)
        shown = _Metric(scoring, maml)
        maml, scored = _score_tasks(maml, X, y, groups, n_shots, n_repeats, random_state, (0, None))
        units = _Units(maml, scored)
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
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
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
        if not self.greater_is_better and _asks_for_log(both):
            self.ax_.set_yscale("log")
        first = "best score" if sort == "after" else "largest gain"
        self.ax_.set_xlabel(f"{self.unit.capitalize()}, {first} first")
        if n <= NAMED_TASKS:
            self.ax_.set_xticks(place, self.task[self.order_].tolist(), rotation=45, ha="right")
        self.ax_.set_ylabel(self.score_name)
        self.ax_.legend()
        return self


class MetaTrainingDisplay:
    """Losses of meta-training against meta-updates.

    Make one with `from_estimator`. Its parameters are stored as attributes.

    Parameters
    ----------
    n_updates : int ndarray of shape (n_epochs,)
        Meta-updates at the end of each epoch.
    train_loss : ndarray of shape (n_epochs,)
        Mean query loss after adaptation; NaN where no update of the epoch was finite.
    valid_loss, valid_loss_before : ndarray of shape (n_epochs,), default=None
        Query loss of held-out tasks after and before adaptation; None without held-out tasks.
    non_finite : int ndarray of shape (n_epochs,), default=None
        Skipped meta-updates of each epoch.
    kept : int, default=None
        Epoch whose parameters were kept, counted from 0; None: those of the last.
    loss_name : str, default="Query loss"
        What the losses are.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes drawn on.
    figure_ : matplotlib Figure
        Its figure.
    train_line_, valid_line_, before_line_ : matplotlib Line2D or None
        The losses; None for those that there are not.
    kept_line_ : matplotlib Line2D or None
        Marks the epoch that was kept.
    skipped_ : matplotlib PathCollection or None
        Marks epochs with skipped updates.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> from sklearn_maml.inspection import MetaTrainingDisplay
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=100, random_state=0).fit(X, y, groups=task)
    >>> MetaTrainingDisplay.from_estimator(reg).n_updates
    array([ 50, 100])
    """

    def __init__(
        self,
        *,
        n_updates: np.ndarray,
        train_loss: np.ndarray,
        valid_loss: np.ndarray | None = None,
        valid_loss_before: np.ndarray | None = None,
        non_finite: np.ndarray | None = None,
        kept: int | None = None,
        loss_name: str = "Query loss",
    ) -> None:
        self.n_updates = n_updates
        self.train_loss = train_loss
        self.valid_loss = valid_loss
        self.valid_loss_before = valid_loss_before
        self.non_finite = non_finite
        self.kept = kept
        self.loss_name = loss_name

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> MetaTrainingDisplay:
        """Read the history of a meta-fitted estimator and draw it.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one.
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        display : MetaTrainingDisplay
            With what was read and drawn.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        maml = _find_maml(estimator)
        check_is_fitted(maml, "history_")
        epochs = list(maml.history_)

        def column(name: str) -> np.ndarray:
            return np.array([epoch.get(name, np.nan) for epoch in epochs], dtype=float)

        n_updates = np.cumsum(column("train_batch_count")).astype(int)
        valid, kept = None, None
        if "valid_loss" in epochs[-1]:
            valid = column("valid_loss")
            # a fit that was continued keeps the best of its own epochs
            own = np.where(n_updates > maml.net_.first_update_, valid, np.nan)
            if np.isfinite(own).any():
                kept = int(np.nanargmin(own))
        loss = "cross-entropy" if is_classifier(maml) else "mean squared error"
        standardised = getattr(maml, "normalize_y", False)
        display = cls(
            n_updates=n_updates,
            train_loss=column("train_loss"),
            valid_loss=valid,
            valid_loss_before=None if valid is None else column("valid_loss_before"),
            non_finite=np.nan_to_num(column("non_finite")).astype(int),
            kept=kept,
            loss_name=f"Query loss ({loss}{', standardised targets' if standardised else ''})",
        )
        return display.plot(ax=ax)

    def plot(self, ax: Any = None) -> MetaTrainingDisplay:
        """Draw the losses.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        display : MetaTrainingDisplay
            Itself, with what was drawn as attributes.
        """
        self.ax_ = ax = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = ax.figure
        self.valid_line_ = self.before_line_ = self.kept_line_ = self.skipped_ = None
        few: dict[str, Any] = {}
        if len(self.n_updates) <= 2 * NAMED_TASKS:
            few = {"marker": "o", "ms": 3}
        (self.train_line_,) = ax.plot(
            self.n_updates, self.train_loss, color=BLACK, label="training tasks, adapted", **few
        )
        if self.valid_loss is not None:
            (self.valid_line_,) = ax.plot(
                self.n_updates, self.valid_loss, color=BLUE, label="held-out tasks, adapted", **few
            )
        if self.valid_loss_before is not None:
            (self.before_line_,) = ax.plot(
                self.n_updates,
                self.valid_loss_before,
                color=GREY,
                ls="--",
                label="held-out tasks, before adaptation",
                **few,
            )
        if self.kept is not None:
            at = int(self.n_updates[self.kept])
            self.kept_line_ = ax.axvline(
                at, color=BLUE, ls=":", lw=1.2, label=f"parameters kept: update {at}"
            )
        if self.non_finite is not None and self.non_finite.any():
            skipped = self.n_updates[self.non_finite > 0]
            self.skipped_ = ax.scatter(
                skipped,
                np.full(len(skipped), 0.03),
                transform=ax.get_xaxis_transform(),
                marker="x",
                color=RED,
                label=f"skipped updates (not finite): {self.non_finite.sum()}",
            )
        losses = [self.train_loss, self.valid_loss, self.valid_loss_before]
        if _asks_for_log(np.concatenate([loss for loss in losses if loss is not None])):
            ax.set_yscale("log")
        ax.set_xlabel("Meta-updates")
        ax.set_ylabel(self.loss_name)
        ax.legend(fontsize="small")
        return self


class FewShotFitDisplay:
    """Fits of tasks with one feature: the initialisation, the support rows, the adapted curves.

    Make one with `from_estimator`. Its parameters are stored as attributes.

    Parameters
    ----------
    grid : ndarray of shape (n_points,)
        Values of the feature.
    steps : int ndarray of shape (n_curves,)
        Numbers of inner steps; 0 is the initialisation.
    curves : ndarray of shape (n_tasks, n_curves, n_points)
        Predictions after each of them.
    support : list of (ndarray, ndarray)
        Feature values and targets of the support rows of each task.
    tasks : ndarray of shape (n_tasks,) or None
        Task ids; None for one task without an id.
    feature_name, target_name : str
        Labels of the axes.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Axes of the tasks.
    ax_ : matplotlib Axes
        The first of them.
    figure_ : matplotlib Figure
        Their figure.
    lines_ : ndarray of matplotlib Line2D, of shape (n_tasks, n_curves)
        The curves.
    points_ : list of matplotlib PathCollection
        The support rows of each task.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> from sklearn_maml.inspection import FewShotFitDisplay
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> display = FewShotFitDisplay.from_estimator(reg, X[:10], y[:10], steps=(0, 1, 10))
    >>> display.curves.shape
    (1, 3, 200)
    """

    def __init__(
        self,
        *,
        grid: np.ndarray,
        steps: np.ndarray,
        curves: np.ndarray,
        support: list[tuple[np.ndarray, np.ndarray]],
        tasks: np.ndarray | None = None,
        feature_name: str = "Feature",
        target_name: str = "Target",
    ) -> None:
        self.grid = grid
        self.steps = steps
        self.curves = curves
        self.support = support
        self.tasks = tasks
        self.feature_name = feature_name
        self.target_name = target_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X_support: Any,
        y_support: Any = None,
        *,
        groups: Any = None,
        grid: Any = None,
        steps: Iterable[int] | None = None,
        ax: Any = None,
    ) -> FewShotFitDisplay:
        """Adapt to one or a few tasks and draw the fits.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted regressor of one feature and one target, or a fitted pipeline or search that
            ends in one. It is not changed.
        X_support, y_support : array-like of shape (n_support, 1) and (n_support,)
            Support rows; lists of ``(X, y)`` tasks as in `MAMLRegressor.adapt`.
        groups : array-like of shape (n_support,), default=None
            Task id of each row; None: one task.
        grid : array-like of shape (n_points,), default=None
            Values of the feature to draw the curves at; None covers the support rows and a little
            more.
        steps : iterable of int, default=None
            Numbers of inner steps; None takes 0 (the initialisation), 1 and those of `adapt`.
        ax : matplotlib Axes or array of them, default=None
            Axes to draw on, one for each task; None makes a figure.

        Returns
        -------
        display : FewShotFitDisplay
            With what was computed and drawn.

        Raises
        ------
        TypeError
            If the model is a classifier.
        ValueError
            If it has more than one feature or target.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        pipeline = find_prior(estimator)
        check_is_fitted(pipeline)
        values = _one_feature(X_support, pipeline)
        maml, X = _open(estimator, X_support)
        if is_classifier(maml):
            raise TypeError(
                f"FewShotFitDisplay draws regressions; got a {type(maml).__name__}. See "
                "AdaptationCurveDisplay and TaskScoresDisplay for classifiers."
            )
        maml._check_unchanged()
        tasks = maml._read_tasks(X, y_support, groups)
        if maml.n_outputs_ > 1:
            raise ValueError(
                f"FewShotFitDisplay draws one target, but the model predicts {maml.n_outputs_}."
            )
        if tasks.in_query is not None:
            raise ValueError(
                "FewShotFitDisplay takes support sets only: got tasks of four parts. Pass "
                "[(X_support, y_support), ...]."
            )
        if tasks.n_tasks > NAMED_TASKS:
            raise ValueError(
                f"FewShotFitDisplay draws at most {NAMED_TASKS} tasks side by side; got "
                f"{tasks.n_tasks}. Pass the support rows of fewer tasks."
            )
        if steps is None:
            steps = {0, 1, maml._n_adapt_steps()}
        numbers_of_steps = _check_steps(steps)
        if grid is None:
            margin = 0.1 * (np.ptp(values) or 1.0)
            grid = np.linspace(values.min() - margin, values.max() + margin, GRID_POINTS)
        grid = np.asarray(grid, dtype=float)
        if grid.ndim != 1 or len(grid) == 0 or not np.isfinite(grid).all():
            raise ValueError(
                "grid must be a sequence of finite numbers, the values of the feature to draw "
                f"the curves at; got an array of shape {grid.shape}."
            )
        rows = _open(estimator, _like(X_support, grid))[1]
        rows = np.asarray(rows).astype(tasks.X.dtype)
        codes = np.repeat(np.arange(tasks.n_tasks), len(grid))
        curves = [
            maml._decide(
                maml._adapted_state(tasks, None, n), np.tile(rows, (tasks.n_tasks, 1)), codes
            ).reshape(tasks.n_tasks, -1)
            for n in numbers_of_steps.tolist()
        ]
        of_task = [tasks.rows(j) for j in range(tasks.n_tasks)]
        names = getattr(pipeline, "feature_names_in_", ["Feature"])
        display = cls(
            grid=grid,
            steps=numbers_of_steps,
            curves=np.stack(curves, axis=1),
            support=[(values[r], tasks.y[r].reshape(-1)) for r in of_task],
            tasks=None if tasks.spelling == "single" else tasks.ids,
            feature_name=str(names[0]),
            target_name=str(getattr(y_support, "name", None) or "Target"),
        )
        return display.plot(ax=ax)

    def plot(self, ax: Any = None) -> FewShotFitDisplay:
        """Draw the fits.

        Parameters
        ----------
        ax : matplotlib Axes or array of them, default=None
            Axes to draw on, one for each task; None makes a figure.

        Returns
        -------
        display : FewShotFitDisplay
            Itself, with what was drawn as attributes.
        """
        caller = f"{type(self).__name__}.plot"
        check_matplotlib_support(caller)
        n_tasks = len(self.curves)
        # one legend for all, where the figure has room for it
        outside = ax is None and n_tasks > 1
        self.axes_, n_columns = _side_by_side(ax, n_tasks, caller)
        self.ax_ = self.axes_[0]
        self.figure_ = self.ax_.figure
        self.lines_ = np.empty(self.curves.shape[:2], dtype=object)
        self.points_ = []
        colors = _shades(self.steps)
        for j, ax in enumerate(self.axes_):
            for k, n in enumerate(self.steps.tolist()):
                start = n == 0
                (self.lines_[j, k],) = ax.plot(
                    self.grid,
                    self.curves[j, k],
                    color=colors[k],
                    ls="--" if start else "-",
                    lw=1.2 if start else 1.8,
                    label="initialisation" if start else f"{n} step{'s' if n > 1 else ''}",
                )
            self.points_.append(
                ax.scatter(*self.support[j], s=28, color=BLACK, zorder=3, label="support rows")
            )
            if self.tasks is not None:
                ax.set_title(f"task {self.tasks[j : j + 1].tolist()[0]}", fontsize="medium")
            if j + n_columns >= n_tasks:
                ax.set_xlabel(self.feature_name)
                ax.tick_params(labelbottom=True)
            if j % n_columns == 0:
                ax.set_ylabel(self.target_name)
        if outside:
            handles, labels = self.ax_.get_legend_handles_labels()
            self.figure_.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        else:
            self.ax_.legend()
        return self


def class_permutation_audit(
    estimator: Any,
    X: Any,
    y: Any = None,
    groups: Any = None,
    *,
    n_episodes: int = 100,
    n_permutations: int = 24,
    n_shots: int | None = None,
    random_state: Any = None,
) -> Bunch:
    r"""Measure how much accuracy depends on which class sits at which output.

    A model with `n_ways` outputs starts every episode from an initialisation whose outputs differ,
    so that its accuracy depends on the assignment of classes to outputs, which is arbitrary [1]_.
    The audit adapts to the same support sets with the classes at other outputs, and scores the
    same query rows.

    Parameters
    ----------
    estimator : estimator
        Meta-fitted `MAMLClassifier` with `n_ways`, or a fitted pipeline or search that ends in
        one. It is not changed.
    X, y, groups : tasks
        As in `MAMLClassifier.fit`; best tasks or classes that were not meta-trained on.
    n_episodes : int, default=100
        Episodes to draw, evenly from the tasks. Tasks of four parts are an episode each, and no
        more than there are.
    n_permutations : int, default=24
        Assignments of classes to outputs; all of them if there are no more. The first is that of
        `adapt`, sorted labels; the others are drawn at random.
    n_shots : int, default=None
        Support rows of each class; None takes that of the estimator.
    random_state : int, RandomState instance or None, default=None
        Seeds episodes and permutations; None takes the seed of the estimator.

    Returns
    -------
    audit : Bunch
        `accuracy` of shape (n_episodes, n_permutations); `permutations` of shape (n_permutations,
        n_ways), the output of each class in the order of sorted labels; `mean` over all; `worst`
        and `best`, means over the episodes of the worst and best permutation of each; `std`, mean
        over the episodes of the standard deviation over permutations; `ensemble`, the mean accuracy
        of the average of the probabilities of all permutations.

    Raises
    ------
    ValueError
        If labels are shared by the tasks (`n_ways` None): their outputs are fixed.

    Notes
    -----
    `best` cannot be had in practice: which permutation is the best in an episode shows only in
    its query rows. `ensemble` can, at the price of `n_permutations` adaptations. In an episode of
    fewer classes than `n_ways`, the classes take the first outputs, in the order of the
    permutation.

    References
    ----------
    .. [1] Ye, H.-J. & Chao, W.-L. (2022). How to Train Your MAML to Excel in Few-Shot
       Classification. ICLR.

    Examples
    --------
    >>> from sklearn_maml import MAMLClassifier, class_permutation_audit
    >>> from sklearn_maml.datasets import load_omniglot
    >>> X, y = load_omniglot(return_X_y=True)
    >>> clf = MAMLClassifier(n_ways=3, n_shots=1, n_queries=5, max_iter=5, random_state=0)
    >>> clf = clf.fit(X[:2000], y[:2000])
    >>> audit = class_permutation_audit(clf, X[2000:3000], y[2000:3000], n_episodes=10)
    >>> audit.accuracy.shape
    (10, 6)
    >>> bool(audit.worst <= audit.mean <= audit.best)
    True
    """
    _check_counts(n_shots=n_shots)
    for name, value in (("n_episodes", n_episodes), ("n_permutations", n_permutations)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")
    maml, X = _open(estimator, X)
    n_ways = maml._n_ways()
    if n_ways is None:
        raise ValueError(
            f"class_permutation_audit is for models with n_ways, whose labels mean something "
            f"inside a task only; this {type(maml).__name__} has n_ways=None: every class has an "
            "output of its own, and there is nothing to permute."
        )
    check_is_fitted(maml)
    rng = check_random_state(maml._score_seed if random_state is None else random_state)
    seeds = rng.randint(2**31 - 1, size=2).tolist()
    maml, scored = _score_tasks(
        maml, X, y, groups, n_shots, -(-n_episodes // SCORED_EPISODES), seeds[0], ()
    )
    support, rows, codes = _choose_episodes(scored, n_episodes)
    permutations = _draw_permutations(n_ways, n_permutations, np.random.default_rng(seeds[1]))
    # position of each row's class among the sorted classes of its episode
    labels, positions = np.unique(support.y, return_inverse=True)
    present = np.zeros((support.n_tasks, len(labels)), dtype=bool)
    present[support.codes, positions] = True
    rank_of = present.cumsum(1) - 1
    ranks = rank_of[support.codes, positions]
    truth = rank_of[codes, np.searchsorted(labels, scored.tasks.y[rows])]
    query = maml._reshape(scored.tasks.X[rows])
    n_query = np.bincount(codes)
    steps = maml._n_adapt_steps()
    accuracy = np.empty((support.n_tasks, len(permutations)))
    total = np.zeros((len(rows), n_ways))
    for k, permutation in enumerate(permutations):
        # labels in another order: `adapt` puts sorted labels to outputs
        state = maml._adapted_state(support.with_y(permutation[ranks]), None, steps)
        logits, slots = maml._logits(state, query, codes)
        assert state.labels is not None
        predicted = state.labels[slots[np.arange(len(rows)), logits.argmax(1)]]
        accuracy[:, k] = np.bincount(codes, predicted == permutation[truth]) / n_query
        wide = np.zeros_like(total)
        wide[:, state.labels] = maml._probabilities(state, query, codes)
        total += wide[:, permutation]
    ensemble = np.bincount(codes, total.argmax(1) == truth) / n_query
    return Bunch(
        accuracy=accuracy,
        permutations=permutations,
        mean=float(accuracy.mean()),
        worst=float(accuracy.min(1).mean()),
        best=float(accuracy.max(1).mean()),
        std=float(accuracy.std(1).mean()),
        ensemble=float(ensemble.mean()),
    )


# -- what the displays share ---------------------------------------------------------------------


def _find_maml(estimator: Any) -> BaseMAML:
    model = find_prior(estimator)
    while isinstance(model, Pipeline):
        model = find_prior(model.steps[-1][1])
    assert isinstance(model, BaseMAML)
    return model


def _open(estimator: Any, X: Any) -> tuple[Any, Any]:
    """Copy of the MAML estimator in a model, which may change, and rows as it sees them."""
    model = find_prior(estimator)
    if isinstance(model, Pipeline):
        X = transform_rows(model, X)
    return copy.copy(_find_maml(model)), X


def _trained_steps(maml: BaseMAML) -> int | None:
    """Inner steps of the meta-training; `steps` may have been changed since."""
    net = maml.__dict__.get("net_")
    return None if net is None else int(net.steps)


def _check_steps(steps: Iterable[int]) -> np.ndarray:
    given = list(steps)
    for n in given:
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 0:
            raise ValueError(f"steps must be numbers of inner steps, 0 or more; got {n!r}.")
    if not given:
        raise ValueError("steps is empty. Give at least one number of inner steps, such as 0.")
    return np.unique(np.array(given, dtype=int))


def _steps_around(trained: int) -> np.ndarray:
    """From 0 to about twice the trained number, which is one of them."""
    most = max(2 * trained, 5)
    return np.array([*range(0, most + 1, -(-most // CURVE_POINTS)), trained])


class _Metric:
    """A scorer, with its name and sign as they are shown: errors are positive."""

    def __init__(self, scoring: Any, maml: BaseMAML) -> None:
        if scoring is None:
            scoring = "accuracy" if is_classifier(maml) else "neg_root_mean_squared_error"
        self.scorer = get_scorer(scoring)
        self.sign = 1
        if isinstance(scoring, str):
            self.sign = -1 if scoring.startswith("neg_") else 1
            name = scoring.removeprefix("neg_").replace("_", " ")
            self.name = "R²" if name == "r2" else name[0].upper() + name[1:]
        else:
            of = getattr(scoring, "_score_func", scoring)
            self.name = f"Score ({getattr(of, '__name__', type(of).__name__)})"

    def of_units(self, maml: Any, scored: Scored, state: State, units: _Units) -> np.ndarray:
        """Score each of the units."""
        return np.array(
            [
                self.sign * _apply(self.scorer, maml, scored, state, units.codes == j)
                for j in range(len(units.ids))
            ]
        )


class _Units:
    """What a score is computed for: tasks, or the episodes of a task that is the only one."""

    def __init__(self, maml: BaseMAML, scored: Scored) -> None:
        if scored.tasks.n_tasks > 1:
            self.word, self.ids = "tasks", scored.tasks.ids
            self.codes = scored.task[scored.codes]
        else:
            self.word = "splits" if maml._n_ways() is None else "episodes"
            self.ids, self.codes = np.arange(len(scored.task)), scored.codes


def _mean_interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis and its 95 % interval."""
    mean, n = scores.mean(1), scores.shape[1]
    if n == 1:
        return mean, mean, mean
    width = stdtrit(n - 1, 0.975) * scores.std(1, ddof=1) / np.sqrt(n)
    return mean, mean - width, mean + width


def _asks_for_log(values: np.ndarray) -> bool:
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > LOG_RANGE * values.min())


def _check_sort(sort: str) -> None:
    if sort not in ("after", "gain"):
        raise ValueError(
            f"sort={sort!r} is not known; expected 'after' (the score after adaptation) or 'gain'."
        )


def _axes(ax: Any, caller: str) -> Any:
    check_matplotlib_support(caller)
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(layout="constrained")
    return ax


def _side_by_side(ax: Any, n_tasks: int, caller: str) -> tuple[np.ndarray, int]:
    """Axes for as many tasks, and how many there are in a row."""
    if ax is None:
        import matplotlib.pyplot as plt

        n_columns = n_tasks if n_tasks <= 4 else -(-n_tasks // -(-n_tasks // 4))
        n_rows = -(-n_tasks // n_columns)
        size = (6.4, 4.8) if n_tasks == 1 else (3.2 * n_columns, 2.9 * n_rows)
        _, axes = plt.subplots(
            n_rows,
            n_columns,
            figsize=size,
            layout="constrained",
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for empty in axes.flat[n_tasks:]:
            empty.remove()
        return np.asarray(axes.flat[:n_tasks]), n_columns
    axes = np.array([ax], dtype=object).ravel() if not np.iterable(ax) else np.asarray(ax).ravel()
    if len(axes) != n_tasks:
        raise ValueError(
            f"{caller} got {len(axes)} axes for {n_tasks} task(s). Pass an array with one for "
            "each, or leave ax out."
        )
    return axes, n_tasks


def _shades(steps: np.ndarray) -> list[Any]:
    """Grey for the initialisation, then from light to dark."""
    from matplotlib import colormaps

    n = max(int((steps > 0).sum()), 1)
    shades = iter(colormaps["viridis_r"](np.linspace(0.3, 0.85, n) if n > 1 else [0.7]))
    return [GREY if k == 0 else next(shades) for k in steps.tolist()]


def _one_feature(X: Any, model: Any) -> np.ndarray:
    """Values of the only feature, in the order of a task collection's rows."""
    n_features = getattr(model, "n_features_in_", 1)
    if n_features != 1:
        raise ValueError(
            f"FewShotFitDisplay draws a model of one feature, but this one has {n_features} "
            "features. Use AdaptationCurveDisplay or TaskScoresDisplay."
        )
    if is_task_list(X, None):
        X = concatenate_rows([task[0] for task in X])
    values = np.asarray(X, dtype=float)
    if values.ndim < 2 or values.shape[-1] != 1:
        raise ValueError(
            f"X_support must have one column, the feature; got an array of shape {values.shape}."
        )
    return values.ravel()


def _like(X: Any, grid: np.ndarray) -> Any:
    """Rows of a grid in the container of the support rows, so that names are kept."""
    if is_task_list(X, None):
        X = X[0][0]
    if is_frame(X):
        return type(X)({X.columns[0]: grid})
    return grid[:, None]


def _choose_episodes(
    scored: Scored, n_episodes: int
) -> tuple[TaskCollection, np.ndarray, np.ndarray]:
    """Take episodes evenly from those that were drawn; return support, query rows and codes."""
    drawn = np.arange(len(scored.task))
    if scored.tasks.in_query is not None:  # as given: repeats tell nothing new
        drawn = np.unique(scored.task, return_index=True)[1]
    n_episodes = min(n_episodes, len(drawn))
    chosen = drawn[np.arange(n_episodes) * len(drawn) // n_episodes]
    position = np.full(len(scored.task), -1)
    position[chosen] = np.arange(n_episodes)
    codes = position[scored.codes]
    return scored.support.select(chosen), scored.rows[codes >= 0], codes[codes >= 0]


def _draw_permutations(n: int, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Different permutations, the identity first; all of them if there are no more."""
    if math.factorial(n) <= n_permutations:
        return np.array(list(itertools.permutations(range(n))))
    drawn: dict[tuple[int, ...], None] = {tuple(range(n)): None}
    while len(drawn) < n_permutations:
        drawn[tuple(rng.permutation(n).tolist())] = None
    return np.array(list(drawn))
