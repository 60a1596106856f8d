"""The outer loop: a skorch net whose dataset item is a task and whose batch is a meta-batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.utils import ClassifierTags
from skorch import NeuralNet
from skorch.callbacks import (
    Callback,
    EpochScoring,
    EpochTimer,
    LRScheduler,
    PassthroughScoring,
    PrintLog,
)
from skorch.utils import TeeGenerator, to_numpy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from sklearn_maml.data.episodes import EpisodeBatch, to_device
from sklearn_maml.devices import is_host
from sklearn_maml.engine import rate_key
from sklearn_maml.exceptions import (
    InterruptedFitWarning,
    MetaTrainingError,
    NonFiniteStepWarning,
)
from sklearn_maml.heads import SymmetricHead
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.learners.joint import (
    PART_OF_UPDATES,
    PATIENCE,
    clip_members,
    rate_factor,
)
from sklearn_maml.optimizers import (
    FlatStep,
    begin,
    can_mask,
    has_fused_kernel,
    load_state,
    step_fused,
    step_masked,
    without_compiler,
)
from sklearn_maml.update_rules import UpdateRule

__all__ = [
    "BatchLoader",
    "FixedEpisodes",
    "MetaLearner",
    "MetaNet",
    "SklearnCallbacks",
    "TaskStream",
    "ValidateOn",
    "compare_supports",
    "count_epochs",
    "use_batch",
]

# meta-updates between two lines of the history, validations and early-stopping decisions
UPDATES_PER_EPOCH = 50
# meta-batches drawn at a time, at most (a power of two), and the memory they may take
UPDATES_PER_BLOCK = 64
BLOCK_BYTES = 2**24
# meta-steps seen before a majority of non-finite ones stops the fit
PATIENCE_NON_FINITE = 20


class MetaLearner(nn.Module):
    """The meta-parameters: the user's module as initialisation, and what the rule learns.

    `steps` and `classification` are for the rule, see `UpdateRule.initial_rates`. A Gaussian head
    is trained beside these where `head` is set.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: UpdateRule,
        adapted: list[str],
        *,
        steps: int = 1,
        classification: bool = False,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.head: Any = None
        fast = {name: p.detach() for name, p in module.named_parameters() if name in adapted}
        rates = rule.initial_rates(fast, steps=steps, classification=classification)
        self.rule = nn.ParameterDict({rate_key(n): nn.Parameter(r) for n, r in rates.items()})

    def without_steps(self) -> None:
        """Leave the initialisation out: a Gaussian head alone is to be trained."""
        self.module, self.rule = None, nn.ParameterDict()

    @property
    def network(self) -> nn.Module:
        """The initialisation, or the head where there is none."""
        return self.head if self.module is None else self.module

    def networks(self) -> list[nn.Module]:
        """All that has a forward pass of its own."""
        of_head = [] if self.head is None else [self.head]
        if isinstance(self.head, GaussianHead):
            of_head = list(getattr(self.head.body, "members", []))
        return [*([] if self.module is None else [self.module]), *of_head]

    def meta_params(self) -> dict[str, Tensor]:
        """Return the meta-parameters by name: ``module.*``, ``rule.*``, ``head.*``, frozen too."""
        return {name: p.detach() for name, p in self.named_parameters()}


class TaskStream(torch.utils.data.Dataset):
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
        self.n_updates = UPDATES_PER_EPOCH
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


