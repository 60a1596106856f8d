"""What one request costs: adapting to ten rows, predicting a few, beside a ridge regression.

    python benchmarks/serving.py [--clients 8] [--requests 200]

CPU time of each call, the least over many short rounds in which all take turns, on one thread. With
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


def seconds_of(calls):
    """Least CPU time of each call; all take turns, so that other work is fair to all."""
    least = dict.fromkeys(calls, np.inf)
    for _ in range(ROUNDS):
        for name, (call, _) in calls.items():
            call()
            start = time.process_time()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.process_time() - start) / CALLS)
    return least


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
