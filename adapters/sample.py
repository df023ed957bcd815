"""Sample the images of one cell of the tables, in any number of processes:

    python -m adapters.sample --config configs/FILE.py --out FOLDER --process NAME --steps K
    torchrun --nproc_per_node N -m adapters.sample ...the same

The network comes from the trained run (``--workdir``) or from ``--weights``. The same command
continues an interrupted run, also with another ``--config.sample.batch_size`` or another number of
processes. ``--format metrics`` writes the metrics of the section ``evaluate`` instead of images:
see docs/sampling.md.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
from ml_collections import FrozenConfigDict

from adapters.checkpoints.fitting import read_fitting
from adapters.evaluate import open_reference, table
from adapters.experiment.checks import check_evaluation
from adapters.experiment.config import claimed, read_command_line
from adapters.experiment.experiment import Experiment, calls_an_image
from adapters.experiment.run import stages_of
from adapters.hosts import Adapter, get_process, host_of
from adapters.measuring.evaluation import Summary, summarise
from adapters.measuring.features import CACHE, build_extractors
from adapters.sampling.metrics_sink import MetricsFile
from adapters.sampling.pipeline import Source, fill
from adapters.sampling.sinks import NpzFile, PngFolder, Sink, TarShards
from adapters.shell.command import (
    EXIT_FAILED,
    exit_code,
    keep_freed_memory,
    one_line_warnings,
)
from adapters.shell.options import own_options
from sa_plugin.sampling.gamma import Gamma
from third_party.common import distributed
from third_party.extended_analytic_dpm.methods import get_method

MODULE = "adapters.sample"
SINKS = {
    "png": PngFolder,
    "npz": lambda folder, n_images: NpzFile(folder / "samples.npz", n_images),
    "tar": TarShards,
}
PATIENCE = timedelta(days=30)  # one process may finish long before another
METRICS = "metrics"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse our own options; the rest is for ``read_command_line``."""
    parser = own_options(
        MODULE,
        "Sample the images of one cell of a trained run, in any number of processes.",
        example="--config configs/digits.py --out images --process ddpm_small --steps 10",
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--process", required=True, help="a row of the tables: ddpm_small, ...")
    parser.add_argument("--steps", type=int, required=True, help="number of sampling steps")
    kinds = [*sorted(SINKS), METRICS]
    parser.add_argument("--format", choices=kinds, default="png", help="default: png")
    parser.add_argument(
        "--against", help=f"what --format {METRICS} compares with; default: the training images"
    )
    parser.add_argument("--weights", type=Path, help="checkpoint to use instead of the run's")
    parser.add_argument("--gamma", type=Path, help="file of Gamma to use instead of the run's")
    return parser.parse_known_args(list(argv[1:]))


def adapter_of(config: FrozenConfigDict) -> Adapter:
    """The host whose optimal variance the configuration's rows use; SN-DPM if they use none."""
    return host_of(get_process(name).needs for name in config.sample.processes)


class Cell:
    """One reverse process and number of steps of an experiment, and the files that they need.

    Raises:
        ValueError: a file is missing or does not fit, or an option is not possible.
    """

    def __init__(self, experiment: Experiment, args: argparse.Namespace) -> None:
        self.experiment = experiment
        self.args = args
        self.stage = stages_of(experiment)["sample"]
        self._check_options()
        self.network = self.stage.stage_of(args.process)
        self.weights = args.weights or self.network.average_path
        if not self.weights.exists():
            raise ValueError(f"there is no file of weights {self.weights}: train or give --weights")
        self.gamma = self._gamma()
        method = self.network.method
        read_fitting(self.weights, experiment.network(method, "meta"))
        meta = experiment.network(method, "meta")
        experiment.sampler(args.process, args.steps, meta, get_method(method).typ, self.gamma)

    def sink(self) -> Sink:
        """Where the images go; for metrics, the extractors and the reference are checked first."""
        args, n_images = self.args, self.experiment.config.sample.n_images
        if args.format != METRICS:
            return SINKS[args.format](args.out, n_images)
        config = self.experiment.config
        extractors = build_extractors(
            config.evaluate.features,
            cache_dir=self.experiment.workdir.parent / CACHE,
            device=self.experiment.device,
        )
        shape, data = self.experiment.image_shape, config.data
        for extractor in extractors:  # raises if it does not take images of this shape
            extractor.extract(torch.zeros(1, *shape))
        reference = self.experiment.reference
        if args.against:
            reference = open_reference(
                args.against,
                shape,
                extractors,
                data_root=data.root,
                size=data.size,
                follow_links=data.follow_links,
            )

        def summary() -> Summary:
            if isinstance(reference, Summary):
                return reference
            return summarise(reference.uint8_batches(config.sample.batch_size), extractors)

        return MetricsFile(args.out, n_images, extractors, summary, config.evaluate.splits)

    def _check_options(self) -> None:
        adapter, needs = self.experiment.adapter, get_process(self.args.process).needs
        if needs not in (None, adapter.needs):
            raise ValueError(
                f"--process {self.args.process!r} needs {needs!r}, which {adapter.module}, the "
                "host of the configuration, does not provide"
            )
        if self.args.format == METRICS:
            check_evaluation(self.experiment)
        elif self.args.against:
            raise ValueError(
                f"--against goes with --format {METRICS}, got --format {self.args.format}"
            )
        if self.args.gamma and needs != "gamma":
            raise ValueError(
                f"--gamma goes with the rows of Analytic-DPM, got --process {self.args.process}"
            )

    def identity(self) -> FrozenConfigDict:
        """Everything that determines the images, and the kind of output."""
        config = self.experiment.config.to_dict()
        for name in ("batch_size", "processes", "steps"):
            del config["sample"][name]
        names = {name: getattr(self.args, name) for name in ("process", "steps", "format")}
        if self.args.against:
            names["against"] = self.args.against
        names["weights"] = _digest(self.weights)
        names["device"] = self.experiment.device.type
        if self.gamma is not None:
            names["gamma"] = hashlib.sha256(self.gamma.values.tobytes()).hexdigest()
        return FrozenConfigDict({**config, "cell": names})

    def plan(self) -> str:
        """What it does, in one line."""
        sample, args = self.experiment.config.sample, self.args
        cell = f"{sample.n_images} images of {args.process}, {args.steps} steps, as {args.format}"
        calls = sample.n_images * calls_an_image(sample, args.process, args.steps)
        return f"{cell} in {args.out}: {calls:.3g} network evaluations in all"

    def source(self) -> Source:
        """The images of the cell."""
        method = self.network.method
        network = self.experiment.network(method)
        network.load_state_dict(read_fitting(self.weights, network))
        network = network.to(self.experiment.device).eval()
        typ = get_method(method).typ
        return self.experiment.source(self.args.process, self.args.steps, network, typ, self.gamma)

    def _gamma(self) -> Gamma | None:
        if self.args.gamma:
            return Gamma.load(self.args.gamma)
        return self.stage.gamma() if get_process(self.args.process).needs == "gamma" else None


def sample(argv: Sequence[str]) -> None:
    """Do one process's part of a run; errors are raised."""
    args, rest = parse(argv)
    line = read_command_line([argv[0], *rest], (), MODULE)
    device = distributed.local_device(line.device)
    progress = line.progress and distributed.is_first()
    experiment = Experiment(adapter_of(line.config), line.config, line.workdir, device, progress)
    cell = Cell(experiment, args)
    if line.dry_run:
        if distributed.is_first():
            print(cell.plan())
        return
    # The processes only meet at the beginning and the end, and never about data on a device.
    distributed.start(device, backend="gloo", patience=PATIENCE)
    sink = cell.sink()
    with ExitStack() as stack, distributed.peers():
        claim = claimed(args.out, cell.identity(), option="--out")
        distributed.on_first(stack.enter_context, claim)
        fill(sink, cell.source)
    if distributed.is_first():
        if isinstance(sink, MetricsFile):
            print(table(sink.result()))
        print(f"{sink.n_images} images in {args.out}")
    distributed.stop()


def _digest(weights: Path) -> str:
    """Hash of a file's bytes, or of all files in a checkpoint folder."""
    files = sorted(p for p in weights.rglob("*") if p.is_file()) if weights.is_dir() else [weights]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 if the disk is full or another process stopped, else see ``exit_code``."""

    def work() -> None:
        with one_line_warnings(MODULE):
            sample(argv)

    return exit_code(MODULE, work, failed=EXIT_FAILED)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
