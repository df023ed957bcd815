r"""Covariances of x_0 given x_t, and the variances of the reverse step: pure functions.

Every function takes Python floats or arrays of one library (NumPy, torch, JAX), which broadcast
against each other. No function knows a network or a device, so the sampler, the likelihood and any
scheduler use the same formulas.

The reverse step from t to s < t has the mean weights and the variance of the non-Markovian family
of arXiv 2010.02502: q(x_s | x_t, x_0) has variance lambda2, which is tilde_beta(s, t) for DDPM and
eta^2 tilde_beta(s, t) for DDIM. The variance that is optimal for a given covariance adds a term,
because x_0 is not known exactly (arXiv 2201.06503, Theorem 1)::

    sigma^2 = lambda2 + weight * Cov[x_0 | x_t]

The methods differ only in the estimate of Cov[x_0 | x_t]; ``small``, ``big`` and ``iddpm`` have
none. All but ``lanczos`` estimate its diagonal.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sa_plugin._arrays import Numeric, bound
from sa_plugin._checks import check_choice, check_non_negative, table_by_step

FORWARDS = ("ddpm", "ddim")
COVARIANCES = ("analytic", "npr", "sn", "heuristic", "ocm", "probes")
VARIANCES = ("small", "big", "iddpm", *COVARIANCES, "lanczos")
DERIVED = ("probes", "lanczos")  # from the network's derivative
FAR_ABOVE_1 = 1.4  # Gamma beyond this: not an estimate's error any more
NEEDS_SECOND = ("npr", "sn", "iddpm", "ocm")


def check_variance(variance: str, forward: str, eta: float) -> None:
    """ValueError unless the three options exist and fit together."""
    check_choice("forward", forward, FORWARDS)
    check_choice("variance", variance, VARIANCES)
    check_non_negative("eta", eta)
    if eta > 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
    if forward == "ddpm" and eta != 0:
        raise ValueError(f"eta belongs to forward 'ddim'; with 'ddpm' it must be 0, got {eta!r}")
    if forward == "ddim" and variance in ("big", "iddpm"):
        allowed = tuple(v for v in VARIANCES if v not in ("big", "iddpm"))
        raise ValueError(
            f"variance {variance!r} is defined for forward 'ddpm' only; "
            f"with 'ddim' use one of {allowed}"
        )


def check_gamma(gamma: ArrayLike, N: int) -> NDArray[np.float64]:
    """Gamma_n = E mean(eps_pred^2) as float64 [N+1] (entry 0 unused), or ValueError.

    One warning for values far above 1, which no network has that learned anything.
    """
    values = table_by_step("gamma", gamma, N)
    n = int(np.argmax(values[1:])) + 1
    if values[n] > FAR_ABOVE_1:
        warnings.warn(
            f"gamma[{n}] = {values[n]:.4g}: a trained network's is at most about 1, and above 1 "
            "the covariance is taken as 0; is it Gamma of this network and schedule?",
            stacklevel=3,
        )
    return values


def covariance_analytic(gamma: Numeric, cum_alpha: Numeric, cum_beta: Numeric) -> Numeric:
    """cum_beta / cum_alpha (1 - Gamma): one number per step (arXiv 2201.06503, Theorem 1)."""
    return cum_beta / cum_alpha * (1 - gamma)


def covariance_npr(second: Numeric, cum_alpha: Numeric, cum_beta: Numeric) -> Numeric:
    """cum_beta / cum_alpha E[(eps - eps_pred)^2 | x]: NPR-DPM (arXiv 2206.07309)."""
    return cum_beta / cum_alpha * second


def covariance_sn(eps: Numeric, second: Numeric, cum_alpha: Numeric, cum_beta: Numeric) -> Numeric:
    """cum_beta / cum_alpha (E[eps^2 | x] - eps_pred^2): SN-DPM (arXiv 2206.07309)."""
    return cum_beta / cum_alpha * (second - eps**2)


def covariance_ocm(second: Numeric, cum_alpha: Numeric, cum_beta: Numeric) -> Numeric:
    """cum_beta / cum_alpha diag(I - sqrt(cum_beta) d eps_pred / d x): OCM (arXiv 2406.10808).

    ``second`` is this diagonal, learned ("ocm") or estimated from the derivative ("probes").
    """
    return cum_beta / cum_alpha * second


def covariance_heuristic(eps: Numeric, cum_alpha: Numeric, cum_beta: Numeric) -> Numeric:
    """cum_beta / cum_alpha (1 - eps_pred^2): SN with E[eps^2 | x] set to its mean over x, 1."""
    return cum_beta / cum_alpha * (1 - eps**2)


def covariance(
    method: str,
    cum_alpha: Numeric,
    cum_beta: Numeric,
    *,
    eps: Numeric | None = None,
    second: Numeric | None = None,
    gamma: Numeric | None = None,
    average: bool = False,
    clip: float = False,
) -> Numeric:
    """Diagonal of Cov[x_0 | x_t] by ``method``, one of COVARIANCES, in squared units of x_0.

    Args:
        cum_alpha, cum_beta: of step t.
        eps: predicted noise [B, ...], for "sn" and "heuristic".
        second: the network's second output [B, ...], for "npr", "sn" and "ocm"; for "probes" the
            estimate of what "ocm" learns.
        gamma: Gamma_t, for "analytic".
        average: take the mean over each image's dimensions, before any clipping: a mean of clipped
            estimates would be biased. There is no mean over the batch, so an image does not depend
            on its neighbours.
        clip: r bounds it by r^2, which no variance of data in [-r, r] exceeds; True is 1. The
            lower bound is always 0.

    Raises:
        ValueError: unknown method, or its argument is missing.
    """
    if method == "analytic":
        result = covariance_analytic(_required("gamma", gamma, method), cum_alpha, cum_beta)
    elif method == "npr":
        result = covariance_npr(_required("second", second, method), cum_alpha, cum_beta)
    elif method == "sn":
        eps, second = _required("eps", eps, method), _required("second", second, method)
        result = covariance_sn(eps, second, cum_alpha, cum_beta)
    elif method in ("ocm", "probes"):
        result = covariance_ocm(_required("second", second, method), cum_alpha, cum_beta)
    elif method == "heuristic":
        result = covariance_heuristic(_required("eps", eps, method), cum_alpha, cum_beta)
    else:
        raise ValueError(f"method must be one of {COVARIANCES}, got {method!r}")
    if average and np.ndim(result) > 1:
        result = result.mean(tuple(range(1, result.ndim)), keepdims=True)
    return bound(result, 0.0, float(clip) ** 2 if clip else math.inf)


def forward_variance(tilde_beta: Numeric, forward: str, eta: float = 0.0) -> Numeric:
    """lambda2, the variance of q(x_s | x_t, x_0); also the ``small`` reverse variance.

    tilde_beta(s, t) for DDPM (arXiv 2006.11239, eq. 7), eta^2 times it for DDIM
    (arXiv 2010.02502, eq. 16).
    """
    return tilde_beta if forward == "ddpm" else eta**2 * tilde_beta


def covariance_weight_ddpm(
    cum_alpha_s: Numeric, cum_beta_t: Numeric, skip_beta: Numeric
) -> Numeric:
    """The factor of Cov[x_0 | x_t] in DDPM's reverse variance: the squared weight of x_0."""
    return cum_alpha_s * (skip_beta / cum_beta_t) ** 2


