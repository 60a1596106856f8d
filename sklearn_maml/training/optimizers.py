"""Steps of torch's Adam on small networks, without what torch does around its kernel."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils

from sklearn_maml.devices import is_host
from sklearn_maml.engine.tracing.graphs import CudaGraph, captured

# most parameters of a network that are laid end to end: a larger one gains nothing
FLAT_LIMIT = 2**18

# where torch keeps what it made of a method that its compiler is to leave alone
_EXEMPT = "__dynamo_disable"
_KINDS = (torch.optim.Adam, torch.optim.AdamW)
# settings with which torch's own code has to run
_OTHER_CODE = ("foreach", "capturable", "differentiable")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Make and load optimisers without an import of torch's compiler, which takes a second.

    torch keeps its compiler out of some methods of optimisers by a wrapper that imports it. Where
    nobody has, there is nothing to keep out.
    """
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    methods = [getattr(torch.optim.Optimizer, name, None) for name in names]
    wrapped = [getattr(method, "__wrapped__", None) for method in methods]
    untouched = [f for f in wrapped if f is not None and not hasattr(f, _EXEMPT)]
    if "torch._dynamo" in sys.modules:
        untouched = []
    for function in untouched:
        setattr(function, _EXEMPT, function)
    try:
        yield
    finally:
        for function in untouched:
            delattr(function, _EXEMPT)


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimiser the state of another one, which may have been on another device."""
    state = copy.deepcopy(state)
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        # they say where the count of steps is kept, and are for the device at hand
        group.update({name: own[name] for name in ("fused", "capturable") if name in own})
    with without_compiler():
        optimizer.load_state_dict(state)


def settings_on(
    optimizer: Any, chosen: dict[str, Any], params: Sequence[nn.Parameter], device: torch.device
) -> dict[str, Any]:
    """Return settings of an optimiser class that make its steps cheap, unless the user chose."""
    if can_fuse(optimizer, chosen, params, device):
        return {"fused": True}
    free = not {"fused", *_OTHER_CODE} & chosen.keys()
    known = getattr(optimizer, "__module__", "").startswith("torch.optim.")
    if is_host(device) or not (free and known):
        return {}
    # its count of steps is then kept where the decision to make them is
    takes = "capturable" in inspect.signature(optimizer).parameters
    return {"capturable": True} if takes and device.type in _capturing_devices() else {}


def _capturing_devices() -> list[str]:
    tell = getattr(torch_optimizer, "_get_capturable_supported_devices", lambda: ["cuda"])
    return list(tell())


def _fusing_devices() -> list[str]:
    tell = getattr(_foreach_utils, "_get_fused_kernels_supported_devices", lambda: ["cuda"])
    return ["cpu", *tell()]


def can_fuse(
    optimizer: Any, settings: dict[str, Any], params: Sequence[nn.Parameter], device: torch.device
) -> bool:
    """Whether an optimiser class that is not told otherwise may run with ``fused=True``."""
    return (
        optimizer in _KINDS
        and not {"fused", *_OTHER_CODE} & settings.keys()
        and device.type in _fusing_devices()
        and all(p.is_floating_point() for p in params)
    )


def has_fused_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_fused` can stand for the `step` of an optimiser."""
    groups = optimizer.param_groups
    return (
        type(optimizer) in _KINDS
        and hasattr(optimizer, "_init_group")
        and all(group["fused"] and not any(group.get(k) for k in _OTHER_CODE) for group in groups)
        and len({p.device for group in groups for p in group["params"]}) == 1
        and len({p.dtype for group in groups for p in group["params"]}) == 1
    )


def _is_watched(optimizer: Any) -> bool:
    """Whether somebody waits for a call of `step`."""
    # a scheduler of rates counts the calls
    return "step" in vars(optimizer) or _has_hooks(optimizer)


def _has_hooks(optimizer: Any) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def begin(optimizer: Any) -> None:
    """Make the state of an optimiser that `has_fused_kernel`, for parameters with a gradient."""
    for group in optimizer.param_groups:
        optimizer._init_group(group, [], [], [], [], [], [])


