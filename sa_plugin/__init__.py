"""The sequence-aware (SA) loss and the optimal reverse variances of diffusion models, for any code.

    from sa_plugin.loss import SALoss

In order of reading: ``loss``, ``window``, ``noise``, ``calls``, ``tau``, ``schedule``; ``formulas``
and ``prediction``, for arrays of any library; the rooms ``hooks``, ``sampling``, ``bounds``,
``metrics``, ``effect``, ``diagnosis`` and ``integrations``.
"""

import sys

from sa_plugin.bounds import pair_terms as pair_terms
from sa_plugin.bounds.gap import GapCurve, gap_along_chain, theorem2_bounds, total_gap
from sa_plugin.bounds.likelihood import NegativeElbo, bits_per_dim, negative_elbo
from sa_plugin.calls import HostCall
from sa_plugin.diagnosis.findings import Diagnosis
from sa_plugin.diagnosis.measurement import diagnose
from sa_plugin.hooks.hook import attach, detach
from sa_plugin.hooks.sigma import SigmaSALoss
from sa_plugin.hooks.wrappers import EpsModel, SigmaModel
from sa_plugin.loss import SALoss, SALossOutput, sequence_aware_loss
from sa_plugin.sampling.gamma import Gamma, estimate_gamma
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable

__version__ = "0.1.0"
__all__ = [
    "Diagnosis",
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
    "SigmaSALoss",
    "TauTable",
    "attach",
    "bits_per_dim",
    "choose_timesteps",
    "detach",
    "diagnose",
    "estimate_gamma",
    "gap_along_chain",
    "negative_elbo",
    "sequence_aware_loss",
    "theorem2_bounds",
    "total_gap",
]

# The paths of 0.1.0. Modules have moved into rooms since; code that names the old paths works on.
for _room, _names in {
    "hooks": ("hook", "hosts", "wrappers"),
    "sampling": ("gamma", "reverse", "sampler", "trajectory", "variance"),
    "bounds": ("gap", "likelihood", "pair_terms"),
}.items():
    for _name in _names:
        _module = sys.modules[f"{__name__}.{_room}.{_name}"]
        sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
