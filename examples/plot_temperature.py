r"""
A year of temperatures from five days
=====================================

A task is a weather station, a row is a day of the year, and the target is the mean temperature of
that day. Five days of a new station are known: how warm is it there on the other 360?

**The stations are synthetic.** Their curves come from the formula below, which has the main
features of real ones and keeps this example free of data; it is no climate data, and its figures
say nothing about any place.
"""

# %%
# Synthetic stations
# ------------------
# A station has a latitude :math:`\lambda` from -65 to 65 degrees, an altitude :math:`h` in km and a
# continentality :math:`c` from 0 to 1 (distance from the ocean, in a sense). Its temperature on day
# :math:`d` of the year is
#
# .. math::
#
#     T(d) = m + A \cos \left(2 \pi \frac{d - p}{365}\right)
#     + B \cos \left(4 \pi \frac{d - q}{365}\right) + \varepsilon_d
#
# - with an annual mean :math:`m = 29 - 0.011 \lambda^2 - 6.5 h`, which falls by 6.5 °C per km;
# - an annual wave of amplitude :math:`A = (5 + 17 c) |\lambda| / 65`, whose warmest day :math:`p`
#   is 20 to 45 days after the summer solstice of the hemisphere, later near the ocean;
# - a small semiannual wave, :math:`B` normal with standard deviation 1 °C;
# - and weather :math:`\varepsilon_d` that is correlated from day to day (autoregressive of
#   coefficient 0.7 and standard deviation 1 °C).
#
# The learner is told the day, and none of this.
import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, ExpSineSquared, WhiteKernel

from sklearn_maml import MAMLRegressor

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLACK, GREY, BLUE, ORANGE, GREEN, PINK = (
    "#000000", "#8C8C8C", "#0072B2", "#D55E00", "#009E73", "#CC79A7",
)  # fmt: skip
DAYS = np.arange(365)


def make_stations(n, random_state):
    """Temperatures (n, 365) with their noise, and latitudes (n,)."""
    rng = np.random.RandomState(random_state)
    latitude = rng.uniform(-65, 65, size=(n, 1))
    continentality = rng.uniform(size=(n, 1))
    altitude = rng.exponential(0.5, size=(n, 1))
    mean = 29 - 0.011 * latitude**2 - 6.5 * altitude
    amplitude = np.abs(latitude) / 65 * (5 + 17 * continentality)
    solstice = np.where(latitude > 0, 171, 354)
    warmest = solstice + 45 - 25 * continentality + rng.normal(scale=3, size=(n, 1))
    semiannual = rng.normal(scale=1.0, size=(n, 1))
    spring = rng.uniform(60, 100, size=(n, 1))
    noise = rng.normal(size=(n, 365))
    for day in range(1, 365):
        noise[:, day] = 0.7 * noise[:, day - 1] + np.sqrt(1 - 0.7**2) * noise[:, day]
    wave = amplitude * np.cos(2 * np.pi * (DAYS - warmest) / 365)
    wave = wave + semiannual * np.cos(4 * np.pi * (DAYS - spring) / 365)
    return mean + wave + noise, latitude.ravel()


T, _ = make_stations(120, random_state=0)
T_new, latitude = make_stations(60, random_state=1)

# %%
# Meta-training
# -------------
# The day enters as a point on a circle, so that 31 December is beside 1 January. Equally sized
# tasks can be given as arrays (n_tasks, n_rows, n_features); `MAMLRegressor` is as it comes.
angle = 2 * np.pi * DAYS / 365
year = np.column_stack([np.cos(angle), np.sin(angle)])
X = np.broadcast_to(year, (len(T), 365, 2))
reg = MAMLRegressor(random_state=0).fit(X, T)

# %%
# Six new stations
# ----------------
# Five days, drawn at random (orange). Before adaptation the network predicts the mean of all
# stations for all (dashed); northern and southern summers cancel in it. After adapting it
# has found the hemisphere, the level and the amplitude.
rng = np.random.RandomState(5)
drawn = np.array([rng.permutation(365) for _ in T_new])


def adapted_years(n_shots):
    """Predicted years (n_stations, 365) from the first days drawn, of all stations in one call."""
    days = drawn[:, :n_shots]
    rows, station = year[days].reshape(-1, 2), np.repeat(np.arange(len(days)), n_shots)
    reg.adapt(rows, np.take_along_axis(T_new, days, 1).ravel(), groups=station)
    everything = np.tile(year, (len(days), 1)), np.repeat(np.arange(len(days)), 365)
    return reg.predict(everything[0], groups=everything[1]).reshape(-1, 365)


after = adapted_years(5)
before = reg.set_params(adapt_steps=0).adapt(year[:1], T_new[0, :1]).predict(year)
reg.set_params(adapt_steps=None)

