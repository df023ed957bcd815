"""The random states that a training step uses, as data that `weights_only` loading accepts.

The step n is drawn from NumPy's global state, noise and dropout from PyTorch's generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# The host draws from the global state. A port does the same, so that hooks see equal behaviour.
# ruff: noqa: NPY002


def seed_everything(seed: int) -> None:
    """Seed NumPy's global state and PyTorch's generators on all devices."""
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """The current states, as tensors and plain numbers."""
    _, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": [int(pos), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(states: dict[str, Any]) -> None:
    """Restore the states of `capture`; states of missing devices are ignored."""
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *states["numpy_rest"]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved() -> Iterator[None]:
    """Code in this context may draw; the states are restored afterwards."""
    before = capture()
    try:
        yield
    finally:
        restore(before)
