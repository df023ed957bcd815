"""Numbers over seeds, and the tables made of them."""

import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import FrozenConfigDict
from scipy import stats

from adapters.comparison.engine import Outcome
from adapters.comparison.grid import Cell, Grid, Line
from adapters.comparison.page import Report, html_page
from adapters.comparison.statistics import expected_by_chance, paired, spread, supported_best
from adapters.comparison.tables import build_tables, comma_separated, latex, markdown
from configs import digits
from configs.comparison import base_comparison, baseline, part, sa, sampling

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
    assert not found.excludes_zero
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
    """Worse in both common seeds, and with the better mean by one that the other lacks."""
    lines = [{0: 3.0, 1: 3.1}, {0: 3.2, 1: 3.31, 2: 1.0}]
    assert paired(lines[1], lines[0]).low > 0
    for sign, lower_is_better in ((1, True), (-1, False)):
        signed = [{seed: sign * value for seed, value in line.items()} for line in lines]
        assert supported_best(signed, lower_is_better) is None


def test_chance_counts_intervals_alone():
    with_interval = paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    without = paired({0: 1.0}, {0: 0.0})
    assert expected_by_chance([with_interval] * 20 + [without]) == pytest.approx(1.0)


def a_grid(**keys):
    """B and SA-2 in DDPM and DDIM; keys of the comparison can be replaced."""
    config = base_comparison()
    config.name, config.store = "test", "test"
    config.seeds = (0, 1, 2)
    config.experiment = digits.get_config("sn")
    config.trainings = {"b": baseline(), "sa": sa()}
    config.samplings = {"default": sampling("")}
    config.parts = {"main": part("Main", ("b", "sa"), ("ddpm_small", "ddim"), (5, 10))}
    config.tables = ("main",)
    for key, value in keys.items():
        config[key] = value
    return Grid(FrozenConfigDict(config))


def results(grid):
    """SA is better by 1.0 +- 0.1 at 5 steps, and equal at 10 on the average."""
    found = {}
    for cell in grid.cells:
        by = 1.0 + 0.1 * cell.seed if cell.steps == 5 else 0.5 * (cell.seed - 1)
        value = 4.0 + cell.seed - by * (cell.line.training == "sa")
        found[cell] = {
            "n_images": 100.0,
            "sample_variance": 10.0,
            "reference_variance": 11.0,
            "frechet_pixels": value,
        }
    return found


def test_tables_show_means_differences_and_the_supported_best():
    grid = a_grid()
    tables = build_tables(grid, results(grid))
    assert [one.metric for one in tables] == ["frechet_pixels", "sample_variance"]
    b, with_sa = tables[0].rows[:2]
    assert (b.process, b.line, with_sa.line) == ("DDPM small", "B", "SA-2")
    assert b.entries[0].text() == "5.00 ± 1.00"
    assert with_sa.entries[0].spread.mean == pytest.approx(3.9)
    assert with_sa.entries[0].difference.mean == pytest.approx(-1.1)
    assert [entry.is_best for entry in with_sa.entries] == [True, False]
    assert not any(entry.is_best for entry in b.entries)
    assert not any(entry.is_best for row in tables[1].rows for entry in row.entries)
    text = markdown(tables)
    assert "**3.90 ± 0.90**" in text
    assert "-1.10 [-1.35, -0.85]" in text
    assert "2 of 4 exclude zero; 0.2 would by chance" in text
    assert r"\textbf{3.90 $\pm$ 0.90}" in latex(tables)


def test_missing_and_failed_cells_are_told_apart():
    grid = a_grid()
    found = results(grid)
    failing, gone = Line("sa"), Line("b")
    for seed in grid.seeds:
        del found[Cell(failing, seed, "ddim", 5)]
        del found[Cell(gone, seed, "ddim", 10)]
    tables = build_tables(grid, found, lambda cell: cell.line == failing)
    b, with_sa = tables[0].rows[2:]
    assert b.entries[1].text() == "-"
    assert with_sa.entries[0].text() == "failed"
    assert with_sa.entries[1].difference_text() == "-"


def test_seeds_that_are_missing_leave_their_mean_over_the_others():
    grid = a_grid()
    found = results(grid)
    del found[Cell(Line("b"), 2, "ddpm_small", 5)]
    entry = build_tables(grid, found)[0].rows[0].entries[0]
    assert (entry.spread.n, entry.spread.mean) == (2, 4.5)
    assert entry.text() == "4.50 ± 0.71 (2 of 3 seeds)"
    compared = build_tables(grid, found)[0].rows[1].entries[0]
    assert compared.difference.n == 2
    assert compared.difference_text() == "-1.05 [-1.69, -0.41] (2 seeds)"
    failing = build_tables(grid, found, lambda cell: cell not in found)[0].rows[0].entries[0]
    assert failing.text() == "4.50 ± 0.71 (2 of 3 seeds, 1 failed)"


def test_titles_that_do_not_tell_lines_apart_are_refused():
    trainings = {"b": baseline(), "sa": {**sa(), "title": "B"}}
    with pytest.raises(ValueError, match="titles must differ, got 'B' for two lines"):
        a_grid(trainings=trainings)


def test_csv_has_every_cell():
    grid = a_grid()
    found = results(grid)
    scales = dict.fromkeys(found, 0.5)
    rows = list(csv.DictReader(io.StringIO(comma_separated(grid, found, scales))))
    assert len(rows) == len(grid.cells) == 24
    first = rows[0]
    assert (first["training"], first["seed"], first["steps"]) == ("b", "0", "5")
    assert float(first["frechet_pixels"]) == 4.0
    assert float(first["eps_scale"]) == 0.5


def test_chosen_metrics_alone_have_tables():
    grid = a_grid(metrics=("sample_variance",))
    assert {one.metric for one in build_tables(grid, results(grid))} == {"sample_variance"}


def test_latex_escapes_what_tex_reads():
    trainings = {"b": baseline(), "sa": {"title": "50% & more_", "set": {}}}
    grid = a_grid(trainings=trainings)
    assert r"50\% \& more\_" in latex(build_tables(grid, results(grid)))


def test_the_page_escapes_every_text():
    hostile = "<script>alert(1)</script>"
    trainings = {"b": baseline(), "sa": {"title": hostile, "set": {}}}
    grid = a_grid(trainings=trainings)
    page = html_page(
        Report(
            title=hostile,
            state=hostile,
            tables=tuple(build_tables(grid, results(grid))),
            pictures=(),
            facts={hostile: hostile},
            published=hostile,
            failures=(Outcome(hostile, error=hostile, log=hostile),),
            config=hostile,
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 6
