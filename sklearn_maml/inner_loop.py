"""The inner loop: the only place where parameters are adapted to a support set.

`adapt` is a pure function of a dict of parameters. Meta-training, adaptation, scoring and plots
all call it, each with its own way of differentiating (plain autograd or `torch.func`).
`RecomputedSteps` takes the same steps, for a meta-gradient that has to fit into little memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sklearn_maml.devices import (
    accelerators,
    forked_generators,
    generator_states,
    set_generator_states,
)
from sklearn_maml.update_rules import ClosedFormHead, UpdateRule

__all__ = [
    "Autograd",
    "Differentiator",
    "Functorch",
    "InnerProblem",
    "RecomputedSteps",
    "adapt",
    "mean_loss",
]

Params = dict[str, Tensor]
LossFunction = Callable[[Params], Tensor]
SupportSet = Callable[[], tuple[Tensor, Tensor, Tensor | None]]


class Differentiator(Protocol):
    """A way to differentiate functions of a dict of parameters."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of a scalar loss at `params`."""

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function`, and its outputs."""

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product of `cotangents` with the Jacobian of `function` at `inputs`."""

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian of `function` at `inputs`, for any number of cotangents."""

    def cut(self, params: Params) -> Params:
        """Parameters cut from the graph, ready to be differentiated again."""


class Autograd:
    """Plain reverse mode: runs every module, those that write to buffers too."""

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of `loss`; unused parameters get zeros; kept in the graph for order 2."""
        with torch.enable_grad():
            grads = torch.autograd.grad(
                loss(params),
                list(params.values()),
                create_graph=order == 2,
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(params, grads, strict=True))

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""
        leaves = self.cut(params)
        with torch.enable_grad():
            loss, aux = function(leaves)
            grads = self._backward(loss, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), (loss.detach(), aux)

    def _backward(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product with the Jacobian; inputs that play no part get zeros."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(leaves)
        pairs = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        outputs, cotangents = map(list, zip(*pairs, strict=True))
        return list(
            torch.autograd.grad(
                outputs, leaves, cotangents, allow_unused=True, materialize_grads=True
            )
        )

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian from one graph, which lives as long as what is returned."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(leaves)
        places = [i for i, out in enumerate(outputs) if out.requires_grad]

        def products(cotangents: list[Tensor]) -> list[Tensor]:
            if not places:
                return [torch.zeros_like(x) for x in inputs]
            return list(
                torch.autograd.grad(
                    [outputs[i] for i in places],
                    leaves,
                    [cotangents[i] for i in places],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

        return products

    def cut(self, params: Params) -> Params:
        """Detached leaves that require a gradient."""
        return {name: p.detach().requires_grad_() for name, p in params.items()}


class Functorch:
    """`torch.func` transforms, which compose with `vmap`.

    Both orders must go through `torch.func`: plain autograd around `vmap` gives wrong second-order
    gradients for normalisation layers, silently.
    """

    def grad(self, loss: LossFunction, params: Params, order: int) -> Params:
        """Gradient of `loss`; detached unless order is 2."""
        grads = torch.func.grad(loss)(params)
        return grads if order == 2 else {name: g.detach() for name, g in grads.items()}

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at `params`, and its outputs."""
        return torch.func.grad_and_value(function, has_aux=True)(params)

    def vjp(
        self,
        function: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        cotangents: list[Tensor],
    ) -> list[Tensor]:
        """Product with the Jacobian; inputs that play no part get zeros."""
        pull_back: Any = torch.func.vjp(function, inputs)[1]
        with torch.no_grad():  # else it builds the graph of a further derivative
            return list(pull_back(cotangents)[0])

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian from one graph, which lives as long as what is returned."""
        pull_back: Any = torch.func.vjp(function, inputs)[1]

        def products(cotangents: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return list(pull_back(cotangents)[0])

        return products

    def cut(self, params: Params) -> Params:
        """Detached tensors; `torch.func` needs no leaves."""
        return {name: p.detach() for name, p in params.items()}


def mean_loss(row_loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of the row losses over the last axis; `weight` sums to one over it."""
    return row_loss.mean(-1) if weight is None else (row_loss * weight).sum(-1)


def adapt(
    params: Params,
    support_loss: LossFunction,
    *,
    rule: UpdateRule,
    alpha: float,
    rates: Params,
    steps: int,
    order: int,
    differentiator: Differentiator,
    batched: bool,
    proximal: float = 0.0,
    on_step: Callable[[Params], None] | None = None,
    loss_of_step: Callable[[int, Params], Tensor] | None = None,
    support_set: SupportSet | None = None,
) -> Params:
    """Take `steps` inner steps on the support loss (Finn et al. 2017, algorithm 1 line 6).

    Parameters
    ----------
    params : dict of str to Tensor
        The adapted parameters at the initialisation.
    support_loss : callable params -> scalar Tensor
        Sum over tasks of the mean support loss.
    rule, alpha, rates : the update rule, its rate and what it learned
    steps : int
    order : {0, 1, 2}
        Derivatives the caller takes of the result: 0 none, 1 with the inner gradients as
        constants, 2 through them.
    differentiator : Differentiator
    batched : bool
        Whether the tensors have a leading task axis.
    proximal : float
        Strength of ``proximal / 2 * |params - initialisation|^2``, added to the support loss.
    on_step : callable params -> None, optional
        Told of the parameters after every step.
    loss_of_step : callable (k, params) -> scalar Tensor, optional
        Loss of step `k`, where steps see different rows; takes the place of `support_loss`.
    support_set : callable () -> (features, targets, weights), optional
        For rules in closed form, which solve once in place of all steps: what they solve for, see
        `ClosedFormHead.solve`.

    Returns
    -------
    params : dict of str to Tensor
    """
    if order == 0:
        params = differentiator.cut(params)
    if rule.in_closed_form and steps:
        assert isinstance(rule, ClosedFormHead)
        assert support_set is not None
        params = rule.solve(params, *support_set(), rates=rates, order=order)
        if on_step is not None:
            for _ in range(steps):  # every step would end here
                on_step(params)
        steps = 0
    initial = params
    state = rule.start(params)
    for k in range(steps):
        params, state = _step(
            k,
            params,
            state,
            support_loss if loss_of_step is None else functools.partial(loss_of_step, k),
            initial=initial,
            rule=rule,
            alpha=alpha,
            rates=rates,
            order=order,
            differentiator=differentiator,
            batched=batched,
            proximal=proximal,
        )
        if order == 0:
            params = differentiator.cut(params)
        if on_step is not None:
            on_step(params)
    return {name: p.detach() for name, p in params.items()} if order == 0 else params


def _step(
    k: int,
    params: Params,
    state: Any,
    support_loss: LossFunction,
    *,
    initial: Params,
    rule: UpdateRule,
    alpha: float,
    rates: Params,
    order: int,
    differentiator: Differentiator,
    batched: bool,
    proximal: float,
) -> tuple[Params, Any]:
    """Take inner step number `k`; see `adapt`."""
    grads = differentiator.grad(support_loss, params, order)
    if proximal:
        grads = {n: g + proximal * (params[n] - initial[n]) for n, g in grads.items()}
    return rule.step(k, params, grads, alpha=alpha, rates=rates, state=state, batched=batched)


@dataclasses.dataclass
class InnerProblem:
    """Adapting to the support sets at hand, and the query loss afterwards.

    This is what a meta-gradient gets to differentiate; it does not know how tasks are batched.

    Attributes
    ----------
    start : callable meta_params -> (fast, shared, rates)
        The parameters that adapt, those that do not, and what the rule learned.
    support_loss : callable params -> scalar Tensor
        Of all parameters; the sum over tasks.
    query_loss : callable params -> (scalar Tensor, aux)
        Of all parameters; the sum over tasks.
    rule, alpha, steps, differentiator, batched, proximal : as in `adapt`
    update : int
        Meta-updates made before, for gradients that change in the course of the training.
    loss_of_step : as in `adapt`, of all parameters
    support_set : callable params -> (features, targets, weights), optional
        Of all parameters; for rules in closed form, see `adapt`.
    """

    start: Callable[[Params], tuple[Params, Params, Params]]
    support_loss: LossFunction
    query_loss: Callable[[Params], tuple[Tensor, Any]]
    rule: UpdateRule
    alpha: float
    steps: int
    differentiator: Differentiator
    batched: bool
    proximal: float = 0.0
    update: int = 0
    loss_of_step: Callable[[int, Params], Tensor] | None = None
    support_set: Callable[[Params], tuple[Tensor, Tensor, Tensor | None]] | None = None

    @property
    def how(self) -> dict[str, Any]:
        """How a step is taken: arguments of `adapt`."""
        return {
            "rule": self.rule,
            "alpha": self.alpha,
            "differentiator": self.differentiator,
            "batched": self.batched,
            "proximal": self.proximal,
        }

    def adapt(
        self,
        meta_params: Params,
        order: int,
        on_step: Callable[[Params], None] | None = None,
    ) -> Params:
        """All parameters after the inner steps; `order` as in `inner_loop.adapt`.

        `on_step` is told of all parameters after every step.
        """
        fast, shared, rates = self.start(meta_params)
        of_step = self.loss_of_step
        support_set = self.support_set
        initial = {**shared, **fast}
        fast = adapt(
            fast,
            lambda p: self.support_loss({**shared, **p}),
            rates=rates,
            steps=self.steps,
            order=order,
            on_step=None if on_step is None else lambda p: on_step({**shared, **p}),
            loss_of_step=None if of_step is None else lambda k, p: of_step(k, {**shared, **p}),
            support_set=None if support_set is None else lambda: support_set(initial),
            **self.how,
        )
        return {**shared, **fast}

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at the meta-parameters, and its outputs."""
        return self.differentiator.value_and_grad(function, params)

    def support_grad(self, fast: Params, meta_params: Params) -> Params:
        """Gradient of the support loss in the parameters that adapt, in the graph of both."""
        shared = self.start(meta_params)[1]
        return self.differentiator.grad(lambda p: self.support_loss({**shared, **p}), fast, 2)

    def pull_back(
        self, function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Products with the Jacobian of `function` at `inputs`, for any number of cotangents."""
        return self.differentiator.pull_back(function, inputs)


@dataclasses.dataclass
class RecomputedSteps(InnerProblem):
    """The inner problem for second-order meta-gradients that keep no graph of the inner steps.

    `value_and_grad` takes functions that adapt by calling `adapt` with the meta-parameters they
    got. It takes the steps without a graph, keeping the parameters and the
    state of the rule from before each, and differentiates the function with respect to what it
    adapted to. Then it sweeps back over the steps, building the graph of one at a time, and
    multiplies with the Jacobian of that step (Griewank & Walther 2008, ch. 12: a checkpoint at
    every step).

    Attributes
    ----------
    module : Module
        What `support_loss` runs: its buffers must stay as they are.
    random : bool
        Whether the module may draw random numbers, which then are drawn again in the sweep. It
        sets torch's generators back, so threads must take turns.
    """

    module: nn.Module = dataclasses.field(default_factory=nn.Module)
    random: bool = False
    _given: Params | None = None
    _adapted: Params = dataclasses.field(default_factory=dict)

    def adapt(
        self,
        meta_params: Params,
        order: int,
        on_step: Callable[[Params], None] | None = None,
    ) -> Params:
        """All parameters after the inner steps; see `InnerProblem.adapt`."""
        if meta_params is self._given and order == 2 and on_step is None:
            return {**self.start(meta_params)[1], **self._adapted}
        return super().adapt(meta_params, order, on_step)

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at the meta-parameters, and its outputs."""
        differentiator = self.differentiator
        kept, fast, state = self._forward(params)
        names = list(fast)

        def of_adapted(joint: Params) -> tuple[Tensor, Any]:
            self._given = {name: joint[name] for name in params}
            self._adapted = {name: joint[f"adapted.{name}"] for name in names}
            try:
                return function(self._given)
            finally:
                self._given, self._adapted = None, {}

        grads, outputs = differentiator.value_and_grad(
            of_adapted, {**params, **{f"adapted.{name}": p for name, p in fast.items()}}
        )
        cotangents = [grads.pop(f"adapted.{name}") for name in names]
        cotangents += [torch.zeros_like(t) for t in _split_state(state)[0]]
        del fast, state
        # a step sees the initial values of what adapts through the step before it alone
        seen = [name for name in params if name.removeprefix("module.") not in names]
        with self._forked_generators():
            while kept:
                fast, state, generators = kept.pop()
                self._set_generators(generators)
                cotangents, of_seen = self._pull_back(
                    len(kept), params, seen, fast, state, cotangents
                )
                for name, g in zip(seen, of_seen, strict=True):
                    grads[name] = grads[name] + g

        def begin(meta: list[Tensor]) -> list[Tensor]:
            fast, _, _ = self.start(dict(zip(params, meta, strict=True)))
            return [*fast.values(), *_split_state(self.rule.start(fast))[0]]

        of_start = differentiator.vjp(begin, list(params.values()), cotangents)
        total = {n: grads[n] + g for n, g in zip(params, of_start, strict=True)}
        return total, outputs

    def _forward(self, meta: Params) -> tuple[list[tuple[Params, Any, list[Tensor]]], Params, Any]:
        """Adapt without a graph; return what each step started from, and where they ended."""
        cut = self.differentiator.cut
        fast, shared, rates = self.start(meta)
        initial = fast = cut(fast)
        state = _cut_state(self.rule.start(fast))
        buffers = [(b, b._version) for b in self.module.buffers()]
        kept = []
        for k in range(self.steps):
            kept.append((fast, state, self._generators()))
            fast, state = _step(
                k,
                fast,
                state,
                lambda p: self.support_loss({**shared, **p}),
                initial=initial,
                rates=rates,
                order=0,
                **self.how,
            )
            fast, state = cut(fast), _cut_state(state)
        now = list(self.module.buffers())
        if len(now) != len(buffers) or any(
            new is not old or new._version != version
            for new, (old, version) in zip(now, buffers, strict=True)
        ):
            raise ValueError(
                f"{type(self.module).__name__} writes to its buffers in its forward pass, so "
                "computing an inner step again gives another result. Use checkpoint_steps=False "
                "with it, or a module that leaves its buffers alone."
            )
        return kept, fast, state

    def _pull_back(
        self,
        k: int,
        meta: Params,
        seen: list[str],
        fast: Params,
        state: Any,
        cotangents: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Multiply with the Jacobian of step `k`: for what it started from, and for `seen`."""
        carried, with_carried = _split_state(state)
        names = list(fast)

        def step(inputs: list[Tensor]) -> list[Tensor]:
            own = dict(zip(names, inputs, strict=False))
            rest = dict(zip(seen, inputs[len(names) + len(carried) :], strict=True))
            _, shared, rates = self.start({**meta, **rest})
            new, new_state = _step(
                k,
                own,
                with_carried(inputs[len(names) : len(names) + len(carried)]),
                lambda p: self.support_loss({**shared, **p}),
                initial=own,  # plays no part: `proximal` is 0 where steps are recomputed
                rates=rates,
                order=2,
                **self.how,
            )
            return [*(new[name] for name in names), *_split_state(new_state)[0]]

        inputs = [*fast.values(), *carried, *(meta[name] for name in seen)]
        grads = self.differentiator.vjp(step, inputs, cotangents)
        n_own = len(names) + len(carried)
        return grads[:n_own], grads[n_own:]

    # -- random numbers --------------------------------------------------------------------------

    def _generators(self) -> list[Any]:
        return generator_states(accelerators(self.module.parameters())) if self.random else []

    def _set_generators(self, states: list[Any]) -> None:
        if states:
            set_generator_states(accelerators(self.module.parameters()), states)

    def _forked_generators(self) -> Any:
        """Context after which torch's generators are as they were before."""
        if not self.random:
            return contextlib.nullcontext()
        return forked_generators(accelerators(self.module.parameters()))


def _split_state(state: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Tensors of a rule's state that have a derivative, and how to put others in their place."""
    leaves, spec = tree_flatten(state)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(
                "checkpoint_steps needs an update rule whose state is made of dicts, lists and "
                f"tuples of tensors and numbers; got a {type(leaf).__name__} in it. Change the "
                "rule or use checkpoint_steps=False."
            )
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]

    def with_tensors(tensors: list[Tensor]) -> Any:
        new = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            new[i] = tensor
        return tree_unflatten(new, spec)

    return [leaves[i] for i in places], with_tensors


def _cut_state(state: Any) -> Any:
    tensors, with_tensors = _split_state(state)
    return with_tensors([t.detach() for t in tensors])
