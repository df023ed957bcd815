"""Settings that the experiments at 256x256 share: LSUN bedroom and CelebA-HQ, linear schedule."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def experiment(name: str, method: str) -> ConfigDict:
    """The experiment of a method on the data called ``name``.

    Network: that of the published LSUN bedroom checkpoint (DDIM's, arXiv 2010.02502; 113.7M
    parameters); its time is n - 1.
    """
    config = common.experiment(name, method)
    config.data.name = name
    config.time.shift1 = True
    config.network.name = "ddpm_unet"
    config.network.args = {
        "ch": 128,
        "ch_mult": (1, 1, 2, 2, 4, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (16,),
        "dropout": 0.0,
    }
    # To save memory; the images do not depend on it.
    config.gamma.batch_size = config.sample.batch_size = 50
    return config
