"""Two classes that tasks share: the Gaussian head has the logistic likelihood."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_maml import MAMLClassifier, load
from sklearn_maml.learners import conditioned
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.exact import CompiledNewton
from sklearn_maml.learners.laplace import LaplaceFunctions, LaplaceHead
from sklearn_maml.learners.likelihoods import Classes, Labels, TwoClasses, find_likelihood
from sklearn_maml.targets import BinaryCrossEntropy, CrossEntropy

RNG = np.random.RandomState


def rare(n_tasks=120, n_rows=30, level=-3.0, seed=0):
    """Tasks whose levels and slopes differ, with few rows of the second class."""
    rng = RNG(seed)
    X = rng.randn(n_tasks, n_rows, 2)
    logit = level + rng.randn(n_tasks, 1) + X[..., 0] * (1.5 + 0.5 * rng.randn(n_tasks, 1))
    y = (logit + rng.logistic(size=logit.shape) > 0).astype(int)
    return X.reshape(-1, 2), y.ravel(), np.repeat(np.arange(n_tasks), n_rows)


@pytest.fixture(scope="module")
def clf():
    X, y, task = rare()
    options = {"hidden_layer_sizes": (8,), "max_iter": 100, "random_state": 0}
    fitted = MAMLClassifier(update_rule="gaussian-head", **options)
    return fitted.fit(X, np.array(["no", "yes"])[y], groups=task)


def test_only_two_classes_that_tasks_share_are_a_logit():
    for n_classes, kind in ((2, TwoClasses), (3, Classes), (None, Classes)):
        assert type(find_likelihood(CrossEntropy(), n_classes)) is kind
    X, _, task = rare(12)
    clf = MAMLClassifier(n_ways=2, n_shots=1, max_iter=2, hidden_layer_sizes=(4,))
    clf.fit(X, X[:, 0] > 0, groups=task)
    assert type(clf._learner.head.likelihood) is Classes


@pytest.mark.parametrize("k", [0, 4])
def test_two_classes_are_learned_as_one_label(k):
    runs = []
    for likelihood in (TwoClasses(CrossEntropy()), Labels(BinaryCrossEntropy())):
        body = MLPBody(2, [2, 5], nn.Tanh(), torch.Generator().manual_seed(0))
        rng = RNG(0)
        starts = [(rng.randn(3, 1), np.tril(rng.randn(3, 3)), np.ones(1), np.ones(1))] * 2
        head = LaplaceHead(body, starts, np.zeros(2), np.ones(2), likelihood=likelihood).double()
        runs.append(head.functions(dict(head.named_parameters())))
    X, y = torch.randn(3, 9, 2, dtype=torch.float64), torch.arange(27).view(3, 9) % 2
    mask = torch.ones(1, 3, 9, dtype=torch.float64)
    mask[0, 1, 2], mask[0, 2, 8] = 0, 2
    both = torch.stack([1 - y, y], -1).double()
    loss, logits = runs[0].loss(X, both, mask, k)
    expected, logit = runs[1].loss(X, y[..., None].double(), mask, k)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.log_softmax(-1)[..., 1:], nn.LogSigmoid()(logit))


def test_a_row_that_is_no_surprise_moves_a_task_little(clf):
    X = np.zeros((1, 2))
    before = clf.adapt(X[:0], [], groups=[]).decision_function(X)
    no, yes = (clf.adapt(X, [label]).decision_function(X) - before for label in ("no", "yes"))
    assert no < 0 < yes
    assert -no < 0.3 * yes


@pytest.mark.parametrize("n_support", [0, 5])
def test_probabilities_of_a_rare_class_are_as_high_as_it_is_frequent(clf, n_support):
    X, y, task = rare()  # which new tasks may differ from by chance
    support, asked = (np.arange(len(y)) % 30 < n for n in (n_support, 30))
    asked &= ~support
    clf = copy.copy(clf).set_params(unseen_tasks="prior")
    clf.adapt(X[support], np.array(["no", "yes"])[y[support]], groups=task[support])
    p = clf.predict_proba(X[asked], groups=task[asked])[:, 1]
    assert abs(np.log(p.mean() / y[asked].mean())) < 0.2


def test_what_was_learned_is_extended_saved_and_exported(clf, tmp_path):
    X, y, task = rare(4, seed=2)
    y = np.array(["no", "yes"])[y]
    old = np.arange(len(y)) % 30 < 12
    new = (np.arange(len(y)) % 30 < 15) & ~old
    both = old | new
    expected = clf.adapt(X[both], y[both], groups=task[both]).predict_proba(X, groups=task)
    clf.adapt(X[old], y[old], groups=task[old])
    clf.adapt(X[new], y[new], groups=task[new], extend=True)
    np.testing.assert_allclose(clf.predict_proba(X, groups=task), expected, rtol=1e-7)
    clf.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_allclose(loaded.predict_proba(X, groups=task), expected, rtol=1e-7)
    one = clf.adapt(X[:12], y[:12])
    got = one.adapted_module()(torch.from_numpy(X[12:])).numpy()
    np.testing.assert_allclose(got, one.predict_proba(X[12:]), rtol=1e-6)


def test_probabilities_take_the_posteriors_that_adapt_has_found(clf, monkeypatch):
    X, y, task = rare(5, 12, seed=1)
    own = copy.deepcopy(clf)
    own.adapt(X, np.array(["no", "yes"])[y], groups=task)
    monkeypatch.setattr(conditioned, "MOST_KEPT", 0)
    anew = copy.deepcopy(clf)
    anew.adapt(X, np.array(["no", "yes"])[y], groups=task)
    expected = anew.predict_proba(X, groups=task)
    for kind in (LaplaceFunctions, CompiledNewton):
        monkeypatch.setattr(kind, "condition", None)
    np.testing.assert_allclose(own.predict_proba(X, groups=task), expected, rtol=1e-9)
    with pytest.raises(TypeError, match="not callable"):
        anew.predict_proba(X, groups=task)
