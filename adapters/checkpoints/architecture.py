"""Find the network of a state dict by its names and shapes, and report what does not fit.

Notation: a shape is a tuple; ``shapes`` maps the names of a state dict to shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.shell.config_file import load
from sa_files.reading import printable
from third_party.common.nets import (
    Model,
    Model4Pretrained,
    UNetModel,
    UNetModel4Pretrained,
)
from third_party.common.nets.by_name import build_network

Shapes = dict[str, tuple[int, ...]]

LISTED = 10  # names of each kind in an error
FIRST_LAYERS = {"iddpm_unet": "input_blocks.0.0.weight", "ddpm_unet": "conv_in.weight"}
LAST_LAYERS = {"iddpm_unet": "out.2", "ddpm_unet": "conv_out"}
BLOCKS = {"iddpm_unet": "input_blocks.", "ddpm_unet": "down."}
HEADS = {"iddpm_unet": ("out2.",), "ddpm_unet": ("before_out.", "norm_out2.", "conv_out2.")}


def check_fits(state: Mapping[str, Tensor], network: nn.Module, source: object) -> None:
    """ValueError, with the differences, unless ``state`` has ``network``'s names and shapes."""
    given, wanted = _shapes(state), _shapes(network.state_dict())
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    other = [
        f"{name} {list(given[name])} instead of {list(wanted[name])}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    found = {"missing": missing, "extra": extra, "of another shape": other}
    text = "; ".join(
        f"{len(names)} {kind}: {_first(names)}" for kind, names in found.items() if names
    )
    if text:
        raise ValueError(f"{source} does not fit {type(network).__name__}, parameters {text}")


def network_of_state(state: Mapping[str, Tensor], source: object = "the state dict") -> nn.Module:
    """Build the network that the names and shapes describe, without memory for its weights.

    Some options do not affect names and shapes, and get any valid value: the numbers of attention
    heads and of groups, the resolution, dropout.

    Raises:
        ValueError: ``state`` belongs to neither family of networks, or lacks a parameter whose
            shape is needed.
    """
    shapes = _shapes(state)
    family = _family(shapes)
    if family is None:
        weights = [name for name in shapes if name.endswith(".weight")] or list(shapes)
        raise ValueError(
            f"{source} belongs to no known network: no name begins with "
            f"{' or '.join(map(repr, BLOCKS.values()))}, its names are {_first(weights)}"
        )
    build = {"iddpm_unet": _iddpm_of, "ddpm_unet": _ddpm_of}[family]
    try:
        with torch.device("meta"):
            return build(shapes)
    except KeyError as error:
        raise ValueError(
            f"{source} does not fit {family}, parameters 1 missing: {error.args[0]}"
        ) from error
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:  # impossible sizes
        raise ValueError(f"{source} describes no {family}: {error}") from error


def network_of_config(config: str | Path, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network of FILE.py or FILE.py:NAME, without memory for its weights; runs the file.

    The network has a head if ``state`` has one. The configuration names a dataset, not the shape of
    its images: their channels and, for the DDPM UNet, their size are taken from ``state``.
    """
    chosen = load(str(config))
    try:
        name, args = chosen.network.name, chosen.network.args.to_dict()
        joint, mode = chosen.head.training == "joint", chosen.head.mode
    except AttributeError as error:
        raise ValueError(f"--config {config}: {type(error).__name__}: {error}") from error
    shapes = _shapes(state)
    channels = _image_channels(shapes)
    size = _image_size(shapes, args)
    with_head = not joint and any(n.startswith(HEADS.get(name, ())) for n in shapes)
    with torch.device("meta"):
        return build_network(
            name,
            args,
            (channels, size, size),
            trunk_channels=2 * channels if joint else channels,
            head_channels=channels if with_head else 0,
            head_mode=mode,
        )


def cut_outputs(state: Mapping[str, Tensor], outputs: int) -> dict[str, Tensor]:
    """The state dict of the same network with only its first ``outputs`` output channels.

    A network with a learned variance (arXiv 2102.09672) returns the noise in its first channels.
    """
    family = _family(_shapes(state))
    layer = LAST_LAYERS.get(family or "", "")
    there = len(state[f"{layer}.weight"]) if f"{layer}.weight" in state else 0
    if isinstance(outputs, bool) or not isinstance(outputs, int) or not 1 <= outputs <= there:
        raise ValueError(
            f"outputs={outputs!r}: must be between 1 and the checkpoint's {there} output channels"
        )
    cut = {f"{layer}.weight", f"{layer}.bias"}
    return {name: t[:outputs] if name in cut else t for name, t in state.items()}


# ----------------------------------------------------------------------- from names to sizes


def _iddpm_of(shapes: Shapes) -> nn.Module:
    ch, channels = shapes[FIRST_LAYERS["iddpm_unet"]][:2]
    levels: list[list[int]] = [[]]  # the blocks of each level
    for i in range(1, _count(shapes, "input_blocks.")):
        if _any(shapes, f"input_blocks.{i}.0.in_layers."):
            levels[-1].append(i)
        else:
            levels.append([])
    widths = [shapes[f"input_blocks.{blocks[0]}.0.in_layers.2.weight"][0] for blocks in levels]
    last_in = f"input_blocks.{levels[0][0]}.0"
    args: dict[str, Any] = {
        "in_channels": channels,
        "model_channels": ch,
        "out_channels": shapes["out.2.weight"][0],
        "num_res_blocks": len(levels[0]),
        "channel_mult": [width // ch for width in widths],
        "attention_resolutions": [
            2**i for i, b in enumerate(levels) if _any(shapes, f"input_blocks.{b[0]}.1.")
        ],
        "conv_resample": len(levels) == 1 or any(".0.op." in name for name in shapes),
        "num_classes": shapes["label_emb.weight"][0] if _any(shapes, "label_emb.") else None,
        "use_scale_shift_norm": shapes[f"{last_in}.emb_layers.1.weight"][0] == 2 * widths[0],
        "num_groups": 1,
    }
    if not _any(shapes, *HEADS["iddpm_unet"]):
        return UNetModel(**args)
    complex_head = _any(shapes, "out2.0.in_layers.")
    head = shapes[f"out2.{3 if complex_head else 2}.weight"][0]
    mode = "complex" if complex_head else "simple"
    return UNetModel4Pretrained(**args, head_out_channels=head, mode=mode)


def _ddpm_of(shapes: Shapes) -> nn.Module:
    ch, channels = shapes[FIRST_LAYERS["ddpm_unet"]][:2]
    levels = range(_count(shapes, "down."))
    widths = [shapes[f"down.{i}.block.0.conv1.weight"][0] for i in levels]
    sides = [2 ** (len(levels) - 1 - i) for i in levels]
    args: dict[str, Any] = {
        "ch": ch,
        "in_channels": channels,
        "out_ch": shapes["conv_out.weight"][0],
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": _count(shapes, "down.0.block."),
        "attn_resolutions": [sides[i] for i in levels if _any(shapes, f"down.{i}.attn.")],
        "resolution": sides[0],
        "num_groups": 1,
    }
    if not _any(shapes, *HEADS["ddpm_unet"]):
        return Model(**args)
    mode = "complex" if _any(shapes, "before_out.") else "simple"
    return Model4Pretrained(**args, head_out_ch=shapes["conv_out2.weight"][0], mode=mode)


def _family(shapes: Shapes) -> str | None:
    return next((family for family, start in BLOCKS.items() if _any(shapes, start)), None)


def _image_channels(shapes: Shapes) -> int:
    first = shapes.get(FIRST_LAYERS.get(_family(shapes) or "", ""), ())
    return first[1] if len(first) > 1 else 3


def _image_size(shapes: Shapes, args: Mapping[str, Any]) -> int:
    """The image size with which the DDPM UNet has attention in the levels where ``shapes`` do.

    If no size fits: one with which it can be built, so that ``check_fits`` lists the differences.
    """
    levels = max(len(args.get("ch_mult", ())), 1)
    sides = args.get("attn_resolutions") or (1,)
    first = next((i for i in range(levels) if _any(shapes, f"down.{i}.attn.")), levels - 1)
    size, largest = max(sides) << first, min(sides) << (levels - 1)
    return size if size <= largest and size % 2 ** (levels - 1) == 0 else largest


def _count(shapes: Shapes, start: str) -> int:
    """The number of parts numbered after ``start``: one more than the largest number.

    Parts without parameters do not appear, but there are never more of them than of the others.
    """
    numbers = {name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)}
    largest = max((int(n) for n in numbers if n.isdecimal() and len(n) < 10), default=-1)
    return min(largest + 1, 2 * len(numbers))


def _any(shapes: Shapes, *starts: str) -> bool:
    return any(name.startswith(starts) for name in shapes)


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _first(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return printable(", ".join(names[:LISTED])) + more
