"""The compiled kernels give the numbers of the plain loop, or the engine does without them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import pickle
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import sklearn
import torch
from builders import make_engine, make_meta_params
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from test_engine import Tied
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, adapt, native
from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine import Engine
from sklearn_maml.engine.rungs import base
from sklearn_maml.engine.rungs import native as climbing_rung
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.meta_gradients import SecondOrder
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets import (
    AbsoluteError,
    BinaryCrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
)
from sklearn_maml.targets.losses import cross_entropy_rows, squared_error_rows
from sklearn_maml.update_rules import SGD, MetaSGD, Momentum

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))

pytestmark = pytest.mark.skipif(
    not native.instruction_sets() and not HAS_COMPILER,
    reason="the package was installed where there was no C++ compiler",
)

# of float64; float32 differs by rounding, which curvature amplifies
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-4}


# --- helpers


def mlp(sizes, activation=nn.Tanh, *, bias=True, dtype=torch.float64, seed=0):
    """Build a perceptron whose biases are not small."""
    layers = []
    for n_inputs, n_outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(n_inputs, n_outputs, bias=bias), activation()]
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(*layers[:-1]).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(draw / (p.shape[1] ** 0.5 if p.ndim == 2 else 2))
    return module


def make_rows(rng, n_tasks, width, sizes, classes, dtype, *, ragged=False, weighted=False):
    X = torch.as_tensor(rng.normal(size=(n_tasks, width, sizes[0]))).to(dtype)
    if classes:
        y = torch.as_tensor(rng.integers(0, sizes[-1], (n_tasks, width)))
    else:
        y = torch.as_tensor(rng.normal(size=(n_tasks, width, sizes[-1]))).to(dtype)
    if not ragged and not weighted:
        return Rows(X, y)
    lengths = np.full(n_tasks, width)
    if ragged:
        lengths = rng.integers(1, width + 1, n_tasks)
        lengths[-1] = width
    weight = rng.uniform(0.5, 2, (n_tasks, width)) if weighted else np.ones((n_tasks, width))
    weight = weight * (np.arange(width) < lengths[:, None])
    weight = torch.as_tensor(weight / weight.sum(1, keepdims=True)).to(dtype)
    return Rows(X, y, weight, lengths if ragged else None)


def make_batch(sizes, n_tasks=5, *, classes=False, dtype=torch.float64, widths=(7, 9), **options):
    rng = np.random.default_rng(0)
    return EpisodeBatch(
        *(make_rows(rng, n_tasks, w, sizes, classes, dtype, **options) for w in widths)
    )


def everything(module, batch, rung, *, alpha=0.2, steps=3, **options):
    """Run the three entry points."""
    runner = make_engine(module, rung, **options)
    assert runner.rung == rung
    params = make_meta_params(module, runner.spec.rule, runner.spec.parts.adapted)
    step = runner.meta_step(params, batch, alpha=alpha, steps=steps)
    adapted = runner.adapt(params, batch.support, alpha=alpha, steps=steps)
    predicted = runner.predict(adapted, batch.query)
    return {
        "losses": step.losses,
        "outputs": batch.query.real(step.outputs),
        "adapted": adapted.params,
        "predicted": batch.query.real(predicted),
        "grads": step.grads,
    }


def assert_same(got, expected, tolerance, where=""):
    """Compare tensors by norm."""
    if isinstance(expected, dict):
        assert sorted(got) == sorted(expected), where
        for name, value in expected.items():
            assert_same(got[name], value, tolerance, f"{where} {name}")
        return
    assert got.shape == expected.shape, where
    assert got.dtype == expected.dtype, where
    assert torch.isfinite(expected).all(), where
    error = torch.linalg.vector_norm(got.detach() - expected.detach())
    # of very small gradients, the rounding of what they are sums of counts
    scale = torch.linalg.vector_norm(expected.detach()) + 1e-3 * expected.numel() ** 0.5
    assert float(error / scale) <= tolerance, where


def assert_equals_loop(module, batch, **options):
    tolerance = TOLERANCES[batch.query.X.dtype]
    got, expected = (everything(module, batch, rung, **options) for rung in ("native", "loop"))
    assert_same(got, expected, tolerance)


def assert_bits(got, expected):
    if isinstance(expected, dict):
        assert sorted(got) == sorted(expected)
        for name, value in expected.items():
            assert_bits(got[name], value)
        return
    assert torch.equal(got, expected)


@pytest.fixture(params=native.instruction_sets())
def instructions(request, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, request.param)
    return request.param


# --- equal to the loop

ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ELU": lambda: nn.ELU(0.7),
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Softplus": nn.Softplus,
    "Softsign": nn.Softsign,
}


def test_every_activation_of_the_kernels_is_tested():
    assert {build().__class__ for build in ACTIVATIONS.values()} == set(native._ACTIVATIONS)


@pytest.mark.parametrize("classes", [False, True], ids=["squared error", "cross-entropy"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype, classes):
    sizes = (3, 17, 5, 4)
    module = mlp(sizes, ACTIVATIONS[name], dtype=dtype)
    batch = make_batch(sizes, classes=classes, dtype=dtype, ragged=True)
    assert_equals_loop(module, batch, classes=classes)


LOSSES = [
    (AbsoluteError(), lambda y: y),
    (Huber(0.5), lambda y: y),
    (Quantile(0.9), lambda y: y),
    (Poisson(), lambda y: y.exp().floor()),
    (Gamma(), torch.exp),
    (BinaryCrossEntropy(), lambda y: (y > 0).to(y)),
]


@pytest.mark.parametrize("rows", [{}, {"ragged": True, "weighted": True}], ids=["plain", "both"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("loss", "made"), LOSSES, ids=lambda v: type(v).__name__)
def test_losses(loss, made, dtype, rows, instructions):
    batch = make_batch((3, 10, 3), dtype=dtype, **rows)
    for part in (batch.support, batch.query):
        part.y.copy_(made(part.y))
    assert_equals_loop(mlp((3, 10, 3), dtype=dtype), batch, row_loss=loss.rows)


def test_every_loss_of_the_kernels_is_tested():
    tested = {getattr(loss.rows, "__func__", loss.rows) for loss, _ in LOSSES}
    assert tested | {squared_error_rows, cross_entropy_rows} == set(climbing_rung.LOSSES)


def test_a_loss_that_is_computed_otherwise_is_not_of_the_kernels():
    class Twice(Huber):
        def rows(self, output, y):
            return 2 * super().rows(output, y)

    spec = make_engine(mlp((3, 4, 2)), row_loss=Twice().rows).spec
    assert climbing_rung.Native.refuses(spec) is not None
    assert (
        climbing_rung.Native.refuses(make_engine(mlp((3, 4, 2)), row_loss=Huber().rows).spec)
        is None
    )


def test_an_activation_after_the_last_layer():
    for activation in ACTIVATIONS.values():
        module = mlp((3, 5, 2))
        module.append(activation())
        assert_equals_loop(module, make_batch((3, 5, 2)))


def test_large_inputs_of_activations():
    """Where exponentials overflow, and softplus is linear."""
    for name, activation in ACTIVATIONS.items():
        module = mlp((3, 6, 2), activation)
        batch = make_batch((3, 6, 2))
        for rows in (batch.support, batch.query):
            rows.X.mul_(300.0)
        got, expected = (
            everything(module, batch, rung, steps=1, alpha=1e-7) for rung in ("native", "loop")
        )
        assert_same(got, expected, 1e-9, name)


# whose values are near 0 on one side, and how many units of rounding they are off there
TAILS = {"Tanh": 4, "Sigmoid": 4, "Softplus": 4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_of_activations_are_exact_to_rounding(name, dtype, instructions):
    """Exponentials and the like are the kernels' own; torch's in float64 are the measure."""
    module = nn.Sequential(nn.Linear(1, 1, bias=False), ACTIVATIONS[name]()).to(dtype)
    powers = torch.logspace(-20, 3, 500, dtype=dtype)
    zero = powers.new_zeros(1)
    z = torch.cat([powers, -powers, zero, -zero, torch.linspace(-40, 40, 5001, dtype=dtype)])
    params = {"0.weight": z.new_ones(1, 1)}
    predict = make_engine(module, "native").ladder.top.kernel.predict

    def kernels(z):
        return predict({}, params, Rows(z[None, :, None], z[None, :, None]))[0, :, 0]

    got, expected = kernels(z).double(), module[1](z.double())
    error = (got - expected).abs() / torch.finfo(dtype).eps
    assert float((error / (1 + expected.abs())).max()) <= 2
    near = expected.abs() > 1e-30
    if name in TAILS:
        assert float((error / expected.abs())[near].max()) <= TAILS[name]
    ends = torch.tensor([np.inf, -np.inf, np.nan], dtype=dtype)
    torch.testing.assert_close(kernels(ends).double(), module[1](ends.double()), equal_nan=True)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1),
        (5, 1),
        (3, 64),
        (1, 40, 40, 1),
        (3, 1, 3),
        (16, 16, 16),
        (17, 3, 100, 2),
        (100, 33, 16, 5),
        (2, 130, 7),
        (20, 9, 31, 8, 3),
    ],
    ids=str,
)
def test_depths_and_widths(sizes, dtype, bias):
    module = mlp(sizes, bias=bias, dtype=dtype)
    batch = make_batch(sizes, 3, dtype=dtype, widths=(5, 11))
    assert_equals_loop(module, batch, steps=2, alpha=0.05)


def test_some_layers_without_bias_and_without_activation():
    module = nn.Sequential(
        nn.Sequential(nn.Linear(3, 6, bias=False), nn.Identity()),
        nn.Linear(6, 5),
        nn.SiLU(),
        nn.Linear(5, 2, bias=False),
    ).double()
    assert_equals_loop(module, make_batch((3, 2)))
    assert_equals_loop(nn.Linear(3, 2).double(), make_batch((3, 2)))


OPTIONS = {
    "no steps": {"steps": 0},
    "one step": {"steps": 1},
    "five steps": {"steps": 5},
    "first order": {"order": 1},
    "head": {"adapted": "head"},
    "body": {"adapted": "body"},
    "head, first order": {"adapted": "head", "order": 1},
    "rates of weights": {"rule": MetaSGD()},
    "rates of tensors": {"rule": MetaSGD(per="tensor")},
    "rates, first order": {"rule": MetaSGD(), "order": 1},
    "rates, head": {"rule": MetaSGD(), "adapted": "head"},
    "rates, no steps": {"rule": MetaSGD(), "steps": 0},
    "recomputed": {"checkpoint_steps": True, "steps": 4},
    "recomputed, rates": {"checkpoint_steps": True, "rule": MetaSGD(per="tensor")},
    "recomputed, first order": {"checkpoint_steps": True, "order": 1},
    "clipped": {"rule": SGD(max_grad_norm=0.5)},
    "clipped to what some exceed": {"rule": SGD(max_grad_norm=1.5), "steps": 5},
    "clipped, first order": {"rule": SGD(max_grad_norm=0.5), "order": 1},
    "clipped, head": {"rule": SGD(max_grad_norm=0.2), "adapted": "head"},
    "clipped, rates": {"rule": MetaSGD(max_grad_norm=0.5)},
    "clipped, rates, body": {"rule": MetaSGD(max_grad_norm=0.2), "adapted": "body"},
    "clipped, recomputed": {"rule": SGD(max_grad_norm=0.5), "checkpoint_steps": True},
    "clipped, recomputed, rates": {
        "rule": MetaSGD(per="tensor", max_grad_norm=0.5),
        "checkpoint_steps": True,
    },
}
ROWS = {
    "equal": {},
    "ragged": {"ragged": True},
    "weighted": {"weighted": True},
    "both": {"ragged": True, "weighted": True},
}


@pytest.mark.parametrize("classes", [False, True], ids=["squared error", "cross-entropy"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, rows, classes):
    sizes = (3, 10, 6, 3)
    batch = make_batch(sizes, classes=classes, **ROWS[rows])
    assert_equals_loop(mlp(sizes), batch, classes=classes, **OPTIONS[options])


@pytest.mark.parametrize("sizes", [(80, 10, 6, 3), (70, 64, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_many_more_inputs_than_rows(options, sizes):
    """Steps are then taken in the space that a task's rows span."""
    # a rate at which steps do not diverge, as rounding errors would
    assert_wide_equals_loop(sizes, torch.float64, **{"alpha": 0.02, **OPTIONS[options]})


