"""Many threads serve from one meta-fitted model; copies of it are cheap."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
)

pytestmark = pytest.mark.usefixtures("impatient_threads")

N_TASKS, N_ROWS, N_SUPPORT = 12, 10, 6
SMALL: dict[str, Any] = {
    "update_rule": "sgd",
    "steps": 2,
    "max_iter": 4,
    "meta_batch_size": 4,
    "random_state": 0,
}


class ConvNorm(nn.Module):
    """Convolution, batch norm, and a forward that is not a sequence of layers."""

    def __init__(self, out_features):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, out_features)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x)))
        return self.head((hidden + hidden.square()).flatten(1))


class Net(nn.Module):
    """Calls its layers more than once."""

    def __init__(self, in_features, out_features, width=5):
        super().__init__()
        self.into = nn.Linear(in_features, width)
        self.again = nn.Linear(width, width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.again(torch.tanh(self.into(x))))))


def conv_net(n_outputs):
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, n_outputs))


MODELS = {
    "mlp": {"hidden_layer_sizes": (6,)},
    "head of an mlp": {"hidden_layer_sizes": (6,), "adapted": "head"},
    "ridge head": {"update_rule": "ridge-head", "adapted": "head"},
    "meta-sgd": {"hidden_layer_sizes": (6,), "update_rule": "meta-sgd"},
    "custom": {"module": Net},
    "conv": {},
    "conv and batch norm": {"module": ConvNorm},
    "transductive": {"module": ConvNorm, "engine__batch_norm": "transductive"},
}
IMAGES = ("conv", "conv and batch norm", "transductive")


def tasks(name, kind, dtype=np.float32):
    """Rows (n_tasks, n_rows, *features) of the tasks, and their targets."""
    rng = np.random.default_rng(0)
    shape = (1, 4, 4) if name in IMAGES else (3,)
    X = rng.normal(size=(N_TASKS, N_ROWS, *shape)).astype(dtype)
    y = X.reshape(N_TASKS, N_ROWS, -1)[:, :, 0] * rng.normal(size=(N_TASKS, 1))
    if kind == "classifier":
        y = np.array(["left", "right"])[np.arange(N_ROWS) % 2][None].repeat(N_TASKS, 0)
    return X, y


@functools.cache
def fitted(name, kind):
    params = {**SMALL, **MODELS[name]}
    if name == "conv":
        params["module"] = conv_net(2 if kind == "classifier" else 1)
    if name == "ridge head" and kind == "classifier":
        params["update_rule"] = "logistic-head"
    if kind == "classifier":
        return MAMLClassifier(n_ways=2, n_shots=2, **params).fit(*tasks(name, kind))
    return MAMLRegressor(**params).fit(*tasks(name, kind))


def answers(model, X, **groups):
    """Return all answers of a model in one array."""
    names = ["predict", "predict_proba", "decision_function"]
    found = [getattr(model, name)(X, **groups) for name in names if hasattr(model, name)]
    if len(found) == 1:
        return found[0]
    labels = np.unique(found[0], return_inverse=True)[1]
    return np.column_stack([labels, *found[1:]])


def learned(model):
    return {name: p.detach().clone() for name, p in model._learner.named_parameters()}


def in_threads(work, items):
    """Run each item twice over eight threads."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, [*items, *items]))


def check_same(found, expected):
    assert sum(not np.array_equal(*pair) for pair in zip(found, expected * 2, strict=True)) == 0


each_model = pytest.mark.parametrize("name", MODELS)
each_kind = pytest.mark.parametrize("kind", ["regressor", "classifier"])


@each_model
@each_kind
def test_threads_that_adapt_copies_get_the_answers_of_one_thread(name, kind):
    model = fitted(name, kind)
    before = learned(model)
    X, y = tasks(name, kind)

    def work(j):
        return answers(adapt(model, X[j, :N_SUPPORT], y[j, :N_SUPPORT]), X[j, N_SUPPORT:])

    expected = [work(j) for j in range(N_TASKS)]
    check_same(in_threads(work, range(N_TASKS)), expected)
    for parameter, value in before.items():
        assert torch.equal(learned(model)[parameter], value)
    # negative control: the tasks differ
    assert len({e.tobytes() for e in expected}) > N_TASKS // 2


