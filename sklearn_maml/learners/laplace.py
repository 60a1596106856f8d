"""Gaussian heads of targets whose noise is not normal: Newton steps to the mode of a posterior.

The posterior of a task's weights is approximated by a normal distribution about its mode
(Rasmussen & Williams 2006, sec. 3.4; of hierarchical models, Breslow & Clayton 1993). All Newton
steps but the last are taken without derivatives: at the mode, those of the last one are those of
the mode itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions
from sklearn_maml.learners.likelihoods import NewtonLikelihood
from sklearn_maml.learners.posteriors import Scale
from sklearn_maml.learners.systems import inverse_of
from sklearn_maml.theta import Params

Shape = tuple[Tensor, Tensor]

# Newton steps at most, and the change of outputs from which one more is exact; parts of a step
MOST_STEPS, NEAR = 30, 1e-4
# as many, unasked, where the answer would have to be waited for; tasks take four to six
STEPS_ON_DEVICE = 10
FAR = 3.0  # standard deviations
LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.01)


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
        units = np.ones(self.n_latent) if units is None else units
        self.register_buffer("unit", torch.tensor(units, dtype=torch.float64))
        if level is not None:
            with torch.no_grad():
                run = self.functions(dict(self.named_parameters()))
                noise = self.likelihood.guess(torch.from_numpy(level), run.shape())[1]
                least = noise.flatten(1).amin(1)
                self.log_scale[:] = (0.3 * least.sqrt()).log()[:, None]
                for j, (_, factor, *_) in enumerate(starts):
                    of_units = torch.tensor(factor.diagonal()[1 + len(center) :]).log()
                    own = self.log_scale[j, : len(of_units)]
                    own.copy_(torch.maximum(own, of_units))

    @property
    def n_systems(self) -> int:
        """See `GaussianHead`: what rows tell depends on the output."""
        return self.n_latent

    @property
    def overfits_soon(self) -> bool:
        """See `GaussianHead`: not known, as errors of logarithms, say, rise before they fall."""
        return False

    def functions(self, params: Params, body: Any = None) -> LaplaceFunctions:
        """See `GaussianHead`."""
        return LaplaceFunctions(self, params, self.body if body is None else body)


class _Dual:
    """Support sets in coordinates u of their rows, ``w = S'u``: for fewer rows than columns.

    Parameters
    ----------
    gram : Tensor of shape (n_members, n_tasks, n_rows, n_rows)
        S S'.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    def outputs(self, u: Tensor) -> Tensor:
        """S w (n_members, n_tasks, n_rows, n_outputs)."""
        return self.gram @ u

    def norms(self) -> Tensor:
        """Squared length (n_members, n_tasks, n_rows) of the rows of S."""
        return self.gram.diagonal(dim1=-2, dim2=-1)

    def length(self, u: Tensor) -> Tensor:
        """Squared length (n_members, n_tasks, n_outputs) of w."""
        return (u * (self.gram @ u)).sum(2)

    def system(self, root: Tensor) -> Tensor:
        """I + R S S' R for each output, with the roots of the rows' information in R."""
        r = root.mT
        return _with_one(self.gram.unsqueeze(2) * r.unsqueeze(-1) * r.unsqueeze(-2))

    def solved(self, root: Tensor, moment: Tensor) -> Tensor:
        """Solve (I + S'R R S) w = S' moment."""
        right = (root * (self.gram @ moment)).mT.unsqueeze(-1)
        of_rows = inverse_of(self.system(root)) @ right
        return moment - root * of_rows.squeeze(-1).mT


class _Primal:
    """Support sets in coordinates of w; see `_Dual`."""

    def __init__(self, S: Tensor) -> None:
        self.S = S

    def outputs(self, w: Tensor) -> Tensor:
        return self.S @ w

    def norms(self) -> Tensor:
        return self.S.square().sum(-1)

    def length(self, w: Tensor) -> Tensor:
        return w.square().sum(2)

    def system(self, root: Tensor) -> Tensor:
        A = self.S.unsqueeze(2) * root.mT.unsqueeze(-1)
        return _with_one(A.mT @ A)

    def solved(self, root: Tensor, moment: Tensor) -> Tensor:
        right = (self.S.mT @ moment).mT.unsqueeze(-1)
        return (inverse_of(self.system(root)) @ right).squeeze(-1).mT


def _with_one(gram: Tensor) -> Tensor:
    return gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


