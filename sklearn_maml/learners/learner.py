"""Ways to learn a task that users add: a network, and outputs of query rows given a support set."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.func import functional_call

from sklearn_maml.data.episodes import EpisodeBatch, Rows, pad_rows
from sklearn_maml.engine import MetaStep, MetaSteps
from sklearn_maml.learners.base import Adapted, Support, padded, refuse_unknown
from sklearn_maml.learners.gradient import Running
from sklearn_maml.learners.plain import PlainLearner
from sklearn_maml.theta import Params

RowLoss = Callable[[Tensor, Tensor], Tensor]
PREFIX = "head."


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a learner is to be made for.

    Attributes
    ----------
    X : ndarray of shape (n_rows, *feature_shape)
        Rows of the tasks of meta-training, or of some of them.
    y : ndarray of shape (n_rows, n_outputs) or int ndarray of shape (n_rows,)
        Targets as the losses take them: standardised, or positions of classes.
    n_outputs : int
        Targets, or classes of an episode.
    classification : bool
    """

    X: np.ndarray
    y: np.ndarray
    n_outputs: int
    classification: bool


class Learner(BaseEstimator, ABC):
    """A way to learn a task, for `update_rule`: a network that is meta-trained, and its use.

    A subclass has two methods. The outer loop trains the parameters of what `build` makes, so that
    `outputs` of query rows, given a support set, are near their targets. Its own parameters belong
    into `__init__`, as in scikit-learn; they are searched as ``update_rule__name``.

    See Also
    --------
    sklearn_maml.learners.gaussian.GaussianHead : The library's own.
    """

    @abstractmethod
    def build(self, problem: Problem) -> nn.Module:
        """Make the network whose parameters are meta-learned."""

    @abstractmethod
    def outputs(self, network: nn.Module, support: Rows, query: Rows) -> Tensor:
        """Return outputs of query rows given support sets.

        Parameters
        ----------
        network : Module
            What `build` made. It is called in the parameters at hand.
        support, query : Rows
            `X` is of shape (n_tasks, n_rows, ...), `y` (n_tasks, n_rows, n_outputs) or, of
            classes, (n_tasks, n_rows). `weight` (n_tasks, n_rows) is 0 for padding, or None where
            there is none; all weights of a task without support rows are 0. The targets of `query`
            are not to be used.

        Returns
        -------
        outputs : Tensor of shape (n_tasks, n_query, n_outputs)
            In the units of the losses: standardised targets, or logits.
        """

    def loss(
        self, network: nn.Module, support: Rows, query: Rows, row_loss: RowLoss
    ) -> tuple[Tensor, Tensor]:
        """Return losses (n_tasks,) that meta-training lowers, and `outputs`."""
        outputs = self.outputs(network, support, query)
        losses = row_loss(outputs, query.y)
        if query.weight is None:
            return losses.mean(1), outputs
        return (losses * query.weight).sum(1), outputs

    def std(self, network: nn.Module, support: Rows, query: Rows) -> Tensor:
        """Return standard deviations of the targets, of the shape of `outputs`."""
        raise NotImplementedError

    def refuses(self, problem: Problem) -> str | None:
        """Say why it cannot be, in words that follow its name; None if it can."""
        return None


