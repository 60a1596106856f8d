"""How the cost of a meta-step grows with its tasks and with its inner steps.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--seconds 60] [--plot FILE]

1. CPU time per task against the number of tasks in a meta-batch, and against that of a plain loop
   over tasks. It has to fall up to 400 tasks, and must not be above the loop's at one.
2. CPU time of a meta-step against the number of inner steps, second and first order.

The meta-step is the one that `fit` runs (see `run.py`); what is compared takes turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from run import (
    WORKLOADS,
    LibraryStep,
    PlainLoop,
    make_batch,
    make_mlp,
    median_ratio,
    relative_error,
    take_turns,
)

NAMES = ("W1", "W2")
TITLES = {
    "W1": "MLP 1-40-40-1, 10 + 10 rows",
    "W2": "MLP 20-64-64-5, 25 + 75 rows",
}
COLOURS = {"W1": "#0b6e99", "W2": "#c1272d"}


def per_task(counts: list[int], seconds: float, turns: int) -> dict[str, dict[str, list[float]]]:
    """Print and return part 1: milliseconds per task of the library and of the loop."""
    figures: dict[str, dict[str, list[float]]] = {}
    for name in NAMES:
        sizes, _, _, _, steps, alpha, classification = WORKLOADS[name]
        pairs = []
        errors = []
        for n_tasks in counts:
            batches = [make_batch(name, seed, n_tasks) for seed in range(2)]
            ours = LibraryStep(
                make_mlp(sizes), batches, alpha=alpha, steps=steps, classification=classification
            )
            loop = PlainLoop(make_mlp(sizes), batches, alpha, steps)
            errors.append(relative_error(ours.meta_grad(0)[1], loop.meta_grad(0)[1]))
            pairs += [ours.step, loop.step]
        times = take_turns(pairs, seconds / len(NAMES), turns)
        own, other = times[::2], times[1::2]
        print(f"\n{name}: {TITLES[name]}, {steps} inner steps, second order: ms of CPU per task")
        print(f"{'tasks':>6s}{'library':>10s}{'to 1 task':>11s}{'plain loop':>12s}{'ratio':>8s}")
        for n_tasks, a, b in zip(counts, own, other, strict=True):
            # of a task, relative to that of a meta-step of one task
            relative = median_ratio(a, own[0]) * counts[0] / n_tasks
            print(
                f"{n_tasks:6d}{1e3 * statistics.median(a) / n_tasks:10.4f}{relative:11.3f}"
                f"{1e3 * statistics.median(b) / n_tasks:12.3f}{median_ratio(a, b):8.3f}"
            )
        print(f"  gradients differ by at most {max(errors):.0e}", flush=True)
        figures[name] = {
            label: [1e3 * statistics.median(t) / n for t, n in zip(part, counts, strict=True)]
            for label, part in (("library", own), ("plain loop", other))
        }
    return figures


def per_step(counts: list[int], seconds: float, turns: int) -> dict[str, dict[str, list[float]]]:
    """Print and return part 2: milliseconds of a meta-step for each order."""
    figures: dict[str, dict[str, list[float]]] = {}
    for name in NAMES:
        sizes, n_tasks, _, _, _, alpha, classification = WORKLOADS[name]
        batches = [make_batch(name, seed) for seed in range(4)]
        figures[name] = {}
        table: dict[str, list[list[float]]] = {}
        settings: Any = {"alpha": alpha / 10, "classification": classification}
        orders = ("second-order", "first-order")
        functions = [
            LibraryStep(make_mlp(sizes), batches, steps=steps, meta_gradient=order, **settings).step
            for order in orders
            for steps in counts
        ]
        times = take_turns(functions, seconds / len(NAMES), turns)
        for k, order in enumerate(orders):
            table[order] = times[k * len(counts) : (k + 1) * len(counts)]
            figures[name][order] = [1e3 * statistics.median(t) for t in table[order]]
        print(f"\n{name}: {TITLES[name]}, {n_tasks} tasks: ms of CPU of a meta-step")
        print(
            f"{'steps':>6s}{'second':>10s}{'per step':>10s}{'first':>10s}{'per step':>10s}"
            f"{'second/first':>14s}"
        )
        for k, steps in enumerate(counts):
            second, first = (figures[name][order][k] for order in orders)
            print(
                f"{steps:6d}{second:10.3f}{second / steps:10.3f}{first:10.3f}{first / steps:10.3f}"
                f"{median_ratio(*(table[order][k] for order in orders)):14.2f}",
                flush=True,
            )
    return figures


def draw(
    tasks: dict[str, dict[str, list[float]]],
    n_tasks: list[int],
    steps: dict[str, dict[str, list[float]]],
    n_steps: list[int],
    file: Path,
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
    for ax, figures, counts, dashed, title, xlabel, ylabel in (
        (
            *(axes[0], tasks, n_tasks, "plain loop", "More tasks in a meta-batch"),
            *("tasks in a meta-batch", "CPU time per task (ms)"),
        ),
        (
            *(axes[1], steps, n_steps, "first-order", "More inner steps"),
            *("inner steps", "CPU time of a meta-step (ms)"),
        ),
    ):
        for name, series in figures.items():
            for label, values in series.items():
                style = {"ls": "--", "marker": "^"} if label == dashed else {"marker": "o"}
                text = f"{TITLES[name].split(',')[0]}, {label.replace('-', ' ')}"
                ax.plot(counts, values, color=COLOURS[name], label=text, **style)
        ax.set(xscale="log", yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(
            frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15)
        )
    fig.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of CPU, for each part")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tasks", default="1,4,25,100,400", help="tasks in a meta-batch")
    parser.add_argument("--steps", default="1,5,20,50", help="numbers of inner steps")
    parser.add_argument("--plot", type=Path, help="file to draw both parts into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_tasks, n_steps = ([int(n) for n in text.split(",")] for text in (args.tasks, args.steps))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread; times are CPU times"
    )
    tasks = per_task(n_tasks, args.seconds, args.turns)
    steps = per_step(n_steps, args.seconds, args.turns)
    if args.plot:
        draw(tasks, n_tasks, steps, n_steps, args.plot)


if __name__ == "__main__":
    main()
