"""What the support sets of tasks say, and what they make of the prior of a Gaussian head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Information:
    """What support sets say, as sums over their rows: those of further rows are added.

    Attributes
    ----------
    gram : Tensor of shape (n_members, n_tasks, n_columns, n_columns)
        Of the columns S.
    cross : Tensor of shape (n_members, n_tasks, n_columns, n_outputs)
        Columns with residuals: targets less the prior mean, by the amplitude.
    square : Tensor of shape (n_members, n_tasks, n_outputs)
        Of the residuals.
    n_rows : Tensor of shape (1 or n_members, n_tasks, 1)
        Support rows, by their weights.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    n_rows: Tensor

    @classmethod
    def over(cls, S: Tensor, residual: Tensor, n_rows: Tensor) -> Information:
        """Sum over rows (n_members, n_tasks, n_rows, ...)."""
        return cls(S.mT @ S, S.mT @ residual, residual.square().sum(2), n_rows)

    def __add__(self, other: Information) -> Information:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Information(*(one + more for one, more in pairs))


@dataclass(frozen=True)
class Posterior:
    """What support sets made of the prior.

    Attributes
    ----------
    shift : Tensor of shape (n_members, n_tasks, n_columns, n_outputs)
        Mean of w.
    misfit : Tensor of shape (n_members, n_tasks, n_outputs)
        Squared Mahalanobis length of the residuals.
    moved : Tensor of shape (n_members, n_tasks, n_outputs)
        The part of it that went into the weights.
    n_moved : Tensor of shape (n_members, n_tasks, n_noises) or None
        The part of the rows that did so; None without variances.
    log_det : Tensor of shape (n_members, n_tasks, n_noises)
        Logarithm of the determinant of their covariance, over that of the noise alone.
    n_rows : Tensor of shape (1 or n_members, n_tasks, 1)
        Support rows, by their weights.
    half : Tensor of shape (n_members, n_tasks, n_noises, ...) or None
        Root H (n, n_columns) of the covariance of w, which is H'H, a triangle, or, if the system
        that was solved is one of rows, 1 - H'H; as `HeadFunctions.kept` arranges its numbers.
        None: nobody asks for variances.
    of_rows : bool Tensor of shape (1, n_tasks)
        Whether it is one of rows, or of columns where there are fewer of them.
    """

    shift: Tensor
    misfit: Tensor
    moved: Tensor
    n_moved: Tensor | None
    log_det: Tensor
    n_rows: Tensor
    half: Tensor | None
    of_rows: Tensor


class Scale(NamedTuple):
    """Prior of a scale that variances of a task have: an inverse gamma distribution.

    Attributes
    ----------
    freedom : Tensor of shape (n_outputs,)
        Degrees of freedom, see `Calibration`.
    of_weights : Tensor of shape (n_outputs,)
        1 where the weights of a task have it, too, 0 where it is that of the noise alone.
    """

    freedom: Tensor
    of_weights: Tensor


def of_tasks(posterior: Any, places: np.ndarray) -> Any:
    """Take the posteriors of some of the tasks."""
    index = torch.from_numpy(places).to(posterior.shift.device)
    found = vars(posterior).items()
    return replace(posterior, **{n: t[:, index] for n, t in found if isinstance(t, Tensor)})
