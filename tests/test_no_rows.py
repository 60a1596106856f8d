"""K = 0: tasks without labelled rows get the population prediction, wherever rows may be given."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import sklearn_maml
from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    adapt_predict,
    task_scorer,
    task_scores,
)
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.exceptions import NotAdaptedError
from sklearn_maml.inspection import AdaptationCurveDisplay, TaskScoresDisplay
from sklearn_maml.learners.head_trainer import HeadTrainer
from sklearn_maml.learners.learner import Learner

X, Y, G = make_sinusoid_tasks(n_tasks=20, n_rows=8, random_state=0)
C = np.array(["low", "high"])[(Y > 0).astype(int)]
FRAME = pd.DataFrame({"x": X[:, 0], "task": G})
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0}
NEW = X[:5] + 0.1


class MeanOfSupport(Learner):
    """Predicts the mean of the support targets, or what it has learned where there are none."""

    def build(self, problem):
        return nn.Linear(1, problem.n_outputs)

    def outputs(self, network, support, query):
        y = support.y
        weight = support.weight
        if weight is None:
            weight = y.new_full(y.shape[:2], 1 / y.shape[1])
        own = (y * weight.unsqueeze(-1)).sum(1, keepdim=True)
        return own + network(query.X[..., :1])


RULES = {
    "the default": {},
    "head": {"update_rule": "gaussian-head"},
    "steps": {"update_rule": "sgd", "steps": 2},
    "centred": {"update_rule": "sgd", "steps": 2, "center_y": True},
    "adam": {"update_rule": "adam", "steps": 2},
    "implicit": {"update_rule": "sgd", "steps": 2, "meta_gradient": "implicit"},
    "solved": {"update_rule": "ridge-head", "adapted": "head"},
    "own": {"update_rule": MeanOfSupport()},
}


@pytest.fixture(scope="module", params=RULES)
def reg(request):
    return MAMLRegressor(**SMALL, **RULES[request.param]).fit(X, Y, groups=G)


@pytest.fixture(scope="module")
def mixed():
    """A model whose two learners both have a share."""
    model = MAMLRegressor(**SMALL).fit(X, Y, groups=G)
    model.learner_weights_ = {"gaussian-head": 0.6, "gradient-steps": 0.4}
    return model


def with_prior(model):
    return copy.copy(model).set_params(unseen_tasks="prior")


def population(model, rows=NEW):
    return adapt(model, X[:0], Y[:0]).predict(rows)


# --- adapt takes tasks without rows, in every spelling


SPELLINGS = {
    "a list": lambda m: m.adapt([(X[:0], Y[:0]), (X[:3], Y[:3]), (X[:0], Y[:0])]).predict(
        [NEW] * 3
    ),
    "empty lists": lambda m: m.adapt([([], []), (X[:3], Y[:3])]).predict([NEW, NEW]),
    "only empty": lambda m: m.adapt([([], []), (X[:0], Y[:0])]).predict([NEW, NEW]),
    "a stack": lambda m: m.adapt(np.empty((2, 0, 1)), np.empty((2, 0))).predict(
        np.stack([NEW] * 2)
    ),
    "two lists": lambda m: [m.adapt([], []).predict(NEW)],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_task_without_rows_gets_the_population_prediction(reg, name):
    model = copy.copy(reg)
    np.testing.assert_array_equal(SPELLINGS[name](model)[0], population(reg))


def test_tasks_beside_one_without_rows_are_learned_as_alone(reg):
    beside = copy.copy(reg).adapt([(X[:0], Y[:0]), (X[:3], Y[:3])]).predict([NEW, NEW])[1]
    np.testing.assert_allclose(beside, adapt(reg, X[:3], Y[:3]).predict(NEW), rtol=1e-10)
    assert not np.allclose(beside, population(reg))


def test_it_is_the_prediction_before_adaptation(mixed):
    before = copy.copy(mixed).set_params(adapt_steps=0).adapt(X[:3], Y[:3])
    np.testing.assert_allclose(population(mixed), before.predict(NEW), rtol=1e-10)


@pytest.mark.parametrize("make", [MAMLRegressor, MAMLClassifier])
def test_a_share_of_gradient_steps_begins_with_the_first_row(make):
    y = Y if make is MAMLRegressor else C
    model = make(**SMALL).fit(X, y, groups=G)
    ask = "predict" if make is MAMLRegressor else "predict_proba"
    outputs = {}
    for share in (0.0, 0.4, 1.0):
        model.learner_weights_ = {"gaussian-head": 1 - share, "gradient-steps": share}
        model.adapt([(X[:0], y[:0]), (X[:1], y[:1])])
        outputs[share] = [np.asarray(p) for p in getattr(model, ask)([NEW, NEW])]
    np.testing.assert_array_equal(outputs[0.4][0], outputs[0.0][0])
    assert not np.allclose(outputs[0.4][1], outputs[0.0][1])
    assert not np.allclose(outputs[1.0][0], outputs[0.0][0])


def test_a_support_set_of_given_episodes_may_be_empty():
    tasks = [
        (X[j == G][: j % 3], Y[j == G][: j % 3], X[j == G][3:], Y[j == G][3:]) for j in range(9)
    ]
    for rule in ("sgd", "gaussian-head"):
        model = MAMLRegressor(**SMALL, update_rule=rule).fit(tasks)
        assert np.isfinite(model.score(tasks))


def test_frames_columns_and_weights_without_rows():
    model = MAMLRegressor(task_column="task", **SMALL).fit(FRAME, Y)
    expected = with_prior(model).predict(FRAME[:5])
    for none in (FRAME[:0], FRAME[["x"]][:0], FRAME.to_numpy()[:0]):
        after = adapt(with_prior(model), none, Y[:0], sample_weight=[])
        np.testing.assert_array_equal(after.predict(FRAME[:5]), expected)


def test_rows_without_weight_are_no_rows(reg):
    tasks = [(X[:3], Y[:3]), (X[8:12], Y[8:12])]
    given = copy.copy(reg).adapt(tasks, sample_weight=[np.zeros(3), np.ones(4)])
    expected = copy.copy(reg).adapt([(X[:0], Y[:0]), tasks[1]], sample_weight=[[], np.ones(4)])
    np.testing.assert_array_equal(given.predict([NEW] * 2), expected.predict([NEW] * 2))
    alone = adapt(reg, X[:3], Y[:3], sample_weight=np.zeros(3))
    np.testing.assert_array_equal(alone.predict(NEW), population(reg))


def test_without_a_prior_there_is_nothing_to_predict_from_rows_without_weight():
    with pytest.raises(ValueError, match="weights are all zero"):
        FewShotRegressor().fit(X[:3], Y[:3], sample_weight=np.zeros(3))


def test_several_targets():
    model = MAMLRegressor(**SMALL).fit(X, np.c_[Y, -Y], groups=G)
    for none in (Y[:0], np.empty((0, 2))):
        mean, std = copy.copy(model).adapt(X[:0], none).predict(NEW, return_std=True)
        assert mean.shape == std.shape == (5, 2)


# --- unseen tasks


def test_unseen_tasks_are_an_error_by_default_that_names_them(reg):
    model = copy.copy(reg)
    with pytest.raises(NotAdaptedError, match="unseen_tasks='prior'"):
        model.predict(NEW)
    model.adapt(X[:4], Y[:4], groups=["a", "a", "b", "b"])
    with pytest.raises(ValueError, match=r"1 task id\(s\).*\['c'\].*unseen_tasks='prior'"):
        model.predict(NEW, groups=list("abcab"))
    with pytest.raises(ValueError, match="unseen_tasks"):
        MAMLRegressor(unseen_tasks="mean").fit(X, Y, groups=G)


def test_unseen_tasks_get_the_population_prediction_if_asked(reg):
    model, expected = with_prior(reg), population(reg)
    np.testing.assert_array_equal(model.predict(NEW), expected)
    np.testing.assert_array_equal(model.predict(NEW, groups=list("abcab")), expected)
    np.testing.assert_array_equal(model.predict([NEW, NEW])[1], expected)
    assert "_state" not in vars(model)
    model.adapt(X[:4], Y[:4], groups=["a", "a", "b", "b"])
    known = copy.copy(reg).adapt(X[:4], Y[:4], groups=["a", "a", "b", "b"])
    predicted = model.predict(NEW, groups=list("acbdc"))
    np.testing.assert_array_equal(predicted[[1, 3, 4]], expected[[1, 3, 4]])
    np.testing.assert_allclose(predicted[[0, 2]], known.predict(NEW[[0, 2]], groups=["a", "b"]))
    with pytest.raises(ValueError, match="adapted to 2 tasks: pass groups"):
        model.predict(NEW)
    model.adapt(X[:0], Y[:0], groups=[])
    np.testing.assert_array_equal(model.predict(NEW, groups=list("abcab")), expected)


def test_the_population_is_a_plain_module_too(mixed):
    model = with_prior(mixed).adapt(X[:4], Y[:4], groups=["a", "a", "b", "b"])
    for task in ("a", "new"):
        outputs = model.adapted_module(task)(torch.from_numpy(NEW)).detach().numpy()
        np.testing.assert_allclose(outputs, model.predict(NEW, groups=[task] * 5), rtol=1e-6)


def test_deviations_of_unseen_tasks_are_those_of_the_prior(mixed):
    model = with_prior(mixed).adapt(X[:4], Y[:4], groups=["a", "a", "b", "b"])
    mean, std = model.predict(NEW, groups=list("acbdc"), return_std=True)
    of_prior = with_prior(mixed).predict(NEW, return_std=True)
    np.testing.assert_allclose(mean[[1, 3, 4]], of_prior[0][[1, 3, 4]])
    np.testing.assert_allclose(std[[1, 3, 4]], of_prior[1][[1, 3, 4]])
    assert (std[[0, 2]] != of_prior[1][[0, 2]]).all()


@pytest.mark.parametrize("rule", ["sgd", "auto", "gaussian-head"])
def test_classes_of_unseen_tasks(rule):
    clf = MAMLClassifier(**SMALL, update_rule=rule, unseen_tasks="prior").fit(X, C, groups=G)
    p = clf.predict_proba(NEW)
    assert p.shape == (5, 2)
    np.testing.assert_allclose(p.sum(1), 1)
    clf.adapt([(X[:0], C[:0]), (X[:4], C[:4])])
    for method in ("predict_proba", "predict_log_proba", "decision_function", "predict"):
        of_prior = getattr(adapt(clf, X[:0], []), method)(NEW)
        values = getattr(clf, method)(NEW, groups=[0, 1, 5, 6, 0])
        np.testing.assert_array_equal(values[[0, 2, 3, 4]], of_prior[[0, 2, 3, 4]])


def test_local_labels_have_no_population():
    clf = MAMLClassifier(n_ways=2, n_shots=1, unseen_tasks="prior", **SMALL)
    clf.fit(X, np.arange(len(X)) % 2, groups=G)
    with pytest.raises(ValueError, match=r"inside their task only.*n_ways=None"):
        clf.predict(NEW)
    clf.adapt(X[:4], ["u", "v", "u", "v"], groups=[1, 1, 2, 2])
    assert set(clf.predict(NEW, groups=[1, 2, 1, 2, 1])) <= {"u", "v"}
    with pytest.raises(ValueError, match="inside their task only"):
        clf.predict(NEW, groups=[1, 2, 1, 2, 3])


# --- everything around the estimators


def test_pipelines_few_shot_estimators_and_partitions():
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), MAMLRegressor(**SMALL, unseen_tasks="prior"))
        pipe.fit(X, Y, groups=G)
        expected = pipe.predict(NEW, groups=list("abcab"))
        adapted = adapt(pipe, [(X[:0], Y[:0]), (X[:3], Y[:3])])
        predicted = adapted.predict(NEW, groups=[0, 1, 7, 1, 0])
    np.testing.assert_array_equal(adapt(pipe, X[:0], Y[:0]).predict(NEW), expected)
    np.testing.assert_array_equal(predicted[[0, 2, 4]], expected[[0, 2, 4]])
    np.testing.assert_array_equal(FewShotRegressor(pipe).fit(X[:0], Y[:0]).predict(NEW), expected)
    parts = adapt_predict(
        pipe,
        X[:16],
        Y[:16],
        NEW,
        groups_support=G[:16],
        groups_query=[0, 90, 1, 91, 92],
        tasks_per_partition=1,
    )
    np.testing.assert_array_equal(parts[[1, 3, 4]], expected[[1, 3, 4]])
    assert (parts[[0, 2]] != expected[[0, 2]]).all()
    model = copy.copy(pipe[-1]).set_params(unseen_tasks="error")
    with pytest.raises(ValueError, match=r"\[90\].*unseen_tasks='prior'"):
        adapt_predict(model, X, Y, NEW, groups_support=G, groups_query=[0, 90, 1, 1, 1])


def test_containers_pass_on_that_there_are_no_rows():
    inner = MAMLRegressor(**SMALL)
    with sklearn.config_context(enable_metadata_routing=True):
        scaled = TransformedTargetRegressor(inner, transformer=StandardScaler())
        mean = VotingRegressor([("a", inner), ("b", make_pipeline(StandardScaler(), inner))])
        for model in (scaled, mean):
            model.fit(X, Y, groups=G)
            predicted = adapt(model, X[:0], Y[:0]).predict(NEW)
            assert predicted.shape == (5,)
            assert np.isfinite(predicted).all()


def test_few_shot_estimators_need_a_prior_for_that():
    clf = MAMLClassifier(**SMALL).fit(X, C, groups=G)
    learner = FewShotClassifier(clf).fit(X[:0], C[:0])
    np.testing.assert_array_equal(learner.predict_proba(NEW), with_prior(clf).predict_proba(NEW))
    for new in (FewShotRegressor(), FewShotClassifier()):
        with pytest.raises(ValueError, match=r"0 sample\(s\)"):
            new.fit(X[:0], Y[:0])


@pytest.mark.parametrize("make", [MAMLRegressor, MAMLClassifier])
def test_fit_and_score_still_need_rows(make):
    y = Y if make is MAMLRegressor else C
    model = make(**SMALL)
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        model.fit(X[:0], y[:0])
    model.fit(X, y, groups=G)
    for call in (model.score, task_scorer("r2" if y is Y else "accuracy").__call__):
        arguments = (X[:0], y[:0]) if call == model.score else (model, X[:0], y[:0])
        with pytest.raises(ValueError, match=r"0 sample\(s\)"):
            call(*arguments)


def test_a_file_keeps_tasks_without_rows(reg, tmp_path):
    if isinstance(reg.update_rule, Learner):
        pytest.skip("files name learners of the package")
    model = with_prior(reg).adapt([(X[:0], Y[:0]), (X[:3], Y[:3])])
    model.save(tmp_path / "model")
    back = sklearn_maml.load(tmp_path / "model")
    groups = [0, 1, 7, 1, 0]
    np.testing.assert_array_equal(
        back.predict(NEW, groups=groups), model.predict(NEW, groups=groups)
    )


def test_scores_and_displays_begin_without_rows(mixed):
    new = G + 100
    scores = task_scores(mixed, X, Y, groups=new, n_shots=0)
    np.testing.assert_array_equal(scores.before, scores.after)
    assert (scores.n_queries == 8).all()
    after = task_scores(mixed, X, Y, groups=new, n_shots=4)
    assert (after.before != after.after).any()
    with_none = task_scorer("neg_root_mean_squared_error", n_shots=0, average="macro")
    assert with_none(mixed, X, Y, groups=new) == pytest.approx(scores.after.mean())
    display = TaskScoresDisplay.from_estimator(mixed, X, Y, groups=new, n_shots=0)
    np.testing.assert_allclose(display.after, -scores.after)
    curve = AdaptationCurveDisplay.from_estimator(mixed, X, Y, groups=new, n_shots=0, steps=[0, 2])
    np.testing.assert_allclose(curve.scores[0], curve.scores[1])


def test_scorers_of_scikit_learn_score_the_population_if_asked():
    model = MAMLRegressor(**SMALL, unseen_tasks="prior")
    with sklearn.config_context(enable_metadata_routing=True):
        scores = cross_val_score(
            model, X, Y, scoring="r2", params={"groups": G}, cv=GroupKFold(2), error_score="raise"
        )
    assert np.isfinite(scores).all()


# --- what it is worth


def linear_tasks(n_tasks, n_rows, seed):
    """Lines whose level and slope differ from task to task."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n_tasks, n_rows, 1))
    level, slope = rng.normal(2, 1, (n_tasks, 1)), rng.normal(-1, 0.5, (n_tasks, 1))
    return X, level + slope * X[:, :, 0] + 0.3 * rng.normal(size=(n_tasks, n_rows))


