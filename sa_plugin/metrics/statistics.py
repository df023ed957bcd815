"""Reference statistics: the mean and covariance of features, in pytorch-fid's npz files."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sa_files.arrays import Arrays, open_npz
from sa_files.reading import UnreadableFile, reading
from sa_files.writing import written_atomically
from sa_plugin.metrics._arrays import Array, as_float64
from sa_plugin.metrics.moments import Moments

_CONVERT = (
    "np.savez('NEW.npz', mu=d['mu'], sigma=d['sigma']) after d = np.load('FILE', "
    "allow_pickle=True) (and d = d.item() for an .npy), if its source is trusted"
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mu`` [D] and ``sigma`` [D, D] of features, as ``frechet_distance`` takes them.

    ``count``: the number of images. ``features``: the name of the feature space. Both are None if a
    file does not hold them; pytorch-fid's files do not.
    """

    mu: Array
    sigma: Array
    count: int | None = None
    features: str | None = None

    @classmethod
    def of(cls, moments: Moments, features: str) -> Statistics:
        """The statistics of ``moments`` in the feature space called ``features``."""
        return cls(moments.mu, moments.sigma, moments.count, features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``mu`` and ``sigma``, and ``count`` and ``features``, which pytorch-fid ignores.

        No reader ever sees a half-written file.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {path}")
        arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        if self.features is not None:
            arrays["features"] = np.array(self.features)
        with written_atomically(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, features: str | None = None, dim: int | None = None
    ) -> Statistics:
        """Read a file of ``save``, of pytorch-fid or of the hosts; nothing is unpickled.

        ``features``, ``dim``: the required feature space and dimension. ValueError, naming the
        file, if the statistics have others or are not finite.
        """
        path = Path(path)
        if not path.is_file():
            raise UnreadableFile(f"statistics must be an .npz file, but there is none at {path}")
        with reading(path, "cannot be used as statistics") as file:
            found = cls._read(file)
        if features is not None and found.features not in (None, features):
            raise UnreadableFile(
                f"{path} holds statistics of the features {found.features!r}, must hold those of "
                f"{features!r}"
            )
        if dim is not None and len(found.mu) != dim:
            raise UnreadableFile(
                f"{path} holds statistics of dimension {len(found.mu)}, the features have {dim}"
            )
        return found

    @classmethod
    def _read(cls, file: BinaryIO) -> Statistics:
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"it is not an npz file; a pickled .npy is never read: convert it by {_CONVERT}"
            )
        with open_npz(file) as arrays:
            if not {"mu", "sigma"} <= set(arrays.names):
                raise ValueError(f"it holds {list(arrays.names)}, must hold 'mu' and 'sigma'")
            mu, sigma = (as_float64(n, _plain(arrays, n), d) for n, d in (("mu", 1), ("sigma", 2)))
            count = int(_plain(arrays, "count")) if "count" in arrays else None
            features = str(_plain(arrays, "features")) if "features" in arrays else None
        if sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"its mu has shape {mu.shape}, its sigma {sigma.shape}")
        return cls(mu, sigma, count, features)


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an npz file with ``mu`` and ``sigma``; the arrays are not read."""
    try:
        with reading(path, "cannot be used as statistics") as file, open_npz(file) as arrays:
            return {"mu", "sigma"} <= set(arrays.names)
    except ValueError:
        return False


def _plain(arrays: Arrays, name: str) -> npt.NDArray[np.generic]:
    try:
        return arrays[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            f"its {name!r} is pickled, which is never read: convert it by {_CONVERT}"
        ) from error
