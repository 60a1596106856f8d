"""Making a Gaussian head for the tasks at hand."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.learners.bodies import MLPBody, ModuleBody
from sklearn_maml.learners.gaussian import ClassHead, GaussianHead
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.likelihoods import Labels, Likelihood, NewtonLikelihood
from sklearn_maml.learners.start import (
    Alike,
    Bent,
    Differ,
    InLevel,
    some_tasks,
    start_of_classes,
    start_of_numbers,
    start_of_outputs,
)
from sklearn_maml.modules import ACTIVATIONS, check_head_is_last, layer_sizes
from sklearn_maml.threads import one_thread_for_arrays, several_threads, side_by_side

# features up to which rows are a part of the columns themselves
LARGEST_TABLE = 500
# classes from which a module learns better features than the rows themselves, where labels mean
# something inside an episode only: pixels, say, only add noise to those
MANY_CLASSES = 200
# frequencies of a member, and features up to which they fill the space that rows are in; see
# docs/defaults.md for what they bought
N_WAVES, MOST_WAVED = 32, 20
# bends of a feature, in the start of some members, and distinct values that it has to have
MOST_KNOTS, LEAST_VALUES = 10, 4


def why_no_head(module: nn.Module, rows: Tensor) -> str | None:
    """Say what keeps a module from having a Gaussian head, if anything does.

    `rows` are a few rows as the module takes them.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if any(m.running_mean is None for m in norms):
        return (
            "needs features of a row that depend on no other row, but the module has batch norm "
            "without running averages"
        )
    layer = _last_linear(module)
    if layer is None:
        return "takes the place of the last torch.nn.Linear, but the module does not end in one"
    try:
        check_head_is_last(module, layer, rows, "gaussian-head")
    except ValueError as error:
        return f"cannot be given the features of the module: {error}"
    return None


def _last_linear(module: nn.Module) -> str | None:
    names = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    return names[-1] if names and names[-1] else None


def module_body(modules: Sequence[nn.Module]) -> ModuleBody:
    """Networks without their last linear layers."""
    bodies, width = [], 0
    for module in modules:
        body = copy.deepcopy(module)
        name = _last_linear(body)
        assert name is not None
        parent, _, own = name.rpartition(".")
        width = body.get_submodule(name).in_features  # type: ignore[assignment]
        setattr(body.get_submodule(parent), own, nn.Identity())
        bodies.append(body)
    return ModuleBody(bodies, width)


def build_head(
    X: np.ndarray,
    y: np.ndarray,
    codes: np.ndarray,
    unseen: np.ndarray | None,
    weight: np.ndarray | None = None,
    *,
    n_members: int,
    body: ModuleBody | None,
    hidden: Any,
    activation: str,
    n_outputs: int,
    likelihood: Likelihood,
    same_classes: bool,
) -> GaussianHead:
    """Make a head that starts as a mixed model of the rows that its members may see.

    Parameters
    ----------
    X, y, codes : ndarrays
        Rows, their encoded targets, and tasks.
    unseen : uint8 ndarray of shape (n_rows,) or None
        Bit j says that member j may not see a row.
    weight : ndarray of shape (n_rows,), default=None
        Of the rows.
    n_members : int
    body : ModuleBody or None
        None builds multilayer perceptrons of `hidden` and `activation`.
    n_outputs : int
    likelihood, same_classes : Likelihood, bool
        See `GaussianHead`.
    """
    table = X.ndim == 2 and X.shape[1] <= LARGEST_TABLE
    if same_classes and body is not None and len(np.unique(y)) > MANY_CLASSES:
        table = False
    flat = X.reshape(len(X), -1)
    n_linear = flat.shape[1] if table else 0
    center, scale = np.empty(0), np.empty(0)
    Z = np.empty((len(X), 0))
    if table:
        center, scale = _moments(X, weight)
        scale = np.where(scale > 1e-12 * np.abs(center), scale, 1.0)
        Z = X.astype(np.float64)
        Z -= center
        Z /= scale
        np.clip(Z, -1e4, 1e4, out=Z)
    options: dict[str, Any] = {}
    if not likelihood.are_classes:
        y = y.reshape(-1, n_outputs).astype(np.float64)
    if isinstance(likelihood, NewtonLikelihood):
        y = likelihood.seen(likelihood.encoded(y, n_outputs))
        options = {"units": likelihood.unit(y), "level": np.average(y, axis=0, weights=weight)}
    if body is None:
        sizes = [flat.shape[1], *layer_sizes(hidden)]
        waved = table and flat.shape[1] <= MOST_WAVED and not same_classes
        n_waves = N_WAVES if waved else 0
        made: Any = MLPBody(n_members, sizes, ACTIVATIONS[activation](), n_waves=n_waves)
    else:
        made = body
    kinds: Sequence[_Kind] = (_linear,)
    feature = knot = np.arange(0)
    if body is None and not same_classes and likelihood.members_differ:
        kinds = KINDS_OF_LABELS if isinstance(likelihood, Labels) else KINDS
        feature, knot = _knots(Z, made.room_for_hinges)

    def start(j: int) -> Any:
        rows = np.arange(len(Z)) if unseen is None else np.flatnonzero(unseen >> j & 1 == 0)
        if same_classes:
            zero, one = np.zeros((1 + n_linear, n_outputs)), np.ones(1)
            return zero, np.eye(1 + n_linear), one, one
        if likelihood.are_classes and not isinstance(likelihood, NewtonLikelihood):
            of_rows = weight if weight is None else weight[rows]
            return start_of_classes(Z[rows], y[rows], n_outputs, of_rows)
        bends, differ = kinds[j % len(kinds)](feature)
        n_columns = 1 + n_linear + (len(feature) if bends else 0)
        rows = rows[some_tasks(codes[rows], n_columns, differ)]
        columns = Z[rows]
        if bends:
            made.bend(j, feature, knot)
            columns = np.c_[columns, made.hinges(columns, feature, knot)]
        seen = columns, y[rows], codes[rows]
        of_rows = weight if weight is None else weight[rows]
        if isinstance(likelihood, NewtonLikelihood):
            return start_of_outputs(*seen, likelihood, options["units"], of_rows, differ)
        return start_of_numbers(*seen, of_rows, differ)

    with several_threads(), one_thread_for_arrays(), contextlib.ExitStack() as stack:
        if likelihood.are_classes:  # a start need not be exact; filters are those of all threads
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", ConvergenceWarning)
        starts = side_by_side(start, range(n_members))
    return kind_of_head(likelihood)(
        made, starts, center, scale, likelihood=likelihood, same_classes=same_classes, **options
    )


