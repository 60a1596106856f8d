"""Adapt to 20,000 tasks in a frame of 1,000,000 rows, in memory that the tasks do not fill.

    python examples/million_rows.py [--tasks 5000,10000,20000] [--rows 50] [--at-once] [--jobs N]

Each size runs in a process of its own. Printed are the size of the frame, the CPU seconds, and how
far the resident memory of the process rose above where it was before (it then held the frame, the
fitted model and torch). `--at-once` adapts to all tasks in one call instead of in partitions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sklearn_maml import MAMLRegressor, adapt, adapt_predict

FEATURES = [f"x{j}" for j in range(8)]
SUPPORT = 10  # labelled rows of each task


def make_frame(n_tasks: int, n_rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """Rows of tasks that share a shape, and differ in its weights, in a random order."""
    task = rng.permutation(np.repeat(np.arange(n_tasks), n_rows))
    frame = pd.DataFrame(rng.normal(size=(len(task), 8)).astype(np.float32), columns=FEATURES)
    weights = rng.normal(size=(n_tasks, 8)).astype(np.float32)
    frame["y"] = np.tanh((frame[FEATURES].to_numpy() * weights[task]).sum(1))
    frame["shop"] = np.array([f"shop {j}" for j in range(n_tasks)], dtype=object)[task]
    return frame


class PeakMemory:
    """Largest resident memory of this process during a block, above that at its start, in MB."""

    def __enter__(self) -> PeakMemory:
        self.start = self.most = resident()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, resident())

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self.grown = self.most - self.start


def resident() -> float:
    """Resident memory of this process in MB; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 / 1e6 if statm.exists() else 0.0


def measure(n_tasks: int, n_rows: int, at_once: bool, jobs: int | None) -> None:
    rng = np.random.default_rng(0)
    known = make_frame(100, 30, rng)
    reg = MAMLRegressor(task_column="shop", max_iter=50, random_state=0)
    reg.fit(known.drop(columns="y"), known["y"])
    # the first use of torch allocates its own
    adapt(reg, known.drop(columns="y"), known["y"]).predict(known.drop(columns="y"))

    frame = make_frame(n_tasks, n_rows, rng)
    support = frame.groupby("shop").cumcount() < SUPPORT
    y_support, y_query = frame.loc[support, "y"], frame.loc[~support, "y"].to_numpy()
    del frame["y"]
    X_support, X_query = frame[support], frame[~support]
    del frame
    size = sum(part.memory_usage(deep=True).sum() for part in (X_support, X_query)) / 1e6
    start = time.process_time()
    with PeakMemory() as peak:
        if at_once:
            predicted = adapt(reg, X_support, y_support).predict(X_query)
        else:
            predicted = adapt_predict(reg, X_support, y_support, X_query, n_jobs=jobs)
    seconds = time.process_time() - start
    error = np.sqrt(np.mean((predicted - y_query) ** 2))
    print(
        f"{n_tasks:8d} {n_tasks * n_rows:10d} {size:9.0f} {predicted.nbytes / 1e6:10.1f} "
        f"{peak.grown:10.0f} {seconds:8.1f} {error:7.3f}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default="5000,10000,20000")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--at-once", action="store_true")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args(arguments)
    sizes = [int(n) for n in options.tasks.split(",")]
    print("   tasks       rows  frame MB  result MB  above, MB    CPU s    RMSE", flush=True)
    for n_tasks in sizes:
        settings = (n_tasks, options.rows, options.at_once, options.jobs)
        # memory that an earlier size freed would hide what a later one takes
        process = multiprocessing.get_context("spawn").Process(target=measure, args=settings)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
