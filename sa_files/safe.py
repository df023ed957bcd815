"""Files of safetensors: the length of a header, the header in JSON, the tensors.

Read here and not by the package: so the errors, the bound of a header and the checks are those of
all other files, and nothing more has to be installed.
"""

from __future__ import annotations

import json
import math
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .reading import UnreadableFile, size_of
from .stored import LARGEST_JSON

SUFFIX = ".safetensors"
_LENGTH = 8  # bytes
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


def load_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """The tensors by name, in the order of their bytes, which must fill the file without a gap."""
    size = size_of(file)
    length = int.from_bytes(file.read(_LENGTH), "little")
    if not 2 <= length <= min(LARGEST_JSON, size - _LENGTH):
        raise UnreadableFile(
            f"its header claims {length} bytes, must have at most {LARGEST_JSON} and the file's"
        )
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = _tensor(file, name, entry, end)
        end = entry["data_offsets"][1]
    if end != size - _LENGTH - length:
        raise UnreadableFile(f"its tensors have {end} bytes, {size - _LENGTH - length} are there")
    return tensors


def _tensor(file: BinaryIO, name: str, entry: dict[str, Any], start: int) -> Tensor:
    """The tensor of one entry of the header, whose bytes begin at ``start``."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise UnreadableFile(f"its {name!r} is {entry['dtype']}, must be one of {list(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    numbers = [*shape, begin, end]
    if len(shape) > 64 or not all(type(n) is int and 0 <= n <= size_of(file) for n in numbers):
        raise UnreadableFile(f"its {name!r} has the impossible shape {shape}")
    if begin != start or math.prod(shape) * dtype.itemsize != end - begin:
        raise UnreadableFile(
            f"its {name!r} claims the bytes {begin} to {end} for {list(shape)}, {dtype}; the next "
            f"is {start}"
        )
    content = bytearray(file.read(end - begin))
    if len(content) != end - begin:
        raise UnreadableFile(f"its {name!r} ends after {len(content)} bytes of {end - begin}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)
