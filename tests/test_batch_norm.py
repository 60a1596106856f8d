"""Batch norm of query rows: statistics of the support set, or of the query rows themselves."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from builders import build, make_engine, make_meta_params, make_rows
from sklearn.base import clone
from torch import nn
from torch.nn import functional

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.batch_norm import TaskBatchNorm
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.meta_gradients import SecondOrder

MODES = ("inductive", "transductive")
ALPHA, STEPS = 0.2, 2


class Mean(nn.Module):
    """A layer of the user's own in which rows meet, beside batch norm."""

    def forward(self, x):
        return x - 0.5 * x.mean(0)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=1, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def plain_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


class Net(nn.Module):
    """No sequence; a norm that is used twice in one."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), norm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x[:, :1] + self.norm(self.first(x)).tanh())


NETS = {
    "conv": (conv_net, (2, 7, 7), "stacked"),
    "conv without weights": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.MaxPool2d(2),
            nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(3, 3),
        ),
        (2, 7, 7),
        "stacked",
    ),
    "conv with rows that meet": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), Mean(), nn.BatchNorm2d(3), Mean(), nn.Flatten(), nn.Linear(75, 3)
        ),
        (2, 7, 7),
        "stacked",
    ),
    "conv, then flat": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 4),
            nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3),
        ),
        (2, 7, 7),
        "stacked",
    ),
    "1d": (plain_net, (3,), "vmap"),
    "1d, of sequences": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
        ),
        (2, 4),
        "vmap",
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (1, 3, 3, 3),
        "vmap",
    ),
    "no sequence": (Net, (3,), "vmap"),
    "synchronised": (lambda: Net(nn.SyncBatchNorm), (3,), "vmap"),
}  # fmt: skip


def build_net(name):
    constructor, shape, _ = NETS[name]
    return build(constructor), shape


def make_batch(shape, sizes=((5, 5, 5), (4, 4, 4))):
    rng = np.random.default_rng(0)
    # sets unlike each other
    return EpisodeBatch(
        *(make_rows(rng, part, shape, n_classes=3, loc=0.3 * k) for k, part in enumerate(sizes))
    )


def engine_in(mode, module, rung="auto", **options):
    return make_engine(module, rung, classes=True, batch_norm=mode, **options)


def meta_step(engine, module, batch, *, n_steps=STEPS):
    return engine.meta_step(make_meta_params(module), batch, alpha=ALPHA, steps=n_steps)


def difference(got, expected):
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((got[n] - g).abs().max()) for n, g in expected.items()) / scale


# --- the meta-gradient, against a loop written out


def normalise(x, weight, bias, statistics):
    mean, variance = statistics
    mean, variance, weight, bias = (
        t[None, :, None, None] for t in (mean, variance, weight, bias)
    )  # fmt: skip
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def conv_net_by_hand(p, x, statistics=None):
    """Outputs and the statistics of both norms; those of x where none are given."""
    own = []
    for k, (conv, norm, stride) in enumerate((("0", "1", 2), ("3", "4", 1))):
        x = functional.conv2d(x, p[f"{conv}.weight"], p[f"{conv}.bias"], stride, 1)
        own.append((x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)))
        used = own[k] if statistics is None else statistics[k]
        x = normalise(x, p[f"{norm}.weight"], p[f"{norm}.bias"], used).relu()
    return x.mean((2, 3)) @ p["8.weight"].T + p["8.bias"], own


def loss_by_hand(p, batch, mode, order):
    losses = []
    for support, query in zip(
        zip(batch.support.X, batch.support.y, strict=True),
        zip(batch.query.X, batch.query.y, strict=True),
        strict=True,
    ):
        fast = dict(p)
        for _ in range(STEPS):
            loss = functional.cross_entropy(conv_net_by_hand(fast, support[0])[0], support[1])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
            fast = {n: f - ALPHA * g for (n, f), g in zip(fast.items(), grads, strict=True)}
        statistics = None if mode == "transductive" else conv_net_by_hand(fast, support[0])[1]
        losses.append(
            functional.cross_entropy(conv_net_by_hand(fast, query[0], statistics)[0], query[1])
        )
    return torch.stack(losses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rung", ["stacked", "vmap", "loop", "traced"])
def test_meta_gradient_is_that_of_a_loop_written_out(rung, order, mode):
    module, shape = build_net("conv")
    batch = make_batch(shape)
    leaves = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    losses = loss_by_hand(leaves, batch, mode, order)
    grads = torch.autograd.grad(losses.mean(), list(leaves.values()))
    expected = {f"module.{n}": g for n, g in zip(leaves, grads, strict=True)}
    engine = engine_in(mode, module, rung, order=order)
    for _ in range(2):  # what is traced runs from the second on
        step = meta_step(engine, module, batch)
        assert difference(step.grads, expected) <= 1e-9
        torch.testing.assert_close(step.losses, losses.detach(), rtol=1e-9, atol=0)
    assert engine.tracer.n_traced == (rung == "traced")
    # negative control: the other mode is another gradient
    (other,) = set(MODES) - {mode}
    step = meta_step(engine_in(other, module, rung, order=order), module, batch)
    assert difference(step.grads, expected) > 1e-3


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_meta_gradient_is_the_slope_of_the_loss_that_predictions_have(name, checkpoint_steps):
    module, shape = build_net(name)
    batch, params = make_batch(shape), make_meta_params(module)
    generator = torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    for mode in MODES:
        for rung in (NETS[name][2], "loop"):
            engine = engine_in(mode, module, rung, checkpoint_steps=checkpoint_steps)
            step = meta_step(engine, module, batch)

            def loss(h, engine=engine):
                moved = {n: p + h * way[n] for n, p in params.items()}
                losses, _ = engine.evaluate(moved, batch, alpha=ALPHA, steps=STEPS)
                return float(losses.mean())

            h = 3e-6  # small, for the kinks of ReLU and maximum
            slope = (loss(h) - loss(-h)) / (2 * h)
            along = sum(float((step.grads[n] * way[n]).sum()) for n in params)
            assert along == pytest.approx(slope, rel=1e-6), (mode, rung)


# --- training, validation and predictions are the same function


@pytest.mark.parametrize(
    "sizes", [((5, 5, 5), (4, 4, 4)), ((5, 3, 5), (4, 6, 2))], ids=["equal", "ragged"]
)
@pytest.mark.parametrize("name", NETS)
def test_training_loss_is_the_loss_of_the_predictions(name, sizes):
    module, shape = build_net(name)
    batch, params = make_batch(shape, sizes), make_meta_params(module)
    losses = {}
    for mode in MODES:
        for rung in dict.fromkeys((NETS[name][2], "vmap", "loop")):
            engine = engine_in(mode, module, rung)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step = meta_step(engine, module, batch)
            evaluated, outputs = engine.evaluate(params, batch, alpha=ALPHA, steps=STEPS)
            torch.testing.assert_close(step.losses, evaluated, rtol=1e-9, atol=0)
            torch.testing.assert_close(
                batch.query.real(step.outputs), batch.query.real(outputs), rtol=1e-9, atol=1e-12
            )
            if mode in losses:
                torch.testing.assert_close(evaluated, losses[mode], rtol=1e-9, atol=0)
            losses[mode] = evaluated
            # both ways to predict from one adaptation
            adapted = engine.adapt(params, batch.support, alpha=ALPHA, steps=STEPS)
            for chosen in MODES:
                real = batch.query.real(engine.predict(adapted, batch.query, batch_norm=chosen))
                same = torch.allclose(real, batch.query.real(outputs), rtol=1e-9, atol=1e-12)
                assert same == (chosen == mode)
    # negative control
    assert (losses["inductive"] - losses["transductive"]).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["conv", "1d"])
def test_predictions_depend_on_the_other_rows_if_transductive_alone(name):
    module, shape = build_net(name)
    batch = make_batch(shape)
    few = Rows(batch.query.X[:, :2], batch.query.y[:, :2])
    for rung in (NETS[name][2], "loop"):
        for mode in MODES:
            engine = engine_in(mode, module, rung)
            adapted = engine.adapt(
                make_meta_params(module), batch.support, alpha=ALPHA, steps=STEPS
            )
            whole, part = (engine.predict(adapted, rows) for rows in (batch.query, few))
            distance = (whole[:, :2] - part).abs().max()
            assert distance < 1e-12 if mode == "inductive" else distance > 1e-2


@pytest.mark.parametrize("name", ["conv", "1d"])
def test_pieces_of_the_query_set_give_the_same_numbers(name, monkeypatch):
    module, shape = build_net(name)
    batch = make_batch(shape)
    for mode in MODES:
        whole = meta_step(engine_in(mode, module), module, batch)
        with monkeypatch.context() as patch:
            patch.setattr("sklearn_maml.engine.conv.layers.ACTIVATION_BYTES", 1)
            for options in ({}, {"max_tasks_in_memory": 2}):
                step = meta_step(engine_in(mode, module, **options), module, batch)
                assert difference(step.grads, whole.grads) <= 1e-9
                torch.testing.assert_close(step.losses, whole.losses, rtol=1e-9, atol=0)


def test_other_meta_gradients_get_a_query_loss_to_differentiate_twice():
    """Subclasses do not take the query loss that has its gradient computed with it."""

    class Own(SecondOrder):
        pass

    module, shape = build_net("conv")
    batch = make_batch(shape)
    for mode in MODES:
        engine = engine_in(mode, module)
        expected = meta_step(engine, module, batch)
        engine.spec.meta_gradient = Own()
        assert difference(meta_step(engine, module, batch).grads, expected.grads) <= 1e-9


def test_nets_without_batch_norm_take_the_same_path_in_both_modes():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3)).double()
    batch = make_batch((2, 7, 7))
    for rung in ("auto", "loop"):
        inductive, transductive = (
            meta_step(engine_in(mode, module, rung), module, batch) for mode in MODES
        )
        for n, g in inductive.grads.items():
            assert torch.equal(g, transductive.grads[n])


# --- one value of a channel


@pytest.mark.parametrize("rung", ["auto", "loop"])
def test_one_query_row_is_enough_for_inductive_alone(rung):
    module, shape = build_net("1d")
    batch = make_batch(shape, ((4, 4), (1, 1)))
    engine = engine_in("inductive", module, rung)
    assert torch.isfinite(meta_step(engine, module, batch).losses).all()
    adapted = engine.adapt(make_meta_params(module), batch.support, alpha=ALPHA, steps=STEPS)
    assert torch.isfinite(engine.predict(adapted, batch.query)).all()
    with pytest.raises(ValueError, match=r"query set has one row.*batch_norm='inductive'"):
        engine.predict(adapted, batch.query, batch_norm="transductive")
    with pytest.raises(ValueError, match=r"query set has one row.*batch_norm='inductive'"):
        meta_step(engine_in("transductive", module, rung), module, batch)


@pytest.mark.parametrize("n_steps", [0, 1])
@pytest.mark.parametrize("name", ["conv, then flat", "1d"])
def test_one_support_row_is_refused(name, n_steps):
    module, shape = build_net(name)
    batch = make_batch(shape, ((1, 1), (4, 4)))
    for rung in ("auto", "loop"):
        engine = engine_in("inductive", module, rung)
        with pytest.raises(ValueError, match="support set has one row"):
            meta_step(engine, module, batch, n_steps=n_steps)
        with pytest.raises(ValueError, match="support set has one row"):
            engine.adapt(make_meta_params(module), batch.support, alpha=ALPHA, steps=n_steps)


# --- layers of the user's own


class Scaled(nn.BatchNorm1d):
    """Inherits the forward pass."""


class Doubled(nn.BatchNorm1d):
    """Has a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_that_inherit_the_forward_pass_are_batch_norm():
    module = Net(Scaled).double()
    batch = make_batch((3,))
    twin = Net().double()
    twin.load_state_dict(module.state_dict())
    for rung in ("vmap", "loop"):
        step, expected = (
            meta_step(engine_in("inductive", m, rung), m, batch) for m in (module, twin)
        )
        assert difference(step.grads, expected.grads) == 0.0


