"""Ordinary per-task estimators made from a meta-fitted prior: the FewShot pair."""

from __future__ import annotations

import copy
import numbers
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._validation import as_integer
from sklearn_maml.data.spellings import refuse_graphs
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.classifier import MAMLClassifier
from sklearn_maml.estimators.containers import Walk, register_container
from sklearn_maml.estimators.models import is_local, models_in, nothing_to_adapt
from sklearn_maml.estimators.numbered import AnswersForClasses, NumberedClasses, are_numbers_of
from sklearn_maml.estimators.regressor import MAMLRegressor
from sklearn_maml.persistence import SaveMixin


class _FewShot(SaveMixin, BaseEstimator):
    """What the two FewShot estimators share: `fit` adapts a prior to one task."""

    _prior_class: type[BaseMAML]

    __stored_attributes__: ClassVar = (
        "model_",
        "n_features_in_",
        "feature_names_in_",
        "classes_",
    )
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

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Adapt the prior to one task.

        Parameters
        ----------
        X : array-like of shape (n_support, n_features)
            Support rows.
        y : array-like of shape (n_support,) or (n_support, n_outputs)
            Their targets, or labels.
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
            held = models_in(self.prior)
            if not held:
                raise nothing_to_adapt(self.prior)
            for maml in held:
                if not isinstance(maml, self._prior_class):
                    raise TypeError(
                        f"The prior of a {type(self).__name__} must hold a "
                        f"{self._prior_class.__name__}; got a {type(maml).__name__}."
                    )
            walk = Walk(sample_weight=sample_weight)  # all rows are of one task
            model = walk.with_rates(**self._rates())(self._prior_for(y), X, y, required=True)
        self.model_ = model
        # a pipeline has as many as its first step, which may be none
        n_features = getattr(model, "n_features_in_", None)
        self.n_features_in_ = np.shape(X)[1] if n_features is None else n_features
        for name in ("feature_names_in_", "classes_"):
            self.__dict__.pop(name, None)
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        return self

    def _validate_params(self) -> None:
        """Validate parameters; numbers such as 3.0 are integers, too."""
        params = {**self.get_params(deep=False), "steps": as_integer(self.steps)}
        validate_parameter_constraints(self._parameter_constraints, params, type(self).__name__)

    def _prior_for(self, y: Any) -> Any:
        """Return the prior as it takes these targets."""
        return self.prior

    def _rates(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "adapt_steps": self.steps}

    def __prior_and_rates__(self) -> tuple[Any, dict[str, Any]]:
        """Return the model to adapt, and parameters that it adapts with where they are given."""
        if hasattr(self, "model_"):  # which has them
            return self.model_, {}
        return self.prior, self._rates()

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

    def predict(self, X: ArrayLike) -> NDArray[Any]:
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

    def set_params(self, **params: Any) -> Self:
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


@register_container(_FewShot)
def _adapt_few_shot(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    prior, rates = model.__prior_and_rates__()
    return adapt.with_rates(**rates)(prior, X, y)


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

    @overload
    def predict(
        self, X: ArrayLike, return_std: Literal[False] = False, return_quantiles: None = None
    ) -> NDArray[Any]: ...

    @overload
    def predict(
        self, X: ArrayLike, return_std: Literal[True], return_quantiles: None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

    @overload
    def predict(
        self, X: ArrayLike, return_std: bool = False, *, return_quantiles: ArrayLike
    ) -> tuple[NDArray[Any], ...]: ...

    def predict(
        self, X: ArrayLike, return_std: bool = False, return_quantiles: ArrayLike | None = None
    ) -> Any:
        """Predict for rows of the task.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.
        return_std : bool, default=False
            Whether to return standard deviations, too, as `MAMLRegressor.predict` does.
        return_quantiles : array-like of shape (n_quantiles,), default=None
            Levels of quantiles to return, too, likewise.

        Returns
        -------
        y : ndarray of shape (n_queries,) or (n_queries, n_outputs)
            Predictions.
        std : ndarray of the same shape
            Only if `return_std`.
        quantiles : ndarray of that shape and one more axis of length n_quantiles
            Only with `return_quantiles`.

        Raises
        ------
        ValueError
            With `return_std` or `return_quantiles`, if gradient steps predict alone.
        """
        options: dict[str, Any] = {"return_std": True} if return_std else {}
        if return_quantiles is not None:
            options["return_quantiles"] = return_quantiles
        return self._fitted_model(X).predict(X, **options)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class FewShotClassifier(AnswersForClasses, _FewShot):
    """Classifier for one task that learns from few rows by adapting a meta-learned prior.

    An ordinary scikit-learn estimator: ``fit`` adapts a copy of the prior to the rows it is given,
    so cross-validation, searches and pipelines work on a single task.

    Parameters
    ----------
    prior : estimator, default=None
        A meta-fitted `MAMLClassifier`, whose `class_weight` is that of the rows of the task, too,
        or a fitted pipeline or search that ends in one. It is shared, never copied or changed;
        cloning this estimator keeps it. To search over priors, wrap them in
        `sklearn.frozen.FrozenEstimator`. None starts from a random initialisation and takes plain
        gradient steps: the baseline without meta-learning.
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
        support set for a prior with `n_ways`, and 0, 1, ... where y has the numbers of classes.
    n_features_in_ : int
        Number of features seen during `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, if X had names.

    Notes
    -----
    Some tools number the labels 0, 1, ... before they call `fit`: voting, stacking and bagging of
    classifiers, `cross_val_predict` of probabilities. A prior with `n_ways` takes any labels. One
    whose labels are shared has to know what the numbers stand for: if it was fitted on strings,
    and the numbers are those of all its classes, they are positions in its sorted classes. Numbers
    of fewer classes may be those of any, and are refused: `NumberedClasses` tells. A prior that was
    fitted on numbers takes numbers for its own labels, so wrap it for such tools if these are not
    0, 1, ..., or if the task has only some of them. `OneVsRestClassifier` and `OneVsOneClassifier`
    ask about one class against others, which such a prior has not learned; it needs neither,
    because it tells all classes apart by itself.

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

    def _prior_for(self, y: Any) -> Any:
        if is_local(self.prior):
            return self.prior
        known = np.asarray(getattr(self.prior, "classes_", []))
        return NumberedClasses(self.prior) if are_numbers_of(known, y) else self.prior

    def _answer(self, method: str, X: ArrayLike) -> NDArray[Any]:
        return getattr(self._fitted_model(X), method)(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = False
        return tags
