"""One optimiser step on an objective: the part that every criterion of these hosts shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class Criterion(ABC):
    """Networks, their optimisers, and an objective.

    `statistics` holds what the last step measured, as detached 0-d tensors that stay on their
    device: who logs them turns them into numbers, so that a step never waits for the device.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        lr_schedulers: Mapping[str, LRScheduler],
    ) -> None:
        if not models:
            raise ValueError("models is empty: at least one network is needed")
        self.models = dict(models)
        self.optimizers = dict(optimizers)
        self.lr_schedulers = dict(lr_schedulers)
        self.statistics: dict[str, Tensor] = {}
        self.grad_clip: float | None = None

    @abstractmethod
    def objective(self, v: Tensor) -> Tensor:
        """The loss of each image of `v` [B,C,H,W] in [-1, 1], [B]."""

    def update(self, data_loader: Iterator[Tensor]) -> None:
        """Take the next batch and make one step of every optimiser and learning rate."""
        v = next(data_loader).to(self.device, non_blocking=True)
        loss = self.objective(v).mean()  # through the instance: a hook may have replaced it
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.grad_clip is not None:
            self._clip_gradients(self.grad_clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        for lr_scheduler in self.lr_schedulers.values():
            lr_scheduler.step()
        self.statistics["loss"] = loss.detach()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(next(iter(self.models.values())).parameters()).device

    def _clip_gradients(self, limit: float) -> None:
        parameters = [p for model in self.models.values() for p in model.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.statistics["grad_norm"] = norm.detach()

    def _record(self, name: str, per_image: Tensor) -> None:
        self.statistics[name] = per_image.detach().mean()


def sum_squares(x: Tensor) -> Tensor:
    """The squared norm of each image of `x` [B,...], [B]."""
    return x.square().flatten(1).sum(1)


def adam(
    model: nn.Module, lr: float, grad_clip: float | None
) -> tuple[dict[str, Optimizer], dict[str, LRScheduler]]:
    """Adam on what is trainable and a constant rate, under the hosts' names."""
    if not lr > 0:
        raise ValueError(f"lr={lr!r}: must be > 0")
    if grad_clip is not None and not grad_clip > 0:
        raise ValueError(f"grad_clip={grad_clip!r}: must be > 0, or None")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    return {"all": optimizer}, {"all": LambdaLR(optimizer, _constant)}


def _constant(_: int) -> float:
    return 1.0
