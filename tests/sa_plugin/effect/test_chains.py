"""Chains of linear networks: a written-out product, the real sampler, the best strength."""

import math

import numpy as np
import pytest
import torch

from sa_plugin.effect.chains import best_strength, chain_variances, predicted_frechet
from sa_plugin.effect.gains import exact_gains, gaussian_gains, inflated_gains
from sa_plugin.loss import SALoss
from sa_plugin.metrics.frechet import frechet_distance
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.refusals import refuses

SCHEDULE = NoiseSchedule.linear(100)
S = np.array([0.04, 0.3, 1.5])
STEPS = [2, 9, 30, 31, 77, 100]
INFLATED = inflated_gains(SCHEDULE, S, 0.4)
PROCESSES = [
    ("ddpm", 0.0, "small"),
    ("ddpm", 0.0, "big"),
    ("ddpm", 0.0, "analytic"),
    ("ddpm", 0.0, "npr"),
    ("ddpm", 0.0, "sn"),
    *[("ddim", eta, v) for eta in (0.0, 0.6, 1.0) for v in ("small", "analytic", "npr", "sn")],
]


def exact_gamma(gains):
    """Gamma_n of a linear network, [N+1]."""
    a, b = SCHEDULE.cum_alphas[:, None], SCHEDULE.cum_betas[:, None]
    return (gains**2 * (a * S + b)).mean(1)


def written_out(gains, forward, eta, variance, cov_gains, avg_cov=False):
    """Every step's map as the papers write it, and the end's variance as a sum of products."""
    a, b, visited = SCHEDULE.cum_alphas, SCHEDULE.cum_betas, [0, *STEPS]
    factors, noises, V = [], [], np.ones(3)
    for t, s in zip(visited[:0:-1], visited[-2::-1], strict=True):
        skip = 1 - a[t] / a[s]
        tilde = skip * b[s] / b[t]
        lambda2 = tilde if forward == "ddpm" else eta**2 * tilde
        # The mean is sqrt(a_s) x0 + sqrt(b_s - lambda2) (x_t - sqrt(a_t) x0) / sqrt(b_t).
        through = math.sqrt(max(b[s] - lambda2, 0) / b[t])
        of_x0 = math.sqrt(a[s]) - through * math.sqrt(a[t])
        x0 = (1 - math.sqrt(b[t]) * gains[t]) / math.sqrt(a[t])
        factor = of_x0 * x0 + through
        exact, g = math.sqrt(b[t]) / (a[t] * S + b[t]), cov_gains[t]
        left = a[t] * S / (a[t] * S + b[t])  # Var[eps | x_t]
        estimate = {
            "small": 0 * S,
            "big": 0 * S,
            "analytic": np.full(3, max(1 - np.mean(g**2 * (a[t] * S + b[t])), 0)),
            "npr": left + (exact - g) ** 2 * V,
            "sn": left + (exact**2 - g**2) * V,
        }[variance]
        cov = b[t] / a[t] * (np.full(3, estimate.mean()) if avg_cov else estimate)
        sigma2 = skip if variance == "big" else lambda2 + of_x0**2 * cov
        factors.append(factor)
        noises.append(sigma2 if s > 0 else 0 * S)
        V = factor**2 * V + sigma2
    total = np.prod(factors, 0) ** 2
    for k, noise in enumerate(noises):
        total = total + noise * np.prod(factors[k + 1 :], axis=0) ** 2
    return total


@pytest.mark.parametrize("rests_on", ["own", "exact"])
@pytest.mark.parametrize(("forward", "eta", "variance"), PROCESSES)
def test_equals_the_written_out_product(forward, eta, variance, rests_on):
    cov_gains = None if rests_on == "own" else exact_gains(SCHEDULE, S)
    for avg_cov in (False, True):
        found = chain_variances(
            SCHEDULE,
            INFLATED,
            STEPS,
            forward=forward,
            eta=eta,
            variance=variance,
            variances=S,
            cov_gains=cov_gains,
            avg_cov=avg_cov,
        )
        resting = INFLATED if cov_gains is None else cov_gains
        expected = written_out(INFLATED, forward, eta, variance, resting, avg_cov)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert found.shape == (3,)
        assert found.dtype == np.float64


