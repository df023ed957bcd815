"""Progress on standard error: a bar in a terminal; in a file, a line each half minute."""

from __future__ import annotations

import sys
from typing import Any, TextIO

INTERVAL = 30.0  # seconds


def bar_options() -> dict[str, Any]:
    """Arguments of tqdm for this process's standard error."""
    if sys.stderr.isatty():
        return {}
    return {"file": _Lines(sys.stderr), "mininterval": INTERVAL, "maxinterval": INTERVAL}


class _Lines:
    """Each state of a bar on a line of its own: tqdm writes it over the last one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()
