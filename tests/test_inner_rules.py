"""Inner rules are the ones the papers write down, in float64 and on every rung of the engine."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import sklearn
import torch
from builders import (
    SIZES,
    Number,
    finite_differences,
    flat,
    has_kernels,
    make_batch,
    make_engine,
    make_meta_params,
    make_mlp,
    number_batch,
    plain_tasks,
)
from networks import Residual
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from torch import nn

from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor
from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.datasets import load_omniglot, make_sinusoid_tasks
from sklearn_maml.engine.rungs.conv import Conv
from sklearn_maml.meta_gradients import MetaGradient
from sklearn_maml.modules import ContextMLP, adapted_names
from sklearn_maml.theta import rate_key
from sklearn_maml.update_rules import (
    SGD,
    UPDATE_RULES,
    Adam,
    ClosedFormHead,
    LearnedAlpha,
    LogisticHead,
    MetaSGD,
    Momentum,
    PerLayerPerStep,
    RidgeHead,
)

RUNGS = ["loop", "vmap", "stacked"]
STEPS = 3
DESCENT_RULES = [
    SGD(),
    SGD(max_grad_norm=0.5),
    MetaSGD(),
    MetaSGD(per="tensor"),
    MetaSGD(max_grad_norm=0.2),
]
GRADIENT_RULES = [
    PerLayerPerStep(),
    PerLayerPerStep(n_steps=2),
    PerLayerPerStep(max_grad_norm=0.5),
    LearnedAlpha(),
    LearnedAlpha(max_grad_norm=0.5),
    Momentum(),
    Momentum(momentum=0.5, nesterov=True),
    Momentum(max_grad_norm=0.5),
    Adam(eps=0.1),
    Adam(beta1=0.0, eps=0.1),
    Adam(beta1=0.5, beta2=0.7, eps=0.05, max_grad_norm=0.5),
]


# --- helpers


def assert_same(got, expected, tolerance=1e-9):
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=1e-2 * tolerance)


def assert_is_the_derivative(engine, meta_params, batch, *, steps=STEPS, alpha=0.3):
    exact = engine.meta_step(meta_params, batch, alpha=alpha, steps=steps).grads
    numeric = finite_differences(engine, meta_params, batch, alpha=alpha, steps=steps)
    largest = flat(numeric).abs().max()
    for name, g in numeric.items():
        scale = max(g.abs().max(), 1e-3 * largest)
        assert float((exact[name] - g).abs().max() / scale) <= 1e-6, name


# --- an implementation that shares no code with the library


def plain_move(rule, k, theta, slopes, learned, memory, alpha):
    """One step of a rule, in place of `theta` and `memory`."""
    if rule.max_grad_norm is not None:
        norm = sum((g**2).sum() for g in slopes.values()) ** 0.5
        if norm > rule.max_grad_norm:
            slopes = {n: g * rule.max_grad_norm / norm for n, g in slopes.items()}
    for n, g in slopes.items():
        if isinstance(rule, PerLayerPerStep):
            factors = learned[n]
            theta[n] = theta[n] - alpha * torch.exp(factors[min(k, len(factors) - 1)]) * g
        elif isinstance(rule, SGD | MetaSGD):
            factor = torch.exp(learned[n]) if learned else 1.0
            theta[n] = theta[n] - alpha * factor * g
        elif isinstance(rule, LearnedAlpha):
            theta[n] = theta[n] - alpha * torch.exp(learned["alpha"]) * g
        elif isinstance(rule, Momentum):
            memory[n] = rule.momentum * memory.get(n, 0.0) + g
            move = g + rule.momentum * memory[n] if rule.nesterov else memory[n]
            theta[n] = theta[n] - alpha * move
        else:
            m, v = memory.get(n, (0.0, 0.0))
            m = rule.beta1 * m + (1 - rule.beta1) * g
            v = rule.beta2 * v + (1 - rule.beta2) * g * g
            memory[n] = m, v
            m, v = m / (1 - rule.beta1 ** (k + 1)), v / (1 - rule.beta2 ** (k + 1))
            theta[n] = theta[n] - alpha * m / torch.sqrt(v + rule.eps * rule.eps)


def plain_loop(rule, meta_params, batch, *, alpha, steps, fast, second_order, classes=False):
    """Meta-gradient for a tanh network with one hidden layer, as a loop over tasks."""
    leaves = {name: p.clone().requires_grad_() for name, p in meta_params.items()}
    learned = {
        n.removeprefix("rule.").replace("__", "."): p for n, p in leaves.items() if "rule." in n
    }
    losses, adapted_to = [], []

    def loss(theta, X, y):
        hidden = torch.tanh(X @ theta["0.weight"].T + theta["0.bias"])
        out = hidden @ theta["2.weight"].T + theta["2.bias"]
        if classes:
            log_p = out - torch.log(torch.exp(out).sum(1, keepdim=True))
            return -sum(log_p[i, label] for i, label in enumerate(y.tolist())) / len(y)
        return ((out - y) ** 2).sum() / y.numel()

    for X_support, y_support, X_query, y_query in plain_tasks(batch):
        theta = {n.removeprefix("module."): p for n, p in leaves.items() if "module." in n}
        memory = {}
        for k in range(steps):
            slopes = torch.autograd.grad(
                loss(theta, X_support, y_support), [theta[n] for n in fast], create_graph=True
            )
            if not second_order:
                slopes = [g.detach() for g in slopes]
            slopes = dict(zip(fast, slopes, strict=True))
            plain_move(rule, k, theta, slopes, learned, memory, alpha)
        losses.append(loss(theta, X_query, y_query))
        adapted_to.append({n: theta[n].detach() for n in fast})
    grads = torch.autograd.grad(
        sum(losses) / len(batch), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True)), torch.stack(losses).detach(), adapted_to


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", [*DESCENT_RULES, *GRADIENT_RULES], ids=repr)
def test_gradient_rules_agree_with_a_plain_loop(rule, order, rung):
    settings = [
        ("all", False, "ragged"), ("head", True, "equal"), ("body", False, "ragged"),
        ("*.bias", True, "ragged"),
    ]  # fmt: skip
    for adapted, classes, sizes in settings:
        module = make_mlp(n_outputs=3)
        batch = make_batch(sizes, n_outputs=3, n_classes=3 if classes else None)
        engine = make_engine(
            module, rule=rule, rung=rung, order=order, adapted=adapted, classes=classes
        )
        meta_params = make_meta_params(module, rule, adapted=adapted)
        # more steps than have rates
        step = engine.meta_step(meta_params, batch, alpha=0.2, steps=STEPS + 1)
        names = adapted_names(module, adapted)
        grads, losses, adapted_to = plain_loop(
            rule, meta_params, batch, alpha=0.2, steps=STEPS + 1, fast=names,
            second_order=order == 2, classes=classes,
        )  # fmt: skip
        assert engine.rung == rung
        assert_same(step.grads, grads)
        torch.testing.assert_close(step.losses, losses, rtol=1e-9, atol=0)
        params = engine.adapt(meta_params, batch.support, alpha=0.2, steps=STEPS + 1).params
        assert_same(params, {n: torch.stack([task[n] for task in adapted_to]) for n in names})


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", [*DESCENT_RULES, *GRADIENT_RULES], ids=repr)
def test_second_order_gradients_are_the_derivative_of_the_evaluated_loss(rule, rung):
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module, rule)
    assert_is_the_derivative(make_engine(module, rule=rule, rung=rung), meta_params, batch)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_first_order_gradients_are_not(rule):
    """Negative control of the finite differences."""
    module, batch = make_mlp(), make_batch("ragged")
    engine, meta_params = make_engine(module, rule=rule, order=1), make_meta_params(module, rule)
    with pytest.raises(AssertionError):
        assert_is_the_derivative(engine, meta_params, batch)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_rules_that_learn_nothing_unusual_start_as_gradient_descent_and_others_differ(rule):
    module, batch = make_mlp(), make_batch()
    start = {f"module.{n}": p.detach() for n, p in module.named_parameters()}
    fast = {n: p.detach() for n, p in module.named_parameters()}
    learned = {f"rule.{rate_key(n)}": r for n, r in rule.initial_rates(fast, steps=STEPS).items()}

    def adapted(rule, params):
        engine = make_engine(module, rule=rule)
        return flat(engine.adapt(params, batch.support, alpha=0.2, steps=STEPS).params)

    descent = adapted(SGD(max_grad_norm=rule.max_grad_norm), start)
    got = adapted(rule, {**start, **learned})
    if learned:
        assert torch.equal(got, descent)
        got = adapted(rule, make_meta_params(module, rule))
    assert (got - descent).abs().max() > 1e-2


# --- by hand


# theta = 1, support loss theta^2 (gradient 2 theta), alpha = 0.1
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # 1 - 0.2 = 0.8; v = 0.5 * 2 + 1.6 = 2.6, 0.8 - 0.26
        (Momentum(momentum=0.5), 0.54),
        # g + v/2 = 3, 1 - 0.3 = 0.7; v = 1 + 1.4 = 2.4, g + v/2 = 2.6, 0.7 - 0.26
        (Momentum(momentum=0.5, nesterov=True), 0.44),
        # each step is alpha while the signs agree, as m / sqrt(v) = g / |g|
        (Adam(beta1=0.0, beta2=0.0), 0.8),
        # clipped to 1 in both steps
        (Momentum(momentum=0.5, max_grad_norm=1.0), 0.75),
    ],
    ids=repr,
)
def test_two_steps_by_hand(rule, expected):
    module = Number()
    engine = make_engine(module, rule=rule)
    params = {"module.value": module.value.detach()}
    adapted = engine.adapt(params, number_batch(0.0, 0.5).support, alpha=0.1, steps=2)
    assert adapted.params["value"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("rule", "rates", "factors"),
    [
        # theta is multiplied by 1 - 0.2 * factor in each step
        (PerLayerPerStep(), {"rule.value": [2.0, 0.5]}, [2.0, 0.5, 0.5]),
        (LearnedAlpha(), {"rule.alpha": 3.0}, [3.0, 3.0, 3.0]),
    ],
    ids=repr,
)
def test_learned_rates_by_hand(rule, rates, factors):
    module = Number()
    params = {
        "module.value": module.value.detach(),
        **{name: torch.tensor(r, dtype=torch.float64).log() for name, r in rates.items()},
    }
    engine = make_engine(module, rule=rule)
    batch = number_batch(0.0, 0.0)
    step = engine.meta_step(params, batch, alpha=0.1, steps=3)
    product = np.prod([1 - 0.2 * f for f in factors])
    assert step.outputs.item() == pytest.approx(product, rel=1e-12)
    # the loss is the squared product; d log(1 - 0.2 f) / d log f = -0.2 f / (1 - 0.2 f)
    slopes = [2 * product**2 * -0.2 * f / (1 - 0.2 * f) for f in factors]
    by_rate = step.grads[next(iter(rates))].reshape(-1).tolist()
    expected = [slopes[0], slopes[1] + slopes[2]] if len(by_rate) == 2 else [sum(slopes)]
    assert by_rate == pytest.approx(expected, rel=1e-12)


def test_adam_takes_the_steps_of_torch():
    module, batch = make_mlp(), make_batch()
    engine = make_engine(module, rule=Adam(beta1=0.8, beta2=0.9))
    params = make_meta_params(module, Adam())
    adapted = engine.adapt(params, batch.support, alpha=0.05, steps=6).params
    for j in range(len(batch)):
        own = make_mlp()
        optimizer = torch.optim.Adam(own.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-8)
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(own(batch.support.X[j]), batch.support.y[j]).backward()
            optimizer.step()
        for name, p in own.named_parameters():
            # where eps goes makes a difference of 1e-8 relative to the gradient
            torch.testing.assert_close(adapted[name][j], p.detach(), rtol=1e-5, atol=1e-7)


# --- zeros


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    "rule",
    [Adam(), Adam(beta1=0.0), Adam(max_grad_norm=1.0), Momentum(max_grad_norm=1.0)],
    ids=repr,
)
def test_gradients_of_exactly_zero_have_finite_second_derivatives(rule, rung, dtype):
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        module[0].bias[:2] = -100.0  # dead on all rows
    batch = make_batch()
    batch = EpisodeBatch(
        *(Rows(r.X.to(dtype), r.y.to(dtype)) for r in (batch.support, batch.query))
    )
    engine = make_engine(module, rule=rule, rung=rung)
    params = make_meta_params(module, rule)
    step = engine.meta_step(params, batch, alpha=0.01, steps=STEPS)
    assert all(torch.isfinite(g).all() for g in step.grads.values())
    dead = step.grads["module.0.weight"][:2]
    assert not dead.any()
    adapted = engine.adapt(params, batch.support, alpha=0.01, steps=STEPS).params
    assert torch.equal(adapted["0.weight"][0, :2], module[0].weight[:2])


# --- rungs of the engine


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", [Momentum(nesterov=True), Adam(eps=0.1)], ids=repr)
def test_state_is_carried_through_recomputed_steps(rule, rung, sizes):
    module, batch = make_mlp(), make_batch(sizes)
    meta_params = make_meta_params(module, rule)
    plain, recomputed = (
        make_engine(module, rule=rule, rung=rung, checkpoint_steps=on).meta_step(
            meta_params, batch, alpha=0.2, steps=4
        )
        for on in (False, True)
    )
    assert_same(recomputed.grads, plain.grads, 1e-11)
    torch.testing.assert_close(recomputed.losses, plain.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rung", ["vmap", "stacked"])
@pytest.mark.parametrize(
    "rule", [PerLayerPerStep(), Momentum(nesterov=True), Adam(eps=0.1), RidgeHead()], ids=repr
)
def test_traced_steps_are_those_of_the_loop(rule, rung):
    module, batch = make_mlp(), make_batch("ragged")
    adapted = "head" if isinstance(rule, ClosedFormHead) else "all"
    meta_params = make_meta_params(module, rule, adapted=adapted)
    traced, loop = (make_engine(module, rule=rule, rung=r, adapted=adapted) for r in (rung, "loop"))
    # as in a long fit
    traced.tracer.min_seen, traced.tracer.min_updates, traced.tracer.updates_left = 1, 0, 10
    expected = loop.meta_step(meta_params, batch, alpha=0.2, steps=STEPS)
    for _ in range(3):
        assert_same(
            traced.meta_step(meta_params, batch, alpha=0.2, steps=STEPS).grads, expected.grads
        )
    assert traced.tracer.n_traced == 1


@pytest.mark.skipif(not has_kernels(), reason="needs the compiled kernels")
@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize(
    "rule", [PerLayerPerStep(), PerLayerPerStep(n_steps=2), LearnedAlpha(), MetaSGD()], ids=repr
)
def test_compiled_kernels_take_the_learned_rates_of_each_step(rule, steps, order, checkpoint_steps):
    for adapted in ("all", "head", "body"):
        module, batch = make_mlp(), make_batch("ragged")
        meta_params = make_meta_params(module, rule, adapted=adapted)
        native, loop = (
            make_engine(
                module, rule=rule, rung=rung, order=order, adapted=adapted,
                checkpoint_steps=checkpoint_steps,
            )
            for rung in ("native", "loop")
        )  # fmt: skip
        assert native.rung == "native"
        got, expected = (
            e.meta_step(meta_params, batch, alpha=0.2, steps=steps) for e in (native, loop)
        )
        assert_same(got.grads, expected.grads)
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-9, atol=0)
        got, expected = (
            e.adapt(meta_params, batch.support, alpha=0.2, steps=steps).params
            for e in (native, loop)
        )
        assert_same(got, expected)


@pytest.mark.parametrize("rule", [Momentum(), Momentum(max_grad_norm=1.0), Adam()], ids=repr)
def test_compiled_kernels_are_not_for_other_rules(rule):
    with pytest.raises(ValueError, match="do not cover"):
        make_engine(make_mlp(), rule=rule, rung="native")


# --- heads in closed form

HEADS = [RidgeHead(), RidgeHead(lam=0.1), LogisticHead(), LogisticHead(lam=0.2, newton_steps=2)]


def plain_ridge(X, y, a, lam, has_bias):
    """Normal equations with the intercept as a column of its own that has no penalty."""
    if has_bias:
        X = np.column_stack([X, np.ones(len(X))])
    penalty = lam * np.eye(X.shape[1])
    if has_bias:
        penalty[-1, -1] = 0.0
    own = np.linalg.solve(X.T @ (a[:, None] * X) + penalty, X.T @ (a[:, None] * y))
    return (own[:-1].T, own[-1]) if has_bias else (own.T, None)


def plain_weights(rows, j):
    one = rows.task(j)
    n = len(one.X)
    return np.ones(n) if one.weight is None else one.weight.numpy() * n


def adapt_head(module, rule, batch, *, rung="loop", classes=False, **options):
    engine = make_engine(module, rule=rule, rung=rung, adapted="head", classes=classes, **options)
    params = make_meta_params(module, rule, adapted="head", classes=classes)
    return engine, params, engine.adapt(params, batch.support, alpha=0.0, steps=1).params


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal weights", "weights"])
@pytest.mark.parametrize("classes", [False, True], ids=["numbers", "classes"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("width", [3, 8], ids=["fewer features", "fewer rows"])
def test_ridge_head_solves_the_normal_equations(width, bias, classes, weighted, sizes, rung):
    rule, module = RidgeHead(lam=0.3), make_mlp(n_outputs=3, width=width, bias=bias)
    batch = make_batch(sizes, n_outputs=3, n_classes=3 if classes else None, weighted=weighted)
    engine, params, adapted = adapt_head(module, rule, batch, rung=rung, classes=classes)
    assert engine.rung == rung
    lam = 0.3 * np.exp(params["rule.lam"].item())
    scale = 10.0 * np.exp(params["rule.scale"].item()) if classes else 1.0
    for j in range(len(batch)):
        rows = batch.support.task(j)
        features = module[1](module[0](rows.X)).detach().numpy()
        y = np.eye(3)[rows.y.numpy()] if classes else rows.y.numpy()
        own, shift = plain_ridge(features, y, plain_weights(batch.support, j), lam, bias)
        np.testing.assert_allclose(adapted["2.weight"][j], scale * own, rtol=1e-9, atol=1e-11)
        if bias:
            np.testing.assert_allclose(adapted["2.bias"][j], scale * shift, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal weights", "weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("width", [3, 8], ids=["fewer features", "fewer rows"])
def test_logistic_head_finds_the_optimum_of_its_objective(width, bias, weighted, sizes, rung):
    rule = LogisticHead(lam=0.3, newton_steps=12)
    module = make_mlp(n_outputs=3, width=width, bias=bias)
    batch = make_batch(sizes, n_outputs=3, n_classes=3, weighted=weighted)
    _, params, adapted = adapt_head(module, rule, batch, rung=rung, classes=True)
    lam, scale = 0.3 * np.exp(params["rule.lam"].item()), 3 * np.exp(params["rule.scale"].item())
    for j in range(len(batch)):
        rows = batch.support.task(j)
        X = module[1](module[0](rows.X)).detach().numpy()
        a = plain_weights(batch.support, j)
        if bias:
            X = np.column_stack([X, np.ones(len(X))])
        for c in range(3):
            found = adapted["2.weight"][j, c].numpy() / scale
            if bias:
                found = np.append(found, adapted["2.bias"][j, c] / scale)
            sign = np.where(rows.y.numpy() == c, 1.0, -1.0)
            # the gradient of the penalised loss is 0
            gradient = lam * found - X.T @ (a * sign / (1 + np.exp(sign * (X @ found))))
            np.testing.assert_allclose(gradient, 0.0, atol=1e-9)


def test_logistic_head_is_the_logistic_regression_of_scikit_learn():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(1, 30, 4)), rng.integers(0, 3, (1, 30))
    module = nn.Linear(4, 3, bias=False).double()
    rule = LogisticHead(lam=0.5, newton_steps=12)
    engine = make_engine(module, rule=rule, rung="stacked", adapted="head", classes=True)
    params = {
        "module.weight": module.weight.detach(),
        **{f"rule.{n}": torch.zeros((), dtype=torch.float64) for n in ("lam", "scale")},
    }
    support = Rows(torch.as_tensor(X), torch.as_tensor(y))
    got = engine.adapt(params, support, alpha=0.1, steps=3).params["weight"][0]
    for c in range(3):
        other = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-10).fit(X[0], y[0] == c)
        np.testing.assert_allclose(got[c] / 3, other.coef_[0], rtol=1e-5)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rule", HEADS, ids=repr)
def test_meta_gradients_of_heads_are_the_derivative_of_the_evaluated_loss(rule, sizes, rung):
    for classes in (True, False)[: 1 if isinstance(rule, LogisticHead) else 2]:
        for width in (3, 8):
            module = make_mlp(n_outputs=3, width=width)
            batch = make_batch(
                sizes, n_outputs=3, n_classes=3 if classes else None, weighted=width == 3
            )
            engine = make_engine(module, rule=rule, rung=rung, adapted="head", classes=classes)
            params = make_meta_params(module, rule, adapted="head", classes=classes)
            assert ("rule.scale" in params) == classes
            assert_is_the_derivative(engine, params, batch)
            grads = engine.meta_step(params, batch, alpha=0.3, steps=1).grads
            # where it starts from does not matter to a solution
            assert not grads["module.2.weight"].any()
            assert not grads["module.2.bias"].any()
            assert all(g.abs().max() > 1e-4 for n, g in grads.items() if "module.2" not in n)
            loop = make_engine(module, rule=rule, adapted="head", classes=classes)
            assert_same(grads, loop.meta_step(params, batch, alpha=0.3, steps=1).grads)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", HEADS, ids=repr)
def test_first_order_takes_the_solution_as_a_constant(rule, rung):
    module, batch = make_mlp(n_outputs=3), make_batch("ragged", n_outputs=3, n_classes=3)
    params = make_meta_params(module, rule, adapted="head", classes=True)
    first, second = (
        make_engine(module, rule=rule, rung=rung, order=order, adapted="head", classes=True)
        for order in (1, 2)
    )
    solved = first.adapt(params, batch.support, alpha=0.1, steps=1).params
    body = {n: module.get_parameter(n) for n in ("0.weight", "0.bias")}
    expected = {n: 0.0 for n in body}
    by_scale = 0.0
    for j in range(len(batch)):
        query = batch.query.task(j)
        head = {n: p[j].clone().requires_grad_() for n, p in solved.items()}
        output = torch.func.functional_call(module, {**body, **head}, (query.X,))
        loss = nn.functional.cross_entropy(output, query.y)
        grads = torch.autograd.grad(loss, [*body.values(), *head.values()])
        for n, g in zip(body, grads, strict=False):
            expected[n] = expected[n] + g / len(batch)
        by_head = zip(grads[2:], head.values(), strict=True)
        by_scale = by_scale + sum((g * h).sum() for g, h in by_head) / len(batch)
    got = first.meta_step(params, batch, alpha=0.1, steps=1)
    for n, g in expected.items():
        torch.testing.assert_close(got.grads[f"module.{n}"], g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.grads["rule.scale"], by_scale.detach(), rtol=1e-9, atol=1e-12)
    assert not got.grads["rule.lam"].any()
    exact = second.meta_step(params, batch, alpha=0.1, steps=1)
    torch.testing.assert_close(got.losses, exact.losses, rtol=1e-12, atol=0)
    assert (flat(exact.grads) - flat(got.grads)).abs().max() > 1e-3


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", HEADS, ids=repr)
def test_a_head_is_solved_once_or_not_at_all(rule, rung):
    module, batch = make_mlp(n_outputs=3), make_batch(n_outputs=3, n_classes=3)
    params = make_meta_params(module, rule, adapted="head", classes=True)
    engine = make_engine(module, rule=rule, rung=rung, adapted="head", classes=True)
    never, once, thrice = (
        engine.adapt(params, batch.support, alpha=alpha, steps=steps).params
        for alpha, steps in ((0.1, 0), (0.1, 1), (9.0, 3))
    )
    assert_same(thrice, once, 1e-15)
    for name, p in never.items():
        assert torch.equal(p, params[f"module.{name}"].expand_as(p))
        assert (p - once[name]).abs().max() > 1e-2
    step = engine.meta_step(params, batch, alpha=0.1, steps=0)
    assert step.grads["module.2.weight"].any()
    assert not step.grads["rule.lam"].any()


@pytest.mark.parametrize("rule", HEADS, ids=repr)
def test_padding_and_its_contents_do_not_matter_to_heads(rule):
    module, batch = make_mlp(n_outputs=3), make_batch("ragged", n_outputs=3, n_classes=3)
    filled = batch.support.weight == 0
    batch.support.X[filled] = 1e3
    _, _, padded = adapt_head(module, rule, batch, rung="stacked", classes=True)
    for j in range(len(batch)):
        one = Rows(*(t[None] for t in (batch.support.task(j).X, batch.support.task(j).y)))
        alone = EpisodeBatch(one, batch.query.take(np.array([j])))
        _, _, own = adapt_head(module, rule, alone, rung="stacked", classes=True)
        assert_same({n: p[0] for n, p in own.items()}, {n: p[j] for n, p in padded.items()})


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", HEADS, ids=repr)
def test_heads_stay_finite_for_one_row_one_class_and_dead_features(rule, rung):
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    rng = np.random.default_rng(0)
    for n_rows, dead in ((1, False), (6, False), (6, True), (1, True)):
        with torch.no_grad():
            module[0].bias.fill_(-100.0 if dead else 0.1)
        X = torch.as_tensor(rng.normal(size=(2, n_rows, 2)))
        rows = Rows(X, torch.ones(2, n_rows, dtype=torch.int64))
        engine, params, adapted = adapt_head(
            module, rule, EpisodeBatch(rows, rows), rung=rung, classes=True
        )
        step = engine.meta_step(params, EpisodeBatch(rows, rows), alpha=0.1, steps=1)
        for t in (*adapted.values(), *step.grads.values(), step.losses):
            assert torch.isfinite(t).all()
        assert (step.outputs.argmax(-1) == 1).all()


def conv_net(n_outputs=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2),
            nn.Sequential(nn.Flatten(), nn.Linear(12, n_outputs)),
        ]  # fmt: skip
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("rule", HEADS, ids=repr)
@pytest.mark.parametrize("kind", ["conv", "residual", "traced"])
def test_heads_of_other_modules_are_those_of_the_loop(kind, rule):
    rng = np.random.default_rng(0)
    if kind == "conv":
        module = conv_net()
        X, rung = rng.normal(size=(3, 9, 1, 4, 4)), "stacked"
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Residual(2, 3).double()
        X, rung = rng.normal(size=(3, 9, 2)), "vmap" if kind == "residual" else "traced"
    y = torch.as_tensor(rng.integers(0, 3, (3, 9)))
    X = torch.as_tensor(X)
    batch = EpisodeBatch(Rows(X[:, :5], y[:, :5]), Rows(X[:, 5:], y[:, 5:]))
    params = make_meta_params(module, rule, adapted="head", classes=True)
    engine, loop = (
        make_engine(module, rule=rule, rung=r, adapted="head", classes=True) for r in (rung, "loop")
    )
    engine.tracer.updates_left = 10
    expected = loop.meta_step(params, batch, alpha=0.1, steps=1)
    for _ in range(3 if kind == "traced" else 1):
        got = engine.meta_step(params, batch, alpha=0.1, steps=1)
        assert_same(got.grads, expected.grads)
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-10, atol=0)
    assert (engine.tracer.n_traced == 1) == (kind == "traced")
    if kind == "conv":
        assert isinstance(engine.ladder.base, Conv)
    assert_same(
        engine.adapt(params, batch.support, alpha=0.1, steps=1).params,
        loop.adapt(params, batch.support, alpha=0.1, steps=1).params,
    )
    for a, b in zip(
        engine.evaluate(params, batch, alpha=0.1, steps=1),
        loop.evaluate(params, batch, alpha=0.1, steps=1),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if kind != "traced":
        numeric = finite_differences(engine, params, batch, alpha=0.1, steps=1)
        assert (flat(numeric) - flat(expected.grads)).abs().max() <= 1e-6 * flat(
            numeric
        ).abs().max()


# --- what adapts


@pytest.mark.parametrize("rung", ["loop", "vmap"])
@pytest.mark.parametrize("rule", [SGD(), *GRADIENT_RULES], ids=repr)
def test_a_context_adapts_alone(rule, rung):
    """CAVIA: the network beside the context is the same for all tasks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ContextMLP(2, 2, hidden_layer_sizes=4, n_context=3, activation="tanh").double()
    assert adapted_names(module, "head") == ["layers.2.weight", "layers.2.bias"]
    batch = make_batch("ragged")
    engine = make_engine(module, rule=rule, rung=rung, adapted="context")
    assert engine.spec.pads  # ragged batches stay whole
    params = make_meta_params(module, rule, adapted="context")
    adapted = engine.adapt(params, batch.support, alpha=0.3, steps=STEPS)
    assert list(adapted.params) == ["context"]
    for j in range(len(batch)):
        context = adapted.params["context"][j]
        assert context.abs().max() > 1e-2
        rows = batch.query.task(j).X
        w, b = (params[f"module.layers.0.{n}"] for n in ("weight", "bias"))
        # the context shifts the biases of the first layer
        hidden = torch.tanh(rows @ w[:, :2].T + b + w[:, 2:] @ context)
        expected = hidden @ params["module.layers.2.weight"].T + params["module.layers.2.bias"]
        got = engine.predict(adapted, batch.query)[j, : len(rows)]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_is_the_derivative(engine, params, batch)
    loop = make_engine(module, rule=rule, adapted="context")
    expected = loop.meta_step(params, batch, alpha=0.3, steps=STEPS).grads
    assert_same(engine.meta_step(params, batch, alpha=0.3, steps=STEPS).grads, expected)


