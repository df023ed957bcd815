"""The digits by class, with guidance: one network draws each of the ten digits."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import digits


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = digits.get_config(method)
    config.name = f"digits_classes_{method}"
    config.data.labels = True
    config.base.label_drop = 0.1
    config.sample.guidance = 1.0
    return config