@each_model
@each_kind
def test_threads_that_adapt_to_batches_and_ask_one_adapted_model_get_those_of_one(name, kind):
    X, y = tasks(name, kind)
    shape = X.shape[2:]
    groups = np.repeat(np.arange(N_TASKS), N_SUPPORT)
    support = X[:, :N_SUPPORT].reshape(-1, *shape), y[:, :N_SUPPORT].reshape(-1)
    shared = adapt(fitted(name, kind), *support, groups=groups)
    before = learned(shared)

    def ask(j):
        own = adapt(shared, *support, groups=groups + 1)
        rows = X[[j, j - 1], N_SUPPORT:].reshape(-1, *shape)
        tasks_of_rows = np.repeat([j, (j - 1) % N_TASKS], N_ROWS - N_SUPPORT)
        return np.stack(
            [
                answers(own, rows, groups=tasks_of_rows + 1),
                answers(shared, rows, groups=tasks_of_rows),
            ]
        )

    expected = [ask(j) for j in range(N_TASKS)]
    assert all(np.array_equal(own, other) for own, other in expected)
    check_same(in_threads(ask, range(N_TASKS)), expected)
    for parameter, value in before.items():
        assert torch.equal(learned(shared)[parameter], value)


@each_kind
@pytest.mark.parametrize("how", ["few shot", "pipeline", "few shot of a pipeline"])
def test_threads_share_priors_and_pipelines(how, kind):
    X, y = tasks("mlp", kind)
    model = fitted("mlp", kind)
    if "pipeline" in how:
        name = type(model).__name__.lower()
        groups = np.repeat(np.arange(N_TASKS), N_ROWS)
        with sklearn.config_context(enable_metadata_routing=True):
            model = make_pipeline(StandardScaler(), sklearn.base.clone(model)).fit(
                X.reshape(-1, 3), y.reshape(-1), groups=groups
            )
        assert name in model.named_steps
    cls = FewShotRegressor if kind == "regressor" else FewShotClassifier

    def work(j):
        support = X[j, :N_SUPPORT], y[j, :N_SUPPORT]
        own = cls(model).fit(*support) if "few shot" in how else adapt(model, *support)
        return answers(own, X[j, N_SUPPORT:])

    expected = [work(j) for j in range(N_TASKS)]
    check_same(in_threads(work, range(N_TASKS)), expected)


@each_model
def test_predictions_while_others_adapt_the_same_model_are_of_one_task_or_another(name):
    X, y = tasks(name, "regressor")
    model = adapt(fitted(name, "regressor"), X[0], y[0])
    query = X[0]
    possible = {adapt(model, X[j], y[j]).predict(query).tobytes() for j in range(N_TASKS)}

    def work(j):
        if j % 2:
            model.adapt(X[j], y[j])
        return model.predict(query)

    assert {found.tobytes() for found in in_threads(work, range(N_TASKS))} <= possible


def test_the_last_of_several_threads_that_adapt_one_model_wins_as_a_whole(monkeypatch):
    """What follows from the adapted tasks, the classes, is always of those tasks."""
    model = adapt(fitted("mlp", "classifier"), np.zeros((2, 3), np.float32), ["a", "b"])
    X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    labels = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]] * 8
    after = MAMLClassifier._after_adapt

    def slowly(self):
        before = self._state
        for _ in range(20):
            torch.zeros(2000).sum()  # gives the other threads time
        assert self._state is before, "another thread has come in between"
        after(self)

    monkeypatch.setattr(MAMLClassifier, "_after_adapt", slowly)

    def work(y):
        model.adapt(X, y)

    in_threads(work, labels)
    assert model.classes_ is model._state.labels
    assert set(model.predict(X)) <= set(model.classes_)


# -- memory --------------------------------------------------------------------------------------


def storages(value, seen=None, found=None):
    """Return the bytes of all tensors that an object holds, by the address of their storage."""
    seen = set() if seen is None else seen
    found = {} if found is None else found
    if id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return found
    parts = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if isinstance(value, dict):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    elif hasattr(value, "__dict__"):
        parts += vars(value).values()
    for part in parts:
        storages(part, seen, found)
    return found


