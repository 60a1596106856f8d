"""The task collections that are shipped with the package."""

from __future__ import annotations

import pickle
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from sklearn_maml import datasets
from sklearn_maml.datasets import (
    SinusoidTasks,
    load_omniglot,
    load_vowels,
    load_x264,
    make_sinusoid_tasks,
)

N_CHARACTERS = 1623


@pytest.fixture(scope="module")
def x264():
    return load_x264()


@pytest.fixture(scope="module")
def omniglot():
    return load_omniglot()


@pytest.fixture(scope="module")
def rotated():
    return load_omniglot(subset="evaluation", rotations=True)


def test_everything_exported_exists():
    assert all(hasattr(datasets, name) for name in datasets.__all__)


# --- x264


def test_x264_has_the_documented_shape_and_fields(x264):
    assert set(x264) == {
        "data", "target", "groups", "frame", "feature_names", "target_names", "DESCR", "filename",
    }  # fmt: skip
    assert x264.data.shape == (50250, 33)
    assert x264.data.dtype == np.float64
    assert x264.data.flags.c_contiguous
    assert x264.target.shape == (50250,)
    assert x264.target.dtype == np.float64
    assert np.isfinite(x264.data).all()
    assert np.isfinite(x264.target).all()
    assert len(x264.feature_names) == 33
    assert x264.target_names == ["log2_kbps"]
    assert x264.frame is None
    assert Path(x264.filename).is_file()
    assert "x264" in x264.DESCR


def test_x264_tasks_are_videos_that_share_their_settings(x264):
    assert x264.groups.dtype == object
    assert {type(video) for video in x264.groups} == {str}
    videos, counts = np.unique(x264.groups.astype(str), return_counts=True)
    assert len(videos) == 250
    assert set(counts) == {201}
    settings = x264.data.reshape(250, 201, 33)
    assert (settings == settings[0]).all()


def test_x264_first_row_is_the_files_first_row(x264):
    row = dict(zip(x264.feature_names, x264.data[0], strict=True))
    assert x264.groups[0] == "Animation_1080P-05f8"
    assert (row["cabac"], row["ref"], row["me_range"], row["aq-mode"]) == (0, 1, 16, 0)
    assert x264.target[0] == 14.446


def test_x264_target_selects_the_columns_in_the_order_asked(x264):
    fps = load_x264(target="log2_fps")
    both = load_x264(target=["log2_fps", "log2_kbps"])
    assert fps.target[0] == 8.4486
    assert both.target.shape == (50250, 2)
    assert both.target_names == ["log2_fps", "log2_kbps"]
    np.testing.assert_array_equal(both.target, np.column_stack([fps.target, x264.target]))


def test_x264_as_frame_holds_the_same_values(x264):
    pd = pytest.importorskip("pandas")
    bunch = load_x264(as_frame=True)
    assert list(bunch.frame.columns) == ["task", *x264.feature_names, "log2_kbps"]
    assert isinstance(bunch.data, pd.DataFrame)
    assert isinstance(bunch.target, pd.Series)
    assert isinstance(bunch.groups, pd.Series)
    assert bunch.target.name == "log2_kbps"
    assert bunch.groups.name == "task"
    np.testing.assert_array_equal(bunch.data.to_numpy(), x264.data)
    np.testing.assert_array_equal(bunch.frame["log2_kbps"].to_numpy(), x264.target)
    assert list(bunch.frame["task"]) == list(x264.groups)
    both = load_x264(target=["log2_kbps", "log2_fps"], as_frame=True)
    assert list(both.target.columns) == ["log2_kbps", "log2_fps"]


@pytest.mark.parametrize("target", ["kbps", [], ["log2_kbps", "x"], ["log2_fps"] * 2, None, 1])
def test_x264_rejects_unknown_targets(target):
    with pytest.raises(ValueError, match=r"target must be .* got .* Pass"):
        load_x264(target=target)


def test_x264_loads_in_half_a_second():
    def seconds():
        start = time.process_time()
        load_x264()
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.5


# --- Omniglot


