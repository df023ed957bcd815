"""The stages of an experiment in order, and the command that runs them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from adapters.experiment.config import claimed, read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.stages import EvaluateStage, SampleStage, TrainStage
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


def _run(adapter: Adapter, argv: Sequence[str]) -> None:
    line = read_command_line(argv, adapter.stages, adapter.module)
    device = distributed.local_device(line.device)
    experiment = Experiment(adapter, line.config, line.workdir, device, line.progress)
    stages = stages_of(experiment)
    chosen = [stages[name] for name in line.stages or stages if name in stages]
    if line.dry_run:
        if distributed.is_first():
            _print_plan(experiment, chosen)
        return
    _ = experiment.dataset  # raises for a missing dataset before anything is written
    distributed.start(device)
    with ExitStack() as stack, distributed.peers():
        claim = claimed(line.workdir, adapter.recorded(line.config))
        distributed.on_first(stack.enter_context, claim)
        _run_all(chosen)


def _run_all(stages: Sequence[Stage]) -> None:
    """Run the stages in order; all processes train together, the first one does the rest."""
    together = [stage for stage in stages if stage.name in TRAININGS]
    for stage in together:
        _run_one(stage)
        distributed.gather(None)  # all wait until the first has written the result
    distributed.stop()
    for stage in stages if distributed.is_first() else ():
        if stage not in together:
            _run_one(stage)


def _run_one(stage: Stage) -> None:
    logger.info("%s: %s", stage.name, "done" if stage.is_done() else stage.plan())
    stage.run()


def _print_plan(experiment: Experiment, stages: Sequence[Stage]) -> None:
    print(f"{experiment.config.name} in {experiment.workdir} on {experiment.device}")
    for stage in stages:
        print(f"  {stage.name:<9} {'done ' if stage.is_done() else 'to do'}  {stage.plan()}")