def covariance_weight_ddim(
    cum_alpha_s: Numeric,
    cum_alpha_t: Numeric,
    cum_beta_s: Numeric,
    cum_beta_t: Numeric,
    lambda2: Numeric,
) -> Numeric:
    """The same factor for any lambda2 of the family; at lambda2 = tilde_beta it is DDPM's.

    x_0 enters the mean twice: directly, and through eps = (x_t - sqrt(cum_alpha_t) x_0) /
    sqrt(cum_beta_t) with weight sqrt(cum_beta_s - lambda2).
    """
    through_eps = (bound(cum_beta_s - lambda2, 0.0) * cum_alpha_t / cum_beta_t) ** 0.5
    return (cum_alpha_s**0.5 - through_eps) ** 2


def optimal_variance(cov: Numeric, lambda2: Numeric, weight: Numeric) -> Numeric:
    """sigma^2 = lambda2 + weight Cov[x_0 | x_t] (arXiv 2201.06503, Theorem 1)."""
    return lambda2 + weight * cov


def iddpm_variance(second: Numeric, small: Numeric, big: Numeric) -> Numeric:
    """The learned range of arXiv 2102.09672, eq. 15: log-linear between ``small`` and ``big``.

    sigma^2 = exp(v log big + (1 - v) log small), v = (second + 1) / 2. As in the paper, v is not
    clipped: the network may leave the range.

    At s = 0, ``small`` = tilde_beta is 0 and eq. 15 has no value. The result is then 0, the limit
    for v < 1; the sampler adds no noise at that step. A likelihood needs a density there and passes
    a positive ``small``, the tilde_beta of the step before.
    """
    ratio = small / big
    is_zero = ratio == 0
    # A zero becomes one before the power and zero again after it: 0 ** negative is not a number.
    return big * (ratio + is_zero) ** ((1 - second) / 2) * (1 - is_zero * 1.0)


def pixel_variance_limit(clip_pixel: float) -> float:
    """The variance of noise that moves a value by ``clip_pixel`` of 255 grey levels on average.

    E|N(0, sigma^2)| = sigma sqrt(2/pi), and one level is 2/255 in [-1, 1] (arXiv 2201.06503,
    appendix F).
    """
    return (clip_pixel * 2 / 255) ** 2 * math.pi / 2


def _required(name: str, value: Numeric | None, method: str) -> Numeric:
    if value is None:
        raise ValueError(f"covariance {method!r} needs {name}, got None")
    return value
