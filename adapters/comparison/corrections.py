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
from ml_collections import FrozenConfigDict
from torch import nn

from adapters.comparison.grid import Cell, Grid
from adapters.comparison.store import Store
from adapters.experiment.experiment import Experiment, calls_an_image
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
    schedule, second_is = experiment.schedule, _second_is(cell)
    if asked["name"] == "norms":
        factors = _matched(experiment, cell, network, second_is)
        chosen = {"factors": {str(n): f for n, f in enumerate(factors.tolist()) if n and f != 1}}
        return (lambda found: EpsilonScaling(found, schedule, factors, second_is=second_is)), chosen
    spectrum = store.spectrum(experiment.config.data)
    q = asked["q"] or _best(experiment, cell, spectrum.variances)
    if asked["name"] == "spectral":
        return (
            lambda found: SpectralShrinkage(found, schedule, spectrum, q, second_is=second_is)
        ), {"q": q}
    return (lambda found: ShiftedNoise(found, schedule, q, spectrum.mean, second_is=second_is)), {
        "q": q
    }


def calls_of_cell(grid: Grid, cell: Cell, sample: FrozenConfigDict) -> int:
    """Network evaluations for one image; the shift asks a network with a second output twice.

    ``sample`` is the cell's section of that name.
    """
    asked = grid.correction(cell.line)
    twice = asked is not None and asked["name"] == "shifted" and _second_is(cell) is not None
    return calls_an_image(sample, cell.process, cell.steps) * (2 if twice else 1)


def _second_is(cell: Cell) -> str | None:
    """What the second output of the cell's network is, if there is one."""
    needs = get_process(cell.process).needs
    return needs if needs in SECOND_IS else None


def _best(experiment: Experiment, cell: Cell, variances: Any) -> float:
    row = get_process(cell.process)
    return best_strength(
        experiment.schedule,
        variances[variances > 0],
        steps=cell.steps,
        forward=row.forward,
        variance=row.variance,
        trajectory=experiment.config.sample.trajectory,
        avg_cov=experiment.config.sample.avg_cov,
        rests_on="exact",  # the corrections leave the covariance the network's own
    )


def _matched(experiment: Experiment, cell: Cell, network: Network, second_is: str | None) -> Any:
    """The factors of ``NormMatching`` for this cell, found with another seed than the tables'."""
    images, _ = experiment.examples(FIT_IMAGES)  # norms with classes are refused
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
    with torch.no_grad():
        sampler.sample((FIT_IMAGES, *experiment.image_shape), seed=seed)
    return fits[0].factors
