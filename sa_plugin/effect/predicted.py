"""What the SA loss will do to samples, by the closed form for Gaussian data: no network is run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike

from sa_plugin.effect.chains import best_strength, chain_variances, predicted_frechet
from sa_plugin.effect.gains import (
    check_variances,
    exact_gains,
    gaussian_gains,
    inflated_gains,
)
from sa_plugin.loss import SALoss
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import FloatArray


@dataclass(frozen=True)
class Prediction:
    """A reverse process and a number of steps: the baseline B, SA, and the best strength.

    Attributes:
        distances: ``predicted_frechet`` of B, of SA and at ``best_q``, squared units of x_0.
        sample_variances: of the same three, summed over an image's dimensions.
        best_q: the strength with the least distance, see ``best_strength``.
    """

    steps: int
    distances: tuple[float, float, float]
    sample_variances: tuple[float, float, float]
    best_q: float

    @property
    def lam(self) -> float:
        """The lambda of SA-2 with the best q; infinite from q = 1 on, which SA-2 cannot reach."""
        return 2 * self.best_q / (1 - self.best_q) if self.best_q < 1 else math.inf


def predict(
    loss: SALoss,
    variances: ArrayLike,
    *,
    steps: int,
    forward: str = "ddpm",
    variance: str = "small",
    trajectory: str = "linear",
    avg_cov: bool = False,
) -> Prediction:
    """Samples of the networks that the plain loss and ``loss`` train on Gaussian data.

    Args:
        loss: what counts for ``gaussian_gains``.
        variances: s > 0 along each direction, [D]; ``spectrum.variances[spectrum.variances > 0]``.
        steps, forward, variance, trajectory, avg_cov: as for ``Sampler``, which here does not clip.

    Raises:
        ValueError: as ``gaussian_gains``, ``chain_variances`` and ``choose_timesteps``.
    """
    schedule, s = loss.schedule, check_variances(variances)
    exact = exact_gains(schedule, s)
    q = best_strength(
        schedule,
        s,
        steps=steps,
        forward=forward,
        variance=variance,
        trajectory=trajectory,
        rests_on="exact",
        avg_cov=avg_cov,
    )
    visited = choose_timesteps(schedule.N, steps, trajectory)
    # A correction while sampling leaves the covariance to the network as it is.
    networks: list[tuple[FloatArray, FloatArray | None]] = [
        (exact, None),
        (gaussian_gains(loss, s), None),
        (inflated_gains(schedule, s, q), exact),
    ]
    ends = [
        chain_variances(
            schedule,
            gains,
            visited,
            forward=forward,
            variance=variance,
            variances=s,
            cov_gains=cov_gains,
            avg_cov=avg_cov,
        )
        for gains, cov_gains in networks
    ]
    b, sa, best = (predicted_frechet(v, s) for v in ends)
    return Prediction(steps, (b, sa, best), (ends[0].sum(), ends[1].sum(), ends[2].sum()), q)
