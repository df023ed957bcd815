r"""How far a sampling chain drifts from the chain that it imitates: the total gap of Theorem 1.

Source: "On Inference Stability for Diffusion Models" (AAAI 2024, arXiv 2312.12431), Theorems 1, 2.

Two chains start from the same x_M and take the same draws. They differ in the x_0 of the posterior
q(x_{i-1} | x_i, x_0): one has the true x_0, the other the network's. Along the network's chain, let
e_i = f(x_i, i) - eps_i with eps_i = (x_i - sqrt(cum_alpha_i) x_0) / sqrt(cum_beta_i). At x_1 the
chains differ by d(x_0) = sum_{i=2}^M tau_i e_i (Theorem 1): network's x_1 = true x_1 - d.

Note that eps_i belongs to x_0 and to the x_i that the chain has reached, which includes the errors
of earlier steps. On independent forward samples the errors cancel and the sum is far smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sa_plugin._checks import check_finite, check_hold_images, check_images, check_whole
from sa_plugin._tensors import expand, follow
from sa_plugin.bounds.likelihood import mean_with_error
from sa_plugin.sampling.batches import MOST, BlockNoise, parts_of
from sa_plugin.sampling.sampler import ReverseStep, Sampler
from sa_plugin.schedule import FloatArray, NoiseSchedule
from sa_plugin.tau import TauTable, gamma_1, gamma_2


class Theorem2(NamedTuple):
    """upper >= sa >= lower, in squared units of eps, summed over an image's dimensions.

    upper: (N-1)/(N+K) E[tau_t^2 |e_t|^2], t uniform on 2..N; K = 1 makes it equal to ``sa``.
    sa: L_sa, the mean over all N+K windows of |(1/K) sum_{s in window} tau_s e_s|^2.
    lower: E|d(x_0)|^2 / (N+K)^2.
    """

    upper: float
    sa: float
    lower: float


@dataclass(frozen=True, eq=False)
class GapCurve:
    """The gap along reverse chains from x_start, as L2 norms over an image's dimensions.

    Attributes:
        timesteps: int64 [T] = start, start - 1, ..., 2: the steps that contribute.
        mean, stderr: float64 [T]; mean over images and its standard error, at step n, of
            |sum_{i=n}^start tau_i e_i|: what the steps so far add to the gap at x_1. The last entry
            is Theorem 1's total gap.
        distance_mean, distance_stderr: float64 [T]; the same of |x_{n-1} - true x_{n-1}|, the
            distance of the two chains after step n. The last entries equal those of ``mean`` and
            ``stderr``.
        total: float64 [B], each image's |d(x_0)|.
        end: float64 [B], each image's |predicted x_0 - x_0| at the end of the chain.
    """

    timesteps: np.ndarray
    mean: FloatArray
    stderr: FloatArray
    distance_mean: FloatArray
    distance_stderr: FloatArray
    total: FloatArray
    end: FloatArray


def total_gap(schedule: NoiseSchedule, errors: Tensor) -> Tensor:
    """d(x_0) = sum_{i=2}^M tau_i e_i along chains from x_M (Theorem 1).

    Args:
        errors: e_n, [M+1, ...], entry n of step n, M in 2..N; entries 0 and 1 have no weight and
            may hold anything.

    Returns:
        d, of an entry's shape, in units of x.

    Raises:
        ValueError: a wrong number of entries, or not floating point.
    """
    return _weighted(schedule, errors).sum(0)


def theorem2_bounds(schedule: NoiseSchedule, errors: Tensor, K: int) -> Theorem2:
    """L_sa of windows of K steps and its two bounds, all from the same errors (Theorem 2).

    The windows are the paper's: first steps 1-K..N, tau zero outside 2..N. The means over t and
    over windows are exact. The mean over x_0 is the mean over the given images.

    Args:
        errors: as in ``total_gap`` with images, [M+1, B, ...]; steps above M count as free of
            error.
        K: window length, in 1..N.

    Raises:
        ValueError: a bad argument.
    """
    check_whole("K", K, 1, schedule.N)
    if isinstance(errors, Tensor) and errors.ndim < 2:
        raise ValueError(f"errors must be [M+1, B, ...], got shape {tuple(errors.shape)}")
    weighted = _weighted(schedule, errors)
    weighted = weighted.reshape(*weighted.shape[:2], -1)
    windows = schedule.N + K
    upper = _mean_square(weighted).sum() / windows
    lower = _mean_square(weighted.sum(0, keepdim=True)).sum() / windows**2
    blank = weighted.new_zeros(K - 1, *weighted.shape[1:])
    padded = torch.cat([blank, weighted, blank])
    held = len(padded) - K + 1  # windows that hold any step of 2..M; the others are zero
    sums = sum((padded[k : k + held] for k in range(K)), padded.new_zeros(())) / K
    return Theorem2(float(upper), float(_mean_square(sums).sum() / windows), float(lower))


def step_error(schedule: NoiseSchedule, step: ReverseStep, x0: Tensor) -> Tensor:
    """e_t of one step of ``Sampler.iterate``, relative to the true x_0, float64 [B, ...].

    It is computed from the predicted x_0: e_t = (x_0 - x_0 predicted) sqrt(cum_alpha_t /
    cum_beta_t), the error that the chain has used. Without ``clip_x0`` this is f(x_t, t) - eps_t.
    Where the prediction was clipped, it is the error of the clipped prediction.
    """
    ratio = (schedule.cum_alphas[step.t] / schedule.cum_betas[step.t]) ** 0.5
    return ratio * (x0.double() - step.x0.double())


def gap_along_chain(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    start: int,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    stochastic: bool = True,
    predicts: str = "eps",
    clip_x0: bool = True,
    **model_kwargs: Any,
) -> GapCurve:
    """Diffuse images to x_start, run DDPM's reverse chain back, and follow Theorem 1's sum.

    The chain takes every step start, start - 1, ..., 1 with the ``small`` variance, that of
    q(x_{i-1} | x_i, x_0): ``start`` network evaluations per image. Gradients are off.

    Args:
        model: ``(x [B, ...], n int64 [B] in 1..N, **model_kwargs)`` -> eps, or a pair that begins
            with eps. As in ``Sampler``, its train/eval mode is not changed, and it gets x in its
            parameters' type.
        x0: real images in [-1, 1], floating point [B, ...], B >= 2, on the network's device. Their
            dtype is the chain's; the gap is summed in float64.
        start: in 2..N; the paper's Figure 4 has 300.
        seed: whole number >= 0. Image i's noise depends only on (seed, first + i), so networks are
            compared on equal draws.
        first: number of the first image, to divide a run.
        batch_size: images in one network call; all of them by default.
        stochastic: False makes no draws and follows the posterior means.
        predicts, clip_x0: as in ``Sampler``. With ``clip_x0`` the chain is the one that makes the
            sampler's images, and e_i is that of ``step_error``. Theorem 1 holds in both cases.
        model_kwargs: go to every call; tensors of length B (labels) follow their images.

    Raises:
        ValueError: a bad argument; a network output of another shape, or not finite.
    """
    check_hold_images("x0", x0, 2)
    check_finite("x0", x0)
    check_images(x0, wait=True)
    check_whole("start", start, 2, schedule.N)
    check_whole("seed", seed, 0, MOST)
    check_whole("first", first, 0, MOST)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1, MOST)
    sampler = Sampler(
        model,
        schedule,
        trajectory=range(1, start + 1),
        predicts=predicts,
        clip_x0=clip_x0,
        device=x0.device,
    )
    done = [
        _gaps(sampler, x0[part], seed, first + part.start, stochastic, kwargs)
        for part in parts_of(len(x0), batch_size or len(x0))
        for kwargs in [follow(model_kwargs, len(x0), part)]
    ]
    summed, distance, end = (torch.cat(parts, dim=-1).cpu() for parts in zip(*done, strict=True))
    mean, stderr = (values.numpy() for values in mean_with_error(summed))
    distance_mean, distance_stderr = (values.numpy() for values in mean_with_error(distance))
    return GapCurve(
        timesteps=np.arange(start, 1, -1),
        mean=mean,
        stderr=stderr,
        distance_mean=distance_mean,
        distance_stderr=distance_stderr,
        total=summed[-1].numpy(),
        end=end.numpy(),
    )


def _gaps(
    sampler: Sampler, x0: Tensor, seed: int, first: int, stochastic: bool, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of one batch: of the sums [start-1, B], of the distances [start-1, B], at the end [B].

    The distance has a recursion that needs no second chain: delta_{i-1} = gamma_{2,i} delta_i +
    gamma_{1,i} (x_0 predicted - x_0).
    """
    schedule = sampler.schedule
    tau = TauTable(schedule, "theorem1").values
    ours, kept = gamma_1(schedule), gamma_2(schedule)
    gap = torch.zeros_like(x0, dtype=torch.float64)
    distance = torch.zeros_like(gap)
    sums, distances = [], []
    for step in _chain(sampler, x0, seed, first, stochastic, kwargs):
        missed = step.x0.double() - x0.double()
        if step.t > 1:
            gap = gap + tau[step.t] * step_error(schedule, step, x0)
            distance = kept[step.t] * distance + ours[step.t] * missed
            sums.append(_norm(gap))
            distances.append(_norm(distance))
    return torch.stack(sums), torch.stack(distances), _norm(missed)


