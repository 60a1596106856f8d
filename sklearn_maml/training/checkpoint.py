"""Checkpoints: a meta-training that was killed goes on to the parameters it would have had."""

from __future__ import annotations

import numbers
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from sklearn_maml.devices import generator_states, is_host, set_generator_states
from sklearn_maml.exceptions import FileFormatError
from sklearn_maml.storage import Decoder, Encoder, digest_of, read_tree, write_tree
from sklearn_maml.training.optimizers import load_state, without_compiler

# counters of a net that a fit goes on from
COUNTERS = (
    "update_",
    "first_update_",
    "non_finite_",
    "best_loss_",
    "best_update_",
    "interrupted_",
    "most_tasks_",
)
# parameters that the numbers of a fit do not depend on, and the seed, which is compared itself
UNCOMPARED = ("callbacks", "device", "random_state", "verbose", "warm_start")


class Checkpoint(BaseEstimator):
    """Keeps the state of a meta-training in a file, so that it can go on after it was killed.

    Put into `callbacks`, it writes the file at the end of an epoch (50 meta-updates) if the last
    time was `every` seconds ago. The same `fit` in a new process, from the same script, finds the
    file and goes on from there to the very parameters that it would have had without the
    interruption, bit for bit on the same machine.

    Parameters
    ----------
    path : str or path-like
        File, in a folder that exists.
    every : float, default=60.0
        Seconds between two writes, at least; 0 writes after every epoch. What is learned does not
        depend on it.

    See Also
    --------
    MAMLRegressor.save : Save a fitted model.

    Notes
    -----
    After the fit the file has its result and is marked complete: the same fit then takes the
    result from it at once, and another fit writes a new file in its place. A file of an unfinished
    fit of other parameters or data is never overwritten: `fit` raises a ValueError that names what
    differs. With ``random_state=None`` an unfinished fit goes on with the seed it had; a complete
    one is not taken up.

    A file has all that a fit goes on from: parameters of module and update rule, the state of the
    optimiser, the best parameters on held-out tasks, the history, and the random numbers of torch
    where the module draws any. Of skorch's callbacks it has the schedules of `LRScheduler` and the
    attributes whose names end in an underscore; a callback of your own with other state has
    ``state_dict()`` and ``load_state_dict(state)``, of numbers, strings, arrays and tensors. It is
    the file that `MAMLRegressor.save` writes in its format: no pickle, with a digest, replaced in
    one go. Fits in a `torch.distributed` process group cannot be checkpointed.

    Examples
    --------
    >>> import os, tempfile
    >>> from sklearn_maml import Checkpoint, MAMLRegressor
    >>> from sklearn_maml.datasets import make_sinusoid_tasks
    >>> X, y, task = make_sinusoid_tasks(n_tasks=20, random_state=0)
    >>> path = os.path.join(tempfile.mkdtemp(), "fit.safetensors")
    >>> reg = MAMLRegressor(max_iter=10, random_state=0, callbacks=[Checkpoint(path)])
    >>> reg = reg.fit(X, y, groups=task)  # killed, and run again: goes on
    >>> os.path.exists(path)
    True
    """

    def __init__(self, path: Any, every: float = 60.0) -> None:
        self.path = path
        self.every = every


def begin_checkpointed(
    callbacks: Any, processes: Any, describe: Callable[..., Any]
) -> CheckpointedFit | None:
    """Return what reads and writes the checkpoints of a fit; None without a `Checkpoint`.

    `describe` is for parameters that are no plain data: `other` of `Encoder`.
    """
    found = []
    for item in callbacks or []:
        callback = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else item
        if callback is Checkpoint:
            raise ValueError(
                "callbacks have the class Checkpoint: give an instance, Checkpoint(path)."
            )
        if isinstance(callback, Checkpoint):
            found.append(callback)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"callbacks have {len(found)} Checkpoints; a fit takes one.")
    if processes is not None:
        raise ValueError(
            "A fit in a process group cannot be checkpointed. Leave the Checkpoint out, or fit "
            "inside sklearn_maml.distributed.single_process()."
        )
    return CheckpointedFit(found[0], describe)


