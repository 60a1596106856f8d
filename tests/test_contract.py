"""The calls that the library promises, spelt in every way that it promises."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from networks import Dropped, Normed, Residual
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import metrics
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import accuracy_score, get_scorer, r2_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNet
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
from sklearn_maml.datasets import SinusoidTasks, load_omniglot, make_sinusoid_tasks
from sklearn_maml.exceptions import NotAdaptedError, SingleTaskWarning

N_TASKS, N_ROWS, N_FEATURES = 8, 14, 3
NEW = 1000  # number of the first new task
LABELS = np.array(["hop", "run", "sit"])
SMALL = {
    "hidden_layer_sizes": (8,),
    "activation": "tanh",
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 2,
    "meta_batch_size": 4,
    "max_iter": 12,
    "random_state": 0,
}


MODULES = {"mlp": None, "residual": Residual, "batch norm": Normed}


# -- data ----------------------------------------------------------------------------------------


def tasks_of(kind, n_tasks=N_TASKS, n_rows=N_ROWS, seed=0, n_outputs=None):
    """Rows of `n_tasks` tasks one after another, their targets and task numbers.

    Tasks are numbered from 0 for seed 0, those of other seeds (new tasks) from `NEW`.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, N_FEATURES))
    groups = np.repeat(np.arange(n_tasks), n_rows)
    slopes = rng.normal(size=(n_tasks, N_FEATURES, n_outputs or 1))
    y = np.einsum("nf,nfo->no", X, slopes[groups]) + 0.5
    if seed != 0:
        groups = groups + NEW
    if kind == "regression":
        return X, (y if n_outputs else y[:, 0]), groups
    classes = np.digitize(y[:, 0], [-0.3, 1.2])
    # every class in every task
    for task in np.unique(groups):
        rows = np.flatnonzero(groups == task)
        classes[rows[:6]] = [0, 1, 2, 0, 1, 2]
    return X, LABELS[classes], groups


def ragged(X, y, groups, seed=0, least=1, most=9):
    """Keep between `least` and `most` rows of every task."""
    rng = np.random.default_rng(seed)
    keep = []
    for task in np.unique(groups):
        rows = np.flatnonzero(groups == task)
        keep.append(rng.permutation(rows)[: rng.integers(least, most + 1)])
    keep = np.concatenate(keep)
    return X[keep], y[keep], groups[keep]


def as_list(X, y, groups):
    return [(X[groups == task], y[groups == task]) for task in np.unique(groups)]


def as_stack(X, y, groups):
    n_tasks = len(np.unique(groups))
    return X.reshape(n_tasks, -1, X.shape[1]), y.reshape(n_tasks, -1, *y.shape[1:])


def as_fixed(X, y, groups, n_support=6):
    """Tasks of four parts: support rows and the rest of each task."""
    return [
        (a[:n_support], b[:n_support], a[n_support:], b[n_support:])
        for a, b in as_list(X, y, groups)
    ]


def state_of(model):
    """Copy of everything that is meta-learned."""
    states = [model.module_.state_dict(), model._learner.state_dict()]
    return [{name: t.clone() for name, t in state.items()} for state in states]


def assert_same_state(model, before):
    for now, then in zip(state_of(model), before, strict=True):
        assert now.keys() == then.keys()
        for name in now:
            assert torch.equal(now[name], then[name]), name


@pytest.fixture(scope="module")
def fitted():
    """Meta-fitted estimators by kind and module, fitted once."""
    cache = {}

    def get(kind="regression", module="mlp", **params):
        key = (kind, module, *sorted(params.items()))
        if key not in cache:
            data = "regression" if kind == "regression" else "classification"
            X, y, groups = tasks_of(data)
            cls = MAMLRegressor if kind == "regression" else MAMLClassifier
            ways = {"n_ways": 3} if kind == "episodes" else {}
            model = cls(**{**SMALL, "module": MODULES[module], **ways, **params})
            cache[key] = model.fit(X, y, groups=groups)
        return copy.deepcopy(cache[key])

    return get


@pytest.fixture
def reg(fitted):
    return fitted("regression")


@pytest.fixture
def clf(fitted):
    return fitted("classification")


@pytest.fixture
def episodes(fitted):
    """Meta-fitted on three-way episodes: labels are local to a task."""
    return fitted("episodes")


@pytest.fixture(params=["regression", "classification", "episodes"])
def kind(request):
    return request.param


def new_tasks(kind, **options):
    data = "regression" if kind == "regression" else "classification"
    return tasks_of(data, **{"seed": 1, **options})


def outputs(model, X, groups=None):
    """The most informative prediction."""
    named = {} if groups is None else {"groups": groups}
    if hasattr(model, "predict_proba"):
        return model.predict_proba(X, **named)
    return model.predict(X, **named)


# -- section 2, as written -----------------------------------------------------------------------


def test_the_calls_of_the_contract_work_as_written():
    X, y, task_id = tasks_of("regression")
    X_new, y_new, g_new = tasks_of("regression", seed=1)
    X_support, y_support, X_query = X_new[:5], y_new[:5], X_new[5:9]
    X_s, y_s, g_s = X_new[::2], y_new[::2], g_new[::2]
    X_q, g_q = X_new[1::2], g_new[1::2]

    reg = MAMLRegressor(update_rule="sgd", alpha=0.01, beta=1e-3, steps=1, random_state=0)
    reg.set_params(max_iter=5)
    assert reg.fit(X, y, groups=task_id) is reg
    assert reg.adapt(X_support, y_support) is reg
    assert reg.predict(X_query).shape == (4,)

    assert reg.adapt(X_s, y_s, groups=g_s) is reg
    assert reg.predict(X_q, groups=g_q).shape == (len(X_q),)
    assert np.isfinite(reg.score(X, y, groups=task_id))

    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            reg, {"alpha": [0.01, 0.1], "beta": [1e-3, 1e-2], "steps": [1, 5]}, cv=GroupKFold(3)
        ).fit(X, y, groups=task_id)
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()
        pipe = make_pipeline(StandardScaler(), reg).fit(X, y, groups=task_id)
    adapted = adapt(pipe, X_support, y_support)
    assert type(adapted) is Pipeline
    assert adapted.predict(X_query).shape == (4,)
    with pytest.raises(NotFittedError):  # as NotAdaptedError is
        pipe.predict(X_query)
    learner = FewShotRegressor(prior=pipe)
    scores = cross_val_score(learner, X_new[:14], y_new[:14])
    assert scores.shape == (5,)
    assert np.isfinite(scores).all()


NAMES = {
    "module", "alpha", "beta", "steps", "adapt_steps", "meta_gradient", "update_rule", "adapted",
    "n_shots", "n_queries", "meta_batch_size", "max_iter", "early_stopping",
    "validation_fraction", "n_iter_no_change", "optimizer", "callbacks", "device", "task_column",
    "warm_start", "random_state", "verbose",
}  # fmt: skip


def test_the_promised_parameter_names_exist():
    assert NAMES | {"normalize_y"} <= set(MAMLRegressor().get_params())
    assert NAMES | {"n_ways"} <= set(MAMLClassifier().get_params())


def test_fit_sets_the_promised_attributes(reg, clf):
    for model in (reg, clf):
        assert isinstance(model.module_, nn.Module)
        assert isinstance(model.net_, NeuralNet)
        assert model.history_ is model.net_.history
        assert "train_loss" in model.history_[-1]
        assert model.n_iter_ == SMALL["max_iter"]
        assert model.n_features_in_ == N_FEATURES
        assert model.n_tasks_ == N_TASKS
        assert_array_equal(model.tasks_, np.arange(N_TASKS))
        assert not hasattr(model, "feature_names_in_")
    assert_array_equal(clf.classes_, LABELS)


def test_feature_names_are_those_of_the_frame():
    X, y, groups = tasks_of("regression")
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    reg = MAMLRegressor(**SMALL).fit(frame, y, groups=groups)
    assert list(reg.feature_names_in_) == ["a", "b", "c"]
    reg.adapt(frame[:5], y[:5])
    with pytest.raises(ValueError, match="feature names"):
        reg.predict(frame[["c", "b", "a"]])


def test_meta_training_pays_on_new_tasks():
    X, y, groups = tasks_of("regression", n_tasks=40)
    X_new, y_new, g_new = tasks_of("regression", n_tasks=40, seed=1)
    short, long = (
        MAMLRegressor(**{**SMALL, "max_iter": n})
        .fit(X, y, groups=groups)
        .score(X_new, y_new, g_new)
        for n in (1, 160)
    )
    assert long > short + 0.1


# -- the four spellings, and distributions -------------------------------------------------------


SPELLINGS = ["groups", "column", "index", "position", "object", "polars", "list", "stack"]


def spell(spelling, X, y, groups):
    """Tasks in a spelling: the arguments of fit, and the task_column it needs."""
    names = ["a", "b", "c"]
    ids = np.array([f"{'new ' if g >= NEW else ''}{'pqrstuvw'[g % NEW]}" for g in groups])
    frame = pd.DataFrame(X, columns=names)
    if spelling == "groups":
        return (X, y, groups), None
    if spelling == "column":
        frame.insert(1, "patient", ids)
        return (frame, y), "patient"
    if spelling == "index":
        frame.index = pd.MultiIndex.from_arrays(
            [np.arange(len(X)), ids], names=["visit", "patient"]
        )
        return (frame, pd.Series(y, index=frame.index)), "patient"
    if spelling == "position":
        return (np.column_stack([X[:, :1], groups, X[:, 1:]]), y), 1
    if spelling == "object":
        table = np.empty((len(X), 4), dtype=object)
        table[:, :3], table[:, 3] = X, ids
        return (table, y), -1
    if spelling == "polars":
        frame = pl.DataFrame(X, schema=names).with_columns(pl.Series("patient", ids))
        return (frame, pl.Series(y)), "patient"
    if spelling == "list":
        return (as_list(X, y, groups),), None
    return as_stack(X, y, groups), None


@pytest.fixture(scope="module")
def reference():
    """Predictions and score where tasks are spelt with groups."""
    return {kind: fit_adapt_predict(kind, "groups") for kind in ("regression", "classification")}


