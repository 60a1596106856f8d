"""Symmetric heads, centred targets, schedules of beta and bounded meta-gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import Residual
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, LRScheduler
from torch import nn

from sklearn_maml import (
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    adapt_predict,
    task_scorer,
    task_scores,
)
from sklearn_maml.datasets import SinusoidTasks
from sklearn_maml.engine import Engine
from sklearn_maml.heads import SymmetricHead, find_head
from sklearn_maml.update_rules import SGD, UpdateRule

# --- data: 40 classes of 8 rows, and 3 labels shared by 12 tasks that lie at places of their own

rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(40, 4))
LABELS = np.repeat(np.arange(40), 8)
POOL = CENTRES[LABELS] + 0.3 * rng.normal(size=(320, 4))
G = np.repeat(np.arange(12), 12)
SHARED = np.tile(np.repeat([0, 1, 2], 4), 12)
ROWS = rng.normal(size=(12, 3, 4))[G, SHARED] + 0.3 * rng.normal(size=(144, 4))
SMALL = {
    "hidden_layer_sizes": (7,),
    "activation": "tanh",
    "update_rule": "sgd",
    "alpha": 0.5,
    "steps": 3,
    "meta_batch_size": 4,
    "max_iter": 80,
    "random_state": 0,
}


def classifier(**params):
    settings = {**SMALL, "n_ways": 3, "n_shots": 2, "n_queries": 3, **params}
    return MAMLClassifier(**settings).fit(POOL, LABELS)


def head_of(clf):
    return list(clf.module_.modules())[-1]


def is_symmetric(clf):
    p = head_of(clf)
    return torch.equal(p.weight, p.weight[:1].expand_as(p.weight)) and torch.equal(
        p.bias, p.bias[:1].expand_as(p.bias)
    )


def is_zero(clf):
    p = head_of(clf)
    return not p.weight.any() and not p.bias.any()


HELD = {"shared": is_symmetric, "zero": is_zero}


# --- heads


def equivariance_error(clf):
    """Change of the probabilities when the labels of an episode are permuted."""
    support = np.concatenate([np.flatnonzero(label == LABELS)[:3] for label in (1, 5, 9)])
    query = np.concatenate([np.flatnonzero(label == LABELS)[3:] for label in (1, 5, 9)])
    y = np.repeat([0, 1, 2], 3)
    reference = clf.adapt(POOL[support], y).predict_proba(POOL[query])
    assert np.ptp(reference) > 0.1  # else equivariance says little
    errors = []
    for order in ([1, 2, 0], [2, 1, 0]):
        permuted = clf.adapt(POOL[support], np.array(order)[y]).predict_proba(POOL[query])
        errors.append(np.abs(permuted[:, order] - reference).max())
    return max(errors)


@pytest.mark.parametrize("rule", ["sgd", "meta-sgd", SGD(max_grad_norm=1.0)])
@pytest.mark.parametrize("head", ["shared", "zero"])
def test_the_order_of_classes_does_not_matter_to_a_symmetric_head(head, rule):
    assert equivariance_error(classifier(head=head, update_rule=rule)) <= 1e-12


def test_the_order_of_classes_matters_to_a_free_head():
    assert equivariance_error(classifier()) > 1e-3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"module": Residual},
        {"optimizer__fused": False},
        {"optimizer": "adamw", "optimizer__weight_decay": 0.1},
        {"optimizer__weight_decay": 0.1, "optimizer__amsgrad": True},
        {"optimizer": "sgd", "optimizer__momentum": 0.9, "beta": 0.1},
        {"update_rule": "meta-sgd", "meta_gradient": "first-order"},
        {"adapted": "head", "max_grad_norm": 1e-3},
        {"engine__max_tasks_in_memory": 3},
        {"hidden_layer_sizes": []},
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["shared", "zero"])
def test_a_symmetric_head_stays_so_to_the_last_bit(head, params):
    clf = classifier(head=head, **params)
    assert HELD[head](clf)
    assert not HELD[head](classifier(**params))
    if params.get("hidden_layer_sizes") == []:
        return
    start = classifier(head=head, **{**params, "max_iter": 1, "beta": 1e-300})
    # the other layers learn
    first, before = (next(est.module_.parameters()) for est in (clf, start))
    assert not torch.equal(first, before)


def test_the_fits_run_on_the_compiled_kernels(monkeypatch):
    rungs = []
    original = Engine.meta_step

    def spy(self, *args, **kwargs):
        step = original(self, *args, **kwargs)
        rungs.append((self.rung, step.flat is not None))
        return step

    monkeypatch.setattr(Engine, "meta_step", spy)
    classifier(head="shared")
    assert {("native", True)} == {*rungs}


def test_what_a_rule_learns_of_the_head_is_shared_by_the_classes():
    clf = classifier(head="zero", update_rule="meta-sgd")
    rates = dict(clf._learner.rule)
    assert rates["2__weight"].shape == (3, 7)
    assert rates["2__weight"].any()
    for name in ("2__weight", "2__bias"):
        assert torch.equal(rates[name], rates[name][:1].expand_as(rates[name]))
    free = dict(classifier(update_rule="meta-sgd")._learner.rule)["2__weight"]
    assert not torch.equal(free, free[:1].expand_as(free))


def test_rates_of_every_step_are_shared_along_the_axis_of_the_classes():
    class PerStep(UpdateRule):
        def initial_rates(self, params):
            rates = {name: p.new_zeros(3, *p.shape) for name, p in params.items()}
            return {**rates, "2.bias": params["2.bias"].new_zeros(3)}  # one for each of 3 steps

    module = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    names = [name for name, _ in module.named_parameters()]
    head = find_head(module, "shared", PerStep(), names, 3)
    assert head.rows == {"module.2.weight": 0, "module.2.bias": 0, "rule.2__weight": 1}

    class Pairs(UpdateRule):
        def initial_rates(self, params):
            n = len(params["2.weight"])
            return {"2.weight": params["2.weight"].new_zeros(n, n)}

    with pytest.raises(ValueError, match="every pair of classes"):
        find_head(module, "shared", Pairs(), names, 3)


def test_the_projection_is_the_mean_over_the_classes_or_zero():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    for in_place in (True, False):
        grads = {"a": grad.clone(), "b": grad.clone(), "c": grad.clone()}
        given = dict(grads)
        SymmetricHead({"a": 0, "b": 1, "z": 0}, ["b"]).project_gradient(grads, in_place)
        assert_allclose(grads["a"], grad.mean(0).expand(3, 4), rtol=1e-15)
        assert not grads["b"].any()
        assert torch.equal(grads["c"], grad)
        assert (grads["a"] is given["a"]) == in_place


def test_common_parts_of_a_head_drop_out_of_the_softmax():
    shared, zero = classifier(head="shared"), classifier(head="zero")
    rows = np.flatnonzero(LABELS < 3)
    probabilities = [
        clf.adapt(POOL[rows[::2]], LABELS[rows[::2]]).predict_proba(POOL[rows[1::2]])
        for clf in (shared, zero)
    ]
    assert_allclose(*probabilities, rtol=1e-5)


def test_the_norm_that_is_bounded_is_that_of_the_projected_gradient(monkeypatch):
    """A large gradient of a head that does not move must not shrink the step of the others."""
    original = Engine.meta_step

    def inflated(self, *args, **kwargs):
        step = original(self, *args, **kwargs)
        step.grads["module.2.bias"] += 1e6
        return step

    settings = {"head": "zero", "max_grad_norm": 1e3, "optimizer": "sgd"}
    expected = classifier(**settings)
    monkeypatch.setattr(Engine, "meta_step", inflated)
    found = classifier(**settings)
    assert_array_equal(
        found.module_[0].weight.detach().numpy(), expected.module_[0].weight.detach().numpy()
    )


class Meddle(Callback):
    """Changes gradients and parameters class by class."""

    def on_grad_computed(self, net, named_parameters, **kwargs):
        for _, p in named_parameters:
            p.grad = p.grad + torch.arange(p.numel(), dtype=p.dtype).view_as(p)

    def on_batch_end(self, net, **kwargs):
        with torch.no_grad():
            for p in net.module_.parameters():
                p += 1e-3 * torch.arange(p.numel(), dtype=p.dtype).view_as(p)


@pytest.mark.parametrize("head", ["shared", "zero"])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_callbacks_cannot_break_the_symmetry(head, early_stopping):
    clf = classifier(head=head, callbacks=[Meddle()], early_stopping=early_stopping)
    assert HELD[head](clf)


@pytest.mark.parametrize("head", ["shared", "zero"])
def test_the_symmetry_holds_after_every_update(head):
    class Look(Callback):
        on_grad_computed = Meddle.on_grad_computed

        def on_train_begin(self, net, **kwargs):
            self.found = []

        def on_batch_end(self, net, training=False, **kwargs):
            if training:
                p = net.module_.module[2].weight
                self.found.append(torch.equal(p, p[:1].expand_as(p)))

    look = Look()
    classifier(head=head, callbacks=[look])
    assert look.found == [True] * SMALL["max_iter"]


@pytest.mark.parametrize("head", ["shared", "zero"])
def test_a_symmetric_fit_may_be_continued(head):
    settings = {"head": head, "early_stopping": False, "beta_decay": 0.0}
    whole = classifier(**settings, max_iter=100)
    part = classifier(**settings, max_iter=50, warm_start=True).fit(POOL, LABELS)
    assert part.n_iter_ == 100
    for p, q in zip(part.module_.parameters(), whole.module_.parameters(), strict=True):
        assert torch.equal(p, q)
    assert HELD[head](part)
    with pytest.raises(ValueError, match="head was changed after fit"):
        part.set_params(head="free").fit(POOL, LABELS)


@pytest.mark.parametrize("head", ["shared", "zero"])
def test_a_symmetric_head_learns(head):
    clf = classifier(head=head, max_iter=150)
    labels = LABELS + 100
    place = np.random.default_rng(1).normal(size=(40, 4))
    X = place[LABELS] + 0.3 * np.random.default_rng(2).normal(size=POOL.shape)
    assert clf.score(X, labels) > 0.75
    # labels that are shared by the tasks
    clf = MAMLClassifier(**SMALL, head=head, n_shots=2)
    clf.fit(ROWS[G < 9], SHARED[G < 9], groups=G[G < 9])
    assert clf.score(ROWS[G >= 9], SHARED[G >= 9], groups=G[G >= 9]) > 0.75


def test_after_a_fit_no_steps_leave_all_classes_equally_likely():
    clf = classifier(head="zero").set_params(adapt_steps=0)
    p = clf.adapt(POOL[:16], LABELS[:16]).predict_proba(POOL[:3])
    assert_allclose(p[:, 0], p[:, 1], rtol=1e-15)


class Last(nn.Module):
    """Ends in something else than its last layer with parameters."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.skip = nn.Linear(in_features, out_features)
        self.head = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.head(x) + self.skip(x)


