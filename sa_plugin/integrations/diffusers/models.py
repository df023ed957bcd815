"""diffusers' schedulers and UNets as this package's schedules and networks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from sa_plugin._checks import check_choice
from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.schedule import NoiseSchedule

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NO_SIGNAL = 1e-12  # cum_alpha below this: x_n holds nothing of x_0 that float32 could show
_BELOW_ONE = float(np.nextafter(1, 0))


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The float64 schedule of a diffusers scheduler, step n for its timestep n - 1.

    It is built from ``betas``: a float32 beta has a relative error of 6e-8, and so has every table.
    ``alphas_cumprod`` is not exact enough: in float32, 1 - alphas_cumprod[0] has lost half of its
    digits. A last beta of 1 (a zero terminal SNR) becomes the float64 below 1.

    Raises:
        ValueError: no betas, betas outside (0, 1), a zero terminal SNR with a network that predicts
            epsilon, or ``alphas_cumprod`` that do not belong to the betas.
    """
    schedule = getattr(scheduler, "schedule", None)
    if isinstance(schedule, NoiseSchedule):  # an OptimalVarianceScheduler's
        return schedule
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor):
        raise ValueError(f"{type(scheduler).__name__} has no betas to build a noise schedule from")
    schedule = schedule_of(betas.detach().double().cpu().numpy())
    check_terminal(schedule, scheduler.config.prediction_type, type(scheduler).__name__)
    cumulated = getattr(scheduler, "alphas_cumprod", None)
    if cumulated is not None:
        values = cumulated.detach().double().cpu().numpy()
        known = schedule.cum_alphas[1:] > NO_SIGNAL  # float32 holds no smaller product exactly
        if not np.allclose(values[known], schedule.cum_alphas[1:][known], rtol=1e-3, atol=0):
            raise ValueError(
                f"alphas_cumprod of {type(scheduler).__name__} is not the cumulative product of "
                "1 - betas; a scheduler that changes only one of them has no forward process"
            )
    return schedule


def schedule_of(betas: ArrayLike) -> NoiseSchedule:
    """The schedule of betas[1..N], the last of which may be 1."""
    values = np.array(betas, dtype=np.float64)
    if values.ndim == 1 and len(values) and values[-1] == 1:
        values[-1] = _BELOW_ONE
    return NoiseSchedule.from_betas(values)


def ends_in_noise(schedule: NoiseSchedule) -> bool:
    """Whether the last beta was 1: a zero terminal SNR."""
    return bool(schedule.betas[-1] == _BELOW_ONE)


def check_terminal(schedule: NoiseSchedule, prediction_type: str, owner: str) -> None:
    """ValueError for a zero terminal SNR with a prediction from which x_0 cannot be had there."""
    if prediction_type == "epsilon" and ends_in_noise(schedule):
        raise ValueError(
            f"{owner} has a zero terminal SNR: x_N is its own noise, so that epsilon says nothing "
            "of the image; prediction_type must be 'v_prediction' or 'sample', got 'epsilon'"
        )


def unet_model(unet: Any, scheduler: Any, *, second: bool = False) -> Any:
    """A diffusers UNet as the network that ``Sampler``, ``estimate_gamma`` and ``SALoss`` call.

    Args:
        unet: ``(x, timestep, **kwargs)`` -> an object with ``.sample``, a tuple or a tensor.
        scheduler: the scheduler of its training, for the schedule and ``prediction_type``.
            After a zero terminal SNR no ``Sampler`` can start from this eps; the scheduler can.
        second: return the pair (eps, the channels after the first C), as "npr", "sn" and "iddpm"
            need it. Without it, further channels are cut off.

    Raises:
        ValueError: an unknown ``prediction_type``, or a scheduler that ``noise_schedule`` refuses.
    """
    model = EpsModel(
        _UNet(unet, cut=not second),
        noise_schedule(scheduler),
        index_from=0,
        predicts=predicts_of(scheduler.config.prediction_type),
        output="channels" if second else "one",
    )
    return model.with_second if second else model


class _UNet(nn.Module):
    """A UNet's call with its output unpacked; a module, so that its device and dtype are found."""

    def __init__(self, unet: Any, cut: bool) -> None:
        super().__init__()
        self.unet = unet
        self.cut = cut

    def forward(self, x: Tensor, time: Tensor, **kwargs: Any) -> Tensor:
        return call_unet(x, time, unet=self.unet, cut=self.cut, **kwargs)


def call_unet(x: Tensor, time: Tensor, *, unet: Any, cut: bool = True, **kwargs: Any) -> Tensor:
    return unpack(unet(x, time, **kwargs), x, cut)


def unpack(output: Any, x: Tensor, cut: bool) -> Tensor:
    """The tensor in a UNet's output; ``cut`` keeps only x's channels."""
    sample = getattr(output, "sample", None)
    if sample is None:
        sample = output[0] if isinstance(output, tuple) else output
    return sample[:, : x.shape[1]] if cut else sample


def predicts_of(prediction_type: str) -> str:
    check_choice("prediction_type", prediction_type, tuple(PREDICTION_TYPES))
    return PREDICTION_TYPES[prediction_type]
