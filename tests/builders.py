"""What tests of the engine are made of: modules, meta-parameters, batches of tasks and engines."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sklearn_maml import native
from sklearn_maml.data.episodes import EpisodeBatch, Rows, pad_rows
from sklearn_maml.engine import Engine
from sklearn_maml.meta_gradients import FirstOrder, SecondOrder
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.losses import cross_entropy_rows, squared_error_rows
from sklearn_maml.theta import rate_key
from sklearn_maml.update_rules import SGD

# rows of each task, of the support sets and of the query sets
SIZES = {"equal": ([5, 5, 5], [4, 4, 4]), "ragged": ([5, 3, 7], [4, 6, 2])}


def has_kernels():
    return bool(native.instruction_sets())


def build(constructor, seed=0, *, noise=0.2, dtype=torch.float64):
    """Build a module, with every parameter away from the values it starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = constructor().to(dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(noise * torch.randn_like(p))
    return module


def make_mlp(n_features=2, n_outputs=2, width=4, *, bias=True, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, n_outputs, bias=bias)]
    return nn.Sequential(*layers).double()


def make_meta_params(module, rule=None, adapted="all", *, steps=3, classes=False, seed=1):
    """Meta-parameters, with what the rule learns away from its start."""
    params = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    fast = {n: params[n] for n in adapted_names(module, adapted)}
    g = torch.Generator().manual_seed(seed)
    rates = (rule or SGD()).initial_rates(fast, steps=steps, classification=classes)
    return {
        **{f"module.{n}": p for n, p in params.items()},
        **{
            f"rule.{rate_key(n)}": r + 0.3 * torch.randn(r.shape, generator=g, dtype=r.dtype)
            for n, r in rates.items()
        },
    }


def make_rows(
    rng, sizes, shape=(2,), n_outputs=2, *, n_classes=None, weighted=False, loc=0.0, scale=1.0
):
    """Rows of tasks of these sizes; targets are real numbers, or one of `n_classes`."""
    counts = np.array(sizes)
    total = int(counts.sum())
    X = rng.normal(loc, scale, size=(total, *shape))
    if n_classes is None:
        y = rng.normal(size=(total, n_outputs))
    else:
        y = rng.integers(0, n_classes, total)
    weight = rng.uniform(0.5, 2.0, total) if weighted else None
    return pad_rows(X, y, np.arange(total), counts, weight)


def make_batch(sizes="equal", shape=(2,), n_outputs=2, *, seed=0, **options):
    rng = np.random.default_rng(seed)
    parts = SIZES[sizes] if isinstance(sizes, str) else sizes
    return EpisodeBatch(*(make_rows(rng, part, shape, n_outputs, **options) for part in parts))


def make_engine(
    module,
    rung="loop",
    *,
    rule=None,
    order=2,
    meta_gradient=None,
    adapted="all",
    classes=False,
    row_loss=None,
    **options,
):
    return Engine(
        module,
        row_loss=row_loss or (cross_entropy_rows if classes else squared_error_rows),
        rule=rule or SGD(),
        meta_gradient=meta_gradient or {1: FirstOrder, 2: SecondOrder}[order](),
        adapted=adapted_names(module, adapted),
        rung=rung,
        **options,
    )


def plain_tasks(batch):
    """Tensors X and y of the support set and of the query set of each task, unpadded."""
    return [
        (s.X, s.y, q.X, q.y)
        for s, q in ((batch.support.task(j), batch.query.task(j)) for j in range(len(batch)))
    ]


def parts_of(batch, j):
    """Support X and y and query X and y of a task, in NumPy, of a single target."""
    return [
        (part.task(j).X.numpy(), part.task(j).y.numpy()[:, 0])
        for part in (batch.support, batch.query)
    ]


def quadratic(X, y):
    """Matrix and vector of the gradient A theta - b of a mean squared error."""
    return 2 / len(X) * X.T @ X, 2 / len(X) * X.T @ y


def descend(A, b, theta, alpha, steps):
    """Take gradient steps on a quadratic, in closed form."""
    M = np.eye(len(theta)) - alpha * A
    powers = [np.linalg.matrix_power(M, k) for k in range(steps + 1)]
    return powers[-1] @ theta + alpha * sum(powers[:-1], np.zeros_like(M)) @ b


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def relative_error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


class Number(nn.Module):
    """One parameter, which is the prediction for every row."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))

    def forward(self, x):
        return x * self.value


def number_batch(support_target, query_target):
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return EpisodeBatch(Rows(one, support_target * one), Rows(one, query_target * one))


def differences(loss, params, h=1e-5):
    """Central differences of a function of parameters in every single one."""
    grads = {}
    for name, p in params.items():
        grad = torch.zeros_like(p).reshape(-1)
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = p.clone().reshape(-1)
                moved[i] += sign * h
                ends.append(loss({**params, name: moved.reshape(p.shape)}))
            grad[i] = (ends[0] - ends[1]) / (2 * h)
        grads[name] = grad.reshape(p.shape)
    return grads


def finite_differences(engine, meta_params, batch, *, alpha, steps):
    """Those of the mean evaluated loss in every single meta-parameter."""

    def loss(params):
        return engine.evaluate(params, batch, alpha=alpha, steps=steps)[0].mean().item()

    return differences(loss, meta_params)
