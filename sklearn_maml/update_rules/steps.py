"""Rules that take gradient steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sklearn_maml._validation import is_integer, is_number
from sklearn_maml.theta import Params
from sklearn_maml.update_rules.base import TaskSolver, UpdateRule


def clip_gradient(grads: Params, max_norm: float, batched: bool) -> Params:
    """Scale the gradient of each task to at most `max_norm` (2-norm over all parameters)."""
    squares = [
        g.square().flatten(1).sum(1) if batched else g.square().sum() for g in grads.values()
    ]
    norm = torch.stack(squares).sum(0)
    # eps inside the root: the derivative of sqrt is infinite at 0
    scale = (max_norm / (norm + 1e-12).sqrt()).clamp(max=1.0)
    return {
        name: g * (scale.reshape(-1, *[1] * (g.ndim - 1)) if batched else scale)
        for name, g in grads.items()
    }


class GradientRule(UpdateRule):
    """Base class of rules that take gradient steps, whose gradients may be clipped.

    Parameters
    ----------
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.
    """

    def __init__(self, max_grad_norm: float | None = None) -> None:
        self.max_grad_norm = max_grad_norm

    def check(self) -> None:
        """Refuse a `max_grad_norm` that is not positive."""
        norm = self.max_grad_norm
        if norm is not None and not (is_number(norm) and norm > 0):
            raise ValueError(
                f"max_grad_norm of the update rule must be positive or None; got {norm!r}."
            )

    def _clipped(self, grads: Params, batched: bool) -> Params:
        """Gradients of at most `max_grad_norm` for each task; see `UpdateRule.step`."""
        if self.max_grad_norm is None:
            return grads
        return clip_gradient(grads, self.max_grad_norm, batched)

    def _check_fraction(self, name: str) -> None:
        value = getattr(self, name)
        if not (is_number(value) and 0 <= value < 1):
            raise ValueError(
                f"{name} of the update rule {type(self).__name__} must be at least 0 and less "
                f"than 1; got {value!r}."
            )


class _LinearRule(GradientRule):
    """Gradient steps whose rates are linear factors: ``params - rate * clipped gradient``."""

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        """Rate of each parameter in step `k`, which broadcasts to the parameter."""
        raise NotImplementedError

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move each parameter by its rate times its gradient; see `UpdateRule.step`."""
        grads = self._clipped(grads, batched)
        rate = self._rates_of_step(k, params, alpha=alpha, rates=rates)
        return {name: p - rate[name] * grads[name] for name, p in params.items()}, state

    def _n_rates(self, rates: Params) -> int:
        """Return how many steps have rates of their own."""
        return 1

    def linear_rates(self, params: Params, *, alpha: float, rates: Params) -> list[Params] | None:
        """Rates of the steps; see `UpdateRule.linear_rates` and `norm_of_steps`."""

        def full(k: int) -> Params:
            rate = self._rates_of_step(k, params, alpha=alpha, rates=rates)
            return {
                name: rate[name].expand_as(p)
                if isinstance(rate[name], Tensor)
                else torch.full_like(p, rate[name])
                for name, p in params.items()
            }

        return [full(k) for k in range(self._n_rates(rates))]


def norm_of_steps(rule: TaskSolver) -> float | None:
    """Norm that gradients are clipped to before `linear_rates`; a step of one's own clips none."""
    return rule.max_grad_norm if type(rule).step is _LinearRule.step else None


class SGD(_LinearRule):
    """Plain gradient steps, ``theta <- theta - alpha * gradient`` (Finn et al. 2017, eq. 1).

    Parameters
    ----------
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.update_rules import SGD
    >>> reg = MAMLRegressor(update_rule=SGD(max_grad_norm=10.0))
    >>> reg.set_params(update_rule__max_grad_norm=1.0).update_rule
    SGD(max_grad_norm=1.0)
    """

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        return dict.fromkeys(params, alpha)


