"""Sinusoid regression (Finn et al. 2017, section 5.1): error before and after adaptation.

    python benchmarks/sinusoid.py [--updates 20000] [--shots 10] [--seeds 0,1] [--set name=value]

The protocol of the paper: amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5], one inner step of rate
0.01 on K rows in meta-training; every update draws fresh tasks. All other parameters are the
library's defaults unless named with --set. The error is the mean squared error on 100 query rows of
1,000 fresh tasks; the interval is 1.96 standard errors over tasks, of one meta-training.
"""

from __future__ import annotations

import argparse
import ast
import time
from typing import Any

import numpy as np

from sklearn_maml import MAMLRegressor
from sklearn_maml.datasets import SinusoidTasks

N_TASKS, N_QUERIES = 1000, 100
ADAPT_STEPS = (0, 1, 5, 10)
# published with 70,000 updates of a 40-40 network; K=10 is not in the paper's table
PUBLISHED = {5: "paper, K=5, 70,000 updates: .67 / .38 / .35 after 1 / 5 / 10 steps"}


def parse_options(items: list[str]) -> dict[str, Any]:
    """``name=value`` pairs as parameters; values are Python literals or strings."""
    options: dict[str, Any] = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def task_errors(reg: MAMLRegressor, shots: int, adapt_steps: int, seed: int) -> np.ndarray:
    """Mean squared error on the query rows of each of 1,000 fresh tasks."""
    tasks = SinusoidTasks(n_rows=shots + N_QUERIES).sample(N_TASKS, random_state=90_000 + seed)
    X, y = (np.stack([task[part] for task in tasks]) for part in (0, 1))
    reg.set_params(adapt_steps=adapt_steps).adapt(X[:, :shots], y[:, :shots])
    return ((reg.predict(X[:, shots:]) - y[:, shots:]) ** 2).mean(1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over tasks, and half of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def meta_train(shots: int, seed: int, **settings: Any) -> tuple[MAMLRegressor, list[str], float]:
    """Meta-train once; returns the errors after `ADAPT_STEPS`, and seconds of CPU, too."""
    settings = {"update_rule": "sgd", "steps": 1, "alpha": 0.01, **settings}
    reg = MAMLRegressor(n_shots=shots, random_state=seed, **settings)
    cpu = time.process_time()
    # as many rows as an episode of the training needs
    reg.fit(SinusoidTasks(n_rows=shots + (reg.n_queries or N_QUERIES)))
    cpu = time.process_time() - cpu
    found = [interval(task_errors(reg, shots, steps, seed)) for steps in ADAPT_STEPS]
    return reg, [f"{mean:6.3f} ± {half:.3f}" for mean, half in found], cpu


def run(meta_gradient: str, updates: int, shots: int, seed: int, options: dict[str, Any]) -> None:
    """Print a row."""
    settings = {"meta_gradient": meta_gradient, "max_iter": updates, **options}
    reg, cells, cpu = meta_train(shots, seed, **settings)
    print(
        f"{settings['meta_gradient']:14s} {shots:3d} {seed:5d} {reg.n_iter_:8d}   "
        + "   ".join(cells)
        + f"   {cpu:5.0f} s CPU",
        flush=True,
    )


def main() -> None:
    """Print a row for each meta-gradient, number of shots and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--shots", default="10", help="support rows, for example 5,10,20")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--meta-gradients", default="second-order,first-order")
    parser.add_argument("--set", action="append", default=[], help="parameter=value")
    args = parser.parse_args()
    options = parse_options(args.set)
    shown = {"steps": 1, "alpha": 0.01, **options}
    print("sinusoids, MSE (± 1.96 SE over 1,000 tasks) after so many inner steps; " + str(shown))
    header = "   ".join(f"{s:6d} step{'s' if s != 1 else ' '} " for s in ADAPT_STEPS)
    print(f"{'meta-gradient':14s} {'K':>3s} {'seed':>5s} {'updates':>8s}   {header}    fit")
    all_shots = [int(k) for k in args.shots.split(",")]
    for shots in all_shots:
        for seed in (int(s) for s in args.seeds.split(",")):
            for meta_gradient in args.meta_gradients.split(","):
                run(meta_gradient, args.updates, shots, seed, options)
    for shots in all_shots:
        if shots in PUBLISHED:
            print(PUBLISHED[shots])


if __name__ == "__main__":
    main()