def test_omniglot_has_the_documented_shape_and_fields(omniglot):
    assert set(omniglot) == {
        "data", "images", "target", "groups", "drawer", "evaluation", "frame", "feature_names",
        "target_names", "DESCR", "filename",
    }  # fmt: skip
    n_rows = N_CHARACTERS * 20
    assert omniglot.data.shape == (n_rows, 784)
    assert omniglot.data.dtype == np.float32
    assert set(np.unique(omniglot.data)) == {0, 1}
    assert omniglot.images.shape == (n_rows, 28, 28)
    assert np.shares_memory(omniglot.images, omniglot.data)
    assert omniglot.target.dtype == np.int64
    assert omniglot.evaluation.dtype == bool
    assert len(omniglot.feature_names) == 784
    assert len(omniglot.target_names) == len(set(omniglot.target_names)) == N_CHARACTERS
    assert Path(omniglot.filename).is_file()
    assert "Omniglot" in omniglot.DESCR


def test_omniglot_rows_are_the_drawings_of_a_character(omniglot):
    np.testing.assert_array_equal(omniglot.target, np.repeat(np.arange(N_CHARACTERS), 20))
    np.testing.assert_array_equal(omniglot.drawer, np.tile(np.arange(20), N_CHARACTERS))
    assert {type(alphabet) for alphabet in omniglot.groups} == {str}
    assert len(set(omniglot.groups)) == 50
    names = [omniglot.target_names[k] for k in omniglot.target]
    assert all(
        name.startswith(f"{alphabet}/character")
        for name, alphabet in zip(names, omniglot.groups, strict=True)
    )
    latin = [name for name in omniglot.target_names if name.startswith("Latin/")]
    assert latin == [f"Latin/character{i:02d}" for i in range(1, 27)]


def test_omniglot_pixels_are_the_files_pixels(omniglot):
    with np.load(omniglot.filename) as archive:
        packed = archive["images_packed"]
    bits = np.unpackbits(packed, axis=-1)
    np.testing.assert_array_equal(omniglot.data, bits.reshape(-1, 784))
    assert omniglot.images[25 * 20 + 3, 14, 9] == bits[25, 3, 14 * 28 + 9]


def test_omniglot_subsets_split_the_alphabets_and_keep_the_class_numbers(omniglot):
    background = load_omniglot(subset="background")
    evaluation = load_omniglot(subset="evaluation")
    assert len(background.data) == 964 * 20
    assert len(evaluation.data) == 659 * 20
    assert not background.evaluation.any()
    assert evaluation.evaluation.all()
    assert len(set(background.groups)) == 30
    assert not set(background.groups) & set(evaluation.groups)
    assert background.target_names == evaluation.target_names == omniglot.target_names
    rows = np.isin(omniglot.target, evaluation.target)
    np.testing.assert_array_equal(omniglot.data[rows], evaluation.data)
    np.testing.assert_array_equal(omniglot.groups[rows], evaluation.groups)
    np.testing.assert_array_equal(omniglot.evaluation, rows)


def test_omniglot_rotations_are_turned_drawings_in_further_classes(omniglot, rotated):
    n = 659 * 20
    assert rotated.images.shape == (4 * n, 28, 28)
    assert np.shares_memory(rotated.images, rotated.data)
    upright = omniglot.images[omniglot.evaluation]
    for turn in range(4):
        part = slice(turn * n, (turn + 1) * n)
        np.testing.assert_array_equal(rotated.images[part], np.rot90(upright, turn, axes=(1, 2)))
        np.testing.assert_array_equal(
            rotated.target[part], omniglot.target[omniglot.evaluation] + turn * N_CHARACTERS
        )
        np.testing.assert_array_equal(rotated.groups[part], omniglot.groups[omniglot.evaluation])
        np.testing.assert_array_equal(rotated.drawer[part], np.tile(np.arange(20), 659))
    assert not np.array_equal(rotated.images[0], rotated.images[n])
    assert len(rotated.target_names) == len(set(rotated.target_names)) == 4 * N_CHARACTERS
    first = rotated.target_names[rotated.target[0]]
    assert rotated.target_names[rotated.target[n]] == f"{first}/rot90"
    assert rotated.target_names[rotated.target[-1]].endswith("/rot270")


