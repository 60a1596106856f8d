"""The rungs of the engine give the same numbers, for every kind of module, or say why not."""

from __future__ import annotations

import copy
import functools
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import builders
import numpy as np
import pytest
import torch
from builders import build, make_engine, make_meta_params
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sklearn_maml import MAMLClassifier, MAMLRegressor, adapt
from sklearn_maml.data.episodes import EpisodeBatch, pad_rows
from sklearn_maml.engine.architecture import private_copy
from sklearn_maml.engine.rungs import base
from sklearn_maml.engine.rungs.vmap import Vmap
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.modules import ACTIVATIONS, make_mlp
from sklearn_maml.targets.losses import cross_entropy_rows
from sklearn_maml.threads import one_thread
from sklearn_maml.update_rules import SGD

TOLERANCE = 1e-9
EQUAL = ([4, 4, 4], [3, 3, 3])
RAGGED = ([4, 6, 4, 3], [3, 2, 3, 5])  # two tasks have the same numbers of rows


# --- modules of users


class Residual(nn.Module):
    """Not a Sequential: the engine knows nothing of its forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 2)

    def forward(self, x):
        return self.second(x + torch.tanh(self.first(x)))


class OneOutput(nn.Module):
    """Returns (n_rows,) instead of (n_rows, 1)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return torch.tanh(self.linear(x)).squeeze(-1)


class Lookup(nn.Module):
    """An embedding of the integer in the first column."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(torch.tanh(self.table(x[:, 0].abs().long().clamp(max=4))))


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    """A parameter that plays no part."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Buffered(nn.Module):
    """A constant that is a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, x):
        return self.linear(torch.sin(x * self.scale))


class Recurrent(nn.Module):
    """Reads the features of a row as a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(1, 3, batch_first=True)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(self.cell(x.unsqueeze(-1))[0][:, -1])


class Attention(nn.Module):
    """Self-attention over the features of a row."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        z = self.embed(x.unsqueeze(-1))
        return self.linear(self.attention(z, z, z, need_weights=False)[0].mean(1))


class RowMean(nn.Module):
    """Subtracts the mean over the rows: each row's output depends on all rows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        z = torch.tanh(self.first(x))
        return self.second(z - z.mean(0))


class Branch(nn.Module):
    """Decides by the data which layer to use."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.left(x)) if x.sum() > 0 else torch.sin(self.right(x))


class Item(nn.Module):
    """Reads a number out of a tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * (1 + x.abs().max().item())


