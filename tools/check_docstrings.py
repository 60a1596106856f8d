"""Fail when a public docstring does not follow numpydoc.

Checks what `__all__` of the given modules exports, and the public methods and properties
that those classes define in the package. Inherited scikit-learn methods are left alone.

Usage: python tools/check_docstrings.py [module ...]
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from numpydoc.validate import validate

MODULES = [
    "sklearn_maml",
    "sklearn_maml.evaluation",
    "sklearn_maml.datasets",
    "sklearn_maml.inspection",
]
# What https://numpydoc.readthedocs.io/en/latest/validation.html calls these.
ENFORCED = {
    "GL03",  # two blank lines in a row
    "GL06",  # unknown section
    "GL07",  # sections in the wrong order
    "GL08",  # no docstring
    "SS01",  # no summary
    "SS02",  # summary does not start with a capital letter
    "SS03",  # summary does not end with a full stop
    "SS06",  # summary of several lines
    "PR01",  # parameters not documented
    "PR02",  # documented parameters that do not exist
    "PR03",  # parameters in the wrong order
    "PR04",  # parameter without a type
    "PR07",  # parameter without a description
    "PR10",  # no space before the colon of a type
    "RT01",  # no Returns section
    "RT03",  # return value without a description
    "YD01",  # no Yields section
}
# Written by scikit-learn, or by its rules.
SKIPPED = re.compile(r"get_params|set_params|get_metadata_routing|set_\w+_request|_.*")


def public_objects(module_name: str) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, object) of all that `module_name` promises."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        dotted = f"{module_name}.{name}"
        yield dotted, value
        if inspect.isclass(value):
            for method in sorted(own_methods(value, module_name.partition(".")[0])):
                yield f"{dotted}.{method}", getattr(value, method)


def own_methods(cls: type, package: str) -> set[str]:
    """Public methods and properties of `cls` that the package itself wrote."""
    return {
        name
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == package
        for name, value in vars(base).items()
        if not SKIPPED.fullmatch(name)
        and (inspect.isroutine(value) or inspect.isdatadescriptor(value))
    }


def check(module_names: list[str]) -> list[str]:
    """Return one message per failure in the modules."""
    failures = []
    for module_name in module_names:
        for dotted, value in public_objects(module_name):
            errors = validate(dotted)["errors"]
            codes = set(ENFORCED)
            if inspect.isclass(value) and issubclass(value, BaseException):
                # Built-in exceptions accept anything; there are no parameters to describe.
                codes -= {"PR01"}
            failures += [f"{dotted}: {code} {text}" for code, text in errors if code in codes]
    return failures


def main(arguments: list[str]) -> int:
    """Check the modules named on the command line, by default the public ones."""
    # This checkout, whatever else may be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    failures = check(arguments or MODULES)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
