"""Reads thousands of damaged and hostile files: python -m benchmarks.fuzz --cases N --seed S

Every kind of file is damaged in every way of ``benchmarks.damage`` and read, and replaced by the
files of ``benchmarks.work``, which ask for much work. Each kind has its own process with a bounded
address space. Prints a table in Markdown. The exit code is 1 if anything is wrong: the process
died, an error is no ValueError or OSError or does not name the file, damage that the format's
checksums reveal was accepted, code was run, or a file took more time or memory than its size
allows: 5 s and 1 s for each MiB, 300 MiB and 4 times its size.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.damage import OUTSIDE, bombs, hostile, inside
from benchmarks.loaders import LOADERS, Loader, fingerprint
from benchmarks.work import work_bomb

ADDRESS_SPACE = 4 * 2**30  # bytes more than the process has when it starts
SECONDS, MEMORY = 5, 300  # for one file, s and MiB; and more for a large one:
SECONDS_PER_MIB, MEMORY_PER_MIB = 1, 4
PATIENCE = 4  # a process is ended after so many times the seconds of a file
# Seconds of the clock for a file. The bounds above are seconds of the processor: those of the clock
# grow without a limit on a busy machine. These are only for a process that waits for something.
HANG = 600
RSS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux


@dataclass
class Tally:
    """The results of one loader's cases."""

    cases: int = 0
    refused: int = 0
    same: int = 0
    changed: int = 0
    wrong: list[str] = field(default_factory=list)  # results that must not occur
    peak: float = 0.0  # largest increase of memory by one case, MiB
    slowest: float = 0.0  # seconds of the processor for one case
    last: str = ""  # the case that is being read


class Trial:
    """One loader with its valid sample, which is damaged and read again and again."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.loader: Loader = LOADERS[name]
        self.path = folder / self.loader.file
        self.trace = folder / "trace"
        self.path.parent.mkdir(parents=True)
        self.loader.write(self.path)
        self.sound = self.path.read_bytes()
        self.expected = fingerprint(self.loader.read(self.path))

    def read(self, content: bytes) -> str:
        """ "refused", "same" or "changed"; other exceptions than those for damage are raised."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_bytes(content)
        try:
            found = fingerprint(self.loader.read(self.path))
        except (ValueError, OSError) as error:
            if str(self.path.parent) not in str(error):
                raise AssertionError(f"the error does not name the file: {error}") from error
            if "\n" in str(error):
                raise AssertionError(f"the error has several lines: {error}") from error
            return "refused"
        finally:
            if self.trace.exists():
                raise AssertionError("code from the file was run")
        return "same" if found == self.expected else "changed"

    def check(self, content: bytes, *, sums_hold: bool) -> str:
        """The same, but damage that the format's checksums reveal must not be accepted."""
        outcome = self.read(content)
        if outcome == "changed" and self.loader.has_sums and not sums_hold:
            raise AssertionError("damage was read in silence, though the format has sums")
        return outcome


def cases_of(trial: Trial, count: int, work: int, seed: int) -> Iterator[tuple[str, bytes, bool]]:
    """(what it is, content, whether its checksums are correct)."""
    draw = random.Random(f"{trial.name} {seed}")
    for _ in range(work):
        what, content = work_bomb(trial.sound, draw)
        yield f"work: {what}", content, True
    if count == 0:
        return
    yield "empty", b"", False
    for name, content in hostile(trial.trace).items():
        yield f"hostile: {name}", content, True
    for name, content in bombs().items():
        yield f"bomb: {name}", content, True
    others = [name for name in LOADERS if name != trial.name]
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(others):
            yield f"swapped: {name}", Trial(name, Path(folder) / str(i)).sound, True
    done = 1 + len(hostile(trial.trace)) + len(bombs()) + len(others)
    for _ in range(max(0, count - done)):
        name, operation = draw.choice(list(OUTSIDE.items()))
        at, what, within = draw.getrandbits(40), draw.getrandbits(40), draw.random() < 0.4
        if within:
            yield f"{name} inside {at} {what}", inside(trial.sound, operation, at, what), True
        else:
            yield f"{name} {at} {what}", operation(trial.sound, at, what), False


