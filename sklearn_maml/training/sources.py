"""Where the episodes of a meta-training come from: a collection of tasks, or a distribution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.data.sampling import MOST_VALIDATED, EpisodeSampler, draw_fixed, evenly
from sklearn_maml.data.splitting import hold_out, part_of
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.data.weights import row_marks, share_rows
from sklearn_maml.learners.head_trainer import HeldOut
from sklearn_maml.targets.base import Targets

# tasks drawn from a task distribution for validation, and to learn what its tasks look like
VALIDATION_TASKS = 100
# Gaussian head (docs/defaults.md has what these were compared with): members, and tasks from which
# on some are held out from each; sizes of support sets, log-uniform, and query rows
N_MEMBERS, LEAST_TASKS = 5, 4
HEAD_SUPPORT, HEAD_QUERIES = (3, 20), 15
# Rows of all classes together in episodes that have as many of each: of every second meta-batch,
# so that support sets with a row of each class are learned from beside those that come as they do.
# There are none where a class has less than this part of the rows that would be its own if all had
# as many: their query rows would teach that it is more frequent than it is. Nor of two classes,
# where each row of a support set counts by how much of a surprise it is
HEAD_ROWS_BY_CLASS, RARE = 10, 0.95
# support and query rows of held-out tasks, and how often they are drawn
HEAD_TESTED, HEAD_TESTED_QUERIES, HEAD_DRAWS = (5, 10), 30, 4
MOST_OF_MEMBER = 100  # of these tasks; those of the first member judge gradient steps, too
# Of labels that mean something inside an episode only: most support rows of a class, if
# n_shots is not larger; classes of an episode, and the part of a large pool that they are
HEAD_SHOTS, HEAD_WAYS, PART_OF_POOL = 5, 20, 0.05
UNSEEN = 0.2  # of the distinct rows: held out from one member where tasks share them


@dataclasses.dataclass(frozen=True)
class EpisodeSettings:
    """Parameters of an estimator that its episodes depend on."""

    n_shots: int | None
    n_queries: int | None
    early_stopping: bool | str
    validation_fraction: float
    reshape: Callable[[np.ndarray], np.ndarray]  # makes rows as the network takes them

    def encoded(self, tasks: TaskCollection, targets: Targets) -> TaskCollection:
        """Tasks as episodes are drawn from."""
        return targets.encode(tasks).having(X=self.reshape(tasks.X)).balanced()


class CollectionSource:
    """Episodes from a finite task collection, with some tasks held out for validation.

    Attributes
    ----------
    n_train : int
        Tasks that `draw` knows.
    n_held_out : int
        Tasks that validation looks at.
    held_out : int ndarray or None
        Positions of these tasks in the collection.
    of_tasks : bool
        Whether the tasks are known: they are no distribution, nor drawn from a pool of classes.
    """

    def __init__(
        self, tasks: TaskCollection, targets: Targets, settings: EpisodeSettings, seed: int
    ) -> None:
        n_ways, n_shots, n_queries = targets.n_ways, settings.n_shots, settings.n_queries
        encoded = settings.encoded(tasks, targets)
        self.tasks = tasks
        self.n_tasks = tasks.n_tasks
        self.ids = tasks.ids
        self.fingerprints = tasks.fingerprints() if tasks.named else {}
        # median and largest; of a task that is the only one they say nothing
        several = tasks.n_tasks > 1
        self.task_sizes = (
            (float(np.median(tasks.sizes)), int(tasks.sizes.max())) if several else None
        )
        self.single = tasks.spelling == "single" and n_ways is None
        pool = n_ways if tasks.spelling == "single" else None
        self.pooled = pool is not None
        self.of_tasks = not self.pooled
        self._kept, self._held = hold_out(
            encoded, settings.early_stopping, settings.validation_fraction, seed, pool
        )
        self.encoded, self.n_queries, self._seed = encoded, n_queries, seed
        self.options = {**targets.sampling(), "n_shots": n_shots}
        self._validation_queries = targets.validation_queries
        self.n_train = 1 if self.pooled else len(self._kept)
        self.rows_per_task = targets.episode_rows(tasks, n_shots, n_queries)
        self.n_held_out = 0
        # positions of the tasks held out; None too where classes are
        self.held_out: np.ndarray | None = None
        if self._held is not None:
            self.n_held_out = 1 if self.pooled else min(len(self._held), MOST_VALIDATED)
            self.held_out = None if self.pooled else self._held

    # copies of the rows, which a fit of a Gaussian head does without

    @property
    def training_tasks(self) -> TaskCollection:
        """Tasks, or classes, that are not held out."""
        return part_of(self.encoded, self._kept, self.pooled)

    @functools.cached_property
    def _training(self) -> EpisodeSampler:
        return EpisodeSampler(self.training_tasks, n_queries=self.n_queries, **self.options)

    @functools.cached_property
    def validation(self) -> list[EpisodeBatch] | None:
        """Episodes of held-out tasks."""
        if self._held is None:
            return None
        held = self._held
        if not self.pooled:
            held = held[evenly(len(held), MOST_VALIDATED)]
        tasks = part_of(self.encoded, held, self.pooled)
        sampler = EpisodeSampler(tasks, n_queries=self._validation_queries, **self.options)
        return draw_fixed(sampler, self._seed)

    def draw(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        """Batches of episodes of the tasks at positions (n_batches, n_episodes)."""
        return self._training.sample_batches(which, rng)

    @property
    def draw_on(self) -> Any:
        """As `draw`, of rows that stay on a device."""
        return self._training.sample_on

    @property
    def bytes_of_episode(self) -> int:
        """Memory of an episode."""
        return self._training.bytes_of_episode()


class DistributionSource:
    """Episodes from an object with ``sample(n_tasks, random_state)``: fresh tasks every time."""

    single = pooled = of_tasks = False
    ids = None
    n_tasks = None
    n_train = 1
    fingerprints: ClassVar[dict[Hashable, int]] = {}
    task_sizes = None
    draw_on = None  # fresh tasks are not on any device

    def __init__(
        self,
        distribution: Any,
        targets: Targets,
        settings: EpisodeSettings,
        seed: int,
        read: Callable[..., TaskCollection],
        *,
        learns: bool,
    ) -> None:
        self.targets, self.settings, self.read = targets, settings, read
        self.options = {**targets.sampling(), "n_shots": settings.n_shots}
        self.distribution = distribution
        drawn = distribution.sample(VALIDATION_TASKS, random_state=seed)
        if not isinstance(drawn, (list, tuple)) or len(drawn) == 0:
            raise ValueError(
                f"{type(distribution).__name__}.sample returned {type(drawn).__name__}; expected "
                "a list of (X, y) or (X_support, y_support, X_query, y_query) tasks."
            )
        tasks = read(drawn, None, reset=learns)
        if learns:
            targets.learn(tasks)
        self.tasks = tasks
        self.encoded = settings.encoded(tasks, targets)
        self.rows_per_task = targets.episode_rows(tasks, settings.n_shots, settings.n_queries)
        self.bytes_of_episode = (
            self._sampler(tasks, settings.n_queries).bytes_of_episode()
            + 2 * (tasks.X.nbytes + tasks.y.nbytes) // tasks.n_tasks
        )
        self.validation: Any = None
        self.n_held_out = tasks.n_tasks
        if settings.early_stopping:
            self.validation = draw_fixed(self._sampler(tasks, targets.validation_queries), seed)

    def _sampler(self, tasks: TaskCollection, n_queries: int | None) -> EpisodeSampler:
        encoded = self.settings.encoded(tasks, self.targets)
        self.targets.check_splittable(encoded, self.settings.n_shots)
        if encoded.sizes.min() == 0:
            raise ValueError(
                f"{type(self.distribution).__name__}.sample returned a task without rows. Return "
                "tasks with 2 rows or more."
            )
        return EpisodeSampler(encoded, n_queries=n_queries, **self.options)

    def draw(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        """Episodes of as many fresh tasks as there are positions (n_batches, n_episodes)."""
        drawn = self.distribution.sample(which.size, random_state=int(rng.integers(2**31 - 1)))
        if len(drawn) != which.size:
            raise ValueError(
                f"{type(self.distribution).__name__}.sample returned {len(drawn)} tasks, but "
                f"{which.size} were asked for. Return as many as n_tasks says; tasks may repeat."
            )
        tasks = _collect_quickly(drawn, self.tasks)
        if tasks is None:
            tasks = self.read(drawn, None)
        sampler = self._sampler(tasks, self.settings.n_queries)
        return sampler.sample_batches(np.arange(tasks.n_tasks).reshape(which.shape), rng)


class CrossFitted:
    """Episodes for the members of a Gaussian head, each of which holds out tasks of its own.

    Where there are no tasks to hold out (of a distribution, or a pool of classes, or by request)
    all members learn from the same episodes. Those of a pool have more classes than `n_ways` where
    the pool is large, and as many rows in all: more classes to tell from each other teach more,
    and what is learned is the same for any number of them.

    Parameters
    ----------
    source : CollectionSource or DistributionSource
    n_members : int
    with_steps : bool
        Whether gradient steps are trained beside the head. They learn from all tasks but those of
        the first member: episodes of these come on top of a batch.
    holds_out : bool
    fraction : float
        Of the tasks, that a member holds out.
    seed : int

    Attributes
    ----------
    draw, n_train, bytes_of_episode, rows_per_task
        As of `source`.
    unseen : uint8 ndarray of shape (n_rows,) or None
        Bit j says that member j does not learn from a row.
    validation : list of EpisodeBatch or None
        Of tasks that neither the first member nor gradient steps learn from.
    task_of_episode : int ndarray
        Task of each of their episodes.
    member_validation : list of HeldOut
        What members are judged on.
    shared_rows : ndarray or None
        Distinct rows of features where tasks share them; some are hidden from the last member.
    n_ways : int or None
        Classes of the episodes that `draw` makes, where labels mean something inside them only.
    """

    part = 1.0  # of the tasks of a batch that are drawn

    def __init__(
        self,
        source: Any,
        *,
        n_members: int,
        with_steps: bool,
        holds_out: bool,
        fraction: float,
        seed: int,
    ) -> None:
        self.source = source
        self.rows_per_task = source.rows_per_task
        self.unseen: np.ndarray | None = None
        self.shared_rows: np.ndarray | None = None
        self.n_ways = source.options["n_ways"]
        self.shots_range = None
        if self.n_ways is not None:
            # no matter which of them are asked for: it learns how much a row more tells
            self.shots_range = (1, max(source.options["n_shots"] or 0, HEAD_SHOTS))
        if source.of_tasks:
            self._cross_fit(source.encoded, n_members, with_steps, holds_out, fraction, seed)
            return
        self._take_all(source)
        if source.pooled and not with_steps:
            self._draw_from_pool()

    def _take_all(self, source: DistributionSource | CollectionSource) -> None:
        """Have all members learn from the episodes of the source."""
        self.n_train = source.n_train
        self.draw, self.draw_on = source.draw, source.draw_on
        self.bytes_of_episode = source.bytes_of_episode
        self.validation: Any = source.validation
        n_episodes = sum(map(len, source.validation or []))
        # of a pool of classes every episode is a task
        n_tasks = n_episodes if source.pooled else source.n_held_out
        self.task_of_episode = np.arange(n_episodes) % max(n_tasks, 1)
        stops = np.cumsum([len(batch) for batch in source.validation or []])
        self.member_validation = [
            HeldOut(None, batch, self.task_of_episode[stop - len(batch) : stop])
            for batch, stop in zip(source.validation or [], stops, strict=True)
        ]

    def _cross_fit(
        self,
        tasks: TaskCollection,
        n_members: int,
        with_steps: bool,
        holds_out: bool,
        fraction: float,
        seed: int,
    ) -> None:
        """Have each member hold out tasks of its own."""
        rng = np.random.default_rng((seed, 2))
        in_turn = rng.permutation(tasks.n_tasks)
        size = min(max(round(fraction * tasks.n_tasks), 1), tasks.n_tasks - 1)
        self.folds = [
            np.sort(np.take(in_turn, np.arange(j * size, (j + 1) * size), mode="wrap"))
            for j in range(n_members if holds_out else 0)
        ]
        self._make_samplers(tasks)
        self.bytes_of_episode = self.samplers[0].bytes_of_episode()
        self.held = self.folds[0] if with_steps and holds_out else np.arange(0)
        self.kept = np.setdiff1d(np.arange(tasks.n_tasks), self.held)
        self.n_train = len(self.kept)
        self.draw, self.draw_on = self._draw, self._draw_on
        self.validation, self.member_validation = None, []
        if not holds_out:
            return
        of_task = np.zeros(tasks.n_tasks, dtype=np.uint8)
        for j, fold in enumerate(self.folds):
            of_task[fold] |= 1 << j
        self.unseen = of_task[tasks.codes]
        self._hide_rows(tasks, rng)
        for j, fold in enumerate(self.folds):
            fold = fold[evenly(len(fold), MOST_OF_MEMBER if j else MOST_VALIDATED)]
            batches, which = self._held_out_episodes(tasks, j, fold, seed)
            if j == 0:
                self.validation, self.task_of_episode = batches, np.concatenate(which)
            if len(fold) > MOST_OF_MEMBER:
                few = evenly(len(fold), MOST_OF_MEMBER)
                kept = [np.flatnonzero(np.isin(task, few)) for task in which]
                batches = [batch.take(own) for batch, own in zip(batches, kept, strict=True)]
                which = [task[own] for task, own in zip(which, kept, strict=True)]
            self.member_validation += [
                HeldOut(j, batch, fold[task]) for batch, task in zip(batches, which, strict=True)
            ]

    def _make_samplers(self, tasks: TaskCollection) -> None:
        """Make what draws from the tasks; several take turns."""
        source = self.source
        natural = source.options["n_ways"] is None and source.options["n_shots"] is None
        self.options = {**source.options, "by_class": not natural}
        self.samplers = [
            EpisodeSampler(
                tasks,
                n_queries=HEAD_QUERIES if natural else source.n_queries,
                support_range=HEAD_SUPPORT,
                shots_range=self.shots_range,
                keep_index=True,
                **self.options,
            )
        ]
        classes = source.options["classification"] and tasks.in_query is None
        if natural and classes and _are_frequent(tasks.y):
            of_class = max(HEAD_ROWS_BY_CLASS // (int(tasks.y.max()) + 1), 1)
            self.samplers.append(
                EpisodeSampler(
                    tasks,
                    n_queries=of_class,
                    support_range=(1, of_class),
                    keep_index=True,
                    **source.options,
                )
            )

    def _draw_from_pool(self) -> None:
        """Draw episodes of many classes, where there are many."""
        tasks, own = self.source.training_tasks, self.source.options["n_ways"]
        n_classes = len(np.unique(tasks.y))
        self.n_ways = max(own, min(int(PART_OF_POOL * n_classes), HEAD_WAYS))
        sampler = EpisodeSampler(
            tasks,
            n_queries=self.source.n_queries,
            shots_range=self.shots_range,
            **{**self.source.options, "n_ways": self.n_ways},
        )
        self.samplers, self.kept, self.held = [sampler], np.arange(1), np.arange(0)
        self.part = own / self.n_ways
        self.bytes_of_episode = sampler.bytes_of_episode()
        self.draw, self.draw_on = self._draw, self._draw_on

    def _draw(self, which: np.ndarray, rng: np.random.Generator) -> list[EpisodeBatch]:
        which, of_steps = self._with_held_out(which, rng)
        batches = self._in_turn(which, lambda s, part: s.sample_batches(part, rng))
        return self._marked(batches, of_steps, rng)

    def _draw_on(
        self, device: Any, which: np.ndarray, rng: np.random.Generator, prepare: Any
    ) -> list[EpisodeBatch]:
        which, of_steps = self._with_held_out(which, rng)
        # what gradient steps prepare is of their own tasks
        batches = self._in_turn(which, lambda s, part: s.sample_on(device, part, rng))
        return self._marked(batches, of_steps, rng)

    def _in_turn(
        self, which: np.ndarray, sample: Callable[[EpisodeSampler, np.ndarray], list[EpisodeBatch]]
    ) -> list[EpisodeBatch]:
        """Batches of the samplers in turn."""
        n = len(self.samplers)
        parts = [
            sample(sampler, which[k::n]) if len(which) > k else []
            for k, sampler in enumerate(self.samplers)
        ]
        return [parts[k % n][k // n] for k in range(len(which))]

    def _with_held_out(
        self, which: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Add tasks that gradient steps do not learn from, as often as the others come."""
        which = self.kept[which[:, : max(round(which.shape[1] * self.part), 1)]]
        if not len(self.held):
            return which, None
        n_more = max(round(which.shape[1] * len(self.held) / self.n_train), 1)
        more = self.held[rng.integers(0, len(self.held), (len(which), n_more))]
        of_steps = np.arange(which.shape[1] + n_more) < which.shape[1]
        return np.concatenate([which, more], axis=1), of_steps

    def _marked(
        self, batches: list[EpisodeBatch], of_steps: np.ndarray | None, rng: np.random.Generator
    ) -> list[EpisodeBatch]:
        return [
            dataclasses.replace(batch, of_steps=of_steps, n_given=self._n_given(batch, rng))
            for batch in batches
        ]

    def _n_given(self, batch: EpisodeBatch, rng: np.random.Generator) -> int | None:
        """Rows to condition on in place of the support set, if fewer: it learns from none, too."""
        sampler = self.samplers[0]
        if sampler.by_class or sampler.tasks.in_query is not None:
            return None
        drawn = int(np.exp(rng.uniform(0, np.log(HEAD_SUPPORT[1] + 1)))) - 1
        return drawn if drawn < min(HEAD_SUPPORT[0], batch.support.X.shape[1]) else None

    def _hide_rows(self, tasks: TaskCollection, rng: np.random.Generator) -> None:
        """Hide some distinct rows from the last member, where tasks share their rows.

        Such tasks tell nothing of other rows unless some are held out, too.
        """
        assert self.unseen is not None
        if tasks.in_query is not None or tasks.X.ndim != 2:
            return
        n_unseen = int(UNSEEN * np.median(tasks.sizes))
        if n_unseen < min(HEAD_TESTED) or not share_rows(tasks.X):
            return
        marks = row_marks(tasks.X)
        distinct = np.unique(marks)
        hidden = np.isin(marks, rng.permutation(distinct)[: int(UNSEEN * len(distinct))])
        # without any row of a kind, a member could say nothing of it: every column still varies
        lone = (np.ptp(tasks.X[~hidden], 0) == 0) & (np.ptp(tasks.X, 0) > 0)
        hidden &= (tasks.X[:, lone] == tasks.X[~hidden][:1, lone]).all(1)
        last = 1 << (len(self.folds) - 1)
        of_fold = self.unseen & last > 0
        sides = (of_fold & hidden, ~of_fold & ~hidden)
        # where rows come with their task, one side may have none of them
        if all(bool((np.bincount(tasks.codes[side]) > 1).any()) for side in sides):
            self.shared_rows = distinct
            self.unseen[hidden] |= last
            self.hidden = hidden

    def _held_out_episodes(
        self, tasks: TaskCollection, member: int, fold: np.ndarray, seed: int
    ) -> tuple[list[EpisodeBatch], list[np.ndarray]]:
        """Episodes of the tasks of a fold, and the task of each."""
        held = tasks.select(fold)
        if self.shared_rows is not None and member == len(self.folds) - 1:
            rows = self.hidden[np.isin(tasks.codes, fold)]
            held = held.take_rows(rows, least=2)
        rng = np.random.default_rng((seed, 3, member))
        most = max(int(np.median(held.sizes)) // 2, 1)
        sizes = [min(k, most) for k in HEAD_TESTED]
        repeats = HEAD_DRAWS // len(sizes)
        batches, which = [], []
        for k in sizes if held.in_query is None else sizes[:1]:
            sampler = EpisodeSampler(
                held,
                n_queries=HEAD_TESTED_QUERIES if self.options["n_ways"] is None else None,
                support_range=(k, k),
                **self.options,
            )
            task = np.repeat(np.arange(held.n_tasks), repeats if held.in_query is None else 1)
            batches.append(sampler.sample(task, rng))
            which.append(task)
        return batches, which


def _are_frequent(y: np.ndarray) -> bool:
    """Whether there are more than two classes, of which none is rare; see `RARE`."""
    counts = np.bincount(y)
    return len(counts) > 2 and bool(RARE * len(y) <= len(counts) * counts[counts > 0].min())


def _collect_quickly(drawn: Any, like: TaskCollection) -> TaskCollection | None:
    """Collect (X, y) tasks of equal shapes without full validation; None if that is not safe."""
    if like.y.dtype.kind not in "fiu" or {*map(len, drawn)} != {2}:
        return None
    try:
        X, y = (np.array(part) for part in zip(*drawn, strict=True))
    except ValueError:  # tasks of different shapes
        return None
    if X.dtype != like.X.dtype or X.shape[2:] != like.X.shape[1:] or y.dtype != like.y.dtype:
        return None
    if y.shape[:2] != X.shape[:2] or y.ndim != like.y.ndim + 1:
        return None
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        return None
    n_tasks, n_rows = X.shape[:2]
    return TaskCollection(
        X.reshape(-1, *X.shape[2:]),
        y.reshape(-1, *y.shape[2:]),
        np.repeat(np.arange(n_tasks), n_rows),
        np.arange(n_tasks),
        None,
        "list",
    )
