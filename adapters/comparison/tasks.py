"""The tasks of a grid: trainings, heads, Gamma, cells, gap curves, each made once and stored."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import sa_plugin
from adapters.comparison.corrections import FIT_SEED, Network, calls_of_cell, corrected, scaled
from adapters.comparison.grid import Cell, Line
from adapters.comparison.store import Store
from adapters.experiment.config import CONFIG_FILE, write_config
from adapters.experiment.experiment import calls_an_image
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.identity import cell_name, digest, training_name
from adapters.experiment.stages import GRID_COLUMNS, GRID_IMAGES, TrainStage
from adapters.experiment.tables import check_cell
from adapters.hosts import get_process
from adapters.measuring.evaluation import evaluate
from adapters.pictures.pictures import save_grid
from adapters.sampling.sinks import first_images
from sa_files.stored import read_arrays, read_json
from sa_files.whole import is_whole
from sa_files.writing import write_json, written_atomically
from sa_plugin.bounds.gap import GapCurve, gap_along_chain

DAMAGED = "is damaged: remove it, and adapters.compare makes it again"


class Task(Protocol):
    """A part of the grid.

    Attributes:
        name: a path inside the store; no other task has it.
        needs: the tasks whose results it uses.
        evaluations: network evaluations of one image; a backward pass counts as two.
    """

    name: str
    needs: tuple[Task, ...]

    @property
    def evaluations(self) -> float: ...

    def is_done(self) -> bool:
        """Whether its result is in the store."""

    def run(self) -> None:
        """Make the result, or continue making it."""


class StageTask:
    """A training, a head or a Gamma: a stage of an experiment.

    ``start`` is a shorter training of the same network, which this one continues; ``init`` is one
    whose averaged network it starts from.
    """

    def __init__(
        self,
        store: Store,
        stage: TrainStage | GammaStage,
        needs: tuple[Task, ...],
        cost: float,
        start: StageTask | None = None,
        init: StageTask | None = None,
    ) -> None:
        self.store = store
        self.stage = stage
        self.start = start
        self.init = init
        self.needs = (*needs, *(task for task in (start, init) if task is not None))
        self.evaluations = cost
        self.name = stage.folder.relative_to(store.folder).as_posix()

    def is_done(self) -> bool:
        """Whether the stage's result is there."""
        return self.stage.is_done()

    def run(self) -> None:
        """Run the stage, from where it was interrupted; of a done one, restore what is lost."""
        experiment = self.stage.experiment
        path = experiment.workdir / CONFIG_FILE
        if not (self.is_done() and is_whole(path)):
            write_config(path, experiment.config.to_dict())
        if self.start is not None:
            self.stage.take_over(self.start.stage)
        if self.init is not None:
            self.stage.init_from = self.init.stage.average_path
        self.stage.run()


