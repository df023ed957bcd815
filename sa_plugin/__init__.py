"""The sequence-aware (SA) loss and the optimal reverse variances of diffusion models, for any code.

from sa_plugin.loss import SALoss
"""

from sa_plugin.loss import SALoss, SALossOutput, sequence_aware_loss
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable

__version__ = "0.1.0"
__all__ = ["NoiseSchedule", "SALoss", "SALossOutput", "TauTable", "sequence_aware_loss"]