def test_intervals_are_honest_without_rows_and_move_on_continuously():
    X, y = linear_tasks(120, 12, 0)
    model = MAMLRegressor(
        hidden_layer_sizes=(8,), update_rule="gaussian-head", max_iter=100, random_state=0
    ).fit(X, y)
    X_new, y_new = linear_tasks(200, 30, 1)
    stds, errors = [], []
    for k in (0, 1, 2, 4, 8):
        model.adapt(X_new[:, :k], y_new[:, :k])
        mean, std = model.predict(X_new[:, 10:], return_std=True)
        inside = np.abs(y_new[:, 10:] - mean) < 1.645 * std
        assert 0.85 < inside.mean() < 0.96, k
        stds.append(std.mean())
        errors.append(np.sqrt(((y_new[:, 10:] - mean) ** 2).mean()))
    assert stds == sorted(stds, reverse=True)
    assert errors == sorted(errors, reverse=True)
    # rows of hardly any weight are next to none: their task is next to the population
    model.adapt(X_new[:1, :0], y_new[:1, :0])
    without = model.predict(X_new[:1, 10:], return_std=True)
    far = model.adapt(X_new[:1, :1], without[0][:, :1]).predict(X_new[:1, 10:], return_std=True)
    np.testing.assert_allclose(far[0], without[0], atol=0.6)
    assert (far[1] < without[1]).all()


