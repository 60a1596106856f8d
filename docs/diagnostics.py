"""Draw the pictures of docs/diagnostics.md: python docs/diagnostics.py (about a minute)."""

from pathlib import Path

import matplotlib
import numpy as np
import sklearn
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLClassifier, MAMLRegressor, class_permutation_audit
from sklearn_maml.datasets import load_omniglot, load_x264, make_sinusoid_tasks
from sklearn_maml.inspection import (
    AdaptationCurveDisplay,
    FewShotFitDisplay,
    MetaTrainingDisplay,
    TaskScoresDisplay,
)

matplotlib.use("Agg")
matplotlib.rcParams.update({"figure.figsize": (5.4, 3.8), "font.size": 9})
FOLDER = Path(__file__).parent


def save(display, name):
    display.figure_.savefig(FOLDER / f"{name}.png", dpi=80)


def main():
    sklearn.set_config(enable_metadata_routing=True)
    X, y, task = make_sinusoid_tasks(n_tasks=500, n_rows=30, random_state=0)
    sines = MAMLRegressor(update_rule="sgd", alpha=0.01, steps=1, max_iter=2000, random_state=0)
    sines.fit(X, y, groups=task)
    save(MetaTrainingDisplay.from_estimator(sines), "meta_training")
    X, y, _ = make_sinusoid_tasks(n_tasks=1, n_rows=10, random_state=1)
    fit = FewShotFitDisplay.from_estimator(
        sines, X, y, grid=np.linspace(-5, 5, 200), steps=(0, 1, 10)
    )
    save(fit, "few_shot_fit")

    X, y, video = load_x264(return_X_y_groups=True)
    new = np.isin(video, np.unique(video)[::6])
    model = make_pipeline(StandardScaler(), MAMLRegressor(random_state=0))
    model.fit(X[~new], y[~new], groups=video[~new])
    data = X[new], y[new], video[new]
    save(AdaptationCurveDisplay.from_estimator(model, *data), "adaptation_curve")
    save(TaskScoresDisplay.from_estimator(model, *data, n_shots=2), "task_scores")

    X, y = load_omniglot(return_X_y=True)
    classes = np.unique(y)
    known = np.isin(y, classes[: int(0.7 * len(classes))])
    clf = MAMLClassifier(
        n_ways=5, n_shots=1, n_queries=10, update_rule="sgd", alpha=0.1, random_state=0
    )
    clf.fit(X[known], y[known])
    audit = class_permutation_audit(clf, X[~known], y[~known], n_permutations=120)
    print({name: round(audit[name], 3) for name in ("mean", "worst", "best", "std", "ensemble")})


if __name__ == "__main__":
    main()
