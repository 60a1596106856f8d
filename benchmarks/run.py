"""The first benchmarks of `make bench`; `cost.py` and `whole_process.py` are the others.

    python benchmarks/run.py [--seconds 60]

1. A meta-step of the library, as `fit` runs it, against a plain loop over tasks in torch.
2. Adapting to 1,000 new tasks and predicting: one batched call against one call for each task.
3. Whole fits on sinusoids: where the time goes.

Times are of the CPU (one thread), which other load on the machine disturbs least; what is compared
takes turns, and a ratio is the median over the turns. See RESULTS.md for what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
from sklearn_maml.training.net import MetaNet
from sklearn_maml.training.schedule import UPDATES_PER_EPOCH
from sklearn_maml.training.stream import TaskStream, use_batch

# name: layer sizes, tasks, support rows, query rows, inner steps, alpha, whether classification
WORKLOADS = {
    "W1": ((1, 40, 40, 1), 25, 10, 10, 1, 0.01, False),
    "W1_s5": ((1, 40, 40, 1), 25, 10, 10, 5, 0.01, False),
    "W2": ((20, 64, 64, 5), 32, 25, 75, 5, 0.05, True),
}
Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_mlp(sizes: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_batch(name: str, seed: int, n_tasks: int | None = None) -> Batch:
    """Support X and y, query X and y, with a leading task axis."""
    sizes, usual, n_support, n_query, _, _, classification = WORKLOADS[name]
    n_tasks = usual if n_tasks is None else n_tasks
    rng = np.random.default_rng(seed)
    rows = n_support + n_query
    if classification:
        y = np.tile(np.arange(sizes[-1]), rows // sizes[-1])[None].repeat(n_tasks, 0)
        centres = rng.normal(size=(n_tasks, sizes[-1], sizes[0]))
        X = centres[np.arange(n_tasks)[:, None], y] + 0.5 * rng.normal(
            size=(n_tasks, rows, sizes[0])
        )
        X = X.astype(np.float32)
    else:
        X, y, _ = make_sinusoid_tasks(n_tasks, rows, random_state=seed)
        X = X.reshape(n_tasks, rows, 1).astype(np.float32)
        y = y.reshape(n_tasks, rows).astype(np.float32)
    return X[:, :n_support], y[:, :n_support], X[:, n_support:], y[:, n_support:]


class LibraryStep:
    """The library's training step on given batches of tasks: `MetaNet.train_step`, as in `fit`.

    A fit of one update sets everything up; the optimiser is the default one (Adam, 1e-3). The
    batches lie on the device. `updates_left` is the length of the fit that the step is taken to be
    in the middle of; in one of 0 the engine climbs nowhere. Other settings are the estimator's.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: list[Batch],
        *,
        alpha: float,
        steps: int,
        classification: bool,
        meta_gradient: str = "second-order",
        device: str = "cpu",
        rung: str = "auto",
        updates_left: int = 20_000,
        **settings: Any,
    ) -> None:
        from sklearn_maml.data.episodes import EpisodeBatch, Rows

        settings = {
            "update_rule": "sgd",
            "module": module,
            "alpha": alpha,
            "beta": 1e-3,
            "beta_decay": 0.0,
            "steps": steps,
            "meta_gradient": meta_gradient,
            "meta_batch_size": len(batches[0][0]),
            "max_iter": 1,
            "early_stopping": False,
            "device": device,
            "random_state": 0,
            **settings,
        }
        if classification:
            self.estimator: Any = MAMLClassifier(**settings)
        else:
            self.estimator = MAMLRegressor(normalize_y=False, **settings)
        self.estimator.fit(list(zip(*batches[0], strict=True)))
        self.net = self.estimator.net_
        self.net.engine = self.estimator._make_engine(self.estimator.module_, rung)
        n_rows = sum(batches[0][k].shape[1] for k in (0, 2))
        sizes = {"n_tasks": len(batches[0][0]), "n_rows": n_rows, "steps": steps}
        if updates_left:
            self.net.engine.expect(1_000, updates_left, **sizes)
        self.alpha, self.steps = alpha, steps

        def rows(X: np.ndarray, y: np.ndarray) -> Rows:
            target = torch.from_numpy(y).contiguous()  # as `fit` draws them
            return Rows(
                torch.from_numpy(X).contiguous(), target if classification else target.unsqueeze(-1)
            )

        self.raw = batches
        self.batches = [
            EpisodeBatch(rows(b[0], b[1]), rows(b[2], b[3])).to(torch.device(device))
            for b in batches
        ]
        self.start = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.reset()
        self._limit = contextlib.ExitStack()  # as `fit` limits torch's threads
        n_rows = sum(part.X.shape[0] * part.X.shape[1] for part in self._sets(self.batches[0]))
        self._limit.enter_context(self.net.engine.threads(n_rows))

    @staticmethod
    def _sets(batch: Any) -> tuple[Any, Any]:
        return batch.support, batch.query

    def close(self) -> None:
        """Undo the limits that `fit` sets to the process."""
        self._limit.close()

    def reset(self) -> None:
        """Put the initial weights back."""
        with torch.no_grad():
            for name, p in self.estimator.module_.named_parameters():
                p.copy_(self.start[name])
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.net.history.clear()
        self.net.history.new_epoch()
        self._since = 0

    def meta_grad(self, i: int) -> tuple[float, dict[str, np.ndarray]]:
        """Mean query loss and its gradient, without an update."""
        step = self.net.engine.meta_step(
            self.net.module_.meta_params(),
            self.batches[i % len(self.batches)],
            alpha=self.alpha,
            steps=self.steps,
        )
        grads = {name.removeprefix("module."): g.cpu().numpy() for name, g in step.grads.items()}
        return step.losses.mean().item(), grads

    def train(self, i: int) -> torch.Tensor:
        """Make one meta-update; returns the loss as the step does."""
        if self._since == UPDATES_PER_EPOCH:
            self._begin_epoch()
        self._since += 1
        self.net.history.new_batch()
        # the collate function belongs to the step
        batch = use_batch(self.batches[i % len(self.batches)])
        loss: torch.Tensor = self.net.train_step(batch)["loss"]
        return loss

    def step(self, i: int) -> float:
        """Make one meta-update; `fit` reports the loss as a number."""
        return self.train(i).item()

    def adapt_predict(self, i: int) -> np.ndarray:
        """Outputs (tasks, rows, outputs) of adapted tasks, by the public methods."""
        X_support, y_support, X_query, _ = self.raw[i % len(self.raw)]
        self.estimator.adapt(X_support, y_support)
        output: np.ndarray
        if hasattr(self.estimator, "decision_function"):
            output = self.estimator.decision_function(X_query)
        else:
            output = self.estimator.predict(X_query)[..., None]
        return output


