"""Batched adaptation in partitions: many tasks in bounded memory, over joblib's backends."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import _safe_indexing, check_consistent_length, check_scalar
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.data.frames import as_frame, is_frame, split_task_column
from sklearn_maml.data.ids import encode_ids, find_ids, show_ids
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.models import open_chain, transform_rows
from sklearn_maml.targets.base import Coding


@overload
def adapt_predict(
    estimator: Any,
    X_support: ArrayLike,
    y_support: ArrayLike,
    X_query: ArrayLike,
    *,
    groups_support: ArrayLike | None = ...,
    groups_query: ArrayLike | None = ...,
    return_std: Literal[False] = ...,
    n_jobs: int | None = ...,
    tasks_per_partition: int = ...,
) -> NDArray[Any]: ...


@overload
def adapt_predict(
    estimator: Any,
    X_support: ArrayLike,
    y_support: ArrayLike,
    X_query: ArrayLike,
    *,
    groups_support: ArrayLike | None = ...,
    groups_query: ArrayLike | None = ...,
    return_std: Literal[True],
    n_jobs: int | None = ...,
    tasks_per_partition: int = ...,
) -> tuple[NDArray[Any], NDArray[Any]]: ...


def adapt_predict(
    estimator: Any,
    X_support: ArrayLike,
    y_support: ArrayLike,
    X_query: ArrayLike,
    *,
    groups_support: ArrayLike | None = None,
    groups_query: ArrayLike | None = None,
    return_std: bool = False,
    n_jobs: int | None = None,
    tasks_per_partition: int = 1000,
) -> Any:
    """Adapt to many tasks and predict their query rows, a partition of the tasks at a time.

    Gives what ``adapt(X_support, y_support, groups)`` and ``predict(X_query, groups=groups)`` give,
    to rounding, but keeps the adapted parameters of one partition for each job at a time and none
    afterwards: beyond the data and the predictions, memory does not grow with the number of tasks
    except for 8 bytes a row that say where it belongs (16 with `groups`).

    Parameters
    ----------
    estimator : estimator
        What `adapt` takes: a meta-fitted `MAMLRegressor` or `MAMLClassifier`, or a fitted Pipeline,
        search or FewShot estimator made of one. It is not changed.
    X_support : array-like or data frame of shape (n_support, n_features)
        Support rows of all tasks.
    y_support : array-like of shape (n_support,) or (n_support, n_outputs)
        Their targets.
    X_query : array-like or data frame of shape (n_queries, n_features)
        Rows to predict, in any order. Each has to belong to a task with support rows, unless
        `unseen_tasks` of the estimator is "prior".
    groups_support, groups_query : array-like of shape (n_support,) and (n_queries,), default=None
        Task id of each row; None takes them from the `task_column` of the estimator.
    return_std : bool, default=False
        Whether to return standard deviations, too, as `MAMLRegressor.predict` does.
    n_jobs : int or None, default=None
        Partitions worked on at a time, as in joblib: None is 1 unless inside a
        ``joblib.parallel_config`` context, which also chooses the backend (processes, threads,
        a Dask cluster). The predictions do not depend on it.
    tasks_per_partition : int, default=1000
        Tasks of a partition. The memory of one is that of its rows and of as many copies of the
        adapted parameters as it has tasks.

    Returns
    -------
    y : ndarray of shape (n_queries,) or (n_queries, n_outputs)
        Predictions, in the order of the rows of `X_query`, which may be none.
    std : ndarray of the same shape
        Only if `return_std`.

    Raises
    ------
    ValueError
        If there is no task information, or a query row's task has no support rows.

    See Also
    --------
    adapt : Keeps the adapted parameters, to predict with them again and again.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor, adapt_predict
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> X_new, y_new, shop = make_sinusoid_tasks(n_tasks=300, n_rows=10, random_state=1)
    >>> adapt_predict(
    ...     reg, X_new[::2], y_new[::2], X_new[1::2],
    ...     groups_support=shop[::2], groups_query=shop[1::2], tasks_per_partition=100,
    ... ).shape
    (1500,)
    """
    check_scalar(tasks_per_partition, "tasks_per_partition", numbers.Integral, min_val=1)
    transformers, maml = open_chain(estimator)
    check_is_fitted(maml)
    if return_std and maml.targets_.are_classes:
        raise TypeError("return_std=True is for regression: classes have no standard deviation.")
    task_column = maml.task_column
    X_support, y_support, X_query = (
        as_frame(part) if hasattr(part, "shape") else np.asarray(part)
        for part in (X_support, y_support, X_query)
    )
    check_consistent_length(X_support, y_support)
    by_column = groups_support is None and groups_query is None
    ids, task = encode_ids(*_ids_of(X_support, groups_support, task_column, "groups_support"))
    query_ids, query_task = encode_ids(*_ids_of(X_query, groups_query, task_column, "groups_query"))
    positions = find_ids(query_ids, ids)
    unknown = positions < 0
    if unknown.any() and maml.unseen_tasks != "prior":
        raise ValueError(
            f"X_query has rows of {unknown.sum()} task(s) without support rows, such as "
            f"{show_ids(query_ids[unknown])}. Give support rows of these tasks, leave their query "
            "rows out, or set unseen_tasks='prior'."
        )
    positions[unknown] = len(ids) + np.arange(unknown.sum())
    # as small as they can be: these are the one thing that grows with the data
    task = task.astype(np.int32)
    query_task = positions.astype(np.int32)[query_task]
    n_partitions = -(-(len(ids) + int(unknown.sum())) // tasks_per_partition)
    supports = _partition(task // tasks_per_partition, n_partitions)
    queries = _partition(query_task // tasks_per_partition, n_partitions)
    passed = (None, None) if by_column else (task, query_task)
    del task, query_task

    def jobs() -> Iterator[Any]:
        # the rows of a partition are copied when its turn comes
        for support, query in zip(supports, queries, strict=True):
            if len(query):
                yield delayed(_adapt_predict)(
                    transformers,
                    maml,
                    _safe_indexing(X_support, support),
                    _safe_indexing(y_support, support),
                    _safe_indexing(X_query, query),
                    None if passed[0] is None else passed[0][support],
                    None if passed[1] is None else passed[1][query],
                    return_std,
                )

    # small to send: without the parameters of tasks adapted to before
    maml = copy.copy(maml)
    maml.__dict__.pop("_state", None)
    parts = Parallel(n_jobs=n_jobs)(jobs()) or [_nothing(maml, return_std)]
    order = np.concatenate(queries) if queries else np.zeros(0, dtype=int)
    answers = []
    for k in range(1 + return_std):
        values = np.concatenate([part[k] for part in parts])
        answers.append(np.empty_like(values))
        answers[-1][order] = values
    return tuple(answers) if return_std else answers[0]


def _adapt_predict(
    transformers: list[Any],
    maml: BaseMAML,
    X_support: ArrayLike,
    y_support: ArrayLike,
    X_query: ArrayLike,
    task: Any,
    query_task: Any,
    return_std: bool,
) -> list[np.ndarray]:
    """Work on one partition."""
    X_support, X_query = (transform_rows(transformers, part) for part in (X_support, X_query))
    adapted = copy.copy(maml).adapt(X_support, y_support, groups=task)
    options = {"return_std": True} if return_std else {}
    answers = adapted.predict(X_query, groups=query_task, **options)
    return [np.asarray(values) for values in (answers if return_std else [answers])]


def _nothing(maml: BaseMAML, return_std: bool) -> list[np.ndarray]:
    targets, none = maml.targets_, np.zeros(0, dtype=np.intp)
    outputs = np.zeros((0, targets.n_outputs))
    predicted = targets.decode(outputs, none, Coding())
    return [predicted, targets.decode_std(outputs)] if return_std else [predicted]


def _ids_of(X: Any, groups: Any, task_column: Any, name: str) -> tuple[Any, int, str]:
    """Task ids of rows, the number of rows, and where the ids come from."""
    n_rows = int(X.shape[0])
    if groups is not None:
        if task_column is not None:
            raise ValueError(
                f"Got task_column={task_column!r} and {name}: the tasks are given twice. Leave "
                "one of the two out."
            )
        return groups, n_rows, name
    if task_column is None:
        raise ValueError(
            f"{name} is required: the estimator has no task_column that tells the task of each "
            "row. Pass the task id of each row, or fit with task_column."
        )
    name = f"the task column {task_column!r}"
    if is_frame(X) and task_column in list(X.columns):
        return X[task_column], n_rows, name  # no copy of the rest
    return split_task_column(X, task_column)[1], n_rows, name


def _partition(number: np.ndarray, n_partitions: int) -> list[np.ndarray]:
    """Positions of the rows of each partition, in the order of the rows."""
    order = np.argsort(number, kind="stable")
    if len(order) <= np.iinfo(np.uint32).max:
        order = order.astype(np.uint32)
    return np.split(order, np.cumsum(np.bincount(number, minlength=n_partitions))[:-1])
