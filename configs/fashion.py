"""Fashion-MNIST at 32x32, linear schedule: an experiment of this project for about one GPU hour.

No paper uses it; the sizes (13.2M parameters) and the length are ours. The hour is an estimate from
the number of operations, 3.3e12 in a training step of SA-2. On a slower GPU shorten it with

    --config.base.iterations=5000 --config.head.iterations=1000 --config.sample.n_images=2000

To run every stage on a CPU in three minutes, use these options. They give 0.1M parameters and a
training too short to learn: the images are noise.

    --config.network.args.model_channels=16 --config.network.args.num_groups=8
    --config.network.args.num_res_blocks=1 --config.network.args.channel_mult="(1,2)"
    --config.network.args.attention_resolutions="()" --config.base.batch_size=32
    --config.base.iterations=200 --config.head.iterations=100 --config.head.batch_size=32
    --config.gamma.n_images=10 --config.sample.n_images=200 --config.sample.steps="(10,)"

The evaluation compares pixels, which needs no download. For FID give
--config.evaluate.features="('inception','pixels')".
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = common.experiment("fashion", method)
    config.seed = 0
    config.data.name = "fashion"
    config.network.name = "iddpm_unet"
    config.network.args = {
        "model_channels": 64,
        "num_res_blocks": 3,
        "attention_resolutions": (2, 4),
        "dropout": 0.1,
        "channel_mult": (1, 2, 2, 2),
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "num_groups": 32,
    }
    config.base.update(iterations=20_000, lr=2e-4, ema=0.999, ckpt_every=2000, keep=2)
    config.head.update(iterations=5000, lr=2e-4, ema=0.999, ckpt_every=1000, keep=2)
    config.gamma.n_images = 1000
    config.sample.update(n_images=10_000, steps=(10, 25, 50, 100))
    config.evaluate.features = ("pixels",)
    return config
