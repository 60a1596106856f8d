"""What is done one way on the CPU and another way on an accelerator, whichever it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def is_host(device: torch.device | str) -> bool:
    """Whether tensors of a device can be read without waiting for it."""
    return torch.device(device).type == "cpu"


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Return the devices other than the CPU that tensors are on, each once."""
    return sorted({t.device for t in tensors if t.device.type != "cpu"}, key=str)


def backend_of(device: torch.device) -> Any:
    """Return the module that torch has for a kind of device, such as ``torch.cuda``, or None."""
    return getattr(torch, device.type, None)


def _arguments(device: torch.device) -> tuple[torch.device, ...]:
    """Arguments that name a device to the functions of its module."""
    return () if device.type == "mps" else (device,)  # of which there is one


def generator_states(devices: Sequence[torch.device]) -> list[Any]:
    """Return the states of torch's generators: that of the CPU, then those of devices.

    None stands for a device that keeps its state to itself.
    """
    states: list[Any] = [torch.get_rng_state()]
    for device in devices:
        tell = getattr(backend_of(device), "get_rng_state", lambda *_: None)
        states.append(tell(*_arguments(device)))
    return states


def set_generator_states(devices: Sequence[torch.device], states: Sequence[Any]) -> None:
    """Set torch's generators to states that `generator_states` returned for the same devices."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        if state is not None:
            backend_of(device).set_rng_state(state, *_arguments(device))


@contextlib.contextmanager
def forked_generators(devices: Sequence[torch.device]) -> Iterator[None]:
    """Context after which torch's generators are as they were before."""
    states = generator_states(devices)
    try:
        yield
    finally:
        set_generator_states(devices, states)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has left; None if it does not say."""
    tell = getattr(backend_of(device), "mem_get_info", None)
    return None if tell is None else int(tell(device)[0])


def resolve_device(asked: Any) -> torch.device:
    """Return the device that a parameter `device` names; ValueError if it is not there."""
    automatic = str(asked) == "auto"
    if automatic and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if automatic else asked)
    except RuntimeError as error:
        raise ValueError(
            f"device={asked!r} is not a torch device. Expected 'auto', 'cpu', 'cuda' or "
            "'cuda:0', ..."
        ) from error
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={asked!r} was asked for, but torch has no such device here. Use "
            "device='auto' to take CUDA where there is one."
        ) from error
    return probe.device  # with its number, as tensors have it


class SeededTorch:
    """Seed torch's global generator for a while, then restore it.

    The generator is one for the process, so fits in threads take turns.
    """

    _lock = threading.RLock()

    def __init__(self, device: torch.device, seed: int) -> None:
        self._fork = forked_generators([] if is_host(device) else [device])
        self._seed = seed

    def __enter__(self) -> None:
        self._lock.acquire()
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        self._lock.release()
