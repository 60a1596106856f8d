"""The engine: runs the inner loop over a batch of tasks."""

from __future__ import annotations

from sklearn_maml.engine.architecture import ELEMENTWISE, has_dropout, is_row_wise
from sklearn_maml.engine.engine import Engine
from sklearn_maml.engine.ladder import RUNGS, begin_with
from sklearn_maml.engine.outer import MetaSteps
from sklearn_maml.engine.rungs.base import Rung
from sklearn_maml.engine.spec import AdaptedParams, MetaStep

__all__ = [
    "ELEMENTWISE",
    "RUNGS",
    "AdaptedParams",
    "Engine",
    "MetaStep",
    "MetaSteps",
    "Rung",
    "begin_with",
    "has_dropout",
    "is_row_wise",
]
