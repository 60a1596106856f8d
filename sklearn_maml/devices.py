"""What is done one way on the CPU and another way on an accelerator, whichever it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accelerators",
    "forked_generators",
    "free_memory",
    "generator_states",
    "is_host",
    "set_generator_states",
]


def is_host(device: torch.device | str) -> bool:
    """Whether tensors of a device can be read without waiting for it."""
    return torch.device(device).type == "cpu"


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Return the devices other than the CPU that tensors are on, each once."""
    return sorted({t.device for t in tensors if t.device.type != "cpu"}, key=str)


def _call(device: torch.device, name: str, *args: Any) -> Any:
    """Call a function of the module that torch has for a device, such as ``torch.cuda``."""
    # there is one device of this kind, and its functions take none
    where = () if device.type == "mps" else (device,)
    return getattr(torch.get_device_module(device), name)(*args, *where)


def generator_states(devices: Sequence[torch.device]) -> list[Tensor]:
    """Return the states of torch's generators: that of the CPU, then those of devices."""
    return [torch.get_rng_state(), *(_call(device, "get_rng_state") for device in devices)]


def set_generator_states(devices: Sequence[torch.device], states: Sequence[Tensor]) -> None:
    """Set torch's generators to states that `generator_states` returned for the same devices."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        _call(device, "set_rng_state", state)


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
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if tell is None else int(tell(device)[0])