@pytest.mark.parametrize("options", ["five steps", "first order", "clipped, recomputed"])
def test_many_more_inputs_than_rows_in_float32(options, instructions):
    settings = {"alpha": 0.02, **OPTIONS[options]}
    assert_wide_equals_loop((80, 17, 3), torch.float32, **settings)
    assert_wide_equals_loop((80, 3), torch.float32, **settings)


def assert_wide_equals_loop(sizes, dtype, **options):
    batch = make_batch(sizes, 9, dtype=dtype, ragged=True, weighted=True)
    # rows that tell no more of the space
    batch.support.X[0, 1] = batch.support.X[0, 0]
    batch.query.X[1, 0] = 0
    batch.query.X[2, 0] = 2 * batch.support.X[2, 0]
    assert_equals_loop(mlp(sizes, dtype=dtype), batch, **options)


def test_steps_among_few_of_many_inputs_take_a_part_of_the_time():
    sizes = (800, 32, 1)
    module, batch = mlp(sizes, dtype=torch.float32), make_batch(sizes, 25, dtype=torch.float32)
    kernel = make_engine(module, "native")
    params = make_meta_params(module, kernel.spec.rule, kernel.spec.parts.adapted)
    uneven = {"0.weight": torch.linspace(0.09, 0.11, 800).expand(32, -1).contiguous()}
    even = {"0.weight": torch.full((32, 800), 0.1)}

    def seconds(rates):
        begun = time.process_time()
        kernel.ladder.top.kernel.meta_step(
            params, [rates], batch.support, batch.query, steps=5, second_order=True,
            rate_grads=False, recompute=False,
        )  # fmt: skip
        return time.process_time() - begun

    pairs = [(seconds(even), seconds(uneven)) for _ in range(9)]
    assert np.median([fast / slow for fast, slow in pairs]) < 0.6