def test_cavia_learns_sinusoids():
    X, y, task = make_sinusoid_tasks(n_tasks=100, n_rows=20, random_state=0)
    reg = MAMLRegressor(
        update_rule="sgd", module=ContextMLP, module__n_context=4, adapted="context", alpha=1.0,
        steps=3, max_iter=400, random_state=0,
    ).fit(X, y, groups=task)  # fmt: skip
    assert reg.history_[-1]["valid_loss"] < 0.5 * reg.history_[-1]["valid_loss_before"]
    X_new, y_new, new = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=1)
    assert reg.score(X_new, y_new, groups=new + 1000) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_context": 0}, "n_context must be a positive int; got 0"),
        ({"activation": "sine"}, "activation='sine' is not known; expected one of"),
        ({"hidden_layer_sizes": 0}, "hidden_layer_sizes must be positive"),
    ],
)
def test_contexts_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContextMLP(2, 1, **options)


def test_sizes_of_contexts_may_be_numbers_of_numpy():
    # as searches over np.arange give them
    assert ContextMLP(2, 1, n_context=np.arange(2, 4)[1]).context.shape == (3,)


# --- the estimators


def sinusoids(n_tasks=15, n_outputs=1, seed=0, first=0):
    X, y, task = make_sinusoid_tasks(n_tasks=n_tasks, n_rows=20, random_state=seed)
    y = y if n_outputs == 1 else np.column_stack([y, 2.0 - 3.0 * y])
    return X, y, task + first


