"""The meta-parameters that a fit trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.theta import rate_key
from sklearn_maml.update_rules import TaskSolver


class MetaLearner(nn.Module):
    """The meta-parameters: the user's module as initialisation, and what the rule learns.

    `steps` and `classification` are for the rule, see `TaskSolver.initial_rates`. A Gaussian head
    is trained beside these where `head` is set.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: TaskSolver,
        adapted: list[str],
        *,
        steps: int = 1,
        classification: bool = False,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.head: Any = None
        fast = {name: p.detach() for name, p in module.named_parameters() if name in adapted}
        rates = rule.initial_rates(fast, steps=steps, classification=classification)
        self.rule = nn.ParameterDict({rate_key(n): nn.Parameter(r) for n, r in rates.items()})

    def without_steps(self) -> None:
        """Leave the initialisation out: a Gaussian head alone is to be trained."""
        self.module, self.rule = None, nn.ParameterDict()

    @property
    def network(self) -> nn.Module:
        """The initialisation, or the head where there is none."""
        return self.head if self.module is None else self.module

    def networks(self) -> list[nn.Module]:
        """All that has a forward pass of its own."""
        of_head = [] if self.head is None else [self.head]
        if isinstance(self.head, GaussianHead):
            of_head = list(getattr(self.head.body, "members", []))
        return [*([] if self.module is None else [self.module]), *of_head]

    def meta_params(self) -> dict[str, Tensor]:
        """Return the meta-parameters by name: ``module.*``, ``rule.*``, ``head.*``, frozen too."""
        return {name: p.detach() for name, p in self.named_parameters()}
