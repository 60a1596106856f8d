"""Making networks, meta-parameters and engines of the parameters of an estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_maml.data.tasks import TaskCollection
from sklearn_maml.devices import SeededTorch
from sklearn_maml.engine import Engine
from sklearn_maml.estimators.networks import Networks
from sklearn_maml.estimators.parameters import Parameters
from sklearn_maml.heads import SymmetricHead
from sklearn_maml.learners.bodies import ModuleBody
from sklearn_maml.learners.building import (
    build_head,
    kind_of_head,
    module_body,
    why_no_head,
)
from sklearn_maml.learners.compiled import work_of_head
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.learners.learner import Learner, Problem
from sklearn_maml.learners.likelihoods import Likelihood, NewtonLikelihood, find_likelihood
from sklearn_maml.learners.plan import Plan
from sklearn_maml.meta_gradients import resolve_meta_gradient
from sklearn_maml.modules import ACTIVATIONS, adapted_names, layer_sizes
from sklearn_maml.native import instruction_sets
from sklearn_maml.targets.base import Targets
from sklearn_maml.theta import name_in_module
from sklearn_maml.training.sources import LEAST_TASKS

# tasks that the start of a head is computed of, at most: more would tell little
STARTING_TASKS = 1000

# Multiply-adds of an update of the default model up to which it is fitted on the CPU although there
# is a GPU: on an H200 most of an update is launches, whatever the size, and of a head that takes
# Newton steps ten times as many. Beside 16 cores fits took as long at about 1.5e9, and by what
# they grew would beyond 1e10; most machines have fewer. And typical rows of an episode.
MOST_ON_HOST, MOST_OF_NEWTON, ROWS_OF_EPISODE = 1e9, 5e9, 25

TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class Building(Parameters):
    """Makes what is trained, at its start."""

    def _place(self, device: torch.device) -> torch.device:
        """Return where to fit, given where torch can: small heads are faster on the CPU."""
        covered = self.module is None and len(self.feature_shape_) == 1 and instruction_sets()
        rule = self._rule_name()
        if str(self.device) != "auto" or rule not in ("auto", "gaussian-head") or not covered:
            return device
        sizes = [*self.feature_shape_, *layer_sizes(self.hidden_layer_sizes)]
        n_rows = self._integer("meta_batch_size") * ROWS_OF_EPISODE
        work = work_of_head(self._n_members(), sizes, n_rows)
        newton = isinstance(self._likelihood(), NewtonLikelihood)
        most = MOST_OF_NEWTON if newton else MOST_ON_HOST
        return torch.device("cpu") if work <= most else device

    def _new_module(self, targets: Targets) -> nn.Module | None:
        """Return a network like the one to be trained, if the user gave a module."""
        if self.module is None:
            return None
        with SeededTorch(self.device_, 0):
            return self._networks(targets).make()

    def _networks(self, targets: Targets | None = None) -> Networks:
        return Networks(
            module=self.module,
            options=self._prefixed("module"),
            hidden_layer_sizes=self.hidden_layer_sizes,
            activation=self.activation,
            feature_shape=self.feature_shape_,
            reshape=self._reshape,
            targets=self.targets_ if targets is None else targets,
            device=self.device_,
            dtype=TORCH_DTYPES[self._dtype],
        )

    def _check_module(self, module: nn.Module) -> None:
        """Refuse a module that does not go with the tasks, or with the update rule."""
        networks = self._networks()
        networks.check(module)
        self._gradient_rule().check_module(module, self.adapted, networks.two_rows())

    def _make_learner(self, module: nn.Module) -> Any:
        """Meta-parameters at their start: the module's, and those of the update rule."""
        from sklearn_maml.training.learner import MetaLearner

        rule, targets = self._gradient_rule(), self.targets_
        rule.check_loss(targets.loss)
        return MetaLearner(
            module,
            rule,
            adapted_names(module, self.adapted),
            steps=self._n_steps(),
            classification=targets.are_classes,
        )

    def _new_learner(self, weights: dict[str, Tensor]) -> Any:
        """Meta-parameters of the shapes of a fit, for those of a file."""
        with SeededTorch(self.device_, 0):
            learner = self._make_learner(self._networks().make())
            own = self._own_learner()
            if own is not None:
                learner.head = self._build_network(own, None)
            else:
                learner.head = self._head_like(weights)
        if not any(name.startswith(name_in_module("")) for name in weights):
            learner.without_steps()
        return learner

    def _head_like(self, weights: dict[str, Tensor]) -> GaussianHead | None:
        """Gaussian head of the shapes of meta-parameters that have one."""
        prefix = "head."
        of_head = {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}
        if not of_head:
            return None
        likelihood = self._likelihood()
        assert likelihood is not None
        head = kind_of_head(likelihood).like(
            of_head,
            self._head_body(),
            self.targets_.n_outputs,
            activation=ACTIVATIONS[self.activation](),
            likelihood=likelihood,
            same_classes=self.targets_.n_ways is not None,
        )
        return head.to(dtype=TORCH_DTYPES[self._dtype], device=self.device_)

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

    def _why_no_head(self, source: Any) -> str | None:
        """Say what stands in the way of a Gaussian head, if anything does."""
        if source.single:
            return "learns how tasks differ, but got one task"
        if source.of_tasks and source.n_tasks < LEAST_TASKS:
            return f"needs at least {LEAST_TASKS} tasks; got {source.n_tasks}"
        if self._likelihood() is None:
            return f"has no likelihood for the loss {self.targets_.loss.name}"
        if self.targets_.center_y:  # by support rows: an error that it would not know of
            return "learns how the levels of tasks differ itself, but center_y is set"
        if self.module is None:
            return None
        with SeededTorch(self.device_, 0):
            module = self._networks().make()
        self._check_module(module)
        if self._engine_options()["batch_norm"] == "transductive" and any(
            isinstance(m, _BatchNorm) for m in module.modules()
        ):
            return (
                "takes running averages for the module's batch norm, but "
                "engine__batch_norm='transductive' asks for the statistics of query rows"
            )
        return why_no_head(module, self._networks().two_rows())

    def _likelihood(self) -> Likelihood | None:
        """Find what a Gaussian head takes the targets for."""
        targets = self.targets_
        shared = targets.are_classes and targets.n_ways is None
        return find_likelihood(targets.loss, targets.n_outputs if shared else None)

    def _head_body(self) -> ModuleBody | None:
        """Networks of a Gaussian head's members; None: the default ones."""
        if self.module is None:
            return None
        return module_body([self._networks().make() for _ in range(self._n_members())])

    def _make_head(self, plan: Plan) -> GaussianHead:
        tasks, unseen = plan.source.encoded, plan.episodes.unseen
        rows = tasks.leveled(STARTING_TASKS)
        if rows is not None:
            tasks = tasks.take_rows(rows)
            unseen = None if unseen is None else unseen[rows]
        likelihood = self._likelihood()
        assert likelihood is not None
        head = build_head(
            tasks.X,
            tasks.y,
            tasks.codes,
            unseen,
            tasks.weight,
            n_members=self._n_members(),
            body=self._head_body(),
            hidden=self.hidden_layer_sizes,
            activation=self.activation,
            n_outputs=self.targets_.n_outputs,
            likelihood=likelihood,
            same_classes=self.targets_.n_ways is not None,
        )
        return head.to(dtype=TORCH_DTYPES[self._dtype], device=self.device_)

    def _symmetric_head(self, learner: Any) -> SymmetricHead | None:
        """Projection of the meta-parameters in meta-training."""
        return None

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
            **self._engine_options(),
        )
