"""The networks by name, as configurations choose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .ddpm_unet import Model, Model4Pretrained
from .iddpm_unet import UNetModel, UNetModel4Pretrained


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
    num_classes: int | None = None,
) -> nn.Module:
    """The network called ``name`` for images of ``image_shape`` (C, H, W).

    ``num_classes``: rows of its label embedding; None: as in ``args``, by default no embedding.

    Raises:
        ValueError: the name is unknown, or the network does not accept an argument.
    """
    if num_classes is not None:
        args = {**args, "num_classes": num_classes}
    if name not in NETWORKS:
        raise ValueError(f"network.name must be one of {sorted(NETWORKS)}, got {name!r}")
    try:
        return NETWORKS[name](args, image_shape, trunk_channels, head_channels, head_mode)
    except TypeError as error:
        raise ValueError(f"network.args of {name!r}: {error}") from error
