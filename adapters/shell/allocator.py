"""Keep freed memory in the process: a training step on the CPU becomes 5 to 12 % faster.

A network call allocates and frees the same hundreds of megabytes again and again. glibc returns
large blocks to the system, which clears each page before it hands the page out again. Keeping the
blocks does not raise the peak memory of the process (``python -m benchmarks.allocator``).
"""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
MOST = 2**31 - 1  # an int

# With these variables a user tunes glibc's allocator or replaces it.
TUNED_BY = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees.

    This affects the whole process: a command calls it only when it runs as the program.

    Returns:
        False where nothing was changed: the C library is not glibc, or the environment tunes it.
    """
    if any(os.environ.get(name) for name in TUNED_BY):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_TRIM_THRESHOLD, MOST) and libc.mallopt(M_MMAP_MAX, 0))
