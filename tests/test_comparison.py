"""`compare_baselines`: its table, its baselines, and that every method sees the same rows."""

from __future__ import annotations

import dataclasses
import re
import sys
import types

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor, compare_baselines
from sklearn_maml.datasets import SinusoidTasks
from sklearn_maml.evaluation import summarize_comparison
from sklearn_maml.evaluation.baselines import registry
from sklearn_maml.evaluation.baselines.base import Episode, TrainingTasks
from sklearn_maml.evaluation.baselines.fine_tuned import FineTunedMLP
from sklearn_maml.evaluation.baselines.hierarchical import (
    HierarchicalLogistic,
    MixedModel,
    SplineMixedModel,
    _logistic_coefs,
)
from sklearn_maml.evaluation.baselines.pooled import (
    Pooled,
    ResidualProcess,
    ShrunkIntercept,
    TargetEncoded,
)
from sklearn_maml.evaluation.baselines.registry import CLASSIFICATION, REGRESSION
from sklearn_maml.evaluation.methods import normal_crps
from sklearn_maml.exceptions import SmallTaskWarning

SMALL = {
    "hidden_layer_sizes": 8,
    "update_rule": "sgd",
    "steps": 2,
    "max_iter": 20,
    "random_state": 0,
}
REG = MAMLRegressor(**SMALL)
CLF = MAMLClassifier(n_shots=1, **SMALL)
SECONDS = ["fit_seconds", "predict_seconds"]
# that are not installed here
OPTIONAL = {"GPBoost", "per-task TabPFN"}


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(FineTunedMLP, "MAX_UPDATES", 300)


def random_slopes(n_tasks=40, n_rows=30, n_features=2, noise=0.1, seed=0):
    """Linear tasks whose coefficients are drawn around those of the population."""
    rng = np.random.RandomState(seed)
    X = rng.normal(size=(n_tasks, n_rows, n_features))
    coefs = np.array([1.0, -2.0][:n_features]) + rng.normal(size=(n_tasks, n_features)) * 0.5
    level = 3 * rng.normal(size=(n_tasks, 1))
    y = np.einsum("tnd,td->tn", X, coefs) + level + noise * rng.normal(size=(n_tasks, n_rows))
    return X.reshape(-1, n_features), y.ravel(), np.repeat(np.arange(n_tasks), n_rows)


