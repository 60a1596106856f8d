"""CPU time and peak memory of a default fit as tasks, features and rows grow.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--turns 3] [--rows 5000000]

1. 100, 1,000 and 10,000 tasks of 20 rows and 10 features.
2. 100 tasks of 20 rows with 10, 100 and 400 features.
3. `--rows` rows in tasks of 100, memory-mapped, 10 features; then an Arrow table of the same.

Every fit is in a process of its own, and the processes take turns. Memory is what the resident set
of the process rose during `fit` (the kernel's high-water mark; Linux only), beside the size of X,
y and the task ids. What is memory-mapped counts as resident once it is read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

from sklearn_maml import MAMLRegressor

Cell = tuple[str, int, int, int]  # how rows are given, tasks, rows of each, features


def make(n_tasks: int, n_rows: int, n_features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tasks that share a curve along one direction and differ in slopes."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(n_tasks), n_rows)
    X = rng.standard_normal((len(task), n_features), dtype=np.float32)
    slopes = 1 + 0.5 * rng.standard_normal((n_tasks, 5), dtype=np.float32)
    y = (X[:, :5] * slopes[task]).sum(1) + np.sin(2 * X[:, 0])
    return X, y + 0.1 * rng.standard_normal(len(task), dtype=np.float32), task


def given(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `fit` and parameters for the data that `main` has left in a folder."""
    if kind == "arrow":
        import pyarrow as pa

        with pa.memory_map(str(folder / "data.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        y = table["y"].to_numpy()
        return {"X": table.drop_columns(["y"]), "y": y}, {"task_column": "task"}
    mode = "r" if kind == "mapped" else None
    X, y, task = (np.load(folder / f"{name}.npy", mmap_mode=mode) for name in ("X", "y", "task"))
    return {"X": X, "y": y, "groups": task}, {}


def high_water() -> float:
    """Largest resident memory of this process so far, in MB."""
    # not ru_maxrss, which begins with that of the process that started this one
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1]) / 1024


def measure(kind: str, folder: Path) -> None:
    """Fit, and print what it took."""
    small = make(20, 20, 5)
    MAMLRegressor(max_iter=2, random_state=0).fit(*small[:2], groups=small[2])
    data, parameters = given(kind, folder)
    before, start = high_water(), time.process_time()
    reg = MAMLRegressor(random_state=0, **parameters).fit(**data)
    seconds, grown = time.process_time() - start, high_water() - before
    print(json.dumps({"seconds": seconds, "grown": grown, "updates": reg.n_iter_}))


def run(kind: str, folder: Path) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def save(folder: Path, kind: str, n_tasks: int, n_rows: int, n_features: int) -> float:
    """Leave the data of a cell in a folder; return its size in MB."""
    X, y, task = make(n_tasks, n_rows, n_features)
    if kind == "arrow":
        import pyarrow as pa

        columns = {f"x{j}": X[:, j].copy() for j in range(n_features)}
        table = pa.table({**columns, "task": task, "y": y})
        with pa.ipc.new_file(str(folder / "data.arrow"), table.schema) as writer:
            writer.write_table(table)
    else:
        for name, values in (("X", X), ("y", y), ("task", task)):
            np.save(folder / f"{name}.npy", values)
    return (X.nbytes + y.nbytes + task.nbytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.folder)
        return
    versions = f"torch {torch.__version__}, scikit-learn {sklearn.__version__}"
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores")
    parts: list[tuple[int, list[Cell]]] = [
        (args.turns, [("array", n_tasks, 20, 10) for n_tasks in (100, 1_000, 10_000)]),
        (args.turns, [("array", 100, 20, n_features) for n_features in (10, 100, 400)]),
    ]
    if args.rows:
        large = [(kind, args.rows // 100, 100, 10) for kind in ("mapped", "arrow")]
        parts.append((1, large))
    for turns, cells in parts:
        print(f"\n{'':8s}{'tasks':>8s}{'rows':>11s}{'features':>10s}{'CPU s':>8s}", end="")
        print(f"{'ratio':>7s}{'data MB':>9s}{'grown MB':>10s}")
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder, str(k)) for k in range(len(cells))]
            sizes = []
            for place, cell in zip(places, cells, strict=True):
                place.mkdir()
                sizes.append(save(place, *cell))
            found = [
                [run(cell[0], place) for cell, place in zip(cells, places, strict=True)]
                for _ in range(turns)
            ]
        for k, (kind, n_tasks, n_rows, n_features) in enumerate(cells):
            seconds = statistics.median(turn[k]["seconds"] for turn in found)
            grown = statistics.median(turn[k]["grown"] for turn in found)
            ratio = statistics.median(turn[k]["seconds"] / turn[0]["seconds"] for turn in found)
            print(
                f"{kind:8s}{n_tasks:8,d}{n_tasks * n_rows:11,d}{n_features:10d}{seconds:8.2f}"
                f"{ratio:7.2f}{sizes[k]:9.1f}{grown:10.1f}"
            )


if __name__ == "__main__":
    main()
