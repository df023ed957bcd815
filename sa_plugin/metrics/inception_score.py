"""The Inception Score of a classifier's logits. Its usual name depends on the classifier."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from sa_plugin.metrics._arrays import Array, as_float64


def inception_score(
    logits: torch.Tensor | npt.ArrayLike, splits: int = 10, *, permutation_seed: int | None = 2020
) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), its mean and population standard deviation over the splits.

    Salimans et al. (2016), section 4, with torch-fidelity's conventions, so the same logits give
    the same number: NumPy's RandomState(2020) permutes the rows, split i has the rows
    i N // splits to (i + 1) N // splits, p(y) is estimated within a split, and all is float64.

    ``logits``: [N, classes], before the softmax. ``permutation_seed``: None keeps the rows' order.
    """
    rows = as_float64("logits", logits, ndim=2)
    count = len(rows)
    if rows.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {rows.shape}")
    if not 1 <= splits <= count:
        raise ValueError(f"splits must be between 1 and the number of rows {count}, got {splits}")
    if permutation_seed is not None:
        rows = rows[np.random.RandomState(permutation_seed).permutation(count)]
    log_p = rows - _logsumexp(rows, axis=1)
    bounds = [i * count // splits for i in range(splits + 1)]
    scores = [_score(log_p[lo:hi]) for lo, hi in pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(log_p: Array) -> float:
    """The score of one split from its log-probabilities [n, classes]."""
    # log p instead of p: a class to which no row gives weight then adds 0 and not 0 * inf.
    log_marginal = _logsumexp(log_p, axis=0) - np.log(len(log_p))
    divergence = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
    return float(np.exp(divergence.mean()))


def _logsumexp(x: Array, axis: int) -> Array:
    """log(sum(exp(x))) along ``axis``, which is kept with length 1."""
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))
