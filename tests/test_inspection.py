"""What the displays draw is what adapting and predicting gives, and the model is left alone."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import (
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    class_permutation_audit,
    task_scorer,
    task_scores,
)
from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.estimators.training import gains_nothing
from sklearn_maml.exceptions import MemorizationWarning, SingleTaskWarning
from sklearn_maml.inspection import (
    AdaptationCurveDisplay,
    FewShotFitDisplay,
    MetaTrainingDisplay,
    TaskScoresDisplay,
)
from sklearn_maml.training.validation import compare_supports

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_WAYS = 3


@pytest.fixture(scope="module")
def sinusoids():
    """Rows of new tasks."""
    X, y, task = make_sinusoid_tasks(n_tasks=12, n_rows=16, random_state=1)
    return X.astype(float), y.astype(float), task + 1000


@pytest.fixture(scope="module")
def reg():
    X, y, task = make_sinusoid_tasks(n_tasks=40, n_rows=16, random_state=0)
    model = MAMLRegressor(
        update_rule="sgd",
        alpha=0.02,
        steps=2,
        max_iter=100,
        hidden_layer_sizes=(16,),
        random_state=0,
    )
    return model.fit(X.astype(float), y.astype(float), groups=task)


def blobs(n_classes, n_rows, seed):
    """Rows of a pool of classes."""
    rng = np.random.default_rng(seed)
    y = np.repeat([f"class {k:02d}" for k in range(n_classes)], n_rows)
    X = rng.normal(size=(n_classes, 4)).repeat(n_rows, axis=0) + 0.4 * rng.normal(size=(len(y), 4))
    return X, y


@pytest.fixture(scope="module")
def clf():
    X, y = blobs(30, 12, seed=0)
    model = MAMLClassifier(
        n_ways=N_WAYS,
        n_shots=2,
        n_queries=5,
        update_rule="sgd",
        steps=3,
        max_iter=50,
        random_state=0,
    )
    return model.fit(X, y)


@pytest.fixture(scope="module")
def shared():
    """Classifier of labels that the tasks share."""
    rng = np.random.default_rng(0)
    X, task = rng.normal(size=(600, 2)), np.repeat(np.arange(20), 30)
    y = (X[:, 0] + rng.normal(size=20)[task] > 0).astype(int)
    return MAMLClassifier(max_iter=50, random_state=0).fit(X, y, groups=task), (X, y, task)


def after(estimator, steps, *data, **options):
    """Scores of `task_scores` after a number of inner steps."""
    changed = copy.copy(estimator).set_params(adapt_steps=steps)
    return task_scores(changed, *data, **options).after


# -- adaptation curve ----------------------------------------------------------------------------


def test_the_curve_is_the_mean_of_the_task_scores_after_each_number_of_steps(reg, sinusoids):
    display = AdaptationCurveDisplay.from_estimator(reg, *sinusoids, n_shots=5, n_repeats=2)
    assert_array_equal(display.steps, [0, 1, 2, 3, 4, 5])
    errors = np.array([-after(reg, n, *sinusoids, n_shots=5, n_repeats=2) for n in display.steps])
    assert_allclose(display.scores, errors)
    assert_allclose(display.line_.get_ydata(), errors.mean(1))
    assert_array_equal(display.line_.get_xdata(), display.steps)
    assert len(np.unique(errors.mean(1))) == 6
    assert display.ax_.get_ylabel() == "Root mean squared error"
    assert "12 tasks, 95 % interval" in display.line_.get_label()


def test_the_band_is_the_interval_of_the_mean_over_tasks(reg, sinusoids):
    display = AdaptationCurveDisplay.from_estimator(reg, *sinusoids, steps=[0, 3])
    low, high = stats.t.interval(
        0.95, 11, display.scores.mean(1), stats.sem(display.scores, axis=1)
    )
    drawn = display.band_.get_paths()[0].vertices
    for x, bottom, top in zip([0, 3], low, high, strict=True):
        at = drawn[drawn[:, 0] == x, 1]
        assert_allclose([at.min(), at.max()], [bottom, top])


def test_the_line_marks_the_steps_of_meta_training_whatever_they_are_now(reg, sinusoids):
    changed = copy.copy(reg).set_params(steps=9)
    display = AdaptationCurveDisplay.from_estimator(changed, *sinusoids, steps=[0, 2])
    assert_array_equal(display.trained_line_.get_xdata(), [2, 2])


@pytest.mark.parametrize("trained", [1, 4, 7, 10, 33, 500])
def test_the_default_steps_are_few_and_include_the_trained_number(reg, sinusoids, trained):
    changed = copy.copy(reg)
    changed.net_ = copy.copy(reg.net_).set_params(steps=trained)
    few = [part[:32] for part in sinusoids]
    steps = AdaptationCurveDisplay.from_estimator(changed, *few).steps
    assert steps[0] == 0
    assert trained in steps
    assert len(steps) <= 12
    assert steps[-1] >= 1.7 * trained


def test_pipelines_and_searches_are_drawn_like_the_model_in_them(reg, sinusoids):
    X, y, task = sinusoids
    options = {"steps": [0, 2], "n_shots": 4}
    expected = AdaptationCurveDisplay.from_estimator(reg, X, y, task, **options).scores
    scaler = StandardScaler().fit(X)
    pipe = make_pipeline(StandardScaler(), reg)
    pipe.steps[0] = ("standardscaler", scaler)
    piped = AdaptationCurveDisplay.from_estimator(
        pipe, scaler.inverse_transform(X), y, task, **options
    )
    assert_allclose(piped.scores, expected)
    search = GridSearchCV(MAMLRegressor(), {})
    search.best_estimator_ = reg
    searched = AdaptationCurveDisplay.from_estimator(search, X, y, task, **options)
    assert_array_equal(searched.scores, expected)


def test_a_pool_of_classes_is_drawn_by_episode(clf):
    X, y = blobs(9, 10, seed=1)
    display = AdaptationCurveDisplay.from_estimator(clf, X, y, steps=(0, 3), random_state=4)
    assert display.scores.shape == (2, 100)
    scorer = task_scorer("accuracy", random_state=4)
    assert display.line_.get_ydata()[1] == pytest.approx(scorer(clf, X, y))
    assert "100 episodes" in display.line_.get_label()
    assert display.ax_.get_ylabel() == "Accuracy"


def test_one_split_of_one_task_has_no_interval(reg, sinusoids):
    X, y, _ = sinusoids
    display = AdaptationCurveDisplay.from_estimator(reg, X[:16], y[:16], steps=[0, 1])
    assert display.band_ is None
    assert display.unit == "splits"


@pytest.mark.parametrize(
    ("scoring", "sign", "name"),
    [
        ("neg_mean_squared_error", -1, "Mean squared error"),
        ("r2", 1, "R²"),
        (lambda model, X, y: float(np.abs(model.predict(X) - y).max()), 1, "Score (<lambda>)"),
    ],
)
def test_any_scorer_can_be_drawn(reg, sinusoids, scoring, sign, name):
    display = AdaptationCurveDisplay.from_estimator(reg, *sinusoids, steps=[1], scoring=scoring)
    assert_allclose(display.scores[0], sign * after(reg, 1, *sinusoids, scoring=scoring))
    assert display.ax_.get_ylabel() == name


def test_two_curves_share_axes(reg, sinusoids):
    _, ax = plt.subplots()
    first = AdaptationCurveDisplay.from_estimator(reg, *sinusoids, steps=[0, 1], ax=ax, name="a")
    second = first.plot(ax=ax, name="b", line_kw={"lw": 3}, band_kw={"alpha": 0.5})
    assert second.ax_ is ax
    assert second.figure_ is ax.figure
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [label[:2] for label in labels] == ["a:", "st", "b:"]
    colors = {line.get_color() for line in ax.lines}
    assert len(colors) == 3
    assert second.line_.get_linewidth() == 3


def test_large_ranges_of_errors_are_drawn_on_a_log_scale():
    scores = np.array([[100.0, 101.0], [1.0, 1.01]])
    options = {"steps": np.array([0, 1]), "trained_steps": 1, "score_name": "E"}
    assert (
        AdaptationCurveDisplay(scores=scores, **options).plot().ax_.get_yscale(),
        AdaptationCurveDisplay(scores=scores + 100, **options).plot().ax_.get_yscale(),
        AdaptationCurveDisplay(scores=scores - 1, **options).plot().ax_.get_yscale(),
    ) == ("log", "linear", "linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [-1]}, "steps must be numbers of inner steps, 0 or more; got -1"),
        ({"steps": [1.5]}, "got 1.5"),
        ({"steps": []}, "steps is empty"),
        ({"n_shots": -1}, "n_shots must be a non-negative integer; got -1"),
        ({"n_repeats": 0}, "n_repeats must be a positive integer; got 0"),
    ],
)
def test_bad_options_of_a_curve_are_refused(reg, sinusoids, options, message):
    with pytest.raises(ValueError, match=message):
        AdaptationCurveDisplay.from_estimator(reg, *sinusoids, **options)


# -- task scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["after", "gain"])
def test_every_task_is_drawn_where_task_scores_puts_it(reg, sinusoids, sort):
    display = TaskScoresDisplay.from_estimator(
        reg, *sinusoids, n_shots=2, sort=sort, random_state=3
    )
    table = task_scores(reg, *sinusoids, n_shots=2, random_state=3)
    before, after = -table.before, -table.after
    harmed = after > before
    order = np.argsort(after if sort == "after" else after - before)
    assert_array_equal(display.order_, order)
    assert_allclose(display.before_.get_offsets()[:, 1], before[order])
    assert 0 < harmed.sum() < len(harmed)
    assert_allclose(display.after_.get_offsets()[:, 1], after[order][~harmed[order]])
    assert_allclose(display.harmed_.get_offsets()[:, 1], after[order][harmed[order]])
    assert_array_equal(display.harmed_.get_offsets()[:, 0], 1 + np.flatnonzero(harmed[order]))
    assert f"{harmed.sum()} of 12 tasks" in display.harmed_.get_label()
    assert [t.get_text() for t in display.ax_.get_xticklabels()] == [
        str(task) for task in table.task[order]
    ]


def test_higher_scores_are_better_where_they_are_scores(shared):
    model, data = shared
    display = TaskScoresDisplay.from_estimator(model, *data)
    table = task_scores(model, *data)
    assert_array_equal(display.after, table.after)
    assert_array_equal(display.harmed, table.after < table.before)
    assert_array_equal(display.order_, np.argsort(-table.after, kind="stable"))


def test_ties_are_not_harm_and_legends_say_when_there_is_none():
    display = TaskScoresDisplay(
        task=np.arange(3),
        before=np.array([1.0, 2.0, 3.0]),
        after=np.array([1.0, 1.0, 1.0]),
        score_name="E",
        greater_is_better=False,
    ).plot()
    assert display.harmed_ is None
    assert "harms none of 3 tasks" in display.after_.get_label()


def test_all_tasks_may_be_harmed():
    values = np.array([1.0, 2.0])
    display = TaskScoresDisplay(
        task=np.arange(2), before=values, after=values - 1, score_name="S", greater_is_better=True
    ).plot()
    assert display.after_ is None
    assert "2 of 2 tasks" in display.harmed_.get_label()


def test_an_unknown_order_is_refused(reg, sinusoids):
    with pytest.raises(ValueError, match="sort='loss' is not known; expected 'after'"):
        TaskScoresDisplay.from_estimator(reg, *sinusoids, sort="loss")


# -- meta-training -------------------------------------------------------------------------------


def test_the_losses_of_the_history_are_drawn(reg):
    display = MetaTrainingDisplay.from_estimator(reg)
    for line, name in (
        (display.train_line_, "train_loss"),
        (display.valid_line_, "valid_loss"),
        (display.before_line_, "valid_loss_before"),
    ):
        assert_array_equal(line.get_xdata(), [50, 100])
        assert_array_equal(line.get_ydata(), reg.history_[:, name])
    best = 50 * (1 + int(np.argmin(reg.history_[:, "valid_loss"])))
    assert_array_equal(display.kept_line_.get_xdata(), [best, best])
    assert display.skipped_ is None
    assert display.ax_.get_ylabel() == "Query loss (mean squared error, standardised targets)"


def test_epochs_with_skipped_updates_are_marked(reg):
    changed = copy.copy(reg)
    changed.history_ = copy.deepcopy(reg.history_)
    changed.history_[1]["non_finite"] = 3
    display = MetaTrainingDisplay.from_estimator(changed)
    assert_array_equal(display.skipped_.get_offsets()[:, 0], [100])
    assert display.skipped_.get_label().endswith(": 3")


def test_a_fit_without_held_out_tasks_has_one_line(sinusoids):
    X, y, task = sinusoids
    model = MAMLRegressor(update_rule="sgd", max_iter=60, early_stopping=False, random_state=0)
    display = MetaTrainingDisplay.from_estimator(model.fit(X, y, groups=task))
    assert_array_equal(display.n_updates, [50, 60])
    assert (display.valid_line_, display.before_line_, display.kept_line_) == (None, None, None)


@pytest.mark.parametrize(
    ("model", "units"),
    [
        (MAMLRegressor(), ", standardised targets"),
        (MAMLRegressor(normalize_y=False), ""),
        (MAMLRegressor(loss="poisson"), ", targets over their mean"),
        (MAMLClassifier(), ""),
    ],
)
def test_the_losses_of_a_display_say_in_which_units_they_are(model, units):
    rng = np.random.default_rng(0)
    X, y, task = rng.normal(size=(96, 2)), rng.integers(0, 2, 96), np.repeat(np.arange(12), 8)
    model.set_params(max_iter=50, hidden_layer_sizes=(4,), random_state=0).fit(X, y, groups=task)
    label = MetaTrainingDisplay.from_estimator(model).ax_.get_ylabel()
    assert ("target" in label) == bool(units)
    assert units in label


def test_a_continued_fit_kept_the_best_of_its_own_epochs(sinusoids):
    X, y, task = sinusoids
    model = MAMLRegressor(update_rule="sgd", max_iter=50, warm_start=True, random_state=0)
    model.fit(X, y, groups=task)
    model.set_params(max_iter=100).fit(X, y, groups=task)
    model.history_[0]["valid_loss"] = 0.0
    display = MetaTrainingDisplay.from_estimator(model)
    assert_array_equal(display.n_updates, [50, 100, 150])
    assert display.kept == 1 + np.argmin(model.history_[1:, "valid_loss"])


def test_losses_that_fall_far_are_drawn_on_a_log_scale():
    scales = [
        MetaTrainingDisplay(n_updates=np.array([50, 100]), train_loss=losses)
        .plot()
        .ax_.get_yscale()
        for losses in (np.array([1.0, 0.01]), np.array([1.0, 0.5]), np.array([np.nan, 0.5]))
    ]
    assert scales == ["log", "linear", "linear"]


# -- fits of one feature -------------------------------------------------------------------------


def test_the_curves_are_the_predictions_of_the_adapted_model(reg, sinusoids):
    X, y, task = sinusoids
    first = task <= 1001
    grid = np.linspace(-4, 4, 9)
    display = FewShotFitDisplay.from_estimator(
        reg, X[first], y[first], groups=task[first], grid=grid, steps=(5, 0, 1)
    )
    assert_array_equal(display.steps, [0, 1, 5])
    assert display.lines_.shape == (2, 3)
    for j, name in enumerate([1000, 1001]):
        rows = task == name
        for k, n in enumerate([0, 1, 5]):
            adapted = adapt(copy.copy(reg).set_params(adapt_steps=n), X[rows], y[rows])
            line = display.lines_[j, k]
            assert line.axes is display.axes_[j]
            assert_array_equal(line.get_xdata(), grid)
            assert_allclose(line.get_ydata(), adapted.predict(grid[:, None]), rtol=1e-9)
        assert_array_equal(display.points_[j].get_offsets(), np.column_stack([X[rows], y[rows]]))
        assert display.axes_[j].get_title() == f"task {name}"


def test_a_pipeline_is_drawn_against_its_own_feature(reg, sinusoids):
    X, y, task = sinusoids
    frame = pd.DataFrame({"time": 10 * X[:, 0] + 3})
    scaler = StandardScaler().fit(frame)
    pipe = make_pipeline(StandardScaler(), reg)
    pipe.steps[0] = ("standardscaler", scaler)
    rows = task == 1003
    display = FewShotFitDisplay.from_estimator(pipe, frame[rows], pd.Series(y[rows], name="load"))
    assert_array_equal(display.steps, [0, 1, 2])
    grid = pd.DataFrame({"time": display.grid})
    expected = adapt(pipe, frame[rows], y[rows]).predict(grid)
    assert_allclose(display.lines_[0, 2].get_ydata(), expected, rtol=1e-9)
    assert_array_equal(display.points_[0].get_offsets()[:, 0], frame["time"][rows])
    assert display.grid.min() < frame["time"][rows].min()
    assert display.grid.max() > frame["time"][rows].max()
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("time", "load")


def test_lists_of_tasks_are_drawn_side_by_side_on_given_axes(reg, sinusoids):
    X, y, task = sinusoids
    tasks = [(X[task == name][:n], y[task == name][:n]) for name, n in ((1000, 5), (1001, 8))]
    _, axes = plt.subplots(2)
    display = FewShotFitDisplay.from_estimator(reg, tasks, ax=axes)
    assert list(display.axes_) == list(axes)
    assert [len(points.get_offsets()) for points in display.points_] == [5, 8]
    assert_array_equal(display.points_[1].get_offsets()[:, 0], tasks[1][0][:, 0])
    with pytest.raises(ValueError, match=r"got 2 axes for 1 task\(s\)"):
        FewShotFitDisplay.from_estimator(reg, X[:5], y[:5], ax=axes)


@pytest.mark.parametrize("n_tasks", [3, 5, 12])
def test_many_tasks_share_one_legend(reg, sinusoids, n_tasks):
    chosen = sinusoids[2] < 1000 + n_tasks
    X, y, task = (part[chosen] for part in sinusoids)
    display = FewShotFitDisplay.from_estimator(reg, X, y, groups=task)
    assert len(display.figure_.axes) == n_tasks
    assert len(display.figure_.legends) == 1
    assert display.ax_.get_legend() is None


def test_models_that_cannot_be_drawn_are_refused(reg, clf, sinusoids):
    X, y, task = sinusoids
    draw = FewShotFitDisplay.from_estimator
    two = MAMLRegressor(max_iter=1, random_state=0).fit(np.c_[X, X], y, groups=task)
    with pytest.raises(ValueError, match="a model of one feature, but this one has 2 features"):
        draw(two, np.c_[X, X][:5], y[:5])
    column = MAMLRegressor(task_column=1, max_iter=1, random_state=0).fit(np.c_[X, task], y)
    with pytest.raises(ValueError, match="one feature, but this one has 2 features"):
        draw(column, np.c_[X, task][:5], y[:5])
    outputs = MAMLRegressor(max_iter=1, random_state=0).fit(X, np.c_[y, y], groups=task)
    with pytest.raises(ValueError, match="draws one target, but the model predicts 2"):
        draw(outputs, X[:5], np.c_[y, y][:5])
    labels = MAMLClassifier(max_iter=1, random_state=0).fit(X, y > 0, groups=task)
    with pytest.raises(TypeError, match="draws regressions; got a MAMLClassifier"):
        draw(labels, X[:5], y[:5] > 0)
    with pytest.raises(
        ValueError, match=r"one column, the feature; got an array of shape \(5, 2\)"
    ):
        draw(reg, np.c_[X, X][:5], y[:5])
    with pytest.raises(ValueError, match="support sets only"):
        draw(reg, [(X[:3], y[:3], X[3:5], y[3:5])])
    with pytest.raises(ValueError, match="at most 12 tasks side by side; got 13"):
        draw(reg, [(X[:3], y[:3])] * 13)
    with pytest.raises(ValueError, match="grid must be a sequence of finite numbers"):
        draw(reg, X[:5], y[:5], grid=[[1.0], [2.0]])


# -- all displays --------------------------------------------------------------------------------


def test_the_estimator_is_left_as_it_was(reg, clf, sinusoids):
    X, y, _ = sinusoids
    adapted = copy.deepcopy(reg).adapt(X[:7], y[:7])
    before, prediction = pickle.dumps(adapted), adapted.predict(X)
    AdaptationCurveDisplay.from_estimator(adapted, *sinusoids)
    TaskScoresDisplay.from_estimator(adapted, *sinusoids)
    MetaTrainingDisplay.from_estimator(adapted)
    FewShotFitDisplay.from_estimator(adapted, X[:5], y[:5], steps=(0, 40))
    assert pickle.dumps(adapted) == before
    assert_array_equal(adapted.predict(X), prediction)
    pool = blobs(9, 10, seed=1)
    local = copy.deepcopy(clf)
    before = pickle.dumps(local)
    class_permutation_audit(local, *pool, n_episodes=3)
    assert pickle.dumps(local) == before


@pytest.mark.parametrize(
    "draw",
    [
        lambda model, data: AdaptationCurveDisplay.from_estimator(model, *data),
        lambda model, data: TaskScoresDisplay.from_estimator(model, *data),
        lambda model, data: MetaTrainingDisplay.from_estimator(model),
        lambda model, data: FewShotFitDisplay.from_estimator(model, *data[:2]),
    ],
    ids=["curve", "tasks", "training", "fit"],
)
class TestEveryDisplay:
    def test_draws_on_the_axes_it_is_given(self, reg, sinusoids, draw):
        data = tuple(part[:16] for part in sinusoids)
        display = draw(reg, data)
        _, ax = plt.subplots()
        figures = plt.get_fignums()
        assert display.plot(ax=ax) is display
        assert display.ax_ is ax
        assert ax.get_legend() is not None
        assert plt.get_fignums() == figures

    def test_refuses_a_model_that_is_not_fitted(self, sinusoids, draw):
        with pytest.raises(NotFittedError):
            draw(MAMLRegressor(), sinusoids)

    def test_refuses_what_holds_no_meta_learned_model(self, sinusoids, draw):
        with pytest.raises(TypeError, match="no meta-learned model in StandardScaler"):
            draw(StandardScaler(), sinusoids)

    def test_says_that_matplotlib_is_needed(self, reg, sinusoids, draw, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="from_estimator requires matplotlib"):
            draw(reg, sinusoids)


# -- class permutations --------------------------------------------------------------------------


def fixed_episodes(n_episodes, n_classes=N_WAYS, seed=2):
    """Tasks of four parts, of one support and four query rows of each class."""
    tasks = []
    for k in range(n_episodes):
        X, y = blobs(n_classes, 5, seed=seed + k)
        support = np.arange(len(y)) % 5 == 0
        tasks.append((X[support], y[support], X[~support], y[~support]))
    return tasks


def test_permuting_outputs_is_renaming_classes(clf):
    tasks = fixed_episodes(4)
    audit = class_permutation_audit(clf, tasks, n_permutations=6)
    assert_array_equal(audit.permutations, list(itertools.permutations(range(N_WAYS))))
    assert audit.accuracy.shape == (4, 6)
    model = copy.copy(clf)
    for e, (X_s, y_s, X_q, y_q) in enumerate(tasks):
        classes = np.unique(y_s)
        support, query = np.searchsorted(classes, y_s), np.searchsorted(classes, y_q)
        total = 0
        for k, permutation in enumerate(audit.permutations):
            p = model.adapt(X_s, permutation[support]).predict_proba(X_q)
            assert audit.accuracy[e, k] == np.mean(p.argmax(1) == permutation[query])
            total = total + p[:, permutation]
        assert np.mean(total.argmax(1) == query) == pytest.approx(
            class_permutation_audit(clf, tasks[e : e + 1]).ensemble
        )
    assert audit.mean == pytest.approx(audit.accuracy.mean())
    assert audit.worst == pytest.approx(audit.accuracy.min(1).mean())
    assert audit.best == pytest.approx(audit.accuracy.max(1).mean())
    assert audit.std == pytest.approx(audit.accuracy.std(1).mean())


def test_only_equal_outputs_make_the_order_of_classes_irrelevant(clf):
    pool = blobs(12, 12, seed=5)
    ordinary = class_permutation_audit(clf, *pool, n_episodes=30)
    assert ordinary.std > 0.01
    assert ordinary.worst < ordinary.mean < ordinary.best
    equal = copy.deepcopy(clf)
    head = [m for m in equal.module_.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight[:] = head.weight[0].clone()
        head.bias[:] = head.bias[0].clone()
    control = class_permutation_audit(equal, *pool, n_episodes=30)
    assert_array_equal(control.accuracy, np.repeat(control.accuracy[:, :1], 6, axis=1))
    assert control.std == pytest.approx(0, abs=1e-12)
    # it still learns from the support sets
    assert control.mean > 1.5 / N_WAYS


def test_more_ways_draw_different_permutations_and_the_sorted_one_first():
    X, y = blobs(20, 8, seed=0)
    model = MAMLClassifier(n_ways=5, n_shots=1, n_queries=2, max_iter=2, random_state=0).fit(X, y)
    audit = class_permutation_audit(model, X, y, n_episodes=7, n_permutations=50, random_state=1)
    assert audit.accuracy.shape == (7, 50)
    assert len({*map(tuple, audit.permutations.tolist())}) == 50
    assert_array_equal(audit.permutations[0], range(5))
    again = class_permutation_audit(model, X, y, n_episodes=7, n_permutations=50, random_state=1)
    assert_array_equal(again.accuracy, audit.accuracy)
    other = class_permutation_audit(model, X, y, n_episodes=7, n_permutations=50, random_state=2)
    assert (other.accuracy != audit.accuracy).any()


def test_episodes_are_taken_evenly_from_the_tasks(clf):
    X, y = blobs(8 * 4, 6, seed=6)
    alphabet = np.repeat(np.arange(8), 24)
    assert class_permutation_audit(clf, X, y, alphabet, n_episodes=5).accuracy.shape == (5, 6)
    assert class_permutation_audit(clf, X, y, alphabet, n_episodes=230).accuracy.shape == (230, 6)


def test_given_episodes_are_audited_once_each_and_may_lack_classes(clf):
    tasks = fixed_episodes(3, n_classes=2)
    audit = class_permutation_audit(clf, tasks, n_episodes=50)
    assert audit.accuracy.shape == (3, 6)
    # two classes have two orders
    assert_array_equal(audit.accuracy[:, 0], audit.accuracy[:, 1])
    assert_array_equal(audit.accuracy[:, 0], audit.accuracy[:, 2])
    assert_array_equal(audit.accuracy[:, 3], audit.accuracy[:, 4])


def test_an_audit_needs_local_labels_and_positive_counts(clf, reg, shared, sinusoids):
    model, data = shared
    with pytest.raises(ValueError, match="this MAMLClassifier has n_ways=None"):
        class_permutation_audit(model, *data)
    with pytest.raises(ValueError, match="this MAMLRegressor has n_ways=None"):
        class_permutation_audit(reg, *sinusoids)
    pool = blobs(9, 10, seed=1)
    with pytest.raises(ValueError, match=r"no labelled rows.*no classes"):
        class_permutation_audit(clf, *pool, n_shots=0)
    for name in ("n_episodes", "n_permutations"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer; got 0"):
            class_permutation_audit(clf, *pool, **{name: 0})
    with pytest.raises(NotFittedError):
        class_permutation_audit(MAMLClassifier(n_ways=3), *pool)


# -- memorisation --------------------------------------------------------------------------------

LONG = {
    "hidden_layer_sizes": (16,),
    "update_rule": "sgd",
    "alpha": 0.01,
    "steps": 1,
    "max_iter": 300,
    "random_state": 0,
}


def one_function(n_tasks=200, n_rows=20):
    """Tasks that all are the same noisy function."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (n_tasks * n_rows, 1))
    y = np.sin(2 * X[:, 0]) + 0.5 * rng.normal(size=len(X))
    return X, y, np.repeat(np.arange(n_tasks), n_rows)