class FixedEpisodes(torch.utils.data.Dataset):
    """Episodes drawn once, the same at every validation."""

    def __init__(self, batches: list[EpisodeBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, items: list[int]) -> EpisodeBatch:
        return self.batches[items[0]]

    def __getitem__(self, item: int) -> EpisodeBatch:
        return self.batches[item]


class BatchLoader:
    """Batches of a data set in order, as a data loader gives them at a higher price."""

    def __init__(self, dataset: TaskStream | FixedEpisodes) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        data = self.dataset
        return data.n_updates if isinstance(data, TaskStream) else len(data)

    def __iter__(self) -> Iterator[tuple[EpisodeBatch, Tensor]]:
        data = self.dataset
        batches: Iterator[EpisodeBatch]
        if isinstance(data, TaskStream):
            first = data.first_update
            batches = map(data.batch, range(first, first + data.n_updates))
        else:
            batches = iter(data.batches)
        return map(use_batch, batches)


def use_batch(batch: EpisodeBatch) -> tuple[EpisodeBatch, Tensor]:
    """Collate: a skorch batch is (inputs, targets); the targets are the pooled query targets."""
    return batch, batch.query.real(batch.query.y)


class FiniteMean(PassthroughScoring):
    """Epoch mean of the finite batch losses."""

    def get_avg_score(self, history: Any) -> float:
        """Mean over the batches of the last epoch, weighted by their number of tasks."""
        key = "train_batch_size" if self.on_train else "valid_batch_size"
        weights, losses = map(
            np.asarray, zip(*history[-1, "batches", :, [key, self.name]], strict=True)
        )
        finite = np.isfinite(losses)
        if not finite.any():
            return float("nan")
        return float(np.average(losses[finite], weights=weights[finite]))


class EpochLog(PrintLog):
    """Table of the epochs, not laid out where nobody reads it."""

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Print a line of the table."""
        if net.verbose or self.sink is not print:
            super().on_epoch_end(net, **kwargs)


@dataclasses.dataclass
class _Prepared:
    """What the training steps of a net need again and again."""

    params: list[nn.Parameter]
    signature: list[Any]  # what they and the optimiser were when this was made
    meta_params: dict[str, Tensor]
    trainable: dict[str, nn.Parameter]
    needs_closure: bool
    fused: bool
    flat: FlatStep | None
    watched: bool  # whether callbacks may look at gradients
    # whether the host decides if an update is made: it reads its loss, which an accelerator would
    # have to be waited for
    on_host: bool
    # otherwise whether the update at hand is to be made, and 1 where it is to be skipped, else 0
    finite: Tensor | None = None
    bad: Tensor | None = None


def count_epochs(n_updates: int, with_head: bool) -> int:
    """Epochs of a fit, at most; the last update of a Gaussian head ends one."""
    of_head = count_head_updates(n_updates) if with_head else 0
    return sum(-(-n // UPDATES_PER_EPOCH) for n in (of_head, n_updates - of_head))


def count_head_updates(n_updates: int) -> int:
    """Count the updates of a Gaussian head in a fit: whole epochs, if there are enough."""
    n = math.ceil(PART_OF_UPDATES * n_updates)
    return n if n < UPDATES_PER_EPOCH else round(n / UPDATES_PER_EPOCH) * UPDATES_PER_EPOCH


class StopTraining(KeyboardInterrupt):
    """Ends the fit loop from inside; skorch's loop stops on KeyboardInterrupt."""


class MetaNet(NeuralNet):
    """Meta-training as a skorch net.

    Parameters
    ----------
    module : MetaLearner
    engine : Engine
    alpha : float
    steps : int
        Inner steps in meta-training.
    eval_steps : int
        Inner steps in validation.
    max_iter : int
        Meta-updates of one call of `fit`.
    patience : int or None
        Epochs without a better validation loss before the fit stops; None never stops.
    classes : ndarray or None
        What the columns of the outputs stand for if they are logits, for scoring callbacks.
    beta_decay : float
        Fraction of the updates, the last ones, over which the rate falls linearly to 0.
    max_grad_norm : float or None
        Largest norm of a meta-gradient; a larger one is scaled down.
    rows_per_task : int
        Typical number of rows of an episode, to judge how much work a step is.
    symmetric_head : SymmetricHead or None
        Projection of the meta-parameters, made with every meta-update.
    step_size_at : callable progress -> float or None, default=None
        Size of the outer step where the meta-gradient has a schedule of its own; the optimiser
        then does nothing. `progress` is the fraction of `max_iter` that is made.
    epoch_hooks : object with begin_epoch() and end_epoch(), default=None
        Told of the epochs besides the callbacks; a true result of `end_epoch` stops the fit.
    checkpoint : CheckpointedFit or None, default=None
        Where the state of the fit is kept, and taken from.
    joint : Joint or None, default=None
        What `engine` is, or shares among processes, where a Gaussian head is trained.
    **kwargs : dict
        Parameters of `skorch.NeuralNet`.
    """

    def __init__(
        self,
        module: Any,
        *,
        engine: Any = None,
        alpha: float = 0.01,
        steps: int = 1,
        eval_steps: int = 1,
        max_iter: int = 1,
        patience: int | None = None,
        classes: np.ndarray | None = None,
        beta_decay: float = 0.0,
        max_grad_norm: float | None = None,
        rows_per_task: int = 1,
        symmetric_head: SymmetricHead | None = None,
        step_size_at: Callable[[float], float | None] | None = None,
        epoch_hooks: Any = None,
        checkpoint: Any = None,
        joint: Any = None,
        criterion: Any = nn.Identity,
        **kwargs: Any,
    ) -> None:
        self.engine = engine
        self.joint = joint
        self.alpha = alpha
        self.steps = steps
        self.eval_steps = eval_steps
        self.max_iter = max_iter
        self.patience = patience
        self.classes = classes
        self.beta_decay = beta_decay
        self.max_grad_norm = max_grad_norm
        self.rows_per_task = rows_per_task
        self.symmetric_head = symmetric_head
        self.step_size_at = step_size_at
        self.epoch_hooks = epoch_hooks
        self.checkpoint = checkpoint
        super().__init__(module, criterion=criterion, **kwargs)

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
        self._prepared: _Prepared | None = None
        self._heard: dict[str, list[Any]] = {}
        self._loaders: dict[str, Any] = {}
        self._is_host = is_host(self.device)
        # whether the optimiser has the state that a step leaves to the next
        self._has_stepped = self._is_host
        # rows of the history, and what is to be read from the device for them
        self._unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        # of the generators of data loaders before an interruption
        self.loader_states_: dict[str, Tensor] = {}
        return self

    def continue_from(self, net: MetaNet) -> None:
        """Take over history, counter and optimiser state of an earlier net (warm start)."""
        self.initialize()
        self.history_ = copy.deepcopy(net.history)
        self.update_ = net.update_
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

    # -- steps -----------------------------------------------------------------------------------

    def _signature(self, params: list[nn.Parameter]) -> list[Any]:
        return [len(self.optimizer_.state), *((p.data_ptr(), p.requires_grad) for p in params)]

    def _prepare(self) -> _Prepared:
        """Look the parameters up, unless nothing has happened to them since the last time."""
        ready = self._prepared
        if ready is not None and ready.signature == self._signature(ready.params):
            return ready
        named = dict(self.module_.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        for p in named.values():
            p.grad = None  # the optimiser is to leave alone what a callback has frozen
        params, moving = list(named.values()), list(trainable.values())
        flat = None if ready is None else ready.flat
        if flat is not None and not flat.holds(self.optimizer_, moving):
            flat.release()
            flat = None
        own_step = self._step_size() is not None
        fused = has_fused_kernel(self.optimizer_)
        if fused and not own_step and not self._is_host and not self.optimizer_.state:
            for p in moving:
                p.grad = torch.zeros_like(p)
            begin(self.optimizer_)
            for p in moving:
                p.grad = None
        if flat is None and not own_step and FlatStep.can_make(self.optimizer_, moving):
            flat = FlatStep(self.optimizer_, moving)
        # only optimisers of others may evaluate the closure themselves
        needs_closure = not type(self.optimizer_).__module__.startswith("torch.optim.")
        listened = any(self._listeners(name) for name in ("on_grad_computed", "on_batch_begin"))
        watched = listened or bool(self._listeners("on_batch_end"))
        # what schedules rates and what scores epochs looks at no batch
        looked_at = listened or self._is_read()
        maskable = (
            own_step
            or fused
            or (self._has_stepped and can_mask(self.optimizer_, torch.device(self.device)))
        )
        self._prepared = _Prepared(
            params=params,
            signature=self._signature(params),
            meta_params=self.module_.meta_params(),
            trainable=trainable,
            needs_closure=needs_closure,
            fused=fused,
            flat=flat,
            watched=watched,
            on_host=self._is_host or needs_closure or looked_at or not maskable,
        )
        return self._prepared

    def _release(self) -> None:
        """Forget what was prepared."""
        if self._prepared is not None and self._prepared.flat is not None:
            self._prepared.flat.release()
        self._prepared, self._heard, self._loaders = None, {}, {}

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Make one meta-update."""
        step = self._update(batch, **fit_params)
        self._project()
        return step

    def _project(self) -> None:
        if self.symmetric_head is not None:
            self.symmetric_head.project(self._prepare().trainable)

    def _update(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        ready = self._prepare()
        size = self._step_size()
        step: dict[str, Any]
        if size is not None:
            step = self.train_step_single(batch, **fit_params)
            self._notify_grad(batch)
            with torch.no_grad():
                for name, p in self.module_.named_parameters():
                    if p.grad is not None and not name.startswith("head."):
                        grad = p.grad
                        if ready.finite is not None:
                            grad = torch.where(ready.finite, grad, 0.0)
                        p.add_(grad, alpha=-size)
                        p.grad = None
            if self.joint is not None:
                self.optimizer_.step()
            return step
        if ready.needs_closure:
            step = super().train_step(batch, **fit_params)
            return step
        if ready.flat is None:
            step = self.train_step_single(batch, **fit_params)
            self._notify_grad(batch)
            if ready.fused:
                step_fused(self.optimizer_, ready.bad)
            elif ready.finite is not None:
                step_masked(self.optimizer_, ready.finite)
            else:
                self.optimizer_.step()
            # a skipped step leaves no state
            if not self._has_stepped and any(p.grad is not None for p in ready.trainable.values()):
                self._has_stepped, ready.signature = True, []
            return step
        step, grads = self._meta_gradient(batch, ready)
        grad = None if grads is None else grads[0]
        if ready.watched:
            ready.flat.show(grad)
            self._notify_grad(batch)
            changed = None if grad is None else ready.flat.seen(grad)
            if changed is None:
                self._release()
                if ready.bad is None:
                    self.optimizer_.step()
                else:
                    step_fused(self.optimizer_, ready.bad)
            grad = changed
        if grad is not None:
            ready.flat.step(grad, ready.bad)
        return step

    def _notify_grad(self, batch: Any) -> None:
        if self._listeners("on_grad_computed"):
            self.notify(
                "on_grad_computed",
                named_parameters=TeeGenerator(self.get_all_learnable_params()),
                batch=batch,
                training=True,
            )

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Compute the meta-gradient of one meta-batch and store it for the optimiser."""
        ready = self._prepare()
        step, grads = self._meta_gradient(batch, ready)
        for k, p in enumerate(ready.trainable.values()):
            # the optimiser leaves parameters without a gradient, and their state, as they are
            grad = None if grads is None else grads[k]
            if grad is not None and grad.stride() != p.stride():
                grad = torch.empty_like(p).copy_(grad)  # as the fused kernels take it to be
            p.grad = grad
        return step

    def _meta_gradient(
        self, batch: Any, ready: _Prepared
    ) -> tuple[dict[str, Any], list[Tensor] | None]:
        """Loss and outputs of a meta-batch, and its gradients unless they are not finite.

        The gradients are those of the trainable parameters, or one vector for `FlatStep`. Where
        the host does not decide, they are returned in any case, and `ready.finite` says whether
        they are.
        """
        episodes, device = batch[0], torch.device(self.device)
        if episodes.query.X.device != device:
            episodes = episodes.to(device)
        step = self.engine.meta_step(
            ready.meta_params, episodes, alpha=self.alpha, steps=self.steps
        )
        if self.joint is not None:
            return self._joint_gradient(step, episodes, ready)
        loss = step.losses.mean()
        if self.symmetric_head is not None:
            in_one_piece = getattr(step, "flat", None) is not None
            self.symmetric_head.project_gradient(step.grads, in_place=in_one_piece)
        grads = [step.grads[name] for name in ready.trainable]
        # an engine may offer its gradients in one piece too, in the order of `grads`
        whole = getattr(step, "flat", None)
        if whole is not None and list(step.grads) != list(ready.trainable):
            whole = None
        if whole is None and ready.flat is not None:
            whole = torch.cat([grad.flatten() for grad in grads])
        if whole is not None:
            length = torch.linalg.vector_norm(whole)
        else:
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        pieces = grads if whole is None else [whole]
        gradient: list[Tensor] | None = pieces if ready.flat is not None else grads
        self._decay_rate()
        self.update_ += 1
        if ready.on_host:
            norm = length.item()
            made = math.isfinite(loss.item()) and math.isfinite(norm)
            if made and self.max_grad_norm is not None and norm > self.max_grad_norm:
                torch._foreach_mul_(pieces, self.max_grad_norm / norm)
            self._row()["non_finite"] = int(not made)
            if not made:
                self._note_non_finite(episodes, self.update_)
                loss, gradient = torch.full_like(loss, math.nan), None
        else:
            ready.finite = finite = torch.isfinite(loss) & torch.isfinite(length)
            ready.bad = 1.0 - finite.float()
            if self.max_grad_norm is not None:
                torch._foreach_mul_(pieces, (self.max_grad_norm / length).clamp(max=1.0))
            loss = torch.where(finite, loss, math.nan)
        return {"loss": loss, "y_pred": episodes.query.real(step.outputs)}, gradient

    def _joint_gradient(
        self, step: Any, episodes: EpisodeBatch, ready: _Prepared
    ) -> tuple[dict[str, Any], list[Tensor] | None]:
        """Bound the gradient of the steps, and of each member of the head, on its own."""
        of_head = {n: g for n, g in step.grads.items() if n.startswith("head.")}
        grads = {**step.grads, **(clip_members(of_head) if of_head else {})}
        own = [n for n in ready.trainable if not n.startswith("head.")]
        finite: Tensor | None = None
        if own and self.joint.engine is not None:
            if self.symmetric_head is not None:
                self.symmetric_head.project_gradient(grads, in_place=False)
            norm = torch.linalg.vector_norm(
                torch.stack(torch._foreach_norm([grads[n] for n in own]))
            )
            finite = torch.isfinite(norm)
            factor = torch.ones_like(norm)
            if self.max_grad_norm is not None:
                factor = (self.max_grad_norm / norm).clamp(max=1.0)
            grads.update({n: torch.where(finite, factor * grads[n], 0.0) for n in own})
        self._decay_rate()
        rate = next(g["lr"] for g in self.optimizer_.param_groups if g.get("of_head"))
        self.joint.shrink(ready.meta_params, rate)
        self.update_ += 1
        if not ready.on_host:
            skipped = step.losses.new_zeros(()) if finite is None else (~finite).to(step.losses)
            self._unread.append((self._row(), {"non_finite": skipped}))
        else:
            self._row()["non_finite"] = int(finite is not None and not bool(finite))
            if self._row()["non_finite"]:
                self._note_non_finite(episodes, self.update_)
        outcome = {"loss": step.losses.mean(), "y_pred": episodes.query.real(step.outputs)}
        listed = [grads[name] for name in ready.trainable]
        if ready.flat is not None:
            return outcome, [torch.cat([g.flatten() for g in listed])]
        return outcome, listed

    def _row(self) -> dict[str, Any]:
        """History of the batch at hand; `History`'s own indexing copies the list of epochs."""
        row: dict[str, Any] = list.__getitem__(self.history, -1)["batches"][-1]
        return row

    def _decay_rate(self) -> None:
        """Lower the rate of the optimiser towards the end of the fit."""
        if not self.beta_decay:
            return
        done = self.update_ - self.first_update_
        factor = min((1.0 - done / self.max_iter) / self.beta_decay, 1.0)
        for group in self.optimizer_.param_groups:
            of_head = group.get("of_head", False)
            f = rate_factor((done + 1) / self._updates_of_head) if of_head else factor
            group["lr"] = f * group["base_lr"]

    def _step_size(self) -> float | None:
        """Size of the outer step; None where the optimiser makes it."""
        if self.step_size_at is None:
            return None
        return self.step_size_at((self.update_ - self.first_update_) / self.max_iter)

    def validation_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Query loss of held-out tasks, before and after adaptation."""
        episodes = batch[0].to(torch.device(self.device))
        params = self.module_.meta_params()
        joint = self.joint
        row: dict[str, Tensor] = {}
        if joint is None or joint.engine is not None:
            before, _ = self.engine.evaluate(params, episodes, alpha=self.alpha, steps=0)
            losses, output = self.engine.evaluate(
                params, episodes, alpha=self.alpha, steps=self.eval_steps
            )
        if joint is not None:
            if joint.engine is not None:
                row["steps_valid_loss"] = losses.mean()
                row["steps_valid_loss_before"] = before.mean()
                of_steps = losses
            before, losses, output = joint.trainer.errors(params, episodes)
            if joint.engine is not None:
                joint.compare(losses, of_steps)
        row["valid_loss_before"] = before.mean()
        if self._is_host:
            self._row().update({name: value.item() for name, value in row.items()})
        else:
            self._unread.append((self._row(), row))
        return {"loss": losses.mean(), "y_pred": episodes.query.real(output)}

    def _read(self, episodes: EpisodeBatch | None = None) -> None:
        """Read what the device has for the history, and count the updates that were skipped.

        `episodes` is a batch to look at where too many were.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([v.detach() for _, own in unread for v in own.values()])
        numbers = iter(values.tolist())
        for row, own in unread:
            row.update({name: next(numbers) for name in own})
        of_head = self.joint is not None  # which goes on where steps are skipped
        rows = [
            row
            for row, own in unread
            if "train_loss" in own and (of_head or "non_finite" not in row)
        ]
        for row in rows:
            row["non_finite"] = int(row.get("non_finite", math.isnan(row["train_loss"])))
        for update, row in enumerate(rows, self.update_ - len(rows) + 1):
            if row["non_finite"] and episodes is not None:
                self._note_non_finite(episodes, update)
            elif row["non_finite"]:  # the fit has been interrupted
                self.non_finite_ += 1

    def _note_non_finite(self, episodes: EpisodeBatch, update: int) -> None:
        self.non_finite_ += 1
        if self.non_finite_ == 1:
            warnings.warn(
                f"The loss or meta-gradient of update {update} was not finite; the update "
                "was skipped. Skipped updates are counted in history_ ('non_finite').",
                NonFiniteStepWarning,
                stacklevel=2,
            )
        seen = update - self.first_update_
        if seen >= PATIENCE_NON_FINITE and 2 * self.non_finite_ > seen:
            if self.joint is None:
                raise self._non_finite_error(episodes, seen)
            warnings.warn(
                f"{self.non_finite_} of {seen} meta-steps of the gradient steps were not finite, "
                f"so they are given up: tasks are learned in closed form alone. Lower alpha (now "
                f"{self.alpha:g}) or scale the features to give them a chance.",
                NonFiniteStepWarning,
                stacklevel=2,
            )
            self.give_up_steps()

    def _non_finite_error(self, episodes: EpisodeBatch, seen: int) -> MetaTrainingError:
        before, _ = self.engine.evaluate(
            self.module_.meta_params(), episodes, alpha=self.alpha, steps=0
        )
        if torch.isfinite(before).all():
            advice = (
                "The loss is finite before adaptation, so the inner steps diverge: lower "
                f"alpha (now {self.alpha:g}) or scale the features."
            )
        else:
            advice = (
                "The loss is not finite before adaptation either, so the initialisation has "
                f"diverged: lower beta (now {self.lr:g})."
            )
        return MetaTrainingError(
            f"{self.non_finite_} of {seen} meta-steps were not finite. {advice}"
        )

    def _is_done(self) -> bool:
        """Whether head and steps are trained."""
        done = self.update_ - self.first_update_
        best = self.best_of_parts_
        start_is_best = "start" in best and best["head"] == best["start"]
        most = self._updates_of_head * (PATIENCE if start_is_best else 1.0)
        if not self.joint.head_is_done and done >= most:
            self._end_head()
        return done >= self.max_iter or (self.joint.head_is_done and self.joint.engine is None)

    def give_up_steps(self) -> None:
        """Train the Gaussian head alone from now on."""
        self.joint.engine = None
        self.non_finite_ = 0
        for name, p in self.module_.named_parameters():
            if not name.startswith("head.") and p.requires_grad:
                p.requires_grad_(False)
                self._given_up.append(p)

    # -- the loop --------------------------------------------------------------------------------

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None, **fit_params: Any) -> Any:
        """Run `max_iter` meta-updates and keep the best parameters."""
        if not self.initialized_:
            self.initialize()
        self.first_update_ = self.update_
        self.non_finite_ = 0
        self.best_loss_ = math.inf
        # with a Gaussian head: of gradient steps, and of each member
        self.best_of_parts_: dict[str, Any] = {}
        self._given_up: list[nn.Parameter] = []
        self.best_state_: dict[str, Tensor] | None = None
        self.epochs_without_gain_ = 0
        self.interrupted_ = False
        if self.checkpoint is not None and self.checkpoint.is_complete:
            self.checkpoint.take_result(self)
            return self
        for group in self.optimizer_.param_groups:
            group["base_lr"] = group["lr"]
        with self._new_schedules():
            self.notify("on_train_begin", X=X, y=y)
        self._project()
        if self.checkpoint is not None:
            self.checkpoint.begin(self)
        if self.joint is not None and self.update_ == self.first_update_:
            loss = self.joint.held_out(self.module_.meta_params())
            if math.isfinite(loss):  # the start may be the best
                self.best_of_parts_ = {"head": loss, "start": loss}
                self._keep("head", self.module_.state_dict())
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
                self.fit_loop(X, y, epochs=count_epochs(left, self.joint is not None))
        except StopTraining:
            pass
        except KeyboardInterrupt as error:
            if not _raised_by_callback(error):
                self._interrupted()
        finally:
            self.engine.finish()
        if self.beta_decay:
            for group in self.optimizer_.param_groups:
                group["lr"] = group["base_lr"]
        done = self.update_ - self.first_update_
        if 2 * self.non_finite_ > done:
            episodes = next(iter(self.get_iterator(X, training=True)))[0]
            raise self._non_finite_error(episodes.to(torch.device(self.device)), done)
        if self.best_state_ is not None:
            self.module_.load_state_dict(self.best_state_)
        for p in self._given_up:
            p.requires_grad_(True)
        self.best_state_ = None
        self._release()
        self.notify("on_train_end", X=X, y=y)
        if self.checkpoint is not None and not self.interrupted_:
            self.checkpoint.end(self)
        return self

    @contextlib.contextmanager
    def _new_schedules(self) -> Iterator[None]:
        """Let schedules of the rate begin with this fit, as `beta_decay` does.

        skorch's begin where the epochs of the history end, which is the wrong place for a schedule
        by update, and with a rate that is that of the beginning.
        """
        begun = [
            callback
            for _, callback in self.callbacks_
            if isinstance(callback, LRScheduler)
            and "last_epoch" not in vars(callback)
            and callback.policy_ is not ReduceLROnPlateau  # which has no such parameter
        ]
        for callback in begun:
            callback.last_epoch = -1
        try:
            yield
        finally:
            for callback in begun:
                del callback.last_epoch

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
        self._heard = {}
        if self._prepared is not None:
            self._prepared.signature = []
        dataset_train.first_update = self.update_
        done = self.update_ - self.first_update_
        left = self.max_iter - done
        if self.joint is not None and not self.joint.head_is_done:  # its last update ends an epoch
            left = max(min(left, self._updates_of_head - done), 1)
        dataset_train.n_updates = min(UPDATES_PER_EPOCH, left)
        if not self._is_host:
            self._prepare()  # it waits for the device, which updates are not to do

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        """Make a data loader that leaves torch's global generator alone, or a lighter one."""
        kind = "train" if training else "valid"
        settings = self.get_params_for(f"iterator_{kind}").keys()
        plain = getattr(self, f"iterator_{kind}") is DataLoader
        ours = isinstance(dataset, (TaskStream, FixedEpisodes))
        if ours and plain and settings <= {"collate_fn", "batch_size"}:
            if not self._is_host:
                self._place(dataset)
            return BatchLoader(dataset)
        iterator = super().get_iterator(dataset, training=training)
        if getattr(iterator, "generator", True) is None:
            iterator.generator = torch.Generator().manual_seed(0)
            if getattr(iterator.sampler, "generator", True) is None:
                iterator.sampler.generator = iterator.generator
        if kind in self.loader_states_:
            iterator.generator.set_state(self.loader_states_.pop(kind))
        if self.checkpoint is not None:
            self._loaders[kind] = iterator
        return iterator

    def _place(self, dataset: TaskStream | FixedEpisodes) -> None:
        """Draw episodes on the device, or move those that are drawn once."""
        device = torch.device(self.device)
        if isinstance(dataset, TaskStream):
            dataset.device = device
            dataset.prepare = self.engine.preparation(self.steps)
        else:
            dataset.batches = to_device(dataset.batches, device)

    def loader_states(self) -> dict[str, Tensor]:
        """Return the states of the generators of the data loaders, for a checkpoint."""
        generators = {k: getattr(loader, "generator", None) for k, loader in self._loaders.items()}
        return {k: g.get_state() for k, g in generators.items() if g is not None}

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
                row = self._row()
                if self._is_host:
                    row[f"{prefix}_loss"] = step["loss"].item()
                else:
                    self._unread.append((row, {f"{prefix}_loss": step["loss"]}))
                row[f"{prefix}_batch_size"] = len(batch[0])
                if self._unread and self._is_read():
                    self._read()
                self.notify("on_batch_end", batch=batch, training=training, **step)
                n_batches, episodes = n_batches + 1, batch[0]
        except BaseException:
            self._read()
            raise
        self._read(episodes if training else None)
        self.history.record(f"{prefix}_batch_count", n_batches)
        if training:
            self.history.record("non_finite", sum(self.history[-1, "batches", :, "non_finite"]))

    def track_best(self) -> None:
        """Remember the best parameters by validation loss, and for how long none were better."""
        self._project()  # callbacks may have changed what is kept
        loss = self.history[-1].get("valid_loss", math.nan)
        if self.joint is not None:
            loss = self._track_parts()
        if loss < self.best_loss_:
            self.best_loss_ = loss
            if self.joint is None:
                self.best_state_ = copy.deepcopy(self.module_.state_dict())
            self.epochs_without_gain_ = 0
        else:
            self.epochs_without_gain_ += 1

    def _track_parts(self) -> float:
        """Remember the best parameters of head and steps apart; return what may yet improve."""
        row, best = self.history[-1], self.best_of_parts_
        losses = {"steps": float(row.get("steps_valid_loss", math.nan)), "head": math.nan}
        if self.joint.engine is None:
            losses["steps"] = math.nan
        if not self.joint.head_is_done:
            losses["head"] = self.joint.held_out(self.module_.meta_params())
        state = self.module_.state_dict()
        for part, loss in losses.items():
            if loss < best.get(part, math.inf):
                best[part] = loss
                self._keep(part, state)
        if self.joint.fall_behind():
            self.give_up_steps()
        return min((loss for loss in losses.values() if math.isfinite(loss)), default=math.nan)

    def _keep(self, part: str, state: dict[str, Tensor]) -> None:
        """Keep the parameters of a part."""
        if self.best_state_ is None:
            self.best_state_ = copy.deepcopy(state)
        for name, value in state.items():
            if name.startswith("head.") == (part == "head"):
                self.best_state_[name] = value.clone()

    def _end_head(self) -> None:
        """End the training of the head, and all of it where there is nothing else."""
        self.joint.head_is_done = True
        for name, p in self.module_.named_parameters():
            if name.startswith("head.") and p.requires_grad:
                p.requires_grad_(False)
                self._given_up.append(p)

    @property
    def _updates_of_head(self) -> int:
        return count_head_updates(self.max_iter)

    def _listeners(self, method_name: str) -> list[Any]:
        """Methods of the callbacks that do something; looked up once in an epoch."""
        if method_name not in self._heard:
            methods = [getattr(callback, method_name) for _, callback in self.callbacks_]
            nothing = getattr(Callback, method_name)
            self._heard[method_name] = [
                method for method in methods if getattr(method, "__func__", None) is not nothing
            ]
        return self._heard[method_name]

    def _is_read(self) -> bool:
        """Whether callbacks may read the losses of a batch when it has been run."""
        listeners = (getattr(m, "__self__", None) for m in self._listeners("on_batch_end"))
        return not all(
            isinstance(c, EpochScoring)
            or (isinstance(c, LRScheduler) and c.policy_ is not ReduceLROnPlateau)
            for c in listeners
        )

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Tell the callbacks; afterwards keep the best parameters and stop early."""
        if method_name in ("on_batch_begin", "on_batch_end", "on_grad_computed"):
            getattr(self, method_name)(self, **cb_kwargs)
            for method in self._listeners(method_name):
                method(self, **cb_kwargs)
            return
        super().notify(method_name, **cb_kwargs)
        if method_name == "on_epoch_begin" and self.epoch_hooks is not None:
            self.epoch_hooks.begin_epoch()
        if method_name == "on_epoch_end":
            self.track_best()
            asked = self.epoch_hooks is not None and self.epoch_hooks.end_epoch()
            if asked or (self.patience is not None and self.epochs_without_gain_ >= self.patience):
                raise StopTraining
            if self.joint is not None and self._is_done():
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


def _raised_by_callback(error: KeyboardInterrupt) -> bool:
    """Whether a callback asked to stop (skorch's way), as opposed to a Ctrl-C."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_name.startswith("on_") and "net" in code.co_varnames


def compare_supports(
    engine: Any,
    meta_params: dict[str, Tensor],
    batches: list[EpisodeBatch],
    *,
    alpha: float,
    steps: int,
) -> np.ndarray:
    """Query losses of episodes before adaptation, after it, and after that to another's support.

    Returns
    -------
    losses : ndarray of shape (3, n_episodes)
        Neighbours in a batch, whose support sets are exchanged, are taken to be other tasks.
    """
    losses = []
    for batch in batches:
        others = batch.support.take(np.roll(np.arange(len(batch)), 1))
        runs = [(batch, 0), (batch, steps), (EpisodeBatch(others, batch.query), steps)]
        losses.append(
            [
                engine.evaluate(meta_params, episodes, alpha=alpha, steps=n)[0].cpu().numpy()
                for episodes, n in runs
            ]
        )
    return np.concatenate(losses, axis=1)


class ValidateOn:
    """skorch's train split: the stream of tasks, and the validation episodes if there are any."""

    def __init__(self, batches: list[EpisodeBatch] | None) -> None:
        self.batches = batches

    def __call__(self, stream: Any, y: Any = None, **fit_params: Any) -> tuple[Any, Any]:
        """Return the training stream and the validation dataset."""
        return stream, None if self.batches is None else FixedEpisodes(self.batches)


class SklearnCallbacks:
    """Tells scikit-learn's callbacks of the epochs of a meta-training."""

    def __init__(self, estimator: Any, learner: Any, n_epochs: int, data: tuple[Any, ...]) -> None:
        self.estimator = estimator
        self.learner = learner
        X, y, metadata = data
        self.data = {"X": X, "y": y, "metadata": metadata}
        self.root = estimator._init_callback_context(max_subtasks=n_epochs)
        self.root.call_on_fit_task_begin(estimator=estimator, **self.data)
        self.epoch: Any = None

    def _so_far(self) -> dict[str, Any]:
        """Attributes of the estimator as if the fit had stopped here."""
        learner = copy.deepcopy(self.learner)
        return {"module_": learner.module, "_learner": learner}

    def begin_epoch(self) -> None:
        """Announce an epoch."""
        self.epoch = self.root.subcontext(task_name="epoch")
        self.epoch.call_on_fit_task_begin(
            estimator=self.estimator, **self.data, reconstruction_attributes=self._so_far
        )

    def end_epoch(self) -> bool:
        """Report an epoch; return whether a callback asks to stop."""
        return bool(
            self.epoch.call_on_fit_task_end(
                estimator=self.estimator, **self.data, reconstruction_attributes=self._so_far
            )
        )

    def end_fit(self) -> None:
        """Report the end of meta-training."""
        self.root.call_on_fit_task_end(
            estimator=self.estimator, **self.data, reconstruction_attributes=self._so_far
        )
