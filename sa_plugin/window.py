r"""The K neighbouring steps that are judged together, and how much each of them counts.

L_simple's step n is uniform on 1..N. A window has positions p = 0..K-1 and an anchor r, its step at
position 0. Position p holds step r - p in a "down" window and r + p in a "paper" window. With
``backprop="all"`` n stands at position j = 0. With "one" j is uniform on 0..K-1: every pair
(window, position) is then met equally often, and the gradient of that one position, scaled, is an
unbiased estimate of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_plugin._checks import look

BACKPROPS = ("all", "one")


@dataclass(frozen=True)
class Window:
    """The windows of a batch. Row 0 is the own row, of step n; the other rows go outward from it.

    Attributes:
        steps: int64 [K, B] in 1..N. A step outside is replaced by the nearest one; its weight is 0.
        positions: int64 [K, B], the position of each row.
        weights: float64 [K, B], tau_s / K; zero for steps that do not count.
        shares: float64 [K, B], of |e_s|^2 in L_simple where every row estimates it ("all").
        value_scale, gradient_scale: float64 [B] and a number, factors of L_sa that make its value
            and its gradient unbiased ("one").
    """

    steps: Tensor
    positions: Tensor
    weights: Tensor
    shares: Tensor | None = None
    value_scale: Tensor | None = None
    gradient_scale: float = 1.0

    def relative(self) -> Window:
        """The same with each window's tau divided by its largest."""
        largest = len(self.steps) * self.weights.amax(0)
        return replace(self, weights=torch.where(largest > 0, self.weights / largest, 0.0))


def down(tau: Tensor, K: int, n: Tensor, r: Tensor, j: Tensor | None) -> Window:
    """Steps r, r-1, ..., r-K+1 that are >= 1, r in 1..N: the published code's windows.

    Shares: step s lies in the windows of n = s, ..., min(s+K-1, N), so 1 / min(K, N+1-s). Scales:
    L_sa is a mean over r in 1..N, and min(r, K) pairs (n, j) lead to r with probability 1 / (N K)
    each, so K / min(r, K); the own row has 1 / K of the gradient on average, so K.
    """
    positions = _outward(K, n, j)
    steps = r - positions
    inside = steps >= 1
    counted = steps.clamp(1, len(tau) - 1), positions, _weights(tau, steps, inside & (r < len(tau)))
    if j is None:
        return Window(*counted, inside / (len(tau) - steps).clamp(1, K).double())
    return Window(*counted, None, K / r.clamp(max=K).double(), K)


def paper(tau: Tensor, K: int, n: Tensor, r: Tensor, j: Tensor | None) -> Window:
    """Steps r, r+1, ..., r+K-1 in 2..N, r in 1-K..N: the windows of Theorem 2.

    With "all", r < 1 leaves the own row to L_simple alone. Shares: each step lies in K of the N+K
    windows, and with probability 1 / N in the own row of the K below 1, so (N+K) / (K (N+1)).
    Scales: as for ``down`` with c = K N / (N+K), so c / pairs and c.
    """
    N, positions = len(tau) - 1, _outward(K, n, j)
    steps = torch.cat([n[None], r + positions[1:]])
    counted = steps.clamp(1, N), positions, _weights(tau, steps, r + positions >= 2)
    if j is None:
        inside = (steps >= 1) & (steps <= N)
        return Window(*counted, inside.double() * (N + K) / (K * (N + 1)))
    pairs, c = (r + K - 1).clamp(max=N) - r.clamp(min=1) + 1, K * N / (N + K)
    return Window(*counted, None, c / pairs.double(), c)


WINDOWS = {"down": down, "paper": paper}


def _outward(K: int, n: Tensor, j: Tensor | None) -> Tensor:
    """Positions by row, [K, B]: j, j+1, ..., K-1, then j-1, ..., 0; j = 0 where None."""
    row = torch.arange(K, device=n.device)[:, None]
    if j is None:
        return row.expand(K, len(n))
    return torch.where(j + row < K, j + row, K - 1 - row)


def _weights(tau: Tensor, steps: Tensor, counts: Tensor) -> Tensor:
    inside = counts & (steps >= 1) & (steps < len(tau))
    return torch.where(inside, tau[steps.clamp(0, len(tau) - 1)], 0.0) / len(steps)


def draw_anchor(
    window: str, backprop: str, N: int, K: int, n: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Anchors r [B] around n: n -+ j, and for ("paper", "all") a law that is uniform on 1-K..N."""

    def below(high: int) -> Tensor:
        device = n.device if generator is None else generator.device
        return torch.randint(high, n.shape, generator=generator, device=device).to(n.device)

    if backprop == "one":
        return n + below(K) if window == "down" else n - below(K)
    if window == "down":
        return n
    # r is n, so that its call serves the window, with probability N / (N+K): x < N of N+K places.
    j = below(K)
    return torch.where(below(N + K) < N, n, 0 - j)


def check_anchor(window: str, backprop: str, K: int, n: Tensor, r: Tensor) -> None:
    """ValueError unless ``draw_anchor`` could have drawn these anchors."""
    if r.shape != n.shape:
        raise ValueError(f"anchor must have n's shape {tuple(n.shape)}, got {tuple(r.shape)}")
    j = r - n if window == "down" else n - r
    allowed, rule = (j >= 0) & (j < (K if backprop == "one" else 1)), "n itself"
    if backprop == "one":
        rule = "a position 0..K-1 away from n"
    elif window == "paper":
        allowed, rule = allowed | ((r >= 1 - K) & (r < 1)), "n, or in 1-K..0"
    if look(allowed.all()) == [False]:
        raise ValueError(f"anchor must be {rule} (K = {K}), got {r[~allowed][0].item()}")
