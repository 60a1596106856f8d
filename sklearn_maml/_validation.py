"""Parameter plumbing shared by the estimators: prefixed parameters, misspelt names, atomic fits."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from sklearn.base import clone

F = TypeVar("F", bound=Callable[..., Any])


def is_number(value: Any) -> bool:
    """Whether a parameter is a real number, of numpy too; bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a parameter is an integer, of numpy too; bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_integer(value: Any) -> Any:
    """Return an integer that a tuner gives as 3.0; other values as they are."""
    whole = is_number(value) and not is_integer(value) and float(value).is_integer()
    return int(value) if whole else value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggestion for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_keywords(function: Callable[..., Any], options: dict[str, Any], prefix: str) -> None:
    """Refuse options that a class or function does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        # skorch passes settings of parameter groups through
        if name not in parameters and name.partition("__")[0] != "param_groups":
            raise ValueError(
                f"{prefix}__{name} is not a parameter of {function.__name__}."
                f"{did_you_mean(name, parameters)} It takes {sorted(parameters)}."
            )


def keeps_state_on_error(method: F) -> F:
    """Make a method leave its object as it was when it raises."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(vars(self))
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return wrapper  # type: ignore[return-value]


class PrefixedParamsMixin:
    """Parameters such as ``module__x`` and ``optimizer__x`` beside those of the signature.

    They are stored as attributes, appear in `get_params` and can be searched. Unknown names given
    to the constructor are kept and reported by `_check_parameter_names` (called by `fit`), because
    a constructor must not raise.
    """

    # options, with defaults, where no object has them; those of base classes need not be repeated
    _prefixes: ClassVar[dict[str, dict[str, Any] | None]] = {}
    _renamed: ClassVar[dict[str, str]] = {}  # names of earlier versions, and those of now

    # what inspect finds out takes longer than all else about parameters

    @classmethod
    @functools.cache
    def _get_param_names(cls) -> list[str]:
        names: list[str] = super()._get_param_names()  # type: ignore[misc]
        return names

    @classmethod
    @functools.cache
    def _signature_names(cls) -> list[str]:
        parameters = inspect.signature(cls.__init__).parameters.values()
        return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]

    @classmethod
    @functools.cache
    def _gathered(cls, attribute: str) -> dict[str, Any]:
        """Return a dict of this class, and of those that it is made of."""
        items = [item for c in cls.__mro__ for item in vars(c).get(attribute, {}).items()]
        return dict(reversed(items))

    def _extra_params(self) -> dict[str, Any]:
        known = set(self._signature_names())
        return {
            name: value
            for name, value in vars(self).items()
            if name not in known and not name.startswith("_") and not name.endswith("_")
        }

    def _prefixed(self, prefix: str) -> dict[str, Any]:
        """Return the parameters ``prefix__*`` without their prefix."""
        head = f"{prefix}__"
        given = {
            name[len(head) :]: value for name, value in vars(self).items() if name.startswith(head)
        }
        return {**(self._gathered("_prefixes")[prefix] or {}), **given}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters of this estimator.

        Parameters
        ----------
        deep : bool, default=True
            Whether to include the parameters of contained objects.

        Returns
        -------
        params : dict
            Parameter names and values, prefixed ones included.
        """
        params: dict[str, Any] = super().get_params(deep=deep)  # type: ignore[misc]
        return {**params, **self._extra_params()}

    def set_params(self, **params: Any) -> Any:
        """Set parameters of this estimator.

        Parameters
        ----------
        **params : dict
            Parameter names and values, prefixed ones such as ``module__x`` included.

        Returns
        -------
        self : object
        """
        own = {}
        for name in list(params):
            head, separator, _ = name.partition("__")
            if not separator or not self._has_prefix(name):
                continue
            holder = params.get(head, getattr(self, head, None))
            if isinstance(holder, type) or not hasattr(holder, "set_params"):
                own[name] = params.pop(name)
        known = self.get_params(deep=True)
        for name in params:
            head = name.partition("__")[0]
            _check_holder(name, {**known, **params})
            if head not in known:
                known |= dict.fromkeys(self._option_names())
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}."
                    f"{self._suggestion(name, known)} Valid parameters are: {sorted(known)}."
                )
        super().set_params(**params)  # type: ignore[misc]
        for name in params:
            if "__" in name:
                vars(self).pop(name, None)  # the contained object holds it now
        vars(self).update(own)
        return self

    def _check_parameter_names(self) -> None:
        """Report names that no parameter has; the constructor accepts them."""
        known = [*self._signature_names(), *self._option_names()]
        for name in self._extra_params():
            if self._has_prefix(name):
                continue
            _check_holder(name, vars(self))
            prefixes = ", ".join(f"{prefix}__*" for prefix in self._gathered("_prefixes"))
            raise ValueError(
                f"{type(self).__name__} has no parameter {name!r}.{self._suggestion(name, known)}"
                f" Expected one of {sorted(known)} or a prefixed parameter ({prefixes})."
            )

    def _option_names(self) -> list[str]:
        prefixes = self._gathered("_prefixes").items()
        return [f"{prefix}__{name}" for prefix, options in prefixes for name in options or ()]

    def _has_prefix(self, name: str) -> bool:
        """Whether a name has one of the prefixes, with an option of it where these are known."""
        head, _, option = name.partition("__")
        prefixes = self._gathered("_prefixes")
        return bool(option) and head in prefixes and option in (prefixes[head] or (option,))

    def _suggestion(self, name: str, known: Iterable[str]) -> str:
        """Say which parameter an unknown name may mean."""
        renamed = self._gathered("_renamed")
        if name in renamed:
            return f" It is {renamed[name]!r} now."
        head, _, option = name.partition("__")
        free = [prefix for prefix, own in self._gathered("_prefixes").items() if option and not own]
        alike = difflib.get_close_matches(head, free)  # whatever the option, which may be long
        return did_you_mean(name, [*known, *(f"{prefix}__{option}" for prefix in alike)])


def _check_holder(name: str, values: dict[str, Any]) -> None:
    """Refuse a parameter of a parameter that has none."""
    head, separator, tail = name.partition("__")
    if separator and head in values and not hasattr(values[head], "set_params"):
        raise ValueError(
            f"{name} sets {tail!r} of the object that {head} is, but {head}={values[head]!r} has "
            "no parameters. Leave it out."
        )


def resolve_object(
    parameter: str, value: Any, options: dict[str, Any], base: type, known: dict[str, Any]
) -> Any:
    """Return a copy of the object that a parameter is, or names.

    `options` are its parameters, as ``parameter__*`` gives them; the first of the classes `known`
    is the example of a message. It is not checked.
    """
    if isinstance(value, base):
        result: Any = clone(value).set_params(**options)
    elif isinstance(value, str) and value in known:
        unknown = options and sorted(options.keys() - known[value]().get_params().keys())
        if unknown:
            names = sorted(known[value]().get_params())
            raise ValueError(
                f"{parameter}={value!r} got the options {unknown}; it takes {names or 'none'}."
            )
        result = known[value](**options)
    else:
        example = f"{base.__module__.rpartition('.')[0]}.{next(iter(known.values())).__name__}()"
        article = "an" if base.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{parameter}={value!r} is not known. Expected one of {sorted(known)} or {article} "
            f"{base.__name__} object such as {example}."
        )
    return result
