"""Weights of rows, of tasks and of classes, in meta-training."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from skorch.callbacks import Callback
from torch import nn

from sklearn_maml import (
    FewShotClassifier,
    MAMLClassifier,
    MAMLRegressor,
    task_scorer,
    task_scores,
)
from sklearn_maml.data import weights as data_weights
from sklearn_maml.data.episodes import EpisodeBatch, Rows, totals
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.spellings import collect_tasks
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.data.weights import merged, share_rows, weighted
from sklearn_maml.datasets import SinusoidTasks
from sklearn_maml.engine import Engine
from sklearn_maml.exceptions import SingleTaskWarning
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.gaussian import ClassHead, GaussianHead
from sklearn_maml.learners.head_trainer import HeadTrainer
from sklearn_maml.learners.judging import _Deviations
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.learner import Learner
from sklearn_maml.learners.likelihoods import Classes, Normal, find_likelihood
from sklearn_maml.learners.shares import choose_share, find_logit_scale, task_errors
from sklearn_maml.learners.start import start_of_classes, start_of_numbers, start_of_outputs
from sklearn_maml.meta_gradients import SecondOrder
from sklearn_maml.targets.losses import (
    AbsoluteError,
    CrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
    SquaredError,
)
from sklearn_maml.training.checkpoint import Checkpoint
from sklearn_maml.update_rules import SGD

N_TASKS, N_ROWS = 12, 10
RNG = np.random.default_rng(0)
T = np.repeat(np.arange(N_TASKS), N_ROWS)
X = RNG.normal(size=(len(T), 3))
Y = (X * RNG.normal(size=(N_TASKS, 3))[T]).sum(1) + 0.1 * RNG.normal(size=len(T))
LABELS = np.where(Y > 0.5, "rare", "common")
W = RNG.integers(1, 4, len(T)).astype(float)
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "meta_batch_size": 4, "random_state": 0}
KINDS = {"regression": (MAMLRegressor, Y), "classification": (MAMLClassifier, LABELS)}
RULES = ["sgd", "gaussian-head", "auto"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


def fit(kind, rule="sgd", rows=slice(None), weight=None, **params):
    cls, y = KINDS[kind]
    model = cls(**{**SMALL, **params}, update_rule=rule)
    return model.fit(X[rows], y[rows], groups=T[rows], sample_weight=weight)


def answers(model):
    """Predictions of a new task."""
    _, y = KINDS["regression" if isinstance(model, MAMLRegressor) else "classification"]
    model = copy.copy(model).adapt(X[:7], y[:7])
    return getattr(model, "predict_proba", model.predict)(X[:10])


# -- what weights of rows are --------------------------------------------------------------------


def test_equal_weights_are_none(kind, rule):
    assert_array_equal(
        answers(fit(kind, rule)), answers(fit(kind, rule, weight=np.full(len(T), 3.0)))
    )


def test_a_row_of_weight_zero_is_left_out(kind, rule):
    """To the last bit, and a task all of whose rows are."""
    weight = W.copy()
    weight[::7] = 0
    weight[T == 3] = 0
    kept = weight > 0
    without = fit(kind, rule, kept, weight[kept])
    model = fit(kind, rule, weight=weight)
    assert_array_equal(answers(model), answers(without))
    assert_array_equal(model.tasks_, np.delete(np.arange(N_TASKS), 3))


def test_weights_matter_and_their_scale_does_not(kind, rule):
    some = answers(fit(kind, rule, weight=W))
    assert not np.allclose(some, answers(fit(kind, rule)))
    assert_array_equal(some, answers(fit(kind, rule, weight=W * 2.0**-40)))


@pytest.mark.parametrize("least", [1e-300, 5e-324])
def test_weights_may_differ_by_all_there_is(kind, rule, least):
    weight = np.where((T == 2) | (np.arange(len(T)) % 3 > 0), least, 1.0)
    cls, y = KINDS[kind]
    model = cls(**SMALL, update_rule=rule)
    model.fit(X.astype(np.float32), y, groups=T, sample_weight=weight)
    assert np.isfinite(answers(model)).all()
    history = [row["train_loss"] for row in model.history_]
    assert np.isfinite(history).all()


@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_without_tasks_a_row_of_weight_two_is_a_row_that_is_there_twice(cls):
    """Exactly, in whatever order the rows come, and for rows that are there twice already."""
    rng = np.random.default_rng(1)
    y = Y if cls is MAMLRegressor else LABELS
    rows, count = np.r_[np.arange(20), 3], rng.integers(0, 4, 21)
    many = rng.permutation(rows.repeat(count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleTaskWarning)
        once = cls(**SMALL).fit(X[rows], y[rows], sample_weight=count)
        repeated = cls(**SMALL).fit(X[many], y[many])
        plain = cls(**SMALL).fit(X[:20], y[:20])
    assert_array_equal(once.predict(X), repeated.predict(X))
    assert cls is MAMLClassifier or not np.allclose(once.predict(X), plain.predict(X))


def test_rows_that_are_all_there_as_often_are_those_rows():
    tasks = collect_tasks(MAMLRegressor(), X[:6], Y[:6], reset=True)
    assert merged(tasks) is tasks
    twice = merged(tasks.at(np.repeat(np.arange(6), 2)))
    assert twice.weight is None
    assert_array_equal(twice.X, tasks.X)
    same = tasks.at(np.zeros(4, int))
    assert merged(same) is same  # one row could not be split


def test_the_mean_and_scale_of_y_are_those_of_repeated_rows():
    count = W.astype(int)
    model = fit("regression", weight=W)
    again = np.repeat(np.arange(len(T)), count)
    repeated = fit("regression", rows=again)
    assert_allclose(model.y_mean_, repeated.y_mean_)
    assert_allclose(model.y_scale_, repeated.y_scale_)


# -- spellings -----------------------------------------------------------------------------------


def test_every_spelling_of_weights_says_the_same(kind):
    cls, y = KINDS[kind]
    model, shape = cls(**SMALL, update_rule="sgd"), (N_TASKS, N_ROWS)
    stack, targets, weight = X.reshape(*shape, 3), y.reshape(shape), W.reshape(shape)
    pairs = list(zip(stack, targets, strict=True))
    frame = pd.DataFrame(X, columns=list("abc")).assign(task=T)
    expected = model.fit(X, y, groups=T, sample_weight=W).adapt(X[:5], y[:5]).predict(X)
    found = {
        "series": model.fit(X, y, T, pd.Series(W)),
        "list": model.fit(pairs, sample_weight=list(weight)),
        "rows of a list": model.fit(pairs, sample_weight=W),
        "stack": model.fit(stack, targets, sample_weight=weight),
    }
    for name, fitted in found.items():
        assert_array_equal(fitted.adapt(X[:5], y[:5]).predict(X), expected, err_msg=name)
    column = cls(**SMALL, update_rule="sgd", task_column="task")
    fitted = column.fit(frame, y, sample_weight=W).adapt(frame[:5], y[:5])
    assert_array_equal(fitted.predict(frame[:N_ROWS]), expected[:N_ROWS])


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_weights_are_a_column_by_its_name(kind, library, tmp_path):
    """Which is no feature, in whatever call it is there."""
    cls, y = KINDS[kind]
    frame = pd.DataFrame(X, columns=list("abc")).assign(task=T)
    model = cls(**SMALL, update_rule="sgd", task_column="task")
    plain = copy.copy(model).fit(frame, y, sample_weight=W).adapt(frame, y, sample_weight=W)
    kinds = {"polars": "from_pandas", "pyarrow": "table"}
    to = getattr(pytest.importorskip(library), kinds.get(library, "DataFrame"))
    table = to(frame.assign(w=W)[["a", "w", "b", "c", "task"]])
    fitted = model.fit(table, y, sample_weight="w")
    assert fitted.feature_names_in_.tolist() == ["a", "b", "c", "task"]
    assert fitted.score(table, y, sample_weight="w") == plain.score(frame, y, sample_weight=W)
    assert fitted.score(table, y) == plain.score(frame, y)
    fitted.save(tmp_path / "model")
    for one in (fitted, cls.load(tmp_path / "model")):
        one.adapt(table, y, sample_weight="w")
        for rows in (table, to(frame)):
            assert_array_equal(one.predict(rows), plain.predict(frame))
    assert_array_equal(fitted.fit(to(frame), y).adapt(to(frame), y).predict(to(frame)),
                       model.fit(frame, y).adapt(frame, y).predict(frame))  # fmt: skip
    again = copy.copy(model).partial_fit(table, y, sample_weight="w").partial_fit(table, y)
    assert again.n_features_in_ == 4


def test_a_column_of_weights_in_lists_of_tasks_and_searches():
    frame = pd.DataFrame(X, columns=list("abc")).assign(w=W)
    model = MAMLRegressor(**SMALL, update_rule="sgd")
    pairs = [(frame[j == T], Y[j == T]) for j in range(N_TASKS)]
    by_row = answers_of_frame(model.fit(frame[list("abc")], Y, T, W))
    assert_array_equal(answers_of_frame(model.fit(pairs, sample_weight="w")), by_row)
    parts = [(x[:4], y[:4], x[4:], y[4:]) for x, y in pairs]
    as_given = [(x[list("abc")], y, x2[list("abc")], y2) for x, y, x2, y2 in parts]
    given = model.fit(as_given, sample_weight=list(W.reshape(N_TASKS, N_ROWS)))
    expected = answers_of_frame(given)
    assert_array_equal(answers_of_frame(model.fit(parts, sample_weight="w")), expected)
    column = MAMLRegressor(**SMALL, update_rule="sgd", task_column="task")
    search = GridSearchCV(column, {"alpha": [0.01]}, cv=GroupKFold(3), error_score="raise")
    search.fit(frame.assign(task=T), Y, groups=T, sample_weight="w")
    best = search.best_estimator_
    assert_array_equal(
        best.adapt(frame.assign(task=0)[:7], Y[:7]).predict(frame.assign(task=0)[:10]),
        answers(fit("regression", weight=W, alpha=0.01)),
    )


def answers_of_frame(model):
    frame = pd.DataFrame(X, columns=list("abc"))
    return copy.copy(model).adapt(frame[:7], Y[:7]).predict(frame[:10])


def test_names_of_weights_that_are_no_columns_are_refused():
    frame = pd.DataFrame(X, columns=list("abc"))
    model = MAMLRegressor(**SMALL)
    with pytest.raises(
        ValueError, match=r"sample_weight='w' is the name.*columns \['a', 'b', 'c'\]"
    ):
        model.fit(frame, Y, groups=T, sample_weight="w")
    with pytest.raises(ValueError, match="X, a ndarray, has no such column"):
        model.fit(X, Y, groups=T, sample_weight="w")
    with pytest.raises(ValueError, match="X, a list, has no such column"):
        model.fit([(X[j == T], Y[j == T]) for j in range(N_TASKS)], sample_weight="w")
    with pytest.raises(ValueError, match=r"columns \['a', 'w', 'w'\]. Name a column"):
        model.fit(frame.set_axis(["a", "w", "w"], axis=1), Y, groups=T, sample_weight="w")
    with pytest.raises(ValueError, match="Negative values"):
        model.fit(frame.assign(w=-W), Y, groups=T, sample_weight="w")


def test_tasks_have_weights_by_their_ids():
    of_task = RNG.uniform(0.5, 2, N_TASKS)
    names = np.array([f"task {j}" for j in range(N_TASKS)])
    model = MAMLRegressor(**SMALL, update_rule="sgd")
    expected = answers(model.fit(X, Y, groups=T, sample_weight=of_task[T]))
    by_number = {float(j): w for j, w in enumerate(of_task)}
    by_name = dict(zip(names[::-1], of_task[::-1], strict=True)) | {"another": 1.0}
    tuples = {("a", j): w for j, w in enumerate(of_task)}
    pairs = np.stack([np.full(len(T), "a", object), T.astype(object)], 1)
    stack, targets = X.reshape(N_TASKS, N_ROWS, 3), Y.reshape(N_TASKS, N_ROWS)
    for fitted in (
        model.fit(X, Y, T, by_number),
        model.fit(X, Y, names[T], by_name),
        model.fit(X, Y, pairs, tuples),
        model.fit(stack, targets, sample_weight=of_task),
        model.fit(list(zip(stack, targets, strict=True)), sample_weight=by_number),
    ):
        assert_allclose(answers(fitted), expected, rtol=1e-12)


def test_episodes_that_are_given_take_weights_of_both_parts():
    tasks = [(X[j == T][:4], Y[j == T][:4], X[j == T][4:], Y[j == T][4:]) for j in range(N_TASKS)]
    weight = W.reshape(N_TASKS, N_ROWS)
    model = MAMLRegressor(**SMALL, update_rule="sgd")
    whole = answers(model.fit(tasks, sample_weight=list(weight)))
    parts = model.fit(tasks, sample_weight=[(w[:4], w[4:]) for w in weight])
    assert_array_equal(answers(parts), whole)
    without = weight.copy()
    without[2, 4:] = 0  # no query rows are left
    assert model.fit(tasks, sample_weight=list(without)).n_tasks_ == N_TASKS - 1


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {0: 1.0, 1: 2.0},
            r"no weight of 10 of the 12 tasks, such as \[2, 3, 4\].*keys are",
        ),
        (np.zeros(len(T)), "zero"),
        (-W, "Negative values"),
        (np.ones(3), r"sample_weight.shape == \(3,\)"),
        (np.r_[np.nan, W[1:]], "contains NaN"),
    ],
)
def test_weights_that_cannot_be_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        MAMLRegressor(**SMALL).fit(X, Y, groups=T, sample_weight=weight)


def test_weights_that_do_not_go_with_the_tasks_are_refused():
    model = MAMLRegressor(**SMALL)
    stack, targets = X.reshape(N_TASKS, N_ROWS, 3), Y.reshape(N_TASKS, N_ROWS)
    with pytest.raises(ValueError, match=r"sample_weight of task 0 has shape \(3,\), and the task"):
        model.fit(stack, targets, sample_weight=np.ones((N_TASKS, 3)))
    with pytest.raises(ValueError, match="a dict of task ids, but there is no task information"):
        model.fit(X, Y, sample_weight={0: 1.0})
    with pytest.raises(ValueError, match="task distribution and y, groups or sample_weight"):
        model.fit(SinusoidTasks(), sample_weight=W)


def test_adapt_and_score_take_the_spellings_of_fit():
    model = fit("regression")
    stack, targets = X.reshape(N_TASKS, N_ROWS, 3), Y.reshape(N_TASKS, N_ROWS)
    weight = W.reshape(N_TASKS, N_ROWS)
    expected = copy.copy(model).adapt(X, Y, groups=T, sample_weight=W).predict(X, groups=T)
    found = copy.copy(model).adapt(stack, targets, sample_weight=weight).predict(stack)
    assert_array_equal(found.ravel(), expected)
    expected = model.score(list(zip(stack, targets, strict=True)), sample_weight=W)
    assert model.score(stack, targets, sample_weight=weight) == expected
    assert model.score(stack, targets, sample_weight=np.arange(1.0, 13)) != expected


def test_the_weights_of_a_score_stay_with_their_rows_where_tasks_are_left_out():
    """A task without rows, of a list, is left out with a warning."""
    model = fit("regression")
    tasks = [(X[j == T], Y[j == T]) for j in range(N_TASKS)]
    expected = model.score(tasks[1:], sample_weight=W[N_ROWS:])
    tasks[0] = (X[:0], Y[:0])
    with pytest.warns(UserWarning, match="1 without rows, left out"):
        assert np.isfinite(model.score(tasks, sample_weight=W[N_ROWS:]))
    assert np.isfinite(expected)


# -- weights of support rows ---------------------------------------------------------------------

COUNTED = {
    "steps": {"update_rule": "sgd"},
    "head": {"update_rule": "gaussian-head"},
    "both": {"update_rule": "auto"},
    "counts": {"update_rule": "gaussian-head", "loss": "poisson"},
    "centred": {"update_rule": "sgd", "center_y": True},
    "classes": {"update_rule": "gaussian-head"},
    "classes by steps": {"update_rule": "sgd"},
    "weights of classes": {"update_rule": "gaussian-head", "class_weight": "balanced"},
    "local labels": {"update_rule": "gaussian-head", "n_ways": 2},
    "ridge head": {"update_rule": "ridge-head", "adapted": "head", "steps": 1},
    "logistic head": {"update_rule": "logistic-head", "adapted": "head", "steps": 1},
}


@pytest.fixture(scope="module", params=COUNTED)
def counted(request):
    """A fitted model, and targets it takes."""
    params = COUNTED[request.param]
    if "class" in request.param or request.param in ("local labels", "logistic head"):
        model, y = MAMLClassifier(**SMALL, **params), LABELS
    else:
        model, y = MAMLRegressor(**SMALL, **params), Y
        y = np.round(np.exp(Y)) if request.param == "counts" else Y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y, groups=T)
    if request.param == "both":
        model.learner_weights_ = {"gradient-steps": 0.5, "gaussian-head": 0.5}
    return model, y


@pytest.mark.parametrize("n_rows", [6, 60])  # fewer and more than columns of the head
def test_a_support_row_of_weight_two_is_a_row_that_is_there_twice(counted, n_rows):
    """For tasks side by side, and for those with a standard deviation its size, too."""
    model, y = counted
    count = RNG.integers(1, 4, n_rows)
    rows, group = np.arange(n_rows), np.arange(n_rows) % 2
    again = np.repeat(rows, count)
    weighed = copy.copy(model).adapt(X[rows], y[rows], groups=group, sample_weight=count)
    repeated = copy.copy(model).adapt(X[again], y[again], groups=group[again])
    plain = copy.copy(model).adapt(X[rows], y[rows], groups=group)
    query = {"X": X[60:80], "groups": np.arange(20) % 2}
    found, expected, other = (
        getattr(m, "predict_proba", m.predict)(**query) for m in (weighed, repeated, plain)
    )
    assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(found, other, rtol=1e-5)
    if isinstance(model, MAMLRegressor) and "gaussian-head" in model.learner_weights_:
        std = [m.predict(**query, return_std=True)[1] for m in (weighed, repeated, plain)]
        assert_allclose(std[0], std[1], rtol=1e-9)
        assert not np.allclose(std[0], std[2], rtol=1e-5)


@pytest.mark.parametrize("weight_of_classes", [None, "balanced"])
def test_rows_that_are_added_count_as_often_as_their_weight(weight_of_classes):
    model = fit("classification", "gaussian-head", class_weight=weight_of_classes)
    count = RNG.integers(1, 4, 120)
    again = np.repeat(np.arange(120), count)
    parts, one = copy.copy(model), np.zeros(len(again))
    for rows in (slice(7), slice(7, 120)):  # the second time as sums
        parts.adapt(X[rows], LABELS[rows], one[: len(X[rows])], count[rows], extend=True)
    whole = copy.copy(model).adapt(X[again], LABELS[again], groups=one)
    query = {"X": X, "groups": np.zeros(len(X))}
    assert_allclose(parts.predict_proba(**query), whole.predict_proba(**query), rtol=1e-9)


def test_weights_that_are_no_counts():
    """As good as none far below 1; above 1024 their ratios count."""
    model = fit("regression", "gaussian-head")

    def moments(weight):
        adapted = copy.copy(model).adapt(X[:7], Y[:7], sample_weight=weight)
        return np.stack(adapted.predict(X, return_std=True))

    none = np.stack(copy.copy(model).adapt(X[:0], Y[:0]).predict(X, return_std=True))
    assert_allclose(moments(np.full(7, 1e-12)), none, atol=1e-8)
    assert_allclose(moments(W[:7] * 1e-300), none, atol=1e-8)
    large = moments(W[:7] * 2.0**8)
    assert_array_equal(moments(W[:7] * 2.0**1000), large)
    assert not np.allclose(moments(W[:7] * 2.0**5), large, rtol=1e-4)


def test_weights_of_classes_are_no_evidence_of_more_rows():
    """Where they are equal among the rows of a task, they are none."""
    model = fit("classification", "gaussian-head", class_weight={"rare": 5.0, "common": 1.0})
    rare = np.flatnonzero(LABELS == "rare")[:5]
    weighed = copy.copy(model).adapt(X[rare], LABELS[rare])
    model.class_weight = {"rare": 1.0, "common": 1.0}
    model.targets_ = copy.copy(model.targets_)
    model.targets_.class_weight_ = np.ones(2)
    model._fit_settings = {**model._fit_settings, "class_weight": str(model.class_weight)}
    plain = copy.copy(model).adapt(X[rare], LABELS[rare])
    assert_allclose(weighed.predict_proba(X), plain.predict_proba(X), rtol=1e-9)


# -- scikit-learn's tools ------------------------------------------------------------------------


def test_weights_are_routed_if_they_are_asked_for():
    with sklearn.config_context(enable_metadata_routing=True):
        plain = MAMLRegressor(**SMALL, update_rule="sgd")
        asks = copy.copy(plain).set_fit_request(sample_weight=True)
        pipe = make_pipeline(StandardScaler(), asks)
        fitted = pipe.set_params(standardscaler="passthrough").fit(X, Y, groups=T, sample_weight=W)
        assert_array_equal(answers(fitted[-1]), answers(fit("regression", weight=W)))
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            make_pipeline(StandardScaler(), plain).fit(X, Y, groups=T, sample_weight=W)
        asks.set_score_request(sample_weight=True)
        search = GridSearchCV(asks, {"alpha": [0.01, 0.1]}, cv=GroupKFold(3), error_score="raise")
        search.fit(X, Y, groups=T, sample_weight=W)
        train, test = next(GroupKFold(3).split(X, Y, T))
        by_hand = plain.set_params(alpha=0.01).fit(X[train], Y[train], T[train], W[train])
        score = by_hand.score(X[test], Y[test], T[test], W[test])
        assert search.cv_results_["split0_test_score"][0] == score


def test_a_search_over_tasks_with_a_column_passes_weights_on():
    frame = pd.DataFrame(X, columns=list("abc")).assign(task=T)
    model = MAMLRegressor(**SMALL, update_rule="sgd", task_column="task")
    search = GridSearchCV(model, {"alpha": [0.01]}, cv=GroupKFold(3), error_score="raise")
    search.fit(frame, Y, groups=T, sample_weight=W)
    model = search.best_estimator_.adapt(frame[:7], Y[:7])
    assert_array_equal(model.predict(frame[:10]), answers(fit("regression", weight=W, alpha=0.01)))


def test_a_search_over_a_list_of_tasks_cuts_their_weights():
    tasks = [(X[j == T], Y[j == T]) for j in range(N_TASKS)]
    model = MAMLRegressor(**SMALL, update_rule="sgd")
    search = GridSearchCV(model, {"alpha": [0.01]}, cv=KFold(3), error_score="raise")
    for weight in (list(W.reshape(N_TASKS, N_ROWS)), {j: 1.0 + j for j in range(N_TASKS)}):
        search.fit(tasks, sample_weight=weight)
        assert np.isfinite(search.best_score_)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_task_scorers_weigh_the_metric(average):
    model = fit("regression")
    scorer = task_scorer("neg_mean_squared_error", n_shots=4, average=average)
    seen = scorer(model, X, Y, T)
    assert scorer(model, X, Y, T, np.full(len(T), 2.0)) == pytest.approx(seen)
    assert scorer(model, X, Y, T, {j: 1.0 for j in range(N_TASKS)}) == pytest.approx(seen)
    one = np.where(T == 4, 1.0, 1e-12)
    if average == "macro":
        of_one = task_scores(model, X, Y, T, scoring="neg_mean_squared_error", n_shots=4).after[4]
        assert scorer(model, X, Y, T, one) == pytest.approx(of_one)
    assert scorer(model, X, Y, T, one) != pytest.approx(seen)
    with sklearn.config_context(enable_metadata_routing=True):
        asks = MAMLRegressor(**SMALL, update_rule="sgd").set_fit_request(sample_weight=True)
        scorer.set_score_request(sample_weight=True)
        search = GridSearchCV(
            asks, {"alpha": [0.1]}, cv=GroupKFold(3), scoring=scorer, error_score="raise"
        ).fit(X, Y, groups=T, sample_weight=W)
        train, test = next(GroupKFold(3).split(X, Y, T))
        by_hand = asks.set_params(alpha=0.1).fit(X[train], Y[train], T[train], W[train])
        expected = scorer(by_hand, X[test], Y[test], T[test], W[test])
        assert search.cv_results_["split0_test_score"][0] == expected
    with pytest.raises(TypeError, match=r"expected some of .*sample_weight"):
        scorer.set_score_request(weights=True)


def test_scorers_of_probabilities_weigh_rows():
    model, scorer = fit("classification"), task_scorer("neg_log_loss")
    plain = scorer(model, X, LABELS, T)
    assert scorer(model, X, LABELS, T, np.ones(len(T))) == pytest.approx(plain)
    assert scorer(model, X, LABELS, T, W) != pytest.approx(plain)


# -- episodes ------------------------------------------------------------------------------------


def sampler(tasks, **options):
    return EpisodeSampler(tasks, classification=False, n_queries=None, **options)


@pytest.mark.parametrize("looked_at", [2**18, 200])
def test_whether_rows_are_shared_is_told_by_some_of_very_many(looked_at, monkeypatch):
    monkeypatch.setattr(data_weights, "LOOKED_AT", looked_at)
    monkeypatch.setattr(data_weights, "BLOCK", 64)
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(4000, 2)), np.indices((63, 64)).reshape(2, -1).T[:4000]):
        assert not share_rows(values.astype(np.float32))
        for n_distinct in (1, 40, 1800):
            assert share_rows(values[rng.integers(0, n_distinct, 4000)].astype(np.float32))
        assert not share_rows(values[np.arange(4000) // 3 * 2 % 4000 + np.arange(4000) % 3 // 2])


def test_support_weights_sum_to_one_and_query_weights_to_that_of_the_task():
    """On average over episodes: what a row counts does not depend on those it is drawn with."""
    weight = np.r_[np.full(10, 1.0), np.full(10, 3.0)] * np.tile([0.5, 1.5], 10)
    tasks = TaskCollection(X[:20], Y[:20, None], np.repeat([0, 1], 10), np.arange(2), None, "list")
    tasks = weighted(tasks, weight).balanced()
    assert_allclose(tasks.weight, weight / 2)
    which = np.tile([0, 1], 3000)
    (batch,) = sampler(tasks, n_shots=4).sample_batches(which[None], np.random.default_rng(0))
    assert_allclose(batch.support.weight.sum(1), 1)
    in_all = batch.query.weight.sum(1).numpy()
    assert_allclose([in_all[::2].mean(), in_all[1::2].mean()], [0.5, 1.5], rtol=0.02)
    ratio = batch.support.weight.max(1)[0] / batch.support.weight.min(1)[0]
    assert_allclose(ratio[ratio > 1.01], 3)


def test_weights_of_classes_are_of_rows_as_frequent_as_they_come():
    y = np.repeat([0, 1], [30, 6])
    tasks = TaskCollection(
        RNG.normal(size=(36, 2)), y, np.zeros(36, int), np.arange(1), None, "groups",
        np.where(y == 1, 3.0, 0.6),
    )  # fmt: skip
    drawn = EpisodeSampler(
        tasks, classification=True, n_queries=3, n_shots=2, as_they_come=True
    ).sample(np.zeros(1, int), np.random.default_rng(0))
    labels, weight = drawn.query.y[0], drawn.query.weight[0].numpy()
    assert labels.tolist().count(1) == labels.tolist().count(0) == 3
    # as often as each other after "balanced" weights, though the one is five times as frequent
    assert_allclose(weight[labels == 1].sum(), weight[labels == 0].sum())
    assert_allclose(weight.sum(), 1)


@pytest.mark.parametrize("n_ways", [None, 2])
def test_episodes_that_are_drawn_on_a_device_have_their_weights(n_ways):
    y, weight = np.tile([0, 1, 2], 12), RNG.uniform(0.5, 2, 36)
    tasks = TaskCollection(X[:36], y, np.arange(36) // 12, np.arange(3), None, "groups", weight)
    draws = EpisodeSampler(tasks, classification=True, n_ways=n_ways, n_shots=1, n_queries=2)
    which = np.array([[0, 1, 2], [2, 1, 0]])
    here = draws.sample_batches(which, np.random.default_rng(0))
    there = draws.sample_on(torch.device("cpu"), which, np.random.default_rng(0))
    for mine, other in zip(here, there, strict=True):
        for rows, same in ((mine.support, other.support), (mine.query, other.query)):
            assert_array_equal(rows.weight, same.weight)
            assert_array_equal(rows.X, same.X)


def test_pools_of_classes_and_task_distributions_take_weights():
    y, weight = np.tile(np.arange(6), 20), np.where(X[:, 0] > 0, 2.0, 1.0)
    ways = {"n_ways": 2, "n_shots": 1, "n_queries": 2, "update_rule": "sgd"}
    pool = MAMLClassifier(**SMALL, **ways).fit(X, y, sample_weight=weight)
    plain = MAMLClassifier(**SMALL, **ways).fit(X, y)
    new = X[:8], np.tile([0, 1], 4)
    found, other = (model.adapt(*new).predict_proba(X) for model in (pool, plain))
    assert not np.allclose(found, other)

    class Halves:
        def sample(self, n_tasks, random_state=None):
            rng = np.random.default_rng(random_state)
            rows = rng.normal(size=(n_tasks, 12, 3))
            return [(A, (A[:, 0] > 0.8 + 0.1 * rng.normal()).astype(int)) for A in rows]

    plain, balanced = (
        MAMLClassifier(**SMALL, update_rule="sgd", class_weight=weight).fit(Halves())
        for weight in (None, "balanced")
    )
    assert balanced.class_weight_[1] > 2 * balanced.class_weight_[0]
    rare = [model.adapt(X[:7], LABELS[:7] == "rare").predict_proba(X)[:, 1].mean()
            for model in (plain, balanced)]  # fmt: skip
    assert rare[1] > rare[0]


def test_a_learner_of_ones_own_is_trained_by_weights():
    class Level(Learner):
        """The mean of the support targets by their weights, less a constant that is learned."""

        def build(self, problem):
            return nn.Linear(1, problem.n_outputs)

        def outputs(self, network, support, query):
            weight = support.weight.unsqueeze(-1)
            mean = (weight * support.y).sum(1, keepdim=True)
            return (mean - network.bias).expand(*query.y.shape[:2], -1)

    offsets = []
    for heavy in (1.0 + 1e-9, 3.0):  # not all equal: the learner is told of weights
        weight = np.where(Y > 0, heavy, 1.0)
        model = MAMLRegressor(**{**SMALL, "update_rule": Level()})
        offsets.append(model.fit(X, Y, groups=T, sample_weight=weight).module_.bias.item())
    assert not np.allclose(*offsets)


@pytest.mark.parametrize("gradient", ["second-order", "first-order", "implicit", "reptile"])
@pytest.mark.parametrize("max_tasks", [None, 1])
def test_a_task_counts_by_its_weight_in_every_meta_gradient(gradient, max_tasks):
    """The meta-gradient is that of each task times its weight."""
    engine = MAMLRegressor(**SMALL, update_rule="sgd", meta_gradient=gradient, steps=2)
    engine = engine.set_params(engine__max_tasks_in_memory=max_tasks).fit(X, Y, groups=T)
    learner = engine._learner
    run = engine._make_engine(learner.module)
    params = {n: p.detach().double() for n, p in learner.meta_params().items()}
    run.module.double()
    A = torch.from_numpy(X.reshape(N_TASKS, N_ROWS, 3))[:2]
    b = torch.from_numpy(Y.reshape(N_TASKS, N_ROWS, 1))[:2]
    row = torch.full((2, 5), 0.2, dtype=torch.float64)

    def gradient_of(of_task):
        query = Rows(A[:, 5:], b[:, 5:], row * torch.tensor(of_task, dtype=torch.float64)[:, None])
        batch = EpisodeBatch(Rows(A[:, :5], b[:, :5]), query)
        step = run.meta_step(params, batch, alpha=0.1, steps=2)
        return torch.cat([g.flatten() for g in step.grads.values()])

    first, second = gradient_of([1.0, 1e-12]), gradient_of([1e-12, 1.0])
    assert_allclose(gradient_of([0.5, 3.0]), 0.5 * first + 3 * second, rtol=1e-6, atol=1e-9)


def test_sums_that_are_one_to_rounding_are_one():
    for dtype in (torch.float32, torch.float64):
        for n in (3, 7, 49):
            assert totals(torch.full((2, n), 1 / n, dtype=dtype)).tolist() == [1, 1]
    assert totals(torch.tensor([0.5, 0.501])).item() == pytest.approx(1.001)


# -- the Gaussian head ---------------------------------------------------------------------------

LIKELIHOODS = {False: Normal(SquaredError()), True: Classes(CrossEntropy())}


def make_head(classification):
    rng = np.random.default_rng(3)
    n_outputs = 2
    start = (
        rng.normal(size=(4, n_outputs)),
        np.tril(rng.uniform(0.2, 0.5, (4, 4))),
        np.ones(1 if classification else n_outputs),
        np.full(1 if classification else n_outputs, 0.3),
    )
    body = MLPBody(1, [3, 5], torch.tanh, torch.Generator().manual_seed(0))
    head = (ClassHead if classification else GaussianHead)(
        body,
        [start],
        np.zeros(3),
        np.ones(3),
        likelihood=LIKELIHOODS[classification],
        same_classes=False,
    ).double()
    return head, head.functions({n: p.detach().double() for n, p in head.named_parameters()})


@pytest.mark.parametrize("classification", [False, True])
def test_the_likelihood_of_a_head_takes_a_row_of_weight_two_as_two_rows(classification):
    """Exactly, in support and query sets, up to what does not depend on the parameters."""
    _, run = make_head(classification)
    rng = np.random.default_rng(0)
    A = torch.from_numpy(rng.normal(size=(1, 7, 3)))
    b = torch.from_numpy(rng.normal(size=(1, 7, 2)))
    if classification:
        b = torch.eye(2, dtype=torch.float64)[torch.tensor([[0, 1, 0, 0, 1, 1, 0]])]
    count = torch.tensor([[2.0, 1, 3, 1, 1, 2, 4]], dtype=torch.float64)
    twice = torch.arange(7).repeat_interleave(count[0].long())
    nll, mean = run.loss(A, b, count[None], 3)
    n_support = int(count[0, :3].sum())
    repeated, mean_repeated = run.loss(A[:, twice], b[:, twice], None, n_support)
    assert_allclose(nll, repeated, rtol=1e-9)
    first = np.cumsum(np.r_[0, count[0, 3:6].numpy()]).astype(int)
    assert_allclose(mean[0, 0], mean_repeated[0, 0][first])


@pytest.mark.parametrize("loss", [Poisson(), Gamma(), AbsoluteError(), Huber(), Quantile(0.8)])
def test_likelihoods_of_newton_steps_take_a_row_of_weight_two_as_two_rows(loss):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 1)), np.eye(4) / 3, np.ones(1), np.full(1, 0.3)
    body = MLPBody(1, [3, 5], torch.tanh, torch.Generator().manual_seed(0))
    head = LaplaceHead(
        body,
        [start],
        np.zeros(3),
        np.ones(3),
        likelihood=find_likelihood(loss),
        same_classes=False,
    )
    run = head.double().functions({n: p.detach() for n, p in head.named_parameters()})
    A = torch.from_numpy(rng.normal(size=(1, 7, 3)))
    b = torch.from_numpy(rng.poisson(3.0, size=(1, 7, 1)) + 1.0)
    count = torch.tensor([[2.0, 1, 3, 1, 1, 2, 4]], dtype=torch.float64)
    twice = torch.arange(7).repeat_interleave(count[0].long())
    n_support = int(count[0, :3].sum())
    nll, _ = run.loss(A, b, count[None], 3)
    assert_allclose(nll, run.loss(A[:, twice], b[:, twice], None, n_support)[0], rtol=1e-6)


@pytest.mark.parametrize("classification", [False, True])
def test_a_head_is_trained_and_judged_by_weights(classification):
    """Losses, errors and gradients of a batch are those of its tasks, by their weights."""
    head, _ = make_head(classification)
    params = {f"head.{n}": p.detach() for n, p in head.named_parameters()}
    rng = np.random.default_rng(1)
    A = torch.from_numpy(rng.normal(size=(2, 9, 3)))
    b = torch.from_numpy(rng.normal(size=(2, 9, 2)))
    if classification:
        b = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 0]]).expand(2, -1)
    weight = torch.from_numpy(rng.uniform(0.5, 2, (2, 4))) / 4
    given = torch.from_numpy(rng.uniform(0.5, 2, (2, 5)))
    given = given / given.sum(1, keepdim=True)

    def batch(rows, of_task=1.0):
        A_, b_, g, w = (t[rows] for t in (A, b, given, weight))
        return EpisodeBatch(Rows(A_[:, :5], b_[:, :5], g), Rows(A_[:, 5:], b_[:, 5:], of_task * w))

    trainer = HeadTrainer(head, None, [], weighted=True)
    both = trainer.meta_step(params, batch([0, 1]))
    parts = [trainer.meta_step(params, batch([j])) for j in (0, 1)]
    heavy = trainer.meta_step(params, batch([0], 3.0))
    name = "head.factor"
    mean = (parts[0].grads[name] + parts[1].grads[name]) / 2
    assert_allclose(both.grads[name], mean, rtol=1e-3, atol=1e-5)
    assert_allclose(heavy.grads[name], 3 * parts[0].grads[name], rtol=1e-4, atol=1e-6)
    assert_allclose(heavy.losses, 3 * parts[0].losses, rtol=1e-5)
    assert_allclose(heavy.outputs, parts[0].outputs, rtol=1e-5)
    plain = HeadTrainer(head, None, []).meta_step(params, batch([0]))
    assert not np.allclose(plain.grads[name], parts[0].grads[name], rtol=0.01)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_a_mixed_model_takes_repeated_rows_and_weighs_tasks(n_outputs):
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(8), 6)
    A, b = rng.normal(size=(48, 2)), rng.normal(size=(48, n_outputs))
    task = np.repeat(np.arange(8), 6)
    doubled = np.r_[np.arange(48), np.flatnonzero(task == 1)]
    # a task of weight two is a second task with its rows
    codes = np.r_[task, np.full(6, 8)]
    weight = np.where(task == 1, 2.0, 1.0)
    expected = start_of_numbers(A[doubled], b[doubled], codes)
    for got, value in zip(start_of_numbers(A, b, task, weight), expected, strict=True):
        assert_allclose(got, value, rtol=1e-6, atol=1e-9)
    # half of a row, twice, is the row
    halves = np.repeat(np.arange(48), 2)
    expected = start_of_numbers(A, b, task, weight)
    some = np.where(np.arange(48) % 3 == 0, 1.0, 2.0) * weight
    parts = start_of_numbers(A[halves], b[halves], task[halves], np.repeat(some, 2))
    assert not np.allclose(parts[0], expected[0])


def test_a_start_of_counts_takes_tasks_of_weight_two_as_two_tasks():
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(8), 6)
    A, b = rng.normal(size=(48, 2)), rng.poisson(4.0, size=(48, 1)).astype(float)
    doubled = np.r_[np.arange(48), np.flatnonzero(task == 1)]
    options = find_likelihood(Poisson()), np.ones(1)
    expected = start_of_outputs(A[doubled], b[doubled], np.r_[task, np.full(6, 8)], *options)
    got = start_of_outputs(A, b, task, *options, np.where(task == 1, 2.0, 1.0))
    for mine, value in zip(got, expected, strict=True):
        assert_allclose(mine, value, rtol=1e-5, atol=1e-8)


def test_a_pooled_start_of_classes_takes_repeated_rows():
    rng = np.random.default_rng(0)
    A, y = rng.normal(size=(60, 2)), rng.integers(0, 3, 60)
    count = rng.integers(1, 4, 60)
    again = np.repeat(np.arange(60), count)
    got = start_of_classes(A, y, 3, count.astype(float))[0]
    assert_allclose(got, start_of_classes(A[again], y[again], 3)[0], rtol=1e-3, atol=1e-4)


def test_held_out_tasks_decide_by_the_weights_of_their_rows():
    """As they do by rows that are there as often, and by tasks that are."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(12), 8)
    target = np.eye(2)[rng.integers(0, 2, 96)]
    logits = rng.normal(size=(96, 2)) + target
    count = np.tile(rng.integers(1, 4, 8), 12)
    again = np.repeat(np.arange(96), count)
    for likelihood in LIKELIHOODS.values():
        got = task_errors(logits, target, codes, likelihood, count.astype(float))
        expected = task_errors(logits[again], target[again], codes[again], likelihood)
        assert_allclose(got, expected)
    weight = count.astype(float)
    assert find_logit_scale(logits, target, weight) == find_logit_scale(
        logits[again], target[again]
    )
    steps = target + 0.1 * rng.normal(size=target.shape)
    steps[codes >= 6] += 5
    head, task = target + 1.0, np.arange(12)
    assert choose_share(head, steps, target, codes, task, LIKELIHOODS[False]) == 0
    few = np.where(codes >= 6, 1e-6, 1.0)
    assert choose_share(head, steps, target, codes, task, LIKELIHOODS[False], weight=few) > 0


