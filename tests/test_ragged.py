"""Tasks of any number of rows: small ones teach what they can, large ones do not drown them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn
import torch
from builders import has_kernels, make_batch, make_engine, make_meta_params, make_mlp
from scipy.stats import chi2
from sklearn.model_selection import GridSearchCV, GroupKFold
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, task_scorer, task_scores
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.exceptions import SmallTaskWarning
from sklearn_maml.learners.base import alike, padded

SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0}
RULES = ["auto", "gaussian-head", "sgd", "adam", "meta-sgd"]


def ragged(sizes, seed=0):
    """Lines of two features with a level of their own."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(sizes)), sizes)
    X = rng.normal(size=(len(task), 2))
    y = rng.normal(size=len(sizes))[task] + X[:, 0] + 0.1 * rng.normal(size=len(task))
    order = rng.permutation(len(task))
    return X[order], y[order], task[order]


SIZES = [1, 1, 2, 3, 12, 7, 1, 20, 5, 2, 9, 4, 1, 6, 15]
X, Y, G = ragged(SIZES)
C = np.array(["low", "high"])[(Y > 0).astype(int)]
FEW = r"15 tasks.*: 4 with a single row, which is a query row\."


@pytest.mark.parametrize("rule", RULES)
def test_a_fit_takes_tasks_of_one_row_and_counts_them(rule):
    with pytest.warns(SmallTaskWarning, match=FEW) as caught:
        reg = MAMLRegressor(**SMALL, update_rule=rule).fit(X, Y, groups=G)
    assert [w.filename for w in caught] == [__file__]
    assert reg.n_tasks_ == 15
    assert np.isfinite(reg.adapt(X[:3], Y[:3]).predict(X)).all()
    with pytest.warns(SmallTaskWarning, match=r"1[45] tasks.*: 4 with a single row"):
        MAMLClassifier(**SMALL, update_rule=rule).fit(X, C, groups=G)


@pytest.mark.parametrize("rule", RULES)
def test_all_tasks_of_one_row_teach_their_population(rule):
    X, y, task = ragged([1] * 40)
    reg = MAMLRegressor(**{**SMALL, "max_iter": 60}, update_rule=rule, beta=0.01)
    with pytest.warns(SmallTaskWarning, match="40 with a single row"):
        reg.fit(X, y, groups=task)
    residual = y - reg.set_params(unseen_tasks="prior").predict(X)
    assert residual.std() < 0.95 * y.std()


def test_single_rows_teach_the_initialisation():
    """What a task of one row adds is a query row without a support set."""
    X, y, task = ragged([20] * 6)
    others = np.random.default_rng(1).normal(size=(60, 2))
    both_X, both_y = np.r_[X, others], np.r_[y, others[:, 0] + 5]
    both = np.r_[task, 100 + np.arange(60)]
    options = {**SMALL, "max_iter": 60, "update_rule": "sgd", "unseen_tasks": "prior", "beta": 0.01}
    with pytest.warns(SmallTaskWarning, match="60 with a single row"):
        with_others = MAMLRegressor(**options).fit(both_X, both_y, groups=both)
    without = MAMLRegressor(**options).fit(X, y, groups=task)
    level = 5 + X[:, 0]
    near, far = (np.abs(m.predict(X) - level).mean() for m in (with_others, without))
    assert near < 0.7 * far


