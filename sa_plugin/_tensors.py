"""Bridges from float64 tables to tensors on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_plugin.prediction import to_eps
from sa_plugin.schedule import NoiseSchedule

# (steps n [B] or [K, B], x [B, ...] or [K, B, ...]) -> (a, b) of x_n = a x_0 + b eps, over x.
Levels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append dimensions to ``coefficient`` ([B] or [K, B]) until it broadcasts over ``x``."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def tiled(own: Tensor, n: Tensor) -> Tensor:
    """The images' own values [B] for the rows at steps n, [B], [R, B] or flat [R B]."""
    return own.repeat(n.numel() // len(own)).reshape(n.shape)


def follow(kwargs: dict[str, Any], batch: int, chosen: Tensor | slice) -> dict[str, Any]:
    """Network arguments for ``chosen`` images: tensors of length ``batch`` (labels) are indexed.

    So are NumPy arrays of that length, and both within dictionaries, lists and tuples. Anything
    else is passed on.
    """
    return {name: _follow(value, batch, chosen) for name, value in kwargs.items()}


def _follow(value: Any, batch: int, chosen: Tensor | slice) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim == 0 or len(value) != batch:
            return value
        if not isinstance(chosen, Tensor):
            return value[chosen]
        if isinstance(value, np.ndarray):
            return value[chosen.cpu().numpy()]
        return value[chosen.to(value.device, non_blocking=True)]
    if type(value) is dict:
        return follow(value, batch, chosen)
    if type(value) in (list, tuple):
        return type(value)(_follow(one, batch, chosen) for one in value)
    return value


class FirstBad:
    """Tells, once and at the end, which step's outputs were the first that were not finite.

    A look at an output is one reduction; nothing waits for the device until ``refuse``.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._bounds: list[Tensor] = []

    def note(self, t: int, *outputs: Tensor | None) -> None:
        """Look at the outputs of step t."""
        for output in outputs:
            if output is not None:
                # Both bounds are finite just where all is: NaN is passed on.
                self._steps.append(t)
                self._bounds += torch.aminmax(output)

    def refuse(self) -> None:
        """ValueError naming the first bad step; waits for the device."""
        if not self._steps:
            return
        finite = torch.stack(self._bounds).isfinite()
        if not bool(finite.all()):
            n = self._steps[int((~finite).nonzero()[0]) // 2]
            raise ValueError(f"the network's output is not finite, first at step n = {n}")


class DeviceTables:
    """Named float64 tables, each moved to a device and cast once."""

    def __init__(self, **tables: np.ndarray) -> None:
        self._tables = {name: torch.from_numpy(np.array(t)) for name, t in tables.items()}
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def get(self, name: str, like: Tensor) -> Tensor:
        """The table on ``like``'s device; in its dtype, at least float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (name, like.device, dtype)
        if key not in self._moved:
            self._moved[key] = self._tables[name].to(like.device, dtype)
        return self._moved[key]


class Coefficients:
    """sqrt(cum_alpha_n) and sqrt(cum_beta_n) of x_n = a x_0 + b eps, to broadcast over tensors."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.N = schedule.N
        self._tables = DeviceTables(signal=schedule.cum_alphas**0.5, sigma=schedule.cum_betas**0.5)

    def __call__(self, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of steps n, [B] or [K, B], over x [B, ...] or [K, B, ...]."""
        n = n.to(x.device, non_blocking=True)
        a, b = (expand(self._tables.get(name, x)[n], x) for name in ("signal", "sigma"))
        return a, b

    def eps_of(self, output: Tensor, x: Tensor, n: Tensor, predicts: str) -> Tensor:
        """The noise that an output of kind ``predicts`` at x_n implies."""
        return output if predicts == "eps" else to_eps(output, x, *self(n, x), predicts)
