"""What the two estimators share: meta-training, adaptation, prediction and scoring."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import numbers
import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.special import stdtrit
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor, nn

from sklearn_maml._compat import (
    HAS_SKLEARN_CALLBACKS,
    CallbackSupportMixin,
    inside_cross_validation,
    with_callbacks,
)
from sklearn_maml._validation import (
    PrefixedParamsMixin,
    check_keywords,
    did_you_mean,
    is_integer,
    keeps_state_on_error,
)
from sklearn_maml.data.sampling import EpisodeSampler
from sklearn_maml.data.spellings import (
    FLOATS,
    collect_tasks,
    concatenate_rows,
    encode_ids,
    is_task_distribution,
    is_task_list,
    n_axes,
    refuse_graphs,
    split_task_column,
    validate_rows,
)
from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.devices import forked_generators, is_host
from sklearn_maml.engine import (
    Engine,
    has_dropout,
    is_row_wise,
    one_thread,
)
from sklearn_maml.exceptions import (
    CutTaskWarning,
    MemorizationWarning,
    NotAdaptedError,
    SeenTaskWarning,
    SingleTaskWarning,
)
from sklearn_maml.heads import SymmetricHead
from sklearn_maml.learners.base import Adapted, Support
from sklearn_maml.learners.building import (
    build_head,
    module_body,
    population_range,
    why_no_head,
)
from sklearn_maml.learners.gaussian import (
    Calibration,
    Conditioned,
    GaussianHead,
    ModuleBody,
)
from sklearn_maml.learners.gradient import (
    AdaptedBySteps,
    GradientSteps,
    Running,
    remembered_rung,
)
from sklearn_maml.learners.joint import RATE, HeadTrainer, Joint
from sklearn_maml.learners.judging import choose, held_out_outputs, judge_head
from sklearn_maml.learners.learner import AdaptedBySupport, Learner, LearnerEngine, Problem
from sklearn_maml.learners.plan import GRADIENT_STEPS, Plan
from sklearn_maml.learners.shares import Mixed
from sklearn_maml.meta_gradients import resolve_meta_gradient
from sklearn_maml.modules import (
    ACTIVATIONS,
    adapted_names,
    build_module,
    check_head_is_last,
    copy_buffers,
    linear_head,
    make_mlp,
)
from sklearn_maml.persistence import MAMLKind, SaveMixin, describe
from sklearn_maml.targets.base import Coding, Loss, Targets
from sklearn_maml.targets.losses import LOSSES, has_closed_forms
from sklearn_maml.training.checkpoint import (
    Checkpoint,
    CheckpointedFit,
    begin_checkpointed,
    net_state,
)
from sklearn_maml.training.distributed import Processes, find_processes
from sklearn_maml.training.optimizers import settings_on
from sklearn_maml.training.sources import (
    LEAST_TASKS,
    N_MEMBERS,
    CollectionSource,
    CrossFitted,
    DistributionSource,
    EpisodeSettings,
)
from sklearn_maml.update_rules import UpdateRule, resolve_update_rule

__all__ = ["BaseMAML", "Scored", "State", "find_prior", "transform_rows"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
# meta-updates on splits of one task, where there are no others; more of them overfit its rows
SINGLE_TASK_UPDATES = 100
# A fit is judged by what adapting gains after as many meta-updates, on as many held-out tasks: on
# sinusoids, even at a tenth of the published alpha or of the default beta, the gain is above its
# standard error from there on; see docs/diagnostics.md.
MEMORIZATION_UPDATES, MEMORIZATION_TASKS = 300, 10
# Threads that adapt one and the same model: the state and what follows from it change together.
_STATE_LOCK = threading.Lock()
# name of a setting that adapting depends on
PROXIMAL = "the proximal term of meta_gradient"
# parts of the loss: a gain that is no larger is none, and one that may be, but need not exist, too
NEGLIGIBLE_GAIN, UNPROVEN_GAIN = 0.02, 0.1
# tasks drawn from a task distribution for `score`
SCORED_TASKS = 600
# episodes of a score where tasks are drawn from a pool of classes
SCORED_EPISODES = 100


@dataclasses.dataclass(kw_only=True)
class State(Coding):
    """What `adapt` sets: what was learned of each task, and what its outputs stand for."""

    adapted: Adapted
    ids: np.ndarray | None  # None: one task without an id

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.adapted.n_tasks


@dataclasses.dataclass
class Scored:
    """Episodes of a score: the query rows, and the parameters adapted to each episode.

    `task` is the task position of each episode, `rows` the position in `tasks` of each query row,
    `codes` its episode; `support` has the support set of each episode as a task; `states` has one
    adapted state for each number of inner steps asked for.
    """

    tasks: TaskCollection
    task: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    support: TaskCollection
    states: list[State]


class BaseMAML(SaveMixin, PrefixedParamsMixin, CallbackSupportMixin, BaseEstimator):
    """What the classifier and the regressor share."""

    _targets_class: type[Targets]
    _dtype: Any
    net_: Any
    targets_: Any
    learner_weights_: dict[str, float]
    calibration_: Calibration | None
    _learner: Any
    _fingerprints: dict[Hashable, int]
    _rung: str
    _score_seed: int
    _stored_as = MAMLKind
    _state_class = State
    _prefixes = (
        "module",
        "optimizer",
        "iterator_train",
        "iterator_valid",
        "callbacks",
        "update_rule",
        "meta_gradient",
    )

    # `groups` is requested by default, so that metadata routing works without set_*_request
    __metadata_request__fit: ClassVar = {"groups": True}
    __metadata_request__score: ClassVar = {"groups": True}
    __metadata_request__predict: ClassVar = {"groups": True}

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "loss": [StrOptions(set(LOSSES)), Loss],
        "hidden_layer_sizes": ["array-like", Interval(numbers.Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "alpha": [Interval(numbers.Real, 0, None, closed="left")],
        "beta": [Interval(numbers.Real, 0, None, closed="neither")],
        "adapted": [str, list, tuple],
        "beta_decay": [Interval(numbers.Real, 0, 1, closed="both")],
        "max_grad_norm": [Interval(numbers.Real, 0, None, closed="neither"), None],
        "steps": [Interval(numbers.Integral, 0, None, closed="left")],
        "adapt_steps": [Interval(numbers.Integral, 0, None, closed="left"), None],
        "n_ways": [Interval(numbers.Integral, 2, None, closed="left"), None],
        "n_shots": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "n_queries": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "meta_batch_size": [Interval(numbers.Integral, 1, None, closed="left")],
        "max_iter": [Interval(numbers.Integral, 1, None, closed="left")],
        "early_stopping": ["boolean", StrOptions({"auto"})],
        "validation_fraction": [Interval(numbers.Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(numbers.Integral, 1, None, closed="left")],
        "normalize_y": ["boolean"],
        "center_y": ["boolean"],
        "head": [StrOptions({"free", "shared", "zero"})],
        "checkpoint_steps": ["boolean"],
        "max_tasks_in_memory": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "precision": [StrOptions({"full", "tf32", "bf16"})],
        "batch_norm": [StrOptions({"inductive", "transductive"})],
        "callbacks": [list, tuple, None],
        "device": [str, torch.device],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    # -- fit -------------------------------------------------------------------------------------

    @keeps_state_on_error
    @with_callbacks
    def fit(self, X: Any, y: Any = None, groups: Any = None) -> Any:
        """Meta-train on a collection of tasks.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features), list of tasks, 3-D array, or distribution
            Rows of all tasks, with their task ids in `groups` or in `task_column`; or a list of
            ``(X, y)`` or ``(X_support, y_support, X_query, y_query)`` tasks (then y is None); or
            an array of shape (n_tasks, n_rows, n_features) with y (n_tasks, n_rows); or an object
            with ``sample(n_tasks, random_state)`` that returns such a list of `n_tasks` tasks;
            it is asked for the tasks of many meta-batches at a time.
        y : array-like of shape (n_rows,) or (n_rows, n_outputs), default=None
            Targets.
        groups : array-like of shape (n_rows,), default=None
            Task id of each row.

        Returns
        -------
        self : object
            The meta-fitted estimator.

        Raises
        ------
        ValueError
            If a parameter or the data is not valid; the estimator is left as it was.
        MetaTrainingError
            If most meta-steps were not finite.

        Warns
        -----
        SingleTaskWarning
            If there is no task information: all rows are then one task.
        MemorizationWarning
            If held-out tasks gain next to nothing from adapting to their own support sets.

        Notes
        -----
        In a `torch.distributed` process group of several processes every one has to call `fit`
        with the same data; they share the tasks of each meta-batch and end with the same
        parameters, see `sklearn_maml.distributed`.
        """
        self._validate_params()
        self._check_parameter_names()
        processes = find_processes()
        continued = bool(self.warm_start) and hasattr(self, "net_")
        if self.warm_start and hasattr(self, "module_") and not continued:
            raise ValueError(
                "warm_start=True continues a fit, but this model was saved without the state of "
                "its optimiser. Save it with training=True, or fit anew with warm_start=False."
            )
        checkpoint = begin_checkpointed(self.callbacks, processes, describe)
        if continued:  # the same tasks are held out; episodes follow the count of updates
            seed = self._score_seed
        else:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if checkpoint is not None:
            seed = checkpoint.seed(seed, given=continued or self.random_state is not None)
        if processes is not None:
            given = continued or self.random_state is not None
            seed = processes.agree_on_seed(seed, given)
        targets = self.targets_ if continued else self._make_targets()
        source: DistributionSource | CollectionSource
        if is_task_distribution(X):
            if y is not None or groups is not None:
                raise ValueError(
                    "Got a task distribution and y or groups: the tasks it samples bring their "
                    "own targets. Leave y and groups out."
                )
            source = DistributionSource(
                X, targets, self._episode_settings(), seed, self._read_tasks, learns=not continued
            )
        else:
            source = self._collect(X, y, groups, targets, seed, continued)
        if not continued:
            self._take_targets(targets)
        self._score_seed = seed
        self.device_ = self._resolve_device()
        self.__dict__.pop("_state", None)
        metadata = {} if groups is None else {"groups": groups}
        plan = self._plan(source, seed)
        joint = self._meta_train(plan, seed, continued, (X, y, metadata), processes, checkpoint)
        self._choose_learners(plan, joint)
        if source.single:
            # without tasks the estimator is an ordinary one: it has learned from all the rows
            self._adapt_to(source.tasks, None)
        return self

    def _read_tasks(
        self, X: Any, y: Any, groups: Any = None, *, reset: bool = False
    ) -> TaskCollection:
        """Validate tasks; in a first fit (`reset`) also learn what later calls must match."""
        tasks = collect_tasks(
            self,
            X,
            y,
            groups,
            task_column=self.task_column,
            reset=reset,
            classification=self._targets_class.are_classes,
            dtype=FLOATS if reset else self._dtype,
        )
        if reset:
            self.feature_shape_ = tasks.X.shape[1:]
            self._dtype = tasks.X.dtype
            self._flat = self.module is None  # the default network takes flat rows
        else:
            self._check_features(tasks.X)
        return tasks

    def _episode_settings(self) -> EpisodeSettings:
        return EpisodeSettings(
            self.n_shots,
            self.n_queries,
            self.early_stopping,
            self.validation_fraction,
            self._reshape,
        )

    def _without_cut_tasks(
        self, tasks: TaskCollection, targets: Targets, n_shots: int | None
    ) -> TaskCollection:
        """Leave out tasks that a tool of scikit-learn has cut down to too few rows.

        `learning_curve` and successive halving draw rows, not tasks. Outside of such tools a task
        that is too small is an error.
        """
        if not tasks.named or not inside_cross_validation():
            return tasks
        large = targets.large_enough(tasks, n_shots)
        if large.all() or not large.any():
            return tasks
        warnings.warn(
            f"{(~large).sum()} of {tasks.n_tasks} tasks have too few rows left for a support and a "
            "query set and are left out here. Tools that subsample rows (learning_curve, "
            "HalvingGridSearchCV with resource='n_samples') cut tasks; give a list of tasks, or "
            "resource='max_iter', to keep them whole.",
            CutTaskWarning,
            stacklevel=2,
        )
        return tasks.select(np.flatnonzero(large))

    def _collect(
        self, X: Any, y: Any, groups: Any, targets: Targets, seed: int, continued: bool
    ) -> CollectionSource:
        tasks = self._read_tasks(X, y, groups, reset=not continued)
        tasks = self._without_cut_tasks(tasks, targets, self.n_shots)
        if tasks.spelling == "single" and targets.n_ways is None:
            warnings.warn(
                f"{type(self).__name__}.fit got no task information and treats all "
                f"{len(tasks.X)} rows as one task. If the rows belong to several tasks, pass "
                "groups=task_ids (inside scikit-learn's tools enable it with "
                "sklearn.set_config(enable_metadata_routing=True)) or set task_column.",
                SingleTaskWarning,
                stacklevel=5 if HAS_SKLEARN_CALLBACKS else 4,
            )
        if not continued:
            targets.learn(tasks)
        return CollectionSource(tasks, targets, self._episode_settings(), seed)

    def _take_targets(self, targets: Targets) -> None:
        """Have what targets have learned as fitted attributes."""
        self.targets_ = targets
        self.__dict__.update(targets.attributes())

    def _plan(self, source: Any, seed: int) -> Plan:
        """Decide what is trained: gradient steps, a Gaussian head, or both."""
        learner = self._own_learner()
        if learner is not None:
            reason = learner.refuses(self._problem(source.encoded))
            if reason is not None:
                raise ValueError(f"update_rule={type(learner).__name__} {reason}")
            return Plan(source, source, with_steps=False, with_head=False, learner=learner)
        asked = self._rule_name()
        if asked not in ("auto", "gaussian-head"):
            return Plan(source, source, with_steps=True, with_head=False)
        reason = self._why_no_head(source)
        if reason is not None:
            if asked == "gaussian-head":
                raise ValueError(
                    f"update_rule='gaussian-head' {reason}. Use update_rule='auto' (which then "
                    "takes gradient steps) or 'sgd'."
                )
            return Plan(source, source, with_steps=True, with_head=False)
        of_tasks = isinstance(source, CollectionSource) and not source.pooled
        holds_out = bool(self.early_stopping) and (not of_tasks or source.n_tasks >= LEAST_TASKS)
        # without held-out tasks nothing could tell how much steps are worth
        with_steps = asked == "auto" and holds_out and (of_tasks or source.validation is not None)
        episodes = CrossFitted(
            source,
            n_members=self._n_members(),
            with_steps=with_steps,
            holds_out=holds_out,
            fraction=self.validation_fraction,
            seed=seed,
        )
        return Plan(source, episodes, with_steps=with_steps, with_head=True)

    def _own_learner(self) -> Learner | None:
        """Learner that the user gave as `update_rule`, with its ``update_rule__*``."""
        if not isinstance(self.update_rule, Learner):
            return None
        made: Learner = clone(self.update_rule).set_params(**self._prefixed("update_rule"))
        return made

    def _problem(self, tasks: TaskCollection | None) -> Problem:
        """Describe the tasks to a learner; None, of a model from a file, has their shapes only."""
        n_outputs, are_classes = self.targets_.n_outputs, self.targets_.are_classes
        if tasks is None:
            X = np.zeros((1, *self.feature_shape_), dtype=self._dtype)
            y = np.zeros(1, int) if are_classes else np.zeros((1, n_outputs), self._dtype)
            return Problem(self._reshape(X), y, n_outputs, are_classes)
        return Problem(tasks.X, tasks.y, n_outputs, are_classes)

    def _build_network(self, learner: Learner, tasks: TaskCollection | None) -> nn.Module:
        network = learner.build(self._problem(tasks))
        return network.to(dtype=TORCH_DTYPES[self._dtype], device=self.device_)

    def _rule_name(self) -> str | None:
        return self.update_rule if isinstance(self.update_rule, str) else None

    def _n_members(self) -> int:
        """Members of a Gaussian head: a module of the user's own is trained once."""
        return N_MEMBERS if self.module is None else 1

    def _why_no_head(self, source: Any) -> str | None:
        """Say what stands in the way of a Gaussian head, if anything does."""
        if source.single:
            return "learns how tasks differ, but got one task"
        of_tasks = isinstance(source, CollectionSource) and not source.pooled
        if of_tasks and source.n_tasks < LEAST_TASKS:
            return f"needs at least {LEAST_TASKS} tasks; got {source.n_tasks}"
        if not has_closed_forms(self.targets_.loss):
            loss = self.targets_.loss.name
            return f"is for squared error and cross-entropy, but the loss is {loss}"
        if self.targets_.center_y:  # by support rows: an error that it would not know of
            return "learns how the levels of tasks differ itself, but center_y is set"
        if self.module is None:
            return None
        with _SeededTorch(self.device_, 0):
            module = self._make_module()
        self._check_module(module)
        return why_no_head(module, self._reshape(self._two_rows()))

    def _head_body(self) -> ModuleBody | None:
        """Networks of a Gaussian head's members; None: the default ones."""
        if self.module is None:
            return None
        return module_body([self._make_module() for _ in range(self._n_members())])

    def _make_head(self, plan: Plan) -> GaussianHead:
        """Gaussian head at its start."""
        tasks, visible = plan.source.encoded, plan.episodes.visible
        head = build_head(
            tasks.X,
            tasks.y,
            tasks.codes,
            visible,
            n_members=self._n_members(),
            body=self._head_body(),
            hidden=self.hidden_layer_sizes,
            activation=self.activation,
            n_outputs=self.targets_.n_outputs,
            classification=self.targets_.are_classes,
            same_classes=self.targets_.n_ways is not None,
        )
        return head.to(dtype=TORCH_DTYPES[self._dtype], device=self.device_)

    def _new_net(self, plan: Plan, seed: int, continued: bool) -> tuple[Any, Any]:
        """Meta-parameters, and the net that trains them."""
        if continued:
            self._check_unchanged(everything=True)
            learner = copy.deepcopy(self._learner)
            if isinstance(learner.head, GaussianHead) != plan.with_head:
                raise ValueError(
                    "warm_start=True continues a fit, but the Gaussian head of the last one and "
                    "the tasks of this one do not go together. Fit anew with warm_start=False."
                )
            net = self._make_net(learner)
            net.continue_from(self.net_)
            return learner, net
        with _SeededTorch(self.device_, seed):
            module = self._make_module()
            self._check_module(module)
        learner = self._make_learner(module)
        with _SeededTorch(self.device_, seed):
            if plan.with_head:
                learner.head = self._make_head(plan)
            elif plan.learner is not None:
                learner.head = self._build_network(plan.learner, plan.source.encoded)
        if not plan.with_steps:
            learner.without_steps()
        learner.to(self.device_)
        return learner, self._make_net(learner)

    def _meta_train(
        self,
        plan: Plan,
        seed: int,
        continued: bool,
        data: tuple[Any, ...],
        processes: Processes | None,
        checkpoint: CheckpointedFit | None,
    ) -> Any:
        """Run the outer loop; return what trained the Gaussian head, if there is one."""
        # imported when needed: adapting and predicting do without skorch
        from sklearn_maml.training.callbacks import SklearnCallbacks
        from sklearn_maml.training.schedule import count_epochs
        from sklearn_maml.training.stream import TaskStream, ValidateOn

        source, episodes = plan.source, plan.episodes
        learner, net = self._new_net(plan, seed, continued)
        engine = self._training_engine(learner, plan)
        self._rung = "auto"
        net.engine = engine
        net.joint = engine if plan.with_head else None
        if processes is not None:
            tasks = source.tasks
            processes.compare(
                the_tasks_in_X_y_and_groups=(tasks.X, tasks.y, tasks.codes, tasks.ids),
                the_seeds_from_random_state=seed,
                the_parameters_of_the_estimator=self._comparable_params(),
                the_initial_weights_of_the_module=[
                    p.detach().cpu().numpy() for p in learner.parameters()
                ],
            )
            net.engine = processes.share(engine, net)
        self._set_up(net, learner, plan)
        net.train_split = ValidateOn(episodes.validation)
        self._fit_settings = self._settings(learner.module)
        self.n_tasks_ = source.n_tasks
        self.tasks_ = source.ids
        self._fingerprints = source.fingerprints
        self.learner_weights_ = plan.weights(0.0)
        if HAS_SKLEARN_CALLBACKS:
            n_epochs = count_epochs(net.max_iter, plan.with_head)
            net.epoch_hooks = SklearnCallbacks(self, learner, n_epochs, data)
        stream = TaskStream(
            episodes.draw,
            episodes.n_train,
            net.batch_size,
            seed,
            episodes.bytes_of_episode,
            episodes.draw_on,
        )
        # only modules that may draw random numbers (dropout, unknown ones) need torch's generator
        random = any(not is_row_wise(m) or has_dropout(m) for m in learner.networks())
        if checkpoint is not None:
            self._take_up(checkpoint, net, learner, plan, seed, continued)
            checkpoint.draws_random = random
        rank = 0 if processes is None else processes.rank  # other tasks, other random numbers
        with (
            _SeededTorch(self.device_, seed + (net.update_ if continued else 0) + rank)
            if random
            else contextlib.nullcontext(),
            processes or contextlib.nullcontext(),
        ):
            net.partial_fit(stream)
            if not plan.with_head:
                copy_buffers(engine.module, learner.network)
        if HAS_SKLEARN_CALLBACKS:
            net.epoch_hooks.end_fit()
        # a head has learned how far to trust a support set: nothing to be changed then
        judged = not net.interrupted_ and net.update_ >= MEMORIZATION_UPDATES
        if judged and not plan.with_head:
            self._warn_if_memorized(engine, learner, source)
        joint = net.joint
        self._rung = "auto" if plan.engine is None else remembered_rung(plan.engine, "auto")
        # what held the data of this fit is not part of the fitted estimator
        net.engine = net.train_split = net.epoch_hooks = net.checkpoint = net.joint = None
        self.net_ = net
        self.module_ = learner.network
        self._learner = learner
        self.history_ = net.history
        self.n_iter_ = net.update_
        return joint

    def _training_engine(self, learner: Any, plan: Plan) -> Any:
        """Make what makes the meta-steps."""
        if plan.learner is not None:
            return LearnerEngine(plan.learner, learner.head, self._row_loss())
        engine = None
        if plan.with_steps:
            engine = self._make_engine(learner.module)
            engine.meta_gradient.check_with(
                learns=len(learner.rule) > 0,
                all_adapt=len(engine.adapted)
                == len([p for p in learner.module.parameters() if p.requires_grad]),
                checkpoint_steps=bool(self.checkpoint_steps),
                moves=self._n_steps() > 0 and self._alpha() > 0,
            )
        plan.engine = engine
        if not plan.with_head:
            return engine
        episodes = plan.episodes
        trainer = HeadTrainer(learner.head, episodes.visible, episodes.member_validation)
        return Joint(trainer, engine)

    def _set_up(self, net: Any, learner: Any, plan: Plan) -> None:
        """Tell the net how to train."""
        from skorch.callbacks import LRScheduler

        source, engine = plan.source, plan.engine
        net.alpha, net.steps = self._alpha(), self._n_steps()
        net.eval_steps = self._n_adapt_steps()
        net.max_iter = self.max_iter
        if source.single:
            net.max_iter = min(self.max_iter, SINGLE_TASK_UPDATES)
        # splits of the same rows differ less than tasks do: fewer make a meta-batch
        net.batch_size = min(self.meta_batch_size, 4) if source.single else self.meta_batch_size
        net.batch_size = self._prefixed("iterator_train").get("batch_size", net.batch_size)
        if not is_integer(net.batch_size) or net.batch_size < 1:
            raise ValueError(
                "iterator_train__batch_size is the number of tasks of a meta-batch: expected an "
                f"int of at least 1, got {net.batch_size!r}."
            )
        net.rows_per_task = source.rows_per_task
        net.max_grad_norm = self.max_grad_norm
        net.symmetric_head = self._symmetric_head(learner) if plan.with_steps else None
        net.step_size_at = None if engine is None else engine.meta_gradient.step_size_at
        # a scheduler that the user passed decides alone
        scheduled = any(
            issubclass(c if isinstance(c, type) else type(c), LRScheduler)
            for _, c in net._uniquely_named_callbacks()
        )
        own_size = net.step_size_at is not None and net.step_size_at(0.0) is not None
        if scheduled and own_size:
            raise ValueError(
                "callbacks have an LRScheduler, but meta_gradient='reptile' makes its steps "
                "without the optimizer. Leave the scheduler out, or set "
                "meta_gradient__step_size=None."
            )
        net.beta_decay = 0.0 if scheduled else self.beta_decay
        net.verbose = int(self.verbose)
        stops = self.early_stopping != "auto" and bool(self.early_stopping)
        net.patience = self.n_iter_no_change if stops else None

    def _take_up(
        self, checkpoint: CheckpointedFit, net: Any, learner: Any, plan: Plan, seed: int, more: bool
    ) -> None:
        """Compare what a checkpoint has with this fit."""
        source, tasks = plan.source, plan.source.tasks
        checkpoint.compare(
            params=self.get_params(deep=False),
            seed=seed,
            the_tasks_in_X_y_and_groups=[
                tasks.X,
                tasks.y,
                tasks.codes,
                tasks.ids,
                tasks.in_query,
                source.single,
            ],
            the_parameters_that_the_fit_begins_with=dict(learner.state_dict()),
            the_fit_that_is_continued=[net.update_, net_state(self.net_)["optimizer"]]
            if more
            else None,
        )
        net.checkpoint = checkpoint

    def _choose_learners(self, plan: Plan, joint: Any) -> None:
        """Decide on held-out tasks which learners predict, and how sure they may be."""
        self.learner_weights_, self.calibration_ = plan.weights(0.0), None
        if joint is None:
            return
        tasks, head = plan.source.encoded, self._learner.head
        meta_params = self._learner.meta_params()
        edges = population_range(tasks.y, head.n_outputs, head.classification)
        with joint.threads(0):
            calibration = judge_head(joint.trainer, meta_params, edges, plan.episodes.shared_rows)
            share = 0.0
            if joint.engine is not None:
                outputs = held_out_outputs(
                    joint.trainer,
                    self._make_engine(self._learner.module, self._rung_to_begin()),
                    meta_params,
                    [batch.to(self.device_) for batch in plan.episodes.validation],
                    alpha=self._alpha(),
                    steps=self._n_adapt_steps(),
                )
                share, calibration = choose(
                    outputs, plan.episodes.task_of_episode, calibration, head.classification
                )
        self.calibration_ = calibration
        self.learner_weights_ = plan.weights(share)
        if self.verbose and plan.with_steps:
            shares = ", ".join(f"{name} {w:.1f}" for name, w in self.learner_weights_.items())
            dict(self.net_.callbacks_)["print_log"].sink(f"Shares of predictions: {shares}")

    def _warn_if_memorized(self, engine: Engine, learner: Any, source: Any) -> None:
        """Warn where held-out tasks gain nothing from their own support sets."""
        from sklearn_maml.training.validation import compare_supports

        steps = self._n_adapt_steps()
        if (
            source.validation is None
            or source.single
            or source.n_held_out < MEMORIZATION_TASKS
            # labels are shuffled in every episode: no function of the features alone fits them
            or self.targets_.n_ways is not None
            # by request, nothing is learned from support sets
            or 0 in (self._n_steps(), steps, self._alpha())
            # a search compares its candidates; the one it takes is fitted anew
            or inside_cross_validation()
        ):
            return
        with engine.threads(len(source.validation[0]) * source.rows_per_task):
            losses = compare_supports(
                engine,
                learner.meta_params(),
                [batch.to(self.device_) for batch in source.validation],
                alpha=self._alpha(),
                steps=steps,
            )
        # validation goes through the tasks in turn
        before, after, others = losses.reshape(3, -1, source.n_held_out).mean(1)
        if not (_gains_nothing(before, after) or _gains_nothing(others, after)):
            return
        rules = "set n_ways if labels mean something inside a task only; "
        warnings.warn(
            f"The {source.n_held_out} held-out tasks gain next to nothing from their support "
            f"sets: their query loss is {after.mean():.4g} after adapting to them, "
            f"{before.mean():.4g} before, and {others.mean():.4g} after adapting to the support "
            "set of another task. One function serves all tasks so far, whatever their support "
            "sets say (memorisation, Yin et al. 2020). What to check: "
            f"{rules if self.targets_.are_classes else ''}leave out features that tell the tasks "
            "apart, such as an id; if the tasks do not differ, a pooled model is enough; if they "
            f"do, try another alpha (now {self._alpha():g}), more steps (now {self._n_steps()}) or "
            f"more updates (now {self.max_iter}).",
            MemorizationWarning,
            stacklevel=6 if HAS_SKLEARN_CALLBACKS else 5,
        )

    def _comparable_params(self) -> dict[str, Any]:
        """Return the parameters that have values equal in every process that was given the same."""
        return {
            name: value
            for name, value in self.get_params(deep=False).items()
            # objects hash by identity; where a process prints, or computes, is its own matter
            if name not in ("callbacks", "device", "random_state", "verbose")
            and isinstance(value, (str, int, float, bool, list, tuple, type(None)))
        }

    def _make_learner(self, module: nn.Module) -> Any:
        """Meta-parameters at their start: the module's, and those of the update rule."""
        from sklearn_maml.training.learner import MetaLearner

        rule, targets = self._gradient_rule(), self.targets_
        if rule.in_closed_form and not has_closed_forms(targets.loss):
            raise ValueError(
                f"update_rule={self.update_rule!r} solves for squared error or cross-entropy, but "
                f"the loss is {targets.loss.name}. Use update_rule='sgd' or another rule that "
                "takes steps."
            )
        return MetaLearner(
            module,
            rule,
            adapted_names(module, self.adapted),
            steps=self._n_steps(),
            classification=targets.are_classes,
        )

    def _new_learner(self, weights: dict[str, Tensor]) -> Any:
        """Meta-parameters of the shapes of a fit, for those of a file."""
        prefix = "head."
        of_head = {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}
        self.targets_ = self._make_targets().restore(self.__dict__)
        with _SeededTorch(self.device_, 0):
            learner = self._make_learner(self._make_module())
            own = self._own_learner()
            if own is not None:
                learner.head = self._build_network(own, None)
            elif of_head:
                learner.head = GaussianHead.like(
                    of_head,
                    self._head_body(),
                    self.targets_.n_outputs,
                    activation=ACTIVATIONS[self.activation](),
                    classification=self.targets_.are_classes,
                    same_classes=self.targets_.n_ways is not None,
                ).to(TORCH_DTYPES[self._dtype])
        if not any(name.startswith("module.") for name in weights):
            learner.without_steps()
        return learner

    def _adapted_from(self, state: dict[str, Any]) -> Adapted:
        """Make what was learned of tasks, from a file."""
        if state["kind"] == "conditioned":
            return Conditioned.from_state(self._learner.head, self._calibrated(), state)
        if state["kind"] == "support":
            support, learner = Support(**state["support"]), self._own_learner()
            assert learner is not None
            return AdaptedBySupport(learner, self._learner.head, support, state["known"])
        if state["kind"] == "steps":
            return AdaptedBySteps.from_state(
                self._learner.module, self._row_loss(), self.device_, state
            )
        return self._mixed(self._adapted_from(state["head"]), self._adapted_from(state["steps"]))

    def _calibrated(self) -> Calibration:
        assert self.calibration_ is not None
        return self.calibration_

    def _mixed(self, head: Adapted, steps: Adapted) -> Mixed:
        calibration = self._calibrated()
        return Mixed(
            head,
            steps,
            self.learner_weights_[GRADIENT_STEPS],
            self.targets_.are_classes,
            calibration.steps_scale,
            calibration.scale,
        )

    def _make_net(self, learner: Any) -> Any:
        from skorch.callbacks import Callback, ProgressBar
        from torch.utils.data import DataLoader

        from sklearn_maml.training.net import MetaNet
        from sklearn_maml.training.stream import use_batch

        callbacks = list(self.callbacks or [])
        for item in list(callbacks):
            callback = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else item
            kind = callback if isinstance(callback, type) else type(callback)
            if not issubclass(kind, (Callback, Checkpoint)):
                raise ValueError(
                    "callbacks must be skorch callbacks or (name, callback) pairs; got "
                    f"{item!r}. scikit-learn's own callbacks go through set_callbacks."
                )
            if issubclass(kind, Checkpoint):  # the net's own: it comes after all others
                callbacks.remove(item)
        if self.verbose and sys.stderr.isatty():
            callbacks.append(("progress_bar", ProgressBar()))
        forwarded = ("optimizer", "iterator_train", "iterator_valid", "callbacks")
        extra = {
            name: value
            for name, value in self._extra_params().items()
            if name.split("__")[0] in forwarded
        }
        if "batch_size" in self._prefixed("iterator_valid"):
            raise ValueError(
                "iterator_valid__batch_size cannot be chosen: an item of the validation set is a "
                "batch of episodes already. Leave it out."
            )
        settings = {
            "iterator_train__collate_fn": use_batch,
            "iterator_valid__collate_fn": use_batch,
            "iterator_valid__batch_size": 1,
            **extra,
        }
        if isinstance(learner.head, GaussianHead):
            of_head = ("head.*", {"lr": RATE * self.beta, "of_head": True})
            groups = [*settings.get("optimizer__param_groups", []), of_head]
            settings["optimizer__param_groups"] = groups
        optimizer = self._resolve_optimizer()
        check_keywords(optimizer, self._prefixed("optimizer"), "optimizer")
        chosen = self._prefixed("optimizer")
        for name, value in settings_on(
            optimizer, chosen, list(learner.parameters()), self.device_
        ).items():
            settings[f"optimizer__{name}"] = value
        for prefix in ("iterator_train", "iterator_valid"):
            check_keywords(DataLoader, self._prefixed(prefix), prefix)
        net = MetaNet(
            learner,
            optimizer=optimizer,
            lr=self.beta,
            classes=np.arange(self.targets_.n_outputs) if self.targets_.are_classes else None,
            callbacks=callbacks,
            verbose=int(self.verbose),
            device=str(self.device_),
            **settings,
        )
        names = [name for name, _ in net._uniquely_named_callbacks()]
        for name in self._prefixed("callbacks"):
            head = name.partition("__")[0]
            if head not in names:
                raise ValueError(
                    f"callbacks__{name} is for a callback {head!r}, but there is none."
                    f"{did_you_mean(head, names)} Expected one of {names}."
                )
        return net

    def _resolve_device(self) -> torch.device:
        automatic = str(self.device) == "auto"
        if automatic and not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            device = torch.device("cuda" if automatic else self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device={self.device!r} is not a torch device. Expected 'auto', 'cpu', 'cuda' or "
                "'cuda:0', ..."
            ) from error
        try:
            probe = torch.zeros(1, device=device)
            probe.cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device={self.device!r} was asked for, but torch has no such device here. Use "
                "device='auto' to take CUDA where there is one."
            ) from error
        return probe.device  # with its number, as tensors have it

    def _resolve_optimizer(self) -> Any:
        if isinstance(self.optimizer, str) and self.optimizer in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer]
        if isinstance(self.optimizer, type) and issubclass(self.optimizer, torch.optim.Optimizer):
            if issubclass(self.optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "optimizer=LBFGS evaluates its closure several times an update, on one "
                    "meta-batch. Use a stochastic optimiser such as 'adam'."
                )
            return self.optimizer
        raise ValueError(
            f"optimizer={self.optimizer!r} is not known. Expected one of {sorted(OPTIMIZERS)} or a "
            "torch.optim.Optimizer class; pass its settings as optimizer__*."
        )

    def _n_adapt_steps(self) -> int:
        return self._n_steps() if self.adapt_steps is None else int(self.adapt_steps)

    def _alpha(self) -> float:
        return float(self.alpha)

    def _n_steps(self) -> int:
        return int(self.steps)

    def _fit_initialisation(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Adapt a random initialisation to one task, without meta-training (FewShot estimators)."""
        self._validate_params()
        tasks = self._read_tasks(X, y, reset=True)
        sample_weight = self._support_weights(sample_weight, tasks)
        targets = self._make_targets()
        targets.learn(tasks, sample_weight)
        self._take_targets(targets)
        self._score_seed = seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.device_ = self._resolve_device()
        self._fingerprints = {}
        with _SeededTorch(self.device_, seed):
            module = self._make_module()
        self._learner = self._make_learner(module)
        self.module_ = module
        self._fit_settings = self._settings(module)
        self._rung = "auto"
        self.learner_weights_, self.calibration_ = {GRADIENT_STEPS: 1.0}, None
        self._adapt_to(tasks, sample_weight)
        return self

    # -- module ----------------------------------------------------------------------------------

    def _make_module(self) -> nn.Module:
        options = self._prefixed("module")
        n_outputs = self.targets_.n_outputs
        if self.module is None:
            if options:
                raise ValueError(
                    f"module__{next(iter(options))} was given, but module is None and the default "
                    "network takes hidden_layer_sizes and activation only. Pass a module class."
                )
            module: nn.Module = make_mlp(
                int(np.prod(self.feature_shape_)),
                n_outputs,
                self.hidden_layer_sizes,
                self.activation,
            )
        elif isinstance(self.module, nn.Module):
            if options:
                raise ValueError(
                    f"module__{next(iter(options))} was given, but module is an instance, already "
                    "built. Pass the class instead, to build it with module__* arguments."
                )
            module = copy.deepcopy(self.module)
        elif isinstance(self.module, type) and issubclass(self.module, nn.Module):
            sizes = {"in_features": int(np.prod(self.feature_shape_)), "out_features": n_outputs}
            module = build_module(self.module, options, sizes)
        else:
            raise ValueError(
                f"module must be None, a torch.nn.Module class or an instance; got "
                f"{self.module!r}. A function that builds a network is not accepted: wrap it in a "
                "torch.nn.Module class."
            )
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("module has no trainable parameters, so there is nothing to adapt.")
        return module.to(device=self.device_, dtype=TORCH_DTYPES[self._dtype])

    def _two_rows(self) -> Tensor:
        """Rows to try a module on."""
        return torch.zeros(
            (2, *self.feature_shape_), dtype=TORCH_DTYPES[self._dtype], device=self.device_
        )

    def _check_module(self, module: nn.Module) -> None:
        """Run the module once, so that a wrong one is refused before training starts."""
        n_outputs = self.targets_.n_outputs
        rows = self._two_rows()
        probe = copy.deepcopy(module).eval()
        try:
            with torch.no_grad():
                output = probe(self._reshape(rows))
        except Exception as error:
            raise ValueError(
                f"module {type(module).__name__} failed on two rows of shape "
                f"{tuple(self._reshape(rows).shape)}: {error}"
            ) from error
        expected: list[tuple[int, ...]] = [(2, n_outputs)]
        if n_outputs == 1 and not self.targets_.are_classes:
            expected.append((2,))
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if got not in expected:
            raise ValueError(
                f"module {type(module).__name__} returns {got} for 2 rows; expected a tensor of "
                f"shape {expected[0]}: one column for each {self.targets_.word}."
            )
        rule = self._gradient_rule()
        if rule.in_closed_form:
            kind = type(rule).__name__
            head = linear_head(module, adapted_names(module, self.adapted), kind)
            check_head_is_last(module, head, self._reshape(rows), kind)

    def _reshape(self, X: Any) -> Any:
        """Rows as the module takes them: the default network takes flat rows."""
        return X.reshape(len(X), -1) if self._flat and X.ndim > 2 else X

    # -- adapt -----------------------------------------------------------------------------------

    def adapt(self, X: Any, y: Any = None, groups: Any = None, sample_weight: Any = None) -> Any:
        """Adapt to the support sets of one or many new tasks.

        Always starts from the meta-learned initialisation, which it does not change, and replaces
        what an earlier `adapt` left, at once and as a whole: of several threads that adapt one
        model the last one wins, and a prediction meanwhile is of one of them, never of a mix. Use
        `sklearn_maml.adapt` for a model of its own in every thread.

        Parameters
        ----------
        X : array-like of shape (n_support, n_features)
            Support rows; lists of tasks and 3-D arrays are accepted as in `fit`.
        y : array-like of shape (n_support,) or (n_support, n_outputs)
            Their targets.
        groups : array-like of shape (n_support,), default=None
            Task id of each row, to adapt to many tasks in one call; None: one task.
        sample_weight : array-like of shape (n_support,), default=None
            Weights of the rows in the support loss; only their ratios within a task matter.

        Returns
        -------
        self : object
            Ready to predict for these tasks.

        Raises
        ------
        NotFittedError
            If the estimator is not meta-fitted.
        ValueError
            If the data does not fit; what was adapted before is kept.
        """
        check_is_fitted(self)
        self._validate_params()
        if hasattr(X, "__len__") and y is not None and _n_rows(X) == 0:
            raise ValueError(
                "adapt got an empty support set: Found array with 0 sample(s) while a minimum of 1 "
                "is required. Pass at least one labelled row of the task, or adapt_steps=0 and any "
                "row for predictions of the initialisation."
            )
        self._check_unchanged()
        tasks = self._read_tasks(X, y, groups)
        if tasks.in_query is not None:
            raise ValueError(
                "adapt takes support sets only: got tasks of four parts. Pass [(X_support, "
                "y_support), ...] and give the query rows to predict."
            )
        sample_weight = self._support_weights(sample_weight, tasks)
        self._adapt_to(tasks, sample_weight)
        return self

    def _settings(self, module: nn.Module | None = None) -> dict[str, Any]:
        """Parameters that what was meta-learned depends on; of a module also what a rule learns."""
        rule = self._gradient_rule()
        gradient = resolve_meta_gradient(self.meta_gradient, self._prefixed("meta_gradient"))
        settings = {
            "update_rule": type(self.update_rule)
            if isinstance(self.update_rule, Learner)
            else (self._rule_name() in ("auto", "gaussian-head") and self._rule_name())
            or type(rule),
            PROXIMAL: gradient.proximal > 0,
            "adapted": self.adapted,
            **self._make_targets().settings(),
            "head": getattr(self, "head", "free"),
            "hidden_layer_sizes": str(self.hidden_layer_sizes),
            "activation": self.activation,
            "module": self.module if isinstance(self.module, type) else type(self.module),
            "module__*": str(sorted(self._prefixed("module").items())),
        }
        if module is not None:
            adapted = adapted_names(module, self.adapted)
            fast = {name: p.detach() for name, p in module.named_parameters() if name in adapted}
            # for one step: the number of steps may change, and that of the rates then stays
            rates = rule.initial_rates(fast, classification=self.targets_.are_classes)
            shapes = {name: tuple(rate.shape) for name, rate in rates.items()}
            settings["what update_rule learns"] = shapes
        return settings

    def _check_unchanged(self, everything: bool = False) -> None:
        """Refuse parameters that no longer fit what was meta-learned; all of them, to continue."""
        now = self._settings(self._learner.module if everything else None)
        names = ["update_rule", PROXIMAL, "adapted", "n_ways", "center_y", "loss"]
        if everything:  # a fit goes on with the meta-gradient of now
            names = [name for name in now if name != PROXIMAL]
        for name in names:
            if now[name] != self._fit_settings[name]:
                raise ValueError(
                    f"{name} was changed after fit; what was meta-learned is for another value. "
                    "Set it back, or fit anew with warm_start=False. Only alpha, steps, "
                    "adapt_steps and batch_norm may be changed, and lam and max_grad_norm of "
                    "update_rule and meta_gradient."
                )

    def _support_weights(self, sample_weight: Any, tasks: TaskCollection) -> np.ndarray | None:
        if sample_weight is None:
            return None
        weights = _check_weights(
            sample_weight, tasks.X, dtype=tasks.X.dtype, ensure_non_negative=True
        )
        totals = np.bincount(tasks.codes, weights=weights)
        if (totals == 0).any():
            raise ValueError(
                f"Sample weights are all zero in {int((totals == 0).sum())} of {len(totals)} "
                "support set(s). Give at least one row of each task a positive weight."
            )
        return weights

    def _adapt_to(self, tasks: TaskCollection, sample_weight: np.ndarray | None) -> None:
        if sample_weight is not None and (sample_weight == 0).any():
            # as good as absent: for batch statistics, and for the classes of an episode, too
            kept = sample_weight > 0
            tasks = dataclasses.replace(
                tasks, X=tasks.X[kept], y=tasks.y[kept], codes=tasks.codes[kept]
            )
            sample_weight = sample_weight[kept]
        state = self._adapted_state(tasks, sample_weight)
        with _STATE_LOCK:
            self._state = state
            self._after_adapt()

    def _after_adapt(self) -> None:
        """Update what depends on the adapted tasks."""
        if self._state.labels is not None:
            self.classes_ = self._state.labels

    def _row_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        rows: Callable[[Tensor, Tensor], Tensor] = self.targets_.loss.rows
        return rows

    def _gradient_rule(self) -> UpdateRule:
        """Rule of the gradient steps."""
        if isinstance(self.update_rule, Learner):
            return resolve_update_rule("sgd", {})
        rule = "sgd" if self._rule_name() in ("auto", "gaussian-head") else self.update_rule
        return resolve_update_rule(rule, self._prefixed("update_rule"))

    def _make_engine(self, module: nn.Module, rung: str = "auto") -> Engine:
        return Engine(
            module,
            row_loss=self._row_loss(),
            rule=self._gradient_rule(),
            meta_gradient=resolve_meta_gradient(
                self.meta_gradient, self._prefixed("meta_gradient")
            ),
            adapted=adapted_names(module, self.adapted),
            rung=rung,
            checkpoint_steps=bool(self.checkpoint_steps),
            max_tasks_in_memory=self.max_tasks_in_memory,
            precision=self.precision,
            batch_norm=self.batch_norm,
        )

    def _rung_to_begin(self) -> str:
        return "loop" if self._rung == "loop" else "auto"

    def _adapted_state(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None, steps: int | None = None
    ) -> State:
        """Adapt to every task of a collection; `steps` None is what `adapt` does, 0 nothing."""
        self._check_features(tasks.X)
        y, coding = self.targets_.encode_support(tasks, sample_weight)
        ids = None if tasks.spelling == "single" else tasks.ids
        support = Support(self._reshape(tasks.X), y, tasks.codes, tasks.n_tasks, sample_weight)
        return State(adapted=self._learn(support, steps), ids=ids, **vars(coding))

    def _learn(self, support: Support, steps: int | None) -> Adapted:
        """Adapt each learner that has a share; 0 steps is before adaptation, of all of them."""
        if steps is None and self.adapt_steps == 0:
            steps = 0
        learner = self._own_learner()
        if learner is not None:
            return AdaptedBySupport(learner, self._learner.head, support, known=steps != 0)
        share = self.learner_weights_.get(GRADIENT_STEPS, 0.0)
        if share == 1:
            return self._steps_adapted(support, steps)
        head = self._condition(support, prior=steps == 0)
        return head if share == 0 else self._mixed(head, self._steps_adapted(support, steps))

    def _steps_adapted(self, support: Support, steps: int | None) -> Adapted:
        learner = GradientSteps(
            self._learner.module,
            {n: p for n, p in self._learner.meta_params().items() if not n.startswith("head.")},
            lambda rung: self._make_engine(self._learner.module, rung),
            self._alpha(),
            self._n_adapt_steps() if steps is None else steps,
            self._running(),
            self._rung,
        )
        adapted = learner.adapt(support)
        self._rung = learner.rung
        return adapted

    def _running(self) -> Running:
        return Running(self.batch_norm, self.max_tasks_in_memory, self.device_)

    def _condition(self, support: Support, prior: bool) -> Conditioned:
        """Adapt in closed form; `prior` leaves the support rows out."""
        y = support.y
        targets = self.targets_
        y = np.eye(targets.n_outputs)[y] if targets.are_classes else y.reshape(len(y), -1)
        make = Conditioned.prior if prior else Conditioned.on
        with one_thread():
            return make(self._learner.head, self._calibrated(), dataclasses.replace(support, y=y))

    def _check_features(self, X: np.ndarray) -> None:
        if X.shape[1:] != self.feature_shape_:
            raise ValueError(
                f"X has rows of shape {X.shape[1:]}, but {type(self).__name__} was meta-fitted on "
                f"rows of shape {self.feature_shape_}. Give the same features."
            )

    # -- predict ---------------------------------------------------------------------------------

    def _rows_to_predict(
        self, X: Any, groups: Any
    ) -> tuple[State, np.ndarray, np.ndarray, Callable[[np.ndarray], Any]]:
        """Validate query rows; return the task of each and how to shape the answer like X."""
        check_is_fitted(self)
        refuse_graphs(X=X, groups=groups)
        shape_like: Callable[[np.ndarray], Any] = _as_is
        name = "groups"
        if isinstance(X, (list, tuple)) and len(X) and n_axes(X[0]) > len(self.feature_shape_):
            if groups is not None:
                raise ValueError(
                    "Got a list of query sets and groups: the tasks are given twice. Leave one of "
                    "the two out."
                )
            lengths = [len(part) for part in X]
            groups = np.repeat(np.arange(len(X)), lengths)
            name = "a list of query sets (task ids 0, 1, ...)"
            cuts = np.cumsum(lengths)[:-1]
            X = concatenate_rows(X)
            shape_like = _Split(cuts)
        elif (
            groups is None and getattr(X, "ndim", 0) >= 3 and X.ndim == len(self.feature_shape_) + 2
        ):
            n_tasks, n_rows = X.shape[:2]
            groups = np.repeat(np.arange(n_tasks), n_rows)
            X = np.asarray(X).reshape(-1, *X.shape[2:])
            shape_like = _Stack(n_tasks, n_rows)
        X_seen = X
        if self.task_column is not None:
            if groups is not None and shape_like is _as_is:
                raise ValueError(
                    f"Got task_column={self.task_column!r} and groups: the tasks are given twice. "
                    "Leave one of the two out."
                )
            X, ids = split_task_column(X, self.task_column)
            if shape_like is _as_is:  # else the place in the list or stack tells the task
                groups, name = ids, f"the task column {self.task_column!r}"
        rows = validate_rows(
            self,
            X,
            X_seen,
            reset=False,
            with_column=self.task_column is not None,
            dtype=self._dtype,
        )
        self._check_features(rows)
        state = self.__dict__.get("_state")
        if state is None:
            raise NotAdaptedError(
                f"This {type(self).__name__} is meta-fitted but not adapted to a task yet. Call "
                "adapt(X_support, y_support) before predict. To score tasks inside scikit-learn's "
                "tools, leave scoring=None or use sklearn_maml.task_scorer(...), which adapt to "
                "a support split of each task; scorers such as 'r2' do not adapt."
            )
        codes = self._find_tasks(state, groups, len(rows), name)
        return state, self._reshape(rows), codes, shape_like

    def _find_tasks(self, state: State, groups: Any, n_rows: int, name: str) -> np.ndarray:
        if groups is None:
            if state.n_tasks > 1:
                raise ValueError(
                    f"{type(self).__name__} is adapted to {state.n_tasks} tasks: pass "
                    "groups (the task id of each row) to predict."
                )
            return np.zeros(n_rows, dtype=np.intp)
        ids, codes = encode_ids(groups, n_rows, name)
        if state.ids is None:
            raise ValueError(
                f"predict got {name}, but the estimator was adapted to one task without an id. "
                "Give the rows of that task alone, or call adapt(X_support, y_support, "
                "groups=...). To score new tasks, use score(X, y, groups=...) or "
                "sklearn_maml.task_scorer."
            )
        position = {task: j for j, task in enumerate(state.ids.tolist())}
        unknown = [task for task in ids.tolist() if task not in position]
        if unknown:
            raise ValueError(
                f"predict got {len(unknown)} task id(s) that were not adapted to, such as "
                f"{unknown[:3]}. Call adapt with support rows of these tasks first. To score new "
                "tasks inside scikit-learn's tools, leave scoring=None or use "
                "sklearn_maml.task_scorer(...): scorers such as 'r2' do not adapt."
            )
        return np.array([position[task] for task in ids.tolist()], dtype=np.intp)[codes]

    def _outputs(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Run each row under what was learned of its task."""
        outputs = state.adapted.outputs(rows, codes, self._running())
        return self._finite(outputs.astype(rows.dtype, copy=False))

    def _decide(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Predictions of rows under the parameters of the task of each."""
        values: np.ndarray = self.targets_.decode(self._outputs(state, rows, codes), codes, state)
        return values if self.targets_.are_classes else self._finite(values)

    def _finite(self, outputs: np.ndarray) -> np.ndarray:
        """Refuse outputs that have overflowed."""
        if np.isfinite(outputs).all():
            return outputs
        rows = np.flatnonzero(~np.isfinite(outputs.reshape(len(outputs), -1)).all(1))
        raise ValueError(
            f"The outputs of {len(rows)} of {len(outputs)} rows, such as row {rows[0]}, are not "
            f"finite in {outputs.dtype}. Their features, or those of the support set, are too "
            f"large: scale them as in fit, or lower alpha (now {self._alpha():g})."
        )

    # -- score -----------------------------------------------------------------------------------

    def _has_task_information(self, X: Any, y: Any, groups: Any) -> bool:
        """Whether a call of `score` names tasks, rather than rows of the adapted task."""
        state = self.__dict__.get("_state")
        adapted_to_one = state is not None and state.ids is None
        return not adapted_to_one or (
            groups is not None
            or self.task_column is not None
            or is_task_list(X, y)
            or is_task_distribution(X)
            or n_axes(X) == len(self.feature_shape_) + 2
        )

    def _split_and_adapt(
        self,
        X: Any,
        y: Any,
        groups: Any,
        *,
        n_shots: int | None = None,
        n_repeats: int = 1,
        random_state: Any = None,
        steps: tuple[int | None, ...] = (None,),
    ) -> Scored:
        """Split each task into support and query rows and adapt to the support rows."""
        check_is_fitted(self)
        self._validate_params()
        seed = self._score_seed if random_state is None else random_state
        rng = np.random.default_rng(check_random_state(seed).randint(2**31 - 1))
        if is_task_distribution(X):
            X = X.sample(SCORED_TASKS, random_state=int(rng.integers(2**31 - 1)))
        self._check_unchanged()
        tasks = self._read_tasks(X, y, groups)
        self._warn_if_seen(tasks)
        n_shots = self.n_shots if n_shots is None else n_shots
        targets = self.targets_
        tasks = self._without_cut_tasks(tasks, targets, n_shots)
        n_shots, n_ways = targets.scored_shots(tasks, n_shots), targets.n_ways
        encoded = targets.encode(tasks)
        targets.check_splittable(encoded, n_shots)
        sampler = EpisodeSampler(encoded, n_shots=n_shots, **targets.sampling())
        if n_ways is not None and tasks.in_query is None:
            n_repeats *= -(-SCORED_EPISODES // tasks.n_tasks)
        which = np.repeat(np.arange(tasks.n_tasks), n_repeats)
        split = sampler.split(which, rng)
        if n_ways is not None and tasks.in_query is not None:
            _check_query_labels(tasks)
        support = TaskCollection(
            tasks.X[split.support],
            tasks.y[split.support],
            np.repeat(np.arange(len(which)), split.n_support),
            np.arange(len(which)),
            None,
            "list",
        )
        states = [self._adapted_state(support, None, s) for s in steps]
        codes = np.repeat(np.arange(len(which)), split.n_query)
        return Scored(tasks, which, split.query, codes, support, states)

    def _warn_if_seen(self, tasks: TaskCollection) -> None:
        if not tasks.named or not self._fingerprints:
            return
        marks = tasks.fingerprints()
        new_rows = [
            task for task, mark in marks.items() if self._fingerprints.get(task, mark) != mark
        ]
        if new_rows:
            warnings.warn(
                f"{len(new_rows)} of the {tasks.n_tasks} scored tasks, such as {new_rows[:3]}, "
                "have the ids of tasks that were meta-trained on, but other rows. If they are the "
                "same tasks, the score measures new rows of known tasks, not new tasks: split by "
                "task (GroupKFold, LeaveOneGroupOut, GroupShuffleSplit) to measure those. If they "
                "are new tasks, give them ids of their own.",
                SeenTaskWarning,
                stacklevel=4,
            )

    def _score(self, X: Any, y: Any, groups: Any, sample_weight: Any, metric: Any) -> float:
        check_is_fitted(self)
        refuse_graphs(y=y, sample_weight=sample_weight)
        if issparse(y):
            raise TypeError("Sparse targets were passed; dense ones are required: y.toarray().")
        if not self._has_task_information(X, y, groups):
            predicted = self.predict(X)
            if sample_weight is not None:
                sample_weight = _check_weights(sample_weight, predicted)
            return float(metric(y, predicted, sample_weight=sample_weight))
        scored = self._split_and_adapt(X, y, groups)
        rows = scored.rows
        predicted = self._decide(
            scored.states[0], self._reshape(scored.tasks.X[rows]), scored.codes
        )
        if sample_weight is not None:
            sample_weight = _check_weights(sample_weight, scored.tasks.X)[rows]
        return float(metric(scored.tasks.y[rows], predicted, sample_weight=sample_weight))

    # -- what the subclasses define --------------------------------------------------------------

    def _make_targets(self) -> Targets:
        """Return what y means by the parameters of now."""
        raise NotImplementedError

    def _symmetric_head(self, learner: Any) -> SymmetricHead | None:
        """Projection of the meta-parameters in meta-training."""
        return None

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "module_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


# -- models that hold a MAML estimator -----------------------------------------------------------


def find_prior(estimator: Any) -> Any:
    """Return the MAML estimator, or the Pipeline that ends in one, inside a model."""
    model = estimator
    while not isinstance(model, BaseMAML):
        if isinstance(model, Pipeline):
            find_prior(model.steps[-1][1])
            return model
        for name in ("best_estimator_", "model_", "estimator", "prior"):
            if getattr(model, name, None) is not None:
                model = getattr(model, name)
                break
        else:
            raise TypeError(
                f"There is no meta-learned model in {type(estimator).__name__}: expected a "
                "meta-fitted MAMLRegressor or MAMLClassifier, or a fitted Pipeline, search or "
                "FewShot estimator made of one."
            )
    return model


def transform_rows(pipeline: Pipeline, X: Any) -> Any:
    """Rows as the last step of a fitted pipeline sees them; lists of tasks stay lists."""
    check_is_fitted(pipeline)
    if is_task_list(X, None):
        return [
            tuple(part if k % 2 else transform_rows(pipeline, part) for k, part in enumerate(task))
            for task in X
        ]
    refuse_graphs(X=X)
    for _, step in pipeline.steps[:-1]:
        if step is not None and step != "passthrough":
            X = step.transform(X)
    return X


def _as_is(values: np.ndarray) -> np.ndarray:
    return values


class _Split:
    """Answer a list of query sets with a list."""

    def __init__(self, cuts: np.ndarray) -> None:
        self.cuts = cuts

    def __call__(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, self.cuts)


class _Stack:
    """Answer a 3-D array of query sets with one more leading axis."""

    def __init__(self, n_tasks: int, n_rows: int) -> None:
        self.shape = (n_tasks, n_rows)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(*self.shape, *values.shape[1:])


def _check_query_labels(tasks: TaskCollection) -> None:
    """Refuse given episodes with query classes that the support set lacks."""
    assert tasks.in_query is not None
    for j in range(tasks.n_tasks):
        rows = tasks.rows(j)
        query = tasks.in_query[rows]
        missing = np.setdiff1d(tasks.y[rows[query]], tasks.y[rows[~query]])
        if len(missing):
            raise ValueError(
                f"Task {j} has query rows of the classes {missing[:5].tolist()}, which its support "
                "set lacks, so no prediction of them can be right. Leave these rows out."
            )


def _gains_nothing(reference: np.ndarray, after: np.ndarray) -> bool:
    """Whether losses of tasks are not below the reference, up to a small part of it.

    The 95 % interval of the mean paired difference has to end below `NEGLIGIBLE_GAIN`; or below
    `UNPROVEN_GAIN`, with a mean within a standard error of 0. Few or noisy tasks prove nothing.
    """
    gain = reference - after
    if not np.isfinite(gain).all():
        return False
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    most = gain.mean() + stdtrit(len(gain) - 1, 0.975) * error
    enough = UNPROVEN_GAIN if gain.mean() <= error else NEGLIGIBLE_GAIN
    return bool(most < enough * reference.mean())


def _check_weights(sample_weight: Any, X: np.ndarray, **options: Any) -> np.ndarray:
    """Validate weights of rows, and scale them to at most 1, so that no sum of them overflows.

    Only their ratios matter; a power of two scales them exactly.
    """
    refuse_graphs(sample_weight=sample_weight)
    # a number that is too large for the dtype is refused with a message of its own
    with np.errstate(over="ignore", invalid="ignore"):
        weights = _check_sample_weight(sample_weight, X, **options)
    scaled: np.ndarray = np.ldexp(weights, -np.frexp(np.abs(weights).max())[1])
    return scaled


def _n_rows(X: Any) -> int:
    return int(X.shape[0]) if hasattr(X, "shape") and X.shape else len(X)


class _SeededTorch:
    """Seed torch's global generator for a while, then restore it.

    The generator is one for the process, so fits in threads take turns.
    """

    _lock = threading.RLock()

    def __init__(self, device: torch.device, seed: int) -> None:
        self._fork = forked_generators([] if is_host(device) else [device])
        self._seed = seed

    def __enter__(self) -> None:
        self._lock.acquire()
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        self._lock.release()
