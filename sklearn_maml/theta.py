"""Meta-parameters: by name, as an optimiser has them, and parted, as the inner loop sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

Params = dict[str, Tensor]

# the names of `MetaLearner` for the parameters of its two parts
MODULE, RULE = "module.", "rule."


@dataclass(frozen=True)
class Theta:
    """Meta-parameters."""

    fast: Params  # parameters of the module that adapt
    shared: Params  # those that do not, frozen ones too
    learned: Params  # what the update rule learned


@dataclass(frozen=True)
class Parts:
    """How named meta-parameters are parted."""

    adapted: frozenset[str]  # names, in the module, of the parameters that adapt
    frozen: Params = field(default_factory=dict)  # which need not be among the meta-parameters

    def part(self, meta_params: Params) -> Theta:
        """Part meta-parameters."""
        module = {n[len(MODULE) :]: p for n, p in meta_params.items() if n.startswith(MODULE)}
        # rates are stored by underscored names: ParameterDict refuses dots
        names = {rate_key(name): name for name in module}
        learned = {n[len(RULE) :]: r for n, r in meta_params.items() if n.startswith(RULE)}
        fast = {name: p for name, p in module.items() if name in self.adapted}
        shared = {name: p for name, p in module.items() if name not in self.adapted}
        return Theta(
            fast, {**self.frozen, **shared}, {names.get(k, k): r for k, r in learned.items()}
        )

    def others(self, meta_params: Iterable[str]) -> list[str]:
        """Names of the meta-parameters that do not adapt."""
        return [name for name in meta_params if name.removeprefix(MODULE) not in self.adapted]


def name_in_module(name: str) -> str:
    """Name of a parameter of the module among the meta-parameters."""
    return MODULE + name


def name_in_rule(name: str) -> str:
    """Name of what a rule learned among the meta-parameters."""
    return RULE + rate_key(name)


def rate_key(name: str) -> str:
    """Name under which a learned rate, of a parameter say, is stored."""
    return name.replace(".", "__")
