"""Task ids as people have them: the same values are the same tasks, through every door."""

from __future__ import annotations

import datetime
import decimal
import enum
import pickle
import uuid
import warnings
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
from numpy.testing import assert_array_equal
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sklearn_maml
import sklearn_maml.data.ids as ids_module
from sklearn_maml import Checkpoint, MAMLClassifier, MAMLRegressor, adapt_predict
from sklearn_maml.data.ids import encode_ids, find_ids, show_ids

N_TASKS, N_ROWS = 4, 6
CODES = np.tile(np.arange(N_TASKS), N_ROWS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(len(CODES), 2))
Y = X @ [1.0, -1.0] * (CODES - 1.5)
SMALL = {
    "update_rule": "sgd",
    "steps": 1,
    "hidden_layer_sizes": (4,),
    "max_iter": 1,
    "meta_batch_size": 2,
    "early_stopping": False,
    "random_state": 0,
}

DAYS = np.array(["2020-02-29", "2021-01-01", "2021-03-28", "2021-10-31"])
MOMENTS = DAYS.astype("M8[ns]")
WORDS = np.array(["a", "b", "ä", "zz"])
UUIDS = [uuid.UUID(int=k) for k in range(N_TASKS)]
SCHOOLS, CLASSES = np.array(list("uuvv")), np.array([1, 2, 1, 2])


class Shop(enum.Enum):
    NORTH = "a"
    SOUTH = "b"
    EAST = "ä"
    WEST = "zz"


def dates(rows):
    return [datetime.date.fromisoformat(day) for day in DAYS[rows].tolist()]


def zoned(rows, zone):
    zone = ZoneInfo(zone)
    return [datetime.datetime(d.year, d.month, d.day, tzinfo=zone) for d in dates(rows)]


