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
import functools
import importlib.util
import os
import statistics
from typing import Any

import numpy as np
import torch
from gpu_steps import Workload, conv4_of, images_of, mlp_workload
from run import WORKLOADS, median_ratio, relative_error, take_turns
from torch import nn
from whole_process import learn2learn_maml


def all_workloads() -> dict[str, tuple[Workload, bool]]:
    """Workloads by name, and whether their meta-gradient is of second order."""
    found = {
        f"{name}{'' if second_order else '_fo'}": (mlp_workload(name), second_order)
        for name in WORKLOADS
        for second_order in (True, False)
    }
    for name, queries in (("W3_q5", 1), ("W3", 15)):
        images = functools.partial(images_of, 32, 5, queries)
        load = Workload(name, functools.partial(conv4_of, 64), images, 1, 0.1, True)
        found[name] = load, True
    return found


class JaxStep:
    """``jit(value_and_grad(mean(vmap)))`` and optax's Adam, for multilayer perceptrons."""

    def __init__(self, load: Workload, second_order: bool) -> None:
        import jax
        import jax.numpy as jnp
        from jax_maml import jax_maml

        maml = jax_maml(load.alpha, load.steps, second_order=second_order)
        self.grad, self.update = jax.jit(maml.grad), maml.update
        values = [p.detach().numpy() for p in load.make_module().parameters()]
        self.params = [
            (jnp.asarray(w.T), jnp.asarray(b))
            for w, b in zip(values[::2], values[1::2], strict=True)
        ]
        self.state = maml.init(self.params)
        self.batches = [tuple(map(jnp.asarray, batch)) for batch in load.batches]

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

    def __init__(self, load: Workload, second_order: bool) -> None:
        module = load.make_module()
        self.maml = learn2learn_maml()(module, lr=load.alpha, first_order=not second_order)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=1e-3)
        self.steps = load.steps
        self.batches = [tuple(map(torch.from_numpy, batch)) for batch in load.batches]

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
    load, second_order = all_workloads()[name]
    # with the batch norm of the others
    ours = load.library("cpu", meta_gradient="second-order" if second_order else "first-order")
    exact = load.loop("cpu", dtype=torch.float64, second_order=second_order).meta_grad(0)[1]
    names = list(exact)
    peers: dict[str, Any] = {}
    if "jax" in installed and not load.convolves:
        peers["jax"] = JaxStep(load, second_order)
    if "learn2learn" in installed:
        peers["learn2learn"] = LoopStep(load, second_order)
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
    parser.add_argument(
        "--workloads", default=",".join(all_workloads()), help="names, with commas between"
    )
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
        for name in args.workloads.split(",") if args.workloads else all_workloads():
            measure(name, installed, args.seconds)


if __name__ == "__main__":
    main()
