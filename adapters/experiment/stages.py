"""The stages of an experiment: train, sample, evaluate. No stage changes existing results.

A stage is done when all its files are there and whole; it makes those that are not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path

from torch import Tensor, nn

from adapters.checkpoints.fitting import load_published
from adapters.checkpoints.layouts import write_host
from adapters.experiment import tables as report
from adapters.experiment.experiment import Experiment, calls_an_image
from adapters.experiment.folder import METRICS_FILE, OVERVIEW_FILE, TABLE_FILE
from adapters.experiment.identity import overview_steps
from adapters.experiment.logs import CSV_FILE, TrainingLog
from adapters.hosts import get_process
from adapters.measuring.evaluation import evaluate, summarise
from adapters.measuring.features import CACHE, build_extractors
from adapters.measuring.metric_names import data_value
from adapters.pictures.pictures import plot_metric, save_grid, save_labelled_grids
from adapters.sampling.pipeline import fill
from adapters.sampling.sinks import NpzFile, first_images, read_batches
from adapters.shell.signals import held
from sa_files.reading import UnreadableFile
from sa_files.whole import is_whole
from sa_files.writing import write_atomically, write_json
from sa_plugin.hooks.hook import attach
from sa_plugin.sampling.gamma import Gamma
from third_party.common import distributed
from third_party.common.checkpoints import (
    average_of,
    checkpoint_paths,
    copy_checkpoint,
    is_complete,
    prune,
    read_state,
)
from third_party.common.classes import LabelledBatches
from third_party.common.criterion_base import Criterion
from third_party.common.data import BatchStream, spread_images
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.common.training import Trainer
from third_party.extended_analytic_dpm.methods import get_method

logger = logging.getLogger(__name__)

GRID_IMAGES = 100
GRID_COLUMNS = 10


class TrainStage:
    """One of the host's trainings; for the noise network, with the SA loss hooked on.

    Args:
        experiment: its configuration has a section called ``name``.
        name: "base" or "head"; also the name of the folder.
        method: the host's method.
        trunk: for a head, the stage that trains its trunk.
    """

    def __init__(
        self, experiment: Experiment, name: str, method: str, trunk: TrainStage | None = None
    ) -> None:
        self.experiment = experiment
        self.name = name
        self.method = method
        self.trunk = trunk
        self.settings = experiment.config[name]
        self.init_from: str | Path = self.settings.init_from
        self.folder = experiment.workdir / name

    def plan(self) -> str:
        """What it does, in one line."""
        loss, lam = self.experiment.loss, self.experiment.config.sa.lam
        term = ""
        if self._with_sa:
            term = f", SA-{loss.K} with lambda {lam:g} ({loss.tau.weighting} weighting)"
        settings = self.settings
        start = f" from {self.init_from}" if self.init_from else ""
        if settings.iterations == 0:
            return f"{self.method}{start}, unchanged"
        images = f"{settings.iterations} x {settings.batch_size} images"
        return f"{self.method}{start}, {images}{term}"

    def is_done(self) -> bool:
        """Whether all files of the last checkpoint are there and whole."""
        return self.experiment.has(self.average_path) and is_complete(self._final_checkpoint)

    def run(self) -> None:
        """Train, starting from the newest checkpoint."""
        if self.is_done():
            if distributed.is_first():  # an earlier command may have ended before this
                prune(self._final_checkpoint.parent, None, upto=self.settings.iterations)
            return
        if self.trunk is not None and not self.trunk.is_done():
            raise ValueError(f"stage {self.name!r} needs the result of stage {self.trunk.name!r}")
        if self.settings.iterations > 0:
            with closing(TrainingLog(self.folder)) as log, held() as stop:
                self._trainer(self._criterion(), log, stop).run()
        elif distributed.is_first():
            network = self._criterion().models["model"]
            write_host({"ema": network.state_dict()}, self._final_checkpoint)

    def take_over(self, shorter: TrainStage) -> None:
        """Start from the last checkpoint of a shorter, otherwise equal training."""
        if checkpoint_paths(self._final_checkpoint.parent):
            return
        if (shorter.folder / CSV_FILE).exists():
            write_atomically(self.folder / CSV_FILE, (shorter.folder / CSV_FILE).read_bytes())
        copy_checkpoint(shorter._final_checkpoint, self._final_checkpoint.parent)

    def average(self) -> tuple[nn.Module, str]:
        """The averaged network, in eval mode on the device, and its ``typ``."""
        if not self.experiment.has(self.average_path):
            raise ValueError(f"the result of stage {self.name!r} is needed first")
        network = self.experiment.network(self.method)
        network.load_state_dict(read_state(self.average_path))
        return network.to(self.experiment.device).eval(), get_method(self.method).typ

    @property
    def average_path(self) -> Path:
        """The averaged weights: a plain state dict."""
        return average_of(self._final_checkpoint)

    @property
    def _final_checkpoint(self) -> Path:
        return self.folder / "ckpts" / f"{self.settings.iterations}.ckpt"

    def _trainer(self, criterion: Criterion, log: TrainingLog, stop: Callable[[], bool]) -> Trainer:
        settings, experiment = self.settings, self.experiment
        ema = EMA(criterion.models, settings.ema)
        if distributed.world_size() > 1:
            criterion.parallelise()
        return Trainer(
            criterion,
            ema,
            self._batches(),
            self.folder,
            n_iters=settings.iterations,
            ckpt_every=settings.ckpt_every,
            log_every=settings.log_every,
            before_step=self._set_lambda if self._with_sa else None,
            on_log=log,
            stop=stop,
            seed=experiment.config.seed,
            progress=experiment.progress,
            keep=settings.keep or None,
        )

    def _batches(self) -> BatchStream | LabelledBatches:
        """The training images, with labels if the network takes them."""
        experiment = self.experiment
        images = BatchStream(
            experiment.dataset,
            self.settings.batch_size,
            experiment.config.seed,
            device=experiment.device,
            part=(distributed.rank(), distributed.world_size()),
            flip=experiment.config.data.flip,
            crop=experiment.config.data.crop,
        )
        if experiment.classes is None:
            return images
        # A head is used for the classes alone.
        drop = self.settings.label_drop if self.trunk is None else 0.0
        return LabelledBatches(images, experiment.classes, drop)

    @property
    def _with_sa(self) -> bool:
        return self.trunk is None and self.experiment.config.sa.lam > 0

    @property
    def _input_perturbation(self) -> float:
        """The criterion's own: with the SA loss it is the loss that perturbs, in all its rows."""
        return 0.0 if self.trunk or self._with_sa else self.settings.input_perturbation

    @property
    def _lr_fall(self) -> tuple[int, int] | None:
        """The steps between which the rate falls, or None."""
        end, steps = self.settings.iterations, self.settings.lr_decay
        return (end - steps, end) if steps else None

    def _set_lambda(self, iteration: int) -> None:
        """Set lambda from the iteration alone, so that a continued run has the same values."""
        experiment = self.experiment
        risen = min(1.0, iteration / max(experiment.lam_warmup, 1))
        experiment.loss.lam = experiment.config.sa.lam * risen

    def _criterion(self) -> Criterion:
        time, schedule = self.experiment.config.time, self.experiment.config.schedule
        network = self.experiment.network(self.method)
        if self.init_from:
            load_published(self.init_from, network)
        criterion = self.experiment.adapter.build_criterion(
            self.method,
            NamedSchedule(
                schedule.name, schedule.N, self.settings.stratified, self._input_perturbation
            ),
            network.to(self.experiment.device),
            trunk=None if self.trunk is None else self.trunk.average_path,
            ratio=self.experiment.config.head.ratio,
            lr=self.settings.lr,
            grad_clip=self.settings.grad_clip or None,
            lr_warmup=self.settings.lr_warmup,
            lr_fall=self._lr_fall,
            rescale_timesteps=time.rescale_timesteps,
            shift1=time.shift1,
        )
        criterion.configure(self.experiment.step_options(self.name))
        return attach(criterion, self.experiment.loss) if self._with_sa else criterion


