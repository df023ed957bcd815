"""Covariances at equal calls of the network: python -m benchmarks.calls --cells CSV

Takes the cells of configs/digits_covariances_tables.py (``cells.csv`` of its report). A derivative
counts as a call. Each row gets the largest number of steps whose calls are within the budget; the
last step adds no noise and needs no derivative. The differences are paired by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import FrozenConfigDict

from adapters.comparison.corrections import calls_of_cell
from adapters.comparison.grid import Cell, Grid, Line
from adapters.experiment.tables import table
from adapters.hosts import PROCESSES
from adapters.measuring.statistics import paired
from benchmarks.cells import Cells, read_cells, shown, values
from configs import digits_covariances_tables

BUDGETS = (10, 25, 50)
PLAIN = {"ddpm": "ddpm_small", "ddim": "ddim"}  # what the others are compared with


def calls(grid: Grid, line: str, process: str, steps: int) -> int:
    """Calls of the network for an image, with derivatives."""
    cell = Cell(Line.parse(line), grid.seeds[0], process, steps)
    return calls_of_cell(grid, cell, grid.experiment(cell.line, cell.seed, process).sample)


def within(grid: Grid, cells: Cells, line: str, process: str, budget: int) -> int | None:
    """The largest number of steps that there is within the budget."""
    there = {steps for one, row, steps in cells if (one, row) == (line, process)}
    return max((s for s in there if calls(grid, line, process, s) <= budget), default=None)


def rows(grid: Grid, cells: Cells, metric: str, forward: str) -> Iterator[list[str]]:
    """For each row and line: by budget the steps, the difference from the plain row."""
    there = dict.fromkeys((line, process) for line, process, _ in cells)
    for line, process in there:
        if PROCESSES[process].forward != forward:
            continue
        row = [PROCESSES[process].title, grid.title(Line.parse(line))]
        for budget in BUDGETS:
            plain = within(grid, cells, Line.parse(line).training, PLAIN[forward], budget)
            steps = within(grid, cells, line, process, budget)
            if steps is None or plain is None:
                row += ["", ""]
                continue
            found = values(cells, (line, process, steps), metric)
            training = Line.parse(line).training
            reference = values(cells, (training, PLAIN[forward], plain), metric)
            mean = f"{sum(found.values()) / len(found):.2f} ({steps})"
            is_plain = process == PLAIN[forward]
            row += [mean, "" if is_plain else shown(paired(found, reference))]
        yield row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    parser.add_argument("--metric", default="frechet_digit_classifier")
    args = parser.parse_args(argv)
    grid = Grid(FrozenConfigDict(digits_covariances_tables.get_config()))
    cells = read_cells(args.cells, (args.metric,))
    head = ["row", "line"]
    for budget in BUDGETS:
        head += [f"{budget} calls (steps)", "less the plain row"]
    for forward, plain in PLAIN.items():
        print(f"{args.metric}, lower is better; plain row: {PROCESSES[plain].title}\n")
        print(table(head, rows(grid, cells, args.metric, forward), left=2))


if __name__ == "__main__":
    main()
