"""Labels that mean something inside a task only: the closed form is what `"auto"` learns by."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from sklearn_maml import MAMLClassifier
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.tasks import TaskCollection

HEAD, STEPS = "gaussian-head", "gradient-steps"
SMALL = {"n_ways": 3, "n_shots": 1, "n_queries": 2, "max_iter": 4, "random_state": 0}


def classes(n_classes=24, n_rows=8, n_features=6, seed=0, spread=2.0):
    """Rows of classes around centres of their own."""
    rng = np.random.RandomState(seed)
    y = np.repeat(np.arange(n_classes), n_rows)
    X = spread * rng.randn(n_classes, n_features)[y] + rng.randn(len(y), n_features)
    return X, y


class Normed(nn.Module):
    def __init__(self, in_features, out_features, **options):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(in_features, 5), nn.BatchNorm1d(5, **options), nn.ReLU()
        )
        self.head = nn.Linear(5, out_features)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("module", [None, Normed])
def test_auto_learns_by_the_closed_form(groups, module):
    X, y = classes()
    clf = MAMLClassifier(**SMALL, module=module, hidden_layer_sizes=(8,))
    clf.fit(X, y, groups=y // 6 if groups else None)
    assert clf.learner_weights_ == {HEAD: 1.0}
    steps = MAMLClassifier(**SMALL, module=module, hidden_layer_sizes=(8,), update_rule="sgd")
    assert steps.fit(X, y).learner_weights_ == {STEPS: 1.0}


@pytest.mark.parametrize(
    "options", [{"engine__batch_norm": "transductive"}, {"module__track_running_stats": False}]
)
def test_batch_norm_without_running_averages_takes_steps(options):
    X, y = classes()
    clf = MAMLClassifier(**SMALL, module=Normed, **options).fit(X, y)
    assert clf.learner_weights_ == {STEPS: 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_norm_takes_running_averages_in_predictions(dtype, tmp_path):
    X, y = classes()
    X = (3 + X).astype(dtype)
    clf = MAMLClassifier(**{**SMALL, "max_iter": 20}, module=Normed).fit(X, y)
    (norm,) = (m for m in clf.module_.modules() if isinstance(m, nn.BatchNorm1d))
    assert int(norm.num_batches_tracked) == 12  # the head's part of the updates
    assert norm.running_mean.abs().max() > 0.1
    assert not clf.module_.training
    clf.adapt(X[:24:8], list("abc"))
    p = clf.predict_proba(X[:24])
    alone = np.concatenate([clf.predict_proba(X[j : j + 1]) for j in range(24)])
    np.testing.assert_allclose(p, alone, rtol=1e-5)
    with torch.no_grad():
        of_module = clf.adapted_module()(torch.from_numpy(X[:24]))
    np.testing.assert_allclose(of_module, p, rtol=1e-4, atol=1e-6)
    clf.save(tmp_path / "model")
    same = MAMLClassifier.load(tmp_path / "model", module=Normed)
    np.testing.assert_array_equal(same.predict_proba(X[:24]), p)


def test_a_fit_does_not_depend_on_what_was_predicted_in_between():
    X, y = classes()

    def fit(predict):
        clf = MAMLClassifier(**SMALL, module=Normed, warm_start=True).fit(X, y)
        if predict:
            clf.adapt(X[:24:8], list("abc")).predict(X)
        return clf.fit(X, y).adapt(X[:24:8], list("abc")).predict_proba(X)

    np.testing.assert_array_equal(fit(True), fit(False))


def sizes_of(clf, X, y):
    """Classes and rows of the episodes that meta-training draws."""
    seen = []

    class Watched(EpisodeSampler):
        def sample_batches(self, which, rng):
            batches = super().sample_batches(which, rng)
            seen.extend(batches if self.shots_range is not None else [])
            return batches

    import sklearn_maml.training.sources as sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "EpisodeSampler", Watched)
        clf.fit(X, y)
    return seen


@pytest.mark.parametrize(("n_classes", "n_ways"), [(24, 3), (160, 6), (600, 20)])
def test_episodes_of_large_pools_have_more_classes_and_as_many_rows(n_classes, n_ways):
    X, y = classes(n_classes, n_rows=4, n_features=2)
    clf = MAMLClassifier(**SMALL, meta_batch_size=20, hidden_layer_sizes=(4,))
    batches = sizes_of(clf, X, y)
    assert {int(batch.query.y.max()) + 1 for batch in batches} == {n_ways}
    rows = {batch.query.X.shape[0] * batch.query.X.shape[1] for batch in batches}
    assert all(abs(n - 20 * 3 * 2) <= n_ways for n in rows)  # of whole episodes
    p = clf.adapt(X[:12:4], list("abc")).predict_proba(X[:5])
    assert p.shape == (5, 3)


def test_support_sets_of_several_sizes_are_learned_from():
    X, y = classes(n_rows=14)
    batches = sizes_of(MAMLClassifier(**{**SMALL, "max_iter": 100}), X, y)
    shots = [batch.support.X.shape[1] // 3 for batch in batches]
    assert set(shots) == {1, 2, 3, 4, 5}
    assert shots.count(1) > shots.count(5)


def test_drawn_sizes_are_those_of_all_classes_of_a_batch():
    X, y = classes(n_classes=6, n_rows=5)
    tasks = TaskCollection(X, y, y // 3, np.arange(2), None, "list")
    sampler = EpisodeSampler(tasks, classification=True, n_ways=3, n_queries=1, shots_range=(1, 9))
    rng = np.random.default_rng(0)
    sizes = [sampler.sample(np.array([0, 1]), rng).support.X.shape[1] for _ in range(40)]
    assert set(sizes) == {3, 6}  # at most half of the five rows of a class


@pytest.mark.parametrize("max_iter", [1, 300])
def test_few_classes_are_told_apart_as_well_as_by_logistic_regression(max_iter):
    X, y = classes(20, 10, 16, spread=1.0)
    clf = MAMLClassifier(n_ways=4, n_shots=1, max_iter=max_iter, random_state=0).fit(X, y)
    new, labels = classes(40, 10, 16, seed=1, spread=1.0)
    rng = np.random.RandomState(0)
    ours, logistic, logloss = [], [], []
    for _ in range(60):
        rows = np.concatenate([rng.permutation(10) + 10 * c for c in rng.permutation(40)[:4]])
        s, q = rows[::10], np.delete(rows, np.arange(0, 40, 10))
        p = clf.adapt(new[s], labels[s]).predict_proba(new[q])
        ours.append(clf.predict(new[q]) == labels[q])
        own = p[np.arange(36), np.searchsorted(clf.classes_, labels[q])]
        logloss.append(-np.log(own))
        logistic.append(LogisticRegression().fit(new[s], labels[s]).predict(new[q]) == labels[q])
    assert np.mean(ours) > np.mean(logistic) - 0.01 > 0.6
    assert np.mean(logloss) < 0.8  # sure, where it is right