@dataclass(frozen=True)
class LaplacePosterior:
    """What support sets made of the prior: a normal distribution about the mode.

    Attributes
    ----------
    shift : Tensor of shape (n_members, n_tasks, n_columns, n_outputs)
        Mode of w.
    S : Tensor of shape (n_members, n_tasks, n_support, n_columns)
        Columns of the support rows.
    root : Tensor of shape (n_members, n_tasks, n_support, n_outputs)
        Roots of their information.
    inverse : Tensor of shape (n_members, n_tasks, n_outputs, n, n)
        That of the system that was solved; n is the smaller of n_support and n_columns.
    objective : Tensor of shape (n_members, n_tasks, n_outputs)
        Negative logarithm of the density of rows and weights at the mode, up to constants.
    """

    shift: Tensor
    S: Tensor
    root: Tensor
    inverse: Tensor
    objective: Tensor

    @property
    def dual(self) -> bool:
        """Whether the system is one of rows."""
        return _is_dual(self.S)

    def covariance(self) -> Tensor:
        """Covariance (n_members, n_tasks, n_outputs, n_columns, n_columns) of w."""
        if not self.dual:
            return self.inverse
        A = self.root.mT.unsqueeze(-1) * self.S.unsqueeze(2)
        return _with_one(-A.mT @ (self.inverse @ A))

    def covariance_root(self) -> Tensor:
        """Root R of the covariance of w, which is R'R; (..., n_columns, n_columns)."""
        factor = torch.linalg.cholesky(_Primal(self.S).system(self.root))
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _is_dual(S: Tensor) -> bool:
    return S.shape[-2] <= S.shape[-1]


