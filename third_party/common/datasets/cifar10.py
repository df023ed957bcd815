"""CIFAR10, from the published archive or from its unpacked folder."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import torch

from sa_files.pickled import PickledArray, load_pickled_arrays
from sa_files.reading import check_bound, reading, reason, size_of, tar_files, unpack_gzip

from ..data import Images
from ._common import check_choice, not_found
from ._registry import register

CLASSES = 10


@register("cifar10")
def cifar10(root: Path, *, split: str = "train", check_md5: bool = True) -> Images:
    """CIFAR10 (Krizhevsky 2009): 50,000 training or 10,000 test images, unflipped, [3,32,32].

    Read from the folder `cifar-10-batches-py` below `root` or, if it does not exist, from the
    packed archive. `check_md5=False` accepts files of the same format with other contents.
    """
    from torchvision.datasets import CIFAR10  # knows the files, their sums and their source

    check_choice("split", split, ("train", "test"))
    folder, archive = root / CIFAR10.base_folder, root / CIFAR10.filename
    if not folder.is_dir() and not archive.is_file():
        advice = f"download {CIFAR10.url} (md5 {CIFAR10.tgz_md5}) into {root}"
        raise not_found("cifar10", (folder, archive), advice)
    sums = dict(CIFAR10.train_list if split == "train" else CIFAR10.test_list)
    files = _from_folder(folder, sums) if folder.is_dir() else _from_archive(archive, sums)
    images, labels = [], []
    for name, content in files.items():
        place = folder / name if folder.is_dir() else f"{name} in {archive}"
        if check_md5 and (md5 := hashlib.md5(content).hexdigest()) != sums[name]:
            raise ValueError(
                f"{place} has md5 {md5}: must be {sums[name]}; download {CIFAR10.url} again"
            )
        try:
            pixels, classes = _batch(content)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"{place} cannot be read as a part of dataset 'cifar10': {reason(error)}"
            ) from error
        images.append(pixels)
        labels.extend(classes)
    return Images(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


def _from_folder(folder: Path, names: dict[str, str]) -> dict[str, bytes]:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"dataset 'cifar10' is incomplete: {folder / name} is missing")
    found = {}
    for name in names:
        with reading(folder / name, "cannot be read as a part of dataset 'cifar10'") as file:
            check_bound(size_of(file), 0)
            found[name] = file.read()
    return found


def _from_archive(archive: Path, names: dict[str, str]) -> dict[str, bytes]:
    def wanted(member: str) -> bool:
        return PurePosixPath(member).name in names

    with reading(archive, "is no archive of dataset 'cifar10', or damaged") as file:
        content = io.BytesIO(unpack_gzip(file))
        found = {PurePosixPath(name).name: part for name, part in tar_files(content, wanted)}
    for name in names:
        if name not in found:
            raise ValueError(f"dataset 'cifar10' is incomplete: {archive} holds no {name}")
    return {name: found[name] for name in names}


def _batch(content: bytes) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """The images [M,3,32,32] and the labels of a pickled batch."""
    batch = load_pickled_arrays(content)
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, PickledArray) or data.array is None or data.array.dtype != np.uint8:
        raise ValueError("its data must be an array of uint8")
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < CLASSES for label in labels
    ):
        raise ValueError(f"its labels must be a list of whole numbers in 0..{CLASSES - 1}")
    return data.array.reshape(-1, 3, 32, 32), labels
