"""diagnose: every number against its closed form, for Gaussian data and linear networks."""

import csv

import numpy as np
import pytest
import torch

from sa_plugin.bounds.gap import gap_along_chain
from sa_plugin.diagnosis.findings import MEASURED, PREDICTED
from sa_plugin.diagnosis.measurement import diagnose, jackknife
from sa_plugin.effect.chains import chain_variances
from sa_plugin.effect.gains import exact_gains, gaussian_gains, inflated_gains
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.loss import SALoss
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.refusals import refuses
from tests.toys import images, toy_eps

SCHEDULE = NoiseSchedule.linear(60)
S = np.array([0.02, 0.06, 0.1, 0.04])
MU = np.array([0.1, -0.2, 0.0, 0.15])
DATA = GaussianData(MU.reshape(1, 2, 2), S.reshape(1, 2, 2), SCHEDULE)
SPECTRUM = Spectrum(MU.reshape(1, 2, 2), np.sort(S)[::-1], np.eye(4)[np.argsort(S)[::-1]], "pca", 9)
GRID = [2, 3, 20, 59, 60]
OPTIONS = {"steps": GRID, "sampling_steps": (4, 9), "clip_x0": False, "spectrum": SPECTRUM}
NETWORKS = {
    "exact": exact_gains(SCHEDULE, S),
    "SA": inflated_gains(SCHEDULE, S, 0.5),
    "zero": np.zeros((61, 4)),
}
# Gaussian data reach beyond [-1, 1].
pytestmark = pytest.mark.filterwarnings("ignore:x0 ranges over")


def linear(gains):
    """f(x, n) = c_n (x - sqrt(cum_alpha_n) mu)."""
    table = torch.from_numpy(gains.copy()).reshape(-1, 1, 2, 2)
    return lambda x, n: (table[n] * (x.double() - DATA.marginal(n)[0])).to(x.dtype)


def pair(gains, n, m, same=False):
    """E e_n e_m per direction; one noise for both if ``same``."""
    (a, b), (c, d) = ((SCHEDULE.cum_alphas[k], SCHEDULE.cum_betas[k]) for k in (n, m))
    shared = (gains[n] * b**0.5 - 1) * (gains[m] * d**0.5 - 1)
    return (gains[n] * gains[m] * (a * c) ** 0.5 * S + same * shared).mean()


def closed_form(gains, n, loss):
    """The columns of MEASURED; pairs of other steps of a window have the loss's kind of noise."""
    error, below = pair(gains, n, n, True), pair(gains, n - 1, n - 1, True)
    window = [s for s in range(n, n - loss.K, -1) if s >= 1]
    is_shared = loss.noise == "shared"
    squares = sum(pair(gains, i, j, i == j or is_shared) for i in window for j in window)
    return [
        error,
        pair(gains, n, n),
        pair(gains, n, n - 1) / (error * below) ** 0.5,
        pair(gains, n, n - 1, True) / (error * below) ** 0.5,
        loss.lam * squares / loss.K**2 / error,
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"K": 3, "lam": 0.3},
        {"noise": "shared"},
        {"lam": 0.0},
        {"reduction": "mean"},
        {"input_perturbation": 0.5},  # measured as the network is called in sampling
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_measured_number_in_closed_form(name, options):
    gains, loss = NETWORKS[name], SALoss(SCHEDULE, **options)
    x0 = DATA.draw(3000)
    found = diagnose(linear(gains), SCHEDULE, [x0], loss=loss, n_images=3000, **OPTIONS)
    assert found.steps.tolist() == GRID
    expected = np.array([closed_form(gains, n, loss) for n in GRID]).T
    for column, values in zip(MEASURED, expected, strict=True):
        error = np.abs(found.measured[column] - values)
        assert (error <= 5 * found.stderr[column] + 1e-12).all(), column
        # precise enough to tell a wrong number from a right one
        assert (found.stderr[column] < 0.06 * max(1, np.abs(values).max())).all(), column
    for one in found.samples:
        forward = {"DDPM small": "ddpm", "DDIM": "ddim"}[one.process]
        visited = choose_timesteps(60, one.predicted.steps, "linear")
        variance = chain_variances(SCHEDULE, gains, visited, forward=forward).sum()
        assert abs(one.measured.mean - variance) < 5 * one.measured.stderr
        assert one.measured.stderr < 0.05 * variance
    assert abs(found.data_variance.mean - S.sum()) < 5 * found.data_variance.stderr


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_the_derivative_says_the_error_of_the_exact_network(kind):
    x0, options = DATA.draw(8), OPTIONS | {"predicts": kind}
    plain, found = (
        diagnose(DATA.network(kind), SCHEDULE, [x0], probes=probes, **options) for probes in (0, 1)
    )
    # Independent pixels: one probe is exact.
    np.testing.assert_allclose(found.measured["derivative"], found.predicted["error_B"], rtol=1e-9)
    assert (found.stderr["derivative"] < 1e-9).all()
    for column in MEASURED:
        assert np.array_equal(found.measured[column], plain.measured[column])
    assert "derivative" not in plain.table()
    assert "\n- derivative: " in found.table()
    assert "derivative_stderr" in found.step_rows()[0]


