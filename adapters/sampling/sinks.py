"""Where sampled images go: a folder of PNG files, one .npz, or tar shards.

Images are written in units, each whole or not at all, so the files on the disk show which units are
missing. The bytes depend only on the images, not on dates, owners or the order of writing.
"""

from __future__ import annotations

import io
import math
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sa_files.arrays import open_npz, read_header, read_npy
from sa_files.reading import UnreadableFile, reading
from sa_files.whole import is_whole
from sa_files.writing import write_atomically, written_atomically
from sa_plugin.sampling.batches import BLOCK

Images = NDArray[np.uint8]  # [n, H, W, C]


class Sink(Protocol):
    """A place for ``n_images`` images. ``unit``: images written together, at least a block.

    Units are counted from 0; the last one may be shorter. Where ``write`` has written everything,
    ``close`` and ``finish`` do nothing.
    """

    unit: int
    n_images: int

    def missing(self) -> list[int]:
        """The units that are not written yet, ascending."""

    def write(self, unit: int, images: Images) -> None:
        """Write a unit; any process may do so, in any order."""

    def close(self) -> None:
        """Called by each process after its last ``write``, or after an error."""

    def finish(self) -> None:
        """Called by one process when no unit is missing; a second call changes nothing."""


def units_of(n_images: int, unit: int) -> int:
    """How many units hold ``n_images``."""
    return -(-n_images // unit)


def encode_png(image: Images) -> bytes:
    """One image [H, W, 1 or 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


class PngFolder(Sink):
    """``00000000.png``, ``00000001.png``, … in one folder."""

    unit = BLOCK

    def __init__(self, folder: Path, n_images: int) -> None:
        self.folder = folder
        self.n_images = n_images

    def missing(self) -> list[int]:
        """The units with an image that is missing or cut, as a power cut leaves it."""
        names = enumerate(map(_png_name, range(self.n_images)))
        return sorted({i // self.unit for i, name in names if not is_whole(self.folder / name)})

    def write(self, unit: int, images: Images) -> None:
        """Write a unit's images, each under its number."""
        for i, image in enumerate(images, start=unit * self.unit):
            write_atomically(self.folder / _png_name(i), encode_png(image))


class TarShards(Sink):
    """``shard-000000.tar``, … of ``unit`` PNG files each, as WebDataset reads them."""

    def __init__(self, folder: Path, n_images: int, unit: int = 16 * BLOCK) -> None:
        if unit < BLOCK or unit % BLOCK:
            raise ValueError(f"unit must be a multiple of {BLOCK}, got {unit}")
        self.folder = folder
        self.n_images = n_images
        self.unit = unit

    def missing(self) -> list[int]:
        """The missing shards."""
        shards = range(units_of(self.n_images, self.unit))
        return [i for i in shards if not is_whole(self._path(i))]

    def write(self, unit: int, images: Images) -> None:
        """Write a shard."""
        with (
            written_atomically(self._path(unit), sync=True) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for i, image in enumerate(images, start=unit * self.unit):
                content = encode_png(image)
                entry = tarfile.TarInfo(_png_name(i))  # owner and time stay 0
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    def _path(self, unit: int) -> Path:
        return self.folder / f"shard-{unit:06d}.tar"


class NpzFile(Sink):
    """FILE.npz with ``arr_0``, uint8 [n, H, W, C]; before it is complete, FILE.parts/."""

    unit = BLOCK

    def __init__(self, path: Path, n_images: int) -> None:
        self.path = path
        self.parts = path.with_suffix(".parts")
        self.n_images = n_images

    def missing(self) -> list[int]:
        """The missing parts; empty if the file is complete."""
        if is_whole(self.path):
            return []
        parts = range(units_of(self.n_images, self.unit))
        return [i for i in parts if not is_whole(self._part(i))]

    def write(self, unit: int, images: Images) -> None:
        """Write a part."""
        buffer = io.BytesIO()
        np.save(buffer, images)
        write_atomically(self._part(unit), buffer.getvalue(), sync=True)

    def finish(self) -> None:
        """Join the parts, one in memory at a time, and remove them."""
        if not is_whole(self.path):
            with written_atomically(self.path, sync=True) as file:
                self._join(file)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _join(self, file: BinaryIO) -> None:
        entry = zipfile.ZipInfo("arr_0.npy")  # dated 1980
        shape = (self.n_images, *self._read(0).shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as stream,
        ):
            np.lib.format.write_array_header_1_0(stream, header)
            for unit in range(units_of(self.n_images, self.unit)):
                stream.write(self._read(unit).tobytes())

    def _read(self, unit: int) -> Images:
        count = min(self.unit, self.n_images - unit * self.unit)
        with reading(
            self._part(unit), "is damaged: remove it, and the same command makes it again"
        ) as file:
            images = read_npy(file)
            if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
                raise ValueError(f"it holds {images.dtype} of shape {images.shape}")
            return images

    def _part(self, unit: int) -> Path:
        return self.parts / f"{unit:08d}.npy"


def read_batches(path: Path, size: int) -> Iterator[Tensor]:
    """The images of an npz file, ``arr_0``, as batches [<= size, C, H, W]: one in memory at a time.

    Raises:
        UnreadableFile: the file is damaged, or holds something else.
    """
    trouble = "holds no images (if a run made it, remove it, and the same command makes it again)"
    with reading(path, trouble) as file, open_npz(file) as arrays:
        arrays.check_names(["arr_0"])
        with arrays.unpack("arr_0") as stream:
            shape, columns_first, dtype = read_header(stream, arrays.size("arr_0"), "arr_0")
            if dtype != np.uint8 or len(shape) != 4 or columns_first:
                raise UnreadableFile(f"{dtype} of shape {shape}")
            for start in range(0, shape[0], size):
                part = (min(size, shape[0] - start), *shape[1:])
                content = bytearray(stream.read(math.prod(part)))
                images = np.frombuffer(content, np.uint8).reshape(part)
                yield torch.from_numpy(images).permute(0, 3, 1, 2)
            stream.read(1)  # at the end the checksum is compared


def first_images(path: Path, count: int) -> Tensor:
    """The first images of an npz file, uint8 [<= count, C, H, W]."""
    return next(read_batches(path, count))


def _png_name(i: int) -> str:
    return f"{i:08d}.png"
