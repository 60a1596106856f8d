"""Rows of many tasks in one tensor, to work on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax
from torch import Tensor

from sklearn_maml.data.episodes import Rows, pad_rows
from sklearn_maml.evaluation.baselines.base import Episode, Predicted
from sklearn_maml.inner import mean_loss
from sklearn_maml.targets.losses import cross_entropy_rows


def stack(X: Sequence[np.ndarray], y: Sequence[np.ndarray], dtype: type) -> Rows:
    """Stack the rows of tasks, and their targets: labels or numbers."""
    counts = np.array([len(rows) for rows in X])
    targets = np.concatenate(y)
    targets = targets.astype(np.int64 if targets.dtype.kind == "i" else dtype)
    return pad_rows(np.concatenate(X).astype(dtype), targets, np.arange(counts.sum()), counts)


def losses(output: Tensor, rows: Rows) -> Tensor:
    """Mean loss of the rows of each task: cross-entropy of labels, squared error of numbers."""
    if not rows.y.is_floating_point():
        return mean_loss(cross_entropy_rows(output, rows.y), rows.weight)
    return mean_loss((output[..., 0] - rows.y) ** 2, rows.weight)


def score(output: Tensor, rows: Rows) -> float:
    """Mean over tasks of what choices go by: root mean squared error, or cross-entropy."""
    of_tasks = losses(output, rows)
    return float((of_tasks.sqrt() if rows.y.is_floating_point() else of_tasks).mean())


def support_and_query(episodes: Sequence[Episode], dtype: type) -> tuple[Rows, Rows]:
    """Stack the support sets and, for choices, the query sets of episodes."""
    support = stack([e.X_support for e in episodes], [e.y_support for e in episodes], dtype)
    targets = [
        np.zeros(len(e.X_query), dtype=e.y_support.dtype) if e.y_query is None else e.y_query
        for e in episodes
    ]
    return support, stack([e.X_query for e in episodes], targets, dtype)


def unstack(output: Tensor, episodes: Sequence[Episode], n_classes: int) -> list[Predicted]:
    """Predictions of the query rows of each episode: numbers, or probabilities of logits."""
    values = output.double().numpy()
    parts = [values[j, : len(e.X_query)] for j, e in enumerate(episodes)]
    return [softmax(part, axis=1) if n_classes else part[:, 0] for part in parts]