class LaplaceFunctions(HeadFunctions):
    """Functions of a `LaplaceHead`; in float64, whatever comes in, as information may be large."""

    has_sums: ClassVar[bool] = False
    head: LaplaceHead

    def trust(self, given: LaplacePosterior) -> Tensor | None:
        """See `HeadFunctions`; None where densities have constants that members differ in."""
        return super().trust(given) if self.likelihood.members_differ else None

    def log_density(self, given: LaplacePosterior) -> Tensor:  # type: ignore[override]
        """See `HeadFunctions`; by Laplace's approximation."""
        return torch.linalg.slogdet(given.inverse)[1] / 2 - given.objective

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
        self, X: Tensor, y: Tensor, root: Tensor | None = None, *, doubt: bool = True
    ) -> LaplacePosterior:
        """Condition on support sets; see `HeadFunctions`."""
        prior, S = (part.double() for part in self.of_tasks(X))
        if root is None:
            root = S.new_ones(1, *X.shape[:2])
        m = (root if root.ndim == 3 else root[None]).double().unsqueeze(-1)
        space = _Dual(S @ S.mT) if _is_dual(S) else _Primal(S)
        y = self.likelihood.seen(y).double()
        at, *rest = self._posterior(space, prior, y, m)
        return LaplacePosterior(S.mT @ at if _is_dual(S) else at, S, *rest)

    def _posterior(
        self, space: _Dual | _Primal, prior: Tensor, y: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mode in the coordinates of `space`; the rest is of `LaplacePosterior`, from `root` on."""
        problem = _Problem(self, space, prior, y, m)
        with torch.no_grad():
            at = problem.near_mode()
        at = problem.newton(at, *problem.derivatives(at)[1:])
        # the information is that at the mode, of which it has the derivatives
        objective, _, information = problem.derivatives(at)
        root = problem.root(information)
        return at, root, inverse_of(space.system(root)), objective

    def query(  # type: ignore[override]
        self, X: Tensor, given: LaplacePosterior, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs, and variances of targets (n_members, n_tasks, n_query, n_outputs)."""
        prior, S = (part.double() for part in self.of_tasks(X))
        if given.dual:
            variance = _variance(given.inverse, given.root, given.S @ S.mT, S.square().sum(-1))
        else:
            of_query = S.unsqueeze(2)
            variance = ((of_query @ given.inverse) * of_query).sum(-1).mT
        output, variance, _ = self._predicted(prior + S @ given.shift, variance)
        return self.likelihood.spread(output), variance

    def covariance(self, given: LaplacePosterior) -> Tensor:  # type: ignore[override]
        """See `HeadFunctions`."""
        return given.covariance()

    def expected(  # type: ignore[override]
        self, parts: Iterable[tuple[Tensor, Tensor]], given: LaplacePosterior
    ) -> tuple[Tensor, Tensor]:
        """See `HeadFunctions`; as if predictions were right."""
        a = self.amplitude_of_tasks()
        output = torch.cat([a * (prior + S @ given.shift) for prior, S in parts], 2)
        information, cost = self.likelihood.expected(output, self.shape())
        return (1 / (a**2 * information)).mT, (a**2 * cost).mT

    def room(self, n_rows: np.ndarray) -> int:
        """See `HeadFunctions`."""
        p, n_outputs = self.head.n_columns, self.head.n_outputs
        n = np.minimum(n_rows, p)
        one = n_rows * (p + n_outputs) + n_outputs * (n * n + p)
        return int(self.head.n_members * one.sum())

    def _predicted(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs, variance of targets and dispersion."""
        a = self.amplitude_of_tasks()
        return self.likelihood.predictive(a * mean, a**2 * variance.clamp_min(0), self.shape())

    def plain(self, X: Tensor, shift: Tensor, root: Tensor, trust: Tensor) -> Tensor:
        """Return outputs (n_rows, n_outputs) of rows of one task, of all members.

        `root` (n_members, n_outputs, n_columns, n_columns) is that of the covariance, `trust` what
        members count.
        """
        prior, S = (part.double() for part in self.columns(X))
        variance = (root @ S.unsqueeze(1).mT).square().sum(-2)
        parts = (prior + S @ shift).unsqueeze(1), variance.mT.unsqueeze(1)
        outputs = self.likelihood.spread(self._predicted(*parts)[0].squeeze(1))
        return self.likelihood.average(outputs, trust)

    def loss(self, X: Tensor, y: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of query rows, each by itself; see `HeadFunctions`."""
        prior, S = self.of_tasks(X)
        # all that the rows have to do with each other
        gram, prior, y = (S @ S.mT).double(), prior.double(), self.likelihood.seen(y).double()
        m = prior.new_ones(1, *X.shape[:2]) if mask is None else mask.double()
        m = m.unsqueeze(-1)
        cross = gram[:, :, :k, k:]
        at, root, inverse, _ = self._posterior(
            _Dual(gram[:, :, :k, :k]), prior[:, :, :k], y[:, :k], m[:, :, :k].sqrt()
        )
        norm = gram.diagonal(dim1=-2, dim2=-1)[:, :, k:]
        mean = prior[:, :, k:] + cross.mT @ at
        output, _, dispersion = self._predicted(mean, _variance(inverse, root, cross, norm))
        rows = self.likelihood.surprise(output, y[:, k:], (dispersion, self.shape()[1]))
        return (rows * m[:, :, k:]).sum((2, 3)), self.likelihood.spread(output)


def _variance(inverse: Tensor, root: Tensor, cross: Tensor, norm: Tensor) -> Tensor:
    """Variance (n_members, n_tasks, n_query, n_outputs) given rows of a dual system."""
    weighted = root.mT.unsqueeze(-1) * cross.unsqueeze(2)
    return (norm.unsqueeze(2) - (weighted * (inverse @ weighted)).sum(-2)).mT


@dataclass(frozen=True)
class _Problem:
    """Posterior of w: the likelihood of support rows, and a standard normal prior."""

    run: LaplaceFunctions
    space: _Dual | _Primal
    prior: Tensor
    y: Tensor
    m: Tensor

    def derivatives(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (n_members, n_tasks, n_outputs), and derivatives of rows by S w."""
        a = self.run.amplitude_of_tasks()
        value, first, second = self.run.likelihood.derivatives(
            self._outputs(at), self.y, self.run.shape()
        )
        objective = (self.m.square() * value).sum(2) + self.space.length(at) / 2
        return objective, a * first, a**2 * second

    def _outputs(self, at: Tensor) -> Tensor:
        return self.run.amplitude_of_tasks() * (self.prior + self.space.outputs(at))

    def root(self, information: Tensor) -> Tensor:
        """Roots of the information of rows, of which padding has none."""
        # not of 0: a root has no derivative there
        return self.m * information.clamp_min(torch.finfo(information.dtype).tiny).sqrt()

    def newton(self, at: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """One Newton step, given the derivatives there."""
        moment = self.m.square() * (second * self.space.outputs(at) - first)
        return self.space.solved(self.root(second), moment)

    def near_mode(self) -> Tensor:
        """Newton steps; where a whole one is too long, the best of some parts of it."""
        a, shape = self.run.amplitude_of_tasks(), self.run.shape()
        output, variance = self.run.likelihood.guess(self.y, shape)
        variance = variance / a**2
        information = (1 / variance).expand(self.prior.shape)
        # what the prior hardly expects is no place to begin from
        far = FAR * (self.space.norms().unsqueeze(-1) + variance).sqrt()
        moment = self.m.square() * information * (output / a - self.prior).clamp(-far, far)
        at = self.space.solved(self.root(information), moment)
        if not at.numel():
            return at
        if at.device.type != "cpu":  # to ask whether a step was good would be to wait for it
            for _ in range(STEPS_ON_DEVICE):
                at = self._best(at, self.newton(at, *self.derivatives(at)[1:]) - at)
            return at
        objective, *of_rows = self.derivatives(at)
        for _ in range(MOST_STEPS):
            step = self.newton(at, *of_rows) - at
            before, near = objective, self.space.outputs(step).abs().amax(2) < NEAR
            objective, *of_rows = self.derivatives(at + step)
            if near.all():
                return at + step
            if ((objective <= before) | near).all():
                at = at + step
            else:
                at = self._best(at, step)
                objective, *of_rows = self.derivatives(at)
        return at

    def _best(self, at: Tensor, step: Tensor) -> Tensor:
        """Go the best of a few parts of a step, each output of a task for itself.

        Or one that is never too long, where the likelihood knows one.
        """
        parts = [at + t * step for t in LENGTHS]
        bound = self.run.likelihood.bound(self._outputs(at), self.y, self.run.shape())
        if bound is not None:
            a = self.run.amplitude_of_tasks()
            parts.append(self.newton(at, self.derivatives(at)[1], a**2 * bound))
        places = torch.stack(parts)
        tried = torch.stack([self.derivatives(place)[0] for place in places])
        best = tried.nan_to_num(torch.inf).argmin(0)
        return places.gather(0, best[None, :, :, None].expand(1, *at.shape))[0]
