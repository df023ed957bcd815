"""The cost of an experiment before it is run: python -m benchmarks.cost --config configs/FILE.py

Network calls, FLOP, bytes and, if a speed is given, GPU-hours for several numbers of GPUs.
torch.utils.flop_counter counts the FLOP on the "meta" device, which computes nothing. It counts
matrix products and convolutions, with a multiply-add as two. Backward passes are counted too, not
estimated. docs/scaling.md says what is counted and what is not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ml_collections import FrozenConfigDict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapters.experiment.config import read_command_line
from adapters.experiment.experiment import calls_an_image
from adapters.hosts import Adapter, get_process
from adapters.sample import adapter_of
from adapters.shell.command import OwnOptions, exit_code
from adapters.shell.options import own_options, whole_numbers
from third_party.common.datasets import IMAGE_SHAPES
from third_party.common.nets.by_name import build_network
from third_party.extended_analytic_dpm.methods import get_method

MODULE = "benchmarks.cost"


@dataclass(frozen=True)
class Network:
    """One network's FLOP for one image, and its size.

    Attributes:
        forward: FLOP of a forward pass.
        step: FLOP of a forward and a backward pass, in training mode.
        numbers: number of parameters.
        trained: number of trained parameters.
    """

    forward: int
    step: int
    numbers: int
    trained: int


@dataclass(frozen=True)
class Part:
    """A stage's cost, in network calls on one image, FLOP and bytes.

    ``moved``: bytes that each of many GPUs sends in all training steps together.
    """

    name: str
    calls: float
    flop: float
    stored: float = 0.0
    moved: float = 0.0


def measure_network(config: FrozenConfigDict, method: str) -> Network:
    """Counted on the meta device for one image; the data need not exist."""
    shape, chosen = IMAGE_SHAPES[config.data.name], get_method(method)
    with torch.device("meta"):
        net = build_network(
            config.network.name,
            config.network.args.to_dict(),
            shape,
            trunk_channels=chosen.trunk_channels(shape[0]),
            head_channels=chosen.head_channels(shape[0]),
            head_mode=config.head.mode,
        )
    parameters = list(net.parameters())
    return Network(
        forward=_flop(net, shape, backward=False),
        step=_flop(net, shape, backward=True),
        numbers=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
    )


def _flop(net: nn.Module, shape: tuple[int, ...], backward: bool) -> int:
    net.train(backward)
    x, t = torch.empty(1, *shape, device="meta"), torch.ones(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = net(x, t)
        if backward:
            outputs = out if isinstance(out, tuple) else (out,)
            sum(y.sum() for y in outputs if y.requires_grad).backward()
    return counter.get_total_flops()


def parts_of(config: FrozenConfigDict, adapter: Adapter) -> list[Part]:
    """The stages of an experiment in order."""
    joint = adapter.joint is not None and config.head.training == "joint"
    base = measure_network(config, adapter.joint if joint else "pred_eps")
    parts, second = [training(config, "base", base)], base
    if adapter.needs == "gamma":
        calls = config.gamma.n_images * config.gamma.noises * config.schedule.N
        parts.append(Part("gamma", calls, calls * base.forward, 8 * (config.schedule.N + 1)))
    elif not joint:
        second = measure_network(config, adapter.pretrained)
        parts.append(training(config, "head", second))
    return [*parts, *sampling(config, base, second)]


def training(config: FrozenConfigDict, name: str, net: Network) -> Part:
    """A training: SA-K makes K calls a step and differentiates K of them, or one ("one").

    The few steps of a window below 1 are counted, although they are not evaluated.
    """
    settings, sa = config[name], config.sa
    images = settings.iterations * settings.batch_size
    K = sa.K if name == "base" and sa.lam > 0 else 1
    graded = 1 if sa.backprop == "one" else K
    flop = images * (graded * net.step + (K - graded) * net.forward)
    checkpoints = math.ceil(settings.iterations / settings.ckpt_every)
    kept = min(checkpoints, settings.keep or checkpoints)
    size = 4 * (2 * net.numbers + 2 * net.trained)  # weights, their average, Adam's two moments
    return Part(name, images * K, flop, kept * size, 2 * 4 * net.trained * settings.iterations)


def sampling(config: FrozenConfigDict, plain: Network, second: Network) -> list[Part]:
    """The images of every row, for all its numbers of steps."""
    sample, parts = config.sample, []
    for name in sample.processes:
        net = plain if get_process(name).needs is None else second
        calls = sample.n_images * sum(calls_an_image(sample, name, steps) for steps in sample.steps)
        pixels = math.prod(IMAGE_SHAPES[config.data.name])
        stored = len(sample.steps) * sample.n_images * pixels
        parts.append(Part(f"sample {name}", calls, calls * net.forward, stored))
    return parts


def table(parts: Sequence[Part], rate: float | None, gpus: Sequence[int], pair: float) -> str:
    """Markdown. ``rate``: FLOP/s of one GPU; ``pair``: efficiency of two processes."""
    hours = [f"hours on {g} GPU{'s' * (g > 1)}" for g in gpus] if rate else []
    head = ["stage", "network calls", "FLOP", "GB stored", "GB sent by a GPU", *hours]
    names = ("calls", "flop", "stored", "moved")
    total = Part("total", **{name: sum(getattr(p, name) for p in parts) for name in names})
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for part in (*parts, total):
        cells = [part.name, f"{part.calls:.3g}", f"{part.flop:.3g}"]
        cells += [f"{part.stored / 1e9:.3g}", f"{part.moved / 1e9:.3g}"]
        if rate:
            one = part.flop / rate / 3600
            cells += [f"{one / (g * pair ** math.log2(g)):.3g}" for g in gpus]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_of(own: argparse.Namespace, net: Network) -> tuple[float | None, str]:
    """FLOP/s of one GPU, and its source in words."""
    if own.tflops is not None and own.images_per_second is not None:
        raise ValueError("--tflops and --images_per_second: give one of them")
    if own.images_per_second is not None:
        words = f"{own.images_per_second:g} images/s through a forward pass (--images_per_second)"
        return own.images_per_second * net.forward, words
    if own.tflops is not None:
        words = f"{own.tflops:g} TFLOP/s (--tflops) x efficiency {own.efficiency:g} (--efficiency)"
        return own.tflops * 1e12 * own.efficiency, words
    return None, "none given: --tflops and --efficiency, or --images_per_second, give hours"


def parser() -> OwnOptions:
    """Our own options."""
    own = own_options(
        MODULE,
        "Sizes, FLOP and hours of an experiment; nothing is run.",
        example="--config configs/cifar10.py --tflops 990",
    )
    own.add_argument("--help_cost", action="help", help=argparse.SUPPRESS)  # older
    add = own.add_argument
    add("--tflops", type=_positive, help="peak of one GPU, in 1e12 FLOP/s")
    add("--efficiency", type=_share, default=0.35, help="achieved share of the peak; default: 0.35")
    add("--images_per_second", type=_positive, help="measured, for one call of the noise network")
    add("--pair", type=_share, default=1.0, help="efficiency of 2 processes; default: 1.0")
    add("--gpus", type=whole_numbers, default=(1, 8, 64), help="default: 1,8,64")
    return own


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be > 0 and at most 1, got {text}")
    return value


def report(argv: Sequence[str]) -> str:
    """The text that is printed."""
    own, rest = parser().parse_known_args(list(argv[1:]))
    config = read_command_line([argv[0], *rest], (), MODULE).config
    if config.data.name not in IMAGE_SHAPES:
        raise ValueError(
            f"data.name must be one of {sorted(IMAGE_SHAPES)}, got {config.data.name!r}"
        )
    parts, net = parts_of(config, adapter_of(config)), measure_network(config, "pred_eps")
    rate, words = rate_of(own, net)
    lines = [
        f"{config.name}: {net.numbers / 1e6:.3g} million parameters, {net.forward / 1e9:.4g} GFLOP "
        f"an image and call, {net.step / 1e9:.4g} with the backward pass",
        f"Speed of one GPU: {words}",
    ]
    if rate:
        lines.append(
            f"Assumed: {own.pair:g} of the speed is left at each doubling of the GPUs (--pair); "
            "training, sampling and the Gamma estimate run at one speed"
        )
    return "\n".join([*lines, "", table(parts, rate, own.gpus, own.pair)])


def main(argv: Sequence[str]) -> int:
    """The command, program name first; 0, or 2 with one line for bad input."""
    return exit_code(MODULE, lambda: print(report(argv)), continues="")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