# every family has the same ids, in the spellings of people and libraries
FAMILIES = {
    "numbers": {
        "int64": lambda k: k,
        "int8": lambda k: k.astype(np.int8),
        "float64": lambda k: k.astype(float),
        "list": lambda k: k.tolist(),
        "column of one": lambda k: k[:, None],
        "objects": lambda k: k.astype(object),
        "decimals": lambda k: [decimal.Decimal(v) for v in k.tolist()],
        "nullable": lambda k: pd.Series(k, dtype="Int64"),
        "polars": lambda k: pl.Series(k),
        "arrow": lambda k: pa.chunked_array([pa.array(k)]),
    },
    "fractions": {
        "float64": lambda k: k / 10,
        "float32": lambda k: (k / 10).astype(np.float32),
        "float16": lambda k: (k / 10).astype(np.float16),
        "decimals": lambda k: [decimal.Decimal(v) / 10 for v in k.tolist()],
        "pandas": lambda k: pd.Series((k / 10).astype(np.float32)),
    },
    "texts": {
        "array": lambda k: WORDS[k],
        "list": lambda k: WORDS[k].tolist(),
        "objects": lambda k: WORDS[k].astype(object),
        "bytes": lambda k: np.char.encode(WORDS[k]),
        "pandas": lambda k: pd.Series(WORDS[k]),
        "categories": lambda k: pd.Series(WORDS[k], dtype="category"),
        "polars": lambda k: pl.Series(WORDS[k].tolist()),
        "polars categories": lambda k: pl.Series(WORDS[k].tolist(), dtype=pl.Categorical),
        "arrow": lambda k: pa.array(WORDS[k].tolist()),
        "enum": lambda k: [list(Shop)[v] for v in k.tolist()],
    },
    "days": {
        "ns": lambda k: MOMENTS[k],
        "us": lambda k: MOMENTS[k].astype("M8[us]"),
        "s": lambda k: MOMENTS[k].astype("M8[s]"),
        "D": lambda k: DAYS[k].astype("M8[D]"),
        "dates": dates,
        "datetimes": lambda k: [datetime.datetime.fromisoformat(day) for day in DAYS[k].tolist()],
        "time stamps": lambda k: [pd.Timestamp(day) for day in DAYS[k].tolist()],
        "pandas": lambda k: pd.Series(MOMENTS[k]),
        "pandas seconds": lambda k: pd.Series(MOMENTS[k].astype("M8[s]")),
        "index": lambda k: pd.DatetimeIndex(MOMENTS[k]),
        "pandas zone": lambda k: pd.Series(MOMENTS[k]).dt.tz_localize("Europe/Berlin"),
        "zone": lambda k: zoned(k, "Europe/Berlin"),
        "utc": lambda k: zoned(k, "UTC"),
        "polars dates": lambda k: pl.Series(dates(k)),
        "polars": lambda k: pl.Series(MOMENTS[k]),
        "polars zone": lambda k: pl.Series(MOMENTS[k]).dt.replace_time_zone("Europe/Berlin"),
        "arrow": lambda k: pa.array(MOMENTS[k]),
    },
    "uuids": {
        "objects": lambda k: [UUIDS[v] for v in k.tolist()],
        "texts": lambda k: [str(UUIDS[v]) for v in k.tolist()],
    },
    "months": {
        "index": lambda k: pd.PeriodIndex(DAYS[k], freq="M"),
        "series": lambda k: pd.Series(pd.PeriodIndex(DAYS[k], freq="M")),
        "list": lambda k: [pd.Period(day, "M") for day in DAYS[k].tolist()],
    },
    "durations": {
        "numpy": lambda k: k.astype("m8[h]"),
        "python": lambda k: [datetime.timedelta(hours=v) for v in k.tolist()],
        "pandas": lambda k: pd.Series(k.astype("m8[h]").astype("m8[ns]")),
    },
    "pairs": {
        "tuples": lambda k: [(s, c) for s, c in zip(*parts(k), strict=True)],
        "lists": lambda k: [[s, c] for s, c in zip(*parts(k), strict=True)],
        "frame": lambda k: pd.DataFrame(dict(zip("sc", parts(k), strict=True))),
        "polars frame": lambda k: pl.DataFrame(dict(zip("sc", parts(k), strict=True))),
        "struct": lambda k: pl.DataFrame(dict(zip("sc", parts(k), strict=True))).to_struct(),
        "levels": lambda k: pd.MultiIndex.from_arrays(list(parts(k))),
        "objects": lambda k: np.array([SCHOOLS[k], CLASSES[k]], dtype=object).T,
        "arrow": lambda k: pa.table(dict(zip("sc", parts(k), strict=True))),
    },
    "pairs of a day": {
        "frame": lambda k: pd.DataFrame({"s": SCHOOLS[k], "d": MOMENTS[k]}),
        "tuples": lambda k: list(zip(SCHOOLS[k].tolist(), dates(k), strict=True)),
        "zone": lambda k: list(zip(SCHOOLS[k].tolist(), zoned(k, "Asia/Tokyo"), strict=True)),
    },
}
KINDS = {
    f"{family}: {kind}": make for family, kinds in FAMILIES.items() for kind, make in kinds.items()
}


def parts(k):
    return SCHOOLS[k].tolist(), CLASSES[k].tolist()


def frame_of(ids):
    """A frame with the ids in columns, and the names of these."""
    if isinstance(ids, (pl.Series, pl.DataFrame)):
        ids = ids if isinstance(ids, pl.DataFrame) else ids.rename("task").to_frame()
        return pl.DataFrame(X, schema=["x", "z"]).hstack(ids), ids.columns
    if isinstance(ids, (pa.Array, pa.ChunkedArray, pa.Table)):
        ids = ids.to_pandas()
    if isinstance(ids, pd.MultiIndex):
        ids = ids.to_frame(index=False, name=["s", "c"])
    if not isinstance(ids, pd.DataFrame):
        if getattr(ids, "ndim", 1) == 2:
            return frame_of(pd.DataFrame(ids, columns=list("sc")[: ids.shape[1]]))
        column = ids if isinstance(ids, pd.Series) else pd.Series(ids)
        ids = column.rename("task").to_frame()
    return ids.assign(x=X[:, 0], z=X[:, 1]), list(ids.columns)


def through_groups(ids, _):
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=ids)
    assert reg.n_tasks_ == N_TASKS
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SeenTaskWarning: the rows are those of the fit
        assert np.isfinite(reg.score(X, Y, groups=ids))
    return reg.adapt(X, Y, groups=ids).predict(X, groups=ids)


