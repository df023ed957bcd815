r"""The SA term for networks D(x_0 + sigma eps; sigma), whose sigma comes from a continuous law.

EDM (arXiv 2206.00364), its VP and VE losses, and k-diffusion. The window of an image that was drawn
at sigma lies at sigma, sigma / ratio, sigma / ratio^2, ...: neighbours of the host's own sigma.
Nothing is rounded to a ladder, and no sigma is outside of one. The error of the predicted noise at
sigma_s is e_s = (y - D) / sigma_s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_plugin._checks import (
    check_output,
    check_positive,
    check_recovered,
    check_shape_of,
    check_whole,
)
from sa_plugin._tensors import Levels, expand, tiled
from sa_plugin.calls import HostCall, with_positions
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule


@dataclass(frozen=True)
class _SigmaCall(HostCall):
    """A host's call at sigma, in the host's shape; the host's own row is at step ``own_step``."""

    ratio: float
    own_step: int

    def _sigma(self, n: Tensor) -> Tensor:
        sigma = tiled(self.time.flatten(), n)
        return sigma * self.ratio ** (n.to(sigma) - self.own_step)

    @property
    def levels(self) -> Levels:
        def of(n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            sigma = expand(self._sigma(n), x)
            return torch.ones_like(sigma), sigma

        return of

    def time_of(self, n: Tensor) -> Tensor:
        return self._sigma(n).reshape(-1, *self.time.shape[1:])

    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        check_output(output, x)
        return (x - output) / expand(self._sigma(n), x)


class SigmaSALoss:
    """The SA term around a host's own call of its network: lambda sigma^2 L_sa.

    Args:
        K, lam, noise, stack: as in ``SALoss``. L_sa is a mean over an image's dimensions; tau = 1.
        ratio: of one sigma to the next of a window, > 1. There are about 1000 steps of the default
            between 0.002 and 80.

    Raises:
        ValueError: a bad option, named.
    """

    def __init__(
        self,
        K: int = 2,
        lam: float = 1.0,
        *,
        ratio: float = 1.01,
        noise: str = "independent",
        stack: bool = True,
    ) -> None:
        check_whole("K", K, 1, sys.maxsize)
        check_positive("ratio", ratio)
        if ratio <= 1:
            raise ValueError(f"ratio must be > 1, got {ratio!r}")
        # Steps 1..K of the window itself: sigmas in units of the host's own, which is step K.
        schedule = NoiseSchedule.from_sigmas([float(ratio) ** (k + 1 - K) for k in range(K)])
        self._loss = SALoss(schedule, K, lam, noise=noise, stack=stack, reduction="mean")
        self.ratio = float(ratio)
        self._checked = False

    def __call__(
        self,
        net: Callable[..., Tensor],
        y: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """``net(noisy, sigma, *args, **kwargs)``, made together with the calls of the window.

        Args:
            net: (noisy images, sigma, *args, **kwargs) -> denoised images.
            y: clean images [B, ...] in [-1, 1], as they are before the noise is added.
            noisy: y + sigma * noise.
            sigma: one for each image, [B] or [B, 1, 1, 1].
            args, kwargs: the host's own; tensors of length B (labels) follow their images.

        Returns:
            What ``net`` returns for the host's own images, and lambda sigma^2 L_sa [B, 1, ...]. The
            host weighs |D - y|^2; weighed alike, the term has lambda's usual meaning: at K = 1 it
            is lambda times the mean of |D - y|^2.

        Raises:
            ValueError: other shapes; an output that is not of the images' shape; at the first call,
                noise that is not standard normal.
        """
        check_shape_of("noisy", noisy, y.shape)
        if sigma.numel() != len(y) or sigma.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"sigma must hold one value for each of {len(y)} images, got shape "
                f"{tuple(sigma.shape)}"
            )
        column = expand(sigma.flatten(), y)
        eps = (noisy.detach() - y) / column
        if not self._checked:
            self._checked = check_recovered(eps, "noisy must be y + sigma * noise")
        own, named = self._loss.K, {"args": args, "kwargs": kwargs}
        n = torch.full((len(y),), own, device=y.device)
        call = _SigmaCall(with_positions(net), noisy, sigma, named, self.ratio, own)
        asked = self._loss.around(call, y, n, eps)
        sa = expand(asked.terms()[1], y)
        return asked.output, self._loss.lam * column**2 * sa
