"""What y means: targets are encoded and decoded, and losses of users go everywhere."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from builders import make_engine, make_mlp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import (
    Checkpoint,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    load,
    task_scorer,
)
from sklearn_maml.data import tasks as data_tasks
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.inspection import MetaTrainingDisplay
from sklearn_maml.learners import Learner
from sklearn_maml.targets import (
    ClassTargets,
    Coding,
    CrossEntropy,
    Loss,
    RealTargets,
    SquaredError,
)
from sklearn_maml.targets.losses import cross_entropy_rows, squared_error_rows


class Poisson(Loss):
    """Negative log likelihood of counts whose logarithmic rates the network gives."""

    def __init__(self, exposure=1.0):
        self.exposure = exposure

    def rows(self, output, y):
        return (self.exposure * output.exp() - y * output).mean(-1)

    def check(self, y):
        if (y < 0).any():
            raise ValueError(f"Poisson got {y.min():g}, and expected 0 or more. Leave it out.")

    def predict(self, output):
        return self.exposure * np.exp(output)


class OwnSquares(Loss):
    """The squared error, as a user would write it."""

    name = "own squares"
    standardises = True

    def rows(self, output, y):
        return ((output - y) ** 2).mean(-1)


def counts(n_tasks=8, n_rows=12, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_tasks * n_rows, 2))
    task = np.repeat(np.arange(n_tasks), n_rows)
    level = rng.uniform(0, 1.5, n_tasks)[task]
    return X, rng.poisson(np.exp(level + 0.4 * X[:, 0])).astype(float), task


X, Y, TASK = counts()
SMALL = {
    "hidden_layer_sizes": (6,),
    "alpha": 0.02,
    "steps": 2,
    "meta_batch_size": 4,
    "max_iter": 10,
    "random_state": 0,
}


def poisson(**params):
    return MAMLRegressor(**{**SMALL, "loss": Poisson(), **params})


@pytest.fixture(scope="module")
def fitted():
    return poisson().fit(X, Y, groups=TASK)


@pytest.fixture
def reg(fitted):
    return pickle.loads(pickle.dumps(fitted))


# --- losses of rows


def test_the_compiled_kernels_refuse_losses_they_have_no_derivative_of():
    module = make_mlp()
    with pytest.raises(ValueError, match="do not cover"):
        make_engine(module, "native", row_loss=Poisson().rows)


def test_the_kernels_know_the_losses_of_the_library():
    assert SquaredError().rows is squared_error_rows
    assert CrossEntropy().rows is cross_entropy_rows


def test_a_squared_error_of_ones_own_trains_the_same_network():
    params = {**SMALL, "update_rule": "sgd"}
    ours = MAMLRegressor(**params).fit(X, Y, groups=TASK)
    own = MAMLRegressor(**params, loss=OwnSquares()).fit(X, Y, groups=TASK)
    assert_allclose(own.y_scale_, ours.y_scale_, rtol=0)
    for model in (ours, own):
        model.adapt(X[:20], Y[:20])
    assert_allclose(own.predict(X), ours.predict(X), rtol=1e-9)
    other = poisson(update_rule="sgd").fit(X, Y, groups=TASK).adapt(X[:20], Y[:20])
    assert np.abs(other.predict(X) - ours.predict(X)).max() > 1e-2


# --- domains and links


def test_predictions_are_rates_in_units_of_y(reg):
    assert_array_equal((reg.y_mean_, reg.y_scale_), ([0.0], [1.0]))
    reg.set_params(adapt_steps=0).adapt(X[:5], Y[:5])
    with torch.no_grad():
        outputs = reg.module_(torch.from_numpy(X))
    assert_allclose(reg.predict(X), outputs[:, 0].exp().numpy(), rtol=1e-12)


def test_adapting_takes_steps_down_the_loss(reg):
    weight = torch.nn.utils.parameters_to_vector(reg.module_.parameters()).detach()
    params = {n: p.detach().clone().requires_grad_() for n, p in reg.module_.named_parameters()}
    for _ in range(reg.steps):
        output = torch.func.functional_call(reg.module_, params, (torch.from_numpy(X[:7]),))
        loss = Poisson().rows(output, torch.from_numpy(Y[:7, None])).mean()
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (p - reg.alpha * g).detach().requires_grad_()
            for (name, p), g in zip(params.items(), grads, strict=True)
        }
    with torch.no_grad():
        output = torch.func.functional_call(reg.module_, params, (torch.from_numpy(X[7:]),))
    reg.adapt(X[:7], Y[:7])
    assert_allclose(reg.predict(X[7:]), output[:, 0].exp().numpy(), rtol=1e-10)
    after = torch.nn.utils.parameters_to_vector(reg.module_.parameters()).detach()
    assert torch.equal(after, weight)


@pytest.mark.parametrize("call", ["fit", "adapt", "score", "weights", "distribution"])
def test_targets_outside_of_the_domain_are_refused_everywhere(reg, call):
    bad = np.where(np.arange(len(Y)) == 13, -2.0, Y)
    weights = np.ones(len(Y))

    class Bad:
        def sample(self, n_tasks, random_state):
            return [(X[:12], Y[:12])] * (n_tasks - 1) + [(X[:14], bad[:14])]

    calls = {
        "fit": lambda: poisson().fit(X, bad, groups=TASK),
        "adapt": lambda: reg.adapt(X, bad, groups=TASK),
        "weights": lambda: reg.adapt(X, bad, groups=TASK, sample_weight=weights),
        "score": lambda: reg.score(X, bad, groups=TASK),
        "distribution": lambda: poisson().fit(Bad()),
    }
    with pytest.raises(ValueError, match=r"Poisson got -2, and expected 0 or more. Leave it out."):
        calls[call]()


def test_rates_that_overflow_are_refused(reg):
    reg.adapt(X[:5], Y[:5])
    with pytest.raises(ValueError, match="not finite in float64"):
        reg.predict(X * 1e6)


def test_a_loss_is_a_known_name_or_an_object():
    for loss in ("mse", Poisson, None):
        with pytest.raises(ValueError, match=r"The 'loss' parameter .* must be"):
            MAMLRegressor(loss=loss).fit(X, Y, groups=TASK)
    with pytest.raises(ValueError, match=r"CrossEntropy is for class labels.*MAMLClassifier"):
        MAMLRegressor(loss=CrossEntropy()).fit(X, Y, groups=TASK)
    with pytest.raises(ValueError, match="not for classes or labels"):
        MAMLClassifier(loss=Poisson()).fit(X, Y > 1, groups=TASK)


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (lambda self, output, y: (output - y) ** 2, r"\(2, 3, 1\)"),
        (lambda self, output, y: ((output - y) ** 2).mean(), r"\(\)"),
        (lambda self, output, y: 1.0, "float"),
    ],
)
def test_a_loss_has_one_number_a_row(rows, got):
    wrong = type("Wrong", (Loss,), {"rows": rows})
    with pytest.raises(ValueError, match=rf"rows of the loss Wrong gave {got}.*shape \(2, 3\)"):
        MAMLRegressor(loss=wrong()).fit(X, Y, groups=TASK)


def test_a_loss_of_targets_as_they_are_takes_no_mean_from_them():
    with pytest.raises(ValueError, match=r"center_y=True.*Poisson.*Use center_y=False"):
        poisson(center_y=True).fit(X, Y, groups=TASK)
    reg = poisson(loss=OwnSquares(), center_y=True).fit(X, Y, groups=TASK)
    assert_allclose(
        reg.adapt(X[:9], Y[:9]).predict(X) + 5, reg.adapt(X[:9], Y[:9] + 5).predict(X), rtol=1e-9
    )


# --- what is solved for squared error and cross-entropy alone


def test_auto_takes_gradient_steps_for_a_loss_of_ones_own(fitted):
    assert fitted.learner_weights_ == {"gradient-steps": 1.0}
    usual = MAMLRegressor(**SMALL).fit(X, Y, groups=TASK)
    assert "gaussian-head" in usual.learner_weights_
    with pytest.raises(ValueError, match="return_std=True needs a learner"):
        clone(fitted).fit(X, Y, groups=TASK).adapt(X[:5], Y[:5]).predict(X, return_std=True)


@pytest.mark.parametrize("loss", [Poisson(), OwnSquares()])
def test_heads_in_closed_form_refuse_other_losses(loss):
    with pytest.raises(ValueError, match=f"gaussian-head' has no .* loss {loss.name}"):
        poisson(loss=loss, update_rule="gaussian-head").fit(X, Y, groups=TASK)
    with pytest.raises(ValueError, match=f"RidgeHead solves .* is {loss.name}. Use update_rule"):
        poisson(loss=loss, update_rule="ridge-head", adapted="head").fit(X, Y, groups=TASK)


# --- a loss goes everywhere


def test_the_loss_is_what_is_trained_and_validated():
    pytest.importorskip("matplotlib")
    reg = poisson(max_iter=200, beta=0.02, early_stopping=True).fit(X, Y, groups=TASK)
    rate = torch.full((len(Y), 1), np.log(Y.mean()))
    constant = float(Poisson().rows(rate, torch.from_numpy(Y)[:, None]).mean())
    assert reg.history_[-1, "train_loss"] < constant < reg.history_[0, "train_loss"]
    assert reg.history_[-1, "valid_loss"] < reg.history_[0, "valid_loss"]
    assert MetaTrainingDisplay.from_estimator(reg).loss_name == "Query loss (Poisson)"
    usual = MAMLRegressor(**SMALL, update_rule="sgd").fit(X, Y, groups=TASK)
    name = MetaTrainingDisplay.from_estimator(usual).loss_name
    assert name == "Query loss (mean squared error, standardised targets)"


@pytest.mark.parametrize("adapted", [False, True])
def test_a_saved_model_asks_for_its_loss(reg, tmp_path, adapted):
    if adapted:
        reg.adapt(X, Y, groups=TASK)
    reg.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"loss \(an object of class Poisson\).*load\(path, loss="):
        load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"loss that is an object of class Poisson; got .*OwnSq"):
        load(tmp_path / "model", loss=OwnSquares())
    twin = load(tmp_path / "model", loss=Poisson())
    if not adapted:
        for model in (reg, twin):
            model.adapt(X, Y, groups=TASK)
    assert_array_equal(twin.predict(X, groups=TASK), reg.predict(X, groups=TASK))
    for model in (reg, twin):
        model.adapt(X[:9], Y[:9])
    assert_array_equal(twin.predict(X), reg.predict(X))
    for model in (reg, twin):  # the optimiser's state goes on
        model.set_params(warm_start=True).fit(X, Y, groups=TASK).adapt(X[:9], Y[:9])
    assert_array_equal(twin.predict(X), reg.predict(X))


def test_a_loss_of_the_library_is_in_the_file(tmp_path):
    reg = MAMLRegressor(**SMALL, loss=SquaredError()).fit(X, Y, groups=TASK)
    reg.adapt(X[:9], Y[:9]).save(tmp_path / "model")
    twin = load(tmp_path / "model")
    assert type(twin.loss) is SquaredError
    assert_array_equal(twin.predict(X), reg.predict(X))


def test_pickles_and_clones_have_the_loss(reg):
    reg.adapt(X, Y, groups=TASK)
    twin = pickle.loads(pickle.dumps(reg))
    assert_array_equal(twin.predict(X, groups=TASK), reg.predict(X, groups=TASK))
    assert_array_equal(twin.adapt(X[:9], Y[:9]).predict(X), reg.adapt(X[:9], Y[:9]).predict(X))
    copied = clone(reg.set_params(loss__exposure=2.0))
    assert copied.loss is not reg.loss
    assert copied.get_params()["loss__exposure"] == 2.0


def test_the_loss_of_a_fitted_model_stays(reg, tmp_path):
    before = reg.adapt(X[:9], Y[:9]).predict(X)
    for change in ({"loss__exposure": 2.0}, {"loss": "squared_error"}, {"loss": OwnSquares()}):
        changed = pickle.loads(pickle.dumps(reg)).set_params(**change)
        for call in (
            lambda model: model.adapt(X[:9], Y[:9]),
            lambda model: model.score(X, Y, groups=TASK),
            lambda model: model.save(tmp_path / "model"),
            lambda model: model.set_params(warm_start=True).fit(X, Y, groups=TASK),
        ):
            with pytest.raises(ValueError, match="loss was changed after fit"):
                call(changed)
        assert_array_equal(changed.predict(X), before)
    again = reg.set_params(loss=Poisson()).adapt(X[:9], Y[:9])
    assert_array_equal(again.predict(X), before)


def test_losses_and_their_parameters_are_searched():
    tasks = [(X[j == TASK], Y[j == TASK]) for j in range(8)]
    grid = {"loss__exposure": [0.5, 1.0]}
    search = GridSearchCV(poisson(), grid, cv=KFold(2), scoring=task_scorer("r2", n_shots=5))
    search.fit(tasks)
    one = poisson(loss=Poisson(search.best_params_["loss__exposure"])).fit(tasks)
    for model in (search.best_estimator_, one):
        model.adapt(X[:9], Y[:9])
    assert_array_equal(search.best_estimator_.predict(X), one.predict(X))
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] != scores[1]
    both = GridSearchCV(poisson(), {"loss": ["squared_error", Poisson()]}, cv=KFold(2)).fit(tasks)
    assert np.isfinite(both.cv_results_["mean_test_score"]).all()


def test_a_loss_in_pipelines_few_shot_estimators_and_checkpoints(tmp_path):
    pipe = make_pipeline(StandardScaler(), poisson()).fit(X, Y, mamlregressor__groups=TASK)
    learner = FewShotRegressor(pipe).fit(X[:9], Y[:9])
    assert_array_equal(learner.predict(X), adapt(pipe, X[:9], Y[:9]).predict(X))
    assert (learner.predict(X) > 0).all()
    saver = Checkpoint(tmp_path / "fit")
    once = poisson(callbacks=[saver]).fit(X, Y, groups=TASK).adapt(X[:9], Y[:9])
    again = poisson(callbacks=[saver]).fit(X, Y, groups=TASK).adapt(X[:9], Y[:9])
    assert_array_equal(once.predict(X), again.predict(X))


class Pooled(Learner):
    """The mean of the support rows of a task, drawn towards one that is learned."""

    def build(self, problem):
        assert problem.y.max() == Y.max()  # as they are
        return nn.ParameterList([nn.Parameter(torch.zeros(()))])

    def outputs(self, network, support, query):
        weight = torch.ones_like(support.y[..., 0]) if support.weight is None else support.weight
        total = (support.y[..., 0] * weight).sum(1) + network[0].exp()
        rate = total / (weight.sum(1) + 1)
        return rate.log()[:, None, None].expand(*query.X.shape[:2], 1)


def test_learners_of_users_lower_losses_of_users():
    reg = poisson(update_rule=Pooled(), max_iter=200, beta=0.02).fit(X, Y, groups=TASK)
    learned = float(reg.module_[0].detach())
    assert learned != 0
    rates = reg.adapt(X[:9], Y[:9]).predict(X)
    assert_allclose(rates, (Y[:9].sum() + np.exp(learned)) / 10, rtol=1e-6)


def test_several_targets_of_a_loss():
    both = np.column_stack([Y, Y[::-1]])
    reg = poisson().fit(X, both, groups=TASK).adapt(X[:9], both[:9])
    rates = reg.predict(X)
    assert rates.shape == both.shape
    assert (rates > 0).all()
    with pytest.raises(ValueError, match=r"1 output\(s\), but the model .* on 2. Give as many"):
        reg.adapt(X[:9], Y[:9])


# --- targets


def collection(y, codes=None):
    y = np.asarray(y)
    codes = np.zeros(len(y), int) if codes is None else np.asarray(codes)
    rows = np.zeros((len(y), 2))
    return TaskCollection(rows, y, codes, np.arange(codes.max() + 1), None, "list")


@pytest.mark.parametrize("center_y", [False, True])
def test_numbers_are_decoded_to_what_was_encoded(center_y):
    tasks = collection(Y, TASK)
    targets = RealTargets(SquaredError(), True, center_y)
    targets.learn(tasks)
    y, coding = targets.encode_support(tasks, None)
    assert (coding.center is not None) == center_y
    assert y.std() == pytest.approx(1)
    assert_allclose(targets.decode(y, TASK, coding), Y, rtol=1e-12)
    again = RealTargets(SquaredError(), True, center_y).restore(targets.attributes())
    assert_array_equal(again.encode_support(tasks, None)[0], y)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("center_y", [False, True])
def test_statistics_of_very_many_targets_are_those_of_all(center_y, weighted, monkeypatch):
    monkeypatch.setattr(data_tasks, "AT_A_TIME", 7)
    rng = np.random.default_rng(0)
    y, codes = rng.normal(3, 2, size=(40, 2)).astype(np.float32), np.repeat([0, 1], 20)
    weight = rng.uniform(0.5, 2, 40) if weighted else None
    targets = RealTargets(SquaredError(), True, center_y)
    targets.learn(collection(y, codes), weight)
    centers = [np.average(y, axis=0, weights=weight)] * 2
    assert_allclose(targets.y_mean_, centers[0], rtol=1e-6)
    if center_y:
        parts = [None, None] if weight is None else np.split(weight, 2)
        centers = [
            np.average(rows, axis=0, weights=part)
            for rows, part in zip(np.split(y, 2), parts, strict=True)
        ]
    deviations = y - np.repeat(centers, 20, axis=0)
    scale = np.sqrt(np.average(deviations**2, axis=0, weights=weight))
    assert_allclose(targets.y_scale_, scale, rtol=1e-6)
    if not (center_y and weighted):  # the means of episodes are of rows that count the same
        encoded = targets.encode(collection(y, codes)).y
        assert_allclose(encoded, deviations / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_ways", [None, 3])
def test_labels_are_decoded_to_what_was_encoded(n_ways):
    labels = np.array(list("aabbcdcd"))
    codes = np.repeat([0, 1], 4)
    targets = ClassTargets(n_ways)
    targets.learn(collection(labels, codes))
    y, coding = targets.encode_support(collection(labels, codes), None)
    assert targets.n_outputs == (n_ways or 4)
    assert y.tolist() == ([0, 0, 1, 1, 0, 1, 0, 1] if n_ways else [0, 0, 1, 1, 2, 3, 2, 3])
    outputs = 50 * np.eye(targets.n_outputs)[y]
    assert targets.decode(outputs, codes, coding).tolist() == labels.tolist()
    p = targets.probabilities(outputs, codes, coding)
    assert_allclose(p, np.eye(4)[np.searchsorted(list("abcd"), labels)], atol=1e-12)
    if n_ways:  # what a task lacks has no probability at all
        assert (p[:4, 2:] == 0).all()
    assert targets.decision(outputs, codes, coding).argmax(1).tolist() == p.argmax(1).tolist()


def test_sizes_of_episodes_are_up_to_the_targets():
    tasks = collection(np.arange(40) % 2, np.repeat([0, 1], 20))
    real, shared, local = (
        RealTargets(SquaredError(), True, False),
        ClassTargets(None),
        ClassTargets(2),
    )
    assert [t.episode_rows(tasks, 3, 4) for t in (real, shared, local)] == [7, 14, 14]
    assert [t.episode_rows(tasks, None, 4) for t in (real, shared, local)] == [20, 20, 10]
    shots = [[t.scored_shots(k)["n_shots"] for t in (real, shared)] for k in (None, 3, 0)]
    assert shots == [[10, None], [3, 3], [0, 0]]


def test_coding_is_of_nothing_by_default():
    assert vars(Coding()) == {"labels": None, "slots": None, "center": None}


def test_encoded_tasks_take_the_order_of_their_rows_along():
    tasks = collection(np.arange(6.0), [1, 0, 1, 0, 2, 2])
    targets = RealTargets(SquaredError(), True, False)
    targets.learn(tasks)
    encoded = targets.encode(tasks)
    assert encoded.order is tasks.order
    assert not np.array_equal(encoded.y.ravel(), tasks.y)
    some = tasks.select(np.array([0, 2]))
    assert_array_equal(some.codes, [0, 0, 1, 1])
    assert_array_equal(some.y[some.rows(1)], [4.0, 5.0])
