"""Endless batches, in an order that depends only on the seed and the position.

Images are in [-1, 1], float32, [B,C,H,W]. Each epoch is one permutation. A batch may continue past
the end of an epoch, so all batches are full and every image is seen once an epoch.

A dataset is `Images` (held in memory) or a subclass of `StoredImages` (read on demand). Both are an
`ImageDataset`.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .order import CROPS, InfiniteCoins, InfiniteShuffle, InfiniteUniforms, Part

_HAS_WAIT = hasattr(signal, "sigwaitinfo")  # not on macOS
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread, however many are taken
WORTH_WORKERS = 1000  # images; fewer are read faster than worker processes start


class ImageDataset(Protocol):
    """The interface of every dataset, in memory or stored."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""

    def __len__(self) -> int: ...

    def uint8_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B,C,H,W]; the last batch may be smaller."""


@dataclass(frozen=True, eq=False)
class Images:
    """A dataset held in memory: uint8 in 0..255, or floating point in [-1, 1], [M,C,H,W]."""

    images: Tensor
    labels: Tensor | None = None  # [M]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.numel() == 0:
            raise ValueError(
                f"images has shape {tuple(self.images.shape)}: must be [M,C,H,W], each at least 1"
            )
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"labels has {len(self.labels)} entries, images {len(self.images)}")
        _check_range(self.images)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    def uint8_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B,C,H,W]; the last batch may be smaller."""
        _check_batch_size(batch_size)
        return (to_uint8(batch) for batch in self.images.split(batch_size))


class StoredImages(Dataset[Tensor], ABC):
    """A map-style dataset of uint8 images [C,H,W], each read on demand.

    A subclass defines `image_shape`, `__len__` and `__getitem__`. It is passed to worker processes,
    so it must open on demand what cannot or should not be pickled (an open file, a mapped array).
    """

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Tensor: ...

    def prepare(self) -> None:
        """Called once before images are read, by one process for all; does nothing here."""

    def uint8_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B,C,H,W]; the last batch may be smaller."""
        _check_batch_size(batch_size)
        self.prepare()
        return self._read_in_order(batch_size)

    def _read_in_order(self, batch_size: int) -> Iterator[Tensor]:
        workers = default_workers() if len(self) >= WORTH_WORKERS else 0
        generator = torch.Generator().manual_seed(0)  # or the loader would use the global one
        return _plain_errors(
            DataLoader(
                self,
                batch_size=batch_size,
                num_workers=workers,
                generator=generator,
                worker_init_fn=_outlive_signals,
            )
        )


def default_workers() -> int:
    """Processes that read images: the number of cores, at most 4."""
    return min(4, os.cpu_count() or 1)


def spread_rows(length: int, count: int) -> list[int]:
    """`count` of the numbers 0..length - 1 at even distances; all if there are fewer.

    In an order in which the first few are spread, too: a picture may have no room for more.
    """
    count = min(count, length)
    order = sorted(range(count), key=lambda i: i * GOLDEN % 1)
    return [i * length // count for i in order]


def spread_images(dataset: ImageDataset, count: int) -> Tensor:
    """The images of `spread_rows`, uint8 [count,C,H,W]: in a sorted folder, of all classes."""
    rows = spread_rows(len(dataset), count)
    if isinstance(dataset, StoredImages):  # others are in memory, or can be read in order alone
        return torch.stack([dataset[i] for i in rows])
    chosen, batches = set(rows), dataset.uint8_batches(1)
    found = {i: batch for i, batch in enumerate(batches) if i in chosen}
    return torch.cat([found[i] for i in rows])


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; floating point is only cast."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(127.5).sub_(1.0)
    return images.to(torch.float32)


def to_uint8(images: Tensor) -> Tensor:
    """Floating point in [-1, 1] to uint8, rounded and clamped; uint8 is returned unchanged."""
    if images.dtype == torch.uint8:
        return images
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class BatchStream(Iterator[Tensor]):
    """Batches of `dataset` on `device`; `position` counts the batches returned and can be set.

    dataset   Images, or a tensor of the same form: kept on the device; a batch is one index
              operation. Otherwise a map-style dataset of images [C,H,W], or of tuples that begin
              with one, read by `workers` processes (default: `default_workers()`). It must return
              the same image for the same index, or a continued run differs from an unbroken one.
    part      (rank, world): each batch is split into `world` equal parts; this stream returns only
              the rank-th
    flip      mirror each image, left to right, with probability 1/2; which ones depends only on the
              seed and the position
    crop      take a square at a random place of each image, in place of the middle one. The dataset
              is then asked for (i, place in [0, 1)), and places depend only on seed and position
    """

    def __init__(
        self,
        dataset: ImageDataset | Tensor | Dataset[Any],
        batch_size: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        part: tuple[int, int] = (0, 1),
        flip: bool = False,
        crop: bool = False,
    ) -> None:
        _check_batch_size(batch_size)
        check_world(batch_size, part[1])
        if isinstance(dataset, Tensor):
            dataset = Images(dataset)
        if crop and isinstance(dataset, Images):
            raise ValueError("crop=True: must be False for images in memory, which have one size")
        self.batch_size = batch_size
        self.part = part
        self.device = torch.device(device)
        self.workers = default_workers() if workers is None else workers
        self._shuffle = InfiniteShuffle(len(dataset), seed)  # type: ignore[arg-type]
        self._coins = InfiniteCoins(self._shuffle.length, seed) if flip else None
        self._crop = crop
        self._images = dataset.images.to(self.device) if isinstance(dataset, Images) else None
        self._dataset = dataset
        self._loader: Iterator[Any] | None = None
        self._position = 0

    @property
    def position(self) -> int:
        """The number of batches returned."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if position < 0:
            raise ValueError(f"position={position!r}: must not be negative")
        self._position = position
        self._loader = None  # its workers have read ahead from the old position

    def __next__(self) -> Tensor:
        batch = self._gather() if self._images is not None else self._load()
        if self._coins is not None:
            coins = torch.from_numpy(self.of_batch(self._coins))
            chosen = coins.to(self.device, non_blocking=True).bool()
            batch = torch.where(chosen[:, None, None, None], batch.flip(3), batch)
        self._position += 1
        return to_unit_range(batch)

    def indices(self) -> npt.NDArray[np.int64]:
        """Which images are in the next batch."""
        return self.of_batch(self._shuffle)

    def uniforms(self, stream: int) -> InfiniteUniforms:
        """Numbers in [0, 1) for ``of_batch``, from this stream's seed."""
        return InfiniteUniforms(self._shuffle.length, self._shuffle.seed, stream)

    def of_batch(self, sequence: InfiniteShuffle) -> npt.NDArray[Any]:
        """The values of a sequence that belong to the images of the next batch."""
        return Part(sequence, self.batch_size, self.part).at(self._position)

    def _gather(self) -> Tensor:
        indices = torch.from_numpy(self.indices())
        return self._images[indices.to(self.device, non_blocking=True)]

    def _load(self) -> Tensor:
        first = self._loader is None
        if self._loader is None:
            self._loader = self._start_loader()
        batch = next(self._loader)
        images = batch if isinstance(batch, Tensor) else batch[0]
        if first:
            _check_range(images)
        return images.to(self.device, non_blocking=True)

    def _start_loader(self) -> Iterator[Any]:
        if isinstance(self._dataset, StoredImages):
            self._dataset.prepare()
        loader = DataLoader(
            self._dataset,
            batch_size=self.batch_size // self.part[1],
            sampler=self._sampler(),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Otherwise the loader would draw from the global generator. A continued run starts one
            # more loader and would then see other noise.
            generator=torch.Generator().manual_seed(self._shuffle.seed),
            worker_init_fn=_outlive_signals,
        )
        return _plain_errors(loader)

    def _sampler(self) -> Iterable[Any]:
        """The images from this position on, with their places where they are cropped."""
        where = (self.batch_size, self.part, self._position)
        indices = Part(self._shuffle, *where)
        if not self._crop:
            return indices
        return zip(indices, Part(self.uniforms(CROPS), *where), strict=True)


