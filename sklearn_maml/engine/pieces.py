"""The one place that cuts batches of tasks, runs the pieces and puts the results back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows, put_back
from sklearn_maml.engine.spec import MetaStep
from sklearn_maml.engine.tracing.recording import first_line
from sklearn_maml.exceptions import EngineFallbackWarning
from sklearn_maml.theta import Params
from sklearn_maml.threads import side_by_side

Batch = Any  # EpisodeBatch or Rows
Result = TypeVar("Result")
Places = Sequence[np.ndarray]
Join = Callable[[list[Result], Places], Result]


def sets_of(batch: Batch) -> tuple[Rows, ...]:
    """Return the sets of rows of a batch."""
    return (batch.support, batch.query) if isinstance(batch, EpisodeBatch) else (batch,)


def run_pieces(
    batch: Batch,
    places: Places | None,
    run: Callable[[Batch], Result],
    join: Join[Result],
    *,
    in_threads: bool = False,
) -> Result:
    """Run the tasks at each of these places together; None: all of them.

    In threads, some are run at the same time, with the same results.
    """
    if places is None:
        return run(batch)

    # a single piece has all tasks, in their order; where they are ragged, less of the padding
    is_whole = len(places) == 1 and all(rows.lengths is None for rows in sets_of(batch))

    def run_piece(which: np.ndarray) -> Result:
        return run(batch if is_whole else batch.take(which))

    parts = side_by_side(run_piece, places) if in_threads else [*map(run_piece, places)]
    return join(parts, places)


def chunks(n: int, size: int) -> list[np.ndarray]:
    """Positions 0 to n - 1 in consecutive pieces of at most `size`."""
    return np.split(np.arange(n), range(size, n, size))


def equal_shapes(batch: Batch) -> list[np.ndarray] | None:
    """Positions of the tasks that share their row counts; None when all do."""
    sets = sets_of(batch)
    if all(rows.lengths is None for rows in sets):
        return None
    sizes = np.stack(
        [
            np.full(len(batch), rows.X.shape[1]) if rows.lengths is None else rows.lengths
            for rows in sets
        ],
        axis=1,
    )
    _, inverse = np.unique(sizes, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [np.flatnonzero(inverse == k) for k in range(inverse.max() + 1)]


def join_steps(parts: list[MetaStep], places: Places) -> MetaStep:
    """Meta-step of all tasks, of those of some."""
    if len(parts) == 1:
        return parts[0]
    n_tasks = sum(len(part.losses) for part in parts)
    weights = [len(part.losses) / n_tasks for part in parts]
    grads = {
        name: torch.stack(
            [w * part.grads[name] for w, part in zip(weights, parts, strict=True)]
        ).sum(0)
        for name in parts[0].grads
    }
    losses = put_back([part.losses for part in parts], places)
    return MetaStep(losses, grads, join_outputs([part.outputs for part in parts], places))


def join_params(parts: list[Params], places: Places) -> Params:
    """Parameters of all tasks, of those of some."""
    return {name: put_back([part[name] for part in parts], places) for name in parts[0]}


def join_outputs(parts: list[Tensor], places: Places, width: int | None = None) -> Tensor:
    """Return outputs of all tasks, of those of some; rows are padded with zeros to the longest."""
    width = max(part.shape[1] for part in parts) if width is None else width
    return put_back([_pad_rows_to(width, part) for part in parts], places)


def _pad_rows_to(width: int, values: Tensor) -> Tensor:
    """Pad (n_tasks, n_rows, ...) with zeros to `width` rows."""
    padding = values.new_zeros(len(values), width - values.shape[1], *values.shape[2:])
    return torch.cat([values, padding], dim=1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory did not suffice."""
    # torch's allocator on CPU raises a plain RuntimeError
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory")
    )


class Memory:
    """How many tasks fit into the memory at once.

    Parameters
    ----------
    most : int or None
        As many as the user allows; None: any number.

    Attributes
    ----------
    most : int or None
        The same, or fewer when more have been found not to fit.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most

    def run(
        self,
        batch: EpisodeBatch,
        run: Callable[[EpisodeBatch], MetaStep],
        join: Join[MetaStep] = join_steps,
    ) -> MetaStep:
        """Run a meta-batch in chunks of at most `most`, smaller ones if need be."""
        size = min(self.most or len(batch), len(batch))
        done: MetaStep | None = None
        n_done, reason = 0, ""
        while n_done < len(batch):
            which = np.arange(n_done, min(n_done + size, len(batch)))
            try:
                part = run(batch if len(which) == len(batch) else batch.take(which))
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                reason = first_line(error)
            else:
                done = part if done is None else join([done, part], [np.arange(n_done), which])
                n_done += len(which)
                continue
            size //= 2  # after the except block: the error holds on to what it ran out of
        assert done is not None
        if reason:
            self.most = size
            warnings.warn(
                f"The memory did not suffice for a meta-batch of {len(batch)} tasks, which is "
                f"now run {size} at a time, with the same results to rounding. Set "
                f"engine__max_tasks_in_memory={size} to do so from the start, or "
                f"engine__checkpoint_steps=True. Reason: {reason}",
                EngineFallbackWarning,
                stacklevel=3,
            )
        return done