@pytest.mark.parametrize("name", [name for name in OPTIONS if "clipped" in name])
def test_clipping_makes_a_difference(name):
    """Or the options above would not be about it."""
    sizes, options = (3, 10, 6, 3), dict(OPTIONS[name])
    module, batch = mlp(sizes), make_batch(sizes)
    clipped = everything(module, batch, "native", **options)["predicted"]
    options["rule"] = clone(options["rule"]).set_params(max_grad_norm=None)
    free = everything(module, batch, "native", **options)["predicted"]
    differs = (clipped - free).abs().flatten(1).amax(1) > 1e-6
    assert differs.any()
    assert differs.all() == (name != "clipped to what some exceed")


def test_options_in_float32():
    sizes = (3, 10, 6, 3)
    batch = make_batch(sizes, dtype=torch.float32, ragged=True)
    for options in OPTIONS.values():
        assert_equals_loop(mlp(sizes, dtype=torch.float32), batch, **options)


def test_frozen_parameters():
    module = mlp((3, 8, 5, 2))
    module[0].weight.requires_grad_(False)
    module[4].bias.requires_grad_(False)
    batch = make_batch((3, 2), ragged=True)
    assert_equals_loop(module, batch)
    assert_equals_loop(module, batch, order=1, rule=MetaSGD())
    got = everything(module, batch, "native")
    assert set(got["grads"]) == set(make_meta_params(module))


@pytest.mark.parametrize("n_tasks", [1, 7, 8, 9, 25, 300])
def test_sums_over_blocks_of_tasks(n_tasks):
    batch = make_batch((3, 6, 2), n_tasks, ragged=n_tasks > 1)
    assert_equals_loop(mlp((3, 6, 2)), batch, rule=MetaSGD(), steps=2)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_threads_change_no_bit(dtype, monkeypatch, instructions):
    sizes, module = (3, 17, 2), mlp((3, 17, 2), dtype=dtype)
    batch = make_batch(sizes, 70, dtype=dtype, ragged=True)
    monkeypatch.setattr(native, "PARALLEL_WORK", 0)
    results = []
    for n_threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        results.append(everything(module, batch, "native", rule=MetaSGD()))
    for result in results[1:]:
        assert_bits(result, results[0])