class CheckpointedFit:
    """One fit's side of its checkpoint file.

    Attributes
    ----------
    is_complete : bool
        Whether the file already has the result of the fit.
    result : dict of str to Tensor, or None
        State of the net's module in a complete file.
    decided : dict or None
        What held-out tasks have decided of a result that was taken from a complete file.
    draws_random : bool
        Whether meta-training draws from torch's generators.
    """

    path: Path
    every: float
    draws_random: bool
    decided: dict[str, Any] | None
    _describe: Callable[..., Any]

    def __init__(self, settings: Checkpoint, describe: Callable[..., Any]) -> None:
        every = settings.every
        if isinstance(every, bool) or not isinstance(every, numbers.Real) or not every >= 0:
            raise ValueError(f"every of a Checkpoint must be seconds, 0 or more; got {every!r}.")
        self.path = Path(settings.path)
        self.every = float(every)
        self.draws_random = False
        self.decided = None
        self._describe = describe
        self._result: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self._marks: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        if not self.path.parent.is_dir():
            raise ValueError(
                f"The Checkpoint is to be written to {self.path}, but {self.path.parent} is no "
                "folder. Make it first."
            )
        for part in self.path.parent.glob(f".{self.path.name}.*.part"):
            part.unlink(missing_ok=True)  # of a process killed while it wrote
        if self.path.exists():
            try:
                self._saved = self._read()
            except FileFormatError as error:
                raise FileFormatError(
                    f"{error} To begin the fit anew, remove the file or give another path."
                ) from error

    def _read(self) -> dict[str, Any]:
        tree, tensors = read_tree(self.path)
        if tree.get("kind") != "checkpoint":
            raise FileFormatError(f"{self.path} is a {tree.get('kind')} and no checkpoint.")
        try:
            document = tree["content"]
            saved: dict[str, Any] = Decoder(tensors).decode(document)
            # what is looked at before the fit goes on
            saved["complete"], saved["seed"], saved["marks"]["parameters"].items()
        except Exception as error:  # what is not well-formed may fail anywhere
            raise FileFormatError(f"{self.path} is not well-formed: {error!r}.") from error
        self._read_as = document, tensors
        return saved

    @property
    def is_complete(self) -> bool:
        """Whether the file already has the result of the fit."""
        return self._saved is not None and bool(self._saved["complete"])

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the state of the module in a complete file, to know its shapes by."""
        return self._saved["module"] if self._saved is not None and self.is_complete else None

    def seed(self, seed: int, given: bool) -> int:
        """Return the seed of the fit: that of an unfinished one where none was given."""
        if not given and self._saved is not None:
            if not self._saved["complete"]:
                return int(self._saved["seed"])
            self._saved = None
        return seed

    def compare(self, *, params: dict[str, Any], seed: int, **values: Any) -> None:
        """Take up the fit of the file; ValueError if that is an unfinished one of something else.

        `values` are what else has to be the same, as plain data, by what to call it.
        """
        self._marks = {
            "parameters": {
                name: self._mark(value)
                for name, value in sorted(params.items())
                if name not in UNCOMPARED
            },
            "the seed from random_state": str(seed),
            "the version of sklearn_maml": sys.modules["sklearn_maml"].__version__,
            **{name.replace("_", " "): digest_of(value) for name, value in values.items()},
        }
        self._seed = seed
        if self._saved is None:
            return
        theirs = self._saved["marks"]
        names = {*self._marks["parameters"], *theirs["parameters"]}
        differing = [
            f"the parameter {name!r}"
            for name in sorted(names)
            if self._marks["parameters"].get(name) != theirs["parameters"].get(name)
        ]
        differing += [
            name
            for name in sorted({*self._marks, *theirs} - {"parameters"})
            if self._marks.get(name) != theirs.get(name)
        ]
        if not differing:
            return
        if not self._saved["complete"]:
            raise ValueError(
                f"{self.path} has the checkpoint of another fit, which is not finished: it differs "
                f"in {', '.join(differing[:5])}. Finish that fit with what it was begun with, "
                "remove the file, or give the Checkpoint another path."
            )
        self._saved = None

    def _mark(self, value: Any) -> str:
        try:
            return digest_of(value, self._describe)
        except TypeError:  # by name; the weights of a module are compared themselves
            kind = value if isinstance(value, type) else type(value)
            name = getattr(value, "__qualname__", kind.__qualname__)
            return f"{kind.__module__}.{kind.__qualname__} {name}"

    # -- of a net --------------------------------------------------------------------------------

    def begin(self, net: Any) -> None:
        """Put a net that is about to begin where the interrupted one was."""
        self._last = time.monotonic()
        if self._saved is None:
            _callback_states(net, Encoder())  # fails now rather than after the first epochs
            return
        saved = self._saved
        self._restore(net)
        net.best_state_ = saved["best_state"]
        if net.best_state_ is not None:
            device = torch.device(net.device)
            net.best_state_ = {name: t.to(device) for name, t in net.best_state_.items()}
        for name, callback in net.callbacks_:
            if name in saved["callbacks"]:
                _restore_callback(callback, saved["callbacks"][name])
        if self.draws_random:
            _restore_generators(saved["generators"], torch.device(net.device))
        if net.parts_ is not None:
            net.parts_.resume(net, saved["parts"])
        net.loaders_.before = saved["loaders"]
        self._saved = None

    def take_result(self, net: Any) -> None:
        """Give a net the result of the fit, from a complete file."""
        assert self._saved is not None
        self._restore(net)
        self.decided = self._saved.get("decided")
        self._result, self._saved = self._read_as, None

    def _restore(self, net: Any) -> None:
        assert self._saved is not None
        saved = self._saved
        net.module_.load_state_dict(saved["module"])
        for name, p in net.module_.named_parameters():
            p.requires_grad_(name not in saved["frozen"])
        restore_net(net, saved["net"])
        net.engine.resume(saved["engine"])

    def end_epoch(self, net: Any) -> None:
        """Write the file, if it is time."""
        if time.monotonic() - self._last < self.every:
            return
        self._write(net, complete=False)
        self._last = time.monotonic()

    def end(self, net: Any) -> None:
        """Write the result."""
        self._result = self._write(net, complete=True)

    def decide(self, decided: dict[str, Any]) -> None:
        """Write what held-out tasks have decided to the result, too; an interrupted fit has none.

        The result is there before: to decide takes as long as many updates.
        """
        if self._result is not None:
            encoder = Encoder()
            document, tensors = self._result
            document = {**document, "decided": encoder.encode(decided, "decided")}
            content = {"kind": "checkpoint", "content": document}
            write_tree(self.path, content, {**tensors, **encoder.tensors})

    def _write(self, net: Any, complete: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        encoder = Encoder()
        engine = net.engine.progress()
        content = {
            "complete": complete,
            "seed": self._seed,
            "marks": self._marks,
            "module": dict(net.module_.state_dict()),
            "frozen": [n for n, p in net.module_.named_parameters() if not p.requires_grad],
            "net": net_state(net),
            "engine": engine,
            "parts": None if net.parts_ is None else net.parts_.progress(net),
            "best_state": None if net.best_state_ is None else dict(net.best_state_),
            "generators": _generator_states(net) if self.draws_random else {},
            "loaders": net.loaders_.states(),
        }
        document = {name: encoder.encode(part, name) for name, part in content.items()}
        document["callbacks"] = {} if complete else _callback_states(net, encoder)
        write_tree(self.path, {"kind": "checkpoint", "content": document}, encoder.tensors)
        return document, encoder.tensors


def _generator_states(net: Any) -> dict[str, Any]:
    device = torch.device(net.device)
    devices = [] if is_host(device) else [device]
    return dict(zip(["cpu", *map(str, devices)], generator_states(devices), strict=True))


def _restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators; those of a device that the fit does not go on with are left out."""
    devices = [] if is_host(device) or str(device) not in states else [device]
    set_generator_states(devices, [states[name] for name in ("cpu", *map(str, devices))])


