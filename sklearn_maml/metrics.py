"""Scores of adapted models: `task_scorer` for model selection and `task_scores` per task."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.metrics import get_scorer
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch
from sklearn.utils.metadata_routing import MetadataRequest

from sklearn_maml._base import find_prior, transform_rows

__all__ = ["task_scorer", "task_scores"]


def task_scorer(
    scoring: Any,
    *,
    n_shots: int | None = None,
    n_repeats: int = 1,
    average: str = "micro",
    random_state: Any = None,
) -> TaskScorer:
    """Make a scorer that adapts to a support split of each task, then scores the query rows.

    Parameters
    ----------
    scoring : str or callable
        Name of a scikit-learn scorer, or a scorer ``(estimator, X, y) -> float``.
    n_shots : int, default=None
        Support rows of each task (of each class, in classification); None takes that of the
        estimator.
    n_repeats : int, default=1
        Support splits of each task.
    average : {"micro", "macro"}, default="micro"
        "micro" pools the query rows of all tasks, "macro" averages the scores of the tasks.
    random_state : int, RandomState instance or None, default=None
        Seeds the splits; None takes the seed of the estimator, so that repeated calls agree.

    Returns
    -------
    scorer : callable (estimator, X, y=None, groups=None) -> float
        For `scoring` in scikit-learn's tools. It requests `groups`, so it works with metadata
        routing, and with a task column or lists of tasks without. scikit-learn's ScoringMonitor
        takes it in a dict only: ``ScoringMonitor(scoring={"r2": task_scorer("r2")})``.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor, task_scorer
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> scorer = task_scorer("neg_root_mean_squared_error", n_shots=5)
    >>> bool(scorer(reg, X, y, groups=task) < 0)
    True
    """
    if average not in ("micro", "macro"):
        raise ValueError(
            f"average={average!r} is not known; expected 'micro' (pool the query rows) or 'macro' "
            "(average over tasks)."
        )
    _check_counts(n_shots=n_shots, n_repeats=n_repeats)
    get_scorer(scoring)  # an unknown name is reported here
    return TaskScorer(scoring, n_shots, n_repeats, average, random_state)


class TaskScorer:
    """Callable made by `task_scorer`."""

    def __init__(
        self, scoring: Any, n_shots: int | None, n_repeats: int, average: str, random_state: Any
    ) -> None:
        self.scoring = scoring
        self.n_shots = n_shots
        self.n_repeats = n_repeats
        self.average = average
        self.random_state = random_state

    def __repr__(self) -> str:
        return (
            f"task_scorer({self.scoring!r}, n_shots={self.n_shots}, n_repeats={self.n_repeats}, "
            f"average={self.average!r})"
        )

    def get_metadata_routing(self) -> MetadataRequest:
        """Request `groups` from scikit-learn's metadata routing.

        Returns
        -------
        routing : MetadataRequest
            Of the method `score`.
        """
        request = MetadataRequest(owner=self)
        request.score.add_request(param="groups", alias=True)
        return request

    def __call__(self, estimator: Any, X: Any, y: Any = None, groups: Any = None) -> float:
        """Adapt to a support split of each task and score the query rows.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one.
        X, y, groups : tasks
            As in `MAMLRegressor.fit`.

        Returns
        -------
        score : float
        """
        maml, scored = _score_tasks(
            estimator, X, y, groups, self.n_shots, self.n_repeats, self.random_state, (None,)
        )
        scorer = get_scorer(self.scoring)
        if self.average == "micro":
            every = np.ones(len(scored.rows), dtype=bool)
            return float(_apply(scorer, maml, scored, scored.states[0], every))
        scores = [
            _apply(scorer, maml, scored, scored.states[0], scored.task[scored.codes] == task)
            for task in range(scored.tasks.n_tasks)
        ]
        return float(np.mean(scores))


def task_scores(
    estimator: Any,
    X: Any,
    y: Any = None,
    groups: Any = None,
    *,
    scoring: Any = None,
    n_shots: int | None = None,
    n_repeats: int = 1,
    random_state: Any = None,
) -> Bunch:
    """Score every task before and after adaptation.

    Parameters
    ----------
    estimator : estimator
        Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one.
    X, y, groups : tasks
        As in `MAMLRegressor.fit`.
    scoring : str or callable, default=None
        A scikit-learn scorer; None is the negative root mean squared error for regressors and the
        accuracy for classifiers.
    n_shots : int, default=None
        Support rows of each task (of each class, in classification); None takes that of the
        estimator.
    n_repeats : int, default=1
        Support splits of each task.
    random_state : int, RandomState instance or None, default=None
        Seeds the splits; None takes the seed of the estimator.

    Returns
    -------
    scores : Bunch
        Arrays of shape (n_tasks,): `task` (ids), `before` and `after` (scores), `n_queries` (query
        rows over all splits). A data frame of it is ``pandas.DataFrame(scores)``.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor, task_scores
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> sorted(task_scores(reg, X, y, groups=task))
    ['after', 'before', 'n_queries', 'task']
    """
    maml, scored = _score_tasks(
        estimator, X, y, groups, n_shots, n_repeats, random_state, (0, None)
    )
    if scoring is None:
        scoring = "accuracy" if is_classifier(maml) else "neg_root_mean_squared_error"
    scorer = get_scorer(scoring)
    of_task = scored.task[scored.codes]
    masks = [of_task == task for task in range(scored.tasks.n_tasks)]
    before, after = (
        np.array([_apply(scorer, maml, scored, state, mask) for mask in masks])
        for state in scored.states
    )
    return Bunch(
        task=scored.tasks.ids,
        before=before,
        after=after,
        n_queries=np.array([mask.sum() for mask in masks]),
    )


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _score_tasks(
    estimator: Any,
    X: Any,
    y: Any,
    groups: Any,
    n_shots: int | None,
    n_repeats: int,
    random_state: Any,
    steps: tuple[int | None, ...],
) -> tuple[Any, Any]:
    model = find_prior(estimator)
    if isinstance(model, Pipeline):
        X = transform_rows(model, X)
        while isinstance(model, Pipeline):
            model = find_prior(model.steps[-1][1])
    scored = model._split_and_adapt(
        X,
        y,
        groups,
        n_shots=n_shots,
        n_repeats=n_repeats,
        random_state=random_state,
        steps=steps,
    )
    return model, scored


def _apply(scorer: Any, maml: Any, scored: Any, state: Any, mask: np.ndarray) -> float:
    """Apply a scorer to the query rows in `mask`, as if one estimator had predicted them all."""
    rows, codes = scored.rows[mask], scored.codes[mask]
    X, y = maml._reshape(scored.tasks.X[rows]), scored.tasks.y[rows]
    local = state.slots is not None and (state.slots != state.slots[codes[0]])[codes].any()
    if local:
        # labels that mean something inside their task only are scored by their rank in it
        y = (state.labels[state.slots[codes]] == y[:, None]).argmax(1)
    kind = _ClassPredictor if is_classifier(maml) else _Predictor
    score: float = scorer(kind(maml, state, codes, local), X, y)
    return score


class _Predictor:
    """Stands for the adapted tasks before a scorer: predicts each row by its own task.

    With `local`, classes are ranks among the labels of a task, as its outputs are.
    """

    def __init__(self, maml: Any, state: Any, codes: np.ndarray, local: bool) -> None:
        self._maml = maml
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
        """Predict each row with the parameters of its task."""
        predicted: np.ndarray = self._maml._decide(self._state, X, self._codes)
        return predicted

    def __sklearn_tags__(self) -> Any:
        return self._maml.__sklearn_tags__()

    def __sklearn_is_fitted__(self) -> bool:
        return True


class _ClassPredictor(_Predictor):
    """Stands for adapted classifiers; scikit-learn's scorers go by the names of its methods."""

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return class probabilities of each row under the parameters of its task."""
        p: np.ndarray = self._maml._probabilities(self._state, X, self._codes)
        return p

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return logits of each row under the parameters of its task."""
        scores: np.ndarray = self._maml._decision(self._state, X, self._codes)
        return scores
