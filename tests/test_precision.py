"""The option `precision`: layers in rounded numbers, everything else in those of X."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Residual
from torch import nn

from sklearn_maml import MAMLRegressor
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.engine import Engine
from sklearn_maml.engine.forward import tf32
from sklearn_maml.meta_gradients import SecondOrder
from sklearn_maml.targets.losses import squared_error_rows
from sklearn_maml.update_rules import SGD

X, Y, G = make_sinusoid_tasks(n_tasks=12, n_rows=20, random_state=0)
X32, Y32 = X.astype(np.float32), Y.astype(np.float32)


MODULES = {
    "stacked": None,
    "vmap": Residual,
    "convolutions": nn.Sequential(
        nn.Unflatten(1, (1, 1, 1)), nn.Conv2d(1, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
    ),
    "convolutions and batch norm": nn.Sequential(
        nn.Linear(1, 48),
        nn.Unflatten(1, (3, 4, 4)),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 1),
    ),
}


def fitted(X, y, **changed):
    settings = {
        "hidden_layer_sizes": (16,),
        "update_rule": "sgd",
        "steps": 2,
        "max_iter": 3,
        "random_state": 0,
    }
    reg = MAMLRegressor(**{**settings, "early_stopping": False, "beta": 0.01, **changed})
    return reg.fit(X, y, groups=G)


def gradient_of(reg, precision):
    """Parameters after one meta-update of plain descent."""
    changed = {"optimizer": "sgd", "beta_decay": 0.0, "max_iter": 1}
    reg.set_params(engine__precision=precision, **changed).fit(X32, Y32, groups=G)
    return torch.cat([p.detach().flatten() for p in reg.module_.parameters()])


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_bf16_rounds_the_layers_and_keeps_the_type_of_the_data(module):
    full = fitted(X32, Y32, module=module)
    rounded = fitted(X32, Y32, module=module, engine__precision="bf16")
    assert all(p.dtype == torch.float32 for p in rounded.module_.parameters())
    exact, near = (reg.adapt(X32[:10], Y32[:10]).predict(X32[10:20]) for reg in (full, rounded))
    assert near.dtype == np.float32
    difference = np.abs(near - exact).max() / np.abs(exact).max()
    assert 0 < difference < 0.1  # bfloat16 has 8 bits


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_meta_gradient_in_bf16_is_near_the_exact_one(module):
    reg = MAMLRegressor(
        update_rule="sgd",
        module=module,
        hidden_layer_sizes=(16,),
        steps=2,
        early_stopping=False,
        random_state=0,
    )
    start, exact, near = (
        gradient_of(reg.set_params(beta=beta), precision)
        for beta, precision in ((1e-12, "full"), (1.0, "full"), (1.0, "bf16"))
    )
    error = (near - exact).norm() / (exact - start).norm()
    assert 0 < error < 0.05


def test_convolutions_in_bf16_run_for_all_tasks_at_once():
    reg = fitted(X32, Y32, module=MODULES["convolutions and batch norm"], engine__precision="bf16")
    reg.adapt(X32, Y32, groups=G)  # without a warning that it falls back
    assert reg._make_engine(reg.module_, "auto").rung == "stacked"


def test_float64_is_never_rounded():
    full, rounded = fitted(X, Y), fitted(X, Y, engine__precision="bf16")
    for a, b in zip(full.module_.parameters(), rounded.module_.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_tf32_changes_nothing_on_the_cpu():
    full, rounded = fitted(X32, Y32), fitted(X32, Y32, engine__precision="tf32")
    for a, b in zip(full.module_.parameters(), rounded.module_.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "allowed"), [("full", False), ("tf32", True)])
def test_convolutions_are_rounded_on_an_accelerator_only_if_asked_for(precision, allowed):
    # torch's own default rounds them
    engine = Engine(
        nn.Linear(2, 1, device="meta"),
        row_loss=squared_error_rows,
        rule=SGD(),
        meta_gradient=SecondOrder(),
        adapted=["weight", "bias"],
        precision=precision,
    )
    before = torch.backends.cudnn.allow_tf32
    assert before
    outer, inner = engine.threads(8), engine.threads(8)
    outer.__enter__()
    inner.__enter__()
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    outer.__exit__(None, None, None)  # of another thread, say: not in the order of nesting
    inner.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_of_the_users_own_comes_back():
    conv = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("this torch has one setting for all")
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"  # another than that of recurrent layers
    try:
        with tf32(False):
            assert not torch.backends.cudnn.allow_tf32
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before
        torch.backends.cudnn.allow_tf32 = True


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision"):
        fitted(X32, Y32, engine__precision="half")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_holds_for_the_fit_alone():
    seen = []
    original = Engine.meta_step

    def spy(self, *args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "meta_step", spy)
        fitted(X32, Y32, engine__precision="tf32", device="cuda")
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_are_captured_as_cuda_graphs(monkeypatch):
    from sklearn_maml.engine.tracing import graphs, tracer

    made = []
    original = graphs.CudaGraph.__init__

    def spy(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(graphs.CudaGraph, "__init__", spy)
    long = {"max_iter": 1100, "n_shots": 5, "n_queries": 5, "device": "cuda"}
    reg = fitted(X32, Y32, **long)
    assert made
    # the same fit without a record
    monkeypatch.setattr(tracer.Tracer.__init__, "__defaults__", (10**9, 3, 10**9, 1))
    plain = fitted(X32, Y32, **long)
    for a, b in zip(reg.module_.parameters(), plain.module_.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)