def test_the_derivatives_error_is_that_of_its_probes():
    """Of a network with dependent pixels: f(x) = x A, whose trace is known."""
    A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x, n, y):
        assert len(y) == len(x)
        return (x.flatten(1) @ A).reshape(x.shape)

    given = OPTIONS | {"steps": [20], "sampling_steps": (), "n_images": 200, "y": torch.ones(200)}
    one, four, parts = (
        diagnose(network, SCHEDULE, [DATA.draw(200)], probes=probes, batch_size=size, **given)
        for probes, size in ((1, 200), (4, 200), (4, 60))
    )
    exact = 1 - SCHEDULE.cum_betas[20] ** 0.5 * float(A.trace()) / 4
    for found in (one, four):
        assert 0 < abs(found.measured["derivative"][0] - exact) < 4 * found.stderr["derivative"][0]
    # r A r has the variance of its pairs i < j: the sum of (A_ij + A_ji)^2
    pairs = float(((A + A.T).triu(1) ** 2).sum()) * SCHEDULE.cum_betas[20] / 16
    assert one.stderr["derivative"][0] == pytest.approx((pairs / 200) ** 0.5, rel=0.2)
    assert four.stderr["derivative"][0] == pytest.approx((pairs / 800) ** 0.5, rel=0.2)
    np.testing.assert_allclose(parts.measured["derivative"], four.measured["derivative"])


def test_the_predictions_are_those_of_the_closed_form():
    loss = SALoss(SCHEDULE, lam=2.0)
    found = diagnose(linear(NETWORKS["zero"]), SCHEDULE, [DATA.draw(8)], loss=loss, **OPTIONS)
    exact, sa = exact_gains(SCHEDULE, S), gaussian_gains(loss, S)
    for i, n in enumerate(GRID):
        values = [pair(exact, n, n, True), pair(exact, n, n), pair(sa, n, n)]
        for column, value in zip(PREDICTED, values, strict=True):
            assert found.predicted[column][i] == pytest.approx(value, rel=1e-9)
    assert found.directions == 4
    for one in found.samples:
        visited = choose_timesteps(60, one.predicted.steps, "linear")
        forward = {"DDPM small": "ddpm", "DDIM": "ddim"}[one.process]
        for gains, variance in zip((exact, sa), one.predicted.sample_variances, strict=False):
            ends = chain_variances(SCHEDULE, gains, visited, forward=forward)
            assert variance == pytest.approx(ends.sum(), rel=1e-9)


def test_a_constant_bias_is_shown_as_it_is():
    """Data that hardly vary: beside the constant the network is exact, e = 0.3."""
    x0 = DATA.mu + 1e-9 * images(0, 10, 1, 2, 2)
    exact = GaussianData(DATA.mu, torch.full((1, 2, 2), 1e-30), SCHEDULE)
    found = diagnose(lambda x, n: exact.eps(x, n) + 0.3, SCHEDULE, [x0], **OPTIONS)
    for column in ("error", "bias"):
        np.testing.assert_allclose(found.measured[column], 0.09, rtol=1e-6)
    for column in ("correlation", "same_noise", "sa_ratio"):
        np.testing.assert_allclose(found.measured[column], 1, rtol=1e-6)


