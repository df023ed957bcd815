"""Arrays of images in .npy files, mapped into memory rather than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sa_files.arrays import map_npy
from sa_files.reading import reading

from ..data import StoredImages


class MappedArrays(StoredImages):
    """The images of several .npy files, one after another: uint8 of [M,C,H,W] or [M,C*H*W].

    Each process maps the files at its first read.
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], image_shape: Sequence[int]
    ) -> None:
        self.paths = tuple(paths)
        self.counts = tuple(counts)
        self._shape = tuple(image_shape)
        self._ends = np.cumsum(self.counts)
        self._arrays: list[npt.NDArray[np.uint8]] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Tensor:
        i = range(len(self))[i]
        part = int(np.searchsorted(self._ends, i, side="right"))
        if self._arrays is None:
            self._arrays = [self._map(*file) for file in zip(self.paths, self.counts, strict=True)]
        image = self._arrays[part][i - int(self._ends[part])]  # counted from the part's end
        return torch.from_numpy(np.array(image))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # a pickled mapped array would be a full copy

    def _map(self, path: Path, count: int) -> npt.NDArray[np.uint8]:
        with reading(path, "is damaged: delete it, it will be made anew") as file:
            array = map_npy(file)
            if array.dtype != np.uint8:
                raise ValueError(f"its dtype is {array.dtype}, must be uint8")
            return array.reshape(count, *self._shape)
