"""Two threads against one: wall time of fits, of adapting, and of two processes at once.

    python benchmarks/threads.py [--turns 3] [--only W1,W2]
    python benchmarks/threads.py --model

Each run is in a process of its own, with OMP_NUM_THREADS=1 or 2, and the runs take turns; what is
timed begins after the imports and a first fit. The last row is a search with n_jobs=2 over four
default fits, where joblib gives every process one thread, against the same with n_jobs=1. On a
machine with as many free cores only.

`--model` measures CPU time alone, and so may run on a busy machine: the part of it that is spent
outside of what is parted among threads, and how many times faster the whole would be with 2, 4, 16
and 64 of them if each parted block took as long as it does in one thread.
"""

from __future__ import annotations

import argparse
import json
import math
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
from sklearn_maml.engine import pieces
from sklearn_maml.engine.rungs import conv
from sklearn_maml.learners import building, judging
from sklearn_maml.native import Kernel
from sklearn_maml.native.head import HeadKernel

UPDATES = {"W1": 2000, "W2": 1000, "W3": 12, "W4": 20}  # of W4, calls


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
        return lambda: [step.adapt_predict(0) for _ in range(UPDATES[name])]
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


THREADS = (2, 4, 16, 64)
TASKS_PER_BLOCK, MAX_BLOCKS, MAX_PARTS = 8, 32, 16  # of mlp.cpp and head.cpp


def model(name: str) -> None:
    """Print the serial part of a run in two threads, and what follows for more of them."""
    run = prepared(name)
    run()
    parted = {n: 0.0 for n in (1, *THREADS)}

    def noting(function: Callable[..., Any], n_blocks: Callable[..., int]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            total, own = time.process_time(), time.thread_time()
            result = function(*args, **kwargs)
            total, own = time.process_time() - total, time.thread_time() - own
            if total - own > 1e-5:  # others have taken part
                blocks = n_blocks(*args)
                for n in parted:
                    parted[n] += total * math.ceil(blocks / n) / blocks
            return result

        return noted

    def of_mlp(kernel: Any, kind: str, n_tasks: int, *_: Any) -> int:
        return min(math.ceil(n_tasks / TASKS_PER_BLOCK), MAX_BLOCKS)

    def of_head(kernel: Any, params: Any, batch: Any, *_: Any) -> int:
        return len(params["factor"]) * min(math.ceil(len(batch) / TASKS_PER_BLOCK), MAX_PARTS)

    changes: list[tuple[Any, str, Callable[..., int]]] = [
        (Kernel, "_call", of_mlp),
        (HeadKernel, "step", of_head),
        *(
            (where, "side_by_side", lambda function, items: len(items))
            for where in (pieces, conv, building, judging)
        ),
    ]
    for where, what, n_blocks in changes:
        setattr(where, what, noting(getattr(where, what), n_blocks))
    start = time.process_time()
    run()
    whole = time.process_time() - start
    serial = whole - parted[1]
    print(json.dumps([whole, serial / whole, *(whole / (serial + parted[n]) for n in THREADS)]))


def measure(name: str) -> None:
    """Run once to warm up, then print the wall time of another run."""
    run = prepared(name)
    run()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]))


def results(action: str, name: str, threads: int) -> list[float]:
    """What a process of its own prints with so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, __file__, f"--{action}", name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", help="rows, separated by commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument(
        "--model", nargs="?", const="all", help="what CPU times say of more threads"
    )
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    if args.model not in (None, "all"):
        model(args.model)
        return
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    only = None if args.only is None else args.only.split(",")
    if args.model:
        print(f"{'':14s}{'CPU s':>8s}{'serial':>8s}" + "".join(f"{n:8d}" for n in THREADS))
        for name in ("W1", "W2", "W3", "W4", "default fit"):
            if only is None or name in only:
                cpu, serial, *faster = results("model", name, 2)
                columns = "".join(f"{x:8.2f}" for x in faster)
                print(f"{name:14s}{cpu:8.2f}{serial:8.1%}{columns}", flush=True)
        return
    print(f"{'':14s}{'one, wall s':>12s}{'two, wall s':>12s}{'times faster':>14s}{'CPU':>7s}")
    pairs = {name: ((name, 1), (name, 2)) for name in ("W1", "W2", "W3", "W4", "default fit")}
    pairs["search"] = (("search, n_jobs=1", 1), ("search, n_jobs=2", 2))
    for title, (one, two) in pairs.items():
        if only is not None and title not in only:
            continue
        found = [(results("measure", *one), results("measure", *two)) for _ in range(args.turns)]
        wall = [statistics.median(turn[k][0] for turn in found) for k in (0, 1)]
        faster = statistics.median(turn[0][0] / turn[1][0] for turn in found)
        cpu = statistics.median(turn[1][1] / turn[0][1] for turn in found)
        of_cpu = f"{cpu:7.2f}" if title != "search" else ""  # that of children is not counted
        print(f"{title:14s}{wall[0]:12.2f}{wall[1]:12.2f}{faster:14.2f}{of_cpu}", flush=True)


if __name__ == "__main__":
    main()