class Broken(nn.Module):
    """Fails in its forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        raise RuntimeError("this module is broken")


def batch_norm_1d(**options):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 2))


def conv(*norm, channels=4):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        *norm,
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 4, 2),
    )


def frozen_mlp():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def shared_activation():
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), tanh, nn.Linear(4, 4), tanh, nn.Linear(4, 2))


def shared_layer():
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))


def hooked():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[1].register_forward_hook(lambda layer, inputs, output: torch.sin(3 * output))
    return module


def hooked_over_rows():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[1].register_forward_hook(lambda layer, inputs, output: output - output.mean(0))
    return module


def weight_norm():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


def frozen_residual():
    module = Residual()
    module.first.weight.requires_grad_(False)
    return module


# name: (constructor, shape of a row, rung that "auto" starts with)
MODULES = {
    **{
        f"mlp {name}": (lambda name=name: make_mlp(3, 2, (4, 3), name), (3,), "stacked")
        for name in ACTIVATIONS
    },
    "linear": (lambda: nn.Linear(3, 2), (3,), "stacked"),
    "mlp without bias": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
        "stacked",
    ),
    "nested sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)),
        (3,),
        "stacked",
    ),
    "dropout p=0": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
        "stacked",
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
        "stacked",
    ),
    "layer norm not affine": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh(), nn.Linear(4, 2)
        ),
        (3,),
        "stacked",
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.Tanh(), nn.Linear(4, 2)
        ),
        (3,),
        "stacked",
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)), (3,), "vmap"),
    "residual": (Residual, (3,), "vmap"),
    "one output": (OneOutput, (3,), "vmap"),
    "embedding": (Lookup, (3,), "vmap"),
    "tied": (Tied, (3,), "vmap"),
    "unused": (Unused, (3,), "vmap"),
    "buffer": (Buffered, (3,), "vmap"),
    "frozen": (frozen_residual, (3,), "vmap"),
    "frozen mlp": (frozen_mlp, (3,), "stacked"),
    "shared activation": (shared_activation, (3,), "stacked"),
    "shared layer": (shared_layer, (3,), "vmap"),
    "hook": (hooked, (3,), "vmap"),
    "hook over rows": (hooked_over_rows, (3,), "vmap"),
    "weight norm": (weight_norm, (3,), "vmap"),
    "row mean": (RowMean, (3,), "vmap"),
    "attention": (Attention, (3,), "vmap"),
    "batch norm 1d": (batch_norm_1d, (3,), "vmap"),
    "batch norm 1d, no running statistics": (
        lambda: batch_norm_1d(track_running_stats=False),
        (3,),
        "vmap",
    ),
    "batch norm 1d, not affine": (lambda: batch_norm_1d(affine=False), (3,), "vmap"),
    "batch norm 2d": (lambda: conv(nn.BatchNorm2d(4)), (1, 4, 4), "stacked"),
    "batch norm 2d, no running statistics": (
        lambda: conv(nn.BatchNorm2d(4, track_running_stats=False)),
        (1, 4, 4),
        "stacked",
    ),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(4, affine=True)), (1, 4, 4), "vmap"),
    "group norm": (lambda: conv(nn.GroupNorm(2, 4)), (1, 4, 4), "vmap"),
    "conv": (conv, (1, 4, 4), "stacked"),
    "conv and max pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        (1, 4, 4),
        "stacked",
    ),
}


# --- helpers


make_batch = functools.partial(builders.make_batch, scale=1.5)  # where activations bend


def single(batch, j):
    """One task of a batch, unpadded."""
    which = np.array([j])
    alone = EpisodeBatch(batch.support.take(which), batch.query.take(which))
    assert alone.support.lengths is None
    assert alone.query.lengths is None
    return alone


def task_by_task(module, batch, *, alpha=0.2, steps=3, **options):
    """Reference: the plain loop over single, unpadded tasks."""
    params, losses, grads, outputs, adapted, predicted = (
        make_meta_params(module),
        [],
        [],
        [],
        [],
        [],
    )
    for j in range(len(batch)):
        engine, task = make_engine(module, "loop", **options), single(batch, j)
        step = engine.meta_step(params, task, alpha=alpha, steps=steps)
        losses.append(step.losses[0])
        grads.append(step.grads)
        outputs.append(step.outputs[0])
        one = engine.adapt(params, task.support, alpha=alpha, steps=steps)
        adapted.append({**one.params, **one.statistics})
        predicted.append(engine.predict(one, task.query)[0])
    return {
        "losses": torch.stack(losses),
        "grads": {n: torch.stack([g[n] for g in grads]).mean(0) for n in grads[0]},
        "outputs": torch.cat(outputs),
        "adapted": {n: torch.cat([a[n] for a in adapted]) for n in adapted[0]},
        "predicted": torch.cat(predicted),
    }


def batched(module, batch, rung, *, alpha=0.2, steps=3, **options):
    params = make_meta_params(module)
    engine = make_engine(module, rung, **options)
    step = engine.meta_step(params, batch, alpha=alpha, steps=steps)
    adapted = engine.adapt(params, batch.support, alpha=alpha, steps=steps)
    got = {
        "losses": step.losses,
        "grads": step.grads,
        "outputs": batch.query.real(step.outputs),
        "adapted": {**adapted.params, **adapted.statistics},
        "predicted": batch.query.real(engine.predict(adapted, batch.query)),
    }
    return engine, got


def assert_same(got, expected, where=""):
    if isinstance(expected, dict):
        assert sorted(got) == sorted(expected), where
        for name, value in expected.items():
            assert_same(got[name], value, f"{where} {name}")
        return
    assert got.shape == expected.shape, where
    assert torch.isfinite(expected).all(), where
    scale = max(float(expected.abs().max()), 1e-6)
    assert float((got - expected).abs().max()) <= TOLERANCE * scale, where


# --- the rungs agree


# torch says so of operations that vmap runs one task at a time
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("sizes", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", MODULES)
def test_batched_equals_the_unpadded_loop(name, sizes):
    constructor, shape, first_rung = MODULES[name]
    module = build(constructor)
    batch = make_batch(sizes, shape, n_outputs=1 if name == "one output" else 2)
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel of CPUs has no second derivative
        expected = task_by_task(module, batch)
        for rung in ("auto", "loop"):
            engine, got = batched(module, batch, rung)
            assert_same(got, expected, f"{name}, {rung}:")
            assert engine.fallback_reason is None
            if rung == "auto" and first_rung is not None:
                assert engine.rung == first_rung
    # there is something to compare
    moved = [
        (p - module.get_parameter(n)).abs().max().item()
        for n, p in expected["adapted"].items()
        if not n.endswith(("running_mean", "running_var"))
    ]
    assert sum(distance > 1e-3 for distance in moved) >= min(2, len(moved))


@pytest.mark.parametrize("name", [n for n, case in MODULES.items() if case[2] == "stacked"])
def test_every_stackable_module_runs_under_vmap_with_the_same_numbers(name):
    constructor, shape, _ = MODULES[name]
    module, batch = build(constructor), make_batch(RAGGED, shape)
    engine, got = batched(module, batch, "vmap")
    assert engine.rung == "vmap"
    assert_same(got, task_by_task(module, batch), name)


@pytest.mark.parametrize(
    "name", ["mlp relu", "layer norm", "residual", "batch norm 1d", "tied", "conv", "row mean"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"order": 1},
        {"adapted": "head"},
        {"adapted": "body", "order": 1},
        {"rule": SGD(max_grad_norm=0.1)},
        {"row_loss": cross_entropy_rows},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_change_nothing_about_it(name, options):
    constructor, shape, first_rung = MODULES[name]
    module = build(constructor)
    batch = make_batch(RAGGED, shape, n_classes=2 if "row_loss" in options else None)
    engine, got = batched(module, batch, "auto", **options)
    assert engine.rung == first_rung
    expected = task_by_task(module, batch, **options)
    assert_same(got, expected, name)
    # negative control: the option does something
    if "row_loss" not in options:
        plain = task_by_task(module, batch)
        assert (plain["grads"].keys() ^ expected["grads"].keys()) == set()
        assert any(
            not torch.allclose(plain["grads"][n], g, rtol=1e-4)
            for n, g in expected["grads"].items()
        )


@pytest.mark.parametrize("name", ["mlp relu", "residual", "batch norm 1d", "row mean"])
def test_evaluate_is_adapt_then_predict(name):
    constructor, shape, _ = MODULES[name]
    module, batch = build(constructor), make_batch(RAGGED, shape)
    engine = make_engine(module, "auto")
    losses, outputs = engine.evaluate(make_meta_params(module), batch, alpha=0.2, steps=2)
    expected = task_by_task(module, batch, steps=2)["predicted"]
    assert_same(batch.query.real(outputs), expected)
    y = batch.query.real(batch.query.y)
    rows = np.split((expected - y).square().mean(-1).numpy(), np.cumsum(batch.query.lengths)[:-1])
    np.testing.assert_allclose(losses, [r.mean() for r in rows], rtol=1e-10)


@pytest.mark.parametrize("name", ["mlp relu", "residual", "row mean", "batch norm 1d"])
def test_row_weights_equal_repeated_rows(name):
    """A row of weight 2 is a row given twice; a row of weight 0 is none (where rows don't meet)."""
    constructor, shape, _ = MODULES[name]
    module = build(constructor)
    if name in ("row mean", "batch norm 1d"):
        weight = np.full(8, 2.0)  # equal weights, because these modules see the rows themselves
        repeat = np.ones(8, dtype=int)
    else:
        weight = np.array([1.0, 2, 1, 0, 3, 1, 0, 1])
        repeat = weight.astype(int)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(8, *shape)), rng.normal(size=(8, 2))
    weighted = pad_rows(X, y, np.arange(8), np.array([4, 4]), weight)
    rows = np.repeat(np.arange(8), repeat)
    repeated = pad_rows(X, y, rows, np.array([repeat[:4].sum(), repeat[4:].sum()]))
    for rung in ("auto", "loop"):
        engine = make_engine(module, rung)
        params = make_meta_params(module)
        got, expected = (
            engine.adapt(params, support, alpha=0.2, steps=3).params
            for support in (weighted, repeated)
        )
        assert_same(got, expected, rung)


