"""Fashion-MNIST, from its four published files in the idx format."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from sa_files.reading import check_bound, reading, size_of, unpack_gzip

from ..data import Images
from ._common import check_choice, first_folder
from ._registry import register

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
ADVICE = (
    "apt install dataset-fashion-mnist, or in Python "
    "torchvision.datasets.FashionMNIST(ROOT, download=True) with this data's root"
)
FILES = {"train": "train", "test": "t10k"}
# md5 of the unpacked files. The published sums are for the .gz files; their headers vary by source.
SUMS = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
PADDING = 2  # on each side: 28 + 4 = 32, which halves often enough for a UNet


@register("fashion")
def fashion(root: Path, *, split: str = "train", check_md5: bool = True) -> Images:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 training or 10,000 test images, [1,32,32].

    The 28x28 grey images are padded to 32x32 with black. The files, packed (.gz) or not, are read
    from `FashionMNIST/raw` below `root` (where torchvision keeps them), from `fashion-mnist` below
    `root`, or from the folder of the Debian package dataset-fashion-mnist. `check_md5=False`
    accepts files of the same format with other contents.
    """
    check_choice("split", split, tuple(FILES))
    places = (root / "FashionMNIST" / "raw", root / "fashion-mnist", DEBIAN_FOLDER)
    folder = first_folder("fashion", places, ADVICE)
    images = _read_idx(folder, f"{FILES[split]}-images-idx3-ubyte", (28, 28), check_md5)
    labels = _read_idx(folder, f"{FILES[split]}-labels-idx1-ubyte", (), check_md5)
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images)} images of {split!r}, {len(labels)} labels")
    padded = F.pad(torch.from_numpy(images)[:, None], (PADDING,) * 4)
    return Images(padded, torch.from_numpy(labels).to(torch.int64))


def _read_idx(
    folder: Path, name: str, item: tuple[int, ...], check_md5: bool
) -> npt.NDArray[np.uint8]:
    """The array [M, *item] in an idx file: magic number, sizes (big endian), then the bytes."""
    path, content = _read(folder, name)
    if check_md5 and (md5 := hashlib.md5(content).hexdigest()) != SUMS[name]:
        raise ValueError(f"{path} has the md5 {md5} unpacked: must be {SUMS[name]}; {ADVICE}")
    ndim = 1 + len(item)
    header = struct.Struct(f">{1 + ndim}I")
    magic, *shape = header.unpack(content[: header.size].ljust(header.size))
    if magic != 0x800 + ndim or tuple(shape[1:]) != item:
        raise ValueError(f"{path} is damaged: it is no idx file of uint8 items of shape {item}")
    data = np.frombuffer(bytearray(content[header.size :]), np.uint8)
    if data.size != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: {data.size} bytes follow the header, must be {math.prod(shape)}"
        )
    return data.reshape(shape)


def _read(folder: Path, name: str) -> tuple[Path, bytes]:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        with reading(plain, "is damaged") as file:
            check_bound(size_of(file), 0)
            return plain, file.read()
    if not packed.is_file():
        raise ValueError(
            f"dataset 'fashion' is incomplete: {folder} holds neither {plain.name} nor "
            f"{packed.name}; {ADVICE}"
        )
    with reading(packed, "is damaged") as file:
        return packed, unpack_gzip(file)