REGRESSORS = {
    name: {"update_rule": name, **({"adapted": "head"} if name.endswith("head") else {})}
    for name in UPDATE_RULES
    if name != "logistic-head"
}
SETTINGS = {
    "sgd": ("max_grad_norm", 0.01),
    "meta-sgd": ("max_grad_norm", 0.01),
    "per-layer-per-step": ("max_grad_norm", 0.01),
    "learned-alpha": ("max_grad_norm", 0.01),
    "momentum": ("momentum", 0.1),
    "adam": ("eps", 1.0),
    "ridge-head": ("lam", 100.0),
}


@pytest.mark.parametrize("name", REGRESSORS)
def test_every_rule_serves_the_estimator(name):
    X, y, task = sinusoids(n_outputs=2)
    new, y_new, ids = sinusoids(4, n_outputs=2, seed=1, first=100)
    make = MAMLRegressor(
        max_iter=20, steps=2, adapt_steps=5, alpha=0.01, n_shots=8, random_state=0,
        **REGRESSORS[name],
    )  # fmt: skip
    reg = make.fit(X, y, groups=task)
    reg.adapt(new[::2], y_new[::2], groups=ids[::2])
    predicted = reg.predict(new, groups=ids)
    assert predicted.shape == y_new.shape
    assert np.isfinite(predicted).all()
    assert np.isfinite(reg.score(new, y_new, groups=ids))
    same = clone(make).fit(X, y, groups=task).adapt(new[::2], y_new[::2], groups=ids[::2])
    assert same.predict(new, groups=ids).tobytes() == predicted.tobytes()
    copied = pickle.loads(pickle.dumps(reg))
    assert copied.predict(new, groups=ids).tobytes() == predicted.tobytes()
    copied.adapt(new[::2], y_new[::2], groups=ids[::2])
    assert copied.predict(new, groups=ids).tobytes() == predicted.tobytes()
    key, value = SETTINGS[name]
    assert key in UPDATE_RULES[name]().get_params()
    reg.set_params(**{f"update_rule__{key}": value})
    reg.adapt(new[::2], y_new[::2], groups=ids[::2])
    assert np.abs(reg.predict(new, groups=ids) - predicted).max() > 1e-3
    learned = dict(reg.net_.module_.rule.named_parameters())
    assert all(p.detach().any() for p in learned.values())
    assert bool(learned) == (name not in ("sgd", "momentum", "adam"))


