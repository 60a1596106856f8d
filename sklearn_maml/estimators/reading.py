"""Reading the tasks that an estimator is given."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml._compat import CALLBACK_FRAMES
from sklearn_maml.data.frames import PASS_THROUGH
from sklearn_maml.data.ids import find_ids, look_scaled, show_ids
from sklearn_maml.data.spellings import FLOATS, collect_tasks
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.data.weights import (
    COUNTS,
    check_weights,
    merged,
    spread_weights,
    take_weights,
    weighted,
)
from sklearn_maml.estimators.building import Building
from sklearn_maml.exceptions import SingleTaskWarning, SmallTaskWarning, TaskColumnWarning
from sklearn_maml.targets.base import Targets
from sklearn_maml.training.sources import CollectionSource

# as many times the rows of a task are those of several
SEVERAL_TASKS = 2


class Reading(Building):
    """Validates tasks and weights of rows."""

    def _read_tasks(
        self, X: Any, y: Any, groups: Any = None, *, reset: bool = False, needs_rows: bool = True
    ) -> TaskCollection:
        """Validate tasks; in a first fit (`reset`) also learn what later calls must match."""
        if not reset:
            X, _ = self._take_weights(X, y, None)
        tasks = collect_tasks(
            self,
            X,
            y,
            groups,
            task_column=self.task_column,
            reset=reset,
            classification=self._targets_class.are_classes,
            dtype=FLOATS if reset else self._dtype,
            needs_rows=needs_rows,
        )
        if reset:
            self.feature_shape_ = tasks.X.shape[1:]
            self._dtype = tasks.X.dtype
            self._flat = self.module is None  # the default network takes flat rows
        else:
            self._check_features(tasks.X)
        return tasks

    def _take_weights(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Take the column out of X that has the weights, in this call or in `fit`."""
        return take_weights(X, y, sample_weight, vars(self).get("_weight_column"))

    def _usable(
        self,
        tasks: TaskCollection,
        targets: Targets,
        n_shots: int | None,
        module: nn.Module | None,
        stacklevel: int,
    ) -> TaskCollection:
        """Leave out tasks that no episode can be made of; refuse all, or warn of small ones."""
        normalises = module is not None and any(isinstance(m, _BatchNorm) for m in module.modules())
        tasks, few = targets.usable(tasks, n_shots, 2 if normalises else 0)
        targets.check_splittable(tasks, n_shots)
        if few is not None:
            warnings.warn(
                f"{few} Tools that subsample rows (learning_curve, HalvingGridSearchCV with "
                "resource='n_samples') cut tasks; give a list of tasks, or resource='max_iter', to "
                "keep them whole.",
                SmallTaskWarning,
                stacklevel=stacklevel,
            )
        return tasks

    def _collect(
        self,
        X: Any,
        y: Any,
        groups: Any,
        targets: Targets,
        seed: int,
        continued: bool,
        sample_weight: Any = None,
    ) -> CollectionSource:
        named = isinstance(sample_weight, str)
        if named or not continued:
            self._weight_column = sample_weight if named else None
        X, sample_weight = self._take_weights(X, y, sample_weight)
        tasks = self._read_tasks(X, y, groups, reset=not continued)
        # a fit keeps them as long as it takes
        tasks = tasks.having(codes=tasks.codes.astype(np.int32))
        tasks = weighted(tasks, sample_weight)
        n_shots = self._integer("n_shots")
        if tasks.spelling == "single" and targets.n_ways is None and n_shots is None:
            tasks = merged(tasks)
        stacklevel = 6 + CALLBACK_FRAMES
        (targets.learn_on if continued else targets.learn)(tasks, tasks.weight)
        module = self._new_module(targets)
        tasks = self._usable(tasks, targets, n_shots, module, stacklevel + 1)
        if tasks.spelling == "single" and targets.n_ways is None:
            warnings.warn(
                f"{type(self).__name__}.fit got no task information and treats all "
                f"{len(tasks.X)} rows as one task. If the rows belong to several tasks, pass "
                "groups=task_ids (inside scikit-learn's tools enable it with "
                "sklearn.set_config(enable_metadata_routing=True)) or set task_column.",
                SingleTaskWarning,
                stacklevel=stacklevel,
            )
        return CollectionSource(tasks, targets, self._episode_settings(), seed)

    def _pooled(self, tasks: TaskCollection, caller: str, least: float) -> list[Warning]:
        """Warning of rows without task information that are as many as those of several tasks."""
        if tasks.spelling != "single" or len(tasks.X) < least or self.targets_.n_ways is not None:
            return []
        message = (
            f"{caller} got no task information and treats all {len(tasks.X)} rows as one task; the "
            f"tasks of fit have {self._sizes()[0]:g} rows in the median. If the rows belong to "
            "several tasks, pass groups=task_ids (inside scikit-learn's tools enable it with "
            "sklearn.set_config(enable_metadata_routing=True)) or set task_column. If they are one "
            "task, groups of one id say so."
        )
        return [SingleTaskWarning(message)]

    def _scaled(self, tasks: TaskCollection) -> list[Warning]:
        """Warning of a task column that was changed by a transformer since `fit`, or in it."""
        known = self.tasks_
        if tasks.spelling != "column" or known is None or not look_scaled(tasks.ids, known):
            return []
        if (find_ids(tasks.ids, known) >= 0).any():
            return []
        message = (
            f"The task column {self.task_column!r} has ids such as {show_ids(tasks.ids)}, and had "
            f"{show_ids(known)} in fit: either looks scaled. {PASS_THROUGH} Give the same columns "
            "in fit, adapt and predict."
        )
        return [TaskColumnWarning(message)]

    def _sizes(self) -> tuple[float, float]:
        """Median and largest number of rows of the tasks of `fit`; infinite if that is unknown."""
        sizes = vars(self).get("_task_sizes")
        return (np.inf, np.inf) if sizes is None else sizes

    def _support_weights(
        self, sample_weight: Any, tasks: TaskCollection
    ) -> tuple[np.ndarray | None, bool]:
        """Validate weights of support rows; also whether they had to be scaled."""
        if sample_weight is None or not len(tasks.X):
            return None, False
        given = spread_weights(sample_weight, tasks)
        options: dict[str, Any] = {"dtype": tasks.X.dtype, "ensure_non_negative": True}
        weights = check_weights(given, tasks.X, COUNTS, zeros=True, **options)
        return weights, bool(weights.max() != np.asarray(given, dtype=weights.dtype).max())
