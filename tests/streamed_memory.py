"""Peak memory of sampling to the disk: python -m tests.streamed_memory FORMAT N_IMAGES FOLDER

Prints the most memory, in MiB, that this process has held.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from adapters.measuring.evaluation import Summary, summarise
from adapters.measuring.extractor import Extracted, Extractor
from adapters.sample import METRICS, SINKS
from adapters.sampling.metrics_sink import MetricsFile
from adapters.sampling.pipeline import Source, fill
from adapters.sampling.sinks import Sink
from sa_plugin import NoiseSchedule, Sampler

SHAPE = (3, 32, 32)


def peak() -> float:
    """MiB. Not getrusage's, which a process takes over from the one that has started it."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def sink_of(form: str, n_images: int, folder: Path) -> Sink:
    """A sink of ``adapters.sample``; for metrics, the means of 8x8 pixels are the features."""
    if form != METRICS:
        return SINKS[form](folder, n_images)
    means = torch.nn.AvgPool2d(8)
    extractors = [Extractor("means", lambda x: Extracted(means(x).flatten(1)))]

    def reference() -> Summary:
        levels = torch.arange(100 * 3 * 32 * 32) * 7919 % 256
        return summarise([levels.view(100, *SHAPE).to(torch.uint8)], extractors)

    return MetricsFile(folder, n_images, extractors, reference)


def main(form: str, n_images: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sampler = Sampler(lambda x, n: 0.1 * x, NoiseSchedule.linear(1000), steps=2)
    sink = sink_of(form, n_images, folder)
    fill(sink, lambda: Source(sampler, SHAPE, batch_size=500, multiple=64))
    assert not sink.missing()
    print(peak())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
