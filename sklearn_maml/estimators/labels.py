"""What the y of a classifier means: one class of a row, or any number of labels."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from sklearn_maml._compat import with_callbacks
from sklearn_maml._types import TaskDistribution, Tasks, Weights
from sklearn_maml._validation import keeps_state_on_error
from sklearn_maml.data.ids import as_array
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.heads import SymmetricHead, find_head
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.base import Targets
from sklearn_maml.targets.classes import ClassTargets
from sklearn_maml.targets.labels import LabelTargets
from sklearn_maml.threads import one_thread


class ClassesOrLabels(BaseMAML):
    """Makes targets by the parameter `loss`, and heads that treat classes alike."""

    __stored_attributes__: ClassVar = tuple(
        dict.fromkeys((*ClassTargets.learned, *LabelTargets.learned))
    )

    @property
    def _targets_class(self) -> type[Targets]:  # type: ignore[override]
        return LabelTargets if self.loss == "binary" else ClassTargets

    def _make_targets(self) -> ClassTargets | LabelTargets:
        if self.loss not in ("cross_entropy", "binary"):
            raise ValueError(
                f"loss={self.loss!r} is not for classes or labels. Expected 'cross_entropy' or "
                "'binary'."
            )
        if self.loss == "cross_entropy":
            return ClassTargets(self._integer("n_ways"), self.class_weight)
        for name, default in (("n_ways", None), ("class_weight", None), ("head", "free")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is about classes, of which a row has one, but "
                    f"loss='binary' is for labels. Use {name}={default!r}."
                )
        return LabelTargets()

    def _symmetric_head(self, learner: Any) -> SymmetricHead | None:
        if self.head == "free":
            return None
        for name, value in (
            ("alpha", self._alpha()),
            ("steps", self._n_steps()),
            ("adapt_steps", self._n_adapt_steps()),
        ):
            if not value:
                raise ValueError(
                    f"head={self.head!r} starts with equal outputs for all classes, which inner "
                    f"steps alone tell apart, but {name}={value!r}. Use a positive one in fit, or "
                    "head='free'."
                )
        module = learner.module
        rule = self._gradient_rule()
        head = find_head(
            module, self.head, rule, adapted_names(module, self.adapted), self.targets_.n_outputs
        )
        p = next(module.parameters())
        head.check(module, self._reshape(p.new_zeros(1, *self.feature_shape_)))
        return head

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
        X, y, groups, sample_weight : tasks
            Rows of some tasks, or tasks, as in `fit`. A task is better learned from whole than in
            pieces; few tasks at a time will do where the first call had 4 or more.
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
