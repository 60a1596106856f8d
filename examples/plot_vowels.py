"""
Vowels of a new speaker
=======================

A vowel is heard in the resonances of the vocal tract, its formants F1, F2, F3, and these depend
on the length of the tract: a child's vowel has the formants of another vowel of a man. Here a
task is a speaker, and all speakers share their ten labels (``n_ways=None``, the default). A new
speaker says each vowel once; then we know what the model has to know to recognise the speaker's
next words. Data of Peterson & Barney (1952) [1]_, shipped with the package.
"""

# %%
# Speakers differ
# ---------------
# Formants in the usual axes of phonetics, on logarithmic scales. The means of men, women and
# children lie along lines: the ratio of the tracts' lengths shifts all formants together.
import matplotlib.pyplot as plt
import numpy as np
import sklearn
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLClassifier, adapt
from sklearn_maml.datasets import load_vowels

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
GREY, BLUE, ORANGE, GREEN = "#6F6F6F", "#0072B2", "#D55E00", "#009E73"
KINDS = {
    "man": ("men", BLUE, "o"),
    "woman": ("women", ORANGE, "^"),
    "child": ("children", GREEN, "s"),
}
sklearn.set_config(enable_metadata_routing=True)  # lets the pipeline pass the groups on

vowels = load_vowels()
X, y, speaker, kind = np.log(vowels.data), vowels.target, vowels.groups, vowels.speaker_type
ipa = dict(zip(vowels.target_names, "iɪɛæʌɑɔʊuɝ", strict=True))  # noqa: RUF001


def vowel_axes(ax):
    ax.set(xlim=(4100, 500), ylim=(1600, 180), xscale="log", yscale="log", xlabel="F2 (Hz)")
    for axis, ticks in ((ax.xaxis, (600, 1000, 2000, 3500)), (ax.yaxis, (200, 400, 800, 1200))):
        axis.set_ticks(ticks, ticks)
        axis.set_ticks([], minor=True)


figure, ax = plt.subplots(figsize=(6.2, 4.6), layout="constrained")
for name, (plural, color, marker) in KINDS.items():
    means = {v: vowels.data[(kind == name) & (y == v)].mean(0) for v in ipa}
    for v, (_, f1, f2, _) in means.items():
        ax.plot(f2, f1, marker, color=color, ms=15, alpha=0.3, mew=0)
        ax.text(f2, f1, ipa[v], ha="center", va="center", color=color, fontsize=12)
    ax.plot([], [], marker, color=color, label=plural, ms=9, alpha=0.5)
vowel_axes(ax)
ax.set_ylabel("F1 (Hz)")
ax.set_title("Mean vowels of 33 men, 28 women and 15 children")
ax.legend()
plt.show()

# %%
# Before and after adaptation
# ---------------------------
# Five-fold cross-validation over speakers: everyone is a new speaker once. The first utterance of
# each vowel is the support set of ten rows, the second the query set. For comparison:
#
# - *gradient boosting* on the rows of all other speakers, which knows nothing of the new one;
# - the *nearest neighbour* among the ten support rows, which knows nothing of the others;
# - what phoneticians do: standardise each speaker's formants by the mean and the standard
#   deviation of the speaker's own rows (Lobanov 1971) [2]_, then a *linear discriminant
#   analysis*.
#
# A label can only be learned in an inner step if it is in the support set: `n_shots=1` is one row
# of each class.
first = np.zeros(len(y), dtype=bool)
first[np.unique([f"{s}{v}" for s, v in zip(speaker, y, strict=True)], return_index=True)[1]] = True


def lobanov(support):
    """Formants in units of each speaker's support rows."""
    Z = np.empty_like(X)
    for s in np.unique(speaker):
        own = speaker == s
        Z[own] = (X[own] - X[own & support].mean(0)) / X[own & support].std(0)
    return Z


def maml():
    return make_pipeline(StandardScaler(), MAMLClassifier(n_shots=1, max_iter=500, random_state=0))


