"""Everything runs on a device that is not the CPU, and a meta-step waits for nothing there.

``SKLEARN_MAML_TEST_DEVICE=cuda`` runs it on a card.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from second_device import (
    DEVICE,
    NAME,
    MixedDevicesError,
    backend,
    capturing,
    emulated,
    free_memory,
    memory_limit,
    on_host,
    watch,
)
from skorch.callbacks import Callback, LRScheduler
from torch import nn

from sklearn_maml import (
    Checkpoint,
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt_predict,
    class_permutation_audit,
    load,
    task_scores,
)
from sklearn_maml.engine.tracing import graphs, tracer
from sklearn_maml.estimators import base, building, stored
from sklearn_maml.exceptions import (
    DeviceWarning,
    EngineFallbackWarning,
    MetaTrainingError,
    NonFiniteStepWarning,
)
from sklearn_maml.inspection import (
    AdaptationCurveDisplay,
    FewShotFitDisplay,
    MetaTrainingDisplay,
    TaskScoresDisplay,
)
from sklearn_maml.learners import launched, systems
from sklearn_maml.training import optimizers, schedule
from sklearn_maml.training.net import MetaNet
from sklearn_maml.training.outer_step import OuterStep
from sklearn_maml.update_rules import SGD

RNG = np.random.default_rng(0)
N_TASKS, N_ROWS = 8, 18
X = RNG.normal(size=(N_TASKS * N_ROWS, 3)).astype(np.float32)
G = np.repeat(np.arange(N_TASKS), N_ROWS)
Y = np.einsum("ij,ij->i", X, RNG.normal(size=(N_TASKS, 3))[G]).astype(np.float32)
C = (Y > 0).astype(int)
KINDS = np.tile(np.arange(3), N_TASKS * N_ROWS // 3)
IMAGES = RNG.normal(size=(N_TASKS * N_ROWS, 64)).astype(np.float32)
RAGGED = RNG.random(len(X)) < 0.8
SMALL = {
    "update_rule": "sgd",
    "alpha": 0.03,
    "steps": 2,
    "hidden_layer_sizes": (8,),
    "max_iter": 3,
    "meta_batch_size": 4,
    "early_stopping": False,
    "random_state": 0,
}


@pytest.fixture
def updates(monkeypatch):
    """What each update of a fit on the device had to wait for."""
    seen = []
    original = MetaNet.train_step

    def train_step(self, *args, **kwargs):
        with watch(locate=True) as counts:
            step = original(self, *args, **kwargs)
        if torch.device(self.device).type != "cpu":
            seen.append(counts)
        return step

    monkeypatch.setattr(MetaNet, "train_step", train_step)
    return seen


def both(make, X, y, groups=None, **settings):
    """Fit on the CPU and on the device."""
    with warnings.catch_warnings():
        # torch cannot batch its recurrent kernels; on the two devices it says so of two of them
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        fits = [
            make(**{**SMALL, **settings, "device": device}).fit(X, y, groups=groups)
            for device in ("cpu", DEVICE)
        ]
    return fits


def parameters(model):
    return {n: p.detach().cpu() for n, p in model._learner.named_parameters()}


def assert_same(cpu, device, rtol=1e-4, atol=1e-5):
    """The fits, and what they did on the way, agree to rounding."""
    assert all(p.device.type == NAME for p in device.module_.parameters())
    ours, theirs = parameters(device), parameters(cpu)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)
    for column in ("train_loss", "valid_loss", "valid_loss_before", "non_finite"):
        if column in cpu.history_[-1]:
            np.testing.assert_allclose(
                device.history_[:, column], cpu.history_[:, column], rtol=rtol, atol=atol
            )


def assert_unhindered(updates, n_first=0):
    """No update, but perhaps the first, moved anything or waited for the device."""
    assert len(updates) > n_first
    assert all(counts.operations for counts in updates)
    assert [counts.where for counts in updates[n_first:] if counts.waits] == []


# --- the device itself


@emulated
def test_the_device_computes_what_the_cpu_does():
    torch.manual_seed(0)
    a, w = torch.randn(3, 4), torch.randn(5, 4, 2)
    d, v = a.to(DEVICE), w.to(DEVICE)
    assert d.device == torch.device(DEVICE)
    assert torch.equal(on_host(d @ d.T), a @ a.T)
    out = torch.empty(0, device=DEVICE)
    torch.add(d, d, out=out)
    assert torch.equal(on_host(out), a + a)
    for made, expected in (
        (torch.arange(5, device=DEVICE), torch.arange(5)),
        (torch.eye(3, device=DEVICE), torch.eye(3)),
        (torch.full((2,), 3.0, device=DEVICE), torch.full((2,), 3.0)),
        (d.new_zeros(2, 2), torch.zeros(2, 2)),
        (torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([1.0, 2.0])),
        (torch.where(d > 0, d, 0.0), torch.where(a > 0, a, 0.0)),
    ):
        assert torch.equal(on_host(made), expected)

    def loss(w, x):
        return (torch.tanh(x @ w) ** 2).sum()

    per_task = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))
    torch.testing.assert_close(on_host(per_task(v, d)), per_task(w, a))
    p, q = (nn.Parameter(t.clone()) for t in (v[0], w[0]))
    (first,) = torch.autograd.grad(loss(p, d), p, create_graph=True)
    (second,) = torch.autograd.grad(loss(q, a), q, create_graph=True)
    first.square().sum().backward()
    second.square().sum().backward()
    torch.testing.assert_close(on_host(p.grad), q.grad)


def test_views_share_the_memory_of_the_device():
    d = torch.zeros(3, 4, device=DEVICE)
    row, turned = d[1], d.t()
    row.add_(1)
    turned[2].mul_(5)
    assert row.untyped_storage().data_ptr() == d.untyped_storage().data_ptr()
    expected = torch.zeros(3, 4)
    expected[1] = 1
    expected[1, 2] = 5
    assert torch.equal(on_host(d), expected)
    copied = copy.deepcopy(nn.Parameter(d))
    copied.data.zero_()
    assert torch.equal(on_host(d), expected)


@emulated
def test_the_device_draws_from_a_generator_of_its_own():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(on_host(torch.rand(4, device=DEVICE)), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, a: d + a,
        lambda d, a: d @ a.T,
        lambda d, a: torch.cat([d, a]),
        # a card takes positions of the CPU and moves them
        pytest.param(lambda d, a: d[torch.tensor([0, 1])], marks=emulated),
        lambda d, a: d.index_select(0, torch.tensor([0])),
        lambda d, a: torch.from_numpy(np.ones((3, 4), np.float32)) * d,
    ],
    ids=["add", "matmul", "cat", "index", "index_select", "from_numpy"],
)
def test_operations_on_two_devices_are_refused(mix):
    a = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"on the same device|expected one device"):
        mix(a.to(DEVICE), a)


def test_numbers_without_dimensions_may_come_from_the_cpu():
    d = torch.ones(3, device=DEVICE)
    assert on_host(d * torch.tensor(2.0)).tolist() == [2, 2, 2]


def test_numpy_needs_a_move():
    d = torch.ones(3, device=DEVICE)
    for look in (lambda: d.numpy(), lambda: np.asarray(d), lambda: d.detach().numpy()):
        with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
            look()
    assert d.cpu().numpy().tolist() == [1, 1, 1]


@emulated
def test_moves_and_synchronisations_are_counted():
    with watch() as counts:
        d = torch.ones(3).to(DEVICE)
        assert (counts.to_device, counts.waits) == (1, 1)
        (d + d).sum()
        assert counts.waits == 1
        d.cpu()
        assert (counts.to_host, counts.waits) == (1, 2)
        d.tolist()
        assert counts.to_host == 2
        for look in (
            lambda: d.sum().item(),
            lambda: bool(d.sum() > 0),
            lambda: float(d[0]),
            lambda: d[d > 0],
            lambda: d.nonzero(),
            lambda: torch.equal(d, d),
        ):
            before = counts.synchronisations
            look()
            assert counts.synchronisations > before
        assert counts.moves == 3


# --- fits


RULES = {
    "sgd": ("all", "head", "body"),
    "momentum": ("all", "head", "body"),
    "adam": ("all", "head", "body"),
    "meta-sgd": ("all", "head", "body"),
    "learned-alpha": ("all", "head", "body"),
    "per-layer-per-step": ("all", "head", "body"),
    "ridge-head": ("head",),
    "logistic-head": ("head",),
}
LEARNING = ("meta-sgd", "learned-alpha", "per-layer-per-step")
MATRIX = [
    (rule, gradient, adapted)
    for rule, parts in RULES.items()
    for gradient in ("second-order", "first-order", "implicit", "reptile")
    for adapted in parts
    if not (gradient in ("implicit", "reptile") and (rule in LEARNING or "-head" in rule))
    and not (gradient == "reptile" and adapted != "all")
]


@pytest.mark.parametrize(("rule", "gradient", "adapted"), MATRIX)
def test_every_rule_gradient_and_adapted_part(rule, gradient, adapted, updates):
    make, y = (MAMLClassifier, C) if rule == "logistic-head" else (MAMLRegressor, Y)
    cpu, device = both(
        make, X, y, G, update_rule=rule, meta_gradient=gradient, adapted=adapted, max_iter=2
    )
    assert_same(cpu, device)
    assert_unhindered(updates)
    predictions = [m.adapt(X, y, groups=G).predict(X[::7], groups=G[::7]) for m in (cpu, device)]
    np.testing.assert_allclose(*predictions, rtol=1e-3, atol=1e-5)


def test_the_matrix_leaves_out_only_what_is_refused():
    from sklearn_maml.meta_gradients import META_GRADIENTS
    from sklearn_maml.update_rules import UPDATE_RULES

    assert set(RULES) == set(UPDATE_RULES)
    assert {gradient for _, gradient, _ in MATRIX} == set(META_GRADIENTS)
    for rule, gradient in (("meta-sgd", "implicit"), ("ridge-head", "reptile")):
        with pytest.raises(ValueError, match=r"cannot train|takes no gradient steps"):
            both(
                MAMLRegressor,
                X,
                Y,
                G,
                update_rule=rule,
                meta_gradient=gradient,
                adapted="head" if "head" in rule else "all",
            )


def conv(n_outputs=3):
    torch.manual_seed(0)
    blocks = []
    for width in (1, 4):
        convolution = nn.Conv2d(width, 4, 3, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(16, n_outputs)
    )


class Branched(nn.Module):
    """A convolutional net that the engine batches with vmap."""

    def __init__(self):
        super().__init__()
        self.net = conv()

    def forward(self, x):
        return self.net(x) + self.net(-x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])


def dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


@pytest.mark.parametrize("batch_norm", ["inductive", "transductive"])
@pytest.mark.parametrize("make", [conv, Branched])
def test_convolutions_with_either_batch_norm(make, batch_norm, updates):
    cpu, device = both(
        MAMLClassifier, IMAGES, KINDS, G, module=make(), engine__batch_norm=batch_norm, n_shots=2,
        n_queries=2, max_iter=2,
    )  # fmt: skip
    assert_same(cpu, device)
    assert_unhindered(updates)
    chosen = G < 3
    proba = [
        m.adapt(IMAGES[chosen], KINDS[chosen], groups=G[chosen]).predict_proba(
            IMAGES[chosen], groups=G[chosen]
        )
        for m in (cpu, device)
    ]
    np.testing.assert_allclose(*proba, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
# and it does not predict under vmap in float64, on either device
@pytest.mark.filterwarnings("ignore:.*cannot predict for a batch:UserWarning")
@pytest.mark.parametrize("gradient", ["second-order", "first-order"])
def test_an_lstm(gradient, updates):
    chosen = G < 4
    data = X[chosen].astype(float), Y[chosen].astype(float), G[chosen]
    cpu, device = both(
        MAMLRegressor, *data, module=Recurrent(), meta_gradient=gradient, max_iter=2, n_shots=3,
        n_queries=3,
    )  # fmt: skip
    assert_same(cpu, device)
    assert_unhindered(updates)
    adapted = [m.adapt(*data[:2], groups=data[2]) for m in (cpu, device)]
    predictions = [m.predict(data[0], groups=data[2]) for m in adapted]
    np.testing.assert_allclose(*predictions, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_recurrent_layers_do_without_cudnn_which_has_no_second_derivatives():
    seen = []

    class Spying(Recurrent):
        def forward(self, x):
            if x.requires_grad or torch.is_grad_enabled():
                seen.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    assert torch.backends.cudnn.enabled
    chosen = G < 4
    settings = {**SMALL, "module": Spying(), "max_iter": 1}
    MAMLRegressor(**settings, device=DEVICE).fit(X[chosen], Y[chosen], groups=G[chosen])
    assert set(seen) == {False}
    assert torch.backends.cudnn.enabled


@emulated
@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_dropout_draws_from_the_generator_of_the_device(checkpoint_steps, updates):
    torch.manual_seed(5)
    before = backend().get_rng_state(), torch.get_rng_state()
    cpu, device = both(
        MAMLRegressor,
        X,
        Y,
        G,
        module=dropout(),
        engine__checkpoint_steps=checkpoint_steps,
        max_iter=5,
    )
    assert_same(cpu, device)
    assert_unhindered(updates)
    # as the fit found them: `dropout` seeds them itself
    torch.manual_seed(0)
    nn.Linear(3, 8), nn.Linear(8, 1)
    assert not torch.equal(torch.get_rng_state(), before[1])
    torch.manual_seed(5)
    state = backend().get_rng_state()
    module = dropout()
    torch.manual_seed(5)
    MAMLRegressor(**SMALL, module=module, device=DEVICE).fit(X, Y, groups=G)
    assert torch.equal(backend().get_rng_state(), state)


DATA = {
    "shared labels": (MAMLClassifier, X, C, G, {}),
    "local labels": (MAMLClassifier, X, KINDS, G, {"n_ways": 3, "n_shots": 2, "n_queries": 3}),
    "a pool of classes": (
        MAMLClassifier, X, KINDS, None, {"n_ways": 2, "n_shots": 2, "n_queries": 3},
    ),
    "zero heads": (MAMLClassifier, X, KINDS, G, {"n_ways": 3, "n_shots": 2, "head": "zero"}),
    # the gradient of these heads is next to nothing, and Adam makes a whole step of its rounding
    "shared heads": (MAMLClassifier, X.astype(float), C, G, {"head": "shared"}),
    "ragged tasks": (MAMLRegressor, X[RAGGED], Y[RAGGED], G[RAGGED], {"n_queries": None}),
    "ragged classes": (MAMLClassifier, X[RAGGED], C[RAGGED], G[RAGGED], {}),
    "centred": (MAMLRegressor, X[RAGGED], Y[RAGGED], G[RAGGED], {"center_y": True}),
    "minibatches": (
        MAMLRegressor, X[RAGGED], Y[RAGGED], G[RAGGED],
        {"center_y": True, "meta_gradient": "reptile", "meta_gradient__batch_size": 4},
    ),
    "batch norm of ragged tasks": (
        MAMLClassifier, IMAGES[RAGGED], KINDS[RAGGED], G[RAGGED], {"module": conv()},
    ),
    "float64": (MAMLRegressor, X.astype(float), Y.astype(float), G, {}),
    "clipping": (MAMLRegressor, X, Y, G, {"max_grad_norm": 0.01}),
    "few tasks in memory": (MAMLRegressor, X, Y, G, {"engine__max_tasks_in_memory": 2}),
    "few ragged tasks in memory": (
        MAMLClassifier, X[RAGGED], C[RAGGED], G[RAGGED], {"engine__max_tasks_in_memory": 3},
    ),
    "recomputed steps": (MAMLRegressor, X, Y, G, {"engine__checkpoint_steps": True}),
    "held-out tasks": (MAMLRegressor, X, Y, G, {"early_stopping": True}),
    "bfloat16": (MAMLRegressor, X, Y, G, {"engine__precision": "bf16", "optimizer": "sgd"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_data(name, updates):
    make, features, y, groups, settings = DATA[name]
    cpu, device = both(make, features, y, groups, **settings)
    assert_same(cpu, device)
    assert_unhindered(updates, n_first="optimizer" in settings)


# a head of targets without noise is what rounding makes it, on the CPU too
NOISY = (Y + 0.3 * np.random.default_rng(3).normal(size=Y.shape)).astype(np.float32)
HEADS = {
    "numbers": (MAMLRegressor, X, NOISY, G, {}),
    "several targets": (MAMLRegressor, X, np.c_[NOISY, X[:, 0]], G, {}),
    "shared labels": (MAMLClassifier, X, C, G, {}),
    "local labels": (MAMLClassifier, X, KINDS, G, {"n_ways": 3, "n_shots": 2, "n_queries": 3}),
    "ragged tasks": (MAMLRegressor, X[RAGGED], NOISY[RAGGED], G[RAGGED], {}),
    "a module": (MAMLRegressor, X, NOISY, G, {"module": nn.Sequential(nn.Linear(3, 1))}),
    "float64": (MAMLRegressor, X.astype(float), NOISY.astype(float), G, {}),
    "one step outside": (MAMLRegressor, X, NOISY, G, {"meta_gradient": "reptile"}),
    "counts": (MAMLRegressor, X, np.floor(Y**2), G, {"loss": "poisson"}),
    "quantiles": (MAMLRegressor, X, NOISY, G, {"loss": "quantile", "quantile": 0.8}),
}


@pytest.mark.parametrize("rule", ["auto", "gaussian-head"])
@pytest.mark.parametrize("name", HEADS)
def test_gaussian_heads(name, rule, updates):
    make, features, y, groups, settings = HEADS[name]
    cpu, device = both(make, features, y, groups, update_rule=rule, early_stopping=True, **settings)
    assert_same(cpu, device, rtol=1e-3, atol=1e-4)
    assert cpu.learner_weights_ == device.learner_weights_
    assert_unhindered(updates)
    for model in (cpu, device):
        model.adapt(features, y, groups=groups)
    ask = "predict" if make is MAMLRegressor else "predict_proba"
    close([getattr(m, ask)(features[::7], groups=groups[::7]) for m in (cpu, device)], rtol=1e-2)


def test_bfloat16_rounds_on_the_device():
    full, rounded = (
        MAMLRegressor(**SMALL, device=DEVICE, engine__precision=p).fit(X, Y, groups=G)
        for p in ("full", "bf16")
    )
    error = max(
        float((a - b).abs().max())
        for a, b in zip(parameters(full).values(), parameters(rounded).values(), strict=True)
    )
    assert error > 1e-6
    assert all(p.dtype == torch.float32 for p in rounded.module_.parameters())


OPTIMIZERS = {
    "adam": (0, {}),
    "adamw": (0, {"optimizer__weight_decay": 0.1, "optimizer__amsgrad": True}),
    # their first step makes their state, and is decided on the host
    "sgd": (1, {"optimizer__momentum": 0.9}),
    torch.optim.RMSprop: (1, {}),
    torch.optim.NAdam: (1, {}),
    torch.optim.Adamax: (1, {}),
    torch.optim.Adadelta: (1, {}),
}


@pytest.mark.parametrize(
    ("optimizer", "limit"), [*((o, None) for o in OPTIMIZERS), ("adam", 0), ("adamw", 0)]
)
def test_optimizers_step_without_waiting(optimizer, limit, updates, monkeypatch):
    n_first, settings = OPTIMIZERS[optimizer]
    if limit is not None:  # parameters that do not lie end to end
        monkeypatch.setattr(optimizers, "FLAT_LIMIT", limit)
    cpu, device = both(MAMLRegressor, X, Y, G, optimizer=optimizer, max_iter=6, **settings)
    assert_same(cpu, device)
    assert_unhindered(updates, n_first)


def test_optimizers_that_count_on_the_host_are_decided_there(updates):
    cpu, device = both(MAMLRegressor, X, Y, G, optimizer=torch.optim.Adagrad, max_iter=4)
    assert_same(cpu, device)
    # the norm and the loss are read, and nothing else
    assert [counts.waits for counts in updates] == [2] * 4


# --- where the host waits


def counts_of(updates_made, **settings):
    with watch(locate=True) as counts:
        MAMLRegressor(
            **{**SMALL, "n_shots": 5, "max_iter": updates_made, "device": DEVICE, **settings}
        ).fit(X, Y, groups=G)
    return counts


def test_a_device_without_its_number_is_the_current_one(updates):
    device = MAMLRegressor(**SMALL, device=NAME).fit(X, Y, groups=G)
    assert device.device_ == torch.device(DEVICE)
    assert_unhindered(updates)


@emulated
def test_adapting_and_predicting_move_chunks_of_tasks_and_not_tasks():
    model = MAMLRegressor(**SMALL, device=DEVICE).fit(X, Y, groups=G)
    with watch(locate=True) as counts:
        model.adapt(X[RAGGED], Y[RAGGED], groups=G[RAGGED])
    # rows and weights by their type, and whether all parameters are finite
    assert counts.to_device <= 3, counts.where
    assert counts.to_host + counts.synchronisations <= 1, counts.where
    with watch(locate=True) as counts:
        model.predict(X, groups=G)
    assert counts.to_device <= 2, counts.where
    assert counts.to_host + counts.synchronisations <= 1, counts.where


@emulated
def test_an_epoch_is_read_once_and_a_block_of_batches_moves_at_once(monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 2)
    short, long = counts_of(8), counts_of(16)
    assert long.synchronisations == short.synchronisations == 0
    assert long.to_host - short.to_host == 4  # epochs
    assert long.to_device - short.to_device == 1  # block, of updates 8 to 15


@emulated
@pytest.mark.parametrize("make", [MAMLRegressor, MAMLClassifier])
def test_ragged_blocks_move_their_positions_and_weights_at_once(make):
    y = Y if make is MAMLRegressor else C
    moves = []
    for n in (8, 16):
        with watch() as counts:
            make(**{**SMALL, "max_iter": n, "device": DEVICE}).fit(
                X[RAGGED], y[RAGGED], groups=G[RAGGED]
            )
        assert counts.synchronisations == 0
        moves.append(counts.to_device)
    assert moves[1] - moves[0] <= 2


@emulated
def test_validation_is_read_once_an_epoch(monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 2)
    short, long = (counts_of(n, early_stopping=True, n_iter_no_change=9999) for n in (5, 7))
    assert long.to_host - short.to_host == 2
    assert long.synchronisations == short.synchronisations


def test_the_tasks_stay_on_the_device():
    source = X.nbytes + Y.nbytes
    sizes = []
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self.device.type == "cpu" and result.device.type != "cpu":
            sizes.append(self.numel() * self.element_size())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        counts_of(16)
    assert sum(size in (X.nbytes, Y.nbytes) for size in sizes) == 2
    # besides them, the parameters and the positions: 8 bytes a row of each of 16 batches
    assert sum(sizes) - source < 16 * 4 * N_ROWS * 8 + 1024


@emulated
def test_tasks_that_do_not_fit_move_a_block_at_a_time(updates):
    with free_memory(2 * X.nbytes):
        short, long = counts_of(8), counts_of(16)
        assert long.to_device - short.to_device == 1
        cpu, device = both(MAMLRegressor, X[RAGGED], Y[RAGGED], G[RAGGED], n_queries=None)
    assert_same(cpu, device)
    assert_unhindered(updates)


class Sinusoids:
    """Fresh tasks at every draw."""

    def sample(self, n_tasks, random_state):
        rng = np.random.default_rng(random_state)
        rows = rng.normal(size=(n_tasks, 12, 1)).astype(np.float32)
        shift = rng.normal(size=(n_tasks, 1)).astype(np.float32)
        return [(x, np.sin(x[:, 0] + s)) for x, s in zip(rows, shift, strict=True)]


def test_task_distributions_move_a_block_at_a_time(updates):
    cpu, device = both(MAMLRegressor, Sinusoids(), None, max_iter=10)
    assert_same(cpu, device)
    assert_unhindered(updates)


def test_a_data_loader_feeds_the_device(updates):
    cpu, device = both(MAMLRegressor, X, Y, G, iterator_train__shuffle=True)
    assert_same(cpu, device)
    assert {counts.synchronisations for counts in updates} == {0}


# --- updates that are skipped


class Overflow(nn.Module):
    """Outputs are not finite where a row says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x) / (x[:, :1] != 77).to(x.dtype)


