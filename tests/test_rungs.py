"""Traced meta-steps give the numbers of the plain loop, or the engine says why it traces none."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from builders import build, make_engine, make_meta_params
from test_engine import (
    EQUAL,
    MODULES,
    RAGGED,
    Branch,
    Recurrent,
    assert_same,
    functional_maml_loss,
    make_batch,
    task_by_task,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sklearn_maml import MAMLRegressor
from sklearn_maml.engine import is_row_wise, ladder
from sklearn_maml.engine.rungs import traced
from sklearn_maml.engine.rungs.loop import Loop
from sklearn_maml.engine.tracing import graphs, tracer
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.targets.losses import cross_entropy_rows
from sklearn_maml.update_rules import SGD, MetaSGD

# torch says so of operations that vmap runs one task at a time
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.fixture(autouse=True)
def nothing_traced_yet(monkeypatch):
    monkeypatch.setattr(graphs, "_cache", type(graphs._cache)())


def traced_steps(module, batch, n=3, *, rung="traced", alpha=0.2, steps=3, **options):
    """Engine and its last meta-step; the first is eager, and traces."""
    runner = make_engine(module, rung, **options)
    params = make_meta_params(module)
    for _ in range(n):
        step = runner.meta_step(params, batch, alpha=alpha, steps=steps)
    return runner, step


def as_dict(step, batch):
    return {
        "losses": step.losses,
        "grads": step.grads,
        "outputs": batch.query.real(step.outputs),
    }


class TwoLayers(nn.Module):
    """Base of the modules below, which say what happens between the layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def between(self, z):
        return z

    def forward(self, x):
        return self.second(self.between(torch.tanh(self.first(x))))


class Wrapped(TwoLayers):
    """A layer in a module of one's own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def between(self, z):
        return self.layer(z)


class Counting(TwoLayers):
    """Counts its calls in Python and computes with the number."""

    calls = 0

    def between(self, z):
        self.calls += 1
        return z * self.calls


class Switching(TwoLayers):
    """Decides by the value of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("switch", torch.tensor(1.0))

    def between(self, z):
        return torch.sin(z) if self.switch > 0 else torch.cos(z)


class PythonNoise(TwoLayers):
    def between(self, z):
        return z * random.random()


class NumpyNoise(TwoLayers):
    def between(self, z):
        return z * np.random.random()


class HiddenTensor(TwoLayers):
    """Computes with a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    def between(self, z):
        return z * self.scale


class InPlace(TwoLayers):
    def between(self, z):
        z = z.clone()
        z += 1
        return z.mul_(2)


class Literal(TwoLayers):
    def between(self, z):
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=z.dtype)
        return z * weights + torch.arange(4, dtype=z.dtype)


class InTraining(TwoLayers):
    def between(self, z):
        return torch.sin(z) if self.training else z


class Undifferentiated(TwoLayers):
    def between(self, z):
        with torch.no_grad():
            scale = z.abs().amax()
        return z / scale


FACTOR = 1.0


class ReadsGlobal(TwoLayers):
    def between(self, z):
        return z * FACTOR


class GroupOnInit(TwoLayers):
    """Two of these differ in a number alone."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def between(self, z):
        return z**self.power


EXTRA = {
    "rms norm": lambda: Wrapped(nn.RMSNorm(4)),
    "layer norm in a module": lambda: Wrapped(nn.LayerNorm(4)),
    "buffers are arguments": MODULES["buffer"][0],
    "in place": InPlace,
    "literals": Literal,
    "training": InTraining,
    "no_grad": Undifferentiated,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "encoder layer": lambda: Wrapped(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)),
}
CASES = {**{n: case[:2] for n, case in MODULES.items()}, **{n: (c, (3,)) for n, c in EXTRA.items()}}


# --- the numbers


