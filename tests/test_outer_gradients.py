"""Implicit gradients, Reptile and annealed gradients are what their papers write down.

In float64, on every rung of the engine, against closed forms, finite differences and loops that
share no code with the library.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import warnings

import numpy as np
import pytest
import sklearn
import torch
from builders import (
    SIZES,
    descend,
    differences,
    flat,
    has_kernels,
    make_batch,
    make_engine,
    make_meta_params,
    make_mlp,
    parts_of,
    plain_tasks,
    quadratic,
    relative_error,
)
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from skorch.callbacks import Callback, LRScheduler
from test_memory import LiveBytes
from torch import nn
from torch.optim.lr_scheduler import StepLR

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.data.episodes import EpisodeBatch, Rows, joined_rows
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.engine.conv import layers
from sklearn_maml.engine.rungs.vmap import Vmap
from sklearn_maml.exceptions import NonFiniteStepWarning
from sklearn_maml.meta_gradients import FirstOrder, Implicit, MetaGradient, Reptile, SecondOrder
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.losses import cross_entropy_rows
from sklearn_maml.update_rules import SGD

RUNGS = ["loop", "vmap", "stacked", "traced"]
TOLERANCE = 1e-9


with_kernels = [
    *RUNGS,
    pytest.param(
        "native", marks=pytest.mark.skipif(not has_kernels(), reason="needs the compiled kernels")
    ),
]


# --- helpers


def meta_step(module, batch, meta_gradient, rung="loop", *, alpha=0.1, steps=3, **options):
    """Run a meta-step; the traced rung runs its graph, not the step it was recorded from."""
    engine = make_engine(module, rung, meta_gradient=meta_gradient, **options)
    params = make_meta_params(module)
    for _ in range(2 if rung == "traced" else 1):
        step = engine.meta_step(params, batch, alpha=alpha, steps=steps)
    assert engine.fallback_reason is None
    if rung == "traced":
        assert engine.tracer.reason is None
        assert engine.tracer.n_traced == 1
    else:
        assert engine.rung == rung
    return step


def assert_same(got, expected, batch, tolerance=TOLERANCE):
    assert sorted(got.grads) == sorted(expected.grads)
    assert relative_error(flat(got.grads), flat(expected.grads)) <= tolerance
    torch.testing.assert_close(got.losses, expected.losses, rtol=tolerance, atol=1e-14)
    torch.testing.assert_close(
        batch.query.real(got.outputs),
        batch.query.real(expected.outputs),
        rtol=tolerance,
        atol=1e-12,
    )


def linear_model(theta):
    module = nn.Linear(len(theta), 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(theta[None]))
    return module


THETA = np.array([0.7, -1.3, 0.4])


# --- implicit: linear regression by hand


def implicit_by_hand(batch, theta, alpha, steps, lam):
    """Gradient and query losses; with `steps` None of the exact solution.

    The inner problem has the gradient (A + lam) phi - (b + lam theta).
    """
    grads, losses = [], []
    eye = np.eye(len(theta))
    for j in range(len(batch)):
        (Xs, ys), (Xq, yq) = parts_of(batch, j)
        A, b = quadratic(Xs, ys)
        if steps is None:
            phi = np.linalg.solve(A + lam * eye, b + lam * theta)
        else:
            phi = descend(A + lam * eye, b + lam * theta, theta, alpha, steps)
        C, d = quadratic(Xq, yq)
        grads.append(np.linalg.solve(eye + A / lam, C @ phi - d))
        losses.append(np.mean((Xq @ phi - yq) ** 2))
    return np.mean(grads, 0), np.array(losses)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("rung", RUNGS)
def test_implicit_gradient_of_linear_regression_matches_its_closed_form(rung, steps, sizes):
    batch = make_batch(sizes, (3,), n_outputs=1)
    # three parameters: conjugate gradients are exact after three products
    gradient = Implicit(lam=1.5, cg_steps=3)
    step = meta_step(linear_model(THETA), batch, gradient, rung, steps=steps)
    grad, losses = implicit_by_hand(batch, THETA, 0.1, steps, 1.5)
    np.testing.assert_allclose(step.grads["module.weight"][0], grad, rtol=1e-9)
    np.testing.assert_allclose(step.losses, losses, rtol=1e-11)
    # negative control: the system matters
    first = implicit_by_hand(batch, THETA, 0.1, steps, 1e9)[0]
    assert np.abs(first - grad).max() > 0.01 * np.abs(grad).max()


@pytest.mark.parametrize("rung", ["loop", "stacked"])
def test_implicit_gradient_of_a_solved_linear_regression_is_exact(rung):
    batch = make_batch("ragged", (3,), n_outputs=1)
    step = meta_step(
        linear_model(THETA), batch, Implicit(lam=1.5, cg_steps=3), rung, steps=300, alpha=0.15
    )
    grad, losses = implicit_by_hand(batch, THETA, None, None, 1.5)
    np.testing.assert_allclose(step.grads["module.weight"][0], grad, rtol=1e-9)
    np.testing.assert_allclose(step.losses, losses, rtol=1e-9)


def test_the_closed_form_is_the_derivative_of_the_solution():
    """The hand-derived reference itself, against finite differences."""
    batch = make_batch("ragged", (3,), n_outputs=1)
    grad, _ = implicit_by_hand(batch, THETA, None, None, 1.5)
    for i in range(3):
        ends = [
            implicit_by_hand(batch, THETA + h * np.eye(3)[i], None, None, 1.5)[1].mean()
            for h in (1e-5, -1e-5)
        ]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[i], rel=1e-8)


# --- implicit: a network against finite differences of the solved bilevel problem

LAM = 2.0


class Bilevel:
    """Query loss after solving the inner problem of a network by Newton's method.

    Shares no code with the library.
    """

    def __init__(self, module, batch, fast):
        self.module = module
        self.tasks = plain_tasks(batch)
        self.fast = fast
        self.params = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.starts = None

    def loss(self, params, X, y):
        return (torch.func.functional_call(self.module, params, (X,)) - y).square().mean()

    def merged(self, params, phi):
        """All parameters, those that adapt from a vector."""
        parts = phi.split([params[n].numel() for n in self.fast])
        own = {n: v.view(params[n].shape) for n, v in zip(self.fast, parts, strict=True)}
        return {**params, **own}

    def solve(self, params, X, y, phi):
        theta = torch.cat([params[n].flatten() for n in self.fast])

        def inner(phi):
            distance = (phi - theta).square().sum()
            return self.loss(self.merged(params, phi), X, y) + LAM / 2 * distance

        n_gradient_steps, n_newton_steps = (50, 8) if phi is None else (0, 3)
        phi = theta if phi is None else phi

        def slope(phi):
            phi = phi.detach().requires_grad_()
            return torch.autograd.grad(inner(phi), phi)[0]

        def hessian(phi):
            return torch.autograd.functional.hessian(inner, phi)

        for _ in range(n_gradient_steps):
            phi = phi - 0.2 * slope(phi)
        for _ in range(n_newton_steps):
            phi = phi - torch.linalg.solve(hessian(phi), slope(phi))
        assert float(slope(phi).abs().max()) < 1e-12
        assert float(torch.linalg.eigvalsh(hessian(phi)).min()) > 0
        return phi

    def value(self, params):
        starts = self.starts or [None] * len(self.tasks)
        losses, ends = [], []
        for (Xs, ys, Xq, yq), start in zip(self.tasks, starts, strict=True):
            phi = self.solve(params, Xs, ys, start)
            losses.append(self.loss(self.merged(params, phi), Xq, yq).item())
            ends.append(phi)
        self.starts = self.starts or ends
        return np.mean(losses)

    def gradient(self, h=1e-5):
        self.value(self.params)  # what the solves below start from
        slopes = differences(self.value, self.params, h)
        return {f"module.{name}": slope for name, slope in slopes.items()}


@pytest.fixture(scope="module")
def bilevel():
    """Finite differences of the network's bilevel loss, for what adapts."""
    found = {}
    for adapted in ("all", "head"):
        module, batch = make_mlp(), make_batch("ragged")
        reference = Bilevel(module, batch, adapted_names(module, adapted))
        found[adapted] = reference.gradient()
    return found


