"""The methods of a comparison: what they are made of, trained and scored."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sklearn
from scipy.stats import norm
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from sklearn_maml._validation import did_you_mean
from sklearn_maml.estimators.base import BaseMAML
from sklearn_maml.estimators.containers import Walk
from sklearn_maml.estimators.models import is_search
from sklearn_maml.evaluation.baselines.base import Baseline, Episode, TrainingTasks
from sklearn_maml.evaluation.held_out import SplitData
from sklearn_maml.exceptions import SmallTaskWarning
from sklearn_maml.learners.plan import GAUSSIAN_HEAD
from sklearn_maml.targets.losses import resolve_loss

BEFORE = "before adaptation"
# standard deviations on either side of the mean that hold nine in ten of a normal distribution
NINE_IN_TEN = 1.645
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


def make_methods(
    baselines: Any, classification: bool, local: bool, name: str
) -> tuple[dict[str, Any], list[str]]:
    """Baselines by name, estimators as they are; and names of those that are not installed.

    `local` labels, which mean something inside an episode only, leave nothing to pool.
    """
    # scikit-learn's ensembles and processes take long to import, and nothing else needs them
    from sklearn_maml.evaluation.baselines import per_task, pooled, registry

    known = registry.CLASSIFICATION if classification else registry.REGRESSION
    known = registry.LOCAL if local else known
    if isinstance(baselines, str) and baselines == "all":
        missing = [key for key in known if not registry.is_installed(key)]
        return {key: make() for key, make in known.items() if key not in missing}, missing
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
            if not registry.is_installed(key):
                raise ImportError(
                    f"The baseline {key!r} needs {registry.NEEDS[key]}, which is not installed: "
                    f"pip install {registry.NEEDS[key]}."
                )
            methods[key] = known[key]()
            continue
        for_all = isinstance(value, tuple) and len(value) == 2 and value[0] == "pooled"
        if for_all and local:
            raise ValueError(
                f"The baseline {key!r} is pooled, but labels are local to the episodes (n_ways): "
                "there is nothing to pool."
            )
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
            methods[key] = per_task.PerTask(_cloner(model))
    return methods, []


def _cloner(model: Any) -> Callable[[int], Any]:
    return lambda n_rows: clone(model)


def families(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Methods that share what they fit, together; the others alone."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, method in methods.items():
        family = getattr(method, "family", "")
        found.setdefault((family, "" if family else name), {})[name] = method
    return list(found.values())


def run(
    repeat: int, data: SplitData, seed: int, methods: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Train methods on the training tasks of a split and score them on the held-out ones."""
    flat = data.X.reshape(len(data.X), -1).astype(np.float64)
    y = data.numbers
    # a model of numbers is of one target
    targets = [y] if y.ndim == 1 else list(y.T)
    trains = [
        TrainingTasks(
            flat[data.train],
            target[data.train],
            data.tasks.codes[data.train],
            tuple(data.episodes),
            data.n_classes,
            seed,
        )
        for target in targets
    ]
    rows = []
    for name, method in methods.items():
        start = time.perf_counter()
        for train in trains:
            train.borrowed = 0.0
        own = isinstance(method, Baseline)
        fitted: Any = (
            [copy.deepcopy(method).fit(train) for train in trains]
            if own
            else _MetaLearner(method, data)
        )
        seconds = time.perf_counter() - start + sum(train.borrowed for train in trains)
        for k, pairs in data.episodes.items():
            start = time.perf_counter()
            if own:
                each = [
                    _predict(f, flat, data.local(pairs, target), pairs, k)
                    for f, target in zip(fitted, targets, strict=True)
                ]
                predicted = {name: [_join(parts) for parts in zip(*each, strict=True)]}
            else:
                predicted = {name: fitted.predict(pairs, None)}
            taken = time.perf_counter() - start
            if not own:
                predicted[f"{name}, {BEFORE}"] = fitted.predict(pairs, 0)
            truth = data.local(pairs, y)
            for label, values in predicted.items():
                for j, (value, (_, of_query)) in enumerate(zip(values, truth, strict=True)):
                    row = {
                        "repeat": repeat,
                        "n_shots": k,
                        "task": data.unit(j, pairs[j]),
                        "method": label,
                        **_score(of_query, *value, data.n_classes),
                        "fit_seconds": seconds,
                        "predict_seconds": taken,
                    }
                    rows.append(row)
    return list(methods), rows


