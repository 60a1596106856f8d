"""A last layer with a Gaussian prior that is learned across tasks, adapted in closed form.

Each member of an ensemble is a linear model on ``phi(x) = [1, x, h(x)]`` with a network ``h``. The
weights of an output have a Gaussian prior, the same for all tasks, and a support set turns it into
a posterior by linear algebra (ALPaCA, Harrison et al. 2018, sec. 3; compare R2-D2, Bertinetto et
al. 2019). Network, prior and noise are meta-learned by the likelihood of query rows. Where tasks do
not differ, the prior becomes narrow and adapting changes nothing; with few support rows the
posterior stays near the prior. The part of ``[1, x]`` starts as a mixed model with random slopes,
so that a linear truth needs no training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml.learners.base import padded
from sklearn_maml.learners.bodies import MLPBody, ModuleBody
from sklearn_maml.learners.density import Predictive
from sklearn_maml.learners.likelihoods import Likelihood
from sklearn_maml.learners.posteriors import Information, Posterior, Scale, of_tasks
from sklearn_maml.learners.start import LARGEST_MIXED, NOISE_FLOOR
from sklearn_maml.learners.systems import solve
from sklearn_maml.theta import Params

NO_HALF = "asked for variances, but conditioned without"
BEYOND = 1e4  # standard deviations at which features are cut off
CODE = 8.0  # of a class, before meta-training
SPREAD = 1.5  # of what a standardised row adds to a logit, likewise
# power of the density of support rows: a model is never all there is to rows, which tell less than
# if they were independent given it (Gruenwald 2012)
TRUST = 0.5
# degrees of freedom of that density: tasks differ in their scale, and a noisy one does not speak
# for a member of more noise
TRUST_FREEDOM = 4.0
# of weights; the last one where labels mean something inside an episode only
DECAY, DECAY_OF_CLASSES, DECAY_OF_LOCAL = 0.6, 0.1, 2.0


class GaussianHead(nn.Module):
    r"""Meta-parameters of the members, and what they make of support sets.

    Parameters
    ----------
    body : MLPBody or ModuleBody
        The networks ``h``.
    starts : list of (mean, factor, amplitude, noise)
        Of each member, see `start`; of a linear block of 1 + n_linear columns, and of as many units
        of the network, the first, as there are more of them.
    center, scale : ndarrays of shape (n_linear,)
        Mean and standard deviation of the features; empty where rows are no tables.
    likelihood : Likelihood
    same_classes : bool
        Whether the prior has to be the same for all classes, because labels are local to tasks.

    Notes
    -----
    The targets of output o are :math:`y = a_o (m_o + S w_o) + e`, where :math:`m_o` is the prior
    mean, S are the columns times a root of the prior covariance, w is standard normal and e has
    the variance :math:`a_o^2 \sigma_o^2`. Outputs share S.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self,
        body: MLPBody | ModuleBody,
        starts: Sequence[tuple[np.ndarray, ...]],
        center: np.ndarray,
        scale: np.ndarray,
        *,
        likelihood: Likelihood,
        same_classes: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.likelihood = likelihood
        self.same_classes = same_classes
        amplitudes, noises = (np.stack([start[part] for start in starts]) for part in (2, 3))
        ratio = noises / amplitudes**2 if amplitudes.shape == noises.shape else noises
        # small for all outputs: that of a column of noise would drown the others
        of_net = 0.3 * np.sqrt(ratio.min(1))
        self.n_latent = starts[0][0].shape[1]
        n_linear = 1 + len(center)
        means = np.zeros((len(starts), n_linear + body.width, self.n_latent))
        scales = of_net[:, None] + np.zeros(body.width)
        for j, (mean, factor, *_) in enumerate(starts):
            means[j, : len(mean)] = mean
            of_units = factor.diagonal()[n_linear:]
            scales[j, : len(of_units)] = np.maximum(of_units, of_net[j])
        if not same_classes:
            self.mean = _parameter(means)
        self.n_outputs = likelihood.n_outputs(self.n_latent)
        self.factor = _parameter(np.stack([start[1][:n_linear, :n_linear] for start in starts]))
        self.log_scale = _parameter(np.log(scales))
        self.log_noise = _parameter(0.5 * np.log(ratio))
        if amplitudes.shape[1] > 1:
            self.log_amplitude = _parameter(np.log(amplitudes[:, 1:]))
        self.register_buffer("center", torch.tensor(center, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    @property
    def n_members(self) -> int:
        """Number of members."""
        return len(self.log_noise)

    @property
    def n_columns(self) -> int:
        """Number of weights of an output."""
        return self.factor.shape[-1] + self.body.width

    @property
    def n_systems(self) -> int:
        """Number of covariances of the weights of a task: outputs of the same noise share one."""
        return self.log_noise.shape[1]

    @property
    def overfits_soon(self) -> bool:
        """Whether training that has made it worse goes on to do so: its covariance is very large.

        Not where labels are local to episodes, whose errors rise and fall.
        """
        return len(self.center) > LARGEST_MIXED and not self.same_classes

    def functions(self, params: Params, body: Any = None) -> HeadFunctions:
        """Return what the head computes with parameters of these values.

        `params` has those of `named_parameters`, or of some members.
        """
        return HeadFunctions(self, params, self.body if body is None else body)

    def decaying(self, params: Params, prefix: str) -> tuple[list[Tensor], float]:
        """Return which of the parameters of the prior decay in meta-training, and how fast.

        `params` have names that start with `prefix`; the weights of networks decay as fast.
        """
        return [params[f"{prefix}mean"], params[f"{prefix}factor"]], DECAY

    @classmethod
    def like(
        cls, weights: dict[str, Tensor], body: ModuleBody | None, n_outputs: int, **options: Any
    ) -> GaussianHead:
        """Make a head of the shapes of a state dict; `activation` and others are options."""
        n_members, n_linear = weights["factor"].shape[:2]
        noises = np.ones((n_members, weights["log_noise"].shape[1]))
        amplitudes = noises if "log_amplitude" in weights else noises[:, :1]
        n_latent = weights["mean"].shape[2] if "mean" in weights else n_outputs
        mean, factor = np.zeros((n_linear, n_latent)), np.eye(n_linear)
        starts = [(mean, factor, a, n) for a, n in zip(amplitudes, noises, strict=True)]
        made: Any = body
        activation = options.pop("activation")
        if body is None:
            sizes = [weights["body.weight0"].shape[1]] if "body.weight0" in weights else []
            sizes += [weights[n].shape[2] for n in sorted(weights) if n.startswith("body.weight")]
            n_waves = weights["body.frequency"].shape[2] if "body.frequency" in weights else 0
            sizes = sizes or [weights["log_scale"].shape[1] - 2 * n_waves]
            made = MLPBody(n_members, sizes, activation, n_waves=n_waves)
        center = weights["center"].numpy()
        return cls(made, starts, center, center, **options)

    def forward(self, X: Tensor) -> Tensor:
        """Return population predictions (n_rows, n_outputs): the mean of the prior means."""
        mean = self.functions(dict(self.named_parameters())).columns(X)[0].mean(0)
        return self.likelihood.spread(mean).expand(-1, self.n_outputs)


def _parameter(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class HeadFunctions:
    """Functions of the values of a head's parameters, for all its members at once.

    Attributes
    ----------
    has_sums : bool
        Whether sums over the rows of a task say all that the rows do, see `Information`.
    kernel_batches : int
        How many times as many rows as fit into caches to take at a time: many, where kernels go
        through them one after the other.
    """

    has_sums: ClassVar[bool] = True
    kernel_batches: ClassVar[int] = 1

    def __init__(self, head: GaussianHead, params: Params, body: Any) -> None:
        self.head = head
        self.params = params
        self.body = body
        prefix = "body."
        self.of_body = {n[len(prefix) :]: p for n, p in params.items() if n.startswith(prefix)}
        self.row_work = sum(p.numel() for p in params.values())

    def columns(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Prior mean (n_members, n_rows, n_outputs), and S, of rows (n_rows, ...)."""
        p, head = self.params, self.head
        factor = p["factor"]
        # not len(X): as a number, it would be a constant of what is exported
        linear = X.new_ones(X.shape[0], 1, dtype=factor.dtype)
        if len(head.center):
            X = ((X - head.center) / head.scale).clamp(-BEYOND, BEYOND)
        X = X.to(factor.dtype)
        if len(head.center):
            linear = torch.cat([linear, X], 1)
        if head.same_classes and len(head.center):
            # in units in which `factor` is about 1: else a step of the same size for all
            # parameters would be a large one for it
            linear = linear * (SPREAD / math.sqrt(max(linear.shape[1] - 1, 1)))
        h = self.body.features(self.of_body, X).to(factor.dtype)
        S = torch.cat([linear @ factor, h * p["log_scale"].exp().unsqueeze(1)], -1)
        if head.same_classes:
            return S.new_zeros(*S.shape[:2], 1), S  # of any number of classes
        n_linear = linear.shape[1]
        mean = linear @ p["mean"][:, :n_linear] + h @ p["mean"][:, n_linear:]
        return mean, S

    def noise(self) -> Tensor:
        """Variance of the noise (n_members, n_noises), over the squared amplitude."""
        return (2 * self.params["log_noise"]).exp() + NOISE_FLOOR

    def amplitude(self) -> Tensor | float:
        """Amplitude of the outputs (n_members, 1, n_outputs)."""
        if "log_amplitude" not in self.params:
            return 1.0
        others = self.params["log_amplitude"].exp()
        return torch.cat([torch.ones_like(others[:, :1]), others], 1).unsqueeze(1)

    def _root(self, gram: Tensor) -> Tensor:
        """Cholesky factors (n_members, n_tasks, n_noises, n, n) of a Gram matrix and the noise."""
        noise = self.noise()
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # a system that is not positive definite gives what is not finite, and a skipped update
        factor, failed = torch.linalg.cholesky_ex(
            gram.unsqueeze(2) + noise[:, None, :, None, None] * eye
        )
        return factor.where((failed == 0)[..., None, None], torch.nan)

    def _solve(self, factor: Tensor, v: Tensor) -> Tensor:
        """Solve the systems of `_root` for v (n_members, n_tasks, n, n_outputs)."""
        if factor.shape[2] > 1:  # every output has a system of its own
            return solve(v.mT.unsqueeze(-1), factor).squeeze(-1).mT
        return solve(v, factor.squeeze(2))

    def condition(
        self, X: Tensor, y: Tensor, root: Tensor | None = None, *, doubt: bool = True
    ) -> Posterior:
        """Condition on support sets.

        Parameters
        ----------
        X : Tensor of shape (n_tasks, n_support, ...)
        y : Tensor of shape (n_tasks, n_support, n_outputs)
            Standardised targets, or 1 for the class of the row and 0 for the others.
        root : Tensor of shape (n_tasks, n_support) or (n_members, n_tasks, n_support), optional
            Square roots of the rows' weights: one of weight 2 is a row that is there twice. 0 for
            padding.
        doubt : bool, default=True
            Whether variances will be asked for.
        """
        S, residual, n_rows = self.weighted(X, y, root)
        if S.shape[-2] > S.shape[-1]:
            return self.posterior(Information.over(S, residual, n_rows), doubt=doubt)
        factor = self._root(S @ S.mT)
        solved = self._solve(factor, residual)
        half = n_moved = None
        if doubt:
            root = torch.linalg.solve_triangular(factor, S.unsqueeze(2), upper=False)
            half, n_moved = self.kept(root), root.square().sum((-2, -1))
        shift, misfit = S.mT @ solved, (residual * solved).sum(2)
        of_rows = torch.ones_like(n_rows[:1, :, 0], dtype=torch.bool)
        parts = (shift, misfit, shift.square().sum(2), n_moved, self._log_det(factor))
        return Posterior(*parts, n_rows, half, of_rows)

    def posterior(self, given: Information, *, doubt: bool = True) -> Posterior:
        """Condition on sums over the rows of support sets; see `condition`."""
        factor, noise = self._root(given.gram), self.noise()[:, None]
        shift = self._solve(factor, given.cross)
        half = n_moved = None
        if doubt:
            one = torch.diag_embed(noise.sqrt().unsqueeze(-1).expand(factor.shape[:-1]))
            root = torch.linalg.solve_triangular(factor, one, upper=False)
            half, n_moved = self.kept(root), root.shape[-1] - root.square().sum((-2, -1))
        misfit = (given.square - (given.cross * shift).sum(2)) / noise
        of_rows = torch.zeros_like(given.n_rows[:1, :, 0], dtype=torch.bool)
        parts = (shift, misfit, shift.square().sum(2), n_moved, self._log_det(factor))
        return Posterior(*parts, given.n_rows, half, of_rows)

    def kept(self, half: Tensor) -> Tensor:
        """Roots H as posteriors have them."""
        return half

    def half_of(self, given: Posterior) -> Tensor | None:
        """Roots H (n_members, n_tasks, n_noises, n, n_columns), see `Posterior`."""
        return given.half

    def _log_det(self, factor: Tensor) -> Tensor:
        """Logarithms of the determinants of systems, over those of the noise alone."""
        logs = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return logs - factor.shape[-1] * self.noise().log()[:, None]

    def weighted(
        self, X: Tensor, y: Tensor, root: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Columns, residuals and number of support rows by their weights; see `condition`."""
        prior, S = self.of_tasks(X)
        if root is None:
            root = S.new_ones(1, *X.shape[:2])
        m = (root if root.ndim == 3 else root[None]).unsqueeze(-1)
        return S * m, m * (self._coded(y, prior) - prior), m.square().sum(2)

    def misfit(self, given: Posterior) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis length (n_members, n_tasks, n_outputs) of the support targets.

        As long as the number of rows (1 or n_members, n_tasks, 1), the second result, on average.
        """
        return given.misfit.clamp_min(0), given.n_rows

    def moved(self, given: Posterior) -> tuple[Tensor, Tensor]:
        """Return the parts of `misfit` and of the rows that went into the weights."""
        assert given.n_moved is not None, NO_HALF
        return given.moved, given.n_moved

    def trust(self, given: Any) -> Tensor | None:
        """Return what members count (n_members, n_tasks, n_outputs); None: the same.

        As much as the support targets are likely under them.
        """
        return (TRUST * self.log_density(given)).softmax(0)

    def log_density(self, given: Posterior) -> Tensor:
        """Logarithm of the density of the support targets, without its constant.

        Of a task whose scale has an inverse gamma prior: a multivariate Student distribution.
        """
        misfit, n_rows = self.misfit(given)
        logs = given.log_det + n_rows * self.noise().log()[:, None]
        of_misfit = (TRUST_FREEDOM + n_rows) * (misfit / TRUST_FREEDOM).log1p()
        found = -0.5 * (of_misfit + logs)
        a = self.amplitude()
        found = found - n_rows * a.log() if isinstance(a, Tensor) else found
        return found.where(n_rows > 0, 0.0)  # without rounding, where there are no rows

    def _coded(self, y: Tensor, prior: Tensor) -> Tensor:
        """Targets (n_members or 1, n_tasks, n_rows, n_outputs) that the head is conditioned on."""
        return y / self.amplitude_of_tasks()

    def loss(self, X: Tensor, y: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Negative log likelihood (n_members, n_tasks) of query rows, and their outputs.

        That is the joint density of all query targets of a task, without its constant.

        Parameters
        ----------
        X : Tensor of shape (n_tasks, n_rows, ...)
            The first `k` rows are the support set.
        y : Tensor of shape (n_tasks, n_rows, n_outputs)
        mask : Tensor of shape (n_members or 1, n_tasks, n_rows), optional
            Weights of the rows, 0 for those not to learn from: one of weight 2 is a row that is
            there twice.
        k : int
        """
        prior, S, residual, of_query = self._joint(X, y, mask, k)
        a, noise = self.amplitude_of_tasks(), self.noise()
        residual = residual.mT
        gram = S @ S.mT
        nll, u = Predictive.apply(gram, residual, noise, k)
        n_outputs = residual.shape[2]
        if mask is not None:
            n_padded = (1 - mask[..., k:].to(S.dtype)).sum(-1)
            nll = nll - 0.5 * n_padded * self._per_output(noise.log(), n_outputs)
        if isinstance(a, Tensor):
            n_real = float(X.shape[1] - k) if mask is None else mask[..., k:].to(S.dtype).sum(-1)
            nll = nll + n_real * a.log().sum(-1).flatten(1)
        moved = gram[:, :, k:, :k] @ u.mT if k else 0.0
        return nll, a * (prior[:, :, k:] + moved / of_query)

    def _joint(
        self, X: Tensor, y: Tensor, mask: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """Prior mean, weighted columns and residuals of all rows, and roots of query weights."""
        prior, S = self.of_tasks(X)
        residual = self._coded(y, prior) - prior
        if mask is None:
            return prior, S, residual, 1.0
        m = mask.to(S.dtype).sqrt().unsqueeze(-1)
        of_query = torch.where(m > 0, m, torch.ones_like(m))[:, :, k:]
        return prior, S * m, residual * m, of_query

    @staticmethod
    def _per_output(values: Tensor, n_outputs: int) -> Tensor:
        """Sum (n_members, 1) over the outputs of what (n_members, n_noises) has."""
        return values.sum(1, keepdim=True) * (n_outputs / values.shape[1])

    def amplitude_of_tasks(self) -> Tensor | float:
        """Amplitude (n_members, 1, 1, n_outputs)."""
        a = self.amplitude()
        return a.unsqueeze(1) if isinstance(a, Tensor) else a

    def of_tasks(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return `columns` of rows (n_tasks, n_rows, ...), each by task."""
        prior, S = self.columns(X.flatten(0, 1))
        shape = (len(S), *X.shape[:2])
        return prior.reshape(*shape, prior.shape[-1]), S.reshape(*shape, S.shape[-1])

    def query(
        self, X: Tensor, given: Posterior, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs (n_members, n_tasks, n_query, n_outputs), and variances of targets.

        With a `scale` the variances are scaled task by task (Gelman et al. 2013, sec. 3.3).
        """
        mean, variance = self.moments(X, given)
        assert variance is not None, NO_HALF
        if scale is not None:
            variance = variance * self.spread(given, scale).unsqueeze(2)
        return mean, self.amplitude_of_tasks() ** 2 * variance

    def moments(self, X: Tensor, given: Posterior) -> tuple[Tensor, Tensor | None]:
        """Return outputs (n_members, n_tasks, n_query, n_outputs), and variances of the targets.

        These are (n_members, n_tasks, n_query, n_noises), noise included, over the squared
        amplitude; None where support sets were conditioned on without.
        """
        prior, S = self.of_tasks(X)
        mean = self.amplitude_of_tasks() * (prior + S @ given.shift)
        half = self.half_of(given)
        if half is None:
            return mean, None
        left = (half @ S.mT.unsqueeze(2)).square().sum(-2)
        less = (S.square().sum(-1).unsqueeze(2) - left).clamp_min(0)
        left = torch.where(given.of_rows[..., None, None], less, left)
        return mean, (left + self.noise()[:, None, :, None]).mT

    def query_rows(
        self, X: Tensor, places: np.ndarray, given: Any, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `query`, of rows (n_rows, ...) of the tasks at these places of `given`.

        Returns values of shape (n_members, n_rows, n_outputs).
        """
        distinct, of_row = np.unique(places, return_inverse=True)
        parts, order = [], []

        def there(index: np.ndarray) -> Tensor:
            return torch.from_numpy(index).to(X.device)

        for tasks, at, real in padded(of_row.reshape(-1), len(distinct)):
            found = self.query(X[there(at)], of_tasks(given, distinct[tasks]), scale)
            parts.append([v[:, there(real)] for v in found if v is not None])
            order.append(at[real])
        back = there(np.argsort(np.concatenate(order)))
        mean, variance = (torch.cat(values, 1)[:, back] for values in zip(*parts, strict=True))
        return mean, variance

    def outputs(self, X: Tensor, shift: Tensor, place: Tensor) -> Tensor:
        """Return outputs (n_members, n_rows, n_outputs) of rows (n_rows, ...).

        `shift` (n_members, n_tasks, n_columns, n_outputs) is that of tasks, `place` (n_rows,) the
        task of each row.
        """
        prior, S = self.columns(X)
        moved = (S.unsqueeze(-2) @ shift[:, place.to(shift.device)].to(S)).squeeze(-2)
        return self.amplitude() * (prior + moved)

    def spread(self, given: Posterior, scale: Scale) -> Tensor:
        """Factor (n_members, n_tasks, n_outputs) of the variances, see `query`."""
        misfit, n_rows = self.misfit(given)
        if not bool(scale.of_weights.all()):
            moved, n_moved = self.moved(given)
            misfit = misfit - (1 - scale.of_weights) * moved
            n_rows = n_rows - (1 - scale.of_weights) * n_moved
        return (scale.freedom + misfit.clamp_min(0)) / (scale.freedom + n_rows)

    def room(self, n_rows: np.ndarray) -> int:
        """Numbers of the posteriors of tasks of so many rows (n_tasks,)."""
        p, n_noises = self.head.n_columns, self.head.log_noise.shape[1]
        one = (n_noises * np.minimum(n_rows, p) + self.head.n_outputs) * p
        return int(self.head.n_members * one.sum())

    def covariance(self, given: Posterior) -> Tensor:
        """Covariance (n_members, n_tasks, n_noises, n_columns, n_columns) of w."""
        half = self.half_of(given)
        assert half is not None, NO_HALF
        known = half.mT @ half
        one = torch.eye(known.shape[-1], dtype=known.dtype, device=known.device)
        return torch.where(given.of_rows[..., None, None, None], one - known, known)

    def expected(
        self, parts: Iterable[tuple[Tensor, Tensor]], given: Posterior
    ) -> tuple[Tensor, Tensor]:
        """Return how much labels of rows would be off, and what doubt about their outputs costs.

        Parameters
        ----------
        parts : iterable of (prior, S)
            Of some rows after the others, see `of_tasks`.
        given : Posterior

        Returns
        -------
        noise : Tensor of shape (n_members, n_tasks or 1, n_systems, n_rows or 1)
            Variance of a label about the output, by the squared amplitude.
        cost : Tensor of shape (n_members or 1, n_tasks or 1, n_outputs, n_rows or 1)
            Factor of the variance of an output, by the squared amplitude, in the expected loss.
        """
        a = self.amplitude_of_tasks()
        noise = self.noise()[:, None, :, None]
        return noise, (a**2).mT if isinstance(a, Tensor) else noise.new_ones(1, 1, 1, 1)


class ClassHead(GaussianHead):
    """A Gaussian head of classes: targets are codes, whose size is learned, and outputs logits.

    A code is that of the class less the mean over classes, or less the probabilities that the prior
    has for the row: how much of which (`surprise`) is learned, too.
    """

    def __init__(self, body: Any, starts: Any, *args: Any, **options: Any) -> None:
        super().__init__(body, starts, *args, **options)
        self.log_code = _parameter(np.full((self.n_members, 1), math.log(CODE)))
        if not self.same_classes:  # else nothing is expected
            self.surprise = _parameter(np.zeros((self.n_members, 1)))
        with torch.no_grad():
            self.log_scale.fill_(math.log(0.3))

    def functions(self, params: Params, body: Any = None) -> ClassFunctions:
        """See `GaussianHead`."""
        return ClassFunctions(self, params, self.body if body is None else body)

    def decaying(self, params: Params, prefix: str) -> tuple[list[Tensor], float]:
        """See `GaussianHead`: the start of the linear part is left alone."""
        n_linear = self.factor.shape[-1]
        # few classes of an episode are soon known by heart
        local = self.same_classes and not self.body.of_user
        means = [p[:, n_linear:] for n, p in params.items() if n == f"{prefix}mean"]
        return means, DECAY_OF_LOCAL if local else DECAY_OF_CLASSES


class ClassFunctions(HeadFunctions):
    """Functions of a `ClassHead`."""

    def trust(self, given: Any) -> None:
        """See `HeadFunctions`: codes are no targets."""
        return None

    def _coded(self, y: Tensor, prior: Tensor) -> Tensor:
        """See `HeadFunctions`."""
        size = self.params["log_code"].exp().view(-1, 1, 1, 1)
        expected: Tensor | float = 1 / y.shape[-1]
        if "surprise" in self.params:
            part = self.params["surprise"].view(-1, 1, 1, 1)
            expected = expected + part * (prior.softmax(-1) - expected)
        return size * (y - expected)

    def loss(self, X: Tensor, y: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of query rows, and their logits; see `HeadFunctions`."""
        prior, S, residual, of_query = self._joint(X, y, mask, k)
        mean = prior[:, :, k:] + self._moved(S, residual, k) / of_query
        rows = self.head.likelihood.error_rows(mean, y[:, k:])
        return (rows if mask is None else rows * mask[..., k:]).sum(-1), mean

    def _moved(self, S: Tensor, residual: Tensor, k: int) -> Tensor | float:
        """Return how far conditioning on the first k rows moves the outputs of the others."""
        if not k:
            return 0.0
        A = S[:, :, :k]
        system = (A @ A.mT).double()
        system = system + torch.diag_embed(self.noise().double()[:, None].expand(-1, 1, k))
        factor, failed = torch.linalg.cholesky_ex(system)
        factor = factor.where((failed == 0)[..., None, None], torch.nan)
        u = solve(residual[:, :, :k].double(), factor).to(S.dtype)
        return S[:, :, k:] @ (A.mT @ u)

    def query(self, X: Tensor, given: Posterior, scale: Scale | None = None) -> tuple[Tensor, None]:
        """Return logits; see `HeadFunctions`. They have no variances."""
        return self.moments(X, given)[0], None

    def expected(
        self, parts: Iterable[tuple[Tensor, Tensor]], given: Posterior
    ) -> tuple[Tensor, Tensor]:
        """See `HeadFunctions`: doubt costs nothing where one class is certain all the same."""
        p = [(prior + S @ given.shift).softmax(-1) for prior, S in parts]
        cost = torch.cat([1 - some.square().sum(-1) for some in p], -1)
        return self.noise()[:, None, :, None], cost.unsqueeze(2)
