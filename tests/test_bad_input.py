"""Bad input gets an error that says what is wrong, and leaves a fitted estimator as it was."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
import signal
import threading
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from networks import Residual
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import get_scorer
from torch import nn

from sklearn_maml import (
    FewShotClassifier,
    FewShotRegressor,
    MAMLClassifier,
    MAMLRegressor,
    adapt,
    task_scorer,
)
from sklearn_maml.datasets import make_sinusoid_tasks
from sklearn_maml.exceptions import (
    InterruptedFitWarning,
    MetaTrainingError,
    NonFiniteStepWarning,
    NotAdaptedError,
    SingleTaskWarning,
)
from sklearn_maml.targets import Huber
from sklearn_maml.training.schedule import UPDATES_PER_EPOCH
from sklearn_maml.update_rules import SGD

pd = pytest.importorskip("pandas")

# --- data: 6 tasks of 6 rows with 2 features; in classification 2 rows of each of 3 classes

rng = np.random.default_rng(0)
X = rng.normal(size=(36, 2))
Y = rng.normal(size=36)
G = np.repeat(np.arange(6), 6)
C = np.tile([0, 1, 2], 12)
FRAME = pd.DataFrame(X, columns=["a", "b"])
SMALL = {
    "hidden_layer_sizes": (4,),
    "update_rule": "sgd",
    "steps": 1,
    "max_iter": 3,
    "random_state": 0,
}


def regressor(**params):
    return MAMLRegressor(**{**SMALL, **params})


def classifier(**params):
    return MAMLClassifier(**{**SMALL, **params})


def spoilt(array, value):
    array = np.array(array, dtype=float)
    array.reshape(-1)[7] = value
    return array


def fit_kinds():
    """Fitted and adapted estimators, and rows to predict with each."""
    with_ids = {"X": X, "groups": G}
    return {
        "regressor": (regressor().fit(X, Y, groups=G).adapt(X, Y, groups=G), with_ids),
        "two outputs": (
            regressor().fit(X, np.c_[Y, -Y], groups=G).adapt(X[:6], np.c_[Y, -Y][:6]),
            {"X": X},
        ),
        "task column": (
            regressor(task_column="task")
            .fit(FRAME.assign(task=G), Y)
            .adapt(FRAME.assign(task=G), Y),
            {"X": FRAME.assign(task=G)},
        ),
        "frame": (regressor().fit(FRAME, Y, groups=G).adapt(FRAME[:6], Y[:6]), {"X": FRAME}),
        "classifier": (classifier().fit(X, C, groups=G).adapt(X, C, groups=G), with_ids),
        "ways": (classifier(n_ways=2, n_shots=1).fit(X, C).adapt(X[:2], ["u", "v"]), {"X": X}),
    }


@pytest.fixture(scope="module")
def kinds():
    return fit_kinds()


@contextlib.contextmanager
def left_as_it_was(estimator, query):
    """The attributes are the same objects afterwards, and predictions the same bits."""
    before, predicted = dict(vars(estimator)), estimator.predict(**query)
    params = pickle.dumps(estimator.module_.state_dict())
    yield
    after = vars(estimator)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] is value or after[name] == value, name
    assert pickle.dumps(estimator.module_.state_dict()) == params
    assert np.array_equal(estimator.predict(**query), predicted)


def check_refused(kinds, kind, call, message, error=ValueError):
    estimator, query = kinds[kind]
    with left_as_it_was(estimator, query):
        with pytest.raises(error) as info:
            call(estimator)
        assert re.search(message, str(info.value), re.DOTALL), str(info.value)


# --- fit

TASK = (X[:6], Y[:6])
EPISODE = (X[:3], Y[:3], X[3:6], Y[3:6])

BAD_FITS = {
    "NaN in X": ("regressor", (spoilt(X, np.nan), Y, G), "Input X contains NaN"),
    "inf in X": ("regressor", (spoilt(X, np.inf), Y, G), "Input X contains infinity"),
    "NaN in y": ("regressor", (X, spoilt(Y, np.nan), G), "Input y contains NaN"),
    "inf in y": ("regressor", (X, spoilt(Y, -np.inf), G), "Input y contains infinity"),
    "text in X": ("regressor", (np.full((36, 2), "x", dtype=object), Y, G), "convert string"),
    "complex X": ("regressor", (X + 1j, Y, G), "Complex data not supported"),
    "one feature as 1-D": (
        "regressor",
        (X[:, 0], Y, G),
        "Expected 2D array, got 1D array.*Reshape",
    ),
    "no rows": ("regressor", (X[:0], Y[:0], G[:0]), r"0 sample\(s\).*minimum of 1 is required"),
    "no y": ("regressor", (X, None, G), "requires y to be passed"),
    "y too short": ("regressor", (X, Y[:-1], G), r"inconsistent numbers of samples: \[36, 35\]"),
    "y with 3 axes": ("regressor", (X, Y.reshape(36, 1, 1), G), "array with dim 3.*<= 2"),
    # groups
    "groups too short": ("regressor", (X, Y, G[:-1]), "got 35 ids for 36 rows"),
    "groups too long": ("regressor", (X, Y, [*G, 1]), "got 37 ids for 36 rows"),
    "a cube of groups": ("regressor", (X, Y, np.zeros((36, 2, 1))), r"got shape \(36, 2, 1\)"),
    "one id for all": ("regressor", (X, Y, "task"), r"1-D array.*shape \(\)"),
    "NaN in groups": ("regressor", (X, Y, spoilt(G, np.nan)), "groups contains missing.*drop the"),
    "None in groups": ("regressor", (X, Y, [None, *"a" * 35]), "groups contains missing"),
    "NA in groups": ("regressor", (X, Y, [pd.NA, *"a" * 35]), "groups contains missing"),
    "NaT in groups": (
        "regressor",
        (X, Y, pd.to_datetime([None] + ["2020-01-01"] * 35)),
        "groups contains missing",
    ),
    # lists
    "no tasks": ("regressor", ([],), "Got no tasks: the list of tasks is empty"),
    "empty query set": (
        "regressor",
        ([EPISODE, (X[:3], Y[:3], X[:0], Y[:0])],),
        "query set of task 1 is empty: drop the task",
    ),
    "pairs and episodes mixed": ("regressor", ([TASK, EPISODE],), "mixes.*same form"),
    "tuple of three": ("regressor", ([TASK, (*TASK, G[:6])],), r"Item 1.*tuple of.*; expected \(X"),
    "tuples of three": ("regressor", ([(*TASK, G[:6])] * 2,), r"Item 0.*tuple of.*; expected \(X"),
    "no tuple": ("regressor", ([TASK, X],), r"Item 1.*ndarray; expected \(X, y\)"),
    "a number": ("regressor", ([TASK, 3],), r"Item 1.*int; expected \(X, y\)"),
    "X and y in a list": ("regressor", ([X, Y],), r"Item 0.*ndarray; expected \(X, y\)"),
    "rows of a task differ": ("regressor", ([TASK, (X, Y[:5])],), "task 1 has 36 rows.*5 of y"),
    "rows of a set differ": (
        "regressor",
        ([EPISODE, (X[:3], Y[:3], X[:4], Y[:3])],),
        "query set of task 1 has 4 rows of X but 3 of y",
    ),
    "features of tasks differ": (
        "regressor",
        ([TASK, (X[:, :1], Y)],),
        r"same features.*\[\(1,\), \(2,\)\]",
    ),
    "y of tasks differ in dimension": (
        "regressor",
        ([TASK, (X, Y[:, None])],),
        r"same targets.*\[\(\), \(1,\)\].*number of outputs",
    ),
    "outputs of tasks differ": (
        "regressor",
        ([(X, Y[:, None]), (X, np.c_[Y, Y])],),
        r"same targets.*\[\(1,\), \(2,\)\].*number of outputs",
    ),
    "columns of tasks differ": (
        "frame",
        ([(FRAME, Y), (FRAME.rename(columns={"b": "z"}), Y)],),
        r"same columns: task 0 has \['a', 'b'\], task 1 has \['a', 'z'\]",
    ),
    "frame and array": (
        "frame",
        ([(FRAME, Y), (X, Y)],),
        r"task 0 has \['a', 'b'\], task 1.*array",
    ),
    # tasks given twice, or not where they are said to be
    "list and groups": ("regressor", ([TASK, TASK], None, G[:12]), "given twice. Leave one"),
    "groups that cut tasks": (
        "task column",
        (FRAME.assign(task=G), Y, np.arange(36)),
        "groups that put rows of one task into several groups",
    ),
    "column not found": (
        "task column",
        (FRAME, Y),
        r"task_column='task' is neither a column.*Got columns \['a', 'b'\]. Set task_column",
    ),
    "column of an array": ("task column", (X, Y), "names a column, but X is a ndarray"),
    "only the column": (
        "task column",
        (pd.DataFrame({"task": G}), Y),
        "holds the task column only",
    ),
    "NaN in the column": (
        "task column",
        (FRAME.assign(task=spoilt(G, np.nan)), Y),
        "task column 'task' contains missing values",
    ),
    # 3-D
    "stack without y": ("regressor", (X.reshape(6, 6, 2),), "requires y to be passed"),
    "stack with rows of y": ("regressor", (X.reshape(6, 6, 2), Y), r"\[6, 36\]"),
    # classes
    "continuous labels": ("classifier", (X, Y, G), "Unknown label type: continuous"),
    "NaN label": ("classifier", (X, spoilt(C, np.nan), G), "Input y contains NaN"),
    "two columns of labels": ("classifier", (X, np.c_[C, C], G), "y should be a 1d array"),
    "None among labels": (
        "classifier",
        (X, np.array([None, "a"] * 18, dtype=object), G),
        "missing",
    ),
    "one class for n_ways": ("ways", (X, G, G), "too few classes of task 0: got 1 class"),
    "more classes than n_ways": (
        "ways",
        ([(X[:6], C[:6], X[6:12], C[6:12])] * 2,),
        "has 3 classes, but n_ways=2. Raise n_ways",
    ),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_fit_refuses(kinds, name):
    kind, args, message = BAD_FITS[name]
    check_refused(kinds, kind, lambda est: est.fit(*args), message)
    estimator = clone(kinds[kind][0])  # a new one refuses as well
    before = dict(vars(estimator))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        estimator.fit(*args)
    assert vars(estimator) == before
    with pytest.raises(NotFittedError):
        estimator.adapt(X, Y)


@pytest.mark.parametrize("method", ["fit", "adapt", "predict", "score"])
def test_sparse_rows_are_refused(kinds, method):
    sparse = scipy.sparse.csr_matrix(X)
    arguments = {"groups": G} if method == "predict" else {"y": Y, "groups": G}
    check_refused(
        kinds,
        "regressor",
        lambda est: getattr(est, method)(sparse, **arguments),
        r"Sparse data was passed.*Use '.toarray\(\)'",
        TypeError,
    )


@pytest.mark.parametrize("n_shots", [6, 100])
def test_more_shots_than_rows(kinds, n_shots):
    for kind, y, message in (
        ("regressor", Y, f"n_shots={n_shots}.*6 rows.*need {n_shots + 1}. Lower n_shots"),
        ("classifier", C, f"n_shots={n_shots}.*need {n_shots + 1}. Lower n_shots"),
    ):
        estimator, query = kinds[kind]
        changed = copy.copy(estimator).set_params(n_shots=n_shots)
        check_refused(
            {kind: (changed, query)}, kind, lambda est, y=y: est.fit(X, y, groups=G), message
        )
        with pytest.raises(ValueError, match=message):
            task_scorer("neg_mean_squared_error" if y is Y else "accuracy", n_shots=n_shots)(
                estimator, X, y, groups=G
            )


def test_early_stopping_with_a_single_task():
    for X_, y_, groups in ((X, Y, np.zeros(36)), ([(X, Y)], None, None)):
        with pytest.raises(
            ValueError, match=r"only 1 \(at least 2 are needed\).*Set early_stopping"
        ):
            regressor(early_stopping=True).fit(X_, y_, groups)
    with pytest.raises(ValueError, match="early_stopping"), pytest.warns(SingleTaskWarning):
        regressor(early_stopping=True).fit(X, Y)
    with pytest.raises(ValueError, match=r"classes for validation.*only 3"):
        classifier(early_stopping=True, n_ways=2).fit(X, C)


def test_almost_all_tasks_held_out_leaves_one_for_training():
    reg = regressor(early_stopping=True, validation_fraction=0.99).fit(X, Y, groups=G)
    assert np.isfinite(reg.history_[-1]["train_loss"])
    assert np.isfinite(reg.history_[-1]["valid_loss"])


@pytest.mark.parametrize("tasks", [None, [], X, [X, X]], ids=["None", "empty", "array", "rows"])
def test_a_task_distribution_must_return_tasks(tasks):
    class Source:
        def sample(self, n_tasks, random_state=None):
            return tasks

    with pytest.raises(ValueError, match=r"expected.*\(X, y\)"):
        regressor().fit(Source())


@pytest.mark.parametrize("given", [{"y": Y}, {"groups": G}], ids=["y", "groups"])
def test_a_task_distribution_holds_its_own_targets(given):
    class Source:
        def sample(self, n_tasks, random_state=None):
            return [TASK] * n_tasks

    regressor().fit(Source())
    with pytest.raises(ValueError, match=r"distribution|twice"):
        regressor().fit(Source(), **given)


@pytest.mark.parametrize("column", [2, -3])
def test_position_of_the_task_column_out_of_range(column):
    with pytest.raises(ValueError, match=f"task_column={column} is out of range: X has 2 columns"):
        regressor(task_column=column).fit(X, Y)


# --- adapt


BAD_ADAPTS = {
    "features": ("regressor", {"X": X[:, :1], "y": Y}, "X has 1 features, but.*expecting 2"),
    "NaN in X": ("regressor", {"X": spoilt(X, np.nan), "y": Y}, "Input X contains NaN"),
    "inf in X": ("regressor", {"X": spoilt(X, np.inf), "y": Y}, "Input X contains infinity"),
    "NaN in y": ("regressor", {"X": X, "y": spoilt(Y, np.nan)}, "Input y contains NaN"),
    "inf in y": ("regressor", {"X": X, "y": spoilt(Y, np.inf)}, "Input y contains infinity"),
    "no rows of other features": ("regressor", {"X": X[:0, :1], "y": Y[:0]}, "no rows.*the same"),
    "no rows of more outputs": ("regressor", {"X": X[:0], "y": np.c_[Y, Y][:0]}, r"2 output\(s\)"),
    "no rows, but targets": ("regressor", {"X": X[:0], "y": Y}, r"inconsistent.*\[0, 36\]"),
    "no rows for n_ways": (
        "ways",
        {"X": X[:0], "y": C[:0]},
        "no labelled rows.*no classes to pred",
    ),
    "no tasks": ("regressor", {"X": []}, "Got no tasks"),
    "episodes": ("regressor", {"X": [EPISODE]}, r"support sets only.*Pass \[\(X_support"),
    "no y": ("regressor", {"X": X}, "requires y to be passed"),
    "y too short": ("regressor", {"X": X, "y": Y[:-1]}, r"inconsistent.*\[36, 35\]"),
    "too many outputs": (
        "regressor",
        {"X": X, "y": np.c_[Y, Y]},
        r"2 output\(s\), but the model was meta-fitted on 1",
    ),
    "too few outputs": ("two outputs", {"X": X, "y": Y}, r"1 output\(s\).*meta-fitted on 2"),
    "groups too short": ("regressor", {"X": X, "y": Y, "groups": G[1:]}, "35 ids for 36 rows"),
    "NaN in groups": (
        "regressor",
        {"X": X, "y": Y, "groups": spoilt(G, np.nan)},
        "groups contains missing",
    ),
    "negative weights": (
        "regressor",
        {"X": X, "y": Y, "sample_weight": -(Y**2)},
        "Negative values",
    ),
    "weights too short": (
        "regressor",
        {"X": X, "y": Y, "sample_weight": np.ones(3)},
        r"sample_weight.shape == \(3,\), expected \(36,\)",
    ),
    "NaN weight": (
        "regressor",
        {"X": X, "y": Y, "sample_weight": spoilt(np.ones(36), np.nan)},
        "sample_weight contains NaN",
    ),
    "other names": (
        "frame",
        {"X": FRAME.rename(columns={"b": "z"}), "y": Y},
        "feature names should match",
    ),
    "column missing": ("task column", {"X": FRAME, "y": Y}, "neither a column nor an index level"),
    "groups that cut tasks": (
        "task column",
        {"X": FRAME.assign(task=G), "y": Y, "groups": np.arange(36)},
        "several groups",
    ),
    "unseen label": (
        "classifier",
        {"X": X, "y": C + 1},
        r"not seen in fit: \[3\].*fit saw \[0, 1, 2\].*n_ways",
    ),
    "unseen type of label": ("classifier", {"X": X, "y": C.astype(str)}, "not seen in fit: \\['0'"),
    "continuous labels": ("classifier", {"X": X, "y": Y}, "Unknown label type: continuous"),
    "NaN label": ("classifier", {"X": X, "y": spoilt(C, np.nan)}, "Input y contains NaN"),
    "more classes than the head": (
        "ways",
        {"X": X[:3], "y": ["u", "v", "w"]},
        "has 3 classes, but the head has n_ways=2 outputs. Give at most 2",
    ),
    "more classes in one task": (
        "ways",
        {"X": X[:7], "y": list("uvuvabc"), "groups": [1, 1, 1, 1, 2, 2, 2]},
        "support set of task 2 has 3 classes",
    ),
    "None label": ("ways", {"X": X[:2], "y": ["u", None]}, "missing"),
}


@pytest.mark.parametrize("name", BAD_ADAPTS)
def test_adapt_refuses(kinds, name):
    kind, arguments, message = BAD_ADAPTS[name]
    check_refused(kinds, kind, lambda est: est.adapt(**arguments), message)
    # ... and so does the function, on a copy
    check_refused(kinds, kind, lambda est: adapt(est, **arguments), message)


@pytest.mark.parametrize("name", ["features", "NaN in X", "NaN in y"])
def test_few_shot_estimators_refuse_and_keep_what_they_have(kinds, name):
    _, arguments, _ = BAD_ADAPTS[name]
    learner = FewShotRegressor(kinds["regressor"][0]).fit(X[:6], Y[:6])
    before, predicted = dict(vars(learner)), learner.predict(X)
    with pytest.raises(ValueError, match=r"X has 1 features|contains NaN"):
        learner.fit(arguments["X"], arguments["y"])
    assert vars(learner) == before
    assert np.array_equal(learner.predict(X), predicted)


# --- predict


BAD_PREDICTS = {
    "features": ("regressor", {"X": X[:, :1], "groups": G}, "X has 1 features, but.*expecting 2"),
    "NaN in X": ("regressor", {"X": spoilt(X, np.nan), "groups": G}, "Input X contains NaN"),
    "inf in X": ("regressor", {"X": spoilt(X, np.inf), "groups": G}, "Input X contains infinity"),
    "1-D": ("regressor", {"X": X[:, 0], "groups": G}, "Expected 2D array, got 1D array"),
    "no rows": ("regressor", {"X": X[:0], "groups": G[:0]}, r"0 sample\(s\)"),
    "unknown task": (
        "regressor",
        {"X": X, "groups": G + 2},
        r"2 task id\(s\) that were not adapted to, such as \[6, 7\].*Call adapt.*task_scorer",
    ),
    "ids of another type": ("regressor", {"X": X, "groups": ["x"] * 36}, "not adapted to"),
    "no groups": ("regressor", {"X": X}, "adapted to 6 tasks: pass groups"),
    "groups too short": ("regressor", {"X": X, "groups": G[:3]}, "got 3 ids for 36 rows"),
    "NaN in groups": (
        "regressor",
        {"X": X, "groups": spoilt(G, np.nan)},
        "groups contains missing",
    ),
    "groups without need": (
        "frame",
        {"X": FRAME, "groups": G},
        r"got groups.*adapted to one task without an id.*adapt\(X_support",
    ),
    "list and groups": ("regressor", {"X": [X] * 6, "groups": G}, "given twice"),
    "list without need": ("frame", {"X": [FRAME, FRAME]}, "got a list.*one task without an id"),
    "list after ids": ("regressor", {"X": [X] * 6}, r"adapt got task ids, such as \[0, 1, 2\]"),
    "other names": ("frame", {"X": FRAME.rename(columns={"b": "z"})}, "feature names should match"),
    "other order": ("frame", {"X": FRAME[["b", "a"]]}, "same order"),
    "column missing": ("task column", {"X": FRAME}, "neither a column nor an index level"),
    "groups that cut tasks": (
        "task column",
        {"X": FRAME.assign(task=G), "groups": np.arange(36)},
        "several groups",
    ),
    "unknown task in the column": (
        "task column",
        {"X": FRAME.assign(task=G + 6)},
        "not adapted to",
    ),
}


@pytest.mark.parametrize("name", BAD_PREDICTS)
def test_predict_refuses(kinds, name):
    kind, arguments, message = BAD_PREDICTS[name]
    check_refused(kinds, kind, lambda est: est.predict(**arguments), message)


@pytest.mark.parametrize("method", ["predict_proba", "predict_log_proba", "decision_function"])
@pytest.mark.parametrize("name", ["features", "NaN in X", "unknown task", "no groups"])
def test_classifiers_refuse_in_every_method(kinds, method, name):
    _, arguments, message = BAD_PREDICTS[name]
    check_refused(kinds, "classifier", lambda est: getattr(est, method)(**arguments), message)


# --- score


BAD_SCORES = {
    "features": ("regressor", {"X": X[:, :1], "y": Y, "groups": G}, "X has 1 features"),
    "NaN in X": ("regressor", {"X": spoilt(X, np.nan), "y": Y, "groups": G}, "X contains NaN"),
    "NaN in y": ("regressor", {"X": X, "y": spoilt(Y, np.nan), "groups": G}, "y contains NaN"),
    "groups too short": ("regressor", {"X": X, "y": Y, "groups": G[1:]}, "35 ids for 36 rows"),
    "no tasks": ("regressor", {"X": []}, "Got no tasks"),
    "outputs": ("regressor", {"X": X, "y": np.c_[Y, Y], "groups": G}, r"2 output\(s\)"),
    "weights too short": (
        "regressor",
        {"X": X, "y": Y, "groups": G, "sample_weight": np.ones(3)},
        "sample_weight.shape",
    ),
    "unseen label": ("classifier", {"X": X, "y": C + 1, "groups": G}, "not seen in fit"),
    "column missing": ("task column", {"X": FRAME, "y": Y}, "neither a column nor an index level"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_score_refuses(kinds, name):
    kind, arguments, message = BAD_SCORES[name]
    check_refused(kinds, kind, lambda est: est.score(**arguments), message)


# --- the wrong order of calls


def test_before_fit():
    for estimator, y in ((regressor(), Y), (classifier(), C)):
        for call in (
            lambda est, y: est.adapt(X, y),
            lambda est, y: est.predict(X),
            lambda est, y: est.score(X, y, groups=G),
            lambda est, y: adapt(est, X, y),
        ):
            with pytest.raises(NotFittedError, match=r"not fitted yet. Call 'fit'"):
                call(estimator, y)
    for learner in (FewShotRegressor(), FewShotClassifier()):
        with pytest.raises(NotFittedError, match=r"Call 'fit'"):
            learner.predict(X)


def test_before_adapt():
    reg = regressor().fit(X, Y, groups=G)
    clf = classifier().fit(X, C, groups=G)
    calls = [reg.predict, clf.predict, clf.predict_proba, clf.decision_function]
    for call in calls:
        for arguments in ({}, {"groups": G}):
            with pytest.raises(NotAdaptedError, match=r"Call adapt\(X_support, y_support\)"):
                call(X, **arguments)
    with pytest.raises(NotAdaptedError, match="task_scorer"):
        get_scorer("r2")(reg, X, Y)
    # it can be caught as scikit-learn's
    with pytest.raises(NotFittedError):
        reg.predict(X)
    # a fit forgets what was adapted before
    reg.adapt(X[:6], Y[:6]).fit(X, Y, groups=G)
    with pytest.raises(NotAdaptedError):
        reg.predict(X)


# --- parameters

BAD_PARAMETERS = [
    ("alpha", [-0.1, "0.1", np.nan, np.inf]),
    ("beta", [0, -1, "0.1", np.inf]),
    ("beta_decay", [-0.1, 1.1, None]),
    ("max_grad_norm", [0, -1.0, "1"]),
    ("steps", [-1, 1.5, "1"]),
    ("adapt_steps", [-1, 2.5]),
    ("n_shots", [0, -1, 1.5]),
    ("n_queries", [0, -1]),
    ("meta_batch_size", [0, 2.5, None]),
    ("max_iter", [0, -5, 10.5]),
    ("early_stopping", ["yes", None]),
    ("validation_fraction", [0.0, 1.0, -0.1]),
    ("n_iter_no_change", [0]),
    ("normalize_y", ["yes"]),
    ("center_y", ["yes", None]),
    ("activation", ["rellu", nn.ReLU]),
    ("hidden_layer_sizes", [0, -3, (4, 0), "64", (1.5,)]),
    ("adapted", ["heads", ["nope.*"], ["0.*", "nope"], [], 5, None]),
    ("update_rule", ["sgdd", 3, None]),
    ("meta_gradient", ["secondorder", "Reptile", 2, None]),
    ("optimizer", ["adamm", 3, dict, nn.Linear]),
    ("callbacks", ["EarlyStopping", [3], [("name", object())]]),
    ("device", ["gpu", 3, "cuda:99", "meta", "xpu"]),
    ("warm_start", ["yes"]),
    ("random_state", ["seed"]),
    ("verbose", [-1, "yes"]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{k}")
        for name, values in BAD_PARAMETERS
        for k, value in enumerate(values)
    ],
)
def test_parameters_out_of_range_are_named(kinds, name, value):
    estimator, query = kinds["regressor"]
    # copies share the fitted state; __init__ and set_params accept anything
    changed = copy.copy(estimator).set_params(**{name: value})
    check_refused(
        {"changed": (copy.copy(estimator), query), "regressor": (estimator, query)},
        "regressor",
        lambda _: changed.fit(X, Y, groups=G),
        rf"\b{name}\b",
        (ValueError, TypeError),
    )
    assert vars(changed).keys() == vars(estimator).keys()
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        regressor(**{name: value}).fit(X, Y, groups=G)


@pytest.mark.parametrize(("name", "value"), [("alpha", -1), ("steps", -1), ("adapt_steps", 0.5)])
@pytest.mark.parametrize("method", ["adapt", "score"])
def test_parameters_changed_after_fit_are_checked(kinds, name, value, method):
    estimator = copy.copy(kinds["regressor"][0]).set_params(**{name: value})
    with pytest.raises(ValueError, match=f"'{name}' parameter"):
        getattr(estimator, method)(X, Y, groups=G)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("regressor", {"update_rule": "meta-sgd"}),
        ("regressor", {"adapted": "head"}),
        ("ways", {"n_ways": 3}),
        ("ways", {"n_ways": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.parametrize("method", ["adapt", "score"])
def test_what_was_meta_learned_for_other_settings_is_refused(kinds, kind, params, method):
    estimator, query = kinds[kind]
    changed = copy.copy(estimator).set_params(**params)
    arguments = (X, Y if kind == "regressor" else C, G)
    (name,) = params
    with left_as_it_was(estimator, query):
        with pytest.raises(ValueError, match=rf"{name} was changed after fit.*fit (again|anew)"):
            getattr(changed, method)(*arguments)
        assert vars(changed).keys() == vars(estimator).keys()


def test_parameters_of_a_name_that_has_none_are_refused(kinds):
    assert regressor(loss=Huber()).set_params(loss__delta=0.4).loss.delta == 0.4
    assert regressor().set_params(loss=Huber(), loss__delta=0.4).loss.delta == 0.4
    with pytest.raises(ValueError, match=r"loss__delta sets 'delta'.*'cross_entropy' has no param"):
        classifier().set_params(loss__delta=0.4)
    with pytest.raises(ValueError, match=r"steps__x sets 'x'.*steps=\d+ has no parameters"):
        regressor().set_params(steps__x=1)


def test_a_rate_that_is_infinite_in_the_numbers_of_x_is_refused():
    narrow = X.astype(np.float32)
    message = r"alpha=1e\+300 is infinite in float32.*at most 3e\+38"
    with pytest.raises(ValueError, match=message):
        regressor(alpha=1e300).fit(narrow, Y, groups=G)
    fitted = regressor().fit(narrow, Y, groups=G).set_params(alpha=1e300)
    with pytest.raises(ValueError, match=message):
        fitted.adapt(narrow[:6], Y[:6])


@pytest.mark.parametrize(
    "params",
    [
        {"hidden_layer_sizes": (5,)},
        {"activation": "tanh"},
        {"module": nn.Linear},
        {"adapted": "head"},
        {"update_rule": "meta-sgd"},
    ],
    ids=lambda params: next(iter(params)),
)
def test_another_network_is_not_a_continuation(kinds, params):
    estimator, query = kinds["regressor"]
    changed = copy.copy(estimator).set_params(warm_start=True, **params)
    (name,) = params
    with left_as_it_was(estimator, query):
        with pytest.raises(ValueError, match=rf"{name} was changed after fit.*warm_start=False"):
            changed.fit(X, Y, groups=G)
        assert vars(changed).keys() == vars(estimator).keys()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS.*Use a stochastic optimiser"),
        ({"iterator_valid__batch_size": 2}, "iterator_valid__batch_size cannot be chosen.*Leave"),
    ],
)
def test_settings_that_meta_training_cannot_use_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        regressor(**params).fit(X, Y, groups=G)


def test_n_ways_out_of_range():
    for value in (1, 0, 2.5, "5"):
        with pytest.raises(ValueError, match="'n_ways' parameter"):
            classifier(n_ways=value).fit(X, C)


def test_few_shot_parameters_out_of_range(kinds):
    for params in ({"alpha": -1}, {"steps": -1}, {"steps": 1.5}):
        with pytest.raises(ValueError, match=next(iter(params))):
            FewShotRegressor(kinds["regressor"][0], **params).fit(X, Y)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"update_rule__max_norm": 1.0}, "max_norm.*it takes.*max_grad_norm"),
        ({"update_rule__max_grad_norm": -1.0}, "max_grad_norm.*-1"),
        ({"update_rule__max_grad_norm": 0.0}, "max_grad_norm.*0"),
        ({"update_rule": "meta-sgd", "update_rule__per": "row"}, "per='row'.*'weight'.*'tensor'"),
        ({"meta_gradient__damping": 1.0}, "got the options.*damping.*takes.*first_order_updates"),
    ],
)
def test_options_of_rules_are_checked(params, message):
    with pytest.raises(ValueError, match=message):
        regressor(**params).fit(X, Y, groups=G)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device():
    with pytest.raises(ValueError, match=r"no such device here.*device='auto'"):
        regressor(device="cuda").fit(X, Y, groups=G)
    with pytest.raises(ValueError, match=r"not a torch device. Expected 'auto', 'cpu'"):
        regressor(device="gpu").fit(X, Y, groups=G)


# --- misspelt parameters

MISSPELT = [
    ("alpah", "alpha"),
    ("Module", "module"),
    ("stepps", "steps"),
    ("n_shot", "n_shots"),
    ("hidden_layers_sizes", "hidden_layer_sizes"),
    ("optimiser__lr", "optimizer__lr"),
    ("modul__depth", "module__depth"),
    ("iterator_trian__shuffle", "iterator_train__shuffle"),
    ("callback__print_log", "callbacks__print_log"),
    ("engine__precison", "engine__precision"),
    ("engin__batch_norm", "engine__batch_norm"),
]


@pytest.mark.parametrize("make", [regressor, classifier])
@pytest.mark.parametrize(("name", "meant"), MISSPELT)
def test_misspelt_parameters_are_reported_by_fit(make, name, meant):
    estimator = make(**{name: 0.5})  # a constructor must not raise
    assert estimator.get_params()[name] == 0.5
    with pytest.raises(ValueError, match=f"no parameter '{name}'. Did you mean '{meant}'?"):
        estimator.fit(X, C, groups=G)
    assert not hasattr(estimator, "module_")


@pytest.mark.parametrize("name", ["loss__nope", "alpha__nope"])
def test_parameters_of_what_has_none_are_refused_alike_by_fit_and_set_params(name):
    for ask in (
        lambda: classifier(**{name: 1}).fit(X, C),
        lambda: classifier().set_params(**{name: 1}),
    ):
        with pytest.raises(ValueError, match=f"^{name} sets 'nope' of.*has no parameters. Leave"):
            ask()


@pytest.mark.parametrize(
    ("name", "meant"), [case for case in MISSPELT if "__" not in case[0] or "engine" in case[1]]
)
def test_misspelt_parameters_are_reported_by_set_params(kinds, name, meant):
    def change(est):
        est.set_params(alpha=0.123, **{name: 0.5})

    for kind in ("regressor", "classifier"):
        check_refused(kinds, kind, change, f"Invalid parameter '{name}'.*Did you mean '{meant}'")


@pytest.mark.parametrize(
    ("params", "meant"),
    [
        ({"optimizer__lrr": 0.1}, "lr"),
        ({"optimizer": "sgd", "optimizer__momentun": 0.1}, "momentum"),
        ({"optimizer__weight_decai": 0.1}, "weight_decay"),
        ({"iterator_train__shuffel": False}, "shuffle"),
        ({"iterator_valid__num_worker": 0}, "num_workers"),
        ({"callbacks__print_logg": None}, "print_log"),
        ({"callbacks__train_los__name": "x"}, "train_loss"),
    ],
    ids=str,
)
def test_misspelt_prefixed_parameters_are_reported(params, meant):
    # of torch, where the name is checked by nobody else
    with pytest.raises((ValueError, TypeError), match=f"Did you mean '{meant}'"):
        regressor(**params).fit(X, Y, groups=G)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"update_rule": SGD(), "update_rule__max_grad_nrm": 0.1}, "max_grad_nrm"),
        ({"engine__nonesuch": 0.1}, "nonesuch"),
        ({"loss": "huber", "loss__detla": 0.1}, r"\['detla'\]; it takes \['delta'\]"),
        ({"loss__quantile": 0.1}, r"\['quantile'\]; it takes none"),
        ({"callbacks__nonesuch": None}, "nonesuch"),
        ({"iterator_train__nonesuch": 1}, "nonesuch"),
    ],
    ids=str,
)
def test_options_that_nothing_has_are_refused(params, message):
    with pytest.raises((ValueError, TypeError), match=message):
        regressor(**params).fit(X, Y, groups=G)


@pytest.mark.parametrize("make", [regressor, classifier])
@pytest.mark.parametrize(
    "name", ["checkpoint_steps", "max_tasks_in_memory", "precision", "batch_norm"]
)
def test_names_of_earlier_versions_are_refused_with_those_of_now(make, name):
    message = f"parameter '{name}'.* It is 'engine__{name}' now"
    with pytest.raises(ValueError, match=message):
        make(**{name: 1}).fit(X, C, groups=G)
    with pytest.raises(ValueError, match=message):
        make().set_params(**{name: 1})


def test_an_unknown_parameter_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no parameter 'lr'.*'alpha'.*'steps'.*module__\*"):
        regressor(lr=0.1).fit(X, Y, groups=G)
    with pytest.raises(ValueError, match="no parameter 'n_ways'"):
        regressor(n_ways=5).fit(X, Y, groups=G)


# --- modules


class Pair(nn.Linear):
    """Returns two tensors."""

    def forward(self, x):
        return super().forward(x), x


class Pooling(nn.Linear):
    """Returns one row for all rows."""

    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class Failing(nn.Linear):
    """Cannot be run."""

    def forward(self, x):
        raise IndexError("lost my index")


def build():
    return nn.Linear(2, 1)


def frozen():
    return nn.Linear(2, 1).requires_grad_(False)


BAD_MODULES = [
    ({"module": build}, "module must be None, a torch.nn.Module class or an instance.*function"),
    ({"module": "mlp"}, "module must be None, a torch.nn.Module class or an instance; got 'mlp'"),
    ({"module": 3}, "module must be None, a torch.nn.Module class or an instance; got 3"),
    ({"module": dict}, "module must be None, a torch.nn.Module class or an instance"),
    ({"module": nn.Linear(2, 3)}, r"returns \(2, 3\) for 2 rows; expected.*\(2, 1\)"),
    ({"module": nn.Linear(2, 3), "y": C}, None),
    ({"module": nn.Linear(2, 2), "y": C}, r"returns \(2, 2\).*expected.*\(2, 3\): one.*class"),
    ({"module": nn.Linear(5, 1)}, r"failed on two rows of shape \(2, 2\).*mat1"),
    ({"module": Pair}, r"Pair returns tuple for 2 rows; expected a tensor of shape \(2, 1\)"),
    ({"module": Pooling}, r"Pooling returns \(1, 1\) for 2 rows; expected"),
    ({"module": Failing}, "Failing failed on two rows.*lost my index"),
    ({"module": nn.Identity}, "no trainable parameters"),
    ({"module": frozen()}, "no trainable parameters"),
    ({"module": nn.Conv2d(1, 1, 3)}, "Conv2d failed on two rows"),
    ({"module": nn.Conv2d}, "Conv2d could not be built.*kernel_size"),
    ({"module": Residual, "module__widht": 3}, "widht.*It takes.*Did you mean 'width'"),
    ({"module__width": 3}, "module__width was given, but module is None"),
    (
        {"module": build(), "module__bias": True},
        "module__bias was given, but module is an instance",
    ),
    ({"module": nn.Linear, "adapted": "body"}, "adapted='body' leaves nothing to adapt"),
]


@pytest.mark.parametrize(
    ("params", "message"), BAD_MODULES, ids=[str(m)[:50] for _, m in BAD_MODULES]
)
def test_modules_are_checked_before_training(kinds, params, message):
    params = dict(params)
    y = params.pop("y", Y)
    kind = "regressor" if y is Y else "classifier"
    make = regressor if y is Y else classifier
    if message is None:  # the control: three classes, three outputs
        make(**params).fit(X, y, groups=G)
        return
    estimator, query = kinds[kind]
    changed = copy.copy(estimator).set_params(**params)
    with left_as_it_was(estimator, query):
        for est in (changed, make(**params)):
            with pytest.raises(ValueError, match=f"(?s){message}"):
                est.fit(X, y, groups=G)
    assert np.array_equal(changed.predict(**query), estimator.predict(**query))


def test_a_module_class_is_given_the_sizes_it_asks_for():
    reg = regressor(module=Residual, module__width=7).fit(X, np.c_[Y, Y], groups=G)
    assert reg.module_.body.weight.shape == (7, 2)
    assert reg.module_.head.weight.shape == (2, 7)


# --- failures in the middle


class Grenade(nn.Module):
    """Raises from the given call of its forward on; the calls of all copies count."""

    calls_left = None
    error = RuntimeError("the grenade went off")
    action = None

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x):
        if Grenade.calls_left is not None:
            Grenade.calls_left -= 1
            if Grenade.calls_left == 0 and Grenade.action is not None:
                Grenade.action()
            elif Grenade.calls_left <= 0 and Grenade.action is None:
                raise Grenade.error
        return self.linear(x)


@pytest.fixture
def grenade():
    """Arm the grenade: grenade(number of calls, what to raise)."""

    def arm(calls, error=None, action=None):
        Grenade.calls_left, Grenade.action = calls, action
        Grenade.error = RuntimeError("the grenade went off") if error is None else error

    yield arm
    Grenade.calls_left = Grenade.action = None


# one task in a meta-batch: vmap leaves it to the loop, which calls the module 2 times an update
GRENADE = {"module": Grenade, "meta_batch_size": 1, "max_iter": 20, "early_stopping": False}


@pytest.mark.parametrize("method", ["fit", "adapt", "predict", "score"])
@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError])
def test_a_module_that_fails_late_leaves_the_estimator_as_it_was(grenade, method, error):
    reg = regressor(**GRENADE).fit(X, Y, groups=G).adapt(X[:6], Y[:6])
    arguments = {"predict": (X,), "adapt": (X[:6], Y[:6])}.get(method, (X, Y, G))
    with left_as_it_was(reg, {"X": X}):
        grenade({"fit": 30, "score": 2}.get(method, 1), error("the grenade went off"))
        with pytest.raises((error, RuntimeError), match="the grenade went off"):
            getattr(reg, method)(*arguments)
        assert Grenade.calls_left <= 0
        grenade(None)


def test_a_failing_warm_start_leaves_the_estimator_as_it_was(grenade):
    reg = regressor(**GRENADE, warm_start=True).fit(X, Y, groups=G)
    reg.adapt(X[:6], Y[:6])
    history, n_iter = len(reg.history_), reg.n_iter_
    optimizer = copy.deepcopy(reg.net_.optimizer_.state_dict())
    with left_as_it_was(reg, {"X": X}):
        grenade(20)
        with pytest.raises(RuntimeError, match="the grenade went off"):
            reg.fit(X, Y, groups=G)
        grenade(None)
        assert len(reg.history_) == history
        assert reg.n_iter_ == n_iter
        for state, same in zip(
            reg.net_.optimizer_.state_dict()["state"].values(),
            optimizer["state"].values(),
            strict=True,
        ):
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(same[name]))
    # and it can go on from there
    assert reg.fit(X, Y, groups=G).n_iter_ == 2 * n_iter


# --- meta-steps that are not finite

FLAT = {
    "hidden_layer_sizes": (),
    "update_rule": "sgd",
    "steps": 5,
    "early_stopping": False,
    "normalize_y": False,
    "random_state": 0,
    "meta_batch_size": 1,
}


def tasks_with_an_explosive_one():
    """Ten tasks; the features of the last are so large that inner steps overflow."""
    X = np.random.default_rng(0).normal(size=(60, 2))
    X[-6:] *= 1e80
    return X, X[:, 0].clip(-3, 3), np.repeat(np.arange(10), 6)


def test_meta_steps_that_are_not_finite_are_skipped_counted_and_warned_about_once():
    X, y, groups = tasks_with_an_explosive_one()
    reg = MAMLRegressor(alpha=0.1, max_iter=70, **FLAT)
    with pytest.warns(NonFiniteStepWarning, match="not finite; the update was skipped") as record:
        reg.fit(X, y, groups=groups)
    assert len(record) == 1
    assert issubclass(NonFiniteStepWarning, ConvergenceWarning)
    # every pass over the 10 tasks meets the explosive one once
    assert [row["non_finite"] for row in reg.history_] == [5, 2]
    assert reg.n_iter_ == 70
    assert all(np.isfinite(row["train_loss"]) for row in reg.history_)
    assert all(torch.isfinite(p).all() for p in reg.module_.parameters())
    # negative control
    calm = MAMLRegressor(alpha=0.1, max_iter=70, **FLAT).fit(X[:-6], y[:-6], groups=groups[:-6])
    assert [row["non_finite"] for row in calm.history_] == [0, 0]


def test_a_skipped_update_leaves_parameters_and_optimiser_alone():
    X, y, groups = tasks_with_an_explosive_one()
    states = {}

    def remember(net, batch):
        optimizer = net.optimizer_.state_dict()["state"]
        states[net.update_] = copy.deepcopy((net.module_.state_dict(), optimizer))

    from skorch.callbacks import Callback

    class Spy(Callback):
        def on_batch_end(self, net, batch=None, training=False, **kwargs):
            remember(net, batch)

    reg = MAMLRegressor(alpha=0.1, max_iter=20, callbacks=[Spy()], **FLAT)
    with pytest.warns(NonFiniteStepWarning):
        reg.fit(X, y, groups=groups)
    skipped = [
        k + 1 for k, row in enumerate(reg.history_[0, "batches"]) if row["non_finite"] and k > 0
    ]
    assert skipped
    for k in skipped:
        (params, optimizer), (old_params, old_optimizer) = states[k], states[k - 1]
        assert all(torch.equal(params[name], old_params[name]) for name in params)
        for p, state in optimizer.items():
            assert all(torch.equal(state[name], old_optimizer[p][name]) for name in state)
    moved = [k for k in range(2, 21) if k not in skipped]
    for k in moved:
        assert any(not torch.equal(v, states[k - 1][0][n]) for n, v in states[k][0].items())


@pytest.mark.parametrize("max_iter", [5, 200])
def test_mostly_diverging_inner_steps_stop_the_fit_and_name_alpha(max_iter):
    reg = MAMLRegressor(alpha=1e70, max_iter=max_iter, **FLAT)
    with (
        pytest.warns(NonFiniteStepWarning) as record,
        pytest.raises(MetaTrainingError, match=r"not finite.*lower alpha \(now 1e\+70\)") as info,
    ):
        reg.fit(X, Y, groups=G)
    assert len(record) == 1
    assert isinstance(info.value, ArithmeticError)
    assert isinstance(info.value, ValueError)
    assert "beta" not in str(info.value)
    n_steps = int(re.search(r"of (\d+) meta-steps", str(info.value))[1])
    assert n_steps == min(max_iter, 20)  # it does not go on to the end
    assert not hasattr(reg, "module_")


@pytest.mark.parametrize("max_iter", [15, 200])
def test_a_diverged_initialisation_stops_the_fit_and_names_beta(max_iter):
    reg = MAMLRegressor(alpha=0.01, beta=1e160, optimizer="sgd", max_iter=max_iter, **FLAT)
    with (
        pytest.warns(NonFiniteStepWarning) as record,
        pytest.raises(MetaTrainingError, match=r"not finite.*lower beta \(now 1e\+160\)") as info,
    ):
        reg.fit(X, Y, groups=G)
    assert len(record) == 1
    assert "alpha" not in str(info.value)


def test_meta_training_that_fails_leaves_a_fitted_estimator_as_it_was():
    reg = MAMLRegressor(alpha=0.01, max_iter=5, **FLAT).fit(X, Y, groups=G).adapt(X[:6], Y[:6])
    changed = copy.copy(reg).set_params(alpha=1e70)
    with (
        left_as_it_was(reg, {"X": X}),
        pytest.warns(NonFiniteStepWarning),
        pytest.raises(MetaTrainingError),
    ):
        changed.fit(X, Y, groups=G)
    changed.set_params(alpha=0.01)
    assert vars(changed).keys() == vars(reg).keys()
    assert np.array_equal(changed.predict(X), reg.predict(X))


def test_the_warning_comes_again_in_the_next_fit():
    X, y, groups = tasks_with_an_explosive_one()
    reg = MAMLRegressor(alpha=0.1, max_iter=20, **FLAT)
    for _ in range(2):
        with pytest.warns(NonFiniteStepWarning) as record:
            reg.fit(X, y, groups=groups)
        assert len(record) == 1


@pytest.mark.parametrize("together", [1, 2**17])
def test_a_diverging_task_leaves_the_others_intact(together, monkeypatch):
    monkeypatch.setattr("sklearn_maml.learners.gradient.CACHED", together)
    for hidden in ((), (4,)):
        params = {**FLAT, "hidden_layer_sizes": hidden}
        reg = MAMLRegressor(alpha=0.1, max_iter=10, **params).fit(X, Y, groups=G)
        support = X.copy()
        support[G == 3] *= 1e80
        with pytest.warns(
            NonFiniteStepWarning, match="diverged on 1 of 6 tasks.*lower alpha"
        ) as rec:
            reg.adapt(support, Y, groups=G)
        assert len(rec) == 1
        predicted = reg.predict(X, groups=G)
        alone = G != 3
        reg.adapt(X[alone], Y[alone], groups=G[alone])
        np.testing.assert_allclose(
            predicted[alone], reg.predict(X[alone], groups=G[alone]), rtol=1e-9
        )
        # the one that diverged is predicted by the initialisation
        reg.set_params(adapt_steps=0).adapt(X, Y, groups=G)
        np.testing.assert_allclose(
            predicted[~alone], reg.predict(X[~alone], groups=G[~alone]), rtol=1e-9
        )


def test_a_single_diverging_task_predicts_with_the_initialisation():
    reg = MAMLRegressor(alpha=0.1, max_iter=10, **FLAT).fit(X, Y, groups=G)
    with pytest.warns(NonFiniteStepWarning, match="diverged on 1 of 1"):
        reg.adapt(X[:6] * 1e80, Y[:6])
    predicted = reg.predict(X)
    assert np.isfinite(predicted).all()
    assert np.array_equal(predicted, reg.set_params(adapt_steps=0).adapt(X[:6], Y[:6]).predict(X))


@pytest.fixture(scope="module")
def linear_steps():
    """Steps that were trained on linear tasks of standard normal rows, and new tasks."""
    rng = np.random.RandomState(0)
    X, coef = rng.randn(40, 30, 5), 1 + rng.randn(40, 5)
    y = np.einsum("tnp,tp->tn", X, coef)
    reg = MAMLRegressor(
        update_rule="sgd", hidden_layer_sizes=(16,), max_iter=60, early_stopping=False,
        random_state=0,
    ).fit(X[:30], y[:30])  # fmt: skip
    return reg, X[30:], y[30:]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda X, y: (10 * X, 10 * y), id="x10"),
        pytest.param(lambda X, y: (100 * X, 100 * y), id="x100"),
        pytest.param(lambda X, y: (1000 * X, y), id="X alone x1000"),
        pytest.param(lambda X, y: (X, 1000 * y), id="y alone x1000"),
        pytest.param(lambda X, y: (np.r_[X[:1] + 60, X[1:]], y), id="one row far away"),
        pytest.param(lambda X, y: (X, np.r_[y[:1] + 1e4, y[1:]]), id="one target far away"),
    ],
)
def test_no_inputs_make_steps_explode_and_other_tasks_keep_their_bits(linear_steps, spoil):
    reg, X, y = linear_steps
    plain = copy.deepcopy(reg).adapt(X[:, :10], y[:, :10]).predict(X[:, 10:])
    spoilt = [spoil(x, t) for x, t in zip(X[:3], y[:3], strict=True)]
    X = np.r_[np.stack([x for x, _ in spoilt]), X[3:]]
    y = np.r_[np.stack([t for _, t in spoilt]), y[3:]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reg = copy.deepcopy(reg).adapt(X[:, :10], y[:, :10])
    assert len(caught) <= 1  # one for all tasks
    predicted = reg.predict(X[:, :10])
    # where steps overshoot they give 1e10 and more
    errors = ((predicted - y[:, :10]) ** 2).mean(1)
    before = copy.deepcopy(reg).set_params(adapt_steps=0).adapt(X[:, :10], y[:, :10])
    assert (errors <= 2.001 * ((before.predict(X[:, :10]) - y[:, :10]) ** 2).mean(1)).all()
    np.testing.assert_array_equal(reg.predict(X[:, 10:])[3:], plain[3:])


@pytest.mark.parametrize("scale", [10, 20, 30, 100])
def test_steps_that_end_with_units_at_rest_on_all_support_rows_do_not_explode_elsewhere(
    linear_steps, scale
):
    """Their loss is small again after the last step, whatever the weights grew to before."""
    reg, X, y = linear_steps
    X = scale * X
    with pytest.warns(NonFiniteStepWarning):
        adapted = copy.deepcopy(reg).adapt(X[:, :5], y[:, :5])
    before = copy.deepcopy(reg).set_params(adapt_steps=0).adapt(X[:, :5], y[:, :5])
    errors, of_before = (
        ((model.predict(X[:, 10:]) - y[:, 10:]) ** 2).mean(1) for model in (adapted, before)
    )
    assert (errors < 3 * np.maximum(of_before, (y[:, 10:] ** 2).mean(1))).all()


def test_tasks_that_took_shorter_steps_are_counted(linear_steps):
    reg, X, y = linear_steps
    X = X.copy()
    X[2, :10] *= 30
    with pytest.warns(NonFiniteStepWarning, match="diverged on 1 of 10 tasks.* 1 took shorter"):
        copy.deepcopy(reg).adapt(X[:, :10], y[:, :10])


def test_what_steps_say_is_bounded_where_they_are_mixed_in():
    X, y, groups = make_sinusoid_tasks(n_tasks=12, random_state=0)
    reg = MAMLRegressor(max_iter=4, hidden_layer_sizes=(8,), random_state=0)
    reg.fit(X, y, groups=groups)
    reg.learner_weights_ = {"gaussian-head": 0.5, "gradient-steps": 0.5}
    reg.adapt(X[:10], y[:10])
    far = np.array([[1e12], [-1e12]])
    assert np.abs(reg.predict(far)).max() < 2 * np.abs(y).max()
    # the network itself goes on as a line
    alone = copy.copy(reg)
    alone.learner_weights_ = {"gaussian-head": 0.0, "gradient-steps": 1.0}
    assert np.abs(alone.adapt(X[:10], y[:10]).predict(far)).max() > 1e6


# --- Ctrl-C


def test_an_interrupted_fit_keeps_the_best_parameters_so_far(grenade):
    from skorch.callbacks import Callback

    class Spoiler(Callback):
        """Ruins the parameters after the first epoch, interrupts in the third."""

        best = None

        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 1:
                Spoiler.best = copy.deepcopy(net.module_.module.state_dict())

        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 2:
                with torch.no_grad():
                    net.module_.module.linear.weight.add_(1e3)
            if len(net.history) == 3:
                grenade(6, KeyboardInterrupt())

    reg = regressor(
        **{**GRENADE, "early_stopping": "auto", "max_iter": 500, "beta": 1e-3},
        callbacks=[Spoiler],
    )
    tasks = [(X[j : j + 6], Y[j : j + 6]) for j in range(0, 36, 3)]
    with pytest.warns(
        InterruptedFitWarning, match=r"interrupted after 10\d of 500.*best so far"
    ) as r:
        reg.fit(tasks)
    assert len(r) == 1
    losses = [row.get("valid_loss", np.inf) for row in reg.history_]
    assert len(losses) == 3
    assert losses[0] < losses[1]
    assert 2 * UPDATES_PER_EPOCH <= reg.n_iter_ < 3 * UPDATES_PER_EPOCH
    for name, value in reg.module_.state_dict().items():
        assert torch.equal(value, Spoiler.best[name])
    Grenade.calls_left = None
    assert np.isfinite(reg.adapt(*tasks[0]).predict(X)).all()
    assert np.isfinite(reg.score(tasks))


@pytest.mark.parametrize("calls", [4, 30, 130])
def test_an_interrupt_at_any_time_leaves_a_usable_estimator(grenade, calls):
    """The probe of the module is call 1; without validation an update takes 2 calls."""
    grenade(calls, KeyboardInterrupt())
    reg = regressor(**{**GRENADE, "max_iter": 100})
    with pytest.warns(InterruptedFitWarning, match="the parameters kept are the current"):
        reg.fit(X, Y, groups=G)
    Grenade.calls_left = None
    assert reg.n_iter_ == (calls - 2) // 2
    assert np.isfinite(reg.adapt(X[:6], Y[:6]).predict(X)).all()
    # the parameters are those of a fit that ends there
    short = regressor(**{**GRENADE, "max_iter": reg.n_iter_, "beta_decay": 0})
    whole = regressor(**{**GRENADE, "max_iter": 100, "beta_decay": 0})
    grenade(calls, KeyboardInterrupt())
    with pytest.warns(InterruptedFitWarning):
        whole.fit(X, Y, groups=G)
    Grenade.calls_left = None
    short.fit(X, Y, groups=G)
    for p, q in zip(whole.module_.parameters(), short.module_.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_interrupt_before_training_starts_is_passed_on(grenade):
    reg = regressor(**GRENADE)
    grenade(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        reg.fit(X, Y, groups=G)
    assert not hasattr(reg, "module_")


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="signals are handled in the main thread",
)
def test_ctrl_c_ends_the_fit(grenade):
    """A real signal, as the terminal sends it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        grenade(60, action=lambda: os.kill(os.getpid(), signal.SIGINT))
        reg = regressor(**{**GRENADE, "max_iter": 5000})
        with pytest.warns(InterruptedFitWarning, match="interrupted after"):
            reg.fit(X, Y, groups=G)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert 25 <= reg.n_iter_ < 5000
    assert np.isfinite(reg.adapt(X[:6], Y[:6]).predict(X)).all()


def test_an_interrupted_fit_can_be_continued(grenade):
    params = {**GRENADE, "max_iter": 100, "beta_decay": 0, "warm_start": True}
    grenade(42, KeyboardInterrupt())
    reg = regressor(**params)
    with pytest.warns(InterruptedFitWarning):
        reg.fit(X, Y, groups=G)
    Grenade.calls_left = None
    done = reg.n_iter_
    assert done == 20
    reg.set_params(max_iter=100 - done).fit(X, Y, groups=G)
    assert reg.n_iter_ == 100
    whole = regressor(**params).fit(X, Y, groups=G)
    for p, q in zip(whole.module_.parameters(), reg.module_.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_callback_that_stops_training_is_no_interruption():
    from skorch.callbacks import Callback

    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg = regressor(**{**SMALL, "max_iter": 500}, callbacks=[Stop()]).fit(X, Y, groups=G)
    assert reg.n_iter_ == UPDATES_PER_EPOCH
