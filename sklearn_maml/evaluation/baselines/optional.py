"""Baselines of packages that may not be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sklearn_maml.evaluation.baselines.base import Baseline, Episode, Predicted, TrainingTasks
from sklearn_maml.evaluation.baselines.per_task import PerTask


class GPBoost(Baseline):
    """Boosting with a random intercept of each task (Sigrist 2022), by the package gpboost.

    It knows the tasks that it was trained on: for each number of support rows it is trained on
    those of the held-out tasks, too.
    """

    ROUNDS, RATE = 200, 0.05

    def fit(self, train: TrainingTasks) -> Any:
        """Keep the rows: training waits for the support rows."""
        super().fit(train)
        self.train_ = train
        return self

    def predict(self, episodes: Sequence[Episode], k: int) -> list[Predicted]:
        """Train, with the support rows, and predict."""
        import gpboost

        train = self.train_
        first = int(train.task.max()) + 1
        own = [np.full(len(e.y_support), first + j) for j, e in enumerate(episodes)]
        X = np.concatenate([train.X, *(e.X_support for e in episodes)])
        y = np.concatenate([train.y, *(e.y_support for e in episodes)])
        task = np.concatenate([train.task, *own])
        model = gpboost.GPModel(group_data=task, likelihood="gaussian")
        booster = gpboost.train(
            params={"learning_rate": self.RATE, "verbose": -1, "seed": train.seed % 2**31},
            train_set=gpboost.Dataset(X, y),
            gp_model=model,
            num_boost_round=self.ROUNDS,
        )
        query = np.concatenate([e.X_query for e in episodes])
        of_query = np.repeat(first + np.arange(len(episodes)), [len(e.X_query) for e in episodes])
        found = booster.predict(
            data=query, group_data_pred=of_query, predict_var=True, pred_latent=False
        )
        mean, std = found["response_mean"], np.sqrt(found["response_var"])
        cuts = np.cumsum([len(e.X_query) for e in episodes])[:-1]
        return list(zip(np.split(mean, cuts), np.split(std, cuts), strict=True))


def make_tabpfn(classification: bool) -> PerTask:
    """TabPFN on the support rows of each task, by the package tabpfn."""
    import tabpfn

    kind = tabpfn.TabPFNClassifier if classification else tabpfn.TabPFNRegressor
    return PerTask(lambda n: kind())
