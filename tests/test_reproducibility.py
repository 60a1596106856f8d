"""The same random_state gives the same bits, whatever else the process has done or is doing."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import warnings

import joblib
import numpy as np
import pytest
import sklearn
import torch
from networks import Dropped
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import ThreadpoolController, threadpool_limits
from torch import nn

from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    task_scorer,
)
from sklearn_maml.datasets import SinusoidTasks
from sklearn_maml.learners import building
from sklearn_maml.learners.head_trainer import HeadTrainer
from sklearn_maml.threads import one_thread, one_thread_for_arrays

N_TASKS, N_ROWS = 12, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(N_TASKS * N_ROWS, 4)).astype(np.float32)
G = np.repeat([f"shop {j}" for j in range(N_TASKS)], N_ROWS)
Y = X[:, 0] * np.repeat(rng.normal(size=N_TASKS), N_ROWS) + 1
C = np.array(["sit", "run", "hop", "lie"])[np.arange(len(X)) % 4]
SMALL = {
    "hidden_layer_sizes": (5,),
    "update_rule": "sgd",
    "steps": 2,
    "max_iter": 6,
    "meta_batch_size": 4,
}


def convolutions(n_outputs):
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, n_outputs),
    )


# what a seed decides: initial weights, held-out tasks, episodes, dropout, splits of a score
FITS = {
    "regressor": lambda s: MAMLRegressor(**SMALL, random_state=s).fit(X, Y, groups=G),
    "classifier": lambda s: MAMLClassifier(**SMALL, random_state=s).fit(X, C, groups=G),
    "ways": lambda s: MAMLClassifier(
        **SMALL, n_ways=2, n_shots=1, n_queries=1, early_stopping=False, random_state=s
    ).fit(X, C, groups=G),
    "pool": lambda s: MAMLClassifier(
        **SMALL, n_ways=2, n_shots=2, early_stopping=False, random_state=s
    ).fit(X, C),
    "early stopping": lambda s: MAMLRegressor(
        **SMALL, early_stopping=True, validation_fraction=0.3, random_state=s
    ).fit(X, Y, groups=G),
    "dropout": lambda s: MAMLRegressor(**SMALL, module=Dropped, random_state=s).fit(X, Y, groups=G),
    "convolutions": lambda s: MAMLRegressor(
        **SMALL, module=seeded_convolutions(s), random_state=s
    ).fit(X, Y, groups=G),
    "learned rates": lambda s: MAMLRegressor(
        **{**SMALL, "update_rule": "meta-sgd"}, random_state=s
    ).fit(X, Y, groups=G),
    "reptile": lambda s: MAMLRegressor(
        **SMALL, meta_gradient="reptile", random_state=s
    ).fit(X, Y, groups=G),
    "distribution": lambda s: MAMLRegressor(**SMALL, random_state=s).fit(SinusoidTasks()),
    "generator": lambda s: MAMLRegressor(
        **SMALL, random_state=np.random.RandomState(s)
    ).fit(X, Y, groups=G),
    "one task": lambda s: MAMLRegressor(**SMALL, random_state=s).fit(X, Y),
    "no prior": lambda s: FewShotRegressor(steps=5, random_state=s).fit(X, Y).model_,
}  # fmt: skip


def seeded_convolutions(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return convolutions(1)


def digest(name, seed=0):
    """Hash of all that a fit has learned, and of predictions and a score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FITS[name](seed)
    mark = hashlib.sha256()
    for parameter in model._learner.state_dict().values():
        mark.update(parameter.numpy().tobytes())
    if name == "distribution":
        rows, targets = SinusoidTasks().sample(1, random_state=3)[0]
    else:
        rows = X[:N_ROWS]
        targets = C[:N_ROWS] if isinstance(model, MAMLClassifier) else Y[:N_ROWS]
        if model.get_params().get("n_ways"):
            rows, targets = rows[:2], targets[:2]
    mark.update(adapt(model, rows, targets).predict(rows).tobytes())
    if name not in ("distribution", "no prior", "one task", "ways", "pool"):
        labels = C if isinstance(model, MAMLClassifier) else Y
        mark.update(repr(model.score(X, labels, groups=G)).encode())
    return mark.hexdigest()


@pytest.fixture(scope="module")
def digests():
    return {name: digest(name) for name in FITS}


@pytest.mark.parametrize("name", FITS)
def test_another_seed_gives_other_results(name, digests):
    assert digest(name, seed=1) != digests[name]


def test_the_seed_decides_whatever_was_fitted_before_and_however_globals_are_seeded(digests):
    order = list(FITS)
    for turn in range(2):
        random.Random(turn).shuffle(order)
        for name in order:
            torch.manual_seed(turn)
            np.random.seed(turn)
            random.seed(turn)
            before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
            assert digest(name) == digests[name], name
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.array_equal(np.random.get_state()[1], before[1])
            assert random.getstate() == before[2]


def test_processes_agree_whatever_their_hash_seed(digests):
    folder = os.path.dirname(__file__)
    paths = [folder, os.path.dirname(folder), os.environ.get("PYTHONPATH", "")]
    runs = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    expected = [f"{name}: {mark}" for name, mark in digests.items()]
    hashes = set()
    for run in runs:
        first, *found = run.communicate()[0].splitlines()
        assert run.returncode == 0
        assert found == expected
        hashes.add(first)
    assert len(hashes) == 2  # strings do hash differently in the two


