"""Windows: unbiased by enumeration of every window and position; Theorem 2's bounds; their law."""

import numpy as np
import pytest
import torch

from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.window import draw_anchor
from tests.reference import sa_terms
from tests.refusals import refuses
from tests.toys import Toy, images, normal

SMALL = NoiseSchedule.from_betas(np.linspace(0.02, 0.4, 7))
N = SMALL.N
IMAGE = (2, 2, 2)
X0 = images(0, 1, *IMAGE)
EPS = normal(1, N + 1, *IMAGE)  # one eps a step, the same in every window
CUSTOM = np.linspace(0.5, 2.0, N + 1)

BOTH = pytest.mark.parametrize("window", ["down", "paper"])
LENGTHS = pytest.mark.parametrize("K", [1, 2, 3, 7])
WEIGHTINGS = pytest.mark.parametrize(
    "weighting", ["uniform", "theorem1", "relative", pytest.param(CUSTOM, id="custom")]
)


def close(value, expected):
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-30)


def noise_of(loss, n, anchor):
    """EPS at the window's positions, [K, B, ...]; steps outside 1..N get any noise."""
    sign = 1 if loss.window == "paper" else -1
    noise = EPS[(anchor + sign * torch.arange(loss.K)[:, None]).clamp(1, N)]
    if loss.backprop == "all":
        noise[0] = EPS[n]
    return noise


def every_window(loss):
    """(n, anchor, chance) of each that can be drawn."""
    n = torch.arange(1, N + 1)
    if loss.backprop == "one":
        n, j = n.repeat_interleave(loss.K), torch.arange(loss.K).repeat(N)
        anchor = n + j if loss.window == "down" else n - j
        return n, anchor, torch.full((len(n),), 1 / len(n), dtype=torch.float64)
    if loss.window == "down":
        return n, n, torch.full((N,), 1 / N, dtype=torch.float64)
    below = torch.arange(1 - loss.K, 1)
    chances = torch.full((N * (loss.K + 1),), 1 / (N + loss.K), dtype=torch.float64)
    chances[N:] /= N
    return n.repeat(loss.K + 1), torch.cat([n, below.repeat_interleave(N)]), chances


def enumerated(loss, n, anchor, chances):
    """Means of both terms over the windows, each with its gradient."""
    model = Toy()
    given = {"n": n, "anchor": anchor, "noise": noise_of(loss, n, anchor)}
    output = loss(model, X0.expand(len(n), *IMAGE), **given)
    return with_gradients(model, chances, output.simple_per_sample, output.sa_per_sample)


def with_gradients(model, chances, *terms):
    means = [(chances * term).sum() for term in terms]
    slopes = [torch.autograd.grad(m, model.scale, retain_graph=True)[0].item() for m in means]
    return [(m.item(), slope) for m, slope in zip(means, slopes, strict=True)]


def written_out(loss):
    """L_simple and L_sa with their gradients, written out over all steps and all windows."""
    model, n = Toy(), torch.arange(1, N + 1)
    r = torch.arange(1 - loss.K if loss.window == "paper" else 1, N + 1)
    own = torch.where(r >= 1, r, 3)
    given = {"tau": loss.tau.values, "relative": loss.tau.relative, "window": loss.window}
    noise, x0 = noise_of(loss, own, r), X0.expand(len(r), *IMAGE)
    _, sa = sa_terms(model, x0, own, noise, SMALL.cum_alphas, r=r, **given)
    simple, _ = sa_terms(model, X0.expand(N, *IMAGE), n, EPS[n][None], SMALL.cum_alphas)
    (first,) = with_gradients(model, 1 / N, simple)
    (second,) = with_gradients(model, 1 / len(r), sa)
    return first, second


@WEIGHTINGS
@BOTH
@LENGTHS
@pytest.mark.parametrize("options", [{}, {"reuse": True}, {"backprop": "one"}], ids=str)
def test_every_way_is_unbiased(K, window, weighting, options):
    """Mean over every window, value and gradient: of L_sa, and of L_simple also with ``reuse``."""
    loss = SALoss(SMALL, K, weighting=weighting, window=window, **options)
    n, anchor, chances = every_window(loss)
    close(chances.sum().item(), 1)
    found = enumerated(loss, n, anchor, chances)
    for one, term in zip(found, written_out(loss), strict=True):
        close(one, term)


@BOTH
def test_sa_term_takes_the_noises_of_the_other_positions(window):
    """Ascending, without the own position's."""
    loss = SALoss(SMALL, 3, weighting=CUSTOM, window=window, backprop="one")
    n, anchor, _ = every_window(loss)
    noise, x0 = noise_of(loss, n, anchor), X0.expand(len(n), *IMAGE)
    own = (anchor - n).abs()
    others = torch.stack([noise[torch.arange(3) != p, b] for b, p in enumerate(own)], 1)
    output = loss(Toy(), x0, n=n, anchor=anchor, noise=noise)
    found = loss.sa_term(Toy(), x0, n, EPS[n], anchor=anchor, noise=others)
    torch.testing.assert_close(found, (output.simple_per_sample, output.sa_per_sample))


@pytest.mark.parametrize(
    ("window", "backprop", "low"),
    [("down", "all", 1), ("down", "one", 1), ("paper", "all", -2), ("paper", "one", -1)],
)
def test_drawn_windows_follow_their_law(window, backprop, low):
    """Frequencies of anchors and of positions within five standard errors, n always inside."""
    K, draws = 3, 200_000
    loss = SALoss(SMALL, K=K, window=window, backprop=backprop)
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(1, N + 1, (draws,), generator=generator)
    drawn = loss._window(n, None, generator)
    assert torch.equal(drawn.steps[0], n)
    anchor = n + drawn.positions[0] * (-1 if window == "paper" else 1)
    if backprop == "one":
        counts = torch.bincount(drawn.positions[0], minlength=K) / draws
        assert (counts - 1 / K).abs().max() < 5 * (1 / K / draws) ** 0.5
    elif window == "down":
        assert torch.equal(anchor, n)
    else:
        anchor = draw_anchor(window, backprop, N, K, n, generator)
        counts = torch.bincount(anchor - (1 - K), minlength=N + K) / draws
        assert len(counts) == N + K
        assert (counts - 1 / (N + K)).abs().max() < 5 * (1 / (N + K) / draws) ** 0.5
        assert torch.equal(anchor[anchor >= 1], n[anchor >= 1])
    assert anchor.min() == low


@refuses(
    (({}, [5, 6], [5, 7]), r"anchor must be n itself \(K = 2\), got 7"),
    (({}, [5, 6], [5]), r"anchor must have n's shape \(2,\), got \(1,\)"),
    (({"backprop": "one"}, [3], [5]), r"a position 0\.\.K-1 away"),
    (({"backprop": "one", "window": "paper"}, [3], [4]), r"a position 0\.\.K-1 away"),
    (({"window": "paper"}, [3], [4]), r"n, or in 1-K\.\.0"),
    (({"window": "paper"}, [3], [1]), r"n, or in 1-K\.\.0"),  # 1 is another step's
    (({"window": "paper"}, [3], [-2]), r"n, or in 1-K\.\.0"),
)
def test_impossible_anchors_are_refused(case):
    options, n, anchor = case
    x0 = X0.expand(len(n), *IMAGE)
    SALoss(SMALL, K=2, **options)(Toy(), x0, n=torch.tensor(n), anchor=torch.tensor(anchor))
