r"""What a trained noise network does that the SA loss would change, measured: ``diagnose``.

With e_n = f(x_n, n) - eps_n and b_n(x_0) = E[e_n | x_0], what the network predicts on average for
one image, the SA loss adds a penalty on E|b_n|^2 to the plain loss E|e_n|^2 (docs/why_sa_works.md).
Two noises e, e' of one image are independent, so <e, e'> is an unbiased estimate of |b_n|^2.

Every number has a standard error over the images, by the jackknife. Nothing here is a promise: what
SA does to another data set or a longer training has to be trained and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa_plugin._checks import check_choice, check_whole
from sa_plugin._execution import NetworkCall
from sa_plugin._tensors import Coefficients, FirstBad, follow
from sa_plugin.bounds.gap import gap_along_chain
from sa_plugin.bounds.likelihood import MeanWithError, mean_with_error
from sa_plugin.diagnosis.findings import DERIVATIVE, MEASURED, PREDICTED, Diagnosis, SampleVariance
from sa_plugin.effect.gains import exact_gains, gaussian_gains
from sa_plugin.effect.predicted import predict
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.loss import SALoss
from sa_plugin.prediction import PREDICTS
from sa_plugin.sampling.batches import MOST, BlockNoise, images_of, parts_of, shown
from sa_plugin.sampling.jacobian import Probed
from sa_plugin.sampling.reverse import split_output
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import FloatArray, NoiseSchedule

PROCESSES = {"DDPM small": "ddpm", "DDIM": "ddim"}  # title -> the sampler's forward process


def diagnose(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    batches: Iterable[Tensor],
    *,
    loss: SALoss | None = None,
    steps: int | Sequence[int] = 20,
    sampling_steps: Sequence[int] = (5, 10, 25),
    n_images: int = 256,
    batch_size: int = 64,
    spectrum: Spectrum | None = None,
    gap_start: int | None = None,
    probes: int = 0,
    predicts: str = "eps",
    clip_x0: bool = True,
    seed: int = 0,
    progress: bool = False,
    **model_kwargs: Any,
) -> Diagnosis:
    """Measure a noise network's errors, its bias given the image, and its samples' variance.

    It makes K + 3 evaluations for each image and step of the forward process, and for each sample
    as many as it has steps, twice: with the defaults 180 for each image. Gradients are off. The
    result depends on the seed, and not on ``batch_size`` for networks that treat images one by one.

    Args:
        model: ``(x [B, C, H, W], n int64 [B] in 1..N, **model_kwargs)`` -> eps, or a pair that
            begins with eps. As in ``Sampler``: its train/eval mode is not changed, it gets x in its
            parameters' type, and it runs where its parameters are.
        schedule: the forward process that the network was trained with.
        batches: a list of images x_0 [B, C, H, W] in [-1, 1], floating point; best images that the
            network was not trained on.
        loss: the SA loss that is meant, of this schedule; default ``SALoss(schedule)``, SA-2 with
            lambda 1.
        steps: how many steps n, spread evenly over 2..N, or a list of them.
        sampling_steps: numbers of steps of DDPM small and of DDIM.
        n_images: >= 2, images taken from the front of ``batches``, fewer if there are fewer; as
            many samples are drawn.
        spectrum: of the data, for the predictions; by default of these images. With fewer images
            than dimensions directions are missing.
        gap_start: also follow Theorem 1's gap from this step, 2..N; ``gap_start`` more evaluations
            an image.
        probes: also measure the error that the network's own derivative says, by so many random
            signs for each image and step; 0: do not. Each costs a derivative (``jacobian``).
        predicts, clip_x0: as in ``Sampler``. The predictions are without clipping.
        progress: show a bar over the batches (extra "progress").
        model_kwargs: go to every call; tensors of length ``n_images`` (labels) follow their images.

    Raises:
        ValueError: a bad argument, one tensor in place of a list of batches, fewer than two images,
            or a network output of another shape, complex or not finite.
    """
    loss = SALoss(schedule) if loss is None else loss
    if not np.array_equal(loss.schedule.betas, schedule.betas):
        raise ValueError("loss must be of this schedule, got one of other betas")
    check_choice("predicts", predicts, PREDICTS)
    check_whole("n_images", n_images, 2, MOST)
    check_whole("batch_size", batch_size, 1, MOST)
    check_whole("seed", seed, 0, MOST)
    check_whole("probes", probes, 0, MOST)
    grid = _grid(steps, schedule.N)
    samplers = {
        (title, count): Sampler(
            model, schedule, forward=forward, steps=count, predicts=predicts, clip_x0=clip_x0
        )
        for title, forward in PROCESSES.items()
        for count in sampling_steps
    }
    device = Sampler(model, schedule, steps=1).device
    x0 = _first_images(batches, n_images, device)
    s = _variances(x0, spectrum)
    unperturbed = replace(loss, input_perturbation=0.0)  # as the network is called in sampling
    measured, stderr = _measured(
        _Errors(model, unperturbed, predicts, seed, probes),
        grid,
        x0,
        batch_size,
        progress,
        model_kwargs,
    )
    drawn = {"seed": seed, "batch_size": batch_size, **model_kwargs}
    samples = tuple(
        SampleVariance(
            title,
            _total_variance(sampler.sample(x0.shape, **drawn)),
            predict(loss, s, steps=count, forward=PROCESSES[title]),
        )
        for (title, count), sampler in samplers.items()
    )
    gap = None
    if gap_start is not None:
        options: dict[str, Any] = {"start": gap_start, "predicts": predicts, "clip_x0": clip_x0}
        gap = mean_with_error(
            torch.from_numpy(gap_along_chain(model, schedule, x0, **options, **drawn).total)
        )
    return Diagnosis(
        steps=grid,
        measured=measured,
        stderr=stderr,
        predicted=_predicted(loss, s, x0[0].numel(), grid),
        samples=samples,
        data_variance=_total_variance(x0),
        gap=gap,
        n_images=len(x0),
        directions=len(s),
        loss=loss,
    )


class _Errors:
    """What one batch gives at one step: the means behind the columns by image, float64 [B, 7].

    With probes [B, 8], the last one that of ``DERIVATIVE``.
    """

    def __init__(
        self, model: Callable[..., Any], loss: SALoss, predicts: str, seed: int, probes: int
    ) -> None:
        self._network = NetworkCall(model)
        self._probed = None
        if probes:
            self._probed = Probed(self._network, loss.schedule, probes=probes, predicts=predicts)
        self._loss = loss
        self._predicts = predicts
        self._seed = seed
        self._coefficients = Coefficients(loss.schedule)
        # Only anchors of window="paper" or backprop="one" are drawn by it.
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    @torch.no_grad()
    def __call__(
        self, x0: Tensor, first: int, n: int, bad: FirstBad, kwargs: dict[str, Any]
    ) -> Tensor:
        N = self._loss.schedule.N
        noise = BlockNoise(self._seed * (N + 1) + n, first, x0.shape, x0.dtype, x0.device)
        draws = [noise.draw(), noise.draw()]
        at_n, below = ([self._error(x0, eps, m, bad, kwargs) for eps in draws] for m in (n, n - 1))
        steps = torch.full((len(x0),), n, dtype=torch.int64, device=x0.device)
        others = 0 if self._loss.noise == "shared" or self._loss.lam == 0 else self._loss.K - 1
        simple, sa = self._loss.sa_term(
            lambda x, n, **given: self._eps(x, n, given),
            x0,
            steps,
            draws[0],
            draws[0] + at_n[0].to(x0.dtype),
            noise=torch.stack([draws[1], *(noise.draw() for _ in range(others))])[1:],
            generator=self._generator,
            **kwargs,
        )
        bad.note(n, sa)
        (e, e_), (u, u_) = at_n, below
        pairs = [
            (_dot(e, e) + _dot(e_, e_)) / 2,
            _dot(e, e_),
            (_dot(u, u) + _dot(u_, u_)) / 2,
            (_dot(e, u_) + _dot(e_, u)) / 2,
            (_dot(e, u) + _dot(e_, u_)) / 2,
        ]
        found = [*pairs, simple.double(), self._loss.lam * sa.double()]
        if self._probed is not None:
            x = self._noisy(x0, draws[0], steps)
            _, diagonal = self._probed(x, steps, draw=lambda: noise.draw().sign(), **kwargs)
            bad.note(n, diagonal)
            found.append(diagonal.double().flatten(1).mean(1))
        return torch.stack(found, dim=1)

    def _error(
        self, x0: Tensor, eps: Tensor, n: int, bad: FirstBad, kwargs: dict[str, Any]
    ) -> Tensor:
        """e_n, float64."""
        steps = torch.full((len(x0),), n, dtype=torch.int64, device=x0.device)
        f = self._eps(self._noisy(x0, eps, steps), steps, kwargs)
        bad.note(n, f)
        return f.double() - eps.double()

    def _noisy(self, x0: Tensor, eps: Tensor, n: Tensor) -> Tensor:
        a, b = self._coefficients(n, x0)
        return (a * x0 + b * eps).to(x0.dtype)

    def _eps(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output, _ = split_output(self._network(x, n, **kwargs), x, "small")
        return self._coefficients.eps_of(output, x, n, self._predicts)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Per pixel, [B]."""
    return (a * b).flatten(1).mean(1)


