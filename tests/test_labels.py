"""Rows with any number of labels: `MAMLClassifier(loss="binary")`."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array, csr_matrix
from sklearn.base import clone
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils import get_tags

from sklearn_maml import FewShotClassifier, MAMLClassifier, compare_baselines, task_scorer

SMALL = {"loss": "binary", "max_iter": 4, "hidden_layer_sizes": (8,), "random_state": 0}
RULES = ["auto", "sgd", "gaussian-head"]


def labelled(n_tasks=14, n_rows=20, seed=0):
    """Three labels, the boundaries of which differ from task to task; the last one is rare."""
    rng = np.random.RandomState(seed)
    X = rng.randn(n_tasks, n_rows, 2)
    level = np.array([0.0, 0.5, -3.0]) + 0.7 * rng.randn(n_tasks, 1, 3)
    logit = level + X @ np.array([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    y = (logit + rng.logistic(size=logit.shape) > 0).astype(int)
    return X.reshape(-1, 2), y.reshape(-1, 3), np.repeat(np.arange(n_tasks), n_rows)


@pytest.mark.parametrize("rule", RULES)
def test_every_door(rule, tmp_path):
    X, y, task = labelled()
    clf = MAMLClassifier(**SMALL, update_rule=rule).fit(X, y, groups=task)
    assert ("gaussian-head" in clf.learner_weights_) == (rule != "sgd")
    clf.adapt(X[:40], y[:40], groups=task[:40])
    new = {"X": X[:40], "groups": task[:40]}
    labels, p = clf.predict(**new), clf.predict_proba(**new)
    assert labels.shape == p.shape == (40, 3)
    assert labels.dtype.kind == "i"
    np.testing.assert_array_equal(labels, p > 0.5)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-clf.decision_function(**new))), rtol=1e-4)
    np.testing.assert_allclose(clf.predict_log_proba(**new), np.log(p), rtol=1e-5)
    clf.save(tmp_path / "m")
    for same in (MAMLClassifier.load(tmp_path / "m"), pickle.loads(pickle.dumps(clf))):
        np.testing.assert_array_equal(same.predict_proba(**new), p)
    own = FewShotClassifier(prior=clf).fit(X[:20], y[:20])
    clf.adapt(X[:20], y[:20])
    np.testing.assert_array_equal(own.predict(X[:20]), clf.predict(X[:20]))
    with torch.no_grad():
        of_module = clf.adapted_module()(torch.from_numpy(X[:20]))
    np.testing.assert_allclose(of_module, clf.predict_proba(X[:20]), rtol=1e-4, atol=1e-6)
    assert clf.score(X[:20], y[:20]) == accuracy_score(y[:20], clf.predict(X[:20]))
    assert 0 <= copy.deepcopy(clf).score(X, y, groups=task + 50) <= 1


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_beat_the_frequencies_after_adaptation(rule):
    X, y, task = labelled(60, 30)
    settings = {**SMALL, "max_iter": 200, "update_rule": rule}
    clf = MAMLClassifier(**settings).fit(X[:1500], y[:1500], groups=task[:1500])
    new = np.arange(1500, 1800)
    support = new[np.arange(300) % 30 < 8]
    query = np.setdiff1d(new, support)
    clf.adapt(X[support], y[support], groups=task[support])
    p = clf.predict_proba(X[query], groups=task[query])

    def cost(p):
        return -np.where(y[query] == 1, np.log(p), np.log1p(-p)).mean(0)

    assert (cost(p) < cost(np.tile(y[:1500].mean(0), (len(query), 1)))).all()  # the rare one, too


def test_what_labels_are_not_for_is_refused():
    X, y, task = labelled()
    for params, wrong, message in (
        ({}, y[:, 0], "one axis"),
        ({}, y + 1, "labels 0 and 1"),
        ({"loss": "poisson"}, y, "not for classes"),
        ({"n_ways": 2}, y, "n_ways=2 is about classes"),
        ({"class_weight": "balanced"}, y, "class_weight='balanced' is about classes"),
    ):
        with pytest.raises(ValueError, match=message):
            MAMLClassifier(**{**SMALL, **params}).fit(X, wrong, groups=task)
    clf = MAMLClassifier(**SMALL).fit(X, y, groups=task)
    with pytest.raises(ValueError, match="output"):
        clf.adapt(X[:5], y[:5, :2])


def test_tags_tell_labels_from_classes():
    labels, classes = MAMLClassifier(**SMALL), MAMLClassifier()
    assert get_tags(labels).classifier_tags.multi_label
    assert not get_tags(classes).classifier_tags.multi_label
    assert not get_tags(classes).target_tags.multi_output
    assert clone(labels).loss == "binary"


def test_a_single_label_is_scored_by_the_metrics_of_two_classes():
    X, y, task = labelled(20, 20)
    y = y[:, :1]
    settings = {**SMALL, "max_iter": 50, "update_rule": "gaussian-head"}
    clf = MAMLClassifier(**settings).fit(X, y, groups=task)
    assert clf.classes_.tolist() == [0, 1]
    for name, least in (("roc_auc", 0.7), ("average_precision", 0.6), ("neg_log_loss", -0.65)):
        assert task_scorer(name, n_shots=8)(clf, X, y, groups=task + 50) > least


def test_log_loss_of_several_labels_is_the_mean_over_them():
    X, y, task = labelled()
    clf = MAMLClassifier(**SMALL).fit(X, y, groups=task).adapt(X[:20], y[:20])
    p = clf.predict_proba(X[20:40])
    by_hand = np.mean([log_loss(y[20:40, k], p[:, k], labels=[0, 1]) for k in range(3)])
    episode = [(X[:20], y[:20], X[20:40], y[20:40])]
    assert task_scorer("neg_log_loss")(clf, episode) == pytest.approx(-by_hand)


@pytest.mark.parametrize("kind", [csr_matrix, csr_array])
@pytest.mark.parametrize("door", ["fit", "adapt", "score"])
def test_sparse_labels_are_refused(door, kind):
    X, y, task = labelled()
    clf = MAMLClassifier(**SMALL)
    if door != "fit":
        clf.fit(X, y, groups=task)
    with pytest.raises(TypeError, match=r"y.toarray\(\)"):
        getattr(clf, door)(X, kind(y), groups=task)


def test_baselines_of_labels_are_refused_with_the_way_out():
    X, y, task = labelled()
    clf = MAMLClassifier(**SMALL, update_rule="sgd")
    with pytest.raises(ValueError, match=r"no baselines for rows with any number.*y\[:, j\]"):
        compare_baselines(clf, X, y, task)
