"""Systems of a Cholesky factor, batched on accelerators too.

torch solves and inverts a batch by its factors one system after another there, and waits in
between; products and triangular systems are batched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sklearn_maml.devices import is_host


def solve(v: Tensor, factor: Tensor) -> Tensor:
    """Solve L L' x = v for a lower factor L (..., n, n)."""
    if is_host(factor.device):
        return torch.cholesky_solve(v, factor)
    half = torch.linalg.solve_triangular(factor, v, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def inverse_of_factor(factor: Tensor) -> Tensor:
    """Inverse of L L' for a lower factor L (..., n, n)."""
    if is_host(factor.device):
        return torch.cholesky_inverse(factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return half.mT @ half


def inverse_of(system: Tensor) -> Tensor:
    """Inverse of positive definite systems (..., n, n); what has none gives NaN.

    Its derivative is two products.
    """
    if is_host(system.device):
        found, failed = torch.linalg.inv_ex(system)
        return found.where((failed == 0)[..., None, None], torch.nan)
    inverted: Tensor = _Inverse.apply(system)
    return inverted


class _Inverse(torch.autograd.Function):
    """Inverse by a factor, which has no share in the derivative."""

    @staticmethod
    def forward(ctx: Any, system: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(system)
        found = inverse_of_factor(factor.where((failed == 0)[..., None, None], torch.nan))
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        return -found.mT @ grads[0] @ found.mT
