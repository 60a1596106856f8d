"""Scores of adapted models: `task_scorer` for model selection and `task_scores` per task."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Bunch
from sklearn.utils.metadata_routing import MetadataRequest

from sklearn_maml._types import Tasks, Weights
from sklearn_maml.evaluation.scoring import (
    apply_scorer,
    check_counts,
    default_scoring,
    find_scorer,
    score_tasks,
)


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
        estimator, 0 is before any of them.
    n_repeats : int, default=1
        Support splits of each task.
    average : {"micro", "macro"}, default="micro"
        "micro" pools the query rows of all tasks, "macro" averages the scores of the tasks.
    random_state : int, RandomState instance or None, default=None
        Seeds the splits; None takes the seed of the estimator, so that repeated calls agree.

    Returns
    -------
    scorer : callable (estimator, X, y=None, groups=None, sample_weight=None) -> float
        For `scoring` in scikit-learn's tools. It requests `groups`, so it works with metadata
        routing, and with a task column or lists of tasks without; weights of the rows are for the
        metric, and routed after ``set_score_request(sample_weight=True)``. scikit-learn's
        ScoringMonitor takes it in a dict only:
        ``ScoringMonitor(scoring={"r2": task_scorer("r2")})``.

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
    check_counts(n_shots=n_shots, n_repeats=n_repeats)
    find_scorer(scoring)  # an unknown name is reported here
    return TaskScorer(scoring, n_shots, n_repeats, average, random_state)


@dataclasses.dataclass(eq=False, repr=False)
class TaskScorer:
    """Callable made by `task_scorer`."""

    scoring: Any
    n_shots: int | None
    n_repeats: int
    average: str
    random_state: Any
    requests: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"groups": True, "sample_weight": None}
    )

    def __repr__(self) -> str:
        return (
            f"task_scorer({self.scoring!r}, n_shots={self.n_shots}, n_repeats={self.n_repeats}, "
            f"average={self.average!r})"
        )

    def get_metadata_routing(self) -> MetadataRequest:
        """Request `groups`, and weights where they are asked for, from metadata routing.

        Returns
        -------
        routing : MetadataRequest
            Of the method `score`.
        """
        request = MetadataRequest(owner=self)
        for name, alias in self.requests.items():
            request.score.add_request(param=name, alias=alias)
        return request

    def set_score_request(self, **requests: bool | str | None) -> TaskScorer:
        """Ask for metadata, as the method of scikit-learn's scorers does.

        Parameters
        ----------
        **requests : dict
            `groups` and `sample_weight`: whether each is passed on, or by what name.

        Returns
        -------
        self : object
        """
        unknown = requests.keys() - self.requests.keys()
        if unknown:
            raise TypeError(f"got {sorted(unknown)}; expected some of {sorted(self.requests)}.")
        self.requests = {**self.requests, **requests}
        return self

    def __call__(
        self,
        estimator: Any,
        X: Any,
        y: Any = None,
        groups: Any = None,
        sample_weight: Weights = None,
    ) -> float:
        """Adapt to a support split of each task and score the query rows.

        Parameters
        ----------
        estimator : estimator
            Meta-fitted, or a fitted pipeline or search that ends in a meta-fitted one.
        X, y, groups, sample_weight : tasks
            As in `MAMLRegressor.fit`; the weights are those of rows in the metric. Scores of tasks
            are averaged by the means of theirs.

        Returns
        -------
        score : float
        """
        given = (estimator, X, y, groups, self.n_shots, self.n_repeats, self.random_state)
        maml, scored = score_tasks(*given, (None,), sample_weight)
        scorer = find_scorer(self.scoring)
        if self.average == "micro":
            every = np.ones(len(scored.rows), dtype=bool)
            return float(apply_scorer(scorer, maml, scored, scored.states[0], every))
        scores = [
            apply_scorer(scorer, maml, scored, scored.states[0], scored.task[scored.codes] == task)
            for task in range(scored.tasks.n_tasks)
        ]
        tasks = scored.tasks
        of_tasks = None
        if tasks.weight is not None:
            of_tasks = np.bincount(tasks.codes, tasks.weight, tasks.n_tasks) / tasks.sizes
        return float(np.average(scores, weights=of_tasks))


def task_scores(
    estimator: Any,
    X: Tasks,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
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
        estimator, 0 is before any of them.
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
    maml, scored = score_tasks(estimator, X, y, groups, n_shots, n_repeats, random_state, (0, None))
    scorer = find_scorer(default_scoring(maml) if scoring is None else scoring)
    of_task = scored.task[scored.codes]
    masks = [of_task == task for task in range(scored.tasks.n_tasks)]
    before, after = (
        np.array([apply_scorer(scorer, maml, scored, state, mask) for mask in masks])
        for state in scored.states
    )
    return Bunch(
        task=scored.tasks.ids,
        before=before,
        after=after,
        n_queries=np.array([mask.sum() for mask in masks]),
    )
