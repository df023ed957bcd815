"""One process against two that share the images: python -m benchmarks.processes

Both take turns in running the whole command adapters.sample on the digits network with random
weights, start-up included. OMP_NUM_THREADS sets the threads of each process. Efficiency is the time
of one process over twice the time of two. A run of 64 images per process measures the start-up,
which the second figure leaves out; the full run should take several times as long.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import machine


def seconds(args: argparse.Namespace, folder: Path, processes: int, images: int) -> float:
    """Wall-clock time of one command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    out = tempfile.mkdtemp(dir=folder)
    command = [
        sys.executable, *(torchrun if processes > 1 else []), "-m", "adapters.sample",
        "--config=configs/digits_sn_sa.py", "--device=cpu", "--noprogress", f"--out={out}",
        f"--weights={folder / 'weights.pth'}", "--process=ddpm_small", f"--steps={args.steps}",
        "--format=npz", f"--config.sample.n_images={images}",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{machine.describe('cpu')}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(machine.network("digits", "cpu")[0].state_dict(), folder / "weights.pth")
        whole, inner = [], []
        for _ in range(args.rounds):
            one, two = (seconds(args, folder, p, args.images) for p in (1, 2))
            start_one, start_two = (seconds(args, folder, p, 64 * p) for p in (1, 2))
            print(f"one {one:.2f} s (64: {start_one:.2f}), two {two:.2f} s (128: {start_two:.2f})")
            whole.append(one / two / 2)
            # Rates of the images beyond the first 64 of each process.
            rate_one = (args.images - 64) / (one - start_one)
            rate_two = (args.images - 128) / (two - start_two)
            inner.append(rate_two / rate_one / 2)
    print(f"efficiency of 2 processes: {machine.spread(whole)}, start-up included")
    print(f"                           {machine.spread(inner)}, without it")


if __name__ == "__main__":
    main()
