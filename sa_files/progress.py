"""Progress on standard error: a bar in a terminal; in a file, a line each half minute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

INTERVAL = 30.0  # seconds
_name = ""  # of this process, if others write to the same standard error


@contextmanager
def named(name: str) -> Iterator[None]:
    """Within the block, progress is lines that begin with ``name``, in a terminal too."""
    global _name
    before, _name = _name, name
    try:
        yield
    finally:
        _name = before


def bar_options() -> dict[str, Any]:
    """Arguments of tqdm for this process's standard error."""
    if sys.stderr.isatty() and not _name:
        return {}
    return {"file": _Lines(sys.stderr), "mininterval": INTERVAL, "maxinterval": INTERVAL}


class _Lines:
    """Each state of a bar on a line of its own: tqdm writes it over the last one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._before = f"{_name}: " if _name else ""

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(f"{self._before}{text.strip()}\n")

    def flush(self) -> None:
        self._file.flush()
