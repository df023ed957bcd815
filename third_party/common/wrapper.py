"""Converts the steps n = 1..N of a schedule to the times that a network was trained with.

The time is n, or n - 1 with `shift1` (checkpoints of the DDIM line). With `rescale_timesteps` it is
multiplied by 1000/N, so networks of any N receive times on the same scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = ("eps", "x0", "eps_eps2", "eps_epsc", "eps_iddpm", "eps_ocm")


class DTWrapper:
    """A network as a function of (x_n, n), and of labels y if it has classes.

    `typ` says what it predicts:


    eps        the noise                 x0         the image
    eps_eps2   the noise and its square  eps_epsc   the noise and its squared prediction error
    eps_iddpm  the noise and the position between the two extreme log variances
    eps_ocm    the noise and the diagonal of I - sqrt(cum_beta_n) d eps / d x_n
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        typ: str,
        rescale_timesteps: bool = True,
        shift1: bool = False,
        N: int = 1000,
    ) -> None:
        if typ not in TYPES:
            raise ValueError(f"typ={typ!r}: must be one of {', '.join(TYPES)}")
        if N < 1:
            raise ValueError(f"N={N!r}: must be at least 1")
        self.model = model
        self.typ = typ
        self.rescale_timesteps = rescale_timesteps
        self.shift1 = shift1
        self.N = N

    def __call__(self, xn: Tensor, n: Any, **labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output for `xn` [B,C,H,W] at step `n` (a number, or [B] of any kind).

        `labels` are passed on: nothing, or y [B]. If `typ` names two predictions, the two channel
        halves of the output.
        """
        out = self.model(xn, self._times(xn, n), **labels)
        if "_" not in self.typ:
            return out
        if out.shape[1] % 2:
            raise ValueError(f"{out.shape[1]} output channels: typ {self.typ!r} needs two halves")
        first, second = out.chunk(2, dim=1)
        return first, second

    def _times(self, xn: Tensor, n: Any) -> Tensor:
        if not isinstance(n, Tensor):
            n = torch.from_numpy(np.array(n))
        if n.ndim > 1 or (n.ndim == 1 and len(n) != len(xn)):
            raise ValueError(f"n has shape {tuple(n.shape)}: must be one number or [{len(xn)}]")
        t = n.to(xn.device, non_blocking=True) - int(self.shift1)
        if self.rescale_timesteps:
            # Half precision would merge neighbouring steps.
            t = t.to(torch.promote_types(xn.dtype, torch.float32)) * (1000.0 / self.N)
        return t.expand(len(xn))
