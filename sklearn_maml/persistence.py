"""Saving fitted estimators to files, and loading them, without pickle.

What a file holds of an estimator is listed here, attribute by attribute. Loading builds the
estimator from its parameters, as `fit` does, and gives it the stored numbers. Classes that a file
names are looked up in the lists below: nothing is imported for it, and what is not listed has to be
passed by the caller.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import sklearn
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_maml.devices import resolve_device
from sklearn_maml.engine import ELEMENTWISE
from sklearn_maml.exceptions import FileFormatError
from sklearn_maml.meta_gradients import META_GRADIENTS
from sklearn_maml.modules import ContextMLP
from sklearn_maml.storage import TAG, Decoder, Encoder, read_tree, write_tree
from sklearn_maml.targets.losses import LOSSES
from sklearn_maml.threads import one_thread
from sklearn_maml.training.checkpoint import Checkpoint
from sklearn_maml.update_rules import UPDATE_RULES

__all__ = ["SaveMixin", "describe", "load"]

# Fitted attributes that are stored, by the class that sets them; an estimator has those of all its
# base classes. They may be numbers, strings, None, arrays, tensors, dtypes, and lists, tuples and
# dicts of these. A fitted attribute in none of the lists is an error in `save`.
STORED: dict[str, tuple[str, ...]] = {
    "BaseMAML": (
        "n_features_in_",
        "feature_names_in_",
        "feature_shape_",
        "n_tasks_",
        "tasks_",
        "n_iter_",
        "_dtype",
        "_flat",
        "_fingerprints",
        "_rung",
        "_score_seed",
        "learner_weights_",
    ),
    "MAMLRegressor": ("n_outputs_", "y_mean_", "y_scale_", "_y_is_1d"),
    "MAMLClassifier": ("classes_",),
    "_FewShot": ("model_", "n_features_in_", "feature_names_in_", "classes_", "encoded_classes_"),
}
# Those that loading makes anew, see `sklearn_maml.estimators.stored`.
REBUILT = {
    "device_",
    "history_",
    "module_",
    "net_",
    "calibration_",
    "_fit_settings",
    "_learner",
    "_metadata_request",
    "_state",
    "targets_",
}
# Those of scikit-learn that belong to the process: set_output, set_callbacks.
LEFT_OUT = {"_sklearn_output_config", "_skl_callbacks", "_parent_callback_ctx"}

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
# modules of the estimators that a file may name
MODULES = {f"sklearn_maml.estimators.{name}" for name in ("classifier", "few_shot", "regressor")}
# estimators of the library, by name
ESTIMATORS: dict[str, type[SaveMixin]] = {}


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


class SaveMixin:
    """`save` and `load` of an estimator.

    A file holds the parameters of an estimator, and what `__stored_state__` returns.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ in MODULES and not cls.__name__.startswith("_"):
            ESTIMATORS[cls.__name__] = cls

    @one_thread()
    def save(self, path: Any, *, tasks: bool = True, training: bool = True) -> None:
        """Save the fitted estimator to a file, without pickle.

        The file is a safetensors file: weights, with parameters and all else as JSON. It is
        replaced in one go, and takes no rows of the training data.

        Parameters
        ----------
        path : str or path-like
            File to write.
        tasks : bool, default=True
            Whether the tasks that the estimator is adapted to are saved, too.
        training : bool, default=True
            Whether the state of the optimiser is saved, from which a fit with ``warm_start=True``
            goes on; with Adam it takes twice the space of the weights.

        Raises
        ------
        NotFittedError
            If the estimator is not fitted.
        TypeError
            If the estimator has something that no file can hold.
        ValueError
            If parameters were changed after `fit` that what was learned depends on.

        See Also
        --------
        sklearn_maml.load : Load an estimator of any class.

        Notes
        -----
        Parameters that cannot be written as plain data, such as a module class of your own or
        skorch callbacks, are not in the file: `load` asks for them.

        Examples
        --------
        >>> import os, tempfile
        >>> import sklearn_maml
        >>> from sklearn_maml.datasets import make_sinusoid_tasks
        >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
        >>> reg = sklearn_maml.MAMLRegressor(max_iter=10, random_state=0)
        >>> reg = reg.fit(X, y, groups=task).adapt(X[:10], y[:10])
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> reg.save(path)
        >>> same = sklearn_maml.load(path)
        >>> bool((same.predict(X) == reg.predict(X)).all())
        True
        """
        check_is_fitted(self)
        writer = _Writer(tasks, training)
        encoder = Encoder(writer.describe)
        node = writer.estimator(self, encoder, "estimator")
        tree = {"kind": "model", "class": type(self).__name__, "content": node}
        write_tree(path, tree, encoder.tensors)

    @classmethod
    def load(cls, path: Any, *, module: Any = None, device: Any = None, **objects: Any) -> Any:
        """Load an estimator that `save` wrote.

        A file runs no code: it names classes of the library and of torch.optim only, and has plain
        data besides. Its digest tells damage, not forgery; do not take predictions from a file of
        unknown origin for those of your model.

        Parameters
        ----------
        path : str or path-like
            File that `save` wrote.
        module : torch.nn.Module class or instance, default=None
            What the estimator was given as `module`, unless it was None.
        device : str or torch.device, default=None
            Where the model is to be; it becomes the parameter `device`. None takes that of the
            file, or the CPU if there is no such device, with a warning.
        **objects : dict
            Other parameters that are no plain data, such as ``callbacks=[...]``, by name.

        Returns
        -------
        estimator : estimator
            Predicts, adapts, and goes on fitting as the one that was saved.

        Raises
        ------
        FileFormatError
            If the file is something else, has another class, is damaged, or is of a later version.
        ValueError
            If a parameter has to be passed; the message names it.

        Warns
        -----
        DeviceWarning
            If the model is on the CPU for want of the device it was fitted on.
        """
        return _load(path, cls, module, device, objects)

    def _stored_names(self) -> list[str]:
        return [name for c in type(self).__mro__ for name in STORED.get(c.__name__, ())]

    def __stored_state__(self, tasks: bool, training: bool) -> dict[str, Any]:
        """Return what a file holds besides the parameters, as plain data.

        Parameters
        ----------
        tasks, training : bool
            See `save`.

        Raises
        ------
        TypeError
            If the estimator has an attribute that no list here has.
        """
        own = vars(self)
        names = self._stored_names()
        params = self.get_params(deep=False)  # type: ignore[attr-defined]
        known = {*names, *REBUILT, *LEFT_OUT, *params}
        unknown = [name for name in own if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has attributes that save does not know: "
                f"{unknown}. Those that fit sets have a place in sklearn_maml.persistence.STORED; "
                "remove others before saving."
            )
        fitted = {name: own[name] for name in names if name in own}
        requests = own.get("_metadata_request")
        if requests is not None:
            fitted["requests"] = {
                method: dict(getattr(requests, method).requests)
                for method in sorted(vars(requests))
                if getattr(getattr(requests, method), "requests", None)
            }
        return fitted

    def __restore_state__(self, fitted: dict[str, Any]) -> None:
        """Give a new estimator what `__stored_state__` returned."""
        unknown = fitted.keys() - {*self._stored_names(), "requests"}
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no attributes of the estimator")
        with sklearn.config_context(enable_metadata_routing=True):
            for method, requests in fitted.pop("requests", {}).items():
                setter = getattr(self, f"set_{method}_request", None)
                # what a class requests by itself has no setter
                names = inspect.signature(setter).parameters if setter is not None else ()
                changed = {name: value for name, value in requests.items() if name in names}
                if setter is not None and changed:
                    setter(**changed)
        vars(self).update(fitted)


