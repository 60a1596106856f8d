"""Weights of rows and of tasks, in the spellings of a task collection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import _check_sample_weight

from sklearn_maml.data.frames import is_frame, take_column
from sklearn_maml.data.ids import encode_ids, find_ids, show_ids
from sklearn_maml.data.spellings import is_task_list, refuse_graphs
from sklearn_maml.data.tasks import TaskCollection

# Exponents of the largest weight of support rows that are taken at their word: rows that count as
# more than 2**10 each let systems become singular, and ones of less than 2**-50 say nothing.
COUNTS = (-50, 10)

BLOCK = 2**17  # numbers that are marked at a time
LOOKED_AT = 2**18  # rows of very many that tell whether they are shared
NO_WEIGHT = "The sample weights are all zero. Give at least one row a positive weight."
LEAST = 1e-20  # of the largest weight: sums of smaller ones may be 0 in float32


def check_weights(
    sample_weight: Any,
    X: np.ndarray,
    exponents: tuple[int, int] = (0, 0),
    *,
    zeros: bool = False,
    **options: Any,
) -> np.ndarray:
    """Validate weights of rows, and scale them, so that no sum of them overflows.

    By the power of two, which keeps their ratios, that is nearest to 1 and gives the largest weight
    an exponent between these two; with the default it is at most 1. With `zeros` all may be 0.
    """
    refuse_graphs(sample_weight=sample_weight)
    if zeros:
        given = np.asarray(sample_weight)
        if given.shape in ((), X.shape[:1]) and (given == 0).all():
            return np.zeros(len(X), options.get("dtype", X.dtype))
    # a number that is too large for the dtype is refused with a message of its own
    with np.errstate(over="ignore", invalid="ignore"):
        weights = _check_sample_weight(sample_weight, X, **options)
    exponent = int(np.frexp(np.abs(weights).max())[1])
    shift = min(max(exponent, exponents[0]), exponents[1]) - exponent
    return np.ldexp(weights, shift) if shift else weights


def take_weights(X: Any, y: Any, sample_weight: Any, known: str | None) -> tuple[Any, Any]:
    """Take a column of weights out of X, which is no feature; also return the weights of the rows.

    A text is the name of the column, and `known` the one that a call before gave; other weights
    are returned as they are.
    """
    name = sample_weight if isinstance(sample_weight, str) else known
    if name is None:
        return X, sample_weight
    if is_task_list(X, y) and all(isinstance(task, (tuple, list)) for task in X):
        pairs = [_take_from_task(task, name) for task in X]
        taken, found = [task for task, _ in pairs], [columns for _, columns in pairs]
        missing = any(columns is None for columns in found)
    else:
        taken, found = take_column(X, name)
        missing = found is None
    if not isinstance(sample_weight, str):
        return taken, sample_weight
    if missing:
        has = f"the columns {list(X.columns)}" if is_frame(X) else "no such column"
        raise ValueError(
            f"sample_weight={name!r} is the name of a column, but X, a {type(X).__name__}, has "
            f"{has}. Name a column of a data frame, or give one weight for each row."
        )
    return taken, found


def _take_from_task(task: Any, name: str) -> tuple[Any, Any]:
    """One task of a list without the column, and what it had in it, for `spread_weights`."""
    pairs = [take_column(part, name) for part in task[::2]]
    rest = tuple(part if k % 2 else pairs[k // 2][0] for k, part in enumerate(task))
    columns = [column for _, column in pairs]
    if any(column is None for column in columns):
        return rest, None
    return rest, columns[0] if len(columns) == 1 else tuple(columns)


def spread_weights(sample_weight: Any, tasks: TaskCollection) -> Any:
    """Make weights that are spelt by tasks one for each row; others are left as they are.

    By tasks is a dict of their ids (or places in the list); for a list or an array of tasks also an
    item for each, which is the weight of the task or those of its rows.
    """
    if isinstance(sample_weight, Mapping):
        return _of_ids(sample_weight, tasks)[tasks.codes]
    if tasks.spelling not in ("list", "stack") or not hasattr(sample_weight, "__len__"):
        return sample_weight
    if len(sample_weight) != tasks.n_tasks:
        return sample_weight
    if all(_is_scalar(part) for part in sample_weight):
        return np.asarray(sample_weight)[tasks.codes]
    parts = []
    for j, (part, size) in enumerate(zip(sample_weight, tasks.sizes.tolist(), strict=True)):
        refuse_graphs(sample_weight=part)
        if tasks.in_query is not None and isinstance(part, (tuple, list)) and len(part) == 2:
            part = np.concatenate([np.atleast_1d(half) for half in part])  # of support and query
        part = np.asarray(part)
        if part.shape != (size,):
            raise ValueError(
                f"sample_weight of task {j} has shape {part.shape}, and the task {size} row(s). "
                "Give one weight for each row of every task, or one for each task."
            )
        parts.append(part)
    return np.concatenate(parts)


def _is_scalar(value: Any) -> bool:
    return not hasattr(value, "__len__") or getattr(value, "shape", None) == ()


def _as_number(key: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sample_weight of task {key!r} is {value!r}; expected a number."
        ) from error


def _of_ids(weights: Mapping[Any, Any], tasks: TaskCollection) -> np.ndarray:
    """Weight (n_tasks,) of each task, of those by id; there may be more of them."""
    if tasks.spelling == "single":
        raise ValueError(
            "sample_weight is a dict of task ids, but there is no task information: got neither "
            "groups nor task_column. Give them, or one weight for each row."
        )
    known, place = encode_ids(list(weights), len(weights), "the keys of sample_weight")
    if not tasks.named and len(known) != tasks.n_tasks:
        raise ValueError(
            f"sample_weight has {len(known)} keys, which are places in the list of tasks, of which "
            f"there are {tasks.n_tasks}: a part of the list would get the weights of others. Give "
            "a list with the weight of each task."
        )
    found = find_ids(tasks.ids, known)
    if (found < 0).any():
        missing = tasks.ids[found < 0]
        raise ValueError(
            f"sample_weight has no weight of {len(missing)} of the {tasks.n_tasks} tasks, such as "
            f"{show_ids(missing)}; its keys are {show_ids(known)}. Give the weight of every task "
            "by its id; 0 leaves a task out."
        )
    values = np.empty(len(known))
    values[place] = [_as_number(key, value) for key, value in weights.items()]
    return values[found]


def weighted(tasks: TaskCollection, sample_weight: Any) -> TaskCollection:
    """Tasks of meta-training with weights, None where they are equal; rows of weight 0 are out."""
    if sample_weight is None:
        return tasks
    given = spread_weights(sample_weight, tasks)
    options: dict[str, Any] = {"dtype": np.float64, "ensure_non_negative": True}
    weights = check_weights(given, tasks.X, zeros=True, **options)
    if not weights.any():
        raise ValueError(NO_WEIGHT)
    if not weights.all():
        kept = weights > 0
        if tasks.in_query is not None:  # an episode needs query rows
            kept &= (np.bincount(tasks.codes, kept & tasks.in_query) > 0)[tasks.codes]
        tasks, weights = tasks.take_rows(np.flatnonzero(kept)), weights[kept]
    if weights.min() == weights.max():
        return tasks
    return tasks.having(weight=np.maximum(weights, LEAST))


def merged(tasks: TaskCollection) -> TaskCollection:
    """Make one row of those that are identical, whose weight is the sum of theirs.

    For splits of one task: a row that is there twice would be a support and a query row of the same
    split, and is what one of weight 2 is. Rows of different weights come in an order that depends
    on nothing but them.
    """
    marks = row_marks(tasks.X)
    if tasks.y.dtype.kind == "f":
        of_y = row_marks(tasks.y)
    else:
        of_y = np.unique(tasks.y, return_inverse=True)[1].reshape(-1)
    both = row_marks(np.stack([marks, of_y], 1).view(np.float64))
    key, first, place = np.unique(both, return_index=True, return_inverse=True)
    same = first[place.reshape(-1)]
    if (
        len(key) < 2
        or (len(key) == len(tasks.X) and tasks.weight is None)
        or not (np.array_equal(tasks.X[same], tasks.X) and np.array_equal(tasks.y[same], tasks.y))
    ):
        return tasks
    weight = np.bincount(place.reshape(-1), tasks.weight, len(key)).astype(np.float64)
    if weight.min() == weight.max():
        return tasks.at(np.sort(first)).having(weight=None)
    return tasks.at(first).having(weight=weight)


def row_marks(X: np.ndarray) -> np.ndarray:
    """Checksum (n_rows,) of each row of features, an int64."""
    return np.concatenate([*_marks(X)]).view(np.int64)


def share_rows(X: np.ndarray) -> bool:
    """Whether no more than half of the rows are distinct, as a part of very many tells."""
    n_parts = np.uint64(max(len(X) // LOOKED_AT, 1))
    # a part has all rows that are equal, or none of them
    marks = np.concatenate([m[(m >> np.uint64(32)) % n_parts == 0] for m in _marks(X)])
    marks.sort()
    n_distinct = np.count_nonzero(marks[1:] != marks[:-1]) + min(len(marks), 1)
    return bool(2 * n_distinct <= len(marks))  # a part may be empty: of very few distinct ones


def _marks(X: np.ndarray) -> Iterator[np.ndarray]:
    """Checksums of rows, some rows at a time."""
    flat = X.reshape(len(X), -1)
    n_columns = flat.shape[1]
    odd = np.random.RandomState(0).randint(0, 2**63, n_columns, dtype=np.uint64) * 2 + 1
    at_a_time = max(BLOCK // max(n_columns, 1), 1)  # copies of images would be large
    for start in range(0, max(len(X), 1), at_a_time):
        part = flat[start : start + at_a_time]
        bits = np.ascontiguousarray(part, dtype=np.float64).view(np.uint64)
        yield ((bits ^ (bits >> np.uint64(29))) * odd).sum(1, dtype=np.uint64)
