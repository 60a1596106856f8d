"""Pipelines, searches and other estimators of scikit-learn in files.

skops writes what its list of known types has as plain data, and names what it has not; nothing is
pickled. Estimators of the library are taken out before, and put back after: they have a format of
their own, which asks for the classes of users and knows devices.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import sklearn.metrics
import sklearn.model_selection

# entries of the memo of deepcopy: estimators that were taken out, and those to be put back
TAKEN, GIVEN = "sklearn_maml: taken", "sklearn_maml: given"


class Placeholder:
    """Stands for an estimator of the library, the `place`-th that was taken out."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return memo[GIVEN][self.place] if GIVEN in memo else Placeholder(self.place)


class Leaf:
    """An estimator that can be taken out of others."""

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        taken = memo.get(TAKEN)
        if taken is not None:
            taken.append(self)
            return Placeholder(len(taken) - 1)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


@functools.cache
def _known() -> frozenset[str]:
    """Names of what may be built besides the list of skops, which has few parts of searches."""
    from sklearn import feature_selection  # takes long to import

    parts: list[Any] = [
        f
        for module in (sklearn.metrics, feature_selection)
        for f in vars(module).values()
        if inspect.isfunction(f)
    ]
    for part in vars(sklearn.model_selection).values():
        if inspect.isclass(part) and hasattr(part, "get_n_splits"):
            parts.append(part)
    return frozenset(
        {f"{part.__module__}.{part.__qualname__}" for part in parts}
        | {
            "numpy.dtype",  # skops stores an empty array of it
            "scipy._lib.array_api_compat.numpy._aliases.asarray",
            "scipy.interpolate._bsplines.BSpline",
            "sklearn.calibration._CalibratedClassifier",
            "sklearn.calibration._SigmoidCalibration",
            "sklearn.impute._iterative.IterativeImputer",
            "sklearn.impute._iterative._ImputerTriplet",
            "sklearn.metrics._scorer._CurveScorer",
            "sklearn.metrics._scorer._PassthroughScorer",
            "sklearn.metrics._scorer._Scorer",
            "sklearn.utils._bunch.Bunch",
            "sklearn.utils._metadata_requests.MetadataRequest",
            "sklearn.utils._metadata_requests.MethodMetadataRequest",
            "sklearn_maml.composites.Placeholder",
            "sklearn_maml.evaluation.metrics.TaskScorer",
        }
    )


def _unknown(data: bytes, trusted: Iterable[str]) -> list[str]:
    """Names of types in what skops wrote that nobody knows to be harmless."""
    import skops.io as skops

    return sorted({*skops.get_untrusted_types(data=data)} - {*trusted, *_known()})


def is_composite(value: Any) -> bool:
    """Whether a value is an estimator of scikit-learn's, or of someone else's."""
    return hasattr(value, "get_params") and hasattr(value, "fit") and not isinstance(value, Leaf)


def take_apart(estimator: Any, trusted: Iterable[str], path: str) -> tuple[bytes, list[Any]]:
    """Return what skops makes of an estimator, and the estimators that were taken out of it.

    TypeError if it has types that neither skops knows nor the user trusts, or if there is no skops;
    `path` is its place, for messages.
    """
    name = type(estimator).__name__
    try:
        import skops.io as skops
        from skops.io.exceptions import UnsupportedTypeException
    except ImportError as error:
        raise TypeError(
            f"{path} is a {type(estimator).__module__}.{name}, which cannot be stored without "
            "skops. Install it: pip install 'sklearn-maml[save]'."
        ) from error
    taken: list[Any] = []
    memo: dict[Any, Any] = {TAKEN: taken}
    bare = copy.deepcopy(estimator, memo)
    try:
        data = skops.dumps(bare)
    except UnsupportedTypeException as error:
        raise TypeError(f"{path}, a {name}, cannot be stored: {error}") from error
    unknown = _unknown(data, trusted)
    if unknown:
        raise TypeError(
            f"{path}, a {name}, has parts of types that skops does not know to be harmless: "
            f"{unknown}. Loading would import and build them by name: if their code may run, pass "
            f"trusted={unknown} to save and to load; else leave these parts out."
        )
    return data, taken


def put_together(data: bytes, leaves: Sequence[Any], trusted: Iterable[str]) -> Any:
    """Make what `take_apart` took apart; PermissionError names types that are not trusted."""
    import skops.io as skops

    unknown = _unknown(data, trusted)
    if unknown:
        raise PermissionError(
            f"the file has parts of types that are not known to be harmless: {unknown}. If you "
            f"know where it comes from and their code may run, pass trusted={unknown}."
        )
    bare = skops.loads(data, trusted=[*_known(), *trusted])
    memo: dict[Any, Any] = {GIVEN: leaves}
    return copy.deepcopy(bare, memo)