def load(path: Any, *, module: Any = None, device: Any = None, **objects: Any) -> Any:
    """Load an estimator of any class of the library from a file that its `save` wrote.

    A file runs no code: it names classes of the library and of torch.optim only, and has plain
    data besides. Its digest tells damage, not forgery; do not take predictions from a file of
    unknown origin for those of your model.

    Parameters
    ----------
    path : str or path-like
        File that `save` wrote.
    module : torch.nn.Module class or instance, default=None
        What the estimator was given as `module`, unless it was None.
    device : str or torch.device, default=None
        Where the model is to be; it becomes the parameter `device`. None takes that of the file,
        or the CPU if there is no such device, with a warning.
    **objects : dict
        Other parameters that are no plain data, such as ``callbacks=[...]``, by name.

    Returns
    -------
    estimator : estimator
        Predicts, adapts, and goes on fitting as the one that was saved.

    Raises
    ------
    FileFormatError
        If the file is something else, is damaged, or is of a later version.
    ValueError
        If a parameter has to be passed; the message names it.

    Warns
    -----
    DeviceWarning
        If the model is on the CPU for want of the device it was fitted on.

    Examples
    --------
    >>> import os, tempfile
    >>> import sklearn_maml
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = sklearn_maml.MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> reg.save(path)
    >>> type(sklearn_maml.load(path)).__name__
    'MAMLRegressor'
    """
    return _load(path, None, module, device, objects)


