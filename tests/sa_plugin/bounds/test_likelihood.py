"""The bound: the published code's numbers, Gaussian data in closed form, its parts, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from sa_plugin import NoiseSchedule, negative_elbo
from sa_plugin.bounds.likelihood import bits_per_dim, discretised_nll, gaussian_kl, mean_with_error
from tests.gaussian import GaussianData
from tests.refusals import refuses
from tests.sa_plugin.sampling.test_sampler import GoldenToy
from tests.toys import normal, read_json, read_npz, schedule_of, toy_eps

GOLDEN, ARRAYS = read_json("likelihood"), read_npz("likelihood")
LINEAR = NoiseSchedule.linear(100)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(60))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def gray(count, *shape, seed=0):
    """Images of whole grey levels, float64."""
    return LEVELS[torch.randint(256, (count, *shape), generator=torch.manual_seed(seed))]


def expected_terms(data, x0, **options):
    """The terms' exact expectation over the noise for one value x0, by quadrature.

    Every term has a draw of its own, so one node can serve them all.
    """
    network = data.network(options["variance"] if options["variance"] in ("npr", "sn") else "eps")
    images = torch.full((len(NODES), 1), float(x0), dtype=torch.float64)
    options = {"clip_x0": False, "gamma": data.gamma, "noise": lambda k: NODES[:, None], **options}
    return negative_elbo(network, data.schedule, images, **options).terms @ WEIGHTS


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("i", range(len(GOLDEN)))
def test_equals_the_published_code(i, batch_size):
    case = GOLDEN[i]
    schedule = schedule_of(case["schedule"])
    optimal = {"eps_epsc": "npr", "eps": "analytic"}[case["typ"]]
    good = 1 - 0.9 * np.exp(-1000 * np.arange(schedule.N + 1) / schedule.N / 200)
    noise = normal(4, case["steps"], 6, 2, 3, 3)
    options = {name: case[name] for name in ("steps", "trajectory")}
    options["variance"] = optimal if case["var"] == "optimal" else case["var"]
    options |= {"gamma": good if case["ms_eps"] else None, "batch_size": batch_size}
    network, x0 = GoldenToy(case, schedule.N), torch.from_numpy(ARRAYS["x0"])
    bound = negative_elbo(network, schedule, x0, noise=lambda k: noise[k], **options)
    np.testing.assert_allclose(bound.terms.numpy(), ARRAYS[f"terms_{i}"], rtol=1e-9)
    np.testing.assert_allclose(bound.total.numpy(), ARRAYS[f"nelbo_{i}"], rtol=1e-9)


# -- Gaussian data


@pytest.mark.parametrize("variance", ["analytic", "npr", "sn"])
@pytest.mark.parametrize("steps", [[1, 100], [1, 7, 30, 100], list(range(1, 101))])
def test_exact_networks_make_the_bound_tight_at_any_number_of_steps(variance, steps):
    """-log p(x_0), but for the start N(0, 1) instead of q(x_N), known too, and the decoder.

    The chain up to x_{t_1} is exact, so that total - decoder = KL(q(x_N..x_1 | x_0) || p) is
    KL(q(x_1 | x_0) || q(x_1)) + E log q(x_N) / N(x_N; 0, 1).
    """
    data = GaussianData([0.2], [0.3], LINEAR)
    for x0 in (LEVELS[30], LEVELS[170]):
        terms = expected_terms(data, x0, variance=variance, trajectory=steps)
        a, b = (torch.tensor(table[[1, -1]]) for table in (LINEAR.cum_alphas, LINEAR.cum_betas))
        given_x0 = Normal(a.sqrt() * x0, b.sqrt())
        mean, var = (torch.stack([data.marginal(n)[i][0] for n in (1, 100)]) for i in (0, 1))
        first, last = kl_divergence(given_x0, Normal(mean, var.sqrt()))
        start = kl_divergence(given_x0, Normal(torch.zeros(2).double(), 1.0))[1]
        torch.testing.assert_close(terms[-1], start, rtol=1e-9, atol=0)
        torch.testing.assert_close(terms[1:].sum(), first - last + start, rtol=1e-9, atol=0)


def test_with_the_exact_decoder_the_bound_is_minus_log_p():
    """The mass of each level, summed over: a distribution, and the data's own.

    What remains are tanh in place of the distribution function (up to 4e-4 in it), and N(0, 1) in
    place of q(x_N).
    """
    data, half = GaussianData([0.2], [0.05], LINEAR), 1 / 255
    options = {"variance": "npr", "trajectory": [1, 20, 100]}
    options["decoder_variance"] = float(data.covariance(1))
    density = Normal(data.mu, data.S.sqrt())
    for x0 in LEVELS[[100, 140, 190]]:
        mass = density.cdf(x0 + half) - density.cdf(x0 - half)
        total = float(expected_terms(data, x0, **options).sum())
        assert total == pytest.approx(-float(mass.log()), abs=0.02)


# -- parts


@given(*[st.floats(-2, 2)] * 2, *[st.floats(1e-4, 3)] * 2)
@settings(max_examples=50, deadline=None)
def test_kl_is_that_of_torch(mean_q, mean_p, var_q, var_p):
    mq, mp, vq, vp = torch.tensor([mean_q, mean_p, var_q, var_p], dtype=torch.float64)
    expected = kl_divergence(Normal(mq, vq.sqrt()), Normal(mp, vp.sqrt()))
    torch.testing.assert_close(gaussian_kl(mq, vq, mp, vp), expected, rtol=1e-9, atol=1e-12)


@given(st.floats(-1.5, 1.5), st.floats(1e-3, 1.5))
@settings(max_examples=50, deadline=None)
def test_the_levels_masses_sum_to_one(mean, sigma):
    mean, variance = torch.tensor([mean, sigma**2], dtype=torch.float64)
    nll = discretised_nll(LEVELS, mean, variance)
    assert nll.isfinite().all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_masses_are_those_of_the_normal_distribution():
    mean, sigma = torch.tensor(0.1).double(), torch.tensor(0.2).double()
    edges = torch.cat([LEVELS - 1 / 255, torch.ones(1)])
    edges[0], edges[-1] = -math.inf, math.inf
    expected = Normal(mean, sigma).cdf(edges).diff()
    actual = (-discretised_nll(LEVELS, mean, sigma**2)).exp()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_far_tails_stay_finite_and_in_order():
    nll = discretised_nll(LEVELS, torch.tensor(-1.0).double(), torch.tensor(1e-4).double())
    assert nll.isfinite().all()
    assert (nll.diff()[:-1] > 0).all()


def test_each_step_by_brute_force():
    """sn on a trajectory with gaps: the KL of torch.distributions from Bayes' rule."""
    data = GaussianData([0.3, -0.5], [0.04, 0.3], LINEAR)
    x0, noise = gray(3, 2), normal(1, 3, 3, 2)
    options = {"variance": "sn", "trajectory": [4, 31, 90], "clip_x0": False}
    bound = negative_elbo(data.network("sn"), LINEAR, x0, noise=lambda k: noise[k], **options)
    for k, (s, t) in enumerate([(31, 90), (4, 31)]):
        a, b = float(LINEAR.cum_alphas[t]), float(LINEAR.cum_betas[t])
        x = a**0.5 * x0 + b**0.5 * noise[k]
        skip = float(LINEAR.skip_alpha(s, t))

        def posterior(mean, var, x=x, skip=skip):  # of x_s, from x_t = sqrt(skip) x_s + noise
            precision = 1 / var + skip / (1 - skip)
            m = (mean / var + skip**0.5 * x / (1 - skip)) / precision
            return Normal(m, torch.as_tensor(precision, dtype=torch.float64) ** -0.5)

        q = posterior(float(LINEAR.cum_alphas[s]) ** 0.5 * x0, float(LINEAR.cum_betas[s]))
        expected = kl_divergence(q, posterior(*data.marginal(s))).sum(1)
        torch.testing.assert_close(bound.terms[2 - k], expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(bound.total, bound.terms.sum(0))


def test_iddpm_between_small_and_big_with_its_range_at_the_decoder():
    x0 = gray(3, 2)

    def run(variance, value, **options):
        model = lambda x, n: (toy_eps(x, n), torch.full_like(x, value))  # noqa: E731
        return negative_elbo(model, LINEAR, x0, variance=variance, steps=5, **options).terms

    torch.testing.assert_close(run("iddpm", -1.0), run("small", 0.0), rtol=1e-9, atol=1e-12)
    ends = run("big", 0.0, decoder_variance=float(LINEAR.betas[1]))
    torch.testing.assert_close(run("iddpm", 1.0), ends, rtol=1e-9, atol=1e-12)


# -- noise, batches, types


def test_the_noise_belongs_to_the_image():
    x0 = gray(130, 2)

    def terms(x0, **options):
        return negative_elbo(toy_eps, LINEAR, x0, steps=4, **options).terms

    whole = terms(x0)
    torch.testing.assert_close(terms(x0, batch_size=47), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms(x0[70:], first=70), whole[:, 70:], rtol=1e-12, atol=0)
    assert not torch.equal(terms(x0, seed=1), whole)


def test_float32_images_give_the_same_bound_and_reach_the_network_as_they_are():
    seen = set()

    def network(x, n, labels=None):
        seen.add(x.dtype)
        assert len(labels) == len(x)
        return toy_eps(x, n)

    x0, noise = gray(5, 3), normal(0, 6, 5, 3)
    options = {"steps": 6, "noise": lambda k: noise[k], "batch_size": 2, "labels": torch.arange(5)}
    double, single = (negative_elbo(network, LINEAR, x, **options) for x in (x0, x0.float()))
    assert seen == {torch.float32, torch.float64}
    assert single.total.dtype == torch.float64
    torch.testing.assert_close(single.total, double.total, rtol=1e-4, atol=0)


def test_bits_and_errors():
    assert bits_per_dim(8 * math.log(2) * 12, 12) == pytest.approx(8)
    values = normal(0, 3, 50)
    mean, stderr = mean_with_error(values)
    np.testing.assert_allclose(mean, values.numpy().mean(1))
    np.testing.assert_allclose(stderr, values.numpy().std(1, ddof=1) / 50**0.5)


# -- refusals


def test_probes_are_exact_for_a_diagonal_covariance():
    data = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 1.5], LINEAR)
    x0 = gray(5, 3)
    options = {"steps": 7, "clip_x0": False, "seed": 3}
    exact = negative_elbo(data.network("npr"), LINEAR, x0, variance="npr", **options)
    for more in ({}, {"probes": 3, "batch_size": 2}):
        found = negative_elbo(data.network(), LINEAR, x0, variance="probes", **options, **more)
        torch.testing.assert_close(found.terms, exact.terms)


