"""Reads thousands of damaged and hostile files: python -m benchmarks.fuzz --cases N --seed S

Every kind of file is damaged in every way of ``benchmarks.damage`` and read. Each kind has its own
process with a bounded address space, and each file a time limit. Prints a table in Markdown. The
exit code is 1 if anything is wrong: the process died, an error is no ValueError or OSError or does
not name the file, damage that the format's checksums reveal was accepted, or code was run.
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
from typing import NoReturn

from benchmarks.damage import OUTSIDE, bombs, hostile, inside
from benchmarks.loaders import LOADERS, Loader, fingerprint

ADDRESS_SPACE = 4 * 2**30  # bytes more than the process has when it starts
SECONDS = 60  # for one file
RSS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux


class TooSlow(BaseException):
    """Not an Exception, so no loader mistakes it for damage."""


@dataclass
class Tally:
    """The results of one loader's cases."""

    cases: int = 0
    refused: int = 0
    same: int = 0
    changed: int = 0
    wrong: list[str] = field(default_factory=list)  # results that must not occur
    peak: float = 0.0  # largest increase of memory by one case, MiB
    slowest: float = 0.0  # seconds


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


def cases_of(trial: Trial, count: int, seed: int) -> Iterator[tuple[str, bytes, bool]]:
    """(what it is, content, whether its checksums are correct)."""
    yield "empty", b"", False
    for name, content in hostile(trial.trace).items():
        yield f"hostile: {name}", content, True
    for name, content in bombs().items():
        yield f"bomb: {name}", content, True
    draw = random.Random(f"{trial.name} {seed}")
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


def run_loader(name: str, count: int, seed: int) -> Tally:
    """Run all cases of a loader in this process."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, Path(folder) / "own")
        for what, content, sums_hold in cases_of(trial, count, seed):
            began, before = time.perf_counter(), _reset_peak()
            signal.alarm(SECONDS)
            try:
                outcome = trial.check(content, sums_hold=sums_hold)
                setattr(tally, outcome, getattr(tally, outcome) + 1)
            except (Exception, TooSlow) as error:
                tally.wrong.append(f"{what}: {type(error).__name__}: {error}")
            signal.alarm(0)
            tally.cases += 1
            tally.peak = max(tally.peak, _peak() - before)
            tally.slowest = max(tally.slowest, time.perf_counter() - began)
    return tally


def _too_slow(*_: object) -> NoReturn:
    raise TooSlow(f"more than {SECONDS} s")


def _status(key: str) -> float:
    """An entry of this process's status, in MiB."""
    lines = RSS[1].read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def _peak() -> float:
    return _status("VmHWM")


def _reset_peak() -> float:
    """Reset the peak; the resident memory now, MiB."""
    RSS[0].write_text("5")
    return _status("VmRSS")


def _child(name: str, count: int, seed: int, answer: Connection) -> None:
    signal.signal(signal.SIGALRM, _too_slow)
    bound = int(_status("VmSize") * 2**20) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    # What the parent has freed but kept would be used first, and would hide an increase.
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    answer.send(run_loader(name, count, seed))


def in_own_process(name: str, count: int, seed: int) -> Tally:
    """``run_loader`` in a separate process, which may crash."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, count, seed, theirs))
    process.start()
    theirs.close()
    try:
        tally = ours.recv()
    except EOFError:
        tally = Tally()
    process.join()
    if process.exitcode:
        tally.wrong.append(f"the process died with exit code {process.exitcode}")
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
        tallies[name] = in_own_process(name, -(-asked.cases // len(names)), asked.seed)
        print(row(name, tallies[name]), flush=True)
    wrong = [f"{name}: {what}" for name, tally in tallies.items() for what in tally.wrong]
    print(f"\n{sum(t.cases for t in tallies.values()):,} files, {len(wrong)} wrong")
    print("\n".join(wrong[:50]), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
