"""The reverse process on a Gaussian, whose chain is known, and how its options relate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments, split_output
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.sampling.variance import NEEDS_SECOND, pixel_variance_limit
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.toys import normal

LINEAR = NoiseSchedule.linear(100)
DATA = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 1.5], LINEAR)
PROCESSES = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.4), ("ddim", 1.0)]
X_INIT = normal(2, 5, 3)


def propagate(sampler, kind, mean, variance):
    """Mean and variance of the chain's end, from those of its start, without drawing anything."""
    network, steps = DATA.network(kind), sampler.timesteps[::-1]
    table = torch.from_numpy(sampler.coefficients.stack())
    method = kind if kind in NEEDS_SECOND else "analytic"
    for k, t in enumerate(steps):
        c = ReverseCoefficients.unstack(table[:, k])

        def moments(x, c=c, t=t):
            output = split_output(network(x, torch.tensor([t])), x, method)
            return reverse_moments(c, x, *output, variance=method, clip_x0=False)

        zero, one = (moments(torch.full((1, 3), v, dtype=torch.float64)) for v in (0.0, 1.0))
        slope = one.mean - zero.mean
        noise = zero.variance if k < len(steps) - 1 else 0.0
        mean, variance = slope * mean + zero.mean, slope**2 * variance + noise
    return mean, variance


def trajectory_of(kind, steps):
    terms = np.random.default_rng(0).normal(size=(101, 101))
    return choose_timesteps(100, steps, kind, gamma=DATA.gamma, betas=LINEAR.betas, terms=terms)


@pytest.mark.parametrize(("forward", "eta"), PROCESSES)
@pytest.mark.parametrize("kind", ["npr", "sn"])
@pytest.mark.parametrize(
    "trajectory", ["linear", "power2", "quad_ddim", "linear_ddim", "dp_seg", "dp_vb"]
)
def test_exact_covariance_makes_every_chain_exact(forward, eta, kind, trajectory):
    """From q(x_t) at the first timestep to q(x_0), whatever the process and the steps left out.

    Without noise at s = 0 the end is E[x_0 | x_1], whose variance is S - Cov[x_0 | x_1].
    """
    steps = trajectory_of(trajectory, 6)
    options = {"forward": forward, "eta": eta, "variance": kind, "clip_x0": False}
    sampler = Sampler(DATA.network(kind), LINEAR, trajectory=steps, **options)
    mean, variance = propagate(sampler, kind, *DATA.marginal(steps[-1]))
    torch.testing.assert_close(mean[0], DATA.mu, rtol=1e-9, atol=0)
    expected = DATA.S - DATA.covariance(steps[0])
    torch.testing.assert_close(variance[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("forward", "eta"), PROCESSES)
def test_one_number_a_step_keeps_the_total_variance_at_one_step(forward, eta):
    """Analytic: the reverse variance is the mean over dimensions of the exact one."""
    options = {"forward": forward, "eta": eta, "variance": "analytic", "gamma": DATA.gamma}
    sampler = Sampler(DATA.eps, LINEAR, clip_x0=False, trajectory=[30, 70], **options)
    c = ReverseCoefficients.unstack(torch.from_numpy(sampler.coefficients.stack())[:, 0])
    x, n = DATA.draw(2), torch.full((2,), 70)
    one = reverse_moments(c, x, DATA.eps(x, n), variance="analytic", clip_x0=False).variance
    npr = reverse_moments(c, x, *DATA.network("npr")(x, n), variance="npr", clip_x0=False).variance
    assert float(one) == pytest.approx(float(npr[0].mean()), rel=1e-10)
    if forward == "ddpm":
        assert float(one) == pytest.approx(float(DATA.reverse_variance(30, 70).mean()), rel=1e-10)


@pytest.mark.parametrize(("forward", "eta"), PROCESSES)
def test_sample_moments(forward, eta):
    """Monte Carlo against the chain's own mean and variance, and those against the data's.

    The start N(0, I) instead of q(x_N) is what the tolerances are for, and the variance of
    E[x_0 | x_1] is S - Cov[x_0 | x_1].
    """
    options = {"forward": forward, "eta": eta, "variance": "npr", "clip_x0": False}
    sampler = Sampler(DATA.network("npr"), LINEAR, steps=12, **options)
    start = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    (mean,), (variance,) = propagate(sampler, "npr", *start)
    torch.testing.assert_close(mean, DATA.mu, rtol=0, atol=0.02)
    torch.testing.assert_close(variance, DATA.S - DATA.covariance(1), rtol=1e-3, atol=0)
    count = 20_000
    x = sampler.sample((count, 3), seed=3, batch_size=8000).double()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5).all()
    off = torch.corrcoef(x.T) - torch.eye(3, dtype=torch.float64)
    assert off.abs().max() < 5 / count**0.5