BROKEN = np.where((G == 3)[:, None], np.float32(77), X)


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
@pytest.mark.parametrize("limit", [2**18, 0], ids=["flat", "apart"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "optimizer__momentum": 0.9},
        {"optimizer": torch.optim.NAdam},
        {"optimizer": torch.optim.Adagrad},
        {"meta_gradient": "reptile", "meta_gradient__step_size": 0.1},
    ],
    ids=["adam", "momentum", "nadam", "adagrad", "reptile"],
)
def test_updates_that_are_not_finite_are_skipped(settings, limit, monkeypatch):
    monkeypatch.setattr(optimizers, "FLAT_LIMIT", limit)
    cpu, device = both(
        MAMLRegressor, BROKEN, Y, G, module=Overflow(), meta_batch_size=1, max_iter=12, **settings
    )
    assert_same(cpu, device)
    skipped = cpu.history_[:, "batches", :, "non_finite"]
    assert device.history_[:, "batches", :, "non_finite"] == skipped
    assert 0 < np.sum(skipped) < 6
    losses = [m.history_[-1, "batches", :, "train_loss"] for m in (cpu, device)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert np.isnan(losses[1]).astype(int).tolist() == skipped[0]
    state = [m.net_.optimizer_.state_dict()["state"] for m in (cpu, device)]
    for of_cpu, of_device in zip(*(s.values() for s in state), strict=True):
        for name, value in of_cpu.items():
            torch.testing.assert_close(
                torch.as_tensor(of_device[name]).cpu(), torch.as_tensor(value), rtol=1e-4, atol=1e-6
            )


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
def test_first_updates_that_are_skipped_leave_the_optimiser_without_a_state():
    rows = np.where(np.isin(G, (1, 3, 6))[:, None], np.float32(77), X)
    cpu, device = both(
        MAMLRegressor, rows, Y, G, module=Overflow(), meta_batch_size=1, max_iter=8,
        optimizer="sgd", optimizer__momentum=0.9, optimizer__dampening=0.5, random_state=1,
    )  # fmt: skip
    assert cpu.history_[0, "batches", :, "non_finite"][:2] == [1, 1]
    assert_same(cpu, device)


def test_a_skipped_update_is_announced_as_on_the_cpu():
    seen = []
    for device in ("cpu", DEVICE):
        with pytest.warns(NonFiniteStepWarning) as caught:
            MAMLRegressor(
                **{**SMALL, "meta_batch_size": 1, "max_iter": 12}, module=Overflow(), device=device
            ).fit(BROKEN, Y, groups=G)
        seen.append([str(w.message) for w in caught])
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
def test_a_fit_of_skipped_updates_ends_as_on_the_cpu():
    messages = []
    for device in ("cpu", DEVICE):
        with pytest.raises(MetaTrainingError) as caught:
            MAMLRegressor(**{**SMALL, "max_iter": 22}, module=Overflow(), device=device).fit(
                np.full_like(X, 77), Y, groups=G
            )
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "20 of 20 meta-steps" in messages[0]


# --- callbacks and fits that continue


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_batch_end(self, net, training=False, **kwargs):
        if training:
            self.seen.append(net.history[-1, "batches", -1, "train_loss"])


class Watcher(Callback):
    def __init__(self):
        self.norms = []

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.norms.append(float(sum(p.grad.norm().item() for _, p in named_parameters)))


def test_callbacks_see_every_batch(updates):
    spies = [[Losses(), Watcher()] for _ in range(2)]
    for device, callbacks in zip(("cpu", DEVICE), spies, strict=True):
        MAMLRegressor(**SMALL, device=device, callbacks=callbacks).fit(X, Y, groups=G)
    for on_cpu, on_device in zip(*spies, strict=True):
        name = "seen" if isinstance(on_cpu, Losses) else "norms"
        assert len(getattr(on_device, name)) == 3
        np.testing.assert_allclose(getattr(on_device, name), getattr(on_cpu, name), rtol=1e-5)
    assert all(counts.waits for counts in updates)  # which is what they cost


def test_callbacks_of_epochs_cost_nothing(updates, monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 3)
    # a rate that soon is nothing leaves it to rounding when to stop
    callbacks = [LRScheduler(policy="StepLR", step_size=1, gamma=0.5)]
    cpu, device = both(
        MAMLRegressor, X, Y, G, callbacks=callbacks, early_stopping=True, n_iter_no_change=1,
        max_iter=30, beta=0.3,
    )  # fmt: skip
    assert_same(cpu, device)
    assert device.n_iter_ == cpu.n_iter_
    assert_unhindered(updates)


def test_a_warm_start_continues_on_the_device(updates):
    fits = both(MAMLRegressor, X, Y, G, warm_start=True)
    for model in fits:
        model.fit(X, Y, groups=G)
    assert_same(*fits)
    assert fits[1].n_iter_ == 6
    assert_unhindered(updates)


def dies_midway(fit):
    """Begin a fit that dies in its sixth update."""
    original = OuterStep.meta_gradient

    def die(self, net, *args):
        if net.update_ == 5:
            raise RuntimeError("died")
        return original(self, net, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OuterStep, "meta_gradient", die)
        with pytest.raises(RuntimeError, match="died"):
            fit()


@pytest.mark.parametrize("settings", [{}, {"module": dropout()}], ids=["mlp", "dropout"])
def test_a_fit_resumes_on_the_device(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 2)
    settings = {**SMALL, **settings, "max_iter": 6, "device": DEVICE}
    whole = MAMLRegressor(**settings).fit(X, Y, groups=G)

    def fit():
        callbacks = [Checkpoint(tmp_path / "fit", every=0)]
        return MAMLRegressor(**settings, callbacks=callbacks).fit(X, Y, groups=G)

    dies_midway(fit)
    resumed = fit()
    for a, b in zip(parameters(resumed).values(), parameters(whole).values(), strict=True):
        assert torch.equal(a, b)
    assert resumed.history_[:, "train_loss"] == whole.history_[:, "train_loss"]


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.NAdam, torch.optim.RMSprop])
@pytest.mark.parametrize("begun", ["cpu", DEVICE])
def test_a_fit_resumes_on_another_device(optimizer, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 2)
    settings = {**SMALL, "max_iter": 6, "optimizer": optimizer}
    whole = MAMLRegressor(**settings).fit(X, Y, groups=G)

    def fit(device):
        callbacks = [Checkpoint(tmp_path / "fit", every=0)]
        return MAMLRegressor(**settings, device=device, callbacks=callbacks).fit(X, Y, groups=G)

    dies_midway(lambda: fit(begun))
    resumed = fit("cpu" if begun == DEVICE else DEVICE)
    for a, b in zip(parameters(resumed).values(), parameters(whole).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        resumed.history_[:, "train_loss"], whole.history_[:, "train_loss"], rtol=1e-4
    )