class Linear:
    """The linear network of these gains with the second output that training would give it."""

    def __init__(self, gains, variance, mu):
        self.gains, self.variance = torch.from_numpy(gains.copy()), variance
        self.data = GaussianData(mu, S, SCHEDULE)

    def __call__(self, x, n):
        eps = self.gains[n] * (x - self.data.marginal(n)[0])
        if self.variance == "npr":
            return eps, self.data.npr_second(x, n) + (self.data.eps(x, n) - eps) ** 2
        if self.variance == "sn":
            return eps, self.data.sn_second(x, n)
        return eps


def sampler_of(gains, forward, eta, variance, mu=(0.0, 0.0, 0.0), **options):
    options |= {"forward": forward, "eta": eta, "variance": variance, "trajectory": STEPS}
    network = Linear(gains, variance, mu)
    return Sampler(network, SCHEDULE, gamma=exact_gamma(gains), clip_x0=False, **options)


@pytest.mark.filterwarnings("ignore:gamma")  # gains of other data have a large one
@pytest.mark.parametrize("gains", [INFLATED, exact_gains(SCHEDULE, 1.2 * S[::-1])])
@pytest.mark.parametrize(
    ("forward", "eta", "variance"), [p for p in PROCESSES if p[2] in ("small", "big", "analytic")]
)
def test_equals_the_sampler_where_a_step_is_linear(forward, eta, variance, gains):
    """Draws whose sample moments are exact, not random, leave no Monte-Carlo error."""
    count, mu = 16, np.array([0.3, -0.5, 0.8])
    ones = np.ones((count, 1))
    random = np.random.default_rng(0).standard_normal((count, len(STEPS)))
    draws = np.linalg.qr(np.hstack([ones, random]))[0][:, 1:] * math.sqrt(count)
    draws = torch.from_numpy(draws.T.copy())[:, :, None].expand(-1, count, 3)
    sampler = sampler_of(gains, forward, eta, variance, mu)
    images = sampler.sample((count, 3), x_init=draws[0], noise=lambda k: draws[k + 1]).numpy()
    options = {"forward": forward, "eta": eta, "variance": variance, "variances": S}
    found = chain_variances(SCHEDULE, gains, STEPS, **options)
    np.testing.assert_allclose(found, images.var(0), rtol=1e-10)
    # The mean is mu (1 - sqrt(cum_alpha_T) F): F^2 is the variance that a chain without noise has.
    F = np.prod([(x.x_s[1] - x.x_s[0]) / (x.x_t[1] - x.x_t[0]) for x in noiseless(sampler)], axis=0)
    expected = mu * (1 - math.sqrt(SCHEDULE.cum_alphas[STEPS[-1]]) * F)
    np.testing.assert_allclose(images.mean(0), expected, rtol=1e-10)


def noiseless(sampler):
    x = torch.ones(2, 3, dtype=torch.float64)
    x[1] = 2
    return sampler.iterate((2, 3), x_init=x, noise=lambda k: torch.zeros_like(x))


@pytest.mark.parametrize("avg_cov", [False, True])
@pytest.mark.parametrize(
    ("forward", "eta", "variance"), [p for p in PROCESSES if p[2] in ("npr", "sn")]
)
def test_equals_the_sampler_where_the_noise_depends_on_the_image(forward, eta, variance, avg_cov):
    """40,000 images: a standard error of 0.7 per cent, and of more for a law with heavier tails."""
    sampler = sampler_of(INFLATED, forward, eta, variance, avg_cov=avg_cov)
    x_init = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)).double()
    images = sampler.sample(x_init.shape, x_init=x_init, seed=1).numpy()
    options = {"forward": forward, "eta": eta, "variance": variance, "avg_cov": avg_cov}
    found = chain_variances(SCHEDULE, INFLATED, STEPS, variances=S, **options)
    squares = images**2
    error = squares.std(0) / math.sqrt(len(images))
    assert (abs(squares.mean(0) - found) < 4 * error).all()
    assert (error < 0.012 * found).all()


