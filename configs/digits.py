"""scikit-learn's 8x8 handwritten digits, linear schedule: minutes on two cores.

No paper uses it; the sizes (0.2M parameters) and the length are ours. The averages are short: after
a thousand iterations the hosts' rate of 0.9999 would leave nine tenths of the initial weights.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = common.experiment("digits", method)
    config.seed = 0
    config.data.name = "digits"
    config.network.name = "iddpm_unet"
    config.network.args = {
        "model_channels": 16,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "dropout": 0.0,
        "channel_mult": (1, 2),
        "num_heads": 1,
        "use_scale_shift_norm": True,
        "num_groups": 8,
    }
    config.base.update(iterations=1000, lr=1e-3, ema=0.995, ckpt_every=500, keep=2)
    config.head.update(iterations=500, lr=1e-3, ema=0.99, ckpt_every=250, keep=2)
    config.gamma.update(n_images=100, batch_size=100)
    config.sample.update(n_images=1000, batch_size=500, steps=(5, 10, 25, 50))
    config.evaluate.features = ("digit_classifier", "pixels")
    return config
