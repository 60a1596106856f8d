"""The baselines by their names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.neighbors import KNeighborsRegressor

from sklearn_maml.evaluation.baselines.base import Baseline
from sklearn_maml.evaluation.baselines.fine_tuned import FineTunedMLP
from sklearn_maml.evaluation.baselines.hierarchical import (
    HierarchicalLogistic,
    MixedModel,
    RandomIntercepts,
    SplineMixedModel,
)
from sklearn_maml.evaluation.baselines.optional import GPBoost, make_tabpfn
from sklearn_maml.evaluation.baselines.per_task import NearestRow, PerTask
from sklearn_maml.evaluation.baselines.pooled import (
    Pooled,
    ResidualProcess,
    ShrunkIntercept,
    TargetEncoded,
)

RIDGE_STRENGTHS = np.logspace(-3, 3, 13)


def _ridge() -> Any:
    return RidgeCV(RIDGE_STRENGTHS)


def _boosting() -> Any:
    return HistGradientBoostingRegressor(random_state=0)


def _gaussian_process(n_rows: int) -> Any:
    kernel = ConstantKernel() * RBF() + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)


def _logistic(n_rows: int) -> Any:
    return LogisticRegression(max_iter=1000)


REGRESSION: dict[str, Callable[[], Baseline]] = {
    "pooled ridge": lambda: Pooled(_ridge(), "ridge"),
    "pooled HistGradientBoosting": lambda: Pooled(_boosting(), "boosting"),
    "pooled ridge + shrunk intercept": lambda: ShrunkIntercept(_ridge(), "ridge"),
    "pooled HGB + shrunk intercept": lambda: ShrunkIntercept(_boosting(), "boosting"),
    # of one row there is none to leave out
    "per-task ridge": lambda: PerTask(lambda n: _ridge() if n > 1 else Ridge()),
    "per-task GP": lambda: PerTask(_gaussian_process),
    "per-task kNN": lambda: PerTask(
        lambda n: KNeighborsRegressor(n_neighbors=min(3, n), weights="distance")
    ),
    "mixed model, intercept + slopes": MixedModel,
    "mixed model, splines": SplineMixedModel,
    "target-encoded boosting": lambda: TargetEncoded(_boosting()),
    "pooled HGB + GP on residuals": lambda: ResidualProcess(_boosting(), "boosting"),
    "pretrained MLP + fine-tune": FineTunedMLP,
    "GPBoost": GPBoost,
    "per-task TabPFN": lambda: make_tabpfn(classification=False),
}
CLASSIFICATION: dict[str, Callable[[], Baseline]] = {
    "pooled HistGradientBoosting": lambda: Pooled(
        HistGradientBoostingClassifier(random_state=0), "boosting"
    ),
    "pooled logistic": lambda: Pooled(_logistic(0), "logistic"),
    "per-task 1-NN": NearestRow,
    "per-task logistic": lambda: PerTask(_logistic),
    "hierarchical logistic": HierarchicalLogistic,
    "GLMM, random intercepts": RandomIntercepts,
    "target-encoded boosting": lambda: TargetEncoded(
        HistGradientBoostingClassifier(random_state=0)
    ),
    "pretrained MLP + fine-tune": FineTunedMLP,
    "per-task TabPFN": lambda: make_tabpfn(classification=True),
}
# where labels mean something inside an episode only: of its support rows alone
LOCAL: dict[str, Callable[[], Baseline]] = {
    name: CLASSIFICATION[name] for name in CLASSIFICATION if name.startswith("per-task")
}
# packages that are not installed along
NEEDS = {"GPBoost": "gpboost", "per-task TabPFN": "tabpfn"}


def is_installed(name: str) -> bool:
    """Whether the package that a baseline needs can be imported."""
    return name not in NEEDS or find_spec(NEEDS[name]) is not None
