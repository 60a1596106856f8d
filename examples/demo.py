"""Meta-learn on real data, adapt to tasks never seen, and compare with honest baselines.

    python examples/demo.py [--fast] [--output FILE]

Two collections that the package ships: 250 videos encoded at 201 settings each (a video is a task:
predict its bitrate from K measured settings), and 1,623 handwritten characters (a task is to tell
five characters apart, having seen each once). Prints tables and saves a figure.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback
from torch import Tensor, nn

from sklearn_maml import MAMLClassifier, MAMLRegressor
from sklearn_maml.datasets import load_omniglot, load_x264

N_HELD_OUT = 60  # videos
SHOTS = (10, 5)
N_EPISODES = 300
N_WAYS, N_QUERIES = 5, 15
BEFORE, AFTER = "MAML before adaptation", "MAML, gradient steps, after it"
CLOSED = "MAMLClassifier()"
DEFAULT_BEFORE, DEFAULT = "MAMLRegressor() before adaptation", "MAMLRegressor()"
STEPS = "MAML, gradient steps alone"
MIXED = "  + intercept and slopes (mixed)"


class Progress(Callback):
    """One line that is rewritten on a terminal, and a few lines elsewhere."""

    def __init__(self, n_updates: int, measure: str) -> None:
        self.n_updates = n_updates
        self.measure = measure

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self.shown = 0.0

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        done = net.update_ / self.n_updates
        live = sys.stdout.isatty()
        if not live and done < min(self.shown + 0.2, 1.0):
            return
        self.shown = done
        last = net.history[-1]
        if "valid_loss" in last:
            loss = f"{last['valid_loss_before']:.3f} -> {last['valid_loss']:.3f} (validation tasks)"
        else:
            loss = f"{last['train_loss']:.3f} (training tasks)"
        bar = "█" * round(16 * done) + "░" * (16 - round(16 * done))
        line = (
            f"  {bar + ' ' if live else ''}{net.update_:4d} updates  {self.measure} {loss}  "
            f"{time.perf_counter() - self.start:3.0f} s"
        )
        print(("\r" if live else "") + line, end="" if live and done < 1 else "\n", flush=True)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over tasks and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


# -- encoder settings -> bitrate -----------------------------------------------------------------


class Episodes:
    """K support rows and the other rows of each held-out task."""

    def __init__(self, task: np.ndarray, held_out: np.ndarray, shots: int) -> None:
        rng = np.random.RandomState(7)
        rows = [rng.permutation(np.flatnonzero(task == name)) for name in held_out]
        self.pairs = [(r[:shots], r[shots:]) for r in rows]
        self.support = np.concatenate([s for s, _ in self.pairs])
        self.query = np.concatenate([q for _, q in self.pairs])
        self.ends = np.cumsum([len(q) for _, q in self.pairs])[:-1]

    def rmse(self, predicted: np.ndarray, y: np.ndarray) -> np.ndarray:
        """RMSE of each task, given predictions of the query rows."""
        squares = (predicted - y[self.query]) ** 2
        return np.sqrt([part.mean() for part in np.split(squares, self.ends)])


def per_task(episodes: Episodes, X: np.ndarray, y: np.ndarray, make: Any) -> np.ndarray:
    """Predictions of a model fitted to the support rows of each task alone."""
    parts = []
    for support, query in episodes.pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            parts.append(make().fit(X[support], y[support]).predict(X[query]))
    return np.concatenate(parts)


def ridge() -> RidgeCV:
    return RidgeCV(np.logspace(-3, 3, 13))


def gaussian_process() -> GaussianProcessRegressor:
    kernel = ConstantKernel(1.0) * RBF(5.0) + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True)


def correct_pooled(
    pooled: np.ndarray, X: np.ndarray, y: np.ndarray, task: np.ndarray, train: np.ndarray
) -> dict[str, Any]:
    """Models of a task's errors of the pooled model; their settings come from training tasks."""
    error = y - pooled
    tasks = [np.flatnonzero(task == name) for name in np.unique(task[train])]
    between = float(np.var([error[rows].mean() for rows in tasks]))
    within = float(np.mean([error[rows].var() for rows in tasks]))

    def intercept(support: np.ndarray, query: np.ndarray) -> np.ndarray:
        weight = between / (between + within / len(support))  # shrinks towards the pooled model
        return np.full(len(query), weight * error[support].mean())

    # a linear model of the errors whose coefficients vary from task to task with the covariance
    # that they have over the training tasks, estimated by ridge regression (moments, not REML)
    Z = np.column_stack([np.ones(len(X)), X]).astype(float)
    ridge = np.diag([0.0] + [10.0] * X.shape[1])
    slopes = [
        np.linalg.solve(Z[rows].T @ Z[rows] + ridge, Z[rows].T @ error[rows]) for rows in tasks
    ]
    covariance = np.mean([np.outer(b, b) for b in slopes], axis=0)
    noise = np.mean(
        [np.var(error[rows] - Z[rows] @ b) for rows, b in zip(tasks, slopes, strict=True)]
    )

    def mixed(support: np.ndarray, query: np.ndarray) -> np.ndarray:
        shared = Z[support] @ covariance @ Z[support].T + noise * np.eye(len(support))
        weights = np.linalg.solve(shared, error[support])
        return Z[query] @ covariance @ Z[support].T @ weights

    def predict(model: Any, episodes: Episodes) -> np.ndarray:
        return np.concatenate([pooled[q] + model(s, q) for s, q in episodes.pairs])

    return {
        "  + an intercept for each video": lambda episodes: predict(intercept, episodes),
        MIXED: lambda episodes: predict(mixed, episodes),
    }


