"""Pipelines and searches in files, and what skops makes of the estimators."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import sklearn
import torch
from networks import Residual
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    SplineTransformer,
    StandardScaler,
)
from torch import nn

import sklearn_maml
from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    task_scorer,
)
from sklearn_maml.exceptions import FileFormatError

SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0}


class Halve(TransformerMixin, BaseEstimator):
    """A transformer of the user's own."""

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        return X / 2


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(96, 2)), np.repeat(np.arange(12), 8)
    return X, X[:, 0] * (1 + task % 3) + X[:, 1], task


@pytest.fixture(autouse=True)
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def labels(y):
    return np.where(np.arange(len(y)) % 2, "odd", "even")


# --- estimators as skops sees them

MODELS = {
    "default": (MAMLRegressor, {}),
    "gradient steps": (MAMLRegressor, {"update_rule": "meta-sgd"}),
    "bfloat16 buffer": (MAMLRegressor, {"module": nn.Sequential(nn.Linear(2, 1))}),
    "classes": (MAMLClassifier, {}),
    "local labels": (MAMLClassifier, {"n_ways": 2, "n_shots": 2, "n_queries": 2}),
}


def fitted(name, data):
    X, y, task = data
    cls, params = MODELS[name]
    y = labels(y) if cls is MAMLClassifier else y
    if name == "bfloat16 buffer":
        module = copy.deepcopy(params["module"])
        module.register_buffer("unused", torch.arange(3, dtype=torch.bfloat16))
        params = {"module": module, "update_rule": "sgd"}
    model = cls(**{**SMALL, **params}).fit(X, y, groups=task)
    return model.adapt(X[:16], y[:16], groups=task[:16]), y


def is_plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool, np.ndarray)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_is_plain_data_and_makes_the_same_estimator(name, data):
    model, y = fitted(name, data)
    X, _, task = data
    state = model.__getstate__()
    params = state.pop("params")
    assert is_plain(state)
    assert is_plain({**params, "module": None})
    twin = type(model).__new__(type(model))
    twin.__setstate__({**state, "params": params})
    seen = {"_valid", "_unchanged"}  # parameters that need no second look
    assert vars(twin).keys() == vars(model).keys() - seen
    assert_array_equal(
        twin.predict(X[:16], groups=task[:16]), model.predict(X[:16], groups=task[:16])
    )
    n_before = model.n_iter_
    for one in (model, twin):
        one.set_params(warm_start=True).fit(X, y, groups=task)
        one.adapt(X[:8], y[:8])
    assert twin.n_iter_ == model.n_iter_ == 2 * n_before > 0
    assert_array_equal(twin.predict(X), model.predict(X))
    for name, tensor in model.module_.state_dict().items():
        assert torch.equal(twin.module_.state_dict()[name], tensor)


def test_an_estimator_that_is_not_fitted_has_a_state_too():
    reg = MAMLRegressor(alpha=0.5, optimizer__eps=1e-4).set_fit_request(groups=False)
    twin = MAMLRegressor.__new__(MAMLRegressor)
    twin.__setstate__(reg.__getstate__())
    assert twin.get_params() == reg.get_params()
    assert twin.get_metadata_routing().fit.requests["groups"] is False


def test_a_state_of_another_version_is_refused(data):
    state = {**fitted("default", data)[0].__getstate__(), "sklearn_maml": 10**6}
    with pytest.raises(FileFormatError, match="has the format version 1000000"):
        MAMLRegressor.__new__(MAMLRegressor).__setstate__(state)


def test_copies_in_one_pickle_share_what_is_meta_learned(data):
    X, y, _ = data
    reg, _ = fitted("gradient steps", data)
    copies = [adapt(reg, X[:8], y[:8]) for _ in range(20)]
    assert len(pickle.dumps(copies)) < 20 * len(pickle.dumps(copies[0])) / 4
    first, second, *_ = pickle.loads(pickle.dumps(copies))
    assert first.module_ is second.module_


@pytest.mark.integration
@pytest.mark.parametrize("name", ["default", "gradient steps", "classes", "local labels"])
def test_skops_need_not_trust_torch(name, data):
    io = pytest.importorskip("skops.io")
    model, y = fitted(name, data)
    X, _, task = data
    few = (FewShotClassifier if hasattr(model, "classes_") else FewShotRegressor)(model)
    pipe = make_pipeline(StandardScaler(), few).fit(X[:8], y[:8])
    for one, ask in ((model, {"groups": task[:16]}), (pipe, {})):
        stored = io.dumps(one)
        untrusted = io.get_untrusted_types(data=stored)
        assert untrusted
        assert all(name.startswith("sklearn_maml.estimators.") for name in untrusted)
        twin = io.loads(stored, trusted=untrusted)
        assert_array_equal(twin.predict(X[:16], **ask), one.predict(X[:16], **ask))


# --- composites in files

