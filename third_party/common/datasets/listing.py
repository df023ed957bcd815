"""The names of the images in a folder and below it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sa_files.reading import printable

from ._common import one_line, option

logger = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Names(Sequence[bytes]):
    """Many names in one string of bytes.

    A list of millions of names would be copied into every worker, because reading an object changes
    its reference count. An array of equally long names grows with the longest.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._joined = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:  # type: ignore[override]  # no slices
        i = range(len(self))[i]
        return self._joined[self._ends[i] : self._ends[i + 1]]


def list_images(folder: Path, *, follow_links: bool) -> Names:
    """The images' names relative to the folder, sorted.

    Each folder is entered once. A link to a folder inside adds nothing: that folder is entered
    anyway. Links that leave the folder are told of, and followed only with `follow_links`.

    Raises:
        ValueError: the folder cannot be listed, or holds no images.
    """
    left: list[str] = []  # links that lead outside and are not followed
    try:
        names = sorted(_walk(folder, follow_links, left))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {one_line(error)}") from error
    links = (
        f"{len(left)} links lead out of it, such as {min(left, default='')}, and are not followed "
        f"({option('follow_links')})"
    )
    if not names:
        why = links if left else f"no file ends in {' '.join(SUFFIXES)}"
        raise ValueError(f"{folder} holds no images: {why}")
    if left:
        logger.warning("%s", printable(f"{folder}: {links}"))
    return Names(names)


def classes_of(folder: Path, names: Names) -> tuple[tuple[str, ...], list[int]]:
    """The sub-folders of `folder` that hold images, sorted, and for each image which it is in.

    Raises:
        ValueError: an image is in no sub-folder, and is named.
    """
    tops = []
    for name in names:
        top, within, _ = os.fsdecode(name).partition(os.sep)
        if not within:
            raise ValueError(
                f"{folder} holds {top} outside its sub-folders: with data.labels each image is in "
                "one, which is its class"
            )
        tops.append(top)
    classes = sorted(set(tops))
    numbers = {top: number for number, top in enumerate(classes)}
    return tuple(classes), [numbers[top] for top in tops]


def _walk(folder: Path, follow_links: bool, left: list[str]) -> Iterator[bytes]:
    inside = os.path.realpath(folder)
    seen: set[tuple[int, int]] = set()
    tops = [str(folder)]  # links are entered after all that is not reached by a link
    for top in tops:
        for parent, folders, files in os.walk(top, onerror=_raise):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            links = {f for f in folders if os.path.islink(os.path.join(parent, f))}
            tops += (os.path.join(parent, f) for f in sorted(links) if follow_links)
            chosen = {f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")}
            for name in links | chosen:
                path = os.path.join(parent, name)
                if not follow_links and os.path.islink(path) and _leaves(path, inside):
                    left.append(os.path.relpath(path, folder))
                elif name in chosen:
                    yield os.fsencode(os.path.relpath(path, folder))


def _leaves(link: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(link), folder]) != folder


def _raise(error: OSError) -> None:
    raise error
