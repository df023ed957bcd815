"""What the headers of image files say, before any image is decoded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sa_files.reading import printable, reading

from ._common import option
from .pixels import GREY, Preparation, open_image, upright_size

logger = logging.getLogger(__name__)

_SHOWN = 3


def survey(folder: Path, paths: Iterable[Path], preparation: Preparation) -> None:
    """Read all headers, and log how many images there are of each size and of each mode.

    Different sizes or modes, and colours that are lost, are a warning. "Mode" is Pillow's word,
    such as L for grey.

    Raises:
        ValueError: a file is no image that can be used; the sizes differ and none is given; or some
            images are grey and others in colour, and the channels are to be as found.
    """
    sizes, modes = _Shares(folder, "sizes"), _Shares(folder, "modes")
    for path in paths:
        with reading(path, "cannot be used as an image") as file:
            image = open_image(file, preparation)
            width, height = upright_size(image)
        sizes.add(f"{width}x{height}", path)
        modes.add(image.mode, path)
    told = f"{folder} holds {sum(sizes.counts.values())} images: {sizes}; {modes}"
    if len(sizes.counts) > 1 and preparation.size is None:
        raise ValueError(
            f"{told}. All must have one size (width x height), or give a size "
            f"({option('size')}): the side of the squares to which they are cropped and resized"
        )
    greys = modes.counts.keys() & set(GREY)
    if preparation.channels == 0 and greys and greys != modes.counts.keys():
        raise ValueError(
            f"{told}. Some are grey and some in colour: give the channels "
            f"({option('channels')}), 3 to read all as RGB or 1 to read all as grey"
        )
    read = "grey" if preparation.channels == 1 or (preparation.channels == 0 and greys) else "RGB"
    square = f" at {preparation.size}x{preparation.size}" if preparation.size else ""
    is_mixed = len(sizes.counts) > 1 or len(modes.counts) > 1
    loses_colour = preparation.channels == 1 and not modes.counts.keys() <= set(GREY)
    level = logging.WARNING if is_mixed or loses_colour else logging.INFO
    logger.log(level, "%s", printable(f"{told}; all are read as {read}{square}"))


class _Shares:
    """How many images are of each kind, and the first of them."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self.what = what
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Path] = {}

    def add(self, kind: str, path: Path) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, path)

    def __str__(self) -> str:
        common = self.counts.most_common(_SHOWN)
        shown = [f"{n} {kind} ({self.first[kind].relative_to(self.folder)})" for kind, n in common]
        hidden = self.counts.total() - sum(n for _, n in common)
        return ", ".join([*shown, *([f"{hidden} of other {self.what}"] if hidden else [])])
