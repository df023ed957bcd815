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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
PLAIN_VARIANTS = ("plain", "host")
SA_VARIANTS = ("official", "series", "all", "one")


def make_network(name: str, device: str) -> nn.Module:
    """The network of a configuration, as training starts with it."""
    experiment, shape = NETWORKS[name]
    network = experiment("sn").network
    torch.manual_seed(0)
    model = build_network(network.name, network.args.to_dict(), shape, trunk_channels=shape[0])
    return model.to(device).train()


@dataclass(frozen=True)
class Weights:
    """A network with its optimiser and its average: one for all variants of a memory layout.

    The variants train it in turn. Nothing is restored between them: times do not depend on the
    weights' values.
    """

    model: nn.Module
    optimizer: Optimizer
    average: nn.Module

    def nbytes(self) -> int:
        """Of the weights, their gradients, averages and the optimiser's state."""
        own = [*self.model.parameters(), *self.average.parameters()]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(v.nbytes for v in [*own, *grads, *states] if isinstance(v, Tensor))


def host_step(model: nn.Module) -> tuple[Step, Weights]:
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

    return step, Weights(model, optimizer, average)


class OurSteps:
    """Steps of the port's criterion and average, all on one network in one memory layout."""

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        criterion = build_criterion("pred_eps", HOST, model)
        criterion.configure(options)  # channels_last and compile change the network in place
        self._first = criterion
        self._ema = EMA(criterion.models)
        self.weights = Weights(model, criterion.optimizers["all"], self._ema.models["model"])

    def step(self, options: StepOptions, loss: SALoss | None) -> Step:
        """A step with a criterion of its own, with the SA term attached if there is one."""
        criterion = build_criterion("pred_eps", HOST, self.weights.model)
        criterion.optimizers = self._first.optimizers
        criterion.lr_schedulers = self._first.lr_schedulers
        criterion.configure(replace(options, compile=False))  # compiled above, if it is to be
        if loss is not None:
            attach(criterion, loss)

        def step(v: Tensor) -> None:
            criterion.update(iter([v]))
            self._ema.update()

        return step


def parse_variants(text: str) -> list[tuple[str, int | None]]:
    """ "one,all:2" as [("one", None), ("all", 2)]; ArgumentTypeError names what is unknown."""
    chosen: list[tuple[str, int | None]] = []
    for word in text.split(","):
        name, colon, number = word.strip().partition(":")
        with_K = colon and name in SA_VARIANTS and number.isdecimal() and int(number) >= 1
        if name not in (*PLAIN_VARIANTS, *SA_VARIANTS) or (colon and not with_K):
            known = ", ".join((*PLAIN_VARIANTS, *(f"{v}[:K]" for v in SA_VARIANTS)))
            raise argparse.ArgumentTypeError(f"must be some of {known}, got {word!r}")
        chosen.append((name, int(number) if colon else None))
    return chosen


def variants(args: argparse.Namespace) -> tuple[dict[str, tuple[Step, Weights]], list[Weights]]:
    """(step, what it trains) of every row by name, and all that is trained."""
    precision = "bf16" if args.bf16 else "float32"
    options = StepOptions(args.channels_last, args.compile, precision)
    shared: dict[tuple[bool, bool], OurSteps] = {}
    rows: dict[str, tuple[Step, Weights]] = {}

    def ours(options: StepOptions, K: int = 0, **sa: object) -> tuple[Step, Weights]:
        layout = options.channels_last, options.compile
        if layout not in shared:
            shared[layout] = OurSteps(make_network(args.network, args.device), options)
        loss = SALoss(LOSS_SCHEDULE, K=K, **sa) if K else None
        return shared[layout].step(options, loss), shared[layout].weights

    rows[PLAIN] = ours(options)  # all ratios are to it
    if ("host", None) in args.variants:
        rows["plain, host-style"] = host_step(make_network(args.network, args.device))
    for name, K in ((n, K) for n, k in args.variants for K in ([k] if k else args.K)):
        if name == "official":
            rows[f"SA-{K}, official style"] = ours(StepOptions(), K, stack=False)
        elif name == "series":
            rows[f"SA-{K} all, series"] = ours(options, K, stack=False)
        elif name == "all":
            rows[f"SA-{K} all, stacked"] = ours(options, K)
        elif name == "one":
            rows[f"SA-{K} one"] = ours(options, K, backprop="one")
    return rows, list({id(weights): weights for _, weights in rows.values()}.values())


def measure(args: argparse.Namespace) -> dict[str, tuple[list[float], float]]:
    """Seconds of each step, and peak memory in MiB (CUDA only, else 0), of every variant."""
    rows, everything = variants(args)
    v = torch.rand(args.batch, *NETWORKS[args.network][1], device=args.device) * 2 - 1
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    peak = dict.fromkeys(rows, 0.0)
    gc.disable()
    for round_ in range(args.warmup + args.repeats):
        for name, (step, weights) in rows.items():
            others = sum(w.nbytes() for w in everything if w is not weights)
            taken, memory = timed(step, v)
            weights.model.zero_grad(set_to_none=True)
            if round_ >= args.warmup:
                seconds[name].append(taken)
                peak[name] = max(peak[name], memory - others / 2**20)
        gc.collect()
    gc.enable()
    return {name: (seconds[name], peak[name]) for name in rows}


def timed(step: Step, v: Tensor) -> tuple[float, float]:
    """Seconds of one step, and the most memory in MiB that it held (CUDA only, else 0)."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="cifar10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default: 8 on a CPU, 128 elsewhere")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--K", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--variants",
        type=parse_variants,
        default="plain,host,official,all,one",
        help=f"some of {', '.join((*PLAIN_VARIANTS, *SA_VARIANTS))}; those of the SA loss for each "
        "--K, or for one, as one:4; plain is always measured (default: %(default)s)",
    )
    parser.add_argument(
        "--memory", action="store_true", help="peak memory (CUDA), weights included"
    )
    parser.add_argument("--variance", action="store_true", help="gradient variance instead")
    for name in ("channels_last", "compile", "bf16"):
        parser.add_argument(f"--{name}", action="store_true", help="for our steps")
    args = parser.parse_args(argv)
    args.batch = args.batch or (8 if args.device == "cpu" else 128)
    print(f"{args.network}, batch {args.batch}; {machine.describe(args.device)}\n")
    if args.variance:
        print(gradient_table(make_network(args.network, args.device), HOST, args.repeats))
    else:
        print(table(measure(args), args.memory and args.device.startswith("cuda")))
        print(f"\npeak memory of this process: {machine.peak_memory('cpu') / 2**10:.1f} GiB")


if __name__ == "__main__":
    main()
