"""Task ids: from whatever people have to values that are equal where the ids mean the same.

Whoever takes ids reads them with `encode_ids`, and whoever looks them up does so by `find_ids`.
Between the two an id is a bool, int, float or str, a numpy date or duration, a `datetime` with a
fixed offset from UTC, or a tuple of these: values that every file can hold.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

# types whose text is their value, by name: the libraries may not be there
_AS_TEXT = {"Period", "Interval", "UUID", "time"}
_EPOCH = datetime.datetime(1970, 1, 1)


class IdColumns(list):
    """Columns that together are the ids of rows."""


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT or NA, or a tuple with one."""
    if isinstance(value, tuple):
        return any(map(is_missing, value))
    # NaN, NaT and pandas.NA are the values that are not equal to themselves
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def encode_ids(ids: Any, n_rows: int, name: str = "groups") -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct task ids and each row's position among them.

    Parameters
    ----------
    ids : array-like of shape (n_rows,) or (n_rows, n_parts)
        Ids; with several columns, or as tuples or a MultiIndex, an id has several parts.
    n_rows : int
        How many there have to be.
    name : str, default="groups"
        Where they come from, for messages.

    Returns
    -------
    distinct : ndarray of shape (n_tasks,)
        In sorted order, or in that of appearance where they cannot be sorted.
    codes : int ndarray of shape (n_rows,)
    """
    columns = _columns(ids, name)
    for column in columns:
        if len(column) != n_rows:
            raise ValueError(
                f"{name} must have one task id per row: got {len(column)} ids for {n_rows} rows of "
                "X."
            )
    parts = [_encode_column(column, name) for column in columns]
    if len(parts) == 1:
        return parts[0]
    which, codes = np.unique(
        np.stack([codes for _, codes in parts], axis=1), axis=0, return_inverse=True
    )
    values = [_values(distinct) for distinct, _ in parts]
    tuples = np.empty(len(which), dtype=object)
    tuples[:] = [tuple(v[j] for v, j in zip(values, row, strict=True)) for row in which.tolist()]
    return tuples, codes.reshape(-1)


def check_groups(groups: Any, codes: np.ndarray, task_column: Any) -> None:
    """Refuse `groups` that cut through the tasks of a task column; they are for a splitter alone.

    `codes` is the position of the task of each row.
    """
    _, group = encode_ids(groups, len(codes))
    pairs = np.unique(np.stack([codes, group], axis=1), axis=0)
    cut = len(pairs) - len(np.unique(codes))
    if cut:
        raise ValueError(
            f"Got task_column={task_column!r}, which tells the tasks, and groups that put rows of "
            "one task into several groups: a splitter would tear tasks apart. Pass groups that "
            "keep the rows of a task together, such as the task column itself, or none."
        )


def find_ids(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Position of distinct ids among known ones, or -1; see `KnownIds`."""
    return KnownIds(known).find(wanted)


class KnownIds:
    """Ids to look others up in, in time that does not grow with them after the first call.

    Dates with a time zone are the same if they are at the same moment; one with and one without
    are if the clock on the wall shows the same.
    """

    def __init__(self, known: np.ndarray) -> None:
        self.known = known

    def __reduce__(self) -> Any:  # what looks up is made again where it is needed
        return KnownIds, (self.known,)

    @functools.cached_property
    def _position(self) -> dict[Hashable, int]:
        return {key: j for j, key in enumerate(keys_of(self.known))}

    @functools.cached_property
    def _on_the_wall(self) -> dict[Hashable, int]:
        return {_wall(key): j for key, j in self._position.items()}

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Position of distinct ids among the known ones, or -1."""
        position = self._position
        found = []
        for key in keys_of(wanted):
            at = position.get(key, -1)
            if at < 0:
                wall = _wall(key)
                at = (position if wall != key else self._on_the_wall).get(wall, -1)
            found.append(at)
        return np.array(found, dtype=np.intp)


def look_scaled(ids: np.ndarray, known: np.ndarray) -> bool:
    """Whether distinct ids look like known ones that went through a scaler, or the other way round.

    Some have fractions and the others do not; or both have, and one set is the other by another
    unit and zero. Ids that are evenly spaced are this of any others.
    """
    if not (len(ids) and len(known) and {ids.dtype.kind, known.dtype.kind} <= set("iuf")):
        return False
    if _are_whole(ids) or _are_whole(known):
        return _are_whole(ids) != _are_whole(known)
    if not 3 <= len(ids) == len(known):
        return False
    with np.errstate(invalid="ignore"):  # of infinite ids
        one, other = ((np.sort(v) - v.min()) / np.ptp(v) for v in (ids, known))
    even = np.linspace(0, 1, len(ids))
    return bool(np.allclose(one, other) and not np.allclose(one, even))


def _are_whole(ids: np.ndarray) -> bool:
    return ids.dtype.kind in "iu" or bool((ids == np.round(ids)).all())


def join_ids(known: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Ids of two calls, one behind the other, of whichever types."""
    if known.dtype == more.dtype or known.dtype.kind == more.dtype.kind == "U":
        return np.concatenate([known, more])
    return _objects([*_values(known), *_values(more)])


