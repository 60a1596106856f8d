"""Rows chosen by `suggest_rows` against random ones, on held-out tasks of real collections.

    python benchmarks/suggest.py [--data FOLDER] [--seeds 0,1,2] [--plot FILE] [--csv FILE]
                                 [--loss absolute_error | --classes 2]

Collections and held-out tasks are those of `tabular.py`. Of each task, half of its rows (at most
80) are the pool that labels are bought from, the others the query rows, which never are. K rows
are labelled: chosen by the model, drawn at random (mean over 20 draws), nearest to the centres of
k-means with K clusters, or each the farthest from those before it, the first the nearest to the
mean; the last two know the features only, standardised. Errors are root mean squared errors of
tasks, in standard deviations of the training targets, mean over tasks and seeds: of the query
rows, and of all rows without a label. "5 of 8" is the error with five chosen rows over that with
eight random ones, with its standard error over tasks.

With --loss, errors are mean absolute ones. With --classes N, a classifier predicts which of N parts
of the training targets, of the same size, a target is in, and errors are log-losses. Labels then
decide which rows tell most: "one by one" adapts to each label before it chooses the next row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from tabular import load_all, split, standardised

from sklearn_maml import MAMLClassifier, MAMLRegressor

NAMES = [
    "x264 kbps",
    "x264 fps",
    "x264 kbps strict",
    "x264 fps strict",
    "station_temperature",
    "station_temperature strict",
    "parkinsons motor",
    "parkinsons total",
]
SHOTS = range(1, 11)
DRAWS = 20
# drawn by `split`, support and query rows together
LARGEST = 160
CHOSEN, ONE_BY_ONE, RANDOM = "chosen", "one by one", "random"
COLORS = {
    CHOSEN: ("#0072B2", "o", "-"),
    RANDOM: ("#8C8C8C", "s", "-"),
    "k-means": ("#D55E00", "^", "--"),
    "farthest point": ("#009E73", "v", ":"),
}


def by_centres(Z, n):
    """Rows nearest to the centres of n clusters."""
    rows: list[int] = []
    for centre in KMeans(n, n_init=3, random_state=0).fit(Z).cluster_centers_:
        distance = ((Z - centre) ** 2).sum(1)
        distance[rows] = np.inf
        rows.append(int(distance.argmin()))
    return np.array(rows)


def by_distance(Z, n):
    """Rows each as far as can be from those before it."""
    rows = [int(((Z - Z.mean(0)) ** 2).sum(1).argmin())]
    while len(rows) < n:
        nearest = ((Z[:, None] - Z[rows]) ** 2).sum(2).min(1)
        rows.append(int(nearest.argmax()))
    return np.array(rows)


def one_by_one(model, Z, y, pools, n):
    """Rows (n_pools, n) each chosen once the labels of those before it are known."""
    chosen = np.empty((len(pools), n), dtype=int)
    for k in range(n):
        left = [np.setdiff1d(pool, rows[:k]) for pool, rows in zip(pools, chosen, strict=True)]
        of = np.repeat(np.arange(len(pools)), [len(rows) for rows in left])
        rows = np.concatenate(left)
        chosen[:, k] = rows[model.suggest_rows(Z[rows], 1, groups=of)]
        known = chosen[:, : k + 1].ravel()
        model.adapt(Z[known], y[known], groups=np.repeat(np.arange(len(pools)), k + 1))
    return chosen


def errors(model, Z, y, supports, others):
    """Return the error (n_sets,) of each set of rows, adapted to, on those in `others`."""
    given, asked = np.concatenate(supports), np.concatenate(others)
    codes = np.repeat(np.arange(len(supports)), [len(rows) for rows in supports])
    of = np.repeat(np.arange(len(others)), [len(rows) for rows in others])
    model.adapt(Z[given], y[given], groups=codes)
    if isinstance(model, MAMLClassifier):
        p = model.predict_proba(Z[asked], groups=of)[np.arange(len(asked)), y[asked]]
        return np.bincount(of, -np.log(np.maximum(p, 1e-12))) / np.bincount(of)
    off = (model.predict(Z[asked], groups=of) - y[asked]) / model.y_scale_[0]
    if model.loss != "squared_error":
        return np.bincount(of, np.abs(off)) / np.bincount(of)
    return np.sqrt(np.bincount(of, off**2) / np.bincount(of))


def of_seed(name, X, y, task, collection, seed, loss="squared_error", classes=None):
    """Errors of each method, K and held-out task; a frame."""
    train, episodes = split(X, y, task, collection, seed)
    model = MAMLRegressor(loss=loss, random_state=seed)
    if classes:
        model = MAMLClassifier(random_state=seed)
        y = np.searchsorted(np.quantile(y[train], np.arange(1, classes) / classes), y)
    Z = standardised(X, train)
    model.fit(Z[train], y[train], groups=task[train])
    tasks = [np.concatenate(parts)[:LARGEST] for parts in episodes[max(episodes)]]
    pools, queries = [rows[::2] for rows in tasks], [rows[1::2] for rows in tasks]
    sizes = [len(pool) for pool in pools]
    # before any adapt: all of them are new
    pooled = np.concatenate(pools)
    start = time.process_time()
    chosen = model.suggest_rows(
        Z[pooled], max(SHOTS), groups=np.repeat(np.arange(len(sizes)), sizes)
    )
    seconds = time.process_time() - start
    if classes or loss != "squared_error":
        followed = one_by_one(model, Z, y, pools, max(SHOTS))
    far = [pool[by_distance(Z[pool], max(SHOTS))] for pool in pools]
    draws = [np.random.RandomState(draw) for draw in range(DRAWS)]
    shuffled = [[rng.permutation(pool) for pool in pools] for rng in draws]
    records = []
    for k in SHOTS:
        sets = {
            CHOSEN: list(pooled[chosen.reshape(len(pools), -1)[:, :k]]),
            "k-means": [pool[by_centres(Z[pool], k)] for pool in pools],
            "farthest point": [rows[:k] for rows in far],
            RANDOM: [rows[:k] for draw in shuffled for rows in draw],
        }
        if classes or loss != "squared_error":
            sets[ONE_BY_ONE] = list(followed[:, :k])
        for method, supports in sets.items():
            repeats = len(supports) // len(tasks)
            rest = [
                np.setdiff1d(all_rows, rows)
                for all_rows, rows in zip(tasks * repeats, supports, strict=True)
            ]
            found = {
                "query": errors(model, Z, y, supports, queries * repeats),
                "unlabelled": errors(model, Z, y, supports, rest),
            }
            means = {key: value.reshape(repeats, -1).mean(0) for key, value in found.items()}
            records += [
                {"method": method, "K": k, "task": j, **{key: v[j] for key, v in means.items()}}
                for j in range(len(tasks))
            ]
    return pd.DataFrame(records).assign(collection=name, seed=seed, seconds=seconds / len(tasks))


def five_of_eight(frame, rows):
    """Ratio of the error with five chosen rows to that with eight random ones, and its error."""
    table = frame.pivot(index=["seed", "task"], columns=["method", "K"], values=rows)
    best = ONE_BY_ONE if ONE_BY_ONE in table.columns.levels[0] else CHOSEN
    five, eight = table[best, 5], table[RANDOM, 8]
    ratio = five.mean() / eight.mean()
    return ratio, (five - ratio * eight).std(ddof=1) / np.sqrt(len(five)) / eight.mean()


def report(frame):
    """Print the errors, and how many random rows five chosen ones are worth."""
    ratios = []
    for name, part in frame.groupby("collection", sort=False):
        n_tasks = len(part[["seed", "task"]].drop_duplicates())
        print(f"\n{name}: {n_tasks} tasks, {1000 * part['seconds'].mean():.1f} ms each to choose")
        for rows in ("query", "unlabelled"):
            table = part.groupby(["method", "K"], sort=False)[rows].mean().unstack("K")
            print(f"{rows} rows")
            print(table.round(4).to_string())
            ratio, error = five_of_eight(part, rows)
            print(f"    5 of 8: {ratio:.3f} +- {error:.3f}", flush=True)
            ratios.append((rows, ratio))
    for rows in ("query", "unlabelled"):
        mean = np.exp(np.mean([np.log(ratio) for key, ratio in ratios if key == rows]))
        print(f"\n5 of 8, {rows} rows, geometric mean over collections: {mean:.3f}")


def plot(frame, path):
    """Draw the errors of the query rows over K, a panel for each collection."""
    import matplotlib.pyplot as plt

    names = list(frame["collection"].unique())
    n_columns = min(4, len(names))
    n_rows = -(-len(names) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(3.1 * n_columns, 2.9 * n_rows), layout="constrained"
    )
    ticks = [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3]
    for ax, name in zip(np.ravel(axes), names, strict=False):
        part = frame[frame["collection"] == name]
        for method, (color, marker, line) in COLORS.items():
            mean = part[part["method"] == method].groupby("K")["query"].mean()
            ax.plot(mean.index, mean, line, color=color, marker=marker, ms=4, label=method)
        eight = part[(part["method"] == RANDOM) & (part["K"] == 8)]["query"].mean()
        ax.axhline(eight, color=COLORS[RANDOM][0], lw=0.8, ls=":", label="eight random rows")
        ax.set(title=name, yscale="log")
        ax.set_yticks(ticks, ticks)
        ax.set_yticks([], minor=True)
        values = part.groupby(["method", "K"])["query"].mean()
        ax.set_ylim(values.min() / 1.1, values.max() * 1.1)
        ax.set_xticks([1, 3, 5, 8, 10])
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("K, labelled rows of a new task")
    figure.supylabel("RMSE of rows never labelled (sd of targets)")
    handles = np.ravel(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(COLORS) + 1, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print tables, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with collections that are not shipped")
    parser.add_argument("--collections", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--loss", default="squared_error", help="of the regressor")
    parser.add_argument("--classes", type=int, help="of a classifier, in place of the regressor")
    parser.add_argument("--csv", type=Path, help="file for the errors; it is read if it is there")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    args = parser.parse_args()
    if args.csv is not None and args.csv.exists():
        frame = pd.read_csv(args.csv)
    else:
        parts = []
        seeds = [int(seed) for seed in args.seeds.split(",")]
        how = {"loss": args.loss, "classes": args.classes}
        for name, collection, data in load_all(args.collections.split(","), args.data):
            parts += [of_seed(name, *data, collection, seed, **how) for seed in seeds]
        frame = pd.concat(parts)
        if args.csv is not None:
            frame.to_csv(args.csv, index=False)
    report(frame)
    if args.plot is not None:
        plot(frame, args.plot)


if __name__ == "__main__":
    main()