class SampleStage:
    """Images of every cell (reverse process x steps): ``samples/PROCESS_STEPS.npz`` and a PNG.

    Args:
        plain: the stage that trains the noise network.
        second: the stage whose network is used with the optimal variances.
        gamma: returns Gamma, if the optimal variances need it.
    """

    name = "sample"

    def __init__(
        self,
        experiment: Experiment,
        plain: TrainStage,
        second: TrainStage,
        gamma: Callable[[], Gamma] | None = None,
    ) -> None:
        self.experiment = experiment
        self.gamma = gamma
        self.plain = plain
        self.second = second
        self.folder = experiment.workdir / "samples"
        self.overview = experiment.workdir / OVERVIEW_FILE

    @property
    def cells(self) -> list[tuple[str, int]]:
        """(process, steps), process by process."""
        sample = self.experiment.config.sample
        return list(product(sample.processes, sample.steps))

    def plan(self) -> str:
        """What it does, in one line."""
        sample, missing = self.experiment.config.sample, self.missing()
        calls = sample.n_images * sum(calls_an_image(sample, *cell) for cell in missing)
        return f"{len(missing)} cells of {sample.n_images} images, {calls:.3g} network evaluations"

    def missing(self) -> list[tuple[str, int]]:
        """The cells without their images."""
        return [cell for cell in self.cells if not self.experiment.has(self.path(*cell))]

    def is_done(self) -> bool:
        """Whether all images and all pictures are there and whole."""
        paths = [self.path(*cell) for cell in self.cells]
        pictures = [path.with_suffix(".png") for path in paths]
        return all(map(self.experiment.has, (*paths, *pictures, self.overview)))

    def run(self) -> None:
        """Sample the cells that are missing, and draw the pictures that are."""
        if missing := self.missing():
            self._sample(missing)
        for cell in self.cells:
            path = self.path(*cell)
            self._file(*cell).finish()  # an earlier command may have ended within it
            picture = path.with_suffix(".png")
            if cell in missing or not is_whole(picture):
                save_grid(picture, first_images(path, GRID_IMAGES), columns=GRID_COLUMNS)
        if missing or not is_whole(self.overview):
            self._draw_overview()

    def _sample(self, cells: list[tuple[str, int]]) -> None:
        gamma = None if self.gamma is None else self.gamma()
        averages = {stage: stage.average() for stage in {self.stage_of(p) for p, _ in cells}}
        for process, steps in cells:
            logger.info("sample: %s, %d steps", get_process(process).title, steps)
            network, typ = averages[self.stage_of(process)]
            source = partial(self.experiment.source, process, steps, network, typ, gamma)
            fill(self._file(process, steps), source)

    def path(self, process: str, steps: int) -> Path:
        """The file of a cell's images: ``arr_0``, uint8 [n, H, W, C]."""
        return self.folder / f"{process}_{steps}.npz"

    def _file(self, process: str, steps: int) -> NpzFile:
        return NpzFile(self.path(process, steps), self.experiment.config.sample.n_images)

    def batches(self, process: str, steps: int, size: int) -> Iterator[Tensor]:
        """A cell's images as uint8 batches [<= size, C, H, W]."""
        path = self.path(process, steps)
        if not path.exists():
            raise ValueError(f"{path} is needed first: run stage 'sample'")
        return read_batches(path, size)

    def stage_of(self, process: str) -> TrainStage:
        """The stage whose network a process samples with."""
        return self.plain if get_process(process).needs is None else self.second

    def _draw_overview(self) -> None:
        """All reverse processes side by side, from the same initial noise, for few steps."""
        config = self.experiment.config
        steps = overview_steps(config.sample.steps)
        panels = {"real": spread_images(self.experiment.dataset, GRID_IMAGES)}
        for process in config.sample.processes:
            panels[get_process(process).title] = first_images(
                self.path(process, steps), GRID_IMAGES
            )
        save_labelled_grids(
            self.overview,
            panels,
            columns=GRID_COLUMNS,
            heading=f"{self.experiment.workdir.name}, {steps} steps",
        )


