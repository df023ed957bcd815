"""Metrics of sampled images: a sink that writes no image files.

    metrics.json              the result, with the keys of ``adapters.measuring.evaluation``
    parts/from_UNIT.npz       before that: moments, pixel sums and logits of some units

Each process keeps its own part and rewrites it regularly, so an interruption loses only the units
since the last write. Which process took which units changes only the last digits of a Fréchet
distance, because covariances are summed in another order. All else is equal to the last bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.measuring.evaluation import Collector, Summary, compare
from adapters.measuring.extractor import Extractor
from adapters.sampling.sinks import Images, units_of
from sa_files.arrays import Arrays as StoredArrays
from sa_files.arrays import open_npz
from sa_files.reading import reading
from sa_files.stored import read_json
from sa_files.writing import write_json, written_atomically
from sa_plugin.metrics import Moments
from sa_plugin.sampling.batches import BLOCK

SAVE_SECONDS = 30.0  # between two writes of a part
PART_UNITS = 128  # a part of 8,192 images is closed: its logits are now as large as its moments

Arrays = dict[str, NDArray[np.generic]]


class MetricsFile:
    """The metrics of ``n_images`` images; a ``Sink``.

    Args:
        extractors: the feature spaces.
        reference: returns the summary that the images are compared with; called once, at the end.
        splits: splits of the Inception-Score formula.
    """

    unit = BLOCK

    def __init__(
        self,
        folder: Path,
        n_images: int,
        extractors: Sequence[Extractor],
        reference: Callable[[], Summary],
        splits: int = 10,
    ) -> None:
        self.path = folder / "metrics.json"
        self.parts = folder / "parts"
        self.n_images = n_images
        self.extractors = tuple(extractors)
        self._reference = reference
        self._splits = splits
        self._part = _Part(self.extractors)
        self._saved_at = time.monotonic()

    def missing(self) -> list[int]:
        """The units that are in no part; empty if the result exists."""
        if self.path.exists():
            return []
        taken = set(self._taken())
        return [i for i in range(units_of(self.n_images, self.unit)) if i not in taken]

    def write(self, unit: int, images: Images) -> None:
        """Add a unit's images."""
        self._part.update(unit, torch.from_numpy(images).permute(0, 3, 1, 2))
        is_full = len(self._part.units) >= PART_UNITS
        if is_full or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.close()
        if is_full:
            self._part = _Part(self.extractors)

    def close(self) -> None:
        """Write this process's part."""
        if self._part.units:
            path = self.parts / f"from_{self._part.units[0]:08d}.npz"
            with written_atomically(path) as file:
                np.savez(file, **self._part.arrays())
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Merge the parts, one in memory at a time, compute the metrics, and remove the parts."""
        if not self.path.exists():
            metrics = compare(self._merged(), self._reference(), splits=self._splits)
            write_json(self.path, metrics)
        shutil.rmtree(self.parts, ignore_errors=True)

    def result(self) -> dict[str, float]:
        """The metrics, after ``finish``."""
        trouble = "is damaged; remove it, and it is made again"
        return read_json(self.path, trouble, lambda found: {k: float(v) for k, v in found.items()})

    def _merged(self) -> Summary:
        self._taken()
        whole, logits = Collector(self.extractors), {}
        for path in self._paths():
            with _reading(path) as arrays:
                _merge(arrays, whole, logits)
        whole.logits = {
            name: [by_unit[unit] for unit in sorted(by_unit)] for name, by_unit in logits.items()
        }
        return whole.summary()

    def _taken(self) -> list[int]:
        taken: list[int] = []
        for path in self._paths():
            with _reading(path) as arrays:
                taken += arrays["units"].tolist()
        if len(set(taken)) < len(taken):
            raise ValueError(
                f"{self.parts} holds images twice, from two commands at the same time: remove it, "
                "and the same command starts again"
            )
        return taken

    def _paths(self) -> list[Path]:
        return sorted(self.parts.glob("from_*.npz"))


class _Part:
    """The units that one process has added."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        self.units: list[int] = []
        self._counts: list[int] = []
        self._collector = Collector(extractors)

    def update(self, unit: int, batch: Tensor) -> None:
        """Add a unit, uint8 [B, C, H, W]."""
        self._collector.update(batch)
        self.units.append(unit)
        self._counts.append(len(batch))

    def arrays(self) -> Arrays:
        """The whole part as arrays, for ``_merge``."""
        arrays: Arrays = {
            "units": np.array(self.units),
            "counts": np.array(self._counts),
            "sums": self._collector.pixels.sums.numpy(),
        }
        for name, moments in self._collector.moments.items():
            arrays |= {f"{name}/{key}": value for key, value in moments.arrays().items()}
        for name, parts in self._collector.logits.items():
            arrays[f"{name}/logits"] = torch.cat(parts).numpy()
        return arrays


def _merge(arrays: StoredArrays, whole: Collector, logits: dict[str, dict[int, Tensor]]) -> None:
    """Merge a part's ``arrays`` into ``whole``; keep its logits by unit: their order matters."""
    counts = arrays["counts"].tolist()
    whole.pixels.add(sum(counts), torch.from_numpy(arrays["sums"]))
    for name, moments in whole.moments.items():
        keys = Moments().arrays()
        moments.merge(Moments.of_arrays({key: arrays[f"{name}/{key}"] for key in keys}))
        if f"{name}/logits" in arrays:
            rows = torch.from_numpy(arrays[f"{name}/logits"]).split(counts)
            by_unit = zip(arrays["units"].tolist(), rows, strict=True)
            logits.setdefault(name, {}).update(by_unit)


@contextmanager
def _reading(path: Path) -> Iterator[StoredArrays]:
    """A part's arrays; each is read on access."""
    trouble = "is damaged; remove it, and its images are made again"
    with reading(path, trouble) as file, open_npz(file) as arrays:
        yield arrays
