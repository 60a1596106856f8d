"""Gaussian heads of targets whose noise is not normal: Newton steps to the mode of a posterior.

The posterior of a task's weights is approximated by a normal distribution about its mode
(Rasmussen & Williams 2006, sec. 3.4; of hierarchical models, Breslow & Clayton 1993). All Newton
steps but the last are taken without derivatives: at the mode, those of the last one are those of
the mode itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions
from sklearn_maml.learners.likelihoods import NewtonLikelihood

__all__ = ["LaplaceFunctions", "LaplaceHead", "LaplacePosterior"]

Params = dict[str, Tensor]
Shape = tuple[Tensor, Tensor]

# Newton steps at most, and the change of outputs from which one more is exact; parts of a step
MOST_STEPS, NEAR = 30, 1e-5
LENGTHS = (1.0, 0.5, 0.2, 0.05)


class LaplaceHead(GaussianHead):
    """A Gaussian head whose targets have a likelihood that takes Newton steps.

    Parameters are as of `GaussianHead`. The noise is the dispersion of the likelihood, over the
    squared amplitude.

    Parameters
    ----------
    units : ndarray of shape (n_outputs,), optional
        See `NewtonLikelihood.unit`.
    level : ndarray of shape (n_outputs,), optional
        Mean of the targets, whose noise the part of the network is small to.
    """

    unit: Tensor
    likelihood: NewtonLikelihood

    def __init__(
        self,
        body: Any,
        starts: Sequence[tuple[np.ndarray, ...]],
        center: np.ndarray,
        scale: np.ndarray,
        *,
        units: np.ndarray | None = None,
        level: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        super().__init__(body, starts, center, scale, **options)
        units = np.ones(self.n_outputs) if units is None else units
        self.register_buffer("unit", torch.tensor(units, dtype=torch.float64))
        if level is not None:
            with torch.no_grad():
                run = self.functions(dict(self.named_parameters()))
                noise = self.likelihood.guess(torch.from_numpy(level), run.shape())[1]
                least = noise.flatten(1).amin(1)
                self.log_scale[:] = (0.3 * least.sqrt()).log()[:, None]

    def functions(self, params: Params, body: Any = None) -> LaplaceFunctions:
        """See `GaussianHead`."""
        return LaplaceFunctions(self, params, self.body if body is None else body)


@dataclass(frozen=True)
class LaplacePosterior:
    """What support sets made of the prior: a normal distribution about the mode.

    Attributes
    ----------
    shift : Tensor of shape (n_members, n_tasks, n_columns, n_outputs)
        Mode of w.
    A : Tensor of shape (n_members, n_tasks, n_outputs, n_support, n_columns)
        Columns of the support rows times roots of their information.
    factor : Tensor of shape (n_members, n_tasks, n_outputs, n, n)
        Root of the system that was solved; n is the smaller of n_support and n_columns.
    """

    shift: Tensor
    A: Tensor
    factor: Tensor

    @property
    def dual(self) -> bool:
        """Whether the system is one of rows."""
        return self.A.shape[-2] <= self.A.shape[-1]

    def root(self) -> Tensor:
        """Root R of the covariance of w, which is R'R; (..., n_columns, n_columns)."""
        eye = torch.eye(self.A.shape[-1], dtype=self.A.dtype, device=self.A.device)
        factor = torch.linalg.cholesky(eye + self.A.mT @ self.A) if self.dual else self.factor
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


