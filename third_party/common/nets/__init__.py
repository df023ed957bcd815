"""Noise-prediction networks of the host codebases: two UNet families, each with a variance head.

Written from the papers (arXiv 2006.11239, 2102.09672, 2206.07309) and from the names and shapes of
the published checkpoints, which load with ``strict=True``.
"""

from .ddpm_unet import Model, Model4Pretrained
from .iddpm_unet import UNetModel, UNetModel3OutChannels, UNetModel4Pretrained

__all__ = [
    "Model",
    "Model4Pretrained",
    "UNetModel",
    "UNetModel3OutChannels",
    "UNetModel4Pretrained",
]
