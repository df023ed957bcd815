"""The faults: each occurs in one run of a job at a random moment.

A kind is a generator. It runs a case's job until the fault has had its effect and checks with
``Case.expect`` what an interrupted command must do. It then yields whether the fault came in time,
before the job had ended. The campaign continues the run and compares the results. Afterwards the
generator cleans up.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters.experiment.config import LOCK_FILE
from adapters.experiment.folder import REPLACED
from benchmarks.faults.jobs import Job
from benchmarks.faults.launch import HUNG, POLL_SECONDS, Launched

STOPPED = "another process of the run has stopped"
AT_WORK = "another (run|command) is at work in"
TOGETHER = 0.05  # seconds between two signals
_YEAR = 365 * 24 * 3600
_BLOCK = 4096  # bytes; a file takes whole blocks


@dataclass
class Case:
    """One run of a job with a fault.

    Attributes:
        seconds: time that the undisturbed job takes.
        room: bytes on disk that its results take.
        complaints: what the commands did wrong.
        ended: the longest wait for a command's end, s.
        refusals: number of commands that correctly refused to work.
    """

    job: Job
    folder: Path
    rng: random.Random
    seconds: float
    room: int
    complaints: list[str] = field(default_factory=list)
    ended: float = 0.0
    refusals: int = 0
    _commands: int = 0

    def launch(self, prepare: Callable[[], None] = lambda: None) -> Launched:
        """Start the job's command in the folder."""
        self._commands += 1
        log = self.folder.with_name(f"{self.folder.name}.{self._commands}.log")
        return Launched(self.job.command(self.folder), log, prepare)

    def wait_a_moment(self) -> None:
        """Wait a random part of the time that the job takes."""
        time.sleep(self.rng.uniform(0.02, 0.98) * self.seconds)

    def wait_for_lock(self, launched: Launched) -> None:
        """Wait until its processes have connected and hold the lock of the folder."""
        until = time.monotonic() + HUNG  # ``expect`` tells of one that hangs
        while not (self.folder / LOCK_FILE).exists() and launched.is_at_work():
            if time.monotonic() > until:
                break
            time.sleep(POLL_SECONDS)

    def expect(self, launched: Launched, codes: set[int], words: str = "") -> None:
        """Wait for the end; record a complaint if an exit code or the output is not as it must be.

        Args:
            words: a regular expression that the output must match somewhere.
        """
        began = time.monotonic()
        found = launched.wait()
        self.ended = max(self.ended, time.monotonic() - began)
        said = launched.said()
        if found is None:
            self.complaints.append("hangs")
        elif not codes >= set(found):
            self.complaints.append(f"exit codes {found}, not of {sorted(codes)}: {said[-2000:]}")
        elif not re.search(words, said):
            self.complaints.append(f"does not say {words!r}: {said[-2000:]}")
        elif re.search("^Traceback", said, re.MULTILINE):  # a report quotes tracebacks indented
            self.complaints.append(f"a traceback: {said[-2000:]}")


def room_for(files: dict[str, bytes]) -> int:
    """The bytes that files take on a tmpfs; folders take none."""
    return _BLOCK * sum(-(-len(content) // _BLOCK) for content in files.values())


Kind = Callable[[Case], Iterator[bool]]


def killed(case: Case) -> Iterator[bool]:
    """SIGKILL for all processes."""
    launched = case.launch()
    case.wait_a_moment()
    yield launched.kill()


def signalled(*numbers: int) -> Kind:
    """A signal for the command, or for each of its two processes; perhaps soon another one."""

    def fault(case: Case) -> Iterator[bool]:
        launched = case.launch()
        case.wait_a_moment()
        for number in numbers:
            launched.send(number)
            time.sleep(TOGETHER)
        # 0: the signal came after the last work that it could stop.
        codes = {0, *(128 + number for number in numbers)}
        if len(launched.pids) > 1:
            # A process may see the other's end before its own signal (code 1). A process that waits
            # for the other ends at once (the negative signal number).
            codes |= {1, *(-number for number in numbers)}
        case.expect(launched, codes)
        yield 0 not in launched.codes.values()

    return fault


def paused(case: Case) -> Iterator[bool]:
    """SIGSTOP, and SIGCONT a second later: the command must end as if nothing had happened."""
    launched = case.launch()
    case.wait_a_moment()
    in_time = launched.send(signal.SIGSTOP)
    time.sleep(1)
    launched.send(signal.SIGCONT)
    case.expect(launched, {0})
    yield in_time


def result_lost(case: Case) -> Iterator[bool]:
    """Another removes or empties a result of the finished run, or of the one that was killed."""
    given = case.job.results(case.folder)
    launched = case.launch()
    if case.rng.random() < 1 / 2:
        case.expect(launched, {0})
    else:
        case.wait_a_moment()
        launched.kill()
    there = [case.folder / name for name in sorted(case.job.results(case.folder).keys() - given)]
    there = [path for path in there if _is_made_again(path)]
    if there:
        victim = case.rng.choice(there)
        # A checkpoint without resume.pth is a whole one of the host.
        if victim.name == "resume.pth" or case.rng.random() < 1 / 2:
            victim.write_bytes(b"")
        else:
            victim.unlink()
    yield bool(there)


def _is_made_again(path: Path) -> bool:
    """Whether a run needs it and can make it; of several checkpoints, only the last one.

    Not so: a training's log, replaced results, the state of a Gamma that may be finished.
    """
    if REPLACED in path.parts:
        return False
    checkpoint = _checkpoint_of(path)
    if checkpoint is None:
        return path.name not in ("log.csv", "state.pth")
    iterations = sorted(int(other.stem) for other in checkpoint.parent.glob("*.ckpt"))
    return int(checkpoint.stem) in iterations[1:][-1:]


def _checkpoint_of(path: Path) -> Path | None:
    return next((parent for parent in path.parents if parent.suffix == ".ckpt"), None)


def one_dies(case: Case) -> Iterator[bool]:
    """SIGKILL for one of two connected processes: the other must end and say why in one line."""
    launched = case.launch()
    case.wait_for_lock(launched)
    case.wait_a_moment()
    victim = case.rng.randrange(2)
    launched.send(signal.SIGKILL, victim)
    case.expect(launched, {-signal.SIGKILL, 0, 1})
    code = launched.codes[launched.pids[1 - victim]]
    if code == 1:
        case.expect(launched, {-signal.SIGKILL, 1}, STOPPED)
    yield code != 0


def one_worker_dies(case: Case) -> Iterator[bool]:
    """SIGKILL for a worker of the grid: the others go on, and what is not done is told."""
    launched = case.launch()
    case.wait_a_moment()
    workers = launched.children()
    if workers:
        os.kill(case.rng.choice(workers), signal.SIGKILL)
    case.expect(launched, {0, 1} if workers else {0})  # 0: it had done its last task
    if launched.wait() == [1]:
        case.expect(launched, {1}, "its process ended, killed or out of memory")
    yield bool(workers)


def one_is_told(case: Case) -> Iterator[bool]:
    """SIGTERM for one of two training processes: both must stop after the same step."""
    launched = case.launch()
    case.wait_for_lock(launched)
    case.wait_a_moment()
    launched.send(signal.SIGTERM, case.rng.randrange(2))
    case.expect(launched, {0, 1, 130, 143})
    yield 0 not in launched.codes.values()


def full_disk(case: Case) -> Iterator[bool]:
    """Too little space for the job's results; more space for the continuation."""
    given = room_for(case.job.results(case.folder))
    room = given + int((case.room - given) * case.rng.uniform(0.05, 0.95))
    with _small_disk(case.folder, room) as (mounted, prepare):
        case.job.prepare(case.folder)
        launched = case.launch(prepare)
        words = "No space left on device|File too large|is the disk full"
        enough = launched.wait() == [0] * len(launched.pids)
        if not enough:
            case.expect(launched, {1}, words)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(case.folder)], check=True)
        yield not enough


