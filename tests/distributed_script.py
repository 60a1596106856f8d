"""Meta-trains in each process of a group; run by test_distributed.py with torchrun.

Usage: distributed_script.py FOLDER; writes what each rank ended with to FOLDER/rankN.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from sklearn.model_selection import GridSearchCV, GroupKFold
from skorch.callbacks import Callback, EpochScoring

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.exceptions import InterruptedFitWarning
from sklearn_maml.training import distributed

SETTINGS = {
    "hidden_layer_sizes": (8,),
    "update_rule": "sgd",
    "steps": 2,
    "alpha": 0.05,
    "meta_batch_size": 5,
    "max_iter": 60,
}


def tasks(dtype):
    X, y, task = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
    ragged = np.flatnonzero(np.arange(len(X)) % 20 < 8 + task % 12)
    return X[ragged].astype(dtype), y[ragged].astype(dtype), task[ragged]


def regressor(**changed):
    return MAMLRegressor(**{**SETTINGS, "random_state": 0, **changed})


class RaiseOn(Callback):
    """Raises in one process, after some updates."""

    def __init__(self, rank, error):
        self.rank, self.error = rank, error
        self.seen = 0

    def on_batch_end(self, net, **kwargs):
        self.seen += 1
        if self.seen == 7 and dist.is_initialized() and dist.get_rank() == self.rank:
            interrupt(self.error)


def interrupt(error):  # not in a method named on_*: skorch's way for a callback to stop a fit
    raise error


def outcome(model):
    return {
        "state": {name: p.clone() for name, p in model._learner.state_dict().items()},
        "losses": [
            [epoch.get(f"{name}_loss") for name in ("train", "valid")] for epoch in model.history_
        ],
        "n_iter": model.n_iter_,
    }


def fits():
    """Outcome of fits that do not depend on the number of processes."""
    X, y, task = tasks(np.float64)
    found = {"float64": outcome(regressor().fit(X, y, groups=task))}
    # one step of rate 1: the parameters are the initial ones less the meta-gradient
    descent = {"optimizer": "sgd", "beta": 1.0, "beta_decay": 0.0, "max_iter": 1}
    found["gradient"] = outcome(regressor(**descent).fit(X, y, groups=task))
    found["early stopping"] = outcome(
        regressor(
            early_stopping=True, n_iter_no_change=1, max_iter=400, beta=0.05, beta_decay=0.0
        ).fit(X, y, groups=task)
    )
    # more processes than tasks in a batch; scores need the outputs of all of them
    scoring = EpochScoring("neg_mean_squared_error", on_train=True, name="score")
    one = regressor(meta_batch_size=1, callbacks=[scoring], max_iter=20).fit(X, y, groups=task)
    found["one task"] = {**outcome(one), "score": one.history_[:, "score"]}
    search = GridSearchCV(regressor(task_column=1, max_iter=3), {"steps": [0, 2]}, cv=GroupKFold(2))
    found["search"] = outcome(search.fit(np.c_[X, task], y, groups=task).best_estimator_)
    X32, y32, _ = tasks(np.float32)
    found["float32"] = outcome(regressor(max_iter=20).fit(X32, y32, groups=task))
    continued = regressor(max_iter=10, warm_start=True).fit(X, y, groups=task)
    found["warm start"] = outcome(continued.fit(X, y, groups=task))
    for name in ("implicit", "reptile"):
        other = regressor(meta_gradient=name, max_iter=10)
        found[name] = outcome(other.fit(X, y, groups=task))
    clf = MAMLClassifier(**{**SETTINGS, "max_iter": 10}, n_ways=2, n_shots=2, random_state=0)
    pool = np.hstack([X, y[:, None]]), (y > 0) + 2 * (X[:, 0] > 0)
    found["classifier"] = outcome(clf.fit(*pool))
    found["zero head"] = outcome(clf.set_params(head="zero").fit(*pool))
    found["centred"] = outcome(regressor(center_y=True, max_iter=10).fit(X, y, groups=task))
    return found


def shared_only(rank):
    """Outcome of fits whose contract is about several processes."""
    X, y, task = tasks(np.float64)
    found = {}
    np.random.seed(rank)
    found["no seed"] = outcome(regressor(random_state=None, max_iter=3).fit(X, y, groups=task))
    with distributed.single_process():
        found["alone"] = outcome(regressor(random_state=rank, max_iter=3).fit(X, y, groups=task))
    other = {
        "data": (regressor(), X + rank),
        "seed": (regressor(random_state=rank), X),
        "seed of one": (regressor(random_state=rank or None), X),
        "parameter": (regressor(alpha=0.01 + rank), X),
        "weights": (regressor(module=module(rank)), X),
    }
    for name, (model, rows) in other.items():
        try:
            model.fit(rows, y, groups=task)
        except ValueError as error:
            found[name] = str(error)
    stopped = regressor(
        callbacks=[RaiseOn(1, KeyboardInterrupt())], early_stopping=False, warm_start=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stopped.fit(X, y, groups=task)
    found["interrupted"] = outcome(stopped)
    found["warned"] = [w.category is InterruptedFitWarning for w in caught]
    found["continued"] = outcome(stopped.set_params(callbacks=None).fit(X, y, groups=task))
    failing = regressor(callbacks=[RaiseOn(1, ZeroDivisionError("a broken callback"))])
    try:
        failing.fit(X, y, groups=task)
    except (RuntimeError, ZeroDivisionError) as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    found["after failure"] = outcome(regressor(max_iter=3).fit(X, y, groups=task))
    combine = distributed.Processes.reduce
    distributed.Processes.reduce = lambda self, values, *how: (
        None if values.is_floating_point() else combine(self, values, *how)
    )
    found["not averaged"] = outcome(regressor(max_iter=3).fit(X, y, groups=task))
    distributed.Processes.reduce = combine
    return found


def module(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    found = {**fits(), **shared_only(rank)}
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
