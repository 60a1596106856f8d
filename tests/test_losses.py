"""The losses of numbers: their values and derivatives on every rung, domains, links and units."""

from __future__ import annotations

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from builders import SIZES, flat, has_kernels, make_batch, make_engine, make_meta_params, make_mlp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import (
    make_scorer,
    mean_absolute_error,
    mean_gamma_deviance,
    mean_pinball_loss,
    mean_poisson_deviance,
)
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import (
    FewShotRegressor,
    MAMLRegressor,
    adapt,
    compare_baselines,
    load,
    task_scorer,
    task_scores,
)
from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.exceptions import NonFiniteStepWarning
from sklearn_maml.inspection import MetaTrainingDisplay
from sklearn_maml.targets import (
    AbsoluteError,
    BinaryCrossEntropy,
    Gamma,
    Huber,
    Poisson,
    Quantile,
    SquaredError,
)
from sklearn_maml.targets.losses import LOSSES, resolve_loss
from sklearn_maml.targets.real import _medians as medians

SMOOTH = [SquaredError(), Poisson(), Gamma(), BinaryCrossEntropy()]
KINKED = [AbsoluteError(), Huber(0.5), Quantile(0.8)]
RUNGS = ["vmap", "stacked", "traced", *(["native"] if has_kernels() else [])]
BY_NAME = {"ids": lambda value: type(value).__name__}


def in_domain(loss, y):
    """Targets that a loss is for, made of real numbers; some are 0 where that may be."""
    if isinstance(loss, Poisson):
        return np.floor(np.exp(y))
    if isinstance(loss, Gamma):
        return np.exp(y)
    return (y > 0).astype(y.dtype) if isinstance(loss, BinaryCrossEntropy) else y


def batch_for(loss, sizes, **options):
    batch = make_batch(sizes, weighted=sizes == "ragged", **options)
    for rows in (batch.support, batch.query):
        rows.y.copy_(torch.from_numpy(in_domain(loss, rows.y.numpy())))
    return batch


def meta_step(engine, params, batch, steps=3):
    """A meta-step; one that is traced comes after those that trace it."""
    for _ in range(3):
        step = engine.meta_step(params, batch, alpha=0.1, steps=steps)
    return step


# --- derivatives


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", SMOOTH[1:] + KINKED, **BY_NAME)
def test_every_rung_gives_the_numbers_of_the_loop(loss, sizes, order):
    module, batch = make_mlp(), batch_for(loss, sizes)
    params = make_meta_params(module)
    engine = make_engine(module, order=order, row_loss=loss.rows)
    expected = meta_step(engine, params, batch)
    adapted = engine.adapt(params, batch.support, alpha=0.1, steps=3)
    for rung in RUNGS if order == 2 else RUNGS[-1:]:  # tracing takes a second
        engine = make_engine(module, rung, order=order, row_loss=loss.rows)
        step = meta_step(engine, params, batch)
        assert_allclose(step.losses, expected.losses, rtol=1e-12)
        assert_allclose(flat(step.grads), flat(expected.grads), rtol=1e-10, atol=1e-14)
        again = engine.adapt(params, batch.support, alpha=0.1, steps=3)
        assert_allclose(flat(again.params), flat(adapted.params), rtol=1e-11)
    other = make_engine(module, order=3 - order, row_loss=loss.rows)
    assert (flat(meta_step(other, params, batch).grads) - flat(expected.grads)).abs().max() > 1e-4


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", SMOOTH, **BY_NAME)
def test_the_meta_gradient_is_that_of_finite_differences(loss, sizes):
    module, batch = make_mlp(), batch_for(loss, sizes)
    params = make_meta_params(module)
    engine = make_engine(module, RUNGS[-1], row_loss=loss.rows)
    g = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=g).double() for n, p in params.items()}

    def value(shift):
        moved = {name: p + shift * direction[name] for name, p in params.items()}
        return engine.evaluate(moved, batch, alpha=0.1, steps=3)[0].mean().item()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    got = float(flat(meta_step(engine, params, batch).grads) @ flat(direction))
    assert got == pytest.approx(slope, rel=1e-7)


