"""Recomputed inner steps and meta-batches in chunks: the same numbers, from less memory."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from builders import build, make_batch, make_engine, make_meta_params
from networks import Residual
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.engine import Engine
from sklearn_maml.engine import engine as engine_module
from sklearn_maml.engine.rungs.base import Rung
from sklearn_maml.engine.rungs.loop import Loop
from sklearn_maml.engine.rungs.native import Native
from sklearn_maml.engine.rungs.stacked import Stacked
from sklearn_maml.engine.rungs.vmap import Vmap
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.meta_gradients import FirstOrder, MetaGradient
from sklearn_maml.update_rules import SGD, MetaSGD, UpdateRule

RUNGS = ["loop", "vmap", "stacked"]
SIZES = {"equal": ([5, 5, 5], [4, 4, 4]), "ragged": ([5, 3, 5, 4], [4, 6, 4, 2])}
TOLERANCE = 1e-12


# --- rules, modules and meta-gradients of users


class Momentum(UpdateRule):
    """Momentum with a learned decay, and a pull to where it started: state of several kinds."""

    def initial_rates(self, params, steps=1, classification=False):
        return {name: p.new_full((), 0.1) for name, p in params.items()}

    def start(self, params):
        still = {name: torch.zeros_like(p) for name, p in params.items()}
        return {"anchor": dict(params), "moving": (still, 0)}

    def step(self, k, params, grads, *, alpha, rates, state, batched):
        velocity, seen = state["moving"]
        assert seen == k
        velocity = {n: rates[n].sin() * v + grads[n] for n, v in velocity.items()}
        new = {
            n: p - alpha * velocity[n] + 0.05 * (state["anchor"][n] - p) ** 2
            for n, p in params.items()
        }
        return new, {"anchor": state["anchor"], "moving": (velocity, seen + 1)}


class Opaque(SGD):
    """State that cannot be looked into."""

    def start(self, params):
        return object()


class Counting(nn.Module):
    """Changes a buffer whenever it runs, and computes with it."""

    def __init__(self, in_place):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.ones(()))
        self.in_place = in_place

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return torch.tanh(self.linear(x)) * self.calls.clone()


class Regularised(MetaGradient):
    """Looks at the initialisation, and adapts twice, once from elsewhere."""

    order = 2

    def loss_and_grad(self, meta_params, problem):
        def loss(meta):
            near, aux = problem.query_loss(problem.adapt(meta, 2))
            far, _ = problem.query_loss(problem.adapt({n: 1.1 * p for n, p in meta.items()}, 2))
            return near + far + sum(p.square().sum() for p in meta.values()), aux

        return problem.value_and_grad(loss, meta_params)


RULES = {
    "sgd": SGD(),
    "clipped": SGD(max_grad_norm=0.3),
    "meta-sgd": MetaSGD(),
    "meta-sgd per tensor, clipped": MetaSGD(per="tensor", max_grad_norm=0.3),
    "momentum": Momentum(),
}
# name: (module, shape of a row, rung that batches it)
MODULES = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (2,),
        "stacked",
    ),
    "layer norm, vmap": (
        lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (2,),
        "vmap",
    ),
    "residual": (lambda: Residual(2, 2), (2,), "vmap"),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(48, 2),
        ),
        (1, 4, 4),
        "vmap",
    ),
    "batch norm with running statistics": (
        lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        (2,),
        "vmap",
    ),
}


# --- helpers


def make_mlp(dropout=0.0, width=4):
    return build(
        lambda: nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 2)
        )
    )


def make_batch_norm():
    return build(MODULES["batch norm with running statistics"][0])


def meta_step(module, batch, *, rule=None, adapted="all", alpha=0.2, steps=3, **options):
    engine = make_engine(module, rule=rule, adapted=adapted, **options)
    params = make_meta_params(module, rule, adapted)
    step = engine.meta_step(params, batch, alpha=alpha, steps=steps)
    assert engine.fallback_reason is None
    return step


def difference(got, expected):
    """Largest difference of a gradient, relative to the largest entry."""
    assert sorted(got) == sorted(expected)
    assert all(got[n].shape == g.shape for n, g in expected.items())
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((got[n] - g).abs().max()) for n, g in expected.items()) / scale


def assert_same(got, expected, batch):
    """Compare meta-steps; what they put in padding rows is of no account."""
    assert difference(got.grads, expected.grads) <= TOLERANCE
    torch.testing.assert_close(got.losses, expected.losses, rtol=TOLERANCE, atol=0)
    assert got.outputs.shape == expected.outputs.shape
    real, got_real = batch.query.real(expected.outputs), batch.query.real(got.outputs)
    torch.testing.assert_close(got_real, real, rtol=TOLERANCE, atol=1e-14)


class LiveBytes(TorchDispatchMode):
    """Largest total size of the tensors that were alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return result


