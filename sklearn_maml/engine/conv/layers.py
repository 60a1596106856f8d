"""Small convolutional networks over a batch of tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_maml.engine.conv.norms import normalise
from sklearn_maml.engine.conv.products import Summation, channels_last, convolve, is_shared
from sklearn_maml.inner import Autograd
from sklearn_maml.theta import Params

Layer = Callable[[Params, Tensor, "Pass"], Tensor]

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


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a net is run."""

    sums: Summation = dataclasses.field(default_factory=Summation)
    # whether what is computed is differentiated once at most, and the backward pass runs once
    once: bool = False
    # Rows of each task, the first ones, that are its support set: batch norm takes the statistics
    # of those and normalises all rows with them, and the net returns the outputs of the others.
    # 0: all rows are of one set.
    n_support: int = 0


class ConvAutograd(Autograd):
    """Plain reverse mode that asks for no gradient of each task where the tasks share weights."""

    def __init__(self, sums: Summation) -> None:
        self.sums = sums

    def _backward(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        with self.sums.promised():
            return super()._backward(loss, leaves)


def _per_channel(p: Tensor, like: Tensor) -> Tensor:
    """View a parameter (n_tasks, channels) so that it broadcasts over rows and positions."""
    return p.reshape(p.shape[0], 1, p.shape[1], *[1] * (like.ndim - 3))


def _conv(name: str, layer: nn.Conv2d, norm: str | None) -> Layer:
    """`norm` names the batch norm that follows at once, if any."""
    (sh, sw), padding = layer.stride, layer.padding
    assert not isinstance(padding, str)
    geometry = ((sh, sw), (padding[0], padding[1]))

    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
        weight = params[f"{name}weight"]
        if not is_shared(weight):  # what the tasks share is laid out by `spread`
            weight = channels_last(weight)
        # where a task is adapted each ReLU counts more, with the fewer rows and in every step
        in_blocks = torch.is_grad_enabled() and not how.once
        x = convolve(channels_last(x), weight, geometry, how.sums, in_blocks)
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

    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
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
            if how.n_support:
                n_own = n_own // x.shape[1] * how.n_support
            if n_own == 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{tuple(x.shape[1:])}"
                )
            rows = normalise(
                rows,
                weight,
                bias,
                layer.eps,
                relu=relu,
                n_own=n_own,
                in_place=alone and how.once,
            )
        return rows.view(shape).movedim(-1, 2)

    return forward


def linear_layer(name: str, has_bias: bool) -> Layer:
    """Forward pass of a linear layer; `name` comes before those of its parameters."""

    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
        rows = x.flatten(1, -2)
        weight = params[f"{name}weight"].transpose(1, 2)
        if has_bias:
            out = torch.baddbmm(params[f"{name}bias"].unsqueeze(1), rows, weight)
        else:
            out = torch.bmm(rows, weight)
        return out if x.ndim == 3 else out.unflatten(1, x.shape[1:-1])

    return forward


def _flatten(layer: nn.Flatten) -> Layer:
    # axes of a task's rows are one further on here
    start, end = (axis + 1 if axis >= 0 else axis for axis in (layer.start_dim, layer.end_dim))
    return lambda params, x, how: x.flatten(start, end)


def _pool(layer: nn.Module) -> Layer:
    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
        out: Tensor = layer(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    return forward


def elementwise_layer(layer: nn.Module) -> Layer:
    """Forward pass of a layer that looks at one number at a time."""
    return lambda params, x, how: layer(x)


def _unknown(layer: nn.Module, has_support: bool) -> Layer:
    # one task after another: exactly what the loop computes, whatever the layer does with rows;
    # vmap inside plain autograd has second derivatives that are wrong, silently
    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
        n = how.n_support if has_support else 0
        sets = [x[:, :n], x[:, n:]] if n else [x]
        outputs = [torch.stack([layer(rows.contiguous()) for rows in part]) for part in sets]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    return forward


def _drop_support(params: Params, x: Tensor, how: Pass) -> Tensor:
    # with the channels last, so that the gradient lies in memory that way too
    return x.movedim(2, -1)[:, how.n_support :].movedim(-1, 2) if how.n_support else x


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


def conv_forward(module: nn.Module, elementwise: tuple[type[nn.Module], ...]) -> Layer:
    """Forward pass of a net that `is_conv_net` accepts, for parameters with a leading task axis.

    Parameters
    ----------
    module : Sequential
        Its batch norms use the statistics of the rows, or of those that `Pass` names,
        unless the parameters hold ``running_mean`` and ``running_var`` of the layer, each
        (n_tasks, n_channels).
    elementwise : tuple of types
        Layers to apply to all tasks at once.

    Returns
    -------
    forward : callable (params, x, how) -> output
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
            layers.append(linear_layer(name, m.bias is not None))
        elif type(m) is nn.Flatten:
            layers.append(_flatten(m))
        elif type(m) in ROW_WISE_POOLS:
            layers.append(_pool(m))
        elif type(m) in elementwise:
            layers.append(elementwise_layer(m))
        else:
            layers.append(_unknown(m, has_support=k < last_norm))

    return compose(layers)


def compose(layers: Sequence[Layer]) -> Layer:
    """Forward pass of layers one after the other."""

    def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
        for layer in layers:
            x = layer(params, x, how)
        return x

    return forward


def spread(params: Params, n_tasks: int) -> Params:
    """Give parameters that the tasks share a task axis, without copies."""
    return {
        name: (channels_last(p) if p.ndim == 4 else p).expand(n_tasks, *p.shape)
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
    loss: Callable[[Params, slice], tuple[Tensor, Any]],
    params: Params,
    n_tasks: int,
    step: int,
    sums: Summation,
) -> tuple[Tensor, list[Any]]:
    """Sum of a loss over tasks that takes its gradients along, a few tasks at a time.

    The activations of some tasks are gone before those of the next are computed. The gradients
    are exact to first order and not differentiable again.

    Parameters
    ----------
    loss : callable (params, tasks) -> (loss, aux)
        Sum of the losses of these tasks with their parameters; differentiated once.
    params : dict of str to Tensor of shape (n_tasks, ...)
    n_tasks, step : int
    sums : Summation

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
        with torch.enable_grad():
            value, aux = loss(own, tasks)
        with sums.promised():
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