def test_intervals_are_calibrated_on_weighted_rows():
    rng = np.random.default_rng(0)
    error, ones = np.abs(rng.normal(size=(4000, 1))), np.ones((4000, 1))
    bad = np.arange(4000) % 5 == 0
    error[bad] *= 20
    weight = np.where(bad, 1e-6, 1.0)
    task = np.arange(4000)

    def deviations(rows, weight=None):
        own = ones[rows]
        return _Deviations(5, error[rows], *[own] * 5, 0 * own, task[rows], weight)

    plain, down, without = (
        deviations(task >= 0),
        deviations(task >= 0, weight),
        deviations(~bad),
    )
    free = np.array([1e9]), np.array([False])
    assert_allclose(down.factor(free), without.factor(free), rtol=5e-3)
    assert plain.factor(free) > 2 * down.factor(free)
    assert_array_equal(down.scale(), without.scale())


# -- what weights are for ------------------------------------------------------------------------


def spoilt_tasks(n_tasks=30, seed=0):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(n_tasks), 20)
    A = rng.normal(size=(len(task), 2))
    y = (A * (1 + rng.normal(size=(n_tasks, 2)))[task]).sum(1) + 0.1 * rng.normal(size=len(task))
    bad = rng.random(len(task)) < 0.1
    bad[task >= 24] = False
    return A, np.where(bad, y + 20 * rng.normal(size=len(task)), y), task, bad


