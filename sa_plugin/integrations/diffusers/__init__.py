r"""diffusers: the SA loss in its loops, optimal reverse variances as a scheduler, its solvers.

diffusers counts timesteps 0..T-1, so its timestep is n - 1. Its tables are float32. Its UNets
return an object with ``.sample``. A learned variance or another second output lies in the further
channels.
"""

from sa_plugin._checks import explain_absence

try:
    from sa_plugin.integrations.diffusers.scheduler import (
        OptimalVarianceScheduler,
        OptimalVarianceSchedulerOutput,
    )
except ModuleNotFoundError as error:
    raise explain_absence(error, "diffusers", "diffusers") from None
from sa_plugin.integrations.diffusers.loss import DiffusersSALoss
from sa_plugin.integrations.diffusers.models import noise_schedule, unet_model
from sa_plugin.integrations.diffusers.solvers import SolverSampler

__all__ = [
    "DiffusersSALoss",
    "OptimalVarianceScheduler",
    "OptimalVarianceSchedulerOutput",
    "SolverSampler",
    "noise_schedule",
    "unet_model",
]
