"""KID, precision and recall, from the features themselves, by torch-fidelity.

torch-fidelity is the only maintained library that computes them from plain features of any network,
so no image passes through the network twice. The tests compare the Inception Score with it, too.
KID, precision and recall cost more than a Fréchet distance and need all features in memory.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy.typing as npt
import torch
from torch import Tensor

from sa_plugin.metrics._arrays import as_float64

_ROWS_AT_ONCE = 1000  # of a matrix of distances: 400 MB in float64 for 50,000 columns


def kernel_distance(
    features1: Tensor | npt.ArrayLike,
    features2: Tensor | npt.ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x . y / D + 1)^3: its mean and std over the subsets.

    On Inception's features this is KID (Binkowski et al. 2018, section 4). ``features``: [N, D].
    Each subset has ``subset_size`` rows of both sets, chosen without replacement. The mean may be
    negative.
    """
    x, y = _pair(features1, features2)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size must be between 2 and the number of rows {min(len(x), len(y))}, "
            f"got {subset_size}"
        )
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": seed}
    found = _library("metric_kid").kid_features_to_metric(x, y, verbose=False, **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(
    generated: Tensor | npt.ArrayLike, real: Tensor | npt.ArrayLike, *, neighbours: int = 3
) -> tuple[float, float]:
    """Shares of the generated rows near real rows, and of the real rows near generated rows.

    A row is near another row if their distance is at most the other row's distance to its
    ``neighbours``-th neighbour in its own set (Kynkäänniemi et al. 2019, section 2).
    ``generated``, ``real``: features [N, D].
    """
    x, y = _pair(generated, real)
    if not 1 <= neighbours < min(len(x), len(y)):
        raise ValueError(
            f"neighbours must be between 1 and the number of rows less one, "
            f"{min(len(x), len(y)) - 1}, got {neighbours}"
        )
    found = _library("metric_prc").prc_features_to_metric(
        x,
        y,
        prc_neighborhood=neighbours,
        prc_batch_size=_ROWS_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def _pair(one: Tensor | npt.ArrayLike, two: Tensor | npt.ArrayLike) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(as_float64("features of the first set", one, ndim=2))
    y = torch.from_numpy(as_float64("features of the second set", two, ndim=2))
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(f"features must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    return x, y


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise ImportError(
            "KID, precision and recall need the package torch-fidelity, which comes with the extra "
            f"[metrics]: pip install 'sa-plugin[metrics]' ({error})"
        ) from error
