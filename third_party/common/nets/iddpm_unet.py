"""The UNet of improved DDPM (arXiv 2102.09672), plain and with a variance head (2206.07309).

It predicts the noise eps in x (arXiv 2006.11239); with twice the outputs it predicts eps and a
second quantity. The published CIFAR10 and ImageNet64 checkpoints belong to this family.

Notation: x [B, C, H, W]; timesteps [B]; emb [B, E], E = 4 ``model_channels``, the embedded time; h
the features, w its channels. A level of factor f works on maps of H/f x W/f pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import common
from .common import FrozenTrunk, GroupNorm, Upsample, zero_init


def _run(use_checkpoint: bool, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call ``function``; with ``use_checkpoint`` its activations are not kept."""
    if use_checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def _norm_silu_conv(width: int, out_channels: int, num_groups: int) -> list[nn.Module]:
    """The layers from features to an output; zero at the start of training."""
    conv = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))
    return [GroupNorm(num_groups, width), nn.SiLU(), conv]


class ResBlock(nn.Module):
    """Two 3x3 convolutions, with the time entering between them, around a residual connection.

    The time enters as a scale and a shift of the second normalisation (``use_scale_shift_norm``)
    or is added to the features.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        *,
        emb_width: int,
        dropout: float,
        num_groups: int,
        use_scale_shift_norm: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm(num_groups, width), nn.SiLU(), nn.Conv2d(width, out_width, 3, padding=1)
        )
        emb_outputs = 2 * out_width if use_scale_shift_norm else out_width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, emb_outputs))
        self.out_layers = nn.Sequential(
            GroupNorm(num_groups, out_width),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_width, out_width, 3, padding=1)),
        )
        same = width == out_width
        self.skip_connection = nn.Identity() if same else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, width, H, W], emb [B, E] -> [B, out_width, H, W]."""
        return _run(self.use_checkpoint, self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        time = self.emb_layers(emb)[:, :, None, None]
        norm, silu, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + time)
        return self.skip_connection(x) + conv(dropout(silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection.

    The 3w channels of ``qkv`` are ordered by head first, then query, key, value.
    """

    def __init__(
        self, width: int, *, num_heads: int, num_groups: int, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm(num_groups, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zero_init(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, w, H, W] -> [B, w, H, W]."""
        return _run(self.use_checkpoint, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = common.pointwise(self.qkv, common.to_tokens(self.norm(x)))  # [B, L, 3w]
        qkv = qkv.unflatten(2, (self.num_heads, 3, -1)).transpose(1, 2)  # [B, heads, L, 3, d]
        h = common.attend(*qkv.unbind(3))
        return common.add_tokens(x, common.pointwise(self.proj_out, h))


class Downsample(nn.Module):
    """Half the resolution: a convolution of stride 2, or the mean of 2x2 pixels."""

    def __init__(self, width: int, with_conv: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.op = conv if with_conv else nn.AvgPool2d(2)

    def forward(self, h: Tensor) -> Tensor:
        """[B, w, H, W] -> [B, w, H/2, W/2]."""
        return self.op(h)


class EmbedSequential(nn.Sequential):
    """A sequence that passes the time embedding to the layers that take one."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h [B, w, H, W], emb [B, E] -> the output of the last layer."""
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


@dataclass(frozen=True)
class _Plan:
    """The sizes of one network, and the three paths of blocks that follow from them."""

    in_channels: int
    model_channels: int
    out_channels: int
    channel_mult: tuple[int, ...]
    num_classes: int | None
    num_res_blocks: int
    attention_factors: tuple[int, ...]
    conv_resample: bool
    num_heads: int
    num_heads_up: int
    dropout: float
    use_scale_shift_norm: bool
    use_checkpoint: bool
    num_groups: int

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level, from the top."""
        return tuple(self.model_channels * m for m in self.channel_mult)

    @property
    def emb_width(self) -> int:
        """E, the width of the embedded time."""
        return 4 * self.model_channels

    def check(self) -> None:
        """Raise ValueError if the network cannot be built."""
        common.check_positive(
            in_channels=self.in_channels,
            model_channels=self.model_channels,
            out_channels=self.out_channels,
            num_res_blocks=self.num_res_blocks,
        )
        if self.num_classes is not None:
            common.check_positive(num_classes=self.num_classes)
        common.check_levels("channel_mult", self.channel_mult, self.dropout)
        self._check_widths()

    def _check_widths(self) -> None:
        factors = [2**level for level in range(len(self.widths))]
        name = "attention_resolutions (down-sampling factors)"
        common.check_attention(name, self.attention_factors, factors)
        common.check_widths((self.model_channels, *self.widths), "num_groups", self.num_groups)
        attended = [
            width
            for width, factor in zip(self.widths, factors, strict=True)
            if factor in self.attention_factors
        ]
        # The middle block always has attention, at the width of the lowest level.
        common.check_widths((*attended, self.widths[-1]), "num_heads", self.num_heads)
        common.check_widths(attended, "num_heads_upsample", self.num_heads_up)

    def res_block(self, width: int, out_width: int) -> ResBlock:
        """A residual block of this network."""
        return ResBlock(
            width,
            out_width,
            emb_width=self.emb_width,
            dropout=self.dropout,
            num_groups=self.num_groups,
            use_scale_shift_norm=self.use_scale_shift_norm,
            use_checkpoint=self.use_checkpoint,
        )

    def attention(self, width: int, num_heads: int) -> AttentionBlock:
        """An attention block of this network."""
        return AttentionBlock(
            width,
            num_heads=num_heads,
            num_groups=self.num_groups,
            use_checkpoint=self.use_checkpoint,
        )

    def unit(self, level: int, width: int, num_heads: int) -> list[nn.Module]:
        """A residual block from ``width`` channels to those of the level, and its attention."""
        out_width = self.widths[level]
        layers: list[nn.Module] = [self.res_block(width, out_width)]
        if 2**level in self.attention_factors:
            layers.append(self.attention(out_width, num_heads))
        return layers

    def down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """The contracting path, and the channels of each of its outputs."""
        width = self.model_channels
        blocks = [EmbedSequential(nn.Conv2d(self.in_channels, width, 3, padding=1))]
        skips = [width]
        for level, out_width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                blocks.append(EmbedSequential(*self.unit(level, width, self.num_heads)))
                width = out_width
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(EmbedSequential(Downsample(width, self.conv_resample)))
                skips.append(width)
        return nn.ModuleList(blocks), skips

    def middle(self) -> EmbedSequential:
        """The blocks at the lowest resolution."""
        width = self.widths[-1]
        attention = self.attention(width, self.num_heads)
        return EmbedSequential(
            self.res_block(width, width), attention, self.res_block(width, width)
        )

    def up_path(self, skips: Sequence[int]) -> nn.ModuleList:
        """The expanding path; each of its blocks takes one of ``skips``, starting with the last."""
        blocks, left, width = [], list(skips), self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for i in range(self.num_res_blocks + 1):
                layers = self.unit(level, width + left.pop(), self.num_heads_up)
                width = self.widths[level]
                if level > 0 and i == self.num_res_blocks:
                    layers.append(Upsample(width, self.conv_resample))
                blocks.append(EmbedSequential(*layers))
        return nn.ModuleList(blocks)


class UNetModel(nn.Module):
    """Noise network: x [B, in_channels, H, W], timesteps [B] -> [B, out_channels, H, W].

    ``attention_resolutions`` are down-sampling factors (1, 2, 4, ... for the levels from the top),
    ``num_heads_upsample`` -1 means ``num_heads``, ``conv_resample`` False resamples without
    weights, ``num_classes`` adds a label embedding, ``use_checkpoint`` trades time for memory.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        common.check_choice("dims", dims, (2,))
        self.plan = _Plan(
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            channel_mult=tuple(channel_mult),
            num_classes=num_classes,
            num_res_blocks=num_res_blocks,
            attention_factors=tuple(attention_resolutions),
            conv_resample=conv_resample,
            num_heads=num_heads,
            num_heads_up=num_heads if num_heads_upsample == -1 else num_heads_upsample,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            num_groups=num_groups,
        )
        self.plan.check()
        self._build()

    def _build(self) -> None:
        plan = self.plan
        self.time_embed = nn.Sequential(
            nn.Linear(plan.model_channels, plan.emb_width),
            nn.SiLU(),
            nn.Linear(plan.emb_width, plan.emb_width),
        )
        if plan.num_classes is not None:
            self.label_emb = nn.Embedding(plan.num_classes, plan.emb_width)
        self.input_blocks, skips = plan.down_path()
        self.middle_block = plan.middle()
        self.output_blocks = plan.up_path(skips)
        self.out = nn.Sequential(
            *_norm_silu_conv(plan.widths[0], plan.out_channels, plan.num_groups)
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], timesteps [B], labels y [B] -> [B, out_channels, H, W]."""
        self._check_inputs(x, timesteps, y)
        return self.out(self.features(x, self.embed(timesteps, y)))

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The embedding [B, E] of time and, in a class-conditional network, of the labels y [B]."""
        emb = self.time_embed(
            common.timestep_embedding(
                timesteps,
                self.plan.model_channels,
                cos_first=True,
                endpoint=False,
                dtype=self.time_embed[0].weight.dtype,
            )
        )
        return emb if y is None else emb + self.label_emb(y)

    def features(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> the last features h [B, w, H, W], before the output."""
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), emb)
        return h

    def _check_inputs(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        plan = self.plan
        common.check_inputs(x, timesteps, plan.in_channels)
        common.check_size(x, 2 ** (len(plan.widths) - 1))
        common.check_labels(x, y, plan.num_classes)


class UNetModel3OutChannels(UNetModel):
    """The same network, but it returns only the noise: as many channels as x has.

    For trunks trained with a learned variance (arXiv 2102.09672). They have 6 outputs for 3
    channels of x; the other 3 are dropped.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        common.check_eps_channels("out_channels", self.plan.out_channels, self.plan.in_channels)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], timesteps [B], labels y [B] -> eps [B, C, H, W]."""
        return super().forward(x, timesteps, y)[:, : self.plan.in_channels]


class UNetModel4Pretrained(FrozenTrunk, UNetModel):
    """A frozen noise network and a trainable head ``out2`` on its last features (2206.07309).

    Takes the arguments of `UNetModel` for the trunk. ``mode`` "simple": the head has the same
    layers as the output of `UNetModel`; "complex": a residual block with the time embedding
    precedes them. No gradient reaches the trunk; one reaches x from eps alone, if x asks for it.
    """

    def __init__(
        self, *, head_out_channels: int = 3, mode: str = "simple", **trunk_kwargs: Any
    ) -> None:
        super().__init__(**trunk_kwargs)
        common.check_positive(head_out_channels=head_out_channels)
        common.check_choice("mode", mode, common.MODES)
        common.check_eps_channels("out_channels", self.plan.out_channels, self.plan.in_channels)
        width = self.plan.widths[0]
        before = [self.plan.res_block(width, width)] if mode == "complex" else []
        self.out2 = EmbedSequential(
            *before, *_norm_silu_conv(width, head_out_channels, self.plan.num_groups)
        )
        self.freeze_trunk(("out2",))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], timesteps [B], y [B] -> (eps, head) [B, C + head_out_channels, H, W]."""
        self._check_inputs(x, timesteps, y)
        with self.without_graph_unless_asked(x):
            emb = self.embed(timesteps, y)
            h = self.features(x, emb)
            eps = self.out(h)[:, : self.plan.in_channels]
        return torch.cat((eps, self.out2(h.detach(), emb)), dim=1)
