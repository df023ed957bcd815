"""What a hook must know of the criteria of each host: one description a kind.

A criterion is recognised by its attributes; no host is imported. Describe the criterion of another
code in a subclass of ``Host``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._execution import module_of
from sa_plugin._tensors import Coefficients
from sa_plugin.calls import HostCall

HEADS = {"out2", "before_out", "norm_out2", "conv_out2"}  # the modules of these codes' heads


@dataclass(frozen=True)
class CriterionCall(HostCall):
    """A criterion's call of its network, in the times and the prediction of its host."""

    host: Host
    criterion: Any
    predicts: str
    coefficients: Coefficients

    def steps(self) -> Tensor:
        """The steps n [B] of the call."""
        return self.host.steps(self.criterion, self.time, self.coefficients.N)

    def time_of(self, n: Tensor) -> Any:
        """As ``Host.times``."""
        return self.host.times(self.criterion, n, self.coefficients.N, self.time)

    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        """Of the first output, where there are several."""
        first = output[0] if isinstance(output, tuple | list) else output
        if self.predicts == "eps":
            return first
        return self.coefficients.eps_of(first, x, n, self.predicts)


class Host(ABC):
    """A kind of criterion: ``network`` names its attribute that is called with (x_n, time).

    ``needed`` names the other attributes that such a criterion has.
    """

    network: str
    needed: tuple[str, ...]

    def missing(self, criterion: Any) -> list[str]:
        """The attributes that the criterion lacks to be of this kind."""
        names = (self.network, *self.needed, "objective")
        return [name for name in names if not hasattr(criterion, name)]

    @abstractmethod
    def betas(self, criterion: Any) -> ArrayLike:
        """[N+1] with betas[0] = 0."""

    @abstractmethod
    def steps(self, criterion: Any, time: Any, N: int) -> Tensor:
        """The steps n in 1..N of the times that the network was called with."""

    @abstractmethod
    def times(self, criterion: Any, n: Tensor, N: int, like: Any) -> Any:
        """The times to call the network with at the steps n, in the type of ``like``."""

    def predicts(self, criterion: Any) -> str:
        """What the network's (first) output is: "eps", "x0" or "v"."""
        return "eps"

    def is_frozen(self, criterion: Any) -> bool:
        """Whether the layers that make eps are known to be frozen."""
        return False


@dataclass(frozen=True)
class ExtendedAnalyticDPM(Host):
    """NPR-DPM, SN-DPM and the port: ``wrapper(x_n, n)`` is called with n in 1..N itself.

    ``wrapper.typ`` says what the network predicts (a pair where it contains an underscore).
    """

    network = "wrapper"
    needed = ("schedule",)

    def betas(self, criterion: Any) -> ArrayLike:
        return criterion.schedule.betas

    def steps(self, criterion: Any, time: Any, N: int) -> Tensor:
        return torch.as_tensor(time)

    def times(self, criterion: Any, n: Tensor, N: int, like: Any) -> Any:
        if isinstance(like, np.ndarray):
            return n.cpu().numpy().astype(like.dtype)
        return n.to(like.dtype) if isinstance(like, Tensor) else n

    def predicts(self, criterion: Any) -> str:
        return str(criterion.wrapper.typ).split("_")[0]

    def is_frozen(self, criterion: Any) -> bool:
        """Where all trained parameters are a head's: those of the ``_pretrained`` methods."""
        module = module_of(criterion.wrapper)
        named = () if module is None else module.named_parameters()
        trained = [set(name.split(".")) for name, p in named if p.requires_grad]
        return bool(trained) and all(names & HEADS for names in trained)


@dataclass(frozen=True)
class AnalyticDPM(Host):
    """Analytic-DPM and the port: ``eps_model(x_n, t)``, t = n or n - 1, perhaps times 1000 / N.

    Args:
        rescale_timesteps: whether times are multiplied by 1000 / N; None: as the criterion's
            attribute of that name says.
        shift1: whether the first step's time is 0, as in codes of the DDIM line; None: as the
            criterion's attribute of that name says, or no if it has none.
    """

    rescale_timesteps: bool | None = None
    shift1: bool | None = None
    network = "eps_model"
    needed = ("betas",)

    def betas(self, criterion: Any) -> ArrayLike:
        return criterion.betas

    def steps(self, criterion: Any, time: Any, N: int) -> Tensor:
        rate, shift = self._habit(criterion, N)
        return (torch.as_tensor(time) / rate).round().long() + shift

    def times(self, criterion: Any, n: Tensor, N: int, like: Any) -> Any:
        rate, shift = self._habit(criterion, N)
        if not isinstance(like, Tensor):
            return ((n.cpu().numpy() - shift) * rate).astype(np.asarray(like).dtype)
        # Half precision would merge neighbouring steps before they are scaled.
        times = (n - shift).to(torch.promote_types(like.dtype, torch.float32))
        return (times * rate).to(like.dtype)

    def _habit(self, criterion: Any, N: int) -> tuple[float, int]:
        rescale, shift1 = self.rescale_timesteps, self.shift1
        if rescale is None:
            rescale = getattr(criterion, "rescale_timesteps", None)
        if rescale is None and N != 1000:
            raise ValueError(
                f"{type(criterion).__name__} has no attribute 'rescale_timesteps'; give "
                "attach(..., host=AnalyticDPM(rescale_timesteps=...))"
            )
        shift1 = getattr(criterion, "shift1", False) if shift1 is None else shift1
        return 1000 / N if rescale else 1.0, int(shift1)


HOSTS: tuple[Host, ...] = (ExtendedAnalyticDPM(), AnalyticDPM())
