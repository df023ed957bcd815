"""Locks of the kernel (``flock``): it frees them when their process ends, for any reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Take the lock until the end of the block; yield whether we have it.

    Args:
        patience: seconds to wait for another holder.

    Raises:
        ValueError: a folder, a link or something else has the name of the lock's file.
        OSError: the file system has no locks, or the lock's file cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} must be a plain file, the lock of its folder: remove it")
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
    # Without flock, newer versions of filelock warn and mark the lock by a file instead. That file
    # stays when its process is killed, and it excludes other processes less reliably.
    if any("flock not supported" in str(warning.message) for warning in said):
        lock.release()
        raise OSError(f"the file system of {path.parent} has no locks (flock)")
    try:
        yield True
    finally:
        lock.release()
