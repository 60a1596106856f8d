"""Update rules: how one inner step moves the adapted parameters.

A rule is a small object with parameters of its own (searchable as ``update_rule__*``); what it
*learns* (rates, say) are meta-parameters that the outer loop optimises beside the initialisation.
"""

from __future__ import annotations

from typing import Any

from sklearn_maml._validation import resolve_object
from sklearn_maml.update_rules.base import UpdateRule, has_linear_rates
from sklearn_maml.update_rules.heads import ClosedFormHead, LogisticHead, RidgeHead
from sklearn_maml.update_rules.steps import (
    SGD,
    Adam,
    LearnedAlpha,
    MetaSGD,
    Momentum,
    PerLayerPerStep,
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
    "UpdateRule",
    "has_linear_rates",
    "resolve_update_rule",
]

UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "sgd": SGD,
    "meta-sgd": MetaSGD,
    "per-layer-per-step": PerLayerPerStep,
    "learned-alpha": LearnedAlpha,
    "momentum": Momentum,
    "adam": Adam,
    "ridge-head": RidgeHead,
    "logistic-head": LogisticHead,
}


def resolve_update_rule(value: Any, options: dict[str, Any]) -> UpdateRule:
    """Return the rule that `update_rule` names, built with ``update_rule__*`` options."""
    rule: UpdateRule = resolve_object("update_rule", value, options, UpdateRule, UPDATE_RULES)
    return rule
