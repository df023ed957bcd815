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
from tests.toys import images, normal, toy_eps

SCHEDULE = NoiseSchedule.from_betas(np.linspace(0.01, 0.3, 12))
START = 9
SHAPE = (3, 1, 2, 2)
X0 = images(0, *SHAPE)


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


def norms(x):
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("clip", [False, True])
def test_theorem_1_holds_along_a_real_chain(clip):
    """d(x_0) is how far x_1 lies from the true chain with the same draws; partial distances too."""
    x_start, draws = normal(1, *SHAPE), normal(2, START - 1, *SHAPE)
    sampler = Sampler(toy_eps, SCHEDULE, trajectory=range(1, START + 1), clip_x0=clip)
    errors = torch.zeros(START + 1, *SHAPE, dtype=torch.float64)
    for step in sampler.iterate(SHAPE, x_init=x_start, noise=lambda k: draws[k]):
        errors[step.t] = step_error(SCHEDULE, step, X0)
    ours, true = written_out(toy_eps, X0.numpy(), x_start, draws.numpy(), clip)
    gap = total_gap(SCHEDULE, errors).numpy()
    np.testing.assert_allclose(ours[-1] - true[-1], -gap, rtol=1e-9, atol=1e-12)
    assert np.abs(gap).min() > 1e-3


