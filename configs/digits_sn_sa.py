"""SN-DPM with the SA loss on scikit-learn's 8x8 digits: the main job, minutes on two cores."""

from configs.base import base_config


def get_config():
    config = base_config()
    config.name = "digits_sn"
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
    config.base.update(iterations=3000, lr=1e-3, ema=0.998, ckpt_every=1000, keep=2)
    config.head.update(iterations=1000, lr=1e-3, ema=0.998, ckpt_every=500, keep=2)
    config.sample.n_images = 2000
    config.sample.batch_size = 500
    config.sample.processes = ("ddpm_small", "ddpm_big", "sn_ddpm", "ddim", "sn_ddim")
    config.sample.steps = (5, 10, 25, 50, 100)
    config.evaluate.features = ("digit_classifier", "pixels")
    return config
