"""
Handwritten characters from one example
=======================================

5-way K-shot classification of Omniglot characters (Lake et al. 2015) [1]_: an episode is five
characters never seen before, with K labelled drawings of each (the support set), and the task is
to name further drawings (the query set). The labels mean something inside an episode only: "A" is
one character here and another one there. That is what `n_ways` says.
"""

# %%
# Two sets of alphabets
# ---------------------
# The 964 characters of the background alphabets are for meta-training, the 659 characters of 20
# other alphabets for evaluation. Images of 14 x 14 pixels keep this example short.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from sklearn_maml import MAMLClassifier
from sklearn_maml.datasets import load_omniglot

BLACK, GREY, BLUE, ORANGE, GREEN, PINK = (
    "#000000", "#8C8C8C", "#0072B2", "#D55E00", "#009E73", "#CC79A7",
)  # fmt: skip


def shrink(images):
    """Means of 2 x 2 pixels, as rows of 196 features."""
    return images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)


background = load_omniglot(subset="background")
evaluation = load_omniglot(subset="evaluation")
X, y = shrink(background.images), background.target
X_new = shrink(evaluation.images)

# %%
# A convolutional network
# -----------------------
# Any `torch.nn.Module` will do; its last layer has one output for each of the `n_ways` classes.
# One inner step of rate 0.4 is the published setting [2]_. The class-to-output assignment of
# every episode is permuted at random, so that nothing about classes can be stored in the outputs.


class ConvNet(nn.Module):
    def __init__(self, out_features):
        super().__init__()
        layers = []
        for n_in, n_out in ((1, 32), (32, 32), (32, 32)):
            layers.append(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1))
            layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, out_features))

    def forward(self, x):
        return self.layers(x.reshape(-1, 1, 14, 14))


clf = MAMLClassifier(
    update_rule="sgd",
    module=ConvNet,
    n_ways=5,
    n_shots=1,
    n_queries=5,
    alpha=0.4,
    steps=1,
    meta_batch_size=8,
    max_iter=400,
    early_stopping=False,
    random_state=0,
)
clf.fit(X, y)

# %%
# One episode
# -----------
# Five characters of one alphabet, one drawing of each to adapt to, and six more drawings of each
# to name. Frames in orange are mistakes, with the label that was predicted.
letters = np.array(list("ABCDE"))
rng = np.random.RandomState(4)
tengwar = np.unique(evaluation.target[evaluation.groups == "Tengwar"])
rows = np.stack(
    [
        rng.permutation(np.flatnonzero(evaluation.target == character))[:7]
        for character in rng.choice(tengwar, 5, replace=False)
    ]
)
clf.adapt(X_new[rows[:, 0]], letters)
predicted = clf.predict(X_new[rows[:, 1:].ravel()]).reshape(5, 6)

figure, axes = plt.subplots(5, 8, figsize=(7.6, 5.2), width_ratios=[1, 0.25] + [1] * 6)
figure.subplots_adjust(left=0.06, right=0.99, top=0.88, bottom=0.02, wspace=0.12, hspace=0.35)
for i in range(5):
    axes[i, 1].axis("off")
    axes[i, 0].set_ylabel(letters[i], rotation=0, fontsize=14, labelpad=14, va="center")
    for j, ax in enumerate(axes[i, [0, 2, 3, 4, 5, 6, 7]]):
        ax.imshow(evaluation.images[rows[i, j]], cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        if j == 0:
            color = BLACK
        else:
            right = predicted[i, j - 1] == letters[i]
            color = BLUE if right else ORANGE
            ax.set_title(predicted[i, j - 1], color=color, fontsize=11, pad=2)
        plt.setp(ax.spines.values(), color=color, lw=2)
figure.text(0.105, 0.95, "support", ha="center", fontsize=12)
figure.text(0.6, 0.95, "query rows and what they are taken for", ha="center", fontsize=12)
plt.show()

# %%
# Accuracy by number of shots
# ---------------------------
# 200 episodes of characters of all evaluation alphabets, adapted to in one call: each episode is
# a task id in `groups`. Before adaptation the network cannot know which character is called what,
# and guesses.
N_EPISODES, N_QUERIES = 200, 5
by_class = np.argsort(evaluation.target, kind="stable").reshape(-1, 20)


def draw_episodes(n_shots):
    """Positions of support and query rows: (n_episodes, 5, n_shots) and (n_episodes, 5, 5)."""
    rng = np.random.RandomState(7)
    drawn = [
        [rng.permutation(by_class[c]) for c in rng.choice(len(by_class), 5, replace=False)]
        for _ in range(N_EPISODES)
    ]
    rows = np.array(drawn)
    return rows[..., :n_shots], rows[..., -N_QUERIES:]


def accuracies(n_shots):
    support, query = draw_episodes(n_shots)
    s, q = support.ravel(), query.ravel()
    y_support = np.tile(np.repeat(letters, n_shots), N_EPISODES)
    y_query = np.tile(np.repeat(letters, N_QUERIES), N_EPISODES)
    episode_s = np.repeat(np.arange(N_EPISODES), 5 * n_shots)
    episode_q = np.repeat(np.arange(N_EPISODES), 5 * N_QUERIES)

    def maml(steps):
        clf.set_params(adapt_steps=steps).adapt(X_new[s], y_support, groups=episode_s)
        return clf.predict(X_new[q], groups=episode_q)

    def pixels(make):
        labels = np.repeat(letters, n_shots)
        return np.concatenate(
            [
                make().fit(X_new[a.ravel()], labels).predict(X_new[b.ravel()])
                for a, b in zip(support, query, strict=True)
            ]
        )

    predicted = {
        "MAML, after adaptation": maml(None),
        "logistic regression on pixels": pixels(LogisticRegression),
        "nearest neighbour on pixels": pixels(lambda: KNeighborsClassifier(1)),
        "MAML, before adaptation": maml(0),
    }
    return {
        name: (values == y_query).reshape(N_EPISODES, -1).mean(1)
        for name, values in predicted.items()
    }


shots = [1, 2, 5, 10]
table = {k: accuracies(k) for k in shots}

figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
styles = [(BLUE, "o-"), (GREEN, "^-"), (PINK, "v-"), (GREY, "s--")]
for (color, style), name in zip(styles, table[1], strict=True):
    mean = [table[k][name].mean() for k in shots]
    error = [1.96 * table[k][name].std(ddof=1) / np.sqrt(N_EPISODES) for k in shots]
    ax.errorbar(shots, mean, error, color=color, fmt=style, capsize=3, label=name)
ax.axhline(0.2, color=BLACK, lw=0.8, ls=":")
ax.text(10.3, 0.21, "chance", ha="right", va="bottom", fontsize="small")
ax.set(xlabel="K, labelled drawings of each character", ylabel="accuracy", ylim=(0.1, 1))
ax.set_xticks(shots)
ax.spines[["top", "right"]].set_visible(False)
ax.set_title("5-way K-shot, 200 episodes (95 % intervals over episodes)")
ax.legend(loc="center right", bbox_to_anchor=(1, 0.36))
plt.show()

# %%
# This network saw 3,200 episodes in meta-training, all with one shot; the published ones saw a
# hundred times as many. More shots than it was trained with still help.
#
# References
# ----------
# .. [1] Lake, B. M., Salakhutdinov, R. & Tenenbaum, J. B. (2015). Human-level concept learning
#    through probabilistic program induction. Science, 350(6266), 1332-1338.
#
# .. [2] Finn, C., Abbeel, P. & Levine, S. (2017). Model-Agnostic Meta-Learning for Fast Adaptation
#    of Deep Networks. ICML.
