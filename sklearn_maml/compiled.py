"""Compiled steps: a recorded graph is built into a library by a process of its own.

Compiling takes tens of seconds of another core, so that only very long fits pay for it. The
compiler (torch's inductor, ahead of time) runs in a child process: this one neither imports it nor
is changed by it, and only loads the library. Libraries are kept in ``$SKLEARN_MAML_CACHE``, by
default ``~/.cache/sklearn_maml``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Compilation", "Uncompilable", "cache_folder"]

# seconds a compilation may take before it is given up
TIME_LIMIT = 900

WORKER = """
import os, pickle, shutil, signal, sys, threading, warnings

def watch():
    os.read(0, 1)  # ends when the process that waits for the result does
    os.killpg(0, signal.SIGKILL)

def report(kind, error, trace):
    with open(source + ".error", "w") as file:
        file.write(f"{error or kind.__name__}".strip().split("\\n")[0])
    sys.__excepthook__(kind, error, trace)

source, target = sys.argv[1:]
sys.excepthook = report
threading.Thread(target=watch, daemon=True).start()
import torch
import torch._inductor
from torch.fx.experimental.proxy_tensor import make_fx

with open(source, "rb") as file:
    code, layouts, n_threads = pickle.load(file)
torch.set_num_threads(n_threads)
inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in layouts]
names = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
exec(code, names)
graph = make_fx(lambda *tensors: names["forward"](None, *tensors), tracing_mode="fake")(*inputs)
with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = torch._inductor.aot_compile(graph, tuple(inputs))
shutil.copy(library, target + ".part")
os.replace(target + ".part", target)
"""


class Uncompilable(Exception):  # noqa: N818 - a verdict, not a fault
    """Raised with the reason when a graph cannot be compiled."""


def cache_folder() -> Path:
    """Folder of the compiled libraries, which outlives the process."""
    return Path(os.environ.get("SKLEARN_MAML_CACHE") or Path.home() / ".cache" / "sklearn_maml")


def _runner() -> Callable[..., Any]:
    """Return what loads a library; absent from some versions and platforms."""
    runner = getattr(getattr(torch._C, "_aoti", None), "AOTIModelContainerRunnerCpu", None)
    if runner is None or os.name != "posix":
        raise Uncompilable(f"torch {torch.__version__} on {sys.platform} cannot load libraries")
    return runner


class Compilation:
    """A graph being compiled, or compiled in an earlier process.

    Parameters
    ----------
    graph : GraphModule
        Operations that write to nothing, draw no random numbers and hold no tensors.
    inputs : sequence of Tensor
        Arguments of the shapes and dtypes to compile for.

    Raises
    ------
    Uncompilable
        If it is known at once that it cannot be compiled.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        _runner()
        if any(t.device.type != "cpu" for t in inputs):
            raise Uncompilable("steps are compiled for the CPU alone")
        if any(node.op == "get_attr" for node in graph.graph.nodes):
            raise Uncompilable("it holds constant tensors")
        layouts = [(tuple(t.shape), t.dtype) for t in inputs]
        n_threads = torch.get_num_threads()
        features = torch.backends.cpu.get_cpu_capability()
        what = (graph.code, layouts, n_threads, torch.__version__, platform.machine(), features)
        name = hashlib.sha256(repr(what).encode()).hexdigest()
        self._library = cache_folder() / "libraries" / f"{name}.so"
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], Any] | None = None
        if self._library.exists():
            return
        try:
            self._library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._work = tempfile.mkdtemp(dir=self._library.parent)
        except OSError as error:
            raise Uncompilable(f"the cache folder cannot be written to: {error}") from error
        source = Path(self._work, "graph.pickle")
        source.write_bytes(pickle.dumps((graph.code, layouts, n_threads)))
        environment = {
            **os.environ,
            # the library is what is kept
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self._work, "inductor")),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(source), str(self._library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that its compilers end with it
        )
        # also when nobody waits any more, and when this process ends
        self._stop = weakref.finalize(self, _stop, self._process, self._work)

    def abandon(self) -> None:
        """End the compilation, whether or not it is done."""
        if self._stop is not None:
            self._stop()

    def result(self) -> Callable[..., list[Tensor]]:
        """Wait for the library and load it.

        Raises
        ------
        Uncompilable
        """
        if self._process is not None:
            try:
                self._process.wait(TIME_LIMIT)
                said = Path(self._work, "graph.pickle.error")
                reason = said.read_text() if said.exists() else "the compiler ended early"
            except subprocess.TimeoutExpired as error:
                raise Uncompilable(f"compiling took more than {TIME_LIMIT} seconds") from error
            finally:
                self.abandon()
            if not self._library.exists():
                raise Uncompilable(reason)
        try:
            runner = _runner()(str(self._library), 1)
        except RuntimeError as error:
            raise Uncompilable(str(error).split("\n")[0]) from error

        def run(*tensors: Tensor) -> list[Tensor]:
            with torch.no_grad():
                outputs: list[Tensor] = runner.run([t.contiguous() for t in tensors])
            return outputs

        return run


def _stop(process: subprocess.Popen[bytes], folder: str) -> None:
    """Kill a process with its children, reap it and remove its folder."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)
