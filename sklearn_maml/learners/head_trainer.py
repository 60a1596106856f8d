"""Meta-training of a Gaussian head: meta-steps of its members, and their held-out tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch, Rows, normalised, totals
from sklearn_maml.engine import MetaStep
from sklearn_maml.learners.compiled import head_kernel
from sklearn_maml.learners.gaussian import GaussianHead, HeadFunctions
from sklearn_maml.learners.launched import LaunchedSteps
from sklearn_maml.native.head import HeadKernel
from sklearn_maml.theta import Params

PREFIX = "head."
MAX_GRAD_NORM = 1.0  # of each member


class HeldOut(NamedTuple):
    """Episodes of tasks that a member has not seen; None: no member has.

    Attributes
    ----------
    member : int or None
    episodes : EpisodeBatch
    task : int ndarray
        Task of each episode.
    """

    member: int | None
    episodes: EpisodeBatch
    task: np.ndarray


class HeadTrainer:
    """Meta-steps of a Gaussian head.

    Parameters
    ----------
    head : GaussianHead
    unseen : uint8 ndarray of shape (n_rows,) or None
        Bit j says that member j does not learn from a row of the collection. The tasks of these
        rows are its held-out ones.
    validation : list of HeldOut
    weighted : bool, default=False
        Whether the weights of rows are more than padding.
    n_ways : int, default=None
        Classes of the episodes of meta-training, where these are not one for each output.

    Attributes
    ----------
    n_held_out : int
        Tasks that are held out, each counted once for each member.
    n_judges : int
        Those of the first member, which are not in the training of gradient steps either.
    launched : LaunchedSteps
        Makes the steps of an accelerator.
    """

    def __init__(
        self,
        head: GaussianHead,
        unseen: np.ndarray | None,
        validation: Sequence[HeldOut],
        weighted: bool = False,
        n_ways: int | None = None,
    ) -> None:
        self.head = head
        self.weighted = weighted
        device = head.factor.device
        self._classes = torch.arange(max(head.n_outputs, n_ways or 0), device=device)
        self.n_ways = n_ways or head.n_outputs
        self.unseen: Tensor | None = None
        if unseen is not None:
            self.unseen = torch.from_numpy(unseen).to(device)
            self._bits = torch.tensor(
                [1 << j for j in range(head.n_members)], dtype=torch.uint8, device=device
            )
        self.validation = [
            HeldOut(held.member, held.episodes.to(device), held.task) for held in validation
        ]
        # where the errors of the episodes go: to their member and task
        keys = [(-1 if held.member is None else held.member, held.task) for held in validation]
        stride = 1 + max((int(task.max()) for _, task in keys), default=0)
        places = [(member + 1) * stride + task for member, task in keys]
        distinct = np.unique(np.concatenate(places)) if places else np.arange(0)
        self.n_held_out = len(distinct)
        judges = [held.task for held in validation if held.member in (None, 0)]
        self.n_judges = len(np.unique(np.concatenate(judges))) if judges else 0
        self._kernels: dict[int, HeadKernel | None] = {}
        self.launched = LaunchedSteps(head, weighted)
        self._places = [torch.from_numpy(np.searchsorted(distinct, p)).to(device) for p in places]

    def functions(self, meta_params: Params, member: int | None = None) -> HeadFunctions:
        """Functions of these meta-parameters, of all members or of one, in float32."""
        of_head = _of_head(meta_params, member)
        return self.head.functions({name: p.float() for name, p in of_head.items()})

    def meta_step(self, meta_params: Params, batch: EpisodeBatch) -> MetaStep:
        """Errors of the query rows, and the gradient of the members' negative log likelihood.

        That of a member is the sum over the tasks that it may see, over the number of all tasks.
        """
        k = batch.support.X.shape[1] if batch.n_given is None else batch.n_given
        if not self.head.training:
            self.head.train()
        kernel = self._kernel(batch, self.n_ways)
        if kernel is None:
            of_head = {n: p for n, p in meta_params.items() if n.startswith(PREFIX)}
            return self.launched.meta_step(self._step, of_head, batch)
        weights = [self._present(rows) for rows in (batch.support, batch.query)]
        of_tasks = self._of_tasks(batch, k)
        found, mean = kernel.step(_of_head(meta_params), batch, weights, self.unseen, k, of_tasks)
        grads = {f"{PREFIX}{name}": grad for name, grad in found.items()}
        return self._meta_step(grads, mean, batch.query)

    def _kernel(self, batch: EpisodeBatch, n_ways: int) -> HeadKernel | None:
        """Return what computes for episodes of so many classes, or None where torch has to."""
        if n_ways not in self._kernels:
            self._kernels[n_ways] = head_kernel(self.head, n_ways)
        kernel = self._kernels[n_ways]
        return kernel if kernel is not None and kernel.takes(batch) else None

    def _step(self, of_head: Params, batch: EpisodeBatch) -> MetaStep:
        """Make a meta-step by torch."""
        k = batch.support.X.shape[1] if batch.n_given is None else batch.n_given
        leaves = {name: p.detach().requires_grad_() for name, p in of_head.items()}
        with torch.enable_grad():
            support, query = batch.support, batch.query
            X = torch.cat([support.X, query.X], 1)
            y = torch.cat([self._targets(rows, self.n_ways) for rows in (support, query)], 1)
            mask = _joined(self._mask(support), self._mask(query), X)
            nll, mean = self.functions(leaves).loss(X, y, mask, k)
            loss = (nll * self._of_tasks(batch, k)).sum()
            grads = torch.autograd.grad(
                loss, [*leaves.values()], allow_unused=True, materialize_grads=True
            )
        of_query = mean.detach()[:, :, -batch.query.X.shape[1] :]
        return self._meta_step(dict(zip(leaves, grads, strict=True)), of_query, batch.query)

    def _of_tasks(self, batch: EpisodeBatch, k: int) -> Tensor:
        """Weights (n_tasks,) of the tasks in the loss."""
        n_rows = batch.support.X.shape[1] + batch.query.X.shape[1] - k
        even = batch.query.X.new_full((len(batch),), 1 / (len(batch) * n_rows), dtype=torch.float32)
        if self.weighted and batch.query.weight is not None:  # what the tasks count
            return even * totals(batch.query.weight)
        return even

    @torch.no_grad()
    def evaluate(self, meta_params: Params, batch: EpisodeBatch) -> MetaStep:
        """Errors and outputs of the query rows, as of `meta_step`, without a gradient.

        Those of the first member alone: all others cost as much, and tell no more of what is no
        longer trained.
        """
        self.head.eval()
        return self._meta_step({}, self._mean(meta_params, batch, 0, trains=True), batch.query)

    def _mean(
        self,
        meta_params: Params,
        batch: EpisodeBatch,
        member: int | None,
        trains: bool = False,
    ) -> Tensor:
        """Return outputs (n_members, n_tasks, n_query, n_outputs) of query rows.

        They are those of all members, or of one. In training, the first is given the rows alone
        that it may see.
        """
        n_ways = self.n_ways if trains else self.head.n_outputs
        kernel = self._kernel(batch, n_ways)
        present = self._present(batch.support)
        if kernel is None:
            mask = self._mask(batch.support) if trains else present
            mask = mask if mask is None or not trains else mask[:1]
            return self._run(self.functions(meta_params, member), batch, mask, n_ways)[0]
        # outputs of all query rows are asked for
        asked = dataclasses.replace(batch, query=dataclasses.replace(batch.query, index=None))
        unseen = self.unseen if trains else None
        k = batch.support.X.shape[1]
        return kernel.step(_of_head(meta_params, member), asked, [present, None], unseen, k)[1]

    def _meta_step(self, grads: Params, mean: Tensor, query: Rows) -> MetaStep:
        """Put errors and outputs of the query rows beside gradients."""
        y = self._targets(query, self.n_ways)
        errors = self.head.likelihood.error_rows(mean, y).mean(0, keepdim=True)
        losses = (errors * self._of_rows(query, mean)).sum(-1)[0]
        return MetaStep(losses, grads, mean.mean(0).to(query.X))

    def _run(
        self,
        run: HeadFunctions,
        batch: EpisodeBatch,
        mask: Tensor | None,
        n_ways: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Any]:
        support, query = (self._targets(rows, n_ways) for rows in (batch.support, batch.query))
        root = None if mask is None else mask.to(support.dtype).sqrt()
        are_numbers = not self.head.likelihood.are_classes
        given = run.condition(batch.support.X, support, root, doubt=are_numbers)
        mean, variance = run.query(batch.query.X, given)
        return mean, variance, query, given

    def _targets(self, rows: Rows, n_ways: int | None = None) -> Tensor:
        classes = self._classes[: self.head.n_outputs if n_ways is None else n_ways]
        return self.head.likelihood.targets(rows.y, classes)

    def _mask(self, rows: Rows) -> Tensor | None:
        """Weights (n_members or 1, n_tasks, n_rows) of the rows that the members may see."""
        present = self._present(rows)
        if self.unseen is None or rows.index is None:
            return present
        unseen = self.unseen.index_select(0, rows.index.flatten()).view(rows.index.shape)
        seen = (unseen & self._bits[:, None, None]) == 0
        return seen if present is None else seen * present

    def _present(self, rows: Rows) -> Tensor | None:
        """Weights (1, n_tasks, n_rows) that are 1 on average, 0 for padding; None: no padding."""
        if rows.weight is None or not self.weighted:
            return None if rows.weight is None else (rows.weight > 0).unsqueeze(0)
        return (normalised(rows.weight) * _counts(rows).unsqueeze(1)).unsqueeze(0)

    def _of_rows(self, rows: Rows, like: Tensor) -> Tensor:
        """Weights (1, n_tasks, n_rows) of query rows in the loss of their task."""
        if self.weighted and rows.weight is not None:
            return rows.weight.to(like.dtype).unsqueeze(0)
        if rows.weight is None:
            return like.new_full((1, *like.shape[1:3]), 1 / like.shape[2])
        weight = (rows.weight > 0).to(like.dtype).unsqueeze(0)
        return weight / weight.sum(-1, keepdim=True).clamp_min(1)

    def weights(self, rows: Rows) -> np.ndarray | None:
        """Weights of real query rows, 1 on average over all tasks; None: all are equal."""
        if not self.weighted or rows.weight is None:
            return None
        weight = rows.real(rows.weight * _counts(rows).unsqueeze(1))
        return weight.double().cpu().numpy()

    # -- held-out tasks --------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_errors(self, meta_params: Params) -> Tensor:
        """Error of each member on each task that it holds out (n_held_out,).

        That is a task's root mean squared error, or cross-entropy: the likelihood would let few
        tasks with large deviations choose for all.
        """
        total, count = torch.zeros(2, self.n_held_out, device=self.head.factor.device)
        self.head.eval()
        for (member, batch, _), place in zip(self.validation, self._places, strict=True):
            mean, y = self._mean(meta_params, batch, member), self._targets(batch.query)
            weight = self._of_rows(batch.query, mean)
            of_task = totals(weight) if self.weighted else None
            if of_task is not None:
                weight = normalised(weight)
            errors = self.head.likelihood.held_out_errors(mean, y, weight)
            if of_task is not None:
                errors = errors * of_task
            total.index_add_(0, place, errors.mean(0).to(total))
            count.index_add_(0, place, torch.ones_like(errors[0]).to(total))
        return total / count

    @torch.no_grad()
    def outputs(
        self, meta_params: Params, member: int | None, batch: EpisodeBatch
    ) -> tuple[Tensor, Tensor]:
        """Return outputs (n_tasks, n_query, n_outputs) of a member, or the first, and targets."""
        self.head.eval()
        run = self.functions(meta_params, member or 0)
        mean, _, y, _ = self._run(run, batch, self._present(batch.support))
        return mean[0], y

    @torch.no_grad()
    def trust(self, meta_params: Params, support: Rows) -> Tensor | None:
        """Return what support sets alone make members count; see `HeadFunctions`."""
        self.head.eval()
        run, y, mask = self.functions(meta_params), self._targets(support), self._present(support)
        root = None if mask is None else mask.to(y.dtype).sqrt()
        return run.trust(run.condition(support.X, y, root, doubt=False))

    @torch.no_grad()
    def predictive(
        self, meta_params: Params, batch: EpisodeBatch
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Return outputs of all members, variances of targets, targets, misfits, and trust.

        The first two are (n_members, n_tasks, n_query, n_outputs); for the misfits, of support
        sets (n_members, n_tasks, n_outputs), see `HeadFunctions.misfit` and `moved`, and for what
        members count, of the same shape, `Conditioned`; None: they count the same.
        """
        self.head.eval()
        run = self.functions(meta_params)
        mean, variance, y, given = self._run(run, batch, self._present(batch.support))
        assert variance is not None
        differs = self.head.likelihood.noise_differs
        misfits = (*run.misfit(given), *run.moved(given)) if differs else None
        return mean, variance.expand_as(mean), y, misfits, run.trust(given)

    @torch.no_grad()
    def errors(self, meta_params: Params, batch: EpisodeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Errors (n_tasks,) of the first member before and after adapting, and its outputs."""
        self.head.eval()
        mean, y = self._mean(meta_params, batch, 0), self._targets(batch.query)
        if self.head.same_classes:  # no class is likelier than others
            before = torch.zeros_like(mean)
        else:
            nothing = dataclasses.replace(batch, support=batch.support.first(0))
            before = self._mean(meta_params, nothing, 0)
        weight = self._of_rows(batch.query, mean)
        both = [
            (self.head.likelihood.error_rows(values, y) * weight).sum(-1)[0]
            for values in (before, mean)
        ]
        return both[0], both[1], mean[0].to(batch.query.X)


def _joined(support: Tensor | None, query: Tensor | None, X: Tensor) -> Tensor | None:
    """Masks of both sets side by side; None where there are none."""
    if support is None and query is None:
        return None
    n_tasks, n_rows = X.shape[:2]
    k = n_rows - query.shape[-1] if query is not None else support.shape[-1]  # type: ignore[union-attr]
    full = X.new_ones(1, n_tasks, n_rows, dtype=torch.bool)
    support = full[..., :k] if support is None else support
    query = full[..., k:] if query is None else query
    members = max(len(support), len(query))
    return torch.cat([support.expand(members, -1, -1), query.expand(members, -1, -1)], -1)


def _of_head(meta_params: Params, member: int | None = None) -> Params:
    """Parameters of the head, of all members or of one."""
    found = {n[len(PREFIX) :]: p for n, p in meta_params.items() if n.startswith(PREFIX)}
    if member is None:
        return found
    # those of modules of users are named by their member, of which there is then one
    return {
        n: p if n.startswith("body.members.") else p[member : member + 1] for n, p in found.items()
    }


def _counts(rows: Rows) -> Tensor:
    """Numbers (n_tasks,) of real rows, as floats."""
    if rows.lengths is None:
        return rows.X.new_full((len(rows),), rows.X.shape[1])
    return torch.as_tensor(rows.lengths, dtype=rows.X.dtype, device=rows.X.device)


def clip_members(grads: Params) -> Params:
    """Scale the gradient of each member down to `MAX_GRAD_NORM`; to 0 where it is not finite."""
    own = {n: g for n, g in grads.items() if n.startswith(f"{PREFIX}body.members.")}
    stacked = {n: g for n, g in grads.items() if n not in own}
    norm = torch.linalg.vector_norm(torch.cat([g.flatten(1) for g in stacked.values()], 1), dim=1)
    if own:
        of_own = torch._foreach_norm([*own.values()])
        norm = torch.linalg.vector_norm(torch.stack([norm[0], *of_own]))[None]
    factor = (MAX_GRAD_NORM / norm).clamp_max(1.0).nan_to_num(0.0, 0.0, 0.0)
    parts = {n: factor.view(-1, *[1] * (g.ndim - 1)) for n, g in stacked.items()}
    parts.update(dict.fromkeys(own, factor[0]))
    scaled = torch._foreach_mul([*grads.values()], [parts[n].to(g.dtype) for n, g in grads.items()])
    made = dict(zip(grads, scaled, strict=True))
    if factor.is_cpu and bool((factor > 0).all()):
        return made
    return {n: torch.where(parts[n] > 0, g, torch.zeros_like(g)) for n, g in made.items()}
