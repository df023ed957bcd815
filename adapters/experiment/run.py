"""The stages of an experiment in order, and the command that runs them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from ml_collections import ConfigDict, FrozenConfigDict

from adapters.experiment.checks import cautions, check_data, check_evaluation, noise_like
from adapters.experiment.config import CommandLine, read_command_line
from adapters.experiment.experiment import Experiment, load_dataset
from adapters.experiment.folder import OVERVIEW_FILE, change_by, claimed_run
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.identity import default_workdir, loss_title
from adapters.experiment.own_images import check_images, record_images
from adapters.experiment.stages import EvaluateStage, SampleStage, TrainStage
from adapters.experiment.tables import Metrics, against
from adapters.hosts import Adapter
from adapters.shell.command import EXIT_FAILED, exit_code, one_line_warnings
from adapters.shell.processes import ended, new_pool, torch_threads
from sa_files import progress
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
    _log_as("")
    words = sys.argv if argv is None else argv
    with one_line_warnings(adapter.module):
        return exit_code(adapter.module, lambda: _run(adapter, words), failed=EXIT_FAILED)


def _log_as(prefix: str) -> None:
    level = logging.INFO if distributed.is_first() else logging.WARNING
    logging.basicConfig(level=level, format=f"{prefix}%(message)s", force=True)


@dataclass(frozen=True)
class Run:
    """One experiment of a command, with its stages."""

    experiment: Experiment
    stages: dict[str, Stage]
    chosen: list[Stage]

    @classmethod
    def of(cls, adapter: Adapter, line: CommandLine, device: str, **options: Any) -> Run:
        """The run of a command line; ``options``: the experiment's, such as ``load``."""
        experiment = Experiment(
            adapter, line.config, line.workdir, device, line.progress, **options
        )
        stages = stages_of(experiment)
        return cls(experiment, stages, [stages[n] for n in line.stages or stages if n in stages])

    @property
    def names(self) -> list[str]:
        """The names of the chosen stages."""
        return [stage.name for stage in self.chosen]

    @property
    def is_done(self) -> bool:
        """Whether no chosen stage has work left."""
        return all(stage.is_done() for stage in self.chosen)

    @property
    def title(self) -> str:
        """What its tables are headed by: "B", or such as "SA-2"."""
        return loss_title(self.experiment.config.sa)


def _run(adapter: Adapter, argv: Sequence[str]) -> None:
    line = read_command_line(argv, adapter.stages, adapter.module)
    device = distributed.local_device(line.device)
    lines = _with_baseline(line)
    images = cache(partial(load_dataset, line.config.data))  # both runs have the same
    options: dict[str, Any] = {"load": lambda _, **of: images(**of)}
    runs = [Run.of(adapter, one, device, **options) for one in lines]
    for run in runs:
        if "evaluate" in run.names:
            check_evaluation(run.experiment)
    if line.dry_run:
        for run in runs if distributed.is_first() else ():
            _print_plan(run)
        return
    dataset = runs[-1].experiment.dataset  # raises for a missing one before anything is written
    for run in runs:
        check_images(run.experiment.workdir, line.config.data, dataset)
    distributed.start(device)
    with ExitStack() as stack, distributed.peers():
        for run in runs:
            experiment = run.experiment
            claim = claimed_run(experiment.workdir, adapter.recorded(experiment.config))
            distributed.on_first(stack.enter_context, claim)
            distributed.on_first(record_images, experiment.workdir, line.config.data, dataset)
        for caution in cautions(runs[-1].experiment, runs[-1].names):
            logger.info("warning: %s", caution)
        if len(runs) == 2 and (threads := _threads_for_two(runs)):
            with torch_threads(threads):
                _run_two(lines[0], runs, threads)
        else:
            _run_all(runs)
        if distributed.is_first() and (
            said := _answer(*runs) if len(runs) == 2 else _table(runs[0])
        ):
            print(said)


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


def _threads_for_two(runs: Sequence[Run]) -> int:
    """Half the threads of PyTorch for each of two runs on a CPU; 0 where a run gets all of them.

    Two small networks at a time are faster than one after the other. The number of threads decides
    the last bits of a training, so both have it also where they do not run at the same time.
    """
    on_cpu = runs[0].experiment.device.type == "cpu"
    return torch.get_num_threads() // 2 if on_cpu and distributed.world_size() == 1 else 0