def test_standard_errors_are_the_spread_over_seeds():
    options = OPTIONS | {"sampling_steps": ()}
    found = [
        diagnose(DATA.eps, SCHEDULE, [DATA.draw(40, seed)], seed=seed, **options)
        for seed in range(40)
    ]
    for column in MEASURED:
        spread = np.std([one.measured[column] for one in found], axis=0, ddof=1)
        claimed = np.mean([one.stderr[column] for one in found], axis=0)
        assert ((claimed > 0.65 * spread) & (claimed < 1.5 * spread)).all(), column
    spread = np.std([float(one.data_variance.mean) for one in found], ddof=1)
    claimed = np.mean([float(one.data_variance.stderr) for one in found])
    assert 0.65 * spread < claimed < 1.5 * spread


def test_the_jackknife_of_a_mean_is_its_usual_error():
    values = np.random.default_rng(0).standard_normal((12, 3, 2))
    mean, stderr = jackknife(lambda means: means, values)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(stderr, values.std(0, ddof=1) / 12**0.5)


def test_batches_and_their_size_change_nothing_and_the_seed_does():
    x0 = images(0, 30, 1, 2, 2)
    options = OPTIONS | {"n_images": 20}
    whole = diagnose(toy_eps, SCHEDULE, [x0], **options)
    parts = diagnose(toy_eps, SCHEDULE, x0.split(7), batch_size=6, **options)
    other = diagnose(toy_eps, SCHEDULE, [x0], seed=1, **options)
    assert whole.n_images == parts.n_images == 20
    for column in MEASURED:
        np.testing.assert_allclose(parts.measured[column], whole.measured[column], rtol=1e-12)
        assert (other.measured[column] != whole.measured[column]).all()
    for one, two in zip(whole.samples, parts.samples, strict=True):
        torch.testing.assert_close(one.measured.mean, two.measured.mean)