@pytest.mark.parametrize("adapted", ["all", "head"])
@pytest.mark.parametrize("rung", ["loop", "vmap", "stacked"])  # traces of many steps take long
def test_implicit_gradient_is_that_of_the_solved_bilevel_problem(bilevel, rung, adapted):
    module, batch = make_mlp(), make_batch("ragged")
    step = meta_step(
        module, batch, Implicit(LAM, cg_steps=30), rung, adapted=adapted, alpha=0.2, steps=120
    )
    expected = bilevel[adapted]
    for name, g in expected.items():
        assert relative_error(step.grads[name], g) <= 1e-6, name
    # negative controls: what is left out by first-order gradients matters, for what is shared too
    first = meta_step(module, batch, FirstOrder(), adapted=adapted, alpha=0.2, steps=120)
    for name, g in expected.items():
        assert relative_error(first.grads[name], g) > 1e-2, name


def errors_of(gradients, exact, **options):
    module, batch = make_mlp(), make_batch("ragged")
    return [
        relative_error(flat(meta_step(module, batch, g, "stacked", **o, **options).grads), exact)
        for g, o in gradients
    ]


@pytest.mark.parametrize("adapted", ["all", "head"])
def test_implicit_gradient_converges_with_inner_steps_and_with_products(adapted):
    module, batch = make_mlp(), make_batch("ragged")
    options = {"alpha": 0.2, "adapted": adapted}
    exact = flat(
        meta_step(module, batch, Implicit(LAM, cg_steps=40), "loop", steps=300, **options).grads
    )
    by_steps = errors_of(
        [(Implicit(LAM, cg_steps=40), {"steps": s}) for s in (1, 5, 15, 30, 60)], exact, **options
    )
    by_products = errors_of(
        [(Implicit(LAM, cg_steps=n), {"steps": 300}) for n in (1, 2, 4, 6, 8, 16)],
        exact,
        **options,
    )
    for errors in (by_steps, by_products):
        pairs = itertools.pairwise(errors)
        assert all(later < max(0.5 * sooner, 1e-13) for sooner, later in pairs)
        assert errors[0] > 1e-2
        assert errors[-1] < 1e-8


