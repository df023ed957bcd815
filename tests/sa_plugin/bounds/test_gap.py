"""The total gap: Theorem 1 against chains written out, closed forms, Theorem 2's bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.bounds.gap import gap_along_chain, step_error, theorem2_bounds, total_gap
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable, gamma_1, gamma_2
from tests.gaussian import GaussianData
from tests.refusals import refuses
from tests.toys import images, normal, over, toy_eps

SCHEDULE = NoiseSchedule.from_betas(np.linspace(0.01, 0.3, 12))
START = 9
SHAPE = (3, 1, 2, 2)
X0 = images(0, *SHAPE)
TAU = TauTable(SCHEDULE, "theorem1").values


def gap_of(model, x0=X0, **options):
    return gap_along_chain(model, SCHEDULE, x0, **{"start": START, **options})


def written_out(model, x0, x_start, draws, clip):
    """The network's chain and the true one, step by step in NumPy: lists of x_{start-1}..x_1."""
    ours = true = np.asarray(x_start)
    chains = [], []
    for i, draw in zip(range(START, 1, -1), draws, strict=True):
        a, b = SCHEDULE.cum_alphas[i], SCHEDULE.cum_betas[i]
        eps = model(torch.from_numpy(ours), torch.full((len(ours),), i)).numpy()
        predicted = (ours - b**0.5 * eps) / a**0.5
        predicted = np.clip(predicted, -1, 1) if clip else predicted
        noise = float(SCHEDULE.tilde_beta(i - 1, i)) ** 0.5 * draw
        ours = gamma_1(SCHEDULE)[i] * predicted + gamma_2(SCHEDULE)[i] * ours + noise
        true = gamma_1(SCHEDULE)[i] * x0 + gamma_2(SCHEDULE)[i] * true + noise
        chains[0].append(ours)
        chains[1].append(true)
    return chains


def sampler_of(model, clip=False):
    return Sampler(model, SCHEDULE, trajectory=range(1, START + 1), clip_x0=clip)


def norms(x):
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("clip", [False, True])
def test_theorem_1_holds_along_a_real_chain(clip):
    """d(x_0) is how far x_1 lies from the true chain with the same draws; partial distances too.

    The error of an unclipped step is the network's.
    """
    x_start, draws = normal(1, *SHAPE), normal(2, START - 1, *SHAPE)
    errors = torch.zeros(START + 1, *SHAPE, dtype=torch.float64)
    sampler = sampler_of(toy_eps, clip)
    for step in sampler.iterate(SHAPE, x_init=x_start, noise=lambda k: draws[k]):
        errors[step.t] = step_error(SCHEDULE, step, X0)
        if not clip:
            a, b = SCHEDULE.cum_alphas[step.t], SCHEDULE.cum_betas[step.t]
            network = toy_eps(step.x_t, torch.full((3,), step.t))
            expected = network - (step.x_t - a**0.5 * X0) / b**0.5
            torch.testing.assert_close(errors[step.t], expected, rtol=1e-9, atol=0)
    ours, true = written_out(toy_eps, X0.numpy(), x_start, draws.numpy(), clip)
    gap = total_gap(SCHEDULE, errors).numpy()
    np.testing.assert_allclose(ours[-1] - true[-1], -gap, rtol=1e-9, atol=1e-12)
    assert np.abs(gap).min() > 1e-3


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_curve_against_chains_written_out(stochastic, clip):
    """The draws are the sampler's: the first makes x_start, the k-th of the rest is step k's."""
    curve = gap_of(toy_eps, seed=5, stochastic=stochastic, clip_x0=clip)
    draws = recorded_draws(seed=5)
    a, b = SCHEDULE.cum_alphas[START], SCHEDULE.cum_betas[START]
    x_start = a**0.5 * X0.numpy() + b**0.5 * draws[0]
    steps = draws[1:] if stochastic else np.zeros_like(draws[1:])
    ours, true = written_out(toy_eps, X0.numpy(), x_start, steps, clip)
    distance = np.stack([norms(o - t) for o, t in zip(ours, true, strict=True)])
    assert curve.timesteps.tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    np.testing.assert_allclose(curve.distance_mean, distance.mean(1), rtol=1e-9)
    stderr = distance.std(1, ddof=1) / 3**0.5
    np.testing.assert_allclose(curve.distance_stderr, stderr, rtol=1e-9)
    np.testing.assert_allclose(curve.total, distance[-1], rtol=1e-9)
    # What x_{n-1} is off by reaches x_1 times gamma_{2,2} ... gamma_{2,n-1}.
    carried = np.cumprod(gamma_2(SCHEDULE)[2:START])[::-1]
    np.testing.assert_allclose(curve.mean[:-1], curve.distance_mean[:-1] * carried, rtol=1e-9)
    np.testing.assert_allclose(curve.mean[-1], curve.total.mean(), rtol=1e-12)
    np.testing.assert_allclose(curve.stderr[-1], curve.total.std(ddof=1) / 3**0.5, rtol=1e-9)
    x1 = torch.from_numpy(ours[-1])
    a, b = SCHEDULE.cum_alphas[1], SCHEDULE.cum_betas[1]
    end = (x1 - b**0.5 * toy_eps(x1, torch.ones(3, dtype=torch.int64))) / a**0.5
    end = end.clamp(-1, 1) if clip else end
    np.testing.assert_allclose(curve.end, norms(end - X0), rtol=1e-9)


