"""Several processes that train one network: what `torchrun` starts, seen from one of them.

Without it every function here is that of a single process. Files are written by the first process
alone; all must see the same folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


def start(device: torch.device | str) -> None:
    """Join the other processes, if `torchrun` started several."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")


def stop() -> None:
    """Leave the other processes, once all have come this far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def local_device(device: str) -> str:
    """The accelerator of this process, where only its kind is named."""
    if world_size() > 1 and device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def gather(value: T) -> list[T]:
    """The values of all processes, in order; every process must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[..., None], *arguments: Any) -> None:
    """Let the first process do it while the others wait; its ValueError is raised in all."""
    refusal = None
    if is_first():
        try:
            function(*arguments)
        except ValueError as error:
            refusal = str(error)
    (refusal, *_) = gather(refusal)
    if refusal is not None:
        raise ValueError(refusal)


def own_seed(seed: int) -> int:
    """A seed for this process alone; the first one's is `seed` itself."""
    if is_first():
        return seed
    return int(np.random.SeedSequence([seed % 2**32, rank()]).generate_state(1)[0])
