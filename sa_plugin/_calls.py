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


def errors(model: EpsModel, rows: Rows, kwargs: dict[str, Any], stack: bool) -> Tensor:
    """e = f(x, n) - eps [R, B, ...], by one call for all rows or one a row."""
    if stack or len(rows) == 1:
        return _errors_stacked(model, rows, kwargs)
    return torch.cat([_errors_stacked(model, rows[k : k + 1], kwargs) for k in range(len(rows))])


def _errors_stacked(model: EpsModel, rows: Rows, kwargs: dict[str, Any]) -> Tensor:
    """By one call. Rows that are not needed are left out, their error given as zero.

    On the CPU only (see ``_keep_all``): their weight of zero already keeps them out of the loss.
    Where other processes train the same network a call is made in any case, of one such row:
    wrappers of the network exchange in every call, and would wait for one that makes fewer.
    """
    count, batch = rows.steps.shape
    x, eps, steps = rows.x.flatten(0, 1), rows.eps.flatten(0, 1), rows.steps.flatten()
    if _keep_all(rows.needed, x.device):
        if count > 1 and kwargs:
            kwargs = follow(kwargs, batch, torch.arange(batch).repeat(count))
        output = _call(model, x, steps, kwargs)
        return (output - eps).unflatten(0, (count, batch))
    kept = rows.needed.flatten().nonzero()[:, 0]
    if len(kept) == 0:
        if not _has_peers():
            return torch.zeros_like(rows.eps)
        kept = kept.new_zeros(1)
    index = kept.to(x.device, non_blocking=True)
    output = _call(model, x[index], steps[kept], follow(kwargs, batch, kept % batch))
    some = output - eps[index]
    blank = some.new_zeros(count * batch, *some.shape[1:])
    return blank.index_copy(0, index, some).unflatten(0, (count, batch))


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
