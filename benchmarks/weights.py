"""What weights buy: rows that are known to be doubtful, and a class that is rarer than the other.

    python benchmarks/weights.py [--data FOLDER] [--seeds 0,1] [--max-iter 1000]

Numbers: 5 standard deviations of noise are added to one target in ten of all tasks. A model is
fitted and adapted (K = 10) to the targets as they were, to what became of them, and to these with
the weight .01 for the rows in doubt. Classes (K = 10): without and with balanced weights; the loss
of balanced rows weights the query rows so that the classes count alike. Collections and their
splits are those of `tabular.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.utils.class_weight import compute_sample_weight
from tabular import load_all, split, standardised

from sklearn_maml import MAMLClassifier, MAMLRegressor

NUMBERS = ("x264 fps", "parkinsons motor", "cheese")
CLASSES = ("contraception",)
SHOTS, DOUBTFUL, NOISE, WEIGHT = 10, 0.1, 5.0, 0.01


def episodes_of(X, y, task, collection, seed):
    """Training rows, support and query rows, and standardised features."""
    train, episodes = split(X, y, task, collection, seed)
    support, query = (np.concatenate(part) for part in zip(*episodes[SHOTS], strict=True))
    return train, support, query, standardised(X, train)


def errors_of(X, y, task, collection, seed, **options):
    """Root mean squared error, averaged over held-out tasks: as it was, spoilt, and weighted."""
    train, support, query, X = episodes_of(X, y, task, collection, seed)
    rng = np.random.RandomState(3000 + seed)
    doubtful = rng.rand(len(y)) < DOUBTFUL
    unit = y[train].std()
    spoilt = np.where(doubtful, y + NOISE * unit * rng.randn(len(y)), y)
    found = []
    for targets, weight in ((y, None), (spoilt, None), (spoilt, np.where(doubtful, WEIGHT, 1.0))):
        given, own = (None if weight is None else weight[rows] for rows in (train, support))
        model = MAMLRegressor(random_state=seed, **options)
        model.fit(X[train], targets[train], task[train], given)
        model.adapt(X[support], targets[support], task[support], own)
        squares = ((model.predict(X[query], groups=task[query]) - y[query]) / unit) ** 2
        means = [squares[task[query] == name].mean() for name in np.unique(task[query])]
        found.append(np.sqrt(means).mean())
    return found


def scores_of(X, y, task, collection, seed, **options):
    """Balanced accuracy, log-loss, and that of balanced rows: without and with weights."""
    train, support, query, X = episodes_of(X, y, task, collection, seed)
    found = []
    for class_weight in (None, "balanced"):
        model = MAMLClassifier(class_weight=class_weight, random_state=seed, **options)
        model.fit(X[train], y[train], groups=task[train])
        model.adapt(X[support], y[support], groups=task[support])
        p = model.predict_proba(X[query], groups=task[query])
        of_class = compute_sample_weight("balanced", y[query])
        found += [
            balanced_accuracy_score(y[query], model.classes_[p.argmax(1)]),
            log_loss(y[query], p),
            log_loss(y[query], p, sample_weight=of_class),
        ]
    return found


def main() -> None:
    """Print a line for each collection and update rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with collections that are not shipped")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--max-iter", type=int, default=1000)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for names, score, columns in (
        (NUMBERS, errors_of, ["as it was", "spoilt", "weighted"]),
        (CLASSES, scores_of, ["acc", "loss", "balanced", "acc'", "loss'", "balanced'"]),
    ):
        print(f"\n{'':32s}" + "".join(f"{column:>13s}" for column in columns))
        for name, collection, data in load_all(names, args.data):
            for rule in ("auto", "sgd"):
                options = {"update_rule": rule, "max_iter": args.max_iter}
                means = np.mean([score(*data, collection, s, **options) for s in seeds], axis=0)
                print(
                    f"{name + ', ' + rule:32s}" + "".join(f"{v:13.3f}" for v in means), flush=True
                )


if __name__ == "__main__":
    main()