def keys_of(ids: np.ndarray) -> list[Hashable]:
    """Return hashable values that are equal where ids are; plain data."""
    if ids.dtype.kind in "mM":
        return list(map(_key, ids))
    values = ids.tolist()
    return list(map(_key, values)) if ids.dtype.kind == "O" else values


def show_ids(ids: np.ndarray) -> str:
    """Return the first ids, as messages show them."""
    shown = [show_id(value) for value in _values(ids[:3])]
    return f"[{', '.join(shown)}]"


# -- reading ---------------------------------------------------------------------------------------


def _columns(ids: Any, name: str) -> list[Any]:
    """One column for each part of the ids: an array, or what has `factorize`."""
    if isinstance(ids, (str, bytes)):
        raise ValueError(
            f"{name} must be one task id per row, a 1-D array; got the text {ids!r}, of shape (). "
            f"If that is a column of X, set task_column={ids!r}."
        )
    if isinstance(ids, IdColumns):
        return [column for part in ids for column in _columns(part, name)]
    library = type(ids).__module__.partition(".")[0]
    if library == "dask":  # a series of dask has columns, too
        ids = ids.compute()
    if hasattr(ids, "columns") and hasattr(ids, "shape"):  # a frame
        places = range(ids.shape[1])
        parts = ids.columns if library == "pyarrow" else [column_at(ids, k) for k in places]
        return [column for part in parts for column in _columns(part, name)]
    if hasattr(ids, "factorize") and ids.ndim == 1:
        # a column of a pandas frame is hashed where it lies; as an array, strings become objects
        return [ids]
    if library == "pyarrow":
        ids = _objects(ids.to_pylist())
    elif library == "polars" and _is_zoned_or_nested(ids):
        ids = _objects(ids.to_list())  # an array has the moment in UTC
    elif isinstance(ids, (list, tuple)) and any(isinstance(value, (list, tuple)) for value in ids):
        if {len(value) for value in ids if isinstance(value, (list, tuple))} == {1}:
            ids = [value[0] for value in ids]
        ids = _objects(ids)  # an array would have one type for all parts
    else:
        ids = as_array(ids)
    if np.ma.is_masked(ids):
        raise _missing(name)
    if ids.ndim == 2 and ids.shape[1]:
        return list(ids.T)
    if ids.ndim != 1:
        raise ValueError(
            f"{name} must be one task id per row, a 1-D array, or a column for each part of the "
            "id; got "
            + (
                f"a {type(ids.item()).__name__}, of shape ()."
                if ids.ndim == 0
                else f"shape {ids.shape}."
            )
        )
    return [ids]


def column_at(frame: Any, place: int) -> Any:
    """Return a column of a frame by its place: names may be there twice."""
    return frame.iloc[:, place] if hasattr(frame, "iloc") else frame.to_series(place)


def _is_zoned_or_nested(series: Any) -> bool:
    dtype = series.dtype
    return getattr(dtype, "time_zone", None) is not None or dtype.is_nested()