# --- what a fitted model does


@pytest.fixture(scope="module")
def regressors():
    return both(MAMLRegressor, X, Y, G, max_iter=5)


@pytest.fixture(scope="module")
def classifiers():
    return both(MAMLClassifier, X, C, G, max_iter=5)


def close(values, rtol=1e-4, atol=1e-5):
    assert all(isinstance(v, np.ndarray) for v in values)
    np.testing.assert_allclose(*values, rtol=rtol, atol=atol)


def test_adapting_and_predicting(regressors, classifiers):
    for models, y in ((regressors, Y), (classifiers, C)):
        close([m.adapt(X[:9], y[:9]).predict(X[9:18]) for m in models])
        chosen = RAGGED
        close(
            [m.adapt(X[chosen], y[chosen], groups=G[chosen]).predict(X, groups=G) for m in models]
        )
        order = np.random.default_rng(0).permutation(len(X))
        close([m.predict(X[order], groups=G[order]) for m in models])
    close([m.predict_proba(X, groups=G) for m in classifiers])
    weights = np.linspace(0.1, 1, 9)
    close([m.adapt(X[:9], Y[:9], sample_weight=weights).predict(X[9:18]) for m in regressors])


def test_scores(regressors, classifiers):
    for models, y in ((regressors, Y), (classifiers, C)):
        assert models[1].score(X, y, groups=G) == pytest.approx(
            models[0].score(X, y, groups=G), abs=1e-5
        )
        scores = [task_scores(m, X, y, groups=G, random_state=0) for m in models]
        close([s.after for s in scores])
        close([s.before for s in scores])


