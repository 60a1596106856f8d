"""Meta-training on classes of tasks that come in parts."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from sklearn_maml._compat import with_callbacks
from sklearn_maml._types import TaskDistribution, Tasks, Weights
from sklearn_maml._validation import keeps_state_on_error
from sklearn_maml.data.ids import as_array
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.threads import one_thread


class ContinuingClasses(BaseMAML):
    """Knows the labels of parts to come."""

    @one_thread()
    @keeps_state_on_error
    @with_callbacks
    def partial_fit(
        self,
        X: Tasks | TaskDistribution,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sample_weight: Weights = None,
        *,
        classes: ArrayLike | None = None,
    ) -> Self:
        """Go on with meta-training on more tasks, or begin it; see `MAMLRegressor.partial_fit`.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features), list of tasks, 3-D array, or distribution
            Rows of some tasks, or tasks, as in `fit`. A task is better learned from whole than in
            pieces; few tasks at a time will do where the first call had 4 or more.
        y : array-like of shape (n_rows,), default=None
            Labels.
        groups : array-like of shape (n_rows,) or (n_rows, n_parts), default=None
            Task id of each row.
        sample_weight : array-like of shape (n_rows,), str or dict, default=None
            Weights of the rows or tasks, as in `fit`.
        classes : array-like of shape (n_classes,), default=None
            Labels of all calls. None takes those of the first call, and later calls may have
            no others; not needed with `n_ways`.

        Returns
        -------
        self : object
            The meta-fitted estimator.

        Raises
        ------
        ValueError
            If a parameter or the data is not valid, or if `classes` are not those of earlier
            calls; the estimator is left as it was.
        """
        named = classes is not None and self.n_ways is None and hasattr(self, "net_")
        if named and self.targets_.are_classes:
            given = np.unique(as_array(classes))
            if not np.array_equal(given, self.classes_):
                raise ValueError(
                    f"classes={given.tolist()} are not those of the calls before, "
                    f"{self.classes_.tolist()}. Name all labels in the first call."
                )
        return self._fit(X, y, groups, sample_weight, continued=True, partial=True, classes=classes)
