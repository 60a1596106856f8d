"""An adapted task as a plain module computes what `predict` does, in torch and elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, load
from sklearn_maml.exceptions import NotAdaptedError
from sklearn_maml.learners import Learner
from sklearn_maml.targets import Loss

SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0}
N_TASKS, N_ROWS = 12, 10


class Net(nn.Module):
    """Returns one axis, and works on any rows."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.into, self.out = nn.Linear(in_features, 6), nn.Linear(6, out_features)

    def forward(self, x):
        outputs = self.out(torch.tanh(self.into(x.flatten(1))))
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs


class Normed(nn.Module):
    """Convolution and batch norm, with dropout."""

    def __init__(self, out_features):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(12, out_features)

    def forward(self, x):
        return self.out(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


class Nearest(Learner):
    """Weights support rows by their distance."""

    def build(self, problem):
        self.n_outputs_ = problem.n_outputs
        return nn.Linear(problem.X.shape[1], 3)

    def outputs(self, network, support, query):
        a, b = network(query.X), network(support.X)
        distance = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
        weight = (-distance).exp() + 1e-3
        if support.weight is not None:
            weight = weight * support.weight.unsqueeze(1)
        return weight @ support.y / weight.sum(-1, keepdim=True)


class Positive(Loss):
    """Has a link in numpy."""

    def rows(self, output, y):
        return (output.exp() - y).square().mean(-1)

    def predict(self, output):
        return np.exp(output)


KINDS = {
    "default": {},
    "float32": {"float32": True},
    "gradient steps": {"update_rule": "sgd"},
    "head": {"update_rule": "gaussian-head"},
    "head of a module": {"update_rule": "gaussian-head", "module": Net},
    "module": {"update_rule": "sgd", "module": Net, "float32": True},
    "meta-sgd": {"update_rule": "meta-sgd", "adapted": "head"},
    "ridge": {"update_rule": "ridge-head", "adapted": "head"},
    "center": {"update_rule": "sgd", "center_y": True},
    "several targets": {"targets": 3},
    "learner": {"update_rule": Nearest()},
    "images": {"update_rule": "sgd", "images": True, "float32": True},
    "images, flat": {"images": True},
}
CLASSES = {
    "default": {},
    "mixture": {},
    "gradient steps": {"update_rule": "sgd"},
    "local labels": {"n_ways": 3, "n_shots": 2, "n_queries": 1},
    "local labels, sgd": {"n_ways": 3, "n_shots": 2, "n_queries": 1, "update_rule": "sgd"},
}


def tasks(float32=False, targets=1, images=False):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N_TASKS, N_ROWS, *((1, 4, 4) if images else (3,))))
    first = X.reshape(N_TASKS, N_ROWS, -1)[..., 0]
    y = 5 + 3 * first * np.linspace(0.5, 2, N_TASKS)[:, None] + np.arange(N_TASKS)[:, None]
    if targets > 1:
        y = np.stack([k * y + k for k in range(1, targets + 1)], axis=-1)
    dtype = np.float32 if float32 else np.float64
    return X.astype(dtype), y.astype(dtype)


def regressor(name):
    """Return a regressor that is adapted to three tasks, their ids and query rows."""
    params = dict(KINDS[name])
    data = {k: params.pop(k) for k in ("float32", "targets", "images") if k in params}
    X, y = tasks(**data)
    if name == "images":
        params["module"] = Normed
    reg = MAMLRegressor(**{**SMALL, **params}).fit(X, y)
    ids = np.repeat(["a", "b", "c"], 6)
    flat = X[:3, :6].reshape(18, *X.shape[2:]), y[:3, :6].reshape(18, *y.shape[2:])
    return reg.adapt(*flat, groups=ids), X[5]


def classifier(name):
    X, _ = tasks()
    labels = np.array(["x", "y", "z"])[np.arange(N_ROWS) % 3][None].repeat(N_TASKS, 0)
    clf = MAMLClassifier(**{**SMALL, **CLASSES[name]}).fit(X, labels)
    if name == "mixture":
        clf.learner_weights_ = {"gaussian-head": 0.4, "gradient-steps": 0.6}
    ids = np.repeat(["a", "b", "c"], 6)
    # the last task has fewer classes
    labels = np.concatenate([labels[:2, :6].reshape(12), ["y", "z"] * 3])
    return clf.adapt(X[:3, :6].reshape(18, 3), labels, groups=ids), X[5]


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}


