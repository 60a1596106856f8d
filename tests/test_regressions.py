"""Behaviour that was once wrong and that no other test file is about."""

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GroupKFold, HalvingGridSearchCV, learning_curve

from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    task_scorer,
)
from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
from sklearn_maml.exceptions import SmallTaskWarning
from sklearn_maml.training.stream import TaskStream

X, Y, G = make_sinusoid_tasks(n_tasks=30, n_rows=20, random_state=0)
SMALL = {"max_iter": 20, "update_rule": "sgd", "steps": 1, "random_state": 0}


@pytest.fixture(scope="module")
def reg():
    return MAMLRegressor(**SMALL).fit(X, Y, groups=G)


def test_rows_given_as_plain_lists_are_scored_as_rows_of_the_adapted_task(reg):
    reg.adapt(X[:10], Y[:10])
    as_lists = reg.score(X[10:20].tolist(), Y[10:20].tolist())
    assert as_lists == pytest.approx(reg.score(X[10:20], Y[10:20]))


def test_halving_over_rows_takes_tasks_that_it_cut_too_short():
    frame = pd.DataFrame({"x": X[:, 0], "task": G})
    search = HalvingGridSearchCV(
        MAMLRegressor(task_column="task", **SMALL),
        {"alpha": np.logspace(-3, -1, 9)},
        cv=GroupKFold(3),
        random_state=0,
    )
    with pytest.warns(SmallTaskWarning, match=r"resource='max_iter'"):
        search.fit(frame, Y, groups=frame["task"])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_learning_curve_over_rows_takes_tasks_that_it_cut_too_short():
    with (
        sklearn.config_context(enable_metadata_routing=True),
        pytest.warns(SmallTaskWarning, match="too few rows"),
    ):
        _, train, test = learning_curve(
            MAMLRegressor(**SMALL),
            X,
            Y,
            train_sizes=[101, 201, 301],
            cv=GroupKFold(3),
            params={"groups": G},
        )
    assert np.isfinite(train).all()
    assert np.isfinite(test).all()


def test_large_targets_are_told_apart_though_the_features_are_of_single_precision():
    single = X.astype(np.float32)
    near = MAMLRegressor(**SMALL).fit(single, Y, groups=G)
    far = MAMLRegressor(**SMALL).fit(single, Y + 1e7, groups=G)
    np.testing.assert_allclose(far.y_scale_, near.y_scale_, rtol=1e-6)
    assert far.score(single, Y + 1e7, groups=G) == pytest.approx(
        near.score(single, Y, groups=G), abs=0.1
    )


def test_a_prior_of_the_other_kind_is_refused_and_leaves_the_learner_unfitted(reg):
    learner = FewShotClassifier(reg)
    with pytest.raises(TypeError, match="must hold a MAMLClassifier; got a MAMLRegressor"):
        learner.fit(X[:10], Y[:10] > 0)
    assert not hasattr(learner, "model_")
    clf = MAMLClassifier(**SMALL).fit(X, Y > 0, groups=G)
    with pytest.raises(TypeError, match="must hold a MAMLRegressor; got a MAMLClassifier"):
        FewShotRegressor(clf).fit(X[:10], Y[:10])


def test_given_episodes_whose_query_classes_were_never_seen_are_refused():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(8, 2)), np.repeat(["a", "b"], 4)
    clf = MAMLClassifier(n_ways=3, **SMALL).fit([(rows, labels, rows, labels)] * 10)
    episodes = [(rows, labels, rows, np.repeat("z", 8))]
    for score in (clf.score, lambda tasks: task_scorer("accuracy")(clf, tasks)):
        with pytest.raises(ValueError, match=r"classes \['z'\], which its support set lacks"):
            score(episodes)


def test_ragged_lists_of_rows_and_of_targets_are_told_how_to_be_zipped():
    with pytest.raises(ValueError, match=r"list\(zip\(X, y\)\)"):
        MAMLRegressor(**SMALL).fit([X[:10], X[20:35]], [Y[:10], Y[20:35]])


def test_classes_with_very_many_rows_do_not_make_very_large_support_sets():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 3))
    clf = MAMLClassifier(max_iter=1, early_stopping=False, random_state=0)
    clf.n_features_in_ = 3
    y, task = rows[:, 0] > 0, np.repeat([0, 1], 2000)
    source = clf._collect(rows, y, task, clf._make_targets(), 0, False)
    batch = source.draw(np.array([[0, 1]]), rng)[0]
    assert batch.support.X.shape[1] <= 2 * 20


def test_an_endless_source_builds_one_generator_a_block(monkeypatch):
    stream = TaskStream(lambda which, rng: which, 1, 25, 0)
    made = []
    original = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or original(seed))
    for update in range(64, 128):
        assert stream.batch(update).tolist() == [0] * 25
    assert len(made) == 1


def test_a_distribution_is_sampled_afresh_for_every_update():
    class Spy(SinusoidTasks):
        seeds: list

        def sample(self, n_tasks, random_state=None):
            self.seeds.append(random_state)
            self.drawn.append(n_tasks)
            return super().sample(n_tasks, random_state)

    source = Spy(n_rows=20)
    source.seeds, source.drawn = [], []
    MAMLRegressor(**SMALL).fit(source)
    assert len(set(source.seeds)) == len(source.seeds)
    n_updates = sum(source.drawn[1:]) / 25  # the first draw is for the held-out tasks
    assert 20 <= n_updates <= 2 * 20


@pytest.mark.parametrize("n_returned", [0, 3])
def test_a_distribution_has_to_return_as_many_tasks_as_were_asked_for(n_returned):
    class Short(SinusoidTasks):
        def sample(self, n_tasks, random_state=None):
            drawn = super().sample(n_tasks, random_state)
            return drawn if n_tasks == 100 else drawn[:n_returned]

    with pytest.raises(ValueError, match=f"returned {n_returned} tasks, but 25 were asked for"):
        MAMLRegressor(**SMALL).fit(Short(n_rows=20))
