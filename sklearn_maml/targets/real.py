"""Targets that are numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor, nn

from sklearn_maml.data.sampling import VALIDATION_QUERIES
from sklearn_maml.data.tasks import TaskCollection, in_blocks
from sklearn_maml.exceptions import OutlierWarning
from sklearn_maml.targets.base import Coding, Loss, Targets

# part of their standard deviation to which predictions are exact
DIGITS = 1e-3
# targets are warned of if so few of so many are so many times as far out as the median, and make
# up so much of the variance
FEW, MANY_ROWS, FAR, MOST = 0.005, 100, 20.0, 0.9
ENOUGH = 2**18  # rows, evenly spread, whose medians are those of all to that end
# standard deviation of a normal distribution, in median absolute deviations
DEVIATION = 1.4826
# support rows of each task in `score` with n_shots=None: half of the rows, at most
SCORED_SHOTS = 10


class RealTargets(Targets):
    """Numbers, one or several a row.

    Parameters
    ----------
    loss : Loss
    normalize_y : bool
        Whether to standardise them, for a loss that allows it.
    center_y : bool
        Whether to take the mean of its support rows from the targets of each task.
    """

    are_classes: ClassVar[bool] = False
    word: ClassVar[str] = "target"
    learned: ClassVar[tuple[str, ...]] = (
        "n_outputs_",
        "y_mean_",
        "y_scale_",
        "_y_is_1d",
        "_constant",
    )
    validation_queries: ClassVar[int] = VALIDATION_QUERIES

    n_outputs_: int
    y_mean_: np.ndarray
    y_scale_: np.ndarray
    _y_is_1d: bool
    _constant: np.ndarray = np.zeros(1, dtype=bool)  # outputs whose scale is not known yet

    def __init__(self, loss: Loss, normalize_y: bool, center_y: bool) -> None:
        super().__init__(loss)
        self.normalize_y = normalize_y
        self.center_y = center_y

    @property
    def n_outputs(self) -> int:
        """Outputs of the network: one for each target."""
        return self.n_outputs_

    def declare(self, classes: Any) -> None:
        """See `Targets`; there is nothing."""

    def learn(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """See `Targets`."""
        self.loss = clone(self.loss)  # whose parameters the user may change
        y = tasks.y.reshape(len(tasks.y), -1)
        if self.center_y and not self.loss.standardises:
            raise ValueError(
                "center_y=True takes the mean of its support rows from the targets of a task, but "
                f"the loss {self.loss.name} is for targets as they are. Use center_y=False."
            )
        self.loss.check(y)
        _check_rows(self.loss, y)
        self._y_is_1d = tasks.y.ndim == 1
        self.n_outputs_ = y.shape[1]
        self.y_mean_ = np.zeros(y.shape[1])
        self.y_scale_ = np.ones(y.shape[1])
        self._constant = np.zeros(y.shape[1], dtype=bool)
        rows = tasks.leveled()
        if rows is not None:
            tasks, y = tasks.take_rows(rows), y[rows]
            sample_weight = sample_weight if sample_weight is None else sample_weight[rows]
        if self.normalize_y and self.loss.standardises:
            self.y_mean_ = _mean(lambda part: y[part], len(y), sample_weight)
            if self.loss.robust:
                self.y_mean_ = _medians(y, sample_weight)
            center, level = self.y_mean_, np.abs(self.y_mean_)
            if self.center_y:
                means = _task_means(y, tasks, sample_weight)
                center, level = means[tasks.codes], np.abs(means).max(0)

            def deviations(part: slice) -> np.ndarray:
                # squares of what is small would be 0 in float32
                return y[part] - (center if center.ndim == 1 else center[part])

            squares = _mean(lambda part: deviations(part) ** 2, len(y), sample_weight)
            spread = np.sqrt(squares)
            if self.loss.robust:
                near = DEVIATION * _medians(np.abs(y - center), sample_weight)
                spread = np.where(near > 0, near, spread)  # most targets may be equal
            else:
                _warn_of_outliers(y, deviations, rows, sample_weight)
            constant = spread <= 10 * np.finfo(tasks.y.dtype).eps * level
            self.y_scale_ = np.where(constant, 1.0, spread)
            self._constant = constant
        if self.loss.scales:
            level = _mean(lambda part: y[part], len(y), sample_weight)
            if not (level > 0).all():
                raise ValueError(
                    f"All targets{' of an output' if y.shape[1] > 1 else ''} are 0, to which the "
                    f"{self.loss.name} has no finite fit. Leave them out, or use another loss."
                )
            self.y_scale_ = level if self.normalize_y else self.y_scale_

    def learn_on(self, tasks: TaskCollection, sample_weight: np.ndarray | None = None) -> None:
        """See `Targets`: the mean and scale of targets that were all equal so far."""
        if not self._constant.any() or tasks.y[:1].size != self.n_outputs_:
            return
        known, mean, scale = ~self._constant, self.y_mean_, self.y_scale_
        self.learn(tasks, sample_weight)
        self.y_mean_ = np.where(known, mean, self.y_mean_)
        self.y_scale_ = np.where(known, scale, self.y_scale_)
        self._constant &= ~known

    def encode(self, tasks: TaskCollection) -> TaskCollection:
        """See `Targets`."""
        y, dtype = self._checked(tasks), tasks.X.dtype
        if not self.center_y:
            encoded = np.empty(y.shape, dtype)
            for part in in_blocks(len(y)):
                encoded[part] = self._standardised(y[part] - self.y_mean_, dtype)
            return tasks.having(y=encoded)
        # a constant of a task goes with the mean of its support rows; without the mean of all its
        # rows float32 keeps more digits of what is left
        return tasks.having(y=self._standardised(y - _task_means(y, tasks)[tasks.codes], dtype))

    def encode_support(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None
    ) -> tuple[np.ndarray, Coding]:
        """See `Targets`."""
        if not self.center_y:
            return self.encode(tasks).y, Coding()
        y = self._checked(tasks)
        center = _task_means(y, tasks, sample_weight)
        center[tasks.sizes == 0] = self.y_mean_
        return self._standardised(y - center[tasks.codes], tasks.X.dtype), Coding(center=center)

    def _checked(self, tasks: TaskCollection) -> np.ndarray:
        if tasks.y.size == 0 and tasks.y.ndim == 1:  # no rows: of any number of targets
            return tasks.y.reshape(0, self.n_outputs_)
        y = tasks.y.reshape(len(tasks.y), -1) if len(tasks.y) else tasks.y
        if y.shape[1] != self.n_outputs_:
            raise ValueError(
                f"y has {y.shape[1]} output(s), but the model was meta-fitted on "
                f"{self.n_outputs_}. Give as many."
            )
        if len(y):
            self.loss.check(y)
        return y

    def _standardised(self, y: np.ndarray, dtype: Any) -> np.ndarray:
        """Centred targets in units of those of meta-training."""
        with np.errstate(over="ignore"):
            encoded = (y / self.y_scale_).astype(dtype)
        if self.loss.scales:  # what is above 0 stays so in float32
            encoded[(encoded == 0) & (y > 0)] = np.finfo(dtype).tiny
        if not np.isfinite(encoded).all():
            raise ValueError(
                f"y has values of up to {np.abs(y).max():g}, too large for {np.dtype(dtype)} in "
                f"units of the targets of fit, {self.y_scale_.tolist()}. Give y in the same units."
            )
        return encoded

    def decode(self, outputs: np.ndarray, codes: np.ndarray, coding: Coding) -> np.ndarray:
        """See `Targets`; values that overflow are infinite."""
        mean = self.y_mean_ if coding.center is None else coding.center[codes]
        with np.errstate(over="ignore"):
            values = self.loss.predict(outputs) * self.y_scale_ + mean
        dtype = outputs.dtype if _are_apart(outputs.dtype, mean, self.y_scale_) else np.float64
        with np.errstate(over="ignore"):
            return self._like_y(values.astype(dtype, copy=False))

    def decoder(self, task: int, coding: Coding) -> nn.Module:
        """See `Targets`."""
        if type(self.loss).predict is not Loss.predict:
            raise TypeError(
                f"The loss {self.loss.name} makes predictions of outputs in numpy (its method "
                "predict), which no torch module can have. Give it inverse_link, in torch, instead."
            )
        mean = self.y_mean_ if coding.center is None else coding.center[task]
        return _Units(self.loss, self.y_scale_, mean, self._y_is_1d)

    def decode_std(self, std: np.ndarray) -> np.ndarray:
        """Return standard deviations of targets in the units of y."""
        return self._like_y(std * self.y_scale_)

    def _like_y(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._y_is_1d else values

    def scored_shots(self, n_shots: int | None) -> dict[str, Any]:
        """See `Targets`."""
        if n_shots is not None:
            return {"n_shots": n_shots}
        return {"n_shots": SCORED_SHOTS, "at_most_half": True}

    def episode_rows(
        self, tasks: TaskCollection, n_shots: int | None, n_queries: int | None
    ) -> int:
        """See `Targets`."""
        rows = int(np.median(tasks.sizes))
        return rows if n_shots is None or n_queries is None else min(rows, n_shots + n_queries)


def _are_apart(dtype: Any, mean: np.ndarray, scale: np.ndarray) -> bool:
    """Whether a type tells predictions apart; beside a large mean that takes float64."""
    with np.errstate(over="ignore"):
        return bool((np.finfo(dtype).eps * np.abs(mean) < DIGITS * scale).all())


class _Units(nn.Module):
    """Takes outputs (n_rows, n_outputs) back to the units of y."""

    scale: Tensor
    mean: Tensor

    def __init__(self, loss: Loss, scale: np.ndarray, mean: np.ndarray, is_1d: bool) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("mean", torch.tensor(mean))
        self.is_1d = is_1d
        self.apart = _are_apart(np.float32, mean, scale)

    def forward(self, outputs: Tensor) -> Tensor:
        values = self.loss.inverse_link(outputs) * self.scale + self.mean
        values = values.to(outputs.dtype) if self.apart else values
        return values[:, 0] if self.is_1d else values


def _warn_of_outliers(
    y: np.ndarray,
    deviations: Callable[[slice], np.ndarray],
    rows: np.ndarray | None,
    sample_weight: np.ndarray | None,
) -> None:
    """Warn of a few targets, of `rows` or all, that make up nearly all of the variance."""
    few = int(FEW * len(y))
    if len(y) < MANY_ROWS:
        return
    some = slice(None, None, -(-len(y) // ENOUGH))
    middle = np.median(deviations(some), axis=0)

    def squares_of(part: slice) -> np.ndarray:
        squares = np.square(deviations(part) - middle).mean(1)
        return squares if sample_weight is None else squares * sample_weight[part]

    limit, total = FAR**2 * np.median(squares_of(some)), 0.0
    places, found = [], []
    for part in in_blocks(len(y)):
        squares = squares_of(part)
        total += squares.sum()
        places.append(part.start + np.flatnonzero(squares > limit))
        found.append(squares[squares > limit])
    far, squares = np.concatenate(places), np.concatenate(found)
    largest = np.argsort(squares)[-max(few, 1) :]
    far, part_of_far = far[largest], squares[largest].sum()
    if part_of_far <= MOST * total:
        return
    row = int(far[-1])
    place = row if rows is None else int(rows[row])
    warnings.warn(
        f"{len(far)} of {len(y)} targets, such as {y[row].tolist()} in row {place}, are so far "
        f"from all others that they make up {part_of_far / total:.0%} of the "
        "variance: the targets are standardised by them, and squared errors are about them. "
        "If they are glitches, leave them out; if not, fit a transformed target (log, or ranks).",
        OutlierWarning,
        stacklevel=6,
    )


def _mean(
    values: Callable[[slice], np.ndarray], n_rows: int, sample_weight: np.ndarray | None
) -> np.ndarray:
    """Mean (n_outputs,) of values of rows, which are made some rows at a time."""
    parts = in_blocks(n_rows)
    if sample_weight is None:
        return np.sum([values(p).astype(np.float64).sum(0) for p in parts], axis=0) / n_rows
    weight = sample_weight[:, None]
    sums = [np.multiply(values(p), weight[p], dtype=np.float64).sum(0) for p in parts]
    return np.sum(sums, axis=0) / weight.sum()


def _medians(y: np.ndarray, sample_weight: np.ndarray | None) -> np.ndarray:
    """Return the median of each column: half of the weight is on either side."""
    weight = np.ones(len(y)) if sample_weight is None else sample_weight
    order = np.argsort(y, axis=0)
    total = np.cumsum(weight[order], axis=0)
    y, half = np.take_along_axis(y, order, 0), total[-1] / 2
    # first row with half of the weight up to it, and first with more
    ends = [(total >= half).argmax(0), (total > half).argmax(0)]
    middle = np.array([y[end, np.arange(y.shape[1])] for end in ends], dtype=np.float64)
    return middle.mean(0)


def _task_means(
    y: np.ndarray, tasks: TaskCollection, sample_weight: np.ndarray | None = None
) -> np.ndarray:
    """Mean targets (n_tasks, n_outputs) of the rows of each task."""
    total = np.bincount(tasks.codes, sample_weight, tasks.n_tasks)
    means = [
        np.bincount(
            tasks.codes, column if sample_weight is None else sample_weight * column, tasks.n_tasks
        )
        / np.where(tasks.sizes > 0, total, 1)
        for column in y.T
    ]
    return np.stack(means, axis=1)


def _check_rows(loss: Loss, y: np.ndarray) -> None:
    """Refuse a loss that gives something else than one number a row."""
    some = torch.from_numpy(y[np.arange(6) % len(y)].reshape(2, 3, -1).astype(np.float64))
    losses = loss.rows(torch.zeros_like(some), some)
    got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if got != (2, 3):
        raise ValueError(
            f"rows of the loss {loss.name} gave {got} for outputs and targets of shape "
            f"{tuple(some.shape)}; expected a tensor of shape (2, 3), with the loss of each row. "
            "Reduce the last axis, as .mean(-1) does, and no other."
        )
