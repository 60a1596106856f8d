"""A device that is not the CPU, on the CPU: for tests of what a model does on an accelerator.

`DEVICE` is torch's `PrivateUse1` device, named "elsewhere". Its tensors have storages of that
device, whose memory is the host's: DLPack lends the memory of a tensor of either device to one of
the other. So an operation is computed by the kernels of the CPU, and numbers are theirs, while
autograd, ``torch.func``, autocast, fake tensors and the optimisers see a device of its own.

What an accelerator forbids is forbidden: operands on several devices (but for CPU scalars without
dimensions), and `numpy()`, which torch refuses itself. What costs there is counted, see `watch`:
moves between the host and the device, and synchronisations, where the host waits for a value.

With ``SKLEARN_MAML_TEST_DEVICE=cuda`` in the environment the tests run on a card instead: `DEVICE`
is ``cuda:0``, and `watch` counts what torch reports as synchronising. The two cannot be there
together: torch would pin memory for the stand-in.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

ON_CARD = os.environ.get("SKLEARN_MAML_TEST_DEVICE") == "cuda"
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:  # pragma: no cover - depends on the installed torch
    pytest.skip(
        f"torch {torch.__version__} has no Python backend for the PrivateUse1 device",
        allow_module_level=True,
    )

NAME = "cuda" if ON_CARD else "elsewhere"
DEVICE = f"{NAME}:0"
emulated = pytest.mark.skipif(ON_CARD, reason="about what the stand-in for a card counts or draws")
# of DLPack
HOST, EXTENSION = 1, 12
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# operations whose result has a size that depends on values, which the host waits for
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2"}
# what autocast computes in bfloat16 on accelerators, and in float32
LOW_PRECISION = (
    "mm", "bmm", "addmm", "addmv", "baddbmm", "linear", "matmul", "convolution", "conv1d",
    "conv2d", "conv3d",
)  # fmt: skip
HIGH_PRECISION = (
    "exp", "log", "log_softmax.int", "softmax.int", "nll_loss", "mse_loss", "logsumexp",
    "sum", "sum.dim_IntList", "pow.Tensor_Scalar", "layer_norm",
)  # fmt: skip


class MixedDevicesError(RuntimeError):
    """Raised where an operation is given tensors of the host and of the device."""


@dataclasses.dataclass
class Counts:
    """What an accelerator would have had to wait for. `where` names the lines, if asked for."""

    to_device: int = 0
    to_host: int = 0
    synchronisations: int = 0
    operations: int = 0
    where: list[str] = dataclasses.field(default_factory=list)

    @property
    def moves(self) -> int:
        """Moves in both directions."""
        return self.to_device + self.to_host

    @property
    def waits(self) -> int:
        """Times that the host waits for the device, or feeds it."""
        return self.moves + self.synchronisations


_watching: list[tuple[Counts, bool]] = []
_limit: list[int] = []
_generator = torch.Generator()


@contextlib.contextmanager
def watch(locate: bool = False) -> Iterator[Counts]:
    """Count moves and synchronisations; with `locate`, note the lines of the library too."""
    if ON_CARD:
        with _watch_card() as counts:
            yield counts
        return
    entry = (Counts(), locate)
    _watching.append(entry)
    try:
        yield entry[0]
    finally:
        _watching.remove(entry)


@contextlib.contextmanager
def _watch_card() -> Iterator[Counts]:
    counts = Counts(operations=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for w in caught:
        if "synchronizing CUDA operation" in str(w.message):
            counts.synchronisations += 1
            counts.where.append(f"{w.filename.split('/')[-1]}:{w.lineno}")
        elif "Synchronization debug mode" not in str(w.message):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def backend() -> Any:
    """``torch.cuda``, or what stands for it."""
    return getattr(torch, NAME)


@contextlib.contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Run out of memory where an operation makes a tensor of more bytes than these."""
    _limit.append(n_bytes)
    try:
        yield
    finally:
        _limit.pop()