@pytest.mark.parametrize("name", CASES)
def test_traced_equals_the_unpadded_loop(name):
    constructor, shape = CASES[name]
    module = build(constructor)
    # unequal tasks where they are padded, so that one graph runs them all
    batch = make_batch(
        RAGGED if is_row_wise(module) else EQUAL, shape, n_outputs=1 if name == "one output" else 2
    )
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel of CPUs has no second derivative
        expected = task_by_task(module, batch, steps=2)
        runner, step = traced_steps(module, batch, steps=2)
    assert runner.fallback_reason is None
    assert runner.tracer.reason is None
    assert runner.tracer.n_traced == 1
    assert_same(as_dict(step, batch), {n: expected[n] for n in ("losses", "grads", "outputs")})


@pytest.mark.parametrize(
    "options",
    [
        {"order": 1},
        {"adapted": "head"},
        {"rule": SGD(max_grad_norm=0.1)},
        {"row_loss": cross_entropy_rows},
        {"steps": 0},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("name", ["layer norm", "residual", "batch norm 1d", "tied"])
def test_options_are_traced_with_the_same_numbers(name, options):
    constructor, shape, _ = MODULES[name]
    module = build(constructor)
    batch = make_batch(RAGGED, shape, n_classes=2 if "row_loss" in options else None)
    expected = task_by_task(module, batch, **options)
    runner, step = traced_steps(module, batch, **options)
    assert runner.tracer.n_traced == 1
    assert_same(step.grads, expected["grads"])


def test_learned_rates_are_traced():
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    rates = {
        f"rule.{n.replace('.', '__')}": torch.full_like(p, -0.3).detach()
        for n, p in module.named_parameters()
    }
    params = {**make_meta_params(module), **rates}
    steps = {}
    for rung in ("loop", "traced"):
        runner = make_engine(module, rung, rule=MetaSGD())
        for _ in range(2):
            steps[rung] = runner.meta_step(params, batch, alpha=0.2, steps=2)
    assert runner.tracer.n_traced == 1
    assert_same(steps["traced"].grads, steps["loop"].grads)
    assert any(float(g.abs().max()) > 1e-6 for n, g in steps["loop"].grads.items() if n in rates)


def test_a_traced_graph_reads_the_parameters_rows_and_buffers_it_is_given():
    first, second = (build(MODULES["buffer"][0], seed) for seed in (0, 1))
    second.scale.mul_(3.0)
    traced_steps(first, make_batch(EQUAL, (3,), seed=0))
    batch = make_batch(EQUAL, (3,), seed=1)
    runner, step = traced_steps(second, batch, n=2)
    assert runner.tracer.n_traced == 1
    assert len(graphs._cache) == 1
    assert_same(step.grads, task_by_task(second, batch)["grads"])


def test_rows_that_do_not_lie_in_order_in_memory():
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    runner, step = traced_steps(module, batch)
    turned = copy.deepcopy(batch)
    for rows in (turned.support, turned.query):
        object.__setattr__(rows, "X", rows.X.transpose(0, 2).contiguous().transpose(0, 2))
        assert not rows.X.is_contiguous()
    again = runner.meta_step(make_meta_params(module), turned, alpha=0.2, steps=3)
    assert_same(again.grads, step.grads)


class StridedConvolution(nn.Module):
    """Its kernel reads memory by the strides of its input."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.output = nn.Linear(12, 2)

    def forward(self, X):
        return self.output(torch.relu(self.convolution(X)).flatten(1))


def test_a_first_batch_that_does_not_lie_in_order_is_traced():
    module, batch = build(StridedConvolution), make_batch(EQUAL, (1, 4, 4))
    turned = copy.deepcopy(batch)
    for rows in (turned.support, turned.query):
        object.__setattr__(rows, "X", rows.X.transpose(0, 4).contiguous().transpose(0, 4))
        assert not rows.X.is_contiguous()
    runner, step = traced_steps(module, turned)
    assert runner.tracer.n_traced == 1
    assert_same(step.grads, task_by_task(module, batch)["grads"])


def test_results_can_be_written_to():
    """The outer loop scales gradients in place."""
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    runner, step = traced_steps(module, batch)
    expected = {n: g.clone() for n, g in step.grads.items()}
    for values in (*step.grads.values(), step.losses, step.outputs):
        values.mul_(0.0)
    step = runner.meta_step(make_meta_params(module), batch, alpha=0.2, steps=3)
    assert_same(step.grads, expected)


@pytest.mark.parametrize("name", ["layer norm", "batch norm 1d, no running statistics"])
def test_norm_layers_are_right_where_the_obvious_trace_is_wrong(name):
    """`torch.vmap` differentiated by plain autograd is wrong by percents, without a warning."""
    module, batch = build(MODULES[name][0]), make_batch(EQUAL, (3,))
    expected = task_by_task(module, batch, steps=1)["grads"]
    _, step = traced_steps(module, batch, steps=1)
    assert_same(step.grads, expected)
    runner = make_engine(module, "loop")
    leaves = {n[7:]: p.clone().requires_grad_() for n, p in make_meta_params(module).items()}
    loss = functional_maml_loss(runner.module, leaves, batch, 0.2, None)
    naive = torch.autograd.grad(loss, list(leaves.values()))
    wrong = max(
        float((g - expected[f"module.{n}"]).abs().max()) for n, g in zip(leaves, naive, strict=True)
    )
    if wrong < 1e-8:
        pytest.skip(f"torch {torch.__version__} has no such trap for {name}")
    assert wrong > 1e-5


# --- random numbers


@pytest.mark.parametrize("layer", [nn.Dropout, nn.AlphaDropout], ids=lambda kind: kind.__name__)
def test_dropout_draws_as_the_eager_step_does(layer):
    module, batch = build(lambda: Wrapped(layer(0.5))), make_batch(EQUAL, (3,))
    params, losses, states = make_meta_params(module), {}, {}
    for rung in ("vmap", "traced"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            runner = make_engine(module, rung)
            losses[rung] = [
                runner.meta_step(params, batch, alpha=0.2, steps=2).losses for _ in range(4)
            ]
            states[rung] = torch.get_rng_state()
    assert runner.tracer.n_traced == 1
    assert torch.equal(states["vmap"], states["traced"])
    for a, b in zip(losses["vmap"], losses["traced"], strict=True):
        assert_same(b, a)
    assert not torch.allclose(losses["traced"][2], losses["traced"][3])


# --- falling back to the untraced step


@pytest.mark.parametrize(
    ("constructor", "reason"),
    [
        (Counting, "Python state"),
        (PythonNoise, "Python state"),
        (NumpyNoise, "Python state"),
        (Switching, "data-dependent|guard"),
        (HiddenTensor, "no parameter and no buffer"),
    ],
)
def test_what_cannot_be_traced_runs_untraced_and_says_so_once(constructor, reason):
    module, batch = build(constructor), make_batch(EQUAL, (3,))
    params, got = make_meta_params(module), {}
    python, numpy = random.getstate(), np.random.get_state()
    for rung in ("vmap", "traced"):
        random.seed(0)
        np.random.seed(0)
        runner = make_engine(module, rung)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            got[rung] = [runner.meta_step(params, batch, alpha=0.2, steps=2) for _ in range(3)]
    random.setstate(python)
    np.random.set_state(numpy)
    assert [w.category for w in record] == [EngineFallbackWarning]
    assert constructor.__name__ in str(record[0].message)
    assert runner.rung == "vmap"
    assert runner.tracer.n_traced == 0
    assert runner.tracer.reason in str(record[0].message)
    assert re.search(reason, runner.tracer.reason)
    for a, b in zip(got["vmap"], got["traced"], strict=True):
        assert_same(b.grads, a.grads)


def test_what_vmap_cannot_run_falls_to_the_loop_as_ever():
    module, batch = build(Branch), make_batch(EQUAL, (3,))
    with pytest.warns(EngineFallbackWarning, match="data-dependent") as record:
        runner, step = traced_steps(module, batch)
    assert len(record) == 1
    assert runner.rung == "loop"
    assert_same(step.grads, task_by_task(module, batch)["grads"])


def test_spectral_norm_gives_the_numbers_of_the_loop():
    """Its power iteration writes to buffers, whether or not torch can batch that."""

    def constructor():
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))

    module, batch = build(constructor), make_batch(EQUAL, (3,))
    params, losses = make_meta_params(module), {}
    for rung in ("loop", "traced"):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            runner = make_engine(module, rung)
            losses[rung] = runner.meta_step(params, batch, alpha=0.2, steps=2).losses
    assert runner.rung == "loop"
    assert [w.category for w in record] == [EngineFallbackWarning]
    assert torch.isfinite(losses["traced"]).all()


def test_a_torch_without_the_private_parts_runs_untraced(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.proxy_tensor", None)
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    with pytest.warns(EngineFallbackWarning, match="lacks"):
        runner, step = traced_steps(module, batch)
    assert runner.tracer.n_traced == 0
    assert_same(step.grads, task_by_task(module, batch)["grads"])


def test_a_graph_that_disagrees_with_the_module_is_not_used(monkeypatch):
    def wrong(function, inputs):
        return lambda *tensors: [t + 1e-3 for t in function(*tensors)]

    monkeypatch.setattr(graphs, "trace", wrong)
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    with pytest.warns(EngineFallbackWarning, match="other numbers"):
        runner, step = traced_steps(module, batch)
    assert runner.tracer.n_traced == 0
    assert_same(step.grads, task_by_task(module, batch)["grads"])


# --- sharing graphs


def test_a_graph_of_the_cache_is_checked_against_the_module(monkeypatch):
    """A global that the module reads is no part of the key."""
    batch = make_batch(EQUAL, (3,))
    module = build(ReadsGlobal)
    traced_steps(module, batch)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    _, step = traced_steps(module, batch)
    assert_same(step.grads, task_by_task(module, batch)["grads"])


def test_modules_that_differ_in_a_number_do_not_share_graphs():
    batch = make_batch(EQUAL, (3,))
    for power in (2, 3, 2):
        module = build(functools.partial(GroupOnInit, power))
        _, step = traced_steps(module, batch)
        assert_same(step.grads, task_by_task(module, batch)["grads"])
    assert len(graphs._cache) == 2
    assert graphs.module_key(build(TwoLayers)) == graphs.module_key(build(TwoLayers, seed=1))


def test_alpha_steps_and_shapes_have_graphs_of_their_own():
    module, runner = build(TwoLayers), None
    for alpha, steps, sizes in [
        (0.2, 1, EQUAL),
        (0.1, 1, EQUAL),
        (0.2, 2, EQUAL),
        (0.2, 1, ([5, 5], [2, 2])),
    ]:
        batch = make_batch(sizes, (3,))
        runner = runner or make_engine(module, "traced")
        for _ in range(2):
            step = runner.meta_step(make_meta_params(module), batch, alpha=alpha, steps=steps)
        expected = task_by_task(module, batch, alpha=alpha, steps=steps)
        assert_same(step.grads, expected["grads"])
    assert runner.tracer.n_traced == 4


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    batch = make_batch(EQUAL, (3,))
    for alpha in (0.1, 0.2, 0.3):
        traced_steps(build(TwoLayers), batch, n=1, alpha=alpha, steps=1)
    assert len(graphs._cache) == 2


def test_graphs_are_shared_by_threads():
    module = build(TwoLayers)
    batches = [make_batch(EQUAL, (3,), seed=seed) for seed in range(4)]
    expected = [task_by_task(module, batch)["grads"] for batch in batches]

    def work(k):
        runner, _ = traced_steps(module, batches[k])
        params = make_meta_params(module)
        steps = [runner.meta_step(params, batches[k], alpha=0.2, steps=3) for _ in range(20)]
        return runner.tracer.n_traced, [step.grads for step in steps]

    with ThreadPoolExecutor(4) as pool:
        for (n_traced, grads), right in zip(pool.map(work, range(4)), expected, strict=True):
            assert n_traced == 1
            for g in grads:
                assert_same(g, right)
    assert len(graphs._cache) == 1


def test_an_engine_with_graphs_can_be_pickled_and_copied():
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    runner, step = traced_steps(module, batch)
    for other in (pickle.loads(pickle.dumps(runner)), copy.deepcopy(runner)):
        assert other.tracer.n_traced == 0
        again = other.meta_step(make_meta_params(module), batch, alpha=0.2, steps=3)
        assert_same(again.grads, step.grads)


# --- when to climb


def test_tracing_waits_until_a_shape_has_recurred_and_enough_is_to_come():
    module, params = build(TwoLayers), None
    often, seldom = make_batch(EQUAL, (3,)), make_batch(([5, 5], [2, 2]), (3,))
    params = make_meta_params(module)
    runner = make_engine(module, "auto")
    runner.tracer.min_updates, runner.tracer.min_seen = 10, 3
    runner.tracer.updates_left = 20
    counts = []
    for k in range(20):
        runner.meta_step(params, seldom if k % 4 == 3 else often, alpha=0.2, steps=1)
        counts.append(runner.tracer.n_traced)
    # `often` at its third time; `seldom` is to come fewer than ten times
    assert counts == [0, 0, *[1] * 18]


def test_nothing_is_traced_unless_asked_for():
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    runner, _ = traced_steps(module, batch, n=10, rung="auto")
    assert runner.tracer.n_traced == 0
    runner.tracer.updates_left = tracer.MIN_UPDATES - 1
    runner.meta_step(make_meta_params(module), batch, alpha=0.2, steps=3)
    assert runner.tracer.n_traced == 0


def fit_custom(**options):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 3)), rng.normal(size=(80, 2))
    reg = MAMLRegressor(
        TwoLayers,
        update_rule="sgd",
        steps=1,
        meta_batch_size=4,
        n_shots=4,
        random_state=0,
        **options,
    )
    return reg.fit(X, y, groups=np.repeat(np.arange(8), 10))


def coefficients(reg):
    return torch.cat([p.detach().flatten() for p in reg.module_.parameters()])


def test_a_long_fit_climbs_and_learns_the_same(monkeypatch):
    seen = []

    class Eager(tracer.Tracer):
        def __init__(self, *args):
            super().__init__(5, 2)
            seen.append(self)

    plain = coefficients(fit_custom(max_iter=30))
    monkeypatch.setattr(traced, "Tracer", Eager)
    cold, warm = (coefficients(fit_custom(max_iter=30)) for _ in range(2))
    assert max(tracer.n_traced for tracer in seen) == 1
    assert len(graphs._cache) == 1
    assert torch.equal(cold, warm)  # whether the process had the graph makes no difference
    torch.testing.assert_close(cold, plain, rtol=1e-9, atol=1e-12)


def test_a_short_fit_traces_nothing():
    fit_custom(max_iter=50)
    assert not graphs._cache


def test_batches_with_diverging_tasks_wait():
    module, batch = build(TwoLayers), make_batch(EQUAL, (3,))
    runner = make_engine(module, "traced")
    params = make_meta_params(module)
    runner.meta_step(params, batch, alpha=float("inf"), steps=1)
    assert runner.tracer.n_traced == 0
    assert runner.tracer.reason is None


# --- a rung from outside


def test_a_rung_is_one_class_and_one_line(monkeypatch):
    sizes = []

    class Own(Loop):
        name = "own"

        @classmethod
        def refuses(cls, spec):
            return None if type(spec.module) is nn.Linear else "it is for one layer"

        def takes(self, step, *sets):
            return step.steps < 3

        def meta_step(self, meta_params, batch, step):
            sizes.append(len(batch))
            return super().meta_step(meta_params, batch, step)

    monkeypatch.setattr(ladder, "RUNGS", [Own, *ladder.RUNGS])
    module, batch = build(lambda: nn.Linear(3, 2)), make_batch(EQUAL, (3,))
    params = make_meta_params(module)
    for rung in ("auto", "own"):
        runner = make_engine(module, rung)
        assert runner.rung == "own"
        for steps in (2, 3):  # what it does not take runs below
            got, expected = (
                e.meta_step(params, batch, alpha=0.1, steps=steps)
                for e in (runner, make_engine(module, "loop"))
            )
            torch.testing.assert_close(got.grads, expected.grads)
    assert sizes == [len(batch)] * 2
    other = build(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    assert make_engine(other, "auto").rung == "stacked"
    with pytest.raises(ValueError, match=r"rung='own' cannot be used here. Reason: it is for one"):
        make_engine(other, "own")
    with pytest.raises(ValueError, match=r"rung='none' is not known. Expected 'auto' or one of"):
        make_engine(other, "none")
