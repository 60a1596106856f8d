"""A part of `make fuzz`, and what it has found."""

from __future__ import annotations

import copy
import warnings

import fuzz
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor, adapt, adapt_predict
from sklearn_maml.data import tasks as data_tasks
from sklearn_maml.data.tasks import TaskCollection

rng = np.random.default_rng(0)
X = rng.normal(size=(36, 2))
Y = rng.normal(size=36)
G = np.repeat(np.arange(6), 6)
C = np.tile([0, 1, 2], 12)
SMALL = {
    "hidden_layer_sizes": (4,),
    "update_rule": "sgd",
    "steps": 1,
    "max_iter": 2,
    "random_state": 0,
}


@pytest.fixture(scope="module")
def reg():
    return MAMLRegressor(**SMALL).fit(X, Y, groups=G).adapt(X[:6], Y[:6])


@pytest.fixture(scope="module")
def reg32():
    return MAMLRegressor(**SMALL).fit(X.astype(np.float32), Y, groups=G).adapt(X[:6], Y[:6])


@pytest.fixture(scope="module")
def clf():
    return MAMLClassifier(**SMALL).fit(X, C % 2, groups=G).adapt(X[:6], C[:6] % 2)


def test_missing_targets_among_objects_are_refused():
    X, y = np.ones((36, 2)), np.ones((36, 2)).tolist()
    y[1][0] = None
    with pytest.raises(ValueError, match=r"y contains NaN or None, in 1 place"):
        MAMLRegressor(update_rule="sgd", steps=1, max_iter=2).fit(
            X, y, groups=np.repeat([0, 1, 2], 12)
        )


def test_features_of_a_series_of_arrays_are_counted():
    pl = pytest.importorskip("polars")
    rows = pl.Series(np.random.RandomState(0).randn(6, 4, 5))
    assert FewShotRegressor(steps=1).fit(rows, np.arange(6.0)).n_features_in_ == 4


@pytest.mark.parametrize("entry", fuzz.ENTRIES)
def test_any_call_keeps_what_is_promised_of_every_call(entry):
    # libraries that build odd arguments warn as they like; `fuzz.call` judges what comes of calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.run(entry, int(500 * fuzz.ENTRIES[entry][1]))


def spoil_numpy(X):
    np.random.random()


def spoil_rows(X):
    X[0] = 0


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda X: {}["a"], KeyError, "a"),
        (lambda X: np.full(36, np.nan), AssertionError, "not finite"),
        (lambda X: np.zeros(35), AssertionError, "35 answers to 36 rows"),
        (lambda X: warnings.warn("x", RuntimeWarning, stacklevel=1), AssertionError, "RuntimeW"),
        (lambda X: (_ for _ in ()).throw(ValueError()), AssertionError, "without a message"),
        (spoil_numpy, AssertionError, "global random state"),
        (spoil_rows, AssertionError, "X has changed"),
    ],
    ids=["error", "nan", "length", "warning", "no message", "random state", "argument"],
)
def test_the_check_of_calls_fails_where_a_promise_is_broken(reg, function, error, message):
    with pytest.raises(error, match=message):
        fuzz.call("predict", function, {"X": X.copy()}, reg)


@pytest.mark.parametrize("what", ["module_", "_state", "alpha"])
def test_the_check_of_calls_fails_where_an_estimator_has_changed(reg, what):
    model = copy.deepcopy(reg)

    def change(X):
        if what == "module_":
            with torch.no_grad():
                next(model.module_.parameters()).view(-1)[0] += 1e-6
        elif what == "_state":
            next(iter(model._state.adapted.adapted.params.values())).view(-1)[0] += 1e-6
        else:
            model.alpha = 0.5
        return reg.predict(X)

    with pytest.raises(AssertionError, match=f"changed:.*{what}"):
        fuzz.call("predict", change, {"X": X}, model)
    assert fuzz.call("predict", reg.predict, {"X": X}, model).shape == (36,)


def refused(estimator, call, message, error=ValueError):
    before = fuzz.snapshot(estimator)
    with pytest.raises(error, match=f"(?s){message}"):
        call()
    assert fuzz.snapshot(estimator) == before


# warnings are errors here, so each of these also says that numpy does not warn of an overflow


@pytest.mark.parametrize("scale", [1e155, 1e300])
def test_targets_whose_squared_errors_overflow_are_refused(reg, scale):
    message = r"y has values of up to .*e\+(155|300), whose squared errors are infinite in float64"
    for name in ("fit", "adapt"):
        model = copy.copy(reg)
        refused(model, lambda m=model, n=name: getattr(m, n)(X, Y * scale, G), message)
    refused(reg, lambda: reg.score(X, Y * scale, G), message)
    assert np.isfinite(MAMLRegressor(**SMALL).fit(X, Y * 1e140, groups=G).score(X, Y * 1e140, G))