def test_exact_gains_keep_the_datas_variance_where_all_steps_are_taken():
    """A DDPM without shortening is exact up to its discretisation, which N makes small."""
    errors = []
    for N in (100, 400, 1600):
        schedule = NoiseSchedule.linear(N)
        ends = chain_variances(schedule, exact_gains(schedule, S), range(1, N + 1))
        errors.append(abs(ends / S - 1).max())
    assert errors[0] > 2.5 * errors[1] > 7.5 * errors[2]
    assert errors[2] < 0.03
    # With the exact covariances a chain of any length is exact but for its start.
    for forward in ("ddpm", "ddim"):
        ends = chain_variances(
            SCHEDULE, exact_gains(SCHEDULE, S), STEPS, forward=forward, variance="npr", variances=S
        )
        # The last step's covariance stays out: an image has no noise.
        last = SCHEDULE.cum_betas[2] * S / (SCHEDULE.cum_alphas[2] * S + SCHEDULE.cum_betas[2])
        np.testing.assert_allclose(ends + last, S, rtol=1e-3)


def test_gains_of_a_trained_loss_go_into_a_chain():
    """SA's chain ends with more variance than the plain loss's, near (1 + q) s with all steps."""
    schedule = NoiseSchedule.linear(1000)
    gains = gaussian_gains(SALoss(schedule, K=2, lam=1), S)
    ends = chain_variances(schedule, gains, range(1, 1001))
    np.testing.assert_allclose(ends, 4 / 3 * S, rtol=0.04)


def test_predicted_frechet_is_the_metric_for_one_mean():
    v, mean = np.array([0.1, 0.2, 0.0]), np.zeros(3)
    expected = frechet_distance(mean, np.diag(v), mean, np.diag(S))
    assert predicted_frechet(v, S) == pytest.approx(expected, rel=1e-12)
    assert predicted_frechet(S, S) == 0


@pytest.mark.parametrize("rests_on", ["own", "exact"])
@pytest.mark.parametrize(("forward", "eta", "variance"), PROCESSES)
def test_best_strength_is_the_least_of_a_fine_grid(forward, eta, variance, rests_on):
    schedule = NoiseSchedule.linear(50)
    process = {"forward": forward, "eta": eta, "variance": variance}
    best = best_strength(schedule, S, steps=5, rests_on=rests_on, **process)
    visited = choose_timesteps(50, 5, "linear")

    def distance(q):
        gains = inflated_gains(schedule, S, q)
        cov_gains = None if rests_on == "own" else exact_gains(schedule, S)
        given = {"variances": S, "cov_gains": cov_gains, **process}
        return predicted_frechet(chain_variances(schedule, gains, visited, **given), S)

    near = [best - 2e-3 * max(1, best), best + 2e-3 * max(1, best)]
    others = [*near, *np.linspace(0, 1, 21), *np.geomspace(1, 100, 10)]
    assert distance(best) <= min(distance(q) for q in others if q >= 0)


