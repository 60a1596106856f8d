"""Ordinary per-task estimators made from a meta-fitted prior: `adapt` and the FewShot pair."""

from __future__ import annotations

import copy
import numbers
from typing import Any, ClassVar

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.data.spellings import refuse_graphs
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.classifier import MAMLClassifier
from sklearn_maml.estimators.models import find_prior, transform_rows
from sklearn_maml.estimators.regressor import MAMLRegressor
from sklearn_maml.persistence import SaveMixin

__all__ = ["FewShotClassifier", "FewShotRegressor", "adapt", "with_rates"]


def adapt(
    estimator: Any, X: Any, y: Any = None, groups: Any = None, sample_weight: Any = None
) -> Any:
    """Adapt a copy of a meta-fitted model; the model itself is untouched.

    Parameters
    ----------
    estimator : estimator
        A meta-fitted `MAMLRegressor` or `MAMLClassifier`, a fitted Pipeline that ends in one, a
        fitted search over one, a FewShot estimator made from one, or any of these frozen.
    X : array-like of shape (n_support, n_features)
        Support rows.
    y : array-like of shape (n_support,) or (n_support, n_outputs)
        Their targets.
    groups : array-like of shape (n_support,), default=None
        Task id of each row, to adapt to many tasks in one call.
    sample_weight : array-like of shape (n_support,), default=None
        Weights of the rows in the support loss.

    Returns
    -------
    adapted : estimator
        Fitted estimator of the same kind (of a search, its best estimator) that predicts for the
        new task. It shares the meta-learned parameters with `estimator`: a copy holds those alone
        that adapt, so thousands of copies are cheap with ``adapted="head"``. Any number of threads
        may adapt copies of one model and predict at the same time.

    Raises
    ------
    TypeError
        If there is no meta-learned model in `estimator`.
    NotFittedError
        If `estimator` is not fitted.

    Examples
    --------
    >>> import sklearn
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_maml import MAMLRegressor, adapt
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> with sklearn.config_context(enable_metadata_routing=True):
    ...     pipe = make_pipeline(StandardScaler(), MAMLRegressor(max_iter=10, random_state=0))
    ...     pipe = pipe.fit(X, y, groups=task)
    >>> adapted = adapt(pipe, X[:10], y[:10])
    >>> adapted.predict(X[10:20]).shape
    (10,)
    """
    if isinstance(estimator, _FewShot) and not hasattr(estimator, "model_"):
        estimator = with_rates(estimator.prior, estimator.alpha, estimator.steps)
    estimator = find_prior(estimator)
    if isinstance(estimator, Pipeline):
        check_is_fitted(estimator)
        X = transform_rows(estimator, X)
        name, last = estimator.steps[-1]
        adapted = copy.copy(estimator)
        adapted.steps = [
            *estimator.steps[:-1],
            (name, adapt(last, X, y, groups=groups, sample_weight=sample_weight)),
        ]
        return adapted
    return copy.copy(estimator).adapt(X, y, groups=groups, sample_weight=sample_weight)


