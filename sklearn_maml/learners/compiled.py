"""Which Gaussian heads compiled kernels train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.gaussian import BEYOND, SPREAD, ClassHead, GaussianHead
from sklearn_maml.learners.start import NOISE_FLOOR
from sklearn_maml.native import MAX_LAYERS, activation_code, instruction_sets
from sklearn_maml.native.head import HeadKernel
from sklearn_maml.threads import n_threads_asked

__all__ = ["head_kernel"]


def head_kernel(
    head: GaussianHead, n_ways: int, dtype: torch.dtype = torch.float32
) -> HeadKernel | None:
    """Kernel for a head; None for heads that torch has to train.

    These have modules of users for features, losses without a closed form, or parameters on an
    accelerator.
    """
    body: Any = head.body
    activation: Any = getattr(body, "activation", None)
    covered = (
        type(head) in (GaussianHead, ClassHead)
        and type(body) is MLPBody
        and 0 < body.n_layers <= MAX_LAYERS
        and (type(activation) is nn.Identity or activation_code(activation) is not None)
        and (head.same_classes or n_ways == head.n_outputs)
        and head.factor.device.type == "cpu"
        and bool(instruction_sets())
    )
    if not covered:
        return None
    n_linear = head.factor.shape[-1]
    spread = 1.0
    if head.same_classes and len(head.center):
        spread = SPREAD / math.sqrt(max(n_linear - 1, 1))
    return HeadKernel(
        {name: tuple(p.shape) for name, p in head.named_parameters()},
        activation,
        head.center,
        head.scale,
        n_outputs=n_ways,
        classes=isinstance(head, ClassHead),
        same_classes=head.same_classes,
        spread=spread,
        beyond=BEYOND,
        floor=NOISE_FLOOR,
        n_threads=n_threads_asked(),
        dtype=dtype,
    )
