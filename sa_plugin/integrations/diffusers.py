r"""diffusers: the SA loss in its training loops, the optimal reverse variances as a scheduler.

diffusers counts timesteps 0..T-1, so that its timestep is n - 1, and keeps float32 tables. Its
UNets return an output object with ``.sample``; learned variances and second heads are channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sa_plugin._checks import check_choice, check_non_negative, check_whole
from sa_plugin._extras import explain_absence
from sa_plugin._tensors import DeviceTables
from sa_plugin.loss import SALoss, SALossOutput
from sa_plugin.reverse import ReverseCoefficients, reverse_moments
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.trajectory import resolve_trajectory
from sa_plugin.variance import NEEDS_SECOND, check_gamma, check_variance
from sa_plugin.wrappers import EpsModel

try:
    from diffusers import DDPMScheduler, SchedulerMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError as error:
    raise explain_absence(error, "diffusers", "diffusers") from None

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The float64 schedule of a diffusers scheduler, step n for its timestep n - 1.

    Built from its ``betas``: a float32 beta is good to 6e-8 of itself, and so then is every table.
    ``alphas_cumprod`` would not do: 1 - alphas_cumprod[0] has lost half of its digits in float32.

    Raises:
        ValueError: no betas, betas outside (0, 1) (schedules rescaled to a zero terminal SNR end at
            1), or ``alphas_cumprod`` that does not belong to them.
    """
    if isinstance(scheduler, OptimalVarianceScheduler):
        return scheduler.schedule
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor):
        raise ValueError(f"{type(scheduler).__name__} has no betas to build a noise schedule from")
    schedule = NoiseSchedule.from_betas(betas.detach().double().cpu().numpy())
    cumulated = getattr(scheduler, "alphas_cumprod", None)
    if cumulated is not None:
        values = cumulated.detach().double().cpu().numpy()
        if not np.allclose(values, schedule.cum_alphas[1:], rtol=1e-3, atol=0):
            raise ValueError(
                f"alphas_cumprod of {type(scheduler).__name__} is not the cumulative product of "
                "1 - betas; a scheduler that changes one of them alone has no forward process"
            )
    return schedule


def unet_model(unet: Any, scheduler: Any, *, second: bool = False) -> Any:
    """A diffusers UNet as the network that ``Sampler``, ``estimate_gamma`` and ``SALoss`` call.

    Args:
        unet: ``(x, timestep, **kwargs)`` -> an object with ``.sample``, a tuple or a tensor.
        scheduler: what it was trained with, for the schedule and ``prediction_type``.
        second: return the pair (eps, the channels after the first C), as "npr", "sn" and "iddpm"
            need it; else further channels are cut off.

    Raises:
        ValueError: an unknown ``prediction_type``, or a scheduler that ``noise_schedule`` refuses.
    """
    model = EpsModel(
        _UNet(unet, cut=not second),
        noise_schedule(scheduler),
        index_from=0,
        predicts=_predicts(scheduler.config.prediction_type),
        output="channels" if second else "one",
    )
    return model.with_second if second else model


