"""Means of the steps' statistics, collected without waiting for the device at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Window:
    """Statistics of the steps since the last report.

    `add` only keeps references to the 0-d tensors of a step; `read` fetches all of them at once.
    """

    CAPACITY = 1000  # steps after which `read` is due, for any logging interval

    def __init__(self) -> None:
        self._pending: dict[str, list[tuple[int, Tensor | float]]] = {}
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        # From the last `read`: the first iteration at which a statistic was not finite.
        self.first_bad: dict[str, int] = {}

    def add(self, iteration: int, statistics: Mapping[str, Tensor | float]) -> None:
        """Add the statistics of one step."""
        for name, value in statistics.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self._pending.setdefault(name, []).append((iteration, kept))
        self._steps += 1

    @property
    def is_full(self) -> bool:
        """Whether `read` is due, so that references do not accumulate."""
        return self._steps >= self.CAPACITY

    def read(self, watched: str) -> int | None:
        """Fetch all added values; return the first iteration whose `watched` is not finite."""
        if self._steps and watched not in self._pending:
            raise ValueError(f"the criterion's statistics hold no {watched!r}")
        self.first_bad = {}
        for name, entries in self._pending.items():
            values = _to_floats([value for _, value in entries])
            self._counts[name] = self._counts.get(name, 0) + len(values)
            for (iteration, _), value in zip(entries, values, strict=True):
                # Added one by one, so that the last bit does not depend on how often `read` runs.
                self._sums[name] = self._sums.get(name, 0.0) + value
                if not math.isfinite(value):
                    self.first_bad.setdefault(name, iteration)
        self._pending, self._steps = {}, 0
        return self.first_bad.get(watched)

    def means(self) -> dict[str, float]:
        """The means of all values read; the window is then empty."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The sums and counts that were read but not yet reported."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from a `state_dict`."""
        self._pending, self._steps = {}, 0
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}


def _to_floats(values: list[Tensor | float]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == len(values):
        return torch.stack(tensors).tolist()
    return [float(value) for value in values]
