"""The engine: runs the inner loop over a batch of tasks."""

from __future__ import annotations

from sklearn_maml.engine.engine import (
    CHUNK,
    ELEMENTWISE,
    NATIVE_CHUNK,
    Adapted,
    Engine,
    MetaStep,
    cross_entropy_rows,
    has_dropout,
    is_row_wise,
    rate_key,
    restore_diverged,
    squared_error_rows,
)

__all__ = [
    "CHUNK",
    "ELEMENTWISE",
    "NATIVE_CHUNK",
    "Adapted",
    "Engine",
    "MetaStep",
    "cross_entropy_rows",
    "has_dropout",
    "is_row_wise",
    "rate_key",
    "restore_diverged",
    "squared_error_rows",
]