def test_tasks_that_are_one_function_are_reported():
    X, y, task = one_function()
    with pytest.warns(
        MemorizationWarning, match="The 30 held-out tasks gain next to nothing"
    ) as caught:
        model = MAMLRegressor(**LONG).fit(X, y, groups=task)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert f"{min(model.history_[:, 'valid_loss']):.4g} after adapting to them" in message
    assert "Yin et al. 2020" in message
    assert "n_ways" not in message
    with pytest.warns(MemorizationWarning, match="set n_ways if labels mean something inside"):
        MAMLClassifier(**LONG).fit(X, y > 0, groups=task)


def test_tasks_that_differ_are_not_reported():
    X, y, task = make_sinusoid_tasks(n_tasks=200, n_rows=20, random_state=0)
    MAMLRegressor(**LONG).fit(X, y, groups=task)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_iter": 299},
        {"alpha": 0.0},
        {"steps": 0},
        {"adapt_steps": 0},
        {"early_stopping": False},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_fits_that_prove_nothing_are_not_reported(changed):
    X, y, task = one_function()
    MAMLRegressor(**{**LONG, **changed}).fit(X, y, groups=task)


def test_a_single_task_and_a_pool_are_not_reported():
    X, y, task = one_function()
    with pytest.warns(SingleTaskWarning) as caught:
        MAMLRegressor(**LONG).fit(X, y)
    assert len(caught) == 1
    # two classes that no feature tells apart, at outputs that change from episode to episode
    noise = np.arange(len(X)) % 2
    MAMLClassifier(**LONG, n_ways=2, n_shots=3).fit(X, noise, groups=task)


