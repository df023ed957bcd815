r"""The evidence lower bound of the reverse process, term by term.

With the trajectory t_1 < ... < t_K and s_0, s_1, ..., s_K = 0, t_1, ..., t_K (arXiv 2006.11239,
eq. 5)::

    -log p(x_0) <= E[ -log p(x_0 | x_{t_1})                                     terms[0]
                      + sum_k KL(q(x_{s_k} | x_{s_k+1}, x_0) || p(x_{s_k} | x_{s_k+1}))
                      + KL(q(x_{t_K} | x_0) || N(0, I)) ]                       terms[K]

Term k is the cost of x_{s_k}. The reverse process is the sampler's, by the same
``reverse_moments``. Only the decoder, term 0, differs: the sampler adds no noise there. All
arithmetic after the network is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._arrays import Numeric
from sa_plugin._checks import check_hold_images, check_positive, check_whole
from sa_plugin._execution import NetworkCall
from sa_plugin._tensors import DeviceTables, FirstBad, follow
from sa_plugin.sampling.batches import MOST, BlockNoise, noise_for, parts_of, shown
from sa_plugin.sampling.jacobian import Probed
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments, split_output
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.sampling.trajectory import check_rises
from sa_plugin.sampling.variance import iddpm_variance
from sa_plugin.schedule import NoiseSchedule

HALF_LEVEL = 1 / 255  # half the distance between neighbouring grey levels in [-1, 1]


class NegativeElbo(NamedTuple):
    """The bound in nats, float64: ``total`` [B], the sum of ``terms`` [steps+1, B].

    terms[0] is the decoder's; terms[k], 0 < k < steps, is the KL divergence at x_s with s =
    timesteps[k-1]; terms[steps] is the prior's.
    """

    total: Tensor
    terms: Tensor


class MeanWithError(NamedTuple):
    """A mean over images and its standard error, float64, without the values' last dimension."""

    mean: Tensor
    stderr: Tensor


def negative_elbo(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    variance: str = "small",
    steps: int | None = None,
    trajectory: str | Sequence[int] = "linear",
    gamma: ArrayLike | None = None,
    predicts: str = "eps",
    clip_x0: bool = True,
    avg_cov: bool = False,
    decoder_variance: float | None = None,
    probes: int = 1,
    way: str = "auto",
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    noise: Callable[[int], Tensor] | None = None,
    progress: bool = False,
    **model_kwargs: Any,
) -> NegativeElbo:
    """Nats that DDPM's reverse process needs for 8-bit images, from one draw of x_t per step.

    Each term is an unbiased estimate of its expectation, as the KL divergences are exact given x_t.

    Args:
        model, variance, steps, trajectory, gamma, predicts, clip_x0, avg_cov, model_kwargs: as in
            ``Sampler`` with forward "ddpm". ("ddim" with eta 0 has no bound: it is a point mass.
            "lanczos" has no diagonal, from which a bound could be made.)
        probes, way: as in ``Sampler``, for variance "probes".
        x0: images [B, ...], 8-bit values v as v / 127.5 - 1, float32 or float64, on the network's
            device. x_t is made in this dtype; the network gets it in its parameters' type, as in
            ``Sampler``.
        decoder_variance: of p(x_0 | x_{t_1}). The default is tilde_beta(1, 2) for every reverse
            variance, as in the published codes, except "iddpm": there it is the learned range from
            tilde_beta(1, 2) up to skip_beta(0, t_1) (arXiv 2102.09672). Both suit a trajectory that
            begins at 1.
        seed: whole number >= 0. The noise of image i depends only on (seed, first + i) and its
            place in the trajectory, so variances are compared on equal noise.
        first: number of the first image, to divide a run.
        batch_size: images in one network call; all of them by default.
        noise: gives the k-th draw instead, [B, ...], k = 0 for the largest step.
        progress: show a bar over the steps of each batch (extra "progress").

    Raises:
        ValueError: bad arguments; a network output of another shape, or not finite.
    """
    check_hold_images("x0", x0)
    _check_levels(x0)
    _check_numbers(schedule, decoder_variance, seed, first, batch_size)
    options: dict[str, Any] = {"predicts": predicts, "clip_x0": clip_x0, "avg_cov": avg_cov}
    path: dict[str, Any] = {"steps": steps, "trajectory": trajectory, "gamma": gamma}
    if variance == "lanczos":
        raise ValueError("variance 'lanczos' has no diagonal, which the bound needs")
    if variance == "probes":
        model = Probed(model, schedule, probes=probes, way=way, predicts=predicts)
        variance = "ocm"
    sampler = Sampler(model, schedule, variance=variance, **path, **options)
    check_rises(sampler.timesteps, trajectory)
    bound = _Bound(sampler, variance, options, decoder_variance)
    done = []
    for part in parts_of(len(x0), batch_size or len(x0)):
        images = x0[part]
        place = (seed, first + part.start, images.shape, x0.dtype, x0.device)
        random, signs = BlockNoise(*place), BlockNoise(*place, stream=1)
        given = None if noise is None else noise_for(noise, tuple(x0.shape), part)

        def fresh(k: int, random: BlockNoise = random) -> Tensor:
            return random.draw()

        kwargs = follow(model_kwargs, len(x0), part)
        if isinstance(model, Probed):
            kwargs["draw"] = lambda signs=signs: signs.draw().sign()
        done.append(bound(images, given or fresh, kwargs, progress))
    terms = torch.cat(done, dim=1)
    return NegativeElbo(terms.sum(0), terms)


