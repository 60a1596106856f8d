"""What a file holds of estimators, and making estimators of it.

Loading builds an estimator from its parameters, as `fit` does, and gives it the stored numbers.
Classes that a file names are looked up in the lists below: nothing is imported for it, and what is
not listed has to be passed by the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from torch import nn

from sklearn_maml.composites import is_composite, put_together, take_apart
from sklearn_maml.devices import resolve_device
from sklearn_maml.engine import ELEMENTWISE
from sklearn_maml.exceptions import FileFormatError
from sklearn_maml.meta_gradients import META_GRADIENTS
from sklearn_maml.modules import ContextMLP
from sklearn_maml.storage import TAG, Decoder, Encoder
from sklearn_maml.targets.losses import LOSSES
from sklearn_maml.training.checkpoint import Checkpoint
from sklearn_maml.update_rules import UPDATE_RULES

# objects with parameters that a file may name
OBJECTS: dict[str, type] = {
    **{c.__name__ + "Rule": c for c in UPDATE_RULES.values()},
    **{c.__name__ + "Gradient": c for c in META_GRADIENTS.values()},
    **{c.__name__ + "Loss": c for c in LOSSES.values()},
    "Checkpoint": Checkpoint,
}
# classes that a file may name, as a module or optimiser, or as an option of a module
CLASSES: dict[str, type] = {
    "ContextMLP": ContextMLP,
    **{f"torch.nn.{c.__name__}": c for c in (nn.Linear, nn.LayerNorm, *ELEMENTWISE)},
    **{
        f"torch.optim.{name}": c
        for name, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    },
}
_NAMES: dict[type, str] = {c: name for name, c in {**OBJECTS, **CLASSES}.items()}
# estimators of the library, by name
ESTIMATORS: dict[str, type[Any]] = {}


def describe(value: Any, encoder: Encoder, path: str) -> Any:
    """Name classes and objects of the library; `other` of `Encoder`."""
    if isinstance(value, type):
        name = _NAMES.get(value)
        return None if name is None else {TAG: "class", "name": name}
    name = _NAMES.get(type(value))
    if name in OBJECTS:
        params = value.get_params(deep=False)
        return {TAG: "object", "name": name, "params": encoder.encode(params, path)}
    return None


def look_up(node: dict[str, Any], decoder: Decoder) -> Any:
    """Make what `describe` described; `other` of `Decoder`."""
    kind, name = node[TAG], str(node.get("name"))
    if kind == "class":
        return CLASSES[name] if name in CLASSES else OBJECTS[name]
    if kind == "object":
        return OBJECTS[name](**decoder.decode(node["params"]))
    raise ValueError(f"{kind!r} is not known")


@dataclasses.dataclass(frozen=True)
class Writer:
    """What is written of estimators and of what they hold."""

    tasks: bool
    training: bool
    trusted: list[str]

    def describe(self, value: Any, encoder: Encoder, path: str) -> Any:
        """Describe classes, objects and estimators of the library; `other` of `Encoder`."""
        if type(value) is FrozenEstimator:
            return {TAG: "frozen", "estimator": encoder.encode(value.estimator, path)}
        if ESTIMATORS.get(type(value).__name__) is type(value):
            return {TAG: "estimator", "content": self.estimator(value, encoder, path)}
        node = describe(value, encoder, path)
        if node is not None or isinstance(value, type) or not is_composite(value):
            return node
        data, leaves = take_apart(value, self.trusted, path)
        return {
            TAG: "composite",
            "data": encoder.encode(np.frombuffer(data, dtype=np.uint8), f"{path}/skops"),
            "leaves": encoder.encode(leaves, f"{path}/leaves"),
        }

    def estimator(self, estimator: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        """JSON of an estimator."""
        params = {
            name: _param(value, encoder, f"{path}/params/{name}")
            for name, value in estimator.get_params(deep=False).items()
        }
        state = estimator.__stored_state__(self.tasks, self.training)
        fitted = {name: encoder.encode(value, f"{path}/{name}") for name, value in state.items()}
        return {"class": type(estimator).__name__, "params": params, "fitted": fitted}


def _param(value: Any, encoder: Encoder, path: str) -> Any:
    before = set(encoder.tensors)
    try:
        return encoder.encode(value, path)
    except TypeError:
        encoder.forget_since(before)
    return {TAG: "given", **_kind(value)}  # a caller of load has it


def _kind(value: Any) -> dict[str, str]:
    """Whether a value is a class or an object, and the name of its class."""
    if isinstance(value, type):
        return {"what": "class", "name": value.__name__}
    return {"what": "object", "name": type(value).__name__}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes estimators from what `Writer` wrote."""

    path: str
    loader: str  # the function's name, for messages
    given: dict[str, Any]
    device: Any
    trusted: list[str]

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Say of any failure that the file is the reason, but for errors that say more."""
        try:
            yield
        except _NotGiven as error:
            raise ValueError(str(error)) from None
        except (ImportError, PermissionError) as error:
            raise ValueError(f"{self.path} cannot be loaded: {error}") from error
        except FileFormatError:
            raise
        except Exception as error:  # what is not well-formed may fail anywhere
            raise FileFormatError(
                f"{self.path} cannot be made an estimator again: {error!r}. If it was given a "
                "module, the one passed to load has to be the same."
            ) from error

    def check_given(self, node: Any) -> None:
        """Compare what the caller gave with what the file lacks."""
        lacks: dict[str, Any] = {}
        _find_given(node, lacks)
        missing = [name for name in lacks if name not in self.given]
        if missing:
            listed = ", ".join(f"{name} ({_words(**lacks[name])})" for name in missing)
            arguments = ", ".join(f"{name}=..." for name in missing)
            raise _NotGiven(
                f"{self.path} was saved with parameters that no file holds: {listed}. Pass them: "
                f"{self.loader}(path, {arguments})."
                + (" callbacks=None goes without." if "callbacks" in missing else "")
            )
        unused = [name for name in self.given if name not in lacks]
        if unused:
            raise _NotGiven(
                f"load got {', '.join(unused)}, but {self.path} has that itself. Leave it out; "
                "set_params changes parameters after loading."
            )
        for parameter in lacks.keys() & {"module", "loss"}:
            given, what = _kind(self.given[parameter]), lacks[parameter]
            if given != what:
                raise _NotGiven(
                    f"{self.path} was saved with a {parameter} that is {_words(**what)}; got "
                    f"{_words(**given)}. Pass the same."
                )

    def look_up(self, node: dict[str, Any], decoder: Decoder) -> Any:
        """Make what `Writer.describe` described; `other` of `Decoder`."""
        kind = node[TAG]
        if kind == "frozen":
            return FrozenEstimator(decoder.decode(node["estimator"]))
        if kind == "estimator":
            content = node["content"]
            return self.estimator(content, decoder, ESTIMATORS[content["class"]])
        if kind == "composite":
            data = decoder.decode(node["data"]).tobytes()
            return put_together(data, decoder.decode(node["leaves"]), self.trusted)
        return look_up(node, decoder)

    def estimator(self, node: dict[str, Any], decoder: Decoder, cls: Any) -> Any:
        """Make an estimator."""
        params = {
            name: self.given[name]
            if isinstance(value, dict) and value.get(TAG) == "given"
            else decoder.decode(value)
            for name, value in node["params"].items()
        }
        if self.device is not None and "device" in params:
            params["device"] = self.device
        estimator = cls(**params)
        if self.device is not None and "device" in params:
            try:
                resolve_device(self.device)
            except ValueError as error:
                raise _NotGiven(str(error)) from error
        fitted = {name: decoder.decode(value) for name, value in node["fitted"].items()}
        estimator.__restore_state__(fitted)
        return estimator


def _words(what: str, name: str) -> str:
    return f"the class {name}" if what == "class" else f"an object of class {name}"


class _NotGiven(Exception):  # noqa: N818 - becomes a ValueError
    """Raised when the caller of load has to pass something else."""


def _find_given(node: Any, found: dict[str, Any]) -> None:
    """Collect the parameters that a file lacks, of nested estimators too."""
    if isinstance(node, list):
        for item in node:
            _find_given(item, found)
    elif isinstance(node, dict):
        for name, item in node.items():
            if isinstance(item, dict) and item.get(TAG) == "given":
                found[name] = {key: item[key] for key in ("what", "name")}
            else:
                _find_given(item, found)
