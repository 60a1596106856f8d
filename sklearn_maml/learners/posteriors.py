"""What the support sets of tasks say, and what they make of the prior of a Gaussian head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    factor : Tensor of shape (n_members, n_tasks, n_noises, n, n)
        Root of the system that was solved: of rows, or of columns where there are fewer of them.
    unexplained : Tensor of shape (n_members, n_tasks, n_outputs)
        Products of the residuals with what the shift leaves of them.
    n_rows : Tensor of shape (1 or n_members, n_tasks, 1)
        Support rows, by their weights.
    S : Tensor of shape (n_members, n_tasks, n_support, n_columns) or None
        Columns of the support rows, if the system is one of rows.
    """

    shift: Tensor
    factor: Tensor
    unexplained: Tensor
    n_rows: Tensor
    S: Tensor | None


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
