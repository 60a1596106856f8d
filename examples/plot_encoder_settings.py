"""
Encoder settings for a new video
================================

A video encoder has dozens of options, and what they do depends on the video: an option that saves
many bits of a cartoon may save few of a concert. Nobody can encode a new video at every setting
to find out. But other videos *were* measured at all of them: 250 videos at 201 settings of x264
(Lesoil et al. 2023) [1]_. A video is a task, and the question is how far five to ten measurements
of a new video take us.
"""

# %%
# The tasks
# ---------
# 50 videos are held out. All videos were measured at the same settings, so what is new about a
# new video is the video, never the settings.
import warnings

import matplotlib.pyplot as plt
import numpy as np
import sklearn
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLRegressor, adapt
from sklearn_maml.datasets import load_x264

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLACK, GREY, BLUE, ORANGE, GREEN, PINK = (
    "#000000", "#8C8C8C", "#0072B2", "#D55E00", "#009E73", "#CC79A7",
)  # fmt: skip
sklearn.set_config(enable_metadata_routing=True)  # lets the pipeline pass the groups on

X, Y, video = load_x264(target=["log2_kbps", "log2_fps"], return_X_y_groups=True)
videos = np.random.RandomState(0).permutation(np.unique(video))
new_videos = videos[:50]
new = np.isin(video, new_videos)

figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
for name, color in zip(new_videos[:4], (BLUE, ORANGE, GREEN, PINK), strict=True):
    measured = Y[video == name]
    ax.scatter(measured[:, 1], measured[:, 0], s=12, color=color, label=name)
ax.set(xlabel="speed (log2 frames per second)", ylabel="bitrate (log2 kbit/s)")
ax.set_title("Four videos at the same 201 settings")
ax.legend(fontsize="small")
plt.show()

# %%
# Meta-training
# -------------
# Both targets at once: bitrate and speed are two outputs of one network. The settings of
# meta-training are the defaults, and the scaler is part of a scikit-learn pipeline.
model = make_pipeline(StandardScaler(), MAMLRegressor(random_state=0))
model.fit(X[~new], Y[~new], groups=video[~new])

# %%
# Against what one would do otherwise
# -----------------------------------
# From K measured settings of each new video, predict its bitrate at the others:
#
# - a *pooled* gradient boosting, which knows all other videos and ignores the measurements;
# - the same, its mean error on the K measurements added: right in level, if not in shape;
# - *ridge* regression and a *Gaussian process* fitted to the K measurements, which ignore all
#   other videos;
# - the meta-learned network, *before* and *after* adaptation. All videos are adapted to in one
#   call.
rng = np.random.RandomState(7)
rows_of = {name: rng.permutation(np.flatnonzero(video == name)) for name in new_videos}
pooled = HistGradientBoostingRegressor(random_state=0).fit(X[~new], Y[~new, 0])
of_pooled = pooled.predict(X)
scaler = model[0]


def gaussian_process():
    kernel = ConstantKernel(1.0) * RBF(5.0) + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True)


def ridge():
    return RidgeCV(np.logspace(-3, 3, 13))


def alone(make, support, query):
    with warnings.catch_warnings():  # a Gaussian process of five rows has no clear optimum
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = make().fit(scaler.transform(X[support]), Y[support, 0])
    return fitted.predict(scaler.transform(X[query]))


def errors(n_shots):
    """RMSE of the bitrate of each new video, for each method."""
    pairs = [(rows[:n_shots], rows[n_shots:]) for rows in rows_of.values()]
    support, query = (np.concatenate(part) for part in zip(*pairs, strict=True))
    adapted = adapt(model, X[support], Y[support], groups=video[support])
    after = adapted.predict(X[query], groups=video[query])[:, 0]
    adapted[-1].set_params(adapt_steps=0)
    before = adapt(adapted, X[support], Y[support], groups=video[support])
    before = before.predict(X[query], groups=video[query])[:, 0]
    predicted = {
        "pooled": [of_pooled[q] for _, q in pairs],
        "pooled + mean error": [of_pooled[q] + (Y[s, 0] - of_pooled[s]).mean() for s, q in pairs],
        "ridge": [alone(ridge, s, q) for s, q in pairs],
        "Gaussian process": [alone(gaussian_process, s, q) for s, q in pairs],
        "MAML, before": np.split(before, len(pairs)),
        "MAML, after": np.split(after, len(pairs)),
    }
    return {
        name: np.array(
            [np.sqrt(np.mean((p - Y[q, 0]) ** 2)) for p, (_, q) in zip(parts, pairs, strict=True)]
        )
        for name, parts in predicted.items()
    }


shots = [2, 3, 5, 10, 20, 40]
table = {k: errors(k) for k in shots}