# f(x) = theta x at x = 1, from theta = 0 with alpha = .1.
# Poisson, y = 3: the gradient exp(theta) - 3 makes it .2, and d theta_1 / d theta is
# 1 - .1 exp(0) = .9; the query loss exp(theta) - theta - 1 (y = 1) has the gradient exp(.2) - 1.
# Gamma, y = 3: the gradient 1 - 3 exp(-theta) makes it .2, and the factor 1 - .1 * 3 = .7; the
# query loss exp(-theta) + theta - 1 has the gradient 1 - exp(-.2).
# Quantile .8, y = 3: the gradient -.8 makes it .08, and the factor is 1, as the second derivative
# is 0; the query loss .8 (1 - theta) has the gradient -.8.
# Huber, delta = 1: error -3 counts linearly, the gradient -1 makes it .1, and the factor is 1; the
# query loss (1 - theta)^2 / 2 has the gradient -.9.
BY_HAND = [
    (Poisson(), 0.2, np.exp(0.2) - 1.2, np.exp(0.2) - 1, 0.9),
    (Gamma(), 0.2, np.exp(-0.2) - 0.8, 1 - np.exp(-0.2), 0.7),
    (Quantile(0.8), 0.08, 0.8 * 0.92, -0.8, 1.0),
    (Huber(1.0), 0.1, 0.405, -0.9, 1.0),
    (AbsoluteError(), 0.1, 0.9, -1.0, 1.0),
]


@pytest.mark.parametrize("rung", ["loop", *RUNGS])
@pytest.mark.parametrize(
    ("loss", "theta", "value", "slope", "factor"), BY_HAND, ids=lambda v: type(v).__name__
)
def test_one_meta_step_by_hand(loss, theta, value, slope, factor, rung):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    batch = EpisodeBatch(Rows(one, 3 * one), Rows(one, one))
    for order in (1, 2):
        engine = make_engine(module, rung, order=order, row_loss=loss.rows)
        step = meta_step(engine, {"module.weight": module.weight.detach()}, batch, 1)
        expected = slope * (factor if order == 2 else 1)
        assert step.grads["module.weight"].item() == pytest.approx(expected, rel=1e-12)
        assert step.losses.tolist() == pytest.approx([value] * 2, rel=1e-12)
        assert step.outputs.flatten().tolist() == pytest.approx([theta] * 2, rel=1e-12)


@pytest.mark.parametrize("rung", ["loop", *RUNGS])
def test_no_error_is_no_reason_to_move_a_median(rung):
    module = nn.Linear(1, 1, bias=False).double()
    one = torch.ones(1, 3, 1, dtype=torch.float64)
    rows = Rows(one, one * module.weight.detach().item())
    params = {"module.weight": module.weight.detach()}
    for loss, move in ((AbsoluteError(), 0.0), (Quantile(0.8), 0.03)):
        engine = make_engine(module, rung, row_loss=loss.rows)
        adapted = engine.adapt(params, rows, alpha=0.1, steps=1).params["weight"].item()
        assert adapted == pytest.approx(module.weight.item() + move, abs=1e-15)


# --- domains, links and units


def collection(n_tasks=8, n_rows=12, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, 2))
    task = np.repeat(np.arange(n_tasks), n_rows)
    mean = np.exp(rng.uniform(0, 1.5, n_tasks)[task] + 0.4 * X[:, 0])
    return X, rng.poisson(mean).astype(float), task


X, Y, TASK = collection()
SMALL = {
    "update_rule": "sgd",
    "hidden_layer_sizes": (6,),
    "steps": 2,
    "meta_batch_size": 4,
    "max_iter": 5,
    "random_state": 0,
}


