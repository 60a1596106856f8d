"""scikit-learn's tools work on the estimators as they do on its own."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    GroupShuffleSplit,
    HalvingGridSearchCV,
    KFold,
    LeaveOneGroupOut,
    RandomizedSearchCV,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from torch import nn

from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    task_scorer,
    task_scores,
)
from sklearn_maml.exceptions import NotAdaptedError, SeenTaskWarning, SingleTaskWarning
from sklearn_maml.update_rules import SGD, MetaSGD

SMALL = {
    "hidden_layer_sizes": (8,),
    "activation": "tanh",
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 1,
    "meta_batch_size": 4,
    "max_iter": 6,
    "random_state": 0,
}
N_TASKS, N_ROWS = 9, 12
COLUMNS = ["a", "b", "c"]


class Net(nn.Module):
    """A module with parameters of its own to search."""

    def __init__(self, in_features, out_features, width=4, slope=0.1):
        super().__init__()
        self.body = nn.Linear(in_features, width)
        self.act = nn.LeakyReLU(slope)
        self.head = nn.Linear(width, out_features)

    def forward(self, x):
        return self.head(self.act(self.body(x)))


# -- check_estimator -----------------------------------------------------------------------------

# few meta-updates: the many small fits of these checks are of one task each
# some have features of 20 to 100, unscaled: inner steps of the default rate diverge, with losses of
# 1e100 and now and then one that is not finite
CHECKED = [
    MAMLClassifier(max_iter=5),
    MAMLRegressor(max_iter=20),
    FewShotClassifier(),
    FewShotRegressor(),
]


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.SingleTaskWarning")
@pytest.mark.filterwarnings("ignore:SCIPY_ARRAY_API is not set")
@parametrize_with_checks(CHECKED)
def test_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.SingleTaskWarning")
@parametrize_with_checks([MAMLClassifier(), MAMLRegressor()])
def test_default_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_scikit_learn_checks_all_four_estimators_thoroughly():
    """No checks would be no failures."""
    for estimator in CHECKED:
        names = {check.func.__name__ for _, check in estimator_checks_generator(estimator)}
        assert len(names) > 35
        assert "check_fit_idempotent" in names
    names = {check.func.__name__ for _, check in estimator_checks_generator(FewShotRegressor())}
    assert "check_sample_weight_equivalence_on_dense_data" in names


def test_the_estimators_are_what_they_say():
    assert is_classifier(MAMLClassifier())
    assert is_classifier(FewShotClassifier())
    assert is_regressor(MAMLRegressor())
    assert is_regressor(FewShotRegressor())


# -- data, spelt for routing and for a task column -----------------------------------------------


def make_rows(kind, n_tasks=N_TASKS, n_rows=N_ROWS, seed=0):
    """Rows of all tasks, interleaved; their targets and task ids."""
    rng = np.random.default_rng(seed)
    groups = np.tile(np.arange(n_tasks), n_rows)
    X = rng.normal(size=(len(groups), len(COLUMNS)))
    slopes = rng.normal(size=(n_tasks, len(COLUMNS)))
    y = (X * slopes[groups]).sum(1)
    names = np.array([f"task {g}" for g in groups])
    if kind == "regression":
        return X, y, names
    return X, np.where(y > 0, "up", "down"), names


class Routed:
    """Tasks named by `groups`, with metadata routing and no set_*_request call."""

    column = None

    def __init__(self, kind, **size):
        self.kind = kind
        self.X, self.y, self.groups = make_rows(kind, **size)

    def estimator(self, **params):
        cls = MAMLRegressor if self.kind == "regression" else MAMLClassifier
        return cls(**{**SMALL, **params}, task_column=self.column)

    def passed(self):
        """How the functions of model_selection are told of the groups."""
        return {"params": {"groups": self.groups}}

    def fit(self, search):
        return search.fit(self.X, self.y, groups=self.groups)

    def score(self, fitted):
        return fitted.score(self.X, self.y, groups=self.groups)


class Columned(Routed):
    """Tasks named by a column of X, without routing: `groups` reach the splitter alone."""

    column = "task"

    def __init__(self, kind, **size):
        super().__init__(kind, **size)
        self.X = pd.DataFrame(self.X, columns=COLUMNS).assign(task=self.groups)

    def passed(self):
        return {"groups": self.groups}

    def score(self, fitted):
        return fitted.score(self.X, self.y)


@pytest.fixture(params=["routing", "column"])
def way(request):
    with sklearn.config_context(enable_metadata_routing=request.param == "routing"):
        yield Routed if request.param == "routing" else Columned


@pytest.fixture
def tasks(way):
    return way("regression")


@pytest.fixture(params=["regression", "classification"])
def either(request, way):
    return way(request.param)


def assert_finite(scores, shape=None):
    scores = np.asarray(scores)
    assert scores.dtype.kind == "f"
    assert np.isfinite(scores).all()
    assert shape is None or scores.shape == shape


def assert_searched(search, n_candidates, n_splits, distinct=None):
    """All candidates were scored, were told apart, and the best was fitted to all tasks."""
    for k in range(n_splits):
        assert_finite(search.cv_results_[f"split{k}_test_score"], (n_candidates,))
    means = search.cv_results_["mean_test_score"]
    assert len(np.unique(means)) == (n_candidates if distinct is None else distinct)
    assert search.best_score_ == means.max()
    best = search.best_estimator_
    best = best[-1] if isinstance(best, Pipeline) else best
    assert best.n_tasks_ == N_TASKS
    return best


# -- searches ------------------------------------------------------------------------------------

GRIDS = {
    "rates": (
        {},
        {"alpha": [0.01, 0.3], "beta": [1e-3, 1e-2], "steps": [1, 3]},
    ),
    "module": ({"module": Net}, {"module__width": [2, 5], "module__slope": [0.1, 0.5]}),
    "optimizer": (
        {"optimizer": torch.optim.SGD},
        {"optimizer__momentum": [0.0, 0.9], "optimizer__weight_decay": [0.0, 1.0]},
    ),
    "update rule by name": (
        {"update_rule": "sgd"},
        {"update_rule__max_grad_norm": [0.01, 0.1]},
    ),
    "update rule object": ({"update_rule": SGD()}, {"update_rule__max_grad_norm": [0.01, 0.1]}),
    "objects": ({}, {"update_rule": [SGD(), MetaSGD(per="tensor")]}),
    "choices": (
        {},
        {"meta_gradient": ["first-order", "second-order"], "adapted": ["head", "body"]},
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_search_tells_candidates_apart(name, tasks):
    params, grid = GRIDS[name]
    estimator = tasks.estimator(**{"alpha": 0.3, **params})
    search = GridSearchCV(estimator, grid, cv=GroupKFold(3), error_score="raise")
    tasks.fit(search)
    n_candidates = np.prod([len(values) for values in grid.values()])
    best = assert_searched(search, n_candidates, 3)
    for key, value in search.best_params_.items():
        assert repr(best.get_params()[key]) == repr(value)
    if name == "module":
        assert best.module_.body.out_features == search.best_params_["module__width"]
        assert best.module_.act.negative_slope == search.best_params_["module__slope"]
    if name == "optimizer":
        group = best.net_.optimizer_.param_groups[0]
        assert group["momentum"] == search.best_params_["optimizer__momentum"]
        assert group["weight_decay"] == search.best_params_["optimizer__weight_decay"]
    assert_finite(tasks.score(search), ())


def test_a_grid_search_works_for_the_classifier(way):
    tasks = way("classification")
    grid = {"alpha": [0.01, 1.0], "steps": [1, 4]}
    search = GridSearchCV(tasks.estimator(), grid, cv=GroupKFold(3), error_score="raise")
    tasks.fit(search)
    assert_finite(search.cv_results_["mean_test_score"], (4,))
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    assert_array_equal(search.classes_, ["down", "up"])
    assert 0 <= tasks.score(search) <= 1


SPLITTERS = {
    "GroupKFold": GroupKFold(3),
    "LeaveOneGroupOut": LeaveOneGroupOut(),
    "GroupShuffleSplit": GroupShuffleSplit(2, test_size=3, random_state=0),
}


@pytest.mark.parametrize("name", SPLITTERS)
def test_group_splitters_work(name, either):
    cv = SPLITTERS[name]
    n_splits = cv.get_n_splits(either.X, either.y, either.groups)
    scores = cross_val_score(either.estimator(), either.X, either.y, cv=cv, **either.passed())
    assert_finite(scores, (n_splits,))
    assert len(set(scores)) > 1
    search = GridSearchCV(either.estimator(), {"steps": [1, 3]}, cv=cv, error_score="raise")
    either.fit(search)
    for k in range(n_splits):
        assert_finite(search.cv_results_[f"split{k}_test_score"], (2,))


def test_cross_validation_is_by_hand_what_the_tools_say(either):
    """A fold of the tools is: fit on the other tasks, score on its own."""
    cv = GroupKFold(3)
    scores = cross_val_score(either.estimator(), either.X, either.y, cv=cv, **either.passed())
    rows = either.X if either.column is None else either.X.iloc
    for score, (train, test) in zip(scores, cv.split(either.X, None, either.groups), strict=True):
        named = {} if either.column else {"groups": either.groups[train]}
        model = either.estimator().fit(rows[train], either.y[train], **named)
        named = {} if either.column else {"groups": either.groups[test]}
        assert score == model.score(rows[test], either.y[test], **named)


def test_both_ways_to_name_the_tasks_give_the_same_search():
    found = {}
    for way in (Routed, Columned):
        with sklearn.config_context(enable_metadata_routing=way is Routed):
            tasks = way("regression")
            search = GridSearchCV(tasks.estimator(), {"alpha": [0.01, 0.3]}, cv=GroupKFold(3))
            found[way] = tasks.fit(search).cv_results_
    for k in range(3):
        name = f"split{k}_test_score"
        assert_array_equal(found[Routed][name], found[Columned][name])


def test_a_randomized_search_works(tasks):
    draws = {
        "alpha": np.geomspace(1e-3, 1, 50),
        "beta": np.geomspace(1e-4, 1e-1, 50),
        "steps": [1, 2, 3],
        "module__width": [3, 4, 5],
        "optimizer__weight_decay": [0.0, 0.1],
        "update_rule__max_grad_norm": [1.0, 10.0],
    }
    search = RandomizedSearchCV(
        tasks.estimator(module=Net), draws, n_iter=4, cv=GroupKFold(3), random_state=0,
        error_score="raise",
    )  # fmt: skip
    best = assert_searched(tasks.fit(search), 4, 3)
    assert best.module_.body.out_features == search.best_params_["module__width"]


def test_a_halving_search_over_rows_works(way):
    tasks = way("regression", n_rows=36)
    grid = {"alpha": [0.01, 0.1, 0.3], "steps": [1, 3]}
    search = HalvingGridSearchCV(
        tasks.estimator(), grid, cv=GroupKFold(3), random_state=0, error_score="raise",
    )  # fmt: skip
    tasks.fit(search)
    assert search.n_iterations_ == 2
    assert search.n_resources_ == [108, 324]
    assert_finite(search.cv_results_["mean_test_score"], (6 + 2,))
    assert search.best_estimator_.n_tasks_ == N_TASKS


def test_a_halving_search_over_meta_updates_works(tasks):
    grid = {
        "alpha": [0.01, 0.3],
        "beta": [1e-2],
        "module__width": [2, 5],
        "optimizer__weight_decay": [0.1],
        "update_rule__max_grad_norm": [10.0],
    }
    search = HalvingGridSearchCV(
        tasks.estimator(module=Net), grid, cv=GroupKFold(3), random_state=0, error_score="raise",
        resource="max_iter", min_resources=2, max_resources=18,
    )  # fmt: skip
    tasks.fit(search)
    assert search.n_resources_ == [2, 6]
    assert_finite(search.cv_results_["mean_test_score"], (4 + 2,))
    assert search.best_estimator_.n_iter_ == search.best_estimator_.max_iter


def test_a_parallel_search_gives_the_numbers_of_a_sequential_one(tasks):
    found = []
    for n_jobs in (1, 2):
        search = GridSearchCV(
            tasks.estimator(), {"alpha": [0.01, 0.3]}, cv=GroupKFold(3), n_jobs=n_jobs,
            error_score="raise",
        )  # fmt: skip
        found.append(tasks.fit(search).cv_results_)
    for k in range(3):
        assert_array_equal(*(results[f"split{k}_test_score"] for results in found))


def test_parallel_cross_validation_returns_estimators_that_work(way):
    tasks = way("classification")
    found = cross_validate(
        tasks.estimator(module=Net, module__width=3), tasks.X, tasks.y, cv=GroupKFold(2),
        n_jobs=2, return_estimator=True, error_score="raise", **tasks.passed(),
    )  # fmt: skip
    assert_finite(found["test_score"], (2,))
    for fitted in found["estimator"]:
        assert fitted.module_.body.out_features == 3
        fitted.adapt(tasks.X[:9], tasks.y[:9], **({} if tasks.column else {"groups": [0] * 9}))


def test_a_search_may_use_task_scorers(either):
    name = "neg_mean_absolute_error" if either.kind == "regression" else "balanced_accuracy"
    one, two = (
        GridSearchCV(
            either.estimator(), {"steps": [0, 3]}, cv=GroupKFold(3), scoring=scoring, refit=refit,
            error_score="raise",
        )
        for scoring, refit in (
            (task_scorer(name, n_shots=2), True),
            ({"pooled": task_scorer(name, n_shots=2), "mean": task_scorer(name, average="macro")},
             "mean"),
        )
    )  # fmt: skip
    either.fit(one)
    either.fit(two)
    pooled = one.cv_results_["mean_test_score"]
    assert_finite(pooled, (2,))
    assert len(set(pooled)) == 2
    assert_array_equal(pooled, two.cv_results_["mean_test_pooled"])
    assert_finite(two.cv_results_["mean_test_mean"], (2,))
    assert not np.array_equal(two.cv_results_["mean_test_mean"], pooled)


# -- the functions of model_selection ------------------------------------------------------------


def test_cross_validate_scores_train_and_test_tasks(either):
    found = cross_validate(
        either.estimator(), either.X, either.y, cv=GroupKFold(3), return_train_score=True,
        return_estimator=True, error_score="raise", **either.passed(),
    )  # fmt: skip
    assert_finite(found["test_score"], (3,))
    assert_finite(found["train_score"], (3,))
    for fitted in found["estimator"]:
        assert fitted.n_tasks_ == N_TASKS * 2 // 3


def test_cross_validate_takes_several_task_scorers(either):
    names = ["r2", "neg_root_mean_squared_error"]
    if either.kind != "regression":
        names = ["accuracy", "roc_auc", "neg_log_loss"]
    found = cross_validate(
        either.estimator(), either.X, either.y, cv=GroupKFold(3), error_score="raise",
        scoring={name: task_scorer(name) for name in names}, **either.passed(),
    )  # fmt: skip
    for name in names:
        assert_finite(found[f"test_{name}"], (3,))


def test_learning_curves_work(either):
    sizes, train, test = learning_curve(
        either.estimator(), either.X, either.y, cv=GroupKFold(3), train_sizes=[0.5, 1.0],
        error_score="raise", **either.passed(),
    )  # fmt: skip
    assert_array_equal(sizes, [36, 72])
    assert_finite(train, (2, 3))
    assert_finite(test, (2, 3))
    assert len(np.unique(test)) > 1


def test_validation_curves_work(either):
    train, test = validation_curve(
        either.estimator(), either.X, either.y, param_name="steps", param_range=[0, 1, 4],
        cv=GroupKFold(3), error_score="raise", **either.passed(),
    )  # fmt: skip
    assert_finite(train, (3, 3))
    assert_finite(test, (3, 3))
    assert len(np.unique(test.mean(1))) > 1


def test_permutation_tests_work(either):
    score, permuted, p = permutation_test_score(
        either.estimator(), either.X, either.y, cv=GroupKFold(3), n_permutations=3,
        random_state=0, **either.passed(),
    )  # fmt: skip
    assert_finite([score, p], (2,))
    assert_finite(permuted, (3,))
    assert len(set(permuted)) == 3


class ByColumn:
    """Group folds of the task column: a splitter that needs no `groups`."""

    def get_n_splits(self, X=None, y=None, groups=None):
        return 2

    def split(self, X, y=None, groups=None):
        yield from GroupKFold(2).split(X, y, X["task"])


def test_nested_searches_work(either):
    inner = GroupKFold(2) if either.column is None else ByColumn()
    search = GridSearchCV(either.estimator(), {"steps": [1, 3]}, cv=inner, error_score="raise")
    scores = cross_val_score(
        search, either.X, either.y, cv=GroupKFold(3), error_score="raise", **either.passed()
    )
    assert_finite(scores, (3,))
    assert len(set(scores)) > 1


# -- pipelines -----------------------------------------------------------------------------------


def scaled_columns(**options):
    return ColumnTransformer(
        [("scale", StandardScaler(), COLUMNS)],
        remainder="passthrough",
        verbose_feature_names_out=False,
        **options,
    )


@pytest.mark.parametrize("container", ["array", "pandas"])
def test_pipelines_route_the_groups(container):
    with sklearn.config_context(enable_metadata_routing=True):
        tasks = Routed("regression")
        scaler = StandardScaler()
        if container == "pandas":
            tasks.X = pd.DataFrame(tasks.X, columns=COLUMNS)
            scaler.set_output(transform="pandas")
        pipe = make_pipeline(scaler, tasks.estimator())
        scores = cross_val_score(
            pipe, tasks.X, tasks.y, cv=GroupKFold(3), error_score="raise", **tasks.passed()
        )
        assert_finite(scores, (3,))
        grid = {"mamlregressor__alpha": [0.01, 0.3], "standardscaler__with_std": [True, False]}
        search = GridSearchCV(pipe, grid, cv=GroupKFold(3), error_score="raise")
        best = assert_searched(tasks.fit(search), 4, 3)
        assert hasattr(best, "feature_names_in_") == (container == "pandas")
        assert_finite(tasks.score(search.best_estimator_), ())
        support = slice(0, None, N_TASKS)  # rows of the first task
        fitted = search.best_estimator_
        adapted = adapt(fitted, tasks.X[support], tasks.y[support])
        assert_finite(adapted.predict(tasks.X[support]), (N_ROWS,))


@pytest.mark.parametrize("output", ["default", "pandas", "polars"])
def test_column_transformers_pass_the_task_column_on(output):
    tasks = Columned("regression")
    transformer = scaled_columns().set_output(transform=output)
    if output == "polars":
        tasks.X = pl.DataFrame(tasks.X.to_dict("list"))
    # without names, the column is the last
    column = -1 if output == "default" else "task"
    pipe = make_pipeline(transformer, tasks.estimator().set_params(task_column=column))
    scores = cross_val_score(
        pipe, tasks.X, tasks.y, cv=GroupKFold(3), groups=tasks.groups, error_score="raise"
    )
    assert_finite(scores, (3,))
    search = GridSearchCV(
        pipe, {"mamlregressor__alpha": [0.01, 0.3]}, cv=GroupKFold(3), error_score="raise"
    )
    assert_searched(tasks.fit(search), 2, 3)
    assert_finite(tasks.score(search), ())
    assert len(task_scores(search, tasks.X, tasks.y).task) == N_TASKS


def test_column_transformers_encode_categories_beside_the_task_column():
    tasks = Columned("classification")
    rng = np.random.default_rng(0)
    tasks.X["kind"] = rng.choice(["x", "y", "z"], len(tasks.X))
    transformer = ColumnTransformer(
        [
            ("scale", StandardScaler(), COLUMNS),
            ("encode", OneHotEncoder(sparse_output=False), ["kind"]),
            ("task", "passthrough", ["task"]),
        ],
        verbose_feature_names_out=False,
    ).set_output(transform="pandas")
    pipe = make_pipeline(transformer, tasks.estimator())
    search = GridSearchCV(
        pipe, {"mamlclassifier__alpha": [0.01, 1.0]}, cv=GroupKFold(3), error_score="raise"
    )
    tasks.fit(search)
    assert_finite(search.cv_results_["mean_test_score"], (2,))
    assert search.best_estimator_[-1].n_tasks_ == N_TASKS
    assert "kind_x" in search.best_estimator_[-1].feature_names_in_


def test_polars_frames_work_in_cross_validation():
    tasks = Columned("regression")
    frame = pl.DataFrame(tasks.X.to_dict("list"))
    scores, expected = (
        cross_val_score(
            tasks.estimator(), X, tasks.y, cv=GroupKFold(3), groups=tasks.groups,
            error_score="raise",
        )
        for X in (frame, tasks.X)
    )  # fmt: skip
    assert_array_equal(scores, expected)


# -- lists of tasks ------------------------------------------------------------------------------


def as_list(kind, fixed=False, seed=0):
    X, y, groups = make_rows(kind, n_rows=16, seed=seed)
    tasks = [(X[groups == g], y[groups == g]) for g in np.unique(groups)]
    return [(a[:6], b[:6], a[6:], b[6:]) for a, b in tasks] if fixed else tasks


@pytest.mark.parametrize("fixed", [False, True], ids=["pairs", "four parts"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("routing", [False, True])
def test_k_fold_over_a_list_of_tasks_is_cross_validation_over_tasks(fixed, kind, routing):
    tasks = as_list(kind, fixed)
    estimator = (MAMLRegressor if kind == "regression" else MAMLClassifier)(**SMALL)
    with sklearn.config_context(enable_metadata_routing=routing):
        found = cross_validate(
            estimator, tasks, cv=KFold(3), return_train_score=True, error_score="raise",
            return_estimator=True, params={},  # scikit-learn 1.6 does not take None here
        )  # fmt: skip
        assert_finite(found["test_score"], (3,))
        assert_finite(found["train_score"], (3,))
        assert [fitted.n_tasks_ for fitted in found["estimator"]] == [6, 6, 6]
        by_hand = estimator.fit(tasks[3:]).score(tasks[:3])
        assert found["test_score"][0] == by_hand
        search = GridSearchCV(
            estimator, {"alpha": [0.01, 0.1]}, cv=KFold(2), error_score="raise"
        ).fit(tasks)
        assert_finite(search.cv_results_["mean_test_score"], (2,))
        assert len(set(search.cv_results_["mean_test_score"])) > 1
        assert search.best_estimator_.n_tasks_ == N_TASKS
        assert_finite(search.score(tasks), ())
        nested = cross_val_score(search, tasks, cv=KFold(2), error_score="raise", params={})
        assert_finite(nested, (2,))


def test_other_tools_take_lists_of_tasks_too():
    tasks = as_list("regression")
    estimator = MAMLRegressor(**SMALL)
    scorer = task_scorer("neg_mean_absolute_error")
    found = cross_validate(estimator, tasks, cv=KFold(3), scoring={"mae": scorer})
    assert_finite(found["test_mae"], (3,))
    search = RandomizedSearchCV(
        estimator, {"alpha": np.geomspace(0.01, 0.1, 20)}, n_iter=3, cv=3, random_state=0,
        error_score="raise",
    ).fit(tasks)  # fmt: skip
    assert_finite(search.cv_results_["mean_test_score"], (3,))
    sizes, _, test = learning_curve(
        estimator, tasks, None, cv=KFold(3), train_sizes=[2, 6], error_score="raise"
    )
    assert_array_equal(sizes, [2, 6])
    assert_finite(test, (2, 3))


# -- copies --------------------------------------------------------------------------------------


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_joblib(model, tmp_path):
    joblib.dump(model, tmp_path / "model.joblib")
    return joblib.load(tmp_path / "model.joblib")


COPIES = {
    "pickle": lambda model, _: by_pickle(model),
    "joblib": by_joblib,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "copy": lambda model, _: copy.copy(model),
}


def fit_one(kind, **params):
    X, y, groups = make_rows(kind)
    cls = MAMLRegressor if kind == "regression" else MAMLClassifier
    return cls(**{**SMALL, **params}).fit(X, y, groups=groups)


def make_fitted(name):
    """A fitted model, and the last of its steps if it is a pipeline."""
    if name == "search":
        with sklearn.config_context(enable_metadata_routing=True):
            tasks = Routed("regression")
            return tasks.fit(GridSearchCV(tasks.estimator(), {"steps": [1, 2]}, cv=GroupKFold(2)))
    if name == "pipeline":
        with sklearn.config_context(enable_metadata_routing=True):
            tasks = Routed("regression")
            return tasks.fit(make_pipeline(StandardScaler(), tasks.estimator()))
    kind = "classification" if "classifier" in name else "regression"
    params = {
        "module": {"module": Net, "module__width": 3},
        "learned rates": {"update_rule": MetaSGD()},
        "normed": {"module": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))},
        "episodes classifier": {"n_ways": 2},
    }
    return fit_one(kind, **params.get(name, {}))


FITTED = [
    "regressor", "classifier", "episodes classifier", "module", "learned rates", "normed",
    "pipeline", "search",
]  # fmt: skip


def outputs(model, X):
    return model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", FITTED)
def test_copies_adapt_and_predict_as_the_original(name, how, tmp_path):
    model = make_fitted(name)
    kind = "classification" if "classifier" in name else "regression"
    X, y, _ = make_rows(kind, n_tasks=1, seed=1)
    twin = COPIES[how](model, tmp_path)
    adapted = adapt(model, X[:6], y[:6])
    expected = outputs(adapted, X)
    assert_array_equal(outputs(adapt(twin, X[:6], y[:6]), X), expected)
    # an adapted one keeps what it was adapted to
    twin = COPIES[how](adapted, tmp_path)
    assert_array_equal(outputs(twin, X), expected)
    # and goes its own way
    again = adapt(twin, X[6:], y[6:])
    assert not np.array_equal(outputs(again, X), expected)
    assert_array_equal(outputs(adapted, X), expected)


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_many_adapted_tasks_and_can_be_continued(how, tmp_path):
    model = fit_one("regression", warm_start=True)
    X, y, groups = make_rows("regression", seed=1)
    model.adapt(X, y, groups=groups)
    twin = COPIES[how](model, tmp_path)
    assert_array_equal(twin.predict(X, groups=groups), model.predict(X, groups=groups))
    X, y, groups = make_rows("regression")
    twin.fit(X, y, groups=groups)
    assert twin.n_iter_ == 2 * SMALL["max_iter"]
    assert model.n_iter_ == SMALL["max_iter"]
    assert len(model.history_) == 1
    model.fit(X, y, groups=groups)
    assert_array_equal(twin.adapt(X[:5], y[:5]).predict(X), model.adapt(X[:5], y[:5]).predict(X))


ELSEWHERE = """
import sys, warnings
import joblib, numpy as np
model, X, y, groups = joblib.load(sys.argv[1])
warnings.simplefilter("error")
score = model.score(X, y, groups=groups)
joblib.dump((score, model.adapt(X[:6], y[:6]).predict(X)), sys.argv[1])
"""


def test_a_model_loaded_in_another_process_gives_the_same_numbers_and_knows_its_tasks(tmp_path):
    X, y, groups = make_rows("regression")
    model = fit_one("regression")
    path = tmp_path / "model.joblib"
    joblib.dump((model, X, y, groups), path)
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(path)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    )
    score, predicted = joblib.load(path)
    assert score == model.score(X, y, groups=groups)
    assert_array_equal(predicted, model.adapt(X[:6], y[:6]).predict(X))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_copies_of_few_shot_estimators_predict_the_same(kind, with_prior, how, tmp_path):
    cls = FewShotRegressor if kind == "regression" else FewShotClassifier
    X, y, _ = make_rows(kind, n_tasks=1, seed=1)
    prior = fit_one(kind) if with_prior else None
    learner = cls(prior, random_state=0, steps=5).fit(X, y)
    twin = COPIES[how](learner, tmp_path)
    assert_array_equal(outputs(twin, X), outputs(learner, X))
    assert_array_equal(outputs(twin.fit(X[:5], y[:5]), X), outputs(learner.fit(X[:5], y[:5]), X))


@pytest.mark.parametrize("name", FITTED)
def test_a_clone_is_not_fitted_and_has_the_same_parameters(name):
    model = make_fitted(name)
    twin = clone(model)
    assert type(twin) is type(model)
    assert repr(twin.get_params()) == repr(model.get_params())
    assert not [key for key in vars(twin) if key.endswith("_") and not key.startswith("_")]
    with pytest.raises(NotFittedError):
        twin.predict(np.zeros((1, 3)))


def test_a_clone_is_fitted_to_the_same_numbers():
    X, y, groups = make_rows("regression")
    model = fit_one("regression", module=Net, module__width=3, optimizer__weight_decay=0.1)
    twin = clone(model).fit(X, y, groups=groups)
    assert_array_equal(twin.adapt(X[:5], y[:5]).predict(X), model.adapt(X[:5], y[:5]).predict(X))


def test_a_clone_of_a_few_shot_estimator_shares_the_prior():
    prior = fit_one("regression")
    learner = FewShotRegressor(prior, alpha=0.05, steps=3, random_state=1)
    twin = clone(learner)
    assert twin.prior is prior
    assert twin is not learner
    assert (twin.alpha, twin.steps, twin.random_state) == (0.05, 3, 1)
    X, y, _ = make_rows("regression", n_tasks=1, seed=1)
    assert_array_equal(twin.fit(X, y).predict(X), learner.fit(X, y).predict(X))


# -- parameters ----------------------------------------------------------------------------------

EXTRA = {
    "module": Net,
    "module__width": 5,
    "optimizer__weight_decay": 0.1,
    "update_rule": "meta-sgd",
    "update_rule__per": "tensor",
    "iterator_train__num_workers": 0,
    "callbacks__print_log": None,
    "alpha": 0.25,
    "n_shots": 3,
}


@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_parameters_survive_a_round_trip(cls):
    model = cls(**EXTRA)
    params = model.get_params()
    assert EXTRA.items() <= params.items()
    assert cls(**params).get_params() == params
    assert cls().set_params(**params).get_params() == params
    assert clone(model).get_params() == params
    # the defaults too
    assert cls(**cls().get_params()).get_params() == cls().get_params()


@pytest.mark.parametrize("cls", [FewShotRegressor, FewShotClassifier])
def test_parameters_of_few_shot_estimators_survive_a_round_trip(cls):
    kind = "regression" if cls is FewShotRegressor else "classification"
    params = {"prior": fit_one(kind), "alpha": 0.3, "steps": 2, "random_state": 1}
    learner = cls(**params)
    assert learner.get_params(deep=False) == params
    assert cls().set_params(**params).get_params(deep=False) == params
    assert learner.get_params()["prior__alpha"] == SMALL["alpha"]


def test_parameters_of_objects_are_reached_through_their_prefix():
    rule = SGD(max_grad_norm=5.0)
    model = MAMLRegressor(update_rule=rule)
    assert model.get_params()["update_rule__max_grad_norm"] == 5.0
    assert "update_rule__max_grad_norm" not in model.get_params(deep=False)
    model.set_params(update_rule__max_grad_norm=1.0)
    assert rule.max_grad_norm == 1.0
    assert "update_rule__max_grad_norm" not in vars(model)
    pipe = make_pipeline(StandardScaler(), model)
    pipe.set_params(mamlregressor__update_rule__max_grad_norm=2.0, mamlregressor__module__width=7)
    assert rule.max_grad_norm == 2.0
    assert model.module__width == 7


def test_prefixed_parameters_of_the_constructor_reach_an_object():
    X, y, _ = make_rows("regression")
    by_object, by_prefix, neither = (
        fit_one("regression", steps=3, **params).adapt(X[:6], y[:6]).predict(X)
        for params in (
            {"update_rule": SGD(max_grad_norm=0.01)},
            {"update_rule": SGD(), "update_rule__max_grad_norm": 0.01},
            {"update_rule": SGD()},
        )
    )
    assert_array_equal(by_prefix, by_object)
    assert not np.allclose(by_prefix, neither)


def test_an_update_rule_and_its_parameter_may_be_set_together():
    model = MAMLRegressor(update_rule="sgd", update_rule__max_grad_norm=3.0)
    model.set_params(update_rule=MetaSGD(), update_rule__per="tensor")
    assert model.update_rule.per == "tensor"


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("name", ["alpha", "steps", "adapt_steps"])
def test_rates_set_after_fit_act_on_the_next_adapt_and_only_then(name, kind):
    model = fit_one(kind)
    X, y, groups = make_rows(kind, seed=1)
    before = {key: t.clone() for key, t in model.module_.state_dict().items()}
    first = outputs(model.adapt(X[:6], y[:6]), X)
    model.set_params(**{name: {"alpha": 0.3}.get(name, 6)})
    assert_array_equal(outputs(model, X), first)
    second = outputs(model.adapt(X[:6], y[:6]), X)
    assert not np.allclose(second, first, rtol=1e-3)
    # `score` adapts too
    changed = model.score(X, y, groups=[f"new {g}" for g in groups])
    model.set_params(alpha=SMALL["alpha"], steps=SMALL["steps"], adapt_steps=None)
    assert_array_equal(outputs(model, X), second)
    assert_array_equal(outputs(model.adapt(X[:6], y[:6]), X), first)
    if kind == "regression":
        assert changed != model.score(X, y, groups=[f"new {g}" for g in groups])
    assert model.n_iter_ == SMALL["max_iter"]
    for key, t in model.module_.state_dict().items():
        assert torch.equal(t, before[key])


def test_adapt_steps_replaces_steps_in_adapt():
    model = fit_one("regression")
    X, y, _ = make_rows("regression", seed=1)
    by_steps = model.set_params(steps=5).adapt(X[:6], y[:6]).predict(X)
    model.set_params(steps=1, adapt_steps=5)
    assert_array_equal(model.adapt(X[:6], y[:6]).predict(X), by_steps)
    model.set_params(steps=9)
    assert_array_equal(model.adapt(X[:6], y[:6]).predict(X), by_steps)
    unchanged = model.set_params(adapt_steps=0).adapt(X[:6], y[:6]).predict(X)
    assert_array_equal(model.adapt(X[7:9], y[7:9]).predict(X), unchanged)


def test_adapt_steps_does_not_change_meta_training():
    few, many = (fit_one("regression", adapt_steps=n) for n in (None, 7))
    for key, t in few.module_.state_dict().items():
        assert torch.equal(t, many.module_.state_dict()[key])


@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_the_constructor_is_one_that_can_be_read(cls):
    assert len(inspect.signature(cls).parameters) <= 32  # net_params among them


@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_options_of_the_engine_are_ordinary_parameters(cls):
    options = {"engine__batch_norm": "transductive", "engine__precision": "bf16"}
    model = clone(cls(**options))
    assert options.items() <= model.get_params().items()
    assert cls().set_params(**options).get_params() == model.get_params()
    assert "engine__precision='bf16'" in repr(model)
    assert "engine__precision" in model._repr_html_()
    X, y, groups = make_rows("regression")
    tasks = [(X[groups == j], (y > 0)[groups == j]) for j in np.unique(groups)]
    grid = {"engine__precision": ["full", "half"]}
    search = GridSearchCV(cls(**SMALL), grid, cv=KFold(2), error_score="raise")
    with pytest.raises(ValueError, match=r"'engine__precision' parameter of .* Got 'half'"):
        search.fit(tasks)
    search.set_params(param_grid={"engine__precision": ["full", "bf16"]}).fit(tasks)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("cls", [FewShotRegressor, FewShotClassifier])
def test_misspelt_names_of_few_shot_estimators_are_reported(cls):
    with pytest.raises(TypeError, match="alhpa"):
        cls(alhpa=1)
    with pytest.raises(ValueError, match="alhpa"):
        cls().set_params(alhpa=1)


# -- representations -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", CHECKED)
def test_representations_name_the_class_and_what_is_not_default(estimator):
    name = type(estimator).__name__
    assert repr(type(estimator)()) == f"{name}()"
    assert "alpha=0.25" in repr(clone(estimator).set_params(alpha=0.25))
    assert name in estimator._repr_html_()
    assert name in estimator._repr_mimebundle_()["text/html"]


def test_prefixed_parameters_are_in_the_representations():
    model = MAMLRegressor(
        update_rule="sgd", module=Net, module__width=5, optimizer__weight_decay=0.1
    )
    assert "module__width=5" in repr(model)
    assert "optimizer__weight_decay=0.1" in repr(model)
    assert "module__width" in model._repr_html_()


@pytest.mark.parametrize("name", ["regressor", "module", "learned rates", "pipeline", "search"])
def test_fitted_models_have_representations(name):
    model = make_fitted(name)
    assert "MAMLRegressor" in repr(model)
    assert "MAMLRegressor" in model._repr_html_()
    if name not in ("pipeline", "search"):
        learner = FewShotRegressor(model)
        assert "MAMLRegressor" in repr(learner)
        assert "MAMLRegressor" in learner._repr_html_()


# -- warnings and errors that keep callers from measuring the wrong thing ------------------------


@pytest.mark.parametrize("scoring", ["r2", "neg_mean_squared_error", "accuracy", "roc_auc"])
def test_scorers_that_do_not_adapt_are_refused_with_the_name_of_the_one_that_does(scoring, way):
    tasks = way("regression" if scoring in ("r2", "neg_mean_squared_error") else "classification")
    with pytest.raises(NotAdaptedError, match="task_scorer"):
        cross_val_score(
            tasks.estimator(), tasks.X, tasks.y, scoring=scoring, cv=GroupKFold(3),
            error_score="raise", **tasks.passed(),
        )  # fmt: skip
    search = GridSearchCV(
        tasks.estimator(), {"alpha": [0.1]}, scoring=scoring, cv=GroupKFold(3), error_score="raise"
    )
    with pytest.raises(NotAdaptedError, match="task_scorer"):
        tasks.fit(search)


def test_scorers_that_do_not_adapt_are_refused_on_other_tasks_than_the_adapted():
    tasks = Columned("regression")
    model = tasks.estimator().fit(tasks.X, tasks.y)
    model.adapt(tasks.X, tasks.y)
    assert_finite(get_scorer("r2")(model, tasks.X, tasks.y), ())
    with pytest.raises(ValueError, match="task_scorer"):
        get_scorer("r2")(model, tasks.X.assign(task="another"), tasks.y)


def test_plain_scorers_work_where_all_rows_are_one_task():
    X, y, _ = make_rows("regression", n_tasks=1, n_rows=40)
    with pytest.warns(SingleTaskWarning):
        scores = cross_val_score(MAMLRegressor(**SMALL), X, y, scoring="r2", error_score="raise")
    assert_finite(scores, (5,))


def score_folds(estimator, tool, kind, X, y, cv, **passed):
    """Score an estimator with one of scikit-learn's tools."""
    if tool == "search":
        search = GridSearchCV(estimator, {"steps": [1]}, cv=cv, refit=False, error_score="raise")
        named = passed.get("params", passed)
        return search.fit(X, y, **named).cv_results_["mean_test_score"]
    scoring = None
    if tool == "task_scorer":
        scoring = task_scorer("r2" if kind == "regression" else "accuracy")
    return cross_val_score(estimator, X, y, cv=cv, scoring=scoring, error_score="raise", **passed)


