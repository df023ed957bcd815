"""Metrics of generated images against real ones, from one pass over each.

    reference = summarise(real_batches, build_extractors(["pixels", "digit_classifier"]))
    table_row = evaluate(sampler.stream(...), reference)

The keys name the feature space: ``frechet_pixels``, ``is_digit_classifier``. Only Inception's
features have established names: "inception" gives ``fid`` (and ``is_inception``, the score of the
same pass), "inception_tf" gives ``inception_score`` (see adapters/measuring/inception.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.measuring.extractor import Extractor, from_uint8
from sa_plugin.metrics import (
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

# Metrics that are computed only on request: they keep all features and cost more.
EXTRAS = ("kid", "precision_recall")
_KID_SUBSET = 1000


@dataclass(frozen=True)
class Summary:
    """What is kept of a set of images, real or generated, after one pass over them.

    ``variance`` is the sum over pixels of each pixel's variance (divided by ``count - 1``), in
    units of x in [-1, 1]: the trace of the pixels' covariance. ``logits``: [count, classes], in
    the images' order, for the extractors that give any; ``features``: [count, D] where they were
    kept. ``image_shape`` and ``variance`` are None for statistics from a file.
    """

    extractors: tuple[Extractor, ...]
    count: int
    image_shape: tuple[int, ...] | None
    variance: float | None
    moments: Mapping[str, Moments | Statistics]
    logits: Mapping[str, Tensor]
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Collector:
    """Makes a summary, batch by batch.

    Args:
        image_shape: the (C, H, W) that all images must have; by default the first batch's.
        keep_features: also keep all features; KID, precision and recall need them.

    Attributes:
        pixels, moments, logits: see ``Summary``; logits are in the order of the batches.
    """

    def __init__(
        self,
        extractors: Sequence[Extractor],
        *,
        image_shape: tuple[int, ...] | None = None,
        keep_features: bool = False,
    ) -> None:
        self.extractors = tuple(extractors)
        self.moments = {extractor.name: Moments() for extractor in extractors}
        if len(self.moments) < len(self.extractors):
            raise ValueError(f"extractors must differ in name, got {[e.name for e in extractors]}")
        self.logits: dict[str, list[Tensor]] = {}
        self.pixels = PixelVariance(image_shape)
        self._keeps = keep_features
        self._features: dict[str, list[Tensor]] = {}

    def update(self, batch: Tensor) -> None:
        """Add uint8 images [B, C, H, W]."""
        x = from_uint8(batch)
        self.pixels.update(batch)
        for extractor in self.extractors:
            extracted = extractor.extract(x)
            self.moments[extractor.name].update(extracted.features)
            if self._keeps:
                self._features.setdefault(extractor.name, []).append(extracted.features.cpu())
            if extracted.logits is not None:
                self.logits.setdefault(extractor.name, []).append(extracted.logits.cpu())

    def summary(self) -> Summary:
        """The summary of all images so far."""
        return Summary(
            extractors=self.extractors,
            count=self.pixels.count,
            image_shape=self.pixels.image_shape,
            variance=self.pixels.total(),
            moments=self.moments,
            logits={name: torch.cat(parts) for name, parts in self.logits.items()},
            features={name: torch.cat(parts) for name, parts in self._features.items()},
        )


def summarise(
    batches: Iterable[Tensor],
    extractors: Sequence[Extractor],
    *,
    image_shape: tuple[int, ...] | None = None,
    keep_features: bool = False,
) -> Summary:
    """Pass uint8 batches [B, C, H, W] through every extractor once; options as in ``Collector``."""
    collector = Collector(extractors, image_shape=image_shape, keep_features=keep_features)
    for batch in batches:
        collector.update(batch)
    return collector.summary()


def evaluate(
    batches: Iterable[Tensor], reference: Summary, *, splits: int = 10
) -> dict[str, float]:
    """Metrics of generated uint8 batches [B, C, H, W] against the reference's images.

    Keys: ``n_images``, ``sample_variance`` and ``reference_variance`` (see ``Summary``). Each
    extractor of the reference adds ``frechet_NAME``; a classifier also adds ``is_NAME`` and
    ``is_NAME_std`` over ``splits`` splits, if there are as many images.
    ``Extractor.metric_names`` holds these keys; for
    "inception" and "inception_tf" they include ``fid`` and ``inception_score``. Distances of a
    finite number of images are biased upwards: compare only results of equal ``n_images``.
    """
    samples = summarise(batches, reference.extractors, image_shape=reference.image_shape)
    return compare(samples, reference, splits=splits)


def compare(
    samples: Summary, reference: Summary, *, splits: int = 10, extras: Sequence[str] = ()
) -> dict[str, float]:
    """``evaluate`` for samples that are already summarised.

    ``extras``: "kid" adds ``kid_NAME`` and ``kid_NAME_std``; "precision_recall" adds
    ``precision_NAME`` and ``recall_NAME``. Both summaries must have kept their features for them.
    """
    check_extras(extras, reference)
    metrics = {"n_images": float(samples.count)}
    if samples.variance is not None:
        metrics["sample_variance"] = samples.variance
    if reference.variance is not None:
        metrics["reference_variance"] = reference.variance
    for extractor in reference.extractors:
        distance, score = extractor.metric_names
        made, real = samples.moments[extractor.name], reference.moments[extractor.name]
        metrics[distance] = frechet_distance(made.mu, made.sigma, real.mu, real.sigma)
        if extractor.name in samples.logits and samples.count < splits:
            warnings.warn(
                f"{score} is left out: its {splits} splits need an image each, got {samples.count}",
                stacklevel=2,
            )
        elif extractor.name in samples.logits:
            mean, std = inception_score(samples.logits[extractor.name], splits)
            metrics[score], metrics[f"{score}_std"] = mean, std
        if extras:
            pair = samples.features[extractor.name], reference.features[extractor.name]
            metrics |= _neighbour_metrics(extractor.name, *pair, extras)
    return metrics


def statistics_summary(
    statistics: Mapping[str, Statistics], extractors: Sequence[Extractor]
) -> Summary:
    """A reference made of statistics alone, given by the extractors' names."""
    for extractor in extractors:
        if extractor.name not in statistics:
            raise ValueError(f"statistics must be of {extractor.name!r}, got {list(statistics)}")
    count = min((found.count or 0 for found in statistics.values()), default=0)
    return Summary(tuple(extractors), count, None, None, dict(statistics), {})


