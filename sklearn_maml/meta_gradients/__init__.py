"""Meta-gradients: how the outer gradient flows through the inner loop.

Each is an object (searchable as ``meta_gradient__*``) that turns "adapt, then evaluate the query
loss" into a gradient for the meta-parameters. None of them knows how tasks are batched.
"""

from __future__ import annotations

from sklearn_maml.meta_gradients.base import MetaGradient
from sklearn_maml.meta_gradients.implicit import Implicit
from sklearn_maml.meta_gradients.registry import (
    META_GRADIENTS,
    prepares_positions,
    resolve_meta_gradient,
)
from sklearn_maml.meta_gradients.reptile import Reptile
from sklearn_maml.meta_gradients.unrolled import FirstOrder, SecondOrder

__all__ = [
    "META_GRADIENTS",
    "FirstOrder",
    "Implicit",
    "MetaGradient",
    "Reptile",
    "SecondOrder",
    "prepares_positions",
    "resolve_meta_gradient",
]
