"""Meta-steps beside those of JAX and learn2learn: the ratios of the README and of RESULTS.md.

    python benchmarks/peers.py [--workloads W1,W2] [--seconds 20]

Each library computes the same meta-gradient of the same batches (compared with a plain loop in
float64 first) and makes an update with Adam. Ours is the step that `fit` runs,
`MetaNet.train_step`, with its checks and its history; JAX's is ``jit(value_and_grad(mean(vmap)))``,
learn2learn's is the loop of its examples. Steps take turns, on one thread; times are of the CPU,
and a ratio is the median over the turns. What is not installed is left out with a message.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_steps import _images
from papers import conv4
from run import (
    WORKLOADS,
    Batch,
    LibraryStep,
    PlainLoop,
    make_batch,
    make_mlp,
    median_ratio,
    relative_error,
    take_turns,
)
from torch import nn
from whole_process import learn2learn_maml


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: a module, batches of tasks, and how they are learned."""

    module: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    alpha: float
    steps: int
    second_order: bool = True
    sizes: tuple[int, ...] | None = None  # of a multilayer perceptron


def _mlp(name: str, second_order: bool) -> Workload:
    sizes, _, _, _, steps, alpha, _ = WORKLOADS[name]
    return Workload(
        functools.partial(make_mlp, sizes),
        functools.partial(make_batch, name),
        alpha,
        steps,
        second_order,
        sizes,
    )


def _conv(queries: int) -> Workload:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return conv4(5, 64, averages=False)

    return Workload(module, functools.partial(_images, 32, 5, queries), 0.1, 1)


ALL = {
    **{
        f"{n}{'' if order else '_fo'}": _mlp(n, order) for n in WORKLOADS for order in (True, False)
    },
    "W3_q5": _conv(1),
    "W3": _conv(15),
}


class JaxStep:
    """``jit(value_and_grad(mean(vmap)))`` and optax's Adam, for multilayer perceptrons."""

    def __init__(self, load: Workload, module: nn.Module, batches: list[Batch]) -> None:
        import jax
        import jax.numpy as jnp
        from jax_maml import jax_maml

        maml = jax_maml(load.alpha, load.steps, second_order=load.second_order)
        self.grad, self.update = jax.jit(maml.grad), maml.update
        values = [p.detach().numpy() for p in module.parameters()]
        self.params = [
            (jnp.asarray(w.T), jnp.asarray(b))
            for w, b in zip(values[::2], values[1::2], strict=True)
        ]
        self.state = maml.init(self.params)
        self.batches = [tuple(map(jnp.asarray, batch)) for batch in batches]

    def meta_grad(self) -> list[np.ndarray]:
        """Return the gradient of the first batch, parameter by parameter, as torch has them."""
        _, grads = self.grad(self.params, self.batches[0])
        return [np.asarray(part) for w, b in grads for part in (w.T, b)]

    def step(self, i: int) -> float:
        """Make one meta-update."""
        batch = self.batches[i % len(self.batches)]
        self.params, self.state, value = self.update(self.params, self.state, batch)
        return float(value)


class LoopStep:
    """learn2learn's MAML in the loop of its examples."""

    def __init__(self, load: Workload, module: nn.Module, batches: list[Batch]) -> None:
        self.maml = learn2learn_maml()(module, lr=load.alpha, first_order=not load.second_order)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=1e-3)
        self.steps = load.steps
        self.batches = [tuple(map(torch.from_numpy, batch)) for batch in batches]

    @staticmethod
    def _loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if y.is_floating_point():
            return nn.functional.mse_loss(output.squeeze(-1), y)
        return nn.functional.cross_entropy(output, y)

    def _backward(self, i: int) -> float:
        self.optimizer.zero_grad()
        batch, total = self.batches[i % len(self.batches)], 0.0
        for X, y, X_query, y_query in zip(*batch, strict=True):
            learner = self.maml.clone()
            for _ in range(self.steps):
                learner.adapt(self._loss(learner(X), y))
            loss = self._loss(learner(X_query), y_query)
            loss.backward()
            total += loss.item()
        for p in self.maml.parameters():
            p.grad.mul_(1 / len(batch[0]))
        return total / len(batch[0])

    def meta_grad(self) -> list[np.ndarray]:
        """Return the gradient of the first batch, parameter by parameter."""
        self._backward(0)
        return [p.grad.numpy() for p in self.maml.parameters()]

    def step(self, i: int) -> float:
        """Make one meta-update."""
        loss = self._backward(i)
        self.optimizer.step()
        return loss


def measure(name: str, installed: list[str], seconds: float) -> None:
    """Print a line of the table."""
    load = ALL[name]
    batches = [load.batch(seed) for seed in range(4)]
    classes = batches[0][1].dtype.kind == "i"
    ours = LibraryStep(
        load.module(),
        batches,
        alpha=load.alpha,
        steps=load.steps,
        classification=classes,
        meta_gradient="second-order" if load.second_order else "first-order",
        engine__batch_norm="transductive",  # as the others do
    )
    exact = PlainLoop(
        load.module(),
        batches,
        load.alpha,
        load.steps,
        dtype=torch.float64,
        second_order=load.second_order,
    ).meta_grad(0)[1]
    names = list(exact)
    peers: dict[str, Any] = {}
    if "jax" in installed and load.sizes is not None:
        peers["jax"] = JaxStep(load, load.module(), batches)
    if "learn2learn" in installed:
        peers["learn2learn"] = LoopStep(load, load.module(), batches)
    found = {"ours": ours.meta_grad(0)[1]}
    found |= {n: dict(zip(names, p.meta_grad(), strict=True)) for n, p in peers.items()}
    errors = {n: relative_error(grads, exact) for n, grads in found.items()}
    wrong = [n for n, error in errors.items() if error > 1e-3]
    if wrong:
        raise SystemExit(f"{name}: the meta-gradients of {wrong} are others: {errors}")
    steps = [ours.step, *(p.step for p in peers.values())]
    for step in steps:  # what is compiled at first is not what is timed
        for i in range(3):
            step(i)
    times = take_turns(steps, seconds)
    ours.close()
    ratios = [
        f"{n} {median_ratio(times[0], t):6.3f}" for n, t in zip(peers, times[1:], strict=True)
    ]
    took = 1e3 * statistics.median(times[0])
    print(f"{name:10s}{took:9.3f} ms   {'   '.join(ratios)}   {errors['ours']:.0e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default=",".join(ALL), help="names, with commas between")
    parser.add_argument("--seconds", type=float, default=20, help="of CPU, for each workload")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # else JAX has a thread for each core, whatever it is told
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    torch.set_num_threads(1)
    known = ("jax", "learn2learn")
    installed = [n for n in known if importlib.util.find_spec(n) is not None]
    for name in set(known) - {*installed}:
        print(f"{name} is not installed and left out")
    if installed:
        print("\nA meta-step with Adam: ours, its time as a ratio to others, its gradient's error")
        for name in args.workloads.split(","):
            measure(name, installed, args.seconds)


if __name__ == "__main__":
    main()