class EvaluateStage:
    """Metrics of every cell: ``metrics.json``, ``table.md`` and plots."""

    name = "evaluate"

    def __init__(self, experiment: Experiment, sample: SampleStage) -> None:
        self.experiment = experiment
        self.sample = sample
        self.path = experiment.workdir / METRICS_FILE
        self.table_path = experiment.workdir / TABLE_FILE

    def plan(self) -> str:
        """What it does, in one line."""
        features = ", ".join(self.experiment.config.evaluate.features)
        return f"{len(self._missing(self._stored()))} cells, features: {features}"

    def is_done(self) -> bool:
        """Whether the metrics of every cell, the table and the plots are there."""
        stored = self._stored()
        if self._missing(stored):
            return False
        plots = [self._plot(name) for name in report.headline_metrics(stored)]
        return all(map(self.experiment.has, (self.table_path, *plots)))

    def run(self) -> None:
        """Measure the cells that are missing."""
        stored = self._stored()
        if self.path.exists() and not stored:
            logger.warning("%s is damaged: its cells are measured again", self.path)
        if missing := self._missing(stored):
            for process, cells in self._compute(missing).items():
                stored[process] = stored.get(process, {}) | cells
            write_json(self.path, stored)
        metrics = self.metrics()
        write_atomically(self.table_path, report.markdown(metrics))
        for name in report.headline_metrics(metrics):
            lines = {
                get_process(process).title: {int(s): cell[name] for s, cell in cells.items()}
                for process, cells in metrics.items()
            }
            reference = data_value(name, next(iter(next(iter(metrics.values())).values())))
            plot_metric(self._plot(name), lines, metric=name, reference=reference)

    def metrics(self) -> report.Metrics:
        """The metrics of this configuration's cells, which must be there."""
        stored = report.read_metrics(self.path)
        metrics: report.Metrics = {}
        for process, steps in self.sample.cells:
            metrics.setdefault(process, {})[str(steps)] = stored[process][str(steps)]
        return metrics

    def _plot(self, metric: str) -> Path:
        return self.path.with_name(f"{metric}.png")

    def _stored(self) -> report.Metrics:
        """The metrics that are there, also of cells that are no longer asked for."""
        if not self.experiment.has(self.path):
            return {}
        try:
            return report.read_metrics(self.path)
        except UnreadableFile:
            return {}

    def _missing(self, stored: report.Metrics) -> list[tuple[str, int]]:
        return [(p, s) for p, s in self.sample.cells if str(s) not in stored.get(p, {})]

    def _compute(self, cells: list[tuple[str, int]]) -> report.Metrics:
        config, batch = self.experiment.config, self.experiment.config.sample.batch_size
        extractors = build_extractors(
            config.evaluate.features,
            cache_dir=self.experiment.workdir.parent / CACHE,
            device=self.experiment.device,
            data_root=config.data.root,
        )
        reference = summarise(self.experiment.reference.uint8_batches(batch), extractors)
        metrics: report.Metrics = {}
        for process, steps in cells:
            batches = self.sample.batches(process, steps, batch)
            cell = evaluate(batches, reference, splits=config.evaluate.splits)
            metrics.setdefault(process, {})[str(steps)] = cell
        return metrics
