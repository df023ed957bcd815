"""The stage of Analytic-DPM between training and sampling: Gamma of the averaged network."""

from __future__ import annotations

import logging

import numpy as np

from adapters.experiment.experiment import Experiment
from adapters.experiment.stages import TrainStage
from adapters.shell.signals import held
from sa_files.reading import UnreadableFile
from sa_plugin.sampling.gamma import Gamma, estimate_gamma
from third_party.common.data import BatchStream
from third_party.common.order import InfiniteShuffle

logger = logging.getLogger(__name__)


class GammaStage:
    """Gamma at every step: ``gamma/gamma.npz`` with standard errors, ``gamma/ms_eps.pth``.

    The second file has the host's format. An interrupted estimate continues from
    ``gamma/state.pth``.
    """

    name = "gamma"

    def __init__(self, experiment: Experiment, base: TrainStage) -> None:
        self.experiment = experiment
        self.base = base
        self.settings = experiment.config.gamma
        self.folder = experiment.workdir / self.name
        self.path = self.folder / "gamma.npz"
        self.host_path = self.folder / "ms_eps.pth"

    @property
    def n_images(self) -> int:
        """The number asked for, or all images if there are fewer: no image is used twice."""
        return min(self.settings.n_images, len(self.experiment.dataset))

    def plan(self) -> str:
        """What it does, in one line."""
        noises, N = self.settings.noises, self.experiment.schedule.N
        images = self.settings.n_images
        calls = images * noises * N
        return f"up to {images} images x {noises} noises x {N} steps, {calls:.3g} evaluations"

    def is_done(self) -> bool:
        """Whether the estimate exists, in both files."""
        return self.experiment.has(self.path) and self.experiment.has(self.host_path)

    def run(self) -> None:
        """Estimate Gamma, or continue an interrupted estimate."""
        if self.is_done():
            return
        if self.experiment.has(self.path):
            self._load().save(self.host_path)
            return
        if not self.base.is_done():
            raise ValueError(f"stage {self.name!r} needs the result of stage {self.base.name!r}")
        settings, experiment = self.settings, self.experiment
        chosen = InfiniteShuffle(len(experiment.dataset), settings.seed).take(0, self.n_images)
        with held() as stop:
            gamma = estimate_gamma(
                experiment.wrapper(*self.base.average()),
                experiment.schedule,
                BatchStream(
                    experiment.dataset, settings.batch_size, settings.seed, device=experiment.device
                ),
                n_images=self.n_images,
                noises=settings.noises,
                seed=settings.seed,
                checkpoint=self.folder / "state.pth",
                stop=stop,
                progress=experiment.progress,
                **experiment.labels_of(experiment.dataset, chosen),
            )
        gamma.save(self.host_path)
        gamma.save(self.path)
        logger.info("gamma: standard errors up to %.2g", np.max(gamma.stderr))

    def result(self) -> Gamma:
        """The estimate."""
        if not self.is_done():
            raise ValueError(f"the result of stage {self.name!r} is needed first")
        return self._load()

    def _load(self) -> Gamma:
        try:
            return Gamma.load(self.path)
        except UnreadableFile as error:
            raise ValueError(f"{error}; remove it, and the same command makes it again") from error