# -- nets ------------------------------------------------------------------------------------------


def net_state(net: Any) -> dict[str, Any]:
    """Return the state of a net besides its parameters, as plain data."""
    with without_compiler():
        optimizer = net.optimizer_.state_dict()
    return {
        "counters": {name: getattr(net, name) for name in COUNTERS},
        "history": [dict(row) for row in net.history],
        "optimizer": optimizer,
    }


def restore_net(net: Any, state: dict[str, Any]) -> None:
    """Give an initialised net the state of another one."""
    from skorch.history import History

    vars(net).update(state["counters"])
    net.history_ = History(state["history"])
    load_state(net.optimizer_, state["optimizer"])


# -- callbacks -------------------------------------------------------------------------------------


def _callback_states(net: Any, encoder: Encoder) -> dict[str, Any]:
    """JSON of what the callbacks of a net remember, by name."""
    states = {}
    for name, callback in net.callbacks_:
        state = _state_of(callback)
        try:
            if state:
                states[name] = encoder.encode(state, f"callbacks/{name}")
        except TypeError as error:
            raise TypeError(
                f"The callback {name!r} cannot be checkpointed: {error} Give "
                f"{type(callback).__name__} the methods state_dict() and load_state_dict(state), "
                "or leave the Checkpoint out."
            ) from error
    return states


def _has_own_state(callback: Any) -> bool:
    return callable(getattr(callback, "state_dict", None)) and callable(
        getattr(callback, "load_state_dict", None)
    )


def _state_of(callback: Any) -> dict[str, Any]:
    from skorch.callbacks import EpochTimer, LRScheduler, PassthroughScoring, PrintLog, ProgressBar
    from skorch.callbacks.scoring import ScoringBase

    if _has_own_state(callback):
        return {"own": callback.state_dict()}
    # what they remember ends with the epoch, or is for the screen
    if isinstance(callback, (EpochTimer, PrintLog, ProgressBar)):
        return {}
    fitted = {
        name: value
        for name, value in vars(callback).items()
        if name.endswith("_") and not name.startswith("_")
    }
    if isinstance(callback, (ScoringBase, PassthroughScoring)):  # the rest is of the epoch
        fitted = {name: fitted[name] for name in ("best_score_",) if name in fitted}
    if isinstance(callback, LRScheduler):
        scheduler = callback.lr_scheduler_.state_dict()
        return {"fitted": {"batch_idx_": callback.batch_idx_}, "scheduler": scheduler}
    return {"fitted": fitted} if fitted else {}


def _restore_callback(callback: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        callback.load_state_dict(state["own"])
        return
    vars(callback).update(state["fitted"])
    if "scheduler" in state:
        callback.lr_scheduler_.load_state_dict(state["scheduler"])