def frozen_bias():
    module = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    module[2].bias.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"adapted": "body"}, "does not adapt"),
        ({"adapted": "2.bias"}, "2.weight does not adapt"),
        ({"steps": 0}, "steps=0"),
        ({"adapt_steps": 0}, "adapt_steps=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"module": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))}, "needs a torch.nn.Linear"),
        ({"module": nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.Flatten(),
                                  nn.AvgPool1d(2))}, "one row for each of the 3"),
        ({"module": Last}, "make its outputs alone"),
        ({"module": frozen_bias()}, "all of it trainable"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", ["shared", "zero"])
def test_combinations_that_make_no_sense_are_refused_in_fit(head, params, message):
    with pytest.raises(ValueError, match=message):
        classifier(head=head, **params)
    classifier(**{**params, "max_iter": 1})


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="head"):
        classifier(head="tied")


def test_a_linear_model_may_be_its_own_head():
    clf = classifier(head="shared", module=nn.Linear(4, 3))
    assert is_symmetric(clf)


# --- centred targets: 15 ragged tasks whose levels are far apart

SIZES = np.array([9, 12, 10, 15, 11] * 3)
T = np.repeat(np.arange(15), SIZES)
A = np.random.default_rng(3).normal(size=(len(T), 2))
SLOPES = np.random.default_rng(4).normal(size=(15, 2, 2))
B = np.einsum("ni,nij->nj", A, SLOPES[T]) + 0.1 * np.random.default_rng(5).normal(size=(len(T), 2))
LEVEL = np.random.default_rng(6).normal(size=(15, 2)) * 20
CENTRED = {**SMALL, "alpha": 0.1, "n_shots": None, "max_iter": 80, "center_y": True}


