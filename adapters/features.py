"""Feature spaces in which images are compared, by name in ``EXTRACTORS``.

A metric's name includes its feature space (``frechet_pixels``, ``is_digit_classifier``): numbers of
different spaces cannot be compared. Only Inception's are called ``fid`` and ``inception_score``.
To add a space, write a builder and enter it in ``EXTRACTORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sa_files.writing import written_atomically


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


# (folder of weights, device, folder of datasets) -> extractor
Builder = Callable[[Path | None, torch.device, Path | None], Extractor]


def check_names(names: Sequence[str]) -> None:
    """ValueError unless these are names of extractors, at least one, and each only once."""
    for name in names:
        if name not in EXTRACTORS:
            raise ValueError(f"features must be among {sorted(EXTRACTORS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"features must be different names, at least one, got {names}")


def build_extractors(
    names: Iterable[str],
    *,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    data_root: str | Path | None = None,
) -> tuple[Extractor, ...]:
    """Build the extractors with these names.

    Args:
        cache_dir: folder for weights, read and written; optional.
        data_root: folder of the datasets that classifiers are trained on (default: ``data``).
    """
    names = tuple(names)
    check_names(names)
    cache, root = (None if path is None else Path(path) for path in (cache_dir, data_root))
    return tuple(EXTRACTORS[name](cache, torch.device(device), root) for name in names)


# ---------------------------------------------------------------------------------------- pixels


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] to float32 in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 [B, C, H, W], got {images.dtype} of shape {tuple(images.shape)}"
        )
    return images.to(torch.float32) / 127.5 - 1


def pixels(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """The flattened images themselves, D = C H W; their moments take D^2 numbers."""
    return Extractor("pixels", lambda x: Extracted(x.flatten(1)))


# ----------------------------------------------------------------------------------- any network


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


# ------------------------------------------------------------------ networks in separate modules
# Those modules import this one, so they are imported only inside the functions.


def digit_classifier(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """A classifier of scikit-learn's digits, D = 64."""
    from adapters import classifiers

    return classifiers.extractor("digits", cache_dir, device, root)


def fashion_classifier(
    cache_dir: Path | None, device: torch.device, root: Path | None
) -> Extractor:
    """A classifier of Fashion-MNIST, D = 64; the dataset's files are below ``root``."""
    from adapters import classifiers

    return classifiers.extractor("fashion", cache_dir, device, root)


def inception(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """pool3 (D = 2048) and logits of pytorch-fid's network."""
    from adapters import inception as module

    return module.inception(cache_dir, device)


def inception_tf(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """The same network on torch-fidelity's input."""
    from adapters import inception as module

    return module.inception_tf(cache_dir, device)


EXTRACTORS: dict[str, Builder] = {
    "pixels": pixels,
    "digit_classifier": digit_classifier,
    "fashion_classifier": fashion_classifier,
    "inception": inception,
    "inception_tf": inception_tf,
}


# ----------------------------------------------------------------------------------------- files


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write under a temporary name, then rename: ``path`` is never half written."""
    with written_atomically(Path(path)) as file:
        file.write(content)