def shared_classes(n_tasks=20, n_rows=24, seed=0):
    """Three classes, of means that every task shifts in its own way."""
    rng = np.random.RandomState(seed)
    label = np.tile(np.arange(3), (n_tasks, n_rows // 3))
    shift = rng.normal(size=(n_tasks, 1, 2))
    X = 3 * np.eye(3)[label][..., :2] + shift + 0.5 * rng.normal(size=(*label.shape, 2))
    names = np.array(["a", "b", "c"])
    return X.reshape(-1, 2), names[label.ravel()], np.repeat(np.arange(n_tasks), n_rows)


def training(X, y, task, *, n_shots=(5,), n_classes=0):
    return TrainingTasks(X, y, task, n_shots, n_classes, seed=0)


def episodes(X, y, task, k=5):
    parts = [np.flatnonzero(task == t) for t in np.unique(task)]
    return [Episode(X[rows[:k]], y[rows[:k]], X[rows[k:]], y[rows[k:]]) for rows in parts]


def error(method, of):
    k = len(of[0].X_support)
    predicted = method.predict(of, k)
    means = [p[0] if isinstance(p, tuple) else p for p in predicted]
    return np.mean([np.sqrt(np.mean((p - e.y_query) ** 2)) for p, e in zip(means, of, strict=True)])


# --- the table


def test_table_has_every_method_at_every_number_of_shots():
    X, y, task = random_slopes(12, 15)
    table = compare_baselines(REG, X, y, task, n_shots=(3, 5), random_state=0)
    assert table.index.names == ["n_shots", "method"]
    expected = {"MAMLRegressor", "MAMLRegressor, before adaptation", *REGRESSION} - OPTIONAL
    for k in (3, 5):
        assert set(table.loc[k].index) == expected
        assert table.loc[k, "rmse"].is_monotonic_increasing
        assert table.loc[k, "best"].iloc[0] == "best"
        assert (table.loc[k, "best"] == "best").sum() == 1
    some = ["best", "estimator_wins", "crps", "coverage"]
    assert np.isfinite(table.drop(columns=some).to_numpy(float)).all()
    with_std = set(table.loc[5].index[table.loc[5, "crps"].notna()])
    assert with_std == {
        "pooled ridge + shrunk intercept",
        "pooled HGB + shrunk intercept",
        "per-task GP",
        "mixed model, intercept + slopes",
        "mixed model, splines",
        "pooled HGB + GP on residuals",
    }


def test_standard_errors_are_over_tasks_of_scores_averaged_over_repeats():
    # task a was held out twice
    scores = pd.DataFrame(
        [
            (0, 5, "a", "ours", 1.0, 2.0),
            (0, 5, "b", "ours", 2.0, 2.0),
            (1, 5, "a", "ours", 3.0, 4.0),
            (1, 5, "c", "ours", 3.0, 4.0),
            (0, 5, "a", "other", 2.0, 0.1),
            (0, 5, "b", "other", 1.0, 0.1),
            (1, 5, "a", "other", 4.0, 0.3),
            (1, 5, "c", "other", 5.0, 0.3),
        ],
        columns=["repeat", "n_shots", "task", "method", "rmse", "fit_seconds"],
    )
    table = summarize_comparison(scores, "ours").loc[5]
    # of tasks a, b, c: ours 2, 2, 3; the other 3, 1, 5; differences 1, -1, 2
    assert table.loc["ours", "rmse"] == pytest.approx(7 / 3)
    assert table.loc["ours", "std_error"] == pytest.approx(np.std([2, 2, 3], ddof=1) / np.sqrt(3))
    assert table.loc["other", "difference"] == pytest.approx(2 / 3)
    assert table.loc["other", "difference_se"] == pytest.approx(
        np.std([1, -1, 2], ddof=1) / np.sqrt(3)
    )
    assert table.loc["other", "estimator_wins"] == pytest.approx(2 / 3)
    assert table.loc["other", "fit_seconds"] == pytest.approx(0.2)
    # 0.67 is less than twice its standard error, 0.88
    assert list(table["best"]) == ["best", "tied"]


def test_method_that_fails_on_a_task_is_not_scored_by_the_others():
    scores = pd.DataFrame(
        {
            "repeat": 0,
            "n_shots": 1,
            "task": ["a", "b", "c"] * 2,
            "method": ["ours"] * 3 + ["other"] * 3,
            "rmse": [1.0, 2.0, 6.0, 0.5, 1.0, np.nan],
            "fit_seconds": 1.0,
        }
    )
    table = summarize_comparison(scores, "ours").loc[1]
    assert list(table.index) == ["ours", "other"]
    assert list(table["best"]) == ["best", ""]
    assert table.loc["other", ["rmse", "difference", "estimator_wins"]].isna().all()


def test_higher_accuracy_is_better():
    scores = pd.DataFrame(
        {
            "repeat": 0,
            "n_shots": 1,
            "task": ["a", "b"] * 2,
            "method": ["ours"] * 2 + ["other"] * 2,
            "accuracy": [0.9, 0.8, 0.5, 0.8],
            "log_loss": [0.1, 0.2, 1.0, 3.0],
            "fit_seconds": 1.0,
        }
    )
    table = summarize_comparison(scores, "ours").loc[1]
    assert list(table.index) == ["ours", "other"]
    assert table.loc["other", "estimator_wins"] == 0.75  # a tie is half a win
    assert table.loc["other", "log_loss"] == 2.0
    assert table.loc["ours", "best"] == "best"


def test_summary_of_a_method_without_scores_is_refused():
    scores = pd.DataFrame({"method": ["ours"], "n_shots": 5, "task": 0, "rmse": 1.0})
    with pytest.raises(ValueError, match=r"no scores of 'our'.*Did you mean 'ours'"):
        summarize_comparison(scores, "our")


def test_per_task_scores_are_those_of_the_table():
    X, y, task = random_slopes(10, 12)
    options = {"n_shots": 4, "baselines": ["pooled ridge"], "random_state": 3}
    scores = compare_baselines(REG, X, y, task, per_task=True, **options)
    table = compare_baselines(REG, X, y, task, **options)
    means = scores.groupby("method")["rmse"].mean()
    pd.testing.assert_series_equal(table.loc[4, "rmse"].sort_index(), means, check_index_type=False)
    assert scores["task"].nunique() == 3
    assert set(scores["task"]) <= set(task)


# --- what is compared


class Recorder(RegressorMixin, BaseEstimator):
    """Keeps what it is given, in a list that clones share."""

    seen: list = []  # noqa: RUF012

    def fit(self, X, y):
        self.seen.append(("fit", np.array(X), np.array(y)))
        return self

    def predict(self, X):
        self.seen.append(("predict", np.array(X), None))
        return np.zeros(len(X))


def test_rows_are_standardised_with_the_training_tasks_and_capped():
    X, y, task = random_slopes(10, 30)
    X, y = 100 * X + 7, 50 * y - 3
    Recorder.seen.clear()
    baselines = {"pooled": ("pooled", Recorder()), "alone": Recorder()}
    scores = compare_baselines(
        REG, X, y, task, n_shots=6, max_queries=9, baselines=baselines, per_task=True,
        random_state=0,
    )  # fmt: skip
    fits = [part for part in Recorder.seen if part[0] == "fit"]
    predicted = [part[1] for part in Recorder.seen if part[0] == "predict"]
    whole = max(fits, key=lambda part: len(part[1]))
    assert len(whole[1]) == 7 * 30
    np.testing.assert_allclose(whole[1].mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(whole[1].std(0), 1)
    np.testing.assert_allclose([whole[2].mean(), whole[2].std()], [0, 1], atol=1e-10)
    alone = [part for part in fits if len(part[1]) == 6]
    assert len(alone) == 3
    assert [len(rows) for rows in predicted] == [9] * 6
    # the same query rows for both
    for one, other in zip(predicted[:3], predicted[3:], strict=True):
        np.testing.assert_array_equal(one, other)
    # predictions of 0 in units of the spread of the training targets
    zero = scores[scores["method"] == "alone"]["rmse"]
    np.testing.assert_allclose(zero, scores[scores["method"] == "pooled"]["rmse"])


def test_given_splits_are_followed():
    X, y, task = random_slopes(8, 12)
    train = np.flatnonzero(task < 6)
    pairs = [(np.flatnonzero(task == t)[:4], np.flatnonzero(task == t)[4:]) for t in (6, 7)]
    scores = compare_baselines(
        REG, X, y, task, splits=[(train, {4: pairs})], per_task=True,
        baselines={"mean": ("pooled", DummyRegressor())},
    )  # fmt: skip
    assert scores["n_shots"].unique().tolist() == [4]
    spread = y[train].std()
    by_hand = [np.sqrt(np.mean((y[q] - y[train].mean()) ** 2)) / spread for _, q in pairs]
    mean = scores[scores["method"] == "mean"].set_index("task")["rmse"]
    np.testing.assert_allclose(mean.loc[[6, 7]], by_hand)


def test_disjoint_rows_keep_inputs_of_held_out_tasks_from_training():
    rng = np.random.RandomState(0)
    grid = rng.normal(size=(20, 2))
    X, task = np.tile(grid, (10, 1)), np.repeat(np.arange(10), 20)
    y = rng.normal(size=len(X))

    def inputs(disjoint):
        Recorder.seen.clear()
        baselines = {"pooled": ("pooled", Recorder())}
        compare_baselines(
            REG, X, y, task, n_shots=3, disjoint_rows=disjoint, baselines=baselines, random_state=0
        )
        train, *queries = (np.unique(part[1].round(9), axis=0) for part in Recorder.seen)
        return train, np.unique(np.concatenate(queries), axis=0)

    for disjoint, n_train in ((False, 20), (True, 10)):
        train, queries = inputs(disjoint)
        assert len(train) == n_train
        n_both = len(np.unique(np.concatenate([train, queries]), axis=0))
        assert n_both == (len(train) + len(queries) if disjoint else 20)


def test_estimator_is_cloned_and_left_untouched():
    X, y, task = random_slopes(8, 12)
    before = REG.get_params()
    first = compare_baselines(REG, X, y, task, n_shots=3, baselines=[], random_state=0)
    assert not hasattr(REG, "module_")
    assert REG.get_params() == before
    second = compare_baselines(REG, X, y, task, n_shots=3, baselines=[], random_state=0)
    pd.testing.assert_frame_equal(first.drop(columns=SECONDS), second.drop(columns=SECONDS))
    other = compare_baselines(REG, X, y, task, n_shots=3, baselines=[], random_state=1)
    assert not np.allclose(first["rmse"], other["rmse"])


def test_row_before_adaptation_is_the_estimator_that_takes_no_steps():
    X, y, task = random_slopes(8, 12)
    options = {"n_shots": 3, "baselines": [], "random_state": 0}
    # validation follows adapt_steps, and chooses which parameters are kept: switch it off
    options["estimator"] = MAMLRegressor(**SMALL, early_stopping=False)
    full = compare_baselines(X=X, y=y, groups=task, **options)
    options["estimator"] = MAMLRegressor(**SMALL, early_stopping=False, adapt_steps=0)
    still = compare_baselines(X=X, y=y, groups=task, **options)
    row = full.loc[(3, "MAMLRegressor, before adaptation"), "rmse"]
    assert still.loc[(3, "MAMLRegressor"), "rmse"] == row
    assert full.loc[(3, "MAMLRegressor"), "rmse"] != row


def test_scores_do_not_depend_on_n_jobs():
    X, y, task = random_slopes(8, 12)
    options = {
        "n_shots": 3,
        "baselines": ["pooled ridge", "mixed model, intercept + slopes"],
        "random_state": 0,
    }
    one = compare_baselines(REG, X, y, task, **options)
    with joblib.parallel_config("threading"):
        two = compare_baselines(REG, X, y, task, n_jobs=2, **options)
    pd.testing.assert_frame_equal(one.drop(columns=SECONDS), two.drop(columns=SECONDS))


@pytest.mark.parametrize("spelling", ["column", "list", "given", "stack", "distribution"])
def test_spellings_of_tasks(spelling):
    X, y, task = random_slopes(8, 12)
    names = np.unique(task)
    estimator, args = REG, None
    if spelling == "column":
        frame = pd.DataFrame(X, columns=["u", "v"]).assign(shop=task)
        estimator, args = MAMLRegressor(**SMALL, task_column="shop"), (frame, y, None)
    elif spelling == "list":
        args = ([(X[task == t], y[task == t]) for t in names], None, None)
    elif spelling == "given":
        parts = [(X[task == t], y[task == t]) for t in names]
        args = ([(a[:5], b[:5], a[5:], b[5:]) for a, b in parts], None, None)
    elif spelling == "stack":
        args = (X.reshape(8, 12, 2), y.reshape(8, 12), None)
    options = {"n_shots": 3, "baselines": ["pooled ridge"], "random_state": 0}
    if spelling == "distribution":
        table = compare_baselines(REG, SinusoidTasks(n_rows=10), **options)
        assert table.loc[(3, "MAMLRegressor"), "std_error"] > 0
        return
    table = compare_baselines(estimator, *args, **options)
    expected = compare_baselines(REG, X, y, task, **options)
    pd.testing.assert_frame_equal(table.drop(columns=SECONDS), expected.drop(columns=SECONDS))


def test_a_pipeline_gets_named_columns_and_its_tasks():
    X, y, task = random_slopes(8, 12)
    frame = pd.DataFrame(X, columns=["u", "v"])
    pipe = make_pipeline(StandardScaler(), REG)
    options = {"n_shots": 3, "baselines": [], "random_state": 0}
    table = compare_baselines(pipe, frame, y, task, **options)
    # features are standardised already, to rounding
    expected = compare_baselines(REG, X, y, task, **options)
    np.testing.assert_allclose(table["rmse"], expected["rmse"], rtol=1e-6)
    assert not hasattr(pipe, "n_features_in_")


def test_default_estimator_follows_the_targets(monkeypatch):
    monkeypatch.setattr("sklearn_maml.evaluation.comparison.MAMLRegressor", lambda: REG)
    monkeypatch.setattr("sklearn_maml.evaluation.comparison.MAMLClassifier", lambda: CLF)
    table = compare_baselines(None, *random_slopes(8, 12), n_shots=3, baselines=[])
    assert "MAMLRegressor" in table.loc[3].index
    table = compare_baselines(None, *shared_classes(8, 12), baselines=[])
    assert "MAMLClassifier" in table.loc[1].index


def test_baselines_of_ones_own():
    X, y, task = random_slopes(8, 12)
    prior = MAMLRegressor(**SMALL).fit(X, y, groups=task)
    baselines = {
        "least squares": LinearRegression(),
        "mean of all": ("pooled", DummyRegressor()),
        "one step": MAMLRegressor(**{**SMALL, "steps": 1}),
        "prior": FewShotRegressor(prior),
        "pooled ridge": None,
    }
    table = compare_baselines(REG, X, y, task, n_shots=6, baselines=baselines, random_state=0)
    assert set(table.loc[6].index) == {
        "MAMLRegressor",
        "MAMLRegressor, before adaptation",
        "one step, before adaptation",
        *baselines,
    }
    # the support set tells the coefficients
    assert table.loc[(6, "least squares"), "rmse"] < 0.2 * table.loc[(6, "mean of all"), "rmse"]


# --- what tasks may be like


HEAD = MAMLRegressor(hidden_layer_sizes=8, update_rule="gaussian-head", max_iter=60, random_state=0)
QUICK = [
    "pooled ridge + shrunk intercept",
    "per-task ridge",
    "per-task GP",
    "mixed model, intercept + slopes",
    "mixed model, splines",
    "target-encoded boosting",
    "pooled HGB + GP on residuals",
    "pretrained MLP + fine-tune",
]


def test_without_support_rows_methods_know_the_population():
    X, y, task = random_slopes(20, 15)
    table = compare_baselines(HEAD, X, y, task, n_shots=(0, 3), baselines=QUICK, random_state=0)
    none = table.loc[0]
    own, before = none.loc["MAMLRegressor"], none.loc["MAMLRegressor, before adaptation"]
    assert own["rmse"] == before["rmse"]
    assert (none["rmse"] > 0.3).all()
    assert table.loc[(3, "MAMLRegressor"), "rmse"] < 0.6 * own["rmse"]
    # of the targets alone, a task cannot be told from another: about the spread of all
    assert none.loc["per-task ridge", "rmse"] == pytest.approx(1, abs=0.3)
    assert none.loc["mixed model, intercept + slopes", "coverage"] > 0.8
    assert own["coverage"] > 0.8
    assert own["crps"] == pytest.approx(none.loc["mixed model, splines", "crps"], rel=0.2)


def test_k_0_is_in_the_table_by_default():
    table = compare_baselines(
        REG, *random_slopes(8, 12), baselines=["pooled ridge"], random_state=0, verbose=0
    )
    assert sorted(set(table.index.get_level_values(0))) == [0, 5, 10]


def test_several_targets_are_scored_together():
    X, y, task = random_slopes(12, 15)
    both = np.c_[y, 100 * y[::-1]]
    names = ["pooled ridge", "mixed model, intercept + slopes"]
    scores = compare_baselines(
        HEAD, X, both, task, n_shots=4, baselines=names, random_state=0, per_task=True
    )
    # a mean of squares over both targets, each in units of its own spread
    one, other = (
        compare_baselines(
            HEAD, X, target, task, n_shots=4, baselines=names, random_state=0, per_task=True
        )
        for target in both.T
    )
    for name in names:
        a, b, c = (part[part["method"] == name]["rmse"] for part in (scores, one, other))
        np.testing.assert_allclose(a, np.sqrt((b**2 + c**2) / 2), rtol=1e-6)
    assert scores.loc[scores["method"] == "MAMLRegressor", "crps"].notna().all()


def test_ragged_tasks_are_scored_where_they_have_query_rows():
    X, y, task = random_slopes(24, 12)
    sizes = np.tile([1, 2, 4, 12], 6)
    kept = np.concatenate([np.flatnonzero(task == t)[:n] for t, n in enumerate(sizes)])
    words = r"Of 8 held-out tasks.*: \d after 1, \d after 3"
    with pytest.warns(SmallTaskWarning, match=words) as w:
        scores = compare_baselines(
            HEAD, X[kept], y[kept], task[kept], n_shots=(0, 1, 3), baselines=QUICK, per_task=True,
            test_size=8, random_state=0,
        )  # fmt: skip
    assert len(w) == 1
    assert w[0].filename == __file__
    assert np.isfinite(scores["rmse"]).all()
    own = scores[scores["method"] == "MAMLRegressor"]
    held = own[own["n_shots"] == 0]["task"]
    for k in (0, 1, 3):
        expected = [t for t in held if sizes[t] > k]
        assert own[own["n_shots"] == k]["task"].tolist() == expected


def test_ragged_classes_and_none():
    X, y, task = shared_classes()
    rng = np.random.default_rng(0)
    kept = (rng.random(len(y)) < 0.4) | (task > 3)
    kept &= ~((task == 5) & (np.arange(len(y)) % 24 > 0))  # a single row
    names = [n for n in CLASSIFICATION if "Boosting" not in n and n not in OPTIONAL]
    with pytest.warns(SmallTaskWarning, match="1 after 1"):
        table = compare_baselines(
            CLF, X[kept], y[kept], task[kept], n_shots=(0, 1), baselines=names, random_state=1
        )
    assert np.isfinite(table[["accuracy", "log_loss", "brier"]].to_numpy()).all()
    frequencies = table.loc[(0, "per-task logistic")]
    assert frequencies["log_loss"] == pytest.approx(np.log(3), rel=0.05)
    assert frequencies["brier"] == pytest.approx(2 / 3, rel=0.05)
    intercepts = table.loc[(1, "GLMM, random intercepts")]
    assert intercepts["log_loss"] < table.loc[(1, "pooled logistic"), "log_loss"]


@pytest.mark.parametrize("pool", [True, False])
def test_local_labels_are_compared_with_models_of_single_episodes(pool):
    rng = np.random.default_rng(0)
    center = 3 * rng.normal(size=(40, 2))
    label = np.repeat(np.arange(40), 8)
    X = center[label] + 0.3 * rng.normal(size=(320, 2))
    clf = MAMLClassifier(**SMALL, n_ways=3, n_shots=1)
    groups = None if pool else label // 4
    scores = compare_baselines(clf, X, label, groups, per_task=True, random_state=0)
    assert set(scores["method"]) == {
        "MAMLClassifier",
        "MAMLClassifier, before adaptation",
        "per-task 1-NN",
        "per-task logistic",
    }
    assert scores["task"].nunique() == (100 if pool else 3)
    nearest = scores[scores["method"] == "per-task 1-NN"]
    assert nearest["accuracy"].mean() > 0.9
    assert (scores["log_loss"] > 0).all()
    for bad, message in (
        ({"n_shots": 0}, "local to it"),
        ({"baselines": {"a": ("pooled", DummyClassifier())}}, "nothing to pool"),
        ({"baselines": "pooled logistic"}, "no baseline"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_baselines(clf, X, label, groups, **bad)


def test_scores_of_a_normal_distribution():
    """Against an integral of the squared difference of the distribution functions."""
    grid = np.linspace(-30, 30, 60_001)
    for y, mean, std in ((0.0, 0.0, 1.0), (2.0, -1.0, 0.5), (-4.0, 3.0, 2.0)):
        squared = (norm.cdf(grid, mean, std) - (grid >= y)) ** 2
        expected = np.trapezoid(squared, grid)
        found = normal_crps(*(np.array([v]) for v in (y, mean, std)))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_progress_and_what_is_not_installed_are_told(capsys):
    X, y, task = random_slopes(8, 12)
    options = {"n_shots": 3, "random_state": 0}
    compare_baselines(REG, X, y, task, baselines=["pooled ridge"], verbose=0, **options)
    assert capsys.readouterr().err == ""
    table = compare_baselines(CLF, *shared_classes(8, 12), n_shots=1, random_state=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Not installed, and left out: per-task TabPFN."
    assert re.fullmatch(r"1 of \d, \d+ s: MAMLClassifier", lines[1])
    assert (table["fit_seconds"] >= 0).all()
    assert (table["predict_seconds"] > 0).all()
    with pytest.raises(ImportError, match=r"'GPBoost' needs gpboost.*pip install gpboost"):
        compare_baselines(REG, X, y, task, baselines="GPBoost", **options)


def test_packages_that_are_installed_take_part(monkeypatch):
    """By stand-ins, which note what they are called with."""
    calls = []

    class Booster:
        def predict(self, data, group_data_pred, predict_var, pred_latent):
            calls.append(("predict", len(data), sorted(set(group_data_pred))))
            return {"response_mean": np.zeros(len(data)), "response_var": np.ones(len(data))}

    def train(params, train_set, gp_model, num_boost_round):
        calls.append(("train", len(train_set), sorted(set(gp_model))))
        return Booster()

    gpboost = types.SimpleNamespace(
        GPModel=lambda group_data, likelihood: group_data, Dataset=lambda X, y: X, train=train
    )
    tabpfn = types.SimpleNamespace(TabPFNRegressor=LinearRegression)
    for name, module in (("gpboost", gpboost), ("tabpfn", tabpfn)):
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(
            registry.NEEDS, {v: k for k, v in registry.NEEDS.items()}[name], "numpy"
        )
    X, y, task = random_slopes(8, 12)
    baselines = ["GPBoost", "per-task TabPFN", "per-task ridge"]
    table = compare_baselines(REG, X, y, task, n_shots=6, baselines=baselines, random_state=0)
    # 6 tasks are trained on; those of the support rows of the other 2 are new
    (_, n_train, trained), (_, n_query, asked) = calls
    assert n_train == 6 * 12 + 2 * 6
    assert n_query == 2 * 6
    assert len(trained) == 8
    assert set(asked) <= set(trained)
    # predictions of 0 with a standard deviation of 1
    assert table.loc[(6, "GPBoost"), "coverage"] > 0.5
    assert table.loc[(6, "per-task TabPFN"), "rmse"] < 0.5


# --- classification


def test_classification_table():
    X, y, task = shared_classes()
    table = compare_baselines(CLF, X, y, task, n_shots=(1, 2), random_state=0)
    expected = {"MAMLClassifier", "MAMLClassifier, before adaptation", *CLASSIFICATION} - OPTIONAL
    for k in (1, 2):
        assert set(table.loc[k].index) == expected
        assert table.loc[k, "accuracy"].is_monotonic_decreasing
        assert table.loc[k, "accuracy"].between(0, 1).all()
        # shifts are seen in support sets alone
        logistic = table.loc[(k, "hierarchical logistic")]
        assert logistic["accuracy"] > table.loc[(k, "pooled logistic"), "accuracy"]
        assert logistic["log_loss"] < table.loc[(k, "pooled logistic"), "log_loss"]


def test_scores_of_probabilities():
    X, y, task = shared_classes()
    baselines = {"always a": ("pooled", DummyClassifier(strategy="constant", constant=0))}
    table = compare_baselines(CLF, X, y, task, n_shots=1, baselines=baselines, random_state=0)
    always = table.loc[(1, "always a")]
    assert always["accuracy"] == pytest.approx(1 / 3)
    assert always["log_loss"] == pytest.approx(-2 / 3 * np.log(1e-7))


def test_tasks_may_lack_classes():
    X, y, task = shared_classes()
    kept = ~((task % 2 == 0) & (y == "c"))
    kept &= ~((task % 5 == 1) & (y != "a"))  # of one class alone
    names = [n for n in CLASSIFICATION if "Boosting" not in n and n not in OPTIONAL]
    table = compare_baselines(
        CLF, X[kept], y[kept], task[kept], n_shots=2, baselines=names, random_state=0
    )
    assert np.isfinite(table[["accuracy", "log_loss"]].to_numpy()).all()


# --- the baselines


def test_mixed_model_recovers_the_population():
    X, y, task = random_slopes(n_tasks=300, noise=0.2)
    model = MixedModel().fit(training(X, y, task))
    assert abs(model.mean_[0]) < 0.5
    np.testing.assert_allclose(model.mean_[1:], [1, -2], atol=0.1)
    cov = model.root_ @ model.root_.T
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), [3, 0.5, 0.5], rtol=0.15)
    assert np.sqrt(model.noise_) == pytest.approx(0.2, rel=0.05)
    # the coefficients expected are those that minimise the squares, where rows are many
    e = episodes(*random_slopes(1, 2000, noise=0.2, seed=1), k=1000)
    assert error(model, e) == pytest.approx(0.2, rel=0.1)


def test_mixed_model_is_best_on_random_slopes():
    names = [n for n in REGRESSION if "GP" not in n and n not in OPTIONAL and "splines" not in n]
    table = compare_baselines(REG, *random_slopes(60), n_shots=3, baselines=names, random_state=0)
    assert table.index[0] == (3, "mixed model, intercept + slopes")
    assert table.loc[(3, "pooled ridge + shrunk intercept"), "difference"] < 0


def test_mixed_model_takes_more_features_than_tasks_and_collinear_ones():
    X, y, task = random_slopes(n_tasks=6, n_rows=12, noise=0.1)
    rng = np.random.RandomState(0)
    wide = np.c_[X, X[:, :1], X.sum(1), np.zeros(len(X)), rng.normal(size=(len(X), 20))]
    model = MixedModel().fit(training(wide, y, task))
    of = episodes(wide, y, task)
    assert error(model, of) < 0.7 * np.std(y)


@pytest.mark.parametrize("n_features", [1, 9])
def test_splines_follow_what_is_not_linear(n_features):
    """Random splines of few features; of many, those of the population and random slopes."""
    rng = np.random.RandomState(0)
    X = rng.uniform(-2, 2, size=(40 * 20, n_features))
    task = np.repeat(np.arange(40), 20)
    y = 3 * np.sin(2 * X[:, 0]) + (1 + rng.normal(size=40) * 0.5)[task] * X[:, -1]
    y += 0.1 * rng.normal(size=len(y))
    train, of = training(X[:600], y[:600], task[:600]), episodes(X[600:], y[600:], task[600:])
    model = SplineMixedModel().fit(train)
    assert model.differ_ == (n_features == 1)
    assert error(model, of) < 0.6 * error(MixedModel().fit(train), of)
    std = np.concatenate([s for _, s in model.predict(of, 5)])
    assert (std > 0).all()


def test_deviations_of_baselines_hold_nine_in_ten():
    X, y, task = random_slopes(200, 20, noise=0.5)
    train, of = training(X, y, task), episodes(*random_slopes(100, 20, noise=0.5, seed=1), k=4)
    for model in (
        MixedModel(),
        ShrunkIntercept(LinearRegression(), "linear"),
        ResidualProcess(LinearRegression(), "linear"),
    ):
        for k in (0, 4):
            part = [Episode(e.X_support[:k], e.y_support[:k], e.X_query, e.y_query) for e in of]
            found = model.fit(train).predict(part, k)
            inside = [
                np.abs(e.y_query - mean) < 1.645 * std
                for e, (mean, std) in zip(part, found, strict=True)
            ]
            assert 0.8 < np.mean(inside) < 0.97, (type(model), k)


def test_boosting_learns_how_far_to_trust_the_mean_of_few_rows():
    rng = np.random.RandomState(0)
    task = np.repeat(np.arange(200), 10)
    level = rng.normal(size=200)[task]
    X = rng.normal(size=(2000, 1))
    y = 3 * level + X[:, 0] + 0.5 * rng.normal(size=2000)
    model = TargetEncoded(HistGradientBoostingRegressor(random_state=0))
    model.fit(training(X[:1500], y[:1500], task[:1500], n_shots=(0, 1, 5)))
    of = {k: episodes(X[1500:], y[1500:], task[1500:], k) for k in (0, 1, 5)}
    errors = [error(model, of[k]) for k in (0, 1, 5)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]


def test_boosting_learns_which_classes_a_task_has():
    rng = np.random.RandomState(0)
    task = np.repeat(np.arange(120), 10)
    own = np.array([rng.permutation(4)[:2] for _ in range(120)])  # two of four classes
    y = own[task, np.tile([0, 1], 600)]
    X = rng.normal(size=(1200, 1))
    single = np.r_[True, task[1:] != task[:-1]] & (task < 5)  # tasks of one row teach, too
    kept = (task >= 5) & (task < 90) | single
    model = TargetEncoded(HistGradientBoostingClassifier(random_state=0))
    model.fit(training(X[kept], y[kept], task[kept], n_shots=(0, 1), n_classes=4))
    new = task >= 90
    right = {}
    for k in (0, 1):
        of = episodes(X[new], y[new], task[new], 2 * k)  # the first two rows are of both classes
        found = model.predict(of, k)
        np.testing.assert_allclose(np.concatenate(found).sum(1), 1)
        right[k] = np.mean([p.argmax(1) == e.y_query for p, e in zip(found, of, strict=True)])
    assert right[0] < 0.35
    assert right[1] > 0.45


def test_per_task_ridge_wins_where_tasks_are_independent():
    rng = np.random.RandomState(0)
    X = rng.normal(size=(1200, 2))
    task = np.repeat(np.arange(40), 30)
    y = np.einsum("nd,nd->n", X, (rng.normal(size=(40, 2)) * 10)[task])
    names = ["per-task ridge", "pooled ridge", "pooled HGB + shrunk intercept"]
    table = compare_baselines(REG, X, y, task, n_shots=10, baselines=names, random_state=0)
    assert table.index[0] == (10, "per-task ridge")
    assert table.loc[(10, "per-task ridge"), "rmse"] < 0.1
    assert table.loc[(10, "pooled ridge"), "rmse"] > 0.7


def test_intercept_is_shrunk_by_the_variances():
    rng = np.random.RandomState(0)
    task = np.repeat(np.arange(400), 20)
    y = (2 * rng.normal(size=400))[task] + rng.normal(size=8000)
    model = ShrunkIntercept(DummyRegressor(), "dummy")
    model.fit(training(np.zeros((8000, 1)), y, task))
    assert model.ratio_ == pytest.approx(1 / 4, rel=0.2)
    X = np.zeros((3, 1))
    # three rows of residual 1: 3 / (3 + ratio) of it is the task's
    support = y.mean() + np.ones(3)
    expected = y.mean() + 3 / (3 + model.ratio_)
    np.testing.assert_allclose(model.predict_task(X, support, X)[0], expected)
    # without differences between tasks there is nothing to correct
    model = ShrunkIntercept(DummyRegressor(), "dummy")
    y = np.tile([-1.0, 1.0], 4000)
    model.fit(training(np.zeros((8000, 1)), y, task))
    np.testing.assert_array_equal(model.predict_task(X, np.ones(3), X)[0], [y.mean()] * 3)


def test_residuals_are_of_tasks_that_the_model_has_not_seen():
    # a model that learns tasks by heart: in-sample residuals are 0
    task = np.repeat(np.arange(20), 10)
    X = task[:, None] + np.random.RandomState(0).rand(200, 1) / 10
    y = np.random.RandomState(1).normal(size=20)[task]
    train = training(X, y, task)
    model = Pooled(KNeighborsRegressor(1), "nearest").fit(train)
    assert np.abs(y - model.model_.predict(X)).max() == 0
    assert model.residuals(train).std() > 0.5


def test_process_of_residuals_learns_the_length_and_the_noise():
    rng = np.random.RandomState(0)
    X = rng.uniform(-3, 3, size=(40 * 25, 2))
    task = np.repeat(np.arange(40), 25)
    y = np.empty(len(X))
    for t in range(40):
        rows = task == t
        distances = (X[rows, None, 0] - X[None, rows, 0]) ** 2  # the second feature is of no use
        y[rows] = rng.multivariate_normal(np.zeros(25), np.exp(-0.5 * distances / 0.8**2))
    y += 0.1 * rng.normal(size=len(y))
    model = ResidualProcess(DummyRegressor(), "dummy").fit(training(X, y, task))
    scale, constant, noise, used, unused = model.parameters_
    assert scale == pytest.approx(1, rel=0.3)
    assert used == pytest.approx(0.8, rel=0.15)
    assert unused > 10
    assert np.sqrt(noise) == pytest.approx(0.1, rel=0.2)
    assert constant < 0.1


def test_fine_tuning_chooses_no_steps_where_tasks_are_alike():
    rng = np.random.RandomState(0)
    X, task = rng.normal(size=(900, 2)), np.repeat(np.arange(30), 30)
    alike = X[:, 0] + rng.normal(size=900)
    model = FineTunedMLP().fit(training(X, alike, task))
    assert model.chosen_[5][0] * model.chosen_[5][1] <= 0.03
    X, different, task = random_slopes(30)
    model = FineTunedMLP().fit(training(X, different / different.std(), task))
    assert model.chosen_[5][1] >= 5


def test_fine_tuning_that_diverges_on_a_task_leaves_it_the_trained_network():
    X, y, task = random_slopes(30)
    model = FineTunedMLP().fit(training(X, y / y.std(), task))
    usual, far = episodes(X, y / y.std(), task)[:2]
    far = dataclasses.replace(far, X_support=1e4 * far.X_support)
    both = model.predict([usual, far], 5)
    np.testing.assert_allclose(both[0], model.predict([usual], 5)[0], rtol=1e-4)
    model.chosen_ = {5: (0.1, 0)}
    trained = model.predict([usual, far], 5)
    np.testing.assert_allclose(both[1], trained[1], rtol=1e-6)
    assert np.abs(both[0] - trained[0]).max() > 0.1


def test_hierarchical_logistic_of_a_large_penalty_is_the_pooled_one():
    X, y, task = shared_classes()
    labels = np.searchsorted(["a", "b", "c"], y)
    train = training(X, labels, task, n_shots=(1,), n_classes=3)
    model = HierarchicalLogistic()
    model.INVERSE_PENALTIES = (1.0,)
    model.fit(train)
    pooled = CLASSIFICATION["pooled logistic"]().fit(train)
    of = episodes(X, labels, task)[:3]
    model.strengths_ = {1: 1e8}
    for p, q in zip(model.predict(of, 1), pooled.predict(of, 1), strict=True):
        np.testing.assert_allclose(p, q, atol=1e-6)


def test_binary_coefficients_give_the_probabilities_of_the_model():
    X, y, _ = shared_classes()
    two = y != "c"
    model = LogisticRegression(max_iter=1000).fit(X[two], np.searchsorted(["a", "b"], y[two]))
    coefs = _logistic_coefs(model, 3).numpy()
    logits = (coefs[0] + X @ coefs[1:])[:, :2]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(p, model.predict_proba(X), atol=1e-9)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "no task information"),
        ({"n_shots": -1}, "n_shots must be a non-negative integer; got -1"),
        ({"n_shots": []}, "n_shots is empty"),
        (
            {"n_shots": 12},
            "No held-out task has a query row.*largest has 12 rows",
        ),
        ({"n_shots": 11, "disjoint_rows": True}, "left of its own by disjoint_rows"),
        ({"test_size": 1.5}, "test_size must be a fraction"),
        ({"test_size": 7}, "holds out 7; expected 2 to 4"),
        ({"n_repeats": 0}, "n_repeats must be a positive integer"),
        ({"max_queries": 2.5}, "max_queries must be a positive integer"),
        ({"baselines": "pooled ridg"}, "no baseline 'pooled ridg'.*Did you mean 'pooled ridge'"),
        ({"baselines": {"MAMLRegressor": LinearRegression()}}, "is that of the estimator"),
        ({"splits": []}, "splits is empty"),
        ({"splits": [5]}, "splits must hold"),
        ({"splits": [([0, 1], {})]}, "splits must hold"),
        ({"splits": [([0, 1], {3: [([90], [91, 0])]})]}, "1 and 2 rows of 2 task"),
        ({"splits": [([0, 1], {3: [([2], [3])]})]}, "the same rows twice"),
    ],
)
def test_bad_values_are_refused(change, message):
    X, y, task = random_slopes(8, 12)
    arguments = {"groups": task, "estimator": REG, "n_shots": 3, "baselines": [], **change}
    with pytest.raises(ValueError, match=message):
        compare_baselines(X=X, y=y, random_state=0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": LinearRegression()}, "got LinearRegression"),
        ({"estimator": FewShotRegressor()}, "got FewShotRegressor"),
        ({"estimator": MAMLRegressor}, "is the class MAMLRegressor"),
        ({"baselines": {"own": 5}}, "'own' must be an estimator"),
    ],
)
def test_bad_types_are_refused(change, message):
    X, y, task = random_slopes(8, 12)
    arguments = {"estimator": REG, "baselines": [], **change}
    with pytest.raises(TypeError, match=message):
        compare_baselines(X=X, y=y, groups=task, **arguments)


def test_data_that_cannot_be_compared_is_refused():
    X, y, task = random_slopes(8, 12)
    with pytest.raises(ValueError, match=r"at least 6 tasks.*got 4"):
        compare_baselines(REG, X, y, task % 4)
    with pytest.raises(ValueError, match="are equal: nothing to learn"):
        compare_baselines(REG, X, np.ones(len(y)), task, n_shots=3, baselines=[])
    X, y, task = shared_classes(8, 12)
    y = np.where(task == 3, "z", y)
    splits = [(np.flatnonzero(task < 3), {1: [([36], [37])]})]
    with pytest.raises(ValueError, match=r"No training task has the labels \['z'\]"):
        compare_baselines(CLF, X, y, task, splits=splits)


def test_missing_pandas_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-maml\[compare\]'"):
        compare_baselines(REG, *random_slopes(8, 12))


def test_decimals_are_numbers():
    from decimal import Decimal

    from sklearn_maml.evaluation.comparison import _are_numbers

    assert _are_numbers([Decimal("0.1"), Decimal(3)])
    assert _are_numbers(np.array([1, 2.5], dtype=object))
    assert not _are_numbers(["a", "b"])
    assert not _are_numbers(np.array([True, False], dtype=object))