RESTS = {
    "pipeline": lambda: make_pipeline(StandardScaler(), MAMLRegressor(**SMALL)),
    "column transformer": lambda: make_pipeline(
        ColumnTransformer([("scaled", StandardScaler(), [0])], remainder="passthrough"),
        MAMLRegressor(**SMALL),
    ),
    "dtypes and functions": lambda: make_pipeline(
        SimpleImputer(),
        SplineTransformer(n_knots=3),
        SelectKBest(f_regression, k=3),
        KBinsDiscretizer(3, encode="onehot-dense", strategy="uniform"),
        MAMLRegressor(**SMALL),
    ),
    "nested": lambda: make_pipeline(
        StandardScaler(), make_pipeline(FunctionTransformer(np.tanh), MAMLRegressor(**SMALL))
    ),
    "search": lambda: GridSearchCV(
        MAMLRegressor(update_rule="sgd", **SMALL),
        {"alpha": [0.01, 0.1]},
        cv=GroupKFold(2),
        scoring=task_scorer("r2", random_state=0),
    ),
    "search over a pipeline": lambda: GridSearchCV(
        make_pipeline(StandardScaler(), MAMLRegressor(**SMALL)),
        {"mamlregressor__steps": [1, 2]},
        cv=GroupKFold(2),
    ),
}


@pytest.fixture(scope="module")
def skops():
    return pytest.importorskip("skops.io")


@pytest.mark.integration
@pytest.mark.usefixtures("skops")
@pytest.mark.parametrize("name", RESTS)
def test_a_composite_is_loaded_as_it_was(name, data, tmp_path, monkeypatch):
    X, y, task = data
    model = RESTS[name]().fit(X, y, groups=task)
    path = tmp_path / "model.safetensors"
    sklearn_maml.save(path, model)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, refuse)
    twin = sklearn_maml.load(path)
    assert type(twin) is type(model)
    assert repr(twin) == repr(model)
    first, second = (adapt(one, X[:8], y[:8]) for one in (model, twin))
    assert_array_equal(second.predict(X), first.predict(X))
    assert model.score(X, y, groups=task) == twin.score(X, y, groups=task)
    twin.fit(X, y, groups=task)


@pytest.mark.integration
@pytest.mark.usefixtures("skops")
def test_few_shot_estimators_around_and_inside_composites_are_saved(data, tmp_path):
    X, y, task = data
    pipe = RESTS["pipeline"]().fit(X, y, groups=task)
    models = {
        "around": FewShotRegressor(pipe).fit(X[:8], y[:8]),
        "around, frozen": FewShotRegressor(FrozenEstimator(pipe)).fit(X[:8], y[:8]),
        "inside": make_pipeline(StandardScaler(), FewShotRegressor(pipe)).fit(X[:8], y[:8]),
        "two inside": VotingRegressor(
            [("many", FewShotRegressor(pipe)), ("few", FewShotRegressor(pipe, steps=1))]
        ).fit(X[:8], y[:8]),
        "target": TransformedTargetRegressor(
            FewShotRegressor(pipe), func=np.arcsinh, inverse_func=np.sinh
        ).fit(X[:8], y[:8]),
    }
    for name, model in models.items():
        sklearn_maml.save(tmp_path / name, model)
        twin = sklearn_maml.load(tmp_path / name)
        assert_array_equal(twin.predict(X), model.predict(X), err_msg=name)
    models["around"].save(tmp_path / "own")
    assert_array_equal(
        FewShotRegressor.load(tmp_path / "own").predict(X), models["around"].predict(X)
    )


@pytest.mark.integration
@pytest.mark.usefixtures("skops")
def test_classes_of_users_inside_composites_are_asked_for(data, tmp_path):
    X, y, task = data
    pipe = make_pipeline(StandardScaler(), MAMLRegressor(**SMALL, module=Residual))
    pipe.fit(X, y, groups=task)
    path = tmp_path / "model"
    sklearn_maml.save(path, pipe)
    with pytest.raises(ValueError, match=r"module \(the class Residual\).* sklearn_maml\.load\("):
        sklearn_maml.load(path)
    twin = sklearn_maml.load(path, module=Residual, device="cpu")
    assert twin[-1].device == "cpu"
    assert_array_equal(adapt(twin, X[:8], y[:8]).predict(X), adapt(pipe, X[:8], y[:8]).predict(X))


@pytest.mark.integration
@pytest.mark.usefixtures("skops")
def test_types_that_nobody_knows_are_refused_by_name(data, tmp_path):
    X, y, task = data
    pipe = make_pipeline(Halve(), MAMLRegressor(**SMALL)).fit(X, y, groups=task)
    path, name = tmp_path / "model", f"{__name__}.Halve"
    with pytest.raises(TypeError, match=rf"a Pipeline, has parts of types.*\['{name}'\]"):
        sklearn_maml.save(path, pipe)
    assert not path.exists()
    sklearn_maml.save(path, pipe, trusted=[name])
    with pytest.raises(ValueError, match=rf"not known to be harmless: \['{name}'\]"):
        sklearn_maml.load(path)
    twin = sklearn_maml.load(path, trusted=[name])
    assert type(twin[0]) is Halve
    assert_array_equal(adapt(twin, X[:8], y[:8]).predict(X), adapt(pipe, X[:8], y[:8]).predict(X))
