"""Checks at the public entrances; each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """ValueError unless ``value`` is a whole number in low..high."""
    if (
        not isinstance(value, numbers.Integral)
        or isinstance(value, bool)
        or not low <= int(value) <= high
    ):
        raise ValueError(f"{name} must be a whole number in {low}..{high}, got {value!r}")


def check_non_negative(name: str, value: object) -> None:
    """ValueError unless ``value`` is a finite number >= 0."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """ValueError unless ``value`` is a finite number > 0."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
