"""Small convolutional networks over a batch of tasks, each task with weights of its own.

A convolution is one third of a family that differentiation does not leave: the output is linear
in the input and in the weights, and so are both of its gradients, which are convolutions again.
The three are written here as autograd functions that call each other, so every order of
derivative is exact, and each of them picks the faster way for its shapes (`_gathers`). Inputs and
weights have a leading task axis, (n_tasks, n_rows, channels, height, width), and lie in memory
with the channels last.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sklearn_maml.inner_loop import Autograd

__all__ = [
    "ConvAutograd",
    "compose",
    "conv_forward",
    "gradient_now",
    "is_conv_net",
    "keep_memory",
    "spread",
    "support_first",
    "tasks_at_a_time",
]

Params = dict[str, Tensor]
Layer = Callable[[Params, Tensor], Tensor]
# stride and padding
Geometry = tuple[tuple[int, int], tuple[int, int]]

ROW_WISE_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# Bytes of the largest activation of the tasks that run together. Beyond the caches a pass over
# an activation costs several times as much; with less the overhead of the calls shows (a
# meta-step of conv4 with 1, 2, 4 and 8 MiB: 220, 178, 164, 184 ms).
ACTIVATION_BYTES = 2**22
# The same on an accelerator, where few large launches are cheap and memory is the limit (which
# the engine finds out); not measured.
DEVICE_BYTES = 2**30

# Just below 32 MiB, the largest block whose release teaches glibc's allocator to keep freed memory
# of that size. Before, it returned activations to the system and fetched them anew: 16,000 to
# 50,000 page faults a meta-step, a tenth of its time.
KEPT_BYTES = 2**25 - 2**16

# Multiply-adds of one task below which a batched matrix product over gathered patches beats one
# convolution call a task: products run at about 100 GFLOP/s, convolutions at 200, but each call
# costs some 25 microseconds, mostly to reorder the weights (5 rows, 64 -> 64 channels, 32 tasks:
# 4x4 0.6 ms against 1.4, 7x7 2.1 ms against 1.7); the gradient of the weights costs more of them
# (7x7 2.1 ms against 2.7, 14x14 7.1 against 6.2).
SMALL_CONVOLUTION = 2e6
SMALL_WEIGHT_GRADIENT = 4e6
# input channels below which the gradient of the input is taken from patches, whatever the size:
# the convolution kernels vectorise over 16 channels
FEW_CHANNELS = 16
# Input channels whose products are added up at a time where rounding matters (`_in_blocks`).
CHANNEL_BLOCK = 16

_sums = threading.local()
_order = threading.local()
_rows = threading.local()


@contextlib.contextmanager
def _only_sums() -> Iterator[None]:
    """Promise that gradients of weights the tasks share are summed over the tasks anyway."""
    before = getattr(_sums, "only", False)
    _sums.only = True
    try:
        yield
    finally:
        _sums.only = before


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """Promise that what is computed is differentiated once at most, and backward runs once."""
    before = getattr(_order, "once", False)
    _order.once = True
    try:
        yield
    finally:
        _order.once = before


@contextlib.contextmanager
def support_first(n_rows: int) -> Iterator[None]:
    """Say that the first rows of each task are its support set.

    Batch norm then takes the statistics of those rows and normalises all rows with them, and the
    net returns the outputs of the others, its query rows.
    """
    before = _n_support()
    _rows.support = n_rows
    try:
        yield
    finally:
        _rows.support = before


def _n_support() -> int:
    """Return the number of support rows that come before the query rows; 0: all are of one set."""
    return getattr(_rows, "support", 0)


class ConvAutograd(Autograd):
    """Plain reverse mode that asks for no gradient of each task where the tasks share weights."""

    def _backward(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        with _only_sums():
            return super()._backward(loss, leaves)


# -- the three products ----------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    """Lay the last three axes, (channels, height, width), out with the channels last."""
    if x.shape[-3] == 1:  # a stride that says so too, by which torch chooses the layout of results
        return x.squeeze(-3).contiguous().unsqueeze(-1).movedim(-1, -3)
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def _is_shared(weight: Tensor) -> bool:
    return len(weight) > 1 and weight.stride(0) == 0


def _gathers(
    weight: Tensor,
    out_shape: tuple[int, ...],
    *,
    once: bool,
    small: float = SMALL_CONVOLUTION,
    few: int = 0,
) -> bool:
    """Whether to multiply matrices of gathered patches rather than call convolutions.

    `once` says that one convolution would do for all tasks, so that its overhead counts once.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return True  # elsewhere batched products are the better ones
    if not torch.backends.mkldnn.is_available():
        return True
    work = math.prod(out_shape if once else out_shape[1:]) * weight[0, 0].numel()
    return work < small or weight.shape[2] < few


