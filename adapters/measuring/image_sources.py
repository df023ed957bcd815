"""Open images from a folder, an npz file, tar shards, or a dataset's name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sa_files.reading import reading, reason, tar_files
from third_party.common.data import ImageDataset
from third_party.common.datasets import DATASETS, get_dataset
from third_party.common.datasets.folders import SUFFIXES
from third_party.common.datasets.pixels import MODES, Preparation, decode_image, open_image


def open_images(source: str, *, data_root: str | Path | None = None) -> ImageDataset:
    """Open the images of a folder (image files or tar shards), an .npz, a .tar, or a dataset.

    A dataset's split follows a colon (``cifar10:test``); its files are below ``data_root``. All
    images of a source are read as grey if its first image is grey.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return TarImages(shards) if shards else _folder(path)
    if path.suffix == ".tar" and path.is_file():
        return TarImages([path])
    if path.suffix == ".npz":
        return get_dataset("npz", path)
    name, _, split = source.partition(":")
    if name in DATASETS and name not in ("folder", "npz"):
        return get_dataset(name, data_root, **({"split": split} if split else {}))
    raise ValueError(
        f"images must be a folder, an .npz or .tar file, or one of {', '.join(sorted(DATASETS))}, "
        f"got {source!r}"
    )


class TarImages:
    """The image files in tar shards, in the order of the shards and of their entries."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._channels = 3
        first = next(self._encoded(), None)
        if first is None:
            raise ValueError(f"{paths[0].parent} holds no images: its tar files contain none")
        name, file = first
        with _named(name):
            self._channels = _channels(file)
        self._shape = tuple(self._decoded(name, file).shape)
        self._count: int | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._encoded())
        return self._count

    def uint8_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B, C, H, W]; the last batch may be smaller."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be at least 1")
        images = (self._decoded(*entry) for entry in self._encoded())
        while batch := list(islice(images, batch_size)):
            shapes = {tuple(image.shape) for image in batch} | {self._shape}
            if len(shapes) > 1:
                raise ValueError(
                    f"images must have the same shape, got {shapes} in {self.paths[0]}..."
                )
            yield torch.stack(batch)

    def _encoded(self) -> Iterator[tuple[str, io.BytesIO]]:
        for path in self.paths:
            with reading(path, "is damaged") as shard:
                for name, content in tar_files(shard, _is_image):
                    yield f"{path}/{name}", io.BytesIO(content)

    def _decoded(self, name: str, file: io.BytesIO) -> Tensor:
        with _named(name):
            return decode_image(file, Preparation(channels=self._channels))


def _folder(path: Path) -> ImageDataset:
    found = get_dataset("folder", path)
    with reading(found.path(0), "cannot be used as an image") as first:  # type: ignore[attr-defined]
        return found if _channels(first) == 3 else get_dataset("folder", path, channels=1)


@contextmanager
def _named(image: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on damaged bytes a decoder can raise anything
        raise ValueError(f"image {image} cannot be used: {reason(error)}") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _channels(file: BinaryIO) -> int:
    """1 for a grey image, else 3."""
    with open_image(file) as image:
        channels = 1 if image.mode in (MODES[1], "1") else 3
    file.seek(0)
    return channels
