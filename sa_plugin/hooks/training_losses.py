r"""What ``attach`` must know of improved- and guided-diffusion: ``diffusion.training_losses``.

The network is an argument there, and the host may wrap it: its steps are then mapped and rescaled.
So the hook stands between the host and the network that the caller gave, and it asks the host once
for the time of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._checks import check_choice
from sa_plugin._tensors import Coefficients, DeviceTables, expand
from sa_plugin.calls import HostCall
from sa_plugin.hooks.hosts import Owner
from sa_plugin.hooks.interception import standing_in
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule

PREDICTS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "previous_x"}
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")


@dataclass(frozen=True)
class GuidedDiffusion(Owner):
    """A ``GaussianDiffusion`` of improved- or guided-diffusion, respaced or not.

    All of its loss types and model mean types, with learned sigma or without. Its losses are means
    over an image's dimensions.
    """

    objective = "training_losses"
    needed = ("training_losses", "betas", "model_mean_type", "loss_type")

    def betas(self, owner: Any) -> ArrayLike:
        return np.append(0.0, owner.betas)

    def check(self, owner: Any, loss: SALoss) -> None:
        """ValueError for other types or another schedule, sums, or options that need its loss."""
        super().check(owner, loss)
        for name, allowed in {"model_mean_type": tuple(PREDICTS), "loss_type": LOSSES}.items():
            check_choice(name, _name(getattr(owner, name)), allowed)
        if loss.reduction != "mean":
            raise ValueError(f"reduction must be the host's, 'mean', got {loss.reduction!r}")
        for name, off in {"reuse": False, "input_perturbation": 0}.items():
            if getattr(loss, name):
                raise ValueError(
                    f"{name} must be {off}: the host's loss may be another than that of eps"
                )

    def predicts(self, owner: Any) -> str:
        """What the first channels of the network's output are."""
        return PREDICTS[_name(owner.model_mean_type)]


def _name(member: Any) -> str:
    """Of a member of the host's enumerations."""
    return str(getattr(member, "name", member))


class _Noted(Exception):
    """Ends a call of ``training_losses`` where the network would be called."""


def network_times(
    training_losses: Callable[..., Any], model: Callable[..., Any], x_start: Tensor, T: int
) -> Tensor:
    """The times [T] that the host gives the network for its steps; the network is not called."""
    times: list[Tensor] = []

    def note(_: Any, x: Tensor, time: Tensor, **kwargs: Any) -> NoReturn:
        times.append(time)
        raise _Noted

    x, t = x_start.new_zeros(T, 1, 1, 1), torch.arange(T, device=x_start.device)
    with standing_in(model, note) as stand_in:
        try:
            training_losses(stand_in, x, t, noise=x)
        except _Noted:
            return times[0]
    raise ValueError("training_losses must call its model, got no call")


def previous_tables(schedule: NoiseSchedule) -> DeviceTables:
    """Of x_{n-1}'s predicted mean (x_n - beta_n eps / sqrt(cum_beta_n)) / sqrt(alpha_n)."""
    safe = np.append(1.0, schedule.betas[1:])
    return DeviceTables(root=schedule.alphas**0.5, scale=schedule.cum_betas**0.5 / safe)


@dataclass(frozen=True)
class TrainingCall(HostCall):
    """The call that ``training_losses`` makes of its network, at the steps n [B].

    Attributes:
        times: the network's time of every step, [N].
        predicts: "eps", "x0" or "previous_x".
        previous: ``previous_tables``.
    """

    n: Tensor
    times: Tensor
    predicts: str
    coefficients: Coefficients
    previous: DeviceTables

    def steps(self) -> Tensor:
        """The steps n [B] of the call."""
        return self.n

    def time_of(self, n: Tensor) -> Tensor:
        """As the host maps and scales them."""
        return self.times[n.to(self.times.device) - 1].to(self.time)

    def eps_of(self, output: Tensor, x: Tensor, n: Tensor) -> Tensor:
        """Of the first channels; a learned sigma doubles them."""
        channels = x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the network must return {channels} or {2 * channels} channels, got "
                f"{output.shape[1]}"
            )
        first = output[:, :channels]
        if self.predicts != "previous_x":
            return self.coefficients.eps_of(first, x, n, self.predicts)
        root, scale = (
            expand(self.previous.get(k, x)[n.to(x.device)], x) for k in ("root", "scale")
        )
        return (x - root * first) * scale