def _predict(
    method: Baseline,
    flat: np.ndarray,
    truth: list[tuple[np.ndarray, np.ndarray]],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    k: int,
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Predictions of a baseline for the query rows of each episode, and their std or None."""
    episodes = [Episode(flat[s], y, flat[q]) for (s, q), (y, _) in zip(pairs, truth, strict=True)]
    return [v if isinstance(v, tuple) else (v, None) for v in method.predict(episodes, k)]


def _join(
    parts: Sequence[tuple[np.ndarray, np.ndarray | None]],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Put the predictions of several targets side by side."""
    if len(parts) == 1:
        return parts[0]
    means, stds = zip(*parts, strict=True)
    known = [std for std in stds if std is not None]
    return np.stack(means, axis=1), np.stack(known, axis=1) if len(known) == len(stds) else None


def _score(
    y: np.ndarray, predicted: np.ndarray, std: np.ndarray | None, n_classes: int
) -> dict[str, float]:
    if n_classes:
        p = predicted[np.arange(len(y)), y]
        return {
            "accuracy": float(np.mean(predicted.argmax(1) == y)),
            "log_loss": float(-np.log(np.maximum(p, LEAST_PROBABILITY)).mean()),
            "brier": float(((predicted - np.eye(n_classes)[y]) ** 2).sum(1).mean()),
        }
    scores = {
        "rmse": float(np.sqrt(np.mean((predicted - y) ** 2))),
        "crps": np.nan,
        "coverage": np.nan,
    }
    if std is not None:
        std = np.maximum(std, np.finfo(float).tiny)
        scores["crps"] = float(normal_crps(y, predicted, std).mean())
        scores["coverage"] = float(np.mean(np.abs(y - predicted) <= NINE_IN_TEN * std))
    return scores


def normal_crps(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of normal distributions (Gneiting & Raftery 2007)."""
    z = (y - mean) / std
    return std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


class _MetaLearner:
    """A clone of the estimator, fitted on the training tasks."""

    def __init__(self, estimator: Any, data: SplitData) -> None:
        self.data = data
        model = clone(estimator)
        maml = maml_inside(model)
        assert maml is not None
        # tasks are given as groups, which cannot name one without rows
        maml.set_params(task_column=None)
        if getattr(maml, "n_ways", None) is None:
            maml.set_params(unseen_tasks="prior")
        # losses of counts, say, are not of standardised targets, and a search may be over losses
        own = not data.n_classes and (
            maml.normalize_y or not resolve_loss(maml.loss, {}).standardises
        )
        self.y = data.own if own else data.y
        groups = {} if data.pooled else {"groups": data.tasks.codes[data.train]}
        with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", SmallTaskWarning)  # of the held-out ones there is one
            self.model = model.fit(data.rows(data.train), self.y[data.train], **groups)

    def predict(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], steps: int | None
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Predict the query rows of all held-out tasks at once; with a std, if there is one."""
        data = self.data
        y = np.concatenate([part for part, _ in data.local(pairs, self.y)])
        (support, of_support), (query, of_query) = (
            (np.concatenate(parts), np.repeat(np.arange(len(pairs)), list(map(len, parts))))
            for parts in zip(*pairs, strict=True)
        )
        std: np.ndarray | None = None
        with sklearn.config_context(enable_metadata_routing=True):
            walk = Walk(groups=of_support).with_rates(adapt_steps=steps)
            adapted = walk(self.model, data.rows(support), y)
            given = {"X": data.rows(query), "groups": of_query}
            if data.n_classes:
                p = adapted.predict_proba(**given)
                # a column for each class, where no episode has all of them
                values = np.pad(p, ((0, 0), (0, data.n_classes - p.shape[1])))
            elif _knows_std(adapted):
                values, std = adapted.predict(**given, return_std=True)
            else:
                values = adapted.predict(**given)
        values = np.asarray(values, dtype=np.float64)
        if self.y is not data.y:
            values = (values - data.center) / data.scale
            std = None if std is None else std / data.scale
        cuts = np.cumsum([len(q) for _, q in pairs])[:-1]
        stds = [None] * len(pairs) if std is None else np.split(std.astype(np.float64), cuts)
        return list(zip(np.split(values, cuts), stds, strict=True))


def _knows_std(adapted: Any) -> bool:
    """Whether a Gaussian head has a share of what a fitted MAML estimator predicts."""
    maml = maml_inside(adapted)
    return maml is not None and maml.learner_weights_.get(GAUSSIAN_HEAD, 0) > 0
