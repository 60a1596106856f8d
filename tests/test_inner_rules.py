"""Inner rules are the ones the papers write down, in float64 and on every rung of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_maml.engine import Engine, cross_entropy_rows, rate_key, squared_error_rows
from sklearn_maml.episodes import EpisodeBatch, Rows, pad_rows
from sklearn_maml.meta_gradients import FirstOrder, SecondOrder
from sklearn_maml.modules import adapted_names
from sklearn_maml.native import NativeUnavailableError, _compiler
from sklearn_maml.update_rules import (
    SGD,
    Adam,
    LearnedAlpha,
    MetaSGD,
    Momentum,
    PerLayerPerStep,
)

RUNGS = ["loop", "vmap", "stacked"]
SIZES = {"equal": ([5, 5, 5], [4, 4, 4]), "ragged": ([5, 3, 7], [4, 6, 2])}
STEPS = 3
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


def make_rows(rng, sizes, n_features, n_outputs, classes, weighted):
    counts = np.array(sizes)
    total = int(counts.sum())
    X = rng.normal(size=(total, n_features))
    y = rng.integers(0, n_outputs, total) if classes else rng.normal(size=(total, n_outputs))
    weight = rng.uniform(0.5, 2.0, total) if weighted else None
    return pad_rows(X, y, np.arange(total), counts, weight)


def make_batch(sizes="equal", n_features=2, n_outputs=2, classes=False, weighted=False, seed=0):
    rng = np.random.default_rng(seed)
    return EpisodeBatch(
        *(make_rows(rng, part, n_features, n_outputs, classes, weighted) for part in SIZES[sizes])
    )


def make_mlp(n_features=2, n_outputs=2, width=4, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, n_outputs, bias=bias)]
    return nn.Sequential(*layers).double()


def make_engine(module, rule, *, rung="loop", order=2, adapted="all", classes=False, **options):
    return Engine(
        module,
        row_loss=cross_entropy_rows if classes else squared_error_rows,
        rule=rule,
        meta_gradient={1: FirstOrder(), 2: SecondOrder()}[order],
        adapted=adapted_names(module, adapted),
        rung=rung,
        **options,
    )


def make_meta_params(module, rule, *, adapted="all", steps=STEPS, classes=False):
    """Meta-parameters with what the rule learns away from its start."""
    params = {n: p.detach() for n, p in module.named_parameters()}
    fast = {n: params[n] for n in adapted_names(module, adapted)}
    generator = torch.Generator().manual_seed(1)
    rates = {
        f"rule.{rate_key(n)}": r + 0.3 * torch.randn(r.shape, generator=generator, dtype=r.dtype)
        for n, r in rule.initial_rates(fast, steps=steps, classification=classes).items()
    }
    return {**{f"module.{n}": p for n, p in params.items()}, **rates}


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def assert_same(got, expected, tolerance=1e-9):
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=1e-2 * tolerance)


def finite_differences(engine, meta_params, batch, *, alpha, steps, h=1e-5):
    """Central differences of the mean evaluated loss in every single meta-parameter."""

    def loss(params):
        return engine.evaluate(params, batch, alpha=alpha, steps=steps)[0].mean().item()

    grads = {}
    for name, p in meta_params.items():
        grad = torch.zeros_like(p).reshape(-1)
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = p.clone().reshape(-1)
                moved[i] += sign * h
                ends.append(loss({**meta_params, name: moved.reshape(p.shape)}))
            grad[i] = (ends[0] - ends[1]) / (2 * h)
        grads[name] = grad.reshape(p.shape)
    return grads


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


def plain_tasks(batch):
    return [
        (s.X, s.y, q.X, q.y)
        for s, q in ((batch.support.task(j), batch.query.task(j)) for j in range(len(batch)))
    ]


def plain_loop(rule, meta_params, batch, *, alpha, steps, fast, second_order, classes=False):
    """Meta-gradient for a tanh network with one hidden layer, as a loop over tasks."""
    leaves = {name: p.clone().requires_grad_() for name, p in meta_params.items()}
    learned = {
        n.removeprefix("rule.").replace("__", "."): p for n, p in leaves.items() if "rule." in n
    }
    total, adapted_to = 0.0, []

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
        total = total + loss(theta, X_query, y_query)
        adapted_to.append({n: theta[n].detach() for n in fast})
    grads = torch.autograd.grad(
        total / len(batch), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True)), adapted_to


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_gradient_rules_agree_with_a_plain_loop(rule, order, rung):
    settings = [("all", False, "ragged"), ("head", True, "equal"), ("body", False, "ragged")]
    for adapted, classes, sizes in settings:
        module, batch = make_mlp(n_outputs=3), make_batch(sizes, n_outputs=3, classes=classes)
        engine = make_engine(module, rule, rung=rung, order=order, adapted=adapted, classes=classes)
        meta_params = make_meta_params(module, rule, adapted=adapted)
        # more steps than have rates
        step = engine.meta_step(meta_params, batch, alpha=0.2, steps=STEPS + 1)
        names = adapted_names(module, adapted)
        grads, adapted_to = plain_loop(
            rule, meta_params, batch, alpha=0.2, steps=STEPS + 1, fast=names,
            second_order=order == 2, classes=classes,
        )  # fmt: skip
        assert engine.rung == rung
        assert_same(step.grads, grads)
        params = engine.adapt(meta_params, batch.support, alpha=0.2, steps=STEPS + 1).params
        assert_same(params, {n: torch.stack([task[n] for task in adapted_to]) for n in names})


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_second_order_gradients_are_the_derivative_of_the_evaluated_loss(rule, rung):
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module, rule)
    assert_is_the_derivative(make_engine(module, rule, rung=rung), meta_params, batch)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_first_order_gradients_are_not(rule):
    """Negative control of the finite differences."""
    module, batch = make_mlp(), make_batch("ragged")
    engine, meta_params = make_engine(module, rule, order=1), make_meta_params(module, rule)
    with pytest.raises(AssertionError):
        assert_is_the_derivative(engine, meta_params, batch)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_rules_that_learn_nothing_unusual_start_as_gradient_descent_and_others_differ(rule):
    module, batch = make_mlp(), make_batch()
    start = {f"module.{n}": p.detach() for n, p in module.named_parameters()}
    fast = {n: p.detach() for n, p in module.named_parameters()}
    learned = {f"rule.{rate_key(n)}": r for n, r in rule.initial_rates(fast, steps=STEPS).items()}

    def adapted(rule, params):
        engine = make_engine(module, rule)
        return flat(engine.adapt(params, batch.support, alpha=0.2, steps=STEPS).params)

    descent = adapted(SGD(max_grad_norm=rule.max_grad_norm), start)
    got = adapted(rule, {**start, **learned})
    if learned:
        assert torch.equal(got, descent)
        got = adapted(rule, make_meta_params(module, rule))
    assert (got - descent).abs().max() > 1e-2


# --- by hand


class Number(nn.Module):
    """One parameter, which is the prediction for every row."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))

    def forward(self, x):
        return x * self.value


