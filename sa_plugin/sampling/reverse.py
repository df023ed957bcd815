"""One reverse process in numbers: its coefficients along a trajectory, and a step from them.

DDPM and DDIM differ only in numbers, and a reverse variance is a function of the network's output.
The sampler, the likelihood and any scheduler therefore share this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sa_plugin._arrays import Numeric, added, bound, namespace
from sa_plugin._checks import check_output
from sa_plugin.prediction import to_eps, to_x0
from sa_plugin.sampling.variance import (
    NEEDS_SECOND,
    covariance,
    covariance_weight_ddim,
    covariance_weight_ddpm,
    forward_variance,
    iddpm_variance,
    optimal_variance,
    pixel_variance_limit,
)
from sa_plugin.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class ReverseCoefficients:
    """The numbers of a reverse process; entry k belongs to its k-th step, from t_k to s_k < t_k.

    mean = x0_weight x_0 + x_weight x_t + eps_weight eps;
    variance = small + cov_weight Cov[x_0 | x_t], or small, or big; never above limit.

    ``build`` makes each attribute a float64 array [K]; ``unstack`` takes values of any kind. The
    term of a weight that is the plain number 0 is not computed. A limit that is the plain number
    infinity is not compared.

    Attributes:
        a, b: sqrt(cum_alpha_t), sqrt(cum_beta_t).
        gamma: Gamma_t; NaN if none was given.
        limit: the largest variance that the noise clip allows; infinite at unclipped steps.
    """

    a: Any
    b: Any
    x0_weight: Any
    x_weight: Any
    eps_weight: Any
    small: Any
    big: Any
    cov_weight: Any
    gamma: Any
    limit: Any

    @classmethod
    def build(
        cls,
        schedule: NoiseSchedule,
        timesteps: Sequence[int],
        *,
        forward: str = "ddpm",
        eta: float = 0.0,
        gamma: NDArray[np.float64] | None = None,
        clip_sigma_idx: int = 0,
        clip_pixel: float = 2,
    ) -> ReverseCoefficients:
        """For ascending steps; arXiv 2006.11239, eq. 7 (DDPM) and 2010.02502, eq. 12 (DDIM)."""
        visited = np.array([0, *timesteps])
        return cls.between(
            schedule,
            visited[-2::-1],
            visited[:0:-1],
            forward=forward,
            eta=eta,
            gamma=gamma,
            clip_until=int(visited[clip_sigma_idx]),
            clip_pixel=clip_pixel,
        )

    @classmethod
    def between(
        cls,
        schedule: NoiseSchedule,
        s: NDArray[np.int64],
        t: NDArray[np.int64],
        *,
        forward: str = "ddpm",
        eta: float = 0.0,
        gamma: NDArray[np.float64] | None = None,
        clip_until: int = 0,
        clip_pixel: float = 2,
    ) -> ReverseCoefficients:
        """The same for any pairs s < t, [K] each; the noise clip acts where s <= clip_until."""
        alpha_t, alpha_s = schedule.cum_alphas[t], schedule.cum_alphas[s]
        beta_t, beta_s = schedule.cum_betas[t], schedule.cum_betas[s]
        skip_beta = schedule.skip_beta(s, t)
        small = forward_variance(schedule.tilde_beta(s, t), forward, eta)
        if forward == "ddpm":
            x0_weight = skip_beta * np.sqrt(alpha_s) / beta_t
            x_weight = np.sqrt(schedule.skip_alpha(s, t)) * beta_s / beta_t
            eps_weight = np.zeros_like(beta_t)
            cov_weight = covariance_weight_ddpm(alpha_s, beta_t, skip_beta)
        else:
            x0_weight = np.sqrt(alpha_s)
            x_weight = np.zeros_like(beta_t)
            eps_weight = np.sqrt(np.maximum(beta_s - small, 0))
            cov_weight = covariance_weight_ddim(alpha_s, alpha_t, beta_s, beta_t, small)
        return cls(
            a=np.sqrt(alpha_t),
            b=np.sqrt(beta_t),
            x0_weight=x0_weight,
            x_weight=x_weight,
            eps_weight=eps_weight,
            small=small,
            big=skip_beta,
            cov_weight=cov_weight,
            gamma=np.full(len(t), np.nan) if gamma is None else gamma[t],
            limit=np.where(s <= clip_until, pixel_variance_limit(clip_pixel), np.inf),
        )

    def stack(self) -> NDArray[np.float64]:
        """All tables as one array [10, K], to be moved in one transfer."""
        return np.stack([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def unstack(cls, rows: Sequence[Any]) -> ReverseCoefficients:
        """From values in ``stack``'s order: all tables, or one step's column."""
        return cls(*rows)

    def mean(self, x0: Any, x: Any, eps: Any) -> Any:
        """The mean of q(x_s | x_t, x_0); with the predicted x_0 and eps, that of p(x_s | x_t)."""
        mean = self.x0_weight * x0
        for weight, value in ((self.x_weight, x), (self.eps_weight, eps)):
            if not (isinstance(weight, float) and weight == 0):
                mean = added(mean, weight * value)
        return mean


@dataclass(frozen=True, eq=False)
class ReverseMoments:
    """Mean and variance of p(x_s | x_t), the predicted x_0 and eps; all broadcast to x's shape."""

    mean: Numeric
    variance: Numeric
    x0: Numeric
    eps: Numeric


