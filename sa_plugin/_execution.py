"""How the sampler runs a network and takes images off the device: options that change no formula.

What is here has been written for CUDA and falls back to plain calls elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sa_plugin._checks import check_choice

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a network: itself, a bound method's, or what a wrapper calls ``model``."""
    for owner in (model, getattr(model, "__self__", None), getattr(model, "model", None)):
        if isinstance(owner, nn.Module):
            return owner
    return None


class NetworkCall:
    """``model(x, n, **kwargs)`` in the memory format, precision and form asked for.

    Args:
        channels_last: images [B, C, H, W] and the weights of the module behind the network are laid
            out with the channels innermost. The weights' values do not change, their strides do.
        autocast: None, "bf16" or "fp16": the precision of the network's matrix products.
        compile: torch.compile, on the first call. On a GPU as CUDA graphs (mode
            "reduce-overhead"); each batch size is compiled once.
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
        self._model = model
        self._channels_last = channels_last
        self._dtype = None if autocast is None else AUTOCAST[autocast]
        self._compile = compile
        self._compiled: dict[str, Callable[..., Any]] = {}  # by kind of device
        module = module_of(model)
        if channels_last and module is not None:
            module.to(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, n: Tensor, **kwargs: Any) -> Any:
        """The network's output."""
        network = self._graph(x.device.type) if self._compile else self._model
        if self._dtype is None:
            return network(x, n, **kwargs)
        with torch.autocast(x.device.type, dtype=self._dtype):
            return network(x, n, **kwargs)

    def arrange(self, x: Tensor) -> Tensor:
        """x in the memory format that the network gets; every later step keeps it."""
        if self._channels_last and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def _graph(self, kind: str) -> Callable[..., Any]:
        if kind not in self._compiled:
            network = self._model
            mode = "reduce-overhead" if kind == "cuda" else "default"
            compiled = torch.compile(
                lambda x, n, **kwargs: network(x, n, **kwargs), mode=mode, dynamic=False
            )
            self._compiled[kind] = _copied(compiled) if kind == "cuda" else compiled
        return self._compiled[kind]


def _copied(graph: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA graph's outputs lie where its next call writes; steps are handed out, so copy them."""

    def call(x: Tensor, n: Tensor, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, graph(x, n, **kwargs))

    return call


def to_host(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches in the CPU's memory, in order.

    From a GPU each is copied into pinned memory on a stream of its own while the next one is made,
    so that a batch comes out when its successor is ready.
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
        batch.record_stream(side)  # its memory is not given away before the copy is done
        started, waiting = waiting, (side.record_event(), copy)
        if started is not None:
            started[0].synchronize()
            yield started[1]
    if waiting is not None:
        waiting[0].synchronize()
        yield waiting[1]
