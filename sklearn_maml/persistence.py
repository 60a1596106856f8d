"""Saving fitted estimators to files, and loading them, without pickle.

What a file holds is up to the estimators, which give plain data and take them back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import sklearn
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._types import PathLike
from sklearn_maml.composites import Leaf
from sklearn_maml.exceptions import FileFormatError
from sklearn_maml.model_files import ESTIMATORS, Reader, Writer
from sklearn_maml.storage import TAG, Decoder, Encoder, read_tree, write_tree
from sklearn_maml.threads import one_thread

# Those of scikit-learn that belong to the process: set_output, set_callbacks.
LEFT_OUT = {"_sklearn_output_config", "_skl_callbacks", "_parent_callback_ctx"}
# modules of the estimators that a file may name
MODULES = {
    f"sklearn_maml.estimators.{name}"
    for name in ("classifier", "few_shot", "numbered", "regressor")
}


class SaveMixin(Leaf):
    """`save` and `load` of an estimator.

    A file holds the parameters of an estimator, and what `__stored_state__` returns.

    Attributes
    ----------
    __stored_attributes__ : tuple of str
        Fitted attributes that are stored; those of base classes need not be repeated. They may be
        numbers, strings, None, arrays, tensors, dtypes, and lists, tuples and dicts of these.
    __rebuilt_attributes__ : tuple of str
        Those that loading makes anew. A fitted attribute in neither is an error in `save`.
    """

    __stored_attributes__: ClassVar[tuple[str, ...]] = ()
    __rebuilt_attributes__: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ in MODULES and not cls.__name__.startswith("_"):
            ESTIMATORS[cls.__name__] = cls

    def save(
        self,
        path: PathLike,
        *,
        tasks: bool = True,
        training: bool = True,
        trusted: Iterable[str] = (),
    ) -> None:
        """Save the fitted estimator to a file, without pickle; see `sklearn_maml.save`.

        Parameters
        ----------
        path, tasks, training, trusted : str or path-like, bool, bool, iterable of str
            As in `sklearn_maml.save`, which raises the same errors.
        """
        save(path, self, tasks=tasks, training=training, trusted=trusted)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        module: Any = None,
        device: Any = None,
        trusted: Iterable[str] = (),
        **objects: Any,
    ) -> Self:
        """Load an estimator of this class that `save` wrote; see `sklearn_maml.load`.

        Parameters
        ----------
        path, module, device, trusted, **objects : str or path-like, and others
            As in `sklearn_maml.load`.

        Returns
        -------
        estimator : estimator
            Predicts, adapts, and goes on fitting as the one that was saved.

        Raises
        ------
        FileFormatError
            As in `sklearn_maml.load`, and if the file has another class.
        ValueError
            If a parameter has to be passed; the message names it.
        """
        return _load(path, cls, module, device, trusted, objects)

    def _stored_names(self) -> list[str]:
        return self._listed("__stored_attributes__")

    def _listed(self, attribute: str) -> list[str]:
        return [name for c in type(self).__mro__ for name in vars(c).get(attribute, ())]

    def __stored_state__(self, tasks: bool, training: bool) -> dict[str, Any]:
        """Return what a file holds besides the parameters, as plain data; see `save`.

        TypeError if the estimator has an attribute that no list here has.
        """
        own = vars(self)
        names = self._stored_names()
        params = self.get_params(deep=False)  # type: ignore[attr-defined]
        rebuilt = self._listed("__rebuilt_attributes__")
        known = {*names, *rebuilt, *LEFT_OUT, "_metadata_request", *params}
        unknown = [name for name in own if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has attributes that save does not know: "
                f"{unknown}. Those that fit sets have a place in __stored_attributes__ of their "
                "class; remove others before saving."
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


@one_thread()
def save(
    path: PathLike,
    estimator: Any,
    *,
    tasks: bool = True,
    training: bool = True,
    trusted: Iterable[str] = (),
) -> None:
    """Save an estimator of the library, or a pipeline or search with one, without pickle.

    The file is a safetensors file: weights, with parameters and all else as JSON. It is replaced in
    one go, and takes no rows of the training data. Parts that are scikit-learn's are written by
    skops (``pip install 'sklearn-maml[save]'``).

    Parameters
    ----------
    path : str or path-like
        File to write.
    estimator : estimator
        A fitted estimator of the library, or a Pipeline, ColumnTransformer, search or any other
        estimator of which such estimators are parts.
    tasks : bool, default=True
        Whether the tasks that the estimators are adapted to are saved, too.
    training : bool, default=True
        Whether the state of the optimiser is saved, from which a fit with ``warm_start=True``
        goes on; with Adam it takes twice the space of the weights.
    trusted : iterable of str, default=()
        Names of types, such as ``"shop.Rescale"``, that the file may have besides those that skops
        knows to be harmless. `load` will import and build them.

    Raises
    ------
    NotFittedError
        If the estimator is not fitted.
    TypeError
        If the estimator has something that no file can hold, or types that are not known; the
        message names them.
    ValueError
        If parameters were changed after `fit` that what was learned depends on.

    See Also
    --------
    sklearn_maml.load : Load what was saved.

    Notes
    -----
    Parameters of estimators of the library that cannot be written as plain data, such as a module
    class of your own or skorch callbacks, are not in the file: `load` asks for them.

    Examples
    --------
    >>> import os, tempfile
    >>> import sklearn_maml
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> reg = sklearn_maml.MAMLRegressor(max_iter=10, random_state=0).fit(X, y, groups=task)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> sklearn_maml.save(path, reg)
    >>> loaded = sklearn_maml.load(path)
    >>> bool((loaded.adapt(X[:5], y[:5]).predict(X) == reg.adapt(X[:5], y[:5]).predict(X)).all())
    True
    """
    check_is_fitted(estimator)
    writer = Writer(tasks, training, [*trusted])
    encoder = Encoder(writer.describe)
    if isinstance(estimator, SaveMixin):
        node = writer.estimator(estimator, encoder, "estimator")
    else:
        node = encoder.encode(estimator, "estimator")
    tree = {"kind": "model", "class": type(estimator).__name__, "content": node}
    write_tree(path, tree, encoder.tensors)


def load(
    path: PathLike,
    *,
    module: Any = None,
    device: Any = None,
    trusted: Iterable[str] = (),
    **objects: Any,
) -> Any:
    """Load what `save` wrote: an estimator of the library, or a pipeline or search with one.

    A file runs no code: it names classes of the library and of torch.optim only, and has plain
    data besides; in parts that are scikit-learn's, types that skops knows to be harmless, and
    those of `trusted`. Its digest tells damage, not forgery; do not take predictions from a file of
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
    trusted : iterable of str, default=()
        Names of types that the file may import and build besides those that skops knows to be
        harmless. Give those of which you know where they come from.
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
    return _load(path, None, module, device, trusted, objects)


