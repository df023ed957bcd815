"""Standing between an owner and the callable that it holds, for the time of a block."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn

Around = Callable[..., Any]
_WATCH = "_sa_plugin_watch"


@contextmanager
def intercepted(owner: Any, name: str, around: Around) -> Iterator[None]:
    """Make calls of the owner's attribute ``name`` ``around(callable, *args, **kwargs)`` meanwhile.

    A module stays where it is and what it is: an owner that is a module itself refuses anything
    else in its place, and a host may look at its type (DataParallel) or call it by another way. It
    is of a subclass meanwhile, as FSDP and parametrizations have it, and of its own class within
    ``around``. Forward hooks would become part of the graph of a network that is compiled in place.
    """
    held = getattr(owner, name)
    if isinstance(held, nn.Module):
        watch = _Watch(held, around)
        watch.put_on()
        try:
            yield
        finally:
            watch.take_off()
        return
    setattr(owner, name, _StandIn(held, around))
    try:
        yield
    finally:
        setattr(owner, name, held)


class _StandIn:
    """In place of a callable that is no module; attributes are the callable's."""

    def __init__(self, held: Callable[..., Any], around: Around) -> None:
        self._held = held
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._held, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


class _Watch:
    """What a module's calls meet while it is of the watched class."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self._module = module
        self._own = type(module)
        self._around = around

    def put_on(self) -> None:
        vars(self._module)[_WATCH] = self
        self._become(_watched(self._own))  # type: ignore[arg-type]

    def take_off(self) -> None:
        self._become(self._own)
        del vars(self._module)[_WATCH]

    def _become(self, kind: type) -> None:
        # Wrappers of networks pass on what is set on them by the usual way.
        object.__setattr__(self._module, "__class__", kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.take_off()
        try:
            return self._around(self._module, *args, **kwargs)
        finally:
            self.put_on()


@lru_cache
def _watched(kind: type) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_WATCH](*args, **kwargs)

    body = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))