def regressor(loss, **params):
    if loss == "quantile":
        params.setdefault("quantile", 0.9)
    return MAMLRegressor(**{**SMALL, "loss": loss, **params})


@pytest.mark.parametrize("loss", ["poisson", "gamma"])
@pytest.mark.parametrize("call", ["fit", "adapt", "score"])
def test_targets_outside_of_the_domain_are_refused_everywhere(loss, call):
    above = Y + (loss == "gamma")
    bad = np.where(np.arange(len(Y)) == 13, 0.0 if loss == "gamma" else -2.0, above)
    reg = regressor(loss)
    if call != "fit":
        reg.fit(X, above, groups=TASK)
    with pytest.raises(ValueError, match=rf"loss='{loss}' is for targets .* has (0|-2). Leave"):
        getattr(reg, call)(X, bad, groups=TASK)
    with pytest.raises(ValueError, match=loss):  # as there
        HistGradientBoostingRegressor(loss=loss).fit(X, bad)


def test_counts_of_nothing_have_no_fit_but_a_task_may_have_them():
    with pytest.raises(
        ValueError, match=r"All targets are 0.*half Poisson deviance has no finite fit"
    ):
        regressor("poisson").fit(X, 0 * Y, groups=TASK)
    both = np.column_stack([Y, 0 * Y])
    with pytest.raises(ValueError, match="All targets of an output are 0"):
        regressor("poisson").fit(X, both, groups=TASK)
    reg = regressor("poisson").fit(X, Y, groups=TASK)
    before = reg.set_params(adapt_steps=0).adapt(X[:5], 0 * Y[:5]).predict(X)
    after = reg.set_params(adapt_steps=5).adapt(X[:5], 0 * Y[:5]).predict(X)
    assert 0 < after[:5].mean() < before[:5].mean()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["poisson", "gamma"])
def test_rates_are_in_units_of_y_whatever_these_are(loss, dtype):
    y = Y + (loss == "gamma")
    predictions = []
    for unit in (1.0, 1024.0, 2.0**-20):
        reg = regressor(loss).fit(X.astype(dtype), unit * y, groups=TASK)
        assert_allclose(reg.y_scale_, [unit * y.mean()])
        predictions.append(reg.adapt(X[:9].astype(dtype), unit * y[:9]).predict(X.astype(dtype)))
        assert predictions[-1].dtype == dtype
        assert_array_equal(predictions[-1] / unit, predictions[0])
    as_they_are = regressor(loss, normalize_y=False).fit(X, y, groups=TASK)
    assert_array_equal(as_they_are.y_scale_, [1.0])


@pytest.mark.parametrize("loss", ["absolute_error", "huber", "quantile"])
def test_gross_errors_do_not_move_the_units_of_robust_losses(loss):
    glitch = np.where(np.arange(len(Y)) % 24 == 5, 1e6, Y)
    reg = regressor(loss).fit(X, glitch, groups=TASK)
    spread = 1.4826 * np.median(np.abs(glitch - np.median(glitch)))
    assert_allclose((reg.y_mean_[0], reg.y_scale_[0]), (np.median(glitch), spread))
    glitched, clean = (
        clone(reg).fit(X, y, groups=TASK).adapt(X[:5], Y[:5]).predict(X) for y in (glitch, Y)
    )
    assert np.abs(glitched - clean).max() < 2 * Y.std()


def test_units_where_most_targets_are_equal_are_standard_deviations():
    rare = np.where(np.arange(len(Y)) % 4 == 0, Y, 0.0)
    reg = regressor("absolute_error").fit(X, rare, groups=TASK)
    assert_allclose((reg.y_mean_[0], reg.y_scale_[0]), (0, np.sqrt(np.mean(rare**2))))


