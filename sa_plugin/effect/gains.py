r"""Linear networks for Gaussian data, and which of them the SA loss trains.

Along a direction in which the data have mean mu and variance s, a linear network is one number a
step, its gain c_n (a = cum_alpha, b = cum_beta)::

    f(x, n) = c_n (x - sqrt(a_n) mu),   e_n = c_n (sqrt(a_n) (x_0 - mu) + sqrt(b_n) eps_n) - eps_n.

With the loss's ``input_perturbation`` gamma, x_n is made with eps_n + gamma xi_n. The plain loss's
minimiser is then c_n = sqrt(b_n) / (a_n s + (1 + gamma^2) b_n): it takes b_n for larger.

The expected SA loss is a quadratic form in c_1, ..., c_N, so its minimiser solves a linear system.
Steps within a window meet in it, so its matrix has K - 1 diagonals on either side. Only second
moments enter: for other data with these variances it is the best linear network. Derived in
docs/why_sa_works.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sa_plugin._checks import check_non_negative, check_whole, real_array, table_by_step
from sa_plugin._tensors import Coefficients
from sa_plugin.loss import SALoss
from sa_plugin.noise import NOISES
from sa_plugin.schedule import FloatArray, NoiseSchedule
from sa_plugin.window import WINDOWS

_MOST = 2**22  # numbers in one array of a part of the work


def strength(K: int, lam: float) -> float:
    """q = lam (K - 1) / (K + lam): the one number by which K and lambda act, inside 0..K-1.

    With weights 1, independent noises and steps that change slowly, the SA loss trains the exact
    network of data whose variances are (1 + q) times theirs (derived in docs/why_sa_works.md).

    Raises:
        ValueError: K is not a whole number >= 1, or lam not a finite number >= 0.
    """
    check_whole("K", K, 1, sys.maxsize)
    check_non_negative("lam", lam)
    return float(lam) * (int(K) - 1) / (int(K) + float(lam))


def exact_gains(schedule: NoiseSchedule, variances: ArrayLike) -> FloatArray:
    """c_n = sqrt(b_n) / (a_n s + b_n), [N+1, D]: E[eps | x_n], the plain loss's minimiser.

    Args:
        variances: s > 0 along each direction, [D], in squared units of x_0.

    Raises:
        ValueError: variances that are not finite numbers > 0, [D].
    """
    return inflated_gains(schedule, variances, 0.0)


def inflated_gains(schedule: NoiseSchedule, variances: ArrayLike, q: ArrayLike) -> FloatArray:
    """c_n = sqrt(b_n) / ((1 + q) a_n s + b_n), [N+1, D], row 0 zero.

    The exact gains of data whose variances are (1 + q) times theirs. For q = ``strength(K, lam)``
    they are those of ``gaussian_gains`` up to how much neighbouring steps differ (derived in
    docs/why_sa_works.md).

    Args:
        variances: s > 0 along each direction, [D], in squared units of x_0.
        q: a number >= 0, or one for each step, [N+1] (entry 0 unused).

    Raises:
        ValueError: variances that are not finite numbers > 0, [D]; q that is negative, not finite
            or of another length.
    """
    s = check_variances(variances)
    factor = 1 + table_by_step("q", q, schedule.N, number=True)[:, None]
    a, b = schedule.cum_alphas[:, None], schedule.cum_betas[:, None]
    return np.sqrt(b) / (factor * a * s + b)


def gaussian_gains(loss: SALoss, variances: ArrayLike) -> FloatArray:
    """The gains [N+1, D], row 0 zero, at which the expectation of ``loss`` is least.

    The expectation is over x_0, t uniform on 1..N, the anchors and the noises. Nothing is
    approximated: the weighting, the ends of 1..N and the kind of noise are the loss's own.

    It holds for ``backprop``, ``reuse``, ``antithetic``, ``stratified``, ``stack`` and
    ``reduction`` of any value. The first four change the variance of the loss and its gradient, not
    their expectations; the reduction is one factor for all. ``backprop="one"`` has the same
    expected gradient, so it comes to rest at the same gains.

    Args:
        loss: its schedule, K, lam, weighting, window, noise and input_perturbation count.
        variances: s > 0 along each direction, [D], in squared units of x_0.

    Raises:
        ValueError: variances that are not finite numbers > 0, [D]; ``extra_precision="bf16"``,
            whose rounding is no part of the expectation.
    """
    s = check_variances(variances)
    if loss.extra_precision != "same":
        raise ValueError(
            f"the loss's extra_precision must be 'same', got {loss.extra_precision!r}: its "
            "rounding has no closed form"
        )
    fixed, by_variance, right = _normal_equations(loss)
    gains = np.zeros((loss.schedule.N + 1, len(s)))
    width = max(1, _MOST // fixed.size)
    for first in range(0, len(s), width):
        part = slice(first, first + width)
        bands = fixed[1:, :, None] + by_variance[1:, :, None] * s[part]
        gains[1:, part] = _solve_banded(bands, right[1:])
    return gains


def check_variances(variances: ArrayLike, name: str = "variances") -> FloatArray:
    """The variances along each direction as float64 [D], or ValueError unless finite and > 0.

    Leave out directions in which the data do not vary: there the exact network's images do not
    either, and no strength changes that.
    """
    values = real_array(name, variances)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have shape [D], at least one, got {values.shape}")
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"{name} must be finite and > 0, got {name}[{i}] = {values[i]}")
    return values


def check_gains(gains: ArrayLike, N: int, name: str = "gains") -> FloatArray:
    """Gains as float64 [N+1, D] (row 0 unused), or ValueError unless finite."""
    values = real_array(name, gains)
    if values.ndim != 2 or len(values) != N + 1 or values.size == 0:
        raise ValueError(
            f"{name} must have shape [{N + 1}, D] (row 0 unused), as N = {N}, got {values.shape}"
        )
    if not np.isfinite(values[1:]).all():
        n, i = np.argwhere(~np.isfinite(values[1:]))[0] + (1, 0)
        raise ValueError(f"{name} must be finite, got {name}[{n}, {i}] = {values[n, i]}")
    return values


def _normal_equations(loss: SALoss) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(fixed, by_variance, right): (fixed + s by_variance) c = right is the system for s.

    The matrices are symmetric and stored by diagonals, [N+1, K]: entry [m, k] is in row m + k and
    column m. Row 0, of the clean image, has no equation.

    Two rows n, m of a window with weights w and noises of covariance R add, for E e_n e_m,
    w_n w_m (c_n c_m (sqrt(a_n a_m) s + sqrt(b_n b_m) R) - (c_n sqrt(b_n) + c_m sqrt(b_m)) R).
    In the square of one row, the input's noise has the variance 1 + gamma^2.
    """
    added = loss.input_perturbation**2
    N = loss.schedule.N
    signal, sigma = np.sqrt(loss.schedule.cum_alphas), np.sqrt(loss.schedule.cum_betas)
    fixed, by_variance = np.zeros((N + 1, loss.K)), np.zeros((N + 1, loss.K))
    fixed[:, 0], by_variance[:, 0] = (1 + added) * sigma**2 / N, signal**2 / N  # L_simple
    right = sigma / N
    for n, m, weight, R in _pairs(loss) if loss.lam > 0 else ():
        np.add.at(right, n, weight * sigma[n] * R)
        lower = n >= m  # the other half is its mirror image
        n, m, weight, R = n[lower], m[lower], weight[lower], R[lower]
        R = R + added * (n == m)
        np.add.at(fixed, (m, n - m), weight * sigma[n] * sigma[m] * R)
        np.add.at(by_variance, (m, n - m), weight * signal[n] * signal[m])
    return fixed, by_variance, right


