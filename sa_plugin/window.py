r"""Which steps form the window of each sample, and how each of them counts.

A window holds K neighbouring steps. ``anchor`` is its first step in the window's own direction:

=========  ======================  ===============================  ========================
window     position p has step     anchor, ``backprop="all"``       anchor, ``backprop="one"``
=========  ======================  ===============================  ========================
``down``   anchor - p              n                                n + j
``paper``  anchor + p              n, or uniform on 1-K..0          n - j
=========  ======================  ===============================  ========================

n, uniform on 1..N, is L_simple's step. With ``all``, ``paper``: the anchor is n with probability
N/(N+K), else below 1, so that it is uniform on 1-K..N (Theorem 2's law) while L_simple's call
serves the window whenever it can. With ``one``, j is uniform on 0..K-1 and n stands at position j:
every pair (window, position) is then met equally often, which makes the gradient of that one
position, scaled, an unbiased estimate of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_plugin._arrays import Numeric
from sa_plugin.tau import TauTable

WINDOWS = ("down", "paper")
BACKPROPS = ("all", "one")


@dataclass(frozen=True)
class WindowPlan:
    """The windows of a batch, rows in the order of evaluation: row 0 is L_simple's step.

    Attributes:
        steps: int64 [K, B], inside 1..N (a step outside is replaced by the nearest one inside and
            has weight zero).
        weights: float64 [K, B], tau of each step, zero outside the window's range.
        simple_weights: float64 [K, B], share of each step in L_simple: one for row 0 and zero for
            the others, unless the window's calls are reused for it.
        needed: bool [K, B], whether the network must be evaluated: row 0 always, others by weight.
        positions: int64 [K, B], position in the window of each row.
        value_scale: float64 [B], factor that makes the term's value unbiased.
        gradient_scale: float64 [B], factor that makes its gradient unbiased.
    """

    steps: Tensor
    weights: Tensor
    simple_weights: Tensor
    needed: Tensor
    positions: Tensor
    value_scale: Tensor
    gradient_scale: Tensor


def window_gap(weights: Numeric, own: Numeric, others: Numeric) -> Numeric:
    """sum_k w_k e_k over a window's steps, [B, ...], for arrays of any library.

    Args:
        weights: tau / K, [K, B]; zero for a step outside 1..N.
        own: error of the window's first row, [B, ...].
        others: errors of the rest, [K-1, B, ...].
    """
    over = weights.reshape((*weights.shape, *[1] * (own.ndim - 1)))
    return over[0] * own + (over[1:] * others).sum(0)


class WindowPlanner:
    """Plans windows of K steps; see the module's docstring.

    Args:
        tau: weights by step.
        K: steps in a window, 1..N.
        window: ``"down"`` or ``"paper"``.
        backprop: ``"all"`` or ``"one"``.
        reuse: whether every step of the window has a share in L_simple.
    """

    def __init__(
        self, tau: TauTable, K: int, window: str, backprop: str, reuse: bool = False
    ) -> None:
        self._tau = {torch.device("cpu"): torch.from_numpy(tau.values.copy())}
        self.relative = tau.relative
        self.N = tau.schedule.N
        self.K = K
        self.window = window
        self.backprop = backprop
        self.reuse = reuse

    def plan(
        self, n: Tensor, anchor: Tensor | None = None, generator: torch.Generator | None = None
    ) -> WindowPlan:
        """Plan the windows around L_simple's steps n [B]; anchors [B] are drawn unless given."""
        if anchor is None:
            anchor = self._draw_anchor(n, generator)
        own = self._own_position(n, anchor)
        order = self._order(own)
        steps = anchor + order if self.window == "paper" else anchor - order
        weights = self._weights(steps, anchor)
        # "all", "paper", anchor below 1: position 0 lies outside, its row serves L_simple alone.
        steps = torch.cat([n[None], steps[1:]])
        shares = self._simple_weights(steps)
        needed = (weights != 0) | (shares != 0)
        steps = steps.clamp(1, self.N)
        return WindowPlan(steps, weights, shares, needed, order, *self._scales(anchor))

    def plain(self, n: Tensor) -> WindowPlan:
        """L_simple's step alone, where there is no SA term."""
        ones = torch.ones(n.shape, dtype=torch.float64, device=n.device)
        needed, position = torch.ones_like(n, dtype=torch.bool), torch.zeros_like(n)
        zeros, ones_row = 0 * ones[None], ones[None]
        return WindowPlan(n[None], zeros, ones_row, needed[None], position[None], ones, ones)

    def _draw_anchor(self, n: Tensor, generator: torch.Generator | None) -> Tensor:
        position = _draw_below(self.K, n, generator)
        if self.backprop == "one":
            return n + position if self.window == "down" else n - position
        if self.window == "down":
            return n
        # x < N of N+K equally likely x: the integer form of "with probability N/(N+K)".
        stay = _draw_below(self.N + self.K, n, generator) < self.N
        return torch.where(stay, n, 0 - position)

    def _own_position(self, n: Tensor, anchor: Tensor) -> Tensor:
        if self.backprop == "all":
            return torch.zeros_like(n)
        return anchor - n if self.window == "down" else n - anchor

    def _order(self, own: Tensor) -> Tensor:
        """Positions in the order of evaluation, [K, B]: own first, the others ascending."""
        others = torch.arange(self.K - 1, device=own.device)[:, None]
        return torch.cat([own[None], others + (others >= own)])

    def _weights(self, steps: Tensor, anchor: Tensor) -> Tensor:
        lowest = 2 if self.window == "paper" else 1
        inside = (steps >= lowest) & (steps <= self.N)
        if self.window == "down":
            inside = inside & (anchor <= self.N)  # a window that starts above N does not exist
        tau = self._tau_on(steps.device)[steps.clamp(0, self.N)]
        weights = torch.where(inside, tau, 0.0)
        if self.relative:
            largest = weights.amax(0)
            weights = torch.where(largest > 0, weights / largest, 0.0)
        return weights

    def _tau_on(self, device: torch.device) -> Tensor:
        """The weights by step, moved to a device once."""
        if device not in self._tau:
            self._tau[device] = self._tau[torch.device("cpu")].to(device)
        return self._tau[device]

    def _simple_weights(self, steps: Tensor) -> Tensor:
        """Shares such that every step of 1..N is met with the same expected share, 1/N."""
        shares = torch.zeros(steps.shape, dtype=torch.float64, device=steps.device)
        if not self.reuse:
            shares[0] = 1.0
            return shares
        if self.window == "down":  # step s lies in the windows of n = s, ..., min(s + K - 1, N)
            share = 1 / (self.N + 1 - steps).clamp(1, self.K).double()
        else:  # N + K anchors; each step in K windows, and 1/N of row 0 of the K that begin below 1
            share = shares + (self.N + self.K) / (self.K * (self.N + 1))
        return torch.where((steps >= 1) & (steps <= self.N), share, shares)

    def _scales(self, anchor: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(anchor.shape, dtype=torch.float64, device=anchor.device)
        if self.backprop == "all":
            return ones, ones
        if self.window == "down":
            drawn = anchor.clamp(max=self.K)  # pairs (n, j) that lead to this anchor
            scale = self.K * ones
        else:
            drawn = (anchor + self.K - 1).clamp(max=self.N) - anchor.clamp(min=1) + 1
            scale = self.K * self.N / (self.N + self.K) * ones
        return scale / drawn, scale


def check_anchor(anchor: Tensor, n: Tensor, planner: WindowPlanner) -> None:
    """ValueError unless every anchor is one that the planner could have drawn for its n."""
    K, N = planner.K, planner.N
    if anchor.shape != n.shape:
        raise ValueError(f"anchor must have n's shape {tuple(n.shape)}, got {tuple(anchor.shape)}")
    if planner.backprop == "one":
        offset = anchor - n if planner.window == "down" else n - anchor
        allowed, rule = (offset >= 0) & (offset < K), "a position 0..K-1 away from n"
    elif planner.window == "down":
        allowed, rule = anchor == n, "n itself"
    else:
        allowed, rule = (anchor == n) | ((anchor >= 1 - K) & (anchor < 1)), "n, or in 1-K..0"
    if not bool(allowed.all()):
        bad = anchor[~allowed][0].item()
        raise ValueError(f"anchor must be {rule} (K = {K}, N = {N}), got {bad}")


def _draw_below(high: int, n: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else n.device
    return torch.randint(high, n.shape, generator=generator, device=device).to(n.device)
