"""Convolutional nets run over a batch of tasks as they do one task at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from builders import build, make_engine, make_meta_params
from torch import nn
from torch.nn import functional

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.conv import layers, products
from sklearn_maml.engine.conv.norms import normalise
from sklearn_maml.update_rules import SGD, MetaSGD

TOLERANCE = 1e-9
SIDE = 9


class SpatialMean(nn.Module):
    """A layer of the user's own, without parameters."""

    def forward(self, x):
        return x.mean((2, 3))


class Viewed(nn.Module):
    """Flattens with `view`, which refuses images with the channels last."""

    def forward(self, x):
        return x.view(len(x), -1)


class Centred(nn.Module):
    """Takes the mean over the rows out, so that rows depend on each other."""

    def forward(self, x):
        return x - x.mean(0)


def blocks(n_in=2, width=3, *, norm=nn.BatchNorm2d, pool=None, head=None, **kwargs):
    """Two convolutions with what belongs between them."""
    options = {"kernel_size": 3, "padding": 1, "stride": 1 if pool else 2, **kwargs}
    layers = []
    for k in range(2):
        layers.append(nn.Conv2d(n_in if k == 0 else width, width, **options))
        layers += [norm(width)] if norm else []
        layers.append(nn.ReLU())
        layers += [pool()] if pool else []
    return nn.Sequential(*layers, *(head or [SpatialMean(), nn.Linear(width, 3)]))


NETS = {
    "stride": blocks,
    "uneven stride and padding": lambda: blocks(stride=(2, 1), padding=(0, 2), kernel_size=(2, 3)),
    "no padding": lambda: blocks(padding=0, stride=1),
    "kernel of 1": lambda: blocks(kernel_size=1, padding=0),
    "one channel": lambda: blocks(n_in=1),
    "max pool": lambda: blocks(pool=lambda: nn.MaxPool2d(2)),
    "average pool": lambda: blocks(pool=lambda: nn.AvgPool2d(3, stride=2)),
    "adaptive pool": lambda: blocks(head=[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]),
    "norm without weights": lambda: blocks(norm=lambda n: nn.BatchNorm2d(n, affine=False)),
    "no norm": lambda: blocks(norm=None),
    "no bias": lambda: blocks(bias=False),
    "norm after the activation": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(147, 3)
    ),
    "norm of flat features": lambda: blocks(
        head=[nn.Flatten(), nn.Linear(27, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 3)]
    ),
    "relu in place": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(147, 3)
    ),
    "nested": lambda: nn.Sequential(blocks(head=[nn.Identity()]), SpatialMean(), nn.Linear(3, 3)),
    "view": lambda: blocks(head=[Viewed(), nn.Linear(27, 3)]),
    "rows that depend on each other": lambda: blocks(
        head=[Centred(), SpatialMean(), nn.Linear(3, 3)]
    ),
}
REFUSED = {
    "dilation": lambda: blocks(dilation=2),
    "groups": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), SpatialMean()),
    "circular padding": lambda: blocks(padding_mode="circular"),
    "padding by name": lambda: blocks(padding="same", stride=1),
    "other layers with weights": lambda: blocks(norm=lambda n: nn.GroupNorm(1, n)),
    "no convolution": lambda: nn.Sequential(SpatialMean()),
    "no sequence": SpatialMean,
}


def build_net(name, dtype=torch.float64):
    return build(NETS[name], noise=0.1, dtype=dtype)


def make_rows(rng, n_tasks, n_rows, channels, dtype=torch.float64, side=SIDE):
    X = torch.from_numpy(rng.normal(size=(n_tasks, n_rows, channels, side, side))).to(dtype)
    return Rows(X, torch.from_numpy(rng.integers(0, 3, (n_tasks, n_rows))))


def make_batch(n_tasks, channels=2, **kwargs):
    rng = np.random.default_rng(0)
    sets = [make_rows(rng, n_tasks, n, channels, **kwargs) for n in (5, 4)]
    return EpisodeBatch(*sets)


def run(module, batch, rung, *, order=2, steps=2, what="all", rule=None):
    """Meta-step, and the outputs of adapted parameters on the query rows."""
    engine = make_engine(module, rung, rule=rule, order=order, adapted=what, classes=True)
    params = make_meta_params(module, rule, what)
    step = engine.meta_step(params, batch, alpha=0.2, steps=steps)
    adapted = engine.adapt(params, batch.support, alpha=0.2, steps=steps)
    return engine, step, engine.predict(adapted, batch.query)