def fit_adapt_predict(kind, spelling):
    cls = MAMLRegressor if kind == "regression" else MAMLClassifier
    seen, column = spell(spelling, *new_tasks(kind, seed=0))
    support, _ = spell(spelling, *new_tasks(kind))
    query, _ = spell(spelling, *new_tasks(kind, seed=2))
    model = cls(**SMALL, task_column=column).fit(*seen)
    if spelling == "groups":
        predicted = outputs(model.adapt(*support), query[0], query[2])
    elif spelling == "list":
        predicted = outputs(model.adapt(*support), [rows for rows, _ in query[0]])
        assert isinstance(predicted, list)
        predicted = np.concatenate(predicted)
    elif spelling == "stack":
        predicted = outputs(model.adapt(*support), query[0])
        assert predicted.shape[:2] == query[0].shape[:2]
        predicted = predicted.reshape(-1, *predicted.shape[2:])
    else:
        predicted = outputs(model.adapt(*support), query[0])
    return predicted, model.score(*query), model


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_every_spelling_of_the_same_tasks_gives_the_same_numbers(spelling, kind, reference):
    predicted, score, model = fit_adapt_predict(kind, spelling)
    assert_array_equal(predicted, reference[kind][0])
    assert score == reference[kind][1]
    assert model.n_tasks_ == N_TASKS
    ids = "pqrstuvw" if spelling in ("column", "index", "object", "polars") else range(N_TASKS)
    assert list(model.tasks_) == list(ids)


def test_the_tasks_that_groups_name_matter(reference):
    """The control of the test above: other tasks, other numbers."""
    X, y, groups = tasks_of("regression")
    other = MAMLRegressor(**SMALL).fit(X, y, groups=np.roll(groups, 5))
    X_new, y_new, g_new = tasks_of("regression", seed=1)
    other.adapt(X_new, y_new, groups=g_new)
    X_q, _, g_q = tasks_of("regression", seed=2)
    assert not np.allclose(other.predict(X_q, groups=g_q), reference["regression"][0])


@pytest.mark.parametrize("spelling", ["column", "list", "stack"])
def test_pooled_classes_spelt_in_other_ways_give_the_same_episodes(spelling, fitted):
    X, y, groups = tasks_of("classification")
    seen, column = spell(spelling, X, y, groups)
    model = MAMLClassifier(**SMALL, n_ways=3, task_column=column).fit(*seen)
    for name, parameter in fitted("episodes").module_.state_dict().items():
        assert torch.equal(model.module_.state_dict()[name], parameter)


def test_rows_may_be_interleaved(kind, fitted):
    X, y, groups = new_tasks(kind, seed=0)
    mixed = np.argsort(np.arange(len(X)) % N_ROWS, kind="stable")  # first rows of all tasks first
    model = clone(fitted(kind)).fit(X[mixed], y[mixed], groups=groups[mixed])
    X, y, groups = new_tasks(kind)
    assert_allclose(
        outputs(model.adapt(X[:5], y[:5]), X[5:9]),
        outputs(fitted(kind).adapt(X[:5], y[:5]), X[5:9]),
        rtol=1e-8,
    )


class Always:
    """A task distribution that returns the same tasks over and over."""

    def __init__(self, tasks):
        self.tasks = tasks
        self.asked, self.n_tasks = [], []

    def sample(self, n_tasks, random_state=None):
        self.asked.append(random_state)
        self.n_tasks.append(n_tasks)
        return [self.tasks[j % len(self.tasks)] for j in range(n_tasks)]


def test_a_distribution_and_a_list_that_describe_the_same_episodes_agree(kind, fitted):
    # as many tasks as a meta-batch has: each update sees them all
    tasks = as_fixed(*new_tasks(kind, n_tasks=4, seed=0))
    options = {"early_stopping": False}
    if kind == "regression":
        options["normalize_y"] = False
    if kind == "episodes":  # the outputs are assigned at random in every episode
        tasks = tasks[:1]
        options["meta_batch_size"] = 1
    listed = clone(fitted(kind)).set_params(**options).fit(tasks)
    drawn = clone(fitted(kind)).set_params(**options).fit(Always(tasks))
    X, y, _ = new_tasks(kind)
    if kind == "episodes":
        assert np.isfinite(outputs(drawn.adapt(X[:6], y[:6]), X[6:9])).all()
    else:
        assert_allclose(
            outputs(drawn.adapt(X[:6], y[:6]), X[6:9]),
            outputs(listed.adapt(X[:6], y[:6]), X[6:9]),
            rtol=1e-8,
        )


def test_a_distribution_is_asked_for_fresh_tasks_reproducibly():
    tasks = as_list(*tasks_of("regression"))
    first, again = Always(tasks), Always(tasks)
    for distribution in (first, again):
        MAMLRegressor(**SMALL).fit(distribution)
    assert first.asked == again.asked
    assert len(set(first.asked)) == len(first.asked)
    # for many updates at a time, and once for the tasks to validate on
    assert sum(first.n_tasks[1:]) >= SMALL["max_iter"] * SMALL["meta_batch_size"]


def test_a_distribution_can_be_fitted_and_scored():
    distribution = SinusoidTasks()
    reg = MAMLRegressor(**{**SMALL, "max_iter": 60, "hidden_layer_sizes": (40, 40)})
    reg.fit(distribution)
    assert reg.n_iter_ == 60
    assert np.isfinite(reg.score(distribution))
    X, y, _ = make_sinusoid_tasks(n_tasks=1, random_state=3)
    assert reg.adapt(X, y).predict(X).shape == y.shape


def test_tasks_of_four_parts_are_kept_as_given(kind, fitted):
    X, y, groups = new_tasks(kind)
    model = fitted(kind)
    tasks = as_fixed(X, y, groups)
    supports = [task[:2] for task in tasks]
    model.adapt(supports)
    predicted = model.predict([task[2] for task in tasks])
    metric = r2_score if kind == "regression" else accuracy_score
    by_hand = metric(np.concatenate([t[3] for t in tasks]), np.concatenate(predicted))
    assert model.score(tasks) == pytest.approx(by_hand, rel=1e-12)


def test_a_distribution_may_be_ragged(kind, fitted):
    X, y, groups = new_tasks(kind, seed=0)
    keep = np.arange(len(X)) % N_ROWS < 6 + groups  # two rows of each class at least
    tasks = as_list(X[keep], y[keep], groups[keep])
    assert len({len(y) for _, y in tasks}) > 2
    model = clone(fitted(kind)).set_params(n_queries=1).fit(Always(tasks))
    assert model.n_iter_ == SMALL["max_iter"]
    assert np.isfinite(model.history_[-1, "train_loss"])


@pytest.mark.parametrize("estimator", [MAMLRegressor, MAMLClassifier])
def test_predictions_of_views_are_those_of_copies(estimator):
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(80, 3)), np.repeat(np.arange(10), 8)
    y = np.digitize(X[:, 0], [-0.5, 0.5])
    model = estimator(update_rule="gaussian-head", hidden_layer_sizes=(4,), max_iter=2)
    model.set_params(random_state=0).fit(X, y, groups=task)
    packed = np.zeros(80, dtype=[("x", float, 3), ("flag", np.int8)])
    packed["x"] = X
    views = {"rows": X[::-1], "columns": X[:, ::-1], "fields": packed["x"]}
    for name, view in views.items():
        model.adapt(view, y, groups=task)
        got, expected = (outputs(model, rows, task) for rows in (view, view.copy()))
        assert_array_equal(got, expected, err_msg=name)


@pytest.mark.parametrize("library", [pd, pl], ids=["pandas", "polars"])
def test_lists_of_frames_keep_their_names(library, fitted):
    X, y, groups = tasks_of("regression")
    tasks = [
        (library.DataFrame(dict(zip("abc", rows.T, strict=True))), targets)
        for rows, targets in as_list(X, y, groups)
    ]
    reg = MAMLRegressor(**SMALL).fit(tasks)
    assert list(reg.feature_names_in_) == ["a", "b", "c"]
    predicted = reg.adapt(tasks).predict([rows for rows, _ in tasks])
    assert_array_equal(
        np.concatenate(predicted),
        fitted("regression").adapt(X, y, groups=groups).predict(X, groups=groups),
    )
    with pytest.raises(ValueError, match="feature names"):
        reg.predict([rows[["c", "b", "a"]] for rows, _ in tasks])


def test_nested_lists_spell_stacks_and_query_sets(reg):
    X, y, groups = tasks_of("regression")
    stack = as_stack(X, y, groups)
    model = MAMLRegressor(**SMALL).fit(stack[0].tolist(), stack[1].tolist())
    assert model.n_tasks_ == N_TASKS
    expected = reg.adapt(*stack).predict(stack[0])
    tasks = [(rows.tolist(), targets.tolist()) for rows, targets in as_list(X, y, groups)]
    predicted = model.adapt(tasks).predict([rows for rows, _ in tasks])
    assert_array_equal(np.stack(predicted), expected)


def test_an_index_of_the_rows_plays_no_part(reg):
    X, y, groups = tasks_of("regression")
    order = np.random.default_rng(0).permutation(len(X))
    frame = pd.DataFrame(X, index=order)
    labelled = MAMLRegressor(**SMALL).fit(
        frame, pd.Series(y), groups=pd.Series(groups, index=order[::-1])
    )
    assert_array_equal(
        labelled.adapt(frame[:5], pd.Series(y, index=order)[:5]).predict(frame),
        reg.adapt(X[:5], y[:5]).predict(X),
    )


def test_tasks_that_are_split_again_differ_from_tasks_of_four_parts():
    X, y, groups = tasks_of("regression")
    resplit = MAMLRegressor(**SMALL).fit(as_list(X, y, groups))
    fixed = MAMLRegressor(**SMALL).fit(as_fixed(X, y, groups))
    assert not np.allclose(
        resplit.adapt(X[:5], y[:5]).predict(X), fixed.adapt(X[:5], y[:5]).predict(X)
    )


@pytest.mark.parametrize(
    "ids",
    [
        list("wsq"),
        [30, -2, 7],
        [True, False],
        [2.5, 0.5, 1.5],
        np.array(["2021-03-01", "2020-01-01", "2022-05-05"], dtype="datetime64[D]"),
        np.array(["b", "a", "c"], dtype=object),
        np.array(["b", 3, (1, 2)], dtype=object),
    ],
    ids=["str", "int", "bool", "float", "datetime", "object", "mixed"],
)
@pytest.mark.parametrize("container", [np.asarray, pd.Series, lambda g: np.asarray(g)[:, None]])
def test_task_ids_may_be_of_any_type(ids, container, reg):
    X, y, groups = tasks_of("regression", n_tasks=len(ids))
    named = np.empty(len(groups), dtype=np.asarray(ids).dtype)
    for j, task in enumerate(ids):
        for row in np.flatnonzero(groups == j):
            named[row] = task
    one_by_one = np.concatenate(
        [adapt(reg, X[groups == j][:5], y[groups == j][:5]).predict(X[groups == j]) for j in
         range(len(ids))]
    )  # fmt: skip
    support = np.arange(len(X)) % N_ROWS < 5
    reg.adapt(X[support], y[support], groups=container(named[support]))
    assert_allclose(reg.predict(X, groups=container(named)), one_by_one, rtol=1e-9)