def as_array(values: Any) -> np.ndarray:
    """Values as an array that keeps apart what they are.

    Of a list with texts numpy makes texts of all else, NaN too; and floats of integers beyond 63
    bits beside others, or of large ones beside floats: several hashes would become one number.
    """
    array = np.asanyarray(values)
    if not isinstance(values, (list, tuple)) or array.ndim != 1 or array.dtype.kind not in "USf":
        return array
    kinds = {*map(type, values)}
    if array.dtype.kind == "f":
        large = bool((np.abs(array) >= 2**53).any())
        lost = large and any(issubclass(kind, numbers.Integral) for kind in kinds)
    else:
        lost = len(kinds) > 1
    return _objects(values) if lost else array


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = list(map(_hashable, values))
    return array


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):  # a row of a column of structs
        return tuple(value.values())
    return tuple(value) if isinstance(value, (list, np.ndarray)) else value


def _missing(name: str) -> ValueError:
    return ValueError(
        f"{name} contains missing values (NaN or None). Every row needs a task id: drop the "
        "rows or fill the ids in."
    )


def _encode_column(column: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(column, "factorize"):
        try:
            codes, distinct = column.factorize()
        except TypeError:  # lists in it are no keys
            return _encode_column(_objects(list(column)), name)
        missing = bool((codes < 0).any())
        plain = isinstance(distinct.dtype, np.dtype)  # pandas has types of its own, too
        distinct = np.asarray(distinct) if plain else _objects(list(distinct))
    elif column.dtype.kind in "OUS":
        codes, distinct = _factorize(column)
        missing = False
    else:
        distinct, codes = _unique(column)
        missing = False
    if missing or _has_missing(distinct):
        raise _missing(name)
    distinct, codes = _normalised(distinct, codes.reshape(-1), name)
    try:
        order = np.argsort(distinct)
    except TypeError:  # ids of several types cannot be sorted: keep the order of appearance
        return distinct, codes
    rank = np.empty(len(order), dtype=np.intp)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[codes]


def _unique(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct ids, and each one's position; by counting where they are close together."""
    low, high = (int(ids.min()), int(ids.max())) if ids.dtype.kind in "iu" and ids.size else (0, -1)
    if not 0 <= high - low <= 2 * ids.size or max(-low, high) > 2**62:
        distinct, codes = np.unique(ids, return_inverse=True)
        return distinct, codes
    place = ids.astype(np.intp) - low
    present = np.bincount(place, minlength=high - low + 1) > 0
    distinct = (np.flatnonzero(present) + low).astype(ids.dtype)
    return distinct, (np.cumsum(present) - 1)[place]


def _has_missing(ids: np.ndarray) -> bool:
    if ids.dtype.kind in "fc":
        return bool(np.isnan(ids).any())
    if ids.dtype.kind in "mM":
        return bool(np.isnat(ids).any())
    return ids.dtype.kind == "O" and any(map(is_missing, ids.tolist()))


def _factorize(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each id among the distinct ones, and these, in the order of appearance.

    Strings sort slowly: `numpy.unique` would sort those of all rows.
    """
    position: dict[Hashable, int] = {}
    values = list(map(_hashable, ids.tolist())) if ids.dtype.kind == "O" else ids.tolist()
    codes = np.fromiter(
        (position.setdefault(value, len(position)) for value in values),
        dtype=np.intp,
        count=len(ids),
    )
    distinct = np.empty(len(position), dtype=ids.dtype)
    distinct[:] = list(position)
    return codes, distinct


# -- values ----------------------------------------------------------------------------------------


def _normalised(
    distinct: np.ndarray, codes: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids by value: those that become equal are one."""
    kind = distinct.dtype.kind
    if kind in "biuU" or distinct.dtype == np.float64:
        return distinct, codes
    if kind == "f":  # the number that is written, not the one that its digits in binary come to
        return np.array([_number(v) for v in distinct], dtype=np.float64), codes
    if kind in "mM":
        return _in_microseconds(distinct), codes
    values = [_value(value, name) for value in _values(distinct)]
    array = _typed(values)
    first: dict[Hashable, int] = {}
    where = np.array([first.setdefault(key, len(first)) for key in keys_of(array)], dtype=np.intp)
    _, kept = np.unique(where, return_index=True)
    return array[kept], where[codes]


def _values(ids: np.ndarray) -> list[Any]:
    """Items of an array; dates and durations stay scalars of numpy."""
    return list(ids) if ids.dtype.kind in "mM" else ids.tolist()


def _value(value: Any, name: str) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, enum.Enum):
        return _value(value.value, name)
    if isinstance(value, tuple):
        return tuple(_value(_hashable(part), name) for part in value)
    if isinstance(value, (datetime.date, datetime.timedelta, np.datetime64, np.timedelta64)):
        return _date(value, name)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} has bytes that are no UTF-8, such as {value!r}. Give texts or numbers."
            ) from error
    if isinstance(value, decimal.Decimal):
        if value == value.to_integral_value():
            return int(value)
        return float(value) if decimal.Decimal(repr(float(value))) == value else str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _number(value)
    if type(value).__name__ in _AS_TEXT:
        return str(value)
    raise ValueError(
        f"{name} has ids of type {type(value).__name__}, such as {value!r}. Expected numbers, "
        "texts, dates, or tuples of them: give str(id), or a number for each id."
    )


