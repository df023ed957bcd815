"""Whether a file is there and not cut: a cheap look at its beginning and its end."""

from __future__ import annotations

import os
from pathlib import Path

# What a file that begins with the first bytes ends with, and how far from its end that stands.
_ENDS = {
    b"PK\x03\x04": (b"PK\x05\x06", 22),  # npz, and torch.save: the end of a zip without a comment
    b"\x89PNG": (b"IEND", 8),
}


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a file that is not empty, not zeroed and, if npz, pth or PNG, not cut.

    Its content is not read: a whole file can still be damaged.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(4)
            if not start.strip(b"\0"):
                return False
            mark, before_end = _ENDS.get(start, (b"", 0))
            file.seek(-before_end, os.SEEK_END)
            return file.read(len(mark)) == mark
    except OSError:  # no such file, a folder, or shorter than its end
        return False
