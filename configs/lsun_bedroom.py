"""LSUN bedroom 256x256: network and SN's complex head as in arXiv 2206.07309.

These settings are not known and keep their defaults: NPR's head (simple), the noise network's
training, K and lambda. The SA paper does not use LSUN; its lambda for CelebA-HQ, of the same size,
is 0.1.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import size256


def get_config(method: str = "sn") -> ConfigDict:
    """The experiment of a method ("analytic", "npr", "sn", "ocm")."""
    config = size256.experiment("lsun_bedroom", method)
    config.head.mode = "complex" if method == "sn" else "simple"
    return config
