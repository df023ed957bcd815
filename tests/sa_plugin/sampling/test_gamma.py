"""Gamma_n = E mean(eps_pred^2): its values, its standard errors, and its files."""

import itertools
import os
import zipfile

import numpy as np
import pytest
import torch

from sa_plugin.sampling.gamma import Gamma, estimate_gamma
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData
from tests.refusals import refuses
from tests.toys import images, normal, read_npz, toy_eps

SCHEDULE = NoiseSchedule.linear(25)
X0 = images(0, 150, 1, 2, 2)
# Gaussian data reach beyond [-1, 1].
FAR = pytest.mark.filterwarnings("ignore:x0 ranges over")


def gaussian(schedule=SCHEDULE):
    """Four dimensions of different means and variances."""
    return GaussianData([[[0.5, -0.3], [0.0, 0.9]]], [[[0.02, 0.1], [0.4, 0.3]]], schedule)


class Counting:
    """toy_eps that notes its calls, and breaks down at the call number ``last``."""

    def __init__(self, last=None):
        self.steps, self.rows, self.last = [], 0, last

    def __call__(self, x, n):
        if len(self.steps) == self.last:
            raise KeyboardInterrupt
        assert (n == n[0]).all()
        self.steps.append(int(n[0]))
        self.rows += len(x)
        return toy_eps(x, n)


# -- values


def test_equals_the_reference_numbers():
    golden, noise = read_npz("gamma"), normal(5, 100, 6, 2, 3, 3)
    gamma = estimate_gamma(
        lambda x, n: toy_eps(x, n * 10.0),  # the host rescales time to 1000
        NoiseSchedule.linear(100),
        torch.from_numpy(golden["x0"]).split(4),
        noise=lambda n: noise[n - 1][None],
    )
    np.testing.assert_allclose(gamma.values, golden["ms_eps"], rtol=1e-9, atol=0)
    assert gamma.values[0] == 0
    assert gamma.stderr[0] == 0


@FAR
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "npr", "sn"])
def test_gaussian_data_in_closed_form(kind):
    data = gaussian()
    gamma = estimate_gamma(
        data.network(kind),
        SCHEDULE,
        data.draw(2000).split(512),
        predicts=kind if kind in ("x0", "v") else "eps",
        noises=2,
    )
    error = (gamma.values - data.gamma)[1:] / gamma.stderr[1:]
    assert np.abs(error).max() < 4.5
    assert 0.5 < np.sqrt((error**2).mean()) < 2
    assert (gamma.stderr[1:] < 0.03).all()


def test_the_noise_is_standard_normal_and_new_at_each_step_and_image():
    """From the network's input x_n at x_0 = 0: sqrt(cum_beta) eps."""
    seen = {}

    def network(x, n):
        seen.setdefault(int(n[0]), []).append(x / SCHEDULE.cum_betas[int(n[0])] ** 0.5)
        return x

    estimate_gamma(network, SCHEDULE, [torch.zeros(100, 1, 2, 2).double()], noises=3)
    draws = torch.stack([torch.stack(seen[n]) for n in range(1, 26)]).flatten()
    assert len(draws) == 25 * 3 * 100 * 4 == len(draws.unique())
    assert abs(draws.mean()) < 0.03
    assert abs(draws.var() - 1) < 0.05
    assert not torch.equal(seen[1][0][:50], seen[1][0][50:])


def test_makes_a_call_for_each_step_and_noise_without_gradients():
    network, weight = Counting(), torch.nn.Parameter(torch.ones(()))

    def model(x, n):
        output = network(x, n) * weight
        assert not output.requires_grad
        return output

    estimate_gamma(model, SCHEDULE, X0.split(64), noises=2)
    assert len(network.steps) == 25 * 2 * 3
    assert network.rows == 25 * 2 * 150