def recorded_draws(seed):
    """What a run of the sampler with this seed draws: x_N, then every step's noise."""
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    a, draws = SCHEDULE.cum_alphas, []
    for step in sampler_of(lambda x, n: x * 0).iterate(SHAPE, seed=seed, x_init=zero):
        kept = gamma_1(SCHEDULE)[step.t] / a[step.t] ** 0.5 + gamma_2(SCHEDULE)[step.t]
        if step.s > 0:
            sigma = float(SCHEDULE.tilde_beta(step.s, step.t)) ** 0.5
            draws.append((step.x_s - kept * step.x_t) / sigma)
    # The seed of the first block of 64 images:
    block_seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(block_seed)
    x_start = torch.randn(64, *SHAPE[1:], generator=generator, dtype=torch.float64)[:3]
    return np.stack([x_start.numpy(), *(draw.numpy() for draw in draws)])


def biased(x0, bias):
    """A network that knows x_0 (one image for all) and errs by ``bias[n]`` in every value."""

    def network(x, n):
        a, b, wrong = (
            over(torch.tensor(table)[n], x)
            for table in (SCHEDULE.cum_alphas, SCHEDULE.cum_betas, bias)
        )
        return (x - a.sqrt() * x0) / b.sqrt() + wrong

    return network


def test_a_known_bias_has_a_known_gap():
    """e_n = bias_n in each of 4 dimensions: norms sqrt(4) |sum tau_n bias_n|, whatever the noise.

    A network that knows the images has no gap.
    """
    bias = 0.1 + 0.05 * np.arange(SCHEDULE.N + 1)
    x0 = X0[:1].expand(SHAPE)
    curve = gap_of(biased(x0, bias), x0, clip_x0=False)
    expected = 2 * np.cumsum((TAU * bias)[START:1:-1])
    np.testing.assert_allclose(curve.mean, expected, rtol=1e-9)
    assert curve.stderr.max() < 1e-9
    end = 2 * bias[1] * (SCHEDULE.cum_betas[1] / SCHEDULE.cum_alphas[1]) ** 0.5
    np.testing.assert_allclose(curve.end, end, rtol=1e-9)
    curve = gap_of(biased(X0, 0 * bias), start=SCHEDULE.N)
    assert max(curve.mean.max(), curve.distance_mean.max(), curve.end.max()) < 1e-12


@pytest.mark.filterwarnings("ignore:x0 ranges over")  # Gaussian data has no bounds
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_exact_network_of_gaussian_data_has_a_known_gap(stochastic):
    """E|d|^2 through the chain's linear coefficients of x_0 - mu, eps and every draw."""
    data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor([0.05, 0.4]), SCHEDULE)
    S, start = data.S.numpy(), SCHEDULE.N
    a, b = SCHEDULE.cum_alphas, SCHEDULE.cum_betas
    # Coefficients of (x_0 - mu, eps, draws) in x_n and in the distance, [2 + start, 2].
    x = np.zeros((2 + start, 2))
    x[0], x[1] = a[start] ** 0.5, b[start] ** 0.5
    distance = np.zeros_like(x)
    for i in range(start, 1, -1):
        predicted = a[i] ** 0.5 * S / (a[i] * S + b[i]) * x
        missed = predicted.copy()
        missed[0] -= 1
        distance = gamma_2(SCHEDULE)[i] * distance + gamma_1(SCHEDULE)[i] * missed
        x = gamma_1(SCHEDULE)[i] * predicted + gamma_2(SCHEDULE)[i] * x
        if stochastic:
            x[i] += float(SCHEDULE.tilde_beta(i - 1, i)) ** 0.5
    expected = (distance[0] ** 2 * S + (distance[1:] ** 2).sum(0)).sum()
    options = {"stochastic": stochastic, "clip_x0": False, "batch_size": 5000}
    squares = gap_of(data.network(), data.draw(20_000), start=start, **options).total ** 2
    assert squares.mean() == pytest.approx(expected, abs=5 * squares.std() / len(squares) ** 0.5)
    assert squares.mean() == pytest.approx(expected, rel=0.05)