def test_the_error_of_an_unclipped_step_is_the_networks():
    x_start = normal(1, *SHAPE)
    sampler = Sampler(toy_eps, SCHEDULE, trajectory=range(1, START + 1), clip_x0=False)
    for step in sampler.iterate(SHAPE, x_init=x_start, seed=3):
        a, b = SCHEDULE.cum_alphas[step.t], SCHEDULE.cum_betas[step.t]
        eps = (step.x_t - a**0.5 * X0) / b**0.5
        network = toy_eps(step.x_t, torch.full((3,), step.t))
        torch.testing.assert_close(step_error(SCHEDULE, step, X0), network - eps, rtol=1e-9, atol=0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_curve_against_chains_written_out(stochastic, clip):
    """The draws are the sampler's: the first makes x_start, the k-th of the rest is step k's."""
    curve = gap_along_chain(
        toy_eps, SCHEDULE, X0, start=START, seed=5, stochastic=stochastic, clip_x0=clip
    )
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
    still = Sampler(lambda x, n: x * 0, SCHEDULE, trajectory=range(1, START + 1), clip_x0=False)
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    draws = []
    for step in still.iterate(SHAPE, seed=seed, x_init=zero):
        mean = (
            gamma_1(SCHEDULE)[step.t] / SCHEDULE.cum_alphas[step.t] ** 0.5
            + gamma_2(SCHEDULE)[step.t]
        ) * step.x_t
        if step.s > 0:
            draws.append((step.x_s - mean) / float(SCHEDULE.tilde_beta(step.s, step.t)) ** 0.5)
    generator = torch.Generator().manual_seed(block_seed(seed))
    x_start = torch.randn(64, *SHAPE[1:], generator=generator, dtype=torch.float64)[:3]
    return np.stack([x_start.numpy(), *(draw.numpy() for draw in draws)])


def block_seed(seed):
    """Of the first block of 64 images."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def biased(x0, bias):
    """A network that knows x_0 (one image for all) and errs by ``bias[n]`` in every value."""

    def network(x, n):
        shape = (-1, *[1] * (x.ndim - 1))
        a, b = (torch.from_numpy(t.copy())[n].reshape(shape) for t in tables)
        return (x - a**0.5 * x0) / b**0.5 + torch.from_numpy(bias)[n].reshape(shape)

    tables = SCHEDULE.cum_alphas, SCHEDULE.cum_betas
    return network


def test_a_known_bias_has_a_known_gap():
    """e_n = bias_n in each of 4 dimensions: norms sqrt(4) |sum tau_n bias_n|, whatever the noise"""
    bias = 0.1 + 0.05 * np.arange(SCHEDULE.N + 1)
    x0 = X0[:1].expand(SHAPE)
    curve = gap_along_chain(biased(x0, bias), SCHEDULE, x0, start=START, clip_x0=False)
    tau = TauTable(SCHEDULE, "theorem1").values
    expected = 2 * np.cumsum((tau * bias)[START:1:-1])
    np.testing.assert_allclose(curve.mean, expected, rtol=1e-9)
    assert curve.stderr.max() < 1e-9
    end = 2 * bias[1] * (SCHEDULE.cum_betas[1] / SCHEDULE.cum_alphas[1]) ** 0.5
    np.testing.assert_allclose(curve.end, end, rtol=1e-9)


def test_a_network_that_knows_the_images_has_no_gap():
    network = biased(X0, np.zeros(SCHEDULE.N + 1))
    curve = gap_along_chain(network, SCHEDULE, X0, start=SCHEDULE.N)
    assert max(curve.mean.max(), curve.distance_mean.max(), curve.end.max()) < 1e-12


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
    curve = gap_along_chain(
        data.network(), SCHEDULE, data.draw(20_000), start=start, stochastic=stochastic,
        clip_x0=False, batch_size=5000,
    )  # fmt: skip
    squares = curve.total**2
    assert squares.mean() == pytest.approx(expected, abs=5 * squares.std() / len(squares) ** 0.5)
    assert squares.mean() == pytest.approx(expected, rel=0.05)


def test_a_biased_network_has_a_larger_gap_than_the_exact_one():
    data = GaussianData(torch.zeros(4), torch.full((4,), 0.2), SCHEDULE)
    x0 = data.draw(2000)
    exact = gap_along_chain(data.network(), SCHEDULE, x0, start=START, clip_x0=False)
    off = gap_along_chain(
        lambda x, n: data.eps(x, n) + 0.5, SCHEDULE, x0, start=START, clip_x0=False
    )
    assert (off.mean[-1] - exact.mean[-1]) > 5 * (off.stderr[-1] + exact.stderr[-1])


def test_an_image_depends_on_its_number_alone():
    """Any batch size, any sharing out; another seed gives others."""
    x0 = images(3, 70, 1, 2, 2)
    whole = gap_along_chain(toy_eps, SCHEDULE, x0, start=4, seed=2)
    cut = gap_along_chain(toy_eps, SCHEDULE, x0, start=4, seed=2, batch_size=33)
    rest = gap_along_chain(toy_eps, SCHEDULE, x0[50:], start=4, seed=2, first=50)
    for name in ("mean", "stderr", "distance_mean", "distance_stderr", "total", "end"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name)), name
    assert np.array_equal(rest.total, whole.total[50:])
    assert np.array_equal(rest.end, whole.end[50:])
    other = gap_along_chain(toy_eps, SCHEDULE, x0, start=4, seed=3)
    assert not np.isclose(other.total, whole.total).any()


@pytest.mark.parametrize("kind", ["npr", "sn", "x0", "v"])
def test_pairs_and_other_predictions_give_the_same_gap(kind):
    data = GaussianData(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.2), SCHEDULE)
    x0 = data.draw(5)
    options = {"start": START, "seed": 1}
    curve = gap_along_chain(data.network(), SCHEDULE, x0, **options)
    predicts = kind if kind in ("x0", "v") else "eps"
    other = gap_along_chain(data.network(kind), SCHEDULE, x0, predicts=predicts, **options)
    np.testing.assert_allclose(other.mean, curve.mean, rtol=1e-9)
    np.testing.assert_allclose(other.end, curve.end, rtol=1e-9)


def test_labels_follow_their_images():
    labels = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)

    def network(x, n, label, scale):
        return toy_eps(x, n) * scale + label.reshape(-1, 1, 1, 1)

    options = {"start": 4, "label": labels, "scale": 0.5}
    whole = gap_along_chain(network, SCHEDULE, X0, **options)
    cut = gap_along_chain(network, SCHEDULE, X0, batch_size=2, **options)
    assert np.array_equal(whole.total, cut.total)
    flat = gap_along_chain(network, SCHEDULE, X0, start=4, label=labels * 0, scale=0.5)
    assert not np.isclose(flat.total, whole.total).any()


def test_float32_chains_are_summed_in_float64():
    double = gap_along_chain(toy_eps, SCHEDULE, X0, start=START, stochastic=False)
    single = gap_along_chain(toy_eps, SCHEDULE, X0.float(), start=START, stochastic=False)
    assert single.mean.dtype == single.end.dtype == np.float64
    assert np.isfinite(single.mean).all()
    # Their draws differ with the dtype, so only their size can be compared.
    assert single.mean[-1] == pytest.approx(double.mean[-1], rel=1)


def test_no_graph_is_kept_and_the_mode_is_left_alone():
    module = torch.nn.Conv2d(1, 1, 1).double().train()
    curve = gap_along_chain(lambda x, n: module(x), SCHEDULE, X0, start=3)
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
    shape = (N + 1, 3) if flat else (N + 1, 3, 1, 2)
    errors = normal(seed, *shape)
    tau = TauTable(schedule, "theorem1").values
    total = 0.0
    for begin in range(1 - K, N + 1):
        gap = torch.zeros(shape[1:], dtype=torch.float64)
        for s in range(max(begin, 2), min(begin + K - 1, N) + 1):
            gap = gap + tau[s] * errors[s] / K
        total += float(gap.square().sum()) / 3
    bounds = theorem2_bounds(schedule, errors, K)
    assert bounds.sa == pytest.approx(total / (N + K), rel=1e-9)
    assert bounds.upper * (1 + 1e-12) >= bounds.sa >= bounds.lower * (1 - 1e-12) > 0
    if K == 1:
        assert bounds.upper == pytest.approx(bounds.sa, rel=1e-12)
    weights = torch.from_numpy(tau.copy()).reshape(-1, *[1] * (errors.ndim - 1))
    weighted = (weights * errors)[2:]
    mean = weighted.square().sum() / 3 / (N - 1)
    assert bounds.upper == pytest.approx(float(mean) * (N - 1) / (N + K), rel=1e-9)
    squared_gap = total_gap(schedule, errors).square().sum() / 3
    assert bounds.lower == pytest.approx(float(squared_gap) / (N + K) ** 2, rel=1e-9)


def test_errors_that_cancel_have_no_lower_bound_and_a_smaller_sa():
    """What L_sa sees and the plain loss does not: the signs."""
    tau = torch.from_numpy(TauTable(SCHEDULE, "theorem1").values.copy())
    signs = torch.tensor([0, 0] + [(-1) ** n for n in range(2, 12)], dtype=torch.float64)
    errors = torch.zeros(12, 1, dtype=torch.float64)
    errors[2:, 0] = signs[2:] / tau[2:12]
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
    assert theorem2_bounds(SCHEDULE, errors, 3) == pytest.approx(
        theorem2_bounds(SCHEDULE, short, 3), rel=1e-12
    )


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
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
        ({"model": lambda x, n: x / (n != 3).reshape(-1, 1, 1, 1)}, "not finite.*step n = 3"),
    ],
)
def test_bad_arguments_are_named(change, said):
    options = {"model": toy_eps, "x0": X0, "start": 5, **change}
    with pytest.raises(ValueError, match=said):
        gap_along_chain(schedule=SCHEDULE, **options)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (np.zeros((13, 1)), "errors must be a floating-point tensor .*ndarray"),
        (torch.zeros(13, 1).long(), r"errors must be a floating-point tensor .*torch\.int64"),
        (torch.zeros(14, 1), r"M in 2\.\.12, got shape \(14, 1\)"),
        (torch.zeros(2, 1), r"M in 2\.\.12, got shape \(2, 1\)"),
    ],
)
def test_bad_errors_are_named(errors, said):
    with pytest.raises(ValueError, match=said):
        total_gap(SCHEDULE, errors)
    with pytest.raises(ValueError, match=said):
        theorem2_bounds(SCHEDULE, errors, 2)


def test_bad_windows_are_named():
    errors = torch.zeros(13, 2)
    for K in (0, 13, 1.5):
        with pytest.raises(ValueError, match=r"K must be a whole number in 1\.\.12"):
            theorem2_bounds(SCHEDULE, errors, K)
    with pytest.raises(ValueError, match=r"errors must be \[M\+1, B, \.\.\.\], got shape \(13,\)"):
        theorem2_bounds(SCHEDULE, errors[:, 0], 2)
