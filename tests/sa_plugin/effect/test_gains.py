"""Gains: brute force by windows and forward chains, the loss's own gradient, what is refused."""

import itertools

import numpy as np
import pytest
import torch

from sa_plugin.effect.gains import exact_gains, gaussian_gains, inflated_gains, strength
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.refusals import refuses

N = 8
SHORT = NoiseSchedule.from_betas(np.linspace(0.02, 0.6, N))
VARIANCES = np.array([0.003, 0.05, 0.3, 0.9])
CUSTOM = np.random.default_rng(0).uniform(0.3, 2, N + 1)
CUSTOM[3] = 0.0
CUSTOM[5] = -0.7
WEIGHTINGS = {"uniform": "uniform", "theorem1": "theorem1", "relative": "relative", "own": CUSTOM}
KINDS = list(itertools.product(["down", "paper"], ["independent", "shared", "chain"]))


def chain_noises(schedule):
    """eps_n as combinations of the chain's own noises z_1..z_N, [N+1, N], step by step."""
    z, x, eps = np.eye(schedule.N), np.zeros(schedule.N), [np.zeros(schedule.N)]
    for n in range(1, schedule.N + 1):
        x = schedule.alphas[n] ** 0.5 * x + schedule.betas[n] ** 0.5 * z[n - 1]
        eps.append(x / schedule.cum_betas[n] ** 0.5)
    return np.array(eps)


def brute_force(schedule, s, K, lam, tau, relative, window, noise):
    """The minimiser [N+1], row 0 zero, by least squares over every term of the expected loss.

    Errors are vectors over independent standard normal variables, x_0's first: an expected square
    is then a squared length, and the loss the squared length of a vector that is affine in c.
    """
    N, a, b = schedule.N, schedule.cum_alphas, schedule.cum_betas
    of_step = chain_noises(schedule)

    def error(n, position):
        """(v, w) of e_n = c_n v - w."""
        drawn = np.eye(K)[0 if noise == "shared" else position]
        eps = of_step[n] if noise == "chain" else drawn
        w = np.concatenate([[0.0], eps])
        v = b[n] ** 0.5 * w
        v[0] = (a[n] * s) ** 0.5
        return v, w

    blocks, rights = [], []

    def add(terms, factor):
        """factor |sum of weight e_n|^2 over (n, position, weight)."""
        block, right = 0.0, 0.0
        for n, position, weight in terms:
            v, w = error(n, position)
            block = block + np.outer(v, np.eye(N)[n - 1]) * weight
            right = right + w * weight
        blocks.append(factor**0.5 * block)
        rights.append(factor**0.5 * right)

    for t in range(1, N + 1):
        add([(t, 0, 1.0)], 1 / N)
    anchors = range(1, N + 1) if window == "down" else range(1 - K, N + 1)
    for r in anchors if lam else ():
        steps = [(r - p if window == "down" else r + p, p) for p in range(K)]
        steps = [(n, p) for n, p in steps if (1 if window == "down" else 2) <= n <= N]
        largest = max((tau[n] for n, _ in steps), default=0.0) if relative else 1.0
        terms = [(n, p, tau[n] / largest / K) for n, p in steps if largest]
        if terms:
            add(terms, lam / len(anchors))
    solution = np.linalg.lstsq(np.concatenate(blocks), np.concatenate(rights), rcond=None)[0]
    return np.concatenate([[0.0], solution])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("window", "noise"), KINDS)
def test_gains_are_the_minimiser_by_brute_force(window, noise, weighting):
    for K, lam in itertools.product((1, 2, 3, 4), (0, 0.3, 1, 3)):
        loss = SALoss(SHORT, K, lam, WEIGHTINGS[weighting], window, noise)
        tau, relative = loss.tau.values, weighting == "relative"
        found = gaussian_gains(loss, VARIANCES[1:3])
        for i, s in enumerate(VARIANCES[1:3]):
            expected = brute_force(SHORT, s, K, lam, tau, relative, window, noise)
            np.testing.assert_allclose(found[:, i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(6), NoiseSchedule.vpsde(12)])
@pytest.mark.parametrize(("window", "noise"), KINDS)
def test_gains_of_other_schedules_and_the_widest_windows(window, noise, schedule):
    for K in (5, schedule.N):
        loss = SALoss(schedule, K, 3, "uniform", window, noise)
        expected = brute_force(schedule, 0.2, K, 3, loss.tau.values, False, window, noise)
        np.testing.assert_allclose(gaussian_gains(loss, [0.2])[:, 0], expected, rtol=0, atol=1e-10)


def enumerated(loss):
    """(n, r) [M], each as likely as any other: every step with every anchor that it can have."""
    N, K = loss.schedule.N, loss.K
    steps, positions = range(1, N + 1), range(K)
    if loss.backprop == "one":
        sign = 1 if loss.window == "down" else -1
        pairs = [(n, n + sign * j) for n in steps for j in positions]
    elif loss.window == "down":
        pairs = [(n, n) for n in steps]
    else:  # the anchor is n with probability N / (N+K), else one of 1-K..0
        pairs = [(n, r) for n in steps for r in [n] * N + [-j for j in positions]]
    return torch.tensor(pairs).T


