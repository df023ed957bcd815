"""The toy networks of the reference numbers (tests/data), and how to read those numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa_plugin.schedule import NoiseSchedule

DATA = Path(__file__).parent / "data"


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


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    """eps(x, t) of the reference numbers."""
    return 0.8 * torch.sin(1.7 * x + 0.003 * over(t, x)) + 0.1 * x


class ScaledToy(torch.nn.Module):
    """toy_eps times a trainable scale; counts its calls and the rows it saw."""

    def __init__(self, scale: float = 1.1, index_from: int = 1) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.index_from = index_from
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        self.calls.append(n)
        return self.scale * toy_eps(x, n - 1 + self.index_from)
