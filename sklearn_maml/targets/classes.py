"""Targets that are class labels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from sklearn_maml.data.ids import as_array
from sklearn_maml.data.sampling import VALIDATION_QUERIES_OF_CLASS
from sklearn_maml.data.splitting import name_of
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.targets.base import Coding, Targets
from sklearn_maml.targets.losses import CrossEntropy


class ClassTargets(Targets):
    """Class labels, which tasks share or, with `n_ways`, mean something inside a task only.

    Parameters
    ----------
    n_ways : int or None
    class_weight : dict, "balanced" or None, default=None
        Of labels that tasks share.
    """

    are_classes: ClassVar[bool] = True
    word: ClassVar[str] = "class"
    learned: ClassVar[tuple[str, ...]] = ("classes_", "class_weight_")
    validation_queries: ClassVar[int] = VALIDATION_QUERIES_OF_CLASS

    classes_: np.ndarray
    class_weight_: np.ndarray | None = None

    def __init__(self, n_ways: int | None, class_weight: Any = None) -> None:
        super().__init__(CrossEntropy())
        self.n_ways = n_ways
        self.class_weight = class_weight

    @property
    def n_outputs(self) -> int:
        """Outputs of the network: one for each class, of all or of an episode."""
        return len(self.classes_) if self.n_ways is None else int(self.n_ways)

    def declare(self, classes: Any) -> None:
        """Tell the labels that tasks share before tasks with all of them have come."""
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' is about the rows of all tasks, and partial_fit gets some "
                "of them. Use a dict of weights."
            )
        if classes is not None:
            self.classes_ = np.unique(as_array(classes))

    def learn_on(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """See `Targets`; there is nothing."""

    def learn(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """See `Targets`."""
        declared = vars(self).get("classes_")
        if declared is None or self.n_ways is not None:
            self.classes_ = np.unique(tasks.y)
        self.class_weight_ = None
        if self.class_weight is None:
            return
        if self.n_ways is not None:
            raise ValueError(
                f"class_weight={self.class_weight!r} is for labels that the tasks share, but "
                f"n_ways={self.n_ways}: labels mean something inside their task only, and every "
                "episode has as many rows of each class. Use class_weight=None."
            )
        weights = _class_weights(self.class_weight, self.classes_, tasks.y, sample_weight)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(
                f"class_weight has to have positive numbers; got {weights.tolist()} for the "
                f"classes {self.classes_.tolist()}. Leave out the rows of classes that are not to "
                "count."
            )
        self.class_weight_ = weights

    def weights(self, y: np.ndarray, sample_weight: np.ndarray | None) -> np.ndarray | None:
        """See `Targets`: those of the classes are factors of them."""
        of_class = self.class_weight_
        if of_class is None or of_class.min() == of_class.max():
            return sample_weight
        return of_class[y] if sample_weight is None else of_class[y] * sample_weight

    def settings(self) -> dict[str, Any]:
        """See `Targets`."""
        return {**super().settings(), "class_weight": str(self.class_weight)}

    def sampling(self) -> dict[str, Any]:
        """See `Targets`: the weights of classes are those of rows as they come."""
        return {**super().sampling(), "as_they_come": self.class_weight_ is not None}

    def encode(self, tasks: TaskCollection) -> TaskCollection:
        """See `Targets`."""
        if self.n_ways is not None:  # labels mean something inside their task only
            return tasks.having(y=np.unique(tasks.y, return_inverse=True)[1].reshape(-1))
        y = self._positions(tasks.y)
        return tasks.having(y=y, weight=self.weights(y, tasks.weight))

    def _positions(self, y: np.ndarray) -> np.ndarray:
        if not len(y):  # of whatever type
            return np.zeros(0, dtype=np.intp)
        unseen = np.setdiff1d(y, self.classes_)
        if len(unseen):
            raise ValueError(
                f"y contains labels that were not seen in fit: {unseen[:5].tolist()}. Labels are "
                f"shared by the tasks (n_ways=None), and fit saw {self.classes_[:10].tolist()}. "
                "Meta-fit with n_ways if every task has labels of its own; where tasks come in "
                "parts, name all labels in partial_fit(..., classes=)."
            )
        return np.searchsorted(self.classes_, y)

    def encode_support(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None
    ) -> tuple[np.ndarray, Coding]:
        """See `Targets`; of labels that are local, in sorted order."""
        if self.n_ways is None:
            return self._positions(tasks.y), Coding()
        if (tasks.sizes == 0).any():
            without = tasks.ids[tasks.sizes == 0]
            raise ValueError(
                f"{len(without)} task(s) have no labelled rows, such as {without[:3].tolist()}: "
                "with n_ways labels mean something inside their task only, so there are no classes "
                "to predict. Give labelled rows of each, or meta-fit with n_ways=None."
            )
        labels, codes = np.unique(tasks.y, return_inverse=True)
        cells = tasks.codes.astype(np.intp) * len(labels) + codes.reshape(-1)
        key, inverse = np.unique(cells, return_inverse=True)
        task = key // len(labels)
        rank = np.arange(len(key)) - np.searchsorted(task, np.arange(tasks.n_tasks))[task]
        n_classes = np.bincount(task, minlength=tasks.n_tasks)
        if n_classes.max() > self.n_ways:
            j = int(n_classes.argmax())
            raise ValueError(
                f"The support set{name_of(tasks, j)} has {n_classes[j]} classes, but the head has "
                f"n_ways={self.n_ways} outputs. Give at most {self.n_ways} classes, or meta-fit "
                "with a larger n_ways."
            )
        slots = np.full((tasks.n_tasks, self.n_ways), -1)
        slots[task, rank] = key % len(labels)
        return rank[inverse.reshape(-1)], Coding(slots=slots, labels=labels)

    def logits(
        self, outputs: np.ndarray, codes: np.ndarray, coding: Coding
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits of the head, lowest where a task lacks the class; class of each output."""
        if coding.slots is None:
            return outputs, None
        slots = coding.slots[codes]
        return np.where(slots >= 0, outputs, np.finfo(outputs.dtype).min), slots

    def decode(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """See `Targets`."""
        logits, slots = self.logits(outputs, codes, coding)
        best = logits.argmax(1)
        if slots is None:
            return self.classes_[best]
        assert coding.labels is not None
        return coding.labels[slots[np.arange(len(best)), best]]

    def decoder(self, task: int, coding: Coding) -> nn.Module:
        """See `Targets`."""
        if coding.slots is None:
            return nn.Softmax(dim=1)
        assert coding.labels is not None
        place = coding.slots[task]
        return _OfTask(place[place >= 0], len(coding.labels))

    def probabilities(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """Probabilities of all classes; 0 for those that a task lacks."""
        logits, slots = self.logits(outputs, codes, coding)
        return _spread(self.loss.predict(logits), slots, 0.0, coding)

    def decision(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """Logits of all classes, lowest where a task lacks one; the difference of two classes."""
        logits, slots = self.logits(outputs, codes, coding)
        lowest = float(np.finfo(logits.dtype).min)
        logits = _spread(logits, slots, lowest, coding)
        if logits.shape[1] != 2:
            return logits
        with np.errstate(over="ignore"):
            return np.clip(logits[:, 1] - logits[:, 0], lowest, -lowest)

    def episode_rows(
        self, tasks: TaskCollection, n_shots: int | None, n_queries: int | None
    ) -> int:
        """See `Targets`."""
        if self.n_ways is not None:
            return self.n_ways * ((n_shots or 1) + (n_queries or 15))
        rows = int(np.median(tasks.sizes))
        if n_shots is None or n_queries is None:
            return rows
        return min(rows, (n_shots + n_queries) * len(np.unique(tasks.y)))


def _class_weights(
    given: Any, classes: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None
) -> np.ndarray:
    """Weight (n_classes,) of each class; "balanced" is over the weights of the rows."""
    if isinstance(given, str) and sample_weight is not None:  # for scikit-learn before 1.7
        total = np.bincount(np.searchsorted(classes, y), sample_weight, len(classes))
        weights: np.ndarray = total.sum() / (len(classes) * total)
        return weights
    weights = compute_class_weight(given, classes=classes, y=y)
    return weights.astype(np.float64)


class _OfTask(nn.Module):
    """Probabilities of all classes, of logits of those of a task, which come first."""

    spread: Tensor

    def __init__(self, place: np.ndarray, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("spread", torch.eye(n_classes)[place])

    def forward(self, logits: Tensor) -> Tensor:
        p = logits[:, : len(self.spread)].softmax(1)
        return p @ self.spread.to(p.dtype)


def _spread(values: np.ndarray, slots: np.ndarray | None, fill: float, coding: Coding) -> Any:
    """Move columns from the outputs of each task to the classes of all adapted tasks."""
    if slots is None:
        return values
    assert coding.labels is not None
    wide = np.full((len(values), len(coding.labels)), fill, dtype=values.dtype)
    row, output = np.nonzero(slots >= 0)
    wide[row, slots[row, output]] = values[row, output]
    return wide
