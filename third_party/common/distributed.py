"""Several processes that train one network, started by `torchrun`: the view of one process.

Without `torchrun` all functions act for a single process. Only the first process writes files; all
processes must see the same folders.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


def start(
    device: torch.device | str, *, backend: str | None = None, patience: timedelta | None = None
) -> None:
    """Join the other processes, if `torchrun` started several.

    `backend`: by default NCCL for GPUs, else gloo. `patience`: how long one may wait for another.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    device = torch.device(device)
    if device.type == "cuda":
        # NCCL exchanges objects on the current device, by default the first one in all processes.
        torch.cuda.set_device(device)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    with _ended_by_signals():
        dist.init_process_group(backend, timeout=patience)


def stop() -> None:
    """Leave the group after all processes have reached this call."""
    if dist.is_initialized():
        work = dist.barrier(async_op=True)
        work.wait()
        # Never freed. The group's destruction does not wait for gloo's threads; one that frees the
        # barrier needs Python, and where Python is ending by then it would abort the process.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))
        dist.destroy_process_group()


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def local_device(device: str) -> str:
    """The device of this process; "cuda" alone becomes the one of its local rank."""
    if world_size() > 1 and device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: contiguous, in the order of the ranks."""
    if not dist.is_initialized():
        return items
    n, world = len(items), world_size()
    return items[n * rank() // world : n * (rank() + 1) // world]


def gather(value: T, *, interruptible: bool = False) -> list[T]:
    """The values of all processes, in order; every process must call it.

    `interruptible`: a signal ends a process that waits here, like a program without a handler. Only
    where there is nothing to save: no handler could end the wait inside the library.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    with _ended_by_signals() if interruptible else nullcontext():
        dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` in the first process while the others wait, interruptibly.

    All get its result, or raise its ValueError or OSError.
    """
    result: Any = None
    refusal: Exception | None = None
    if is_first():
        try:
            result = function(*arguments)
        except (ValueError, OSError) as error:
            refusal = error
    result, refusal = gather((result, refusal), interruptible=True)[0]
    if refusal is not None:
        raise refusal
    return result


class Agreement:
    """Tells all processes at the same step that one of them wants to stop.

    Each step starts an exchange on the CPU and reads the exchange of the previous step, which has
    had one step of time to arrive. Nothing waits for a device. A process waits for another one only
    if it is a whole step ahead.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, wanted: bool) -> bool:
        """Whether all processes stop here; each process must call this after each step."""
        if self._group is None:
            return wanted
        before, flag = self._under_way, torch.tensor([int(wanted)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
        self._under_way = work, flag
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In this context SIGINT and SIGTERM end the process at once; only Python handlers give way."""
    listening = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if listening else ()
    before = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def peers() -> Iterator[None]:
    """In this context the end of another process raises a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_connection(error):
            raise
        raise ConnectionError("another process of the run has stopped") from error


def _is_of_the_connection(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that begin with the name of the gloo source file.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def own_seed(seed: int) -> int:
    """A separate seed for this process; the first process uses `seed` itself."""
    if is_first():
        return seed
    return int(np.random.SeedSequence([seed % 2**32, rank()]).generate_state(1)[0])