def test_omniglot_as_frame_holds_the_same_values():
    pytest.importorskip("pandas")
    arrays = load_omniglot(subset="evaluation")
    frames = load_omniglot(subset="evaluation", as_frame=True)
    assert list(frames.frame.columns) == ["task", *arrays.feature_names, "character"]
    assert (frames.data.dtypes == np.float32).all()
    assert frames.target.name == "character"
    np.testing.assert_array_equal(frames.data.to_numpy(), arrays.data)
    np.testing.assert_array_equal(frames.target.to_numpy(), arrays.target)
    assert list(frames.frame["task"]) == list(arrays.groups)


@pytest.mark.parametrize("subset", ["train", None, ["all"]])
def test_omniglot_rejects_unknown_subsets(subset):
    with pytest.raises(ValueError, match=r"subset must be one of .* got .* Pass"):
        load_omniglot(subset=subset)


# --- vowels


def test_vowels_have_the_documented_shape_and_fields():
    vowels = load_vowels()
    assert set(vowels) == {
        "data", "target", "groups", "speaker_type", "frame", "feature_names", "target_names",
        "DESCR", "filename",
    }  # fmt: skip
    assert vowels.data.shape == (1520, 4)
    assert vowels.data.dtype == np.float64
    assert vowels.data.flags.c_contiguous
    assert vowels.feature_names == ["f0", "f1", "f2", "f3"]
    assert (np.diff(vowels.data, axis=1) > 0).mean() > 0.99  # in the order of frequency
    assert sorted(vowels.target_names) == sorted(set(vowels.target))
    assert Path(vowels.filename).is_file()
    assert "Peterson" in vowels.DESCR


def test_vowels_are_each_said_twice_by_every_speaker():
    vowels = load_vowels()
    assert np.unique(vowels.groups).tolist() == list(range(1, 77))
    said = list(zip(vowels.groups, vowels.target, strict=True))
    assert len(set(said)) == 760
    assert all(said.count(pair) == 2 for pair in said[:40])
    speakers = dict(zip(vowels.groups, vowels.speaker_type, strict=True)).values()
    assert [list(speakers).count(kind) for kind in ("man", "woman", "child")] == [33, 28, 15]


def test_vowels_as_frame_hold_the_same_values():
    pytest.importorskip("pandas")
    vowels, frame = load_vowels(), load_vowels(as_frame=True).frame
    assert frame.columns.tolist() == ["task", "f0", "f1", "f2", "f3", "vowel"]
    np.testing.assert_array_equal(frame[vowels.feature_names], vowels.data)
    assert frame["vowel"].tolist() == vowels.target.tolist()


# --- all loaders


@pytest.mark.parametrize(
    "load", [load_x264, load_vowels, lambda **k: load_omniglot(subset="evaluation", **k)]
)
def test_tuples_hold_what_the_bunch_holds(load):
    bunch = load()
    X, y = load(return_X_y=True)
    X3, y3, groups = load(return_X_y_groups=True)
    for data, target in [(X, y), (X3, y3)]:
        np.testing.assert_array_equal(data, bunch.data)
        np.testing.assert_array_equal(target, bunch.target)
    np.testing.assert_array_equal(groups, bunch.groups)


@pytest.mark.parametrize(
    "load", [load_x264, load_vowels, lambda **k: load_omniglot(subset="evaluation", **k)]
)
def test_tuples_of_frames(load):
    pd = pytest.importorskip("pandas")
    X, y = load(return_X_y=True, as_frame=True)
    assert isinstance(X, pd.DataFrame)
    assert isinstance(y, pd.Series)
    groups = load(return_X_y_groups=True, as_frame=True)[2]
    assert isinstance(groups, pd.Series)
    assert X.index.equals(y.index)
    assert X.index.equals(groups.index)