@pytest.mark.parametrize("name", ["ridge-head", "logistic-head", "adam", "per-layer-per-step"])
def test_rules_serve_the_classifier_of_episodes(name):
    X, y = load_omniglot(subset="background", return_X_y=True)
    X_new, y_new = load_omniglot(subset="evaluation", return_X_y=True)
    adapted = "head" if name.endswith("head") else "all"
    clf = MAMLClassifier(
        n_ways=5, n_shots=1, update_rule=name, adapted=adapted, alpha=0.01, random_state=0,
        max_iter=60 if adapted == "head" else 3,
    ).fit(X, y)  # fmt: skip
    if adapted == "head":
        assert clf.score(X_new, y_new) > 0.55  # chance is 0.2
    # fewer classes than the head has outputs, and one class alone
    labels = np.unique(y_new)[:3]
    rows = np.concatenate([np.flatnonzero(y_new == label) for label in labels])
    support = np.concatenate([np.flatnonzero(y_new == label)[:5] for label in labels])
    clf.adapt(X_new[support], y_new[support])
    p = clf.predict_proba(X_new[rows])
    assert p.shape == (len(rows), 3)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-5)
    if adapted == "head":
        assert (clf.predict(X_new[rows]) == y_new[rows]).mean() > 0.6
    clf.adapt(X_new[support[:5]], y_new[support[:5]])
    assert (clf.predict(X_new[rows]) == labels[0]).all()


