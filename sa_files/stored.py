"""Stored results: JSON files and named arrays, read whole and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .arrays import Array, open_npz
from .reading import UnreadableFile, reading, size_of

LARGEST_JSON = 2**22  # bytes; of empty lists, Python makes 25 times as much

T = TypeVar("T")


def read_json(path: Path, trouble: str, of: Callable[[Any], T]) -> T:
    """``of(content)`` of a JSON file; every error, also an error in ``of``, names the file.

    Raises:
        UnreadableFile: "PATH TROUBLE: why", also if the file does not exist.
    """
    with reading(path, trouble) as file:
        if size_of(file) > LARGEST_JSON:
            raise UnreadableFile(f"it has {size_of(file)} bytes, must have at most {LARGEST_JSON}")
        return of(json.loads(file.read()))


def read_arrays(path: Path, trouble: str, *names: str) -> dict[str, Array]:
    """The arrays of an npz file; their names must be ``names``."""
    with reading(path, trouble) as file, open_npz(file) as arrays:
        arrays.check_names(names)
        return {name: arrays[name] for name in names}