def regressor(y=B, **params):
    return MAMLRegressor(**{**CENTRED, **params}).fit(A, y, groups=T)


REG = regressor()


def first_rows(n):
    return np.concatenate([np.flatnonzero(task == T)[:n] for task in range(15)])


S = first_rows(4)
Q = np.setdiff1d(np.arange(len(T)), S)


def by_hand(reg, X, y, X_query, weight=None, steps=3):
    """Subtract the mean, take the inner steps in units of y_scale_, add the mean back."""
    weight = np.ones(len(X)) if weight is None else weight
    mean = np.average(y, axis=0, weights=weight)
    w = torch.from_numpy(weight / weight.sum())
    targets = torch.from_numpy((y - mean) / reg.y_scale_)
    module = copy.deepcopy(reg.module_)
    for _ in range(steps):
        errors = (module(torch.from_numpy(X)) - targets).square().mean(1)
        grads = torch.autograd.grad((w * errors).sum(), list(module.parameters()))
        with torch.no_grad():
            for p, g in zip(module.parameters(), grads, strict=True):
                p -= 0.1 * g
    with torch.no_grad():
        return module(torch.from_numpy(X_query)).numpy() * reg.y_scale_ + mean


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_the_support_rows_is_subtracted_and_added_back(weighted):
    weight = np.random.default_rng(7).uniform(0.1, 3, len(T)) if weighted else None
    weight_of = (lambda rows: None) if weight is None else (lambda rows: weight[rows])
    y = B + LEVEL[T]
    support = np.concatenate([np.flatnonzero(task == T)[: 3 + task % 3] for task in range(15)])
    REG.adapt(A[support], y[support], groups=T[support], sample_weight=weight_of(support))
    predicted = REG.predict(A[Q], groups=T[Q])
    for task in range(15):
        s, q = support[T[support] == task], T[Q] == task
        expected = by_hand(REG, A[s], y[s], A[Q[q]], weight_of(s))
        assert_allclose(predicted[q], expected, rtol=1e-9)
    # rows of weight 0 are as good as absent
    zero = np.ones(len(s))
    zero[0] = 0
    one = REG.adapt(A[s], y[s], sample_weight=zero).predict(A[:3])
    assert_allclose(one, REG.adapt(A[s[1:]], y[s[1:]]).predict(A[:3]), rtol=1e-12)


