"""Numbers over seeds: mean, standard deviation, paired differences, and what they let one say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST_SEEDS = 3  # with fewer nothing is told apart: of two seeds, Student's factor is 12.7

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

    def supports(self, lower: bool) -> bool:
        """Whether it lies below zero (``lower``), or above zero, with three or more seeds."""
        return self.n >= FEWEST_SEEDS and (self.high < 0 if lower else self.low > 0)

    @property
    def tells_apart(self) -> bool:
        """Whether it excludes zero, with three or more seeds."""
        return self.supports(True) or self.supports(False)


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

    None with fewer than three common seeds. The means are over each line's own seeds, the
    differences over common ones. Where seeds are missing, the two can have different signs.
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


def verdict(
    line: str,
    reference: str,
    differences: Sequence[Interval | None],
    lower_is_better: bool | None,
) -> str:
    """In how many cells a line differs from the reference, in words.

    Args:
        differences: the line less the reference, paired by seed, one for each cell; None where a
            result is missing.
        lower_is_better: None for a metric without a better direction.

    With fewer than three seeds it says that nothing is told apart, and counts the means alone.
    """
    there = [difference for difference in differences if difference is not None]
    line, reference = (f'"{name}"' if "," in name else name for name in (line, reference))
    if not there:
        return f"{line} and {reference} have no cell in common yet."
    ahead, behind = ("above", "below") if lower_is_better is None else ("ahead of", "behind")
    cells, seeds = len(there), max(one.n for one in there)

    def count(below: bool) -> int:
        if seeds < FEWEST_SEEDS:
            return sum(one.mean < 0 if below else one.mean > 0 for one in there)
        return sum(one.supports(below) for one in there)

    better, worse = count(bool(lower_is_better)), count(not lower_is_better)
    text = f"{line} is {ahead} {reference} in {better} of {cells} cells, {behind} in {worse}"
    if seeds < FEWEST_SEEDS:
        few = "one seed" if seeds == 1 else f"{seeds} seeds"
        text += f"; {few}: nothing is told apart from chance alone."
    else:
        chance = (1 - CONFIDENCE) * sum(one.n >= FEWEST_SEEDS for one in there)
        text += (
            f", not told apart in {cells - better - worse}. By chance alone, {chance:.1f} would be "
            "told apart."
        )
    missing = len(differences) - cells
    return f"{text} Cells without a result: {missing}." if missing else text
