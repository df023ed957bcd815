"""Time that the plug-in adds before the first step: python -m benchmarks.startup

Import: each fresh interpreter times torch and then sa_plugin. Tables: NoiseSchedule and TauTable
for N steps, with all tables that a loss derives from them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

PROGRAM = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sa_plugin
print(middle - start, time.perf_counter() - middle)
"""


def import_seconds() -> tuple[float, float]:
    """Times of importing torch and then sa_plugin in a fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch_seconds, plugin_seconds = map(float, out.split())
    return torch_seconds, plugin_seconds


def table_seconds(N: int) -> float:
    """Time to build a linear schedule's tables and the loss that uses them."""
    from sa_plugin import NoiseSchedule, SALoss

    start = time.perf_counter()
    SALoss(NoiseSchedule.linear(N), weighting="theorem1")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4000, help="N")
    args = parser.parse_args()
    imports = [import_seconds() for _ in range(args.repeats)]
    for name, seconds in zip(("torch", "sa_plugin"), zip(*imports, strict=True), strict=True):
        print(f"import {name:<12}{_spread(seconds)}")
    print(f"tables N = {args.steps:<7} {_spread([table_seconds(args.steps) for _ in imports])}")


def _spread(seconds: Sequence[float]) -> str:
    ms = sorted(1e3 * s for s in seconds)
    return f"{median(ms):9.2f} ms  ({ms[0]:.2f} to {ms[-1]:.2f})"


if __name__ == "__main__":
    main()
