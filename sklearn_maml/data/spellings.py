"""The spellings of a task collection that callers use, read into the one form of the library."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_y, validate_data

from sklearn_maml.data.frames import (
    as_frame,
    check_columns,
    is_frame,
    naming_columns,
    split_task_column,
)
from sklearn_maml.data.ids import as_array, check_groups, encode_ids, is_missing
from sklearn_maml.data.tasks import TaskCollection

FLOATS = (np.float64, np.float32)


def is_task_distribution(X: Any) -> bool:
    """Whether X is an endless source of tasks: an object with `sample(n_tasks, random_state)`."""
    # data frames, and groups of them, have a `sample` too
    return callable(getattr(X, "sample", None)) and not (
        hasattr(X, "shape") or hasattr(X, "ngroups")
    )


def _is_task(item: Any) -> bool:
    if (
        not isinstance(item, (tuple, list))
        or len(item) not in (2, 4)
        or not all(hasattr(part, "__len__") and not isinstance(part, str) for part in item)
    ):
        return False
    if all(len(part) == 0 for part in item[:2]):  # a task without rows, which may be []
        return True
    return len(np.shape(item[0][:1] if isinstance(item[0], list) else item[0])) >= 2


def _looks_like_task(item: Any) -> bool:
    first = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    return len(getattr(first, "shape", ())) >= 2


def is_task_list(X: Any, y: Any) -> bool:
    """Whether X is a list of `(X, y)` or `(X_support, y_support, X_query, y_query)` tasks."""
    if y is not None:
        return False
    if isinstance(X, np.ndarray):
        return X.dtype == object and X.ndim == 1 and len(X) > 0 and _is_task(X[0])
    if not isinstance(X, (list, tuple)) or len(X) == 0:
        return False
    # lists that look like tasks but are not well-formed are taken too, to say what is wrong
    return any(_is_task(item) or _looks_like_task(item) for item in X)


def is_task_stack(X: Any, y: Any) -> bool:
    """Whether X is `(n_tasks, n_rows, *features)` with y `(n_tasks, n_rows[, n_outputs])`."""
    shape_X, shape_y = getattr(X, "shape", ()), getattr(y, "shape", None)
    if len(shape_X) < 3:
        return False
    if shape_y is None:
        shape_y = np.shape(y) if y is not None else ()
    return y is None or (len(shape_y) >= 2 and tuple(shape_y[:2]) == tuple(shape_X[:2]))


def n_axes(X: Any) -> int:
    """Count the axes of an array or of a nested list, judged by its first items."""
    if hasattr(X, "shape"):
        return len(X.shape)
    return 1 + n_axes(X[0]) if isinstance(X, (list, tuple)) and len(X) else 0


def concatenate_rows(parts: Sequence[Any]) -> Any:
    """Concatenate rows; data frames with equal columns stay data frames (feature names)."""
    # what has no rows has no say in types, names or shapes
    parts = [as_frame(part) for part in parts if len(part)] or [as_frame(parts[0])]
    first = parts[0]
    if is_frame(first):
        columns = list(first.columns)
        for position, part in enumerate(parts):
            if not is_frame(part) or list(part.columns) != columns:
                got = list(part.columns) if is_frame(part) else type(part).__name__
                raise ValueError(
                    f"The tasks of a list must have the same columns: task 0 has {columns}, "
                    f"task {position} has {got}."
                )
        library = sys.modules[type(first).__module__.split(".")[0]]
        return library.concat(list(parts))
    arrays = [np.asarray(part) for part in parts]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            "The tasks of a list must have the same features: got rows of shapes "
            f"{sorted(shapes, key=str)}. Give every task the same number of features."
        )
    return np.concatenate(arrays)


def _rows_of_list(X: Any) -> tuple[Any, Any, np.ndarray, np.ndarray | None]:
    """Concatenate a list of tasks to rows; returns X, y, task codes and the query mask."""
    lengths = set()
    for position, item in enumerate(X):
        if any(issparse(part) for part in (item if isinstance(item, (tuple, list)) else [item])):
            raise TypeError(
                f"Task {position} of the list has sparse data; dense data is required. Use "
                "X.toarray()."
            )
        if not _is_task(item):
            got = type(item).__name__
            if isinstance(item, (tuple, list)):
                got = f"a tuple of {[type(part).__name__ for part in item]}"
            raise ValueError(
                f"Item {position} of the list of tasks is {got}; expected (X, y) or "
                "(X_support, y_support, X_query, y_query) with 2-D X."
            )
        lengths.add(len(item))
        for what, rows, targets in zip(("support", "query"), item[::2], item[1::2], strict=False):
            if len(rows) != len(targets):
                name = "task" if len(item) == 2 else f"{what} set of task"
                raise ValueError(
                    f"The {name} {position} has {len(rows)} rows of X but {len(targets)} of y."
                )
            if len(rows) == 0 and what == "query":
                raise ValueError(f"The query set of task {position} is empty: drop the task.")
    if len(lengths) > 1:
        raise ValueError(
            "The list mixes (X, y) tasks and (X_support, y_support, X_query, y_query) tasks. "
            "Give all tasks in the same form."
        )
    fixed = lengths == {4}
    parts_X = [part for item in X for part in item[::2]]
    parts_y = [as_array(part) for item in X for part in item[1::2]]
    sizes = np.array([len(part) for part in parts_y])
    per_task = 2 if fixed else 1
    codes = np.repeat(np.arange(len(parts_y)) // per_task, sizes)
    in_query = np.repeat(np.arange(len(parts_y)) % 2 == 1, sizes) if fixed else None
    parts_y = [part for part in parts_y if len(part)] or parts_y[:1]
    shapes = {part.shape[1:] for part in parts_y}
    if len(shapes) > 1:
        raise ValueError(
            "The tasks of a list must have the same targets: got rows of y of shapes "
            f"{sorted(shapes, key=str)}. Give every task the same number of outputs."
        )
    return concatenate_rows(parts_X), np.concatenate(parts_y), codes, in_query


def count_rows(X: Any) -> int:
    """Count the rows of an array, a frame or a list."""
    return int(X.shape[0]) if getattr(X, "shape", ()) else len(X)


def _no_rows(estimator: Any, X: Any, task_column: Hashable | None) -> np.ndarray:
    """Return no rows of the features of a fit. Names of columns without rows say nothing."""
    expected = estimator.feature_shape_
    got = tuple(getattr(X, "shape", ()))[1:]
    if got and task_column is None and got != expected:
        raise ValueError(
            f"X has no rows, of shape {got}, but {type(estimator).__name__} was meta-fitted on "
            f"rows of shape {expected}. Give the same features."
        )
    return np.empty((0, *expected))


def validate_rows(
    estimator: Any, X: Any, X_seen: Any, *, reset: bool, with_column: bool, dtype: Any = FLOATS
) -> np.ndarray:
    """Validate feature rows; `X_seen` is X as the caller gave it (names, feature count)."""
    if not reset and X is X_seen and _is_sound(X, estimator, dtype):
        return X
    if is_frame(X) and X.shape[1] == 0 and with_column:
        raise ValueError(
            "X holds the task column only: 0 feature(s) are left while a minimum of 1 is required."
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "allow_nd": True,
        "ensure_min_features": 1,
    }
    refuse_graphs(X=X)
    # features of these cannot be counted: no shape, or a series of arrays
    if hasattr(X, "__array__") and len(getattr(X, "shape", ())) < 2:
        X, X_seen = np.asarray(X), np.asarray(X_seen)
    check_columns(X, X_seen)
    # a number that is too large for the dtype is refused with a message of its own
    with np.errstate(over="ignore", invalid="ignore"), naming_columns(X):
        if not with_column:
            array = validate_data(estimator, X, reset=reset, **options)
        else:
            array = check_array(X, estimator=estimator, input_name="X", **options)
            validate_data(estimator, X_seen, reset=reset, skip_check_array=True)
    if array.size == 0:  # scikit-learn looks at the second axis alone
        raise ValueError(
            f"Found array with 0 feature(s) (shape={array.shape}) while a minimum of 1 is required."
        )
    return array


def _is_sound(X: Any, estimator: Any, dtype: Any) -> bool:
    """Whether rows are a small array that scikit-learn would return as it is, much later."""
    return (
        type(X) is np.ndarray
        and X.dtype == dtype
        and X.ndim == 2
        and 0 < X.size <= 10_000
        and X.shape[1] == estimator.n_features_in_
        and not hasattr(estimator, "feature_names_in_")
        and bool(np.isfinite(X).all())
    )


def refuse_graphs(**arguments: Any) -> None:
    """Refuse tensors that are part of a graph of derivatives, which numpy cannot read."""
    for name, value in arguments.items():
        if getattr(value, "requires_grad", False) is True:
            raise TypeError(
                f"{name} is a tensor that requires grad, which no estimator takes derivatives "
                f"of. Pass {name}.detach()."
            )


def collect_tasks(
    estimator: Any,
    X: Any,
    y: Any = None,
    groups: Any = None,
    *,
    task_column: Hashable | None = None,
    reset: bool = False,
    classification: bool = False,
    dtype: Any = FLOATS,
    needs_rows: bool = True,
) -> TaskCollection:
    """Validate any spelling of a task collection.

    Parameters
    ----------
    estimator : estimator
        Whose feature names and counts are set (`reset=True`) or checked.
    X, y, groups : see the `fit` method of the estimators
    task_column : hashable, default=None
        Column of X that holds the task id.
    reset : bool, default=False
        Whether this is a `fit`.
    classification : bool, default=False
        Whether y holds class labels rather than numbers.
    dtype : dtype or tuple of dtypes
        Accepted dtypes of X; other ones are converted to the first.
    needs_rows : bool, default=True
        Whether there has to be a row at all; single tasks of a list may have none.

    Returns
    -------
    tasks : TaskCollection
    """
    refuse_graphs(X=X, y=y, groups=groups)
    X = as_frame(X)
    in_query = None
    ids: np.ndarray | None = None
    codes: np.ndarray | None = None
    spelling = "single"
    if issparse(y):
        raise TypeError("Sparse targets were passed; dense ones are required: use y.toarray().")
    if isinstance(X, (list, tuple)) and y is None and len(X) == 0:
        raise ValueError("Got no tasks: the list of tasks is empty. Give at least one task.")
    if y is not None and isinstance(X, (list, tuple)) and n_axes(X) >= 3:
        X, y = _as_stack(X, y)
    X_seen = X
    n_tasks = 1
    if is_task_list(X, y):
        if groups is not None:
            raise ValueError(
                "Got a list of tasks and groups: the tasks are given twice. Leave one of the two "
                "out."
            )
        n_tasks = len(X)
        X, y, codes, in_query = _rows_of_list(X)
        X_seen, spelling = X, "list"
    elif groups is None and task_column is None and is_task_stack(X, y):
        if y is None:
            raise _no_targets(estimator, X)
        X, y = np.asarray(X), np.asarray(y)
        n_tasks = len(X)
        codes = np.repeat(np.arange(n_tasks), X.shape[1])
        X = X.reshape(-1, *X.shape[2:])
        y = y.reshape(-1, *y.shape[2:])
        X_seen, spelling = X, "stack"
    if y is None:
        raise _no_targets(estimator, X)
    of_splitter = None
    no_rows = not needs_rows and hasattr(X, "__len__") and count_rows(X) == 0
    if task_column is not None:
        if codes is None:
            of_splitter = groups
            X, groups = (X, []) if no_rows else split_task_column(X, task_column)
            spelling = "column"
        elif not no_rows:
            # tasks of a list may carry the column too; their place in the list decides
            X, _ = split_task_column(X, task_column)
    elif groups is not None:
        spelling = "groups"
    if no_rows:
        features = _no_rows(estimator, X, task_column).astype(dtype)
    else:
        features = validate_rows(
            estimator, X, X_seen, reset=reset, with_column=task_column is not None, dtype=dtype
        )
    if groups is not None:
        name = "groups" if spelling == "groups" else f"the task column {task_column!r}"
        ids, codes = encode_ids(groups, len(features), name)
        if of_splitter is not None:
            check_groups(of_splitter, codes, task_column)
    elif codes is None:
        ids, codes = np.zeros(1, dtype=int), np.zeros(len(features), dtype=int)
    else:
        ids = np.arange(n_tasks)
    target = _validate_target(estimator, y, features, classification)
    assert ids is not None
    return TaskCollection(features, target, codes, ids, in_query, spelling)


def _as_stack(X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Make arrays of a stack of tasks that is spelt as lists."""
    try:
        return np.asarray(X), np.asarray(y)
    except ValueError as error:
        raise ValueError(
            "Got a list of X and a list of y whose tasks differ in their number of rows. Pass "
            "one list of tasks, list(zip(X, y)), as X and leave y out."
        ) from error