def _pairs(
    loss: SALoss,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], FloatArray, FloatArray]]:
    """(n, m, weight, R) of all pairs of rows of all windows, in arrays of any equal shape.

    The weight is that of e_n e_m in lambda L_sa, a mean over the windows; R = E eps_n eps_m.
    """
    N, K = loss.schedule.N, loss.K
    tau, coefficients = torch.from_numpy(loss.tau.values.copy()), Coefficients(loss.schedule)
    first = 1 if loss.window == "down" else 1 - K  # the windows' law: anchors uniform on first..N
    count = N + 1 - first
    for r in torch.arange(first, N + 1).split(max(1, _MOST // K**2)):
        # Where a window starts below 1, its own row is any step; it has no weight.
        window = WINDOWS[loss.window](tau, K, r.clamp(min=1), r, None)
        window = window.relative() if loss.tau.relative else window
        # Noises are linear in their draws. Unit draws [K, W, K] therefore show the factors.
        unit = torch.eye(K, dtype=torch.float64)[:, None].expand(K, len(r), K)
        draws = unit[:1] if loss.noise == "shared" else unit
        factors = NOISES[loss.noise](draws, window, coefficients).numpy()
        steps, weights = window.steps.numpy(), window.weights.numpy()
        for p in range(K):
            weight = loss.lam / count * weights[p] * weights
            R = np.einsum("wz,pwz->pw", factors[p], factors)
            yield np.broadcast_to(steps[p], steps.shape), steps, weight, R


def _solve_banded(bands: FloatArray, right: FloatArray) -> FloatArray:
    """c [N, D] with M c = right [N] for D symmetric positive definite matrices M at once.

    ``bands`` [N, K, D] holds their diagonals, M[m+k, m] = bands[m, k], and is overwritten: by the
    factors of M = L diag L^T, column by column.
    """
    N, _, D = bands.shape
    c = np.repeat(right[:, None], D, axis=1)
    for m in range(N):
        column, pivot = bands[m, 1 : N - m].copy(), bands[m, 0]
        factor = column / pivot
        for k in range(len(column)):
            bands[m + 1 + k, : len(column) - k] -= factor[k] * column[k:]
        c[m + 1 : m + 1 + len(column)] -= factor * c[m]
        c[m] /= pivot
        bands[m, 1 : N - m] = factor
    for m in range(N - 1, -1, -1):
        factor = bands[m, 1 : N - m]
        c[m] -= (factor * c[m + 1 : m + 1 + len(factor)]).sum(0)
    return c
