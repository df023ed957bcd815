"""The steps t of L_simple: how a batch's are drawn from 1..N."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_steps(
    N: int,
    batch: int,
    generator: torch.Generator | None = None,
    *,
    antithetic: bool = False,
    stratified: bool = False,
) -> Tensor:
    """Steps [batch] in 1..N, each uniform by itself, on the generator's device (none: the CPU).

    Args:
        N, batch: the last step, how many are drawn.
        generator: source of the draws, else torch's global one.
        antithetic: in pairs t, N+1-t, the second halves behind the first.
        stratified: one from each of ``batch`` equal parts of 1..N, shuffled.
    """
    device = generator.device if generator is not None else None
    if stratified:
        # Of batch * N places, `batch` belong to a step and N to a part.
        offsets = torch.randint(N, (batch,), generator=generator, device=device)
        places = torch.arange(batch, device=device) * N + offsets
        order = torch.randperm(batch, generator=generator, device=device)
        return (places // batch + 1)[order]
    count = (batch + 1) // 2 if antithetic else batch
    n = torch.randint(1, N + 1, (count,), generator=generator, device=device)
    return torch.cat([n, N + 1 - n])[:batch] if antithetic else n
