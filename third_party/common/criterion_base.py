"""One optimiser step on an objective: the common part of all criteria of these hosts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .step_options import StepOptions

# Images [B,C,H,W] in [-1, 1], alone or with their labels [B].
Batch = Tensor | tuple[Tensor, Tensor]


class Criterion(ABC):
    """Networks, their optimisers, and an objective.

    `statistics` holds the measurements of the last step as detached 0-d tensors on their device.
    The logging code converts them to numbers, so a step never waits for the device.
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
        self.options = StepOptions()
        self.scaler: torch.amp.GradScaler | None = None
        self._parallel: list[DistributedDataParallel] = []

    @abstractmethod
    def objective(self, v: Tensor, **labels: Tensor) -> Tensor:
        """The loss of each image of `v` [B,C,H,W] in [-1, 1], [B].

        `labels` are for the network: nothing, or y [B].
        """

    def configure(self, options: StepOptions) -> None:
        """Use `options` for all steps from now on."""
        self.options = options
        for model in self.models.values():
            if options.channels_last:
                model.to(memory_format=torch.channels_last)
            if options.compile:
                model.compile()  # in place: the names of the weights do not change
        fp16 = options.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if fp16 else None

    def parallelise(self) -> None:
        """Average gradients over the processes of the group, once a step in the backward pass."""

        def wrap(model: nn.Module) -> nn.Module:
            devices = None if self.device.type == "cpu" else [self.device]
            # Buffers may differ between processes as they differ between batches.
            parallel = DistributedDataParallel(model, devices, broadcast_buffers=False)
            self._parallel.append(parallel)
            return parallel

        self.replace_networks(wrap)

    def replace_networks(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let the objective call `wrap(network)`; `models` keeps the networks themselves."""
        raise ValueError(f"{type(self).__name__} cannot run in several processes")

    def update(self, data_loader: Iterator[Batch]) -> None:
        """Take the next batch and make one step of every optimiser and learning rate."""
        layout = torch.channels_last if self.options.channels_last else torch.preserve_format
        batch = next(data_loader)
        v, labels = (batch, {}) if isinstance(batch, Tensor) else (batch[0], {"y": batch[1]})
        v = v.to(self.device, non_blocking=True, memory_format=layout)
        labels = {name: y.to(self.device, non_blocking=True) for name, y in labels.items()}
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.options.accumulate == 1:
            self.statistics["loss"] = self._backward(v, labels)
        else:
            self._backward_in_parts(v, labels)
        self._apply_gradients()
        for lr_scheduler in self.lr_schedulers.values():
            lr_scheduler.step()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(next(iter(self.models.values())).parameters()).device

    def _backward(self, v: Tensor, labels: dict[str, Tensor], share: float = 1.0) -> Tensor:
        """Add `share` of the gradient of the mean loss of `v`; return this mean, detached."""
        dtype = self.options.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            # Looked up on self: a hook may have replaced it.
            loss = self.objective(v, **labels).mean()
        scaled = loss * share
        (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        return loss.detach()

    def _backward_in_parts(self, v: Tensor, labels: dict[str, Tensor]) -> None:
        """Add up the parts' gradients, reduce over processes at the last part; mean statistics."""
        parts = v.chunk(self.options.accumulate)
        of_parts = {name: y.chunk(self.options.accumulate) for name, y in labels.items()}
        means: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            share = len(part) / len(v)
            with ExitStack() as stack:
                for parallel in self._parallel if i < len(parts) - 1 else ():
                    stack.enter_context(parallel.no_sync())
                given = {name: ys[i] for name, ys in of_parts.items()}
                self.statistics["loss"] = self._backward(part, given, share)
            for name, value in self.statistics.items():
                means[name] = means.get(name, 0.0) + share * value
        self.statistics.update(means)

    def _apply_gradients(self) -> None:
        if self.grad_clip is not None:
            for optimizer in self.optimizers.values() if self.scaler is not None else ():
                self.scaler.unscale_(optimizer)
            self._clip_gradients(self.grad_clip)
        elif self.scaler is None:  # with a scaler the gradients are scaled and may overflow
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            self.statistics["grad_norm"] = nn.utils.get_total_norm(gradients).detach()
        for optimizer in self.optimizers.values():
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)  # skipped if a gradient overflowed
        if self.scaler is not None:
            self.scaler.update()

    def _clip_gradients(self, limit: float) -> None:
        norm = nn.utils.clip_grad_norm_(self._parameters(), limit)
        self.statistics["grad_norm"] = norm.detach()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for model in self.models.values() for p in model.parameters()]

    def _record(self, name: str, per_image: Tensor) -> None:
        self.statistics[name] = per_image.detach().mean()


def sum_squares(x: Tensor) -> Tensor:
    """The squared norm of each image of `x` [B,...], [B]."""
    return x.square().flatten(1).sum(1)


def adam(
    model: nn.Module,
    lr: float,
    grad_clip: float | None,
    lr_warmup: int = 0,
    lr_fall: tuple[int, int] | None = None,
) -> tuple[dict[str, Optimizer], dict[str, LRScheduler]]:
    """Adam on the trainable parameters and a constant rate, under the hosts' names.

    The rate rises to `lr` over the first `lr_warmup` steps and falls to 0 between the steps
    `lr_fall`, both linearly; the hosts have neither.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr!r}: must be > 0")
    if lr_warmup < 0:
        raise ValueError(f"lr_warmup={lr_warmup!r}: must be >= 0, the number of steps")
    if lr_fall is not None and not 0 <= lr_fall[0] < lr_fall[1]:
        raise ValueError(f"lr_fall={lr_fall!r}: must be two steps, the first below the second")
    if grad_clip is not None and not grad_clip > 0:
        raise ValueError(f"grad_clip={grad_clip!r}: must be > 0, or None")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr, fused=True)
    return {"all": optimizer}, {"all": LambdaLR(optimizer, _rate(lr_warmup, lr_fall))}


def _rate(warmup: int, fall: tuple[int, int] | None) -> Callable[[int], float]:
    """The factor of the rate by the number of steps made: 1/warmup, 2/warmup, ..., 1, ..., 0."""

    def factor(made: int) -> float:
        risen = min(1.0, (made + 1) / warmup) if warmup else 1.0
        if fall is None:
            return risen
        start, end = fall
        return risen * min(1.0, max(0.0, (end - made) / (end - start)))

    return factor  # a plain function has no saved state, so the hosts' checkpoints load unchanged