@pytest.mark.parametrize("center_y", [False, True])
def test_targets_too_large_for_the_units_of_the_fit_are_refused(center_y):
    narrow = X.astype(np.float32)
    model = MAMLRegressor(**SMALL, center_y=center_y).fit(narrow, Y, groups=G)
    message = r"too large for float32 in units of the targets of fit.*same units"
    refused(model, lambda: adapt(model, narrow[:6], Y[:6] * 1e60), message)


def test_rows_too_large_for_the_dtype_of_the_fit_are_refused(reg32):
    for function in (reg32.predict, lambda rows: reg32.adapt(rows, Y)):
        refused(reg32, lambda f=function: f(X * 1e50), "infinity or a value too large .*float32")


@pytest.mark.parametrize("scale", [2.0**1015, 2.0**-1040])
@pytest.mark.parametrize("center_y", [False, True])
def test_only_ratios_of_weights_matter_however_large_or_small(center_y, scale):
    model = MAMLRegressor(**SMALL, center_y=center_y).fit(X, Y, groups=G)
    weight = np.arange(36) + 1.0
    expected = adapt(model, X, Y, G, sample_weight=weight).predict(X, groups=G)
    found = adapt(model, X, Y, G, sample_weight=weight * scale).predict(X, groups=G)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, adapt(model, X, Y, G).predict(X, groups=G))


def test_weights_too_large_for_the_dtype_of_the_fit_are_refused(reg32):
    message = "sample_weight contains infinity or a value too large"
    refused(reg32, lambda: adapt(reg32, X, Y, sample_weight=np.full(36, 1e50)), message)
    adapt(reg32, X[:6], Y[:6], sample_weight=np.full(6, 3e38))


@pytest.mark.parametrize("groups", [None, G])
def test_only_ratios_of_the_weights_of_a_score_matter(reg, groups):
    weight = np.arange(36) + 0.5
    expected = reg.score(X, Y, groups, sample_weight=weight)
    for scale in (2.0**1000, 2.0**-1000):
        assert reg.score(X, Y, groups, sample_weight=weight * scale) == expected
    assert reg.score(X, Y, groups) != expected
    with pytest.raises(ValueError, match=r"shape == \(3,\), expected \(36,\)"):
        reg.score(X, Y, groups, sample_weight=np.ones(3))


@pytest.mark.parametrize(
    "method", ["predict", "predict_proba", "predict_log_proba", "decision_function"]
)
def test_outputs_that_overflow_are_refused(method):
    cls = MAMLRegressor if method == "predict" else MAMLClassifier
    y = Y if method == "predict" else C
    model = cls(update_rule="sgd", module=fuzz.Residual, steps=1, max_iter=2, random_state=0).fit(
        X, y, groups=G
    )
    model.adapt(X[:6], y[:6])
    rows = X.copy()
    rows[7] *= 1e300
    message = r"outputs of 1 of 36 rows, such as row 7, are not finite in float64.*scale them"
    refused(model, lambda: getattr(model, method)(rows), message)
    rows[7] = 0
    assert getattr(model, method)(rows).shape[0] == 36


def test_predictions_that_overflow_in_the_units_of_the_targets_are_refused():
    model = MAMLRegressor(**{**SMALL, "hidden_layer_sizes": ()}).fit(X, Y * 1e100, groups=G)
    model.adapt(X[:6], Y[:6] * 1e100)
    refused(model, lambda: model.predict(X * 1e250), "36 of 36 rows.*not finite in float64")


def test_a_decision_between_two_classes_is_finite_where_the_logits_are():
    model = MAMLClassifier(n_ways=2, n_shots=1, **{**SMALL, "hidden_layer_sizes": ()})
    with torch.no_grad():
        model.fit(X, C).adapt(X[:2], ["u", "v"])
    for weight in model._state.adapted.adapted.params.values():
        weight.fill_(0)
    bias = model._state.adapted.adapted.params["0.bias"]
    bias[0, 0], bias[0, 1] = 1.5e308, -1.5e308
    found = model.decision_function(X)
    assert (found == np.finfo(np.float64).min).all()
    assert (model.predict(X) == "u").all()