def expected_gradient(loss, gains, data):
    """d E loss / d gains [N+1, D], exact: second moments from 2 (K+1) points of x_0 and draws."""
    n, r = enumerated(loss)
    draws = 1 if loss.noise == "shared" else loss.K
    points = np.sqrt(draws + 1) * np.concatenate([np.eye(draws + 1), -np.eye(draws + 1)])
    n, r = n.repeat_interleave(len(points)), r.repeat_interleave(len(points))
    points = torch.from_numpy(points).repeat(len(n) // len(points), 1)[..., None, None, None]
    x0 = data.mu + data.S.sqrt() * points[:, 0]
    noise = points[:, 1:].transpose(0, 1).expand(draws, *x0.shape)
    c = torch.tensor(gains, requires_grad=True)

    def network(x, n):
        return c[n][:, None, None] * (x - data._at(n)[0].sqrt() * data.mu)

    loss(network, x0, n=n, anchor=r, noise=noise).total.backward()
    return c.grad.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reuse": True},
        {"backprop": "one"},
        {"stack": False, "reduction": "mean"},
        {"antithetic": True},
        {"stratified": True},
        {"weighting": "relative"},
        {"weighting": CUSTOM, "backprop": "one"},
        {"weighting": "relative", "reuse": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("window", "noise"), KINDS)
def test_the_losss_own_gradient_is_zero_at_these_gains(window, noise, options):
    data = GaussianData(np.full((1, 1, 4), 0.1), VARIANCES[None, None] / 5, SHORT)
    for K, lam in ((1, 3), (2, 1), (3, 3), (4, 0.3)):
        loss = SALoss(SHORT, K, lam, window=window, noise=noise, **options)
        gains = gaussian_gains(loss, VARIANCES / 5)
        assert abs(expected_gradient(loss, gains, data)).max() < 1e-10
        elsewhere = expected_gradient(loss, gains + 0.01, data)
        assert abs(elsewhere[1:]).min() > 1e-5


@pytest.mark.filterwarnings("ignore:x0 ranges over")  # Gaussian data has no bounds
@pytest.mark.parametrize(
    "options",
    [{}, {"backprop": "one"}, {"noise": "chain"}, {"lam": 0, "input_perturbation": 0.7}],
    ids=str,
)
def test_a_linear_network_in_training_arrives_there(options):
    """By SGD on drawn batches; the mean of the weights of the last two thirds."""
    variances = np.array([0.3, 0.9])
    data = GaussianData(np.full((1, 1, 2), 0.1), variances[None, None], SHORT)
    loss = SALoss(SHORT, 2, **{"lam": 3, **options})
    wanted, start = gaussian_gains(loss, variances), exact_gains(SHORT, variances)
    c = torch.tensor(start, requires_grad=True)
    optimizer, steps, mean = torch.optim.SGD([c], lr=2), 300, 0

    def network(x, n):
        return c[n][:, None, None] * (x - data._at(n)[0].sqrt() * data.mu)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        for i in range(steps):
            optimizer.zero_grad()
            loss(network, data.draw(1000, seed=i)).total.mean().backward()
            optimizer.step()
            if i >= steps // 3:
                mean = mean + c.detach().numpy() / (steps - steps // 3)
    assert abs(mean - wanted).max() < 0.02
    assert abs(start - wanted).max() > 0.15


def test_input_perturbation_takes_the_noise_for_larger():
    """The plain loss's gains in closed form; any loss's from those of the noisier schedule."""
    gamma, a, b = 0.6, SHORT.cum_alphas[1:, None], SHORT.cum_betas[1:, None]
    larger = (1 + gamma**2) * b
    found = gaussian_gains(SALoss(SHORT, lam=0, input_perturbation=gamma), VARIANCES)
    np.testing.assert_allclose(found[1:], np.sqrt(b) / (a * VARIANCES + larger), rtol=1e-13)
    noisier = NoiseSchedule.from_alphas_cumprod((a / (a + larger))[:, 0])
    for window, K in itertools.product(("down", "paper"), (2, 4)):
        options = {"K": K, "lam": 2, "window": window}
        found = gaussian_gains(SALoss(SHORT, **options, input_perturbation=gamma), VARIANCES)
        plain = gaussian_gains(SALoss(noisier, **options), VARIANCES)
        wanted = plain[1:] / np.sqrt((1 + gamma**2) * (a + larger))
        np.testing.assert_allclose(found[1:], wanted, rtol=1e-11)


def test_the_plain_losss_gains_are_the_exact_network():
    schedule = NoiseSchedule.cosine(30)
    data = GaussianData(np.zeros(4), VARIANCES, schedule)
    x = torch.ones(30, 4, dtype=torch.float64)
    expected = np.vstack([np.zeros(4), data.eps(x, torch.arange(1, 31)).numpy()])
    for gains in (
        exact_gains(schedule, VARIANCES),
        inflated_gains(schedule, VARIANCES, 0),
        inflated_gains(schedule, VARIANCES, np.zeros(31)),
        gaussian_gains(SALoss(schedule, K=3, lam=0), VARIANCES),
        gaussian_gains(SALoss(schedule, K=1, lam=2), VARIANCES),
    ):
        np.testing.assert_allclose(gains, expected, rtol=1e-13)


def test_inflated_gains_are_the_exact_ones_of_inflated_data():
    q = np.linspace(0, 2, N + 1)
    q[0] = np.nan
    gains = inflated_gains(SHORT, VARIANCES, q)
    for n in range(1, N + 1):
        expected = exact_gains(SHORT, (1 + q[n]) * VARIANCES)[n]
        np.testing.assert_allclose(gains[n], expected, rtol=1e-14)
    assert not gains[0].any()


@pytest.mark.parametrize(("K", "lam"), [(2, 1), (3, 0.3), (4, 1), (2, 3)])
def test_k_and_lambda_act_through_q_on_a_long_schedule(K, lam):
    schedule, q = NoiseSchedule.linear(1000), strength(K, lam)
    gains = gaussian_gains(SALoss(schedule, K, lam), VARIANCES)
    middle, inflated = slice(50, 950), inflated_gains(schedule, VARIANCES, q)
    np.testing.assert_allclose(gains[middle], inflated[middle], rtol=1e-3)
    # Shared noises cancel in no window: only the weight of L_simple grows.
    shared = gaussian_gains(SALoss(schedule, K, lam, noise="shared"), VARIANCES)
    exact = exact_gains(schedule, VARIANCES)
    np.testing.assert_allclose(shared[middle], exact[middle], rtol=1e-3)
    effect = abs(inflated / np.where(exact > 0, exact, 1) - 1)[middle]
    assert effect.max() > 0.1


def test_directions_are_solved_in_parts_of_any_size(monkeypatch):
    loss = SALoss(SHORT, K=3, window="paper", noise="chain")
    whole = gaussian_gains(loss, VARIANCES)
    monkeypatch.setattr("sa_plugin.effect.gains._MOST", 1)
    np.testing.assert_allclose(gaussian_gains(loss, VARIANCES), whole, rtol=1e-14)


def test_strength():
    assert strength(2, 1) == pytest.approx(1 / 3)
    assert strength(3, 0.3) == pytest.approx(0.6 / 3.3)
    assert strength(1, 5) == strength(4, 0) == 0


@refuses(
    ((0, 1), r"K must be a whole number in 1\.\.\d+, got 0"),
    ((2.5, 1), r"K must be a whole number in 1\.\.\d+, got 2.5"),
    ((2, -0.1), r"lam must be a finite number >= 0, got -0.1"),
    ((2, np.nan), r"lam must be a finite number >= 0, got nan"),
)
def test_strength_refuses(bad):
    strength(*bad)


BAD_VARIANCES = (
    ([], r"variances must have shape \[D\], at least one, got \(0,\)"),
    (0.5, r"variances must have shape \[D\], at least one, got \(\)"),
    ([[0.5]], r"variances must have shape \[D\], at least one, got \(1, 1\)"),
    ([1, 0], r"variances must be finite and > 0, got variances\[1\] = 0.0"),
    ([-1, 1], r"variances must be finite and > 0, got variances\[0\] = -1.0"),
    ([1, np.inf], r"variances must be finite and > 0, got variances\[1\] = inf"),
    ([np.nan], r"variances must be finite and > 0, got variances\[0\] = nan"),
)


@pytest.mark.parametrize(
    "gains",
    [
        lambda s: exact_gains(SHORT, s),
        lambda s: inflated_gains(SHORT, s, 0.1),
        lambda s: gaussian_gains(SALoss(SHORT), s),
    ],
)
@refuses(*BAD_VARIANCES)
def test_bad_variances_are_refused(bad, gains):
    gains(bad)


@refuses(
    (-0.1, r"q must be finite and >= 0, got -0.1"),
    (np.inf, r"q must be finite and >= 0, got inf"),
    (None, r"q must be real numbers, got object"),
    (np.ones(N), r"q must be a number or a table of shape \(9,\) .*got \(8,\)"),
    (np.ones((N + 1, 1)), r"q must be a number or a table of shape \(9,\) .*got \(9, 1\)"),
    ([0, 1, 1, -1, 1, 1, 1, 1, 1], r"q must be finite and >= 0, got q\[3\] = -1"),
    ([0, np.nan, 1, 1, 1, 1, 1, 1, 1], r"q must be finite and >= 0, got q\[1\] = nan"),
)
def test_bad_strengths_are_refused(bad):
    inflated_gains(SHORT, VARIANCES, bad)


def test_rounded_calls_are_refused():
    loss = SALoss(SHORT, backprop="one", extra_precision="bf16")
    with pytest.raises(ValueError, match="extra_precision must be 'same', got 'bf16'"):
        gaussian_gains(loss, VARIANCES)