@one_thread()
def _load(
    path: PathLike,
    cls: type[SaveMixin] | None,
    module: Any,
    device: Any,
    trusted: Iterable[str],
    objects: dict[str, Any],
) -> Any:
    tree, tensors = read_tree(path)
    if tree.get("kind") != "model":
        raise FileFormatError(
            f"{path} is a {tree.get('kind')} and no model. The file of a Checkpoint is for fit; "
            "expected one written by the save method of an estimator."
        )
    name = str(tree.get("class"))
    node: Any = tree.get("content")
    composite = isinstance(node, dict) and node.get(TAG) == "composite"
    if cls is None and not composite and name not in ESTIMATORS:
        raise FileFormatError(
            f"{path} has a {name}, which is no class of sklearn_maml. Call load of that class."
        )
    if cls is not None and name != cls.__name__:
        raise FileFormatError(
            f"{path} has a {name}, not a {cls.__name__}. Use {name}.load or sklearn_maml.load."
        )
    given = {**objects, **({} if module is None else {"module": module})}
    own = ESTIMATORS.get(name) if cls is None else cls
    loader = f"{name}.load" if own else "sklearn_maml.load"
    reader = Reader(str(path), loader, given, device, [*trusted])
    with reader.explaining():
        reader.check_given(node)
        decoder = Decoder(tensors, reader.look_up)
        return decoder.decode(node) if composite else reader.estimator(node, decoder, own)
