"""The stages of an experiment in order, and the command that runs them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from ml_collections import ConfigDict, FrozenConfigDict

from adapters.experiment.checks import cautions, check_evaluation
from adapters.experiment.config import CommandLine, read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.folder import OVERVIEW_FILE, change_by, claimed_run
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.identity import default_workdir
from adapters.experiment.stages import EvaluateStage, SampleStage, TrainStage
from adapters.experiment.tables import against
from adapters.hosts import Adapter
from adapters.shell.command import EXIT_FAILED, exit_code
from third_party.common import distributed

logger = logging.getLogger(__name__)

TRAININGS = ("base", "head")


class Stage(Protocol):
    """A part of an experiment; its result is in the output folder."""

    name: str

    def plan(self) -> str:
        """What it does, in one line."""

    def is_done(self) -> bool:
        """Whether its result exists."""

    def run(self) -> None:
        """Make the missing parts of its result."""


def stages_of(experiment: Experiment) -> dict[str, Stage]:
    """The stages in order."""
    base = TrainStage(experiment, "base", experiment.base_method)
    head = gamma = None
    if experiment.adapter.needs == "gamma":
        gamma = GammaStage(experiment, base)
    elif not experiment.is_joint:
        head = TrainStage(experiment, "head", experiment.adapter.pretrained, base)
    sample = SampleStage(experiment, base, head or base, gamma.result if gamma else None)
    every = [base, head, gamma, sample, EvaluateStage(experiment, sample)]
    return {stage.name: stage for stage in every if stage is not None}


def run(adapter: Adapter, argv: Sequence[str] | None = None) -> int:
    """Run an experiment from the command line; return the code of ``exit_code``.

    1 means that the disk is full or another process has stopped: the same command continues.
    """
    level = logging.INFO if distributed.is_first() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", force=True)
    words = sys.argv if argv is None else argv
    return exit_code(adapter.module, lambda: _run(adapter, words), failed=EXIT_FAILED)


@dataclass(frozen=True)
class Run:
    """One experiment of a command, with its stages."""

    experiment: Experiment
    stages: dict[str, Stage]
    chosen: list[Stage]

    @classmethod
    def of(cls, adapter: Adapter, line: CommandLine, device: str) -> Run:
        """The run of a command line."""
        experiment = Experiment(adapter, line.config, line.workdir, device, line.progress)
        stages = stages_of(experiment)
        return cls(experiment, stages, [stages[n] for n in line.stages or stages if n in stages])

    @property
    def names(self) -> list[str]:
        """The names of the chosen stages."""
        return [stage.name for stage in self.chosen]


def _run(adapter: Adapter, argv: Sequence[str]) -> None:
    line = read_command_line(argv, adapter.stages, adapter.module)
    device = distributed.local_device(line.device)
    runs = [Run.of(adapter, one, device) for one in _with_baseline(line)]
    for run in runs:
        if "evaluate" in run.names:
            check_evaluation(run.experiment)
    if line.dry_run:
        for run in runs if distributed.is_first() else ():
            _print_plan(run)
        return
    for run in runs:
        _ = run.experiment.dataset  # raises for a missing dataset before anything is written
    distributed.start(device)
    with ExitStack() as stack, distributed.peers():
        for caution in cautions(runs[-1].experiment, runs[-1].names):
            logger.info("warning: %s", caution)
        for run in runs:
            experiment = run.experiment
            claim = claimed_run(experiment.workdir, adapter.recorded(experiment.config))
            distributed.on_first(stack.enter_context, claim)
        _run_all(runs)
        if len(runs) == 2 and distributed.is_first():
            print(_answer(adapter, *runs))


def _with_baseline(line: CommandLine) -> list[CommandLine]:
    """The runs of a command: its own, and before it the baseline where that is asked for."""
    if not line.config.baseline or not line.config.sa.lam:
        return [line]
    plain = ConfigDict(line.config.to_dict())
    plain.sa.lam = 0.0
    config = FrozenConfigDict(plain)
    workdir = line.workdir.with_name(f"{line.workdir.name}_baseline")
    if line.workdir == default_workdir(line.config).absolute():
        workdir = default_workdir(config).absolute()
    return [replace(line, config=config, workdir=workdir), line]


def _run_all(runs: Sequence[Run]) -> None:
    """Run the stages in order; all processes train together, the first one does the rest."""
    stages = [stage for run in runs for stage in run.chosen]
    together = [stage for stage in stages if stage.name in TRAININGS]
    for stage in together:
        _run_one(stage)
        distributed.gather(None)  # all wait until the first has written the result
    distributed.stop()
    for stage in stages if distributed.is_first() else ():
        if stage not in together:
            _run_one(stage)


def _answer(adapter: Adapter, b: Run, sa: Run) -> str:
    """Both runs in one table, where their pictures are, and what to run next; "" if unmeasured."""
    found = [run.stages["evaluate"] for run in (b, sa)]
    if not all(isinstance(stage, EvaluateStage) and stage.is_done() for stage in found):
        return ""
    loss, config = sa.experiment.loss, sa.experiment.config
    title = f"SA-{loss.K}" + ("" if config.sa.lam == 1 else f", lambda {config.sa.lam:g}")
    table = against(found[0].metrics(), found[1].metrics(), line=title)
    pictures = "\n".join(f"  {run.experiment.workdir / OVERVIEW_FILE}" for run in (b, sa))
    return (
        f"{table}\nPictures:\n{pictures}\n"
        f"Next: the same with --config.seed={config.seed + 1}, or what SA will do for your images "
        "and steps, without training: python -m adapters.predict --help"
    )


def _run_one(stage: Stage) -> None:
    logger.info("%s: %s", stage.name, "done" if stage.is_done() else stage.plan())
    stage.run()


def _print_plan(run: Run) -> None:
    experiment = run.experiment
    change = change_by(experiment.workdir, experiment.adapter.recorded(experiment.config))
    experiment.replaced = frozenset(change.paths)
    print(f"{experiment.config.name} in {experiment.workdir} on {experiment.device}")
    if change.paths:
        print(f"  replaced  {change}")
    for stage in run.chosen:
        print(f"  {stage.name:<9} {'done ' if stage.is_done() else 'to do'}  {stage.plan()}")
    for caution in cautions(experiment, run.names):
        print(f"  warning: {caution}")
