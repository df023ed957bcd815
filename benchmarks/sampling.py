"""The sampler against other loops with the same network: python -m benchmarks.sampling

In one run the ways take turns, round after round, each time in another order. Ratios are taken
within a round. If the 95 % interval of the median ratio is too wide for the comparison, increase
--rounds. The ways:

    sampler    that of sa_plugin, DDPM small and DDIM
    host       the loop of the hosts: float32, coefficients from NumPy at each step, two
               statistics of each step read back
    diffusers  DDPMScheduler and DDIMScheduler, if that package is installed
    calls      the same number of calls of the network, without a loop around them
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from adapters.shell.command import keep_freed_memory
from benchmarks import machine
from sa_plugin import NoiseSchedule, Sampler

Network = Callable[[Tensor, Tensor], Tensor]
N = 1000
BASE = {"ddpm": "sampler ddpm", "ddim": "sampler ddim"}


def host_loop(
    net: Network, schedule: NoiseSchedule, timesteps: list[int], x: Tensor, forward: str
) -> Tensor:
    """The hosts' steps: scalars from NumPy tables, statistics read back to the CPU each time."""
    statistics = []
    for t, s in zip(timesteps[::-1], [*timesteps[-2::-1], 0], strict=True):
        n = torch.from_numpy(np.full(len(x), t)).to(x.device)
        eps = net(x, n)
        a_t, b_t = schedule.cum_alphas[t], schedule.cum_betas[t]
        a_s, b_s = schedule.cum_alphas[s], schedule.cum_betas[s]
        x0 = ((x - float(np.sqrt(b_t)) * eps) / float(np.sqrt(a_t))).clamp(-1, 1)
        if forward == "ddpm":
            skip = schedule.skip_beta(s, t)
            mean = float(skip * np.sqrt(a_s) / b_t) * x0
            mean = mean + float(np.sqrt(schedule.skip_alpha(s, t)) * b_s / b_t) * x
            sigma2 = schedule.tilde_beta(s, t)
        else:
            mean = float(np.sqrt(a_s)) * x0 + float(np.sqrt(b_s)) * eps
            sigma2 = 0.0
        statistics.append((x0.mean().cpu().item(), eps.square().mean().cpu().item()))
        x = mean + float(np.sqrt(sigma2)) * torch.randn_like(x) if s and sigma2 else mean
    return x


def diffusers_loop(net: Network, steps: int, x: Tensor, forward: str) -> Tensor:
    """The loop of diffusers' documentation with the same network (timestep = n - 1)."""
    from diffusers import DDIMScheduler, DDPMScheduler

    options = {"num_train_timesteps": N, "beta_schedule": "linear", "clip_sample": True}
    scheduler = (DDPMScheduler if forward == "ddpm" else DDIMScheduler)(**options)
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, (t + 1).expand(len(x))), t, x).prev_sample
    return x


def build_ways(net: Network, args: argparse.Namespace, shape: tuple[int, ...]) -> dict:
    """Each way as a function of no arguments that makes a batch of images."""
    schedule = NoiseSchedule.linear(N)
    size = (args.batch, *shape)
    options = {"channels_last": args.channels_last, "autocast": "bf16" if args.bf16 else None}
    net, plain = copy.deepcopy(net), net  # channels_last rearranges the weights
    samplers = {
        forward: Sampler(
            net, schedule, forward=forward, steps=args.steps, compile=args.compile, **options
        )
        for forward in BASE
    }
    timesteps = samplers["ddpm"].timesteps
    start = torch.randn(size, device=args.device)
    n = torch.full((args.batch,), 500, device=args.device)
    ways = {BASE[f]: lambda f=f: samplers[f].sample(size) for f in BASE}
    for f in BASE:
        ways[f"host {f}"] = lambda f=f: host_loop(plain, schedule, timesteps, start, f)
    if importlib.util.find_spec("diffusers"):
        for f in BASE:
            ways[f"diffusers {f}"] = lambda f=f: diffusers_loop(plain, args.steps, start, f)
    call = samplers["ddpm"]._network  # the network as the sampler runs it
    image = call.arrange(start)
    ways["calls"] = lambda: [call(image, n) for _ in range(args.steps)]
    return ways


def measure(
    ways: dict[str, Callable], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by way and round, and each way's peak memory on a GPU (MiB)."""
    memory: dict[str, float] = {}

    def after(name: str, counts: bool) -> None:
        memory[name] = machine.peak_memory(args.device)

    with torch.no_grad():
        return machine.in_turns(ways, args.rounds, args.device, args.clock, after=after), memory


def report(seconds: dict[str, list[float]], memory: dict, args: argparse.Namespace) -> None:
    """A table in Markdown: images per second, and time relative to the sampler's in that round."""
    print("| way | images/s | ms a step | time / sampler's: median (quartiles) ", end="")
    print("| 95 % of the median | over bare calls, %: median (quartiles) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, times in seconds.items():
        base = seconds[BASE["ddim" if name.endswith("ddim") else "ddpm"]]
        ratios = machine.ratios(times, base)
        low, high = machine.median_interval(ratios)
        over = [100 * (ratio - 1) for ratio in machine.ratios(times, seconds["calls"])]
        step = 1000 * median(times) / args.steps
        print(f"| {name} | {args.batch / median(times):.3f} | {step:.3f} ", end="")
        print(f"| {machine.quartiles(ratios)} ", end="")
        print(f"| {low:.3f} to {high:.3f} | {machine.quartiles(over, '{:.2f}')} |")
    if "diffusers ddpm" not in seconds:
        print("| diffusers | not installed | | | | |")
    if torch.device(args.device).type == "cuda":
        print("\nPeak memory, MiB: " + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()))
    else:
        print(f"\nPeak memory of the whole process: {max(memory.values()):.0f} MiB")


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine.describe(args.device))
    net, shape = machine.network(args.network, args.device)
    x = torch.randn(args.batch, *shape, device=args.device)
    flop = machine.flop_of_call(net, x, torch.full((args.batch,), 500, device=args.device))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    peak = machine.matmul_peak(args.device, dtype)
    ways = build_ways(net, args, shape)
    seconds, memory = measure(ways, args)
    print(
        f"{args.network} network, batch {args.batch}, {args.steps} steps, {args.rounds} rounds, "
        f"{args.clock} time, "
        f"channels_last {args.channels_last}, bf16 {args.bf16}, compile {args.compile}\n"
    )
    report(seconds, memory, args)
    if not flop:
        return
    rate = flop * args.steps / median(seconds[BASE["ddpm"]])
    print(
        f"{flop / args.batch / 1e9:.3f} GFLOP an image and call; the sampler achieves "
        f"{rate / 1e9:.1f} GFLOP/s, {100 * rate / peak:.0f} % of the {peak / 1e9:.1f} GFLOP/s "
        f"of a {dtype} matrix product"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    machine.add_clock(parser)
    networks = sorted((*machine.NETWORKS, "loop"))
    parser.add_argument("--network", choices=networks, default="cifar10")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's choice")
    for name in ("channels_last", "bf16", "compile"):
        parser.add_argument(f"--{name}", action="store_true", help="for the sampler and the calls")
    args = parser.parse_args()
    for name in ("batch", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    keep_freed_memory()  # as in the commands, and for every row
    main()
