r"""The noises of a window's steps, in the order of evaluation (row 0 = L_simple's step).

``independent``: a fresh eps for every step (the paper). ``shared``: one eps for the window.
``chain``: the window's x_s lie on one forward chain. Then neighbours m-1, m have jointly Gaussian
eps of unit variance with correlation rho_m = sqrt(alpha_m cum_beta_{m-1} / cum_beta_m), whichever
of the two is drawn first, so that the chain can be grown from any position, upward and downward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sa_plugin._tensors import expand
from sa_plugin.schedule import FloatArray, NoiseSchedule
from sa_plugin.window import WindowPlan

NOISES = ("independent", "shared", "chain")


def draws_needed(kind: str, rows: int) -> int:
    """How many draws [B, ...] the noises of so many rows take."""
    return min(rows, 1) if kind == "shared" else rows


def draw(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal [count, *like.shape] in like's dtype, drawn on the generator's device."""
    device = generator.device if generator is not None else like.device
    shape = (count, *like.shape)
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


def rows_from_positions(kind: str, by_position: Tensor, plan: WindowPlan) -> Tensor:
    """Reorder draws by window position [K, B, ...] into rows; a shared draw stays as it is."""
    if kind == "shared":
        return by_position
    index = expand(plan.positions.to(by_position.device), by_position)
    return by_position.gather(0, index.expand(-1, *by_position.shape[1:]))


def complete(kind: str, draws: Tensor, plan: WindowPlan, correlation: Tensor) -> Tensor:
    """The rows' eps [R, B, ...] from their draws (row 0's draw is its eps).

    Args:
        kind: one of ``NOISES``.
        draws: [R, B, ...], or [1, B, ...] for ``shared``.
        plan: the windows, R rows.
        correlation: rho by step [N+1], see ``neighbour_correlation``.
    """
    if kind == "shared":
        return draws.expand(len(plan.steps), *draws.shape[1:])
    if kind == "chain" and len(draws) > 1:
        return _grow_chain(draws, plan, correlation)
    return draws


def neighbour_correlation(schedule: NoiseSchedule) -> FloatArray:
    """rho_m [N+1], the correlation of eps_{m-1} and eps_m on one chain; zero for m <= 1."""
    rho = np.zeros(schedule.N + 1)
    rho[1:] = np.sqrt(schedule.alphas[1:] * schedule.cum_betas[:-1] / schedule.cum_betas[1:])
    return rho


def _grow_chain(draws: Tensor, plan: WindowPlan, correlation: Tensor) -> Tensor:
    positions = plan.positions.to(draws.device)
    places = positions.argsort(0)  # row of each position
    by_position = draws.gather(0, expand(places, draws).expand_as(draws))
    steps = plan.steps.to(draws.device).gather(0, places)
    rho = correlation[torch.maximum(steps[1:], steps[:-1])]  # between positions p and p+1
    eps = list(by_position)
    own = positions[0]

    def follow(neighbour: Tensor, fresh: Tensor, link: Tensor) -> Tensor:
        rho_x = expand(link, fresh)
        return rho_x * neighbour + (1 - rho_x**2).sqrt() * fresh

    for p in range(1, len(eps)):
        grown = follow(eps[p - 1], by_position[p], rho[p - 1])
        eps[p] = torch.where(expand(own < p, grown), grown, by_position[p])
    for p in range(len(eps) - 2, -1, -1):
        grown = follow(eps[p + 1], by_position[p], rho[p])
        eps[p] = torch.where(expand(own > p, grown), grown, eps[p])
    chain = torch.stack(eps)
    return chain.gather(0, expand(positions, chain).expand_as(chain))
