"""The methods of a comparison: what they are made of, trained and scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sklearn
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from sklearn_maml._validation import did_you_mean
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.containers import Walk
from sklearn_maml.estimators.models import is_search
from sklearn_maml.evaluation.baselines.base import Baseline, Episode, TrainingTasks
from sklearn_maml.evaluation.held_out import SplitData

BEFORE = "before adaptation"
# probabilities are this at least in the log-loss
LEAST_PROBABILITY = 1e-7


def maml_inside(estimator: Any) -> BaseMAML | None:
    """Find the MAML estimator to train in a pipeline or search, or None."""
    while not isinstance(estimator, BaseMAML):
        if isinstance(estimator, Pipeline):
            estimator = estimator.steps[-1][1]
        elif is_search(estimator):
            estimator = estimator.estimator
        else:
            return None
    return estimator


def make_methods(baselines: Any, classification: bool, name: str) -> dict[str, Any]:
    """Factories of the baselines by name; values that are estimators stay what they are."""
    # scikit-learn's ensembles and processes take long to import, and nothing else needs them
    from sklearn_maml.evaluation.baselines import per_task, pooled, registry

    known = registry.CLASSIFICATION if classification else registry.REGRESSION
    if isinstance(baselines, str) and baselines == "all":
        return {key: make() for key, make in known.items()}
    if isinstance(baselines, str):
        baselines = [baselines]
    given = dict(baselines) if isinstance(baselines, Mapping) else dict.fromkeys(baselines)
    methods: dict[str, Any] = {}
    for key, value in given.items():
        if key in (name, f"{name}, {BEFORE}"):
            raise ValueError(f"The name {key!r} is that of the estimator. Give another one.")
        if value is None:
            if key not in known:
                raise ValueError(
                    f"There is no baseline {key!r}.{did_you_mean(str(key), known)} Expected names "
                    f"among {sorted(known)}, or a dict of names and estimators."
                )
            methods[key] = known[key]()
            continue
        for_all = isinstance(value, tuple) and len(value) == 2 and value[0] == "pooled"
        model = value[1] if for_all else value
        if not hasattr(model, "fit") or not hasattr(model, "predict") or isinstance(model, type):
            raise TypeError(
                f"The baseline {key!r} must be an estimator, ('pooled', estimator) or None; got "
                f"{value!r}."
            )
        if for_all:
            methods[key] = pooled.Pooled(model, f"the given {key}")
        elif maml_inside(model) is not None:
            methods[key] = model
        else:
            methods[key] = per_task.PerTask(_Cloner(model))
    return methods


class _Cloner:
    """Make clones of an estimator, whatever the number of rows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, n_rows: int) -> Any:
        return clone(self.model)


def families(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Methods that share what they fit, together; the others alone."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, method in methods.items():
        family = getattr(method, "family", "")
        found.setdefault((family, "" if family else name), {})[name] = method
    return list(found.values())


def run(repeat: int, data: SplitData, seed: int, methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Train methods on the training tasks of a split and score them on the held-out ones."""
    classification = data.classes is not None
    flat = data.X.reshape(len(data.X), -1).astype(np.float64)
    y = data.y
    if data.classes is not None:
        y = np.searchsorted(data.classes, y)
    train = TrainingTasks(
        flat[data.train],
        y[data.train],
        data.tasks.codes[data.train],
        tuple(data.episodes),
        0 if data.classes is None else len(data.classes),
        seed,
    )
    rows = []
    for name, method in methods.items():
        train.borrowed = 0.0
        start = time.perf_counter()
        if isinstance(method, Baseline):
            method.fit(train)
        else:
            method = _MetaLearner(method, data)
        seconds = time.perf_counter() - start + train.borrowed
        for k, pairs in data.episodes.items():
            if isinstance(method, _MetaLearner):
                predictions = {
                    name: method.predict(pairs, None),
                    f"{name}, {BEFORE}": method.predict(pairs, 0),
                }
            else:
                episodes = [Episode(flat[s], y[s], flat[q]) for s, q in pairs]
                predictions = {name: method.predict(episodes, k)}
            for label, predicted in predictions.items():
                for (support, query), values in zip(pairs, predicted, strict=True):
                    row = {
                        "repeat": repeat,
                        "n_shots": k,
                        "task": data.tasks.codes[support[0]],
                        "method": label,
                        **_score(y[query], values, classification),
                        "fit_seconds": seconds,
                    }
                    rows.append(row)
    return rows


def _score(y: np.ndarray, predicted: np.ndarray, classification: bool) -> dict[str, float]:
    if not classification:
        return {"rmse": float(np.sqrt(np.mean((predicted - y) ** 2)))}
    p = predicted[np.arange(len(y)), y]
    return {
        "accuracy": float(np.mean(predicted.argmax(1) == y)),
        "log_loss": float(-np.log(np.maximum(p, LEAST_PROBABILITY)).mean()),
    }


class _MetaLearner:
    """A clone of the estimator, fitted on the training tasks."""

    def __init__(self, estimator: Any, data: SplitData) -> None:
        self.data = data
        model = clone(estimator)
        maml = maml_inside(model)
        assert maml is not None
        maml.set_params(task_column=None)  # tasks are given as groups
        with sklearn.config_context(enable_metadata_routing=True):
            self.model = model.fit(
                data.rows(data.train), data.y[data.train], groups=data.tasks.codes[data.train]
            )

    def predict(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], steps: int | None
    ) -> list[np.ndarray]:
        """Predict the query rows of all held-out tasks at once."""
        data = self.data
        task = data.tasks.codes
        support = np.concatenate([s for s, _ in pairs])
        query = np.concatenate([q for _, q in pairs])
        with sklearn.config_context(enable_metadata_routing=True):
            walk = Walk(groups=task[support]).with_rates(adapt_steps=steps)
            adapted = walk(self.model, data.rows(support), data.y[support])
            method = adapted.predict if data.classes is None else adapted.predict_proba
            values = np.asarray(method(data.rows(query), groups=task[query]), dtype=np.float64)
        return np.split(values, np.cumsum([len(q) for _, q in pairs])[:-1])