def drawn(network, x_init=X_INIT, **options):
    return Sampler(network, LINEAR, **options).sample(x_init.shape, x_init=x_init)


@given(
    st.sampled_from(["analytic", "npr", "sn", "heuristic"]),
    st.lists(st.integers(1, 100), min_size=2, max_size=8, unique=True),
)
@settings(max_examples=25, deadline=None)
def test_ddim_with_eta_one_is_ddpm(variance, timesteps):
    """Where x_0 is not clipped: DDIM's direction term keeps the eps from before the clipping."""
    options = {"variance": variance, "trajectory": sorted(timesteps), "gamma": DATA.gamma}
    network = DATA.network(variance if variance in NEEDS_SECOND else "eps")
    ddpm, ddim = (
        drawn(network, clip_x0=False, **options, **process)
        for process in ({"forward": "ddpm"}, {"forward": "ddim", "eta": 1.0})
    )
    torch.testing.assert_close(ddpm, ddim, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_what_the_network_predicts_makes_no_difference(predicts, clip_x0):
    options = {"steps": 10, "clip_x0": clip_x0, "forward": "ddim", "eta": 0.5}
    other = drawn(DATA.network(predicts), predicts=predicts, **options)
    torch.testing.assert_close(other, drawn(DATA.eps, **options), rtol=1e-9, atol=1e-9)


def test_second_output_of_an_x0_network():
    """sn subtracts the eps that x_0 implies."""
    options = {"variance": "sn", "steps": 5}
    other = drawn(lambda x, n: (DATA.x0(x, n), DATA.sn_second(x, n)), predicts="x0", **options)
    torch.testing.assert_close(drawn(DATA.network("sn"), **options), other, rtol=1e-9, atol=0)


def test_clipping_bounds_x0():
    step = None
    for step in Sampler(lambda x, n: -x, LINEAR, steps=5).iterate((8, 3)):
        assert step.x0.abs().max() <= 1
    assert torch.equal(step.x_s, step.x0)  # the last mean is the predicted x_0 itself
    free = Sampler(lambda x, n: -x, LINEAR, steps=5, clip_x0=False).sample((8, 3))
    assert free.abs().max() > 1


@pytest.mark.parametrize("index", range(5))
def test_noise_clip_acts_on_the_steps_it_names(index):
    """big variance, a network of zeros: the noise of each step is read off directly."""
    options = {"variance": "big", "trajectory": [1, 5, 30, 80], "clip_x0": False}
    zeros = Sampler(lambda x, n: 0 * x, LINEAR, clip_sigma_idx=index, clip_pixel=0.5, **options)
    quiet, noisy = (
        zeros.iterate((1, 2), x_init=normal(0, 1, 2), noise=lambda k, z=z: torch.full((1, 2), z))
        for z in (0.0, 1.0)
    )
    before = 0.0
    for still, moved in zip(quiet, noisy, strict=True):
        scale = float(LINEAR.skip_alpha(still.s, still.t)) ** -0.5  # mean of eps = 0
        apart = float((moved.x_s - still.x_s)[0, 0])
        free = 0.0 if still.s == 0 else float(LINEAR.skip_beta(still.s, still.t))
        clipped = still.s <= [0, 1, 5, 30, 80][index]
        limit = min(free, pixel_variance_limit(0.5)) if clipped else free
        assert apart - before * scale == pytest.approx(limit**0.5, rel=1e-6, abs=1e-9)
        before = apart