def test_arrays_that_do_not_lie_in_order_in_memory():
    def scatter(tensor):
        wide = tensor.new_full((*tensor.shape, 2), -7)
        wide[..., 0] = tensor
        return wide[..., 0]

    module, batch = mlp((3, 8, 2)), make_batch((3, 2), ragged=True)
    expected = everything(module, batch, "native", rule=MetaSGD())
    for p in module.parameters():
        p.data = scatter(p.data)
    scattered = [
        Rows(
            scatter(rows.X), scatter(rows.y), scatter(rows.weight), np.repeat(rows.lengths, 2)[::2]
        )
        for rows in (batch.support, batch.query)
    ]
    batch = EpisodeBatch(*scattered)
    assert not batch.support.X.is_contiguous()
    assert_bits(everything(module, batch, "native", rule=MetaSGD()), expected)


def test_padding_may_hold_anything():
    sizes = (3, 6, 2)
    for classes in (False, True):
        batch = make_batch(sizes, classes=classes, ragged=True)
        expected = everything(mlp(sizes), batch, "native", classes=classes)
        for rows in (batch.support, batch.query):
            padding = np.arange(rows.X.shape[1]) >= rows.lengths[:, None]
            rows.X[torch.as_tensor(padding)] = np.nan
            rows.y[torch.as_tensor(padding)] = 10**9
        assert_bits(everything(mlp(sizes), batch, "native", classes=classes), expected)


def test_tasks_do_not_depend_on_their_batch():
    sizes = (3, 17, 4)
    batch = make_batch(sizes, 20, classes=True)
    whole = everything(mlp(sizes), batch, "native", classes=True)
    which = np.array([13])
    alone = EpisodeBatch(batch.support.take(which), batch.query.take(which))
    single = everything(mlp(sizes), alone, "native", classes=True)
    assert torch.equal(single["losses"][0], whole["losses"][13])
    for name, p in single["adapted"].items():
        assert torch.equal(p[0], whole["adapted"][name][13])


def test_predictions_of_many_rows():
    sizes = (3, 17, 2)
    module, batch = mlp(sizes), make_batch(sizes, 2, widths=(5, 300), ragged=True)
    assert_equals_loop(module, batch)


# --- numbers that are not finite, or not valid


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["support", "query"])
@pytest.mark.parametrize("sizes", [(3, 6, 2), (20, 20, 2), (9, 2)], ids=str)
def test_inputs_that_are_not_finite_have_losses_as_in_the_loop(sizes, where, value):
    for activation in (nn.ReLU, nn.Tanh):
        batch = make_batch(sizes, 4, widths=(4, 4))
        getattr(batch, where).X[1, 2, 0] = value
        module = mlp(sizes, activation)
        losses, finite = [], []
        for rung in ("native", "loop"):
            runner = make_engine(module, rung)
            step = runner.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2)
            losses.append(step.losses)
            finite.append({name: bool(g.isfinite().all()) for name, g in step.grads.items()})
        assert torch.equal(losses[0].isfinite(), losses[1].isfinite())
        assert_same(losses[0][[0, 2, 3]], losses[1][[0, 2, 3]], 1e-11)
        assert finite[0] == finite[1]


def test_inner_steps_that_diverge_do_so_in_the_loop_too():
    module, batch = mlp((3, 6, 2), nn.ReLU), make_batch((3, 6, 2), 4)
    batch.support.X[1] *= 1e60
    got = []
    for rung in ("native", "loop"):
        runner = make_engine(module, rung)
        adapted = runner.adapt(make_meta_params(module), batch.support, alpha=0.1, steps=4)
        got.append(
            [bool(torch.isfinite(p[j]).all()) for p in adapted.params.values() for j in range(4)]
        )
    assert got[0] == got[1]
    assert not all(got[0])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cross_entropy_of_huge_logits(dtype):
    sizes = (3, 5)
    module = mlp(sizes, dtype=dtype)
    batch = make_batch(sizes, classes=True, dtype=dtype)
    with torch.no_grad():
        module[0].weight.mul_(1e4)
    got, expected = (
        everything(module, batch, rung, classes=True, steps=1, alpha=1e-3)
        for rung in ("native", "loop")
    )
    assert float(expected["losses"].min()) > 100
    assert_same(got, expected, TOLERANCES[dtype])


def test_labels_of_no_class_give_nan():
    sizes = (3, 6, 4)
    module = mlp(sizes)
    for where, label in itertools.product(("support", "query"), (-1, 4, 2**62, -(2**63))):
        batch = make_batch(sizes, 9, classes=True)
        getattr(batch, where).y[3, 1] = label
        runner = make_engine(module, "native", classes=True)
        step = runner.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2)
        others = [j for j in range(9) if j != 3]
        assert step.losses[3].isnan()
        assert step.losses[others].isfinite().all()
        assert all(g.isnan().any() for g in step.grads.values())


# --- gradients