@pytest.mark.parametrize("rung", ["vmap", "loop"])
def test_a_forward_pass_of_its_own_is_kept_with_a_warning(rung):
    module = Net(Doubled).double()
    batch = make_batch((3,))
    engine = engine_in("inductive", module, rung)
    with pytest.warns(EngineFallbackWarning, match=r"\['norm'\] of Net"):
        step = meta_step(engine, module, batch)
    meta_step(engine, module, batch)  # once is enough: warnings are errors
    expected = meta_step(engine_in("transductive", module, rung), module, batch)
    assert difference(step.grads, expected.grads) == 0.0


def test_hooks_of_the_layer_run_still():
    module, shape = build_net("1d")
    module[1].register_forward_hook(lambda layer, inputs, output: 2 * output)
    plain = build_net("1d")[0]
    batch = make_batch(shape)
    for mode in MODES:
        step, other = (meta_step(engine_in(mode, m, "loop"), m, batch) for m in (module, plain))
        assert difference(step.grads, other.grads) > 1e-3


def test_a_norm_alone_is_a_module_too():
    module = nn.BatchNorm1d(3).double()
    batch = make_batch((3,))
    engine = engine_in("inductive", module)
    assert isinstance(engine.module, TaskBatchNorm)
    step = meta_step(engine, module, batch)
    evaluated, _ = engine.evaluate(make_meta_params(module), batch, alpha=ALPHA, steps=STEPS)
    torch.testing.assert_close(step.losses, evaluated, rtol=1e-9, atol=0)


