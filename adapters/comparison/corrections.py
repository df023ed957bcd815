"""What a cell does to its network while sampling: epsilon scaling, and a correction.

    spectral, shifted   sa_plugin.effect.correction.SpectralShrinkage and ShiftedNoise
    norms               EpsilonScaling with the factors of NormMatching

The factors of ``norms`` are found on images that are not those of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.comparison.grid import Cell
from adapters.comparison.store import Store
from adapters.experiment.experiment import Experiment
from adapters.hosts import get_process
from sa_plugin.effect.chains import best_strength
from sa_plugin.effect.correction import (
    SECOND_IS,
    EpsilonScaling,
    NormMatching,
    ShiftedNoise,
    SpectralShrinkage,
    linear_factors,
)
from sa_plugin.sampling.gamma import Gamma
from third_party.common.data import to_unit_range

FIT_SEED = 2**32  # added to the seed for the images on which factors of eps are fitted
FIT_IMAGES = 500

Wrap = Callable[[Any], Callable[..., Any]]  # a network to the network as the sampler calls it


@dataclass(frozen=True)
class Network:
    """What a cell samples with: an averaged network, its ``typ``, and Gamma if it is needed."""

    network: nn.Module
    typ: str
    gamma: Gamma | None


def scaled(
    experiment: Experiment, eps_scale: float, eps_line: Sequence[float] | None = None
) -> Wrap:
    """Epsilon scaling (arXiv 2308.15321): multiply the predicted noise, but no second output.

    By a constant, or at the step n by 1 / (k n + c_0) with ``eps_line`` = (k, c_0).
    """
    schedule = experiment.schedule
    factors = eps_scale if eps_line is None else linear_factors(schedule, *eps_line)
    if eps_line is None and eps_scale == 1:
        return lambda network: network
    return lambda network: EpsilonScaling(network, schedule, factors, second="shifted")


def corrected(
    store: Store, experiment: Experiment, cell: Cell, network: Network
) -> tuple[Wrap, dict[str, Any]]:
    """A cell's correction, and what was chosen for it: to be stored with the result."""
    asked = store.grid.correction(cell.line)
    if asked is None:
        return lambda found: found, {}
    schedule, needs = experiment.schedule, get_process(cell.process).needs
    second_is = needs if needs in SECOND_IS else None
    if asked["name"] == "norms":
        factors = _matched(store, experiment, cell, network, second_is)
        chosen = {"factors": {str(n): f for n, f in enumerate(factors.tolist()) if n and f != 1}}
        return (lambda found: EpsilonScaling(found, schedule, factors, second_is=second_is)), chosen
    spectrum = store.spectrum
    q = asked["q"] or _best(experiment, cell, spectrum.variances)
    if asked["name"] == "spectral":
        return (
            lambda found: SpectralShrinkage(found, schedule, spectrum, q, second_is=second_is)
        ), {"q": q}
    return (lambda found: ShiftedNoise(found, schedule, q, spectrum.mean, second_is=second_is)), {
        "q": q
    }


def _best(experiment: Experiment, cell: Cell, variances: Any) -> float:
    row = get_process(cell.process)
    return best_strength(
        experiment.schedule,
        variances[variances > 0],
        steps=cell.steps,
        forward=row.forward,
        variance=row.variance,
        trajectory=experiment.config.sample.trajectory,
        rests_on="exact",  # the corrections leave the covariance the network's own
    )


def _matched(
    store: Store, experiment: Experiment, cell: Cell, network: Network, second_is: str | None
) -> Any:
    """The factors of ``NormMatching`` for this cell, found with another seed than the tables'."""
    images = to_unit_range(next(store.dataset.uint8_batches(FIT_IMAGES))).to(experiment.device)
    fits: list[NormMatching] = []

    def matching(found: Any) -> NormMatching:
        seed = cell.seed + FIT_SEED
        fit = NormMatching(found, experiment.schedule, images, seed=seed, second_is=second_is)
        fits.append(fit)
        return fit

    sampler = experiment.sampler(
        cell.process, cell.steps, network.network, network.typ, network.gamma, call=matching
    )
    seed = cell.seed + FIT_SEED
    labels = experiment.labels_of_samples(0, FIT_IMAGES, seed)
    with torch.no_grad():
        sampler.sample((FIT_IMAGES, *experiment.image_shape), seed=seed, **labels)
    return fits[0].factors