@pytest.mark.parametrize("rule", [SGD(), MetaSGD()], ids=["SGD", "MetaSGD"])
def test_the_meta_gradient_is_that_of_finite_differences(rule):
    sizes = (3, 5, 3)
    module, batch = mlp(sizes), make_batch(sizes, classes=True, weighted=True)
    runner = make_engine(module, "native", classes=True, rule=rule)
    params = make_meta_params(module, runner.spec.rule, runner.spec.parts.adapted)
    grads = runner.meta_step(params, batch, alpha=0.4, steps=3).grads

    def loss(shift):
        shifted = {name: p + shift * direction[name] for name, p in params.items()}
        return runner.meta_step(shifted, batch, alpha=0.4, steps=3).losses.mean()

    generator = torch.Generator().manual_seed(2)
    for only in (None, *params):
        direction = {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * (only in (None, name))
            for name, p in params.items()
        }
        slope = sum((grads[name] * d).sum() for name, d in direction.items())
        h = 1e-5
        assert float((loss(h) - loss(-h)) / (2 * h)) == pytest.approx(float(slope), rel=1e-6)

    first = make_engine(module, "native", classes=True, rule=rule, order=1)
    other = first.meta_step(params, batch, alpha=0.4, steps=3).grads
    name = "module.0.weight"
    assert float((other[name] - grads[name]).norm() / grads[name].norm()) > 0.01


# --- what is not covered


class Renamed(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(SGD):
    def step(self, k, params, grads, **options):
        return super().step(k, params, {n: g / 2 for n, g in grads.items()}, **options)


class OtherGradient(SecondOrder):
    pass


def hooked():
    module = mlp((3, 4, 2))
    module[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    return module


def hooked_backwards():
    module = mlp((3, 4, 2))
    module[2].register_full_backward_hook(lambda layer, by_input, by_output: (3 * by_input[0],))
    return module


def patched():
    module = mlp((3, 4, 2))
    module[0].forward = lambda x: torch.cat([x, 2 * x[:, :1]], 1)
    return module


def mixed():
    module = mlp((3, 4, 2))
    module[2].float()
    return module


UNCOVERED = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    "tied weights": Tied,
    "hooks": hooked,
    "backward hooks": hooked_backwards,
    "forward of an instance": patched,
    "GELU of tanh": lambda: mlp((3, 4, 2), lambda: nn.GELU(approximate="tanh")),
    "negative slope": lambda: mlp((3, 4, 2), lambda: nn.LeakyReLU(-0.1)),
    "negative ELU": lambda: mlp((3, 4, 2), lambda: nn.ELU(-0.5)),
    "other softplus": lambda: mlp((3, 4, 2), lambda: nn.Softplus(beta=2)),
    "other activation": lambda: mlp((3, 4, 2), nn.Mish),
    "activation first": lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2)),
    "two activations": lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Sigmoid()),
    "a class of one's own": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Renamed(4, 2)),
    "very deep": lambda: mlp([3] * 33 + [2]),
}


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.EngineFallbackWarning")
@pytest.mark.parametrize("name", UNCOVERED)
def test_modules_that_are_not_covered_run_elsewhere(name):
    module, batch = UNCOVERED[name]().double(), make_batch((3, 2))
    runner = make_engine(module, "auto")
    assert climbing_rung.Native.refuses(runner.spec) is not None
    runner.expect(0, 10**6, n_tasks=5, n_rows=16, steps=2)
    params = make_meta_params(module)
    got, expected = (
        r.meta_step(params, batch, alpha=0.1, steps=2)
        for r in (runner, make_engine(module, "loop"))
    )
    assert runner.rung != "native"
    assert_same(got.grads, expected.grads, 1e-11)


@pytest.mark.parametrize(
    "options",
    [{"rule": Halved()}, {"rule": Momentum(max_grad_norm=0.1)}],
    ids=["a step of one's own", "momentum"],
)
def test_rules_that_are_not_covered_run_elsewhere(options):
    module, batch = mlp((3, 4, 2)), make_batch((3, 2))
    runner = make_engine(module, "auto", **options)
    assert climbing_rung.Native.refuses(runner.spec) is not None
    got, expected = (
        r.meta_step(
            make_meta_params(module, r.spec.rule, r.spec.parts.adapted), batch, alpha=0.5, steps=2
        )
        for r in (runner, make_engine(module, "loop", **options))
    )
    assert_same(got.grads, expected.grads, 1e-11)
    with pytest.raises(ValueError, match="do not cover"):
        make_engine(module, "native", **options)


def test_losses_gradients_and_types_that_are_not_covered():
    def engine_of(module, **options):
        given = {
            "row_loss": squared_error_rows,
            "rule": SGD(),
            "meta_gradient": SecondOrder(),
            "adapted": adapted_names(module, "all"),
        }
        return Engine(module, **(given | options))

    module = mlp((3, 4, 2))
    assert climbing_rung.Native.refuses(engine_of(module).spec) is None
    assert (
        climbing_rung.Native.refuses(engine_of(module, meta_gradient=OtherGradient()).spec)
        is not None
    )
    assert (
        climbing_rung.Native.refuses(
            engine_of(module, row_loss=lambda o, y: (o - y).abs().mean(-1)).spec
        )
        is not None
    )
    assert climbing_rung.Native.refuses(engine_of(module.half()).spec) is not None
    assert native.describe(mixed()) is None


def test_layers_that_do_not_fit_are_left_to_torch():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2))
    assert native.describe(module) is None
    module = mlp((3, 5, 2))
    module[0].weight = nn.Parameter(torch.zeros(5, 2).double())
    assert native.describe(module) is None
    module = mlp((3, 5, 2))
    module[0].bias = nn.Parameter(torch.zeros(1).double())
    assert native.describe(module) is None


