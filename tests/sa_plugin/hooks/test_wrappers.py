"""EpsModel translates every habit of a host into eps(x, n); prediction's conversions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_plugin.hooks.wrappers import EpsModel, SigmaModel
from sa_plugin.prediction import PREDICTS, to_eps, to_x0
from sa_plugin.schedule import NoiseSchedule
from tests.toys import images, normal

SCHEDULE = NoiseSchedule.linear(50)
X0, EPS = images(0, 4, 2, 3, 3), normal(1, 4, 2, 3, 3)
N = torch.tensor([1, 2, 25, 50])
A = torch.tensor(SCHEDULE.cum_alphas)[N].sqrt().reshape(-1, 1, 1, 1)
B = torch.tensor(SCHEDULE.cum_betas)[N].sqrt().reshape(-1, 1, 1, 1)
X = A * X0 + B * EPS
TARGETS = {"eps": EPS, "x0": X0, "v": A * EPS - B * X0}


@pytest.mark.parametrize("predicts", PREDICTS)
def test_exact_targets_give_the_exact_noise(predicts):
    model = EpsModel(lambda x, t: TARGETS[predicts], SCHEDULE, predicts=predicts)
    torch.testing.assert_close(model(X, N), EPS, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(PREDICTS), st.floats(0.01, 0.99))
def test_conversions_agree_with_each_other(predicts, signal):
    """eps and x_0 from one output put x_n together again."""
    a, b = torch.tensor(signal).double(), torch.tensor(1 - signal**2).double().sqrt()
    eps, x0 = (convert(EPS, X, a, b, predicts) for convert in (to_eps, to_x0))
    torch.testing.assert_close(a * x0 + b * eps, X)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 25, 50]),
        ({"index_from": 0}, [0, 1, 24, 49]),
        ({"rescale_to": 1000}, [20.0, 40.0, 500.0, 1000.0]),
        ({"index_from": 0, "rescale_to": 1000}, [0.0, 20.0, 480.0, 980.0]),
    ],
)
def test_time_is_told_as_the_host_expects_it(options, expected):
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    EpsModel(network, SCHEDULE, **options)(X, N)
    assert seen[0].tolist() == expected
    assert seen[0].is_floating_point() == ("rescale_to" in options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_respaced_times_are_told(dtype):
    seen = []
    times = (torch.arange(50) * 20 + 3).to(dtype)
    EpsModel(lambda x, t: seen.append(t) or x, SCHEDULE, times=times)(X, N)
    assert seen[0].tolist() == [3, 23, 483, 983]
    assert seen[0].dtype == dtype


@pytest.mark.parametrize("predicts", PREDICTS)
def test_an_output_that_the_host_has_is_translated_alike(predicts):
    """eps_of makes no call, and gives what a call would."""
    host = torch.cat([TARGETS[predicts], X], 1)
    model = EpsModel(lambda x, t: host, SCHEDULE, predicts=predicts, output="channels")
    expected = model(X, N)
    model.network = None
    assert torch.equal(model.eps_of(host, X, N), expected)


def test_second_outputs():
    pair = EpsModel(lambda x, t: (x, 2 * x), SCHEDULE, output="pair")
    channels = EpsModel(lambda x, t: torch.cat([x, 2 * x], 1), SCHEDULE, output="channels")
    for model in (pair, channels):
        assert torch.equal(model(X, N), X)
        eps, second = model.with_second(X, N)
        assert torch.equal(eps, X)
        assert torch.equal(second, 2 * X)


def test_labels_reach_the_network():
    model = EpsModel(lambda x, t, y: x + y.reshape(-1, 1, 1, 1), SCHEDULE)
    assert torch.equal(model(X, N, y=torch.ones(4)), X + 1)


def test_a_module_keeps_its_parameters_and_mode():
    network = torch.nn.Conv2d(2, 2, 1)
    model = EpsModel(lambda x, t: network(x), SCHEDULE)
    assert not list(model.parameters())  # a function hides them
    model = EpsModel(network, SCHEDULE)
    assert {id(p) for p in model.parameters()} == {id(p) for p in network.parameters()}
    model.eval()
    assert not network.training


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"index_from": 2}, "index_from must be 0 or 1, got 2"),
        ({"predicts": "score"}, r"predicts must be one of \('eps', 'x0', 'v'\), got 'score'"),
        ({"output": "two"}, "output must be one of .*got 'two'"),
        ({"times": range(49)}, r"times must be \[N\], N = 50, got shape \(49,\)"),
        ({"times": range(50), "index_from": 0}, "times replaces index_from and rescale_to"),
        ({"times": range(50), "rescale_to": 1000}, "times replaces index_from and rescale_to"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        EpsModel(lambda x, t: x, SCHEDULE, **options)


@pytest.mark.parametrize(
    ("output", "network", "said"),
    [
        ("pair", lambda x, t: x, "needs two tensors, got Tensor"),
        ("channels", lambda x, t: x, "needs more than 2 channels, got 2"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(output, network, said):
    with pytest.raises(ValueError, match=said):
        EpsModel(network, SCHEDULE, output=output)(X, N)


def test_one_output_has_no_second():
    with pytest.raises(ValueError, match="no second output"):
        EpsModel(lambda x, t: x, SCHEDULE).with_second(X, N)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_sigma_networks_get_the_noisy_image_and_sigma(predicts):
    """A ladder of sigmas comes back; the exact denoiser gives the exact noise."""
    sigmas = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(sigmas)
    seen = []

    def network(noisy, sigma, y):
        seen.append((noisy, sigma, y))
        return X0 if predicts == "x0" else EPS

    a = torch.tensor(schedule.cum_alphas)[N].sqrt().reshape(-1, 1, 1, 1)
    b = torch.tensor(schedule.cum_betas)[N].sqrt().reshape(-1, 1, 1, 1)
    labels = torch.arange(4)
    eps = SigmaModel(network, schedule, predicts=predicts)(a * X0 + b * EPS, N, y=labels)
    torch.testing.assert_close(eps, EPS, rtol=1e-9, atol=1e-9)
    noisy, sigma, y = seen[0]
    torch.testing.assert_close(sigma, sigmas[N - 1], rtol=1e-10, atol=0)
    torch.testing.assert_close(noisy, X0 + sigma.reshape(-1, 1, 1, 1) * EPS)
    assert y is labels


def test_bad_sigma_networks_and_ladders_are_refused():
    with pytest.raises(ValueError, match=r"predicts must be one of \('x0', 'eps'\), got 'v'"):
        SigmaModel(lambda x, s: x, SCHEDULE, predicts="v")
    for sigmas in ([0.0, 1.0], [2.0, 1.0], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="sigmas must be finite, > 0 and rise strictly"):
            NoiseSchedule.from_sigmas(sigmas)
