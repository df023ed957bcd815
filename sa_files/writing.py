"""Files that no reader ever sees half written."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # the name of a file that is being written


@contextmanager
def written_atomically(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file open for writing; it gets the name ``path`` when the block ends without an error.

    Until then its name is random and not made from the process number: machines that share a folder
    can have equal numbers. ``sync``: wait until the disk holds the file and its name. Without it, a
    power cut could leave an empty file, or none.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
        if sync:
            sync_names(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(
    path: str | os.PathLike[str], content: bytes | str, *, sync: bool = False
) -> None:
    """Write ``content``, text as UTF-8, as in ``written_atomically``."""
    with written_atomically(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while writing have left; no other may be writing."""
    for path in filter(is_unfinished, folder.rglob(".*.tmp")):
        path.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` has the name of a file that ``written_atomically`` was writing."""
    return _UNFINISHED.fullmatch(path.name) is not None


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON, indented, with the keys in their order; wait for the disk."""
    write_atomically(path, json.dumps(content, indent=2) + "\n", sync=True)


def sync_names(folder: Path) -> None:
    """Wait until the disk holds the names of the files in ``folder``."""
    if os.name == "nt":  # where folders cannot be opened, and a rename is written at once
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