def test_an_image_depends_on_its_number_alone():
    """Any batch size, any sharing out; another seed gives others."""
    x0, options = images(3, 70, 1, 2, 2), {"start": 4, "seed": 2}
    whole = gap_of(toy_eps, x0, **options)
    cut = gap_of(toy_eps, x0, batch_size=33, **options)
    rest = gap_of(toy_eps, x0[50:], first=50, **options)
    for name in ("mean", "stderr", "distance_mean", "distance_stderr", "total", "end"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name)), name
    assert np.array_equal(rest.total, whole.total[50:])
    assert np.array_equal(rest.end, whole.end[50:])
    other = gap_of(toy_eps, x0, start=4, seed=3)
    assert not np.isclose(other.total, whole.total).any()


@pytest.mark.parametrize("kind", ["npr", "sn", "x0", "v"])
def test_pairs_and_other_predictions_give_the_same_gap(kind):
    data = GaussianData(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.2), SCHEDULE)
    x0 = data.draw(5)
    curve = gap_of(data.network(), x0, seed=1)
    predicts = kind if kind in ("x0", "v") else "eps"
    other = gap_of(data.network(kind), x0, predicts=predicts, seed=1)
    np.testing.assert_allclose(other.mean, curve.mean, rtol=1e-9)
    np.testing.assert_allclose(other.end, curve.end, rtol=1e-9)


def test_labels_follow_their_images():
    labels = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)

    def network(x, n, label, scale):
        return toy_eps(x, n) * scale + over(label, x)

    options = {"start": 4, "scale": 0.5}
    whole = gap_of(network, label=labels, **options)
    cut = gap_of(network, label=labels, batch_size=2, **options)
    assert np.array_equal(whole.total, cut.total)
    flat = gap_of(network, label=labels * 0, **options)
    assert not np.isclose(flat.total, whole.total).any()


def test_float32_chains_are_summed_in_float64():
    double = gap_of(toy_eps, stochastic=False)
    single = gap_of(toy_eps, X0.float(), stochastic=False)
    assert single.mean.dtype == single.end.dtype == np.float64
    assert np.isfinite(single.mean).all()
    # Their draws differ with the dtype, so only their size can be compared.
    assert single.mean[-1] == pytest.approx(double.mean[-1], rel=1)


def test_no_graph_is_kept_and_the_mode_is_left_alone():
    module = torch.nn.Conv2d(1, 1, 1).double().train()
    curve = gap_of(lambda x, n: module(x), start=3)
    assert module.training
    assert module.weight.grad is None
    assert torch.is_grad_enabled()
    assert curve.mean.shape == (2,)


# ------------------------------------------------------------------------------------- Theorem 2