class LearnerEngine(MetaSteps):
    """Meta-steps of a `Learner` for the outer loop."""

    def __init__(self, learner: Learner, network: nn.Module, row_loss: RowLoss) -> None:
        self.learner = learner
        self.module = copy.deepcopy(network, {id(p): p for p in network.parameters()})
        self.row_loss = row_loss

    def _run(self, params: Params, batch: EpisodeBatch, support: Rows) -> tuple[Tensor, Tensor]:
        own = {n[len(PREFIX) :]: p for n, p in params.items() if n.startswith(PREFIX)}
        holder = _Holder(self.module, self.learner.loss)
        return functional_call(
            holder,
            {f"network.{n}": p for n, p in own.items()},
            (support, batch.query, self.row_loss),
        )

    def meta_step(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> MetaStep:
        """See `MetaSteps`; it takes no steps."""
        self.module.train()
        leaves = {name: p.detach().requires_grad_() for name, p in meta_params.items()}
        with torch.enable_grad():
            losses, outputs = self._run(leaves, batch, batch.support)
            grads = torch.autograd.grad(
                losses.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return MetaStep(losses.detach(), dict(zip(leaves, grads, strict=True)), outputs.detach())

    @torch.no_grad()
    def evaluate(
        self, meta_params: Params, batch: EpisodeBatch, *, alpha: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """See `MetaSteps`; 0 steps are support sets without weight."""
        self.module.eval()
        support = batch.support if steps else _without_weight(batch.support)
        return self._run(meta_params, batch, support)


class _Holder(nn.Module):
    """Calls a method of a learner with its network, whose parameters `functional_call` gives."""

    def __init__(self, network: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, *args: Any) -> Any:
        return self.method(self.network, *args)


def _rows_of(given: Support, which: np.ndarray, counts: np.ndarray) -> Rows:
    weight = None if given.weight is None else given.weight[which]
    return pad_rows(given.X, given.y, which, counts, weight)


def _without_weight(rows: Rows) -> Rows:
    return dataclasses.replace(rows, weight=rows.X.new_zeros(rows.X.shape[:2]))


class AdaptedBySupport(Adapted):
    """Tasks of a `Learner`: their support sets, and the network.

    Parameters
    ----------
    learner : Learner
    network : Module
    support : Support
    known : bool, default=True
        Whether the support sets count; otherwise tasks are as before adaptation.
    """

    def __init__(
        self, learner: Learner, network: nn.Module, support: Support, known: bool = True
    ) -> None:
        self.learner = learner
        self.network = network
        self.support = support
        self.known = known

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.support.n_tasks

    def outputs(self, rows: np.ndarray, codes: np.ndarray, how: Running) -> np.ndarray:
        """See `Adapted`."""
        return self._each(self.learner.outputs, rows, codes, how)

    def std(
        self, rows: np.ndarray, codes: np.ndarray, how: Running
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Adapted`."""
        if type(self.learner).std is Learner.std:
            return super().std(rows, codes, how)
        return self.outputs(rows, codes, how), self._each(self.learner.std, rows, codes, how)

    @torch.no_grad()
    def _each(
        self, function: Callable[..., Tensor], rows: np.ndarray, codes: np.ndarray, how: Running
    ) -> np.ndarray:
        """Call a method of the learner for some tasks at a time."""
        given = self.support
        order = np.argsort(given.codes, kind="stable")
        sizes = np.bincount(given.codes, minlength=given.n_tasks)
        ends = np.cumsum(sizes)
        # a copy: threads may predict with one network at a time
        network = copy.deepcopy(self.network, {id(p): p for p in self.network.parameters()}).eval()
        asked, position = np.unique(codes, return_inverse=True)
        result: np.ndarray | None = None
        for tasks, place, present in padded(position.reshape(-1), len(asked), sizes[asked]):
            counts = sizes[asked[tasks]]
            own = np.concatenate([order[ends[j] - sizes[j] : ends[j]] for j in asked[tasks]])
            support = _rows_of(given, own, counts).to(how.device)
            if not self.known:
                support = _without_weight(support)
            no_targets = np.zeros(len(rows), dtype=given.y.dtype)
            query = pad_rows(rows, no_targets, place[present], present.sum(1)).to(how.device)
            values = query.real(function(network, support, query)).cpu().numpy()
            if result is None:
                result = np.empty((len(rows), values.shape[1]), dtype=values.dtype)
            result[place[present]] = values
        assert result is not None
        return result

    def extended(self, more: Support) -> AdaptedBySupport:
        """See `Adapted`."""
        if not self.known:
            refuse_unknown()
        return AdaptedBySupport(self.learner, self.network, self.support.followed_by(more))

    def module(self, task: int, how: Running) -> PlainLearner:
        """See `Adapted`."""
        given = self.support
        own = np.flatnonzero(given.codes == task)
        support = _rows_of(given, own, np.array([len(own)])).to(how.device)
        if not self.known:
            support = _without_weight(support)
        return PlainLearner(self.network, self.learner.outputs, support)

    def state(self) -> dict[str, Any]:
        """See `Adapted`."""
        return {"kind": "support", "support": dict(vars(self.support)), "known": self.known}