@pytest.mark.parametrize("rule", ["sgd", "gaussian-head"])
def test_spoilt_rows_of_little_weight_do_little_harm(rule):
    A, y, task, bad = spoilt_tasks()
    seen, new = task < 24, (task >= 24)
    errors = []
    for weight in (None, np.where(bad, 0.01, 1.0)[seen]):
        model = MAMLRegressor(
            hidden_layer_sizes=(8,), max_iter=60, random_state=0, update_rule=rule
        )
        model.fit(A[seen], y[seen], task[seen], weight)
        support = new & (np.arange(len(y)) % 4 == 0)
        model.adapt(A[support], y[support], groups=task[support])
        query = new & ~support
        errors.append(
            np.sqrt(np.mean((model.predict(A[query], groups=task[query]) - y[query]) ** 2))
        )
    assert errors[1] < 0.8 * errors[0]


# -- classes -------------------------------------------------------------------------------------


def test_class_weights_are_those_of_scikit_learn_over_all_rows(rule):
    model = fit("classification", rule, class_weight="balanced")
    counts = np.array([(label == LABELS).sum() for label in ("common", "rare")])
    assert_allclose(model.class_weight_, len(T) / (2 * counts))
    given = fit("classification", rule, class_weight={"common": 1.0, "rare": counts[0] / counts[1]})
    # to rounding, which is to the last bit but for the ratio of the weights
    assert_allclose(answers(model), answers(given), rtol=1e-3, atol=1e-5)
    assert not np.allclose(answers(model), answers(fit("classification", rule)), atol=1e-4)
    assert fit("classification", rule).class_weight_ is None