@given(
    st.lists(st.floats(1e-3, 0.9), min_size=2, max_size=12),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_theorem_2_by_enumeration(betas, K, seed, flat):
    """Every window written out lies between the bounds; K = 1 touches the upper one."""
    schedule = NoiseSchedule.from_betas(betas)
    N, K = schedule.N, min(K, schedule.N)
    errors = normal(seed, *((N + 1, 3) if flat else (N + 1, 3, 1, 2)))
    weighted = over(torch.tensor(TauTable(schedule, "theorem1").values), errors) * errors
    total = 0.0
    for begin in range(1 - K, N + 1):
        gap = weighted[max(begin, 2) : begin + K].sum(0) / K
        total += float(gap.square().sum()) / 3
    bounds = theorem2_bounds(schedule, errors, K)
    assert bounds.sa == pytest.approx(total / (N + K), rel=1e-9)
    assert bounds.upper * (1 + 1e-12) >= bounds.sa >= bounds.lower * (1 - 1e-12) > 0
    if K == 1:
        assert bounds.upper == pytest.approx(bounds.sa, rel=1e-12)
    mean = weighted[2:].square().sum() / 3 / (N - 1)
    assert bounds.upper == pytest.approx(float(mean) * (N - 1) / (N + K), rel=1e-9)
    squared_gap = total_gap(schedule, errors).square().sum() / 3
    assert bounds.lower == pytest.approx(float(squared_gap) / (N + K) ** 2, rel=1e-9)


def test_errors_that_cancel_have_no_lower_bound_and_a_smaller_sa():
    """What L_sa sees and the plain loss does not: the signs."""
    errors = torch.zeros(12, 1, dtype=torch.float64)
    errors[2:, 0] = torch.tensor([1.0, -1.0] * 5) / torch.tensor(TAU[2:12])
    cancelling = theorem2_bounds(SCHEDULE, errors, 2)
    adding = theorem2_bounds(SCHEDULE, errors.abs(), 2)
    assert cancelling.upper == adding.upper
    assert cancelling.lower == 0
    assert cancelling.sa < 0.1 * adding.sa


def test_short_chains_and_unused_entries():
    """Errors up to M < N are those with zeros above; entries 0 and 1 may hold anything."""
    errors = normal(0, SCHEDULE.N + 1, *SHAPE)
    errors[:2] = torch.nan
    errors[START + 1 :] = 0
    short = errors[: START + 1]
    torch.testing.assert_close(total_gap(SCHEDULE, errors), total_gap(SCHEDULE, short))
    expected = theorem2_bounds(SCHEDULE, short, 3)
    assert theorem2_bounds(SCHEDULE, errors, 3) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------- bad input


def test_images_of_another_range_are_warned_of():
    with pytest.warns(UserWarning, match=r"x0 ranges over \[.*scaled to \[-1, 1\]"):
        gap_of(toy_eps, x0=X0 * 127.5 + 127.5)


@refuses(
    ({"start": 1}, r"start must be a whole number in 2\.\.12, got 1"),
    ({"start": 13}, r"start must be a whole number in 2\.\.12, got 13"),
    ({"start": 2.0}, "start must be a whole number"),
    ({"seed": -1}, "seed must be"),
    ({"first": -1}, "first must be"),
    ({"batch_size": 0}, "batch_size must be"),
    ({"predicts": "x1"}, "predicts must be one of"),
    ({"x0": X0[:1]}, r"x0 must hold at least 2 .*\(1, 1, 2, 2\)"),
    ({"x0": X0.numpy()}, "x0 must hold .*got ndarray"),
    ({"x0": torch.zeros(3, 1, 2, 2).long()}, r"x0 must hold .*torch\.int64"),
    ({"x0": X0 * torch.nan}, "x0 must be finite"),
    ({"model": lambda x, n: x[:, :, :1]}, r"input's shape \(3, 1, 2, 2\), got \(3, 1, 1, 2\)"),
    ({"model": lambda x, n: x / over(n != 3, x)}, "not finite.*step n = 3"),
)
def test_bad_arguments_are_named(change):
    gap_of(**{"model": toy_eps, "start": 5, **change})


@pytest.mark.parametrize("function", [total_gap, lambda s, errors: theorem2_bounds(s, errors, 2)])
@refuses(
    (np.zeros((13, 1)), "errors must be a floating-point tensor .*ndarray"),
    (torch.zeros(13, 1).long(), r"errors must be a floating-point tensor .*torch\.int64"),
    (torch.zeros(14, 1), r"M in 2\.\.12, got shape \(14, 1\)"),
    (torch.zeros(2, 1), r"M in 2\.\.12, got shape \(2, 1\)"),
)
def test_bad_errors_are_named(errors, function):
    function(SCHEDULE, errors)


@refuses(
    ((0, torch.zeros(13, 2)), r"K must be a whole number in 1\.\.12"),
    ((13, torch.zeros(13, 2)), r"K must be a whole number in 1\.\.12"),
    ((1.5, torch.zeros(13, 2)), r"K must be a whole number in 1\.\.12"),
    ((2, torch.zeros(13)), r"errors must be \[M\+1, B, \.\.\.\], got shape \(13,\)"),
)
def test_bad_windows_are_named(given):
    K, errors = given
    theorem2_bounds(SCHEDULE, errors, K)
