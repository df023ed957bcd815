"""Evaluating a network on the rows of windows: which rows, in how many calls, with which kwargs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sa_plugin._tensors import follow

EpsModel = Callable[..., Tensor]


@dataclass(frozen=True)
class Rows:
    """Network inputs of R rows: x, eps [R, B, ...]; steps, needed [R, B] (on the plan's device)."""

    x: Tensor
    eps: Tensor
    steps: Tensor
    needed: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.x[rows], self.eps[rows], self.steps[rows], self.needed[rows])


@dataclass(frozen=True)
class Batch:
    """Rows [R, B] as one batch of M <= R B network inputs.

    Rows that are not needed may be left out, their error given as zero: on the CPU (see
    ``_keep_all``). Their weight of zero already keeps them out of the loss.

    Attributes:
        x, steps: [M, ...], [M], the inputs.
    """

    x: Tensor
    steps: Tensor
    _eps: Tensor  # [R, B, ...]
    _kept: Tensor | None  # int64 [M], which of the R B rows; None: all

    @classmethod
    def of(cls, rows: Rows, *, never_empty: bool = False) -> Batch:
        """The needed rows; one that is not, where there is none but there must be."""
        x, steps = rows.x.flatten(0, 1), rows.steps.flatten()
        if _keep_all(rows.needed, x.device):
            return cls(x, steps, rows.eps, None)
        kept = rows.needed.flatten().nonzero()[:, 0]
        if never_empty and len(kept) == 0:
            kept = kept.new_zeros(1)
        return cls(x[kept], steps[kept], rows.eps, kept)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def images(self) -> Tensor:
        """The image of 0..B-1 that each input belongs to, int64 [M]."""
        count, batch = self._eps.shape[:2]
        return (torch.arange(count * batch) if self._kept is None else self._kept) % batch

    def kwargs_behind(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Network arguments of the B images, for a call with these inputs behind them."""
        batch = self._eps.shape[1]
        return follow(kwargs, batch, torch.cat([torch.arange(batch), self.images]))

    def split(self, output: Any) -> tuple[Any, Any]:
        """An output for the B images and these inputs behind them: (of those, of these).

        Tensors are divided, also within tuples, lists and dictionaries; all else goes to both.

        Raises:
            ValueError: a tensor that has not a row for every input.
        """
        batch = self._eps.shape[1]
        rows = batch + len(self)
        return _part(output, slice(batch), rows), _part(output, slice(batch, None), rows)

    def errors(self, eps_pred: Tensor) -> Tensor:
        """e [R, B, ...] from the network's eps [M, ...]."""
        eps = self._eps.flatten(0, 1)
        if self._kept is None:
            return (eps_pred - eps).unflatten(0, self._eps.shape[:2])
        some = eps_pred - eps[self._kept]
        blank = some.new_zeros(len(eps), *some.shape[1:])
        return blank.index_copy(0, self._kept, some).unflatten(0, self._eps.shape[:2])


def _part(output: Any, part: slice, rows: int) -> Any:
    if isinstance(output, Tensor):
        if output.ndim == 0 or len(output) != rows:
            shape = tuple(output.shape)
            raise ValueError(
                f"the network must return a row for each of its {rows} inputs, got {shape}; "
                "SALoss(..., stack=False) calls it with the host's own alone"
            )
        return output[part]
    if isinstance(output, dict):
        return type(output)((name, _part(one, part, rows)) for name, one in output.items())
    if isinstance(output, tuple | list):
        make = getattr(output, "_make", type(output))  # a named tuple takes no list
        return make(_part(one, part, rows) for one in output)
    return output


def errors(model: EpsModel, rows: Rows, kwargs: dict[str, Any], stack: bool) -> Tensor:
    """e = f(x, n) - eps [R, B, ...], by one call for all rows or one a row."""
    if stack or len(rows) == 1:
        return _errors_stacked(model, rows, kwargs)
    return torch.cat([_errors_stacked(model, rows[k : k + 1], kwargs) for k in range(len(rows))])


def _errors_stacked(model: EpsModel, rows: Rows, kwargs: dict[str, Any]) -> Tensor:
    # Where other processes train the same network a call is made in any case: wrappers of the
    # network exchange in every call, and would wait for one that makes fewer.
    batch = Batch.of(rows, never_empty=_has_peers())
    if len(batch) == 0:
        return torch.zeros_like(rows.eps)
    if len(rows) > 1 or len(batch) < rows.steps.shape[1]:
        kwargs = follow(kwargs, rows.steps.shape[1], batch.images)
    return batch.errors(_call(model, batch.x, batch.steps, kwargs))


def _keep_all(needed: Tensor, device: torch.device) -> bool:
    # A compiled graph has one shape. On an accelerator finding the rows could stall it; one in a
    # thousand costs nothing there, but another batch size is another graph to compile.
    if torch.compiler.is_compiling() or device.type != "cpu" or needed.device.type != "cpu":
        return True
    return bool(needed.all())


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _call(model: EpsModel, x: Tensor, steps: Tensor, kwargs: dict[str, Any]) -> Tensor:
    if not getattr(model, "steps_as_planned", False):
        steps = steps.to(x.device, non_blocking=True)
    output = model(x, steps, **kwargs)
    check_output(output, x)
    return output


def check_output(output: object, x: Tensor) -> None:
    """ValueError unless the network returned a tensor of x's shape."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the network must return a tensor of eps, got {type(output).__name__}; "
            "sa_plugin.wrappers.EpsModel takes eps out of pairs and extra channels"
        )
    if output.shape != x.shape:
        raise ValueError(
            f"the network must return eps of its input's shape {tuple(x.shape)}, got "
            f"{tuple(output.shape)}; sa_plugin.wrappers.EpsModel cuts extra channels"
        )