def through_a_column(ids, _):
    frame, names = frame_of(ids)
    column = names[0] if len(names) == 1 else names
    reg = MAMLRegressor(**SMALL, task_column=column).fit(frame, Y)
    assert reg.n_tasks_ == N_TASKS
    return reg.adapt(frame, Y).predict(frame)


def through_a_file(ids, tmp_path):
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=ids).adapt(X, Y, groups=ids)
    reg.save(tmp_path / "model")
    same = sklearn_maml.load(tmp_path / "model")
    assert_array_equal(same.tasks_, reg.tasks_)
    assert same.tasks_.dtype == reg.tasks_.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.score(X, Y, groups=ids)
    return same.predict(X, groups=ids)


def through_a_checkpoint(ids, tmp_path):
    reg = MAMLRegressor(**SMALL, callbacks=[Checkpoint(tmp_path / "checkpoint")])
    reg.fit(X, Y, groups=ids)
    again = MAMLRegressor(**SMALL, callbacks=[Checkpoint(tmp_path / "checkpoint")])
    again.fit(X, Y, groups=ids)  # takes up where the first has ended
    return again.adapt(X, Y, groups=ids).predict(X, groups=ids)


def through_partitions(ids, _):
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=ids)
    return adapt_predict(reg, X, Y, X, groups_support=ids, groups_query=ids, tasks_per_partition=3)


def through_routing(ids, _):
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(
            StandardScaler(with_mean=False, with_std=False), MAMLRegressor(**SMALL)
        )
        pipe.fit(X, Y, groups=ids)
        adapted = sklearn_maml.adapt(pipe, X, Y, groups=ids)
        return adapted.predict(X, groups=ids)


DOORS = {
    "groups": through_groups,
    "column": through_a_column,
    "file": through_a_file,
    "checkpoint": through_a_checkpoint,
    "partitions": through_partitions,
    "routing": through_routing,
}


@pytest.fixture(scope="module")
def expected():
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=CODES)
    return reg.adapt(X, Y, groups=CODES).predict(X, groups=CODES)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind_pass_every_door(kind, door, expected, tmp_path):
    # ids are in the order of the tasks, so that the numbers are those of the tasks 0, 1, ...
    assert_array_equal(DOORS[door](KINDS[kind](CODES), tmp_path), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_the_same_value_are_the_same_task_however_they_are_spelt(family, expected):
    kinds = FAMILIES[family]
    first = next(iter(kinds.values()))
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=first(CODES)).adapt(X, Y, groups=first(CODES))
    for make in kinds.values():
        assert_array_equal(reg.predict(X, groups=make(CODES)), expected)
        reg.score(X, Y, groups=make(CODES))  # warns of tasks that are known with other rows
        other = MAMLRegressor(**SMALL).fit(X, Y, groups=make(CODES))
        other.adapt(X, Y, groups=make(CODES))
        assert_array_equal(other.predict(X, groups=first(CODES)), expected)


def test_moments_are_the_same_in_every_time_zone():
    summer = pd.DatetimeIndex(["2021-06-01 12:00", "2021-06-02"], tz="Europe/Berlin")
    known, _ = encode_ids(summer, 2)
    tokyo, _ = encode_ids(summer.tz_convert("Asia/Tokyo"), 2)
    assert_array_equal(find_ids(tokyo, known), [0, 1])
    # where the same clock shows another moment it is another task
    same_clock, _ = encode_ids(summer.tz_localize(None).tz_localize("Asia/Tokyo"), 2)
    assert_array_equal(find_ids(same_clock, known), [-1, -1])
    # the hour that the clock shows twice is two tasks
    twice = pd.DatetimeIndex(["2021-10-31 02:30"] * 2).tz_localize(
        "Europe/Berlin", ambiguous=[True, False]
    )
    assert len(encode_ids(twice, 2)[0]) == 2