def test_medians_of_weighted_rows_are_those_of_rows_as_often():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 8):
        y, often = rng.normal(size=(n, 2)), rng.integers(1, 4, n)
        expected = np.median(np.repeat(y, often, axis=0), axis=0)
        assert_allclose(medians(y, often.astype(float)), expected)
        assert_allclose(medians(y, None), np.median(y, axis=0))


@pytest.mark.parametrize("loss", ["poisson", "gamma"])
def test_auto_clips_steps_whose_curvature_has_no_bound(loss):
    level = np.where(TASK == 0, 1000.0, 1.0)  # a task with a steep loss
    reg = regressor(loss, update_rule="auto", max_iter=20, alpha=0.5, steps=5, early_stopping=False)
    assert reg._gradient_rule().max_grad_norm == 3
    skipped = []
    for norm in (3.0, None):
        other = clone(reg).set_params(update_rule="sgd", update_rule__max_grad_norm=norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteStepWarning)
            other.fit(X, level * (Y + 1), groups=TASK)
        skipped.append(sum(other.history_[:, "non_finite"]))
    assert skipped[0] == 0
    assert (skipped[1] > 0) == (loss == "poisson")
    own = clone(reg).set_params(update_rule__max_grad_norm=0.5)
    assert own._gradient_rule().max_grad_norm == 0.5
    assert clone(reg).set_params(loss="huber")._gradient_rule().max_grad_norm is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("far", [1e4, 1e7])
@pytest.mark.parametrize("loss", ["poisson", "gamma"])
def test_a_glitch_in_a_support_set_gives_no_astronomic_rates(loss, far, dtype):
    rows = X.astype(dtype)
    reg = regressor(loss, alpha=0.1, steps=5, max_iter=30).fit(rows, Y + 1, groups=TASK)
    y = np.where(np.arange(9) == 3, far, Y[:9] + 1)
    with pytest.warns(NonFiniteStepWarning, match="diverged on 1 of 1 tasks"):
        reg.adapt(rows[:9], y)
    assert reg.predict(rows).max() < 10 * far
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = reg.adapt(rows[:9], Y[:9] + 1).predict(rows)
    assert usual.max() < 10 * Y.max()


@pytest.mark.parametrize("loss", ["huber", "quantile"])
def test_parameters_of_a_loss_have_its_prefix_whether_it_is_a_name_or_an_object(loss):
    option = {"huber": "loss__delta", "quantile": "loss__quantile"}[loss]
    named = regressor(loss, quantile=0.5 if loss == "quantile" else None)
    given = regressor(LOSSES[loss]())
    fits = []
    for model in (named, given):
        fits.append(model.fit(X, Y, groups=TASK).adapt(X[:9], Y[:9]).predict(X))
        fits.append(clone(model).set_params(**{option: 0.2}).fit(X, Y, groups=TASK))
        fits[-1] = fits[-1].adapt(X[:9], Y[:9]).predict(X)
    assert_array_equal(fits[:2], fits[2:])
    assert np.abs(fits[0] - fits[1]).max() > 1e-3
    with pytest.raises(ValueError, match="loss was changed after fit"):
        named.set_params(**{option: 0.4}).adapt(X[:9], Y[:9])


@pytest.mark.parametrize("loss", ["squared_error", Quantile(0.5)])
def test_a_quantile_is_not_ignored(loss):
    for model in (regressor(loss), regressor(loss).fit(X, Y, groups=TASK)):
        ask = model.adapt if hasattr(model, "module_") else model.fit
        with pytest.raises(ValueError, match=r"quantile=0.3 is for loss='quantile'.*leave"):
            model.set_params(quantile=0.3) and ask(X, Y, groups=TASK)


