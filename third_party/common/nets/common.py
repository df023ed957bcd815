"""Parts that both UNet families share: time embedding, attention, up-sampling, frozen trunk.

Papers: arXiv 2006.11239 (DDPM) for the UNet with sinusoidal time embedding, 2102.09672 (iDDPM) for
its improved form, 2206.07309 (NPR-DPM, SN-DPM) for the head on a frozen trunk.

Notation: x is the noisy image [B, C, H, W]; timesteps [B] is what the network receives (already
rescaled); temb or emb [B, E] the embedded time; h the features; L = H W the positions of a feature
map read as tokens [B, L, C].
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("simple", "complex")
MAX_PERIOD = 10_000.0


# ----------------------------------------------------------------------------------- time


def timestep_embedding(
    timesteps: Tensor, width: int, *, cos_first: bool, endpoint: bool, dtype: torch.dtype
) -> Tensor:
    """Sinusoids of geometrically falling frequency (arXiv 2006.11239): [B] -> [B, width].

    The angles are computed in at least float32 for any ``dtype``, because bfloat16 rounds 999 and
    1000 to the same number. With ``endpoint`` the slowest frequency is exactly 1/10000 (DDPM);
    without it the slowest frequency is just above (iDDPM). An odd ``width`` ends with a zero
    column.
    """
    half = width // 2
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(half, device=timesteps.device, dtype=wide)
    divisor = max(half - 1 if endpoint else half, 1)
    angles = timesteps.to(wide)[:, None] * torch.exp(steps * (-math.log(MAX_PERIOD) / divisor))
    pair = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    embedding = torch.cat(pair, dim=1)
    return F.pad(embedding, (0, width - 2 * half)).to(dtype)


# ------------------------------------------------------------------------------ attention


def to_tokens(h: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; makes no copy if h is channels_last."""
    return h.flatten(2).transpose(1, 2)


def pointwise(conv: nn.Conv1d | nn.Conv2d, tokens: Tensor) -> Tensor:
    """A convolution of kernel size one on tokens [B, L, C] -> [B, L, C'].

    As a matrix product it leaves the channels contiguous, which the fused attention kernels need.
    """
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over heads: [B, heads, L, d] each -> tokens [B, L, heads d]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def add_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """The residual sum x + tokens, with tokens [B, H W, C] brought to x's shape [B, C, H, W]."""
    return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


# --------------------------------------------------------------------------------- layers


class GroupNorm(nn.GroupNorm):
    """The same normalisation, but in its input's precision if autocast is on.

    CUDA's autocast would copy the features to float32, run the activation in float32, and copy back
    for the convolution. This is not needed: the kernel sums in float32 for any input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...], of x's dtype."""
        kind = x.device.type
        # "meta" has no autocast, and a query whether a device type has it cannot be compiled.
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(kind, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Upsample(nn.Module):
    """Each pixel becomes a square of four pixels; then a 3x3 convolution if ``with_conv``."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


def zero_init(module: nn.Module) -> nn.Module:
    """Set the parameters to zero, so that a residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class FrozenTrunk(nn.Module):
    """Mixin for a network that trains only a head on another network's features.

    The head must describe the network that is used for sampling. The trunk therefore gets no
    gradient and no dropout, even after ``train()`` on the whole network.
    """

    head_names: tuple[str, ...] = ()

    @staticmethod
    def without_graph_unless_asked(x: Tensor) -> AbstractContextManager[Any]:
        """For the trunk's forward pass: it needs a graph only where eps is derived by x."""
        return nullcontext() if x.requires_grad else torch.no_grad()

    def freeze_trunk(self, head_names: tuple[str, ...]) -> None:
        """Leave only the children called ``head_names`` trainable."""
        self.head_names = head_names
        for name, child in self.named_children():
            child.requires_grad_(name in head_names)
        self.train(self.training)

    def train(self, mode: bool = True) -> "FrozenTrunk":
        """Set the mode of the head; the trunk stays in evaluation mode."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in self.head_names:
                child.eval()
        return self


# --------------------------------------------------------------------------------- checks


def check_positive(**arguments: int) -> None:
    """Raise ValueError unless every argument is an integer of at least 1."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_levels(mult_name: str, mult: Sequence[int], dropout: float) -> None:
    """Raise ValueError unless there is a level, multipliers are positive and dropout in [0, 1)."""
    if len(mult) == 0:
        raise ValueError(f"{mult_name} must hold at least one multiplier, got {mult!r}")
    for i, value in enumerate(mult):
        check_positive(**{f"{mult_name}[{i}]": value})
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")


def check_widths(widths: Sequence[int], name: str, parts: int) -> None:
    """Raise ValueError unless ``parts`` (the argument ``name``) divides every channel count."""
    check_positive(**{name: parts})
    for width in widths:
        if width % parts:
            raise ValueError(
                f"{name} must divide the channels of every block, got {name}={parts} "
                f"for a block of {width} channels"
            )


def check_attention(name: str, wanted: Sequence[int], reached: Sequence[int]) -> None:
    """Raise ValueError if attention is requested at a level that the network does not have."""
    for value in wanted:
        if value not in reached:
            raise ValueError(f"{name} must be chosen among {list(reached)}, got {value!r}")


def check_eps_channels(name: str, out_channels: int, in_channels: int) -> None:
    """Raise ValueError if a trunk has too few outputs to predict a noise of x's shape."""
    if out_channels < in_channels:
        raise ValueError(
            f"{name} must be at least in_channels={in_channels}, got {name}={out_channels}"
        )


def check_inputs(x: Tensor, timesteps: Tensor, in_channels: int) -> None:
    """Raise ValueError unless x is [B, in_channels, H, W] and timesteps [B]."""
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x must have shape [B, {in_channels}, H, W], got {list(x.shape)}")
    if timesteps.shape != x.shape[:1]:
        raise ValueError(
            f"timesteps must have shape [B] = [{x.shape[0]}], got {list(timesteps.shape)}"
        )


def check_labels(x: Tensor, y: Tensor | None, num_classes: int | None) -> None:
    """Raise ValueError unless y is [B] if the network has ``num_classes``, and None otherwise."""
    if (y is None) != (num_classes is None):
        raise ValueError(
            "y must be given exactly where the network has num_classes, got "
            f"num_classes={num_classes!r} and {'no y' if y is None else 'a y'}"
        )
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape [B] = [{x.shape[0]}], got {list(y.shape)}")


def check_size(x: Tensor, factor: int) -> None:
    """Raise ValueError unless the height and width of x can be halved down to the last level."""
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"the height and width of x must be multiples of {factor}, got {list(x.shape[2:])}"
        )
