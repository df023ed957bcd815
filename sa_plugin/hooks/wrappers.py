"""One translator from a host's habits to the network that the plugin calls.

The plugin calls ``f(x, n)`` with integers n in 1..N and expects eps of x's shape. Hosts count steps
from 0, rescale time, predict x_0 or v, append channels for a learned variance or return pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from sa_plugin._checks import check_choice
from sa_plugin._tensors import Coefficients, DeviceTables, expand
from sa_plugin.prediction import PREDICTS
from sa_plugin.schedule import NoiseSchedule

OUTPUTS = ("one", "pair", "channels")


class EpsModel(nn.Module):
    """A host's network as ``(x [B, C, H, W], n [B] in 1..N, **kwargs) -> eps [B, C, H, W]``.

    Args:
        network: the host's callable ``(x, time, **kwargs)``. A module's parameters stay its own.
        schedule: the forward process, for N and for the conversion of x_0 and v.
        index_from: 1 if the network's time is n, 0 if it is n - 1 (DDIM, improved-diffusion,
            diffusers; "shift1" in the Analytic-DPM codes).
        rescale_to: multiply time by ``rescale_to / N`` (a float then); None leaves integers.
        times: the network's times of the steps 1..N, [N], where neither of the two says it:
            respaced timesteps.
        predicts: what the network was trained for: "eps", "x0" or "v".
        output: "one" tensor; "pair" (eps, second) as the SN and NPR networks of the hosts give;
            "channels", the first C channels are eps and the rest (learned variance, a second head)
            is the second output.

    Raises:
        ValueError: unknown option, ``times`` of another length or beside ``index_from`` or
            ``rescale_to``, or at the call an output that does not fit ``output``.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        index_from: int = 1,
        rescale_to: float | None = None,
        times: ArrayLike | None = None,
        predicts: str = "eps",
        output: str = "one",
    ) -> None:
        super().__init__()
        if index_from not in (0, 1):
            raise ValueError(f"index_from must be 0 or 1, got {index_from!r}")
        if times is not None and (index_from, rescale_to) != (1, None):
            raise ValueError("times replaces index_from and rescale_to; give it alone")
        check_choice("predicts", predicts, PREDICTS)
        check_choice("output", output, OUTPUTS)
        self.network = network
        self.index_from = index_from
        self.time_scale = None if rescale_to is None else rescale_to / schedule.N
        self.times = None if times is None else _check_times(times, schedule.N)
        self.predicts = predicts
        self.output = output
        self._coefficients = Coefficients(schedule)

    def forward(self, x: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
        """Predicted eps [B, C, H, W]."""
        return self._call(x, n, kwargs)[0]

    def with_second(self, x: Tensor, n: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Predicted (eps, second output): what a Sampler needs for npr, sn and iddpm."""
        eps, second = self._call(x, n, kwargs)
        if second is None:
            raise ValueError(f"output={self.output!r} has no second output")
        return eps, second

    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        """Predicted eps of a call that the host has made itself.

        Args:
            output: what the network returned.
            x: its input x_n, [B, C, H, W].
            n: steps [B] in 1..N, in whatever way the network was told.
        """
        return self._translate(output, x, n)[0]

    def _call(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        return self._translate(self.network(x, self.time_of(n), **kwargs), x, n)

    def _translate(self, output: Any, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor | None]:
        first, second = self._split(output, x)
        return self._coefficients.eps_of(first, x, n, self.predicts), second

    def time_of(self, n: Tensor) -> Tensor:
        """The network's times [B] of steps n [B]."""
        if self.times is not None:
            self.times = self.times.to(n.device)  # moved once
            return self.times[n - 1]
        time = n if self.index_from == 1 else n - 1
        return time if self.time_scale is None else time.to(torch.float32) * self.time_scale

    def _split(self, output: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.output == "one":
            return output, None
        if self.output == "pair":
            if not isinstance(output, tuple | list) or len(output) != 2:
                raise ValueError(f'output="pair" needs two tensors, got {type(output).__name__}')
            return output[0], output[1]
        channels = x.shape[1]
        if output.shape[1] <= channels:
            raise ValueError(
                f'output="channels" needs more than {channels} channels, got {output.shape[1]}'
            )
        return output[:, :channels], output[:, channels:]


def _check_times(times: ArrayLike, N: int) -> Tensor:
    """[N]: int64 of whole numbers, else float32."""
    values = torch.as_tensor(np.asarray(times))
    if values.shape != (N,):
        raise ValueError(f"times must be [N], N = {N}, got shape {tuple(values.shape)}")
    return values.to(torch.float32 if values.is_floating_point() else torch.int64)


class SigmaModel(nn.Module):
    """A network that knows x_0 + sigma eps and sigma, as ``(x, n in 1..N, **kwargs) -> eps``.

    EDM-style codes (arXiv 2206.00364) and k-diffusion: the network gets the variance-exploding
    image x_n / sqrt(cum_alpha_n) and sigma_n = sqrt(cum_beta_n / cum_alpha_n), [B] in x's dtype.

    Args:
        network: ``(noisy image [B, C, H, W], sigma [B], **kwargs)``, returning the denoised image
            or eps. A module's parameters stay its own.
        schedule: the forward process, by ``NoiseSchedule.from_sigmas`` for a ladder of sigmas.
        predicts: "x0" (EDM's denoiser, after its preconditioning) or "eps".

    Raises:
        ValueError: unknown ``predicts``.
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: NoiseSchedule, *, predicts: str = "x0"
    ) -> None:
        super().__init__()
        check_choice("predicts", predicts, ("x0", "eps"))
        self.network = network
        self.predicts = predicts
        sigma = (schedule.cum_betas / schedule.cum_alphas) ** 0.5
        self._tables = DeviceTables(signal=schedule.cum_alphas**0.5, sigma=sigma)

    def forward(self, x: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
        """Predicted eps [B, C, H, W]."""
        n = n.to(x.device)
        signal, sigma = (self._tables.get(name, x)[n].to(x.dtype) for name in ("signal", "sigma"))
        noisy = x / expand(signal, x)
        output = self.network(noisy, sigma, **kwargs)
        return output if self.predicts == "eps" else (noisy - output) / expand(sigma, x)