@pytest.mark.parametrize("quantile", [None, 0, 1.0, "high"])
def test_the_quantile_has_to_be_one(quantile):
    with pytest.raises(ValueError, match="quantile"):
        MAMLRegressor(**SMALL, loss="quantile", quantile=quantile).fit(X, Y, groups=TASK)
    with pytest.raises(ValueError, match=r"needs a quantile between 0 and 1; got 2"):
        MAMLRegressor(**SMALL, loss=Quantile(2)).fit(X, Y, groups=TASK)
    with pytest.raises(ValueError, match=r"delta of the loss Huber must be positive.*got -1"):
        MAMLRegressor(**SMALL, loss=Huber(-1)).fit(X, Y, groups=TASK)


@pytest.mark.parametrize(
    ("loss", "metric", "factor"),
    [
        (Poisson(), mean_poisson_deviance, 0.5),
        (Gamma(), mean_gamma_deviance, 0.5),
        (AbsoluteError(), mean_absolute_error, 1),
        (Quantile(0.8), partial(mean_pinball_loss, alpha=0.8), 1),
    ],
    ids=lambda v: type(v).__name__,
)
def test_losses_are_the_metrics_of_scikit_learn(loss, metric, factor):
    y = in_domain(loss, np.linspace(-2, 2, 9))
    output = np.linspace(1, -0.5, 9)
    value = loss.rows(torch.from_numpy(output)[:, None], torch.from_numpy(y)[:, None]).mean()
    assert value.item() == pytest.approx(factor * metric(y, loss.predict(output)))


def test_what_is_above_zero_stays_so():
    y = np.where(np.arange(len(Y)) % 3 == 0, 1e-60, Y + 1)
    reg = regressor("gamma", max_iter=50).fit(X.astype(np.float32), y, groups=TASK)
    assert np.isfinite(reg.history_[-1, "train_loss"])
    assert (reg.adapt(X[:9].astype(np.float32), y[:9]).predict(X.astype(np.float32)) >= 0).all()


def test_losses_have_the_names_of_scikit_learn():
    assert {"squared_error", "absolute_error", "quantile", "poisson", "gamma"} < set(LOSSES)
    for name in LOSSES:
        assert type(resolve_loss(name, {})) is LOSSES[name]
    allowed = HistGradientBoostingRegressor._parameter_constraints["loss"][0].options
    assert allowed <= set(LOSSES)


# --- losses go everywhere


@pytest.fixture(scope="module", params=[name for name in LOSSES if name != "squared_error"])
def fitted(request):
    above = Y + (request.param == "gamma")
    return regressor(request.param).fit(X, above, groups=TASK).adapt(X[:9], above[:9])


@pytest.fixture
def reg(fitted):
    return pickle.loads(pickle.dumps(fitted))


def test_predictions_after_files_pickles_and_as_a_module_are_the_same(reg, tmp_path):
    expected = reg.predict(X)
    reg.save(tmp_path / "model")
    twin = load(tmp_path / "model")
    assert twin.get_params() == reg.get_params()
    assert_array_equal(twin.predict(X), expected)
    y = Y + 1
    assert_array_equal(
        twin.adapt(X, y, groups=TASK).predict(X, groups=TASK),
        reg.adapt(X, y, groups=TASK).predict(X, groups=TASK),
    )
    module = reg.adapt(X[:9], y[:9]).adapted_module()
    assert_allclose(module(torch.from_numpy(X)), reg.predict(X), rtol=1e-12)
    exported = torch.export.export(module, (torch.from_numpy(X),)).module()
    assert_allclose(exported(torch.from_numpy(X)), reg.predict(X), rtol=1e-12)


def test_the_loss_of_a_fitted_model_stays(reg):
    with pytest.raises(ValueError, match="loss was changed after fit"):
        clone_of(reg).set_params(loss="squared_error", quantile=None).adapt(X[:9], Y[:9] + 1)
    if reg.loss == "quantile":
        with pytest.raises(ValueError, match="loss was changed after fit"):
            reg.set_params(quantile=0.5).adapt(X[:9], Y[:9])


def clone_of(reg):
    return pickle.loads(pickle.dumps(reg))


