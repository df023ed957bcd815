"""The tables of a comparison, and what they say of differences."""

import csv
import io
import re

import pytest
from ml_collections import FrozenConfigDict

from adapters.comparison.grid import Cell, Grid, Line
from adapters.comparison.page import Report, html_page
from adapters.comparison.tables import build_tables, comma_separated, latex, markdown
from configs import digits
from configs.comparison import base_comparison, baseline, part, sa, sampling


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
    assert r"\textbf{3.90 $\pm$ 0.90}" in latex(tables)


def test_every_line_has_a_verdict_under_its_metric():
    grid = a_grid()
    tables = build_tables(grid, results(grid))
    said = "SA-2 is ahead of B in 2 of 4 cells, behind in 0, not told apart in 2."
    assert [one.verdicts[0].startswith(said) for one in tables] == [True, False]
    assert tables[1].verdicts[0].startswith("SA-2 is above B in 0 of 4 cells")
    text = markdown(tables)
    assert text.index("B = baseline") < text.index(said) < text.index("| DDPM small")
    alone = a_grid(parts={"main": part("Main", ("sa",), ("ddim",), (5,))})
    (distances, _) = build_tables(alone, results(alone))
    assert not distances.verdicts
    assert "baseline" not in markdown([distances])


@pytest.mark.parametrize(("seeds", "bold"), [((0,), 0), ((0, 1), 0), ((0, 1, 2), 2)])
def test_bold_needs_three_seeds(seeds, bold):
    grid = a_grid(seeds=seeds)
    found = results(grid)
    for cell in found:  # a difference that does not vary: any interval excludes zero
        found[cell]["frechet_pixels"] = 4.0 - (cell.line.training == "sa") * (cell.steps == 5)
    tables = build_tables(grid, found)
    assert markdown(tables).count("** |") == bold
    assert latex(tables).count("textbf") == bold
    assert ("nothing is told apart" in tables[0].verdicts[0]) == (not bold)


def test_latex_has_the_differences_with_signs_of_mathematics():
    grid = a_grid()
    text = latex(build_tables(grid, results(grid)))
    assert r"DDIM & SA-2 & $-1.10$ [$-1.35$, $-0.85$] & $+0.00$ [$-1.24$, $+1.24$] \\" in text
    assert text.count(r"\begin{table}") == 4  # two metrics
    assert r"Difference from B, 95 \% interval paired by seed." in text
    assert "B = baseline" in text


def test_the_page_leads_to_the_files_beside_it():
    grid = a_grid()
    tables = tuple(build_tables(grid, results(grid)))
    page = html_page(Report("", "", tables, (), {}, "", (), ""))
    assert re.findall(r'href="([^#"]+)"', page) == ["cells.csv", "tables.tex"]
    assert page.index("B = baseline") < page.index("SA-2 is ahead of B in 2 of 4 cells")


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