shown = np.argsort(latitude)[[2, 12, 24, 34, 46, 57]]
figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained")
for ax, j in zip(axes.flat, shown, strict=True):
    ax.plot(DAYS, T_new[j], color=GREY, lw=0.8, label="all 365 days")
    ax.plot(DAYS, before, "--", color=BLACK, lw=1, label="before adaptation")
    ax.plot(DAYS, after[j], color=BLUE, lw=2, label="after 5 days")
    days = drawn[j, :5]
    ax.scatter(days, T_new[j, days], color=ORANGE, s=30, zorder=3, label="the 5 days")
    ax.set_title(f"{abs(latitude[j]):.0f}° {'N' if latitude[j] > 0 else 'S'}", fontsize="medium")
    ax.set_xticks([0, 91, 182, 273], ["Jan", "Apr", "Jul", "Oct"])
for ax in axes[:, 0]:
    ax.set_ylabel("°C")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %%
# Error by number of days
# -----------------------
# Against four others:
#
# - the *mean year* of all other stations, the best that a pooled model can say, and the same
#   shifted to the mean of the known days;
# - a *periodic Gaussian process* fitted to the days of the station alone;
# - a *mixed model*: the station's two harmonics have a common mean and covariance, estimated from
#   the other stations, and are then inferred from its days. This is (but for the correlation of
#   the noise) the model that the stations were made with, and so about the best there is. One has
#   to know it.
harmonics = np.column_stack([f(k * angle) for k in (1, 2) for f in (np.cos, np.sin)])
H = np.column_stack([np.ones(365), harmonics])
coefficients = np.linalg.lstsq(H, T.T)[0].T
prior_mean, prior_covariance = coefficients.mean(0), np.cov(coefficients.T)
noise = np.var(T - coefficients @ H.T)
mean_year = T.mean(0)


def mixed(days, temperature):
    shared = H[days] @ prior_covariance @ H[days].T + noise * np.eye(len(days))
    weights = np.linalg.solve(shared, temperature - H[days] @ prior_mean)
    return H @ (prior_mean + prior_covariance @ H[days].T @ weights)


def gaussian_process(days, temperature):
    periodic = ExpSineSquared(1.0, 365, periodicity_bounds="fixed", length_scale_bounds=(0.5, 10))
    kernel = ConstantKernel(2.0, (0.1, 1e3)) * periodic + WhiteKernel(0.05, (1e-4, 1.0))
    gp = GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():  # two days have no clear optimum
        warnings.simplefilter("ignore", ConvergenceWarning)
        return gp.fit(days[:, None], temperature).predict(DAYS[:, None])


def shifted(days, temperature):
    return mean_year + (temperature - mean_year[days]).mean()


def rmse(predicted, n_shots):
    """Of each station, on the days that were not given."""
    squares = np.take_along_axis((predicted - T_new) ** 2, drawn[:, n_shots:], 1)
    return np.sqrt(squares.mean(1))


shots = [2, 3, 5, 10, 20]
table = {}
for k in shots:
    table["mean year", k] = rmse(np.broadcast_to(mean_year, T_new.shape), k)
    for name, fit in (
        ("mean year, shifted", shifted),
        ("periodic Gaussian process", gaussian_process),
        ("mixed model of harmonics", mixed),
    ):
        years = [fit(d[:k], t[d[:k]]) for d, t in zip(drawn, T_new, strict=True)]
        table[name, k] = rmse(np.array(years), k)
    table["MAML", k] = rmse(adapted_years(k), k)

figure, ax = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
styles = {
    "mean year": (GREY, "s"),
    "mean year, shifted": (ORANGE, "D"),
    "periodic Gaussian process": (GREEN, "^"),
    "MAML": (BLUE, "o"),
    "mixed model of harmonics": (PINK, "v"),
}
for name, (color, marker) in styles.items():
    mean = np.array([table[name, k].mean() for k in shots])
    error = np.array([table[name, k].std(ddof=1) / np.sqrt(len(T_new)) for k in shots])
    ax.plot(shots, mean, color=color, marker=marker, label=name)
    ax.fill_between(shots, mean - error, mean + error, color=color, alpha=0.15, lw=0)
ax.axhline(1, color=BLACK, lw=0.8, ls=":")
ax.text(2, 0.96, "noise", va="top", fontsize="small")
ax.set(xscale="log", yscale="log", xlabel="K, known days of the new station", ylabel="RMSE (°C)")
ax.set_xticks(shots, shots)
ax.set_xticks([], minor=True)
ticks = [1, 2, 5, 10]
ax.set_yticks(ticks, ticks)
ax.set_yticks([], minor=True)
ax.set_title("60 new stations (bands: standard error over stations)")
ax.legend(fontsize="small")
plt.show()

# %%
# MAML is as good as the mixed model, which was told the formula, and with few days far
# ahead of what can be learned from the station alone. Twenty days are nearly enough to do without
# other stations: the Gaussian process of the station itself has almost caught up by then.