def _count(kind: str) -> None:
    if kind != "operations":
        _refuse_to_wait()
    for counts, locate in _watching:
        setattr(counts, kind, getattr(counts, kind) + 1)
        if locate and kind != "operations":
            frames = [f for f in traceback.extract_stack() if "sklearn_maml" in f.filename]
            places = " < ".join(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in frames[::-1][:4])
            counts.where.append(f"{kind}: {places}")


# -- memory of one device seen from the other ------------------------------------------------------

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _lend(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor.detach())
    # struct DLTensor: void* data; int32 device_type; ...
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = kind
    lent = torch._C._from_dlpack(capsule)
    if lent.stride() != tensor.stride():  # DLPack has its own opinion where a size is 1
        lent = _view(lent, tensor.shape, tensor.stride(), lent.storage_offset())
    return lent


def _view(tensor: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.ops.aten.as_strided.default.redispatch(
        CPU_KERNELS, tensor, list(size), list(stride), offset
    )


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor of the device as a tensor of the host, without a move."""
    if ON_CARD:
        return tensor.detach().cpu()
    return _lend(tensor, HOST)


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    if _limit and tensor.numel() * tensor.element_size() > _limit[-1]:
        raise torch.cuda.OutOfMemoryError(f"{NAME} out of memory: tensor of {tensor.shape}")
    return _lend(tensor, EXTENSION)


# -- graphs of what is launched --------------------------------------------------------------------


class _Graph:
    """Stands for ``torch.cuda.CUDAGraph``: what was run while it was captured, run again.

    A replay reads and writes the memory that the operations had, as on CUDA: what they read has to
    be put there before, and what they wrote is overwritten.
    """

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.n_replays = 0

    def replay(self) -> None:
        self.n_replays += 1
        for launch in self.launches:
            launch()


class _Stream:
    """Nothing runs beside anything else here, so nothing waits."""

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        assert event.recorded


class _Event:
    recorded = False

    def record(self, stream: _Stream) -> None:
        self.recorded = True


_capturing: list[_Graph] = []


@contextlib.contextmanager
def capturing(fails: str | None = None) -> Iterator[list[_Graph]]:
    """Let the device capture graphs; return those that were captured.

    With `fails`, the end of a capture raises an error of these words.
    """
    captured: list[_Graph] = []

    @contextlib.contextmanager
    def graph(made: _Graph) -> Iterator[None]:
        _capturing.append(made)
        try:
            yield
        finally:
            _capturing.remove(made)
        if fails:
            raise RuntimeError(fails)
        captured.append(made)

    tools = {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": _Stream,
        "graph": graph,
        "stream": contextlib.nullcontext,
    }
    for name, tool in tools.items():
        setattr(_Module, name, staticmethod(tool))
    try:
        yield captured
    finally:
        for name in tools:
            delattr(_Module, name)


def _note_launch(op: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Let the graphs that are captured do this again, in the same memory."""
    into = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]

    def launch() -> None:
        with torch.inference_mode():  # tensors that were made so can be written to so alone
            new = pytree.tree_leaves(op(*args, **kwargs))
            new = [t for t in new if isinstance(t, torch.Tensor)]
            for own, value in zip(into, new, strict=True):
                if own.data_ptr() != value.data_ptr():
                    own.copy_(value)

    for graph in _capturing:
        graph.launches.append(launch)


def _refuse_to_wait() -> None:
    if _capturing:
        raise RuntimeError("operation not permitted when stream is capturing")


