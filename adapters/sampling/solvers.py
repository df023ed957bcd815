"""The solvers of diffusers, which is imported only where a row of the tables needs it."""

from __future__ import annotations

from collections.abc import Callable

from sa_plugin.sampling.sampler import Sampler


def solver_sampler() -> Callable[..., Sampler]:
    """``SolverSampler``; a ValueError names the extra where diffusers is not installed."""
    try:
        from sa_plugin.integrations.diffusers import SolverSampler
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    return SolverSampler
