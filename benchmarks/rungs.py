"""What each rung of the engine buys: CPU time against the next one down.

    OMP_NUM_THREADS=1 python benchmarks/rungs.py [--seconds 20] [--only W1,LSTM]

For each workload every rung that covers it is set up in turn, its first meta-gradient is compared
with that of the plain loop in float64, and meta-steps take turns. Printed are milliseconds of a
meta-step (of adapting to 1,000 tasks, for W4), the seconds until the first one was done beyond one
more, and how many times faster fits of 100, 1,000 and 20,000 updates are than on the next rung
down, what is set up included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_steps import Workload, workloads
from run import Batch, take_turns
from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine import Engine
from sklearn_maml.engine.ladder import RUNGS
from sklearn_maml.meta_gradients import SecondOrder
from sklearn_maml.targets.losses import cross_entropy_rows, squared_error_rows
from sklearn_maml.theta import name_in_module
from sklearn_maml.update_rules import SGD

UPDATES = (100, 1_000, 20_000)


class Sequences(nn.Module):
    """The last state of an LSTM over 16 steps of 4 features, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Tokens(nn.Module):
    """A transformer layer over 8 tokens of 16 features, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x).mean(1))
        return out


def normed_mlp() -> nn.Module:
    """A perceptron with batch norm, as users write it."""
    parts: list[nn.Module] = []
    for a, b in ((10, 64), (64, 64)):
        parts += [nn.Linear(a, b), nn.BatchNorm1d(b, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(64, 1))


def _numbers(*shape: int) -> Callable[[int], Batch]:
    """Make noise and its mean in rows of this shape: 25 tasks, 10 rows to adapt to, 10 more."""

    def make(seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(25, 20, *shape)).astype(np.float32)
        y = X.reshape(25, 20, -1).mean(-1) * rng.normal(size=(25, 1)).astype(np.float32)
        return X[:, :10], y[:, :10], X[:, 10:], y[:, 10:]

    return make


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


def all_workloads() -> list[Workload]:
    """Those of the other benchmarks, and three networks that nothing here was written for."""
    others = [
        Workload(name, _seeded(make), _numbers(*shape), 3, 0.03, False)
        for name, make, shape in (
            ("LSTM", Sequences, (16, 4)),
            ("transformer", Tokens, (8, 16)),
            ("batch norm", normed_mlp, (10,)),
        )
    ]
    return [*workloads(small=False), *others]


def episodes(batch: Batch, dtype: torch.dtype) -> EpisodeBatch:
    """Tensors of a batch, as the engine takes them."""
    tensors = [torch.from_numpy(part) for part in batch]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    if tensors[1].is_floating_point():
        tensors[1::2] = [y.unsqueeze(-1) for y in tensors[1::2]]
    return EpisodeBatch(Rows(*tensors[:2]), Rows(*tensors[2:]))


class OnRung:
    """Meta-steps of a workload on one rung."""

    def __init__(self, workload: Workload, rung: str, dtype: torch.dtype = torch.float32) -> None:
        module = workload.make_module().to(dtype)
        named = {name: p.detach() for name, p in module.named_parameters()}
        self.params = {name_in_module(name): p for name, p in named.items()}
        self.workload = workload
        self.batches = [episodes(batch, dtype) for batch in workload.batches]
        self.engine = Engine(
            module,
            row_loss=cross_entropy_rows if workload.classification else squared_error_rows,
            rule=SGD(),
            meta_gradient=SecondOrder(),
            adapted=list(named),
            rung=rung,
            batch_norm="transductive",
        )

    def step(self, i: int) -> Any:
        """One meta-step, or adapting to all tasks."""
        load, batch = self.workload, self.batches[i % len(self.batches)]
        how = {"alpha": load.alpha, "steps": load.steps}
        if load.adapts_only:
            return self.engine.adapt(self.params, batch.support, **how)
        return self.engine.meta_step(self.params, batch, **how)

    def answer(self) -> Tensor:
        """Gradients, or adapted parameters, in one vector."""
        found = self.step(0)
        parts = found.params if self.workload.adapts_only else found.grads
        return torch.cat([parts[name].double().flatten() for name in sorted(parts)])


def measure(workload: Workload, seconds: float) -> None:
    """Print the rows of one workload."""
    convolves = workload.convolves  # in float64, one after another: minutes
    expected = OnRung(workload, "loop", torch.float32 if convolves else torch.float64).answer()
    rungs, setup = [], []
    for name in dict.fromkeys(kind.name for kind in RUNGS):
        try:
            start = time.process_time()
            rung = OnRung(workload, name)
            got = rung.answer()
            first = time.process_time() - start
        except ValueError:  # it does not cover this
            continue
        error = float((got - expected).norm() / expected.norm())
        if not error < 2e-3:
            print(f"{workload.name:12s}{name:10s} wrong: differs by {error:.1e}")
            continue
        rungs.append((name, rung, error))
        setup.append(first)
    times = take_turns([rung.step for _, rung, _ in rungs], seconds, 5)
    ms = [1e3 * statistics.median(own) for own in times]
    setup = [max(first - own / 1e3, 0.0) for first, own in zip(setup, ms, strict=True)]
    for k, (name, _, error) in enumerate(rungs):
        row = f"{workload.name:12s}{name:10s}{ms[k]:9.2f}{setup[k]:9.2f}{error:9.0e}"
        if k + 1 < len(rungs):
            for n in UPDATES:
                ours, below = (setup[j] + n * ms[j] / 1e3 for j in (k, k + 1))
                row += f"{below / ours:9.2f}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of CPU, for each workload")
    parser.add_argument("--only", help="workloads, separated by commas")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"{'':12s}{'rung':10s}{'ms':>9s}{'setup s':>9s}{'error':>9s}", end="")
    print("".join(f"{n:9,d}" for n in UPDATES) + "  updates: times faster than the next rung")
    for workload in all_workloads():
        if args.only is None or workload.name in args.only.split(","):
            measure(workload, args.seconds)


if __name__ == "__main__":
    main()
