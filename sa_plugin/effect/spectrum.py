r"""The spectrum of a data set: the mean image and the variances along an orthonormal basis.

Two bases. "pca": the eigenvectors of the full covariance, exact, for small images. "dct": the
orthonormal DCT-II of each channel (two small matrices) times the eigenvectors of the colour
covariance, for images of any size. It is the eigenbasis where the covariance is that of a
stationary process which is mirrored at the borders, and near it for photographs. Along a basis that
is not the eigenbasis, ``variances`` are the covariance's diagonal; what lies beside it is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sa_files.arrays import open_npz
from sa_files.reading import reading
from sa_files.writing import written_atomically
from sa_plugin._checks import check_choice, check_images, check_whole
from sa_plugin._tensors import DeviceTables
from sa_plugin.schedule import FloatArray

BASES = ("pca", "dct")
_NUMBERS_IN_A_BLOCK = 2**22  # 32 MiB of float64
_ROUNDING = 1e-6  # of a basis that was stored in float32
_MOST = 2**15  # the largest covariance: 8 GiB


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Mean and variances of images [C, H, W], in units of x_0 in [-1, 1]; D = C H W.

    ``of`` makes one from a data set, ``load`` reads one. To NumPy the arrays are read-only.

    Attributes:
        mean: float64 [C, H, W].
        variances: float64 [D], >= 0, in squared units of x_0: of the coordinate i that
            ``coordinates`` gives. "pca": falling. "dct": as [colour, row, column] frequencies.
        directions: "pca": float64 [D, D], row i is the direction of variance i over a flattened
            image. "dct": float64 [C, C], the rows are the directions of the colours.
        basis: "pca" or "dct".
        count: the number of images. With fewer than D + 1 of them, variances are missing (zero).

    Raises:
        ValueError: an array of another shape, not finite or not real; a negative variance;
            directions that are not orthonormal; ``count`` below 2.
    """

    mean: FloatArray
    variances: FloatArray
    directions: FloatArray
    basis: str
    count: int
    _tables: DeviceTables = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("basis", self.basis, BASES)
        check_whole("count", self.count, 2, 2**63 - 1)
        for name, ndim in (("mean", 3), ("variances", 1), ("directions", 2)):
            array = _finite(name, getattr(self, name), ndim)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        _check_fit(self.mean, self.variances, self.directions, self.basis)
        object.__setattr__(self, "_tables", DeviceTables(**self._matrices()))

    @classmethod
    def of(cls, batches: Iterable[Tensor | ArrayLike], *, most: int = 4096) -> Spectrum:
        """The spectrum of images that are streamed once; their number is not needed before.

        The result does not depend on the cut into batches, to the last bit. "pca" needs about
        40 D^2 bytes (0.7 GB at D = 4096), "dct" about 8 C D.

        Args:
            batches: images [B, C, H, W], B may differ: uint8 (x / 127.5 - 1 is taken) or floating
                point in [-1, 1].
            most: the largest D for which the full covariance is taken; "dct" beyond it.

        Raises:
            ValueError: fewer than two images, another dtype, images of different shapes, values
                that are not finite.
        """
        check_whole("most", most, 0, _MOST)
        moments: _Moments | None = None
        for block in _blocks(batches):
            if moments is None:
                full = block[0].size <= most
                moments = _Moments(_covariance if full else _dct_covariance(*block.shape[2:]))
            moments.add(block)
        if moments is None or moments.count < 2:
            raise ValueError("batches must hold at least 2 images in all, got fewer")
        mean, covariance = moments.finish()
        if not np.isfinite(covariance).all():
            raise ValueError("batches must hold finite images, got values that are not")
        if covariance.ndim == 2:
            variances, directions = _eigenbasis(covariance)
            return cls(mean, variances, directions, "pca", moments.count)
        _, colours = _eigenbasis(covariance.mean(axis=0))
        variances = np.einsum("kc,fcd,kd->kf", colours, covariance, colours).reshape(-1)
        return cls(mean, np.maximum(variances, 0), colours, "dct", moments.count)

    @property
    def shape(self) -> tuple[int, ...]:
        """An image's shape, (C, H, W)."""
        return self.mean.shape

    def apply(self, x: Tensor, factors: Tensor | ArrayLike) -> Tensor:
        """Images whose coordinates are those of ``x`` times ``factors``; the mean is not removed.

        Args:
            x: [B, C, H, W], of any floating-point type and device. float64 is computed in float64,
                anything else in float32, also within autocast.
            factors: [D], or [B, D] for factors by image.

        Returns:
            [B, C, H, W] in x's dtype.

        Raises:
            ValueError: images of another shape, or factors of another number.
        """
        self.check(x)
        factors = _tensor(factors).to(x.device)
        if tuple(factors.shape) not in ((self.variances.size,), (len(x), self.variances.size)):
            raise ValueError(
                f"factors must be [D] or [B, D] with D = {self.variances.size}, got "
                f"{tuple(factors.shape)}"
            )
        coordinates = self.coordinates(x)
        return self.from_coordinates(coordinates * factors.to(coordinates)).to(x.dtype)

    def coordinates(self, x: Tensor) -> Tensor:
        """The coordinates [B, D] of x [B, C, H, W]; float64 of float64, else float32."""
        self.check(x)
        x = x.to(_computed_in(x))
        with _without_autocast(x):
            if self.basis == "pca":
                return x.flatten(1) @ self._tables.get("directions", x).T
            return _along_each_axis(x, [m.T for m in self._along(x)]).flatten(1)

    def from_coordinates(self, coordinates: Tensor) -> Tensor:
        """The images [B, C, H, W] that have these coordinates [B, D]."""
        z = coordinates.to(_computed_in(coordinates))
        with _without_autocast(z):
            if self.basis == "pca":
                return (z @ self._tables.get("directions", z)).unflatten(1, self.shape)
            return _along_each_axis(z.unflatten(1, self.shape), self._along(z))

    def check(self, x: Tensor) -> None:
        """ValueError unless ``x`` is floating point, [B, C, H, W] of the spectrum's shape."""
        if tuple(x.shape[1:]) != self.shape or not x.is_floating_point():
            raise ValueError(
                f"x must be floating-point images [B, {', '.join(map(str, self.shape))}], as the "
                f"spectrum's, got {x.dtype} {tuple(x.shape)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz``; no reader ever sees a half-written file."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {path}")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        with written_atomically(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read a file of ``save``; nothing is unpickled.

        Raises:
            ValueError: no such file, or a file that is damaged or holds no spectrum.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no spectrum at {path}")
        with reading(path, "holds no spectrum") as file, open_npz(file) as arrays:
            arrays.check_names(_NAMES)
            found = {name: arrays[name] for name in _NAMES}
            basis, count = found.pop("basis"), found.pop("count")
            if basis.shape or count.shape or count.dtype.kind not in "iu":
                raise ValueError("its basis must be a word and its count a whole number")
            return cls(**found, basis=str(basis), count=int(count))

    def _along(self, like: Tensor) -> list[Tensor]:
        return [self._tables.get(name, like) for name in ("columns", "rows", "directions")]

    def _matrices(self) -> dict[str, FloatArray]:
        if self.basis == "pca":
            return {"directions": self.directions}
        rows, columns = (dct_matrix(size) for size in self.shape[1:])
        return {"directions": self.directions, "rows": rows, "columns": columns}


_NAMES = ("mean", "variances", "directions", "basis", "count")


def dct_matrix(size: int) -> FloatArray:
    """The orthonormal DCT-II [size, size]: row k is the wave of frequency k."""
    k, i = np.arange(size)[:, None], np.arange(size)
    waves = np.sqrt(2 / size) * np.cos(np.pi * (i + 0.5) * k / size)
    waves[0] /= np.sqrt(2)
    return waves


def _along_each_axis(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """[B, C, H, W] times a matrix along W, then H, then C.

    The axis that was multiplied goes to the front, so each product is one large one: a matrix on
    the left would make B C small ones. A grey image's colours need no product of matrices.
    """
    for matrix in matrices:
        x = (x * matrix if len(matrix) == 1 else x @ matrix).movedim(-1, 1)
    return x


class _Moments:
    """Streaming mean and covariance in float64; ``product`` makes sums of squares of rows.

    The first block's mean is taken from all rows: a mean much larger than the standard deviation
    costs no digits.
    """

    def __init__(self, product: Callable[[FloatArray], FloatArray]) -> None:
        self.count = 0
        self._product = product
        self._origin: FloatArray = np.zeros(())
        self._total: FloatArray = np.zeros(())
        self._squares: FloatArray = np.zeros(())

    def add(self, rows: FloatArray) -> None:
        if self.count == 0:
            self._origin = rows.mean(axis=0)
        rows = rows - self._origin
        squares = self._product(rows)
        if self.count:
            squares += self._squares
        self._squares = squares
        self._total = self._total + rows.sum(axis=0)
        self.count += len(rows)

    def finish(self) -> tuple[FloatArray, FloatArray]:
        """The mean, and the covariance divided by ``count - 1``."""
        covariance = self._squares
        covariance -= self._product(self._total[None]) / self.count
        covariance /= self.count - 1
        return self._origin + self._total / self.count, covariance


def _covariance(rows: FloatArray) -> FloatArray:
    """[D, D]."""
    flat = rows.reshape(len(rows), -1)
    return flat.T @ flat  # in this form NumPy computes one triangle only


def _dct_covariance(height: int, width: int) -> Callable[[FloatArray], FloatArray]:
    """Rows [n, C, H, W] -> [H W, C, C]: the colours' sums of squares at each frequency."""
    waves = [torch.from_numpy(dct_matrix(size)).T for size in (width, height)]

    def product(rows: FloatArray) -> FloatArray:
        # PyTorch multiplies stacks of small matrices at several times NumPy's speed.
        spread = _along_each_axis(torch.from_numpy(rows), waves).movedim(-1, 1)
        colours = spread.flatten(2).contiguous().numpy()
        return np.einsum("ncf,ndf->fcd", colours, colours)

    return product


def _eigenbasis(covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues in falling order and eigenvectors as rows.

    Eigenvalues within float64's error of ``eigh``, also negative ones, are set to 0: the bound is
    that of NumPy's ``matrix_rank``.
    """
    values, vectors = np.linalg.eigh(covariance)
    tolerance = values[-1] * len(values) * np.finfo(np.float64).eps
    values = np.where(values > tolerance, values, 0.0)
    return values[::-1], np.ascontiguousarray(vectors.T[::-1])


def _blocks(batches: Iterable[Tensor | ArrayLike]) -> Iterator[FloatArray]:
    """The images in blocks of one size whatever the batches; a block is overwritten by the next.

    Sums over equal blocks are equal to the last bit.
    """
    block: FloatArray | None = None
    filled, seen = 0, False
    for batch in batches:
        images, seen = _in_units(batch, seen)
        if block is None:
            block = np.empty((max(16, _NUMBERS_IN_A_BLOCK // images[0].size), *images.shape[1:]))
        if images.shape[1:] != block.shape[1:]:
            raise ValueError(
                f"batches must hold images of one shape, got {block.shape[1:]} and "
                f"{images.shape[1:]}"
            )
        while len(images):
            part = images[: len(block) - filled]
            block[filled : filled + len(part)] = part
            filled, images = filled + len(part), images[len(part) :]
            if filled == len(block):
                yield block
                filled = 0
    if block is not None and filled:
        yield block[:filled]


def _in_units(batch: Tensor | ArrayLike, seen: bool) -> tuple[FloatArray, bool]:
    """Images [B, C, H, W] as float64 in [-1, 1]; whether values of floats have been looked at."""
    images = _tensor(batch)
    known = images.dtype == torch.uint8 or images.is_floating_point()
    if images.ndim != 4 or images.numel() == 0 or not known:
        raise ValueError(
            "batches must hold images [B, C, H, W], uint8 or floating point, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.cpu().numpy() / 127.5 - 1, seen
    seen = check_images(images, seen, wait=True)
    return images.detach().cpu().double().numpy(), seen


def _tensor(values: Tensor | ArrayLike) -> Tensor:
    if isinstance(values, Tensor):
        return values
    # A read-only array is copied: PyTorch warns of memory that it must not write to.
    return torch.from_numpy(np.require(values, requirements="W"))


def _finite(name: str, value: ArrayLike, ndim: int) -> FloatArray:
    """``value`` as a new float64 array of ``ndim`` dimensions, or ValueError."""
    array: NDArray[Any] = np.asarray(value)
    if array.ndim != ndim or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} must be real, of {ndim} dimension(s), got {array.dtype} {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got entries that are not")
    return array.astype(np.float64)


def _check_fit(mean: FloatArray, variances: FloatArray, directions: FloatArray, basis: str) -> None:
    """ValueError unless the arrays belong to one spectrum."""
    size = mean.size
    side = size if basis == "pca" else len(mean)
    if size == 0 or variances.shape != (size,) or directions.shape != (side, side):
        raise ValueError(
            f"a mean of shape {mean.shape} needs variances ({size},) and, in basis {basis!r}, "
            f"directions ({side}, {side}), got {variances.shape} and {directions.shape}"
        )
    if (variances < 0).any():
        raise ValueError(f"variances must be >= 0, the smallest is {variances.min():.3g}")
    # One random vector there and back: D^2 operations, where all products would take D^3.
    probe = np.random.RandomState(0).standard_normal(side)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(directions.T @ (directions @ probe) - probe).max()
    if not error < _ROUNDING * np.sqrt(side) * np.abs(probe).max():
        raise ValueError(f"directions must be orthonormal, a vector comes back {error:.3g} away")


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within autocast the products would be rounded to bfloat16."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
