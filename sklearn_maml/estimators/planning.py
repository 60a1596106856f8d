"""Deciding what is trained, and setting up the net that trains it."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np

from sklearn_maml._validation import check_keywords, did_you_mean, is_integer
from sklearn_maml.devices import SeededTorch
from sklearn_maml.estimators.building import Building
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.learners.head_trainer import HeadTrainer
from sklearn_maml.learners.joint import RATE, Joint
from sklearn_maml.learners.learner import LearnerEngine
from sklearn_maml.learners.plan import GRADIENT_STEPS, Plan
from sklearn_maml.training.checkpoint import Checkpoint, CheckpointedFit, net_state
from sklearn_maml.training.optimizers import settings_on
from sklearn_maml.training.sources import LEAST_TASKS, CrossFitted

# meta-updates on splits of one task, where there are no others; more of them overfit its rows
SINGLE_TASK_UPDATES = 100


class Planning(Building):
    """Decides what is trained, and makes the net."""

    def _plan(self, source: Any, seed: int, continued: bool) -> Plan:
        """Decide what is trained: gradient steps, a Gaussian head, or both.

        A fit that is continued trains what the one before has trained.
        """
        learner = self._own_learner()
        if learner is not None:
            reason = learner.refuses(self._problem(source.encoded))
            if reason is not None:
                raise ValueError(f"update_rule={type(learner).__name__} {reason}")
            return Plan(source, source, with_steps=False, with_head=False, learner=learner)
        asked = self._rule_name()
        if asked not in ("auto", "gaussian-head"):
            return Plan(source, source, with_steps=True, with_head=False)
        if continued and not isinstance(self._learner.head, GaussianHead):
            return Plan(source, source, with_steps=True, with_head=False)
        reason = None if continued else self._why_no_head(source)
        if reason is not None:
            if asked == "gaussian-head":
                raise ValueError(
                    f"update_rule='gaussian-head' {reason}. Use update_rule='auto' (which then "
                    "takes gradient steps) or 'sgd'."
                )
            return Plan(source, source, with_steps=True, with_head=False)
        too_few = source.of_tasks and source.n_tasks < LEAST_TASKS
        holds_out = bool(self.early_stopping) and not too_few
        # without held-out tasks nothing could tell how much steps are worth
        judged = holds_out and (source.of_tasks or source.validation is not None)
        with_steps = asked == "auto" and judged
        # with labels of their own, steps have added nothing to the head; see docs/defaults.md
        with_steps = with_steps and self.targets_.n_ways is None
        if continued:
            if source.single:
                raise ValueError(
                    "A Gaussian head was meta-learned, from how tasks differ, and these rows have "
                    "no task information. Give groups or a task column, or fit anew with "
                    "warm_start=False."
                )
            with_steps = self._learner.module is not None
        episodes = CrossFitted(
            source,
            n_members=self._n_members(),
            with_steps=with_steps,
            holds_out=holds_out,
            fraction=self.validation_fraction,
            seed=seed,
        )
        return Plan(source, episodes, with_steps=with_steps, with_head=True)

    def _new_net(
        self, plan: Plan, seed: int, continued: bool, checkpoint: CheckpointedFit | None
    ) -> tuple[Any, Any]:
        """Meta-parameters, and the net that trains them."""
        if continued:
            from sklearn_maml.training.outcomes import shortened

            self._check_unchanged(everything=True)
            learner = copy.deepcopy(self._learner)
            if checkpoint is not None:
                self._take_up(checkpoint, learner, plan, seed, continued)
            net = self._make_net(learner)
            history = self.net_.history
            net.continue_from(
                self.net_, shortened(history) if plan.partial else copy.deepcopy(history)
            )
            return learner, net
        with SeededTorch(self.device_, seed):
            module = self._networks().make()
            self._check_module(module)
        learner = self._make_learner(module)
        if plan.learner is not None:
            with SeededTorch(self.device_, seed):
                learner.head = self._build_network(plan.learner, plan.source.encoded)
        if checkpoint is not None:
            self._take_up(checkpoint, learner, plan, seed, continued)
        if plan.with_head:  # its start follows from what was compared, and takes long
            result = None if checkpoint is None else checkpoint.result
            with SeededTorch(self.device_, seed):
                learner.head = self._make_head(plan) if result is None else self._head_like(result)
        if not plan.with_steps:
            learner.without_steps()
        learner.to(self.device_)
        return learner, self._make_net(learner)

    def _take_up(
        self, checkpoint: CheckpointedFit, learner: Any, plan: Plan, seed: int, more: bool
    ) -> None:
        """Compare what a checkpoint has with this fit."""
        source, tasks = plan.source, plan.source.tasks
        weight = source.encoded.weight
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
                *([] if weight is None else [weight]),
            ],
            the_parameters_that_the_fit_begins_with=dict(learner.state_dict()),
            the_fit_that_is_continued=[self.net_.update_, net_state(self.net_)["optimizer"]]
            if more
            else None,
        )

    def _all_callbacks(self) -> list[Any]:
        """Return callbacks of the net: the user's, and a progress bar where one can be seen."""
        from skorch.callbacks import Callback, ProgressBar

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
        return callbacks

    def _make_net(self, learner: Any) -> Any:
        from torch.utils.data import DataLoader

        from sklearn_maml.training.net import MetaNet
        from sklearn_maml.training.stream import use_batch

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
        optimizer, chosen = self._resolve_optimizer(), self._prefixed("optimizer")
        check_keywords(optimizer, chosen, "optimizer")
        own = settings_on(optimizer, chosen, list(learner.parameters()), self.device_)
        settings |= {f"optimizer__{name}": value for name, value in own.items()}
        for prefix in ("iterator_train", "iterator_valid"):
            check_keywords(DataLoader, self._prefixed(prefix), prefix)
        net = MetaNet(
            learner,
            optimizer=optimizer,
            lr=self.beta,
            classes=np.arange(self.targets_.n_outputs) if self.targets_.are_classes else None,
            callbacks=self._all_callbacks(),
            verbose=int(self.verbose),
            device=str(self.device_),
            **settings,
        )
        names = [name for name, _ in net.named_callbacks()]
        for name in self._prefixed("callbacks"):
            head = name.partition("__")[0]
            if head not in names:
                raise ValueError(
                    f"callbacks__{name} is for a callback {head!r}, but there is none."
                    f"{did_you_mean(head, names)} Expected one of {names}."
                )
        return net

    def _training_engine(self, learner: Any, plan: Plan, continued: bool) -> Any:
        if plan.learner is not None:
            return LearnerEngine(plan.learner, learner.head, self._row_loss())
        engine = None
        if plan.with_steps:
            engine = self._make_engine(learner.module)
            engine.spec.meta_gradient.check_with(
                learns=len(learner.rule) > 0,
                all_adapt=len(engine.spec.parts.adapted)
                == len([p for p in learner.module.parameters() if p.requires_grad]),
                checkpoint_steps=bool(engine.spec.checkpoint_steps),
                moves=self._n_steps() > 0 and self._alpha() > 0,
            )
        plan.engine = engine
        if not plan.with_head:
            return engine
        episodes = plan.episodes
        trainer = HeadTrainer(
            learner.head,
            episodes.unseen,
            episodes.member_validation,
            n_ways=episodes.n_ways,
            weighted=plan.source.encoded.weight is not None,
        )
        weights = getattr(self, "learner_weights_", {}) if continued else {}
        return Joint(trainer, engine, has_share=weights.get(GRADIENT_STEPS, 0.0) > 0)

    def _set_up(self, net: Any, learner: Any, plan: Plan) -> None:
        from skorch.callbacks import LRScheduler

        from sklearn_maml.training.schedule import UPDATES_PER_EPOCH

        source, engine = plan.source, plan.engine
        net.alpha, net.steps = self._alpha(), self._n_steps()
        net.eval_steps = self._n_adapt_steps()
        net.max_iter = self._integer("max_iter")
        net.batch_size = self._integer("meta_batch_size")
        if source.single:
            net.max_iter = min(net.max_iter, SINGLE_TASK_UPDATES)
            # splits of the same rows differ less than tasks do: fewer make a meta-batch
            net.batch_size = min(net.batch_size, 4)
        net.batch_size = self._prefixed("iterator_train").get("batch_size", net.batch_size)
        if not is_integer(net.batch_size) or net.batch_size < 1:
            raise ValueError(
                "iterator_train__batch_size is the number of tasks of a meta-batch: expected an "
                f"int of at least 1, got {net.batch_size!r}."
            )
        net.n_tasks, net.rows_per_task = source.n_tasks, source.rows_per_task
        net.max_grad_norm = self.max_grad_norm
        net.symmetric_head = self._symmetric_head(learner) if plan.with_steps else None
        net.step_size_at = None if engine is None else engine.spec.meta_gradient.step_size_at
        # a scheduler that the user passed decides alone
        scheduled = any(
            issubclass(c if isinstance(c, type) else type(c), LRScheduler)
            for _, c in net.named_callbacks()
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
        net.partial = plan.partial
        if plan.partial:
            in_one_pass = -(-plan.episodes.n_train // net.batch_size)
            net.max_iter = min(net.max_iter, max(UPDATES_PER_EPOCH, in_one_pass))
            net.patience = None
            return
        stops = self.early_stopping != "auto" and bool(self.early_stopping)
        net.patience = self._integer("n_iter_no_change") if stops else None
