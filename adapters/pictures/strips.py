"""How a reverse process turns noise into images: film strips, and its variance over n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.pictures.pictures import plot_metric, save_labelled_grids
from sa_plugin.sampling.batches import BlockNoise
from sa_plugin.sampling.jacobian import Probed
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments, split_output
from sa_plugin.sampling.sampler import Sampler, to_uint8
from sa_plugin.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class FilmStrip:
    """Some images at some steps of their chains.

    Attributes:
        timesteps: the T steps shown, descending; the last one is 0, for the finished images.
        x: x_t, uint8 [T, B, C, H, W], clipped to black and white.
        x0: the x_0 predicted at t, in the same form; the last ones are the finished images.
    """

    timesteps: list[int]
    x: Tensor
    x0: Tensor


def film_strip(
    sampler: Sampler, shape: Sequence[int], *, columns: int = 10, seed: int = 0, **model_kwargs: Any
) -> FilmStrip:
    """The chains of the images [B, C, H, W] that ``sampler.sample`` returns for these arguments.

    ``columns``: >= 2, the number of steps shown. They are evenly spread over the trajectory and
    include the first step and the finished image. A shorter trajectory is shown completely.
    """
    if columns < 2:
        raise ValueError(f"columns must be at least 2, got {columns}")
    count = len(sampler.timesteps)
    chosen = np.unique(np.linspace(0, count, min(columns, count + 1)).round().astype(int))[:-1]
    steps = sampler.iterate(shape, seed=seed, **model_kwargs)
    kept = [s for k, s in enumerate(steps) if k in chosen or k == count - 1]
    end = kept[-1].x_s
    shown = kept if count - 1 in chosen else kept[:-1]
    return FilmStrip(
        timesteps=[step.t for step in shown] + [0],
        x=to_uint8(torch.stack([*(step.x_t for step in shown), end])).cpu(),
        x0=to_uint8(torch.stack([*(step.x0 for step in shown), end])).cpu(),
    )


def save_film_strip(path: str | Path, strip: FilmStrip, *, heading: str | None = None) -> None:
    """Save x_t above the predicted x_0 as a PNG: a row for each image, t falls to the right."""
    steps = ", ".join(map(str, strip.timesteps))
    panels = {
        f"x_t at t = {steps}": strip.x,
        "x_0 as predicted there; last the image": strip.x0,
    }
    rows = {title: frames.transpose(0, 1).flatten(0, 1) for title, frames in panels.items()}
    columns = len(strip.timesteps)
    save_labelled_grids(
        path, rows, columns=columns, all_images=True, panel_columns=1, heading=heading
    )


@torch.no_grad()
def reverse_variances(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    variance: str,
    gamma: np.ndarray | None = None,
    clip_x0: bool = True,
    avg_cov: bool = False,
    probes: int = 1,
    seed: int = 0,
    **model_kwargs: Any,
) -> dict[int, float]:
    """t -> DDPM's reverse variance from t to the next smaller step, averaged over all of x_t.

    Args:
        x0: images [B, C, H, W] in [-1, 1] on the network's device; x_t is drawn from q(x_t | x_0)
            with noise that depends on the seed alone, the same for every method.
        timesteps: ascending, at least two. The smallest is left out: it leads to x_0, where no
            noise is added.
        variance, gamma, clip_x0, avg_cov, probes: as in ``Sampler``; "lanczos" has no such number.
        model_kwargs: go to every call of the network.
    """
    if len(timesteps) < 2:
        raise ValueError(f"timesteps must be at least two, got {list(timesteps)}")
    table = ReverseCoefficients.build(schedule, timesteps, gamma=gamma).stack()
    random = BlockNoise(seed, 0, x0.shape, x0.dtype, x0.device)
    if variance == "probes":
        signs = BlockNoise(seed, 0, x0.shape, x0.dtype, x0.device, stream=1)
        probed = Probed(model, schedule, probes=probes)
        model, variance = partial(probed, draw=lambda: signs.draw().sign()), "ocm"
    found = {}
    for t, column in zip(reversed(timesteps[1:]), table.T, strict=False):
        c = ReverseCoefficients.unstack(torch.from_numpy(column.copy()).to(x0).unbind())
        x = c.a * x0 + c.b * random.draw()
        n = torch.full((len(x),), int(t), dtype=torch.int64, device=x.device)
        output, second = split_output(model(x, n, **model_kwargs), x, variance)
        options = {"variance": variance, "clip_x0": clip_x0, "avg_cov": avg_cov}
        found[int(t)] = float(reverse_moments(c, x, output, second, **options).variance.mean())
    return dict(sorted(found.items()))


def plot_variances(
    path: str | Path, curves: Mapping[str, Mapping[int, float]], *, title: str | None = None
) -> None:
    """Plot each method's variance over n, relative to the first method's, as a PNG.

    Ratios show the differences; the variances themselves span decades and nearly coincide.
    """
    if not curves:
        raise ValueError("curves must hold at least one method, got none")
    reference = next(iter(curves))
    ratios = {
        method: {n: value / curves[reference][n] for n, value in curve.items()}
        for method, curve in curves.items()
    }
    metric = f"reverse variance / that of {reference}"
    plot_metric(path, ratios, metric=metric, x_label="n", title=title, log_x=True)