def test_padding_is_harmless_whatever_it_holds():
    for name in ("mlp relu", "layer norm", "conv", "batch norm 1d", "row mean"):
        constructor, shape, _ = MODULES[name]
        module, batch = build(constructor), make_batch(RAGGED, shape)
        _, expected = batched(module, batch, "auto")
        for rows in (batch.support, batch.query):
            for j, length in enumerate(rows.lengths):
                rows.X[j, length:] = 1e3
        engine, got = batched(module, batch, "auto")
        assert engine.rung != "loop"
        assert_same(got, expected, name)


def test_a_single_task_gives_the_same_numbers_on_every_rung():
    for name in ("mlp relu", "residual", "batch norm 1d"):
        constructor, shape, _ = MODULES[name]
        module = build(constructor)
        task = single(make_batch(RAGGED, shape), 1)
        _, got = batched(module, task, "auto")
        assert_same(got, task_by_task(module, task), name)


# --- the silent trap of vmap under plain autograd


def functional_maml_loss(module, params, batch, alpha, adapted):
    """Meta-loss with vmap around the inner step alone, differentiated by plain autograd."""

    def one_task(Xs, ys, Xq, yq):
        def loss(theta, X, y):
            return (functional_call(module, theta, (X,)) - y).square().mean()

        slopes = torch.func.grad(loss)(params, Xs, ys)
        theta = {n: p - alpha * slopes[n] for n, p in params.items()}
        return loss(theta, Xq, yq)

    support, query = batch.support, batch.query
    losses = torch.vmap(one_task)(support.X, support.y, query.X, query.y)
    return losses.mean()


