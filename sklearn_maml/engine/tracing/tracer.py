"""Traced steps: a function of tensors is recorded once and its flat graph run from then on.

Eager ``vmap(grad(...))`` spends most of its time in the dispatcher's layers. `trace` records the
operations that are left below them, simplifies the record without changing a number, and returns
a plain function of tensors. `Tracer` decides when that pays, by counting updates and never by the
clock, so that a fit takes the same steps on every machine.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sklearn_maml.engine.tracing.graphs import close, nudged, prepared
from sklearn_maml.engine.tracing.recording import (
    Function,
    Untraceable,
    restore,
    same,
    states_of,
)

# Updates still to come on a shape that make its trace pay. Tracing took 35 to 90 eager updates in
# every case measured (it grows with the graph as the updates do), and a second more where it was
# the first of the process; it saves more than half of each update that follows.
MIN_UPDATES = 1000
# Times a shape has to be seen first: one-off shapes are never traced
MIN_SEEN = 3
# graphs traced by one fit
MAX_GRAPHS_PER_FIT = 16


class Tracer:
    """Traces a step when enough updates are still to come, and runs what was traced.

    A traced step replaces the eager one from the update after it was recorded. On that update the
    eager step runs too; it is what the caller gets, and what the graph has to agree with. So a
    fit gives the same numbers whether or not the process had the graph already.

    Parameters
    ----------
    min_updates : int
        Updates to come on a shape from which it is traced.
    min_seen : int
        Times a shape is seen before it is traced.

    Attributes
    ----------
    updates_left : int
        Updates still to come, as far as the caller knows; 0 traces nothing.
    reason : str or None
        Why nothing is traced any more.
    n_traced : int
        Shapes that run traced.
    """

    def __init__(self, min_updates: int = MIN_UPDATES, min_seen: int = MIN_SEEN) -> None:
        self.min_updates = min_updates
        self.min_seen = min_seen
        self.updates_left = self._others = 0
        self.reason: str | None = None
        self._updates = 0
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._graphs: dict[Hashable, Function] = {}
        self._resumed: set[Hashable] = set()  # shapes that were traced before an interruption

    def __getstate__(self) -> dict[str, Any]:
        # what has been seen belongs to the fit, and graphs cannot be pickled
        fresh = {"_seen": collections.Counter(), "_graphs": {}, "_updates": 0, "_resumed": set()}
        return {**self.__dict__, **fresh}

    def progress(self) -> dict[str, Any]:
        """Return what has been decided so far, as plain data, for `resume`."""
        return {
            "updates": self._updates,
            "seen": list(self._seen.items()),
            "traced": list(self._graphs),
            "reason": self.reason,
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on where another tracer, of the same fit, stood.

        Shapes that it had traced are traced when they come again, and run traced from that update
        on, so that every update of the fit takes the same graph as without the interruption.
        """
        self._updates = progress["updates"]
        self._seen = collections.Counter(dict(progress["seen"]))
        self._resumed = set(progress["traced"])
        self.reason = progress["reason"]

    @property
    def n_traced(self) -> int:
        """Shapes that run traced."""
        return len(self._graphs)

    def begin_update(self, others: int = 0) -> bool:
        """Count an update; return whether anything is, or may yet be, traced.

        `others` of the updates still to come, the last ones, are steps that compute something else.
        """
        self._updates += 1
        self.updates_left = max(self.updates_left - 1, 0)
        self._others = others
        waits = self._alike_left >= self.min_updates and self.reason is None
        return waits or bool(self._graphs) or bool(self._resumed)

    @property
    def _alike_left(self) -> int:
        return max(self.updates_left - self._others, 0)

    def restart(self) -> None:
        """Forget the steps so far: those to come compute something else."""
        left = self.updates_left
        self.finish()
        self.updates_left, self._updates = left, 0
        self._seen.clear()
        self._graphs.clear()
        self._resumed.clear()

    def run(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        *,
        shape: Hashable,
        settings: Callable[[], Hashable],
        recorded: bool = True,
    ) -> list[Tensor] | None:
        """Run a step traced, if it is; otherwise return None, or trace it now.

        Parameters
        ----------
        function : callable (*tensors) -> list of Tensor
            The eager step.
        inputs : sequence of Tensor
        shape : hashable
            What tells the calls of this fit apart that need a graph of their own.
        settings : callable () -> hashable
            Everything the step depends on besides its inputs, to share graphs between fits.
        recorded : bool, default=True
            Whether the step is traced; otherwise its kernels are captured as they are launched,
            where the device can do that.

        Raises
        ------
        Untraceable
            Once, with the reason, if the step cannot be traced; its eager outputs are in
            ``args[1]``.
        """
        graph = self._graphs.get(shape)
        if shape in self._resumed:
            graph = self._trace_again(function, inputs, shape, settings(), recorded)
        if graph is not None:
            return graph(*inputs)
        if self.reason is not None or len(self._graphs) >= MAX_GRAPHS_PER_FIT:
            return None
        self._seen[shape] += 1
        seen = self._seen[shape]
        if seen < self.min_seen or self._alike_left * seen < self.min_updates * self._updates:
            return None
        before = settings()
        start = states_of(inputs)
        expected = function(*inputs)
        if not all(bool(torch.isfinite(t).all()) for t in expected):
            return expected  # nothing to compare with; the next update may do better
        end = states_of(inputs)
        try:
            if settings() != before or not same(start[:2], end[:2]):
                raise Untraceable("what it computes depends on Python state that its calls change")
            key = (before, tuple((t.shape, t.dtype, t.device) for t in inputs))

            def agrees(graph: Function) -> bool:
                restore(inputs, start)
                got = graph(*inputs)
                return same(states_of(inputs), end) and close(got, expected, rounded)

            def rounded() -> list[Tensor]:
                restore(inputs, start)
                return function(*nudged(inputs))

            self._graphs[shape] = prepared(key, function, inputs, agrees, recorded)
        except Untraceable as error:
            self.reason = str(error)
            raise Untraceable(self.reason, expected) from error
        finally:
            restore(inputs, end)
        return expected

    def _trace_again(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        shape: Hashable,
        settings: Hashable,
        recorded: bool,
    ) -> Function:
        """Trace what was traced before an interruption."""
        self._resumed.discard(shape)
        key = (settings, tuple((t.shape, t.dtype, t.device) for t in inputs))
        try:
            # it agreed with the step before the interruption
            graph = prepared(key, function, inputs, lambda graph: True, recorded)
        except Untraceable as error:
            self.reason = str(error)
            raise Untraceable(self.reason, function(*inputs)) from error
        self._graphs[shape] = graph
        return self._graphs[shape]

    def finish(self) -> None:
        """Expect no more updates."""
        self.updates_left = 0
