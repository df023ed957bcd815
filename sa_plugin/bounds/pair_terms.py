"""The cost in the bound of each step s <- t of DDPM's reverse process, for ``dp_vb`` trajectories.

The cost of a step depends only on its two ends, and the network's output only on t. Thus N
evaluations per image give the costs of all N (N - 1) / 2 steps (arXiv 2106.03802).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sa_plugin._checks import check_hold_images, check_whole
from sa_plugin._execution import NetworkCall
from sa_plugin._tensors import DeviceTables, FirstBad
from sa_plugin.bounds.likelihood import divergence
from sa_plugin.sampling.batches import MOST, BlockNoise, noise_for, shown
from sa_plugin.sampling.reverse import ReverseCoefficients, split_output
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.sampling.variance import check_gamma
from sa_plugin.schedule import NoiseSchedule

_AT_ONCE = 2**22  # numbers of one float64 intermediate: 32 MiB


def pair_terms(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    variance: str = "small",
    gamma: ArrayLike | None = None,
    predicts: str = "eps",
    clip_x0: bool = True,
    avg_cov: bool = False,
    seed: int = 0,
    noise: Callable[[int], Tensor] | None = None,
    progress: bool = False,
    **model_kwargs: Any,
) -> NDArray[np.float64]:
    """Mean over images of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, [N+1, N+1], at [s, t].

    Entries without 1 <= s < t are 0. ``choose_timesteps(N, steps, "dp_vb", terms=...)`` takes them:
    of all trajectories from 1 to N its path has the least sum of entries, and thus the least bound.

    Args:
        model, variance, gamma, predicts, clip_x0, avg_cov, model_kwargs: as in ``negative_elbo``.
        x0: images [B, ...], floating point, on the network's device. There is one network call for
            each t, on all of them.
        seed: of the noise; there is one draw for each image and t.
        noise: gives the draw of step t instead, [B, ...].
        progress: show a bar over t (extra "progress").

    Raises:
        ValueError: bad arguments; a network output of another shape, or not finite.
    """
    check_hold_images("x0", x0)
    check_whole("seed", seed, 0, MOST)
    options: dict[str, Any] = {
        "variance": variance,
        "predicts": predicts,
        "clip_x0": clip_x0,
        "avg_cov": avg_cov,
    }
    Sampler(model, schedule, steps=1, gamma=gamma, **options)  # checks the options
    values = None if gamma is None else check_gamma(gamma, schedule.N)
    random = BlockNoise(seed, 0, x0.shape, x0.dtype, x0.device)
    given = None if noise is None else noise_for(noise, tuple(x0.shape), slice(None))
    draw = given or (lambda t: random.draw())
    terms = torch.zeros(schedule.N + 1, schedule.N + 1, dtype=torch.float64, device=x0.device)
    network = NetworkCall(model)
    first_bad = FirstBad()
    for t in shown(range(2, schedule.N + 1), schedule.N - 1, "step", progress):
        s = np.arange(1, t)
        table = ReverseCoefficients.between(schedule, s, np.full_like(s, t), gamma=values)
        stack = DeviceTables(stack=table.stack()).get("stack", x0.double())
        x = (stack[0, 0] * x0.double() + stack[1, 0] * draw(t).to(x0.device)).to(x0.dtype)
        n = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        with torch.no_grad():
            output, second = split_output(network(x, n, **model_kwargs), x, variance)
            first_bad.note(t, output, second)
            second = None if second is None else second.double()
            known = (x0.double(), x.double(), output.double(), second)
            terms[1:t, t] = _means(stack, known, options)
    first_bad.refuse()
    return terms.cpu().numpy()


def _means(
    stack: Tensor, known: tuple[Tensor, Tensor, Tensor, Tensor | None], options: dict[str, Any]
) -> Tensor:
    """The cost of the pairs in ``stack`` [10, S], all of one t: float64 [S], a mean over images."""
    x0 = known[0]
    rows = max(_AT_ONCE // x0.numel(), 1)
    means = []
    for part in stack.split(rows, dim=1):
        columns = [column.reshape(-1, *[1] * x0.ndim) for column in part]
        c = ReverseCoefficients.unstack(columns)
        # What depends only on t stays a number, so that x keeps the images' dimensions.
        shared = {name: getattr(c, name).flatten()[0] for name in ("a", "b", "gamma")}
        cost = divergence(ReverseCoefficients(**{**vars(c), **shared}), *known, **options)
        means.append(cost.flatten(2).sum(2).mean(1))
    return torch.cat(means)