def _chain(
    sampler: Sampler, x0: Tensor, seed: int, first: int, stochastic: bool, kwargs: dict[str, Any]
) -> Iterator[ReverseStep]:
    """The chain from x_start; its eps is the draw that sampling with this seed starts from."""
    start = sampler.timesteps[-1]
    eps = BlockNoise(seed, first, x0.shape, x0.dtype, x0.device).draw()
    a, b = sampler.schedule.cum_alphas[start], sampler.schedule.cum_betas[start]
    silence = torch.zeros_like(x0)
    return sampler.iterate(
        x0.shape,
        seed=seed,
        first=first,
        x_init=float(a**0.5) * x0 + float(b**0.5) * eps,
        noise=None if stochastic else lambda k: silence,
        **kwargs,
    )


def _weighted(schedule: NoiseSchedule, errors: Tensor) -> Tensor:
    """tau_n e_n for n = 2..M, float64 [M-1, ...]."""
    if not isinstance(errors, Tensor) or not errors.is_floating_point() or errors.ndim == 0:
        got = errors.dtype if isinstance(errors, Tensor) else type(errors).__name__
        raise ValueError(f"errors must be a floating-point tensor [M+1, ...], got {got}")
    if not 3 <= len(errors) <= schedule.N + 1:
        raise ValueError(
            f"errors must have M+1 entries with M in 2..{schedule.N}, got shape "
            f"{tuple(errors.shape)}"
        )
    tau = TauTable(schedule, "theorem1").values[2 : len(errors)].copy()
    used = errors[2:].double()
    return expand(torch.from_numpy(tau).to(errors.device), used) * used


def _mean_square(values: Tensor) -> Tensor:
    """Mean over the images of |.|^2: [T, B, D] -> [T]."""
    return values.square().sum(2).mean(1)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
