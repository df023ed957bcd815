"""Means of what the steps measured, gathered without waiting for the device at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Window:
    """Statistics of the steps since the last report.

    `add` only keeps references to the 0-d tensors of a step; `read` fetches all of them at once.
    """

    CAPACITY = 1000  # steps after which `read` is due whatever the logging interval

    def __init__(self) -> None:
        self._pending: dict[str, list[tuple[int, Tensor | float]]] = {}
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.first_bad: dict[str, int] = {}  # of the last `read`: iterations that were not finite

    def add(self, iteration: int, statistics: Mapping[str, Tensor | float]) -> None:
        """Take in the statistics of one step."""
        for name, value in statistics.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self._pending.setdefault(name, []).append((iteration, kept))
        self._steps += 1

    @property
    def is_full(self) -> bool:
        """Whether `read` is due, lest references pile up."""
        return self._steps >= self.CAPACITY

    def read(self, watched: str) -> int | None:
        """Fetch what was added; the first iteration whose `watched` statistic is not finite."""
        if self._steps and watched not in self._pending:
            raise ValueError(f"the criterion's statistics hold no {watched!r}")
        self.first_bad = {}
        for name, entries in self._pending.items():
            values = _to_floats([value for _, value in entries])
            self._counts[name] = self._counts.get(name, 0) + len(values)
            for (iteration, _), value in zip(entries, values, strict=True):
                # One by one: the last bit must not depend on how often `read` is called.
                self._sums[name] = self._sums.get(name, 0.0) + value
                if not math.isfinite(value):
                    self.first_bad.setdefault(name, iteration)
        self._pending, self._steps = {}, 0
        return self.first_bad.get(watched)

    def means(self) -> dict[str, float]:
        """The means of what was read, after which the window starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What was read and not yet reported."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from a `state_dict`."""
        self._pending, self._steps = {}, 0
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}


def _to_floats(values: list[Tensor | float]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == len(values):
        return torch.stack(tensors).tolist()
    return [float(value) for value in values]
