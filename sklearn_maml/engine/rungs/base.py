"""What a rung is."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows
from sklearn_maml.engine.spec import AdaptedParams, MetaStep, Spec, Step
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.inner import Differentiator, Forward, InnerProblem, RecomputedSteps
from sklearn_maml.theta import Params, Theta

Outlook = dict[str, int]


class Rung(ABC):
    """A way to run a batch of tasks.

    A rung of one's own subclasses this and is put into `sklearn_maml.engine.ladder.RUNGS`, before
    those that it is faster than. It has to give the numbers of the plain loop, in float64 to
    rounding.

    Parameters
    ----------
    spec : Spec
        What is asked of the engine.
    below : callable () -> Rung
        Makes the next rung, for what this one does not take.

    Attributes
    ----------
    name : str
    tasks_at_a_time : int
        Tasks adapted or predicted at a time: bounds memory and suits the caches.
    one_by_one : bool
        Whether it runs one task after another itself, so that batches need not be cut for the
        memory's sake, and takes them as they are drawn.
    is_wrapper : bool
        Whether it runs steps of the rung below, and goes by its name.
    in_threads : bool
        Whether its pieces may run at the same time.
    gains_by_record : bool
        Whether recorded steps are faster; otherwise only where a device launches them at once.
    joins_rows : bool
        Whether rows of padding would change predictions for the others.
    safe : bool
        Whether errors are the module's own; otherwise a safe rung below is tried.
    ready : bool
        Whether it can be used; a rung that is worth its start in long fits alone is not at first.
    """

    name: ClassVar[str]
    tasks_at_a_time: ClassVar[int] = 128
    one_by_one: ClassVar[bool] = False
    is_wrapper: ClassVar[bool] = False
    in_threads: bool = False
    gains_by_record: ClassVar[bool] = True
    joins_rows: bool = False
    safe: bool = True
    ready: bool = True
    # of rungs that are climbed to: those that they are climbed to from
    climbs_from: ClassVar[tuple[type[Rung], ...]] = ()

    def __init__(self, spec: Spec, below: Callable[[], Rung | None]) -> None:
        self.spec = spec
        self._make_below = below

    @functools.cached_property
    def below(self) -> Rung | None:
        """The next rung, made when it is first needed; None: there is none."""
        return self._make_below()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_make_below": None, "below": self.below}

    @classmethod
    def refuses(cls, spec: Spec) -> str | None:
        """Say why a spec is not covered; None where it is."""
        return None

    def takes(self, step: Step, *sets: Rows) -> bool:
        """Whether it runs these sets of rows (support sets first)."""
        return True

    def predicts(self, query: Rows) -> bool:
        """Whether it predicts for these rows."""
        return True

    @abstractmethod
    def meta_step(self, meta_params: Params, batch: EpisodeBatch, step: Step) -> MetaStep:
        """Query losses after adaptation, and the gradient of their mean."""

    @abstractmethod
    def adapt(self, theta: Theta, support: Rows, step: Step) -> Params:
        """Parameters that adapt, (n_tasks, ...), after adapting to each support set."""

    @abstractmethod
    def outputs(self, adapted: AdaptedParams, query: Rows) -> Tensor:
        """Return outputs of each task's parameters on its rows, (n_tasks, n_rows, n_outputs).

        With the batch-norm statistics among `adapted`, or else those of the rows.
        """

    def pieces(self, batch: Any) -> list[np.ndarray] | None:
        """Places of the tasks of a batch that are run together; None: all of them."""
        return None

    @property
    def recorded(self) -> Rung:
        """The rung whose step is worth recording in the place of this one's."""
        return self

    # -- climbing --------------------------------------------------------------------------------

    def expect(self, first_update: int, n_updates: int, outlook: Outlook) -> bool:
        """Prepare for meta-steps to come; return whether those below need not.

        Parameters
        ----------
        first_update, n_updates : int
            Updates made before, and to come at most.
        outlook : dict
            ``n_tasks`` of a meta-batch, ``n_rows`` of a task, and inner ``steps``.
        """
        return False

    def due(self, update: int) -> bool:
        """Whether to climb to this rung at an update."""
        return False

    def repays(self, n_tasks: int, n_rows: int, steps: int) -> bool:
        """Whether adapting to so many tasks in one call is worth climbing to it."""
        return False

    def climb(self) -> None:  # noqa: B027 - most are ready
        """Get ready.

        Raises
        ------
        CannotClimbError
            With the reason, where that is impossible here.
        """

    def begin(self, step: Step) -> None:  # noqa: B027 - most have nothing to do
        """Begin a meta-step."""

    # -- the rungs below -------------------------------------------------------------------------

    def chain(self) -> Iterator[Rung]:
        """Yield the rung and those below."""
        rung: Rung | None = self
        while rung is not None:
            yield rung
            rung = rung.below

    def serving(self, step: Step, *sets: Rows) -> Rung:
        """Return the first rung from here on that runs these sets of rows."""
        if self.ready and self.takes(step, *sets):
            return self
        assert self.below is not None
        return self.below.serving(step, *sets)

    def predicting(self, query: Rows) -> Rung:
        """Return the first rung from here on that predicts for these rows."""
        if self.ready and self.predicts(query):
            return self
        assert self.below is not None
        return self.below.predicting(query)

    def problem(
        self,
        step: Step,
        forward: Forward,
        differentiator: Differentiator,
        support: Rows,
        query: Rows | None = None,
    ) -> InnerProblem:
        """Return the inner problem of these rows; without query rows, it is adapting alone."""
        spec, gradient = self.spec, self.spec.meta_gradient
        problem: dict[str, Any] = {
            "parts": step.parts,
            "row_loss": spec.row_loss,
            "rule": spec.rule,
            "alpha": step.alpha,
            "steps": step.steps,
            "proximal": gradient.proximal,
            "in_minibatches": gradient.in_minibatches and query is not None,
            "forward": forward,
            "differentiator": differentiator,
            "support": support,
            "query": support if query is None else query,
            "update": step.update,
        }
        # without second derivatives there is no graph of the steps that could be saved, and what
        # is solved for takes none
        if spec.checkpoint_steps and step.phase == 2 and spec.head is None:
            return RecomputedSteps(**problem, module=spec.module, random=spec.random)
        return InnerProblem(**problem)


class CannotClimbError(RuntimeError):
    """Raised, with the reason, by a rung that cannot be had here."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn of a rung that is not used, once in a process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, EngineFallbackWarning, stacklevel=3)