def test_displays(regressors):
    pytest.importorskip("matplotlib").use("Agg")
    curves = [
        AdaptationCurveDisplay.from_estimator(m, X, Y, groups=G, steps=[0, 2], random_state=0)
        for m in regressors
    ]
    close([curve.scores for curve in curves])
    close(
        [
            TaskScoresDisplay.from_estimator(m, X, Y, groups=G, random_state=0).after
            for m in regressors
        ]
    )
    one = both(MAMLRegressor, X[:, :1], Y, G)
    fits = [FewShotFitDisplay.from_estimator(m, X[:9, :1], Y[:9], steps=[0, 2]) for m in one]
    close([fit.curves for fit in fits])


def test_the_course_of_a_fit_and_the_order_of_classes():
    pytest.importorskip("matplotlib").use("Agg")
    models = both(MAMLClassifier, X, KINDS, G, n_ways=3, n_shots=2, early_stopping=True)
    displays = [MetaTrainingDisplay.from_estimator(m) for m in models]
    close([display.train_loss for display in displays])
    audits = [
        class_permutation_audit(m, X, KINDS, groups=G, n_episodes=5, random_state=0) for m in models
    ]
    assert audits[0].mean == pytest.approx(audits[1].mean)


def test_the_default_model_with_its_standard_deviations():
    groups = np.repeat(np.arange(12), 12)
    settings = {"max_iter": 4, "hidden_layer_sizes": (8,), "random_state": 0}
    models = [
        MAMLRegressor(**settings, device=device).fit(X, Y, groups=groups)
        for device in ("cpu", DEVICE)
    ]
    for model in models:
        model.adapt(X, Y, groups=groups)
    for k in range(2):
        close([m.predict(X, groups=groups, return_std=True)[k] for m in models], rtol=1e-3)


