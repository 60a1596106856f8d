"""Rows that arrive one by one: `adapt(..., extend=True)` against adapting anew to all rows.

    python benchmarks/streams.py [--tasks 10000] [--updates 50] [--part rounds|anew|single|long]

A Gaussian head of the default size (5 members, 130 columns) on sinusoids, float64, one thread. Each
part runs in a process of its own, for its peak memory:

- rounds: every update adds one row to each of the tasks;
- anew: after some of these updates, one call of `adapt` with all rows that have come so far;
- single: one row of one task, where all tasks are adapted to 10 rows;
- long: one row of one task that has up to 100,000 rows, and what is kept of it.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import pickle
import resource
import time
import warnings

import numpy as np

from sklearn_maml import MAMLRegressor
from sklearn_maml.datasets import make_sinusoid_tasks

LONG = (50, 500, 5_000, 100_000)


def fitted() -> MAMLRegressor:
    """Head on sinusoids."""
    X, y, task = make_sinusoid_tasks(n_tasks=60, n_rows=20, random_state=0)
    model = MAMLRegressor(update_rule="gaussian-head", max_iter=50, random_state=0)
    return model.fit(X, y, groups=task)


def rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows; what their targets are does not matter for the time."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-5, 5, (n, 1)), rng.normal(size=n)


def peak() -> float:
    """Peak memory of the process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(model: MAMLRegressor, X, y, task, extend: bool) -> float:
    """CPU time of adapting, in seconds."""
    start = time.process_time()
    model.adapt(X, y, groups=task, extend=extend)
    return time.process_time() - start


def rounds(n_tasks: int, n_updates: int) -> None:
    """Rounds of single rows."""
    model, ids, before = fitted(), np.arange(n_tasks), peak()
    times = []
    for k in range(1, n_updates + 1):
        X, y = rows(n_tasks, k)
        times.append(timed(model, X, y, ids, True))
        if k in milestones(n_updates):
            print(f"extend, update {k:3d}: {times[-1]:6.2f} s, peak + {peak() - before:.0f} MB")
    print(f"extend, all {n_updates} updates: {sum(times):.1f} s", flush=True)


def milestones(n_updates: int) -> list[int]:
    """Updates to tell of."""
    return sorted({k for k in (1, 10, 25) if k < n_updates} | {n_updates})


def anew(n_tasks: int, n_updates: int) -> None:
    """Adapt to all rows that have come."""
    model, ids, before = fitted(), np.arange(n_tasks), peak()
    for k in milestones(n_updates):
        X, y = (np.concatenate(p) for p in zip(*(rows(n_tasks, j) for j in range(k)), strict=True))
        task = np.tile(ids, k)
        seconds = timed(model, X, y, task, False)
        print(f"anew, {k:3d} rows a task: {seconds:6.2f} s, peak + {peak() - before:.0f} MB")


def single(n_tasks: int, n_updates: int) -> None:
    """One row of one of many tasks."""
    model, ids = fitted(), np.repeat(np.arange(n_tasks), 10)
    X, y = rows(len(ids), 0)
    of_all = timed(model, X, y, ids, False)
    times = [
        timed(model, X[j : j + 1], y[:1], ids[j : j + 1], True)
        for j in range(0, 10 * n_updates, 10)
    ]
    print(f"one row of one of {n_tasks:,} tasks: {1e3 * np.median(times):.1f} ms", end="; ")
    print(f"all of them anew: {of_all:.2f} s", flush=True)


def long(n_tasks: int, n_updates: int) -> None:
    """One row of a task with many."""
    whole = fitted()
    for n in LONG:
        X, y = rows(n, 0)
        task = np.zeros(n)
        of_all = min(timed(whole, X, y, task, False) for _ in range(3))
        model = copy.copy(whole)
        times = [timed(model, X[j : j + 1], y[:1], [0], True) for j in range(20)]
        kept = len(pickle.dumps(model._state.adapted.state())) / 1024
        print(
            f"a task of {n:7,d} rows: one more {1e3 * np.median(times):.1f} ms, anew "
            f"{1e3 * of_all:.1f} ms, kept {kept:,.0f} kB",
            flush=True,
        )


def run(part: str, n_tasks: int, n_updates: int) -> None:
    warnings.simplefilter("ignore")
    {"rounds": rounds, "anew": anew, "single": single, "long": long}[part](n_tasks, n_updates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--part", choices=("rounds", "anew", "single", "long"))
    options = parser.parse_args()
    for part in [options.part] if options.part else ["single", "long", "anew", "rounds"]:
        process = multiprocessing.get_context("spawn").Process(
            target=run, args=(part, options.tasks, options.updates)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