# %%
# Two predictions use no measurement, and stay where they are. Ridge and the Gaussian process
# learn the options' effects anew for each video; the meta-learned network knows what the options
# usually do, and with five measurements predicts better than the Gaussian process with twenty.
# With two, little more than the level of the video can be learned, and correcting a pooled
# model's mean error is nearly as good.
figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
styles = {
    "pooled": (GREY, "s", "-"),
    "MAML, before": (BLUE, ".", ":"),
    "ridge": (PINK, "v", "-"),
    "Gaussian process": (GREEN, "^", "-"),
    "pooled + mean error": (ORANGE, "D", "-"),
    "MAML, after": (BLUE, "o", "-"),
}
for name, (color, marker, line) in styles.items():
    mean = np.array([table[k][name].mean() for k in shots])
    error = np.array([table[k][name].std(ddof=1) / np.sqrt(len(new_videos)) for k in shots])
    ax.plot(
        shots, mean, line, color=color, marker=marker, label=name, ms=10 if name == "pooled" else 6
    )
    ax.fill_between(shots, mean - error, mean + error, color=color, alpha=0.15, lw=0)
ax.set(xscale="log", yscale="log", xlabel="K, measured settings of the new video")
ax.set_ylabel("RMSE at the other settings (log2 kbit/s)")
ax.set_xticks(shots, shots)
ax.set_xticks([], minor=True)
ticks = [0.1, 0.2, 0.5, 1, 2]
ax.set_yticks(ticks, ticks)
ax.set_yticks([], minor=True)
ax.set_title("Bitrate of 50 new videos (bands: standard error over videos)")
ax.legend(ncols=2, fontsize="small")
plt.show()

# %%
# Which setting to take
# ---------------------
# The use of a prediction is a decision: the setting of the smallest bitrate among those that are
# fast enough, say faster than half of the settings. After ten measurements of a new video we can
# take the best of these ten, or the setting that the adapted model says is best. What either
# costs beyond the best setting of all 201, only the full table tells.
K = 10
support = np.concatenate([rows[:K] for rows in rows_of.values()])
adapted = adapt(model, X[support], Y[support], groups=video[support])
predicted = {name: adapted.predict(X[rows], groups=video[rows]) for name, rows in rows_of.items()}


def smallest(kbps, fps, needed):
    """Position of the smallest bitrate that is fast enough; the fastest setting if none is."""
    return np.where(fps >= needed, kbps, np.inf).argmin() if (fps >= needed).any() else fps.argmax()


extra = {"best of the ten measured": [], "chosen by the model": []}
fast_enough = 0
for name, rows in rows_of.items():
    kbps, fps = Y[rows].T
    needed = np.median(fps)
    best = kbps[smallest(kbps, fps, needed)]
    chosen = smallest(*predicted[name].T, needed)
    fast_enough += fps[chosen] >= needed - 0.1
    extra["best of the ten measured"].append(kbps[smallest(kbps[:K], fps[:K], needed)] - best)
    extra["chosen by the model"].append(kbps[chosen] - best)
for choice, bits in extra.items():
    print(f"{choice}: {100 * (2 ** np.mean(bits) - 1):.0f} % more bits than the best of all 201")
print(f"chosen by the model and fast enough (to 7 %): {fast_enough} of {len(new_videos)}")

# %%
# The whole trade-off between size and speed, for two of the videos. The line joins the settings
# than which none is both smaller and faster, known only once all are measured. The blue points
# are those that the adapted model takes for such settings.


def front(kbps, fps):
    """Settings than which none is both smaller and faster, by speed."""
    order = np.argsort(-fps)
    return order[kbps[order] <= np.minimum.accumulate(kbps[order])]


figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
for ax, name in zip(axes, new_videos[[0, 2]], strict=True):
    rows = rows_of[name]
    kbps, fps = Y[rows].T
    chosen = front(*predicted[name].T)
    best = front(kbps, fps)
    ax.scatter(fps, kbps, s=10, color=GREY, alpha=0.6, label="all 201 settings")
    ax.plot(fps[best], kbps[best], color=BLACK, lw=1, label="best trade-offs, all measured")
    ax.scatter(
        fps[chosen],
        kbps[chosen],
        s=46,
        color=BLUE,
        label="trade-offs predicted to be best",
        zorder=3,
    )
    ax.scatter(
        fps[:K], kbps[:K], s=80, facecolors="none", edgecolors=ORANGE, lw=1.6,
        label=f"the {K} settings measured", zorder=4,
    )  # fmt: skip
    ax.set(title=name, xlabel="speed (log2 frames per second)")
axes[0].set_ylabel("bitrate (log2 kbit/s)")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
# References
# ----------
# .. [1] Lesoil, L., Acher, M., Blouin, A. & Jezequel, J.-M. (2023). Input sensitivity on the
#    performance of configurable systems: an empirical study. Journal of Systems and Software, 201.
