"""What differs between the supported versions of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

try:  # scikit-learn >= 1.9
    from sklearn.callback import CallbackSupportMixin
    from sklearn.callback import with_callbacks as _with_callbacks

    HAS_SKLEARN_CALLBACKS = True
except ImportError:  # pragma: no cover - depends on the installed version
    HAS_SKLEARN_CALLBACKS = False

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in where scikit-learn has no callbacks."""

    def _with_callbacks(method: Any) -> Any:
        return method


# frames that `with_callbacks` puts between a method and its caller, for the levels of warnings
CALLBACK_FRAMES = int(HAS_SKLEARN_CALLBACKS)


def with_callbacks(method: F) -> F:
    """Let scikit-learn's callbacks see a `fit`; its signature stays for type checkers."""
    return _with_callbacks(method)