# --- recomputed steps: the gradient is the plain one


@pytest.mark.parametrize("adapted", ["all", "head", "body"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rung", RUNGS)
def test_recomputed_steps_give_the_plain_gradient(rung, rule, sizes, adapted):
    module, batch = make_mlp(), make_batch(SIZES[sizes])
    for steps in (0, 1, 4):
        options = {"rung": rung, "rule": RULES[rule], "adapted": adapted, "steps": steps}
        plain = meta_step(module, batch, **options)
        assert_same(meta_step(module, batch, checkpoint_steps=True, **options), plain, batch)
    # negative control: the curvature terms, of which recomputation could lose some, are large
    first = meta_step(module, batch, **options, meta_gradient=FirstOrder())
    assert difference(first.grads, plain.grads) > 1e-3


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODULES)
def test_recomputed_steps_work_for_modules_of_many_kinds(name, sizes):
    constructor, shape, rung = MODULES[name]
    module, batch = build(constructor), make_batch(SIZES[sizes], shape)
    plain = meta_step(module, batch, rung="loop")
    for each in ("loop", rung):
        assert_same(meta_step(module, batch, rung=each, checkpoint_steps=True), plain, batch)


def test_frozen_parameters_take_no_part_in_the_sweep():
    module = make_mlp()
    module[0].requires_grad_(False)
    batch = make_batch()
    for rung in RUNGS:
        plain = meta_step(module, batch, rung=rung)
        assert set(plain.grads) == {"module.3.weight", "module.3.bias"}
        assert_same(meta_step(module, batch, rung=rung, checkpoint_steps=True), plain, batch)


@pytest.mark.parametrize("rung", RUNGS)
def test_recomputation_leaves_first_order_gradients_as_they_are(rung):
    module, batch = make_mlp(), make_batch()
    plain, checkpointed = (
        meta_step(module, batch, rung=rung, meta_gradient=FirstOrder(), checkpoint_steps=on)
        for on in (False, True)
    )
    assert all(torch.equal(checkpointed.grads[n], g) for n, g in plain.grads.items())


@pytest.mark.parametrize("rung", RUNGS)
def test_meta_gradients_that_adapt_more_than_once_stay_right(rung):
    module, batch = make_mlp(), make_batch()
    options = {"rung": rung, "meta_gradient": Regularised(), "rule": MetaSGD()}
    plain = meta_step(module, batch, **options)
    assert_same(meta_step(module, batch, checkpoint_steps=True, **options), plain, batch)
    only_once = meta_step(module, batch, rung=rung, rule=MetaSGD())
    assert difference(only_once.grads, plain.grads) > 1e-3


@pytest.mark.parametrize("rung", RUNGS)
def test_recomputed_steps_see_the_same_dropout_masks(rung):
    module, batch = make_mlp(dropout=0.5), make_batch()

    def step(seed, checkpoint_steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            result = meta_step(module, batch, rung=rung, checkpoint_steps=checkpoint_steps)
            return result, torch.rand(3)

    (plain, after), (recomputed, after_recomputed) = step(0, False), step(0, True)
    assert_same(recomputed, plain, batch)
    assert torch.equal(after_recomputed, after)  # the generator moved on as without recomputation
    assert difference(step(1, True)[0].grads, plain.grads) > 1e-3  # the masks matter


def test_modules_without_random_layers_leave_the_generator_alone(monkeypatch):
    plain = build(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    random, batch = make_mlp(dropout=0.5), make_batch()

    # fits of such modules do not take turns in threads, so none may set the generator back
    def refuse(*args, **kwargs):
        raise AssertionError("the generator was set")

    monkeypatch.setattr(torch, "set_rng_state", refuse)
    monkeypatch.setattr(torch.random, "fork_rng", refuse)
    meta_step(plain, batch, checkpoint_steps=True)
    with pytest.raises(AssertionError, match="the generator was set"):
        meta_step(random, batch, checkpoint_steps=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_modules_that_write_to_buffers_are_refused(in_place):
    batch = make_batch()
    module = Counting(in_place).double()
    meta_step(module, batch)
    with pytest.raises(ValueError, match=r"Counting writes to its buffers.*checkpoint_steps=False"):
        meta_step(module, batch, checkpoint_steps=True)


def test_rules_with_an_opaque_state_are_refused():
    meta_step(make_mlp(), make_batch(), rule=Opaque())
    with pytest.raises(TypeError, match=r"got a object in it.*checkpoint_steps=False"):
        meta_step(make_mlp(), make_batch(), rule=Opaque(), checkpoint_steps=True)


# --- recomputed steps: the memory


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_recomputed_steps_cost_one_copy_of_the_parameters_and_the_state_each(rung, rule):
    module, batch = make_mlp(width=16), make_batch(([30] * 4, [30] * 4))
    n_bytes = 8 * sum(p.numel() for p in module.parameters())
    # the loop does one task after another
    one_copy = n_bytes if rung == "loop" else n_bytes * len(batch)
    copies = 2 if rule == "momentum" else 1  # the velocity; the anchor is one for all steps

    def growth(checkpoint_steps):
        few, many = 4, 14
        peaks = []
        for steps in (few, many):
            with LiveBytes() as mode:
                meta_step(
                    module,
                    batch,
                    rung=rung,
                    rule=RULES[rule],
                    steps=steps,
                    checkpoint_steps=checkpoint_steps,
                )
            peaks.append(mode.peak)
        return (peaks[1] - peaks[0]) / (many - few) / one_copy

    assert growth(True) == pytest.approx(copies, rel=0.05)
    assert growth(False) > copies + 3


# --- chunks of a meta-batch


def record_sizes(monkeypatch, method, seen, owner=Engine):
    """List the numbers of tasks that a method of the engine is called with."""
    original = getattr(owner, method)

    def record(self, params, batch, *args, **kwargs):
        seen.append(len(batch))
        return original(self, params, batch, *args, **kwargs)

    monkeypatch.setattr(owner, method, record)


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("module", "rung"),
    [
        *((make_mlp, rung) for rung in RUNGS),
        *((make_batch_norm, rung) for rung in ("loop", "vmap")),
    ],
)
def test_chunks_give_the_numbers_of_the_whole_meta_batch(module, rung, sizes, checkpoint_steps):
    module = module()
    batch = make_batch(SIZES[sizes])
    params = make_meta_params(module)
    whole = make_engine(module, rung=rung)
    step = whole.meta_step(params, batch, alpha=0.2, steps=3)
    losses, outputs = whole.evaluate(params, batch, alpha=0.2, steps=3)
    assert len(set(step.losses.tolist())) == len(batch)  # the order of the tasks shows
    for size in (1, 2, 3, 100):
        engine = make_engine(
            module, rung=rung, max_tasks_in_memory=size, checkpoint_steps=checkpoint_steps
        )
        assert_same(engine.meta_step(params, batch, alpha=0.2, steps=3), step, batch)
        got_losses, got_outputs = engine.evaluate(params, batch, alpha=0.2, steps=3)
        torch.testing.assert_close(got_losses, losses, rtol=TOLERANCE, atol=0)
        real, got_real = batch.query.real(outputs), batch.query.real(got_outputs)
        torch.testing.assert_close(got_real, real, rtol=TOLERANCE, atol=1e-14)
        assert got_outputs.shape == outputs.shape
        assert engine.memory.most == size


@pytest.mark.parametrize(
    ("owner", "method"), [(Stacked, "meta_step"), (Engine, "_adapt"), (Engine, "predict")]
)
def test_no_more_tasks_than_asked_for_are_run_at_once(monkeypatch, owner, method):
    seen = []
    record_sizes(monkeypatch, method, seen, owner)
    batch, module = make_batch(([3] * 7, [2] * 7)), make_mlp()
    params = make_meta_params(module)
    for size, expected in ((None, [7]), (3, [3, 3, 1])):
        seen.clear()
        engine = make_engine(module, rung="stacked", max_tasks_in_memory=size)
        engine.meta_step(params, batch, alpha=0.1, steps=1)
        engine.evaluate(params, batch, alpha=0.1, steps=1)
        assert seen == expected


@pytest.mark.parametrize(("most", "expected"), [(None, [4, 3]), (3, [3, 3, 1])])
def test_held_out_tasks_have_their_parameters_some_at_a_time(monkeypatch, most, expected):
    batch, module = make_batch(([3] * 7, [2] * 7)), make_mlp()
    params = make_meta_params(module)
    losses, outputs = make_engine(module).evaluate(params, batch, alpha=0.1, steps=1)
    monkeypatch.setattr(engine_module, "LEAST_EVALUATED", 1)
    size = sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(engine_module, "EVALUATED_NUMBERS", 4 * size)
    seen = []
    record_sizes(monkeypatch, "_adapt", seen, Engine)
    engine = make_engine(module, max_tasks_in_memory=most)
    got_losses, got_outputs = engine.evaluate(params, batch, alpha=0.1, steps=1)
    assert seen == expected
    torch.testing.assert_close(got_losses, losses, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(got_outputs, outputs, rtol=TOLERANCE, atol=1e-14)


# --- out of memory

OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu, Linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4000000000000 bytes. Error code 12"
    ),
    "cpu, Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 4000000000000 bytes."
    ),
}


def limit(monkeypatch, rung, largest, error):
    """Make a rung raise for more than `largest` tasks; list the sizes it is asked for."""
    seen = []
    kind = {"loop": Loop, "stacked": Stacked, "vmap": Vmap}[rung]
    original = kind.meta_step

    def limited(self, params, batch, *args):
        seen.append(len(batch))
        if len(batch) > largest:
            raise error
        return original(self, params, batch, *args)

    monkeypatch.setattr(kind, "meta_step", limited)
    return seen


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("rung", RUNGS)
def test_a_meta_step_that_runs_out_of_memory_is_done_in_chunks(monkeypatch, rung, error):
    module, batch = make_mlp(), make_batch(([3] * 9, [2] * 9))
    params = make_meta_params(module)
    expected = make_engine(module, rung=rung).meta_step(params, batch, alpha=0.1, steps=2)
    seen = limit(monkeypatch, rung, 3, OUT_OF_MEMORY[error])
    engine = make_engine(module, rung=rung)
    with pytest.warns(EngineFallbackWarning, match=r"now run 2 at a time") as record:
        got = engine.meta_step(params, batch, alpha=0.1, steps=2)
    assert len(record) == 1
    assert "max_tasks_in_memory=2" in str(record[0].message)
    assert str(OUT_OF_MEMORY[error])[:40] in str(record[0].message)
    # the odd last task is not batched
    last = [1] if rung != "vmap" else []
    assert seen == [9, 4, 2, 2, 2, 2, *last]
    assert_same(got, expected, batch)
    assert engine.rung == rung
    assert engine.fallback_reason is None
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.meta_step(params, batch, alpha=0.1, steps=2)  # it has learned its size
    assert max(seen) == 2


def test_chunks_that_were_done_are_not_done_again(monkeypatch):
    module, batch = make_mlp(), make_batch(([3, 3, 3, 3, 9, 9, 9, 9], [2] * 8))
    params = make_meta_params(module)
    expected = make_engine(module).meta_step(params, batch, alpha=0.1, steps=2)
    seen = []
    original = Loop.meta_step

    def limited(self, params, batch, *args):
        size = batch.support.X.shape[1] * len(batch)
        seen.append(len(batch))
        if size > 20:
            raise OUT_OF_MEMORY["cuda"]
        return original(self, params, batch, *args)

    monkeypatch.setattr(Loop, "meta_step", limited)
    engine = make_engine(module, max_tasks_in_memory=4)
    with pytest.warns(EngineFallbackWarning, match=r"now run 2 at a time"):
        got = engine.meta_step(params, batch, alpha=0.1, steps=2)
    assert seen == [4, 4, 2, 2]
    assert_same(got, expected, batch)


@pytest.mark.parametrize("rung", RUNGS)
def test_the_error_is_raised_where_one_task_alone_does_not_fit(monkeypatch, rung):
    module, batch = make_mlp(), make_batch(([3] * 4, [2] * 4))
    seen = limit(monkeypatch, rung, 0, OUT_OF_MEMORY["cuda"])
    if rung == "vmap":
        limit(monkeypatch, "loop", 0, OUT_OF_MEMORY["cuda"])  # runs single tasks
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        make_engine(module, rung=rung).meta_step(
            make_meta_params(module), batch, alpha=0.1, steps=2
        )
    assert seen[:2] == [4, 2]


def test_other_errors_are_not_taken_for_a_want_of_memory(monkeypatch):
    seen = limit(monkeypatch, "stacked", 2, RuntimeError("shapes cannot be multiplied"))
    module = make_mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_engine(module, rung="stacked").meta_step(
            make_meta_params(module), make_batch(), alpha=0.1, steps=1
        )
    assert seen == [3]


# --- the estimators


def make_tasks(n_tasks=8, n_rows=12, seed=0):
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=(n_tasks, 2))
    X = rng.normal(size=(n_tasks, n_rows, 2))
    y = np.einsum("tnf,tf->tn", X, slopes)
    return X.reshape(-1, 2), y.reshape(-1), np.repeat(np.arange(n_tasks), n_rows)


