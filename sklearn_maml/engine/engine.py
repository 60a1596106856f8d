"""The engine: runs the inner loop over a batch of tasks.

Its rungs give the same numbers, in float64 to rounding:

``native``
    Multilayer perceptrons on the CPU: compiled kernels with a hand-derived reverse sweep. Taken
    when there is more than a little to do.
``stacked``
    Sequences of linear, elementwise and layer-norm layers, and of 2-D convolutions (see `conv`):
    every task's parameters are stacked and a layer is one batched product. Plain autograd, no
    `vmap`.
``vmap``
    Any module `torch.func` can transform: ``vmap(grad(...))`` over tasks.
``loop``
    One task after another with plain autograd; runs every module.

A long fit climbs further: the ``vmap`` step is recorded once as a flat graph, and the
graph is run (see `traced`), after it has been found to give the numbers of the ``vmap`` step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.data.episodes import EpisodeBatch, Rows, put_back
from sklearn_maml.engine.batch_norm import replace_batch_norms, run_on_query
from sklearn_maml.engine.conv.layers import (
    ConvAutograd,
    Layer,
    Pass,
    compose,
    conv_forward,
    gradient_now,
    is_conv_net,
    keep_memory,
    spread,
    tasks_at_a_time,
)
from sklearn_maml.engine.conv.products import Sums
from sklearn_maml.engine.tracing.graphs import captures, module_key, settings_key
from sklearn_maml.engine.tracing.recording import Untraceable, first_line
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import EngineFallbackWarning, NonFiniteStepWarning
from sklearn_maml.inner import (
    Autograd,
    Differentiator,
    Functorch,
    InnerProblem,
    RecomputedSteps,
    adapt,
    mean_loss,
)
from sklearn_maml.meta_gradients import (
    FirstOrder,
    Implicit,
    MetaGradient,
    SecondOrder,
    prepares_positions,
)
from sklearn_maml.modules import ContextMLP, linear_head
from sklearn_maml.native import Kernel, Layout, NativeUnavailableError, describe
from sklearn_maml.targets.losses import cross_entropy_rows, squared_error_rows
from sklearn_maml.threads import several_threads, threads_for
from sklearn_maml.update_rules import SGD, UpdateRule, has_linear_rates

__all__ = [
    "Adapted",
    "Engine",
    "MetaStep",
    "cross_entropy_rows",
    "has_dropout",
    "is_row_wise",
    "rate_key",
    "restore_diverged",
    "squared_error_rows",
]

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]

# tasks adapted or predicted at a time: bounds memory and suits the caches
CHUNK = 128
# the same for the compiled kernels, which take one task after another anyway
NATIVE_CHUNK = 4096

# A fit of a multilayer perceptron climbs to the compiled kernels after so many updates and,
# roughly, seconds on the stacked rung. Adapting climbs for so much work in one call. The seconds
# are estimated from sizes and never measured, so that the same call takes the same rung, and gives
# the same bits, every time.
CLIMB_UPDATES, CLIMB_SECONDS = 64, 0.25
ADAPTING_SECONDS = 0.02

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LogSigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip
# layers whose output for a row depends on that row alone, so that padding rows are harmless
ROW_WISE = (
    *ELEMENTWISE, nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.GroupNorm, nn.Embedding,
    nn.InstanceNorm1d, nn.InstanceNorm2d,
)  # fmt: skip
RECURRENT = (nn.RNNBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


@dataclasses.dataclass
class MetaStep:
    """Outcome of a meta-step: query loss of each task, mean gradient, outputs on query rows.

    `flat` is the one tensor that the gradients are views of, if they are.
    """

    losses: Tensor
    grads: Params
    outputs: Tensor
    flat: Tensor | None = None


@dataclasses.dataclass
class Adapted:
    """Parameters adapted to each of n tasks.

    Attributes
    ----------
    params : dict of str to Tensor of shape (n_tasks, ...)
        The adapted parameters.
    shared : dict of str to Tensor
        Parameters that do not adapt.
    statistics : dict of str to Tensor of shape (n_tasks, n_channels)
        Batch-norm statistics of each support set.
    """

    params: Params
    shared: Params
    statistics: Buffers

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(next(iter(self.params.values())))

    def take(self, tasks: np.ndarray) -> Adapted:
        """Parameters of some of the tasks, in this order."""
        first, last = int(tasks[0]), int(tasks[-1])
        in_a_row = len(tasks) == last - first + 1 and (np.diff(tasks) == 1).all()
        index: slice | Tensor = slice(first, last + 1)
        if not in_a_row:
            index = torch.as_tensor(tasks, device=next(iter(self.params.values())).device)
        params, statistics = (
            {name: t[index] for name, t in part.items()} for part in (self.params, self.statistics)
        )
        return Adapted(params, self.shared, statistics)

    def task(self, j: int) -> tuple[Params, Buffers]:
        """All parameters, and the statistics, of one task."""
        own = {name: p[j] for name, p in self.params.items()}
        return {**self.shared, **own}, {name: s[j] for name, s in self.statistics.items()}


def _leaf_modules(module: nn.Module) -> Iterable[nn.Module]:
    return (m for m in module.modules() if next(m.children(), None) is None)


def _is_altered(module: nn.Module) -> bool:
    """Whether anything makes a layer do something else than its class does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(
        any(getattr(m, name) for name in hooks)
        or hasattr(m, "parametrizations")
        or "forward" in vars(m)
        for m in module.modules()
    )


