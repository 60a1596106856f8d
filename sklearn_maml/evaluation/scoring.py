"""What every score of adapted tasks does: find the model, adapt to splits, apply a scorer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.metrics import d2_log_loss_score, get_scorer, log_loss
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._validation import is_integer
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.models import open_chain, transform_rows

# metrics that cannot tell the classes from the labels of a few rows
LABELLED: dict[str, tuple[Any, int]] = {
    "neg_log_loss": (log_loss, -1),
    "d2_log_loss_score": (d2_log_loss_score, 1),
}


def open_model(estimator: Any, X: Any) -> tuple[Any, Any]:
    """Return the MAML estimator inside a model, and rows as it sees them."""
    transformers, maml = open_chain(estimator)
    check_is_fitted(maml)
    return maml, transform_rows(transformers, X)


def default_scoring(maml: BaseMAML) -> str:
    """Name of the scorer of `scoring=None`."""
    return "accuracy" if is_classifier(maml) else "neg_root_mean_squared_error"


def check_count(name: str, value: Any) -> int:
    """Return a positive integer, or say that it is none; `n_shots` may be 0."""
    least = 0 if name == "n_shots" else 1
    if not is_integer(value) or value < least:
        kind = "non-negative" if least == 0 else "positive"
        raise ValueError(f"{name} must be a {kind} integer; got {value!r}.")
    return int(value)


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are neither None nor what `check_count` takes."""
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)


def score_tasks(
    estimator: Any,
    X: Any,
    y: Any,
    groups: Any,
    n_shots: int | None,
    n_repeats: int,
    random_state: Any,
    steps: tuple[int | None, ...],
    sample_weight: Any = None,
) -> tuple[Any, Any]:
    """Adapt to support splits of each task; return the MAML estimator and what was adapted."""
    maml, X = open_model(estimator, X)
    scored = maml.task_model().split_and_adapt(
        X,
        y,
        groups,
        n_shots=n_shots,
        n_repeats=n_repeats,
        random_state=random_state,
        steps=steps,
        sample_weight=sample_weight,
    )
    return maml, scored


def find_scorer(scoring: Any) -> Any:
    """Return the scorer that `scoring` names; those of probabilities take tasks of one class."""
    if isinstance(scoring, str) and scoring in LABELLED:
        metric, sign = LABELLED[scoring]

        def score(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
            p = estimator.predict_proba(X)
            if np.ndim(y) == 1:
                columns, labels = [(y, p)], estimator.classes_
            else:  # labels of a row exclude each other no more than tasks do
                columns, labels = list(zip(np.asarray(y).T, p.T, strict=True)), np.arange(2)
            of_rows = {"labels": labels, "sample_weight": sample_weight}
            return sign * float(np.mean([metric(*column, **of_rows) for column in columns]))

        return score
    return get_scorer(scoring)


def apply_scorer(scorer: Any, maml: Any, scored: Any, state: Any, mask: np.ndarray) -> float:
    """Apply a scorer to the query rows in `mask`, as if one estimator had predicted them all."""
    rows, codes = scored.rows[mask], scored.codes[mask]
    X, y = maml.task_model().rows(scored.tasks.X[rows]), scored.tasks.y[rows]
    local = state.slots is not None and (state.slots != state.slots[codes[0]])[codes].any()
    if local:
        # labels that mean something inside their task only are scored by their rank in it
        y = (state.labels[state.slots[codes]] == y[:, None]).argmax(1)
    kind = _ClassPredictor if is_classifier(maml) else _Predictor
    weight = scored.tasks.weight
    options = {} if weight is None else {"sample_weight": weight[rows]}
    return scorer(kind(maml, state, codes, local), X, y, **options)


class _Predictor:
    """Stands for the adapted tasks before a scorer: predicts each row by its own task.

    With `local`, classes are ranks among the labels of a task, as its outputs are.
    """

    def __init__(self, maml: Any, state: Any, codes: np.ndarray, local: bool) -> None:
        self._maml = maml
        self._model = maml.task_model()
        self._codes = codes
        if is_classifier(maml):
            self.classes_ = maml.classes_
            if state.slots is not None:
                slots = state.slots[codes]
                n_classes = int((slots >= 0).any(0).sum())
                self.classes_ = np.arange(n_classes)
                if not local:
                    self.classes_ = state.labels[slots[0, :n_classes]]
                # each task's outputs as columns of their own, whatever the labels are called
                ranks = np.where(state.slots >= 0, np.arange(state.slots.shape[1]), -1)
                state = dataclasses.replace(state, labels=self.classes_, slots=ranks)
        self._state = state

    def fit(self, X: Any, y: Any = None) -> _Predictor:
        """Do nothing: scikit-learn's scorers ask for a `fit`."""
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self._model.predict(self._state, X, self._codes)

    def __sklearn_tags__(self) -> Any:
        return self._maml.__sklearn_tags__()

    def __sklearn_is_fitted__(self) -> bool:
        return True


class _ClassPredictor(_Predictor):
    """Stands for adapted classifiers; scikit-learn's scorers go by the names of its methods."""

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return self._model.probabilities(self._state, X, self._codes)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        return self._model.decision(self._state, X, self._codes)
