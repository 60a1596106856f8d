"""What makes importing the package cheap."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the garbage collector while modules are imported.

    They bring half a million objects that stay, among which it would look for garbage time and
    again: a tenth of the time from starting Python to a fitted model. Afterwards they count as old,
    so that the next collections of young objects leave them alone.
    """
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # otherwise somebody wants objects to stay frozen
            gc.freeze()
            gc.unfreeze()
        if ran:
            gc.enable()
