"""The commands under test: real ones on 8x8 digits, small enough to run hundreds of times."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters import compare, sample
from adapters.experiment.run import run
from adapters.hosts import ANALYTIC_DPM, NPR_DPM, SN_DPM, Adapter
from benchmarks.faults.launch import Command, Launched

_COMMON = ("--device=cpu", "--noprogress")
_NETWORK = {"model_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}
_TRAINING = (
    "--config.base.iterations=30",
    "--config.base.batch_size=4",
    "--config.base.log_every=5",
    "--config.base.ckpt_every=7",
    "--config.baseline=False",  # it would be trained beside the folder
)
_ALL_STAGES = {
    "base.iterations": 10,
    "base.batch_size": 4,
    "base.ckpt_every": 4,
    "head.iterations": 10,
    "head.batch_size": 4,
    "head.ckpt_every": 4,
    "gamma.n_images": 16,
    "schedule.N": 60,
    "sample.n_images": 64,
    "sample.steps": (3,),
    "evaluate.features": ("pixels",),
}
# Locks, reports (they add up the seconds), TensorBoard's events (named by time), caches.
_SKIPPED = frozenset({".lock", "locks", "reports", "tensorboard", "cache", "failed"})


def _network(section: str = "") -> tuple[str, ...]:
    """The smallest network, as options."""
    return tuple(f"--config.{section}network.args.{k}={v}" for k, v in _NETWORK.items())


_GRID = (
    "--config=configs/digits_tables.py",
    *_network("experiment."),
    "--config.experiment.schedule.N=30",
    "--config.experiment.base.iterations=10",
    "--config.experiment.base.batch_size=4",
    "--config.experiment.base.ckpt_every=4",
    "--config.experiment.gamma.n_images=16",
    "--config.experiment.sample.n_images=64",
    "--config.experiment.evaluate.features=('pixels',)",
    "--config.seeds=(0,)",
    "--config.tables=('main',)",
    "--config.parts.main.processes=('ddpm_small','analytic_ddpm')",
    "--config.parts.main.steps=(3,)",
    "--config.gap.start=5",
    "--config.gap.n_images=8",
)


@dataclass(frozen=True)
class Job:
    """A command, and the files it needs.

    Attributes:
        command: the command for a folder.
        prepare: writes the files that the command starts from into a folder.
        skipped: names of files and folders that are no results.
    """

    name: str
    command: Callable[[Path], Command]
    prepare: Callable[[Path], None] = lambda folder: None
    skipped: frozenset[str] = _SKIPPED

    def results(self, folder: Path) -> dict[str, bytes]:
        """All files of a finished command that its configuration determines."""
        found = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and not (self.skipped & set(relative.parts) or _set_aside(relative)):
                found[str(relative)] = _content(path, folder)
        return found


def _set_aside(path: Path) -> bool:
    """Whether it is in a damaged checkpoint, which the training before the fault does not have."""
    return any(part.endswith(".damaged") for part in path.parts)


def _content(path: Path, folder: Path) -> bytes:
    if path.suffix != ".json" or not path.stat().st_size:
        return path.read_bytes().replace(bytes(folder), b"FOLDER")  # in a report's command
    content = json.loads(path.read_text())
    content.pop("seconds", None)  # measured in a cell
    return json.dumps(content, sort_keys=True).encode()


def all_jobs(scratch: Path) -> dict[str, Job]:
    """The jobs by name; the files that several of them start from are made in ``scratch``."""
    weights = scratch / "weights.pth"
    _save_weights(weights)

    def sampling(form: str, processes: int) -> Callable[[Path], Command]:
        return lambda folder: Command(sample.main, _sampling(folder, weights, form), processes)

    def training(processes: int) -> Callable[[Path], Command]:
        return lambda folder: Command(partial(run, SN_DPM), _trainings(folder), processes)

    def grid(workers: int) -> Callable[[Path], Command]:
        more = (f"--workers={workers}", *_COMMON)
        return lambda folder: Command(_grid, ("compare", *_GRID, f"--workdir={folder}", *more))

    def after(name: str, command: Callable[[Path], Command]) -> Callable[[Path], None]:
        return lambda folder: _copy_finished(scratch / name / folder.name, command, folder)

    sn = _all_stages(SN_DPM)
    longer, more_steps = {"base.iterations": 14}, {"sample.steps": (3, 4)}
    report = Job(
        "report",
        lambda f: Command(_grid, (*grid(1)(f).argv, "--report_only")),
        after("grid", grid(1)),
        _SKIPPED - {"reports"},
    )
    jobs = [
        Job("training", training(1)),
        Job("training, 2 processes", training(2)),
        Job("Gamma", _gamma("gamma"), after("trained", _gamma("base"))),
        Job("sampling", sampling("png", 1)),
        Job("sampling, 2 processes", sampling("npz", 2)),
        Job("grid", grid(1)),
        Job("grid, 2 workers", grid(2)),
        Job("SN-DPM, all stages", sn),
        Job("NPR-DPM, all stages", _all_stages(NPR_DPM)),
        Job("Analytic-DPM, all stages", _all_stages(ANALYTIC_DPM)),
        Job("SN-DPM, more iterations", _all_stages(SN_DPM, longer), after("finished", sn)),
        Job("SN-DPM, more steps", _all_stages(SN_DPM, more_steps), after("finished", sn)),
        report,
    ]
    return {job.name: job for job in jobs}


def _all_stages(
    adapter: Adapter, changes: dict[str, Any] | None = None
) -> Callable[[Path], Command]:
    """A whole run: noise network, head or Gamma, images and metrics."""
    options = [f"--config.{key}={value}" for key, value in (_ALL_STAGES | (changes or {})).items()]
    file = f"--config=configs/digits.py:{adapter.name}"
    words = (adapter.module, file, *_network(), *options, *_COMMON)
    return lambda folder: Command(partial(run, adapter), (*words, f"--workdir={folder}"))


def _gamma(stage: str) -> Callable[[Path], Command]:
    return lambda folder: Command(partial(run, ANALYTIC_DPM), _gamma_words(folder, stage))


def _grid(argv: tuple[str, ...]) -> int:
    # The command starts its workers as new interpreters. Forks of this process skip the imports.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _: get_context("fork")
    return compare.main(argv)


def _trainings(folder: Path) -> tuple[str, ...]:
    words = ("sn_dpm", "--config=configs/digits_sn_sa.py", *_network(), *_TRAINING)
    return (*words, "--stage=base", f"--workdir={folder}", *_COMMON)


def _gamma_words(folder: Path, stage: str) -> tuple[str, ...]:
    sizes = ("--config.base.iterations=2", "--config.base.batch_size=4", "--config.schedule.N=60")
    gamma = (
        "--config.gamma.n_images=16",
        "--config.gamma.batch_size=8",
        "--config.sample.steps=(5,)",
    )
    words = ("analytic_dpm", "--config=configs/digits.py:analytic", *_network())
    return (*words, *sizes, *gamma, f"--stage={stage}", f"--workdir={folder}", *_COMMON)


def _sampling(folder: Path, weights: Path, form: str) -> tuple[str, ...]:
    words = ("sample", "--config=configs/digits_sn_sa.py", *_network(), *_COMMON)
    cell = ("--process=ddpm_small", "--steps=6", f"--weights={weights}", f"--format={form}")
    sizes = ("--config.sample.n_images=256", "--config.sample.batch_size=64")
    return (*words, *cell, *sizes, f"--out={folder}")


def _copy_finished(source: Path, command: Callable[[Path], Command], folder: Path) -> None:
    """Copy what a command has made in ``source``; the first call runs it."""
    if not source.exists():
        launched = Launched(command(source), source.with_suffix(".log"))
        if launched.wait() != [0]:
            raise RuntimeError(f"{source} failed undisturbed:\n{launched.said()}")
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_SKIPPED))


def _save_weights(path: Path) -> None:
    """Random weights of the network that the sampling needs."""
    from configs import digits
    from third_party.common.nets import UNetModel

    arguments = digits.get_config("sn").network.args.to_dict() | _NETWORK
    torch.manual_seed(0)
    network = UNetModel(**arguments, in_channels=1, out_channels=1)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    torch.save(network.state_dict(), path)
