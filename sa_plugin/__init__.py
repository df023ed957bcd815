"""The sequence-aware (SA) loss and the optimal reverse variances of diffusion models, for any code.

from sa_plugin.loss import SALoss
"""

from sa_plugin.calls import HostCall
from sa_plugin.gamma import Gamma, estimate_gamma
from sa_plugin.gap import GapCurve, gap_along_chain, theorem2_bounds, total_gap
from sa_plugin.hook import attach, detach
from sa_plugin.likelihood import NegativeElbo, bits_per_dim, negative_elbo
from sa_plugin.loss import SALoss, SALossOutput, sequence_aware_loss
from sa_plugin.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable
from sa_plugin.trajectory import choose_timesteps
from sa_plugin.wrappers import EpsModel, SigmaModel

__version__ = "0.1.0"
__all__ = [
    "EpsModel",
    "Gamma",
    "GapCurve",
    "HostCall",
    "NegativeElbo",
    "NoiseSchedule",
    "SALoss",
    "SALossOutput",
    "Sampler",
    "SigmaModel",
    "TauTable",
    "attach",
    "bits_per_dim",
    "choose_timesteps",
    "detach",
    "estimate_gamma",
    "gap_along_chain",
    "negative_elbo",
    "sequence_aware_loss",
    "theorem2_bounds",
    "total_gap",
]