DEFAULTS = {
    "numbers": (MAMLRegressor, NOISY, {}),
    "several targets": (MAMLRegressor, np.c_[NOISY, X[:, 0]], {}),
    "shared labels": (MAMLClassifier, C, {}),
    "three labels": (MAMLClassifier, KINDS, {}),
    "local labels": (MAMLClassifier, KINDS, {"n_ways": 3, "n_shots": 2, "n_queries": 2}),
    "counts": (MAMLRegressor, np.floor(Y**2), {"loss": "poisson"}),
    "medians": (MAMLRegressor, NOISY, {"loss": "absolute_error"}),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_model_of_the_cpu_answers_the_same_on_the_device(name, tmp_path):
    """Members and what a task's rows say of them, learned by the kernels of the CPU."""
    make, y, settings = DEFAULTS[name]
    settings = {"max_iter": 30, "hidden_layer_sizes": (8,), "random_state": 0, **settings}
    groups = np.repeat(np.arange(12), 12)
    model = make(**settings, device="cpu").fit(X, y, groups=groups)
    model.save(tmp_path / "model")
    # the others have no labelled rows, without which local labels mean nothing
    some = (groups % 3 > 0) | ("n_ways" in settings)
    models = [load(tmp_path / "model", device=device) for device in ("cpu", DEVICE)]
    for m in models:
        m.set_params(unseen_tasks="prior").adapt(X[some], y[some], groups=groups[some])
    if make is MAMLClassifier:
        close([m.predict_proba(X, groups=groups) for m in models], rtol=1e-3, atol=1e-4)
        return
    close([m.predict(X, groups=groups) for m in models], rtol=1e-3, atol=1e-4)
    hows = [{"return_std": True}]
    if settings.get("loss") != "poisson":
        hows.append({"return_quantiles": (0.1, 0.9)})
    for how in hows:
        answers = [m.predict(X, groups=groups, **how) for m in models]
        for pair in zip(*answers, strict=True):
            close([*pair], rtol=1e-3, atol=1e-4)


def test_few_shot_estimators(regressors, classifiers):
    for kind, models, y in (
        (FewShotRegressor, regressors, Y),
        (FewShotClassifier, classifiers, C),
    ):
        close([kind(prior=m).fit(X[:9], y[:9]).predict(X[9:18]) for m in models])


def test_adapting_and_predicting_in_one_call(regressors):
    close(
        [
            np.asarray(
                adapt_predict(m, X, Y, X, groups_support=G, groups_query=G, tasks_per_partition=3)
            )
            for m in regressors
        ]
    )


def test_files_and_pickles(regressors, tmp_path):
    _, device = regressors
    device.adapt(X, Y, groups=G)
    expected = device.predict(X, groups=G)
    device.save(tmp_path / "model", training=True)
    for again in (
        load(tmp_path / "model"),
        pickle.loads(pickle.dumps(device)),
        copy.deepcopy(device),
    ):
        assert again.device_ == torch.device(DEVICE)
        assert {p.device.type for p in again.module_.parameters()} == {NAME}
        np.testing.assert_array_equal(again.predict(X, groups=G), expected)
        again.set_params(warm_start=True).fit(X, Y, groups=G)
        assert again.n_iter_ == 2 * device.n_iter_
    on_cpu = load(tmp_path / "model", device="cpu")
    assert {p.device.type for p in on_cpu.module_.parameters()} == {"cpu"}
    np.testing.assert_allclose(on_cpu.predict(X, groups=G), expected, rtol=1e-5, atol=1e-6)


def test_a_file_of_a_device_that_is_missing_is_loaded_on_the_cpu(regressors, tmp_path, monkeypatch):
    _, device = regressors
    device.save(tmp_path / "model")
    real = torch.zeros

    def zeros(*args, **kwargs):
        if str(kwargs.get("device")) == DEVICE:
            raise RuntimeError("no such device")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.warns(DeviceWarning, match="loaded on the CPU"):
        model = load(tmp_path / "model")
    assert model.device_ == torch.device("cpu")


# --- memory


@emulated
def test_a_batch_that_does_not_fit_is_run_in_pieces(updates):
    settings = {**SMALL, "hidden_layer_sizes": (32,), "device": DEVICE}
    whole = MAMLRegressor(**settings).fit(X, Y, groups=G)
    # the hidden units of four tasks take more than this, those of two do not
    with memory_limit(3000), pytest.warns(EngineFallbackWarning, match="memory did not suffice"):
        pieces = MAMLRegressor(**settings).fit(X, Y, groups=G)
    for a, b in zip(parameters(pieces).values(), parameters(whole).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_unhindered(updates)


# --- graphs that are launched at once


LONG = {"max_iter": 8, "n_shots": 5, "n_queries": 5}


@pytest.fixture
def traces(monkeypatch):
    """Trace a step at once, and count what is traced and captured."""
    monkeypatch.setattr(tracer.Tracer.__init__, "__defaults__", (1, 2))
    made = []
    original = graphs.CudaGraph.__init__

    def spy(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(graphs.CudaGraph, "__init__", spy)
    return made


@emulated
def test_a_recorded_step_is_captured_and_replayed(traces, updates):
    eager = MAMLRegressor(**{**SMALL, **LONG}).fit(X, Y, groups=G)
    with capturing() as graphs:
        device = MAMLRegressor(**{**SMALL, **LONG}, device=DEVICE).fit(X, Y, groups=G)
    assert len(traces) == len(graphs) == 2  # the meta-step, and the optimiser's
    # all but the two before it was recorded, and one to compare it with the step
    assert [graph.n_replays for graph in graphs] == [7, 6]
    assert_same(eager, device)
    assert_unhindered(updates, n_first=3)
    # a replay is one launch: what is left is what arguments and results are copied with
    assert updates[-1].operations <= 31


class Restless(Callback):
    """Changes what a step of the optimiser depends on, when an epoch ends."""

    def on_epoch_end(self, net, **kwargs):
        for group in net.optimizer_.param_groups:
            group["betas"] = (0.5 * group["betas"][0], 0.9)


@emulated
@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.01},
        {"max_grad_norm": None},
        {"meta_batch_size": 1},
        {"callbacks": [Restless()]},
        {"optimizer": "adamw", "optimizer__weight_decay": 0.1, "optimizer__amsgrad": True},
    ],
    ids=["clipped", "not clipped", "skipped", "restless", "adamw"],
)
@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
def test_steps_of_the_optimiser_are_captured(settings, traces, monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 4)
    settings = {**SMALL, **LONG, "max_iter": 12, **settings}
    skips = settings["meta_batch_size"] == 1
    rows = np.where((G == 3)[:, None], np.float32(1e38), X) if skips else X
    eager = MAMLRegressor(**settings).fit(rows, Y, groups=G)
    with capturing() as graphs:
        device = MAMLRegressor(**settings, device=DEVICE).fit(rows, Y, groups=G)
    assert sum(graph.n_replays for graph in graphs[1:]) >= 9
    assert len(graphs) == (4 if "callbacks" in settings else 2)
    assert_same(eager, device)
    assert bool(sum(device.history_[:, "non_finite"])) == skips


