"""Draw the figures of docs/tutorial.md: python docs/figures/tutorial.py [NAME ...] (15 seconds)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent
# told apart by all kinds of colour vision (Okabe & Ito)
BLACK, GREY, BLUE, ORANGE, GREEN, PURPLE = (
    "#000000", "#8C8C8C", "#0072B2", "#D55E00", "#009E73", "#AA4499",
)  # fmt: skip
PALE_BLUE, PALE_ORANGE, PALE_GREY = "#DCEBF5", "#FBE3D3", "#F0F0F0"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "tutorial",  # the same file at every run
}


def blank(width, height):
    """Axes without frame whose unit is an inch."""
    figure = plt.figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def arrow(ax, start, end, color=BLACK, bend=0.0, style="-", width=1.5, shrink=3):
    ax.add_patch(
        FancyArrowPatch(
            start, end, color=color, lw=width, ls=style, mutation_scale=13, arrowstyle="-|>",
            connectionstyle=f"arc3,rad={bend}", shrinkA=shrink, shrinkB=shrink, zorder=1,
        )
    )  # fmt: skip


def box(ax, x, y, width, height, text, face, edge, size=11):
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, facecolor=face, edgecolor=edge,
            boxstyle="round,pad=0,rounding_size=0.08", lw=1.3, zorder=2,
        )
    )  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=size, zorder=3)


def tasks():
    """What a task, a support set, a query set and an episode are."""
    figure, ax = blank(9.2, 3.7)
    ax.text(0.15, 3.45, "meta-training: tasks with labels", fontsize=12, weight="bold")
    ax.text(6.45, 3.45, "later: a new task", fontsize=12, weight="bold")
    side, gap = 0.27, 0.05

    def rows(x, y, kinds):
        for i, kind in enumerate(kinds):
            face, edge = {"s": (BLUE, BLUE), "q": (ORANGE, ORANGE), "?": ("white", ORANGE)}.get(
                kind, (PALE_GREY, GREY)
            )
            left = x + i * (side + gap)
            ax.add_patch(Rectangle((left, y), side, side, facecolor=face, edgecolor=edge, lw=1.2))
            if kind == "?":
                place = left + side / 2, y + side / 2
                ax.text(*place, "?", ha="center", va="center", color=ORANGE, weight="bold")

    for y, name, kinds in (
        (2.75, "video 1", "sqqsqssqqq"),
        (2.25, "video 2", "qsqqsqqssq"),
        (1.4, "video 249", "ssqqqqsqsq"),
    ):
        ax.text(0.95, y + side / 2, name, ha="right", va="center")
        rows(1.1, y, kinds)
    ax.text(2.7, 1.94, "...", ha="center", va="center", fontsize=14)
    ax.text(4.5, 2.88, "one row = one labelled\nobservation of the task", va="center", fontsize=9)
    ax.text(
        4.5, 1.66, "the split is drawn anew\nevery time a task is\nvisited: an episode",
        va="center", fontsize=9,
    )  # fmt: skip
    ax.add_patch(
        FancyBboxPatch(
            (1.03, 1.33), 10 * (side + gap) + 0.09, side + 0.14, facecolor="none", edgecolor=BLACK,
            boxstyle="round,pad=0,rounding_size=0.06", lw=1.2, ls="--",
        )
    )  # fmt: skip
    ax.plot([6.2, 6.2], [1.1, 3.55], color=GREY, lw=0.8)
    rows(6.55, 2.25, "ssss????")
    ax.text(6.55, 2.68, "video 250", va="bottom")
    ax.text(
        6.55, 2.1, "four labelled rows (K = 4):\nadapt to them, then predict\nthe others",
        va="top", fontsize=9,
    )  # fmt: skip
    for x, face, edge, label, meaning in (
        (0.5, BLUE, BLUE, "support set", "the rows a task is\nadapted to (shots)"),
        (3.5, ORANGE, ORANGE, "query set", "the rows that say how good\nthe adapted model is"),
        (6.9, "white", ORANGE, "rows to predict", "no label yet"),
    ):
        ax.add_patch(Rectangle((x, 0.52), side, side, facecolor=face, edgecolor=edge, lw=1.2))
        ax.text(x + 0.4, 0.52 + side / 2, label, va="center", weight="bold")
        ax.text(x + 0.4, 0.42, meaning, va="top", fontsize=9)
    return figure


def graph():
    """The computation graph of three inner steps, forwards and backwards."""
    figure, ax = blank(10, 6.7)
    steps, first, apart = 3, 1.15, 2.2
    columns = [first + apart * k for k in range(steps + 1)]
    last = columns[-1] + 1.6
    radius, rise = 0.36, 1.05

    def theta(x, y, k, face, edge):
        ax.add_patch(Circle((x, y), radius, facecolor=face, edgecolor=edge, lw=1.6, zorder=2))
        ax.text(x, y, rf"$\theta^{{({k})}}$", ha="center", va="center", fontsize=13, zorder=3)

    def edge_of(x, y, towards):
        """Where the circle at (x, y) faces the point `towards`."""
        dx, dy = towards[0] - x, towards[1] - y
        length = (dx**2 + dy**2) ** 0.5
        return x + radius * dx / length, y + radius * dy / length

    # forwards
    y = 4.55
    ax.text(0.15, 6.42, "Forwards: the inner loop adapts", fontsize=13, weight="bold")
    ax.text(
        columns[0],
        y - 0.52,
        "initialisation,\nshared by all tasks",
        ha="center",
        va="top",
        fontsize=9,
    )
    ax.text(columns[-1], y - 0.52, "adapted parameters", ha="center", va="top", fontsize=9)
    for k, x in enumerate(columns):
        theta(x, y, k, PALE_BLUE, BLUE)
    for k in range(steps):
        x, to = columns[k], columns[k + 1]
        middle = (x + to) / 2, y + rise
        box(ax, *middle, 1.2, 0.46, rf"$\nabla S(\theta^{{({k})}})$", "white", BLUE)
        arrow(ax, (x + radius, y), (to - radius, y), BLUE)
        arrow(ax, edge_of(x, y, middle), (middle[0] - 0.42, middle[1] - 0.23), BLUE)
        arrow(ax, (middle[0] + 0.42, middle[1] - 0.23), edge_of(to, y, middle), BLUE)
        ax.text(middle[0] + 0.72, middle[1] - 0.5, r"$\times(-\alpha)$", color=BLUE, va="center")
        arrow(ax, (middle[0], middle[1] + 0.52), (middle[0], middle[1] + 0.23), GREY)
        ax.text(
            middle[0],
            middle[1] + 0.54,
            "support rows",
            ha="center",
            va="bottom",
            color="#555555",
            fontsize=9,
        )
    box(ax, last, y, 1.1, 0.6, r"$Q(\theta^{(3)})$", PALE_ORANGE, ORANGE, 13)
    arrow(ax, (columns[-1] + radius, y), (last - 0.55, y), BLUE)
    arrow(ax, (last, y + 0.82), (last, y + 0.3), GREY)
    ax.text(last, y + 0.84, "query rows", ha="center", va="bottom", color="#555555", fontsize=9)
    ax.text(last, y - 0.52, "query loss", ha="center", va="top", fontsize=9)

    # backwards
    ax.plot([0.15, 9.85], [3.48, 3.48], color=GREY, lw=0.6)
    y = 1.5
    ax.text(0.15, 3.12, "Backwards: the meta-gradient", fontsize=13, weight="bold")
    for k, x in enumerate(columns):
        theta(x, y, k, "white", GREY)
    for k in range(steps):
        x, to = columns[k], columns[k + 1]
        middle = (x + to) / 2, y + rise
        box(ax, *middle, 1.2, 0.46, rf"$\nabla S(\theta^{{({k})}})$", "white", PURPLE)
        arrow(ax, (to - radius, y), (x + radius, y), ORANGE, width=2)
        ax.text(middle[0], y - 0.07, r"$I$", color=ORANGE, ha="center", va="top", fontsize=13)
        arrow(ax, edge_of(to, y, middle), (middle[0] + 0.42, middle[1] - 0.23), PURPLE, style="--")
        arrow(ax, (middle[0] - 0.42, middle[1] - 0.23), edge_of(x, y, middle), PURPLE, style="--")
        ax.text(
            middle[0],
            y + 0.42,
            rf"$-\alpha H_{k}$",
            color=PURPLE,
            ha="center",
            va="center",
            fontsize=13,
        )
    box(ax, last, y, 1.1, 0.6, r"$Q(\theta^{(3)})$", PALE_ORANGE, ORANGE, 13)
    arrow(ax, (last - 0.55, y), (columns[-1] + radius, y), ORANGE, width=2)
    for k, text in enumerate(
        (
            r"$v_0 = (I-\alpha H_0)\,v_1$",
            r"$v_1 = (I-\alpha H_1)\,v_2$",
            r"$v_2 = (I-\alpha H_2)\,v_3$",
            r"$v_3 = \nabla Q(\theta^{(3)})$",
        )
    ):
        ax.text(columns[k], y - 0.52, text, ha="center", va="top", fontsize=11)
    ax.text(columns[0], y - 0.84, "the meta-gradient", ha="center", va="top", fontsize=9)
    for x, color, style, label in (
        (0.6, ORANGE, "-", "through the parameters: all that first order keeps"),
        (5.2, PURPLE, "--", "through the inner gradients: second order adds these"),
    ):
        ax.plot([x, x + 0.4], [0.2, 0.2], color=color, ls=style, lw=2)
        ax.text(x + 0.5, 0.2, label, va="center")
    return figure


def run_page():
    """What the code of the page computes."""
    text = (FOLDER.parent / "tutorial.md").read_text(encoding="utf-8")
    names = {"__name__": "tutorial"}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(code, "tutorial.md", "exec"), names)
    return names


def surface(page):
    """Losses over the plane of the two parameters, and three steps from two initialisations."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 4.1), sharex=True, sharey=True, layout="constrained"
    )
    intercept, slope = np.meshgrid(np.linspace(-1.5, 1.5, 121), np.linspace(-2.6, 3.4, 121))
    points = np.stack([intercept, slope], -1)
    half = len(page["tasks"]) // 2
    kinds = (
        ("wide tasks", BLUE, page["tasks"][:half]),
        ("narrow tasks", GREEN, page["tasks"][half:]),
    )
    for ax, name, marker in zip(axes, ("pooled", "MAML"), "s*", strict=True):
        start = page["found"][name]
        for label, color, tasks in kinds:
            mean = np.mean([((points @ X.T - y) ** 2).mean(-1) for X, y, _, _ in tasks], axis=0)
            levels = mean.min() + np.array([0.25, 0.75, 1.5, 2.5, 4])
            ax.contour(slope, intercept, mean, levels, colors=color, linewidths=0.7, alpha=0.55)
            for X, y, _, _ in tasks:
                path = np.array(page["inner_loop"](start, X, y))
                ax.plot(path[:, 1], path[:, 0], "-", color=color, lw=0.8, alpha=0.6)
                ax.plot(path[-1, 1], path[-1, 0], "o", color=color, ms=4)
                solution = np.linalg.lstsq(X, y)[0]
                ax.plot(solution[1], solution[0], "x", color=color, ms=5)
            ax.plot([], [], color=color, lw=3, label=label)
        ax.plot(
            *start[::-1],
            marker,
            color=ORANGE,
            ms=17 if marker == "*" else 11,
            mec="white",
            zorder=5,
        )
        before, after = page["before_and_after"](start)
        title = "pooled training" if name == "pooled" else "MAML"
        ax.set_title(
            f"{title}: loss {before:.2f} before, {after:.2f} after adaptation", fontsize="medium"
        )
        ax.set_xlabel("slope b")
    axes[0].set_ylabel("intercept a")
    for marker, label in (("x", "solution of a task"), ("o", "after 3 steps")):
        axes[0].plot([], [], marker, color=GREY, label=label)
    axes[0].plot([], [], "s", color=ORANGE, ms=9, label="initialisation")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def fits(page):
    """One task before adaptation and after one and five steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.5), sharey=True, layout="constrained")
    x, y = page["X_new"][page["own"]].ravel(), page["y_new"][page["own"]]
    grid = page["grid"].ravel()
    basis = np.c_[np.sin(x), np.cos(x)]
    truth = np.c_[np.sin(grid), np.cos(grid)] @ np.linalg.lstsq(basis, y)[0]
    for ax, name in zip(axes, ("pooled", "MAML"), strict=True):
        ax.plot(grid, truth, color=BLACK, lw=6, alpha=0.13, label="the task")
        for steps, color, style, label in (
            (0, GREY, "--", "initialisation"),
            (1, ORANGE, "-", "1 step"),
            (5, BLUE, "-", "5 steps"),
        ):
            ax.plot(grid, page["curves"][name, steps], style, color=color, label=label)
        ax.scatter(
            page["X_support"], page["y_support"], color=BLACK, s=24, zorder=3, label="support rows"
        )
        ax.set(
            title="pooled training, then fine-tuning" if name == "pooled" else "MAML", xlabel="x"
        )
    axes[0].set_ylabel("y")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def curve(page):
    """Error of the new tasks by number of inner steps."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, color in (("pooled", GREY), ("MAML", BLUE)):
        steps = [n for model, n in page["errors"] if model == name]
        errors = np.array([page["errors"][name, n] for n in steps])
        mean, interval = errors.mean(1), 1.96 * errors.std(1, ddof=1) / np.sqrt(errors.shape[1])
        ax.errorbar(steps, mean, interval, color=color, marker="o", ms=5, capsize=3)
        label = "pooled, fine-tuned" if name == "pooled" else "MAML, trained for 1 step"
        ax.text(10.3, mean[-1], label, color=color, va="center")
    ax.set(yscale="log", xlabel="inner steps (0: before adaptation)", ylabel="mean squared error")
    ax.set_title("200 new tasks, K = 10 (95 % intervals over tasks)", fontsize="medium")
    ticks = [0.2, 0.5, 1, 2, 3]
    ax.set_yticks(ticks, ticks)
    ax.set_yticks([], minor=True)
    ax.set_xticks([0, 1, 2, 5, 10])
    return figure


DRAWN = {"tasks": tasks, "graph": graph}
COMPUTED = {"surface": surface, "fits": fits, "curve": curve}


def main(names):
    names = names or [*DRAWN, *COMPUTED]
    page = run_page() if set(names) & set(COMPUTED) else {}
    with matplotlib.rc_context(STYLE):
        for name in names:
            figure = DRAWN[name]() if name in DRAWN else COMPUTED[name](page)
            # no date: the same file at every run
            file = FOLDER / f"tutorial_{name}.svg"
            figure.savefig(file, metadata={"Date": None}, facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
