"""Which Gaussian heads compiled kernels train."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.rungs.base import warn_once
from sklearn_maml.learners.bodies import MLPBody
from sklearn_maml.learners.gaussian import BEYOND, SPREAD, ClassHead, GaussianHead
from sklearn_maml.learners.laplace import LaplaceHead
from sklearn_maml.learners.likelihoods import (
    Counts,
    HeavyTails,
    HyperbolicTails,
    Labels,
    Positive,
    TwoClasses,
)
from sklearn_maml.learners.start import NOISE_FLOOR
from sklearn_maml.native import (
    MAX_LAYERS,
    NativeUnavailableError,
    activation_code,
    instruction_set,
    instruction_sets,
    said_without,
)
from sklearn_maml.native.head import HeadKernel, Layout
from sklearn_maml.native.posterior import PosteriorKernel
from sklearn_maml.threads import n_threads_asked

# typical number of rows that a row meets in the Gram matrix of its task
ROWS_OF_TASK = 60
# their numbers in likelihoods.h
LIKELIHOODS: dict[type, int] = {
    Labels: 1,
    TwoClasses: 1,
    Counts: 2,
    Positive: 3,
    HeavyTails: 4,
    HyperbolicTails: 4,
}


def head_kernel(
    head: GaussianHead, n_ways: int, dtype: torch.dtype = torch.float32
) -> HeadKernel | None:
    """Kernel for a head; None for heads that torch has to train.

    These have modules of users for features, likelihoods of users, or parameters on an
    accelerator. Where there are no kernels, one warning says so.
    """
    likelihood, layout = head.likelihood, _layout(head, n_ways)
    if layout is None:
        return None
    try:
        instruction_set()
    except NativeUnavailableError as error:
        warn_once(said_without(error))
        return None
    two_classes = isinstance(likelihood, TwoClasses)
    kernel = _TwoClassKernel if two_classes else HeadKernel
    made = kernel(layout, n_threads=n_threads_asked(), dtype=dtype)
    if isinstance(made, _TwoClassKernel):
        made.spread = likelihood.spread
    return made


def posterior_kernel(head: GaussianHead, params: dict[str, Tensor]) -> PosteriorKernel | None:
    """Kernel for adapting and predicting with these parameters; None: torch has to."""
    layout = _layout(head, head.n_outputs) if instruction_sets() else None
    return None if layout is None else PosteriorKernel(layout, params)


def _layout(head: GaussianHead, n_ways: int) -> Layout | None:
    """Describe a head to the kernels; None if they are not for it."""
    likelihood = head.likelihood
    newton = type(head) is LaplaceHead and type(likelihood) in LIKELIHOODS
    body: Any = head.body
    activation: Any = getattr(body, "activation", None)
    covered = (
        (type(head) in (GaussianHead, ClassHead) or newton)
        and type(body) is MLPBody
        and 0 < body.n_layers <= MAX_LAYERS
        and (type(activation) is nn.Identity or activation_code(activation) is not None)
        and (head.same_classes or n_ways == head.n_outputs)
        and head.factor.device.type == "cpu"
    )
    if not covered:
        return None
    n_linear = head.factor.shape[-1]
    spread = 1.0
    if head.same_classes and len(head.center):
        spread = SPREAD / math.sqrt(max(n_linear - 1, 1))
    return Layout(
        {name: tuple(p.shape) for name, p in head.named_parameters()},
        activation,
        head.center,
        head.scale,
        n_outputs=head.n_latent if newton else n_ways,
        classes=isinstance(head, ClassHead),
        same_classes=head.same_classes,
        spread=spread,
        beyond=BEYOND,
        floor=NOISE_FLOOR,
        likelihood=LIKELIHOODS[type(likelihood)] if newton else 0,
        unit=head.unit if isinstance(head, LaplaceHead) else None,
        delta=likelihood.loss.delta if isinstance(likelihood, HyperbolicTails) else 0.0,
    )


def work_of_head(n_members: int, sizes: Sequence[int], n_rows: int) -> float:
    """Multiply-adds of the kernel in an update, of episodes of so many rows in all.

    `sizes` are those of rows and of the layers of an `MLPBody`.
    """
    of_row = sum(n_in * n_out for n_in, n_out in itertools.pairwise(sizes))
    of_row += (sizes[0] + 1) ** 2 + ROWS_OF_TASK * (sizes[-1] + sizes[0])
    return 6.0 * n_members * n_rows * of_row  # of both passes, there and back


class _TwoClassKernel(HeadKernel):
    """That of two classes, whose head has the logit of the second."""

    spread: Callable[[Tensor], Tensor]

    def takes(self, batch: EpisodeBatch) -> bool:
        """See `HeadKernel`."""
        both = (batch.support, batch.query)
        return all(rows.y.dtype == torch.int64 for rows in both) and super().takes(
            self._labelled(batch)
        )

    def step(
        self, params: dict[str, Tensor], batch: EpisodeBatch, *args: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See `HeadKernel`."""
        grads, logit = super().step(params, self._labelled(batch), *args)
        return grads, self.spread(logit)

    def _labelled(self, batch: EpisodeBatch) -> EpisodeBatch:
        def labelled(rows: Rows) -> Rows:
            return dataclasses.replace(rows, y=(rows.y == 1).unsqueeze(-1).to(self.dtype))

        return dataclasses.replace(
            batch, support=labelled(batch.support), query=labelled(batch.query)
        )
