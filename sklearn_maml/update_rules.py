"""Update rules: how one inner step moves the adapted parameters.

A rule is a small object with parameters of its own (searchable as ``update_rule__*``); what it
*learns* (rates, say) are meta-parameters that the outer loop optimises beside the initialisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

from sklearn_maml._validation import is_integer, is_number

__all__ = [
    "SGD",
    "Adam",
    "ClosedFormHead",
    "LearnedAlpha",
    "LogisticHead",
    "MetaSGD",
    "Momentum",
    "PerLayerPerStep",
    "RidgeHead",
    "UpdateRule",
    "has_linear_rates",
    "resolve_update_rule",
]

Params = dict[str, Tensor]


class UpdateRule(BaseEstimator):
    """Base class of update rules.

    Subclasses implement `step`; those with learned rates also `initial_rates`. All tensors of
    `params` and `grads` carry a leading task axis when `batched` is true.

    Attributes
    ----------
    in_closed_form : bool
        Whether the rule solves for the adapted parameters and takes no steps; then it implements
        `ClosedFormHead.solve` in place of `step`.
    """

    in_closed_form = False

    def check(self) -> None:
        """Refuse parameters of the rule that are out of range (there are none here)."""

    def check_with(self, meta_gradient: Any, classification: bool) -> None:
        """Refuse what the rule cannot work with (there is nothing here).

        Parameters
        ----------
        meta_gradient : MetaGradient
        classification : bool
            Whether the outputs are logits.
        """

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Learned quantities of the rule, as tensors the outer loop optimises (none here).

        Parameters
        ----------
        params : dict of str to Tensor
            The adapted parameters, without a task axis.
        steps : int
            Inner steps of meta-training.
        classification : bool
            Whether the outputs are logits.

        Returns
        -------
        rates : dict of str to Tensor
            By names of parameters, or names of one's own.
        """
        return {}

    def start(self, params: Params) -> Any:
        """State carried from step to step (none here).

        Parameters
        ----------
        params : dict of str to Tensor
            The initialisation.

        Returns
        -------
        state : object
        """
        return None

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
        """Move the parameters by one inner step.

        Parameters
        ----------
        k : int
            Number of the step, from 0.
        params, grads : dict of str to Tensor
            Parameters and the gradient of the support loss at them.
        alpha : float
            Inner rate.
        rates : dict of str to Tensor
            Current values of what `initial_rates` returned.
        state : object
            What the previous step (or `start`) returned.
        batched : bool
            Whether the tensors have a leading task axis.

        Returns
        -------
        params : dict of str to Tensor
        state : object
        """
        raise NotImplementedError

    def linear_rates(self, params: Params, *, alpha: float, rates: Params) -> list[Params] | None:
        """Rates of a rule whose step is ``params - rate * gradient``, for compiled kernels.

        Parameters
        ----------
        params : dict of str to Tensor
            The adapted parameters, without a task axis.
        alpha : float
            Inner rate.
        rates : dict of str to Tensor
            Current values of what `initial_rates` returned.

        Returns
        -------
        linear_rates : list of dicts of str to Tensor, or None
            A rate for each weight, with the shapes of `params`, differentiable in `rates`; step
            k uses entry k, and steps beyond the list use its last entry. None (the default) if
            steps of the rule are anything else. A class that overrides `step` must override
            this, too.
        """
        return None


