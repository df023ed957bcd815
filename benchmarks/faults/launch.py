"""A command as processes forked from this one.

A new interpreter needs five seconds for its imports, and a fault in this time can lose nothing. A
fork of a process that has the imports runs the same ``main`` from its first line and ends like a
separate process.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

HUNG = 120.0  # seconds after which a command that should end counts as hanging
POLL_SECONDS = 0.005
_LATE_IMPORTS = (
    "adapters.analytic_dpm",
    "adapters.compare",
    "adapters.experiment.gamma_stage",
    "adapters.sample",
    "adapters.sn_dpm",
    "adapters.experiment.stages",
    "matplotlib.pyplot",
    "scipy.optimize",
    "sklearn.datasets",
    "torch.distributed.algorithms",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Command:
    """``main(argv)`` in ``processes`` processes; ``argv`` begins with the program's name."""

    main: Callable[[Sequence[str]], int]
    argv: tuple[str, ...]
    processes: int = 1


def preload() -> None:
    """Import the modules that the commands need; the process must keep a single thread."""
    torch.set_num_threads(1)
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads, but a fork keeps only one: set OMP_NUM_THREADS=1")


class Launched:
    """A running command; ``codes`` are its processes' exit codes, or minus the signal's number.

    Args:
        log: file for its output.
        prepare: called first in each process.
    """

    def __init__(
        self, command: Command, log: Path, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.codes: dict[int, int] = {}
        group = _group(command.processes)
        sys.stdout.flush()
        self.pids = [self._fork(command, environment, prepare) for environment in group]

    def _fork(
        self, command: Command, environment: dict[str, str], prepare: Callable[[], None]
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setsid()
            # A shell makes the programs that it starts in the background ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(environment)
            prepare()
            code = command.main(command.argv)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    def send(self, number: int, process: int | None = None) -> bool:
        """Signal all its processes, or one; whether all of them were still running."""
        chosen = self.pids if process is None else [self.pids[process]]
        self._collect()
        there = [pid for pid in chosen if pid not in self.codes]
        for pid in there:
            os.kill(pid, number)
        return len(there) == len(chosen)

    def kill(self) -> bool:
        """SIGKILL for all its processes and for those that they have started."""
        self._collect()
        there = [pid for pid in self.pids if pid not in self.codes]
        for pid in there:
            os.killpg(pid, signal.SIGKILL)
        self.wait()
        return len(there) == len(self.pids)

    def is_at_work(self) -> bool:
        """Whether none of its processes has ended."""
        self._collect()
        return not self.codes

    def children(self) -> list[int]:
        """The processes that the first one has started."""
        path = Path(f"/proc/{self.pids[0]}/task/{self.pids[0]}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def wait(self, limit: float = HUNG) -> list[int] | None:
        """The exit codes by process; None if the command hung and was killed."""
        until = time.monotonic() + limit
        while len(self.codes) < len(self.pids) and time.monotonic() < until:
            self._collect()
            time.sleep(POLL_SECONDS)
        if len(self.codes) < len(self.pids):
            self.kill()
            return None
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """All its output."""
        return self.log.read_text(errors="replace")

    def _collect(self) -> None:
        for pid in self.pids:
            if pid in self.codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)


def _group(processes: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