def test_balanced_weights_count_the_weights_of_rows():
    model = fit("classification", class_weight="balanced", weight=W)
    total = np.array([W[label == LABELS].sum() for label in ("common", "rare")])
    assert_allclose(model.class_weight_, W.sum() / (2 * total))


def test_class_weights_are_weights_of_the_rows_of_a_support_set(rule):
    """Those of the rows of `fit`, whatever the support set has; on average of one row each."""
    model = fit("classification", rule, class_weight={"common": 1.0, "rare": 4.0})
    of_rows = np.where(LABELS == "rare", 4.0, 1.0)
    plain = copy.copy(model)
    plain.targets_ = copy.copy(model.targets_)
    plain.targets_.class_weight_ = None
    weight = of_rows[:7] / of_rows[:7].mean()
    expected = plain.adapt(X[:7], LABELS[:7], sample_weight=weight).predict_proba(X)
    found = copy.copy(model).adapt(X[:7], LABELS[:7]).predict_proba(X)
    assert_allclose(found, expected, rtol=1e-6)
    few = FewShotClassifier(model).fit(X[:7], LABELS[:7]).predict_proba(X)
    assert_array_equal(few, found)


@pytest.mark.parametrize("weight", [None, W])
def test_rows_that_are_added_have_the_weights_of_their_classes(weight):
    model = fit("classification", "gaussian-head", class_weight={"common": 1.0, "rare": 4.0})
    first, more = (None, None) if weight is None else (weight[:4], weight[4:9])
    at_once = None if weight is None else weight[:9]
    expected = copy.copy(model).adapt(X[:9], LABELS[:9], sample_weight=at_once).predict_proba(X)
    model.adapt(X[:4], LABELS[:4], sample_weight=first)
    model.adapt(X[4:9], LABELS[4:9], sample_weight=more, extend=True)
    assert_allclose(model.predict_proba(X), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"class_weight": "balanced", "n_ways": 2}, "is for labels that the tasks share"),
        ({"class_weight": {"common": 1.0}, "n_ways": 2}, "is for labels that the tasks share"),
        ({"class_weight": {"common": 0.0, "rare": 1.0}}, "class_weight has to have positive"),
        ({"class_weight": {"other": 1.0}}, "are not in class_weight"),
        ({"class_weight": "even"}, "class_weight"),
    ],
)
def test_class_weights_that_cannot_be_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        fit("classification", **params)


