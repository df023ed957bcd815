"""Damage that can happen to a file, and attacks that somebody may put into one."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BOMB = 2**29  # bytes of zeros

_LARGE = (b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1" * 2)
# Called with the content and two whole numbers >= 0, which say where and what.
Operation = Callable[[bytes, int, int], bytes]


def cut(content: bytes, at: int, _: int) -> bytes:
    """The end is missing."""
    return content[: at % len(content)]


def flip(content: bytes, at: int, bit: int) -> bytes:
    """One bit is flipped."""
    changed = bytearray(content)
    changed[at % len(content)] ^= 1 << bit % 8
    return bytes(changed)


def hole(content: bytes, at: int, length: int) -> bytes:
    """Some bytes are zero, as if never written."""
    start = at % len(content)
    gap = min(1 + length % 512, len(content) - start)
    return content[:start] + bytes(gap) + content[start + gap :]


def lose(content: bytes, at: int, length: int) -> bytes:
    """Some bytes are missing; the following ones move up."""
    start = at % len(content)
    return content[:start] + content[start + 1 + length % 64 :]


def grow(content: bytes, _: int, length: int) -> bytes:
    """Bytes are appended."""
    return content + bytes(range(256)) * (1 + length % 4)


def claim(content: bytes, at: int, kind: int) -> bytes:
    """A number of 4 or 8 bytes becomes very large."""
    number = _LARGE[kind % len(_LARGE)]
    start = at % len(content)
    return content[:start] + number + content[start + len(number) :]


def digits(content: bytes, at: int, kind: int) -> bytes:
    """A number in the text becomes another one, with the same number of digits or many."""
    found = list(re.finditer(rb"\d+", content))
    if not found:
        return claim(content, at, kind)
    match = found[at % len(found)]
    length = match.end() - match.start()
    new = (b"9" * length, b"7" * length, b"0" * length, b"9" * 13, b"-1", b"1e999")[kind % 6]
    return content[: match.start()] + new + content[match.end() :]


OUTSIDE: dict[str, Operation] = {
    **{"cut": cut, "flip": flip, "hole": hole, "lose": lose, "grow": grow},
    **{"claim": claim, "digits": digits},
}


def inside(content: bytes, operation: Operation, at: int, what: int) -> bytes:
    """The operation on the content of a zip or gzip file, with the checksums computed anew."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(operation(gzip.decompress(content), at, what), 1)
    if content[:2] != b"PK":
        return operation(content, at, what)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    chosen = what % len(members)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i, (member, part) in enumerate(members):
            part = operation(part, at, what // len(members)) if i == chosen and part else part
            archive.writestr(member.filename, part, member.compress_type)
    return packed.getvalue()


# ----------------------------------------------------------------------------- on purpose


class Code:
    """Its pickle creates a folder when it is unpickled carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def hostile(trace: Path) -> Mapping[str, bytes]:
    """Files that would create the folder ``trace``, one for each way to store a pickle."""
    code, state = Code(trace), {"conv.bias": torch.zeros(4)}
    return {
        "pickle": pickle.dumps(code),
        "pickle of Python 2": pickle.dumps({"data": code, "labels": []}, protocol=2),
        "torch.save": _saved({"x": code, **state}),
        "torch.save before 1.6": _saved(code, _use_new_zipfile_serialization=False),
        "npz": _npz(values=np.array([code]), mu=np.array([code]), arr_0=np.array([code])),
        "npy": _npy(np.array([code])),
    }


@cache
def bombs() -> Mapping[str, bytes]:
    """Small files that unpack to ``BOMB`` bytes or more, or claim to."""
    zeros = np.broadcast_to(np.uint8(0), BOMB)
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**42, 2, 2, 3)}
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, header)
    names = ("values", "mu", "arr_0", "images", "data")
    return {
        "gzip": gzip.compress(bytes(BOMB), 1),
        "npz": _packed({f"{names[0]}.npy": _npy(zeros)}),
        "npz, a header": _packed({f"{name}.npy": claims.getvalue() for name in names}),
        "npy, a header": claims.getvalue(),
        "zip in torch's manner": _packed({"x/data.pkl": bytes(BOMB), "x/version": b"3"}),
        "png": _png_of(30_000, 30_000),
    }


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _packed(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _png_of(width: int, height: int) -> bytes:
    """A header that claims this size, followed by almost no data."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)
