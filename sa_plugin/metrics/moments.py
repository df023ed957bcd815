"""Mean and covariance of features that arrive in batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from sa_plugin.metrics._arrays import Array, as_float64

MOST_FEATURES = 2**14


class Moments:
    """Streaming mean and covariance in float64.

    The first sample is subtracted from all features, and each batch is centred on its own mean
    before it is squared. Thus a mean much larger than the standard deviation costs no digits.
    Batches are joined by the pairwise update of Chan, Golub & LeVeque (1983). Up to rounding, the
    result does not depend on the cut into batches.
    """

    def __init__(self) -> None:
        self._count = 0
        self._origin: Array = np.zeros(0)  # the first sample, [D]
        self._offset: Array = np.zeros(0)  # mu - origin, [D]
        self._scatter: Array = np.zeros((0, 0))  # sum of (x - mu)(x - mu)^T, [D, D]
        self._warned_at = 0  # the count for which sigma has warned of too few samples

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.ArrayLike]) -> Moments:
        """The moments that gave these ``arrays()``."""
        count, made = int(np.asarray(arrays["count"])), cls()
        if count < 1:
            return made
        origin = as_float64("origin", arrays["origin"], ndim=1)
        offset = as_float64("offset", arrays["offset"], ndim=1)
        scatter = as_float64("scatter", arrays["scatter"], ndim=2)
        dim = len(origin)
        if offset.shape != (dim,) or scatter.shape != (dim, dim):
            raise ValueError(
                f"arrays must be of one dimension, got origin {origin.shape}, offset "
                f"{offset.shape}, scatter {scatter.shape}"
            )
        made._count, made._origin, made._offset, made._scatter = count, origin, offset, scatter
        return made

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The complete state, to be stored and merged elsewhere without loss."""
        return {
            "count": np.array(self._count),
            "origin": self._origin,
            "offset": self._offset,
            "scatter": self._scatter,
        }

    def update(self, features: torch.Tensor | npt.ArrayLike) -> None:
        """Add a batch of features [B, D]; B may differ between calls and may be 0."""
        batch = as_float64("features", features, ndim=2)
        self._require_dim("features", batch.shape[1])
        if len(batch) == 0:
            return
        if self._count == 0:
            self._origin = batch[0].copy()
        centred = batch - self._origin
        offset = centred.mean(axis=0)
        centred -= offset
        self._join(len(batch), offset, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the samples of another instance; ``other`` is not changed."""
        if not isinstance(other, Moments):
            raise ValueError(f"other must be a Moments, got {type(other).__name__}")
        if other._count == 0:
            return
        self._require_dim("other", len(other._origin))
        if self._count == 0:
            self._origin = other._origin
        self._join(other._count, other._offset + (other._origin - self._origin), other._scatter)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the samples of the other processes of ``group``; all of them must call it.

        Afterwards every process holds the moments of all samples, equal to the last bit. There is
        no approximation: scatters are moved to the common mean in float64. A process may have no
        samples. ValueError in every process if their features differ in dimension.
        """
        sizes = torch.zeros(dist.get_world_size(group), 2, dtype=torch.int64)
        rank = dist.get_rank(group)
        sizes[rank] = torch.tensor([self._count, len(self._origin)])
        sizes = _summed(sizes, group)
        seen = [i for i, (count, _) in enumerate(sizes.tolist()) if count]
        dims = {int(sizes[i, 1]) for i in seen}
        if len(dims) > 1:
            raise ValueError(f"features must have one dimension in all processes, got {dims}")
        if not seen:
            return
        total, dim = int(sizes[:, 0].sum()), dims.pop()
        origin = np.zeros(dim)
        if rank == seen[0]:
            origin += self._origin
        origin = _summed(torch.from_numpy(origin), group).numpy()
        offset, scatter = np.zeros(dim), np.zeros((dim, dim))
        if self._count:
            offset, scatter = self._offset + (self._origin - origin), self._scatter
        weighted = torch.from_numpy(offset * self._count)
        mean = _summed(weighted, group).numpy() / total
        between = np.outer(offset - mean, offset - mean) * self._count
        self._scatter = _summed(torch.from_numpy(scatter + between), group).numpy()
        self._count, self._origin, self._offset = total, origin, mean

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._count

    @property
    def mu(self) -> Array:
        """Mean [D]."""
        self._require_samples(1)
        return self._origin + self._offset

    @property
    def sigma(self) -> Array:
        """Covariance [D, D], divided by ``count - 1`` (as ``np.cov`` and pytorch-fid).

        The first access warns once if there are too few samples for full rank.
        """
        self._require_samples(2)
        dim = len(self._origin)
        if self._count < dim + 1 and self._warned_at != self._count:
            self._warned_at = self._count
            warnings.warn(
                f"{self._count} samples of dimension {dim}: the covariance is singular (it needs "
                f"{dim + 1} samples) and distances between singular covariances are biased upwards",
                UserWarning,
                stacklevel=2,
            )
        return self._scatter / (self._count - 1)

    def _join(self, count: int, offset: Array, scatter: Array) -> None:
        """Add ``count`` samples with mean ``origin + offset`` and this scatter about it."""
        if self._count == 0:
            self._count, self._offset, self._scatter = count, offset, scatter
            return
        total = self._count + count
        delta = offset - self._offset
        # Make new arrays and change none in place: they may belong to another instance.
        between = np.outer(delta, delta) * (self._count * count / total)
        self._scatter = self._scatter + scatter + between
        self._offset = self._offset + delta * (count / total)
        self._count = total

    def _require_dim(self, name: str, dim: int) -> None:
        if dim == 0:
            raise ValueError(f"{name} must have at least one feature, got dimension 0")
        if dim > MOST_FEATURES:
            raise ValueError(
                f"{name} must have at most {MOST_FEATURES} features, whose covariance takes 2 GiB, "
                f"got dimension {dim}: compare smaller images, or other features than pixels"
            )
        if self._count and dim != len(self._origin):
            raise ValueError(f"{name} must have dimension {len(self._origin)} as before, got {dim}")

    def _require_samples(self, minimum: int) -> None:
        if self._count < minimum:
            raise ValueError(f"needs at least {minimum} sample(s), got {self._count}")


def _summed(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over the processes, on the CPU; NCCL can only sum on the process's own GPU."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    moved = value.to(device, copy=True)
    dist.all_reduce(moved, group=group)
    return moved.cpu()