@pytest.mark.parametrize(
    "contain",
    [
        list,
        np.ndarray.tolist,
        pl.Series,
        pd.Categorical,
        lambda ids: pd.Series(ids, dtype="category"),
        lambda ids: pd.Series(ids, dtype="Int64"),
        lambda ids: pd.Series(ids).astype("string"),
    ],
    ids=["list", "tolist", "polars", "Categorical", "category", "Int64", "string"],
)
def test_groups_may_be_in_any_container(contain, reg):
    X, y, groups = tasks_of("regression", seed=1)
    expected = reg.adapt(X, y, groups=groups).predict(X, groups=groups)
    contained = contain(groups)
    assert_array_equal(reg.adapt(X, y, groups=contained).predict(X, groups=contained), expected)
    frame = pd.DataFrame(X, columns=list("abc"))
    if not isinstance(contained, pl.Series):
        column = MAMLRegressor(**SMALL, task_column="task").fit(frame.assign(task=contained), y)
        assert column.n_tasks_ == N_TASKS


def test_tasks_may_be_ragged_in_rows(kind, fitted):
    X, y, groups = ragged(*new_tasks(kind, seed=0, n_tasks=12), least=6, most=14)
    model = clone(fitted(kind)).set_params(n_shots=1, early_stopping=True)
    if kind != "regression":
        # two rows at least of each class that a task has
        keep = np.array(
            [np.sum((groups == g) & (y == label)) > 1 for g, label in zip(groups, y, strict=True)]
        )
        X, y, groups = X[keep], y[keep], groups[keep]
    model.fit(X, y, groups=groups)
    assert np.isfinite(model.score(X, y, groups=groups))
    assert len(model.history_) == 1
    assert np.isfinite(model.history_[-1, "valid_loss"])


def test_tasks_may_be_ragged_in_classes():
    X, y, groups = tasks_of("classification")
    lacks = {0: "hop", 1: "run", 2: "sit"}
    keep = np.array([lacks.get(g) != label for g, label in zip(groups, y, strict=True)])
    clf = MAMLClassifier(**SMALL).fit(X[keep], y[keep], groups=groups[keep])
    assert_array_equal(clf.classes_, LABELS)
    assert 0 <= clf.score(X[keep], y[keep], groups=groups[keep]) <= 1
    pairs = MAMLClassifier(**SMALL, n_ways=3).fit(X[keep], y[keep], groups=groups[keep])
    assert 0 <= pairs.score(X[keep], y[keep], groups=groups[keep]) <= 1


# -- adapt: labels -------------------------------------------------------------------------------


LABEL_TYPES = {
    "int": np.array([0, 1, 2]),
    "negative int": np.array([-7, 3, 100]),
    "uint8": np.array([0, 7, 255], dtype=np.uint8),
    "str": np.array(["a", "b", "c"]),
    "digits": np.array(["10", "100", "9"]),
    "object": np.array(["x", "y", "z"], dtype=object),
    "float": np.array([0.0, 1.0, 2.0]),
}


@pytest.mark.parametrize(
    ("name", "container"),
    [
        *((name, "array") for name in LABEL_TYPES),
        *(
            (name, container)
            for name in ("negative int", "str")
            for container in ("list", "series", "column", "categorical")
        ),
    ],
)
@pytest.mark.parametrize("n_ways", [None, 3])
def test_labels_may_be_of_any_type(name, container, n_ways):
    labels = LABEL_TYPES[name]
    X, y, groups = tasks_of("classification")
    codes = np.searchsorted(LABELS, y)
    expected = MAMLClassifier(**SMALL, n_ways=n_ways).fit(X, y, groups=groups)
    expected = expected.adapt(X[:6], y[:6]).predict(X)

    def contain(codes):
        values = labels[codes]
        return {
            "array": lambda: values,
            "list": values.tolist,
            "series": lambda: pd.Series(values),
            "column": lambda: values[:, None],
            "categorical": lambda: pd.Series(pd.Categorical(values)),
        }[container]()

    clf = MAMLClassifier(**SMALL, n_ways=n_ways)
    if container == "column":
        from sklearn.exceptions import DataConversionWarning

        with pytest.warns(DataConversionWarning):
            clf.fit(X, contain(codes), groups=groups)
        with pytest.warns(DataConversionWarning):
            clf.adapt(X[:6], contain(codes[:6]))
    else:
        clf.fit(X, contain(codes), groups=groups)
        assert_array_equal(clf.classes_, labels)
        clf.adapt(X[:6], contain(codes[:6]))
    predicted = clf.predict(X)
    assert_array_equal(predicted, labels[np.searchsorted(LABELS, expected)])
    if container == "array":
        assert predicted.dtype == labels.dtype


@pytest.mark.parametrize(
    "contain",
    [np.asarray, pd.Series, lambda y: pd.Series(y, dtype="boolean"), pl.Series],
    ids=["array", "pandas", "nullable", "polars"],
)
@pytest.mark.parametrize("n_ways", [None, 2])
def test_labels_may_be_bool(contain, n_ways):
    X, y, groups = tasks_of("classification")
    clf = MAMLClassifier(**SMALL, n_ways=n_ways).fit(X, contain(y == "sit"), groups=groups)
    assert_array_equal(clf.classes_, [False, True])
    predicted = clf.adapt(X[:6], contain(y[:6] == "sit")).predict(X)
    assert predicted.dtype == bool
    assert set(predicted) <= {False, True}
    assert clf.decision_function(X).shape == (len(X),)


def test_labels_may_be_nullable_integers():
    X, y, groups = tasks_of("classification")
    codes = pd.Series(np.searchsorted(LABELS, y), dtype="Int64")
    clf = MAMLClassifier(**SMALL).fit(X, codes, groups=groups)
    assert_array_equal(clf.classes_, [0, 1, 2])
    assert set(clf.adapt(X[:6], codes[:6]).predict(X)) <= {0, 1, 2}


@pytest.mark.parametrize("n_ways", [None, 3])
def test_labels_may_come_in_any_order(n_ways, fitted):
    clf = fitted("classification" if n_ways is None else "episodes")
    X, y, _ = tasks_of("classification", seed=1)
    order = np.array([4, 2, 0, 5, 3, 1])
    assert list(y[order][:3]) != sorted(y[order][:3])
    expected = clf.adapt(X[:6], y[:6]).predict_proba(X)
    assert_allclose(clf.adapt(X[order], y[order]).predict_proba(X), expected, rtol=1e-9)
    assert_array_equal(clf.classes_, LABELS)


def test_adapt_learns_the_labels_it_is_given_whatever_they_are(episodes):
    """New labels, whose sorted order differs from that of the old ones."""
    X = np.array([[2.0, 0, 0], [-2.0, 0, 0], [2.1, 0, 0], [-2.1, 0, 0]])
    episodes.set_params(adapt_steps=200)
    for labels in (["low", "high"], ["high", "low"], [5, 3], [3, 5]):
        y = np.array(labels)[[0, 1, 0, 1]]
        assert_array_equal(episodes.adapt(X, y).predict(X), y)
        assert_array_equal(episodes.classes_, np.unique(y))


@pytest.mark.parametrize("labels", [["run"], ["sit", "hop"]])
def test_adapting_to_fewer_classes_of_shared_labels_works(labels, clf):
    X, y, _ = tasks_of("classification", seed=1)
    some = np.isin(y[:14], labels)
    clf.adapt(X[:14][some], y[:14][some])
    p = clf.predict_proba(X)
    assert p.shape == (len(X), 3)
    assert_allclose(p.sum(1), 1)
    assert_array_equal(clf.classes_, LABELS)
    clf.set_params(adapt_steps=300, alpha=0.5).adapt(X[:14][some], y[:14][some])
    assert set(clf.predict(X)) <= set(labels)


@pytest.mark.parametrize("labels", [["run"], ["sit", "hop"]])
def test_adapting_to_fewer_classes_than_ways_predicts_these_only(labels, episodes):
    X, y, _ = tasks_of("classification", seed=1)
    some = np.isin(y[:14], labels)
    episodes.adapt(X[:14][some], y[:14][some])
    assert_array_equal(episodes.classes_, np.unique(labels))
    p = episodes.predict_proba(X)
    assert p.shape == (len(X), len(labels))
    assert_allclose(p.sum(1), 1)
    assert set(episodes.predict(X)) <= set(labels)


def test_more_classes_than_the_head_has_is_an_error_that_says_so(episodes, clf):
    X, _, _ = tasks_of("classification", seed=1)
    with pytest.raises(ValueError, match=r"4 classes.*n_ways=3"):
        episodes.adapt(X[:8], np.arange(8) % 4)
    with pytest.raises(ValueError, match=r"not seen in fit: .*'swim'"):
        clf.adapt(X[:2], ["run", "swim"])


def test_tasks_with_classes_of_their_own_are_adapted_to_in_one_call(episodes):
    X, y, groups = tasks_of("classification", n_tasks=3)
    # task 0 has three classes, task 1 two, task 2 one; no class is in two tasks
    local = np.array([f"{g}{label}" for g, label in zip(groups, y, strict=True)])
    local[(groups == 1) & (y == "run")] = "1hop"
    local[groups == 2] = "2"
    proba = []
    for task in range(3):
        rows = groups == task
        proba.append(adapt(episodes, X[rows][:6], local[rows][:6]).predict_proba(X[rows]))
    support = np.arange(len(X)) % N_ROWS < 6
    episodes.adapt(X[support], local[support], groups=groups[support])
    assert_array_equal(episodes.classes_, np.unique(local))
    p = episodes.predict_proba(X, groups=groups)
    assert p.shape == (len(X), 6)
    for task, columns in enumerate([[0, 1, 2], [3, 4], [5]]):
        rows = groups == task
        assert_allclose(p[rows][:, columns], proba[task], rtol=1e-9)
        assert (np.delete(p[rows], columns, axis=1) == 0).all()
    predicted = episodes.predict(X, groups=groups)
    assert all(label.startswith(str(g)) for label, g in zip(predicted, groups, strict=True))
    scores = episodes.decision_function(X, groups=groups)
    assert_array_equal(episodes.classes_[scores.argmax(1)], predicted)
    assert np.isfinite(scores).all()
    assert_array_equal(np.isneginf(episodes.predict_log_proba(X, groups=groups)), p == 0)


