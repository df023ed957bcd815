"""Numbers over seeds: intervals, the supported best, and the verdict in words."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adapters.measuring.statistics import Interval, paired, spread, supported_best, verdict

NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6))
def test_the_paired_interval_is_students(pairs):
    values, reference = ({i: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    found = paired(values, reference)
    differences = np.array([a - b for a, b in pairs])
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)
    if np.ptp(differences) > 1e-6:
        expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_only_common_seeds_are_paired():
    found = paired({0: 1.0, 1: 2.0, 5: 100.0}, {1: 1.5, 0: 0.5, 7: -9.0})
    assert (found.mean, found.n) == (0.5, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_supports_nothing():
    found = paired({0: 3.0}, {0: 1.0})
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert not found.tells_apart
    assert math.isnan(spread({0: 3.0}).std)
    assert spread({}) is None
    assert supported_best([{0: 3.0}, {0: 1.0}], lower_is_better=True) is None


def test_the_best_needs_every_other_interval_on_its_side():
    clear = [{0: 1.0, 1: 1.1, 2: 0.9}, {0: 2.0, 1: 2.1, 2: 1.9}, {0: 3.0, 1: 3.0, 2: 3.1}]
    assert supported_best(clear, lower_is_better=True) == 0
    assert supported_best(clear, lower_is_better=False) == 2
    near = [*clear, {0: 0.9, 1: 1.3, 2: 0.8}]  # as good as the first, within its interval
    assert supported_best(near, lower_is_better=True) is None
    assert supported_best([clear[0], {}], lower_is_better=True) is None
    assert supported_best([clear[0]], lower_is_better=True) is None


def test_a_mean_over_other_seeds_does_not_make_a_line_best():
    """Worse in all common seeds, and with the better mean by one that the other lacks."""
    lines = [{0: 3.0, 1: 3.1, 2: 3.0}, {0: 3.2, 1: 3.31, 2: 3.2, 3: 1.0}]
    assert paired(lines[1], lines[0]).low > 0
    for sign, lower_is_better in ((1, True), (-1, False)):
        signed = [{seed: sign * value for seed, value in line.items()} for line in lines]
        assert supported_best(signed, lower_is_better) is None


def test_two_seeds_support_nothing():
    """Their interval may exclude zero: it says too little."""
    lines = [{0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}]
    difference = paired(*lines)
    assert difference.high < 0
    assert not difference.tells_apart
    assert supported_best(lines, lower_is_better=True) is None
    third = [{**line, 2: line[0]} for line in lines]
    assert paired(*third).tells_apart
    assert supported_best(third, lower_is_better=True) == 0


BELOW, ABOVE, BOTH = (Interval(m, m - 1, m + 1, 3) for m in (-2.0, 2.0, 0.5))


@pytest.mark.parametrize(
    ("lower", "said"),
    [
        (True, "SA-2 is ahead of B in 3 of 6 cells, behind in 1, not told apart in 2."),
        (False, "SA-2 is ahead of B in 1 of 6 cells, behind in 3, not told apart in 2."),
        (None, "SA-2 is above B in 1 of 6 cells, below in 3, not told apart in 2."),
    ],
)
def test_a_verdict_counts_cells(lower, said):
    found = verdict("SA-2", "B", [BELOW, BOTH, BELOW, ABOVE, BOTH, BELOW], lower)
    assert found == f"{said} By chance alone, 0.3 would be told apart."


@pytest.mark.parametrize(("seeds", "few"), [(1, "one seed"), (2, "2 seeds")])
def test_a_verdict_on_few_seeds_counts_means_and_tells_nothing_apart(seeds, few):
    differences = [
        paired(dict.fromkeys(range(seeds), value), dict.fromkeys(range(seeds), 1.0))
        for value in (0.5, 0.9, 2.0, 1.0)
    ]
    assert verdict("SA-2", "B", differences, lower_is_better=True) == (
        "SA-2 is ahead of B in 2 of 4 cells, behind in 1; "
        f"{few}: nothing is told apart from chance alone."
    )


def test_a_verdict_says_what_is_missing():
    found = verdict("B, scaled", "B", [BELOW, None, None], lower_is_better=True)
    assert found.startswith('"B, scaled" is ahead of B in 1 of 1 cells')
    assert found.endswith("Cells without a result: 2.")
    none = verdict("SA-2", "B", [None], lower_is_better=True)
    assert none == "SA-2 and B have no cell in common yet."
