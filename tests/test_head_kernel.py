"""The compiled gradient of a Gaussian head is that of torch."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from sklearn_maml import MAMLRegressor, native
from sklearn_maml.data.episodes import EpisodeBatch, Rows, totals
from sklearn_maml.engine.rungs import base as rungs
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.learners import head_trainer, laplace
from sklearn_maml.learners.bodies import MLPBody, ModuleBody
from sklearn_maml.learners.compiled import head_kernel
from sklearn_maml.learners.gaussian import ClassHead, GaussianHead
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.likelihoods import Counts, Labels, Positive, find_likelihood
from sklearn_maml.modules import ACTIVATIONS
from sklearn_maml.targets.losses import (
    AbsoluteError,
    BinaryCrossEntropy,
    CrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
    SquaredError,
)

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the package was installed without its kernels"
)

N_ROWS = 50  # of the collection


@pytest.fixture(autouse=True)
def torch_finds_modes_as_exactly(monkeypatch):
    monkeypatch.setattr(laplace, "NEAR", 1e-9)


def make_head(
    d=3, hidden=(8,), n_outputs=1, classes=False, same=False, waves=4, n_members=2, table=True,
    activation="relu", loss=None,
):  # fmt: skip
    """A head of random parameters in float64."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    n = 1 + (d if table else 0)
    starts = []
    for _ in range(n_members):
        mean, factor = rng.normal(size=(n, n_outputs)), np.eye(n) + 0.1 * rng.normal(size=(n, n))
        amplitude = np.exp(0.3 * np.r_[0, rng.normal(size=n_outputs - 1)])
        noise = 0.3 + rng.random(n_outputs)
        one = np.ones(1)
        starts.append((mean, factor, *((one, one) if classes else (amplitude, noise))))
    body = MLPBody(n_members, [d, *hidden], ACTIVATIONS[activation](), generator, waves)
    likelihood = find_likelihood(CrossEntropy() if classes else SquaredError())
    center, scale = rng.normal(size=n - 1), 1 + rng.random(n - 1)
    options = {"likelihood": likelihood, "same_classes": same}
    kind = ClassHead if classes else GaussianHead
    if loss is not None:
        kind = LaplaceHead
        options["likelihood"] = find_likelihood(loss, 2)
        options |= {"units": np.full(n_outputs, 0.5), "level": np.ones(n_outputs)}
    head = kind(body, starts, center, scale, **options).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return head


def make_batch(head, n_support, n_query, weighted=False, n_tasks=5, n_given=None):
    """Episodes in float64; weights have zeros among them, as where rows are padded."""
    generator = torch.Generator().manual_seed(1)
    d, n_outputs = head.body.weight0.shape[1], head.n_outputs
    likelihood = head.likelihood

    def rows(n):
        shape = (n_tasks, n)
        X = torch.randn(*shape, d, generator=generator, dtype=torch.float64)
        y = torch.randn(*shape, n_outputs, generator=generator, dtype=torch.float64)
        if likelihood.are_classes:
            y = torch.randint(n_outputs, shape, generator=generator)
        elif isinstance(likelihood, Labels):
            y = (y > 0).double()
        elif isinstance(likelihood, Counts):
            y = 0.5 * torch.poisson(2 * y.exp(), generator=generator)
        elif isinstance(likelihood, Positive):
            y = y.exp()
        elif isinstance(head, LaplaceHead):  # some are far off
            y = torch.where(torch.rand(y.shape, generator=generator) < 0.1, 100 * y, y)
        weight = None
        if weighted:
            weight = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            weight[torch.rand(shape, generator=generator) < 0.3] = 0
        return Rows(X, y, weight, index=torch.randint(N_ROWS, shape, generator=generator))

    return EpisodeBatch(rows(n_support), rows(n_query), n_given=n_given)


def unseen_of(visible):
    """Bits of the members that do not see a row, as kernels and trainers take them."""
    return np.packbits(~np.asarray(visible), axis=0, bitorder="little")[0]


