"""Arrays in npz and npy files; pickles are never read."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .reading import UnreadableFile, check_bound, size_of

_PACKED = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_END = struct.Struct("<4s4H2LH")  # the end of a zip file; its fifth field counts the members
_END_64 = struct.Struct("<4s36xQ8x4s16x")  # before it in large files: the end again, its place
_SURROUNDED = "it is a zip file with other bytes before or after it"
_MANY = 0xFFFF  # in place of a number that is stored elsewhere
_LARGEST_DIRECTORY = 2**23  # bytes; each hundred become an object of a kilobyte
_FOLDER = 0x10  # an attribute of MS-DOS
_KINDS = "biufcSU"  # booleans, numbers, text
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
Array = npt.NDArray[Any]
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether columns come first, dtype


@contextmanager
def open_zip(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """A zip file whose members fit into it, have different names and do not overlap."""
    size = size_of(file)
    if not zipfile.is_zipfile(file):
        raise UnreadableFile("it is not an npz file, or it is damaged")
    _check_length_of_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_directory(file, archive, size)
        if len({member.filename for member in members}) < len(members):
            raise UnreadableFile("two of its members have the same name")
        for member in members:
            _check_member(member)
        if sum(member.compress_size for member in members) > size:
            raise UnreadableFile("its members claim more bytes than it has")
        check_bound(sum(member.file_size for member in members), size)
        for member in members:
            archive.open(member).close()  # compares the member's own name with the directory's
        yield archive


def _check_length_of_directory(file: BinaryIO, size: int) -> None:
    """UnreadableFile if `zipfile` would read a directory of many megabytes."""
    file.seek(size - _END.size)
    signature, *_, length, _, _ = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06":
        raise UnreadableFile(_SURROUNDED)
    if size >= _END_64.size + _END.size:
        file.seek(size - _END.size - _END_64.size)
        _, length_64, locator = _END_64.unpack(file.read(_END_64.size))
        length = length_64 if locator == b"PK\x06\x07" else length
    if length > _LARGEST_DIRECTORY:
        raise UnreadableFile(
            f"its directory has {length} bytes, must have at most {_LARGEST_DIRECTORY}"
        )


def _check_directory(file: BinaryIO, archive: zipfile.ZipFile, size: int) -> None:
    """UnreadableFile unless a member begins the file and a directory of all members ends it.

    Otherwise another reader may find another directory, and `zipfile` may miss members: after an
    entry with a wrong length it skips the next one.
    """
    members = archive.infolist()
    file.seek(size - _END.size)
    *_, entries, _, _, _ = _END.unpack(file.read(_END.size))
    first = min((member.header_offset for member in members), default=0)
    if archive.comment or first:
        raise UnreadableFile(_SURROUNDED)
    if entries not in (len(members), _MANY):
        raise UnreadableFile(f"its directory is damaged: {len(members)} of {entries} members")


def _check_member(member: zipfile.ZipInfo) -> None:
    if member.is_dir() or member.external_attr & _FOLDER:
        # PyTorch's reader takes a folder for an empty member and leaves the memory uninitialised.
        raise UnreadableFile(f"its member {member.filename!r} is a folder")
    if member.compress_type not in _PACKED:
        raise UnreadableFile(f"its member {member.filename!r} has an unknown compression")
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise UnreadableFile(f"its member {member.filename!r} claims two different sizes")


class Arrays:
    """The arrays of an npz file by name, each read on access."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._size = archive, size
        self.names = tuple(name.removesuffix(".npy") for name in archive.namelist())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def check_names(self, needed: Collection[str], allowed: Collection[str] = ()) -> None:
        """UnreadableFile unless it holds all needed names, and otherwise only allowed names."""
        extra = [name for name in self.names if name not in {*needed, *allowed}]
        if extra or not set(needed) <= set(self.names):
            also = f", and may hold {sorted(allowed)}" if allowed else ""
            raise UnreadableFile(f"it holds {list(self.names)}, must hold {sorted(needed)}{also}")

    def header(self, name: str) -> Header:
        """Shape, order and dtype of an array; UnreadableFile unless its size fits them."""
        member = self._member(name)
        with self._archive.open(member) as stream:
            return read_header(stream, member.file_size, name)

    def __getitem__(self, name: str) -> Array:
        self.header(name)
        check_bound(self._member(name).file_size, self._size, whole=True)
        with self._archive.open(self._member(name)) as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            stream.read(1)  # at the end the checksum is compared, also of an empty array
            return array

    def unpack(self, name: str) -> IO[bytes]:
        """An array's npy file, to be read in parts."""
        self.header(name)
        return self._archive.open(self._member(name))

    def checksum(self, name: str) -> int:
        """The zip file's checksum of the array's npy file."""
        return self._member(name).CRC

    def size(self, name: str) -> int:
        """The size of the array's npy file in bytes."""
        return self._member(name).file_size

    def _member(self, name: str) -> zipfile.ZipInfo:
        if f"{name}.npy" not in self._archive.namelist():
            raise UnreadableFile(f"it holds {list(self.names)}, must hold {name!r}")
        return self._archive.getinfo(f"{name}.npy")


@contextmanager
def open_npz(file: BinaryIO) -> Iterator[Arrays]:
    """The arrays of an npz file."""
    with open_zip(file) as archive:
        yield Arrays(archive, size_of(file))


def read_npy(file: BinaryIO) -> Array:
    """The array of an npy file."""
    file.seek(0)
    read_header(file, size_of(file), "array")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def map_npy(file: BinaryIO) -> Array:
    """The array of an npy file, mapped into memory."""
    shape, columns_first, dtype = read_header(file, size_of(file), "array")
    order: Any = "F" if columns_first else "C"
    return np.memmap(file, dtype, "r", file.tell(), shape, order)


def read_header(stream: IO[bytes], size: int, name: str) -> Header:
    """The header of an npy file of `size` bytes; UnreadableFile if it claims another size."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise UnreadableFile(f"its {name!r} has the unknown npy version {version}")
    shape, columns_first, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise UnreadableFile(f"its {name!r} is pickled, which is never read (allow_pickle=False)")
    if dtype.kind not in _KINDS or dtype.itemsize == 0 or any(side < 0 for side in shape):
        raise UnreadableFile(f"its {name!r} is {dtype} of shape {shape}")
    claimed, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if claimed != there:
        raise UnreadableFile(
            f"its {name!r} claims {claimed} bytes ({dtype} of shape {shape}), {there} are there"
        )
    return shape, columns_first, dtype
