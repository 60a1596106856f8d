"""A Gaussian head learned across tasks: exactness, choice, uncertainty, the one outer loop."""

import copy
import dataclasses
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import Residual
from scipy.special import softmax
from sklearn import config_context
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import sklearn_maml.learners.base
import sklearn_maml.learners.building
import sklearn_maml.learners.conditioned
import sklearn_maml.learners.start
from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor, adapt
from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
from sklearn_maml.exceptions import MetaTrainingError, NonFiniteStepWarning
from sklearn_maml.learners.base import padded
from sklearn_maml.learners.bodies import MLPBody, ModuleBody
from sklearn_maml.learners.conditioned import Calibration
from sklearn_maml.learners.gaussian import ClassHead, GaussianHead
from sklearn_maml.learners.head_trainer import clip_members
from sklearn_maml.learners.joint import Joint
from sklearn_maml.learners.judging import _Deviations
from sklearn_maml.learners.likelihoods import Classes, Normal
from sklearn_maml.learners.posteriors import Scale
from sklearn_maml.learners.shares import choose_share
from sklearn_maml.learners.start import start_of_numbers
from sklearn_maml.targets import CrossEntropy, SquaredError

RNG = np.random.RandomState
NORMAL, CLASSES = Normal(SquaredError()), Classes(CrossEntropy())
HEAD, STEPS = "gaussian-head", "gradient-steps"


def slopes(n_tasks=30, n_rows=24, seed=0, spread=1.0, noise=0.1):
    """Tasks with random intercepts and slopes around a common line."""
    rng = RNG(seed)
    X = rng.uniform(-2, 2, (n_tasks, n_rows, 2))
    coef = np.array([1.0, 2.0, -1.0]) + spread * rng.randn(n_tasks, 3)
    y = coef[:, :1] + np.einsum("trp,tp->tr", X, coef[:, 1:])
    y += noise * rng.randn(n_tasks, n_rows)
    return X.reshape(-1, 2), y.ravel(), np.repeat(np.arange(n_tasks), n_rows)


def labelled(n_tasks=30, n_rows=24, seed=0):
    """Two classes, whose boundary differs from task to task."""
    X, y, task = slopes(n_tasks, n_rows, seed)
    return X, np.where(y > 1, "high", "low"), task


def random_head(classification=False, n_features=3, n_outputs=1, seed=0, n_members=2):
    """Head with random parameters, in float64."""
    rng, generator = RNG(seed), torch.Generator().manual_seed(seed)
    body = MLPBody(n_members, [n_features, 8, 6], nn.ReLU(), generator)
    n_noises = 1 if classification else n_outputs
    starts = [
        (
            0.3 * rng.randn(1 + n_features, n_outputs),
            np.tril(rng.randn(1 + n_features, 1 + n_features)),
            1 + rng.rand(n_noises),
            0.1 + rng.rand(n_noises),
        )
        for _ in range(n_members)
    ]
    likelihood = CLASSES if classification else NORMAL
    kind = ClassHead if classification else GaussianHead
    head = kind(
        body, starts, rng.randn(n_features), 1 + rng.rand(n_features), likelihood=likelihood
    ).double()
    with torch.no_grad():
        head.mean[:, 1 + n_features :] = 0.1 * torch.randn(
            n_members, 6, n_outputs, generator=generator, dtype=torch.float64
        )
    return head


def in_numpy(head, j, X):
    """phi(x), the prior covariance, mean, and noise of member j, written out anew."""
    p = {name: value.detach().numpy() for name, value in head.named_parameters()}
    Z = (X - head.center.numpy()) / head.scale.numpy()
    h = np.maximum(Z @ p["body.weight0"][j] + p["body.bias0"][j], 0)
    h = np.maximum(h @ p["body.weight1"][j] + p["body.bias1"][j], 0) * 2 / np.sqrt(6)
    phi = np.c_[np.ones(len(X)), Z, h]
    n = X.shape[1] + 1
    cov = np.zeros((phi.shape[1], phi.shape[1]))
    cov[:n, :n] = p["factor"][j] @ p["factor"][j].T
    cov[n:, n:] = np.diag(np.exp(2 * p["log_scale"][j]))
    amplitude = np.exp(np.r_[0.0, p["log_amplitude"][j]]) if "log_amplitude" in p else np.ones(1)
    noise = np.exp(2 * p["log_noise"][j]) + 1e-5
    return phi, cov, p["mean"][j], noise, amplitude


def functions(head):
    return head.functions({name: p.detach() for name, p in head.named_parameters()})


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


# -- algebra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("n_support", [1, 6, 200])  # fewer and more rows than columns
def test_conditioning_is_bayesian_linear_regression(n_support, n_outputs):
    head, rng = random_head(n_outputs=n_outputs), RNG(1)
    X, y, X_new = rng.randn(n_support, 3), rng.randn(n_support, n_outputs), rng.randn(7, 3)
    weight = rng.rand(n_support)
    weight[0] = 0.5
    run = functions(head)
    given = run.condition(*tensors(X[None], y[None], np.sqrt(weight)[None]))
    got, variance = run.query(torch.as_tensor(X_new[None]), given)
    for j in range(2):
        phi, cov, mean, noise, amplitude = in_numpy(head, j, X)
        new = in_numpy(head, j, X_new)[0]
        for k in range(n_outputs):
            own = amplitude[k] ** 2 * cov
            of_noise = amplitude[k] ** 2 * noise[k]
            posterior = np.linalg.inv(np.linalg.inv(own) + (phi.T * weight) @ phi / of_noise)
            prior_mean = amplitude[k] * mean[:, k]
            moment = np.linalg.solve(own, prior_mean) + (phi.T * weight) @ y[:, k] / of_noise
            np.testing.assert_allclose(got[j, 0, :, k], new @ posterior @ moment, rtol=1e-6)
            expected = np.einsum("rp,pq,rq->r", new, posterior, new) + of_noise
            np.testing.assert_allclose(variance[j, 0, :, k], expected, rtol=1e-6)


def test_classes_are_conditioned_on_codes_and_the_mean_is_their_logits():
    head, rng = random_head(True, n_outputs=3), RNG(1)
    with torch.no_grad():
        head.log_code[:, 0] = torch.as_tensor([0.5, 1.0])
        head.surprise[:, 0] = torch.as_tensor([0.0, 0.7])
    X, y = rng.randn(6, 3), np.eye(3)[[0, 1, 2, 0, 1, 1]]
    X_new = rng.randn(4, 3)
    run = functions(head)
    given = run.condition(*tensors(X[None], y[None]))
    logits = run.query(torch.as_tensor(X_new[None]), given)[0][:, 0].numpy()
    for j, (size, part) in enumerate(zip(np.exp([0.5, 1.0]), [0.0, 0.7], strict=True)):
        phi, cov, mean, noise, _ = in_numpy(head, j, X)
        new = in_numpy(head, j, X_new)[0]
        codes = size * (y - (1 - part) / 3 - part * softmax(phi @ mean, axis=1))
        gain = cov @ phi.T @ np.linalg.inv(phi @ cov @ phi.T + noise * np.eye(6))
        expected = new @ (mean + gain @ (codes - phi @ mean))
        np.testing.assert_allclose(logits[j], expected, rtol=1e-6)
    # the loss solves in the space of rows, and finds the same
    both = np.concatenate([X, X_new])[None], np.concatenate([y, y[:4]])[None]
    loss, mean = run.loss(*tensors(*both), None, 6)
    np.testing.assert_allclose(mean[:, 0].numpy(), logits, rtol=1e-6)
    entropy = -(y[:4] * np.log(softmax(logits, axis=-1))).sum(-1).sum(-1)
    np.testing.assert_allclose(loss[:, 0].numpy(), entropy, rtol=1e-6)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_loss_is_the_joint_density_of_query_rows(n_outputs):
    head, rng = random_head(n_outputs=n_outputs), RNG(1)
    X, y = tensors(rng.randn(3, 7, 3), rng.randn(3, 7, n_outputs))
    run = functions(head)
    loss, mean = run.loss(X, y, None, 3)
    given = run.condition(X[:, :3], y[:, :3])
    torch.testing.assert_close(mean, run.query(X[:, 3:], given)[0])
    one_by_one = 0.0  # the chain rule: each row given those before it
    for k in range(3, 7):
        given = run.condition(X[:, :k], y[:, :k])
        m, v = run.query(X[:, k : k + 1], given)
        one_by_one = one_by_one + (0.5 * ((y[:, k : k + 1] - m) ** 2 / v + v.log())).sum((-1, -2))
    torch.testing.assert_close(loss, one_by_one)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_rows_that_are_masked_do_not_exist(n_outputs):
    head, rng = random_head(n_outputs=n_outputs), RNG(1)
    X, y = tensors(rng.randn(2, 7, 3), rng.randn(2, 7, n_outputs))
    run = functions(head)
    mask = torch.ones(1, 2, 7, dtype=torch.bool)
    mask[:, 0, 5:] = False
    mask[:, 1, 2] = False
    loss, _ = run.loss(X, y, mask, 3)
    query, _ = run.loss(X[:1, :5], y[:1, :5], None, 3)
    rest = [0, 1, 3, 4, 5, 6]
    support, _ = run.loss(X[1:, rest], y[1:, rest], None, 2)
    torch.testing.assert_close(loss, torch.cat([query, support], 1))