def largest_difference(got, expected):
    (_, step, outputs), (_, step_loop, outputs_loop) = got, expected
    scale = max(float(g.abs().max()) for g in step_loop.grads.values())
    differences = [(step.grads[n] - g).abs().max() / scale for n, g in step_loop.grads.items()]
    differences.append((step.losses - step_loop.losses).abs().max())
    differences.append((step.outputs - step_loop.outputs).abs().max())
    differences.append((outputs - outputs_loop).abs().max())
    return max(map(float, differences))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_batched_equals_the_loop(name, order):
    module = build_net(name)
    batch = make_batch(3, channels=module.get_submodule("0").in_channels if name != "nested" else 2)
    got = run(module, batch, "auto", order=order)
    assert got[0].rung == "stacked"
    assert got[0].fallback_reason is None
    assert largest_difference(got, run(module, batch, "loop", order=order)) < TOLERANCE


@pytest.mark.parametrize("what", ["head", "body", "*weight"])
@pytest.mark.parametrize("name", ["stride", "max pool"])
def test_some_adapted_parameters_equal_the_loop(name, what):
    module, batch = build_net(name), make_batch(3)
    expected = run(module, batch, "loop", what=what)
    assert largest_difference(run(module, batch, "auto", what=what), expected) < TOLERANCE


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("n_tasks", [1, 2])
def test_learned_rates_and_step_counts_equal_the_loop(n_tasks, steps):
    module, batch = build_net("stride"), make_batch(n_tasks)
    for rule in (SGD(max_grad_norm=0.1), MetaSGD()):
        expected = run(module, batch, "loop", steps=steps, rule=rule)
        got = run(module, batch, "auto", steps=steps, rule=rule)
        assert largest_difference(got, expected) < TOLERANCE


def test_tasks_in_chunks_give_the_same_numbers(monkeypatch):
    module, batch = build_net("stride"), make_batch(5)
    whole = run(module, batch, "auto")
    monkeypatch.setattr(layers, "ACTIVATION_BYTES", 2 * 5 * 8 * SIDE**2 * 3)
    assert layers.tasks_at_a_time(module, batch.support.X) not in (1, 5)
    assert largest_difference(run(module, batch, "auto"), whole) < TOLERANCE


def everything(module, batch):
    """All that a meta-step and predictions of adapted parameters give."""
    _, step, outputs = run(module, batch, "auto")
    return [*step.grads.values(), step.losses, step.outputs, outputs]