def of_torch(head, batch, weights, visible, k, task_weight):
    """Gradients and outputs of torch, as of `HeadKernel.step`."""
    both = (batch.support, batch.query)
    X = torch.cat([rows.X for rows in both], 1)
    y = torch.cat([rows.y for rows in both], 1)
    if head.likelihood.are_classes:
        y = nn.functional.one_hot(y, head.n_outputs).double()
    mask = torch.ones(head.n_members, *X.shape[:2], dtype=torch.float64)
    if weights[0] is not None:
        mask = mask * torch.cat(weights, 1)
    if visible is not None:
        mask = mask * visible[:, torch.cat([rows.index for rows in both], 1)]
    named = {name: p.detach().requires_grad_() for name, p in head.named_parameters()}
    nll, outputs = head.functions(named).loss(X, y, mask, k)
    grads = torch.autograd.grad(
        (nll * task_weight).sum(), [*named.values()], allow_unused=True, materialize_grads=True
    )
    n_query = batch.query.X.shape[1]
    # torch 2.9 fills in zeros that require a gradient
    grads = [grad.detach() for grad in grads]
    return dict(zip(named, grads, strict=True)), outputs[:, :, -n_query:].detach()


def params_of(head):
    return {name: p.detach() for name, p in head.named_parameters()}


def run(head, batch, visible=None, n_threads=None, task_weight=None):
    """Both results: of the kernel, and of torch."""
    kernel = head_kernel(head, head.n_outputs, dtype=torch.float64)
    if n_threads is not None:
        kernel._n_threads = n_threads
    assert kernel.takes(batch)
    k = batch.support.X.shape[1] if batch.n_given is None else batch.n_given
    weights = (batch.support.weight, batch.query.weight)
    unseen = None if visible is None else torch.from_numpy(unseen_of(visible))
    if task_weight is None:
        task_weight = torch.linspace(0.01, 0.02, len(batch), dtype=torch.float64)
    got = kernel.step(params_of(head), batch, weights, unseen, k, task_weight)
    return got, of_torch(head, batch, weights, visible, k, task_weight)


def assert_same(got, expected, rtol=1e-9):
    (grads, outputs), (grads_of_torch, outputs_of_torch) = got, expected
    assert grads.keys() == grads_of_torch.keys()
    for name, grad in grads_of_torch.items():
        size = max(grad.abs().max(), 1e-5)  # some are 0 but for the rounding of torch
        assert_allclose(grads[name], grad, rtol=0, atol=rtol * size, err_msg=name)
    assert_allclose(outputs, outputs_of_torch, rtol=rtol, atol=rtol)


HEADS = {
    "numbers": {},
    "without waves": {"waves": 0},
    "two layers": {"hidden": (8, 5)},
    "three layers": {"hidden": (20, 33, 7)},
    "one feature": {"d": 1, "n_members": 3},
    "many features": {"d": 40, "hidden": (6,), "waves": 0},
    "several targets": {"n_outputs": 3},
    "rows that are no tables": {"table": False},
    "two classes": {"classes": True, "n_outputs": 2},
    "more classes than units": {"classes": True, "n_outputs": 20, "hidden": (9, 9)},
    "local labels": {"classes": True, "n_outputs": 3, "same": True, "waves": 0},
    "local labels, no tables": {
        "classes": True, "n_outputs": 5, "same": True, "table": False, "waves": 0
    },
    "logit of the second of two classes": {"loss": CrossEntropy(), "hidden": (8, 5)},
    "labels": {"loss": BinaryCrossEntropy(), "n_outputs": 3},
    "counts": {"loss": Poisson(), "n_outputs": 2, "hidden": (8, 5)},
    "amounts": {"loss": Gamma()},
    "heavy tails": {"loss": AbsoluteError(), "n_outputs": 2},
    "a quantile": {"loss": Quantile(0.9)},
    "tails of the Huber loss": {"loss": Huber(0.5), "n_outputs": 2},
}  # fmt: skip
NEWTON = [name for name in HEADS if "loss" in HEADS[name]]
SIZES = [(4, 6, None), (10, 15, None), (1, 1, None), (40, 30, None), (5, 7, 2), (5, 3, 0)]