def test_a_pool_of_classes_needs_no_groups():
    X, y = load_omniglot(return_X_y=True)
    clf = MAMLClassifier(**{**SMALL, "max_iter": 2}, n_ways=5, n_shots=1, n_queries=3)
    clf.fit(X[:600], y[:600])
    assert clf.module_(torch.zeros(1, X.shape[1], dtype=next(clf.module_.parameters()).dtype)).shape
    support = np.arange(600, 700, 20)
    clf.adapt(X[support], y[support])
    assert_array_equal(clf.classes_, np.unique(y[support]))
    assert 0 <= clf.score(X[600:900], y[600:900]) <= 1


# -- adapt: targets ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("spelling", ["groups", "list", "stack"])
def test_targets_may_have_several_columns(n_outputs, spelling):
    X, y, groups = tasks_of("regression", n_outputs=n_outputs)
    seen, _ = spell(spelling, X, y, groups)
    reg = MAMLRegressor(**SMALL).fit(*seen)
    predicted = reg.adapt(X[:5], y[:5]).predict(X[5:9])
    assert predicted.shape == (4, n_outputs)
    assert np.isfinite(reg.score(X, y, groups=groups))
    if spelling == "stack":
        predicted = reg.adapt(*seen).predict(seen[0])
        assert predicted.shape == (N_TASKS, N_ROWS, n_outputs)
    if spelling == "list":
        predicted = reg.adapt(*seen).predict([rows for rows, _ in seen[0]])
        assert [p.shape for p in predicted] == [(N_ROWS, n_outputs)] * N_TASKS


def test_one_column_of_targets_gives_the_numbers_of_a_vector():
    X, y, groups = tasks_of("regression")
    flat = MAMLRegressor(**SMALL).fit(X, y, groups=groups).adapt(X[:5], y[:5])
    column = MAMLRegressor(**SMALL).fit(X, y[:, None], groups=groups).adapt(X[:5], y[:5, None])
    assert_array_equal(column.predict(X), flat.predict(X)[:, None])


def test_each_output_is_learned_in_its_own_units():
    X, y, groups = tasks_of("regression", n_outputs=2)
    y = y * [1, 1e4] + [0, -3e5]
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    reg.set_params(adapt_steps=300).adapt(X[:14], y[:14])
    assert r2_score(y[:14, 0], reg.predict(X[:14])[:, 0]) > 0.5
    assert r2_score(y[:14, 1], reg.predict(X[:14])[:, 1]) > 0.5


def test_frames_of_targets_are_accepted():
    X, y, groups = tasks_of("regression", n_outputs=2)
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    expected = reg.adapt(X[:5], y[:5]).predict(X)
    for frame in (pd.DataFrame(y, columns=["u", "v"]), pl.DataFrame(y, schema=["u", "v"])):
        other = MAMLRegressor(**SMALL).fit(X, frame, groups=groups)
        assert_allclose(other.adapt(X[:5], frame[:5]).predict(X), expected, rtol=1e-9)


# -- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_have_the_dtype_of_the_rows(dtype, kind, fitted):
    X, y, groups = new_tasks(kind, seed=0)
    X = X.astype(dtype)
    model = clone(fitted(kind)).fit(X, y, groups=groups)
    assert next(model.module_.parameters()).dtype == getattr(torch, dtype.__name__)
    model.adapt(X[:6], y[:6])
    if kind == "regression":
        assert model.predict(X).dtype == dtype
    else:
        assert model.predict_proba(X).dtype == dtype
        assert model.predict_log_proba(X).dtype == dtype
        assert model.decision_function(X).dtype == dtype
    # rows of another dtype are converted to that of the fit
    other = np.float64 if dtype == np.float32 else np.float32
    assert_allclose(outputs(model, X.astype(other)), outputs(model, X), rtol=1e-5, atol=1e-6)
    assert outputs(model, X.astype(other)).dtype == dtype


def test_whole_numbers_are_features(reg):
    X, y, groups = tasks_of("regression")
    whole = np.round(3 * X).astype(int)
    model = MAMLRegressor(**SMALL).fit(whole, y, groups=groups)
    same = MAMLRegressor(**SMALL).fit(whole.astype(float), y, groups=groups)
    assert_array_equal(
        model.adapt(whole[:5], y[:5]).predict(whole), same.adapt(whole[:5], y[:5]).predict(whole)
    )


def memory_mapped(a, tmp_path):
    path = tmp_path / f"{id(a)}.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


def read_only(a):
    a = np.array(a)
    a.flags.writeable = False
    return a


LAYOUTS = {
    "fortran": np.asfortranarray,
    "read-only": read_only,
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "columns": lambda a: np.repeat(a, 2, axis=1)[:, ::2] if a.ndim == 2 else a,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")) if a.dtype.kind in "fi" else a,
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "memory-mapped"])
def test_the_layout_of_arrays_in_memory_does_not_matter(layout, kind, fitted, tmp_path):
    lay = LAYOUTS.get(layout, lambda a: memory_mapped(a, tmp_path))
    X, y, groups = new_tasks(kind, seed=0)
    weight = np.linspace(1, 2, len(X))
    expected = fitted(kind).adapt(X, y, groups=groups, sample_weight=weight)
    laid = [lay(a) for a in (X, y, groups, weight)]
    kept = [a.copy() for a in laid]
    model = clone(fitted(kind)).fit(*laid[:3])
    model.adapt(laid[0], laid[1], groups=laid[2], sample_weight=laid[3])
    assert_array_equal(outputs(model, laid[0], laid[2]), outputs(expected, X, groups))
    assert model.score(*laid[:3]) == expected.score(X, y, groups)
    for now, then in zip(laid, kept, strict=True):
        assert_array_equal(now, then)  # arguments are not written to


def test_read_only_stacks_are_accepted():
    X, y = as_stack(*tasks_of("regression"))
    reg = MAMLRegressor(**SMALL).fit(read_only(X), read_only(y))
    assert_array_equal(
        reg.adapt(read_only(X), read_only(y)).predict(read_only(X)),
        MAMLRegressor(**SMALL).fit(X, y).adapt(X, y).predict(X),
    )


class Convolved(nn.Module):
    def __init__(self, out_features):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, out_features)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


def test_rows_may_be_images():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(48, 1, 4, 4)).astype(np.float32)
    y = np.tile(["a", "b"], 24)
    X[y == "b"] += 1
    groups = np.repeat(np.arange(4), 12)
    clf = MAMLClassifier(**{**SMALL, "module": Convolved}).fit(X, y, groups=groups)
    assert clf.adapt(X[:4], y[:4]).predict(X).shape == (48,)
    assert_array_equal(clf.predict(list(X)), clf.predict(X))  # a list of rows
    stacked = MAMLClassifier(**{**SMALL, "module": Convolved})
    stacked.fit(X.reshape(4, 12, 1, 4, 4), y.reshape(4, 12))
    assert_array_equal(
        stacked.adapt(X[:4], y[:4]).predict_proba(X), clf.adapt(X[:4], y[:4]).predict_proba(X)
    )


# -- adapt: batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
def test_adapting_to_a_batch_of_tasks_equals_one_by_one(module, even, kind, fitted):
    model = fitted(kind, module, steps=5)
    X, y, groups = new_tasks(kind, n_tasks=320)
    query, _, g_q = new_tasks(kind, n_tasks=320, n_rows=6, seed=2)
    if even:
        some = np.arange(len(X)) % N_ROWS < 5
        X_s, y_s, g_s = X[some], y[some], groups[some]
    else:
        # batch statistics of one row are those of no spread
        X_s, y_s, g_s = ragged(X, y, groups, least=1 if module != "batch norm" else 2)
        assert len(np.unique(np.bincount(g_s))) > 4
    rng = np.random.default_rng(0)
    mixed = rng.permutation(len(X_s))
    model.adapt(X_s[mixed], y_s[mixed], groups=g_s[mixed])
    order = rng.permutation(len(query))
    batched = model.predict(query[order], groups=g_q[order])
    many = outputs(model, query[order], g_q[order])
    for task in NEW + np.arange(0, 320, 4 if module == "mlp" else 16):
        rows = g_s[mixed] == task
        one = adapt(model, X_s[mixed][rows], y_s[mixed][rows])
        asked = g_q[order] == task
        assert_array_equal(one.predict(query[order][asked]), batched[asked]) if (
            kind != "regression"
        ) else None
        own = np.isin(model.classes_, one.classes_) if kind != "regression" else slice(None)
        got = many[asked][:, own] if kind != "regression" else many[asked]
        assert_allclose(got, outputs(one, query[order][asked]), rtol=1e-9, atol=1e-13)


def test_adapted_tasks_differ_from_each_other(kind, fitted):
    """The control of the test above."""
    model = fitted(kind)
    X, y, groups = new_tasks(kind)
    model.adapt(X, y, groups=groups)
    first, second = (outputs(model, X[:4], np.full(4, NEW + task)) for task in (0, 1))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("module", MODULES)
def test_a_prediction_does_not_depend_on_the_rows_predicted_with_it(module, kind, fitted):
    model = fitted(kind, module)
    X, y, groups = ragged(*new_tasks(kind), least=3)
    model.adapt(X, y, groups=groups)
    query, _, g_q = ragged(*new_tasks(kind, seed=2), least=1)
    together = outputs(model, query, g_q)
    alone = np.concatenate(
        [outputs(model, query[j : j + 1], g_q[j : j + 1]) for j in range(len(query))]
    )
    assert_allclose(alone, together, rtol=1e-10, atol=1e-13)
    order = np.random.default_rng(0).permutation(len(query))
    assert_allclose(outputs(model, query[order], g_q[order]), together[order], rtol=1e-10)
    # far-away neighbours
    crowd = np.concatenate([query, 100 + 50 * query])
    crowded = outputs(model, crowd, np.concatenate([g_q, g_q]))[: len(query)]
    assert_allclose(crowded, together, rtol=1e-10, atol=1e-13)


