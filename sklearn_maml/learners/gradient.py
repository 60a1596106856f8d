"""Tasks learned by inner steps from a meta-learned initialisation (Finn et al. 2017)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import Rows, pad_rows
from sklearn_maml.engine import AdaptedParams as Parameters
from sklearn_maml.engine import Engine, begin_with
from sklearn_maml.exceptions import NonFiniteStepWarning
from sklearn_maml.inner import fit_outputs, mean_loss
from sklearn_maml.learners.base import Adapted, Support, alike
from sklearn_maml.theta import name_in_module

# rows of one task predicted at a time, and how many of them
ROWS_AT_A_TIME, PIECES = 4096, 16
# A task's loss is looked at where a parameter has moved by more than this part of the largest one:
# looking at all tasks would cost as much as a step. Steps have diverged where it is so many times
# what it was before, or without any features, after 1, 2, 4, ... of them: when units that had grown
# without bound are at rest on all support rows, the loss is small again. Parts of the rate that are
# tried then.
SUSPECT, GROWTH, SHORTER = 0.25, 4.0, (0.1, 0.01, 1e-3, 1e-4)
CACHED = 2**17  # numbers that are looked at together


@dataclass(frozen=True)
class Running:
    """What predictions by gradient steps depend on that may be changed after `fit`."""

    batch_norm: str
    max_tasks_in_memory: int | None
    device: torch.device


@dataclass
class GradientSteps:
    """A meta-learned initialisation, and how inner steps are taken from it.

    Attributes
    ----------
    meta_params : dict of str to Tensor
        ``module.*`` and ``rule.*``.
    make_engine : callable rung -> Engine
    alpha : float
    steps : int
    how : Running
    rung : str
        That of the last fit, or of the last call.
    quiet : bool
        Whether steps that were shortened go without a warning: of an ordinary estimator, that knows
        one task, they are a line search.
    link : callable outputs -> predictions, or None
        Of losses with a logarithmic one, which may lie far off in outputs at a small loss.
    """

    meta_params: dict[str, Tensor]
    make_engine: Callable[[str], Engine]
    alpha: float
    steps: int
    how: Running
    rung: str = "auto"
    quiet: bool = False
    link: Callable[[Tensor], Tensor] | None = None

    def adapt(self, support: Support) -> AdaptedBySteps:
        """Adapt to every task."""
        # short tasks with short ones, so that little is padding
        sizes = np.bincount(support.codes, minlength=support.n_tasks)
        order = np.argsort(support.codes, kind="stable")
        ends = np.cumsum(sizes)
        # what was changed since (clipping, say) may be nothing for the rung of the last call
        engine = self.make_engine(begin_with(self.rung))
        engine.ladder.expect_tasks(len(sizes), int(sizes.max()), self.steps, self.rung)
        # a mean of losses has ratios of weights alone, a sum beside a penalty what they are
        in_closed_form = engine.spec.head is not None
        given = support.weight
        if given is not None and in_closed_form:
            given = support.evidence()
        adapted: Parameters | None = None
        moved: list[Tensor] = []
        at_a_time = _chunk(engine, self.how)
        pieces = list(alike(sizes, at_a_time))

        def rows_of(tasks: np.ndarray) -> Rows:
            place = np.concatenate([order[ends[j] - sizes[j] : ends[j]] for j in tasks])
            weight = None if given is None else given[place]
            rows = pad_rows(
                support.X, support.y, place, sizes[tasks], weight, normalise=not in_closed_form
            )
            return rows.to(self.how.device)

        for chosen in pieces:
            rows = rows_of(chosen)
            with engine.threads(rows.X.shape[0] * rows.X.shape[1]):
                part = engine.adapt(self.meta_params, rows, alpha=self.alpha, steps=self.steps)
                moved.append(self._moved_far(part))
            # written to its place at once: of many tasks, two copies would not fit
            adapted = _place(part, adapted, chosen, support.n_tasks)
        assert adapted is not None
        self.rung = engine.ladder.remembered(self.rung)
        suspects = np.concatenate(pieces)[torch.cat(moved).cpu().numpy()]
        shortened = stopped = 0
        for start in range(0, len(suspects), at_a_time):
            tasks = suspects[start : start + at_a_time]
            counts = self._tame(engine, adapted, tasks, rows_of(tasks))
            shortened, stopped = shortened + counts[0], stopped + counts[1]
        if (shortened or stopped) and not self.quiet:
            warnings.warn(
                f"The inner steps diverged on {shortened + stopped} of {support.n_tasks} tasks: "
                f"the loss of their support sets grew. {shortened} took shorter steps, and "
                f"the predictions of {stopped} are those of the initialisation. Look at these "
                f"tasks' rows for outliers, or lower alpha (now {self.alpha:g}) or adapt_steps.",
                NonFiniteStepWarning,
                stacklevel=4,
            )
        return AdaptedBySteps(engine, adapted, self.alpha)

    def _moved_far(self, part: Parameters) -> Tensor:
        """Which tasks (n_tasks,) have a parameter that is far from where it began."""
        start = [self.meta_params[name_in_module(n)] for n in part.params]
        if part.n_tasks == 1 and start[0].is_cpu:  # calls of torch take longer than so few numbers
            pairs = [
                (p[0].numpy(), s.numpy()) for p, s in zip(part.params.values(), start, strict=True)
            ]
            size = np.max([np.abs(s).max() for _, s in pairs if s.size])
            move = np.max([np.abs(p - s).max() for p, s in pairs if s.size])
            return torch.tensor([not move <= SUSPECT * size])  # NaN is far
        reach = torch.stack(torch._foreach_norm(start, math.inf)).amax()
        moves = [_largest(p, s) for p, s in zip(part.params.values(), start, strict=True)]
        return ~(torch.stack(moves).amax(0) <= SUSPECT * reach)

    def _tame(
        self, engine: Engine, adapted: Parameters, tasks: np.ndarray, rows: Rows
    ) -> tuple[int, int]:
        """Shorten the steps of those tasks whose loss has grown, in place.

        Returns
        -------
        shortened, stopped : int
            Tasks that took shorter steps, and that have the initialisation back.
        """
        with engine.threads(rows.X.shape[0] * rows.X.shape[1]):
            start = engine.adapt(self.meta_params, rows, alpha=self.alpha, steps=0)
            outputs = engine.predict(start, rows, batch_norm=self.how.batch_norm)
            before = self._sizes(engine, outputs, rows)
            # with batch norms the loss of predictions is not the one that the steps follow
            most = torch.full_like(before, torch.finfo(before.dtype).max)
            if not engine.spec.norms:
                blind = self._sizes(engine, torch.zeros_like(outputs), rows)
                most = GROWTH * torch.maximum(before, blind)
            taken = adapted.take(tasks)
            fails = self._grown_by(engine, taken, self.alpha, rows, most)
            n_failed = int(fails.sum())
            for factor in SHORTER:
                if not bool(fails.any()):
                    break
                alpha = factor * self.alpha
                again = engine.adapt(self.meta_params, rows, alpha=alpha, steps=self.steps)
                works = fails & ~self._grown_by(engine, again, alpha, rows, most)
                _replace(adapted, tasks, again, works)
                fails = fails & ~works
            _replace(adapted, tasks, start, fails)
        stopped = int(fails.sum())
        return n_failed - stopped, stopped

    def _grown_by(
        self, engine: Engine, last: Parameters, alpha: float, rows: Rows, most: Tensor
    ) -> Tensor:
        """Which tasks (n_tasks,) are beyond `most` after the last step, or were on the way."""
        grown = self._grown(engine, last, rows, most)
        steps = 1
        # a head is solved for at once, and with norms whatever is finite will do
        looks = engine.spec.head is None and not engine.spec.norms
        while looks and steps < self.steps:
            on_the_way = engine.adapt(self.meta_params, rows, alpha=alpha, steps=steps)
            grown |= self._grown(engine, on_the_way, rows, most)
            steps *= 2
        return grown

    def _grown(self, engine: Engine, parameters: Parameters, rows: Rows, most: Tensor) -> Tensor:
        """Which tasks (n_tasks,) have a loss, or predictions, beyond `most`."""
        outputs = engine.predict(parameters, rows, batch_norm=self.how.batch_norm)
        return ~(self._sizes(engine, outputs, rows) <= most).all(0)

    def _sizes(self, engine: Engine, outputs: Tensor, rows: Rows) -> Tensor:
        """Losses, and with a link the largest of predictions and targets, (1 or 2, n_tasks)."""
        outputs = fit_outputs(outputs, rows.y)
        sizes = [mean_loss(engine.spec.row_loss(outputs, rows.y), rows.weight)]
        if self.link is not None:
            reach = torch.maximum(self.link(outputs), rows.y)
            if rows.weight is not None:  # 0 for padding
                reach = reach.where(rows.weight[..., None] > 0, 0)
            sizes.append(reach.flatten(1).amax(1))
        return torch.stack(sizes)


def _largest(values: Tensor, start: Tensor) -> Tensor:
    """Largest difference (n_tasks,) from where values (n_tasks, ...) began."""
    # some tasks at a time, whose differences stay in the caches of a CPU
    n = max(CACHED // start.numel(), 1) if values.is_cpu else len(values)
    return torch.cat([(some - start).abs_().flatten(1).amax(1) for some in values.split(n)])


def _replace(adapted: Parameters, tasks: np.ndarray, other: Parameters, which: Tensor) -> None:
    """Take over those of the tasks for which `which` holds."""
    where = torch.as_tensor(tasks, device=which.device)[which]
    for to, new in ((adapted.params, other.params), (adapted.statistics, other.statistics)):
        for name, values in to.items():
            values[where] = new[name][which]


class AdaptedBySteps(Adapted):
    """Parameters adapted to each task, and an engine that predicts with them."""

    def __init__(self, engine: Engine, adapted: Parameters, alpha: float) -> None:
        self.engine = engine
        self.adapted = adapted
        self.alpha = alpha

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.adapted.n_tasks

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Running) -> np.ndarray:
        """See `Adapted`."""
        no_targets = np.zeros(len(rows), dtype=rows.dtype)
        if self.n_tasks == 1 and len(rows) <= ROWS_AT_A_TIME:  # there is nothing to sort or to cut
            everything = np.arange(len(rows))
            query = pad_rows(rows, no_targets, everything, np.array([len(rows)]))
            return self._outputs(self.adapted, query, how)
        order = np.argsort(codes, kind="stable")
        tasks, counts = np.unique(codes, return_counts=True)
        # a task with very many rows is predicted in several pieces
        joined = self.engine.joins_rows(how.batch_norm)
        n_pieces = np.ones_like(counts) if joined else -(-counts // ROWS_AT_A_TIME)
        piece_task = np.repeat(tasks, n_pieces)
        first = np.repeat(np.cumsum(counts) - counts, n_pieces)
        number = np.arange(len(piece_task)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        first = first + number * ROWS_AT_A_TIME
        size = np.repeat(counts, n_pieces) - number * ROWS_AT_A_TIME
        if not joined:
            size = np.minimum(size, ROWS_AT_A_TIME)
        result: np.ndarray | None = None
        for chosen in alike(size, _chunk(self.engine, how), PIECES * ROWS_AT_A_TIME):
            place = np.concatenate([order[first[j] : first[j] + size[j]] for j in chosen])
            query = pad_rows(rows, no_targets, place, size[chosen])
            values = self._outputs(self.adapted.take(piece_task[chosen]), query, how)
            if result is None:
                result = np.empty((len(rows), values.shape[1]), dtype=values.dtype)
            result[place] = values
        assert result is not None
        return result

    def _outputs(self, adapted: Parameters, query: Rows, how: Running) -> np.ndarray:
        """Return outputs (n_rows, n_outputs) of the rows of some tasks, one after another."""
        query = query.to(how.device)
        with self.engine.threads(query.X.shape[0] * query.X.shape[1]):
            output = self.engine.predict(adapted, query, batch_norm=how.batch_norm)
        if output.ndim == 2:
            output = output.unsqueeze(-1)
        values: np.ndarray = query.real(output).cpu().numpy()
        return values

    def module(self, task: int, how: Running) -> nn.Module:
        """See `Adapted`."""
        if self.engine.joins_rows(how.batch_norm):
            raise TypeError(
                "With engine__batch_norm='transductive' the prediction of a row depends on the "
                "rows beside it, which no module of one's own can tell. Set 'inductive' to have "
                "those of the support set normalise instead."
            )
        return self.engine.module_of(self.adapted, task)

    def state(self) -> dict[str, Any]:
        """Adapted parameters, and what an engine needs to predict with them as it did."""
        return {
            "kind": "steps",
            "params": self.adapted.params,
            "shared": self.adapted.shared,
            "statistics": self.adapted.statistics,
            "alpha": self.alpha,
            "engine": self.engine.prediction_state(),
        }

    @classmethod
    def from_state(
        cls, module: nn.Module, row_loss: Any, device: torch.device, state: dict[str, Any]
    ) -> AdaptedBySteps:
        """Make what `state` described."""
        params, shared, statistics = (
            {name: tensor.to(device) for name, tensor in state[part].items()}
            for part in ("params", "shared", "statistics")
        )
        own = {name: p.detach() for name, p in module.named_parameters()}
        for name, tensor in shared.items():  # in the memory of the module, as after adapt
            if name in own and torch.equal(own[name], tensor):
                shared[name] = own[name]
        engine = Engine.for_prediction(module, row_loss, list(params), state["engine"])
        return cls(engine, Parameters(params, shared, statistics), state["alpha"])


def _chunk(engine: Engine, how: Running) -> int:
    """Tasks to adapt to or predict for at a time."""
    most = engine.ladder.tasks_at_a_time
    return min(most, how.max_tasks_in_memory or most)


def _place(
    part: Parameters, whole: Parameters | None, tasks: np.ndarray, n_tasks: int
) -> Parameters:
    """Write adapted parameters of some tasks to their places among those of all."""
    if len(tasks) == n_tasks and (np.diff(tasks) == 1).all():
        return part

    def room(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.new_empty(n_tasks, *t.shape[1:]) for name, t in parts.items()}

    if whole is None:
        whole = Parameters(room(part.params), part.shared, room(part.statistics))
    where = torch.as_tensor(tasks, device=next(iter(part.params.values())).device)
    for to, some in ((whole.params, part.params), (whole.statistics, part.statistics)):
        for name, values in some.items():
            to[name].index_copy_(0, where, values)
    return whole
