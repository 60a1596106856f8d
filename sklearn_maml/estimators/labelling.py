"""Which rows of new tasks to label next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._types import Tasks
from sklearn_maml._validation import is_integer
from sklearn_maml.data.spellings import n_axes
from sklearn_maml.estimators.models import open_chain, transform_rows
from sklearn_maml.estimators.prediction import Predicting
from sklearn_maml.threads import one_thread


class Suggesting(Predicting):
    """Finds the rows of a pool whose labels tell most about the others."""

    @torch.inference_mode(False)
    @one_thread()
    def suggest_rows(self, X_pool: Tasks, n: int, groups: ArrayLike | None = None) -> NDArray[Any]:
        r"""Choose which rows of new tasks to label: those that make predictions surest.

        The Gaussian head knows the variance of its predictions before a label is known, and how
        much of it the label of a row would take away, at that row and at all others. The row that
        takes most of the mean variance over the pool away is first; the second is the best one
        given the first, and so on. Of classes, and of other losses than squared error, what a label
        tells depends on what it says: where possible, adapt to it before asking for the next row.

        Parameters
        ----------
        X_pool : array-like of shape (n_pool, n_features)
            Rows without labels, of one task or of many; query sets of several tasks as in
            `predict`. Leave out rows that have a label by now: they are proposed again where the
            noise is such that a second label tells more than the first one of another row.
        n : int
            Rows to choose from the pool of each task.
        groups : array-like of shape (n_pool,), default=None
            Task id of each row. A task that the estimator is adapted to goes on from what it has
            learned; any other is new, and starts from the meta-learned prior. None: one task, the
            one that the estimator is adapted to, if there is one.

        Returns
        -------
        rows : int ndarray of shape (n,) or (n_tasks * n,)
            Positions in `X_pool`, in the order in which the rows are to be labelled; of several
            tasks n each, task by task as they first come in the pool, so that ``adapt(X_pool[rows],
            y, groups=groups[rows])`` takes them as they are. Of a list of pools or a 3-D array, of
            shape (n_tasks, n), with the positions in each pool.

        Raises
        ------
        ValueError
            If `n` is no positive integer or a pool has fewer rows; if gradient steps predict
            alone, which know no variance; if several tasks are adapted to and `groups` is None.
        NotFittedError
            If the estimator is not meta-fitted.

        See Also
        --------
        sklearn_maml.suggest_rows : The same for pipelines and other models made of one.

        Notes
        -----
        Of row c of a pool the criterion is :math:`\sum_j w_j K_{jc}^2 / (K_{cc} + \sigma_c^2)`,
        with the posterior covariance K of the outputs, averaged over the members of the head:
        active learning by expected variance (Cohn, Ghahramani & Jordan 1996, sec. 4). For squared
        errors it is exact, with the variance of the noise and equal weights, of outputs in units of
        their standard deviations in `fit`. For other losses, :math:`1 / \sigma_c^2` is the
        information that is expected of a label (of counts, more where many are expected), and
        :math:`w_j` the expected second derivative of the loss; for classes,
        :math:`w_j = 1 - \sum_k p_{jk}^2`. Where members disagree is left out, as labels need not
        settle it. Rows that are equally good are taken by position.

        References
        ----------
        Cohn, D. A., Ghahramani, Z. & Jordan, M. I. (1996). Active Learning with Statistical
        Models. Journal of Artificial Intelligence Research, 4.

        Examples
        --------
        >>> import numpy as np
        >>> from sklearn_maml import MAMLRegressor
        >>> rng = np.random.RandomState(0)
        >>> X = rng.uniform(-1, 1, (400, 1))  # 40 straight lines
        >>> task = np.repeat(np.arange(40), 10)
        >>> y = (rng.randn(40)[task] + rng.randn(40)[task] * X[:, 0]) + 0.1 * rng.randn(400)
        >>> reg = MAMLRegressor(update_rule="gaussian-head", max_iter=10, random_state=0)
        >>> reg = reg.fit(X, y, groups=task)
        >>> reg.suggest_rows(np.linspace(-1, 1, 5)[:, None], 3)  # middle and ends of a new line
        array([2, 0, 4])
        """
        if not is_integer(n) or n < 1:
            raise ValueError(f"n must be a positive integer, the rows to choose; got {n!r}.")
        name = "suggest_rows"
        queries = self._read_queries(X_pool, groups, name)
        rows, lengths = queries.rows, queries.lengths
        state, tasks, pools = self._find_tasks(queries.groups, len(rows), queries.name, name)
        sizes = np.bincount(pools) if lengths is None else np.array(lengths)
        if (sizes < n).any():
            raise ValueError(
                f"n={n} rows are to be chosen of each pool, but {(sizes < n).sum()} of "
                f"{len(sizes)} pools have fewer, the smallest {sizes.min()}. Choose fewer, or "
                "leave out the tasks with small pools."
            )
        chosen = state.adapted.telling_rows(rows, pools, tasks, int(n))
        if lengths is not None:
            return chosen - (np.cumsum(sizes) - sizes)[:, None]
        _, first = np.unique(pools, return_index=True)
        return chosen[np.argsort(first)].ravel()


def suggest_rows(
    estimator: Any, X_pool: Tasks, n: int, groups: ArrayLike | None = None
) -> NDArray[Any]:
    """Choose which rows of new tasks to label; see `MAMLRegressor.suggest_rows`.

    Parameters
    ----------
    estimator : estimator
        A meta-fitted `MAMLRegressor` or `MAMLClassifier`, or a model that predicts what one
        predicts: a Pipeline, search, FewShot or frozen estimator made of one, or any of these in a
        TransformedTargetRegressor, whose variance is that of the transformed target. What `adapt`
        returned goes on from the rows that it was given.
    X_pool : array-like of shape (n_pool, n_features)
        Rows without labels, of one task or of many, as the model takes them in `predict`.
    n : int
        Rows to choose from the pool of each task.
    groups : array-like of shape (n_pool,), default=None
        Task id of each row.

    Returns
    -------
    rows : int ndarray of shape (n,) or (n_tasks * n,)
        Positions in `X_pool`, in the order in which the rows are to be labelled; of several tasks n
        each, task by task as they first come in the pool.

    Raises
    ------
    TypeError
        If there is no MAML estimator in `estimator`, or if `estimator` predicts something else than
        the one there is, such as an ensemble.
    NotFittedError
        If `estimator` is not fitted.
    ValueError
        As `MAMLRegressor.suggest_rows`.

    Examples
    --------
    >>> import sklearn
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_maml import MAMLRegressor, adapt, suggest_rows
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> with sklearn.config_context(enable_metadata_routing=True):
    ...     pipe = make_pipeline(StandardScaler(), MAMLRegressor(max_iter=10, random_state=0))
    ...     pipe = pipe.fit(X, y, groups=task)
    >>> rows = suggest_rows(pipe, X[:10], 3)
    >>> adapted = adapt(pipe, X[rows], y[rows])
    >>> suggest_rows(adapted, X[:10], 2).shape  # the next two
    (2,)
    """
    # by name: importing what scikit-learn composes takes long
    if any(kind.__name__ == "TransformedTargetRegressor" for kind in type(estimator).__mro__):
        check_is_fitted(estimator)
        estimator = estimator.regressor_
    transformers, maml = open_chain(estimator)
    check_is_fitted(maml)
    pools: Any = X_pool
    if transformers and isinstance(pools, (list, tuple)) and n_axes(pools[:1]) > 2:
        pools = [transform_rows(transformers, pool) for pool in pools]
    elif transformers and getattr(pools, "ndim", 2) > 2:
        pools = np.stack([transform_rows(transformers, pool) for pool in pools])
    else:
        pools = transform_rows(transformers, pools)
    return maml.suggest_rows(pools, n, groups=groups)
