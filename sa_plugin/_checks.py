"""Checks at the public entrances; each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

FAR_OUTSIDE = 1.5  # |x_0| beyond this: data that were not scaled to [-1, 1]


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


def check_shape_of(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless the tensor has this shape."""
    if value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def real_array(name: str, value: ArrayLike | Tensor) -> NDArray[np.float64]:
    """A new float64 array of real numbers, or ValueError; also of a tensor on any device."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value if value.is_complex() else value.double()).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, got {array.dtype}")
    return array.astype(np.float64)


def table_by_step(
    name: str, value: ArrayLike, N: int, *, number: bool = False, least: str = ">= 0"
) -> NDArray[np.float64]:
    """A new float64 table [N+1], entry 0 zero; with ``number`` also of one number for all steps.

    Raises:
        ValueError: another shape, or an entry that is not finite or not ``least``, "> 0" or ">= 0".
    """
    values = real_array(name, value)
    if values.shape != (N + 1,) and not (number and values.ndim == 0):
        wanted = "be a number or a table of shape" if number else "have shape"
        raise ValueError(f"{name} must {wanted} {(N + 1,)} (entry 0 unused), got {values.shape}")
    table = np.broadcast_to(values, (N + 1,)).copy()
    wrong = ~(np.isfinite(table) & ((table > 0) if least == "> 0" else (table >= 0)))[1:]
    if wrong.any():
        n = int(np.argmax(wrong)) + 1
        where = f"{name}[{n}] = " if values.ndim else ""
        raise ValueError(f"{name} must be finite and {least}, got {where}{table[n]:g}")
    table[0] = 0
    return table


def check_images(x0: Tensor, seen: bool = False, *, wait: bool = False) -> bool:
    """ValueError unless x_0 is floating point, [B, ...]; one warning unless it is in [-1, 1].

    Args:
        x0: images. Values that are not finite are left out of the range.
        seen: what the call before returned: whether values have been seen. They are seen once.
        wait: look at them also where that waits for an accelerator.
    """
    check_hold_images("x0", x0)
    if seen or not can_look(x0, wait):
        return seen
    x0 = x0.detach()
    finite = x0.isfinite()
    low = torch.where(finite, x0, torch.inf).amin()
    ends = look(low, torch.where(finite, x0, -torch.inf).amax(), wait=wait)
    if ends is None or ends[0] > ends[1]:
        return False
    if max(-ends[0], ends[1]) > FAR_OUTSIDE or _from_0_to_1(*ends):
        warnings.warn(
            f"x0 ranges over [{ends[0]:.4g}, {ends[1]:.4g}]; the loss and the sampler expect "
            "images scaled to [-1, 1]",
            stacklevel=3,
        )
    return True


def check_hold_images(name: str, x0: object, least: int = 1) -> None:
    """ValueError unless ``x0`` is a floating-point tensor [B, ...] with B >= ``least``."""
    if (
        isinstance(x0, Tensor)
        and x0.ndim > 1
        and x0.is_floating_point()
        and len(x0) >= least
        and (x0.numel() or not least)
    ):
        return
    got = f"{x0.dtype} {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
    many = f"at least {least} " if least else ""
    raise ValueError(f"{name} must hold {many}floating-point images [B, ...], got {got}")


def check_batches(batches: object) -> None:
    """ValueError for one tensor or array: its rows would be taken for batches."""
    if isinstance(batches, Tensor | np.ndarray):
        raise ValueError(
            "batches must be a list of batches [B, ...], such as [x0], got one "
            f"{type(batches).__name__} of shape {tuple(batches.shape)}"
        )


def check_output(output: object, x: Tensor, hint: str = "") -> None:
    """ValueError unless a network's output is a real tensor of its input's shape."""
    if isinstance(output, Tensor) and output.shape == x.shape and not output.is_complex():
        return
    found: object = type(output).__name__
    if isinstance(output, Tensor):
        found = output.dtype if output.is_complex() else tuple(output.shape)
    raise ValueError(
        f"the network must return real tensors of its input's shape {tuple(x.shape)}, got "
        f"{found}{hint}"
    )


def check_finite(name: str, values: Tensor) -> None:
    """ValueError unless all values are finite; they are not looked at where that would wait."""
    if not can_look(values) or values.numel() == 0:
        return
    bounds = look(*torch.aminmax(values.detach()))
    if bounds is not None and not all(map(math.isfinite, bounds)):
        raise ValueError(f"{name} must be finite, got values that are not")


def check_steps(n: Tensor, batch: int, N: int, *, name: str = "n", wait: bool = False) -> Tensor:
    """Steps [batch] as int64, or ValueError.

    On an accelerator their values are only looked at where ``wait`` allows to wait for it.
    """
    n = torch.as_tensor(n)
    if n.shape != (batch,) or n.is_floating_point() or n.dtype == torch.bool:
        raise ValueError(
            f"{name} must be integers of shape ({batch},), got {n.dtype} {tuple(n.shape)}"
        )
    seen = look(n.min(), n.max(), wait=wait) if batch and can_look(n, wait) else None
    if seen is not None and not 1 <= seen[0] <= seen[1] <= N:
        found = f"{seen[0]}..{seen[1]}"
        raise ValueError(
            f"{name} must lie in 1..{N}, got {found}; codes that count from 0 pass t + 1"
        )
    return n.long()


def check_recovered(eps: Tensor, cause: str) -> bool:
    """ValueError unless the noise recovered from a host's x_n has mean square 1; whether seen.

    Args:
        cause: what may be wrong, for the error.
    """
    seen = look(eps.float().square().mean(), wait=True)
    tolerance = 0.05 + 10 * math.sqrt(2 / eps.numel())  # ten standard errors
    if seen is not None and not abs(seen[0] - 1) < tolerance:
        raise ValueError(
            f"the noise recovered from the network's input has mean square {seen[0]:.4g}, not 1: "
            f"{cause}"
        )
    return seen is not None


def _from_0_to_1(low: float, high: float) -> bool:
    """Whether a batch fills [0, 1]; one scaled to [-1, 1] has negative values, too."""
    return 0 <= low < 0.25 and 0.75 < high <= 1


def can_look(tensor: Tensor, wait: bool = False) -> bool:
    """Whether values may be looked at; see ``look``."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return wait or tensor.device.type == "cpu"


def look(*scalars: Tensor, wait: bool = False) -> list[float] | None:
    """The numbers of 0-d tensors of one device; None where they cannot be seen at once.

    That is within ``torch.compile`` and ``torch.func`` transforms, on the meta device, and on an
    accelerator unless ``wait`` allows to wait for it.
    """
    if not can_look(scalars[0], wait):
        return None
    try:
        return [s.item() for s in scalars]
    except RuntimeError:  # within torch.func.vmap a tensor stands for many
        return None


def explain_absence(error: ModuleNotFoundError, module: str, extra: str) -> ModuleNotFoundError:
    """``error`` in one line that names the extra; unchanged if another module is missing."""
    if error.name != module:
        return error
    return ModuleNotFoundError(
        f"{module} is not installed; get it by: pip install 'sa-plugin[{extra}]'", name=module
    )
