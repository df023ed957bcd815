"""How a key of a configuration is described: its default, its meaning, and what it may be.

One description serves the configuration, the check of its values, ``--help_keys`` and the table of
the keys in the documentation. A table of keys is a dictionary of descriptions and of such tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

from ml_collections import ConfigDict

LARGEST_SEED = 2**32 - 1
_SIGNS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}


@dataclass(frozen=True)
class Key:
    """One key; ``key`` makes it. Limits and choices hold for each value of a tuple."""

    default: Any
    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] | str = ()
    filled: bool = False
    distinct: bool = False
    free: bool = False

    @property
    def type(self) -> type:
        """The type of the value."""
        return type(self.default)

    @property
    def item_type(self) -> type:
        """The type of a tuple's values; of any other value, its own."""
        if self.type is not tuple:
            return self.type
        return type(self.default[0]) if self.default else str

    @property
    def type_name(self) -> str:
        """Its type in words."""
        of = f" of {self.item_type.__name__}" if self.type is tuple else ""
        return self.type.__name__ + of

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that are allowed; () where any is."""
        if not isinstance(self.one_of, str):
            return self.one_of
        module, _, table = self.one_of.partition(":")
        return tuple(getattr(import_module(module), table))

    def allowed(self) -> str:
        """What a value may be, in words; "" where only the type counts."""
        words = [f"{sign} {bound}" for sign, bound in self._bounds()]
        if self.choices:
            words = [f"one of {', '.join(self.choices)}" if self.choices[1:] else self.choices[0]]
        words += ["not empty"] * self.filled + ["each once"] * self.distinct
        return ", ".join(words)

    def check(self, name: str, value: Any) -> None:
        """ValueError, naming the key, unless the value is allowed."""
        if self.free:
            return
        if type(value) is not self.type:
            raise ValueError(
                f"configuration key {name!r} must be a {self.type.__name__}, got {value!r}"
            )
        items = value if self.type is tuple else (value,)
        for item in items:
            self._check_item(name, item)
        if self.filled and not value:
            raise ValueError(f"{name} must not be empty: {self.meaning}")
        if self.distinct and len(set(items)) < len(items):
            raise ValueError(f"{name} must hold each value once, got {value!r}")

    def _check_item(self, name: str, item: Any) -> None:
        if type(item) is not self.item_type:
            raise ValueError(f"{name} must hold {self.item_type.__name__} values, got {item!r}")
        if self.choices and item not in self.choices:
            which = "among" if self.type is tuple else "one of"
            raise ValueError(f"{name} must be {which} {sorted(self.choices)}, got {item!r}")
        a_number = "a finite number " if self.item_type is float else ""
        for sign, bound in self._bounds():
            if not _holds(item, sign, bound):
                raise ValueError(f"{name} must be {a_number}{sign} {bound}, got {item!r}")
        if a_number and not math.isfinite(item):
            raise ValueError(f"{name} must be a finite number, got {item!r}")

    def _bounds(self) -> Iterator[tuple[str, float]]:
        for name, sign in _SIGNS.items():
            if (bound := getattr(self, name)) is not None:
                yield sign, bound


Keys: TypeAlias = Mapping[str, "Key | Keys"]


def key(default: Any, meaning: str, **allowed: Any) -> Key:
    """Describe a key.

    Args:
        default: its value where a configuration does not set it; all values have its type.
        meaning: in a few words.
        allowed: ``at_least``, ``above``, ``at_most``, ``below``: limits of a number.
            ``one_of``: names, or "MODULE:TABLE", where a table of the names stands.
            ``filled=True``: not empty. ``distinct=True``: a tuple without repetitions.
            ``free=True``: checked by the code that uses it.
    """
    return Key(default, meaning, **allowed)


def seed(default: int, meaning: str) -> Key:
    """Describe a seed of random numbers."""
    return key(default, meaning, at_least=0, at_most=LARGEST_SEED)


def defaults(keys: Keys) -> ConfigDict:
    """The configuration with all defaults; locked."""
    return ConfigDict(_defaults(keys)).lock()


def flat(keys: Keys, prefix: str = "") -> dict[str, Key]:
    """The descriptions by the keys' full names, joined by dots."""
    found: dict[str, Key] = {}
    for name, value in keys.items():
        if isinstance(value, Key):
            found[prefix + name] = value
        else:
            found |= flat(value, f"{prefix}{name}.")
    return found


def _defaults(keys: Keys) -> dict[str, Any]:
    return {k: v.default if isinstance(v, Key) else _defaults(v) for k, v in keys.items()}


def _holds(item: float, sign: str, bound: float) -> bool:
    if "=" in sign and item == bound:
        return True
    return item > bound if sign.startswith(">") else item < bound
