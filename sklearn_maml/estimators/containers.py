"""Adapting whole models: one walk over fitted sub-estimators, with a rule for each container.

A rule makes a new container of the same kind, in which every part that holds a MAML estimator has
adapted. What a container has learned besides (weights of an ensemble, a threshold, a calibration)
stays. A container without a rule is refused: its parts cannot be told from what it fitted to them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import is_classifier
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from sklearn_maml._types import Tasks
from sklearn_maml.data.spellings import is_task_list
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.models import (
    best_of_search,
    forward,
    is_local,
    is_search,
    models_in,
    nothing_to_adapt,
    rows_of,
)

__all__ = ["Walk", "adapt", "changed_targets", "register_container"]

M = TypeVar("M", bound=BaseMAML)
Rule = Callable[[Any, Any, Any, Any], Any]  # (container, X, y, adapt) -> container

# rules by class, of the library and of its users
_RULES: dict[type, Rule] = {}
# rules of scikit-learn's containers by name: importing them all takes long
_SKLEARN: dict[str, Rule] = {}


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
        if kind.__module__.startswith("sklearn.") and kind.__name__ in _SKLEARN:
            return _SKLEARN[kind.__name__]
    return _search if is_search(model) else None


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
        TransformedTargetRegressor, the Voting, Stacking, Bagging and MultiOutput ensembles,
        OneVsRestClassifier, CalibratedClassifierCV, FixedThresholdClassifier,
        TunedThresholdClassifierCV, FrozenEstimator, any of these inside another, or a container
        given to `register_container`.
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
        if not models_in(part):
            if required:
                raise nothing_to_adapt(part)
            return part
        rule = _rule_for(part)
        if rule is None:
            raise TypeError(
                f"{type(part).__name__} holds a meta-learned model, but cannot be adapted as a "
                "whole: what it has learned besides is not known. Adapt the model inside it, or "
                "say how to adapt it with sklearn_maml.register_container."
            )
        return rule(part, X, y, self)

    def with_rates(self, **rates: Any) -> Walk:
        """Walk that sets these parameters, too, where they are not None."""
        given = {name: value for name, value in rates.items() if value is not None}
        return dataclasses.replace(self, rates={**given, **self.rates})


def _of_sklearn(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of containers of scikit-learn, which have to be fitted."""

    def register(rule: Rule) -> Rule:
        def checked(model: Any, X: Any, y: Any, adapt: Any) -> Any:
            check_is_fitted(model)
            return rule(model, X, y, adapt)

        _SKLEARN.update(dict.fromkeys(names, checked))
        return checked

    return register


def _changed(model: Any, **attributes: Any) -> Any:
    """Copy of a fitted model with other attributes."""
    new = copy.copy(model)
    vars(new).update(attributes)
    return new


