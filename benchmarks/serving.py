"""What one request costs: adapting to ten rows, predicting a few, beside a ridge regression.

    python benchmarks/serving.py [--clients 8] [--requests 200]

CPU time of each call, the least over many short rounds in which all take turns, on one thread; then
of adapting to many tasks and predicting rows of them, with and without standard deviations. With
FastAPI and httpx installed, also concurrent clients, whose requests bring ten support rows and five
query rows as JSON: medians of the latency, and CPU time per request, the clients' own included. All
models are in one process and take turns.
"""

from __future__ import annotations

import argparse
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from sklearn.linear_model import Ridge

from sklearn_maml import MAMLRegressor, adapt
from sklearn_maml.datasets import make_sinusoid_tasks

SHOTS, QUERIES = 10, 5
ROUNDS, CALLS = 60, 10
# adapted tasks, their support rows, and rows that are predicted: of each task, or of all together
MANY = [(1, 10, "1"), (1, 100, "20"), (100, 20, "20 each"), (100, 50, "20 each")]
MANY += [(100, 50, "5 each"), (100, 100, "20 each"), (1000, 50, "5 each")]
MANY += [(10_000, 20, "1"), (10_000, 20, "50"), (10_000, 20, "5 each")]


def models(X, y, task):
    """Meta-fitted models by the names of their rules."""
    return {
        rule: MAMLRegressor(update_rule=rule, max_iter=100, random_state=0).fit(X, y, groups=task)
        for rule in ("sgd", "gaussian-head")
    }


def calls_of(X, y, fitted):
    """Calls to be timed, and which of ridge regression each is compared with."""
    support, one, many = (X[:SHOTS], y[:SHOTS]), X[:1], X[:100]
    ridge = Ridge().fit(*support)
    calls = {
        "ridge: fit": (lambda: Ridge().fit(*support), "ridge: fit"),
        "ridge: predict 1 row": (lambda: ridge.predict(one), "ridge: predict 1 row"),
        "ridge: predict 100 rows": (lambda: ridge.predict(many), "ridge: predict 100 rows"),
    }
    for name, model in fitted.items():
        own = adapt(model, *support)
        calls |= {
            f"{name}: adapt": (lambda m=model: adapt(m, *support), "ridge: fit"),
            f"{name}: predict 1 row": (lambda m=own: m.predict(one), "ridge: predict 1 row"),
            f"{name}: predict 100 rows": (
                lambda m=own: m.predict(many),
                "ridge: predict 100 rows",
            ),
        }
    return calls


def seconds_of(calls, rounds=ROUNDS, calls_a_round=CALLS):
    """Least CPU time of each call; all take turns, so that other work is fair to all."""
    least = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            call()
            start = time.process_time()
            for _ in range(calls_a_round):
                call()
            least[name] = min(least[name], (time.process_time() - start) / calls_a_round)
    return least


def cost_of_many(n_tasks, n_rows, asked, model, n_features=10):
    """Seconds of adapting to tasks of ten features, predicting, and predicting with deviations."""
    rng = np.random.default_rng(0)

    def rows(n):
        return rng.normal(size=(n, n_features))

    task = np.repeat(np.arange(n_tasks), n_rows)
    slopes, X = rng.normal(size=(n_tasks, n_features)), rows(n_tasks * n_rows)
    y = (X * slopes[task]).sum(1) + 0.1 * rng.normal(size=len(X))
    n = int(asked.split()[0])
    each = "each" in asked
    of_rows = np.repeat(np.arange(n_tasks), n) if each else rng.integers(n_tasks, size=n)
    query = rows(len(of_rows))
    calls = {
        "adapt": (lambda: model.adapt(X, y, groups=task), ""),
        "predict": (lambda: model.predict(query, groups=of_rows), ""),
        "std": (lambda: model.predict(query, groups=of_rows, return_std=True), ""),
    }
    work = n_tasks * (n_rows + n if each else n_rows)
    return seconds_of(calls, rounds=3 if work > 10_000 else 10, calls_a_round=1)


def print_many():
    """Print a line for each number of tasks and rows."""
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(1200, 10)), np.repeat(np.arange(60), 20)
    y = (X * rng.normal(size=(60, 10))[task]).sum(1) + 0.1 * rng.normal(size=1200)
    model = MAMLRegressor(update_rule="gaussian-head", max_iter=60, random_state=0)
    model.fit(X, y, groups=task)
    print("tasks  rows  predicted    adapt  predict  with std")
    for n_tasks, n_rows, asked in MANY:
        a, p, s = cost_of_many(n_tasks, n_rows, asked, model).values()
        print(
            f"{n_tasks:5d}{n_rows:6d}  {asked:8s}{1e3 * a:10.2f}{1e3 * p:9.2f}{1e3 * s:10.2f} ms"
            f"{s / p:7.1f} times"
        )


def latencies(X, y, fitted, n_clients, n_requests):
    """Median latency and CPU time a request of an application with concurrent clients."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()

    @app.post("/{name}")
    def answer(name: str, body: dict):
        support = np.array(body["X"]), np.array(body["y"])
        model = Ridge().fit(*support) if name == "ridge" else adapt(fitted[name], *support)
        return model.predict(np.array(body["query"])).tolist()

    rows = slice(SHOTS, SHOTS + QUERIES)
    body = {"X": X[:SHOTS].tolist(), "y": y[:SHOTS].tolist(), "query": X[rows].tolist()}
    found = {}
    with TestClient(app) as client, ThreadPoolExecutor(n_clients) as pool:

        def ask(name):
            start = time.perf_counter()
            assert client.post(f"/{name}", json=body).status_code == 200
            return time.perf_counter() - start

        for name in 3 * ["ridge", *fitted]:
            list(pool.map(ask, 4 * n_clients * [name]))
            start = time.process_time()
            seconds = list(pool.map(ask, n_requests * [name]))
            cpu = (time.process_time() - start) / n_requests
            found.setdefault(name, []).append((np.median(seconds), cpu))
    return found


def main() -> None:
    """Print a line for each call, and for each model of the application."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    X, y, task = make_sinusoid_tasks(n_tasks=100, n_rows=20, random_state=0)
    fitted = models(X, y, task)
    calls = calls_of(X, y, fitted)
    least = seconds_of(calls)
    for name, (_, beside) in calls.items():
        print(f"{name:34s}{1e6 * least[name]:8.0f} us {least[name] / least[beside]:7.1f} times")
    print_many()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the client's own parts
            found = latencies(X, y, fitted, args.clients, args.requests)
    except ImportError:
        print("latencies need: pip install fastapi httpx")
        return
    for k, what in enumerate(("p50", "CPU time")):
        for name, rounds in found.items():
            values = [measured[k] for measured in rounds]
            ratios = [a / b[k] for a, b in zip(values, found["ridge"], strict=True)]
            print(
                f"{f'{name}, {args.clients} clients, {what}':34s}"
                f"{' '.join(f'{1e3 * v:6.1f}' for v in values)} ms"
                f"{' '.join(f'{r:5.1f}' for r in ratios)} times"
            )


if __name__ == "__main__":
    main()
