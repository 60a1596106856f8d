"""What the outer loop asks of whatever makes its meta-steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine.spec import MetaStep
from sklearn_maml.theta import Params
from sklearn_maml.threads import threads_for


class MetaSteps(ABC):
    """Makes meta-steps: an `Engine`, or what stands in its place.

    Attributes
    ----------
    module : Module
        Whose parameters, or others of their sizes, a step runs.
    """

    module: nn.Module

    @abstractmethod
    def meta_step(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> MetaStep:
        """Query losses after adaptation and the gradient of their mean."""

    @abstractmethod
    def evaluate(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Query losses (n_tasks,) and query outputs after `steps` inner steps; 0 is before any."""

    def threads(self, n_rows: int) -> Any:
        """Context that limits torch to one thread if passes over `n_rows` rows are small."""
        return threads_for(n_rows * sum(p.numel() for p in self.module.parameters()))

    def expect(self, first_update: int, n_updates: int, **outlook: int) -> None:  # noqa: B027
        """Prepare for meta-steps to come; see `Engine.expect`."""

    def finish(self) -> None:  # noqa: B027
        """Give up what is prepared in the background: no more meta-steps come."""

    def preparation(self, steps: int) -> Callable[[EpisodeBatch], EpisodeBatch] | None:
        """Return what makes `EpisodeBatch.prepared` of row positions, if that can be done early."""
        return None

    def running_averages(self) -> list[Tensor]:
        """Return what meta-steps write beside their results, and validation reads."""
        return []

    def progress(self) -> dict[str, Any]:
        """Return what meta-training has changed here, as plain data, for `resume`."""
        return {"buffers": dict(self.module.named_buffers())}

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on where an interrupted fit stood; call it before `expect`."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(progress["buffers"][name])
