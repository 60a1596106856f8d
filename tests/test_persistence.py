"""Saved models predict the same, killed fits go on to the same end, bad files are refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, EarlyStopping, EpochScoring, LRScheduler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import sklearn_maml
from sklearn_maml import (
    Checkpoint,
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    storage,
)
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import DeviceWarning, FileFormatError
from sklearn_maml.meta_gradients import Implicit
from sklearn_maml.modules import ContextMLP
from sklearn_maml.storage import Decoder, Encoder, read_tree, write_tree
from sklearn_maml.training.checkpoint import CheckpointedFit
from sklearn_maml.update_rules import LogisticHead, MetaSGD, PerLayerPerStep

SMALL = {
    "hidden_layer_sizes": (8,),
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 2,
    "meta_batch_size": 4,
    "max_iter": 6,
    "random_state": 0,
}
N_TASKS, N_ROWS, N_FEATURES = 12, 12, 3


class Net(nn.Module):
    """A module of the user's own."""

    def __init__(self, in_features, out_features, width=4, act=nn.Tanh, dropout=0.0):
        super().__init__()
        self.body = nn.Linear(in_features, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.act = act()
        self.head = nn.Linear(width, out_features)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.head(self.drop(self.act(self.norm(self.body(x)))))


class OtherNet(Net):
    """The same weights under another name."""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N_TASKS * N_ROWS, N_FEATURES))
    groups = np.repeat(np.arange(N_TASKS), N_ROWS)
    y = X[:, 0] * np.repeat(rng.standard_normal(N_TASKS), N_ROWS) + np.repeat(
        rng.standard_normal(N_TASKS), N_ROWS
    )
    return X, y, groups


def labels_of(y, groups):
    """Three classes with every task having rows of each."""
    order = np.argsort(np.argsort(y.reshape(N_TASKS, N_ROWS), axis=1), axis=1)
    return (order % 3).ravel()


def saved(estimator, tmp_path, load_options=None, **options):
    path = tmp_path / "model.safetensors"
    estimator.save(path, **options)
    return type(estimator).load(path, **(load_options or {}))


def assert_same_weights(a, b):
    first, second = a._learner.state_dict(), b._learner.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- what is saved predicts the same

REGRESSORS = {
    "default": {},
    "float32": {"float32": True},
    "head": {"adapted": "head"},
    "patterns": {"adapted": ["0.*", "2.weight"]},
    "meta-sgd": {"update_rule": MetaSGD(per="tensor"), "update_rule__max_grad_norm": 2.0},
    "steps": {"update_rule": PerLayerPerStep(n_steps=3)},
    "ridge": {"update_rule": "ridge-head", "adapted": "head", "update_rule__lam": 0.5},
    "implicit": {"meta_gradient": Implicit()},
    "reptile": {"meta_gradient": "reptile"},
    "context": {"module": ContextMLP, "module__n_context": 2, "adapted": "context"},
    "torch class": {"module": nn.Linear},
    "center": {"center_y": True, "activation": "tanh", "hidden_layer_sizes": [4, 4]},
    "optimizer": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.5},
    "generator": {"random_state": np.random.RandomState(3)},
    "checkpointed": {"callbacks": True},
    "bf16": {"engine__precision": "bf16"},
    "transductive": {"engine__batch_norm": "transductive", "module": "Net"},
    "instance": {"module": "instance"},
}


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_is_loaded_as_it_was(name, data, tmp_path):
    X, y, groups = data
    params = {**SMALL, **REGRESSORS[name]}
    if params.pop("float32", False):
        X = X.astype(np.float32)
    given = {}
    if params.get("module") == "Net":
        params |= {"module": Net, "module__act": nn.ELU, "module__width": 5}
        given = {"module": Net}
    elif params.get("module") == "instance":
        params["module"] = nn.Sequential(nn.Linear(N_FEATURES, 5), nn.ReLU(), nn.Linear(5, 1))
        given = {"module": params["module"]}
    if params.get("callbacks"):
        params["callbacks"] = [("keeper", Checkpoint(tmp_path / "fit", every=5))]
    reg = MAMLRegressor(**params).fit(X, y, groups=groups)
    reg.adapt(X[:48:2], y[:48:2], groups=groups[:48:2])
    before = torch.get_rng_state()
    twin = saved(reg, tmp_path, given)
    assert torch.equal(torch.get_rng_state(), before)
    if name != "generator":  # whose name has its address
        assert repr(twin) == repr(reg)
    ours, theirs = reg.get_params(deep=False), twin.get_params(deep=False)
    assert ours.keys() == theirs.keys()
    plain = {k for k, v in ours.items() if v is None or isinstance(v, (str, int, float, tuple))}
    assert {k: ours[k] for k in plain} == {k: theirs[k] for k in plain}
    rows = {"X": X[1:48:2], "groups": groups[1:48:2]}
    assert_array_equal(twin.predict(**rows), reg.predict(**rows))
    assert twin.predict(**rows).dtype == reg.predict(**rows).dtype
    assert twin.score(X, y, groups=groups) == reg.score(X, y, groups=groups)
    assert_same_weights(reg, twin)
    assert twin.module_ is twin._learner.module is twin.net_.module_.module
    assert twin.history_ == reg.history_
    assert twin.n_iter_ == reg.n_iter_
    for model in (reg, twin):
        if "update_rule" not in REGRESSORS[name]:
            model.set_params(alpha=0.05, adapt_steps=3)
        model.adapt(X[:5], y[:5])
    assert_array_equal(twin.predict(X), reg.predict(X))
    # a second generation is no different
    again = saved(twin, tmp_path, given)
    assert_array_equal(again.predict(X), reg.predict(X))


CLASSIFIERS = {
    "shared labels": {},
    "n_ways": {"n_ways": 2, "n_shots": 2, "n_queries": 2},
    "zero head": {"n_ways": 3, "n_shots": 1, "n_queries": 2, "head": "zero"},
    "logistic": {"update_rule": LogisticHead(newton_steps=3), "adapted": "head"},
}


