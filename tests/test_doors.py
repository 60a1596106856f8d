"""Where tools and people hand over tasks: routing, scores without tasks, odd arguments."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from numpy.testing import assert_array_equal
from scipy.sparse import csr_matrix
from sklearn.ensemble import StackingRegressor
from sklearn.inspection import permutation_importance
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from sklearn_maml import (
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    task_scorer,
    task_scores,
)
from sklearn_maml.data import tasks as data_tasks
from sklearn_maml.data.ids import look_scaled
from sklearn_maml.exceptions import (
    DroppedLearnerWarning,
    OutlierWarning,
    SingleTaskWarning,
    TaskColumnWarning,
)
from sklearn_maml.targets import real

N_TASKS, N_ROWS = 6, 8
TASK = np.repeat(np.arange(N_TASKS), N_ROWS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(len(TASK), 2))
Y = (X * RNG.normal(size=(N_TASKS, 2))[TASK]).sum(1)
FRAME = pd.DataFrame(X, columns=["x", "z"]).assign(task=TASK)
SCHOOL = TASK // 2  # tasks of one school stay together
SMALL = {
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 1,
    "hidden_layer_sizes": (4,),
    "max_iter": 2,
    "n_shots": 3,
    "early_stopping": False,
    "random_state": 0,
}


@pytest.fixture
def column():
    return MAMLRegressor(**SMALL, task_column="task")


# -- a task column beside groups -----------------------------------------------------------------


@pytest.mark.parametrize("routing", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("scoring", [None, task_scorer("r2", n_shots=3)], ids=["own", "scorer"])
@pytest.mark.parametrize("groups", [TASK, SCHOOL, SCHOOL.astype(str)], ids=["task", "s", "text"])
def test_groups_are_for_the_splitter_where_a_column_tells_the_task(
    column, routing, scoring, groups
):
    pipe = make_pipeline(FunctionTransformer(), column)
    with sklearn.config_context(enable_metadata_routing=routing):
        given = {"params": {"groups": groups}} if routing else {"groups": groups}
        scores = cross_validate(column, FRAME, Y, cv=GroupKFold(3), scoring=scoring, **given)
        search = GridSearchCV(
            pipe, {"mamlregressor__alpha": [0.1]}, cv=GroupKFold(3), scoring=scoring
        )
        search.fit(FRAME, Y, groups=groups)
        assert search.best_estimator_[-1].n_tasks_ == N_TASKS
        own = [search.cv_results_[f"split{k}_test_score"][0] for k in range(3)]
    # as with the splits of the same groups, which nobody else sees
    splits = list(GroupKFold(3).split(X, groups=groups))
    expected = cross_val_score(column, FRAME, Y, cv=splits, scoring=scoring)
    assert_array_equal(scores["test_score"], expected)
    assert_array_equal(own, expected)


def test_routed_groups_reach_every_method_and_change_nothing(column):
    plain = column.fit(FRAME, Y).adapt(FRAME, Y).predict(FRAME)
    score, scores = column.score(FRAME, Y), task_scores(column, FRAME, Y).after
    both = MAMLRegressor(**SMALL, task_column="task").fit(FRAME, Y, groups=SCHOOL)
    assert both.score(FRAME, Y, groups=SCHOOL) == score
    assert_array_equal(task_scores(both, FRAME, Y, groups=TASK).after, scores)
    both.adapt(FRAME, Y, groups=SCHOOL)
    assert_array_equal(both.predict(FRAME, groups=SCHOOL), plain)
    for groups in (np.arange(len(TASK)), np.arange(len(TASK)) % 2):
        for call in (
            lambda groups=groups: both.fit(FRAME, Y, groups=groups),
            lambda groups=groups: both.adapt(FRAME, Y, groups=groups),
            lambda groups=groups: both.predict(FRAME, groups=groups),
            lambda groups=groups: both.score(FRAME, Y, groups=groups),
            lambda groups=groups: task_scorer("r2")(both, FRAME, Y, groups=groups),
        ):
            with pytest.raises(ValueError, match="groups that put rows of one task into several"):
                call()


# -- rows of several tasks without task information ----------------------------------------------


@pytest.fixture(scope="module")
def named():
    return MAMLRegressor(**SMALL).fit(X, Y, groups=TASK)


def scored_by_a_search(named):
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(named, {"alpha": [0.1]}, cv=GroupKFold(2))
        search.fit(X, Y, groups=TASK)
    return search.score(X, Y)


POOLED = {
    "score": lambda reg: reg.score(X, Y),
    "score of a pipeline": lambda reg: Pipeline([("maml", reg)]).score(X, Y),
    "score of a search": scored_by_a_search,
    "scorer": lambda reg: task_scorer("r2")(reg, X, Y),
    "scores": lambda reg: task_scores(reg, X, Y),
    "importance": lambda reg: permutation_importance(
        reg, X, Y, scoring=task_scorer("r2"), n_repeats=1
    ),
    "adapt": lambda reg: reg.adapt(X, Y),
    "adapt function": lambda reg: adapt(reg, X, Y),
}


@pytest.mark.parametrize("name", POOLED)
def test_rows_of_several_tasks_without_ids_are_warned_of(name, named):
    message = "treats all 48 rows as one task.*pass groups"
    with pytest.warns(SingleTaskWarning, match=message) as warned:
        POOLED[name](copy.copy(named))
    if name in ("score", "scorer", "scores", "adapt", "adapt function"):
        assert [w.filename for w in warned] == [__file__]  # the line that can be changed


def test_rows_of_one_task_need_no_ids(named, tmp_path):
    one, y = X[:N_ROWS], Y[:N_ROWS]
    named.save(tmp_path / "model")
    for reg in (copy.copy(named), MAMLRegressor.load(tmp_path / "model")):
        reg.score(one, y)
        task_scores(reg, one, y)
        reg.adapt(one, y).score(X, Y)  # of the task it is adapted to
    # a FewShot estimator has one task only
    FewShotRegressor(named).fit(X, Y)
    # a task that is large says so
    named.adapt(X, Y, groups=np.zeros(len(X)))
    with pytest.warns(SingleTaskWarning):
        MAMLRegressor.load(tmp_path / "model").score(X, Y)


def test_options_of_predict_are_given_by_name(named):
    reg = copy.copy(named).adapt(X[:4], Y[:4])
    for second in (True, np.zeros(len(X))):
        with pytest.raises(TypeError, match="positional argument"):
            reg.predict(X, second)


@pytest.mark.parametrize("method", ["predict_proba", "predict_log_proba", "decision_function"])
def test_the_second_place_of_a_method_that_predicts_is_nobodys(method):
    """It would be an option in one estimator of scikit-learn and weights in another."""
    labels, few = Y > 0, slice(4)
    clf = MAMLClassifier(**{**SMALL, "n_shots": None}).fit(X, labels, groups=TASK)
    clf.adapt(X[few], labels[few], groups=TASK[few])
    ask = getattr(clf, method)
    assert len(ask(X[few], groups=TASK[few])) == 4
    with pytest.raises(TypeError, match="positional argument"):
        ask(X[few], TASK[few])


# -- a task column that was scaled ---------------------------------------------------------------


def test_a_task_column_that_was_scaled_is_warned_of():
    """A scaler over all columns is harmless as long as every call goes through it."""
    table = np.c_[X, TASK]
    scaler = StandardScaler().fit(table)
    pipe = make_pipeline(scaler, MAMLRegressor(**SMALL, task_column=2)).fit(table, Y)
    adapted = adapt(pipe, table, Y)
    assert len(adapted.predict(table)) == len(Y)
    assert len(adapt(pipe, table + 10, Y).predict(table + 10)) == len(Y)  # other tasks, scaled
    model = MAMLRegressor(**SMALL, task_column=2).fit(table, Y)
    scaled = scaler.transform(table)
    for raw_first, (maml, rows) in {True: (model, scaled), False: (pipe[-1], table)}.items():
        seen = (
            r"ids such as \[-1.4.*had \[0.0, 1.0" if raw_first else r"ids such as \[0.0.*had \[-1"
        )
        for call in (lambda m=maml, r=rows: m.adapt(r, Y), lambda m=maml, r=rows: adapt(m, r, Y)):
            with pytest.warns(TaskColumnWarning, match=f"{seen}.*passthrough") as warned:
                call()
            assert [w.filename for w in warned] == [__file__]
    model = MAMLRegressor(**SMALL, task_column=2).fit(table, Y).adapt(table, Y)
    with pytest.raises(ValueError, match=r"such as \[-1.4.*adapt are \[0.0.*passthrough"):
        model.predict(scaled)
    with pytest.raises(ValueError, match=r"such as \[100.0.*Call adapt with support rows"):
        model.predict(table + 100)
    model.set_params(unseen_tasks="prior")
    with pytest.warns(TaskColumnWarning, match="no task id that was adapted to") as warned:
        model.predict(scaled)
    assert [w.filename for w in warned] == [__file__]


def test_ids_that_look_scaled():
    whole, fractions = np.array([3.0, 5.0, 11.0]), np.array([-1.1, -0.5, 1.3])
    assert look_scaled(fractions, whole)
    assert look_scaled(whole.astype(int), fractions)
    assert not look_scaled(whole + 100, whole)
    assert not look_scaled(whole + 100, whole.astype(int))
    assert look_scaled(fractions * 3.3 + 0.7, fractions)
    assert not look_scaled(np.array([-1.1, -0.5, 2.3]), fractions)
    assert not look_scaled(np.array([0.1, 0.2, 0.3]), np.array([1.1, 1.2, 1.3]))  # evenly spaced
    assert not look_scaled(np.array(["a", "b"]), whole)


# -- places in a list ----------------------------------------------------------------------------


def test_the_place_in_a_list_is_no_id(named):
    reg = copy.copy(named).adapt(X, Y, groups=1 - TASK)
    sets = [X[j == TASK] for j in range(N_TASKS)]
    for query in (sets, sets[:2], np.stack(sets)):
        with pytest.raises(ValueError, match=r"adapt got task ids, such as \[-4, -3, -2\]"):
            reg.predict(query)
    for support in ([(x, Y[j == TASK]) for j, x in enumerate(sets)],):
        reg.adapt(support)
        whole = reg.predict(sets)
        assert_array_equal(np.concatenate(whole), reg.predict(np.stack(sets)).reshape(-1))
        for query in (sets[:2], [*sets, X], np.stack(sets[:2])):
            with pytest.raises(ValueError, match=r"and adapt got 6 tasks without ids"):
                reg.predict(query)


# -- numbers -------------------------------------------------------------------------------------


def on_a_scale(dtype, scale=1.0, shift=0.0, **params):
    """R^2 of targets on another scale, and how far from those of the plain fit they are."""
    x = X.astype(np.float32)
    reg = MAMLRegressor(**{**SMALL, "max_iter": 30, **params})
    plain = reg.fit(x, Y, groups=TASK).adapt(x, Y, groups=TASK).predict(x, groups=TASK)
    y = (Y * scale + shift).astype(dtype)
    found = reg.fit(x, y, groups=TASK).adapt(x, y, groups=TASK).predict(x, groups=TASK)
    return np.abs((found.astype(np.float64) - shift) / scale - plain).max() / Y.std()


@pytest.mark.parametrize("params", [{}, {"center_y": True}, {"update_rule": "gaussian-head"}])
def test_targets_keep_their_digits_on_every_scale(params):
    assert on_a_scale(np.float16, 1e-5, **params) < 0.03  # steps of 6e-8
    assert on_a_scale(np.float16, 20.0, **params) < 0.03  # of more than 13.6
    assert on_a_scale(np.float32, 1e-28, **params) < 1e-3
    assert on_a_scale(np.float64, 2.0, 1.6e9, **params) < 1e-3
    assert on_a_scale(np.float64, 1e-3, -1e6, **params) < 1e-3


def test_predictions_are_of_the_type_of_the_features_where_that_has_the_digits():
    x = X.astype(np.float32)
    reg = MAMLRegressor(**SMALL).fit(x, Y, groups=TASK).adapt(x, Y, groups=TASK)
    assert reg.predict(x, groups=TASK).dtype == np.float32
    y = Y + 1e9
    reg = MAMLRegressor(**SMALL).fit(x, y, groups=TASK).adapt(x, y, groups=TASK)
    predicted = reg.predict(x, groups=TASK)
    assert predicted.dtype == np.float64
    rows = x[TASK == 1]
    module = reg.adapted_module(1)(torch.as_tensor(rows)).detach().numpy()
    assert np.abs(module - predicted[TASK == 1]).max() < 1e-5


@pytest.mark.parametrize("at_a_time", [None, 7])
def test_a_glitch_among_the_targets_is_warned_of(at_a_time, monkeypatch):
    if at_a_time is not None:  # as of very many rows
        monkeypatch.setattr(data_tasks, "AT_A_TIME", at_a_time)
        monkeypatch.setattr(real, "ENOUGH", 120)
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), 20)
    x, y = rng.normal(size=(240, 2)), rng.normal(size=240)
    glitch = y.copy()
    glitch[17] += 1000
    for params in ({}, {"center_y": True}):
        with pytest.warns(OutlierWarning, match=r"1 of 240 targets.*in row 17"):
            MAMLRegressor(**SMALL, **params).fit(x, glitch, groups=task)
    # tails are not glitches, and tasks that differ in level have none
    for y_ in (y, rng.standard_t(3, size=240), np.exp(y), y + 1000 * (task == 3), (y > 2.4) * 1.0):
        MAMLRegressor(**SMALL).fit(x, y_, groups=task)


# -- what people pass ----------------------------------------------------------------------------

TASKS = [(X[j == TASK], Y[j == TASK]) for j in range(N_TASKS)]
DATASET = TensorDataset(torch.as_tensor(X), torch.as_tensor(Y))
NO_LIST = {
    "generator": (lambda: (task for task in TASKS), r"X is a generator.*pass list\(X\)"),
    "dict": (lambda: dict(enumerate(TASKS)), r"X is a dict.*pass list\(X.values\(\)\)"),
    "values": (lambda: dict(enumerate(TASKS)).values(), r"X is a dict_values.*pass list\(X\)"),
    "groupby": (lambda: FRAME.groupby("task"), r"X is a DataFrameGroupBy.*as task_column"),
    "Dataset": (lambda: DATASET, r"X is a TensorDataset.*\[\(X.numpy\(\), y.numpy\(\)\)"),
    "DataLoader": (lambda: DataLoader(DATASET), r"X is a DataLoader.*\[\(X.numpy\(\)"),
}


@pytest.mark.parametrize("name", NO_LIST)
def test_tasks_that_are_no_list_are_refused_with_the_list_to_pass(name, named):
    make, message = NO_LIST[name]
    for call in (MAMLRegressor(**SMALL).fit, copy.copy(named).adapt):
        with pytest.raises(ValueError, match=message):
            call(make())


def test_sparse_rows_with_a_task_column_are_refused():
    sparse = csr_matrix(np.c_[X, TASK])
    reg = MAMLRegressor(**SMALL, task_column=2).fit(sparse.toarray(), Y)
    for call in (lambda: reg.fit(sparse, Y), lambda: reg.predict(sparse)):
        with pytest.raises(TypeError, match=r"Sparse data.*Use X\.toarray"):
            call()


@pytest.mark.parametrize("rule", ["sgd", "auto", "ridge-head"])
def test_a_caller_may_be_in_inference_mode(rule, tmp_path):
    params = {**SMALL, "update_rule": rule, "adapted": "head", "early_stopping": "auto"}
    reg = MAMLRegressor(**params).fit(X, Y, groups=TASK)
    expected = reg.adapt(X[:4], Y[:4]).predict(X)
    plain = FewShotRegressor(steps=2, random_state=0).fit(X, Y).predict(X)
    with torch.inference_mode():
        inside = MAMLRegressor(**params).fit(X, Y, groups=TASK)
        assert_array_equal(inside.adapt(X[:4], Y[:4]).predict(X), expected)
        score = inside.fit(X, Y, groups=TASK).score(X, Y, groups=TASK)
        inside.save(tmp_path / "model")
        loaded = MAMLRegressor.load(tmp_path / "model")
        one = FewShotRegressor(steps=2, random_state=0).fit(X, Y)
    assert_array_equal(one.predict(X), plain)
    assert score == reg.score(X, Y, groups=TASK)
    for model in (inside, loaded):
        assert_array_equal(model.adapt(X[:4], Y[:4]).predict(X), expected)


def test_log_losses_take_tasks_with_rows_of_one_class():
    labels = np.where(Y > 0, "yes", "no")
    labels[TASK == 2] = "yes"
    clf = MAMLClassifier(**{**SMALL, "n_shots": None}).fit(X, labels, groups=TASK)
    by_task = task_scores(clf, X, labels, groups=TASK, scoring="neg_log_loss", n_shots=1)
    mean = task_scorer("neg_log_loss", average="macro", n_shots=1)(clf, X, labels, groups=TASK)
    assert mean == pytest.approx(by_task.after.mean())
    # the task of one class: minus the mean log of the probability of that class
    only = task_scores(clf, X, labels, groups=TASK, scoring=log_of_yes, n_shots=1)
    assert by_task.after[2] == pytest.approx(only.after[2])
    pooled = task_scorer("neg_log_loss", n_shots=1)(clf, X, labels, groups=TASK)
    assert pooled == pytest.approx(task_scorer(log_loss_scorer, n_shots=1)(clf, X, labels, TASK))


def log_of_yes(estimator, X, y):
    return float(np.log(estimator.predict_proba(X)[:, 1]).mean())


def log_loss_scorer(estimator, X, y):
    return -log_loss(y, estimator.predict_proba(X))


# -- a fit that goes on --------------------------------------------------------------------------


def test_a_continued_fit_keeps_the_share_that_other_tasks_have_shown():
    reg = MAMLRegressor(
        **{**SMALL, "update_rule": "auto", "max_iter": 3, "early_stopping": "auto"}, warm_start=True
    ).fit(X, Y, groups=TASK)
    # as if many tasks had shown it
    reg.learner_weights_ = {"gaussian-head": 0.2, "gradient-steps": 0.8}
    low, high = reg.calibration_.low - 5, reg.calibration_.high + 5
    reg.calibration_ = dataclasses.replace(reg.calibration_, low=low, high=high)
    for params in ({}, {"early_stopping": False}, {"early_stopping": True}):
        reg.set_params(**params).fit(X[TASK < 4], Y[TASK < 4], groups=TASK[TASK < 4])
        assert reg.learner_weights_ == pytest.approx({"gaussian-head": 0.2, "gradient-steps": 0.8})
        assert_array_equal([reg.calibration_.low, reg.calibration_.high], [low, high])


def test_a_continued_fit_says_which_learner_it_drops(monkeypatch):
    reg = MAMLRegressor(
        **{**SMALL, "update_rule": "auto", "max_iter": 3, "early_stopping": "auto"}, warm_start=True
    ).fit(X, Y, groups=TASK)
    reg.learner_weights_ = {"gaussian-head": 0.2, "gradient-steps": 0.8}
    monkeypatch.setattr("sklearn_maml.estimators.training.choose", lambda *a: (0.0, a[2]))
    with pytest.warns(DroppedLearnerWarning, match=r"a share of 0\.8.*have none"):
        reg.fit(X, Y, groups=TASK)


def test_a_fit_goes_on_with_what_the_one_before_has_trained():
    params = {**SMALL, "update_rule": "auto", "max_iter": 2, "early_stopping": False}
    reg = MAMLRegressor(**params, warm_start=True).fit(X, Y, groups=TASK)
    assert reg.learner_weights_ == {"gaussian-head": 1.0}
    reg.set_params(early_stopping="auto").fit(X, Y, groups=TASK)
    assert reg.learner_weights_ == {"gaussian-head": 1.0}
    assert reg.n_iter_ == 4


# -- stacking ------------------------------------------------------------------------------------


def test_a_stacking_of_models_with_a_task_column_predicts_unseen_tasks_in_its_folds():
    column = MAMLRegressor(**SMALL, task_column="task", unseen_tasks="prior")
    with sklearn.config_context(enable_metadata_routing=True):
        stack = StackingRegressor([("maml", column)], final_estimator=Ridge(), cv=2)
        stack.fit(FRAME, Y)
    new, y = FRAME[TASK == 1].assign(task=99), Y[TASK == 1]
    adapted = adapt(stack, new[:4], y[:4])
    member = copy.copy(stack.estimators_[0]).adapt(new[:4], y[:4])
    expected = stack.final_estimator_.predict(member.predict(new)[:, None])
    np.testing.assert_allclose(adapted.predict(new), expected)