def test_rows_that_are_not_covered_run_elsewhere():
    module = mlp((3, 4, 2))
    runner = make_engine(module, "native")
    batch = make_batch((3, 2))
    kernel = runner.ladder.top.kernel
    assert kernel.takes(batch.support, batch.query)
    for rows in (
        Rows(batch.query.X.float(), batch.query.y),
        Rows(batch.query.X, batch.query.y.float()),
        Rows(batch.query.X, batch.query.y[..., :1]),
        Rows(batch.query.X[..., :2], batch.query.y),
        Rows(batch.query.X[:, None], batch.query.y),
        Rows(batch.query.X, batch.query.y, torch.ones(5, 9)),
        Rows(batch.query.X, batch.query.y, torch.ones(5, 8).double()),
    ):
        assert not kernel.takes(rows)


class FixedRates(SGD):
    """A rule of one's own, with rates of each step."""

    def __init__(self, rates=(0.1, 0.3), make=torch.full_like):
        super().__init__()
        self.rates = rates
        self.make = make

    def step(self, k, params, grads, *, state, **options):
        rate = self.rates[min(k, len(self.rates) - 1)]
        return {name: p - rate * grads[name] for name, p in params.items()}, state

    def linear_rates(self, params, *, alpha, rates):
        return [{name: self.make(p, r) for name, p in params.items()} for r in self.rates]


def test_rules_of_ones_own_with_rates_of_each_step():
    assert_equals_loop(mlp((3, 6, 2)), make_batch((3, 2)), rule=FixedRates(), steps=5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (FixedRates(make=lambda p, r: torch.tensor(r).double()), r"rate of '0.weight'.*shape \(\)"),
        (FixedRates(make=lambda p, r: torch.full(p.shape, r)), "torch.float32.*torch.float64"),
        (FixedRates(rates=()), "linear_rates is empty"),
    ],
    ids=["shape", "type", "none"],
)
def test_rates_that_do_not_fit_the_parameters_are_refused(rule, message):
    module, batch = mlp((3, 6, 2)), make_batch((3, 2))
    runner = make_engine(module, "native", rule=rule)
    with pytest.raises(ValueError, match=message):
        runner.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2)
    with pytest.raises(ValueError, match=message):
        runner.adapt(make_meta_params(module), batch.support, alpha=0.1, steps=2)


def test_an_empty_batch_does_no_harm():
    module, batch = mlp((3, 6, 2)), make_batch((3, 2))
    none = np.array([], dtype=int)
    empty = EpisodeBatch(batch.support.take(none), batch.query.take(none))
    runner = make_engine(module, "native")
    step = runner.meta_step(make_meta_params(module), empty, alpha=0.1, steps=2)
    assert step.losses.shape == (0,)
    assert all(g.isnan().all() for g in step.grads.values())


def test_running_out_of_memory_is_said(monkeypatch):
    module, batch = mlp((3, 6, 2)), make_batch((3, 2))
    runner = make_engine(module, "native")
    with pytest.raises(MemoryError, match="not enough memory"):
        # the memory of so many steps is asked for at once
        runner.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2**45)


def test_wide_inputs_take_memory_in_proportion():
    """Transposes of weights are as large as the weights, not as the square of the widest layer."""
    module = mlp((400_000, 2), dtype=torch.float32)
    assert_equals_loop(
        module, make_batch((400_000, 2), 1, dtype=torch.float32, widths=(2, 2)), steps=1, alpha=1e-6
    )


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_memory_of_large_problems_is_given_back():
    sizes, dtype = (3, 900, 900, 1), torch.float32
    module, batch = mlp(sizes, dtype=dtype), make_batch(sizes, 1, dtype=dtype, widths=(2, 2))
    runner = make_engine(module, "native")
    params = make_meta_params(module)
    runner.meta_step(params, batch, alpha=1e-3, steps=1)
    before = resident_bytes()
    runner.meta_step(params, batch, alpha=1e-3, steps=30)  # keeps 200 MB, and more, as it runs
    assert resident_bytes() - before < 60e6


# --- instruction sets, and no kernels


@pytest.fixture
def no_kernels(monkeypatch):
    """As where the package was installed without a C++ compiler."""
    monkeypatch.setattr(native, "_kernels", None)
    monkeypatch.setattr(native, "_missing", "No module named 'sklearn_maml.native._kernels'")
    monkeypatch.setattr(base, "_warned", set())


def run_step(rung="native", dtype=torch.float64):
    module, batch = mlp((3, 6, 4), dtype=dtype), make_batch((3, 4), dtype=dtype)
    runner = make_engine(module, rung)
    return runner, runner.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2)


def assert_the_loops_numbers(step):
    assert_same(step.grads, run_step("loop")[1].grads, 1e-11)


