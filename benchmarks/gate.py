"""Whether this checkout is slower than another one: `make bench-gate ARGS="--against FOLDER"`.

    python benchmarks/gate.py --against FOLDER [--limit 1.02] [--turns 5] [--only W1,W2]

FOLDER is a checkout of the repository, such as `git worktree add FOLDER main` makes. Each run is a
process of its own, with the package of one of the two; they take turns, and a ratio is the median
over the turns of the CPU time here to that there, on one thread, imports left out. The kernels of
both are built first, and the first turn is not counted. The exit status is 1 if a ratio is above
the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def linear_tasks(
    n_tasks: int = 100, n_rows: int = 20, n_features: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tasks whose slopes differ, with noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks, n_rows, n_features)).astype(np.float32)
    slopes = rng.normal(size=(n_tasks, 1, n_features)) * np.linspace(1, 0.1, n_features)
    y = (X * slopes).sum(2) + 0.3 * rng.normal(size=(n_tasks, n_rows))
    return X, y.astype(np.float32)


def default_regressor() -> Callable[[], object]:
    from sklearn_maml import MAMLRegressor

    X, y = linear_tasks()
    return lambda: MAMLRegressor(random_state=0).fit(X, y)


def default_classifier() -> Callable[[], object]:
    from sklearn_maml import MAMLClassifier

    X, y = linear_tasks()
    labels = np.digitize(y, [-0.7, 0.7])
    return lambda: MAMLClassifier(random_state=0).fit(X, labels)


def default_two_classes() -> Callable[[], object]:
    from sklearn_maml import MAMLClassifier

    X, y = linear_tasks()
    return lambda: MAMLClassifier(random_state=0).fit(X, y > 0)


def default_poisson() -> Callable[[], object]:
    from sklearn_maml import MAMLRegressor

    X, y = linear_tasks()
    counts = np.random.default_rng(1).poisson(np.exp(0.5 * y)).astype(np.float32)
    return lambda: MAMLRegressor(loss="poisson", random_state=0).fit(X, counts)


def videos() -> Callable[[], object]:
    """The collection that is shipped: 250 videos, 201 rows of 33 features each."""
    from sklearn.preprocessing import StandardScaler

    from sklearn_maml import MAMLRegressor
    from sklearn_maml.datasets import load_x264

    X, y, video = load_x264(return_X_y_groups=True)
    X = StandardScaler().fit_transform(X).astype(np.float32)
    return lambda: MAMLRegressor(random_state=0).fit(X, y, groups=video)


def sinusoids() -> Callable[[], object]:
    """Sinusoids as in MAML's paper, W1 of `benchmarks/run.py`."""
    from sklearn_maml import MAMLRegressor
    from sklearn_maml.datasets import make_sinusoid_tasks

    X, y, _ = make_sinusoid_tasks(n_tasks=1000, n_rows=20, random_state=0)
    X, y = X.reshape(1000, 20, 1).astype(np.float32), y.reshape(1000, 20).astype(np.float32)
    reg = MAMLRegressor(
        hidden_layer_sizes=(40, 40),
        update_rule="sgd",
        alpha=0.01,
        steps=1,
        meta_batch_size=25,
        n_shots=10,
        n_queries=10,
        max_iter=20_000,
        early_stopping=False,
        random_state=0,
    )
    return lambda: reg.fit(X, y)


def episodes() -> Callable[[], object]:
    """Five classes of each task, W2 of `benchmarks/run.py`."""
    from sklearn_maml import MAMLClassifier

    rng = np.random.default_rng(0)
    y = np.tile(np.repeat(np.arange(5), 20), (200, 1))
    centres = rng.normal(size=(200, 5, 20))
    X = centres[np.arange(200)[:, None], y] + 0.5 * rng.normal(size=(200, 100, 20))
    X = X.astype(np.float32)
    clf = MAMLClassifier(
        hidden_layer_sizes=(64, 64),
        update_rule="sgd",
        alpha=0.05,
        steps=5,
        meta_batch_size=32,
        n_ways=5,
        n_shots=5,
        n_queries=15,
        max_iter=1000,
        early_stopping=False,
        random_state=0,
    )
    return lambda: clf.fit(X, y)


def new_tasks() -> Callable[[], object]:
    """Adapting to 1,000 tasks and predicting each, 150 times over."""
    from sklearn_maml import MAMLRegressor

    X, y = linear_tasks(1000)
    reg = MAMLRegressor(update_rule="sgd", alpha=0.03, steps=5, max_iter=50, random_state=0)
    reg.fit(X[:100], y[:100])

    def adapt() -> None:
        for _ in range(150):
            reg.adapt(X[:, :10], y[:, :10]).predict(X[:, 10:])

    return adapt


# name: what prepares the work and returns it
WORKLOADS: dict[str, Callable[[], Callable[[], object]]] = {
    "default": default_regressor,
    "default classifier": default_classifier,
    "default two classes": default_two_classes,
    "default poisson": default_poisson,
    "default x264": videos,
    "W1": sinusoids,
    "W2": episodes,
    "adapt": new_tasks,
}


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def child(name: str) -> None:
    """Run one workload, and print where its package is and how long it took."""
    import sklearn_maml

    work = WORKLOADS[name]()
    start = cpu_seconds()
    work()
    print(json.dumps([str(Path(sklearn_maml.__file__).parent.parent), cpu_seconds() - start]))


def measure(name: str, checkout: Path) -> float:
    """CPU seconds of one workload in a process of its own."""
    env = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    arguments = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    done = subprocess.run(arguments, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found, seconds = json.loads(done.stdout.splitlines()[-1])
    if Path(found) != checkout:
        raise SystemExit(f"sklearn_maml was imported from {found}; expected {checkout}.")
    return float(seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    parser.add_argument("--limit", type=float, default=1.02, help="largest ratio that passes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", help="names of workloads, with commas")
    parser.add_argument("--child", choices=WORKLOADS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child)
        return 0
    names = options.only.split(",") if options.only else list(WORKLOADS)
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"--only has {sorted(unknown)}; expected some of {list(WORKLOADS)}")
    if options.against is None or not (options.against / "sklearn_maml").is_dir():
        parser.error(f"--against has to be a checkout of sklearn_maml; got {options.against}")

    checkouts = [ROOT, options.against.resolve()]
    for checkout in checkouts:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=checkout, check=True)
    slower = []
    print(f"{'':20s}{'here s':>9s}{'there s':>9s}{'ratio':>8s}{'from':>8s}{'to':>7s}")
    for name in names:
        turns = []
        for turn in range(-1, options.turns):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            seconds = {i: measure(name, checkouts[i]) for i in order}
            if turn >= 0:
                turns.append((seconds[0], seconds[1]))
        ratios = sorted(here / there for here, there in turns)
        ratio = statistics.median(ratios)
        here, there = (statistics.median(times) for times in zip(*turns, strict=True))
        print(
            f"{name:20s}{here:9.2f}{there:9.2f}{ratio:8.3f}{ratios[0]:8.3f}{ratios[-1]:7.3f}",
            flush=True,
        )
        if ratio > options.limit:
            slower.append(name)
    if slower:
        print(f"above {options.limit}: {', '.join(slower)}", file=sys.stderr)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
