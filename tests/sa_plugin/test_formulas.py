"""The same formulas on NumPy, torch and JAX; the JAX example against SALoss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from examples import jax_sa2
from sa_plugin import NoiseSchedule, SALoss, TauTable, formulas
from tests.toys import images, normal

SCHEDULE = NoiseSchedule.cosine(50)
LIBRARIES = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}
X, EPS, SECOND = (normal(seed, 3, 2, 4, 4).numpy() for seed in (0, 1, 2))


@pytest.fixture(params=LIBRARIES)
def library(request):
    """(array maker, array type), JAX in double precision like the others."""
    with jax.enable_x64(request.param == "jax"):
        make = LIBRARIES[request.param]
        yield make, type(make(X))


def check(value, kind, expected, rtol=1e-12):
    assert isinstance(value, kind)
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_conversions(library, target):
    make, kind = library
    a, b = 0.6, 0.8
    x0 = images(3, 3, 2, 4, 4).numpy()
    output = {"eps": EPS, "x0": x0, "v": a * EPS - b * x0}[target]
    x = a * x0 + b * EPS
    check(formulas.to_eps(make(output), make(x), a, b, target), kind, EPS)
    check(formulas.to_x0(make(output), make(x), a, b, target), kind, x0)


def test_theorem1_weights(library):
    make, kind = library
    s = SCHEDULE
    tables = (s.betas[2:], s.cum_alphas[1:-1], s.cum_betas[1:-1], s.cum_alphas[2:], s.cum_betas[2:])
    tau = formulas.theorem1_weight(s.betas[1].item(), *(make(t.copy()) for t in tables))
    check(tau, kind, TauTable(s, "theorem1").values[2:])


def test_window_gap_is_the_weighted_sum(library):
    make, kind = library
    errors = normal(4, 3, 2, 2, 4, 4).numpy()
    weights = normal(5, 3, 2).numpy()
    gap = formulas.window_gap(make(weights), make(errors))
    check(gap, kind, np.einsum("kb,kbchw->bchw", weights, errors))


STEPS = [("ddpm", v) for v in ("small", "big", "analytic", "npr", "sn", "heuristic", "iddpm")]
STEPS += [("ddim", v) for v in ("small", "analytic", "npr", "sn", "heuristic")]


@pytest.mark.parametrize(("forward", "variance"), STEPS)
def test_reverse_step(library, forward, variance):
    """Mean and variance of a step, spelt out with NumPy: limit, clips and all."""
    make, kind = library
    s, t = 20, 31
    gamma = np.full(51, 0.7)
    options = {"gamma": gamma, "clip_until": 20, "clip_pixel": 200, "forward": forward}
    c = formulas.ReverseCoefficients.between(SCHEDULE, np.array([s]), np.array([t]), **options)
    step = formulas.ReverseCoefficients.unstack([row.item() for row in c.stack()])
    second = make(SECOND) if variance in ("npr", "sn", "iddpm") else None
    own = formulas.ReverseCoefficients.unstack([make(row)[0] for row in c.stack().copy()])
    moments = formulas.reverse_moments(own, make(X), make(EPS), second, variance=variance)
    a2, b2 = SCHEDULE.cum_alphas[t], SCHEDULE.cum_betas[t]
    x0 = np.clip((X - np.sqrt(b2) * EPS) / np.sqrt(a2), -1, 1)
    ratio = {
        "analytic": 1 - 0.7,
        "npr": SECOND,
        "sn": SECOND - EPS**2,
        "heuristic": 1 - EPS**2,
    }.get(variance)
    if ratio is not None:
        sigma2 = step.small + step.cov_weight * np.clip(b2 / a2 * ratio, 0, 1)
    elif variance == "iddpm":
        v = (SECOND + 1) / 2
        sigma2 = np.exp(v * np.log(step.big) + (1 - v) * np.log(step.small))
    else:
        sigma2 = step.small if variance == "small" else step.big
    check(moments.mean, kind, step.x0_weight * x0 + step.x_weight * X + step.eps_weight * EPS)
    np.testing.assert_allclose(
        np.asarray(moments.variance), np.minimum(sigma2, step.limit), rtol=1e-10, atol=1e-14
    )


def test_a_jax_step_compiles():
    """Nothing in the formulas looks at a traced value."""

    @jax.jit
    def variance(eps, second, alpha):
        cov = formulas.covariance("sn", alpha, 1 - alpha, eps=eps, second=second, clip=True)
        return formulas.iddpm_variance(second, alpha * 0.1, alpha) + cov

    assert variance(jnp.asarray(EPS), jnp.asarray(SECOND), 0.5).shape == EPS.shape


@pytest.mark.parametrize(("K", "lam"), [(1, 1.0), (2, 0.3), (4, 1.0)])
def test_the_example_has_saloss_loss_and_gradient(K, lam):
    schedule = NoiseSchedule.linear(30)
    params = jax_sa2.init(jax.random.key(1), width=16)
    mirrored = [
        tuple(torch.tensor(np.asarray(p)).requires_grad_() for p in layer) for layer in params
    ]

    def torch_network(x, n):
        angle = n[:, None] / schedule.N * np.pi / 2
        h = torch.cat([x, angle.sin(), angle.cos()], 1)
        for weight, bias in mirrored[:-1]:
            h = torch.nn.functional.silu(h @ weight + bias)
        return h @ mirrored[-1][0] + mirrored[-1][1]

    x0 = jax_sa2.arcs(12)
    n, noise = np.arange(1, 13), normal(3, K, 12, 2).numpy().astype(np.float32)
    ours = SALoss(schedule, K=K, lam=lam)(
        torch_network, torch.from_numpy(x0), n=torch.from_numpy(n), noise=torch.from_numpy(noise)
    )
    ours.total.backward()

    @jax.jit
    def objective(params):
        def model(x, n):
            return jax_sa2.network(params, x, n, schedule.N)

        terms = jax_sa2.sa_loss(model, schedule, jnp.asarray(x0), n, jnp.asarray(noise), lam=lam)
        return terms[0], terms

    (_, terms), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    for got, expected in zip(terms, (ours.total, ours.simple, ours.sa), strict=True):
        np.testing.assert_allclose(float(got), expected.item(), rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(gradient), sum(mirrored, ()), strict=True):
        np.testing.assert_allclose(np.asarray(got), expected.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_the_example_learns(capsys):
    log = jax_sa2.train(150, batch=128)
    assert log[-1][0] < 0.8 * log[0][0]
    assert "simple" in capsys.readouterr().out
