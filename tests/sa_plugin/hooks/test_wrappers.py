"""EpsModel translates every habit of a host into eps(x, n); prediction's conversions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_plugin.hooks.wrappers import EpsModel, SigmaModel
from sa_plugin.prediction import PREDICTS, to_eps, to_x0
from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.toys import images, normal

SCHEDULE = NoiseSchedule.linear(50)
X0, EPS = images(0, 4, 2, 3, 3), normal(1, 4, 2, 3, 3)
N = torch.tensor([1, 2, 25, 50])


def signal_and_noise(schedule):
    """sqrt(cum_alpha_n) and sqrt(cum_beta_n) at the steps N."""
    tables = schedule.cum_alphas, schedule.cum_betas
    return (torch.tensor(table)[N].sqrt().reshape(-1, 1, 1, 1) for table in tables)


A, B = signal_and_noise(SCHEDULE)
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
        ({"times": torch.arange(50) * 20 + 3}, [3, 23, 483, 983]),
        ({"times": (torch.arange(50) * 20 + 3).float()}, [3.0, 23.0, 483.0, 983.0]),
    ],
)
def test_time_is_told_as_the_host_expects_it(options, expected):
    seen = []
    EpsModel(lambda x, t: seen.append(t) or x, SCHEDULE, **options)(X, N)
    assert seen[0].tolist() == expected
    assert seen[0].is_floating_point() == isinstance(expected[0], float)
    if "times" in options:
        assert seen[0].dtype == options["times"].dtype


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


@refuses(
    ({"index_from": 2}, "index_from must be 0 or 1, got 2"),
    ({"predicts": "score"}, r"predicts must be one of \('eps', 'x0', 'v'\), got 'score'"),
    ({"output": "two"}, "output must be one of .*got 'two'"),
    ({"times": range(49)}, r"times must be \[N\], N = 50, got shape \(49,\)"),
    ({"times": range(50), "index_from": 0}, "times replaces index_from and rescale_to"),
    ({"times": range(50), "rescale_to": 1000}, "times replaces index_from and rescale_to"),
)
def test_bad_options_are_refused(options):
    EpsModel(lambda x, t: x, SCHEDULE, **options)


@refuses(
    ("pair", "needs two tensors, got Tensor"),
    ("channels", "needs more than 2 channels, got 2"),
)
def test_outputs_that_do_not_fit_are_refused(output):
    EpsModel(lambda x, t: x, SCHEDULE, output=output)(X, N)


@refuses(
    (lambda network: EpsModel(network, SCHEDULE).with_second(X, N), "no second output"),
    (
        lambda network: SigmaModel(network, SCHEDULE, predicts="v"),
        r"predicts must be one of \('x0', 'eps'\), got 'v'",
    ),
)
def test_what_a_network_cannot_give_is_refused(use):
    use(lambda x, t: x)


@refuses(
    ([0.0, 1.0], "sigmas must be finite, > 0 and rise strictly"),
    ([2.0, 1.0], "sigmas must be finite, > 0 and rise strictly"),
    ([1.0, float("inf")], "sigmas must be finite, > 0 and rise strictly"),
)
def test_bad_ladders_are_refused(sigmas):
    NoiseSchedule.from_sigmas(sigmas)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_sigma_networks_get_the_noisy_image_and_sigma(predicts):
    """A ladder of sigmas comes back; the exact denoiser gives the exact noise."""
    sigmas = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(sigmas)
    seen = []

    def network(noisy, sigma, y):
        seen.append((noisy, sigma, y))
        return TARGETS[predicts]

    (a, b), labels = signal_and_noise(schedule), torch.arange(4)
    eps = SigmaModel(network, schedule, predicts=predicts)(a * X0 + b * EPS, N, y=labels)
    torch.testing.assert_close(eps, EPS, rtol=1e-9, atol=1e-9)
    noisy, sigma, y = seen[0]
    torch.testing.assert_close(sigma, sigmas[N - 1], rtol=1e-10, atol=0)
    torch.testing.assert_close(noisy, X0 + sigma.reshape(-1, 1, 1, 1) * EPS)
    assert y is labels
