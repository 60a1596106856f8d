"""Meta-gradients by name."""

from __future__ import annotations

from typing import Any

from sklearn_maml._validation import resolve_object
from sklearn_maml.meta_gradients.base import MetaGradient
from sklearn_maml.meta_gradients.implicit import Implicit
from sklearn_maml.meta_gradients.reptile import Reptile
from sklearn_maml.meta_gradients.unrolled import FirstOrder, SecondOrder

META_GRADIENTS: dict[str, type[MetaGradient]] = {
    "second-order": SecondOrder,
    "first-order": FirstOrder,
    "implicit": Implicit,
    "reptile": Reptile,
}


def resolve_meta_gradient(value: Any, options: dict[str, Any]) -> MetaGradient:
    """Return the meta-gradient that `meta_gradient` names."""
    gradient: MetaGradient = resolve_object(
        "meta_gradient", value, options, MetaGradient, META_GRADIENTS
    )
    gradient.check()
    return gradient


def prepares_positions(gradient: MetaGradient) -> bool:
    """Whether `episodes` changes batches, and serves for positions in the place of rows.

    Those of users may look at the rows themselves.
    """
    own = type(gradient).episodes
    ours = {kind.episodes for kind in META_GRADIENTS.values()}
    return own is not MetaGradient.episodes and own in ours
