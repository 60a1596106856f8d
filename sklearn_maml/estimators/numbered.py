"""Classifiers for tools that number the labels before they call `fit`."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.estimators.containers import changed_targets, register_container
from sklearn_maml.persistence import SaveMixin


class AnswersForClasses(ClassifierMixin):
    """What fitted classifiers of one task answer besides labels, of what another one answers."""

    def _answer(self, method: str, X: ArrayLike) -> NDArray[Any]:
        """Return what a method of the other classifier says, for the classes of this one."""
        raise NotImplementedError

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
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
        return self._answer("predict_proba", X)

    def predict_log_proba(self, X: ArrayLike) -> NDArray[Any]:
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
        return self._answer("predict_log_proba", X)

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
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
        return self._answer("decision_function", X)


class NumberedClasses(SaveMixin, AnswersForClasses, BaseEstimator):
    """Fitted classifier that takes and gives numbers in place of its labels.

    A prior for a `FewShotClassifier` inside tools that number the labels of a task before they
    call `fit`: voting, stacking and bagging of classifiers, `cross_val_predict` of probabilities.

    Parameters
    ----------
    estimator : estimator
        A fitted classifier; it is shared, never copied or changed.
    classes : array-like of shape (n_classes,), default=None
        Labels of the task: the numbers 0, 1, ... are positions in them, sorted, and predictions are
        among them. None: all that the classifier knows.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The numbers 0, 1, ...

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import VotingClassifier
    >>> from sklearn_maml import FewShotClassifier, MAMLClassifier, NumberedClasses
    >>> rng = np.random.default_rng(0)
    >>> X, task = rng.normal(size=(90, 2)), np.repeat(np.arange(9), 10)
    >>> y = np.array(["run", "sit", "walk"])[np.searchsorted([-0.4, 0.4], X[:, 0])]
    >>> prior = MAMLClassifier(max_iter=5, random_state=0).fit(X, y, groups=task)
    >>> some = y[:20] != "run"
    >>> learner = FewShotClassifier(NumberedClasses(prior, ["sit", "walk"]))
    >>> vote = VotingClassifier([("few-shot", learner)]).fit(X[:20][some], y[:20][some])
    >>> set(vote.predict(X)) <= {"sit", "walk"}
    True
    """

    def __init__(self, estimator: Any = None, classes: Any = None) -> None:
        self.estimator = estimator
        self.classes = classes

    def _labels(self) -> np.ndarray:
        """Labels that the numbers stand for."""
        known = np.asarray(self.estimator.classes_)
        if self.classes is None:
            return known
        classes = np.unique(np.asarray(self.classes))
        unseen = np.setdiff1d(classes, known).tolist()
        if unseen:
            raise ValueError(
                f"classes has labels that the classifier does not know: {unseen[:5]}. Expected "
                f"some of {known[:10].tolist()}."
            )
        return classes

    def labels(self, y: ArrayLike) -> NDArray[Any]:
        """Return the labels that numbers stand for.

        Parameters
        ----------
        y : array-like of int of shape (n_rows,)
            Numbers.

        Returns
        -------
        labels : ndarray of shape (n_rows,)
            As the classifier knows them.

        Raises
        ------
        ValueError
            If something else than a number of a class is in y.
        """
        y, labels = np.asarray(y), self._labels()
        if y.dtype.kind not in "iu" or (y.size and (y.min() < 0 or y.max() >= len(labels))):
            raise ValueError(
                f"y must have the numbers 0 to {len(labels) - 1} of the classes "
                f"{labels[:10].tolist()}; got {np.unique(y)[:10].tolist()}. Use the classifier "
                "without NumberedClasses to give labels."
            )
        return labels[y]

    @property
    def classes_(self) -> np.ndarray:
        """The numbers of the classes."""
        return np.arange(len(self._labels()))

    @property
    def n_features_in_(self) -> int:
        """Number of features seen in `fit`."""
        return self.estimator.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the features seen in `fit`."""
        return self.estimator.feature_names_in_

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Do nothing: the classifier is fitted.

        Parameters
        ----------
        X, y : array-like
            Ignored.

        Returns
        -------
        self : object
            As it was.
        """
        check_is_fitted(self)
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Predict numbers of classes.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Query rows.

        Returns
        -------
        y : int ndarray of shape (n_queries,)
            Of `classes_`.
        """
        if self._has_fewer():
            return self.predict_proba(X).argmax(1)
        return np.searchsorted(self._labels(), self.estimator.predict(X))

    def _answer(self, method: str, X: ArrayLike) -> NDArray[Any]:
        if not self._has_fewer():
            return getattr(self.estimator, method)(X)
        if method == "predict_proba":
            return np.exp(self.predict_log_proba(X))
        values = getattr(self.estimator, method)(X)
        if method == "predict_log_proba":
            return log_softmax(self._columns(values), axis=1)
        # of two classes the second is compared with the first
        wide = values if values.ndim > 1 else np.stack([np.zeros_like(values), values], 1)
        scores = self._columns(wide)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def _has_fewer(self) -> bool:
        """Whether predictions are among some of the classes of the classifier."""
        return self.classes is not None and len(self._labels()) < len(self.estimator.classes_)

    def _columns(self, values: np.ndarray) -> np.ndarray:
        """Columns of `values` (n_queries, n_classes of the classifier) that are for `classes_`."""
        which: Any = np.searchsorted(self.estimator.classes_, self._labels())
        return values[:, which]

    def __sklearn_clone__(self) -> Any:
        # the classifier is shared: cloning it would un-fit it
        return type(self)(self.estimator, clone(self.classes, safe=False))

    def __sklearn_is_fitted__(self) -> bool:
        check_is_fitted(self.estimator)
        return True


@register_container(NumberedClasses)
def _adapt_numbered(model: Any, X: Any, y: Any, adapt: Any) -> Any:
    return NumberedClasses(
        adapt(model.estimator, *changed_targets(X, y, model.labels)), model.classes
    )


def are_numbers_of(known: np.ndarray, y: Any) -> bool:
    """Whether the labels y are positions in `known`, rather than labels.

    They are for certain if `known` has no numbers, and y the positions of all of them. Other
    numbers that may be positions are refused.
    """
    y = np.asarray(y)
    if y.dtype.kind not in "iu" or y.size == 0:
        return False
    labels, numbers_known = np.unique(y), known.dtype.kind in "biuf"
    if numbers_known and np.isin(labels, known).all():
        return False
    if not numbers_known and np.array_equal(labels, np.arange(len(known))):
        return True
    if labels.min() < 0 or labels.max() >= len(known):
        return False  # for the error that labels are not known
    raise ValueError(
        f"y has the numbers {labels[:10].tolist()}, and the prior knows the labels "
        f"{known[:10].tolist()}. If a tool has numbered the labels of the task, as voting, "
        "stacking and cross_val_predict of probabilities do, say which they are: "
        "FewShotClassifier(NumberedClasses(prior, classes=[...])). Inside OneVsRestClassifier and "
        "OneVsOneClassifier use it without them: it tells all classes apart by itself. Or take a "
        "prior with n_ways, which takes labels of any kind."
    )
