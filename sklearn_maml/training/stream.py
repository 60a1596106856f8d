"""The data sets of meta-training: a stream of tasks, and the episodes of held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, to_device
from sklearn_maml.engine.outer import MetaSteps
from sklearn_maml.training import schedule

# meta-batches drawn at a time, at most (a power of two), and the memory they may take
UPDATES_PER_BLOCK = 64
BLOCK_BYTES = 2**24


class Episodes(torch.utils.data.Dataset):
    """A data set of meta-batches of episodes."""

    n_batches: int

    def in_order(self) -> Iterator[EpisodeBatch]:
        """Return all batches."""
        raise NotImplementedError

    def place(self, device: torch.device, engine: MetaSteps, steps: int) -> None:
        """Keep the batches on a device, on which an engine takes so many inner steps."""
        raise NotImplementedError


class TaskStream(Episodes):
    """Endless shuffled passes over the tasks; its item is a task, its batch an episode batch.

    Batches are drawn in blocks of many, which costs far less. They are a function of the seed and
    the number of the update, so a run that is continued draws what an uninterrupted one would have
    drawn.

    Parameters
    ----------
    draw : callable (task_positions, rng) -> list of EpisodeBatch
        Takes positions of shape (n_batches, batch_size).
    n_tasks : int
    batch_size : int
    seed : int
    bytes_of_episode : int, default=0
        Memory that drawing an episode takes, which bounds the length of a block.
    draw_on : callable (device, task_positions, rng, prepare) -> list of EpisodeBatch, default=None
        Draws on a device; None moves what `draw` returns.

    Attributes
    ----------
    device : torch.device or None
        Where `batch` draws; None leaves that to the user of the batches.
    prepare : callable EpisodeBatch -> EpisodeBatch or None
        Makes `EpisodeBatch.prepared`, on the host, of batches that are drawn on a device.
    """

    def __init__(
        self,
        draw: Callable[[np.ndarray, np.random.Generator], list[EpisodeBatch]],
        n_tasks: int,
        batch_size: int,
        seed: int,
        bytes_of_episode: int = 0,
        draw_on: Callable[..., list[EpisodeBatch]] | None = None,
    ) -> None:
        self.draw = draw
        self.draw_on = draw_on
        self.device: torch.device | None = None
        self.prepare: Callable[[EpisodeBatch], EpisodeBatch] | None = None
        self.n_tasks = n_tasks
        self.batch_size = batch_size
        self.seed = seed
        self.first_update = 0
        self.n_updates = schedule.UPDATES_PER_EPOCH
        self.largest_block = UPDATES_PER_BLOCK
        while self.largest_block > 1 and (
            self.largest_block * batch_size * bytes_of_episode > BLOCK_BYTES
        ):
            self.largest_block //= 2
        self._block: tuple[int, list[EpisodeBatch]] = (-1, [])
        # orders of the tasks in several passes, made at once
        self.n_passes = max(1000 // n_tasks, 1)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_updates * self.batch_size

    @property
    def n_batches(self) -> int:  # type: ignore[override]
        """Meta-updates of an epoch."""
        return self.n_updates

    def in_order(self) -> Iterator[EpisodeBatch]:
        """See `Episodes`."""
        return map(self.batch, range(self.first_update, self.first_update + self.n_updates))

    def place(self, device: torch.device, engine: MetaSteps, steps: int) -> None:
        """See `Episodes`."""
        self.device, self.prepare = device, engine.preparation(steps)

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            rng = np.random.default_rng((self.seed, 0, number))
            order = rng.random((self.n_passes, self.n_tasks)).argsort(1).ravel()
            kept = {k: v for k, v in self._orders.items() if k >= number - 1}
            self._orders = {**kept, number: order}
        return self._orders[number]

    def _tasks(self, positions: np.ndarray) -> np.ndarray:
        """Tasks at these positions of the stream."""
        which = np.zeros(positions.shape, dtype=np.intp)
        if self.n_tasks == 1:  # a pool or a distribution: nothing to shuffle
            return which
        number, place = np.divmod(positions, self.n_passes * self.n_tasks)
        for k in np.unique(number).tolist():
            which[number == k] = self._order(k)[place[number == k]]
        return which

    def batch(self, update: int) -> EpisodeBatch:
        """Return the meta-batch of an update, counted from the first one of all fits."""
        # blocks double up to the largest, so that a short fit draws few batches in vain
        if update < self.largest_block:
            first = (1 << update.bit_length()) >> 1
            end = max(2 * first, 1)
        else:
            first = update - update % self.largest_block
            end = first + self.largest_block
        if self._block[0] != first:
            positions = np.arange(first * self.batch_size, end * self.batch_size)
            which = self._tasks(positions).reshape(-1, self.batch_size)
            rng = np.random.default_rng((self.seed, 1, first))
            self._block = (first, self._drawn(which, rng))
        return self._block[1][update - first]

    def _drawn(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        if self.device is None:
            return self.draw(which, rng)
        if self.draw_on is None:
            return to_device(self.draw(which, rng), self.device)
        return self.draw_on(self.device, which, rng, self.prepare)

    def __getitems__(self, items: list[int]) -> EpisodeBatch:
        positions = self.first_update * self.batch_size + np.asarray(items)
        start = int(positions[0])
        update, place = divmod(start, self.batch_size)
        if place == 0 and np.array_equal(positions, np.arange(start, start + self.batch_size)):
            return self.batch(update)
        # a data loader that shuffles
        rng = np.random.default_rng((self.seed, 4, start))
        return self.draw(self._tasks(positions)[None], rng)[0]

    def __getitem__(self, item: int) -> EpisodeBatch:
        return self.__getitems__([item])


class FixedEpisodes(Episodes):
    """Episodes drawn once, the same at every validation."""

    def __init__(self, batches: list[EpisodeBatch]) -> None:
        self.batches = batches
        self.n_batches = len(batches)

    def __len__(self) -> int:
        return self.n_batches

    def in_order(self) -> Iterator[EpisodeBatch]:
        """See `Episodes`."""
        return iter(self.batches)

    def place(self, device: torch.device, engine: MetaSteps, steps: int) -> None:
        """See `Episodes`."""
        self.batches = to_device(self.batches, device)

    def __getitems__(self, items: list[int]) -> EpisodeBatch:
        return self.batches[items[0]]

    def __getitem__(self, item: int) -> EpisodeBatch:
        return self.batches[item]


class BatchLoader:
    """Batches of a data set in order, as a data loader gives them at a higher price."""

    def __init__(self, dataset: Episodes) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.n_batches

    def __iter__(self) -> Iterator[tuple[EpisodeBatch, Tensor]]:
        return map(use_batch, self.dataset.in_order())


def use_batch(batch: EpisodeBatch) -> tuple[EpisodeBatch, Tensor]:
    """Collate: a skorch batch is (inputs, targets); the targets are the pooled query targets."""
    return batch, batch.query.real(batch.query.y)


class Loaders:
    """Gives the data loaders of a net generators of their own, and keeps their states.

    Attributes
    ----------
    before : dict of Tensor
        States before an interruption, which the next loaders go on from.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self._made: dict[str, Any] = {}

    def add(self, kind: str, iterator: Any, kept: bool) -> None:
        """Let a loader leave torch's global generator alone; `kept` if its state is asked for."""
        if getattr(iterator, "generator", True) is None:
            iterator.generator = torch.Generator().manual_seed(0)
            if getattr(iterator.sampler, "generator", True) is None:
                iterator.sampler.generator = iterator.generator
        if kind in self.before:
            iterator.generator.set_state(self.before.pop(kind))
        if kept:
            self._made[kind] = iterator

    def states(self) -> dict[str, Tensor]:
        """Return the states of the generators, for a checkpoint."""
        generators = {k: getattr(loader, "generator", None) for k, loader in self._made.items()}
        return {k: g.get_state() for k, g in generators.items() if g is not None}

    def forget(self) -> None:
        """Let go of the loaders."""
        self._made = {}


class ValidateOn:
    """skorch's train split: the stream of tasks, and the validation episodes if there are any."""

    def __init__(self, batches: list[EpisodeBatch] | None) -> None:
        self.batches = batches

    def __call__(self, stream: Any, y: Any = None, **fit_params: Any) -> tuple[Any, Any]:
        """Return the training stream and the validation dataset."""
        return stream, None if self.batches is None else FixedEpisodes(self.batches)