def test_episodes_of_training_and_validation_are_centred_by_their_support_rows(monkeypatch):
    seen = {"meta_step": [], "evaluate": []}
    for name, batches in seen.items():
        original = getattr(Engine, name)

        def spy(self, params, batch, original=original, batches=batches, **options):
            batches.append(batch)
            return original(self, params, batch, **options)

        monkeypatch.setattr(Engine, name, spy)

    def means(batch):
        rows = batch.support
        return np.array([rows.task(j).y.mean(0).numpy() for j in range(len(batch))])

    fixed = [(A[j == T][:4], B[j == T][:4], A[j == T][4:], B[j == T][4:]) for j in range(15)]
    for center_y in (True, False):
        for part in seen.values():
            part.clear()
        regressor(center_y=center_y, max_iter=5)
        MAMLRegressor(**{**CENTRED, "max_iter": 5, "center_y": center_y}).fit(fixed)
        MAMLRegressor(**{**CENTRED, "max_iter": 5, "center_y": center_y}).fit(SinusoidTasks())
        assert all(len(batches) > 2 for batches in seen.values())
        found = [np.abs(means(batch)).max() for batches in seen.values() for batch in batches]
        assert max(found) < 1e-12 if center_y else min(found) > 1e-3
    # query rows move with the support rows of their task, padding or not
    batch = next(b for b in seen["meta_step"] if b.support.lengths is None)
    assert batch.query.y.shape[-1] in (1, 2)


def test_query_targets_move_by_the_mean_of_the_support_rows():
    from sklearn_maml.data.sampling import EpisodeSampler
    from sklearn_maml.data.tasks import TaskCollection

    tasks = TaskCollection(A, B, T, np.arange(15), None, "groups")
    for n_shots in (None, 3):
        plain, centred = (
            EpisodeSampler(tasks, classification=False, n_shots=n_shots, center_y=center_y).sample(
                np.arange(15), np.random.default_rng(0)
            )
            for center_y in (False, True)
        )
        for j in range(15):
            mean = plain.support.task(j).y.mean(0)
            for a, b in ((plain.support, centred.support), (plain.query, centred.query)):
                assert torch.equal(a.task(j).X, b.task(j).X)
                assert_allclose(b.task(j).y, a.task(j).y - mean, atol=1e-14)


def test_a_shift_of_a_task_shifts_its_predictions():
    predicted = [
        REG.adapt(A[S], (B + shift)[S], groups=T[S]).predict(A[Q], groups=T[Q])
        for shift in (0, LEVEL[T])
    ]
    assert_allclose(predicted[1], predicted[0] + LEVEL[T[Q]], atol=1e-12)
    plain = regressor(center_y=False)
    predicted = [
        plain.adapt(A[S], (B + shift)[S], groups=T[S]).predict(A[Q], groups=T[Q])
        for shift in (0, LEVEL[T])
    ]
    assert np.abs(predicted[1] - predicted[0] - LEVEL[T[Q]]).max() > 1


