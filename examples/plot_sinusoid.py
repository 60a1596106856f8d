r"""
Few-shot regression of sinusoids
================================

The regression tasks of Finn et al. (2017) [1]_: every task is a sinusoid :math:`y = A \sin(x -
\varphi)` of its own amplitude and phase, and a learner sees ten labelled rows of it. No single
function fits two different sinusoids, so a network that is trained on the pooled rows of all
tasks learns their mean: with :math:`A` uniform in [0.1, 5] and :math:`\varphi` in :math:`[0,
\pi]`, that is :math:`-1.62 \cos x`. MAML trains the same network for something else: to be a good
place to take a gradient step *from*.
"""

# %%
# The tasks
# ---------
# :class:`~sklearn_maml.datasets.SinusoidTasks` is a task distribution: `fit` draws fresh tasks
# from it for every meta-update. The tasks that we evaluate on are drawn once.
import matplotlib.pyplot as plt
import numpy as np

from sklearn_maml import MAMLRegressor
from sklearn_maml.datasets import SinusoidTasks, make_sinusoid_tasks
from sklearn_maml.inspection import AdaptationCurveDisplay

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLACK, GREY, BLUE, ORANGE, GREEN = "#000000", "#8C8C8C", "#0072B2", "#D55E00", "#009E73"

tasks = SinusoidTasks(n_rows=20)
X_new, y_new, new_task = make_sinusoid_tasks(n_tasks=300, n_rows=110, random_state=1)

# %%
# Four ways to train one network
# ------------------------------
# *Pooled*: with no inner steps in meta-training (``steps=0``), the query loss is the loss of the
# initialisation itself. This is ordinary training on all tasks at once; afterwards it can be
# fine-tuned on the support rows of a new task, from `adapt_steps` on.
#
# *MAML* in the setting of the paper, one inner step of rate 0.01, with exact (second-order)
# meta-gradients, and *first order*, which takes the inner gradient for a constant.
#
# *Defaults*: what `MAMLRegressor` does when nothing is said.
setting = {"update_rule": "sgd", "alpha": 0.01, "n_shots": 10, "max_iter": 3000, "random_state": 0}
models = {
    "pooled, fine-tuned": MAMLRegressor(steps=0, **setting),
    "first order": MAMLRegressor(steps=1, meta_gradient="first-order", **setting),
    "second order": MAMLRegressor(steps=1, **setting),
    "defaults": MAMLRegressor(random_state=0),
}
for model in models.values():
    model.fit(tasks)

# %%
# The pooled network was trained without a rate. To be fair to it, its rate of fine-tuning is the
# best of five, chosen on tasks that are not used again.
validation = make_sinusoid_tasks(n_tasks=200, n_rows=20, random_state=2)
pooled = models["pooled, fine-tuned"].set_params(adapt_steps=10)
rates = [0.001, 0.003, 0.01, 0.03, 0.1]
best_rate = max(
    rates, key=lambda alpha: pooled.set_params(alpha=alpha).score(*validation[:2], validation[2])
)
pooled.set_params(alpha=best_rate)
print(f"pooled network: best rate of fine-tuning {best_rate}")

# %%
# Three new tasks
# ---------------
# Ten support rows each. Both initialisations (dashed) are the mean of the tasks: neither is a
# fit. But ten steps bend the pooled network a little, and only where the rows are, while that of
# MAML is *sensitive*: one gradient step makes the right sinusoid of it, nearly, and further steps
# improve it, also where there are no rows.
grid = np.linspace(-5, 5, 200)
shown = [11, 12, 13]
# the inputs and targets of task j are row j
x, y = X_new.reshape(300, 110), y_new.reshape(300, 110)
names = ["pooled, fine-tuned", "second order"]


def the_task(x, y):
    """The whole sinusoid: a combination of sine and cosine."""
    weights = np.linalg.lstsq(np.c_[np.sin(x), np.cos(x)], y)[0]
    return np.c_[np.sin(grid), np.cos(grid)] @ weights


titles = {"pooled, fine-tuned": "pooled, then fine-tuned", "second order": "MAML, second order"}

figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained")
for row, name in enumerate(names):
    for ax, j in zip(axes[row], shown, strict=True):
        support = x[j, :10, None], y[j, :10]
        ax.plot(grid, the_task(x[j], y[j]), color=BLACK, lw=5, alpha=0.15, label="the task")
        for steps, color, style in ((0, GREY, "--"), (1, ORANGE, "-"), (10, BLUE, "-")):
            models[name].set_params(adapt_steps=steps).adapt(*support)
            label = {0: "initialisation", 1: "1 step", 10: "10 steps"}[steps]
            ax.plot(grid, models[name].predict(grid[:, None]), style, color=color, label=label)
        ax.scatter(*support, color=BLACK, s=22, zorder=3, label="support rows")
    axes[row, 0].set_ylabel(f"{titles[name]}\n\ny")
for ax in axes[1]:
    ax.set_xlabel("x")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
plt.show()

# %%
# The mean over 300 new tasks
# ---------------------------
# :class:`~sklearn_maml.inspection.AdaptationCurveDisplay` adapts to ten rows of every task,
# scores the other hundred, and does so for every number of inner steps. All start from the same
# error, that of the mean. A step of first order costs less, but after the same number of updates
# second order is ahead. The defaults are made for real tables: support sets of any size from 5 to
# 20 rows, more and larger inner steps, and a third of the updates made here.
for model in models.values():
    model.set_params(adapt_steps=None)
figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
colors = dict(zip(models, (GREY, GREEN, BLUE, ORANGE), strict=True))
for name, model in models.items():
    AdaptationCurveDisplay.from_estimator(
        model,
        X_new,
        y_new,
        new_task,
        steps=range(11),
        scoring="neg_mean_squared_error",
        n_shots=10,
        ax=ax,
        line_kw={"color": colors[name], "label": name},
    )
for line in [line for line in ax.lines if line.get_gid() != "adaptation curve"]:
    line.remove()  # the numbers of steps in meta-training: three different ones
for line, name in zip(ax.lines, models, strict=True):
    ax.text(10.2, line.get_ydata()[-1], name, color=line.get_color(), va="center")
ax.get_legend().remove()
ax.set(yscale="log", ylabel="Mean squared error of the query rows", title="K = 10, 300 new tasks")
ticks = [0.1, 0.2, 0.5, 1, 2, 3]
ax.set_yticks(ticks, ticks)
ax.set_yticks([], minor=True)
plt.show()

# %%
# References
# ----------
# .. [1] Finn, C., Abbeel, P. & Levine, S. (2017). Model-Agnostic Meta-Learning for Fast Adaptation
#    of Deep Networks. ICML.