class Labelled(torch.nn.Module):
    """A network in bfloat16 that notes what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.labels = []

    def forward(self, x, n, y):
        assert x.dtype == torch.bfloat16
        assert len(y) == len(x)
        self.labels.append(y)
        return self.weight * x


def test_labels_follow_their_images_in_the_networks_own_type():
    network, labels = Labelled(), torch.arange(10)
    x0 = images(0, 10, 1, 2, 2).float()
    options = OPTIONS | {"steps": [3], "sampling_steps": (1,)}
    found = diagnose(network, SCHEDULE, [x0], batch_size=4, y=labels, **options)
    assert np.isfinite(found.measured["error"]).all()
    called = [labels[:4]] * 5 + [labels[4:8]] * 5 + [labels[8:]] * 5
    called += [labels[:4], labels[4:8], labels[8:]] * 2  # one step of DDPM, one of DDIM
    assert all(map(torch.equal, network.labels, called))
    assert len(network.labels) == len(called)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_other_predictions_are_the_same_network(kind):
    x0 = DATA.draw(20)
    plain = diagnose(DATA.eps, SCHEDULE, [x0], **OPTIONS)
    found = diagnose(DATA.network(kind), SCHEDULE, [x0], predicts=kind, **OPTIONS)
    for column in MEASURED:
        np.testing.assert_allclose(found.measured[column], plain.measured[column], rtol=1e-7)


def test_the_gap_is_that_of_gap_along_chain():
    x0 = images(0, 6, 1, 2, 2)
    found = diagnose(toy_eps, SCHEDULE, [x0], gap_start=9, **OPTIONS)
    total = gap_along_chain(toy_eps, SCHEDULE, x0, start=9, clip_x0=False).total
    assert float(found.gap.mean) == pytest.approx(total.mean(), rel=1e-12)
    assert float(found.gap.stderr) == pytest.approx(total.std(ddof=1) / 6**0.5, rel=1e-12)
    assert "Theorem 1's total gap" in found.table()


def test_the_files_hold_every_number(tmp_path):
    found = diagnose(toy_eps, SCHEDULE, [images(0, 6, 1, 2, 2)], **OPTIONS)
    paths = found.write(tmp_path / "out")
    assert [path.name for path in paths] == ["steps.csv", "samples.csv", "diagnosis.md"]
    steps, samples = (list(csv.DictReader(path.read_text().splitlines())) for path in paths[:2])
    assert [int(row["n"]) for row in steps] == GRID
    for name in MEASURED:
        assert [float(row[name]) for row in steps] == found.measured[name].tolist()
        assert [float(row[f"{name}_stderr"]) for row in steps] == found.stderr[name].tolist()
    for name in PREDICTED:
        assert [float(row[name]) for row in steps] == found.predicted[name].tolist()
    for row, one in zip(samples, found.samples, strict=True):
        assert (row["process"], int(row["steps"])) == (one.process, one.predicted.steps)
        assert float(row["variance"]) == float(one.measured.mean)
        assert float(row["best_q"]) == one.predicted.best_q
    text = paths[2].read_text()
    assert text == found.table()
    for name in (*MEASURED, *PREDICTED):
        assert f"\n- {name}: " in text


def test_the_grid_is_spread_over_the_steps_that_have_a_neighbour():
    x0 = images(0, 2, 1, 2, 2)
    for count, expected in ((3, [2, 31, 60]), (1, [2]), (500, list(range(2, 61)))):
        options = OPTIONS | {"steps": count, "sampling_steps": ()}
        assert diagnose(toy_eps, SCHEDULE, [x0], **options).steps.tolist() == expected


X0 = images(0, 4, 1, 2, 2)


def not_finite_from(step):
    return lambda x, n: torch.where(n.reshape(-1, 1, 1, 1) >= step, torch.nan, x)


@refuses(
    ({"batches": X0}, r"a list of batches \[B, ...\], such as \[x0\], got one Tensor of shape"),
    ({"batches": []}, "batches must hold at least 2 images, got 0"),
    ({"batches": [X0[:0], X0[:1]]}, "batches must hold at least 2 images, got 1"),
    ({"batches": [(X0 * 127).to(torch.uint8)]}, "floating-point images .* got torch.uint8"),
    ({"batches": [X0, X0[..., :1]]}, r"images of one shape, got \(1, 2, 2\), \(1, 2, 1\)"),
    ({"batches": [torch.zeros(4, 1, 2, 2)], "spectrum": None}, "images that differ, got equal"),
    ({"batches": [images(0, 4, 1, 3, 3)]}, "as the spectrum's"),
    ({"loss": SALoss(NoiseSchedule.linear(50))}, "loss must be of this schedule"),
    ({"steps": 0}, "steps must be a whole number in 1"),
    ({"steps": []}, "steps must hold at least one"),
    ({"steps": [1]}, r"every step must be a whole number in 2\.\.60, got 1"),
    ({"sampling_steps": (61,)}, "steps"),
    ({"n_images": 1}, "n_images must be a whole number in 2"),
    ({"batch_size": 0}, "batch_size must be a whole number in 1"),
    ({"probes": -1}, "probes must be a whole number in 0"),
    ({"seed": -1}, "seed must be a whole number in 0"),
    ({"predicts": "score"}, "predicts must be one of"),
    ({"gap_start": 1}, "start must be a whole number in 2"),
    ({"model": lambda x, n: x[:, :, :1]}, "real tensors of its input's shape"),
    ({"model": lambda x, n: x + 0j}, "real tensors of .*got torch.complex"),
    ({"model": not_finite_from(19)}, "not finite, first at step n = 20"),
    ({"model": not_finite_from(59), "steps": [4, 60]}, "not finite, first at step n = 60"),
)
def test_bad_input_is_refused(options):
    diagnose(**{"model": toy_eps, "schedule": SCHEDULE, "batches": [X0]} | OPTIONS | options)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("x0", [X0.abs().clamp(0, 1), 127.5 * (X0 + 1)], ids=["1", "255"])
def test_images_of_another_range_are_warned_of(x0):
    x0.view(-1)[:2] = torch.tensor([0.0, x0.max().ceil()])
    with pytest.warns(UserWarning, match=r"x0 ranges over \[0, .*scaled to \[-1, 1\]"):
        diagnose(toy_eps, SCHEDULE, [x0], **OPTIONS)