def test_class_weights_may_not_be_changed_after_fit():
    model = fit("classification", class_weight="balanced").set_params(class_weight=None)
    with pytest.raises(ValueError, match="class_weight was changed after fit"):
        model.adapt(X[:7], LABELS[:7])


def test_a_rare_class_is_found_more_often_with_balanced_weights():
    """And probabilities are better where both classes count alike."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(24), 40)
    y = (rng.random(len(task)) < rng.uniform(0.05, 0.3, 24)[task]).astype(int)
    A = rng.normal(size=(len(task), 2)) + y[:, None]
    seen = task < 16
    support = ~seen & (np.arange(len(y)) % 4 == 0)
    query = ~seen & ~support
    recalls, losses = [], []
    for class_weight in (None, "balanced"):
        model = MAMLClassifier(**{**SMALL, "max_iter": 100}, class_weight=class_weight)
        model.fit(A[seen], y[seen], groups=task[seen])
        model.adapt(A[support], y[support], groups=task[support])
        p = model.predict_proba(A[query], groups=task[query])
        of_class = compute_sample_weight("balanced", y[query])
        losses.append(log_loss(y[query], p, sample_weight=of_class))
        recalls.append(np.mean(p[y[query] == 1, 1] > 0.5))
    assert recalls[1] > recalls[0] + 0.2
    assert losses[1] < losses[0]


# -- files, checkpoints and continued fits -------------------------------------------------------


def test_files_keep_class_weights(tmp_path):
    model = fit("classification", class_weight="balanced")
    model.save(tmp_path / "model")
    loaded = MAMLClassifier.load(tmp_path / "model")
    assert_array_equal(loaded.class_weight_, model.class_weight_)
    assert_array_equal(answers(loaded), answers(model))


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    class StopError(Exception):
        pass

    class Bomb(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 2:
                raise StopError

    def begin(weight, *callbacks):
        keeper = Checkpoint(tmp_path / "fit", every=0)
        return fit("regression", weight=weight, max_iter=100, callbacks=[*callbacks, keeper])

    with pytest.raises(StopError):
        begin(W, Bomb())
    for other in (None, np.r_[5.0, W[1:]]):
        with pytest.raises(ValueError, match="the tasks in X y and groups"):
            begin(other)
    expected = answers(fit("regression", weight=W, max_iter=100))
    assert_array_equal(answers(begin(W)), expected)


def test_a_continued_fit_takes_weights(kind):
    model = fit(kind, warm_start=True, early_stopping=False)  # no start is kept
    again = copy.deepcopy(model)
    _, y = KINDS[kind]
    model.fit(X, y, groups=T)
    again.fit(X, y, groups=T, sample_weight=W)
    assert again.n_iter_ == model.n_iter_
    assert not np.allclose(answers(model), answers(again))


@pytest.mark.parametrize("rung", ["vmap", "stacked", "native"])
@pytest.mark.parametrize("kind_of_rows", ["even", "ragged"])
def test_every_rung_gives_the_numbers_of_the_loop_for_weights_of_tasks(rung, kind_of_rows):
    rng = np.random.default_rng(0)
    A, b = (torch.from_numpy(rng.normal(size=(5, 8, n))) for n in (3, 1))
    weight = torch.from_numpy(rng.uniform(0.2, 3, (5, 8)))
    lengths = np.full(5, 4)
    if kind_of_rows == "ragged":
        lengths = np.array([4, 2, 3, 4, 1])
        weight[torch.arange(8)[None] % 4 >= torch.from_numpy(lengths)[:, None]] = 0
    given = weight[:, :4] / weight[:, :4].sum(1, keepdim=True)
    long = None if kind_of_rows == "even" else lengths
    batch = EpisodeBatch(
        Rows(A[:, :4], b[:, :4], given, long), Rows(A[:, 4:], b[:, 4:], weight[:, 4:] / 4, long)
    )
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    params = {f"module.{n}": p.detach() for n, p in module.named_parameters()}
    steps = []
    for name in ("loop", rung):
        engine = Engine(
            module,
            row_loss=SquaredError.rows,
            rule=SGD(),
            meta_gradient=SecondOrder(),
            adapted=[n for n, _ in module.named_parameters()],
            rung=name,
        )
        steps.append(engine.meta_step(params, batch, alpha=0.1, steps=2))
        assert engine.rung == name
    assert_allclose(steps[1].losses, steps[0].losses, rtol=1e-10)
    for name, grad in steps[0].grads.items():
        assert_allclose(steps[1].grads[name], grad, rtol=1e-8, atol=1e-12)


def test_weights_by_places_are_those_of_this_list():
    rng = np.random.default_rng(0)
    tasks = [(rng.normal(size=(6, 2)), rng.normal(size=6)) for _ in range(6)]
    reg = MAMLRegressor(max_iter=2, hidden_layer_sizes=(4,), random_state=0)
    reg.fit(tasks, sample_weight={j: 1.0 + j for j in range(6)})
    with pytest.raises(ValueError, match="has 7 keys, which are places in the list of tasks"):
        reg.fit(tasks, sample_weight={j: 1.0 for j in range(7)})
    with pytest.raises(ValueError, match="sample_weight of task 2 is 'a'; expected a number"):
        reg.fit(tasks, sample_weight={**dict.fromkeys(range(6), 1.0), 2: "a"})
