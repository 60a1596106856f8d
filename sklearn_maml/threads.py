"""How many threads torch computes with, and what that means for processes that are forked."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

# multiply-adds of a batched pass below which more than one thread costs more than it saves (and a
# great deal more on a busy machine)
SMALL_WORK = 3e8

_asked = threading.local()  # `threads`: as many as there were before the limit


_limits_arrays = threading.Lock()


@functools.cache
def _thread_pools(user_api: str) -> ThreadpoolController:
    # others apart: a limit that ends gives all pools of its controller back what they had
    return ThreadpoolController().select(user_api=user_api)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, for the calling thread alone; also a decorator.

    Public calls compute in it, so that those on small networks start no OpenMP threads: these do
    not survive a fork, and a child would wait for them for ever. `several_threads` lifts it.
    """
    _keep_children_safe()
    # asked for first: a thread that has not computed yet sets the number when it is first needed
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        yield
        return
    outer = getattr(_asked, "threads", 1)
    _asked.threads = n_threads
    try:
        with _thread_pools("openmp").limit(limits=1):
            yield
    finally:
        _asked.threads = outer


def n_threads_asked() -> int:
    """Threads that torch had before any `one_thread`, for what starts and ends its own."""
    return max(getattr(_asked, "threads", 1), torch.get_num_threads())


@contextlib.contextmanager
def several_threads() -> Iterator[None]:
    """Inside `one_thread`: let torch have the threads that it had before."""
    n_threads = getattr(_asked, "threads", 1)
    if n_threads == 1:
        yield
        return
    with _thread_pools("openmp").limit(limits=n_threads):
        yield


def threads_for(work: float) -> Any:
    """Context for a batched pass of so many multiply-adds."""
    return one_thread() if work < SMALL_WORK else several_threads()


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what `function` makes of each item, in their order.

    In as many threads as torch has here, each of which computes in one; they end with the call.
    What the items give does not depend on how many there are, and operations too small or too
    much bound by memory for torch to part among threads are done at once all the same.
    """
    n_threads = min(torch.get_num_threads(), len(items))
    if n_threads < 2:
        return [function(item) for item in items]
    with_gradients = torch.is_grad_enabled()  # which every thread has of its own

    def run(item: Item) -> Result:
        with torch.set_grad_enabled(with_gradients):
            return function(item)

    with ThreadPoolExecutor(n_threads, initializer=_compute_alone) as pool:
        return list(pool.map(run, items))


def _compute_alone() -> None:
    """Limit torch to one thread, for the calling thread and as long as it lives."""
    torch.get_num_threads()  # as in `one_thread`
    _thread_pools("openmp").limit(limits=1)


@contextlib.contextmanager
def one_thread_for_arrays() -> Iterator[None]:
    """Limit the linear algebra of numpy and scipy to one thread, in all of the process.

    Its threads wait by spinning, for matrices as small as those of tasks far longer than they
    compute where others need the cores: a start of 0.2 s took 2 to 7 s. Unlike torch's they have no
    limit for the calling thread alone: the first to come in limits them, and lifts it.
    """
    if not _limits_arrays.acquire(blocking=False):
        yield
        return
    try:
        with _thread_pools("blas").limit(limits=1):
            yield
    finally:
        _limits_arrays.release()


@functools.cache
def _keep_children_safe() -> None:
    """Have processes that are forked from now on compute in one thread.

    Large networks, and torch outside this library, leave threads behind that a child does not
    have. It may ask for threads of its own where there were none.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