SMALL = {
    "hidden_layer_sizes": (4,),
    "update_rule": "sgd",
    "steps": 2,
    "meta_batch_size": 5,
    "max_iter": 6,
    "early_stopping": True,
    "validation_fraction": 0.4,
    "random_state": 0,
}


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_fits_with_less_memory_give_the_same_model(kind):
    X, y, groups = make_tasks()
    cls = MAMLRegressor
    if kind == "classification":
        cls, y = MAMLClassifier, np.where(y > 0, "up", "down")

    def outputs(model):
        model.fit(X, y, groups=groups).adapt(X, y, groups=groups)
        decide = model.predict if kind == "regression" else model.predict_proba
        return decide(X, groups=groups), model.history_[:, "valid_loss"]

    expected, losses = outputs(cls(**SMALL))
    for options in (
        {"engine__checkpoint_steps": True},
        {"engine__max_tasks_in_memory": 2},
        {"engine__checkpoint_steps": True, "engine__max_tasks_in_memory": 1},
    ):
        got, got_losses = outputs(cls(**SMALL, **options))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got_losses, losses, rtol=1e-9)


def test_adapt_and_predict_run_no_more_tasks_than_asked_for(monkeypatch):
    X, y, groups = make_tasks(n_tasks=9)
    model = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    seen = {"adapt": [], "predict": []}
    for name, sizes in seen.items():
        record_sizes(monkeypatch, name, sizes)
    expected = model.adapt(X, y, groups=groups).predict(X, groups=groups)
    assert seen == {"adapt": [9], "predict": [9]}
    assert Rung.tasks_at_a_time >= 9
    for sizes in seen.values():
        sizes.clear()
    model.set_params(engine__max_tasks_in_memory=4)
    got = model.adapt(X, y, groups=groups).predict(X, groups=groups)
    assert seen == {"adapt": [4, 4, 1], "predict": [4, 4, 1]}
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=1e-13)