@pytest.fixture
def where_convolved(monkeypatch):
    """Threads that products were computed in, with chunks of one task; torch has two threads."""
    seen = set()
    convolve = products._convolve

    def noted(*args):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return convolve(*args)

    monkeypatch.setattr(products, "_convolve", noted)
    monkeypatch.setattr(layers, "ACTIVATION_BYTES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield seen
    torch.set_num_threads(before)


def test_chunks_run_in_as_many_threads_as_torch_has_with_the_same_bits(where_convolved):
    module, batch = build_net("adaptive pool"), make_batch(5)
    got = everything(module, batch)
    assert threading.get_ident() not in {thread for thread, _ in where_convolved}
    assert {n for _, n in where_convolved} == {1}
    assert len(where_convolved) > 1
    torch.set_num_threads(1)
    where_convolved.clear()
    for a, b in zip(got, everything(module, batch), strict=True):
        assert torch.equal(a, b)
    assert where_convolved == {(threading.get_ident(), 1)}


@pytest.mark.parametrize("layer", [SpatialMean, lambda: nn.Sequential(nn.Dropout(), SpatialMean())])
def test_layers_of_users_and_random_ones_stay_in_the_thread_of_the_caller(where_convolved, layer):
    module = build(lambda: blocks(norm=None, head=[layer(), nn.Linear(3, 3)]), noise=0.1)
    everything(module, make_batch(3))
    assert {thread for thread, _ in where_convolved} == {threading.get_ident()}


def test_an_error_in_a_thread_is_raised_by_the_call(where_convolved):
    batch = make_batch(3, channels=1)  # of another number than the network takes
    with pytest.raises(RuntimeError, match="Expected size"):
        run(build_net("adaptive pool"), batch, "stacked")


@pytest.mark.parametrize("small", [0.0, np.inf], ids=["convolutions", "patches"])
@pytest.mark.parametrize("channels", [1, 2])
def test_either_way_to_convolve_gives_the_same_numbers(small, channels, monkeypatch):
    """In float32 on CPUs, where the shapes decide; both ways against the loop."""
    for name in ("SMALL_CONVOLUTION", "SMALL_WEIGHT_GRADIENT"):
        monkeypatch.setattr(products, name, small)
    monkeypatch.setattr(products, "FEW_CHANNELS", 0)
    module = build_net("one channel" if channels == 1 else "no norm", torch.float32)
    batch = make_batch(3, channels=channels, dtype=torch.float32)
    for what in ("all", "head"):
        expected = run(module, batch, "loop", what=what)
        assert largest_difference(run(module, batch, "auto", what=what), expected) < 1e-4


def test_a_sum_over_tasks_taken_for_each_task_would_be_noticed(monkeypatch):
    """Negative control: the promise that only sums are asked for, made where it is not true."""
    module, batch = build_net("stride"), make_batch(3)
    expected = run(module, batch, "loop")
    monkeypatch.setattr(products.Summation, "only", True)
    assert largest_difference(run(module, batch, "auto"), expected) > 1e-4


def test_wrong_order_would_be_noticed():
    """Negative control: first and second order differ by far more than the tolerance."""
    module, batch = build_net("stride"), make_batch(3)
    first, second = (run(module, batch, "auto", order=order) for order in (1, 2))
    assert largest_difference(first, second) > 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_other_nets_are_left_to_the_other_rungs(name):
    assert not layers.is_conv_net(REFUSED[name]())


def test_products_pass_gradgradcheck():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    geometry = ((2, 1), (1, 0))

    def convolve(x, w):
        return products.convolve(x, w, geometry, products.Summation())

    expected = torch.stack(
        [functional.conv2d(a, b, None, *geometry) for a, b in zip(x, w, strict=True)]
    )
    torch.testing.assert_close(convolve(x, w), expected)
    assert torch.autograd.gradcheck(convolve, (x, w))
    assert torch.autograd.gradgradcheck(convolve, (x, w))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_passes_gradgradcheck(affine, relu):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    own = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    own = [p.requires_grad_() for p in own] if affine else []

    def norm(x, *own):
        how = {"relu": relu, "n_own": 6, "in_place": False}
        return normalise(x, *(own or (None, None)), 1e-5, **how)

    for t in range(2):
        expected = functional.batch_norm(
            x[t], None, None, *(p[t] for p in own), training=True, eps=1e-5
        )
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(norm(x, *own)[t], expected)
    assert torch.autograd.gradcheck(norm, (x, *own))
    assert torch.autograd.gradgradcheck(norm, (x, *own))


@pytest.mark.parametrize("n_own", [6, 4], ids=["own statistics", "those of the first rows"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_in_place_equals_the_one_that_is_not(affine, relu, n_own):
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(2, 6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    own = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    results = []
    for in_place in (False, True):
        leaves = [p.clone().requires_grad_() for p in (x, *(own if affine else []))]
        rows = leaves[0] + 100.0  # a mean far from zero, and memory that may be overwritten
        how = {"relu": relu, "n_own": n_own, "in_place": in_place}
        y = normalise(rows, *(leaves[1:] or (None, None)), 1e-5, **how)
        before = y.detach().clone()
        results.append([before, *torch.autograd.grad(y, leaves, gy.clone())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_convolving_some_channels_at_a_time_gives_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2 * products.CHANNEL_BLOCK + 3, 6, 5, generator=generator)
    w = torch.randn(8, x.shape[1], 3, 2, generator=generator)
    geometry = ((2, 1), (1, 0))
    expected = functional.conv2d(x, w, None, *geometry)
    torch.testing.assert_close(products._in_blocks(x, w, geometry), expected, rtol=1e-4, atol=1e-4)


def test_one_value_per_channel_is_refused():
    module = nn.Sequential(nn.Conv2d(2, 3, SIDE), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))
    rng = np.random.default_rng(0)
    batch = EpisodeBatch(*(make_rows(rng, 2, 1, 2, torch.float32) for _ in range(2)))
    with pytest.raises(ValueError, match="at least 2 values of each channel"):
        run(module, batch, "auto")
