"""What a hook must know of the criteria of each host: one description a kind.

A criterion is recognised by its attributes; no host is imported. Describe the criterion of another
code in a subclass of ``Host``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._execution import module_of
from sa_plugin._tensors import Coefficients, Levels, expand, tiled
from sa_plugin.calls import HostCall
from sa_plugin.loss import SALoss
from sa_plugin.prediction import to_eps
from sa_plugin.schedule import NoiseSchedule

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
        a, b = (self.levels or self.coefficients)(n, x)
        return to_eps(first, x, a, b, self.predicts)


class Owner(ABC):
    """A kind of object with an objective, known by the attributes that it has.

    ``needed`` names these attributes, ``objective`` the one that ``attach`` replaces.
    """

    objective = "objective"
    needed: tuple[str, ...]

    def missing(self, owner: Any) -> list[str]:
        """The attributes that the object lacks to be of this kind."""
        return [name for name in (*self.needed, self.objective) if not hasattr(owner, name)]

    @abstractmethod
    def betas(self, owner: Any) -> ArrayLike:
        """[N+1] with betas[0] = 0."""

    def check(self, owner: Any, loss: SALoss) -> None:
        """ValueError for what cannot be served."""
        loss.schedule.check_same(self.betas(owner))


class Host(Owner):
    """A kind of criterion: ``network`` names its attribute that is called with (x_n, time)."""

    network: str
    call: ClassVar[type[CriterionCall]] = CriterionCall

    def missing(self, owner: Any) -> list[str]:
        """As for every owner, the network among them."""
        return [*([] if hasattr(owner, self.network) else [self.network]), *super().missing(owner)]

    def check(self, owner: Any, loss: SALoss) -> None:
        """ValueError for another schedule, a frozen network, or options that the host rules out."""
        super().check(owner, loss)
        if own := getattr(getattr(owner, "schedule", owner), "input_perturbation", 0):
            raise ValueError(
                f"the criterion's own input_perturbation must be 0, got {own}: give it to SALoss"
            )
        if loss.lam > 0 and self.is_frozen(owner):
            raise ValueError(
                f"the noise network of this {type(owner).__name__} is frozen, only a head is "
                "trained: the SA term would change nothing; attach to the noise network's own "
                "training"
            )
        for name in ("reuse", "input_perturbation"):
            if getattr(loss, name) and self.predicts(owner) != "eps":
                raise ValueError(
                    f"{name} takes a host whose own loss is the squared error of eps, got one "
                    f"whose network predicts {self.predicts(owner)!r}"
                )

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

    def check(self, owner: Any, loss: SALoss) -> None:
        """ValueError also for ``input_perturbation`` where a second output learns."""
        super().check(owner, loss)
        if loss.input_perturbation and "_" in str(owner.wrapper.typ):
            raise ValueError(
                f"input_perturbation must be 0 for a network that predicts {owner.wrapper.typ!r}, "
                f"whose second output is of x_n itself, got {loss.input_perturbation}"
            )

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


class _ContinuousCall(CriterionCall):
    """A call at times between the steps of a grid."""

    host: VPSDE

    @property
    def levels(self) -> Levels:
        return partial(self.host.levels, self.time)


@dataclass(frozen=True)
class VPSDE(Host):
    """Continuous times u in (0, 1] of the VP SDE with beta(u) = 0.1 + 19.9 u (arXiv 2011.13456).

    The rows of an image's window lie at its own u, u - 1/N, u - 2/N, ... Rows nearer than 1 / (2 N)
    to the clean image, or beyond it, are left out. ``NoiseSchedule.vpsde(N)`` is the schedule.

    Args:
        N: steps of the grid.
        network: the criterion's attribute that is called with (x_u, time).
        scale: the time for u = 1: 1 for a wrapper that takes u, 999 for a network's own times.
        output: what the network's (first) output is: "eps", "x0" or "v".
    """

    N: int = 1000
    network: str = "wrapper"
    scale: float = 1.0
    output: str = "eps"
    needed = ()
    call = _ContinuousCall

    def betas(self, criterion: Any) -> ArrayLike:
        return NoiseSchedule.vpsde(self.N).betas

    def predicts(self, criterion: Any) -> str:
        return self.output

    def steps(self, criterion: Any, time: Any, N: int) -> Tensor:
        return (self._u(time) * N).round().long().clamp(1, N)

    def times(self, criterion: Any, n: Tensor, N: int, like: Any) -> Any:
        times = self._at(like, n) * self.scale
        if isinstance(like, Tensor):
            return times.to(like)
        return times.cpu().numpy().astype(np.asarray(like).dtype)

    def levels(self, time: Any, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of x_u = a x_0 + b eps of the rows at steps n around the call's own times."""
        u = self._at(time, n)
        integral = 0.1 * u + 19.9 / 2 * u**2
        like = torch.promote_types(x.dtype, torch.float32)
        a, b = (-integral / 2).exp(), (-(-integral).expm1()).sqrt()
        return expand(a.to(x.device, like), x), expand(b.to(x.device, like), x)

    def _u(self, time: Any) -> Tensor:
        """The images' own u [B], float64."""
        return torch.as_tensor(time).double().flatten() / self.scale

    def _at(self, time: Any, n: Tensor) -> Tensor:
        """u of the rows at steps n, counted from the images' own."""
        u = self._u(time).to(n.device)
        own = self.steps(None, time, self.N).to(n.device)
        return tiled(u, n) + (n - tiled(own, n)).double() / self.N


HOSTS: tuple[Host, ...] = (ExtendedAnalyticDPM(), AnalyticDPM())
