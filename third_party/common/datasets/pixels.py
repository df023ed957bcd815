"""Image files decoded by Pillow, cropped and resized: path -> uint8 [C,H,W]."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sa_files.reading import ROOM, UnreadableFile, reading

from ._common import check_choice

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}  # Pillow's names for images of 1 and 3 channels of 8 bits
GREY = ("1", "L", "LA")  # modes without colour; with alpha, which is dropped
MEMORY = ROOM  # bytes that one image may take while it is read

# Bytes a pixel, measured with Pillow 13. What a decoder holds beside the image, at most:
_DECODERS = {"TIFF": 8, "WEBP": 12, "progressive JPEG": 8}
# The image as decoded, and the most that is held of it and its copies afterwards:
_GREY_BYTES, _COLOUR_BYTES = (1, 6), (4, 8)
_ROWS = 64


@dataclass(frozen=True)
class Preparation:
    """How a decoded image is prepared.

    crop       the part that is kept, (left, upper, right, lower); None: the middle square if `size`
               is given, otherwise the whole image
    size       height and width of the result, by bilinear resizing with antialiasing (as
               torchvision's Resize does); None: not resized
    expected   width and height that every file must have; None: any
    channels   3, or 1 for grey; 0: as found, 1 for a grey image and 3 for one in colour
    """

    crop: tuple[int, int, int, int] | None = None
    size: int | None = None
    expected: tuple[int, int] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        check_choice("channels", self.channels, (0, *MODES))
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size!r}: must be at least 1, or None")


def read_image(path: Path, preparation: Preparation, at: float | None = None) -> Tensor:
    """The prepared image of a file, uint8 [C,H,W]; ValueError with the file's name if it fails."""
    with reading(path, "cannot be used as an image") as file:
        return decode_image(file, preparation, at)


def decode_image(file: BinaryIO, preparation: Preparation, at: float | None = None) -> Tensor:
    """The prepared image, uint8 [C,H,W]; damaged bytes can raise any exception.

    at   where along the longer side the square is, in [0, 1); None: in the middle
    """
    image = _upright(file, preparation)
    if image.mode != (mode := _working_mode(image, preparation)):
        image = image.convert(mode)  # transparency is dropped
    if preparation.crop is not None or preparation.size is not None:
        part = preparation.crop or _square(*image.size, at)
        image = image if part == (0, 0, *image.size) else image.crop(part)
    if preparation.size is not None:
        image = image.resize((preparation.size, preparation.size), Image.Resampling.BILINEAR)
    return _tensor(image).expand(preparation.channels or -1, -1, -1).contiguous()


def open_image(file: BinaryIO, preparation: Preparation) -> Image.Image:
    """An image in one of `FORMATS`, whatever its file name, of which only the header is read.

    Pillow recognises many more formats by their first bytes; for some it starts other programs.

    Raises:
        ValueError: the image is deeper than 8 bits, or would take more than `MEMORY` bytes. Large
            JPEG files are decoded at a half, a quarter or an eighth of their size, if the size that
            is asked for is smaller still.
    """
    with warnings.catch_warnings():
        # A few bytes can claim billions of pixels. Pillow alone only warns of the smaller cases.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
    reductions = [1]
    if image.format == "JPEG" and preparation.size and not preparation.crop:
        reductions += [s for s in (2, 4, 8) if min(image.size) >= s * preparation.size]
    reduction = next((s for s in reductions if _memory(image, s) <= MEMORY), None)
    if reduction is None:
        width, height = image.size
        raise UnreadableFile(
            f"its {width} x {height} pixels would take {_memory(image, 1) >> 20} MiB, more than "
            f"{MEMORY >> 20}: store it smaller"
        )
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image after its orientation is followed."""
    if image.format == "PNG" and "exif" not in image.info:
        return image.size  # Pillow would decode the whole image to look behind it
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _upright(file: BinaryIO, preparation: Preparation) -> Image.Image:
    image = open_image(file, preparation)
    ImageOps.exif_transpose(image, in_place=True)
    if preparation.expected is not None and image.size != preparation.expected:
        raise ValueError(f"it is {_sides(image.size)}, must be {_sides(preparation.expected)}")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # a palette may hold transparent colours
    return image


def _working_mode(image: Image.Image, preparation: Preparation) -> str:
    """Grey images stay grey until the end, when all channels become equal."""
    return MODES[1] if image.mode in GREY else MODES[preparation.channels or 3]


def _memory(image: Image.Image, reduction: int) -> int:
    """The bytes that reading an opened image takes at most, if decoded at 1 / reduction."""
    kind = "progressive JPEG" if image.info.get("progressive") else image.format
    decoded, copies = _GREY_BYTES if image.mode in ("1", "L") else _COLOUR_BYTES
    pixels = image.width * image.height
    kept = pixels // reduction**2
    return max(_DECODERS.get(kind or "", 0) * pixels + decoded * kept, copies * kept)


def _tensor(image: Image.Image) -> Tensor:
    """uint8 [C,H,W]; a few rows at a time, since Pillow makes two copies of what it hands out."""
    width, height = image.size
    pixels = np.empty((len(image.getbands()), height, width), np.uint8)
    for top in range(0, height, _ROWS):
        rows = np.asarray(image.crop((0, top, width, min(top + _ROWS, height))))
        pixels[:, top : top + _ROWS] = rows if rows.ndim == 2 else rows.transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _square(width: int, height: int, at: float | None) -> tuple[int, int, int, int]:
    side = min(width, height)
    left, upper = (_offset(longer - side, at) for longer in (width, height))
    return left, upper, left + side, upper + side


def _offset(spare: int, at: float | None) -> int:
    return spare // 2 if at is None else int(at * (spare + 1))


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} wide and {size[1]} high"
