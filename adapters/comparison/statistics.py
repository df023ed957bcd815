"""Numbers over seeds: mean, standard deviation, and the paired difference of two trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95

Values = Mapping[int, float]  # seed -> value


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (divided by n - 1; NaN for one seed) of ``n`` seeds."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; low and high are NaN for one seed."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def supports(self, lower: bool) -> bool:
        """Whether the whole interval lies below zero (``lower``), or above zero."""
        return self.high < 0 if lower else self.low > 0


def spread(values: Values) -> Spread | None:
    """The values' mean and standard deviation; None where there is no value."""
    numbers = list(values.values())
    if not numbers:
        return None
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan
    return Spread(float(np.mean(numbers)), std, len(numbers))


def paired(values: Values, reference: Values) -> Interval | None:
    """Student's interval of ``values - reference`` over the seeds that both have.

    Runs of one seed share the order of the data, the initial weights and the samples' noise, so
    their difference varies less than each of them. None where they have no common seed.
    """
    seeds = sorted(set(values) & set(reference))
    differences = [values[seed] - reference[seed] for seed in seeds]
    n = len(differences)
    if n == 0:
        return None
    mean = float(np.mean(differences))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import t  # takes half a second to import

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def supported_best(lines: Sequence[Values], lower_is_better: bool) -> int | None:
    """The index of the line with the best mean, if all its paired differences support that.

    The means are over each line's own seeds, the differences over common ones. Where seeds are
    missing, the two can have different signs.
    """
    if len(lines) < 2 or not all(lines):
        return None
    means = [float(np.mean(list(values.values()))) for values in lines]
    best = int(np.argmin(means) if lower_is_better else np.argmax(means))
    for i, values in enumerate(lines):
        difference = None if i == best else paired(lines[best], values)
        if i != best and (difference is None or not difference.supports(lower_is_better)):
            return None
    return best


def expected_by_chance(intervals: Sequence[Interval]) -> float:
    """How many of these intervals would exclude zero if no difference were real."""
    return (1 - CONFIDENCE) * sum(interval.n > 1 for interval in intervals)
