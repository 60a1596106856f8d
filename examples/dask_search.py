"""A search, and the adaptation to thousands of tasks, on the workers of a Dask cluster.

    python examples/dask_search.py [--workers 2]

A cluster of processes on this machine stands for one of many machines: give `Client` the address
of its scheduler instead. Needs the package ``distributed``.
"""

from __future__ import annotations

import argparse

import joblib
import numpy as np
from distributed import Client, LocalCluster
from sklearn.model_selection import GridSearchCV, GroupKFold

from sklearn_maml import MAMLRegressor, adapt_predict
from sklearn_maml.datasets import make_sinusoid_tasks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)

    X, y, task = make_sinusoid_tasks(n_tasks=100, n_rows=20, random_state=0)
    X = np.column_stack([X, task])
    search = GridSearchCV(
        MAMLRegressor(task_column=1, update_rule="sgd", max_iter=30, random_state=0),
        {"alpha": [0.01, 0.1], "steps": [1, 5]},
        cv=GroupKFold(3),
    )
    X_new, y_new, shop = make_sinusoid_tasks(n_tasks=3000, n_rows=20, random_state=1)
    X_new = np.column_stack([X_new, shop])
    support = np.arange(len(X_new)) % 20 < 10

    def adapt_all() -> np.ndarray:
        return adapt_predict(
            search.best_estimator_, X_new[support], y_new[support], X_new[~support]
        )

    serial_scores = search.fit(X, y, groups=task).cv_results_["mean_test_score"]
    serial = adapt_all()
    with (
        LocalCluster(
            n_workers=options.workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster),
        joblib.parallel_config("dask"),
    ):
        scores = search.fit(X, y, groups=task).cv_results_["mean_test_score"]
        predicted = adapt_all()
    print(f"search: best parameters {search.best_params_}, R^2 {search.best_score_:.3f}")
    print(f"search: scores equal to the serial ones: {np.array_equal(scores, serial_scores)}")
    print(f"adaptation: {len(np.unique(shop)):,} tasks, {len(predicted):,} rows predicted")
    print(f"adaptation: predictions equal to the serial ones: {np.array_equal(predicted, serial)}")


if __name__ == "__main__":
    main()