@pytest.mark.parametrize("name", ["ridge-head", "logistic-head"])
def test_heads_know_classes_that_a_task_lacks_when_tasks_share_their_labels(name):
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(600, 3)), np.repeat(np.arange(20), 30)
    shift = rng.normal(size=(20, 3))[task]
    y = np.array(["a", "b", "c"])[(X + 0.3 * shift).argmax(1)]
    clf = MAMLClassifier(update_rule=name, adapted="head", max_iter=60, random_state=0)
    clf = clf.fit(X, y, groups=task)
    assert clf.score(X, y, groups=task) > 0.7
    without = (task == 0) & (y != "b")
    clf.adapt(X[without], y[without])
    assert not (clf.predict(X[task == 0]) == "b").any()
    assert clf.predict_proba(X[task == 0]).shape == (30, 3)


def test_a_ridge_head_learns_sinusoids():
    X, y, task = sinusoids(100, n_outputs=2)
    reg = MAMLRegressor(
        update_rule="ridge-head", adapted="head", n_shots=10, steps=1, max_iter=200, random_state=0
    ).fit(X, y, groups=task)
    new, y_new, ids = sinusoids(40, n_outputs=2, seed=1, first=1000)
    support = np.arange(len(new)) % 20 < 10
    error = {}
    for steps in (0, 1):
        reg.set_params(adapt_steps=steps).adapt(new[support], y_new[support], groups=ids[support])
        residual = reg.predict(new[~support], groups=ids[~support]) - y_new[~support]
        error[steps] = (residual**2).mean(0)
    assert (error[1] < 0.2 * error[0]).all()
    # the second output is a linear function of the first, which ridge regression keeps
    assert error[1][1] == pytest.approx(9.0 * error[1][0], rel=1e-3)


