"""The one sampler: any forward process x any reverse variance x any trajectory.

It loops over ``reverse.reverse_moments``. The loop never waits for the device: the coefficients are
plain numbers, and the noise is drawn on the network's device. A NaN of the network is noted on the
device and reported at the end of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._arrays import added
from sa_plugin._checks import check_choice, check_non_negative, check_whole
from sa_plugin._execution import NetworkCall, module_of
from sa_plugin._execution import to_cpu as batches_to_cpu
from sa_plugin._tensors import FirstBad, follow
from sa_plugin.prediction import PREDICTS
from sa_plugin.sampling.batches import (
    MOST,
    BlockNoise,
    check_shape,
    check_x_init,
    noise_for,
    parts_of,
    shown,
)
from sa_plugin.sampling.jacobian import (
    WAYS,
    Probed,
    Remainder,
    check_derivable,
    check_derived,
    lanczos_noise,
)
from sa_plugin.sampling.reverse import (
    ReverseCoefficients,
    ReverseMoments,
    reverse_moments,
    split_output,
)
from sa_plugin.sampling.trajectory import resolve_trajectory
from sa_plugin.sampling.variance import DERIVED, check_gamma, check_variance
from sa_plugin.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class ReverseStep:
    """One step of a chain, from x_t to x_s; x0 and eps as predicted at t (x0 after clipping)."""

    t: int
    s: int
    x_t: Tensor
    x_s: Tensor
    x0: Tensor
    eps: Tensor


class Sampler:
    """Draws images by a reverse process of any kind.

    The network is called as ``model(x [B, ...], n int64 [B] in 1..N, **model_kwargs)`` and returns
    eps in x's shape, or the pair (eps, second). Gradients are off. The sampler does not change the
    network's train/eval mode: put it into eval mode first, unless dropout is wanted.

    The network gets x in its parameters' type, the dtype of the first floating-point parameter of
    the module behind it. Its output is cast back to the chain's type. Without ``x_init`` the chain
    is float64 for a float64 network and float32 for any other, half precision included. Under
    ``autocast`` the chain is float32 and x is not cast.

    Args:
        forward: "ddpm" (arXiv 2006.11239) or "ddim" (2010.02502) with ``eta`` in [0, 1].
        variance: "small", "big", "iddpm" (2102.09672), "analytic" (2201.06503), "npr", "sn"
            (2206.07309), "ocm" (2406.10808) or "heuristic"; see ``variance.covariance``. npr, sn,
            ocm and iddpm need a pair. "probes" and "lanczos" need the network's derivative and
            nothing else; see ``jacobian``.
        steps: length of the trajectory; may be left out if ``trajectory`` is a list.
        trajectory: a kind of ``choose_timesteps``, or an ascending list of steps in 1..N. Steps may
            repeat, as those of the hosts' codes do, unless ``variance`` is "iddpm".
        gamma: Gamma_n = E mean(eps_pred^2), [N+1], for "analytic" and for "dp_seg".
        predicts: what the network's (first) output is: "eps", "x0" or "v".
        clip_x0: cut the predicted x_0 to [-1, 1] and its covariance to [0, 1].
        avg_cov: average the covariance over each image's dimensions. No effect on "small", "big"
            and "iddpm", which have no covariance.
        clip_sigma_idx, clip_pixel: limit the noise of steps that end at
            s <= timesteps[clip_sigma_idx]: it moves a value by at most clip_pixel of 255 grey
            levels on average. Entry 0 is the clean image, so 0 means never.
        probes: random signs a step, for "probes": an estimate of what "ocm" learns.
        lanczos_steps: steps of Lanczos a step, for "lanczos": noise with the full covariance
            lambda^2 I + weight Cov[x_0 | x_t]. ``clip_pixel`` limits it in every direction; no
            other clip does, and there is no diagonal to average.
        way: how these two differentiate the network: "auto", "vjp", "jvp" or "difference".
        device: where to sample; by default where the model's parameters are, else the CPU.
        channels_last, autocast, compile: how the network is run; see ``NetworkCall``. The chain's
            arithmetic keeps its precision. Only ``compile`` may change the order of operations.

    Raises:
        ValueError: an unknown or impossible option, or a missing or unusable gamma.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        forward: str = "ddpm",
        eta: float = 0.0,
        variance: str = "small",
        steps: int | None = None,
        trajectory: str | Sequence[int] = "linear",
        gamma: ArrayLike | None = None,
        predicts: str = "eps",
        clip_x0: bool = True,
        avg_cov: bool = False,
        clip_sigma_idx: int = 0,
        clip_pixel: float = 2,
        probes: int = 1,
        lanczos_steps: int = 3,
        way: str = "auto",
        device: torch.device | str | None = None,
        channels_last: bool = False,
        autocast: str | None = None,
        compile: bool = False,
    ) -> None:
        check_variance(variance, forward, eta)
        check_choice("predicts", predicts, PREDICTS)
        check_non_negative("clip_pixel", clip_pixel)
        if variance == "analytic" and gamma is None:
            raise ValueError("variance 'analytic' needs gamma (estimate_gamma gives it), got None")
        check_derived(variance, probes, lanczos_steps, avg_cov)
        check_choice("way", way, ("auto", *WAYS))
        if variance in DERIVED:
            check_derivable(model)
        values = None if gamma is None else check_gamma(gamma, schedule.N)
        self.model = model
        self._network = NetworkCall(
            model, channels_last=channels_last, autocast=autocast, compile=compile
        )
        self._probed: Probed | None = None
        if variance == "probes":
            options: dict[str, Any] = {"way": way, "predicts": predicts}
            self._probed = Probed(self._network, schedule, probes=probes, **options)
        self.schedule = schedule
        # iddpm's variance has no value where a step adds no noise.
        self.timesteps = resolve_trajectory(
            schedule, steps, trajectory, values, repeats=variance != "iddpm"
        )
        check_whole("clip_sigma_idx", clip_sigma_idx, 0, len(self.timesteps))
        self.coefficients = ReverseCoefficients.build(
            schedule,
            self.timesteps,
            forward=forward,
            eta=eta,
            gamma=values,
            clip_sigma_idx=clip_sigma_idx,
            clip_pixel=clip_pixel,
        )
        # A step's coefficients are plain numbers: kernels take them, nothing moves to a device.
        columns = self.coefficients.stack().T.tolist()
        self._steps = [ReverseCoefficients.unstack(column) for column in columns]
        self._variance = variance
        self._lanczos_steps, self._way = lanczos_steps, way
        self._options: dict[str, Any] = {
            "predicts": predicts,
            "clip_x0": clip_x0,
            "avg_cov": avg_cov,
        }
        self._is_random = variance != "small" or forward == "ddpm" or eta > 0
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where samples are drawn."""
        if self._device is not None:
            return torch.device(self._device)
        module = module_of(self.model)
        parameters = () if module is None else module.parameters()
        return next((p.device for p in parameters), torch.device("cpu"))

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int = 0,
        batch_size: int | None = None,
        x_init: Tensor | None = None,
        noise: Callable[[int], Tensor] | None = None,
        first: int = 0,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Images of ``shape`` [B, ...] in the units of x_0, on the sampler's device.

        Args:
            seed: whole number >= 0. Image i depends only on (seed, first + i), not on B or
                ``batch_size``. This holds to the last bit if the network treats images one by one
                (for "iddpm" up to that bit: a CPU's vectorised power differs from its scalar one).
            batch_size: images in one network call; all of them by default.
            x_init: the x_N to start from, [B, ...]. Its dtype is the chain's and the result's.
            noise: gives the k-th draw, [B, ...], k = 0 for the first step; the last step has none.
                Called once for each step of each batch.
            first: number of the first image, to continue a run or to divide it.
            progress: show a bar over the steps of each batch (extra "progress").
            model_kwargs: go to every call; tensors of length B (labels) follow their images.

        Raises:
            ValueError: bad arguments; a network output of another shape, or not finite.
        """
        shape = check_shape(shape)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1, MOST)
        check_x_init(x_init, shape)
        done = []
        for part in parts_of(shape[0], batch_size or shape[0]):
            chain = self.iterate(
                (part.stop - part.start, *shape[1:]),
                seed=seed,
                x_init=None if x_init is None else x_init[part],
                noise=None if noise is None else noise_for(noise, shape, part),
                first=first + part.start,
                **follow(model_kwargs, shape[0], part),
            )
            for step in shown(chain, len(self.timesteps), "step", progress):
                x = step.x_s
            done.append(x.contiguous())
        return done[0] if len(done) == 1 else torch.cat(done)

    def iterate(
        self,
        shape: Sequence[int],
        *,
        seed: int = 0,
        x_init: Tensor | None = None,
        noise: Callable[[int], Tensor] | None = None,
        first: int = 0,
        **model_kwargs: Any,
    ) -> Iterator[ReverseStep]:
        """The steps of one batch's chain as they are taken; arguments as in ``sample``.

        For callers that need more than the images, such as a film strip or the gap along a chain.
        ``x_s`` of one step is ``x_t`` of the next; the last ``x_s`` is the image.

        A non-finite network output is reported after the last step, so no step waits for the
        device.
        """
        shape = check_shape(shape)
        check_whole("seed", seed, 0, MOST)
        check_whole("first", first, 0, MOST)
        check_x_init(x_init, shape)
        dtype = self._network.chain_dtype if x_init is None else x_init.dtype
        random = BlockNoise(seed, first, shape, dtype, self.device)
        start = random.draw()  # also with x_init, so that the steps' noise stays the same
        x = self._network.arrange(start if x_init is None else x_init.to(self.device))
        signs = BlockNoise(seed, first, shape, dtype, self.device, stream=1)
        draw = (lambda k: random.draw()) if noise is None else noise_for(noise, shape, slice(None))
        return self._chain(x, draw, lambda: signs.draw().sign(), model_kwargs)

    def stream(
        self,
        n_images: int,
        image_shape: Sequence[int],
        *,
        seed: int = 0,
        batch_size: int,
        first: int = 0,
        progress: bool = False,
        to_cpu: bool = False,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        """Images first..first + n_images - 1, made as they are asked for.

        Yields uint8 batches [<= batch_size, *image_shape], values 0..255, on the sampler's device.
        With ``to_cpu`` they are in the CPU's memory: each is copied while the next one is made.
        Arguments as in ``sample``; ``progress`` counts batches.
        """
        check_whole("n_images", n_images, 1, MOST)
        check_whole("batch_size", batch_size, 1, MOST)
        check_whole("seed", seed, 0, MOST)
        check_whole("first", first, 0, MOST)
        _, *size = check_shape((n_images, *image_shape))
        parts = parts_of(n_images, batch_size)
        batches = (
            to_uint8(
                self.sample(
                    (part.stop - part.start, *size),
                    seed=seed,
                    first=first + part.start,
                    **follow(model_kwargs, n_images, part),
                )
            )
            for part in shown(parts, len(parts), "batch", progress)
        )
        return batches_to_cpu(batches) if to_cpu else batches

    def _chain(
        self,
        x: Tensor,
        draw: Callable[[int], Tensor],
        signs: Callable[[], Tensor],
        kwargs: dict[str, Any],
    ) -> Iterator[ReverseStep]:
        descending = self.timesteps[::-1]
        first_bad = FirstBad()
        pairs = zip(descending, [*descending[1:], 0], strict=True)
        for k, (c, (t, s)) in enumerate(zip(self._steps, pairs, strict=True)):
            # A step is handed out in the caller's own gradient mode.
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                n = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
                is_random = s > 0 and self._is_random
                if is_random and self._variance in DERIVED:
                    moments, noise = self._derived(c, x, n, draw(k).to(x), signs, kwargs)
                    first_bad.note(t, moments.eps, noise)
                    x_s = moments.mean + noise.to(x)
                else:
                    variance = "small" if self._variance in DERIVED else self._variance
                    output, second = split_output(self._network(x, n, **kwargs), x, variance)
                    first_bad.note(t, output, second)
                    moments = reverse_moments(
                        c, x, output, second, variance=variance, **self._options
                    )
                    x_s = moments.mean
                    if is_random:
                        x_s = added(x_s, draw(k).to(x) * moments.variance**0.5)
            yield ReverseStep(t, s, x, x_s, moments.x0, moments.eps)
            x = x_s
        first_bad.refuse()

    def _derived(
        self,
        c: ReverseCoefficients,
        x: Tensor,
        n: Tensor,
        z: Tensor,
        signs: Callable[[], Tensor],
        kwargs: dict[str, Any],
    ) -> tuple[ReverseMoments, Tensor]:
        """A step's moments, and z turned into its noise, by the network's derivative at x."""
        if self._probed is not None:
            output, diagonal = self._probed(x, n, draw=signs, **kwargs)
            moments = reverse_moments(c, x, output, diagonal, variance="ocm", **self._options)
            return moments, z * moments.variance**0.5
        matrix = Remainder(
            self._network,
            self.schedule,
            x,
            n,
            way=self._way,
            predicts=self._options["predicts"],
            **kwargs,
        )
        noise = lanczos_noise(matrix, c, z, self._lanczos_steps)
        self._way = matrix.way  # what was found need not be looked for again
        moments = reverse_moments(c, x, matrix.output, variance="small", **self._options)
        return moments, noise


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded and clipped, on x's device."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