@pytest.mark.parametrize(
    ("name", "constructor", "shape"),
    [
        ("layer norm", *MODULES["layer norm"][:2]),
        ("batch norm", *MODULES["batch norm 1d, no running statistics"][:2]),
        ("instance norm", *MODULES["instance norm"][:2]),
    ],
)
def test_affine_norm_layers_have_exact_second_order_gradients(name, constructor, shape):
    """`torch.vmap` under plain autograd gets these wrong by percents, without a warning."""
    module, batch = build(constructor), make_batch(EQUAL, shape)
    params = make_meta_params(module)
    # as `functional_maml_loss` below: each set with its own statistics
    engines = {
        rung: make_engine(module, rung, batch_norm="transductive") for rung in ("loop", "vmap")
    }
    if name == "layer norm":
        engines["stacked"] = make_engine(module, "stacked")
    steps = {r: e.meta_step(params, batch, alpha=0.2, steps=1) for r, e in engines.items()}

    # finite differences in random directions, of the loss of the plain loop
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}
        ends = [
            engines["loop"]
            .meta_step({n: p + h * way[n] for n, p in params.items()}, batch, alpha=0.2, steps=1)
            .losses.mean()
            .item()
            for h in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        for rung, step in steps.items():
            along = sum(float((step.grads[n] * way[n]).sum()) for n in params)
            assert along == pytest.approx(slope, rel=1e-6), rung

    # negative control: on these data the trap shows
    leaves = {n[7:]: p.clone().requires_grad_() for n, p in params.items()}
    loss = functional_maml_loss(engines["loop"].module, leaves, batch, 0.2, None)
    assert loss.item() == pytest.approx(steps["loop"].losses.mean().item(), rel=1e-10)
    naive = torch.autograd.grad(loss, list(leaves.values()))
    wrong = max(
        float((g - steps["loop"].grads[f"module.{n}"]).abs().max())
        for n, g in zip(leaves, naive, strict=True)
    )
    if wrong < 1e-8:
        pytest.skip(f"torch {torch.__version__} has no such trap for {name}")
    assert wrong > 1e-5


# --- falling back to the loop


@pytest.mark.parametrize(
    ("constructor", "reason"),
    [(Branch, "data-dependent control flow"), (Item, r"\.item\(\)")],
)
@pytest.mark.parametrize("sizes", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_a_module_that_cannot_be_batched_falls_back_once_with_the_reason(
    constructor, reason, sizes
):
    module, batch = build(constructor), make_batch(sizes, (3,))
    params = make_meta_params(module)
    expected = task_by_task(module, batch)
    engine = make_engine(module, "auto")
    assert engine.rung == "vmap"
    with pytest.warns(EngineFallbackWarning, match=reason) as record:
        step = engine.meta_step(params, batch, alpha=0.2, steps=3)
    assert len(record) == 1
    assert constructor.__name__ in str(record[0].message)
    assert engine.rung == "loop"
    assert engine.fallback_reason is not None
    # warnings are errors here: from now on there is none
    adapted = engine.adapt(params, batch.support, alpha=0.2, steps=3)
    again = engine.meta_step(params, batch, alpha=0.2, steps=3)
    got = {
        "losses": step.losses,
        "grads": step.grads,
        "outputs": batch.query.real(step.outputs),
        "adapted": adapted.params,
        "predicted": batch.query.real(engine.predict(adapted, batch.query)),
    }
    assert_same(got, expected)
    assert_same(again.grads, expected["grads"])


def test_falling_back_in_adapt_and_in_predict():
    module, batch = build(Branch), make_batch(EQUAL, (3,))
    params, expected = make_meta_params(module), task_by_task(module, batch)
    engine = make_engine(module, "auto")
    with pytest.warns(EngineFallbackWarning, match="data-dependent") as record:
        adapted = engine.adapt(params, batch.support, alpha=0.2, steps=3)
    assert len(record) == 1
    assert_same(adapted.params, expected["adapted"])
    engine = make_engine(module, "auto")
    with pytest.warns(EngineFallbackWarning, match="data-dependent") as record:
        predicted = engine.predict(adapted, batch.query)
    assert len(record) == 1
    assert_same(batch.query.real(predicted), expected["predicted"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_give_the_numbers_of_the_loop(kind):
    """Whether vmap runs them depends on torch; the numbers don't."""
    module, batch = build(lambda: Recurrent(kind)), make_batch(RAGGED, (3,))
    expected = task_by_task(module, batch)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        engine, got = batched(module, batch, "auto")
    assert_same(got, expected)
    assert [w.category for w in record] == [EngineFallbackWarning] * (engine.rung == "loop")


def test_predictions_that_cannot_be_batched_leave_the_meta_steps_batched(monkeypatch):
    # a GRU runs another kernel where no gradient is asked for, and vmap knows the other one alone
    monkeypatch.setattr(base, "_warned", set())
    module, batch = build(lambda: Recurrent(nn.GRU)), make_batch(EQUAL, (3,))
    params = make_meta_params(module)
    engine = make_engine(module, "auto")
    adapted = engine.adapt(params, batch.support, alpha=0.2, steps=1)
    with pytest.warns(EngineFallbackWarning, match="cannot predict for a batch") as record:
        outputs = [engine.predict(adapted, batch.query) for _ in range(2)]
    assert len(record) == 1
    assert engine.rung == "vmap"
    loop = make_engine(module, "loop").predict(adapted, batch.query)
    torch.testing.assert_close(outputs, [loop, loop], rtol=1e-12, atol=0)


def test_an_error_of_the_module_itself_is_raised_as_it_is():
    module, batch = build(Broken), make_batch(EQUAL, (3,))
    engine = make_engine(module, "auto")
    with pytest.raises(RuntimeError, match="this module is broken"):
        engine.meta_step(make_meta_params(module), batch, alpha=0.2, steps=1)
    assert engine.rung == "vmap"  # no fault of the rung


def test_one_fit_warns_once_about_the_fallback():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(72, 3)), rng.normal(size=(72, 2))
    groups = np.repeat(np.arange(12), 6)
    reg = MAMLRegressor(
        Branch, update_rule="sgd", steps=1, max_iter=60, meta_batch_size=4, random_state=0
    )
    with pytest.warns(EngineFallbackWarning, match="data-dependent") as record:
        reg.fit(X, y, groups=groups)  # trains and validates
    assert len(record) == 1
    assert "valid_loss" in reg.history_[-1]


def test_adapting_a_fitted_model_does_not_warn_about_the_fallback_again():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 3)), rng.normal(size=(24, 2))
    groups = np.repeat(np.arange(4), 6)
    reg = MAMLRegressor(
        Branch, update_rule="sgd", steps=1, max_iter=3, meta_batch_size=4, random_state=0
    )
    with pytest.warns(EngineFallbackWarning):
        reg.fit(X, y, groups=groups)
    reg.adapt(X, y, groups=groups).predict(X, groups=groups)
    assert np.isfinite(reg.score(X, y, groups=groups))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_is_trained_to_second_order_on_any_kernel():
    """The CPU's flash kernel has no second derivative; the user need not know."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 3)), rng.normal(size=(24, 2))
    groups = np.repeat(np.arange(4), 6)
    options = {
        "update_rule": "sgd",
        "steps": 1,
        "max_iter": 3,
        "meta_batch_size": 4,
        "random_state": 0,
    }
    reg = MAMLRegressor(Attention, **options).fit(X, y, groups=groups)
    with sdpa_kernel(SDPBackend.MATH):
        exact = MAMLRegressor(Attention, **options).fit(X, y, groups=groups)
    for p, q in zip(reg.module_.parameters(), exact.module_.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


# --- batch norm


@pytest.mark.parametrize(
    "name", ["batch norm 1d", "batch norm 1d, not affine", "batch norm 2d", "batch norm 1d float32"]
)
def test_batch_norm_predictions_do_not_depend_on_the_other_query_rows(name):
    name, _, dtype = name.partition(" float")
    constructor, shape, _ = MODULES[name]
    module, batch = build(constructor), make_batch(EQUAL, shape)
    if dtype:
        module = module.float()
        batch = EpisodeBatch(
            *(
                pad_rows(s.X.flatten(0, 1).float().numpy(), s.y.flatten(0, 1).float().numpy(),
                         np.arange(s.X.shape[0] * s.X.shape[1]), np.full(3, s.X.shape[1]))
                for s in (batch.support, batch.query)
            )
        )  # fmt: skip
    for rung in ("auto", "loop"):
        engine = make_engine(module, rung)
        adapted = engine.adapt(make_meta_params(module), batch.support, alpha=0.2, steps=2)
        together = engine.predict(adapted, batch.query)
        for row in range(3):
            query = EpisodeBatch(batch.support, batch.query).query
            alone = type(query)(query.X[:, row : row + 1], query.y[:, row : row + 1])
            torch.testing.assert_close(
                engine.predict(adapted, alone)[:, 0], together[:, row], rtol=1e-5, atol=1e-6
            )
        # negative control: with the statistics of the query rows it would be otherwise
        one = copy.deepcopy(engine.module).train()
        params, _ = adapted.task(0)
        with torch.no_grad():
            own = functional_call(one, params, (batch.query.X[0],))
        assert (own - together[0]).abs().max() > 1e-2


def test_batch_norm_predicts_with_the_statistics_of_the_support_set():
    """On the support rows themselves both are the same thing."""
    for name in ("batch norm 1d", "batch norm 2d", "batch norm 1d, no running statistics"):
        constructor, shape, _ = MODULES[name]
        module, batch = build(constructor), make_batch(EQUAL, shape)
        engine = make_engine(module, "auto")
        adapted = engine.adapt(make_meta_params(module), batch.support, alpha=0.2, steps=2)
        predicted = engine.predict(adapted, batch.support)
        training = copy.deepcopy(engine.module).train()
        for j in range(3):
            params, _ = adapted.task(j)
            with torch.no_grad():
                expected = functional_call(training, params, (batch.support.X[j],))
            torch.testing.assert_close(predicted[j], expected, rtol=1e-9, atol=1e-9)


# --- the module of the user


class Everything(nn.Module):
    """Batch norm with running statistics, dropout, a hook and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(self.dropout(self.norm(self.first(x))))))


