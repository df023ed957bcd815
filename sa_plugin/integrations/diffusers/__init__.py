r"""diffusers: the SA loss in its training loops, the optimal reverse variances as a scheduler.

diffusers counts timesteps 0..T-1, so that its timestep is n - 1, and keeps float32 tables. Its
UNets return an output object with ``.sample``; learned variances and second heads are channels.
"""

from sa_plugin._extras import explain_absence

try:
    from sa_plugin.integrations.diffusers.scheduler import (
        OptimalVarianceScheduler,
        OptimalVarianceSchedulerOutput,
    )
except ModuleNotFoundError as error:
    raise explain_absence(error, "diffusers", "diffusers") from None
from sa_plugin.integrations.diffusers.loss import DiffusersSALoss
from sa_plugin.integrations.diffusers.models import noise_schedule, unet_model

__all__ = [
    "DiffusersSALoss",
    "OptimalVarianceScheduler",
    "OptimalVarianceSchedulerOutput",
    "noise_schedule",
    "unet_model",
]
