"""DDPM and DDIM with the optimal reverse variances, as a scheduler of diffusers."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sa_plugin._checks import check_choice, check_non_negative, check_positive, check_whole
from sa_plugin._tensors import expand
from sa_plugin.integrations.diffusers._configs import arguments_of
from sa_plugin.integrations.diffusers.models import (
    NO_SIGNAL,
    call_unet,
    check_terminal,
    noise_schedule,
    predicts_of,
    schedule_of,
)
from sa_plugin.prediction import to_eps, to_x0
from sa_plugin.sampling.jacobian import WAYS, Remainder, check_derived, lanczos_noise
from sa_plugin.sampling.reverse import ReverseCoefficients, moments_of
from sa_plugin.sampling.trajectory import resolve_trajectory
from sa_plugin.sampling.variance import (
    COVARIANCES,
    DERIVED,
    NEEDS_SECOND,
    check_gamma,
    check_variance,
)

SPACINGS = ("leading", "linspace", "trailing")
SAME = 1e-2  # of an output's norm: with and without a graph, kernels may differ


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
    """DDPM and DDIM with the optimal reverse variances, for the pipelines of diffusers.

    ``OptimalVarianceScheduler.from_config(pipeline.scheduler.config, variance="analytic",
    gamma=gamma)`` replaces a scheduler; see ``from_config``. The last step to x_0 adds no noise;
    ``DDPMScheduler``'s does unless its timestep is 0.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule: as in ``DDPMScheduler``.
        trained_betas, rescale_betas_zero_snr: the same; trained betas keep their float64 digits.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_sample, clip_sample_range: cut the predicted x_0 to [-r, r] and its covariance to
            [0, r^2].
        thresholding, dynamic_thresholding_ratio, sample_max_value: instead of clipping, divide x_0
            by a quantile of its size where that exceeds 1 (arXiv 2205.11487, section 2.3).
        variance, forward, eta, gamma, avg_cov, clip_sigma_idx, clip_pixel: as in ``Sampler``.
            "npr", "sn", "ocm" and "iddpm" need a model output of 2C channels; "probes" and
            "lanczos" need ``set_model``. At steps that hold nothing of x_0 (cum_alpha below 1e-12)
            its covariance cannot be had, and "small" is used.
        timestep_spacing, steps_offset: as in ``DDIMScheduler``.
        trajectory: a kind of ``choose_timesteps``, or an ascending list of steps in 1..T. It
            replaces ``timestep_spacing``. "linear" if neither is given.
        set_alpha_to_one: False ends at step 1 in place of x_0.
        probes, lanczos_steps: as in ``Sampler``. The signs come from the steps' ``generator``.

    Raises:
        ValueError: an unknown or impossible option, or a missing or unusable gamma.
    """

    _compatibles = [each.name for each in KarrasDiffusionSchedulers]  # noqa: RUF012
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
        trajectory: str | Sequence[int] | None = None,
        gamma: Sequence[float] | None = None,
        avg_cov: bool = False,
        clip_sigma_idx: int = 0,
        clip_pixel: float = 2.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        timestep_spacing: str | None = None,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        probes: int = 1,
        lanczos_steps: int = 3,
    ) -> None:
        check_variance(variance, forward, eta)
        check_derived(variance, probes, lanczos_steps, avg_cov)
        check_non_negative("clip_pixel", clip_pixel)
        check_positive("clip_sample_range", clip_sample_range)
        if variance == "analytic" and gamma is None:
            raise ValueError("variance 'analytic' needs gamma (estimate_gamma gives it), got None")
        self._predicts = predicts_of(prediction_type)
        self._model: tuple[Callable[..., Any], dict[str, Any]] | None = None
        exact = None if trained_betas is None else schedule_of(trained_betas)
        self._base = DDPMScheduler(
            num_train_timesteps if exact is None else exact.N,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=None if trained_betas is None else np.asarray(trained_betas),
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        if exact is None or rescale_betas_zero_snr:
            exact = noise_schedule(self._base)
        self.schedule = exact
        check_terminal(self.schedule, prediction_type, type(self).__name__)
        self.betas, self.alphas = self._base.betas, self._base.alphas
        self.alphas_cumprod = self._base.alphas_cumprod
        self._gamma = None if gamma is None else check_gamma(gamma, self.schedule.N)
        if timestep_spacing is None:
            timestep_spacing, trajectory = (
                "linspace",
                "linear" if trajectory is None else trajectory,
            )
        check_choice("timestep_spacing", timestep_spacing, SPACINGS)
        self._keep_plain(trained_betas, trajectory, timestep_spacing)
        if trajectory is None:
            self._visit(range(1, self.schedule.N + 1), None)
        else:
            self.set_timesteps(self.schedule.N if isinstance(trajectory, str) else None)

    def _keep_plain(self, trained_betas: Any, trajectory: Any, timestep_spacing: str) -> None:
        """Store the configuration as it is used, its arrays as lists: it is written as JSON.

        No entry counts as a default, which other schedulers' ``from_config`` would leave out.
        """
        plain: dict[str, Any] = {"num_train_timesteps": self.schedule.N, "_use_default_values": []}
        plain |= {"trajectory": trajectory, "timestep_spacing": timestep_spacing}
        if trained_betas is not None:
            plain["trained_betas"] = np.asarray(trained_betas, dtype=np.float64).tolist()
        if self._gamma is not None:
            plain["gamma"] = [0.0, *self._gamma[1:].tolist()]  # entry 0 is unused, perhaps NaN
        if not isinstance(trajectory, str | None):
            plain["trajectory"] = [int(n) for n in trajectory]
        self.register_to_config(**plain)

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **given: Any) -> Any:
        """A scheduler that does what the one of ``config`` does, with the arguments ``given``.

        From a scheduler of diffusers it takes the forward process, the prediction type, clipping or
        thresholding, the spacing of the timesteps and the last step. ``forward`` is "ddpm" for
        DDPMScheduler, ancestral ones and "sde" algorithms, else "ddim"; a solver's order and its
        other options go. A spacing is DDIM's of that name: with "linspace", DPM-Solver, DEIS and
        UniPC would stop above timestep 0. DDPMScheduler's ``variance_type`` becomes ``variance``;
        "small" else.

        Raises:
            TypeError: an argument that neither this class nor ``config`` has.
            ValueError: a config of another kind of scheduler, such as flow matching or EDM, or an
                option that cannot be kept, named.
        """
        if not isinstance(config, dict):
            raise ValueError(
                f"config must be a scheduler's, got {config!r}; from_pretrained reads a folder"
            )
        own = inspect.signature(cls).parameters
        for name in given:
            if name not in own and name not in config:
                raise TypeError(f"{cls.__name__} has no argument {name!r}, it has {', '.join(own)}")
        whole = {**config, **given}
        whole.pop("_use_default_values", None)
        whole |= arguments_of(config, given, own) | given
        return super().from_config(whole, return_unused_kwargs)

    @property
    def config(self) -> Any:
        """The configuration, a frozen dictionary."""
        caller = sys._getframe(1)  # DDIMPipeline(unet, scheduler) takes the configuration alone
        if type(caller.f_locals.get("self")).__name__ == "DDIMPipeline":
            warnings.warn(
                "DDIMPipeline(unet, scheduler) samples with diffusers' DDIMScheduler whatever it "
                "is given; set pipeline.scheduler = scheduler afterwards",
                stacklevel=3,
            )
        return self._internal_dict

    def set_model(self, model: Callable[..., Any], *, way: str = "auto", **kwargs: Any) -> None:
        """The network that "probes" and "lanczos" differentiate. No configuration keeps it.

        Args:
            model: ``(sample, timestep int64 [B], **kwargs)`` -> what the pipeline then hands to
                ``step``: its UNet or transformer, in eval mode, or a function where the pipeline
                does more, such as guidance.
            way: "auto", "vjp", "jvp" or "difference"; see ``sampling.jacobian``.
            kwargs: go to every call, such as ``class_labels`` or ``encoder_hidden_states``.

        Raises:
            ValueError: an unknown way; in ``step``, a network that cannot be differentiated, or
                whose output is not the one that ``step`` was given.
        """
        check_choice("way", way, ("auto", *WAYS))
        self._model, self._way = (model, kwargs), way

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps: the trajectory's length, or a descending list in 0..T-1."""
        T, trajectory = self.schedule.N, self.config.trajectory
        jump = None
        if timesteps is not None:
            steps = self._ascending(timesteps, num_inference_steps)
        elif trajectory is None:
            steps = self._spaced(num_inference_steps)
            jump = T // len(steps) if self.config.forward == "ddim" else None
        else:
            if isinstance(trajectory, str):
                check_whole("num_inference_steps", num_inference_steps, 1, T)
            steps = resolve_trajectory(self.schedule, num_inference_steps, trajectory, self._gamma)
        self._visit(steps, jump, device)

    def _visit(
        self, steps: Sequence[int], jump: int | None, device: str | torch.device | None = None
    ) -> None:
        """Visit these ascending steps; ``jump``: see ``previous_timestep``."""
        check_whole("clip_sigma_idx", self.config.clip_sigma_idx, 0, len(steps))
        self._jump = jump
        self._clip_until = [0, *steps][self.config.clip_sigma_idx]
        self._steps: dict[tuple[int, int, float], ReverseCoefficients] = {}
        self._visited = [n - 1 for n in reversed(steps)]
        self.num_inference_steps = len(steps)
        self.timesteps = torch.tensor(self._visited, dtype=torch.int64, device=device)

    def _ascending(self, timesteps: Sequence[int], count: int | None) -> list[int]:
        """The steps of the caller's own timesteps."""
        chosen, T = [int(t) for t in timesteps], self.schedule.N
        if not chosen or chosen != sorted({*chosen} & {*range(T)}, reverse=True):
            raise ValueError(f"timesteps must fall strictly inside 0..{T - 1}, got {chosen}")
        if count not in (None, len(chosen)):
            raise ValueError(f"num_inference_steps must be {len(chosen)} or None, got {count!r}")
        return [t + 1 for t in reversed(chosen)]

    def _spaced(self, count: Any) -> list[int]:
        """Ascending steps in diffusers' spacings (arXiv 2305.08891, table 2)."""
        T, spacing, offset = self.schedule.N, self.config.timestep_spacing, self.config.steps_offset
        check_whole("num_inference_steps", count, 1, T)
        if spacing == "leading":
            timesteps = np.arange(count) * (T // count) + offset
            check_whole("steps_offset", offset, 0, T - 1 - int(timesteps[-1] - offset))
        elif spacing == "linspace":
            timesteps = np.linspace(0, T - 1, count).round()
        else:
            timesteps = np.arange(T, 0, -T / count).round()[count - 1 :: -1] - 1
        return [int(t) + 1 for t in timesteps]

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep after a step from ``timestep``; -1 for the clean image.

        It is the next timestep that is visited. DDIM with a ``timestep_spacing`` steps by
        T // num_inference_steps, as ``DDIMScheduler`` does, whatever is visited next.
        """
        t = int(timestep)
        check_whole("timestep", t, 0, self.schedule.N - 1)
        if self._jump is not None:
            return max(t - self._jump, -1)
        return next((s for s in self._visited if s < t), -1)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean images at ``timesteps``, as ``DDPMScheduler.add_noise``."""
        return self._base.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v of clean images at ``timesteps``, as ``DDPMScheduler.get_velocity``."""
        return self._base.get_velocity(sample, noise, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        variance_noise: Tensor | None = None,
    ) -> OptimalVarianceSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step, computed in float32 at least; the result has ``sample``'s dtype.

        Args:
            model_output: [B, C, H, W], or [B, 2C, H, W] with the second output in the last C.
            timestep: any of 0..T-1; ``previous_timestep`` says where the step leads.
            sample: x_t, [B, C, H, W].
            eta: as in ``Sampler``; 0, which pipelines always pass, leaves the scheduler's own.
            use_clipped_model_output: take the predicted noise from x_t and the clipped x_0.
            variance_noise: standard normal [B, C, H, W] instead of a draw from ``generator``.

        Raises:
            ValueError: a timestep outside 0..T-1, a wrong number of output channels, or an eta
                that does not fit ``forward``; "probes" or "lanczos" without ``set_model``, or with
                a network that does not give this ``model_output``.
        """
        config = self.config
        if eta != 0:
            check_variance(config.variance, config.forward, eta)
        eta = eta or config.eta
        t = int(timestep) + 1
        s = max(self.previous_timestep(timestep) + 1, 0 if config.set_alpha_to_one else 1)
        c = self._coefficients(s, t, eta)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        first, second = self._split(model_output.to(x.dtype), x)
        eps, x0 = (to(first, x, c.a, c.b, self._predicts) for to in (to_eps, to_x0))
        clip: float = config.clip_sample and config.clip_sample_range
        if config.thresholding:
            x0, clip = self._thresholded(x0), 1.0
        elif clip:
            x0 = x0.clamp(-clip, clip)
        if use_clipped_model_output:
            eps = to_eps(x0, x, c.a, c.b, "x0")
        variance = config.variance
        has_signal = c.a**2 >= NO_SIGNAL or variance not in (*COVARIANCES, *DERIVED)
        if not has_signal or s == t or (s == 0 and variance in DERIVED):
            variance = "small"
        like = {"device": sample.device, "dtype": sample.dtype}
        draw = partial(randn_tensor, sample.shape, generator=generator, **like)
        matrix = self._remainder(x, t, sample.dtype) if variance in DERIVED else None
        if matrix is not None and variance == "probes":
            second = matrix.diagonal(draw().sign() for _ in range(config.probes))
        moments = moments_of(
            c,
            x,
            x0,
            eps,
            second,
            variance="small" if variance == "lanczos" else variance,
            clip_x0=clip,
            avg_cov=config.avg_cov,
        )
        x_s = moments.mean
        if s > 0 and (config.variance != "small" or config.forward == "ddpm" or eta > 0):
            z = (draw() if variance_noise is None else variance_noise).to(x)
            if matrix is not None and variance == "lanczos":
                x_s = x_s + lanczos_noise(matrix, c, z, config.lanczos_steps)
            else:
                x_s = x_s + moments.variance**0.5 * z
        if matrix is not None:
            self._way = matrix.way  # what was found need not be looked for again
            _check_same(matrix.output, first, model_output.dtype, t - 1)
        x_s, x0 = x_s.to(sample.dtype), x0.to(sample.dtype)
        return OptimalVarianceSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)

    def __len__(self) -> int:
        return self.schedule.N

    def _coefficients(self, s: int, t: int, eta: float) -> ReverseCoefficients:
        """Plain numbers for the step from t to s."""
        if (s, t, eta) not in self._steps:
            found = ReverseCoefficients.between(
                self.schedule,
                np.array([s]),
                np.array([t]),
                forward=self.config.forward,
                eta=eta,
                gamma=self._gamma,
                clip_until=self._clip_until,
                clip_pixel=self.config.clip_pixel,
            )
            self._steps[s, t, eta] = ReverseCoefficients.unstack(found.stack()[:, 0].tolist())
        return self._steps[s, t, eta]

    def _remainder(self, x: Tensor, t: int, dtype: torch.dtype) -> Remainder:
        if self._model is None:
            raise ValueError(
                f"variance {self.config.variance!r} needs the network's derivative: call "
                "scheduler.set_model(unet) first"
            )
        model, kwargs = self._model
        return Remainder(
            _AtSteps(model, dtype),
            self.schedule,
            x,
            torch.full((len(x),), t, device=x.device),
            way=self._way,
            predicts=self._predicts,
            **kwargs,
        )

    def _thresholded(self, x0: Tensor) -> Tensor:
        sizes, ratio = x0.abs().flatten(1), self.config.dynamic_thresholding_ratio
        limit = expand(sizes.quantile(ratio, dim=1).clamp(1, self.config.sample_max_value), x0)
        return x0.clamp(-limit, limit) / limit

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channels, needs = x.shape[1], self.config.variance in NEEDS_SECOND
        if output.shape[1] != 2 * channels and (needs or output.shape[1] != channels):
            allowed = 2 * channels if needs else f"{channels} or {2 * channels}"
            raise ValueError(
                f"model_output must have {allowed} channels with variance "
                f"{self.config.variance!r}, got {output.shape[1]}"
            )
        return output[:, :channels], output[:, channels:] if needs else None


class _AtSteps:
    """The network as a pipeline calls it, in the sample's dtype, for (x, n in 1..N)."""

    def __init__(self, model: Callable[..., Any], dtype: torch.dtype) -> None:
        self.model = model
        self._dtype = dtype

    def __call__(self, x: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
        return call_unet(x.to(self._dtype), n - 1, unet=self.model, **kwargs)


def _check_same(found: Tensor, given: Tensor, dtype: torch.dtype, timestep: int) -> None:
    """ValueError unless both are outputs of one network in this precision."""
    apart = float((found - given).norm() / given.norm())
    if apart > max(SAME, torch.finfo(dtype).eps ** 0.5):
        raise ValueError(
            "set_model needs the network whose output step gets, with the pipeline's arguments and "
            f"guidance: at timestep {timestep} it differs from model_output by {apart:.2g} of it"
        )