def test_a_fit_does_not_depend_on_the_levels_of_the_tasks():
    shifted = regressor(B + LEVEL[T])
    for p, q in zip(shifted.module_.parameters(), REG.module_.parameters(), strict=True):
        assert_allclose(p.detach(), q.detach(), rtol=1e-6, atol=1e-9)
    assert_allclose(shifted.y_scale_, REG.y_scale_, rtol=1e-12)
    means = np.array([B[task == T].mean(0) for task in range(15)])
    assert_allclose(REG.y_scale_, np.sqrt(((B - means[T]) ** 2).mean(0)), rtol=1e-12)
    plain, moved = (regressor(y, center_y=False) for y in (B, B + LEVEL[T]))
    assert not np.allclose(*(r.module_[0].weight.detach() for r in (plain, moved)), rtol=1e-2)


def test_without_steps_the_initialisation_is_added_to_the_mean_of_the_support_rows():
    reg = copy.copy(REG).set_params(adapt_steps=0).adapt(A[:5], B[:5])
    with torch.no_grad():
        start = REG.module_(torch.from_numpy(A[5:9])).numpy() * REG.y_scale_
    assert_allclose(reg.predict(A[5:9]), start + B[:5].mean(0), rtol=1e-12)


def test_every_spelling_of_tasks_is_centred():
    y = B + LEVEL[T]
    expected = copy.copy(REG).adapt(A[S], y[S], groups=T[S]).predict(A[Q], groups=T[Q])
    parts = [(A[S[T[S] == j]], y[S[T[S] == j]]) for j in range(15)]
    queries = [A[Q[T[Q] == j]] for j in range(15)]
    listed = copy.copy(REG).adapt(parts).predict(queries)
    assert_allclose(np.concatenate(listed), expected, rtol=1e-10)
    X3, y3 = (np.stack([part[k] for part in parts]) for k in (0, 1))
    stacked = copy.copy(REG).adapt(X3, y3)
    first = stacked.predict(np.stack([q[:5] for q in queries]))
    assert_allclose(first, np.stack([part[:5] for part in listed]), rtol=1e-10)
    given = {"groups_support": T[S], "groups_query": T[Q], "tasks_per_partition": 4}
    assert_allclose(adapt_predict(REG, A[S], y[S], A[Q], **given), expected, rtol=1e-10)
    one = FewShotRegressor(REG).fit(A[S[:4]], y[S[:4]])
    assert_allclose(one.predict(queries[0]), listed[0], rtol=1e-10)
    with_column = MAMLRegressor(**{**CENTRED, "task_column": 2}).fit(np.c_[A, T], B)
    with_column.adapt(np.c_[A, T][S], y[S])
    assert_allclose(with_column.predict(np.c_[A, T][Q]), expected, rtol=1e-10)


def test_one_output_and_pipelines_are_centred():
    listed = [(A[j == T], B[j == T, 0]) for j in range(15)]
    pipe = make_pipeline(StandardScaler(), MAMLRegressor(**{**CENTRED, "task_column": 2}))
    pipe[0].set_output(transform="default")
    pipe[0].set_params(with_mean=False, with_std=False)
    pipe.fit(np.c_[A, T], B[:, 0])
    found = [
        adapt(pipe, np.c_[A, T][:4], B[:4, 0] + shift).predict(np.c_[A, T][4:9])
        for shift in (0, 1000)
    ]
    assert found[0].shape == (5,)
    assert_allclose(found[1], found[0] + 1000, atol=1e-10)
    reg = MAMLRegressor(**CENTRED).fit(listed)
    assert_allclose(reg.adapt(*listed[0]).predict(A[:2]).shape, (2,))


def test_scores_are_those_of_centred_tasks():
    y = B + LEVEL[T]
    assert_allclose(REG.score(A, B, groups=T + 100), REG.score(A, B, groups=T + 100))
    rmse = task_scorer("neg_root_mean_squared_error", n_shots=4)
    assert_allclose(rmse(REG, A, y, groups=T + 100), rmse(REG, A, B, groups=T + 100), rtol=1e-9)
    plain = regressor(center_y=False)
    assert rmse(plain, A, y, groups=T + 100) < 2 * rmse(plain, A, B, groups=T + 100)
    found, moved = (task_scores(REG, A, v, groups=T + 100, n_shots=4) for v in (B, y))
    for name in ("before", "after"):
        assert_allclose(moved[name], found[name], rtol=1e-9)
    assert (found["after"] > found["before"]).mean() > 0.7


