"""Standing in for a callable that an owner holds, for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Around = Callable[..., Any]


@contextmanager
def intercepted(owner: Any, name: str, around: Around) -> Iterator[None]:
    """Calls of the owner's attribute ``name`` become ``around(callable, *args, **kwargs)``.

    The stand-in lies in the owner's own ``__dict__``. Python looks there first, also where the
    owner is a module and the callable its registered child. The child stays registered.

    Raises:
        ValueError: the callable is intercepted already.
    """
    held, own = getattr(owner, name), vars(owner)
    if type(held) is _StandIn:
        raise ValueError(
            f"{name} is intercepted already: the objective calls itself, or another one that an SA "
            "loss is attached to"
        )
    described = hasattr(getattr(type(owner), name, None), "__set__")  # a property, a slot
    before = {name: own[name]} if name in own else {}
    with standing_in(held, around) as stand_in:
        if described:
            setattr(owner, name, stand_in)
        else:
            own[name] = stand_in
        try:
            yield
        finally:
            if described:
                setattr(owner, name, held)
            elif own.get(name) is stand_in:  # else the host has assigned another one
                del own[name]
                own.update(before)


@contextmanager
def standing_in(held: Callable[..., Any], around: Around) -> Iterator[Any]:
    """A stand-in for ``held``, whose calls are ``around(held, *args, **kwargs)`` in the block."""
    stand_in = _StandIn(held, around)
    try:
        yield stand_in
    finally:
        vars(stand_in)["_around"] = None  # a checkpoint calls it again, in the backward pass


class _StandIn:
    """In place of a callable; its class, attributes and items are the callable's."""

    def __init__(self, held: Callable[..., Any], around: Around) -> None:
        vars(self).update(_held=held, _around=around)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance()
        return type(self._held)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._around is None:
            return self._held(*args, **kwargs)
        return self._around(self._held, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._held, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._held[key]

    def __len__(self) -> int:
        return len(self._held)

    def __bool__(self) -> bool:
        return bool(self._held)

    def __eq__(self, other: object) -> bool:
        return bool(self._held == other)

    def __hash__(self) -> int:
        return hash(self._held)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is one of the callable
        return self._held.__reduce_ex__(protocol)