@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_gradient_of_the_loss_is_that_of_finite_differences(classification, k):
    head = random_head(classification, n_outputs=2)
    rng = RNG(1)
    X = torch.as_tensor(rng.randn(3, 6, 3))
    y = torch.as_tensor(
        np.eye(2)[rng.randint(0, 2, (3, 6))] if classification else rng.randn(3, 6, 2)
    )
    mask = torch.ones(1, 3, 6, dtype=torch.bool)
    mask[:, 1, 5] = False
    names = [name for name, _ in head.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in head.parameters()]

    def loss(*params):
        run = head.functions(dict(zip(names, params, strict=True)))
        return run.loss(X, y, mask, k)[0].sum(1)

    assert torch.autograd.gradcheck(loss, values, rtol=1e-4, atol=1e-6)


def test_each_member_has_a_bound_of_its_own_and_one_that_is_not_finite_stands_still():
    grads = {"head.a": torch.tensor([[3.0, 4.0], [0.3, 0.4], [np.nan, 1.0]])}
    clipped = clip_members(grads)["head.a"]
    torch.testing.assert_close(clipped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_mixed_model_recovers_the_population_of_slopes():
    X, y, task = slopes(n_tasks=400, spread=0.5)
    mean, factor, amplitude, noise = start_of_numbers(X, np.c_[y, 3 * y], task)
    np.testing.assert_allclose(mean[:, 0], [1, 2, -1], atol=0.1)
    np.testing.assert_allclose(factor @ factor.T, 0.25 * np.eye(3), atol=0.06)
    np.testing.assert_allclose(noise, [0.01, 0.09], rtol=0.2)
    np.testing.assert_allclose(amplitude, [1, 3], rtol=1e-3)


@pytest.mark.parametrize("update_rule", ["auto", HEAD])
def test_classes_of_images_that_tasks_share_are_learned(update_rule):
    rng = RNG(0)
    y = np.array([0, 0, 0, 1, 2, 2, 0, 1])[None].repeat(6, 0)
    X = 0.1 * rng.randn(6, 8, 1, 3, 3) + np.eye(3)[y][:, :, None, :, None]
    torch.manual_seed(0)  # from one start in eight so few filters do not learn it
    net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    clf = MAMLClassifier(module=net, update_rule=update_rule, max_iter=200, random_state=0).fit(
        X, y
    )
    assert (clf.adapt(X[0], y[0]).predict(X[1]) == y[1]).mean() > 0.8
    mean, _, _, _ = sklearn_maml.learners.start.start_of_classes(
        X[0].reshape(8, -1)[:, :0], y[0], 4
    )
    np.testing.assert_allclose(softmax(mean[0, :3]), [0.5, 0.25, 0.25])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("informed", [False, True])
def test_mixed_model_of_fewer_rows_than_columns_is_the_same(weighted, informed, monkeypatch):
    start, rng = sklearn_maml.learners.start, RNG(0)
    task = np.repeat(np.arange(20), rng.randint(2, 9, 20))
    X = rng.randn(len(task), 12)
    y = (X * (1 + 0.5 * rng.randn(20, 12))[task]).sum(1) + 0.1 * rng.randn(len(task))
    weight = rng.uniform(0.2, 2, len(y)) if weighted else None
    information = rng.uniform(0.5, 3, len(y)) if informed else None
    of_rows = start._mixed_model(X, y, task, weight, information)
    made = []
    monkeypatch.setattr(start, "_ByRows", lambda *a: made.append(start._ByColumns(*a)) or made[0])
    of_columns = start._mixed_model(X, y, task, weight, information)
    assert made
    for one, other in zip(of_rows, of_columns, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


def test_systems_that_rounding_leaves_indefinite_are_inverted_all_the_same():
    systems = np.stack([np.diag([2.0, 4.0]), np.diag([1.0, -1e-12])])
    found = sklearn_maml.learners.start._inverses(systems.copy())
    np.testing.assert_allclose(found, np.linalg.inv(systems))


def test_mixed_model_of_very_many_tasks_takes_some_of_them(monkeypatch):
    X, y, task = slopes(n_tasks=1000, spread=0.5)
    monkeypatch.setattr(sklearn_maml.learners.start, "MIXED_ENTRIES", 400 * 9)
    mean, factor, _, _ = start_of_numbers(X, y[:, None], task)
    np.testing.assert_allclose(mean[:, 0], [1, 2, -1], atol=0.1)
    np.testing.assert_allclose(factor @ factor.T, 0.25 * np.eye(3), atol=0.06)


def test_large_task_is_not_padded_together_with_many_small_ones():
    sizes = RNG(0).permutation(np.r_[np.full(600, 3), 200_000, 5000, 40])
    codes = RNG(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    taken = []
    for tasks, place, present in padded(codes, len(sizes)):
        assert present.size <= max(sklearn_maml.learners.base.PADDED_ROWS, sizes[tasks].max())
        for task, rows, real in zip(tasks, place, present, strict=True):
            np.testing.assert_array_equal(np.sort(rows[real]), np.flatnonzero(codes == task))
        taken += tasks.tolist()
    assert sorted(taken) == list(range(len(sizes)))


# -- what predicts -------------------------------------------------------------------------------


def fitted(maml=MAMLRegressor, data=slopes, **params):
    X, y, task = data()
    return maml(**{"max_iter": 100, "random_state": 0, **params}).fit(X, y, groups=task)


@pytest.fixture(scope="module")
def reg():
    return fitted()


@pytest.fixture(scope="module")
def clf():
    return fitted(MAMLClassifier, labelled)


def mixed(model, share):
    """Copy of a model with other shares."""
    model = copy.copy(model)
    model.learner_weights_ = {HEAD: 1 - share, STEPS: share}
    return model


def test_the_default_predicts_by_the_head_where_it_is_better(reg):
    assert reg.learner_weights_[HEAD] > 0.5
    assert sum(reg.learner_weights_.values()) == 1
    X, y, task = slopes(seed=5)
    plain = fitted(update_rule="sgd")
    assert plain.learner_weights_ == {STEPS: 1.0}
    assert fitted(update_rule=HEAD).learner_weights_ == {HEAD: 1.0}
    assert reg.score(X, y, groups=task + 100) > plain.score(X, y, groups=task + 100)


@pytest.mark.parametrize("maml", [MAMLRegressor, MAMLClassifier])
def test_giving_a_default_value_changes_nothing(maml, request):
    data = slopes if maml is MAMLRegressor else labelled
    model = request.getfixturevalue("reg" if maml is MAMLRegressor else "clf")
    same = fitted(maml, data, alpha=0.03, steps=10 if maml is MAMLRegressor else 5, adapted="all")
    assert same.learner_weights_ == model.learner_weights_
    X, y, _ = data(seed=3)
    np.testing.assert_array_equal(
        same.adapt(X[:5], y[:5]).predict(X), copy.copy(model).adapt(X[:5], y[:5]).predict(X)
    )


def test_rates_set_after_fit_act_on_the_steps_and_never_exchange_the_model(reg):
    X, y, _ = slopes(seed=3)

    def predict(model):
        return model.adapt(X[:5], y[:5]).predict(X)

    head = mixed(reg, 0.0)
    np.testing.assert_array_equal(
        predict(copy.copy(head).set_params(alpha=0.01, steps=3)), predict(head)
    )
    half = mixed(reg, 0.5)
    steps = mixed(reg, 1.0)
    other = {"alpha": 0.01, "steps": 3}
    np.testing.assert_allclose(
        predict(copy.copy(half).set_params(**other)),
        (predict(head) + predict(copy.copy(steps).set_params(**other))) / 2,
        rtol=1e-9,
    )


@pytest.mark.parametrize("maml", [MAMLRegressor, MAMLClassifier])
def test_predictions_are_mixed_by_the_shares(maml, request):
    data, ask = (slopes, "predict") if maml is MAMLRegressor else (labelled, "predict_proba")
    model = request.getfixturevalue("reg" if maml is MAMLRegressor else "clf")
    X, y, _ = data(seed=3)
    answers = {s: getattr(mixed(model, s).adapt(X[:5], y[:5]), ask)(X) for s in (0.0, 0.3, 1.0)}
    assert not np.allclose(answers[0.0], answers[1.0])
    if maml is MAMLRegressor:
        expected = 0.7 * answers[0.0] + 0.3 * answers[1.0]
        np.testing.assert_allclose(answers[0.3], expected, rtol=1e-5, atol=1e-6)


def test_probabilities_are_mixed_not_logits():
    rng = RNG(0)
    p, q = (softmax(rng.randn(5, 3), axis=1) for _ in range(2))
    np.testing.assert_allclose(np.exp(CLASSES.mix(np.log(p), np.log(q), 0.3)), 0.7 * p + 0.3 * q)


def of_tasks(classification, n_tasks=12):
    """Targets of held-out tasks, good and bad outputs."""
    codes = np.repeat(np.arange(n_tasks), 20)
    rng = RNG(0)
    if classification:
        target = np.eye(2)[rng.randint(0, 2, len(codes))]
        good = np.log(0.8 * target + 0.2 * (1 - target))
        return target, good, np.log(np.full((len(codes), 2), 0.5)), codes
    target = rng.randn(len(codes), 1)
    return target, target + 0.1, target + 5.0, codes


@pytest.mark.parametrize("classification", [False, True])
def test_steps_get_a_share_where_held_out_tasks_show_a_gain(classification):
    target, good, bad, codes = of_tasks(classification)
    likelihood = CLASSES if classification else NORMAL
    task = np.arange(12)
    assert choose_share(good, bad, target, codes, task, likelihood) == 0.0
    assert choose_share(bad, good, target, codes, task, likelihood) == 0.9
    if not classification:  # errors of opposite signs cancel
        assert choose_share(target + 1, target - 1, target, codes, task, NORMAL) == 0.5


def test_steps_without_proof_or_that_explode_get_none():
    target, _, _, codes = of_tasks(False)
    task = np.arange(12)
    rng = RNG(1)
    noise = 0.1 * rng.randn(*target.shape)
    gain = np.repeat(np.where(np.arange(12) % 2, 0.9, 1.09), 20)[:, None]
    # better in half of the tasks, and a little so in the mean
    assert choose_share(target + noise, target + gain * noise, target, codes, task, NORMAL) == 0.0
    better = target + 0.1 * noise
    assert choose_share(target + noise, better, target, codes, task, NORMAL) > 0
    better[0] = 1e30  # of one task
    assert choose_share(target + noise, better, target, codes, task, NORMAL) == 0.0


def test_where_tasks_do_not_differ_adapting_does_no_harm():
    X, y, task = slopes(n_tasks=40, spread=0.0, noise=1.0)
    reg = MAMLRegressor(max_iter=100, random_state=0).fit(X, y, groups=task)
    X, y, task = slopes(n_tasks=100, spread=0.0, noise=1.0, seed=9)
    support = np.arange(len(y)) % 24 < 5
    reg.adapt(X[support], y[support], groups=task[support])
    predicted = reg.predict(X[~support], groups=task[~support])
    truth = 1 + X[~support] @ [2.0, -1.0]
    # the pooled truth leaves the noise of variance 1; per-task regression on 5 rows some 1.6
    assert ((predicted - y[~support]) ** 2).mean() < 1.05 * ((truth - y[~support]) ** 2).mean()


def test_probabilities_sum_to_one_and_adapting_tells(clf):
    X, y, task = labelled(seed=5)
    support = np.arange(len(y)) % 24 < 8
    model = copy.copy(clf).adapt(X[support], y[support], groups=task[support])
    p = model.predict_proba(X[~support], groups=task[~support])
    np.testing.assert_allclose(p.sum(1), 1)
    own = (model.predict(X[~support], groups=task[~support]) == y[~support]).mean()
    model.adapt(X[support], y[support], groups=(task[support] + 1) % 30)
    other = (model.predict(X[~support], groups=task[~support]) == y[~support]).mean()
    assert own > other + 0.1


def test_classes_come_as_often_as_they_do_where_tasks_share_labels():
    X, y, task = slopes(n_tasks=60, n_rows=40)
    y = np.where(y > np.quantile(y, 0.93), "rare", "common")
    clf = MAMLClassifier(max_iter=200, random_state=0).fit(X, y, groups=task)
    X, y, task = slopes(n_tasks=60, n_rows=40, seed=1)
    y = np.where(y > np.quantile(y, 0.93), "rare", "common")
    support = np.arange(len(y)) % 40 < 10
    clf.adapt(X[support], y[support], groups=task[support])
    p = clf.predict_proba(X[~support], groups=task[~support])[:, 1]
    assert 0.04 < p.mean() < 0.10  # a tenth of the rows in the sets that gradient steps get: .5


def test_predictions_end_near_the_range_of_the_targets(reg):
    X, y, _ = slopes(seed=3)
    far = adapt(mixed(reg, 0), X[:5], y[:5]).predict(np.array([[1e6, -1e6], [1e300, 1e300]]))
    span = slopes()[1].max() - slopes()[1].min()
    assert np.abs(far).max() < 2 * span


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
def test_features_of_any_scale_are_learned_in_closed_form():
    X, y, task = slopes(n_tasks=80)
    reg = MAMLRegressor(max_iter=200, random_state=0)
    with pytest.warns(NonFiniteStepWarning, match="closed form alone"):
        reg.fit(1e4 * X, y, groups=task)
    assert reg.learner_weights_ == {HEAD: 1.0, STEPS: 0.0}
    X, y, task = slopes(n_tasks=20, seed=5)
    assert reg.score(1e4 * X, y, groups=task + 100) > 0.95
    with pytest.raises(MetaTrainingError):
        reg.set_params(update_rule="sgd").fit(1e4 * X, y, groups=task)


def test_smooth_curves_are_followed_through_few_rows(monkeypatch):
    errors = []
    for n_waves in (sklearn_maml.learners.building.N_WAVES, 0):
        monkeypatch.setattr(sklearn_maml.learners.building, "N_WAVES", n_waves)
        tasks = make_sinusoid_tasks(n_tasks=40, random_state=0)
        reg = fitted(data=lambda: tasks, max_iter=400)  # noqa: B023
        X, y, task = make_sinusoid_tasks(n_tasks=30, random_state=1)
        support = np.arange(len(y)) % 20 < 5
        reg.adapt(X[support], y[support], groups=task[support])
        errors.append(np.square(reg.predict(X[~support], groups=task[~support]) - y[~support]))
    assert errors[0].mean() < 0.5 * errors[1].mean()


def test_few_held_out_tasks_train_no_steps_and_give_them_no_share():
    reg = fitted(max_iter=4)  # 30 tasks, of which four are held out
    assert reg.learner_weights_ == {HEAD: 1.0, STEPS: 0.0}
    assert "steps_valid_loss" not in reg.history_[0]
    more = fitted(max_iter=4, validation_fraction=0.4)
    assert "steps_valid_loss" in more.history_[0]
    rng = RNG(0)
    head, target = rng.randn(90, 1), np.zeros((90, 1))
    codes = np.repeat(np.arange(9), 10)
    assert choose_share(head, target, target, codes, np.arange(9), NORMAL) == 0
    assert choose_share(*(np.r_[a, a] for a in (head, target, target)),
                        np.repeat(np.arange(18), 10), np.arange(18), NORMAL) == 0.9  # fmt: skip


def test_the_start_is_left_only_where_held_out_tasks_show_a_gain():
    for n_tasks, kept in ((12, False), (8, True)):
        start = torch.linspace(0.5, 1.5, n_tasks)
        joint = Joint(trainer=HeldOutErrors(start), engine=None)
        assert joint.held_out({}) == pytest.approx(1.0)
        by_chance = 0.4 * (-1.0) ** torch.arange(n_tasks)  # smaller on average
        joint.trainer.errors = start - 0.05 - by_chance
        assert joint.held_out({}) == pytest.approx(1.0)
        joint.trainer.errors = 0.9 * start  # on every task; few prove nothing all the same
        assert joint.held_out({}) == pytest.approx(1.0 if kept else 0.9)
        # nothing is known of images at the start
        joint = Joint(trainer=HeldOutErrors(start, n_linear=0), engine=None)
        joint.held_out({})
        joint.trainer.errors = 0.99 * start
        assert joint.held_out({}) == pytest.approx(0.99)


class HeldOutErrors:
    """Stands for a trainer whose held-out errors are known, of rows with so many columns."""

    validation = (None,)

    def __init__(self, errors, n_linear=1):
        self.errors = errors
        self.head = SimpleNamespace(center=np.ones(n_linear))

    def held_out_errors(self, meta_params):
        return self.errors


# -- uncertainty ---------------------------------------------------------------------------------


def unequal(n_tasks, seed):
    """Tasks that are as sure of themselves as they are noisy: by a factor of ten."""
    X, y, task = slopes(n_tasks, noise=0.0, seed=seed)
    noise = np.where(np.arange(n_tasks) % 2, 1.0, 0.1)
    return X, y + noise[task] * RNG(seed + 100).randn(len(y)), task, noise


def test_intervals_are_as_wide_as_the_noise_of_a_task(reg):
    X, y, task, _ = unequal(60, 0)
    model = MAMLRegressor(max_iter=100, random_state=0).fit(X, y, groups=task)
    assert model.calibration_.freedom[0] <= 4  # and large where all tasks are alike
    assert model.calibration_.of_noise[0]
    assert reg.calibration_.freedom[0] >= 32
    X, y, task, noise = unequal(100, 1)
    support = np.arange(len(y)) % 24 < 15
    X_support, y_support, task_support = X[support], y[support], task[support]
    model.adapt(X_support, y_support, groups=task_support)
    X, y, task = X[~support], y[~support], task[~support]
    mean, std = model.predict(X, groups=task, return_std=True)
    assert 0.85 < (np.abs(mean - y) < 1.645 * std).mean() < 0.95
    alike = copy.copy(model)
    alike.calibration_ = dataclasses.replace(model.calibration_, freedom=None)
    alike.adapt(X_support, y_support, groups=task_support)

    def ratio_and_part_inside(model):
        mean, std = model.predict(X, groups=task, return_std=True)
        noisy = noise[task] == 1.0
        inside = np.abs(mean - y) < 1.645 * std
        return std[noisy].mean() / std[~noisy].mean(), inside[noisy].mean()

    (ratio, inside), (of_alike, inside_alike) = map(ratio_and_part_inside, (model, alike))
    assert ratio > 3 > 1.15 > of_alike
    assert inside > 0.79 > inside_alike


def test_misfit_is_the_mahalanobis_length_of_support_targets():
    head = random_head()
    rng = RNG(1)
    X, y = torch.as_tensor(rng.randn(2, 5, 3)), torch.as_tensor(rng.randn(2, 5, 1))
    run = head.functions(dict(head.named_parameters()))
    misfit, n_rows = run.misfit(run.condition(X, y))
    assert n_rows.unique().tolist() == [5]
    for j in range(2):
        for t in range(2):
            phi, cov, prior, noise, _ = in_numpy(head, j, X[t].numpy())
            system = phi @ cov @ phi.T + noise[0] * np.eye(5)
            residual = (y[t].numpy() - phi @ prior)[:, 0]
            expected = residual @ np.linalg.solve(system, residual)
            assert misfit[j, t, 0].item() == pytest.approx(expected, rel=1e-9)


def test_the_scale_of_the_noise_is_told_by_what_the_weights_leave_of_the_targets():
    head = random_head()
    rng = RNG(1)
    X, y = torch.as_tensor(rng.randn(2, 25, 3)), torch.as_tensor(rng.randn(2, 25, 1))
    run = head.functions(dict(head.named_parameters()))
    freedom = torch.tensor([3.0], dtype=torch.float64)
    for n in (0, 5, 25):  # none, fewer, and more rows than columns
        given = run.condition(X[:, :n], y[:, :n])
        found = run.spread(given, Scale(freedom, torch.zeros_like(freedom)))
        for j in range(2):
            for t in range(2):
                phi, cov, prior, noise, _ = in_numpy(head, j, X[t, :n].numpy())
                hat = phi @ cov @ phi.T @ np.linalg.inv(phi @ cov @ phi.T + noise[0] * np.eye(n))
                residual = (np.eye(n) - hat) @ (y[t, :n].numpy() - phi @ prior)[:, 0]
                expected = (3 + residual @ residual / noise[0]) / (3 + n - np.trace(hat))
                assert found[j, t, 0].item() == pytest.approx(expected, rel=1e-8)


def test_intervals_hold_what_they_promise(reg):
    X, y, task = slopes(n_tasks=200, seed=7)
    support = np.arange(len(y)) % 24 < 5
    reg = copy.copy(reg).adapt(X[support], y[support], groups=task[support])
    mean, std = reg.predict(X[~support], groups=task[~support], return_std=True)
    assert mean.shape == std.shape == (int((~support).sum()),)
    inside = np.abs(mean - y[~support]) < 1.645 * std
    assert 0.85 <= inside.mean() <= 0.97


@pytest.mark.parametrize("loss", ["squared_error", "absolute_error"])
def test_intervals_of_noise_with_heavy_tails_hold_half_and_nine_tenths(loss):
    # a factor for nine tenths alone makes them hold .93 and .68
    def drawn(n_tasks, seed):
        X, y, task = slopes(n_tasks, noise=0.0, seed=seed)
        rng = RNG(seed + 100)
        noise = rng.randn(len(y)) * np.where(rng.uniform(size=len(y)) < 0.08, 10, 1)
        return X, y + 0.1 * noise, task

    X, y, task = drawn(60, 0)
    reg = MAMLRegressor(
        update_rule=HEAD, loss=loss, hidden_layer_sizes=(8,), max_iter=5, random_state=0
    ).fit(X, y, groups=task)
    X, y, task = drawn(300, 1)
    support = np.arange(len(y)) % 24 < 10
    reg.adapt(X[support], y[support], groups=task[support])
    mean, std = reg.predict(X[~support], groups=task[~support], return_std=True)
    far = np.abs(mean - y[~support]) / std
    assert 0.85 < (far < 1.645).mean() < 0.95
    assert (far < 0.6745).mean() < 0.64
    # no standard deviation does both; quantiles do
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = reg.predict(X[~support], groups=task[~support], return_quantiles=levels)[1]
    below = y[~support][:, None] < quantiles
    np.testing.assert_allclose(below.mean(0), levels, atol=0.03)
    ends = (quantiles[:, 4] - quantiles[:, 0]) / (quantiles[:, 3] - quantiles[:, 1])
    assert ends.min() > 3  # 2.44 of a normal distribution


def test_disagreement_of_members_counts_once():
    # the mean of five members errs less than one of them, by what its variance has besides
    rng = RNG(0)
    shared, own = rng.randn(4000, 1), rng.randn(4000, 5)
    outputs, ones, n_tasks = 0.5 * own, np.ones((4000, 1)), np.zeros(4000, int)
    between = outputs.var(1, keepdims=True)
    held_out = _Deviations(5, shared - outputs[:, :1], *[ones] * 5, between, n_tasks, weight=None)
    error = shared[:, 0] - outputs.mean(1)
    variance = held_out.factor(None) ** 2 + between[:, 0]
    assert 0.885 < (np.abs(error) < 1.645 * np.sqrt(variance)).mean() < 0.915
    twice = held_out.error.var() + between[:, 0]
    assert (np.abs(error) < 1.645 * np.sqrt(twice)).mean() > 0.935


def test_factors_between_sizes_of_support_sets_are_interpolated():
    factor = np.array([[1.0, 2.0], [4.0, 2.0]])
    made = Calibration(np.zeros(2), np.ones(2), factor=factor, sizes=np.array([0.0, 8.0]))
    found = made.factors(np.array([0, 2, 8, 100]), unseen=False)
    np.testing.assert_allclose(found, [[1, 2], [2, 2], [4, 2], [4, 2]])


def of_designs(designs, n_tasks, seed, effect=None):
    """Tasks that differ in level, of the same rows, whose effects their features do not tell."""
    rng, effect = RNG(seed), RNG(0).randn(len(designs)) if effect is None else effect
    task = np.repeat(np.arange(n_tasks), len(designs))
    row = np.tile(np.arange(len(designs)), n_tasks)
    y = 2 * rng.randn(n_tasks)[task] + effect[row] + 0.2 * rng.randn(len(row))
    return designs[row], y, task, row


@pytest.mark.parametrize("told", [True, False])
def test_rows_that_no_task_had_have_factors_of_their_own(told):
    designs = RNG(0).randn(30, 12)
    X, y, task, _ = of_designs(designs, 40, seed=1, effect=designs[:, 0] if told else None)
    reg = quick(hidden_layer_sizes=(8,)).fit(X, y, groups=task)
    factor, of_unseen = reg.calibration_.factor, reg.calibration_.factor_unseen
    assert reg.calibration_.sizes[0] == 0
    assert of_unseen[0] == factor[0]  # it is the task that nothing is known of
    ratio = of_unseen[1:] / factor[1:]
    assert ratio.min() >= 1
    assert ratio.max() < 1.2 if told else ratio.min() > 1.5


def test_a_row_that_alone_has_some_value_is_not_hidden_from_a_member():
    X, y, task, _ = of_designs(np.eye(30), n_tasks=40, seed=1)
    reg = quick(hidden_layer_sizes=(8,), random_state=0).fit(X, y, groups=task)
    X, y, task, row = of_designs(np.eye(30), n_tasks=60, seed=2)
    support = (row + task) % 30 < 5
    reg.adapt(X[support], y[support], groups=task[support])
    mean, std = reg.predict(X[~support], groups=task[~support], return_std=True)
    error = mean - y[~support]
    assert np.sqrt((error**2).mean()) < 0.25  # the noise is .2
    assert 0.85 < (np.abs(error) < 1.645 * std).mean() < 0.95


def test_standard_deviation_shrinks_with_support_and_is_at_least_the_noise(reg):
    X, y, _ = slopes(seed=7)
    few = adapt(reg, X[:2], y[:2]).predict(X[24:48], return_std=True)[1]
    many = adapt(reg, X[:24], y[:24]).predict(X[24:48], return_std=True)[1]
    assert (many < few).mean() > 0.9
    assert many.min() > 0.05


def test_mixtures_are_less_sure_where_the_two_ways_differ(reg):
    X, y, _ = slopes(seed=3)
    alone, half = (mixed(reg, s).adapt(X[:5], y[:5]) for s in (0.0, 0.5))
    mean, std = alone.predict(X, return_std=True)
    mean_of_half, std_of_half = half.predict(X, return_std=True)
    np.testing.assert_allclose(mean_of_half, half.predict(X), rtol=1e-12)
    np.testing.assert_allclose(std_of_half**2, std**2 + (mean_of_half - mean) ** 2, rtol=1e-6)


def test_outputs_have_a_noise_of_their_own():
    X, y, task = slopes()
    noise = RNG(0).randn(len(y))
    Y = np.c_[y, noise, 100 * y]
    reg = MAMLRegressor(max_iter=100, random_state=0).fit(X, Y, groups=task)
    alone = MAMLRegressor(max_iter=100, random_state=0).fit(X, y, groups=task)
    X, y, task = slopes(n_tasks=60, seed=7)
    Y = np.c_[y, RNG(1).randn(len(y)), 100 * y]
    support = np.arange(len(y)) % 24 < 8
    query = ~support
    errors = []
    for model, target in ((reg, Y), (alone, Y[:, :1])):
        model.adapt(X[support], np.squeeze(target[support]), groups=task[support])
        mean, std = model.predict(X[query], groups=task[query], return_std=True)
        mean, std = (a.reshape(len(target[query]), -1) for a in (mean, std))
        inside = (np.abs(mean - target[query]) < 1.645 * std).mean(0)
        assert ((inside > 0.8) & (inside <= 1)).all()
        errors.append(np.sqrt(((mean - target[query]) ** 2).mean(0)))
    assert errors[0][0] < 1.5 * errors[1][0]  # a column of noise beside it does little harm
    assert errors[0][1] < 1.15
    np.testing.assert_allclose(errors[0][2], 100 * errors[0][0], rtol=0.3)


def test_quantiles_have_the_shape_of_predictions_and_one_more_axis(reg):
    X, y, task = slopes(n_tasks=3, seed=7)
    Y, levels = np.c_[y, 10 * y], [0.1, 0.5, 0.9]
    one = slopes(8, 8)
    two = quick().fit(one[0], np.c_[one[1], 10 * one[1]], groups=one[2])
    for model, target in ((reg, y), (two, Y)):
        model = copy.copy(model).adapt(X, target, groups=task)
        mean, std, quantiles = model.predict(
            X, groups=task, return_std=True, return_quantiles=levels
        )
        assert quantiles.shape == (*mean.shape, 3)
        np.testing.assert_allclose(quantiles[..., 1], mean, rtol=1e-6)
        spread = (quantiles[..., 2] - mean) / std
        np.testing.assert_allclose(spread, spread[:1] + 0 * spread, rtol=1e-4)
        sets = [(X[task == j], target[task == j]) for j in range(3)]
        parts = model.adapt(sets).predict([X for X, _ in sets], return_quantiles=levels)[1]
        np.testing.assert_allclose(np.concatenate(parts), quantiles, rtol=1e-6)


def test_quantiles_are_normal_where_nothing_is_known_of_tails():
    made = Calibration(np.zeros(2), np.ones(2))
    np.testing.assert_allclose(
        made.multiples(np.array([0.25, 0.95])), [[-0.6745, 1.6449]] * 2, 1e-4
    )
    nearly = dataclasses.replace(made, tails=np.array([1e4, 3.0]))
    normal, heavy = nearly.multiples(np.array([0.75, 0.95]))
    np.testing.assert_allclose(normal, [0.6745, 1.6449], rtol=1e-3)
    assert heavy[0] < 0.62 < 1.8 < heavy[1]
    np.testing.assert_allclose(heavy.prod(), normal.prod(), rtol=1e-3)


@pytest.mark.parametrize("levels", [0.5, (0, 0.5), (0.5, 1.0), ("a",), [[0.5]], (np.nan,)])
def test_levels_of_quantiles_are_between_0_and_1(reg, levels):
    X, y, _ = slopes(seed=3)
    with pytest.raises(ValueError, match="return_quantiles has to be a sequence of levels"):
        adapt(reg, X[:5], y[:5]).predict(X, return_quantiles=levels)


def test_quantiles_need_a_gaussian_head_and_targets_about_predictions():
    X, y, _ = slopes(seed=3)
    steps = fitted(update_rule="sgd", max_iter=3).adapt(X[:5], y[:5])
    with pytest.raises(ValueError, match="return_quantiles needs a learner that knows"):
        steps.predict(X, return_quantiles=[0.5])
    counts = MAMLRegressor(loss="poisson", hidden_layer_sizes=(8,), max_iter=2, random_state=0)
    y = np.abs(y).round()
    counts.fit(X, y, groups=np.arange(len(y)) % 8).adapt(X[:5], y[:5])
    with pytest.raises(ValueError, match="return_quantiles is for losses whose targets"):
        counts.predict(X, return_quantiles=[0.5])


def test_steps_alone_have_no_standard_deviation():
    X, y, _ = slopes(seed=3)
    with pytest.raises(ValueError, match="gaussian-head"):
        fitted(update_rule="sgd", max_iter=3).adapt(X[:5], y[:5]).predict(X, return_std=True)


def test_few_shot_regressor_and_pipelines_return_deviations_and_quantiles():
    X, y, task = slopes(12, 12)
    model = MAMLRegressor(max_iter=4, random_state=0, update_rule=HEAD)
    with config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), model).fit(X, y, groups=task)
        adapted = adapt(pipe, X[:24], y[:24], groups=task[:24])
        options = {"return_std": True, "return_quantiles": (0.1, 0.9)}
        found = adapted.predict(X[:12], groups=task[:12], **options)
    few = FewShotRegressor(pipe).fit(X[:12], y[:12])
    for one, other in zip(few.predict(X[:12], **options), found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)
    np.testing.assert_allclose(few.predict(X[:12]), few.predict(X[:12], return_std=True)[0])


# -- weights, tasks, threads, files --------------------------------------------------------------


def test_weights_of_one_are_no_weights(reg):
    X, y, _ = slopes(seed=5)
    weighted, equal, plain = (
        copy.copy(reg).adapt(X[:8], y[:8], sample_weight=w).predict(X[8:])
        for w in (RNG(0).randint(0, 3, 8), np.ones(8), None)
    )
    np.testing.assert_allclose(equal, plain, rtol=1e-9)
    assert not np.allclose(weighted, plain)


@pytest.mark.parametrize("kind", ["reg", "clf"])
def test_tasks_adapted_together_are_those_adapted_alone(kind, request):
    model = request.getfixturevalue(kind)
    X, y, task = (slopes if kind == "reg" else labelled)(seed=5)
    support = np.flatnonzero(np.arange(len(y)) % 24 < task % 7 + 1)  # 1 to 7 rows
    many = copy.copy(model).adapt(X[support], y[support], groups=task[support])
    for j in (0, 3, 6):
        own, rows = support[task[support] == j], task == j
        one = adapt(model, X[own], y[own])
        ask = "predict" if kind == "reg" else "predict_proba"
        alone = getattr(one, ask)(X[rows])
        np.testing.assert_allclose(
            getattr(many, ask)(X[rows], groups=task[rows]), alone, rtol=1e-8, atol=1e-10
        )
        if kind == "reg":
            std = many.predict(X[rows], groups=task[rows], return_std=True)[1]
            np.testing.assert_allclose(one.predict(X[rows], return_std=True)[1], std, rtol=1e-8)


def test_same_seed_same_head_and_survives_pickling(reg):
    again = fitted()
    for one, other in zip(
        reg.net_.module_.head.parameters(), again.net_.module_.head.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    X, y, _ = slopes(seed=3)
    model = copy.copy(reg).adapt(X[:5], y[:5])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["reg", "clf"])
def test_saved_models_predict_and_adapt_as_they_did(kind, share, request, tmp_path):
    model = mixed(request.getfixturevalue(kind), share)
    X, y, _ = (slopes if kind == "reg" else labelled)(seed=3)
    model.adapt(X[:5], y[:5])
    model.save(tmp_path / "model.safetensors")
    same = type(model).load(tmp_path / "model.safetensors")
    assert same.learner_weights_ == model.learner_weights_
    for _ in range(2):
        if kind == "reg" and share < 1:
            options = {"return_std": True, "return_quantiles": (0.1, 0.9)}
            for one, other in zip(
                model.predict(X, **options), same.predict(X, **options), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        ask = "predict" if kind == "reg" else "predict_proba"
        np.testing.assert_array_equal(getattr(model, ask)(X), getattr(same, ask)(X))
        model.adapt(X[5:9], y[5:9])
        same.adapt(X[5:9], y[5:9])


@pytest.mark.parametrize("kind", ["reg", "clf"])
def test_threads_that_serve_from_one_model_give_the_bits_of_one(kind, request):
    model = mixed(request.getfixturevalue(kind), 0.5)  # both ways at once
    X, y, task = (slopes if kind == "reg" else labelled)(seed=5)
    before = copy.deepcopy(model.net_.module_.state_dict())

    def serve(j):
        rows = np.flatnonzero(task == j % 30)
        adapted = adapt(model, X[rows[:7]], y[rows[:7]])
        if kind == "reg":
            return adapted.predict(X[rows], return_std=True)
        return (adapted.predict_proba(X[rows]),)

    expected = [serve(j) for j in range(64)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(serve, range(64)))
    for one, other in zip(expected, got, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    for name, value in model.net_.module_.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_torchs_defaults_change_nothing():
    X, y, task = slopes(12, 12)
    expected = quick().fit(X, y, groups=task)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            got = quick().fit(X, y, groups=task)
            got.adapt(X[:5], y[:5]).predict(X, return_std=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.net_.module_.state_dict().items():
        torch.testing.assert_close(value, got.net_.module_.state_dict()[name], rtol=0, atol=0)


# -- the kinds of tasks --------------------------------------------------------------------------


def quick(maml=MAMLRegressor, **params):
    return maml(**{"max_iter": 4, "random_state": 0, "update_rule": HEAD, **params})


@pytest.mark.parametrize("rule", [HEAD, "auto"])
class TestEveryKindOfTasks:
    def check(self, model, X, y):
        model.adapt(X[:6], y[:6])
        before = model.predict(X[6:12])
        if isinstance(model, MAMLRegressor) and model.learner_weights_[HEAD]:
            mean, std = model.predict(X[6:12], return_std=True)
            assert np.isfinite(mean).all()
            assert (std > 0).all()
        elif isinstance(model, MAMLClassifier):
            np.testing.assert_allclose(model.predict_proba(X[6:12]).sum(1), 1)
        return before

    def test_distribution(self, rule):
        model = quick(update_rule=rule).fit(SinusoidTasks(n_rows=20))
        assert HEAD in model.learner_weights_
        X, y = SinusoidTasks(n_rows=20).sample(1, random_state=0)[0]
        self.check(model, X, y)

    def test_tasks_that_come_split(self, rule):
        X, y, task = slopes(12, 20)
        tasks = [
            (X[task == j][:8], y[task == j][:8], X[task == j][8:], y[task == j][8:])
            for j in range(12)
        ]
        self.check(quick(update_rule=rule).fit(tasks), X, y)

    def test_several_targets(self, rule):
        X, y, task = slopes(12, 20)
        Y = np.c_[y, X[:, 0]]
        self.check(quick(update_rule=rule).fit(X, Y, groups=task), X, Y)

    def test_module_of_ones_own(self, rule, tmp_path):
        X, y, task = slopes(12, 20)
        model = quick(update_rule=rule, module=Residual, max_iter=20).fit(X, y, groups=task)
        expected = self.check(model, X, y)
        model.save(tmp_path / "m")
        same = MAMLRegressor.load(tmp_path / "m", module=Residual)
        np.testing.assert_array_equal(same.predict(X[6:12]), expected)

    def test_local_labels(self, rule):
        rng = RNG(0)
        centers = 3 * rng.randn(40, 4)
        y = np.repeat(np.arange(40), 12)
        X = centers[y] + rng.randn(480, 4)
        groups = y // 8
        for given in (groups, None):  # alphabets, and one pool
            model = quick(MAMLClassifier, update_rule=rule, n_ways=4, n_shots=2, max_iter=60)
            model.fit(X, y, groups=given)
            assert model.learner_weights_[HEAD] > 0
            rows = np.flatnonzero(y < 4)
            model.adapt(X[rows[::6]], y[rows[::6]])
            assert (model.predict(X[rows]) == y[rows]).mean() > 0.8
            assert model.predict_proba(X[rows]).shape == (48, 4)

    def test_ragged_tasks_and_wide_tables(self, rule):
        rng = RNG(0)
        X = rng.randn(90, 120)
        task = np.repeat(np.arange(20), np.r_[np.full(10, 2), np.full(10, 7)])
        y = X[:, 0] + 0.1 * rng.randn(90)
        self.check(quick(update_rule=rule).fit(X, y, groups=task), X, y)

    def test_features_of_the_tasks_alone(self, rule):
        _, y, task = slopes(20, 30)
        X = RNG(1).randn(20, 2)[task]
        for seed in range(3):  # of the tasks held out, some have unseen rows and some have none
            self.check(quick(update_rule=rule, random_state=seed).fit(X, y, groups=task), X, y)

    @pytest.mark.parametrize("rare", [3, None])
    def test_members_may_see_a_single_class(self, rule, rare):
        X, _, task = slopes(10, 12)
        y = np.where((task == rare) & (np.arange(len(task)) % 2 == 0), "rare", "common")
        clf = quick(MAMLClassifier, update_rule=rule).fit(X, y, groups=task)
        p = clf.adapt(X[:5], y[:5]).predict_proba(X)
        assert p.shape == (120, 1 if rare is None else 2)
        np.testing.assert_allclose(p.sum(1), 1)
        assert (clf.predict(X[:12]) == "common").all()

    def test_few_tasks(self, rule):
        X, y, task = slopes(5, 20)
        model = quick(update_rule=rule).fit(X, y, groups=task)
        assert HEAD in model.learner_weights_
        self.check(model, X, y)


def normed(**options):
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"module": normed(track_running_stats=False)}, "without running averages"),
        ({"module": normed(), "engine__batch_norm": "transductive"}, "statistics of query rows"),
        ({"module": nn.Sequential(nn.Linear(2, 1), nn.Tanh())}, "linear"),
        ({"center_y": True}, "center_y"),
    ],
)
def test_what_a_head_cannot_do_is_refused_before_training(params, message):
    X, y, task = slopes(12, 12)
    with pytest.raises(ValueError, match=message):
        quick(max_iter=10**9, **params).fit(X, y, groups=task)
    auto = quick(update_rule="auto", **params).fit(X, y, groups=task)
    assert auto.learner_weights_ == {STEPS: 1.0}