@pytest.mark.parametrize("name", HEADS)
def test_gradients_and_outputs_are_those_of_torch(name):
    for n_support, n_query, n_given in SIZES:
        if HEADS[name].get("same") and n_given == 0:
            continue  # nothing of such a head says anything then
        head = make_head(**HEADS[name])
        assert_same(*run(head, make_batch(head, n_support, n_query, n_given=n_given)))


def test_a_copy_of_a_kernel_keeps_its_own_numbers():
    head = make_head()
    batch = make_batch(head, 6, 4)
    kernel = head_kernel(head, 1, dtype=torch.float64)
    task_weight = torch.ones(len(batch), dtype=torch.float64)

    def step(one, params):
        return one.step(params, batch, (None, None), None, 6, task_weight)

    first, _ = step(kernel, params_of(head))
    one = step(kernel, {n: p[:1] for n, p in params_of(head).items()})[0]
    for twin in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        others = {n: p + 0.1 for n, p in params_of(head).items()}
        changed, _ = step(twin, others)
        again, _ = step(kernel, params_of(head))
        for name, grad in first.items():
            assert torch.equal(again[name], grad)
            assert torch.equal(one[name], grad[:1])
        assert not torch.equal(changed["factor"], first["factor"])
        assert torch.equal(step(twin, params_of(head))[0]["factor"], first["factor"])


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize(
    "name", ["two layers", "several targets", "two classes", "local labels", *NEWTON]
)
def test_weights_padding_and_rows_that_members_do_not_see(name, instructions, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, instructions)
    head = make_head(**HEADS[name])
    visible = torch.from_numpy(np.random.default_rng(0).random((2, N_ROWS)) < 0.7)
    batch = make_batch(head, 6, 9, weighted=True)
    assert_same(*run(head, batch))
    assert_same(*run(head, batch, visible))
    assert_same(*run(head, make_batch(head, 6, 9, n_given=3), visible))
    nobody = torch.zeros(2, N_ROWS, dtype=torch.bool)
    got, expected = run(head, batch, nobody)
    assert_same(got, expected)
    assert all((grad == 0).all() for grad in got[0].values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    head = make_head(activation=activation, hidden=(5, 8))
    assert_same(*run(head, make_batch(head, 4, 6)))


@pytest.mark.parametrize("name", ["several targets", *NEWTON])
def test_the_gradient_is_that_of_finite_differences(name):
    head = make_head(**{**HEADS[name], "hidden": (8, 5), "activation": "tanh"})
    batch = make_batch(head, 5, 7, weighted=True)
    weight = torch.full((5,), 0.1, dtype=torch.float64)
    (grads, _), _ = run(head, batch, task_weight=weight)
    generator = torch.Generator().manual_seed(2)
    steps = {
        n: torch.randn(p.shape, generator=generator).double() for n, p in params_of(head).items()
    }
    X = torch.cat([batch.support.X, batch.query.X], 1)
    y = torch.cat([batch.support.y, batch.query.y], 1)
    if head.likelihood.are_classes:
        y = nn.functional.one_hot(y, head.n_outputs).double()
    mask = torch.cat([batch.support.weight, batch.query.weight], 1)[None]

    def loss(size):
        moved = {n: p + size * steps[n] for n, p in params_of(head).items()}
        nll, _ = head.functions(moved).loss(X, y, mask, 5)
        return float((nll * weight).sum())

    slope = sum(float((grads[n] * steps[n]).sum()) for n in grads)
    assert_allclose(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["two layers", "two classes", "counts"])
@pytest.mark.parametrize("n_tasks", [1, 17, 200])
def test_threads_change_no_bit(name, n_tasks, monkeypatch):
    monkeypatch.setattr("sklearn_maml.native.head.PARALLEL_WORK", 0)
    head = make_head(**HEADS[name])
    batch = make_batch(head, 4, 6, n_tasks=n_tasks)
    one, expected = run(head, batch, n_threads=1)
    assert_same(one, expected)
    for n_threads in (2, 5):
        more, _ = run(head, batch, n_threads=n_threads)
        assert torch.equal(one[1], more[1])
        assert all(torch.equal(one[0][n], more[0][n]) for n in one[0])


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_waves_of_any_angle(size):
    head = make_head()
    with torch.no_grad():
        head.body.frequency.mul_(size)
    # what rounding makes of the angle itself
    (_, outputs), (_, expected) = run(head, make_batch(head, 4, 6))
    assert_allclose(outputs, expected, rtol=1e-9, atol=max(1e-9, 1e-13 * size))


@pytest.mark.parametrize("name", ["two layers", "two classes", *NEWTON])
def test_what_is_not_finite_stays_with_its_member(name):
    head = make_head(**HEADS[name])
    with torch.no_grad():
        head.factor[1] *= torch.nan
    (grads, outputs), _ = run(head, make_batch(head, 4, 6))
    assert outputs[0].isfinite().all()
    assert not outputs[1].isfinite().any()
    assert all(grad[0].isfinite().all() for grad in grads.values())
    assert not grads["factor"][1].isfinite().any()


@pytest.mark.parametrize(
    "name", ["two layers", "several targets", "two classes", "local labels", *NEWTON]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_meta_steps_and_evaluations_of_a_trainer(name, weighted, monkeypatch):
    head = make_head(**HEADS[name]).float()
    visible = np.random.default_rng(0).random((2, N_ROWS)) < 0.7
    batch = make_batch(head, 6, 9, weighted=weighted, n_tasks=4)

    def single(rows):
        weight = (
            None if rows.weight is None else (rows.weight / totals(rows.weight)[:, None]).float()
        )
        y = rows.y if head.likelihood.are_classes else rows.y.float()
        lengths = None if weight is None else np.full(4, rows.X.shape[1])
        return dataclasses.replace(rows, X=rows.X.float(), y=y, weight=weight, lengths=lengths)

    batch = EpisodeBatch(single(batch.support), single(batch.query))
    params = {f"head.{name}": p for name, p in params_of(head).items()}

    def results():
        trainer = head_trainer.HeadTrainer(head, unseen_of(visible), [], weighted=weighted)
        return [trainer.meta_step(params, batch), trainer.evaluate(params, batch)]

    compiled = results()
    monkeypatch.setattr(head_trainer, "head_kernel", lambda *_: None)
    for got, expected in zip(compiled, results(), strict=True):
        assert_allclose(got.losses, expected.losses, rtol=1e-4)
        assert_allclose(got.outputs, expected.outputs, rtol=1e-4, atol=1e-5)
        assert got.grads.keys() == expected.grads.keys()
        for key, grad in expected.grads.items():
            assert got.grads[key].dtype == grad.dtype
            grad = grad.detach()  # as above
            assert_allclose(got.grads[key], grad, rtol=0, atol=1e-4 * max(grad.abs().max(), 1e-3))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_head_that_is_trained_is_watched_by_its_first_member(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(head_trainer, "head_kernel", lambda *_: None)
    head = make_head().float()
    batch = make_batch(head, 6, 9, weighted=False, n_tasks=4)
    support, query = (
        dataclasses.replace(rows, X=rows.X.float(), y=rows.y.float(), weight=None, lengths=None)
        for rows in (batch.support, batch.query)
    )
    batch = EpisodeBatch(support, query)
    visible = np.ones((2, N_ROWS), dtype=bool)
    visible[1] = False  # the other would have prior means
    params = {f"head.{name}": p for name, p in params_of(head).items()}
    trainer = head_trainer.HeadTrainer(head, unseen_of(visible), [])
    step = trainer.evaluate(params, batch)
    assert not step.grads
    expected = trainer.outputs(params, 0, batch)[0]
    assert_allclose(step.outputs, expected, rtol=1e-4, atol=1e-5)
    errors = (expected - query.y).square().mean((1, 2))
    assert_allclose(step.losses, errors, rtol=1e-4, atol=1e-5)


def test_fits_of_either_agree(monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(12, 8, 2)).astype(np.float32)
    y = X[..., 0] * rng.normal(size=(12, 1)) + 0.1 * rng.normal(size=(12, 8))
    options = {"update_rule": "gaussian-head", "max_iter": 20, "early_stopping": False}
    calls = []
    step = native._kernels.head_step
    monkeypatch.setattr(native.head._kernels, "head_step", lambda *a: calls.append(1) or step(*a))
    fits = [MAMLRegressor(hidden_layer_sizes=(8,), random_state=0, **options).fit(X, y)]
    assert calls
    monkeypatch.setattr(head_trainer, "head_kernel", lambda *_: None)
    fits.append(MAMLRegressor(hidden_layer_sizes=(8,), random_state=0, **options).fit(X, y))
    one, other = (reg.adapt(X[:, :4], y[:, :4]).predict(X[:, 4:]) for reg in fits)
    assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_heads_that_torch_has_to_train(monkeypatch):
    covered = make_head()
    assert head_kernel(covered, 1) is not None
    assert head_kernel(covered, 2) is None  # classes of an episode that are not the outputs
    assert head_kernel(make_head(hidden=(), waves=4), 1) is None
    odd = make_head()
    odd.body.activation = nn.Hardtanh()
    assert head_kernel(odd, 1) is None
    one = np.ones((1, 1)), np.eye(1), np.ones(1), np.ones(1)
    options = {"likelihood": find_likelihood(SquaredError())}
    module = ModuleBody([nn.Linear(3, 4)], 4)
    none = np.empty(0)
    assert head_kernel(GaussianHead(module, [one], none, none, **options), 1) is None
    body = MLPBody(1, [3, 4], nn.ReLU())

    class Own(Counts):
        """Of a user."""

    for likelihood, is_covered in ((Counts(Poisson()), True), (Own(Poisson()), False)):
        laplace_head = LaplaceHead(body, [one], none, none, likelihood=likelihood)
        assert (head_kernel(laplace_head, 1) is not None) == is_covered
    monkeypatch.setattr(native, "_kernels", None)
    monkeypatch.setattr(rungs, "_warned", set())
    with pytest.warns(EngineFallbackWarning, match="several times as long"):
        assert head_kernel(covered, 1) is None


def test_rows_of_either_precision_and_others_that_are_left_to_torch():
    head = make_head()
    batch = make_batch(head, 4, 6)
    both = (batch.support, batch.query)
    single = EpisodeBatch(*(dataclasses.replace(rows, X=rows.X.float()) for rows in both))
    again = (single.support, single.query)
    double = EpisodeBatch(*(dataclasses.replace(rows, X=rows.X.double()) for rows in again))
    kernel = head_kernel(head, 1)
    results = [
        kernel.step(params_of(head), rows, [None, None], None, 4, torch.full((5,), 0.1))
        for rows in (single, double)
    ]
    assert torch.equal(results[0][1], results[1][1])
    for name, grad in results[0][0].items():
        assert torch.equal(grad, results[1][0][name])
    narrow = dataclasses.replace(batch.query, X=batch.query.X[..., :2])
    labels = dataclasses.replace(batch.query, y=torch.zeros(5, 6, dtype=torch.int64))
    half = dataclasses.replace(batch.query, X=batch.query.X.half())
    for query in (narrow, labels, half):
        assert not kernel.takes(EpisodeBatch(batch.support, query))


@pytest.mark.parametrize("name", ["two layers", "two classes", "local labels", *NEWTON])
def test_held_out_tasks_of_a_member(name, monkeypatch):
    head = make_head(**HEADS[name]).float()
    batch = make_batch(head, 6, 9, n_tasks=4)
    held = [head_trainer.HeldOut(member, batch, np.arange(4)) for member in (None, 0, 1)]
    params = {f"head.{name}": p for name, p in params_of(head).items()}

    def results():
        trainer = head_trainer.HeadTrainer(head, None, held)
        return [trainer.held_out_errors(params), *trainer.errors(params, batch)]

    compiled = results()
    monkeypatch.setattr(head_trainer, "head_kernel", lambda *_: None)
    for got, expected in zip(compiled, results(), strict=True):
        assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
