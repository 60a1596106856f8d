"""How the containers of scikit-learn adapt, see `containers`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from sklearn_maml.data.spellings import is_task_list
from sklearn_maml.estimators.containers import (
    OF_SKLEARN,
    Rule,
    changed_targets,
    changed_tasks,
)
from sklearn_maml.estimators.models import forward, is_local, models_in, rows_of


def _of_sklearn(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of containers of scikit-learn, which have to be fitted."""

    def register(rule: Rule) -> Rule:
        def checked(model: Any, X: Any, y: Any, adapt: Any) -> Any:
            check_is_fitted(model)
            return rule(model, X, y, adapt)

        OF_SKLEARN.update(dict.fromkeys(names, checked))
        return checked

    return register


def _changed(model: Any, **attributes: Any) -> Any:
    """Copy of a fitted model with other attributes."""
    new = copy.copy(model)
    vars(new).update(attributes)
    return new


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

    X = _checked(model, X)
    members = [
        adapt(member, rows_of(X, lambda rows, which=which: rows[:, which]), y)
        for member, which in zip(model.estimators_, model.estimators_features_, strict=True)
    ]
    return _changed(model, estimators_=members, **changed)


def _checked(model: Any, X: Any) -> Any:
    """Rows as a container makes them for its members."""

    def check(rows: Any) -> np.ndarray:
        return validate_data(
            model,
            rows,
            dtype=None,
            ensure_all_finite=False,
            ensure_min_samples=0,
            reset=False,
        )

    return rows_of(X, check)


@_of_sklearn("AdaBoostRegressor", "AdaBoostClassifier")
def _boosting(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "weights of its members")
    X = _checked(model, X)
    return _changed(model, estimators_=[adapt(member, X, y) for member in model.estimators_])


@_of_sklearn("RFE")
def _elimination(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    X = rows_of(X, lambda rows: forward(model, rows))
    return _changed(model, estimator_=adapt(model.estimator_, X, y))


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
            return binary[:, j]

        return change

    members = [
        adapt(member, *changed_targets(X, y, column(j)))
        for j, member in enumerate(model.estimators_)
    ]
    return _changed(model, estimators_=members)


@_of_sklearn("OneVsOneClassifier")
def _one_vs_one(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "one model of each pair of classes")

    def of_pair(i: int, j: int) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
        def choose(y: Any) -> tuple[np.ndarray, np.ndarray]:
            place = _positions(model.classes_)(y)
            rows = np.flatnonzero((place == i) | (place == j))
            return rows, (place[rows] == j).astype(int)

        return choose

    X = _checked(model, X)
    pairs = combinations(range(len(model.classes_)), 2)
    members = [
        adapt.on_rows(member, X, y, of_pair(i, j))
        for member, (i, j) in zip(model.estimators_, pairs, strict=True)
    ]
    return _changed(model, estimators_=members)


@_of_sklearn("OutputCodeClassifier")
def _output_code(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "a code of each class")

    def bit(j: int) -> Callable[[Any], np.ndarray]:
        return lambda y: model.code_book_[_positions(model.classes_)(y), j].astype(int)

    members = [
        adapt(member, *changed_targets(X, y, bit(j))) for j, member in enumerate(model.estimators_)
    ]
    return _changed(model, estimators_=members)


def _outputs(model: Any, y: Any) -> np.ndarray:
    """Targets (n_rows, n_outputs) of a container with a member for each."""
    y, n_outputs = np.asarray(y), len(model.estimators_)
    if y.ndim != 2 or y.shape[1] != n_outputs:
        raise ValueError(
            f"y must have the {n_outputs} outputs of the fit of {type(model).__name__}; got an "
            f"array of shape {y.shape}."
        )
    return y


@_of_sklearn("RegressorChain", "ClassifierChain")
def _chain(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    _refuse_local(model, "one model of each output")
    if model.cv is not None:
        raise TypeError(
            f"The members of {type(model).__name__} with cv={model.cv!r} have learned from "
            "predictions for rows that the members before were not fitted on, and a support set "
            "has none. Fit it with cv=None, which takes the targets themselves."
        )

    def link(k: int) -> Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]:
        def change(X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
            y = _outputs(model, y)[:, model.order_]
            return np.hstack([X, y[:, :k]]), y[:, k]

        return change

    X = _checked(model, X)
    members = [
        adapt(member, *changed_tasks(X, y, link(k))) for k, member in enumerate(model.estimators_)
    ]
    return _changed(model, estimators_=members)


@_of_sklearn("MultiOutputRegressor", "MultiOutputClassifier")
def _multi_output(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    def column(j: int) -> Callable[[Any], np.ndarray]:
        return lambda y: _outputs(model, y)[:, j]

    members = [
        adapt(member, *changed_targets(X, y, column(j)))
        for j, member in enumerate(model.estimators_)
    ]
    changed: dict[str, Any] = {"estimators_": members}
    if is_classifier(model):
        changed["classes_"] = [member.classes_ for member in members]
    return _changed(model, **changed)