@pytest.mark.parametrize("tool", ["cross_val_score", "search", "task_scorer"])
def test_folds_that_cut_tasks_give_a_warning_that_says_what_they_measure(tool, either):
    either = type(either)(either.kind, n_rows=30)  # no fold has but one row of a task
    cv = KFold(3, shuffle=True, random_state=0)
    passed = either.passed() if either.column is None else {}
    with pytest.warns(SeenTaskWarning, match="not new tasks") as caught:
        scores = score_folds(
            either.estimator(), tool, either.kind, either.X, either.y, cv, **passed
        )
    assert_finite(scores)
    assert len(caught) == 3  # one for each fold
    message = str(caught[0].message)
    for words in ("GroupKFold", "new rows of known tasks", "task "):
        assert words in message


def test_scores_of_the_tasks_that_were_trained_on_give_no_warning(either):
    """Train scores of group folds are honest about what they are: warnings are errors here."""
    found = cross_validate(
        either.estimator(), either.X, either.y, cv=GroupKFold(3), return_train_score=True,
        error_score="raise", **either.passed(),
    )  # fmt: skip
    assert_finite(found["train_score"], (3,))
    named = {} if either.column else {"groups": either.groups}
    model = either.estimator().fit(either.X, either.y, **named)
    assert_finite(either.score(model), ())
    search = GridSearchCV(
        either.estimator(), {"steps": [1]}, cv=GroupKFold(3), return_train_score=True,
        error_score="raise",
    )  # fmt: skip
    assert_finite(either.fit(search).cv_results_["mean_train_score"], (1,))


