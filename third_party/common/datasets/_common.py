"""Code that the datasets share: errors of one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_choice(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def option(name: str) -> str:
    """Where a user sets what image files are read as: of the commands not all have it."""
    return f"data.{name} in a configuration, --{name} of adapters.evaluate"


def not_found(dataset: str, places: Sequence[Path], advice: str) -> ValueError:
    """The error for a dataset that is at none of `places`; `advice` says how to get it."""
    looked = " nor at ".join(map(str, places))
    return ValueError(f"dataset {dataset!r} is not at {looked}: {advice}")


def first_folder(dataset: str, places: Sequence[Path], advice: str) -> Path:
    """The first of `places` that is a folder."""
    for place in places:
        if place.is_dir():
            return place
    raise not_found(dataset, places, advice)


def one_line(error: BaseException) -> str:
    """An error's text, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
