"""One checkpoint file of unknown origin: read as data, without running anything; written safely.

PyTorch's restricted unpickler decides what is data (``weights_only=True``); one name is allowed on
top, argparse.Namespace, and gets an inert stand-in. Around it stand checks of our own: only the two
formats of today's ``torch.save`` are let in, not the tar format of the first versions, which
PyTorch itself refuses only since 2.6; and the sums inside a zip file are compared, which PyTorch
does not do: without that, a download with a hole is read as weights of zero.
"""

from __future__ import annotations

import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"  # torch.save since PyTorch 1.6
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before: a pickled number, then the rest


class Settings:
    """Stands in for argparse.Namespace in a file: whatever it holds is read and dropped."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing: an attribute could shadow a method."""


def read_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Raises:
        ValueError: not such a file, damaged, or holding anything beside tensors, plain containers,
            plain values and argparse.Namespace. Nothing of it has been run then.
    """
    try:
        with path.open("rb") as file:
            _check_format(file)
            file.seek(0)
            return _load(file)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} {_reason(error)}") from error


def _check_format(file: BinaryIO) -> None:
    start = file.read(len(LEGACY))
    file.seek(0)
    if not start:
        raise _Refused("is empty")
    if start.startswith(ZIP):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise _Refused(f"is damaged: the sum of its part {damaged!r} is wrong")
    elif start != LEGACY or _is_tar(file):
        raise _Refused("is not a file of torch.save (of its zip format or the one before)")


def _is_tar(file: BinaryIO) -> bool:
    """Whether it is a tar archive, whose first file could bear any name, also ``LEGACY``."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    return True


def _load(file: BinaryIO) -> Any:
    allowed = [(Settings, "argparse.Namespace")]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore")  # what they tell of stands in the error, too
        return torch.load(file, map_location="cpu", weights_only=True)


class _Refused(Exception):
    """A reason of our own."""


def _reason(error: Exception) -> str:
    """Why a file is refused, in one line, without PyTorch's advice to load it unsafely."""
    text = str(error)
    if isinstance(error, _Refused):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if named := re.search(r"\bGLOBAL (\S+)", text):
        return f"is refused: it asks for {named[1]}, which is no data; nothing of it was run"
    text = text.rpartition("WeightsUnpickler error: ")[2].strip()
    detail = f": {text.splitlines()[0].strip()}" if text else ""
    return f"is damaged or no checkpoint: {type(error).__name__}{detail}"


def write_file(state: Mapping[str, Tensor], path: Path) -> None:
    """Save a state dict under a temporary name and rename: ``path`` is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(compact(state), file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what surrounds them: a view is saved with all that it views."""
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in state.items()
    }