def test_large_levels_cost_float32_no_digits():
    X32 = A.astype(np.float32)
    y = B + 1e6 * np.arange(15)[T][:, None]
    near, far = (MAMLRegressor(**CENTRED).fit(X32, v, groups=T) for v in (B, y))
    assert_allclose(far.y_scale_, near.y_scale_, rtol=1e-6)
    for p, q in zip(near.module_.parameters(), far.module_.parameters(), strict=True):
        assert_allclose(p.detach(), q.detach(), atol=1e-3)


def test_center_y_may_not_change_after_fit():
    reg = regressor(max_iter=1).set_params(center_y=False)
    with pytest.raises(ValueError, match="center_y was changed after fit"):
        reg.adapt(A[:4], B[:4])


def test_one_task_alone_is_centred():
    with pytest.warns(UserWarning, match="no task information"):
        reg = MAMLRegressor(**{**CENTRED, "max_iter": 5, "adapt_steps": 0}).fit(A, B[:, 0] + 50)
    assert abs(reg.predict(A).mean() - 50) < 5


# --- schedules of beta


class Rates(Callback):
    """The rate with which each update was made."""

    def on_train_begin(self, net, **kwargs):
        self.rates = []

    def on_grad_computed(self, net, **kwargs):
        self.rates.append(net.optimizer_.param_groups[0]["lr"])


def cosine(k, n, beta=0.01):
    return beta * (1 + np.cos(np.pi * np.asarray(k) / n)) / 2


@pytest.mark.parametrize("by", ["epoch", "batch"])
@pytest.mark.parametrize("fused", [True, False])
def test_beta_may_follow_a_cosine(by, fused):
    n = 4 if by == "epoch" else 200
    spy = Rates()
    scheduler = LRScheduler(
        policy=torch.optim.lr_scheduler.CosineAnnealingLR, T_max=n, step_every=by
    )
    reg = regressor(
        callbacks=[("lr", scheduler), spy], beta=0.01, max_iter=200, optimizer__fused=fused
    )
    k = np.arange(200) // 50 if by == "epoch" else np.arange(200)
    # beta_decay, on by default, is off
    assert_allclose(spy.rates, cosine(k, n), rtol=1e-7, atol=1e-12)
    assert reg.net_.optimizer_.param_groups[0]["fused"] == fused


def test_a_schedule_moves_the_parameters_as_its_rates_say():
    """The steps under a schedule are those of rates set by hand."""

    class ByHand(Callback):
        def on_batch_begin(self, net, training=False, **kwargs):
            if training:
                for group in net.optimizer_.param_groups:
                    group["lr"] = float(cosine(net.update_, 100))

    scheduler = LRScheduler("CosineAnnealingLR", T_max=100, step_every="batch")
    settings = {"beta": 0.01, "max_iter": 100, "early_stopping": False}
    scheduled = regressor(callbacks=[scheduler], **settings)
    by_hand = regressor(callbacks=[ByHand()], beta_decay=0.0, **settings)
    constant = regressor(beta_decay=0.0, **settings)
    first = [r.module_[0].weight.detach().numpy() for r in (scheduled, by_hand, constant)]
    assert_allclose(first[0], first[1], rtol=1e-6)
    assert np.abs(first[0] - first[2]).max() > 1e-3


@pytest.mark.parametrize("by", ["epoch", "batch"])
@pytest.mark.parametrize(
    "policy",
    [
        ("CosineAnnealingLR", {"T_max": 120}),
        (torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": lambda k: 1 / (k + 2)}),
    ],
)
def test_a_continued_fit_starts_the_schedule_anew(policy, by):
    spy = Rates()
    scheduler = LRScheduler(policy[0], step_every=by, **policy[1])
    reg = regressor(callbacks=[scheduler, spy], beta=0.01, max_iter=120, warm_start=True)
    rates = spy.rates
    reg.fit(A, B, groups=T)
    assert reg.n_iter_ == 240
    assert_allclose(spy.rates, rates, rtol=1e-7)
    # with the rate of now
    reg.set_params(beta=0.02).fit(A, B, groups=T)
    assert_allclose(spy.rates, 2 * np.array(rates), rtol=1e-7)
    assert "last_epoch" not in vars(scheduler)
