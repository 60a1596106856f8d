"""Batch norm over a batch of tasks, with its derivatives written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Norm(torch.autograd.Function):
    """Batch norm of (n_tasks, n, channels) over n, with an affine map or without, maybe a ReLU.

    Written out because autograd takes four times the passes over the activations. With z the
    normalised input, s the factor it is scaled by and <.> the mean over n, the gradient is
    ``s (gy - <gy> - z <gy z>)``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> Tensor:
        z = x - x.mean(1, keepdim=True)
        z -= z.mean(1, keepdim=True)  # what rounding left, which would move every ReLU alike
        y = z.square()  # a buffer that the output takes over
        inverse = (y.mean(1, keepdim=True) + eps).rsqrt_()
        z *= inverse
        if weight is None or bias is None:
            y.copy_(z)
        else:
            torch.addcmul(bias.unsqueeze(1), z, weight.unsqueeze(1), out=y)
        if relu:
            y.clamp_min_(0.0)
        ctx.save_for_backward(x, weight, z, inverse, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, weight, z, inverse, y = ctx.saved_tensors
        if y is not None:
            gy = torch.ops.aten.threshold_backward(gy, y.detach(), 0.0)
        gx, gw, gb = _NormGradient.apply(gy, x, weight, z, inverse)
        return (gx, None, None, None, None) if weight is None else (gx, gw, gb, None, None)


class _NormGradient(torch.autograd.Function):
    """Gradients of `_Norm` before its ReLU; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, weight: Tensor | None, z: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = gy.shape[1]
        gx = gy * z
        gb, gw = gy.sum(1, keepdim=True), gx.sum(1, keepdim=True)
        scale = inverse if weight is None else inverse * weight.unsqueeze(1)
        torch.addcmul(gb * scale / -n, z, gw * scale / -n, out=gx).addcmul_(gy, scale)
        ctx.save_for_backward(gy, weight, z, inverse, gb / n, gw / n)
        return gx, gw.squeeze(1), gb.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> Any:
        # the means over n: <v>, <v z>, <v gy>, <gy>, <gy z>
        gy, weight, z, inverse, g, gz = ctx.saved_tensors
        buffer = v * z
        mean, vz = v.mean(1, keepdim=True), buffer.mean(1, keepdim=True)
        vg = torch.mul(v, gy, out=buffer).mean(1, keepdim=True)
        scale = inverse if weight is None else inverse * weight.unsqueeze(1)
        q, p = v_weight.unsqueeze(1), v_bias.unsqueeze(1)
        curvature = vg - mean * g - vz * gz
        ggy = torch.addcmul(p - scale * mean, v, scale, out=buffer).addcmul_(z, q - scale * vz)
        on_gy, on_v = q - scale * vz, -scale * gz  # derivative by z
        average = on_gy * g + on_v * mean
        slope = on_gy * gz + on_v * vz + scale * curvature
        gx = torch.addcmul(-inverse * average, gy, inverse * on_gy)
        gx.addcmul_(v, inverse * on_v).addcmul_(z, -inverse * slope)
        gw = None if weight is None else (gy.shape[1] * inverse * curvature).squeeze(1)
        return ggy, gx, gw, None, None


class _NormOnce(torch.autograd.Function):
    """`_Norm` that is differentiated once at most, in the memory of its input and its output.

    In fresh memory a pass takes three to five times as long, and every pass counts: without
    second derivatives the normalised input is not needed, and centring it twice, as `_Norm`
    does, takes a term of the affine map. The input is overwritten by the forward pass, the
    output and its gradient by the backward pass.

    The statistics are those of the first `n_own` of the n; the gradient of `_Norm` holds for
    these, with sums over all n and means over `n_own`, and that of the others is ``s gy``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        n_own: int,
    ) -> Tensor:
        x = x.detach()
        own = x[:, :n_own]
        x -= own.mean(1, keepdim=True)
        rest = own.mean(1, keepdim=True)
        y = torch.empty_like(x)
        square = torch.square(own, out=y[:, :n_own])
        inverse = (square.mean(1, keepdim=True) - rest.square() + eps).rsqrt_()
        scale = inverse if weight is None else inverse * weight.unsqueeze(1)
        shift = -rest * scale if bias is None else torch.addcmul(bias.unsqueeze(1), rest, -scale)
        torch.addcmul(shift, x, scale, out=y)
        if relu:
            y.clamp_min_(0.0)
        ctx.save_for_backward(x, rest, inverse, scale, y)
        ctx.relu, ctx.affine, ctx.n_own = relu, weight is not None, n_own
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, rest, inverse, scale, y = ctx.saved_tensors
        n_own = ctx.n_own
        gy, y = gy.detach(), y.detach()
        if ctx.relu:
            torch.ops.aten.threshold_backward.grad_input(gy, y, 0.0, grad_input=gy)
        gb = gy.sum(1, keepdim=True)
        gw = (torch.mul(gy, x, out=y).sum(1, keepdim=True) - rest * gb) * inverse
        slope = scale * inverse * gw / -n_own
        constant = scale * gb / -n_own - rest * slope
        own = torch.addcmul(constant, x[:, :n_own], slope, out=y[:, :n_own])
        own.addcmul_(gy[:, :n_own], scale)
        if n_own < gy.shape[1]:
            torch.mul(gy[:, n_own:], scale, out=y[:, n_own:])
        return (y, gw.squeeze(1), gb.squeeze(1), *[None] * 4) if ctx.affine else (y, *[None] * 6)


def _norm_of_all(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, n_own: int
) -> Tensor:
    """Normalise all of (n_tasks, n, channels) with the statistics of the first `n_own` of the n.

    Without second derivatives of its own making; in the query set, where few need them.
    """
    variance, mean = torch.var_mean(x[:, :n_own], 1, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight.unsqueeze(1)
    out = (x - mean) * scale
    out = out if bias is None else out + bias.unsqueeze(1)
    return out.relu() if relu else out


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    relu: bool,
    n_own: int,
    in_place: bool,
) -> Tensor:
    """Batch norm of (n_tasks, n, channels) with the statistics of the first `n_own` of the n.

    With `relu` one follows. `in_place` says that nobody else uses the input, the gradient of the
    output and, after that, the output, and that one derivative is enough.
    """
    if in_place:
        y: Tensor = _NormOnce.apply(x, weight, bias, eps, relu, n_own)
    elif n_own < x.shape[1]:
        y = _norm_of_all(x, weight, bias, eps, relu, n_own)
    else:
        y = _Norm.apply(x, weight, bias, eps, relu)
    return y