@pytest.mark.parametrize("training", [True, False])
def test_an_instance_of_a_module_is_not_changed_by_fit(training):
    torch.manual_seed(0)
    module = Everything().train(training)
    before = copy.deepcopy(module.state_dict())
    requires = [p.requires_grad for p in module.parameters()]
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(48, 3)), rng.normal(size=(48, 2))
    groups = np.repeat(np.arange(6), 8)
    reg = MAMLRegressor(
        module, update_rule="sgd", steps=1, max_iter=5, meta_batch_size=3, random_state=0
    )
    reg.fit(X, y, groups=groups).adapt(X, y, groups=groups).predict(X, groups=groups)
    reg.score(X, y, groups=groups)
    assert reg.module is module
    assert module.state_dict().keys() == before.keys()
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert module.training is training
    assert all(m.training is training for m in module.modules())
    assert [p.requires_grad for p in module.parameters()] == requires
    assert all(p.grad is None for p in module.parameters())
    for m in module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
    assert not torch.equal(reg.module_.first.weight, module.first.weight)
    assert torch.equal(reg.module_.frozen.weight, module.frozen.weight.double())


def test_a_class_is_built_afresh_by_every_fit():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 3)), rng.integers(0, 2, 24)
    groups = np.repeat(np.arange(4), 6)
    clf = MAMLClassifier(Residual, update_rule="sgd", steps=1, max_iter=5, random_state=0)
    first = copy.deepcopy(clf.fit(X, y, groups=groups).module_)
    second = clf.fit(X, y, groups=groups).module_
    assert type(second) is Residual
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_dropout_acts_in_training_and_not_in_predictions():
    module = build(lambda: nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 2)))
    params, batch = make_meta_params(module), make_batch(EQUAL, (3,))
    for rung in ("loop", "vmap", "stacked"):
        engine = make_engine(module, rung)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses = [
                engine.meta_step(params, batch, alpha=0.1, steps=1).losses.mean().item()
                for _ in range(2)
            ]
        assert losses[0] != losses[1]
        # tasks with the same rows drop different units
        same = EpisodeBatch(*(part.take(np.array([0, 0])) for part in (batch.support, batch.query)))
        twice = engine.meta_step(params, same, alpha=0.1, steps=1).losses
        assert twice[0] != twice[1]
        adapted = [engine.adapt(params, batch.support, alpha=0.1, steps=2) for _ in range(2)]
        assert_same(adapted[0].params, adapted[1].params)
        predicted = [engine.predict(adapted[0], batch.query) for _ in range(2)]
        assert torch.equal(*predicted)


