"""What a fit trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sklearn_maml.learners.learner import Learner

GRADIENT_STEPS, GAUSSIAN_HEAD = "gradient-steps", "gaussian-head"


@dataclass
class Plan:
    """What a fit trains, and on which episodes.

    Attributes
    ----------
    source : CollectionSource or DistributionSource
        The tasks.
    episodes : CollectionSource, DistributionSource or CrossFitted
        Where meta-batches come from.
    with_steps, with_head : bool
        What is trained.
    learner : Learner or None
        What is trained in place of either.
    engine : Engine or None
        Of the gradient steps.
    partial : bool
        Whether more tasks will come: a few updates of a constant rate, the last of which is kept.
    """

    source: Any
    episodes: Any
    with_steps: bool
    with_head: bool
    learner: Learner | None = None
    engine: Any = None
    partial: bool = False

    def weights(self, share: float) -> dict[str, float]:
        """Shares of the learners in predictions; `share` is that of steps beside a head."""
        if self.learner is not None:
            return {type(self.learner).__name__: 1.0}
        if not self.with_head:
            return {GRADIENT_STEPS: 1.0}
        if not self.with_steps:
            return {GAUSSIAN_HEAD: 1.0}
        return {GAUSSIAN_HEAD: 1.0 - share, GRADIENT_STEPS: share}