@pytest.mark.parametrize("load", [load_x264, load_vowels, load_omniglot])
def test_two_kinds_of_tuple_at_once_are_rejected(load):
    with pytest.raises(ValueError, match="at most one"):
        load(return_X_y=True, return_X_y_groups=True)


def test_only_the_named_data_sets_and_their_notices_are_shipped():
    data = resources.files("sklearn_maml.datasets") / "data"
    assert {entry.name for entry in data.iterdir()} == {
        "omniglot28.npz",
        "vowels_pb52.csv.gz",
        "x264_videos.csv.gz",
        "LICENSE-omniglot.txt",
        "LICENSE-vowels.txt",
        "LICENSE-x264.txt",
    }


@pytest.mark.parametrize(
    ("notice", "holder"),
    [("omniglot", "Copyright (c) 2015 Brenden Lake"), ("x264", "Copyright (c) 2023 Luc Lesoil")],
)
def test_licence_notices_are_complete(notice, holder):
    data = resources.files("sklearn_maml.datasets") / "data"
    text = (data / f"LICENSE-{notice}.txt").read_text(encoding="utf-8")
    assert holder in text
    assert "Permission is hereby granted, free of charge" in text
    assert "The above copyright notice and this permission notice shall be included" in text
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text


def test_licence_notice_of_the_vowels_is_complete():
    data = resources.files("sklearn_maml.datasets") / "data"
    text = (data / "LICENSE-vowels.txt").read_text(encoding="utf-8")
    assert "Copyright (c) 2012, Santiago Barreda" in text
    assert "2. Redistributions in binary form must reproduce the above copyright" in text
    assert "THIS SOFTWARE IS PROVIDED BY SANTIAGO BARREDA ''AS IS''" in text


# --- sinusoids


def test_sinusoid_rows_have_the_documented_shapes_and_dtypes():
    X, y, groups = make_sinusoid_tasks(n_tasks=7, n_rows=11, random_state=0)
    assert X.shape == (77, 1)
    assert y.shape == groups.shape == (77,)
    assert X.dtype == y.dtype == np.float64
    assert groups.dtype == np.int64
    np.testing.assert_array_equal(groups, np.repeat(np.arange(7), 11))


def test_sinusoid_defaults_are_those_of_the_paper():
    X, y, groups = make_sinusoid_tasks(n_tasks=2000, n_rows=50, random_state=0)
    assert -5 <= X.min() < -4.99
    assert 4.99 < X.max() <= 5
    highest = np.array([np.abs(y[groups == task]).max() for task in range(2000)])
    assert 0.09 < highest.min() < 0.2
    assert 4.9 < highest.max() <= 5
    assert highest.mean() == pytest.approx(2.55, abs=0.1)


def test_sinusoid_targets_are_amplitude_times_shifted_sine():
    X, y, _ = make_sinusoid_tasks(4, 30, amplitude=(2, 2), phase=(0.5, 0.5), random_state=1)
    np.testing.assert_allclose(y, 2 * np.sin(X[:, 0] - 0.5), atol=1e-12)


def test_every_sinusoid_task_has_one_amplitude_and_phase_of_its_own():
    fits = []
    for X, y in SinusoidTasks(n_rows=30).sample(20, random_state=0):
        # A sin(x - p) is linear in sin x and cos x.
        basis = np.column_stack([np.sin(X[:, 0]), np.cos(X[:, 0])])
        weights, residual, *_ = np.linalg.lstsq(basis, y, rcond=None)
        assert residual[0] < 1e-20
        amplitude, phase = np.hypot(*weights), np.arctan2(-weights[1], weights[0])
        assert 0.1 <= amplitude <= 5
        assert 0 <= phase <= np.pi
        fits.append((round(amplitude, 6), round(phase, 6)))
    assert len(set(fits)) == 20


def test_sinusoid_noise_has_the_given_standard_deviation():
    settings = {"n_tasks": 500, "n_rows": 40, "amplitude": (1, 1), "phase": (0, 0)}
    X, y, _ = make_sinusoid_tasks(**settings, noise=0.3, random_state=0)
    residual = y - np.sin(X[:, 0])
    assert residual.std() == pytest.approx(0.3, rel=0.03)
    assert residual.mean() == pytest.approx(0, abs=0.01)


