"""What makes importing the package, and ending a short process with it, cheap."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

LEAST = 1000  # objects that somebody freezes: Python 3.12 itself begins with 375


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the garbage collector while modules are imported.

    They bring half a million objects that stay, among which it would look for garbage time and
    again: a tenth of the time from starting Python to a fitted model. Afterwards they are left
    alone, see `_LeftAlone`.
    """
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() < LEAST:  # otherwise somebody wants objects to stay frozen
            _LeftAlone()
        if ran:
            gc.enable()


class _LeftAlone:
    """Leaves all objects that there are to the first full collection, which looks at them as ever.

    Where a process ends before there has been one, Python does not go through them once more: a
    quarter of the CPU time of a short fit. What was in a cycle by then is not finalised by such an
    end, which Python never promises.
    """

    def __init__(self) -> None:
        gc.freeze()
        self.younger: list[Any] | None = []  # until there has been one, or the process ends
        gc.callbacks.append(self)
        atexit.register(self.stop)

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if self.younger is None or phase != "start" or info["generation"] < 2:
            return
        # otherwise somebody has frozen all objects since, and wants them to stay so
        if any(value is self.younger for value in gc.get_objects()):
            gc.unfreeze()
        self.stop()

    def stop(self) -> None:
        """Have collections look at what they look at."""
        self.younger = None
