"""DDPM and DDIM with the optimal reverse variances, as a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sa_plugin._checks import check_non_negative, check_whole
from sa_plugin._tensors import DeviceTables
from sa_plugin.integrations.diffusers.models import noise_schedule, predicts_of
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments
from sa_plugin.sampling.trajectory import resolve_trajectory
from sa_plugin.sampling.variance import NEEDS_SECOND, check_gamma, check_variance
from sa_plugin.schedule import NoiseSchedule


@dataclass
class OptimalVarianceSchedulerOutput(BaseOutput):
    """The result of ``OptimalVarianceScheduler.step``, [B, C, H, W] each.

    Attributes:
        prev_sample: x_s, the next model input.
        pred_original_sample: the predicted x_0, after clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class OptimalVarianceScheduler(SchedulerMixin, ConfigMixin):
    """DDPM and DDIM with the optimal reverse variances, for ``DDPMPipeline`` and similar pipelines.

    ``OptimalVarianceScheduler.from_config(ddpm.config, variance="analytic", gamma=gamma)`` takes
    over the forward process, ``prediction_type`` and ``clip_sample`` of a scheduler. ``variance``
    and ``trajectory`` replace its ``variance_type``, ``timestep_spacing`` and ``steps_offset``. The
    last step adds no noise.

    Name the arguments: diffusers' ``from_config`` takes an argument given by position for a default
    (``DDPMScheduler(50)`` becomes 1000 steps, in its own schedulers, too).

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as in
            ``DDPMScheduler``; ``trained_betas`` keep their float64 digits.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_sample: cut the predicted x_0 to [-1, 1] and its covariance to [0, 1].
        variance, forward, eta, gamma, avg_cov, clip_sigma_idx, clip_pixel: as in ``Sampler``.
            "npr", "sn" and "iddpm" need a model output of 2C channels.
        trajectory: a kind of ``choose_timesteps``, or an ascending list of steps in 1..T.
        clip_sample_range, thresholding, rescale_betas_zero_snr: only diffusers' defaults are
            possible. They are arguments so that a config with other values is refused.

    Raises:
        ValueError: an unknown or impossible option, or a missing or unusable gamma.
    """

    _compatibles = ["DDPMScheduler", "DDIMScheduler"]  # noqa: RUF012 (diffusers adds lists)
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        rescale_betas_zero_snr: bool = False,
        variance: str = "small",
        forward: str = "ddpm",
        eta: float = 0.0,
        trajectory: str | Sequence[int] = "linear",
        gamma: Sequence[float] | None = None,
        avg_cov: bool = False,
        clip_sigma_idx: int = 0,
        clip_pixel: float = 2.0,
    ) -> None:
        check_variance(variance, forward, eta)
        check_non_negative("clip_pixel", clip_pixel)
        self._predicts = predicts_of(prediction_type)
        for name, allowed in (
            ("clip_sample_range", 1.0),
            ("thresholding", False),
            ("rescale_betas_zero_snr", False),
        ):
            if getattr(self.config, name) != allowed:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self.config, name)!r}")
        forward_process = {"beta_start": beta_start, "beta_end": beta_end}
        self._base = DDPMScheduler(
            num_train_timesteps, beta_schedule=beta_schedule, **forward_process
        )
        self.schedule = noise_schedule(self._base)
        if trained_betas is not None:
            self.schedule = NoiseSchedule.from_betas(trained_betas)
            self._base = DDPMScheduler(self.schedule.N, trained_betas=self.schedule.betas[1:])
        self.betas, self.alphas_cumprod = self._base.betas, self._base.alphas_cumprod
        self._gamma = None if gamma is None else check_gamma(gamma, self.schedule.N)
        if variance == "analytic" and gamma is None:
            raise ValueError("variance 'analytic' needs gamma (estimate_gamma gives it), got None")
        self._keep_plain(trained_betas, trajectory)
        self.set_timesteps(self.schedule.N if isinstance(trajectory, str) else None)

    def _keep_plain(self, trained_betas: Any, trajectory: Any) -> None:
        """Store the configuration's arrays as lists, because it is written as JSON."""
        plain: dict[str, Any] = {"num_train_timesteps": self.schedule.N}
        if trained_betas is not None:
            plain["trained_betas"] = self.schedule.betas[1:].tolist()
        if self._gamma is not None:
            plain["gamma"] = [0.0, *self._gamma[1:].tolist()]  # entry 0 is unused, perhaps NaN
        if not isinstance(trajectory, str):
            plain["trajectory"] = [int(n) for n in trajectory]
        self.register_to_config(**plain)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps: the trajectory's length, or a descending list in 0..T-1."""
        trajectory = self.config.trajectory
        if timesteps is not None:
            trajectory = [int(t) + 1 for t in timesteps][::-1]
        elif num_inference_steps is None and isinstance(trajectory, str):
            raise ValueError("num_inference_steps must be a whole number, got None")
        visited = resolve_trajectory(self.schedule, num_inference_steps, trajectory, self._gamma)
        check_whole("clip_sigma_idx", self.config.clip_sigma_idx, 0, len(visited))
        coefficients = ReverseCoefficients.build(
            self.schedule,
            visited,
            forward=self.config.forward,
            eta=self.config.eta,
            gamma=self._gamma,
            clip_sigma_idx=self.config.clip_sigma_idx,
            clip_pixel=self.config.clip_pixel,
        )
        self._tables = DeviceTables(stack=coefficients.stack())
        self._place = {n - 1: k for k, n in enumerate(reversed(visited))}
        self.num_inference_steps = len(visited)
        self.timesteps = torch.tensor(list(self._place), dtype=torch.int64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean images at ``timesteps``, as ``DDPMScheduler.add_noise``."""
        return self._base.add_noise(original_samples, noise, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> OptimalVarianceSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step, computed in float32 at least; the result has ``sample``'s dtype.

        Args:
            model_output: [B, C, H, W], or [B, 2C, H, W] with the second output in the last C.
            timestep: one of ``self.timesteps``.
            sample: x_t, [B, C, H, W].
            variance_noise: standard normal [B, C, H, W] instead of a draw from ``generator``.

        Raises:
            ValueError: a timestep that is not visited, or a wrong number of output channels.
        """
        k = self._place.get(int(timestep))
        if k is None:
            raise ValueError(f"timestep must be one of {list(self._place)}, got {int(timestep)}")
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        first, second = self._split(model_output.to(x.dtype), x)
        c = ReverseCoefficients.unstack(self._tables.get("stack", x)[:, k].unbind())
        moments = reverse_moments(
            c,
            x,
            first,
            second,
            variance=self.config.variance,
            predicts=self._predicts,
            clip_x0=self.config.clip_sample,
            avg_cov=self.config.avg_cov,
        )
        x_s = moments.mean
        if k < len(self._place) - 1 and self._is_random:
            if variance_noise is None:
                like = {"device": sample.device, "dtype": sample.dtype}
                variance_noise = randn_tensor(sample.shape, generator=generator, **like)
            x_s = x_s + moments.variance.sqrt() * variance_noise.to(x)
        x_s, x0 = x_s.to(sample.dtype), moments.x0.to(sample.dtype)
        return OptimalVarianceSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)

    def __len__(self) -> int:
        return self.schedule.N

    @property
    def _is_random(self) -> bool:
        config = self.config
        return config.variance != "small" or config.forward == "ddpm" or config.eta > 0

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channels, needs = x.shape[1], self.config.variance in NEEDS_SECOND
        if output.shape[1] != 2 * channels and (needs or output.shape[1] != channels):
            allowed = 2 * channels if needs else f"{channels} or {2 * channels}"
            raise ValueError(
                f"model_output must have {allowed} channels with variance "
                f"{self.config.variance!r}, got {output.shape[1]}"
            )
        return output[:, :channels], output[:, channels:] if needs else None
