"""Loaders of the task collections that are shipped with the package."""

from __future__ import annotations

import gzip
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import Bunch

if TYPE_CHECKING:
    from collections.abc import Sequence

_X264_TARGETS = ("log2_kbps", "log2_fps")
_OMNIGLOT_SUBSETS = ("all", "background", "evaluation")


def _data_file(name: str) -> str:
    return str(resources.files(__package__) / "data" / name)


def _description(name: str) -> str:
    return (resources.files(__package__) / "descr" / name).read_text(encoding="utf-8")


def _check_returns(return_X_y: bool, return_X_y_groups: bool) -> None:
    if return_X_y and return_X_y_groups:
        raise ValueError(
            "return_X_y and return_X_y_groups are both True, expected at most one of them. "
            "Keep return_X_y_groups=True to get (data, target, groups)."
        )


def _finish(
    bunch: Bunch,
    target_columns: list[str],
    return_X_y: bool,
    return_X_y_groups: bool,
    as_frame: bool,
) -> Any:
    """Give the arrays of `bunch` the form that the caller asked for."""
    if as_frame:
        # Optional dependency: needed for nothing but this.
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "as_frame=True gives pandas data frames, and pandas is not installed. Install it "
                "with pip install 'sklearn-maml[compare]', or use as_frame=False."
            ) from error

        data = pd.DataFrame(bunch.data, columns=bunch.feature_names)
        groups = pd.Series(bunch.groups, name="task")
        targets = pd.DataFrame(bunch.target, columns=target_columns)
        target = targets if bunch.target.ndim == 2 else targets[target_columns[0]]
        if not (return_X_y or return_X_y_groups):
            bunch.frame = pd.concat([groups, data, targets], axis=1)
        bunch.update(data=data, target=target, groups=groups)
    if return_X_y:
        return bunch.data, bunch.target
    if return_X_y_groups:
        return bunch.data, bunch.target, bunch.groups
    return bunch


def load_x264(
    *,
    target: str | Sequence[str] = "log2_kbps",
    return_X_y: bool = False,
    return_X_y_groups: bool = False,
    as_frame: bool = False,
) -> Any:
    """Load the x264 video encoding measurements (regression, one task per video).

    How large and how fast an encoder is at 201 settings of its options, on each of 250
    videos. All videos share the same settings, in the same order.

    =================   ==============
    Tasks                          250
    Rows per task                  201
    Rows                        50,250
    Features                        33
    =================   ==============

    Parameters
    ----------
    target : {"log2_kbps", "log2_fps"} or list of these, default="log2_kbps"
        What to predict: the bitrate, the speed, or with a list both as two columns.
    return_X_y : bool, default=False
        If True, return `(data, target)` instead of a Bunch.
    return_X_y_groups : bool, default=False
        If True, return `(data, target, groups)` instead of a Bunch.
    as_frame : bool, default=False
        If True, data, target and groups are pandas objects. Needs pandas.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the following attributes.

        data : {ndarray, DataFrame} of shape (50250, 33)
            The encoder options, float64.
        target : {ndarray, Series, DataFrame} of shape (50250,) or (50250, 2)
            The regression target, float64.
        groups : {ndarray, Series} of shape (50250,)
            The video of each row.
        frame : DataFrame of shape (50250, 35) or None
            Only with `as_frame=True`: the column `task`, the features, the target(s).
        feature_names : list of str
            The names of the encoder options.
        target_names : list of str
            The names of the targets.
        DESCR : str
            The description of the data set.
        filename : str
            The path of the data file.

    (data, target) : tuple if `return_X_y` is True
        The first two of these.

    (data, target, groups) : tuple if `return_X_y_groups` is True
        The first three of these.

    Examples
    --------
    >>> from sklearn_maml.datasets import load_x264
    >>> X, y, groups = load_x264(return_X_y_groups=True)
    >>> X.shape, y.shape
    ((50250, 33), (50250,))
    >>> groups[0]
    'Animation_1080P-05f8'
    """
    names = [target] if isinstance(target, str) else target
    if (
        not isinstance(names, (list, tuple))
        or not names
        or any(n not in _X264_TARGETS for n in names)
        or len(set(names)) < len(names)
    ):
        raise ValueError(
            f"target must be 'log2_kbps', 'log2_fps' or a list of both, got {target!r}. "
            "Pass target=['log2_kbps', 'log2_fps'] for two columns."
        )
    _check_returns(return_X_y, return_X_y_groups)

    filename = _data_file("x264_videos.csv.gz")
    with gzip.open(filename, "rt", encoding="utf-8") as file:
        header = file.readline().rstrip("\n").split(",")
        rows = [line.partition(",") for line in file]
    values = np.loadtxt([row[2] for row in rows], delimiter=",")
    n_features = len(header) - 1 - len(_X264_TARGETS)
    columns = [header.index(n) - 1 for n in names]
    bunch = Bunch(
        data=np.ascontiguousarray(values[:, :n_features]),
        target=values[:, columns[0]].copy() if isinstance(target, str) else values[:, columns],
        groups=np.array([row[0] for row in rows], dtype=object),
        frame=None,
        feature_names=header[1 : 1 + n_features],
        target_names=list(names),
        DESCR=_description("x264.rst"),
        filename=filename,
    )
    return _finish(bunch, list(names), return_X_y, return_X_y_groups, as_frame)


