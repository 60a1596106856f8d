"""Update rules by name."""

from __future__ import annotations

from typing import Any

from sklearn_maml._validation import resolve_object
from sklearn_maml.update_rules.base import TaskSolver
from sklearn_maml.update_rules.heads import LogisticHead, RidgeHead
from sklearn_maml.update_rules.steps import (
    SGD,
    Adam,
    LearnedAlpha,
    MetaSGD,
    Momentum,
    PerLayerPerStep,
)

UPDATE_RULES: dict[str, type[TaskSolver]] = {
    "sgd": SGD,
    "meta-sgd": MetaSGD,
    "per-layer-per-step": PerLayerPerStep,
    "learned-alpha": LearnedAlpha,
    "momentum": Momentum,
    "adam": Adam,
    "ridge-head": RidgeHead,
    "logistic-head": LogisticHead,
}


def resolve_update_rule(value: Any, options: dict[str, Any]) -> TaskSolver:
    """Return the rule that `update_rule` names, built with ``update_rule__*`` options."""
    rule: TaskSolver = resolve_object("update_rule", value, options, TaskSolver, UPDATE_RULES)
    rule.check()
    return rule