class MetaSGD(_LinearRule):
    """Gradient steps with a learned rate for each parameter (Li et al. 2017, eq. 2).

    The rate of a parameter is ``alpha * exp(s)`` with ``s`` meta-learned from 0, so it stays
    positive and still scales with `alpha`.

    Parameters
    ----------
    per : {"weight", "tensor"}, default="weight"
        One rate for each single weight, as published, or one for each parameter tensor.
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.update_rules import MetaSGD
    >>> MAMLRegressor(update_rule=MetaSGD(per="tensor")).update_rule
    MetaSGD(per='tensor')
    """

    def __init__(self, per: str = "weight", max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm=max_grad_norm)
        self.per = per

    def check(self) -> None:
        """Refuse a `per` that is not known."""
        super().check()
        if self.per not in ("weight", "tensor"):
            raise ValueError(
                f"MetaSGD got per={self.per!r}; expected 'weight' (a rate for each weight) or "
                "'tensor' (a rate for each parameter tensor)."
            )

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Log-factors of the rates, all 0; see `TaskSolver.initial_rates`."""
        return {
            name: torch.zeros_like(p) if self.per == "weight" else p.new_zeros(())
            for name, p in params.items()
        }

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        return {name: alpha * rates[name].exp() for name in params}


class PerLayerPerStep(_LinearRule):
    """Gradient steps with a learned rate for each tensor and step (Antoniou et al. 2019, sec. 4).

    The per-layer per-step learning rates (LSLR) of MAML++. The rate of a parameter tensor in a
    step is ``alpha * exp(s)`` with ``s`` meta-learned from 0: it starts at `alpha`, still scales
    with it, and stays positive, where the rates of MAML++ may change their sign. Steps beyond
    those that have rates, in `adapt` with more `adapt_steps` say, take the rates of the last one.

    Parameters
    ----------
    n_steps : int, default=None
        Number of steps that have rates of their own; None takes `steps` of the estimator.
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(
    ...     steps=3, update_rule="per-layer-per-step", max_iter=10, random_state=0
    ... ).fit(X, y, groups=task)
    >>> {name: tuple(s.shape) for name, s in reg.net_.module_.rule.items()}["0__weight"]
    (3,)
    """

    def __init__(self, n_steps: int | None = None, max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm=max_grad_norm)
        self.n_steps = n_steps

    def check(self) -> None:
        """Refuse an `n_steps` that is no positive number."""
        super().check()
        if self.n_steps is not None and not (is_integer(self.n_steps) and self.n_steps >= 1):
            raise ValueError(
                f"PerLayerPerStep got n_steps={self.n_steps!r}; expected a positive int, or None "
                "for the steps of the estimator."
            )

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Log-factors of the rates of each step, all 0; see `TaskSolver.initial_rates`."""
        n_steps = max(steps, 1) if self.n_steps is None else int(self.n_steps)
        return {name: p.new_zeros(n_steps) for name, p in params.items()}

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        k = min(k, self._n_rates(rates) - 1)
        return {name: alpha * rates[name][k].exp() for name in params}

    def _n_rates(self, rates: Params) -> int:
        return next(iter(rates.values())).shape[-1]