def test_one_task_is_learned_by_steps_and_refused_to_the_head():
    X, y, _ = slopes(1, 30)
    with pytest.warns(UserWarning, match="one task"):
        assert quick(update_rule="auto").fit(X, y).learner_weights_ == {STEPS: 1.0}
    with (
        pytest.warns(UserWarning, match="one task"),
        pytest.raises(ValueError, match="how tasks differ"),
    ):
        quick().fit(X, y)


# -- the one outer loop --------------------------------------------------------------------------


def test_steps_that_fall_behind_are_given_up_and_training_ends_with_the_head():
    X, y, task = make_sinusoid_tasks(n_tasks=80, random_state=0)
    reg = MAMLRegressor(random_state=0).fit(X, y, groups=task)
    rows = list(reg.history_)
    assert "steps_valid_loss" in rows[0]
    assert "steps_valid_loss" not in rows[-1]
    assert reg.n_iter_ == 600 == sum(row["train_batch_count"] for row in rows)
    assert reg.learner_weights_ == {HEAD: 1.0, STEPS: 0.0}
    assert all(p.requires_grad for p in reg.net_.module_.parameters())


@pytest.mark.parametrize("spoilt", [False, True])
def test_steps_are_compared_with_the_head_that_is_kept(spoilt):
    n_tasks = 20
    joint = Joint(SimpleNamespace(n_judges=n_tasks), engine=object())
    of_steps = torch.linspace(1.0, 2.0, n_tasks)
    of_start = 0.5 * of_steps
    given_up = []
    for k in range(3):
        of_head = of_steps + 1 if spoilt else of_start - 0.1 * k
        joint.compare(of_head, of_steps, of_start if k == 0 else of_head)
        if not spoilt:
            joint.keep()
        given_up.append(joint.fall_behind())
    assert given_up == [False, True, True]
    assert torch.equal(joint.kept, (of_start if spoilt else of_head).double())
    # those of a head that is no better than steps
    joint.compare(of_steps, of_steps, of_steps)
    joint.keep()
    assert not joint.fall_behind()


