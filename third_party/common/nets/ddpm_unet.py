"""The UNet of DDPM (arXiv 2006.11239), plain and with a variance head (arXiv 2206.07309).

The published CelebA64 and LSUN checkpoints and those of the official SA-DPM code belong to this
family.

Notation: x [B, C, H, W]; timesteps [B]; temb [B, E], E = 4 ``ch``, the embedded time; h the
features, w its channels. Level i works on maps of resolution / 2^i pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import common
from .common import FrozenTrunk, GroupNorm, Upsample

NORM_EPS = 1e-6


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then two layers: timesteps [B] -> temb [B, 4 ch]."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, 4 ch]."""
        first, second = self.dense
        embedding = common.timestep_embedding(
            timesteps, self.ch, cos_first=False, endpoint=True, dtype=first.weight.dtype
        )
        return second(F.silu(first(embedding)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, with the time added in between, around a residual connection."""

    def __init__(
        self, width: int, out_width: int, *, emb_width: int, dropout: float, num_groups: int
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.temb_proj = nn.Linear(emb_width, out_width)
        self.norm2 = GroupNorm(num_groups, out_width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        # Without a change of channels the checkpoints have no entry here; None is not registered.
        self.nin_shortcut = None if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, width, H, W], temb [B, E] -> [B, out_width, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention of one head over the pixels, with a residual connection."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, width, eps=NORM_EPS)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, w, H, W] -> [B, w, H, W]."""
        tokens = common.to_tokens(self.norm(x))
        q, k, v = (common.pointwise(conv, tokens)[:, None] for conv in (self.q, self.k, self.v))
        return common.add_tokens(x, common.pointwise(self.proj_out, common.attend(q, k, v)))


class Downsample(nn.Module):
    """A convolution of stride 2, padded only on the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        """[B, w, H, W] -> [B, w, H/2, W/2]."""
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if the level has it."""

    def __init__(
        self, blocks: list[ResnetBlock], attns: list[AttnBlock], **resample: nn.Module
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attns)
        for name, module in resample.items():  # "downsample" or "upsample", or neither
            self.add_module(name, module)

    def step(self, i: int, h: Tensor, temb: Tensor) -> Tensor:
        """Block i of the level: h [B, w, H, W], temb [B, E] -> [B, w', H, W]."""
        h = self.block[i](h, temb)
        return self.attn[i](h) if len(self.attn) else h


@dataclass(frozen=True)
class _Plan:
    """The settings that all blocks of one network share, and the levels made of these blocks."""

    ch: int
    widths: tuple[int, ...]  # channels of each level, from the top
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    dropout: float
    num_groups: int

    def check(self) -> None:
        """Raise ValueError if the blocks cannot be built."""
        factor = 2 ** (len(self.widths) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"resolution must be a multiple of {factor} for the {len(self.widths)} levels of "
                f"ch_mult, got {self.resolution}"
            )
        reached = [self.resolution >> level for level in range(len(self.widths))]
        common.check_attention("attn_resolutions (pixels a side)", self.attn_resolutions, reached)
        common.check_widths((self.ch, *self.widths), "num_groups", self.num_groups)

    def res_block(self, width: int, out_width: int) -> ResnetBlock:
        """A residual block of this network."""
        return ResnetBlock(
            width,
            out_width,
            emb_width=4 * self.ch,
            dropout=self.dropout,
            num_groups=self.num_groups,
        )

    def attentions(self, level: int, count: int) -> list[AttnBlock]:
        """``count`` attention blocks, or none if the level has no attention."""
        if self.resolution >> level not in self.attn_resolutions:
            return []
        return [AttnBlock(self.widths[level], self.num_groups) for _ in range(count)]

    def down(self) -> tuple[nn.ModuleList, list[int]]:
        """The contracting levels, and the channels of every feature map kept for the way up."""
        levels, width, skips = [], self.ch, [self.ch]
        for i, out_width in enumerate(self.widths):
            into = [width] + [out_width] * (self.num_res_blocks - 1)
            blocks = [self.res_block(w, out_width) for w in into]
            skips += [out_width] * self.num_res_blocks
            width, resample = out_width, {}
            if i < len(self.widths) - 1:
                resample["downsample"] = Downsample(width)
                skips.append(width)
            levels.append(Level(blocks, self.attentions(i, self.num_res_blocks), **resample))
        return nn.ModuleList(levels), skips

    def mid(self) -> nn.ModuleDict:
        """The blocks at the lowest resolution."""
        width = self.widths[-1]
        return nn.ModuleDict(
            {
                "block_1": self.res_block(width, width),
                "attn_1": AttnBlock(width, self.num_groups),
                "block_2": self.res_block(width, width),
            }
        )

    def up(self, skips: Sequence[int]) -> nn.ModuleList:
        """The expanding levels in the order of ``down``; they run from the last to the first."""
        levels, left, width = [], list(skips), self.widths[-1]
        for i in reversed(range(len(self.widths))):
            blocks = []
            for _ in range(self.num_res_blocks + 1):
                blocks.append(self.res_block(width + left.pop(), self.widths[i]))
                width = self.widths[i]
            resample = {"upsample": Upsample(width)} if i > 0 else {}
            levels.append(Level(blocks, self.attentions(i, self.num_res_blocks + 1), **resample))
        return nn.ModuleList(reversed(levels))


class Model(nn.Module):
    """Noise network: x [B, in_channels, R, R], timesteps [B] -> [B, out_ch, R, R], R = resolution.

    ``attn_resolutions`` are the sizes in pixels of the maps that get attention, ``num_classes``
    adds a label embedding.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        in_channels: int = 3,
        resolution: int,
        num_groups: int = 32,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        common.check_positive(
            ch=ch,
            out_ch=out_ch,
            num_res_blocks=num_res_blocks,
            in_channels=in_channels,
            resolution=resolution,
        )
        common.check_levels("ch_mult", ch_mult, dropout)
        widths = tuple(ch * m for m in ch_mult)
        self.plan = _Plan(
            ch, widths, num_res_blocks, tuple(attn_resolutions), resolution, dropout, num_groups
        )
        self.plan.check()
        self.in_channels, self.out_ch, self.num_classes = in_channels, out_ch, num_classes
        self.temb = TimeEmbedding(ch)
        if num_classes is not None:
            common.check_positive(num_classes=num_classes)
            self.label_emb = nn.Embedding(num_classes, 4 * ch)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, skips = self.plan.down()
        self.mid = self.plan.mid()
        self.up = self.plan.up(skips)
        self.norm_out = GroupNorm(num_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, R, R], timesteps [B], labels y [B] -> [B, out_ch, R, R]."""
        self._check_inputs(x, timesteps, y)
        return self._output(self.features(x, self.embed(timesteps, y)))

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The embedding [B, E] of time and, in a class-conditional network, of the labels y [B]."""
        temb = self.temb(timesteps)
        return temb if y is None else temb + self.label_emb(y)

    def features(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, C, R, R], temb [B, E] -> the last features h [B, w, R, R], before the output."""
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for i in range(len(level.block)):
                h = level.step(i, h, temb)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        h = self.mid["attn_1"](self.mid["block_1"](h, temb))
        h = self.mid["block_2"](h, temb)
        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = level.step(i, torch.cat((h, skips.pop()), dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return h

    def _output(self, h: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(h)))

    def _check_inputs(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        common.check_inputs(x, timesteps, self.in_channels)
        common.check_labels(x, y, self.num_classes)
        side = self.plan.resolution
        if x.shape[2:] != (side, side):
            raise ValueError(
                f"x must have the height and width resolution={side}, got {list(x.shape[2:])}"
            )


class Model4Pretrained(FrozenTrunk, Model):
    """A frozen noise network and a trainable head on its last features (arXiv 2206.07309).

    Takes the arguments of `Model` for the trunk. ``mode`` "simple": the head is norm_out2 and
    conv_out2; "complex": the residual block before_out with the time embedding precedes them. If
    the trunk has more outputs than x has channels, only the first ones are used. No gradient
    reaches the trunk; one reaches x from eps alone, if x asks for it.
    """

    def __init__(self, *, head_out_ch: int = 3, mode: str = "simple", **trunk_kwargs: Any) -> None:
        super().__init__(**trunk_kwargs)
        common.check_positive(head_out_ch=head_out_ch)
        common.check_choice("mode", mode, common.MODES)
        common.check_eps_channels("out_ch", self.out_ch, self.in_channels)
        width = self.plan.widths[0]
        self.before_out = self.plan.res_block(width, width) if mode == "complex" else None
        self.norm_out2 = GroupNorm(self.plan.num_groups, width, eps=NORM_EPS)
        self.conv_out2 = nn.Conv2d(width, head_out_ch, 3, padding=1)
        self.freeze_trunk(("before_out", "norm_out2", "conv_out2"))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, R, R], timesteps [B], y [B] -> (eps, head) [B, C + head_out_ch, R, R]."""
        self._check_inputs(x, timesteps, y)
        with self.without_graph_unless_asked(x):
            temb = self.embed(timesteps, y)
            h = self.features(x, temb)
            eps = self._output(h)[:, : self.in_channels]
        h = h.detach()
        if self.before_out is not None:
            h = self.before_out(h, temb)
        return torch.cat((eps, self.conv_out2(F.silu(self.norm_out2(h)))), dim=1)
