"""Covariances and reverse variances: a Gaussian whose answers are known, limits, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.sampling import variance as v
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.refusals import refuses

SCHEDULES = {
    "linear": NoiseSchedule.linear(100),
    "cosine": NoiseSchedule.cosine(100),
    "vpsde": NoiseSchedule.vpsde(60),
}
MU = [[0.3, -0.5], [0.1, 0.8]]
S = [[0.04, 0.3], [1.5, 0.9]]

ANY_STEP = st.tuples(
    st.sampled_from(sorted(SCHEDULES)), st.integers(0, 59), st.integers(1, 60)
).filter(lambda p: p[1] < p[2])
MANY = settings(max_examples=80, deadline=None)


def numbers(name, s, t):
    """cum_alpha_s, cum_alpha_t, cum_beta_s, cum_beta_t, skip_beta, tilde_beta as floats."""
    schedule = SCHEDULES[name]
    a, b = schedule.cum_alphas, schedule.cum_betas
    between = schedule.skip_beta(s, t), schedule.tilde_beta(s, t)
    return tuple(float(x) for x in (a[s], a[t], b[s], b[t], *between))


def exact(data, method, n, x):
    """The covariance by ``method`` from the exact network's outputs at step n."""
    a, b = data.schedule.cum_alphas[n], data.schedule.cum_betas[n]
    eps, *second = data.network(method)(x, n) if method != "analytic" else [data.eps(x, n)]
    known = {"eps": eps, "second": second[0] if second else None, "gamma": data.gamma[n]}
    return v.covariance(method, a, b, **known)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 30, 60])
def test_covariance_of_a_gaussian(name, n):
    data = GaussianData(MU, S, SCHEDULES[name])
    x, truth = data.draw(5), data.covariance(n)
    for method in ("npr", "sn"):
        found = exact(data, method, n, x)
        torch.testing.assert_close(found, truth.expand(5, 2, 2), rtol=1e-9, atol=0)
    assert exact(data, "analytic", n, x) == pytest.approx(float(truth.mean()), rel=1e-9)


def test_analytic_is_exact_for_an_isotropic_gaussian():
    data = GaussianData(MU, torch.full((2, 2), 0.7), SCHEDULES["linear"])
    for n in (1, 50, 100):
        value = exact(data, "analytic", n, data.draw(1))
        np.testing.assert_allclose(value, data.covariance(n).numpy(), rtol=1e-9)


@given(ANY_STEP)
@MANY
def test_ddpm_optimal_variance_is_the_exact_one_of_a_gaussian(step):
    name, s, t = step
    data = GaussianData(MU, S, SCHEDULES[name])
    alpha_s, _, _, beta_t, skip_beta, tilde_beta = numbers(*step)
    weight = v.covariance_weight_ddpm(alpha_s, beta_t, skip_beta)
    lambda2 = v.forward_variance(tilde_beta, "ddpm")
    result = v.optimal_variance(data.covariance(t), lambda2, weight)
    torch.testing.assert_close(result, data.reverse_variance(s, t), rtol=1e-9, atol=1e-15)


@given(ANY_STEP, st.floats(0, 1), st.floats(0, 1))
@MANY
def test_bounds(step, eta, q):
    """small <= optimal <= big / skip_alpha for any Cov = cum_beta/cum_alpha q with q in [0, 1]."""
    alpha_s, alpha_t, beta_s, beta_t, skip_beta, tilde_beta = numbers(*step)
    cov = v.covariance_npr(q, alpha_t, beta_t)
    weight = v.covariance_weight_ddpm(alpha_s, beta_t, skip_beta)
    optimal = v.optimal_variance(cov, tilde_beta, weight)
    highest = skip_beta / (1 - skip_beta)
    assert tilde_beta <= optimal <= highest * (1 + 1e-9)
    lambda2 = v.forward_variance(tilde_beta, "ddim", eta)
    assert lambda2 == pytest.approx(eta**2 * tilde_beta)
    assert v.covariance_weight_ddim(alpha_s, alpha_t, beta_s, beta_t, lambda2) >= 0


def test_ddim_weight_by_the_derivative_of_its_mean():
    """The mean's dependence on x_0, with eps = (x - a x0) / b put in, squared."""
    alpha_s, alpha_t, beta_s, beta_t, _, tilde_beta = numbers("linear", 20, 60)
    for eta in (0.0, 0.4, 1.0):
        lambda2 = eta**2 * tilde_beta

        def mean(x0, lambda2=lambda2):
            eps = (0.7 - math.sqrt(alpha_t) * x0) / math.sqrt(beta_t)
            return math.sqrt(alpha_s) * x0 + math.sqrt(beta_s - lambda2) * eps

        slope = mean(1.0) - mean(0.0)
        weight = v.covariance_weight_ddim(alpha_s, alpha_t, beta_s, beta_t, lambda2)
        assert weight == pytest.approx(slope**2, rel=1e-10)