def test_sample_weights_reach_the_heads():
    X, y, task = sinusoids()
    reg = MAMLRegressor(
        update_rule="ridge-head", adapted="head", steps=1, max_iter=5, random_state=0
    ).fit(X, y, groups=task)
    new, y_new, _ = sinusoids(1, seed=1)
    weight = np.arange(20) % 4.0
    predicted = reg.adapt(new, y_new, sample_weight=weight).predict(new)
    kept = weight > 0
    only = reg.adapt(new[kept], y_new[kept], sample_weight=weight[kept]).predict(new)
    np.testing.assert_allclose(predicted, only, rtol=1e-10)
    surer = reg.adapt(new[kept], y_new[kept], sample_weight=7 * weight[kept]).predict(new)
    assert np.abs(surer - predicted).max() > 1e-3
    equal = reg.adapt(new[kept], y_new[kept]).predict(new)
    assert np.abs(equal - predicted).max() > 1e-3


def test_rates_of_each_step_are_learned_and_the_last_one_serves_further_steps():
    X, y, task = sinusoids()
    reg = MAMLRegressor(
        update_rule="per-layer-per-step", steps=3, max_iter=30, alpha=0.01, random_state=0
    ).fit(X, y, groups=task)
    rates = dict(reg.net_.module_.rule.named_parameters())
    assert {tuple(r.shape) for r in rates.values()} == {(3,)}
    assert all(len(set(r.tolist())) == 3 for r in rates.values())
    new, y_new, _ = sinusoids(1, seed=1)
    predicted = {}
    for steps in (3, 6):
        reg.set_params(adapt_steps=steps).adapt(new, y_new)
        predicted[steps] = reg.predict(new)
    assert np.abs(predicted[3] - predicted[6]).max() > 1e-4
    # the same adaptation with the last rates written out
    engine, learner = reg._state.adapted.engine, reg._learner
    support = Rows(
        torch.as_tensor(new)[None],
        torch.as_tensor((y_new[:, None] - reg.y_mean_) / reg.y_scale_)[None],
    )
    params = learner.meta_params()
    long = {n: torch.cat([r, r[-1:].repeat(3)]) if "rule." in n else r for n, r in params.items()}
    a, b = (engine.adapt(p, support, alpha=0.01, steps=6).params for p in (params, long))
    assert_same(a, b, 1e-12)


