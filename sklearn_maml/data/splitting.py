"""Which tasks are held out for validation, and which can be split into episodes at all."""

from __future__ import annotations

import dataclasses

import numpy as np

from sklearn_maml.data.ids import show_id, show_ids
from sklearn_maml.data.tasks import TaskCollection

__all__ = ["check_splittable", "hold_out", "large_enough", "name_of"]


def hold_out(
    tasks: TaskCollection,
    asked: bool | str,
    fraction: float,
    seed: int,
    n_ways_of_pool: int | None = None,
) -> tuple[TaskCollection, TaskCollection | None]:
    """Split off tasks for validation.

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
    training, validation : TaskCollection, TaskCollection or None
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
        return tasks, None
    n_valid = min(max(round(fraction * units), 1), units - 1)
    if n_ways_of_pool is not None:
        n_valid = min(max(n_valid, n_ways_of_pool), units - n_ways_of_pool)
    order = np.random.default_rng((seed, 2)).permutation(units)
    held, kept = np.sort(order[:n_valid]), np.sort(order[n_valid:])
    if not pool:
        return tasks.select(kept), tasks.select(held)
    parts = []
    for classes in (kept, held):
        rows = np.isin(tasks.y, classes)
        parts.append(
            dataclasses.replace(tasks, X=tasks.X[rows], y=tasks.y[rows], codes=tasks.codes[rows])
        )
    return parts[0], parts[1]


def name_of(tasks: TaskCollection, j: int) -> str:
    """Return words that name a task in a message; none where there is only one."""
    return "" if tasks.spelling == "single" else f" of task {show_id(tasks.ids[j])}"


def large_enough(
    tasks: TaskCollection, n_shots: int | None, n_ways: int | None, classification: bool
) -> np.ndarray:
    """Tell which tasks can give a support set of the asked size and a query row."""
    if tasks.in_query is not None:
        return np.ones(tasks.n_tasks, dtype=bool)
    need = 2 if n_shots is None else n_shots + 1
    if not classification:
        return tasks.sizes >= need
    large = tasks.sizes >= 2
    if n_shots is None and n_ways is None:
        return large
    _, labels = np.unique(tasks.y, return_inverse=True)
    n_labels = int(labels.max()) + 1
    cells, counts = np.unique(tasks.codes * n_labels + labels.reshape(-1), return_counts=True)
    task = cells // n_labels
    small = np.bincount(task, weights=counts < need, minlength=tasks.n_tasks) > 0
    few = np.bincount(task, minlength=tasks.n_tasks) < (1 if n_ways is None else 2)
    return large & ~small & ~few


def check_splittable(
    tasks: TaskCollection, n_shots: int | None, n_ways: int | None, classification: bool
) -> None:
    """Refuse tasks that cannot give a support set of the asked size and a query row."""
    if n_ways is not None:
        labels = int(tasks.y.max()) + 1
        cells, counts = np.unique(tasks.codes * labels + tasks.y, return_counts=True)
        n_classes = np.bincount(cells // labels, minlength=tasks.n_tasks)
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
                "least 2. Leave the task out."
            )
    elif tasks.in_query is not None:
        return
    if tasks.sizes.min() < 2:
        few = np.flatnonzero(tasks.sizes < 2)
        where = (
            ""
            if tasks.spelling == "single"
            else f" in {len(few)} task(s), such as {show_ids(tasks.ids[few])}"
        )
        raise ValueError(
            f"Got n_samples=1 (one row){where}; a task needs at least 2 rows, one for its support "
            "set and one for its query set. Leave such tasks out or give them more rows."
        )
    if n_shots is None and n_ways is None:
        return
    need = (1 if n_shots is None else n_shots) + 1
    if not classification:
        few = np.flatnonzero(tasks.sizes < need)
        if len(few):
            raise ValueError(
                f"n_shots={n_shots} is more than {len(few)} of the {tasks.n_tasks} tasks can give: "
                f"the smallest{name_of(tasks, int(few[tasks.sizes[few].argmin()]))} has "
                f"{tasks.sizes.min()} rows, and a support set of {n_shots} and one query row need "
                f"{need}. Lower n_shots or leave such tasks out."
            )
        return
    labels = int(tasks.y.max()) + 1
    cells, counts = np.unique(tasks.codes * labels + tasks.y, return_counts=True)
    few = np.flatnonzero(counts < need)
    if len(few):
        j = int(cells[few[0]] // labels)
        raise ValueError(
            f"{len(few)} class(es) have fewer than {need} rows in a task, such as class number "
            f"{int(cells[few[0]] % labels)}{name_of(tasks, j)} with {int(counts[few[0]])}; "
            f"{need - 1} support row(s) of each class (n_shots={n_shots}) and one query row need "
            f"{need}. Lower n_shots or leave such classes out."
        )
