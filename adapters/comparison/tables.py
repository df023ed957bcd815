"""Tables of a comparison: numbers over seeds, and their differences from a reference."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from adapters.comparison.grid import Cell, Grid, Part
from adapters.experiment.tables import as_text, explain, headline_metrics, table
from adapters.hosts import get_process
from adapters.measuring.metric_names import data_value, lower_is_better
from adapters.measuring.statistics import (
    Interval,
    Spread,
    paired,
    spread,
    supported_best,
    verdict,
)
from sa_files.reading import one_line

Results = Mapping[Cell, Mapping[str, float]]  # finished cells -> metric -> value
BASELINE = "B = baseline, trained with the plain loss; SA-K: with the SA loss, windows of K steps."
MISSING = "-"
FAILED = "failed"


@dataclass(frozen=True)
class Entry:
    """A number of a table: one reverse process, line and number of steps.

    ``difference``: from the part's first line, paired by seed; None in that line itself.
    ``is_best``: best of the reverse process's lines, if the intervals support it. ``seeds``: how
    many there should be. ``failed``: how many of them failed.
    """

    spread: Spread | None
    difference: Interval | None
    is_best: bool
    seeds: int
    failed: int = 0

    def text(self, digits: int = 2) -> str:
        """Mean ± deviation, or why it is missing; the number of seeds, if some are missing."""
        if self.spread is None:
            return FAILED if self.failed else MISSING
        n = self.spread.n
        text = f"{self.spread.mean:.{digits}f}"
        if n > 1:
            text += f" ± {self.spread.std:.{digits}f}"
        if n == self.seeds:
            return text
        return f"{text} ({n} of {self.seeds} seeds{f', {self.failed} failed' * bool(self.failed)})"

    def difference_text(self, digits: int = 2) -> str:
        """Mean difference [low, high]."""
        if self.difference is None:
            return MISSING
        d = self.difference
        text = f"{d.mean:+.{digits}f}"
        if d.n > 1:
            text += f" [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"
        return text if d.n == self.seeds else f"{text} ({d.n} seeds)"


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    process: str
    line: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """The numbers of one part and one metric; ``data_value``: the metric of the data, if known."""

    part: Part
    metric: str
    heading: str
    rows: tuple[Row, ...]
    data_value: float | None

    @property
    def reference(self) -> str:
        """The title of the line that the others are compared with."""
        return self.rows[0].line

    @property
    def caption(self) -> str:
        """What the table of differences shows."""
        seeds = {e.difference.n for row in self.rows for e in row.entries if e.difference}
        interval = "one seed: no interval" if seeds == {1} else "95 % interval paired by seed"
        return f"Difference from {self.reference}, {interval}"

    @property
    def compared(self) -> list[Row]:
        """The rows that have differences."""
        return [row for row in self.rows if any(entry.difference for entry in row.entries)]

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each line but the reference: in how many cells the two are told apart."""
        lines: dict[str, list[Interval | None]] = {}
        for row in self.rows:
            differences = (entry.difference for entry in row.entries)
            lines.setdefault(row.line, []).extend(differences)
        del lines[self.reference]
        lower = lower_is_better(self.metric)
        return [verdict(line, self.reference, found, lower) for line, found in lines.items()]


def build_tables(
    grid: Grid, results: Results, failed: Callable[[Cell], bool] = lambda cell: False
) -> list[Table]:
    """A table for each part and metric; parts without results are left out."""
    tables = []
    for part in grid.parts:
        there = [results[cell] for s in grid.seeds for cell in part.cells(s) if cell in results]
        if not there:
            continue
        for metric in _metrics(grid, there[0]):
            rows = tuple(_rows(grid, part, metric, results, failed))
            heading, own = explain(metric, there[0]), data_value(metric, there[0])
            tables.append(Table(part, metric, heading, rows, own))
    return tables


def values_of(grid: Grid, results: Results, cell: Cell, metric: str) -> dict[int, float]:
    """Seed -> value of this cell and of the same cell with the other seeds."""
    like = {s: Cell(cell.line, s, cell.process, cell.steps) for s in grid.seeds}
    return {s: results[c][metric] for s, c in like.items() if c in results}


def _metrics(grid: Grid, metrics: Mapping[str, float]) -> list[str]:
    every = headline_metrics({"": {"": dict(metrics)}})
    return [name for name in every if name in grid.config.metrics or not grid.config.metrics]