@refuses(
    ({"x0": torch.full((2, 3), 0.1)}, r"x0 must hold 8-bit values v as v / 127.5 - 1.*0.1"),
    ({"x0": torch.full((2, 3), 257 / 127.5 - 1)}, "x0 must hold 8-bit values.*1.01"),
    ({"x0": torch.full((2, 3), math.nan)}, "x0 must hold 8-bit values.*nan"),
    ({"x0": gray(2, 3).half()}, "x0 must hold 8-bit values.*float16"),
    ({"x0": torch.zeros(2, 3, dtype=torch.uint8)}, "floating-point images .*uint8"),
    ({"x0": torch.zeros(2)}, r"floating-point images .*\(2,\)"),
    ({"x0": torch.zeros(0, 3)}, r"floating-point images .*\(0, 3\)"),
    ({"x0": [1.0]}, "floating-point images .*list"),
    ({"variance": "exact"}, "variance must be one of .*'exact'"),
    ({"variance": "analytic"}, "'analytic' needs gamma"),
    ({"variance": "npr"}, "'npr' needs a network that returns the pair"),
    ({"variance": "lanczos"}, "variance 'lanczos' has no diagonal"),
    ({"variance": "probes", "probes": 0}, "probes must be"),
    ({"predicts": "score"}, "predicts must be one of .*'score'"),
    ({"steps": 0}, r"steps must be a whole number in 1\.\.100, got 0"),
    ({"trajectory": "cubic"}, "trajectory must be one of .*'cubic'"),
    ({"decoder_variance": 0.0}, "decoder_variance must be a finite number > 0, got 0.0"),
    ({"decoder_variance": math.nan}, "decoder_variance must be a finite number > 0, got nan"),
    (
        {"schedule": NoiseSchedule.from_betas([0.1]), "steps": 1},
        "decoder_variance must be .* N = 1.*None",
    ),
    ({"seed": -1}, "seed must be .*got -1"),
    ({"first": -1}, "first must be .*got -1"),
    ({"batch_size": 0}, "batch_size must be .*got 0"),
    ({"noise": lambda k: torch.zeros(1, 3)}, r"noise\(k\) must have shape \(2, 3\)"),
    ({"model": lambda x, n: x[:1]}, r"input's shape \(2, 3\), got \(1, 3\)"),
    ({"model": lambda x, n: x / (n[0] - 34)}, "not finite, first at step n = 34"),
)
def test_bad_arguments_are_refused(changed):
    arguments = {"model": toy_eps, "schedule": LINEAR, "x0": gray(2, 3), "steps": 4, **changed}
    negative_elbo(arguments.pop("model"), arguments.pop("schedule"), **arguments)


@refuses(*[(dims, "dims must be a whole number") for dims in (0, 1.5, True)])
def test_bad_dims_are_refused(dims):
    bits_per_dim(1.0, dims)


@pytest.mark.parametrize("shape", [(1,), (3, 1), ()])
def test_errors_need_two_images(shape):
    with pytest.raises(ValueError, match="values must hold at least 2 images"):
        mean_with_error(torch.zeros(shape))