@pytest.mark.parametrize("rung", ["native", "stacked", "vmap", "loop"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_task_without_support_rows_is_not_moved_on_any_rung(rung, order):
    if rung == "native" and not has_kernels():
        pytest.skip("no compiled kernels")
    module = make_mlp()
    batch, params = make_batch([[3, 0, 5], [4, 6, 1]]), make_meta_params(module)
    engine, loop = make_engine(module, rung, order=order), make_engine(module, "loop", order=order)
    adapted = engine.adapt(params, batch.support, alpha=0.2, steps=3)
    for name, p in module.named_parameters():
        assert torch.equal(adapted.params[name][1], params[f"module.{name}"])
        assert not torch.equal(adapted.params[name][0], p)
    step = engine.meta_step(params, batch, alpha=0.2, steps=3)
    expected = loop.meta_step(params, batch, alpha=0.2, steps=3)
    torch.testing.assert_close(step.losses, expected.losses)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(step.grads[name], grad)
    # of that task alone the gradient is that of its query loss, without inner steps
    alone = make_batch([[0, 0], [4, 6]])
    torch.testing.assert_close(
        engine.meta_step(params, alone, alpha=0.2, steps=3).grads,
        engine.meta_step(params, alone, alpha=0.2, steps=0).grads,
    )


@pytest.mark.parametrize("meta_gradient", ["implicit", "reptile"])
def test_other_meta_gradients_take_them(meta_gradient):
    reg = MAMLRegressor(**SMALL, update_rule="sgd", steps=2, meta_gradient=meta_gradient)
    with pytest.warns(SmallTaskWarning):
        assert np.isfinite(reg.fit(X, Y, groups=G).history_[-1]["train_loss"])


def test_more_shots_than_small_tasks_have():
    with pytest.warns(SmallTaskWarning, match=r"5 with fewer than 6 rows \(n_shots=5.*fewer supp"):
        MAMLRegressor(**SMALL, n_shots=5).fit(X, Y, groups=G)
    with pytest.warns(SmallTaskWarning, match=r"with fewer than 3 rows of a class \(n_shots=2"):
        clf = MAMLClassifier(**SMALL, n_shots=2).fit(X, C, groups=G)
    assert np.isfinite(clf.history_[-1]["train_loss"])


def test_local_labels_need_two_classes_of_two_rows():
    rng = np.random.default_rng(0)
    y = np.r_[np.repeat(["a", "b", "c"], 4), ["a", "b"], np.repeat(["a", "b"], 3), ["z"], ["q"]]
    task = np.r_[np.zeros(12), [1, 1], np.full(6, 2), [2], [3]].astype(int)
    X = rng.normal(size=(len(y), 2))
    clf = MAMLClassifier(**SMALL, n_ways=2, n_shots=1, update_rule="sgd")
    words = "2 with fewer than two classes of two rows, left out; 1 single row"
    with pytest.warns(SmallTaskWarning, match=words):
        clf.fit(X, y, groups=task)
    assert clf.n_tasks_ == 2
    with pytest.warns(SmallTaskWarning, match=words):
        assert 0 <= clf.score(X, y, groups=task + 10) <= 1


def test_batch_norm_needs_two_support_rows():
    module = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    few = "7 with fewer than 2 support rows, which batch norm needs, left out"
    with pytest.warns(SmallTaskWarning, match=few):
        reg = MAMLRegressor(module, max_iter=5, steps=1, random_state=0).fit(X, Y, groups=G)
    assert reg.n_tasks_ == 8
    with pytest.warns(SmallTaskWarning, match=few):
        assert np.isfinite(reg.score(X, Y, groups=G + 100))
    # the Gaussian head, which predicts here, normalises by running averages
    assert np.isfinite(reg.adapt(X[:0], Y[:0]).predict(X)).all()
    with pytest.warns(SmallTaskWarning, match=few):
        reg.set_params(update_rule="sgd").fit(X, Y, groups=G)
    with pytest.raises(ValueError, match=r"a support set has none. Give more support rows"):
        reg.adapt(X[:0], Y[:0])


def test_tasks_of_a_list_without_rows_are_left_out():
    tasks = [(X[j == G], Y[j == G]) for j in range(15)]
    with pytest.warns(SmallTaskWarning, match="1 without rows, left out; 4 with a single"):
        model = MAMLRegressor(**SMALL).fit([*tasks, (X[:0], Y[:0])])
    assert model.n_tasks_ == 15


# --- scores and searches


@pytest.fixture(scope="module")
def reg():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallTaskWarning)
        return MAMLRegressor(**SMALL).fit(X, Y, groups=G)


def test_scores_take_half_of_the_rows_of_each_task(reg):
    new = G + 100
    with pytest.warns(SmallTaskWarning, match=FEW) as caught:
        scores = task_scores(reg, X, Y, groups=new)
    assert len(caught) == 1
    assert scores.n_queries.tolist() == [n - min(n // 2, 10) for n in SIZES]
    single = np.array(SIZES) == 1
    np.testing.assert_array_equal(scores.before[single], scores.after[single])
    with pytest.warns(SmallTaskWarning, match=FEW) as caught:
        assert np.isfinite(reg.score(X, Y, groups=new))
    assert [w.filename for w in caught] == [__file__]


def test_scores_at_a_number_of_shots_leave_one_row_of_small_tasks(reg):
    with pytest.warns(SmallTaskWarning, match="7 with fewer than 8 rows"):
        scores = task_scores(reg, X, Y, groups=G + 100, n_shots=7)
    assert scores.n_queries.tolist() == [n - min(7, n - 1) for n in SIZES]


def test_a_search_goes_through():
    scorer = task_scorer("neg_root_mean_squared_error", n_shots=3, average="macro")
    search = GridSearchCV(
        MAMLRegressor(**SMALL, update_rule="sgd", steps=1),
        {"alpha": [0.01, 0.1]},
        cv=GroupKFold(3),
        scoring=scorer,
        error_score="raise",
    )
    with (
        sklearn.config_context(enable_metadata_routing=True),
        pytest.warns(SmallTaskWarning, match="too few rows"),
    ):
        search.fit(X, Y, groups=G)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_regular_tasks_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAMLRegressor(**SMALL).fit(*ragged([4, 5, 6, 7, 8])[:2], groups=ragged([4, 5, 6, 7, 8])[2])


# --- one task with very many rows


def one_large(n_large, level=0.0, n_small=60):
    """Small tasks, and one of many rows at a level of its own."""
    sizes = [*[5] * n_small, n_large]
    X, y, task = ragged(sizes)
    return X, y + level * (task == n_small), task


def test_a_large_task_does_not_drown_the_others():
    """Those are predicted as without it, though their targets lie far from those of most rows."""
    X, y, task = one_large(3000, level=100.0)
    small = task < 60
    X_new, y_new, new = ragged([20] * 40, seed=1)
    support = np.concatenate([np.flatnonzero(new == j)[:5] for j in range(40)])
    query = np.setdiff1d(np.arange(len(new)), support)
    errors = []
    for rows in (small, np.ones(len(X), dtype=bool)):
        reg = MAMLRegressor(
            hidden_layer_sizes=(8,), update_rule="gaussian-head", max_iter=100, random_state=0
        ).fit(X[rows], y[rows], groups=task[rows])
        reg.adapt(X_new[support], y_new[support], groups=new[support])
        errors.append(np.std(y_new[query] - reg.predict(X_new[query], groups=new[query])))
    assert errors[1] < 1.5 * errors[0]
    assert abs(reg.y_mean_[0]) < 50  # of most rows it is 100


def test_rows_of_tasks_are_leveled_only_where_one_has_very_many():
    assert collection([5] * 10 + [100]).leveled() is None
    rows = collection([5] * 10 + [1000]).leveled()
    kept = np.bincount(collection([5] * 10 + [1000]).codes[rows])
    assert kept.tolist() == [5] * 10 + [100]
    assert (np.diff(rows) > 0).all()


def collection(sizes):
    codes = np.repeat(np.arange(len(sizes)), sizes)
    X = np.arange(len(codes), dtype=float)[:, None]
    return TaskCollection(X, X, codes, np.arange(len(sizes)), None, "groups")


@pytest.mark.parametrize("sizes", [[6000], [6000, 12, 5000]])
def test_few_rows_of_a_large_task_are_drawn_without_shuffling_all(sizes, monkeypatch):
    tasks = collection(sizes)
    sampler = EpisodeSampler(tasks, classification=False, n_shots=3, n_queries=4)
    rng = np.random.default_rng(0)
    drawn, rng_random = [], rng.random

    class Counting:
        integers = rng.integers

        def random(self, shape=None):
            drawn.append(np.prod(shape))
            return rng_random(shape)

    which = np.repeat(np.arange(len(sizes)), 400)
    split = sampler.split(which, Counting())
    assert sum(drawn) < 20 * len(which)
    assert (split.n_support == 3).all()
    assert (split.n_query == 4).all()
    rows = np.c_[split.support.reshape(-1, 3), split.query.reshape(-1, 4)]
    assert all(len(set(row)) == 7 for row in rows.tolist())
    assert (tasks.codes[rows] == which[:, None]).all()
    # every place of a draw is uniform over the rows of the task
    for place in rows[which == 0].T:
        quarters = np.bincount(place // 1500, minlength=4)
        assert ((quarters - 100) ** 2 / 100).sum() < chi2.isf(1e-4, 3)


def test_tasks_are_padded_to_others_alike_in_size():
    parts = alike(np.array([5, 70, 5, 0, 60, 5, 1000]), most_tasks=3, most_rows=150)
    assert [p.tolist() for p in parts] == [[3, 0, 2], [5, 4], [1], [6]]
    codes = np.repeat(np.arange(4), [2, 1, 1, 1])
    with_beside = list(padded(codes, 4, beside=np.array([1, 100_000, 1, 1])))
    assert [tasks.tolist() for tasks, _, _ in with_beside] == [[1], [2, 3, 0]]
    assert [place.shape for _, place, _ in with_beside] == [(1, 1), (3, 2)]
