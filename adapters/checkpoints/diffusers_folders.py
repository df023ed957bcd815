"""Folders of diffusers' UNet2DModel: the settings are checked, the names become the DDPM UNet's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.checkpoints.files import read_file
from sa_files.stored import read_json

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# What the DDPM UNet does, and what UNet2DModel does if its settings do not say.
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attention_head_dim": (None, 8),
    "norm_num_groups": (32, 32),
    "attn_norm_num_groups": (None, None),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "mid_block_scale_factor": (1, 1),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
_ATTENTION = {
    **{"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    # before diffusers 0.14
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
}
# (pattern, replacement), in this order
_NAMES = (
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.", r"\1.\2.attn."),
    (r"^(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3sample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def folder_of_diffusers(path: Path) -> Path | None:
    """The folder at ``path`` with a UNet's settings: itself, or ``unet`` of a pipeline."""
    return next((f for f in (path, path / "unet") if (f / CONFIG).is_file()), None)


def is_of_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of diffusers' UNets."""
    return any(name.startswith("down_blocks.") for name in state)


def read_diffusers(folder: Path) -> dict[str, Tensor]:
    """The weights in ``folder`` with the DDPM UNet's names and shapes.

    Raises:
        ValueError: the settings are another network's, or there are no weights.
    """
    settings = read_json(folder / CONFIG, "holds no settings of diffusers", dict)
    if settings.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{folder / CONFIG}: _class_name must be 'UNet2DModel', got "
            f"{settings.get('_class_name')!r}"
        )
    for key, (wanted, default) in _SETTINGS.items():
        if (given := settings.get(key, default)) != wanted:
            raise ValueError(
                f"{folder / CONFIG}: {key} must be {wanted!r}, as in the DDPM UNet, got {given!r}"
            )
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no weights: must hold {' or '.join(WEIGHTS)}")
    state = read_file(file)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} must hold a state dict, name -> tensor")
    levels = 1 + max(
        (int(m[1]) for n in state if (m := re.match(r"up_blocks\.(\d{1,3})\.", n))), default=0
    )
    return {_name(name, levels): _weight(name, tensor) for name, tensor in state.items()}


def _name(name: str, levels: int) -> str:
    """Its name in the DDPM UNet, which counts the levels of the way up from the last."""
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    if match := re.match(r"(.*\.attn(?:_1|\.\d+)\.)(.+)\.(weight|bias)$", name):
        name = f"{match[1]}{_ATTENTION.get(match[2], match[2])}.{match[3]}"
    if match := re.match(r"up\.(\d{1,3})\.(.*)", name):
        name = f"up.{levels - 1 - int(match[1])}.{match[2]}"
    return name


def _weight(name: str, tensor: Tensor) -> Tensor:
    """Linear layers of the attention are convolutions of 1x1 in the DDPM UNet."""
    linear = ".attentions." in name and isinstance(tensor, Tensor) and tensor.ndim == 2
    return tensor[:, :, None, None] if linear else tensor
