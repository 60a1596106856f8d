"""Losses of meta-training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.estimators.models import open_chain
from sklearn_maml.inspection.shared import (
    BLACK,
    BLUE,
    GREY,
    NAMED_TASKS,
    RED,
    asks_for_log,
    axes,
    shares_in_words,
)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
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
    steps_valid_loss : ndarray of shape (n_epochs,), default=None
        Query loss of held-out tasks after gradient steps, where they are trained beside a Gaussian
        head; NaN from where they were given up.
    learners : str, default=None
        Which learners predict, where they are not gradient steps alone.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes drawn on.
    figure_ : matplotlib Figure
        Its figure.
    train_line_, valid_line_, before_line_ : matplotlib Line2D or None
        The losses; None for those that there are not.
    steps_line_ : matplotlib Line2D or None
        The loss of gradient steps beside a Gaussian head.
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
    >>> reg = MAMLRegressor(update_rule="sgd", max_iter=100, random_state=0)
    >>> reg = reg.fit(X, y, groups=task)
    >>> MetaTrainingDisplay.from_estimator(reg).n_updates
    array([ 50, 100])
    """

    n_updates: np.ndarray
    train_loss: np.ndarray
    valid_loss: np.ndarray | None = None
    valid_loss_before: np.ndarray | None = None
    non_finite: np.ndarray | None = None
    kept: int | None = None
    loss_name: str = "Query loss"
    steps_valid_loss: np.ndarray | None = None
    learners: str | None = None

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
        _, maml = open_chain(estimator)
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
            goes_on = maml.net_.first_update_ > 0  # and may have kept what it started from
            at_start = goes_on and maml.net_.best_update_ == maml.net_.first_update_
            if np.isfinite(own).any() and not at_start:
                kept = int(np.nanargmin(own))
        # until they are given up
        of_steps = column("steps_valid_loss")
        loss = maml.targets_.loss
        units = ""
        if (loss.standardises or loss.scales) and maml.normalize_y:
            units = (
                f", {'standardised targets' if loss.standardises else 'targets over their mean'}"
            )
        display = cls(
            n_updates=n_updates,
            train_loss=column("train_loss"),
            valid_loss=valid,
            valid_loss_before=None if valid is None else column("valid_loss_before"),
            non_finite=np.nan_to_num(column("non_finite")).astype(int),
            kept=kept,
            loss_name=f"Query loss ({loss.name}{units})",
            steps_valid_loss=of_steps if np.isfinite(of_steps).any() else None,
            learners=shares_in_words(maml),
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
        self.ax_ = ax = axes(ax, f"{type(self).__name__}.plot")
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
        self.steps_line_ = None
        if self.steps_valid_loss is not None:
            (self.steps_line_,) = ax.plot(
                self.n_updates,
                self.steps_valid_loss,
                color=RED,
                label="held-out tasks, gradient steps",
                **few,
            )
        if self.learners is not None:
            ax.set_title(f"Predictions: {self.learners}", fontsize="medium")
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
        if asks_for_log(np.concatenate([loss for loss in losses if loss is not None])):
            ax.set_yscale("log")
        ax.set_xlabel("Meta-updates")
        ax.set_ylabel(self.loss_name)
        ax.legend(fontsize="small")
        return self
