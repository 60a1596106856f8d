"""Members of a Gaussian head start from different mixed models, and each task weighs them."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, load, save
from sklearn_maml.learners import start
from sklearn_maml.learners.base import Support
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.conditioned import Calibration, Conditioned
from sklearn_maml.learners.gaussian import TRUST, TRUST_FREEDOM, GaussianHead
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.likelihoods import Normal, TwoClasses
from sklearn_maml.learners.start import (
    Bent,
    Differ,
    InLevel,
    some_tasks,
    start_of_numbers,
    start_of_outputs,
)
from sklearn_maml.targets import CrossEntropy, SquaredError

RNG = np.random.RandomState


def random_head(n_outputs=1):
    rng = RNG(0)
    body = MLPBody(2, [3, 6], nn.ReLU(), torch.Generator().manual_seed(0))
    starts = [
        (
            rng.randn(4, n_outputs),
            np.tril(rng.randn(4, 4)),
            1 + rng.rand(n_outputs),
            0.1 + rng.rand(n_outputs),
        )
        for _ in range(2)
    ]
    likelihood = Normal(SquaredError())
    return GaussianHead(body, starts, np.zeros(3), np.ones(3), likelihood=likelihood).double()


def conditioned(head, sizes):
    edge = np.full(head.n_outputs, 1e6)
    return Conditioned.on(head, Calibration(-edge, edge), labelled(head, sizes))


def labelled(head, sizes):
    rng, codes = RNG(1), np.repeat(np.arange(len(sizes)), sizes)
    y = rng.randn(len(codes), head.n_outputs)
    return Support(rng.randn(len(codes), 3), y, codes, len(sizes), None)


@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("n_rows", [2, 30])  # fewer and more rows than the 10 columns
def test_members_count_by_the_density_of_the_support_rows(n_rows, n_outputs):
    head = random_head(n_outputs)
    tasks, rows = conditioned(head, [n_rows, 0]), labelled(head, [n_rows, 0])
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    prior, S = (part.numpy() for part in run.columns(torch.from_numpy(rows.X)))
    logs = np.empty((2, n_outputs))
    for j in range(2):
        for o in range(n_outputs):
            a = np.broadcast_to(run.amplitude()[j, 0].detach() if n_outputs > 1 else 1.0, n_outputs)
            cov = a[o] ** 2 * (S[j] @ S[j].T + run.noise()[j, o].item() * np.eye(n_rows))
            r = rows.y[:, o] - a[o] * prior[j, :, o]
            logs[j, o] = multivariate_t(shape=cov, df=TRUST_FREEDOM).logpdf(r)
    expected = np.exp(TRUST * (logs - logs.max(0)))
    np.testing.assert_allclose(tasks.trust[:, 0], expected / expected.sum(0), rtol=1e-8)
    assert (tasks.trust[:, 1] == 0.5).all()  # without rows they count the same


def test_a_row_of_weight_two_is_the_row_twice_for_the_trust():
    head = random_head()
    rng = RNG(1)
    X, y = rng.randn(5, 3), rng.randn(5, 1)
    edge = np.full(1, 1e6)
    twice = Support(np.r_[X, X], np.r_[y, y], np.zeros(10, int), 1, None)
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    rows = torch.from_numpy(X)[None], torch.from_numpy(y)[None]
    given = run.condition(*rows, torch.full((1, 5), np.sqrt(2.0), dtype=torch.float64))
    expected = Conditioned.on(head, Calibration(-edge, edge), twice).trust
    np.testing.assert_allclose(run.trust(given).detach().numpy(), expected, rtol=1e-8)


def test_predictions_are_those_of_the_members_by_what_they_count():
    tasks = conditioned(random_head(), [4])
    rows, codes = RNG(2).randn(7, 3), np.zeros(7, int)
    members, trust = tasks.member_outputs(rows, codes), tasks.trust[:, 0]
    mean, std = tasks.std(rows, codes)
    np.testing.assert_allclose(mean[:, 0], trust[:, 0] @ members[..., 0], rtol=1e-10)
    np.testing.assert_allclose(tasks.outputs(rows, codes), mean, rtol=1e-10)
    tasks.trust[:] = [[[1.0]], [[0.0]]]
    alone = tasks.std(rows, codes)
    np.testing.assert_allclose(alone[0], members[0], rtol=1e-10)
    assert not np.allclose(std, alone[1])
    plain = tasks.module(0)(torch.from_numpy(rows)).detach().numpy()
    np.testing.assert_allclose(plain, members[0], rtol=1e-10)


def test_trust_goes_with_more_rows_and_into_files():
    head = random_head()
    tasks = conditioned(head, [6, 3])
    s = tasks.support
    first = np.array([0, 1, 2, 6])
    later = np.setdiff1d(np.arange(9), first)
    parts = [dataclasses.replace(s, X=s.X[i], y=s.y[i], codes=s.codes[i]) for i in (first, later)]
    grown = Conditioned.on(head, tasks.calibration, parts[0]).extended(parts[1])
    np.testing.assert_allclose(grown.trust, tasks.trust, rtol=1e-8)
    state = tasks.state()
    back = Conditioned.from_state(head, tasks.calibration, state)
    np.testing.assert_array_equal(back.trust, tasks.trust)
    del state["trust"]  # as files of older versions
    assert (Conditioned.from_state(head, tasks.calibration, state).trust == 0.5).all()


def test_without_rows_members_count_what_meta_training_has_found():
    head, edge = random_head(2), np.full(2, 1e6)
    before = np.array([[0.2, 0.7], [0.8, 0.3]])
    calibration = Calibration(-edge, edge, members=before)
    rows = labelled(head, [6, 0])
    tasks = Conditioned.on(head, calibration, rows)
    np.testing.assert_allclose(tasks.trust[:, 1], before, rtol=1e-12)
    alike = Conditioned.on(head, Calibration(-edge, edge), rows).trust[:, 0]
    expected = before * alike
    np.testing.assert_allclose(tasks.trust[:, 0], expected / expected.sum(0), rtol=1e-10)


def test_members_count_as_much_as_held_out_tasks_are_theirs(tmp_path):
    x, level, codes = curves(0.0)
    rising = level + RNG(7).randn(40)[codes, None] * x
    found = []
    for y in (level, rising):
        reg = MAMLRegressor(update_rule="gaussian-head", max_iter=1, random_state=0)
        found.append(reg.fit(x, y[:, 0], groups=codes).calibration_.members)
    in_level = [members[3, 0] for members in found]  # of five, whose share would be .2
    assert in_level[0] > 0.2
    assert in_level[1] < 0.1
    np.testing.assert_allclose(np.sum(found, axis=1), 1)
    save(tmp_path / "model", reg)
    np.testing.assert_array_equal(load(tmp_path / "model").calibration_.members, found[1])
    reg.set_params(early_stopping=False).fit(x, rising[:, 0], groups=codes)
    assert reg.calibration_.members is None  # there are no held-out tasks


def test_hinges_are_units_of_the_network():
    body = MLPBody(2, [3, 8, 8], nn.ReLU(), n_waves=2)
    before = [p.clone() for p in body.parameters()]
    feature, knot = np.array([0, 0, 2]), np.array([-0.5, 0.3, 0.0])
    assert body.room_for_hinges == 4
    assert MLPBody(2, [3, 8], nn.Tanh()).room_for_hinges == 0
    body.bend(1, feature, knot)
    X = RNG(0).randn(20, 3)
    found = body.features(dict(body.named_parameters()), torch.from_numpy(X).float())
    got = found[1, :, :3].detach().numpy()
    np.testing.assert_allclose(got, body.hinges(X, feature, knot), atol=1e-6)
    assert (got.max(0) > 0).all()
    assert (got.min(0) == 0).all()
    after = list(body.parameters())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))


def curves(bend, n_tasks=40, n_rows=12, own=0.0, seed=0):
    rng, codes = RNG(seed), np.repeat(np.arange(n_tasks), n_rows)
    x = rng.uniform(-2, 2, len(codes))
    of_task = (bend + own * rng.randn(n_tasks))[codes]
    y = rng.randn(n_tasks)[codes] + of_task * np.maximum(x, 0) + 0.1 * rng.randn(len(codes))
    return x[:, None], y[:, None], codes


@pytest.mark.parametrize("by_task", [False, True])
def test_lines_bend_as_far_as_the_data_say(by_task):
    for bend, own in ((3.0, 0.0), (3.0, 1.0), (0.0, 0.0)):
        X, y, codes = curves(bend, own=own)
        columns = np.c_[X, np.maximum(X, 0)]
        mean, factor, *_ = start_of_numbers(
            columns, y, codes, None, Bent(np.zeros(1, int), by_task)
        )
        assert mean[2, 0] == pytest.approx(bend, abs=0.5 if own else 0.1)
        assert (factor[2, 2] > 0.3) == bool(by_task and own)
        assert (factor[2, :2] == 0).all()


def test_a_start_of_very_many_tasks_looks_at_some_of_them_whole():
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 4))
    np.testing.assert_array_equal(np.sort(some_tasks(codes, 3)), np.arange(120))

    class Few(Differ):
        entries = 30 * 3**2 // 3  # of matrices of 3 x 3

    seen = some_tasks(codes, 3, Few())
    assert sorted(codes[seen]) == np.repeat(np.arange(0, 30, 3), 4).tolist()
    # a pooled start, of more columns, has no matrix for each task
    assert len(some_tasks(codes, 102, Few())) == 120


def test_tasks_that_differ_in_level_alone_have_the_same_slopes():
    X, y, codes = curves(0.0)
    y = y + 2 * X
    mean, factor, *_ = start_of_numbers(X, y, codes, None, InLevel())
    assert mean[1, 0] == pytest.approx(2, abs=0.05)
    assert factor[0, 0] == pytest.approx(1, abs=0.3)
    assert np.abs(factor[1]).max() < 0.01


def test_a_bend_that_all_tasks_share_is_known_without_training(tmp_path):
    X, y, task = curves(3.0)
    reg = MAMLRegressor(update_rule="gaussian-head", max_iter=1, random_state=0)
    reg.fit(X, y[:, 0], groups=task)
    X, y, task = curves(3.0, seed=1)
    support = np.arange(len(X)) % 12 < 3
    reg.adapt(X[support], y[support, 0], groups=task[support])
    predicted = reg.predict(X[~support], groups=task[~support])
    assert np.sqrt(np.mean((predicted - y[~support, 0]) ** 2)) < 0.3  # straight lines: .9
    save(tmp_path / "model", reg)
    again = load(tmp_path / "model").predict(X[~support], groups=task[~support])
    np.testing.assert_array_equal(again, predicted)


def rare_labels(n_tasks=150, n_rows=40, seed=0):
    """Labels of logits -2 + x, whose level has a standard deviation of .7."""
    rng = RNG(seed)
    X, task = rng.randn(n_tasks * n_rows, 1), np.repeat(np.arange(n_tasks), n_rows)
    logit = -2 + X[:, 0] + 0.7 * rng.randn(n_tasks)[task]
    return X, (logit + rng.logistic(size=len(X)) > 0).astype(float)[:, None], task


@pytest.mark.parametrize("kind", [None, InLevel])
def test_a_start_of_rare_labels_is_not_pushed_away_by_them(monkeypatch, kind):
    X, y, task = rare_labels()
    found = []
    for n_rounds in (8, 24):
        monkeypatch.setattr(start, "WORKING_ROUNDS", n_rounds)
        differ = kind and kind()
        likelihood = TwoClasses(CrossEntropy())
        mean, factor, *_ = start_of_outputs(X, y, task, likelihood, np.ones(1), differ=differ)
        found.append([*mean[:, 0], np.abs(factor[0, 0])])
    np.testing.assert_allclose(found[0], [-2, 1, 0.7], atol=0.15)
    np.testing.assert_allclose(found[1], found[0], atol=0.12)


def test_a_feature_that_separates_labels_has_an_end():
    X, y, task = rare_labels(20, 20)
    X = np.c_[X, y - y.mean()]
    mean, *_ = start_of_outputs(X, y, task, TwoClasses(CrossEntropy()), np.ones(1))
    assert np.abs(mean).max() < 50


@pytest.mark.parametrize("n_rows", [2, 12])  # fewer and more rows than the 6 columns
def test_tasks_of_two_classes_weigh_members_by_the_density_of_their_labels(n_rows):
    rng = RNG(0)
    body = MLPBody(2, [2, 3], nn.ReLU(), torch.Generator().manual_seed(0))
    starts = [
        (level + rng.randn(3, 1), 0.3 * np.tril(rng.randn(3, 3)), np.ones(1), np.ones(1))
        for level in (-1.0, 1.0)
    ]
    likelihood = TwoClasses(CrossEntropy())
    head = LaplaceHead(body, starts, np.zeros(2), np.ones(2), likelihood=likelihood).double()
    with torch.no_grad():
        head.log_scale.fill_(np.log(0.3))
    X, y = rng.randn(n_rows, 2), rng.randint(2, size=n_rows)
    edge = np.ones(2)
    support = Support(X, y, np.zeros(n_rows, int), 2, None)
    tasks = Conditioned.on(head, Calibration(0 * edge, edge), support)
    run = head.functions({name: p.detach() for name, p in head.named_parameters()})
    prior, S = (part.numpy() for part in run.columns(torch.from_numpy(X)))
    w = rng.randn(200_000, S.shape[-1])
    logs = []
    for j in range(2):
        logits = (prior[j, :, 0] + w @ S[j].T) * np.where(y == 1, 1, -1)
        logs.append(np.log(np.exp(-np.log1p(np.exp(-logits)).sum(1)).mean()))
    odds = np.exp(TRUST * (logs[1] - logs[0]))
    assert not 0.8 < odds < 1.25
    got = tasks.trust[:, 0]
    np.testing.assert_allclose(got[1] / got[0], odds, rtol=0.03)
    assert (tasks.trust[:, 1] == 0.5).all()


def test_members_of_two_classes_start_differently_and_are_saved(tmp_path):
    X, y, task = rare_labels(20, 20)
    clf = MAMLClassifier(max_iter=4, hidden_layer_sizes=(8,), random_state=0)
    clf.fit(X, y[:, 0].astype(int), groups=task)
    head = clf.net_.module_.head
    levels, slopes = head.factor[:, [0, 1], [0, 1]].abs().detach().numpy().T
    # the tasks of one differ in level alone, those of another do not differ
    assert levels[4] < 0.02 < levels[:4].min(), levels
    assert slopes[[3, 4]].max() < 0.02 < slopes[:3].min()
    assert not np.allclose(head.body.weight0[1, :, 0].detach(), head.body.weight0[0, :, 0].detach())
    rows = np.arange(len(y)) % 20 < 5
    clf.adapt(X[rows], y[rows, 0].astype(int), groups=task[rows])
    expected = clf.predict_proba(X, groups=task)
    save(tmp_path / "model", clf)
    np.testing.assert_allclose(
        load(tmp_path / "model").predict_proba(X, groups=task), expected, rtol=1e-6
    )
    with torch.no_grad():
        plain = clf.adapted_module(3)(torch.from_numpy(X[task == 3]))
    np.testing.assert_allclose(plain, expected[task == 3], rtol=1e-5)


def labels(sd, n_tasks=60, n_rows=12):
    rng = RNG(4)
    codes, X = np.repeat(np.arange(n_tasks), n_rows), rng.randn(n_tasks * n_rows, 2)
    logits = X[:, 0] + sd * rng.randn(n_tasks)[codes]
    return X, (logits + rng.logistic(size=len(codes)) > 0).astype(int), codes


def test_of_two_classes_members_count_as_much_as_held_out_tasks_are_theirs():
    found = []
    for sd in (0.0, 3.0):
        X, y, codes = labels(sd)
        clf = MAMLClassifier(update_rule="gaussian-head", max_iter=1, random_state=0)
        found.append(clf.fit(X, y, groups=codes).calibration_.members[4, 0])
    assert found[0] > 0.18 > 0.15 > found[1]  # of the member whose tasks do not differ, of five
