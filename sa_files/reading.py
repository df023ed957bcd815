"""Open a file, say what is wrong with it, and bound the size that it unpacks to."""

from __future__ import annotations

import gzip
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# A file may unpack to RATIO times its size, or to ROOM bytes if that is more. Photographs shrink to
# a fiftieth at least; deflate shrinks zeros to a thousandth, which is how a zip bomb is built. What
# is unpacked into memory as a whole, and then copied, may have less.
RATIO = 100
ROOM = 2**28
RATIO_WHOLE = 2
ROOM_WHOLE = 2**26
_AT_ONCE = 2**20
_TAR_BLOCK = 512
_LONGEST_REASON = 400


class UnreadableFile(ValueError):
    """A file that is missing, damaged, of another kind, or asks for more than data.

    Its text is printable, whatever the names of files, and those in them, hold.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


@contextmanager
def reading(path: str | os.PathLike[str], trouble: str) -> Iterator[BinaryIO]:
    """The open file; any error within the block becomes the `UnreadableFile` "PATH TROUBLE: why".

    On damaged bytes the libraries raise any type of error: KeyError, struct.error, MemoryError, ...
    """
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UnreadableFile("it is not a regular file")  # a pipe would block
        with file.open("rb") as opened:
            if size_of(opened) == 0:
                raise UnreadableFile("it is empty")
            yield opened
    except Exception as error:
        raise UnreadableFile(f"{file} {trouble}: {reason(error)}") from error


def printable(text: str) -> str:
    """The text with `?` for what a terminal would obey; names in a file can hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(text: str) -> str:
    """The text as one printable line."""
    return printable(" ".join(text.split()))


def reason(error: BaseException) -> str:
    """An error's message in one printable line, without advice to disable a check."""
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if named := re.search(r"\bGLOBAL (\S+)", text):
        return f"it asks for {named[1]}, which is no data; nothing of it was run"
    text = text.rpartition("WeightsUnpickler error: ")[2].strip()
    if isinstance(error, UnreadableFile):
        line = one_line(text)
    else:
        first = (text.splitlines() or [""])[0].strip()
        own = isinstance(error, ValueError) and first
        line = printable(first if own else f"{type(error).__name__}: {first}".removesuffix(": "))
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."


def size_of(file: BinaryIO) -> int:
    """The file's size in bytes; its position does not change."""
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(here)
    return size


def check_bound(claimed: int, size: int, *, whole: bool = False) -> None:
    """UnreadableFile if a file of `size` bytes claims to unpack to more than it may.

    whole: all of it is in memory at once; otherwise it is read in parts.
    """
    bound = ROOM_WHOLE + RATIO_WHOLE * size if whole else max(ROOM, RATIO * size)
    if claimed > bound:
        raise UnreadableFile(
            f"its {size} bytes would unpack to {claimed}, more than {bound}: if this is intended, "
            "store it unpacked"
        )


def unpack_gzip(file: BinaryIO) -> bytes:
    """The content of a gzip file, with its checksum compared."""
    size, parts, total = size_of(file), [], 0
    with gzip.GzipFile(fileobj=file) as packed:
        while part := packed.read(_AT_ONCE):
            total += len(part)
            check_bound(total, size, whole=True)
            parts.append(part)
    return b"".join(parts)


def tar_files(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in an unpacked tar archive whose names are wanted.

    Nothing is written to disk, and links and devices are skipped. An archive without an end is
    refused: `tarfile` itself takes a damaged header for the end.
    """
    size = size_of(file)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte for each
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or member.issparse() or not wanted(member.name):
                continue
            if not 0 <= member.size <= size:
                raise UnreadableFile(f"its member {member.name!r} claims {member.size} bytes")
            yield member.name, content.read()
        file.seek(tar.offset)
        if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise UnreadableFile(f"it is damaged or cut off at byte {tar.offset}")
