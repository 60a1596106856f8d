"""Rows that arrive one by one: `adapt(..., extend=True)`."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, adapt, load
from sklearn_maml.learners import conditioned, sums
from sklearn_maml.learners.exact import CompiledNumbers
from sklearn_maml.learners.gaussian import HeadFunctions
from sklearn_maml.learners.learner import Learner

N_TASKS, N_ROWS = 12, 8
SMALL = {
    "hidden_layer_sizes": (8,),
    "max_iter": 5,
    "update_rule": "gaussian-head",
    "random_state": 0,
}


def make(seed, n_tasks=N_TASKS, n_rows=N_ROWS, n_outputs=1):
    rng = np.random.RandomState(seed)
    X = rng.uniform(-2, 2, (n_tasks * n_rows, 2))
    task = np.repeat(np.arange(n_tasks), n_rows)
    coef = rng.randn(n_tasks, 3, n_outputs)[task]
    y = coef[:, 0] + (X[:, :, None] * coef[:, 1:]).sum(1) + 0.3 * rng.randn(len(X), n_outputs)
    order = rng.permutation(len(X))  # rows of all tasks in turn
    return X[order], y[order].squeeze(), task[order]


X, Y, G = make(0)
C = np.array(["low", "mid", "high"])[np.digitize(Y, [-1, 1])]
XN, YN, GN = make(1, 5, 40)
CN = np.array(["low", "mid", "high"])[np.digitize(YN, [-1, 1])]
XQ = make(2)[0][:15]
GQ = np.arange(15) % 5
W = np.random.RandomState(3).uniform(0.1, 5, len(XN))


def fit_regressor():
    model = MAMLRegressor(**SMALL).fit(X, Y, groups=G)
    # scales of tasks that depend on how well their rows are explained
    model.calibration_ = dataclasses.replace(model.calibration_, freedom=np.array([3.0]))
    return model


@pytest.fixture(scope="module")
def fitted():
    return fit_regressor()


@pytest.fixture(scope="module")
def reg(fitted):
    return copy.copy(fitted)


@pytest.fixture(scope="module")
def clf():
    return MAMLClassifier(**SMALL).fit(X, C, groups=G)


@pytest.fixture(params=["rows", "sums"])
def kept(request, monkeypatch):
    """What is kept of tasks that are extended; sums are made of pieces of few rows."""
    if request.param == "sums":
        monkeypatch.setattr(conditioned, "ROWS_PER_COLUMN", 0.0)
        monkeypatch.setattr(sums, "CACHED_ROWS", 7)
    return request.param


def in_parts(model, X, y, groups, weight=None, parts=9):
    """Copy of a model that got the rows in parts."""
    model = copy.copy(model)
    for rows in np.array_split(np.arange(len(X)), parts):
        w = None if weight is None else weight[rows]
        model.adapt(X[rows], y[rows], groups=groups[rows], sample_weight=w, extend=True)
    return model


def assert_same(one, other, X=XQ, groups=GQ, tol=1e-9):
    """Predictions, standard deviations or probabilities are equal."""
    if isinstance(one, MAMLClassifier):
        pairs = [[m.predict_proba(X, groups=groups)] for m in (one, other)]
    elif "gaussian-head" in one.learner_weights_:
        pairs = [m.predict(X, groups=groups, return_std=True) for m in (one, other)]
    else:
        pairs = [[m.predict(X, groups=groups)] for m in (one, other)]
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


# -- what it comes to ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_extending_comes_to_adapting_anew(reg, kept, weighted):
    weight = W if weighted else None
    anew = copy.copy(reg).adapt(XN, YN, groups=GN, sample_weight=weight)
    extended = in_parts(reg, XN, YN, GN, weight)
    assert_same(anew, extended)
    # bounds too
    far = {"X": np.full((5, 2), 1e5), "groups": np.arange(5)}
    np.testing.assert_allclose(anew.predict(**far), extended.predict(**far), rtol=1e-12)
    assert bool(extended._state.adapted.sums) == (kept == "sums")
    if kept == "sums":
        assert len(extended._state.adapted.support.X) == 0


def test_single_rows_come_to_adapting_anew(reg, kept):
    rows = GN < 2
    anew = copy.copy(reg).adapt(XN[rows], YN[rows], groups=GN[rows])
    extended = in_parts(reg, XN[rows], YN[rows], GN[rows], parts=rows.sum())
    assert_same(anew, extended, groups=GQ % 2)


def test_classes_come_to_adapting_anew(clf, kept):
    for weight in (None, W):
        anew = copy.copy(clf).adapt(XN, CN, groups=GN, sample_weight=weight)
        assert_same(anew, in_parts(clf, XN, CN, GN, weight))


def test_outputs_with_a_noise_of_their_own_come_to_adapting_anew(kept):
    model = MAMLRegressor(**SMALL).fit(*make(0, n_outputs=2)[:2], groups=make(0)[2])
    X, y, task = make(1, 5, 40, n_outputs=2)
    anew = copy.copy(model).adapt(X, y, groups=task)
    assert_same(anew, in_parts(model, X, y, task))


def test_counts_come_to_adapting_anew(kept):
    counts, more = np.floor(np.exp(Y / 4)), np.floor(np.exp(YN / 4))
    model = MAMLRegressor(**SMALL, loss="poisson").fit(X, counts, groups=G)
    extended = in_parts(model, XN, more, GN)
    assert_same(copy.copy(model).adapt(XN, more, groups=GN), extended)
    assert extended._state.adapted.sums == {}  # they would not say all that the rows do


def test_float32_comes_to_adapting_anew_within_its_digits(kept):
    model = MAMLRegressor(**SMALL).fit(X.astype(np.float32), Y, groups=G)
    few = XN.astype(np.float32)
    for weight in (None, W):
        anew = copy.copy(model).adapt(few, YN, groups=GN, sample_weight=weight)
        assert_same(anew, in_parts(model, few, YN, GN, weight), XQ.astype(np.float32), tol=1e-5)


def test_rows_without_weights_have_a_weight_of_one(reg, kept):
    half = np.arange(len(XN)) < len(XN) // 2
    anew = copy.copy(reg).adapt(XN, YN, groups=GN, sample_weight=np.where(half, 1, 1e-3 * W))
    model = copy.copy(reg).adapt(XN[half], YN[half], groups=GN[half])
    model.adapt(XN[~half], YN[~half], groups=GN[~half], sample_weight=1e-3 * W[~half], extend=True)
    assert_same(anew, model)


def test_weights_far_from_one_keep_their_ratios_within_a_call_and_are_refused_across(reg):
    far, most = 2.0**600 * W, W * 2.0 ** (10 - np.frexp(W.max())[1])
    model = copy.copy(reg).adapt(XN, YN, groups=GN, sample_weight=far)
    assert_same(model, copy.copy(reg).adapt(XN, YN, groups=GN, sample_weight=most))
    with pytest.raises(ValueError, match="weights so far from 1 are scaled"):
        model.adapt(XN[:3], YN[:3], groups=GN[:3], extend=True)
    with pytest.raises(ValueError, match="weights so far from 1 are scaled"):
        copy.copy(reg).adapt(XN, YN, groups=GN, sample_weight=far, extend=True)


def test_rows_of_no_weight_are_as_good_as_absent(reg, kept):
    model = copy.copy(reg).adapt(XN, YN, groups=GN)
    weight = np.where(np.arange(10) < 5, 0.0, 1.0)
    rows = np.r_[np.flatnonzero(GN == 0)[:5], np.flatnonzero(GN == 0)[:5]]
    more = copy.copy(model).adapt(
        XN[rows], YN[rows] + 9 * (weight == 0), groups=GN[rows], sample_weight=weight, extend=True
    )
    right = copy.copy(model).adapt(XN[rows[5:]], YN[rows[5:]], groups=GN[rows[5:]], extend=True)
    assert_same(right, more)


def test_other_tasks_keep_their_bits_and_new_ones_are_adapted(reg, kept):
    old = GN < 3
    before = copy.copy(reg).adapt(XN[old], YN[old], groups=GN[old])
    after = copy.copy(before)
    rows = (GN == 1) | (GN == 4)
    after.adapt(XN[rows], YN[rows], groups=GN[rows], extend=True)
    for task in (0, 2):
        ids = np.full(len(XQ), task)
        np.testing.assert_array_equal(before.predict(XQ, groups=ids), after.predict(XQ, groups=ids))
    new = copy.copy(reg).adapt(XN[GN == 4], YN[GN == 4], groups=GN[GN == 4])
    assert_same(new, after, groups=np.full(len(XQ), 4))
    with pytest.raises(ValueError, match="not adapted to, such as \\[3\\]"):
        after.predict(XQ, groups=np.full(len(XQ), 3))


def test_one_task_without_an_id_is_extended(reg, kept):
    rows = np.flatnonzero(GN == 0)[:15]
    anew = copy.copy(reg).adapt(XN[rows], YN[rows])
    model = copy.copy(reg)
    for part in np.array_split(rows, 5):
        model.adapt(XN[part], YN[part], extend=True)
    assert_same(anew, model, groups=None)


def test_lists_are_extended_place_by_place(reg, kept):
    of = [np.flatnonzero(j == GN) for j in range(3)]
    anew = copy.copy(reg).adapt([(XN[r], YN[r]) for r in of])
    model = copy.copy(reg).adapt([(XN[r[:4]], YN[r[:4]]) for r in of[:2]] + [(XN[:0], YN[:0])])
    model.adapt(
        [(XN[of[0][4:]], YN[of[0][4:]]), (XN[:0], YN[:0]), (XN[of[2]], YN[of[2]])], extend=True
    )
    model.adapt([(XN[:0], YN[:0]), (XN[of[1][4:]], YN[of[1][4:]]), (XN[:0], YN[:0])], extend=True)
    for one, other in zip(anew.predict([XQ] * 3), model.predict([XQ] * 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_ids_are_the_same_by_value(reg):
    days = [datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)]
    first = np.array([days[int(g)] for g in GN[GN < 2]], dtype=object)
    model = copy.copy(reg).adapt(XN[GN < 2], YN[GN < 2], groups=first)
    model.adapt(XN[:3], YN[:3], groups=pd.to_datetime([days[1]] * 3), extend=True)
    assert model._state.n_tasks == 2
    model.adapt(XN[:4], YN[:4], groups=["a", "a", "b", "b"], extend=True)
    assert model._state.n_tasks == 4
    for task in (days[0], "b"):
        assert np.isfinite(model.predict(XQ[:1], groups=pd.Series([task]))).all()


def test_a_task_without_rows_gets_its_first_ones(reg):
    none = copy.copy(reg).adapt([(X[:0], Y[:0])])
    model = copy.copy(none).adapt([(XN[:9], YN[:9])], extend=True)
    assert_same(copy.copy(reg).adapt(XN[:9], YN[:9]), model, groups=None)
    assert not np.allclose(none.predict(XQ), model.predict(XQ))
    prior = copy.copy(reg).set_params(unseen_tasks="prior")
    prior.adapt(XN[:0], YN[:0], groups=[], extend=True)
    prior.adapt(XN[:9], YN[:9], groups=["a"] * 9, extend=True)
    np.testing.assert_array_equal(prior.predict(XQ, groups=["b"] * len(XQ)), none.predict(XQ))
    np.testing.assert_allclose(prior.predict(XQ, groups=["a"] * len(XQ)), model.predict(XQ))


def test_a_learner_that_keeps_support_sets_is_extended():
    model = MAMLRegressor(**{**SMALL, "update_rule": Nearest()}).fit(X, Y, groups=G)
    assert_same(copy.copy(model).adapt(XN, YN, groups=GN), in_parts(model, XN, YN, GN))
    with pytest.raises(ValueError, match="with adapt_steps=0"):
        copy.copy(model).set_params(adapt_steps=0).adapt(XN[:3], YN[:3], extend=True)


class Nearest(Learner):
    """Predicts a mean of support targets, by how near their rows are."""

    def build(self, problem):
        return nn.Linear(2, 3)

    def outputs(self, network, support, query):
        distance = torch.cdist(network(query.X), network(support.X))
        weight = (-distance).exp()
        if support.weight is not None:
            weight = weight * support.weight.unsqueeze(1)
        return (weight @ support.y) / (weight.sum(-1, keepdim=True) + 1e-9)


# -- what it costs -------------------------------------------------------------------------------


def test_room_and_rows_per_update_are_bounded(reg, monkeypatch):
    monkeypatch.setattr(conditioned, "ROWS_PER_COLUMN", 1)
    most = reg._learner.head.n_columns
    seen = []
    columns, condition = HeadFunctions.columns, CompiledNumbers.condition

    def spy(self, X):
        seen.append(len(X))
        return columns(self, X)

    def spy_on_kernel(self, X, *args, **options):
        seen.append(X.shape[:2].numel())
        return condition(self, X, *args, **options)

    monkeypatch.setattr(HeadFunctions, "columns", spy)
    monkeypatch.setattr(CompiledNumbers, "condition", spy_on_kernel)
    model = copy.copy(reg)
    X, y, _ = make(4, 1, 3 * most)
    room = []
    for k in range(len(X)):
        seen.clear()
        model.adapt(X[k : k + 1], y[k : k + 1], extend=True)
        assert max(seen) <= most + 1
        room.append(len(pickle.dumps(model._state.adapted.state())))
    assert max(seen) == 1
    assert room[-1] == room[2 * most]
    assert len(model._state.adapted.support.X) == 0


def test_a_huge_support_set_goes_through_in_pieces_and_is_kept_as_sums(reg, monkeypatch):
    X, y, _ = make(4, 1, 4000)
    task, groups = np.zeros(len(X)), np.zeros(len(XQ))
    whole = copy.copy(reg).adapt(X, y, groups=task).predict(XQ, groups=groups, return_std=True)
    monkeypatch.setattr(sums, "CACHED_ROWS", 100)
    monkeypatch.setattr(conditioned, "room_of_sums", lambda head: 1000)
    seen = []
    columns = HeadFunctions.columns
    monkeypatch.setattr(
        HeadFunctions, "columns", lambda self, X: (seen.append(len(X)), columns(self, X))[1]
    )
    model = copy.copy(reg).adapt(X, y, groups=task)
    assert max(seen) == 100
    assert len(model._state.adapted.support.X) == 0
    for one, other in zip(whole, model.predict(XQ, groups=groups, return_std=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_rows_are_kept_where_they_take_less_room(reg):
    model = copy.copy(reg).adapt(XN, YN, groups=GN)
    assert len(model._state.adapted.support.X) == len(XN)
    assert model._state.adapted.sums == {}


# -- refusals ------------------------------------------------------------------------------------


def fit_other(**params):
    data = np.tile(["a", "b"], len(X))[np.lexsort((np.arange(len(X)), G)).argsort()]
    data = data if "n_ways" in params else Y
    kind = MAMLRegressor if data is Y else MAMLClassifier
    return kind(**{**SMALL, "update_rule": "sgd", **params}).fit(X, data, groups=G), data


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"steps": 1}, "gradient steps start from the initialisation"),
        ({"center_y": True}, "with center_y the mean of all its rows"),
        ({"n_ways": 2, "n_shots": 1, "n_queries": 1}, "with n_ways the labels of a task"),
    ],
    ids=["steps", "center_y", "n_ways"],
)
def test_what_needs_the_earlier_rows_says_so_and_keeps_what_it_has(params, reason):
    model, y = fit_other(**params)
    two = np.flatnonzero(G == 0)
    with pytest.raises(ValueError, match=f"{reason}.*Call adapt with the old rows and the new"):
        model.adapt(X[two], y[two], groups=G[two], extend=True)
    assert "_state" not in vars(model)
    model.adapt(X[two], y[two], groups=G[two])
    before = model._state
    with pytest.raises(ValueError, match=reason):
        model.adapt(X[two], y[two], groups=G[two], extend=True)
    assert model._state is before


def test_a_mixture_with_gradient_steps_is_refused():
    model = MAMLRegressor(**{**SMALL, "update_rule": "auto"}).fit(X, Y, groups=G)
    model.learner_weights_ = {"gaussian-head": 0.6, "gradient-steps": 0.4}
    for _ in range(2):
        with pytest.raises(ValueError, match="gradient steps start from"):
            model.adapt(XN[:3], YN[:3], extend=True)
        model.adapt(XN[:3], YN[:3])


def test_tasks_whose_rows_were_left_out_are_not_extended(reg):
    model = copy.copy(reg).set_params(adapt_steps=0)
    with pytest.raises(ValueError, match="with adapt_steps=0 the rows of a task are left out"):
        model.adapt(XN[:3], YN[:3], extend=True)
    model.adapt(XN[:3], YN[:3]).set_params(adapt_steps=None)
    with pytest.raises(ValueError, match="it left them out"):
        model.adapt(XN[:3], YN[:3], extend=True)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"groups": GN}, {}, "5 tasks are adapted, and their rows may be of any"),
        ({}, {"groups": GN}, "one task without an id"),
        ({"groups": GN}, "list", "2 tasks without ids, and adapt got task ids"),
        ("list", {"groups": GN}, "5 tasks with ids, and adapt got 2 tasks without"),
        ("list", "longer list", "3 tasks without ids, and adapt got 2 tasks without"),
    ],
)
def test_rows_whose_task_is_not_known_are_refused_and_nothing_is_lost(reg, first, then, message):
    def call(model, how, **options):
        if isinstance(how, dict):
            rows = slice(None) if how else slice(5)
            return model.adapt(XN[rows], YN[rows], **how, **options)
        return model.adapt([(XN[:3], YN[:3])] * (2 + ("longer" in how)), **options)

    model = call(copy.copy(reg), first)
    before = model._state
    with pytest.raises(ValueError, match=message):
        call(model, then, extend=True)
    assert model._state is before


def test_an_error_in_the_rows_loses_nothing(reg):
    model = copy.copy(reg).adapt(XN, YN, groups=GN)
    before = model._state
    for X, y, groups, message in (
        (np.full((1, 2), np.nan), [1.0], [0], "NaN"),
        (np.ones((1, 3)), [1.0], [0], "3 features"),
        (np.ones((1, 2)), [[1.0, 2.0]], [0], "2 output"),
        (np.ones((1, 2)), [1.0], [0, 1], "2 ids for 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model.adapt(X, y, groups=groups, extend=True)
    assert model._state is before


# -- what else there is --------------------------------------------------------------------------


def test_files_pickles_and_copies_are_extended_alike(reg, kept, tmp_path):
    half = np.arange(len(XN)) < 100
    model = in_parts(reg, XN[half], YN[half], GN[half], W[half])
    model.save(tmp_path / "model.safetensors")
    others = [load(tmp_path / "model.safetensors"), pickle.loads(pickle.dumps(model))]
    others += [copy.copy(model), copy.deepcopy(model)]
    before = model.predict(XQ, groups=GQ)
    right = in_parts(model, XN[~half], YN[~half], GN[~half], W[~half])
    for other in others:
        np.testing.assert_array_equal(other.predict(XQ, groups=GQ), before)
        more = in_parts(other, XN[~half], YN[~half], GN[~half], W[~half])
        assert_same(right, more, tol=1e-12)
    np.testing.assert_array_equal(model.predict(XQ, groups=GQ), before)


def test_threads_lose_no_rows_of_each_other(reg, kept):
    model = copy.copy(reg)
    start = threading.Barrier(5)

    def stream(task):
        start.wait()
        rows = np.flatnonzero(task == GN)
        for part in np.array_split(rows, 4):
            model.adapt(XN[part], YN[part], groups=GN[part], extend=True)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(stream, range(5)))
    assert_same(copy.copy(reg).adapt(XN, YN, groups=GN), model)


def test_module_of_an_extended_task_predicts_as_it_does(reg, kept):
    model = in_parts(reg, XN, YN, GN)
    module = model.adapted_module(2)
    got = module(torch.as_tensor(XQ)).numpy()
    np.testing.assert_allclose(got, model.predict(XQ, groups=[2] * len(XQ)), rtol=1e-9)


def test_pipelines_and_ensembles_are_extended_and_left_as_they_were():
    with sklearn.config_context(enable_metadata_routing=True):
        maml = MAMLRegressor(**SMALL)
        inner = TransformedTargetRegressor(maml, transformer=StandardScaler())
        both = VotingRegressor([("a", inner), ("b", MAMLRegressor(**SMALL))])
        pipe = make_pipeline(StandardScaler(), both).fit(X, Y, groups=G)
    rows = np.flatnonzero(GN == 0)[:15]
    first = adapt(pipe, XN[rows[:9]], YN[rows[:9]])
    before = first.predict(XQ)
    more = adapt(first, XN[rows[9:]], YN[rows[9:]], extend=True)
    anew = adapt(pipe, XN[rows], YN[rows])
    np.testing.assert_allclose(more.predict(XQ), anew.predict(XQ), rtol=1e-9)
    np.testing.assert_array_equal(first.predict(XQ), before)


def test_rows_are_suggested_for_extended_tasks_as_for_those_adapted_anew(reg, kept):
    pool = make(5, 5, 20)
    anew = copy.copy(reg).adapt(XN, YN, groups=GN)
    for model in (in_parts(reg, XN, YN, GN), in_parts(reg, XN, YN, GN, parts=2)):
        chosen = [m.suggest_rows(pool[0], 4, groups=pool[2]) for m in (anew, model)]
        assert np.array_equal(*chosen)
