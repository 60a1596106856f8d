"""Tasks that come in parts: `partial_fit`."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import sklearn
import torch

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
from sklearn_maml.exceptions import NotAdaptedError, SingleTaskWarning
from sklearn_maml.inspection import MetaTrainingDisplay
from sklearn_maml.training import outcomes, outer_step, schedule

SMALL = {"hidden_layer_sizes": (4,), "max_iter": 3, "random_state": 0}
STEPS = {**SMALL, "update_rule": "sgd", "steps": 1, "early_stopping": False}
HEAD = {**SMALL, "update_rule": "gaussian-head"}
X, Y, G = make_sinusoid_tasks(n_tasks=24, n_rows=8, random_state=0)
C = np.array(["low", "mid", "high"])[np.digitize(Y, [-1, 1])]


def part(k, size=8):
    """Rows of some of the tasks."""
    return np.isin(G, np.arange(k * size, (k + 1) * size))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net_.module_.parameters()])


def go(model, *rows, y=Y, **options):
    for of in rows:
        model.partial_fit(X[of], y[of], groups=G[of], **options)
    return model


def test_the_first_call_is_a_fit_of_constant_rate():
    one = go(MAMLRegressor(**STEPS), part(0))
    other = MAMLRegressor(**STEPS, beta_decay=0.0).fit(X[part(0)], Y[part(0)], groups=G[part(0)])
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert one.n_iter_ == 3


@pytest.mark.parametrize("warm_start", [False, True])
def test_calls_come_to_one_fit_of_all_their_updates(warm_start):
    parts = go(MAMLRegressor(**STEPS, warm_start=warm_start), part(0), part(0))
    whole = MAMLRegressor(**{**STEPS, "max_iter": 6}, beta_decay=0.0)
    whole.fit(X[part(0)], Y[part(0)], groups=G[part(0)])
    torch.testing.assert_close(weights(parts), weights(whole))
    assert parts.n_iter_ == 6


def test_a_call_goes_on_from_a_fit():
    fitted = MAMLRegressor(**STEPS).fit(X, Y, groups=G)
    before = weights(fitted)
    model = go(copy.deepcopy(fitted), part(1))
    assert model.n_iter_ == 6
    assert model.n_tasks_ == 8
    moved = (weights(model) - before).abs().max()
    assert 0 < moved < 0.05  # three steps of Adam, from where it was
    again = model.fit(X, Y, groups=G)  # which starts anew
    torch.testing.assert_close(weights(again), before, rtol=0, atol=0)


@pytest.mark.parametrize("params", [STEPS, HEAD], ids=["steps", "head"])
@pytest.mark.parametrize("partial", [True, False])
def test_few_tasks_move_what_many_have_taught_in_proportion_to_their_number(params, partial):
    params = {**params, "warm_start": True, "early_stopping": False}
    many = MAMLRegressor(**params).fit(X, Y, groups=G)
    rows = part(0, size=3)

    def moved(model):
        before = weights(model)
        call = model.partial_fit if partial else model.fit
        call(X[rows], Y[rows], groups=G[rows])
        return (weights(model) - before).abs().max()

    few = copy.deepcopy(many)
    of_three = moved(few)
    few.net_.most_tasks_ = 3  # as if it had known no more
    assert many.net_.most_tasks_ == 24
    assert of_three > 0
    assert moved(few) > 4 * of_three


def test_how_many_tasks_have_taught_is_saved(tmp_path):
    model = MAMLRegressor(**STEPS).fit(X, Y, groups=G)
    model.save(tmp_path / "model", training=True)
    one, other = (go(m, part(0, size=2)) for m in (model, MAMLRegressor.load(tmp_path / "model")))
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert other.net_.most_tasks_ == 24


def test_a_continued_fit_keeps_its_start_until_held_out_tasks_find_better():
    params = {**STEPS, "early_stopping": "auto", "warm_start": True}
    model = MAMLRegressor(**{**params, "max_iter": 60}).fit(X, Y, groups=G)
    start = weights(model)
    model.set_params(beta=3.0).fit(X, Y, groups=G)  # which leads nowhere
    torch.testing.assert_close(weights(model), start, rtol=0, atol=0)
    assert MetaTrainingDisplay.from_estimator(model).kept is None
    model.set_params(beta=1e-3, max_iter=200).fit(X, Y, groups=G)
    assert not torch.equal(weights(model), start)


@pytest.mark.parametrize(
    ("params", "n_updates"),
    [({"max_iter": 1000}, 50), ({"max_iter": 1000, "meta_batch_size": 1}, 64), ({}, 3)],
)
def test_a_call_makes_an_epoch_or_one_pass_and_at_most_max_iter(params, n_updates):
    rng = np.random.RandomState(0)
    rows, task = rng.randn(64 * 4, 1), np.repeat(np.arange(64), 4)
    model = MAMLRegressor(**{**STEPS, **params, "n_shots": 1, "n_queries": 1})
    assert model.partial_fit(rows, rows[:, 0], groups=task).n_iter_ == n_updates


@pytest.mark.parametrize("params", [STEPS, HEAD], ids=["steps", "head"])
def test_units_are_those_of_the_first_call(params):
    model = go(MAMLRegressor(**params), part(0))
    mean, scale = model.y_mean_, model.y_scale_
    center = model._learner.head.center.clone() if params is HEAD else None
    go(model, part(1), y=100 * Y + 7)
    assert (model.y_mean_, model.y_scale_) == (mean, scale)
    if center is not None:
        assert torch.equal(model._learner.head.center, center)


@pytest.mark.parametrize("params", [STEPS, HEAD, {**STEPS, "center_y": True}])
def test_the_scale_of_targets_that_are_all_equal_is_learned_later(params):
    """Steps on targets of thousands in units of 1 would diverge."""
    first = part(0)
    y = np.where(first, 5.0, 1000 * Y + 5000)
    model = go(MAMLRegressor(**params), first, y=y)
    assert model.y_scale_ == 1
    before = model.y_scale_
    go(model, part(1), y=y)
    own = slice(8 * 8, 16 * 8)
    reference = MAMLRegressor(**params).fit(X[part(1)], y[part(1)], groups=G[part(1)])
    assert model.y_scale_ == reference.y_scale_ > 100
    assert model.y_mean_ == reference.y_mean_
    assert before == 1  # what a copy has stays
    known = model.y_scale_
    assert go(model, part(2), y=10 * y).y_scale_ == known
    assert np.isfinite(
        model.adapt(X[own], y[own], groups=G[own]).predict(X[own], groups=G[own])
    ).all()


def test_the_scale_of_one_of_two_outputs_is_learned_later(tmp_path):
    first = part(0)
    y = np.c_[Y, np.where(first, 2.0, 100 * Y)]
    model = go(MAMLRegressor(**STEPS), first, y=y)
    known, one = model.y_scale_
    assert one == 1
    model.save(tmp_path / "model", training=True)
    for same in (model, MAMLRegressor.load(tmp_path / "model")):
        go(same, part(1), y=y)
        assert same.y_scale_[0] == known
        assert same.y_scale_[1] > 50


def test_a_default_fit_to_equal_targets_is_no_numerical_accident():
    n_tasks = 70  # gradient steps are judged, too
    rows, task = np.random.default_rng(0).normal(size=(4 * n_tasks, 2)), np.arange(4 * n_tasks) // 4
    model = MAMLRegressor(**SMALL).fit(rows, np.full(len(rows), 3.0), groups=task)
    assert model.adapt(rows[:4], np.full(4, 3.0)).predict(rows) == pytest.approx(3.0)


def test_a_head_keeps_what_it_learned_last_and_trains_on_few_tasks_at_a_time():
    model = go(MAMLRegressor(**HEAD), part(0))
    calibration = model.calibration_
    assert model.learner_weights_ == {"gaussian-head": 1.0}
    seen = [weights(model)]
    for task in (8, 9, 10):
        go(model, task == G)
        assert not any(torch.equal(weights(model), w) for w in seen)
        seen.append(weights(model))
    # no task was held out that could say how sure predictions may be
    assert model.calibration_.factor is calibration.factor
    assert model.calibration_.freedom is calibration.freedom
    assert model.calibration_.high >= calibration.high
    rows = part(2)
    assert np.isfinite(model.score(X[rows], Y[rows], groups=G[rows]))


def test_a_continued_fit_of_few_tasks_keeps_the_calibration():
    model = MAMLRegressor(**HEAD, warm_start=True).fit(X, Y, groups=G)
    factor = model.calibration_.factor
    model.fit(X[part(0, 5)], Y[part(0, 5)], groups=G[part(0, 5)])
    assert model.calibration_.factor is factor


def test_many_parts_teach_what_one_fit_does():
    params = {"hidden_layer_sizes": (16,), "max_iter": 30, "update_rule": "gaussian-head"}
    model = MAMLRegressor(**params, random_state=0)
    x, y, task = make_sinusoid_tasks(n_tasks=240, n_rows=15, random_state=1)
    X_new, y_new, new = make_sinusoid_tasks(n_tasks=40, n_rows=20, random_state=2)
    new = new + 1000
    scores = []
    for k in range(12):
        rows = task // 20 == k
        model.partial_fit(x[rows], y[rows], groups=task[rows])
        scores.append(model.score(X_new, y_new, groups=new))
    assert scores[-1] > scores[0] + 0.1


def test_labels_to_come_are_named_in_the_first_call():
    early = part(0) & (C != "mid")
    model = go(MAMLClassifier(**STEPS), early, y=C, classes=["low", "mid", "high"])
    assert model.classes_.tolist() == ["high", "low", "mid"]
    go(model, part(1), y=C)
    go(model, part(2), y=C, classes=["mid", "low", "high"])
    rows = np.flatnonzero(part(2))
    model.adapt(X[rows], C[rows], groups=G[rows])
    assert model.predict_proba(X[rows], groups=G[rows]).shape == (len(rows), 3)
    before = weights(model)
    with pytest.raises(ValueError, match=r"classes=\['high', 'low'\] are not those of the calls"):
        go(model, part(0), y=C, classes=["low", "high"])
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("params", [STEPS, HEAD], ids=["steps", "head"])
def test_labels_that_were_not_named_are_refused(params):
    model = MAMLClassifier(**params)
    with pytest.raises(ValueError, match=r"name all labels in partial_fit\(\.\.\., classes=\)"):
        go(model, part(0), y=C, classes=["low", "high"])
    assert not hasattr(model, "classes_")
    go(model, part(0) & (C != "mid"), y=C)
    with pytest.raises(ValueError, match=r"not seen in fit: \['mid'\]"):
        go(model, part(1), y=C)


def test_weights_of_classes_are_not_of_rows_to_come():
    with pytest.raises(ValueError, match="class_weight='balanced' is about the rows of all tasks"):
        go(MAMLClassifier(**STEPS, class_weight="balanced"), part(0), y=C)
    model = MAMLClassifier(**STEPS, class_weight={"low": 2, "mid": 1, "high": 1})
    go(model, part(0), part(1), y=C, classes=["low", "mid", "high"])
    assert model.class_weight_.tolist() == [1, 2, 1]


def test_what_is_kept_does_not_grow_with_the_calls(monkeypatch):
    monkeypatch.setattr(outcomes, "MOST_EPOCHS", 4)
    model = MAMLRegressor(**HEAD)
    sizes = []
    for _ in range(12):
        go(model, part(0))
        sizes.append(len(pickle.dumps(model)))
    assert len(model.history_) <= 4 + 2
    assert max(sizes[6:]) <= 1.01 * min(sizes[5:7])
    assert model.history_[-1, "train_loss"] > 0


def test_tasks_that_were_adapted_to_are_forgotten():
    model = go(MAMLRegressor(**STEPS), part(0))
    model.adapt(X[:5], Y[:5])
    go(model, part(1))
    with pytest.raises(NotAdaptedError):
        model.predict(X[:5])


def test_an_error_leaves_the_estimator_as_it_was():
    model = go(MAMLRegressor(**HEAD), part(0)).adapt(X[:5], Y[:5])
    before = dict(vars(model))
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(np.full((4, 1), np.nan), np.zeros(4), groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(np.zeros((4, 2)), np.zeros(4), groups=[0, 0, 1, 1])
    with (
        pytest.raises(ValueError, match="these rows have no task information"),
        pytest.warns(SingleTaskWarning),
    ):
        model.partial_fit(X[:9], Y[:9])
    assert vars(model) == before


def test_gradient_steps_alone_stay_so_when_more_tasks_come():
    model = go(MAMLRegressor(**{**SMALL, "steps": 1}), part(0, 3))
    assert model.learner_weights_ == {"gradient-steps": 1.0}
    go(model, part(1))
    assert model.learner_weights_ == {"gradient-steps": 1.0}


def test_one_task_and_distributions_in_parts():
    model = MAMLRegressor(**STEPS)
    for _ in range(2):
        with pytest.warns(SingleTaskWarning):
            model.partial_fit(X[:9], Y[:9])
    assert model.predict(X[:9]).shape == (9,)
    model = MAMLRegressor(**STEPS)
    for _ in range(2):
        model.partial_fit(SinusoidTasks(8))
    assert model.n_iter_ == 6


def test_sizes_of_reptile_steps_are_constant():
    sizes = []

    model = MAMLRegressor(
        **{**STEPS, "max_iter": 4}, meta_gradient="reptile", meta_gradient__step_size=0.5
    )
    step_size = schedule.step_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outer_step, "step_size", lambda net: sizes.append(step_size(net)) or sizes[-1]
        )
        go(model, part(0), part(1))
    assert len(sizes) >= 8
    assert {*sizes} == {0.5}


def test_a_model_saved_without_its_optimiser_cannot_go_on(tmp_path):
    go(MAMLRegressor(**STEPS), part(0)).save(tmp_path / "lean", training=False)
    with pytest.raises(ValueError, match="partial_fit continues a fit, but this model was saved"):
        go(MAMLRegressor.load(tmp_path / "lean"), part(1))
    full = go(MAMLRegressor(**STEPS), part(0))
    full.save(tmp_path / "full")
    loaded = go(MAMLRegressor.load(tmp_path / "full"), part(1))
    torch.testing.assert_close(weights(loaded), weights(go(full, part(1))))


def test_groups_are_requested_and_a_column_needs_no_routing():
    with sklearn.config_context(enable_metadata_routing=True):
        request = MAMLRegressor().get_metadata_routing().partial_fit
    assert request.requests["groups"] is True
    rows = np.c_[X, G]
    model = MAMLRegressor(**STEPS, task_column=1)
    model.partial_fit(rows[part(0)], Y[part(0)])
    assert model.n_tasks_ == 8
    one, other = weights(model), weights(go(MAMLRegressor(**STEPS), part(0)))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_weights_of_rows_are_taken():
    of = np.where(np.arange(len(X)) % 3, 1.0, 3.0)
    model = MAMLRegressor(**STEPS)
    model.partial_fit(X[part(0)], Y[part(0)], groups=G[part(0)], sample_weight=of[part(0)])
    assert not torch.equal(weights(model), weights(go(MAMLRegressor(**STEPS), part(0))))
