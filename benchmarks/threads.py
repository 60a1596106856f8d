"""Two threads against one: wall time of fits, of adapting, and of two processes at once.

    python benchmarks/threads.py [--turns 3] [--only W1,W2]

Each run is in a process of its own, with OMP_NUM_THREADS=1 or 2, and the runs take turns; what is
timed begins after the imports and a first fit. The last row is a search with n_jobs=2 over four
default fits, where joblib gives every process one thread, against the same with n_jobs=1. On a
machine with as many free cores only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_steps import workloads
from sklearn.model_selection import GridSearchCV, GroupKFold

from sklearn_maml import MAMLClassifier, MAMLRegressor

UPDATES = {"W1": 2000, "W2": 1000, "W3": 12}


def curves(n_tasks: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tasks of 10 features that differ in their slopes."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(n_tasks), n_rows)
    X = rng.normal(size=(len(task), 10)).astype(np.float32)
    slopes = 1 + 0.5 * rng.normal(size=(n_tasks, 10))
    return X, (X * slopes[task]).sum(1) + np.sin(2 * X[:, 0]), task


def prepared(name: str) -> Callable[[], Any]:
    """What is timed."""
    if name == "default fit":
        X, y, task = curves(100, 100)
        return lambda: MAMLRegressor(random_state=0).fit(X, y, groups=task)
    if name.startswith("search"):
        X, y, task = curves(60, 20)
        X = np.c_[X, task]
        search = GridSearchCV(
            MAMLRegressor(task_column=10, random_state=0),
            {"beta": [0.001, 0.003]},
            cv=GroupKFold(2),
            refit=False,
            n_jobs=int(name[-1]),
        )
        return lambda: search.fit(X, y, groups=task)
    (load,) = (w for w in workloads(small=False) if w.name == name)
    if load.adapts_only:
        step = load.library("cpu")
        return lambda: step.adapt_predict(0)
    X, y, X_query, y_query = load.batches[0]
    settings = {
        "module": load.make_module(),
        "update_rule": "sgd",
        "alpha": load.alpha,
        "steps": load.steps,
        "meta_batch_size": len(X),
        "early_stopping": False,
        "max_iter": UPDATES[name],
        "random_state": 0,
    }
    model = MAMLClassifier if load.classification else MAMLRegressor
    tasks = list(zip(X, y, X_query, y_query, strict=True))
    return lambda: model(**settings).fit(tasks)


def measure(name: str) -> None:
    """Run once to warm up, then print the wall time of another run."""
    run = prepared(name)
    run()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]))


def seconds(name: str, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", help="rows, separated by commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"{'':14s}{'one, wall s':>12s}{'two, wall s':>12s}{'times faster':>14s}{'CPU':>7s}")
    pairs = {name: ((name, 1), (name, 2)) for name in ("W1", "W2", "W3", "W4", "default fit")}
    pairs["search"] = (("search, n_jobs=1", 1), ("search, n_jobs=2", 2))
    for title, (one, two) in pairs.items():
        if args.only is not None and title not in args.only.split(","):
            continue
        found = [(seconds(*one), seconds(*two)) for _ in range(args.turns)]
        wall = [statistics.median(turn[k][0] for turn in found) for k in (0, 1)]
        faster = statistics.median(turn[0][0] / turn[1][0] for turn in found)
        cpu = statistics.median(turn[1][1] / turn[0][1] for turn in found)
        of_cpu = f"{cpu:7.2f}" if title != "search" else ""  # that of children is not counted
        print(f"{title:14s}{wall[0]:12.2f}{wall[1]:12.2f}{faster:14.2f}{of_cpu}", flush=True)


if __name__ == "__main__":
    main()