def expected(model, X, task):
    name = "predict_proba" if isinstance(model, MAMLClassifier) else "predict"
    return getattr(model, name)(X, groups=[task] * len(X))


def made(kind, name):
    return regressor(name) if kind == "regressor" else classifier(name)


CASES = [("regressor", name) for name in KINDS] + [("classifier", name) for name in CLASSES]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_module_gives_the_predictions_of_its_task(kind, name):
    model, X = made(kind, name)
    before = {task: expected(model, X, task) for task in "abc"}
    modules = {task: model.adapted_module(task) for task in "abc"}
    for task, module in modules.items():
        assert not module.training
        got = module(torch.from_numpy(X))
        assert got.numpy().dtype == before[task].dtype
        np.testing.assert_allclose(got.numpy(), before[task], **tolerance(X.dtype))
        assert not any(p.requires_grad for p in module.parameters())
    assert not np.allclose(before["a"], before["b"])
    # a copy: whatever is done to it, the model stays
    with torch.no_grad():
        for tensor in modules["a"].state_dict().values():
            tensor.zero_()
    np.testing.assert_array_equal(expected(model, X, "a"), before["a"])
    single = model.adapted_module("b").float()(torch.from_numpy(X)).numpy()
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, before["b"], rtol=1e-4, atol=1e-4)


def test_a_module_of_one_task_needs_no_id_and_survives_a_file(tmp_path):
    X, y = tasks()
    reg = MAMLRegressor(**SMALL).fit(X, y)
    with pytest.raises(NotAdaptedError, match="not adapted"):
        reg.adapted_module()
    reg.adapt(X[0, :5], y[0, :5]).save(tmp_path / "model")
    module = load(tmp_path / "model").adapted_module()
    want = reg.predict(X[0])
    np.testing.assert_allclose(module(torch.from_numpy(X[0])).numpy(), want, rtol=1e-12)
    with pytest.raises(ValueError, match="a task, but the estimator was adapted to one task"):
        reg.adapted_module("a")


def test_what_no_module_can_do_is_refused():
    X, y = tasks(images=True)
    reg = MAMLRegressor(Normed, update_rule="sgd", engine__batch_norm="transductive", **SMALL).fit(
        X, y
    )
    reg.adapt(X[0], y[0])
    with pytest.raises(
        TypeError, match="engine__batch_norm='transductive' the prediction of a row depen"
    ):
        reg.adapted_module()
    reg.set_params(engine__batch_norm="inductive").adapt(X[0], y[0]).adapted_module()
    X, y = tasks()
    reg = MAMLRegressor(loss=Positive(), update_rule="sgd", alpha=1e-4, **SMALL)
    with pytest.raises(TypeError, match="loss Positive makes predictions of outputs in numpy"):
        reg.fit(X, np.abs(y) / 10).adapt(X[0], np.abs(y[0]) / 10).adapted_module()


def test_several_tasks_ask_for_an_id():
    reg, _ = regressor("default")
    with pytest.raises(ValueError, match="adapted to 3 tasks"):
        reg.adapted_module()
    with pytest.raises(ValueError, match="were not adapted to, such as"):
        reg.adapted_module("d")


def test_a_module_can_be_exported():
    reg, X = regressor("default")
    module = reg.adapted_module("a")
    n = torch.export.Dim("n")
    program = torch.export.export(module, (torch.from_numpy(X),), dynamic_shapes=({0: n},))
    got = program.module()(torch.from_numpy(X[:3]))
    np.testing.assert_allclose(got.numpy(), reg.predict(X[:3], groups=["a"] * 3), rtol=1e-12)


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_onnxruntime_gives_the_predictions(kind, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, X = made(kind, name)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model.adapted_module("b"), (torch.from_numpy(X),), path, input_names=["X"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for rows in (X, X[:3]):
        (got,) = session.run(None, {"X": rows})
        np.testing.assert_allclose(got, expected(model, rows, "b"), rtol=1e-5, atol=1e-6)
