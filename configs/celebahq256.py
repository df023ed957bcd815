"""CelebA-HQ 256x256: SA-2 with lambda 0.1 and the noise network's training of arXiv 2312.12431.

Not known: the network's sizes, the number of iterations and the heads' training. The sizes are
those of LSUN bedroom (same family, same image size). The others are the host's defaults, except the
batch size.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, size256


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = size256.experiment("celebahq256", method)
    config.sa.lam = 0.1
    common.use_sa_dpm_training(config, lr=2e-5)
    config.base.update(batch_size=24, ema=0.999)
    config.head.batch_size = 24
    return config