def test_steps_end_where_training_spoils_a_start_that_they_do_not_reach():
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(1200, 60)), np.repeat(np.arange(100), 12)
    y = (X[:, :3] * (1 + 0.5 * rng.normal(size=(100, 3)))[task]).sum(1)
    # a rate at which the head is worse than steps by the second validation
    settings = {"max_iter": 400, "hidden_layer_sizes": (8,), "steps": 1, "beta": 0.03}
    rows = list(MAMLRegressor(random_state=0, **settings).fit(X, y, groups=task).history_)
    assert rows[1]["valid_loss"] > rows[1]["steps_valid_loss"]
    assert "steps_valid_loss" not in rows[2]


@pytest.mark.parametrize(("n_features", "updates"), [(100, 400), (110, 100)])
def test_training_of_many_features_ends_once_it_has_spoilt_the_start(n_features, updates):
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(400, n_features)), np.repeat(np.arange(50), 8)
    y = X[:, :50].sum(1) + rng.normal(size=400)
    settings = {"max_iter": 1000, "hidden_layer_sizes": (4,), "meta_batch_size": 8}
    reg = quick(beta=0.01, **settings).fit(X, y, groups=task)
    assert reg.n_iter_ == updates


@pytest.mark.parametrize("overfits", [False, True])
def test_a_head_is_past_its_best_when_it_is_behind_that_twice_in_a_row(overfits):
    head = SimpleNamespace(overfits_soon=overfits)
    joint = Joint(SimpleNamespace(head=head), engine=None)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint.best = torch.zeros(20, dtype=torch.float64)
    past = []
    for mean in (1.0, 0.1, 1.0, 1.0):  # .1 is within three standard errors
        joint.latest = mean + noise - noise.mean()
        past.append(joint.is_past_its_best())
    assert past == [False, False, False, overfits]
    joint.latest, joint.best = joint.latest[:2], joint.best[:2]
    assert not joint.is_past_its_best()  # few tasks


