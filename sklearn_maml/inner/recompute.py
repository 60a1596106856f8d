"""Inner steps for second-order meta-gradients that have to fit into little memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sklearn_maml.devices import (
    accelerators,
    forked_generators,
    generator_states,
    set_generator_states,
)
from sklearn_maml.inner.problem import InnerProblem
from sklearn_maml.theta import Params


@dataclasses.dataclass
class RecomputedSteps(InnerProblem):
    """The inner problem for second-order meta-gradients that keep no graph of the inner steps.

    `value_and_grad` takes functions that adapt by calling `adapt` with the meta-parameters they
    got. It takes the steps without a graph, keeping the parameters and the
    state of the rule from before each, and differentiates the function with respect to what it
    adapted to. Then it sweeps back over the steps, building the graph of one at a time, and
    multiplies with the Jacobian of that step (Griewank & Walther 2008, ch. 12: a checkpoint at
    every step).
    """

    # what `support_loss` runs: its buffers must stay as they are
    module: nn.Module = dataclasses.field(default_factory=nn.Module)
    # whether it may draw random numbers, which then are drawn again in the sweep: that sets torch's
    # generators back, so threads must take turns
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
            return {**self.start(meta_params).shared, **self._adapted}
        return super().adapt(meta_params, order, on_step)

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Params, tuple[Tensor, Any]]:
        """Gradient of the first output of `function` at the meta-parameters, and its outputs."""
        kept, fast, state = self._forward(params)

        def of_adapted(given: Params, adapted: Params) -> tuple[Tensor, Any]:
            self._given, self._adapted = given, adapted
            try:
                return function(given)
            finally:
                self._given, self._adapted = None, {}

        (grads, of_fast), outputs = self.differentiator.value_and_grad(of_adapted, params, fast)
        cotangents = [*of_fast.values(), *map(torch.zeros_like, _split_state(state)[0])]
        del fast, state
        # a step sees the initial values of what adapts through the step before it alone
        seen = self.parts.others(params)
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
            fast = self.start(dict(zip(params, meta, strict=True))).fast
            return [*fast.values(), *_split_state(self.rule.start(fast))[0]]

        of_start = self.differentiator.vjp(begin, list(params.values()), cotangents)
        total = {n: grads[n] + g for n, g in zip(params, of_start, strict=True)}
        return total, outputs

    def _forward(self, meta: Params) -> tuple[list[tuple[Params, Any, list[Tensor]]], Params, Any]:
        """Adapt without a graph; return what each step started from, and where they ended."""
        cut = self.differentiator.cut
        theta = self.start(meta)
        theta = dataclasses.replace(theta, fast=cut(theta.fast))
        fast, state = theta.fast, _cut_state(self.rule.start(theta.fast))
        buffers = [(b, b._version) for b in self.module.buffers()]
        kept = []
        for k in range(self.steps):
            kept.append((fast, state, self._generators()))
            fast, state = self.step(k, theta, fast, state, 0)
            fast, state = cut(fast), _cut_state(state)
        now = list(self.module.buffers())
        if len(now) != len(buffers) or any(
            new is not old or new._version != version
            for new, (old, version) in zip(now, buffers, strict=True)
        ):
            raise ValueError(
                f"{type(self.module).__name__} writes to its buffers in its forward pass, so "
                "computing an inner step again gives another result. Use "
                "engine__checkpoint_steps=False with it, or a module that leaves its buffers alone."
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
        n_fast, n_own = len(fast), len(fast) + len(carried)

        def step(inputs: list[Tensor]) -> list[Tensor]:
            own = dict(zip(fast, inputs, strict=False))
            rest = dict(zip(seen, inputs[n_own:], strict=True))
            # where it started plays no part: `proximal` is 0 where steps are recomputed
            theta = self.start({**meta, **rest})
            new, new_state = self.step(k, theta, own, with_carried(inputs[n_fast:n_own]), 2)
            return [*(new[name] for name in fast), *_split_state(new_state)[0]]

        inputs = [*fast.values(), *carried, *(meta[name] for name in seen)]
        grads = self.differentiator.vjp(step, inputs, cotangents)
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
                "engine__checkpoint_steps needs an update rule whose state is made of dicts, lists "
                f"and tuples of tensors and numbers; got a {type(leaf).__name__} in it. Change the "
                "rule or use engine__checkpoint_steps=False."
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