def test_the_kernels_are_those_of_the_source():
    """They are built by `pip install`, and after a change of the source by setup.py."""
    folder = ROOT / "sklearn_maml" / "native"
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    assert native._kernels is not None, native._missing
    assert digest == native._kernels.SOURCES, "run `python setup.py build_ext --inplace`"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_instruction_set_gives_the_numbers_of_the_loop(dtype, instructions):
    for sizes in ((3, 6, 4), (17, 5, 3), (20, 9, 2), (4, 40, 1), (3, 17, 5)):
        for activation in (nn.ReLU, nn.Tanh, nn.GELU):
            batch = make_batch(sizes, 3, dtype=dtype, ragged=True)
            module = mlp(sizes, activation, dtype=dtype)
            assert make_engine(module, "native").ladder.top.kernel.instructions == instructions
            assert_equals_loop(module, batch, rule=MetaSGD())
    batch = make_batch((3, 17, 5), classes=True, dtype=dtype)
    assert_equals_loop(mlp((3, 17, 5), dtype=dtype), batch, classes=True, checkpoint_steps=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_instruction_sets_differ_by_rounding_alone(dtype, monkeypatch):
    sizes = (3, 17, 5)
    for activation in ACTIVATIONS.values():
        batch = make_batch(sizes, dtype=dtype)
        module = mlp(sizes, activation, dtype=dtype)
        results = []
        for name in native.instruction_sets():
            monkeypatch.setenv(native.VARIABLE, name)
            results.append(everything(module, batch, "native"))
        for result in results[1:]:
            assert_same(result, results[0], 100 * torch.finfo(dtype).eps)


def test_the_best_instruction_set_is_used_unless_another_is_asked_for(monkeypatch):
    names = native.instruction_sets()
    assert names == list(dict.fromkeys(names))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert native.instruction_set() == names[-1]
    monkeypatch.setenv(native.VARIABLE, names[0])
    assert native.instruction_set() == names[0]
    monkeypatch.setenv(native.VARIABLE, "mmx")
    with pytest.raises(ValueError, match=f"Got {native.VARIABLE}=mmx; expected one of {names[0]}"):
        make_engine(mlp((3, 6, 4)), "native")


def test_the_kernels_refuse_arguments_that_are_not_theirs():
    n_levels = len(native.instruction_sets())
    for level in (-1, n_levels, 10**6):
        with pytest.raises(ValueError, match=f"Got level {level} of"):
            native._kernels.meta_step(level, False, bytes(27 * 8))
    for size in (0, 26 * 8, 28 * 8):
        with pytest.raises(ValueError, match=f"and {size} bytes of arguments; expected 216"):
            native._kernels.predict(0, False, bytes(size))


def test_without_kernels_one_warning_says_why(no_kernels):
    assert native.instruction_sets() == []
    reason = "installed without them.*no C\\+\\+ compiler.*No module named"
    with pytest.warns(EngineFallbackWarning, match=f"same results. Reason: .*{reason}") as caught:
        runner, step = run_step()
    assert len(caught) == 1
    assert runner.rung == "stacked"
    assert_the_loops_numbers(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_the_loops_numbers(run_step()[1])


# --- estimators

RNG = np.random.default_rng(0)
GROUPS = np.repeat(np.arange(12), 12)
X_ALL = RNG.normal(size=(144, 3))
Y_ALL = np.sin(X_ALL @ RNG.normal(size=(3, 12)))[np.arange(144), GROUPS]


def regressor(**options):
    given = {
        "hidden_layer_sizes": (8,),
        "activation": "tanh",
        "update_rule": "sgd",
        "steps": 1,
        "meta_batch_size": 4,
        "n_shots": 4,
        "max_iter": 100,
        "beta_decay": 0.0,
        "random_state": 0,
    }
    return MAMLRegressor(**(given | options))


def fit(**options):
    return regressor(**options).fit(X_ALL, Y_ALL, groups=GROUPS)


def coefficients(reg):
    return torch.cat([p.detach().flatten() for p in reg.module_.parameters()])


@pytest.fixture(scope="module")
def fitted():
    reg = fit()
    assert reg._rung == "native"
    return reg


def count_steps(monkeypatch):
    calls = []
    run = native.Kernel.meta_step

    def counted(self, *args, **options):
        calls.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(native.Kernel, "meta_step", counted)
    return calls


def test_a_fit_runs_on_the_kernels_from_its_first_update_and_learns_the_same(monkeypatch):
    options = {"update_rule": "sgd", "module": mlp((3, 8, 1)), "early_stopping": False}
    calls = count_steps(monkeypatch)
    reg = fit(**options)
    assert len(calls) == 100
    assert reg._rung == "native"
    monkeypatch.setattr(climbing_rung.Native, "refuses", classmethod(lambda cls, spec: "not now"))
    other = fit(**options)
    assert other._rung == "auto"
    assert len(calls) == 100
    torch.testing.assert_close(coefficients(reg), coefficients(other), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", ["sgd", "meta-sgd"])
def test_fits_are_reproducible_and_can_be_continued(rule):
    options = {"update_rule": rule, "early_stopping": False}
    whole = fit(max_iter=120, **options)
    assert torch.equal(coefficients(whole), coefficients(fit(max_iter=120, **options)))
    for first in (20, 30, 60, 100):
        parts = fit(max_iter=first, warm_start=True, **options)
        parts.set_params(max_iter=120 - first).fit(X_ALL, Y_ALL, groups=GROUPS)
        assert torch.equal(coefficients(parts), coefficients(whole)), first


def test_a_continued_fit_is_validated_as_a_whole_one():
    whole = fit(max_iter=100)
    parts = fit(max_iter=50, warm_start=True).fit(X_ALL, Y_ALL, groups=GROUPS)
    for fact in ("train_loss", "valid_loss", "valid_loss_before"):
        assert parts.history_[:, fact] == whole.history_[:, fact], fact


def test_a_fit_that_stopped_early_is_a_shorter_fit():
    early = fit(max_iter=1000, early_stopping=True, n_iter_no_change=1, beta=0.1)
    assert 30 < early.n_iter_ < 1000
    shorter = fit(max_iter=early.n_iter_, early_stopping=True, n_iter_no_change=1, beta=0.1)
    assert torch.equal(coefficients(early), coefficients(shorter))


@pytest.mark.parametrize("make", [MAMLRegressor, MAMLClassifier])
def test_a_default_fit_without_kernels_says_so_once(make, no_kernels):
    y = Y_ALL if make is MAMLRegressor else np.where(Y_ALL > 0, "up", "down")
    reg = make(hidden_layer_sizes=(8,), max_iter=5, random_state=0)
    with pytest.warns(EngineFallbackWarning, match="no C\\+\\+ compiler") as caught:
        reg.fit(X_ALL, y, groups=GROUPS)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.fit(X_ALL, y, groups=GROUPS)


def test_fits_and_copies_without_kernels(fitted, no_kernels, monkeypatch):
    data = pickle.dumps(fitted)

    def use():
        copies = [pickle.loads(data), copy.deepcopy(fitted)]
        adapted = [twin.adapt(X_ALL, Y_ALL, groups=GROUPS) for twin in copies]
        return fit(), [twin.predict(X_ALL, groups=GROUPS) for twin in adapted]

    with pytest.warns(EngineFallbackWarning, match="no C\\+\\+ compiler") as caught:
        reg, got = use()
    assert len(caught) == 1
    assert reg._rung == "auto"
    torch.testing.assert_close(coefficients(reg), coefficients(fitted), rtol=1e-3, atol=1e-4)
    assert np.array_equal(*got)
    monkeypatch.undo()
    expected = fitted.adapt(X_ALL, Y_ALL, groups=GROUPS).predict(X_ALL, groups=GROUPS)
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_adapt_and_predict_with_the_same_bits(how, fitted):
    fitted.adapt(X_ALL, Y_ALL, groups=GROUPS)
    expected = fitted.predict(X_ALL, groups=GROUPS)
    twin = COPIES[how](fitted)
    assert np.array_equal(twin.predict(X_ALL, groups=GROUPS), expected)
    twin.adapt(X_ALL, Y_ALL, groups=GROUPS)
    assert np.array_equal(twin.predict(X_ALL, groups=GROUPS), expected)


def test_a_change_after_the_fit_that_is_not_covered_runs_elsewhere(fitted):
    expected = predict_elsewhere(fitted)
    twin = copy.deepcopy(fitted).set_params(update_rule=SGD(max_grad_norm=1e6))
    np.testing.assert_allclose(predict_elsewhere(twin), expected, rtol=1e-4, atol=1e-5)


def test_a_clone_begins_anew(fitted):
    twin = clone(fitted)
    assert not hasattr(twin, "module_")


def test_an_engine_on_the_kernels_can_be_copied():
    runner, step = run_step()
    module, batch = mlp((3, 6, 4)), make_batch((3, 4))
    for twin in (pickle.loads(pickle.dumps(runner)), copy.deepcopy(runner), copy.copy(runner)):
        assert twin.rung == "native"
        again = twin.meta_step(make_meta_params(module), batch, alpha=0.1, steps=2)
        assert_bits(again.grads, step.grads)


def test_threads_that_share_a_model_do_not_disturb_each_other(fitted):
    tasks = list(zip(np.split(X_ALL, 12), np.split(Y_ALL, 12), strict=True))
    expected = [adapt(fitted, *task).predict(X_ALL) for task in tasks]
    fitted.adapt(X_ALL, Y_ALL, groups=GROUPS)
    together = fitted.predict(X_ALL, groups=GROUPS)

    def work(i):
        own = adapt(fitted, *tasks[i % 12]).predict(X_ALL)
        shared = fitted.predict(X_ALL, groups=GROUPS)
        return np.array_equal(own, expected[i % 12]) and np.array_equal(shared, together)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48)))