def run_loader(name: str, count: int, work: int, seed: int) -> Iterator[Tally]:
    """Run all cases of a loader in this process; the results so far, before each case and last."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, Path(folder) / "own")
        for what, content, sums_hold in cases_of(trial, count, work, seed):
            tally.last, size = what, len(content) / 2**20
            yield tally
            signal.setitimer(signal.ITIMER_PROF, PATIENCE * (SECONDS + SECONDS_PER_MIB * size))
            began, before = time.process_time(), _reset_peak()
            try:
                outcome = trial.check(content, sums_hold=sums_hold)
                setattr(tally, outcome, getattr(tally, outcome) + 1)
            except Exception as error:
                tally.wrong.append(f"{what}: {type(error).__name__}: {error}")
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds, memory = time.process_time() - began, _peak() - before
            if seconds > SECONDS + SECONDS_PER_MIB * size:
                tally.wrong.append(f"{what}: {seconds:.1f} s for {size:.1f} MiB")
            if memory > MEMORY + MEMORY_PER_MIB * size:
                tally.wrong.append(f"{what}: {memory:.0f} MiB of memory for {size:.1f} MiB")
            tally.cases += 1
            tally.peak, tally.slowest = max(tally.peak, memory), max(tally.slowest, seconds)
    tally.last = ""
    yield tally


def _status(key: str) -> float:
    """An entry of this process's status, in MiB."""
    lines = RSS[1].read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def _peak() -> float:
    return _status("VmHWM")


def _reset_peak() -> float:
    """Reset the peak; the resident memory now, MiB.

    Memory that is freed but kept, by this process or by its parent before the fork, would be used
    first, and would hide an increase: it is given back.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    RSS[0].write_text("5")
    return _status("VmRSS")


def _child(name: str, count: int, work: int, seed: int, answer: Connection) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a handler would wait for the end of a hash
    bound = int(_status("VmSize") * 2**20) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    for tally in run_loader(name, count, work, seed):
        answer.send(tally)


def in_own_process(name: str, count: int, seed: int, work: int = 0) -> Tally:
    """``run_loader`` in a separate process, which may crash, or be ended in an endless case."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, count, work, seed, theirs))
    process.start()
    theirs.close()
    tally = Tally()
    with contextlib.suppress(EOFError):
        while ours.poll(HANG):
            tally = ours.recv()
        process.kill()
    process.join()
    if process.exitcode:
        tally.wrong.append(f"{tally.last}: the process died with exit code {process.exitcode}")
    return tally


def row(name: str, tally: Tally) -> str:
    """A line of the table."""
    has_sums = "yes" if LOADERS[name].has_sums else "no"
    numbers = (tally.cases, tally.refused, tally.same, tally.changed, len(tally.wrong))
    cells = [name, has_sums, *(f"{n:,}" for n in numbers)]
    return "| " + " | ".join([*cells, f"{tally.peak:.0f}", f"{tally.slowest:.1f}"]) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything is wrong."""
    parser = argparse.ArgumentParser("benchmarks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="number for all loaders together")
    parser.add_argument("--work", type=int, default=0, help="number of work bombs for all loaders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(LOADERS), nargs="*", help="only these loaders")
    asked = parser.parse_args(argv)
    bombs()  # made once, for all processes
    names = asked.only or list(LOADERS)
    print(
        "| file | checksums | cases | refused | read as before | read otherwise | wrong | MiB | s |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    tallies = {}
    for name in names:
        cases, work = (-(-total // len(names)) for total in (asked.cases, asked.work))
        tallies[name] = in_own_process(name, cases, asked.seed, work)
        print(row(name, tallies[name]), flush=True)
    wrong = [f"{name}: {what}" for name, tally in tallies.items() for what in tally.wrong]
    print(f"\n{sum(t.cases for t in tallies.values()):,} files, {len(wrong)} wrong")
    print("\n".join(wrong[:50]), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
