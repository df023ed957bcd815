"""Which of the N steps a shortened reverse process visits.

A trajectory is an ascending list t_1 < ... < t_K inside 1..N. The reverse process goes from t_K
down to t_1 and then to the clean image. A rule that is dense at one end can give the same step
twice. The repeat is then raised by one, so the trajectory has K different steps. One kind keeps the
repeats, as the hosts do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sa_plugin._checks import check_choice, check_whole, real_array
from sa_plugin.sampling.variance import check_gamma
from sa_plugin.schedule import NoiseSchedule

TRAJECTORIES = (
    "linear",
    "power2",
    "quad_ddim",
    "quad_ddim_host",
    "linear_ddim",
    "dp_seg",
    "dp_vb",
)


def choose_timesteps(
    N: int,
    steps: int,
    kind: str,
    *,
    gamma: ArrayLike | None = None,
    betas: ArrayLike | None = None,
    terms: ArrayLike | None = None,
) -> list[int]:
    """A trajectory of ``steps`` steps out of 1..N, strictly increasing but for "quad_ddim_host".

    With u_k = k / (steps - 1), k = 0..steps-1, before repeats are raised:

    - ``linear``: round(1 + u_k (N - 1)).
    - ``power2``: round(N - (N - 1) sqrt(1 - u_k)): dense at small t.
    - ``quad_ddim``: 1 + floor(0.8 N u_k^2) (arXiv 2010.02502, appendix D.2): ends at 0.8 N.
    - ``quad_ddim_host``: the same with its repeats, as the codes of DDIM and Analytic-DPM visit it:
      1, 1, 2, 3, 6, 9, ... with 50 of 1000 steps, 49 of them different. From a step to itself
      nothing is added; DDIM with a clipped x_0 moves all the same. For ``Sampler`` alone.
    - ``linear_ddim``: 1 + floor(k N / steps) (same appendix).
    - ``dp_seg``: the path from 1 to N with the least sum of log(1 - skip_beta(s, t) gamma_t /
      cum_beta_t), the optimal trajectory of arXiv 2201.06503 (section 4). Needs gamma and betas.
    - ``dp_vb``: the path from 1 to N with the least sum of ``terms`` (arXiv 2106.03802). The last
      step, 1 -> 0, belongs to every path and does not count.

    With ``steps`` = 1 every kind gives [N]: only x_N has a known distribution to start from.

    Args:
        gamma: E mean(eps_pred^2) at each step, [N+1], entry 0 unused. If it exceeds 1, the last
            steps are evenly spaced (see ``_dp_seg``).
        betas: betas[1..N], or the [N+1] table of a NoiseSchedule with its leading 0.
        terms: float64 [N+1, N+1]; entry [s, t], 1 <= s < t, is the cost of stepping from t to s.

    Raises:
        ValueError: unknown kind, steps outside 1..N, or a table that is missing, of a wrong length
            or not finite.
    """
    check_choice("trajectory", kind, TRAJECTORIES)
    check_whole("N", N, 1, sys.maxsize)
    check_whole("steps", steps, 1, N)
    if kind == "dp_seg":
        return _dp_seg(N, steps, _required("gamma", gamma, kind), _required("betas", betas, kind))
    if kind == "dp_vb":
        cost = _check_terms(_required("terms", terms, kind), N)
        return _path_to_end(cost, 1, N, steps)
    if steps == 1:
        return [N]
    last = steps - 1
    if kind == "linear":
        chosen = [round(1 + k * (N - 1) / last) for k in range(steps)]
    elif kind == "power2":
        chosen = [round(N - (N - 1) * math.sqrt((last - k) / last)) for k in range(steps)]
    elif kind == "linear_ddim":
        chosen = [1 + k * N // steps for k in range(steps)]
    else:  # integers only: 0.8 N u^2 must not round down past one
        chosen = [1 + 4 * N * k * k // (5 * last * last) for k in range(steps)]
    return chosen if kind == "quad_ddim_host" else _push_repeats_up(chosen)


def resolve_trajectory(
    schedule: NoiseSchedule,
    steps: int | None,
    trajectory: str | Sequence[int],
    gamma: ArrayLike | None = None,
    *,
    repeats: bool = False,
) -> list[int]:
    """The steps of a kind of ``choose_timesteps``, or the user's own list, checked.

    Args:
        repeats: whether a step may be visited again and again.

    Raises:
        ValueError: as ``choose_timesteps``; a list that does not rise strictly inside 1..N, but for
            ``repeats``, or whose length is not ``steps`` (None allows any length).
    """
    N = schedule.N
    if isinstance(trajectory, str):
        if steps is None:
            raise ValueError(f"steps must be a whole number in 1..{N}, got None")
        visited = choose_timesteps(N, steps, trajectory, gamma=gamma, betas=schedule.betas)
        if not repeats:
            check_rises(visited, trajectory)
        return visited
    chosen = np.asarray(trajectory)
    if chosen.ndim != 1 or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"trajectory must be one of {TRAJECTORIES} or a list of whole numbers, "
            f"got {trajectory!r}"
        )
    if chosen[0] < 1 or chosen[-1] > N or np.any(np.diff(chosen) < (0 if repeats else 1)):
        rise = "not fall" if repeats else "rise strictly"
        raise ValueError(f"trajectory must {rise} inside 1..{N}, got {trajectory!r}")
    if steps is not None and steps != len(chosen):
        raise ValueError(f"trajectory has {len(chosen)} entries, but steps = {steps!r}")
    return [int(n) for n in chosen]


def check_rises(timesteps: Sequence[int], trajectory: object) -> None:
    """ValueError if a trajectory visits a step twice."""
    if len(set(timesteps)) < len(timesteps):
        raise ValueError(f"trajectory must not repeat steps here, got {trajectory!r}")


def least_cost_path(cost: NDArray[np.float64], first: int, last: int, nodes: int) -> list[int]:
    """The cheapest increasing path of ``nodes`` nodes from ``first`` to ``last``.

    Args:
        cost: [M, M] with M > last; entry [s, t] is the cost of the edge s -> t. Only
            first <= s < t <= last is read. Of equal paths, the path with the smaller nodes wins.
        nodes: from 2 to last - first + 1.

    Node k needs room for the k nodes before it and for the nodes after it. It therefore has
    W = last - first + 2 - nodes places, and each layer is one [W, W] minimum.
    """
    width = last - first + 2 - nodes
    into = np.ascontiguousarray(cost[first : last + 1, first : last + 1].T)  # [t, s]
    into[np.triu_indices_from(into)] = np.inf  # s >= t is no step
    best = np.full(width, np.inf)  # over the places of the previous node
    best[0] = 0.0
    predecessor = np.empty((nodes, width), dtype=np.int64)
    for k in range(1, nodes):
        total = into[k : k + width, k - 1 : k - 1 + width] + best
        choice = total.argmin(axis=1)
        predecessor[k] = choice
        best = total[np.arange(width), choice]
    place, path = width - 1, []
    for k in range(nodes - 1, -1, -1):
        path.append(first + k + int(place))
        place = predecessor[k, place]
    return path[::-1]


def _dp_seg(N: int, steps: int, gamma: ArrayLike, betas: ArrayLike) -> list[int]:
    """The path over F[s, t]; if gamma exceeds 1, the end of the range gets evenly spaced steps.

    F has no value where gamma exceeds 1. Let g be the first such step. The last
    bad = 2 (N - g + 1) steps, twice the length from g on, get evenly spaced steps, one in five
    fewer than their share. The path covers 1..N - bad. N is always visited.
    """
    values = check_gamma(gamma, N)
    schedule = NoiseSchedule.from_betas(_check_betas(betas, N))
    above = np.flatnonzero(values[1:] > 1) + 1
    if above.size == 0:
        return _path_to_end(_dp_seg_cost(schedule, values), 1, N, steps)
    g = int(above[0])
    bad = 2 * (N - g + 1)
    good = N - bad
    if good < 1:
        raise ValueError(
            f"trajectory dp_seg needs gamma <= 1 on the first half of the steps at least; "
            f"got gamma[{g}] = {values[g]} with N = {N}"
        )
    if steps == 1:
        return [N]
    # ceil((1 - 0.8 bad / N) steps) in whole numbers; the evenly spaced part keeps at least N.
    share = -((4 * bad - 5 * N) * steps // (5 * N))
    to_good = min(share, steps - 1, good)
    path = _path_to_end(_dp_seg_cost(schedule, values), 1, good, to_good) if to_good > 1 else [1]
    rest = steps - to_good
    return path + [round(good + i * bad / rest) for i in range(1, rest + 1)]


def _dp_seg_cost(schedule: NoiseSchedule, gamma: NDArray[np.float64]) -> NDArray[np.float64]:
    """F[s, t] = log(1 - skip_beta(s, t) gamma_t / cum_beta_t), [N+1, N+1]; s = 0 is not used.

    As cum_beta_t = skip_beta + skip_alpha cum_beta_s, the argument is a sum of positive parts. It
    keeps its digits even if skip_beta and cum_beta_t round to the same number.
    """
    t = np.arange(schedule.N + 1)[None, :]
    s = np.minimum(np.arange(schedule.N + 1)[:, None], t)
    kept = schedule.skip_alpha(s, t) * schedule.cum_betas[s]
    lost = schedule.skip_beta(s, t) * np.maximum(1 - gamma, 0)
    used = (s >= 1) & (s < t)
    ratio = np.divide(kept + lost, schedule.cum_betas[t], out=np.ones_like(kept), where=used)
    return np.log(ratio)


def _path_to_end(cost: NDArray[np.float64], first: int, last: int, nodes: int) -> list[int]:
    return [last] if nodes == 1 else least_cost_path(cost, first, last, nodes)


def _push_repeats_up(timesteps: list[int]) -> list[int]:
    """Make the list strictly increasing; the rules are convex in k, so the last stays within N."""
    pushed = timesteps[:1]
    for t in timesteps[1:]:
        pushed.append(max(t, pushed[-1] + 1))
    return pushed


def _required(name: str, table: ArrayLike | None, kind: str) -> ArrayLike:
    if table is None:
        raise ValueError(f"trajectory {kind!r} needs {name}, got None")
    return table


def _check_betas(betas: ArrayLike, N: int) -> NDArray[np.float64]:
    values = real_array("betas", betas)
    if values.shape == (N + 1,) and values[0] == 0:
        values = values[1:]
    if values.shape != (N,):
        raise ValueError(
            f"betas must hold betas[1..N], N = {N} entries (or N + 1 with a leading 0), "
            f"got shape {values.shape}"
        )
    return values


def _check_terms(terms: ArrayLike, N: int) -> NDArray[np.float64]:
    cost = real_array("terms", terms)
    if cost.shape != (N + 1, N + 1):
        raise ValueError(f"terms must have shape {(N + 1, N + 1)}, got {cost.shape}")
    s, t = np.nonzero(~np.isfinite(np.triu(cost[1:, 1:], k=1)))
    if s.size:
        raise ValueError(f"terms must be finite for 1 <= s < t, got terms[{s[0] + 1}, {t[0] + 1}]")
    return cost
