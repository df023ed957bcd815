"""What a covariance from the network's derivative costs: python -m benchmarks.derivatives

A plain call of the noise network beside the calls of a step with ``variance="probes"`` and
``"lanczos"``, in turns, with each way to take the derivative. The memory is what the tensors of one
call hold at once, without the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.live_memory import LiveMemory
from sa_plugin.sampling.jacobian import WAYS, Probed, lanczos_root
from sa_plugin.schedule import NoiseSchedule

ALONE = "network alone"


def ways_of(network: str, batch: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Title -> what one step of the sampler calls, at step 500."""
    net, shape = machine.network(network, device)
    schedule = NoiseSchedule.linear(1000)
    x = torch.randn(batch, *shape, device=device)
    n = torch.full((batch,), 500, device=device)
    ways: dict[str, Callable[[], Tensor]] = {ALONE: lambda: net(x, n)}
    for way in WAYS:
        for probes in (1, 4, 16) if way != "difference" else (1,):
            probed = Probed(net, schedule, probes=probes, way=way)
            ways[f"{probes} probes, {way}"] = lambda probed=probed: probed(x, n)[1]
        ways[f"3 steps of Lanczos, {way}"] = lambda way=way: lanczos_root(
            net, schedule, x, n, x, steps=3, way=way
        )
    return ways


def peaks(ways: dict[str, Callable[[], Tensor]]) -> dict[str, int]:
    """Bytes that the tensors of each call hold at once."""
    found = {}
    for title, call in ways.items():
        with torch.no_grad(), LiveMemory() as memory:
            call()
        found[title] = memory.peak
    return found


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
    parser.add_argument("--network", choices=tuple(machine.NETWORKS), default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    machine.add_clock(parser)
    args = parser.parse_args()
    print(f"{args.network}, batch {args.batch}; {machine.describe(args.device)}\n")
    with torch.no_grad():
        ways = ways_of(args.network, args.batch, args.device)
        report(machine.in_turns(ways, args.rounds, args.device, args.clock, warmup=2))
        print("\n| call | MiB held at once | of the network alone |\n|---|---:|---:|")
        held = peaks(ways)
        for title, size in held.items():
            print(f"| {title} | {size / 2**20:.1f} | {size / held[ALONE]:.1f} |")


if __name__ == "__main__":
    main()