# --- state


@pytest.mark.parametrize("name", ["mlp relu", "residual", "batch norm 1d"])
def test_a_pickled_engine_predicts_the_same(name):
    constructor, shape, _ = MODULES[name]
    module, batch = build(constructor), make_batch(RAGGED, shape)
    engine = make_engine(module, "auto")
    adapted = engine.adapt(make_meta_params(module), batch.support, alpha=0.2, steps=2)
    expected = engine.predict(adapted, batch.query)
    copied, state = pickle.loads(pickle.dumps((engine, adapted)))
    assert torch.equal(copied.predict(state, batch.query), expected)


def test_taking_some_of_the_adapted_tasks():
    for name in ("mlp relu", "batch norm 1d"):
        constructor, shape, _ = MODULES[name]
        module, batch = build(constructor), make_batch(EQUAL, shape)
        engine = make_engine(module, "auto")
        adapted = engine.adapt(make_meta_params(module), batch.support, alpha=0.2, steps=2)
        assert adapted.n_tasks == 3
        which = np.array([2, 0, 2])
        taken = adapted.take(which)
        assert taken.n_tasks == 3
        whole = engine.predict(adapted, batch.query)
        for place, j in enumerate(which):
            query = batch.query.take(np.array([j] * 3))
            torch.testing.assert_close(
                engine.predict(taken, query)[place], whole[j], rtol=1e-12, atol=1e-12
            )


