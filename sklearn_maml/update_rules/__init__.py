"""Update rules: how one inner step moves the adapted parameters.

A rule is a small object with parameters of its own (searchable as ``update_rule__*``); what it
*learns* (rates, say) are meta-parameters that the outer loop optimises beside the initialisation.
"""

from __future__ import annotations

from sklearn_maml.update_rules.base import TaskSolver, UpdateRule, has_linear_rates
from sklearn_maml.update_rules.heads import ClosedFormHead, LogisticHead, RidgeHead
from sklearn_maml.update_rules.registry import UPDATE_RULES, resolve_update_rule
from sklearn_maml.update_rules.steps import (
    SGD,
    Adam,
    LearnedAlpha,
    MetaSGD,
    Momentum,
    PerLayerPerStep,
    norm_of_steps,
)

__all__ = [
    "SGD",
    "UPDATE_RULES",
    "Adam",
    "ClosedFormHead",
    "LearnedAlpha",
    "LogisticHead",
    "MetaSGD",
    "Momentum",
    "PerLayerPerStep",
    "RidgeHead",
    "TaskSolver",
    "UpdateRule",
    "has_linear_rates",
    "norm_of_steps",
    "resolve_update_rule",
]