def _patches(x: Tensor, kernel: tuple[int, int], size: tuple[int, int], g: Geometry) -> Tensor:
    """Gather what each output position sees, (n_tasks, positions, kernel * channels)."""
    (sh, sw), (ph, pw) = g
    rows = x.movedim(2, -1)  # channels last
    if ph or pw:
        rows = functional.pad(rows, (0, 0, pw, pw, ph, ph))
    t, r, h, w, c = rows.stride()
    n_tasks, n_rows, channels = x.shape[:3]
    windows = rows.as_strided(
        (n_tasks, n_rows, *size, *kernel, channels), (t, r, sh * h, sw * w, h, w, c)
    )
    return windows.reshape(n_tasks, n_rows * math.prod(size), math.prod(kernel) * channels)


def _scatter(
    patches: Tensor,
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    size: tuple[int, int],
    g: Geometry,
) -> Tensor:
    """Add patches up where they were gathered, the transpose of `_patches`."""
    (sh, sw), (ph, pw) = g
    n_tasks, n_rows, channels, height, width = shape
    patches = patches.view(n_tasks, n_rows, *size, *kernel, channels)
    out = patches.new_zeros(n_tasks, n_rows, height + 2 * ph, width + 2 * pw, channels)
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        rows = slice(i, i + sh * (size[0] - 1) + 1, sh)
        columns = slice(j, j + sw * (size[1] - 1) + 1, sw)
        out[:, :, rows, columns] += patches[:, :, :, :, i, j]
    inner = out[:, :, ph : ph + height, pw : pw + width]
    return inner.contiguous().movedim(-1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """Weights as matrices (n_tasks, out_channels, kernel * channels)."""
    return weight.movedim(2, -1).flatten(2)


def _rows_matrix(y: Tensor) -> Tensor:
    """View outputs as matrices (n_tasks, positions, channels)."""
    return y.movedim(2, -1).flatten(1, 3)


def _convolve_rows(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    return torch.conv2d(x, weight, None, *g)


def _in_blocks(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Convolve some channels at a time.

    The kernels for channels last add all products of an output up in one sequence; with 64
    channels of 3 x 3 the rounding error of that is twice that of four sums of 16 channels, and
    so is the chance that a ReLU or a maximum falls on the other side than in exact arithmetic.
    """
    out = None
    pairs = zip(x.split(CHANNEL_BLOCK, 1), weight.split(CHANNEL_BLOCK, 1), strict=True)
    for part, own in pairs:
        y = torch.conv2d(_channels_last(part), _channels_last(own), None, *g)
        out = y if out is None else out.add_(y)
    assert out is not None
    return out


def _convolve(x: Tensor, weight: Tensor, g: Geometry, in_blocks: bool) -> Tensor:
    """Compute outputs, (n_tasks, n_rows, out_channels, height, width)."""
    n_tasks, n_rows = x.shape[:2]
    kernel = (weight.shape[3], weight.shape[4])
    size = tuple(
        (x.shape[3 + a] + 2 * g[1][a] - kernel[a]) // g[0][a] + 1 for a in range(2)
    )  # fmt: skip
    out_shape = (n_tasks, n_rows, weight.shape[1], *size)
    shared = _is_shared(weight)
    if _gathers(weight, out_shape, once=shared):
        out = _patches(x, kernel, (size[0], size[1]), g) @ _matrix(weight).transpose(1, 2)
        return out.unflatten(1, (n_rows, *size)).movedim(-1, 2)
    convolve = _in_blocks if in_blocks else _convolve_rows
    if shared:
        out = convolve(x.flatten(0, 1), weight[0], g)
    else:
        out = _join([convolve(x[t], weight[t], g) for t in range(n_tasks)])
    return out.unflatten(0, (n_tasks, n_rows))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gradients(
    gy: Tensor, x: Tensor, weight: Tensor, g: Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gy, x, weight, None, *g, (1, 1), False, (0, 0), 1, mask
    )
    return result


def _input_gradient(gy: Tensor, weight: Tensor, like: Tensor, g: Geometry) -> Tensor:
    """Transpose of `_convolve` with respect to inputs like `like`."""
    n_tasks, n_rows = like.shape[:2]
    if _gathers(weight, tuple(gy.shape), once=_is_shared(weight), few=FEW_CHANNELS):
        kernel, size = (weight.shape[3], weight.shape[4]), (gy.shape[3], gy.shape[4])
        return _scatter(_rows_matrix(gy) @ _matrix(weight), tuple(like.shape), kernel, size, g)
    mask = [True, False, False]
    if _is_shared(weight):
        gx = _gradients(gy.flatten(0, 1), like.flatten(0, 1), weight[0], g, mask)[0]
    else:
        gx = _join([_gradients(gy[t], like[t], weight[t], g, mask)[0] for t in range(n_tasks)])
    return gx.unflatten(0, (n_tasks, n_rows))


def _weight_gradient(gy: Tensor, x: Tensor, like: Tensor, g: Geometry, only_sum: bool) -> Tensor:
    """Transpose of `_convolve` with respect to weights like `like`."""
    n_tasks = len(x)
    channels, *kernel = like.shape[2:]
    if _gathers(like, tuple(gy.shape), once=only_sum, small=SMALL_WEIGHT_GRADIENT):
        patches = _patches(x, (kernel[0], kernel[1]), (gy.shape[3], gy.shape[4]), g)
        matrix = _rows_matrix(gy)
        if only_sum:
            patches, matrix = patches.flatten(0, 1).unsqueeze(0), matrix.flatten(0, 1).unsqueeze(0)
        if channels < FEW_CHANNELS:  # the transposed product takes a quarter of the time
            gw = (patches.transpose(1, 2) @ matrix).transpose(1, 2).contiguous()
        else:
            gw = matrix.transpose(1, 2) @ patches
        gw = gw.unflatten(2, (*kernel, channels)).movedim(-1, 2)
    elif only_sum:
        mask = [False, True, False]
        gw = _gradients(gy.flatten(0, 1), x.flatten(0, 1), like[0], g, mask)[1].unsqueeze(0)
    else:
        mask = [False, True, False]
        parts = [_gradients(gy[t], x[t], like[t], g, mask)[1] for t in range(n_tasks)]
        gw = _join(parts).unflatten(0, (n_tasks, like.shape[1]))
    return (gw / n_tasks).expand(like.shape) if only_sum else gw


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, g: Geometry, in_blocks: bool = False
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = g
        return _convolve(x, weight, g, in_blocks)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gy = _channels_last(gy)
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = _WeightGradient.apply(gy, x, weight.detach(), ctx.geometry)
        if ctx.needs_input_grad[0]:  # last: it is needed next, and warm then
            gx = _InputGradient.apply(gy, weight, x.detach(), ctx.geometry)
        return gx, gw, None, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, weight: Tensor, like: Tensor, g: Geometry) -> Tensor:
        ctx.save_for_backward(gy, weight)
        ctx.geometry = g
        return _input_gradient(gy, weight, like, g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        gy, weight = ctx.saved_tensors
        v = _channels_last(v)
        ggy = gw = None
        if ctx.needs_input_grad[0]:
            ggy = _Convolution.apply(v, weight, ctx.geometry)
        if ctx.needs_input_grad[1]:
            gw = _WeightGradient.apply(gy, v, weight.detach(), ctx.geometry)
        return ggy, gw, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, like: Tensor, g: Geometry) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.geometry = g
        # a sum spread over the tasks: whoever adds the tasks' gradients up gets the same
        only_sum = getattr(_sums, "only", False) and _is_shared(like)
        return _weight_gradient(gy, x, like, g, only_sum)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        gy, x = ctx.saved_tensors
        v = _channels_last(v)
        ggy = gx = None
        if ctx.needs_input_grad[0]:
            ggy = _Convolution.apply(x, v, ctx.geometry)
        if ctx.needs_input_grad[1]:
            gx = _InputGradient.apply(gy, v, x.detach(), ctx.geometry)
        return ggy, gx, None, None


# -- batch norm ------------------------------------------------------------------------------------


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
    """`_Norm` within `_once`, in the memory of its input and its output.

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


# -- layers ----------------------------------------------------------------------------------------


def _per_channel(p: Tensor, like: Tensor) -> Tensor:
    """View a parameter (n_tasks, channels) so that it broadcasts over rows and positions."""
    return p.reshape(p.shape[0], 1, p.shape[1], *[1] * (like.ndim - 3))


def _conv(name: str, layer: nn.Conv2d, norm: str | None) -> Layer:
    """`norm` names the batch norm that follows at once, if any."""
    (sh, sw), padding = layer.stride, layer.padding
    assert not isinstance(padding, str)
    geometry = ((sh, sw), (padding[0], padding[1]))

    def forward(params: Params, x: Tensor) -> Tensor:
        weight = params[f"{name}weight"]
        if not _is_shared(weight):  # what the tasks share is laid out by `spread`
            weight = _channels_last(weight)
        # where a task is adapted each ReLU counts more, with the fewer rows and in every step
        in_blocks = torch.is_grad_enabled() and not getattr(_order, "once", False)
        x = _Convolution.apply(_channels_last(x), weight, geometry, in_blocks)
        # a constant of a channel vanishes when the statistics of the batch are taken out
        if layer.bias is None or (norm is not None and f"{norm}running_mean" not in params):
            return x
        return x + _per_channel(params[f"{name}bias"], x)

    return forward


def _batch_norm(
    name: str, layer: nn.BatchNorm1d | nn.BatchNorm2d, relu: bool, alone: bool
) -> Layer:
    """Normalise with the statistics of each task's rows, or with those among the parameters.

    `alone` says that nobody else uses the input, the output's gradient, and, after that, the
    output.
    """

    def forward(params: Params, x: Tensor) -> Tensor:
        shape = x.movedim(2, -1).shape
        rows = x.movedim(2, -1).flatten(1, -2)  # (n_tasks, positions, channels)
        weight = bias = None
        if layer.affine:
            weight, bias = params[f"{name}weight"], params[f"{name}bias"]
        if f"{name}running_mean" in params:
            scale = (params[f"{name}running_var"] + layer.eps).rsqrt()
            scale = scale if weight is None else scale * weight
            rows = (rows - params[f"{name}running_mean"].unsqueeze(1)) * scale.unsqueeze(1)
            rows = rows if bias is None else rows + bias.unsqueeze(1)
            rows = rows.relu() if relu else rows
        else:
            n_own = rows.shape[1]
            if _n_support():
                n_own = n_own // x.shape[1] * _n_support()
            if n_own == 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{tuple(x.shape[1:])}"
                )
            if alone and getattr(_order, "once", False):
                rows = _NormOnce.apply(rows, weight, bias, layer.eps, relu, n_own)
            elif n_own < rows.shape[1]:
                rows = _norm_of_all(rows, weight, bias, layer.eps, relu, n_own)
            else:
                rows = _Norm.apply(rows, weight, bias, layer.eps, relu)
        return rows.view(shape).movedim(-1, 2)

    return forward


def _linear(name: str, has_bias: bool) -> Layer:
    def forward(params: Params, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)
        weight = params[f"{name}weight"].transpose(1, 2)
        if has_bias:
            out = torch.baddbmm(params[f"{name}bias"].unsqueeze(1), rows, weight)
        else:
            out = torch.bmm(rows, weight)
        return out.unflatten(1, x.shape[1:-1])

    return forward


def _flatten(layer: nn.Flatten) -> Layer:
    # axes of a task's rows are one further on here
    start, end = (axis + 1 if axis >= 0 else axis for axis in (layer.start_dim, layer.end_dim))
    return lambda params, x: x.flatten(start, end)


def _pool(layer: nn.Module) -> Layer:
    def forward(params: Params, x: Tensor) -> Tensor:
        out: Tensor = layer(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    return forward


def _elementwise(layer: nn.Module) -> Layer:
    return lambda params, x: layer(x)


def _unknown(layer: nn.Module, has_support: bool) -> Layer:
    # one task after another: exactly what the loop computes, whatever the layer does with rows;
    # vmap inside plain autograd has second derivatives that are wrong, silently
    def forward(params: Params, x: Tensor) -> Tensor:
        n = _n_support() if has_support else 0
        sets = [x[:, :n], x[:, n:]] if n else [x]
        outputs = [torch.stack([layer(rows.contiguous()) for rows in part]) for part in sets]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    return forward


def _drop_support(params: Params, x: Tensor) -> Tensor:
    # with the channels last, so that the gradient lies in memory that way too
    return x.movedim(2, -1)[:, _n_support() :].movedim(-1, 2) if _n_support() else x


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is known, or has neither parameters nor buffers nor layers inside."""
    if type(layer) is nn.Conv2d:
        return (
            layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
    if type(layer) in (nn.Linear, *NORMS):
        return True
    if type(layer) is nn.Flatten:
        return layer.start_dim != 0
    if type(layer) in (nn.MaxPool2d, nn.AdaptiveMaxPool2d):
        return not layer.return_indices
    return not list(layer.parameters()) and not list(layer.buffers())


def is_conv_net(module: nn.Module) -> bool:
    """Whether a module is a sequence with 2-D convolutions that `conv_forward` can run.

    Hooks, parametrizations and tied weights are for the caller to exclude.
    """
    if type(module) is not nn.Sequential:
        return False
    containers = [m for m in module.modules() if next(m.children(), None) is not None]
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    return (
        all(type(m) is nn.Sequential for m in containers)
        and any(type(m) is nn.Conv2d for m in leaves)
        and all(_is_plain(m) for m in leaves)
    )


def conv_forward(
    module: nn.Module, elementwise: tuple[type[nn.Module], ...]
) -> Callable[[Params, Tensor], Tensor]:
    """Forward pass of a net that `is_conv_net` accepts, for parameters with a leading task axis.

    Parameters
    ----------
    module : Sequential
        Its batch norms use the statistics of the rows, or of those that `support_first` names,
        unless the parameters hold ``running_mean`` and ``running_var`` of the layer, each
        (n_tasks, n_channels).
    elementwise : tuple of types
        Layers to apply to all tasks at once.

    Returns
    -------
    forward : callable (params, x) -> output
    """
    named = [
        (f"{name}.", m)
        for name, m in module.named_modules(remove_duplicate=False)
        if next(m.children(), None) is None and type(m) is not nn.Sequential
    ]
    types = [type(m) for _, m in named]
    last_norm = max((k for k, kind in enumerate(types) if kind in NORMS), default=-1)
    layers: list[Layer] = []
    for k, (name, m) in enumerate(named):
        before = types[k - 1] if k else None
        follower, after = named[k + 1] if k + 1 < len(named) else ("", None)
        if type(m) is nn.Conv2d:
            layers.append(_conv(name, m, follower if type(after) is nn.BatchNorm2d else None))
        elif type(m) in NORMS:
            relu = type(after) is nn.ReLU
            taker = types[k + 1 + relu] if k + 1 + relu < len(types) else None
            alone = before is nn.Conv2d and taker in (nn.Conv2d, nn.MaxPool2d)
            layers.append(_batch_norm(name, m, relu, alone))
            if k == last_norm:
                layers.append(_drop_support)
        elif type(m) is nn.ReLU and before in NORMS:
            pass  # done by the norm
        elif type(m) is nn.Linear:
            layers.append(_linear(name, m.bias is not None))
        elif type(m) is nn.Flatten:
            layers.append(_flatten(m))
        elif type(m) in ROW_WISE_POOLS:
            layers.append(_pool(m))
        elif type(m) in elementwise:
            layers.append(_elementwise(m))
        else:
            layers.append(_unknown(m, has_support=k < last_norm))

    return compose(layers)


def compose(layers: Sequence[Layer]) -> Layer:
    """Forward pass of layers one after the other."""

    def forward(params: Params, x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(params, x)
        return x

    return forward


def spread(params: Params, n_tasks: int) -> Params:
    """Give parameters that the tasks share a task axis, without copies."""
    return {
        name: (_channels_last(p) if p.ndim == 4 else p).expand(n_tasks, *p.shape)
        for name, p in params.items()
    }


def tasks_at_a_time(module: nn.Module, X: Tensor, n_more: int = 0) -> int:
    """Return how many tasks to run together.

    X is (n_tasks, n_rows, *features); each task has `n_more` rows besides.
    """
    first = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    positions = math.prod(X.shape[-2:]) / math.prod(first.stride)
    widest = max(positions * first.out_channels, math.prod(X.shape[2:]))
    limit = ACTIVATION_BYTES if X.device.type == "cpu" else DEVICE_BYTES
    return max(1, int(limit / (X.element_size() * (X.shape[1] + n_more) * widest)))


def keep_memory() -> None:
    """Have the allocator keep the memory of freed activations for the next ones."""
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


# -- the query set ---------------------------------------------------------------------------------


class _Known(torch.autograd.Function):
    """A value whose gradients have been computed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        if scale.device.type == "cpu" and scale == 1.0:  # saves a copy of every gradient
            return None, None, *ctx.grads
        return None, None, *(scale * g for g in ctx.grads)


def _empty_like(p: Tensor) -> Tensor:
    """Memory of its own for each task, laid out as gradients are."""
    if p.ndim != 5:
        return p.new_empty(p.shape)
    return p.movedim(2, -1).new_empty(p.movedim(2, -1).shape).movedim(-1, 2)


def gradient_now(
    loss: Callable[[Params, slice], tuple[Tensor, Any]], params: Params, n_tasks: int, step: int
) -> tuple[Tensor, list[Any]]:
    """Sum of a loss over tasks that takes its gradients along, a few tasks at a time.

    The activations of some tasks are gone before those of the next are computed. The gradients
    are exact to first order and not differentiable again.

    Parameters
    ----------
    loss : callable (params, tasks) -> (loss, aux)
        Sum of the losses of these tasks with their parameters.
    params : dict of str to Tensor of shape (n_tasks, ...)
    n_tasks, step : int

    Returns
    -------
    loss : Tensor
    aux : list of what `loss` returned beside
    """
    total, auxiliary = None, []
    names = [name for name, p in params.items() if p.requires_grad]
    grads: list[Tensor] = []
    if step < n_tasks:
        # pieces joined later would be there twice, and `cat` would lay them out anew
        grads = [_empty_like(params[name]) for name in names]
    for start in range(0, n_tasks, step):
        tasks = slice(start, start + step)
        own = {name: p.detach()[tasks] for name, p in params.items()}
        for name in names:
            own[name].requires_grad_()
        with torch.enable_grad(), _once():
            value, aux = loss(own, tasks)
        with _only_sums():
            part = torch.autograd.grad(
                value, [own[n] for n in names], allow_unused=True, materialize_grads=True
            )
        if grads:
            for g, piece in zip(grads, part, strict=True):
                g[tasks] = piece
        else:
            grads = list(part)
        total = value.detach() if total is None else total + value.detach()
        auxiliary.append(aux)
    assert total is not None
    return _Known.apply(total, grads, *(params[n] for n in names)), auxiliary