def is_row_wise(module: nn.Module) -> bool:
    """Whether each row's output is known to depend on that row alone."""
    if _is_altered(module):
        return False
    # exact container types: a subclass may do anything in its forward
    containers = (m for m in module.modules() if next(m.children(), None) is not None)
    return all(type(m) in (nn.Sequential, ContextMLP) for m in containers) and all(
        type(m) in ROW_WISE and not getattr(m, "track_running_stats", False)
        for m in _leaf_modules(module)
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether the module has dropout layers."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())


def _is_stackable(module: nn.Module) -> bool:
    if type(module) is not nn.Sequential and type(module) is not nn.Linear:
        return False
    if _is_altered(module):
        return False
    if len({id(p) for p in module.parameters()}) < len(
        list(module.named_parameters(remove_duplicate=False))
    ):
        return False  # tied weights
    return is_conv_net(module) or all(
        type(m) in (nn.Linear, nn.Sequential, *ELEMENTWISE)
        or (type(m) is nn.LayerNorm and len(m.normalized_shape) == 1)
        for m in module.modules()
    )


def _stacked_forward(module: nn.Module) -> Layer:
    """Forward pass of a stackable module for parameters with a leading task axis."""
    if is_conv_net(module):
        return conv_forward(module, ELEMENTWISE)
    layers: list[Layer] = []

    def linear(name: str, has_bias: bool) -> Layer:
        def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
            weight = params[f"{name}weight"].transpose(-1, -2)
            if not has_bias:
                return torch.bmm(x, weight)
            return torch.baddbmm(params[f"{name}bias"].unsqueeze(-2), x, weight)

        return forward

    def layer_norm(name: str, layer: nn.LayerNorm) -> Layer:
        def forward(params: Params, x: Tensor, how: Pass) -> Tensor:
            x = functional.layer_norm(x, tuple(layer.normalized_shape), eps=layer.eps)
            if layer.elementwise_affine:
                x = x * params[f"{name}weight"].unsqueeze(-2)
                if layer.bias is not None:
                    x = x + params[f"{name}bias"].unsqueeze(-2)
            return x

        return forward

    def elementwise(layer: nn.Module) -> Layer:
        return lambda params, x, how: layer(x)

    # a layer without parameters may be used twice in a sequence
    for name, m in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if type(m) is nn.Linear:
            layers.append(linear(prefix, m.bias is not None))
        elif type(m) is nn.LayerNorm:
            layers.append(layer_norm(prefix, m))
        elif type(m) is not nn.Sequential:
            layers.append(elementwise(m))
    return compose(layers)


def private_copy(module: nn.Module) -> nn.Module:
    """Copy for the engine's own use, with batch norm on batch statistics.

    Batch-norm layers normalise with the statistics of the rows at hand, unless the engine gives
    them those of the support set. Running averages over tasks are not used. Layers do not work in
    place, where they would overwrite what derivatives need. Parameters are shared, not copied: they
    are always passed as dicts, and every adapted model holds such a copy.
    """
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for m in module.modules():
        if type(m) in ELEMENTWISE and hasattr(m, "inplace"):
            vars(m)["inplace"] = False
        if isinstance(m, _BatchNorm):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None
    return module


def _fit_outputs(output: Tensor, y: Tensor) -> Tensor:
    """Accept modules that return (n_rows,) for one output."""
    return output.unsqueeze(-1) if output.ndim == y.ndim - 1 and y.is_floating_point() else output


class Engine:
    """Meta-gradients, adaptation and prediction for batches of tasks.

    Parameters
    ----------
    module : Module
        Its structure is copied; parameters are always passed as dicts.
    row_loss : callable (output, y) -> losses of the rows
    rule : UpdateRule
    meta_gradient : MetaGradient
    adapted : sequence of str
        Names of the parameters that adapt.
    rung : {"auto", "loop", "vmap", "stacked", "traced", "native"}
        How tasks are batched. "auto" starts on the fastest that works at once, and climbs to
        "traced" or "native" where the updates to come repay it (see `expect`). "traced" and
        "native" are ready from the start.
    checkpoint_steps : bool
        Whether second-order meta-gradients compute the graph of each inner step anew.
    max_tasks_in_memory : int or None
        Largest number of tasks that `meta_step` and `evaluate` run at once; the compiled kernels
        run one at a time (and thread) anyway.
    precision : {"full", "tf32", "bf16"}
        Numbers of the layers' matrix products.
    batch_norm : {"inductive", "transductive"}
        Statistics that batch norm normalises query rows with, in meta-training and predictions:
        those of the task's support set, or those of its query rows.

    Attributes
    ----------
    tracer : Tracer
        What is traced, or why nothing is.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        row_loss: Callable[[Tensor, Tensor], Tensor],
        rule: UpdateRule,
        meta_gradient: MetaGradient,
        adapted: Sequence[str],
        rung: str = "auto",
        checkpoint_steps: bool = False,
        max_tasks_in_memory: int | None = None,
        precision: str = "full",
        batch_norm: str = "inductive",
    ) -> None:
        self.module = private_copy(module)
        self.row_loss = row_loss
        self.rule = rule
        self.meta_gradient = meta_gradient
        self.adapted = frozenset(adapted)
        self.pads = is_row_wise(module)
        self.checkpoint_steps = checkpoint_steps
        self.max_tasks_in_memory = max_tasks_in_memory
        self.precision = precision
        self.batch_norm = _check_batch_norm(batch_norm)
        self.fallback_reason: str | None = None
        self._predicts_singly = False
        rounds = precision == "bf16"
        # the layers written out for convolutions choose their own kernels
        stackable = _is_stackable(module) and not (rounds and is_conv_net(self.module))
        self._layout = self._native_layout() if stackable and not rounds else None
        self._n_threads = torch.get_num_threads()  # before a fit of a small network limits it
        self._kernel: Kernel | None = None
        self._rates: tuple[float, list[Params]] | None = None
        # the meta-parameters of the last compiled step, sorted: mostly the same ones come again
        self._parts: tuple[list[int], Params, Params, Params, Params] | None = None
        self._update = self._end = 0
        self._phase: Any = None  # of the meta-gradient, at the last meta-step
        self._climbs_at: int | None = None
        self.tracer = Tracer(*(0, 1) if rung == "traced" else ())
        self._traces = False
        self.rung = "vmap" if rung == "traced" else rung
        if rung in ("auto", "native"):
            self.rung = "stacked" if stackable else "vmap"
        self._convolves = self.rung == "stacked" and is_conv_net(self.module)
        rule.check_with(meta_gradient, row_loss is cross_entropy_rows)
        # of a step that is computed again only the derivative of plain support losses is known
        if (
            checkpoint_steps
            and meta_gradient.order == 2
            and (meta_gradient.proximal or meta_gradient.in_minibatches)
        ):
            raise ValueError(
                f"checkpoint_steps=True cannot compute the steps of {meta_gradient!r} again: it is "
                "for inner steps on the support loss alone, without a proximal term and without "
                "minibatches. Use checkpoint_steps=False."
            )
        self._head: str | None = None
        if rule.in_closed_form:
            self._head = linear_head(self.module, self.adapted, type(rule).__name__)
        self._own_norms: list[str] = []  # batch norms that take statistics from nowhere else
        if self.rung == "stacked":
            self._write_out()
        else:
            self.module, self._own_norms = replace_batch_norms(self.module)
        if rung == "native":
            self._compile()
        # frozen parameters need not be among the meta-parameters
        self._frozen = {
            name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad
        }
        self._attends = any(
            isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
            for m in self.module.modules()
        )
        # torch's recurrent layers add to products of their weights in place, which vmap can do
        # only if the weights differ between tasks
        self._per_task = any(isinstance(m, RECURRENT) for m in self.module.modules())
        # what other rungs run without padding; batch norm has its statistics given
        self._mixes_rows = self._convolves and not all(
            type(m) in ROW_WISE or isinstance(m, _BatchNorm) for m in _leaf_modules(self.module)
        )
        self._norms = [name for name, m in self.module.named_modules() if isinstance(m, _BatchNorm)]

    def __getstate__(self) -> dict[str, Any]:
        functions = {"_forward": None, "_body": None}
        return {**self.__dict__, **functions, "_kernel": None, "_rates": None, "_parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._n_threads = torch.get_num_threads()
        if self.rung in ("stacked", "native"):
            self._write_out()
        if self.rung == "native":
            self.rung = "stacked"
            self._compile()

    def _write_out(self) -> None:
        """Write the forward pass of the stacked rung out, and that of all layers but the head."""
        self._forward = self._rounded(_stacked_forward(self.module))
        if self._head is not None:
            body: nn.Module = nn.Identity()
            if self._head:
                # no copies of tensors: copies of the engine are made while it is traced
                shared = (*self.module.parameters(), *self.module.buffers())
                body = copy.deepcopy(self.module, {id(t): t for t in shared})
                parent, _, own = self._head.rpartition(".")
                setattr(body.get_submodule(parent), own, nn.Identity())
            self._body = self._rounded(_stacked_forward(body))

    # -- compiled kernels ------------------------------------------------------------------------

    def _native_layout(self) -> Layout | None:
        """Describe the module to the compiled kernels; None if they do not cover it."""
        if (
            self.row_loss not in (squared_error_rows, cross_entropy_rows)
            or type(self.meta_gradient) not in (SecondOrder, FirstOrder)
            or not has_linear_rates(self.rule)
            or next(self.module.parameters()).dtype not in (torch.float32, torch.float64)
        ):
            return None
        params = {n: p.detach() for n, p in self.module.named_parameters() if n in self.adapted}
        learned = self.rule.initial_rates(params)
        if self.rule.linear_rates(params, alpha=1.0, rates=learned) is None:
            return None
        return describe(self.module)

    def expect(
        self, first_update: int, n_updates: int, *, n_tasks: int, n_rows: int, steps: int
    ) -> None:
        """Prepare for meta-steps to come: climb where enough of them are.

        The compiled kernels take over at an update that depends on sizes alone, so fits of
        different lengths, interrupted and continued ones take the same steps.

        Parameters
        ----------
        first_update, n_updates : int
            Updates made before, and to come at most.
        n_tasks, n_rows, steps : int
            Size of a meta-batch, rows of one of its tasks, and inner steps.
        """
        self._update, self._end = first_update, first_update + n_updates
        if self._layout is None or not self._on_cpu:
            # convolutions gain nothing from a record: only where they are launched at once
            gains = not self._convolves or self._captures
            self.tracer.updates_left = n_updates if gains else 0
            return
        if self.rung != "stacked":
            return
        seconds = 2 * self._stacked_seconds(n_tasks, n_rows, steps)
        self._climbs_at = max(CLIMB_UPDATES, round(CLIMB_SECONDS / seconds))
        phase, end = self.meta_gradient.phase(first_update)
        if phase is None and end is not None:  # which the kernels do not cover
            self._climbs_at = max(self._climbs_at, end)

    def progress(self) -> dict[str, Any]:
        """Return what meta-training has changed here, as plain data, for `resume`."""
        return {
            "rung": self.rung,
            "fallback_reason": self.fallback_reason,
            "max_tasks_in_memory": self.max_tasks_in_memory,
            "attends": self._attends,
            "predicts_singly": self._predicts_singly,
            "phase": self._phase,
            "buffers": dict(self.module.named_buffers()),
            "tracer": self.tracer.progress(),
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on where the engine of an interrupted fit stood; call it before `expect`."""
        if progress["rung"] == "loop":
            self.rung = "loop"
        elif progress["rung"] == "native" and self._layout is not None and self._on_cpu:
            self._compile()
        self.fallback_reason = progress["fallback_reason"]
        self.max_tasks_in_memory = progress["max_tasks_in_memory"]
        self._attends = progress["attends"]
        self._predicts_singly = progress["predicts_singly"]
        self._phase = progress["phase"]
        for name, buffer in self.module.named_buffers():
            buffer.copy_(progress["buffers"][name])
        self.tracer.resume(progress["tracer"])

    def prediction_state(self) -> dict[str, Any]:
        """Return what predictions with adapted parameters depend on, for `for_prediction`."""
        return {
            "rung": self.rung,
            "precision": self.precision,
            "batch_norm": self.batch_norm,
            "max_tasks_in_memory": self.max_tasks_in_memory,
            "attends": self._attends,
            "predicts_singly": self._predicts_singly,
        }

    @classmethod
    def for_prediction(
        cls, module: nn.Module, row_loss: Any, adapted: Sequence[str], state: dict[str, Any]
    ) -> Engine:
        """Make an engine that predicts as the one of `prediction_state` did."""
        engine = cls(
            module,
            row_loss=row_loss,
            # predictions depend on neither the rule nor the meta-gradient
            rule=SGD(),
            meta_gradient=SecondOrder(),
            adapted=adapted,
            rung="loop" if state["rung"] == "loop" else "auto",
            precision=state["precision"],
            batch_norm=state["batch_norm"],
            max_tasks_in_memory=state["max_tasks_in_memory"],
        )
        if state["rung"] == "native":
            engine.predict_compiled()
        engine._attends = bool(state["attends"])
        engine._predicts_singly = bool(state["predicts_singly"])
        return engine

    def preparation(self, steps: int) -> Callable[[EpisodeBatch], EpisodeBatch] | None:
        """Return what makes `EpisodeBatch.prepared` of row positions, if that can be done early.

        The meta-gradients of users may look at the rows themselves.
        """
        if not prepares_positions(self.meta_gradient):
            return None
        return functools.partial(self.meta_gradient.episodes, steps=steps)

    def finish(self) -> None:
        """Give up what is prepared in the background: no more meta-steps come."""
        self.tracer.finish()

    def expect_tasks(
        self, n_tasks: int, n_rows: int, steps: int, *, compiled: bool = False
    ) -> None:
        """Prepare for adapting to so many tasks: compile if that repays, or has been done before.

        Parameters
        ----------
        n_tasks, n_rows, steps : int
        compiled : bool
            Whether the kernels have served the model already.
        """
        if self._layout is None or self.rung != "stacked" or not self._on_cpu:
            return
        if compiled or self._stacked_seconds(n_tasks, n_rows, steps) >= ADAPTING_SECONDS:
            self._compile()

    def predict_compiled(self) -> None:
        """Predict with the compiled kernels from now on, where they cover the module."""
        if self._layout is not None and self.rung == "stacked" and self._on_cpu:
            self._compile()

    @property
    def _captures(self) -> bool:
        """Whether the kernels of the stacked rung can be launched at once."""
        device = next(self.module.parameters()).device
        return device.type != "cpu" and not has_dropout(self.module) and captures(device)

    @property
    def _on_cpu(self) -> bool:
        return next(self.module.parameters()).device.type == "cpu"

    def _stacked_seconds(self, n_tasks: int, n_rows: int, steps: int) -> float:
        """Rough time of adapting on the stacked rung, from sizes alone."""
        assert self._layout is not None
        dispatch = 1e-4 * len(self._layout.sizes) * -(-n_tasks // CHUNK)
        arithmetic = 3e-11 * n_tasks * n_rows * self._layout.n_weights
        return (steps + 1) * (dispatch + 3 * arithmetic)

    def _compile(self) -> None:
        if self._layout is None:
            raise ValueError("The compiled kernels do not cover this module, rule or gradient.")
        classification = self.row_loss is cross_entropy_rows
        dtype = next(self.module.parameters()).dtype
        try:
            self._kernel = Kernel(self._layout, classification, dtype, self._n_threads)
            self.rung = "native"
        except NativeUnavailableError as error:
            _warn_once(
                "The compiled kernels for multilayer perceptrons cannot be used, so fits take "
                f"several times as long, with the same results. Reason: {error}."
            )
            self.tracer.updates_left = self._end - self._update  # the next best

    def _linear_rates(self, fast: Params, alpha: float, learned: Params) -> list[Params]:
        kept = self._rates  # read once: other threads may come in between
        if not learned and kept is not None and kept[0] == alpha:
            return kept[1]
        rates = self.rule.linear_rates(fast, alpha=alpha, rates=learned)
        assert rates is not None
        if not learned:
            self._rates = (alpha, rates)
        return rates

    def _meta_step_native(
        self, meta_params: Params, batch: EpisodeBatch, alpha: float, steps: int
    ) -> MetaStep:
        assert self._kernel is not None
        these = [*map(id, meta_params.values())]
        parts = self._parts  # read once: other threads may come in between
        if parts is None or parts[0] != these:
            params, learned = self._split(meta_params)
            self._parts = parts = (these, params, learned, *self._partition(params))
        _, params, learned, fast, shared = parts
        leaves = {name: r.detach().requires_grad_() for name, r in learned.items()}
        with torch.enable_grad() if leaves else contextlib.nullcontext():
            rates = self._linear_rates(fast, alpha, leaves)
        losses, outputs, flat, by_rates = self._kernel.meta_step(
            {**shared, **fast},
            [{name: r.detach() for name, r in part.items()} for part in rates] if leaves else rates,
            batch.support,
            batch.query,
            steps=steps,
            second_order=self._phase == 2,
            rate_grads=bool(leaves),
            recompute=self.checkpoint_steps,
        )
        views = self._kernel.views(flat)
        grads = {f"module.{name}": views[name] for name in params}
        if leaves:
            pairs = [
                (r, by[name])
                for part, by in zip(rates, by_rates, strict=True)
                for name, r in part.items()
                if r.requires_grad
            ]
            by_leaf = torch.autograd.grad(
                [r for r, _ in pairs],
                list(leaves.values()),
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            grads |= {f"rule.{rate_key(n)}": g for n, g in zip(leaves, by_leaf, strict=True)}
        whole = len(params) == len(views) and not leaves
        return MetaStep(losses, grads, outputs, flat if whole else None)

    def threads(self, n_rows: int) -> Any:
        """Context that limits torch to one thread if passes over `n_rows` rows are small.

        The limit holds for the calling thread alone. On CUDA, the context allows TF32 or, where
        torch itself would take it for convolutions, forbids it; that holds for the process.
        """
        if not self._on_cpu:
            return _tf32(self.precision == "tf32")
        spatial = any(isinstance(m, nn.modules.conv._ConvNd) for m in self.module.modules())
        work = n_rows * sum(p.numel() for p in self.module.parameters())
        return several_threads() if spatial else threads_for(work)

    # -- the three entry points ----------------------------------------------------------------

    def meta_step(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> MetaStep:
        """Query losses after adaptation and the gradient of their mean.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            ``module.*`` and ``rule.*`` meta-parameters.
        batch : EpisodeBatch
        alpha : float
        steps : int

        Warns
        -----
        EngineFallbackWarning
            If the memory did not suffice, so that fewer tasks are run at once from now on; if
            tasks are run one after another because the module cannot be batched; or if a
            batch-norm layer of the user's own cannot be given the statistics of the support set.
        """
        if self._climbs_at is not None and self._update >= self._climbs_at:
            self._climbs_at = None
            self._compile()
        phase, end = self.meta_gradient.phase(self._update)
        if phase != self._phase:
            self.tracer.restart()
        self._phase = phase
        self._update += 1
        if (
            self._kernel is not None
            and phase is not None
            and self._kernel.takes(batch.support, batch.query)
        ):
            return self._meta_step_native(meta_params, batch, alpha, steps)
        self.module.train()
        others = 0 if end is None else max(self._end - end, 0)
        self._traces = self.tracer.begin_update(others) and phase is not None
        if self._own_norms and self.batch_norm == "inductive":
            warnings.warn(
                f"The batch-norm layer(s) {self._own_norms} of {type(self.module).__name__} are "
                "run as they are, so in meta-training they normalise query rows with statistics "
                "of these rows and not of the support set, as predictions do. Reason: they have "
                "a forward pass or parametrizations of their own.",
                EngineFallbackWarning,
                stacklevel=2,
            )
            self._own_norms = []
        ready = batch.prepared
        batch = self.meta_gradient.episodes(batch, steps) if ready is None else ready

        def run(part: EpisodeBatch, rung: str) -> MetaStep:
            if rung == "loop":
                return self._meta_step_loop(meta_params, part, alpha, steps)
            if self._traces:
                step = self._meta_step_traced(meta_params, part, alpha, steps)
                if step is not None:
                    return step
            if rung == "vmap":
                return self._meta_step_vmap(meta_params, part, alpha, steps)
            return self._meta_step_stacked(meta_params, part, alpha, steps)

        def join(parts: list[MetaStep], index: list[np.ndarray]) -> MetaStep:
            n_tasks = sum(len(part.losses) for part in parts)
            weights = [len(part.losses) / n_tasks for part in parts]
            grads = {
                name: torch.stack(
                    [w * part.grads[name] for w, part in zip(weights, parts, strict=True)]
                ).sum(0)
                for name in parts[0].grads
            }
            width = max(part.outputs.shape[1] for part in parts)
            losses = put_back([part.losses for part in parts], index)
            outputs = put_back([_pad_rows_to(width, part.outputs) for part in parts], index)
            return MetaStep(losses, grads, outputs)

        with _explaining_one_value(support=batch.support, query=batch.query):
            return self._in_memory(batch, lambda part: self._by_shape(part, run, join), join)

    def evaluate(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Query losses (n_tasks,) and query outputs after `steps` inner steps, as `predict`."""
        if self.max_tasks_in_memory is not None and len(batch) > self.max_tasks_in_memory:
            width = batch.query.X.shape[1]
            parts = [
                self.evaluate(meta_params, _take(batch, which), alpha=alpha, steps=steps)
                for which in _chunks(len(batch), self.max_tasks_in_memory)
            ]
            padded = [_pad_rows_to(width, outputs) for _, outputs in parts]
            return torch.cat([losses for losses, _ in parts]), torch.cat(padded)
        inductive = self.batch_norm == "inductive"
        adapted = self._adapt(meta_params, batch.support, alpha, steps, statistics=inductive)
        outputs = self.predict(adapted, batch.query)
        output = _fit_outputs(outputs, batch.query.y)
        return mean_loss(self.row_loss(output, batch.query.y), batch.query.weight), output

    def adapt(self, meta_params: Params, support: Rows, *, alpha: float, steps: int) -> Adapted:
        """Adapt to the support set of each task.

        Parameters
        ----------
        meta_params : dict of str to Tensor
            ``module.*`` and ``rule.*`` meta-parameters.
        support : Rows
        alpha : float
        steps : int
        """
        return self._adapt(meta_params, support, alpha, steps, statistics=True)

    def _adapt(
        self, meta_params: Params, support: Rows, alpha: float, steps: int, *, statistics: bool
    ) -> Adapted:
        """Adapt; with the batch-norm statistics of the support sets if these are asked for."""
        module_params, rates = self._split(meta_params)
        fast, shared = self._partition(module_params)
        if self._kernel is not None and self._kernel.takes(support):
            params = self._kernel.adapt(
                {**shared, **fast},
                self._linear_rates(fast, alpha, rates),
                support,
                steps=steps,
                adapted=list(fast),
            )
            return Adapted(params, shared, {})
        self.module.eval()
        for m in self.module.modules():
            if isinstance(m, _BatchNorm):
                m.train()

        def run(rows: Rows, rung: str) -> Params:
            return self._adapt_rows(fast, shared, rates, rows, rung, alpha, steps)

        def join(parts: list[Params], index: list[np.ndarray]) -> Params:
            return {name: put_back([part[name] for part in parts], index) for name in parts[0]}

        with _explaining_one_value(support=support):
            adapted = Adapted(self._by_shape(support, run, join), shared, {})
            if self._norms and statistics:
                adapted.statistics = self._support_statistics(adapted, support)
        return adapted

    def joins_rows(self, batch_norm: str | None = None) -> bool:
        """Whether predictions of a task's rows depend on each other; see `predict`."""
        chosen = self.batch_norm if batch_norm is None else _check_batch_norm(batch_norm)
        return bool(self._norms) and chosen == "transductive"

    def predict(self, adapted: Adapted, query: Rows, *, batch_norm: str | None = None) -> Tensor:
        """Return outputs (n_tasks, n_rows, n_outputs) of each task's parameters on its rows.

        Parameters
        ----------
        adapted : Adapted
        query : Rows
        batch_norm : {"inductive", "transductive"} or None
            None takes that of the engine.
        """
        if self.joins_rows(batch_norm):
            adapted = dataclasses.replace(adapted, statistics={})
        elif not self._mixes_rows:
            return self._predict(adapted, query)
        with _explaining_one_value(query=query):
            pieces = _equal_shapes(query)
            if pieces is None:
                return self._predict(adapted, query)
            parts = [self._predict(adapted.take(k), query.take(k)) for k in pieces]
        return put_back([_pad_rows_to(query.X.shape[1], part) for part in parts], pieces)

    def module_of(self, adapted: Adapted, task: int) -> nn.Module:
        """Return a module of its own with the parameters, and the statistics, of one task."""
        params, statistics = adapted.task(task)
        module = copy.deepcopy(self._for_prediction(bool(statistics)))
        module.load_state_dict({**params, **statistics}, strict=False)
        return module

    def _predict(self, adapted: Adapted, query: Rows) -> Tensor:
        """Predict with the batch-norm statistics among `adapted`, or else those of the rows."""
        if self._kernel is not None and self._kernel.takes_inputs(query.X):
            return self._kernel.predict(adapted.params, adapted.shared, query)
        with torch.no_grad():
            if self.rung in ("stacked", "native"):
                self.module.eval()
                stacked = {
                    **spread(adapted.shared, len(query)),
                    **adapted.params,
                    **adapted.statistics,
                }
                if not self._convolves:
                    return self._forward(stacked, query.X, Pass())
                step = tasks_at_a_time(self.module, query.X)
                parts = [slice(start, start + step) for start in range(0, len(query), step)]
                return torch.cat(
                    [
                        self._forward({n: p[k] for n, p in stacked.items()}, query.X[k], Pass())
                        for k in parts
                    ]
                )
            module = self._for_prediction(bool(adapted.statistics))
            # attention takes a fast path in evaluation that vmap cannot batch
            one_by_one = self._attends or self._predicts_singly or len(query) == 1
            batches = self.rung == "vmap" and not one_by_one
            if batches and (self.pads or query.lengths is None):
                try:
                    shared, axis = self._spread(adapted.shared, len(query))
                    return torch.func.vmap(
                        lambda s, p, b, x: self._run_module(module, {**s, **p, **b}, x),
                        in_dims=(axis, 0, 0, 0),
                        randomness="different",
                    )(shared, adapted.params, adapted.statistics, query.X)
                except RuntimeError as error:
                    outputs = self._predict_loop(module, adapted, query)
                    # not before the loop has shown that it works; meta-steps may be batched yet
                    self._predicts_singly = True
                    _warn_once(
                        f"{type(self.module).__name__} cannot predict for a batch of tasks with "
                        "torch.vmap, so tasks are predicted one after another, with the same "
                        f"results. Reason: {first_line(error)}"
                    )
                    return outputs
            return self._predict_loop(module, adapted, query)

    def _predict_loop(self, module: nn.Module, adapted: Adapted, query: Rows) -> Tensor:
        width = query.X.shape[1]
        outputs = []
        for j in range(len(query)):
            params, statistics = adapted.task(j)
            out = self._run_module(module, {**params, **statistics}, query.task(j).X)
            outputs.append(
                functional.pad(out.movedim(0, -1), (0, width - out.shape[0])).movedim(-1, 0)
            )
        return torch.stack(outputs)

    # -- rungs -----------------------------------------------------------------------------------

    def _in_memory(
        self,
        batch: EpisodeBatch,
        run: Callable[[EpisodeBatch], MetaStep],
        join: Callable[[list[MetaStep], list[np.ndarray]], MetaStep],
    ) -> MetaStep:
        """Run a meta-batch in chunks of at most `max_tasks_in_memory`, smaller ones if need be."""
        size = min(self.max_tasks_in_memory or len(batch), len(batch))
        done: MetaStep | None = None
        n_done, reason = 0, ""
        while n_done < len(batch):
            which = np.arange(n_done, min(n_done + size, len(batch)))
            try:
                part = run(batch if len(which) == len(batch) else _take(batch, which))
            except RuntimeError as error:
                if not _is_out_of_memory(error) or size == 1:
                    raise
                reason = first_line(error)
            else:
                done = part if done is None else join([done, part], [np.arange(n_done), which])
                n_done += len(which)
                continue
            size //= 2  # after the except block: the error holds on to what it ran out of
        assert done is not None
        if reason:
            self.max_tasks_in_memory = size
            warnings.warn(
                f"The memory did not suffice for a meta-batch of {len(batch)} tasks, which is "
                f"now run {size} at a time, with the same results to rounding. Set "
                f"max_tasks_in_memory={size} to do so from the start, or checkpoint_steps=True. "
                f"Reason: {reason}",
                EngineFallbackWarning,
                stacklevel=3,
            )
        return done

    def _by_shape(self, batch: Any, run: Callable[..., Any], join: Callable[..., Any]) -> Any:
        """Run a batch on the current rung, in pieces of equal shape where padding is unsafe."""
        rung = "stacked" if self.rung == "native" else self.rung  # rows the kernels do not take
        if rung == "vmap" and len(batch) == 1:
            rung = "loop"  # vmap costs more than it saves for one task
        pieces = None if self.pads or rung == "loop" else _equal_shapes(batch)
        if self._convolves:
            X = batch.support.X if isinstance(batch, EpisodeBatch) else batch.X
            if self._on_cpu:
                keep_memory()
            step = tasks_at_a_time(self.module, X)
            pieces = [
                which[start : start + step]
                for which in pieces or [np.arange(len(batch))]
                for start in range(0, len(which), step)
            ]
        try:
            if pieces is None:
                return run(batch, rung)
            parts = [
                run(_take(batch, which), rung if len(which) > 1 or self._convolves else "loop")
                for which in pieces
            ]
            return join(parts, pieces)
        except (RuntimeError, NotImplementedError) as error:
            if "scaled_dot_product" in str(error) and not self._attends:
                self._attends = True  # the kernel it chose has no second derivative
                return self._by_shape(batch, run, join)
            if rung != "vmap" or _is_out_of_memory(error):
                raise
            result = run(batch, "loop")  # an error of the module itself is raised here
            self._fall_back(error)
            return result

    def _fall_back(self, error: Exception) -> None:
        self.rung = "loop"
        self.fallback_reason = first_line(error)
        warnings.warn(
            f"{type(self.module).__name__} cannot be run over a batch of tasks with torch.vmap, "
            f"so tasks are run one after another, with the same results. Reason: "
            f"{self.fallback_reason}",
            EngineFallbackWarning,
            stacklevel=2,
        )

    def _split(self, meta_params: Params) -> tuple[Params, Params]:
        module = {n[7:]: p for n, p in meta_params.items() if n.startswith("module.")}
        rates = {n[5:]: p for n, p in meta_params.items() if n.startswith("rule.")}
        # rates are stored by underscored names: ParameterDict refuses dots
        names = {rate_key(name): name for name in module}
        return module, {names.get(key, key): r for key, r in rates.items()}

    def _partition(self, params: Params) -> tuple[Params, Params]:
        fast = {name: p for name, p in params.items() if name in self.adapted}
        shared = {name: p for name, p in params.items() if name not in self.adapted}
        return fast, {**self._frozen, **shared}

    def _problem(
        self,
        forward: Callable[[Params, Tensor], Tensor],
        query_forward: Callable[[Params, Tensor, Tensor], Tensor],
        support: Rows,
        query: Rows,
        alpha: float,
        steps: int,
        differentiator: Differentiator,
        expand: Callable[[Params], Params],
        batched: bool,
    ) -> InnerProblem:
        """Return the inner problem of these support and query rows, for a meta-gradient."""
        in_minibatches = self.meta_gradient.in_minibatches

        def rows_of_step(k: int) -> Rows:
            return support.minibatch(k, axis=2 if batched else 1) if in_minibatches else support

        def loss_of(output: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            output = _fit_outputs(output, rows.y)
            return mean_loss(self.row_loss(output, rows.y), rows.weight), output

        def loss_of_step(k: int, params: Params) -> Tensor:
            rows = rows_of_step(k)
            return loss_of(forward(params, rows.X), rows)[0].sum()

        def start(meta_params: Params) -> tuple[Params, Params, Params]:
            module_params, rates = self._split(meta_params)
            fast, shared = self._partition(module_params)
            return expand(fast), expand(shared), rates

        def query_loss(params: Params) -> tuple[Tensor, Any]:
            # batch norm takes the statistics of the first minibatch
            losses, output = loss_of(query_forward(params, rows_of_step(0).X, query.X), query)
            return losses.sum(), (losses.detach(), output.detach())

        problem: dict[str, Any] = {
            "start": start,
            "support_loss": functools.partial(loss_of_step, 0),
            "query_loss": query_loss,
            "rule": self.rule,
            "alpha": alpha,
            "steps": steps,
            "differentiator": differentiator,
            "batched": batched,
            "proximal": self.meta_gradient.proximal,
            "update": self._update - 1,
            "loss_of_step": loss_of_step if in_minibatches else None,
            "support_set": lambda params: self._support_set(params, support, batched),
        }
        # without second derivatives there is no graph of the steps that could be saved, and what
        # is in closed form takes no steps
        if self.checkpoint_steps and self._phase == 2 and not self.rule.in_closed_form:
            random = not self.pads or has_dropout(self.module)
            return RecomputedSteps(**problem, module=self.module, random=random)
        return InnerProblem(**problem)

    def _meta_step_stacked(
        self, meta_params: Params, batch: EpisodeBatch, alpha: float, steps: int
    ) -> MetaStep:
        n_tasks = len(batch)
        how = Pass()
        diff = ConvAutograd(how.sums) if self._convolves else Autograd()
        problem = self._problem(
            lambda params, x: self._forward(params, x, how),
            lambda params, a, b: self._stacked_query(params, a, b, how),
            batch.support,
            batch.query,
            alpha,
            steps,
            diff,
            lambda params: spread(params, n_tasks),
            batched=True,
        )
        # meta-gradients of users may differentiate the query loss twice
        if self._convolves and type(self.meta_gradient) in (SecondOrder, FirstOrder, Implicit):
            problem.query_loss = self._query_loss_in_pieces(batch, how.sums)
        grads, (_, (losses, output)) = self.meta_gradient.loss_and_grad(meta_params, problem)
        return MetaStep(losses, {n: g / n_tasks for n, g in grads.items()}, output)

    def _query_loss_in_pieces(
        self, batch: EpisodeBatch, sums: Sums
    ) -> Callable[[Params], tuple[Tensor, Any]]:
        """Query loss that holds the activations of a few tasks only."""
        support, query = batch.support, batch.query
        n_more = support.X.shape[1] if self._uses_support else 0
        how = Pass(sums, once=True)

        def loss(params: Params, tasks: slice) -> tuple[Tensor, Any]:
            y = query.y[tasks]
            output = self._stacked_query(params, support.X[tasks], query.X[tasks], how)
            output = _fit_outputs(output, y)
            weight = None if query.weight is None else query.weight[tasks]
            losses = mean_loss(self.row_loss(output, y), weight)
            return losses.sum(), (losses.detach(), output.detach())

        def query_loss(params: Params) -> tuple[Tensor, Any]:
            step = tasks_at_a_time(self.module, query.X, n_more)
            total, parts = gradient_now(loss, params, len(query), step, sums)
            losses, outputs = (torch.cat(part) for part in zip(*parts, strict=True))
            return total, (losses, outputs)

        return query_loss

    def _meta_step_loop(
        self, meta_params: Params, batch: EpisodeBatch, alpha: float, steps: int
    ) -> MetaStep:
        diff = Autograd()
        total: Params = {}
        losses, outputs = [], []
        width = batch.query.X.shape[1]
        for j in range(len(batch)):
            problem = self._problem(
                self._call_module,
                self._call_module_on_query,
                batch.support.task(j),
                batch.query.task(j),
                alpha,
                steps,
                diff,
                lambda params: params,
                batched=False,
            )
            grads, (_, (loss, output)) = self.meta_gradient.loss_and_grad(meta_params, problem)
            total = {n: g + total[n] for n, g in grads.items()} if total else grads
            losses.append(loss)
            outputs.append(functional.pad(output, (0, 0, 0, width - output.shape[0])))
        mean = {n: g / len(batch) for n, g in total.items()}
        return MetaStep(torch.stack(losses), mean, torch.stack(outputs))

    def _meta_step_vmap(
        self, meta_params: Params, batch: EpisodeBatch, alpha: float, steps: int
    ) -> MetaStep:
        diff = Functorch()

        def one_task(params: Params, support: tuple[Any, ...], query: tuple[Any, ...]) -> Any:
            problem = self._problem(
                self._call_module,
                self._call_module_on_query,
                Rows(*support),
                Rows(*query),
                alpha,
                steps,
                diff,
                lambda params: params,
                batched=False,
            )
            grads, (_, aux) = self.meta_gradient.loss_and_grad(params, problem)
            return grads, aux

        sets = [(rows.X, rows.y, rows.weight) for rows in (batch.support, batch.query)]
        in_dims = tuple((0, 0, None if part[2] is None else 0) for part in sets)
        params, axis = self._spread(meta_params, len(batch))
        grads, (losses, outputs) = torch.func.vmap(
            one_task, in_dims=(axis, *in_dims), randomness="different"
        )(params, *sets)
        return MetaStep(losses, {n: g.mean(0) for n, g in grads.items()}, outputs)

    def _meta_step_traced(
        self, meta_params: Params, batch: EpisodeBatch, alpha: float, steps: int
    ) -> MetaStep | None:
        """Run the ``vmap`` step as a flat graph; None where it is not traced."""
        fixed = {**self._frozen, **dict(self.module.named_buffers())}
        sets = [
            rows for part in (batch.support, batch.query) for rows in (part.X, part.y, part.weight)
        ]
        given = [t for t in sets if t is not None]
        shape = (
            alpha,
            steps,
            self._attends,
            self.precision,
            self.batch_norm,
            self._phase,
            *(t if t is None else (t.shape, t.dtype) for t in sets),
        )

        def function(*tensors: Tensor) -> list[Tensor]:
            values = iter(tensors)
            params = {name: next(values) for name in meta_params}
            # frozen parameters and buffers are arguments too: their values differ between fits
            engine = copy.copy(self)
            engine._frozen = {name: next(values) for name in fixed}
            rows: list[Any] = [None if t is None else next(values) for t in sets]
            episodes = EpisodeBatch(Rows(*rows[:3]), Rows(*rows[3:]))
            if self._convolves:
                step = engine._meta_step_stacked(params, episodes, alpha, steps)
            else:
                step = engine._meta_step_vmap(params, episodes, alpha, steps)
            return [step.losses, step.outputs, *(step.grads[name] for name in meta_params)]

        def settings() -> Any:
            objects = (self.rule, self.meta_gradient)
            return (
                *shape, tuple(meta_params), tuple(fixed), self.adapted, self.row_loss,
                *(settings_key([type(o), vars(o)]) for o in objects),
                module_key(self.module),
            )  # fmt: skip

        inputs = [*meta_params.values(), *fixed.values(), *given]
        try:
            outputs = self.tracer.run(
                function, inputs, shape=shape, settings=settings, recorded=not self._convolves
            )
        except Untraceable as error:
            reason, outputs = error.args
            warnings.warn(
                f"The meta-steps of {type(self.module).__name__} cannot be traced, so they run "
                f"untraced, slower and with the same results. Reason: {reason}",
                EngineFallbackWarning,
                stacklevel=2,
            )
        if outputs is None:
            return None
        losses, output, *grads = outputs
        return MetaStep(losses, dict(zip(meta_params, grads, strict=True)), output)

    def _spread(self, params: Params, n_tasks: int) -> tuple[Params, int | None]:
        """Parameters as vmap needs them and their task axis; None where tasks share them."""
        if not self._per_task:
            return params, None
        return {name: p.expand(n_tasks, *p.shape) for name, p in params.items()}, 0

    def _call_module(self, params: Params, x: Tensor) -> Tensor:
        with self._second_derivatives():
            return self._run_module(self.module, params, x)

    def _run_module(self, module: nn.Module, params: Params, x: Tensor) -> Tensor:
        return self._rounded(lambda params, x: functional_call(module, params, (x,)))(params, x)

    def _rounded(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Forward pass with its matrix products in bfloat16, if that is the precision."""
        if self.precision != "bf16":
            return forward

        def rounded(params: Params, x: Tensor, *how: Pass) -> Tensor:
            # no cache of rounded parameters: it would outlive the transforms of torch.func
            with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
                return forward(params, x, *how).to(x.dtype)

        return rounded

    def _second_derivatives(self) -> Any:
        """Context in which layers run on those of their kernels that have second derivatives."""
        if self._per_task and not self._on_cpu:
            return _without_cudnn(self._attends)
        return sdpa_kernel(SDPBackend.MATH) if self._attends else contextlib.nullcontext()

    def _support_set(
        self, params: Params, support: Rows, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs of the head, targets and weights of support rows."""
        if batched:
            features = self._body(params, support.X, Pass())
        else:
            assert self._head is not None
            seen: list[Tensor] = []
            handle = self.module.get_submodule(self._head).register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0])
            )
            try:
                self._call_module(params, support.X)
            finally:
                handle.remove()
            features = seen[0]
        return features.to(support.X.dtype), support.y, support.weight

    def _adapt_rows(
        self,
        fast: Params,
        shared: Params,
        rates: Params,
        support: Rows,
        rung: str,
        alpha: float,
        steps: int,
    ) -> Params:
        inner = functools.partial(
            adapt,
            rule=self.rule,
            alpha=alpha,
            rates=rates,
            steps=steps,
            order=0,
            proximal=self.meta_gradient.proximal,
        )

        def loss(forward: Callable[..., Tensor], rows: Rows, params: Params) -> Tensor:
            output = _fit_outputs(forward(params, rows.X), rows.y)
            return mean_loss(self.row_loss(output, rows.y), rows.weight).sum()

        if rung == "stacked":
            n_tasks = len(support)
            wide = spread(shared, n_tasks)
            return inner(
                spread(fast, n_tasks),
                lambda p: loss(lambda *of: self._forward(*of, Pass()), support, {**wide, **p}),
                differentiator=Autograd(),
                batched=True,
                support_set=lambda: self._support_set(wide, support, batched=True),
            )

        def one_task(
            fast: Params, shared: Params, rows: Rows, differentiator: Differentiator
        ) -> Params:
            return inner(
                fast,
                lambda p: loss(self._call_module, rows, {**shared, **p}),
                differentiator=differentiator,
                batched=False,
                support_set=lambda: self._support_set({**shared, **fast}, rows, batched=False),
            )

        if rung == "vmap":
            sets = (support.X, support.y, support.weight)
            in_dims = (0, 0, None if support.weight is None else 0)
            (fast, axis), (shared, _) = (self._spread(p, len(support)) for p in (fast, shared))
            return torch.func.vmap(
                lambda fast, shared, *rows: one_task(fast, shared, Rows(*rows), Functorch()),
                in_dims=(axis, axis, *in_dims),
                randomness="different",
            )(fast, shared, *sets)
        tasks = [one_task(fast, shared, support.task(j), Autograd()) for j in range(len(support))]
        return {name: torch.stack([task[name] for task in tasks]) for name in fast}

    # -- batch norm ------------------------------------------------------------------------------

    @property
    def _uses_support(self) -> bool:
        """Whether query rows are normalised with the statistics of the support set."""
        return bool(self._norms) and self.batch_norm == "inductive"

    def _stacked_query(
        self, params: Params, support_X: Tensor, query_X: Tensor, how: Pass
    ) -> Tensor:
        """Return outputs on the query rows of all tasks, on the stacked rung."""
        if not self._uses_support:
            return self._forward(params, query_X, how)
        how = dataclasses.replace(how, n_support=support_X.shape[1])
        return self._forward(params, torch.cat([support_X, query_X], dim=1), how)

    def _call_module_on_query(self, params: Params, support_X: Tensor, query_X: Tensor) -> Tensor:
        """Return outputs on the query rows of one task."""
        if not self._uses_support:
            return self._call_module(params, query_X)
        return run_on_query(lambda x: self._call_module(params, x), self.module, support_X, query_X)

    def _for_prediction(self, takes_statistics: bool) -> nn.Module:
        """Copy of the module, with its parameters shared, that takes batch statistics as buffers.

        If it takes none, it uses those of the rows. A copy for each call, because
        `functional_call` is not safe on one that threads share.
        """
        parameters = list(self.module.parameters())
        module = copy.deepcopy(self.module, {id(p): p for p in parameters})
        for m in module.modules():
            if takes_statistics and isinstance(m, _BatchNorm):
                m.track_running_stats = True
                m.running_mean = parameters[0].new_zeros(m.num_features)
                m.running_var = parameters[0].new_ones(m.num_features)
        return module.eval()

    def _support_statistics(self, adapted: Adapted, support: Rows) -> Buffers:
        """Mean and variance that each batch-norm layer sees on each support set."""
        module = self.module
        seen: Buffers = {}

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
            if name in self._norms
        ]
        collected: list[Buffers] = []
        try:
            with torch.no_grad():
                for j in range(len(support)):
                    functional_call(module, adapted.task(j)[0], (support.task(j).X,))
                    collected.append(dict(seen))
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.stack([c[name] for c in collected]) for name in collected[0]}


def _check_batch_norm(value: str) -> str:
    if value not in ("inductive", "transductive"):
        raise ValueError(
            f"batch_norm={value!r} is not known. Expected 'inductive' (query rows are normalised "
            "with the statistics of the support set) or 'transductive' (with their own)."
        )
    return value


@contextlib.contextmanager
def _explaining_one_value(**sets: Rows) -> Iterator[None]:
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
        instead = " set batch_norm='inductive'," if name == "query" else ""
        raise ValueError(
            f"Batch norm needs at least 2 values of each channel, and a {name} set has one row. "
            f"Give more {name} rows,{instead} or use LayerNorm or GroupNorm in the module."
        ) from error


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, EngineFallbackWarning, stacklevel=3)


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
def _tf32(allowed: bool) -> Iterator[None]:
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


def rate_key(name: str) -> str:
    """Name under which a learned rate, of a parameter say, is stored."""
    return name.replace(".", "__")


def _chunks(n: int, size: int) -> list[np.ndarray]:
    """Positions 0 to n - 1 in consecutive pieces of at most `size`."""
    return np.split(np.arange(n), range(size, n, size))


def _pad_rows_to(width: int, values: Tensor) -> Tensor:
    """Pad (n_tasks, n_rows, ...) with zeros to `width` rows."""
    padding = values.new_zeros(len(values), width - values.shape[1], *values.shape[2:])
    return torch.cat([values, padding], dim=1)


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator on CPU raises a plain RuntimeError
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory")
    )


