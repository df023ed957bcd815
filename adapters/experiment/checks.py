"""What a stage needs beyond a checked configuration, and what is allowed but rarely meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import FrozenConfigDict

from adapters.experiment.experiment import Experiment
from adapters.experiment.tables import Metrics
from adapters.measuring.features import THUMBNAIL

WITHOUT_ROOT = ("digits", "fashion")  # packages of Python or Debian may hold them
NOISE_VARIANCE = 1 - math.sqrt(2 / (math.pi * math.e))  # of a standard normal, cut at -1 and 1
MOST_WIDE = 1.5  # times the data's variance: SA widens samples by less
MOST_INITIAL = 0.01  # of the initial weights left in an average


def check_evaluation(experiment: Experiment) -> None:
    """ValueError unless metrics can be computed from the images of a cell."""
    n_images, splits = experiment.config.sample.n_images, experiment.config.evaluate.splits
    if n_images < 2:
        raise ValueError(f"sample.n_images must be >= 2, got {n_images}")
    if splits > n_images:
        raise ValueError(f"evaluate.splits must be <= sample.n_images = {n_images}, got {splits}")


def check_data(data: FrozenConfigDict) -> None:
    """ValueError unless ``root`` of the section ``data`` exists; nothing is read."""
    if data.name not in WITHOUT_ROOT and not Path(data.root).expanduser().exists():
        raise ValueError(
            f"data.root must hold the images of {data.name}, got {data.root}, which does not exist"
        )


def cautions(experiment: Experiment, stages: Sequence[str]) -> Iterator[str]:
    """What is possible in these stages but rarely meant, each in one line."""
    for name in [stage for stage in stages if stage in ("base", "head")]:
        settings = experiment.config[name]
        left = settings.ema**settings.iterations
        if settings.iterations and left > MOST_INITIAL:
            yield (
                f"{name}.ema = {settings.ema:g} leaves {left:.0%} of the initial weights in the "
                f"average after {settings.iterations} iterations: lower it, or train longer"
            )
    features, images = experiment.config.evaluate.features, experiment.config.sample.n_images
    channels, *sides = experiment.image_shape
    values = {
        "pixels": channels * math.prod(sides),
        "thumbnails": channels * math.prod(min(THUMBNAIL, side) for side in sides),
    }
    for name in [name for name in values if name in features and "evaluate" in stages]:
        if images <= values[name]:
            yield (
                f"evaluate.features = {name}: images of {values[name]} values need more than "
                f"sample.n_images = {images}; the distance of fewer is biased upwards"
            )


def noise_like(whose: str, metrics: Metrics, n_values: int) -> Iterator[str]:
    """One line if samples of ``n_values`` each vary as much as noise and far more than the data.

    Other samples can be noise too: this one is measured without a distance to compare with.
    """
    cells = [cell for by_steps in metrics.values() for cell in by_steps.values()]
    noise = NOISE_VARIANCE * n_values
    found = [
        cell["sample_variance"] / cell["reference_variance"]
        for cell in cells
        if cell["sample_variance"] >= max(noise, MOST_WIDE * cell["reference_variance"])
    ]
    if found:
        yield (
            f"{whose}: in {len(found)} of {len(cells)} cells the samples vary as much as pure "
            f"noise, up to {max(found):.1f} times as much as the data: look at the pictures, and "
            "train longer if they show noise"
        )