class LearnedAlpha(_LinearRule):
    """Gradient steps with one learned rate for all parameters and steps.

    The rate is ``alpha * exp(s)`` with ``s`` meta-learned from 0: the least that can be learned
    of the rates; `PerLayerPerStep` and `MetaSGD` learn more of them.

    Parameters
    ----------
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = MAMLRegressor(
    ...     update_rule="learned-alpha", alpha=0.03, max_iter=10, random_state=0
    ... ).fit(X, y, groups=task)
    >>> alpha = reg.alpha * reg.net_.module_.rule["alpha"].exp().item()
    >>> 0.02 < alpha < 0.05
    True
    """

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Log-factor of the rate, 0; see `TaskSolver.initial_rates`."""
        return {"alpha": next(iter(params.values())).new_zeros(())}

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        return dict.fromkeys(params, alpha * rates["alpha"].exp())


class Momentum(GradientRule):
    """Gradient steps with momentum (Polyak 1964; Nesterov's form as in Sutskever et al. 2013).

    With the gradient ``g``, a step is ``v <- momentum * v + g``, ``theta <- theta - alpha * v``;
    Nesterov's takes ``g + momentum * v`` in place of ``v``. Every task starts with ``v = 0``, and
    a second-order meta-gradient flows through ``v``, too.

    Parameters
    ----------
    momentum : float, default=0.9
        Part of the step before that is kept, at least 0 and less than 1.
    nesterov : bool, default=False
        Whether steps are Nesterov's.
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.update_rules import Momentum
    >>> MAMLRegressor(alpha=0.003, update_rule=Momentum(nesterov=True)).update_rule
    Momentum(nesterov=True)
    """

    def __init__(
        self, momentum: float = 0.9, nesterov: bool = False, max_grad_norm: float | None = None
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm)
        self.momentum = momentum
        self.nesterov = nesterov

    def check(self) -> None:
        """Refuse a `momentum` that is not in [0, 1)."""
        super().check()
        self._check_fraction("momentum")

    def start(self, params: Params) -> Params:
        """Velocities, all 0; see `UpdateRule.start`."""
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move the parameters by their velocities; see `UpdateRule.step`."""
        grads = self._clipped(grads, batched)
        velocity = {name: self.momentum * v + grads[name] for name, v in state.items()}
        moves = velocity
        if self.nesterov:
            moves = {name: grads[name] + self.momentum * v for name, v in velocity.items()}
        return {name: p - alpha * moves[name] for name, p in params.items()}, velocity


class Adam(GradientRule):
    """Steps of Adam (Kingma & Ba 2015, algorithm 1), each task with moments of its own from 0.

    The root of the second moment is smoothed, ``m / sqrt(v + eps^2)`` in place of
    ``m / (sqrt(v) + eps)``: the two agree where ``sqrt(v)`` is 0 or large against `eps`, and this
    one has a derivative where gradients are 0 (dead units, say), which second-order
    meta-gradients need. Meta-gradients through Adam grow where inner gradients are small; a larger
    `eps` tames them. `Reptile` is published with ``Adam(beta1=0)`` (Nichol et al. 2018, sec. 6.1).

    Parameters
    ----------
    beta1, beta2 : float, default=0.9 and 0.999
        Decay of the first and the second moment, at least 0 and less than 1.
    eps : float, default=1e-8
        Gradients that are small against it are not scaled up further; positive.
    max_grad_norm : float, default=None
        Clip the gradient of each task to this 2-norm before the step; None does not clip.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> reg = MAMLRegressor(alpha=0.01, update_rule="adam", update_rule__beta1=0.0)
    >>> reg.get_params()["update_rule__beta1"]
    0.0
    """

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm)
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    def check(self) -> None:
        """Refuse decays that are not in [0, 1) and an `eps` that is not positive."""
        super().check()
        self._check_fraction("beta1")
        self._check_fraction("beta2")
        if not (is_number(self.eps) and 0 < self.eps < math.inf):
            raise ValueError(
                f"eps of the update rule Adam must be positive and finite; got {self.eps!r}. "
                "Without it the derivative of a step is not finite where a gradient is 0."
            )

    def start(self, params: Params) -> dict[str, Params]:
        """Moments, all 0; see `UpdateRule.start`."""
        return {
            moment: {name: torch.zeros_like(p) for name, p in params.items()}
            for moment in ("first", "second")
        }

    def step(
        self,
        k: int,
        params: Params,
        grads: Params,
        *,
        alpha: float,
        rates: Params,
        state: Any,
        batched: bool,
    ) -> tuple[Params, Any]:
        """Move the parameters by their scaled first moments; see `UpdateRule.step`."""
        grads = self._clipped(grads, batched)
        first = {n: self.beta1 * m + (1 - self.beta1) * grads[n] for n, m in state["first"].items()}
        second = {
            n: self.beta2 * v + (1 - self.beta2) * grads[n].square()
            for n, v in state["second"].items()
        }
        rate = alpha / (1 - self.beta1 ** (k + 1))
        unbias = 1 / (1 - self.beta2 ** (k + 1))
        new = {
            n: p - rate * first[n] / (unbias * second[n] + self.eps**2).sqrt()
            for n, p in params.items()
        }
        return new, {"first": first, "second": second}