class EpsScaleTask:
    """The best epsilon scaling of a noise network (arXiv 2308.15321): a constant, or a line.

    The constant multiplies eps. The line divides it by c(n) = k n + c_0. Both minimise the first
    distance of the cell that ``config.eps_scale`` names: a bounded Brent search finds the constant,
    and in twice as many evaluations a bounded Nelder-Mead search finds c(0) and c(N). The images
    have another seed than those of the tables.
    """

    def __init__(
        self, store: Store, line: Line, seed: int, base: StageTask, *, is_line: bool = False
    ) -> None:
        self.store = store
        self.is_line = is_line
        self.line = line  # with what its sampling sets, such as clip_x0
        self.seed = seed
        self.base = base
        self.needs: tuple[Task, ...] = (base,)
        self.settings = store.grid.config.eps_scale
        name = f"{'eps_line' if is_line else 'eps_scale'}_{self._digest()}.json"
        self.path = store.training_folder(line, seed) / name
        self.name = self.path.relative_to(store.folder).as_posix()

    @property
    def evaluations(self) -> float:
        """Each evaluation of the metric samples one cell."""
        settings = self.settings
        sample = self.store.grid.experiment(self.line, self.seed).sample
        calls = calls_an_image(sample, settings.process, settings.steps)
        return self._tries * settings.n_images * calls

    @property
    def _tries(self) -> int:
        return self.settings.evaluations * (2 if self.is_line else 1)

    def is_done(self) -> bool:
        """Whether the scaling was found."""
        return is_whole(self.path)

    def result(self) -> dict[str, Any]:
        """``eps_scale``, and for a line ``eps_line``: arguments of ``corrections.scaled``."""
        return read_json(self.path, DAMAGED, scaling_of)

    def run(self) -> None:
        """Find the scaling."""
        tried: list[dict[str, Any]] = []

        def metric(scaling: dict[str, Any]) -> float:
            metrics = self._metrics(scaling)
            name = next(name for name in metrics if name.startswith(("fid", "frechet_")))
            tried.append({**scaling, name: metrics[name]})
            return metrics[name]

        (self._search_line if self.is_line else self._search_constant)(metric)
        best = min(tried, key=lambda one: list(one.values())[-1])
        write_json(self.path, {**scaling_of(best), "tried": tried})

    def _search_constant(self, metric: Callable[[dict[str, Any]], float]) -> None:
        from scipy.optimize import minimize_scalar

        minimize_scalar(
            lambda scale: metric({"eps_scale": float(scale)}),
            bounds=(self.settings.low, self.settings.high),
            method="bounded",
            options={"maxiter": self._tries, "xatol": 1e-3},
        )

    def _search_line(self, metric: Callable[[dict[str, Any]], float]) -> None:
        from scipy.optimize import minimize

        N = self.store.grid.config.experiment.schedule.N
        low, high = 1 / self.settings.high, 1 / self.settings.low
        start, side = (low + high) / 2, (high - low) / 4

        def metric_of(ends: Sequence[float]) -> float:
            first, last = map(float, ends)
            return metric({"eps_scale": 1.0, "eps_line": [(last - first) / N, first]})

        minimize(
            metric_of,
            (start, start),
            method="Nelder-Mead",
            bounds=[(low, high)] * 2,
            options={
                "initial_simplex": [(start, start), (start - side, start), (start, start - side)],
                "maxfev": self._tries,
                "xatol": 1e-3,
                "fatol": float("inf"),
            },
        )

    def _metrics(self, scaling: dict[str, Any]) -> dict[str, float]:
        store, settings = self.store, self.settings
        experiment = store.experiment(self.line, self.seed, settings.process)
        network, typ = store.network(self.base.stage)
        source = experiment.source(
            settings.process,
            settings.steps,
            network,
            typ,
            call=scaled(experiment, **scaling),
            seed=self.seed + FIT_SEED,
            progress=False,
        )
        batches = source.batches(0, settings.n_images)
        reference = store.reference(experiment.config)
        return evaluate(batches, reference, splits=experiment.config.evaluate.splits)

    def _digest(self) -> str:
        config = self.store.grid.experiment(self.line, self.seed)
        sections = {name: config[name].to_dict() for name in ("sample", "evaluate")}
        return digest({**sections, "eps_scale": self.settings.to_dict()})


class CellTask:
    """The metrics of one cell; only its first images are stored."""

    def __init__(
        self,
        store: Store,
        cell: Cell,
        base: StageTask,
        second: StageTask | None,
        fit: EpsScaleTask | None,
    ) -> None:
        self.store = store
        self.cell = cell
        self.base = base
        self.second = second
        self.fit = fit
        self.needs: tuple[Task, ...] = tuple(t for t in (base, second, fit) if t is not None)
        config = store.grid.experiment(cell.line, cell.seed, cell.process)
        scale = store.grid.eps_scale(cell.line) if fit is None else {"fit": Path(fit.name).name}
        folder = store.folder / "cells" / training_name(config)
        name = cell_name(config, cell, scale, store.grid.correction(cell.line))
        self.path = folder / f"{name}.json"
        self.name = self.path.relative_to(store.folder).as_posix()
        calls = calls_of_cell(store.grid, cell, config.sample)
        self.evaluations = float(config.sample.n_images * calls)

    def is_done(self) -> bool:
        """Whether the metrics, the first images and their picture are there and whole."""
        return all(map(is_whole, (self.path, self._images_path, self._picture_path)))

    @property
    def _images_path(self) -> Path:
        return self.path.with_suffix(".npz")

    @property
    def _picture_path(self) -> Path:
        return self.path.with_suffix(".grid.png")

    def result(self) -> dict[str, Any]:
        """``metrics``, ``seconds``, ``eps_scale``, ``made_with``; what was fitted or chosen."""
        return read_json(self.path, DAMAGED, as_result)

    def first_images(self) -> Tensor:
        """The first images, uint8 [n, C, H, W]."""
        return first_images(self._images_path, GRID_IMAGES)

    def run(self) -> None:
        """Sample and measure; the metrics are written last. A lost picture alone is drawn again."""
        if is_whole(self.path) and is_whole(self._images_path):
            save_grid(self._picture_path, self.first_images(), columns=GRID_COLUMNS)
            return
        began = time.monotonic()
        experiment = self.store.experiment(self.cell.line, self.cell.seed, self.cell.process)
        scaling: dict[str, Any] = {"eps_scale": self.store.grid.eps_scale(self.cell.line)}
        if self.fit is not None:
            scaling = self.fit.result()
        config = experiment.config
        first: list[Tensor] = []
        network = self.network()
        call, chosen = corrected(self.store, experiment, self.cell, network)
        scale_eps = scaled(experiment, **scaling)
        source = experiment.source(
            self.cell.process,
            self.cell.steps,
            network.network,
            network.typ,
            network.gamma,
            call=lambda found: call(scale_eps(found)),
        )
        batches = source.batches(0, config.sample.n_images)
        reference = self.store.reference(config)
        metrics = evaluate(_kept(batches, first), reference, splits=config.evaluate.splits)
        self._store_images(torch.stack(first))
        result = {
            "metrics": metrics,
            **scaling,
            **chosen,
            "seconds": round(time.monotonic() - began, 2),
            "made_with": made_with(self.store.device, self.cell.process),
        }
        write_json(self.path, result)

    def network(self) -> Network:
        """What the cell samples with."""
        is_gamma = self.second is not None and isinstance(self.second.stage, GammaStage)
        stage = self.base.stage if self.second is None or is_gamma else self.second.stage
        return Network(*self.store.network(stage), self.second.stage.result() if is_gamma else None)

    def _store_images(self, images: Tensor) -> None:
        save_grid(self._picture_path, images, columns=GRID_COLUMNS)
        with written_atomically(self._images_path, sync=True) as file:
            np.savez_compressed(file, images.permute(0, 2, 3, 1).numpy())


