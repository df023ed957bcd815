"""Images in .npz files: downsampled ImageNet, and any others. Pickles are never read."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sa_files.arrays import open_npz
from sa_files.reading import reading
from sa_files.writing import written_atomically

from ..data import Images, StoredImages
from ._common import check_choice, first_folder, not_found
from ._registry import register
from .mapped import MappedArrays

logger = logging.getLogger(__name__)

IMAGENET64_SHAPE = (3, 64, 64)
IMAGENET64_ADVICE = (
    "download the npz files of ImageNet 64x64 from https://image-net.org/download-images and "
    "unpack them there"
)
NPZ_NAME = "images.npz"
NPZ_KEYS = ("arr_0", "images")
LAYOUTS = ("auto", "NHWC", "NCHW")


@register("imagenet64")
def imagenet64(root: Path, *, split: str = "train") -> NpzParts:
    """Downsampled ImageNet (arXiv 1707.08819), [3,64,64], from its npz files in `imagenet64`.

    train_data_batch_1.npz, ... or val_data.npz, each with `data`, uint8 [M,12288]; the labels are
    not read. The first read unpacks the arrays into the folder of the files.
    """
    check_choice("split", split, ("train", "val"))
    folder = first_folder("imagenet64", (root / "imagenet64",), IMAGENET64_ADVICE)
    stems = ["val_data"]
    if split == "train":
        found = (re.match(r"train_data_batch_(\d+)", path.name) for path in folder.iterdir())
        highest = max((int(match[1]) for match in found if match), default=1)
        stems = [f"train_data_batch_{number}" for number in range(1, highest + 1)]
    for stem in stems:
        if (folder / f"{stem}.npz").is_file():
            continue
        if (folder / stem).is_file():
            raise ValueError(
                f"{folder / stem} is a python pickle, which could run code: {IMAGENET64_ADVICE}"
            )
        raise not_found("imagenet64", [folder / f"{stem}.npz"], IMAGENET64_ADVICE)
    return NpzParts([folder / f"{stem}.npz" for stem in stems], "data", IMAGENET64_SHAPE)


@register("npz")
def npz(root: Path, *, layout: str = "auto") -> Images:
    """The images of one npz file, held in memory: `root` itself, or images.npz in it.

    Its array `arr_0` or `images` is uint8, [M,H,W,C] or [M,C,H,W] with C = 1 or 3. `layout` selects
    one if the shape fits both. An array `labels` [M] is read too.
    """
    check_choice("layout", layout, LAYOUTS)
    path = root if root.is_file() else root / NPZ_NAME
    if not path.is_file():
        raise not_found("npz", (root, path), "give the npz file as the root")
    with reading(path, "cannot be used") as file, open_npz(file) as arrays:
        key = next((key for key in NPZ_KEYS if key in arrays), None)
        if key is None:
            raise ValueError(f"it holds {list(arrays.names)}, must hold one of {list(NPZ_KEYS)}")
        images = _channels_first(arrays[key], layout)
        labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
        return Images(torch.from_numpy(np.ascontiguousarray(images)), labels)


def _channels_first(images: npt.NDArray[np.uint8], layout: str) -> npt.NDArray[np.uint8]:
    """[M,C,H,W] from either layout."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"its images are {images.dtype} of shape {images.shape}, must be uint8 with 4 axes"
        )
    axes = {"NCHW": 1, "NHWC": 3}
    fitting = [name for name, axis in axes.items() if images.shape[axis] in (1, 3)]
    if layout == "auto" and len(fitting) == 2:
        raise ValueError(f"its images' shape {images.shape} fits both layouts: give layout=")
    if not fitting or layout not in ("auto", *fitting):
        raise ValueError(f"its images' shape {images.shape} has no axis of 1 or 3 channels there")
    chosen = fitting[0] if layout == "auto" else layout
    return images if chosen == "NCHW" else images.transpose(0, 3, 1, 2)


class NpzParts(StoredImages):
    """The images of several npz files: under `key`, uint8 [M,C,H,W] or [M,C*H*W].

    An array inside an npz file cannot be mapped, so each array is unpacked once into the folder of
    its file, as STEM-KEY-CHECKSUM.npy.
    """

    def __init__(self, paths: Sequence[Path], key: str, image_shape: tuple[int, ...]) -> None:
        self.paths = tuple(paths)
        self.key = key
        self._shape = image_shape
        self._counts = [_count(path, key, image_shape) for path in self.paths]
        self._mapped: MappedArrays | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, i: int) -> Tensor:
        return self._open()[i]

    def prepare(self) -> None:
        """Unpack the arrays that are not unpacked yet."""
        self._open()

    def _open(self) -> MappedArrays:
        if self._mapped is None:
            unpacked = [_unpack(path, self.key) for path in self.paths]
            self._mapped = MappedArrays(unpacked, self._counts, self._shape)
        return self._mapped


def _count(path: Path, key: str, image_shape: tuple[int, ...]) -> int:
    """The number of images in an npz file under `key`, from the array's header."""
    with reading(path, "cannot be used") as file, open_npz(file) as arrays:
        shape, columns_first, dtype = arrays.header(key)
    flat = (int(np.prod(image_shape)),)
    if dtype != np.uint8 or columns_first or shape[1:] not in (flat, image_shape):
        raise ValueError(
            f"{path} holds under {key!r} {dtype} of shape {shape}, must be uint8 of [M, "
            f"{flat[0]}] or [M, {', '.join(map(str, image_shape))}]"
        )
    return shape[0]


def _unpack(path: Path, key: str) -> Path:
    """The npy file with the array of an npz file, written if it does not exist."""
    with reading(path, "cannot be unpacked beside itself") as file, open_npz(file) as arrays:
        target = path.with_name(f"{path.stem}-{key}-{arrays.checksum(key):08x}.npy")
        if target.is_file() and target.stat().st_size == arrays.size(key):
            return target
        logger.info("unpacking %s to %s, once", path, target)
        with arrays.unpack(key) as packed, written_atomically(target) as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**24)
    return target