def bits_per_dim(nats: Numeric, dims: int) -> Numeric:
    """nats / (dims ln 2); ``dims`` is the number of values in an image (C H W)."""
    check_whole("dims", dims, 1, MOST)
    return nats / (dims * math.log(2))


def mean_with_error(values: Tensor) -> MeanWithError:
    """Mean and standard error over independent images: the last dimension of [..., B], B >= 2."""
    count = values.shape[-1] if values.ndim else 0
    if count < 2:
        raise ValueError(f"values must hold at least 2 images, got shape {tuple(values.shape)}")
    values = values.double()
    return MeanWithError(values.mean(-1), values.std(-1) / count**0.5)


def gaussian_kl(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) || N(mean_p, var_p)) of every dimension, in nats; broadcasts."""
    ratio = var_q / var_p
    return 0.5 * (ratio - 1 - ratio.log() + (mean_q - mean_p) ** 2 / var_p)


def discretised_nll(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log of the mass that N(mean, variance) puts on each value's grey level, in nats.

    The level at v reaches from v - 1/255 to v + 1/255; the outermost two reach to infinity (arXiv
    2006.11239, eq. 13). The distribution function is the published codes' approximation
    (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2 = sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)). With
    sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)) the logarithm stays exact in
    the tails and needs no floor.
    """
    upper = _logit_of_cdf((x0 - mean + HALF_LEVEL) / variance**0.5)
    lower = _logit_of_cdf((x0 - mean - HALF_LEVEL) / variance**0.5)
    below_upper = torch.nn.functional.logsigmoid(upper)
    above_lower = torch.nn.functional.logsigmoid(-lower)
    inside = below_upper + above_lower + torch.log(-torch.expm1(lower - upper))
    is_last = x0 > 1 - HALF_LEVEL
    is_first = x0 < HALF_LEVEL - 1
    return -torch.where(is_last, above_lower, torch.where(is_first, below_upper, inside))


def _logit_of_cdf(z: Tensor) -> Tensor:
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


