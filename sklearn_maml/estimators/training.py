"""Meta-training, and what held-out tasks tell about it."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sklearn_maml._compat import CALLBACK_FRAMES, HAS_SKLEARN_CALLBACKS
from sklearn_maml.devices import SeededTorch
from sklearn_maml.engine import Engine, begin_with, has_dropout, is_row_wise
from sklearn_maml.estimators.planning import Planning
from sklearn_maml.exceptions import DroppedLearnerWarning, MemorizationWarning
from sklearn_maml.learners.building import population_range
from sklearn_maml.learners.conditioned import Calibration
from sklearn_maml.learners.judging import choose, held_out_outputs, judge_head, match_frequencies
from sklearn_maml.learners.plan import GRADIENT_STEPS, Plan
from sklearn_maml.learners.shares import LEAST_HELD_OUT
from sklearn_maml.modules import copy_buffers
from sklearn_maml.training.checkpoint import CheckpointedFit
from sklearn_maml.training.distributed import Processes

# A fit is judged by what adapting gains after as many meta-updates, on as many held-out tasks: on
# sinusoids, even at a tenth of the published alpha or of the default beta, the gain is above its
# standard error from there on; see docs/diagnostics.md.
MEMORIZATION_UPDATES, MEMORIZATION_TASKS = 300, 10
# parts of the loss: a gain that is no larger is none, and one that may be, but need not exist, too
NEGLIGIBLE_GAIN, UNPROVEN_GAIN = 0.02, 0.1


class Training(Planning):
    """Runs the outer loop, and lets held-out tasks choose."""

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
        learner, net = self._new_net(plan, seed, continued, checkpoint)
        engine = self._training_engine(learner, plan, continued)
        self._rung = "auto"
        net.engine = engine
        net.joint = engine if plan.with_head else None
        if processes is not None:
            self._compare(processes, source, learner, seed)
            net.engine = processes.share(engine, net)
        self._set_up(net, learner, plan)
        net.train_split = ValidateOn(episodes.validation)
        self._fit_settings = self._settings(learner.module)
        self.n_tasks_ = source.n_tasks
        self.tasks_ = source.ids
        self._fingerprints = source.fingerprints
        self._task_sizes = source.task_sizes
        self.learner_weights_ = plan.weights(0.0)
        if HAS_SKLEARN_CALLBACKS:
            n_epochs = count_epochs(net.max_iter, plan.with_head)
            root = self._init_callback_context(max_subtasks=n_epochs)
            net.epoch_hooks = SklearnCallbacks(self, learner, root, data)
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
            net.checkpoint, checkpoint.draws_random = checkpoint, random
        rank = 0 if processes is None else processes.rank  # other tasks, other random numbers
        with (
            SeededTorch(self.device_, seed + (net.update_ if continued else 0) + rank)
            if random
            else contextlib.nullcontext(),
            processes or contextlib.nullcontext(),
        ):
            net.partial_fit(stream)
            if plan.with_head:
                learner.head.eval()
            else:
                copy_buffers(engine.module, learner.network)
        if HAS_SKLEARN_CALLBACKS:
            net.epoch_hooks.end_fit()
        # a head has learned how far to trust a support set: nothing to be changed then
        judged = not net.interrupted_ and net.update_ >= MEMORIZATION_UPDATES
        if judged and not plan.with_head:
            self._warn_if_memorized(engine, learner, source)
        joint = net.joint
        self._rung = "auto" if plan.engine is None else plan.engine.ladder.remembered("auto")
        # what held the data of this fit is not part of the fitted estimator
        net.engine = net.train_split = net.epoch_hooks = net.checkpoint = net.joint = None
        self.net_ = net
        self.module_ = learner.network
        self._learner = learner
        self.history_ = net.history
        self.n_iter_ = net.update_
        return joint

    def _compare(self, processes: Processes, source: Any, learner: Any, seed: int) -> None:
        """Refuse processes that were given different things."""
        tasks = source.tasks
        processes.compare(
            the_tasks_in_X_y_and_groups=(tasks.X, tasks.y, tasks.codes, tasks.ids),
            the_weights_of_the_rows=source.encoded.weight,
            the_seeds_from_random_state=seed,
            the_parameters_of_the_estimator=self._comparable_params(),
            the_initial_weights_of_the_module=[
                p.detach().cpu().numpy() for p in learner.parameters()
            ],
        )

    def _choose_learners(
        self,
        plan: Plan,
        joint: Any,
        before: dict[str, Any] | None,
        checkpoint: CheckpointedFit | None,
    ) -> None:
        """Decide on held-out tasks which learners predict, and how sure they may be.

        `before` has the fitted attributes of the fit that this one continues: what its tasks have
        shown holds until others show something else.
        """
        self.learner_weights_, self.calibration_ = plan.weights(0.0), None
        if joint is None:
            return
        known = 0.0 if before is None else before["learner_weights_"].get(GRADIENT_STEPS, 0.0)
        decided = None if checkpoint is None else checkpoint.decided
        if decided is None:
            share, calibration = self._judge(plan, joint, before, known)
            if checkpoint is not None:
                checkpoint.decide({"share": share, "calibration": dict(vars(calibration))})
        else:
            share, calibration = decided["share"], Calibration(**decided["calibration"])
        if known > 0 and share == 0:
            warnings.warn(
                f"Gradient steps had a share of {known:.1f} in predictions, and have none after "
                "this continued fit: its held-out tasks did better without them. Fit on old and "
                "new tasks together to keep what the old ones have shown.",
                DroppedLearnerWarning,
                stacklevel=4,
            )
        self.calibration_ = calibration
        self.learner_weights_ = plan.weights(share)
        if self.verbose and plan.with_steps:
            shares = ", ".join(f"{name} {w:.1f}" for name, w in self.learner_weights_.items())
            dict(self.net_.callbacks_)["print_log"].sink(f"Shares of predictions: {shares}")

    def _judge(
        self, plan: Plan, joint: Any, before: dict[str, Any] | None, known: float
    ) -> tuple[float, Calibration]:
        """Share of gradient steps, and how sure predictions may be, by held-out tasks.

        `known` is the share in the fit that this one continues.
        """
        tasks, head = plan.source.encoded, self._learner.head
        meta_params = self._learner.meta_params()
        edges = population_range(tasks.y, head.n_outputs, head.likelihood)
        if before is not None:
            of_before = before["calibration_"]
            edges = np.minimum(edges[0], of_before.low), np.maximum(edges[1], of_before.high)
        with joint.threads(0):
            if before is not None and joint.trainer.n_judges < LEAST_HELD_OUT:
                calibration = dataclasses.replace(of_before, low=edges[0], high=edges[1])
            else:
                shared = plan.episodes.shared_rows
                calibration = judge_head(joint.trainer, meta_params, edges, shared)
                calibration = match_frequencies(head, calibration, tasks)
            share = 0.0 if joint.engine is None else known
            if joint.engine is not None and plan.episodes.validation:
                outputs = held_out_outputs(
                    joint.trainer,
                    self._make_engine(self._learner.module, begin_with(self._rung)),
                    meta_params,
                    [batch.to(self.device_) for batch in plan.episodes.validation],
                    calibration,
                    alpha=self._alpha(),
                    steps=self._n_adapt_steps(),
                )
                share, calibration = choose(
                    outputs, plan.episodes.task_of_episode, calibration, head.likelihood, known
                )
        return share, calibration

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
        if not (gains_nothing(before, after) or gains_nothing(others, after)):
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
            stacklevel=7 + CALLBACK_FRAMES,
        )


def gains_nothing(reference: np.ndarray, after: np.ndarray) -> bool:
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