def test_few_shot_estimators_pipelines_and_searches(reg):
    expected = reg.predict(X)
    y = Y + (reg.loss == "gamma")
    assert_array_equal(FewShotRegressor(reg).fit(X[:9], y[:9]).predict(X), expected)
    pipe = make_pipeline(StandardScaler(), clone(reg)).fit(X, y, mamlregressor__groups=TASK)
    assert np.isfinite(adapt(pipe, X[:9], y[:9]).predict(X)).all()
    own = {"quantile": [0.5]} if reg.loss == "quantile" else {}
    grid = [{"loss": ["squared_error"], "quantile": [None]}, {"loss": [reg.loss], **own}]
    search = GridSearchCV(clone(reg), grid, cv=KFold(2))
    search.fit([(X[j == TASK], y[j == TASK]) for j in range(8)])
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


def test_heads_and_their_intervals_refuse_losses_without_them(reg):
    with pytest.raises(ValueError, match="return_std=True needs a learner"):
        reg.predict(X, return_std=True)
    with pytest.raises(ValueError, match=f"RidgeHead solves .* is {reg.targets_.loss.name}"):
        clone(reg).set_params(update_rule="ridge-head", adapted="head").fit(X, Y + 1, groups=TASK)


def test_displays_scores_and_comparisons(reg):
    pytest.importorskip("matplotlib")
    units = {"poisson": "targets over their mean", "gamma": "targets over their mean"}
    name = f"Query loss ({reg.targets_.loss.name}, {units.get(reg.loss, 'standardised targets')})"
    assert MetaTrainingDisplay.from_estimator(reg).loss_name == name
    y = Y + 1
    scores = task_scores(reg, X, y, TASK, n_shots=5)
    assert np.isfinite(scores["after"]).all()
    scorer = task_scorer(make_scorer(mean_pinball_loss, alpha=0.9, greater_is_better=False))
    zero = clone_of(reg).set_params(alpha=0.0)
    assert scorer(reg, X, y, TASK) != scorer(zero, X, y, TASK)
    table = compare_baselines(
        clone(reg), X, y, TASK, n_shots=5, baselines=["pooled ridge"], random_state=0, verbose=0
    )
    ours = table.loc[(5, "MAMLRegressor"), "rmse"]
    assert 0 < ours < 5


@pytest.mark.parametrize("meta_gradient", ["first-order", "implicit", "reptile"])
def test_other_meta_gradients(reg, meta_gradient):
    other = clone(reg).set_params(meta_gradient=meta_gradient, max_iter=20)
    other.fit(X, Y + 1, groups=TASK)
    assert np.isfinite(other.history_[:, "train_loss"]).all()
    assert other.score(X, Y + 1, groups=TASK) > -1


@pytest.mark.parametrize(
    "rule", ["meta-sgd", "per-layer-per-step", "learned-alpha", "momentum", "adam"]
)
def test_other_update_rules(reg, rule):
    other = clone(reg).set_params(update_rule=rule, alpha=0.01, max_iter=20)
    other.fit(X, Y + 1, groups=TASK)
    assert np.isfinite(other.history_[:, "train_loss"]).all()
    assert other.score(X, Y + 1, groups=TASK) > -1


@pytest.mark.parametrize(("loss", "sign"), [("poisson", -1), ("gamma", 0)])
def test_a_score_of_the_adapted_task_refuses_what_the_loss_is_not_for(loss, sign):
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(60, 2)), np.repeat(np.arange(6), 10)
    y = rng.poisson(3, 60) + 1.0
    reg = MAMLRegressor(loss=loss, max_iter=2, hidden_layer_sizes=(4,), random_state=0)
    reg.fit(X, y, groups=task).adapt(X[:5], y[:5])
    assert reg.score(X[5:10], y[5:10]) <= 1
    with pytest.raises(ValueError, match=f"loss='{loss}' is for targets"):
        reg.score(X[5:10], sign * y[5:10])