def test_nothing_is_warned_of_where_rows_are_missing(mixed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        population(mixed)


def test_heads_of_classes_learn_from_no_rows_too(monkeypatch):
    given = set()
    meta_step = HeadTrainer.meta_step

    def noted(self, params, batch):
        given.add(batch.n_given)
        return meta_step(self, params, batch)

    monkeypatch.setattr(HeadTrainer, "meta_step", noted)
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(240, 2)), np.repeat(np.arange(12), 20)
    clf = MAMLClassifier(max_iter=100, hidden_layer_sizes=(4,), random_state=0)
    clf.fit(X, (X[:, 0] > 0).astype(int), groups=task)
    assert {0, 1, 2} < given


def test_intervals_without_rows_are_calibrated_by_themselves():
    # few tasks are far from the others, which makes the prior wide for most of them
    def tasks(n_tasks, seed):
        rng = np.random.RandomState(seed)
        level = rng.randn(n_tasks) * np.where(np.arange(n_tasks) % 10, 0.1, 3.0)
        A = rng.uniform(-1, 1, (12 * n_tasks, 1))
        task = np.repeat(np.arange(n_tasks), 12)
        return A, A[:, 0] + level[task] + 0.1 * rng.randn(len(task)), task

    reg = MAMLRegressor(unseen_tasks="prior", **SMALL)
    A, y, task = tasks(60, 0)
    reg.fit(A, y, groups=task)
    A, y, task = tasks(200, 1)

    def half(given):
        rows = np.arange(len(y)) % 12 < given
        reg.adapt(A[rows], y[rows], groups=task[rows])
        mean, std = reg.predict(A[~rows], groups=task[~rows], return_std=True)
        return np.mean(np.abs(mean - y[~rows]) < 0.674 * std)

    of_none = half(0)
    assert 0.4 < half(5) < 0.65
    factor = reg.calibration_.factor[-1:]
    reg.calibration_ = dataclasses.replace(
        reg.calibration_, factor=factor, sizes=reg.calibration_.sizes[-1:]
    )
    assert 1 - of_none > 2 * (1 - half(0))  # half of them are to be outside