def test_small_passes_run_on_one_thread_and_give_the_threads_back():
    module = build(MODULES["mlp relu"][0])
    engine = make_engine(module, "auto")
    before = torch.get_num_threads()
    with engine.threads(n_rows=10):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with engine.threads(n_rows=10**9):
        assert torch.get_num_threads() == before
    with one_thread(), engine.threads(n_rows=10**9):  # as inside a public call
        assert torch.get_num_threads() == before


class Slow(Residual):
    """Gives other threads time to come in between its two layers."""

    def forward(self, x):
        z = x + torch.tanh(self.first(x))
        time.sleep(0.002)
        return self.second(z)


@pytest.mark.parametrize("module", [None, Slow], ids=["default", "slow"])
@pytest.mark.parametrize("shared", [True, False])
def test_threads_do_not_disturb_each_other(module, shared):
    """`functional_call` puts parameters into the module for a while: modules can't be shared."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 3)), rng.normal(size=(24, 2))
    groups = np.repeat(np.arange(4), 6)
    reg = MAMLRegressor(module, update_rule="sgd", alpha=0.3, steps=2, max_iter=3, random_state=0)
    reg.fit(X, y, groups=groups)
    tasks = [(X[groups == j], y[groups == j]) for j in range(4)]
    expected = [adapt(reg, *task).predict(X) for task in tasks]
    reg.adapt(*tasks[0])

    def work(i):
        if shared:
            return np.array_equal(reg.predict(X), expected[0])
        return np.array_equal(adapt(reg, *tasks[i % 4]).predict(X), expected[i % 4])

    with ThreadPoolExecutor(4) as pool:
        right = list(pool.map(work, range(24)))
    assert all(right)
    assert np.array_equal(adapt(reg, *tasks[1]).predict(X), expected[1])


def test_out_of_memory_is_not_taken_for_a_module_that_cannot_be_batched(monkeypatch):
    module, batch = build(Residual), make_batch(EQUAL, (3,))
    engine = make_engine(module, "auto")

    def exhausted(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Vmap, "meta_step", exhausted)
    with pytest.warns(EngineFallbackWarning, match="memory did not suffice"):
        engine.meta_step(make_meta_params(module), batch, alpha=0.1, steps=1)
    assert engine.rung == "vmap"
    assert engine.fallback_reason is None


def test_a_copy_of_layers_of_torch_shares_parameters_and_nothing_else():
    inner = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1))
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), inner, nn.Linear(4, 2))
    own, deep = private_copy(module, plain=True), private_copy(module, plain=False)
    assert repr(own) == repr(deep)
    for copied in (own, deep):
        pairs = zip(copied.parameters(), module.parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
    own.eval()
    own[2].append(nn.Tanh())
    own[0].register_forward_hook(lambda *_: None)
    own[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert module.training
    assert module[1].inplace
    assert len(module[2]) == 2
    assert not module[0]._forward_hooks
    assert module[0].weight.any()