class PlainLoop:
    """MAML written down plainly: one task after another, autograd through the inner steps."""

    def __init__(
        self,
        module: nn.Module,
        batches: list[Batch],
        alpha: float,
        steps: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        second_order: bool = True,
    ) -> None:
        self.module, self.alpha, self.steps = module.to(device, dtype), alpha, steps
        self.second_order = second_order

        def move(values: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(values)
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        self.batches = [tuple(map(move, batch)) for batch in batches]
        self.optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def loss(self, params: dict[str, torch.Tensor], X: torch.Tensor, y: torch.Tensor) -> Any:
        output = functional_call(self.module, params, (X,))
        if y.is_floating_point():
            return nn.functional.mse_loss(output.squeeze(-1), y)
        return nn.functional.cross_entropy(output, y)

    def adapted(self, X: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters after the inner steps."""
        params = dict(self.module.named_parameters())
        for _ in range(self.steps):
            grads = torch.autograd.grad(
                self.loss(params, X, y), params.values(), create_graph=self.second_order
            )
            params = {
                name: p - self.alpha * g for (name, p), g in zip(params.items(), grads, strict=True)
            }
        return params

    def backward(self, i: int) -> float:
        batch = self.batches[i % len(self.batches)]
        n_tasks, total = len(batch[0]), batch[0].new_zeros(())
        self.optimizer.zero_grad()
        for X_support, y_support, X_query, y_query in zip(*batch, strict=True):
            params = self.adapted(X_support, y_support)
            loss = self.loss(params, X_query, y_query) / n_tasks
            loss.backward()
            total += loss.detach()
        return total.item()

    def meta_grad(self, i: int) -> tuple[float, dict[str, np.ndarray]]:
        """Mean query loss and its gradient, without an update."""
        loss = self.backward(i)
        return loss, {n: p.grad.cpu().numpy() for n, p in self.module.named_parameters()}

    def step(self, i: int) -> float:
        loss = self.backward(i)
        self.optimizer.step()
        return loss

    def adapt_predict(self, i: int) -> np.ndarray:
        """Outputs (tasks, rows, outputs) of adapted tasks."""
        X_support, y_support, X_query, _ = self.batches[i % len(self.batches)]
        outputs = []
        for X, y, X_new in zip(X_support, y_support, X_query, strict=True):
            outputs.append(functional_call(self.module, self.adapted(X, y), (X_new,)).detach())
        return torch.stack(outputs).cpu().numpy()


def relative_error(grads: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Norm of the difference, relative to that of the reference."""
    pairs = [(grads[name].astype(np.float64), value) for name, value in reference.items()]
    difference = sum(((a - b) ** 2).sum() for a, b in pairs)
    return float(np.sqrt(difference / sum((b**2).sum() for _, b in pairs)))


def cpu_time(function: Callable[[int], Any], n: int) -> float:
    """Seconds of CPU of one call."""
    start = time.process_time()
    for i in range(n):
        function(i)
    return (time.process_time() - start) / n


def take_turns(
    functions: list[Callable[[int], Any]], seconds: float, turns: int = 7
) -> list[list[float]]:
    """Time functions in turns for about so many seconds; returns the times of each."""
    counts = [
        max(1, int(seconds / turns / len(functions) / max(cpu_time(f, 1), 1e-6))) for f in functions
    ]
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(turns):
        for own, function, n in zip(times, functions, counts, strict=True):
            own.append(cpu_time(function, n))
    return times


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def meta_steps(seconds: float) -> None:
    """Part 1."""
    print("\nA meta-step, as `fit` runs it, against a plain loop over tasks (both with Adam)")
    print(f"{'':8s}{'library':>12s}{'plain loop':>13s}{'speed-up':>11s}{'gradients differ':>20s}")
    for name, (sizes, _, _, _, steps, alpha, classification) in WORKLOADS.items():
        batches = [make_batch(name, seed) for seed in range(4)]
        ours = LibraryStep(
            make_mlp(sizes), batches, alpha=alpha, steps=steps, classification=classification
        )
        loop = PlainLoop(make_mlp(sizes), batches, alpha, steps)
        error = relative_error(ours.meta_grad(0)[1], loop.meta_grad(0)[1])
        a, b = take_turns([ours.step, loop.step], seconds / len(WORKLOADS))
        print(
            f"{name:8s}{1e3 * statistics.median(a):9.2f} ms{1e3 * statistics.median(b):10.2f} ms"
            f"{median_ratio(b, a):10.1f}x{error:19.0e}",
            flush=True,
        )


def many_tasks(seconds: float) -> None:
    """Part 2."""
    n_tasks, n_support, n_query = 1000, 10, 20
    X, y, task = make_sinusoid_tasks(n_tasks, n_support + n_query, random_state=0)
    reg = MAMLRegressor(max_iter=50, early_stopping=False, random_state=0)
    reg.fit(X, y, groups=task)
    support = np.tile(np.arange(n_support + n_query) < n_support, n_tasks)
    parts = (X[support], y[support], task[support], X[~support], task[~support])
    X_3d, y_3d = X.reshape(n_tasks, -1, 1), y.reshape(n_tasks, -1)

    def batched(_: int) -> np.ndarray:
        return reg.adapt(parts[0], parts[1], groups=parts[2]).predict(parts[3], groups=parts[4])

    def one_by_one(_: int) -> np.ndarray:
        return np.concatenate(
            [
                reg.adapt(rows[:n_support], values[:n_support]).predict(rows[n_support:])
                for rows, values in zip(X_3d, y_3d, strict=True)
            ]
        )

    difference = np.abs(batched(0) - one_by_one(0)).max() / y.std()
    a, b = take_turns([batched, one_by_one], seconds, turns=3)
    print(
        f"\nAdapting to {n_tasks} tasks of {n_support} rows and predicting {n_query} rows of each"
    )
    print(f"  one batched call            {1e3 * statistics.median(a):9.1f} ms")
    print(f"  one call for each task      {1e3 * statistics.median(b):9.1f} ms")
    print(
        f"  speed-up {median_ratio(b, a):.1f}x; predictions differ by at most {difference:.0e} SD",
        flush=True,
    )


class Stopwatch:
    """Adds up the CPU time spent in a method of a class while it is watched."""

    def __init__(self, owner: type, method: str) -> None:
        self.owner, self.method, self.total = owner, method, 0.0

    def __enter__(self) -> Stopwatch:
        self.original = getattr(self.owner, self.method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return self.original(*args, **kwargs)
            finally:
                self.total += time.process_time() - start

        setattr(self.owner, self.method, timed)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.method, self.original)


FITS: dict[str, dict[str, Any]] = {
    "default settings (MLP 1-64-64-1)": {},
    "W1 (MLP 1-40-40-1, 1 step)": {"hidden_layer_sizes": (40, 40), "steps": 1, "alpha": 0.01},
}


def whole_fit(updates: int, settings: dict[str, Any], label: str) -> None:
    """Part 3."""
    settings = {"n_shots": 10, "random_state": 0, **settings}
    tasks = SinusoidTasks(n_rows=20)
    MAMLRegressor(max_iter=300, **settings).fit(tasks)  # imports, first-call costs, compiling
    with (
        Stopwatch(MetaNet, "train_step") as step,
        Stopwatch(MetaNet, "validation_step") as valid,
        Stopwatch(TaskStream, "batch") as draw,
    ):
        start = time.process_time()
        MAMLRegressor(max_iter=updates, **settings).fit(tasks)
        total = time.process_time() - start
    print(
        f"\nA fit of {updates:,} updates on sinusoids (25 tasks, K=10), {label}: "
        f"{total:.1f} s of CPU"
    )
    rest = total - step.total - valid.total - draw.total
    for name, part in (
        ("meta-steps (gradient, checks, Adam)", step.total),
        ("drawing tasks and episodes", draw.total),
        ("validation after every 50 updates", valid.total),
        ("skorch's loop, callbacks, the rest", rest),
    ):
        print(f"  {name:38s}{part:7.2f} s {100 * part / total:5.1f} %")
    print(f"  outside the meta-steps: {100 * (total - step.total) / total:.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of CPU, for each of parts 1, 2")
    parser.add_argument("--updates", type=int, default=2000, help="of each fit in part 3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, one thread; times are CPU times"
    )
    meta_steps(args.seconds)
    many_tasks(args.seconds)
    for label, settings in FITS.items():
        whole_fit(args.updates, settings, label)


if __name__ == "__main__":
    main()
