"""What the order of the classes does to accuracy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Bunch, check_random_state
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._types import Tasks
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.estimators.scoring import SCORED_EPISODES, Scored
from sklearn_maml.evaluation.scoring import check_count, check_counts, score_tasks
from sklearn_maml.inspection.shared import open_copy


def class_permutation_audit(
    estimator: Any,
    X: Tasks,
    y: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    n_episodes: int = 100,
    n_permutations: int = 24,
    n_shots: int | None = None,
    random_state: Any = None,
) -> Bunch:
    r"""Measure how much accuracy depends on which class sits at which output.

    A model with `n_ways` outputs starts every episode from an initialisation whose outputs differ,
    so that its accuracy depends on the assignment of classes to outputs, which is arbitrary [1]_.
    The audit adapts to the same support sets with the classes at other outputs, and scores the
    same query rows.

    Parameters
    ----------
    estimator : estimator
        Meta-fitted `MAMLClassifier` with `n_ways`, or a fitted pipeline or search that ends in
        one. It is not changed.
    X, y, groups : tasks
        As in `MAMLClassifier.fit`; best tasks or classes that were not meta-trained on.
    n_episodes : int, default=100
        Episodes to draw, evenly from the tasks. Tasks of four parts are an episode each, and no
        more than there are.
    n_permutations : int, default=24
        Assignments of classes to outputs; all of them if there are no more. The first is that of
        `adapt`, sorted labels; the others are drawn at random.
    n_shots : int, default=None
        Support rows of each class; None takes that of the estimator.
    random_state : int, RandomState instance or None, default=None
        Seeds episodes and permutations; None takes the seed of the estimator.

    Returns
    -------
    audit : Bunch
        `accuracy` of shape (n_episodes, n_permutations); `permutations` of shape (n_permutations,
        n_ways), the output of each class in the order of sorted labels; `mean` over all; `worst`
        and `best`, means over the episodes of the worst and best permutation of each; `std`, mean
        over the episodes of the standard deviation over permutations; `ensemble`, the mean accuracy
        of the average of the probabilities of all permutations.

    Raises
    ------
    ValueError
        If labels are shared by the tasks (`n_ways` None): their outputs are fixed.

    Notes
    -----
    `best` cannot be had in practice: which permutation is the best in an episode shows only in
    its query rows. `ensemble` can, at the price of `n_permutations` adaptations. In an episode of
    fewer classes than `n_ways`, the classes take the first outputs, in the order of the
    permutation.

    References
    ----------
    .. [1] Ye, H.-J. & Chao, W.-L. (2022). How to Train Your MAML to Excel in Few-Shot
       Classification. ICLR.

    Examples
    --------
    >>> from sklearn_maml import MAMLClassifier, class_permutation_audit
    >>> from sklearn_maml.datasets import load_omniglot
    >>> X, y = load_omniglot(return_X_y=True)
    >>> clf = MAMLClassifier(
    ...     update_rule="sgd", n_ways=3, n_shots=1, n_queries=5, max_iter=5, random_state=0
    ... ).fit(X[:2000], y[:2000])
    >>> audit = class_permutation_audit(clf, X[2000:3000], y[2000:3000], n_episodes=10)
    >>> audit.accuracy.shape
    (10, 6)
    >>> bool(audit.worst <= audit.mean <= audit.best)
    True
    """
    if n_shots == 0:
        raise ValueError(
            "n_shots=0 leaves no labelled rows, and with n_ways no classes. Give at least 1."
        )
    check_counts(n_shots=n_shots)
    check_count("n_episodes", n_episodes)
    check_count("n_permutations", n_permutations)
    maml, X = open_copy(estimator, X)
    n_ways = getattr(maml, "n_ways", None)
    if n_ways is None:
        raise ValueError(
            f"class_permutation_audit is for models with n_ways, whose labels mean something "
            f"inside a task only; this {type(maml).__name__} has n_ways=None: every class has an "
            "output of its own, and there is nothing to permute."
        )
    check_is_fitted(maml)
    model = maml.task_model()
    rng = check_random_state(model.seed if random_state is None else random_state)
    seeds = rng.randint(2**31 - 1, size=2).tolist()
    maml, scored = score_tasks(
        maml, X, y, groups, n_shots, -(-n_episodes // SCORED_EPISODES), seeds[0], ()
    )
    support, rows, codes = _choose_episodes(scored, n_episodes)
    permutations = _draw_permutations(n_ways, n_permutations, np.random.default_rng(seeds[1]))
    # position of each row's class among the sorted classes of its episode
    labels, positions = np.unique(support.y, return_inverse=True)
    present = np.zeros((support.n_tasks, len(labels)), dtype=bool)
    present[support.codes, positions] = True
    rank_of = present.cumsum(1) - 1
    ranks = rank_of[support.codes, positions]
    truth = rank_of[codes, np.searchsorted(labels, scored.tasks.y[rows])]
    query = model.rows(scored.tasks.X[rows])
    n_query = np.bincount(codes)
    accuracy = np.empty((support.n_tasks, len(permutations)))
    total = np.zeros((len(rows), n_ways))
    for k, permutation in enumerate(permutations):
        # labels in another order: `adapt` puts sorted labels to outputs
        state = model.adapt(support.having(y=permutation[ranks]), None)
        assert state.labels is not None
        predicted = model.predict(state, query, codes)
        accuracy[:, k] = np.bincount(codes, predicted == permutation[truth]) / n_query
        wide = np.zeros_like(total)
        wide[:, state.labels] = model.probabilities(state, query, codes)
        total += wide[:, permutation]
    ensemble = np.bincount(codes, total.argmax(1) == truth) / n_query
    return Bunch(
        accuracy=accuracy,
        permutations=permutations,
        mean=float(accuracy.mean()),
        worst=float(accuracy.min(1).mean()),
        best=float(accuracy.max(1).mean()),
        std=float(accuracy.std(1).mean()),
        ensemble=float(ensemble.mean()),
    )


def _choose_episodes(
    scored: Scored, n_episodes: int
) -> tuple[TaskCollection, np.ndarray, np.ndarray]:
    """Take episodes evenly from those that were drawn; return support, query rows and codes."""
    drawn = np.arange(len(scored.task))
    if scored.tasks.in_query is not None:  # as given: repeats tell nothing new
        drawn = np.unique(scored.task, return_index=True)[1]
    n_episodes = min(n_episodes, len(drawn))
    chosen = drawn[np.arange(n_episodes) * len(drawn) // n_episodes]
    position = np.full(len(scored.task), -1)
    position[chosen] = np.arange(n_episodes)
    codes = position[scored.codes]
    return scored.support.select(chosen), scored.rows[codes >= 0], codes[codes >= 0]


def _draw_permutations(n: int, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Different permutations, the identity first; all of them if there are no more."""
    if math.factorial(n) <= n_permutations:
        return np.array(list(itertools.permutations(range(n))))
    drawn: dict[tuple[int, ...], None] = {tuple(range(n)): None}
    while len(drawn) < n_permutations:
        drawn[tuple(rng.permutation(n).tolist())] = None
    return np.array(list(drawn))