def test_the_neumann_series_converges_where_the_proximal_term_outweighs_the_curvature():
    exact = flat(meta_step(make_mlp(), make_batch("ragged"), Implicit(20.0, cg_steps=40)).grads)
    weak = flat(meta_step(make_mlp(), make_batch("ragged"), Implicit(0.5, cg_steps=40)).grads)
    options = {"alpha": 0.1, "steps": 3}

    def series(lam, powers):
        return [(Implicit(lam, cg_steps=n, solver="neumann"), {}) for n in powers]

    errors = errors_of(series(20.0, (1, 2, 4, 8, 16)), exact, **options)
    assert all(later < 0.5 * sooner for sooner, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-8
    # negative control: with a weak proximal term it diverges
    assert errors_of(series(0.5, (16,)), weak, **options)[0] > 1.0


def test_the_neumann_series_is_the_sum_of_its_powers():
    batch = make_batch("ragged", (3,), n_outputs=1)
    for powers in (1, 3):
        expected = []
        for j in range(len(batch)):
            (Xs, ys), (Xq, yq) = parts_of(batch, j)
            A, b = quadratic(Xs, ys)
            phi = descend(A + 6 * np.eye(3), b + 6 * THETA, THETA, 0.1, 2)
            C, d = quadratic(Xq, yq)
            terms = [np.linalg.matrix_power(-A / 6, i) for i in range(powers + 1)]
            expected.append(sum(terms) @ (C @ phi - d))
        gradient = Implicit(6.0, cg_steps=powers, solver="neumann")
        step = meta_step(linear_model(THETA), batch, gradient, "stacked", steps=2)
        np.testing.assert_allclose(step.grads["module.weight"][0], np.mean(expected, 0), rtol=1e-11)


# --- implicit: curvature of either sign, and nothing to solve


def signed_rows(out, y):
    """Half of the squared output, times a target that gives the curvature its sign."""
    return 0.5 * y[..., 0] * out[..., 0].square()


@pytest.mark.parametrize("rung", RUNGS)
def test_conjugate_gradients_end_for_the_tasks_whose_curvature_is_negative(rung):
    # One parameter, theta = 2, no inner steps, so that H is the support target and g = theta.
    # With lam = 2: (1 + H / 2) v = 2 where 1 + H / 2 > 0, and v = g where it is not.
    curvatures = [1.0, -3.0, -1.0, 0.0]
    X = torch.ones(4, 1, 1, dtype=torch.float64)
    y = torch.tensor(curvatures, dtype=torch.float64).view(4, 1, 1)
    expected = [2 / 1.5, 2.0, 2 / 0.5, 2.0]
    module = linear_model(np.array([2.0]))
    gradient = Implicit(lam=2.0, cg_steps=4)
    step = meta_step(
        module, EpisodeBatch(Rows(X, y), Rows(X, X)), gradient, rung, steps=0, row_loss=signed_rows
    )
    np.testing.assert_allclose(step.grads["module.weight"].item(), np.mean(expected), rtol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("rung", RUNGS)
def test_tasks_without_a_query_gradient_are_nothing_to_solve(rung, solver):
    module = linear_model(np.array([2.0]))
    X = torch.tensor([[[1.0], [3.0]], [[2.0], [1.0]]], dtype=torch.float64)
    support = Rows(X, X)
    # the query rows of the first task are fitted exactly
    query = Rows(X, torch.stack([2 * X[0], X[1]]))
    gradient = Implicit(lam=30.0, cg_steps=6, solver=solver)
    step = meta_step(module, EpisodeBatch(support, query), gradient, rung, steps=0)
    # second task: H = 2/2 (4 + 1) = 5, g = 5 (2 - 1); the mean is over two tasks
    expected = 5 / (1 + 5 / 30) / 2
    rtol = 1e-12 if solver == "cg" else 1e-5
    np.testing.assert_allclose(step.grads["module.weight"].item(), expected, rtol=rtol)


def test_what_is_not_finite_shows_in_the_gradient():
    """A step that is not finite has to be skipped, so the solver must not hide it."""
    module, batch = make_mlp(), make_batch("equal")
    batch.support.X[0, 0, 0] = np.inf
    for solver in ("cg", "neumann"):
        step = meta_step(module, batch, Implicit(solver=solver), "stacked", steps=0)
        assert not torch.isfinite(flat(step.grads)).all()


# --- implicit: limits and negative controls


@pytest.mark.parametrize("rung", ["loop", "stacked"])
def test_an_infinitely_strong_proximal_term_gives_the_first_order_gradient_at_the_start(rung):
    module, batch = make_mlp(), make_batch("ragged")
    implicit = meta_step(module, batch, Implicit(lam=1e9), rung, alpha=1e-9, steps=3)
    first = meta_step(module, batch, FirstOrder(), rung, steps=0)
    assert_same(implicit, first, batch, tolerance=1e-7)
    assert difference(Implicit(lam=1.0), FirstOrder()) > 1e-2


def difference(one, other):
    module, batch = make_mlp(), make_batch("ragged")
    a, b = (meta_step(module, batch, g, alpha=0.3, steps=3) for g in (one, other))
    return relative_error(flat(a.grads), flat(b.grads))


def test_implicit_gradients_are_neither_first_nor_second_order():
    for other in (FirstOrder(), SecondOrder(), Implicit(lam=4.0), Implicit(cg_steps=1)):
        assert difference(Implicit(), other) > 1e-2


def test_the_proximal_term_holds_adapted_parameters_back():
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    for rung in ("loop", "vmap", "stacked"):
        lengths = []
        for gradient in (SecondOrder(), Implicit(lam=0.5), Implicit(lam=5.0)):
            engine = make_engine(module, rung, meta_gradient=gradient)
            adapted = engine.adapt(params, batch.support, alpha=0.1, steps=30).params
            moved = [(p - params[f"module.{n}"]).flatten(1) for n, p in adapted.items()]
            lengths.append(torch.cat(moved, 1).norm(dim=1))
        assert (lengths[0] > 1.1 * lengths[1]).all()
        assert (lengths[1] > 1.5 * lengths[2]).all()


# --- Reptile by hand


def reptile_by_hand(batch, theta, alpha, steps):
    grads, losses = [], []
    for j in range(len(batch)):
        (Xs, ys), (Xq, yq) = parts_of(batch, j)
        A, b = quadratic(np.vstack([Xs, Xq]), np.r_[ys, yq])
        phi = descend(A, b, theta, alpha, steps)
        grads.append(theta - phi)
        losses.append(np.mean((Xq @ phi - yq) ** 2))
    return np.mean(grads, 0), np.array(losses)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("rung", RUNGS)
def test_reptile_on_linear_regression_matches_its_closed_form(rung, steps, sizes):
    batch = make_batch(sizes, (3,), n_outputs=1)
    step = meta_step(linear_model(THETA), batch, Reptile(), rung, steps=steps)
    grad, losses = reptile_by_hand(batch, THETA, 0.1, steps)
    np.testing.assert_allclose(step.grads["module.weight"][0], grad, rtol=1e-10)
    np.testing.assert_allclose(step.losses, losses, rtol=1e-11)


@pytest.mark.parametrize("rung", RUNGS)
def test_one_step_of_reptile_is_a_step_on_the_mean_loss_of_all_rows(rung):
    module, batch = make_mlp(), make_batch("ragged")
    total = 0
    for Xs, ys, Xq, yq in plain_tasks(batch):
        loss = (module(torch.cat([Xs, Xq])) - torch.cat([ys, yq])).square().mean()
        grads = torch.autograd.grad(loss, list(module.parameters()))
        named = dict(zip((n for n, _ in module.named_parameters()), grads, strict=True))
        total = total + flat(named) / len(batch)
    step = meta_step(module, batch, Reptile(), rung, alpha=0.3, steps=1)
    assert relative_error(flat(step.grads), 0.3 * total) <= 1e-12
    # negative control: several steps are not a multiple of it
    several = flat(meta_step(module, batch, Reptile(), rung, alpha=0.3, steps=5).grads)
    cosine = torch.nn.functional.cosine_similarity(several, total, dim=0)
    assert float(cosine) < 0.999


def minibatches_by_hand(n_rows, batch_size, steps):
    """Positions of the rows of each step, written out as a deck that is dealt again and again."""
    n_piles = -(-n_rows // min(batch_size, n_rows))
    deck = [row for pile in range(n_piles) for row in range(pile, n_rows, n_piles)]
    dealt = deck * (steps * batch_size // n_rows + 2)
    size = min(batch_size, n_rows)
    return [dealt[k * size : (k + 1) * size] for k in range(steps)]


def test_minibatches_written_out():
    assert minibatches_by_hand(5, 2, 4) == [[0, 3], [1, 4], [2, 0], [3, 1]]
    assert minibatches_by_hand(6, 3, 2) == [[0, 2, 4], [1, 3, 5]]
    assert minibatches_by_hand(3, 7, 2) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch_size", [1, 4, 6, 20])
@pytest.mark.parametrize("rung", RUNGS)
def test_reptile_on_minibatches_takes_its_steps_on_these_rows(rung, batch_size, sizes):
    batch = make_batch(sizes, (3,), n_outputs=1)
    steps, grads, losses = 7, [], []
    for j in range(len(batch)):
        (Xs, ys), (Xq, yq) = parts_of(batch, j)
        X, y = np.vstack([Xs, Xq]), np.r_[ys, yq]
        phi = THETA
        for rows in minibatches_by_hand(len(X), batch_size, steps):
            phi = descend(*quadratic(X[rows], y[rows]), phi, 0.05, 1)
        grads.append(THETA - phi)
        losses.append(np.mean((Xq @ phi - yq) ** 2))
    gradient = Reptile(batch_size=batch_size)
    step = meta_step(linear_model(THETA), batch, gradient, rung, alpha=0.05, steps=steps)
    np.testing.assert_allclose(step.grads["module.weight"][0], np.mean(grads, 0), rtol=1e-10)
    np.testing.assert_allclose(step.losses, losses, rtol=1e-10)


def test_minibatches_mix_classes_and_are_made_once():
    y = torch.arange(5).repeat_interleave(4)[None]  # as episodes have them, class by class
    rows = Rows(torch.zeros(1, 20, 1), y)
    joined = joined_rows(EpisodeBatch(rows, rows), batch_size=10, n_minibatches=100)
    assert joined.y.shape == (1, 10, 4)  # 40 rows, over and over
    for k in range(6):
        assert joined.minibatch(k, axis=2).y.unique().tolist() == [0, 1, 2, 3, 4]


def test_rows_keep_their_weights_when_they_are_joined():
    X = torch.zeros(1, 2, 1, dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    joined = joined_rows(EpisodeBatch(Rows(X, X, weights), Rows(X, X)))
    torch.testing.assert_close(joined.weight, torch.tensor([[0.125, 0.375, 0.25, 0.25]]).double())


# --- nets of all kinds


def batch_of_images(sizes=((4, 4, 4), (3, 3, 3)), seed=0):
    rng = np.random.default_rng(seed)
    return EpisodeBatch(
        *(
            Rows(
                torch.from_numpy(rng.normal(size=(len(part), part[0], 1, 6, 6))),
                torch.from_numpy(rng.integers(0, 3, (len(part), part[0]))),
            )
            for part in sizes
        )
    )


NETS = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize(
    ("gradient", "adapted"),
    [
        (Implicit(cg_steps=4), "all"),
        (Implicit(cg_steps=4), "head"),
        (Implicit(lam=30.0, cg_steps=3, solver="neumann"), "body"),
        (Reptile(), "all"),
        (Reptile(batch_size=5), "all"),
        (SecondOrder(multi_step_updates=4), "all"),
        (SecondOrder(first_order_updates=4, multi_step_updates=4), "head"),
        (FirstOrder(multi_step_updates=4), "all"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NETS)
def test_rungs_agree_for_nets_of_all_kinds(monkeypatch, name, gradient, adapted):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = NETS[name]().double()
    batch, rungs = batch_of_images(), ["vmap", "traced"]
    if name != "layer norm":  # `nn.Flatten` makes the rows of others depend on their axes
        rungs.append("stacked")
    if gradient.phase(0)[0] is None:
        rungs.remove("traced")
    options = {"row_loss": cross_entropy_rows, "adapted": adapted, "steps": 3}
    expected = meta_step(module, batch, gradient, **options)
    assert expected.grads.keys() == make_meta_params(module).keys()
    for rung in rungs:
        assert_same(meta_step(module, batch, gradient, rung, **options), expected, batch)
    # a few tasks at a time, as larger nets are run
    monkeypatch.setattr(layers, "ACTIVATION_BYTES", 1)
    if "stacked" in rungs:
        assert_same(meta_step(module, batch, gradient, "stacked", **options), expected, batch)


@pytest.mark.parametrize("gradient", [Implicit(), Reptile(batch_size=4)], ids=repr)
def test_chunks_of_a_meta_batch_give_the_numbers_of_the_whole(gradient):
    module, batch = make_mlp(), make_batch("ragged")
    for rung in ("loop", "vmap", "stacked"):
        whole = meta_step(module, batch, gradient, rung)
        parts = meta_step(module, batch, gradient, rung, max_tasks_in_memory=2)
        assert_same(parts, whole, batch)


@pytest.mark.parametrize("gradient", [Implicit(), Reptile()], ids=repr)
def test_frozen_parameters_stay_out(gradient):
    module, batch = make_mlp(), make_batch("ragged")
    module[0].weight.requires_grad_(False)
    steps = [meta_step(module, batch, gradient, rung) for rung in RUNGS]
    for step in steps[1:]:
        assert_same(step, steps[0], batch)
    params = {n: p for n, p in make_meta_params(module).items() if n != "module.0.weight"}
    engine = make_engine(module, "stacked", meta_gradient=gradient)
    without = engine.meta_step(params, batch, alpha=0.1, steps=3)
    assert without.grads.keys() == params.keys()
    for name, g in without.grads.items():
        torch.testing.assert_close(g, steps[0].grads[name], rtol=1e-9, atol=1e-14)


# --- multi-step loss and annealed order


def plain_multi_step(module, batch, alpha, weights, second_order):
    """Weighted loss of all steps and its gradient, task by task."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    total, last = 0, []

    def loss(params, X, y):
        return (torch.func.functional_call(module, params, (X,)) - y).square().mean()

    for Xs, ys, Xq, yq in plain_tasks(batch):
        theta = dict(leaves)
        for w in weights:
            slopes = torch.autograd.grad(
                loss(theta, Xs, ys), list(theta.values()), create_graph=True
            )
            if not second_order:
                slopes = [g.detach() for g in slopes]
            theta = {n: p - alpha * g for (n, p), g in zip(theta.items(), slopes, strict=True)}
            total = total + w * loss(theta, Xq, yq) / len(batch)
        last.append(loss(theta, Xq, yq).item())
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {f"module.{n}": g for n, g in zip(leaves, grads, strict=True)}, last


def step_at(engine, params, batch, update, *, alpha=0.3, steps=4, n_updates=1):
    engine.expect(update, n_updates, n_tasks=len(batch), n_rows=10, steps=steps)
    return engine.meta_step(params, batch, alpha=alpha, steps=steps)


@pytest.mark.parametrize(
    ("update", "weights"),
    [
        (0, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        (5, [1 / 8, 1 / 8, 1 / 8, 5 / 8]),
        (9, [1 / 40, 1 / 40, 1 / 40, 37 / 40]),
        (10, [0, 0, 0, 1]),
        (1000, [0, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rung", with_kernels)
def test_the_multi_step_loss_weighs_the_steps_as_the_formula_says(rung, order, update, weights):
    module, batch = make_mlp(), make_batch("ragged")
    gradient = {1: FirstOrder, 2: SecondOrder}[order](multi_step_updates=10)
    assert gradient.step_weights(update, 4) == pytest.approx(weights)
    engine = make_engine(module, rung, meta_gradient=gradient)
    step = step_at(engine, make_meta_params(module), batch, update)
    expected, last = plain_multi_step(module, batch, 0.3, weights, order == 2)
    for name, g in expected.items():
        torch.testing.assert_close(step.grads[name], g, rtol=1e-9, atol=1e-12)
    # what is reported is the loss after the last step
    np.testing.assert_allclose(step.losses, last, rtol=1e-11)
    # negative control
    alone, _ = plain_multi_step(module, batch, 0.3, [0, 0, 0, 1], order == 2)
    assert (relative_error(flat(step.grads), flat(alone)) > 1e-3) == (update < 10)


@pytest.mark.parametrize("steps", [0, 1])
def test_there_is_nothing_to_weigh_in_one_step(steps):
    module, batch = make_mlp(), make_batch()
    plain, multi = (
        meta_step(module, batch, g, "stacked", steps=steps)
        for g in (SecondOrder(), SecondOrder(multi_step_updates=5))
    )
    assert_same(multi, plain, batch, tolerance=1e-15)


@pytest.mark.parametrize("rung", with_kernels)
def test_the_order_changes_at_the_update_that_is_asked_for(rung):
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    expected = [
        meta_step(module, batch, g, alpha=0.3, steps=3).grads for g in (FirstOrder(), SecondOrder())
    ]
    assert relative_error(flat(expected[0]), flat(expected[1])) > 1e-2
    engine = make_engine(module, rung, meta_gradient=SecondOrder(first_order_updates=3))
    engine.expect(0, 8, n_tasks=3, n_rows=10, steps=3)
    for update in range(8):
        grads = engine.meta_step(params, batch, alpha=0.3, steps=3).grads
        assert relative_error(flat(grads), flat(expected[update >= 3])) <= TOLERANCE, update


@pytest.mark.parametrize("rung", with_kernels)
def test_both_anneal_together(rung):
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    gradient = SecondOrder(first_order_updates=2, multi_step_updates=4)
    engine = make_engine(module, rung, meta_gradient=gradient)
    engine.expect(0, 7, n_tasks=3, n_rows=10, steps=3)
    for update in range(7):
        step = engine.meta_step(params, batch, alpha=0.3, steps=3)
        weights = gradient.step_weights(update, 3)
        expected, _ = plain_multi_step(module, batch, 0.3, weights, update >= 2)
        assert relative_error(flat(step.grads), flat(expected)) <= TOLERANCE, update


def test_changing_weights_are_not_traced_and_each_order_once(monkeypatch):
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    gradient = SecondOrder(first_order_updates=6, multi_step_updates=3)
    engine = make_engine(module, "traced", meta_gradient=gradient)
    calls = []
    original = Vmap.meta_step

    def counted(self, *args):
        calls.append(update)
        return original(self, *args)

    monkeypatch.setattr(Vmap, "meta_step", counted)
    for update in range(10):
        engine.meta_step(params, batch, alpha=0.3, steps=3)
        assert engine.tracer.n_traced == (update >= 3)
    # eager while weights change; then once for the numbers and once to record, for each order
    eager = [u for u in calls if u in (0, 1, 2)]
    assert eager == [0, 1, 2]
    assert set(calls) == {0, 1, 2, 3, 6}


def test_only_updates_that_compute_alike_make_a_trace_pay():
    engine = make_engine(make_mlp(), "vmap", meta_gradient=SecondOrder(first_order_updates=50))
    engine.expect(0, 5000, n_tasks=3, n_rows=10, steps=3)
    params, batch = make_meta_params(make_mlp()), make_batch("ragged")
    for _ in range(50):
        engine.meta_step(params, batch, alpha=0.1, steps=1)
        assert engine.tracer.n_traced == 0
    for _ in range(4):
        engine.meta_step(params, batch, alpha=0.1, steps=1)
    assert engine.tracer.n_traced == 1


@pytest.mark.skipif(not has_kernels(), reason="needs the compiled kernels")
def test_the_kernels_take_over_when_the_loss_of_several_steps_is_over():
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    engine = make_engine(module, "auto", meta_gradient=SecondOrder(multi_step_updates=70))
    engine.expect(0, 80, n_tasks=3, n_rows=10, steps=2)
    rungs = []
    for _ in range(72):
        engine.meta_step(params, batch, alpha=0.1, steps=2)
        rungs.append(engine.rung)
    assert rungs == ["stacked"] * 70 + ["native"] * 2


# --- memory


@pytest.mark.parametrize("gradient", [Implicit(), Reptile()], ids=repr)
@pytest.mark.parametrize("rung", ["loop", "vmap", "stacked"])
def test_memory_does_not_grow_with_the_number_of_inner_steps(rung, gradient):
    module, batch = make_mlp(), make_batch()
    peaks = {}
    for g in (gradient, SecondOrder()):
        for steps in (3, 30):
            with LiveBytes() as mode:
                meta_step(module, batch, g, rung, steps=steps)
            peaks[type(g), steps] = mode.peak
    assert peaks[type(gradient), 30] == pytest.approx(peaks[type(gradient), 3], rel=0.02)
    assert peaks[SecondOrder, 30] > 3 * peaks[SecondOrder, 3]  # negative control


# --- public fits


@pytest.fixture(scope="module")
def sinusoids():
    return make_sinusoid_tasks(n_tasks=80, n_rows=20, random_state=0)


def small(**changed):
    settings = {
        "hidden_layer_sizes": (8,),
        "activation": "tanh",
        "update_rule": "sgd",
        "alpha": 0.01,
        "steps": 3,
        "n_shots": 10,
        "max_iter": 12,
        "meta_batch_size": 4,
        "max_grad_norm": None,
        "early_stopping": False,
        "random_state": 0,
    }
    return MAMLRegressor(**{**settings, **changed})


def parameters(model):
    return {n: p.detach().clone() for n, p in model.module_.named_parameters()}


class Watch(Callback):
    """Notes the parameters before and after every update, and the gradients."""

    def __init__(self):
        self.seen = []

    def on_grad_computed(self, net, **kwargs):
        named = dict(net.module_.named_parameters())
        self.seen.append(
            [{n: p.detach().clone() for n, p in named.items()},
             {n: p.grad.clone() for n, p in named.items()}]
        )  # fmt: skip

    def on_batch_end(self, net, training, **kwargs):
        if training:
            self.seen[-1].append({n: p.detach().clone() for n, p in net.module_.named_parameters()})


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [1 - t / 12 for t in range(12)]),
        ({"step_size": 0.5, "final_step_size": 0.2}, [0.5 - 0.3 * t / 12 for t in range(12)]),
    ],
)
def test_reptile_steps_by_its_schedule(sinusoids, options, sizes):
    X, y, task = sinusoids
    watch = Watch()
    model = small(meta_gradient=Reptile(**options), callbacks=[watch], max_iter=12)
    model.fit(X, y, groups=task)
    assert len(watch.seen) == 12
    for size, (before, grads, after) in zip(sizes, watch.seen, strict=True):
        for name, p in before.items():
            torch.testing.assert_close(after[name], p - size * grads[name], rtol=1e-12, atol=1e-14)
            assert grads[name].any()
    assert not model.net_.optimizer_.state_dict()["state"]  # the optimiser has done nothing


def test_the_optimiser_can_make_the_same_steps(sinusoids):
    X, y, task = sinusoids
    own = small(meta_gradient="reptile").fit(X, y, groups=task)
    handed = small(
        meta_gradient="reptile",
        meta_gradient__step_size=None,
        optimizer="sgd",
        beta=1.0,
        beta_decay=1.0,
    ).fit(X, y, groups=task)
    for name, p in parameters(own).items():
        torch.testing.assert_close(parameters(handed)[name], p, rtol=1e-12, atol=1e-14)
    # and the others of its parameters play no part
    other = small(meta_gradient="reptile", optimizer="adam", beta=0.5, beta_decay=0.9)
    other.fit(X, y, groups=task)
    assert all(torch.equal(parameters(other)[n], p) for n, p in parameters(own).items())
    adam = small(meta_gradient=Reptile(step_size=None)).fit(X, y, groups=task)
    assert not all(torch.equal(parameters(adam)[n], p) for n, p in parameters(own).items())


def test_a_large_pseudo_gradient_is_scaled_down(sinusoids):
    X, y, task = sinusoids
    watch = Watch()
    small(meta_gradient="reptile", callbacks=[watch], max_grad_norm=1e-3).fit(X, y, groups=task)
    norms = [flat(grads).norm().item() for _, grads, _ in watch.seen]
    assert norms == pytest.approx([1e-3] * 12)


def test_each_fit_that_continues_another_goes_through_the_schedule_again(sinusoids):
    X, y, task = sinusoids
    watch = Watch()
    model = small(meta_gradient="reptile", warm_start=True, max_iter=3, callbacks=[watch])
    model.fit(X, y, groups=task).fit(X, y, groups=task)
    sizes = [
        float((flat(after) - flat(before)).norm() / flat(grads).norm())
        for before, grads, after in watch.seen
    ]
    assert sizes == pytest.approx([1, 2 / 3, 1 / 3] * 2)


def test_a_reptile_step_that_is_not_finite_is_skipped(sinusoids):
    X, y, task = sinusoids

    class Poison(Callback):
        def on_batch_begin(self, net, batch, training, **kwargs):
            if training and net.update_ == 4:
                batch[0].query.X[:] = np.nan

    class Skipped(Watch):
        def on_grad_computed(self, net, **kwargs):
            self.seen.append([all(p.grad is None for p in net.module_.parameters())])

    watch = Skipped()
    with pytest.warns(NonFiniteStepWarning, match="not finite; the update was skipped"):
        model = small(meta_gradient="reptile", callbacks=[Poison(), watch]).fit(X, y, groups=task)
    assert [skipped for skipped, _ in watch.seen] == [k == 4 for k in range(12)]
    assert all(torch.equal(watch.seen[4][1][n], p) for n, p in watch.seen[3][1].items())
    assert all(torch.isfinite(p).all() for p in parameters(model).values())


def test_updates_are_counted_from_the_first_of_all_fits(sinusoids):
    X, y, task = sinusoids
    gradient = SecondOrder(first_order_updates=9, multi_step_updates=6)
    options = {"meta_gradient": gradient, "beta_decay": 0.0, "warm_start": True}
    whole = small(**options, max_iter=12).fit(X, y, groups=task)
    parts = small(**options, max_iter=4)
    for _ in range(3):
        parts.fit(X, y, groups=task)
    assert all(torch.equal(parameters(parts)[n], p) for n, p in parameters(whole).items())
    # negative controls: one update more of either makes a difference
    for changed in ({"first_order_updates": 10}, {"multi_step_updates": 7}):
        other = small(**{**options, "meta_gradient": clone(gradient).set_params(**changed)})
        other.fit(X, y, groups=task)
        assert not all(torch.equal(parameters(other)[n], p) for n, p in parameters(whole).items())


@pytest.mark.parametrize(
    ("params", "least_gain"),
    [
        ({"meta_gradient": "implicit", "meta_gradient__lam": 0.5, "steps": 10}, 0.5),
        ({"meta_gradient": "reptile", "steps": 10}, 0.6),
        ({"meta_gradient": Reptile(batch_size=10), "steps": 10}, 0.6),
        ({"meta_gradient__first_order_updates": 50, "meta_gradient__multi_step_updates": 50}, 0.5),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_meta_training_lowers_the_loss_after_adaptation(params, least_gain):
    X, y, task = make_sinusoid_tasks(n_tasks=200, n_rows=20, random_state=0)
    model = MAMLRegressor(
        **{
            "update_rule": "sgd",
            "hidden_layer_sizes": (32, 32),
            "alpha": 0.01,
            "steps": 5,
            "n_shots": 10,
            "max_iter": 200,
            "random_state": 0,
            **params,
        }
    ).fit(X, y, groups=task)
    adapted, unadapted = (model.history_[:, name] for name in ("valid_loss", "valid_loss_before"))
    assert min(adapted) < least_gain * unadapted[0]
    assert min(adapted) < 0.7 * adapted[0]
    assert model.score(X, y, groups=task) > 0.4


@pytest.mark.parametrize("gradient", ["implicit", "reptile"])
def test_classifiers_and_single_tasks_meta_train_with_them(gradient):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 12)
    X = rng.normal(size=(8, 3))[labels] + 0.3 * rng.normal(size=(96, 3))
    clf = MAMLClassifier(
        update_rule="sgd", meta_gradient=gradient, n_ways=3, n_shots=2, n_queries=3, alpha=0.1,
        max_iter=60, early_stopping=False, random_state=0,
    )  # fmt: skip
    clf.fit(X, labels)
    assert clf.score(X, labels) > 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = small(meta_gradient=gradient, max_iter=5).fit(X, X[:, 0])
    assert alone.predict(X).shape == (96,)


def test_the_strength_of_the_proximal_term_is_an_ordinary_parameter(sinusoids):
    X, y, task = sinusoids
    by_name = small(meta_gradient="implicit", meta_gradient__lam=1.0, max_iter=3)
    assert by_name.get_params()["meta_gradient__lam"] == 1.0
    by_object = small(meta_gradient=Implicit(lam=1.0), max_iter=3)
    assert by_object.get_params()["meta_gradient__lam"] == 1.0
    assert clone(by_object).meta_gradient.lam == 1.0
    first = parameters(by_name.fit(X, y, groups=task))
    second = parameters(by_object.fit(X, y, groups=task))
    assert all(torch.equal(second[n], p) for n, p in first.items())
    other = parameters(clone(by_object).set_params(meta_gradient__lam=7.0).fit(X, y, groups=task))
    assert not all(torch.equal(other[n], p) for n, p in first.items())
    search = GridSearchCV(by_name, {"meta_gradient__lam": [0.5, 50.0]}, cv=GroupKFold(2))
    with sklearn.config_context(enable_metadata_routing=True):
        search.fit(X, y, groups=task)
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] != scores[1]
    assert search.best_params_["meta_gradient__lam"] == [0.5, 50.0][int(np.argmax(scores))]


def test_predictions_are_those_of_the_regularised_problem(sinusoids):
    X, y, task = sinusoids
    model = small(meta_gradient="implicit", meta_gradient__lam=0.1, alpha=0.05, max_iter=5)
    model.fit(X, y, groups=task)
    free, held = (
        copy.copy(model).set_params(meta_gradient__lam=lam, steps=200).adapt(X[:10], y[:10])
        for lam in (1e-6, 15.0)
    )
    initial = copy.copy(model).set_params(steps=0).adapt(X[:10], y[:10]).predict(X[:20])
    moved = [np.abs(m.predict(X[:20]) - initial).mean() for m in (free, held)]
    assert moved[0] > 1.5 * moved[1] > 0


@pytest.mark.parametrize("names", [("implicit", "first-order"), ("first-order", "implicit")])
def test_the_inner_problem_is_that_of_the_fit(sinusoids, names):
    X, y, task = sinusoids
    model = small(meta_gradient=names[0], max_iter=2).fit(X, y, groups=task)
    model.set_params(meta_gradient=names[1])
    for call in (model.adapt, functools.partial(model.score, groups=task)):
        with pytest.raises(ValueError, match="the proximal term of meta_gradient was changed"):
            call(X, y)
    model.set_params(warm_start=True).fit(X, y, groups=task).adapt(X[:5], y[:5])
    assert model.n_iter_ == 4


# --- refused


class Learning(SGD):
    """A user's rule that learns something."""

    def initial_rates(self, params, steps=1, classification=False):
        return {name: p.new_zeros(()) for name, p in params.items()}


class Regularized(SecondOrder):
    """A user's gradient through steps with a proximal term."""

    proximal = 5.0


class InMinibatches(SecondOrder):
    """A user's gradient through steps on minibatches."""

    in_minibatches = True


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"meta_gradient": "implicit", "update_rule": "meta-sgd"},
            r"'implicit' cannot train an update rule that learns.*does not depend on the rates",
        ),
        (
            {"meta_gradient": Implicit(), "update_rule": Learning()},
            r"'implicit' cannot train an update rule that learns",
        ),
        (
            {"meta_gradient": "reptile", "update_rule": "meta-sgd"},
            r"'reptile' cannot train an update rule that learns.*Use update_rule='sgd'",
        ),
        (
            {"meta_gradient": "reptile", "adapted": "head"},
            r"'reptile' needs adapted='all'.*never be trained",
        ),
        ({"meta_gradient": "reptile", "adapted": ["0.*"]}, r"'reptile' needs adapted='all'"),
        (
            {"meta_gradient__multi_step_updates": 5, "engine__checkpoint_steps": True},
            r"multi_step_updates=5 cannot be combined with engine__checkpoint_steps=True",
        ),
        (
            {
                "meta_gradient": FirstOrder(multi_step_updates=5),
                "engine__checkpoint_steps": True,
            },
            r"multi_step_updates=5 cannot be combined with engine__checkpoint_steps=True",
        ),
        (
            {"meta_gradient": Regularized(), "engine__checkpoint_steps": True},
            r"checkpoint_steps=True cannot compute the steps of Regularized\(\) again.*proximal",
        ),
        (
            {"meta_gradient": InMinibatches(), "engine__checkpoint_steps": True},
            r"checkpoint_steps=True cannot compute the steps of InMinibatches\(\).*minibatches",
        ),
        ({"meta_gradient": "reptile", "steps": 0}, r"steps=0 or alpha=0.*nothing would be trained"),
        ({"meta_gradient": "reptile", "alpha": 0}, r"steps=0 or alpha=0.*nothing would be trained"),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense_are_refused(sinusoids, params, message):
    X, y, task = sinusoids
    model = small(**params)
    before = set(vars(model))
    with pytest.raises(ValueError, match=message):
        model.fit(X, y, groups=task)
    assert set(vars(model)) == before


def test_a_scheduler_of_rates_that_nobody_reads_is_refused(sinusoids):
    X, y, task = sinusoids
    scheduled = small(meta_gradient="reptile", callbacks=[LRScheduler(StepLR, step_size=1)])
    with pytest.raises(ValueError, match=r"LRScheduler.*without the optimizer.*step_size=None"):
        scheduled.fit(X, y, groups=task)
    scheduled.set_params(meta_gradient__step_size=None).fit(X, y, groups=task)


@pytest.mark.parametrize(
    "params",
    [
        {"meta_gradient": "implicit", "engine__checkpoint_steps": True},
        {"meta_gradient": "reptile", "engine__checkpoint_steps": True},
        {"meta_gradient": "reptile", "adapted": ["*.weight", "*.bias"]},
        {"meta_gradient__first_order_updates": 1, "engine__checkpoint_steps": True},
    ],
    ids=str,
)
def test_combinations_that_make_sense_are_not(sinusoids, params):
    X, y, task = sinusoids
    model = small(max_iter=2, **params).fit(X, y, groups=task)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(*(m.adapt(X[:10], y[:10]).predict(X[:20]) for m in (model, again)))


def test_subclasses_have_parameters_of_their_own(sinusoids):
    class Scaled(SecondOrder):
        def __init__(self, scale=0.5, multi_step_updates=0):
            super().__init__(multi_step_updates=multi_step_updates)
            self.scale = scale

    X, y, task = sinusoids
    assert small(meta_gradient=Scaled(), max_iter=1).fit(X, y, groups=task).n_iter_ == 1
    with pytest.raises(ValueError, match=r"multi_step_updates of Scaled.*got -1"):
        small(meta_gradient=Scaled(multi_step_updates=-1)).fit(X, y, groups=task)


def test_recomputed_steps_follow_the_order():
    module, batch = make_mlp(), make_batch("ragged")
    params = make_meta_params(module)
    for rung in ("loop", "stacked"):
        engine = make_engine(
            module,
            rung,
            meta_gradient=SecondOrder(first_order_updates=1),
            checkpoint_steps=True,
        )
        for g in (FirstOrder(), SecondOrder()):
            got = engine.meta_step(params, batch, alpha=0.3, steps=3)
            assert_same(got, meta_step(module, batch, g, alpha=0.3, steps=3), batch)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (Implicit(lam=0), "lam of Implicit must be a positive number.*got 0"),
        (Implicit(lam=-1.0), r"lam of Implicit must be a positive number.*got -1\.0"),
        (Implicit(lam="2"), "lam of Implicit must be a positive number.*got '2'"),
        (Implicit(lam=np.nan), "lam of Implicit must be a positive number.*got nan"),
        (Implicit(lam=np.inf), "lam of Implicit must be a positive number.*got inf"),
        (Implicit(cg_steps=0), "cg_steps of Implicit.*1 or more; got 0"),
        (Implicit(cg_steps=2.0), r"cg_steps of Implicit.*1 or more; got 2\.0"),
        (Implicit(solver="newton"), "solver='newton'; expected 'cg'.*'neumann'"),
        (Reptile(step_size=0), "step_size of Reptile must be a positive number, or None.*got 0"),
        (Reptile(step_size="1"), "step_size of Reptile must be.*got '1'"),
        (Reptile(final_step_size=-0.1), r"final_step_size of Reptile.*0 or more; got -0\.1"),
        (Reptile(final_step_size=None), "final_step_size of Reptile.*got None"),
        (Reptile(batch_size=0), "batch_size of Reptile.*1 or more, or None.*got 0"),
        (Reptile(batch_size=2.5), r"batch_size of Reptile.*got 2\.5"),
        (SecondOrder(first_order_updates=-1), "first_order_updates of SecondOrder.*got -1"),
        (SecondOrder(multi_step_updates=0.5), r"multi_step_updates of SecondOrder.*got 0\.5"),
        (SecondOrder(multi_step_updates=True), "multi_step_updates of SecondOrder.*got True"),
        (FirstOrder(multi_step_updates=None), "multi_step_updates of FirstOrder.*got None"),
    ],
    ids=repr,
)
def test_parameters_out_of_range_are_refused(sinusoids, gradient, message):
    X, y, task = sinusoids
    with pytest.raises(ValueError, match=message):
        small(meta_gradient=gradient).fit(X, y, groups=task)


def test_meta_gradients_of_users_need_none_of_this(sinusoids):
    class Half(MetaGradient):
        order = 2

        def loss_and_grad(self, meta_params, problem):
            grads, outcome = super().loss_and_grad(meta_params, problem)
            return {n: g / 2 for n, g in grads.items()}, outcome

    X, y, task = sinusoids
    kwargs = {"optimizer": "sgd", "max_iter": 1}
    half = small(meta_gradient=Half(), beta=0.2, **kwargs).fit(X, y, groups=task)
    whole = small(beta=0.1, **kwargs).fit(X, y, groups=task)
    for name, p in parameters(whole).items():
        torch.testing.assert_close(parameters(half)[name], p, rtol=1e-9, atol=1e-12)