def _take(batch: Any, which: np.ndarray) -> Any:
    return batch.take(which)


def _equal_shapes(batch: Any) -> list[np.ndarray] | None:
    """Positions of the tasks that share their row counts; None when all do."""
    sets = (batch.support, batch.query) if isinstance(batch, EpisodeBatch) else (batch,)
    if all(rows.lengths is None for rows in sets):
        return None
    sizes = np.stack(
        [
            np.full(len(batch), rows.X.shape[1]) if rows.lengths is None else rows.lengths
            for rows in sets
        ],
        axis=1,
    )
    _, inverse = np.unique(sizes, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [np.flatnonzero(inverse == k) for k in range(inverse.max() + 1)]


def restore_diverged(adapted: Adapted, module: nn.Module, alpha: float) -> None:
    """Give tasks whose adaptation is not finite the initialisation back, and say so."""
    finite = torch.stack(
        [torch.isfinite(p).flatten(1).all(1) for p in adapted.params.values()]
    ).all(0)
    diverged = torch.nonzero(~finite).flatten()
    if not len(diverged):
        return
    initial = dict(module.named_parameters())
    for name, p in adapted.params.items():
        p[diverged] = initial[name].detach()
    warnings.warn(
        f"The inner steps diverged on {len(diverged)} of {len(finite)} tasks; their predictions "
        f"are those of the initialisation. Lower alpha (now {alpha:g}) or adapt_steps.",
        NonFiniteStepWarning,
        stacklevel=5,
    )
