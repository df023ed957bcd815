"""Windows: unbiased by enumeration of every window and position; Theorem 2's bounds; chains."""

import numpy as np
import pytest
import torch

from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.window import draw_anchor
from tests.toys import ScaledToy, images, normal

SMALL = NoiseSchedule.from_betas(np.linspace(0.02, 0.4, 7))
N = SMALL.N
IMAGE = (2, 2, 2)
X0 = images(0, 1, *IMAGE)
EPS = normal(1, N + 1, *IMAGE)  # one eps a step, the same in every window
CUSTOM = np.linspace(0.5, 2.0, N + 1)
WEIGHTINGS = ["uniform", "theorem1", "relative", CUSTOM]
NAMES = ["uniform", "theorem1", "relative", "custom"]


def noise_at(anchor, K, window):
    """EPS at the window's positions, [K, B, ...]; positions outside 1..N get any noise."""
    sign = 1 if window == "paper" else -1
    steps = anchor[None] + sign * torch.arange(K)[:, None]
    return EPS[steps.clamp(1, N)]


def evaluate(loss, n, anchor, window):
    """Per-sample SA values and the gradient of their sum, for windows given one by one."""
    model = ScaledToy()
    noise = noise_at(anchor, loss.K, window)
    if window == "paper" and loss.backprop == "all":
        noise[0] = torch.where((anchor < 1).reshape(-1, 1, 1, 1), EPS[n], noise[0])
    output = loss(model, X0.expand(len(n), *IMAGE), n=n, anchor=anchor, noise=noise)
    output.sa_per_sample.sum().backward()
    return output, model.scale.grad.item()


def all_windows(loss, window):
    """Exact L_sa and its gradient under the window's own law, by backprop="all"."""
    if window == "down":
        anchor = torch.arange(1, N + 1)
        n = anchor
    else:
        anchor = torch.arange(1 - loss.K, N + 1)
        n = torch.where(anchor >= 1, anchor, 3)
    output, gradient = evaluate(loss, n, anchor, window)
    return output.sa.item(), gradient / len(anchor), output


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize("window", ["down", "paper"])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_one_position_is_unbiased(K, window, weighting):
    """Mean over every (n, position) equals the mean over every window, value and gradient."""
    options = {"K": K, "weighting": weighting, "window": window}
    value, gradient, _ = all_windows(SALoss(SMALL, **options), window)
    n, position = (
        grid.flatten()
        for grid in torch.meshgrid(torch.arange(1, N + 1), torch.arange(K), indexing="ij")
    )
    anchor = n + position if window == "down" else n - position
    output, estimate = evaluate(SALoss(SMALL, backprop="one", **options), n, anchor, window)
    assert output.sa.item() == pytest.approx(value, rel=1e-10, abs=1e-30)
    assert estimate / len(n) == pytest.approx(gradient, rel=1e-10, abs=1e-30)


@pytest.mark.parametrize("window", ["down", "paper"])
def test_always_taking_the_first_position_would_be_biased(window):
    """The reason for drawing positions: position 0 alone, scaled by K, misses the mark."""
    options = {"K": 3, "window": window, "weighting": CUSTOM}
    _, gradient, _ = all_windows(SALoss(SMALL, **options), window)
    n = torch.arange(1, N + 1)
    _, estimate = evaluate(SALoss(SMALL, backprop="one", **options), n, n, window)
    assert abs(estimate / N / gradient - 1) > 0.01


def windows_and_their_chances(window, K):
    """(n, anchor, probability) of every window that "all" can draw."""
    n = torch.arange(1, N + 1)
    if window == "down":
        return n, n, torch.full((N,), 1 / N, dtype=torch.float64)
    below = torch.arange(1 - K, 1)
    ns, anchors = torch.cat([n, n.repeat(K)]), torch.cat([n, below.repeat_interleave(N)])
    chances = torch.ones(len(ns), dtype=torch.float64) / (N + K)
    chances[N:] /= N
    return ns, anchors, chances


@pytest.mark.parametrize("weighting", ["uniform", "theorem1"])
@pytest.mark.parametrize("window", ["down", "paper"])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_reused_calls_estimate_the_same_simple_loss(K, window, weighting):
    """Mean over every window equals the mean of |e_n|^2 over n, value and gradient."""
    plain = ScaledToy()
    n = torch.arange(1, N + 1)
    expected = SALoss(SMALL, lam=0)(plain, X0.expand(N, *IMAGE), n=n, noise=EPS[n][None]).simple
    expected.backward()
    loss = SALoss(SMALL, K=K, window=window, weighting=weighting, reuse=True)
    n, anchor, chances = windows_and_their_chances(window, K)
    noise = noise_at(anchor, K, window)
    noise[0] = torch.where((anchor < 1).reshape(-1, 1, 1, 1), EPS[n], noise[0])
    model = ScaledToy()
    output = loss(model, X0.expand(len(n), *IMAGE), n=n, anchor=anchor, noise=noise)
    value = (chances * output.simple_per_sample).sum()
    value.backward()
    assert chances.sum().item() == pytest.approx(1)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert model.scale.grad.item() == pytest.approx(plain.scale.grad.item(), rel=1e-10)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_paper_window_is_the_paper_sum(K, weighting):
    """L_sa over starts 1-K..N, written out; tau zero outside 2..N."""
    loss = SALoss(SMALL, K=K, window="paper", weighting=weighting)
    value, _, _ = all_windows(loss, "paper")
    model, tau = ScaledToy(), loss.tau.values
    signal, sigma = SMALL.cum_alphas**0.5, SMALL.cum_betas**0.5
    total = 0.0
    for start in range(1 - K, N + 1):
        inside = [s for s in range(start, start + K) if 2 <= s <= N]
        largest = max((tau[s] for s in inside), default=1) if loss.tau.relative else 1
        gap = torch.zeros(IMAGE, dtype=torch.float64)
        for s in inside:
            x = signal[s] * X0[0] + sigma[s] * EPS[s]
            gap = gap + tau[s] / largest * (model(x[None], torch.tensor([s]))[0] - EPS[s]) / K
        total += gap.square().sum().item()
    assert value == pytest.approx(total / (N + K), rel=1e-10)


