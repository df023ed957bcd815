"""The formulas for arrays of any library (NumPy, torch, JAX): no network, no state.

The torch code uses the same functions. ``examples/jax_sa2.py`` is an example. Tables come from
``NoiseSchedule`` and ``TauTable`` as float64 NumPy arrays; convert them to your library's arrays.
"""

from sa_plugin.loss import window_gap
from sa_plugin.prediction import to_eps, to_x0
from sa_plugin.sampling.reverse import ReverseCoefficients, ReverseMoments, reverse_moments
from sa_plugin.sampling.variance import (
    covariance,
    covariance_weight_ddim,
    covariance_weight_ddpm,
    forward_variance,
    iddpm_variance,
    optimal_variance,
)
from sa_plugin.tau import theorem1_weight

__all__ = [
    "ReverseCoefficients",
    "ReverseMoments",
    "covariance",
    "covariance_weight_ddim",
    "covariance_weight_ddpm",
    "forward_variance",
    "iddpm_variance",
    "optimal_variance",
    "reverse_moments",
    "theorem1_weight",
    "to_eps",
    "to_x0",
    "window_gap",
]