class Big(nn.Module):
    """A body of a hundred thousand weights, a head of 257."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(in_features, 400), nn.ReLU(), nn.Linear(400, 256))
        self.head = nn.Linear(256, out_features)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


BIG = {"mlp": {"hidden_layer_sizes": (400, 256)}, "custom": {"module": Big}}


@pytest.mark.parametrize("params", BIG.values(), ids=BIG)
@pytest.mark.parametrize("adapted", ["head", "all"])
@pytest.mark.parametrize("few_shot", [False, True])
def test_a_copy_holds_the_weights_that_adapt_and_no_others(params, adapted, few_shot):
    X, y = tasks("mlp", "regressor")
    model = MAMLRegressor(**{**SMALL, "max_iter": 1}, **params, adapted=adapted).fit(X, y)
    n_weights = sum(p.numel() for p in model.module_.parameters())
    n_adapt = 257 if adapted == "head" else n_weights
    n_copies = 20 if adapted == "head" else 2

    def copy_for(j):
        if few_shot:
            return FewShotRegressor(model).fit(X[j], y[j])
        return adapt(model, X[j], y[j])

    copies = [copy_for(j % N_TASKS) for j in range(n_copies)]
    shared, held = storages(model), storages(copies)
    own = sum(n_bytes for place, n_bytes in held.items() if place not in shared)
    assert own == n_copies * n_adapt * 4


def test_a_copy_of_a_model_with_learned_rates_shares_them():
    X, y = tasks("meta-sgd", "regressor")
    model = fitted("meta-sgd", "regressor")
    copies = [adapt(model, X[j], y[j]) for j in range(3)]
    n_weights = sum(p.numel() for p in model.module_.parameters())
    shared = storages(model)
    own = [n for place, n in storages(copies).items() if place not in shared]
    assert sum(own) == 3 * n_weights * 4


# -- what is not done again ------------------------------------------------------------------------


def by_hand(model, X, y):
    """What `adapt` gives without anything that earlier calls have left."""
    anew = copy.deepcopy(model)
    return anew.adapt(X, y).predict(X)


CHANGES = {
    "rate": lambda model: model.set_params(alpha=0.3),
    "steps": lambda model: model.set_params(adapt_steps=5),
    "bound": lambda model: model.set_params(update_rule__max_grad_norm=1e-3),
    "numbers": lambda model: model.module_[0].weight.data.mul_(2),
    "a parameter": lambda model: setattr(model.module_[0], "bias", nn.Parameter(torch.ones(6))),
    "a layer": lambda model: model.module_.__setitem__(1, nn.Tanh()),
    "a hook": lambda model: model.module_[1].register_forward_hook(lambda m, x, out: 2 * out),
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapt_sees_what_has_changed_since_the_last_call(change):
    X, y = tasks("mlp", "regressor")
    model = MAMLRegressor(**{**SMALL, **MODELS["mlp"]}).fit(X, y)
    first = adapt(model, X[0], y[0]).predict(X[0])
    CHANGES[change](model)
    second = adapt(model, X[0], y[0]).predict(X[0])
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_allclose(second, by_hand(model, X[0], y[0]), rtol=1e-5)


def test_copies_share_the_engine_of_a_small_network():
    X, y = tasks("mlp", "regressor")
    model = MAMLRegressor(**{**SMALL, **MODELS["mlp"]}).fit(X, y)
    one, other, third = (adapt(model, X[j], y[j])._state.adapted.engine for j in range(3))
    assert one is other is third
    gone = weakref.ref(model._learner)
    model.fit(X, y)
    gc.collect()
    assert gone() is None  # what is kept for a model goes with it
    assert adapt(model, X[0], y[0])._state.adapted.engine is not one


def test_parameters_are_looked_at_again_once_they_change():
    X, y = tasks("mlp", "regressor")
    model = MAMLRegressor(**{**SMALL, **MODELS["mlp"]}).fit(X, y)
    for bad, message in (({"alpha": -1}, "alpha"), ({"center_y": True}, "was changed after fit")):
        adapt(model, X[0], y[0])
        before = model.get_params()
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                adapt(model.set_params(**bad), X[0], y[0])
        model.set_params(**{name: before[name] for name in bad})
    named = MAMLRegressor(**{**SMALL, **MODELS["mlp"]}, adapted=["0.*"]).fit(X, y)
    adapt(named, X[0], y[0])
    named.adapted[0] = "2.*"  # in place
    with pytest.raises(ValueError, match="adapted was changed after fit"):
        adapt(named, X[0], y[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_plain_arrays_are_looked_through(bad):
    X, y = tasks("mlp", "regressor")
    model = MAMLRegressor(**{**SMALL, **MODELS["mlp"]}).fit(X, y).adapt(X[0], y[0])
    rows, targets = X[0].copy(), y[0].copy()
    rows[1, 0], targets[2] = bad, bad
    for call in (
        lambda: model.predict(rows),
        lambda: adapt(model, rows, y[0]),
        lambda: adapt(model, X[0], targets),
    ):
        with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
            call()
    with pytest.raises(ValueError, match="features"):
        model.predict(np.c_[X[0], X[0]])
    huge = np.full_like(
        X[0], np.finfo(X.dtype).max / 2
    )  # whose sum is infinite, but not one of them
    assert model.predict(huge).shape == y[0].shape
