r"""Discrete noise schedules: float64 tables over the steps n = 1..N. No network, no device.

Notation of the whole package (symbols of arXiv 2006.11239 and 2201.06503)::

    n, t in 1..N; s < t          steps; entry 0 of every table is of the clean image
    betas[n]                     variance added at step n, betas[0] = 0
    alphas[n] = 1 - betas[n]
    cum_alphas[n] = prod_{i<=n} alphas[i],   cum_betas[n] = 1 - cum_alphas[n]
    skip_alpha(s, t) = prod_{s<i<=t} alphas[i],   skip_beta(s, t) = 1 - skip_alpha(s, t)
    tilde_beta(s, t) = skip_beta(s, t) cum_betas[s] / cum_betas[t]
    x_n = sqrt(cum_alphas[n]) x_0 + sqrt(cum_betas[n]) eps_n

Differences from one (cum_betas, skip_beta) are computed by log1p and expm1. As ``1 - product`` they
would lose up to four digits at the first steps, where they are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sa_plugin._checks import real_array

FloatArray = NDArray[np.float64]

# The least beta that float32, most networks' type, can hold. The least cum_alpha whose square
# float64 can hold: formulas divide by it.
_LEAST_BETA = float(np.finfo(np.float32).tiny)
_LEAST_CUM_ALPHA = float(np.finfo(np.float64).tiny) ** 0.5


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process x_0 -> x_1 -> ... -> x_N as float64 tables.

    Made by ``linear``, ``cosine``, ``vpsde``, ``from_betas``, ``from_alphas_cumprod`` or
    ``from_sigmas``.

    Attributes:
        betas, alphas, cum_alphas, cum_betas: arrays [N+1]; entry n is of step n, entry 0 of x_0.
    """

    betas: FloatArray
    alphas: FloatArray = field(init=False, repr=False)
    cum_alphas: FloatArray = field(init=False, repr=False)
    cum_betas: FloatArray = field(init=False, repr=False)
    _log_cum_alphas: FloatArray = field(init=False, repr=False)
    N: int = field(init=False)

    def __post_init__(self) -> None:
        betas = real_array("betas", self.betas)
        _check_betas(betas)
        log_cum_alphas = np.cumsum(np.log1p(-betas))
        tables = {
            "betas": betas,
            "alphas": 1 - betas,
            "cum_alphas": np.cumprod(1 - betas),
            "cum_betas": -np.expm1(log_cum_alphas),
            "_log_cum_alphas": log_cum_alphas,
        }
        _check_range("betas", betas, _LEAST_BETA)
        _check_range("cum_alphas", tables["cum_alphas"], _LEAST_CUM_ALPHA)
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)
        object.__setattr__(self, "N", len(betas) - 1)

    @classmethod
    def linear(cls, N: int = 1000) -> NoiseSchedule:
        """Betas linear from 0.1/N to 20/N (arXiv 2006.11239: 1e-4 to 0.02 at N = 1000)."""
        _check_steps(N)
        return cls.from_betas(np.linspace(0.1 / N, 20 / N, N))

    @classmethod
    def cosine(cls, N: int = 1000) -> NoiseSchedule:
        """Cosine schedule of arXiv 2102.09672, eq. 17, betas capped at 0.999."""
        _check_steps(N)
        u = np.arange(N + 1) / N
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], 0.999))

    @classmethod
    def vpsde(cls, N: int = 1000) -> NoiseSchedule:
        """The VP SDE with beta(u) = 0.1 + 19.9 u (arXiv 2011.13456) at N points."""
        _check_steps(N)
        u = np.arange(N + 1) / N
        integral = 0.1 * u + 19.9 / 2 * u**2
        return cls.from_betas(-np.expm1(-np.diff(integral)))

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """From betas[1..N] (length N, without a leading zero), each inside (0, 1)."""
        values = _as_vector("betas", betas)
        return cls(np.concatenate([[0.0], values]))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike) -> NoiseSchedule:
        """From cum_alphas[1..N] (length N), as diffusers and DDIM store them."""
        values = _as_vector("alphas_cumprod", alphas_cumprod)
        if not (np.all(values > 0) and np.all(values < 1) and np.all(np.diff(values) < 0)):
            raise ValueError("alphas_cumprod must fall strictly and lie inside (0, 1)")
        ratios = values / np.concatenate([[1.0], values[:-1]])
        return cls.from_betas(1 - ratios)

    @classmethod
    def from_sigmas(cls, sigmas: ArrayLike) -> NoiseSchedule:
        """The variance-preserving equivalent of x_0 + sigmas[n] eps, n = 1..N (length N).

        For codes in the style of arXiv 2206.00364 (EDM). cum_alphas[n] = 1 / (1 + sigmas[n]^2), so
        x_n / sqrt(cum_alphas[n]) is their noisy image. Use it with ``wrappers.SigmaModel``.
        """
        values = _as_vector("sigmas", sigmas)
        ends = np.concatenate([[0.0], values])
        if not (np.isfinite(values).all() and (np.diff(ends) > 0).all()):
            raise ValueError("sigmas must be finite, > 0 and rise strictly")
        return cls.from_betas(np.diff(ends**2) / (1 + values**2))

    def skip_alpha(self, s: ArrayLike, t: ArrayLike) -> FloatArray:
        """prod_{s<i<=t} alphas[i], for 0 <= s <= t <= N; broadcasts."""
        return np.exp(self._log_skip_alpha(s, t))

    def skip_beta(self, s: ArrayLike, t: ArrayLike) -> FloatArray:
        """1 - skip_alpha(s, t): the variance that the steps s+1..t add to x_s; broadcasts."""
        return -np.expm1(self._log_skip_alpha(s, t))

    def tilde_beta(self, s: ArrayLike, t: ArrayLike) -> FloatArray:
        """Variance of q(x_s | x_t, x_0), for 0 <= s <= t, t >= 1; broadcasts."""
        return self.skip_beta(s, t) * self.cum_betas[np.asarray(s)] / self.cum_betas[np.asarray(t)]

    def check_same(self, betas: ArrayLike) -> None:
        """ValueError, naming the first beta that differs, unless betas [N+1] are this schedule's.

        They may differ by what float32 loses: 1e-6 of themselves.
        """
        theirs = real_array("betas", betas)
        if theirs.shape != self.betas.shape:
            raise ValueError(f"the schedule has N = {self.N}, the host's N = {len(theirs) - 1}")
        differs = ~np.isclose(theirs, self.betas, rtol=1e-6, atol=0)
        if differs.any():
            n = int(np.argmax(differs))
            raise ValueError(
                f"the schedule has beta = {self.betas[n]:.9g} at step n = {n}, the host's "
                f"{theirs[n]:.9g}; NoiseSchedule.from_betas(host's betas[1:]) builds the host's"
            )

    def _log_skip_alpha(self, s: ArrayLike, t: ArrayLike) -> FloatArray:
        s_index, t_index = np.asarray(s), np.asarray(t)
        _check_step_pair(s_index, t_index, self.N)
        return self._log_cum_alphas[t_index] - self._log_cum_alphas[s_index]


