"""Predicting query rows with the parameters adapted to their tasks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_maml._types import Tasks
from sklearn_maml.data.frames import PASS_THROUGH, as_frame, split_task_column, take_column
from sklearn_maml.data.ids import check_groups, encode_ids, look_scaled, show_ids
from sklearn_maml.data.spellings import (
    concatenate_rows,
    n_axes,
    refuse_graphs,
    validate_rows,
)
from sklearn_maml.estimators.adapting import Adapting, State
from sklearn_maml.estimators.building import TORCH_DTYPES
from sklearn_maml.exceptions import NotAdaptedError, TaskColumnWarning
from sklearn_maml.learners.plain import PlainModel
from sklearn_maml.threads import one_thread

ADAPT_FIRST = (
    "Call adapt with support rows of these tasks first, or set unseen_tasks='prior' for "
    "predictions without any. To score new tasks inside scikit-learn's tools, leave scoring=None "
    "or use sklearn_maml.task_scorer(...): scorers such as 'r2' do not adapt."
)


@dataclasses.dataclass(frozen=True)
class Queries:
    """Rows without targets, and what tells their tasks."""

    rows: np.ndarray  # (n_rows, *feature_shape)
    groups: Any  # (n_rows,) or None
    name: str  # where the groups come from, for messages
    lengths: list[int] | None  # rows of each part of a list, or of each block of a stack
    stacked: bool  # whether they came as blocks of a stack

    def shape_like(self, values: np.ndarray) -> Any:
        """Shape what was found for each row as the rows came."""
        if self.lengths is None:
            return values
        if self.stacked:
            return values.reshape(len(self.lengths), -1, *values.shape[1:])
        return np.split(values, np.cumsum(self.lengths)[:-1])


class Predicting(Adapting):
    """Finds the task of each query row, and predicts it."""

    def _rows_to_predict(
        self, X: Any, groups: Any
    ) -> tuple[State, np.ndarray, np.ndarray, Callable[[np.ndarray], Any]]:
        """Validate query rows; return the task of each and how to shape the answer like X."""
        queries = self._read_queries(X, groups)
        n_rows = len(queries.rows)
        state, tasks, codes = self._find_tasks(queries.groups, n_rows, queries.name)
        return state, queries.rows, tasks[codes], queries.shape_like

    def _read_queries(self, X: Any, groups: Any, asker: str = "predict") -> Queries:
        """Validate query rows, in any spelling."""
        check_is_fitted(self)
        refuse_graphs(X=X, groups=groups)
        X = as_frame(X)
        name, stacked = "groups", False
        lengths: list[int] | None = None
        if isinstance(X, (list, tuple)) and len(X) and n_axes(X[0]) > len(self.feature_shape_):
            if groups is not None:
                raise ValueError(
                    "Got a list of query sets and groups: the tasks are given twice. Leave one of "
                    "the two out."
                )
            lengths = [len(part) for part in X]
            groups = np.repeat(np.arange(len(X)), lengths)
            name = "a list of query sets (task ids 0, 1, ...)"
            X = concatenate_rows(X)
        elif (
            groups is None and getattr(X, "ndim", 0) >= 3 and X.ndim == len(self.feature_shape_) + 2
        ):
            n_tasks, n_rows = X.shape[:2]
            lengths, stacked = [n_rows] * n_tasks, True
            groups = np.repeat(np.arange(n_tasks), n_rows)
            X = np.asarray(X).reshape(-1, *X.shape[2:])
        weight_column = vars(self).get("_weight_column")
        if weight_column is not None:
            X, _ = take_column(X, weight_column)
        X_seen = X
        if self.task_column is not None:
            X, ids = split_task_column(X, self.task_column)
            if lengths is None:  # else the place in the list or stack tells the task
                name = f"the task column {self.task_column!r}"
                if groups is not None:  # which are for a splitter alone
                    check_groups(groups, encode_ids(ids, len(X), name)[1], self.task_column)
                groups = ids
        rows = validate_rows(
            self,
            X,
            X_seen,
            reset=False,
            with_column=self.task_column is not None,
            dtype=self._dtype,
        )
        self._check_features(rows)
        if lengths is not None:
            _check_places(self.__dict__.get("_state"), len(lengths), asker)
        return Queries(self._reshape(rows), groups, name, lengths, stacked)

    def _find_tasks(
        self, groups: Any, n_rows: int, name: str, asker: str = "predict"
    ) -> tuple[State, np.ndarray, np.ndarray]:
        """Return what was adapted, the position in it of each task asked for, and rows' tasks.

        Of tasks that were not adapted to, `suggest_rows` always starts from the prior.
        """
        state = self.__dict__.get("_state")
        knows_prior = self.unseen_tasks == "prior" or asker != "predict"
        if state is None and not knows_prior:
            raise NotAdaptedError(
                f"This {type(self).__name__} is meta-fitted but not adapted to a task yet. Call "
                "adapt(X_support, y_support) before predict, or set unseen_tasks='prior' for "
                "predictions without labelled rows. To score tasks inside scikit-learn's tools, "
                "leave scoring=None or use sklearn_maml.task_scorer(...), which adapt to a support "
                "split of each task; scorers such as 'r2' do not adapt."
            )
        if groups is None:
            if state is not None and state.n_tasks > 1:
                raise ValueError(
                    f"{type(self).__name__} is adapted to {state.n_tasks} tasks: pass "
                    f"groups (the task id of each row) to {asker}."
                )
            one = np.zeros(1, dtype=np.intp)
            return state or self._prior_state(asker), one, np.zeros(n_rows, dtype=np.intp)
        ids, codes = encode_ids(groups, n_rows, name)
        if state is None:
            return self._prior_state(asker), np.zeros(len(ids), dtype=np.intp), codes
        if state.ids is None:
            raise ValueError(
                f"{asker} got {name}, but the estimator was adapted to one task without an id. "
                "Give the rows of that task alone, or call adapt(X_support, y_support, "
                "groups=...). To score new tasks, use score(X, y, groups=...) or "
                "sklearn_maml.task_scorer."
            )
        positions = state.known_ids.find(ids)
        unknown = positions < 0
        if unknown.any():
            doubt = ""
            if unknown.all() and self.task_column is not None and look_scaled(ids, state.ids):
                doubt = f"Those of adapt are {show_ids(state.ids)}: either looks scaled. "
                doubt += PASS_THROUGH
            if not knows_prior:
                raise ValueError(
                    f"predict got {unknown.sum()} task id(s) that were not adapted to, such as "
                    f"{show_ids(ids[unknown])}. {doubt or ADAPT_FIRST}"
                )
            if doubt:
                warnings.warn(
                    f"{asker} got no task id that was adapted to: such as {show_ids(ids)}. {doubt}",
                    TaskColumnWarning,
                    stacklevel=4,
                )
            positions = np.where(unknown, state.n_tasks, positions)
            state = state.followed_by(self._prior_state(asker))
        return state, positions, codes

    def adapted_module(self, task: Any = None) -> nn.Module:
        """Return what `predict` computes for one task as a plain torch module.

        A copy, for `torch.export`, ONNX and what runs these: it knows nothing of tasks, and holds
        the adapted weights, the units of the targets, the calibration and, where several learners
        have a share, all of them.

        Parameters
        ----------
        task : task id, default=None
            Which of the tasks that `adapt` was called with; None, if it was one without an id.

        Returns
        -------
        module : torch.nn.Module
            Maps rows (n_rows, n_features), without a task column, to what `predict` returns for
            them, to rounding; of classes, to what `predict_proba` does. Numbers come out in the
            dtype that `predict` gives; ``module.float()`` computes in float32 throughout.

        Raises
        ------
        NotAdaptedError
            If `adapt` was not called, unless `unseen_tasks` is "prior".
        TypeError
            If predictions are no function of single rows, or made by code of numpy: with
            ``engine__batch_norm="transductive"``, or a loss with a link of its own.
        ValueError
            If the task was not adapted to, likewise.
        """
        check_is_fitted(self)
        ids = None if task is None else [task]
        state, (position,), _ = self._find_tasks(ids, 1, "a task")
        return PlainModel(
            state.adapted.module(int(position), self._running()),
            self.targets_.decoder(int(position), state),
            flat=self._flat,
            dtype=TORCH_DTYPES[self._dtype],
        ).to(self.device_)

    @one_thread()
    def _outputs(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        outputs = state.adapted.outputs(rows, codes, self._running())
        return self._finite(outputs.astype(rows.dtype, copy=False))

    @one_thread()
    def _outputs_and_std(
        self, state: State, rows: np.ndarray, codes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        outputs, std = state.adapted.std(rows, codes, self._running())
        return outputs.astype(rows.dtype), std

    def _decide(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        values: np.ndarray = self.targets_.decode(self._outputs(state, rows, codes), codes, state)
        return values if self.targets_.are_classes else self._finite(values)

    def _probabilities(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        outputs = self._outputs(state, rows, codes)
        return self.targets_.probabilities(outputs, codes, state)

    def _decision(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        outputs = self._outputs(state, rows, codes)
        return self.targets_.decision(outputs, codes, state)

    def _finite(self, outputs: np.ndarray) -> np.ndarray:
        """Refuse outputs that have overflowed."""
        if np.isfinite(outputs).all():
            return outputs
        rows = np.flatnonzero(~np.isfinite(outputs.reshape(len(outputs), -1)).all(1))
        raise ValueError(
            f"The outputs of {len(rows)} of {len(outputs)} rows, such as row {rows[0]}, are not "
            f"finite in {outputs.dtype}. Their features, or those of the support set, are too "
            f"large: scale them as in fit, or lower alpha (now {self._alpha():g})."
        )


class PredictingClasses(Predicting):
    """Predicts probabilities of classes, too."""

    __metadata_request__predict_proba: ClassVar = {"groups": True}
    __metadata_request__predict_log_proba: ClassVar = {"groups": True}
    __metadata_request__decision_function: ClassVar = {"groups": True}

    def predict_proba(self, X: Tasks, *, groups: ArrayLike | None = None) -> NDArray[Any]:
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.
        groups : array-like of shape (n_queries,), default=None
            Task id of each row, if `adapt` was called with task ids.

        Returns
        -------
        p : ndarray of shape (n_queries, n_classes)
            Probabilities in the order of `classes_`; 0 for classes that a row's task lacks.
        """
        state, rows, codes, shape_like = self._rows_to_predict(X, groups)
        return shape_like(self._probabilities(state, rows, codes))

    def predict_log_proba(self, X: Tasks, *, groups: ArrayLike | None = None) -> NDArray[Any]:
        """Predict the logarithm of class probabilities.

        Parameters
        ----------
        X, groups : query rows
            As in `predict_proba`.

        Returns
        -------
        log_p : ndarray of shape (n_queries, n_classes)
            In the order of `classes_`.
        """
        state, rows, codes, shape_like = self._rows_to_predict(X, groups)
        with np.errstate(divide="ignore"):
            return shape_like(np.log(self._probabilities(state, rows, codes)))

    def decision_function(self, X: Tasks, *, groups: ArrayLike | None = None) -> NDArray[Any]:
        """Return the outputs of the network for each class (logits).

        Parameters
        ----------
        X, groups : query rows
            As in `predict_proba`.

        Returns
        -------
        scores : ndarray of shape (n_queries, n_classes), or (n_queries,) for two classes
            In the order of `classes_`; for two classes, the logit of the second less the first.
            The lowest finite number stands for classes that a row's task lacks.
        """
        state, rows, codes, shape_like = self._rows_to_predict(X, groups)
        return shape_like(self._decision(state, rows, codes))


def _check_places(state: State | None, n_sets: int, asker: str) -> None:
    """Refuse query sets whose places in a list do not tell their tasks."""
    if state is None or state.ids is None:
        return
    if state.named:
        raise ValueError(
            f"{asker} got {n_sets} query sets, and adapt got task ids, such as "
            f"{show_ids(state.ids)}: the place of a query set does not tell its task. Pass the "
            "rows together, with groups (or the task column) for the task of each."
        )
    if n_sets != state.n_tasks:
        raise ValueError(
            f"{asker} got {n_sets} query sets, and adapt got {state.n_tasks} tasks without ids. "
            "Pass a query set of each task, in the order of adapt."
        )
