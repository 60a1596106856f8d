"""Real collections of small tasks: an estimator and its baselines on the same held-out tasks.

    python benchmarks/tabular.py [--data FOLDER] [--cache FILE] [--seeds 0,1] [--set alpha=0.03 ...]

The collections that the package ships are always there; FOLDER holds the gzipped CSV files of
others (first column ``task``, one row per observation). Tasks are sorted by name and shuffled with
``RandomState(1000 + seed)``; the first 30 % (at most 60; 75 for station_temperature) are held out.
``RandomState(7 + seed)`` draws K support rows of each held-out task in turn (K of each class of
vowels); the rest (at most 150) are the query rows. Tasks of fewer than K + 1 rows are left out.
"strict": training and held-out tasks use disjoint halves of the distinct rows of features, drawn
with ``RandomState(2000 + seed)``. Classes with a weak signal are compared by log-loss.
Errors are in units of the standard deviation of the training targets; see `compare_baselines`.

With --cache the scores of the baselines are computed once and read from FILE from then on; delete
it after a change to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from sinusoid import parse_options

import sklearn_maml
from sklearn_maml import MAMLClassifier, MAMLRegressor, compare_baselines
from sklearn_maml.evaluation import summarize_comparison

SHIPPED = Path(sklearn_maml.__file__).parent / "datasets" / "data"
MAX_QUERIES = 150
# no worse than this times the best baseline counts as good as it
AS_GOOD = 1.03


@dataclasses.dataclass(frozen=True)
class Collection:
    """A file, its target, and how to hold tasks out of it."""

    file: str
    target: str
    left_out: tuple[str, ...] = ()
    most: int = 60
    shots: tuple[int, ...] = (5, 10)
    classification: bool = False
    by_class: bool = False
    strict: bool = False


X264 = "x264_videos.csv.gz"
PARKINSONS = "parkinsons.csv.gz"
STATIONS = "station_temperature.csv.gz"
# plant_leaves is no such collection: its labels are its tasks
COLLECTIONS = {
    "x264 kbps": Collection(X264, "log2_kbps", ("log2_fps",)),
    "x264 kbps strict": Collection(X264, "log2_kbps", ("log2_fps",), strict=True),
    "x264 fps": Collection(X264, "log2_fps", ("log2_kbps",)),
    "x264 fps strict": Collection(X264, "log2_fps", ("log2_kbps",), strict=True),
    "parkinsons motor": Collection(PARKINSONS, "motor_UPDRS", ("total_UPDRS",)),
    "parkinsons total": Collection(PARKINSONS, "total_UPDRS", ("motor_UPDRS",)),
    "vowels": Collection(
        "vowels_pb52.csv.gz", "vowel", shots=(1,), classification=True, by_class=True
    ),
    "station_temperature": Collection(STATIONS, "temp_c", most=75),
    "station_temperature strict": Collection(STATIONS, "temp_c", most=75, strict=True),
    "cheese": Collection("cheese.csv.gz", "log_volume", ("price",)),
    "school": Collection("school_ilea139.csv.gz", "exam_score"),
    # few tasks, ragged ones, one whose rows lie far from the others, classes with a weak signal
    "fries": Collection("fries.csv.gz", "painty"),
    "pwt": Collection("pwt.csv.gz", "rgdpna"),
    "hedonic": Collection("hedonic.csv.gz", "mv", shots=(3, 5)),
    "txhousing": Collection("txhousing.csv.gz", "log_price"),
    "contraception": Collection("contraception.csv.gz", "use", classification=True),
}


Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def load(collection: Collection, folder: Path | None = None) -> Data | None:
    """X, y and task of a collection that is shipped or in the folder; else None, and a line."""
    places = [place / collection.file for place in (SHIPPED, folder) if place is not None]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        print(f"{collection.file} is not here; give its folder as --data")
        return None
    frame = pd.read_csv(path, dtype={"task": str, "vowel": str}, keep_default_na=False)
    features = frame.drop(columns=["task", collection.target, *collection.left_out])
    X = pd.get_dummies(features).to_numpy(dtype=float)  # columns of strings become indicators
    return X, frame[collection.target].to_numpy(), frame["task"].to_numpy(dtype=str)


def load_all(names: Iterable[str], folder: Path | None) -> Iterator[tuple[str, Collection, Data]]:
    """Those of the named collections that are here."""
    for name in names:
        data = load(COLLECTIONS[name], folder)
        if data is not None:
            yield name, COLLECTIONS[name], data


def standardised(X: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Features in standard deviations of the training rows; constant ones are 0."""
    scale = X[train].std(0)
    return (X - X[train].mean(0)) / np.where(scale > 0, scale, 1)


