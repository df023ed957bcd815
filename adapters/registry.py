"""The networks and reverse processes that a configuration can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from third_party.common.nets import (
    Model,
    Model4Pretrained,
    UNetModel,
    UNetModel4Pretrained,
)


@dataclass(frozen=True)
class ReverseProcess:
    """A row of the tables: the sampler's forward process and variance.

    ``needs``: what its optimal variance needs besides the noise network: a second output ("eps2"
    for SN, "epsc" for NPR) or "gamma" (Analytic); None without an optimal variance.
    """

    title: str
    forward: str
    variance: str
    needs: str | None = None


PROCESSES: dict[str, ReverseProcess] = {
    "ddpm_small": ReverseProcess("DDPM small", "ddpm", "small"),
    "ddpm_big": ReverseProcess("DDPM big", "ddpm", "big"),
    "ddim": ReverseProcess("DDIM", "ddim", "small"),
    "analytic_ddpm": ReverseProcess("Analytic-DDPM", "ddpm", "analytic", "gamma"),
    "analytic_ddim": ReverseProcess("Analytic-DDIM", "ddim", "analytic", "gamma"),
    "npr_ddpm": ReverseProcess("NPR-DDPM", "ddpm", "npr", "epsc"),
    "npr_ddim": ReverseProcess("NPR-DDIM", "ddim", "npr", "epsc"),
    "sn_ddpm": ReverseProcess("SN-DDPM", "ddpm", "sn", "eps2"),
    "sn_ddim": ReverseProcess("SN-DDIM", "ddim", "sn", "eps2"),
}


def _iddpm_unet(
    args: Mapping[str, Any], image_shape: tuple[int, ...], trunk: int, head: int, mode: str
) -> nn.Module:
    args = {**args, "in_channels": image_shape[0], "out_channels": trunk}
    if head:
        return UNetModel4Pretrained(**args, head_out_channels=head, mode=mode)
    return UNetModel(**args)


def _ddpm_unet(
    args: Mapping[str, Any], image_shape: tuple[int, ...], trunk: int, head: int, mode: str
) -> nn.Module:
    args = {"resolution": image_shape[1], **args, "in_channels": image_shape[0], "out_ch": trunk}
    return Model4Pretrained(**args, head_out_ch=head, mode=mode) if head else Model(**args)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "iddpm_unet": _iddpm_unet,
    "ddpm_unet": _ddpm_unet,
}


def build_network(
    name: str,
    args: Mapping[str, Any],
    image_shape: tuple[int, ...],
    *,
    trunk_channels: int,
    head_channels: int = 0,
    head_mode: str = "simple",
) -> nn.Module:
    """The network called ``name`` for images of ``image_shape`` (C, H, W).

    Raises:
        ValueError: the name is unknown, or the network does not accept an argument.
    """
    if name not in NETWORKS:
        raise ValueError(f"network.name must be one of {sorted(NETWORKS)}, got {name!r}")
    try:
        return NETWORKS[name](args, image_shape, trunk_channels, head_channels, head_mode)
    except TypeError as error:
        raise ValueError(f"network.args of {name!r}: {error}") from error


def get_process(name: str) -> ReverseProcess:
    """The reverse process called ``name``; a ValueError lists the known names."""
    if name not in PROCESSES:
        raise ValueError(f"sample.processes must be among {sorted(PROCESSES)}, got {name!r}")
    return PROCESSES[name]
