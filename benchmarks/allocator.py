"""The gain of keeping freed memory (adapters/shell/allocator.py): python -m benchmarks.allocator

Two processes take turns in making the same training steps. One uses glibc's allocator with its
defaults, the other keeps freed memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch

from adapters.shell.allocator import keep_freed_memory
from benchmarks import machine
from benchmarks.training import parse_variants, some_images, timed
from benchmarks.training_steps import NETWORKS, Variant, build_steps


@dataclass(frozen=True)
class Measured:
    """One step: seconds, page faults that needed no disk, and peak memory so far in MiB."""

    seconds: float
    faults: int
    peak: float


class _Stepper:
    """Makes steps in a separate process."""

    made = None

    def __init__(self, args: argparse.Namespace, variant: Variant, keep: bool) -> None:
        if keep and not keep_freed_memory():
            raise ValueError("the allocator is not glibc's, or the environment tunes it")
        torch.set_num_threads(args.threads)
        ((self.step, _),) = build_steps([variant], args.network, "cpu").values()
        self.images = some_images(args)

    def __call__(self) -> Measured:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds, _ = timed(self.step, self.images)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return Measured(seconds, faults, machine.peak_memory("cpu"))


def _prepare(args: argparse.Namespace, variant: Variant, keep: bool) -> None:
    _Stepper.made = _Stepper(args, variant, keep)


def _one_step() -> Measured:
    return _Stepper.made()


def measure(args: argparse.Namespace, variant: Variant) -> tuple[list[Measured], list[Measured]]:
    """The steps of the two processes, default and kept, which take turns."""
    spawn = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=(args, variant, keep))
        for keep in (False, True)
    ]
    steps: tuple[list[Measured], list[Measured]] = ([], [])
    try:
        for round_ in range(args.warmup + args.repeats):
            for pool, done in zip(pools, steps, strict=True):
                measured = pool.submit(_one_step).result()
                if round_ >= args.warmup:
                    done.append(measured)
    finally:
        for pool in pools:
            pool.shutdown()
    return steps


def row(variant: Variant, steps: tuple[list[Measured], list[Measured]]) -> str:
    """Markdown: medians, the ratio of the seconds of consecutive steps, and the peaks."""
    as_is, kept = steps
    figures = [
        *(f"{1e3 * median(m.seconds for m in one):.4g}" for one in steps),
        machine.quartiles([b.seconds / a.seconds for a, b in zip(as_is, kept, strict=True)]),
        *(f"{median(m.faults for m in one):.0f}" for one in steps),
        *(f"{one[-1].peak:.0f}" for one in steps),
    ]
    return f"| {variant.title} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="digits")
    parser.add_argument("--variants", type=parse_variants, default="plain,all:2,one:2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    print(f"{args.network}, batch {args.batch}; {machine.describe('cpu')}\n")
    print("| step | ms, default | ms, kept | ratio (quartiles) ", end="")
    print("| page faults, default | kept | peak MiB, default | kept |")
    print("|---|" + "--:|" * 7)
    for variant in args.variants:
        print(row(variant, measure(args, variant)), flush=True)


if __name__ == "__main__":
    main()
