"""What a report of a bug needs: versions, kernels and threads."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from sklearn_maml.native import NativeUnavailableError, instruction_set, instruction_sets

PACKAGES = (
    "sklearn-maml",
    "numpy",
    "scipy",
    "scikit-learn",
    "torch",
    "skorch",
    "joblib",
    "safetensors",
    "pandas",
    "polars",
    "matplotlib",
)


def show_versions() -> None:
    """Print the versions of Python and of the libraries, and what the kernels can use.

    `kernels` is the instruction set that fits of multilayer perceptrons run on, and in brackets
    those that are there; "none" where the package was installed without a C++ compiler, in which
    case such fits take several times as long.

    Examples
    --------
    >>> import sklearn_maml
    >>> sklearn_maml.show_versions()
    python        3...
    """
    facts = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    try:
        kernels = f"{instruction_set()} ({', '.join(instruction_sets())})"
    except (NativeUnavailableError, ValueError) as error:
        kernels = f"none: {error}"
    facts |= {"kernels": kernels, "threads": str(torch.get_num_threads())}
    facts["cuda"] = torch.version.cuda or "none"
    width = max(map(len, facts))
    print("\n".join(f"{name:{width}s}  {value}" for name, value in facts.items()))  # noqa: T201
