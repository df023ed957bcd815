"""The processes that share a run: several if torchrun started them, otherwise one.

Processes that sample communicate only at the beginning and the end, and never about data on a
device. So gloo is enough, on GPUs as on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adapters.shell.signals import at_once

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # one process may finish long before another


@dataclass(frozen=True)
class Processes:
    """This process's number, the number of processes, and this process's number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of ``items``: contiguous, in the order of the ranks."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; waits for the slowest process.

        Raises:
            ConnectionError: another process has stopped.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            with at_once():
                dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ConnectionError("another process of the run has stopped") from error
        return values

    def first(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` in process 0 while the others wait; all raise its ValueError or OSError."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except (ValueError, OSError) as raised:
                error = raised
        error = self.gather(error)[0]
        if error is not None:
            raise error
        return result

    def device(self, name: str) -> str:
        """The device called ``name``; where several processes use "cuda", each has its own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun has started, according to its environment variables."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    with at_once():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank, world, local)
    finally:
        dist.destroy_process_group()
