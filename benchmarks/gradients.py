"""The variance of a training step's gradient over draws, by variant of the SA loss; digits only.

The weights are those after a short training. Each draw has one batch and one seed, which all
variants share. The variants then see the same steps and noise as far as their distributions allow,
so the ratio of two variances varies less than either variance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn

from sa_plugin import NoiseSchedule, SALoss
from third_party.common.data import BatchStream
from third_party.common.datasets import get_dataset
from third_party.common.ema import EMA
from third_party.common.schedule import Schedule

TRAINED = 600  # steps before the measurement, because the last layer starts at zero
EMA_RATE = 0.99  # of the average, which replaces the network in the calls without a graph of a row
BATCH = 64
BLOCKS = 10  # parts of the draws; their spread gives the standard errors


class Sums:
    """Sums over draws of a variant's gradients and of their differences from the reference."""

    def __init__(self) -> None:
        self.draws = 0
        self.total: Tensor | float = 0.0
        self.squares = 0.0
        self.difference: Tensor | float = 0.0
        self.difference_squares = 0.0

    def add(self, gradient: Tensor, reference: Tensor) -> None:
        """Add one draw; both gradients are [P] in float64."""
        difference = gradient - reference
        self.draws += 1
        self.total = self.total + gradient
        self.squares += gradient.square().sum().item()
        self.difference = self.difference + difference
        self.difference_squares += difference.square().sum().item()

    def moments(self) -> Moments:
        """The estimates from all draws."""
        return Moments(
            self.squares / self.draws - _square_of_mean(self.total, self.squares, self.draws),
            _square_of_mean(self.total, self.squares, self.draws),
            _square_of_mean(self.difference, self.difference_squares, self.draws),
        )


def _square_of_mean(total: Tensor, squares: float, draws: int) -> float:
    """|E g|^2 from pairs of different draws: unbiased, so the estimate may be negative."""
    return (total.square().sum().item() - squares) / (draws * (draws - 1))


@dataclass(frozen=True)
class Moments:
    """Unbiased estimates of E|g - E g|^2, of |E g|^2, and of |E g - E g_reference|^2."""

    variance: float
    squared_mean: float
    squared_bias: float


@dataclass
class Variant:
    """A way to estimate the gradient, and its measurements.

    ``network``: (x, n) -> eps as the loss calls it; None: the network itself.
    """

    name: str
    loss: SALoss
    network: Callable[[Tensor, Tensor], Tensor] | None = None
    seconds: list[float] = field(default_factory=list)
    blocks: list[Moments] = field(default_factory=list)


def gradient_table(model: nn.Module, host: Schedule, draws: int, bf16: bool = False) -> str:
    """Markdown: variance, bias and time of every variant, relative to "all" of SA-2 or SA-4.

    Args:
        model: the untrained digits network; it is trained first.
        host: its schedule.
        draws: number of gradients of each variant.
        bf16: add a variant with bfloat16 for the calls without a graph.

    Raises:
        ValueError: fewer than two draws in a block.
    """
    if draws < 2 * BLOCKS:
        raise ValueError(f"draws must be at least {2 * BLOCKS}, got {draws}")
    schedule = NoiseSchedule.from_betas(host.betas[1:])
    data = BatchStream(get_dataset("digits", "data"), BATCH, 0)
    torch.manual_seed(0)
    average = _train(model, SALoss(schedule), data)
    lines = ["| gradient | variance | squared bias, of squared mean | time |", "|---|---|---|---|"]
    for variants in (_of_two(schedule, model, average, bf16), _of_four(schedule)):
        for block in range(BLOCKS):
            _measure_block(model, variants, data, draws // BLOCKS, first_seed=block * draws)
        lines += [_row(variant, variants[0]) for variant in variants]
    return "\n".join(lines)


def _of_two(
    schedule: NoiseSchedule, model: nn.Module, average: nn.Module, bf16: bool
) -> list[Variant]:
    def with_average(x: Tensor, n: Tensor) -> Tensor:
        return (model if torch.is_grad_enabled() else average)(x, n)

    one = SALoss(schedule, backprop="one")
    variants = [
        Variant("SA-2 all", SALoss(schedule)),
        Variant("antithetic steps", SALoss(schedule, antithetic=True)),
        Variant("stratified steps", SALoss(schedule, stratified=True)),
        Variant("reuse", SALoss(schedule, reuse=True)),
        Variant("reuse, stratified steps", SALoss(schedule, reuse=True, stratified=True)),
        Variant("one", one),
        Variant("one, stratified steps", SALoss(schedule, backprop="one", stratified=True)),
        Variant("one, other rows by the average", one, network=with_average),
    ]
    if bf16:
        low = SALoss(schedule, backprop="one", extra_precision="bf16")
        variants.append(Variant("one, other rows in bf16", low))
    return [*variants, Variant("plain", SALoss(schedule, lam=0.0))]


def _of_four(schedule: NoiseSchedule) -> list[Variant]:
    return [
        Variant("SA-4 all", SALoss(schedule, K=4)),
        Variant("reuse", SALoss(schedule, K=4, reuse=True)),
        Variant("one", SALoss(schedule, K=4, backprop="one")),
    ]


def _measure_block(
    model: nn.Module,
    variants: Sequence[Variant],
    data: Iterator[Tensor],
    draws: int,
    first_seed: int,
) -> None:
    sums = [Sums() for _ in variants]
    for seed in range(first_seed, first_seed + draws):
        v = next(data)
        gradients = []
        for variant in variants:
            torch.manual_seed(seed)
            start = time.perf_counter()
            gradients.append(_gradient(model, variant, v))
            variant.seconds.append(time.perf_counter() - start)
        for own, gradient in zip(sums, gradients, strict=True):
            own.add(gradient.double(), gradients[0].double())
    for variant, own in zip(variants, sums, strict=True):
        variant.blocks.append(own.moments())


def _row(variant: Variant, reference: Variant) -> str:
    size = mean(block.squared_mean for block in reference.blocks)
    pairs = zip(variant.blocks, reference.blocks, strict=True)
    variance = _with_error([own.variance / other.variance for own, other in pairs], "{:.3f}")
    bias = _with_error([block.squared_bias / size for block in variant.blocks], "{:.4f}")
    ratio = median(variant.seconds) / median(reference.seconds)
    return f"| {variant.name} | {variance} | {bias} | {ratio:.2f} |"


def _with_error(values: Sequence[float], form: str) -> str:
    """Mean ± standard error."""
    error = stdev(values) / len(values) ** 0.5
    return f"{form.format(mean(values))} ± {form.format(error)}"


def _train(model: nn.Module, loss: SALoss, data: Iterator[Tensor]) -> nn.Module:
    """Train the model; return its average."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ema = EMA({"model": model}, EMA_RATE)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        loss(model, next(data)).total.backward()
        optimizer.step()
        ema.update()
    return ema.models["model"]


def _gradient(model: nn.Module, variant: Variant, v: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    variant.loss(variant.network or model, v).total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
