"""Closed-form adaptation under a learned prior: exactness, choice, uncertainty, do-no-harm."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn import config_context
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sklearn_maml.posterior
from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor, adapt
from sklearn_maml.exceptions import (
    InterruptedFitWarning,
    MetaTrainingError,
    NonFiniteStepWarning,
)
from sklearn_maml.posterior import (
    PosteriorEnsemble,
    _Episodes,
    _mixed_model,
    _Model,
    _padded,
    find_weight,
)

RNG = np.random.RandomState


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


def random_model(classification=False, n_features=3, n_outputs=1, seed=0):
    rng = RNG(seed)
    width = 64
    params = {
        "w1": rng.randn(n_features, width),
        "b1": rng.randn(width),
        "w2": rng.randn(width, width) / 8,
        "b2": rng.randn(width),
        "mean": 0.1 * rng.randn(1 + n_features + width, n_outputs),
        "factor": rng.randn(1 + n_features, 1 + n_features),
        "log_scale": rng.randn(width) - 2,
        "log_noise": np.array(-1.0),
    }
    return _Model({name: torch.as_tensor(p) for name, p in params.items()}, classification)


def columns_and_covariance(model, X):
    """phi(x) and the prior covariance, written out anew."""
    p = {name: value.numpy() for name, value in model.params.items()}
    h = np.maximum(X @ p["w1"] + p["b1"], 0)
    h = np.maximum(h @ p["w2"] + p["b2"], 0) * 2 / 8
    phi = np.c_[np.ones(len(X)), X, h]
    n = X.shape[1] + 1
    cov = np.zeros((phi.shape[1], phi.shape[1]))
    cov[:n, :n] = p["factor"] @ p["factor"].T
    cov[n:, n:] = np.diag(np.exp(2 * p["log_scale"]))
    return phi, cov, p["mean"], np.exp(2 * p["log_noise"]) + 1e-5


@pytest.mark.parametrize("n_support", [1, 6, 200])  # fewer and more rows than columns
def test_posterior_is_that_of_bayesian_linear_regression(n_support):
    model, rng = random_model(), RNG(1)
    X, y, X_new = rng.randn(n_support, 3), rng.randn(n_support, 1), rng.randn(7, 3)
    phi, cov, mean, noise = columns_and_covariance(model, X)
    precision = np.linalg.inv(cov)
    posterior = np.linalg.inv(precision + phi.T @ phi / noise)
    weights = posterior @ (precision @ mean + phi.T @ y / noise)
    new = columns_and_covariance(model, X_new)[0]
    given = model.condition(torch.as_tensor(X), torch.as_tensor(y))
    got, variance = model.query(torch.as_tensor(X_new), given)
    np.testing.assert_allclose(got.numpy(), new @ weights, rtol=1e-6, atol=1e-8)
    expected = np.einsum("rp,pq,rq->r", new, posterior, new) + noise
    np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-6)


def test_classes_are_adapted_to_the_maximum_a_posteriori():
    model, rng = random_model(True, n_outputs=3), RNG(1)
    model.params["factor"] *= 0.1  # a prior narrow enough for the number of Newton steps
    model.params["log_noise"] += 1.0 + 0.5 * np.log(
        4
    )  # its inverse bounds the curvature of a class
    X, y = rng.randn(6, 3), np.eye(3)[[0, 1, 2, 0, 1, 1]]
    shift, _, _ = model.condition(torch.as_tensor(X), torch.as_tensor(y))
    phi, cov, mean, _ = columns_and_covariance(model, X)
    root = np.zeros_like(cov)
    root[:4, :4] = model.params["factor"].numpy()
    root[4:, 4:] = np.diag(np.exp(model.params["log_scale"].numpy()))
    logits = phi @ (mean + root @ shift.numpy())
    # the gradient of log likelihood + log prior, in units of the prior, is zero there
    gradient = (phi @ root).T @ (y - softmax(logits, axis=1)) - shift.numpy()
    before = (phi @ root).T @ (y - softmax(phi @ mean, axis=1))
    assert np.abs(gradient).max() < 1e-3 * np.abs(before).max()


def fitted(maml=MAMLRegressor, data=slopes, **params):
    X, y, task = data()
    return maml(max_iter=60, random_state=0, **params).fit(X, y, groups=task)


@pytest.fixture(scope="module")
def reg():
    return fitted()


@pytest.fixture(scope="module")
def clf():
    return fitted(MAMLClassifier, labelled, posterior=True)


def test_defaults_choose_the_posterior_where_it_is_better(reg):
    assert reg.posterior_weight_ > 0.5
    X, y, task = slopes(seed=5)
    plain = fitted(update_rule="sgd", steps=10)
    assert plain.posterior_ is None
    assert reg.score(X, y, groups=task + 100) > plain.score(X, y, groups=task + 100)


@pytest.mark.parametrize("n_support", [6, 200])
def test_rows_weigh_in_the_likelihood_by_their_weights(n_support):
    model, rng = random_model(), RNG(1)
    X, y, weight = rng.randn(n_support, 3), rng.randn(n_support, 1), rng.rand(n_support)
    weight[0] = 0.0
    phi, cov, mean, noise = columns_and_covariance(model, X)
    precision = np.linalg.inv(cov)
    weighted = weight[:, None] * phi
    posterior = np.linalg.inv(precision + weighted.T @ phi / noise)
    expected = posterior @ (precision @ mean + weighted.T @ y / noise)
    given = model.condition(*(torch.as_tensor(a) for a in (X, y, np.sqrt(weight))))
    got, _ = model.query(torch.as_tensor(X), given)
    np.testing.assert_allclose(got.numpy(), phi @ expected, rtol=1e-6, atol=1e-8)


def test_only_ratios_of_sample_weights_count(reg):
    X, y, _ = slopes(seed=5)
    weight = RNG(0).randint(0, 3, 8)
    weighted, other, equal, plain = (
        copy.copy(reg).adapt(X[:8], y[:8], sample_weight=w).predict(X[8:])
        for w in (weight, 10.0 * weight, np.ones(8), None)
    )
    np.testing.assert_allclose(weighted, other, rtol=1e-9)
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


def test_intervals_hold_what_they_promise(reg):
    X, y, task = slopes(n_tasks=200, seed=7)
    support = np.arange(len(y)) % 24 < 5
    reg = copy.copy(reg).adapt(X[support], y[support], groups=task[support])
    mean, std = reg.predict(X[~support], groups=task[~support], return_std=True)
    assert mean.shape == std.shape == (int((~support).sum()),)
    inside = np.abs(mean - y[~support]) < 1.645 * std
    assert 0.85 <= inside.mean() <= 0.97


def test_standard_deviation_shrinks_with_support_and_is_at_least_the_noise(reg):
    X, y, _ = slopes(seed=7)
    few = adapt(reg, X[:2], y[:2]).predict(X[24:48], return_std=True)[1]
    many = adapt(reg, X[:24], y[:24]).predict(X[24:48], return_std=True)[1]
    assert (many < few).mean() > 0.9
    assert many.min() > 0.05


def test_several_outputs_have_a_standard_deviation_each():
    X, y, task = slopes()
    Y = np.c_[y, 100 * y]
    reg = MAMLRegressor(max_iter=20, posterior=True, random_state=0).fit(X, Y, groups=task)
    mean, std = reg.adapt(X[:5], Y[:5]).predict(X[5:12], return_std=True)
    assert mean.shape == std.shape == (7, 2)
    np.testing.assert_allclose(std[:, 1], 100 * std[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    "params", [{"alpha": 0.03}, {"steps": 10}, {"adapt_steps": 3}, {"center_y": True}]
)
def test_what_is_asked_of_the_inner_loop_is_what_predicts(params):
    auto, off = fitted(**params), fitted(**params, posterior=False)
    assert auto.posterior_ is None
    X, y, _ = slopes(seed=3)
    np.testing.assert_array_equal(
        auto.adapt(X[:5], y[:5]).predict(X), off.adapt(X[:5], y[:5]).predict(X)
    )
    with pytest.raises(ValueError, match="posterior=True"):
        auto.predict(X, return_std=True)


def test_inner_loop_set_after_fit_takes_gradient_steps(reg):
    X, y, _ = slopes(seed=3)
    off = fitted(update_rule="sgd", steps=10)
    stepped = copy.copy(reg).set_params(alpha=0.03)
    np.testing.assert_array_equal(
        stepped.adapt(X[:5], y[:5]).predict(X), off.adapt(X[:5], y[:5]).predict(X)
    )


def test_gradient_steps_that_are_clearly_better_predict(reg):
    worse = copy.copy(reg)
    worse.posterior_weight_ = 0.0
    X, y, _ = slopes(seed=3)
    off = fitted(update_rule="sgd", steps=10).adapt(X[:5], y[:5])
    mean, std = worse.adapt(X[:5], y[:5]).predict(X, return_std=True)
    np.testing.assert_allclose(mean, off.predict(X), rtol=1e-12)
    assert np.isfinite(std).all()


@pytest.mark.parametrize("maml", [MAMLRegressor, MAMLClassifier])
def test_predictions_are_mixed_by_the_weight(maml):
    data, ask = (slopes, "predict") if maml is MAMLRegressor else (labelled, "predict_proba")
    model = fitted(maml, data)
    model.mixture_logit_scale_ = 1.0
    X, y, _ = data(seed=3)
    answers = {}
    for weight in (0.0, 0.3, 1.0):
        model.posterior_weight_ = weight
        answers[weight] = getattr(model.adapt(X[:5], y[:5]), ask)(X)
    assert not np.allclose(answers[0.0], answers[1.0])
    expected = 0.7 * answers[0.0] + 0.3 * answers[1.0]
    np.testing.assert_allclose(answers[0.3], expected, rtol=1e-5, atol=1e-6)


def test_mixed_probabilities_are_calibrated_as_a_whole():
    model = fitted(MAMLClassifier, labelled)
    X, y, _ = labelled(seed=3)
    model.adapt(X[:5], y[:5])
    model.mixture_logit_scale_ = 1.0
    log_p = model.predict_log_proba(X)
    model.mixture_logit_scale_ = 2.0
    np.testing.assert_allclose(model.predict_proba(X), softmax(2 * log_p, axis=1), rtol=1e-5)


@pytest.mark.parametrize("classification", [False, True])
def test_weight_is_that_of_the_smaller_error_on_held_out_tasks(classification):
    codes = np.repeat([0, 1], 20)
    if classification:
        target = np.eye(2)[RNG(0).randint(0, 2, 40)]
        good = np.log(0.8 * target + 0.2 * (1 - target))
        bad = np.log(np.full((40, 2), 0.5))
    else:
        target = RNG(0).randn(40, 1)
        good, bad = target + 0.1, target + 5.0
    assert find_weight(good, bad, target, codes, classification) == 1.0
    assert find_weight(bad, good, target, codes, classification) == 0.0
    if not classification:  # errors of opposite signs cancel
        assert find_weight(target + 1, target - 1, target, codes, False) == 0.5


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


def test_probabilities_of_gradient_steps_are_calibrated_where_nothing_was_asked():
    auto = fitted(MAMLClassifier, labelled)
    auto.posterior_weight_, auto.mixture_logit_scale_ = 0.0, 1.0
    off = fitted(MAMLClassifier, labelled, update_rule="sgd", alpha=0.03, steps=5)
    assert off.logit_scale_ == 1.0
    X, y, _ = labelled(seed=5)
    logits = off.adapt(X[:8], y[:8]).decision_function(X)
    p = auto.adapt(X[:8], y[:8]).predict_proba(X)[:, 1]
    assert auto.logit_scale_ != 1.0
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-auto.logit_scale_ * logits)), rtol=1e-6)


def test_predictions_end_near_the_range_of_the_targets(reg):
    X, y, _ = slopes(seed=3)
    far = adapt(reg, X[:5], y[:5]).predict(np.array([[1e6, -1e6], [1e300, 1e300]]))
    span = slopes()[1].max() - slopes()[1].min()
    assert np.abs(far).max() < 2 * span


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"early_stopping": False}, "held-out tasks"),
        ({"n_ways": 2}, "n_ways"),
    ],
)
def test_posterior_that_cannot_be_is_refused_before_training(params, message):
    X, y, task = labelled()
    with pytest.raises(ValueError, match=message):
        MAMLClassifier(posterior=True, max_iter=10**9, **params).fit(X, y, groups=task)


def test_same_seed_same_posterior_and_survives_pickling(reg):
    again = fitted()
    for one, other in zip(reg.posterior_.members, again.posterior_.members, strict=True):
        for name, p in one.items():
            np.testing.assert_array_equal(p, other[name])
    X, y, _ = slopes(seed=3)
    model = copy.copy(reg).adapt(X[:5], y[:5])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))


@pytest.mark.parametrize("kind", ["reg", "clf"])
def test_saved_models_predict_and_adapt_as_they_did(kind, request, tmp_path):
    model = copy.copy(request.getfixturevalue(kind))
    X, y, _ = (slopes if kind == "reg" else labelled)(seed=3)
    model.adapt(X[:5], y[:5])
    model.save(tmp_path / "model.safetensors")
    same = type(model).load(tmp_path / "model.safetensors")
    for _ in range(2):
        if kind == "reg":
            for one, other in zip(
                model.predict(X, return_std=True), same.predict(X, return_std=True), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_array_equal(model.predict_proba(X), same.predict_proba(X))
        model.adapt(X[5:9], y[5:9])
        same.adapt(X[5:9], y[5:9])


@pytest.mark.filterwarnings("ignore::sklearn_maml.exceptions.NonFiniteStepWarning")
def test_features_of_any_scale_are_learned_in_closed_form():
    X, y, task = slopes(n_tasks=40)
    reg = MAMLRegressor(max_iter=60, random_state=0)
    with pytest.warns(NonFiniteStepWarning, match="closed form alone"):
        reg.fit(1e4 * X, y, groups=task)
    assert reg.posterior_weight_ == 1.0
    X, y, task = slopes(n_tasks=20, seed=5)
    assert reg.score(1e4 * X, y, groups=task + 100) > 0.95
    with pytest.raises(MetaTrainingError):
        reg.set_params(update_rule="sgd", steps=10).fit(1e4 * X, y, groups=task)


@pytest.mark.parametrize("kind", ["reg", "clf"])
def test_threads_that_serve_from_one_model_give_the_bits_of_one(kind, request):
    model = copy.copy(request.getfixturevalue(kind))
    model.posterior, model.posterior_weight_ = "auto", 0.5  # both ways at once
    X, y, task = (slopes if kind == "reg" else labelled)(seed=5)
    before = copy.deepcopy(model.posterior_.members)

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
    for one, other in zip(before, model.posterior_.members, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


def test_mixed_model_recovers_the_population_of_slopes():
    X, y, task = slopes(n_tasks=400, spread=0.5)
    mean, cov, noise = _mixed_model(X, y[:, None], task)
    np.testing.assert_allclose(mean[:, 0], [1, 2, -1], atol=0.1)
    np.testing.assert_allclose(cov, 0.25 * np.eye(3), atol=0.06)
    assert abs(noise - 0.01) < 0.002


def test_wide_tables_and_ragged_tiny_tasks_train():
    rng = RNG(0)
    X = rng.randn(90, 120)
    task = np.repeat(np.arange(20), np.r_[np.full(10, 2), np.full(10, 7)])
    y = X[:, 0] + 0.1 * rng.randn(90)
    ensemble = PosteriorEnsemble.fit(
        X, y[:, None], task, np.array([0, 15]), classification=False, seed=0, n_updates=5
    )
    given = ensemble.condition(X[:2], y[:2, None], np.zeros(2, int), 1)
    assert np.isfinite(ensemble.predict(given, X, np.zeros(90, int))).all()
    assert np.isfinite(ensemble.predict_std(given, X, np.zeros(90, int))).all()


def quick(maml=MAMLRegressor, **params):
    return maml(**{"max_iter": 3, "random_state": 0, **params})


def test_features_of_the_tasks_alone_leave_no_rows_to_hold_out():
    _, y, task = slopes(20, 30)
    X = RNG(1).randn(20, 2)[task]
    for seed in range(3):  # of the tasks held out, some have unseen rows and some have none
        reg = quick(random_state=seed).fit(X, y, groups=task)
        mean, std = reg.adapt(X[:5], y[:5]).predict(X, return_std=True)
        assert np.isfinite(mean).all()
        assert (std > 0).all()


@pytest.mark.parametrize("rare", [3, None])
def test_members_may_see_a_single_class(rare):
    X, _, task = slopes(10, 12)
    y = np.where((task == rare) & (np.arange(len(task)) % 2 == 0), "rare", "common")
    clf = quick(MAMLClassifier, posterior=True).fit(X, y, groups=task)
    p = clf.adapt(X[:5], y[:5]).predict_proba(X)
    assert p.shape == (120, 1 if rare is None else 2)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (clf.predict(X[:12]) == "common").all()


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
    for one, other in zip(expected.posterior_.members, got.posterior_.members, strict=True):
        for name, p in one.items():
            np.testing.assert_array_equal(p, other[name])


def test_interrupt_while_the_posterior_is_learned_keeps_the_initialisation(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    X, y, task = slopes(12, 12)
    monkeypatch.setattr(PosteriorEnsemble, "fit", stop)
    with pytest.warns(InterruptedFitWarning, match="no posterior"):
        reg = quick().fit(X, y, groups=task)
    assert reg.posterior_ is None
    off = quick(update_rule="sgd", steps=10).fit(X, y, groups=task)
    for model in (reg, off):
        model.adapt(X[:5], y[:5])
    np.testing.assert_array_equal(reg.predict(X), off.predict(X))
    with pytest.raises(ValueError, match="interrupted"):
        reg.set_params(posterior=True).adapt(X[:5], y[:5])


def test_posterior_asked_for_after_a_fit_without_is_refused():
    X, y, task = slopes(12, 12)
    reg = quick(posterior=False).fit(X, y, groups=task).set_params(posterior=True)
    with pytest.raises(ValueError, match="learned no posterior"):
        reg.adapt(X[:5], y[:5])
    with pytest.raises(ValueError, match="learned no posterior"):
        reg.score(X, y, groups=task)


def test_few_shot_regressor_and_pipelines_return_standard_deviations():
    X, y, task = slopes(12, 12)
    with config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), quick(posterior=True)).fit(X, y, groups=task)
        model = adapt(pipe, X[:24], y[:24], groups=task[:24])
        mean, std = model.predict(X[:12], groups=task[:12], return_std=True)
    few = FewShotRegressor(pipe).fit(X[:12], y[:12])
    for one, other in zip(few.predict(X[:12], return_std=True), (mean, std), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)
    np.testing.assert_array_equal(few.predict(X[:12]), few.predict(X[:12], return_std=True)[0])


def test_continued_fit_learns_the_posterior_with_as_many_updates_as_one_fit(monkeypatch):
    counts = []
    fit = PosteriorEnsemble.fit

    def counted(*args, n_updates, **kwargs):
        counts.append(n_updates)
        return fit(*args, n_updates=n_updates, **kwargs)

    monkeypatch.setattr(PosteriorEnsemble, "fit", counted)
    X, y, task = slopes(12, 12)
    reg = quick(max_iter=4, warm_start=True).fit(X, y, groups=task)
    reg.fit(X, y, groups=task)
    quick(max_iter=8).fit(X, y, groups=task)
    assert counts == [6, 12, 12]


def test_numbers_are_kept_as_they_were_trained_and_as_the_rows_are():
    X, y, task = slopes(12, 12)
    for dtype in (np.float32, np.float64):
        reg = quick(posterior=True).fit(X.astype(dtype), y.astype(dtype), groups=task)
        given = reg.adapt(X[:5].astype(dtype), y[:5])._state.conditioned
        assert {p.dtype for m in reg.posterior_.members for p in m.values()} == {np.dtype("f4")}
        assert {part.dtype for part in given.shift} == {np.dtype(dtype)}


def test_large_task_is_not_padded_together_with_many_small_ones():
    sizes = RNG(0).permutation(np.r_[np.full(600, 3), 200_000, 5000, 40])
    codes = RNG(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    taken = []
    for tasks, place, present in _padded(codes, len(sizes)):
        assert present.size <= max(sklearn_maml.posterior.PADDED_ROWS, sizes[tasks].max())
        for task, rows, real in zip(tasks, place, present, strict=True):
            np.testing.assert_array_equal(np.sort(rows[real]), np.flatnonzero(codes == task))
        taken += tasks.tolist()
    assert sorted(taken) == list(range(len(sizes)))


def test_episodes_have_distinct_allowed_rows_of_one_task_each(monkeypatch):
    sizes = np.r_[np.full(6, 9), 500, 1, 2]
    codes = RNG(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    allowed = (codes != 2) & (RNG(1).rand(len(codes)) < 0.9)
    episodes = _Episodes(codes, allowed)
    for keys in (2**22, 600):  # at once, and few tasks at a time
        monkeypatch.setattr(sklearn_maml.posterior, "KEYS_AT_A_TIME", keys)
        k, rows = episodes.draw(3, 4, RNG(0), 25)
        assert k == 3
        assert rows.shape[0] == 25
        assert (codes[rows] == codes[rows[:, :1]]).all()
        assert allowed[rows].all()
        assert all(len(set(line)) == len(line) for line in rows.tolist())
        assert len({tuple(line) for line in np.sort(rows, 1).tolist()}) > 10


def test_mixed_model_of_very_many_tasks_takes_some_of_them(monkeypatch):
    X, y, task = slopes(n_tasks=1000, spread=0.5)
    monkeypatch.setattr(sklearn_maml.posterior, "MIXED_ENTRIES", 400 * 9)
    mean, cov, noise = _mixed_model(X, y[:, None], task)
    np.testing.assert_allclose(mean[:, 0], [1, 2, -1], atol=0.1)
    np.testing.assert_allclose(cov, 0.25 * np.eye(3), atol=0.06)
    assert abs(noise - 0.01) < 0.002


def test_posterior_of_centred_targets_is_refused():
    # the mean of few support rows is no part of its standard deviations, which would be too small
    X, y, task = slopes(12, 12)
    with pytest.raises(ValueError, match="center_y"):
        quick(posterior=True, center_y=True).fit(X, y, groups=task)
