"""The tables of the papers: our figures beside the published ones.

    python benchmarks/papers.py sinusoid [--shots 5,10,20] [--methods MAML,FOMAML] [--seed 0]
    python benchmarks/papers.py omniglot --ways 5 --shots 1 [--methods MAML]

``sinusoid`` is the regression of Finn et al. (2017, section 5.1): amplitude U[0.1, 5], phase
U[0, pi], x U[-5, 5], a 40-40 network, fresh tasks in every update; mean squared error on 100 query
rows of each of 1,000 fresh tasks.

``omniglot`` is N-way K-shot classification of handwritten characters in the protocol of Finn et al.
(2017, section 5.2): 28 x 28 pixels, 1,200 characters for meta-training with their quarter turns as
classes of their own, the other 423 for testing; four convolutions of stride 2 with batch norm.
Accuracy on 15 query rows of each class of 600 test episodes, upright. The published figures are
transductive: batch norm takes the statistics of the query rows, so that predictions for a row
depend on the others. Ours are given both ways; `predict` is inductive unless asked otherwise.

Scores before adaptation stand beside those after it. Intervals are 1.96 standard errors over the
test tasks of one meta-training, so they say nothing of other seeds.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import numpy as np
import sklearn
import torch
from sinusoid import ADAPT_STEPS, N_TASKS, interval, meta_train, parse_options
from skorch.callbacks import Callback
from torch import nn

from sklearn_maml import MAMLClassifier
from sklearn_maml.datasets import load_omniglot
from sklearn_maml.meta_gradients import Implicit, Reptile
from sklearn_maml.update_rules import SGD

# -- sinusoids -----------------------------------------------------------------------------------

# every method with the protocol's network, on the same tasks; what a method needs otherwise is here
SINUSOID: dict[str, dict[str, Any]] = {
    "MAML": {},
    "FOMAML": {"meta_gradient": "first-order"},
    "Meta-SGD": {"update_rule": "meta-sgd"},
    # without the bound on the norm of a step, as published
    "Reptile": {
        "meta_gradient": Reptile(batch_size=10),
        "alpha": 0.02,
        "steps": 10,
        "max_grad_norm": None,
        "max_iter": 30_000,
    },
    # smaller and bounded steps: an implicit gradient does not see that inner steps begin to diverge
    "iMAML": {
        "meta_gradient": Implicit(lam=0.5, cg_steps=8),
        "update_rule": SGD(max_grad_norm=5.0),
        "steps": 16,
        "beta": 1e-3,
        "max_iter": 5000,
    },
    "ANIL": {"adapted": "head"},
    "ridge head": {"update_rule": "ridge-head", "adapted": "head", "max_iter": 20_000},
}
# one inner step on K rows in training, 70,000 updates
PUBLISHED_SINUSOID = {("MAML", 5): "0.67 / 0.38 / 0.35 after 1 / 5 / 10 steps (Finn et al. 2017)"}


def sinusoid(methods: list[str], all_shots: list[int], updates: int | None, seed: int) -> None:
    """Meta-train every method at every number of shots and print a row for each."""
    print(
        f"Sinusoids: mean squared error after so many inner steps, ± 95 % interval over {N_TASKS:,}"
        " tasks of one meta-training\n"
    )
    header = "".join(f"{s:>12d} step{'s' if s != 1 else ' '}" for s in ADAPT_STEPS)
    print(f"{'method':12s}{'K':>3s}{'updates':>9s}{header}   CPU time of the fit")
    for shots in all_shots:
        for name in methods:
            settings = {"hidden_layer_sizes": (40, 40), "max_iter": 70_000, **SINUSOID[name]}
            if updates is not None:
                settings["max_iter"] = updates
            reg, cells, cpu = meta_train(shots, seed, **settings)
            print(
                f"{name:12s}{shots:3d}{reg.n_iter_:9,d}   {'    '.join(cells)}   {cpu:5.0f} s",
                flush=True,
            )
            if (name, shots) in PUBLISHED_SINUSOID:
                print(f"{'':12s}published: {PUBLISHED_SINUSOID[name, shots]}")


# -- Omniglot ------------------------------------------------------------------------------------

N_TRAINING, SIDE, FILTERS = 1200, 28, 64
N_EPISODES, QUERIES_OF_CLASS = 600, 15
# (ways, shots): published accuracies in per cent, transductive
PUBLISHED_OMNIGLOT: dict[tuple[int, int], dict[str, str]] = {
    (5, 1): {"MAML": "98.7 (Finn et al. 2017)", "FOMAML": "98.3 (Nichol et al. 2018)"},
    (5, 5): {"MAML": "99.9 (Finn et al. 2017)", "FOMAML": "99.2 (Nichol et al. 2018)"},
    (20, 1): {
        "MAML": "95.8 (Finn et al. 2017)",
        "FOMAML": "89.4 (Nichol et al. 2018)",
        "ANIL": "96.2 (Raghu et al. 2020)",
    },
}
# What fits into half an hour on two cores. Finn et al. take 32 (5-way) or 16 (20-way) tasks and as
# many query rows as support rows; fewer tasks with more query rows learn more in the same time.
OMNIGLOT_SETTINGS: dict[tuple[int, int], dict[str, Any]] = {
    (5, 1): {"alpha": 0.4, "steps": 1, "meta_batch_size": 16, "n_queries": 5, "max_iter": 10_000},
    (5, 5): {"alpha": 0.4, "steps": 1, "meta_batch_size": 8, "n_queries": 5, "max_iter": 6000},
    (20, 1): {"alpha": 0.1, "steps": 5, "meta_batch_size": 8, "n_queries": 2, "max_iter": 2500},
}
OMNIGLOT: dict[str, dict[str, Any]] = {
    "MAML": {},
    "FOMAML": {"meta_gradient": "first-order"},
    "ANIL": {"adapted": "head"},
    "R2-D2": {"update_rule": "ridge-head", "adapted": "head"},
}


def conv4(n_ways: int, filters: int = FILTERS, *, averages: bool = True) -> nn.Sequential:
    """Four convolutions of stride 2, the network of Finn et al. (2017) for Omniglot.

    `averages` is whether batch norm keeps running ones, which the library does not use.
    """
    layers: list[nn.Module] = []
    n_in = 1
    for _ in range(4):
        layers += [
            nn.Conv2d(n_in, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=averages),
            nn.ReLU(),
        ]
        n_in = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, n_ways))


class Progress(Callback):
    """A line a minute."""

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.start = self.shown = time.perf_counter()

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if now - self.shown > 60:
            self.shown = now
            loss = np.mean([row["train_loss"] for row in net.history[-10:]])
            print(
                f"  {net.update_:6d} updates, {now - self.start:5.0f} s, loss {loss:.3f}",
                flush=True,
            )


def draw_episodes(
    y: np.ndarray, n_ways: int, n_shots: int, seed: int, n_episodes: int = N_EPISODES
) -> tuple[np.ndarray, np.ndarray]:
    """Row positions of the support and query sets, (n_episodes, n_ways, n_rows)."""
    rng = np.random.default_rng(seed)
    by_class = np.argsort(y, kind="stable").reshape(-1, 20)
    rows = np.stack(
        [
            rng.permuted(by_class[rng.choice(len(by_class), n_ways, replace=False)], axis=1)
            for _ in range(n_episodes)
        ]
    )
    return rows[..., :n_shots], rows[..., n_shots : n_shots + QUERIES_OF_CLASS]


def accuracies(
    clf: MAMLClassifier,
    X: np.ndarray,
    support: np.ndarray,
    query: np.ndarray,
    at_once: int = QUERIES_OF_CLASS,
) -> np.ndarray:
    """Accuracy of each episode, so many query rows of each class being predicted at once.

    With transductive batch norm these are the rows whose statistics it takes.
    """
    n, ways, _ = support.shape
    y_support = np.broadcast_to(np.arange(ways)[:, None], support.shape).reshape(n, -1)
    result = []
    for start in range(0, n, 50):  # bounds the memory that the images take
        part = slice(start, start + 50)
        clf.adapt(X[support[part].reshape(len(support[part]), -1)], y_support[part])
        predicted = np.concatenate(
            [
                clf.predict(X[rows.reshape(len(rows), -1)]).reshape(rows.shape)
                for rows in np.split(query[part], query.shape[2] // at_once, axis=2)
            ],
            axis=2,
        )
        result.append((predicted == np.arange(ways)[:, None]).mean((1, 2)))
    return np.concatenate(result)


def split_characters(
    rotations: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and classes of 1,200 characters and their quarter turns, and of the other 423."""
    data = load_omniglot(rotations=rotations)
    images = data.images.reshape(-1, 1, SIDE, SIDE)
    character = data.target % 1623  # turned ones are classes 1623, 3246, 4869 further on
    training = np.random.RandomState(0).permutation(1623)[:N_TRAINING]
    train = np.isin(character, training)
    test = ~train & (data.target < 1623)
    return images[train], data.target[train], images[test], data.target[test]


