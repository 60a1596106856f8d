"""Calibration on unseen tasks of real collections: coverage of intervals, reliability of classes.

    python benchmarks/calibration.py [--data FOLDER] [--collections vowels] [--seeds 0,1] [--plot F]

Tasks, support and query rows are those of `tabular.py`, and so are the collections; K = 0 is
without labelled rows. Regression: the part of the query targets within ``y +- 1.645 std`` of
``predict(..., return_std=True)``, mean over tasks, which should be 0.90; the same for 0.50; both
for the quantiles of ``predict(..., return_quantiles=)``; and the continuous ranked probability
score of normal distributions, in standard deviations of the training targets, beside that of one
which knows no tasks: mean and deviation of the training targets.
Classification: log-loss and the expected calibration error of `predict_proba`, by default and of
gradient steps alone, which nothing calibrates; with --plot the reliability curves. In brackets is
the error of labels that are drawn with these probabilities, mean and 90 % quantile of 200
draws: so few rows leave as much of it in a model that is calibrated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import norm
from tabular import COLLECTIONS, load_all, split, standardised

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.evaluation.methods import normal_crps

N_BINS = 10
DRAWS = 200
CLASSIFIERS = {
    "default": {},
    "gradient steps, not calibrated": {"update_rule": "sgd", "alpha": 0.03, "steps": 5},
}


def coverage(reg, X, y, task, episodes) -> tuple[float, ...]:
    """Parts of the query targets in four intervals, and two CRPS; means over tasks."""
    support, query = (np.concatenate(rows) for rows in zip(*episodes, strict=True))
    reg.adapt(X[support], y[support], groups=task[support])
    mean, std, quantiles = reg.predict(
        X[query], groups=task[query], return_std=True, return_quantiles=(0.05, 0.25, 0.75, 0.95)
    )
    z = np.abs(mean - y[query]) / std
    _, codes = np.unique(task[query], return_inverse=True)
    center, scale = reg.y_mean_[0], reg.y_scale_[0]
    parts = [z < norm.ppf(0.5 + level / 2) for level in (0.9, 0.5)]
    above = y[query][:, None] > quantiles
    parts += [above[:, 0] & ~above[:, 3], above[:, 1] & ~above[:, 2]]
    parts += [normal_crps(y[query], m, s) / scale for m, s in ((mean, std), (center, scale))]
    return tuple(float((np.bincount(codes, part) / np.bincount(codes)).mean()) for part in parts)


def reliability(confidence, correct) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean confidence and accuracy in bins of equal size, and the expected calibration error."""
    bins = np.array_split(np.argsort(confidence), N_BINS)
    told = np.array([confidence[rows].mean() for rows in bins])
    true = np.array([correct[rows].mean() for rows in bins])
    sizes = np.array([len(rows) for rows in bins])
    return told, true, float(np.average(np.abs(told - true), weights=sizes))


def of_chance(confidence) -> tuple[float, float]:
    """Mean and 90 % quantile of the calibration error of labels drawn with these probabilities."""
    draws = np.random.default_rng(0).random((DRAWS, len(confidence))) < confidence
    errors = [reliability(confidence, correct)[2] for correct in draws]
    return float(np.mean(errors)), float(np.quantile(errors, 0.9))


def probabilities(clf, X, y, task, episodes) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the query rows, and which of their columns is right."""
    support, query = (np.concatenate(rows) for rows in zip(*episodes, strict=True))
    clf.adapt(X[support], y[support], groups=task[support])
    p = clf.predict_proba(X[query], groups=task[query])
    return p, y[query][:, None] == clf.classes_


def main() -> None:
    """Print a line for each collection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with collections that are not shipped")
    parser.add_argument("--collections", default="", help="beginnings of names, comma-separated")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--plot", type=Path, help="PNG file for the reliability curves")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    names = [n for n in COLLECTIONS if n.startswith(tuple(args.collections.split(",")))]
    for name, collection, (X, y, task) in load_all(names, args.data):
        kinds = CLASSIFIERS if collection.classification else {"": {}}
        for label, options in kinds.items():
            results: dict = {k: [] for k in (0, *collection.shots)}
            for seed in seeds:
                train, episodes = split(X, y, task, collection, seed)
                # without support rows: the query rows of the smallest sets
                episodes[0] = [(s[:0], q) for s, q in episodes[min(episodes)]]
                kind = MAMLClassifier if collection.classification else MAMLRegressor
                Z = standardised(X, train)
                model = kind(random_state=seed, unseen_tasks="prior", **options)
                model.fit(Z[train], y[train], groups=task[train])
                measure = probabilities if collection.classification else coverage
                for k in results:
                    results[k].append(measure(model, Z, y, task, episodes[k]))
            for k, found in results.items():
                if not collection.classification:
                    *inside, crps, of_all = np.mean(found, axis=0)
                    by_std, by_quantiles = (
                        f"90 %: {ninety:.3f}   50 %: {fifty:.3f}"
                        for ninety, fifty in (inside[:2], inside[2:])
                    )
                    print(
                        f"{name:28s} K={k:<3d} {by_std}   by quantiles: {by_quantiles}   "
                        f"CRPS: {crps:.4f} (of all tasks {of_all:.4f})",
                        flush=True,
                    )
                    continue
                p, right = (np.concatenate(parts) for parts in zip(*found, strict=True))
                log_loss = -np.log(np.maximum(p[right], 1e-15)).mean()
                correct = right[np.arange(len(p)), p.argmax(1)]
                told, true, error = reliability(p.max(1), correct)
                mean, most = of_chance(p.max(1))
                print(
                    f"{name:28s} K={k:<3d} {label}: accuracy {correct.mean():.3f}   log-loss "
                    f"{log_loss:.3f}   expected calibration error {error:.3f} (by chance "
                    f"{mean:.3f} to {most:.3f})",
                    flush=True,
                )
                if args.plot:
                    _plot(told, true, f"{name}: {label}")
    if args.plot:
        _finish(args.plot)


def _plot(told, true, label) -> None:
    import matplotlib.pyplot as plt

    plt.plot(told, true, "o-", label=label)


def _finish(path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.plot([0, 1], [0, 1], "k:", lw=1)
    plt.xlabel("probability of the predicted class")
    plt.ylabel("part that is right")
    plt.legend()
    plt.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
