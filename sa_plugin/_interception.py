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
    before = {name: own[name]} if name in own else {}
    own[name] = stand_in = _StandIn(held, around)
    try:
        yield
    finally:
        del own[name]
        own.update(before)
        vars(stand_in)["_around"] = None  # a checkpoint calls it again, in the backward pass


class _StandIn:
    """In place of a callable; its class and all other attributes are the callable's."""

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