def _run_two(line: CommandLine, runs: Sequence[Run], threads: int) -> None:
    """Run B, of this line, in a new process, and SA here; one after the other if one is done."""
    if any(run.is_done for run in runs):
        _run_all(runs)
        return
    (b, sa), pool = runs, new_pool(threads)
    futures: list[Future[int]] = []
    with ended(lambda: [pool], is_idle=lambda: all(future.done() for future in futures)):
        futures.append(pool.submit(_run_in_process, b.experiment.adapter, line))
        with _speaking_as(sa.title):
            _run_all([sa])
        try:
            code = futures[0].result()
        except BrokenProcessPool as error:
            raise OSError("the process of B ended, killed or out of memory") from error
    if code:
        raise SystemExit(code)  # the process has said why


def _run_in_process(adapter: Adapter, line: CommandLine) -> int:
    """The exit code of a run whose folder the command has claimed."""
    logging.disable()  # the command has said what there is to say of the images
    run = Run.of(adapter, line, "cpu")
    logging.disable(logging.NOTSET)
    with _speaking_as(run.title):
        module = f"{run.title}: {adapter.module}"
        return exit_code(module, lambda: _run_all([run]), failed=EXIT_FAILED)


@contextmanager
def _speaking_as(title: str) -> Iterator[None]:
    """Within the block, log and progress are lines that begin with the title."""
    _log_as(f"{title}: ")
    try:
        with progress.named(title), one_line_warnings(title):
            yield
    finally:
        _log_as("")


def _run_all(runs: Sequence[Run]) -> None:
    """Run the stages in order; all processes train together, the first one does the rest."""
    titles = [f"{run.title}: " if len(runs) > 1 else "" for run in runs]
    stages = [(t, stage) for t, run in zip(titles, runs, strict=True) for stage in run.chosen]
    together = [one for one in stages if one[1].name in TRAININGS]
    for one in together:
        _run_one(*one)
        distributed.gather(None)  # all wait until the first has written the result
    distributed.stop()
    for one in stages if distributed.is_first() else ():
        if one not in together:
            _run_one(*one)


def _table(run: Run) -> str:
    """The metrics of a run; "" if they were not asked for."""
    stage = run.stages["evaluate"]
    if stage not in run.chosen or not isinstance(stage, EvaluateStage):
        return ""
    return stage.table_path.read_text() + _warned(_noise_like(run, stage.metrics()))


def _noise_like(run: Run, metrics: Metrics) -> Iterator[str]:
    return noise_like(run.title, metrics, math.prod(run.experiment.image_shape))


def _warned(cautions: Iterable[str]) -> str:
    return "".join(f"warning: {one}\n" for one in cautions)


def _answer(b: Run, sa: Run) -> str:
    """Both runs in one table, where their pictures are, and what to run next; "" if unmeasured."""
    stages = [run.stages["evaluate"] for run in (b, sa)]
    found = [s.metrics() for s in stages if isinstance(s, EvaluateStage) and s.is_done()]
    if len(found) < 2:
        return ""
    table = against(*found, line=sa.title)
    pictures = "\n".join(f"  {run.experiment.workdir / OVERVIEW_FILE}" for run in (b, sa))
    seed = sa.experiment.config.seed + 1
    limits = [*cautions(sa.experiment, sa.names), *_noise_like(b, found[0])]
    limits += _noise_like(sa, found[1])
    return (
        f"{table}\n{_warned(limits)}Pictures:\n{pictures}\n"
        f"Next: the same with --config.seed={seed}, or what SA will do for "
        "your images and steps, without training: python -m adapters.predict --help"
    )


def _run_one(whose: str, stage: Stage) -> None:
    logger.info("%s%s: %s", whose, stage.name, "done" if stage.is_done() else stage.plan())
    stage.run()


def _print_plan(run: Run) -> None:
    experiment = run.experiment
    change = change_by(experiment.workdir, experiment.adapter.recorded(experiment.config))
    experiment.replaced = frozenset(change.paths)
    if not run.is_done:
        check_data(experiment.config.data)
    print(f"{experiment.config.name} in {experiment.workdir} on {experiment.device}")
    if change.paths:
        print(f"  replaced  {change}")
    if experiment.classes is not None:
        print(f"  classes   {experiment.classes}")
    for stage in run.chosen:
        print(f"  {stage.name:<9} {'done ' if stage.is_done() else 'to do'}  {stage.plan()}")
    for caution in cautions(experiment, run.names):
        print(f"  warning: {caution}")
