"""Files that no reader ever sees half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_atomically(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file open for writing; it gets the name ``path`` when the block ends without an error.

    Until then its name is random and not made from the process number: machines that share a folder
    can have equal numbers. ``sync``: wait for the disk. Without it, a power cut after the rename
    could leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
