"""How a network is run and how images leave the device: options that change no formula.

This module is written for CUDA. Other devices get plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sa_plugin._checks import check_choice

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a network: itself, a bound method's owner, or a wrapper's ``model``."""
    inner = getattr(model, "model", None)
    for owner in (model, getattr(model, "__self__", None), inner):
        if isinstance(owner, nn.Module):
            return owner
    return module_of(inner) if callable(inner) else None


@contextmanager
def without_graph(kind: str, precision: str) -> Iterator[None]:
    """Network calls without a graph, in "bf16" or in the "same" precision as around the block.

    Autocast's cache of cast weights is off. A weight that is cast here may have no graph (PyTorch
    2.6), or another precision than an autocast around the block asks for.
    """
    dtype = torch.bfloat16 if precision == "bf16" else None
    if dtype is None and kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cast = nullcontext() if dtype is None else torch.autocast(kind, dtype, cache_enabled=False)
    with torch.no_grad(), cast:
        yield


class NetworkCall:
    """``model(x, n, **kwargs)`` in the requested memory format, precision and form.

    The network gets x in its parameters' type: the dtype of the first floating-point parameter of
    the module behind it. Without such a parameter, and under autocast, x keeps its dtype.

    Args:
        channels_last: images [B, C, H, W] and the weights of the module behind the network are laid
            out with the channels innermost. The weights' values do not change, their strides do.
        autocast: None, "bf16" or "fp16": the precision of the network's matrix products.
        compile: torch.compile, on the first call. On a GPU it uses CUDA graphs (mode
            "reduce-overhead"). Each batch size is compiled once.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        channels_last: bool = False,
        autocast: str | None = None,
        compile: bool = False,
    ) -> None:
        if autocast is not None:
            check_choice("autocast", autocast, tuple(AUTOCAST))
        self.model = model
        self._channels_last = channels_last
        self.autocast = None if autocast is None else AUTOCAST[autocast]
        self._compile = compile
        self._compiled: dict[str, Callable[..., Any]] = {}  # by device type
        module = module_of(model)
        if channels_last and module is not None:
            module.to(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, n: Tensor, **kwargs: Any) -> Any:
        """The network's output, in the network's own dtype."""
        network = self._graph(x.device.type) if self._compile else self.model
        if self.autocast is None:
            return network(self._cast(x), n, **kwargs)
        with torch.autocast(x.device.type, dtype=self.autocast):
            return network(x, n, **kwargs)

    @property
    def chain_dtype(self) -> torch.dtype:
        """The dtype of a chain without ``x_init``: float64 for a float64 network, else float32."""
        if self.autocast is not None:
            return torch.float32
        return torch.promote_types(self._own_dtype() or torch.float32, torch.float32)

    def arrange(self, x: Tensor) -> Tensor:
        """x in the memory format that the network gets; every later step keeps it."""
        if self._channels_last and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def _cast(self, x: Tensor) -> Tensor:
        dtype = self._own_dtype()
        if dtype is None or dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    def _own_dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter behind the network, if there is one."""
        module = module_of(self.model)
        dtypes = () if module is None else (p.dtype for p in module.parameters())
        # An 8-bit type only stores weights: no network takes its input in it.
        return next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None)

    def _graph(self, kind: str) -> Callable[..., Any]:
        if kind not in self._compiled:
            network = self.model
            mode = "reduce-overhead" if kind == "cuda" else "default"
            compiled = torch.compile(
                lambda x, n, **kwargs: network(x, n, **kwargs), mode=mode, dynamic=False
            )
            self._compiled[kind] = _copied(compiled) if kind == "cuda" else compiled
        return self._compiled[kind]


def _copied(graph: Callable[..., Any]) -> Callable[..., Any]:
    """Copies a CUDA graph's outputs: its next call overwrites them, and callers keep the steps."""

    def call(x: Tensor, n: Tensor, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, graph(x, n, **kwargs))

    return call


def to_cpu(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches in the CPU's memory, in order.

    A batch on a GPU is copied into pinned memory on a separate stream while the next batch is made.
    It is therefore handed out only when the next batch is ready.
    """
    waiting: tuple[torch.cuda.Event, Tensor] | None = None
    side: torch.cuda.Stream | None = None
    for batch in batches:
        if batch.device.type != "cuda":
            yield batch.cpu()
            continue
        side = side or torch.cuda.Stream(batch.device)
        side.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(side):
            copy = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
            copy.copy_(batch, non_blocking=True)
        batch.record_stream(side)  # its memory is not reused before the copy is done
        started, waiting = waiting, (side.record_event(), copy)
        if started is not None:
            started[0].synchronize()
            yield started[1]
    if waiting is not None:
        waiting[0].synchronize()
        yield waiting[1]
