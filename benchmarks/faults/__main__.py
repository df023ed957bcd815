"""python -m benchmarks.faults --runs 200 --seed 0: lines and the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; a fork keeps one thread

from benchmarks.faults.jobs import Job, all_jobs
from benchmarks.faults.kinds import KINDS, Case, room_for
from benchmarks.faults.launch import Launched, preload
from benchmarks.faults.report import Outcome, table

_SINGLE = ("training", "Gamma", "sampling", "grid")
_TWO = ("training, 2 processes", "sampling, 2 processes")
_MORE = ("SN-DPM, more iterations", "SN-DPM, more steps")
_WHOLE = ("SN-DPM, all stages", "NPR-DPM, all stages", "Analytic-DPM, all stages", *_MORE)
# How often each pair occurs in a round. Grids take longest, so they occur less often.
ROUND: dict[str, tuple[str, ...]] = {
    "SIGKILL": (*_SINGLE, *_TWO, *_WHOLE, "report", "grid, 2 workers"),
    "SIGTERM": (*_SINGLE, *_TWO, *_WHOLE, "report", "grid, 2 workers"),
    "SIGINT": (*_SINGLE, *_TWO),
    "SIGTERM, then SIGINT": ("training", "sampling", *_WHOLE),
    "SIGINT, then SIGTERM": ("Gamma", "training, 2 processes", *_MORE),
    "SIGSTOP, then SIGCONT": (*_SINGLE, *_TWO, "SN-DPM, all stages"),
    "a result removed or emptied": (*_SINGLE, *_WHOLE),
    "one process of two dies": _TWO,
    "one worker dies": ("grid, 2 workers",),
    "SIGTERM for one of two": ("training, 2 processes",),
    "disk full": (*_SINGLE, *_TWO, *_WHOLE),
    "read-only disk": _SINGLE,
    "clock backwards": _SINGLE,
    "two runs in one folder": _SINGLE,
}
RUN = "run"  # the name of each run's folder


@dataclass(frozen=True)
class Reference:
    """The results of an undisturbed job, and how long it takes."""

    results: dict[str, bytes]
    seconds: float


class Campaign:
    """Causes faults one after another, continues each run and compares it with the reference."""

    def __init__(self, scratch: Path, seed: int, kinds: Sequence[str]) -> None:
        self.scratch = scratch
        self.kinds = kinds
        self.rng = random.Random(seed)
        self.jobs = all_jobs(scratch)
        self._references: dict[str, Reference] = {}

    def run(self, faults: int) -> Iterator[Outcome]:
        """Cause ``faults`` faults; a command that ended before its fault does not count."""
        count = 0
        while count < faults:
            pairs = [(kind, job) for kind in self.kinds for job in ROUND[kind]]
            self.rng.shuffle(pairs)
            for kind, job in pairs:
                if count < faults:
                    outcome = self._one(kind, self.jobs[job])
                    count += outcome.in_time
                    yield outcome

    def _one(self, kind: str, job: Job) -> Outcome:
        reference = self._reference(job)
        seed = self.rng.getrandbits(64)
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            folder = Path(name) / RUN
            job.prepare(folder)
            room = room_for(reference.results)
            case = Case(job, folder, random.Random(seed), reference.seconds, room)
            generator = KINDS[kind](case)
            in_time = next(generator)
            try:
                equal = self._continue(case, reference)
            finally:
                for _ in generator:  # the generator cleans up
                    pass
        return Outcome(
            kind, job.name, in_time, equal, case.refusals, case.ended, tuple(case.complaints)
        )

    def _continue(self, case: Case, reference: Reference) -> bool:
        """Continue the run, sometimes with one more kill; whether the results are equal."""
        if case.rng.random() < 1 / 4:
            again = case.launch()
            case.wait_a_moment()
            again.kill()
        case.expect(case.launch(), {0})
        left = case.job.results(case.folder)
        if left != reference.results:
            names = left.keys() | reference.results.keys()
            other = sorted(n for n in names if left.get(n) != reference.results.get(n))
            case.complaints.append(f"differs: {other[:8]}")
        return left == reference.results

    def _reference(self, job: Job) -> Reference:
        if job.name not in self._references:
            # Pictures show the folder's name: all have the same.
            folder = self.scratch / "references" / job.name.replace(" ", "_") / RUN
            job.prepare(folder)
            began = time.monotonic()
            launched = Launched(job.command(folder), folder.with_suffix(".log"))
            if set(launched.wait() or [None]) != {0}:
                raise RuntimeError(f"{job.name} fails undisturbed:\n{launched.said()}")
            found = Reference(job.results(folder), time.monotonic() - began)
            print(f"{job.name}: {found.seconds:.1f} s, {len(found.results)} files", flush=True)
            self._references[job.name] = found
        return self._references[job.name]


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    keep.mkdir(parents=True)
    yield keep


def main() -> int:
    """0 if every run was continued to the same bytes and every command ended as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="new folder that keeps all files; default: none")
    parser.add_argument("--kind", action="append", choices=tuple(ROUND), help="default: all")
    args = parser.parse_args()
    preload()
    began, outcomes = time.monotonic(), []
    try:
        with _scratch(args.keep) as scratch:
            campaign = Campaign(scratch.absolute(), args.seed, args.kind or tuple(ROUND))
            for outcome in campaign.run(args.runs):
                outcomes.append(outcome)
                print(f"{len(outcomes)} {outcome.line()}", flush=True)
    finally:
        print(table(outcomes))
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