def omniglot_classifier(
    ways: int, shots: int, seed: int, *, filters: int = FILTERS, **settings: Any
) -> MAMLClassifier:
    """Few-shot classifier with conv4, not fitted yet."""
    torch.manual_seed(seed)  # of the weights that conv4 starts with
    return MAMLClassifier(
        module=conv4(ways, filters),
        n_ways=ways,
        n_shots=shots,
        early_stopping=False,  # nothing is chosen by held-out classes
        random_state=seed,
        **settings,
    )


def omniglot(
    ways: int,
    shots: int,
    methods: list[str],
    updates: int | None,
    seed: int,
    overrides: dict[str, Any],
) -> None:
    """Meta-train on 1,200 characters and print accuracies on episodes of the other 423."""
    X, y, X_new, y_new = split_characters()
    support, query = draw_episodes(y_new, ways, shots, seed=1)
    print(
        f"Omniglot, {ways}-way {shots}-shot: accuracy in per cent, ± 95 % interval over "
        f"{N_EPISODES} episodes of {len(np.unique(y_new))} characters not meta-trained on\n"
    )
    for name in methods:
        settings = {"beta": 2e-3, **OMNIGLOT_SETTINGS[ways, shots], **OMNIGLOT[name], **overrides}
        if updates is not None:
            settings["max_iter"] = updates
        clf = omniglot_classifier(ways, shots, seed, callbacks=[Progress()], **settings)
        wall, cpu = time.perf_counter(), time.process_time()
        clf.fit(X, y)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        shown = {name: value for name, value in settings.items() if name != "max_iter"}
        print(
            f"{name}: {clf.n_iter_:,} updates in {wall / 60:.1f} minutes ({cpu / 60:.1f} of CPU), "
            f"{shown}"
        )
        for norm in ("inductive", "transductive"):
            clf.set_params(engine__batch_norm=norm)
            cells = []
            for steps in (0, None):
                clf.set_params(adapt_steps=steps)
                mean, half = interval(100 * accuracies(clf, X_new, support, query))
                cells.append(f"{mean:.2f} ± {half:.2f}")
            print(f"  {norm:13s} before adaptation {cells[0]}, after {cells[1]}", flush=True)
        published = PUBLISHED_OMNIGLOT.get((ways, shots), {}).get(name)
        if published:
            print(f"  published, transductive, after 60,000 updates: {published}")


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=["sinusoid", "omniglot"])
    parser.add_argument("--methods", help="names, separated by commas")
    parser.add_argument(
        "--shots", help="support rows: a list for sinusoid, of each class for omniglot"
    )
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--updates", type=int, help="meta-updates, instead of each method's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="parameter=value")
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    known = SINUSOID if args.table == "sinusoid" else OMNIGLOT
    default = list(SINUSOID) if args.table == "sinusoid" else ["MAML"]
    methods = args.methods.split(",") if args.methods else default
    if not set(methods) <= set(known):
        parser.error(f"--methods {args.methods} are not all known; there are {[*known]}")
    if args.table == "sinusoid":
        all_shots = [int(k) for k in (args.shots or "5,10,20").split(",")]
        sinusoid(methods, all_shots, args.updates, args.seed)
    else:
        shots = int(args.shots or 1)
        if (args.ways, shots) not in OMNIGLOT_SETTINGS:
            parser.error(
                f"got {args.ways} ways and {shots} shots; there are {[*OMNIGLOT_SETTINGS]}"
            )
        omniglot(args.ways, shots, methods, args.updates, args.seed, parse_options(args.set))


if __name__ == "__main__":
    main()
