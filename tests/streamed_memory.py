"""Peak memory of sampling to the disk: python -m tests.streamed_memory FORMAT N_IMAGES FOLDER

Prints the most memory, in MiB, that this process has held.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from adapters.sample import SINKS
from adapters.sampling.pipeline import Source, fill
from sa_plugin import NoiseSchedule, Sampler

SHAPE = (3, 16, 16)


def peak() -> float:
    """MiB. Not getrusage's, which a process takes over from the one that has started it."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def main(form: str, n_images: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sampler = Sampler(lambda x, n: 0.1 * x, NoiseSchedule.linear(1000), steps=2)
    sink = SINKS[form](folder, n_images)
    fill(sink, lambda: Source(sampler, SHAPE, batch_size=500, multiple=64))
    assert not sink.missing()
    print(peak())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
