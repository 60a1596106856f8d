"""What type checkers make of a user's script; `make lint` and `make test-integration` check it."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

import sklearn_maml
from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    adapt_predict,
    compare_baselines,
    task_scorer,
    task_scores,
)
from sklearn_maml.datasets import SinusoidTasks, load_vowels, make_sinusoid_tasks

Array = NDArray[Any]


def regression(path: Path) -> None:
    X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    reg = assert_type(MAMLRegressor(max_iter=5).fit(X, y, groups=task), MAMLRegressor)
    assert_type(reg.adapt(X[:5], y[:5]), MAMLRegressor)
    assert_type(reg.predict(X), Array)
    assert_type(reg.predict(X, groups=task), Array)
    mean, std = reg.predict(X, return_std=True)
    assert_type(mean, Array)
    assert_type(std, Array)
    assert_type(reg.predict(X, return_quantiles=(0.05, 0.95)), tuple[Array, ...])
    assert_type(reg.score(X, y, groups=task), float)
    assert_type(reg.module_, nn.Module)
    assert_type(reg.adapted_module(), nn.Module)
    assert_type(reg.n_iter_, int)
    assert_type(reg.y_scale_, Array)
    assert_type(reg.learner_weights_, dict[str, float])
    assert_type(adapt(reg, X[:5], y[:5]), MAMLRegressor)
    few = assert_type(FewShotRegressor(reg).fit(X[:5], y[:5]), FewShotRegressor)
    assert_type(few.predict(X), Array)
    assert_type(adapt_predict(reg, X, y, X, groups_support=task, groups_query=task), Array)
    assert_type(task_scorer("r2")(reg, X, y, groups=task), float)
    task_scores(reg, X, y, groups=task)["after"]
    reg.save(path)
    sklearn_maml.save(str(path), reg)
    assert_type(MAMLRegressor.load(path), MAMLRegressor)
    table = compare_baselines(X=X, y=y, groups=task, estimator=reg)
    table.to_csv(path)


def spellings() -> None:
    MAMLRegressor().fit([(np.zeros((4, 2)), np.zeros(4)), (np.ones((5, 2)), np.ones(5))])
    MAMLRegressor().fit([[0.0], [1.0]], [0, 1], groups=["a", "b"])
    MAMLRegressor().fit(SinusoidTasks())
    frame = pd.DataFrame({"x": [1.0, 2.0], "shop": ["a", "b"]})
    MAMLRegressor(task_column="shop").fit(frame, frame["x"]).predict(frame)
    MAMLRegressor().fit(np.zeros((3, 4, 2)), np.zeros((3, 4)))


def classification() -> None:
    X, y, task = load_vowels(return_X_y_groups=True)
    clf = MAMLClassifier(max_iter=5).fit(X, y, groups=task).adapt(X[:20], y[:20])
    assert_type(clf, MAMLClassifier)
    assert_type(clf.predict_proba(X), Array)
    assert_type(clf.classes_, Array)
    assert_type(FewShotClassifier(clf).fit(X[:20], y[:20]).predict_proba(X), Array)
    assert_type(load_vowels().data.shape, Any)
