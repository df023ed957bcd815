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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.experiment.config import read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.tables import table
from adapters.hosts import get_process, host_of
from adapters.measuring.image_sources import open_images
from adapters.pictures.pictures import plot_metric
from adapters.shell.command import OwnOptions, exit_code
from sa_plugin.effect.chains import best_strength, chain_variances, predicted_frechet
from sa_plugin.effect.gains import exact_gains, gaussian_gains, inflated_gains, strength
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.sampling.trajectory import choose_timesteps

MODULE = "adapters.predict"
BATCH = 500


@dataclass(frozen=True)
class Prediction:
    """A row and a number of steps: distances and sample variances of B, of SA, at the best q."""

    title: str
    steps: int
    distances: tuple[float, float, float]
    sample_variances: tuple[float, float, float]
    best_q: float

    @property
    def lam(self) -> float:
        """The lambda of SA-2 with the best q; infinite from q = 1 on, which SA-2 cannot reach."""
        return 2 * self.best_q / (1 - self.best_q) if self.best_q < 1 else float("inf")

    def row(self) -> list[str]:
        """Its line in the table."""
        lam = f"{self.lam:.2f}" if np.isfinite(self.lam) else "none"
        numbers = [*(f"{v:.3g}" for v in self.sample_variances), *_three(self.distances)]
        return [self.title, str(self.steps), *numbers, f"{self.best_q:.3g}", lam]


def _three(values: Sequence[float]) -> list[str]:
    return [f"{value:.3g}" for value in values]


def predictions(experiment: Experiment, spectrum: Spectrum) -> Iterator[Prediction]:
    """Each row and number of steps of the configuration; directions without variance have none."""
    schedule, sample = experiment.schedule, experiment.config.sample
    s = spectrum.variances[spectrum.variances > 0]
    trained = {"B": exact_gains(schedule, s), "SA": gaussian_gains(experiment.loss, s)}
    for name in sample.processes:
        row = get_process(name)
        chain = {"forward": row.forward, "variance": row.variance, "avg_cov": sample.avg_cov}
        for steps in sample.steps:
            q = best_strength(
                schedule, s, steps=steps, trajectory=sample.trajectory, rests_on="exact", **chain
            )
            visited = choose_timesteps(schedule.N, steps, sample.trajectory)
            own = [
                chain_variances(schedule, gains, visited, variances=s, **chain)
                for gains in trained.values()
            ]
            best = chain_variances(
                schedule,
                inflated_gains(schedule, s, q),
                visited,
                variances=s,
                cov_gains=trained["B"],
                **chain,
            )
            ends = [*own, best]
            yield Prediction(
                row.title,
                steps,
                tuple(predicted_frechet(v, s) for v in ends),
                tuple(float(v.sum()) for v in ends),
                q,
            )


def report(experiment: Experiment, spectrum: Spectrum, found: Sequence[Prediction]) -> str:
    """The table, with what it rests on."""
    loss = experiment.loss
    q = strength(loss.K, loss.lam)
    head = ["process", "steps", "variance B", f"SA-{loss.K}", "best q"]
    head += ["distance B", f"SA-{loss.K}", "best q", "q", "lambda of SA-2"]
    return (
        f"{experiment.config.data.name}: {spectrum.count:,} images, variance "
        f"{spectrum.variances.sum():.4g} (sum over pixels), mean and variances alone\n"
        f"SA-{loss.K}, lambda {loss.lam:g}: q = {q:.3g}\n\n"
        + table(head, [one.row() for one in found], left=1)
    )


def predict(argv: Sequence[str]) -> None:
    """Print the table, and draw it where ``--out`` is given."""
    own, rest = _parser().parse_known_args(list(argv[1:]))
    line = read_command_line([argv[0], *rest], (), MODULE)
    host = host_of(get_process(name).needs for name in line.config.sample.processes)
    experiment = Experiment(host, line.config, line.workdir, "cpu", line.progress)
    data = experiment.dataset
    if own.images is not None:
        data = open_images(own.images, data_root=line.config.data.root)
    spectrum = Spectrum.of(data.uint8_batches(BATCH))
    found = list(predictions(experiment, spectrum))
    print(report(experiment, spectrum, found))
    if own.out is not None:
        own.out.mkdir(parents=True, exist_ok=True)
        _draw(own.out / "prediction.png", experiment.loss.K, found)
        print(own.out / "prediction.png")


def _draw(path: Path, K: int, found: Sequence[Prediction]) -> None:
    lines: dict[str, dict[int, float]] = {}
    for one in found:
        for label, distance in zip(("B", f"SA-{K}", "best q"), one.distances, strict=True):
            lines.setdefault(f"{one.title}, {label}", {})[one.steps] = distance
    plot_metric(path, lines, metric="predicted distance")


def _parser() -> argparse.ArgumentParser:
    parser = OwnOptions(MODULE, add_help=False)
    parser.add_argument("--images", help="images instead of the configuration's data")
    parser.add_argument("--out", type=Path, help="folder for prediction.png")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    return exit_code(MODULE, lambda: predict(argv), continues="")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
