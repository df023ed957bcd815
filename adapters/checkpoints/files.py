"""Read a checkpoint file of unknown origin as data, without running code; write one safely.

A file is one of ``torch.save``, or of safetensors if its name ends so. In the first kind, besides
tensors and plain values, one name is allowed, argparse.Namespace; an inert class replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_files.reading import reading
from sa_files.safe import SUFFIX, load_safetensors
from sa_files.tensors import load_tensors
from sa_files.writing import written_atomically


class Settings:
    """Replaces argparse.Namespace in a file; its content is read and dropped."""

    def __init__(self, *_: object, **__: object) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing: an attribute could shadow a method."""


def read_file(path: Path) -> Any:
    """The content of a file of ``torch.save`` or safetensors, on the CPU.

    Raises:
        ValueError: the file is of another kind or damaged, or holds anything besides tensors, plain
            containers, plain values and argparse.Namespace. No code in it has been run.
    """
    with reading(path, "is damaged or not a checkpoint") as file:
        if path.suffix == SUFFIX:
            return load_safetensors(file)
        return load_tensors(file, {"argparse.Namespace": Settings})


def write_file(state: Mapping[str, Tensor], path: Path) -> None:
    """Save a state dict under a temporary name, then rename: ``path`` is never half written."""
    with written_atomically(path, sync=True) as file:
        torch.save(compact(state), file)


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, views copied: a view would be saved with all the memory behind it."""
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in state.items()
    }