@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_workers_give_the_bits_of_one_process(backend):
    rows = np.column_stack([X, np.unique(G, return_inverse=True)[1]])
    columns = {"task_column": 4, "random_state": 0}
    regressor = MAMLRegressor(**SMALL, **columns)
    grid = {"mamlregressor__alpha": [0.01, 0.1], "mamlregressor__steps": [1, 3]}
    prior = MAMLClassifier(**SMALL, random_state=0).fit(X, C, groups=G)
    dropped = MAMLRegressor(**SMALL, module=Dropped, **columns)

    def results(n_jobs):
        options = {"n_jobs": n_jobs, "cv": GroupKFold(3)}
        folds = {"groups": G, **options}
        yield cross_val_score(regressor, rows, Y, **folds)
        yield cross_val_score(dropped, rows, Y, **folds)
        yield cross_val_score(MAMLClassifier(**SMALL, **columns), rows, C, **folds)
        scorer = task_scorer("neg_mean_absolute_error", n_shots=3, n_repeats=2)
        yield cross_val_score(regressor, rows, Y, scoring=scorer, **folds)
        yield cross_val_score(FewShotClassifier(prior), X, C, cv=4, n_jobs=n_jobs)
        with sklearn.config_context(enable_metadata_routing=True):
            pipe = make_pipeline(StandardScaler(), MAMLRegressor(**SMALL, random_state=0))
            search = GridSearchCV(pipe, grid, **options).fit(X, Y, groups=G)
        yield search.cv_results_["mean_test_score"]
        yield adapt(search, X[:5], Y[:5]).predict(X)

    with warnings.catch_warnings(), joblib.parallel_config(backend):
        warnings.simplefilter("ignore")
        for found, expected in zip(results(2), results(1), strict=True):
            assert len(np.unique(expected)) > 1
            np.testing.assert_array_equal(found, expected)


def threads_of_arrays():
    return {p["num_threads"] for p in ThreadpoolController().select(user_api="blas").info()}


@pytest.fixture
def n_threads():
    """Set the number of threads; it is that of the process, which gets its own back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("model", "targets"), [(MAMLRegressor, Y), (MAMLClassifier, C)])
def test_members_start_and_are_judged_side_by_side_with_the_bits_of_one_thread(
    model, targets, n_threads, monkeypatch
):
    seen = []

    def noted(function):
        def note(*args, **kwargs):
            seen.append((threading.get_ident(), max(threads_of_arrays())))
            return function(*args, **kwargs)

        return note

    for name in ("start_of_numbers", "start_of_classes"):
        monkeypatch.setattr(building, name, noted(getattr(building, name)))
    monkeypatch.setattr(HeadTrainer, "predictive", noted(HeadTrainer.predictive))

    def fitted():
        reg = model(max_iter=2, hidden_layer_sizes=(5,), random_state=0)
        return reg.fit(X, targets, groups=G)

    n_threads(1)
    one = fitted()
    here = threading.get_ident()
    assert {ident for ident, _ in seen} == {here}
    seen.clear()
    n_threads(3)
    three = fitted()
    assert here not in {ident for ident, _ in seen}
    assert {limit for _, limit in seen[:5]} == {1}
    for name, value in one.module_.state_dict().items():
        assert torch.equal(value, three.module_.state_dict()[name])
    for name, value in vars(one.calibration_).items():
        np.testing.assert_array_equal(value, getattr(three.calibration_, name))


def test_a_limit_of_arrays_ends_with_the_thread_that_was_first():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with one_thread(), one_thread_for_arrays():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with threadpool_limits(2, user_api="blas"):
        with one_thread_for_arrays(), one_thread_for_arrays():
            thread.start()
            assert inside.wait(10)
            assert threads_of_arrays() == {1}
        assert threads_of_arrays() == {2}
        leave.set()
        thread.join()
        assert threads_of_arrays() == {2}


def test_only_the_order_of_task_ids_matters():
    """Tasks are taken in the order of their ids; the ids themselves play no part."""
    expected = MAMLRegressor(**SMALL, random_state=0).fit(X, Y, groups=G)
    numbers = np.unique(G, return_inverse=True)[1]
    for ids in (numbers, numbers * 3.5 - 7, [f"{n:03}" for n in numbers], numbers + 2**40):
        found = MAMLRegressor(**SMALL, random_state=0).fit(X, Y, groups=ids)
        for p, q in zip(found._learner.parameters(), expected._learner.parameters(), strict=True):
            assert torch.equal(p, q)
        assert found.score(X, Y, groups=ids) == expected.score(X, Y, groups=G)
    other = MAMLRegressor(**SMALL, random_state=0).fit(X, Y, groups=-numbers)
    assert not torch.equal(other.module_[0].weight, expected.module_[0].weight)


if __name__ == "__main__":
    sys.stdout.write(f"{hash('a')}\n")
    for name in FITS:
        sys.stdout.write(f"{name}: {digest(name)}\n")
