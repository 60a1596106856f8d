"""Meta-gradients are the ones the papers write down, in float64 and on every rung of the engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import (
    SIZES,
    Number,
    descend,
    finite_differences,
    flat,
    make_batch,
    make_engine,
    make_meta_params,
    make_mlp,
    number_batch,
    parts_of,
    quadratic,
    relative_error,
)
from torch import nn

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.losses import cross_entropy_rows
from sklearn_maml.update_rules import SGD, MetaSGD

RUNGS = ["loop", "vmap", "stacked"]


# --- hand-derived cases


# theta = 1, support loss theta^2, query loss (theta - 1/2)^2 and alpha = 0.1, so that a step
# multiplies theta by 0.8: theta_s = 0.8^s; the query gradient there is 2 (0.8^s - 0.5), and
# d theta_s / d theta = 0.8^s.
@pytest.mark.parametrize(
    ("steps", "first_order", "second_order"),
    [
        (1, 0.6, 0.48),
        (3, 0.024, 0.012288),
        (10, -0.7852516352, -0.08431575230786306048),
    ],
)
@pytest.mark.parametrize("rung", ["loop", "vmap"])
def test_one_parameter_by_hand(rung, steps, first_order, second_order):
    module = Number(1.0)
    batch = number_batch(0.0, 0.5)
    meta_params = {"module.value": module.value.detach()}
    for order, expected in ((1, first_order), (2, second_order)):
        # two equal tasks: vmap leaves a single task to the loop
        twice = EpisodeBatch(*(s.take(np.array([0, 0])) for s in (batch.support, batch.query)))
        step = make_engine(module, rung=rung, order=order).meta_step(
            meta_params, twice, alpha=0.1, steps=steps
        )
        assert step.grads["module.value"].item() == pytest.approx(expected, rel=1e-12)
        assert step.losses.tolist() == pytest.approx([(0.8**steps - 0.5) ** 2] * 2, rel=1e-12)
        assert step.outputs.flatten().tolist() == pytest.approx([0.8**steps] * 2, rel=1e-12)


def test_clipped_step_by_hand():
    # The gradient 2 is clipped to 1: theta_1 = 0.9, whatever theta is nearby, so that
    # d theta_1 / d theta = 1 and the meta-gradient is 2 (0.9 - 0.5).
    module = Number(1.0)
    engine = make_engine(module, rule=SGD(max_grad_norm=1.0))
    step = engine.meta_step(
        {"module.value": module.value.detach()}, number_batch(0.0, 0.5), alpha=0.1, steps=1
    )
    assert step.grads["module.value"].item() == pytest.approx(0.8, rel=1e-10)
    assert step.outputs.item() == pytest.approx(0.9, rel=1e-10)


@pytest.mark.parametrize(("order", "initialisation"), [(1, 0.6), (2, 0.48)])
def test_learned_rate_by_hand(order, initialisation):
    # theta_1 = theta - 0.1 exp(r) 2 theta. At r = 0: d loss / d r = 0.6 * (-0.1 * 2) = -0.12 for
    # both orders, because the rate itself is no part of the inner gradient.
    module = Number(1.0)
    engine = make_engine(module, rule=MetaSGD(), order=order)
    meta_params = {
        "module.value": module.value.detach(),
        "rule.value": torch.zeros(1, 1, dtype=torch.float64),
    }
    step = engine.meta_step(meta_params, number_batch(0.0, 0.5), alpha=0.1, steps=1)
    assert step.grads["rule.value"].item() == pytest.approx(-0.12, rel=1e-12)
    assert step.grads["module.value"].item() == pytest.approx(initialisation, rel=1e-12)


def linear_by_hand(batch, theta, alpha, steps):
    """Closed form for linear regression without intercept.

    The gradient of the query loss at the adapted parameters is pulled back by M^steps, where a
    step of gradient A theta - b multiplies theta by M = I - alpha A.
    """
    first, second, losses = [], [], []
    for j in range(len(batch)):
        (Xs, ys), (Xq, yq) = parts_of(batch, j)
        A, b = quadratic(Xs, ys)
        C, d = quadratic(Xq, yq)
        adapted = descend(A, b, theta, alpha, steps)
        gradient = C @ adapted - d
        first.append(gradient)
        M = np.eye(len(theta)) - alpha * A
        second.append(np.linalg.matrix_power(M, steps) @ gradient)
        losses.append(np.mean((Xq @ adapted - yq) ** 2))
    return np.mean(first, axis=0), np.mean(second, axis=0), np.array(losses)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("rung", RUNGS)
def test_linear_regression_matches_its_closed_form(rung, steps, sizes):
    batch = make_batch(sizes, (3,), n_outputs=1)
    theta = np.array([0.7, -1.3, 0.4])
    module = nn.Linear(3, 1, bias=False).double()
    meta_params = {"module.weight": torch.tensor(theta[None])}
    first, second, losses = linear_by_hand(batch, theta, 0.1, steps)
    for order, expected in ((1, first), (2, second)):
        engine = make_engine(module, rung=rung, order=order)
        step = engine.meta_step(meta_params, batch, alpha=0.1, steps=steps)
        assert engine.rung == rung
        np.testing.assert_allclose(step.grads["module.weight"][0], expected, rtol=1e-11)
        np.testing.assert_allclose(step.losses, losses, rtol=1e-11)
    # negative control: the data tells the orders apart
    assert np.abs(first - second).max() > 0.01 * np.abs(second).max()


# --- finite differences


def test_second_order_of_the_cross_entropy_matches_finite_differences():
    module, batch = make_mlp(n_outputs=3), make_batch(n_outputs=3, n_classes=3)
    meta_params = make_meta_params(module)
    engine = make_engine(module, rung="stacked", row_loss=cross_entropy_rows)
    numeric = finite_differences(engine, meta_params, batch, alpha=0.5, steps=3)
    exact = engine.meta_step(meta_params, batch, alpha=0.5, steps=3).grads
    assert relative_error(flat(exact), flat(numeric)) <= 1e-6


def test_first_order_is_not_the_gradient_of_the_query_loss():
    """Negative control for the finite differences: they tell the two meta-gradients apart."""
    module, batch = make_mlp(), make_batch()
    meta_params = make_meta_params(module)
    engine = make_engine(module, rung="stacked", order=1)
    numeric = finite_differences(engine, meta_params, batch, alpha=0.3, steps=3)
    first = engine.meta_step(meta_params, batch, alpha=0.3, steps=3).grads
    assert relative_error(flat(first), flat(numeric)) > 1e-2


# --- first and second order


@pytest.mark.parametrize("rung", RUNGS)
def test_first_order_is_the_query_gradient_at_the_adapted_parameters(rung):
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module)
    first = make_engine(module, rung=rung, order=1)
    second = make_engine(module, rung=rung, order=2)
    adapted = first.adapt(meta_params, batch.support, alpha=0.3, steps=3)
    expected = {name: 0.0 for name in meta_params}
    for j in range(len(batch)):
        query = batch.query.task(j)
        leaves = {n: p[j].clone().requires_grad_() for n, p in adapted.params.items()}
        output = torch.func.functional_call(module, leaves, (query.X,))
        grads = torch.autograd.grad((output - query.y).square().mean(), list(leaves.values()))
        for name, g in zip(leaves, grads, strict=True):
            expected[f"module.{name}"] = expected[f"module.{name}"] + g / len(batch)
    step = first.meta_step(meta_params, batch, alpha=0.3, steps=3)
    for name, g in expected.items():
        torch.testing.assert_close(step.grads[name], g, rtol=1e-10, atol=1e-14)
    # negative control: several well-known implementations of MAML are first-order unawares
    other = second.meta_step(meta_params, batch, alpha=0.3, steps=3)
    assert relative_error(flat(other.grads), flat(step.grads)) > 1e-2
    torch.testing.assert_close(other.losses, step.losses, rtol=1e-12, atol=0)


def test_orders_agree_where_the_support_loss_has_no_curvature():
    # The gradient of a linear loss does not depend on the parameters: nothing to differentiate.
    module, batch = make_mlp(), make_batch()
    meta_params = make_meta_params(module)
    grads = [
        make_engine(nn.Linear(2, 2).double(), order=order, row_loss=lambda out, y: out.sum(-1))
        .meta_step(
            {
                "module.weight": meta_params["module.0.weight"][:2],
                "module.bias": meta_params["module.0.bias"][:2],
            },
            batch,
            alpha=0.3,
            steps=3,
        )
        .grads
        for order in (1, 2)
    ]
    torch.testing.assert_close(flat(grads[0]), flat(grads[1]), rtol=1e-12, atol=0)


# --- limits


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", [SGD(), MetaSGD()], ids=repr)
@pytest.mark.parametrize(("alpha", "steps"), [(0.3, 0), (0.0, 3), (0.0, 0)])
def test_without_inner_steps_it_is_pooled_training_on_the_queries(rung, order, rule, alpha, steps):
    module, batch = make_mlp(), make_batch("equal")
    meta_params = make_meta_params(module, rule)
    X, y = (torch.cat([part[j] for j in range(3)]) for part in (batch.query.X, batch.query.y))
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad((module(X) - y).square().mean(), list(module.parameters()))
    pooled = dict(zip(names, grads, strict=True))
    engine = make_engine(module, rung=rung, order=order, rule=rule)
    step = engine.meta_step(meta_params, batch, alpha=alpha, steps=steps)
    for name in names:
        torch.testing.assert_close(
            step.grads[f"module.{name}"], pooled[name], rtol=1e-11, atol=1e-14
        )
    for name, g in step.grads.items():
        assert not name.startswith("rule.") or not g.any()
    # negative control: with a step and a rate it is something else
    moved = engine.meta_step(meta_params, batch, alpha=0.3, steps=1)
    for name in names:
        assert relative_error(moved.grads[f"module.{name}"], pooled[name]) > 1e-3


def test_tasks_count_equally_whatever_their_number_of_rows():
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module)
    engine = make_engine(module, rung="stacked")
    whole = engine.meta_step(meta_params, batch, alpha=0.3, steps=2)
    alone = [
        engine.meta_step(
            meta_params,
            EpisodeBatch(batch.support.take(np.array([j])), batch.query.take(np.array([j]))),
            alpha=0.3,
            steps=2,
        )
        for j in range(len(batch))
    ]
    mean = torch.stack([flat(step.grads) for step in alone]).mean(0)
    torch.testing.assert_close(flat(whole.grads), mean, rtol=1e-11, atol=1e-14)
    losses = torch.cat([step.losses for step in alone])
    torch.testing.assert_close(whole.losses, losses, rtol=1e-11, atol=1e-14)


# --- which parameters adapt


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("head", ["2.weight", "2.bias"]),
        ("body", ["0.weight", "0.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["0.bias", "2.weight"], ["0.bias", "2.weight"]),
    ],
)
@pytest.mark.parametrize("rung", RUNGS)
def test_only_the_adapted_parameters_move(rung, adapted, expected):
    module, batch = make_mlp(), make_batch("ragged")
    names = adapted_names(module, adapted)
    assert names == expected
    meta_params = make_meta_params(module)
    engine = make_engine(module, rung=rung, adapted=names)
    result = engine.adapt(meta_params, batch.support, alpha=0.3, steps=3)
    assert sorted(result.params) == sorted(names)
    for name, initial in ((n, p.detach()) for n, p in module.named_parameters()):
        if name in names:
            assert result.params[name].shape == (3, *initial.shape)
            assert (result.params[name] != initial).any(-1).reshape(3, -1).all()
        else:
            assert torch.equal(result.shared[name], initial)
    # the outer loop trains what does not adapt as well
    step = engine.meta_step(meta_params, batch, alpha=0.3, steps=3)
    assert all(g.any() for g in step.grads.values())


def test_adapting_leaves_the_meta_parameters_as_they_were():
    module, batch = make_mlp(), make_batch("ragged")
    for rule in (SGD(), MetaSGD()):
        meta_params = make_meta_params(module, rule)
        before = {name: p.clone() for name, p in meta_params.items()}
        for rung in RUNGS:
            engine = make_engine(module, rung=rung, rule=rule)
            engine.meta_step(meta_params, batch, alpha=0.3, steps=2)
            engine.evaluate(meta_params, batch, alpha=0.3, steps=2)
        assert all(torch.equal(p, before[name]) for name, p in meta_params.items())
        assert not any(p.requires_grad for p in meta_params.values())


def test_clipping_bounds_the_step_of_each_task():
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module)
    for rung in RUNGS:
        lengths = {}
        for clip in (None, 0.2, 1e6):
            engine = make_engine(module, rung=rung, rule=SGD(max_grad_norm=clip))
            params = engine.adapt(meta_params, batch.support, alpha=0.3, steps=1).params
            moved = [(p - meta_params[f"module.{n}"]).flatten(1) for n, p in params.items()]
            lengths[clip] = torch.cat(moved, 1).norm(dim=1)
        assert (lengths[None] > 0.3 * 0.2).all()  # there is something to clip in every task
        torch.testing.assert_close(
            lengths[0.2], torch.full((3,), 0.06, dtype=torch.float64), rtol=1e-9, atol=0
        )
        torch.testing.assert_close(lengths[1e6], lengths[None], rtol=1e-12, atol=0)


def test_clipping_a_zero_gradient_has_finite_derivatives():
    # The support set is fitted exactly, so that the inner gradient is 0.
    module = nn.Linear(1, 1, bias=False).double()
    weight = torch.tensor([[2.0]], dtype=torch.float64)
    X = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    batch = EpisodeBatch(Rows(X, 2 * X), Rows(X, 3 * X))
    engine = make_engine(module, rule=SGD(max_grad_norm=1.0))
    step = engine.meta_step({"module.weight": weight}, batch, alpha=0.01, steps=1)
    # A = 2/n sum x^2 = 10, so the step is unclipped near the optimum: M = 1 - 0.1, and the query
    # gradient is 10 (2 - 3)
    assert math.isclose(step.grads["module.weight"].item(), 0.9 * -10, rel_tol=1e-9)