class _FewShot(SaveMixin, BaseEstimator):
    """What the two FewShot estimators share: `fit` adapts a prior to one task."""

    _prior_class: type[BaseMAML]

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alpha": [Interval(numbers.Real, 0, None, closed="left"), None],
        "steps": [Interval(numbers.Integral, 0, None, closed="left"), None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        prior: Any = None,
        *,
        alpha: float | None = None,
        steps: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.prior = prior
        self.alpha = alpha
        self.steps = steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Adapt the prior to one task.

        Parameters
        ----------
        X : array-like of shape (n_support, n_features)
            Support rows.
        y : array-like of shape (n_support,) or (n_support, n_outputs)
            Their targets.
        sample_weight : array-like of shape (n_support,), default=None
            Weights of the rows in the support loss.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        self._validate_params()
        if self.prior is None:
            model = self._fit_without_prior(X, y, sample_weight)
        else:
            prior = with_rates(self.prior, self.alpha, self.steps)
            held = find_prior(prior)
            while isinstance(held, Pipeline):
                held = find_prior(held.steps[-1][1])
            if not isinstance(held, self._prior_class):
                raise TypeError(
                    f"The prior of a {type(self).__name__} must hold a "
                    f"{self._prior_class.__name__}; got a {type(held).__name__}."
                )
            model = adapt(prior, X, y, sample_weight=sample_weight)
        self.model_ = model
        self.n_features_in_ = model.n_features_in_
        if hasattr(model, "feature_names_in_"):
            self.feature_names_in_ = model.feature_names_in_
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def _fit_without_prior(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Plain gradient steps from a seeded random initialisation."""
        start = self._prior_class(
            update_rule="sgd",
            alpha=0.1 if self.alpha is None else self.alpha,
            steps=200 if self.steps is None else self.steps,
            random_state=self.random_state,
        )
        return start.__adapt_initialisation__(X, y, sample_weight)

    def _fitted_model(self, X: Any) -> Any:
        check_is_fitted(self)
        refuse_graphs(X=X)  # which the transformers of a pipeline cannot read
        return self.model_

    def predict(self, X: Any) -> Any:
        """Predict for rows of the task.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.

        Returns
        -------
        y : ndarray of shape (n_queries,) or (n_queries, n_outputs)
            Predictions.
        """
        return self._fitted_model(X).predict(X)

    def set_params(self, **params: Any) -> Any:
        """Set parameters of this estimator.

        Parameters
        ----------
        **params : dict
            Parameter names and values. ``prior__*`` go to a copy of the prior, which is shared.

        Returns
        -------
        self : object
        """
        if "prior" not in params and any(name.startswith("prior__") for name in params):
            self.prior = copy.deepcopy(self.prior)
        return super().set_params(**params)

    def __sklearn_clone__(self) -> Any:
        # the prior is shared: cloning it would un-fit it
        params = self.get_params(deep=False)
        prior = params.pop("prior")
        return type(self)(prior=prior, **{n: clone(p, safe=False) for n, p in params.items()})

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")


def with_rates(prior: Any, alpha: float | None, steps: int | None) -> Any:
    """Copy of the prior with another inner rate or number of steps, if one is asked for."""
    given = {"alpha": alpha, "adapt_steps": steps}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return prior
    prior = find_prior(prior)
    if isinstance(prior, Pipeline):
        name, last = prior.steps[-1]
        changed = copy.copy(prior)
        changed.steps = [*prior.steps[:-1], (name, with_rates(last, alpha, steps))]
        return changed
    return copy.copy(prior).set_params(**given)


class FewShotRegressor(RegressorMixin, _FewShot):
    """Regressor for one task that learns from few rows by adapting a meta-learned prior.

    An ordinary scikit-learn estimator: ``fit`` adapts a copy of the prior to the rows it is given,
    so cross-validation, searches and pipelines work on a single task.

    Parameters
    ----------
    prior : estimator, default=None
        A meta-fitted `MAMLRegressor`, or a fitted pipeline or search that ends in one. It is
        shared, never copied or changed; cloning this estimator keeps it. To search over priors,
        wrap them in `sklearn.frozen.FrozenEstimator`. None starts from a random initialisation
        and takes plain gradient steps: the baseline without meta-learning.
    alpha : float, default=None
        Inner rate; None takes that of the prior (0.1 without one).
    steps : int, default=None
        Inner steps; None takes those of the prior (200 without one).
    random_state : int, RandomState instance or None, default=None
        Seeds the initialisation without a prior; not used with one.

    Attributes
    ----------
    model_ : estimator
        The adapted copy of the prior.
    n_features_in_ : int
        Number of features seen during `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had names.

    References
    ----------
    Finn, Abbeel & Levine (2017), Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, algorithm 1.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn_maml import FewShotRegressor, MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> prior = MAMLRegressor(max_iter=20, random_state=0).fit(X, y, groups=task)
    >>> cross_val_score(FewShotRegressor(prior), X[:20], y[:20], cv=4).shape
    (4,)
    """

    _prior_class = MAMLRegressor

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict for rows of the task.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.
        return_std : bool, default=False
            Whether to return standard deviations, too, as `MAMLRegressor.predict` does.

        Returns
        -------
        y : ndarray of shape (n_queries,) or (n_queries, n_outputs)
            Predictions.
        std : ndarray of the same shape
            Only if `return_std`.

        Raises
        ------
        ValueError
            With `return_std`, if gradient steps predict alone.
        """
        model = self._fitted_model(X)
        return model.predict(X, return_std=True) if return_std else model.predict(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class FewShotClassifier(ClassifierMixin, _FewShot):
    """Classifier for one task that learns from few rows by adapting a meta-learned prior.

    An ordinary scikit-learn estimator: ``fit`` adapts a copy of the prior to the rows it is given,
    so cross-validation, searches and pipelines work on a single task.

    Parameters
    ----------
    prior : estimator, default=None
        A meta-fitted `MAMLClassifier`, or a fitted pipeline or search that ends in one. It is
        shared, never copied or changed; cloning this estimator keeps it. To search over priors,
        wrap them in `sklearn.frozen.FrozenEstimator`. None starts from a random initialisation
        and takes plain gradient steps: the baseline without meta-learning.
    alpha : float, default=None
        Inner rate; None takes that of the prior (0.1 without one).
    steps : int, default=None
        Inner steps; None takes those of the prior (200 without one).
    random_state : int, RandomState instance or None, default=None
        Seeds the initialisation without a prior; not used with one.

    Attributes
    ----------
    model_ : estimator
        The adapted copy of the prior.
    classes_ : ndarray of shape (n_classes,)
        Class labels: those of the prior where labels are shared by the tasks, those of the
        support set for a prior with `n_ways`.
    n_features_in_ : int
        Number of features seen during `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had names.

    Notes
    -----
    Tools that encode the labels as 0, 1, ... before they call `fit` (voting, stacking,
    `cross_val_predict` of probabilities) work with a prior whose labels are those numbers, and with
    a prior with `n_ways`, but not with one whose shared labels are strings.

    References
    ----------
    Finn, Abbeel & Levine (2017), Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, algorithm 1.

    Examples
    --------
    >>> from sklearn_maml import FewShotClassifier, MAMLClassifier
    >>> from sklearn_maml.datasets import load_omniglot
    >>> X, y = load_omniglot(return_X_y=True)
    >>> prior = MAMLClassifier(n_ways=5, n_shots=1, n_queries=5, max_iter=5, random_state=0)
    >>> prior = prior.fit(X[:2000], y[:2000])
    >>> learner = FewShotClassifier(prior).fit(X[-100::10], y[-100::10])
    >>> learner.predict(X[-99:-97]).shape
    (2,)
    """

    _prior_class = MAMLClassifier

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Adapt the prior to one task.

        Parameters
        ----------
        X : array-like of shape (n_support, n_features)
            Support rows.
        y : array-like of shape (n_support,)
            Their labels.
        sample_weight : array-like of shape (n_support,), default=None
            Weights of the rows in the support loss.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        super().fit(X, y, sample_weight=sample_weight)
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X: Any) -> Any:
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.

        Returns
        -------
        p : ndarray of shape (n_queries, n_classes)
            Probabilities in the order of `classes_`.
        """
        return self._fitted_model(X).predict_proba(X)

    def predict_log_proba(self, X: Any) -> Any:
        """Predict the logarithm of class probabilities.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.

        Returns
        -------
        log_p : ndarray of shape (n_queries, n_classes)
            In the order of `classes_`.
        """
        return self._fitted_model(X).predict_log_proba(X)

    def decision_function(self, X: Any) -> Any:
        """Return the outputs of the network for each class (logits).

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.

        Returns
        -------
        scores : ndarray of shape (n_queries, n_classes), or (n_queries,) for two classes
            In the order of `classes_`.
        """
        return self._fitted_model(X).decision_function(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = False
        return tags