def has_linear_rates(rule: UpdateRule) -> bool:
    """Whether `linear_rates` of a rule speaks for the `step` that it has."""

    def owner(method: str) -> type:
        return next(c for c in type(rule).__mro__ if method in c.__dict__)

    return issubclass(owner("linear_rates"), owner("step"))


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
        """Rates of the steps, unless gradients are clipped; see `UpdateRule.linear_rates`."""
        if self.max_grad_norm is not None:
            return None

        def full(k: int) -> Params:
            rate = self._rates_of_step(k, params, alpha=alpha, rates=rates)
            return {
                name: rate[name].expand_as(p)
                if isinstance(rate[name], Tensor)
                else torch.full_like(p, rate[name])
                for name, p in params.items()
            }

        return [full(k) for k in range(self._n_rates(rates))]


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

    def __init__(self, max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm=max_grad_norm)

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        """`alpha` for every parameter."""
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
        """Log-factors of the rates, all 0; see `UpdateRule.initial_rates`."""
        return {
            name: torch.zeros_like(p) if self.per == "weight" else p.new_zeros(())
            for name, p in params.items()
        }

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        """Learned rates, the same in every step."""
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
        """Log-factors of the rates of each step, all 0; see `UpdateRule.initial_rates`."""
        n_steps = max(steps, 1) if self.n_steps is None else int(self.n_steps)
        return {name: p.new_zeros(n_steps) for name, p in params.items()}

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        """Learned rates of step `k`, or of the last one that has them."""
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

    def __init__(self, max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm=max_grad_norm)

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Log-factor of the rate, 0; see `UpdateRule.initial_rates`."""
        return {"alpha": next(iter(params.values())).new_zeros(())}

    def _rates_of_step(
        self, k: int, params: Params, *, alpha: float, rates: Params
    ) -> dict[str, Any]:
        """Learned rate, the same for all."""
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


class ClosedFormHead(UpdateRule):
    """Base class of rules that solve for the last linear layer (Bertinetto et al. 2019).

    Parameters
    ----------
    lam : float
        Strength of the penalty at the start of meta-training, where it is learned.
    """

    in_closed_form = True
    # Scale of the logits at the start. Accuracy after 100 updates on Omniglot, 5-way 1-shot and
    # 5-shot, with 1, 3, 10, 30: ridge 0.62, 0.67, 0.70, 0.70 and 0.80, 0.83, 0.87, 0.86; logistic
    # 0.68, 0.70, 0.69, 0.65 and 0.85, 0.88, 0.86, 0.82
    _scale = 1.0

    def __init__(self, lam: float = 1.0) -> None:
        self.lam = lam

    def check(self) -> None:
        """Refuse a `lam` that is not positive."""
        if not (is_number(self.lam) and 0 < self.lam < math.inf):
            raise ValueError(
                f"lam of the update rule {type(self).__name__} must be positive and finite; got "
                f"{self.lam!r}."
            )

    def check_with(self, meta_gradient: Any, classification: bool) -> None:
        """Refuse meta-gradients that need inner steps; see `UpdateRule.check_with`."""
        if meta_gradient.order not in (1, 2) or meta_gradient.proximal:
            raise ValueError(
                f"The update rule {type(self).__name__} solves for the head and takes no gradient "
                f"steps, which meta_gradient={meta_gradient!r} is about. Set "
                "meta_gradient='second-order' (exact) or 'first-order' (the solution taken as a "
                "constant)."
            )

    def initial_rates(self, params: Params, steps: int = 1, classification: bool = False) -> Params:
        """Log-factors of `lam` and of the scale of logits; see `UpdateRule.initial_rates`."""
        zero = next(iter(params.values())).new_zeros(())
        return {"lam": zero, "scale": zero.clone()} if classification else {"lam": zero}

    def solve(
        self,
        params: Params,
        features: Tensor,
        y: Tensor,
        weight: Tensor | None,
        *,
        rates: Params,
        order: int,
    ) -> Params:
        """Solve for the parameters of the last linear layer.

        Parameters
        ----------
        params : dict of str to Tensor
            Weight (..., n_outputs, n_features) of the layer and, if it has one, its bias
            (..., n_outputs); only their shapes matter.
        features : Tensor of shape (..., n_rows, n_features)
            Inputs of the layer on the support rows.
        y : Tensor of shape (..., n_rows, n_outputs), or int64 (..., n_rows) for classes
        weight : Tensor of shape (..., n_rows) or None
            Weights that sum to one, 0 for padding; None for equal weights.
        rates : dict of str to Tensor
            Current values of what `initial_rates` returned.
        order : {0, 1, 2}
            2 to differentiate through the solution, less to take it as a constant; the scale of
            the logits is differentiated either way.

        Returns
        -------
        params : dict of str to Tensor
            With the names of `params`.
        """
        by_kind = {name.rpartition(".")[2]: name for name in params}
        n_outputs = params[by_kind["weight"]].shape[-2]
        lam = self.lam * rates["lam"].exp()
        if order < 2:
            features, lam = features.detach(), lam.detach()
        if weight is None:
            row_weight = features.new_ones(features.shape[:-1])
        else:  # as many as there are rows, in all, so that `lam` means the same with weights
            row_weight = weight * (weight > 0).sum(-1, keepdim=True)
        classification = not y.is_floating_point()
        if classification:  # not one_hot, which vmap does not know for every version of torch
            y = (y.unsqueeze(-1) == torch.arange(n_outputs, device=y.device)).to(features.dtype)
        own, bias = self._solution(features, y, row_weight, lam, "bias" in by_kind)
        if classification:
            scale = self._scale * rates["scale"].exp()
            own, bias = scale * own, None if bias is None else scale * bias
        solved = {by_kind["weight"]: own}
        return solved if bias is None else {**solved, by_kind["bias"]: bias}

    def _solution(
        self, features: Tensor, y: Tensor, weight: Tensor, lam: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight (..., n_outputs, n_features) and bias (..., n_outputs) of the layer."""
        raise NotImplementedError


