"""Where tools and people hand over tasks: routing, scores without tasks, odd arguments."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn
from numpy.testing import assert_array_equal
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_maml import MAMLRegressor, task_scorer, task_scores

N_TASKS, N_ROWS = 6, 8
TASK = np.repeat(np.arange(N_TASKS), N_ROWS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(len(TASK), 2))
Y = (X * RNG.normal(size=(N_TASKS, 2))[TASK]).sum(1)
FRAME = pd.DataFrame(X, columns=["x", "z"]).assign(task=TASK)
SCHOOL = TASK // 2  # tasks of one school stay together
SMALL = {
    "update_rule": "sgd",
    "alpha": 0.1,
    "steps": 1,
    "hidden_layer_sizes": (4,),
    "max_iter": 2,
    "n_shots": 3,
    "early_stopping": False,
    "random_state": 0,
}


@pytest.fixture
def column():
    return MAMLRegressor(**SMALL, task_column="task")


# -- a task column beside groups -----------------------------------------------------------------


@pytest.mark.parametrize("routing", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("scoring", [None, task_scorer("r2", n_shots=3)], ids=["own", "scorer"])
@pytest.mark.parametrize("groups", [TASK, SCHOOL, SCHOOL.astype(str)], ids=["task", "s", "text"])
def test_groups_are_for_the_splitter_where_a_column_tells_the_task(
    column, routing, scoring, groups
):
    pipe = make_pipeline(FunctionTransformer(), column)
    with sklearn.config_context(enable_metadata_routing=routing):
        given = {"params": {"groups": groups}} if routing else {"groups": groups}
        scores = cross_validate(column, FRAME, Y, cv=GroupKFold(3), scoring=scoring, **given)
        search = GridSearchCV(
            pipe, {"mamlregressor__alpha": [0.1]}, cv=GroupKFold(3), scoring=scoring
        )
        search.fit(FRAME, Y, groups=groups)
        assert search.best_estimator_[-1].n_tasks_ == N_TASKS
        own = [search.cv_results_[f"split{k}_test_score"][0] for k in range(3)]
    # as with the splits of the same groups, which nobody else sees
    splits = list(GroupKFold(3).split(X, groups=groups))
    expected = cross_val_score(column, FRAME, Y, cv=splits, scoring=scoring)
    assert_array_equal(scores["test_score"], expected)
    assert_array_equal(own, expected)


def test_routed_groups_reach_every_method_and_change_nothing(column):
    plain = column.fit(FRAME, Y).adapt(FRAME, Y).predict(FRAME)
    score, scores = column.score(FRAME, Y), task_scores(column, FRAME, Y).after
    both = MAMLRegressor(**SMALL, task_column="task").fit(FRAME, Y, groups=SCHOOL)
    assert both.score(FRAME, Y, groups=SCHOOL) == score
    assert_array_equal(task_scores(both, FRAME, Y, groups=TASK).after, scores)
    both.adapt(FRAME, Y, groups=SCHOOL)
    assert_array_equal(both.predict(FRAME, groups=SCHOOL), plain)
    for groups in (np.arange(len(TASK)), np.arange(len(TASK)) % 2):
        for call in (
            lambda groups=groups: both.fit(FRAME, Y, groups=groups),
            lambda groups=groups: both.adapt(FRAME, Y, groups=groups),
            lambda groups=groups: both.predict(FRAME, groups=groups),
            lambda groups=groups: both.score(FRAME, Y, groups=groups),
            lambda groups=groups: task_scorer("r2")(both, FRAME, Y, groups=groups),
        ):
            with pytest.raises(ValueError, match="groups that put rows of one task into several"):
                call()
