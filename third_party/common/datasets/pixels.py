"""Image files decoded by Pillow, cropped and resized: path -> uint8 [C,H,W]."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sa_files.reading import reading

from ._common import check_choice

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}  # Pillow's names for images of 1 and 3 channels of 8 bits


@dataclass(frozen=True)
class Preparation:
    """How a decoded image is prepared.

    crop       the part that is kept, (left, upper, right, lower); None: the middle square if `size`
               is given, otherwise the whole image
    size       height and width of the result, by bilinear resizing with antialiasing (as
               torchvision's Resize does); None: not resized
    expected   width and height that every file must have; None: any
    channels   3, or 1 for grey
    """

    crop: tuple[int, int, int, int] | None = None
    size: int | None = None
    expected: tuple[int, int] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        check_choice("channels", self.channels, tuple(MODES))
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size!r}: must be at least 1, or None")

    def apply(self, image: Image.Image) -> Image.Image:
        """The image with 8 bits a channel, upright, cropped and resized."""
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
        image = ImageOps.exif_transpose(image)
        if self.expected is not None and image.size != self.expected:
            raise ValueError(f"it is {_sides(image.size)}, must be {_sides(self.expected)}")
        if image.mode == "P":
            image = image.convert("RGBA")  # a palette may hold transparent colours
        image = image.convert(MODES[self.channels])  # transparency is dropped
        if self.crop is not None or self.size is not None:
            image = image.crop(self.crop or _middle_square(*image.size))
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return image


def read_image(path: Path, preparation: Preparation) -> Tensor:
    """The prepared image of a file, uint8 [C,H,W]; ValueError with the file's name if it fails."""
    with reading(path, "cannot be used as an image") as file:
        return decode_image(file, preparation)


def decode_image(file: BinaryIO, preparation: Preparation) -> Tensor:
    """The prepared image, uint8 [C,H,W]; damaged bytes can raise any exception."""
    with open_image(file) as image:
        pixels = np.array(preparation.apply(image))  # [H,W] or [H,W,C]
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


@contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """An image in one of `FORMATS`, whatever its file name.

    Pillow recognises many more formats by their first bytes; for some it starts other programs.
    """
    with warnings.catch_warnings():
        # A few bytes can claim billions of pixels. Pillow alone only warns of the smaller cases.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            yield image


def _middle_square(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} wide and {size[1]} high"