def step_fused(optimizer: Any, bad: Tensor | None = None) -> None:
    """Do what ``optimizer.step()`` of Adam or AdamW does, by the same kernel and on the same state.

    torch's record for its profiler and its grouping of the parameters take several times as long
    as the kernel does for a small network. Where `bad`, a float32 tensor without dimensions, is 1,
    and not 0, nothing is to happen; its value stays on the device.
    """
    if _is_watched(optimizer):
        if bad is None:
            optimizer.step()
            return
        optimizer.found_inf = bad  # as torch's own scaler of gradients says it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        return
    state = optimizer.state
    moving = [[p for p in g["params"] if p.grad is not None] for g in optimizer.param_groups]
    if not all(state[p] for params in moving for p in params):
        begin(optimizer)
    with torch.no_grad():
        for group, params in zip(optimizer.param_groups, moving, strict=True):
            if not params:
                continue
            states = [state[p] for p in params]
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1)
            if bad is not None:
                torch._foreach_sub_(steps, [bad] * len(steps))
            moments = [[s[name] for s in states] for name in _moments(group)]
            grads = [p.grad for p in params]
            _run(_kernel(optimizer, group), group, params, grads, moments, steps, bad)


def _kernel(optimizer: Any, group: dict[str, Any]) -> Any:
    decoupled = type(optimizer) is torch.optim.AdamW or group.get("decoupled_weight_decay")
    return torch._fused_adamw_ if decoupled else torch._fused_adam_


def _moments(group: dict[str, Any]) -> list[str]:
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]


def _run(
    kernel: Any,
    group: dict[str, Any],
    params: list[Any],
    grads: list[Any],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    bad: Tensor | None = None,
    rate: Tensor | None = None,
) -> None:
    beta1, beta2 = group["betas"]
    kernel(
        params,
        grads,
        moments[0],
        moments[1],
        moments[2] if group["amsgrad"] else [],
        steps,
        lr=group["lr"] if rate is None else rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        found_inf=bad,
    )