class _Bound:
    """The terms of a batch along a sampler's trajectory."""

    def __init__(
        self,
        sampler: Sampler,
        variance: str,
        options: dict[str, Any],
        decoder_variance: float | None,
    ) -> None:
        self._sampler = sampler
        self._network = NetworkCall(sampler.model)
        self._tables = DeviceTables(stack=sampler.coefficients.stack())
        self._variance = variance
        self._options = options
        self._decoder_variance = decoder_variance

    @torch.no_grad()
    def __call__(
        self,
        x0: Tensor,
        draw: Callable[[int], Tensor],
        kwargs: dict[str, Any],
        progress: bool,
    ) -> Tensor:
        """float64 [steps+1, B]; ``draw`` gives the k-th draw, k = 0 for the largest step."""
        exact = _on_levels(x0)
        stack = self._tables.get("stack", exact)
        start = ReverseCoefficients.unstack(stack[:, 0].unbind())
        zero, one = (torch.full_like(start.a, value) for value in (0.0, 1.0))
        terms = [gaussian_kl(start.a * exact, start.b**2, zero, one)]
        first_bad = FirstBad()
        descending = self._sampler.timesteps[::-1]
        for k, t in shown(enumerate(descending), len(descending), "step", progress):
            c = ReverseCoefficients.unstack(stack[:, k].unbind())
            x = (c.a * exact + c.b * draw(k).to(exact)).to(x0.dtype)
            n = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            output, second = split_output(self._network(x, n, **kwargs), x, self._variance)
            first_bad.note(t, output, second)
            second = None if second is None else second.double()
            is_last = k == len(descending) - 1
            term = self._decoder if is_last else self._divergence
            terms.append(term(c, exact, x.double(), output.double(), second))
        first_bad.refuse()
        return torch.stack([term.flatten(1).sum(1) for term in reversed(terms)])

    def _divergence(
        self, c: ReverseCoefficients, x0: Tensor, x: Tensor, output: Tensor, second: Tensor | None
    ) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of every dimension."""
        return divergence(c, x0, x, output, second, variance=self._variance, **self._options)

    def _decoder(
        self, c: ReverseCoefficients, x0: Tensor, x: Tensor, output: Tensor, second: Tensor | None
    ) -> Tensor:
        """-log p(x_0 | x_{t_1}) of every dimension."""
        mean = reverse_moments(c, x, output, second, variance="small", **self._options).mean
        if self._decoder_variance is not None:
            variance = torch.full_like(c.big, self._decoder_variance)
        else:
            variance = torch.full_like(c.big, float(self._sampler.schedule.tilde_beta(1, 2)))
            if self._variance == "iddpm":
                variance = iddpm_variance(second, variance, c.big)
        return discretised_nll(x0, mean, variance)


def divergence(
    c: ReverseCoefficients,
    x0: Tensor,
    x: Tensor,
    output: Tensor,
    second: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of every dimension, in nats, at s > 0.

    Args:
        c: the coefficients of the step, each a tensor that broadcasts over x.
        x0: the images from which x = x_t, [B, ...], was made.
        output, second, options: as in ``reverse_moments``.
    """
    p = reverse_moments(c, x, output, second, **options)
    eps = (x - c.a * x0) / c.b
    return gaussian_kl(c.mean(x0, x, eps), c.small, p.mean, p.variance)


def _on_levels(x0: Tensor) -> Tensor:
    """float64, with each value exactly on its grey level."""
    return ((x0.double() + 1) * 127.5).round() / 127.5 - 1


def _check_levels(x0: Tensor) -> None:
    off = (x0.double() - _on_levels(x0)).abs() * 127.5 > 0.01
    off |= ~(x0.abs() <= 1 + 1e-5)  # NaN lands here
    if off.any():
        value = float(x0[off][0])
        raise ValueError(
            "x0 must hold 8-bit values v as v / 127.5 - 1 in float32 or float64, "
            f"got {value!r} ({x0.dtype})"
        )


def _check_numbers(
    schedule: NoiseSchedule,
    decoder_variance: float | None,
    seed: int,
    first: int,
    batch_size: int | None,
) -> None:
    check_whole("seed", seed, 0, MOST)
    check_whole("first", first, 0, MOST)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1, MOST)
    if decoder_variance is not None:
        check_positive("decoder_variance", decoder_variance)
    elif schedule.N < 2:
        raise ValueError(
            "decoder_variance must be a number > 0 for N = 1, which has no tilde_beta(1, 2); "
            "got None"
        )