@pytest.mark.parametrize("K", [1, 2, 3, 5, 7])
def test_theorem_2_bounds_hold_by_enumeration(K):
    """(N-1)/(N+K) E[tau_t^2 |e_t|^2] >= L_sa >= |d|^2 / (N+K)^2, t uniform on 2..N."""
    loss = SALoss(SMALL, K=K, window="paper", weighting="theorem1")
    sa, _, _ = all_windows(loss, "paper")
    n = torch.arange(1, N + 1)
    coefficient = torch.tensor(SMALL.cum_alphas)[n].reshape(-1, 1, 1, 1)
    x = coefficient.sqrt() * X0 + (1 - coefficient).sqrt() * EPS[1:]
    e = (ScaledToy()(x, n) - EPS[1:]).detach()
    tau = torch.from_numpy(loss.tau.values.copy())[1:].reshape(-1, 1, 1, 1)
    weighted = (tau * e)[1:]
    upper = (N - 1) / (N + K) * weighted.square().sum((1, 2, 3)).mean().item()
    lower = weighted.sum(0).square().sum().item() / (N + K) ** 2
    assert upper * (1 + 1e-12) >= sa >= lower
    assert upper > lower > 0
    if K == 1:
        assert upper == pytest.approx(sa, rel=1e-12)  # a window of one step: Jensen is equality


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
    plan = loss._window(n, None, generator)
    assert torch.equal(plan.steps[0], n)
    sign = 1 if window == "paper" else -1
    anchor = n - sign * plan.positions[0]
    if backprop == "one":
        counts = torch.bincount(plan.positions[0], minlength=K) / draws
        assert (counts - 1 / K).abs().max() < 5 * (1 / K / draws) ** 0.5
    elif window == "down":
        assert torch.equal(anchor, n)
    if window == "paper" and backprop == "all":
        anchor = draw_anchor(window, backprop, N, K, n, generator)
        counts = torch.bincount(anchor - (1 - K), minlength=N + K) / draws
        assert len(counts) == N + K
        assert (counts - 1 / (N + K)).abs().max() < 5 * (1 / (N + K) / draws) ** 0.5
        assert torch.equal(anchor[anchor >= 1], n[anchor >= 1])
    assert anchor.min() == low


@pytest.mark.parametrize(
    ("window", "backprop"), [("down", "all"), ("down", "one"), ("paper", "one")]
)
def test_chain_noise_has_the_law_of_one_forward_chain(window, backprop):
    """Noise is linear in its draws: unit draws give the map, map times transpose the covariance."""
    K = 4
    loss = SALoss(SMALL, K=K, window=window, backprop=backprop, noise="chain", lam=1)
    n = torch.arange(1, N + 1).repeat_interleave(K)
    position = torch.arange(K).repeat(N) if backprop == "one" else torch.zeros_like(n)
    anchor = n + position if window == "down" else n - position
    unit = torch.eye(K, dtype=torch.float64)[:, None].expand(K, len(n), K)
    seen = []

    def model(x, steps):
        seen.append((x, steps))
        return x

    loss.stack = True
    x0 = torch.zeros(len(n), K, dtype=torch.float64)  # then x_s = sqrt(cum_beta_s) eps_s
    plan = loss._window(n, anchor, None)
    eps = loss._noises(plan, x0, unit, None)
    covariance = torch.einsum("rbk,sbk->rsb", eps, eps)
    s, t = (
        torch.minimum(plan.steps[:, None], plan.steps),
        torch.maximum(plan.steps[:, None], plan.steps),
    )
    rho = np.sqrt(SMALL.skip_alpha(s.numpy(), t.numpy()) * SMALL.cum_betas[s] / SMALL.cum_betas[t])
    real = ((plan.weights != 0)[:, None] & (plan.weights != 0)).numpy()
    assert real.sum() > K * len(n)
    np.testing.assert_allclose(covariance.numpy()[real], rho[real], rtol=1e-10)


def test_shared_noise_is_one_eps():
    loss = SALoss(SMALL, K=3, noise="shared")
    n = torch.tensor([5, 7])
    eps = loss._noises(loss._window(n, None, None), X0.expand(2, *IMAGE), normal(2, 1, 2, *IMAGE), None)
    torch.testing.assert_close(eps, normal(2, 1, 2, *IMAGE).expand(3, 2, *IMAGE))


@pytest.mark.parametrize(
    ("options", "n", "anchor", "said"),
    [
        ({"backprop": "one"}, 3, 5, r"a position 0\.\.K-1 away"),
        ({"backprop": "one", "window": "paper"}, 3, 4, r"a position 0\.\.K-1 away"),
        ({"window": "paper"}, 3, 4, r"n, or in 1-K\.\.0"),
        ({"window": "paper"}, 3, -2, r"n, or in 1-K\.\.0"),
    ],
)
def test_impossible_anchors_are_refused(options, n, anchor, said):
    loss = SALoss(SMALL, K=2, **options)
    with pytest.raises(ValueError, match=said):
        loss(ScaledToy(), X0, n=torch.tensor([n]), anchor=torch.tensor([anchor]))