def _as_vector(name: str, values: ArrayLike | Sequence[float]) -> FloatArray:
    vector = real_array(name, values)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be one-dimensional and not empty, got shape {vector.shape}")
    return vector


def _check_steps(N: int) -> None:
    if not isinstance(N, int | np.integer) or isinstance(N, bool) or N < 1:
        raise ValueError(f"N must be a whole number >= 1, got {N!r}")


def _check_betas(betas: FloatArray) -> None:
    if betas.ndim != 1 or betas.size < 2 or betas[0] != 0:
        raise ValueError(
            f"betas must be [N+1] with betas[0] = 0, got shape {betas.shape} that begins with "
            f"{betas.ravel()[:1]}; for the betas of steps 1..N use from_betas"
        )
    inside = (betas[1:] > 0) & (betas[1:] < 1)
    if not inside.all():  # NaN lands here too
        n = int(np.argmin(inside)) + 1
        raise ValueError(f"betas must lie inside (0, 1), got {betas[n]} at step n = {n}")


def _check_range(name: str, table: FloatArray, least: float) -> None:
    """ValueError for an entry below ``least``: variances and tau divide by these entries."""
    small = table[1:] < least
    if small.any():
        n = int(np.argmax(small)) + 1
        raise ValueError(f"{name} must be at least {least:.1e}, got {table[n]:g} at step n = {n}")


def _check_step_pair(s: NDArray[Any], t: NDArray[Any], N: int) -> None:
    if not (np.issubdtype(s.dtype, np.integer) and np.issubdtype(t.dtype, np.integer)):
        raise ValueError(f"steps must be integers, got {s.dtype} and {t.dtype}")
    if np.any(s < 0) or np.any(s > t) or np.any(t > N):
        raise ValueError(f"steps must satisfy 0 <= s <= t <= {N}, got s = {s}, t = {t}")
