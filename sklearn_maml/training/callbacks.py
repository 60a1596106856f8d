"""Callbacks of meta-training: skorch's and its own, and scikit-learn's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from skorch.callbacks import Callback, EpochScoring, LRScheduler, PassthroughScoring, PrintLog
from torch.optim.lr_scheduler import ReduceLROnPlateau


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


class Listeners:
    """Methods of the callbacks of a net that do something; looked up once in an epoch."""

    def __init__(self) -> None:
        self._heard: dict[str, list[Any]] = {}

    def of(self, net: Any, method_name: str) -> list[Any]:
        """Return the methods of this name."""
        if method_name not in self._heard:
            methods = [getattr(callback, method_name) for _, callback in net.callbacks_]
            nothing = getattr(Callback, method_name)
            self._heard[method_name] = [
                method for method in methods if getattr(method, "__func__", None) is not nothing
            ]
        return self._heard[method_name]

    def read_losses(self, net: Any) -> bool:
        """Whether callbacks may read the losses of a batch when it has been run."""
        listeners = (getattr(m, "__self__", None) for m in self.of(net, "on_batch_end"))
        return not all(
            isinstance(c, EpochScoring)
            or (isinstance(c, LRScheduler) and c.policy_ is not ReduceLROnPlateau)
            for c in listeners
        )

    def forget(self) -> None:
        """Look the methods up again."""
        self._heard = {}


@contextlib.contextmanager
def new_schedules(net: Any) -> Iterator[None]:
    """Let schedules of the rate begin with this fit, as `beta_decay` does.

    skorch's begin where the epochs of the history end, which is the wrong place for a schedule
    by update, and with a rate that is that of the beginning.
    """
    begun = [
        callback
        for _, callback in net.callbacks_
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


def raised_by_callback(error: KeyboardInterrupt) -> bool:
    """Whether a callback asked to stop (skorch's way), as opposed to a Ctrl-C."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_name.startswith("on_") and "net" in code.co_varnames


class SklearnCallbacks:
    """Tells scikit-learn's callbacks of the epochs of a meta-training."""

    def __init__(self, estimator: Any, learner: Any, root: Any, data: tuple[Any, ...]) -> None:
        self.estimator = estimator
        self.learner = learner
        X, y, metadata = data
        self.data = {"X": X, "y": y, "metadata": metadata}
        self.root = root  # scikit-learn's context of the whole fit
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
