"""CIFAR10, the linear (LS) and the cosine (CS) schedule of arXiv 2201.06503 and 2206.07309.

Network: arXiv 2102.09672, as in the published checkpoints (52.5M parameters). SA-2 with lambda 1:
arXiv 2312.12431, Table 4. The other two rows of that table are

    --config.sa.K=3 --config.sa.lam=0.3
    --config.sa.K=4 --config.sa.lam=0.2
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn", *, cosine: bool = False) -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm") with one of the two schedules."""
    config = common.experiment("cifar10_cosine" if cosine else "cifar10", method)
    config.data.name = "cifar10"
    if cosine:
        common.use_cosine_schedule(config)
    config.network.name = "iddpm_unet"
    config.network.args = {
        "model_channels": 128,
        "num_res_blocks": 3,
        "attention_resolutions": (2, 4),
        "dropout": 0.3,
        "channel_mult": (1, 2, 2, 2),
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "num_groups": 32,
    }
    return config
