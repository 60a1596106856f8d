"""Targets that are labels, of which a row may have any number."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.targets.base import Coding
from sklearn_maml.targets.losses import BinaryCrossEntropy
from sklearn_maml.targets.real import RealTargets


class LabelTargets(RealTargets):
    """Columns of 0 and 1, one for each label, that all tasks share; outputs are their logits."""

    word: ClassVar[str] = "label"
    learned: ClassVar[tuple[str, ...]] = (*RealTargets.learned, "classes_")

    classes_: np.ndarray

    def __init__(self) -> None:
        super().__init__(BinaryCrossEntropy(), normalize_y=False, center_y=False)

    def learn(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """See `Targets`."""
        if tasks.y.ndim == 1:
            raise ValueError(
                "loss='binary' is for labels of shape (n_rows, n_labels), 0 or 1, but y has one "
                "axis. Use y[:, None] for a single label, or loss='cross_entropy' for classes."
            )
        super().learn(tasks, sample_weight)
        # of a single label they are its values: metrics look for the positive one there
        self.classes_ = np.arange(max(self.n_outputs_, 2))

    def decode(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """See `Targets`: the labels that are likelier than not."""
        return (outputs > 0).astype(np.intp)

    def probabilities(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """Probability of each label."""
        return self.loss.predict(outputs)

    def decision(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """Logit of each label."""
        return outputs