BEFORE, AFTER = "MAML, before", "MAML, after"
methods = ["gradient boosting", "nearest neighbour", "Lobanov + LDA", BEFORE, AFTER]
predicted = {method: np.empty(len(y), dtype=object) for method in methods}
Z = lobanov(first)
for train, new in GroupKFold(5).split(X, y, speaker):
    s, q = new[first[new]], new[~first[new]]
    pooled = HistGradientBoostingClassifier(random_state=0).fit(X[train], y[train])
    predicted["gradient boosting"][q] = pooled.predict(X[q])
    lda = LinearDiscriminantAnalysis().fit(Z[train], y[train])
    predicted["Lobanov + LDA"][q] = lda.predict(Z[q])
    for name in np.unique(speaker[new]):
        a, b = s[speaker[s] == name], q[speaker[q] == name]
        predicted["nearest neighbour"][b] = KNeighborsClassifier(1).fit(X[a], y[a]).predict(X[b])
    model = maml().fit(X[train], y[train], groups=speaker[train])
    for method, steps in ((AFTER, None), (BEFORE, 0)):
        model[-1].set_params(adapt_steps=steps)
        adapted = adapt(model, X[s], y[s], groups=speaker[s])
        predicted[method][q] = adapted.predict(X[q], groups=speaker[q])

for method in methods:
    print(f"{method:18s} {np.mean(predicted[method][~first] == y[~first]):.3f}")

figure, ax = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
for j, (name, (plural, color, marker)) in enumerate(KINDS.items()):
    speakers = np.unique(speaker[kind == name])
    for k, method in enumerate(methods):
        right = predicted[method] == y
        scores = np.array([right[(speaker == s) & ~first].mean() for s in speakers])
        error = 1.96 * scores.std(ddof=1) / np.sqrt(len(scores))
        ax.errorbar(
            k + 0.2 * (j - 1), scores.mean(), error, fmt=marker, color=color, ms=8, capsize=3
        )
    ax.plot([], [], marker, color=color, ms=8, label=f"{len(speakers)} {plural}")
ax.set_xticks(range(len(methods)), [method.replace(" ", "\n", 1) for method in methods])
ax.set(ylabel="accuracy, mean over speakers", title="Vowels of new speakers (95 % intervals)")
ax.grid(axis="y", alpha=0.3)
ax.legend(loc="lower center", bbox_to_anchor=(0.44, 0))
plt.show()

# %%
# Ten vowels of the speaker are worth more than those of all other speakers, to a nearest
# neighbour even. The adapted network uses both, and gains for all three. Fifteen children are
# few, and differ: mind the intervals.
#
# Where the mistakes are
# ----------------------
# The second utterances of all children in the vowel space. Before adaptation the network takes
# the vowels of children for neighbours in the space of the average speaker; orange letters are
# those that it gets wrong.
child = (kind == "child") & ~first
figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
for ax, method in zip(axes, (BEFORE, AFTER), strict=True):
    wrong = predicted[method] != y
    for mask, color, weight in ((child & ~wrong, GREY, "normal"), (child & wrong, ORANGE, "bold")):
        for v, (_, f1, f2, _) in zip(y[mask], vowels.data[mask], strict=True):
            text = {"color": color, "weight": weight, "fontsize": 12, "clip_on": True}
            ax.text(f2, f1, ipa[v], ha="center", va="center", **text)
    vowel_axes(ax)
    ax.set_title(f"{method} adaptation: {wrong[child].sum()} of {child.sum()} wrong")
axes[0].set_ylabel("F1 (Hz)")
plt.show()

# %%
# References
# ----------
# .. [1] Peterson, G. E. & Barney, H. L. (1952). Control methods used in a study of the vowels.
#    Journal of the Acoustical Society of America, 24(2), 175-184.
#
# .. [2] Lobanov, B. M. (1971). Classification of Russian vowels spoken by different speakers.
#    Journal of the Acoustical Society of America, 49(2B), 606-608.