def read_only(case: Case) -> Iterator[bool]:
    """The run is killed; the disk is read-only for a while before the run is continued."""
    with _small_disk(case.folder, None) as (mounted, _):
        case.job.prepare(case.folder)
        (in_time,) = killed(case)
        before = case.job.results(case.folder)
        with _unwritable(case.folder, mounted):
            case.expect(case.launch(), {1}, "Read-only file system" if mounted else "denied")
        case.refusals += 1
        if case.job.results(case.folder) != before:
            case.complaints.append("something has changed on a read-only disk")
        yield in_time


def backward_clock(case: Case) -> Iterator[bool]:
    """A clock that runs backwards, a kill, and file times moved by years."""
    launched = case.launch(_turn_the_clock)
    case.wait_a_moment()
    in_time = launched.kill()
    for path in case.folder.rglob("*"):
        moment = time.time() + case.rng.uniform(-10, 10) * _YEAR
        os.utime(path, (moment, moment), follow_symlinks=False)
    case.expect(case.launch(_turn_the_clock), {0})
    yield in_time


def two_at_once(case: Case) -> Iterator[bool]:
    """A second command in the folder while the first one is running."""
    first = case.launch()
    case.wait_a_moment()
    in_time = first.send(signal.SIGSTOP)  # so that it stays at work
    second = case.launch(_be_impatient)
    # If the first was stopped before it had the lock, the second may have done all the work.
    case.expect(second, {0, 2})
    if second.wait() == [2]:
        case.expect(second, {2}, AT_WORK)
        case.refusals += 1
    first.send(signal.SIGCONT)
    case.expect(first, {0})
    yield in_time


@contextmanager
def _small_disk(folder: Path, room: int | None) -> Iterator[tuple[bool, Callable[[], None]]]:
    """A disk of ``room`` bytes at ``folder`` if we may mount one, otherwise a limit on file size.

    Yields whether a disk is mounted, and a function that each process must call first.
    """
    folder.mkdir(exist_ok=True)
    size = "64m" if room is None else str(room)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        limit = resource.RLIM_INFINITY if room is None else room // 20
        yield False, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return
    try:
        yield True, lambda: None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def _unwritable(folder: Path, mounted: bool) -> Iterator[None]:
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in folders}
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def _turn_the_clock() -> None:
    """From now on ``time.time`` of this process runs backwards, one hour per second."""
    began, monotonic = time.time(), time.monotonic
    start = monotonic()
    time.time = lambda: began - 3600 * (monotonic() - start)


def _be_impatient() -> None:
    from adapters import compare
    from adapters.experiment import config

    config.PATIENCE = compare.PATIENCE = 0.5


KINDS: dict[str, Kind] = {
    "SIGKILL": killed,
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGINT": signalled(signal.SIGINT),
    "SIGTERM, then SIGINT": signalled(signal.SIGTERM, signal.SIGINT),
    "SIGINT, then SIGTERM": signalled(signal.SIGINT, signal.SIGTERM),
    "SIGSTOP, then SIGCONT": paused,
    "a result removed or emptied": result_lost,
    "one process of two dies": one_dies,
    "one worker dies": one_worker_dies,
    "SIGTERM for one of two": one_is_told,
    "disk full": full_disk,
    "read-only disk": read_only,
    "clock backwards": backward_clock,
    "two runs in one folder": two_at_once,
}
