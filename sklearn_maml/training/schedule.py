"""When things happen in a fit: its epochs, and the sizes of its steps."""

from __future__ import annotations

import math
from typing import Any

from sklearn_maml.learners.joint import PART_OF_UPDATES, rate_factor

# meta-updates between two lines of the history, validations and early-stopping decisions
UPDATES_PER_EPOCH = 50


def count_epochs(n_updates: int, with_head: bool) -> int:
    """Epochs of a fit, at most; the last update of a Gaussian head ends one."""
    of_head = count_head_updates(n_updates) if with_head else 0
    return sum(-(-n // UPDATES_PER_EPOCH) for n in (of_head, n_updates - of_head))


def count_head_updates(n_updates: int) -> int:
    """Count the updates of a Gaussian head in a fit: whole epochs, if there are enough."""
    n = math.ceil(PART_OF_UPDATES * n_updates)
    return n if n < UPDATES_PER_EPOCH else round(n / UPDATES_PER_EPOCH) * UPDATES_PER_EPOCH


def decay_rate(net: Any) -> None:
    """Lower the rate of a net's optimiser towards the end of the fit."""
    if not net.beta_decay or net.partial:
        return
    done = net.update_ - net.first_update_
    factor = min((1.0 - done / net.max_iter) / net.beta_decay, 1.0)
    for group in net.optimizer_.param_groups:
        of_head = group.get("of_head", False)
        f = rate_factor((done + 1) / count_head_updates(net.max_iter)) if of_head else factor
        group["lr"] = f * group["base_lr"]


def step_size(net: Any) -> float | None:
    """Size of the outer step of a net; None where the optimiser makes it."""
    if net.step_size_at is None:
        return None
    done = 0 if net.partial else net.update_ - net.first_update_
    size = net.step_size_at(done / net.max_iter)
    return None if size is None else net.trust_ * size


def weigh_tasks(net: Any) -> None:
    """Have few tasks move what many have taught in proportion to their number.

    Held-out tasks that judge what is kept make that superfluous.
    """
    n_tasks, before = net.n_tasks or 0, net.most_tasks_
    judged = not net.partial and bool(net.train_split.batches)
    net.trust_ = 1.0 if judged or not n_tasks or not before else min(n_tasks / before, 1.0)
    net.most_tasks_ = max(n_tasks, before)
