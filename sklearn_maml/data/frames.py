"""Data frames: their columns, the task column among them, and what is wrong with the others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from scipy.sparse import issparse

from sklearn_maml.data.ids import IdColumns, column_at

PASS_THROUGH = (
    "Let the column pass through ('passthrough' in a ColumnTransformer): a transformer such as a "
    "scaler would change the ids."
)


def is_frame(X: Any) -> bool:
    """Whether X is a pandas or polars data frame."""
    return hasattr(X, "columns") and hasattr(X, "shape")


def as_frame(X: Any) -> Any:
    """Make a frame of a table of pyarrow, dask or narwhals; refuse a LazyFrame."""
    if type(X).__name__ == "LazyFrame":
        raise TypeError("X is a LazyFrame, whose rows are not computed yet. Pass X.collect().")
    if hasattr(X, "columns") and hasattr(X, "__dask_graph__"):
        return X.compute()
    if hasattr(X, "columns") and hasattr(X, "to_native"):
        return as_frame(X.to_native())
    if type(X).__module__.startswith("pyarrow") and hasattr(X, "column_names"):
        try:
            return X.to_pandas(split_blocks=True)  # which takes columns as they are
        except ImportError:
            import polars

            return polars.from_arrow(X)
    return X


def check_columns(X: Any, X_seen: Any) -> None:
    """Refuse a frame whose columns cannot be told apart, or are times.

    `X_seen` has the task column, too, which may be anything.
    """
    if not is_frame(X_seen):
        return
    X, frame = X if is_frame(X) else X_seen, X_seen
    names = list(frame.columns)
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(
            f"X has several columns of the same name: {twice[:5]}. Rename them, or leave some out."
        )
    kinds = sorted({type(name).__name__ for name in names})
    if len(kinds) > 1 and "str" in kinds:
        raise TypeError(
            f"X has column names of several types: {kinds}. Feature names are only supported if "
            "all input features have string names: use X.columns = X.columns.astype(str), or name "
            "the columns anew."
        )
    times = {n: kind for n, kind in zip(X.columns, X.dtypes, strict=True) if _is_time(kind)}
    if times:
        raise ValueError(
            f"X has columns of dates or durations: {_listed(times)}. Features are numbers: make "
            "some of them, such as days since a date or the month, with a FunctionTransformer in a "
            "ColumnTransformer in front."
        )


@contextlib.contextmanager
def naming_columns(X: Any) -> Iterator[None]:
    """Say of an error with the columns of a frame which they are, and what to do about them."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message = _diagnosis(X, error) if is_frame(X) else None
        if message is None:
            raise
        raise ValueError(message) from error


def _diagnosis(X: Any, error: Exception) -> str | None:
    columns = [(name, column_at(X, k)) for k, name in enumerate(X.columns)]
    missing = [name for name, column in columns if _has_missing(column)]
    if "contains NaN" in str(error):
        return (
            f"Input X contains NaN in the columns {missing[:5]}. Fill them in, with "
            "sklearn.impute.SimpleImputer in a pipeline in front, or leave their rows out."
        )
    if "contains infinity" in str(error):
        wide = [name for name, column in columns if _is_infinite(column)]
        return f"{error} It is in the columns {wide[:5]}." if wide else None
    texts = {
        name: kind
        for kind, (name, column) in zip(X.dtypes, columns, strict=True)
        if not _is_number(kind) and not _all_numbers(column)
    }
    if not texts:
        return None
    return (
        f"X has columns that are no numbers: {_listed(texts)} ({error}). Features are numbers: "
        "encode them, with sklearn.preprocessing.OneHotEncoder or OrdinalEncoder in a "
        "ColumnTransformer in front."
    )


def _listed(kinds: dict[Any, Any]) -> str:
    some = [f"{name!r} ({kind})" for name, kind in list(kinds.items())[:5]]
    return ", ".join(some) + (", ..." if len(kinds) > 5 else "")


def _is_time(kind: Any) -> bool:
    name = str(kind).lower()
    return name.startswith(("datetime", "timedelta", "date", "duration", "time", "period"))


def _is_number(kind: Any) -> bool:
    return str(kind).lower().startswith(("int", "uint", "float", "bool", "double", "decimal"))


def _all_numbers(column: Any) -> bool:
    """Whether the values of a column of objects or texts can be read as numbers."""
    try:
        np.asarray(column).astype(np.float64)
    except (TypeError, ValueError):
        return False
    return True


def _is_infinite(column: Any) -> bool:
    return bool(np.isinf(np.asarray(column, dtype=np.float64)).any())


