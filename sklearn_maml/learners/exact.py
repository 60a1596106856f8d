"""Functions of the parameters of fitted heads, in float64: compiled ones where there are any."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.learners.compiled import posterior_kernel
from sklearn_maml.learners.gaussian import (
    NO_HALF,
    ClassFunctions,
    ClassHead,
    GaussianHead,
    HeadFunctions,
)
from sklearn_maml.learners.laplace import LaplaceFunctions, LaplaceHead, LaplacePosterior
from sklearn_maml.learners.posteriors import Posterior, Scale
from sklearn_maml.native.posterior import LANES, PosteriorKernel, packed, unpacked
from sklearn_maml.threads import n_threads_asked

Params = dict[str, Tensor]

# of each head its parameters in float64 and their kernel, and the bytes that these were made of:
# to make them takes as long as to adapt to ten rows
_MADE: WeakKeyDictionary[GaussianHead, tuple[bytes, Params, PosteriorKernel | None]] = (
    WeakKeyDictionary()
)


def exact(head: GaussianHead) -> HeadFunctions:
    """Functions of the parameters as they are now, in float64.

    They are safe in any thread. Modules of users are not, so that every call has a copy of its own;
    without these, functions that have been made may be kept.
    """
    own = {name: p.detach() for name, p in head.named_parameters()}
    if head.body.of_user or head.factor.device.type != "cpu":
        body = head.body.private()
        kept = {n for n in own if body.of_user and n.startswith("body.")}
        return head.functions({n: p if n in kept else p.double() for n, p in own.items()}, body)
    content = b"".join(p.numpy().tobytes() for p in own.values())
    before, params, kernel = _MADE.get(head, (None, {}, None))
    if before != content:
        # not those of the head, which may be trained further
        params = {name: p.to(torch.float64, copy=True) for name, p in own.items()}
        kernel = posterior_kernel(head, params)
        _MADE[head] = content, params, kernel
    if kernel is None:
        return head.functions(params)
    kind = next(made for of, made in KINDS.items() if isinstance(head, of))
    return kind(head, params, head.body, kernel)


class Compiled(HeadFunctions):
    """Functions of a head by compiled kernels, for the sizes that these are for.

    Parameters
    ----------
    head, params, body
        See `HeadFunctions`.
    kernel : PosteriorKernel
    """

    def __init__(
        self, head: GaussianHead, params: Params, body: Any, kernel: PosteriorKernel
    ) -> None:
        super().__init__(head, params, body)
        self.kernel = kernel

    def outputs(self, X: Tensor, shift: Tensor, place: Tensor) -> Tensor:
        """See `HeadFunctions`."""
        if not self.kernel.takes(X):
            return super().outputs(X, shift, place)
        return self.kernel.query(X, place, shift, None, None, n_threads_asked())[0]


class CompiledNumbers(Compiled):
    """Those of a Gaussian head."""

    kernel_batches = 4

    def condition(
        self, X: Tensor, y: Tensor, root: Tensor | None = None, *, doubt: bool = True
    ) -> Posterior:
        """See `HeadFunctions`."""
        if root is None or root.ndim > 2 or not self.kernel.takes(X):
            return super().condition(X, y, root, doubt=doubt)
        return Posterior(**self.kernel.condition(X, y, root, doubt, n_threads_asked()))

    def room(self, n_rows: np.ndarray) -> int:
        """See `HeadFunctions`."""
        return super().room(-(-n_rows // LANES) * LANES)

    def kept(self, half: Tensor) -> Tensor:
        """See `HeadFunctions`."""
        return packed(half)

    def half_of(self, given: Posterior) -> Tensor | None:
        """See `HeadFunctions`."""
        return given.half if given.half is None else unpacked(given.half, self.head.n_columns)

    def query_rows(
        self, X: Tensor, places: np.ndarray, given: Posterior, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `HeadFunctions`."""
        if not self.kernel.takes(X):
            return super().query_rows(X, places, given, scale)
        at, parts = torch.from_numpy(places), (given.shift, given.half, given.of_rows)
        mean, variance = self.kernel.query(X, at, *parts, n_threads_asked())
        assert variance is not None, NO_HALF
        if scale is not None:
            variance = variance * self.spread(given, scale)[:, at]
        a = self.amplitude()
        return mean, a**2 * variance if isinstance(a, Tensor) else variance.expand_as(mean)


class CompiledClasses(CompiledNumbers, ClassFunctions):
    """Those of a head of classes."""


class CompiledNewton(Compiled, LaplaceFunctions):
    """Those of a head whose likelihood takes Newton steps."""

    def condition(  # type: ignore[override]
        self, X: Tensor, y: Tensor, root: Tensor | None = None, *, doubt: bool = True
    ) -> LaplacePosterior:
        """See `HeadFunctions`."""
        few = X.shape[1] <= self.head.n_columns
        if root is None or root.ndim > 2 or not (few and self.kernel.takes(X)):
            return LaplaceFunctions.condition(self, X, y, root, doubt=doubt)
        y = self.likelihood.seen(y).double()
        return LaplacePosterior(
            **self.kernel.condition_at_mode(X, y, root.double(), n_threads_asked())
        )


KINDS: dict[type[GaussianHead], type[Compiled]] = {
    LaplaceHead: CompiledNewton,
    ClassHead: CompiledClasses,
    GaussianHead: CompiledNumbers,
}
