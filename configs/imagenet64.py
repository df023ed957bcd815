"""ImageNet 64x64, cosine schedule.

Network: arXiv 2102.09672, as in the published checkpoint (121.1M parameters; some of them predict
variances, which are not used here). NPR's head is simple, SN's complex, as in arXiv 2206.07309.

These settings are not known and keep their defaults: the number of steps N, the noise network's
training, K and lambda (the SA paper does not use ImageNet). To sample from a published checkpoint,
give the N of its training with --config.schedule.N=...
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = common.experiment("imagenet64", method)
    config.data.name = "imagenet64"
    common.use_cosine_schedule(config)
    config.network.name = "iddpm_unet"
    config.network.args = {
        "model_channels": 128,
        "num_res_blocks": 3,
        "attention_resolutions": (4, 8),
        "dropout": 0.0,
        "channel_mult": (1, 2, 3, 4),
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "num_groups": 32,
    }
    config.head.mode = "complex" if method == "sn" else "simple"
    return config