def test_the_table_says_which_learners_predict(capsys):
    reg = fitted(max_iter=4, verbose=1)
    assert "gaussian-head" in capsys.readouterr().out
    assert reg.learner_weights_[HEAD] > 0


def test_early_stopping_ends_all_of_the_fit():
    reg = fitted(max_iter=2000, early_stopping=True, n_iter_no_change=1)
    assert reg.n_iter_ < 1000
    assert reg.n_iter_ == len(reg.history_) * 50


def test_without_held_out_tasks_the_head_predicts_alone():
    reg = fitted(early_stopping=False, max_iter=4)
    assert reg.learner_weights_ == {HEAD: 1.0}
    assert "valid_loss" not in reg.history_[-1]


def test_a_continued_fit_goes_on_where_the_head_was():
    X, y, task = make_sinusoid_tasks(n_tasks=40, random_state=0)
    reg = quick(max_iter=200, warm_start=True).fit(X, y, groups=task)
    before = copy.deepcopy(reg.net_.module_.head.state_dict())
    reg.fit(X, y, groups=task)
    assert reg.n_iter_ == 200  # 60 % of each in whole epochs
    after = reg.net_.module_.head.state_dict()
    # nearer to what was learned than to the start
    start = quick(max_iter=1).fit(X, y, groups=task).net_.module_.head.state_dict()
    moved, apart = (
        sum(float((after[name] - other[name]).square().sum()) for name in after)
        for other in (before, start)
    )
    assert 0 < moved < apart


