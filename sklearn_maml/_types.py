"""Types of what users give and get."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from numpy.typing import ArrayLike

PathLike: TypeAlias = str | os.PathLike[str]


class TaskDistribution(Protocol):
    """Makes tasks on demand."""

    def sample(self, n_tasks: int, random_state: Any = None) -> Any:
        """Return a list of `n_tasks` tasks."""


# rows, or a list of tasks; frames of pandas and polars are array-likes
Tasks: TypeAlias = ArrayLike | Sequence[Any]
# of rows, or of tasks by their ids
Weights: TypeAlias = ArrayLike | Sequence[Any] | Mapping[Any, float] | None