@emulated
def test_a_step_of_the_optimiser_that_cannot_be_captured_is_made(traces, monkeypatch):
    eager = MAMLRegressor(**{**SMALL, **LONG}).fit(X, Y, groups=G)
    original = graphs.CudaGraph.__init__

    def fail(self, function, inputs, backend):
        if len(inputs) == 2:
            raise RuntimeError("no room")
        original(self, function, inputs, backend)

    monkeypatch.setattr(graphs.CudaGraph, "__init__", fail)
    with capturing(), pytest.warns(EngineFallbackWarning, match=r"optimiser cannot.*no room"):
        device = MAMLRegressor(**{**SMALL, **LONG}, device=DEVICE).fit(X, Y, groups=G)
    assert_same(eager, device)


@emulated
@pytest.mark.parametrize("module", [None, conv(1)], ids=["recorded", "as they are"])
def test_a_resumed_fit_captures_again(module, traces, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "UPDATES_PER_EPOCH", 2)
    data = (X, Y) if module is None else (IMAGES, Y)
    settings = {**SMALL, **LONG, "module": module, "device": DEVICE}

    def fit(*callbacks):
        return MAMLRegressor(**settings, callbacks=list(callbacks)).fit(*data, groups=G)

    with capturing() as graphs:
        whole = fit()
        dies_midway(lambda: fit(Checkpoint(tmp_path / "fit", every=0)))
        resumed = fit(Checkpoint(tmp_path / "fit", every=0))
    assert len(graphs) >= 3
    assert graphs[-1].n_replays >= 4
    for a, b in zip(parameters(resumed).values(), parameters(whole).values(), strict=True):
        assert torch.equal(a, b)