def test_reptile_moves_steps_by_its_own_size_and_the_head_by_the_optimiser():
    X, y, task = make_sinusoid_tasks(n_tasks=40, random_state=0)
    settings = {"update_rule": "auto", "meta_gradient": "reptile", "max_iter": 100}
    fast, slow = (
        dict(quick(beta=b, **settings).fit(X, y, groups=task).net_.module_.named_parameters())
        for b in (3e-3, 1e-12)
    )
    for part in ("module", "head"):
        differ = [not torch.equal(p, slow[n]) for n, p in fast.items() if n.startswith(part)]
        assert any(differ) == (part == "head")


@pytest.mark.parametrize("n_support", [10, 50])
def test_return_std_costs_no_more_than_three_predictions(n_support):
    X, y, task = slopes(n_tasks=150, n_rows=70)
    reg = quick().fit(X, y, groups=task)
    support = np.arange(len(y)) % 70 < n_support
    reg.adapt(X[support], y[support], groups=task[support])
    rows, groups = X[~support], task[~support]

    def seconds(**options):
        begun = time.process_time()
        reg.predict(rows, groups=groups, **options)
        return time.process_time() - begun

    seconds(), seconds(return_std=True)
    assert min(seconds(return_std=True) for _ in range(5)) < 3 * min(seconds() for _ in range(5))


