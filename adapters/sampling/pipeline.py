"""The one way from a sampler to files and numbers: a stream of uint8 batches, and sinks for it.

    source = Source(sampler, image_shape, seed=0, batch_size=500)
    fill(NpzFile(path, n_images=50_000), lambda: source)  # only what is missing, in any processes
    evaluate(source.batches(0, 1000), reference)          # or straight into numbers

On the CPU the last bits of a network's output depend on how many images it gets at once. There it
always gets slices of one size, in which an image always has the same place. The bytes are therefore
the same for any batch size and any number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.sampling.sinks import Images, Sink
from sa_plugin.sampling.batches import BLOCK
from sa_plugin.sampling.sampler import Sampler
from third_party.common import distributed

_PENDING = 2  # units waiting to be written


@dataclass(frozen=True)
class Source:
    """The images of one sampler by number: image i depends on the seed and i alone.

    Attributes:
        given: the network's arguments for the images first..first + count - 1, such as labels.
        batch_size: images in a batch, rounded up to a multiple of ``multiple``.
        multiple: the sampler gets a multiple of this many images; surplus images are dropped.
    """

    sampler: Sampler
    image_shape: tuple[int, ...]
    seed: int = 0
    batch_size: int = 500
    multiple: int = 1
    progress: bool = False
    given: Callable[[int, int], dict[str, Tensor]] = lambda first, count: {}

    def batches(self, first: int, count: int) -> Iterator[Tensor]:
        """Images first..first + count - 1 as uint8 batches [B, C, H, W] in the CPU's memory.

        Raises:
            ValueError: ``first`` is no multiple of ``multiple``: an image must keep its place.
        """
        if first % self.multiple:
            raise ValueError(f"first must be a multiple of {self.multiple}, got {first}")
        left, made = count, _rounded_up(count, self.multiple)
        for batch in self.sampler.stream(
            made,
            self.image_shape,
            seed=self.seed,
            batch_size=_rounded_up(self.batch_size, self.multiple),
            first=first,
            progress=self.progress,
            to_cpu=True,
            **self.given(first, made),
        ):
            yield batch[:left]
            left -= len(batch[:left])


def fill(sink: Sink, make_source: Callable[[], Source]) -> None:
    """Make what is missing in ``sink``, shared by all processes, and finish it.

    ``make_source``: called only where this process has something to make.

    Raises:
        ValueError, OSError: in all processes, if the first one cannot read or finish the sink.
        ConnectionError: another process has stopped.
    """
    units = distributed.share(distributed.on_first(sink.missing))
    if units:
        write_units(sink, units, make_source())
    distributed.gather(None, interruptible=True)
    distributed.on_first(sink.finish)


def write_units(sink: Sink, units: Sequence[int], source: Source) -> None:
    """Make ``units`` in this process and write them while the next ones are made.

    After an error, the units that were finished are still written.
    """
    pending: deque[Future[None]] = deque()
    # At the end of the block, the pool first finishes the pending writes; then the sink closes.
    with closing(sink), ThreadPoolExecutor(max_workers=1) as pool:
        for run in runs_of(units):
            first = run.start * sink.unit
            count = min(run.stop * sink.unit, sink.n_images) - first
            pieces = cut(source.batches(first, count), sink.unit)
            for unit, piece in zip(run, pieces, strict=True):
                pending.append(pool.submit(sink.write, unit, piece))
                while len(pending) > _PENDING:
                    pending.popleft().result()
        while pending:
            pending.popleft().result()


def slice_size(image_shape: Sequence[int]) -> int:
    """Images in a network call on the CPU: 64 of 32x32 pixels, fewer of larger images.

    A power of two, at most the 64 of a block; it depends only on the shape.
    """
    pixels = image_shape[1] * image_shape[2]
    fitting = max(1, min(BLOCK, BLOCK * 32 * 32 // pixels))
    return 1 << (fitting.bit_length() - 1)


def in_slices(network: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Call ``network`` with ``size`` images at a time; a batch must be a multiple of ``size``.

    Named arguments are tensors with a row for each image, such as labels.
    """

    # A compiled network then is one graph for a slice, not one for all slices of a batch.
    @partial(torch.compiler.disable, recursive=False)
    def call(x: Tensor, n: Tensor, **rows: Tensor) -> Any:
        parts = zip(*(one.split(size) for one in (x, n, *rows.values())), strict=True)
        outputs = [network(x, n, **dict(zip(rows, r, strict=True))) for x, n, *r in parts]
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


def _as_images(batch: Tensor) -> Images:
    return np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
