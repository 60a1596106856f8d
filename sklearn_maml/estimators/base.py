"""What the two estimators share: `fit`, `adapt` and their fitted state."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, ClassVar, Self

import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sklearn_maml._compat import with_callbacks
from sklearn_maml._types import TaskDistribution, Tasks, Weights
from sklearn_maml._validation import keeps_state_on_error
from sklearn_maml.data.spellings import is_task_distribution
from sklearn_maml.data.weights import NO_WEIGHT
from sklearn_maml.devices import SeededTorch, resolve_device
from sklearn_maml.estimators.reading import SEVERAL_TASKS
from sklearn_maml.estimators.scoring import Scoring
from sklearn_maml.estimators.stored import Stored
from sklearn_maml.estimators.training import Training
from sklearn_maml.learners.plan import GRADIENT_STEPS
from sklearn_maml.model_files import describe
from sklearn_maml.targets.base import Targets
from sklearn_maml.threads import one_thread
from sklearn_maml.training.checkpoint import begin_checkpointed
from sklearn_maml.training.distributed import find_processes
from sklearn_maml.training.sources import CollectionSource, DistributionSource


class BaseMAML(Training, Stored, Scoring):
    """What the classifier and the regressor share."""

    # `groups` is requested by default, so that metadata routing works without set_*_request
    __stored_attributes__: ClassVar[tuple[str, ...]] = (
        "n_features_in_",
        "feature_names_in_",
        "feature_shape_",
        "n_tasks_",
        "tasks_",
        "n_iter_",
        "_dtype",
        "_flat",
        "_fingerprints",
        "_rung",
        "_score_seed",
        "_task_sizes",
        "_weight_column",
        "learner_weights_",
    )

    __metadata_request__fit: ClassVar = {"groups": True}
    __metadata_request__partial_fit: ClassVar = {"groups": True}
    __metadata_request__score: ClassVar = {"groups": True}
    __metadata_request__predict: ClassVar = {"groups": True}

    @one_thread()
    @keeps_state_on_error
    @with_callbacks
    def fit(
        self,
        X: Tasks | TaskDistribution,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sample_weight: Weights = None,
    ) -> Self:
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
        groups : array-like of shape (n_rows,) or (n_rows, n_parts), default=None
            Task id of each row: numbers, texts, dates, or several of them that together are the
            id. Ids of one value are one task in every later call, whichever library they come
            from.
        sample_weight : array-like of shape (n_rows,), str or dict, default=None
            Weights of the rows, 0 or more; or the name of the column of a data frame that has them,
            which is no feature and may be in every X; or a dict with the weight of each task by its
            id. They act on support and query losses, on the standardisation of y, in the Gaussian
            head, and on what held-out tasks decide. Only their ratios matter: within a task those
            of its rows, and between tasks the means of their rows, as all tasks count alike without
            weights. A row of weight 0 is left out. For a list or an array of tasks also one item
            for each task, with the weights of its rows (for tasks of four parts those of the
            support rows, then those of the query rows) or a number.

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
        return self._fit(X, y, groups, sample_weight, continued=bool(self.warm_start))

    @one_thread()
    @keeps_state_on_error
    @with_callbacks
    def partial_fit(
        self,
        X: Tasks | TaskDistribution,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sample_weight: Weights = None,
    ) -> Self:
        """Go on with meta-training on more tasks, or begin it.

        For tasks that come in parts, whatever `warm_start` says. One call makes 50 meta-updates,
        an epoch of `history_`, or one pass over its tasks where that takes more, and at most
        `max_iter`; a Gaussian head takes 6 in 10 of them, as in `fit`. They are of a constant rate
        (`beta_decay` is not used), and the last parameters are kept, without early stopping. Tasks
        that were adapted to are forgotten.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features), list of tasks, 3-D array, or distribution
            Rows of some tasks, or tasks, as in `fit`. A task is better learned from whole than in
            pieces; few tasks at a time will do where the first call had 4 or more.
        y : array-like of shape (n_rows,) or (n_rows, n_outputs), default=None
            Targets.
        groups : array-like of shape (n_rows,) or (n_rows, n_parts), default=None
            Task id of each row.
        sample_weight : array-like of shape (n_rows,), str or dict, default=None
            Weights of the rows or tasks, as in `fit`.

        Returns
        -------
        self : object
            The meta-fitted estimator. `n_tasks_`, `tasks_` and what `score` knows of tasks that it
            has seen are of the last call; `history_` has up to 1,000 epochs.

        Raises
        ------
        ValueError
            If a parameter or the data is not valid; the estimator is left as it was.
        MetaTrainingError
            If most meta-steps were not finite.

        Notes
        -----
        Features and targets are standardised as at the first call, or at the `fit` before it, and
        what was trained then is trained on: with fewer than 4 tasks gradient steps alone. Held-out
        tasks of a call change how confident predictions are, and the shares of the learners, where
        there are 10 of them or more.
        """
        return self._fit(X, y, groups, sample_weight, continued=True, partial=True)

    def _fit(
        self,
        X: Any,
        y: Any,
        groups: Any,
        sample_weight: Any,
        *,
        continued: bool,
        partial: bool = False,
        classes: Any = None,
    ) -> Self:
        """Meta-train; `continued` goes on from what was learned before, if anything was."""
        self._validate_params()
        self._check_parameter_names()
        processes = find_processes()
        if continued and hasattr(self, "module_") and not hasattr(self, "net_"):
            raise ValueError(
                f"{'partial_fit' if partial else 'warm_start=True'} continues a fit, but this "
                "model was saved without the state of its optimiser. Save it with training=True, "
                "or fit anew with warm_start=False."
            )
        continued = continued and hasattr(self, "net_")
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
        before = dict(vars(self)) if continued else None
        with torch.inference_mode(False):  # a caller may have it on
            targets = copy.copy(self.targets_) if continued else self._make_targets()
            if partial and not continued:
                targets.declare(classes)
            self.device_ = resolve_device(self.device)
            source: DistributionSource | CollectionSource
            if is_task_distribution(X):
                if not (y is None and groups is None and sample_weight is None):
                    raise ValueError(
                        "Got a task distribution and y, groups or sample_weight: the tasks it "
                        "samples bring their own targets. Leave these out."
                    )
                source = DistributionSource(
                    X,
                    targets,
                    self._episode_settings(),
                    seed,
                    self._read_tasks,
                    learns=not continued,
                )
            else:
                source = self._collect(X, y, groups, targets, seed, continued, sample_weight)
            self._take_targets(targets)
            self.device_ = self._place(self.device_)
            self._score_seed = seed
            self.__dict__.pop("_state", None)
            routed = {"groups": groups, "sample_weight": sample_weight}
            metadata = {name: value for name, value in routed.items() if value is not None}
            plan = dataclasses.replace(self._plan(source, seed, continued), partial=partial)
            joint = self._meta_train(plan, seed, continued, (X, y, metadata), processes, checkpoint)
            self._choose_learners(plan, joint, before, checkpoint)
        if source.single:
            # without tasks the estimator is an ordinary one: it has learned from all the rows
            self._adapt_to(source.tasks, source.tasks.weight)
        return self

    def _take_targets(self, targets: Targets) -> None:
        """Have what targets have learned as fitted attributes."""
        self.targets_ = targets
        self.__dict__.update(targets.attributes())

    def adapt(
        self,
        X: Tasks,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sample_weight: Weights = None,
        *,
        extend: bool = False,
    ) -> Self:
        """Adapt to the support sets of one or many new tasks, or add rows to adapted ones.

        Starts from the meta-learned initialisation, which it does not change, and replaces
        what an earlier `adapt` left, at once and as a whole: of several threads that adapt one
        model the last one wins, and a prediction meanwhile is of one of them, never of a mix. Use
        `sklearn_maml.adapt` for a model of its own in every thread. With ``extend=True`` tasks
        that are adapted stay, and threads add to what others have added.

        A task takes as much room as its parameters and support rows. A Gaussian head keeps up to
        128 MiB of posteriors beside, of all tasks together: where they would take more, predictions
        with ``return_std=True`` adapt anew to those of the tasks asked about that have none, and
        keep up to 256 MiB of what they find, too.

        Parameters
        ----------
        X : array-like of shape (n_support, n_features)
            Support rows; lists of tasks and 3-D arrays are accepted as in `fit`. A task may have
            none, ``(X[:0], y[:0])``: its predictions are then those for the population of tasks.
        y : array-like of shape (n_support,) or (n_support, n_outputs)
            Their targets.
        groups : array-like of shape (n_support,), default=None
            Task id of each row, to adapt to many tasks in one call; None: one task.
        sample_weight : array-like of shape (n_support,), str or dict, default=None
            Weights of the rows, spelt as in `fit`: a row of weight 2 is one that is there twice.
            Gradient steps follow the weighted mean of the losses, of which ratios alone matter;
            a Gaussian head is the surer the larger weights are, up to 1024. Rows without weights
            have a weight of 1; those of weight 0 are left out, if need be all rows of a task.
        extend : bool, default=False
            Whether to add the rows to what was adapted before: tasks then are what they would be
            after one call with all of their rows, those without new rows stay, and new ones are
            adapted. For learners that need no earlier rows (a Gaussian head alone, see
            `learner_weights_`) or keep them (a `Learner` of one's own); not with `n_ways` or
            `center_y`.

        Returns
        -------
        self : object
            Ready to predict for these tasks.

        Raises
        ------
        NotFittedError
            If the estimator is not meta-fitted.
        ValueError
            If the data does not fit, or the learner cannot add rows; what was adapted before is
            kept.

        Warns
        -----
        SingleTaskWarning
            If rows without task ids are as many as those of several tasks of `fit`.
        TaskColumnWarning
            If ids in a task column look scaled beside those of `fit`.
        """
        for doubt in self.__adapt_to_tasks__(X, y, groups, sample_weight, extend):
            warnings.warn(doubt, stacklevel=2)
        return self

    def __adapt_to_tasks__(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        extend: bool = False,
    ) -> list[Warning]:
        """Adapt as `adapt` does; return what is to be warned of, for its caller to do."""
        check_is_fitted(self)
        self._validate_params()
        self._check_unchanged()
        X, sample_weight = self._take_weights(X, y, sample_weight)
        tasks = self._read_tasks(X, y, groups, needs_rows=False)
        if tasks.in_query is not None:
            raise ValueError(
                "adapt takes support sets only: got tasks of four parts. Pass [(X_support, "
                "y_support), ...] and give the query rows to predict."
            )
        weight, scaled = self._support_weights(sample_weight, tasks)
        if extend:
            self._extend_to(tasks, weight, scaled)
        else:
            self._adapt_to(tasks, weight, scaled)
        pooled = self._pooled(tasks, "adapt", SEVERAL_TASKS * self._sizes()[1])
        return [*pooled, *self._scaled(tasks)]

    @torch.inference_mode(False)
    @one_thread()
    def __adapt_initialisation__(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Adapt a random initialisation to one task, without meta-training (FewShot estimators)."""
        self._validate_params()
        X, sample_weight = self._take_weights(X, y, sample_weight)
        tasks = self._read_tasks(X, y, reset=True)
        sample_weight, _ = self._support_weights(sample_weight, tasks)
        if sample_weight is not None and not sample_weight.any():
            raise ValueError(NO_WEIGHT)
        targets = self._make_targets()
        targets.learn(tasks, sample_weight)
        self._take_targets(targets)
        self._score_seed = seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.device_ = resolve_device(self.device)
        self.n_tasks_, self.tasks_, self._fingerprints = 1, None, {}
        with SeededTorch(self.device_, seed):
            module = self._networks().make()
        self._learner = self._make_learner(module)
        self.module_ = module
        self._fit_settings = self._settings(module)
        self._rung = "auto"
        self.learner_weights_, self.calibration_ = {GRADIENT_STEPS: 1.0}, None
        self._adapt_to(tasks, sample_weight)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "module_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
