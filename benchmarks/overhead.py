"""What the SA loss costs beside its network: python -m benchmarks.overhead

A training step's loss and backward pass around a network of one multiplication, so that nearly all
of the time is the loss's own. "By hand" is SA-2 written out as a fork would have it: the same two
rows in one call, float32 tables on the device, no options and no checks. The rows take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import machine
from sa_plugin import NoiseSchedule, SALoss, attach
from third_party.common.schedule import NamedSchedule
from third_party.extended_analytic_dpm.methods import build_criterion

HOST = NamedSchedule("linear", 1000)
SCHEDULE = NoiseSchedule.from_betas(HOST.betas[1:])


class Scale(nn.Module):
    """x times a parameter; takes and ignores the time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, time: object) -> Tensor:
        """The predicted noise."""
        return self.scale * x


def by_hand(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The SA-2 loss of images, as lines of a training loop."""
    a = torch.tensor(np.sqrt(HOST.cum_alphas), dtype=torch.float32)
    b = torch.tensor(np.sqrt(HOST.cum_betas), dtype=torch.float32)

    def loss(x0: Tensor) -> Tensor:
        t = torch.randint(1, 1001, (len(x0),))
        s = torch.stack([t, (t - 1).clamp(min=1)])
        weight = torch.stack([torch.ones(len(x0)), (t > 1).float()]) / 2
        eps = torch.randn(2, *x0.shape)
        shape = (2, -1, *[1] * (x0.ndim - 1))
        x = a[s].view(shape) * x0 + b[s].view(shape) * eps
        e = model(x.flatten(0, 1), s.flatten()).view_as(eps) - eps
        gap = (weight.view(shape) * e).sum(0)
        return e[0].square().flatten(1).sum(1).mean() + gap.square().flatten(1).sum(1).mean()

    return loss


def rows() -> dict[str, Callable[[Tensor], Tensor]]:
    """Title -> the loss of a batch."""

    def plug_in(**options: object) -> Callable[[Tensor], Tensor]:
        loss, model = SALoss(SCHEDULE, **options), Scale()
        return lambda x0: loss(model, x0).total

    plain, hooked = (build_criterion("pred_eps", HOST, Scale()) for _ in range(2))
    attach(hooked, SALoss(SCHEDULE))
    return {
        "SA-2 by hand": by_hand(Scale()),
        "SALoss": plug_in(),
        "SALoss, one": plug_in(backprop="one"),
        "SALoss, reuse": plug_in(reuse=True),
        "host's plain objective": lambda x0: plain.objective(x0).mean(),
        "host's objective, SA-2 attached": lambda x0: hooked.objective(x0).mean(),
    }


def measure(batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step by row; the rows in turn."""
    x0 = torch.rand(batch, 1, 8, 8) * 2 - 1
    ways = {title: lambda loss=loss: loss(x0).backward() for title, loss in rows().items()}
    return machine.in_turns(ways, repeats, warmup=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=500)
    args = parser.parse_args()
    print(f"1x8x8, batch {args.batch}; {machine.describe('cpu')}\n")
    seconds = measure(args.batch, args.repeats)
    reference = seconds["SA-2 by hand"]
    print("| loss and backward pass | µs, median (quartiles) | of by hand [95 %, rounds] |")
    print("|---|---|---|")
    for title, values in seconds.items():
        shown = machine.quartiles([1e6 * s for s in values], "{:.0f}")
        ratio = median(machine.ratios(values, reference))
        print(f"| {title} | {shown} | {ratio:.2f}{machine.ratio_interval(values, reference)} |")


if __name__ == "__main__":
    main()
