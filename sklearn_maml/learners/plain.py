"""What was learned of one task as a module of its own, for other runtimes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_maml.data.episodes import Rows
from sklearn_maml.learners.gaussian import GaussianHead
from sklearn_maml.learners.laplace import LaplaceFunctions


def column(outputs: Tensor) -> Tensor:
    """Return outputs as (n_rows, n_outputs), those of modules that return (n_rows,) too."""
    return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs


class PlainHead(nn.Module):
    """A Gaussian head that was conditioned on one support set; see `Conditioned`.

    Parameters
    ----------
    head : GaussianHead
    shift : Tensor of shape (n_members, n_columns, n_outputs)
        Mean of w.
    low, high : Tensor of shape (n_outputs,)
        Predictions end there.
    factor : float
        Of the logits.
    trust : Tensor of shape (n_members, 1, n_outputs)
        What members count.
    root : Tensor of shape (n_members, n_outputs, n_columns, n_columns), optional
        Root of the covariance of w, where outputs depend on it.
    offset : ndarray of shape (n_outputs,), optional
        Added to the logits.
    """

    shift: Tensor
    low: Tensor
    high: Tensor
    trust: Tensor
    root: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        head: GaussianHead,
        shift: Tensor,
        low: Tensor,
        high: Tensor,
        factor: float,
        trust: Tensor,
        root: Tensor | None = None,
        offset: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        head = copy.deepcopy(head).eval()
        if head.body.of_user:
            for name, p in list(head.named_parameters(recurse=False)):
                setattr(head, name, nn.Parameter(p.detach().double()))
        else:
            head.double()
        self.head = head
        self.factor = factor
        for name, values in {"shift": shift, "low": low, "high": high, "trust": trust}.items():
            self.register_buffer(name, values.double().clone())
        self.register_buffer("root", None if root is None else root.double().clone())
        self.register_buffer("offset", None if offset is None else torch.tensor(offset))

    def forward(self, x: Tensor) -> Tensor:
        """Return means of targets, or logarithms of probabilities."""
        run = self.head.functions(dict(self.head.named_parameters()))
        if self.root is not None:
            assert isinstance(run, LaplaceFunctions)
            mean = run.plain(x, self.shift, self.root, self.trust)
        else:
            prior, S = run.columns(x)
            outputs = run.amplitude() * (prior + S @ self.shift)
            mean = self.head.likelihood.average(outputs, self.trust)
        found = self.head.likelihood.predicted(mean, self.factor, self.low, self.high)
        return found if self.offset is None else (found + self.offset).log_softmax(-1)


class PlainMixture(nn.Module):
    """Head and gradient steps together; see `Mixed`.

    Parameters
    ----------
    head : PlainHead
    steps : Module
    share : float
        Of the steps.
    scales : (float, float) or None
        Factors of the logits of the steps and of the mixture; None: outputs are no logits.
    """

    def __init__(
        self, head: PlainHead, steps: nn.Module, share: float, scales: tuple[float, float] | None
    ) -> None:
        super().__init__()
        self.head, self.steps = head, steps
        self.share = share
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of the mixture."""
        head = self.head(x)
        steps = column(self.steps(x)).to(head.dtype)
        if self.scales is None:
            steps = torch.minimum(torch.maximum(steps, self.head.low), self.head.high)
            return (1 - self.share) * head + self.share * steps
        of_steps, of_mixture = self.scales
        steps = (of_steps * steps).log_softmax(-1)
        parts = [head + math.log1p(-self.share), steps + math.log(self.share)]
        return (of_mixture * torch.stack(parts).logsumexp(0)).log_softmax(-1)


class PlainLearner(nn.Module):
    """A learner's network with one support set.

    Parameters
    ----------
    network : Module
    outputs : callable (network, support, query) -> Tensor
        As of `Learner`.
    support : Rows
        Of one task.
    """

    X: Tensor
    y: Tensor
    weight: Tensor | None

    def __init__(self, network: nn.Module, outputs: Callable[..., Any], support: Rows) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.outputs_of = outputs
        self.register_buffer("X", support.X)
        self.register_buffer("y", support.y)
        self.register_buffer("weight", support.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs given the support set."""
        support = Rows(self.X, self.y, self.weight)
        query = Rows(x[None], self.y.new_zeros(1, x.shape[0], *self.y.shape[2:]), None)
        result: Tensor = self.outputs_of(self.network, support, query)
        return result.squeeze(0)


class PlainModel(nn.Module):
    """Maps rows of features to predictions of one task, in evaluation and without gradients.

    Parameters
    ----------
    outputs : Module
        Maps rows to outputs in the units of the losses.
    decode : Module
        Maps these to predictions.
    flat : bool
        Whether rows are flattened first.
    dtype : torch.dtype
        Of rows and predictions.
    """

    zero: Tensor

    def __init__(
        self, outputs: nn.Module, decode: nn.Module, *, flat: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.outputs, self.decode = outputs, decode
        self.flat = flat
        self.register_buffer("zero", torch.zeros((), dtype=dtype))  # `float` changes its dtype
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions of rows (n_rows, *feature_shape)."""
        x = x.to(self.zero.dtype)
        outputs = column(self.outputs(x.flatten(1) if self.flat else x))
        return self.decode(outputs.to(x.dtype))
