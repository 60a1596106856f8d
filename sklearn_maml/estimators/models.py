"""MAML estimators inside other models: which there are, and the one that a model is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.data.spellings import count_rows, is_task_list, refuse_graphs
from sklearn_maml.estimators.base import BaseMAML

# what objects have that may hold estimators
METHODS = ("fit", "predict", "predict_proba", "transform")
# a longer list or dict is a vocabulary, or data
MOST_PARTS = 10_000


def models_in(model: Any) -> list[BaseMAML]:
    """Return the MAML estimators anywhere in a model, fitted or not."""
    return list(_find(model, set()))


def _find(value: Any, seen: set[int]) -> Iterator[BaseMAML]:
    if isinstance(value, BaseMAML):
        yield value
        return
    if isinstance(value, (str, bytes, int, float, type, type(None))) or id(value) in seen:
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, (dict, list, tuple)):
        if len(value) <= MOST_PARTS:
            parts = value.values() if isinstance(value, dict) else value
    elif any(hasattr(type(value), name) for name in METHODS) and hasattr(value, "__dict__"):
        parts = vars(value).values()
    for part in list(parts):
        yield from _find(part, seen)


def is_local(model: Any) -> bool:
    """Whether the labels of a model mean something inside a task only."""
    return any(getattr(maml, "n_ways", None) is not None for maml in models_in(model))


def nothing_to_adapt(model: Any) -> TypeError:
    """Error that there is no MAML estimator in a model."""
    return TypeError(
        f"There is no meta-learned model in {type(model).__name__}: expected a meta-fitted "
        "MAMLRegressor or MAMLClassifier, or a fitted Pipeline, search, FewShot estimator or "
        "ensemble made of one."
    )


def best_of_search(search: Any) -> Any:
    """Return what a fitted search has found."""
    check_is_fitted(search)
    best = getattr(search, "best_estimator_", None)
    if best is None:
        raise TypeError(
            f"{type(search).__name__} has no best_estimator_: with refit={search.refit!r} it has "
            "fitted no estimator that it keeps. Fit it with refit=True, or adapt an estimator that "
            "you fit with search.best_params_."
        )
    return best


def is_search(model: Any) -> bool:
    """Whether a model is a search: scikit-learn's, or one that keeps what is best as they do."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return "BaseSearchCV" in kinds or hasattr(model, "best_estimator_")


def open_chain(estimator: Any) -> tuple[list[Any], BaseMAML]:
    """Take apart a model that predicts what one MAML estimator predicts.

    Parameters
    ----------
    estimator : estimator
        A MAML estimator, or a Pipeline, search, FewShot or frozen estimator made of one.

    Returns
    -------
    transformers : list of estimators
        Steps in front of the MAML estimator.
    maml : MAMLRegressor or MAMLClassifier

    Raises
    ------
    TypeError
        If there is no MAML estimator in the model, or if the model predicts something else than
        the one there is.
    """
    transformers: list[Any] = []
    rates: dict[str, Any] = {}
    model = estimator
    while not isinstance(model, BaseMAML):
        if not models_in(model):
            raise nothing_to_adapt(estimator)
        if isinstance(model, Pipeline):
            transformers += [step for _, step in model.steps[:-1]]
            model = model.steps[-1][1]
        elif isinstance(model, FrozenEstimator):
            model = model.estimator
        elif hasattr(model, "__prior_and_rates__"):
            model, own = model.__prior_and_rates__()
            rates = {**{n: v for n, v in own.items() if v is not None}, **rates}
        elif is_search(model):
            model = best_of_search(model)
        else:
            raise TypeError(
                f"{type(model).__name__} holds a meta-learned model, but does not predict what "
                "that one predicts, so that its tasks cannot be scored or adapted in one go. Give "
                "the MAMLRegressor or MAMLClassifier, or a Pipeline, search or FewShot estimator "
                "made of one; sklearn_maml.adapt takes more, a task at a time."
            )
    return transformers, copy.copy(model).set_params(**rates) if rates else model


def rows_of(X: Any, change: Any) -> Any:
    """Apply `change` to rows; a list of tasks stays a list."""
    if is_task_list(X, None):
        return [tuple(part if k % 2 else change(part) for k, part in enumerate(task)) for task in X]
    refuse_graphs(X=X)
    return change(X)


def forward(step: Any, X: Any) -> Any:
    """Rows behind one step of a fitted pipeline; samplers of imbalanced-learn act in `fit` only."""
    if step is None or isinstance(step, str):  # "passthrough"
        return X
    if hasattr(step, "fit_resample") and not hasattr(step, "transform"):
        return X
    if hasattr(X, "__len__") and count_rows(X) == 0:
        return []  # transformers refuse what has no rows, and adapting needs no columns then
    return step.transform(X)


def transform_rows(transformers: list[Any], X: Any) -> Any:
    """Rows behind the steps of fitted pipelines; lists of tasks stay lists."""
    for step in transformers:
        X = rows_of(X, lambda rows, step=step: forward(step, rows))
    return X
