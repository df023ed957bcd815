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

import numpy as np
from ml_collections import FrozenConfigDict

from sa_files.stored import read_json
from sa_files.writing import write_atomically
from third_party.common.data import ImageDataset, Images
from third_party.common.datasets.folders import ImageFolder

FILE = "images.json"
DATA = ("folder", "npz")  # other data sets are the same everywhere


def check_images(workdir: Path, data: FrozenConfigDict, dataset: ImageDataset) -> None:
    """ValueError if the results in ``workdir`` are of other images of this root."""
    found = _told(workdir).get(_key(data)) if data.name in DATA else None
    if found is None or found["digest"] == _digest(dataset):
        return
    what = f"{found['images']} were there, {len(dataset)} are"
    if found["images"] == len(dataset):
        what = "files have other names or sizes" if data.name == "folder" else "pixels differ"
    raise ValueError(
        f"the results in {workdir} are of other images of {data.root} ({what}): give another "
        f"--workdir, put the images back, or remove {FILE} if there are no results yet"
    )


def record_images(workdir: Path, data: FrozenConfigDict, dataset: ImageDataset) -> None:
    """Tell in ``workdir`` what the images are, unless that is told."""
    told = _told(workdir) if data.name in DATA else {}
    if data.name in DATA and _key(data) not in told:
        told[_key(data)] = {"images": len(dataset), "digest": _digest(dataset)}
        text = json.dumps(told, indent=2, sort_keys=True) + "\n"
        write_atomically(workdir / FILE, text.encode(), sync=True)


def _told(workdir: Path) -> dict[str, dict[str, Any]]:
    path = workdir / FILE
    if not path.exists():
        return {}
    damaged = "is damaged: remove it if the images are those of the results"
    return read_json(
        path,
        damaged,
        lambda found: {
            str(root): {"images": int(one["images"]), "digest": str(one["digest"])}
            for root, one in found.items()
        },
    )


def _key(data: FrozenConfigDict) -> str:
    """The root, with what else decides which images are read there."""
    return f"{data.root}, links followed" if data.follow_links else str(data.root)


def _digest(dataset: ImageDataset) -> str:
    """Of a folder's file names and sizes, which are read quickly; of an npz file's arrays."""
    found = hashlib.sha256()
    if isinstance(dataset, ImageFolder):
        for i in range(len(dataset)):
            path = dataset.path(i)
            name = os.fsencode(path.relative_to(dataset.folder))
            found.update(b"%s\0%d\0" % (name, path.stat().st_size))
    elif isinstance(dataset, Images):
        for tensor in [dataset.images, *([] if dataset.labels is None else [dataset.labels])]:
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(np.ascontiguousarray(tensor.numpy()))
    return found.hexdigest()[:16]
