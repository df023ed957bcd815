r"""What a linear network's chain ends with: the variance along each direction, in closed form.

A reverse step of a linear network is a linear map plus noise. With y_t = x_t - sqrt(cum_alpha_t) mu
it is y_s = F_t y_t + sigma_t z, so that::

    Var[y_s] = F_t^2 Var[y_t] + sigma_t^2,   x_T ~ N(0, 1) at the first step, sigma = 0 at the last.

The network is one number a step and direction, its gain; see ``sa_plugin.effect.gains``. The steps'
numbers are those of ``sa_plugin.sampling.reverse``. Derived in docs/why_sa_works.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from sa_plugin._checks import check_choice, real_array
from sa_plugin.effect.gains import check_gains, check_variances, exact_gains, inflated_gains
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments
from sa_plugin.sampling.trajectory import resolve_trajectory
from sa_plugin.sampling.variance import check_variance
from sa_plugin.schedule import FloatArray, NoiseSchedule

CLOSED = ("small", "big", "analytic", "npr", "sn")
RESTS_ON = ("own", "exact")

_FAR = 75.0  # a normal variable's square exceeds this many variances with probability 5e-18
_ROUNDING = 1e-12  # exact gains found in two ways differ by less
_STRENGTHS = np.concatenate([[0.0], np.geomspace(1e-2, 1e4, 49)])


def chain_variances(
    schedule: NoiseSchedule,
    gains: ArrayLike,
    timesteps: Sequence[int],
    *,
    forward: str = "ddpm",
    eta: float = 0.0,
    variance: str = "small",
    variances: ArrayLike | None = None,
    cov_gains: ArrayLike | None = None,
    avg_cov: bool = False,
) -> FloatArray:
    """The variance [D] of what ``Sampler`` draws with a linear network, along each direction.

    The sampler is one without clipping, ``Sampler(..., clip_x0=False)``. The optimal variances are
    those of fully trained outputs for this network, g its gain, c* the exact one and y as above:

    - "analytic": Gamma_n is the mean over the directions of g^2 (a s + b);
    - "npr": the second output is E[(eps - g y)^2 | x_n] = a s / (a s + b) + (c* - g)^2 y^2;
    - "sn": it is E[eps^2 | x_n] = a s / (a s + b) + c*^2 y^2, from which g^2 y^2 is taken.

    npr and sn give each value of an image its own variance. The result then holds for directions
    that are the values themselves, or with ``avg_cov``. All else holds for any directions.

    With a noise that depends on y the images are no Gaussian, but their variance is still exact
    where mu = 0. Their mean is mu (1 - sqrt(cum_alpha_T) F), T the first step visited and F the
    product of all factors F_t: mu, but for what x_T ~ N(0, 1) lacks of the forward process's mean.

    Args:
        gains: [N+1, D], row 0 unused.
        timesteps: the trajectory, ascending steps in 1..N.
        forward, eta, variance, avg_cov: as for ``Sampler``; variance "small", "big" (these two
            need no variances), "analytic", "npr" or "sn".
        variances: of the data, s > 0 along each direction, [D], in squared units of x_0.
        cov_gains: [N+1, D], the network whose eps_pred the optimal variances rest on; by default
            ``gains``. ``exact_gains`` gives the true covariances: a network that is corrected for
            the mean alone.

    Returns:
        float64 [D], squared units of x_0.

    Raises:
        ValueError: an unknown or impossible option; "iddpm" and "heuristic", which have no closed
            form here; arrays of a wrong shape or not finite; steps outside 1..N; with "sn", gains
            so far above the exact ones that the sampler's bound of a covariance at 0 would act.
    """
    check_variance(variance, forward, eta)
    check_choice("variance", variance, CLOSED)
    g = check_gains(gains, schedule.N)
    visited = resolve_trajectory(schedule, None, timesteps)
    own, exact, ratio, gamma = g, None, None, None
    if variance not in ("small", "big"):
        s = _check_data(variances, variance, g)
        own = g if cov_gains is None else _check_like(cov_gains, g)
        exact, ratio = exact_gains(schedule, s), _posterior_ratio(schedule, s)
        gamma = np.mean(own**2 * _marginal(schedule, s), axis=1)
    table = ReverseCoefficients.build(
        schedule, visited, forward=forward, eta=eta, gamma=gamma if variance == "analytic" else None
    )
    V = np.ones((1, g.shape[1]))
    for t, column in zip(visited[::-1], table.stack().T.tolist(), strict=True):
        c = ReverseCoefficients.unstack(column)
        # Moments are homogeneous in y. Its root mean square in its place gives their mean squares.
        y = np.sqrt(V)
        V = reverse_moments(c, y, g[t] * y, variance="small", clip_x0=False).mean ** 2
        if t == visited[0]:  # the last step has no noise
            break
        second = None
        if exact is not None and ratio is not None:
            second = _second(variance, t, own[t] * y, exact[t] * y, ratio[t])
        noise = reverse_moments(
            c, y, own[t] * y, second, variance=variance, clip_x0=False, avg_cov=avg_cov
        )
        V = V + noise.variance
    return np.array(V[0])


def predicted_frechet(sample_variances: ArrayLike, variances: ArrayLike) -> float:
    """sum (sqrt(v) - sqrt(s))^2 over the directions, in squared units of x_0.

    The Fréchet distance of two Gaussians with one mean whose covariances have these directions;
    ``sa_plugin.metrics.frechet_distance`` is the general one.

    Args:
        sample_variances: v >= 0, [D].
        variances: s > 0, [D].

    Raises:
        ValueError: arrays of different shapes, or values that are negative or not finite.
    """
    s = check_variances(variances)
    v = real_array("sample_variances", sample_variances)
    if v.shape != s.shape:
        raise ValueError(f"sample_variances must have shape {s.shape}, got {v.shape}")
    if not (np.isfinite(v) & (v >= 0)).all():
        raise ValueError("sample_variances must be finite and >= 0")
    return float(np.sum((np.sqrt(v) - np.sqrt(s)) ** 2))


def best_strength(
    schedule: NoiseSchedule,
    variances: ArrayLike,
    *,
    steps: int | None = None,
    forward: str = "ddpm",
    eta: float = 0.0,
    variance: str = "small",
    trajectory: str | Sequence[int] = "linear",
    rests_on: str = "own",
    avg_cov: bool = False,
) -> float:
    """The q in 0..1e4 of ``inflated_gains`` whose chain has the least ``predicted_frechet``.

    Found among 50 values, then by golden section between the neighbours of the best: to 1e-3, above
    q = 1 to 1e-3 of it. Few steps lose variance and want a large q; many want none.

    Args:
        variances: s > 0 along each direction, [D], in squared units of x_0.
        steps, trajectory: as for ``Sampler``. "dp_seg" goes by Gamma of the exact network.
        forward, eta, variance, avg_cov: as for ``chain_variances``.
        rests_on: what the optimal variances rest on: the inflated network's "own" eps_pred, or the
            "exact" network's.

    Raises:
        ValueError: as ``chain_variances`` and ``choose_timesteps``.
    """
    check_choice("rests_on", rests_on, RESTS_ON)
    s = check_variances(variances)
    exact = exact_gains(schedule, s)
    gamma = np.mean(exact**2 * _marginal(schedule, s), axis=1)
    visited = resolve_trajectory(schedule, steps, trajectory, gamma)

    def distance(q: float) -> float:
        ends = chain_variances(
            schedule,
            inflated_gains(schedule, s, q),
            visited,
            forward=forward,
            eta=eta,
            variance=variance,
            variances=s,
            cov_gains=None if rests_on == "own" else exact,
            avg_cov=avg_cov,
        )
        return predicted_frechet(ends, s)

    found = [distance(float(q)) for q in _STRENGTHS]
    best = int(np.argmin(found))
    low, high = _STRENGTHS[max(best - 1, 0)], _STRENGTHS[min(best + 1, len(_STRENGTHS) - 1)]
    q = _golden_section(distance, float(low), float(high), tolerance=1e-3)
    return q if distance(q) < found[best] else float(_STRENGTHS[best])


def _golden_section(
    f: Callable[[float], float], low: float, high: float, tolerance: float
) -> float:
    """Where f is least inside low..high, if it falls and then rises there."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    f_left, f_right = f(left), f(right)
    while high - low > tolerance * max(1.0, low):
        if f_left <= f_right:
            high, right, f_right = right, left, f_left
            left = high - share * (high - low)
            f_left = f(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + share * (high - low)
            f_right = f(right)
    return (low + high) / 2


def _marginal(schedule: NoiseSchedule, s: FloatArray) -> FloatArray:
    """Var[x_n] = a s + b, [N+1, D]."""
    return schedule.cum_alphas[:, None] * s + schedule.cum_betas[:, None]


def _posterior_ratio(schedule: NoiseSchedule, s: FloatArray) -> FloatArray:
    """Var[eps | x_n] = a s / (a s + b), [N+1, D]; Cov[x_0 | x_n] is b / a times it."""
    return schedule.cum_alphas[:, None] * s / _marginal(schedule, s)


def _second(
    variance: str, t: int, eps: FloatArray, exact: FloatArray, ratio: FloatArray
) -> FloatArray | None:
    """The second output's mean, [1, D], from the root mean squares of eps_pred and the exact eps.

    Both are a gain times one y, so that the mean of a product is the product of these.
    """
    if variance == "npr":
        return ratio + (exact - eps) ** 2
    if variance != "sn":
        return None
    # Where eps_pred outgrows the exact one, a covariance falls below 0 at a large y.
    excess = eps**2 - (1 + _ROUNDING) * exact**2
    if (_FAR * excess > ratio).any():
        raise ValueError(
            f"variance 'sn' has no closed form for gains above the exact ones, found at step {t}: "
            "the sampler bounds negative covariances at 0"
        )
    return ratio + exact**2


def _check_data(variances: ArrayLike | None, variance: str, gains: FloatArray) -> FloatArray:
    if variances is None:
        raise ValueError(f"variance {variance!r} needs variances, those of the data, got None")
    s = check_variances(variances)
    if len(s) != gains.shape[1]:
        raise ValueError(f"variances must have the gains' {gains.shape[1]} entries, got {len(s)}")
    return s


def _check_like(cov_gains: ArrayLike, gains: FloatArray) -> FloatArray:
    values = check_gains(cov_gains, len(gains) - 1, "cov_gains")
    if values.shape != gains.shape:
        raise ValueError(f"cov_gains must have shape {gains.shape}, got {values.shape}")
    return values
