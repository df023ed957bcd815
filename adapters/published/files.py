"""One checkpoint file of unknown origin: read as data, without running anything; written safely.

One name is allowed beside tensors and plain values, argparse.Namespace, and gets an inert stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_plugin._files.reading import reading
from sa_plugin._files.tensors import load_tensors
from sa_plugin._files.writing import written_atomically


class Settings:
    """Stands in for argparse.Namespace in a file: whatever it holds is read and dropped."""

    def __init__(self, *_: object, **__: object) -> None:
        """Take any arguments."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing: an attribute could shadow a method."""


def read_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Raises:
        ValueError: not such a file, damaged, or holding anything beside tensors, plain containers,
            plain values and argparse.Namespace. Nothing of it has been run then.
    """
    with reading(path, "is damaged, or no checkpoint") as file:
        return load_tensors(file, {"argparse.Namespace": Settings})


def write_file(state: Mapping[str, Tensor], path: Path) -> None:
    """Save a state dict under a temporary name and rename: ``path`` is never seen half written."""
    with written_atomically(path, sync=True) as file:
        torch.save(compact(state), file)


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what surrounds them: a view is saved with all that it views."""
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in state.items()
    }