def bitrates(fast: bool) -> dict[str, Any]:
    """Meta-fit on most videos, adapt to the others, and compare."""
    data = load_x264()
    task = data.groups
    names = np.random.RandomState(0).permutation(np.unique(task))
    held_out, train = names[:N_HELD_OUT], ~np.isin(task, names[:N_HELD_OUT])
    X = StandardScaler().fit(data.data[train]).transform(data.data).astype(np.float32)
    y = data.target
    unit = y[train].std()

    updates = 100 if fast else 1000
    print(
        f"Encoder settings -> log2 bitrate: meta-training on {len(names) - N_HELD_OUT} videos "
        "(squared error, standardised, before -> after adaptation)"
    )
    reg = MAMLRegressor(
        max_iter=updates,
        callbacks=[Progress(updates, "error")],
        random_state=0,
    )
    reg.fit(X[train], y[train], groups=task[train])
    shares = " + ".join(f"{name} {w:.0%}" for name, w in reg.learner_weights_.items() if w)
    print(f"  held-out videos choose: {shares}")
    maml = MAMLRegressor(update_rule="sgd", max_iter=updates, random_state=0)
    maml.fit(X[train], y[train], groups=task[train])
    pooled = HistGradientBoostingRegressor(random_state=0).fit(X[train], y[train]).predict(X)

    corrections = correct_pooled(pooled, X, y, task, train)

    rows: dict[str, dict[int, np.ndarray]] = {}
    shown: dict[str, Any] = {}
    for shots in SHOTS:
        episodes = Episodes(task, held_out, shots)
        s, q = episodes.support, episodes.query
        predicted = {
            "ridge on the K rows": per_task(episodes, X, y, ridge),
            "Gaussian process on the K rows": per_task(episodes, X, y, gaussian_process),
            "pooled model (gradient boosting)": pooled[q],
            **{name: correct(episodes) for name, correct in corrections.items()},
        }
        # all held-out videos in one call, each row predicted by the parameters of its own video
        for name, model, steps in (
            (DEFAULT_BEFORE, reg, 0),
            (STEPS, maml, None),
            (DEFAULT, reg, None),
        ):
            model.set_params(adapt_steps=steps).adapt(X[s], y[s], groups=task[s])
            predicted[name] = model.predict(X[q], groups=task[q])
        for name, values in predicted.items():
            rows.setdefault(name, {})[shots] = episodes.rmse(values, y)
        if shots == SHOTS[0]:
            on_support = reg.predict(X[s], groups=task[s])
            shown = {"episodes": episodes, "y": y, "on_support": on_support, **predicted}

    print(
        f"\n{N_HELD_OUT} videos never seen, the same rows for all: root mean squared error in "
        "units of the pooled\nstandard deviation (and in log2 kbps), ± standard error over tasks\n"
    )
    print(f"{'':34s}" + "".join(f"{f'K = {k} rows':>26s}" for k in SHOTS))
    for name, errors in rows.items():
        cells = []
        for shots in SHOTS:
            mean, error = mean_and_error(errors[shots])
            cells.append(f"{mean / unit:.3f} ± {error / unit:.3f} ({mean:.2f})")
        print(f"{name:34s}" + "".join(f"{cell:>26s}" for cell in cells))
    print(flush=True)
    return {"rows": rows, "unit": unit, "shown": shown, "held_out": held_out}


