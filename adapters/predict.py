"""What SA will do to your samples, before any training: python -m adapters.predict --config FILE.py

The closed form for Gaussian data with the mean and the variances of the images, without clipping:
the distance and the variance of the samples of the baseline and of the configuration's SA loss, and
the strength q that the number of steps wants. No network is run. Images other than the
configuration's: ``--images FOLDER`` (or an npz file, tar shards, a data set's name).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adapters.experiment.config import read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.tables import table
from adapters.hosts import get_process, host_of
from adapters.measuring.image_sources import open_images
from adapters.pictures.pictures import plot_metric
from adapters.shell.command import exit_code
from adapters.shell.options import own_options
from sa_plugin.effect.gains import strength
from sa_plugin.effect.predicted import Prediction
from sa_plugin.effect.predicted import predict as predict_effect
from sa_plugin.effect.spectrum import Spectrum

MODULE = "adapters.predict"
BATCH = 500


def row_of(title: str, found: Prediction) -> list[str]:
    """Its line in the table."""
    lam = f"{found.lam:.2f}" if np.isfinite(found.lam) else "none"
    numbers = [f"{value:.3g}" for value in (*found.sample_variances, *found.distances)]
    return [title, str(found.steps), *numbers, f"{found.best_q:.3g}", lam]


def predictions(experiment: Experiment, spectrum: Spectrum) -> Iterator[tuple[str, Prediction]]:
    """Each row and number of steps of the configuration; directions without variance have none.

    Rows without a closed form are left out: those of solvers, OCM, probes and Lanczos.
    """
    sample = experiment.config.sample
    rows = map(get_process, sample.processes)
    for row in (row for row in rows if row.has_closed_form):
        for steps in sample.steps:
            yield (
                row.title,
                predict_effect(
                    experiment.loss,
                    spectrum.variances[spectrum.variances > 0],
                    steps=steps,
                    forward=row.forward,
                    variance=row.variance,
                    trajectory=sample.trajectory,
                    avg_cov=sample.avg_cov,
                ),
            )


def report(
    experiment: Experiment, spectrum: Spectrum, found: Sequence[tuple[str, Prediction]]
) -> str:
    """The table, with what it rests on."""
    loss = experiment.loss
    q = strength(loss.K, loss.lam)
    head = ["process", "steps", "variance B", f"SA-{loss.K}", "best q"]
    head += ["distance B", f"SA-{loss.K}", "best q", "q", "lambda of SA-2"]
    return (
        f"{experiment.config.data.name}: {spectrum.count:,} images, variance "
        f"{spectrum.variances.sum():.4g} (sum over pixels), mean and variances alone\n"
        f"SA-{loss.K}, lambda {loss.lam:g}: q = {q:.3g}\n\n"
        + table(head, [row_of(*one) for one in found], left=1)
    )


def predict(argv: Sequence[str]) -> None:
    """Print the table, and draw it where ``--out`` is given."""
    own, rest = _parser().parse_known_args(list(argv[1:]))
    line = read_command_line([argv[0], *rest], (), MODULE)
    host = host_of(get_process(name).needs for name in line.config.sample.processes)
    experiment = Experiment(host, line.config, line.workdir, "cpu", line.progress)
    data = experiment.dataset
    if own.images is not None:
        data = open_images(
            own.images,
            data_root=line.config.data.root,
            size=line.config.data.size,
            channels=experiment.image_shape[0],
        )
    spectrum = Spectrum.of(data.uint8_batches(BATCH))
    found = list(predictions(experiment, spectrum))
    print(report(experiment, spectrum, found))
    if own.out is not None:
        own.out.mkdir(parents=True, exist_ok=True)
        _draw(own.out / "prediction.png", experiment.loss.K, found)
        print(own.out / "prediction.png")


def _draw(path: Path, K: int, found: Sequence[tuple[str, Prediction]]) -> None:
    lines: dict[str, dict[int, float]] = {}
    for title, one in found:
        for label, distance in zip(("B", f"SA-{K}", "best q"), one.distances, strict=True):
            lines.setdefault(f"{title}, {label}", {})[one.steps] = distance
    plot_metric(path, lines, metric="predicted distance")


def _parser() -> argparse.ArgumentParser:
    parser = own_options(
        MODULE,
        "What SA will do to the samples, by a closed form; no network is run.",
        example="--config configs/digits.py",
    )
    parser.add_argument("--images", help="images instead of the configuration's data")
    parser.add_argument("--out", type=Path, help="folder for prediction.png")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    return exit_code(MODULE, lambda: predict(argv), continues="")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