def test_engines_can_be_pickled():
    module, shape = build_net("1d")
    batch = make_batch(shape)
    engine = engine_in("inductive", module)
    step = meta_step(engine, module, batch)
    for twin in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert difference(meta_step(twin, module, batch).grads, step.grads) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_rounded_layers_train_what_they_predict(mode):
    module, shape = build_net("conv")
    module = module.float()
    batch = make_batch(shape)
    batch = EpisodeBatch(*(Rows(rows.X.float(), rows.y) for rows in (batch.support, batch.query)))
    engine = engine_in(mode, module, "loop", precision="bf16")
    step = meta_step(engine, module, batch)
    losses, _ = engine.evaluate(make_meta_params(module), batch, alpha=ALPHA, steps=STEPS)
    torch.testing.assert_close(step.losses, losses, rtol=0.02, atol=0)


# --- the estimators


def tasks(seed=0, n_tasks=6, n_rows=12):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, 3))
    groups = np.repeat(np.arange(n_tasks), n_rows)
    slope = rng.normal(size=(n_tasks, 3))
    return X, (X * slope[groups]).sum(1), groups


def fitted(estimator=MAMLRegressor, **params):
    X, y, groups = tasks()
    options = {
        "update_rule": "sgd",
        "module": make_net(estimator),
        "max_iter": 5,
        "steps": 2,
        "alpha": 0.1,
    }
    model = estimator(**{**options, "early_stopping": False, "random_state": 0, **params})
    return model.fit(X, y if estimator is MAMLRegressor else (y > 0).astype(int), groups=groups)


