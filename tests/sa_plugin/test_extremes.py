"""Extreme schedules, sizes and precisions: a finite number and no warning (errors here)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.numerics import SCHEDULES, WEIGHTINGS, loss_errors, sampler_errors, tau_error
from sa_plugin import NoiseSchedule, SALoss, Sampler, TauTable, estimate_gamma
from sa_plugin.bounds.likelihood import negative_elbo
from sa_plugin.sampling.variance import FORWARDS, NEEDS_SECOND, VARIANCES

ODD = {
    "all tiny": [1e-12] * 5,
    "below the spacing of 1": [1e-17] * 5,
    "tinier": [1e-37] * 3,
    "all near 1": [1 - 1e-12] * 4,
    "as near 1 as can be": [1 - 2**-53] * 4,
    "jumping": [1e-12, 1 - 1e-12, 1e-12, 0.5],
    "always the cosine's last": [0.999] * 40,
}
STEPS = {"linear": (1, 21, 1000, 10_000), "cosine": (1, 2, 3, 10_000), "vpsde": (1, 2, 3, 10_000)}
NAMED = [(kind, N) for kind, numbers in STEPS.items() for N in numbers]
ALL = {
    **{f"{kind} {N}": lambda k=kind, N=N: getattr(NoiseSchedule, k)(N) for kind, N in NAMED},
    **{name: lambda b=betas: NoiseSchedule.from_betas(b) for name, betas in ODD.items()},
}
PAIRS = [(f, v) for f in FORWARDS for v in VARIANCES if f == "ddpm" or v not in ("big", "iddpm")]


@pytest.fixture(scope="module", params=ALL)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return ALL[request.param]()


def network(variance: str) -> Callable[[Tensor, Tensor], Any]:
    def call(x: Tensor, n: Tensor) -> Any:
        eps = 0.5 * torch.sin(x)
        return (eps, torch.full_like(x, 0.3)) if variance in NEEDS_SECOND else eps

    return call


def sampler_of(schedule: NoiseSchedule, forward: str, variance: str, steps: int) -> Sampler:
    options = needs(variance, schedule) | {"forward": forward, "variance": variance}
    return Sampler(network(variance), schedule, steps=steps, **options)


def needs(variance: str, schedule: NoiseSchedule) -> dict[str, Any]:
    return {"gamma": np.full(schedule.N + 1, 0.6)} if variance == "analytic" else {}


def test_tables_are_finite(schedule: NoiseSchedule) -> None:
    for name in ("betas", "alphas", "cum_alphas", "cum_betas"):
        assert np.isfinite(getattr(schedule, name)).all(), name
    assert (schedule.cum_betas[1:] > 0).all()
    for weighting in WEIGHTINGS:
        values = TauTable(schedule, "theorem1" if weighting == "relative" else weighting).values
        assert np.isfinite(values).all(), weighting


@pytest.mark.parametrize(("forward", "variance"), PAIRS)
def test_samples_are_finite(schedule: NoiseSchedule, forward: str, variance: str) -> None:
    for steps in {1, min(schedule.N, 7)}:
        sampler = sampler_of(schedule, forward, variance, steps)
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(1, 1, 1, 1, dtype=dtype)
            drawn = sampler.sample(x.shape, x_init=x, noise=lambda k, x=x: x)
            assert drawn.isfinite().all(), (steps, dtype)
            assert drawn.abs().max() < 10


@pytest.mark.parametrize("N", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("forward", FORWARDS)
def test_as_many_steps_as_the_schedule_has(forward: str, N: int) -> None:
    sampler = sampler_of(NoiseSchedule.linear(N), forward, "small", N)
    assert sampler.sample((1, 1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("variance", [v for v in VARIANCES if v != "lanczos"])
def test_bounds_are_finite(schedule: NoiseSchedule, variance: str) -> None:
    x0 = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    options = needs(variance, schedule) | {"variance": variance, "steps": min(schedule.N, 7)}
    if schedule.N == 1:
        with pytest.raises(ValueError, match="decoder_variance must be a number > 0 for N = 1"):
            negative_elbo(network(variance), schedule, x0, **options)
        options["decoder_variance"] = 0.01
    assert negative_elbo(network(variance), schedule, x0, **options).total.isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_losses_and_gradients_are_finite(schedule: NoiseSchedule, weighting: str) -> None:
    """K = 1, 2 and N; half precisions, too."""
    for K in {1, min(2, schedule.N), min(schedule.N, 50)}:
        for window in ("down", "paper"):
            loss = SALoss(schedule, K=K, weighting=weighting, window=window)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                scale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
                x0 = torch.ones(1, 1, 1, 1, dtype=dtype)
                generator = torch.Generator().manual_seed(0)
                out = loss(lambda x, n, s=scale: s * x, x0, generator=generator)
                out.total.backward()
                assert out.total.isfinite(), (K, window, dtype)
                assert scale.grad.isfinite(), (K, window, dtype)


def test_gamma_is_finite(schedule: NoiseSchedule) -> None:
    if schedule.N > 100:
        schedule = NoiseSchedule.from_betas(schedule.betas[-20:])
    gamma = estimate_gamma(lambda x, n: 0.5 * x, schedule, [torch.ones(2, 1, 1, 1)])
    assert np.isfinite(gamma.values).all()


@pytest.mark.parametrize(("forward", "variance"), PAIRS)
def test_images_of_one_pixel(forward: str, variance: str) -> None:
    sampler = sampler_of(NoiseSchedule.linear(100), forward, variance, 3)
    assert sampler.sample((1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_loss_in_lower_precisions(kind: str, weighting: str) -> None:
    found = loss_errors(getattr(NoiseSchedule, kind)(1000), weighting)
    bounds = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
    for dtype, errors in found.items():
        assert all(error < bounds[dtype] for error in errors), dtype
    assert found[torch.float32][0] > 0  # else nothing was compared


@pytest.mark.parametrize("kind", SCHEDULES)
def test_tau_and_the_sampler_in_float32(kind: str) -> None:
    schedule = getattr(NoiseSchedule, kind)(1000)
    assert 0 < tau_error(schedule) < 6.1e-8  # half of float32's spacing, 2^-24
    found = list(sampler_errors(schedule, 100))
    assert len(found) == len(PAIRS)
    worst = {variance: error for _, variance, error in sorted(found, key=lambda one: one[-1])}
    # Only Lanczos does not clip the covariance: this network's is far above 1.
    assert 0 < worst.pop("lanczos") < 1e-2
    assert 0 < max(worst.values()) < 1e-4
