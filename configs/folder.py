"""Your own images from a folder, at 32x32, linear schedule: docs/own_data.md.

    --config.data.root=FOLDER --config.data.size=64

The network (0.7M parameters) takes images of any side that is a multiple of 4. The sizes and the
length are ours.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = common.experiment("folder", method)
    config.seed = 0
    config.data.name = "folder"
    config.data.size = 32
    config.network.name = "iddpm_unet"
    config.network.args = {
        "model_channels": 16,
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "dropout": 0.0,
        "channel_mult": (1, 2, 4),
        "num_heads": 2,
        "use_scale_shift_norm": True,
        "num_groups": 8,
    }
    config.base.update(iterations=5000, batch_size=32, lr=5e-4, ema=0.999, ckpt_every=500, keep=2)
    config.head.update(iterations=1000, batch_size=32, lr=5e-4, ema=0.995, ckpt_every=500, keep=2)
    config.gamma.update(n_images=100, batch_size=100)
    config.sample.update(n_images=1000, batch_size=100, steps=(10, 25))
    config.evaluate.features = ("thumbnails",)
    return config
