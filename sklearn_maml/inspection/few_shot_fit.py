"""Fits of tasks with one feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_maml.data.frames import is_frame
from sklearn_maml.data.spellings import concatenate_rows, is_task_list
from sklearn_maml.inspection.shared import (
    BLACK,
    GREY,
    NAMED_TASKS,
    check_steps,
    open_copy,
    share_of_steps,
    shares_in_words,
)

# points of a curve against the feature
GRID_POINTS = 200


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FewShotFitDisplay:
    """Fits of tasks with one feature: the initialisation, the support rows, the adapted curves.

    Make one with `from_estimator`. Its parameters are stored as attributes.

    Parameters
    ----------
    grid : ndarray of shape (n_points,)
        Values of the feature.
    steps : int ndarray of shape (n_curves,)
        Numbers of inner steps; 0 is before adaptation.
    curves : ndarray of shape (n_tasks, n_curves, n_points)
        Predictions after each of them.
    support : list of (ndarray, ndarray)
        Feature values and targets of the support rows of each task.
    tasks : ndarray of shape (n_tasks,) or None
        Task ids; None for one task without an id.
    feature_name, target_name : str
        Labels of the axes.
    learners : str or None
        Which learners predict, where they are not gradient steps alone.

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

    grid: np.ndarray
    steps: np.ndarray
    curves: np.ndarray
    support: list[tuple[np.ndarray, np.ndarray]]
    tasks: np.ndarray | None = None
    feature_name: str = "Feature"
    target_name: str = "Target"
    learners: str | None = None

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
            Numbers of inner steps; None takes 0 (before adaptation), 1 and those of `adapt`. Where
            gradient steps have no share of predictions, all but 0 give one curve.
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
        values = _one_feature(X_support, estimator)
        maml, X = open_copy(estimator, X_support)
        if is_classifier(maml):
            raise TypeError(
                f"FewShotFitDisplay draws regressions; got a {type(maml).__name__}. See "
                "AdaptationCurveDisplay and TaskScoresDisplay for classifiers."
            )
        model = maml.task_model()
        model.check_unchanged()
        tasks = model.read(X, y_support, groups)
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
            last = model.n_steps
            steps = {0, 1, last} if share_of_steps(maml) else {0, max(last, 1)}
        numbers_of_steps = check_steps(steps)
        if grid is None:
            margin = 0.1 * (np.ptp(values) or 1.0)
            grid = np.linspace(values.min() - margin, values.max() + margin, GRID_POINTS)
        grid = np.asarray(grid, dtype=float)
        if grid.ndim != 1 or len(grid) == 0 or not np.isfinite(grid).all():
            raise ValueError(
                "grid must be a sequence of finite numbers, the values of the feature to draw "
                f"the curves at; got an array of shape {grid.shape}."
            )
        rows = open_copy(estimator, _like(X_support, grid))[1]
        rows = np.asarray(rows).astype(tasks.X.dtype)
        codes = np.repeat(np.arange(tasks.n_tasks), len(grid))
        curves = [
            model.predict(
                model.adapt(tasks, None, n), np.tile(rows, (tasks.n_tasks, 1)), codes
            ).reshape(tasks.n_tasks, -1)
            for n in numbers_of_steps.tolist()
        ]
        of_task = [tasks.rows(j) for j in range(tasks.n_tasks)]
        names = getattr(
            estimator, "feature_names_in_", getattr(maml, "feature_names_in_", ["Feature"])
        )
        display = cls(
            grid=grid,
            steps=numbers_of_steps,
            curves=np.stack(curves, axis=1),
            support=[(values[r], tasks.y[r].reshape(-1)) for r in of_task],
            tasks=None if tasks.spelling == "single" else tasks.ids,
            feature_name=str(names[0]),
            target_name=str(getattr(y_support, "name", None) or "Target"),
            learners=shares_in_words(maml),
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
                    label=self._label(n),
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

    def _label(self, n: int) -> str:
        if self.learners is None:
            return f"{n} step{'s' if n > 1 else ''}" if n else "initialisation"
        if n == 0:
            return "before adaptation"
        return f"{n} steps ({self.learners})" if "steps" in self.learners else self.learners


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
