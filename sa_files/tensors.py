"""Files of `torch.save`, with PyTorch's restricted unpickler and checks of our own around it.

`weights_only=True` decides what is data. It is not enough for files of unknown origin:

- Before 2.6 it let the tar format of the first versions run code (CVE-2025-32434).
- No version compares the checksums in a zip file: a download with a hole gives weights of zero.
- A few bytes can ask for any amount of memory.

So a first reader, in which every name stands for nothing, goes through each pickle. It finds which
names the pickle asks for and which size it claims for each storage.
"""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .arrays import open_zip
from .pickled import DataUnpickler, check_key, latin1
from .reading import UnreadableFile, size_of

ZIP = b"PK\x03\x04"  # torch.save since PyTorch 1.6
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before: a pickled number, then the rest
_LEGACY_PICKLES = 4  # the protocol, the machine, the content, the storages' keys
_NO_FORMAT = "it is not a file of torch.save (of its zip format or the one before)"

_ITEM_SIZES = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "ComplexDouble": 16, "ComplexFloat": 8},
    **{"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1},
}
# PyTorch takes more names for data. Some of those make a tensor of any size, or go through one.
_NAMES = (
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"),
    *("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch.Size", "torch.device"),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
)


def load_tensors(file: BinaryIO, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """The content of a file of `torch.save`, on the CPU: tensors, plain containers, plain values.

    stand_ins   further allowed names and the replacement of each. The pickle decides how it is
                called, so a replacement must be harmless with any arguments
    """
    stand_ins = stand_ins or {}
    start = file.read(len(LEGACY))
    file.seek(0)
    if start.startswith(ZIP):
        _check_zip(file, stand_ins)
    elif start == LEGACY and not _is_tar(file):
        _check_legacy(file, stand_ins)
    else:
        raise UnreadableFile(_NO_FORMAT)
    file.seek(0)
    with _named(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says the same
        content = torch.load(file, map_location="cpu", weights_only=True)
    _check_storages(content, size_of(file))
    return content


def entries_once(tensor: Tensor) -> Tensor:
    """The tensor without repeated entries, as expand() makes them.

    A few bytes can describe a tensor with any number of entries. UnreadableFile if the result still
    has more entries than its storage.
    """
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UnreadableFile(f"a tensor of shape {list(tensor.shape)} overlaps itself")
    return tensor


# ----------------------------------------------------------------------------- the two formats


def _check_zip(file: BinaryIO, stand_ins: Mapping[str, Any]) -> None:
    with open_zip(file) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise UnreadableFile(
                    f"its part {member.filename!r} is compressed, torch.save compresses none"
                )
        damaged = archive.testzip()
        if damaged is not None:
            raise UnreadableFile(f"it is damaged: the checksum of its part {damaged!r} is wrong")
        pickles = [m for m in members if m.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableFile(_NO_FORMAT)
        scan = _Scan(io.BytesIO(archive.read(pickles[0])), stand_ins)
        scan.load()
        prefix = pickles[0].filename.removesuffix("data.pkl")
        sizes = {member.filename: member.file_size for member in members}
        for key, claimed in scan.storages.items():
            there = sizes.get(f"{prefix}data/{key}")
            if there != claimed:
                raise UnreadableFile(f"its storage {key!r} claims {claimed} bytes, has {there}")


def _check_legacy(file: BinaryIO, stand_ins: Mapping[str, Any]) -> None:
    """The storages follow the pickles, each after its length, which PyTorch checks."""
    file.seek(len(LEGACY))
    storages: dict[str, int] = {}
    for _ in range(_LEGACY_PICKLES):
        scan = _Scan(file, stand_ins)
        scan.load()
        storages |= scan.storages
    behind = size_of(file) - file.tell()
    if sum(storages.values()) > behind:
        raise UnreadableFile(
            f"its storages claim {sum(storages.values())} bytes, there are {behind}"
        )


def _is_tar(file: BinaryIO) -> bool:
    """Whether it is a tar archive: its first file could have any name, even `LEGACY`."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    return True


def _check_storages(content: Any, size: int) -> None:
    """UnreadableFile if tensors hold more bytes than the file: a pickle can make a storage grow."""
    storages: dict[int, int] = {}
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values() if isinstance(value, Mapping) else value
    if sum(storages.values()) > size:
        raise UnreadableFile(f"its tensors hold {sum(storages.values())} bytes, it has {size}")


@contextmanager
def _named(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    with torch.serialization.safe_globals([(what, name) for name, what in stand_ins.items()]):
        yield


# ------------------------------------------------------------------------------------ the scan


class _Nothing:
    """Replaces everything that a pickle names: accepts any call and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Mapping(dict[Any, Any]):
    """Replaces OrderedDict and Counter; Python 2 calls the first with a list of lists."""

    def __init__(self, entries: Any = ()) -> None:
        super().__init__()
        for pair in entries.items() if isinstance(entries, dict) else entries:
            if not isinstance(entries, dict) and not isinstance(pair, list):
                raise UnreadableFile("its pickle is damaged: a dict of other things than pairs")
            key, value = pair
            check_key(key)
            self[key] = value

    def __setstate__(self, _: Any) -> None:
        pass


_STORAGES = {
    f"{module}.{name}Storage": type(f"{name}Storage", (_Nothing,), {"item_size": size})
    for name, size in _ITEM_SIZES.items()
    for module in ("torch", "torch.storage")
}
_STAND_INS: dict[str, Any] = {
    **dict.fromkeys(_NAMES, _Nothing),
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter"), _Mapping),
    **_STORAGES,
    "_codecs.encode": latin1,
}


class _Scan(DataUnpickler):
    """Reads through a pickle of `torch.save` and notes its storages."""

    def __init__(self, file: BinaryIO, stand_ins: Mapping[str, Any]) -> None:
        super().__init__(file, {**_STAND_INS, **dict.fromkeys(stand_ins, _Nothing)}, "utf-8")
        self.storages: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage: ("storage", type, key, place, entries, ...)."""
        _, kind, key, _, entries, *_ = pid
        if not isinstance(entries, int) or not isinstance(key, str) or entries < 0:
            raise UnreadableFile("its pickle names a storage without a size")
        claimed = entries * kind.item_size
        if self.storages.setdefault(key, claimed) != claimed:
            raise UnreadableFile(f"its storage {key!r} claims two different sizes")
        return _Nothing()