def test_shuffled_rows_of_the_tasks_that_were_trained_on_give_no_warning():
    X, y, groups = make_rows("regression")
    order = np.random.default_rng(0).permutation(len(X))
    model = fit_one("regression")
    assert_finite(model.score(X[order], y[order], groups=groups[order]), ())


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_fit_without_tasks_warns_once_and_names_both_ways_out(kind):
    X, y, _ = make_rows(kind)
    cls = MAMLRegressor if kind == "regression" else MAMLClassifier
    with pytest.warns(SingleTaskWarning) as caught:
        cls(**SMALL).fit(X, y)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    for words in ("one task", "groups", "enable_metadata_routing=True", "task_column"):
        assert words in message
    assert caught[0].filename == __file__  # it points at the call of fit


@pytest.mark.parametrize("tool", ["search", "cross_val_score", "task_scorer"])
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_groups_that_reach_the_splitter_alone_trigger_the_warning(tool, in_pipeline):
    X, y, groups = make_rows("regression")
    model = MAMLRegressor(**SMALL)
    if in_pipeline:
        model = make_pipeline(StandardScaler(), model)
    if tool == "search":
        search = GridSearchCV(
            model,
            {"mamlregressor__steps" if in_pipeline else "steps": [1]},
            cv=GroupKFold(3),
            refit=False,
        )
        with pytest.warns(SingleTaskWarning, match=r"metadata_routing.*task_column") as caught:
            search.fit(X, y, groups=groups)
    else:
        scoring = task_scorer("r2") if tool == "task_scorer" else None
        with pytest.warns(SingleTaskWarning, match=r"metadata_routing.*task_column") as caught:
            cross_val_score(model, X, y, groups=groups, cv=GroupKFold(3), scoring=scoring)
    assert len(caught) == 3  # one for each fold


