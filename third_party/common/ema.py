"""The exponential moving average of the weights, used for sampling (arXiv 2006.11239)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class EMA:
    """Averaged copies of networks: average <- rate * average + (1 - rate) * weight, each update.

    `models` maps names to networks; `self.models` maps the same names to the copies, which are in
    eval mode and need no gradient. Buffers (running statistics, counters) are copied unchanged.
    """

    def __init__(self, models: Mapping[str, nn.Module], rate: float = 0.9999) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"rate={rate!r}: must lie in [0, 1)")
        self.rate = rate
        self.models = {
            name: copy.deepcopy(model).eval().requires_grad_(False)
            for name, model in models.items()
        }
        self._sources = dict(models)
        # Listed once: walking through a network takes longer than averaging a small network.
        self._pairs = [
            (list(self.models[name].parameters()), list(model.parameters()))
            for name, model in models.items()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the networks' current weights."""
        for averages, weights in self._pairs:
            torch._foreach_lerp_(averages, weights, weight=1 - self.rate)
        for name, average in self.models.items():
            buffers = self._sources[name].buffers()
            for kept, buffer in zip(average.buffers(), buffers, strict=True):
                kept.copy_(buffer)
