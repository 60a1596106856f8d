"""Rows of many tasks in one tensor, to work on all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import cross_entropy

from sklearn_maml.evaluation.baselines.base import Episode, Predicted


@dataclasses.dataclass
class Stacked:
    """Support rows of tasks as (n_tasks, n_rows, ...) tensors; weights make means over a task."""

    X: Tensor
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, X: Sequence[np.ndarray], y: Sequence[np.ndarray], dtype: torch.dtype) -> Stacked:
        """Stack the rows of tasks; zeros without weight fill up the smaller ones."""
        n = max(len(rows) for rows in X)
        stacked_X = np.zeros((len(X), n, X[0].shape[1]))
        stacked_y = np.zeros((len(X), n), dtype=y[0].dtype)
        weight = np.zeros((len(X), n))
        for j, (rows, target) in enumerate(zip(X, y, strict=True)):
            stacked_X[j, : len(rows)], stacked_y[j, : len(rows)] = rows, target
            weight[j, : len(rows)] = 1 / max(len(rows), 1)
        is_label = stacked_y.dtype.kind == "i"
        return cls(
            torch.as_tensor(stacked_X, dtype=dtype),
            torch.as_tensor(stacked_y, dtype=torch.long if is_label else dtype),
            torch.as_tensor(weight, dtype=dtype),
        )

    def score(self, output: Tensor) -> float:
        """Mean over tasks of what choices go by: root mean squared error, or cross-entropy."""
        losses = self.losses(output)
        return float((losses if self.y.dtype == torch.long else losses.sqrt()).mean())

    def losses(self, output: Tensor) -> Tensor:
        """Mean loss of the rows of each task: cross-entropy of labels, squared error of numbers."""
        if self.y.dtype == torch.long:
            rows = cross_entropy(output.flatten(0, 1), self.y.flatten(), reduction="none")
            rows = rows.reshape(self.y.shape)
        else:
            rows = (output[..., 0] - self.y) ** 2
        return (rows * self.weight).sum(1)


def support_and_query(episodes: Sequence[Episode], dtype: torch.dtype) -> tuple[Stacked, Stacked]:
    """Stack the support sets and, for choices, the query sets of episodes."""
    support = Stacked.of([e.X_support for e in episodes], [e.y_support for e in episodes], dtype)
    targets = [
        np.zeros(len(e.X_query), dtype=e.y_support.dtype) if e.y_query is None else e.y_query
        for e in episodes
    ]
    return support, Stacked.of([e.X_query for e in episodes], targets, dtype)


def unstack(output: Tensor, episodes: Sequence[Episode], n_classes: int) -> list[Predicted]:
    """Predictions of the query rows of each episode: numbers, or probabilities of logits."""
    values = output.double().numpy()
    parts = [values[j, : len(e.X_query)] for j, e in enumerate(episodes)]
    return [softmax(part, axis=1) if n_classes else part[:, 0] for part in parts]
