r"""Theorem 1's weights tau_i of the sequence-aware loss, and their practical forms.

Source: "On Inference Stability for Diffusion Models" (AAAI 2024, arXiv 2312.12431), Theorem 1:
along one sampling chain the total gap is d(x_0) = sum_{i=2}^N tau_i e_i, e_i = f(x_i, i) - eps_i.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from sa_plugin._arrays import Numeric
from sa_plugin._checks import real_array
from sa_plugin.schedule import FloatArray, NoiseSchedule

WEIGHTINGS = ("uniform", "theorem1", "relative")


@dataclass(frozen=True, eq=False)
class TauTable:
    """One weight a step.

    Args:
        schedule: the forward process.
        weighting:
            ``"theorem1"``: the exact tau_i, zero outside 2..N. Their mean square is 8.487e-8 for
            the linear schedule with N = 1000: at lambda near 1 the SA term is numerically absent.
            It is the default here, with a warning: the default of ``SALoss`` is ``"uniform"``.
            ``"uniform"``: 1 at every step 1..N, as in the published code.
            ``"relative"``: ``values`` are theorem1's; a loss divides them by the largest of each
            window, which keeps the ratios between neighbours at the scale of ``"uniform"``.
            An array [N+1]: taken as it is; entry 0 does not matter and is set to zero.

    Attributes:
        values: float64 [N+1]; entry 0 is zero.
        relative: whether a loss must divide by the window's largest weight.

    Raises:
        ValueError: unknown name, or an array that is not [N+1] finite numbers.
    """

    schedule: NoiseSchedule
    weighting: str | ArrayLike | None = None
    values: FloatArray = field(init=False, repr=False)
    relative: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weighting is None:
            warnings.warn(
                "TauTable(schedule) is Theorem 1's table, SALoss(schedule) weighs every step by 1; "
                'name the weighting: TauTable(schedule, "theorem1")',
                stacklevel=3,
            )
            object.__setattr__(self, "weighting", "theorem1")
        values = self._values()
        values.flags.writeable = False
        object.__setattr__(self, "values", values)
        is_relative = isinstance(self.weighting, str) and self.weighting == "relative"
        object.__setattr__(self, "relative", is_relative)

    def _values(self) -> FloatArray:
        if self.weighting is not None and not isinstance(self.weighting, str):
            return _custom(self.weighting, self.schedule.N)
        if self.weighting in ("theorem1", "relative"):
            return closed_form(self.schedule)
        if self.weighting == "uniform":
            return np.concatenate([[0.0], np.ones(self.schedule.N)])
        raise ValueError(
            f"weighting must be one of {WEIGHTINGS} or an array [N+1], got {self.weighting!r}"
        )


def closed_form(schedule: NoiseSchedule) -> FloatArray:
    """Theorem 1's tau [N+1] in O(N); zero for i < 2.

    With a = cum_alphas, tau_i is sqrt(a_{i-1}) (1 - a_1) / (sqrt(alpha_1) (1 - a_{i-1})) times
    gamma_{1,i} sqrt(1 - a_i) / sqrt(a_i).
    """
    cum_alphas, cum_betas = schedule.cum_alphas, schedule.cum_betas
    before, at = slice(1, -1), slice(2, None)  # i-1 and i, for i = 2..N
    tau = np.zeros(schedule.N + 1)
    tau[at] = theorem1_weight(
        schedule.betas[1],
        schedule.betas[at],
        cum_alphas[before],
        cum_betas[before],
        cum_alphas[at],
        cum_betas[at],
    )
    return tau


def theorem1_weight(
    beta_1: Numeric,
    beta: Numeric,
    cum_alpha_before: Numeric,
    cum_beta_before: Numeric,
    cum_alpha: Numeric,
    cum_beta: Numeric,
) -> Numeric:
    """tau_i elementwise, i >= 2, for arrays of any library: ``before`` is step i-1, the rest i."""
    gamma = cum_alpha_before**0.5 * beta / cum_beta
    carried = cum_alpha_before**0.5 * beta_1 / ((1 - beta_1) ** 0.5 * cum_beta_before)
    return carried * gamma * (cum_beta / cum_alpha) ** 0.5


def product_form(schedule: NoiseSchedule) -> FloatArray:
    """The same weights as the proof has them: prod_{j=2}^{i-1} gamma_{2,j} times the last factor.

    Kept as a check of ``closed_form``: the product telescopes.
    """
    tau = np.zeros(schedule.N + 1)
    carried = np.concatenate([[1.0], np.cumprod(gamma_2(schedule)[2:-1])])[: max(schedule.N - 1, 0)]
    last = gamma_1(schedule)[2:] * np.sqrt(schedule.cum_betas[2:] / schedule.cum_alphas[2:])
    tau[2:] = carried * last
    return tau


def gamma_1(schedule: NoiseSchedule) -> FloatArray:
    """gamma_{1,i} [N+1]: the factor of the predicted x_0 in the mean of q(x_{i-1} | x_i, x_0)."""
    gamma = np.zeros(schedule.N + 1)
    gamma[1:] = np.sqrt(schedule.cum_alphas[:-1]) * schedule.betas[1:] / schedule.cum_betas[1:]
    return gamma


def gamma_2(schedule: NoiseSchedule) -> FloatArray:
    """gamma_{2,i} [N+1]: the factor of x_i in the mean of q(x_{i-1} | x_i, x_0)."""
    gamma = np.zeros(schedule.N + 1)
    gamma[1:] = np.sqrt(schedule.alphas[1:]) * schedule.cum_betas[:-1] / schedule.cum_betas[1:]
    return gamma


def _custom(weights: ArrayLike, N: int) -> FloatArray:
    values = real_array("weighting", weights)
    if values.shape != (N + 1,) or not np.isfinite(values[1:]).all():
        raise ValueError(f"weighting must be {N + 1} finite numbers, got shape {values.shape}")
    values[0] = 0.0
    return values