def as_result(found: Any) -> dict[str, Any]:
    """A cell's result; raises unless every part has the type that the report expects."""
    check_cell(found["metrics"])
    checked = {**scaling_of(found), "seconds": float(found["seconds"])}
    return {**found, **checked, "made_with": dict(found["made_with"])}


def scaling_of(found: Any) -> dict[str, Any]:
    """``eps_scale``, and ``eps_line`` (k, c_0) where it was fitted, of a cell or of a fit."""
    scaling: dict[str, Any] = {"eps_scale": float(found["eps_scale"])}
    if "eps_line" in found:
        k, c_0 = map(float, found["eps_line"])
        scaling["eps_line"] = [k, c_0]
    return scaling


class GapTask:
    """The total gap along chains from x_start: Figure 4 of the SA paper."""

    def __init__(self, store: Store, line: Line, seed: int, base: StageTask) -> None:
        self.store = store
        self.line = line
        self.seed = seed
        self.base = base
        self.needs: tuple[Task, ...] = (base,)
        self.settings = store.grid.config.gap
        config = store.grid.experiment(line, seed)
        kept = {key: self.settings[key] for key in ("start", "n_images")}
        kept["clip_x0"] = config.sample.clip_x0
        name = f"{training_name(config)}_{kept['start']}_{digest({'gap of spread images': kept})}"
        self.path = store.folder / "gap" / f"{name}.npz"
        self.name = self.path.relative_to(store.folder).as_posix()
        self.evaluations = float(kept["n_images"] * kept["start"])

    def is_done(self) -> bool:
        """Whether the curve is there."""
        return is_whole(self.path)

    def run(self) -> None:
        """Follow the chains of images of all parts of the data, with the seed's noise."""
        store, settings = self.store, self.settings
        experiment = store.experiment(self.line, self.seed, None)
        x0, labels = experiment.examples(settings.n_images)
        curve = gap_along_chain(
            experiment.wrapper(*store.network(self.base.stage)),
            experiment.schedule,
            x0,
            start=settings.start,
            seed=self.seed,
            batch_size=settings.batch_size,
            clip_x0=experiment.config.sample.clip_x0,
            **labels,
        )
        with written_atomically(self.path, sync=True) as file:
            np.savez(file, **{f.name: getattr(curve, f.name) for f in fields(curve)})

    def result(self) -> GapCurve:
        """The curve."""
        return GapCurve(**read_arrays(self.path, DAMAGED, *(f.name for f in fields(GapCurve))))


def made_with(device: str, process: str) -> dict[str, str]:
    """Versions and device, stored with a result; a solver's row rests on diffusers, too."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else "cpu"
    solver = {"diffusers": version("diffusers")} if get_process(process).solver else {}
    return solver | {
        "sa_plugin": sa_plugin.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": str(torch.get_num_threads()),
    }


def _kept(batches: Iterator[Tensor], first: list[Tensor]) -> Iterator[Tensor]:
    """Pass the batches on; their first images, one by one, go to ``first``."""
    for batch in batches:
        first.extend(batch[: GRID_IMAGES - len(first)].cpu())
        yield batch
