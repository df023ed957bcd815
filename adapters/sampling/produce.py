"""Sample the missing units of a run in this process, and write them at the same time.

On the CPU the last bits of a network's output depend on how many images it gets at once. There it
always gets slices of one size, in which an image always has the same place. The bytes are therefore
the same for any batch size and any number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.sampling.outputs import Images, Output
from sa_plugin.sampling.batches import BLOCK
from sa_plugin.sampling.sampler import Sampler

_PENDING = 2  # units waiting to be written


def slice_size(image_shape: Sequence[int]) -> int:
    """Images in a network call on the CPU: 64 of 32x32 pixels, fewer of larger images.

    A power of two, at most the 64 of a block; it depends only on the shape.
    """
    pixels = image_shape[1] * image_shape[2]
    fitting = max(1, min(BLOCK, BLOCK * 32 * 32 // pixels))
    return 1 << (fitting.bit_length() - 1)


def in_slices(network: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Call ``network`` with ``size`` images at a time; a batch must be a multiple of ``size``."""

    # A compiled network then is one graph for a slice, not one for all slices of a batch.
    @partial(torch.compiler.disable, recursive=False)
    def call(x: Tensor, n: Tensor) -> Any:
        outputs = [network(*part) for part in zip(x.split(size), n.split(size), strict=True)]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    call.model = getattr(network, "model", network)  # the sampler reads the device from it
    return call


def runs_of(units: Sequence[int]) -> list[range]:
    """Join ascending numbers into contiguous ranges."""
    runs: list[range] = []
    for unit in units:
        if runs and runs[-1].stop == unit:
            runs[-1] = range(runs[-1].start, unit + 1)
        else:
            runs.append(range(unit, unit + 1))
    return runs


def images_of(
    sampler: Sampler,
    image_shape: Sequence[int],
    first: int,
    count: int,
    *,
    seed: int,
    batch_size: int,
    multiple: int,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Images first..first + count - 1 as uint8 batches [B, C, H, W] in the CPU's memory.

    Args:
        first: a multiple of ``multiple``, so that an image keeps its place in a slice.
        batch_size: images in a batch, rounded up to a multiple of ``multiple``.
        multiple: the sampler gets a multiple of this many images; surplus images are dropped.

    Raises:
        ValueError: ``first`` is not a multiple of ``multiple``.
    """
    if first % multiple:
        raise ValueError(f"first must be a multiple of {multiple}, got {first}")
    batch_size = -(-batch_size // multiple) * multiple
    padded = -(-count // multiple) * multiple
    left = count
    options = {"seed": seed, "batch_size": batch_size, "first": first, "progress": progress}
    for batch in sampler.stream(padded, image_shape, to_cpu=True, **options):
        yield batch[:left]
        left -= len(batch[:left])


def cut(batches: Iterable[Tensor], size: int) -> Iterator[Images]:
    """Cut batches [B, C, H, W] of any length into arrays [size, H, W, C], the last one shorter."""
    waiting: list[Tensor] = []  # fewer than size images
    held = 0
    for batch in batches:
        waiting.append(batch)
        held += len(batch)
        if held >= size:
            pieces = torch.cat(waiting).split(size)
            held %= size
            full = pieces[:-1] if held else pieces
            yield from map(_as_images, full)
            waiting = [pieces[-1].clone()] if held else []  # frees the rest of the batch
    if held:
        yield _as_images(torch.cat(waiting))


def write_missing(
    output: Output, units: Sequence[int], images: Callable[[int, int], Iterable[Tensor]]
) -> None:
    """Make ``units`` and write them while the next ones are made.

    After an error, the units that were finished are still written.

    Args:
        images: (first, count) -> these images in batches.
    """
    pending: deque[Future[None]] = deque()
    # At the end of the block, the pool first finishes the pending writes; then the output closes.
    with closing(output), ThreadPoolExecutor(max_workers=1) as pool:
        for run in runs_of(units):
            first = run.start * output.unit
            count = min(run.stop * output.unit, output.n_images) - first
            pieces = cut(images(first, count), output.unit)
            for unit, piece in zip(run, pieces, strict=True):
                pending.append(pool.submit(output.write, unit, piece))
                while len(pending) > _PENDING:
                    pending.popleft().result()
        while pending:
            pending.popleft().result()


def _as_images(batch: Tensor) -> Images:
    return np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