def load_omniglot(
    *,
    subset: str = "all",
    rotations: bool = False,
    return_X_y: bool = False,
    return_X_y_groups: bool = False,
    as_frame: bool = False,
) -> Any:
    """Load the Omniglot handwritten characters (few-shot classification).

    1,623 characters of 50 alphabets, each drawn once by 20 people, as 28 x 28 binary
    images. A character keeps its number and name in every subset.

    ==================   ==============
    Classes                       1,623
    Rows per class                   20
    Rows                         32,460
    Features                        784
    Groups (alphabets)               50
    ==================   ==============

    Parameters
    ----------
    subset : {"all", "background", "evaluation"}, default="all"
        All alphabets, or those of one side of the authors' split: 30 alphabets with 964
        characters, 20 with 659.
    rotations : bool, default=False
        If True, each character turned counter-clockwise by 90, 180 and 270 degrees is
        added as a class of its own, as is usual for few-shot learning. Takes 400 MB for
        all alphabets, four times as much as without.
    return_X_y : bool, default=False
        If True, return `(data, target)` instead of a Bunch.
    return_X_y_groups : bool, default=False
        If True, return `(data, target, groups)` instead of a Bunch.
    as_frame : bool, default=False
        If True, data, target and groups are pandas objects. Needs pandas.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the following attributes.

        data : {ndarray, DataFrame} of shape (n_rows, 784)
            The pixels as float32, 1 where there is ink and 0 elsewhere.
        images : ndarray of shape (n_rows, 28, 28)
            The same pixels as images.
        target : {ndarray, Series} of shape (n_rows,)
            The class: the character's number 0 to 1622, plus 1623 for each quarter turn.
        groups : {ndarray, Series} of shape (n_rows,)
            The alphabet of each row.
        drawer : ndarray of shape (n_rows,)
            Which of the character's 20 drawings this is, 0 to 19.
        evaluation : ndarray of shape (n_rows,)
            True for rows of the authors' evaluation alphabets.
        frame : DataFrame of shape (n_rows, 786) or None
            Only with `as_frame=True`: the column `task` (the alphabet), the pixels, the
            column `character`.
        feature_names : list of str
            `pixel_0_0` to `pixel_27_27`, row and column.
        target_names : list of str
            The name of each class, whatever the subset: `target_names[k]` for target `k`,
            such as `Greek/character03` or `Greek/character03/rot90`.
        DESCR : str
            The description of the data set.
        filename : str
            The path of the data file.

    (data, target) : tuple if `return_X_y` is True
        The first two of these.

    (data, target, groups) : tuple if `return_X_y_groups` is True
        The first three of these.

    Examples
    --------
    >>> from sklearn_maml.datasets import load_omniglot
    >>> omniglot = load_omniglot(subset="evaluation")
    >>> omniglot.data.shape, omniglot.images.shape
    ((13180, 784), (13180, 28, 28))
    >>> omniglot.target_names[omniglot.target[0]]
    'Angelic/character01'
    """
    if not isinstance(subset, str) or subset not in _OMNIGLOT_SUBSETS:
        raise ValueError(
            f"subset must be one of {', '.join(map(repr, _OMNIGLOT_SUBSETS))}, got {subset!r}. "
            "Pass subset='background' to meta-train and subset='evaluation' to evaluate."
        )
    _check_returns(return_X_y, return_X_y_groups)

    filename = _data_file("omniglot28.npz")
    with np.load(filename) as archive:
        packed = archive["images_packed"]
        alphabet = archive["alphabet"]
        evaluation = archive["evaluation"].astype(bool)
        alphabet_names = archive["alphabet_names"].astype(object)
    n_characters, n_drawers, side = len(packed), packed.shape[1], 28
    turns = 4 if rotations else 1

    # Characters are stored alphabet by alphabet: number them from 1 within each.
    first = np.searchsorted(alphabet, alphabet)
    numbers = np.arange(n_characters) - first + 1
    target_names = [
        f"{alphabet_names[a]}/character{number:02d}{suffix}"
        for suffix in ("", "/rot90", "/rot180", "/rot270")[:turns]
        for a, number in zip(alphabet, numbers, strict=True)
    ]

    kept = np.arange(n_characters)
    if subset != "all":
        kept = np.flatnonzero(evaluation == (subset == "evaluation"))
    upright = np.unpackbits(packed[kept], axis=-1).reshape(-1, side, side)
    pixels = np.empty((turns, len(upright), side, side), dtype=np.float32)
    for turn in range(turns):
        pixels[turn] = np.rot90(upright, turn, axes=(1, 2))
    images = pixels.reshape(-1, side, side)

    # One entry per class that is kept, then each repeated for its drawings.
    classes = np.concatenate([kept + turn * n_characters for turn in range(turns)])
    character = np.repeat(classes % n_characters, n_drawers)
    bunch = Bunch(
        data=images.reshape(-1, side * side),
        images=images,
        target=np.repeat(classes, n_drawers).astype(np.int64),
        groups=alphabet_names[alphabet[character]],
        drawer=np.tile(np.arange(n_drawers), len(classes)),
        evaluation=evaluation[character],
        frame=None,
        feature_names=[f"pixel_{i}_{j}" for i in range(side) for j in range(side)],
        target_names=target_names,
        DESCR=_description("omniglot.rst"),
        filename=filename,
    )
    return _finish(bunch, ["character"], return_X_y, return_X_y_groups, as_frame)


