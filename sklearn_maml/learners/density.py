"""Density of query targets given support targets, with its derivative written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sklearn_maml.learners.systems import inverse_of_factor


class Predictive(torch.autograd.Function):
    """Negative log density of query targets given support targets, with its derivative.

    For the Gram matrix G of all rows, residuals r and the noise n of an output, it is that of all
    rows less that of the first k: half of ``r' u + log |A|`` with A = G + n and u = inv(A) r. The
    derivatives are half of ``inv(A) - u u'`` in G, and u in r. Padding has G = 0 and r = 0, and
    adds half of the logarithm of the noise, which the caller takes off.
    """

    @staticmethod
    def forward(
        ctx: Any, gram: Tensor, residual: Tensor, noise: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Values (n_members, n_tasks), and u of the support rows."""
        nll, by_gram, u = _density(gram, residual, noise)
        u_support = u[..., :0]
        if k:
            of_support, less, u_support = _density(gram[..., :k, :k], residual[..., :k], noise)
            nll = nll - of_support
            by_gram[..., :k, :k] -= less
            u = u.clone()
            u[..., :k] -= u_support
        by_noise = by_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        ctx.save_for_backward(by_gram.sum(2).to(gram.dtype), u.to(gram.dtype), by_noise.to(gram))
        u_support = u_support.to(gram.dtype)
        ctx.mark_non_differentiable(u_support)
        return nll.sum(2).to(gram.dtype), u_support

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return derivatives in gram, residual and noise."""
        by_gram, u, by_noise = ctx.saved_tensors
        g = grads[0][:, :, None]
        return g[..., None] * by_gram, g[..., None] * u, (g * by_noise).sum(1), None


def _density(gram: Tensor, residual: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log density (n_members, n_tasks, n_outputs), its derivatives in gram and residual.

    `residual` is (n_members, n_tasks, n_outputs, n_rows). In float64, whatever comes in; what is
    not positive definite gives what is not finite.
    """
    n_outputs = residual.shape[2]
    system = gram.double().unsqueeze(2).expand(-1, -1, noise.shape[1], -1, -1).clone()
    system.diagonal(dim1=-2, dim2=-1).add_(noise.double()[:, None, :, None])
    factor, failed = torch.linalg.cholesky_ex(system)
    factor = factor.masked_fill((failed != 0)[..., None, None], torch.nan)
    inverse = inverse_of_factor(factor)
    r = residual.double()
    u = (inverse @ r.unsqueeze(-1)).squeeze(-1)
    logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    nll = 0.5 * (r * u).sum(-1) + logdet
    by_gram = 0.5 * (inverse - u.unsqueeze(-1) * u.unsqueeze(-2))
    return nll.expand(-1, -1, n_outputs), by_gram, u