# -- handwritten characters ----------------------------------------------------------------------


class ConvNet(nn.Module):
    """Three strided convolutions on small images, and a linear head."""

    def __init__(
        self, in_features: int, out_features: int, channels: Sequence[int] = (32, 64, 64)
    ) -> None:
        super().__init__()
        self.side = round(in_features**0.5)
        layers: list[nn.Module] = []
        n_in, side = 1, self.side
        for n_out in channels:
            layers += [
                nn.Conv2d(n_in, n_out, 3, stride=2, padding=1),
                nn.BatchNorm2d(n_out),
                nn.ReLU(),
            ]
            n_in, side = n_out, (side + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(n_in * side * side, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(-1, 1, self.side, self.side)))


def shrink(images: np.ndarray) -> np.ndarray:
    """Average 2 x 2 pixels; rows of 14 * 14 features."""
    n = len(images)
    return images.reshape(n, 14, 2, 14, 2).mean((2, 4)).reshape(n, -1).astype(np.float32)


def draw_episodes(y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of support (n, 5, 1) and query (n, 5, 15) rows of random characters."""
    # not the seed of the episodes on which the settings of the network were chosen
    rng = np.random.RandomState(2026)
    by_class = np.argsort(y, kind="stable").reshape(-1, 20)
    support, query = [], []
    for _ in range(n):
        characters = rng.choice(len(by_class), N_WAYS, replace=False)
        rows = np.stack([rng.permutation(by_class[c])[: 1 + N_QUERIES] for c in characters])
        support.append(rows[:, :1])
        query.append(rows[:, 1:])
    return np.stack(support), np.stack(query)


def characters(fast: bool) -> dict[str, Any]:
    """Meta-fit on the background characters, adapt to evaluation characters, and compare."""
    n_episodes = 50 if fast else N_EPISODES
    updates = 80 if fast else 800
    background = load_omniglot(subset="background", rotations=not fast)
    X, y = shrink(background.images), background.target
    evaluation = load_omniglot(subset="evaluation")
    X_new, images = shrink(evaluation.images), evaluation.images
    support, query = draw_episodes(evaluation.target, n_episodes)
    s, q = support.reshape(-1), query.reshape(-1)
    episode_s = np.repeat(np.arange(n_episodes), N_WAYS)
    episode_q = np.repeat(np.arange(n_episodes), N_WAYS * N_QUERIES)
    letters = np.array(list("ABCDE"))
    y_s = np.tile(letters, n_episodes)
    y_q = np.tile(np.repeat(letters, N_QUERIES), n_episodes)

    print(
        f"Characters, 5-way 1-shot: meta-training on {len(np.unique(y))} classes of 30 alphabets "
        "(log loss after adaptation)"
    )
    shared: dict[str, Any] = {
        "module": ConvNet,
        "n_ways": N_WAYS,
        "n_shots": 1,
        "n_queries": 5,
        "meta_batch_size": 8,
        "random_state": 0,
    }
    settings: dict[str, Any] = {
        **shared,
        "update_rule": "sgd",
        "alpha": 0.4,
        "steps": 1,
        "early_stopping": False,  # few updates: spend the time on those, and on all classes
    }
    maml = MAMLClassifier(max_iter=updates, callbacks=[Progress(updates, "log loss")], **settings)
    started = time.process_time()
    maml.fit(X, y)
    print(f"  gradient steps: {time.process_time() - started:.0f} s of CPU time", flush=True)
    # the same network and as much time: the head takes .6 of the updates, which are cheaper
    updates *= 3
    clf = MAMLClassifier(
        max_iter=updates, beta=2e-3, callbacks=[Progress(updates, "log loss")], **shared
    )
    started = time.process_time()
    clf.fit(X, y)
    shares = " + ".join(f"{name} {w:.0%}" for name, w in clf.learner_weights_.items() if w)
    print(f"  {shares}: {time.process_time() - started:.0f} s of CPU time", flush=True)
    accuracy: dict[str, np.ndarray] = {}

    def record(name: str, predicted: np.ndarray) -> None:
        accuracy[name] = (predicted == y_q).reshape(n_episodes, -1).mean(1)

    def each(make: Any) -> np.ndarray:
        parts = [
            make().fit(X_new[a.ravel()], letters).predict(X_new[b.ravel()])
            for a, b in zip(support, query, strict=True)
        ]
        return np.concatenate(parts)

    record("nearest neighbour, pixels", each(lambda: KNeighborsClassifier(1)))
    record("logistic regression, pixels", each(LogisticRegression))
    # one update of a vanishing rate leaves the random start as it is
    random = MAMLClassifier(max_iter=1, beta=1e-12, **settings).fit(X, y)
    random.set_params(alpha=0.1, adapt_steps=50).adapt(X_new[s], y_s, groups=episode_s)
    record("same network, random start", random.predict(X_new[q], groups=episode_q))
    maml.set_params(adapt_steps=0).adapt(X_new[s], y_s, groups=episode_s)
    record(BEFORE, maml.predict(X_new[q], groups=episode_q))
    maml.set_params(adapt_steps=None).adapt(X_new[s], y_s, groups=episode_s)
    record(AFTER, maml.predict(X_new[q], groups=episode_q))
    clf.adapt(X_new[s], y_s, groups=episode_s)
    predicted = clf.predict(X_new[q], groups=episode_q)
    record(CLOSED, predicted)

    print(
        f"\n{n_episodes} episodes of characters from 20 alphabets never seen: accuracy, ± 95 % "
        "interval over episodes\n"
    )
    for name, values in accuracy.items():
        mean, error = mean_and_error(values)
        print(f"{name:34s}{100 * mean:8.1f} ± {196 * error:.1f} %")
    print(flush=True)
    k = int(np.argsort(accuracy[CLOSED], kind="stable")[n_episodes // 2])
    return {
        "accuracy": accuracy,
        "support": images[support[k, :, 0]],
        "query": images[query[k, :, :4]],
        "predicted": predicted.reshape(n_episodes, N_WAYS, N_QUERIES)[k, :, :4],
        "letters": letters,
    }


# -- the figure ----------------------------------------------------------------------------------

GREY, BLUE, ORANGE, RED = "#9a9a9a", "#2a6fbb", "#e08214", "#c0392b"


def draw(bitrate: dict[str, Any], character: dict[str, Any], output: Path) -> None:
    """Save the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(16, 5.4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.1, 1.6))
    draw_errors(left, bitrate)
    draw_videos(middle, bitrate)
    draw_characters(right, character)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def draw_errors(figure: Any, bitrate: dict[str, Any]) -> None:
    axes = figure.subplots()
    shots = SHOTS[0]
    before, after, mixed = (bitrate["rows"][n][shots] for n in (DEFAULT_BEFORE, DEFAULT, MIXED))
    order = np.argsort(before)
    place = np.arange(len(order))
    axes.vlines(place, after[order], before[order], color="#d9d9d9", lw=1.5)
    axes.scatter(place, before[order], s=20, color=GREY, label="before adaptation")
    axes.scatter(place, mixed[order], s=16, color=ORANGE, label="pooled + mixed model")
    axes.scatter(place, after[order], s=20, color=BLUE, label=f"after {shots} settings")
    axes.set(
        yscale="log",
        xlabel="video, sorted by error before adaptation",
        ylabel="RMSE (log2 kbps)",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Bitrate of {len(before)} videos never seen", fontsize=12)
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def draw_videos(figure: Any, bitrate: dict[str, Any]) -> None:
    shown, shots = bitrate["shown"], SHOTS[0]
    episodes, y = shown["episodes"], shown["y"]
    errors = bitrate["rows"][DEFAULT][shots]
    before = bitrate["rows"][DEFAULT_BEFORE][shots]
    # of the videos that adaptation has to move, two of median error
    moved = np.flatnonzero(before >= np.median(before))
    middle = moved[np.argsort(errors[moved])][len(moved) // 2 - 1 : len(moved) // 2 + 1]
    panels = figure.subplots(2, 1)
    figure.suptitle("Two of them, setting by setting", fontsize=12)
    query = np.split(np.arange(len(episodes.query)), episodes.ends)
    for axes, k in zip(panels, middle, strict=True):
        s, q = episodes.pairs[k]
        on_support = shown["on_support"][k * shots : (k + 1) * shots]
        axes.scatter(y[q], shown[DEFAULT_BEFORE][query[k]], s=9, color=GREY, label="before")
        axes.scatter(y[q], shown[DEFAULT][query[k]], s=9, color=BLUE, label="after")
        axes.scatter(
            y[s],
            on_support,
            s=46,
            facecolors="none",
            edgecolors="black",
            linewidths=1.4,
            label=f"the {shots} settings adapted to",
        )
        ends = np.array([y[q].min(), y[q].max()])
        axes.plot(ends, ends, color="black", lw=0.8, ls="--")
        axes.set_title(str(bitrate["held_out"][k]), fontsize=10)
        axes.set_ylabel("predicted")
    panels[1].set_xlabel("measured (log2 kbps)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )


def draw_characters(figure: Any, character: dict[str, Any]) -> None:
    letters, n_queries = character["letters"], character["query"].shape[1]
    top, bottom = figure.subfigures(1, 2, width_ratios=(1, 1))
    grid = top.subplots(1 + n_queries, N_WAYS)
    top.suptitle("One episode: top row seen, rest predicted", fontsize=12)
    for way in range(N_WAYS):
        column = [character["support"][way], *character["query"][way]]
        names = [letters[way], *character["predicted"][way]]
        for row, (image, name) in enumerate(zip(column, names, strict=True)):
            axes = grid[row, way]
            axes.imshow(1 - image, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            color = "black" if row == 0 else BLUE if name == letters[way] else RED
            for spine in axes.spines.values():
                spine.set(visible=True, color=color, linewidth=1.6)
            axes.set_title(name, color=color, fontsize=10, pad=2)
    axes = bottom.subplots()
    names = list(character["accuracy"])
    results = [mean_and_error(character["accuracy"][name]) for name in names]
    colors = [BLUE if name == CLOSED else GREY for name in names]
    place = np.arange(len(names))[::-1]
    means = np.array([100 * mean for mean, _ in results])
    axes.barh(place, means, xerr=[196 * error for _, error in results], color=colors, height=0.45)
    for at, name, mean in zip(place, names, means, strict=True):
        axes.text(0, at + 0.25, f"{name}: {mean:.0f} %", va="bottom", fontsize=9.5)
    for at in place:
        axes.plot([100 / N_WAYS] * 2, [at - 0.3, at + 0.23], color="black", lw=0.8, ls="--")
    axes.set(xlim=(0, 100), yticks=[], xlabel="accuracy (%); dashed: guessing")
    axes.spines["left"].set_visible(False)
    axes.set_title("Characters of unseen alphabets", fontsize=12)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a tenth of the meta-updates")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("demo.png"), help="of the figure"
    )
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    bitrate = bitrates(args.fast)
    character = characters(args.fast)
    draw(bitrate, character, args.output)
    print(f"Figure: {args.output}\nTook {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
