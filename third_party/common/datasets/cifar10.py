"""CIFAR10, from the published archive or from its unpacked folder."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Images
from . import register
from ._common import check_choice, not_found, one_line


@register("cifar10")
def cifar10(root: Path, *, split: str = "train", check_md5: bool = True) -> Images:
    """CIFAR10 (Krizhevsky 2009): 50,000 training or 10,000 test images, unflipped, [3,32,32].

    Read from the folder `cifar-10-batches-py` below `root`, or else from the archive, which need
    not be unpacked. `check_md5=False` accepts files of the same format with other contents.
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
        if check_md5 and (md5 := hashlib.md5(content).hexdigest()) != sums[name]:
            raise ValueError(
                f"{name} of dataset 'cifar10' below {root} has md5 {md5}: must be {sums[name]}; "
                f"download {CIFAR10.url} again"
            )
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.extend(batch["labels"])
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"{name} of dataset 'cifar10' below {root} cannot be read: {one_line(error)}"
            ) from error
    return Images(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


def _from_folder(folder: Path, names: dict[str, str]) -> dict[str, bytes]:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"dataset 'cifar10' is incomplete: {folder / name} is missing")
    return {name: (folder / name).read_bytes() for name in names}


def _from_archive(archive: Path, names: dict[str, str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in names and (file := tar.extractfile(member)) is not None:
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"dataset 'cifar10': {archive} is damaged ({error})") from error
    for name in names:
        if name not in found:
            raise ValueError(f"dataset 'cifar10' is incomplete: {archive} holds no {name}")
    return {name: found[name] for name in names}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and nothing else: a file from elsewhere cannot run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"the file asks for {module}.{name}: only arrays are read")
        return super().find_class(module, name)
