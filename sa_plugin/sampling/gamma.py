r"""Gamma_n = E mean(eps_pred(x_n, n)^2): the one number per step that Analytic-DPM needs.

The mean is over an image's dimensions. The optimal isotropic covariance is then
Cov[x_0 | x_n] = cum_beta_n / cum_alpha_n (1 - Gamma_n) (arXiv 2201.06503, Theorem 1 and eq. 8).

The estimate streams: images come in batches and pass through every step 1..N. Only a count, a mean
and a sum of squared deviations per step are kept. The last two are float64 on the images' device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from sa_files.arrays import open_npz
from sa_files.pickled import ARRAYS, PickledArray
from sa_files.reading import UnreadableFile, reading
from sa_files.tensors import entries_once, load_tensors
from sa_files.writing import written_atomically
from sa_plugin._checks import (
    check_choice,
    check_finite,
    check_non_negative,
    check_whole,
    table_by_step,
)
from sa_plugin._execution import NetworkCall
from sa_plugin._tensors import Coefficients, follow
from sa_plugin.prediction import PREDICTS
from sa_plugin.sampling.batches import MOST, BlockNoise, images_of, shown
from sa_plugin.sampling.reverse import split_output
from sa_plugin.sampling.tally import Store, Tally
from sa_plugin.schedule import FloatArray, NoiseSchedule


@dataclass(frozen=True, eq=False)
class Gamma:
    """Gamma at every step; an array [N+1] to NumPy and to ``Sampler(gamma=...)``.

    Attributes:
        values: float64 [N+1], finite and >= 0; entry 0 is zero.
        stderr: float64 [N+1], the standard error of each value over the images; None if it comes
            from a host's file, which has none.

    Raises:
        ValueError: another shape, or entries that are negative or not finite.
    """

    values: FloatArray
    stderr: FloatArray | None = None

    def __post_init__(self) -> None:
        N = max(np.size(self.values) - 1, 1)
        for name, values in (("values", self.values), ("stderr", self.stderr)):
            if values is not None:
                table = table_by_step(name, values, N)
                table.flags.writeable = False
                object.__setattr__(self, name, table)

    @property
    def N(self) -> int:
        """Number of steps."""
        return len(self.values) - 1

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        # NumPy 2 passes copy; NumPy 1 neither passes nor takes it.
        if copy is False and dtype not in (None, self.values.dtype):
            raise ValueError(f"a copy is needed to give dtype {dtype}, got copy=False")
        return np.array(self.values, dtype) if copy else np.asarray(self.values, dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.npz`` (``values``, and ``stderr`` if known); else a host's ``ms_eps`` file.

        An ``ms_eps`` file is ``torch.save`` of the float64 array [N+1], without standard errors.
        """
        with written_atomically(path, sync=True) as file:
            if Path(path).suffix == ".npz":
                known: dict[str, Any] = {} if self.stderr is None else {"stderr": self.stderr}
                np.savez(file, values=self.values, **known)
            else:
                torch.save(np.array(self.values), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gamma:
        """Read an ``.npz`` of ``save``, or a host's ``ms_eps`` (an array or a tensor [N+1]).

        No code in the file is run.

        Raises:
            ValueError: no such file, or a file with other content.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise UnreadableFile(f"there is no Gamma file at {path}")
        with reading(path, "holds no Gamma (one number per step, [N+1])") as file:
            if path.suffix != ".npz":
                return cls(_load_array(file))
            with open_npz(file) as arrays:
                arrays.check_names(["values"], allowed=["stderr"])
                return cls(**{name: arrays[name] for name in arrays.names})


def estimate_gamma(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    batches: Iterable[Tensor],
    *,
    n_images: int | None = None,
    noises: int = 1,
    seed: int = 0,
    predicts: str = "eps",
    noise: Callable[[int], Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
    **model_kwargs: Any,
) -> Gamma:
    """Gamma_n at all steps with its standard error, by N * n_images * noises network evaluations.

    Every image passes through every step with ``noises`` draws of its own. Draws of one image are
    not independent, so the standard error is computed from each image's mean over its draws. The
    noise of image i depends only on (seed, i, n): the result does not depend on batch sizes, up to
    the rounding of float64 sums. Only saves wait for the device.

    Args:
        model: ``(x [B, ...], n int64 [B] in 1..N, **model_kwargs)`` -> eps, or a pair that begins
            with eps. Its train/eval mode is not changed; gradients are off. It gets x in its
            parameters' type, as in ``Sampler``.
        batches: x_0 in [-1, 1], floating point [B, ...], on the network's device; independent
            images. x_n is made in their dtype. To continue a checkpoint, pass a new iterable with
            the images in the same order.
        n_images: >= 2, taken from the front of ``batches``, which may then be endless; default all.
        noises: draws of eps for each image and step.
        predicts: what the network's (first) output is: "eps", "x0" or "v".
        noise: gives the draws of step n instead, [noises, n_images, ...].
        checkpoint: file that keeps the state. If it exists, the run continues from it: after an
            interruption (with the numbers of an unbroken run), or with a larger ``n_images``.
        save_every: seconds between saves; 0 saves after every step.
        stop: called after every step of a batch; True saves the state and raises KeyboardInterrupt.
        progress: show a bar over all steps of a batch (extra "progress").
        model_kwargs: go to every call; tensors of length ``n_images`` (labels) follow their images.

    Raises:
        ValueError: a bad argument, too few images, a checkpoint of other draws, or a network output
            that is not finite (the first such step is named).
    """
    if n_images is not None:
        check_whole("n_images", n_images, 2, MOST)
    check_whole("noises", noises, 1, MOST)
    check_whole("seed", seed, 0, MOST)
    check_choice("predicts", predicts, PREDICTS)
    check_non_negative("save_every", save_every)

    def given(rows: slice) -> dict[str, Any]:
        return follow(model_kwargs, n_images or -1, rows)

    squares = _MeanSquares(model, schedule, noises, seed, predicts, noise, given)
    tally = Tally(schedule.N)
    store = Store(checkpoint, save_every, squares.identity)
    store.read_into(tally)
    if n_images is not None:
        _check_not_beyond(store, tally, n_images)
    total = 0
    for first, x0 in _numbered(batches, n_images):
        _add_batch(tally, store, squares, first, x0, stop, progress)
        total = first + len(x0)
    _check_not_beyond(store, tally, total)
    store.save(tally)
    variance = tally.deviations.cpu().numpy() / (total - 1)
    return Gamma(tally.mean.cpu().numpy(), np.sqrt(variance / total))


def _add_batch(
    tally: Tally,
    store: Store,
    squares: _MeanSquares,
    first: int,
    x0: Tensor,
    stop: Callable[[], bool],
    progress: bool,
) -> None:
    """All steps of one batch, without those that a checkpoint already holds."""
    tally.move_to(x0.device)
    N = len(tally.counts) - 1
    for n in shown(range(1, N + 1), N, "step", progress):
        done = max(int(tally.counts[n]) - first, 0)
        if done < len(x0):
            tally.add(n, squares(x0[done:], first + done, n))
            store.save_if_due(tally)
        if stop():
            store.save(tally)
            raise KeyboardInterrupt(f"stopped at step n = {n} of Gamma{store.where}")


class _MeanSquares:
    """mean(eps_pred^2) over the dimensions and the draws of each image."""

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        noises: int,
        seed: int,
        predicts: str,
        noise: Callable[[int], Tensor] | None,
        given: Callable[[slice], dict[str, Any]],
    ) -> None:
        self._network = NetworkCall(model)
        self._given = given
        self._noises = noises
        self._seed = seed
        self._predicts = predicts
        self._noise = noise
        self._steps = schedule.N
        self._coefficients = Coefficients(schedule)
        self.identity = {
            "betas": schedule.betas.tolist(),
            "noises": noises,
            "seed": seed if noise is None else None,
            "predicts": predicts,
        }

    @torch.no_grad()
    def __call__(self, x0: Tensor, first: int, n: int) -> Tensor:
        """float64 [B] for the images first..first + B - 1 at step n."""
        steps = torch.full((len(x0),), n, dtype=torch.int64, device=x0.device)
        a, b = self._coefficients(steps, x0)
        given = self._given(slice(first, first + len(x0)))
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for eps in self._draws(x0, first, n):
            x = (a * x0 + b * eps).to(x0.dtype)
            output, _ = split_output(self._network(x, steps, **given), x, "analytic")
            predicted = self._coefficients.eps_of(output, x, steps, self._predicts)
            total += predicted.double().square().flatten(1).mean(1)
        return total / self._noises

    def _draws(self, x0: Tensor, first: int, n: int) -> Iterator[Tensor]:
        if self._noise is None:
            # Each (seed, n) has its own seed, so that a continued run makes the same draws.
            source = BlockNoise(
                self._seed * (self._steps + 1) + n, first, x0.shape, x0.dtype, x0.device
            )
            return (source.draw() for _ in range(self._noises))
        given = self._noise(n)
        rows = slice(first, first + len(x0))
        if given.ndim != x0.ndim + 1 or given[:, rows].shape != (self._noises, *x0.shape):
            raise ValueError(
                f"noise(n) must have shape ({self._noises}, n_images, *{tuple(x0.shape[1:])}), "
                f"got {tuple(given.shape)}, n = {n}"
            )
        check_finite(f"noise({n})", given)
        return iter(given[:, rows].to(x0))


def _check_not_beyond(store: Store, tally: Tally, n_images: int) -> None:
    most = int(tally.counts.max())
    if most > n_images:
        raise ValueError(
            f"checkpoint {store.path} already holds {most} images per step, "
            f"got n_images = {n_images}"
        )


def _numbered(batches: Iterable[Tensor], n_images: int | None) -> Iterator[tuple[int, Tensor]]:
    """(number of the first image, x_0) up to ``n_images`` images; ValueError for fewer."""
    first = 0
    for x0 in images_of(batches):
        x0 = x0 if n_images is None else x0[: n_images - first]
        yield first, x0
        first += len(x0)
        if first == n_images:
            return
    if first < (n_images or 2):
        raise ValueError(f"batches must hold at least {n_images or 2} images, got {first}")


def _load_array(file: BinaryIO) -> NDArray[Any]:
    """The array or tensor in a file of ``torch.save``."""
    loaded = load_tensors(file, ARRAYS)
    if isinstance(loaded, PickledArray) and loaded.array is not None:
        return loaded.array
    if not isinstance(loaded, Tensor):
        raise ValueError(f"it is a {type(loaded).__name__}")
    return entries_once(loaded).numpy()
