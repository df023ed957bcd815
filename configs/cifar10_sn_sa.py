"""SN-DPM with the SA loss on CIFAR10, linear schedule: the papers' settings.

Network, data, training and evaluation: arXiv 2206.07309 (the noise network of arXiv 2102.09672);
SA-2 with lambda 1: arXiv 2312.12431, Table 4.
"""

from configs.base import base_config


def get_config():
    config = base_config()
    config.name = "cifar10_sn"
    config.data.name = "cifar10"
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
    config.sample.processes = ("ddpm_small", "ddpm_big", "sn_ddpm", "ddim", "sn_ddim")
    return config