@one_thread()
def _load(
    path: Any, cls: type[SaveMixin] | None, module: Any, device: Any, objects: dict[str, Any]
) -> Any:
    tree, tensors = read_tree(path)
    if tree.get("kind") != "model":
        raise FileFormatError(
            f"{path} is a {tree.get('kind')} and no model. The file of a Checkpoint is for fit; "
            "expected one written by the save method of an estimator."
        )
    name = str(tree.get("class"))
    if cls is None and name not in ESTIMATORS:
        raise FileFormatError(
            f"{path} has a {name}, which is no class of sklearn_maml. Call load of that class."
        )
    if cls is not None and name != cls.__name__:
        raise FileFormatError(
            f"{path} has a {name}, not a {cls.__name__}. Use {name}.load or sklearn_maml.load."
        )
    given = {**objects, **({} if module is None else {"module": module})}
    reader = _Reader(str(path), tree, ESTIMATORS[name] if cls is None else cls, given, device)
    with reader.explaining():
        node = tree["content"]
        reader.check_given(node)
        return reader.estimator(node, Decoder(tensors, reader.look_up), reader.cls)


class _Writer:
    """What is written of estimators and of what they hold."""

    def __init__(self, tasks: bool, training: bool) -> None:
        self.tasks = tasks
        self.training = training

    def describe(self, value: Any, encoder: Encoder, path: str) -> Any:
        """Describe classes, objects and estimators of the library; `other` of `Encoder`."""
        if type(value) is FrozenEstimator:
            return {TAG: "frozen", "estimator": encoder.encode(value.estimator, path)}
        if ESTIMATORS.get(type(value).__name__) is type(value):
            return {TAG: "estimator", "content": self.estimator(value, encoder, path)}
        return describe(value, encoder, path)

    def estimator(self, estimator: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        """JSON of an estimator."""
        params = {
            name: self._param(name, value, encoder, f"{path}/params/{name}")
            for name, value in estimator.get_params(deep=False).items()
        }
        state = estimator.__stored_state__(self.tasks, self.training)
        fitted = {name: encoder.encode(value, f"{path}/{name}") for name, value in state.items()}
        return {"class": type(estimator).__name__, "params": params, "fitted": fitted}

    @staticmethod
    def _param(name: str, value: Any, encoder: Encoder, path: str) -> Any:
        before = set(encoder.tensors)
        try:
            return encoder.encode(value, path)
        except TypeError:
            encoder.forget_since(before)
        # a caller of load has it
        is_class = isinstance(value, type)
        return {
            TAG: "given",
            "what": "class" if is_class else "object",
            "name": (value if is_class else type(value)).__name__,
        }


class _Reader:
    """Makes estimators from what `_Writer` wrote."""

    def __init__(
        self, path: str, tree: dict[str, Any], cls: type, given: dict[str, Any], device: Any
    ) -> None:
        self.path = path
        self.cls = cls
        self.given = given
        self.device = device

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Say of any failure that the file is the reason, but for errors that say more."""
        try:
            yield
        except _NotGiven as error:
            raise ValueError(str(error)) from None
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
                f"{self.cls.__name__}.load(path, {arguments})."
                + (" callbacks=None goes without." if "callbacks" in missing else "")
            )
        unused = [name for name in self.given if name not in lacks]
        if unused:
            raise _NotGiven(
                f"load got {', '.join(unused)}, but {self.path} has that itself. Leave it out; "
                "set_params changes parameters after loading."
            )
        for parameter in lacks.keys() & {"module", "loss"}:
            given, what = self.given[parameter], lacks[parameter]
            is_class = isinstance(given, type)
            name = (given if is_class else type(given)).__name__
            if (name, is_class) != (what["name"], what["what"] == "class"):
                raise _NotGiven(
                    f"{self.path} was saved with a {parameter} that is {_words(**what)}; got "
                    f"{_words('class' if is_class else 'object', name)}. Pass the same."
                )

    def look_up(self, node: dict[str, Any], decoder: Decoder) -> Any:
        """Make what `_Writer.describe` described; `other` of `Decoder`."""
        kind = node[TAG]
        if kind == "class":
            return CLASSES[node["name"]] if node["name"] in CLASSES else OBJECTS[node["name"]]
        if kind == "object":
            return OBJECTS[node["name"]](**decoder.decode(node["params"]))
        if kind == "frozen":
            return FrozenEstimator(decoder.decode(node["estimator"]))
        if kind == "estimator":
            content = node["content"]
            return self.estimator(content, decoder, ESTIMATORS[content["class"]])
        raise ValueError(f"{kind!r} is not known")

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