def reverse_moments(
    c: ReverseCoefficients,
    x: Numeric,
    output: Numeric,
    second: Numeric | None = None,
    *,
    variance: str,
    predicts: str = "eps",
    clip_x0: float = True,
    avg_cov: bool = False,
) -> ReverseMoments:
    """Mean and variance of one reverse step: a pure function, options as in ``Sampler``.

    Args:
        c: the coefficients of this step, each a number or an array that broadcasts over x.
        x: x_t, [B, ...], of any array library.
        output, second: the network's outputs, in x's shape.

    With ``clip_x0`` the predicted x_0 is cut to [-1, 1] and its covariance to [0, 1]; a number r
    cuts them to [-r, r] and [0, r^2]. This does not change the predicted noise: DDIM's direction
    term keeps the network's own eps.
    """
    eps = to_eps(output, x, c.a, c.b, predicts)
    x0 = to_x0(output, x, c.a, c.b, predicts)
    if clip_x0:
        x0 = bound(x0, -float(clip_x0), float(clip_x0))
    return moments_of(c, x, x0, eps, second, variance=variance, clip_x0=clip_x0, avg_cov=avg_cov)


def moments_of(
    c: ReverseCoefficients,
    x: Numeric,
    x0: Numeric,
    eps: Numeric,
    second: Numeric | None,
    *,
    variance: str,
    clip_x0: float,
    avg_cov: bool,
) -> ReverseMoments:
    """The same from the predicted x_0, as clipped by the caller, and eps."""
    mean = c.mean(x0, x, eps)
    if variance in ("small", "big"):
        sigma2 = c.small if variance == "small" else c.big
    elif variance == "iddpm":
        sigma2 = iddpm_variance(second, c.small, c.big)
    else:
        known = {"eps": eps, "second": second, "gamma": c.gamma}
        cov = covariance(variance, c.a**2, c.b**2, **known, average=avg_cov, clip=clip_x0)
        sigma2 = optimal_variance(cov, c.small, c.cov_weight)
    return ReverseMoments(mean, _at_most(sigma2, c.limit, x), x0, eps)


def _at_most(sigma2: Numeric, limit: Numeric, x: Numeric) -> Numeric:
    """The smaller of the two, in x's library; a limit of plain infinity costs nothing."""
    for value, number in ((sigma2, limit), (limit, sigma2)):
        if isinstance(number, float):
            return value if number == math.inf else bound(value, -math.inf, number)
    return namespace(sigma2, limit, x).minimum(sigma2, limit)


def split_output(output: Any, x: Tensor, variance: str) -> tuple[Tensor, Tensor | None]:
    """A network's output at x as (first, second) in x's dtype; an unused second is None.

    Raises:
        ValueError: not a pair although ``variance`` needs one, a shape other than x's, or complex
            numbers.
    """
    is_pair = isinstance(output, tuple | list) and len(output) == 2
    needs_pair = variance in NEEDS_SECOND
    if needs_pair and not is_pair:
        raise ValueError(
            f"variance {variance!r} needs a network that returns the pair (eps, second), "
            f"got {type(output).__name__}"
        )
    first, second = output if is_pair else (output, None)
    second = second if needs_pair else None
    for part in (first, second) if needs_pair else (first,):
        check_output(part, x)
    return _like(x, first), None if second is None else _like(x, second)


def _like(x: Tensor, output: Tensor) -> Tensor:
    # Comparing dtypes is cheaper than a conversion that changes nothing.
    return output if output.dtype == x.dtype else output.to(x.dtype)