# of the features of hinges: whether these are columns of a start, and how tasks differ
_Kind = Callable[[np.ndarray], tuple[bool, Differ]]


def _linear(feature: np.ndarray) -> tuple[bool, Differ]:
    """Make a start with correlated random slopes."""
    return False, Differ()


def _in_level(feature: np.ndarray) -> tuple[bool, Differ]:
    """Make one whose tasks differ in level alone."""
    return False, InLevel()


def _alike(feature: np.ndarray) -> tuple[bool, Differ]:
    """Make one whose tasks do not differ."""
    return False, Alike()


def _bent(feature: np.ndarray, by_task: bool = False) -> tuple[bool, Differ]:
    """Make one whose lines bend, in the same way in all tasks or in each its own."""
    return (True, Bent(feature, by_task)) if len(feature) else (False, Differ())


# how members start: what tasks are like is not known, and each task counts them by their density
KINDS: tuple[_Kind, ...] = (_linear, _bent, partial(_bent, by_task=True), _in_level, _linear)
# few labels tell little of how tasks differ, and the variances of a start are easily too large
KINDS_OF_LABELS: tuple[_Kind, ...] = (*KINDS[:4], _alike)


def _knots(Z: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n_hinges,) that may bend, and where, for at most so many hinges."""
    distinct = [np.unique(values) for values in Z.T] if Z.shape[1] <= MOST_WAVED else []
    curved = [j for j, values in enumerate(distinct) if len(values) >= LEAST_VALUES]
    n_knots = min(MOST_KNOTS, room // max(len(curved), 1))
    feature, knot = [], []
    for j in curved:
        n = min(n_knots, len(distinct[j]) - 2)
        knots = np.unique(np.quantile(distinct[j], np.arange(1, n + 1) / (n + 1)))
        feature += [j] * len(knots)
        knot += knots.tolist()
    return np.array(feature, dtype=int), np.array(knot)


def _moments(X: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if weight is None:
        return X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64)
    share = weight / weight.sum()
    center = share @ X
    return center, np.sqrt(share @ (X - center) ** 2)


def kind_of_head(likelihood: Likelihood) -> type[GaussianHead]:
    """Class of the heads of a likelihood."""
    if isinstance(likelihood, NewtonLikelihood):
        return LaplaceHead
    return ClassHead if likelihood.are_classes else GaussianHead


def population_range(y: np.ndarray, n_outputs: int, likelihood: Likelihood) -> Any:
    """Lowest and highest outputs (n_outputs,) that targets of meta-training call for."""
    if likelihood.are_classes:
        return np.zeros(n_outputs), np.ones(n_outputs)
    low, high = likelihood.edges(y.reshape(len(y), -1))
    return low.astype(np.float64), high.astype(np.float64)
