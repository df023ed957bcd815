"""CelebA 64x64, linear schedule.

Network: DDIM's (arXiv 2010.02502), as in the published checkpoints (78.7M parameters); its time is
n - 1. SA-2 with lambda 1 and the noise network's training: arXiv 2312.12431. Heads and evaluation:
arXiv 2206.07309. The number of iterations in the SA paper's training is not known, so it is the
host's default.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = common.experiment("celeba64", method)
    config.data.name = "celeba64"
    config.time.shift1 = True
    config.network.name = "ddpm_unet"
    config.network.args = {
        "ch": 128,
        "ch_mult": (1, 2, 2, 2, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (16,),
        "dropout": 0.1,
    }
    common.use_sa_dpm_training(config)
    return config