def test_tensors_that_require_grad_are_refused(reg):
    rows = torch.as_tensor(X).requires_grad_()
    targets = torch.as_tensor(Y).requires_grad_()
    pipe = make_pipeline(StandardScaler(), reg)
    pipe[0].fit(X)
    few = FewShotRegressor(pipe).fit(X[:6], Y[:6])
    for name, call in (
        ("X", lambda: reg.predict(rows)),
        ("X", lambda: reg.adapt(rows, Y)),
        ("X", lambda: adapt(pipe, rows, Y)),
        ("X", lambda: FewShotRegressor(random_state=0).fit(rows, Y)),
        ("X", lambda: few.predict(rows)),
        ("y", lambda: reg.adapt(X, targets)),
        ("y", lambda: reg.score(X, targets, G)),
        ("groups", lambda: reg.adapt(X, Y, groups=targets)),
        ("groups", lambda: reg.predict(X, groups=targets)),
        ("sample_weight", lambda: reg.adapt(X, Y, sample_weight=targets)),
        ("sample_weight", lambda: reg.score(X, Y, sample_weight=targets)),
        ("sample_weight", lambda: reg.score(X, Y, G, sample_weight=targets)),
        ("y", lambda: reg.score(X, targets)),
    ):
        refused(reg, call, rf"{name} is a tensor that requires grad.*{name}\.detach", TypeError)
    expected = reg.predict(X)
    assert np.array_equal(reg.predict(rows.detach()), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_labels_that_are_no_labels_are_refused_without_warnings_of_numpy(clf, value):
    labels = (C % 2).astype(float)
    labels[3] = value
    refused(clf, lambda: clf.fit(X, labels, G), "NaN|infinity|Unknown label|not seen")


class OnlyAnArray:
    """Array by its protocol alone."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def test_objects_that_know_how_to_become_arrays_are_rows():
    expected = FewShotRegressor(random_state=0, steps=2).fit(X, Y)
    found = FewShotRegressor(random_state=0, steps=2).fit(OnlyAnArray(X), Y)
    assert found.n_features_in_ == 2
    assert np.array_equal(found.predict(OnlyAnArray(X)), expected.predict(X))
    with pytest.raises(ValueError, match="X has 1 features"):
        found.predict(OnlyAnArray(X[:, :1]))


def test_rows_without_numbers_are_refused(reg):
    for rows in (np.empty((2, 0, 2)), np.empty((2, 2, 0))):
        refused(reg, lambda r=rows: reg.fit(r, Y[:2], G[:2]), r"0 feature\(s\)")


def test_targets_without_outputs_are_refused(reg):
    refused(reg, lambda: reg.fit(X, np.empty((36, 0)), G), r"\(36, 0\)|\(shape=\(36, 0\)\)")


@pytest.mark.parametrize("groups", [None, G])
def test_sparse_targets_of_a_score_are_refused(clf, groups):
    refused(
        clf,
        lambda: clf.score(X, scipy.sparse.coo_array(C % 2), groups),
        "Sparse targets.*toarray",
        TypeError,
    )


def test_a_tensor_may_hold_the_task_column():
    rows = np.column_stack([X, G])
    expected = MAMLRegressor(**SMALL, task_column=2).fit(rows, Y).adapt(rows, Y)
    found = MAMLRegressor(**SMALL, task_column=2).fit(torch.as_tensor(rows), Y)
    found.adapt(torch.as_tensor(rows), Y)
    assert np.array_equal(found.predict(torch.as_tensor(rows)), expected.predict(rows))


def test_tasks_of_enormous_rows_have_marks():
    rows = np.sign(X) * 1e308
    tasks = TaskCollection(rows, Y, G, np.unique(G), None, "groups")
    assert tasks.fingerprints() == tasks.fingerprints()


def test_marks_of_rows_depend_on_neither_their_order_nor_their_layout(monkeypatch):
    rng = np.random.default_rng(0)
    rows, task = rng.normal(size=(60, 40)).astype(np.float32), np.repeat(np.arange(6), 10)
    marks = TaskCollection(rows, rows[:, 0], task, np.arange(6), None, "groups").fingerprints()
    assert len(set(marks.values())) == 6
    monkeypatch.setattr(data_tasks, "AT_A_TIME", 7)
    order = rng.permutation(60)
    for X in (rows, np.asfortranarray(rows)):
        tasks = TaskCollection(X[order], X[order, 0], task[order], np.arange(6), None, "groups")
        assert tasks.fingerprints() == marks


@pytest.mark.parametrize("size", [0, -1, 2.5, "a", None, True])
def test_the_size_of_a_meta_batch_must_be_a_positive_number(size):
    model = MAMLRegressor(**SMALL, iterator_train__batch_size=size)
    with pytest.raises(ValueError, match="iterator_train__batch_size is the number of tasks"):
        model.fit(X, Y, groups=G)
    assert not hasattr(model, "module_")


def test_adapt_predict_refuses_outputs_that_overflow():
    model = MAMLRegressor(
        update_rule="sgd", module=fuzz.Residual, steps=1, max_iter=2, random_state=0
    )
    model.fit(X, Y, groups=G)
    query = {"groups_support": G, "groups_query": G}
    assert np.isfinite(adapt_predict(model, X, Y, X, **query)).all()
    with pytest.raises(ValueError, match="not finite"):
        adapt_predict(model, X, Y, X * 1e300, **query)
