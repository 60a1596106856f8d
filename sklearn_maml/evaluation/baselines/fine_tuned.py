"""A network that is trained on all tasks and fine-tuned to each of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.data.episodes import Rows
from sklearn_maml.evaluation.baselines.base import (
    Baseline,
    Episode,
    Predicted,
    TrainingTasks,
    for_shots,
)
from sklearn_maml.evaluation.baselines.stacked import (
    losses,
    score,
    stack,
    support_and_query,
    unstack,
)


class FineTunedMLP(Baseline):
    """A network trained on the rows of all tasks, then on the support rows of each.

    Plain gradient steps on all parameters, of a rate and a number chosen on validation tasks:
    what a meta-learned initialisation is to be better than. Tasks on whose support rows they raise
    the loss keep the network as it was trained.
    """

    HIDDEN = 64
    RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
    STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
    BATCH, BETA, MAX_UPDATES, CHECK_EVERY, PATIENCE = 256, 2e-3, 5000, 100, 10

    def fit(self, train: TrainingTasks) -> Any:
        """Train until validation tasks gain no more, then choose the rate and the steps."""
        super().fit(train)
        rest, validation = train.validation()
        rng = np.random.RandomState(train.seed)
        generator = torch.Generator().manual_seed(train.seed)
        sizes = [train.X.shape[1], self.HIDDEN, self.HIDDEN, train.n_classes or 1]
        params = []
        for n_in, n_out in itertools.pairwise(sizes):
            bound = n_in**-0.5
            for shape in ((n_in, n_out), (1, n_out)):
                value = torch.rand(shape, generator=generator) * 2 * bound - bound
                params.append(value.requires_grad_())
        held = np.setdiff1d(np.arange(len(train.y)), rest)
        target = train.y.astype(np.int64 if train.n_classes else np.float64)
        unseen = stack([train.X[held]], [target[held]], np.float32)
        rows = stack([train.X[rest]], [target[rest]], np.float32)
        optimizer = torch.optim.Adam(params, lr=self.BETA)
        best, since, kept = np.inf, 0, [p.detach().clone() for p in params]
        for update in range(self.MAX_UPDATES):
            batch = torch.as_tensor(rng.randint(len(rest), size=self.BATCH))
            part = Rows(rows.X[:, batch], rows.y[:, batch])
            loss = losses(_forward(params, part.X), part).sum()
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = gradient
            optimizer.step()
            if (update + 1) % self.CHECK_EVERY == 0:
                with torch.no_grad():
                    loss_now = float(losses(_forward(params, unseen.X), unseen).sum())
                since += 1
                if loss_now < best:
                    best, since, kept = loss_now, 0, [p.detach().clone() for p in params]
                if since >= self.PATIENCE:
                    break
        self.params_ = kept
        self.chosen_ = {k: self._choose(episodes) for k, episodes in validation.items()}
        return self

    def _choose(self, episodes: Sequence[Episode]) -> tuple[float, int]:
        """Rate and steps with the least mean loss of the query rows."""
        support, query = support_and_query(episodes, np.float32)
        best: tuple[float, float, int] = (np.inf, 0.0, 0)
        for rate in self.RATES:
            for step, params in enumerate(self._path(support, rate, max(self.STEPS))):
                if step not in self.STEPS:
                    continue
                with torch.no_grad():
                    loss = score(_forward(params, query.X), query)
                if not np.isfinite(loss):
                    break
                best = min(best, (loss, rate, step))
        return best[1], best[2]

    def _path(self, support: Rows, rate: float, steps: int) -> Any:
        """Yield the parameters of each task after 0, 1, ... steps."""
        params = [p.expand(len(support.X), *p.shape).clone() for p in self.params_]
        yield params
        for _ in range(steps):
            params = [p.requires_grad_() for p in params]
            loss = losses(_forward(params, support.X), support).sum()
            gradients = torch.autograd.grad(loss, params)
            params = [(p - rate * g).detach() for p, g in zip(params, gradients, strict=True)]
            yield params

    def predict(self, episodes: Sequence[Episode], k: int) -> list[Predicted]:
        """Predict with the parameters after fine-tuning."""
        rate, steps = for_shots(self.chosen_, k)
        support, query = support_and_query(episodes, np.float32)
        first, *others = self._path(support, rate, steps)
        last = others[-1] if others else first
        with torch.no_grad():
            before, after = (losses(_forward(p, support.X), support) for p in (first, last))
            learned = (after <= before)[:, None, None]  # steps may diverge, to NaN
            params = [q.where(learned, p) for p, q in zip(first, last, strict=True)]
            return unstack(_forward(params, query.X), episodes, self.n_classes)


def _forward(params: Sequence[Tensor], X: Tensor) -> Tensor:
    for layer in range(0, len(params), 2):
        X = X @ params[layer] + params[layer + 1]
        X = X.relu() if layer + 2 < len(params) else X
    return X
