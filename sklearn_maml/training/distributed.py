"""Meta-training in several processes: each works on its share of every meta-batch.

A script that `torchrun` starts n times calls ``torch.distributed.init_process_group`` and then the
ordinary `fit`, with the same data and parameters in every process. Every process draws the same
meta-batches, computes losses and meta-gradient of its share of the tasks, and all take the mean
over all tasks, so each makes the update that one process alone would make.

What is the same everywhere: the parameters, the losses of the history and so every decision made
on them. What is not: modules that draw random numbers (dropout) draw others in each process. With
`random_state=None` the seed of the first process is taken.

A process that is interrupted, or that a callback stops or an error ends, announces it, and the fit
of the others ends too: as if interrupted, or with an error. One that is killed or that fails before
meta-training cannot; the others then fail when its connection is closed or, at the latest, after
the `timeout` given to ``init_process_group``.

Why not `DistributedDataParallel` or skorch's `AccelerateMixin`, which wraps modules in it: both
average gradients in hooks of ``loss.backward()`` of a wrapped module. A meta-gradient never passes
there: parameters flow as dicts through the engine, which returns the gradient. They also deal out
the batches of the loader, which makes batches larger rather than faster. What has to be shared is
the outcome of a meta-step and nothing else, so it is the engine that is wrapped.
"""

from __future__ import annotations

import contextlib
import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import joblib
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.engine import MetaStep, MetaSteps

_alone = contextvars.ContextVar("_alone", default=False)
# one fit at a time: the collectives of two, in threads, would be taken for each other's
_fitting = threading.Lock()

# what a process announces before each exchange; the highest number wins
GOES_ON, FINISHED, INTERRUPTED, FAILED = range(4)


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Let fits inside this context ignore the process group.

    For scripts in which every process of a `torch.distributed` group fits a model of its own, or
    only one of them fits.

    Yields
    ------
    None
        Nothing; use it in a ``with`` statement.

    Examples
    --------
    >>> from sklearn_maml.distributed import single_process
    >>> with single_process():
    ...     pass  # reg.fit(X, y, groups=task)
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def find_processes() -> Processes | None:
    """Return the processes that a fit is shared with; None if it is this one's alone."""
    if _alone.get() or not (dist.is_available() and dist.is_initialized()):
        return None
    return Processes() if dist.get_world_size() > 1 else None


class Processes:
    """The default process group, as a fit uses it."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = torch.device("cpu")
        self.left = False  # whether this process, or another, has announced its end
        self.net: Any = None

    def agree_on_seed(self, seed: int, given: bool) -> int:
        """Take the seed of the first process, unless the user gave one to all of them."""
        seeds: list[Any] = [None] * self.size
        dist.all_gather_object(seeds, (seed, given))
        if len({was_given for _, was_given in seeds}) > 1:
            raise ValueError(
                "random_state was given to some of the processes of this fit and not to others. "
                "Give all of them the same."
            )
        return seed if given else int(seeds[0][0])

    def compare(self, **values: Any) -> None:
        """Refuse to start where something differs between the processes.

        Parameters
        ----------
        **values : dict
            What has to be equal; compared by checksum.
        """
        own = {name: joblib.hash(value) for name, value in values.items()}
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        for name in own:
            differing = [rank for rank in range(self.size) if found[rank][name] != found[0][name]]
            if differing:
                raise ValueError(
                    f"The {self.size} processes of this fit must be given the same, but "
                    f"{name.replace('_', ' ')} differ on rank(s) {differing[:5]} from those on "
                    "rank 0. Load and order the data alike, set random_state, and seed torch "
                    "before building a module instance; to fit models of their own, fit inside "
                    "sklearn_maml.distributed.single_process()."
                )

    def share(self, engine: MetaSteps, net: Any) -> SharedEngine:
        """Engine that computes a share of each batch; `net` is what it trains."""
        self.device = next(engine.module.parameters()).device
        self.net = net
        return SharedEngine(engine, self)

    def __enter__(self) -> Processes:
        if not _fitting.acquire(blocking=False):
            raise RuntimeError(
                "Another fit of this process is sharing its work with the process group. Run fits "
                "one after another (n_jobs=None), or inside "
                "sklearn_maml.distributed.single_process()."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                if not self.left:
                    self.announce(FAILED)
                return
            if not self.left:
                status = self.announce(INTERRUPTED if self.net.interrupted_ else FINISHED)
                if status == FAILED:
                    self.raise_for(status)
            self._agree()
        finally:
            _fitting.release()

    def announce(self, status: int, n_outputs: int = 0) -> int:
        """Exchange what each process is about to do; return the highest status."""
        header = torch.tensor([status, n_outputs], device=self.device)
        self.reduce(header, dist.ReduceOp.MAX)
        status, self.n_outputs = header.tolist()
        self.left = status != GOES_ON
        return status

    def reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Combine values of all processes, in place."""
        self.left = True  # after a failure there is nobody to announce anything to
        dist.all_reduce(values, op=operation)
        self.left = False

    def raise_for(self, status: int) -> None:
        """End this process's share because another one's has ended."""
        if status == FAILED:
            raise RuntimeError(
                "Another process of this fit has failed; its own error says why. Nothing was "
                "fitted here."
            )
        raise KeyboardInterrupt("another process of this fit has stopped")

    def _agree(self) -> None:
        """Take the outcome of the first process.

        It makes up for an interrupt that met the processes one update apart, for the last bits in
        which unlike machines differ, and for buffers that the module itself updates.
        """
        net = self.net
        outcome = [net.module_.state_dict(), net.optimizer_.state_dict(), net.update_]
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if self.rank:
            net.module_.load_state_dict(outcome[0])
            net.optimizer_.load_state_dict(outcome[1])
            net.update_ = outcome[2]