def test_fits_that_name_their_tasks_and_pools_of_classes_give_no_warning():
    """Warnings are errors in this suite; the control is the test above."""
    X, y, groups = make_rows("classification")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MAMLClassifier(**SMALL).fit(X, y, groups=groups)
        MAMLClassifier(**SMALL).fit(as_list("classification"))
        MAMLClassifier(**SMALL, task_column=0).fit(
            np.column_stack([np.unique(groups, return_inverse=True)[1], X]), y
        )
        MAMLClassifier(**SMALL, n_ways=2).fit(X, y)
        FewShotClassifier(steps=2).fit(X, y)
        FewShotClassifier(fit_one("classification")).fit(X, y)
        MAMLClassifier(**SMALL).fit(X, y, groups=groups).adapt(X[:5], y[:5]).predict(X)
    assert [str(w.message) for w in caught] == []


def test_pools_of_classes_can_be_searched():
    X, _, _ = make_rows("classification", n_rows=20)
    y = np.arange(len(X)) % 12  # twelve classes
    clf = MAMLClassifier(**SMALL, n_ways=3, n_shots=1, n_queries=2)
    scores = cross_val_score(clf, X, y, cv=GroupKFold(3), groups=y, error_score="raise")
    assert_finite(scores, (3,))
    search = GridSearchCV(clf, {"alpha": [0.01, 1.0]}, cv=GroupKFold(3), error_score="raise")
    search.fit(X, y, groups=y)
    assert_finite(search.cv_results_["mean_test_score"], (2,))
