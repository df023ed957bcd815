"""Step times of training, as ratios to our plain step: python -m benchmarks.training

One run, the variants in turn (A B C A B C ...), so that whatever else the machine does meets all of
them. A step is everything from the batch in memory to the averaged weights: noise, network calls,
backward pass, Adam, EMA. "Official style" is the SA loss as its paper trains it: the window's calls
in series, float32, all differentiated. "Host-style" is the plain step of the hosts as hosts.md
describes it: NCHW, steps as NumPy arrays, statistics turned into floats at each step, Adam and the
average weight by weight.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from statistics import quantiles

import numpy as np
import torch
from torch import Tensor, nn

from adapters.registry import build_network
from benchmarks import machine
from benchmarks.gradients import gradient_table
from configs import cifar10, digits
from sa_plugin import NoiseSchedule, SALoss, attach
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.extended_analytic_dpm.methods import build_criterion

Step = Callable[[Tensor], None]
NETWORKS = {"cifar10": (cifar10.experiment, (3, 32, 32)), "digits": (digits.experiment, (1, 8, 8))}
HOST = NamedSchedule("linear", 1000)
LOSS_SCHEDULE = NoiseSchedule.from_betas(HOST.betas[1:])
PLAIN = "plain, ours"


def make_network(name: str, device: str) -> nn.Module:
    """The network of a configuration, as training starts with it."""
    experiment, shape = NETWORKS[name]
    network = experiment("sn").network
    torch.manual_seed(0)
    model = build_network(network.name, network.args.to_dict(), shape, trunk_channels=shape[0])
    return model.to(device).train()


def host_step(model: nn.Module) -> Step:
    """The plain step as the hosts make it."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False, fused=False)
    statistics: dict[str, float] = {}

    def step(v: Tensor) -> None:
        n = np.random.choice(np.arange(1, HOST.N + 1), len(v))  # noqa: NPY002
        eps = torch.randn_like(v)
        a = torch.tensor(HOST.cum_alphas[n] ** 0.5, dtype=v.dtype).to(v.device).view(-1, 1, 1, 1)
        b = torch.tensor(HOST.cum_betas[n] ** 0.5, dtype=v.dtype).to(v.device).view(-1, 1, 1, 1)
        time_of_step = torch.tensor(n, dtype=v.dtype).to(v.device)
        loss = (eps - model(a * v + b * eps, time_of_step)).pow(2).flatten(1).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        statistics["loss"] = loss.item()
        with torch.no_grad():
            for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    return step


def our_step(model: nn.Module, options: StepOptions, loss: SALoss | None) -> Step:
    """A step of the port's criterion and average, with the SA term attached if there is one."""
    criterion = build_criterion("pred_eps", HOST, model)
    criterion.configure(options)
    ema = EMA(criterion.models)
    if loss is not None:
        attach(criterion, loss)

    def step(v: Tensor) -> None:
        criterion.update(iter([v]))
        ema.update()

    return step


def variants(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Step]]]:
    """(name, what builds the step) of every row."""
    options = StepOptions(
        channels_last=args.channels_last,
        compile=args.compile,
        precision="bf16" if args.bf16 else "float32",
    )

    def ours(options: StepOptions, K: int = 0, **sa: object) -> Callable[[], Step]:
        def build() -> Step:
            loss = SALoss(LOSS_SCHEDULE, K=K, **sa) if K else None
            return our_step(make_network(args.network, args.device), options, loss)

        return build

    yield PLAIN, ours(options)
    yield "plain, host-style", lambda: host_step(make_network(args.network, args.device))
    for K in args.K:
        yield f"SA-{K}, official style", ours(StepOptions(), K, stack=False)
        if args.series:
            yield f"SA-{K} all, series", ours(options, K, stack=False)
        yield f"SA-{K} all, stacked", ours(options, K)
        yield f"SA-{K} one", ours(options, K, backprop="one")


def measure(args: argparse.Namespace) -> dict[str, tuple[list[float], float]]:
    """Seconds of each step, and peak memory in MiB (CUDA only, else 0), of every variant."""
    steps = {name: build() for name, build in variants(args)}
    v = torch.rand(args.batch, *NETWORKS[args.network][1], device=args.device) * 2 - 1
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peak = dict.fromkeys(steps, 0.0)
    gc.disable()
    for round_ in range(args.warmup + args.repeats):
        for name, step in steps.items():
            taken, memory = timed(step, v)
            if round_ >= args.warmup:
                seconds[name].append(taken)
                peak[name] = max(peak[name], memory)
        gc.collect()
    return {name: (seconds[name], peak[name]) for name in steps}


def timed(step: Step, v: Tensor) -> tuple[float, float]:
    """Seconds of one step, and the most memory in MiB that it held beyond what was held before."""
    cuda = v.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(v)
    if not cuda:
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20


def table(results: dict[str, tuple[list[float], float]], memory: bool) -> str:
    """Markdown: medians, quartiles, and the ratio of medians to our plain step."""
    reference = quantiles(results[PLAIN][0], n=4)[1]
    head = "| step | ms, median (quartiles) | of plain |" + (" peak MiB |" if memory else "")
    lines = [head, "|---|---|---|" + ("---|" if memory else "")]
    for name, (seconds, peak) in results.items():
        low, middle, high = (1e3 * q for q in quantiles(seconds, n=4))
        row = (
            f"| {name} | {middle:.4g} ({low:.4g} to {high:.4g}) | {middle / reference / 1e3:.2f} |"
        )
        lines.append(row + (f" {peak:.0f} |" if memory else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="cifar10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default: 8 on a CPU, 128 elsewhere")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--K", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--series", action="store_true", help="`all` in series too")
    parser.add_argument("--memory", action="store_true", help="peak memory (CUDA)")
    parser.add_argument("--variance", action="store_true", help="gradient variance instead")
    for name in ("channels_last", "compile", "bf16"):
        parser.add_argument(f"--{name}", action="store_true", help="for our steps")
    args = parser.parse_args()
    args.batch = args.batch or (8 if args.device == "cpu" else 128)
    print(f"{args.network}, batch {args.batch}; {machine.describe(args.device)}\n")
    if args.variance:
        print(gradient_table(make_network(args.network, args.device), HOST, args.repeats))
    else:
        print(table(measure(args), args.memory and args.device.startswith("cuda")))


if __name__ == "__main__":
    main()