@pytest.mark.parametrize("loss", ["squared_error", "poisson"])
def test_posteriors_are_kept_for_the_variance_where_they_fit(loss, monkeypatch):
    X, y, task = slopes(n_tasks=12, n_rows=120)
    y = y if loss == "squared_error" else np.exp(y / 4).round()
    reg = quick(loss=loss, hidden_layer_sizes=(4,)).fit(X, y, groups=task)
    sizes = 2 + np.arange(12) % 5 * 22
    assert sizes.min() < reg._learner.head.n_columns < sizes.max()
    number = np.arange(len(y)) % 120
    support = number < sizes[task]
    asked = np.flatnonzero(~support & (number % (1 + task) == 0) & (task != 3))[::-1]
    rows, groups = X[asked], task[asked]
    before, more = support & (number != 0), support & (number == 0) & (task < 6)
    found = []
    for most in (2**27, 0):
        monkeypatch.setattr(sklearn_maml.learners.conditioned, "MOST_KEPT", most)
        reg.adapt(X[before], y[before], groups=task[before])
        assert bool(reg._state.adapted.kept) == bool(most)
        found.append([*reg.predict(rows, groups=groups, return_std=True)])
        if loss == "squared_error":  # rows of some tasks: those of the others are still kept
            reg.adapt(X[more], y[more], groups=task[more], extend=True)
            assert bool(reg._state.adapted.kept) == bool(most)
            found[-1] += reg.predict(rows, groups=groups, return_std=True)
    for kept, anew in zip(*found, strict=True):
        np.testing.assert_allclose(kept, anew, rtol=1e-9)


