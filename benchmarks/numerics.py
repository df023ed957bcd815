"""How far float32, bfloat16 and float16 are from float64: python -m benchmarks.numerics

The loss, the table of tau and the sampler on one input in every precision, including the network:
the numbers in docs/numerics.md. It takes some seconds and needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_plugin import NoiseSchedule, SALoss, Sampler, TauTable
from sa_plugin.sampling.variance import FORWARDS, NEEDS_SECOND, VARIANCES

SCHEDULES = ("linear", "cosine", "vpsde")
WEIGHTINGS = ("uniform", "theorem1", "relative")
HALVES = (torch.float32, torch.bfloat16, torch.float16)
N = 1000
K = 4
STEPS = torch.tensor([1, 2, 10, 100, 500, 900, 999, 1000])


def network(variance: str) -> Callable[[Tensor, Tensor], Any]:
    """A smooth function as network, in its input's dtype, with the output ``variance`` needs."""

    def call(x: Tensor, n: Tensor) -> Any:
        eps = 0.8 * torch.sin(1.7 * x + 0.003 * n.to(x.dtype).reshape(-1, 1, 1, 1)) + 0.1 * x
        return (eps, (0.3 * torch.cos(x)) ** 2) if variance in NEEDS_SECOND else eps

    return call


def loss_errors(schedule: NoiseSchedule, weighting: str) -> dict[torch.dtype, tuple[float, float]]:
    """dtype -> relative errors of the total and of the SA term, against float64."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(STEPS), 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(K, *x0.shape, generator=generator, dtype=torch.float64)
    loss = SALoss(schedule, K=K, weighting=weighting)

    def parts(dtype: torch.dtype) -> Tensor:
        out = loss(network("small"), x0.to(dtype), n=STEPS, noise=noise.to(dtype))
        return torch.stack([out.total.double(), out.sa.double()])

    exact = parts(torch.float64)
    return {dtype: tuple(((parts(dtype) - exact).abs() / exact).tolist()) for dtype in HALVES}


def tau_error(schedule: NoiseSchedule) -> float:
    """Largest relative error of Theorem 1's weights in float32."""
    tau = TauTable(schedule, "theorem1").values[2:]
    return float(np.max(np.abs(tau.astype(np.float32) / tau - 1)))


def sampler_errors(schedule: NoiseSchedule, steps: int) -> Iterator[tuple[str, str, float]]:
    """(forward process, variance, largest difference of a pixel in [-1, 1], float32 to float64)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps + 1, *x.shape, generator=generator, dtype=torch.float64)
    gamma = np.linspace(0.9, 0.99, N + 1)
    for forward in FORWARDS:
        for variance in VARIANCES:
            if forward == "ddim" and variance in ("big", "iddpm"):
                continue  # refused: DDIM has neither
            more = {"gamma": gamma} if variance == "analytic" else {}
            sampler = Sampler(
                network(variance), schedule, forward=forward, variance=variance, steps=steps, **more
            )
            exact, single = (
                sampler.sample(x.shape, x_init=x.to(d), noise=lambda k, d=d: noise[k].to(d))
                for d in (torch.float64, torch.float32)
            )
            yield forward, variance, (single.double() - exact).abs().max().item()


def main() -> None:
    """Print the three tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| loss, K = 4 | float32: total, SA | bfloat16 | float16 |\n|---|--:|--:|--:|")
    for kind in SCHEDULES:
        for weighting in WEIGHTINGS:
            errors = loss_errors(getattr(NoiseSchedule, kind)(N), weighting)
            cells = (f"{total:.0e}, {sa:.0e}" for total, sa in errors.values())
            print(f"| {kind}, {weighting} | " + " | ".join(cells) + " |")
    print("\n| tau in float32 | relative error |\n|---|--:|")
    for kind in SCHEDULES:
        print(f"| {kind} | {tau_error(getattr(NoiseSchedule, kind)(N)):.0e} |")
    print("\n| sampler, float32 | steps | DDPM | DDIM |\n|---|--:|--:|--:|")
    for kind in SCHEDULES:
        for steps in (10, 100, 1000):
            worst = dict.fromkeys(FORWARDS, 0.0)
            for forward, _, error in sampler_errors(getattr(NoiseSchedule, kind)(N), steps):
                worst[forward] = max(worst[forward], error)
            print(f"| {kind} | {steps} | {worst['ddpm']:.0e} | {worst['ddim']:.0e} |")


if __name__ == "__main__":
    main()
