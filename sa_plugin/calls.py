"""A network's calls for the rows of windows: what it is called with, and the noise it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sa_plugin._checks import check_output
from sa_plugin._tensors import follow


@dataclass(frozen=True)
class HostCall(ABC):
    """A host's call of its network for L_simple's step, and how the host calls it for other steps.

    Attributes:
        network: (x [M, ...], time [M], **kwargs) -> output.
        x, time: the host's own x_n [B, ...] and time [B].
        kwargs: the host's named arguments; tensors and arrays of length B belong to its images.
    """

    network: Callable[..., Any]
    x: Tensor
    time: Any
    kwargs: dict[str, Any]
    rides: ClassVar[bool] = True  # whether other rows may ride behind the own one in its call
    levels: ClassVar[Any] = None  # ``Levels`` of the rows' steps, where not the schedule's

    @abstractmethod
    def time_of(self, n: Tensor) -> Any:
        """The time for steps n, int64 [M], in the type of the host's own."""

    @abstractmethod
    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        """The predicted noise [M, ...] in an output at x [M, ...] and steps n [M]."""

    def own(self, n: Tensor) -> Answer:
        """The call that the host makes, for its own row."""
        return Answer(self, self.network(self.x, self.time, **self.kwargs), self.x, n[None])

    def others(self, x: Tensor, steps: Tensor) -> Answer:
        """One call for other rows x [R, B, ...] at steps [R, B]."""
        inputs, time = x.flatten(0, 1).to(self.x.dtype), self.time_of(steps.flatten())
        return Answer(self, self.network(inputs, time, **self._follow(steps)), inputs, steps)

    def together(self, x: Tensor, steps: Tensor) -> Answer:
        """The own row's call with other rows x [K-1, B, ...] behind it; steps [K, B] of all."""
        inputs = torch.cat([self.x, x.flatten(0, 1).to(self.x.dtype)])
        join = torch.cat if isinstance(self.time, Tensor) else np.concatenate
        time = join([self.time, self.time_of(steps[1:].flatten())])
        return Answer(self, self.network(inputs, time, **self._follow(steps)), inputs, steps)

    def _follow(self, steps: Tensor) -> dict[str, Any]:
        rows, batch = steps.shape
        return follow(self.kwargs, batch, torch.arange(batch).repeat(rows)) if self.kwargs else {}


def with_positions(network: Callable[..., Any]) -> Callable[..., Any]:
    """The network as (x, time, *, args, kwargs): a ``HostCall`` has further arguments by name."""

    def called(x: Tensor, time: Any, *, args: Any, kwargs: Any) -> Any:
        return network(x, time, *args, **kwargs)

    return called


@dataclass(frozen=True)
class Answer:
    """The output of a call for rows at x [R B, ...] and steps [R, B]."""

    call: HostCall
    output: Any
    x: Tensor
    steps: Tensor

    def first(self) -> Any:
        """The output for the first row alone, in copies: a host may change it in place."""
        return _first(self.output, self.steps.shape[1], len(self.x))


def _first(output: Any, batch: int, rows: int) -> Any:
    """The first ``batch`` of ``rows`` in every tensor, also in tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        if batch == rows:
            return output.clone()
        if output.ndim == 0 or len(output) != rows:
            raise ValueError(
                f"the network must return a row for each of its {rows} inputs, got "
                f"{tuple(output.shape)}; SALoss(..., stack=False) calls it with the host's alone"
            )
        return output[:batch].clone()
    if isinstance(output, dict):
        return type(output)((name, _first(one, batch, rows)) for name, one in output.items())
    if isinstance(output, tuple | list):
        make = getattr(output, "_make", type(output))  # a named tuple takes no list
        return make(_first(one, batch, rows) for one in output)
    return output


class PlainCall(HostCall):
    """The calls of a network (x, n int64 [M] on x's device, **kwargs) -> eps; ``time`` is n."""

    def time_of(self, n: Tensor) -> Tensor:
        """The steps themselves."""
        return n.to(self.time.device, non_blocking=True)

    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        """The output itself; ValueError unless it is a real tensor of x's shape."""
        # The usual answer is let through here: every call of the loss comes by.
        if type(output) is not Tensor or output.shape != x.shape or output.is_complex():
            hint = "; sa_plugin.EpsModel takes eps out of pairs and extra channels"
            check_output(output, x, hint)
        return output


@dataclass(frozen=True)
class MadeCall(PlainCall):
    """An own call that was made before; eps_pred [B, ...] is the noise that it predicted."""

    eps_pred: Tensor
    rides = False

    def own(self, n: Tensor) -> Answer:
        """What is known."""
        return Answer(self, self.eps_pred, self.x, n[None])
