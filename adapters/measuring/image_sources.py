"""Open images from a folder, an npz file, tar shards, or a dataset's name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sa_files.reading import reading, reason, tar_files
from third_party.common.data import ImageDataset
from third_party.common.datasets import DATASETS, get_dataset
from third_party.common.datasets.listing import SUFFIXES
from third_party.common.datasets.pixels import Preparation, decode_image


def open_images(
    source: str,
    *,
    data_root: str | Path | None = None,
    size: int = 0,
    channels: int = 3,
    follow_links: bool = False,
) -> ImageDataset:
    """Open the images of a folder (image files or tar shards), an .npz, a .tar, or a dataset.

    Args:
        source: its path, or the name of a dataset; a split follows a colon (``cifar10:test``).
        data_root: the folder of the datasets.
        size: the side of the squares to which image files are cropped and resized; 0: as they are.
        channels: of image files: 3 reads all as RGB, 1 as grey.
        follow_links: also read what links lead to outside a folder.
    """
    path = Path(source).expanduser()
    if has_files(source):
        preparation = Preparation(size=size or None, channels=channels)
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if shards:
            return TarImages(shards, preparation)
        return get_dataset(
            "folder",
            path,
            size=preparation.size,
            channels=channels,
            follow_links=follow_links,
        )
    if path.suffix == ".npz":
        return get_dataset("npz", path)
    name, _, split = source.partition(":")
    if name in DATASETS and name not in ("folder", "npz"):
        return get_dataset(name, data_root, **({"split": split} if split else {}))
    raise ValueError(
        f"images must be a folder, an .npz or .tar file, or one of {', '.join(sorted(DATASETS))}, "
        f"got {source!r}"
    )


def has_files(source: str) -> bool:
    """Whether the images are files: they are read in the size and the channels asked for."""
    path = Path(source).expanduser()
    return path.is_dir() or (path.suffix == ".tar" and path.is_file())


class TarImages:
    """The image files in tar shards, in the order of the shards and of their entries."""

    def __init__(self, paths: list[Path], preparation: Preparation) -> None:
        self.paths = paths
        self.preparation = preparation
        first = next(self._encoded(), None)
        if first is None:
            raise ValueError(f"{paths[0].parent} holds no images: its tar files contain none")
        self._shape = tuple(self._decoded(*first).shape)
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
                    f"images must have the same shape, or give --size: got {shapes} in "
                    f"{self.paths[0]}..."
                )
            yield torch.stack(batch)

    def _encoded(self) -> Iterator[tuple[str, io.BytesIO]]:
        for path in self.paths:
            with reading(path, "is damaged") as shard:
                for name, content in tar_files(shard, _is_image):
                    yield f"{path}/{name}", io.BytesIO(content)

    def _decoded(self, name: str, file: io.BytesIO) -> Tensor:
        with _named(name):
            return decode_image(file, self.preparation)


@contextmanager
def _named(image: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on damaged bytes a decoder can raise anything
        raise ValueError(f"image {image} cannot be used: {reason(error)}") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