def _number(value: Any) -> float:
    """Nearest float64 to a number as it is written."""
    return float(str(value)) if isinstance(value, np.floating) else float(value)


def _date(value: Any, name: str) -> Any:
    """Date without a zone, or duration, as a scalar of numpy; one with a zone by its offset."""
    if hasattr(value, "to_numpy") and getattr(value, "tzinfo", None) is None:  # of pandas
        value = value.to_numpy()
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return _in_microseconds(np.array([value]))[0]
    if isinstance(value, datetime.timedelta):
        return np.timedelta64(value, "us")
    if not isinstance(value, datetime.datetime) or value.tzinfo is None:
        return np.datetime64(value, "us")
    if getattr(value, "nanosecond", 0):
        raise ValueError(
            f"{name} has dates with a time zone and parts of a microsecond, such as {value}. Round "
            "them, or leave the time zone out."
        )
    if hasattr(value, "to_pydatetime"):
        value = value.to_pydatetime()
    offset = value.utcoffset()
    return value.replace(tzinfo=datetime.timezone(offset))


def _in_microseconds(dates: np.ndarray) -> np.ndarray:
    """Dates or durations in microseconds, if that loses nothing."""
    kind = dates.dtype.kind
    # generic durations have no unit
    micro = dates.astype(f"{kind}8[us]")
    return micro if (micro == dates).all() else dates.astype(f"{kind}8[ns]")


def _typed(values: list[Any]) -> np.ndarray:
    """Array of one type where the values have one; texts and the rest are objects."""
    kinds = {*map(type, values)}
    if (kinds and kinds <= {np.datetime64}) or kinds == {np.timedelta64}:
        return np.array(values)
    if kinds in ({bool}, {float}) or (
        kinds == {int} and all(-(2**63) <= value < 2**63 for value in values)
    ):
        return np.array(values)
    return _objects(values)


def _key(value: Any) -> Hashable:
    if isinstance(value, np.datetime64):
        return "date", _nanoseconds(value)
    if isinstance(value, np.timedelta64):
        return "duration", _nanoseconds(value)
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    return value


def _nanoseconds(value: Any) -> int:
    unit = 1 if np.datetime_data(value.dtype)[0] == "ns" else 1000
    return int(value.astype(np.int64)) * unit


def _wall(key: Any) -> Hashable:
    """Key of the same date without its zone."""
    if isinstance(key, datetime.datetime):
        since = key.replace(tzinfo=None) - _EPOCH
        return "date", (since // datetime.timedelta(microseconds=1)) * 1000
    if isinstance(key, tuple):
        return tuple(map(_wall, key))
    return key


def show_id(value: Any) -> str:
    """Return an id as messages show it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(show_id, value))})"
    if isinstance(value, np.datetime64):
        text = str(value)
        at_midnight = text.rstrip("0.:").endswith("T")
        return text.partition("T")[0] if at_midnight else text.rstrip("0").rstrip(".")
    if isinstance(value, np.timedelta64):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    return value.isoformat() if isinstance(value, datetime.datetime) else repr(value)