def test_a_fit_that_runs_out_of_memory_warns_once_and_goes_on(monkeypatch):
    X, y, groups = make_tasks()
    # the kernels run one task at a time
    monkeypatch.setattr(Native, "refuses", classmethod(lambda cls, spec: "not here"))
    settings = {**SMALL, "update_rule": "sgd"}
    expected = MAMLRegressor(**settings).fit(X, y, groups=groups)
    limit(monkeypatch, "stacked", 2, OUT_OF_MEMORY["cuda"])
    with pytest.warns(EngineFallbackWarning, match="now run 2 at a time") as record:
        model = MAMLRegressor(**settings).fit(X, y, groups=groups)
    assert len(record) == 1
    assert model.get_params() == MAMLRegressor(**settings).get_params()  # they are the user's
    for got, p in zip(model.module_.parameters(), expected.module_.parameters(), strict=True):
        torch.testing.assert_close(got, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_the_parameters_are_ordinary_ones(cls):
    options = {"engine__checkpoint_steps": True, "engine__max_tasks_in_memory": 3}
    model = clone(cls(**options))
    assert options.items() <= model.get_params().items()
    assert cls().set_params(**options).get_params() == model.get_params()


def test_the_parameters_can_be_searched():
    X, y, groups = make_tasks()
    frame = np.column_stack([groups, X])
    grid = {"engine__checkpoint_steps": [False, True], "engine__max_tasks_in_memory": [None, 2]}
    search = GridSearchCV(
        MAMLRegressor(**SMALL, task_column=0), grid, cv=GroupKFold(2), error_score="raise"
    ).fit(frame, y, groups=groups)
    scores = search.cv_results_["mean_test_score"]
    assert len(scores) == 4
    np.testing.assert_allclose(scores, scores[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["engine__checkpoint_steps"], ["yes", 2, None]),
        *itertools.product(["engine__max_tasks_in_memory"], [0, -1, 2.5, "all"]),
    ],
)
@pytest.mark.parametrize("cls", [MAMLRegressor, MAMLClassifier])
def test_values_that_make_no_sense_are_refused(cls, name, value):
    X, y, groups = make_tasks()
    with pytest.raises(ValueError, match=rf"'{name}' parameter of {cls.__name__} must be .* Got"):
        cls(**{name: value}).fit(X, y > 0, groups=groups)


def test_reading_many_rows_takes_little_memory_beside_them():
    n_rows = 400_000  # of 12 bytes, and 8 for the id
    rng = np.random.default_rng(0)
    X, task = rng.standard_normal((n_rows, 2), dtype=np.float32), np.arange(n_rows) // 100
    reg = MAMLRegressor(
        update_rule="sgd", hidden_layer_sizes=(8,), max_iter=1, early_stopping=False, random_state=0
    )
    reg.fit(X[:400], X[:400, 0], groups=task[:400])  # imports
    tracemalloc.start()
    reg.fit(X, X[:, 0], groups=task)
    most = tracemalloc.get_traced_memory()[1] / n_rows
    tracemalloc.stop()
    assert most < 20
