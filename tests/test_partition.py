"""Searches and adaptation in partitions give the serial results over joblib's backends."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLClassifier, MAMLRegressor, adapt, adapt_predict
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.estimators.base import BaseMAML

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def regressor():
    X, y, task = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
    reg = MAMLRegressor(
        hidden_layer_sizes=(16,), update_rule="sgd", steps=3, max_iter=20, random_state=0
    )
    return reg.fit(X, y, groups=task)


@pytest.fixture(scope="module")
def new():
    """Ragged tasks in a random order of rows, with names that do not sort as they appear."""
    X, y, task = make_sinusoid_tasks(n_tasks=50, n_rows=20, random_state=1)
    rng = np.random.default_rng(0)
    kept = rng.permutation(np.flatnonzero(rng.random(len(X)) < 0.7))
    X, y, names = X[kept], y[kept], np.array([f"shop {j}" for j in task[kept]], dtype=object)
    support = rng.random(len(X)) < 0.5
    return {
        "X_support": X[support],
        "y_support": y[support],
        "X_query": X[~support],
        "groups_support": names[support],
        "groups_query": names[~support],
    }


def as_one_batch(model, new):
    adapted = adapt(model, new["X_support"], new["y_support"], groups=new["groups_support"])
    return adapted.predict(new["X_query"], groups=new["groups_query"])


# --- adapt_predict


@pytest.mark.parametrize("tasks_per_partition", [1, 7, 50, 1000])
def test_partitions_give_what_one_batch_gives(regressor, new, tasks_per_partition):
    predicted = adapt_predict(regressor, **new, tasks_per_partition=tasks_per_partition)
    np.testing.assert_allclose(predicted, as_one_batch(regressor, new), rtol=1e-9)


@pytest.fixture(params=["loky", "threading", "dask"])
def two_workers(request):
    """Make a context in which joblib works with two workers."""
    # made when it is entered: parallel_config acts as soon as it exists
    if request.param != "dask":
        yield lambda: joblib.parallel_config(request.param, n_jobs=2)
        return
    distributed = pytest.importorskip("distributed")
    with distributed.Client(n_workers=2, processes=False, dashboard_address=None):
        yield lambda: joblib.parallel_config("dask")


def test_predictions_do_not_depend_on_the_backend_to_the_bit(regressor, new, two_workers):
    serial = adapt_predict(regressor, **new, tasks_per_partition=9)
    with two_workers():
        np.testing.assert_array_equal(
            adapt_predict(regressor, **new, tasks_per_partition=9), serial
        )


@pytest.mark.parametrize("library", ["pandas", "polars", "index level", "array"])
def test_the_task_column_tells_the_tasks(new, library):
    X, y, task = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
    column = 1 if library == "array" else "shop"

    def frame(rows, ids):
        if library == "array":
            return np.c_[rows, [float(name[5:]) if isinstance(name, str) else name for name in ids]]
        if library == "polars":
            return pl.DataFrame({"x": rows[:, 0], "shop": list(ids)})
        made = pd.DataFrame({"x": rows[:, 0], "shop": list(ids)})
        return made.set_index("shop") if library == "index level" else made

    reg = MAMLRegressor(max_iter=5, update_rule="sgd", steps=2, task_column=column, random_state=0)
    reg.fit(frame(X, task.astype(float) if library == "array" else map(str, task)), y)
    given = (
        frame(new["X_support"], new["groups_support"]),
        new["y_support"],
        frame(new["X_query"], new["groups_query"]),
    )
    expected = adapt(reg, *given[:2]).predict(given[2])
    np.testing.assert_allclose(adapt_predict(reg, *given, tasks_per_partition=9), expected)


def test_a_pipeline_transforms_the_rows_first(new):
    X, y, task = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), MAMLRegressor(max_iter=5, random_state=0))
        pipe.fit(X, y, groups=task)
        expected = as_one_batch(pipe, new)
    predicted = adapt_predict(pipe, **new, tasks_per_partition=9, n_jobs=2)
    np.testing.assert_allclose(predicted, expected, rtol=1e-9)


def test_labels_of_each_partition_are_predicted(new):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 3)), np.repeat([f"class {j}" for j in range(20)], 20)
    clf = MAMLClassifier(n_ways=2, n_shots=3, max_iter=3, random_state=0).fit(X, y)
    X_new = rng.normal(size=(80, 3))
    labels = np.tile(np.repeat(["no", "certainly"], 4), 10)
    groups = np.repeat(np.arange(10), 8)
    labels[groups > 4] = np.tile(np.repeat(["0", "1"], 4), 5)
    predicted = adapt_predict(
        clf, X_new, labels, X_new, groups_support=groups, groups_query=groups, tasks_per_partition=5
    )
    expected = adapt(clf, X_new, labels, groups=groups).predict(X_new, groups=groups)
    np.testing.assert_array_equal(predicted, expected)


def test_the_estimator_is_not_changed(regressor, new):
    adapted = adapt(regressor, new["X_support"][:5], new["y_support"][:5])
    before = adapted.predict(new["X_query"])
    adapt_predict(adapted, **new)
    np.testing.assert_array_equal(adapted.predict(new["X_query"]), before)


def test_one_partition_at_a_time_is_held(regressor, new, monkeypatch):
    states, held = [], []
    adapt_tasks = BaseMAML._adapted_state

    def watched(self, tasks, *arguments):
        held.append((tasks.n_tasks, sum(state() is not None for state in states)))
        state = adapt_tasks(self, tasks, *arguments)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(BaseMAML, "_adapted_state", watched)
    adapt_predict(regressor, **new, tasks_per_partition=20)
    assert held == [(20, 0), (20, 0), (10, 0)]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"groups_support": None, "groups_query": None}, ValueError, "groups_support is required"),
        ({"groups_query": None}, ValueError, "groups_query is required"),
        ({"y_support": np.zeros(3)}, ValueError, "inconsistent numbers of samples"),
        ({"tasks_per_partition": 0}, ValueError, "tasks_per_partition == 0, must be >= 1"),
        ({"estimator": StandardScaler()}, TypeError, "no meta-learned model"),
    ],
)
def test_bad_input_is_refused(regressor, new, changed, error, message):
    with pytest.raises(error, match=message):
        adapt_predict(**{"estimator": regressor, **new, **changed})


def test_query_rows_of_tasks_without_support_are_refused(regressor, new):
    strange = np.where(new["groups_query"] == "shop 3", "shop 99", new["groups_query"])
    with pytest.raises(ValueError, match=r"1 task\(s\) without support rows.*shop 99"):
        adapt_predict(regressor, **{**new, "groups_query": strange})


# --- searches


def test_a_search_gives_the_serial_results_to_the_bit(two_workers):
    X, y, task = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
    search = GridSearchCV(
        MAMLRegressor(update_rule="sgd", max_iter=10, task_column=1, random_state=0),
        {"alpha": [0.01, 0.1], "steps": [1, 3]},
        cv=GroupKFold(2),
    )
    serial = search.fit(np.c_[X, task], y, groups=task).cv_results_["mean_test_score"]
    with two_workers():
        parallel = search.fit(np.c_[X, task], y, groups=task).cv_results_["mean_test_score"]
    np.testing.assert_array_equal(parallel, serial)
    assert len(np.unique(serial)) == len(serial)


# --- the examples


def load_example(name):
    path = ROOT / "examples" / f"{name}.py"
    if not path.exists():
        pytest.skip("examples are not installed")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # its workers are processes that import everything
def test_the_dask_example_gives_the_serial_results(capsys):
    pytest.importorskip("distributed")
    load_example("dask_search").main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "equal" in line] == [
        "search: scores equal to the serial ones: True",
        "adaptation: predictions equal to the serial ones: True",
    ]


def test_the_frame_example_adapts_and_predicts_better_than_the_mean(capsys):
    load_example("million_rows").measure(400, 20, at_once=False, jobs=None)
    tasks, rows, *_, error = capsys.readouterr().out.split()
    assert (tasks, rows) == ("400", "8000")
    assert float(error) < 0.8  # the targets' own standard deviation is 0.86


def test_no_query_rows_get_no_predictions(regressor, new):
    for return_std in (False, True):
        answer = adapt_predict(
            regressor,
            **{**new, "X_query": new["X_query"][:0], "groups_query": new["groups_query"][:0]},
            return_std=return_std,
        )
        for values in answer if return_std else (answer,):
            assert values.shape == (0,)


def test_partitions_give_standard_deviations_too():
    X, y, task = make_sinusoid_tasks(n_tasks=8, n_rows=8, random_state=0)
    reg = MAMLRegressor(
        update_rule="gaussian-head", hidden_layer_sizes=(4,), max_iter=2, random_state=0
    ).fit(X, y, groups=task)
    found = adapt_predict(
        reg, X, y, X, groups_support=task, groups_query=task, return_std=True, tasks_per_partition=3
    )
    expected = adapt(reg, X, y, groups=task).predict(X, groups=task, return_std=True)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    clf = MAMLClassifier(hidden_layer_sizes=(4,), max_iter=2).fit(X, (y > 0) * 1, groups=task)
    with pytest.raises(TypeError, match="classes have no standard deviation"):
        adapt_predict(
            clf, X, (y > 0) * 1, X, groups_support=task, groups_query=task, return_std=True
        )
