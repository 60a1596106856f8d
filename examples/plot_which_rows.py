"""
Which five settings of a new video to measure
=============================================

Labels cost something: here, each is a video encoded once more. Before any is measured, a
meta-learned model knows where new videos differ and which settings go together, and so which
measurement would tell most about all the others. 250 videos were measured at the same 201 settings
of the encoder x264 (Lesoil et al. 2023) [1]_; of a new video, `suggest_rows` names the five to
measure.
"""

# %%
# Meta-training
# -------------
# 50 videos are held out. Bitrate and speed are two outputs of one model, all settings are the
# defaults, and the scaler is part of a pipeline.
import matplotlib.pyplot as plt
import numpy as np
import sklearn
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_maml import MAMLRegressor, adapt, suggest_rows
from sklearn_maml.datasets import load_x264

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
GREY, BLUE, ORANGE = "#8C8C8C", "#0072B2", "#D55E00"
sklearn.set_config(enable_metadata_routing=True)  # lets the pipeline pass the groups on

data = load_x264(target=["log2_kbps", "log2_fps"])
X, Y, video = data.data, data.target, data.groups
new_videos = np.random.RandomState(0).permutation(np.unique(video))[:50]
new = np.isin(video, new_videos)
model = make_pipeline(StandardScaler(), MAMLRegressor(random_state=0))
model.fit(X[~new], Y[~new], groups=video[~new])

# %%
# The five settings
# -----------------
# The pool is all settings of a video of which nothing is known. The first is the one whose
# measurement takes most of the variance of the predictions at all 201 settings away, the second is
# the best one after the first, and so on.
one = np.flatnonzero(video == new_videos[0])
five = suggest_rows(model, X[one], 5)
print("settings to measure, of 201:", five)

# %%
# How much a measurement takes away does not depend on what it says, so the list can be written
# down before the first of them, and all new videos have the same one. Here they are among
# the settings of a video. They are neither a cluster nor a frame around the others.
kbps, fps = Y[one].T
figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
ax.scatter(fps, kbps, s=12, color=GREY, alpha=0.6, label="201 settings")
ax.scatter(fps[five], kbps[five], s=70, facecolors="none", edgecolors=BLUE, lw=1.8, label="chosen")
for number, row in enumerate(five, 1):
    ax.annotate(str(number), (fps[row], kbps[row]), xytext=(7, 4), textcoords="offset points")
ax.set(xlabel="speed (log2 frames per second)", ylabel="bitrate (log2 kbit/s)")
ax.set_title(f"{new_videos[0]}: the settings to measure, in their order")
ax.legend()
plt.show()

# %%
# Against settings drawn at random
# --------------------------------
# Each new video is adapted to with K chosen settings, or with K random ones, ten times over, and
# predicted at all settings that were not measured.
LARGEST, DRAWS = 10, 10
order = suggest_rows(model, X[new], LARGEST, groups=video[new])
chosen = np.flatnonzero(new)[order].reshape(len(new_videos), LARGEST)
rng = np.random.RandomState(0)
of_video = [np.flatnonzero(video == video[rows[0]]) for rows in chosen]
random = [np.stack([rng.permutation(rows)[:LARGEST] for rows in of_video]) for _ in range(DRAWS)]


def errors(measured):
    """RMSE (n_videos, n_outputs) at the settings that were not measured."""
    rows = measured.ravel()
    adapted = adapt(model, X[rows], Y[rows], groups=video[rows])
    rest = np.flatnonzero(new & ~np.isin(np.arange(len(X)), rows))
    squares = (adapted.predict(X[rest], groups=video[rest]) - Y[rest]) ** 2
    _, place = np.unique(video[rest], return_inverse=True)
    sums = np.stack([np.bincount(place, column) for column in squares.T], axis=1)
    return np.sqrt(sums / np.bincount(place)[:, None])


shots = np.arange(1, LARGEST + 1)
of_chosen = np.stack([errors(chosen[:, :k]).mean(0) for k in shots])
of_random = np.mean([[errors(draw[:, :k]).mean(0) for k in shots] for draw in random], axis=0)

# %%
# Five chosen settings are worth more than eight random ones, for either target.
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
titles = ["bitrate (log2 kbit/s)", "speed (log2 frames per second)"]
for j, (ax, title) in enumerate(zip(axes, titles, strict=True)):
    ax.plot(shots, of_random[:, j], "s-", color=GREY, label="random settings")
    ax.plot(shots, of_chosen[:, j], "o-", color=BLUE, label="chosen settings")
    ax.axhline(of_random[7, j], color=GREY, ls=":", lw=1)
    ax.plot(5, of_chosen[4, j], "o", ms=13, mfc="none", mec=ORANGE, mew=1.8)
    ax.set(title=title, xlabel="K, measured settings of the new video", ylim=(0, None))
axes[0].set_ylabel("RMSE at the other settings")
axes[0].legend()
plt.show()
for j, title in enumerate(titles):
    print(f"{title}: five chosen {of_chosen[4, j]:.3f}, eight random {of_random[7, j]:.3f}")

# %%
# Going on
# --------
# A model that has adapted goes on from there: leave what is measured out of the pool, and ask
# for the next ones. It knows how sure it is, so that one can stop when it is sure enough.
adapted = adapt(model, X[one[five]], Y[one[five]])
left = np.delete(one, five)
print("next:", left[suggest_rows(adapted, X[left], 3)] - one[0])
for k in (0, 1, 3, 5):
    known = adapt(model, X[one[five[:k]]], Y[one[five[:k]]])
    _, std = known.predict(X[left], return_std=True)
    print(f"mean standard deviation after {k} measurements (kbit/s, fps):", std.mean(0).round(2))

# %%
# References
# ----------
# .. [1] Lesoil, L., Acher, M., Blouin, A. & Jezequel, J.-M. (2023). Input sensitivity on the
#    performance of configurable systems: an empirical study. Journal of Systems and Software, 201.