def _penalized(X: Tensor, weight: Tensor, r: Tensor, lam: Tensor) -> Tensor:
    """Solve ``(X' A X + lam) v = X' r`` with ``A = diag(weight)``, in the smaller of two systems.

    With fewer rows than columns it is ``v = X' u`` with ``(A X X' + lam) u = r``, where rows with
    weight 0 and ``r = 0`` drop out.
    """
    n_rows, n_columns = X.shape[-2:]
    if n_rows < n_columns:
        system = weight.unsqueeze(-1) * (X @ X.mT)
    else:
        system = X.mT @ (weight.unsqueeze(-1) * X)
    # a `lam` that is learned may become too small against the rounding of the products
    diagonal = system.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = lam + torch.finfo(X.dtype).eps * diagonal
    identity = torch.eye(system.shape[-1], dtype=X.dtype, device=X.device)
    system = system + ridge[..., None, None] * identity
    # a singular system must not stop the other tasks: its solution is not finite
    if n_rows < n_columns:
        return X.mT @ torch.linalg.solve_ex(system, r)[0]
    return torch.linalg.solve_ex(system, X.mT @ r)[0]


class RidgeHead(ClosedFormHead):
    """Ridge regression on the features solves for the last layer (R2-D2; Bertinetto et al. 2019).

    Adapting finds the weights ``W`` and the intercept ``b`` of the last linear layer with the
    smallest ``sum_i a_i |W x_i + b - y_i|^2 + lam |W|^2`` over the support rows (eq. 4), where
    ``x`` are the inputs of that layer and the row weights ``a_i`` are 1, or proportional to
    `sample_weight` with mean 1. With fewer rows than features it solves for one number a row
    (eq. 5). The intercept is not penalised: features and targets are centred. A layer without bias
    has none.

    For the classifier the targets are 1 for the class of a row and 0 for the others, and the
    solution is multiplied by a learned scale, as in eq. 6; that equation's offset, the same for
    all logits, cancels in the cross-entropy and is left out.

    The rest of the network, `lam` and the scale are meta-learned, with the exact gradient through
    the solution. It needs ``adapted="head"`` and a module that ends in a `torch.nn.Linear`.
    `alpha` and how the head was initialised play no part, and any number of `steps` but 0 gives the
    solution; 0 gives the head as it was initialised, which nothing trains.

    Parameters
    ----------
    lam : float, default=1.0
        Strength of the penalty at the start of meta-training; it is ``lam * exp(s)`` with ``s``
        meta-learned from 0.

    Examples
    --------
    >>> from sklearn_maml import MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=200, n_rows=20, random_state=0)
    >>> reg = MAMLRegressor(
    ...     update_rule="ridge-head", adapted="head", steps=1, max_iter=300, random_state=0
    ... ).fit(X, y, groups=task)
    >>> X_new, y_new, new = make_sinusoid_tasks(n_tasks=50, n_rows=20, random_state=1)
    >>> reg.score(X_new, y_new, groups=new + 1000) > 0.8
    True
    """

    _scale = 10.0

    def _solution(
        self, features: Tensor, y: Tensor, weight: Tensor, lam: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        a = weight.unsqueeze(-1)
        if not has_bias:
            return _penalized(features, weight, a * y, lam).mT, None
        total = a.sum(-2, keepdim=True)
        x_mean, y_mean = ((a * t).sum(-2, keepdim=True) / total for t in (features, y))
        own = _penalized(features - x_mean, weight, a * (y - y_mean), lam).mT
        return own, (y_mean - x_mean @ own.mT).squeeze(-2)


class LogisticHead(ClosedFormHead):
    """Logistic regression on the features solves for the last layer (LR-D2; Bertinetto 2019).

    For `MAMLClassifier`. For each output, adapting takes `newton_steps` Newton steps from 0, each
    a weighted ridge regression (iteratively reweighted least squares, sec. 3.3), towards the
    smallest ``sum_i a_i log(1 + exp(-y_i f_i)) + lam / 2 (|w|^2 + b^2)`` with ``f_i = w . x_i + b``
    over the support rows, where ``x`` are the inputs of the last linear layer, ``y_i`` is 1 if the
    row is of the class of that output (one against the rest) and -1 otherwise, and the row weights
    ``a_i`` are 1, or proportional to `sample_weight` with mean 1. The intercept is penalised like
    the weights, so that support sets of one class have a solution, too. All logits are multiplied
    by a learned scale.

    The rest of the network, `lam` and the scale are meta-learned, with the exact gradient through
    the Newton steps. It needs ``adapted="head"`` and a module that ends in a `torch.nn.Linear`.
    `alpha` and how the head was initialised play no part, and any number of `steps` but 0 gives the
    solution; 0 gives the head as it was initialised, which nothing trains.

    Parameters
    ----------
    lam : float, default=1.0
        Strength of the penalty at the start of meta-training; it is ``lam * exp(s)`` with ``s``
        meta-learned from 0.
    newton_steps : int, default=5
        Newton steps.

    Examples
    --------
    >>> from sklearn_maml import MAMLClassifier
    >>> from sklearn_maml.datasets import load_omniglot
    >>> X, y = load_omniglot(subset="background", return_X_y=True)
    >>> clf = MAMLClassifier(
    ...     n_ways=5, n_shots=1, update_rule="logistic-head", adapted="head", max_iter=30,
    ...     random_state=0,
    ... ).fit(X, y)
    >>> clf.score(X, y) > 0.4
    True
    """

    _scale = 3.0

    def __init__(self, lam: float = 1.0, newton_steps: int = 5) -> None:
        super().__init__(lam=lam)
        self.newton_steps = newton_steps

    def check(self) -> None:
        """Refuse a `newton_steps` that is no positive number."""
        super().check()
        if not is_integer(self.newton_steps) or self.newton_steps < 1:
            raise ValueError(
                f"LogisticHead got newton_steps={self.newton_steps!r}; expected a positive int."
            )

    def check_with(self, meta_gradient: Any, classification: bool) -> None:
        """Refuse regression, too; see `UpdateRule.check_with`."""
        super().check_with(meta_gradient, classification)
        if not classification:
            raise ValueError(
                "The update rule LogisticHead is for classes: use it with MAMLClassifier, or set "
                "update_rule='ridge-head'."
            )

    def _solution(
        self, features: Tensor, y: Tensor, weight: Tensor, lam: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if has_bias:
            one = features.new_ones((*features.shape[:-1], 1))
            features = torch.cat([features, one], dim=-1)
        # an axis for the outputs, each with a problem of its own
        X, y, weight = features.unsqueeze(-3), y.mT, weight.unsqueeze(-2)
        f = torch.zeros_like(y)
        v = f
        for _ in range(self.newton_steps):
            p = f.sigmoid()
            curvature = weight * p * (-f).sigmoid()
            v = _penalized(X, curvature, (curvature * f + weight * (y - p)).unsqueeze(-1), lam)
            f = (X @ v).squeeze(-1)
        v = v.squeeze(-1)
        return (v[..., :-1], v[..., -1]) if has_bias else (v, None)


UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "sgd": SGD,
    "meta-sgd": MetaSGD,
    "per-layer-per-step": PerLayerPerStep,
    "learned-alpha": LearnedAlpha,
    "momentum": Momentum,
    "adam": Adam,
    "ridge-head": RidgeHead,
    "logistic-head": LogisticHead,
}


def resolve_update_rule(value: Any, options: dict[str, Any]) -> UpdateRule:
    """Return the rule that `update_rule` names, built with ``update_rule__*`` options."""
    if isinstance(value, UpdateRule):
        rule = clone(value).set_params(**options)
        rule.check()
        return rule
    if isinstance(value, str) and value in UPDATE_RULES:
        known = sorted(UPDATE_RULES[value]().get_params())
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"update_rule={value!r} got the options {unknown}; it takes {known}.")
        rule = UPDATE_RULES[value](**options)
        rule.check()
        return rule
    raise ValueError(
        f"update_rule={value!r} is not known. Expected one of {sorted(UPDATE_RULES)} or an "
        "UpdateRule object such as sklearn_maml.update_rules.SGD()."
    )