def test_the_best_strength_falls_with_the_steps():
    schedule = NoiseSchedule.linear(200)
    s = np.geomspace(1e-3, 2, 12)
    found = [best_strength(schedule, s, steps=steps) for steps in (5, 10, 25, 50, 200)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 < 0.2 < found[1]
    assert best_strength(schedule, s, steps=25, variance="big") == 0
    # One direction and one step: x_0 has the variance ((1+q) sqrt(a) s / ((1+q) a s + b))^2.
    a, b = schedule.cum_alphas[200], schedule.cum_betas[200]
    whole = b / (math.sqrt(a * 0.5) - a * 0.5)
    assert best_strength(schedule, [0.5], steps=1) == pytest.approx(whole - 1, rel=1e-3)


@pytest.mark.parametrize("trajectory", ["power2", "quad_ddim", "dp_seg", [3, 20, 41]])
def test_best_strength_takes_any_trajectory(trajectory):
    best = best_strength(NoiseSchedule.linear(50), S, steps=3, trajectory=trajectory)
    assert 0 < best < 1000


# -- refusals


@refuses(
    ({"forward": "ode"}, "forward must be one of"),
    ({"variance": "tiny"}, "variance must be one of"),
    ({"variance": "heuristic"}, "variance must be one of .*, got 'heuristic'"),
    ({"variance": "iddpm"}, "variance must be one of .*, got 'iddpm'"),
    ({"forward": "ddim", "variance": "big"}, "variance 'big' is defined for forward 'ddpm' only"),
    ({"eta": 0.5}, "eta belongs to forward 'ddim'"),
    ({"forward": "ddim", "eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
    ({"timesteps": [0, 5]}, r"trajectory must rise strictly inside 1\.\.100"),
    ({"timesteps": [5, 101]}, r"trajectory must rise strictly inside 1\.\.100"),
    ({"timesteps": [5, 5]}, r"trajectory must rise strictly inside 1\.\.100"),
    ({"timesteps": []}, "list of whole numbers"),
    ({"gains": INFLATED[:-1]}, r"gains must have shape \[101, D\] .*, got \(100, 3\)"),
    ({"gains": INFLATED[:, 0]}, r"gains must have shape \[101, D\] .*, got \(101,\)"),
    ({"gains": INFLATED * math.nan}, r"gains must be finite, got gains\[1, 0\] = nan"),
    ({"variance": "npr", "variances": None}, "variance 'npr' needs variances"),
    ({"variance": "sn", "variances": S[:2]}, "variances must have the gains' 3 entries, got 2"),
    ({"variance": "sn", "variances": -S}, r"variances must be finite and > 0"),
    ({"variance": "sn", "cov_gains": INFLATED[:, :2]}, r"cov_gains must have shape \(101, 3\)"),
    ({"variance": "sn", "cov_gains": INFLATED[:9]}, r"cov_gains must have shape \[101, D\]"),
    ({"variance": "sn", "gains": 2 * INFLATED}, "'sn' has no closed form for gains above"),
)
def test_bad_chains_are_refused(bad):
    chain_variances(SCHEDULE, **{"gains": INFLATED, "timesteps": STEPS, "variances": S, **bad})


def test_row_zero_and_rounding_do_not_matter():
    """Exact gains that are above the exact ones by rounding are no reason to refuse "sn"."""
    for s in (S, 1e-9 * S):  # the smaller the variance, the smaller what may be above
        gains = exact_gains(SCHEDULE, s) * (1 + 1e-14)
        gains[0] = math.nan
        for variance in ("small", "analytic", "npr", "sn"):
            found = chain_variances(SCHEDULE, gains, STEPS, variance=variance, variances=s)
            assert np.isfinite(found).all()


@refuses(
    (([0.1, 0.2], S), r"sample_variances must have shape \(3,\), got \(2,\)"),
    (([0.1, 0.2, -0.1], S), "sample_variances must be finite and >= 0"),
    (([0.1, 0.2, math.inf], S), "sample_variances must be finite and >= 0"),
    ((S, 0 * S), "variances must be finite and > 0"),
)
def test_bad_distances_are_refused(bad):
    predicted_frechet(*bad)


@refuses(
    ({"steps": 0}, r"steps must be a whole number in 1\.\.100, got 0"),
    ({"steps": 101}, r"steps must be a whole number in 1\.\.100, got 101"),
    ({}, r"steps must be a whole number in 1\.\.100, got None"),
    ({"steps": 5, "trajectory": "best"}, "trajectory must be one of"),
    ({"steps": 5, "trajectory": "dp_vb"}, "trajectory 'dp_vb' needs terms"),
    ({"steps": 5, "rests_on": "none"}, r"rests_on must be one of \('own', 'exact'\), got 'none'"),
    ({"steps": 5, "variance": "iddpm"}, "variance must be one of"),
    ({"steps": 5, "variances": [0.0]}, "variances must be finite and > 0"),
)
def test_bad_searches_are_refused(bad):
    best_strength(SCHEDULE, **{"variances": S, **bad})
