"""Adapting whole models: one walk over fitted sub-estimators, with a rule for each container.

A rule makes a new container of the same kind, in which every part that holds a MAML estimator has
adapted. What a container has learned besides (weights of an ensemble, a threshold, a calibration)
stays. A container without a rule is refused: its parts cannot be told from what it fitted to them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, overload

from numpy.typing import ArrayLike
from sklearn.utils import _safe_indexing

from sklearn_maml._types import Tasks
from sklearn_maml.data.spellings import is_task_list
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.models import (
    best_of_search,
    is_search,
    models_in,
    nothing_to_adapt,
)

M = TypeVar("M", bound=BaseMAML)
Rule = Callable[[Any, Any, Any, Any], Any]  # (container, X, y, adapt) -> container

# rules by class, of the library and of its users
_RULES: dict[type, Rule] = {}
# rules of scikit-learn's containers by name: importing them all takes long
OF_SKLEARN: dict[str, Rule] = {}
# transformers of scikit-learn's that hold an estimator and do without it after `fit`
SELECTORS = ("SelectFromModel", "SequentialFeatureSelector")


def register_container(kind: type, rule: Rule | None = None) -> Any:
    """Tell `adapt` how to adapt a container of estimators.

    Parameters
    ----------
    kind : type
        Class of the container; its subclasses are taken, too.
    rule : callable (container, X, y, adapt) -> container, default=None
        Makes a new fitted container from a fitted one, which it leaves as it is. ``adapt(part, X,
        y)`` adapts a part to the support rows as the part sees them, and returns parts without a
        meta-learned model as they are. X and y may be a list of tasks and None. None returns a
        decorator.

    Returns
    -------
    rule : callable
        The rule, or the decorator.

    Raises
    ------
    TypeError
        If `kind` is no class.

    Examples
    --------
    >>> import copy
    >>> from sklearn.base import BaseEstimator, RegressorMixin
    >>> from sklearn_maml import MAMLRegressor, adapt, register_container
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> class Clipped(RegressorMixin, BaseEstimator):
    ...     def __init__(self, estimator, least=0.0):
    ...         self.estimator, self.least = estimator, least
    ...     def fit(self, X, y, groups=None):
    ...         self.estimator_ = self.estimator.fit(X, y, groups=groups)
    ...         return self
    ...     def predict(self, X):
    ...         return self.estimator_.predict(X).clip(self.least)
    >>> @register_container(Clipped)
    ... def adapt_clipped(clipped, X, y, adapt):
    ...     adapted = copy.copy(clipped)
    ...     adapted.estimator_ = adapt(clipped.estimator_, X, y)
    ...     return adapted
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> model = Clipped(MAMLRegressor(max_iter=10, random_state=0)).fit(X, y, groups=task)
    >>> bool(adapt(model, X[:10], y[:10]).predict(X[10:20]).min() >= 0)
    True
    """
    if not isinstance(kind, type):
        raise TypeError(f"kind must be the class of a container; got {kind!r}.")

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule
        return rule

    return register if rule is None else register(rule)


def _rule_for(model: Any) -> Rule | None:
    for kind in type(model).__mro__:
        if kind in _RULES:
            return _RULES[kind]
        if _is_of_sklearn(kind, OF_SKLEARN):
            return OF_SKLEARN[kind.__name__]
    return _search if is_search(model) else None


def _is_of_sklearn(kind: type, names: Collection[str]) -> bool:
    return kind.__module__.startswith("sklearn.") and kind.__name__ in names


@overload
def adapt(
    estimator: M,
    X: Tasks,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    *,
    extend: bool = False,
) -> M: ...


@overload
def adapt(
    estimator: Any,
    X: Tasks,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    *,
    extend: bool = False,
) -> Any: ...


def adapt(
    estimator: Any,
    X: Tasks,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    *,
    extend: bool = False,
) -> Any:
    """Adapt a copy of a meta-fitted model; the model itself is untouched.

    Parameters
    ----------
    estimator : estimator
        A meta-fitted `MAMLRegressor` or `MAMLClassifier`, or a fitted model made of one or several:
        a Pipeline (of imbalanced-learn, too), a search, a FewShot estimator,
        TransformedTargetRegressor, the Voting, Stacking, Bagging, AdaBoost and MultiOutput
        ensembles, RegressorChain, ClassifierChain, OneVsRestClassifier, OneVsOneClassifier,
        OutputCodeClassifier, CalibratedClassifierCV, FixedThresholdClassifier,
        TunedThresholdClassifierCV, RFE, RFECV, FrozenEstimator, any of these inside another, or a
        container given to `register_container`.
    X : array-like of shape (n_support, n_features)
        Support rows.
    y : array-like of shape (n_support,) or (n_support, n_outputs)
        Their targets.
    groups : array-like of shape (n_support,), default=None
        Task id of each row, to adapt to many tasks in one call.
    sample_weight : array-like of shape (n_support,), default=None
        Weights of the rows in the support loss.
    extend : bool, default=False
        Whether the rows are added to what `estimator` is adapted to; see `MAMLRegressor.adapt`.

    Returns
    -------
    adapted : estimator
        Fitted estimator of the same kind (of a search, its best estimator; of a FewShot or frozen
        estimator, what it holds) that predicts for the new task: every MAML estimator in it has
        adapted, and all else is shared, such as transformers, weights, thresholds and
        calibrations. A copy holds those parameters alone that adapt, so thousands of copies are
        cheap with ``adapted="head"``. Any number of threads may adapt copies of one model and
        predict at the same time.

    Raises
    ------
    TypeError
        If there is no meta-learned model in `estimator`, or if `estimator` is made of one in a way
        that cannot be adapted as a whole.
    NotFittedError
        If `estimator` is not fitted.

    Examples
    --------
    >>> import sklearn
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_maml import MAMLRegressor, adapt
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> with sklearn.config_context(enable_metadata_routing=True):
    ...     pipe = make_pipeline(StandardScaler(), MAMLRegressor(max_iter=10, random_state=0))
    ...     pipe = pipe.fit(X, y, groups=task)
    >>> adapted = adapt(pipe, X[:10], y[:10])
    >>> adapted.predict(X[10:20]).shape
    (10,)
    """
    walk = Walk(groups, sample_weight, extend)
    adapted = walk(estimator, X, y, required=True)
    for message, kind in dict.fromkeys((str(doubt), type(doubt)) for doubt in walk.doubts):
        warnings.warn(message, kind, stacklevel=2)
    return adapted


@dataclasses.dataclass(frozen=True)
class Walk:
    """Adapts whatever it meets in a model: what rules are given as `adapt`.

    `rates` are parameters that the MAML estimators get before they adapt; `doubts` gets what they
    would warn of.
    """

    groups: Any = None
    sample_weight: Any = None
    extend: bool = False
    rates: dict[str, Any] = dataclasses.field(default_factory=dict)
    doubts: list[Warning] = dataclasses.field(default_factory=list)

    def __call__(self, part: Any, X: Any, y: Any, *, required: bool = False) -> Any:
        """Adapt a part to support rows as it sees them; one without a MAML estimator stays."""
        if isinstance(part, BaseMAML):
            model = copy.copy(part)
            if self.rates:
                model.set_params(**self.rates)
            doubts = model.__adapt_to_tasks__(
                X, y, self.groups, self.sample_weight, extend=self.extend
            )
            self.doubts.extend(doubts)
            return model
        if not models_in(part) or _is_of_sklearn(type(part), SELECTORS):
            if required:
                raise nothing_to_adapt(part)
            return part
        rule = _rule_for(part)
        if rule is None:
            raise TypeError(
                f"{type(part).__name__} holds a meta-learned model, but cannot be adapted as a "
                "whole: what it has learned besides is not known. Adapt the model inside it; fit "
                "it to the rows of one task, around FewShotRegressor(prior) or FewShotClassifier; "
                "or say how to adapt it with sklearn_maml.register_container."
            )
        return rule(part, X, y, self)

    def on_rows(self, part: Any, X: Any, y: Any, choose: Callable[[Any], Any]) -> Any:
        """Adapt a part to those rows for whose targets `choose` gives other ones, and which."""
        if is_task_list(X, y):
            if self.sample_weight is not None:
                raise ValueError(
                    "sample_weight of a list of tasks cannot be given to a model whose parts learn "
                    "from some rows each: give rows and groups in place of the list."
                )

            def few(rows: Any, targets: Any) -> tuple[Any, Any]:
                kept, values = choose(targets)
                return _safe_indexing(rows, kept), values

            return self(part, *changed_tasks(X, y, few))
        kept, values = choose(y)
        some = {
            name: _safe_indexing(given, kept)
            for name in ("groups", "sample_weight")
            if (given := getattr(self, name)) is not None
            and not isinstance(given, (str, Mapping))  # a column, and weights of tasks
        }
        return dataclasses.replace(self, **some)(part, _safe_indexing(X, kept), values)

    def with_rates(self, **rates: Any) -> Walk:
        """Walk that sets these parameters, too, where they are not None."""
        given = {name: value for name, value in rates.items() if value is not None}
        return dataclasses.replace(self, rates={**given, **self.rates})


def changed_targets(X: Any, y: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Apply `change` to targets, of a list of tasks too."""
    return changed_tasks(X, y, lambda rows, targets: (rows, change(targets)))


def changed_tasks(X: Any, y: Any, change: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """Apply `change` to rows and targets, of a list of tasks too."""
    if not is_task_list(X, y):
        rows, targets = change(X, y)
        return rows, targets
    return [
        tuple(part for k in range(0, len(task), 2) for part in change(*task[k : k + 2]))
        for task in X
    ], None


def _search(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    return adapt(best_of_search(model), X, y)
