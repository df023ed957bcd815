"""How much the gradient of a training step varies from draw to draw, by variant of the SA loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sa_plugin import NoiseSchedule, SALoss
from third_party.common.data import BatchStream
from third_party.common.datasets import get_dataset
from third_party.common.schedule import Schedule

TRAINED = 300  # steps before the measurement: at the start the last layer is zero
BATCH = 64


def gradient_table(model: nn.Module, host: Schedule, draws: int) -> str:
    """Markdown: E|g - E g|^2 over the weights, relative to the plain loss's; digits only.

    Args:
        model: the digits network, untrained; it is trained first.
        host: its schedule.
        draws: gradients of each variant, each of another batch, steps and noise.
    """
    schedule = NoiseSchedule.from_betas(host.betas[1:])
    data = BatchStream(get_dataset("digits", "data"), BATCH, 0)
    torch.manual_seed(0)
    _train(model, SALoss(schedule, lam=0.0), data)
    reference = None
    lines = ["| loss | variance of the gradient, of plain | |mean| , of plain |", "|---|---|---|"]
    for name, loss in _losses(schedule):
        variance, size = _moments(model, loss, data, draws)
        reference = reference or (variance, size)
        lines.append(f"| {name} | {variance / reference[0]:.2f} | {size / reference[1]:.2f} |")
    return "\n".join(lines)


def _losses(schedule: NoiseSchedule) -> Iterator[tuple[str, SALoss]]:
    for antithetic in (False, True):
        note = ", antithetic" if antithetic else ""
        yield f"plain{note}", SALoss(schedule, lam=0.0, antithetic=antithetic)
        for K in (2, 4):
            for backprop in ("all", "one"):
                loss = SALoss(schedule, K=K, backprop=backprop, antithetic=antithetic)
                yield f"SA-{K} {backprop}{note}", loss


def _train(model: nn.Module, loss: SALoss, data: BatchStream) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        loss(model, next(data)).total.backward()
        optimizer.step()


def _moments(model: nn.Module, loss: SALoss, data: BatchStream, draws: int) -> tuple[float, float]:
    """(trace of the gradient's covariance, norm of its mean)."""
    gradients = torch.stack([_gradient(model, loss, next(data)) for _ in range(draws)]).double()
    return gradients.var(0).sum().item(), gradients.mean(0).norm().item()


def _gradient(model: nn.Module, loss: SALoss, v: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss(model, v).total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