def make_net(estimator):
    n_outputs = 1 if estimator is MAMLRegressor else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, n_outputs))


def outputs_of(model, X, groups=None):
    method = model.predict if isinstance(model, MAMLRegressor) else model.predict_proba
    return np.asarray(method(X, groups=groups))


@pytest.mark.parametrize("estimator", [MAMLRegressor, MAMLClassifier])
def test_estimators_predict_both_ways(estimator):
    X, y, groups = tasks(1)
    y = y if estimator is MAMLRegressor else (y > 0).astype(int)
    fits = {mode: fitted(estimator, engine__batch_norm=mode) for mode in MODES}
    weights = [m.module_[0].weight.detach() for m in fits.values()]
    assert not torch.equal(*weights)
    assert torch.equal(weights[0], fitted(estimator).module_[0].weight)  # the default
    for mode, model in fits.items():
        assert clone(model).get_params()["engine__batch_norm"] == mode
        support = np.tile(np.arange(12) < 6, 6)
        model.adapt(X[support], y[support], groups=groups[support])
        query, query_groups = X[~support], groups[~support]
        predicted = {}
        for chosen in MODES:  # of one model, without adapting again
            predicted[chosen] = outputs_of(
                model.set_params(engine__batch_norm=chosen), query, query_groups
            )
            alone = [
                outputs_of(model, query[query_groups == j], query_groups[query_groups == j])
                for j in range(6)
            ]
            np.testing.assert_allclose(np.concatenate(alone), predicted[chosen], rtol=1e-6)
            ragged = np.arange(len(query)) % 6 >= query_groups // 2  # 6 or fewer rows of a task
            some = outputs_of(model, query[ragged], query_groups[ragged])
            companions = np.abs(some - predicted[chosen][ragged]).max()
            assert companions < 1e-6 if chosen == "inductive" else companions > 1e-3
        assert np.abs(predicted["inductive"] - predicted["transductive"]).max() > 1e-3