class SharedEngine(MetaSteps):
    """An engine for a share of the tasks whose results are those of all of them."""

    def __init__(self, engine: MetaSteps, processes: Processes) -> None:
        self.engine = engine
        self.processes = processes

    def threads(self, n_rows: int) -> Any:
        """See `MetaSteps`."""
        return self.engine.threads(n_rows)

    def expect(self, first_update: int, n_updates: int, **outlook: int) -> None:
        """See `MetaSteps`."""
        self.engine.expect(first_update, n_updates, **outlook)

    def finish(self) -> None:
        """See `MetaSteps`."""
        self.engine.finish()

    def meta_step(self, meta_params: dict[str, Tensor], batch: Any, **options: Any) -> MetaStep:
        """See `MetaSteps`."""
        step = self._share(
            batch, meta_params, lambda part: self.engine.meta_step(meta_params, part, **options)
        )
        self._average_statistics()
        return step

    def _average_statistics(self) -> None:
        """Give all processes the mean of the running averages that a step has moved.

        Held-out tasks are judged with them, and all processes have to judge alike.
        """
        moved = self.engine.running_averages()
        if not moved:
            return
        with _uninterrupted():
            flat = torch.cat([values.flatten() for values in moved])
            self.processes.reduce(flat)
        flat /= self.processes.size
        for values, mean in zip(moved, flat.split([v.numel() for v in moved]), strict=True):
            values.copy_(mean.view_as(values))

    def evaluate(
        self, meta_params: dict[str, Tensor], batch: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """See `MetaSteps`."""

        def run(part: EpisodeBatch) -> MetaStep:
            losses, outputs = self.engine.evaluate(meta_params, part, **options)
            return MetaStep(losses, {}, outputs)

        # no process decides on losses that another one has not seen
        step = self._share(batch, {}, run)
        return step.losses, step.outputs

    def _share(
        self,
        batch: EpisodeBatch,
        like: dict[str, Tensor],
        run: Callable[[EpisodeBatch], MetaStep],
    ) -> MetaStep:
        """Run this process's share of the tasks and join the results of all processes.

        `like` has the shapes of the gradients.
        """
        n_tasks, width = batch.query.X.shape[:2]
        # consecutive tasks, as evenly as possible; none where there are more processes than tasks
        share = np.array_split(np.arange(n_tasks), self.processes.size)[self.processes.rank]
        step = None
        if len(share):
            step = run(batch.take(share))
        with _uninterrupted():
            n_outputs = 0 if step is None else step.outputs.shape[-1]
            status = self.processes.announce(GOES_ON, n_outputs)
            if status != GOES_ON:
                self.processes.raise_for(status)
            losses = batch.query.X.new_zeros(n_tasks)
            outputs = losses.new_zeros(n_tasks, width, self.processes.n_outputs)
            grads = [torch.zeros_like(p) for p in like.values()]
            if step is not None:
                # zeros elsewhere: the sums over the processes are exact
                losses[share[0] : share[-1] + 1] = step.losses
                outputs[share[0] : share[-1] + 1, : step.outputs.shape[1]] = step.outputs
                grads = [step.grads[name] * (len(share) / n_tasks) for name in like]
            parts = [losses, outputs, *grads]
            flat = torch.cat([part.flatten() for part in parts])
            self.processes.reduce(flat)
        joined = [
            part.view(like_part.shape)
            for part, like_part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        return MetaStep(joined[0], dict(zip(like, joined[2:], strict=True)), joined[1])


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put a Ctrl-C off until an exchange is complete, so that processes stay in step."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])
