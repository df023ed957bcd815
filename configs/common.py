"""Settings shared by all datasets: the name, the tables' rows, the SA paper's training.

Keys that a dataset's file does not set keep their values of base_config(): the training defaults of
the host of NPR-DPM and SN-DPM, and the evaluation of arXiv 2201.06503 and 2206.07309.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base_config

METHODS = ("analytic", "npr", "sn", "ocm")


def experiment(name: str, method: str) -> ConfigDict:
    """The experiment NAME_METHOD: base_config() with a table of the DDPM and DDIM rows.

    Args:
        name: the name of the data, with the schedule if there are several.
        method: "analytic", "npr", "sn" or "ocm": the optimal variance that is compared.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    config = base_config()
    config.name = f"{name}_{method}"
    rows = ("ddpm_small", "ddpm_big", f"{method}_ddpm", "ddim", f"{method}_ddim")
    config.sample.processes = rows
    return config


def use_cosine_schedule(config: ConfigDict) -> None:
    """The cosine schedule, and the noise clip that belongs to it (arXiv 2201.06503)."""
    config.schedule.name = "cosine"
    config.sample.clip_pixel_ddpm = 1.0


def use_sa_dpm_training(config: ConfigDict, lr: float = 2e-4) -> None:
    """How arXiv 2312.12431 trains its own noise networks; heads keep the host's settings."""
    config.base.update(lr=lr, grad_clip=1.0)
