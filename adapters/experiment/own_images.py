"""Whether a user's own images are still those that the results in a folder were made of.

A configuration names a folder or an npz file, whose content can change. ``images.json`` tells what
was there when the results were begun.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from sa_files.stored import read_json
from sa_files.writing import write_atomically
from third_party.common.data import ImageDataset, Images
from third_party.common.datasets.folders import ImageFolder

FILE = "images.json"
DATA = ("folder", "npz")  # other data sets are the same everywhere


def check_images(workdir: Path, data: FrozenConfigDict, dataset: ImageDataset) -> None:
    """ValueError if the results in ``workdir`` are of other images than ``dataset``."""
    path = workdir / FILE
    if data.name not in DATA or not path.exists():
        return
    count, digest = read_json(path, "is damaged", lambda found: (found["images"], found["digest"]))
    if digest != _digest(dataset):
        what = f"{count} were there, {len(dataset)} are"
        if count == len(dataset):
            what = "files have other names or sizes" if data.name == "folder" else "pixels differ"
        raise ValueError(
            f"the results in {workdir} are of other images of {data.root} ({what}): give another "
            "--workdir, or put the images back"
        )


def record_images(workdir: Path, data: FrozenConfigDict, dataset: ImageDataset) -> None:
    """Tell in ``workdir`` what the images are, unless that is told."""
    path = workdir / FILE
    if data.name in DATA and not path.exists():
        told: dict[str, Any] = {"images": len(dataset), "digest": _digest(dataset)}
        write_atomically(path, json.dumps(told).encode() + b"\n", sync=True)


def _digest(dataset: ImageDataset) -> str:
    """Of a folder's file names and sizes, which are read quickly; of an npz file's pixels."""
    found = hashlib.sha256()
    if isinstance(dataset, ImageFolder):
        for i in range(len(dataset)):
            path = dataset.path(i)
            name = os.fsencode(path.relative_to(dataset.folder))
            found.update(b"%s\0%d\0" % (name, path.stat().st_size))
    elif isinstance(dataset, Images):
        found.update(dataset.images.numpy().tobytes())
    return found.hexdigest()[:16]