def test_warm_starts_keep_the_number_of_rates():
    X, y, task = sinusoids()
    reg = MAMLRegressor(
        update_rule="per-layer-per-step", steps=2, max_iter=5, warm_start=True, random_state=0
    ).fit(X, y, groups=task)
    reg.set_params(steps=4).fit(X, y, groups=task)
    assert {tuple(r.shape) for r in reg.net_.module_.rule.values()} == {(2,)}
    reg.set_params(warm_start=False).fit(X, y, groups=task)
    assert {tuple(r.shape) for r in reg.net_.module_.rule.values()} == {(4,)}
    fixed = MAMLRegressor(
        update_rule="per-layer-per-step", update_rule__n_steps=1, max_iter=2, random_state=0
    ).fit(X, y, groups=task)
    assert {tuple(r.shape) for r in fixed.net_.module_.rule.values()} == {(1,)}


@pytest.mark.parametrize(
    ("rule", "changed"), [("per-layer-per-step", {"n_steps": 3}), ("meta-sgd", {"per": "tensor"})]
)
def test_a_fit_cannot_go_on_with_other_rates(rule, changed):
    X, y, task = sinusoids()
    reg = MAMLRegressor(update_rule=rule, steps=2, max_iter=2, warm_start=True, random_state=0)
    reg.fit(X, y, groups=task).set_params(**{f"update_rule__{k}": v for k, v in changed.items()})
    with pytest.raises(ValueError, match="what update_rule learns was changed after fit"):
        reg.fit(X, y, groups=task)
    assert reg.n_iter_ == 2
    reg.adapt(X[:5], y[:5])  # the rates are those of the fit


# --- refusals


