"""What the parameters of an estimator mean, and which of them may change after `fit`."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints
from torch import Tensor, nn

from sklearn_maml._compat import CallbackSupportMixin
from sklearn_maml._validation import PrefixedParamsMixin, as_integer
from sklearn_maml.learners.conditioned import Calibration
from sklearn_maml.learners.learner import Learner
from sklearn_maml.meta_gradients import resolve_meta_gradient
from sklearn_maml.modules import ACTIVATIONS, adapted_names
from sklearn_maml.persistence import SaveMixin
from sklearn_maml.targets.base import Loss, Targets
from sklearn_maml.targets.losses import LOSSES
from sklearn_maml.training.sources import N_MEMBERS, EpisodeSettings
from sklearn_maml.update_rules import TaskSolver, resolve_update_rule

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
# parameters that tuners may give as 3.0
INTEGERS = (
    "hidden_layer_sizes",
    "steps",
    "adapt_steps",
    "n_ways",
    "n_shots",
    "n_queries",
    "meta_batch_size",
    "max_iter",
    "n_iter_no_change",
    "engine__max_tasks_in_memory",
)
# how batches are run: the options ``engine__*``, and what they are by default
ENGINE_OPTIONS = {
    "checkpoint_steps": False,
    "max_tasks_in_memory": None,
    "precision": "full",
    "batch_norm": "inductive",
}
# values that may become others in place
CHANGEABLE = (list, dict, np.ndarray, BaseEstimator, Loss)
# name of a setting that adapting depends on
PROXIMAL = "the proximal term of meta_gradient"


class Parameters(SaveMixin, PrefixedParamsMixin, CallbackSupportMixin, BaseEstimator):
    """Parameters that both estimators have, and what is made of them."""

    module_: nn.Module
    history_: Any
    n_iter_: int
    n_features_in_: int
    feature_names_in_: NDArray[Any]
    n_tasks_: int | None
    tasks_: NDArray[Any] | None
    device_: torch.device
    _targets_class: type[Targets]
    _dtype: Any
    net_: Any
    targets_: Any
    learner_weights_: dict[str, float]
    calibration_: Calibration | None
    _learner: Any
    _fingerprints: dict[Hashable, int]
    _rung: str
    _score_seed: int
    # values of the parameters that have been found to be valid, and to be those of the fit
    _valid: tuple[Any, ...] = ()
    _unchanged: tuple[tuple[Any, ...], Any] = ((), None)
    _prefixes: ClassVar = {
        "module": None,
        "optimizer": None,
        "iterator_train": None,
        "iterator_valid": None,
        "callbacks": None,
        "update_rule": None,
        "meta_gradient": None,
        "engine": ENGINE_OPTIONS,
    }
    _renamed: ClassVar = {name: f"engine__{name}" for name in ENGINE_OPTIONS}
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "loss": [StrOptions({*LOSSES, "cross_entropy", "binary"}), Loss],
        "quantile": [Interval(numbers.Real, 0, 1, closed="neither"), None],
        "hidden_layer_sizes": ["array-like", Interval(numbers.Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "alpha": [Interval(numbers.Real, 0, None, closed="left")],
        "beta": [Interval(numbers.Real, 0, None, closed="neither")],
        "adapted": [str, list, tuple],
        "beta_decay": [Interval(numbers.Real, 0, 1, closed="both")],
        "max_grad_norm": [Interval(numbers.Real, 0, None, closed="neither"), None],
        "steps": [Interval(numbers.Integral, 0, None, closed="left")],
        "adapt_steps": [Interval(numbers.Integral, 0, None, closed="left"), None],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "n_ways": [Interval(numbers.Integral, 2, None, closed="left"), None],
        "n_shots": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "n_queries": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "meta_batch_size": [Interval(numbers.Integral, 1, None, closed="left")],
        "max_iter": [Interval(numbers.Integral, 1, None, closed="left")],
        "early_stopping": ["boolean", StrOptions({"auto"})],
        "validation_fraction": [Interval(numbers.Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(numbers.Integral, 1, None, closed="left")],
        "normalize_y": ["boolean"],
        "center_y": ["boolean"],
        "head": [StrOptions({"free", "shared", "zero"})],
        "engine__checkpoint_steps": ["boolean"],
        "engine__max_tasks_in_memory": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "engine__precision": [StrOptions({"full", "tf32", "bf16"})],
        "engine__batch_norm": [StrOptions({"inductive", "transductive"})],
        "callbacks": [list, tuple, None],
        "device": [str, torch.device],
        "unseen_tasks": [StrOptions({"error", "prior"})],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def _validate_params(self) -> None:
        """Validate parameters; numbers such as 3.0 are integers, too."""
        params = self.get_params(deep=False)
        values = (*params.values(),)
        if _are(values, self._valid):  # a second look takes as long as adapting
            return
        whole = {name: as_integer(params[name]) for name in INTEGERS if name in params}
        validate_parameter_constraints(
            self._parameter_constraints, {**params, **whole}, type(self).__name__
        )
        self._valid = values

    def _integer(self, name: str) -> Any:
        return as_integer(getattr(self, name))

    def _engine_options(self) -> dict[str, Any]:
        options = self._prefixed("engine")
        most = as_integer(options["max_tasks_in_memory"])
        return {**options, "max_tasks_in_memory": most}

    def _make_targets(self) -> Targets:
        """Return what y means by the parameters of now."""
        raise NotImplementedError

    def _episode_settings(self) -> EpisodeSettings:
        return EpisodeSettings(
            self._integer("n_shots"),
            self._integer("n_queries"),
            self.early_stopping,
            self.validation_fraction,
            self._reshape,
        )

    def _own_learner(self) -> Learner | None:
        """Learner that the user gave as `update_rule`, with its ``update_rule__*``."""
        if not isinstance(self.update_rule, Learner):
            return None
        return clone(self.update_rule).set_params(**self._prefixed("update_rule"))

    def _rule_name(self) -> str | None:
        return self.update_rule if isinstance(self.update_rule, str) else None

    def _gradient_rule(self) -> TaskSolver:
        if isinstance(self.update_rule, Learner):
            return resolve_update_rule("sgd", {})
        options = self._prefixed("update_rule")
        if self._rule_name() not in ("auto", "gaussian-head"):
            return resolve_update_rule(self.update_rule, options)
        norm = self._make_targets().loss.max_grad_norm
        return resolve_update_rule("sgd", {"max_grad_norm": norm, **options})

    def _row_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self.targets_.loss.rows

    def _n_members(self) -> int:
        """Members of a Gaussian head: a module of the user's own is trained once."""
        return N_MEMBERS if self.module is None else 1

    def _n_adapt_steps(self) -> int:
        return self._n_steps() if self.adapt_steps is None else int(self.adapt_steps)

    def _alpha(self) -> float:
        alpha, dtype = float(self.alpha), vars(self).get("_dtype", np.float64)
        most = float(np.finfo(dtype).max)
        if alpha > most:
            raise ValueError(
                f"alpha={alpha:g} is infinite in {np.dtype(dtype)}, in which X came to fit: "
                f"expected at most {most:.1g}. Give a smaller rate; the default is 0.03."
            )
        return alpha

    def _n_steps(self) -> int:
        return int(self.steps)

    def _resolve_optimizer(self) -> Any:
        if isinstance(self.optimizer, str) and self.optimizer in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer]
        if isinstance(self.optimizer, type) and issubclass(self.optimizer, torch.optim.Optimizer):
            if issubclass(self.optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "optimizer=LBFGS evaluates its closure several times an update, on one "
                    "meta-batch. Use a stochastic optimiser such as 'adam'."
                )
            return self.optimizer
        raise ValueError(
            f"optimizer={self.optimizer!r} is not known. Expected one of {sorted(OPTIMIZERS)} or a "
            "torch.optim.Optimizer class; pass its settings as optimizer__*."
        )

    def _comparable_params(self) -> dict[str, Any]:
        """Return the parameters that have values equal in every process that was given the same."""
        return {
            name: value
            for name, value in self.get_params(deep=False).items()
            # objects hash by identity; where a process prints, or computes, is its own matter
            if name not in ("callbacks", "device", "random_state", "verbose")
            and isinstance(value, (str, int, float, bool, list, tuple, type(None)))
        }

    def _settings(self, module: nn.Module | None = None) -> dict[str, Any]:
        """Parameters that what was meta-learned depends on; of a module also what a rule learns."""
        rule = self._gradient_rule()
        gradient = resolve_meta_gradient(self.meta_gradient, self._prefixed("meta_gradient"))
        settings = {
            "update_rule": type(self.update_rule)
            if isinstance(self.update_rule, Learner)
            else (self._rule_name() in ("auto", "gaussian-head") and self._rule_name())
            or type(rule),
            PROXIMAL: gradient.proximal > 0,
            "adapted": self.adapted if isinstance(self.adapted, str) else (*self.adapted,),
            **self._make_targets().settings(),
            "head": getattr(self, "head", "free"),
            "hidden_layer_sizes": str(self.hidden_layer_sizes),
            "activation": self.activation,
            "module": self.module if isinstance(self.module, type) else type(self.module),
            "module__*": str(sorted(self._prefixed("module").items())),
        }
        if module is not None:
            adapted = adapted_names(module, self.adapted)
            fast = {name: p.detach() for name, p in module.named_parameters() if name in adapted}
            # for one step: the number of steps may change, and that of the rates then stays
            rates = rule.initial_rates(fast, classification=self.targets_.are_classes)
            shapes = {name: tuple(rate.shape) for name, rate in rates.items()}
            settings["what update_rule learns"] = shapes
        return settings

    def _check_unchanged(self, everything: bool = False) -> None:
        """Refuse parameters that no longer fit what was meta-learned; all of them, to continue."""
        values = (*self.get_params(deep=False).values(),)
        known = not everything and self._fit_settings is self._unchanged[1]
        if known and _are(values, self._unchanged[0]):
            return
        now = self._settings(self._learner.module if everything else None)
        names = ["update_rule", PROXIMAL, "adapted", "n_ways", "center_y", "loss", "class_weight"]
        if everything:  # a fit goes on with the meta-gradient of now
            names = [name for name in now if name != PROXIMAL]
        for name in names:
            if now[name] != self._fit_settings[name]:
                raise ValueError(
                    f"{name} was changed after fit; what was meta-learned is for another value. "
                    "Set it back, or fit anew with warm_start=False. Only alpha, steps, "
                    "adapt_steps and engine__batch_norm may be changed, and lam and "
                    "max_grad_norm of update_rule and meta_gradient."
                )
        if not any(isinstance(value, CHANGEABLE) for value in values):
            self._unchanged = values, self._fit_settings

    def _reshape(self, X: Any) -> Any:
        """Rows as the module takes them: the default network takes flat rows."""
        return X.reshape(len(X), -1) if self._flat and X.ndim > 2 else X

    def _check_features(self, X: np.ndarray) -> None:
        if X.shape[1:] != self.feature_shape_:
            raise ValueError(
                f"X has rows of shape {X.shape[1:]}, but {type(self).__name__} was meta-fitted on "
                f"rows of shape {self.feature_shape_}. Give the same features."
            )


def _are(values: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    """Whether values are the very objects that are known."""
    return len(values) == len(known) and all(map(operator.is_, values, known))
