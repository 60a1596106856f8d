"""Predictions of numbers, and between which numbers targets are."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklearn_maml._types import Tasks
from sklearn_maml.estimators.prediction import Predicting
from sklearn_maml.learners.base import no_std


class PredictingNumbers(Predicting):
    """Predicts numbers, and how far off they may be."""

    @overload
    def predict(
        self,
        X: Tasks,
        *,
        groups: ArrayLike | None = None,
        return_std: Literal[False] = False,
        return_quantiles: None = None,
    ) -> NDArray[Any]: ...

    @overload
    def predict(
        self,
        X: Tasks,
        *,
        groups: ArrayLike | None = None,
        return_std: Literal[True],
        return_quantiles: None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

    @overload
    def predict(
        self,
        X: Tasks,
        *,
        groups: ArrayLike | None = None,
        return_std: bool = False,
        return_quantiles: ArrayLike,
    ) -> tuple[NDArray[Any], ...]: ...

    def predict(
        self,
        X: Tasks,
        *,
        groups: ArrayLike | None = None,
        return_std: bool = False,
        return_quantiles: ArrayLike | None = None,
    ) -> Any:
        """Predict with the parameters adapted to the task of each row.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.
        groups : array-like of shape (n_queries,), default=None
            Task id of each row, if `adapt` was called with task ids.
        return_std : bool, default=False
            Whether to return the standard deviations of the targets, too: of a new observation,
            noise included. They come from the Gaussian head, calibrated on held-out tasks;
            ``y +- 1.645 std`` is meant to hold nine targets in ten of a new task. With
            ``loss="quantile"`` they are about the middle of the targets, not about the quantile.
        return_quantiles : array-like of shape (n_quantiles,), default=None
            Levels, such as ``(0.05, 0.95)`` for the ends of intervals that hold nine targets in
            ten, of quantiles to return, too: those of a Student distribution about the
            prediction, whose degrees of freedom held-out tasks choose, so that intervals of 50 %
            and of 90 % hold their part both where errors have heavy tails. For the losses
            "squared_error", "absolute_error" and "huber".

        Returns
        -------
        y : ndarray of shape (n_queries,) or (n_queries, n_outputs)
            Predicted values.
        std : ndarray of the same shape
            Only if `return_std`. In the units of y.
        quantiles : ndarray of that shape and one more axis of length n_quantiles
            Only with `return_quantiles`.

        Raises
        ------
        NotAdaptedError
            If `adapt` was not called, unless `unseen_tasks` is "prior".
        ValueError
            If a task id was not adapted to, likewise; with `return_std` or `return_quantiles`,
            without a Gaussian head; with `return_quantiles`, for levels that are not between 0
            and 1, and other losses.
        """
        state, rows, codes, shape_like = self._rows_to_predict(X, groups)
        if not return_std and return_quantiles is None:
            return shape_like(self._decide(state, rows, codes))
        multiples = None if return_quantiles is None else self._multiples(return_quantiles)
        outputs, std = self._outputs_and_std(state, rows, codes)
        std = self._finite(self.targets_.decode_std(std).astype(rows.dtype))
        values = self._finite(self.targets_.decode(outputs, codes, state))
        answers = [values, std] if return_std else [values]
        if multiples is not None:
            of_outputs = multiples if values.ndim > 1 else multiples[0]
            quantiles = values[..., None] + std[..., None] * of_outputs
            answers.append(quantiles.astype(rows.dtype))
        return tuple(map(shape_like, answers))

    def _multiples(self, levels: ArrayLike) -> np.ndarray:
        """Distances (n_outputs, n_levels) of quantiles from predictions, in deviations."""
        asked = np.asarray(levels)
        numbers = asked.ndim == 1 and asked.dtype.kind in "fiu"
        if not numbers or not ((asked > 0) & (asked < 1)).all():
            raise ValueError(
                f"return_quantiles has to be a sequence of levels between 0 and 1, such as "
                f"(0.05, 0.95); got {levels!r}."
            )
        if self.calibration_ is None:
            raise ValueError(no_std("this model", "return_quantiles"))
        if not self._learner.head.likelihood.is_centered:
            raise ValueError(
                "return_quantiles is for losses whose targets are about as far above predictions "
                "as below, 'squared_error', 'absolute_error' and 'huber'; got "
                f"loss={self.loss!r}. Ask for return_std, or fit with loss='quantile' for one "
                "quantile."
            )
        return self.calibration_.multiples(asked.astype(np.float64))