class SoftmaxAfterHead(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.head = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.head(x).tanh()


class InPlaceAfterHead(SoftmaxAfterHead):
    def forward(self, x):
        return self.head(x).tanh_()


class HeadTwice(SoftmaxAfterHead):
    def forward(self, x):
        self.head(x)
        return self.head(x)


class Affine(nn.Linear):
    """A linear layer that may do anything."""


def frozen_bias():
    module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    module[2].bias.requires_grad_(False)
    return module


RIDGE = {"update_rule": "ridge-head", "adapted": "head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_rule": "ridge-head"}, "nothing else adapts; got.*Set adapted='head'"),
        ({"update_rule": "ridge-head", "adapted": "body"}, "Set adapted='head'"),
        ({"update_rule": "ridge-head", "adapted": "*.bias"}, "Set adapted='head'"),
        ({**RIDGE, "module": frozen_bias()}, "freeze no part of that layer"),
        (
            {**RIDGE, "module": nn.Sequential(nn.Linear(1, 4), Affine(4, 1))},
            "are those of a Affine. Use a module that ends in a torch.nn.Linear",
        ),
        (
            {**RIDGE, "module": nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1), nn.Tanh())},
            "what Sequential returns is not the output of that layer",
        ),
        ({**RIDGE, "module": SoftmaxAfterHead}, "'head', but what SoftmaxAfterHead returns is not"),
        ({**RIDGE, "module": InPlaceAfterHead}, "what InPlaceAfterHead returns is not"),
        ({**RIDGE, "module": HeadTwice}, "what HeadTwice returns is not"),
        (
            {"update_rule": "logistic-head", "adapted": "head"},
            "use it with MAMLClassifier, or set update_rule='ridge-head'",
        ),
        ({**RIDGE, "update_rule__lam": 0.0}, "lam of the update rule RidgeHead must be positive"),
        ({**RIDGE, "update_rule__lamb": 1.0}, r"got the options \['lamb'\]; it takes \['lam'\]"),
        ({"update_rule": LogisticHead(newton_steps=0)}, "newton_steps=0; expected a positive int"),
        ({"update_rule": PerLayerPerStep(n_steps=0)}, "n_steps=0; expected a positive int, or"),
        ({"update_rule": PerLayerPerStep(n_steps=1.5)}, "n_steps=1.5; expected a positive int"),
        ({"update_rule": Momentum(momentum=1.0)}, "momentum of the update rule Momentum must be"),
        ({"update_rule": Momentum(momentum=-0.1)}, "at least 0 and less than 1; got -0.1"),
        ({"update_rule": Adam(beta1=1.0)}, "beta1 of the update rule Adam"),
        ({"update_rule": Adam(beta2=1.0)}, "beta2 of the update rule Adam"),
        (
            {"update_rule": Adam(eps=0.0)},
            "eps of the update rule Adam must be positive and finite; got 0.0",
        ),
        *(
            ({"update_rule": rule, "update_rule__max_grad_norm": -1.0}, "max_grad_norm of the up")
            for rule in UPDATE_RULES
            if not rule.endswith("head")
        ),
        *(
            ({"update_rule": rule, "update_rule__max_grad_norm": "1"}, "max_grad_norm of.*got '1'")
            for rule in ("sgd", "momentum")
        ),
        ({"update_rule": SGD(max_grad_norm="1")}, "max_grad_norm of the update rule.*got '1'"),
        ({"update_rule": Momentum(momentum=None)}, "momentum of the update rule.*got None"),
        ({"update_rule": Adam(eps=np.inf)}, "eps of the update rule Adam.*finite; got inf"),
        ({**RIDGE, "update_rule": RidgeHead(lam=None)}, "lam of the update rule.*got None"),
        ({**RIDGE, "update_rule__lam": np.inf}, "lam of the update rule.*finite; got inf"),
        ({"update_rule": "newton"}, re.escape(str(sorted(UPDATE_RULES)))),
    ],
    ids=str,
)
def test_fit_refuses_what_cannot_work(options, message):
    X, y, task = sinusoids(4)
    with pytest.raises(ValueError, match=message):
        MAMLRegressor(max_iter=1, **options).fit(X, y, groups=task)


@pytest.mark.parametrize("meta_gradient", ["implicit", "reptile"])
def test_heads_refuse_meta_gradients_that_are_about_steps(meta_gradient):
    X, y, task = sinusoids(4)
    reg = MAMLRegressor(meta_gradient=meta_gradient, max_iter=1, **RIDGE)
    with pytest.raises(ValueError, match=r"takes no gradient steps.*meta_gradient='second-order'"):
        reg.fit(X, y, groups=task)


class AllSteps(MetaGradient):
    """The mean of the query losses after each step."""

    order = 2

    def loss_and_grad(self, meta_params, problem):
        def loss(meta):
            outcomes = []
            problem.adapt(meta, 2, lambda params: outcomes.append(problem.query_loss(params)))
            assert len(outcomes) == problem.steps
            return sum(value for value, _ in outcomes) / len(outcomes), outcomes[-1][1]

        return problem.value_and_grad(loss, meta_params)


@pytest.mark.parametrize("rung", RUNGS)
def test_meta_gradients_may_look_at_every_step_of_a_head(rung):
    module, batch, rule = make_mlp(), make_batch("ragged"), RidgeHead()
    params = make_meta_params(module, rule, adapted="head")
    engine = make_engine(module, rule=rule, rung=rung, adapted="head")
    expected = engine.meta_step(params, batch, alpha=0.1, steps=3)
    engine.spec.meta_gradient = AllSteps()
    assert_same(engine.meta_step(params, batch, alpha=0.1, steps=3).grads, expected.grads)


def test_parameters_of_rules_are_searched():
    X, y, task = sinusoids(6)
    for rule, key in (("momentum", "momentum"), ("ridge-head", "lam")):
        reg = MAMLRegressor(max_iter=3, random_state=0, **REGRESSORS[rule])
        grid = {f"update_rule__{key}": [0.1, 0.5]}
        with sklearn.config_context(enable_metadata_routing=True):
            search = GridSearchCV(reg, grid, cv=GroupKFold(2)).fit(X, y, groups=task)
        scores = search.cv_results_["mean_test_score"]
        assert scores[0] != scores[1]
        assert search.best_estimator_.get_params()[f"update_rule__{key}"] in (0.1, 0.5)


def test_few_shot_estimators_solve_for_the_head_of_their_prior():
    X, y, task = sinusoids()
    prior = MAMLRegressor(max_iter=3, random_state=0, **RIDGE).fit(X, y, groups=task)
    few = FewShotRegressor(prior).fit(X[:10], y[:10])
    assert few.predict(X[:20]).tobytes() == prior.adapt(X[:10], y[:10]).predict(X[:20]).tobytes()


def test_a_head_may_be_the_whole_network_and_outputs_may_be_views():
    class Flat(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.head = nn.Linear(in_features, out_features)

        def forward(self, x):
            return self.head(x).squeeze(1)

    X, y, task = sinusoids()
    for module in (nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), Flat):
        reg = MAMLRegressor(module=module, max_iter=3, n_shots=10, random_state=0, **RIDGE)
        reg.fit(X, y, groups=task).adapt(X[:20], y[:20])
        lam = torch.exp(reg.net_.module_.rule["lam"].detach()).item()
        other = Ridge(alpha=lam).fit(X[:20], y[:20])
        np.testing.assert_allclose(reg.predict(X), other.predict(X), rtol=1e-8, atol=1e-10)


def test_heads_save_no_graph_of_steps():
    X, y, task = sinusoids()
    parts = [
        MAMLRegressor(max_iter=5, random_state=0, engine__checkpoint_steps=on, **RIDGE)
        .fit(X, y, groups=task)
        .adapt(X[:20], y[:20])
        .predict(X)
        for on in (False, True)
    ]
    assert parts[0].tobytes() == parts[1].tobytes()
