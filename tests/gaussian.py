"""Data whose every answer is known: Gaussians and their mixtures, and their exact networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sa_plugin.schedule import NoiseSchedule


class GaussianData:
    """x_0 ~ N(mu, S), S diagonal, both float64 of an image's shape; n is an int or int64 [B]."""

    def __init__(self, mu, S, schedule: NoiseSchedule) -> None:
        self.mu = torch.as_tensor(mu, dtype=torch.float64)
        self.S = torch.as_tensor(S, dtype=torch.float64)
        self.schedule = schedule
        self._cum_alphas = torch.from_numpy(schedule.cum_alphas.copy())
        self._cum_betas = torch.from_numpy(schedule.cum_betas.copy())

    def _at(self, n) -> tuple[Tensor, Tensor]:
        n = torch.as_tensor(n)
        shape = (*n.shape, *[1] * self.mu.ndim)
        return self._cum_alphas[n].reshape(shape), self._cum_betas[n].reshape(shape)

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """x_0 [count, ...]."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *self.mu.shape, generator=generator, dtype=torch.float64)
        return self.mu + self.S.sqrt() * noise

    def marginal(self, n) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_n; n = 0 gives mu, S."""
        a, b = self._at(n)
        return a.sqrt() * self.mu, a * self.S + b

    def eps(self, x: Tensor, n) -> Tensor:
        """E[eps | x_n], the exact noise network."""
        b = self._at(n)[1]
        mean, variance = self.marginal(n)
        return (b.sqrt() * (x.double() - mean) / variance).to(x.dtype)

    def x0(self, x: Tensor, n) -> Tensor:
        """E[x_0 | x_n]."""
        a, _ = self._at(n)
        mean, variance = self.marginal(n)
        return (self.mu + a.sqrt() * self.S * (x.double() - mean) / variance).to(x.dtype)

    def v(self, x: Tensor, n) -> Tensor:
        """E[sqrt(cum_alpha) eps - sqrt(cum_beta) x_0 | x_n]."""
        a, b = self._at(n)
        return (a.sqrt() * self.eps(x.double(), n) - b.sqrt() * self.x0(x.double(), n)).to(x.dtype)

    def covariance(self, n) -> Tensor:
        """Diagonal of Cov[x_0 | x_n]."""
        b = self._at(n)[1]
        return b * self.S / self.marginal(n)[1]

    def npr_second(self, x: Tensor, n) -> Tensor:
        """E[(eps - eps_pred)^2 | x_n], the exact second output of an NPR network."""
        a = self._at(n)[0]
        return (a * self.S / self.marginal(n)[1]).to(x.dtype).expand_as(x)

    def sn_second(self, x: Tensor, n) -> Tensor:
        """E[eps^2 | x_n], the exact second output of an SN network."""
        return self.eps(x, n) ** 2 + self.npr_second(x, n)

    @property
    def gamma(self) -> np.ndarray:
        """Gamma_n = E mean(eps_pred^2), [N+1]."""
        steps = torch.arange(self.schedule.N + 1)
        ratio = self._at(steps)[1] / self.marginal(steps)[1]
        return ratio.expand(len(steps), *self.mu.shape).flatten(1).mean(1).numpy()

    def network(self, kind: str = "eps") -> Callable[[Tensor, Tensor], Tensor | tuple]:
        """(x, n) -> output; kind "eps", "x0", "v", or "npr", "sn" for the pair."""
        if kind == "npr":
            return lambda x, n: (self.eps(x, n), self.npr_second(x, n))
        if kind == "sn":
            return lambda x, n: (self.eps(x, n), self.sn_second(x, n))
        return {"eps": self.eps, "x0": self.x0, "v": self.v}[kind]

    def reverse_variance(self, s: int, t: int) -> Tensor:
        """Var[x_s | x_t] by Bayes' rule for x_t = sqrt(skip_alpha) x_s + sqrt(skip_beta) eps."""
        skip_beta = float(self.schedule.skip_beta(s, t))
        prior = self.marginal(s)[1]
        return prior * skip_beta / ((1 - skip_beta) * prior + skip_beta)


class CorrelatedData:
    """x_0 ~ N(mu, Sigma), Sigma [D, D] with eigenvalues evenly spaced on a log scale.

    Images are rows [B, D].
    """

    def __init__(
        self, D: int, schedule: NoiseSchedule, *, condition: float = 1e3, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.basis = torch.linalg.qr(square)[0]
        self.values = torch.logspace(0, -np.log10(condition), D, dtype=torch.float64)
        self.sigma = self.basis @ torch.diag(self.values) @ self.basis.T
        self.mu = 0.5 * torch.randn(D, generator=generator, dtype=torch.float64)
        self._in_basis = GaussianData(torch.zeros(D), self.values, schedule)

    def eps(self, x: Tensor, n) -> Tensor:
        """E[eps | x_n], the exact noise network."""
        a = self._in_basis._at(n)[0]
        turned = (x.double() - a.sqrt() * self.mu) @ self.basis
        return (self._in_basis.eps(turned, n) @ self.basis.T).to(x.dtype)

    def covariance(self, n: int) -> Tensor:
        """Cov[x_0 | x_n], [D, D]."""
        return self.basis @ torch.diag(self._in_basis.covariance(n)) @ self.basis.T


class Mixture:
    """The exact noise network of a mixture of Gaussians, for whole and for fractional steps.

    ``means``, ``variances``: [M, ...] of its parts, all of one weight.
    """

    def __init__(self, means: Tensor, variances: Tensor, schedule: NoiseSchedule) -> None:
        self.means, self.variances, self.schedule = means, variances, schedule
        self.mean = means.mean(0)

    def inflated(self, q: float) -> Mixture:
        """About the mean by sqrt(1 + q)."""
        means = self.mean + (1 + q) ** 0.5 * (self.means - self.mean)
        return Mixture(means, (1 + q) * self.variances, self.schedule)

    def _parts(self, x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """Shares [M, B, 1, ...] of the parts at x, cum_alpha, cum_beta, x less the means."""
        # log SNR is linear between steps
        snr = np.log(self.schedule.cum_alphas[1:]) - np.log(self.schedule.cum_betas[1:])
        at = np.interp(n.numpy(), np.arange(1, self.schedule.N + 1), snr)
        at = torch.from_numpy(at).reshape(1, -1, *(1,) * (x.ndim - 1))
        a, b = at.sigmoid(), (-at).sigmoid()
        total = a * self.variances[:, None] + b
        away = x - a.sqrt() * self.means[:, None]
        log = -0.5 * (away**2 / total + total.log()).flatten(2).sum(2)
        return log.softmax(0).reshape(*log.shape, *(1,) * (x.ndim - 1)), a, b, away

    def __call__(self, x: Tensor, n: Tensor) -> Tensor:
        share, a, b, away = self._parts(x, n)
        return (share * b.sqrt() * away / (a * self.variances[:, None] + b)).sum(0)

    def covariance(self, x: Tensor, n: Tensor) -> Tensor:
        """Cov[x_0 | x_n], [B, D, D] of flattened images."""
        share, a, b, away = self._parts(x, n)
        s = self.variances[:, None]
        means = (self.means[:, None] + a.sqrt() * s * away / (a * s + b)).flatten(2)
        within = (b * s / (a * s + b)).expand_as(away).flatten(2)
        share = share.flatten(2)
        mean = (share * means).sum(0)
        apart = means - mean
        between = torch.einsum("mbi,mbj->bij", share * apart, apart)
        return between + torch.diag_embed((share * within).sum(0))