def test_probabilities_have_a_factor_for_each_size_of_a_support_set():
    # three classes of tasks that have little in common: without rows one knows less than the
    # head thinks that it does, and more after some
    rng = np.random.RandomState(0)
    task = np.repeat(np.arange(40), 12)
    A = rng.uniform(-1, 1, (len(task), 2))
    level = 2 * rng.randn(40, 3)
    y = (level[task] + A[:, :1] + rng.gumbel(size=(len(task), 3))).argmax(1)
    clf = MAMLClassifier(unseen_tasks="prior", **SMALL).fit(A, y, groups=task)
    calibration = dataclasses.replace(clf.calibration_, offset=None)
    np.testing.assert_array_equal(calibration.sizes[:3], [0, 1, 2])
    assert calibration.factor.shape == (len(calibration.sizes), 1)

    rows = (np.arange(len(y)) % 12 < 2) & (task < 20)  # and none of the other tasks
    clf.calibration_ = calibration
    clf.adapt(A[rows], y[rows], groups=task[rows])
    before = clf.predict_proba(A, groups=task)
    factor = calibration.factor.copy()
    factor[0] *= 0.5
    clf.calibration_ = dataclasses.replace(calibration, factor=factor)
    clf.adapt(A[rows], y[rows], groups=task[rows])
    after = clf.predict_proba(A, groups=task)
    given = task < 20
    np.testing.assert_array_equal(after[given], before[given])
    logs = np.log(before[~given])
    flat = np.exp(0.5 * (logs - logs.mean(1, keepdims=True)))
    np.testing.assert_allclose(after[~given], flat / flat.sum(1, keepdims=True), rtol=1e-6)


