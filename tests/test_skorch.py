"""Meta-training is a skorch net: callbacks, parameters and history work as skorch's do."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import sklearn
import torch
from networks import Normed, Residual
from sklearn.base import clone
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    Freezer,
    GradientNormClipping,
    LRScheduler,
    ProgressBar,
)
from torch import nn

from sklearn_maml import MAMLClassifier, MAMLRegressor, task_scorer
from sklearn_maml.exceptions import NonFiniteStepWarning, NotAdaptedError
from sklearn_maml.training.schedule import UPDATES_PER_EPOCH
from sklearn_maml.update_rules import MetaSGD

try:
    from sklearn import callback as sklearn_callback
except ImportError:
    sklearn_callback = None

# --- data: 12 tasks (lines through the origin) of 8 rows, so that 2 tasks are held out

N_TASKS, N_ROWS = 12, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(N_TASKS * N_ROWS, 2))
G = np.repeat(np.arange(N_TASKS), N_ROWS)
SLOPES = rng.normal(size=(N_TASKS, 2))
Y = (X * SLOPES[G]).sum(1)
C = (Y > 0).astype(int)
SMALL = {
    "hidden_layer_sizes": (6,),
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 1,
    "n_shots": 4,
    "meta_batch_size": 4,
    "max_iter": 150,
    "random_state": 0,
}


def regressor(**params):
    return MAMLRegressor(**{**SMALL, **params})


def classifier(**params):
    return MAMLClassifier(**{**SMALL, "n_shots": None, **params})


def column(est, name):
    return [row[name] for row in est.history_]


def parameters(est):
    return [p.detach().clone() for p in est.module_.parameters()]


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(parameters(a), parameters(b), strict=True))


class Spy(Callback):
    """Remembers the parameters and the rate after every update and every epoch."""

    def on_train_begin(self, net, **kwargs):
        self.start = copy.deepcopy(net.module_.module.state_dict())
        self.updates, self.rates, self.epochs = [], [], []

    def on_batch_end(self, net, batch=None, training=False, **kwargs):
        if training:
            self.updates.append(copy.deepcopy(net.module_.module.state_dict()))
            self.rates.append([group["lr"] for group in net.optimizer_.param_groups])

    def on_epoch_end(self, net, **kwargs):
        self.epochs.append(copy.deepcopy(net.module_.module.state_dict()))


def distances(spy):
    """Length of each update."""
    return [
        math.sqrt(sum(float((b[n] - a[n]).square().sum()) for n in a))
        for a, b in itertools.pairwise([spy.start, *spy.updates])
    ]


# --- the history


def test_the_history_has_training_and_held_out_losses():
    reg = regressor().fit(X, Y, groups=G)
    assert len(reg.history_) == 3
    for k, row in enumerate(reg.history_):
        assert row["epoch"] == k + 1
        assert row["non_finite"] == 0
        assert row["dur"] > 0
        for name in ("train_loss", "valid_loss", "valid_loss_before"):
            assert math.isfinite(row[name])
    losses = column(reg, "train_loss")
    assert losses[-1] < losses[0]
    assert reg.history_[-1]["valid_loss"] < reg.history_[-1]["valid_loss_before"]
    assert reg.history_ is reg.net_.history


def test_without_held_out_tasks_there_is_no_held_out_loss():
    for params in (
        {"early_stopping": False},
        {"validation_fraction": 0.5, "early_stopping": False},
    ):
        row = regressor(max_iter=10, **params).fit(X, Y, groups=G).history_[-1]
        assert "train_loss" in row
        assert "valid_loss" not in row
    few = G < 9  # 9 tasks are too few for "auto"
    row = regressor(max_iter=10).fit(X[few], Y[few], groups=G[few]).history_[-1]
    assert "valid_loss" not in row


def test_the_loss_before_adaptation_is_that_of_the_initialisation():
    still = regressor(alpha=0.0, max_iter=60).fit(X, Y, groups=G)
    assert column(still, "valid_loss") == column(still, "valid_loss_before")
    zero = regressor(adapt_steps=0, max_iter=60).fit(X, Y, groups=G)
    assert column(zero, "valid_loss") == column(zero, "valid_loss_before")
    moving = regressor(max_iter=60).fit(X, Y, groups=G)
    assert column(moving, "valid_loss") != column(moving, "valid_loss_before")


def test_validation_takes_the_steps_of_adaptation():
    losses = {
        steps: regressor(adapt_steps=steps, max_iter=100).fit(X, Y, groups=G).history_
        for steps in (1, 4)
    }
    assert losses[1][:, "train_loss"] == losses[4][:, "train_loss"]
    assert losses[1][:, "valid_loss"] != losses[4][:, "valid_loss"]


@pytest.mark.parametrize("max_iter", [1, 49, 50, 51, 120])
@pytest.mark.parametrize("early_stopping", ["auto", False])
def test_n_iter_counts_meta_updates_exactly(max_iter, early_stopping):
    spy = Spy()
    reg = regressor(max_iter=max_iter, callbacks=[spy], early_stopping=early_stopping)
    reg.fit(X, Y, groups=G)
    assert reg.n_iter_ == max_iter == len(spy.updates)
    assert len(reg.history_) == -(-max_iter // UPDATES_PER_EPOCH)
    assert sum(column(reg, "train_batch_count")) == max_iter
    assert all(distance > 0 for distance in distances(spy)[:-1])


# --- built-in early stopping

# a rate at which the losses go up and down
WILD = {"beta": 0.3, "beta_decay": 0.0, "optimizer": "adam", "max_grad_norm": None}


@pytest.mark.parametrize("early_stopping", [True, "auto"])
def test_the_parameters_kept_are_those_best_on_the_held_out_tasks(early_stopping):
    spy = Spy()
    reg = regressor(
        max_iter=500, early_stopping=early_stopping, n_iter_no_change=150, callbacks=[spy], **WILD
    )
    reg.fit(X, Y, groups=G)
    losses = column(reg, "valid_loss")
    best = int(np.argmin(losses))
    assert best < len(losses) - 1  # or else there is nothing to restore
    for name, value in reg.module_.state_dict().items():
        assert torch.equal(value, spy.epochs[best][name])
        assert not torch.equal(value, spy.epochs[-1][name])
    if early_stopping is True:  # stops as soon as 3 epochs have not been better
        assert len(losses) == best + 1 + 3
        assert reg.n_iter_ == UPDATES_PER_EPOCH * len(losses) < 500
    else:
        assert reg.n_iter_ == 500
        assert max(np.diff(np.flatnonzero(np.minimum.accumulate(losses) == losses), append=10)) > 3


def test_without_held_out_tasks_the_last_parameters_are_kept():
    spy = Spy()
    reg = regressor(early_stopping=False, callbacks=[spy], **WILD).fit(X, Y, groups=G)
    for name, value in reg.module_.state_dict().items():
        assert torch.equal(value, spy.updates[-1][name])


def test_n_iter_no_change_is_the_number_of_updates_waited_for():
    lengths = []
    for wait, epochs in ((1, 1), (50, 1), (51, 2), (200, 4)):
        reg = regressor(early_stopping=True, n_iter_no_change=wait, max_iter=600, **WILD)
        losses = column(reg.fit(X, Y, groups=G), "valid_loss")
        lengths.append(len(losses))
        assert len(losses) - 1 - int(np.argmin(losses)) == epochs
    assert lengths[0] == lengths[1] < lengths[3] < 12


def test_early_stopping_stops_at_its_defaults():
    reg = regressor(early_stopping=True, max_iter=1000, **WILD).fit(X, Y, groups=G)
    assert reg.n_iter_ < 1000


# --- beta and its decay


def test_beta_falls_linearly_at_the_end_of_the_fit():
    spy = Spy()
    regressor(max_iter=100, beta=0.01, beta_decay=0.4, callbacks=[spy]).fit(X, Y, groups=G)
    rates = np.array(spy.rates)[:, 0]
    np.testing.assert_allclose(rates[:60], 0.01, rtol=1e-12)
    np.testing.assert_allclose(np.diff(rates[60:]), -0.01 / 40, rtol=1e-9)
    assert 0 < rates[-1] <= 0.01 / 40 * (1 + 1e-9)


def test_no_decay_keeps_beta():
    spy = Spy()
    regressor(max_iter=60, beta=0.01, beta_decay=0.0, callbacks=[spy]).fit(X, Y, groups=G)
    assert set(np.array(spy.rates)[:, 0]) == {0.01}


def half_frozen():
    module = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    module[0].requires_grad_(False)
    return module


@pytest.mark.parametrize("frozen", [False, True])
def test_max_grad_norm_bounds_the_update(frozen):
    """The norm is that of what moves: the gradient of frozen parameters does not count."""
    torch.manual_seed(0)
    module = half_frozen() if frozen else None
    params = {"max_iter": 20, "optimizer": "sgd", "beta": 0.1, "beta_decay": 0, "module": module}
    lengths = {}
    for bound in (None, 1e-3):
        spy = Spy()
        regressor(max_grad_norm=bound, callbacks=[spy], **params).fit(X, Y, groups=G)
        lengths[bound] = np.array(distances(spy))
    assert lengths[None].min() > 2e-4
    np.testing.assert_allclose(lengths[1e-3], 0.1 * 1e-3, rtol=1e-6)


# --- skorch's callbacks


def test_early_stopping_callback_stops():
    params = {"beta": 1e-9, "max_iter": 500, "early_stopping": False}  # nothing improves
    stop = EarlyStopping(monitor="train_loss", patience=3, threshold=0.5, sink=lambda *_: None)
    reg = regressor(callbacks=[stop], **params).fit(X, Y, groups=G)
    assert 3 <= len(reg.history_) < 10
    assert reg.n_iter_ == UPDATES_PER_EPOCH * len(reg.history_)
    control = regressor(**params).fit(X, Y, groups=G)
    assert control.n_iter_ == 500


def test_early_stopping_callback_watches_the_held_out_tasks():
    stop = EarlyStopping(monitor="valid_loss", patience=2, sink=lambda *_: None)
    reg = regressor(callbacks=[stop], max_iter=1000, **WILD).fit(X, Y, groups=G)
    losses = column(reg, "valid_loss")
    assert 2 < len(losses) < 20
    # ... and the best parameters are kept all the same
    best = int(np.argmin(losses))
    assert len(losses) - 1 - best >= 1
    spy = Spy()
    again = regressor(callbacks=[spy], max_iter=UPDATES_PER_EPOCH * len(losses), **WILD)
    again.fit(X, Y, groups=G)
    for name, value in reg.module_.state_dict().items():
        assert torch.equal(value, spy.epochs[best][name])


def test_learning_rate_scheduler_sets_the_rate_alone():
    spy = Spy()
    scheduler = LRScheduler("StepLR", step_size=1, gamma=0.1)
    reg = regressor(callbacks=[scheduler, spy], beta=0.01, beta_decay=0.5).fit(X, Y, groups=G)
    rates = np.array(spy.rates)[:, 0]
    np.testing.assert_allclose(rates, np.repeat([0.01, 0.001, 0.0001], 50), rtol=1e-9)
    np.testing.assert_allclose(column(reg, "event_lr"), [0.01, 0.001, 0.0001], rtol=1e-9)
    lengths = np.array(distances(spy)).reshape(3, 50).max(1)
    assert lengths[0] > 3 * lengths[1] > 9 * lengths[2]


def test_learning_rate_scheduler_by_update():
    spy = Spy()
    scheduler = LRScheduler("ExponentialLR", gamma=0.5, step_every="batch")
    regressor(callbacks=[scheduler, spy], beta=0.01, max_iter=10).fit(X, Y, groups=G)
    # skorch's scheduler moves before the spy, which comes after it, looks
    rates = np.array(spy.rates)[:, 0]
    np.testing.assert_allclose(rates[1:] / rates[:-1], 0.5, rtol=1e-9)


def test_checkpoint_saves_the_best_parameters(tmp_path):
    spy = Spy()
    reg = regressor(
        callbacks=[spy, Checkpoint(dirname=tmp_path, f_pickle=None)], max_iter=500, **WILD
    )
    reg.fit(X, Y, groups=G)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "params.pt",
        "optimizer.pt",
        "history.json",
    }
    losses = column(reg, "valid_loss")
    best = int(np.argmin(losses))
    assert best < len(losses) - 1
    saved = torch.load(tmp_path / "params.pt", weights_only=True)
    for name, value in spy.epochs[best].items():
        assert torch.equal(saved[f"module.{name}"], value)
    improved = [k == 0 or loss < min(losses[:k]) for k, loss in enumerate(losses)]
    assert column(reg, "event_cp") == improved


def test_checkpoint_by_another_column(tmp_path):
    reg = regressor(
        callbacks=[Checkpoint(dirname=tmp_path, monitor="train_loss_best", f_pickle=None)],
        early_stopping=False,
    ).fit(X, Y, groups=G)
    assert (tmp_path / "params.pt").exists()
    assert column(reg, "event_cp") == column(reg, "train_loss_best")


def test_progress_bar_callback_shows_the_updates(capsys):
    class Pause(Callback):
        """Bars are drawn every tenth of a second."""

        def on_batch_end(self, net, training=False, **kwargs):
            if training and len(net.history[-1, "batches"]) == 10:
                time.sleep(0.2)

    reg = regressor(callbacks=[Pause(), ProgressBar(detect_notebook=False)], max_iter=100)
    reg.fit(X, Y, groups=G)
    shown = capsys.readouterr()
    assert shown.out == ""
    # 50 updates and one validation batch in each of two epochs
    assert shown.err.count("| 0/51 [") >= 2
    assert "10/51" in shown.err
    assert "train_loss=" in shown.err
    assert reg.n_iter_ == 100


def test_epoch_scoring_of_a_regressor():
    scoring = [
        EpochScoring("neg_mean_squared_error", name="mse", lower_is_better=False),
        EpochScoring("r2", lower_is_better=False),
    ]
    reg = regressor(callbacks=scoring).fit(X, Y, groups=G)
    # query sets of one size: the pooled error is the mean over the tasks
    losses = np.array(column(reg, "valid_loss"))
    np.testing.assert_allclose(column(reg, "mse"), -losses, rtol=1e-6)
    assert all(value <= 1 for value in column(reg, "r2"))
    order = np.argsort(losses)
    assert order.tolist() == np.argsort(column(reg, "r2"))[::-1].tolist()
    assert column(reg, "mse_best")[0] is True


def test_epoch_scoring_of_the_training_episodes():
    scoring = EpochScoring("neg_mean_squared_error", name="mse", on_train=True)
    reg = regressor(callbacks=[scoring], n_queries=4).fit(X, Y, groups=G)
    np.testing.assert_allclose(column(reg, "mse"), -np.array(column(reg, "train_loss")), rtol=1e-6)


def test_epoch_scoring_of_a_classifier():
    """The scorers see what the metrics see on the pooled query rows of the held-out tasks."""
    outputs = []

    class Outputs(Callback):
        def on_epoch_end(self, net, dataset_valid=None, **kwargs):
            (batch,) = dataset_valid.batches
            params = net.module_.meta_params()
            logits = net.engine.evaluate(params, batch, alpha=net.alpha, steps=net.eval_steps)[1]
            p = batch.query.real(logits).softmax(1).cpu().numpy()
            outputs.append((batch.query.real(batch.query.y).cpu().numpy(), p))

    metrics = {
        "accuracy": lambda y, p: accuracy_score(y, p.argmax(1)),
        "balanced_accuracy": lambda y, p: balanced_accuracy_score(y, p.argmax(1)),
        "neg_log_loss": lambda y, p: -log_loss(y, p),
        "roc_auc": lambda y, p: roc_auc_score(y, p[:, 1]),
    }
    scoring = [EpochScoring(name, lower_is_better=False) for name in metrics]
    clf = classifier(callbacks=[Outputs(), *scoring]).fit(X, C, groups=G)
    assert len(outputs) == 3
    for name, metric in metrics.items():
        expected = [metric(y, p) for y, p in outputs]
        np.testing.assert_allclose(column(clf, name), expected, rtol=1e-6)
        assert len(set(expected)) > 1


def test_epoch_scoring_with_labels_of_the_episode():
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(30, 2))
    labels = np.repeat(np.arange(30), 6)
    rows = centres[labels] + 0.1 * rng.normal(size=(180, 2))
    clf = classifier(
        n_ways=3,
        n_shots=2,
        n_queries=2,
        steps=3,
        callbacks=[EpochScoring("accuracy")],
        max_iter=200,
    )
    clf.fit(rows, labels)
    accuracy = column(clf, "accuracy")
    assert all(0 <= value <= 1 for value in accuracy)
    assert accuracy[-1] > 0.6


@pytest.mark.parametrize("use_caching", [True, False])
def test_epoch_scoring_with_a_function(use_caching):
    """It may run the net on the validation episodes."""

    def spread(net, dataset, y):
        predicted = net.predict(dataset)
        of_batches = [batch.query.real(batch.query.y).cpu() for batch in dataset.batches]
        targets = np.concatenate(of_batches)
        assert predicted.shape == targets.shape
        return float(((predicted - targets) ** 2).mean())

    scoring = EpochScoring(spread, name="error", use_caching=use_caching)
    reg = regressor(callbacks=[scoring], max_iter=60).fit(X, Y, groups=G)
    np.testing.assert_allclose(column(reg, "error"), column(reg, "valid_loss"), rtol=1e-6)


def test_gradient_norm_clipping_callback_bounds_the_update():
    lengths = {}
    for callbacks in ([], [GradientNormClipping(gradient_clip_value=1e-3)]):
        spy = Spy()
        regressor(
            callbacks=[*callbacks, spy], max_iter=20, optimizer="sgd", beta=0.1, beta_decay=0
        ).fit(X, Y, groups=G)
        lengths[len(callbacks)] = np.array(distances(spy))
    assert lengths[0].min() > 2e-4
    np.testing.assert_allclose(lengths[1], 0.1 * 1e-3, rtol=1e-2)


def test_gradient_norm_clipping_survives_a_skipped_update():
    rows = X.copy()
    rows[G == 5] *= 1e200
    clip = GradientNormClipping(gradient_clip_value=1.0)
    reg = regressor(callbacks=[clip], max_iter=40, early_stopping=False, meta_batch_size=1, steps=3)
    with pytest.warns(NonFiniteStepWarning):
        reg.fit(rows, Y, groups=G)
    assert sum(column(reg, "non_finite")) == pytest.approx(40 / 12, abs=1)
    assert all(torch.isfinite(p).all() for p in reg.module_.parameters())


@pytest.mark.parametrize("pattern", ["0.*", "module.0.*"])
def test_freezer_callback_keeps_parameters_where_they_are(pattern):
    spy = Spy()
    reg = regressor(callbacks=[Freezer(pattern), spy], max_iter=20).fit(X, Y, groups=G)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(spy.updates[-1][name], spy.start[name])
    for name in ("2.weight", "2.bias"):
        assert not torch.equal(spy.updates[-1][name], spy.start[name])
    assert np.isfinite(reg.adapt(X, Y, groups=G).predict(X, groups=G)).all()


def test_callbacks_see_the_whole_story():
    seen = []

    class Story(Callback):
        def on_train_begin(self, net, X=None, y=None, **kwargs):
            seen.append("train")

        def on_epoch_begin(self, net, **kwargs):
            seen.append("epoch")

        def on_batch_begin(self, net, batch=None, training=None, **kwargs):
            seen.append("update" if training else "validation")

        def on_grad_computed(self, net, named_parameters, **kwargs):
            grads = [p.grad for _, p in named_parameters]
            assert all(g is not None and g.any() for g in grads)
            seen.append("grad")

        def on_epoch_end(self, net, dataset_train=None, dataset_valid=None, **kwargs):
            assert len(dataset_valid) == 1
            seen.append("epoch end")

        def on_train_end(self, net, **kwargs):
            seen.append("train end")

    regressor(callbacks=[Story()], max_iter=52).fit(X, Y, groups=G)
    update = ["update", "grad"]
    assert seen == [
        "train",
        *["epoch", *update * 50, "validation", "epoch end"],
        *["epoch", *update * 2, "validation", "epoch end"],
        "train end",
    ]


def test_methods_set_on_a_callback_are_called():
    calls = []
    callback = Callback()
    callback.on_batch_end = lambda net, training=False, **kwargs: calls.append(training)
    callback.on_grad_computed = lambda net, **kwargs: calls.append("grad")
    regressor(callbacks=[callback], max_iter=2).fit(X, Y, groups=G)
    assert calls == [*["grad", True] * 2, False]


def test_the_history_of_the_updates_is_plain_data():
    reg = regressor(max_iter=52).fit(X, Y, groups=G)
    rows = reg.history_[-1, "batches"]
    assert [set(row) for row in rows] == [
        *[{"train_loss", "train_batch_size", "non_finite"}] * 2,
        {"valid_loss", "valid_batch_size", "valid_loss_before"},
    ]
    assert {type(value) for row in rows for value in row.values()} == {int, float}
    assert reg.history_[:, "train_batch_count"] == [50, 2]
    assert reg.history_[:, "valid_batch_count"] == [1, 1]


def test_callbacks_may_be_classes_and_named_pairs():
    reg = regressor(
        callbacks=[Spy, ("stop", EarlyStopping(patience=2, sink=lambda *_: None))], max_iter=60
    ).fit(X, Y, groups=G)
    names = [name for name, _ in reg.net_.callbacks_]
    assert "stop" in names
    assert "Spy" in names


# --- prefixed parameters


def test_parameters_of_callbacks():
    stop = EarlyStopping(monitor="train_loss", patience=50, threshold=0.5, sink=lambda *_: None)
    params = {"beta": 1e-9, "max_iter": 600, "early_stopping": False}
    reg = regressor(callbacks=[("stop", stop)], callbacks__stop__patience=2, **params)
    assert reg.get_params()["callbacks__stop__patience"] == 2
    reg.fit(X, Y, groups=G)
    short = len(reg.history_)
    reg.set_params(callbacks__stop__patience=6).fit(X, Y, groups=G)
    assert short < len(reg.history_) < 12


def test_callbacks_of_the_net_can_be_configured(capsys):
    lines = []
    regressor(verbose=1, callbacks__print_log__sink=lines.append, max_iter=60).fit(X, Y, groups=G)
    assert capsys.readouterr().out == ""
    assert any("train_loss" in str(line) for line in lines)
    regressor(verbose=1, callbacks__print_log=None, max_iter=60).fit(X, Y, groups=G)
    assert capsys.readouterr().out == ""


def test_parameters_of_the_optimiser():
    spy = Spy()
    reg = regressor(
        optimizer="sgd",
        optimizer__momentum=0.9,
        optimizer__nesterov=True,
        callbacks=[spy],
        max_iter=5,
    ).fit(X, Y, groups=G)
    group = reg.net_.optimizer_.param_groups[0]
    assert isinstance(reg.net_.optimizer_, torch.optim.SGD)
    assert group["momentum"] == 0.9
    assert group["nesterov"] is True
    plain = Spy()
    regressor(optimizer="sgd", callbacks=[plain], max_iter=5).fit(X, Y, groups=G)
    assert spy.updates[-1]["0.weight"].sub(plain.updates[-1]["0.weight"]).abs().max() > 0


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        (torch.optim.RMSprop, torch.optim.RMSprop),
        (torch.optim.Adagrad, torch.optim.Adagrad),
    ],
)
def test_optimisers(optimizer, expected):
    reg = regressor(optimizer=optimizer, max_iter=10).fit(X, Y, groups=G)
    assert type(reg.net_.optimizer_) is expected
    start = regressor(optimizer=optimizer, max_iter=1, beta=1e-30).fit(X, Y, groups=G)
    assert not same_parameters(reg, start)


@pytest.mark.parametrize("beta_decay", [0.0, 0.5])
def test_the_rate_of_the_optimiser_takes_the_place_of_beta(beta_decay):
    """As in skorch, where ``optimizer__lr`` goes before ``lr``."""
    spy, other = Spy(), Spy()
    params = {"beta_decay": beta_decay, "max_iter": 20}
    regressor(beta=0.5, optimizer__lr=1e-3, callbacks=[spy], **params).fit(X, Y, groups=G)
    regressor(beta=1e-3, callbacks=[other], **params).fit(X, Y, groups=G)
    np.testing.assert_allclose(spy.rates, other.rates, rtol=1e-9)


@pytest.mark.parametrize("pattern", ["0.*", "module.0.*"])
@pytest.mark.parametrize("beta_decay", [0.0, 0.5])
def test_parameter_groups_keep_rates_of_their_own(beta_decay, pattern):
    spy = Spy()
    regressor(
        optimizer__param_groups=[(pattern, {"lr": 0.0})],
        beta=0.01,
        beta_decay=beta_decay,
        max_iter=20,
        callbacks=[spy],
    ).fit(X, Y, groups=G)
    last = spy.updates[-1]
    for name in ("0.weight", "0.bias"):
        assert torch.equal(last[name], spy.start[name])
    for name in ("2.weight", "2.bias"):
        assert not torch.equal(last[name], spy.start[name])


def test_parameters_of_the_module():
    reg = regressor(module=Residual, module__width=5, max_iter=10)
    assert reg.get_params()["module__width"] == 5
    assert reg.fit(X, Y, groups=G).module_.body.out_features == 5
    assert clone(reg).set_params(module__width=9).fit(X, Y, groups=G).module_.body.out_features == 9


def test_the_order_of_the_data_loader_does_not_matter_to_the_stream():
    """`iterator_train__shuffle` permutes what is random already; every update has its tasks."""
    reg = regressor(iterator_train__shuffle=True, max_iter=60).fit(X, Y, groups=G)
    assert reg.n_iter_ == 60
    assert np.isfinite(column(reg, "train_loss")).all()


def test_the_batch_size_of_the_data_loader_is_the_meta_batch_size():
    class Sizes(Callback):
        def on_train_begin(self, net, **kwargs):
            self.sizes = []

        def on_batch_begin(self, net, batch=None, training=False, **kwargs):
            if training:
                self.sizes.append(len(batch[0]))

    sizes = Sizes()
    regressor(meta_batch_size=3, max_iter=20, callbacks=[sizes]).fit(X, Y, groups=G)
    assert sizes.sizes == [3] * 20
    reg = regressor(meta_batch_size=3, iterator_train__batch_size=5, max_iter=60, callbacks=[sizes])
    reg.fit(X, Y, groups=G)
    assert reg.n_iter_ == 60
    assert sizes.sizes == [5] * 60


def test_validation_with_several_batches_weighs_every_task_alike():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(250), 4)
    rows = rng.normal(size=(1000, 2))
    y = (rows * rng.normal(size=(250, 2))[groups]).sum(1)
    losses = []

    class Every(Callback):
        def on_epoch_end(self, net, dataset_valid=None, **kwargs):
            params = net.module_.meta_params()
            for batch in dataset_valid.batches:
                loss, _ = net.engine.evaluate(params, batch, alpha=net.alpha, steps=net.eval_steps)
                losses.append(loss)

    reg = regressor(n_shots=2, validation_fraction=0.9, max_iter=2, callbacks=[Every()])
    reg.fit(rows, y, groups=groups)
    assert reg.history_[-1]["valid_batch_count"] == len(losses) > 1
    assert len(torch.cat(losses)) == 225
    assert column(reg, "valid_loss") == pytest.approx([torch.cat(losses).mean().item()], rel=1e-9)


def test_settings_of_the_data_loader_do_not_change_what_is_drawn():
    light = regressor(max_iter=60).fit(X, Y, groups=G)
    loader = regressor(
        max_iter=60, iterator_train__num_workers=0, iterator_valid__pin_memory=False
    ).fit(X, Y, groups=G)
    assert same_parameters(light, loader)
    assert column(light, "valid_loss") == column(loader, "valid_loss")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_the_data_loader_draw_the_same_tasks():
    alone = regressor(max_iter=60).fit(X, Y, groups=G)
    helped = regressor(max_iter=60, iterator_train__num_workers=1).fit(X, Y, groups=G)
    assert same_parameters(alone, helped)


def test_a_search_over_prefixed_parameters():
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            regressor(
                module=Residual,
                callbacks=[("clip", GradientNormClipping(1.0))],
                optimizer="sgd",
                max_iter=20,
            ),
            {
                "module__width": [2, 4],
                "optimizer__momentum": [0.0, 0.9],
                "callbacks__clip__gradient_clip_value": [1e-6],
            },
            cv=GroupKFold(2),
        ).fit(X, Y, groups=G)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    best = search.best_estimator_
    assert best.module_.body.out_features == search.best_params_["module__width"]


# --- warm start


@pytest.mark.parametrize("parts", [(50, 50), (30, 70), (1, 99)])
@pytest.mark.parametrize("make", [regressor, classifier])
def test_two_fits_are_one_long_fit(make, parts):
    y = Y if make is regressor else C
    params = {"beta_decay": 0, "early_stopping": False}
    whole = make(max_iter=100, **params).fit(X, y, groups=G)
    est = make(warm_start=True, **params)
    for max_iter in parts:
        est.set_params(max_iter=max_iter).fit(X, y, groups=G)
    assert same_parameters(est, whole)
    assert est.n_iter_ == whole.n_iter_ == 100
    assert sum(column(est, "train_batch_count")) == 100
    for state, other in zip(
        est.net_.optimizer_.state_dict()["state"].values(),
        whole.net_.optimizer_.state_dict()["state"].values(),
        strict=True,
    ):
        assert float(state["step"]) == 100
        assert torch.equal(state["exp_avg"], other["exp_avg"])
    # negative control: two fits without a warm start are the second one
    cold = make(max_iter=50, **params).fit(X, y, groups=G).fit(X, y, groups=G)
    assert cold.n_iter_ == 50
    assert not same_parameters(cold, whole)


def test_warm_start_goes_on_with_learned_rates():
    params = {"beta_decay": 0, "early_stopping": False, "update_rule": MetaSGD(), "beta": 0.01}
    whole = regressor(max_iter=100, **params).fit(X, Y, groups=G)
    est = regressor(warm_start=True, max_iter=50, **params).fit(X, Y, groups=G)
    est.fit(X, Y, groups=G)
    rates = [dict(e.net_.module_.rule.named_parameters()) for e in (est, whole)]
    for name, rate in rates[0].items():
        assert rate.abs().max() > 0
        assert torch.equal(rate, rates[1][name])


@pytest.mark.parametrize("beta_decay", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_warm_start_takes_a_changed_beta(beta_decay, optimizer):
    params = {"warm_start": True, "optimizer": optimizer, "beta_decay": beta_decay}
    params["early_stopping"] = False  # else what nothing has beaten is kept
    reg = regressor(beta=0.01, max_iter=20, **params).fit(X, Y, groups=G)
    moves = []
    for beta in (0.01, 1e-8):
        before = parameters(reg)
        reg.set_params(beta=beta).fit(X, Y, groups=G)
        moves.append(
            max(float((p - q).abs().max()) for p, q in zip(before, parameters(reg), strict=True))
        )
        assert 0 < reg.net_.optimizer_.param_groups[0]["lr"] <= beta
    assert moves[0] > 1e-3
    assert 0 < moves[1] < 1e-5


def test_warm_start_takes_changed_callbacks_and_settings_of_the_optimiser():
    reg = regressor(warm_start=True, max_iter=60, early_stopping=False).fit(X, Y, groups=G)
    spy = Spy()
    reg.set_params(callbacks=[spy], optimizer__weight_decay=0.5, max_iter=10).fit(X, Y, groups=G)
    assert len(spy.updates) == 10
    group = reg.net_.optimizer_.param_groups[0]
    assert group["weight_decay"] == 0.5
    assert {float(s["step"]) for s in reg.net_.optimizer_.state_dict()["state"].values()} == {70}
    assert [row["epoch"] for row in reg.history_] == [1, 2, 3]


def test_warm_start_refuses_other_data():
    reg = regressor(warm_start=True, max_iter=5).fit(X, Y, groups=G)
    with pytest.raises(ValueError, match="X has 1 features"):
        reg.fit(X[:, :1], Y, groups=G)
    with pytest.raises(ValueError, match=r"2 output\(s\)"):
        reg.fit(X, np.c_[Y, Y], groups=G)
    clf = classifier(warm_start=True, max_iter=5).fit(X, C, groups=G)
    with pytest.raises(ValueError, match="not seen in fit"):
        clf.fit(X, C + 1, groups=G)
    # other tasks with the same features are welcome
    assert reg.fit(X[:40], Y[:40], groups=G[:40]).n_iter_ == 10


# --- what is printed


def test_verbose_prints_the_table_of_skorch(capsys):
    regressor(verbose=1).fit(X, Y, groups=G)
    shown = capsys.readouterr()
    assert shown.err == ""  # not a terminal: no progress bar
    head, rule, *rows = shown.out.strip().splitlines()
    for name in ("epoch", "train_loss", "valid_loss", "valid_loss_before", "dur"):
        assert name in head.split()
    assert set(rule) <= {"-", " "}
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]


def test_quiet_by_default(capsys):
    regressor().fit(X, Y, groups=G).adapt(X[:8], Y[:8]).predict(X)
    classifier(max_iter=20).fit(X, C, groups=G).score(X, C, groups=G)
    assert capsys.readouterr() == ("", "")


def test_verbose_shows_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    regressor(verbose=1).fit(X, Y, groups=G)
    shown = capsys.readouterr()
    assert "it/s" in shown.err
    assert "train_loss" in shown.out
    regressor(verbose=0).fit(X, Y, groups=G)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_bar_on_a_pseudo_terminal():
    import fcntl
    import pty
    import struct
    import termios

    script = (
        "from sklearn_maml import MAMLRegressor\n"
        "from sklearn_maml.datasets import make_sinusoid_tasks\n"
        "X, y, g = make_sinusoid_tasks(n_tasks=12, random_state=0)\n"
        "reg = MAMLRegressor(\n"
        "    max_iter=100, update_rule='sgd', steps=1, verbose=1, random_state=0\n"
        ")\n"
        "reg.fit(X, y, groups=g)\n"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=120) == 0
    os.close(leader)
    assert b"it/s" in shown
    assert b"valid_loss_before" in shown


# --- devices


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device_cpu(device):
    reg = regressor(device=device, max_iter=5).fit(X, Y, groups=G)
    assert reg.device_ == torch.device("cpu")
    assert all(p.device.type == "cpu" for p in reg.module_.parameters())


def test_device_auto_takes_cuda_where_there_is_one():
    reg = regressor(device="auto", max_iter=5).fit(X, Y, groups=G)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert reg.device_.type == expected
    assert all(p.device.type == expected for p in reg.module_.parameters())
    if expected == "cpu":
        assert same_parameters(reg, regressor(device="cpu", max_iter=5).fit(X, Y, groups=G))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("module", [None, Residual, Normed])
@pytest.mark.parametrize("make", [regressor, classifier])
def test_everything_moves_to_cuda(module, make):
    y = Y if make is regressor else C
    on = {
        device: make(module=module, device=device, max_iter=20).fit(X, y, groups=G)
        for device in ("cuda", "cpu")
    }
    gpu = on["cuda"]
    assert gpu.device_.type == "cuda"
    assert all(p.device.type == "cuda" for p in gpu.module_.parameters())
    np.testing.assert_allclose(
        column(gpu, "train_loss"), column(on["cpu"], "train_loss"), rtol=1e-6
    )
    for arguments in ((X[:8], y[:8]), (X, y, G)):
        rows = {"X": X[:8]} if len(arguments) == 2 else {"X": X, "groups": G}
        a, b = (est.adapt(*arguments).predict(**rows) for est in on.values())
        assert isinstance(a, np.ndarray)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert gpu.score(X, y, groups=G) == pytest.approx(on["cpu"].score(X, y, groups=G), abs=1e-4)
    # a continued fit and a copy stay there
    gpu.set_params(warm_start=True).fit(X, y, groups=G)
    assert copy.deepcopy(gpu).module_.state_dict().popitem()[1].device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_leaves_the_random_state_of_the_device_alone():
    before = torch.cuda.get_rng_state()
    regressor(module=Residual, device="cuda", max_iter=5).fit(X, Y, groups=G)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# --- scikit-learn's own callbacks

needs_callbacks = pytest.mark.skipif(
    sklearn_callback is None, reason="this scikit-learn has no callbacks"
)


@pytest.fixture
def bars(capsys):
    """What the progress bars showed."""
    pytest.importorskip("rich")
    return lambda: capsys.readouterr().out


def frame():
    pd = pytest.importorskip("pandas")
    return pd.DataFrame(X, columns=["a", "b"]).assign(task=G)


@needs_callbacks
def test_progress_bar_of_sklearn(bars):
    reg = regressor().set_callbacks(sklearn_callback.ProgressBar())
    reg.fit(X, Y, groups=G)
    shown = bars()
    assert "MAMLRegressor - fit" in shown
    assert "100%" in shown
    assert same_parameters(reg, regressor().fit(X, Y, groups=G))  # it only watches
    classifier().set_callbacks(sklearn_callback.ProgressBar()).fit(X, C, groups=G)
    assert "MAMLClassifier - fit" in bars()


def epoch_scores(monitor, name="score"):
    return [row[name] for row in monitor.get_logs().data if row["task_name"] == "epoch"]


def make_monitor():
    # scikit-learn 1.9 takes no single callable and no None here
    return sklearn_callback.ScoringMonitor(scoring={"score": task_scorer("r2")})


@needs_callbacks
@pytest.mark.parametrize("spelling", ["groups", "column", "list"])
def test_scoring_monitor_of_sklearn(spelling):
    monitor = make_monitor()
    reg = regressor(task_column="task" if spelling == "column" else None).set_callbacks(monitor)
    tasks = [(X[rows], Y[rows]) for rows in np.split(np.arange(len(X)), N_TASKS)]
    fit = {"groups": (X, Y, G), "column": (frame(), Y), "list": (tasks,)}[spelling]
    reg.fit(*fit)
    if spelling == "list":  # without y scikit-learn's monitor has nothing to score
        assert not any("score" in row for row in monitor.get_logs().data)
        return
    scores = epoch_scores(monitor)
    assert len(scores) == len(reg.history_) == 3
    assert all(math.isfinite(score) for score in scores)
    assert scores[-1] > scores[0]


@needs_callbacks
def test_scoring_monitor_scores_the_state_of_the_epoch():
    monitor = make_monitor()
    params = {"early_stopping": False, "beta_decay": 0.0}
    regressor(max_iter=100, **params).set_callbacks(monitor).fit(X, Y, groups=G)
    for score, max_iter in zip(epoch_scores(monitor), (50, 100), strict=True):
        reg = regressor(max_iter=max_iter, **params).fit(X, Y, groups=G)
        assert score == pytest.approx(reg.score(X, Y, groups=G), abs=1e-12)


@needs_callbacks
def test_scoring_monitor_of_a_classifier():
    scoring = {"accuracy": task_scorer("accuracy"), "loss": task_scorer("neg_log_loss")}
    monitor = sklearn_callback.ScoringMonitor(scoring=scoring)
    classifier(max_iter=100).set_callbacks(monitor).fit(X, C, groups=G)
    assert all(0 < score <= 1 for score in epoch_scores(monitor, "accuracy"))
    assert all(score < 0 for score in epoch_scores(monitor, "loss"))


@needs_callbacks
def test_scoring_monitor_with_a_scorer_that_does_not_adapt_says_what_to_use():
    reg = regressor(max_iter=10).set_callbacks(sklearn_callback.ScoringMonitor(scoring="r2"))
    with pytest.raises(NotAdaptedError, match="task_scorer"):
        reg.fit(X, Y, groups=G)


@needs_callbacks
def test_a_callback_of_sklearn_can_stop_the_fit():
    class StopAfterTwo:
        def __init__(self):
            self.seen = []

        def setup(self, estimator, context):
            self.seen.append("setup")

        def teardown(self, estimator, context):
            self.seen.append("teardown")

        def on_fit_task_begin(self, estimator, context, *, X=None, metadata=None):
            self.seen.append(f"begin {context.task_name}")
            assert list(metadata) == ["groups"]

        def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
            self.seen.append(f"end {context.task_name}")
            support, target = fit_rows
            assert np.isfinite(fitted_estimator.adapt(support, target).predict(support)).all()
            return context.task_name == "epoch" and context.task_id == 1

    fit_rows = X[:8], Y[:8]
    callback = StopAfterTwo()
    reg = regressor(max_iter=500).set_callbacks(callback).fit(X, Y, groups=G)
    assert reg.n_iter_ == 2 * UPDATES_PER_EPOCH
    assert callback.seen == [
        "setup",
        "begin fit",
        *["begin epoch", "end epoch"] * 2,
        "end fit",
        "teardown",
    ]
    assert not hasattr(reg, "_callback_fit_ctx")


@needs_callbacks
def test_callbacks_of_sklearn_are_torn_down_after_an_error():
    class Watch:
        torn_down = 0

        def setup(self, estimator, context):
            pass

        def teardown(self, estimator, context):
            Watch.torn_down += 1

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context):
            if context.task_name == "epoch":
                raise RuntimeError("from the callback")

    reg = regressor(max_iter=100).fit(X, Y, groups=G)
    before = dict(vars(reg))
    reg.set_callbacks(Watch())
    with pytest.raises(RuntimeError, match="from the callback"):
        reg.fit(X, Y, groups=G)
    assert Watch.torn_down == 1
    reg.set_callbacks()
    assert vars(reg).keys() == before.keys()
    reg.adapt(X[:8], Y[:8]).predict(X)


@needs_callbacks
@pytest.mark.parametrize("spelling", ["groups", "column"])
def test_callbacks_of_sklearn_inside_a_search(bars, spelling):
    monitor = make_monitor()
    column_name = "task" if spelling == "column" else None
    reg = regressor(max_iter=100, task_column=column_name).set_callbacks(monitor)
    search = GridSearchCV(reg, {"alpha": [0.01, 0.1]}, cv=GroupKFold(2))
    search.set_callbacks(sklearn_callback.ProgressBar())
    with sklearn.config_context(enable_metadata_routing=spelling == "groups"):
        rows = X if spelling == "groups" else frame()
        search.fit(rows, Y, groups=G)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    shown = bars()
    assert "GridSearchCV - fit" in shown
    assert "MAMLRegressor - fit" in shown
    # two epochs for each of two values and two folds, and for the best on all rows
    scores = epoch_scores(monitor)
    assert len(scores) == 2 * (2 * 2 + 1)
    assert all(math.isfinite(score) for score in scores)
