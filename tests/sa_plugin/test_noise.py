"""The noises of a window: the law of each kind, and in which dtype they are drawn."""

import numpy as np
import pytest
import torch

from sa_plugin.loss import SALoss
from sa_plugin.noise import draw
from sa_plugin.schedule import NoiseSchedule
from tests.toys import images, normal, over

SCHEDULE = NoiseSchedule.from_betas(np.linspace(0.02, 0.4, 7))
IMAGE = (2, 2, 2)


@pytest.mark.parametrize(
    ("window", "backprop"), [("down", "all"), ("down", "one"), ("paper", "all"), ("paper", "one")]
)
def test_chain_has_the_law_of_one_forward_chain(window, backprop):
    """Noise is linear in its draws: unit draws give the map, map times transpose the covariance."""
    K, N, inputs, steps = 4, SCHEDULE.N, [], []
    n = torch.arange(1, N + 1).repeat_interleave(K)
    j = torch.arange(K).repeat(N) if backprop == "one" else torch.zeros_like(n)
    unit = torch.eye(K, dtype=torch.float64)[:, None].expand(K, len(n), K)
    loss = SALoss(SCHEDULE, K, window=window, backprop=backprop, noise="chain", stack=False)
    anchor = n + j if window == "down" else n - j
    x0 = torch.zeros(len(n), K, dtype=torch.float64)  # then x_s = sqrt(cum_beta_s) eps_s
    loss(lambda x, s: inputs.append(x) or steps.append(s) or x, x0, n=n, anchor=anchor, noise=unit)
    steps = torch.stack(steps)
    eps = torch.stack(inputs) / torch.tensor(SCHEDULE.cum_betas)[steps].sqrt()[..., None]
    covariance = torch.einsum("rbk,sbk->rsb", eps, eps)
    s, t = torch.minimum(steps[:, None], steps), torch.maximum(steps[:, None], steps)
    ratio = SCHEDULE.cum_betas[s] / SCHEDULE.cum_betas[t]
    rho = np.sqrt(SCHEDULE.skip_alpha(s.numpy(), t.numpy()) * ratio)
    np.testing.assert_allclose(covariance.numpy(), rho, rtol=1e-10)
    assert (rho < 0.99).sum() > K * len(n)


@pytest.mark.parametrize("call", ["loss", "sa_term"])
def test_shared_is_one_eps(call):
    x0, n, eps, seen = images(0, 2, *IMAGE), torch.tensor([5, 7]), normal(1, 2, *IMAGE), []
    loss, model = SALoss(SCHEDULE, K=3, noise="shared"), lambda x, s: seen.append((x, s)) or x
    if call == "loss":
        loss(model, x0, n=n, noise=eps[None])
    else:
        loss.sa_term(model, x0, n, eps.requires_grad_(), x0)
    ((x, steps),) = seen
    assert not x.requires_grad
    rows = 3 if call == "loss" else 2
    a = over(torch.tensor(SCHEDULE.cum_alphas)[steps], x)
    expected = a.sqrt() * x0.repeat(rows, 1, 1, 1) + (1 - a).sqrt() * eps.repeat(rows, 1, 1, 1)
    torch.testing.assert_close(x, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_is_drawn_in_the_images_dtype(dtype):
    assert draw(2, torch.zeros(3, 4, dtype=dtype), None).dtype == dtype
