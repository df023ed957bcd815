"""All tasks of a grid: what each task needs, and the best order to run them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from adapters.comparison.grid import FITTED, Cell, Line
from adapters.comparison.store import Store
from adapters.comparison.tasks import CellTask, EpsScaleTask, GapTask, StageTask, Task
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.identity import goes_on_from
from adapters.experiment.stages import TrainStage
from adapters.hosts import get_process
from adapters.sampling.solvers import solver_sampler


class Plan:
    """All tasks of a grid.

    Attributes:
        tasks: all tasks, by name.
        cells: the tasks of the cells. gaps: the tasks of the gap curves, by (training, seed).

    Raises:
        ValueError: an experiment cannot be run. Nothing has been written then.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tasks: dict[str, Task] = {}
        self.cells: dict[Cell, CellTask] = {}
        self.gaps: dict[tuple[str, int], GapTask] = {}
        self._base = lru_cache(maxsize=None)(self._make_base)  # shared by all cells of a training
        grid = store.grid
        for seed in grid.seeds:
            for cell in (cell for cell in grid.cells if cell.seed == seed):
                self.cells[cell] = self._cell(cell)
            for name in grid.config.gap.trainings:
                line = Line(name)
                task = GapTask(store, line, seed, self._base(name, seed))
                self.gaps[name, seed] = self._add(task)

    def in_order(self) -> list[Task]:
        """The best order: seed by seed, trainings before their cells, so workers soon have work."""
        tasks = list(self.tasks.values())
        rank = {StageTask: 0, EpsScaleTask: 1, CellTask: 2, GapTask: 2}
        seeds = {t.name: _seed_of(t) for t in tasks}
        return sorted(tasks, key=lambda t: (seeds[t.name], rank[type(t)], len(t.needs)))

    def restore(self) -> None:
        """Restore what the stages that are done have lost besides their results."""
        for task in self.tasks.values():
            if isinstance(task, StageTask) and task.is_done():
                task.run()

    def _cell(self, cell: Cell) -> CellTask:
        base = self._base(cell.line.training, cell.seed)
        row = get_process(cell.process)
        if row.solver:
            solver_sampler()  # raises without diffusers
        self._check_correction(cell, base)
        second = self._second(cell, base) if row.needs else None
        fit, asked = None, self.store.grid.eps_scale(cell.line)
        if asked in FITTED:
            is_line = asked == "line"
            fit = self._add(EpsScaleTask(self.store, cell.line, cell.seed, base, is_line=is_line))
        return self._add(CellTask(self.store, cell, base, second, fit))

    def _check_correction(self, cell: Cell, base: StageTask) -> None:
        """ValueError for a q that no closed form tells, and for norms with classes."""
        asked, name = self.store.grid.correction(cell.line), f"samplings.{cell.line.sampling}"
        if asked is None:
            return
        if asked["name"] == "norms":
            if base.stage.experiment.config.data.labels:
                raise ValueError(
                    f"{name}.correction must not be 'norms' with data.labels: the images that it "
                    "compares would have other labels than the samples"
                )
        elif not asked["q"] and not get_process(cell.process).has_closed_form:
            raise ValueError(
                f"{name}.q must be > 0 for {cell.process!r}, whose best q has no closed form, got 0"
            )

    def _make_base(self, training: str, seed: int) -> StageTask:
        experiment = self.store.experiment(Line(training), seed, None)
        settings, loss = experiment.config.base, experiment.loss
        # A backward pass costs as much as two forward passes; calls without a graph have none.
        differentiated = 1 if loss.lam == 0 or loss.backprop == "one" else loss.K
        calls = 2 * differentiated + (loss.K if loss.lam else 1)
        start = self._beginning(training, seed)
        iterations = settings.iterations - (start.stage.settings.iterations if start else 0)
        cost = float(iterations * settings.batch_size * calls)
        stage = TrainStage(experiment, "base", experiment.base_method)
        init = self.store.grid.init(training)
        init_task = self._base(init, seed) if init else None
        return self._add(StageTask(self.store, stage, (), cost, start, init_task))

    def _beginning(self, training: str, seed: int) -> StageTask | None:
        """The longest of the grid's trainings that this one continues."""
        grid = self.store.grid
        configs = {name: grid.experiment(Line(name), seed) for name in grid.trainings}
        config = configs[training]
        shorter = [name for name, other in configs.items() if goes_on_from(config, other)]
        if not shorter:
            return None
        return self._base(max(shorter, key=lambda name: configs[name].base.iterations), seed)

    def _second(self, cell: Cell, base: StageTask) -> StageTask:
        line = Line(cell.line.training)
        experiment = self.store.experiment(line, cell.seed, cell.process)
        stage: TrainStage | GammaStage
        if experiment.adapter.needs == "gamma":
            stage = GammaStage(experiment, base.stage)
            cost = stage.settings.n_images * stage.settings.noises * experiment.schedule.N
        else:
            method, settings = experiment.adapter.pretrained, experiment.config.head
            stage = TrainStage(experiment, "head", method, base.stage)
            # Only the frozen network's forward pass counts: the head is small.
            cost = settings.iterations * settings.batch_size
        return self._add(StageTask(self.store, stage, (base,), float(cost)))

    def _add(self, task: Any) -> Any:
        """Add a task; return it, or the equal one that was added before."""
        return self.tasks.setdefault(task.name, task)


def _seed_of(task: Any) -> int:
    if isinstance(task, CellTask):
        return task.cell.seed
    return task.stage.experiment.config.seed if isinstance(task, StageTask) else task.seed
