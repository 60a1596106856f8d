"""What the y of a classifier means: one class of a row, or any number of labels."""

from __future__ import annotations

from typing import Any, ClassVar

from sklearn_maml.estimators.building import Building
from sklearn_maml.heads import SymmetricHead, find_head
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.base import Targets
from sklearn_maml.targets.classes import ClassTargets
from sklearn_maml.targets.labels import LabelTargets


class ClassesOrLabels(Building):
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
