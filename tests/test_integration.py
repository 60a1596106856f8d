"""Other people's libraries with our estimators; each is skipped where the library is missing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sklearn_maml import FewShotClassifier, MAMLClassifier, adapt, task_scores

pytestmark = pytest.mark.integration

SMALL = {
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 2,
    "hidden_layer_sizes": (8,),
    "max_iter": 5,
    "random_state": 0,
}


def unbalanced(seed=0, n_tasks=8, n_rows=20):
    """Tasks of two classes, one in four rows of the second; the last column is the task."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, 3))
    task = np.repeat(np.arange(n_tasks), n_rows)
    slope = rng.normal(size=(n_tasks, 3))
    value = (X * slope[task]).sum(1)
    edges = np.array([np.quantile(value[task == j], 0.75) for j in range(n_tasks)])
    return np.c_[X, task], np.where(value > edges[task], "yes", "no")


# -- imbalanced-learn ----------------------------------------------------------------------------


def test_samplers_of_imbalanced_learn_act_in_fit_only():
    sampling = pytest.importorskip("imblearn.over_sampling")
    pipeline = pytest.importorskip("imblearn.pipeline")
    X, y = unbalanced()
    x, z = unbalanced(1, 1)
    x[:, 3] = 99
    sampler = sampling.RandomOverSampler(random_state=0)
    maml = MAMLClassifier(**SMALL, task_column=3)
    pipe = pipeline.Pipeline([("sample", sampler), ("maml", maml)]).fit(X, y)
    assert pipe[-1].n_tasks_ == 8
    adapted = adapt(pipe, x[:10], z[:10])
    assert type(adapted) is pipeline.Pipeline
    expected = copy.copy(pipe[-1]).adapt(x[:10], z[:10])  # on the rows as they are
    assert_array_equal(adapted.predict_proba(x), expected.predict_proba(x))
    assert_array_equal(FewShotClassifier(pipe).fit(x[:10], z[:10]).predict(x), adapted.predict(x))
    X_new, y_new = unbalanced(2, 3)
    X_new[:, 3] += 50
    assert_array_equal(
        task_scores(pipe, X_new, y_new).after, task_scores(pipe[-1], X_new, y_new).after
    )


def test_balanced_bagging_adapts_every_member():
    ensemble = pytest.importorskip("imblearn.ensemble")
    X, y = unbalanced()
    x, z = unbalanced(1, 1)
    x[:, 3] = 99
    bag = ensemble.BalancedBaggingClassifier(
        MAMLClassifier(**SMALL, task_column=3), n_estimators=2, random_state=0
    ).fit(X, y)
    adapted = adapt(bag, x[:10], z[:10])
    numbers = (z[:10] == "yes").astype(int)
    parts = [copy.copy(m[-1]).adapt(x[:10], numbers).predict_proba(x) for m in bag.estimators_]
    assert_allclose(adapted.predict_proba(x), np.mean(parts, axis=0), rtol=1e-6)


def test_a_user_script_passes_pyright():
    pytest.importorskip("pyright")
    script = Path(__file__).with_name("typed_use.py")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=script.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout


# -- dask-ml -------------------------------------------------------------------------------------


# its test set is one of rows
@pytest.mark.filterwarnings(
    "ignore::sklearn_maml.exceptions.SeenTaskWarning",
    "ignore::sklearn_maml.exceptions.SmallTaskWarning",
)
def test_blocks_of_dask_are_learned_from_one_by_one():
    array = pytest.importorskip("dask.array")
    wrappers = pytest.importorskip("dask_ml.wrappers")
    search = pytest.importorskip("dask_ml.model_selection")
    distributed = pytest.importorskip("distributed")
    X, y = unbalanced(n_tasks=40)
    blocks = array.from_array(X, chunks=(200, 4)), array.from_array(y, chunks=200)
    maml = MAMLClassifier(**SMALL, task_column=3)
    classes = np.unique(y)
    with distributed.Client(processes=False, dashboard_address=None, n_workers=1):
        wrapped = wrappers.Incremental(maml, scoring=None, shuffle_blocks=False)
        wrapped.fit(*blocks, classes=classes)
        alone = MAMLClassifier(**SMALL, task_column=3)
        for k in range(4):
            part = slice(200 * k, 200 * (k + 1))
            alone.partial_fit(X[part], y[part], classes=classes)
        found = wrapped.estimator_
        assert found.n_iter_ == alone.n_iter_ == 20
        for one, other in zip(found.module_.parameters(), alone.module_.parameters(), strict=True):
            assert_array_equal(one.detach().numpy(), other.detach().numpy())
        grid = {"alpha": [0.01, 0.1], "beta": [1e-3, 1e-2]}
        hyperband = search.HyperbandSearchCV(maml, grid, max_iter=3, random_state=0)
        try:
            hyperband.fit(*blocks, classes=classes)
        except RuntimeError as error:
            if "asynchronous Client" in str(error):  # of any estimator
                pytest.skip("this dask_ml is too old for this dask")
            raise
        assert hyperband.best_estimator_.n_iter_ >= 5
        assert 0 <= hyperband.best_score_ <= 1
