"""New processes for parts of a command's work: they end with it, and its stop lets them save."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from adapters.shell import signals
from adapters.shell.command import keep_freed_memory


def new_pool(threads: int, prepare: Callable[..., None] | None = None, *args: Any) -> Pool:
    """A pool of one process, which starts with its first task and then does ``prepare(*args)``.

    Args:
        threads: those that PyTorch uses in it.
    """
    context = multiprocessing.get_context("spawn")
    return Pool(1, context, _start, (threads, prepare, *args))


class Pool(ProcessPoolExecutor):
    """Its processes ignore Ctrl-C, which reaches the command too: that one sends them SIGTERM."""

    def submit(self, *task: Any, **options: Any) -> Future[Any]:
        """As the executor's; the first call starts the process, which inherits what is ignored."""
        with signals.ignored(signal.SIGINT):
            return super().submit(*task, **options)


def _start(threads: int, prepare: Callable[..., None] | None, *args: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # between two tasks; tasks catch it
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    if prepare is not None:
        prepare(*args)


def _end_with_the_command() -> None:
    """End this process at once if its command was killed: the next command may be at work."""
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os._exit(1)


@contextmanager
def ended(pools: Callable[[], Iterable[Pool]], is_idle: Callable[[], bool]) -> Iterator[None]:
    """At the end of the block the processes end; unless idle, they are told to save and stop.

    Both functions are called at the end of the block.
    """
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        # Idle processes end by themselves.
        for child in () if is_idle() else multiprocessing.active_children():
            if child not in others:
                child.terminate()
        for pool in pools():
            pool.shutdown()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block, PyTorch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