def test_all_rows_of_a_task_are_normalised_together(monkeypatch):
    """However many they are: what is predicted in pieces elsewhere is one piece here."""
    X, y, groups = tasks(1)
    model = fitted(engine__batch_norm="transductive").adapt(X, y, groups=groups)
    whole = model.predict(X, groups=groups)
    monkeypatch.setattr("sklearn_maml.learners.gradient.ROWS_AT_A_TIME", 5)
    np.testing.assert_allclose(model.predict(X, groups=groups), whole, rtol=1e-9)
    model.set_params(engine__batch_norm="inductive")
    in_pieces = model.predict(X, groups=groups)
    monkeypatch.undo()
    np.testing.assert_allclose(model.predict(X, groups=groups), in_pieces, rtol=1e-9)


def test_score_and_validation_follow_the_mode():
    X, y, groups = tasks(2, n_tasks=20)
    model = fitted(max_iter=1)
    new = groups + 100
    scores = {mode: model.set_params(engine__batch_norm=mode).score(X, y, new) for mode in MODES}
    assert abs(scores["inductive"] - scores["transductive"]) > 1e-3
    losses = set()
    for mode in MODES:
        net = clone(model).set_params(engine__batch_norm=mode, early_stopping=True, max_iter=1)
        losses.add(net.fit(X, y, groups=groups).history_[-1, "valid_loss"])
    assert len(losses) == 2


def test_estimators_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="engine__batch_norm"):
        fitted(engine__batch_norm="running")
    X, y, groups = tasks()
    model = fitted().adapt(X, y, groups=groups).set_params(engine__batch_norm="running")
    with pytest.raises(ValueError, match=r"engine__batch_norm='running' is not known"):
        model.predict(X, groups=groups)


def test_one_row_to_predict_is_refused_if_transductive():
    X, y, _ = tasks()
    model = fitted(engine__batch_norm="transductive").adapt(X[:12], y[:12])
    with pytest.raises(ValueError, match="query set has one row"):
        model.predict(X[:1])
    assert model.set_params(engine__batch_norm="inductive").predict(X[:1]).shape == (1,)


def test_recomputed_steps_fit_the_same_model():
    for mode in MODES:
        plain, recomputed = (
            fitted(engine__batch_norm=mode, engine__checkpoint_steps=on) for on in (False, True)
        )
        for p, q in zip(plain.module_.parameters(), recomputed.module_.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
