"""Standing between an owner and the callable that it holds, for the time of a block."""

from __future__ import annotations

import copyreg
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn

Around = Callable[..., Any]


@contextmanager
def intercepted(owner: Any, name: str, around: Around) -> Iterator[None]:
    """Make calls of the owner's attribute ``name`` ``around(callable, *args, **kwargs)`` meanwhile.

    A module stays where it is and what it is: an owner that is a module itself refuses anything
    else in its place, and a host may look at its type (DataParallel) or call it by another way. It
    is of a subclass meanwhile, as FSDP and parametrizations have it, and of its own class within
    ``around``. Forward hooks would become part of the graph of a network that is compiled in place.

    Raises:
        ValueError: the callable is intercepted already.
    """
    held = getattr(owner, name)
    if isinstance(held, _StandIn) or (isinstance(held, nn.Module) and held in _watches):
        raise ValueError(
            f"{name} is intercepted already: does an objective call itself, or another one that an "
            "SA loss is attached to?"
        )
    if isinstance(held, nn.Module):
        watch = _Watch(held, around)
        watch.put_on()
        try:
            yield
        finally:
            watch.take_off()
        return
    stand_in = _StandIn(held, around)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, held)
        stand_in.retire()


class _StandIn:
    """In place of a callable that is no module; other attributes are the callable's."""

    def __init__(self, held: Callable[..., Any], around: Around) -> None:
        self._held = held
        self._around: Around | None = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._around is None:
            return self._held(*args, **kwargs)
        return self._around(self._held, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def retire(self) -> None:
        """Pass calls on from now on: a checkpoint calls again what it got, in the backward pass."""
        self._around = None


class _Watch:
    """What a module's calls meet while it is of the watched class."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self._module = module
        self._own = type(module)
        self._around = around

    def put_on(self) -> None:
        _watches[self._module] = self
        _become(self._module, _watched(self._own))  # type: ignore[arg-type]

    def take_off(self) -> None:
        _become(self._module, self._own)
        del _watches[self._module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.take_off()
        try:
            return self._around(self._module, *args, **kwargs)
        finally:
            self.put_on()


# Beside the modules, so that a copy of one has no part in it.
_watches: weakref.WeakKeyDictionary[Any, _Watch] = weakref.WeakKeyDictionary()


def _become(module: nn.Module, kind: type) -> None:
    # Wrappers of networks pass on what is set on them by the usual way.
    object.__setattr__(module, "__class__", kind)


class _Quiet:
    """Before a class whose subclasses are registered, or need arguments: not this one."""

    def __init_subclass__(cls, **_: Any) -> None:
        """The classes behind it do not hear of it."""


def _new(kind: type, *args: Any) -> Any:
    return kind.__new__(kind, *args)


@lru_cache
def _watched(kind: type) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch = _watches.get(self)
        return kind.__call__(self, *args, **kwargs) if watch is None else watch(*args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """For a copy, which is of the module's own class."""
        _become(self, kind)
        try:
            reduced: Any = self.__reduce_ex__(protocol)
        finally:
            _become(self, watched)
        make, *rest = reduced
        # pickle compares the class in copyreg's own function with the watched module's.
        return (_new if make is copyreg.__newobj__ else make, *rest)  # type: ignore[attr-defined]

    body = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    heard = any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1])
    bases = (_Quiet, kind) if heard else (kind,)
    watched = types.new_class(kind.__name__, bases, exec_body=lambda space: space.update(body))
    return watched
