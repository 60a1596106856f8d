"""What comes of the updates: rows of the history, and updates that were not finite."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from sklearn_maml.data.episodes import EpisodeBatch
from sklearn_maml.exceptions import MetaTrainingError, NonFiniteStepWarning

# epochs of the history that are kept of earlier calls of partial_fit
MOST_EPOCHS = 1000
# meta-steps seen before a majority of non-finite ones stops the fit
PATIENCE_NON_FINITE = 20


def shortened(history: Any) -> Any:
    """Last epochs of a history, without their batches: it is bounded however many calls add to."""
    return type(history)([{**row, "batches": []} for row in list(history)[-MOST_EPOCHS:]])


def current_row(net: Any) -> dict[str, Any]:
    """History of the batch at hand; `History`'s own indexing copies the list of epochs."""
    return list.__getitem__(net.history, -1)["batches"][-1]


class Outcomes:
    """Puts values into the history of a net: those of a device later, not to wait for it.

    Parameters
    ----------
    on_host : bool
        Whether values can be read at once.
    """

    def __init__(self, on_host: bool) -> None:
        self.on_host = on_host
        # rows of the history, and what is to be read from the device for them
        self._unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    @property
    def wait(self) -> bool:
        """Whether there are values to read."""
        return bool(self._unread)

    def put(self, net: Any, values: dict[str, Tensor]) -> None:
        """Put values into the row of the batch at hand."""
        if self.on_host:
            current_row(net).update({name: value.item() for name, value in values.items()})
        else:
            self.put_later(net, values)

    def put_later(self, net: Any, values: dict[str, Tensor]) -> None:
        """Put values into the row of the batch at hand when they are read."""
        self._unread.append((current_row(net), values))

    def read(self, net: Any, episodes: EpisodeBatch | None = None) -> None:
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
        of_head = net.joint is not None  # which goes on where steps are skipped
        rows = [
            row
            for row, own in unread
            if "train_loss" in own and (of_head or "non_finite" not in row)
        ]
        for row in rows:
            row["non_finite"] = int(row.get("non_finite", math.isnan(row["train_loss"])))
        for update, row in enumerate(rows, net.update_ - len(rows) + 1):
            if row["non_finite"] and episodes is not None:
                note_non_finite(net, episodes, update)
            elif row["non_finite"]:  # the fit has been interrupted
                net.non_finite_ += 1


def note_non_finite(net: Any, episodes: EpisodeBatch, update: int) -> None:
    """Count an update that was skipped; where too many were, end the fit or the gradient steps."""
    net.non_finite_ += 1
    if net.non_finite_ == 1:
        warnings.warn(
            f"The loss or meta-gradient of update {update} was not finite; the update "
            "was skipped. Skipped updates are counted in history_ ('non_finite').",
            NonFiniteStepWarning,
            stacklevel=2,
        )
    seen = update - net.first_update_
    if seen >= PATIENCE_NON_FINITE and 2 * net.non_finite_ > seen:
        if net.parts_ is None:
            raise non_finite_error(net, episodes, seen)
        warnings.warn(
            f"{net.non_finite_} of {seen} meta-steps of the gradient steps were not finite, "
            f"so they are given up: tasks are learned in closed form alone. Lower alpha (now "
            f"{net.alpha:g}) or scale the features to give them a chance.",
            NonFiniteStepWarning,
            stacklevel=2,
        )
        net.parts_.give_up_steps(net)


def non_finite_error(net: Any, episodes: EpisodeBatch, seen: int) -> MetaTrainingError:
    """Return the error of a fit most of whose steps were not finite."""
    before, _ = net.engine.evaluate(net.module_.meta_params(), episodes, alpha=net.alpha, steps=0)
    if torch.isfinite(before).all():
        advice = (
            "The loss is finite before adaptation, so the inner steps diverge: lower "
            f"alpha (now {net.alpha:g}) or scale the features."
        )
    else:
        advice = (
            "The loss is not finite before adaptation either, so the initialisation has "
            f"diverged: lower beta (now {net.lr:g})."
        )
    return MetaTrainingError(f"{net.non_finite_} of {seen} meta-steps were not finite. {advice}")