def check_extras(extras: Sequence[str], reference: Summary) -> None:
    """ValueError for unknown extras, or for any extras if the reference kept no features."""
    for extra in extras:
        if extra not in EXTRAS:
            raise ValueError(f"metrics must be among {list(EXTRAS)}, got {extra!r}")
    if extras and not reference.features:
        raise ValueError(
            f"the metrics {list(extras)} need the images of the reference: its statistics alone "
            "are not enough"
        )


def _neighbour_metrics(
    name: str, made: Tensor, real: Tensor, extras: Sequence[str]
) -> dict[str, float]:
    metrics = {}
    if "kid" in extras:
        size = min(_KID_SUBSET, len(made), len(real))
        kid = kernel_distance(made, real, subset_size=size)
        metrics[f"kid_{name}"], metrics[f"kid_{name}_std"] = kid
    if "precision_recall" in extras:
        near = precision_recall(made, real)
        metrics[f"precision_{name}"], metrics[f"recall_{name}"] = near
    return metrics


class PixelVariance:
    """Sum over pixels of each pixel's variance, in whole numbers: exact in any order.

    ``sums``: the sums of each pixel's levels and of their squares, int64 [2, C, H, W].
    """

    def __init__(self, image_shape: tuple[int, ...] | None = None) -> None:
        self.count = 0
        self.image_shape = image_shape
        self.sums: Tensor | None = None

    def update(self, batch: Tensor) -> None:
        """Add uint8 images [B, C, H, W]."""
        levels = batch.cpu().to(torch.int64)
        self.add(len(batch), torch.stack([levels.sum(dim=0), levels.square().sum(dim=0)]))

    def add(self, count: int, sums: Tensor) -> None:
        """Add the sums of ``count`` images."""
        shape = tuple(sums.shape[1:])
        self.image_shape = self.image_shape or shape
        if shape != self.image_shape:
            raise ValueError(f"batches must hold images of shape {self.image_shape}, got {shape}")
        self.count += count
        self.sums = sums if self.sums is None else self.sums + sums

    def total(self) -> float:
        """The sum of variances, in units of x = level / 127.5 - 1."""
        if self.count < 2:
            raise ValueError(f"batches must hold at least 2 images, got {self.count or 'none'}")
        sums, squares = self.sums
        # A pixel's n sum(p^2) - sum(p)^2 fits int64 up to ten million images; the total does not.
        scatter = sum((self.count * squares - sums.square()).flatten().tolist())
        return scatter / (self.count * (self.count - 1)) / 127.5**2