def _is_ours(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


# -- operations ------------------------------------------------------------------------------------


@functools.cache
def _facts(op: Any) -> tuple[str, bool, list[Any], bool, bool, set[str]]:
    """What there is to know about an operation."""
    schema = op._schema
    returned = [r.alias_info for r in schema.returns]
    views = any(alias is not None and not alias.is_write for alias in returned)
    # positions of the arguments that are returned
    given = [
        next(k for k, a in enumerate(schema.arguments) if a.alias_info is not None and
             a.alias_info.before_set & alias.before_set)
        for alias in returned if alias is not None and alias.is_write
    ]  # fmt: skip
    names = {a.name for a in schema.arguments if a.is_out}
    random = torch.Tag.nondeterministic_seeded in op.tags
    return schema.name.removeprefix("aten::"), views, given, random, not schema.returns, names


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the memory of its operands, by the kernels of the CPU."""
    name, views, given, random, silent, out_names = _facts(op)
    _count("operations")
    if name == "_local_scalar_dense":
        _count("synchronisations")
        return op(on_host(args[0]))
    if name == "_copy_from":
        return _copy(*args)
    if views:
        return op.redispatch(CPU_KERNELS, *args, **kwargs)  # of the same storage
    if name in ("set_", "resize_"):
        return _change_storage(op, *args, **kwargs)
    # results that are given and empty take the size of what comes
    grown: list[tuple[torch.Tensor, torch.Tensor]] = []
    masked = False

    def lend(value: Any, is_out: bool = False) -> Any:
        nonlocal masked
        if isinstance(value, torch.Tensor):
            if value.device.type != NAME:
                if value.dim() > 0:
                    raise MixedDevicesError(
                        f"{name} was given tensors on {NAME} and on {value.device} (of shape "
                        f"{tuple(value.shape)}); expected one device"
                    )
                return value
            if is_out and value.numel() == 0:
                grown.append((value, torch.empty(value.shape, dtype=value.dtype)))
                return grown[-1][1]
            masked = masked or value.dtype in (torch.bool, torch.uint8)
            return on_host(value)
        if isinstance(value, (list, tuple)):
            return [lend(v) for v in value]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    lent = [lend(value) for value in args]
    lent_kwargs = {key: lend(value, key in out_names) for key, value in kwargs.items()}
    by_mask = masked and name.startswith("index") and name != "index_select"  # by positions alone
    if name in SIZED_BY_VALUES or by_mask:
        _count("synchronisations")
    with _drawing() if random else contextlib.nullcontext():
        result = op(*lent, **lent_kwargs)
    if _capturing:
        _note_launch(op, lent, lent_kwargs, result)
    for own, new in grown:
        if new.numel():
            own.set_(_on_device(new))
    if silent:
        return None
    if given:
        names = [a.name for a in op._schema.arguments]
        own_results = [args[k] if k < len(args) else kwargs[names[k]] for k in given]
        return own_results[0] if len(given) == 1 else tuple(own_results)
    if isinstance(result, torch.Tensor):
        return _on_device(result)
    if not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(result)):
        _count("synchronisations")
    return pytree.tree_map_only(torch.Tensor, _on_device, result)


def _refuse_mixture(name: str, operands: list[Any]) -> None:
    for t in operands:
        if isinstance(t, torch.Tensor) and not _is_ours(t) and t.dim() > 0:
            raise MixedDevicesError(f"{name} was given a tensor on {t.device} and one on {NAME}")


def _copy(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if _is_ours(to) and _is_ours(source):
        pair = on_host(to), on_host(source)
        _note_launch(torch.Tensor.copy_, pair, {}, pair[0].copy_(pair[1]))
    elif _is_ours(to):
        _count("to_device")
        on_host(to).copy_(source)
    else:
        _count("to_host")
        to.copy_(on_host(source))
    return to


def _change_storage(op: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if op._schema.name == "aten::resize_":
        (size,) = args
        if torch.Size(size).numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            room = _on_device(torch.empty(torch.Size(size).numel(), dtype=tensor.dtype))
            args = (room.untyped_storage(), 0, size, torch.empty(size, device="meta").stride())
            op, kwargs = torch.ops.aten.set_.source_Storage_storage_offset, {}
    return op.redispatch(CPU_KERNELS, tensor, *args, **kwargs)


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Draw from the generator of the device, which the host's does not move."""
    host = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.get_rng_state())
        torch.set_rng_state(host)