def test_iddpm_between_its_ends():
    small, big = 0.01, 0.04
    assert v.iddpm_variance(-1.0, small, big) == pytest.approx(small)
    assert v.iddpm_variance(1.0, small, big) == pytest.approx(big)
    assert v.iddpm_variance(0.0, small, big) == pytest.approx(0.02)  # the geometric mean
    second = np.linspace(-1.5, 1.5, 31)
    by_logs = np.exp((second + 1) / 2 * np.log(big) + (1 - second) / 2 * np.log(small))
    np.testing.assert_allclose(v.iddpm_variance(second, small, big), by_logs, rtol=1e-12)


@pytest.mark.parametrize("second", [-3.0, -1.0, 0.3, 1.0, 3.0])
def test_iddpm_is_zero_where_the_posterior_is_a_point(second):
    assert v.iddpm_variance(second, 0.0, 0.2) == 0
    tensor = v.iddpm_variance(torch.tensor([second]), torch.tensor(0.0), torch.tensor(0.2))
    assert tensor.tolist() == [0.0]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("method", v.COVARIANCES)
def test_floats_arrays_and_tensors_agree(method, clip, average):
    rng = np.random.default_rng(0)
    known = {"eps": rng.normal(size=(3, 2, 2)), "second": rng.normal(size=(3, 2, 2)), "gamma": 0.8}
    options = {"average": average, "clip": clip}
    array = v.covariance(method, 0.4, 0.6, **known, **options)
    a, b = torch.tensor([0.4, 0.6], dtype=torch.float64)
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in known.items()}
    tensor = v.covariance(method, a, b, **tensors, **options)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12)
    if not average:
        own = {name: known[name][1, 0, 1] for name in ("eps", "second")}
        one = v.covariance(method, 0.4, 0.6, **known | own, **options)
        at = array if method == "analytic" else array[1, 0, 1]
        assert one == pytest.approx(at, rel=1e-12)


def test_covariance_bounds():
    second = torch.tensor([[-1.0, 0.1, 9.0]])
    for clip, highest in ((False, 9.0), (True, 1.0)):  # never negative
        found = v.covariance("npr", 0.5, 0.5, second=second, clip=clip)
        torch.testing.assert_close(found, torch.tensor([[0.0, 0.1, highest]]))
    assert v.covariance("analytic", 0.5, 0.5, gamma=1.01) == 0


def test_average_is_taken_per_image_and_before_clipping():
    second = torch.tensor([[[-0.3, 1.5]], [[0.2, 0.4]]])
    mean = v.covariance("npr", 0.5, 0.5, second=second, average=True, clip=True)
    torch.testing.assert_close(mean, torch.tensor([[[0.6]], [[0.3]]]))


def test_pixel_limit_is_a_mean_absolute_change():
    noise = np.random.default_rng(0).normal(size=10**6) * math.sqrt(v.pixel_variance_limit(2))
    assert np.abs(noise).mean() * 255 / 2 == pytest.approx(2, rel=5e-3)


@refuses(
    ("analytic", "'analytic' needs gamma"),
    ("npr", "'npr' needs second"),
    ("sn", "'sn' needs eps"),
    ("heuristic", "'heuristic' needs eps"),
    ("small", "method must be one of .*'small'"),
)
def test_covariance_refuses(method):
    v.covariance(method, 0.5, 0.5)


@refuses(
    (("small", "sde", 0.0), "forward must be one of .*'sde'"),
    (("large", "ddpm", 0.0), "variance must be one of .*'large'"),
    (("small", "ddim", 1.2), "eta .*1.2"),
    (("small", "ddim", -0.1), "eta .*-0.1"),
    (("small", "ddim", math.nan), "eta .*nan"),
    (("small", "ddim", "0"), "eta .*'0'"),
    (("small", "ddpm", 0.5), "eta belongs to forward 'ddim'"),
    (("big", "ddim", 0.0), "'big' is defined for forward 'ddpm' only.*'small'"),
    (("iddpm", "ddim", 1.0), "'iddpm' is defined for forward 'ddpm' only"),
)
def test_bad_options_are_refused(options):
    v.check_variance(*options)