def _has_missing(column: Any) -> bool:
    values = column.isna() if hasattr(column, "isna") else column.is_null()
    if hasattr(column, "is_nan") and column.dtype.is_float():
        values = values | column.is_nan()
    return bool(values.any())


def split_task_column(X: Any, task_column: Any) -> tuple[Any, Any]:
    """Take the task ids out of X.

    Parameters
    ----------
    X : data frame or array-like of shape (n_rows, n_columns)
    task_column : hashable or list
        Column name, name of an index level (pandas), or a position; a list of them if several
        together are the id.

    Returns
    -------
    X : same type, without the columns
    ids : array-like of shape (n_rows,), or several
        For `encode_ids`.
    """
    if is_frame(X):
        columns = list(X.columns)
        levels = list(getattr(getattr(X, "index", None), "names", []))
        places = [_find_column(name, columns, levels) for name in _parts(task_column, columns)]
        taken = {place for place in places if isinstance(place, int)}
        ids = [
            X.index.get_level_values(place.name)
            if isinstance(place, _Level)
            else column_at(X, place)
            for place in places
        ]
        return _without(X, taken), IdColumns(ids) if len(ids) > 1 else ids[0]
    if issparse(X):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. Use X.toarray()."
        )
    array = np.asarray(X)
    positions = task_column if isinstance(task_column, list) else [task_column]
    for position in positions:
        if not isinstance(position, (int, np.integer)):
            raise ValueError(
                f"task_column={position!r} names a column, but X is a {type(X).__name__} without "
                "column names. Pass a data frame (a transformer in front gives one after "
                ".set_output(transform='pandas')), or give the position of the column."
            )
        if array.ndim != 2:
            raise ValueError(
                f"Expected 2D array with the task id in column {position}, got {array.ndim}D array "
                "instead. Reshape your data."
            )
        if not -array.shape[1] <= position < array.shape[1]:
            raise ValueError(
                f"task_column={position} is out of range: X has {array.shape[1]} columns."
            )
    ids = [np.asarray(array[:, position]) for position in positions]
    return np.delete(array, positions, axis=1), IdColumns(ids) if len(ids) > 1 else ids[0]


def take_column(X: Any, name: str) -> tuple[Any, Any]:
    """Return a frame without a column, and the column; None and X as it is, if it has none."""
    X = as_frame(X)
    columns = list(X.columns) if is_frame(X) else []
    if columns.count(name) != 1:  # of two it is not known which
        return X, None
    place = columns.index(name)
    return _without(X, {place}), np.asarray(column_at(X, place))


def _without(X: Any, places: set[int]) -> Any:
    if not places:
        return X
    kept = [k for k in range(X.shape[1]) if k not in places]
    return X.iloc[:, kept] if hasattr(X, "iloc") else X[:, kept]


@dataclasses.dataclass(frozen=True)
class _Level:
    """A level of the index of a frame."""

    name: Hashable


def _parts(task_column: Any, columns: list[Any]) -> list[Any]:
    """Names of the columns; a tuple that is no name itself may be several."""
    if isinstance(task_column, tuple) and task_column not in columns:
        several = all(part in columns for part in task_column)
        return list(task_column) if several else [task_column]
    return task_column if isinstance(task_column, list) else [task_column]


def _find_column(name: Any, columns: list[Any], levels: list[Any]) -> int | _Level:
    """Position of a column in a frame, or a level of its index."""
    if columns.count(name) > 1:
        raise ValueError(
            f"task_column={name!r} names {columns.count(name)} columns of X. Rename one of them."
        )
    if name in columns:
        return columns.index(name)
    if name in levels:
        return _Level(name)
    # a level of columns that has one name for all rows of them: frame["task"] in pandas
    on_top = [k for k, c in enumerate(columns) if isinstance(c, tuple) and c[0] == name]
    if len(on_top) == 1 and not any(columns[on_top[0]][1:]):
        return on_top[0]
    if isinstance(name, (int, np.integer)) and -len(columns) <= name < len(columns):
        return int(name) % len(columns)
    raise ValueError(
        f"task_column={name!r} is neither a column nor an index level of X. Got columns "
        f"{columns}. {_where_it_went(name, columns)}"
    )


def _where_it_went(name: Any, columns: list[Any]) -> str:
    """Say what has become of a task column, as far as its new name tells."""
    renamed = [c for c in columns if isinstance(c, str) and c.endswith(f"__{name}")]
    if not renamed:
        return "Set task_column to the column that holds the task id."
    return (
        f"A ColumnTransformer has renamed it to {renamed[0]!r}: set task_column={renamed[0]!r}, or "
        f"give the ColumnTransformer verbose_feature_names_out=False. {PASS_THROUGH}"
    )
