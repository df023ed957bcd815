"""Functions of the array libraries (NumPy, torch, JAX), for formulas on arrays of any of them."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Numeric: TypeAlias = Any  # a float, or an array of any library: no common type exists


def namespace(*values: Numeric) -> Any:
    """The functions (minimum, clip, ...) of the values' library; NumPy for plain numbers.

    torch and NumPy 1 have no ``__array_namespace__`` and are recognised by type.
    """
    if any(isinstance(value, Tensor) for value in values):
        return torch
    for value in values:
        # An array of another library wins over NumPy tables.
        if not isinstance(value, np.ndarray | np.generic) and hasattr(value, "__array_namespace__"):
            return value.__array_namespace__()
    return np


def bound(value: Numeric, low: float, high: float = math.inf) -> Numeric:
    """``value`` cut to [low, high]."""
    return namespace(value).clip(value, low, high)


def added(total: Numeric, term: Numeric) -> Numeric:
    """``total + term``; where both are tensors without a graph, in the memory of ``total``.

    The caller has just made ``total`` and uses it no more. New memory costs as much as the sum.
    """
    tensors = isinstance(total, Tensor) and isinstance(term, Tensor)
    if tensors and not torch.is_grad_enabled() and total.shape == term.shape:
        return total.add_(term) if total.dtype == term.dtype else total + term
    return total + term
