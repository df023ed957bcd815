"""Folders of images: CelebA, CelebA-HQ, exported LSUN, and any others."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sa_files.reading import UnreadableFile
from sa_files.writing import written_atomically

from ..data import StoredImages
from ._common import first_folder
from ._registry import register
from .listing import SUFFIXES as SUFFIXES
from .listing import classes_of, list_images
from .mapped import MappedArrays
from .pixels import Preparation, read_image
from .survey import survey

logger = logging.getLogger(__name__)

CACHE_LIMIT = 8 * 2**30
_CACHED_AT_ONCE = 256


@register("celeba64")
def celeba64(root: Path, *, cache_limit: int = CACHE_LIMIT) -> ImageFolder:
    """Aligned CelebA (Liu et al. 2015): rows 57..185 and columns 25..153 of 218x178, at 64x64.

    All images of the folder are used; the published split is ignored.
    """
    advice = (
        "download img_align_celeba.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and "
        "unpack it there"
    )
    places = (root / "img_align_celeba", root / "celeba" / "img_align_celeba")
    preparation = Preparation(crop=(25, 57, 153, 185), size=64, expected=(178, 218))
    folder = first_folder("celeba64", places, advice)
    return ImageFolder(folder, preparation, cache_limit=cache_limit)


@register("celebahq256")
def celebahq256(root: Path, *, cache_limit: int = 0) -> ImageFolder:
    """CelebA-HQ (arXiv 1710.10196) as a folder of 256x256 images."""
    advice = "put the 256x256 images (https://github.com/tkarras/progressive_growing_of_gans) there"
    folder = first_folder("celebahq256", (root / "celebahq256",), advice)
    return ImageFolder(folder, Preparation(expected=(256, 256)), cache_limit=cache_limit)


@register("lsun_bedroom")
def lsun_bedroom(root: Path, *, cache_limit: int = 0) -> ImageFolder:
    """LSUN's bedrooms (arXiv 1506.03365) as a folder of images: the middle square, at 256x256."""
    advice = "export the images of bedroom_train_lmdb (https://github.com/fyu/lsun) there"
    folder = first_folder("lsun_bedroom", (root / "lsun_bedroom",), advice)
    return ImageFolder(folder, Preparation(size=256), cache_limit=cache_limit)


@register("folder")
def folder(
    root: Path,
    *,
    size: int | None = None,
    channels: int = 3,
    follow_links: bool = False,
    labels: bool = False,
    cache_limit: int = 0,
) -> ImageFolder:
    """The images in the folder `root` itself and below it, at least 2; all headers are read first.

    size           height and width to which the middle square of each image is resized; None: the
                   images are not changed and must all have one size
    channels       3: all are read as RGB; 1: as grey; 0: as found, all grey or all in colour
    follow_links   also read what links lead to outside `root`
    labels         the sub-folders of `root` are the classes of the images in and below them
    """
    first_folder("folder", (root,), "give the folder that holds the images as the root")
    preparation = Preparation(size=size, channels=channels)
    found = ImageFolder(root, preparation, cache_limit=cache_limit, follow_links=follow_links)
    if len(found) < 2:
        raise ValueError(f"{root} holds one image, {found.path(0).name}: must hold at least 2")
    if labels:
        found.find_classes()
    survey(root, map(found.path, range(len(found))), preparation)
    return found


class ImageFolder(StoredImages):
    """The images in a folder and below it, in the order of their names.

    cache_limit   if the prepared images take at most this many bytes, the first read writes them to
                  a cache file next to the folder; otherwise each file is decoded every time. The
                  cache's name depends on the files (names, sizes, times) and the preparation; if
                  they change, a new cache is made.
    follow_links  also read what links lead to outside the folder
    """

    class_names: tuple[str, ...] | None = None
    labels: Tensor | None = None  # [M], after `find_classes`

    def __init__(
        self,
        folder: Path,
        preparation: Preparation,
        *,
        cache_limit: int = 0,
        follow_links: bool = True,
    ) -> None:
        if cache_limit < 0:
            raise ValueError(f"cache_limit={cache_limit!r}: must not be negative")
        self.folder = folder
        self.preparation = preparation
        self._names = list_images(folder, follow_links=follow_links)
        self._shape = tuple(read_image(self.path(0), preparation).shape)
        self._to_cache = len(self) * math.prod(self._shape) <= cache_limit
        self._cache: MappedArrays | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int | tuple[int, float]) -> Tensor:
        """The i-th image; for (i, place), with the square at a place of `decode_image`."""
        i, at = i if isinstance(i, tuple) else (i, None)
        if self._cache is not None and at is None:
            return self._cache[i]
        path = self.path(range(len(self))[i])
        image = read_image(path, self.preparation, at)
        if tuple(image.shape) != self._shape:
            raise UnreadableFile(
                f"image {path} has the shape {tuple(image.shape)}, the first one {self._shape}: "
                "all must have the same, or give a size"
            )
        return image

    def find_classes(self) -> None:
        """Set `class_names` and `labels` from the sub-folders, as ``listing.classes_of``."""
        self.class_names, labels = classes_of(self.folder, self._names)
        self.labels = torch.tensor(labels)

    def path(self, i: int) -> Path:
        """The file of the i-th image."""
        return self.folder / os.fsdecode(self._names[i])

    def prepare(self) -> None:
        """Open the cache; make it first if it does not exist."""
        if not self._to_cache or self._cache is not None:
            return
        path = self._cache_path()
        try:
            if not path.exists():
                self._write_cache(path)
        except OSError as error:
            logger.warning("%s cannot be written, the images stay uncached: %s", path, error)
            self._to_cache = False
            return
        self._cache = MappedArrays([path], [len(self)], self._shape)

    def _cache_path(self) -> Path:
        digest = hashlib.sha256(repr(self.preparation).encode())
        for i in range(len(self)):
            stat = self.path(i).stat()
            digest.update(b"%s\0%d %d\0" % (self._names[i], stat.st_size, stat.st_mtime_ns))
        sides = "x".join(map(str, self._shape[1:]))
        return self.folder.with_name(f"{self.folder.name}-{sides}-{digest.hexdigest()[:12]}.npy")

    def _write_cache(self, path: Path) -> None:
        logger.info("writing %s, once", path)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self), *self._shape)}
        # Written, not mapped: on a full disk a mapped file would end the process without an error.
        with written_atomically(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            with tqdm(total=len(self), unit="img", desc=self.folder.name, disable=None) as progress:
                for batch in self._read_in_order(_CACHED_AT_ONCE):
                    file.write(batch.numpy().tobytes())
                    progress.update(len(batch))