class DiffusersSALoss:
    """L_simple + lambda L_sa with the arguments that a diffusers training loop has at hand::

        loss = F.mse_loss(model_output, noise)                                        # before
        loss = sa_loss(model, clean_images, noise, timesteps, model_output).total     # after

    Both terms compare noises, whatever the network predicts: the epsilon loss, for "sample" the
    official example's SNR-weighted loss, for "v_prediction" cum_alpha times the v loss. Means over
    an image's dimensions, as ``F.mse_loss`` has it. Learned-range channels get no gradient from it.

    Args:
        scheduler: the noise scheduler of the loop.
        K, lam, options: as in ``SALoss``.

    Raises:
        ValueError: as ``SALoss`` and ``unet_model``.
    """

    def __init__(
        self,
        scheduler: Any,
        K: int = 2,
        lam: float = 1.0,
        *,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        self.scheduler = scheduler
        self.loss = SALoss(noise_schedule(scheduler), K, lam, reduction=reduction, **options)
        self._eps_model = EpsModel(
            _call_unet,
            self.loss.schedule,
            index_from=0,
            predicts=_predicts(scheduler.config.prediction_type),
        )

    def __call__(
        self,
        unet: Any,
        clean_images: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        model_output: Any = None,
        *,
        noises: Tensor | None = None,
        generator: torch.Generator | None = None,
        **unet_kwargs: Any,
    ) -> SALossOutput:
        """The loss; K - 1 network calls where ``model_output`` is handed in, else K.

        Args:
            unet: see ``unet_model``.
            clean_images: [B, C, H, W] in [-1, 1].
            noise: [B, C, H, W], the noise at ``timesteps``.
            timesteps: integers [B] in 0..T-1.
            model_output: what the network returned at ``scheduler.add_noise(clean_images, noise,
                timesteps)``, with its graph; None: it is called here.
            noises: [K-1, B, C, H, W], the noises of the window's other steps; drawn if not given.
            unet_kwargs: go to every call; tensors of length B (``class_labels``) follow their rows.
        """
        n = timesteps + 1
        noisy = self.scheduler.add_noise(clean_images, noise, timesteps)
        if model_output is None:
            own = self._eps_model(noisy, n.to(noisy.device), unet=unet, **unet_kwargs)
        else:
            own = self._eps_model.eps_of(_unpack(model_output, noisy, cut=True), noisy, n)
        simple, sa = self.loss.sa_term(
            self._eps_model,
            clean_images,
            n,
            noise,
            own,
            noise=noises,
            generator=generator,
            unet=unet,
            **unet_kwargs,
        )
        total = simple.mean() + self.loss.lam * sa.mean()
        return SALossOutput(total, simple.mean(), sa.mean(), n, simple, sa)


@dataclass
class OptimalVarianceSchedulerOutput(BaseOutput):
    """What ``OptimalVarianceScheduler.step`` gives, [B, C, H, W] each.

    Attributes:
        prev_sample: x_s, the next model input.
        pred_original_sample: the predicted x_0, after clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class OptimalVarianceScheduler(SchedulerMixin, ConfigMixin):
    """DDPM and DDIM with the optimal reverse variances, for ``DDPMPipeline`` and its like.

    ``OptimalVarianceScheduler.from_config(ddpm.config, variance="analytic", gamma=gamma)`` takes
    over the forward process, ``prediction_type`` and ``clip_sample`` of a scheduler; its
    ``variance_type``, ``timestep_spacing`` and ``steps_offset`` are what ``variance`` and
    ``trajectory`` replace. The last step adds no noise.

    Name the arguments: diffusers' ``from_config`` takes one that was given by position for a
    default (``DDPMScheduler(50)`` is carried over as 1000 steps, by its own schedulers as well).

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as in
            ``DDPMScheduler``; ``trained_betas`` keep their float64 digits.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_sample: cut the predicted x_0 to [-1, 1] and its covariance to [0, 1].
        variance, forward, eta, gamma, avg_cov, clip_sigma_idx, clip_pixel: as in ``Sampler``.
            "npr", "sn" and "iddpm" need a model output of 2C channels.
        trajectory: a kind of ``choose_timesteps``, or an ascending list of steps in 1..T.
        clip_sample_range, thresholding, rescale_betas_zero_snr: only diffusers' defaults are
            possible; they are here so that a config with others is refused and not misread.

    Raises:
        ValueError: an unknown or impossible option, or a gamma that is missing or unusable.
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
        self._predicts = _predicts(prediction_type)
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
        """Arrays of the configuration as lists: it is written as JSON."""
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
        """Choose the timesteps: so many of the trajectory, or a descending list in 0..T-1."""
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
        """One reverse step; in float32 at least, the result in ``sample``'s dtype.

        Args:
            model_output: [B, C, H, W], or [B, 2C, H, W] with the second output in the last C.
            timestep: one of ``self.timesteps``.
            sample: x_t, [B, C, H, W].
            variance_noise: standard normal [B, C, H, W] instead of a draw from ``generator``.

        Raises:
            ValueError: a timestep that is not visited, or an output of other channels.
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


class _UNet(nn.Module):
    """A UNet's call with its output unpacked; holds it as a module, so that its device is seen."""

    def __init__(self, unet: Any, cut: bool) -> None:
        super().__init__()
        self.unet = unet
        self.cut = cut

    def forward(self, x: Tensor, time: Tensor, **kwargs: Any) -> Tensor:
        return _call_unet(x, time, unet=self.unet, cut=self.cut, **kwargs)


def _call_unet(x: Tensor, time: Tensor, *, unet: Any, cut: bool = True, **kwargs: Any) -> Tensor:
    return _unpack(unet(x, time, **kwargs), x, cut)


def _unpack(output: Any, x: Tensor, cut: bool) -> Tensor:
    """The tensor in what a UNet returned; ``cut`` leaves x's channels."""
    sample = getattr(output, "sample", None)
    if sample is None:
        sample = output[0] if isinstance(output, tuple) else output
    return sample[:, : x.shape[1]] if cut else sample


def _predicts(prediction_type: str) -> str:
    check_choice("prediction_type", prediction_type, tuple(PREDICTION_TYPES))
    return PREDICTION_TYPES[prediction_type]