@pytest.mark.parametrize("labels", ["int", "str", "object", "bool"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_loaded_as_it_was(name, labels, data, tmp_path):
    X, y, groups = data
    y = labels_of(y, groups)
    if labels == "str":
        y = np.array(["a", "bb", "ccc"])[y]
    elif labels == "object":
        y = np.array(["a", "bb", "ccc"], dtype=object)[y]
    elif labels == "bool":
        if name == "zero head":
            pytest.skip("two classes")
        y = y > 0
    clf = MAMLClassifier(**{**SMALL, **CLASSIFIERS[name]}).fit(X, y, groups=groups)
    path = tmp_path / "before"
    clf.save(path)
    unadapted = sklearn_maml.load(path)
    assert unadapted.classes_.dtype == clf.classes_.dtype
    assert_array_equal(unadapted.classes_, clf.classes_)
    for model in (clf, unadapted):
        rows = np.isin(y, np.unique(y)[:2])
        model.adapt(X[rows], y[rows], groups=groups[rows])
    twin = saved(clf, tmp_path)
    for method in ("predict", "predict_proba", "decision_function"):
        expected = getattr(clf, method)(X, groups=groups)
        assert getattr(twin, method)(X, groups=groups).dtype == expected.dtype
        assert_array_equal(getattr(twin, method)(X, groups=groups), expected)
        assert_array_equal(getattr(unadapted, method)(X, groups=groups), expected)
    assert_array_equal(twin.classes_, clf.classes_)
    assert list(map(type, twin.classes_.tolist())) == list(map(type, clf.classes_.tolist()))


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(N_TASKS) * 10,
        np.linspace(0.1, 7.3, N_TASKS),
        np.array([f"shop {k} é" for k in range(N_TASKS)]),
        np.array([f"shop {k}" for k in range(N_TASKS)], dtype=object),
        np.arange(N_TASKS).astype(np.uint16),
    ],
    ids=["int", "float", "str", "object", "uint16"],
)
def test_task_ids_of_any_kind_are_kept(ids, data, tmp_path):
    X, y, groups = data
    groups = ids[groups]
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups).adapt(X, y, groups=groups)
    twin = saved(reg, tmp_path)
    assert_array_equal(twin.tasks_, reg.tasks_)
    assert twin.tasks_.dtype == reg.tasks_.dtype
    assert_array_equal(
        twin.predict(X[::-1], groups=groups[::-1]), reg.predict(X, groups=groups)[::-1]
    )
    assert twin._fingerprints == reg._fingerprints
    with pytest.raises(ValueError, match="not adapted to"):
        twin.predict(X[:1], groups=np.array(["?" if ids.dtype.kind in "OU" else 999]))


def test_many_adapted_heads_take_their_numbers_and_little_else(tmp_path):
    rng = np.random.default_rng(0)
    n_tasks = 3000
    X = rng.standard_normal((n_tasks * 4, 3)).astype(np.float32)
    y, groups = X[:, 0] ** 2, np.repeat(np.arange(n_tasks), 4)
    reg = MAMLRegressor(**{**SMALL, "hidden_layer_sizes": 16}, adapted="head")
    reg.fit(X[:400], y[:400], groups=groups[:400]).adapt(X, y, groups=groups)
    names = np.array([f"customer-{k}" for k in range(n_tasks)])[groups]
    reg.adapt(X, y, groups=names)
    twin = saved(reg, tmp_path)
    assert_array_equal(twin.predict(X, groups=names), reg.predict(X, groups=names))
    size = (tmp_path / "model.safetensors").stat().st_size
    heads, ids = n_tasks * 17 * 4, n_tasks * 4 * len("customer-2999")
    assert size < heads + ids + 40_000
    reg.save(tmp_path / "without", tasks=False)
    assert (tmp_path / "without").stat().st_size < 40_000
    with pytest.raises(NotFittedError, match="not adapted"):
        sklearn_maml.load(tmp_path / "without").predict(X)


