"""The folder of a grid, and what its tasks share within one process.

    STORE/trainings/NAME/            config.json, base/, and a folder for each head or Gamma
    STORE/cells/NAME/CELL.json       its metrics; CELL.npz the first images; CELL.grid.png
    STORE/gap/NAME_START_DIGEST.npz  a gap curve

    STORE/images.json                what a user's own images were

NAME and CELL end in a digest of all keys that determine the numbers, so an existing file is right.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict
from torch import nn

from adapters.comparison.grid import Grid, Line
from adapters.experiment.experiment import Experiment, load_dataset
from adapters.experiment.identity import second_name, training_name
from adapters.experiment.stages import TrainStage
from adapters.hosts import get_process, host_of
from adapters.measuring.evaluation import Summary, summarise
from adapters.measuring.features import CACHE, build_extractors
from sa_plugin.effect.spectrum import Spectrum
from third_party.common.data import ImageDataset


class Store:
    """The folder of a grid, and what its tasks share within one process."""

    def __init__(self, grid: Grid, folder: Path, device: str, progress: bool) -> None:
        self.grid = grid
        self.folder = folder
        self.device = device
        self.progress = progress
        self.experiment = lru_cache(maxsize=64)(self._experiment)
        self._networks: dict[Path, tuple[nn.Module, str]] = {}
        # All experiments with equal data sections, normally all, share one copy of the images.
        self._load = lru_cache(maxsize=2)(load_dataset)
        self.spectrum = lru_cache(maxsize=2)(self._spectrum)
        self._summary = lru_cache(maxsize=2)(self._summarise)

    def training_folder(self, line: Line, seed: int) -> Path:
        """Where a noise network is trained."""
        return self.folder / "trainings" / training_name(self.grid.experiment(line, seed))

    def network(self, stage: TrainStage) -> tuple[nn.Module, str]:
        """A stage's averaged network and its ``typ``; the last one is kept in memory."""
        if stage.average_path not in self._networks:
            self._networks = {stage.average_path: stage.average()}
        return self._networks[stage.average_path]

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images of the grid's experiment; a training may have others."""
        # A new section, like those of the trainings: it would differ from these as it is.
        return self._load(FrozenConfigDict(self.grid.config.experiment.data.to_dict()))

    def datasets(self) -> list[tuple[FrozenConfigDict, ImageDataset]]:
        """The sections ``data`` of the trainings, each once, with their images."""
        grid = self.grid
        every = (grid.experiment(Line(name), grid.seeds[0]).data for name in grid.trainings)
        return [(data, self._load(data)) for data in dict.fromkeys(every)]

    def _spectrum(self, data: FrozenConfigDict) -> Spectrum:
        """Mean and variances of the images that a section ``data`` names."""
        return Spectrum.of(self._load(data).uint8_batches(self._batch))

    def reference(self, config: FrozenConfigDict) -> Summary:
        """The moments of the features of the real images that an experiment's metrics compare with.

        A training may have other images than the grid's experiment, so these are of its own.
        """
        return self._summary(config.data, config.evaluate.features, config.evaluate.reference)

    def _summarise(self, data: FrozenConfigDict, features: tuple[str, ...], split: str) -> Summary:
        extractors = build_extractors(
            features, cache_dir=self.folder / CACHE, device=self.device, data_root=data.root
        )
        images = self._load(data, split=split) if split else self._load(data)
        return summarise(images.uint8_batches(self._batch), extractors)

    @property
    def _batch(self) -> int:
        return int(self.grid.config.experiment.sample.batch_size)

    def _experiment(self, line: Line, seed: int, process: str | None) -> Experiment:
        """The experiment whose folder holds what ``process`` needs besides the noise network."""
        config = ConfigDict(self.grid.experiment(line, seed, process).to_dict())
        if self.grid.init(line.training):
            config.base.init_from = ""  # its task sets the path, once the weights are there
        config = FrozenConfigDict(config)
        folder = self.training_folder(line, seed)
        needs = get_process(process).needs if process else None
        workdir = folder / second_name(config, needs) if needs else folder
        return Experiment(
            host_of([needs]), config, workdir, self.device, self.progress, load=self._load
        )