def test_very_many_rows_of_one_task_are_predicted_like_few(reg):
    X, y, groups = tasks_of("regression")
    reg.adapt(X, y, groups=groups)
    few = np.random.default_rng(0).normal(size=(50, N_FEATURES))
    many = np.tile(few, (200, 1))
    tasks = np.r_[np.zeros(len(many), dtype=int), np.arange(N_TASKS)]
    predicted = reg.predict(np.r_[many, X[:N_TASKS]], groups=tasks)
    expected = reg.predict(few, groups=np.zeros(50, dtype=int))
    assert_allclose(predicted[: len(many)], np.tile(expected, 200), rtol=1e-10)
    assert_allclose(
        predicted[-N_TASKS:], reg.predict(X[:N_TASKS], groups=np.arange(N_TASKS)), rtol=1e-10
    )


@pytest.mark.parametrize("module", MODULES)
def test_adapt_never_changes_what_was_meta_learned(module, kind, fitted):
    model = fitted(kind, module)
    before = state_of(model)
    X, y, groups = new_tasks(kind)
    model.adapt(X[:6], y[:6])
    outputs(model, X)
    model.set_params(adapt_steps=20).adapt(X, y, groups=groups)
    outputs(model, X, groups)
    model.score(X, y, groups=groups)
    task_scores(model, X, y, groups=groups)
    assert_same_state(model, before)


def test_adapt_does_not_change_learned_rates():
    X, y, groups = tasks_of("regression")
    reg = MAMLRegressor(**{**SMALL, "update_rule": "meta-sgd"}).fit(X, y, groups=groups)
    before = state_of(reg)
    assert any(name.startswith("rule.") for name in before[1])
    reg.adapt(X, y, groups=groups).predict(X, groups=groups)
    assert_same_state(reg, before)


@pytest.mark.parametrize("module", MODULES)
def test_adapting_again_gives_the_same_bits_whatever_came_between(module, kind, fitted):
    model = fitted(kind, module)
    X, y, groups = new_tasks(kind)
    query = new_tasks(kind, seed=2)[0]
    first = outputs(model.adapt(X[:6], y[:6]), query)
    model.adapt(X, y, groups=groups)
    outputs(model, X, groups)
    model.adapt(1e3 * X[:14], y[:14])
    model.score(X, y, groups=groups)
    assert_array_equal(outputs(model.adapt(X[:6], y[:6]), query), first)


def test_a_new_adapt_replaces_the_one_before(reg):
    X, y, groups = tasks_of("regression", seed=1)
    reg.adapt(X, y, groups=groups)
    reg.adapt(X[:14], y[:14], groups=np.full(14, 99))
    assert reg.predict(X[:3], groups=[99] * 3).shape == (3,)
    with pytest.raises(ValueError, match="not adapted to"):
        reg.predict(X[:3], groups=[NEW] * 3)


def test_a_new_fit_forgets_the_adapted_task(reg):
    X, y, groups = tasks_of("regression")
    reg.adapt(X[:5], y[:5])
    reg.fit(X, y, groups=groups)
    with pytest.raises(NotAdaptedError, match="adapt"):
        reg.predict(X)


def test_fit_without_tasks_learns_from_all_the_rows_at_once(kind):
    X, y, _ = new_tasks(kind, n_tasks=1, n_rows=40)
    cls = MAMLRegressor if kind == "regression" else MAMLClassifier
    with pytest.warns(SingleTaskWarning):
        model = cls(**SMALL).fit(X, y)
    predicted = outputs(model, X)
    assert_array_equal(outputs(model.adapt(X, y), X), predicted)
    assert not np.array_equal(outputs(model.adapt(X[:20], y[:20]), X), predicted)


# -- the adapt function --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted_pipe():
    X, y, groups = tasks_of("regression")
    with sklearn.config_context(enable_metadata_routing=True):
        return make_pipeline(StandardScaler(), MAMLRegressor(**SMALL)).fit(
            7 + 5 * X, y, groups=groups
        )


@pytest.fixture
def pipe(fitted_pipe):
    return copy.deepcopy(fitted_pipe)


def test_adapt_of_a_pipeline_transforms_the_rows(pipe):
    X, y, _ = tasks_of("regression", seed=1)
    X = 7 + 5 * X
    adapted = adapt(pipe, X[:5], y[:5])
    scaled = pipe[0].transform(X)
    by_hand = copy.deepcopy(pipe[-1]).adapt(scaled[:5], y[:5]).predict(scaled)
    assert_array_equal(adapted.predict(X), by_hand)
    assert type(adapted) is type(pipe)


def test_adapt_of_a_pipeline_leaves_it_untouched(pipe):
    X, y, groups = tasks_of("regression", seed=1)
    before = state_of(pipe[-1])
    steps = list(pipe.steps)
    adapted = adapt(pipe, X[:5], y[:5])
    with pytest.raises(NotFittedError):  # as NotAdaptedError is
        pipe.predict(X)
    assert pipe.steps == steps
    assert_same_state(pipe[-1], before)
    predicted = adapted.predict(X)
    # an adapted one can be adapted again, and stays what it was
    again = adapt(adapted, X[20:25], y[20:25])
    assert not np.allclose(again.predict(X), predicted)
    assert_array_equal(adapted.predict(X), predicted)
    # settings of the copy are its own
    alpha = pipe[-1].alpha
    adapted.set_params(mamlregressor__alpha=9.0)
    assert pipe[-1].alpha == alpha
    assert pipe.get_params()["mamlregressor__alpha"] == alpha
    # the pipeline itself may be adapted to many tasks too
    many = adapt(pipe, X, y, groups=groups)
    assert many[-1].predict(pipe[0].transform(X), groups=groups).shape == y.shape


def test_adapt_of_an_estimator_leaves_it_untouched(kind, fitted):
    model = fitted(kind)
    X, y, groups = new_tasks(kind)
    model.adapt(X[:6], y[:6])
    expected = outputs(model, X)
    attributes = dict(vars(model))
    other = adapt(model, X, y, groups=groups)
    assert type(other) is type(model)
    assert other is not model
    assert vars(model) == attributes
    assert_array_equal(outputs(model, X), expected)
    assert_array_equal(
        outputs(other, X, groups), outputs(fitted(kind).adapt(X, y, groups=groups), X, groups)
    )


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_an_adapted_pipeline_predicts_for_many_tasks(kind, routing, fitted):
    X, y, groups = new_tasks(kind, seed=0)
    X_new, y_new, g_new = new_tasks(kind)
    model = clone(fitted(kind))
    with sklearn.config_context(enable_metadata_routing=routing):
        pipe = Pipeline([("scale", StandardScaler()), ("maml", model)])
        pipe.fit(X, y, **{"groups" if routing else "maml__groups": groups})
        adapted = adapt(pipe, X_new, y_new, groups=g_new)
        predicted = adapted.predict(X_new, groups=g_new)
        if kind == "classification":
            p = adapted.predict_proba(X_new, groups=g_new)
            assert_array_equal(adapted.classes_[p.argmax(1)], predicted)
        if kind == "classification" and routing:
            assert adapted.decision_function(X_new, groups=g_new).shape == p.shape
    scaled = pipe[0].transform(X_new)
    by_hand = copy.copy(model).adapt(scaled, y_new, groups=g_new).predict(scaled, groups=g_new)
    assert_array_equal(predicted, by_hand)


def test_the_module_of_the_user_is_left_as_it_was():
    module = nn.Sequential(
        nn.Linear(N_FEATURES, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
    )
    before = {name: t.clone() for name, t in module.state_dict().items()}
    X, y, groups = tasks_of("regression")
    reg = MAMLRegressor(**{**SMALL, "module": module}).fit(X, y, groups=groups)
    reg.adapt(X[:5], y[:5]).predict(X)
    assert reg.module is module
    assert reg.module_ is not module
    assert module.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in module.parameters())
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name])
    assert not torch.equal(reg.module_.state_dict()["0.weight"].float(), before["0.weight"])


def test_adapt_takes_sample_weight(pipe):
    X, y, _ = tasks_of("regression", seed=1)
    weighted = adapt(pipe, X[:5], y[:5], sample_weight=[1, 1, 1, 0, 0])
    assert_allclose(weighted.predict(X), adapt(pipe, X[:3], y[:3]).predict(X), rtol=1e-9)


def test_adapt_refuses_what_holds_no_meta_learned_model(pipe):
    X, y, _ = tasks_of("regression", seed=1)
    for thing in (StandardScaler(), nn.Linear(2, 1), FewShotRegressor(), 3):
        with pytest.raises(TypeError, match=f"no meta-learned model in {type(thing).__name__}"):
            adapt(thing, X, y)
    with pytest.raises(NotFittedError):
        adapt(MAMLRegressor(), X, y)
    with pytest.raises(NotFittedError):
        adapt(clone(pipe), X, y)


def fitted_search(pipe_or_model, grid):
    X, y, groups = tasks_of("regression")
    with sklearn.config_context(enable_metadata_routing=True):
        return GridSearchCV(pipe_or_model, grid, cv=GroupKFold(2)).fit(X, y, groups=groups)


def fitted_search_in_pipeline(model):
    X, y, groups = tasks_of("regression")
    search = GridSearchCV(clone(model), {"alpha": [0.01, 0.1]}, cv=GroupKFold(2))
    with sklearn.config_context(enable_metadata_routing=True):
        return make_pipeline(StandardScaler(), search).fit(X, y, groups=groups)


