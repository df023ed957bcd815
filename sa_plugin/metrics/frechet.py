"""The Fréchet distance between two Gaussians. Its usual name depends on the features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sa_plugin.metrics._arrays import Array, as_float64

# Asymmetry and negative eigenvalues up to this share of the largest entry or eigenvalue count as
# rounding. This is enough for statistics that were stored in float32.
_RELATIVE_TOLERANCE = 1e-6


def frechet_distance(
    mu1: torch.Tensor | npt.ArrayLike,
    sigma1: torch.Tensor | npt.ArrayLike,
    mu2: torch.Tensor | npt.ArrayLike,
    sigma2: torch.Tensor | npt.ArrayLike,
) -> float:
    """Squared 2-Wasserstein distance of N(mu1, sigma1) and N(mu2, sigma2).

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    (Dowson & Landau 1982; Heusel et al. 2017, eq. 6), in float64. With sigma_i = L_i L_i^T from a
    symmetric eigendecomposition, the last trace is the sum of the singular values of L1^T L2. These
    are the roots of the eigenvalues of sigma1^(1/2) sigma2 sigma1^(1/2), found without squaring.
    Thus singular covariances lose no digits and no value is complex.

    ``mu``: [D]. ``sigma``: [D, D], symmetric and positive semi-definite. The result is at least 0.
    """
    mu1, sigma1 = _gaussian("1", mu1, sigma1)
    mu2, sigma2 = _gaussian("2", mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 and mu2 must have one shape, got {mu1.shape} and {mu2.shape}")
    factor1, factor2 = _factor("sigma1", sigma1), _factor("sigma2", sigma2)
    overlap = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    # The true value is never negative; a negative result is rounding.
    return max(float(distance), 0.0)


def _gaussian(
    which: str, mu: torch.Tensor | npt.ArrayLike, sigma: torch.Tensor | npt.ArrayLike
) -> tuple[Array, Array]:
    """One mean and covariance, checked; the covariance is made exactly symmetric."""
    mean = as_float64(f"mu{which}", mu, ndim=1)
    cov = as_float64(f"sigma{which}", sigma, ndim=2)
    dim = len(mean)
    if dim == 0:
        raise ValueError(f"mu{which} must not be empty")
    if cov.shape != (dim, dim):
        raise ValueError(f"sigma{which} must have shape ({dim}, {dim}), got {cov.shape}")
    asymmetry = np.abs(cov - cov.T).max()
    if asymmetry > _RELATIVE_TOLERANCE * np.abs(cov).max():
        raise ValueError(
            f"sigma{which} must be symmetric, its entries differ from the transpose's by up to "
            f"{asymmetry:.3g}"
        )
    return mean, (cov + cov.T) / 2


def _factor(name: str, sigma: Array) -> Array:
    """L with L L^T = ``sigma``: [D, rank], one column for each eigenvalue above rounding."""
    values, vectors = np.linalg.eigh(sigma)
    scale = np.abs(values).max()
    if values[0] < -_RELATIVE_TOLERANCE * scale:
        raise ValueError(
            f"{name} must be positive semi-definite, its eigenvalues run from {values[0]:.3g} to "
            f"{values[-1]:.3g}"
        )
    # eigh resolves eigenvalues to about eps * scale; the root of a smaller one is noise of 1e-8.
    kept = values > len(values) * np.finfo(np.float64).eps * scale
    return vectors[:, kept] * np.sqrt(values[kept])
