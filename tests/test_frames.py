"""Data frames as people have them, and parameters as tuners and skorch have them."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_maml import FewShotRegressor, MAMLClassifier, MAMLRegressor, adapt_predict

TASK = np.repeat(np.arange(5), 8)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(len(TASK), 2))
Y = (X * RNG.normal(size=(5, 2))[TASK]).sum(1)
FRAME = pd.DataFrame(X, columns=["x", "z"]).assign(task=TASK)
SMALL = {
    "update_rule": "sgd",
    "steps": 1,
    "hidden_layer_sizes": (4,),
    "max_iter": 2,
    "n_shots": 3,
    "early_stopping": False,
    "random_state": 0,
}
LETTERS = np.array(["a", "b"])[TASK % 2]
DAY = pd.Timestamp("2021-01-01")


def by_column(frame, column="task"):
    reg = MAMLRegressor(**SMALL, task_column=column).fit(frame, Y)
    return reg.adapt(frame, Y).predict(frame)


@pytest.fixture(scope="module")
def expected():
    return by_column(FRAME)


def columns(*names):
    return pd.DataFrame(np.c_[X, TASK], columns=pd.Index(names))


LEVELS = pd.MultiIndex.from_tuples([("size", "x"), ("size", "z"), ("task", "")])
ACCEPTED = {
    "pandas": (FRAME, "task"),
    "polars": (pl.DataFrame(FRAME), "task"),
    "arrow": (pa.table(FRAME), "task"),
    "numbers": (columns(0, 1, 2), 2),
    "levels": (FRAME.set_axis(LEVELS, axis=1), ("task", "")),
    "top level": (FRAME.set_axis(LEVELS, axis=1), "task"),
    "nullable": (FRAME.convert_dtypes(), "task"),
    "arrow types": (FRAME.convert_dtypes(dtype_backend="pyarrow"), "task"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_frames_of_every_kind_have_the_task_column(name, expected):
    frame, column = ACCEPTED[name]
    assert_array_equal(by_column(frame, column), expected)


def test_frames_of_narwhals_are_those_in_them(expected):
    narwhals = pytest.importorskip("narwhals")
    assert_array_equal(by_column(narwhals.from_native(pl.DataFrame(FRAME))), expected)


def test_tables_of_arrow_are_taken_wherever_frames_are(expected):
    table = pa.table(FRAME)
    reg = MAMLRegressor(**SMALL, task_column="task").fit(table, Y)
    assert_array_equal(reg.feature_names_in_, ["x", "z", "task"])
    assert_array_equal(adapt_predict(reg, table, Y, table), expected)
    plain = MAMLRegressor(**SMALL)
    parts = [(pa.table(FRAME[["x", "z"]][j == TASK]), Y[j == TASK]) for j in range(5)]
    plain.fit(parts).adapt(parts)
    assert_array_equal(np.concatenate(plain.predict([part for part, _ in parts])), expected)


REFUSED = {
    "twice": (columns("x", "x", "task"), ValueError, r"several columns of the same name: \['x'\]"),
    "mixed names": (
        columns("x", 1, "task"),
        TypeError,
        r"names of several types: \['int', 'str'\]",
    ),
    "lazy": (pl.DataFrame(FRAME).lazy(), TypeError, r"Pass X\.collect\(\)"),
    "texts": (FRAME.assign(kind=LETTERS), ValueError, r"'kind' \(str.*OneHotEncoder"),
    "categories": (
        FRAME.assign(kind=pd.Categorical(LETTERS)),
        ValueError,
        r"'kind' \(category\).*OneHotEncoder or OrdinalEncoder",
    ),
    "objects": (FRAME.assign(kind=[[1, 2]] * 40), ValueError, r"'kind' \(object\)"),
    "polars texts": (
        pl.DataFrame(FRAME.assign(kind=LETTERS)),
        ValueError,
        r"'kind' \(String\).*OneHotEncoder",
    ),
    "dates": (FRAME.assign(day=DAY), ValueError, r"'day' \(datetime64.*FunctionTransformer"),
    "polars dates": (pl.DataFrame(FRAME.assign(day=DAY)), ValueError, r"'day' \(Datetime"),
    "durations": (FRAME.assign(day=DAY - DAY), ValueError, r"'day' \(timedelta64"),
    "infinite": (FRAME.assign(n=np.inf), ValueError, r"infinity .*in the columns \['n'\]"),
    "missing": (
        FRAME.assign(n=pd.array([None, *range(39)], dtype="Int64")),
        ValueError,
        r"Input X contains NaN in the columns \['n'\].*SimpleImputer",
    ),
    "polars missing": (
        pl.DataFrame(FRAME).with_columns(n=pl.Series([None, *range(39)])),
        ValueError,
        r"Input X contains NaN in the columns \['n'\]",
    ),
    "polars NaN": (
        pl.DataFrame(FRAME).with_columns(n=pl.Series([np.nan] * 40)),
        ValueError,
        r"Input X contains NaN in the columns \['n'\]",
    ),
}


@pytest.mark.parametrize("door", ["groups", "column", "predict"])
@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_are_no_features_are_named_with_what_to_do(name, door):
    frame, error, message = REFUSED[name]
    call = {
        "groups": lambda: MAMLRegressor(**SMALL).fit(frame, Y, groups=TASK),
        "column": lambda: MAMLRegressor(**SMALL, task_column="task").fit(frame, Y),
        "predict": lambda: ready().predict(frame),
    }[door]
    with pytest.raises(error, match=message):
        call()


@functools.cache
def ready():
    reg = MAMLRegressor(**SMALL, task_column="task").fit(FRAME, Y)
    return reg.adapt(FRAME, Y)


def test_a_task_column_of_dates_or_texts_is_no_feature(expected):
    days = FRAME.assign(task=DAY + pd.to_timedelta(TASK, unit="D"))
    assert_array_equal(by_column(days), expected)
    assert_array_equal(by_column(FRAME.assign(task=np.array(list("abcde"))[TASK])), expected)


def test_a_task_column_that_a_transformer_renamed_is_found_by_its_new_name():
    scale = make_column_transformer((StandardScaler(), ["x", "z"]), ("passthrough", ["task"]))
    named = scale.set_output(transform="pandas")
    with pytest.raises(
        ValueError, match=r"renamed it to 'passthrough__task'.*would change the ids"
    ):
        make_pipeline(named, MAMLRegressor(**SMALL, task_column="task")).fit(FRAME, Y)
    scale.set_output(transform="default")
    with pytest.raises(ValueError, match=r"\.set_output\(transform='pandas'\)"):
        make_pipeline(scale, MAMLRegressor(**SMALL, task_column="task")).fit(FRAME, Y)


# -- parameters of tuners ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["steps", "adapt_steps", "n_shots", "n_queries", "meta_batch_size", "max_iter"],
)
@pytest.mark.parametrize("kind", [float, np.float64])
def test_integers_that_a_tuner_gives_as_floats_are_integers(name, kind):
    exact = MAMLRegressor(**{**SMALL, name: 3}).fit(X, Y, groups=TASK)
    reg = MAMLRegressor(**{**SMALL, name: kind(3)}).fit(X, Y, groups=TASK)
    assert type(getattr(reg, name)) is kind  # as it was given
    assert reg.score(X, Y, groups=TASK) == exact.score(X, Y, groups=TASK)
    with pytest.raises(ValueError, match=f"'{name}' parameter.*must be an int"):
        MAMLRegressor(**{**SMALL, name: 3.5}).fit(X, Y, groups=TASK)


@pytest.mark.parametrize("rule", ["sgd", "gaussian-head"])
@pytest.mark.parametrize("sizes", [4.0, (4.0,), np.array([4.0])], ids=["one", "tuple", "array"])
def test_sizes_of_layers_that_a_tuner_gives_as_floats_are_integers(rule, sizes):
    params = {**SMALL, "update_rule": rule}
    exact = MAMLRegressor(**params).fit(X, Y, groups=TASK)
    reg = MAMLRegressor(**{**params, "hidden_layer_sizes": sizes}).fit(X, Y, groups=TASK)
    assert reg.score(X, Y, groups=TASK) == exact.score(X, Y, groups=TASK)
    with pytest.raises(ValueError, match="hidden_layer_sizes must be positive integers"):
        MAMLRegressor(**{**params, "hidden_layer_sizes": (4.5,)}).fit(X, Y, groups=TASK)


def test_other_integers_and_few_shot_steps_too():
    exact = {"n_iter_no_change": 2, "engine__max_tasks_in_memory": 2, "early_stopping": True}
    models = [
        MAMLRegressor(**{**SMALL, **exact, "max_iter": 60, **other}).fit(X, Y, groups=TASK)
        for other in ({}, {"n_iter_no_change": 2.0, "engine__max_tasks_in_memory": 2.0})
    ]
    assert models[0].n_iter_ == models[1].n_iter_
    labels = (Y > 0).astype(int)
    MAMLClassifier(**{**SMALL, "n_shots": 1, "n_queries": 1, "n_ways": 2.0}).fit(
        X, labels, groups=TASK
    )
    few = [FewShotRegressor(models[0], steps=n).fit(X[:8], Y[:8]).predict(X) for n in (3, 3.0)]
    assert_array_equal(*few)


# -- modules -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, in_features=2, hidden=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.layers(x)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LazyLinear(4), nn.LazyLinear(1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


NO_MODULES = {
    "partial": (functools.partial(Net, hidden=5), r"Pass module=Net, module__hidden=5\."),
    "function": (lambda: Net(), "wrap it in a torch.nn.Module class, or pass the network"),
    "text": ("mlp", "leave module out, and set hidden_layer_sizes"),
}


@pytest.mark.parametrize("name", NO_MODULES)
def test_what_builds_a_module_is_refused_with_the_way_to_give_it(name):
    module, message = NO_MODULES[name]
    with pytest.raises(ValueError, match=message):
        MAMLRegressor(**SMALL, module=module).fit(X, Y, groups=TASK)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_module_of_torchscript_is_refused_with_the_way_out():
    module = torch.jit.script(nn.Sequential(nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"TorchScript.*Pass the torch\.nn\.Module"):
        MAMLRegressor(**SMALL, module=module).fit(X, Y, groups=TASK)


@pytest.mark.parametrize("rule", ["sgd", "auto"])
@pytest.mark.parametrize(
    "module", [Lazy, Lazy(), nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(1))]
)
def test_lazy_layers_take_the_features_that_there_are(module, rule, tmp_path):
    params = {**SMALL, "update_rule": rule, "module": module}
    reg = MAMLRegressor(**params).fit(X, Y, groups=TASK).adapt(X[:8], Y[:8])
    reg.save(tmp_path / "model")
    same = MAMLRegressor.load(tmp_path / "model", module=module)
    assert_array_equal(same.predict(X), reg.predict(X))
