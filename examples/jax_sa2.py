"""Training with the SA-2 loss in JAX: python -m examples.jax_sa2 (needs jax; seconds on a CPU).

A small network learns the noise of points on two half circles. jit compiles the step. The loss
equals ``sa_plugin.SALoss`` on the same draws. The optimiser is plain Adam, written out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from sa_plugin import NoiseSchedule, TauTable
from sa_plugin.formulas import window_gap

try:
    import jax
    import jax.numpy as jnp
except ModuleNotFoundError:
    raise SystemExit("jax is not installed; get it by: pip install 'sa-plugin[jax]'") from None

Array = jax.Array
Params = list[tuple[Array, Array]]


def sa_loss(
    eps_model: Callable[[Array, Array], Array],
    schedule: NoiseSchedule,
    x0: Array,
    n: Array,
    noise: Array,
    *,
    lam: float = 1.0,
) -> tuple[Array, Array, Array]:
    """(total, L_simple, L_sa) over the windows n, n-1, ..., like ``SALoss`` with its defaults.

    Args:
        eps_model: (x [M, ...], n [M] in 1..N) -> eps.
        x0: [B, ...].
        n: [B] in 1..N.
        noise: [K, B, ...], entry k for step n - k.
    """
    K, batch = noise.shape[:2]
    steps = n - jnp.arange(K)[:, None]
    tau = jnp.asarray(TauTable(schedule, "uniform").values, x0.dtype)
    weights = jnp.where(steps >= 1, tau[jnp.maximum(steps, 0)], 0) / K
    steps = jnp.maximum(steps, 1)
    shape = (K, batch, *[1] * (x0.ndim - 1))
    signal, sigma = (
        jnp.asarray(table**0.5, x0.dtype)[steps].reshape(shape)
        for table in (schedule.cum_alphas, schedule.cum_betas)
    )
    x = signal * x0 + sigma * noise
    stacked = x.reshape(K * batch, *x0.shape[1:])
    errors = eps_model(stacked, steps.reshape(-1)).reshape(noise.shape) - noise
    axes = tuple(range(1, x0.ndim))
    simple = (errors[0] ** 2).sum(axes).mean()
    sa = (window_gap(weights, errors) ** 2).sum(axes).mean()
    return simple + lam * sa, simple, sa


def init(key: Array, width: int = 64) -> Params:
    """Weights of a network with two hidden layers, for points in the plane."""
    sizes = [(4, width), (width, width), (width, 2)]
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, (i, o)) / i**0.5, jnp.zeros(o))
        for k, (i, o) in zip(keys, sizes, strict=True)
    ]


def network(params: Params, x: Array, n: Array, N: int) -> Array:
    """eps at points x [M, 2] and steps n [M]."""
    angle = n[:, None] / N * jnp.pi / 2
    h = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], 1)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias)
    weight, bias = params[-1]
    return h @ weight + bias


def make_step(schedule: NoiseSchedule, rate: float = 2e-3) -> Callable[..., Any]:
    """A compiled step: (params, (m, v, count), x0, key) -> (params, (m, v, count), terms)."""

    @jax.jit
    def step(params: Params, state: Any, x0: Array, key: Array) -> Any:
        key_n, key_noise = jax.random.split(key)
        n = jax.random.randint(key_n, (len(x0),), 1, schedule.N + 1)
        noise = jax.random.normal(key_noise, (2, *x0.shape))

        def objective(params: Params) -> tuple[Array, tuple[Array, Array]]:
            total, simple, sa = sa_loss(
                lambda x, n: network(params, x, n, schedule.N), schedule, x0, n, noise
            )
            return total, (simple, sa)

        gradient, terms = jax.grad(objective, has_aux=True)(params)
        m, v, count = state
        count = count + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)
        scale = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), params, m, v)
        return params, (m, v, count), terms

    return step


def arcs(count: int, seed: int = 0) -> np.ndarray:
    """Points [count, 2] on two half circles, inside [-1, 1]."""
    rng = np.random.default_rng(seed)
    angle, side = rng.uniform(0, np.pi, count), rng.integers(0, 2, count) * 2 - 1
    points = np.stack([np.cos(angle) - side / 2, side * (np.sin(angle) - 0.25)], 1)
    return (points / 1.6).astype(np.float32)


def train(iterations: int, batch: int = 256, log_every: int = 100) -> list[tuple[float, float]]:
    """(L_simple, L_sa) at every ``log_every``-th iteration."""
    schedule, data = NoiseSchedule.linear(100), arcs(4096)
    key = jax.random.key(0)
    params = init(key)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, step, log = (zeros, zeros, 0), make_step(schedule), []
    rng = np.random.default_rng(0)
    for i in range(iterations):
        x0 = jnp.asarray(data[rng.integers(0, len(data), batch)])
        params, state, terms = step(params, state, x0, jax.random.fold_in(key, i))
        if i % log_every == 0 or i == iterations - 1:
            simple, sa = map(float, terms)
            log.append((simple, sa))
            print(f"{i:5d}  simple {simple:.4f}  sa {sa:.4f}")
    return log


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=1000)
    train(parser.parse_args().iterations)
