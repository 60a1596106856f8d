"""Steps of Adam without torch's bookkeeping are the steps of torch's Adam."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback, LRScheduler
from torch import nn

from sklearn_maml import MAMLRegressor
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.engine import Engine
from sklearn_maml.training.optimizers import (
    FlatStep,
    can_fuse,
    has_fused_kernel,
    step_fused,
    without_compiler,
)

SHAPES = [(5, 3), (5,), (2, 5), (1,)]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"betas": (0.5, 0.9), "eps": 1e-3, "maximize": True},
]
KINDS = [torch.optim.Adam, torch.optim.AdamW]
X, Y, G = make_sinusoid_tasks(n_tasks=12, n_rows=10, random_state=0)


def make_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def draw_grads(seed):
    return [p.detach() for p in make_params(1000 + seed)]


def make_pair(kind, **options):
    """An optimiser with the fused kernel, and torch's reference on equal parameters."""
    params, same = make_params(), make_params()
    return kind(params, lr=0.01, fused=True, **options), kind(same, lr=0.01, **options)


def give(optimizer, grads):
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = None if g is None else g.clone()


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(optimizer, reference):
    for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        state, other = optimizer.state[p], reference.state[q]
        assert state.keys() == other.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_step_is_that_of_torch(kind, options):
    optimizer, reference = make_pair(kind, **options)
    for k in range(20):
        grads = draw_grads(k)
        if k % 3 == 2:
            grads[1] = None  # left alone, with its state
        for one in (optimizer, reference):
            give(one, grads)
            one.param_groups[0]["lr"] = 0.01 / (k + 1)
        step_fused(optimizer)
        reference.step()
        assert_same(optimizer, reference)


def test_a_fused_step_takes_the_settings_of_each_group():
    both = []
    for fused in (True, False):
        params = make_params()
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5}]
        both.append(torch.optim.Adam(groups, lr=0.01, fused=fused))
    for k in range(5):
        for optimizer in both:
            give(optimizer, draw_grads(k))
        step_fused(both[0])
        both[1].step()
    assert_same(*both)
    assert not FlatStep.can_make(both[0], params_of(both[0]))


def make_flat(kind, **options):
    optimizer, reference = make_pair(kind, **options)
    for one in (optimizer, reference):
        give(one, draw_grads(0))
        one.step()
    assert FlatStep.can_make(optimizer, params_of(optimizer))
    return FlatStep(optimizer, params_of(optimizer)), optimizer, reference


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_step_is_that_of_torch(kind, options):
    flat, optimizer, reference = make_flat(kind, **options)
    for k in range(1, 20):
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 0.01 / (k + 1)
        flat.step(torch.cat([g.flatten() for g in draw_grads(k)]))
        give(reference, draw_grads(k))
        reference.step()
        assert_same(optimizer, reference)


def test_the_state_after_flat_steps_is_torchs():
    """It can be saved, loaded and continued, and takes no more memory than it should."""
    flat, optimizer, reference = make_flat(torch.optim.Adam)
    flat.step(torch.cat([g.flatten() for g in draw_grads(1)]))
    flat.release()
    storages = [p.untyped_storage() for p in params_of(optimizer)]
    storages += [v.untyped_storage() for s in optimizer.state.values() for v in s.values()]
    assert len({storage.data_ptr() for storage in storages}) == 4 * len(SHAPES)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = torch.optim.Adam([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)])
    other.load_state_dict(torch.load(file, weights_only=True))
    give(reference, draw_grads(1))
    reference.step()
    for one in (other, reference):
        give(one, draw_grads(2))
        one.step()
    assert_same(other, reference)


def test_what_cannot_be_flat_is_not():
    flat, optimizer, _ = make_flat(torch.optim.Adam)
    params = params_of(optimizer)
    assert not FlatStep.can_make(optimizer, params[1:])  # one is frozen
    flat.release()
    give(optimizer, [None, *draw_grads(0)[1:]])
    optimizer.step()
    assert not FlatStep.can_make(optimizer, params)  # the first lags behind
    assert not FlatStep.can_make(torch.optim.Adam(params, fused=True), params)  # no state yet
    for other in (torch.optim.SGD(params, lr=0.1), torch.optim.Adam(params)):
        assert not has_fused_kernel(other)


