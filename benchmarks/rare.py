"""A rare class of unseen tasks after five labelled rows, one of them positive.

    python benchmarks/rare.py [--seeds 0,1,2] [--collections simulated,vowels]

Two collections: simulated tasks with 5 % of positive rows, whose levels and slopes differ (one in
three is held out), and vowels, of which one in ten is to be told from the others (shipped; 30 % of
the speakers are held out). Of each held-out task five rows are drawn 20 times, as they come; the
draws with exactly one positive row are support sets, all other rows of the task their queries.

A line has the average precision, the Brier score, the log-loss and the calibration error of the
probabilities of all queries together (ten bins of equal size), and their mean over the frequency of
positive rows: 1 is right. Means over the seeds.
"""

from __future__ import annotations

import argparse

import numpy as np
from calibration import reliability
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss
from sklearn.preprocessing import StandardScaler
from tabular import COLLECTIONS, load

from sklearn_maml import MAMLClassifier

N_SUPPORT, DRAWS = 5, 20
VOWEL = "E"
MODELS = {
    "default": {},
    'class_weight="balanced"': {"class_weight": "balanced"},
}
MEASURES = ("average precision", "Brier", "log-loss", "calibration error", "mean / frequency")


def simulated(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """150 tasks of 60 rows, 5 % of them positive."""
    rng = np.random.default_rng(seed)
    level, slope = rng.normal(size=(2, 150, 1))
    X = rng.normal(size=(150, 60, 3))
    logit = -4.0 + 0.8 * level + (1.5 + 0.5 * slope) * X[..., 0]
    y = logit + rng.logistic(size=logit.shape) > 0
    return X.reshape(-1, 3), y.ravel().astype(int), np.repeat(np.arange(150), 60)


def vowels(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Formants of 76 speakers, two of each vowel."""
    X, y, task = load(COLLECTIONS["vowels"])
    return X, (y == VOWEL).astype(int), np.unique(task, return_inverse=True)[1]


def episodes(y, task, held, rng):
    """Rows of support sets and queries, and the episode of each of them."""
    support, query = [], []
    for j in held:
        own = np.flatnonzero(task == j)
        for _ in range(DRAWS):
            rows = rng.permutation(own)
            if y[rows[:N_SUPPORT]].sum() == 1:
                support.append(rows[:N_SUPPORT])
                query.append(rows[N_SUPPORT:])
    codes = [
        np.repeat(np.arange(len(sets)), [len(rows) for rows in sets]) for sets in (support, query)
    ]
    return np.concatenate(support), codes[0], np.concatenate(query), codes[1]


def measures(y, p) -> list[float]:
    """Scores in the order of `MEASURES`."""
    return [
        average_precision_score(y, p),
        brier_score_loss(y, p),
        log_loss(y, p),
        reliability(p, y)[2],
        p.mean() / y.mean(),
    ]


def main() -> None:
    """Print a line for each collection and model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--collections", default="simulated,vowels")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in args.collections.split(","):
        make = {"simulated": simulated, "vowels": vowels}[name]
        scores: dict[str, list] = {}
        for seed in seeds:
            X, y, task = make(seed)
            rng = np.random.default_rng(1000 + seed)
            order = rng.permutation(task.max() + 1)
            held = order[: round(len(order) * (1 / 3 if make is simulated else 0.3))]
            known = ~np.isin(task, held)
            X = StandardScaler().fit(X[known]).transform(X)
            s, of_support, q, of_query = episodes(y, task, held, rng)
            pooled = LogisticRegression(max_iter=1000).fit(X[known], y[known])
            parts = {"pooled logistic regression": pooled.predict_proba(X[q])[:, 1]}
            for label, options in MODELS.items():
                clf = MAMLClassifier(random_state=seed, **options)
                clf.fit(X[known], y[known], groups=task[known])
                clf.adapt(X[s], y[s], groups=of_support)
                parts[label] = clf.predict_proba(X[q], groups=of_query)[:, 1]
            for label, p in parts.items():
                scores.setdefault(label, []).append(measures(y[q], p))
        for label, found in scores.items():
            pairs = zip(MEASURES, np.mean(found, axis=0), strict=True)
            line = "   ".join(f"{measure} {value:.3f}" for measure, value in pairs)
            print(f"{name:10s} {label:28s} {line}", flush=True)


if __name__ == "__main__":
    main()