def _rows(
    grid: Grid, part: Part, metric: str, results: Results, failed: Callable[[Cell], bool]
) -> Iterator[Row]:
    for process in part.processes:
        entries: list[list[Entry]] = [[] for _ in part.lines]
        for steps in part.steps:
            cells = [Cell(line, grid.seeds[0], process, steps) for line in part.lines]
            values = [values_of(grid, results, cell, metric) for cell in cells]
            better = lower_is_better(metric)
            best = None if better is None else supported_best(values, better)
            for i, cell in enumerate(cells):
                bad = sum(failed(Cell(cell.line, s, process, steps)) for s in grid.seeds)
                difference = paired(values[i], values[0]) if i else None
                of_all = spread(values[i])
                entries[i].append(Entry(of_all, difference, i == best, len(grid.seeds), bad))
        for line, row in zip(part.lines, entries, strict=True):
            yield Row(get_process(process).title, grid.title(line), tuple(row))


# --------------------------------------------------------------------------------------- formats


def legend(tables: Sequence[Table]) -> str:
    """What B and SA-K stand for, if a line is called so; else ""."""
    names = {row.line.split(",")[0] for one in tables for row in one.rows}
    return BASELINE if "B" in names else ""


def markdown(tables: Sequence[Table]) -> str:
    """The tables, their verdicts and differences, part by part."""
    text: list[str] = [f"{legend(tables)}\n"] if legend(tables) else []
    for part, group in groupby(tables, lambda one: one.part):
        text.append(f"## {as_text(part.title)}\n")
        for one in group:
            text.append(f"**{as_text(one.heading)}**\n")
            text += [f"- {as_text(sentence)}" for sentence in one.verdicts]
            text.append(("\n" if one.verdicts else "") + _markdown_table(one, one.rows, _marked))
            if one.compared:
                difference = _markdown_table(one, one.compared, Entry.difference_text)
                text.append(f"{as_text(one.caption)}:\n\n{difference}")
    return "\n".join(text)


def _marked(entry: Entry) -> str:
    return f"**{entry.text()}**" if entry.is_best else entry.text()


def _markdown_table(one: Table, rows: Sequence[Row], show: Callable[[Entry], str]) -> str:
    head = ["steps", "", *map(str, one.part.steps)]
    lines = [[row.process, row.line, *map(show, row.entries)] for row in rows]
    return table(head, lines, left=2)


_TEX = str.maketrans(
    {
        **{special: "\\" + special for special in "&%#_${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
)


def latex(tables: Sequence[Table]) -> str:
    """The tables and their differences in LaTeX; they need the package booktabs."""
    text = ["% needs \\usepackage{booktabs}"]
    for one in tables:
        title = f"{one.part.title}: {one.heading}."
        text += _tex_table(one, one.rows, f"{title} {legend([one])}", _tex_entry)
        if one.compared:
            text += _tex_table(one, one.compared, f"{title} {one.caption}.", _tex_difference)
    return "\n".join(text)


def _tex_table(
    one: Table, rows: Sequence[Row], caption: str, show: Callable[[Entry], str]
) -> list[str]:
    head = ["Process", "Training", *map(str, one.part.steps)]
    lines = [[_tex(row.process), _tex(row.line), *map(show, row.entries)] for row in rows]
    return [
        r"\begin{table}",
        rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{ll{'r' * len(one.part.steps)}}}",
        r"\toprule",
        rf"{' & '.join(head)} \\",
        r"\midrule",
        *(rf"{' & '.join(line)} \\" for line in lines),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]


def _tex_entry(entry: Entry) -> str:
    text = entry.text().replace("±", r"$\pm$")
    return rf"\textbf{{{text}}}" if entry.is_best else text


def _tex_difference(entry: Entry) -> str:
    return re.sub(r"[+-][\d.]+", r"$\g<0>$", entry.difference_text())  # a minus, not a hyphen


def _tex(text: str) -> str:
    return one_line(text).translate(_TEX)


def comma_separated(grid: Grid, results: Results, scales: Mapping[Cell, float | str]) -> str:
    """All cells of all seeds as CSV, a line for each cell."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["training", "sampling", "seed", "process", "steps", "eps_scale"]
    writer.writerow([*head, *names])
    for cell, metrics in results.items():
        line = (cell.line.training, cell.line.sampling, cell.seed, cell.process, cell.steps)
        numbers = (metrics.get(name, "") for name in names)
        writer.writerow([*line, scales[cell], *numbers])
    return text.getvalue()