def test_ids_are_looked_up_in_what_adapt_has_made(monkeypatch):
    """Their number costs time once, not with every prediction or row that is added."""
    seen, original = [], ids_module.keys_of
    monkeypatch.setattr(ids_module, "keys_of", lambda ids: seen.append(len(ids)) or original(ids))
    names = np.array([f"task {j}" for j in range(N_TASKS)])
    model = MAMLRegressor(**{**SMALL, "update_rule": "gaussian-head"})
    model.fit(X, Y, groups=names[CODES]).adapt(X, Y, groups=names[CODES])
    model.predict(X[:1], groups=names[:1])
    seen.clear()
    model.predict(X[:1], groups=names[:1])
    model.adapt(X[:1], Y[:1], groups=names[:1], extend=True)
    model.predict(X[:2], groups=names[:2])
    twin = pickle.loads(pickle.dumps(model))
    assert seen == [1, 1, 2]
    assert_array_equal(twin.predict(X, groups=names[CODES]), model.predict(X, groups=names[CODES]))


def test_dates_keep_the_digits_that_they_have():
    close = np.array(["2021-01-01T00:00:00.000000001", "2021-01-01T00:00:00.000000002"], "M8[ns]")
    ids, _ = encode_ids(close, 2)
    assert_array_equal(ids, close)
    assert_array_equal(find_ids(ids, encode_ids(["2021-01-01"], 1)[0]), [-1, -1])
    with pytest.raises(ValueError, match="time zone and parts of a microsecond"):
        encode_ids(pd.DatetimeIndex(close, tz="UTC"), 2)
    far = np.array(["1066-10-14", "9999-12-31"], "M8[D]")  # no date of nanoseconds
    assert_array_equal(encode_ids(far, 2)[0], far)


def test_numbers_and_texts_of_them_are_different_ids():
    ids, codes = encode_ids([1, "1", 1.0, "a"], 4)
    assert_array_equal(codes, [0, 1, 0, 2])
    assert [type(value) for value in ids] == [int, str, str]
    pairs, _ = encode_ids([("a", 1), ("a", "1")], 2)
    assert set(pairs.tolist()) == {("a", 1), ("a", "1")}


@pytest.mark.parametrize(
    "ids",
    [
        [2**63 + 5, 2**63 + 6, 1, 0],  # hashes of 64 bits
        [2**63 + 5, 2**63 + 6, -1, 0],
        [np.uint64(2**63 + 5), np.uint64(2**63 + 6), np.int64(-1), np.int64(0)],
        [2**53, 2**53 + 1, 0.5, 1],
    ],
    ids=["unsigned", "signed", "of numpy", "beside fractions"],
)
def test_large_whole_numbers_in_a_list_stay_apart(ids):
    distinct, codes = encode_ids(ids, 4)
    assert [distinct[code] for code in codes] == ids
    assert len({*codes.tolist()}) == 4


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        (MOMENTS, "[2020-02-29, 2021-01-01, 2021-03-28]"),
        (
            np.array(["2021-01-01T10:20:30", "2021-01-01T10:00:00.5"], "M8[ms]"),
            "[2021-01-01T10:00:00.5, 2021-01-01T10:20:30]",
        ),
        (["b", "a"], "['a', 'b']"),
        ([("a", 2), ("a", 1)], "[('a', 1), ('a', 2)]"),
        (pd.DatetimeIndex(["2021-01-01"], tz="Europe/Berlin"), "[2021-01-01T00:00:00+01:00]"),
    ],
    ids=["days", "times", "texts", "pairs", "zone"],
)
def test_messages_show_ids_as_people_write_them(ids, shown):
    assert show_ids(encode_ids(ids, len(ids))[0]) == shown


def test_an_unknown_day_is_named_as_a_day():
    days = KINDS["days: pandas"](CODES)
    reg = MAMLRegressor(**SMALL).fit(X, Y, groups=days).adapt(X, Y, groups=days)
    with pytest.raises(ValueError, match=r"not adapted to, such as \[2021-01-02\]"):
        reg.predict(X[:1], groups=[datetime.date(2021, 1, 2)])
    with pytest.raises(ValueError, match=r"without support rows, such as \[2021-01-02\]"):
        adapt_predict(
            reg, X, Y, X[:1], groups_support=days, groups_query=[datetime.date(2021, 1, 2)]
        )


