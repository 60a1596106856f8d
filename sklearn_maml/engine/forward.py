"""How the module is run as it is: one task at a time, or within `torch.func.vmap`."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.data.episodes import Rows
from sklearn_maml.engine.architecture import attends, is_recurrent
from sklearn_maml.engine.batch_norm import replace_batch_norms, run_on_query
from sklearn_maml.inner.problem import LossOfQuery
from sklearn_maml.theta import Params


class ModuleForward:
    """Runs a module with the parameters of one task.

    Parameters
    ----------
    module : Module
        Its batch norms are replaced.
    precision : str
    uses_support : bool
        Whether query rows are normalised with the statistics of the support set.
    head : str or None
        Name of the layer that a rule in closed form solves for.

    Attributes
    ----------
    attends : bool
        Whether it uses attention, whose fast kernels have no second derivatives.
    per_task : bool
        Whether vmap needs parameters of each task's own.
    own_norms : list of str
        Batch norms that take statistics from nowhere else.
    """

    batched = False

    def __init__(
        self, module: nn.Module, precision: str, *, uses_support: bool, head: str | None
    ) -> None:
        self.module, self.own_norms = replace_batch_norms(module)
        self.precision = precision
        self.uses_support = uses_support
        self.head = head
        self.attends = attends(module)
        self.per_task = is_recurrent(module)

    def __call__(self, params: Params, X: Tensor) -> Tensor:
        """See `Forward`."""
        with self._second_derivatives():
            return self.run(self.module, params, X)

    def on_query(self, params: Params, support_X: Tensor, query_X: Tensor) -> Tensor:
        """See `Forward`."""
        if not self.uses_support:
            return self(params, query_X)
        return run_on_query(lambda x: self(params, x), self.module, support_X, query_X)

    def features(self, params: Params, X: Tensor) -> Tensor:
        """See `Forward`."""
        assert self.head is not None
        seen: list[Tensor] = []
        handle = self.module.get_submodule(self.head).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            self(params, X)
        finally:
            handle.remove()
        return seen[0]

    def spread(self, params: Params) -> Params:
        """See `Forward`: there is no task axis."""
        return params

    def over_tasks(
        self, loss: LossOfQuery, params: Params, support: Rows, query: Rows
    ) -> tuple[Tensor, Any]:
        """See `Forward`."""
        return loss(self, params, support, query)

    def for_vmap(self, params: Params, n_tasks: int) -> tuple[Params, int | None]:
        """Parameters as vmap needs them and their task axis; None where tasks share them."""
        if not self.per_task:
            return params, None
        return {name: p.expand(n_tasks, *p.shape) for name, p in params.items()}, 0

    def run(self, module: nn.Module, params: Params, X: Tensor) -> Tensor:
        """Run a module of this one's precision."""
        forward = rounded(lambda p, x: functional_call(module, p, (x,)), self.precision)
        return forward(params, X)

    def _second_derivatives(self) -> Any:
        """Context in which layers run on those of their kernels that have second derivatives."""
        if self.per_task and next(self.module.parameters()).device.type != "cpu":
            return _without_cudnn(self.attends)
        return sdpa_kernel(SDPBackend.MATH) if self.attends else contextlib.nullcontext()


def for_prediction(module: nn.Module, takes_statistics: bool) -> nn.Module:
    """Copy of the module, with its parameters shared, that takes batch statistics as buffers.

    If it takes none, it uses those of the rows. A copy for each call, because `functional_call` is
    not safe on one that threads share.
    """
    parameters = list(module.parameters())
    module = copy.deepcopy(module, {id(p): p for p in parameters})
    for m in module.modules():
        if takes_statistics and isinstance(m, _BatchNorm):
            m.track_running_stats = True
            m.running_mean = parameters[0].new_zeros(m.num_features)
            m.running_var = parameters[0].new_ones(m.num_features)
    return module.eval()


def rounded(forward: Callable[..., Tensor], precision: str) -> Callable[..., Tensor]:
    """Forward pass with its matrix products in bfloat16, if that is the precision."""
    if precision != "bf16":
        return forward

    def run(params: Params, x: Tensor, *how: Any) -> Tensor:
        # no cache of rounded parameters: it would outlive the transforms of torch.func
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return forward(params, x, *how).to(x.dtype)

    return run


# what brings back the settings before each context that has begun, in any thread
_bring_back: list[list[Callable[[], Any]]] = []
_precision_lock = threading.Lock()


def _kept_precision(products: bool) -> list[Callable[[], Any]]:
    """Return calls that set the precision of cuDNN's layers, and of products, to that of now."""
    cudnn: Any = torch.backends.cudnn
    try:
        kept: list[Callable[[], Any]] = [
            functools.partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        ]
    except RuntimeError:  # somebody has set convolutions and recurrent layers, each by itself
        kept = [
            functools.partial(setattr, kind, "fp32_precision", kind.fp32_precision)
            for kind in (cudnn.conv, cudnn.rnn)
        ]
    if products:
        now = torch.get_float32_matmul_precision()
        kept.append(functools.partial(torch.set_float32_matmul_precision, now))
    return kept


@contextlib.contextmanager
def _without_cudnn(attends: bool) -> Iterator[None]:
    """Run recurrent layers, and attention beside them, on kernels of torch's own.

    cuDNN's have no derivative in evaluation mode, and no second one at all. The setting is one for
    the process.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH) if attends else contextlib.nullcontext():
            yield
    finally:
        torch.backends.cudnn.enabled = before


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in matrix products and cuDNN's layers, or forbid it in the latter.

    torch's own default allows it in cuDNN's layers alone. It holds for the process; where threads
    overlap, the first setting comes back with the last of them.
    """
    with _precision_lock:
        _bring_back.append(_kept_precision(products=allowed))
        torch.backends.cudnn.allow_tf32 = allowed
        if allowed:
            torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        with _precision_lock:
            for call in _bring_back.pop():
                call()