def load_vowels(
    *,
    return_X_y: bool = False,
    return_X_y_groups: bool = False,
    as_frame: bool = False,
) -> Any:
    """Load the vowels of Peterson and Barney (classification, one task per speaker).

    Pitch and formants of ten vowels, each spoken twice by 76 men, women and children. All
    speakers share the ten labels, but say them at frequencies of their own.

    =================   ==============
    Tasks                           76
    Rows per task                   20
    Rows                         1,520
    Features                         4
    Classes                         10
    =================   ==============

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return `(data, target)` instead of a Bunch.
    return_X_y_groups : bool, default=False
        If True, return `(data, target, groups)` instead of a Bunch.
    as_frame : bool, default=False
        If True, data, target and groups are pandas objects. Needs pandas.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the following attributes.

        data : {ndarray, DataFrame} of shape (1520, 4)
            Fundamental frequency and three formants in Hz, float64.
        target : {ndarray, Series} of shape (1520,)
            The vowel in X-SAMPA, as a str.
        groups : {ndarray, Series} of shape (1520,)
            The number of the speaker, 1 to 76.
        speaker_type : ndarray of shape (1520,)
            "man", "woman" or "child".
        frame : DataFrame of shape (1520, 6) or None
            Only with `as_frame=True`: the column `task` (the speaker), the features, the
            column `vowel`.
        feature_names : list of str
            `f0`, `f1`, `f2`, `f3`.
        target_names : list of str
            The ten vowels, in the order of the files: those of heed, hid, head, had, hud, hod,
            hawed, hood, who'd and heard.
        DESCR : str
            The description of the data set.
        filename : str
            The path of the data file.

    (data, target) : tuple if `return_X_y` is True
        The first two of these.

    (data, target, groups) : tuple if `return_X_y_groups` is True
        The first three of these.

    Examples
    --------
    >>> from sklearn_maml.datasets import load_vowels
    >>> vowels = load_vowels()
    >>> vowels.data.shape, len(vowels.target_names)
    ((1520, 4), 10)
    >>> vowels.data[0].tolist(), vowels.target[0], vowels.speaker_type[0]
    ([160.0, 240.0, 2280.0, 2850.0], 'i', 'man')
    """
    _check_returns(return_X_y, return_X_y_groups)
    filename = _data_file("vowels_pb52.csv.gz")
    with gzip.open(filename, "rt", encoding="utf-8") as file:
        header, *rows = (line.rstrip("\n").split(",") for line in file)
    speakers, *measured, types, vowels = zip(*rows, strict=True)
    words = {"m": "man", "w": "woman", "c": "child"}
    bunch = Bunch(
        data=np.array(measured, dtype=np.float64).T.copy(),
        target=np.array(vowels, dtype=object),
        groups=np.array(speakers, dtype=np.int64),
        speaker_type=np.array([words[letter] for letter in types], dtype=object),
        frame=None,
        feature_names=header[1:5],
        target_names=list(dict.fromkeys(vowels)),
        DESCR=_description("vowels.rst"),
        filename=filename,
    )
    return _finish(bunch, ["vowel"], return_X_y, return_X_y_groups, as_frame)
