"""Bits per dimension of a finished training: python -m adapters.likelihood --config configs/FILE.py

Uses the networks (and Gamma) in the folder of the configuration's experiment.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.experiment.config import (
    CommandLine,
    check_holds,
    claimed,
    read_command_line,
)
from adapters.experiment.experiment import Experiment, load_dataset
from adapters.experiment.run import stages_of
from adapters.experiment.tables import table as table_of
from adapters.hosts import PROCESSES, get_process, host_of
from adapters.shell.command import OwnOptions, exit_code, keep_freed_memory
from adapters.shell.options import own_options, whole_numbers
from sa_files.stored import read_json
from sa_files.writing import write_atomically, written_atomically
from sa_plugin.bounds.likelihood import bits_per_dim, mean_with_error, negative_elbo
from third_party.common.data import ImageDataset, to_unit_range

logger = logging.getLogger(__name__)

MODULE = "adapters.likelihood"
FOLDER = "likelihood"  # for the terms' arrays, in the run's folder
RESULT = "likelihood.json"


@dataclass(frozen=True)
class Settings:
    """Settings that all cells share; results of different settings are not mixed.

    Attributes:
        split: "train", or another split of the dataset.
        n_images: number of images, the first of the split.
        seed: seed of the noise.
        trajectory, clip_x0, avg_cov: as for the experiment's samples.
    """

    split: str
    n_images: int
    seed: int
    trajectory: str
    clip_x0: bool
    avg_cov: bool


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    return exit_code(MODULE, lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    own, rest = _parser().parse_known_args(list(argv[1:]))
    line = read_command_line([argv[0], *rest], (), MODULE)
    experiment = _experiment(line)
    if line.dry_run:
        print(LikelihoodCells(experiment, own).plan())
        return
    with claimed(line.workdir, experiment.adapter.recorded(line.config)):
        cells = LikelihoodCells(experiment, own)  # reads stored results: nobody else adds any now
        cells.run()
        print(cells.table())


def _parser() -> OwnOptions:
    parser = own_options(MODULE, "Bits per dimension of a finished training, and DDPM's bound.")
    parser.add_argument("--help_likelihood", action="help", help=argparse.SUPPRESS)  # older
    add = parser.add_argument
    variances = "of small,big and the host's own; default: all three"
    add("--variances", type=lambda text: text.split(","), help=variances)
    add("--steps", type=whole_numbers, help="numbers of sampling steps; default: sample.steps")
    add("--split", default="train", help="train (default), or another split: test, val")
    add("--n_images", type=int, default=500, help="first images of the split; default: 500")
    add("--batch_size", type=int, default=250, help="images in a network call; default: 250")
    add("--noise_seed", type=int, default=0, help="seed of the noise; default: 0")
    return parser


def _experiment(line: CommandLine) -> Experiment:
    """The finished experiment that the command line describes."""
    needs = {get_process(name).needs for name in line.config.sample.processes} - {None}
    if len(needs) != 1:
        hosts = sorted(name for name, row in PROCESSES.items() if row.needs)
        raise ValueError(f"sample.processes must name rows of one host, among {hosts}")
    adapter = host_of(needs)
    check_holds(line.workdir, adapter.recorded(line.config), adapter.module)
    return Experiment(adapter, line.config, line.workdir, line.device, line.progress)


class LikelihoodCells:
    """The bound of every cell (variance x steps) on the same images and the same noise.

    Args:
        experiment: finished up to the stage before ``sample``.
        own: the command's own options.

    Raises:
        ValueError: an option is not possible, or the folder holds results of other settings.
    """

    def __init__(self, experiment: Experiment, own: argparse.Namespace) -> None:
        config, adapter = experiment.config, experiment.adapter
        self.experiment = experiment
        optimal = {"gamma": "analytic", "epsc": "npr", "eps2": "sn", "ocm": "ocm"}[adapter.needs]
        self.variances = own.variances or ["small", "big", optimal]
        for name in self.variances:
            if name not in ("small", "big", optimal):
                raise ValueError(
                    f"--variances must be some of small,big,{optimal} for {adapter.module}, "
                    f"got {name!r}"
                )
        self.steps = own.steps or tuple(config.sample.steps)
        for name, low in (("n_images", 2), ("batch_size", 1), ("noise_seed", 0)):
            if getattr(own, name) < low:
                raise ValueError(f"--{name} must be >= {low}, got {getattr(own, name)}")
        self.batch_size = own.batch_size
        self.dataset = _dataset(experiment, own.split)
        sample = config.sample
        self.settings = Settings(
            split=own.split,
            n_images=min(own.n_images, len(self.dataset)),
            seed=own.noise_seed,
            trajectory=sample.trajectory,
            clip_x0=sample.clip_x0,
            avg_cov=sample.avg_cov,
        )
        self.path = experiment.workdir / RESULT
        self.stored = self._read()

    @property
    def missing(self) -> list[tuple[str, int]]:
        """(variance, steps) of the cells that are not stored."""
        every = [(variance, steps) for variance in self.variances for steps in self.steps]
        return [cell for cell in every if str(cell[1]) not in self.stored.get(cell[0], {})]

    def plan(self) -> str:
        """The remaining work, in one line."""
        missing = self.missing
        calls = sum(steps for _, steps in missing) * self.settings.n_images
        images = f"{self.settings.n_images} images of {self.settings.split!r}"
        return f"likelihood: {len(missing)} cells of {images}, {calls:.3g} network evaluations"

    def run(self) -> None:
        """Compute the cells that are not stored."""
        if not self.missing:
            return
        logger.info("%s", self.plan())
        stages = stages_of(self.experiment)
        gamma = stages["gamma"].result() if "gamma" in stages else None
        plain = stages["base"].average()
        optimal = stages["head"].average() if "head" in stages else plain
        for variance, steps in self.missing:
            logger.info("likelihood: %s, %d steps", variance, steps)
            network, typ = plain if variance in ("small", "big") else optimal
            model = self.experiment.wrapper(network, typ)
            self._store(variance, steps, self._terms(model, variance, steps, gamma))

    def table(self) -> str:
        """Bits per dimension with their standard errors over images, in Markdown."""
        chosen = {v: [self.stored[v][str(s)] for s in self.steps] for v in self.variances}
        rows = [
            [v, *(f"{cell['bits_per_dim']:.3f} ± {cell['stderr']:.3f}" for cell in cells)]
            for v, cells in chosen.items()
        ]
        settings = self.settings
        title = f"bits per dimension (lower is better), {settings.n_images} {settings.split} images"
        return f"**{title}**\n\n" + table_of(["steps", *map(str, self.steps)], rows, left=1)

    def _terms(self, model: Callable[..., Any], variance: str, steps: int, gamma: Any) -> Tensor:
        """The bound's terms, float64 [steps+1, n_images]."""
        experiment, settings = self.experiment, self.settings
        first, done = 0, []
        for x0 in self._batches():
            bound = negative_elbo(
                model,
                experiment.schedule,
                x0.to(experiment.device),
                variance=variance,
                steps=steps,
                trajectory=settings.trajectory,
                gamma=gamma,
                clip_x0=settings.clip_x0,
                avg_cov=settings.avg_cov,
                seed=settings.seed,
                first=first,
                progress=experiment.progress,
                **experiment.labels_of(self.dataset, slice(first, first + len(x0))),
            )
            first += len(x0)
            done.append(bound.terms.cpu())
        return torch.cat(done, dim=1)

    def _batches(self) -> Iterator[Tensor]:
        """The split's first images as 8-bit values in [-1, 1]."""
        left = self.settings.n_images
        batches = self.dataset.uint8_batches(self.batch_size)
        for batch in islice(batches, math.ceil(left / self.batch_size)):
            yield to_unit_range(batch[:left])
            left -= len(batch)

    def _store(self, variance: str, steps: int, terms: Tensor) -> None:
        """Write the arrays first, so that every cell in the table has them."""
        dims = math.prod(self.experiment.image_shape)
        mean, stderr = mean_with_error(bits_per_dim(terms.sum(0), dims))
        name = f"{FOLDER}/{variance}_{steps}.npz"
        with written_atomically(self.experiment.workdir / name) as file:
            np.savez_compressed(file, terms=terms.numpy())
        cell = {"bits_per_dim": float(mean), "stderr": float(stderr), "terms": name}
        self.stored.setdefault(variance, {})[str(steps)] = cell
        result = {"settings": vars(self.settings), "cells": self.stored}
        write_atomically(self.path, (json.dumps(result, indent=2) + "\n").encode())

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        if not self.path.exists():
            return {}
        there, cells = read_json(self.path, "cannot be read; remove it", _settings_and_cells)
        for name, here in vars(self.settings).items():
            if there.get(name) != here:
                raise ValueError(
                    f"{self.path} holds results of another {name} ({there.get(name)!r} there, "
                    f"{here!r} here); move the file away to compute new ones"
                )
        return cells


def _settings_and_cells(
    result: Any,
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    settings, cells = dict(result["settings"]), dict(result["cells"])
    for steps, cell in ((s, c) for by_steps in cells.values() for s, c in by_steps.items()):
        int(steps), float(cell["bits_per_dim"]), float(cell["stderr"])
    return settings, cells


def _dataset(experiment: Experiment, split: str) -> ImageDataset:
    if split == "train":
        return experiment.dataset
    return load_dataset(experiment.config.data, split=split)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