PRIORS = {
    "estimator": lambda reg, pipe: reg,
    "pipeline": lambda reg, pipe: pipe,
    "search": lambda reg, pipe: fitted_search(clone(reg), {"alpha": [0.01, 0.1]}),
    "search of a pipeline": lambda reg, pipe: fitted_search(
        clone(pipe), {"mamlregressor__alpha": [0.01, 0.1]}
    ),
    "pipeline of a search": lambda reg, pipe: fitted_search_in_pipeline(reg),
    "frozen": lambda reg, pipe: FrozenEstimator(reg),
    "frozen pipeline": lambda reg, pipe: FrozenEstimator(pipe),
    "pipeline of frozen": lambda reg, pipe: Pipeline(
        [("scale", pipe[0]), ("maml", FrozenEstimator(pipe[-1]))]
    ),
    "few-shot": lambda reg, pipe: FewShotRegressor(reg).fit(
        *[a[:5] for a in tasks_of("regression", seed=3)[:2]]
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_any_fitted_model_can_be_the_prior(name, reg, pipe):
    prior = PRIORS[name](reg, pipe)
    X, y, _ = tasks_of("regression", seed=1)
    adapted = adapt(prior, X[:5], y[:5])
    expected = adapted.predict(X)
    assert not np.allclose(expected, adapt(prior, X[5:10], y[5:10]).predict(X))
    learner = FewShotRegressor(prior).fit(X[:5], y[:5])
    assert_array_equal(learner.predict(X), expected)
    # other rates than those of the prior
    one = FewShotRegressor(prior, alpha=0.3, steps=7).fit(X[:5], y[:5])
    assert not np.allclose(one.predict(X), expected)
    assert_array_equal(adapt(prior, X[:5], y[:5]).predict(X), expected)
    scores = cross_val_score(learner, X[:14], y[:14], cv=3)
    assert np.isfinite(scores).all()


def test_a_frozen_prior_gives_the_numbers_of_the_prior(reg, pipe):
    X, y, _ = tasks_of("regression", seed=1)
    for prior in (reg, pipe):
        assert_array_equal(
            adapt(FrozenEstimator(prior), X[:5], y[:5]).predict(X),
            adapt(prior, X[:5], y[:5]).predict(X),
        )


# -- FewShot estimators --------------------------------------------------------------------------


def test_a_few_shot_fit_is_an_adapt(kind, fitted):
    model = fitted(kind)
    before = state_of(model)
    X, y, _ = new_tasks(kind)
    cls = FewShotRegressor if kind == "regression" else FewShotClassifier
    learner = cls(model)
    assert learner.fit(X[:6], y[:6]) is learner
    assert_array_equal(outputs(learner, X), outputs(adapt(model, X[:6], y[:6]), X))
    # labels or values that score well on the rows learned from
    assert learner.score(X[:6], y[:6]) == pytest.approx(
        (r2_score if kind == "regression" else accuracy_score)(y[:6], learner.predict(X[:6]))
    )
    assert_same_state(model, before)
    with pytest.raises(NotAdaptedError):
        model.predict(X)
    if kind != "regression":
        assert_array_equal(learner.classes_, LABELS)
        assert_allclose(np.exp(learner.predict_log_proba(X)), learner.predict_proba(X))
        assert_array_equal(
            learner.classes_[learner.decision_function(X).argmax(1)], learner.predict(X)
        )


def test_few_shot_steps_and_alpha_override_those_of_the_prior(reg):
    X, y, _ = tasks_of("regression", seed=1)
    learner = FewShotRegressor(reg, alpha=0.05, steps=9).fit(X[:5], y[:5])
    expected = copy.deepcopy(reg).set_params(alpha=0.05, steps=9).adapt(X[:5], y[:5]).predict(X)
    assert_array_equal(learner.predict(X), expected)
    assert (reg.alpha, reg.steps, reg.adapt_steps) == (SMALL["alpha"], SMALL["steps"], None)
    assert_array_equal(
        FewShotRegressor(reg, steps=0).fit(X[:5], y[:5]).predict(X),
        FewShotRegressor(reg, steps=0).fit(X[7:9], y[7:9]).predict(X),
    )


def test_adapt_of_a_few_shot_estimator_keeps_its_rates(reg):
    X, y, _ = tasks_of("regression", seed=1)
    learner = FewShotRegressor(reg, alpha=0.3, steps=9)
    before_fit = adapt(learner, X[:5], y[:5]).predict(X)
    learner.fit(X[:5], y[:5])
    assert_array_equal(before_fit, learner.predict(X))
    assert_array_equal(adapt(learner, X[:5], y[:5]).predict(X), learner.predict(X))
    with pytest.raises(TypeError, match="no meta-learned model"):
        adapt(FewShotRegressor(), X, y)


@pytest.mark.parametrize("name", ["estimator", "pipeline"])
def test_a_search_over_parameters_of_the_prior_leaves_it_as_it_was(name, reg, pipe):
    prior = PRIORS[name](reg, pipe)
    key = {"pipeline": "mamlregressor__"}.get(name, "")
    X, y, _ = tasks_of("regression", seed=1)
    before = repr(prior.get_params())
    search = GridSearchCV(FewShotRegressor(prior), {f"prior__{key}alpha": [0.01, 0.1]}, cv=3)
    search.fit(X[:14], y[:14])
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    assert repr(prior.get_params()) == before
    assert reg.alpha == pipe[-1].alpha == SMALL["alpha"]


def test_few_shot_estimators_work_in_searches_over_one_task(reg, pipe):
    X, y, _ = tasks_of("regression", seed=1, n_rows=30)
    X, y = X[:30], y[:30]
    search = GridSearchCV(FewShotRegressor(reg), {"alpha": [0, 0.1], "steps": [1, 5]}, cv=3)
    search.fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) == 3  # alpha=0 twice
    assert search.best_estimator_.prior is reg
    predicted = cross_val_predict(make_pipeline(StandardScaler(), FewShotRegressor(reg)), X, y)
    assert np.isfinite(predicted).all()
    priors = [FrozenEstimator(reg), FrozenEstimator(pipe), None]
    search = GridSearchCV(FewShotRegressor(), {"prior": priors}, cv=3).fit(X, y)
    assert len(set(search.cv_results_["mean_test_score"])) == 3


def test_few_shot_classifiers_work_in_cross_validation(clf, episodes):
    X, y, _ = tasks_of("classification", seed=1, n_rows=30)
    for prior in (clf, episodes):
        scores = cross_val_score(FewShotClassifier(prior), X[:30], y[:30], cv=3, scoring="accuracy")
        assert np.isfinite(scores).all()
    # scikit-learn numbers the labels before it asks for probabilities
    p = cross_val_predict(FewShotClassifier(episodes), X[:30], y[:30], cv=3, method="predict_proba")
    assert_allclose(p.sum(1), 1)


def test_without_a_prior_few_shot_estimators_learn_from_a_seeded_random_start():
    X, y, _ = tasks_of("regression", n_rows=40)
    first, again, other = (
        FewShotRegressor(random_state=seed).fit(X[:30], y[:30]).predict(X[30:40])
        for seed in (0, 0, 1)
    )
    assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert r2_score(y[30:40], first) > 0.5
    X, y, _ = tasks_of("classification", n_rows=60)
    assert FewShotClassifier(random_state=0).fit(X[:50], y[:50]).score(X[50:60], y[50:60]) > 0.5


def test_a_prior_with_a_task_column_takes_rows_with_the_column():
    X, y, groups = tasks_of("regression")
    frame = pd.DataFrame(X, columns=list("abc")).assign(task=groups)
    prior = MAMLRegressor(**SMALL, task_column="task").fit(frame, y)
    plain = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    new, y_new, _ = tasks_of("regression", n_tasks=1, seed=1)
    rows = pd.DataFrame(new, columns=list("abc")).assign(task="new")
    learner = FewShotRegressor(prior).fit(rows[:5], y_new[:5])
    assert_array_equal(learner.predict(rows), adapt(plain, new[:5], y_new[:5]).predict(new))
    assert np.isfinite(cross_val_score(learner, rows, y_new, cv=3)).all()


# -- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "episodes"])
@pytest.mark.parametrize("module", ["mlp", "residual"])
def test_probabilities_decisions_and_predictions_agree(kind, module, fitted):
    clf = fitted(kind, module)
    X, y, groups = tasks_of("classification", seed=1)
    clf.adapt(X, y, groups=groups)
    p = clf.predict_proba(X, groups=groups)
    scores = clf.decision_function(X, groups=groups)
    predicted = clf.predict(X, groups=groups)
    assert p.shape == scores.shape == (len(X), 3)
    assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert ((p > 0) & (p < 1)).all()
    assert_array_equal(clf.classes_[p.argmax(1)], predicted)
    assert_array_equal(clf.classes_[scores.argmax(1)], predicted)
    assert_allclose(np.exp(scores) / np.exp(scores).sum(1, keepdims=True), p, rtol=1e-9)  # logits
    assert_allclose(clf.predict_log_proba(X, groups=groups), np.log(p))
    assert len(set(predicted)) > 1


@pytest.mark.parametrize("n_ways", [None, 2])
def test_the_decision_between_two_classes_is_one_number(n_ways):
    X, y, groups = tasks_of("classification")
    y = np.where(y == "sit", "yes", "no")
    clf = MAMLClassifier(**SMALL, n_ways=n_ways).fit(X, y, groups=groups).adapt(X[:6], y[:6])
    scores, p = clf.decision_function(X), clf.predict_proba(X)
    assert scores.shape == (len(X),)
    assert_array_equal(clf.predict(X), clf.classes_[(scores > 0).astype(int)])
    assert_allclose(1 / (1 + np.exp(-scores)), p[:, 1], rtol=1e-9)


# -- score ---------------------------------------------------------------------------------------


def constant_tasks(kind):
    """Tasks whose rows are all alike, so that it does not matter how they are split."""
    X, y, _ = new_tasks(kind, n_tasks=20, n_rows=6)
    return np.repeat(X[::6], 6, axis=0), np.repeat(y[::6], 6), NEW + np.repeat(np.arange(20), 6)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_score_adapts_each_task_and_pools_the_query_rows(kind, fitted):
    model = fitted(kind)
    X, y, groups = constant_tasks(kind)
    predicted = adapt(model, X, y, groups=groups).predict(X, groups=groups)
    metric = r2_score if kind == "regression" else accuracy_score
    assert model.score(X, y, groups=groups) == pytest.approx(metric(y, predicted), rel=1e-9)
    assert model.score(X, y, groups) == model.score(X, y, groups=groups)


def test_score_is_the_same_every_time_and_leaves_the_adapted_task(kind, fitted):
    model = fitted(kind)
    X, y, groups = new_tasks(kind)
    model.adapt(X[:6], y[:6])
    expected = outputs(model, X)
    first = model.score(X, y, groups=groups)
    assert first == model.score(X, y, groups=groups)
    assert_array_equal(outputs(model, X), expected)


def test_score_after_adapting_to_one_task_is_that_of_its_predictions(kind, fitted):
    model = fitted(kind)
    X, y, _ = new_tasks(kind)
    weight = np.linspace(0, 1, 8)
    model.adapt(X[:6], y[:6])
    metric = r2_score if kind == "regression" else accuracy_score
    predicted = model.predict(X[6:14])
    assert model.score(X[6:14], y[6:14]) == metric(y[6:14], predicted)
    assert model.score(X[6:14], y[6:14], sample_weight=weight) == metric(
        y[6:14], predicted, sample_weight=weight
    )


def test_the_weights_of_a_score_are_those_of_its_query_rows(fitted):
    reg = fitted("regression")
    X, y, groups = constant_tasks("regression")
    weight = 1.0 + groups % NEW
    predicted = adapt(reg, X, y, groups=groups).predict(X, groups=groups)
    assert reg.score(X, y, groups=groups, sample_weight=weight) == pytest.approx(
        r2_score(y, predicted, sample_weight=weight), rel=1e-9
    )


def test_n_shots_sets_the_support_rows_of_a_score(reg):
    X, y, groups = tasks_of("regression", seed=1)
    for n_shots in (1, 4, 13):
        table = task_scores(reg.set_params(n_shots=n_shots), X, y, groups=groups)
        assert (table.n_queries == N_ROWS - n_shots).all()
    scores = {
        n: reg.set_params(n_shots=n, adapt_steps=100).score(X, y, groups=groups) for n in (1, 12)
    }
    assert scores[12] > scores[1]


REGRESSION_SCORES = ["r2", "neg_root_mean_squared_error", "neg_mean_absolute_error"]
CLASS_SCORES = ["accuracy", "roc_auc_ovr", "neg_log_loss", "f1_macro", "balanced_accuracy"]
METRICS = {
    "r2": lambda y, p, _: r2_score(y, p),
    "neg_root_mean_squared_error": lambda y, p, _: -metrics.root_mean_squared_error(y, p),
    "neg_mean_absolute_error": lambda y, p, _: -metrics.mean_absolute_error(y, p),
    "accuracy": lambda y, p, _: accuracy_score(y, p),
    "roc_auc_ovr": lambda y, _, p: metrics.roc_auc_score(y, p, multi_class="ovr"),
    "neg_log_loss": lambda y, _, p: -metrics.log_loss(y, p),
    "f1_macro": lambda y, p, _: metrics.f1_score(y, p, average="macro"),
    "balanced_accuracy": lambda y, p, _: metrics.balanced_accuracy_score(y, p),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("regression", name) for name in REGRESSION_SCORES),
        *(("classification", name) for name in CLASS_SCORES),
        *(("episodes", name) for name in CLASS_SCORES),
    ],
)
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_a_task_scorer_scores_adapted_tasks(kind, name, average, fitted):
    model = fitted(kind)
    X, y, groups = new_tasks(kind, n_rows=20)
    tasks = as_fixed(X, y, groups, n_support=8)
    if kind != "regression":  # every class on both sides
        order = [0, 1, 2, 6, 7, 8, 3, 4, 5]
        tasks = [
            (a[order[:6]], b[order[:6]], np.r_[a[order[6:]], a[9:]], np.r_[b[order[6:]], b[9:]])
            for a, b in as_list(X, y, groups)
        ]
    # tasks of unequal size, so that the two averages differ
    tasks = [
        (a, b, c[: 4 + j], d[: 4 + j]) for j, (a, b, c, d) in enumerate(tasks)
    ]  # fmt: skip
    by_task = []
    for X_s, y_s, X_q, y_q in tasks:
        one = adapt(model, X_s, y_s)
        by_task.append((y_q, one.predict(X_q), outputs(one, X_q)))
    metric = METRICS[name]
    if average == "micro":
        by_hand = metric(*(np.concatenate(part) for part in zip(*by_task, strict=True)))
    else:
        by_hand = np.mean([metric(*task) for task in by_task])
    scorer = task_scorer(name, average=average)
    assert scorer(model, tasks) == pytest.approx(by_hand, rel=1e-7)


