"""Metrics from features: images -> features -> moments -> numbers.

The caller makes the features and names the result after them: a distance in one feature space says
nothing about another feature space.
"""

from sa_plugin.metrics.frechet import frechet_distance
from sa_plugin.metrics.inception_score import inception_score
from sa_plugin.metrics.moments import Moments
from sa_plugin.metrics.neighbours import kernel_distance, precision_recall
from sa_plugin.metrics.statistics import Statistics, is_statistics

__all__ = [
    "Moments",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "is_statistics",
    "kernel_distance",
    "precision_recall",
]