def three_classes(n_rare_tasks=0):
    """Labels of which the third is rare, and a fourth one that only some tasks have."""
    rng = np.random.RandomState(0)
    task = np.repeat(np.arange(80), 10)
    A = rng.uniform(-1, 1, (len(task), 2))
    level = np.array([2.0, 0.5, -1.0]) + rng.randn(80, 3)
    y = (level[task] + A[:, :1] * [0, 1, 2] + rng.gumbel(size=(len(task), 3))).argmax(1)
    return A, np.where(task < n_rare_tasks, 3, y), task


def population_of(clf, A, y, task):
    return clf.adapt(A[:0], y[:0], groups=task[:0]).predict_proba(A, groups=task)


def test_classes_are_as_probable_without_rows_as_they_are_frequent():
    A, y, task = three_classes()
    clf = MAMLClassifier(unseen_tasks="prior", **SMALL)
    for weight in (np.ones(len(y)), np.where(y == 2, 4.0, 1.0)):
        clf.fit(A, y, groups=task, sample_weight=weight)
        frequency = np.bincount(y, weight) / weight.sum()
        p = np.average(population_of(clf, A, y, task), axis=0, weights=weight)
        np.testing.assert_allclose(p, frequency, rtol=0.05)
        # and not by accident
        clf.calibration_ = dataclasses.replace(clf.calibration_, factor=clf.calibration_.factor / 2)
        assert np.average(population_of(clf, A, y, task), axis=0, weights=weight)[2] > 0.15


