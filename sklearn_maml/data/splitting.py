"""Which tasks are held out for validation, and which can be split into episodes at all."""

from __future__ import annotations

import numpy as np

from sklearn_maml.data.ids import show_id
from sklearn_maml.data.tasks import TaskCollection


def hold_out(
    tasks: TaskCollection,
    asked: bool | str,
    fraction: float,
    seed: int,
    n_ways_of_pool: int | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Choose tasks for validation.

    Parameters
    ----------
    tasks : TaskCollection
        With encoded targets.
    asked : bool or "auto"
        Whether to; "auto" does where there are at least 10 tasks.
    fraction : float
        Of the tasks.
    seed : int
    n_ways_of_pool : int or None
        Where the classes of an episode are drawn from a pool (one task that stands for all):
        their number. Classes are then held out.

    Returns
    -------
    kept, held : int ndarray, int ndarray or None
        Positions of tasks, or classes of a pool, in ascending order.
    """
    pool = n_ways_of_pool is not None
    demanded = asked != "auto" and bool(asked)
    units = int(tasks.y.max()) + 1 if pool else tasks.n_tasks
    least = 2 * (n_ways_of_pool or 0) if pool else (2 if demanded else 10)
    if not asked or units < least:
        if demanded:
            what = "classes" if pool else "tasks"
            raise ValueError(
                f"early_stopping=True holds out {what} for validation, but there are only {units} "
                f"(at least {least} are needed). Set early_stopping=False."
            )
        return np.arange(units), None
    n_valid = min(max(round(fraction * units), 1), units - 1)
    if n_ways_of_pool is not None:
        n_valid = min(max(n_valid, n_ways_of_pool), units - n_ways_of_pool)
    order = np.random.default_rng((seed, 2)).permutation(units)
    return np.sort(order[n_valid:]), np.sort(order[:n_valid])


def part_of(tasks: TaskCollection, units: np.ndarray, pool: bool) -> TaskCollection:
    """Tasks at some positions, or the rows of some classes of a pool; all without a copy."""
    if not pool:
        return tasks if len(units) == tasks.n_tasks else tasks.select(units)
    rows = np.isin(tasks.y, units)
    return tasks if rows.all() else tasks.at(rows)


def name_of(tasks: TaskCollection, j: int) -> str:
    """Return words that name a task in a message; none where there is only one."""
    return "" if tasks.spelling == "single" else f" of task {show_id(tasks.ids[j])}"


def usable(
    tasks: TaskCollection,
    n_shots: int | None,
    n_ways: int | None,
    classification: bool,
    least: int = 0,
) -> tuple[TaskCollection, str | None]:
    """Leave out what no episode can be made of, and say which tasks are small.

    Tasks without rows are left out, and those with fewer support rows than `least`, which the
    module cannot do without; where the classes of an episode are those of a task, classes of a
    single row in their task and tasks that have fewer than two others. The words tell which tasks
    are too small to be split as asked, and what becomes of them; None: none.
    """
    if tasks.in_query is not None:
        return tasks, None
    given, parts = tasks, []
    if n_ways is not None:
        cell, count = _classes_of_tasks(tasks)
        n_classes = np.bincount(tasks.codes, (count > 1) / count, tasks.n_tasks).round()
        kept = (n_classes > 1)[tasks.codes]
        n_out = int((n_classes < 2).sum())
        n_single = len(np.unique(cell[kept & (count == 1)]))
        kept &= count > 1
        if n_out:
            parts.append(f"{n_out} with fewer than two classes of two rows, left out")
        if n_single:
            parts.append(f"{n_single} single row(s) of a class in a task, left out")
        if parts and kept.any():
            tasks = tasks.take_rows(kept)
    short = _sure_support(tasks, n_shots, classification) < least
    if short.any() and not short.all():
        parts.append(
            f"{short.sum()} with fewer than {least} support rows, which batch norm needs, left out"
        )
        tasks = tasks.select(np.flatnonzero(~short))
    n_empty, n_single = (int((tasks.sizes == n).sum()) for n in (0, 1))
    if n_empty:
        parts.append(f"{n_empty} without rows, left out")
        tasks = tasks.select(np.flatnonzero(tasks.sizes))
    if n_single:
        parts.append(f"{n_single} with a single row, which is a query row")
    if n_shots:
        few = tasks.sizes[tasks.codes]
        if classification:
            few = _classes_of_tasks(tasks)[1]
        n_few = len(np.unique(tasks.codes[(few <= n_shots) & (tasks.sizes[tasks.codes] > 1)]))
        if n_few:
            parts.append(
                f"{n_few} with fewer than {n_shots + 1} rows{' of a class' * classification} "
                f"(n_shots={n_shots} and a query row), which give fewer support rows"
            )
    if not parts:
        return tasks, None
    return tasks, (
        f"Some of the {given.n_tasks} tasks have too few rows to be split into support and query "
        f"rows: {'; '.join(parts)}."
    )


def _sure_support(tasks: TaskCollection, n_shots: int | None, classification: bool) -> np.ndarray:
    """Support rows (n_tasks,) that every episode of a task has."""
    size = _classes_of_tasks(tasks)[1] if classification else tasks.sizes
    of_cell = size // 2 if n_shots is None else np.minimum(n_shots, np.maximum(size - 1, 0))
    if not classification:
        return of_cell
    return np.bincount(tasks.codes, of_cell / size, tasks.n_tasks).round()


def _classes_of_tasks(tasks: TaskCollection) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of its task (n_rows,) that a row is of, and how many rows that has."""
    labels, position = np.unique(tasks.y, return_inverse=True)
    cell = tasks.codes.astype(np.intp) * len(labels) + position.reshape(-1)
    _, inverse, counts = np.unique(cell, return_inverse=True, return_counts=True)
    return cell, counts[inverse.reshape(-1)]


def check_splittable(
    tasks: TaskCollection, n_shots: int | None, n_ways: int | None, classification: bool
) -> None:
    """Refuse tasks, of those that are usable, if none of them can be split as asked."""
    if n_ways is not None:
        _check_classes(tasks, n_ways)
    if tasks.in_query is not None:
        return
    if tasks.spelling == "single" and len(tasks.X) < 2:
        raise ValueError(
            "Got n_samples=1 (one row); a task needs at least 2 rows, one for its support set and "
            "one for its query set. Give more rows."
        )
    if n_shots is None:
        return
    most = int((_classes_of_tasks(tasks)[1] if classification else tasks.sizes).max())
    if most <= n_shots:
        what = "class of a task" if classification else "task"
        raise ValueError(
            f"n_shots={n_shots} is more than any task can give: the largest {what} has {most} "
            f"rows, and a support set of {n_shots} and a query row need {n_shots + 1}. Lower "
            "n_shots."
        )


def _check_classes(tasks: TaskCollection, n_ways: int) -> None:
    """Refuse tasks with too many or too few classes for episodes of `n_ways`."""
    _, count = _classes_of_tasks(tasks)
    n_classes = np.bincount(tasks.codes, 1 / count, tasks.n_tasks).round().astype(int)
    if tasks.in_query is not None:
        if n_classes.max() > n_ways:
            j = int(n_classes.argmax())
            raise ValueError(
                f"The episode{name_of(tasks, j)} has {n_classes[j]} classes, but n_ways="
                f"{n_ways}. Raise n_ways or leave classes out."
            )
        return
    if tasks.spelling == "single" and n_classes[0] < n_ways:
        raise ValueError(
            f"n_ways={n_ways}, but there are only {n_classes[0]} classes to draw from. Lower "
            "n_ways or give more classes."
        )
    if n_classes.min() < 2:
        j = int(n_classes.argmin())
        raise ValueError(
            f"There are too few classes{name_of(tasks, j)}: got 1 class, and episodes need at "
            "least 2 with two rows each. Give tasks with more."
        )