@emulated
def test_steps_of_convolutions_are_captured_without_a_record(traces, updates):
    settings = {
        **SMALL, "max_iter": 6, "module": conv(), "n_shots": 2, "n_queries": 2,
    }  # fmt: skip
    eager = MAMLClassifier(**settings).fit(IMAGES, KINDS, groups=G)
    with capturing() as graphs:
        device = MAMLClassifier(**settings, device=DEVICE).fit(IMAGES, KINDS, groups=G)
    assert len(graphs) == 2
    assert min(graph.n_replays for graph in graphs) >= 4
    assert_same(eager, device)
    assert_unhindered(updates, n_first=3)
    assert updates[-1].operations < updates[0].operations / 4


@emulated
def test_convolutions_run_as_they_are_where_nothing_is_captured(traces):
    settings = {**SMALL, "module": conv(), "n_shots": 2, "n_queries": 2, "max_iter": 6}
    with capturing(fails="no room"), pytest.warns(EngineFallbackWarning, match="no room"):
        failed = MAMLClassifier(**settings, device=DEVICE).fit(IMAGES, KINDS, groups=G)
    plain = MAMLClassifier(**settings, device=DEVICE).fit(IMAGES, KINDS, groups=G)
    assert traces == []
    for a, b in zip(parameters(failed).values(), parameters(plain).values(), strict=True):
        assert torch.equal(a, b)


@emulated
def test_results_of_a_graph_are_not_overwritten_by_later_calls(traces):
    with capturing():
        graph = graphs.CudaGraph(
            lambda a, b: [a @ b, a + 1], [torch.ones(2, 2, device=DEVICE)] * 2, backend()
        )
    first = [torch.full((2, 2), v, device=DEVICE) for v in (2.0, 3.0)]
    second = [torch.full((2, 2), v, device=DEVICE) for v in (5.0, 7.0)]
    results = graph(*first)
    kept = [on_host(r).clone() for r in results]
    again = graph(*second)
    assert on_host(again[0])[0, 0] == 70
    for result, before in zip(results, kept, strict=True):
        assert torch.equal(on_host(result), before)
    # and its arguments are left alone
    assert on_host(first[0])[0, 0] == 2


@emulated
def test_a_graph_takes_the_arguments_of_each_call(traces):
    weights = torch.ones(3, device=DEVICE)
    with capturing():
        graph = graphs.CudaGraph(lambda w, n: [w * 2, n + 1], [weights, weights.long()], backend())
    weights.mul_(10)
    floats, numbers = graph(weights, weights.long())
    assert on_host(floats).tolist() == [20, 20, 20]
    assert on_host(numbers).tolist() == [11, 11, 11]


@emulated
def test_a_step_that_cannot_be_captured_runs_as_recorded(traces):
    reason = "operation not permitted when stream is capturing"
    with (
        capturing(fails=reason),
        pytest.warns(EngineFallbackWarning, match=f"captured as a CUDA graph.*{reason}"),
    ):
        device = MAMLRegressor(**{**SMALL, **LONG}, device=DEVICE).fit(X, Y, groups=G)
    assert traces == []
    assert_same(MAMLRegressor(**{**SMALL, **LONG}).fit(X, Y, groups=G), device)