def split(X, y, task, collection, seed):
    """Row positions of the training tasks, and the episodes of each K."""
    names = np.unique(task)
    order = np.random.RandomState(1000 + seed).permutation(len(names))
    n_held = 75 if collection.most == 75 else min(round(0.3 * len(names)), collection.most)
    held = names[order[:n_held]]
    is_held = np.isin(task, held)
    usable = np.ones(len(y), dtype=bool)
    if collection.strict:
        distinct, which = np.unique(X, axis=0, return_inverse=True)
        half = np.random.RandomState(2000 + seed).permutation(len(distinct)) < len(distinct) // 2
        usable = half[which.reshape(-1)] == is_held
    episodes = {}
    for k in collection.shots:
        rng = np.random.RandomState(7 + seed)
        episodes[k] = []
        for name in held:
            rows = rng.permutation(np.flatnonzero((task == name) & usable))
            support = np.arange(len(rows)) < k
            if collection.by_class:
                support = pd.Series(y[rows]).groupby(y[rows]).cumcount().to_numpy() < k
            if len(rows) > k:
                episodes[k].append((rows[support], rows[~support][:MAX_QUERIES]))
    return np.flatnonzero(~is_held & usable), episodes


class Cache:
    """Scores of baselines in a CSV file, by collection and seed."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.frame = pd.read_csv(path) if path is not None and path.exists() else None

    def get(self, name: str, seed: int, shots: tuple[int, ...]) -> pd.DataFrame | None:
        """Return the scores of a collection and seed, or None where some of them are missing."""
        if self.frame is None:
            return None
        found = self.frame[(self.frame["collection"] == name) & (self.frame["seed"] == seed)]
        found = found[found["n_shots"].isin(shots)]
        if found["n_shots"].nunique() < len(shots):
            return None
        return found.dropna(axis=1, how="all")  # metrics of other collections

    def put(self, scores: pd.DataFrame) -> None:
        """Add scores to the file."""
        if self.path is not None:
            self.frame = scores if self.frame is None else pd.concat([self.frame, scores])
            self.frame.to_csv(self.path, index=False)


def scores_of(name, data, collection, seeds, options, cache, baselines):
    """Scores of the estimator and the baselines on every held-out task of all seeds."""
    X, y, task = data
    kind = MAMLClassifier if collection.classification else MAMLRegressor
    parts = []
    for seed in seeds:
        known = cache.get(name, seed, collection.shots) if baselines else None
        scores = compare_baselines(
            kind(**{"random_state": seed, **options}),
            X,
            y,
            task,
            splits=[split(X, y, task, collection, seed)],
            baselines="all" if baselines and known is None else [],
            random_state=seed,
            per_task=True,
        )
        scores["repeat"] = seed
        scores["collection"], scores["seed"] = name, seed
        ours = scores["method"].str.startswith(kind.__name__)
        if known is None:
            known = scores[~ours]
            if len(known):
                cache.put(known)
        parts += [scores[ours], known]
    scores = pd.concat(parts).astype({"task": str})
    return scores, kind.__name__


def main() -> None:
    """Print a table for each collection, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with collections that are not shipped")
    names = ", ".join(COLLECTIONS)
    parser.add_argument("--collections", help=f"beginnings of names, comma-separated: {names}")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--shots", help="in place of 5,10 (regression) and 1 (classification)")
    parser.add_argument("--set", action="append", default=[], help="parameter=value")
    parser.add_argument("--cache", type=Path, help="CSV file for the scores of the baselines")
    parser.add_argument("--no-baselines", action="store_true", help="the estimator alone")
    args = parser.parse_args()
    options = parse_options(args.set)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    chosen = list(COLLECTIONS)
    if args.collections:
        given = [part.strip() for part in args.collections.split(",")]
        chosen = [name for name in COLLECTIONS if any(name.startswith(part) for part in given)]
    cache = Cache(args.cache)
    print(f"options {options}, seeds {seeds}; standard errors are over held-out tasks")
    summary = []
    for name, collection, data in load_all(chosen, args.data):
        if args.shots:
            shots = tuple(int(k) for k in args.shots.split(","))
            collection = dataclasses.replace(collection, shots=shots)
        start = time.perf_counter()
        scores, ours = scores_of(
            name, data, collection, seeds, options, cache, not args.no_baselines
        )
        table = summarize_comparison(scores, ours)
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)")
        print(table.round(4).to_string(na_rep=""), flush=True)
        weak = collection.classification and not collection.by_class
        metric = "log_loss" if weak else table.columns[0]
        for k, part in table.groupby("n_shots"):
            part = part.droplevel("n_shots")[metric]
            others = part[[not label.startswith(ours) for label in part.index]]
            if len(others):
                better = metric == "accuracy"
                best = others.idxmax() if better else others.idxmin()
                ratio = others[best] / part[ours] if better else part[ours] / others[best]
                summary.append((f"{name} K={k}", part[ours], others[best], best, ratio))
    if not summary:
        return
    print("\nratio to the best baseline (below 1: the estimator is better)")
    for label, own, other, best, ratio in summary:
        print(f"    {label:36s} {own:.3f} {other:.3f} {ratio:6.3f}  {best}")
    ratios = np.array([line[-1] for line in summary])
    print(
        f"better than the best baseline on {(ratios < 1).sum()}, better or within 3 % on "
        f"{(ratios <= AS_GOOD).sum()} of {len(ratios)}; worst ratio {ratios.max():.2f}"
    )


if __name__ == "__main__":
    main()
