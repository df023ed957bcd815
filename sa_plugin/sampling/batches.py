"""Images in batches: draws, the caller's too, belong to an image and not to its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_files.progress import bar_options
from sa_plugin._checks import (
    check_batches,
    check_finite,
    check_hold_images,
    check_images,
    check_whole,
    explain_absence,
)

BLOCK = 64  # images that share a noise generator
MOST = 2**63 - 1  # the largest seed or image number


class BlockNoise:
    """Standard normal draws for images first..first + B - 1, whatever the batches.

    Each block of 64 images has its own generator. Every draw makes whole blocks and keeps the
    requested images. Image i therefore depends only on (seed, i), its shape, its dtype and the type
    of device. Draws of another ``stream`` are independent of these.
    """

    def __init__(
        self,
        seed: int,
        first: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        stream: int = 0,
    ) -> None:
        blocks = range(first // BLOCK, (first + shape[0] - 1) // BLOCK + 1)
        # A 64-bit hash of the seed, then an odd stride. PyTorch's CPU generator uses only the low
        # 32 bits. With the stride these never repeat within a run; a hash per block might repeat.
        key = (stream,) if stream else ()
        base = int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
        seeds = [(base + block * 0x9E3779B97F4A7C15) % 2**64 for block in blocks]
        self._generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self._kept = slice(first - blocks.start * BLOCK, first - blocks.start * BLOCK + shape[0])
        self._options: dict[str, Any] = {
            "size": (BLOCK, *shape[1:]),
            "dtype": dtype,
            "device": device,
        }

    def draw(self) -> Tensor:
        """The next [B, ...] of standard normal numbers."""
        rows = [torch.randn(generator=g, **self._options) for g in self._generators]
        return (rows[0] if len(rows) == 1 else torch.cat(rows))[self._kept]


def parts_of(total: int, size: int) -> list[slice]:
    """0..total - 1 cut into parts of ``size``; the last part may be shorter."""
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def images_of(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of images x_0 [B, ...], each checked as it comes.

    Raises:
        ValueError: one tensor in place of a list of them; no floating-point images; images of
            different shapes, or not finite. Images that are not in [-1, 1] are warned of.
    """
    check_batches(batches)
    seen, shape = False, None
    for x0 in batches:
        check_hold_images("batches", x0, 0)
        if shape is not None and x0.shape[1:] != shape:
            raise ValueError(
                f"batches must hold images of one shape, got {tuple(shape)}, {tuple(x0.shape[1:])}"
            )
        shape = x0.shape[1:]
        if x0.numel():
            check_finite("batches", x0)
            seen = check_images(x0, seen, wait=True)
            yield x0


def noise_for(
    noise: Callable[[int], Tensor], shape: tuple[int, ...], part: slice
) -> Callable[[int], Tensor]:
    """The caller's draws for the images of ``part``, with their shape checked."""

    def draw(k: int) -> Tensor:
        drawn = noise(k)
        if drawn.shape != shape:
            raise ValueError(f"noise(k) must have shape {shape}, got {tuple(drawn.shape)}, k = {k}")
        check_finite(f"noise({k})", drawn)
        return drawn[part]

    return draw


def shown(items: Iterable[Any], total: int, unit: str, progress: bool) -> Iterable[Any]:
    """``items``, with a bar over them if ``progress``."""
    if not progress:
        return items
    try:
        from tqdm import tqdm  # optional, and slow to import
    except ModuleNotFoundError as error:
        raise explain_absence(error, "tqdm", "progress") from None
    return tqdm(items, total=total, unit=unit, **bar_options())


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` [B, ...] as whole numbers >= 1, or ValueError."""
    if len(shape) == 0:
        raise ValueError("shape must hold the batch size and an image's shape, got ()")
    for size in shape:
        check_whole("every size in shape", size, 1, MOST)
    return tuple(int(size) for size in shape)


def check_x_init(x_init: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError if ``x_init`` is given and not floating point of this shape."""
    if x_init is None:
        return
    if tuple(x_init.shape) != shape or not x_init.is_floating_point():
        raise ValueError(
            f"x_init must be floating point of shape {shape}, "
            f"got {x_init.dtype} of shape {tuple(x_init.shape)}"
        )