def number_batch(support_target, query_target):
    def rows(target):
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        return Rows(one, target * one)

    return EpisodeBatch(rows(support_target), rows(query_target))


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
    engine = make_engine(module, rule)
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
    engine = make_engine(module, rule)
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
    engine = make_engine(module, Adam(beta1=0.8, beta2=0.9))
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
    engine = make_engine(module, rule, rung=rung)
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
        make_engine(module, rule, rung=rung, checkpoint_steps=on).meta_step(
            meta_params, batch, alpha=0.2, steps=4
        )
        for on in (False, True)
    )
    assert_same(recomputed.grads, plain.grads, 1e-11)
    torch.testing.assert_close(recomputed.losses, plain.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_traced_steps_are_those_of_the_loop(rule):
    module, batch = make_mlp(), make_batch("ragged")
    meta_params = make_meta_params(module, rule)
    traced, loop = (make_engine(module, rule, rung=rung) for rung in ("traced", "loop"))
    traced.tracer.updates_left = 10
    expected = loop.meta_step(meta_params, batch, alpha=0.2, steps=STEPS)
    for _ in range(3):
        assert_same(
            traced.meta_step(meta_params, batch, alpha=0.2, steps=STEPS).grads, expected.grads
        )
    assert traced.tracer.n_traced == 1


def has_compiler():
    try:
        _compiler()
    except NativeUnavailableError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
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
                module, rule, rung=rung, order=order, adapted=adapted,
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


@pytest.mark.parametrize("rule", [Momentum(), Adam(), LearnedAlpha(max_grad_norm=1.0)], ids=repr)
def test_compiled_kernels_are_not_for_other_rules(rule):
    with pytest.raises(ValueError, match="do not cover"):
        make_engine(make_mlp(), rule, rung="native")