@emulated
def test_waiting_while_a_graph_is_captured_is_refused():
    def step(a):
        return [a * a.sum().item()]

    with capturing(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.CudaGraph(step, [torch.ones(2, device=DEVICE)], backend())


@emulated
def test_a_step_that_draws_is_not_captured(traces):
    settings = {**SMALL, **LONG, "module": dropout()}
    eager = MAMLRegressor(**settings).fit(X, Y, groups=G)
    with capturing() as graphs:
        device = MAMLRegressor(**settings, device=DEVICE).fit(X, Y, groups=G)
    assert graphs == []
    # and recording it has drawn nothing
    assert_same(eager, device)


# --- negative controls


class Plants(SGD):
    """Takes plain steps, and does something on the way that an accelerator forbids."""

    def __init__(self, plant=None, max_grad_norm=None):
        super().__init__(max_grad_norm)
        self.plant = plant

    def step(self, k, params, grads, *args, **kwargs):
        name = next(iter(grads))
        grads = {**grads, name: self.plant(grads[name])}
        return super().step(k, params, grads, *args, **kwargs)


def through_numpy(g):
    return torch.from_numpy(g.detach().numpy().copy())


def with_a_stranger(g):
    return g + torch.zeros(g.shape)


def looks(g):
    return g * float(bool(g.detach().isfinite().all()))


@pytest.mark.parametrize(
    ("plant", "error"),
    [(through_numpy, TypeError), (with_a_stranger, RuntimeError)],
    ids=["numpy", "CPU tensor"],
)
def test_what_is_planted_is_caught(plant, error):
    settings = {**SMALL, "update_rule": Plants(plant)}
    with pytest.raises((error, MixedDevicesError)):
        MAMLRegressor(**settings, device=DEVICE).fit(X, Y, groups=G)


def test_a_planted_look_is_counted(updates):
    settings = {**SMALL, "update_rule": Plants(looks)}
    MAMLRegressor(**settings, device=DEVICE).fit(X, Y, groups=G)
    assert all(counts.synchronisations for counts in updates)
    with pytest.raises(AssertionError):
        assert_unhindered(updates)


# --- where the default model is fitted


@emulated
@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        ({"device": "auto"}, "MOST_OF_NEWTON", "cpu"),
        ({"device": "auto"}, "MOST_ON_HOST", NAME),
        ({"device": "auto", "loss": "absolute_error"}, "MOST_ON_HOST", "cpu"),
        ({"device": "auto", "loss": "absolute_error"}, "MOST_OF_NEWTON", NAME),
        ({"device": "auto", "update_rule": "sgd"}, "MOST_OF_NEWTON", NAME),
        ({"device": DEVICE}, "MOST_OF_NEWTON", NAME),
    ],
    ids=["small", "large", "small, Newton", "large, Newton", "sgd", "by request"],
)
def test_small_heads_are_fitted_on_the_cpu(settings, name, expected, tmp_path, monkeypatch):
    """What is larger than the bound of this name."""
    monkeypatch.setattr(building, name, 0)
    for module in (base, stored):
        resolve = module.resolve_device
        monkeypatch.setattr(
            module, "resolve_device", lambda d, r=resolve: r(DEVICE if d == "auto" else d)
        )
    model = MAMLRegressor(**{**SMALL, "update_rule": "auto", **settings}).fit(X, NOISY, groups=G)
    assert model.device_.type == expected
    assert {p.device.type for p in model._learner.parameters()} == {expected}
    model.adapt(X[:5], NOISY[:5]).save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.device_.type == expected
    np.testing.assert_array_equal(again.predict(X[:9]), model.predict(X[:9]))


@emulated
@pytest.mark.parametrize("name", ["numbers", "shared labels", "quantiles"])
def test_steps_of_a_head_are_captured_once_their_shape_comes_again(name, monkeypatch, updates):
    monkeypatch.setattr(launched, "LEAST_VISITS", 1)
    make, features, y, groups, settings = HEADS[name]
    settings = {**SMALL, **settings, "update_rule": "gaussian-head", "max_iter": 30}
    plain = make(**settings, device=DEVICE).fit(features, y, groups=groups)
    with capturing() as graphs:
        device = make(**settings, device=DEVICE).fit(features, y, groups=groups)
    assert sum(graph.n_replays for graph in graphs) >= 5
    for a, b in zip(parameters(device).values(), parameters(plain).values(), strict=True):
        assert torch.equal(a, b)
    # comparing with the step waits, once for each shape
    assert sum(bool(counts.waits) for counts in updates) <= len(graphs)


@emulated
def test_steps_of_a_head_that_cannot_be_captured_are_made_as_they_are(monkeypatch):
    monkeypatch.setattr(launched, "LEAST_VISITS", 1)
    settings = {**SMALL, "update_rule": "gaussian-head", "max_iter": 12, "device": DEVICE}
    plain = MAMLRegressor(**settings).fit(X, NOISY, groups=G)
    with capturing(fails="no room"), pytest.warns(EngineFallbackWarning, match=r"head.*no room"):
        failed = MAMLRegressor(**settings).fit(X, NOISY, groups=G)
    for a, b in zip(parameters(failed).values(), parameters(plain).values(), strict=True):
        assert torch.equal(a, b)


@emulated
def test_weighted_steps_of_a_head_are_not_captured():
    """They depend on numbers of rows that the host knows."""
    weight = np.where(RAGGED, 1.0, 2.0)
    settings = {**SMALL, "update_rule": "gaussian-head", "max_iter": 12, "device": DEVICE}
    with capturing() as graphs:
        MAMLRegressor(**settings).fit(X, NOISY, groups=G, sample_weight=weight)
    assert graphs == []


@emulated
def test_systems_are_solved_in_batches_on_the_device():
    torch.manual_seed(0)
    A = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    system = (A @ A.mT + torch.eye(5)).requires_grad_()
    v = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    found = {}
    for device in ("cpu", DEVICE):
        own = system.detach().to(device).requires_grad_()
        factor = torch.linalg.cholesky(own.detach())
        inverse = systems.inverse_of(own)
        (grad,) = torch.autograd.grad((inverse.sin() * inverse).sum(), own)
        results = [systems.solve(v.to(device), factor), systems.inverse_of_factor(factor)]
        found[device] = [on_host(t.detach()) for t in (*results, inverse, grad)]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    singular = systems.inverse_of(-system.detach().to(DEVICE))
    assert on_host(singular).isnan().all()