class LaplaceFunctions(HeadFunctions):
    """Functions of a `LaplaceHead`; in float64, whatever comes in, as information may be large."""

    has_sums: ClassVar[bool] = False
    head: LaplaceHead

    @property
    def likelihood(self) -> NewtonLikelihood:
        """That of the head."""
        return self.head.likelihood

    def shape(self) -> Shape:
        """Dispersion and unit (n_members or 1, 1, 1, n_outputs) of the likelihood."""
        a = self.amplitude_of_tasks()
        dispersion = self.noise().double()[:, None, None] * a**2
        return dispersion, self.head.unit.double()

    def condition(  # type: ignore[override]
        self, X: Tensor, y: Tensor, root: Tensor | None = None
    ) -> LaplacePosterior:
        """Condition on support sets; see `HeadFunctions`."""
        prior, S = (part.double() for part in self.of_tasks(X))
        if root is None:
            root = S.new_ones(1, *X.shape[:2])
        m = (root if root.ndim == 3 else root[None]).double().unsqueeze(-1)
        return self._posterior(prior, S, y.double(), m)

    def _posterior(self, prior: Tensor, S: Tensor, y: Tensor, m: Tensor) -> LaplacePosterior:
        parts = (prior, S, y, m, self.shape())
        if S.shape[2] == 0:
            shift = S.new_zeros(*S.shape[:2], S.shape[3], prior.shape[3])
        else:
            with torch.no_grad():
                shift = self._mode(*parts)
            shift = self._newton(shift, *parts)
        # the information is that at the mode, of which it has the derivatives
        _, _, curvature = self._derivatives(shift, *parts)
        A = _weighted(S, curvature, m)
        return LaplacePosterior(shift, A, _factor(A))

    def _derivatives(
        self, shift: Tensor, prior: Tensor, S: Tensor, y: Tensor, m: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (n_members, n_tasks, n_outputs), and derivatives of rows by outputs / a."""
        a = self.amplitude_of_tasks()
        value, first, second = self.likelihood.derivatives(a * (prior + S @ shift), y, shape)
        objective = (m.square() * value).sum(2) + shift.square().sum(2) / 2
        return objective, a * first, a**2 * second

    def _newton(
        self, shift: Tensor, prior: Tensor, S: Tensor, y: Tensor, m: Tensor, shape: Shape
    ) -> Tensor:
        """One Newton step from w = `shift`."""
        _, first, second = self._derivatives(shift, prior, S, y, m, shape)
        return _solved(S, second, m, second * (S @ shift) - first)

    def _mode(self, prior: Tensor, S: Tensor, y: Tensor, m: Tensor, shape: Shape) -> Tensor:
        """Find w to near its mode: Newton steps, whose length is the best of a few."""
        a = self.amplitude_of_tasks()
        output, variance = self.likelihood.guess(y, shape)
        information = (a**2 / variance).expand(len(S), *y.shape[:2], -1)
        shift = _solved(S, information, m, information * (output / a - prior))
        parts = (prior, S, y, m, shape)
        for _ in range(MOST_STEPS):
            step = self._newton(shift, *parts) - shift
            tried = [self._derivatives(shift + t * step, *parts)[0] for t in LENGTHS]
            best = torch.stack(tried).nan_to_num(torch.inf).argmin(0)
            length = torch.tensor(LENGTHS, dtype=S.dtype, device=S.device)[best].unsqueeze(2)
            shift = shift + length * step
            if not (S @ step).abs().max() > NEAR:
                break
        return shift

    def query(  # type: ignore[override]
        self, X: Tensor, given: LaplacePosterior, freedom: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs, and variances of targets (n_members, n_tasks, n_query, n_outputs)."""
        prior, S = (part.double() for part in self.of_tasks(X))
        output, variance, _ = self._predicted(prior, S, given)
        return output, variance

    def _predicted(
        self, prior: Tensor, S: Tensor, given: LaplacePosterior
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs, variance and dispersion of rows of S."""
        columns = S.unsqueeze(2).mT
        if given.dual:
            half = torch.linalg.solve_triangular(given.factor, given.A @ columns, upper=False)
            variance = S.square().sum(-1).unsqueeze(2) - half.square().sum(-2)
        else:
            half = torch.linalg.solve_triangular(given.factor, columns, upper=False)
            variance = half.square().sum(-2)
        return self._of_moments(prior + S @ given.shift, variance.mT)

    def _of_moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.amplitude_of_tasks()
        return self.likelihood.predictive(a * mean, a**2 * variance.clamp_min(0), self.shape())

    def plain(self, X: Tensor, shift: Tensor, root: Tensor) -> Tensor:
        """Return outputs (n_rows, n_outputs) of rows of one task, of all members.

        `root` (n_members, n_outputs, n_columns, n_columns) is that of the covariance.
        """
        prior, S = (part.double() for part in self.columns(X))
        variance = (root @ S.unsqueeze(1).mT).square().sum(-2)
        parts = (prior + S @ shift).unsqueeze(1), variance.mT.unsqueeze(1)
        return self.likelihood.average(self._of_moments(*parts)[0].squeeze(1))

    def loss(self, X: Tensor, y: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of query rows, each by itself; see `HeadFunctions`."""
        prior, S = (part.double() for part in self.of_tasks(X))
        y = y.double()
        m = S.new_ones(1, *X.shape[:2]) if mask is None else mask.to(S.dtype)
        m = m.unsqueeze(-1)
        given = self._posterior(prior[:, :, :k], S[:, :, :k], y[:, :k], m[:, :, :k].sqrt())
        output, _, dispersion = self._predicted(prior[:, :, k:], S[:, :, k:], given)
        rows = self.likelihood.surprise(output, y[:, k:], (dispersion, self.shape()[1]))
        return (rows * m[:, :, k:]).sum((2, 3)), output

    def error_rows(self, mean: Tensor, y: Tensor) -> Tensor:
        """Loss (n_members, n_tasks, n_query)."""
        return self.likelihood.loss.rows(mean, y.to(mean.dtype).expand_as(mean))


def _weighted(S: Tensor, information: Tensor, m: Tensor) -> Tensor:
    """Columns times roots of the information (n_members, n_tasks, n_rows, n_outputs) of rows."""
    # not of 0, where padding has information of 0: the root has no derivative there
    root = m * information.clamp_min(torch.finfo(S.dtype).tiny).sqrt()
    return S.unsqueeze(2) * root.mT.unsqueeze(-1)


def _factor(A: Tensor) -> Tensor:
    """Root of I + A A', or of I + A'A if that is smaller."""
    gram = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
    gram = gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # what is not finite gives what is not finite, and a skipped update
    factor, failed = torch.linalg.cholesky_ex(gram)
    return factor.where((failed == 0)[..., None, None], torch.nan)


def _solved(S: Tensor, information: Tensor, m: Tensor, moment: Tensor) -> Tensor:
    """Solve (I + S'H S) w = S' moment for each output, with H of the information of rows."""
    right = (S.mT @ (m.square() * moment)).mT.unsqueeze(-1)
    A = _weighted(S, information, m)
    factor = _factor(A)
    if A.shape[-2] <= A.shape[-1]:
        solved = right - A.mT @ torch.cholesky_solve(A @ right, factor)
    else:
        solved = torch.cholesky_solve(right, factor)
    return solved.squeeze(-1).mT