def test_an_engine_shared_by_threads_gives_the_bits_of_one(monkeypatch):
    module, batch = mlp((3, 17, 5)), make_batch((3, 5), 30)
    monkeypatch.setattr(native, "PARALLEL_WORK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    runner = make_engine(module, "native")
    params = make_meta_params(module)

    def work(alpha):
        return runner.meta_step(params, batch, alpha=alpha, steps=3).grads

    alphas = [0.1, 0.2, 0.3] * 10
    expected = {alpha: work(alpha) for alpha in set(alphas)}
    with ThreadPoolExecutor(8) as pool:
        for alpha, grads in zip(alphas, pool.map(work, alphas), strict=True):
            assert_bits(grads, expected[alpha])


def test_classifiers_climb_too():
    labels = np.tile([0, 1], 72)
    options = {
        "hidden_layer_sizes": (8,),
        "update_rule": "sgd",
        "steps": 1,
        "meta_batch_size": 4,
        "n_shots": 2,
    }
    clf = MAMLClassifier(max_iter=60, n_ways=2, n_queries=2, random_state=0, **options)
    clf.fit(X_ALL, labels, groups=GROUPS)
    assert clf._rung == "native"
    probabilities = clf.adapt(X_ALL[:12], labels[:12]).predict_proba(X_ALL)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def predict_elsewhere(reg):
    return adapt(reg, X_ALL[:12], Y_ALL[:12]).predict(X_ALL)


def test_workers_of_joblib(fitted):
    reg = regressor(max_iter=60)
    scores = []
    with sklearn.config_context(enable_metadata_routing=True):
        for n_jobs in (2, 1):
            options = {"cv": GroupKFold(2), "refit": n_jobs == 1, "error_score": "raise"}
            search = GridSearchCV(reg, {"alpha": [0.1]}, n_jobs=n_jobs, **options)
            search.fit(X_ALL, Y_ALL, groups=GROUPS)
            scores.append(search.cv_results_["mean_test_score"])
    assert search.best_estimator_._rung == "native"
    np.testing.assert_array_equal(*scores)
    expected = predict_elsewhere(fitted)
    for got in joblib.Parallel(n_jobs=2)(joblib.delayed(predict_elsewhere)(fitted) for _ in "ab"):
        np.testing.assert_array_equal(got, expected)