def _no_targets(estimator: Any, X: Any) -> ValueError:
    """Error that y is missing, where X looks as if it had the targets too, how to give them."""
    missing = f"{type(estimator).__name__} requires y to be passed, but the target y is None."
    if hasattr(X, "shape") or isinstance(X, (list, tuple)):
        return ValueError(missing)
    if isinstance(X, Mapping):
        how = "list(X.values()), if its values are (X, y) pairs"
    elif type(X).__module__.startswith("torch."):
        how = "[(X.numpy(), y.numpy()) for X, y in X], if its items are tasks"
    elif hasattr(X, "ngroups"):
        how = "the frame itself, with y, and the name of that column as task_column"
    else:
        how = "list(X), if its items are (X, y) pairs"
    return ValueError(
        f"{missing} X is a {type(X).__name__}; a collection of tasks is a list of (X, y) or "
        f"(X_support, y_support, X_query, y_query) tuples: pass {how}."
    )


def _validate_target(estimator: Any, y: Any, X: np.ndarray, classification: bool) -> np.ndarray:
    if len(X) == 0:
        y = np.asarray(y)
        check_consistent_length(X, y)
        return y.astype(np.intp if classification else np.float64) if y.dtype.kind != "f" else y
    if classification:
        y = _labels(y, estimator)
        check_consistent_length(X, y)
        return y
    if not (type(y) is np.ndarray and y.dtype in FLOATS and y.ndim in (1, 2)):
        with np.errstate(over="ignore", invalid="ignore"):
            y = _check_y(y, multi_output=True, y_numeric=True, estimator=estimator)
    elif not np.isfinite(y).all():
        _check_y(y, multi_output=True, y_numeric=True, estimator=estimator)  # which says so
    check_consistent_length(X, y)
    if y.ndim > 2:
        raise ValueError(f"y must be (n_rows,) or (n_rows, n_outputs); got shape {y.shape}.")
    if y.size == 0:
        raise ValueError(f"y has no outputs: got shape {y.shape}. Give at least one column.")
    # not to the dtype of X: large targets would lose what tells them apart
    y = y if y.dtype in FLOATS else y.astype(np.float32 if y.dtype == np.float16 else np.float64)
    if np.isnan(y).any():  # None among objects, which scikit-learn lets pass
        raise ValueError(
            f"Input y contains NaN or None, in {int(np.isnan(y).sum())} place(s). Leave these rows "
            "out, or fill in their targets."
        )
    largest = float(max(y.max(), -y.min()))
    most = float(np.sqrt(np.finfo(y.dtype).max / y.size)) / 4
    if largest > most:
        raise ValueError(
            f"y has values of up to {largest:g}, whose squared errors are infinite in {y.dtype}: "
            f"expected at most {most:.1g} for {len(y)} rows. Give y in larger units."
        )
    return y


def _labels(y: Any, estimator: Any) -> np.ndarray:
    """Class labels as a 1-D array of ints, bools, strings or sortable objects."""
    y = as_array(y)
    if y.ndim == 2 and y.shape[1] == 1:
        from sklearn.utils import column_or_1d

        y = column_or_1d(y, warn=True)
    if y.dtype.kind == "O" and any(map(is_missing, y.ravel().tolist())):
        raise ValueError("y contains missing labels (NaN or None). Drop those rows.")
    if y.dtype.kind == "O":
        native = np.array(y.tolist())
        if native.dtype.kind in "biu" and native.shape == y.shape:
            y = native  # nullable integers and booleans of pandas arrive as objects
    # casts that tell floats from integers, of values that are refused right after
    with np.errstate(over="ignore", invalid="ignore"):
        y = _check_y(y, multi_output=False, estimator=estimator)
        check_classification_targets(y)
    return y