MISSING = {
    "NaN beside texts": ["a", np.nan, "b"],
    "None beside texts": ["a", None, "b"],
    "NA": pd.Series([1, None, 2], dtype="Int64"),
    "NaT": pd.Series(pd.to_datetime(["2021-01-01", None, "2021-01-02"])),
    "polars": pl.Series([1, None, 2]),
    "polars date": pl.Series([datetime.date(2021, 1, 1), None, None]),
    "arrow": pa.array([1, None, 2]),
    "masked": np.ma.array([1, 2, 3], mask=[False, True, False]),
    "in a pair": [("a", 1), ("a", None), ("b", 1)],
    "in a level": pd.MultiIndex.from_arrays([["a", None, "b"], [1, 2, 3]]),
    "in a frame": pd.DataFrame({"s": ["a", "b", "c"], "c": [1, np.nan, 2]}),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_ids_are_refused(name):
    with pytest.raises(ValueError, match="groups contains missing values"):
        MAMLRegressor(**SMALL).fit(X[:3], Y[:3], groups=MISSING[name])


REFUSED = {
    "text": ("shop", r"got the text .shop.*set task_column=.shop."),
    "dict": ({"a": 1}, "got a dict"),
    "generator": ((v for v in range(3)), "got a generator"),
    "objects": ([object()] * 3, "ids of type object.*give str"),
    "cube": (np.zeros((3, 1, 1)), r"got shape \(3, 1, 1\)"),
    "no part": (np.zeros((3, 0)), r"got shape \(3, 0\)"),
    "bytes": (np.array([b"\xff", b"a", b"b"]), "no UTF-8"),
    "short": (pd.DataFrame({"s": [1, 2], "c": [1, 2]}), "got 2 ids for 3 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_id_of_each_row_is_refused(name):
    ids, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        MAMLRegressor(**SMALL).fit(X[:3], Y[:3], groups=ids)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([7, 3, 7, 5], dtype=np.uint8),
        np.array([-2, 4, -2, 0, 1]),
        np.array([10**15, -3, 10**15]),
        np.array([2**64 - 1, 2**64 - 3, 2**64 - 1], dtype=np.uint64),
        np.array([-(2**63), 2**63 - 1]),
        np.array([], dtype=np.int64),
    ],
)
def test_whole_numbers_are_told_apart_whether_they_are_close_together_or_not(ids):
    distinct, codes = encode_ids(ids, len(ids))
    expected, places = np.unique(ids, return_inverse=True)
    assert distinct.tolist() == expected.tolist()
    assert codes.tolist() == places.tolist()


def test_a_missing_label_beside_texts_is_no_class():
    for y in (["a", np.nan, "b"], ["a", None, "b"], [("a"), float("nan"), "a"]):
        with pytest.raises(ValueError, match="y contains missing labels"):
            MAMLClassifier(**SMALL).fit(X[:3], y, groups=[0, 0, 0])
        with pytest.raises(ValueError, match="y contains missing labels"):
            MAMLClassifier(**SMALL).fit([(X[:3], y)])


def test_several_columns_of_an_array_are_the_id():
    rows = np.c_[X, CLASSES[CODES], CODES // 2]
    reg = MAMLRegressor(**SMALL, task_column=[2, -1]).fit(rows, Y)
    assert reg.n_features_in_ == 4
    assert_array_equal(reg.tasks_.tolist(), [(1, 0), (1, 1), (2, 0), (2, 1)])
    assert np.isfinite(reg.adapt(rows, Y).predict(rows)).all()
    scores = cross_validate(reg, rows, Y, cv=GroupKFold(2), groups=CODES)
    assert np.isfinite(scores["test_score"]).all()


def test_levels_of_the_index_and_columns_together_are_the_id():
    frame = pd.DataFrame(X, columns=["x", "z"]).assign(level=CLASSES[CODES])
    frame.index = pd.Index(SCHOOLS[CODES], name="school")
    reg = MAMLRegressor(**SMALL, task_column=["school", "level"]).fit(frame, Y)
    assert reg.tasks_.tolist() == [("u", 1), ("u", 2), ("v", 1), ("v", 2)]
    columns = frame.reset_index()
    by_tuple = MAMLRegressor(**SMALL, task_column=("school", "level")).fit(columns, Y)
    assert_array_equal(by_tuple.tasks_, reg.tasks_)
    twice = pd.DataFrame(np.c_[X, CODES, CODES], columns=["x", "z", "task", "task"])
    with pytest.raises(ValueError, match="names 2 columns of X"):
        MAMLRegressor(**SMALL, task_column="task").fit(twice, Y)