def assert_close(gamma, expected):
    """Equal but for the order of their sums."""
    np.testing.assert_allclose(gamma.values, expected.values, rtol=1e-12)
    np.testing.assert_allclose(gamma.stderr, expected.stderr, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_does_not_depend_on_the_batch_size(size):
    whole = estimate_gamma(toy_eps, SCHEDULE, [X0], noises=2, seed=3)
    assert_close(estimate_gamma(toy_eps, SCHEDULE, X0.split(size), noises=2, seed=3), whole)


def test_seed_and_number_of_images():
    first = estimate_gamma(toy_eps, SCHEDULE, X0.split(50), n_images=70)
    same = estimate_gamma(toy_eps, SCHEDULE, [X0[:70]])
    np.testing.assert_allclose(first.values, same.values, rtol=1e-12)
    other = estimate_gamma(toy_eps, SCHEDULE, X0.split(50), n_images=70, seed=1)
    assert (other.values[1:] != first.values[1:]).all()
    endless = itertools.repeat(X0[:64])
    assert estimate_gamma(toy_eps, SCHEDULE, endless, n_images=100).N == 25


def test_low_precision_images_are_summed_in_float64():
    """129/128 is a number of bfloat16, its square is not; nor would sums go beyond 256 squares."""
    x0 = torch.zeros(1000, 1, 1, 2, dtype=torch.bfloat16)
    gamma = estimate_gamma(lambda x, n: torch.full_like(x, 129 / 128), SCHEDULE, x0.split(10))
    assert (gamma.values[1:] == (129 / 128) ** 2).all()
    assert (gamma.stderr == 0).all()


# -- standard errors


def test_standard_error_by_hand():
    """The image is the unit: draws that share one are averaged first."""
    noise = normal(7, 25, 3, 10, 1, 2, 2)
    x0, cum_alphas = images(1, 10, 1, 2, 2), torch.tensor(SCHEDULE.cum_alphas)
    gamma = estimate_gamma(toy_eps, SCHEDULE, x0.split(4), noises=3, noise=lambda n: noise[n - 1])
    for n in range(1, 26):
        x = cum_alphas[n].sqrt() * x0 + (1 - cum_alphas[n]).sqrt() * noise[n - 1]
        squares = toy_eps(x, torch.tensor(n)).square().mean((2, 3, 4)).mean(0).numpy()
        np.testing.assert_allclose(gamma.values[n], squares.mean(), rtol=1e-12)
        np.testing.assert_allclose(gamma.stderr[n], squares.std(ddof=1) / 10**0.5, rtol=1e-9)


@FAR
@pytest.mark.parametrize("noises", [1, 4])
def test_the_standard_errors_cover(noises):
    """Over 200 repetitions the 95 % interval holds the true Gamma in 90 to 99 % of them.

    At the first step x_n is nearly x_0, the draws of one image nearly equal: an error computed as
    if they were independent would be too small by half with 4 of them.
    """
    data = gaussian(NoiseSchedule.from_betas([0.001, 0.3, 0.5]))
    covered = []
    for seed in range(200):
        gamma = estimate_gamma(
            data.eps, data.schedule, [data.draw(200, seed=seed)], noises=noises, seed=seed
        )
        covered.append(np.abs(gamma.values - data.gamma)[1:] < 2.0 * gamma.stderr[1:])
    rates = np.mean(covered, axis=0)
    assert ((rates >= 0.9) & (rates <= 0.99)).all(), rates


@FAR
def test_more_noises_help_where_the_noise_matters():
    data = gaussian()
    one, many = (
        estimate_gamma(data.eps, SCHEDULE, [data.draw(500)], noises=k).stderr for k in (1, 4)
    )
    assert many[25] < 0.6 * one[25]


# -- continuing


@pytest.mark.parametrize("last", [1, 24, 25, 26, 60, 74])
def test_an_interrupted_run_continues_to_equal_numbers(last, tmp_path):
    whole = estimate_gamma(toy_eps, SCHEDULE, X0.split(64))
    options = {"checkpoint": tmp_path / "gamma" / "state.pth", "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        estimate_gamma(Counting(last), SCHEDULE, X0.split(64), **options)
    for calls in (75 - last, 0):  # and again, when nothing is left
        rest = Counting()
        continued = estimate_gamma(rest, SCHEDULE, X0.split(64), **options)
        assert np.array_equal(continued.values, whole.values)
        assert np.array_equal(continued.stderr, whole.stderr)
        assert len(rest.steps) == calls
    assert os.listdir(tmp_path / "gamma") == ["state.pth"]


def test_continues_with_more_images_and_another_batch_size(tmp_path):
    options = {"checkpoint": tmp_path / "state.pth", "noises": 2}
    estimate_gamma(toy_eps, SCHEDULE, X0.split(64), n_images=90, **options)
    network = Counting()
    more = estimate_gamma(network, SCHEDULE, X0.split(40), **options)
    assert_close(more, estimate_gamma(toy_eps, SCHEDULE, [X0], noises=2))
    assert network.rows == 25 * 2 * 60


def test_nothing_is_saved_before_it_is_due(tmp_path):
    path = tmp_path / "state.pth"
    with pytest.raises(KeyboardInterrupt):
        estimate_gamma(Counting(40), SCHEDULE, X0.split(64), checkpoint=path, save_every=1e6)
    assert not path.exists()


@refuses(
    ({"seed": 1}, "differs in seed: 0 there, 1 here"),
    ({"noises": 2}, "differs in noises: 1 there, 2 here"),
    ({"predicts": "v"}, "differs in predicts: 'eps' there, 'v' here"),
    ({"schedule": NoiseSchedule.cosine(25)}, "differs in betas"),
    ({"noise": lambda n: normal(n, 1, 150, 1, 2, 2)}, "differs in seed: 0 there, None here"),
    ({"n_images": 100}, "already holds 150 images per step, got n_images = 100"),
    ({"batches": X0[:60].split(30)}, "already holds 150 images per step, got n_images = 60"),
)
def test_a_checkpoint_of_other_draws_is_refused(changed, tmp_path):
    path = tmp_path / "state.pth"
    arguments = {"schedule": SCHEDULE, "batches": [X0], "checkpoint": path}
    estimate_gamma(toy_eps, **arguments)
    before = path.read_bytes()
    try:
        estimate_gamma(toy_eps, **(arguments | changed))
    finally:
        assert path.read_bytes() == before


@refuses((b"no archive", r"state\.pth cannot be read; remove it"))
def test_a_damaged_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "state.pth"
    path.write_bytes(content)
    estimate_gamma(toy_eps, SCHEDULE, [X0], checkpoint=path)


# -- files


@pytest.fixture(scope="module")
def known():
    return estimate_gamma(toy_eps, SCHEDULE, [X0])


def test_npz_keeps_values_and_errors(known, tmp_path):
    known.save(tmp_path / "gamma.npz")
    loaded = Gamma.load(tmp_path / "gamma.npz")
    assert np.array_equal(loaded.values, known.values)
    assert np.array_equal(loaded.stderr, known.stderr)
    Gamma(known.values).save(tmp_path / "values.npz")
    assert Gamma.load(tmp_path / "values.npz").stderr is None


def test_the_hosts_file_is_a_torch_saved_array(known, tmp_path):
    known.save(tmp_path / "ms_eps.pth")
    as_host = torch.load(tmp_path / "ms_eps.pth", weights_only=False)
    assert isinstance(as_host, np.ndarray)
    assert as_host.dtype == np.float64
    assert np.array_equal(as_host, known.values)
    loaded = Gamma.load(tmp_path / "ms_eps.pth")
    assert np.array_equal(loaded.values, known.values)
    assert loaded.stderr is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_reads_what_hosts_may_have_written(known, kind, dtype, tmp_path):
    values = known.values.astype(dtype)
    torch.save(kind(values), tmp_path / "ms_eps.pth")
    assert np.array_equal(Gamma.load(tmp_path / "ms_eps.pth").values, values)


def test_reads_arrays_that_numpy_1_wrote(known, tmp_path):
    path = tmp_path / "ms_eps.pth"
    torch.save(known.values, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.replace(b"numpy._core", b"numpy.core"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert np.array_equal(Gamma.load(path).values, known.values)


@refuses(
    ("none.npz", r"there is no Gamma file at .*none\.npz"),
    ("model.pth", r"model\.pth holds no Gamma.*it is a dict"),
    ("broken.pth", r"broken\.pth holds no Gamma"),
    ("other.npz", r"other\.npz holds no Gamma"),
)
def test_other_files_are_refused_by_name(name, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pth")
    (tmp_path / "broken.pth").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    Gamma.load(tmp_path / name)


# -- the object


def test_is_an_array_to_numpy_and_to_the_sampler(known):
    assert np.array_equal(np.asarray(known), known.values)
    assert np.asarray(known, dtype=np.float32).dtype == np.float32
    copied = np.array(known)
    copied[3] = 7
    assert known.values[3] != 7
    with pytest.raises(ValueError, match="read-only"):
        known.values[3] = 7
    with pytest.raises(ValueError, match="copy is needed"):
        known.__array__(np.float32, copy=False)  # NumPy 1 has no such request
    options = {"variance": "analytic", "steps": 5, "trajectory": "dp_seg"}
    drawn = [
        Sampler(toy_eps, SCHEDULE, gamma=gamma, **options).sample((4, 1, 2, 2))
        for gamma in (known, known.values)
    ]
    assert torch.equal(*drawn)


@refuses(
    (([[0.0, 1.0]],), r"values must have shape \(2,\) \(entry 0 unused\), got \(1, 2\)"),
    (([0.0],), "values must have shape"),
    ((0.5,), "values must have shape"),
    (([0.0, np.nan],), r"values must be finite and >= 0, got values\[1\] = nan"),
    (([0.0, 0.5, -0.5],), r"got values\[2\] = -0.5"),
    (([0.0, 0.5], [0.0, 0.1, 0.1]), r"stderr must have shape .*got \(3,\)"),
    (([0.0, 0.5], [0.0, np.inf]), "stderr must be finite"),
)
def test_bad_tables_are_refused(tables):
    Gamma(*tables)


def test_entry_zero_is_zero_whatever_a_file_holds_there():
    assert Gamma([np.nan, 0.5]).values.tolist() == [0.0, 0.5]


# -- bad input


@refuses(
    ({"n_images": 1}, "n_images must be a whole number in 2"),
    ({"n_images": 151}, "batches must hold at least 151 images, got 150"),
    ({"noises": 0}, "noises must be a whole number in 1"),
    ({"noises": 1.5}, "noises must be a whole number"),
    ({"seed": -1}, "seed must be a whole number in 0"),
    ({"predicts": "score"}, "predicts must be one of"),
    ({"save_every": -1}, "save_every must be a finite number >= 0"),
    ({"batches": []}, "batches must hold at least 2 images, got 0"),
    ({"batches": [X0, X0 * torch.nan]}, "batches must be finite, got values that are not"),
    ({"batches": [X0[:1]]}, "batches must hold at least 2 images, got 1"),
    ({"batches": [(X0 * 127).to(torch.uint8)]}, r"floating-point images .* got torch.uint8"),
    ({"batches": [(X0, 0)]}, "floating-point images .* got tuple"),
    ({"batches": [X0, X0[..., :1]]}, r"images of one shape, got \(1, 2, 2\), \(1, 2, 1\)"),
    ({"noise": lambda n: X0[None, :100]}, r"noise\(n\) must have shape .* n = 1"),
    ({"noise": lambda n: X0}, r"noise\(n\) must have shape"),
    ({"model": lambda x, n: x[:, :, :1]}, "tensors of its input's shape"),
    ({"model": lambda x, n: None}, "tensors of its input's shape"),
    ({"model": lambda x, n: x + 0j}, r"real tensors of .*\(150, 1, 2, 2\), got torch.complex128"),
    ({"batches": X0}, r"a list of batches .* as \[x0\], got one Tensor of shape \(150, 1, 2, 2\)"),
    ({"batches": X0.numpy()}, r"a list of batches .*got one ndarray"),
    ({"batches": [X0[:0]]}, "batches must hold at least 2 images, got 0"),
    ({"noise": lambda n: X0[None] / (n - 3)}, r"noise\(3\) must be finite"),
)
def test_bad_input_is_refused(options):
    estimate_gamma(**{"model": toy_eps, "schedule": SCHEDULE, "batches": [X0]} | options)


@pytest.mark.parametrize(
    ("x0", "said"), [(127.5 * (X0 + 1), r"\[1\.\d+, 25\d\.\d\]"), (X0.abs(), "0")]
)
def test_images_that_are_not_scaled_are_warned_of_once(x0, said):
    with pytest.warns(UserWarning, match=f"x0 ranges over .*{said}") as warned:
        estimate_gamma(toy_eps, SCHEDULE, x0.split(50))
    assert len(warned) == 1


def test_a_network_that_is_not_finite_is_reported_and_not_saved(tmp_path):
    def network(x, n):
        return torch.where(n.reshape(-1, 1, 1, 1) >= 7, torch.nan, x)

    path = tmp_path / "state.pth"
    for options, is_saved in (({}, False), ({"save_every": 0}, True)):
        with pytest.raises(ValueError, match="not finite, first at step n = 7"):
            estimate_gamma(network, SCHEDULE, X0.split(64), checkpoint=path, **options)
        assert path.exists() == is_saved
    assert torch.load(path, weights_only=True)["counts"].tolist() == [0] + 6 * [64] + 19 * [0]
