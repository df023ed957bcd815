"""Small files that ask for much work: shared structure, deep nesting, many parts, slow keys."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from sa_files.tensors import LEGACY

Maker = Callable[[random.Random], bytes]
LARGEST = 2**21  # bytes of a pickle or a text before it is packed

_INT = struct.Struct("<i")


def _many(draw: random.Random, part: bytes) -> bytes:
    return part * draw.randint(1, LARGEST // len(part))


def _number(value: int) -> bytes:
    return b"J" + _INT.pack(value)


def _shared(draw: random.Random) -> bytes:
    """Containers in which each level uses the one below it more than once."""
    depth = draw.choice((20, 40, 90, 200))
    start, pair = draw.choice(
        (
            (b")q\x00", b"h\x00\x86q\x00"),
            (b"]q\x00", b"](h\x00h\x00eq\x00"),
            (b"}q\x00", b"}(K\x00h\x00K\x01h\x00uq\x00"),
            (b")q\x00", b"(" + b"h\x00" * 100 + b"tq\x00"),
        )
    )
    return start + pair * depth


def _used(draw: random.Random) -> bytes:
    """Shared structure as a value, a key, an argument, a state, the name of a storage."""
    made = _shared(draw)
    return draw.choice(
        (
            made,
            made + b"}h\x00K\x00s",
            made + b"}(h\x00K\x00u",
            made + b"(h\x00K\x00d",
            made + b"(h\x00\x91",
            made + b"ccollections\nCounter\n]h\x00a\x85R",
            made + b"ccollections\nOrderedDict\n]]h\x00aK\x00aa\x85R",
            made + b"ctorch\nTensor\nh\x00\x85R",
            made + b"ctorch\nSize\nh\x00\x85R",
            made + b"ccollections\nOrderedDict\n)Rh\x00b",
            made + b"ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00ah\x00u",
            made + b"h\x00Q",
            made + b"cnumpy\nndarray\nK\x00\x85Rh\x00b",
        )
    )


def _nested(draw: random.Random) -> bytes:
    """Containers inside each other."""
    depth = draw.randint(50, LARGEST // 2)
    return draw.choice((b"]" * depth + b"a" * (depth - 1), b")" + b"\x85" * depth))


def _instructions(draw: random.Random) -> bytes:
    """One short instruction many times: each leaves an object, or a mark, or an entry."""
    part = draw.choice(
        (b"N", b"}", b"]", b"\x8f", b"(", b"}\x94", b"K\x01", b"(t", b"]q\x01", b"2")
    )
    return b"(" + _many(draw, part) + draw.choice((b"t", b"l"))


def _colliding(draw: random.Random) -> bytes:
    """A dict whose keys have one hash: multiples of 2^61 - 1."""
    count = draw.randint(50, LARGEST // 35)
    keys = (
        b"\x8a\x0b" + ((i + 1) * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(count)
    )
    return b"}(" + b"".join(keys) + b"u"


def _repeated(draw: random.Random) -> bytes:
    """A long list or text that is copied again and again."""
    length = draw.randint(1000, LARGEST // 8)
    what, use = draw.choice(
        (
            (b"(" + b"N" * length + b"t", b"ctorch\nSize\nh\x00R"),
            (b"(" + b"N" * length + b"t", b"h\x00Q"),
            (b"](" + b"]N2ae" * (length // 8) + b"e", b"ccollections\nOrderedDict\nh\x00\x85R"),
            (
                b"X" + _INT.pack(length) + b"a" * length,
                b"c_codecs\nencode\nh\x00X\6\0\0\0latin1\x86R",
            ),
            (b"X" + _INT.pack(length) + b"a" * length, b"h\x00"),
            (b"(" + (b"\x8a\xff" + b"\x7f" * 255) * (length // 300) + b"t", b"N"),
        )
    )
    return what + b"q\x00(" + _many(draw, use) + b"t"


def _circle(draw: random.Random) -> bytes:
    """A list in itself."""
    return b"]q\x00(" + b"h\x00" * draw.randint(1, 1000) + b"e"


def _expanded(draw: random.Random) -> bytes:
    """A tensor of few bytes and any number of entries, and what would go through them."""
    tensor = b"".join(
        (
            *(b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n", b"LongStorage\n"),
            *(b"X\1\0\0\x000X\3\0\0\0cpuK\x01tQK\x00", _number(2**30), b"\x85K\x00\x85\x89"),
            b"ccollections\nOrderedDict\n)RtRq\x00",
        )
    )
    return tensor + draw.choice(
        (
            b"",
            b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(h\x00ctorch\nfloat64\n"
            b"X\3\0\0\0cpu\x89tR",
            b"ctorch\nTensor\nh\x00\x85R",
        )
    )


def _product(draw: random.Random) -> bytes:
    """An array whose shape has so many and so large sides that their product takes minutes."""
    side = b"\x8a\xff" + b"\x7f" * 255
    return (
        b"cnumpy\nndarray\nK\x00\x85R(K\x01("
        + _many(draw, side)
        + b"tcnumpy\ndtype\nX\2\0\0\0u1\x85R(K\x03X\1\0\0\0|tb\x89U\x01at"
        + b"b"
    )


PICKLES: tuple[Maker, ...] = (
    *(_used, _used, _nested, _instructions, _colliding, _repeated, _circle, _expanded, _product),
)


def _pickled(draw: random.Random) -> bytes:
    return b"\x80\x02" + draw.choice(PICKLES)(draw) + b"."


def _torch(draw: random.Random) -> bytes:
    parts = {"a/data.pkl": _pickled(draw), "a/version": b"3", "a/byteorder": b"little"}
    return _zipped({**parts, "a/data/0": bytes(8)}, zipfile.ZIP_STORED)


def _legacy(draw: random.Random) -> bytes:
    protocol, machine = b"\x80\x02M\xe9\x03.", b"\x80\x02}(X\6\0\0\0systemX\1\0\0\0xu."
    return LEGACY + protocol + machine + _pickled(draw) + _pickled(draw)


# --------------------------------------------------------------------------- other formats


def _text(draw: random.Random) -> bytes:
    """JSON or CSV with many, deep, long or slow parts."""
    n = draw.randint(1000, 2 * LARGEST)
    return draw.choice(
        (
            lambda: b"[" + b"[]," * (n // 3) + b"[]]",
            lambda: b"[" + b"{}," * (n // 3) + b"{}]",
            lambda: b"[" * n + b"]" * n,
            lambda: b'{"a":' * (n // 6) + b"0" + b"}" * (n // 6),
            lambda: b"9" * n,
            lambda: b"[" + b"1e308," * (n // 6) + b"1]",
            lambda: json.dumps(dict.fromkeys(map(str, range(n // 16)), 0)).encode(),
            lambda: json.dumps({"metrics": {"a" * (n // 2): "b" * (n // 2)}}).encode(),
            lambda: b"iteration" + b"," * n + b"\n" + b"," * n,
            lambda: b"iteration,loss\n" + b"1,2\n" * (n // 4),
            lambda: b"[" + b"[]," * (20 * LARGEST // 3) + b"[]]",
        )
    )()


def _zip(draw: random.Random) -> bytes:
    """A zip file with many members, or one of numbers that become larger in memory."""
    n = draw.randint(50, LARGEST // 140)
    names = draw.choice((("values",), ("mu", "sigma"), ("arr_0",), ("images",), ("data",)))
    return draw.choice(
        (
            lambda: _zipped({f"{i}.npy": b"" for i in range(n)}, zipfile.ZIP_STORED),
            lambda: _arrays(np.zeros(1000 * n, np.uint8), names),
            lambda: _arrays(np.zeros((n, n // 10), np.bool_), names),
            lambda: _arrays(np.zeros(100 * n, "U10"), names),
            lambda: _zipped({"values.npy": _header(b"(" * n)}, zipfile.ZIP_STORED),
        )
    )()


def _arrays(array: np.ndarray, names: tuple[str, ...]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **dict.fromkeys(names, array))
    return file.getvalue()


def _header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _gzip(draw: random.Random) -> bytes:
    """A tar archive of many empty files, packed; zeros up to the bound."""
    n = draw.randint(50, LARGEST // 20)
    header = tarfile.TarInfo("data_batch_1")
    return draw.choice(
        (
            lambda: gzip.compress(header.tobuf() * n + bytes(1024), 1),
            lambda: gzip.compress(struct.pack(">4I", 0x803, n, 28, 28) + bytes(n * 28 * 28), 1),
            lambda: gzip.compress(bytes(1000 * n), 1),
        )
    )()


def _zipped(members: Mapping[str, bytes], packing: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


# By the first bytes of a valid file: what can be hidden in one of its kind.
KINDS: dict[bytes, tuple[Maker, ...]] = {
    b"PK": (_torch, _torch, _torch, _zip),
    b"\x80\x02": (_pickled, _legacy),
    b"{": (_text,),
    b"i": (_text,),
    b"\x1f\x8b": (_gzip,),
}
EVERY = (_torch, _legacy, _pickled, _text, _zip, _gzip)


def work_bomb(sound: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(what it is, content) of a random bomb, mostly of the kind of file that ``sound`` is."""
    own = next((makers for start, makers in KINDS.items() if sound.startswith(start)), EVERY)
    maker = draw.choice(own if draw.random() < 0.8 else EVERY)
    state = draw.getrandbits(32)
    return f"{maker.__name__[1:]} {state}", maker(random.Random(state))