def test_compiled_kernels_predict_the_same_after_loading(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(**{**SMALL, "max_iter": 10}).fit(X, y, groups=groups)
    reg._rung = "native"
    reg.adapt(X, y, groups=groups)
    assert reg._state.adapted.engine.rung == "native"
    twin = saved(reg, tmp_path)
    assert twin._state.adapted.engine.rung == "native"
    assert_array_equal(twin.predict(X, groups=groups), reg.predict(X, groups=groups))
    twin.adapt(X, y, groups=groups)
    assert twin._state.adapted.engine.rung == "native"


def test_one_task_column_and_feature_names_are_kept(data, tmp_path):
    pd = pytest.importorskip("pandas")
    X, y, groups = data
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(who=groups)
    reg = MAMLRegressor(**SMALL, task_column="who").fit(frame, y)
    twin = saved(reg.adapt(frame, y), tmp_path)
    assert_array_equal(twin.predict(frame), reg.predict(frame))
    with pytest.raises(ValueError, match="feature names"):
        twin.predict(frame[["b", "a", "c", "who"]])


def test_metadata_requests_are_kept(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    with sklearn_config():
        reg.set_score_request(sample_weight=True)
        twin = saved(reg, tmp_path)
        assert str(twin.get_metadata_routing()) == str(reg.get_metadata_routing())
        assert str(twin.get_metadata_routing()) != str(
            clone(MAMLRegressor()).get_metadata_routing()
        )


def sklearn_config():
    import sklearn

    return sklearn.config_context(enable_metadata_routing=True)


def test_a_warm_start_goes_on_after_loading_as_before(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL, warm_start=True).fit(X, y, groups=groups)
    twin = saved(reg, tmp_path)
    for model in (reg, twin):
        model.fit(X, y, groups=groups)
    assert_same_weights(reg, twin)
    assert twin.n_iter_ == reg.n_iter_ == 12
    lean = saved(reg, tmp_path, training=False)
    assert_array_equal(
        lean.adapt(X[:N_ROWS], y[:N_ROWS]).predict(X), reg.adapt(X[:N_ROWS], y[:N_ROWS]).predict(X)
    )
    assert lean.history_ == reg.history_
    with pytest.raises(ValueError, match=r"without the state of its optimiser.*training=True"):
        lean.fit(X, y, groups=groups)
    lean.set_params(warm_start=False).fit(X, y, groups=groups)


def test_frozen_parameters_stay_frozen(data, tmp_path):
    X, y, groups = data
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    reg = MAMLRegressor(net, **SMALL).fit(X, y, groups=groups).adapt(X[:N_ROWS], y[:N_ROWS])
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    twin = saved(reg, tmp_path, {"module": fresh})
    assert [p.requires_grad for p in twin.module_.parameters()] == [False, False, True, True]
    assert_array_equal(twin.predict(X), reg.predict(X))


# --- FewShot estimators


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_prior", [False, True])
def test_few_shot_estimators_are_saved_with_their_prior(with_prior, frozen, data, tmp_path):
    X, y, groups = data
    prior = MAMLRegressor(**SMALL).fit(X, y, groups=groups) if with_prior else None
    if frozen and with_prior:
        prior = FrozenEstimator(prior)
    learner = FewShotRegressor(prior, alpha=0.05, random_state=0).fit(X[:6], y[:6])
    twin = saved(learner, tmp_path)
    assert_array_equal(twin.predict(X), learner.predict(X))
    assert_array_equal(
        clone(twin).fit(X[6:], y[6:]).predict(X), clone(learner).fit(X[6:], y[6:]).predict(X)
    )
    with pytest.raises(FileFormatError, match=r"has a FewShotRegressor, not a FewShotClassifier"):
        FewShotClassifier.load(tmp_path / "model.safetensors")


def test_few_shot_classifiers_keep_their_classes(data, tmp_path):
    X, y, groups = data
    y = np.array(["x", "y", "z"])[labels_of(y, groups)]
    prior = MAMLClassifier(Net, **{**SMALL, "hidden_layer_sizes": 64}, n_ways=3)
    learner = FewShotClassifier(prior.fit(X, y, groups=groups)).fit(X[:12], y[:12])
    twin = saved(learner, tmp_path, {"module": Net})
    assert_array_equal(twin.classes_, learner.classes_)
    assert_array_equal(twin.predict_proba(X), learner.predict_proba(X))


def test_a_pipeline_as_prior_asks_for_skops(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops.io", None)
    X, y, groups = data
    with sklearn_config():
        pipe = make_pipeline(StandardScaler(), MAMLRegressor(**SMALL)).fit(X, y, groups=groups)
    learner = FewShotRegressor(pipe).fit(X[:6], y[:6])
    with pytest.raises(
        TypeError,
        match=r"model_ is a sklearn.pipeline.Pipeline, .* skops",
    ):
        learner.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    # its last step is saved by itself
    step = adapt(pipe, X[:6], y[:6])[-1]
    twin = saved(step, tmp_path)
    assert_array_equal(twin.predict(pipe[0].transform(X)), learner.predict(X))


# --- what a file does not hold


class Shout(Callback):
    """A callback of the user's own."""


def test_parameters_that_no_file_holds_are_asked_for_by_name(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(Net, **SMALL, callbacks=[Shout()], module__act=lambda: nn.ReLU())
    reg.fit(X, y, groups=groups).adapt(X[:N_ROWS], y[:N_ROWS])
    path = tmp_path / "model"
    reg.save(path)
    with pytest.raises(ValueError, match=r"no file holds") as caught:
        MAMLRegressor.load(path)
    for part in ("module (the class Net)", "callbacks (an object of class list)", "module__act"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"callbacks=\.\.\.\)\. callbacks=None goes without"):
        MAMLRegressor.load(path, module=Net, module__act=nn.ReLU)
    with pytest.raises(ValueError, match=r"the class Net; got the class OtherNet"):
        MAMLRegressor.load(path, module=OtherNet, module__act=nn.ReLU, callbacks=None)
    with pytest.raises(ValueError, match=r"the class Net; got an object of class Net"):
        MAMLRegressor.load(path, module=Net(3, 1), module__act=nn.ReLU, callbacks=None)
    with pytest.raises(ValueError, match=r"load got alpha, but"):
        MAMLRegressor.load(path, module=Net, module__act=nn.ReLU, callbacks=None, alpha=3)
    twin = MAMLRegressor.load(path, module=Net, module__act=nn.ReLU, callbacks=None)
    assert_array_equal(twin.predict(X), reg.predict(X))
    with pytest.raises(FileFormatError, match=r"size mismatch|module passed to load"):
        MAMLRegressor.load(
            path, module=type("Net", (Net,), {"__init__": _wide}), module__act=nn.ReLU,
            callbacks=None,
        )  # fmt: skip


def _wide(self, in_features, out_features, act):
    Net.__init__(self, in_features, out_features, width=9)


def test_what_no_list_has_is_an_error(data, tmp_path, monkeypatch):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    reg.surprise_ = 3
    with pytest.raises(TypeError, match=r"save does not know: \['surprise_'\]"):
        reg.save(tmp_path / "model")
    own = MAMLRegressor.__stored_attributes__
    monkeypatch.setattr(MAMLRegressor, "__stored_attributes__", (*own, "surprise_"))
    reg.surprise_ = {"members": [{"w": torch.ones(2), "rate": np.float32(3)}, {}], "z": (np.inf,)}
    twin = saved(reg, tmp_path)
    assert torch.equal(twin.surprise_["members"][0]["w"], torch.ones(2))
    assert twin.surprise_["z"] == (np.inf,)
    reg.surprise_ = [object()]
    with pytest.raises(TypeError, match=r"surprise_/0 is a builtins.object"):
        reg.save(tmp_path / "model")


def test_changed_settings_are_refused(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    for params in ({"adapted": "head"}, {"hidden_layer_sizes": (9,)}):
        with pytest.raises(ValueError, match="was changed after fit"):
            copy.deepcopy(reg).set_params(**params).save(tmp_path / "model")
    with pytest.raises(NotFittedError):
        MAMLRegressor().save(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        reg.save(tmp_path / "nowhere" / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_missing_device_is_loaded_on_the_cpu(data, tmp_path):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups).adapt(X[:N_ROWS], y[:N_ROWS])
    # no machine has a hundred of them
    reg.device, reg.device_ = "cuda:99", torch.device("cuda:99")
    reg.save(tmp_path / "model")
    with pytest.warns(DeviceWarning, match=r"device='cuda:99'.*loaded on the CPU"):
        twin = MAMLRegressor.load(tmp_path / "model")
    assert twin.device_ == torch.device("cpu")
    assert twin.device == "cuda:99"
    other = sklearn_maml.load(tmp_path / "model", device="cpu")
    assert other.device == "cpu"
    reg.device_ = torch.device("cpu")
    expected = reg.predict(X)
    for model in (twin, other):
        assert_array_equal(model.predict(X), expected)
        assert_array_equal(model.adapt(X[:9], y[:9]).predict(X), reg.adapt(X[:9], y[:9]).predict(X))
    with pytest.raises(ValueError, match="no such device"):
        MAMLRegressor.load(tmp_path / "model", device="cuda:98")


def test_an_interrupted_save_leaves_the_old_file(data, tmp_path, monkeypatch):
    X, y, groups = data
    reg = MAMLRegressor(**SMALL).fit(X, y, groups=groups)
    path = tmp_path / "model"
    reg.save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        reg.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- files that are refused


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    X, y, groups = data
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    MAMLRegressor(**{**SMALL, "hidden_layer_sizes": (2,)}).fit(X, y, groups=groups).save(path)
    return path


def forge(path, change, to):
    """Write a file with another tree and a right digest."""
    tree, tensors = read_tree(path)
    write_tree(to, change(tree) or tree, tensors)
    return to


def test_every_changed_byte_is_noticed(model, tmp_path):
    data = bytearray(model.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "changed"
    places = {*rng.integers(len(data), size=300).tolist(), *range(8), len(data) - 1}
    header = 8 + int.from_bytes(data[:8], "little")
    places |= set(range(header - 12, header))  # blanks, which mean nothing
    for place in places:
        changed = bytearray(data)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with pytest.raises(FileFormatError):
            MAMLRegressor.load(path)
    changed = bytearray(data)
    changed[header - 1] = ord("\n")  # as good as the blank, to JSON
    if changed != data:
        path.write_bytes(changed)
        with pytest.raises(FileFormatError):
            MAMLRegressor.load(path)


def test_truncated_and_extended_files_are_refused(model, tmp_path):
    data = model.read_bytes()
    path = tmp_path / "cut"
    for length in {0, 1, 7, 8, 9, *np.linspace(10, len(data) - 1, 40, dtype=int).tolist()}:
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError):
            sklearn_maml.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FileFormatError, match="digest"):
        sklearn_maml.load(path)


def test_other_files_are_refused(data, model, tmp_path):
    X, y, groups = data
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError):
        MAMLRegressor.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileFormatError, match=r"not a safetensors file"):
        MAMLRegressor.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FileFormatError, match=r"not written by sklearn_maml"):
        MAMLRegressor.load(path)
    with pytest.raises(FileFormatError, match=r"has a MAMLRegressor, not a MAMLClassifier"):
        MAMLClassifier.load(model)
    forge(model, lambda tree: {**tree, "class": "Popen"}, path)
    with pytest.raises(FileFormatError, match=r"has a Popen, which is no class of sklearn_maml"):
        sklearn_maml.load(path)
    path = tmp_path / "checkpoint"
    MAMLRegressor(**SMALL, callbacks=[Checkpoint(path)]).fit(X, y, groups=groups)
    with pytest.raises(FileFormatError, match=r"is a checkpoint and no model"):
        sklearn_maml.load(path)


@pytest.mark.parametrize(("version", "message"), [
    (storage.FORMAT + 1, f"reads up to {storage.FORMAT}"), (storage.FORMAT - 1, "Fit it anew"),
    ("1.5", f"expected {storage.FORMAT}"), (0, "expected"), ("x", "expected"),
])  # fmt: skip
def test_other_versions_are_refused(version, message, model, tmp_path, monkeypatch):
    tree, tensors = read_tree(model)
    monkeypatch.setattr(storage, "FORMAT", version)
    write_tree(tmp_path / "later", tree, tensors)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match=message):
        sklearn_maml.load(tmp_path / "later")


class Tripwire:
    """Notices when it is imported from a file's name."""

    touched = False

    def __init__(self, *args, **kwargs):
        Tripwire.touched = True


EVIL = [
    {"$": "class", "name": "os.system"},
    {"$": "class", "name": "posix.system"},
    {"$": "class", "name": f"{__name__}.Tripwire"},
    {"$": "object", "name": "subprocess.Popen", "params": {"args": ["true"]}},
    {"$": "object", "name": f"{__name__}.Tripwire", "params": {}},
    {"$": "object", "name": "SGDRule", "params": {"self": 3}},
    {"$": "estimator", "content": {"class": "Tripwire", "params": {}, "fitted": {}}},
    {"$": "_add", "name": "x"},
    {"$": "__init", "name": "x"},
    {"$": "array", "shape": [3], "dtype": "|O", "name": "estimator/params/alpha"},
    {"$": "array", "shape": [10**12], "dtype": "<f8", "name": "missing"},
    {"$": "dtype", "name": "|O"},
    {"$": "frozen", "estimator": {"$": "float", "value": "nan()"}},
    {"$": None},
    {"$": "RandomState", "state": [1]},
]


@pytest.mark.parametrize("node", EVIL, ids=range(len(EVIL)))
@pytest.mark.parametrize("place", ["update_rule", "module", "__class__", "fitted"])
def test_names_in_a_file_are_never_imported(place, node, model, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    monkeypatch.setattr("importlib.import_module", called.append)

    def change(tree):
        where = tree["content"]["fitted" if place == "fitted" else "params"]
        where["_rung" if place == "fitted" else place] = node

    path = forge(model, change, tmp_path / "evil")
    with pytest.raises(FileFormatError):
        MAMLRegressor.load(path)
    assert not called
    assert not Tripwire.touched


def test_attributes_that_no_list_has_are_not_taken_from_a_file(model, tmp_path):
    def change(tree):
        tree["content"]["fitted"]["predict"] = "no"

    with pytest.raises(FileFormatError, match=r"predict.*are no attributes"):
        MAMLRegressor.load(forge(model, change, tmp_path / "evil"))


def test_deep_nesting_is_refused(model, tmp_path):
    tree, tensors = read_tree(model)
    text = json.dumps({**tree, "deep": "@"}).replace('"@"', "[" * 100_000 + "]" * 100_000)
    path = tmp_path / "deep"

    class Raw(dict):
        pass

    original = json.dumps
    storage.json.dumps = lambda value, **options: text
    try:
        write_tree(path, Raw(tree), tensors)
    finally:
        storage.json.dumps = original
    with pytest.raises(FileFormatError, match="not well-formed"):
        sklearn_maml.load(path)


def test_nothing_on_the_load_path_unpickles(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    sklearn_maml.load(model)


def test_a_file_can_be_read_by_safetensors(model):
    with safe_open(model, framework="np") as file:
        names = list(file.keys())
        document = json.loads(file.metadata()["sklearn_maml"])
    assert "estimator/learner/module.0.weight" in names
    assert document["content"]["params"]["max_iter"] == 6


# --- the encoder


def round_trip(value, other=None, tmp_path=None):
    encoder = Encoder(other)
    node = json.loads(json.dumps(encoder.encode(value, "value"), allow_nan=False))
    return Decoder(encoder.tensors).decode(node)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        if a.dtype.kind == "O":
            return a.shape == b.shape and same(a.ravel().tolist(), b.ravel().tolist())
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return repr(a) == repr(b)


VALUES = [
    None, True, 0, -1, 2**70, 1.5, 0.1 + 0.2, 5e-324, -0.0, np.inf, -np.inf, np.nan, "", "é\ud800$",
    [], (), {}, [1], (1, (2, [3.0])), {"a": 1, 2: "b", (1, "x"): None, "$": 3}, [True, 1, 1.0],
    list(range(100)), [2**70] * 50, [0.1, np.nan, np.inf] * 20, [True, False] * 40,
    [f"task {k} é" for k in range(100)], ["\ud800"] * 50, [[1, 2], [], [3]], [[], []],
    [{"a": k, "b": 0.5 * k} for k in range(50)], [{}] * 40,
    [{"a": k} if k % 3 else {"b": True, "a": None} for k in range(50)],
    [{f"k{k}": k} for k in range(50)], {k: 3 * k for k in range(100)},
    {f"t{k}": k / 7 for k in range(100)},
    np.float32(0.1), np.float64("nan"), np.int8(-3), np.bool_(True), np.str_("ab"),
    np.datetime64("2020-01-01"), np.complex64(1j), np.float16(2),
    np.arange(6).reshape(2, 3), np.array(3.5), np.zeros((0, 4)), np.array([True]),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["a", "bcd"]), np.array([b"x"]),
    np.array(["a", 3, None, 1.5, (1, 2)], dtype=object), np.arange(3).astype(">i4").astype("<i4"),
    np.array([np.nan, np.inf, -0.0], dtype=np.float16), np.arange(4, dtype=np.uint64),
    np.array(["2020-01-01", "NaT"], dtype="M8[ns]"), np.array([1 + 2j]),
    np.array([[["x"]]], object), torch.zeros(0),
    torch.tensor(2.5), torch.arange(6).reshape(2, 3).T, torch.ones(2).bfloat16(),
    torch.tensor([True]), torch.float32, np.dtype("f4"), np.dtype("U3"), torch.device("cuda:3"),
    Path("a/b"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_data_come_back_as_they_were(value):
    assert same(round_trip(value), value)
    assert same(round_trip({"x": [value, (value,)]}), {"x": [value, (value,)]})


def test_random_states_go_on_where_they_were():
    state = np.random.RandomState(3)
    state.normal(size=3)
    twin = round_trip(state)
    assert_array_equal(twin.normal(size=5), state.normal(size=5))


def test_random_trees_come_back_as_they_were():
    rng = np.random.default_rng(0)

    def tree(depth):
        kind = rng.integers(4 if depth else 1)
        size = int(rng.choice([0, 1, 3, 40]))
        if kind == 0:
            return VALUES[rng.integers(len(VALUES))]
        if kind == 1:
            return [tree(depth - 1) for _ in range(size)]
        if kind == 2:
            return tuple(tree(depth - 1) for _ in range(size % 7))
        return {f"{rng.integers(1000)}/$": tree(depth - 1) for _ in range(size)}

    for _ in range(100):
        value = tree(3)
        assert same(round_trip(value), value)


def test_a_tensor_that_is_used_twice_is_stored_once():
    whole = torch.arange(10.0)
    encoder = Encoder()
    node = encoder.encode([whole, whole, whole[2:4], whole[:10]], "value")
    assert len(encoder.tensors) == 2
    a, b, c, _ = Decoder(encoder.tensors).decode(node)
    assert a is b
    assert torch.equal(c, whole[2:4])


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, lambda: 1, Tripwire, np.zeros(2, dtype="i4,f4"), b"x", 1j,
     torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()],
    ids=range(9),
)  # fmt: skip
def test_other_data_are_refused_by_place(value):
    with pytest.raises(TypeError, match=r"tree/a/0 "):
        Encoder().encode({"a": [value]}, "tree")


# --- checkpoints

SCRIPT = textwrap.dedent(
    """
    import hashlib, os, signal, sys, time, threading, warnings
    import numpy as np
    import torch
    from torch import nn
    from skorch.callbacks import LRScheduler
    from sklearn_maml import Checkpoint, MAMLClassifier, MAMLRegressor
    from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
    from sklearn_maml.training.net import MetaNet
    from sklearn_maml.training.outer_step import OuterStep

    class Drop(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.body, self.drop = nn.Linear(in_features, 16), nn.Dropout(0.3)
            self.head = nn.Linear(16, out_features)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            return self.head(self.drop(torch.tanh(self.body(x))))

    def conv():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4),
            nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
        )

    CASES = {
        "default": {},
        "early stopping": dict(early_stopping=True, n_iter_no_change=2, beta=0.03, max_iter=700),
        "long": dict(max_iter=3000),
        "first-order": dict(meta_gradient="first-order", update_rule="meta-sgd"),
        "dropout": dict(module=Drop, steps=2),
        "traced": dict(module=Drop, steps=2, max_iter=1250),
        "cosine": dict(
            callbacks=[LRScheduler("CosineAnnealingLR", T_max=300, step_every="batch")]
        ),
        "plateau": dict(callbacks=[
            LRScheduler("ReduceLROnPlateau", monitor="train_loss", patience=0)
        ]),
        "momentum": dict(optimizer="sgd", optimizer__momentum=0.9, beta=0.01),
        "shuffled": dict(iterator_train__shuffle=True),
        "distribution": {},
        "no seed": dict(random_state=None),
        "conv": dict(module=conv(), max_iter=200),
    }
    case, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    params = dict(
        hidden_layer_sizes=(16,), steps=3, max_iter=300, random_state=0, meta_batch_size=10,
    )
    params.update(CASES[case])
    if path != "-":
        params["callbacks"] = [*params.get("callbacks", []), Checkpoint(path, every=0)]
    X, y, groups = make_sinusoid_tasks(n_tasks=30, random_state=0)
    kind = MAMLRegressor
    if case == "conv":
        kind, rng = MAMLClassifier, np.random.default_rng(0)
        X = rng.standard_normal((600, 16)).astype(np.float32)
        groups = np.repeat(np.arange(20), 30)
        y = (X[:, :3] * (1 + groups[:, None] % 3)).argmax(1)
        params["meta_batch_size"] = 4
    model = kind(**params)
    if limit > 0:  # die in this update
        step = OuterStep.meta_gradient

        def die(self, net, *args):
            if net.update_ >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, net, *args)

        OuterStep.meta_gradient = die
    elif limit < 0:  # die after so many milliseconds of training, wherever that is
        step = MetaNet.fit_loop

        def watched(self, *args, **options):
            threading.Timer(-limit / 1e3, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return step(self, *args, **options)

        MetaNet.fit_loop = watched
    if case == "distribution":
        model.fit(SinusoidTasks(n_rows=20))
    else:
        model.fit(X, y, groups=groups)
    digest = hashlib.sha256()
    for name, value in sorted(model._learner.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    rows = [{k: v for k, v in row.items() if k != "dur"} for row in model.history_]
    digest.update(repr((rows, model.n_iter_, model._rung)).encode())
    print(digest.hexdigest(), model.n_iter_)
    """
)


def run_script(case, path, limit=0):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(sklearn_maml.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:.torch:DeprecationWarning", "-c", SCRIPT,
         case, str(path), str(limit)],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    return done


def check_resumed(case, path, limits):
    n_killed = 0
    for limit in limits:
        n_killed += run_script(case, path, limit).returncode == -signal.SIGKILL
    resumed = run_script(case, path)
    assert resumed.returncode == 0, resumed.stderr
    if case == "no seed":
        again = run_script(case, path)
        assert again.stdout != resumed.stdout, "a complete fit without a seed is not taken up"
        return n_killed
    whole = run_script(case, "-")
    assert whole.returncode == 0, whole.stderr
    assert resumed.stdout == whole.stdout
    assert not list(path.parent.glob(".*.part"))
    return n_killed


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_fit_goes_on_to_the_same_parameters(tmp_path):
    path = tmp_path / "fit.safetensors"
    assert check_resumed("default", path, [170]) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    "case",
    ["early stopping", "first-order", "dropout", "traced", "cosine", "plateau", "momentum",
     "shuffled", "distribution", "no seed", "conv"],
)  # fmt: skip
def test_fits_of_every_kind_go_on_to_the_same_parameters(case, tmp_path):
    rng = np.random.default_rng(list(case.encode()))
    last = {"traced": 1250, "conv": 200}.get(case, 250)
    limits = sorted(rng.integers(51, last, size=3).tolist())
    assert check_resumed(case, tmp_path / "fit.safetensors", limits) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("case", ["long", "dropout", "traced"])
def test_a_fit_killed_at_any_time_goes_on_to_the_same_parameters(case, tmp_path):
    path = tmp_path / "fit.safetensors"
    rng = np.random.default_rng(0)
    # unlike the other tests these die anywhere: in a step, in validation, while a file is written
    waits = rng.integers(50, 1500 if case == "traced" else 500, size=8)
    assert check_resumed(case, path, (-waits).tolist()) >= 3


class Stop(BaseException):
    """Ends a fit from inside, as a kill would."""


class Bomb(Callback):
    """Ends the fit in an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == self.epoch + 1:
            raise Stop


def interrupted(path, data, epoch=2, cls=MAMLRegressor, **params):
    X, y, groups = data
    params = {**SMALL, "max_iter": 200, **params}
    callbacks = [*params.pop("callbacks", []), Bomb(epoch), Checkpoint(path, every=0)]
    with pytest.raises(Stop):
        cls(**params, callbacks=callbacks).fit(X, y, groups=groups)
    return params


def test_a_checkpoint_of_another_fit_is_refused_and_kept(data, tmp_path):
    X, y, groups = data
    path = tmp_path / "fit"
    params = interrupted(path, data)
    before = path.read_bytes()
    keeper = [Checkpoint(path)]
    changes = {
        "the parameter 'beta'": {"beta": 0.1},
        "the parameter 'update_rule'": {"update_rule": MetaSGD()},
        "the parameter 'optimizer__eps'": {"optimizer__eps": 1e-5},
        "the parameter 'hidden_layer_sizes'": {"hidden_layer_sizes": (9,)},
        "the seed": {"random_state": 1},
    }
    for what, change in changes.items():
        with pytest.raises(ValueError, match=f"another fit, which is not finished: .*{what}"):
            MAMLRegressor(**{**params, **change}, callbacks=keeper).fit(X, y, groups=groups)
    others = {"X": (X + 1, y, groups), "y": (X, y + 1, groups), "groups": (X, y, groups + 1)}
    for one_more in others.values():
        with pytest.raises(ValueError, match="the tasks in X y and groups"):
            MAMLRegressor(**params, callbacks=keeper).fit(*one_more)
    with pytest.raises(ValueError, match="another fit"):
        MAMLClassifier(**params, callbacks=keeper).fit(X, labels_of(y, groups), groups=groups)
    assert path.read_bytes() == before
    # verbosity and the like are not of the fit
    resumed = MAMLRegressor(**params, device="cpu", callbacks=keeper).fit(X, y, groups=groups)
    assert_same_weights(resumed, MAMLRegressor(**params).fit(X, y, groups=groups))


@pytest.mark.parametrize("epoch", [4, 7])  # while the head is trained, and after it
def test_the_best_of_head_and_steps_outlive_an_interruption(epoch, tmp_path):
    rng = np.random.RandomState(0)
    X, groups = rng.randn(400, 1), np.repeat(np.arange(20), 20)
    y = X[:, 0] + rng.randn(400)  # neither falls behind the other
    data = X, y, groups
    # a rate at which the last epochs of the head are not its best
    settings = {"update_rule": "auto", "max_iter": 500, "beta": 0.03, "validation_fraction": 0.5}
    params = interrupted(tmp_path / "fit", data, epoch, **settings, hidden_layer_sizes=(16,))
    resumed = MAMLRegressor(**params, callbacks=[Checkpoint(tmp_path / "fit")])
    resumed.fit(X, y, groups=groups)
    whole = MAMLRegressor(**params).fit(X, y, groups=groups)
    for name, p in whole.net_.module_.named_parameters():
        mine = resumed.net_.module_.get_parameter(name)
        assert torch.equal(mine, p), name
        assert mine.requires_grad, name


def test_weights_that_a_fit_begins_with_are_compared(data, tmp_path):
    X, y, groups = data
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params = interrupted(tmp_path / "fit", data, module=net)
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    keeper = [Checkpoint(tmp_path / "fit")]
    with pytest.raises(ValueError, match="the parameters that the fit begins with"):
        MAMLRegressor(**{**params, "module": other}, callbacks=keeper).fit(X, y, groups=groups)
    MAMLRegressor(**params, callbacks=keeper).fit(X, y, groups=groups)


def test_a_complete_checkpoint_gives_the_result_at_once(data, tmp_path, monkeypatch):
    X, y, groups = data
    params = {**SMALL, "callbacks": [Checkpoint(tmp_path / "fit")]}
    first = MAMLRegressor(**params).fit(X, y, groups=groups)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(sklearn_maml.engine.Engine, "meta_step", refuse)
        again = MAMLRegressor(**params).fit(X, y, groups=groups)
    assert_same_weights(first, again)
    assert again.history_ == first.history_
    assert_array_equal(
        again.adapt(X[:N_ROWS], y[:N_ROWS]).predict(X),
        first.adapt(X[:N_ROWS], y[:N_ROWS]).predict(X),
    )
    # another fit takes its place
    other = MAMLRegressor(**{**params, "beta": 0.1}).fit(X, y, groups=groups)
    unkept = MAMLRegressor(**{**params, "beta": 0.1, "callbacks": None}).fit(X, y, groups=groups)
    assert_same_weights(other, unkept)


class Bent(nn.Module):
    """Ends in a linear layer."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.body = nn.Linear(in_features, 5)
        self.head = nn.Linear(5, out_features)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def answers(model, X, y):
    """Everything that a model says of a task, after adapting to some of its rows."""
    model.adapt(X[:6], y[:6])
    if hasattr(model, "predict_proba"):
        return [model.predict_proba(X)]
    return [*model.predict(X, return_std=True)]


@pytest.mark.parametrize(
    "kind",
    ["numbers", "counts", "two classes", "three classes", "n_ways", "module", "beside steps"],
)
def test_a_complete_checkpoint_of_a_head_starts_and_judges_nothing(kind, tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    groups = np.repeat(np.arange(20), 14)
    X = rng.randn(280, 2)
    y = X @ [1.0, 0.5] + 2 * rng.randn(20)[groups]
    settings = {"max_iter": 50, "hidden_layer_sizes": (4,), "random_state": 0}
    cls = MAMLClassifier if "classes" in kind or kind == "n_ways" else MAMLRegressor
    if kind == "counts":
        y, settings["loss"] = rng.poisson(np.exp(0.3 * y)), "poisson"
    elif kind == "two classes":
        y = (y > 0).astype(int)
    elif cls is MAMLClassifier:
        y = np.tile(np.arange(14) % 3, 20)
    if kind == "n_ways":
        settings |= {"n_ways": 3, "n_shots": 1}
    elif kind == "module":
        settings["module"] = Bent
    elif kind == "beside steps":
        settings["validation_fraction"] = 0.5
    settings["callbacks"] = [Checkpoint(tmp_path / "fit")]

    class KilledError(Exception):
        pass

    def killed(*args):
        raise KilledError

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:  # before what held-out tasks decide is written
        patched.setattr(CheckpointedFit, "decide", killed)
        with pytest.raises(KilledError):
            cls(**settings).fit(X, y, groups=groups)
    with monkeypatch.context() as patched:
        patched.setattr(sklearn_maml.estimators.building, "build_head", refuse)
        patched.setattr(sklearn_maml.engine.Engine, "meta_step", refuse)
        judged = cls(**settings).fit(X, y, groups=groups)
    first = cls(**{**settings, "callbacks": None}).fit(X, y, groups=groups)
    with monkeypatch.context() as patched:
        patched.setattr(sklearn_maml.estimators.building, "build_head", refuse)
        patched.setattr(sklearn_maml.estimators.training, "judge_head", refuse)
        again = cls(**settings).fit(X, y, groups=groups)
    assert_same_weights(first, again)
    assert first.learner_weights_ == judged.learner_weights_ == again.learner_weights_
    for model in (judged, again):
        for expected, got in zip(
            answers(first, X[:14], y[:14]), answers(model, X[:14], y[:14]), strict=True
        ):
            assert_array_equal(got, expected)


def test_warm_starts_are_checkpointed(data, tmp_path):
    X, y, groups = data
    params = {**SMALL, "max_iter": 150, "warm_start": True}
    first = MAMLRegressor(**params).fit(X, y, groups=groups)
    first.save(tmp_path / "first")
    whole = copy.deepcopy(first).fit(X, y, groups=groups)
    halted = sklearn_maml.load(tmp_path / "first")
    keeper = Checkpoint(tmp_path / "fit", every=0)
    with pytest.raises(Stop):
        # counted from the first fit, of three epochs
        halted.set_params(callbacks=[keeper, Bomb(5)]).fit(X, y, groups=groups)
    resumed = sklearn_maml.load(tmp_path / "first").set_params(callbacks=[keeper])
    resumed.fit(X, y, groups=groups)
    assert resumed.n_iter_ == whole.n_iter_ == 300
    assert_same_weights(resumed, whole)
    with pytest.raises(ValueError, match="every"):
        whole.set_params(callbacks=[Checkpoint(tmp_path / "fit", every=-1)]).fit(X, y, groups)


class Counts(Callback):
    """Has state of its own, and uses it."""

    def __init__(self):
        self.n = 0

    def on_epoch_end(self, net, **kwargs):
        self.n += 1
        with torch.no_grad():
            next(iter(net.module_.parameters())).mul_(1 + 1e-3 * self.n)

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Opaque(Callback):
    """Has state that no file holds."""

    def initialize(self):
        self.thing_ = object()
        return self


@pytest.mark.parametrize(
    "make",
    [
        Counts,
        lambda: EarlyStopping(monitor="train_loss", patience=2, threshold=0.5),
        lambda: EpochScoring("neg_mean_squared_error", lower_is_better=False),
        lambda: LRScheduler("StepLR", step_size=1, gamma=0.5),
        lambda: LRScheduler(OneCycleLR, max_lr=0.01, total_steps=200, step_every="batch"),
    ],
    ids=["own", "stopping", "scoring", "step", "cycle"],
)
def test_callbacks_go_on_with_what_they_remember(make, data, tmp_path):
    X, y, groups = data
    params = interrupted(tmp_path / "fit", data, callbacks=[make()])
    keeper = Checkpoint(tmp_path / "fit", every=0)
    resumed = MAMLRegressor(**params, callbacks=[make(), keeper]).fit(X, y, groups=groups)
    whole = MAMLRegressor(**params, callbacks=[make()]).fit(X, y, groups=groups)
    assert resumed.n_iter_ == whole.n_iter_
    assert_same_weights(resumed, whole)
    rows = [
        [{name: value for name, value in epoch.items() if name != "dur"} for epoch in m.history_]
        for m in (resumed, whole)
    ]
    assert rows[0] == rows[1]


def test_callbacks_that_cannot_be_kept_are_refused_at_once(data, tmp_path):
    X, y, groups = data
    callbacks = [Opaque(), Checkpoint(tmp_path / "fit")]
    with pytest.raises(TypeError, match=r"'Opaque' cannot be checkpointed: .*thing_.*state_dict"):
        MAMLRegressor(**SMALL, callbacks=callbacks).fit(X, y, groups=groups)


def test_bad_checkpoints_are_refused(data, tmp_path, model):
    X, y, groups = data

    def fit(*callbacks):
        return MAMLRegressor(**SMALL, callbacks=list(callbacks)).fit(X, y, groups=groups)

    for every in (-1, "often", None, True, np.nan):
        with pytest.raises(ValueError, match="every of a Checkpoint"):
            fit(Checkpoint(tmp_path / "fit", every=every))
    with pytest.raises(ValueError, match="is no folder"):
        fit(Checkpoint(tmp_path / "nowhere" / "fit"))
    with pytest.raises(ValueError, match="takes one"):
        fit(Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b"))
    with pytest.raises(ValueError, match="give an instance"):
        fit(Checkpoint)
    with pytest.raises(FileFormatError, match="is a model and no checkpoint"):
        fit(Checkpoint(model))
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(FileFormatError, match=r"not a safetensors file.*remove the file"):
        fit(Checkpoint(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "precious"
    path = tmp_path / "fit"
    fit(Checkpoint(path))
    content = path.read_bytes()
    for place in (9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(FileFormatError, match="give another path"):
            fit(Checkpoint(path))
    (tmp_path / ".fit.0123.part").write_text("of a killed process")
    path.unlink()
    fit(Checkpoint(path))
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_of_process_groups_are_refused(tmp_path):
    from sklearn_maml.training.checkpoint import begin_checkpointed

    with pytest.raises(ValueError, match="process group"):
        begin_checkpointed([Checkpoint(tmp_path / "fit")], object(), None)
    assert begin_checkpointed(None, object(), None) is None


def test_interrupted_fits_keep_their_last_checkpoint(data, tmp_path):
    X, y, groups = data

    class CtrlC(Callback):
        def on_batch_end(self, net, **kwargs):
            self.wait(net)

        @staticmethod
        def wait(_):
            CtrlC.n += 1
            if CtrlC.n == 130:
                raise KeyboardInterrupt

    CtrlC.n = 0
    params = {**SMALL, "max_iter": 200, "early_stopping": False}
    keeper = Checkpoint(tmp_path / "fit", every=0)
    with pytest.warns(UserWarning, match="interrupted"):
        MAMLRegressor(**params, callbacks=[CtrlC(), keeper]).fit(X, y, groups=groups)
    resumed = MAMLRegressor(**params, callbacks=[keeper]).fit(X, y, groups=groups)
    assert resumed.n_iter_ == 200
    assert_same_weights(resumed, MAMLRegressor(**params).fit(X, y, groups=groups))


def test_checkpoints_are_written_after_so_many_seconds(data, tmp_path, monkeypatch):
    X, y, groups = data
    now, written = [0.0], []
    monkeypatch.setattr("sklearn_maml.training.checkpoint.time.monotonic", lambda: now[0])
    original = CheckpointedFit._write

    def write(self, net, complete):
        written.append((net.update_, complete))
        return original(self, net, complete)

    monkeypatch.setattr(CheckpointedFit, "_write", write)

    class Clock(Callback):
        def on_epoch_end(self, net, **kwargs):
            now[0] += 25.0

    keeper = [Clock(), Checkpoint(tmp_path / "fit")]
    MAMLRegressor(**{**SMALL, "max_iter": 400}, callbacks=keeper).fit(X, y, groups=groups)
    assert written == [(150, False), (300, False), (400, True)]


def test_a_tracer_goes_on_where_it_stood():
    """Graphs take over at the updates where they would have."""

    def run(tracer, x):
        tracer.begin_update()
        return tracer.run(lambda x: [x.sin() * 2], [x], shape=(x.shape, 0.5), settings=lambda: 0)

    x = torch.arange(4.0)
    first = Tracer(min_updates=4)
    first.updates_left = 100
    for _ in range(10):
        run(first, x)
    assert first.n_traced == 1
    second = Tracer(min_updates=4)
    second.resume(round_trip(first.progress()))
    assert second.n_traced == 0
    second.updates_left = first.updates_left
    (value,) = run(second, x)
    assert second.n_traced == 1
    assert torch.equal(value, x.sin() * 2)
    run(first, x)
    assert second.progress() == first.progress()
