"""The tests' toy network and images, and how the reference numbers (tests/data) are read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_plugin.metrics import Moments
from sa_plugin.schedule import NoiseSchedule
from tests import DATA


def read_json(name: str):
    """A file of cases."""
    return json.loads((DATA / f"{name}.json").read_text())


def read_npz(name: str) -> dict[str, np.ndarray]:
    """A file of arrays."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def schedule_of(name: str) -> NoiseSchedule:
    """``linear_1000`` -> NoiseSchedule.linear(1000)."""
    kind, N = name.rsplit("_", 1)
    return getattr(NoiseSchedule, kind)(int(N))


def normal(seed: int, *shape: int) -> Tensor:
    """RandomState(seed).standard_normal(shape) as a float64 tensor."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def images(seed: int, *shape: int) -> Tensor:
    """Smooth stand-ins for images, float64 inside (-1, 1)."""
    return normal(seed, *shape).tanh()


def over(t: Tensor, x: Tensor) -> Tensor:
    """t [B] broadcast over x, in x's dtype."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def moments_of(data: Any) -> Moments:
    """Of rows that are handed in at once."""
    moments = Moments()
    moments.update(data)
    return moments


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    """eps(x, t) of the reference numbers."""
    return 0.8 * torch.sin(1.7 * x + 0.003 * over(t, x)) + 0.1 * x


class Toy(torch.nn.Module):
    """Trainable ``(x, t, y) -> eps``, with further outputs as more channels; notes its times.

    ``scale`` [outputs] has the parameters, one for each output; y are labels, or none.
    """

    def __init__(self, outputs: int = 1, scale: float = 1.1) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((outputs,), scale, dtype=torch.float64))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert t.shape == (len(x),)
        self.times.append(t)
        eps = self.scale[0] * toy_eps(x, t)
        if y is not None:
            eps = eps + 0.1 * over(y, x)
        more = torch.tanh(x + 0.002 * over(t, x)) ** 2
        return torch.cat([eps, *(scale * more for scale in self.scale[1:])], 1)
