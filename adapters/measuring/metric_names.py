"""What a metric's name says: the metric in words, its better direction, the data's own value."""

from __future__ import annotations

from collections.abc import Mapping

_WHOLE = {
    "fid": "Fréchet distance, Inception (FID)",
    "inception_score": "Inception Score",
    "sample_variance": "Variance of the samples",
}
_PREFIXES = {"frechet_": "Fréchet distance", "is_": "Inception Score"}


def lower_is_better(metric: str) -> bool | None:
    """Whether lower values are better; None for a metric without a better direction."""
    if metric == "fid" or metric.startswith("frechet_"):
        return True
    return False if metric == "inception_score" or metric.startswith("is_") else None


def direction(metric: str) -> str:
    """ "lower is better", "higher is better", or "" for a metric without a better direction."""
    lower = lower_is_better(metric)
    return "" if lower is None else f"{'lower' if lower else 'higher'} is better"


def in_words(metric: str) -> str:
    """The metric and its feature space in words; a name that is not a metric's as it is."""
    if metric in _WHOLE:
        return _WHOLE[metric]
    for prefix, words in _PREFIXES.items():
        if metric.startswith(prefix):
            return f"{words}, {metric.removeprefix(prefix).replace('_', ' ')}"
    return metric


def label(metric: str) -> str:
    """The metric in words with its better direction, for a plot."""
    better = direction(metric)
    return f"{in_words(metric)} ({better})" if better else in_words(metric)


def data_value(metric: str, cell: Mapping[str, float]) -> float | None:
    """The metric of the data themselves, where a cell (metric -> value) holds it; else None."""
    return cell["reference_variance"] if metric == "sample_variance" else None
