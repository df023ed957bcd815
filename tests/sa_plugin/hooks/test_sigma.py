"""SigmaSALoss: any sigma, its options, what it refuses. Its numbers are checked with the recipe."""

import math

import pytest
import torch

from sa_plugin import SigmaSALoss
from tests.refusals import refuses
from tests.stand_ins import SHAPE, Denoises
from tests.toys import images, normal

Y, NOISE = images(0, *SHAPE), normal(1, *SHAPE)
SIGMA = torch.logspace(-6, 6, len(Y), dtype=torch.float64)


def evaluate(sigma=SIGMA, net=None, **options):
    """(D, term) and the (noisy, sigma) that the network saw."""
    seen, net = [], net or Denoises()

    def spy(x, sigma):
        seen.append((x, sigma))
        return net(x, sigma)

    torch.manual_seed(0)
    noisy = Y + sigma.reshape(-1, 1, 1, 1) * NOISE
    return SigmaSALoss(**options)(spy, Y, noisy, sigma), seen


@pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1, 1)])
@pytest.mark.parametrize("stack", [True, False])
def test_a_window_is_of_neighbours_of_the_hosts_own_sigma(shape, stack):
    """Without an end above or below, and in the host's own shape."""
    sigma = SIGMA.reshape(shape)
    _, seen = evaluate(sigma, K=3, ratio=1.1, stack=stack)
    assert len(seen) == (1 if stack else 3)
    rows = [s for _, sigmas in seen for s in sigmas.split(len(Y))]
    own = [s for s in rows if torch.equal(s, sigma)]
    assert len(own) == 1
    found = sorted(rows, key=lambda s: -float(s.flatten()[0]))
    for k, s in enumerate(found):
        torch.testing.assert_close(s, sigma / 1.1**k, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", ["independent", "shared", "chain"])
def test_stacked_or_in_series_is_the_same(noise):
    results = [evaluate(K=3, noise=noise, stack=stack)[0] for stack in (True, False)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_chain_noise_lies_on_one_forward_chain():
    """x at the larger sigma is x at the smaller and fresh noise: their noises correlate by 1/r."""
    sigma = torch.full((len(Y),), 2.0, dtype=torch.float64)
    (_, _), ((x, s),) = evaluate(sigma, noise="chain", ratio=1.25)
    eps = ((x - Y.repeat(2, 1, 1, 1)) / s.reshape(-1, 1, 1, 1)).reshape(2, -1)
    rest = eps[1] - eps[0] / 1.25
    assert rest.square().mean().sqrt().item() == pytest.approx(math.sqrt(1 - 0.64), rel=0.15)
    assert abs((rest * eps[0]).mean().item()) < 0.15


def test_a_window_of_one_and_lambda_zero():
    """L_sa is then the host's own mean of |D - y|^2, or nothing; D is the host's call."""
    expected = Denoises()(Y + SIGMA.reshape(-1, 1, 1, 1) * NOISE, SIGMA)
    (D, sa), _ = evaluate(K=1, lam=0.5)
    torch.testing.assert_close(D, expected, rtol=0, atol=0)
    squares = (D - Y).square().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(sa, 0.5 * squares, rtol=1e-7, atol=0)
    (D, sa), seen = evaluate(lam=0)
    assert torch.equal(D, expected)
    assert not sa.any()
    assert [len(x) for x, _ in seen] == [len(Y)]


@refuses(
    ({"K": 0}, r"K must be a whole number in 1\.\."),
    ({"ratio": 1.0}, "ratio must be > 1, got 1.0"),
    ({"ratio": "2"}, "ratio must be a finite number > 0, got '2'"),
    ({"noise": "pink"}, "noise must be one of"),
    ({"lam": -1}, "lam must be a finite number >= 0"),
)
def test_bad_options_are_refused(options):
    SigmaSALoss(**options)


@refuses(
    ((Y, Y + NOISE, SIGMA), "noise recovered .* not 1: noisy must be y [+] sigma [*] noise"),
    ((Y, Y, SIGMA), "noise recovered from the network's input has mean square 0, not 1"),
    ((Y, Y[:4], SIGMA), "noisy must have shape"),
    ((Y, Y + NOISE, torch.ones(1)), "sigma must hold one value for each of 8 images, got shape"),
    (
        (Y[:1], Y[:1] + NOISE[:1], torch.tensor(1.0)),
        r"one value for each of 1 images, got shape \(\)",
    ),
)
def test_bad_calls_are_refused(arguments):
    SigmaSALoss()(Denoises(), *arguments)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="the network must return real tensors of its input's"):
        evaluate(net=lambda x, sigma: x[:, :1])
