"""The outer loop: a skorch net whose dataset item is a task and whose batch is a meta-batch."""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.utils import ClassifierTags
from skorch import NeuralNet
from skorch.callbacks import EpochTimer
from skorch.utils import to_numpy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sklearn_maml.devices import is_host
from sklearn_maml.exceptions import InterruptedFitWarning
from sklearn_maml.heads import SymmetricHead
from sklearn_maml.training import schedule
from sklearn_maml.training.callbacks import (
    EpochLog,
    FiniteMean,
    Listeners,
    new_schedules,
    raised_by_callback,
)
from sklearn_maml.training.head_and_steps import HeadAndSteps
from sklearn_maml.training.optimizers import load_state, without_compiler
from sklearn_maml.training.outcomes import Outcomes, current_row, non_finite_error
from sklearn_maml.training.outer_step import OuterStep
from sklearn_maml.training.stream import BatchLoader, Episodes, Loaders
from sklearn_maml.training.validation import judge_start, validate


class StopTraining(KeyboardInterrupt):
    """Ends the fit loop from inside; skorch's loop stops on KeyboardInterrupt."""


class MetaNet(NeuralNet):
    """Meta-training as a skorch net, of a `MetaLearner`. The attributes are set before a fit.

    Attributes
    ----------
    engine : Engine
    joint : Joint or None
        What `engine` is, or shares among processes, where a Gaussian head is trained.
    alpha : float
    steps, eval_steps : int
        Inner steps in meta-training, and in validation.
    max_iter : int
        Meta-updates of one call of `fit`.
    partial : bool
        Whether more calls will come: rates then are constant, and the last parameters are kept.
    patience : int or None
        Epochs without a better validation loss before the fit stops; None never stops.
    n_tasks : int or None
        Tasks that are trained on; None for a distribution of them.
    rows_per_task : int
        Typical number of rows of an episode, to judge how much work a step is.
    beta_decay : float
        Fraction of the updates, the last ones, over which the rate falls linearly to 0.
    max_grad_norm : float or None
        Largest norm of a meta-gradient; a larger one is scaled down.
    symmetric_head : SymmetricHead or None
        Projection of the meta-parameters, made with every meta-update.
    step_size_at : callable progress -> float or None
        Size of the outer step where the meta-gradient has a schedule of its own; the optimiser
        then does nothing. `progress` is the fraction of `max_iter` that is made.
    epoch_hooks : object with begin_epoch() and end_epoch()
        Told of the epochs besides the callbacks; a true result of `end_epoch` stops the fit.
    checkpoint : CheckpointedFit or None
        Where the state of the fit is kept, and taken from.
    classes : ndarray or None
        What the columns of the outputs stand for if they are logits, for scoring callbacks.
    """

    engine: Any = None
    joint: Any = None
    alpha: float = 0.01
    steps: int = 1
    eval_steps: int = 1
    max_iter: int = 1
    partial: bool = False
    patience: int | None = None
    n_tasks: int | None = None
    rows_per_task: int = 1
    beta_decay: float = 0.0
    max_grad_norm: float | None = None
    symmetric_head: SymmetricHead | None = None
    step_size_at: Callable[[float], float | None] | None = None
    epoch_hooks: Any = None
    checkpoint: Any = None

    def __init__(self, module: Any, *, classes: np.ndarray | None = None, **kwargs: Any) -> None:
        self.classes = classes
        super().__init__(module, criterion=nn.Identity, **kwargs)

    @property
    def _default_callbacks(self) -> list[tuple[str, Any]]:
        return [
            ("epoch_timer", EpochTimer()),
            ("train_loss", FiniteMean(name="train_loss", on_train=True)),
            ("valid_loss_before", FiniteMean(name="valid_loss_before", lower_is_better=None)),
            ("valid_loss", FiniteMean(name="valid_loss")),
            *(
                (name, FiniteMean(name=name, lower_is_better=None))
                for name in ("steps_valid_loss_before", "steps_valid_loss")
            ),
            ("print_log", EpochLog()),
        ]

    def initialize(self) -> MetaNet:
        """Initialise module, optimiser, callbacks and the counters of the run."""
        with without_compiler():
            super().initialize()
        self.update_ = 0
        self.non_finite_ = 0
        self.most_tasks_ = 0
        self._is_host = is_host(self.device)
        self.listeners_ = Listeners()
        self.loaders_ = Loaders()
        self.outcomes_ = Outcomes(self._is_host)
        self.outer_step_ = OuterStep(self._is_host)
        self.parts_: HeadAndSteps | None = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return attributes as they are.

        skorch pickles the module by a pickler of its own, to which classes of a notebook are
        unknown, and in which the module is no longer that of the estimator.
        """
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def named_callbacks(self) -> Iterator[tuple[str, Any]]:
        """Return names and callbacks, those of skorch's defaults and of the user."""
        return self._uniquely_named_callbacks()

    def continue_from(self, net: MetaNet, history: Any) -> None:
        """Take over counter and optimiser state of an earlier net, and its history."""
        self.initialize()
        self.history_ = history
        self.update_ = net.update_
        self.most_tasks_ = net.most_tasks_
        if type(self.optimizer_) is type(net.optimizer_):
            settings = [
                {name: value for name, value in group.items() if name != "params"}
                for group in self.optimizer_.param_groups
            ]
            with without_compiler():
                state = net.optimizer_.state_dict()
            load_state(self.optimizer_, state)
            for group, own in zip(self.optimizer_.param_groups, settings, strict=True):
                # rates and the like are those of now; none are left of an earlier schedule
                for name in group.keys() - own.keys() - {"params"}:
                    del group[name]
                group.update(own)

    def get_all_learnable_params(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, for callbacks, by their names here and by those in `module_`.

        The `module_` of an estimator, whose names its user sees, is a part of that of the net.
        """
        named = list(super().get_all_learnable_params())
        names = {name for name, _ in named}
        yield from named
        for name, p in self.module_.network.named_parameters():
            if name not in names:
                yield name, p

    def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> Any:
        """Arguments of an optimiser; patterns of its groups are for either of the names."""
        groups = self.get_params_for(prefix).get("param_groups", [])
        own = [pattern for pattern, options in groups if not options.get("of_head")]
        chosen: dict[int, tuple[str, Tensor]] = {}
        for name, p in named_parameters:
            known = chosen.setdefault(id(p), (name, p))[0]
            matches = any(fnmatch.fnmatch(name, pattern) for pattern in own)
            if matches and not any(fnmatch.fnmatch(known, pattern) for pattern in own):
                chosen[id(p)] = name, p
        return super().get_params_for_optimizer(prefix, list(chosen.values()))

    # -- steps -----------------------------------------------------------------------------------

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Make one meta-update."""
        with_closure = partial(super().train_step, batch, **fit_params)
        step = self.outer_step_.update(self, batch, with_closure)
        self.outer_step_.project(self)
        return step

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Compute the meta-gradient of one meta-batch and store it for the optimiser."""
        return self.outer_step_.compute(self, batch)

    def validation_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Query loss of held-out tasks, before and after adaptation."""
        episodes = batch[0].to(torch.device(self.device))
        losses, output, row = validate(self, episodes)
        self.outcomes_.put(self, row)
        return {"loss": losses.mean(), "y_pred": episodes.query.real(output)}

    # -- the loop --------------------------------------------------------------------------------

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None, **fit_params: Any) -> Any:
        """Run `max_iter` meta-updates and keep the best parameters."""
        if not self.initialized_:
            self.initialize()
        self.first_update_ = self.update_
        self.non_finite_ = 0
        self.best_loss_ = math.inf
        self.best_state_: dict[str, Tensor] | None = None
        self.best_update_ = self.update_
        self.interrupted_ = False
        if self.checkpoint is not None and self.checkpoint.is_complete:
            self.checkpoint.take_result(self)
            return self
        self.parts_ = None if self.joint is None else HeadAndSteps(self.joint)
        schedule.weigh_tasks(self)
        for group in self.optimizer_.param_groups:
            group["base_lr"] = group["lr"] = self.trust_ * group["lr"]
        with new_schedules(self):
            self.notify("on_train_begin", X=X, y=y)
        self.outer_step_.project(self)
        if self.checkpoint is not None:
            self.checkpoint.begin(self)
        if self.update_ == self.first_update_ and not self.partial:
            judge_start(self)
        left = self.max_iter - (self.update_ - self.first_update_)
        self.engine.expect(
            self.update_,
            left,
            n_tasks=X.batch_size,
            n_rows=self.rows_per_task,
            steps=self.steps,
        )
        try:
            with self.engine.threads(X.batch_size * self.rows_per_task):
                self.fit_loop(X, y, epochs=schedule.count_epochs(left, self.joint is not None))
        except StopTraining:
            pass
        except KeyboardInterrupt as error:
            if not raised_by_callback(error):
                self._interrupted()
        finally:
            self.engine.finish()
        if self.beta_decay:
            for group in self.optimizer_.param_groups:
                group["lr"] = group["base_lr"]
        done = self.update_ - self.first_update_
        if 2 * self.non_finite_ > done:
            episodes = next(iter(self.get_iterator(X, training=True)))[0]
            raise non_finite_error(self, episodes.to(torch.device(self.device)), done)
        if self.best_state_ is not None:
            self.module_.load_state_dict(self.best_state_)
        if self.parts_ is not None:
            self.parts_.end()
        self.best_state_ = self.parts_ = None
        for part in (self.outer_step_, self.listeners_, self.loaders_):
            part.forget()
        self.notify("on_train_end", X=X, y=y)
        if self.checkpoint is not None and not self.interrupted_:
            self.checkpoint.end(self)
        return self

    def _interrupted(self) -> None:
        self.interrupted_ = True
        kept = "the best so far" if self.best_state_ is not None else "the current ones"
        warnings.warn(
            f"Meta-training was interrupted after {self.update_ - self.first_update_} of "
            f"{self.max_iter} updates; the parameters kept are {kept}.",
            InterruptedFitWarning,
            stacklevel=2,
        )

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, **kwargs: Any) -> None:
        """Point the task stream at the next updates."""
        super().on_epoch_begin(net, dataset_train=dataset_train, **kwargs)
        self.listeners_.forget()
        self.outer_step_.look_again()
        dataset_train.first_update = self.update_
        left = self.max_iter - (self.update_ - self.first_update_)
        if self.parts_ is not None:
            left = self.parts_.updates_left(self, left)
        dataset_train.n_updates = min(schedule.UPDATES_PER_EPOCH, left)
        if not self._is_host:
            self.outer_step_.prepare(self)  # it waits for the device, which updates are not to do

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        """Make a data loader that leaves torch's global generator alone, or a lighter one."""
        kind = "train" if training else "valid"
        settings = self.get_params_for(f"iterator_{kind}").keys()
        plain = getattr(self, f"iterator_{kind}") is DataLoader
        if isinstance(dataset, Episodes) and plain and settings <= {"collate_fn", "batch_size"}:
            if not self._is_host:
                dataset.place(torch.device(self.device), self.engine, self.steps)
            return BatchLoader(dataset)
        iterator = super().get_iterator(dataset, training=training)
        self.loaders_.add(kind, iterator, kept=self.checkpoint is not None)
        return iterator

    def on_batch_begin(self, net: Any, **kwargs: Any) -> None:
        """Begin a row of the history."""
        list.__getitem__(self.history, -1)["batches"].append({})

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Any, **fit_params: Any
    ) -> None:
        """Run one epoch as skorch does, then count its skipped updates."""
        if iterator is None:
            return
        n_batches, episodes = 0, None
        try:
            for batch in iterator:
                self.notify("on_batch_begin", batch=batch, training=training)
                step = step_fn(batch, **fit_params)
                self.outcomes_.put(self, {f"{prefix}_loss": step["loss"]})
                current_row(self)[f"{prefix}_batch_size"] = len(batch[0])
                if self.outcomes_.wait and self.listeners_.read_losses(self):
                    self.outcomes_.read(self)
                self.notify("on_batch_end", batch=batch, training=training, **step)
                n_batches, episodes = n_batches + 1, batch[0]
        except BaseException:
            self.outcomes_.read(self)
            raise
        self.outcomes_.read(self, episodes if training else None)
        self.history.record(f"{prefix}_batch_count", n_batches)
        if training:
            self.history.record("non_finite", sum(self.history[-1, "batches", :, "non_finite"]))

    def track_best(self) -> None:
        """Remember the best parameters by validation loss, and for how long none were better."""
        self.outer_step_.project(self)  # callbacks may have changed what is kept
        if self.partial:
            return
        loss = self.history[-1].get("valid_loss", math.nan)
        if self.parts_ is not None:
            loss = self.parts_.track(self)
        if loss < self.best_loss_:
            self.best_loss_ = loss
            if self.parts_ is None:
                self.best_state_ = copy.deepcopy(self.module_.state_dict())
            self.best_update_ = self.update_

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Tell the callbacks; afterwards keep the best parameters and stop early."""
        if method_name in ("on_batch_begin", "on_batch_end", "on_grad_computed"):
            methods = self.listeners_.of(self, method_name)
            if methods and method_name == "on_grad_computed":  # a norm counts each of them once
                cb_kwargs["named_parameters"] = list(super().get_all_learnable_params())
            getattr(self, method_name)(self, **cb_kwargs)
            for method in methods:
                method(self, **cb_kwargs)
            return
        super().notify(method_name, **cb_kwargs)
        if method_name == "on_epoch_begin" and self.epoch_hooks is not None:
            self.epoch_hooks.begin_epoch()
        if method_name == "on_epoch_end":
            self.track_best()
            asked = self.epoch_hooks is not None and self.epoch_hooks.end_epoch()
            waited = self.update_ - self.best_update_
            if asked or (self.patience is not None and waited >= self.patience):
                raise StopTraining
            if self.parts_ is not None and self.parts_.is_done(self):
                raise StopTraining
            if self.checkpoint is not None:
                self.checkpoint.end_epoch(self)

    # -- for scoring callbacks -------------------------------------------------------------------

    @property
    def classes_(self) -> np.ndarray:
        """Outputs of the network, as classes."""
        if self.classes is None:
            raise AttributeError("a regression net has no classes")
        return self.classes

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if self.classes is not None:
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags()
        return tags

    def forward_iter(self, X: Any, training: bool = False, device: str = "cpu") -> Iterator[Tensor]:
        """Query outputs of adapted tasks, batch by batch."""
        for batch in self.get_iterator(X, training=training):
            yield self.validation_step(batch)["y_pred"].to(device)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Query outputs (probabilities, of classes) of the episodes of a dataset, pooled."""
        outputs = np.concatenate([to_numpy(out) for out in self.forward_iter(X)])
        return softmax(outputs, axis=1) if self.classes is not None else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Query predictions of the episodes of a dataset, pooled."""
        output = self.predict_proba(X)
        return output if self.classes is None else self.classes[output.argmax(1)]
