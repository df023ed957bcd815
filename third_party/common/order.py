"""The order of images and the draws that belong to them, found at any place without the others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

CROPS, DROPS = 2, 3  # streams of `InfiniteUniforms`


class InfiniteShuffle:
    """The numbers 0..length-1 in an endless sequence, each once an epoch.

    Epoch e is the permutation of NumPy's default generator seeded by (seed, e), so any place of the
    sequence is found without drawing the places before it.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"length={length!r}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed!r}: must not be negative")
        self.length = length
        self.seed = seed
        self._cached: tuple[int, npt.NDArray[Any]] | None = None

    def take(self, start: int, count: int) -> npt.NDArray[Any]:
        """`count` values of the sequence, from the `start`-th on."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.length)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> npt.NDArray[Any]:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._drawn(epoch))
        return self._cached[1]

    def _drawn(self, epoch: int) -> npt.NDArray[Any]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)


class InfiniteCoins(InfiniteShuffle):
    """For each place of an `InfiniteShuffle` of this length and seed, 0 or 1 at random."""

    def _drawn(self, epoch: int) -> npt.NDArray[Any]:
        return np.random.default_rng((self.seed, epoch, 1)).integers(2, size=self.length)


class InfiniteUniforms(InfiniteShuffle):
    """For each place of an `InfiniteShuffle` of this length and seed, a number in [0, 1).

    The numbers of each `stream` are independent of those of the others.
    """

    def __init__(self, length: int, seed: int, stream: int) -> None:
        super().__init__(length, seed)
        self.stream = stream

    def _drawn(self, epoch: int) -> npt.NDArray[Any]:
        return np.random.default_rng((self.seed, epoch, self.stream)).random(self.length)


class Part(Sampler[Any]):
    """The values of one part of every batch, from the `start`-th batch on.

    part   (rank, world): each batch has `world` equal parts, of which this is the rank-th

    It holds no reference to a stream: a loader's workers end when nothing refers to them.
    """

    def __init__(
        self, sequence: InfiniteShuffle, batch_size: int, part: tuple[int, int], start: int = 0
    ) -> None:
        self.sequence = sequence
        self.batch_size = batch_size
        self.part = part
        self.start = start

    def at(self, position: int) -> npt.NDArray[Any]:
        """The values of this part of the `position`-th batch."""
        rank, size = self.part[0], self.batch_size // self.part[1]
        return self.sequence.take(position * self.batch_size + rank * size, size)

    def __iter__(self) -> Iterator[Any]:
        for position in count(self.start):
            yield from self.at(position).tolist()
