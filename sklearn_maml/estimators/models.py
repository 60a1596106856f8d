"""Finding the MAML estimator inside pipelines, searches and FewShot estimators."""

from __future__ import annotations

from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklearn_maml.data.spellings import is_task_list, refuse_graphs
from sklearn_maml.estimators.base import BaseMAML

__all__ = ["find_prior", "transform_rows"]


def find_prior(estimator: Any) -> Any:
    """Return the MAML estimator, or the Pipeline that ends in one, inside a model."""
    model = estimator
    while not isinstance(model, BaseMAML):
        if isinstance(model, Pipeline):
            find_prior(model.steps[-1][1])
            return model
        for name in ("best_estimator_", "model_", "estimator", "prior"):
            if getattr(model, name, None) is not None:
                model = getattr(model, name)
                break
        else:
            raise TypeError(
                f"There is no meta-learned model in {type(estimator).__name__}: expected a "
                "meta-fitted MAMLRegressor or MAMLClassifier, or a fitted Pipeline, search or "
                "FewShot estimator made of one."
            )
    return model


def transform_rows(pipeline: Pipeline, X: Any) -> Any:
    """Rows as the last step of a fitted pipeline sees them; lists of tasks stay lists."""
    check_is_fitted(pipeline)
    if is_task_list(X, None):
        return [
            tuple(part if k % 2 else transform_rows(pipeline, part) for k, part in enumerate(task))
            for task in X
        ]
    refuse_graphs(X=X)
    for _, step in pipeline.steps[:-1]:
        if step is not None and step != "passthrough":
            X = step.transform(X)
    return X