def test_the_two_averages_of_a_task_scorer_differ(reg):
    X, y, groups = ragged(*tasks_of("regression", seed=1), least=4, most=14)
    micro, macro = (
        task_scorer("neg_mean_absolute_error", average=average)(reg, X, y, groups=groups)
        for average in ("micro", "macro")
    )
    assert micro != pytest.approx(macro)


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("name", CLASS_SCORES)
def test_renaming_local_labels_does_not_change_a_score(name, average, episodes):
    X, y, groups = tasks_of("classification", seed=1, n_rows=20)
    local = np.array([f"{label} of {g}" for label, g in zip(y, groups, strict=True)])
    scorer = task_scorer(name, average=average, n_shots=2)
    same, renamed = (scorer(episodes, X, labels, groups=groups) for labels in (y, local))
    assert renamed == pytest.approx(same, rel=1e-9)


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "neg_brier_score"])
def test_scorers_of_two_classes_take_episodes_of_two_classes(name, average):
    X, y, groups = tasks_of("classification")
    clf = MAMLClassifier(**SMALL, n_ways=2, n_shots=2).fit(X, y == "sit", groups=groups)
    X, y, groups = tasks_of("classification", seed=1)
    tasks = [
        (a[:6], b[:6] == "sit", a[6:], np.r_[True, False, b[8:] == "sit"])
        for a, b in as_list(X, y, groups)
    ]
    by_task = [(d, adapt(clf, a, b).predict_proba(c)[:, 1]) for a, b, c, d in tasks]
    metric = {
        "roc_auc": metrics.roc_auc_score,
        "average_precision": metrics.average_precision_score,
        "neg_brier_score": lambda y, p: -metrics.brier_score_loss(y, p),
    }[name]
    if average == "micro":
        by_hand = metric(*(np.concatenate(part) for part in zip(*by_task, strict=True)))
    else:
        by_hand = np.mean([metric(*task) for task in by_task])
    assert task_scorer(name, average=average)(clf, tasks) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("n_ways", [None, 2])
@pytest.mark.parametrize("response", ["predict_proba", "decision_function"])
def test_a_task_scorer_respects_the_positive_label(n_ways, response):
    X, y, groups = tasks_of("classification")
    y = np.where(y == "sit", "yes", "no")
    clf = MAMLClassifier(**SMALL, n_ways=n_ways, n_shots=2).fit(X, y, groups=groups)
    X, y, groups = tasks_of("classification", seed=1)
    tasks = as_fixed(X, np.where(y == "sit", "yes", "no"), groups)
    predicted = np.concatenate([adapt(clf, a, b).predict_proba(c)[:, 0] for a, b, c, _ in tasks])
    truth = np.concatenate([d for *_, d in tasks])
    scorer = metrics.make_scorer(
        metrics.average_precision_score, response_method=response, pos_label="no"
    )
    by_hand = metrics.average_precision_score(truth == "no", predicted)
    assert task_scorer(scorer)(clf, tasks) == pytest.approx(by_hand)
    assert by_hand != pytest.approx(metrics.average_precision_score(truth == "no", -predicted))


def test_task_scores_take_probability_scorers_where_labels_are_local(episodes):
    X, y, groups = tasks_of("classification", seed=1, n_rows=20)
    local = np.array([f"{label} of {g}" for label, g in zip(y, groups, strict=True)])
    table = task_scores(episodes, X, local, groups=groups, scoring="neg_log_loss", n_shots=2)
    assert np.isfinite(table.after).all()
    assert np.isfinite(table.before).all()


def test_a_task_scorer_splits_as_score_does(kind, fitted):
    model = fitted(kind)
    X, y, groups = new_tasks(kind)
    name = "r2" if kind == "regression" else "accuracy"
    assert task_scorer(name)(model, X, y, groups=groups) == pytest.approx(
        model.score(X, y, groups=groups)
    )


def test_a_task_scorer_reads_its_options(reg):
    X, y, groups = tasks_of("regression", seed=1)

    def score(**options):
        return task_scorer("r2", **options)(reg, X, y, groups=groups)

    assert score() == score()
    assert score(n_shots=2) != score(n_shots=8)
    assert score(random_state=1) == score(random_state=1)
    assert score(random_state=1) != score(random_state=2)
    assert score(n_repeats=3) != score()
    repeated = task_scores(reg, X, y, groups=groups, n_shots=4, n_repeats=3)
    assert (repeated.n_queries == 3 * (N_ROWS - 4)).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"average": "median"}, "average"),
        ({"n_shots": -1}, "n_shots"),
        ({"n_repeats": 1.5}, "n_repeats"),
    ],
)
def test_a_task_scorer_checks_its_options(options, match):
    with pytest.raises(ValueError, match=match):
        task_scorer("r2", **options)


def test_a_task_scorer_refuses_an_unknown_name_at_once():
    with pytest.raises(ValueError, match="r3"):
        task_scorer("r3")


def test_a_task_scorer_takes_a_scorer_and_a_callable(reg):
    X, y, groups = tasks_of("regression", seed=1)
    expected = task_scorer("neg_mean_absolute_error")(reg, X, y, groups=groups)

    def mean_absolute_error(estimator, X, y):
        return -np.abs(estimator.predict(X) - y).mean()

    for scoring in (get_scorer("neg_mean_absolute_error"), mean_absolute_error):
        assert task_scorer(scoring)(reg, X, y, groups=groups) == pytest.approx(expected)


def test_a_task_scorer_scores_pipelines_and_searches(pipe):
    X, y, groups = tasks_of("regression", seed=1)
    scaled = pipe[0].transform(X)
    expected = task_scorer("r2")(pipe[-1], scaled, y, groups=groups)
    assert task_scorer("r2")(pipe, X, y, groups=groups) == expected
    search = fitted_search(clone(pipe), {"mamlregressor__alpha": [0.01, 0.1]})
    expected = task_scorer("r2")(search.best_estimator_, X, y, groups=groups)
    assert task_scorer("r2")(search, X, y, groups=groups) == expected


def test_task_scores_tell_each_task_before_and_after(kind, fitted):
    model = fitted(kind, adapt_steps=20)
    X, y, groups = new_tasks(kind, n_rows=20)
    tasks = as_fixed(X, y, groups, n_support=8)
    tasks = [(a, b, c[: 4 + j], d[: 4 + j]) for j, (a, b, c, d) in enumerate(tasks)]
    table = task_scores(model, tasks)
    assert set(table) == {"task", "before", "after", "n_queries"}
    assert_array_equal(table.task, np.arange(N_TASKS))
    assert_array_equal(table.n_queries, 4 + np.arange(N_TASKS))
    metric = METRICS["neg_root_mean_squared_error" if kind == "regression" else "accuracy"]
    untouched = copy.copy(model).set_params(adapt_steps=0)
    for when, prior in (("before", untouched), ("after", model)):
        by_hand = [
            metric(y_q, adapt(prior, X_s, y_s).predict(X_q), None) for X_s, y_s, X_q, y_q in tasks
        ]
        assert_allclose(table[when], by_hand)
    assert table.after.mean() > table.before.mean()
    assert pd.DataFrame(table).shape == (N_TASKS, 4)


