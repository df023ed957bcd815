"""Shared by all commands: parsing of their own options, one-line errors and exit codes."""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGPIPE, SIGTERM
from typing import Any, NoReturn

from adapters.shell import signals
from sa_files.reading import one_line

# All exit codes; docs/reliability.md says how a batch script can use them.
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
# Plus the signal's number, as shells count: 130 SIGINT, 141 SIGPIPE, 143 SIGTERM.
EXIT_BY_SIGNAL = 128
_STDOUT = 1
CONTINUES = "; the same command continues it"
# These come back until somebody changes the files: a folder where a file belongs, a name too long.
LASTING = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
# With these variables a user tunes glibc's allocator or replaces it.
TUNED_BY = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


class OwnOptions(argparse.ArgumentParser):
    """Parser of one command's own options; its errors are ValueErrors.

    ``parse_known_args(argv[1:])`` returns their values, and the rest for ``read_command_line``.
    """

    def __init__(self, module: str, **options: Any) -> None:
        options.setdefault("formatter_class", _LineForEach)
        super().__init__(prog=f"python -m {module}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise an error; argparse would print a long message."""
        raise ValueError(message)


class _LineForEach(argparse.RawDescriptionHelpFormatter):
    """Help with an option in a line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X"


def exit_code(
    module: str,
    work: Callable[[], None],
    *,
    failed: int = EXIT_BAD_INPUT,
    continues: str = CONTINUES,
) -> int:
    """Do ``work``; report what stops it in one line on stderr.

    Returns:
        0: done, or help was shown; 2: a ValueError, or an OSError that does not pass by itself;
        ``failed``: another OSError; 130: stopped by SIGINT; 143: by SIGTERM; 141, without a line:
        nobody reads the output any more, as after ``| head``. A SystemExit's own code. Any other
        exception is a bug and keeps its traceback.

    Args:
        failed: EXIT_FAILED if the command can be repeated after an OSError; the message says so.
        continues: this text is added to the messages of a command that can be repeated.
    """
    try:
        with signals.caught():
            code = _code_of(work)
            sys.stdout.flush()
    except ValueError as error:
        return _tell(module, error, EXIT_BAD_INPUT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_unread():
            return EXIT_BY_SIGNAL + SIGPIPE
        if error.errno in LASTING:
            return _tell(module, _in_the_way(error), EXIT_BAD_INPUT)
        return _tell(module, error, failed, continues if failed == EXIT_FAILED else "")
    except KeyboardInterrupt as stop:
        number = signals.received() or SIGINT  # no signal: another process passed the stop on
        what = "terminated" if number == SIGTERM else "interrupted"
        said = f"{what}: {stop}" if stop.args else what
        return _tell(module, said, EXIT_BY_SIGNAL + number, continues)
    return code


def _in_the_way(error: OSError) -> str:
    """What has the place of a command's file or folder, and what to do about it."""
    place = Path(error.filename2 or error.filename or "")
    if error.errno == errno.ENOTDIR:
        place = next(filter(Path.is_file, place.parents), place)
    return f"{place} cannot be used ({error.strerror}): move it away, or give another place"


def _code_of(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as end:  # of argparse, after --help; or of a part that has said why
        return int(end.code or 0)
    return 0


def _output_is_unread() -> bool:
    """Whether standard output is a pipe without a reader; what is left for it is then dropped."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return unread


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; whether anything was changed.

    glibc returns large freed blocks to the system, which clears each page before it hands it out
    again; a training step on the CPU loses 3 to 12 % of its time to that. A command calls this only
    when it runs as the program. Another C library, or an allocator that the environment tunes, is
    left alone.
    """
    if any(map(os.environ.get, TUNED_BY)) or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


@contextmanager
def one_line_warnings(module: str) -> Iterator[None]:
    """Within the block, print each warning in one line on stderr, like an error."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(module, f"warning: {message}", 0)
        yield


def _tell(module: str, what: object, code: int, more: str = "") -> int:
    # In one piece: torchrun's processes do not buffer, and print writes the line's end on its own.
    sys.stderr.write(f"{module}: {one_line(str(what))}{more}\n")
    return code
