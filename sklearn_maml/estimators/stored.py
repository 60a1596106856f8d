"""What a file holds of a fitted estimator, and making the estimator of it."""

from __future__ import annotations

import copyreg
import dataclasses
import json
import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from sklearn_maml.devices import resolve_device
from sklearn_maml.estimators.adapting import Adapting, State
from sklearn_maml.estimators.planning import Planning
from sklearn_maml.exceptions import DeviceWarning, FileFormatError
from sklearn_maml.learners.conditioned import Calibration
from sklearn_maml.model_files import describe, look_up
from sklearn_maml.storage import FORMAT, Decoder, Encoder, as_array, as_tensor
from sklearn_maml.theta import name_in_rule
from sklearn_maml.training.checkpoint import net_state, restore_net

# marks a state of plain data
PLAIN = "sklearn_maml"


class Stored(Planning, Adapting):
    """Gives its fitted state as plain data, and takes it back."""

    __rebuilt_attributes__: ClassVar = (
        "device_",
        "history_",
        "module_",
        "net_",
        "calibration_",
        "_fit_settings",
        "_learner",
        "_state",
        "_unchanged",
        "_valid",
        "targets_",
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Have pickle and copies take the attributes as they are.

        What copies share is then shared in a pickle, and classes are named as the pickler does it.
        """
        return copyreg.__newobj__, (type(self),), dict(vars(self))  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """Parameters, text and arrays, for tools that pickle nothing, such as skops."""
        params = self.get_params(deep=False)
        encoder = Encoder(describe)
        node = encoder.encode(self.__stored_state__(tasks=True, training=True), "state")
        arrays = {name: as_array(tensor) for name, tensor in encoder.tensors.items()}
        return {PLAIN: FORMAT, "params": params, "state": json.dumps(node), "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if PLAIN not in state:
            super().__setstate__(state)
            return
        if state[PLAIN] != FORMAT:
            raise FileFormatError(
                f"The {type(self).__name__} has the format version {state[PLAIN]}, and this "
                f"version of sklearn_maml reads {FORMAT}. Fit it anew, or load it with the version "
                "that wrote it."
            )
        self.__dict__.update(state["params"])
        tensors = {name: as_tensor(array) for name, array in state["arrays"].items()}
        self.__restore_state__(Decoder(tensors, look_up).decode(json.loads(state["state"])))

    def __stored_state__(self, tasks: bool, training: bool) -> dict[str, Any]:
        """Return what a file holds besides the parameters; see `SaveMixin`."""
        fitted = super().__stored_state__(tasks, training)
        if not self.__sklearn_is_fitted__():
            return fitted
        self._check_unchanged()
        self._check_unchanged(everything=True)
        learner = self._learner
        fitted |= {
            "device": str(self.device_),
            "learner": dict(learner.state_dict()),
            "rates": list(learner.rule),
            "frozen": [n for n, p in learner.named_parameters() if not p.requires_grad],
            "in_training": learner.network.training,
        }
        if hasattr(self, "net_"):
            fitted["history"] = [dict(row) for row in self.history_]
            if training:
                fitted["net"] = {**net_state(self.net_), "history": None}
        calibration = vars(self).get("calibration_")
        fitted["calibration"] = None if calibration is None else dict(vars(calibration))
        state = vars(self).get("_state")
        if tasks and state is not None:
            own = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
            fitted["state"] = {**own, "adapted": state.adapted.state()}
        return fitted

    @torch.inference_mode(False)
    def __restore_state__(self, fitted: dict[str, Any]) -> None:
        """Make modules and net as `fit` does, and fill them; see `SaveMixin`."""
        from skorch.history import History

        if "learner" not in fitted:
            super().__restore_state__(fitted)
            return
        self._check_parameter_names()
        names = "device learner rates frozen in_training history net calibration state"
        parts = {name: fitted.pop(name) for name in names.split() if name in fitted}
        super().__restore_state__(fitted)
        self.targets_ = self._make_targets().restore(self.__dict__)
        self.device_ = self._place(_find_device(self.device, parts["device"]))
        weights = parts["learner"]
        learner = self._new_learner(weights)
        # those of a rule depend on parameters that may be changed after fit
        learner.rule = nn.ParameterDict(
            {name: nn.Parameter(weights[name_in_rule(name)].clone()) for name in parts["rates"]}
        )
        learner.load_state_dict(weights)
        learner.to(self.device_)
        for name, p in learner.named_parameters():
            p.requires_grad_(name not in parts["frozen"])
        learner.train(parts["in_training"])
        self._learner, self.module_ = learner, learner.network
        self._fit_settings = self._settings(learner.module)
        if "history" in parts:
            self.history_ = History(parts["history"])
        if "net" in parts:
            net = self._make_net(learner)
            net.initialize()
            restore_net(net, {**parts["net"], "history": parts["history"]})
            self.net_, self.history_ = net, net.history
        stored = parts["calibration"]
        self.calibration_ = None if stored is None else Calibration(**stored)
        if "state" in parts:
            state = parts["state"]
            adapted = self._adapted_from(state.pop("adapted"))
            self._state = State(adapted=adapted, **state)


def _find_device(asked: Any, fitted_on: str) -> torch.device:
    """Return the device that is asked for, or the CPU where that of the fit is not there."""
    try:
        return resolve_device(asked)
    except ValueError:
        warnings.warn(
            f"The model was fitted with device={asked!r} (on {fitted_on}), which torch "
            "does not have here: it is loaded on the CPU. Pass device='cpu' or 'auto' to load.",
            DeviceWarning,
            stacklevel=2,
        )
        return torch.device("cpu")