def _outlive_signals(_: int) -> None:
    """Let a loader's worker survive signals: its run stops it and may still need some batches.

    Terminals and batch systems signal all processes of a job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _HAS_WAIT:
        threading.Thread(target=_end_for_the_run_alone, daemon=True).start()


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Within the block SIGTERM waits; processes that start there block it for good.

    They inherit it, and so does each thread of theirs: PyTorch starts some before the worker's init
    function, and one that does not block the signal would get it.
    """
    if not _HAS_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_for_the_run_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _plain_errors(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; a worker's ValueError is raised with its message only."""
    with _sigterm_blocked():
        batches = iter(loader)
    try:
        yield from batches
        return
    except ValueError as error:
        message = str(*error.args[:1]).strip()  # with its lines
        if not re.match(r"Caught \w+ in DataLoader worker", message):
            raise
        # The error refers to the loader's iterator. If the iterator stayed alive, workers forked
        # later would try to end its workers and wait for them for ever.
        error.__traceback__ = None
    del batches
    raise ValueError(message.splitlines()[-1].partition(": ")[2])  # after the error's class


def check_world(batch_size: int, world: int) -> None:
    """ValueError unless `world` processes can share a batch equally."""
    if batch_size % world:
        raise ValueError(
            f"batch_size={batch_size!r}: must be a multiple of the number of processes, {world}"
        )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be at least 1")


def _check_range(images: Tensor) -> None:
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}: must be uint8 or floating point")
    low, high = images.min().item(), images.max().item()
    if not -1 <= low <= high <= 1:
        raise ValueError(f"images has values in [{low:g}, {high:g}]: must lie in [-1, 1]")
