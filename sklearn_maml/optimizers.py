"""Steps of torch's Adam on small networks, without what torch does around its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

__all__ = ["can_fuse", "has_fused_kernel", "step_fused"]

_KERNELS = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}
# settings with which torch's own code has to run
_OTHER_CODE = ("foreach", "capturable", "differentiable", "decoupled_weight_decay")


def can_fuse(
    optimizer: Any, settings: dict[str, Any], params: Sequence[nn.Parameter], device: torch.device
) -> bool:
    """Whether an optimiser class that is not told otherwise may run with ``fused=True``."""
    return (
        optimizer in _KERNELS
        and not {"fused", *_OTHER_CODE} & settings.keys()
        and device.type in ("cpu", "cuda")
        and all(p.is_floating_point() for p in params)
    )


def has_fused_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_fused` can stand for the `step` of an optimiser."""
    groups = optimizer.param_groups
    return (
        type(optimizer) in _KERNELS
        and all(group["fused"] and not any(group.get(k) for k in _OTHER_CODE) for group in groups)
        and {p.device.type for group in groups for p in group["params"]} == {"cpu"}
        and len({p.dtype for group in groups for p in group["params"]}) == 1
    )


def step_fused(optimizer: Any) -> None:
    """Do what ``optimizer.step()`` does, by the same kernel and on the same state.

    torch's record for its profiler and its grouping of the parameters take several times as long
    as the kernel does for a small network.
    """
    if (
        "step" in vars(optimizer)  # a scheduler of rates counts the calls
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        optimizer.step()
        return
    kernel: Any = _KERNELS[type(optimizer)]
    state = optimizer.state
    moving = [[p for p in g["params"] if p.grad is not None] for g in optimizer.param_groups]
    if not all(state[p] for params in moving for p in params):
        optimizer.step()  # makes the state
        return
    with torch.no_grad():
        for group, params in zip(optimizer.param_groups, moving, strict=True):
            if not params:
                continue
            states = [state[p] for p in params]
            steps = [s["step"] for s in states]
            beta1, beta2 = group["betas"]
            torch._foreach_add_(steps, 1)
            kernel(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
            )
