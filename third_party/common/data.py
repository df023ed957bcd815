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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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
    labels: Tensor | None = None  # [M], for evaluation; training does not use them

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or len(self.images) == 0:
            raise ValueError(f"images has shape {tuple(self.images.shape)}: must be [M,C,H,W]")
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


class InfiniteShuffle(Sampler[int]):
    """The numbers 0..length-1 in an endless sequence, each once an epoch, from the `start`-th on.

    Epoch e is the permutation of NumPy's default generator seeded by (seed, e), so any place of the
    sequence is found without drawing the places before it.
    """

    def __init__(self, length: int, seed: int, start: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length={length!r}: must be at least 1")
        if seed < 0 or start < 0:
            raise ValueError(f"seed={seed!r}, start={start!r}: must not be negative")
        self.length = length
        self.seed = seed
        self.start = start
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[int]:
        place = self.start
        while True:
            epoch, offset = divmod(place, self.length)
            yield from self._epoch(epoch)[offset:].tolist()
            place += self.length - offset

    def take(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """`count` numbers of the sequence, from the `start`-th on."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.length)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._drawn(epoch))
        return self._cached[1]

    def _drawn(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)


class InfiniteCoins(InfiniteShuffle):
    """For each place of an `InfiniteShuffle` of this length and seed, 0 or 1 at random."""

    def _drawn(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch, 1)).integers(2, size=self.length)


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
    ) -> None:
        _check_batch_size(batch_size)
        check_world(batch_size, part[1])
        if isinstance(dataset, Tensor):
            dataset = Images(dataset)
        self.batch_size = batch_size
        self.part = part
        self.device = torch.device(device)
        self.workers = default_workers() if workers is None else workers
        self._shuffle = InfiniteShuffle(len(dataset), seed)  # type: ignore[arg-type]
        self._coins = InfiniteCoins(self._shuffle.length, seed) if flip else None
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
            coins = _Part(self._coins, self.batch_size, self.part).indices(self._position)
            chosen = torch.from_numpy(coins).to(self.device, non_blocking=True).bool()
            batch = torch.where(chosen[:, None, None, None], batch.flip(3), batch)
        self._position += 1
        return to_unit_range(batch)

    def _part(self, start: int) -> _Part:
        return _Part(self._shuffle, self.batch_size, self.part, start)

    def _gather(self) -> Tensor:
        indices = self._part(0).indices(self._position)
        return self._images[torch.from_numpy(indices).to(self.device, non_blocking=True)]

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
            sampler=self._part(self._position),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Otherwise the loader would draw from the global generator. A continued run starts one
            # more loader and would then see other noise.
            generator=torch.Generator().manual_seed(self._shuffle.seed),
            worker_init_fn=_outlive_signals,
        )
        return _plain_errors(loader)


class _Part(Sampler[int]):
    """The indices of one part of every batch, from the `start`-th batch on.

    It holds no reference to the stream: the loader's workers end when nothing refers to them.
    """

    def __init__(
        self, shuffle: InfiniteShuffle, batch_size: int, part: tuple[int, int], start: int = 0
    ) -> None:
        self.shuffle = shuffle
        self.batch_size = batch_size
        self.part = part
        self.start = start

    def indices(self, position: int) -> npt.NDArray[np.int64]:
        """The indices of the images of this part of the `position`-th batch."""
        rank, size = self.part[0], self.batch_size // self.part[1]
        return self.shuffle.take(position * self.batch_size + rank * size, size)

    def __iter__(self) -> Iterator[int]:
        for position in count(self.start):
            yield from self.indices(position).tolist()


def _outlive_signals(_: int) -> None:
    """Let a loader's worker survive signals: its run stops it and may still need some batches.

    Terminals and batch systems signal all processes of a job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_the_run_alone, daemon=True).start()


def _end_for_the_run_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _plain_errors(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; a worker's ValueError is raised with its message only."""
    batches = iter(loader)
    try:
        yield from batches
        return
    except ValueError as error:
        message = str(error).strip()
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
