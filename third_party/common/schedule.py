"""The forward process q(x_n | x_0) as float64 tables, n = 0..N with betas[0] = 0.

x_n = sqrt(cum_alphas[n]) x_0 + sqrt(cum_betas[n]) eps,  eps ~ N(0, I).
Sources: linear betas, arXiv 2006.11239; cosine, arXiv 2102.09672, equation 17;
variance-preserving SDE, arXiv 2011.13456, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


class Schedule:
    """Tables of a forward process given by `betas` ([N+1], betas[0] = 0, the others in [0, 1)).

    stratified          `sample` draws one step from each of B equal parts of 1..N; each step alone
                        is uniform. False: B independent steps, as in the hosts
    input_perturbation  gamma >= 0: `sample` makes x_n with eps + gamma xi, xi ~ N(0, I), and
                        returns eps (arXiv 2301.11706). 0: as in the hosts
    """

    def __init__(
        self, betas: npt.ArrayLike, stratified: bool = False, input_perturbation: float = 0.0
    ) -> None:
        if not 0 <= input_perturbation < float("inf"):
            raise ValueError(f"input_perturbation={input_perturbation!r}: must be finite and >= 0")
        self.stratified = stratified
        self.input_perturbation = input_perturbation
        self.betas: FloatArray = np.array(betas, dtype=np.float64)
        _check_betas(self.betas)
        self.alphas: FloatArray = 1.0 - self.betas
        self.cum_alphas: FloatArray = np.cumprod(self.alphas)
        self.cum_betas: FloatArray = 1.0 - self.cum_alphas

    @property
    def N(self) -> int:
        """The number of steps."""
        return len(self.betas) - 1

    # These tables hold (N+1)^2 numbers each and training does not need them: built on demand.
    @cached_property
    def skip_alphas(self) -> FloatArray:
        """[s, t]: alphas[s+1] ... alphas[t]; 1 (the empty product) for s >= t."""
        table = np.ones((self.N + 1, self.N + 1))
        for s in range(self.N):
            np.cumprod(self.alphas[s + 1 :], out=table[s, s + 1 :])
        return table

    @cached_property
    def skip_betas(self) -> FloatArray:
        """[s, t]: the variance of q(x_t | x_s), 1 - skip_alphas[s, t]."""
        return 1.0 - self.skip_alphas

    def tilde_beta(self, s: int | IntArray, t: int | IntArray) -> np.float64 | FloatArray:
        """The variance of q(x_s | x_t, x_0), for 0 <= s <= t, 1 <= t <= N."""
        s_, t_ = np.asarray(s), np.asarray(t)
        if np.any((s_ < 0) | (s_ > t_) | (t_ < 1) | (t_ > self.N)):
            raise ValueError(f"s={s}, t={t}: must satisfy 0 <= s <= t and 1 <= t <= N={self.N}")
        return self.skip_betas[s_, t_] * self.cum_betas[s_] / self.cum_betas[t_]

    def sample(self, x0: Tensor) -> tuple[IntArray, Tensor, Tensor]:
        """Draw a step and a noise for each image of `x0` [B,...]: (n [B] in 1..N, eps, x_n).

        n comes from NumPy's global state, eps from PyTorch's generator of the device of `x0`; xi of
        the input perturbation is drawn after eps, and not at all where that is 0.
        """
        if not x0.is_floating_point():
            raise ValueError(f"x0 has dtype {x0.dtype}: must be floating point, in [-1, 1]")
        n = self._draw_steps(len(x0))
        eps = torch.randn_like(x0)
        signal = per_image(np.sqrt(self.cum_alphas[n]), x0)
        noise = per_image(np.sqrt(self.cum_betas[n]), x0)
        if self.input_perturbation == 0:
            return n, eps, signal * x0 + noise * eps
        xi = torch.randn_like(x0)
        return n, eps, signal * x0 + noise * (eps + self.input_perturbation * xi)

    # The hosts draw from the global state.
    def _draw_steps(self, batch: int) -> IntArray:
        if not self.stratified:
            return np.random.randint(1, self.N + 1, size=batch, dtype=np.int64)  # noqa: NPY002
        # batch * N places: `batch` places for each step, N places for each part.
        offsets = np.random.randint(self.N, size=batch, dtype=np.int64)  # noqa: NPY002
        places = np.arange(batch, dtype=np.int64) * self.N + offsets
        return np.random.permutation(places // batch + 1)  # noqa: NPY002


class NamedSchedule(Schedule):
    """The schedule called `name` ("linear", "cosine" or "vpsde") with `N` steps."""

    def __init__(
        self, name: str, N: int, stratified: bool = False, input_perturbation: float = 0.0
    ) -> None:
        if name not in BETAS:
            raise ValueError(f"name={name!r}: must be one of {', '.join(sorted(BETAS))}")
        least = 21 if name == "linear" else 1  # the linear schedule ends at beta = 20/N < 1
        if isinstance(N, bool) or not isinstance(N, int | np.integer) or int(N) < least:
            raise ValueError(f"N={N!r}: schedule {name!r} takes whole numbers from {least} on")
        self.name = name
        betas = np.concatenate([[0.0], BETAS[name](int(N))])
        super().__init__(betas, stratified, input_perturbation)


def per_image(values: FloatArray, like: Tensor) -> Tensor:
    """`values` [B], one for each image, as [B,1,...,1] with the dtype and device of `like`."""
    column = torch.from_numpy(values).to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    return column.to(like.device, non_blocking=True)


def _check_betas(betas: FloatArray) -> None:
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"betas has shape {betas.shape}: must be [N+1] with N >= 1")
    if betas[0] != 0:
        raise ValueError(f"betas[0]={betas[0]}: must be 0, as steps count from 1")
    wrong = np.flatnonzero(~((betas >= 0) & (betas < 1)))
    if len(wrong):
        raise ValueError(f"betas[{wrong[0]}]={betas[wrong[0]]}: must lie in [0, 1)")


def _linear_betas(N: int) -> FloatArray:
    return np.linspace(0.1 / N, 20.0 / N, N)


def _cosine_betas(N: int) -> FloatArray:
    u = np.arange(N + 1) / N
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def _vpsde_betas(N: int) -> FloatArray:
    """1 - exp(-integral of beta(u) over one step), beta(u) linear from 0.1 to 20 on [0, 1]."""
    u = np.arange(N + 1) / N
    integral = VP_BETA_MIN * u + 0.5 * (VP_BETA_MAX - VP_BETA_MIN) * u**2
    return -np.expm1(-np.diff(integral))


BETAS: dict[str, Callable[[int], FloatArray]] = {
    "linear": _linear_betas,
    "cosine": _cosine_betas,
    "vpsde": _vpsde_betas,
}