def changed_targets(X: Any, y: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Apply `change` to targets, of a list of tasks too."""
    if is_task_list(X, y):
        return [
            tuple(change(part) if k % 2 else part for k, part in enumerate(task)) for task in X
        ], None
    return X, change(y)


def _refuse_local(model: Any, learned: str) -> None:
    if is_local(model):
        raise TypeError(
            f"{type(model).__name__} has learned {learned} for the classes of its fit, and with "
            "n_ways labels mean something inside their task only: it cannot be adapted as a whole. "
            "Adapt the model inside it, or meta-fit with n_ways=None."
        )


def _positions(classes: np.ndarray) -> Callable[[Any], np.ndarray]:
    """Position of each label among the classes that a container was fitted on."""

    def change(y: Any) -> np.ndarray:
        y = column_or_1d(y)
        unseen = np.setdiff1d(y, classes)
        if len(unseen):
            raise ValueError(
                f"y contains labels that were not seen in fit: {unseen[:5].tolist()}. The model "
                f"was fitted on {classes[:10].tolist()}."
            )
        return np.searchsorted(classes, y)

    return change


def _search(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    return adapt(best_of_search(model), X, y)


_SKLEARN["BaseSearchCV"] = _search


@_of_sklearn("FrozenEstimator")
def _frozen(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    return adapt(model.estimator, X, y)


@_of_sklearn("Pipeline")
def _pipeline(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    *front, (name, last) = model.steps
    steps = []
    for key, step in front:
        adapted = adapt(step, X, y)
        steps.append((key, adapted))
        X = rows_of(X, lambda rows, step=adapted: forward(step, rows))
    return _changed(model, steps=[*steps, (name, adapt(last, X, y))])


@_of_sklearn("TransformedTargetRegressor")
def _transformed_target(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    def change(y: Any) -> Any:
        if len(y) == 0:  # there is nothing to transform, nor do transformers take it
            return y
        y = check_array(y, input_name="y", ensure_2d=False, dtype="numeric", allow_nd=True)
        new = model.transformer_.transform(y.reshape(-1, 1) if y.ndim == 1 else y)
        return new[:, 0] if y.ndim == 1 and new.ndim == 2 and new.shape[1] == 1 else new

    X, y = changed_targets(X, y, change)
    return _changed(model, regressor_=adapt(model.regressor_, X, y))


@_of_sklearn("VotingRegressor", "VotingClassifier")
def _voting(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    changed: dict[str, Any] = {}
    if is_classifier(model):
        X, y, changed = _encoded(model, X, y, model.estimators_)
        if changed:
            changed["le_"] = LabelEncoder().fit(changed["classes_"])
    members = [adapt(member, X, y) for member in model.estimators_]
    return _changed(model, **_members(model, members), **changed)


def _members(model: Any, members: list[Any]) -> dict[str, Any]:
    """Attributes of an ensemble that hold its members."""
    new = dict(zip(map(id, model.estimators_), members, strict=True))
    named = copy.copy(model.named_estimators_)
    named.update({name: new.get(id(member), member) for name, member in named.items()})
    return {"estimators_": members, "named_estimators_": named}


def _encoded(model: Any, X: Any, y: Any, members: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Labels as the members of a model know them, and classes of the model that are new.

    Where labels are local to a task, those of the task take the place of those of the fit.
    """
    if not is_local(model):
        return *changed_targets(X, y, _positions(model.classes_)), {}
    if is_task_list(X, y):
        raise TypeError(
            f"{type(model).__name__} numbers the labels of all tasks together: with n_ways, give "
            "rows and groups in place of a list of tasks."
        )
    if not all(is_local(member) for member in members):
        _refuse_local(model, "members")
    classes, codes = np.unique(column_or_1d(y), return_inverse=True)
    return X, codes.reshape(-1), {"classes_": classes}


@_of_sklearn("StackingRegressor", "StackingClassifier")
def _stacking(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    if models_in(model.final_estimator_):
        raise TypeError(
            f"The final_estimator_ of {type(model).__name__} is meta-learned: it has to adapt to "
            "predictions for rows that the other members did not adapt to, and a support set has "
            "none. Use another final_estimator."
        )
    _refuse_local(model, "how to combine its members")
    # members that were fitted before know the labels themselves
    if is_classifier(model) and model.cv != "prefit":
        X, y = changed_targets(X, y, _positions(model.classes_))
    return _changed(model, **_members(model, [adapt(part, X, y) for part in model.estimators_]))


@_of_sklearn("BaggingRegressor", "BaggingClassifier")
def _bagging(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    changed: dict[str, Any] = {}
    if is_classifier(model):
        X, y, changed = _encoded(model, X, y, model.estimators_)
        if changed:
            changed["n_classes_"] = len(changed["classes_"])

    def check(rows: Any) -> np.ndarray:
        checked: np.ndarray = validate_data(
            model, rows, dtype=None, ensure_all_finite=False, reset=False
        )
        return checked

    X = rows_of(X, check)
    members = [
        adapt(member, rows_of(X, lambda rows, which=which: rows[:, which]), y)
        for member, which in zip(model.estimators_, model.estimators_features_, strict=True)
    ]
    return _changed(model, estimators_=members, **changed)


@_of_sklearn("CalibratedClassifierCV")
def _calibrated(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "a calibration")
    if model.method == "temperature" and isinstance(model.classes_[0], str):
        X, y = changed_targets(X, y, _positions(model.classes_))  # as its fit does
    parts = [
        _changed(part, estimator=adapt(part.estimator, X, y))
        for part in model.calibrated_classifiers_
    ]
    return _changed(model, calibrated_classifiers_=parts)


@_of_sklearn("FixedThresholdClassifier", "TunedThresholdClassifierCV")
def _threshold(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "a threshold")
    return _changed(model, estimator_=adapt(model.estimator_, X, y))


@_of_sklearn("OneVsRestClassifier")
def _one_vs_rest(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "one model of each class")

    def column(j: int) -> Callable[[Any], np.ndarray]:
        def change(y: Any) -> np.ndarray:
            if not model.multilabel_:
                _positions(model.classes_)(y)
            binary = model.label_binarizer_.transform(y)
            binary = binary.toarray() if hasattr(binary, "toarray") else binary
            of_class: np.ndarray = binary[:, j]
            return of_class

        return change

    members = [
        adapt(member, *changed_targets(X, y, column(j)))
        for j, member in enumerate(model.estimators_)
    ]
    return _changed(model, estimators_=members)


@_of_sklearn("MultiOutputRegressor", "MultiOutputClassifier")
def _multi_output(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    n_outputs = len(model.estimators_)

    def column(j: int) -> Callable[[Any], np.ndarray]:
        def change(y: Any) -> np.ndarray:
            y = np.asarray(y)
            if y.ndim != 2 or y.shape[1] != n_outputs:
                raise ValueError(
                    f"y must have the {n_outputs} outputs of the fit of {type(model).__name__}; "
                    f"got an array of shape {y.shape}."
                )
            of_output: np.ndarray = y[:, j]
            return of_output

        return change

    members = [
        adapt(member, *changed_targets(X, y, column(j)))
        for j, member in enumerate(model.estimators_)
    ]
    changed: dict[str, Any] = {"estimators_": members}
    if is_classifier(model):
        changed["classes_"] = [member.classes_ for member in members]
    return _changed(model, **changed)
