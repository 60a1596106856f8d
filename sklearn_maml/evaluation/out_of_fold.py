"""Predictions for every row, of models that have seen neither its task nor its target."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import sklearn
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GroupKFold, check_cv
from sklearn.utils import _safe_indexing, check_random_state

from sklearn_maml._types import Tasks
from sklearn_maml.data.frames import as_frame, split_task_column
from sklearn_maml.data.ids import encode_ids
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.evaluation.methods import maml_inside
from sklearn_maml.evaluation.scoring import check_count, open_model

# parts of the rows of a task, each of which is predicted after adapting to others
N_PARTS = 5
EPISODES_AT_A_TIME = 1000
METHODS = ("predict", "predict_proba", "decision_function")


def task_cross_val_predict(
    estimator: Any,
    X: Tasks,
    y: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    cv: Any = 5,
    n_shots: int | None = None,
    method: str = "predict",
    random_state: Any = None,
) -> NDArray[Any]:
    """Predict each row by a model that was meta-trained on other tasks and adapted to other rows.

    Tasks are held out fold by fold. The rows of a held-out task are split into five parts, each of
    which is predicted after adaptation to rows of the other four.

    Parameters
    ----------
    estimator : estimator
        `MAMLRegressor` or `MAMLClassifier`, or a Pipeline or search that ends in one, fitted or
        not. It is cloned.
    X : array-like or data frame of shape (n_rows, n_features)
        Rows of all tasks.
    y : array-like of shape (n_rows,) or (n_rows, n_outputs)
        Their targets.
    groups : array-like of shape (n_rows,), default=None
        Task id of each row; None takes them from the `task_column` of the estimator.
    cv : int or splitter, default=5
        Number of folds of tasks, or a splitter that takes groups.
    n_shots : int, default=None
        Support rows, of each class for a classifier; None takes all rows of the other parts.
    method : {"predict", "predict_proba", "decision_function"}, default="predict"
        What to predict.
    random_state : int, RandomState instance or None, default=None
        Of the parts and of the support rows.

    Returns
    -------
    predictions : ndarray of shape (n_rows,) or (n_rows, n_columns)
        In the order of the rows.

    Raises
    ------
    ValueError
        If there is no task information.

    See Also
    --------
    task_scorer : Scores such predictions, for searches and cross-validation.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor, task_cross_val_predict
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=12, n_rows=10, random_state=0)
    >>> reg = MAMLRegressor(max_iter=5, random_state=0)
    >>> task_cross_val_predict(reg, X, y, task, cv=3, random_state=0).shape
    (120,)
    """
    maml = maml_inside(estimator)
    if maml is None:
        raise TypeError(
            "estimator must be a MAMLRegressor, a MAMLClassifier, or a pipeline or search that "
            f"ends in one; got {type(estimator).__name__}."
        )
    if method not in METHODS or (method != "predict" and not is_classifier(maml)):
        raise ValueError(
            f"method={method!r} is not known for a {type(maml).__name__}; expected "
            f"{METHODS if is_classifier(maml) else METHODS[:1]}."
        )
    if n_shots is not None:
        check_count("n_shots", n_shots)
    X = as_frame(X) if hasattr(X, "shape") else np.asarray(X)
    y = y if hasattr(y, "shape") else np.asarray(y)
    if groups is None and maml.task_column is None:
        raise ValueError(
            "task_cross_val_predict got no task information. Pass groups (the task id of each "
            "row), or set task_column."
        )
    ids = groups if maml.task_column is None else split_task_column(X, maml.task_column)[1]
    _, task = encode_ids(ids, X.shape[0])
    rng = check_random_state(random_state)
    splitter = GroupKFold(cv) if isinstance(cv, int) else check_cv(cv)
    predicted: np.ndarray | None = None
    for train, test in splitter.split(np.zeros(len(task)), groups=task):
        if len(np.intersect1d(task[train], task[test])):
            raise ValueError(
                f"cv={cv!r} tears tasks apart: rows of one task are in both parts. Pass a number "
                "of folds, or a splitter that takes groups, such as GroupKFold or LeaveOneGroupOut."
            )
        values, rows = _fold(estimator, X, y, task, train, test, n_shots, method, rng)
        if predicted is None:
            predicted = np.full((len(task), *values.shape[1:]), _blank(values), values.dtype)
        if values.shape[1:] != predicted.shape[1:]:
            raise ValueError(
                f"The folds know {predicted.shape[1:]} and {values.shape[1:]} classes: some are in "
                "tasks of one fold only. Use fewer folds, or leave rows of rare classes out."
            )
        predicted[rows] = values
    assert predicted is not None
    return predicted


def _blank(values: np.ndarray) -> Any:
    """Value of rows that no fold predicts."""
    return np.nan if values.dtype.kind == "f" else values.ravel()[0]


def _fold(
    estimator: Any,
    X: Any,
    y: Any,
    task: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    n_shots: int | None,
    method: str,
    rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for the rows of the held-out tasks, and which rows these are."""
    model = clone(estimator)
    inside = maml_inside(model)
    assert inside is not None
    named = inside.task_column is not None
    with sklearn.config_context(enable_metadata_routing=True):
        metadata = {} if named else {"groups": task[train]}
        model.fit(_safe_indexing(X, train), _safe_indexing(y, train), **metadata)
    fitted, rows = open_model(model, _safe_indexing(X, test))
    tasks = fitted.task_model().read(rows, _safe_indexing(y, test), None if named else task[test])
    of_model = fitted.task_model()
    answer = {
        "predict": of_model.predict,
        "predict_proba": of_model.probabilities,
        "decision_function": of_model.decision,
    }[method]
    answers, places = [], []
    drawn = _episodes(tasks, n_shots, is_classifier(fitted), rng)
    while episodes := list(itertools.islice(drawn, EPISODES_AT_A_TIME)):
        support, query = zip(*episodes, strict=True)
        of_support, of_query = (
            np.repeat(np.arange(len(part)), list(map(len, part))) for part in (support, query)
        )
        given, asked = np.concatenate(support), np.concatenate(query)
        state = of_model.adapt(
            TaskCollection(
                tasks.X[given], tasks.y[given], of_support, np.arange(len(support)), None, "list"
            ),
            None,
        )
        answers.append(answer(state, of_model.rows(tasks.X[asked]), of_query))
        places.append(test[asked])
    return np.concatenate(answers), np.concatenate(places)


def _episodes(
    tasks: TaskCollection, n_shots: int | None, by_class: bool, rng: np.random.RandomState
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Support and query rows: every row is a query row once."""
    for j in range(tasks.n_tasks):
        parts = np.array_split(rng.permutation(tasks.rows(j)), N_PARTS)
        for k, query in enumerate(parts):
            others = np.concatenate([*parts[:k], *parts[k + 1 :]])
            if not len(query):
                continue
            if n_shots is not None and by_class:
                labels = tasks.y[others]
                others = np.concatenate(
                    [others[labels == label][:n_shots] for label in np.unique(labels)]
                )
            elif n_shots is not None:
                others = others[:n_shots]
            yield others, query
