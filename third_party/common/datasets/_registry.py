"""Where each dataset's module enters its loader."""

from __future__ import annotations

from collections.abc import Callable

from ..data import ImageDataset

Loader = Callable[..., ImageDataset]
DATASETS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Make `get_dataset(name)` call the decorated function."""

    def enter(loader: Loader) -> Loader:
        DATASETS[name] = loader
        return loader

    return enter
