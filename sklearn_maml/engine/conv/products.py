"""The three products of a convolution over a batch of tasks, each task with weights of its own.

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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# stride and padding
Geometry = tuple[tuple[int, int], tuple[int, int]]

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


class Summation:
    """How products are summed.

    Parameters
    ----------
    rounds : bool, default=False
        Whether factors of float32 are rounded to bfloat16. Sums stay in float32 or longer; results
        are rounded too, and returned in the type of the factors.

    Attributes
    ----------
    only : bool
        Whether gradients of weights that the tasks share are wanted summed over the tasks only.
    """

    only = False

    def __init__(self, rounds: bool = False) -> None:
        self.rounds = rounds

    @contextlib.contextmanager
    def promised(self) -> Iterator[None]:
        """Promise that they are summed anyway."""
        before, self.only = self.only, True
        try:
            yield
        finally:
            self.only = before

    def rounded(self, *factors: Tensor) -> list[Tensor]:
        """Return factors as they are multiplied; what the tasks share is rounded once."""
        if not self.rounds:
            return [*factors]
        return [
            f if f.dtype != torch.float32
            else f[:1].bfloat16().expand(f.shape) if is_shared(f)
            else f.bfloat16()
            for f in factors
        ]  # fmt: skip


def channels_last(x: Tensor) -> Tensor:
    """Lay the last three axes, (channels, height, width), out with the channels last."""
    if x.shape[-3] == 1:  # a stride that says so too, by which torch chooses the layout of results
        return x.squeeze(-3).contiguous().unsqueeze(-1).movedim(-1, -3)
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def is_shared(weight: Tensor) -> bool:
    """Whether all tasks have the same weights, in the same memory."""
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
        y = torch.conv2d(channels_last(part), channels_last(own), None, *g)
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
    shared = is_shared(weight)
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
    return torch.ops.aten.convolution_backward(
        gy, x, weight, None, *g, (1, 1), False, (0, 0), 1, mask
    )


def _input_gradient(gy: Tensor, weight: Tensor, like: Tensor, g: Geometry) -> Tensor:
    """Transpose of `_convolve` with respect to inputs like `like`."""
    n_tasks, n_rows = like.shape[:2]
    if _gathers(weight, tuple(gy.shape), once=is_shared(weight), few=FEW_CHANNELS):
        kernel, size = (weight.shape[3], weight.shape[4]), (gy.shape[3], gy.shape[4])
        return _scatter(_rows_matrix(gy) @ _matrix(weight), tuple(like.shape), kernel, size, g)
    mask = [True, False, False]
    if is_shared(weight):
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
        ctx: Any, x: Tensor, weight: Tensor, g: Geometry, sums: Summation, in_blocks: bool = False
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = g, sums
        a, b = sums.rounded(x, weight)
        return _convolve(a, b, g, in_blocks).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gy = channels_last(gy)
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = _WeightGradient.apply(gy, x, weight.detach(), *ctx.how)
        if ctx.needs_input_grad[0]:  # last: it is needed next, and warm then
            gx = _InputGradient.apply(gy, weight, x.detach(), *ctx.how)
        return gx, gw, None, None, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, weight: Tensor, like: Tensor, g: Geometry, sums: Summation
    ) -> Tensor:
        ctx.save_for_backward(gy, weight)
        ctx.how = g, sums
        a, b, c = sums.rounded(gy, weight, like)
        return _input_gradient(a, b, c, g).to(gy.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        gy, weight = ctx.saved_tensors
        v = channels_last(v)
        ggy = gw = None
        if ctx.needs_input_grad[0]:
            ggy = _Convolution.apply(v, weight, *ctx.how)
        if ctx.needs_input_grad[1]:
            gw = _WeightGradient.apply(gy, v, weight.detach(), *ctx.how)
        return ggy, gw, None, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, like: Tensor, g: Geometry, sums: Summation
    ) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.how = g, sums
        # a sum spread over the tasks: whoever adds the tasks' gradients up gets the same
        only_sum = sums.only and is_shared(like)
        a, b, c = sums.rounded(gy, x, like)
        return _weight_gradient(a, b, c, g, only_sum).to(gy.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        gy, x = ctx.saved_tensors
        v = channels_last(v)
        ggy = gx = None
        if ctx.needs_input_grad[0]:
            ggy = _Convolution.apply(x, v, *ctx.how)
        if ctx.needs_input_grad[1]:
            gx = _InputGradient.apply(gy, v, x.detach(), *ctx.how)
        return ggy, gx, None, None, None


def convolve(
    x: Tensor, weight: Tensor, g: Geometry, sums: Summation, in_blocks: bool = False
) -> Tensor:
    """Convolve each task's rows with its weights.

    Parameters
    ----------
    x : Tensor of shape (n_tasks, n_rows, channels, height, width)
        With the channels last in memory, as `channels_last` lays it out.
    weight : Tensor of shape (n_tasks, out_channels, channels, height, width)
    g : stride and padding
    sums : Summation
    in_blocks : bool
        Whether products are added up some channels at a time, for smaller rounding errors.

    Returns
    -------
    y : Tensor of shape (n_tasks, n_rows, out_channels, height, width)
        Differentiable any number of times.
    """
    return _Convolution.apply(x, weight, g, sums, in_blocks)