def test_cross_validation_reports_the_fits_of_all_folds():
    X, y, task = one_function()
    with (
        sklearn.config_context(enable_metadata_routing=True),
        pytest.warns(MemorizationWarning) as caught,
    ):
        cross_validate(MAMLRegressor(**LONG), X, y, params={"groups": task}, cv=GroupKFold(2))
    assert len(caught) == 2


def test_noise_is_not_taken_for_the_absence_of_a_gain():
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, size=20)
    equal = losses * np.exp(0.05 * rng.normal(size=20))
    assert gains_nothing(losses, equal)
    assert gains_nothing(losses, losses)
    assert gains_nothing(losses, 2 * losses)
    assert gains_nothing(losses, 0.99 * losses)
    # a small gain that is sure, one that is likely, one that noisy tasks do not rule out, no loss
    assert not gains_nothing(losses, 0.97 * losses)
    likely = 0.05 * (rng.normal(size=20) + 1)
    assert not gains_nothing(losses, losses * (1 - likely))
    assert not gains_nothing(losses, losses[::-1])
    assert not gains_nothing(losses, np.where(losses > 1, np.nan, losses))


def test_the_support_sets_compared_are_none_the_own_and_that_of_another_task(reg, sinusoids):
    X, y = (part.reshape(12, 16, -1) for part in sinusoids[:2])
    standard = (y - reg.y_mean_) / reg.y_scale_
    sets = [Rows(torch.tensor(X[:, s]), torch.tensor(standard[:, s])) for s in ([0, 1, 2], [5, 6])]
    batch, first = EpisodeBatch(*sets), np.arange(3)
    losses = compare_supports(
        reg._make_engine(reg.module_),
        reg._learner.meta_params(),
        [EpisodeBatch(batch.support.take(first), batch.query.take(first))],
        alpha=reg.alpha,
        steps=reg.steps,
    )
    expected = np.empty((3, 3))
    for j in range(3):
        other = (j - 1) % 3
        for k, (model, at) in enumerate(
            [(copy.copy(reg).set_params(adapt_steps=0), j), (reg, j), (reg, other)]
        ):
            fitted = adapt(model, X[at, :3], y[at, :3, 0])
            error = (fitted.predict(X[j, 5:7]) - y[j, 5:7, 0]) / reg.y_scale_
            expected[k, j] = np.mean(error**2)
    assert_allclose(losses, expected, rtol=1e-9)
