"""Scores against the number of inner steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._types import Tasks
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.evaluation.scoring import check_counts, score_tasks
from sklearn_maml.inspection.shared import (
    BLACK,
    BLUE,
    RED,
    Metric,
    Units,
    asks_for_log,
    axes,
    check_steps,
    open_copy,
    share_of_steps,
    shares_in_words,
)

CURVES = [BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
# points of a curve
CURVE_POINTS = 10


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
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
    learners : str, default=None
        Which learners predict, where they are not gradient steps alone: the steps of their part
        change along the curve, and 0 is before any of them has adapted.

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

    steps: np.ndarray
    scores: np.ndarray
    trained_steps: int | None
    score_name: str
    unit: str = "tasks"
    estimator_name: str | None = None
    learners: str | None = None

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Tasks,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
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
            estimator, 0 is before any of them.
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
        maml, X = open_copy(estimator, X)
        check_is_fitted(maml)
        model = maml.task_model()
        trained = _trained_steps(maml) if share_of_steps(maml) else None
        numbers_of_steps = check_steps(
            _steps_around(trained or model.n_steps) if steps is None else steps
        )
        check_counts(n_shots=n_shots, n_repeats=n_repeats)
        shown = Metric(scoring, maml)
        maml, scored = score_tasks(maml, X, y, groups, n_shots, n_repeats, random_state, ())
        units = Units(maml, scored)
        # one state at a time: of many tasks, all of them would not fit
        scores = [
            shown.of_units(maml, scored, model.adapt(scored.support, None, n), units)
            for n in numbers_of_steps.tolist()
        ]
        display = cls(
            steps=numbers_of_steps,
            scores=np.array(scores),
            trained_steps=trained,
            score_name=shown.name,
            unit=units.word,
            estimator_name=name,
            learners=shares_in_words(maml),
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
        self.ax_ = axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        mean, low, high = _mean_interval(self.scores)
        name = self.estimator_name if name is None else name
        n = self.scores.shape[1]
        label = f"mean of {n} {self.unit}, 95 % interval" if n > 1 else f"one of the {self.unit}"
        label = label if self.learners is None else f"{label} ({self.learners})"
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
        if asks_for_log(mean) and (low > 0).all():
            self.ax_.set_yscale("log")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        self.ax_.set_xlabel("Inner steps (0: before adaptation)")
        self.ax_.set_ylabel(self.score_name)
        self.ax_.legend()
        return self


def _trained_steps(maml: BaseMAML) -> int | None:
    """Inner steps of the meta-training; `steps` may have been changed since."""
    net = maml.__dict__.get("net_")
    return None if net is None else int(net.steps)


def _steps_around(trained: int) -> np.ndarray:
    """From 0 to about twice the trained number, which is one of them."""
    most = max(2 * trained, 5)
    return np.array([*range(0, most + 1, -(-most // CURVE_POINTS)), trained])


def _mean_interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, n = scores.mean(1), scores.shape[1]
    if n == 1:
        return mean, mean, mean
    width = stdtrit(n - 1, 0.975) * scores.std(1, ddof=1) / np.sqrt(n)
    return mean, mean - width, mean + width
