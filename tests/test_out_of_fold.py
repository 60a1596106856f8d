"""Out-of-fold predictions: each row by a model of other tasks, adapted to other rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklearn_maml import MAMLClassifier, MAMLRegressor, task_cross_val_predict

TASK = np.random.default_rng(1).permutation(np.repeat(list("abcdef"), 10))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(len(TASK), 2))
SLOPE = dict(zip("abcdef", RNG.normal(size=(6, 2)) * 3, strict=True))
Y = (X * [SLOPE[task] for task in TASK]).sum(1)
SMALL = {"hidden_layer_sizes": (4,), "max_iter": 5, "random_state": 0, "early_stopping": False}


def test_every_row_is_predicted_by_other_tasks_and_other_rows():
    reg = MAMLRegressor(**{**SMALL, "hidden_layer_sizes": (8,), "max_iter": 60})
    predicted = task_cross_val_predict(reg, X, Y, TASK, cv=3, random_state=0)
    assert predicted.shape == Y.shape
    assert np.isfinite(predicted).all()
    # neither the own target nor that of another task of the fold tells
    changed = Y.copy()
    changed[7] += 100
    again = task_cross_val_predict(reg, X, changed, TASK, cv=LeaveOneGroupOut(), random_state=0)
    before = task_cross_val_predict(reg, X, Y, TASK, cv=LeaveOneGroupOut(), random_state=0)
    assert again[7] == before[7]
    own = (TASK[7] == TASK) & (np.arange(len(TASK)) != 7)
    assert (again[own] != before[own]).any()
    # adapting pays
    assert np.corrcoef(predicted, Y)[0, 1] > 0.9
    few = task_cross_val_predict(reg, X, Y, TASK, cv=3, n_shots=1, random_state=0)
    assert np.mean((few - Y) ** 2) > np.mean((predicted - Y) ** 2)


def test_columns_pipelines_and_several_targets_work_alike():
    reg = MAMLRegressor(**SMALL)
    expected = task_cross_val_predict(reg, X, Y, TASK, cv=2, random_state=0)
    frame = pd.DataFrame(X, columns=["x", "z"]).assign(task=TASK)
    column = MAMLRegressor(**SMALL, task_column="task")
    assert_array_equal(task_cross_val_predict(column, frame, Y, cv=2, random_state=0), expected)
    pipe = make_pipeline(FunctionTransformer(), reg)
    assert_array_equal(task_cross_val_predict(pipe, X, Y, TASK, cv=2, random_state=0), expected)
    scaled = make_pipeline(StandardScaler(), reg)
    both = task_cross_val_predict(scaled, X, np.c_[Y, -Y], TASK, cv=2, random_state=0)
    assert both.shape == (len(Y), 2)


def test_classes_and_their_probabilities():
    labels = np.where(Y > 0, "yes", "no")
    clf = MAMLClassifier(**SMALL)
    predicted = task_cross_val_predict(clf, X, labels, TASK, cv=2, n_shots=2, random_state=0)
    assert set(predicted) <= {"yes", "no"}
    p = task_cross_val_predict(
        clf, X, labels, TASK, cv=2, n_shots=2, method="predict_proba", random_state=0
    )
    assert_allclose(p.sum(1), 1, rtol=1e-6)
    assert_array_equal(np.array(["no", "yes"])[p.argmax(1)], predicted)


def test_what_cannot_be_predicted_is_refused():
    reg = MAMLRegressor(**SMALL)
    with pytest.raises(ValueError, match="got no task information"):
        task_cross_val_predict(reg, X, Y)
    with pytest.raises(TypeError, match="got Ridge"):
        task_cross_val_predict(Ridge(), X, Y, TASK)
    with pytest.raises(ValueError, match="'predict_proba' is not known for a MAMLRegressor"):
        task_cross_val_predict(reg, X, Y, TASK, method="predict_proba")
    halves = [(np.arange(30), np.arange(30, 60))]
    with pytest.raises(ValueError, match="tears tasks apart"):
        task_cross_val_predict(reg, X, Y, TASK, cv=halves)