def can_mask(optimizer: Any, device: torch.device) -> bool:
    """Whether `step_masked` can stand for the `step` of an optimiser that has made one."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    return (
        type(optimizer).__module__.startswith("torch.optim.")
        and not _has_hooks(optimizer)
        and all(v is None or (isinstance(v, Tensor) and v.device == device) for v in values)
    )


def step_masked(optimizer: Any, finite: Tensor) -> None:
    """Make a step where `finite` is true, without waiting for its value."""
    moving = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    own = [v for p in moving for v in optimizer.state[p].values() if v is not None]
    with torch.no_grad():
        tensors = [p.detach() for p in moving] + own
        before = [t.clone() for t in tensors]
        optimizer.step()
        for new, old in zip(tensors, before, strict=True):
            torch.where(finite, new, old, out=new)


class FlatStep:
    """`step_fused` for parameters, and a state of the optimiser, that lie end to end.

    One call of the kernel on one long vector then makes the step, and takes a gradient that need
    not be cut into pieces. The parameters and the state stay where the module and the optimiser
    have them, as views of the vectors, until `release` gives them memory of their own again.

    Parameters
    ----------
    optimizer : torch.optim.Adam or torch.optim.AdamW
        For which `can_make` holds.
    params : sequence of Parameter
        All of its parameters, in the order of the gradients.
    """

    def __init__(self, optimizer: Any, params: Sequence[nn.Parameter]) -> None:
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self.kernel = _kernel(optimizer, self.group)
        self.params = list(params)
        self.states = [optimizer.state[p] for p in params]
        with torch.no_grad():
            self.flat = torch.cat([p.detach().flatten() for p in params])
            for p, part in zip(self.params, self._cut(self.flat), strict=True):
                p.data = part
            self.moments = []
            for name in _moments(self.group):
                moment = torch.cat([state[name].flatten() for state in self.states])
                self.moments.append([moment])
                for state, part in zip(self.states, self._cut(moment), strict=True):
                    state[name] = part
            self.steps = torch.stack([state["step"] for state in self.states])
            for state, step in zip(self.states, self.steps, strict=True):
                state["step"] = step
        self.pointers = self._pointers()
        self.shown: Sequence[Tensor | None] = []  # parts of a gradient that callbacks have seen
        # `bounded_step`, captured for what it depends on besides tensors; None where it cannot be
        self._captured: dict[Hashable, CudaGraph | None] = {}
        self._rate = torch.empty((), device=self.flat.device)

    @staticmethod
    def can_make(optimizer: Any, params: Sequence[nn.Parameter]) -> bool:
        """Whether all that the optimiser moves may lie end to end: the same step for all of it."""
        groups, state = optimizer.param_groups, optimizer.state
        if not has_fused_kernel(optimizer) or len(groups) != 1 or _is_watched(optimizer):
            return False
        if {*map(id, params)} != {*map(id, groups[0]["params"])}:
            return False
        return (
            all(state.get(p) and p.is_contiguous() for p in params)
            and sum(p.numel() for p in params) <= FLAT_LIMIT
            and len(set(torch.stack([state[p]["step"] for p in params]).tolist())) == 1
        )

    def _cut(self, whole: Tensor) -> list[Tensor]:
        parts = whole.split([p.numel() for p in self.params])
        return [part.view(p.shape) for p, part in zip(self.params, parts, strict=True)]

    def show(self, grad: Tensor | None) -> None:
        """Give the parameters their parts of a gradient, for callbacks to see and to change."""
        self.shown = [None] * len(self.params) if grad is None else self._cut(grad)
        for p, part in zip(self.params, self.shown, strict=True):
            p.grad = part

    def holds(self, optimizer: Any, params: Sequence[nn.Parameter]) -> bool:
        """Whether these are still all the parameters, and all is where it was put."""
        groups, state = optimizer.param_groups, optimizer.state
        return (
            len(groups) == 1
            and groups[0] is self.group
            and not _is_watched(optimizer)
            and [*map(id, params)] == [*map(id, self.params)]
            and all(state.get(p) is s for p, s in zip(params, self.states, strict=True))
            and self._pointers() == self.pointers
        )

    def _pointers(self) -> list[int]:
        tensors = [p.data for p in self.params]
        tensors += [s[name] for s in self.states for name in (*_moments(self.group), "step")]
        return [tensor.data_ptr() for tensor in tensors]

    def seen(self, grad: Tensor) -> Tensor | None:
        """Return what callbacks have made of a gradient; None if only `optimizer.step` will do."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if len(grads) < len(self.params) or not self.holds(self.optimizer, self.params):
            return None
        if all(g is part for g, part in zip(grads, self.shown, strict=True)):
            return grad
        return torch.cat([g.flatten() for g in grads])

    def step(self, grad: Tensor, bad: Tensor | None = None, rate: Tensor | None = None) -> None:
        """Make a step for the gradients of all parameters, end to end; for `bad` see above."""
        self.steps += 1 if bad is None else 1 - bad
        steps = [self.steps[0]]
        _run(self.kernel, self.group, [self.flat], [grad], self.moments, steps, bad, rate)

    def bounded_step(
        self, losses: Tensor, grad: Tensor, max_norm: float | None, rate: Tensor | None = None
    ) -> Tensor:
        """Make a step for a gradient that is not used any more, and return the mean loss.

        Without a look at values: where they are not finite nothing is to happen, and the loss is
        NaN.
        """
        loss, length = losses.mean(), torch.linalg.vector_norm(grad)
        finite = torch.isfinite(loss) & torch.isfinite(length)
        if max_norm is not None:
            grad.mul_((max_norm / length).clamp(max=1.0))
        self.step(grad, 1.0 - finite.float(), rate)
        return torch.where(finite, loss, math.nan)

    def launch(self, losses: Tensor, grad: Tensor, max_norm: float | None) -> Tensor:
        """Make a `bounded_step` in one launch."""
        fixed = {name: v for name, v in self.group.items() if name not in ("params", "lr")}
        key = (losses.shape, max_norm, *fixed.values())
        if key not in self._captured:
            self._captured[key] = self._capture(losses, grad, max_norm)
        graph = self._captured[key]
        self._rate.fill_(self.group["lr"])
        if graph is None:
            return self.bounded_step(losses, grad, max_norm, self._rate)
        return graph(losses, grad)[0]

    def _capture(self, losses: Tensor, grad: Tensor, max_norm: float | None) -> CudaGraph | None:
        def function(losses: Tensor, grad: Tensor) -> list[Tensor]:
            return [self.bounded_step(losses, grad, max_norm, self._rate)]

        # what the captured kernels are launched for once or more before they are wanted
        state = [self.flat, self.steps, *(moment for (moment,) in self.moments)]
        before = [t.clone() for t in state]
        graph = captured(function, [losses, grad], "The steps of the optimiser")
        for own, value in zip(state, before, strict=True):
            own.copy_(value)
        return graph

    def release(self) -> None:
        """Undo the sharing of memory, which would multiply what is pickled."""
        for p, state in zip(self.params, self.states, strict=True):
            p.data = p.data.clone()
            state.update({name: value.clone() for name, value in state.items()})
