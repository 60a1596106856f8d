"""Batch norm whose statistics come from the support set, for modules of any kind.

A module is run twice: on the support set, where each batch-norm layer notes the statistics of its
input, then on the query rows, which it normalises with them. All of it is differentiable, through
the statistics too, any number of times and inside `torch.func` transforms. (`conv` has its own.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.data.episodes import Rows


class TaskBatchNorm(_BatchNorm):
    """Stands for a batch-norm layer; `run_on_query` chooses where its statistics come from.

    It takes over all that the layer has, and is the layer outside of `run_on_query`.
    """

    kind: Any
    # of the support set: the mean and the factor to scale by; whether they are noted or used
    noted: tuple[Tensor, Tensor] | None
    notes: bool

    @classmethod
    def of(cls, layer: _BatchNorm) -> TaskBatchNorm:
        """Take the place of a layer."""
        own = cls.__new__(cls)
        own.__dict__.update(layer.__dict__, kind=type(layer), noted=None, notes=False)
        return own

    def _check_input_dim(self, x: Tensor) -> None:
        self.kind._check_input_dim(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the statistics of the rows, or with those noted on the support set."""
        if not self.notes and self.noted is None:
            return super().forward(x)
        self._check_input_dim(x)
        # statistics of rounded numbers are not rounded themselves, as in torch's own
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.notes:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            if x.numel() == x.shape[1]:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{tuple(x.shape)}"
                )
            variance, mean = torch.var_mean(wide, dim=axes, correction=0)
            self.noted = mean, (variance + self.eps).rsqrt()
        assert self.noted is not None
        mean, scale = self.noted
        if self.weight is not None:
            scale = scale * self.weight
        shape = (-1, *[1] * (x.ndim - 2))
        out = (wide - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(x.dtype)


def run_on_query(
    forward: Callable[[Tensor], Tensor], module: nn.Module, support_X: Tensor, query_X: Tensor
) -> Tensor:
    """Run query rows through a module, normalised with the statistics of the support set.

    `replace_batch_norms` has been applied to the module, and `forward` runs it.
    """
    norms = [m for m in module.modules() if isinstance(m, TaskBatchNorm)]
    before = [m.noted for m in norms]
    try:
        for m in norms:
            m.notes = True
        forward(support_X)
        for m in norms:
            m.notes = False
        return forward(query_X)
    finally:
        for m, noted in zip(norms, before, strict=True):
            m.notes, m.noted = False, noted


def replace_batch_norms(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Put a `TaskBatchNorm` in the place of each batch-norm layer, in place.

    Return the module, another one if it is such a layer itself, and the names of layers that stay
    as they are, because they compute something of their own.
    """
    left: list[str] = []
    new: dict[nn.Module, TaskBatchNorm] = {}
    for name, m in module.named_modules():
        if not isinstance(m, _BatchNorm):
            continue
        plain = type(m).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if not plain or "forward" in vars(m) or hasattr(m, "parametrizations"):
            left.append(name)
        else:
            new[m] = TaskBatchNorm.of(m)
    for m in list(module.modules()):
        for name, child in m._modules.items():
            if child in new:
                m._modules[name] = new[child]
    return new.get(module, module), left


def support_statistics(
    module: nn.Module, norms: Collection[str], adapted: Any, support: Rows
) -> dict[str, Tensor]:
    """Mean and variance that each batch-norm layer sees on each support set."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
            # biased, as batch norm itself normalises
            variance, mean = torch.var_mean(inputs[0], dim=axes, correction=0)
            seen[f"{name}.running_mean"], seen[f"{name}.running_var"] = mean, variance

        return hook

    handles = [
        m.register_forward_pre_hook(record(name))
        for name, m in module.named_modules()
        if name in norms
    ]
    collected: list[dict[str, Tensor]] = []
    try:
        with torch.no_grad():
            for j in range(len(support)):
                functional_call(module, adapted.task(j)[0], (support.task(j).X,))
                collected.append(dict(seen))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack([c[name] for c in collected]) for name in collected[0]}


@contextlib.contextmanager
def explaining_one_value(**sets: Rows) -> Iterator[None]:
    """Say which of these sets is too small for batch norm, where one is."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        shortest = {
            name: rows.X.shape[1] if rows.lengths is None else int(rows.lengths.min())
            for name, rows in sets.items()
        }
        name = min(shortest, key=shortest.__getitem__)
        weight = sets[name].weight
        none = weight is not None and bool((weight.sum(1) == 0).any())
        instead = " set engine__batch_norm='inductive'," if name == "query" else ""
        raise ValueError(
            f"Batch norm needs at least 2 values of each channel, and a {name} set has "
            f"{'none' if none else 'one row'}. "
            f"Give more {name} rows,{instead} or use LayerNorm or GroupNorm in the module."
        ) from error
