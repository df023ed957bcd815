"""Step times of training, as ratios to our plain step: python -m benchmarks.training

In one run the variants take turns, so other work on the machine affects all of them. A step is
everything from the batch in memory to the averaged weights: noise, network calls, backward pass,
Adam, EMA. "Official style" is the SA loss as its paper trains it: the window's calls in series, in
float32, all differentiated. "Host-style" is the plain step of the hosts: NCHW, steps as NumPy
arrays, statistics converted to floats at each step, Adam and average weight by weight. "price" is
the SA loss with reuse and a K-th of the images: as many network calls as the plain step.

Peak memory: on CUDA the most that PyTorch held in a step of the variant, less the other variants'
weights; on the CPU the peak of a separate process that makes only the variant's steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
from torch import Tensor

from adapters.shell.command import keep_freed_memory
from benchmarks import machine
from benchmarks.gradients import gradient_table
from benchmarks.machine import NETWORKS, make_network
from benchmarks.training_steps import (
    AS_THEY_ARE,
    HOST,
    OPTIONS,
    PLAIN_VARIANTS,
    SA_VARIANTS,
    Variant,
    build_steps,
)


def parse_variants(text: str) -> list[Variant]:
    """ "one,all:2+bf16" as variants; ArgumentTypeError names an unknown part."""
    return [_parse_variant(word.strip()) for word in text.split(",")]


def _parse_variant(word: str) -> Variant:
    first, *options = word.split("+")
    name, colon, number = first.partition(":")
    with_K = colon and name in SA_VARIANTS and number.isdecimal() and int(number) >= 1
    if name not in (*PLAIN_VARIANTS, *SA_VARIANTS) or (colon and not with_K):
        known = ", ".join((*PLAIN_VARIANTS, *(f"{v}[:K]" for v in SA_VARIANTS)))
        raise argparse.ArgumentTypeError(f"must be some of {known}, got {word!r}")
    allowed = () if name in AS_THEY_ARE else OPTIONS
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "nothing"
            raise argparse.ArgumentTypeError(f"{name} takes {known} after +, got {word!r}")
    return Variant(name, int(number) if colon else 0, frozenset(options))


def chosen_variants(args: argparse.Namespace) -> list[Variant]:
    """The rows: our plain step, the reference of all ratios, and the requested variants."""
    common = frozenset(name for name in OPTIONS if getattr(args, name))
    rows = [Variant("plain", options=common)]
    for variant in args.variants:
        options = frozenset() if variant.name in AS_THEY_ARE else variant.options | common
        for K in args.K if variant.name in SA_VARIANTS and not variant.K else [variant.K]:
            rows.append(Variant(variant.name, K, options))
    return list(dict.fromkeys(rows))


def measure(args: argparse.Namespace) -> dict[Variant, tuple[list[float], float]]:
    """Seconds of each step, and peak memory in MiB (CUDA only, else 0), of every variant."""
    rows = build_steps(chosen_variants(args), args.network, args.device)
    everything = {id(weights): weights for _, weights in rows.values()}.values()
    v = some_images(args)
    peak = dict.fromkeys(rows, 0.0)

    def after(row: Variant, counts: bool) -> None:
        own = rows[row][1]
        if v.is_cuda and counts:
            others = sum(w.nbytes() for w in everything if w is not own)
            peak[row] = max(peak[row], machine.peak_memory(args.device) - others / 2**20)
        own.model.zero_grad(set_to_none=True)

    batches = {row: row.images(v) for row in rows}
    ways = {row: lambda step=step, v=batches[row]: step(v) for row, (step, _) in rows.items()}
    seconds = machine.in_turns(ways, args.repeats, args.device, warmup=args.warmup, after=after)
    return {row: (seconds[row], peak[row]) for row in rows}


def some_images(args: argparse.Namespace) -> Tensor:
    """A batch in [-1, 1], on the device."""
    return torch.rand(args.batch, *NETWORKS[args.network][1], device=args.device) * 2 - 1


def memory_on_cpu(args: argparse.Namespace) -> dict[Variant, float]:
    """Peak memory in MiB of a process that makes only the steps of one variant."""
    spawn = multiprocessing.get_context("spawn")  # a fork would have this process's memory
    peak = {}
    for row in chosen_variants(args):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            peak[row] = pool.submit(_memory_alone, args, row, torch.get_num_threads()).result()
    return peak


def _memory_alone(args: argparse.Namespace, row: Variant, threads: int) -> float:
    torch.set_num_threads(threads)
    ((step, _),) = build_steps([row], args.network, args.device).values()
    for _ in range(2):  # the optimiser's state exists from the second step on
        step(row.images(some_images(args)))
    return machine.peak_memory("cpu")


def table(results: dict[Variant, tuple[list[float], float]]) -> str:
    """Markdown: times, and their ratios to our plain step (the first row).

    The ratio is that of medians. The brackets give the 95 % interval of the median of the ratios
    within each round, which a change of the machine's speed between rounds does not affect.
    """
    memory = any(peak for _, peak in results.values())
    plain, plain_peak = next(iter(results.values()))
    reference = median(plain)
    head = "| step | ms, median (quartiles) | of plain [95 %, rounds] |"
    lines = [head + " peak MiB, of plain |" * memory, "|---|---|---|" + "---|" * memory]
    for row, (seconds, peak) in results.items():
        line = f"| {row.title} | {machine.quartiles([1e3 * s for s in seconds], '{:.4g}')} "
        within = machine.ratio_interval(seconds, plain)
        line += f"| {median(seconds) / reference:.2f}{within} |"
        lines.append(line + (f" {peak:.0f}, {peak / plain_peak:.2f} |" if memory else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    usage = "python -m benchmarks.training [OPTIONS]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="cifar10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default: 8 on a CPU, 128 elsewhere")
    parser.add_argument("--repeats", type=int, help="default: 7; with --variance 400")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--K", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--variants",
        type=parse_variants,
        default="plain,host,official,all,one",
        help=f"some of {', '.join((*PLAIN_VARIANTS, *SA_VARIANTS))}; variants of the SA loss run "
        f"for each --K, or for one K, as in one:4; our variants take +{', +'.join(OPTIONS)}, as in "
        "one:4+bf16+compile; plain is always measured (default: %(default)s)",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, weights included")
    parser.add_argument(
        "--variance", action="store_true", help="gradient variance instead; digits network only"
    )
    for name in OPTIONS:
        parser.add_argument(f"--{name}", action="store_true", help="for all our steps")
    args = parser.parse_args(argv)
    if args.variance and args.network != "digits":
        parser.error(f"--variance needs --network digits, got {args.network!r}")
    args.batch = args.batch or (8 if args.device == "cpu" else 128)
    args.repeats = args.repeats or (400 if args.variance else 7)
    print(f"{args.network}, batch {args.batch}; {machine.describe(args.device)}\n")
    if args.variance:
        model = make_network(args.network, args.device)
        print(gradient_table(model, HOST, args.repeats, args.bf16))
        return
    alone = memory_on_cpu(args) if args.memory and args.device == "cpu" else {}
    results = measure(args)
    print(table({row: (s, alone.get(row, peak)) for row, (s, peak) in results.items()}))
    print(f"\npeak memory of this process: {machine.peak_memory('cpu') / 2**10:.1f} GiB")


if __name__ == "__main__":
    keep_freed_memory()  # as in the commands, and for every row
    main()
