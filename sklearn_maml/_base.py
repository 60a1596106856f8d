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
from sklearn.base import BaseEstimator
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
from sklearn_maml.checkpoint import (
    Checkpoint,
    CheckpointedFit,
    begin_checkpointed,
    net_state,
)
from sklearn_maml.devices import forked_generators, is_host
from sklearn_maml.distributed import Processes, find_processes
from sklearn_maml.engine import (
    CHUNK,
    NATIVE_CHUNK,
    Adapted,
    Engine,
    cross_entropy_rows,
    has_dropout,
    is_row_wise,
    one_thread,
    restore_diverged,
    squared_error_rows,
)
from sklearn_maml.episodes import (
    EpisodeSampler,
    check_splittable,
    large_enough,
    pad_rows,
)
from sklearn_maml.exceptions import (
    CutTaskWarning,
    InterruptedFitWarning,
    MemorizationWarning,
    MetaTrainingError,
    NonFiniteStepWarning,
    NotAdaptedError,
    SeenTaskWarning,
    SingleTaskWarning,
)
from sklearn_maml.heads import SymmetricHead
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
from sklearn_maml.optimizers import settings_on
from sklearn_maml.persistence import MAMLKind, SaveMixin, describe
from sklearn_maml.posterior import Conditioned, PosteriorEnsemble, find_weight, mix
from sklearn_maml.sources import CollectionSource, DistributionSource
from sklearn_maml.tasks import (
    FLOATS,
    TaskCollection,
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
from sklearn_maml.update_rules import resolve_update_rule

__all__ = ["BaseMAML", "Scored", "State", "find_prior", "transform_rows"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
DEFAULT_ALPHA = 0.03
# rows of one task predicted at a time
ROWS_AT_A_TIME = 4096
# meta-updates on splits of one task, where there are no others; more of them overfit its rows
SINGLE_TASK_UPDATES = 100
# A fit is judged by what adapting gains after as many meta-updates, on as many held-out tasks: on
# sinusoids, even at a tenth of the published alpha or of the default beta, the gain is above its
# standard error from there on; see docs/diagnostics.md.
MEMORIZATION_UPDATES, MEMORIZATION_TASKS = 300, 10
# Closed-form adaptation: largest number of features, and updates for two meta-updates
POSTERIOR_FEATURES, POSTERIOR_UPDATES = 500, 3
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
# support rows of each task in `score` with n_shots=None (regression): half of the rows, at most
SCORED_SHOTS = 10


@dataclasses.dataclass
class State:
    """What `adapt` sets: parameters adapted to each task, and how to predict with them."""

    engine: Engine | None  # None: predictions are those of `conditioned`
    adapted: Adapted | None
    ids: np.ndarray | None  # None: one task without an id
    conditioned: Conditioned | None = None  # closed-form adaptation
    labels: np.ndarray | None = None  # with n_ways: the classes of all adapted tasks
    slots: np.ndarray | None = None  # (n_tasks, n_ways) position in labels of each output, or -1
    center: np.ndarray | None = None  # with center_y: (n_tasks, n_outputs), in the units of y

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        adapted = self.conditioned if self.adapted is None else self.adapted
        assert adapted is not None
        return adapted.n_tasks


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

    _classification: bool
    _default_steps: int
    _dtype: Any
    net_: Any
    posterior_: PosteriorEnsemble | None
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
        "hidden_layer_sizes": ["array-like", Interval(numbers.Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "alpha": [Interval(numbers.Real, 0, None, closed="left"), None],
        "beta": [Interval(numbers.Real, 0, None, closed="neither")],
        "adapted": [str, list, tuple],
        "beta_decay": [Interval(numbers.Real, 0, 1, closed="both")],
        "max_grad_norm": [Interval(numbers.Real, 0, None, closed="neither"), None],
        "steps": [Interval(numbers.Integral, 0, None, closed="left"), None],
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
        "posterior": ["boolean", StrOptions({"auto"})],
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
        source: DistributionSource | CollectionSource
        if is_task_distribution(X):
            if y is not None or groups is not None:
                raise ValueError(
                    "Got a task distribution and y or groups: the tasks it samples bring their "
                    "own targets. Leave y and groups out."
                )
            source = DistributionSource(self, X, seed, continued)
        else:
            source = self._collect(X, y, groups, seed, continued)
        self._score_seed = seed
        self.device_ = self._resolve_device()
        self.__dict__.pop("_state", None)
        metadata = {} if groups is None else {"groups": groups}
        with_posterior = self._wants_posterior(source, processes)
        self._meta_train(
            source, seed, continued, (X, y, metadata), processes, checkpoint, with_posterior
        )
        self.posterior_, self.posterior_weight_ = None, 0.0
        held_out = None
        if source.validation is not None and self._inner_loop_is_free():
            held_out = self._predict_held_out(source)
        self._calibrate(held_out)
        if with_posterior and not self.net_.interrupted_:
            try:
                self._fit_posterior(source, seed, held_out)
            except KeyboardInterrupt:  # of the fit, the initialisation is kept
                self.net_.interrupted_ = True
                warnings.warn(
                    "The fit was interrupted after meta-training, while it learned closed-form "
                    "adaptation: there is no posterior, and tasks are adapted by gradient steps.",
                    InterruptedFitWarning,
                    stacklevel=4 if HAS_SKLEARN_CALLBACKS else 3,
                )
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
            classification=self._classification,
            dtype=FLOATS if reset else self._dtype,
        )
        if reset:
            self.feature_shape_ = tasks.X.shape[1:]
            self._dtype = tasks.X.dtype
            self._flat = self.module is None  # the default network takes flat rows
        else:
            self._check_features(tasks.X)
        return tasks

    def _without_cut_tasks(self, tasks: TaskCollection, n_shots: int | None) -> TaskCollection:
        """Leave out tasks that a tool of scikit-learn has cut down to too few rows.

        `learning_curve` and successive halving draw rows, not tasks. Outside of such tools a task
        that is too small is an error.
        """
        if not tasks.named or not inside_cross_validation():
            return tasks
        large = large_enough(tasks, n_shots, self._n_ways(), self._classification)
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

    def _collect(self, X: Any, y: Any, groups: Any, seed: int, continued: bool) -> CollectionSource:
        tasks = self._read_tasks(X, y, groups, reset=not continued)
        tasks = self._without_cut_tasks(tasks, self.n_shots)
        if tasks.spelling == "single" and self._n_ways() is None:
            warnings.warn(
                f"{type(self).__name__}.fit got no task information and treats all "
                f"{len(tasks.X)} rows as one task. If the rows belong to several tasks, pass "
                "groups=task_ids (inside scikit-learn's tools enable it with "
                "sklearn.set_config(enable_metadata_routing=True)) or set task_column.",
                SingleTaskWarning,
                stacklevel=5 if HAS_SKLEARN_CALLBACKS else 4,
            )
        return CollectionSource(self, tasks, seed, continued)

    def _meta_train(
        self,
        source: Any,
        seed: int,
        continued: bool,
        data: tuple[Any, ...],
        processes: Processes | None,
        checkpoint: CheckpointedFit | None,
        with_posterior: bool,
    ) -> None:
        # imported when needed: adapting and predicting do without skorch
        from skorch.callbacks import LRScheduler

        from sklearn_maml.outer_loop import (
            UPDATES_PER_EPOCH,
            SklearnCallbacks,
            TaskStream,
            ValidateOn,
        )

        if continued:
            self._check_unchanged(everything=True)
            learner = copy.deepcopy(self._learner)
            net = self._make_net(learner)
            net.continue_from(self.net_)
        else:
            with _SeededTorch(self.device_, seed):
                module = self._make_module()
                self._check_module(module)
            learner = self._make_learner(module)
            learner.to(self.device_)
            net = self._make_net(learner)
        engine = self._make_engine(learner.module)
        engine.meta_gradient.check_with(
            learns=len(learner.rule) > 0,
            all_adapt=len(engine.adapted)
            == len([p for p in learner.module.parameters() if p.requires_grad]),
            checkpoint_steps=bool(self.checkpoint_steps),
            moves=self._n_steps() > 0 and self._alpha() > 0,
        )
        self._rung = "auto"
        net.engine = engine
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
        net.symmetric_head = self._symmetric_head(learner)
        net.step_size_at = engine.meta_gradient.step_size_at
        # a scheduler that the user passed decides alone
        scheduled = any(
            issubclass(c if isinstance(c, type) else type(c), LRScheduler)
            for _, c in net._uniquely_named_callbacks()
        )
        if scheduled and net.step_size_at(0.0) is not None:
            raise ValueError(
                "callbacks have an LRScheduler, but meta_gradient='reptile' makes its steps "
                "without the optimizer. Leave the scheduler out, or set "
                "meta_gradient__step_size=None."
            )
        net.beta_decay = 0.0 if scheduled else self.beta_decay
        net.verbose = int(self.verbose)
        stops = self.early_stopping != "auto" and bool(self.early_stopping)
        net.patience = self.n_iter_no_change if stops else None
        net.train_split = ValidateOn(source.validation)
        self._fit_settings = self._settings(learner.module)
        self.n_tasks_ = source.n_tasks
        self.tasks_ = source.ids
        self._fingerprints = source.fingerprints
        if HAS_SKLEARN_CALLBACKS:
            n_epochs = -(-net.max_iter // UPDATES_PER_EPOCH)
            net.epoch_hooks = SklearnCallbacks(self, learner, n_epochs, data)
        stream = TaskStream(
            source.draw,
            source.n_train,
            net.batch_size,
            seed,
            source.bytes_of_episode,
            source.draw_on,
        )
        # only modules that may draw random numbers (dropout, unknown ones) need torch's generator
        random = not is_row_wise(engine.module) or has_dropout(engine.module)
        if checkpoint is not None:
            tasks = source.tasks
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
                if continued
                else None,
            )
            checkpoint.draws_random = random
            net.checkpoint = checkpoint
        rank = 0 if processes is None else processes.rank  # other tasks, other random numbers
        with (
            _SeededTorch(self.device_, seed + (net.update_ if continued else 0) + rank)
            if random
            else contextlib.nullcontext(),
            processes or contextlib.nullcontext(),
        ):
            try:
                net.partial_fit(stream)
            except MetaTrainingError as error:
                if not with_posterior:
                    raise
                warnings.warn(
                    f"Gradient steps could not be meta-trained: {error} Tasks are adapted in "
                    "closed form alone, which scales the features itself.",
                    NonFiniteStepWarning,
                    stacklevel=5 if HAS_SKLEARN_CALLBACKS else 4,
                )
            copy_buffers(engine.module, learner.module)
        if HAS_SKLEARN_CALLBACKS:
            net.epoch_hooks.end_fit()
        # a posterior has learned how far to trust a support set: nothing to be changed then
        judged = not net.interrupted_ and net.update_ >= MEMORIZATION_UPDATES
        if judged and not with_posterior:
            self._warn_if_memorized(engine, learner, source)
        self._remember_rung(engine)
        # what held the data of this fit is not part of the fitted estimator
        net.engine = net.train_split = net.epoch_hooks = net.checkpoint = None
        self.net_ = net
        self.module_ = learner.module
        self._learner = learner
        self.history_ = net.history
        self.n_iter_ = net.update_

    def _predict_held_out(self, source: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return outputs, encoded targets and task positions of the held-out query rows."""
        engine = self._make_engine(self.module_, self._rung if self._rung == "loop" else "auto")
        outputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        codes: list[np.ndarray] = []
        first = 0
        for batch in source.validation:
            batch = batch.to(self.device_)
            n_tasks, n_rows = batch.query.X.shape[:2]
            with engine.threads(n_tasks * n_rows):
                adapted = engine.adapt(
                    self._learner.meta_params(),
                    batch.support,
                    alpha=self._alpha(),
                    steps=self._n_adapt_steps(),
                )
                output = engine.predict(adapted, batch.query, batch_norm=self.batch_norm)
            if output.ndim == 2:
                output = output.unsqueeze(-1)
            task = torch.arange(n_tasks).unsqueeze(1).expand(n_tasks, n_rows)
            for values, into in ((output, outputs), (batch.query.y, targets)):
                into.append(batch.query.real(values).cpu().numpy())
            codes.append(batch.query.real(task).numpy() + first)
            first += n_tasks
        return np.concatenate(outputs), np.concatenate(targets), np.concatenate(codes)

    def _calibrate(self, held_out: Any) -> None:
        """Learn how confident predictions may be; `held_out` is None without held-out tasks."""

    def _calibrate_mixture(self, mixed: np.ndarray, targets: np.ndarray) -> None:
        """Learn the same of predictions that the posterior has a share in."""

    def _scale_mixture(self, mixed: np.ndarray) -> np.ndarray:
        """Apply what `_calibrate_mixture` learned."""
        return mixed

    def _as_predicted(self, outputs: np.ndarray) -> np.ndarray:
        """Bring outputs of the network to the form in which they are mixed; see `mix`."""
        return outputs

    def _wants_posterior(self, source: Any, processes: Processes | None) -> bool:
        """Whether to learn closed-form adaptation, too; refuse where it cannot be."""
        if self.posterior is False or (self.posterior == "auto" and not self._inner_loop_is_free()):
            return False
        reason = self._why_no_posterior(source, processes)
        if reason is not None and self.posterior is True:
            raise ValueError(f"posterior=True {reason}. Set posterior='auto' or False.")
        return reason is None

    def _fit_posterior(self, source: Any, seed: int, held_out: Any) -> None:
        """Learn closed-form adaptation and, on the held-out tasks, its share of predictions."""
        tasks = source.tasks
        encoded = self._encode(tasks)
        y = encoded.y
        y = np.eye(len(self.classes_))[y] if self._classification else y.reshape(len(y), -1)
        with one_thread():
            posterior = PosteriorEnsemble.fit(
                tasks.X,
                y,
                tasks.codes,
                source.held_out,
                classification=self._classification,
                seed=seed,
                # it begins anew where a fit continues: as many as for all of its updates
                n_updates=POSTERIOR_UPDATES * max(self.max_iter, self.n_iter_) // 2,
            )
            self.posterior_, self.posterior_weight_ = posterior, 1.0
            if self.posterior == "auto":
                outputs, targets, codes = held_out
                if self._classification:
                    targets = np.eye(len(self.classes_))[targets]
                targets = targets.reshape(len(targets), -1)
                ways = posterior.predict_held_out(source.validation), self._as_predicted(outputs)
                self.posterior_weight_ = weight = find_weight(
                    *ways, targets, codes, self._classification
                )
                self._calibrate_mixture(mix(*ways, weight, self._classification), targets)

    def _inner_loop_is_free(self) -> bool:
        """Whether nothing was asked of the inner loop, so that `fit` may choose it."""
        named = (self.alpha, self.steps, self.adapt_steps, self.module)
        return (
            all(value is None for value in named)
            and (self.update_rule, self.meta_gradient, self.adapted)
            == ("sgd", "second-order", "all")
            and not self._prefixed("update_rule")
            and not self._prefixed("meta_gradient")
            and getattr(self, "head", "free") == "free"
            and not self._centers_targets()
        )

    def _why_no_posterior(self, source: Any, processes: Processes | None) -> str | None:
        """Say what stands in the way of closed-form adaptation, if anything does."""
        if self._n_ways() is not None:
            return "is for labels that the tasks share, but n_ways is set"
        if not isinstance(source, CollectionSource) or source.single:
            return "needs a collection of tasks"
        if self._centers_targets():  # by support rows: an error that it would not know of
            return "learns how the levels of tasks differ itself, but center_y is set"
        if source.held_out is None:
            return "needs held-out tasks: at least 10 tasks, or early_stopping=True"
        if source.tasks.in_query is not None:
            return "draws support and query rows itself, but the tasks come split"
        if processes is not None:
            return "is not shared by several processes"
        if len(self.feature_shape_) != 1 or self.feature_shape_[0] > POSTERIOR_FEATURES:
            return (
                f"takes tables of at most {POSTERIOR_FEATURES} features, but rows have the shape "
                f"{self.feature_shape_}"
            )
        if int(source.tasks.sizes.min()) < 2:
            return "needs at least two rows of each task"
        return None

    def _has_posterior(self) -> bool:
        """Whether to adapt in closed form."""
        learned = self.__dict__.get("posterior_") is not None
        if self.posterior is True and not learned:
            raise ValueError(
                "posterior=True, but the last fit has learned no posterior: it was made with "
                "another value, or interrupted. Fit anew, or set posterior='auto' or False to "
                "adapt by gradient steps."
            )
        return learned and (
            self.posterior is True or (self.posterior == "auto" and self._inner_loop_is_free())
        )

    def _warn_if_memorized(self, engine: Engine, learner: Any, source: Any) -> None:
        """Warn where held-out tasks gain nothing from their own support sets."""
        from sklearn_maml.outer_loop import compare_supports

        steps = self._n_adapt_steps()
        if (
            source.validation is None
            or source.single
            or source.n_held_out < MEMORIZATION_TASKS
            # labels are shuffled in every episode: no function of the features alone fits them
            or self._n_ways() is not None
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
            f"{rules if self._classification else ''}leave out features that tell the tasks "
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
        from sklearn_maml.outer_loop import MetaLearner

        return MetaLearner(
            module,
            resolve_update_rule(self.update_rule, self._prefixed("update_rule")),
            adapted_names(module, self.adapted),
            steps=self._n_steps(),
            classification=self._classification,
        )

    def _new_learner(self) -> Any:
        """Meta-parameters of the shapes of a fit, for those of a file."""
        with _SeededTorch(self.device_, 0):
            module = self._make_module()
        return self._make_learner(module)

    def _make_net(self, learner: Any) -> Any:
        from skorch.callbacks import Callback, ProgressBar
        from torch.utils.data import DataLoader

        from sklearn_maml.outer_loop import MetaNet, use_batch

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
            classes=np.arange(self._n_module_outputs()) if self._classification else None,
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
        return DEFAULT_ALPHA if self.alpha is None else float(self.alpha)

    def _n_steps(self) -> int:
        return self._default_steps if self.steps is None else int(self.steps)

    def _fit_initialisation(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Adapt a random initialisation to one task, without meta-training (FewShot estimators)."""
        self._validate_params()
        tasks = self._read_tasks(X, y, reset=True)
        sample_weight = self._support_weights(sample_weight, tasks)
        self._learn_targets(tasks, sample_weight)
        self._score_seed = seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.device_ = self._resolve_device()
        self._fingerprints = {}
        with _SeededTorch(self.device_, seed):
            module = self._make_module()
        self._learner = self._make_learner(module)
        self.module_ = module
        self._fit_settings = self._settings(module)
        self._rung = "auto"
        self._adapt_to(tasks, sample_weight)
        return self

    # -- module ----------------------------------------------------------------------------------

    def _make_module(self) -> nn.Module:
        options = self._prefixed("module")
        n_outputs = self._n_module_outputs()
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

    def _check_module(self, module: nn.Module) -> None:
        """Run the module once, so that a wrong one is refused before training starts."""
        n_outputs = self._n_module_outputs()
        rows = torch.zeros(
            (2, *self.feature_shape_), dtype=TORCH_DTYPES[self._dtype], device=self.device_
        )
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
        if n_outputs == 1 and not self._classification:
            expected.append((2,))
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if got not in expected:
            raise ValueError(
                f"module {type(module).__name__} returns {got} for 2 rows; expected a tensor of "
                f"shape {expected[0]}: one column for each {self._output_word}."
            )
        rule = resolve_update_rule(self.update_rule, self._prefixed("update_rule"))
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
        rule = resolve_update_rule(self.update_rule, self._prefixed("update_rule"))
        gradient = resolve_meta_gradient(self.meta_gradient, self._prefixed("meta_gradient"))
        settings = {
            "update_rule": type(rule),
            PROXIMAL: gradient.proximal > 0,
            "adapted": self.adapted,
            "n_ways": self._n_ways(),
            "center_y": self._centers_targets(),
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
            rates = rule.initial_rates(fast, classification=self._classification)
            shapes = {name: tuple(rate.shape) for name, rate in rates.items()}
            settings["what update_rule learns"] = shapes
        return settings

    def _check_unchanged(self, everything: bool = False) -> None:
        """Refuse parameters that no longer fit what was meta-learned; all of them, to continue."""
        now = self._settings(self.module_ if everything else None)
        names = ["update_rule", PROXIMAL, "adapted", "n_ways", "center_y"]
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

    def _make_engine(self, module: nn.Module, rung: str = "auto") -> Engine:
        return Engine(
            module,
            row_loss=cross_entropy_rows if self._classification else squared_error_rows,
            rule=resolve_update_rule(self.update_rule, self._prefixed("update_rule")),
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

    def _chunk(self, engine: Engine) -> int:
        """Tasks to adapt to or predict for at a time."""
        most = NATIVE_CHUNK if engine.rung == "native" else CHUNK
        return min(most, self.max_tasks_in_memory or most)

    def _remember_rung(self, engine: Engine) -> None:
        """Take the plain loop at once where batching has failed before, and what was compiled."""
        if engine.fallback_reason is not None:
            self._rung = "loop"
        elif engine.rung == "native":
            self._rung = "native"

    def _adapted_state(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None, steps: int | None = None
    ) -> State:
        """Adapt to every task of a collection; `steps` None is what `adapt` does."""
        self._check_features(tasks.X)
        targets, extra = self._encode_support(tasks, sample_weight)
        ids = None if tasks.spelling == "single" else tasks.ids
        conditioned = None
        if steps is None:
            steps = self._n_adapt_steps()
            if self._has_posterior():
                conditioned = self._condition(tasks, targets, sample_weight)
                if self.posterior_weight_ == 1 or self.posterior is True:
                    return State(None, None, ids, conditioned, **extra)
        # short tasks with short ones, so that little is padding
        by_size = np.argsort(tasks.sizes, kind="stable")
        compiled = self._rung == "native"
        # what was changed since (clipping, say) may be nothing for the compiled kernels
        engine = self._make_engine(self.module_, "auto" if compiled else self._rung)
        most = int(tasks.sizes.max()) if len(by_size) else 0
        engine.expect_tasks(len(by_size), most, steps, compiled=compiled)
        adapted: Adapted | None = None
        finite: list[Tensor] = []
        at_a_time = self._chunk(engine)
        for start in range(0, len(by_size), at_a_time):
            chosen = by_size[start : start + at_a_time]
            support = pad_rows(
                self._reshape(tasks.X),
                targets,
                np.concatenate([tasks.rows(j) for j in chosen]),
                tasks.sizes[chosen],
                sample_weight,
            )
            with engine.threads(support.X.shape[0] * support.X.shape[1]):
                part = engine.adapt(
                    self._learner.meta_params(),
                    support.to(self.device_),
                    alpha=self._alpha(),
                    steps=steps,
                )
            # a sum is not finite where a term is not; a closer look at all tasks costs more
            finite += [p.sum().isfinite() for p in part.params.values()]
            # written to its place at once: of many tasks, two copies would not fit
            adapted = _place(part, adapted, chosen, tasks.n_tasks)
        assert adapted is not None
        self._remember_rung(engine)
        if not bool(torch.stack(finite).all()):
            restore_diverged(adapted, self.module_, self._alpha())
        return State(engine, adapted, ids, conditioned, **extra)

    def _condition(
        self, tasks: TaskCollection, targets: np.ndarray, sample_weight: np.ndarray | None
    ) -> Conditioned:
        """Adapt in closed form."""
        y = targets
        y = np.eye(len(self.classes_))[y] if self._classification else y.reshape(len(y), -1)
        assert self.posterior_ is not None
        with one_thread():
            return self.posterior_.condition(tasks.X, y, tasks.codes, tasks.n_tasks, sample_weight)

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
        """Run each row under the parameters of its task, a chunk of rows at a time."""
        if state.conditioned is None:
            return self._outputs_of_steps(state, rows, codes)
        assert self.posterior_ is not None
        with one_thread():
            outputs = self.posterior_.predict(state.conditioned, rows, codes)
        if state.adapted is not None:
            of_steps = self._as_predicted(self._outputs_of_steps(state, rows, codes))
            outputs = mix(outputs, of_steps, self.posterior_weight_, self._classification)
        outputs = self._scale_mixture(outputs)
        return self._finite(outputs.astype(rows.dtype))

    def _outputs_of_steps(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the outputs of the parameters that gradient steps made."""
        assert state.engine is not None
        assert state.adapted is not None
        order = np.argsort(codes, kind="stable")
        tasks, counts = np.unique(codes, return_counts=True)
        # a task with very many rows is predicted in several pieces
        joined = state.engine.joins_rows(self.batch_norm)
        n_pieces = np.ones_like(counts) if joined else -(-counts // ROWS_AT_A_TIME)
        piece_task = np.repeat(tasks, n_pieces)
        first = np.repeat(np.cumsum(counts) - counts, n_pieces)
        number = np.arange(len(piece_task)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        first = first + number * ROWS_AT_A_TIME
        size = np.repeat(counts, n_pieces) - number * ROWS_AT_A_TIME
        if not joined:
            size = np.minimum(size, ROWS_AT_A_TIME)
        by_size = np.argsort(size, kind="stable")
        no_targets = np.zeros(len(rows), dtype=rows.dtype)
        result: np.ndarray | None = None
        start = 0
        at_a_time = self._chunk(state.engine)
        while start < len(by_size):
            stop = start + 1
            while (
                stop < len(by_size)
                and stop - start < at_a_time
                and (stop - start + 1) * size[by_size[stop]] <= CHUNK * ROWS_AT_A_TIME // 8
            ):
                stop += 1
            chosen = by_size[start:stop]
            place = np.concatenate([order[first[j] : first[j] + size[j]] for j in chosen])
            query = pad_rows(rows, no_targets, place, size[chosen])
            query = query.to(self.device_)
            with state.engine.threads(len(place)):
                output = state.engine.predict(
                    state.adapted.take(piece_task[chosen]), query, batch_norm=self.batch_norm
                )
            if output.ndim == 2:
                output = output.unsqueeze(-1)
            values = query.real(output).cpu().numpy()
            if result is None:
                result = np.empty((len(rows), values.shape[1]), dtype=values.dtype)
            result[place] = values
            start = stop
        assert result is not None
        return self._finite(result)

    def _finite(self, outputs: np.ndarray) -> np.ndarray:
        """Refuse outputs that have overflowed."""
        if np.isfinite(outputs).all():
            return outputs
        rows = np.flatnonzero(~np.isfinite(outputs).all(1))
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
        tasks = self._without_cut_tasks(tasks, n_shots)
        if n_shots is None and not self._classification:
            n_shots = max(min(SCORED_SHOTS, int(tasks.sizes.min()) // 2), 1)
        n_ways = self._n_ways()
        encoded = self._encode(tasks)
        check_splittable(encoded, n_shots, n_ways, self._classification)
        sampler = EpisodeSampler(
            encoded, classification=self._classification, n_ways=n_ways, n_shots=n_shots
        )
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

    _output_word: str

    def _n_ways(self) -> int | None:
        return None

    def _n_module_outputs(self) -> int:
        raise NotImplementedError

    def _learn_targets(self, tasks: TaskCollection, sample_weight: Any = None) -> None:
        """Set the fitted attributes that describe the targets."""
        raise NotImplementedError

    def _centers_targets(self) -> bool:
        """Whether the mean of the support targets of a task is taken from its targets."""
        return False

    def _symmetric_head(self, learner: Any) -> SymmetricHead | None:
        """Projection of the meta-parameters in meta-training."""
        return None

    def _encode(self, tasks: TaskCollection) -> TaskCollection:
        """Targets as the losses take them, for episodes."""
        raise NotImplementedError

    def _encode_support(
        self, tasks: TaskCollection, sample_weight: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Targets of support sets as the losses take them, and what `State` keeps of them."""
        raise NotImplementedError

    def _decide(self, state: State, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Predictions of rows under the parameters of the task of each."""
        raise NotImplementedError

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


def _place(part: Adapted, whole: Adapted | None, tasks: np.ndarray, n_tasks: int) -> Adapted:
    """Write adapted parameters of some tasks to their places among those of all."""
    if len(tasks) == n_tasks and (np.diff(tasks) == 1).all():
        return part

    def room(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.new_empty(n_tasks, *t.shape[1:]) for name, t in parts.items()}

    if whole is None:
        whole = Adapted(room(part.params), part.shared, room(part.statistics))
    where = torch.as_tensor(tasks, device=next(iter(part.params.values())).device)
    for to, some in ((whole.params, part.params), (whole.statistics, part.statistics)):
        for name, values in some.items():
            to[name].index_copy_(0, where, values)
    return whole


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
