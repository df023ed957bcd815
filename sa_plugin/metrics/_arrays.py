"""Checked conversion of a caller's values to float64 NumPy arrays."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = npt.NDArray[np.float64]


def as_float64(name: str, value: torch.Tensor | npt.ArrayLike, ndim: int) -> Array:
    """``value`` as a finite, real float64 array of ``ndim`` dimensions, or a ValueError."""
    if isinstance(value, torch.Tensor):
        # To the CPU first: not every device supports float64.
        value = value.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(value)
    if np.iscomplexobj(array):
        raise ValueError(f"{name} must be real, got dtype {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    array = array.astype(np.float64, copy=False)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} must be finite, {bad} of {array.size} entries are not")
    return array
