"""What a correction costs beside its network's call: python -m benchmarks.correction

A call of the digits' network alone and within each correction, in turns. The corrections add the
same few operations to every network, so a larger network's share is smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from sa_plugin.effect.correction import ShiftedNoise, SpectralShrinkage
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.schedule import NoiseSchedule

ALONE = "network alone"


def ways_of(network: str, batch: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Title -> one call at step 500, where every correction acts."""
    net, shape = machine.network(network, device)
    schedule, q = NoiseSchedule.linear(1000), 1 / 3
    pictures = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (200, *shape), np.uint8))
    pca, dct = Spectrum.of([pictures]), Spectrum.of([pictures], most=0)
    models = {
        ALONE: net,
        "ShiftedNoise": ShiftedNoise(net, schedule, q),
        "ShiftedNoise, mean image": ShiftedNoise(net, schedule, q, pca.mean),
        "SpectralShrinkage, pca": SpectralShrinkage(net, schedule, pca, q),
        "SpectralShrinkage, dct": SpectralShrinkage(net, schedule, dct, q),
    }
    x = torch.randn(batch, *shape, device=device)
    n = torch.full((batch,), 500, device=device)
    return {title: lambda model=model: model(x, n) for title, model in models.items()}


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call by way; the ways in turn."""
    ways = ways_of(args.network, args.batch, args.device)
    with torch.no_grad():
        return machine.in_turns(ways, args.rounds, args.device, args.clock, warmup=10)


def report(seconds: dict[str, list[float]]) -> None:
    """A table in Markdown, with the ratio to the network alone within each round."""
    print("| call | ms, median (quartiles) | of the network alone: median (quartiles) | 95 % |")
    print("|---|---|---|---|")
    for title, values in seconds.items():
        shown = machine.quartiles([1e3 * s for s in values])
        ratios = machine.ratios(values, seconds[ALONE])
        low, high = machine.median_interval(ratios)
        more = 1e6 * (median(values) - median(seconds[ALONE]))
        interval = "" if title == ALONE else f"{low:.3f} to {high:.3f} ({more:+.0f} µs)"
        print(f"| {title} | {shown} | {machine.quartiles(ratios)} | {interval} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=(*machine.NETWORKS, "loop"), default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    machine.add_clock(parser)
    args = parser.parse_args()
    print(f"{args.network}, batch {args.batch}; {machine.describe(args.device)}\n")
    report(measure(args))


if __name__ == "__main__":
    main()
