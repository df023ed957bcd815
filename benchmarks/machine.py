"""Code that the benchmarks share: the machine in words, its matrix peak, networks, statistics."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs import cifar10, digits
from third_party.common.nets.by_name import build_network

# Image shapes are those of the data; network sizes come from the configurations.
NETWORKS = {"cifar10": (cifar10, (3, 32, 32)), "digits": (digits, (1, 8, 8))}
Way = TypeVar("Way")


class Loop(nn.Module):
    """A network of almost no cost for images of the digits' size, to time the loop alone."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        """A tenth of x."""
        return 0.1 * x


def make_network(name: str, device: str) -> nn.Module:
    """The noise network of a configuration, as at the start of training."""
    module, shape = NETWORKS[name]
    chosen = module.get_config("sn").network
    torch.manual_seed(0)
    built = build_network(chosen.name, chosen.args.to_dict(), shape, trunk_channels=shape[0])
    return built.to(device).train()


def network(name: str, device: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with random weights, in eval mode, and its image shape; "loop" is ``Loop``."""
    if name == "loop":
        return Loop().eval(), NETWORKS["digits"][1]
    built = make_network(name, "cpu")
    for parameter in built.parameters():  # the last layers start at zero: give them values
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    return built.to(device).eval(), NETWORKS[name][1]


def synchronise(device: str) -> None:
    """Wait for all work that was launched on the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(work: Callable[[], object], device: str, clock: str = "wall") -> float:
    """Time of ``work()`` in seconds: "wall", or "cpu", the CPU time of this process's threads.

    "cpu" leaves out the time in which other processes used the cores, but not their effect on
    caches and clock rates.
    """
    now = CLOCKS[clock]
    synchronise(device)
    start = now()
    work()
    synchronise(device)
    return now() - start


def in_turns(
    ways: Mapping[Way, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: str = "wall",
    warmup: int = 1,
    after: Callable[[Way, bool], object] = lambda way, counts: None,
) -> dict[Way, list[float]]:
    """Seconds by way and round. ``after``: called after each, with whether it is no warm-up.

    Every round has another order, with each way in each place, before and after every other way: a
    change of the machine's speed affects all of them.
    """
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    names = list(ways)
    gc.disable()
    for k in range(-warmup, rounds):
        first = k // 2 % len(names)
        order = names[first:] + names[:first]
        for way in order if k % 2 == 0 else order[::-1]:
            if torch.device(device).type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = seconds_of(ways[way], device, clock)
            after(way, k >= 0)
            if k >= 0:
                seconds[way].append(taken)
        gc.collect()
    gc.enable()
    return seconds


def flop_of_call(net: nn.Module, x: Tensor, t: Tensor) -> int:
    """FLOP of one network call (a multiply-add counts as two)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t)
    return counter.get_total_flops()


def matmul_peak(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several square matrix products."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    work = lambda: a @ a  # noqa: E731
    work()
    return 2 * size**3 / min(seconds_of(work, device) for _ in range(repeats))


def peak_memory(device: str) -> float:
    """MiB: the device's peak since the last reset, or the whole process's on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage may report the parent process
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return float(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def describe(device: str) -> str:
    """The machine in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} beside {name}"
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"PyTorch {torch.__version__}{load}"
    )


def quartiles(values: Sequence[float], form: str = "{:.3f}") -> str:
    """median (first to third quartile)."""
    low, middle, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median from the ranks of the values, for any distribution.

    Fewer than six values give no 95 % interval; then the smallest and the largest value.
    """
    n, ordered = len(values), sorted(values)
    rank, below = 0, 0.5**n  # below: probability that at most ``rank`` values are below the median
    while below <= 0.025:
        rank += 1
        below += comb(n, rank) * 0.5**n
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of the times of one way to those of another, within each round."""
    return [s / r for s, r in zip(seconds, reference, strict=True)]


def ratio_interval(seconds: Sequence[float], reference: Sequence[float]) -> str:
    """The 95 % interval of the median ratio within rounds, " [low, high]"; "": the reference's."""
    if seconds is reference:
        return ""
    low, high = median_interval(ratios(seconds, reference))
    return f" [{low:.2f}, {high:.2f}]"


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """median (smallest to largest)."""
    low, high = min(values), max(values)
    return f"{form.format(median(values))} ({form.format(low)} to {form.format(high)})"


def add_clock(parser: argparse.ArgumentParser) -> None:
    """The options of a measurement that may run beside other work."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: on a shared machine"
    )