def test_task_scores_name_the_tasks_and_take_any_scorer(reg):
    X, y, groups = tasks_of("regression", seed=1)
    names = np.array(list("hgfedcba"))[groups - NEW]
    table = task_scores(reg, X, y, groups=names, scoring="r2", n_shots=5, random_state=0)
    assert_array_equal(table.task, list("abcdefgh"))
    assert (table.after <= 1).all()
    assert task_scorer("r2", n_shots=5, random_state=0, average="macro")(
        reg, X, y, groups=names
    ) == pytest.approx(table.after.mean())


# -- sample weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["mlp", "residual"])
def test_integer_weights_equal_repeated_rows(module, kind, fitted):
    model = fitted(kind, module, steps=5)
    X, y, groups = new_tasks(kind)
    weight = np.random.default_rng(0).integers(1, 4, len(X))
    again = np.repeat(np.arange(len(X)), weight)
    model.adapt(X, y, groups=groups, sample_weight=weight)
    weighted = outputs(model, X, groups)
    model.adapt(X[again], y[again], groups=groups[again])
    assert_allclose(weighted, outputs(model, X, groups), rtol=1e-9, atol=1e-12)
    model.adapt(X[:6], y[:6], sample_weight=weight[:6])
    weighted = outputs(model, X)
    some = np.repeat(np.arange(6), weight[:6])
    model.adapt(X[some], y[some])
    assert_allclose(weighted, outputs(model, X), rtol=1e-9, atol=1e-12)
    unweighted = outputs(model.adapt(X[:6], y[:6]), X)
    assert not np.allclose(weighted, unweighted, rtol=1e-4)


@pytest.mark.parametrize("module", MODULES)
def test_rows_of_weight_zero_are_as_good_as_removed(module, kind, fitted):
    model = fitted(kind, module, steps=5)
    X, y, groups = new_tasks(kind)
    weight = (np.arange(len(X)) % N_ROWS < 6 + groups - NEW).astype(float)  # ragged
    kept = weight > 0
    model.adapt(X, y, groups=groups, sample_weight=weight)
    weighted = outputs(model, X, groups)
    model.adapt(X[kept], y[kept], groups=groups[kept])
    assert_allclose(weighted, outputs(model, X, groups), rtol=1e-9, atol=1e-12)


def test_a_class_whose_rows_all_have_weight_zero_is_as_good_as_absent(episodes):
    X, y, _ = tasks_of("classification", seed=1)
    weight = (y[:6] != "hop").astype(float)
    kept = weight > 0
    removed = adapt(episodes, X[:6][kept], y[:6][kept])
    weighted = adapt(episodes, X[:6], y[:6], sample_weight=weight)
    assert_array_equal(weighted.predict(X), removed.predict(X))


def test_only_ratios_of_weights_within_a_task_matter(reg):
    X, y, groups = tasks_of("regression", seed=1)
    weight = 1.0 + np.arange(len(X)) % 3
    reg.adapt(X, y, groups=groups, sample_weight=weight)
    expected = reg.predict(X, groups=groups)
    reg.adapt(X, y, groups=groups, sample_weight=weight * (1 + groups % NEW))
    assert_allclose(reg.predict(X, groups=groups), expected, rtol=1e-9)
    reg.adapt(X, y, groups=groups, sample_weight=np.full(len(X), 7.0))
    equal = reg.predict(X, groups=groups)
    assert_allclose(equal, reg.adapt(X, y, groups=groups).predict(X, groups=groups), rtol=1e-9)


def test_few_shot_estimators_take_sample_weight(reg, episodes):
    X, y, _ = tasks_of("regression", seed=1)
    for prior in (reg, None):
        weighted = FewShotRegressor(prior, random_state=0).fit(
            X[:5], y[:5], sample_weight=[1, 2, 0, 1, 1]
        )
        repeated = FewShotRegressor(prior, random_state=0).fit(
            X[[0, 1, 1, 3, 4]], y[[0, 1, 1, 3, 4]]
        )
        assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-7)
    X, y, _ = tasks_of("classification", seed=1)
    weighted = FewShotClassifier(episodes).fit(X[:6], y[:6], sample_weight=[1, 1, 1, 0, 0, 0])
    removed = FewShotClassifier(episodes).fit(X[:3], y[:3])
    assert_allclose(weighted.predict_proba(X), removed.predict_proba(X), rtol=1e-9)


# -- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [None, Dropped])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(module):
    X, y, groups = tasks_of("regression")

    def predict(seed):
        reg = MAMLRegressor(**{**SMALL, "module": module, "random_state": seed})
        reg.fit(X, y, groups=groups)
        return reg.adapt(X[:5], y[:5]).predict(X), reg.score(X, y, groups=groups)

    first, again, other = predict(3), predict(3), predict(4)
    assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.allclose(first[0], other[0])
    seeded = predict(np.random.RandomState(3))
    assert_array_equal(seeded[0], predict(np.random.RandomState(3))[0])
    assert not np.allclose(predict(None)[0], predict(None)[0])


@pytest.mark.parametrize("module", [None, Dropped])
def test_results_do_not_depend_on_the_global_random_state(module):
    X, y, groups = tasks_of("classification")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        clf = MAMLClassifier(**{**SMALL, "module": module}).fit(X, y, groups=groups)
        found.append(clf.adapt(X[:6], y[:6]).predict_proba(X))
    assert_array_equal(*found)


class GlobalState:
    """What belongs to the caller."""

    def __init__(self):
        self.now = [
            torch.get_rng_state().tolist(),
            [str(part) for part in np.random.get_state()],
            random.getstate(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        ]

    def __eq__(self, other):
        return self.now == other.now


@pytest.mark.parametrize("module", [None, Dropped, Normed])
def test_the_global_state_of_the_caller_is_left_alone(module, kind):
    X, y, groups = new_tasks(kind)
    cls = MAMLRegressor if kind == "regression" else MAMLClassifier
    ways = {"n_ways": 3} if kind == "episodes" else {}
    model = cls(**{**SMALL, **ways, "module": module, "early_stopping": True})
    before = GlobalState()
    model.fit(X, y, groups=groups)
    assert GlobalState() == before
    model.adapt(X, y, groups=groups)
    assert GlobalState() == before
    outputs(model, X, groups)
    assert GlobalState() == before
    model.score(X, y, groups=groups)
    task_scores(model, X, y, groups=groups)
    assert GlobalState() == before
    few = FewShotRegressor if kind == "regression" else FewShotClassifier
    few(model).fit(X[:6], y[:6]).predict(X)
    few(random_state=0).fit(X[:6], y[:6]).predict(X)
    assert GlobalState() == before


def test_a_failed_fit_leaves_the_global_state_of_the_caller_alone():
    X, y, groups = tasks_of("regression")
    before = GlobalState()
    with pytest.raises(ValueError, match="optimizer"):
        MAMLRegressor(**SMALL, optimizer="none such").fit(X, y, groups=groups)
    assert GlobalState() == before


# -- warm start ----------------------------------------------------------------------------------


def test_warm_start_continues_where_the_last_fit_stopped():
    X, y, groups = tasks_of("regression")
    options = {**SMALL, "beta_decay": 0.0, "early_stopping": False}
    whole = MAMLRegressor(**{**options, "max_iter": 24}).fit(X, y, groups=groups)
    halves = MAMLRegressor(**{**options, "max_iter": 12}, warm_start=True)
    halves.fit(X, y, groups=groups)
    first = state_of(halves)
    halves.fit(X, y, groups=groups)
    assert halves.n_iter_ == 24
    assert len(halves.history_) == 2
    assert not torch.equal(first[0]["0.weight"], halves.module_.state_dict()["0.weight"])
    assert_allclose(
        halves.adapt(X[:5], y[:5]).predict(X), whole.adapt(X[:5], y[:5]).predict(X), rtol=1e-9
    )


def test_without_warm_start_a_second_fit_starts_again(reg):
    X, y, groups = tasks_of("regression")
    before = state_of(reg)
    reg.fit(X, y, groups=groups)
    assert reg.n_iter_ == SMALL["max_iter"]
    assert_same_state(reg, before)


def test_warm_start_continues_on_new_tasks_in_the_units_of_the_first(kind, fitted):
    model = fitted(kind, warm_start=True)
    X, y, groups = new_tasks(kind)
    model.adapt(X[:6], y[:6])
    earlier = adapt(model, X[:6], y[:6])
    expected = outputs(earlier, X)
    model.fit(X, y, groups=groups)
    assert model.n_iter_ == 2 * SMALL["max_iter"]
    assert_array_equal(model.tasks_, NEW + np.arange(N_TASKS))
    with pytest.raises(NotAdaptedError):
        model.predict(X)
    # a copy adapted earlier is not continued with it
    assert_array_equal(outputs(earlier, X), expected)


# -- threads -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("module", MODULES)
def test_threads_may_adapt_copies_of_one_model(module, kind, fitted):
    model = fitted(kind, module)
    before = state_of(model)
    X, y, groups = new_tasks(kind, n_tasks=48)
    tasks = as_list(X, y, groups)

    def work(task):
        rows, targets = task
        return outputs(adapt(model, rows[:6], targets[:6]), rows[6:])

    expected = [work(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, tasks))
    wrong = sum(not np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert wrong == 0
    assert_same_state(model, before)


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("module", MODULES)
def test_threads_may_predict_with_one_adapted_model(module, kind, fitted):
    model = fitted(kind, module)
    X, y, groups = new_tasks(kind, n_tasks=48)
    support = np.arange(len(X)) % N_ROWS < 6
    model.adapt(X[support], y[support], groups=groups[support])

    def work(task):
        return outputs(model, X[groups == task], groups[groups == task])

    expected = [work(task) for task in np.unique(groups)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, np.unique(groups)))
    wrong = sum(not np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert wrong == 0


@pytest.mark.usefixtures("impatient_threads")
@pytest.mark.parametrize("module", [None, Dropped])
def test_threads_may_fit_at_the_same_time(module):
    X, y, groups = tasks_of("regression", n_tasks=12)
    X = np.column_stack([X, groups])
    reg = MAMLRegressor(**{**SMALL, "module": module}, task_column=3)
    expected = cross_val_score(reg, X, y, groups=groups, cv=GroupKFold(12))
    before = GlobalState()
    with joblib.parallel_config("threading", n_jobs=8):
        for _ in range(2):
            scores = cross_val_score(reg, X, y, groups=groups, cv=GroupKFold(12))
            assert_array_equal(scores, expected)
    assert GlobalState() == before