def test_fused_kernels_are_not_forced_on_anybody():
    params, cpu = make_params(), torch.device("cpu")
    assert can_fuse(torch.optim.Adam, {"weight_decay": 0.1}, params, cpu)
    assert not can_fuse(torch.optim.SGD, {}, params, cpu)
    assert not can_fuse(torch.optim.Adam, {"foreach": True}, params, cpu)
    complex_valued = [nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    assert not can_fuse(torch.optim.Adam, {}, complex_valued, cpu)


# --- in a fit


def fit(callbacks=(), **params):
    settings = {
        "hidden_layer_sizes": (6,),
        "update_rule": "sgd",
        "steps": 1,
        "n_shots": 4,
        "max_iter": 120,
    }
    settings |= {"meta_batch_size": 4, "random_state": 0, "callbacks": list(callbacks), **params}
    return MAMLRegressor(**settings).fit(X, Y, groups=G)


def weights(reg):
    return torch.cat([p.detach().flatten() for p in reg.module_.parameters()])


class Watch(Callback):
    def on_train_begin(self, net, **kwargs):
        self.grads = []

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.grads.append([p.grad for _, p in named_parameters])


def test_a_callback_that_watches_the_gradients_changes_nothing():
    watch = Watch()
    free = {"max_grad_norm": None}  # so that their norms differ
    assert torch.equal(weights(fit([watch], **free)), weights(fit(**free)))
    # each has been a gradient of its own
    norms = [torch.cat([g.flatten() for g in grads]).norm().item() for grads in watch.grads]
    assert len(norms) == len(set(norms)) == 120


@pytest.mark.parametrize("how", ["in place", "anew"])
def test_a_callback_may_change_the_gradients(how):
    class Halve(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            for _, p in named_parameters:
                if how == "in place":
                    p.grad.mul_(0.0)
                else:
                    p.grad = torch.zeros_like(p.grad)

    still = fit([Halve()])
    assert torch.equal(weights(still), weights(fit(max_iter=1, beta=1e-300)))


def test_a_callback_may_freeze_a_parameter_for_an_update():
    class Some(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            self.bias = next(p for name, p in named_parameters if name == "module.2.bias")
            if net.update_ > 60:
                self.bias.grad = None

        def on_batch_end(self, net, training=False, **kwargs):
            if net.update_ == 60 and training:
                self.kept = self.bias.detach().clone()

    some = Some()
    reg = fit([some], early_stopping=False)
    assert torch.equal(reg.module_[2].bias, some.kept)
    steps = [float(s["step"]) for s in reg.net_.optimizer_.state.values()]
    assert steps == [120, 120, 120, 60]


def test_hooks_of_the_optimiser_are_called():
    calls = []

    class Hook(Callback):
        def on_train_begin(self, net, **kwargs):
            net.optimizer_.register_step_post_hook(lambda *_: calls.append(net.update_))

    reg = fit([Hook()])
    assert calls == list(range(1, 121))
    np.testing.assert_allclose(weights(reg), weights(fit()), rtol=1e-9)


def test_a_scheduler_finds_its_optimiser_stepped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit([LRScheduler("StepLR", step_size=1, gamma=0.5)], max_iter=110)


def test_the_fused_kernel_gives_the_fit_of_the_plain_one():
    plain, fused = fit(optimizer__fused=False), fit()
    assert not plain.net_.optimizer_.param_groups[0]["fused"]
    assert fused.net_.optimizer_.param_groups[0]["fused"]
    np.testing.assert_allclose(weights(fused), weights(plain), rtol=1e-7)


@pytest.mark.parametrize("callbacks", [[], [Watch()]])
def test_gradients_may_be_laid_out_in_any_way(callbacks, monkeypatch):
    """The fused kernels of torch take a gradient to have the strides of its parameter."""
    expected = weights(fit(callbacks))
    original = Engine.meta_step

    def transposed(self, *args, **kwargs):
        step = original(self, *args, **kwargs)
        step.grads = {
            n: g.t().contiguous().t() if g.ndim == 2 else g for n, g in step.grads.items()
        }
        return step

    monkeypatch.setattr(Engine, "meta_step", transposed)
    assert torch.equal(weights(fit(callbacks)), expected)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-2])
def test_an_engine_may_give_its_gradients_in_one_piece(max_grad_norm, monkeypatch):
    expected = weights(fit(max_grad_norm=max_grad_norm))
    original = Engine.meta_step

    def joined(self, *args, **kwargs):
        step = original(self, *args, **kwargs)
        step.flat = torch.cat([g.flatten() for g in step.grads.values()])
        parts = step.flat.split([g.numel() for g in step.grads.values()])
        step.grads = {
            name: part.view(g.shape)
            for (name, g), part in zip(step.grads.items(), parts, strict=True)
        }
        return step

    monkeypatch.setattr(Engine, "meta_step", joined)
    assert torch.allclose(weights(fit(max_grad_norm=max_grad_norm)), expected, rtol=1e-9)


def test_the_parameters_of_a_fitted_estimator_have_memory_of_their_own():
    reg = fit(early_stopping=False)
    for own in (reg, copy.deepcopy(reg)):
        parameters = list(own.module_.parameters())
        assert all(p.untyped_storage().nbytes() == p.numel() * 8 for p in parameters)
        states = own.net_.optimizer_.state.values()
        assert all(s["exp_avg"].untyped_storage().nbytes() < 1000 for s in states)
        assert sum(s["exp_avg"].untyped_storage().nbytes() for s in states) == 8 * sum(
            p.numel() for p in parameters
        )


FIT = """
import sys
import numpy as np
import sklearn_maml
assert "skorch" not in sys.modules, "skorch is imported too early"
X = np.random.default_rng(0).normal(size=(10, 8, 2))
reg = sklearn_maml.MAMLRegressor(
    max_iter=60, hidden_layer_sizes=(4,), update_rule="sgd", steps=1, warm_start=True
)
reg.fit(X, X.sum(-1)).set_params(max_iter=10).fit(X, X.sum(-1))
assert "torch._dynamo" not in sys.modules, "a fit has imported torch's compiler"
import torch
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
assert "torch._dynamo" in sys.modules, "torch does not behave as without_compiler expects"
"""


def test_a_fit_does_not_import_torchs_compiler():
    # an import of a second; in a process of its own, since others may have imported it here
    subprocess.run([sys.executable, "-W", "error", "-c", FIT], check=True)


def test_methods_of_optimisers_are_put_back_as_they_were():
    method = torch.optim.Optimizer.add_param_group.__wrapped__
    before = dict(vars(method))
    with without_compiler():
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    assert vars(method) == before
