"""An extractor: a named map from images to the features in which they are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


def network_features(
    name: str,
    network: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
) -> Extractor:
    """The features of any network, for ``summarise`` and ``evaluate``.

    ``network``: takes images [B, C, H, W] in [-1, 1], float32 on ``device``. It returns features
    [B, ...], which are flattened, or a pair of features and a classifier's logits [B, classes]. A
    module is moved to ``device`` and put in eval mode. Wrap a network that needs images of another
    size or range.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, since it names metrics, got {name!r}")
    if isinstance(network, nn.Module):
        network = network.to(device).eval()

    @torch.no_grad()
    def extract(x: Tensor) -> Extracted:
        output = network(x.to(device))
        features, logits = output if isinstance(output, tuple) else (output, None)
        if features.ndim < 2 or len(features) != len(x):
            raise ValueError(
                f"network {name!r} must give features [{len(x)}, ...], got {tuple(features.shape)}"
            )
        return Extracted(features.flatten(1), logits)

    return Extractor(name, extract)
