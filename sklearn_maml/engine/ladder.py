"""The ladder: picks the rung to begin on, and climbs by sizes.

A rung is added by putting its class into `RUNGS`. No other place knows a rung by its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sklearn_maml.engine.pieces import Join, is_out_of_memory, run_pieces, sets_of
from sklearn_maml.engine.rungs.base import CannotClimbError, Outlook, Rung, warn_once
from sklearn_maml.engine.rungs.conv import Conv
from sklearn_maml.engine.rungs.loop import Loop
from sklearn_maml.engine.rungs.native import Native
from sklearn_maml.engine.rungs.stacked import Stacked
from sklearn_maml.engine.rungs.traced import Traced
from sklearn_maml.engine.rungs.vmap import Vmap
from sklearn_maml.engine.spec import Spec, Step
from sklearn_maml.engine.tracing.recording import first_line
from sklearn_maml.engine.tracing.tracer import Tracer
from sklearn_maml.exceptions import EngineFallbackWarning

# the fastest first; one that another is climbed to from, after it
RUNGS: list[type[Rung]] = [Native, Traced, Conv, Stacked, Vmap, Loop]

Result = TypeVar("Result")


class Ladder:
    """The rungs that cover a spec.

    Parameters
    ----------
    spec : Spec
    asked : str
        Name of a rung: the fastest to be used, ready from the start; "auto" for any.

    Attributes
    ----------
    top : Rung
        The highest that is used or may yet be climbed to.
    base : Rung
        The one that it began on, and that others are climbed to from.
    update : int
        Meta-updates made so far.
    fallback_reason : str or None
        Why tasks run one after another.
    tracer : Tracer
        What is traced, or why nothing is.
    """

    def __init__(self, spec: Spec, asked: str = "auto") -> None:
        self.spec = spec
        self.update = self._end = 0
        self._outlook: Outlook = {}
        self._phase: Any = None  # of the meta-gradient, at the last meta-step
        self.fallback_reason: str | None = None
        kinds = _kinds(asked)
        base = self._first([kind for kind in kinds if not kind.climbs_from])
        assert base is not None  # the loop runs everything
        self.top = base
        climbed = []
        for kind in reversed([kind for kind in kinds if isinstance(base, kind.climbs_from)]):
            if kind.refuses(spec) is None:
                self.top = kind(spec, lambda below=self.top: below)  # type: ignore[misc]
                climbed.append(self.top)
        self.base = base
        self._waiting = [rung for rung in climbed if not rung.ready]
        self.tracer = next((r.tracer for r in climbed if isinstance(r, Traced)), Tracer())
        if asked != "auto":
            found = next((r for r in self.top.chain() if r.name == asked), None)
            if found is None:
                reasons = [k.refuses(spec) for k in kinds if k.name == asked]
                raise ValueError(f"rung={asked!r} cannot be used here. Reason: {reasons[0]}")
            self._climb(found)

    def _first(self, kinds: Sequence[type[Rung]]) -> Rung | None:
        """Make the first rung that covers the spec, if there is one."""
        for i, kind in enumerate(kinds):
            if kind.refuses(self.spec) is None:
                return kind(self.spec, lambda below=kinds[i + 1 :]: self._first(below))  # type: ignore[misc]
        return None

    @property
    def rung(self) -> str:
        """Name of the rung in use."""
        return next(r for r in self.top.chain() if r.ready and not r.is_wrapper).name

    @property
    def tasks_at_a_time(self) -> int:
        """Tasks adapted or predicted at a time."""
        return next(r for r in self.top.chain() if r.ready).tasks_at_a_time

    # -- climbing --------------------------------------------------------------------------------

    def expect(self, first_update: int, n_updates: int, outlook: Outlook) -> None:
        """Prepare for meta-steps to come; see `Rung.expect`."""
        self.update, self._end, self._outlook = first_update, first_update + n_updates, outlook
        for rung in self.top.chain():
            if rung.expect(first_update, n_updates, outlook):
                break

    def expect_tasks(self, n_tasks: int, n_rows: int, steps: int, remembered: str) -> None:
        """Climb where adapting to so many tasks repays it, or where that has been done before."""
        for rung in self._waiting:
            again = rung.name == remembered and self.spec.on_cpu
            if again or rung.repays(n_tasks, n_rows, steps):
                self._climb(rung)

    def climb_to(self, name: str) -> None:
        """Take the rung of another ladder for the same spec, where it is to be had here."""
        if name == Loop.name:
            self._descend()
        for rung in self._waiting:
            if rung.name == name and self.spec.on_cpu:
                self._climb(rung)

    def next_step(self, alpha: float, steps: int) -> Step:
        """Begin a meta-update: climb if that is due, and say what is asked."""
        for rung in self._waiting:
            if rung.due(self.update):
                self._climb(rung)
        phase, end = self.spec.meta_gradient.phase(self.update)
        if phase != self._phase:
            self.tracer.restart()
        self._phase = phase
        self.update += 1
        others = 0 if end is None else max(self._end - end, 0)
        return Step(alpha, steps, self.spec.parts, phase, self.update - 1, others)

    def _climb(self, rung: Rung) -> None:
        try:
            rung.climb()
        except CannotClimbError as error:
            warn_once(str(error))
            assert rung.below is not None
            self.top = rung.below  # whatever is above is climbed to from it
            # the next best
            self.expect(self.update, self._end - self.update, self._outlook)
        self._waiting = [r for r in self._waiting if r is not rung]

    def _descend(self) -> None:
        """Leave all rungs that have failed."""
        self.top = next(r for r in self.top.chain() if r.safe and r.ready and not r.is_wrapper)

    # -- running ---------------------------------------------------------------------------------

    def run(
        self,
        batch: Any,
        step: Step,
        call: Callable[[Rung, Any], Result],
        join: Join[Result],
    ) -> Result:
        """Run a batch, or the pieces that its rung cuts it into."""
        rung = self.top.serving(step, *sets_of(batch))
        try:
            return run_pieces(
                batch,
                rung.pieces(batch),
                lambda part: call(rung.serving(step, *sets_of(part)), part),
                join,
                in_threads=rung.in_threads,
            )
        except (RuntimeError, NotImplementedError) as error:
            # the kernel that attention chose may have no second derivative
            if "scaled_dot_product" in str(error) and self.spec.attend():
                return self.run(batch, step, call, join)
            if rung.safe or is_out_of_memory(error):
                raise
            # an error of the module itself is raised here
            result = call(next(r for r in rung.chain() if r.safe), batch)
            self._fall_back(error)
            return result

    def _fall_back(self, error: Exception) -> None:
        self._descend()
        self.fallback_reason = first_line(error)
        warnings.warn(
            f"{type(self.spec.module).__name__} cannot be run over a batch of tasks with "
            "torch.vmap, so tasks are run one after another, with the same results. Reason: "
            f"{self.fallback_reason}",
            EngineFallbackWarning,
            stacklevel=2,
        )

    # -- interrupted fits, and those that follow -------------------------------------------------

    def remembered(self, before: str) -> str:
        """Return what `begin_with` and `expect_tasks` of a later engine should know.

        The plain loop where batching has failed, and what was climbed to; else what was known
        before.
        """
        if self.fallback_reason is not None:
            return Loop.name
        top = self.top
        return top.name if top.ready and top.climbs_from and not top.is_wrapper else before

    def findings(self) -> dict[str, Any]:
        """Return the rung, and what predictions have been found to need."""
        return {
            "rung": self.rung,
            "attends": self.spec.attends,
            "predicts_singly": self.spec.predicts_singly,
        }

    def take_up(self, findings: dict[str, Any]) -> None:
        """Take the findings of another ladder for the same spec."""
        if findings["attends"]:
            self.spec.attend()
        self.spec.predicts_singly = bool(findings["predicts_singly"])
        self.climb_to(findings["rung"])

    def progress(self) -> dict[str, Any]:
        """Return what meta-training has changed, as plain data, for `resume`."""
        return {
            **self.findings(),
            "fallback_reason": self.fallback_reason,
            "phase": self._phase,
            "tracer": self.tracer.progress(),
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on where the ladder of an interrupted fit stood."""
        self.take_up(progress)
        self.fallback_reason = progress["fallback_reason"]
        self._phase = progress["phase"]
        self.tracer.resume(progress["tracer"])


def _kinds(asked: str) -> list[type[Rung]]:
    """Rungs to choose from where the fastest is asked for by its name; "auto": all."""
    if asked == "auto":
        return list(RUNGS)
    names = [kind.name for kind in RUNGS]
    if asked not in names:
        raise ValueError(f"rung={asked!r} is not known. Expected 'auto' or one of {names}.")
    number = names.index(asked)
    base = RUNGS[number].climbs_from[-1:] or (RUNGS[number],)
    lowest = names.index(base[0].name)
    return [
        kind
        for i, kind in enumerate(RUNGS)
        if i >= (lowest if not kind.climbs_from else 0 if number == lowest else number)
    ]


def begin_with(remembered: str) -> str:
    """Rung to ask an engine for, of what `Ladder.remembered` returned."""
    return remembered if remembered == Loop.name else "auto"
