"""Locks of the kernel (``flock``): they end with the process that holds them, however it ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Whether the lock is ours, until the end of the block.

    Args:
        patience: seconds to wait for another one's end.

    Raises:
        OSError: the file system has no locks, or nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", message="flock not supported")
            lock.acquire(timeout=patience)
    except Timeout:
        yield False
        return
    except NotImplementedError as error:
        raise OSError(f"the file system of {path.parent} has no locks (flock): {error}") from error
    # Where flock is missing, newer filelocks warn and go on with a file that marks the lock. It
    # stays when its process is killed, and two of them would not exclude each other as surely.
    if any("flock not supported" in str(warning.message) for warning in said):
        lock.release()
        raise OSError(f"the file system of {path.parent} has no locks (flock)")
    try:
        yield True
    finally:
        lock.release()
