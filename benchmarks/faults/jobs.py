"""The commands under test: real ones on 8x8 digits, small enough to run hundreds of times."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters import compare, sample
from adapters.experiment.run import run
from adapters.hosts import ANALYTIC_DPM, SN_DPM
from benchmarks.faults.launch import Command, Launched

_COMMON = ("--device=cpu", "--noprogress")
_NETWORK = {"model_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}
_TRAINING = (
    "--config.base.iterations=30",
    "--config.base.batch_size=4",
    "--config.base.log_every=5",
    "--config.base.ckpt_every=7",
)


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
        shared: two of these commands may work in one folder.
    """

    name: str
    command: Callable[[Path], Command]
    prepare: Callable[[Path], None] = lambda folder: None
    shared: bool = False


def results(folder: Path) -> dict[str, bytes]:
    """All files of a finished command that its configuration determines.

    Locks, reports, TensorBoard's events (named by time) and caches are left out.
    """
    skipped = {"locks", "reports", "tensorboard", "cache", "failed"}
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and path.name != ".lock" and not skipped & set(relative.parts):
            found[str(relative)] = _content(path)
    return found


def _content(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    content.pop("seconds", None)  # measured in a cell
    return json.dumps(content, sort_keys=True).encode()


def all_jobs(scratch: Path) -> dict[str, Job]:
    """The jobs by name; the files that several of them start from are made in ``scratch``."""
    weights, trained = scratch / "weights.pth", scratch / "trained"
    _save_weights(weights)
    _train_for_gamma(trained)

    def sampling(form: str, processes: int) -> Callable[[Path], Command]:
        return lambda folder: Command(sample.main, _sampling(folder, weights, form), processes)

    def training(processes: int) -> Callable[[Path], Command]:
        return lambda folder: Command(_train, _trainings(folder), processes)

    def grid(workers: int) -> Callable[[Path], Command]:
        more = (f"--workers={workers}", *_COMMON)
        return lambda folder: Command(_grid, ("compare", *_GRID, f"--workdir={folder}", *more))

    jobs = [
        Job("training", training(1)),
        Job("training, 2 processes", training(2)),
        Job("Gamma", lambda f: Command(_gamma, _gamma_words(f)), lambda f: _copy(trained, f)),
        Job("sampling", sampling("png", 1)),
        Job("sampling, 2 processes", sampling("npz", 2)),
        Job("grid", grid(1), shared=True),
        Job("grid, 2 workers", grid(2), shared=True),
    ]
    return {job.name: job for job in jobs}


def _train(argv: tuple[str, ...]) -> int:
    return run(SN_DPM, argv)


def _gamma(argv: tuple[str, ...]) -> int:
    return run(ANALYTIC_DPM, argv)


def _grid(argv: tuple[str, ...]) -> int:
    # The command starts its workers as new interpreters. Forks of this process skip the imports.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _: get_context("fork")
    return compare.main(argv)


def _trainings(folder: Path) -> tuple[str, ...]:
    words = ("sn_dpm", "--config=configs/digits_sn_sa.py", *_network(), *_TRAINING)
    return (*words, "--stage=base", f"--workdir={folder}", *_COMMON)


def _gamma_words(folder: Path, stage: str = "gamma") -> tuple[str, ...]:
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


def _train_for_gamma(folder: Path) -> None:
    command = Command(_gamma, _gamma_words(folder, "base"))
    launched = Launched(command, folder.with_suffix(".log"))
    if launched.wait() != [0]:
        raise RuntimeError(f"the training before Gamma failed:\n{launched.said()}")


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


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
