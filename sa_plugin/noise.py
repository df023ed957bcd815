r"""The noises eps [K, B, ...] of a window's rows, made of draws z; row 0's noise is its draw.

``independent``: a draw for every row, as in the paper. ``shared``: one draw [1, B, ...] for all.
``chain``: the window's x_s lie on one forward chain. The noises of two steps are then jointly
Gaussian, and their correlation is the ratio of a_s / b_s (x_s = a_s x_0 + b_s eps_s), the smaller
over the larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_plugin._tensors import Levels, expand
from sa_plugin.window import Window


def independent(z: Tensor, window: Window, levels: Levels) -> Tensor:
    """eps_s = z_s."""
    return z


def shared(z: Tensor, window: Window, levels: Levels) -> Tensor:
    """eps_s = z."""
    return z.expand(len(window.steps), *z.shape[1:])


def chain(z: Tensor, window: Window, levels: Levels) -> Tensor:
    """eps_s = rho eps_m + sqrt(1 - rho^2) z_s, m the neighbour of s towards the own row."""
    a, b = levels(window.steps, z)
    positions, ratio, eps = window.positions.to(z.device), a / b, [z[0]]
    for row in range(1, len(z)):
        below = expand(positions[row] == positions[0] - 1, z[row])  # next to the own row again
        eps_m = torch.where(below, eps[0], eps[-1])
        ratio_m = torch.where(below, ratio[0], ratio[row - 1])
        rho = torch.minimum(ratio[row], ratio_m) / torch.maximum(ratio[row], ratio_m)
        eps.append(rho * eps_m + (1 - rho**2).sqrt() * z[row])
    return torch.stack(eps)


NOISES = {"independent": independent, "shared": shared, "chain": chain}


def draw(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal [count, *like.shape] in like's dtype, drawn on the generator's device."""
    device = generator.device if generator is not None else like.device
    shape = (count, *like.shape)
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)