class _Module:
    """What ``torch.elsewhere`` is, as ``torch.cuda`` is of CUDA."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        _generator.manual_seed(seed)

    manual_seed = manual_seed_all

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return _generator.get_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        _generator.set_state(state)

    class device(contextlib.nullcontext):  # noqa: N801 - as torch calls it
        """Makes a device the current one; there is only one."""

    @staticmethod
    def synchronize(device: Any = None) -> None:
        _count("synchronisations")

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return _free[-1], _free[-1]

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_free = [2**34]


@contextlib.contextmanager
def free_memory(n_bytes: int) -> Iterator[None]:
    """Say that the device has this much memory left."""
    _free.append(n_bytes)
    try:
        yield
    finally:
        _free.pop()


def _lstm_cell(
    by_input: torch.Tensor, by_hidden: torch.Tensor, cx: torch.Tensor, *biases: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what accelerators have a kernel of their own for, and the CPU has not."""
    gates = sum((b for b in biases if b is not None), by_input + by_hidden)
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], -1)


def _lstm_cell_backward(
    grad_hy: torch.Tensor | None,
    grad_cy: torch.Tensor | None,
    cx: torch.Tensor,
    cy: torch.Tensor,
    workspace: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    i, f, g, o = workspace.chunk(4, -1)
    out = cy.tanh()
    by_hidden = torch.zeros_like(cy) if grad_hy is None else grad_hy
    by_cell = by_hidden * o * (1 - out**2) + (0 if grad_cy is None else grad_cy)
    parts = [by_cell * g * i * (1 - i), by_cell * cx * f * (1 - f)]
    parts += [by_cell * i * (1 - g**2), by_hidden * out * o * (1 - o)]
    gates = torch.cat(parts, -1)
    return gates, by_cell * f, gates.sum(0) if has_bias else None


def _convolution(*args: Any) -> torch.Tensor:
    _refuse_mixture("convolution", list(args))
    return _on_device(torch.ops.aten.convolution(*map(_lent, args)))


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any) -> Any:
    _refuse_mixture("convolution_backward", [grad, x, weight])
    *how, mask = args
    grads = torch.ops.aten.convolution_backward(
        on_host(grad), on_host(x), on_host(weight), [weight.shape[0]], *how, mask
    )
    return tuple(_on_device(t) if asked else None for t, asked in zip(grads, mask, strict=True))


def _lent(value: Any) -> Any:
    return on_host(value) if _is_ours(value) else value


def _casting(name: str, to: torch.dtype) -> Any:
    op = getattr(torch.ops.aten, name.split(".")[0])
    op = getattr(op, name.split(".")[1] if "." in name else "default")
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        if _is_ours(value) and value.dtype in (torch.float32, torch.bfloat16):
            return value.to(to)
        return value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            args, kwargs = pytree.tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    return run


def _clone_storage(self: Any) -> Any:
    if self.device.type != NAME:
        return _clone_of_torch(self)
    whole = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    whole.set_(self, 0, (self.nbytes(),), (1,))
    return whole.clone().untyped_storage()


def _move_storage(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
    if torch.device(device).type != NAME or self.device.type == NAME:
        return _move_of_torch(self, device=device, non_blocking=non_blocking)
    whole = torch.empty(0, dtype=torch.uint8).set_(self, 0, (self.nbytes(),), (1,))
    return whole.to(DEVICE).untyped_storage()


_libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
# there is no allocator of the device's own, which torch's methods want
_clone_of_torch = torch.UntypedStorage.clone
_move_of_torch = torch.UntypedStorage.to


def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _libraries[0].fallback(_fallback, "PrivateUse1")
    _libraries[1].impl("_thnn_fused_lstm_cell", _lstm_cell, "PrivateUse1")
    _libraries[1].impl("_thnn_fused_lstm_cell_backward_impl", _lstm_cell_backward, "PrivateUse1")
    _libraries[1].impl("convolution_overrideable", _convolution, "PrivateUse1")
    _libraries[1].impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    _libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOW_PRECISION:
        _libraries[1].impl(name, _casting(name, torch.bfloat16), "AutocastPrivateUse1")
    for name in HIGH_PRECISION:
        _libraries[1].impl(name, _casting(name, torch.float32), "AutocastPrivateUse1")
    torch.UntypedStorage.clone = _clone_storage  # type: ignore[method-assign]
    torch.UntypedStorage.to = _move_storage  # type: ignore[method-assign]


if not ON_CARD:
    _register()
