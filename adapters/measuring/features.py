"""Feature spaces in which images are compared, by name in ``EXTRACTORS``.

A metric's name includes its feature space (``frechet_pixels``, ``is_digit_classifier``): numbers of
different spaces cannot be compared. Only Inception's are called ``fid`` and ``inception_score``.
To add a space, write a builder and enter it in ``EXTRACTORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from adapters.measuring import classifiers
from adapters.measuring import inception as networks
from adapters.measuring.extractor import Extracted, Extractor

CACHE = "cache"  # folder of the classifiers' weights, beside runs or in a grid's store

THUMBNAIL = 8  # pixels of a side

# (folder of weights, device, folder of datasets) -> extractor
Builder = Callable[[Path | None, torch.device, Path | None], Extractor]


def pixels(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """The flattened images themselves, D = C H W; their moments take D^2 numbers."""
    return Extractor("pixels", lambda x: Extracted(x.flatten(1)))


def thumbnails(cache_dir: Path | None, device: torch.device, root: Path | None) -> Extractor:
    """The images averaged to at most 8x8, D <= 64 C: quick, and blind to what is finer."""

    def extract(x: torch.Tensor) -> Extracted:
        size = [min(THUMBNAIL, side) for side in x.shape[2:]]
        return Extracted(torch.nn.functional.adaptive_avg_pool2d(x, size).flatten(1))

    return Extractor("thumbnails", extract)


EXTRACTORS: dict[str, Builder] = {
    "pixels": pixels,
    "thumbnails": thumbnails,
    # The hidden layers of classifiers, D = 64; Fashion-MNIST's files are below ``root``.
    "digit_classifier": partial(classifiers.extractor, "digits"),
    "fashion_classifier": partial(classifiers.extractor, "fashion"),
    # pool3 (D = 2048) and logits of pytorch-fid's network; "_tf": on torch-fidelity's input.
    "inception": lambda cache_dir, device, root: networks.inception(cache_dir, device),
    "inception_tf": lambda cache_dir, device, root: networks.inception_tf(cache_dir, device),
}


def check_names(names: Sequence[str]) -> None:
    """ValueError unless these are names of extractors, at least one, and each only once."""
    for name in names:
        if name not in EXTRACTORS:
            raise ValueError(f"features must be among {sorted(EXTRACTORS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"features must be different names, at least one, got {names}")


def headlines(names: Iterable[str]) -> tuple[str, ...]:
    """The metrics that these features can give a table: distances, scores and the variance."""
    of = [networks.NAMES.get(name, (f"frechet_{name}", f"is_{name}")) for name in names]
    return (*(metric for both in of for metric in both), "sample_variance")


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
