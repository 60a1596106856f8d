"""Peak memory of a meta-step against the number of inner steps.

    python benchmarks/memory.py [--steps 1,5,20,50,100] [--plot FILE] [--turns 5]

Second order, with and without `checkpoint_steps`, first order and implicit, for a multilayer
perceptron and a convolutional network. Every point is one meta-step in a process of its own: the
growth of the resident memory over what it was before the step, by the kernel's high-water mark
(Linux only). The allocator is told to give freed blocks back, so that the figures are of memory in
use. See RESULTS.md for what was measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine import Engine
from sklearn_maml.meta_gradients import resolve_meta_gradient
from sklearn_maml.modules import adapted_names
from sklearn_maml.targets.losses import cross_entropy_rows
from sklearn_maml.update_rules import SGD

# name: shape of a row, tasks, support rows, query rows, classes, rung of the engine
WORKLOADS = {
    "MLP": ((64,), 32, 100, 100, 10, "stacked"),
    "MLP, compiled kernels": ((64,), 32, 100, 100, 10, "native"),
    "conv4": ((1, 28, 28), 4, 5, 25, 5, "auto"),
}
TITLES = {
    "MLP": "MLP 64-256-256-10, 32 tasks x (100 + 100) rows",
    "MLP, compiled kernels": "the same MLP on the compiled kernels",
    "conv4": "conv4, 64 channels, 4 tasks x (5 + 25) images",
}
# name: meta-gradient, checkpoint_steps
SERIES = {
    "second order": ("second-order", False),
    "second order, checkpoint_steps": ("second-order", True),
    "first order": ("first-order", False),
    "implicit": ("implicit", False),
}
# blocks of 64 KiB and more are mapped one by one and unmapped when freed
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}


def make_module(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    if name != "conv4":
        for a, b in itertools.pairwise((64, 256, 256)):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(256, 10))
    for channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 5))


class Step:
    """A meta-step of a workload; called with the number of inner steps."""

    def __init__(self, name: str, series: str) -> None:
        shape, n_tasks, n_support, n_query, n_classes, rung = WORKLOADS[name]
        meta_gradient, checkpoint_steps = SERIES[series]
        module = make_module(name)
        self.engine = Engine(
            module,
            row_loss=cross_entropy_rows,
            rule=SGD(),
            meta_gradient=resolve_meta_gradient(meta_gradient, {}),
            adapted=adapted_names(module, "all"),
            rung=rung,
            checkpoint_steps=checkpoint_steps,
        )
        self.params = {f"module.{n}": p.detach() for n, p in module.named_parameters()}
        self.batch, self.small = (
            EpisodeBatch(
                *(
                    Rows(torch.randn(t, n, *shape), torch.randint(n_classes, (t, n)))
                    for n in (n_support, n_query)
                )
            )
            for t in (n_tasks, 2)
        )

    def __call__(self, steps: int, small: bool = False) -> None:
        batch = self.small if small else self.batch
        self.engine.meta_step(self.params, batch, alpha=0.01, steps=steps)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def measure(name: str, series: str, steps: int) -> float:
    """Growth of the resident memory in one meta-step, in MB."""
    step = Step(name, series)
    step(1, small=True)  # what is set up once is not counted
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(steps)
    return resident("VmHWM") - before


def in_own_process(name: str, series: str, steps: int) -> float:
    code = [sys.executable, __file__, "--point", json.dumps([name, series, steps])]
    done = subprocess.run(code, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {series}, {steps} steps failed:\n{done.stderr}")
    return float(done.stdout)


def measure_time(name: str, steps: int, turns: int) -> tuple[float, float]:
    """CPU seconds of a plain second-order meta-step, and how many times that recomputation takes.

    Medians over turns in which the two alternate.
    """
    plain, recomputed = (Step(name, series) for series in list(SERIES)[:2])
    seconds: dict[Step, list[float]] = {plain: [], recomputed: []}
    for _ in range(turns + 1):
        for step in seconds:
            start = time.process_time()
            step(steps)
            seconds[step].append(time.process_time() - start)
    first, second = (values[1:] for values in seconds.values())
    return statistics.median(first), statistics.median(
        b / a for a, b in zip(first, second, strict=True)
    )


def draw(figures: dict[str, dict[str, list[float]]], steps: list[int], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    styles = {
        "second order": ("o", "-", "#c1272d"),
        "second order, checkpoint_steps": ("s", "-", "#0b6e99"),
        "first order": ("^", "--", "#666666"),
        "implicit": ("D", ":", "#2e8b57"),
    }
    fig, axes = plt.subplots(
        1, len(figures), figsize=(5 * len(figures), 4), sharey=True, layout="constrained"
    )
    for ax, (name, series) in zip(axes, figures.items(), strict=True):
        for label, values in series.items():
            marker, line, colour = styles[label]
            ax.plot(steps, values, marker=marker, ls=line, color=colour, label=label)
            ax.annotate(
                f"{values[-1]:,.0f}",
                (steps[-1], values[-1]),
                textcoords="offset points",
                xytext=(7, 0),
                va="center",
                color=colour,
                fontsize=9,
            )
        ax.set(
            xscale="log",
            yscale="log",
            title=TITLES[name],
            xlabel="inner steps",
        )
        ax.title.set_fontsize(11)
        ax.set_xticks(steps, [str(k) for k in steps])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda mb, _: f"{mb:,.0f}"))
        ax.margins(x=0.12)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("peak memory of a meta-step (MB)")
    axes[0].legend(frameon=False, loc="upper left")
    fig.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", default="1,5,20,50,100", help="numbers of inner steps")
    parser.add_argument("--plot", type=Path, help="file to draw the figures into")
    parser.add_argument("--turns", type=int, default=5, help="turns of the timing; 0 leaves it out")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # one point, in its own process
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point:
        print(measure(*json.loads(options.point)))
        return
    steps = [int(k) for k in options.steps.split(",")]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    figures: dict[str, dict[str, list[float]]] = {}
    for name in WORKLOADS:
        print(f"\n{TITLES[name]}: peak memory of a meta-step in MB\n")
        print("| inner steps | " + " | ".join(str(k) for k in steps) + " |")
        print("| --- |" + " --- |" * len(steps))
        figures[name] = {}
        for series in SERIES:
            if series == "implicit" and WORKLOADS[name][-1] == "native":
                continue  # the kernels do without it
            values = [in_own_process(name, series, k) for k in steps]
            figures[name][series] = values
            print(f"| {series} | " + " | ".join(f"{v:,.0f}" for v in values) + " |", flush=True)
        if options.turns:
            seconds, ratio = measure_time(name, 5, options.turns)
            print(
                f"\nCPU time at 5 steps: second order {1e3 * seconds:.0f} ms, with "
                f"checkpoint_steps {ratio:.2f} times that"
            )
    if options.plot:
        draw(figures, steps, options.plot)


if __name__ == "__main__":
    main()
