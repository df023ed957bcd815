"""Metrics of generated images against real ones, from one pass over each.

    reference = summarise(real_batches, build_extractors(["pixels", "digit_classifier"]))
    table_row = evaluate(sampler.stream(...), reference)

The keys name the feature space: ``frechet_pixels``, ``is_digit_classifier``. Inception's features
alone give ``fid`` and ``inception_score``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.features import Extractor, from_uint8
from sa_plugin.metrics import Moments, frechet_distance, inception_score


@dataclass(frozen=True)
class Summary:
    """What is kept of a set of images, real or generated, once they have streamed by.

    ``variance`` is the sum over pixels of each pixel's variance (divided by ``count - 1``), in
    units of x in [-1, 1]: the trace of the pixels' covariance. ``logits``: [count, classes], in
    the images' order, for the extractors that give any.
    """

    extractors: tuple[Extractor, ...]
    count: int
    image_shape: tuple[int, ...]
    variance: float
    moments: Mapping[str, Moments]
    logits: Mapping[str, Tensor]


def summarise(
    batches: Iterable[Tensor],
    extractors: Sequence[Extractor],
    *,
    image_shape: tuple[int, ...] | None = None,
) -> Summary:
    """Pass uint8 batches [B, C, H, W] through every extractor, once.

    ``image_shape``: the (C, H, W) that all must have; by default the first batch's.
    """
    moments = {extractor.name: Moments() for extractor in extractors}
    if len(moments) < len(extractors):
        raise ValueError(f"extractors must differ in name, got {[e.name for e in extractors]}")
    logits: dict[str, list[Tensor]] = {}
    spread: _PixelVariance | None = None
    for batch in batches:
        x = from_uint8(batch)
        spread = spread or _PixelVariance(image_shape or tuple(batch.shape[1:]))
        spread.update(batch)
        for extractor in extractors:
            extracted = extractor.extract(x)
            moments[extractor.name].update(extracted.features)
            if extracted.logits is not None:
                logits.setdefault(extractor.name, []).append(extracted.logits.cpu())
    if spread is None:
        raise ValueError("batches must hold at least 2 images, got none")
    return Summary(
        extractors=tuple(extractors),
        count=spread.count,
        image_shape=spread.image_shape,
        variance=spread.total(),
        moments=moments,
        logits={name: torch.cat(parts) for name, parts in logits.items()},
    )


def evaluate(
    batches: Iterable[Tensor], reference: Summary, *, splits: int = 10
) -> dict[str, float]:
    """Metrics of generated uint8 batches [B, C, H, W] against the reference's images.

    ``n_images``, ``sample_variance`` and ``reference_variance`` (see ``Summary``), and for each of
    the reference's extractors NAME ``frechet_NAME``; where it is a classifier also ``is_NAME`` and
    ``is_NAME_std`` over ``splits`` splits. ``Extractor.metric_names`` holds these keys, which for
    "inception" are ``fid``, ``inception_score`` and ``inception_score_std``. Distances of a finite
    number of images are biased upwards: compare only results of equal ``n_images``.
    """
    samples = summarise(batches, reference.extractors, image_shape=reference.image_shape)
    metrics = {
        "n_images": float(samples.count),
        "sample_variance": samples.variance,
        "reference_variance": reference.variance,
    }
    for extractor in reference.extractors:
        distance, score = extractor.metric_names
        made, real = samples.moments[extractor.name], reference.moments[extractor.name]
        metrics[distance] = frechet_distance(made.mu, made.sigma, real.mu, real.sigma)
        if extractor.name in samples.logits:
            mean, std = inception_score(samples.logits[extractor.name], splits)
            metrics[score], metrics[f"{score}_std"] = mean, std
    return metrics


class _PixelVariance:
    """Sum over pixels of each pixel's variance, from whole numbers: exact in any order."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        self.count = 0
        self.image_shape = image_shape
        self._sums = torch.zeros(2, *image_shape, dtype=torch.int64)  # of p and of p^2

    def update(self, batch: Tensor) -> None:
        """Take in uint8 images [B, C, H, W]."""
        if tuple(batch.shape[1:]) != self.image_shape:
            raise ValueError(
                f"batches must hold images of shape {self.image_shape}, "
                f"got {tuple(batch.shape[1:])}"
            )
        levels = batch.cpu().to(torch.int64)
        self._sums += torch.stack([levels.sum(dim=0), levels.square().sum(dim=0)])
        self.count += len(batch)

    def total(self) -> float:
        """In units of x = level / 127.5 - 1."""
        if self.count < 2:
            raise ValueError(f"batches must hold at least 2 images, got {self.count}")
        sums, squares = self._sums
        # n sum(p^2) - sum(p)^2 fits int64 up to ten million images.
        scatter = (self.count * squares - sums.square()).sum().item()
        return scatter / (self.count * (self.count - 1)) / 127.5**2
