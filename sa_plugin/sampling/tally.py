"""Running moments of many quantities, kept on their device, and in a file between runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_files.reading import reading
from sa_files.tensors import load_tensors
from sa_files.writing import written_atomically

_TABLES = ("counts", "mean", "deviations")


class Tally:
    """Count, mean and sum of squared deviations at each step, [N+1], float64.

    Batches are merged by the updating formula of Chan, Golub and LeVeque (1979), which subtracts no
    large, nearly equal numbers.
    """

    def __init__(self, N: int) -> None:
        self.counts = np.zeros(N + 1, dtype=np.int64)
        self.mean = torch.zeros(N + 1, dtype=torch.float64)
        self.deviations = torch.zeros(N + 1, dtype=torch.float64)

    def move_to(self, device: torch.device) -> None:
        """Keep the moments on ``device``; the counts stay on the CPU."""
        self.mean, self.deviations = self.mean.to(device), self.deviations.to(device)

    def add(self, n: int, values: Tensor) -> None:
        """Add one number per image, float64 [B]."""
        before, more = int(self.counts[n]), len(values)
        mean = values.mean()
        gap = mean - self.mean[n]
        self.deviations[n] += (values - mean).square().sum()
        self.deviations[n] += gap.square() * (before * more / (before + more))
        self.mean[n] += gap * (more / (before + more))
        self.counts[n] += more

    def check_finite(self) -> None:
        """ValueError naming the first step whose mean is not finite; waits for the device."""
        bad = torch.nonzero(~self.mean.isfinite())
        if len(bad):
            raise ValueError(f"the network's output is not finite, first at step n = {bad[0, 0]}")

    def state(self) -> dict[str, Tensor]:
        """The three tables, on the CPU."""
        return {
            "counts": torch.from_numpy(self.counts.copy()),
            "mean": self.mean.cpu().clone(),
            "deviations": self.deviations.cpu().clone(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state``."""
        self.counts = state["counts"].numpy()
        self.mean, self.deviations = state["mean"], state["deviations"]


def _table(name: str, table: Any, tally: Tally) -> Tensor:
    """A table of a checkpoint; ValueError unless it has the tally's shape and dtype."""
    wanted = tally.state()[name]
    if not isinstance(table, Tensor) or (table.shape, table.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(f"its {name} must be {wanted.dtype} of shape {tuple(wanted.shape)}")
    return table


class Store:
    """A tally's checkpoint; ``identity`` describes its draws in plain numbers and strings.

    Without a path nothing is written, but the means are checked equally often.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, every: float, identity: dict[str, Any]
    ) -> None:
        self.path = None if path is None else Path(path).absolute()
        self._every = every
        self._identity = identity
        self._saved_at = time.monotonic()

    @property
    def where(self) -> str:
        """For a message: " in PATH", or nothing without a path."""
        return "" if self.path is None else f" in {self.path}"

    def read_into(self, tally: Tally) -> None:
        """Load the file, if there is one; ValueError if it is unreadable or of other draws."""
        if self.path is None or not self.path.exists():
            return
        with reading(self.path, "cannot be read; remove it") as file:
            state = load_tensors(file)
            there = {name: state["identity"][name] for name in self._identity}
            tables = {name: _table(name, state[name], tally) for name in _TABLES}
        for name, here in self._identity.items():
            if there[name] != here:
                said = "" if name == "betas" else f": {there[name]!r} there, {here!r} here"
                raise ValueError(f"checkpoint {self.path} differs in {name}{said}")
        tally.load(tables)

    def save_if_due(self, tally: Tally) -> None:
        """Save if the last save was at least ``every`` seconds ago."""
        if time.monotonic() - self._saved_at >= self._every:
            self.save(tally)

    def save(self, tally: Tally) -> None:
        """Check the means and write them if there is a path; waits for the device.

        Raises:
            ValueError: a mean that is not finite; nothing is written.
        """
        tally.check_finite()
        if self.path is not None:
            state = {"identity": self._identity, **tally.state()}
            with written_atomically(self.path, sync=True) as file:
                torch.save(state, file)
        self._saved_at = time.monotonic()