def test_sinusoids_are_determined_by_the_random_state():
    tasks = SinusoidTasks()
    same = [tasks.sample(3, random_state=4) for _ in range(2)]
    for (X1, y1), (X2, y2) in zip(*same, strict=True):
        np.testing.assert_array_equal(X1, X2)
        np.testing.assert_array_equal(y1, y2)
    rng = np.random.RandomState(4)
    np.testing.assert_array_equal(tasks.sample(3, rng)[0][0], same[0][0][0])
    assert not np.array_equal(tasks.sample(3, rng)[0][0], same[0][0][0])
    assert not np.array_equal(tasks.sample(3, random_state=5)[0][0], same[0][0][0])


def test_sinusoids_leave_the_global_random_state_alone_when_seeded():
    before = np.random.get_state()[1].copy()
    make_sinusoid_tasks(random_state=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_distribution_and_function_make_the_same_tasks():
    settings = {"amplitude": (1, 2), "phase": (0, 1), "x_range": (0, 1), "noise": 0.1}
    X, y, _ = make_sinusoid_tasks(6, 9, **settings, random_state=3)
    sampled = SinusoidTasks(9, **settings).sample(6, random_state=3)
    assert isinstance(sampled, list)
    assert all(Xt.shape == (9, 1) and yt.shape == (9,) for Xt, yt in sampled)
    np.testing.assert_array_equal(np.concatenate([Xt for Xt, _ in sampled]), X)
    np.testing.assert_array_equal(np.concatenate([yt for _, yt in sampled]), y)


def test_distribution_repr_rebuilds_it_and_pickling_keeps_it():
    tasks = SinusoidTasks(5, amplitude=(1, 2), noise=0.5)
    assert tasks.n_rows == 5
    rebuilt = eval(repr(tasks), {"SinusoidTasks": SinusoidTasks})
    copied = pickle.loads(pickle.dumps(tasks))
    assert vars(rebuilt) == vars(copied) == vars(tasks)
    assert vars(SinusoidTasks(5)) != vars(tasks)


def test_sampling_a_meta_batch_is_fast():
    tasks, rng = SinusoidTasks(), np.random.RandomState(0)

    def seconds():
        start = time.process_time()
        for _ in range(100):
            tasks.sample(25, rng)
        return (time.process_time() - start) / 100

    # About 30 microseconds; the slack is for slow machines, not for a loop over tasks.
    assert min(seconds() for _ in range(5)) < 300e-6


@pytest.mark.parametrize("make", [make_sinusoid_tasks, SinusoidTasks])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_rows", 0),
        ("n_rows", 2.0),
        ("n_rows", True),
        ("amplitude", 1.0),
        ("amplitude", (2, 1)),
        ("amplitude", (0, 1, 2)),
        ("phase", (0, np.inf)),
        ("phase", "ab"),
        ("x_range", (np.nan, 1)),
        ("noise", -0.1),
        ("noise", np.nan),
        ("noise", "loud"),
    ],
)
def test_bad_sinusoid_settings_say_what_was_got_and_what_to_do(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .* got .*[Pp]ass"):
        make(**{name: value})


@pytest.mark.parametrize("n_tasks", [0, -1, 1.5, "many", True])
def test_bad_numbers_of_tasks_are_rejected(n_tasks):
    with pytest.raises(ValueError, match="n_tasks must be an integer"):
        make_sinusoid_tasks(n_tasks)
    with pytest.raises(ValueError, match="n_tasks must be an integer"):
        SinusoidTasks().sample(n_tasks)


def test_numpy_numbers_and_arrays_are_accepted_as_settings():
    tasks = SinusoidTasks(np.int64(3), amplitude=np.array([1.0, 2.0]), noise=np.float32(0.5))
    assert len(tasks.sample(np.int64(2))) == 2
    assert tasks.amplitude == (1.0, 2.0)


def test_frames_without_pandas_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-maml\[compare\]'"):
        load_x264(as_frame=True)
