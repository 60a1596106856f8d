"""Stages of `benchmarks/gpu.py` that learn Omniglot in the protocol of Finn et al. (2017)."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from gpu_steps import Clock, Context
from papers import (
    FILTERS,
    N_EPISODES,
    QUERIES_OF_CLASS,
    accuracies,
    draw_episodes,
    omniglot_classifier,
    split_characters,
)
from sinusoid import interval

UPDATES = 60_000
# as published: one query row of each class, more inner steps in testing (5-way)
PROTOCOL: dict[int, dict[str, Any]] = {
    5: {"alpha": 0.4, "steps": 1, "adapt_steps": 3, "meta_batch_size": 32},
    20: {"alpha": 0.1, "steps": 5, "adapt_steps": 5, "meta_batch_size": 16},
}


@dataclasses.dataclass
class OmniglotResult:
    """A meta-training on Omniglot, as far as the time went."""

    ways: int
    shots: int
    updates: int
    planned: int  # by the time left, at most those of the paper
    fit_seconds: float
    updates_per_second: float  # of the second half of the fit
    settings: dict[str, Any]
    n_episodes: int
    # in per cent, with half of the 95 % interval over episodes
    # a query set has one row of each class in meta-training and in the published test episodes, by
    # which batch norm has its statistics
    as_published: list[float] = dataclasses.field(default_factory=list)
    transductive: list[float] = dataclasses.field(default_factory=list)
    inductive: list[float] = dataclasses.field(default_factory=list)
    kind: str = "omniglot"


def omniglot_stage(context: Context, ways: int) -> None:
    """Meta-train for as long as the time allows, and evaluate both ways."""
    dry = context.dry_run
    X, y, X_new, y_new = split_characters(rotations=not dry)
    n_episodes, filters = (4, 4) if dry else (N_EPISODES, FILTERS)
    support, query = draw_episodes(y_new, ways, 1, seed=1, n_episodes=n_episodes)
    if dry:
        chosen = np.isin(y, np.unique(y)[:40])
        X, y = X[chosen], y[chosen]
    settings = {
        **PROTOCOL[ways],
        **({"meta_batch_size": 2} if dry else {}),
        "n_queries": 1,
        "beta": 1e-3,
        "engine__batch_norm": "transductive",
    }

    def fit(updates: int, seconds: float, strict: bool) -> tuple[Any, Clock]:
        clock = Clock(seconds, context.synchronise, strict)
        clf = omniglot_classifier(
            ways,
            1,
            0,
            filters=filters,
            device=context.device,
            callbacks=[clock],
            max_iter=updates,
            **settings,
        )
        return clf.fit(X, y), clock

    # how fast it is decides how many updates are planned: the rate falls towards the end of a fit
    whole = context.left
    most = 5 if dry else UPDATES
    _, clock = fit(most, min(6.0, 0.1 * whole), strict=False)
    reserve = max(8.0, 0.12 * whole)  # for evaluating
    seconds = max(context.left - reserve, 1.0)
    planned = max(min(most, int(0.95 * seconds / clock.typical)), 1)
    start = time.perf_counter()
    clf, clock = fit(planned, seconds, strict=True)
    took = time.perf_counter() - start
    result = OmniglotResult(
        ways, 1, clf.n_iter_, planned, took, 1 / clock.typical, settings, n_episodes
    )
    context.emit(result)
    for name, norm, at_once in (
        ("as_published", "transductive", 1),
        ("transductive", "transductive", QUERIES_OF_CLASS),
        ("inductive", "inductive", QUERIES_OF_CLASS),
    ):
        clf.set_params(engine__batch_norm=norm)
        found = 100 * accuracies(clf, X_new, support, query, at_once)
        setattr(result, name, [*interval(found)])
        context.emit(result)