def test_of_a_class_that_one_task_has_frequencies_tell_less():
    A, y, task = three_classes(1)
    clf = MAMLClassifier(unseen_tasks="prior", **SMALL).fit(A, y, groups=task)
    ratio = population_of(clf, A, y, task).mean(0) * len(y) / np.bincount(y)
    assert not 0.9 < ratio[3] < 1.1  # it is drawn to what the head has learned
    np.testing.assert_allclose(ratio[:2], 1, atol=0.05)


def test_the_offset_of_classes_fades_as_rows_come(tmp_path):
    A, y, task = three_classes()
    clf = MAMLClassifier(unseen_tasks="prior", **SMALL).fit(A, y, groups=task)
    rows = (np.arange(len(y)) % 10 < 3) & (task < 40)
    known = task < 40
    before = clf.adapt(A[rows], y[rows], groups=task[rows]).predict_proba(A, groups=task)
    offset = np.array([0.0, 0.0, 1.0])
    clf.calibration_ = dataclasses.replace(
        clf.calibration_, offset=clf.calibration_.offset + offset
    )
    after = clf.adapt(A[rows], y[rows], groups=task[rows]).predict_proba(A, groups=task)
    for some, part in ((~known, 1), (known, 1 / 7)):  # three rows of half of a row are so much
        odds = before[some] * np.exp(part * offset)
        np.testing.assert_allclose(after[some], odds / odds.sum(1, keepdims=True), rtol=1e-6)
    sklearn_maml.save(tmp_path / "model", clf)
    again = sklearn_maml.load(tmp_path / "model").predict_proba(A, groups=task)
    np.testing.assert_allclose(again, after, rtol=1e-6)
    with torch.no_grad():
        plain = clf.adapted_module(3)(torch.from_numpy(A))
    ids = np.full(len(A), 3)
    np.testing.assert_allclose(plain, clf.predict_proba(A, groups=ids), rtol=1e-6)
    none = clf.adapt(A[:0], y[:0], groups=task[:0])
    with torch.no_grad():
        plain = none.adapted_module(None)(torch.from_numpy(A))
    np.testing.assert_allclose(plain, none.predict_proba(A, groups=task), rtol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_without_rows_are_those_of_a_row_of_no_weight(n_classes):
    A, y, task = three_classes()
    y = (y == 2).astype(int) if n_classes == 2 else y
    clf = MAMLClassifier(unseen_tasks="prior", **SMALL).fit(A, y, groups=task)
    assert np.abs(clf.calibration_.offset).max() > 0.01
    none = population_of(clf, A, y, task)
    rare = n_classes - 1
    frequent = np.flatnonzero(y == 0)[:1]
    found = []
    for weight in (1e-9, 1.0):
        clf.adapt(A[frequent], y[frequent], groups=["new"], sample_weight=[weight])
        found.append(clf.predict_proba(A, groups=["new"] * len(A)))
    np.testing.assert_allclose(found[0], none, atol=1e-6)
    assert found[1][:, rare].mean() < none[:, rare].mean()
