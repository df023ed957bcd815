"""The datasets by name. To add one, write a function (root, ...) -> dataset under `register`.

    digits          8x8 handwritten digits, which come with scikit-learn
    cifar10         32x32 colour photographs
    fashion         28x28 pieces of clothing, padded to 32x32
    celeba64        the middle of aligned CelebA at 64x64
    celebahq256     CelebA-HQ at 256x256
    imagenet64      downsampled ImageNet, 64x64
    lsun_bedroom    bedrooms at 256x256
    folder, npz     images of any kind

Datasets that fit into memory are `Images`; the others are `StoredImages`, read by worker processes.
Both have `image_shape` and `uint8_batches(batch_size)`. Only CIFAR10's files are unpickled, and
only arrays are rebuilt from them.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from sa_files.reading import UnreadableFile

from ..data import ImageDataset
from . import archives, cifar10, digits, fashion, folders  # noqa: F401 - they register themselves
from ._registry import DATASETS, register

__all__ = ["DATASETS", "DEFAULT_ROOT", "IMAGE_SHAPES", "get_dataset", "register"]

DEFAULT_ROOT = "data"

# (C, H, W) of the datasets with a fixed size: known without their files.
IMAGE_SHAPES = {
    "digits": (1, 8, 8),
    "fashion": (1, 32, 32),
    "cifar10": (3, 32, 32),
    "celeba64": (3, 64, 64),
    "imagenet64": (3, 64, 64),
    "lsun_bedroom": (3, 256, 256),
    "celebahq256": (3, 256, 256),
}


def get_dataset(
    name: str, root: str | os.PathLike[str] | None = None, **options: Any
) -> ImageDataset:
    """The dataset called `name`, from files below `root` (default: the folder `data`).

    For `folder` and `npz`, `root` itself is the folder or the file.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r}: must be one of {', '.join(sorted(DATASETS))}")
    loader = DATASETS[name]
    known = list(inspect.signature(loader).parameters)[1:]
    for option in options:
        if option not in known:
            allowed = f"has the options {', '.join(known)}" if known else "has no options"
            raise ValueError(f"dataset {name!r} has no option {option!r}: it {allowed}")
    place = Path(DEFAULT_ROOT if root is None else root).expanduser().absolute()
    try:
        return loader(place, **options)
    except ValueError as error:  # it holds names of files, which can hold anything
        raise UnreadableFile(str(error)) from error