def _measured(
    errors: _Errors,
    grid: NDArray[np.int64],
    x0: Tensor,
    batch_size: int,
    progress: bool,
    kwargs: dict[str, Any],
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """The columns of ``MEASURED``, perhaps of ``DERIVATIVE``, and their standard errors."""
    found = []
    parts = parts_of(len(x0), batch_size)
    for part in shown(parts, len(parts), "batch", progress):
        bad, given = FirstBad(), follow(kwargs, len(x0), part)
        rows = [errors(x0[part], part.start, int(n), bad, given) for n in grid]
        bad.refuse()
        found.append(torch.stack(rows, dim=1).cpu())
    values, stderr = jackknife(_quantities, torch.cat(found).numpy())
    names = [*MEASURED, *DERIVATIVE][: values.shape[-1]]
    measured, error = (
        dict(zip(names, np.moveaxis(t, -1, 0), strict=True)) for t in (values, stderr)
    )
    return measured, error


def _quantities(means: FloatArray) -> FloatArray:
    """The columns of ``_measured`` from means over images, [..., 7] -> [..., 5], or 8 -> 6."""
    error, bias, below, apart, same, simple, sa, *derived = np.moveaxis(means, -1, 0)
    scale = np.sqrt(error * below)
    with np.errstate(invalid="ignore", divide="ignore"):  # a network without error has no ratio
        ratios = [apart / scale, same / scale, sa / simple]
    return np.stack([error, bias, *ratios, *derived], axis=-1)


def jackknife(
    function: Callable[[FloatArray], FloatArray], values: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """``function`` of the mean over images, and its standard error by leaving each image out.

    Args:
        function: [..., M] -> [..., Q], of means.
        values: [B, ..., M], B >= 2. For the mean itself the error is the usual one.
    """
    B, total = len(values), values.sum(axis=0)
    left_out = function((total - values) / (B - 1))
    spread = np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    return function(total / B), np.sqrt((B - 1) / B * spread)


def _predicted(
    loss: SALoss, s: FloatArray, size: int, grid: NDArray[np.int64]
) -> dict[str, FloatArray]:
    """The columns of ``PREDICTED``; along a direction E|b_n|^2 = c_n^2 a_n s."""
    a, b = (table[grid, None] for table in (loss.schedule.cum_alphas, loss.schedule.cum_betas))
    exact, sa = exact_gains(loss.schedule, s)[grid], gaussian_gains(loss, s)[grid]
    columns = (a * s / (a * s + b), exact**2 * a * s, sa**2 * a * s)
    return {k: v.sum(axis=1) / size for k, v in zip(PREDICTED, columns, strict=True)}


def _variances(x0: Tensor, spectrum: Spectrum | None) -> FloatArray:
    """The data's variances along the directions that have one."""
    spectrum = Spectrum.of([x0]) if spectrum is None else spectrum
    spectrum.check(x0)
    s = spectrum.variances[spectrum.variances > 0]
    if s.size == 0:
        raise ValueError("batches must hold images that differ, got equal ones")
    return s


def _total_variance(x: Tensor) -> MeanWithError:
    """The unbiased variance, summed over an image's dimensions, and its error over images."""
    x = x.double().flatten(1)
    squares = (x - x.mean(0)).square().sum(1) * (len(x) / (len(x) - 1))
    mean, stderr = mean_with_error(squares)
    return MeanWithError(mean.cpu(), stderr.cpu())


def _first_images(batches: Iterable[Tensor], n_images: int, device: torch.device) -> Tensor:
    """The first images, at most ``n_images``, on the device, in at least float32."""
    found: list[Tensor] = []
    for x0 in images_of(batches):
        kept = x0[: n_images - sum(map(len, found))].to(device)
        found.append(kept.to(torch.promote_types(kept.dtype, torch.float32)))
        if sum(map(len, found)) == n_images:
            break
    if sum(map(len, found)) < 2:
        raise ValueError(f"batches must hold at least 2 images, got {sum(map(len, found))}")
    return torch.cat(found)


def _grid(steps: int | Sequence[int], N: int) -> NDArray[np.int64]:
    """The steps, ascending in 2..N."""
    check_whole("schedule.N", N, 2, MOST)
    if isinstance(steps, Sequence):
        for n in steps:
            check_whole("every step", n, 2, N)
        if not steps:
            raise ValueError("steps must hold at least one step, got none")
        return np.unique(np.array(steps, dtype=np.int64))
    check_whole("steps", steps, 1, MOST)
    return np.unique(np.rint(np.linspace(2, N, min(steps, N))).astype(np.int64))
