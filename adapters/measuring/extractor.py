"""An extractor: a named map from images to the features in which they are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from third_party.common.data import to_unit_range


@dataclass(frozen=True)
class Extracted:
    """The result of a forward pass: ``features`` [B, D] and, for classifiers, ``logits`` [B, C]."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A named map from images [B, C, H, W] in [-1, 1], on any device, to features.

    ``established_names``: the names of the Fréchet distance and of the Inception-Score formula on
    these features, if the literature has special names for them.
    """

    name: str
    extract: Callable[[Tensor], Extracted]
    established_names: tuple[str, str] | None = None

    @property
    def metric_names(self) -> tuple[str, str]:
        """Keys of the distance and of the score: ``frechet_NAME``, ``is_NAME`` by default."""
        return self.established_names or (f"frechet_{self.name}", f"is_{self.name}")


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] to float32 in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 [B, C, H, W], got {images.dtype} of shape {tuple(images.shape)}"
        )
    return to_unit_range(images)
