"""What array libraries (NumPy, torch, JAX) call differently, for formulas that serve all."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Numeric: TypeAlias = Any  # a float, or an array of any library: no common type exists


def namespace(*values: Numeric) -> Any:
    """The functions (minimum, clip, ...) of the values' library; NumPy for plain numbers.

    torch has no ``__array_namespace__``; it and NumPy 1 are known by name, others say it.
    """
    if any(isinstance(value, Tensor) for value in values):
        return torch
    for value in values:
        # An array of another library wins over NumPy tables that stand beside it.
        if not isinstance(value, np.ndarray | np.generic) and hasattr(value, "__array_namespace__"):
            return value.__array_namespace__()
    return np


def bound(value: Numeric, low: float, high: float = math.inf) -> Numeric:
    """``value`` cut to [low, high]."""
    return namespace(value).clip(value, low, high)