def test_module_bodies_share_no_modules_with_their_private_copies():
    body = ModuleBody([nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))], 3)
    private = body.private()
    assert private.members[0] is not body.members[0]
    assert next(private.parameters()) is next(body.parameters())
    assert not private.training


@pytest.mark.parametrize("level", [-3.7, 0.0])
def test_probabilities_are_as_high_as_a_class_is_frequent(level):
    rng = RNG(0)
    X = rng.randn(160, 40, 3)
    logit = level + 0.7 * rng.randn(160, 1) + X[..., 0] * (1.5 + 0.5 * rng.randn(160, 1))
    y = (logit + rng.logistic(size=(160, 40)) > 0).astype(int)
    task = np.repeat(np.arange(160), 40).reshape(160, 40)
    clf = MAMLClassifier(update_rule=HEAD, hidden_layer_sizes=(16,), max_iter=300, random_state=0)
    clf.fit(X[:100].reshape(-1, 3), y[:100].ravel(), groups=task[:100].ravel())
    clf.adapt(X[100:, :5].reshape(-1, 3), y[100:, :5].ravel(), groups=task[100:, :5].ravel())
    p = clf.predict_proba(X[100:, 5:].reshape(-1, 3), groups=task[100:, 5:].ravel())[:, 1]
    new = y[100:, 5:].ravel()
    assert abs(p.mean() - new.mean()) < 0.12 * new.mean()
    base = y[:100].mean()
    assert -np.log(np.where(new, p, 1 - p)).mean() < -np.log(np.where(new, base, 1 - base)).mean()


def test_classes_that_are_not_as_frequent_as_others_are_no_likelier_without_rows():
    rng = RNG(1)
    X = rng.randn(80, 30, 2)
    slopes = rng.randn(80, 1, 2, 3) + np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    logits = (X[..., None] * slopes).sum(2) + np.array([1.0, 0.0, 0.0])
    y = (logits + rng.gumbel(size=logits.shape)).argmax(-1).ravel()
    X, task = X.reshape(-1, 2), np.repeat(np.arange(80), 30)
    options = {"hidden_layer_sizes": (8,), "max_iter": 300, "random_state": 0}
    clf = MAMLClassifier(update_rule=HEAD, unseen_tasks="prior", **options)
    clf.fit(X, y, groups=task)
    p = clf.predict_proba(X, groups=task + 100).mean(0)
    np.testing.assert_allclose(p, np.bincount(y) / len(y), rtol=0.08)
